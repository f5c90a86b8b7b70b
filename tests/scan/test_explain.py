"""`explain` of a step and of a Recurrent: the parts, what is kept, the kernel, or why the step is replayed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bptt
from bptt.kernels import STEP_KERNELS, EagerSteps

H, F, B = 5, 3, 2


class Leaky(nn.Module):
    """h + 0.1 (tanh(A x + W h) - h)."""

    hidden_size = H

    def __init__(self) -> None:
        super().__init__()
        self.x, self.h = nn.Linear(F, H), nn.Linear(H, H, bias=False)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return h + 0.1 * (torch.tanh(self.x(x) + self.h(h)) - h)


def stepped(cell: nn.Module) -> Callable[[Any, Any], tuple[Any, Any]]:
    def step(h: Any, x: Any) -> tuple[Any, Any]:
        h = cell(x, h)
        return h, h

    return step


def section(text: str, heading: str) -> list[str]:
    """The lines below a heading, without their indent and their line of code."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(heading)) + 1
    found = []
    for line in lines[start:]:
        if not line.startswith("    "):
            break
        found.append(line.strip().split("   ")[0])
    return found


def test_the_parts_of_a_leaky_cell() -> None:
    found = bptt.explain(stepped(Leaky()), torch.zeros(B, H), torch.zeros(B, F))
    text = str(found)
    assert (found.kernel, found.rows, found.dtype) == ("interpreter", B, torch.float32)
    assert text.startswith(
        f"kernel 'interpreter' ({STEP_KERNELS['interpreter'].variant}) for a traced step on 2 rows, "
    )
    assert section(text, "once a call") == ["permute [3, 5] = cell.x.weight.T", "permute_2 [5, 5] = cell.h.weight.T"]
    assert section(text, "hoisted") == ["mm [R, 5] = x @ permute", "add [R, 5] = mm + cell.x.bias"]
    assert section(text, "core forward") == [
        "mm_2 [R, 5] = carry @ permute_2",
        "add_2 [R, 5] = mm_2 + add",
        "tanh [R, 5] = tanh(add_2)",
        "sub [R, 5] = tanh - carry",
        "mul [R, 5] = sub * 0.1",
        "add_3 [R, 5] = carry + mul",
        "next carry = add_3",
        "y = add_3",
    ]
    assert section(text, "core adjoint")[0] == "add_4 [R, 5] = adjoint + dy"
    assert section(text, "core adjoint")[-1] == "adjoint of the step before = add_5"
    assert {line.split(" = ")[0] for line in section(text, "deferred") if line.startswith("gradient")} == {
        "gradient of cell.x.weight", "gradient of cell.x.bias", "gradient of cell.h.weight"
    }  # fmt: skip
    assert "kept: 1 value, 20 bytes a lane and step, beside the carry's 20: tanh [R, 5]" in text
    assert text.endswith("captured: cell.x.weight [5, 3], cell.x.bias [5], cell.h.weight [5, 5]")
    assert "aten." not in text


def test_operations_tell_the_line_of_the_step_and_none_of_who_asked() -> None:
    text = str(bptt.explain(stepped(Leaky()), torch.zeros(B, H), torch.zeros(B, F)))
    line = f"test_explain.py:{inspect.getsourcelines(Leaky.forward)[1] + 1}"
    walked, back = text.partition("core adjoint")[::2]
    assert next(told for told in walked.splitlines() if "tanh(add_2)" in told).endswith(f"   {line}")
    assert "test_explain.py" not in back


def test_leaves_of_pytrees_have_their_names() -> None:
    cell = nn.LSTMCell(F, H)

    def step(state: dict[str, Tensor], x: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
        h, c = cell(x["in"], (state["h"], state["c"]))
        return {"h": h, "c": c}, (h.sum(1), c)

    carry = {"h": torch.zeros(B, H), "c": torch.zeros(B, H)}
    text = str(bptt.explain(step, carry, {"in": torch.zeros(B, F, requires_grad=True)}))
    for told in ("next carry['h'] = ", "next carry['c'] = ", "y[0] = ", "y[1] = ", "gradient of x['in'] = ",
                 "adjoint['c'] of the step before = ", "captured: cell.weight_hh [20, 5], "):  # fmt: skip
        assert told in text, told


def test_a_step_without_x_and_one_with_rows_of_its_own() -> None:
    text = str(bptt.explain(lambda h, _: (h * 0.5, h), torch.zeros(B, H), None))
    assert section(text, "core forward") == ["mul [R, 5] = carry * 0.5", "next carry = mul", "y = carry"]
    assert text.endswith("kept: nothing beside the carry, 20 bytes a lane and step")
    lanes, bias = torch.randn(B, H, requires_grad=True), torch.randn(H)
    text = str(bptt.explain(lambda h, x: (h * lanes + bias + x, h), torch.zeros(B, H), torch.zeros(B, H)))
    assert "lanes [R, 5]" in text.splitlines()[-1]
    assert "bias [5]" in text.splitlines()[-1]


def test_where_the_interpreter_refuses_its_reason_is_told() -> None:
    w = torch.randn(H, H, requires_grad=True)
    found = bptt.explain(lambda h, x: (h.lgamma() + x @ w, h), torch.zeros(B, H), torch.zeros(B, H))
    assert found.kernel == "eager"
    assert found.variant is None
    assert "'interpreter' cannot: aten.lgamma.default (test_explain.py:" in str(found).splitlines()[0]
    assert section(str(found), "core forward")[0] == "lgamma [R, 5] = lgamma(carry)"
    half = torch.zeros(B, H, dtype=torch.float16)
    assert "float64, not torch.float16" in bptt.explain(lambda h, x: (h * x, h), half, half).reason


def branch(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return (h, x) if h.sum() > 0 else (x, h)


REPLAYED: dict[str, tuple[Callable[..., Any], str]] = {
    "branch": (branch, "reads a value of a tensor .*, at test_explain.py:"),
    "draw": (
        lambda h, x: (torch.bernoulli(h.sigmoid()), x),
        "draws random numbers by probabilities that depend on the carry",
    ),
    "pair": (lambda h, x: h, r"does not return a pair \(carry, y\)"),
}


def test_a_batch_that_is_one_row_and_numbers_that_are_drawn() -> None:
    for step in (lambda h, x: (h - h.mean(0), x), lambda h, x: (h / len(x), x)):
        found = bptt.explain(step, torch.zeros(B, H), torch.zeros(B, H))
        assert (found.kernel, found.rows) == ("interpreter", 1)
    text = str(bptt.explain(lambda h, x: (h + torch.rand_like(h), x), torch.zeros(B, H), torch.zeros(B, H)))
    assert "draw 0" in text


@pytest.mark.parametrize("name", REPLAYED)
def test_a_replayed_step_tells_why(name: str) -> None:
    step, reason = REPLAYED[name]
    found = bptt.explain(step, torch.zeros(B, H), torch.zeros(B, H))
    assert (found.kernel, found.parts) == ("replay", None)
    with pytest.raises(RuntimeError, match=reason):
        bptt.scan(step, torch.zeros(B, H), torch.zeros(9, B, H), kernel="interpreter")
    head, told = str(found).splitlines()
    assert head == "kernel 'replay', the step itself, on 2 rows, torch.float32 on cpu"
    assert told == f"replayed: {found.reason}"


def test_scan_runs_what_was_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Counted(EagerSteps):
        def advance(self, *arguments: Any, **keywords: Any) -> Any:
            calls.append(self.name)
            return super().advance(*arguments, **keywords)

    monkeypatch.setitem(STEP_KERNELS, "eager", Counted())
    traced = []

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        traced.append(len(h))
        return h.logcumsumexp(1) * 0.5 + x, h

    assert bptt.explain(step, torch.zeros(B, H), torch.zeros(B, H)).kernel == "replay"  # it appends to a list
    del traced[:]
    w = torch.randn(H, H, requires_grad=True)
    for first, names in ((w, ["eager"]), (w.detach(), ["eager"])):  # alone, its steps are as many operations
        assert bptt.explain(lambda h, x, w=first: (h.lgamma() + x @ w, h), *torch.zeros(2, B, H)).kernel == (
            "eager" if first is w else "replay"
        )
        bptt.scan(lambda h, x, w=first: (h.lgamma() + x @ w, h), torch.zeros(B, H), torch.zeros(9, B, H))
        assert calls == names


def test_a_recurrent_tells_what_its_call_does() -> None:
    layer = bptt.nn.Recurrent(Leaky(), gradient="truncated:20")
    text = str(bptt.explain(layer, torch.zeros(30, B, F)))
    assert "next carry[0] = " in text
    assert text.splitlines()[-1] == "gradient truncated:20, memory='auto'"
    assert bptt.explain(layer, x=torch.zeros(30, B, F)).kernel == "interpreter"
    assert bptt.explain(layer, torch.zeros(3, B, F)).reason == "a trace pays from 8 steps on, and this call has 3"
    layer.kernel = "eager"
    found = bptt.explain(layer, torch.zeros(3, B, F))
    assert (found.kernel, found.reason) == ("eager", "named by kernel=")
    layer.kernel = "replay"
    assert bptt.explain(layer, torch.zeros(30, B, F)).reason == "kernel='replay' was asked for"


def test_a_named_kernel_that_cannot_run_raises_as_the_call_does() -> None:
    class Sums(nn.Module):
        hidden_size = H

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return h.logcumsumexp(1) + x

    layer, x = bptt.nn.Recurrent(Sums(), kernel="interpreter"), torch.zeros(30, B, H)
    for call in (layer, lambda x: bptt.explain(layer, x)):
        with pytest.raises(RuntimeError, match=r"kernel='interpreter' cannot run this step: aten\.logcumsumexp"):
            call(x)


def test_arguments_that_do_not_fit() -> None:
    explain: Any = bptt.explain
    x = torch.zeros(B, F)
    with pytest.raises(
        TypeError, match=r"explain takes \(layer, x\) .*, or \(step, carry, x\) .*: got a builtins.function"
    ):
        explain(branch, x)
    with pytest.raises(TypeError, match="and 0 arguments"):
        explain(branch)
    with pytest.raises(TypeError, match=r"layer must be a bptt\.nn\.RNN, GRU or LSTM: got torch\.nn"):
        explain(nn.LSTM(F, H), x)
    for layer in (bptt.nn.GRU(F, H), bptt.nn.Recurrent(Leaky())):
        with pytest.raises(TypeError, match=r"explain takes \(layer, x\) of a layer: got "):
            explain(layer, x, x)
    with pytest.raises(TypeError, match=r"step must be a function of \(carry, x\): got a int"):
        explain(3, x, x)
    with pytest.raises(TypeError, match="x must hold tensors alone, those of one step: got a float"):
        explain(branch, x, (x, 1.0))
    with pytest.raises(ValueError, match="a Recurrent of one direction"):
        explain(bptt.nn.Recurrent([Leaky(), Leaky()], bidirectional=True), torch.zeros(9, B, F))


def test_carries_that_no_trace_is_for() -> None:
    def halve(h: Any, x: Any) -> tuple[Any, Any]:
        return h * 0.5, x

    x = torch.zeros(B, H)
    for carry, head, reason in (
        (1.0, "without a tensor in the carry", "the carry holds Python values"),
        (torch.zeros(B, dtype=torch.int64), "on 2 rows, torch.int64 on cpu", "no tensor of the carry has a gradient"),
    ):
        text = str(bptt.explain(halve, carry, x))
        assert text.splitlines() == [f"kernel 'replay', the step itself, {head}", f"replayed: {reason}"]


def test_random_state_is_left_as_it_was() -> None:
    before = torch.get_rng_state()
    bptt.explain(lambda h, x: (h + torch.rand_like(h), x), torch.zeros(B, H), torch.zeros(B, H))
    assert torch.equal(before, torch.get_rng_state())


def test_a_packed_sequence_and_a_stack() -> None:
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(20, B, F), [20, 11])
    assert bptt.explain(bptt.nn.Recurrent(nn.GRUCell(F, H)), packed).kernel == "interpreter"
    stack = bptt.nn.Recurrent(lambda n: nn.GRUCell(H if n else F, H), 2, dropout=0.3, batch_first=True)
    found = bptt.explain(stack, torch.randn(B, 20, F))
    assert found.kernel == "interpreter"
    assert "cells[1].weight_ih [15, 5]" in found.captured


def test_a_module_may_be_the_step() -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = Leaky()

        def forward(self, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.cell(x, h)
            return h, h

    found = bptt.explain(Step(), torch.zeros(B, H), torch.zeros(B, F))
    assert found.captured[0].endswith("cell.x.weight [5, 3]")
    assert repr(found).startswith("StepExplanation(kernel='interpreter', reason=")
    assert "Graph" not in repr(found)
