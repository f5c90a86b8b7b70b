"""Which learning rate to begin with: a few steps at rates that rise from one to the next, and the loss at each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from .config import Config
from .errors import InputError, NonFiniteError
from .loop import Trainer
from .rates import LEAST_STEPS, check_range
from .records import Step
from .tasks import Task

__all__ = ["RateTest", "rate_test"]

LOWEST, HIGHEST, STEPS = 1e-5, 10.0, 100
"""The rates of a test, and its steps, where none are given."""

DIVERGED = 4.0
"""Times the least loss, at which the test ends."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RateTest:
    """The loss of each step of a range test, by its learning rate.

    rates, losses: `[n]` the rates tried, rising by one factor, and the mean loss of the step's batch before its update.
    smoothed: `[n]` the mean over the neighbours of each. suggestion: the rate at which the smoothed loss falls fastest
    per factor of the rate, before it is least; None where it does not fall by more than it scatters. conditions: what
    it was measured with, in words. diverged: whether it ended because the loss grew or was not finite.
    """

    rates: Floats = field(repr=False)
    losses: Floats = field(repr=False)
    smoothed: Floats = field(repr=False)
    suggestion: float | None
    conditions: str
    diverged: bool

    @property
    def said(self) -> str:
        """What to conclude, in words."""
        lowest, highest, least = (f"{rate:.2g}" for rate in (*self.rates[[0, -1]], self.rates[self.smoothed.argmin()]))
        if self.suggestion is None:
            if self.diverged and self.smoothed.argmin() < 2:
                return f"The loss grows at all rates from {lowest} to {highest}: try lower ones"
            return f"Between {lowest} and {highest} the loss falls by no more than it scatters: try more steps or lanes"
        end = f", and grows beyond {highest}" if self.diverged else ""
        more = "" if self.diverged or least != highest else f"; {highest} was the highest tried: try --highest above it"
        return f"learning_rate {self.suggestion:.2g}: the loss falls fastest there, is least at {least}{end}{more}"


def rate_test(
    task: Task,
    config: Config,
    *,
    lowest: float = LOWEST,
    highest: float = HIGHEST,
    steps: int = STEPS,
    on_step: Callable[[Step], None] = lambda step: None,
) -> RateTest:
    """A learning-rate range test: train a network of its own from its first weights, each step at a higher rate.

    config: of the run that is to follow; its learning rate, schedule and length have no part. lowest, highest: the
    first and last rate. steps: at least 20. It ends early where the loss is 4 times the least so far, or not finite.
    Nothing is written, and no network but its own is touched; torch's random generator is put back.

    A suggestion is a place to begin: it comes from a few steps from one draw of the weights, with this batch size,
    policy, clipping and optimiser, and says nothing of what a schedule or a long run needs.

    Raises InputError for rates that do not rise, or too few steps.

    >>> from bptt.train import Config, prepare, rate_test
    >>> config = Config(cell="gru", hidden=8, limit=4000, batch=4, seq_length=8, threads=1)
    >>> found = rate_test(prepare(config), config, steps=20)
    >>> len(found.rates) <= 20, float(found.rates[0])
    (True, 1e-05)

    Source: Smith 2017, "Cyclical learning rates for training neural networks" (arXiv 1506.01186), section 3.3; rates
    that rise by a factor, and the point of steepest descent, as in fastai and Lightning.
    """
    check_range(lowest, highest, steps)
    plain = config.override(
        steps=steps, schedule="constant", warmup=0, learning_rate=lowest, on_nonfinite="stop", patience=0
    )
    threads = torch.get_num_threads()
    rates, losses, diverged = list[float](), list[float](), False
    with torch.random.fork_rng():
        trainer = _Rising(plain, task, lowest, highest)
        try:
            for _ in range(steps):
                rate = trainer.learning_rate
                try:
                    step = trainer.advance()
                except NonFiniteError:
                    diverged = True
                    break
                on_step(step)
                if step.tokens:
                    rates.append(rate)
                    losses.append(step.nll / step.tokens)
                if len(losses) > _width(steps) and _last(losses, steps) > DIVERGED * min(
                    _last(losses[:i], steps) for i in range(_width(steps), len(losses))
                ):
                    diverged = True
                    break
        finally:
            trainer.doctor.remove()
            torch.set_num_threads(threads)
    if len(losses) < LEAST_STEPS // 4:
        raise InputError(f"the loss is not finite after {len(losses)} steps at {lowest:g}: give a lower --lowest")
    found = _smoothed(np.array(losses), _width(steps))
    return RateTest(
        np.array(rates),
        np.array(losses),
        found,
        _suggestion(rates, losses, found),
        _conditions(plain, lowest, highest),
        diverged,
    )


class _Rising(Trainer):
    """A trainer whose learning rate rises from step to step by one factor."""

    def __init__(self, config: Config, task: Task, lowest: float, highest: float) -> None:
        self.lowest, self.highest = lowest, highest
        super().__init__(config, task)

    @property
    def learning_rate(self) -> float:
        done = self.step / (self.total - 1)
        return float(self.lowest * (self.highest / self.lowest) ** done)


def _width(steps: int) -> int:
    """Steps whose mean is taken: a tenth of all, an odd number."""
    return max(3, steps // 10) | 1


def _last(losses: list[float], steps: int) -> float:
    some = losses[-_width(steps) :]
    return math.fsum(some) / len(some)


def _smoothed(losses: Floats, width: int) -> Floats:
    """The mean over each and its neighbours, of which there are fewer at the ends."""
    half = width // 2
    return np.array([losses[max(0, i - half) : i + half + 1].mean() for i in range(len(losses))])


def _suggestion(rates: list[float], losses: list[float], smoothed: Floats) -> float | None:
    least = int(smoothed.argmin())
    scatter = float(np.median(np.abs(np.array(losses) - smoothed)))
    if least < 2 or smoothed[0] - smoothed[least] <= 2 * scatter:
        return None
    slopes = np.gradient(smoothed[: least + 1])
    return rates[int(slopes.argmin())]


def _conditions(config: Config, lowest: float, highest: float) -> str:
    clip = f"clip {config.clip:g}" if config.clip else "no clipping"
    return (
        f"{config.steps} steps from {lowest:g} to {highest:g}, from the first weights of seed {config.seed}; "
        f"{config.optimiser}, {clip}, batch {config.batch}, gradient={config.gradient}; {config.cell}, "
        f"{config.layers} x {config.hidden} units, dropout {config.dropout:g}; {config.source}"
    )
