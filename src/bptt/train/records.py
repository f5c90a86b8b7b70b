"""What a training run says of itself: one step, sums over steps, and what is logged."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Meter", "Record", "Step", "perplexity"]


@dataclass(frozen=True)
class Step:
    """One optimiser step.

    step: steps so far, this one included. epoch: passes finished. nll: the loss summed over the window, of a text in
    nats. tokens: predictions. grad_norm: global norm before clipping. clipped: whether it was above `clip`.
    seconds: of this step. skipped: whether loss, gradient or state were not finite, so that it was not applied.
    """

    step: int
    epoch: int
    nll: float
    tokens: int
    grad_norm: float
    clipped: bool
    seconds: float
    skipped: bool = False


@dataclass
class Meter:
    """Sums over the steps that were applied, since the last record or in an epoch. skipped: how many were not."""

    steps: int = 0
    nll: float = 0.0
    tokens: int = 0
    grad_norm: float = 0.0
    clipped: int = 0
    seconds: float = 0.0
    skipped: int = 0

    def add(self, step: Step) -> None:
        """Count one step."""
        self.seconds += step.seconds
        self.skipped += step.skipped
        if step.skipped:
            return
        self.steps += 1
        self.nll += step.nll
        self.tokens += step.tokens
        self.grad_norm += step.grad_norm
        self.clipped += step.clipped

    @property
    def loss(self) -> float | None:
        """The mean per prediction, of a text in nats; None where nothing was applied."""
        return self.nll / self.tokens if self.tokens else None


@dataclass(frozen=True)
class Record:
    """What is logged: means over the steps applied since the last record, None where all were skipped.

    step, epoch: as in `Step`. steps: how many the means are over. loss: per prediction, of a text in nats per token.
    perplexity: exp(loss), None where a task has none. epoch_perplexity: exp(total NLL / predicted tokens) over the
    steps of the last epoch that is finished, each with the weights of its time; None before one is. heldout_*: measured
    at this step, or None. grad_norm: mean norm before clipping. clipped: fraction of steps. tokens_per_second: training
    alone. skipped: steps not applied since the last record. horizon: steps back within which 90 % of the gradient
    arises (`bptt.flow.Lags`), in the layer that reaches farthest, on the last window, where the held-out text is
    measured; else None. horizon_settled: whether it is that of the network; where not, the window cut it short, and it
    is at least so far (`bptt.flow.Lags.settled`). window: the one in use by an adaptive gradient policy; else None.
    measures: the task's own, of the held-out data, by name, where they are measured and it has any.
    """

    step: int
    epoch: int
    steps: int
    loss: float | None
    perplexity: float | None
    epoch_perplexity: float | None
    heldout_loss: float | None
    heldout_perplexity: float | None
    grad_norm: float | None
    clipped: float | None
    tokens_per_second: float
    skipped: int = 0
    horizon: int | None = None
    horizon_settled: bool = False
    window: int | None = None
    measures: dict[str, float] | None = None


def perplexity(loss: float) -> float:
    """exp(loss), infinity where that overflows.

    >>> perplexity(0.0), perplexity(1e6)
    (1.0, inf)
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
