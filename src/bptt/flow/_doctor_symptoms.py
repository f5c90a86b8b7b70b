"""What goes wrong before anything is infinite: gradients that explode or vanish over time, gates that are saturated."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..cells import ACTIVATIONS
from ._by_lag import Lags, by_lag
from ._doctor_findings import Finding, Place
from ._lags import lag_map
from ._recording import Recording
from ._scan_loss import ScanWithLoss
from .language import say

__all__ = ["lags_of", "lags_of_scan", "symptoms", "symptoms_of_scan"]

LAGS = 128
"""Measured at most."""

LANES = 4
"""Looked at, of the batch."""

LOSSES = 16
"""Measured at least, where a window has so many."""

EXPLODES = 100.0
"""Factor by which adjoints grow from a loss back to the farthest lag, above which they explode."""

VANISHES = 0.1
"""Share of the window within which 99 % of the gradient arises, below which it vanishes. It must be known
(`Lags.settled`): in the few lags that are measured of a long window, or between resets, everything arises early.
"""

SHORT = 32
"""Steps of a window below which a short horizon says little."""

SATURATED = 0.9
"""Share of a gate's values at an end of its range, above which the gate is saturated."""

MARGIN = 0.01
"""What counts as the end: this part of the range."""


def lags_of(recording: Recording) -> Lags | None:
    """The gradient by lag at about the price of a training step; None where it cannot be measured.

    It measures some of the losses, in some of the lanes that a loss reaches. Where most steps have no error, as for a
    loss on the last step alone, it measures all losses, in one lane.
    """
    if recording.layer.bidirectional and recording.layer.num_layers > 1:
        return None  # a loss reaches both ways
    last = len(recording.names) - (2 if recording.layer.bidirectional else 1)
    sent = torch.stack([recording.sends(k) for k in range(last, len(recording.names))]).any(0)
    if not bool(sent.any()) and all(d is None for d in recording.dfinal):
        return None
    T, B, lags = recording.T, recording.B, min(recording.T, LAGS)
    dense = 2 * int(sent.sum()) > int(recording.lengths.sum())
    few = recording.sample(min(B, LANES) if dense else 1)
    every = max(1, min(T // LOSSES, few.B * lags // (2 * B))) if dense else 1
    at = few.losses(max(1, -(-int(sent.any(1).sum()) * few.B // every)))
    map = lag_map(few, lags=min(lags, few.T), at=at)
    return by_lag(map) if np.nan_to_num(map.norm).any() else None


def lags_of_scan(scan: ScanWithLoss) -> Lags | None:
    """The gradient by lag of a `Recurrent`, on some of its losses; None where no error arrives. Its steps draw anew."""
    chain = scan.chain()
    sent = (chain.errors != 0).any(-1).any(1).nonzero()[:, 0].tolist()
    if not sent:
        return None
    every = max(1, len(sent) // LOSSES)
    map = lag_map(chain, lags=min(chain.T, LAGS), at=sent[::-1][::every][::-1])
    return by_lag(map) if np.nan_to_num(map.norm).any() else None


def symptoms_of_scan(lags: Lags | None, name: str, window: int) -> Iterator[Finding]:
    """Explosion and vanishing in a call of a `Recurrent`. window: the steps of its longest sequence."""
    for i in range(0 if lags is None else len(lags.layers)):
        assert lags is not None
        start = say("let the cell keep its state (a leak or a gate nearer 1), start from bptt.nn.init.orthogonal_")
        yield from _by_lag(lags, i, Place(name), window, start)


def symptoms(recording: Recording, lags: Lags | None) -> Iterator[Finding]:
    """Explosion, vanishing and saturation in one recorded call."""
    for i, name in enumerate(() if lags is None else lags.layers):
        assert lags is not None
        window = min(recording.T, int(recording.lengths.max()))
        yield from _by_lag(lags, i, Place(recording.name, name), window, _start(recording))
    for name, tape in zip(recording.names, recording.tapes(), strict=True):
        cell = recording.cell
        parts = (tape.state[0],) if tape.gates is None else tape.gates.chunk(cell.taped_per_unit, -1)
        for label, activation, values in zip(cell.gate_names, cell.activations, parts, strict=False):
            yield from _saturated(recording, Place(recording.name, name, gate=label), activation, values)


def _start(recording: Recording) -> str:
    """What makes a layer keep its state longer."""
    if recording.cell.keeps is None:
        return say("take gru or lstm, start from bptt.nn.init.orthogonal_")
    if recording.cell.states == 2:
        return say("start with open forget gates (bptt.nn.init.forget_bias_, chrono_)")
    return say("start with update gates that keep (bptt.nn.init.chrono_)")


def _by_lag(lags: Lags, i: int, place: Place, window: int, start: str) -> Iterator[Finding]:
    norm, rate, far = lags.norm[i], float(lags.rate[i]), int(lags.measured[i]) - 1
    if far < 0:
        return  # no loss reaches this layer
    if norm[0] > 0 and rate > 1 and norm[far] > EXPLODES * norm[0]:
        what = say(
            "the gradient explodes: {far} steps back it is {times} times as large, and there it grows {rate} times per "
            "step",
            far=far,
            times=f"{norm[far] / norm[0]:.3g}",
            rate=f"{rate:.3g}",
        )
        advice = say(
            "scale the recurrent weights down (bptt.nn.init.orthogonal_, radius_), lower the learning rate or clip the "
            "gradient"
        )
        yield Finding.at("explosion", "adjoint", place, rate, what, advice)
    horizon = int(lags.horizon_99[i])
    if window >= SHORT and rate < 1 and horizon < VANISHES * window and lags.settled(0.99)[i]:
        what = say(
            "the gradient vanishes: 99 % of it arises within {horizon} of {window} steps (90 % within {near}); farther "
            "back it shrinks to {rate} times per step",
            horizon=horizon,
            window=window,
            near=int(lags.horizon_90[i]),
            rate=f"{rate:.3g}",
        )
        advice = say("{start}, or use shorter windows", start=start)
        yield Finding.at("vanishing", "adjoint", place, float(horizon), what, advice)


def _saturated(recording: Recording, place: Place, activation: str, values: Tensor) -> Iterator[Finding]:
    """A gate at an end of its range. The upper end of what keeps the state (f, z) is memory, not a fault."""
    ends = ACTIVATIONS[activation].ends
    if ends is None:
        return
    margin = MARGIN * (ends[1] - ends[0])
    if recording.call.lengths is not None:
        steps = torch.arange(len(values), device="cpu")[:, None] < recording.call.lengths
        values = values[steps.to(values.device)]
    low = float((values <= ends[0] + margin).double().mean())
    high = float((values >= ends[1] - margin).double().mean())
    counted = low if place.gate == recording.cell.keeps else low + high
    if counted > SATURATED:
        text = "saturated: {share} of its values lie within {margin} of an end of its range"
        what = say(text, share=f"{counted:.0%}", margin=f"{MARGIN:.0%}")
        advice = say("no gradient passes there: scale its weights or input down, set its bias nearer 0")
        yield Finding.at("saturation", "forward", place, counted, what, advice)
