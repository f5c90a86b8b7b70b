"""What the interpreter refuses, and what it says of it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bptt.kernels.interpreter import Interpreter

from .handmade import ROWS, split

CPU = torch.device("cpu")
Core = Callable[[Tensor, Tensor], Tensor]

REFUSED: dict[str, tuple[Core, str]] = {
    "a mean over rows": (lambda x, w: x - x.mean(0), "aten.mean.dim: it mixes rows"),
    "a sum over rows": (lambda x, w: x + x.sum(0), "aten.sum.dim_IntList: it mixes rows"),
    "a largest row": (lambda x, w: x + x.amax(0), "aten.amax.default: it mixes rows"),
    "rows turned": (lambda x, w: torch.mm(x.t(), x) + x[:5], "rows lie in another dimension"),
    "a row": (lambda x, w: x + x[:1], "aten.slice.Tensor: it slices rows"),
    "a running logarithm": (
        lambda x, w: torch.logcumsumexp(x, 1),
        "aten.logcumsumexp.default: the interpreter has no such operation",
    ),
    "another dtype": (lambda x, w: x.to(torch.float16).to(x.dtype), "its values are torch.float16"),
    "whole numbers without bounds": (lambda x, w: x * (x.to(torch.int64) * 3), "its values are torch.int64"),
    "an index without bounds": (lambda x, w: x.gather(1, x.to(torch.int64)), "its index may lie beyond"),
    "a draw": (lambda x, w: x + torch.rand_like(x), "aten.rand_like.default: the interpreter has no such operation"),
    "a remainder": (lambda x, w: torch.div(x, 2.0, rounding_mode="floor"), "aten.div.Tensor_mode: rounded"),
    "rows joined": (lambda x, w: torch.cat([x, x], 0)[:ROWS] + x, "it concatenates rows"),
}


def step_of(core: Core, dtype: torch.dtype = torch.float64, carry: torch.dtype | None = None):  # type: ignore[no-untyped-def]
    return split(
        lambda carry, x, w: ([carry[0]], [core(x[0], w[0])]), [(5,)], [(5,)], [torch.ones(5)], dtype=dtype,
        pull=lambda *all_: [all_[0], torch.zeros(ROWS, 5, dtype=dtype)], decompose=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_an_operation(name: str) -> None:
    core, why = REFUSED[name]
    step = step_of(core)
    said = Interpreter().refuses(step, CPU, torch.float64)
    assert said is not None
    assert why in said
    assert Interpreter().refuses(step, CPU, torch.float64) == said, "asked again"


def test_it_names_the_line_of_the_step() -> None:
    step = step_of(lambda x, w: torch.logcumsumexp(x, 1))
    (node,) = [node for node in step.forward.graph.nodes if "logcumsumexp" in str(node.target)]
    node.meta["line"] = "cell.py:12"
    assert Interpreter().refuses(step, CPU, torch.float64) == (
        "aten.logcumsumexp.default (cell.py:12): the interpreter has no such operation"
    )


@pytest.mark.parametrize(
    ("device", "dtype", "why"),
    [
        ("meta", torch.float64, "it runs on the CPU, not on meta"),
        ("cpu", torch.bfloat16, "it computes float32 and float64, not torch.bfloat16"),
        ("cpu", torch.float32, "the carry h0 is torch.float64, not torch.float32"),
    ],
)
def test_a_device_or_a_dtype(device: str, dtype: torch.dtype, why: str) -> None:
    step = step_of(lambda x, w: x)
    assert Interpreter().refuses(step, torch.device(device), dtype) == why
    assert Interpreter().refuses(step, CPU, torch.float64) is None


def test_an_instruction_set_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"variant must be one of .*: got 'abacus'"):
        Interpreter("abacus")


def test_a_program_prints_itself() -> None:
    step = step_of(lambda x, w: torch.tanh(x) * w)
    assert str(Interpreter().forward_program(step, ["y0"])) == (
        "tile+0[0, 0, 0, 1] = tanh[1, 1, 1, 5] x0+0[0, 0, 0, 1]\n"
        "y0+0[0, 0, 0, 1] = mul[1, 1, 1, 5] tile+0[0, 0, 0, 1], w0+0[0, 0, 0, 1]\n"
        "next0+0[0, 0, 0, 1] = same[1, 1, 1, 5] h0+0[0, 0, 0, 1]"
    )
