"""Several processes on one machine, connected by gloo, that each run a function."""

from __future__ import annotations

import multiprocessing
import pickle
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bptt.train.processes import Processes

SECONDS = 300
"""After which a process that does not answer is killed."""


def server() -> multiprocessing.context.ForkServerContext:
    """What forks processes off a server that has imported the package once, and what an optimizer imports when made."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "bptt.cli.app", "torch._dynamo", __name__])
    return context


def forked(world: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(processes, *arguments)` returns in each of `world` processes, by rank. folder: for the rendezvous.

    They are gone when this returns.
    """
    context = server()
    meeting = folder / f"rendezvous-{len(list(folder.glob('rendezvous-*')))}"
    pipes = [context.Pipe(duplex=False) for _ in range(world)]
    workers = [
        context.Process(target=_work, args=(rank, world, meeting, pipes[rank][1], function, arguments))
        for rank in range(world)
    ]
    try:
        for worker in workers:
            worker.start()
        answers = []
        for rank, (end, other) in enumerate(pipes):
            other.close()  # so that the end of a process that died is seen
            assert end.poll(SECONDS), f"process {rank} of {world} does not answer"
            answers.append(pickle.loads(end.recv_bytes()))
        for rank, (done, answer) in enumerate(answers):
            assert done, f"process {rank} of {world}:\n{answer}"
        return [answer for _, answer in answers]
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.join(5)
                worker.kill()
                worker.join()
                worker.close()
        for end, _ in pipes:
            end.close()


def _work(
    rank: int, world: int, meeting: Path, answer: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    try:
        limit = timedelta(seconds=SECONDS)
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=limit)
        result = pickle.dumps((True, function(Processes(rank, world), *arguments)))  # tensors by value
        answer.send_bytes(result)
        dist.destroy_process_group()
    except BaseException:
        answer.send_bytes(pickle.dumps((False, traceback.format_exc())))
