"""The window that `bptt flow` measures in: as long as it takes for the horizon to settle."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..flow import LARGEST, Lags, Recording, Scanned, by_lag, lag_map
from ..flow.language import say
from ..train import InputError
from .subject import Subject

__all__ = ["LONGEST", "long_enough", "unsettled"]

LONGEST = 1024
"""Steps up to which the window is lengthened."""

LOSSES = 64
"""Walked back to see whether a window is long enough, about at most."""

LONGER = 4
"""Times a window that was too short, which a reader is told to measure."""


def long_enough(make: Callable[[int | None], Subject], show: Callable[[int], None] = lambda steps: None) -> Subject:
    """What is measured, its window doubled from the default until the horizon settles, with a note that says so.

    make: the subject with a window of so many steps; None for the default. show: called with each window looked at.
    """
    of = make(None)
    first = of.recording.T
    while (lags := _looked_at(of.recording, show)) is not None and unsettled(lags):
        if of.recording.T >= LONGEST:
            text = "the most that is tried; measure longer: --steps {steps}"
            return _noted(of, first, say(text, steps=LONGER * of.recording.T))
        try:
            of = make(min(2 * of.recording.T, LONGEST))
        except InputError:  # of a run whose data end
            text = "the most that the data have for so many lanes; fewer --lanes leave more"
            return _noted(of, first, say(text))
    if first == of.recording.T:
        return of
    text = "The window was lengthened from {first} to {last} steps, until the horizon settled"
    return of.with_note(say(text, first=first, last=of.recording.T))


def unsettled(lags: Lags) -> bool:
    """Whether a longer window would say more of a horizon: not where gradients grow, end, or are not finite."""
    known = lags.settled()
    for i in range(len(lags.layers)):
        norm = lags.curve(i)[0]
        if not known[i] and len(norm) and np.isfinite(norm).all() and 0 < norm[-1] <= 2 * norm[0]:
            return True
    return False


def _looked_at(recording: Recording | Scanned, show: Callable[[int], None]) -> Lags | None:
    """The lags of a few losses; None where a loss has none, and of a scan whose map nobody would see."""
    if isinstance(recording, Scanned):
        if recording.chain.S > LARGEST:
            return None
    elif recording.layer.bidirectional and recording.layer.num_layers > 1:
        return None
    show(recording.T)
    return by_lag(lag_map(recording, lags=recording.T, at=recording.losses(LOSSES)))


def _noted(of: Subject, first: int, why: str) -> Subject:
    T = of.recording.T
    text = "The horizon has not settled in a window lengthened from {first} to {last} steps, {why}"
    text = "The horizon has not settled in {last} steps, {why}" if first == T else text
    return of.with_note(say(text, first=first, last=T, why=why))
