"""A first call that may take so long and no longer: for contenders that compile before they compute."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from .contest import Call

__all__ = ["COMPILE_SECONDS", "first_within"]

COMPILE_SECONDS = 120.0
"""What torch.compile of a step may take, forward and backward, where nothing else is said."""


class _Over(BaseException):
    """The time is up. No Exception: a compiler that catches those would go on."""


def first_within(seconds: float, call: Call, what: str) -> Call:
    """A call whose first run raises RuntimeError where it takes longer than so many seconds.

    what: of what the error speaks. In a thread that is not the main one, and on systems without SIGALRM, there is no
    limit.

    >>> from time import sleep
    >>> first_within(0.01, lambda: [sleep(9)], "sleeping")()
    Traceback (most recent call last):
    RuntimeError: sleeping took longer than 0.01 s
    """
    done = False

    def limited() -> Sequence[Any]:
        nonlocal done
        if done:
            return call()
        try:
            with _limit(seconds):
                answer = call()
        except _Over:
            raise RuntimeError(f"{what} took longer than {seconds:g} s") from None
        done = True
        return answer

    return limited


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(number: int, frame: FrameType | None) -> None:
        raise _Over

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
