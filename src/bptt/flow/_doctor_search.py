"""The search for the first number that is not finite, in the order in which a training step computes.

Parameters, then forward call by call, the loss, then back call by call (local error, adjoint), parameter gradients.
Within a recurrent layer the walk itself is run again, layer by layer, and looked at step by step.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..cells import CELLS, Cell
from ..engine import Observer, Saved, Stack, given
from ..kernels import SweepResult, Tape
from ..nn import Recurrent
from ..nn.call import Call, whole_tape
from ..nn.layers import DropInLayer
from ._diagnose import STEEP_LOSS, Naming, found_back, found_forward, kind_of, word_for
from ._doctor_calls import RecordedCall
from ._doctor_findings import Finding, Place, Stage
from ._layer_call import dense, tensors_in
from ._scan_loss import ScanWithLoss
from ._scan_search import first_index
from .language import say

__all__ = ["first_not_finite"]

_RESTORE = "go back to weights from before, and lower the learning rate or clip the gradient"
_SHRINK = (
    "scale the recurrent weights down (bptt.nn.init.radius_, orthogonal_), lower the learning rate, or let gradients "
    "reach less far (gradient='chunked:K'); clipping comes too late for what is not finite"
)


def first_not_finite(model: torch.nn.Module, calls: Sequence[RecordedCall], loss: Tensor | float | None) -> Finding:
    """The cause of a step that is not finite. calls: of the step, in order. To be called after its backward pass."""
    with torch.no_grad():
        for found in _in_order(model, calls, loss):
            return found
    what = say("the gradient norm is not finite though every gradient is: their squares overflow")
    if loss is not None and not math.isfinite(float(loss)):
        what = say("the loss is not finite, and no call of the model was seen")
    return Finding.at("overflow", "parameter gradient", Place(""), math.inf, what, say(_SHRINK))


def _in_order(model: torch.nn.Module, calls: Sequence[RecordedCall], loss: Tensor | float | None) -> Iterator[Finding]:
    yield from _parameters(model, calls)
    for call in calls:
        scan = call.as_scan()
        if scan is None:
            yield from _inputs(call)
        else:
            yield from found_forward(scan, _naming(call, scan))
        if call.recurrent:
            yield from _forward(call)
        yield from _outputs(call)
    if calls and loss is not None and not math.isfinite(value := float(loss)):
        what = say("the loss is {value} though all outputs of the model are finite", value=word_for(value))
        advice = say("look at the loss and its targets")
        yield Finding.at(kind_of(value, of_finite=False), "loss", Place(""), value, what, advice)
    for call in reversed(calls):
        if call.recurrent:
            yield from _backward(call)
        elif call.errors and (scan := call.as_scan()) is not None:
            yield from found_back(scan, call.scan.layer.gradient, _naming(call, scan))  # type: ignore[union-attr]  # as_scan says so
    yield from _gradients(model)


def _naming(call: RecordedCall, scan: ScanWithLoss) -> Naming:
    layer = call.module
    assert isinstance(layer, Recurrent)
    return Naming.of(call.name, layer, len(scan.xs[0]), scan)


# Forward -------------------------------------------------------------------------------------------------------------


def _parameters(model: torch.nn.Module, calls: Sequence[RecordedCall]) -> Iterator[Finding]:
    """A parameter or buffer that is not finite, with the step and lane where it first shows in a recurrent layer."""
    for name, parameter in (*model.named_parameters(), *model.named_buffers()):
        index = first_index(parameter)
        if index is None:
            continue
        value = float(parameter[index])
        place = _place_of(model, name, index)
        for call in calls:
            if place.layer is not None and call.recurrent and call.name == place.module:
                for shown in _first_of_walk(call):
                    place = replace(place, step=shown[0].step, lane=shown[0].lane)
                    break
        text = "{what} holds {value} in row {row}"
        row = index[0] if index else 0
        what = say(text, what=f"`{name}`", value=word_for(value), row=row)
        yield Finding.at(kind_of(value, of_finite=False), "forward", place, value, what, say(_RESTORE))


def _inputs(call: RecordedCall) -> Iterator[Finding]:
    """What went into a call and was not finite already."""
    found: list[tuple[str, str, Place, Tensor, tuple[int, ...]]] = []
    data = say("look at the data, and at what computes it before this layer")
    if call.recurrent:
        layer, engine, _ = call.net()
        if (index := first_index(engine.x)) is not None:
            place = Place(call.name, None, index[0], call.lane(index[1]))
            found.append((say("its input"), data, place, engine.x, index))
        for state in call.in_all_lanes(engine.hx, list(tensors_in(call.hx))):
            if state is not None and (index := first_index(state)) is not None:
                place = Place(call.name, _names(layer)[index[0]], 0, index[1])
                advice = say("start from zero, or from the last state that was finite")
                found.append((say("its initial state"), advice, place, state, index))
    else:
        for tensor in map(dense, tensors_in((call.args, call.kwargs))):
            if (index := first_index(tensor)) is not None:
                where = say("its input, at {index},", index=list(index))
                found.append((where, data, Place(call.name), tensor, index))
    for what, advice, place, tensor, index in found:
        value = float(tensor[index])
        what = say("{what} holds {value}", what=what, value=word_for(value))
        yield Finding.at(kind_of(value, of_finite=False), "forward", place, value, what, advice)


def _outputs(call: RecordedCall) -> Iterator[Finding]:
    """What came out of a call whose input and parameters were finite."""
    for tensor in map(dense, tensors_in(call.output)):
        if (index := first_index(tensor)) is not None:
            value = float(tensor[index])
            text = "its output holds {value} at {index}, from finite input and parameters"
            what, advice = say(text, value=word_for(value), index=list(index)), say("scale its input or weights down")
            yield Finding.at(kind_of(value), "forward", Place(call.name), value, what, advice)


def _forward(call: RecordedCall) -> Iterator[Finding]:
    """The first gate or state of a recurrent layer that is not finite."""
    for place, value in _first_of_walk(call):
        what = say("{value} out of finite input, state and weights", value=word_for(value))
        advice = say("scale the weights down (bptt.nn.init.radius_) or take a bounded activation")
        yield Finding.at(kind_of(value), "forward", place, value, what, advice)


def _first_of_walk(call: RecordedCall) -> Iterator[tuple[Place, float]]:
    """Where the walk forward first meets a number that is not finite: layers bottom up, each by its own time."""
    layer, engine, net = call.net()
    program = Stack(net, "gates")  # so that no gate is computed a second time
    tapes = program.tapes(Saved(engine.tensors, *program.forward(engine.tensors, keep=True)))
    names = _names(layer)
    for i in range(net.layers):
        found = []
        for d in range(net.directions):
            k = i * net.directions + d
            hit = _first_in_tape(net.cell, tapes[k])
            if hit is not None:
                t, lane, gate, value = hit
                at = _forward_time(engine, d, t, lane)
                found.append((t, Place(call.name, names[k], at, call.lane(lane), gate), value))
        for _, place, value in sorted(found, key=lambda hit: hit[0]):
            yield place, value


def _first_in_tape(cell: Cell, tape: Tape) -> tuple[int, int, str, float] | None:
    """(step, lane, gate, value): the earliest step; in it gates before states, as they are computed."""
    parts: list[tuple[str, Tensor]] = []
    if tape.gates is not None:
        labels = cell.tape_names
        parts += zip(labels, tape.gates.chunk(len(labels), -1), strict=True)
    parts += reversed(list(zip(cell.state_names, tape.state, strict=True)))
    hits = []
    for order, (label, part) in enumerate(parts):
        if (index := first_index(part)) is not None:
            hits.append((index[0], order, index[1], label, float(part[index])))
    if not hits:
        return None
    t, _, lane, label, value = min(hits, key=lambda hit: hit[:2])
    return t, lane, label, value


# Back ----------------------------------------------------------------------------------------------------------------


class _Results(Observer):
    """What every layer and direction has sent back, summed over sweeps."""

    def __init__(self) -> None:
        self.found: dict[int, SweepResult] = {}

    def summed(self, k: int, result: SweepResult) -> None:
        self.found[k] = result


def _backward(call: RecordedCall) -> Iterator[Finding]:
    """Local errors that are not finite, else the adjoint where the walk back first meets one: top layer first."""
    recording = call.recording()
    if recording is None:
        return
    final = say("dL/d(final state)")
    given_back = [call.errors.get(i + 1) for i in range(len(recording.dfinal))]
    finals = call.in_all_lanes(recording.dfinal, given_back)
    for what, errors in (("dL/dy", recording.dy), *((final, d) for d in finals)):
        if errors is not None and (index := _last(errors)) is not None:
            value = float(errors[index])
            ends = what != "dL/dy"
            layer, step = (_names(recording.layer)[index[0]], None) if ends else (None, index[0])
            place = Place(call.name, layer, step, index[1] if ends else call.lane(index[1]))
            kind, said = kind_of(value, of_finite=False), say("{what} is {value}", what=what, value=word_for(value))
            yield Finding.at(kind, "local error", place, value, said, say(STEEP_LOSS))
    own, engine, net = call.net()
    program, results = whole_tape(own, net), _Results()
    saved = Saved(engine.tensors, *program.forward(engine.tensors, keep=True))
    program.backward(saved, recording.asked(gradients=True), observer=results)
    names = _names(own)
    labels = net.cell.gate_names
    for i in reversed(range(net.layers)):
        found = []
        for d in range(net.directions):
            k = i * net.directions + d
            result = results.found[k]
            parts = [(None, result.adjoints[0]), *zip(labels, given(result.da).chunk(len(labels), -1), strict=True)]
            for order, (gate, part) in enumerate(parts):
                if (index := _last(part)) is not None:
                    t, lane = index[:2]
                    place = Place(call.name, names[k], _forward_time(engine, d, t, lane), call.lane(lane), gate)
                    found.append(((-t, order), place, float(part[index])))
        for _, place, value in sorted(found, key=lambda hit: hit[0]):
            of = "dL/dh" if place.gate is None else say("dL/d(pre-activation)")
            text = "{what} is {value}, out of finite errors: the gradient explodes on its way back"
            said = say(text, what=of, value=word_for(value))
            yield Finding.at(kind_of(value), "adjoint", place, value, said, say(_SHRINK))


def _gradients(model: torch.nn.Module) -> Iterator[Finding]:
    """Gradients of parameters, by name."""
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if grad is None or (index := first_index(grad)) is None:
            continue
        value = float(grad[index])
        text = "the gradient of {what} is {value} in row {row}, all before it finite"
        row = index[0] if index else 0
        what = say(text, what=f"`{name}`", value=word_for(value), row=row)
        advice = say(
            "look at hooks on it, at losses that do not come through the model, and at the size of the batch's sum"
        )
        stage: Stage = "parameter gradient"
        yield Finding.at(kind_of(value, of_finite=False), stage, _place_of(model, name, index), value, what, advice)


# Places and words ----------------------------------------------------------------------------------------------------

_NAME = re.compile(r"(?:(?P<module>.*)\.)?(?P<own>(?:weight|bias)_(?:ih|hh|hr)_l(?P<layer>\d+)(?P<back>_reverse)?)")


def _place_of(model: torch.nn.Module, name: str, index: tuple[int, ...]) -> Place:
    """The place of an entry of a parameter: in a recurrent layer with its layer and the gate of its row."""
    module = name.rpartition(".")[0]
    match = _NAME.fullmatch(name)
    owner = model.get_submodule(module) if module else model
    if match is None or not isinstance(owner, torch.nn.RNNBase):
        return Place(module, parameter=name)
    projected = "_hr_" in match["own"]
    gate = "h" if projected else CELLS[owner.mode].gate_names[index[0] // owner.hidden_size]
    layer = f"layer {match['layer']}{' reversed' if match['back'] else ''}"
    return Place(module, layer, gate=gate, parameter=name)


def _names(layer: DropInLayer) -> tuple[str, ...]:
    turned = ("", " reversed") if layer.bidirectional else ("",)
    return tuple(f"layer {i}{suffix}" for i in range(layer.num_layers) for suffix in turned)


def _forward_time(engine: Call, d: int, t: int, lane: int) -> int:
    """The step in forward time of step t of direction d."""
    length = engine.x.shape[0] if engine.lengths is None else int(engine.lengths[lane])
    return length - 1 - t if d == 1 and t < length else t


def _last(x: Tensor) -> tuple[int, ...] | None:
    """The first entry, in that order, of the last step that holds one: where a walk back in time meets it."""
    bad = (~torch.isfinite(x)).nonzero()
    return None if len(bad) == 0 else tuple(bad[bad[:, 0] == bad[:, 0].max()][0].tolist())
