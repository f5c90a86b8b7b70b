"""A measurement in a process of its own, held to as many cores as threads are asked for.

JAX has no other way to be told how many threads to use, and this one is the same for every contender.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import torch

from .results import Row
from .tables import Selection, measure

__all__ = ["can_hold", "measured"]

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""Environment variables read by the libraries below torch and NumPy when they are loaded."""


def can_hold() -> bool:
    """Whether this system can hold a process to some cores: Linux can."""
    return hasattr(os, "sched_setaffinity")


def measured(selection: Selection, threads: int) -> Generator[Row]:
    """Every row of a selection, as it is measured. Closing the iterator ends the process.

    threads: at most as many as there are cores. Must be called from the main thread.

    Raises RuntimeError, with the process's own traceback, where that fails or dies.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(selection, threads, sender), daemon=True)
    with _inherited(threads):
        process.start()
    sender.close()
    try:
        while True:
            try:
                message = receiver.recv()
            except EOFError:
                process.join()
                raise RuntimeError(f"the measuring process died, exit status {process.exitcode}") from None
            if message is None:
                return
            if isinstance(message, str):
                raise RuntimeError(f"the measuring process failed:\n{message}")
            yield message
    finally:
        process.terminate()
        process.join()
        receiver.close()


@contextmanager
def _inherited(threads: int) -> Iterator[None]:
    """What the process must find when it starts; afterwards all is as it was.

    Ctrl-C reaches every process of a terminal: the new one leaves it to this one.
    """
    environment = {name: os.environ.get(name) for name in THREADS}
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    held = os.sched_getaffinity(0) if sys.platform == "linux" else set()
    try:
        os.environ.update(dict.fromkeys(THREADS, str(threads)))
        if sys.platform == "linux":
            os.sched_setaffinity(0, sorted(held)[:threads])
        yield
    finally:
        if sys.platform == "linux":
            os.sched_setaffinity(0, held)
        for name, value in environment.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        signal.signal(signal.SIGINT, handler)


def _work(selection: Selection, threads: int, sender: Connection) -> None:
    torch.set_num_threads(threads)
    try:
        for row in measure(selection, threads):
            sender.send(row)
        sender.send(None)
    except Exception:
        sender.send(traceback.format_exc())
