"""The verdict for a reader who trains nets: what happens to the gradient of a loss, without a word of the theory."""

from __future__ import annotations

import numpy as np

from ._by_lag import Lags
from ._spread import lost, rest
from ._steps import StepChain
from .conclusions import steady_change, steepest
from .horizon import end, left
from .wording import number, percent, steps, trend

__all__ = ["in_words"]


def in_words(lags: Lags) -> str:
    """What becomes of the gradient of a loss on its way back to earlier steps, how far it reaches, and what follows.

    Of the steepest layer where there are several. What it says of the batch is a mean over its losses and lanes.
    """
    i = steepest(lags)
    said = _of_layer(lags, i)
    return said if len(lags.layers) == 1 else f"In {lags.layers[i]}: {said[0].lower()}{said[1:]}"


def _of_layer(lags: Lags, i: int) -> str:
    norm, rate = lags.curve(i)[0], float(lags.rate[i])
    last = len(norm) - 1
    if not len(norm):
        of = "carry" if lags.layers[i] == StepChain.name else "recurrent layer"
        return f"The loss of this batch does not depend on the {of}, so that it learns nothing from it."
    if not np.isfinite(norm).all():
        at = int(lags.lag[lags.there[i]][np.argmax(~np.isfinite(norm))])
        return (
            f"The gradient of a loss is infinite or not a number {steps(at)} before the loss: a training step "
            "would put that into the weights."
        )
    if not np.any(norm > 0):
        return "The gradient is 0 at every step of this batch, so that nothing is learnt from it."
    if last == 0:
        return "Only the step of the loss itself was measured, which tells nothing about earlier steps."
    if (ends := end(norm)) is not None:
        return f"The gradient of a loss ends {steps(ends)} before it: what happened earlier is not learnt."
    half, part = left(norm)
    back, after = "Going back in time from a loss, its gradient", f"{steps(last)} before the loss"
    kind = trend(rate, last) if lags.straight[i] else ""
    if part > 2:
        steady = f"{steady_change(lags, i, 'it')}; " if kind == "explode" else ""
        grows = f"{back} grows: {steady}{after} it is {number(part)} times as large"
        then = "Early steps then rule each update, and longer sequences make it overflow."
        return f"{grows}{'' if steady else rest(lags, i, number)}. {then}"
    if kind == "hold" or half is None or part > 0.5:
        holds = f"{back} hardly changes: {after} {percent(part)} of it is left{rest(lags, i, percent)}"
        return f"{holds}. So it reaches at least as far back as was measured."
    if kind == "vanish":
        return f"{back} fades: {steady_change(lags, i, 'it')}. {_reach(lags, i)}"
    return f"{back} fades: half is lost within {steps(half)}{lost(lags, i)}. {_reach(lags, i)}"


def _reach(lags: Lags, i: int) -> str:
    """How far the gradient of a loss reaches, and what that means for training."""
    far, farther = int(lags.horizon_90[i]), int(lags.horizon_99[i])
    window = f"{steps(int(lags.measured[i]))} were measured"
    if not lags.settled()[i]:
        return (
            f"90 % of it reaches back over {steps(far)} at least; {window}, too few to tell how much farther it goes."
        )
    text = f"90 % of it stays within {steps(far)} of the loss"
    if lags.settled(0.99)[i]:
        return f"{text}, 99 % within {farther} ({window}): what depends on events longer ago is hardly learnt."
    return f"{text} ({window}): events longer ago have little weight in what is learnt."
