"""The verdict for a reader who trains nets: what happens to the gradient of a loss, without a word of the theory."""

from __future__ import annotations

import numpy as np

from ._by_lag import Lags
from ._spread import lost, rest
from ._steps import StepChain
from .course import steady_change, steepest
from .horizon import end, left
from .language import say
from .wording import number, percent, steps, trend

__all__ = ["in_words"]


def in_words(lags: Lags) -> str:
    """What becomes of the gradient of a loss on its way back to earlier steps, how far it reaches, and what follows.

    Of the steepest layer where there are several. What it says of the batch is a mean over its losses and lanes.
    """
    i = steepest(lags)
    said = _of_layer(lags, i)
    return (
        said
        if len(lags.layers) == 1
        else say("In {layer}: {text}", layer=lags.layers[i], text=said[0].lower() + said[1:])
    )


def _of_layer(lags: Lags, i: int) -> str:
    norm, rate = lags.curve(i)[0], float(lags.rate[i])
    last = len(norm) - 1
    if not len(norm):
        of = say("carry") if lags.layers[i] == StepChain.name else say("recurrent layer")
        return say("The loss of this batch does not depend on the {of}, so that it learns nothing from it.", of=of)
    if not np.isfinite(norm).all():
        at = int(lags.lag[lags.there[i]][np.argmax(~np.isfinite(norm))])
        text = (
            "The gradient of a loss is infinite or not a number {steps} before the loss: a training step would put "
            "that into the weights."
        )
        return say(text, steps=steps(at))
    if not np.any(norm > 0):
        return say("The gradient is 0 at every step of this batch, so that nothing is learnt from it.")
    if last == 0:
        return say("Only the step of the loss itself was measured, which tells nothing about earlier steps.")
    if (ends := end(norm)) is not None:
        text = "The gradient of a loss ends {steps} before it: what happened earlier is not learnt."
        return say(text, steps=steps(ends))
    half, part = left(norm)
    kind = trend(rate, last) if lags.straight[i] else ""
    if part > 2:
        steady = say("{change}; ", change=steady_change(lags, i, "it")) if kind == "explode" else ""
        text = (
            "Going back in time from a loss, its gradient grows: {steady}{steps} before the loss it is {times} times "
            "as large{spread}. Early steps then rule each update, and longer sequences make it overflow."
        )
        spread = "" if steady else rest(lags, i, number)
        return say(text, steady=steady, steps=steps(last), times=number(part), spread=spread)
    if kind == "hold" or half is None or part > 0.5:
        text = (
            "Going back in time from a loss, its gradient hardly changes: {steps} before the loss {part} of it is left"
            "{spread}. So it reaches at least as far back as was measured."
        )
        return say(text, steps=steps(last), part=percent(part), spread=rest(lags, i, percent))
    if kind == "vanish":
        fades = steady_change(lags, i, "it")
    else:
        fades = say("half is lost within {steps}{spread}", steps=steps(half), spread=lost(lags, i))
    text = "Going back in time from a loss, its gradient fades: {fades}. {reach}"
    return say(text, fades=fades, reach=_reach(lags, i))


def _reach(lags: Lags, i: int) -> str:
    """How far the gradient of a loss reaches, and what that means for training."""
    far, farther = int(lags.horizon_90[i]), int(lags.horizon_99[i])
    measured = steps(int(lags.measured[i]))
    if not lags.settled()[i]:
        text = (
            "90 % of it reaches back over {far} at least; {measured} were measured, too few to tell how much farther "
            "it goes."
        )
        return say(text, far=steps(far), measured=measured)
    if lags.settled(0.99)[i]:
        text = (
            "90 % of it stays within {far} of the loss, 99 % within {farther} ({measured} were measured): what depends "
            "on events longer ago is hardly learnt."
        )
        return say(text, far=steps(far), farther=farther, measured=measured)
    text = (
        "90 % of it stays within {far} of the loss ({measured} were measured): events longer ago have little weight in "
        "what is learnt."
    )
    return say(text, far=steps(far), measured=measured)
