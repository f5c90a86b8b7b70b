"""How time is taken: everything to be compared in turn, in one process, medians with their quartiles, and a guard."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter, process_time, sleep
from typing import NamedTuple

import torch

from . import kernels

__all__ = ["Guard", "Product", "Timing", "disturbed", "interleaved", "now", "product"]

SAMPLE = 1e-3
"""Seconds that one sample lasts at least: a shorter call is repeated within it."""

PAUSE = 3e-3
"""Seconds before each sample, in which worker threads of the one before stop spinning."""

COLD = 2e-2
"""Seconds of a call up to which it counts that caches have been emptied before it."""

REPEATS = 1000
"""Of a call within a sample, at most."""

MOST = 200
"""Samples of each at most."""

APART = 5.0
"""Ranges between quartiles, over the root of the number of samples, by which medians differ that are told apart."""

ORDER = 2048
"""Of the square matrices whose product is the machine's own rate."""

GUARD = 1024
"""Of those whose product is only to tell whether the machine is disturbed: tens of milliseconds on a core."""

LOOKS = 5
"""Of a guard, at most, beside the last."""

SHARE = 0.9
"""Of the cores that its threads could have: a product that gets less was disturbed by other programs."""


@dataclass(frozen=True)
class Timing:
    """Seconds a call takes: the median and the quartiles over `samples` samples."""

    median: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Timing:
        """Of samples, at least 2.

        >>> Timing.of([1.0, 2.0, 3.0, 4.0, 50.0])
        Timing(median=3.0, low=2.0, high=4.0, samples=5)
        """
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, len(values))

    @property
    def spread(self) -> float:
        """Seconds between the quartiles."""
        return self.high - self.low

    def overlaps(self, other: Timing) -> bool:
        """Whether the ranges between the quartiles meet."""
        return self.low <= other.high and other.low <= self.high

    def apart(self, other: Timing) -> bool:
        """Whether the clock tells the two from one another: the ranges between the quartiles do not meet, and the
        medians differ by more than either range is wide, times 5 / sqrt(samples) where that is more.

        That is about four standard errors of the difference between two medians, so that of eight rivals that take as
        long, one is called faster in one comparison of a hundred (nine samples each, noise of 10 %), in one of twenty
        with five.

        >>> one = Timing(1.0, 0.9, 1.1, 5)
        >>> one.apart(Timing(1.5, 1.4, 1.6, 5)), one.apart(Timing(1.5, 1.2, 1.8, 5))
        (True, False)
        """
        one, two = sorted((self, other), key=lambda timing: timing.median)
        widest = max(one.spread, two.spread) * max(1.0, APART / math.sqrt(min(one.samples, two.samples)))
        return not one.overlaps(two) and two.median - one.median > widest


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    seconds: float,
    least: int = 5,
    pause: float = PAUSE,
    guard: Guard | None = None,
) -> dict[str, Timing]:
    """How long each call takes, all measured in turn, every second round in reverse order.

    seconds: about how long to go on. least: samples of each at least, whatever that takes. pause: seconds of sleep
    before each sample. guard: looks before some rounds and after the last.

    >>> sorted(interleaved({"a": lambda: 1, "b": lambda: 2}, seconds=0.0, least=2))
    ['a', 'b']
    """
    cost: dict[str, float] = {}
    for name, call in calls.items():
        call()
        cost[name] = _seconds(call, 1)
        if cost[name] < COLD:
            cost[name] = min(cost[name], _seconds(call, 1))
    repeats = {name: max(1, math.ceil(SAMPLE / max(each, SAMPLE / REPEATS))) for name, each in cost.items()}
    # One call more before each sample brings its code and data back into the caches, as its own loop would.
    warmed = {name: each < COLD for name, each in cost.items()}
    lap = SAMPLE + sum(pause + each * (repeats[name] + warmed[name]) for name, each in cost.items())  # of one round
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    turns = max(least, min(MOST, int(seconds / lap)))
    for turn in range(turns):
        if guard is not None and turn % math.ceil(turns / LOOKS) == 0:
            guard.look()
        for name in names if turn % 2 == 0 else reversed(names):
            sleep(pause)
            if warmed[name]:
                calls[name]()
            samples[name].append(_seconds(calls[name], repeats[name]))
    if guard is not None:
        guard.look()
    return {name: Timing.of(values) for name, values in samples.items()}


class Product(NamedTuple):
    """A product of large matrices. rate: FLOP/s. cores: seconds of processor time that it got per second."""

    rate: float
    cores: float


def product(order: int = ORDER) -> Product:
    """One float32 product of square matrices on the CPU as the kernels have it, on the threads that torch has now."""
    a, b = (torch.ones(order, order, dtype=torch.float32, device="cpu") for _ in range(2))
    kernels.product(a, b)
    before = process_time()
    seconds = _seconds(lambda: kernels.product(a, b), 1)
    return Product(2 * order**3 / seconds, (process_time() - before) / seconds)


def disturbed(cores: float, threads: int) -> bool:
    """Whether other programs took so much of the machine that times say little.

    cores: seconds of processor time per second that a product on so many threads got.

    >>> disturbed(1.95, threads=2), disturbed(1.2, threads=2)
    (False, True)
    """
    return cores < SHARE * threads


class Guard:
    """Looks, while something is timed, whether other programs take their part of the machine.

    Every look is a product on the threads that torch has; what counts is the median of the cores that these got.

    >>> guard = Guard()
    >>> guard.disturbed  # it has not looked
    False
    """

    def __init__(self) -> None:
        self.threads = torch.get_num_threads()
        self.cores: list[float] = []

    def look(self) -> None:
        """One product more."""
        self.cores.append(product(GUARD).cores)

    @property
    def got(self) -> float:
        """Cores that the products got; NaN before the first."""
        return statistics.median(self.cores) if self.cores else math.nan

    @property
    def disturbed(self) -> bool:
        """Whether that is less than their threads could have."""
        return disturbed(self.got, self.threads)


def now(device: torch.device) -> float:
    """The time in seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def _seconds(call: Callable[[], object], repeats: int) -> float:
    start = perf_counter()
    for _ in range(repeats):
        call()
    return (perf_counter() - start) / repeats
