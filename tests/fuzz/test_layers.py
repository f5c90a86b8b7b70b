"""Whatever a layer is called with: the kernels give what the eager one gives, or an error; never a crash.

Nothing is caught but exceptions: a pointer followed too far ends the test process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import build, ours
from torch import Tensor

pytestmark = pytest.mark.slow

ERRORS = (RuntimeError, ValueError, TypeError, IndexError)
DTYPES = [torch.float32, torch.float64]
ODD_DTYPES = [torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]
SIZES = [0, 1, 2, 3, 5, 8, 9, 17]
POLICIES = ["full", "chunked:3", "truncated:2", "truncated:5/2", "chunked:1000000", "truncated:1000000"]


def storage(x: Tensor, how: str) -> Tensor:
    """The same numbers, laid out otherwise; the expanded one repeats the first of its lanes."""
    match how:
        case "transposed":
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        case "inside out":
            turned = tuple(reversed(range(x.ndim)))
            return x.permute(turned).contiguous().permute(turned)
        case "every other":
            wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan")).to(x.dtype)
            wide[..., ::2] = x
            return wide[..., ::2]
        case "inside a larger one":
            wide = torch.full([n + 2 for n in x.shape], float("nan")).to(x.dtype)
            inner = wide[tuple(slice(1, -1) for _ in x.shape)]
            inner.copy_(x)
            return inner
        case "at an odd place":
            flat = torch.empty(x.numel() + 1, dtype=x.dtype)[1:]
            return flat.copy_(x.reshape(-1)).view(x.shape)
        case "expanded" if x.shape[-2]:
            return x[..., :1, :].expand(x.shape)
        case "unaligned":  # an address that is no multiple of the number's size
            data = bytes(1) + x.contiguous().numpy().tobytes()
            flat = np.frombuffer(bytearray(data), dtype=np.uint8)[1:].view(x.numpy().dtype)
            return torch.from_numpy(flat).view(x.shape) if x.numel() else x
    return x


LAYOUTS = ["plain", "transposed", "inside out", "every other", "inside a larger one", "at an odd place", "expanded"]
LAYOUTS += ["unaligned"]


@dataclass
class Call:
    """A layer, and what it is called with."""

    layer: torch.nn.Module
    x: Tensor
    hx: Any
    resets: Tensor | None
    huge: bool

    def result(self, kernel: str) -> list[Tensor] | None:
        """Outputs and gradients, or None where it is refused."""
        self.layer.kernel = kernel
        self.layer.zero_grad()
        x = self.x.detach()
        if x.is_floating_point():
            x.requires_grad_()
        try:
            y, final = self.layer(x, self.hx, resets=self.resets)
            outputs = [y, *(final if isinstance(final, tuple) else (final,))]
            if y.requires_grad:
                sum(o.sum() for o in outputs).backward()
        except ERRORS:
            return None
        grads = [p.grad for p in self.layer.parameters()]
        return [*outputs, *(g for g in [x.grad, *grads] if g is not None)]


def number(draw: st.DrawFn, odd: int) -> torch.dtype:
    """A dtype, one that layers know unless `odd`."""
    return draw(st.sampled_from(ODD_DTYPES if odd == 0 else DTYPES))


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """One call in three has something wrong with it, or not: a dtype, a size, a number of dimensions."""
    T, B, I, H = (draw(st.sampled_from(SIZES)) for _ in range(4))
    cell = draw(st.sampled_from(["tanh", "relu", "gru", "lstm", "lstm_proj"]))
    dtype = draw(st.sampled_from(DTYPES))
    layers, both, batch_first = draw(st.integers(1, 2)), draw(st.booleans()), draw(st.booleans())
    H = max(H, 3 if cell == "lstm_proj" else 1)
    theirs = build(cell, max(I, 1), H, num_layers=layers, bidirectional=both, batch_first=batch_first).to(dtype)
    memory = draw(st.sampled_from(["gates", "states", "auto"]))
    layer = ours(theirs, gradient=draw(st.sampled_from(POLICIES)), memory=memory)
    wrong = draw(st.integers(0, 8))
    shape = [B, T, I] if batch_first else [T, B, I]
    if wrong == 1:
        shape = draw(st.lists(st.sampled_from(SIZES), min_size=1, max_size=4))
    scale = draw(st.sampled_from([1.0, 1.0, 1e4, 1e30, 1e-42, float("inf"), float("nan")]))
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 9))))
    x = (numbers * scale).to(number(draw, wrong))
    if x.ndim >= 2:
        x = storage(x, draw(st.sampled_from(LAYOUTS if x.dtype in DTYPES else LAYOUTS[:-1])))
    hx: Any = None
    if draw(st.booleans()):
        rows = layers * (2 if both else 1) + (wrong == 2)
        lanes = B + (wrong == 3)
        out = theirs.proj_size or H
        h = torch.randn(rows, lanes, out + (wrong == 4)).to(number(draw, 0 if wrong == 5 else 1))
        h = storage(h.to(dtype) if wrong != 5 else h, draw(st.sampled_from(LAYOUTS[:-1])))
        c = storage(torch.randn(rows, lanes, H).to(dtype), draw(st.sampled_from(LAYOUTS)))
        hx = (h, c) if (theirs.mode == "LSTM") != (wrong == 6) else h
    resets = None
    if draw(st.integers(0, 3)) == 0:
        resets = torch.rand(shape[:-1] if wrong != 7 else [T + 1, B]) < 0.3
    return Call(layer, x, hx, resets, scale > 1e4 or scale != scale)


def test_a_call_is_refused_or_right() -> None:
    accepted = []

    @given(calls())
    @settings(max_examples=400)
    def check(call: Call) -> None:
        expected = call.result("eager")
        accepted.append(expected is not None)
        for kernel in ("auto", "cpu"):
            actual = call.result(kernel)
            if expected is None:
                assert actual is None, kernel
            elif actual is None:
                assert kernel == "cpu", "auto must not refuse what eager does"
            else:
                compare(actual, expected, call, kernel)

    check()
    assert 50 < sum(accepted) < len(accepted) - 50


def compare(actual: list[Tensor], expected: list[Tensor], call: Call, kernel: str) -> None:
    """Close; where numbers may overflow, of the same shape and dtype."""
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape, (kernel, i)
        assert a.dtype == e.dtype, (kernel, i)
        if call.huge:
            continue  # sums that overflow in one order need not in another
        tolerance = 1e-10 if e.dtype == torch.float64 else 1e-5
        largest = e.detach().abs().max().item() if e.numel() else 0.0
        torch.testing.assert_close(
            a, e, rtol=tolerance, atol=tolerance * max(largest, 1e-30), msg=lambda m, i=i: f"{kernel}, {i}: {m}"
        )
