"""The doctor of scans: what is not finite in one, as a finding: by stage, step, lane and output."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..nn import Recurrent
from ..policies import Policy, Randomized
from ._doctor_findings import Diagnosis, Finding, Kind, Place
from ._recording import Loss, Recording
from ._scan_loss import ScanWithLoss
from ._scan_search import Hit, first_back, first_error, first_forward, first_index
from ._scanned import Scanned
from ._subjects import scan_of
from .language import say

__all__ = ["STEEP_LOSS", "Naming", "diagnose", "found_back", "found_forward", "kind_of", "word_for"]

_LOOK = "look for what is infinite or undefined there (a logarithm or a division near 0, an exponential), or scale down"
_STEEP = (
    "look for a derivative that is infinite there (a square root, logarithm, norm or division at 0), scale the "
    "recurrent weights down, or let gradients reach less far (gradient='chunked:K')"
)


STEEP_LOSS = "look at the loss where it is steep (log, division, square root near 0), and at what is above"
"""What to do about an error that the loss sends."""


@dataclass(frozen=True)
class Naming:
    """How the places in a scan are named. module: the name of the layer in its model, or of the step. layer: of any
    cell, if it is one. T, lengths: see `forward_time`. parameters: names by the identity of a tensor.
    """

    module: str
    layer: Recurrent | None
    T: int
    lengths: Tensor | None = None
    parameters: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, module: str, layer: Recurrent | None, T: int, scan: ScanWithLoss) -> Naming:
        """The names of a scan, and of the parameters of its layer."""
        prefix = f"{module}." if module else ""
        named = {} if layer is None else {id(p): f"{prefix}{name}" for name, p in layer.named_parameters()}
        return cls(module, layer, T, scan.lengths, named)

    def place(self, hit: Hit) -> Place:
        """Where a number stands, in forward time."""
        layer, output = self.output(hit.paths[0]) if hit.paths else (None, None)
        name = None if hit.captured is None else self.parameters.get(id(hit.captured))
        step = self.forward_time(hit.step, hit.lane)
        return Place(self.module, layer, step, hit.lane, parameter=name, output=output)

    def output(self, path: str) -> tuple[str | None, str]:
        """(layer, output) of a path: in a layer of any cell, of the state of one of its cells, or the output."""
        if self.layer is None:
            return None, path
        match = re.fullmatch(r"(?:carry|y\[1\])\[(\d+)\](.*)", path)
        if match is not None:
            return f"layer {match[1]}", f"state{match[2]}"
        return None, "y" if path.startswith("y") else "input" if path.startswith("x") else path

    def forward_time(self, t: int, lane: int | None) -> int:
        """The step in forward time of step t of the scan's own time: of a reverse layer, by the length of the lane."""
        if self.layer is None or not self.layer.reverse:
            return t
        length = self.T if self.lengths is None or lane is None else int(self.lengths[lane])
        return length - 1 - t if t < length else t


def found_forward(scan: ScanWithLoss, naming: Naming) -> Iterator[Finding]:
    """The first step forward that is not finite, if there is one."""
    hit = first_forward(scan)
    if hit is None:
        return
    place, word = naming.place(hit), word_for(hit.value)
    if hit.what in ("input", "carry"):
        of = say("its input") if hit.what == "input" else say("its initial state")
        what = say("{what} holds {value}", what=of, value=word)
        advice = say("look at the data, and at what computes it before this")
        yield Finding.at(kind_of(hit.value, of_finite=False), "forward", place, hit.value, what, advice)
        return
    outputs = [naming.output(path) for path in hit.paths]
    also = [
        output if layer is None else say("{layer} of {whose}", layer=output, whose=layer)
        for layer, output in outputs[1:]
    ]
    what = say("{value} out of a finite input and carry", value=word) + (
        say(" (not finite at this step: {names} too)", names=say(", ").join(also)) if also else ""
    )
    kind = kind_of(hit.value, of_finite=naming.layer is not None)
    yield Finding.at(kind, "forward", place, hit.value, what, say(_LOOK))


def found_back(scan: ScanWithLoss, policy: Policy, naming: Naming) -> Iterator[Finding]:
    """The first error, or step on the way back under a policy, that is not finite, if there is one."""
    hit = first_error(scan)
    if hit is not None:
        of = "dL/dy" if hit.paths == ("y",) else say("dL/d(final state)")
        place = Place(naming.module, None, naming.forward_time(hit.step, hit.lane), hit.lane)
        kind = kind_of(hit.value, of_finite=False)
        what = say("{what} is {value}", what=of, value=word_for(hit.value))
        yield Finding.at(kind, "local error", place, hit.value, what, say(STEEP_LOSS))
        return
    hit = first_back(scan, policy)
    if hit is None:
        return
    place, word = naming.place(hit), word_for(hit.value)
    if hit.captured is None:
        text = "dL/d(what enters this step) is {value}, out of finite errors and a finite adjoint of what leaves it"
        yield Finding.at(kind_of(hit.value), "adjoint", place, hit.value, say(text, value=word), say(_STEEP))
        return
    shape = list(hit.captured.shape)
    name = f"`{place.parameter}`" if place.parameter else say("a captured tensor {shape}", shape=shape)
    text = "what this step sends to {what} is {value}, out of finite errors and a finite adjoint"
    what = say(text, what=name, value=word)
    yield Finding.at(kind_of(hit.value), "parameter gradient", place, hit.value, what, say(_STEEP))


def diagnose(
    subject: torch.nn.Module | Recording | Scanned, batch: Any = None, loss: Loss | None = None
) -> Diagnosis | None:
    """Find what is not finite in a scan and its gradient: the first in the order of computation, or None.

    subject, batch, loss: a scan of any step with its loss, as `scanned` gives it, alone; or as in `record_scan`, for a
    `bptt.nn.Recurrent` or a model with one. (`watch` looks into the training steps of any model, and into its RNN, GRU,
    LSTM and `Recurrent` layers.)

    The stages are: a parameter; forward, step by step: input, then carry and y, by their place in the pytree
    (`Finding.output`), step and lane; the loss; the errors that it sends to y and to the final carry; the adjoint and
    what is sent to captured tensors, step by step on the way back, blocks walking as the policy says; the gradient as a
    whole; where that is finite, the way back is not searched. Steps are run one by one here, so it costs a few plain
    loops. Under random factors the way back is not searched, since what was drawn is not known.

    Raises TypeError for a model without a `Recurrent`; else what `record_scan` raises.

    >>> import torch, bptt
    >>> w = torch.tensor(1.0, requires_grad=True)
    >>> looped = bptt.flow.scanned(
    ...     lambda h, x: ((w * h - x).sqrt(), h), torch.tensor([4.0, 4.0]), torch.tensor([[0.0], [1.0]]).expand(2, 2),
    ...     lambda h, ys: h.sum(),
    ... )
    >>> print(bptt.flow.diagnose(looped))
    None
    >>> looped = bptt.flow.scanned(
    ...     lambda h, x: ((w * h - x).sqrt(), h), torch.tensor([4.0, 4.0]), torch.tensor([[0.0, 0.0], [1.0, 2.0]]),
    ...     lambda h, ys: h.sum(),
    ... )
    >>> found = bptt.flow.diagnose(looped).findings[0]
    >>> found.stage, found.step, found.lane, found.output
    ('adjoint', 1, 1, 'carry')
    """
    scan = scan_of(subject, batch, loss)
    if scan is None:
        raise TypeError(
            "subject must be what bptt.flow.scanned gave, or hold a bptt.nn.Recurrent: got "
            f"{type(subject).__name__}. bptt.flow.watch looks into the training steps of other models"
        )
    for found in _in_order(scan):
        return Diagnosis((found,))
    return None


def _in_order(scanned: Scanned) -> Iterator[Finding]:
    scan, own = scanned.scan, Place(scanned.name)
    naming = Naming.of(scanned.name, scanned.layer, scanned.T, scan)
    names = [naming.parameters.get(id(p)) for p in scanned.parameters]
    said = [
        f"`{name}`" if name else say("a parameter {shape}", shape=list(p.shape))
        for name, p in zip(names, scanned.parameters, strict=True)
    ]
    for name, words, parameter in zip(names, said, scanned.parameters, strict=True):
        if (index := first_index(parameter.detach())) is not None:
            value, place = float(parameter.detach()[index]), Place(scanned.name, parameter=name)
            text = "{what} holds {value} in row {row}"
            row = index[0] if index else 0
            what = say(text, what=words, value=word_for(value), row=row)
            advice = say("go back to weights from before, and lower the learning rate or clip the gradient")
            yield Finding.at(kind_of(value, of_finite=False), "forward", place, value, what, advice)
    yield from found_forward(scan, naming)
    if scanned.loss is not None and not math.isfinite(scanned.loss):
        text = "the loss is {value} though the carry and y are finite at every step"
        what = say(text, value=word_for(scanned.loss))
        kind, advice = kind_of(scanned.loss, of_finite=False), say("look at the loss and its targets")
        yield Finding.at(kind, "loss", own, scanned.loss, what, advice)
    whole = scanned.vector(scanned.own)
    if first_index(whole) is None:  # what overflows on the way back reaches no parameter
        return
    yield from found_back(scan, scanned.own, naming)
    gradient = whole.split([p.numel() for p in scanned.parameters])
    for name, words, part in zip(names, said, gradient, strict=True):
        if (index := first_index(part)) is not None:
            value, place = float(part[index]), Place(scanned.name, parameter=name)
            text = "the gradient of {what} is {value}, all that was seen before it finite"
            if isinstance(scanned.own, Randomized):
                text = (
                    "the gradient of {what} is {value} (on the way back nothing was searched: its factors are random)"
                )
            what = say(text, what=words, value=word_for(value))
            advice = say(
                "look at the size of the sum over steps and lanes, and at losses that reach it beside the steps"
            )
            kind = kind_of(value, of_finite=False)
            yield Finding.at(kind, "parameter gradient", place, value, what, advice)


def kind_of(value: float, of_finite: bool = True) -> Kind:
    """What kind of finding a number is."""
    return "nan" if math.isnan(value) else "overflow" if of_finite else "inf"


def word_for(value: float) -> str:
    """A number that is not finite, in a sentence."""
    return "NaN" if math.isnan(value) else say("-infinity") if value < 0 else say("infinity")
