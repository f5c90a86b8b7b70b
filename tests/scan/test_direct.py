"""The short way of a known call: the bits of the general way, and the same eyes for what changes between calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from steps_by_loop import STEPS
from torch import Tensor, nn

from bptt import scan

from .ways import Results, Ways, gradients

T, B, H = 12, 2, 5

POLICIES = "full", "chunked:5", "truncated:6/3", "truncated:4"


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Ways:
    return Ways(monkeypatch)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", STEPS)
def test_bits(name: str, policy: str, ways: Ways) -> None:
    torch.manual_seed(0)
    made = STEPS[name](T, B)

    def step(carry: Any, x: Any) -> Any:
        new, ys = made.step(list(carry), list(x))
        return tuple(new), tuple(ys)

    def call(inputs: Sequence[Tensor]) -> Results:
        carry, ys = scan(step, tuple(made.carry), tuple(made.xs), gradient=policy)
        return gradients([*carry, *ys], inputs)

    everything = [t for t in (*made.carry, *made.xs, *made.captured) if t.requires_grad]
    for _ in range(5):
        call(everything)
    if not ways.taken[-1]:
        pytest.skip("a kind of step that has no short way")
    ways.both(lambda: call(everything))
    ways.both(lambda: call(everything[-1:]))
    with torch.no_grad():
        ways.both(lambda: [y for part in scan(step, tuple(made.carry), tuple(made.xs), gradient=policy) for y in part])


def test_a_gate_of_x_on_what_is_read_out(ways: Ways) -> None:
    """Its way back to x is a product of what arrives at y alone: made before the walk, and needed after it only."""
    torch.manual_seed(0)
    w, gate = nn.Linear(H, H).double(), nn.Linear(H, H).double()

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        z = w(x)
        h = torch.sigmoid(z) * h + torch.tanh(z)
        return h, torch.sigmoid(gate(x)) * h

    h = torch.randn(B, H, dtype=torch.float64, requires_grad=True)
    xs = torch.randn(T, B, H, dtype=torch.float64, requires_grad=True)

    def call() -> Results:
        return gradients(scan(step, h, xs), [h, xs, *w.parameters(), *gate.parameters()])

    ways.both(call)


def _net() -> tuple[nn.Linear, dict[str, Any], Tensor, Tensor, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    cell, settings = nn.Linear(2 * H, H, dtype=torch.float64), {"scale": 0.5}
    x, h = torch.randn(T, B, H, dtype=torch.float64), torch.randn(B, H, dtype=torch.float64)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        new = torch.tanh(cell(torch.cat([h, x], 1))) * settings["scale"]
        if cell.training:
            new = new + 0.1
        return new, new

    return cell, settings, x, h, step


def _by_loop(step: Any, h: Tensor, x: Tensor, inputs: Sequence[Tensor]) -> Results:
    ys = []
    for x_t in x:
        h, y = step(h, x_t)
        ys.append(y)
    return gradients([h, torch.stack(ys)], inputs)


def _replaced(cell: nn.Linear) -> None:
    cell.weight = nn.Parameter(cell.weight.detach() + 1)


def _other_values(cell: nn.Linear) -> None:
    with torch.no_grad():
        cell.weight.mul_(1.5)


CHANGES: dict[str, Callable[[nn.Linear, dict[str, Any]], object]] = {
    "values": lambda cell, settings: _other_values(cell),
    "data": lambda cell, settings: setattr(cell.weight, "data", cell.weight.data * 2),
    "another parameter": lambda cell, settings: _replaced(cell),
    "no gradient": lambda cell, settings: cell.bias.requires_grad_(False),
    "eval": lambda cell, settings: cell.eval(),
    "a setting": lambda cell, settings: settings.update(scale=0.25),
    "a hook": lambda cell, settings: cell.register_forward_hook(lambda m, i, o: o * 2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_noticed(change: str, ways: Ways) -> None:
    cell, settings, x, h, step = _net()

    def compare() -> None:
        inputs = [p for p in cell.parameters() if p.requires_grad]
        final, ys = scan(step, h, x)
        got, expected = gradients([final, ys], inputs), _by_loop(step, h, x, inputs)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)

    for _ in range(5):
        compare()
    assert ways.taken[-1]
    CHANGES[change](cell, settings)
    for _ in range(5):
        compare()


def test_another_dtype_or_number_of_lanes_is_another_call(ways: Ways) -> None:
    cell, _, x, h, step = _net()
    for _ in range(5):
        scan(step, h, x)
    assert ways.taken[-1]
    wide = scan(step, torch.cat([h, h]), torch.cat([x, x], 1))[1]
    torch.testing.assert_close(wide[:, :B], wide[:, B:], rtol=0, atol=0)
    cell.float()
    assert scan(step, h.float(), x.float())[1].dtype == torch.float32


def test_partial_needs_and_missing_cotangents(ways: Ways) -> None:
    cell, _, x, h, step = _net()
    x.requires_grad_()
    h.requires_grad_()

    def call(inputs: list[Tensor], from_ys: bool) -> Results:
        final, ys = scan(step, h, x, gradient="chunked:5")
        return [*torch.autograd.grad((ys if from_ys else final).sum(), inputs, allow_unused=True)]

    for inputs in ([x], [h], [cell.weight], [cell.bias, h]):
        for from_ys in (True, False):
            ways.both(lambda inputs=inputs, from_ys=from_ys: call(inputs, from_ys))  # type: ignore[misc]


@pytest.mark.parametrize("short", [True, False])
def test_gradients_that_add_up_in_place(short: bool, ways: Ways) -> None:
    """Two inputs whose gradients are one value have a tensor each, to which autograd adds the next one."""
    cell = nn.LSTMCell(H, H, dtype=torch.float64)
    x, z = (torch.randn(T, B, H, dtype=torch.float64, requires_grad=True) for _ in range(2))
    h = torch.zeros(B, H, dtype=torch.float64)

    def step(state: tuple[Tensor, Tensor], x: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor, Tensor], Tensor]:
        h, c = cell(x[0] + x[1], state)
        return (h, c), h

    ways.short = short
    first: list[Tensor] = []
    for n in range(1, 8):
        scan(step, (h, h), (x, z))[1].sum().backward()
        whole = [t.grad for t in (x, z, *cell.parameters()) if t.grad is not None]
        first = first or [g.clone() for g in whole]
        torch.testing.assert_close(whole, [n * g for g in first], rtol=1e-9, atol=1e-12)
    assert ways.taken[-1] is short


def test_derivatives_again(ways: Ways) -> None:
    cell, _, x, h, step = _net()
    x.requires_grad_()

    def call() -> Results:
        final, ys = scan(step, h, x)
        (dx,) = torch.autograd.grad(ys.sum() + final.sin().sum(), [x], create_graph=True)
        return [dx, *torch.autograd.grad((dx**2).sum(), [x, cell.weight])]

    ways.both(call)
    loop = x.detach().requires_grad_()
    final, outputs = h, []
    for x_t in loop:
        final, y = step(final, x_t)
        outputs.append(y)
    (dx,) = torch.autograd.grad(torch.stack(outputs).sum() + final.sin().sum(), [loop], create_graph=True)
    expected = [dx, *torch.autograd.grad((dx**2).sum(), [loop, cell.weight])]
    torch.testing.assert_close(call(), expected, rtol=1e-9, atol=1e-9)


def test_the_graph_is_kept_or_freed(ways: Ways) -> None:
    cell, _, x, h, step = _net()
    for _ in range(5):
        _, ys = scan(step, h, x)
    assert ways.taken[-1]
    first = torch.autograd.grad(ys.sum(), [cell.weight], retain_graph=True)
    assert torch.equal(*first, *torch.autograd.grad(ys.sum(), [cell.weight]))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(ys.sum(), [cell.weight])


def test_changes_between_forward_and_backward(ways: Ways) -> None:
    cell, _, x, h, step = _net()

    def call(change: Callable[[Tensor, Tensor], object]) -> Results:
        final, ys = scan(step, h, x)
        loss = (ys**2).sum() + final.sum()
        change(final, ys)
        return [*torch.autograd.grad(loss, [cell.weight])]

    ways.both(lambda: call(lambda final, ys: None))
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        call(lambda final, ys: ys.mul_(2))  # saved by the square
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        call(lambda final, ys: x.mul_(2))

    def written() -> Results:
        final, ys = scan(step, h, x)
        ys.mul_(3)
        final.add_(1)
        return [ys, final, *torch.autograd.grad(ys.sum() + final.sum(), [cell.weight])]

    ways.both(written)


def turned(x: Tensor) -> Tensor:
    """The same values, in memory in another order."""
    return x.mT.contiguous().mT if x.dim() > 1 else x


def test_hooks_and_modes(ways: Ways) -> None:
    cell, _, x, h, step = _net()
    seen: list[Tensor] = []

    def call() -> Results:
        final, ys = scan(step, h, x)
        ys.register_hook(lambda g: seen.append(g) or g * 2)  # type: ignore[func-returns-value]
        return [*torch.autograd.grad(ys.sum() + final.sum(), [cell.weight])]

    ways.both(call)
    assert seen
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.clone(), lambda t: t.mT.contiguous().mT if t.dim() > 1 else t
    ):
        ways.both(call)
    with torch.autograd.graph.save_on_cpu():
        ways.both(call)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scan(step, h, x)
        assert not ways.taken[-1]
    with torch.inference_mode():
        assert scan(step, h, x)[1].is_inference()
    with torch.profiler.profile() as profile:
        scan(step, h, x)
    assert "bptt::scan_forward" in {event.key for event in profile.key_averages()}


def test_dense_on_purpose(ways: Ways) -> None:
    cell, _, x, h, step = _net()
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    for _ in range(5):
        expected = scan(step, h, x)[1]
    assert torch.equal(scan(step, h, turned)[1], expected)
    assert not ways.taken[-1]
    assert torch.equal(scan(step, h, x)[1], expected)
    assert ways.taken[-1] or ways.taken[-3]
    assert cell.weight.grad is None


def test_without_xs(ways: Ways) -> None:
    w = torch.randn(H, H, dtype=torch.float64, requires_grad=True)
    h = torch.randn(B, H, dtype=torch.float64)

    def step(h: Tensor, _: None) -> tuple[Tensor, Tensor]:
        new = torch.tanh(h @ w)
        return new, new

    ways.both(lambda: gradients(scan(step, h, length=T), [w]))
    scan(step, h, length=T + 1)
    assert not ways.taken[-1]


def test_the_definition() -> None:
    """The short way's gradients are those of a loop for each block."""
    torch.manual_seed(0)
    made = STEPS["lstm"](T, B)

    def step(carry: Any, x: Any) -> Any:
        new, ys = made.step(list(carry), list(x))
        return tuple(new), tuple(ys)

    for _ in range(4):
        carry, ys = scan(step, tuple(made.carry), tuple(made.xs))
    state, outputs = list(made.carry), []
    for t in range(T):
        state, y = made.step(state, [x[t] for x in made.xs])
        outputs.append(y)
    whole = [torch.stack(parts) for parts in zip(*outputs, strict=True)]
    inputs = [*made.carry, *made.xs, *made.captured]
    torch.testing.assert_close(
        gradients([*carry, *ys], inputs), gradients([*state, *whole], inputs), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("policy", ["full", "truncated:6/3"])
def test_carries_alone(policy: str, ways: Ways) -> None:
    """memory="states" keeps nothing of a small call, walks forward again, and has the bits of a tape; twice, too."""
    torch.manual_seed(0)
    w = nn.Linear(H, 2 * H).double()
    x, h_0 = torch.randn(T, B, H, dtype=torch.float64, requires_grad=True), torch.randn(B, H, dtype=torch.float64)
    inputs = [x, *w.parameters()]

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        z, c = w(h + x).chunk(2, dim=-1)
        h = torch.sigmoid(z) * h + torch.tanh(c)
        return h, h * x

    def call(memory: str) -> tuple[Results, int]:
        h, y = scan(step, h_0, x, gradient=policy, memory=memory)
        kept = sum(t.numel() for t in y.grad_fn.saved_tensors)  # type: ignore[union-attr]  # of an operation of Python
        loss = (y * y).sum() + h.sum()
        first = torch.autograd.grad(loss, inputs, retain_graph=True)
        return [y, h, *first, *torch.autograd.grad(loss, inputs)], kept

    for _ in range(5):
        expected, tape = call("auto")
    for _ in range(5):
        got, kept = call("states")
    assert ways.taken[-1]
    assert ways.taken[4]
    assert kept + T * B * H <= tape
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
