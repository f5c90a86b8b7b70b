"""What `plan_scan`, and `plan` of a `Recurrent`, tell beforehand is what a call then keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import bptt
from bptt.engine import StepProgram
from bptt.scan import direct

T, B, I, H = 120, 4, 5, 16

CELL = nn.LSTMCell(I, H)


def lstm(carry: tuple[Tensor, Tensor], x: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    carry = CELL(x, carry)
    return carry, carry[0]


def leaky(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    h = 0.9 * h + 0.1 * torch.tanh(nn.functional.linear(h, CELL.weight_hh[:H]) + x @ CELL.weight_ih[:H].T)
    return h, h.sum(-1)


def branching(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """It cannot be traced."""
    h = torch.tanh(nn.functional.linear(h, CELL.weight_hh[:H]) + x @ CELL.weight_ih[:H].T)
    return (h * 1.5 if bool(h.sum() > 1e9) else h), h


def zeros(n: int) -> Any:
    states = [torch.zeros(B, H) for _ in range(n)]
    return states[0] if n == 1 else tuple(states)


def left(call: Any, *known: Any) -> int:
    """The bytes of what a call saves for its backward, by storage, without what the caller has anyway."""
    saved: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(id(t), t), lambda t: t):
        results = call()
    have = {_address(t) for t in tree_leaves((known, results)) if isinstance(t, Tensor)}
    sizes = {_address(t): t.untyped_storage().nbytes() for t in saved.values() if _address(t) not in have}
    return sum(sizes.values())


def _address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


@pytest.mark.parametrize("policy", ["full", "chunked:20", "truncated:7"])
@pytest.mark.parametrize("memory", ["auto", "states"])
@pytest.mark.parametrize(("step", "states"), [(lstm, 2), (leaky, 1)])
def test_a_compiled_step_keeps_what_was_told(step: Any, states: int, memory: str, policy: str) -> None:
    carry, xs = zeros(states), torch.randn(T, B, I)
    told = bptt.plan_scan(step, carry, xs, gradient=policy, memory=memory)
    direct._KNOWN.clear()  # of the calls that it made: one of a known kind keeps a copy of its ys
    found = left(
        lambda: bptt.scan(step, carry, xs, gradient=policy, memory=memory), carry, xs, tuple(CELL.parameters())
    )
    rebuilt = 0
    if memory == "states":  # the values are computed anew in the backward call
        put_out = step is lstm  # the y, which is a carry, is not kept twice
        rebuilt = told.tape_bytes - (T + 1) * (states - put_out) * B * H * 4
    assert found == pytest.approx(told.tape_bytes - rebuilt, rel=0.03)
    assert (told.segments, told.steps, told.recomputed) == (1, T, 0)
    assert told.low <= told.seconds <= told.high


@pytest.mark.parametrize("memory", ["checkpoints:steps=15", "checkpoints", "checkpoints:bytes=40000"])
def test_segments_of_a_compiled_step(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    carry, xs = zeros(2), torch.randn(T, B, I)
    told = bptt.plan_scan(lstm, carry, xs, memory=memory)
    steps, made = [0], [0]
    advance = StepProgram._advance

    def watched(self: StepProgram, inputs: Any, first: Any, a: int, b: int, keep: bool, wants_y: bool = True) -> Any:
        found = advance(self, inputs, first, a, b, keep, wants_y)
        if not wants_y:
            steps[0] += b - a
        if keep:
            made[0] = max(made[0], sum(t.nbytes for part in found[:2] for t in part))
        return found

    (h, _), ys = bptt.scan(lstm, carry, xs, memory=memory)
    monkeypatch.setattr(StepProgram, "_advance", watched)
    stored = left(lambda: bptt.scan(lstm, carry, xs, memory=memory), carry, xs, tuple(CELL.parameters()))
    (h.sum() + ys.sum()).backward()
    assert steps[0] / T == pytest.approx(told.recomputed)
    in_backward = told.tape_bytes - stored - made[0]
    assert 0 <= in_backward < 0.5 * told.tape_bytes if "bytes" in memory else in_backward == pytest.approx(0, abs=2000)


@pytest.mark.parametrize("memory", ["auto", "states", "checkpoints:steps=15"])
def test_replayed_and_recorded_steps(memory: str) -> None:
    carry, xs = zeros(1), torch.randn(T, B, I)
    told = bptt.plan_scan(branching, carry, xs, memory=memory)
    found = left(lambda: bptt.scan(branching, carry, xs, memory=memory), carry, xs, tuple(CELL.parameters()))
    segment = 0 if memory != "checkpoints:steps=15" else 16 * B * H * 4  # of the backward call
    few = 2 * B * H * 4  # the first carry and the one that entered the last step
    assert found + segment == pytest.approx(told.tape_bytes, rel=0.03, abs=few)
    assert told.recomputed == {"auto": 0, "states": 1}.get(memory, told.recomputed)


def test_a_recurrent_layer_is_planned_as_its_scan() -> None:
    layer = bptt.nn.Recurrent(lambda n: nn.GRUCell(H if n else I, H), 2, batch_first=True)
    told = bptt.plan(layer, T, B)
    x = torch.randn(B, T, I)
    found = left(lambda: layer(x)[::-1], x, tuple(layer.parameters()))
    assert found == pytest.approx(told.tape_bytes, rel=0.1)
    model = nn.Sequential(bptt.nn.Recurrent(nn.GRUCell(I, H)))
    assert bptt.plan(model, T, B, memory="checkpoints:steps=12").segments == 10


def test_a_cell_that_does_not_tell_its_input_needs_an_example() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRUCell(I, H)

        def forward(self, x: Tensor, h: Tensor | None) -> Tensor:
            return self.cell(x, h)

    layer = bptt.nn.Recurrent(Cell(), form="state")
    with pytest.raises(ValueError, match="whose first cell has no input_size: give x"):
        bptt.plan(layer, T, B)
    random = torch.get_rng_state()
    told = bptt.plan(layer, T, B, x=torch.zeros(2, 1, I))
    assert torch.equal(torch.get_rng_state(), random)
    assert told.tape_bytes > T * B * H * 4
    both = bptt.nn.Recurrent([nn.GRUCell(I, H), nn.GRUCell(I, H)], bidirectional=True)
    with pytest.raises(NotImplementedError, match="of one direction"):
        bptt.plan(both, T, B)


def test_bad_arguments() -> None:
    carry, xs = zeros(1), torch.randn(T, B, I)
    with pytest.raises(ValueError, match="kernel must be one of"):
        bptt.plan_scan(leaky, carry, xs, kernel="cpu")
    with pytest.raises(ValueError, match="has no gates"):
        bptt.plan_scan(leaky, carry, xs, memory="gates")
    with pytest.raises(ValueError, match="bytes must hold"):
        bptt.plan_scan(leaky, carry, xs, memory="checkpoints:bytes=3")
