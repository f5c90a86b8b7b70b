"""What the kernel reads, writes and keeps: nothing beyond its tensors, nothing that is the caller's."""

import ctypes
import mmap
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from reference import CELLS, NETS, Case, as_hx, as_tuple, build, case, measure, ours
from torch import Tensor
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

import bptt
from bptt.kernels import cpu

from .forks import PATIENCE, forking

Agree = Callable[..., None]

each_cell = pytest.mark.parametrize("cell", CELLS)
each_way = pytest.mark.parametrize("small", [True, False])

POLICIES = ["full", "chunked:3", "truncated:3/2"]
GUARD = 64
"""Values before and behind a tensor that are nobody's."""


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Leave the products over all steps to the kernel, or to torch, whatever their size."""
    return lambda small: monkeypatch.setattr(cpu, "SMALL", 10**12 if small else 0)


class Guarded:
    """Tensors in the midst of larger buffers of NaN, and whether these have been written to."""

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, int]] = []

    def empty(self, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of NaN between NaN."""
        count = torch.Size(size).numel()
        buffer = torch.full((count + 2 * GUARD,), torch.nan, dtype=dtype)
        self.buffers.append((buffer, count))
        return buffer[GUARD : GUARD + count].view(size)

    def copy(self, z: Tensor) -> Tensor:
        out = self.empty(z.shape, z.dtype)
        out.copy_(z.detach())
        return out

    def check(self) -> None:
        for buffer, count in self.buffers:
            assert buffer[:GUARD].isnan().all()
            assert buffer[GUARD + count :].isnan().all()


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guarded]:
    """Everything the kernel allocates through torch lies between NaN and, where it need not be zero, begins as NaN."""
    guarded, is_float = Guarded(), torch.Tensor.is_floating_point
    empty, zeros = torch.Tensor.new_empty, torch.Tensor.new_zeros

    def new(plain: Any, z: Tensor, *size: Any, **kw: Any) -> Tensor:
        if not is_float(z) or kw:
            return plain(z, *size, **kw)
        flat = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        out = guarded.empty(tuple(flat), z.dtype)
        return out.zero_() if plain is zeros else out

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda z, *size, **kw: new(empty, z, *size, **kw))
    monkeypatch.setattr(torch.Tensor, "new_zeros", lambda z, *size, **kw: new(zeros, z, *size, **kw))
    yield guarded
    guarded.check()


def call(layer: Any, data: Case, tensors: list[Tensor], **kw: Any) -> list[Tensor]:
    """Outputs and gradients of the layer with x, initial states and parameters from a list."""
    names, states = [name for name, _ in layer.named_parameters()], len(data.initial)
    leaves = [z.detach().requires_grad_() for z in tensors]
    x, initial, parameters = leaves[0], leaves[1 : 1 + states], dict(zip(names, leaves[1 + states :], strict=True))
    y, final = functional_call(layer, parameters, (x, as_hx(initial)), kw)
    outputs = [y, *as_tuple(final)]
    return [*outputs, *torch.autograd.grad(outputs, leaves, [data.dy, *data.dfinal])]


@each_cell
@each_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_beyond_the_tensors(
    cell: str, small: bool, dtype: torch.dtype, variant: str, agree: Agree, products: Any, request: Any
) -> None:
    """Inputs and outputs between NaN: the same numbers, and the NaN are still there. What is allocated is filled."""
    products(small)
    for policy in POLICIES:
        for net in ("one", "bi_two"):
            theirs = build(cell, 3, 7, dtype=dtype, **NETS[net])
            data = case(theirs, T=7, B=3)
            layer = ours(theirs, gradient=policy, kernel="cpu")
            tensors = [data.x, *data.initial, *layer.parameters()]
            expected = call(layer, data, tensors)
            guarded = Guarded()
            data.dy, data.dfinal = guarded.copy(data.dy), tuple(guarded.copy(z) for z in data.dfinal)
            agree(call(layer, data, [guarded.copy(z) for z in tensors]), expected, f"{policy} {net}", tolerance=0)
            guarded.check()


FORMS: dict[str, dict[str, Any]] = {
    "whole": {},
    "packed": {"packed": (2, 7, 5)},
    "resets": {"resets": torch.rand(7, 3, generator=torch.Generator().manual_seed(1)) < 0.2},
}


@cache
def by_eager(cell: str, net: str, policy: str, form: str) -> dict[str, Any]:
    """What every instruction set is to give."""
    theirs = build(cell, 3, 7, **NETS[net])
    return measure(ours(theirs, gradient=policy, kernel="eager"), case(theirs, T=7, B=3), **FORMS[form]).values()


@each_cell
@each_way
@pytest.mark.parametrize("memory", ["gates", "states"])
def test_all_that_is_allocated_is_filled(
    cell: str, small: bool, memory: str, variant: str, agree: Agree, products: Any, guarded: Guarded
) -> None:
    """Nothing of what memory held before is left in a result, of whole or of ragged lanes."""
    products(small)
    for policy in POLICIES:
        for net in ("one", "bi_two"):
            theirs = build(cell, 3, 7, **NETS[net])
            data = case(theirs, T=7, B=3)
            for form, kw in FORMS.items():
                actual = measure(ours(theirs, gradient=policy, memory=memory, kernel="cpu"), data, **kw)
                agree(actual.values(), by_eager(cell, net, policy, form), f"{policy} {net} {form}")
    assert guarded.buffers


# At the very end of what may be read


def at_the_end(z: Tensor) -> Tensor:
    """A copy whose last value is the last one of a page, the next page being out of bounds."""
    page, size = mmap.PAGESIZE, z.numel() * z.element_size()
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    assert protect(ctypes.c_void_p(start + pages * page), ctypes.c_size_t(page), 0) == 0
    whole = torch.frombuffer(memory, dtype=z.dtype, count=pages * page // z.element_size())
    out = whole[whole.numel() - z.numel() :].view(z.shape)
    out.copy_(z.detach())
    return out


def all_at_the_end() -> None:
    """Every input at the end of a page, and every tensor the kernel allocates."""
    empty, zeros = torch.Tensor.new_empty, torch.Tensor.new_zeros
    for name, plain in (("new_empty", empty), ("new_zeros", zeros)):

        def new(z: Tensor, *size: Any, plain: Any = plain, **kw: Any) -> Tensor:
            out = plain(z, *size, **kw)
            return at_the_end(out.zero_()) if out.numel() and not kw else out

        setattr(torch.Tensor, name, new)
    for variant in cpu.variants():
        bptt.kernels.KERNELS["cpu"] = cpu.Cpu(variant)
        for cell in CELLS:
            for small in (0, 10**12):
                cpu.SMALL = small
                for dtype, policy in (
                    (torch.float32, "full"),
                    (torch.float64, "chunked:3"),
                    (torch.float32, "truncated:3/2"),
                ):
                    theirs = build(cell, 3, 7, dtype=dtype)
                    layer, data = ours(theirs, gradient=policy, kernel="cpu"), case(theirs, T=7, B=3)
                    data.dy, data.dfinal = at_the_end(data.dy), tuple(map(at_the_end, data.dfinal))
                    call(layer, data, list(map(at_the_end, [data.x, *data.initial, *layer.parameters()])))


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect by ctypes is written for Linux")
def test_nothing_behind_the_end_of_a_page() -> None:
    """In a child, since reading there ends a process."""
    child = multiprocessing.get_context("fork").Process(target=all_at_the_end, daemon=True)
    with forking():
        child.start()
    child.join(2 * PATIENCE)
    assert child.exitcode == 0


# What is the caller's


@each_cell
@each_way
@pytest.mark.parametrize("policy", POLICIES)
def test_inputs_are_left_as_they_are(cell: str, small: bool, policy: str, agree: Agree, products: Any) -> None:
    """Nothing the caller passes is written to, or becomes part of what is returned."""
    products(small)
    theirs = build(cell, 3, 7)
    layer, data = ours(theirs, gradient=policy, kernel="cpu"), case(theirs, T=7, B=3)
    tensors = [data.x, *data.initial, *layer.parameters(), data.dy, *data.dfinal]
    before = [z.detach().clone() for z in tensors]
    results = call(layer, data, tensors[: -1 - len(data.dfinal)])
    agree([z.detach() for z in tensors], before, tolerance=0)
    given = {z.untyped_storage().data_ptr() for z in tensors}
    assert not given & {z.untyped_storage().data_ptr() for z in results}
    with torch.no_grad():
        y, final = layer(data.x, as_hx(data.initial))
    assert not given & {z.untyped_storage().data_ptr() for z in (y, *as_tuple(final))}
    for z in as_tuple(final):
        z.zero_()
    agree([y], [results[0]], tolerance=0)


@each_cell
@each_way
@pytest.mark.parametrize("policy", POLICIES)
def test_twice_gives_the_same_bits(cell: str, small: bool, policy: str, agree: Agree, products: Any) -> None:
    products(small)
    theirs = build(cell, 3, 17, num_layers=2)
    layer, data = ours(theirs, gradient=policy, kernel="cpu"), case(theirs, T=7, B=5)
    x = data.x.clone().requires_grad_()
    y, final = layer(x)
    leaves = [x, *layer.parameters()]
    grads = [
        torch.autograd.grad([y, *as_tuple(final)], leaves, [data.dy, *data.dfinal], retain_graph=True) for _ in range(3)
    ]
    agree(grads[1], grads[0], tolerance=0)
    agree(grads[2], grads[0], tolerance=0)


@each_cell
@each_way
@pytest.mark.parametrize("policy", ["full", "truncated:3/2"])
def test_only_some_gradients(cell: str, small: bool, policy: str, agree: Agree, products: Any) -> None:
    """Each input alone, x with another, all but one: the numbers do not depend on what else is asked for."""
    products(small)
    theirs = build(cell, 3, 7)
    layer, data = ours(theirs, gradient=policy, kernel="cpu"), case(theirs, T=7, B=3)
    tensors, states = [data.x, *data.initial, *layer.parameters()], len(data.initial)
    names = [name for name, _ in layer.named_parameters()]
    everything = call(layer, data, tensors)[1 + states :]
    count = len(tensors)
    for asked in [
        *({i} for i in range(count)),
        *({0, i} for i in range(1, count)),
        *(set(range(count)) - {i} for i in range(count)),
    ]:
        leaves = [z.detach().clone().requires_grad_(i in asked) for i, z in enumerate(tensors)]
        parameters = dict(zip(names, leaves[1 + states :], strict=True))
        y, final = functional_call(layer, parameters, (leaves[0], as_hx(leaves[1 : 1 + states])))
        torch.autograd.backward([y, *as_tuple(final)], [data.dy, *data.dfinal])
        for i, (leaf, expected) in enumerate(zip(leaves, everything, strict=True)):
            agree(leaf.grad, expected if i in asked else None, f"{i} of {asked}")


@each_cell
@pytest.mark.parametrize("policy", [*POLICIES, "truncated:2", "randomized:0.5"])
def test_no_lanes(cell: str, policy: str) -> None:
    """An empty batch has gradients, all zero."""
    theirs = build(cell, 3, 7, num_layers=2)
    layer, data = ours(theirs, gradient=policy, kernel="cpu"), case(theirs, T=4, B=0)
    for _ in range(3):  # whatever memory held before
        found = measure(layer, data)
        assert found.y.shape == (4, 0, layer.proj_size or 7)
        for name, g in found.parameters.items():
            torch.testing.assert_close(g, torch.zeros_like(layer.get_parameter(name)), rtol=0, atol=0)
    grads = bptt.gradients(layer, data.x, data.dy)
    assert all((g == 0).all() for g in grads.parameters.values())


@pytest.mark.parametrize("cell", CELLS)
def test_one_step(cell: str, variant: str, agree: Agree) -> None:
    theirs = build(cell, 3, 17)
    data = case(theirs, T=1, B=5)
    for policy in ("full", "chunked:1", "truncated:1", "truncated:4/2"):
        expected = measure(theirs, data)
        agree(measure(ours(theirs, gradient=policy, kernel="cpu"), data).values(), expected.values(), policy)


# Long sequences


class Largest(TorchDispatchMode):
    """The largest tensor any operation has returned, in values."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for z in out if isinstance(out, tuple | list) else [out]:
            if isinstance(z, Tensor):
                self.values = max(self.values, z.untyped_storage().nbytes() // z.element_size())
        return out


@each_cell
def test_a_long_sequence_of_overlapping_windows(cell: str, agree: Agree) -> None:
    """Every step's window at once, without a tensor that holds them all."""
    T, B, H = 3000, 2, 9
    theirs = build(cell, 3, H)
    layer, data = ours(theirs, gradient="truncated:5", kernel="cpu"), case(theirs, T, B)
    y, final = layer(data.x, as_hx(data.initial))
    with Largest() as largest:
        grads = torch.autograd.grad([y, *as_tuple(final)], list(layer.parameters()), [data.dy, *data.dfinal])
    assert largest.values <= 4 * (T + 1) * B * H
    layer.kernel = "eager"
    agree(dict(zip(theirs.state_dict(), grads, strict=True)), measure(layer, data).parameters)
