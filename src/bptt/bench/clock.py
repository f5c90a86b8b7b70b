"""How time is taken: everything to be compared in turn, in one process, medians."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter, process_time, sleep
from typing import NamedTuple

import torch

__all__ = ["Product", "Timing", "interleaved", "product"]

SAMPLE = 1e-3
"""Seconds that one sample lasts at least: a shorter call is repeated within it."""

PAUSE = 3e-3
"""Seconds before each sample, in which worker threads of the one before stop spinning."""

MOST = 200
"""Samples of each at most."""

ORDER = 2048
"""Of the square matrices whose product is the machine's own rate."""


@dataclass(frozen=True)
class Timing:
    """Seconds a call takes: the median and the quartiles over `samples` samples."""

    median: float
    low: float
    high: float
    samples: int


def interleaved(
    calls: Mapping[str, Callable[[], object]], seconds: float, least: int = 5, pause: float = PAUSE
) -> dict[str, Timing]:
    """How long each call takes, all measured in turn, every second round in reverse order.

    seconds: about how long to go on. least: samples of each at least, whatever that takes. pause: seconds of sleep
    before each sample.

    >>> sorted(interleaved({"a": lambda: 1, "b": lambda: 2}, seconds=0.0, least=2))
    ['a', 'b']
    """
    repeats: dict[str, int] = {}
    lap = SAMPLE  # seconds of one round
    for name, call in calls.items():
        call()
        taken = _seconds(call, 1)
        repeats[name] = max(1, math.ceil(SAMPLE / taken))
        lap += pause + taken * (repeats[name] + (repeats[name] > 1))
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(max(least, min(MOST, int(seconds / lap)))):
        for name in names if turn % 2 == 0 else reversed(names):
            sleep(pause)
            if repeats[name] > 1:
                calls[name]()  # brings its code and data back into the caches, as its own loop would
            samples[name].append(_seconds(calls[name], repeats[name]))
    return {name: _timing(values) for name, values in samples.items()}


class Product(NamedTuple):
    """A product of large matrices. rate: FLOP/s. cores: seconds of processor time that it got per second."""

    rate: float
    cores: float


def product() -> Product:
    """One float32 product of 2048 x 2048 matrices in torch, with the threads it has now."""
    a, b, out = (torch.ones(ORDER, ORDER) for _ in range(3))
    torch.mm(a, b, out=out)
    before = process_time()
    seconds = _seconds(lambda: torch.mm(a, b, out=out), 1)
    return Product(2 * ORDER**3 / seconds, (process_time() - before) / seconds)


def _seconds(call: Callable[[], object], repeats: int) -> float:
    start = perf_counter()
    for _ in range(repeats):
        call()
    return (perf_counter() - start) / repeats


def _timing(values: list[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, low, high, len(values))
