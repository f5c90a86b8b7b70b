"""Steps that are replayed for what of torch, NumPy and C they use: each has its reason, and gives what a loop gives."""

from __future__ import annotations

import ctypes
import warnings
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bptt
from bptt.scan import compiled

from .replayed import B, H, Step, agrees, both, given, reason, weights

DOUBLE = torch.float64
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def _no_traces_of_other_tests() -> None:
    compiled._KEPT.clear()


class Doubling(Tensor):
    """A tensor whose products are twice as large."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return result * 2 if getattr(func, "__name__", "") in ("matmul", "__matmul__", "__rmatmul__") else result


def _scripted(what: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(what)


def _branching(h: Tensor, x: Tensor) -> Tensor:
    if bool(h.sum() > 0):
        return torch.tanh(h + x)
    return h * 0.3 + x


scripted = _scripted(_branching)


def in_inference_mode(h: Tensor, x: Tensor, w: Tensor) -> Tensor:
    with torch.inference_mode():
        z = (x @ w) * 2
    return torch.tanh(h @ w + x + z.clone())


def with_out(h: Tensor, x: Tensor, w: Tensor) -> Tensor:
    z = torch.empty_like(h)
    torch.mul(h.detach(), 2.0, out=z)
    return torch.tanh(h @ w + x + z)


def by_address(h: Tensor, x: Tensor, w: Tensor) -> Tensor:
    z = torch.zeros_like(h)
    ctypes.memmove(z.data_ptr(), x.detach().contiguous().data_ptr(), 8)
    return torch.tanh(h @ w + x + z)


def by_array(h: Tensor, x: Tensor, w: Tensor) -> Tensor:
    z = torch.zeros_like(h)
    z.numpy()[:] = 0.3
    return torch.tanh(h @ w + x + z)


def by_interface(h: Tensor, x: Tensor, w: Tensor) -> Tensor:
    z = torch.zeros_like(h)
    np.asarray(z)[:] = 0.3
    return torch.tanh(h @ w + x + z)


def by_storage(h: Tensor, x: Tensor, w: Tensor) -> Tensor:
    z = torch.zeros_like(h)
    z.untyped_storage().fill_(0)
    return torch.tanh(h @ w + x + z)


def of_a_buffer(h: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(h @ w + x + torch.frombuffer(bytearray(8 * H), dtype=DOUBLE))


def of_a_buffer_by_row(h: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(h @ w + x + torch.frombuffer(bytearray(8 * B * H), dtype=DOUBLE).view(B, H))


def with_default_dtype(h: Tensor, x: Tensor, w: Tensor) -> Tensor:
    torch.set_default_dtype(DOUBLE)
    third = torch.ones(H) / 3
    torch.set_default_dtype(torch.float32)
    return torch.tanh(h @ w + x + third)


def generator_inside(h: Tensor, x: Tensor, w: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.tanh(h @ w + x + torch.rand(H, generator=generator, dtype=DOUBLE))


def seeded(h: Tensor, x: Tensor, w: Tensor) -> Tensor:
    torch.manual_seed(3)
    return torch.tanh(h @ w + x + torch.rand(H, dtype=DOUBLE))


def doubling_inside(h: Tensor, x: Tensor, w: Tensor) -> Tensor:
    product = h.as_subclass(Doubling) @ w
    return torch.tanh(torch.add(product, x)).as_subclass(Tensor)


INSIDE: dict[str, tuple[Function, str]] = {
    "inference mode": (in_inference_mode, "turns on inference mode (aten.matmul), at test_refused_kinds.py:"),
    "out=": (with_out, "aten.mul.out writes to a tensor it is given (out=), at test_refused_kinds.py:"),
    "ctypes": (by_address, "`ctypes.memmove`"),
    "numpy": (by_array, "reads a value of a tensor (numpy), at test_refused_kinds.py:"),
    "numpy's interface": (by_interface, "reads a value of a tensor (__array__), at test_refused_kinds.py:"),
    "storage": (by_storage, "reads a value of a tensor (untyped_storage), at test_refused_kinds.py:"),
    "a tensor of a buffer": (of_a_buffer, "by other means than torch's operations"),
    "a tensor of a buffer by row": (of_a_buffer_by_row, "test_refused_kinds.py:"),
    "default dtype": (with_default_dtype, "`torch.set_default_dtype` changes torch's settings"),
    "a generator made inside": (generator_inside, "from a generator of its own (aten.rand.generator), at test_refused"),
    "seeds": (seeded, "`torch.manual_seed` changes torch's settings or random generators"),
    "scripted function": (lambda h, x, w: scripted(h @ w, x), "`scripted` is a scripted function"),
    "subclass inside": (doubling_inside, "another class than torch.Tensor (Doubling), at test_refused_kinds.py:"),
}


@pytest.mark.parametrize("name", INSIDE)
def test_what_a_step_does_inside_is_refused_with_its_reason(name: str) -> None:
    w, (f, text) = weights(), INSIDE[name]

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return both(f(h, x, w))

    assert text in reason(step, *given())
    agrees(step, w)


def _subclass() -> tuple[Step, list[Tensor]]:
    w = weights()
    doubling = w.as_subclass(Doubling)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return both(torch.tanh(h @ doubling + x))

    return step, [w]


def _array(write: Callable[[Any], None]) -> Callable[[], tuple[Step, list[Tensor]]]:
    def make() -> tuple[Step, list[Tensor]]:
        w, z = weights(), torch.zeros(H, dtype=DOUBLE)
        n = z.numpy()

        def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            write(n)
            return both(torch.tanh(h @ w + x + z))

        return step, [w]

    return make


def _memory(hold: Callable[[], Any]) -> Callable[[], tuple[Step, list[Tensor]]]:
    def make() -> tuple[Step, list[Tensor]]:
        w, held = weights(), hold()

        def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return both(torch.tanh(h @ w + x * held[0]))

        return step, [w]

    return make


def _scripted_module() -> tuple[Step, list[Tensor]]:
    inner = _scripted(nn.Linear(H, H, dtype=DOUBLE))
    return lambda h, x: both(torch.tanh(inner(h) + x)), list(inner.parameters())


def _hook(register: Callable[[nn.Module], Any]) -> Callable[[], tuple[Step, list[Tensor]]]:
    def make() -> tuple[Step, list[Tensor]]:
        inner = nn.Linear(H, H, dtype=DOUBLE)
        register(inner)
        return lambda h, x: both(torch.tanh(inner(h) + x)), list(inner.parameters())

    return make


def _seeded() -> tuple[Step, list[Tensor]]:
    w, generator = weights(), torch.Generator()

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        generator.manual_seed(3)
        return both(torch.tanh(h @ w + x + torch.rand(H, generator=generator, dtype=DOUBLE)))

    return step, [w]


HELD: dict[str, tuple[Callable[[], tuple[Step, list[Tensor]]], str]] = {
    "subclass": (_subclass, "another class than torch.Tensor (Doubling), at test_refused_kinds.py:"),
    "array by out=": (_array(lambda n: np.multiply(0.0, 2.0, out=n)), "writes to the array `n`"),
    "array by a third argument": (_array(lambda n: np.multiply(0.0, 2.0, n)), "writes to the array `n`"),
    "array by copyto": (_array(lambda n: np.copyto(n, 0.3)), "`np.copyto` writes to the array `n`"),
    "array by at": (_array(lambda n: np.minimum.at(n, 0, 0.0)), "calls `np.minimum.at`"),
    "array by fill": (_array(lambda n: n.fill(0.3)), "calls `n.fill`"),
    "bytes": (_memory(lambda: bytearray(b"\1")), "`held` is a bytearray"),
    "array.array": (_memory(lambda: array("d", [0.5])), "`held` is a array"),
    "ctypes": (_memory(lambda: (ctypes.c_double * 1)(0.5)), "`held` is a c_double_Array_1"),
    "scripted module": (_scripted_module, "is a scripted module, whose code cannot be read"),
    "forward hook": (_hook(lambda m: m.register_forward_hook(lambda m, i, o: o * 2)), "_forward_hooks` holds a hook"),
    "forward hook before": (
        _hook(lambda m: m.register_forward_pre_hook(lambda m, i: (i[0] * 2,))), "_forward_pre_hooks` holds a hook"
    ),
    "backward hook": (
        _hook(lambda m: m.register_full_backward_hook(lambda m, i, o: (i[0] * 2,))), "_backward_hooks` holds a hook"
    ),
    "seeded generator": (_seeded, "`generator` is a Generator"),
}  # fmt: skip


@pytest.mark.parametrize("name", HELD)
def test_what_a_step_holds_is_refused_with_its_reason(name: str) -> None:
    make, text = HELD[name]
    step, params = make()
    assert text in reason(step, *given())
    agrees(step, *params)


def test_a_captured_tensor_written_by_out_is_an_error() -> None:
    w, z = weights(), torch.zeros(B, H, dtype=DOUBLE)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        torch.mul(h.detach(), 2.0, out=z)
        return both(torch.tanh(h @ w + x + z))

    assert "writes to a tensor it is given (out=)" in reason(step, *given())
    with pytest.raises(RuntimeError, match="which the step writes to"):
        bptt.scan(step, *given())


def test_a_tensor_that_is_another_at_each_trace_ends_it() -> None:
    """Each looked like one more of as many rows as there are lanes, without end."""
    step = lambda h, x: both(torch.tanh(h + x + torch.frombuffer(bytearray(8 * B), dtype=DOUBLE)[:, None]))  # noqa: E731
    assert "test_refused_kinds.py:" in reason(step, *given())
    agrees(step)
