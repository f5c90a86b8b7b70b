"""Whole steps in the interpreter against their graphs by torch operations: stage 1, and stage 3 under every policy."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from bptt.kernels.frames import Frames
from bptt.kernels.interpreter import Interpreter
from bptt.policies import Chunked, Full, Policy, Truncated
from bptt.steps import SplitStep

from . import handmade
from .cells import CELLS

Agree = Callable[..., None]

each_cell = pytest.mark.parametrize("cell", CELLS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])

POLICIES: dict[str, Policy] = {
    "full": Full(), "chunked": Chunked(3), "truncated": Truncated(4), "coarser": Truncated(5, every=2),
}  # fmt: skip


@cache
def step_of(cell: str, H: int, dtype: torch.dtype) -> SplitStep:
    torch.manual_seed(3)
    return CELLS[cell](H, dtype)


def drawn(step: SplitStep, names: Sequence[str], *rows: int) -> dict[str, Tensor]:
    """Values by name, near those of a trained net; without rows 0.5 at most, so that leaks are such."""
    found = {}
    for name in names:
        kind = step.values[name]
        shape = (*rows[:-1], rows[-1] * kind.rows, *kind.shape) if kind.rows else kind.shape
        found[name] = torch.randn(shape, dtype=kind.dtype) if kind.rows else torch.rand(shape, dtype=kind.dtype) - 0.5
    return found


def start(step: SplitStep, B: int) -> list[Tensor]:
    return [torch.rand(B * step.values[n].rows, *step.values[n].shape, dtype=step.values[n].dtype) for n in step.carry]


def taped(step: SplitStep, T: int, B: int, resets: Tensor | None = None) -> dict[str, Tensor]:
    """What the core of stage 3 takes, of one call."""
    values = drawn(step, [*step.x, *step.captured, *step.dys], T, B)
    carries, kept = handmade.advance(step, values, start(step, B), resets, T, step.y)
    values |= kept
    for name, states in zip(step.carry, carries, strict=True):
        before = states[:-1].clone()
        if resets is not None:
            before[resets.expand(T, B).repeat_interleave(step.values[name].rows, 1)] = 0
        values[name] = before
    return values


def forward_cases(cell: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(the case, what `advance` is given) of each size, with resets and without, and with fewer values kept."""
    for T, B, H in ((5, 3, 5), (1, 1, 1), (3, 41, 4), (2, 1, 33)):
        step = step_of(cell, H, dtype)
        values, carry = drawn(step, [*step.x, *step.captured], T, B), start(step, B)
        for resets in (None, torch.rand(T, B) < 0.3, torch.rand(T, 1) < 0.5):
            yield f"{T}, {B}, {H}", (step, values, carry, resets, T, step.y)
        yield "fewer are kept", (step, values, carry, None, T, step.y[-1:])


def sweep_cases(cell: str, policy: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(the case, what `sweep` is given) of each size, with factors and without, and where nothing leaves."""
    for T, B, H in ((8, 3, 5), (5, 1, 1), (7, 37, 4), (1, 2, 33)):
        step = step_of(cell, H, dtype)
        values, frames = taped(step, T, B), Frames.of(POLICIES[policy].reach(T), None, T, B)
        arriving: list[Tensor | None] = [*start(step, B)]
        arriving[-1] = None if B == 3 else arriving[-1]
        for factors in (None, torch.randint(0, 3, (T, B)).to(dtype), torch.rand(T, 1, dtype=dtype)):
            yield f"{T}, {B}, {H}", (step, values, frames, arriving, factors, True)
        yield f"{T}, {B}, {H}, nothing leaves", (step, values, frames, arriving, None, False)


@cache
def expected(stage: str, *of: Any) -> list[tuple[str, tuple[Any, ...], Any]]:
    """The cases of a stage with what torch operations make of each: once for all variants of the interpreter."""
    cases, oracle = (forward_cases, handmade.advance) if stage == "forward" else (sweep_cases, handmade.sweep)
    torch.manual_seed(20)
    return [(case, given, oracle(*given)) for case, given in cases(*of)]


@each_dtype
@each_cell
def test_forward(interpreter: Interpreter, cell: str, dtype: torch.dtype, agree: Agree) -> None:
    for case, given, value in expected("forward", cell, dtype):
        assert interpreter.refuses(given[0], torch.device("cpu"), dtype) is None
        agree(interpreter.advance(*given), value, case)


@each_cell
def test_all_steps_at_once_give_the_same_bits(interpreter: Interpreter, cell: str, agree: Agree) -> None:
    """What the memory policy "states" asks for: one step of T * B rows."""
    for dtype in (torch.float32, torch.float64):
        step = step_of(cell, 5, dtype)
        T, B = 7, 9
        values, carry = drawn(step, [*step.x, *step.captured], T, B), start(step, B)
        carries, kept = interpreter.advance(step, values, carry, None, T, step.y)
        rows = {n: x.flatten(0, 1)[None] if step.values[n].rows else x for n, x in values.items()}
        again, kept_again = interpreter.advance(step, rows, [c[:-1].flatten(0, 1) for c in carries], None, 1, step.y)
        agree([c[1] for c in again], [c[1:].flatten(0, 1) for c in carries], tolerance=0)
        agree({n: x[0] for n, x in kept_again.items()}, {n: x.flatten(0, 1) for n, x in kept.items()}, tolerance=0)


@each_dtype
@each_cell
@pytest.mark.parametrize("policy", POLICIES)
def test_sweep(interpreter: Interpreter, cell: str, policy: str, dtype: torch.dtype, agree: Agree) -> None:
    for case, given, value in expected("sweep", cell, policy, dtype):
        found = interpreter.sweep(*given)
        agree(found, value, case)
        assert given[-1] or found[1] == [None] * len(given[0].carry)


@pytest.mark.parametrize("cell", ["gru", "attention"])
def test_sweep_of_unequal_lengths_and_of_a_part(interpreter: Interpreter, cell: str, agree: Agree) -> None:
    """Where no column walks all is zero; of a part of a call columns begin at the same step."""
    T, lengths = 9, torch.tensor([9, 2, 5, 5, 1])
    step = step_of(cell, 5, torch.float64)
    for name, policy in POLICIES.items():
        frames = Frames.of(policy.reach(T), lengths, T, len(lengths))
        values, arriving = taped(step, T, len(lengths)), start(step, len(lengths))
        expected = handmade.sweep(step, values, frames, arriving, None, True)
        agree(interpreter.sweep(step, values, frames, arriving, None, True), expected, name)
        if name in ("full", "chunked"):
            continue
        part = frames.within(2, 6)
        values, arriving = taped(step, 4, len(lengths)), start(step, 64)
        expected = handmade.sweep(step, values, part, arriving, None, True)
        agree(interpreter.sweep(step, values, part, arriving, None, True), expected, f"{name} of a part")


@pytest.fixture
def walkers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Set the number of threads the kernel asks for, while torch's own products stay with one."""
    return lambda count: monkeypatch.setattr(torch, "get_num_threads", lambda: count)  # type: ignore[return-value]


@each_cell
def test_threads(cell: str, walkers: Callable[[int], None], agree: Agree) -> None:
    """Two and three against one; twice the same number gives the same bits."""
    interpreter = Interpreter()
    T, B = 40, 21
    step = step_of(cell, 16, torch.float64)
    values, carry = drawn(step, [*step.x, *step.captured], T, B), start(step, B)
    tape = taped(step, T, B)
    frames = [Frames.of(policy.reach(T), None, T, B) for policy in POLICIES.values()]

    def run() -> list[object]:
        found: list[object] = [interpreter.advance(step, values, carry, None, T, step.y)]
        return found + [interpreter.sweep(step, tape, f, carry, None, True) for f in frames]

    walkers(1)
    alone = run()
    for count in (2, 3):
        walkers(count)
        together = run()
        agree(together, alone, f"{count} threads")
        agree(run(), together, f"{count} threads again", tolerance=0)


def test_no_lanes_no_steps(interpreter: Interpreter, agree: Agree) -> None:
    step = step_of("gru", 3, torch.float64)
    for T, B in ((0, 2), (3, 0)):
        values, carry = drawn(step, [*step.x, *step.captured], T, B), start(step, B)
        carries, kept = interpreter.advance(step, values, carry, None, T, step.y)
        assert [tuple(c.shape) for c in carries] == [(T + 1, B, 3)]
        assert tuple(kept["y0"].shape) == (T, B, 3)
        agree(carries[0][0], carry[0])


def test_a_closed_edge_stops_nan(interpreter: Interpreter) -> None:
    step = step_of("lstm", 3, torch.float64)
    T, B = 4, 2
    values, frames = taped(step, T, B), Frames.of(Full().reach(T), None, T, B)
    values["dy0"][3, 0] = float("nan")
    factors = torch.ones(T, B, dtype=torch.float64)
    factors[2] = 0
    found, _ = interpreter.sweep(step, values, frames, [None, None], factors, False)
    assert found["dx0"][2:, 0].isnan().all()
    assert not found["dx0"][:2].isnan().any()
    assert not found["dx0"][:, 1].isnan().any()


def test_outputs_are_fresh_and_inputs_untouched(interpreter: Interpreter, agree: Agree) -> None:
    step = step_of("layer_norm_lstm", 5, torch.float64)
    values, frames = taped(step, 6, 3), Frames.of(Truncated(3).reach(6), None, 6, 3)
    before = {name: x.clone() for name, x in values.items()}
    first = interpreter.sweep(step, values, frames, [None, None], None, True)
    agree(values, before, tolerance=0)
    again = interpreter.sweep(step, values, frames, [None, None], None, True)
    agree(again, first, tolerance=0)
    assert not {x.data_ptr() for x in first[0].values()} & {x.data_ptr() for x in again[0].values()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v | {"x0": v["x0"][:, :, 1:]}, "x0 must have the shape"),
        (lambda v: v | {"x0": v["x0"].float()}, "x0 must be torch.float64"),
        (lambda v: v | {"w0": v["w0"].t()}, "w0 must have the shape"),
        (lambda v: {name: x for name, x in v.items() if name != "x0"}, "values must hold x0"),
    ],
)
def test_what_does_not_fit(change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str) -> None:
    step = step_of("lstm", 3, torch.float64)
    values = change(drawn(step, [*step.x, *step.captured], 2, 2))
    with pytest.raises((RuntimeError, KeyError), match=message):
        Interpreter().advance(step, values, start(step, 2), None, 2, step.y)


def test_inputs_in_any_strides(interpreter: Interpreter, agree: Agree) -> None:
    step = step_of("gru", 5, torch.float64)
    T, B = 4, 3
    values, carry = drawn(step, [*step.x, *step.captured], T, B), start(step, B)
    expected = interpreter.advance(step, values, carry, None, T, step.y)
    strided = {name: x.mT.contiguous().mT if x.dim() > 1 else x for name, x in values.items()}
    strided["x0"] = torch._neg_view(-strided["x0"])
    agree(interpreter.advance(step, strided, [carry[0].t().contiguous().t()], None, T, step.y), expected, tolerance=0)
