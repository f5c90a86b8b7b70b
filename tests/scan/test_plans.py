"""What compiled steps keep from call to call, and what may change between two: weights, flags, sizes, threads."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _python_dispatch
from torch.utils._pytree import tree_leaves

import bptt
from bptt.scan import compiled, pytrees

T, B, H = 12, 3, 5
DOUBLE = torch.float64
Result = tuple[Tensor, ...]


@pytest.fixture(autouse=True)
def no_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps here have one code, of which few traces are kept."""
    monkeypatch.setattr(compiled, "_KEPT", type(compiled._KEPT)(compiled.MOST))


def cell_step() -> tuple[torch.nn.Module, Callable[[Any, Tensor], Any]]:
    torch.manual_seed(4)
    cell = torch.nn.LSTMCell(H, H, dtype=DOUBLE)

    def step(state: tuple[Tensor, Tensor], x: Tensor) -> Any:
        state = cell(x, state)
        return state, (state[0], state[1].sin())

    return cell, step


def inputs(T: int = T, B: int = B, seed: int = 0) -> tuple[tuple[Tensor, Tensor], Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    state = tuple(torch.randn(B, H, dtype=DOUBLE, generator=drawn).requires_grad_() for _ in range(2))
    return state, torch.randn(T, B, H, dtype=DOUBLE, generator=drawn).requires_grad_()  # type: ignore[return-value]


def results(
    step: Any, carry: Any, xs: Tensor, parameters: Any, kernel: str, gradient: str = "full", **more: Any
) -> Result:
    """The outputs, and the gradients of carry, xs and parameters."""
    outputs = tree_leaves(bptt.scan(step, carry, xs, gradient=gradient, kernel=kernel, **more))
    wanted = [t for t in (*tree_leaves(carry), xs, *parameters) if t.requires_grad]
    return (*outputs, *torch.autograd.grad(sum(t.square().sum() for t in outputs), wanted))


def agree_with_replay(step: Any, carry: Any, xs: Tensor, parameters: Any, **settings: Any) -> Result:
    parameters = list(parameters)
    found = results(step, carry, xs, parameters, "interpreter", **settings)
    expected = results(step, carry, xs, parameters, "replay", **settings)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    return found


CHANGES: dict[str, Callable[[torch.nn.Module], object]] = {
    "an optimiser's step": lambda cell: torch.optim.SGD(cell.parameters(), 0.5).step(),
    "load_state_dict": lambda cell: cell.load_state_dict({k: v * 1.5 for k, v in cell.state_dict().items()}),
    "a write to .data": lambda cell: [p.data.mul_(1.5) for p in cell.parameters()],
    "another .data": lambda cell: [setattr(p, "data", p.data * 1.5) for p in cell.parameters()],
    "a write without grad": lambda cell: torch.nn.init.normal_(next(cell.parameters())),
    "other strides": lambda cell: [setattr(p, "data", p.data.t().contiguous().t()) for p in cell.parameters()],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("gradient", ["full", "truncated:5/2"])
def test_weights_that_change(change: str, gradient: str) -> None:
    cell, step = cell_step()
    carry, xs = inputs()
    before = agree_with_replay(step, carry, xs, cell.parameters(), gradient=gradient)
    for p in cell.parameters():
        p.grad = torch.ones_like(p)
    CHANGES[change](cell)
    after = agree_with_replay(step, carry, xs, cell.parameters(), gradient=gradient)
    assert change == "other strides" or not torch.equal(before[0], after[0])


def test_flags_that_change() -> None:
    cell, step = cell_step()
    carry, xs = inputs()
    for frozen in ((), (0,), (1, 3), (0, 1, 2, 3), ()):
        for i, p in enumerate(cell.parameters()):
            p.requires_grad_(i not in frozen)
        agree_with_replay(step, carry, xs, cell.parameters())
    for of_carry, of_x in ((False, True), (True, False), (False, False), (True, True)):
        carry[1].requires_grad_(of_carry)
        xs.requires_grad_(of_x)
        agree_with_replay(step, carry, xs, cell.parameters())


def test_sizes_policies_and_memories_by_turns() -> None:
    cell, step = cell_step()
    for _ in range(2):
        for steps, lanes in ((T, B), (9, B), (T, 1), (30, 40), (T, B)):
            carry, xs = inputs(steps, lanes)
            for gradient in ("full", "chunked:4", "truncated:5/2"):
                for memory in ("auto", "states", "checkpoints:steps=4"):
                    agree_with_replay(step, carry, xs, cell.parameters(), gradient=gradient, memory=memory)
    entries = [entry for of_kind in compiled._KEPT._all(step).values() for entry in of_kind]
    assert entries
    assert all(0 < len(entry.plans) <= compiled.MOST_PLANS for entry in entries)


def test_inputs_in_any_memory() -> None:
    cell, step = cell_step()
    carry, xs = inputs()
    flipped = tuple(c.detach().t().contiguous().t().requires_grad_() for c in carry)
    agree_with_replay(step, flipped, xs, cell.parameters())
    turned = xs.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    agree_with_replay(step, carry, turned, cell.parameters())
    spread = torch.randn(2 * T, B, 2 * H, dtype=DOUBLE)[::2, :, ::2].requires_grad_()
    agree_with_replay(step, carry, spread, cell.parameters())
    expanded = torch.randn(1, 1, H, dtype=DOUBLE).requires_grad_()
    agree_with_replay(step, carry, expanded.expand(T, B, H), cell.parameters())


@pytest.mark.parametrize("kernel", ["interpreter", "eager"])
def test_outputs_may_be_written_to(kernel: str) -> None:
    """In place before the backward pass and before a second one, whose graph is compared with the outputs."""
    cell, step = cell_step()
    carry, xs = inputs()
    grads = []
    for writes in (False, True):
        final, ys = bptt.scan(step, carry, xs, kernel=kernel)
        loss = sum(t.square().sum() for t in tree_leaves((final, ys)))
        first = torch.autograd.grad(loss, [*cell.parameters(), xs], create_graph=True)
        again = torch.autograd.grad(sum(g.square().sum() for g in first), xs, retain_graph=True)
        final, ys = bptt.scan(step, carry, xs, kernel=kernel)
        copies = [t.clone() for t in tree_leaves((final, ys))]
        if writes:
            for t in tree_leaves((final, ys)):
                t.detach().zero_()
        plain = torch.autograd.grad(sum(t.square().sum() for t in copies), [*cell.parameters(), xs])
        grads.append((*first, *again, *plain))
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


def test_gradients_lie_apart() -> None:
    """One that is written to does not change another, though both have the same values."""
    a, b = (torch.zeros(T, B, H, dtype=DOUBLE, requires_grad=True) for _ in range(2))
    w, v = (torch.zeros(H, dtype=DOUBLE, requires_grad=True) for _ in range(2))

    def step(h: Tensor, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h = torch.tanh(0.5 * h + x[0] + x[1] + w + v)
        return h, h

    bptt.scan(step, torch.ones(B, H, dtype=DOUBLE), (a, b), kernel="interpreter")[1].sum().backward()
    grads = [t.grad for t in (a, b, w, v)]
    before = [g.clone() for g in grads if g is not None]
    for i, g in enumerate(grads):
        assert g is not None
        g.mul_(3)
        for j, (other, was) in enumerate(zip(grads, before, strict=True)):
            assert j <= i or torch.equal(other, was)  # type: ignore[arg-type]


def test_threads_at_once() -> None:
    """The same step forward and back from several threads, of calls of unlike sizes."""
    cell, step = cell_step()
    sizes = [(T, B), (20, 2), (T, 1), (33, 4)]
    problems = [inputs(*size, seed=i) for i, size in enumerate(sizes)]
    expected = [results(step, carry, xs, cell.parameters(), "replay") for carry, xs in problems]
    faults: list[BaseException] = []

    def work(i: int) -> None:
        try:
            for n in range(12):
                k = (i + n) % len(sizes)
                found = results(step, *problems[k], cell.parameters(), "interpreter")
                torch.testing.assert_close(found, expected[k], rtol=1e-9, atol=1e-9)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    # Each trace has a mode of its own, and torch's flags are those of all threads: none is left behind.
    assert not _python_dispatch.is_in_torch_dispatch_mode()


@pytest.mark.parametrize("gradient", ["full", "truncated:5/2"])
def test_a_plan_keeps_no_tensor_of_a_call(gradient: str) -> None:
    cell, step = cell_step()
    for _ in range(2):
        carry, xs = inputs()
        storages = [weakref.ref(t.untyped_storage()) for t in (xs, *carry)]
        found = results(step, carry, xs, cell.parameters(), "interpreter", gradient)
        kept = [weakref.ref(t) for t in (xs, *carry, *found)]
        del carry, xs, found
        gc.collect()
        assert not [r for r in kept if r() is not None]
        assert not [r for r in storages if r() is not None]


def test_forms_of_pytrees() -> None:
    """A form that is known is that which torch's pytrees give, with the tensors in the same order."""
    a, b, c = torch.zeros(1), torch.ones(2), torch.ones(3)
    trees = [a, (a, b), [a, (b,)], {"z": a, "a": [b, None]}, {"a": b, "z": a}, (a, None), (), (a, 1), [(), {"k": c}]]
    for tree in trees * 2:
        tensors, form = pytrees.split_known(tree)
        expected, other = pytrees.split(tree)
        assert [id(t) for t in tensors] == [id(t) for t in expected]
        assert form == other
        assert hash(form) == hash(other)
    assert pytrees.split_known((a, b))[1] is pytrees.split_known((c, a))[1]


@pytest.mark.parametrize("kernel", ["interpreter", "eager"])
def test_a_backward_pass_inside_autocast(kernel: str) -> None:
    """It has the precision that the forward pass had, which was outside."""
    cell, xs = torch.nn.GRUCell(H, H), torch.randn(T, B, H)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = cell(x, h)
        return h, h

    def gradients(inside: bool) -> Result:
        y = bptt.scan(step, torch.zeros(B, H), xs, gradient="truncated:5/2", kernel=kernel)[1]
        with torch.autocast("cpu", enabled=inside):
            return torch.autograd.grad(y, list(cell.parameters()), torch.ones_like(y))

    torch.testing.assert_close(gradients(True), gradients(False), rtol=0, atol=0)
