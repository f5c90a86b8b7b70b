"""A step that is made again at each call, of the same code: which tensors take the places of the captured ones."""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from bptt.steps.guard import Guard
from bptt.steps.rebinding import without_history

from .guards import WHEN, guarded


def identities(tensors: tuple[Tensor, ...] | str) -> list[int]:
    assert not isinstance(tensors, str), tensors
    return [id(t) for t in tensors]


def test_a_lambda_made_again() -> None:
    cell, rate = nn.LSTMCell(2, 3), 0.5

    def made(rate: float) -> Any:
        return lambda h, x: (cell(x, h)[0] * rate, x)

    weights = tuple(cell.parameters())
    guard = guarded(made(rate), *weights)
    again = guard.captured_by(made(0.5))
    assert identities(again) == identities(weights)
    assert guard.captured_by(made(0.25)) == f"`rate` is 0.25, and was 0.5{WHEN}"
    assert guard.captured_by(lambda h, x: (cell(x, h)[0] * rate, x)) == f"`step.__code__` is another code than{WHEN}"


def test_a_method_fetched_again() -> None:
    class Net(nn.Linear):
        def step(self, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return h + self(x), h

    net, other = Net(2, 2), Net(2, 2)
    guard = guarded(net.step, *net.parameters())
    assert identities(guard.captured_by(net.step)) == identities(tuple(net.parameters()))
    assert guard.captured_by(other.step) == f"`step.__self__` is another Net than{WHEN}"


def test_other_tensors_in_the_closure_its_functions_lists_and_defaults() -> None:
    def made(encoded: Tensor, bias: Tensor, gains: list[Tensor], default: Tensor) -> Any:
        def attend(h: Tensor) -> Tensor:
            return h @ encoded

        def step(h: Tensor, x: Tensor, d: Tensor = default) -> tuple[Tensor, Tensor]:
            return attend(h) * gains[0] + bias + d, x

        return functools.partial(step)

    first = [torch.randn(3, 3), torch.randn(3), torch.randn(3), torch.randn(3)]
    other = [torch.randn(3, 3), torch.randn(3), torch.randn(3), torch.randn(3)]
    guard = guarded(made(first[0], first[1], [first[2]], first[3]), *first)
    found = guard.captured_by(made(other[0], other[1], [other[2]], other[3]))
    assert identities(found) == identities(tuple(other))
    found = guard.captured_by(made(other[0], torch.randn(4), [other[2]], other[3]))
    assert found == f"`bias.shape` is (4,), and was (3,){WHEN}"
    found = guard.captured_by(made(other[0], first[1], [first[2]], first[3].requires_grad_(False).clone().double()))
    assert found == f"`step.func.__defaults__[0].dtype` is torch.float64, and was torch.float32{WHEN}"
    assert (
        guard.captured_by(made(other[0], first[1], [first[2], first[3]], first[3]))
        == f"`gains` is another list than{WHEN}"
    )


def test_one_tensor_in_two_places() -> None:
    net = nn.Linear(2, 2)

    def made(w: Tensor, v: Tensor) -> Any:
        return lambda h, x: (h @ w + h @ v + net(x), x)

    a, b, c = net.weight, torch.randn(2, 2), torch.randn(2, 2)
    guard = guarded(made(b, b), b, *net.parameters())
    assert identities(guard.captured_by(made(c, c))) == identities((c, *net.parameters()))
    found = guard.captured_by(made(b, c))
    assert found == "`w` and another variable were one tensor when the step was traced, and are two"
    guard = guarded(made(a, b), b, *net.parameters())
    found = guard.captured_by(made(nn.Parameter(torch.randn(2, 2)), b))
    assert isinstance(found, str)
    assert found.startswith("`step` has another tensor in one place, and the one it had")
    assert identities(guard.captured_by(made(a, c))) == identities((c, *net.parameters()))


def test_the_guard_holds_for_the_step_made_again() -> None:
    cell = nn.LSTMCell(2, 3)

    def made() -> Any:
        return lambda h, x: (cell(x, h), x)

    guard = Guard.of(made(), tuple(cell.parameters()))
    assert not isinstance(guard.captured_by(made()), str)
    cell.eval()
    assert guard.changed() == f"`cell.training` is False, and was True{WHEN}"


def test_a_function_that_calls_itself() -> None:
    def made(depth: int) -> Any:
        def power(h: Tensor, n: int) -> Tensor:
            return h if n == 0 else power(h * h, n - 1)

        return lambda h, x: (power(h, depth), x)

    guard = guarded(made(2))
    assert guard.captured_by(made(2)) == ()
    assert guard.captured_by(made(3)) == f"`depth` is 3, and was 2{WHEN}"


def test_a_step_that_leads_back_to_itself_is_remembered_as_it_is() -> None:
    """By a list of what holds it, or through many functions; and each function of a net of them is looked at once."""
    computed = torch.ones(2, requires_grad=True) * 2
    held: list[Any] = [computed]

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return h * held[0], x

    held.append(step)
    assert without_history(step) == (step, {})

    def wrapped(inner: Any) -> Any:
        return lambda h: inner(h)

    deep = chain = lambda h: h * computed
    for _ in range(300):
        deep = wrapped(deep)
    assert without_history(deep) == (deep, {})
    net = chain
    for _ in range(40):
        net = (lambda one, other: lambda h: one(h) + other(h))(net, net)
    copy, stand_ins = without_history(net)
    assert copy is not net
    assert [t.grad_fn for t in stand_ins.values()] == [None]


def test_what_lies_deep_is_compared_too() -> None:
    def made(inner: Any) -> Any:
        kept: list[Any] = [inner]
        for _ in range(3000):
            kept = [kept]
        nested = (inner,)
        for _ in range(3000):
            nested = (nested,)  # type: ignore[assignment]
        return lambda h, x: (h * len(kept) * len(nested), x)

    guard = Guard.of(made(0.5), [])
    assert guard.captured_by(made(0.5)) == ()
    difference = guard.captured_by(made(0.25))
    assert isinstance(difference, str)
    assert difference.endswith(f"[0][0]` is 0.25, and was 0.5{WHEN}")
