"""Calls that are recorded while they run: the same numbers as where steps are run again, and the same errors."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import Fixed
from torch import Tensor, nn

from bptt import Chunked, Full, Randomized, Truncated, scan
from bptt.policies import Policy
from bptt.scan import recorded

from .loops import (
    COUPLED,
    DOUBLE,
    RESETS,
    STEPS,
    Agree,
    B,
    Case,
    FixedTruncated,
    H,
    Step,
    T,
    X,
    factors,
    floats,
    loop,
    random,
    weighed,
)

OUTSIDE = "what a step hands to the next must be in the carry"
POLICIES = {
    "full": Full(),
    "chunked": Chunked(3),
    "chunked_one": Chunked(1),
    "randomized": Randomized(0.6),
    "fixed": Fixed(factors(B)),
}


class Counted:
    """A step that counts its calls."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.calls = 0

    def __call__(self, carry: Any, x: Any) -> tuple[Any, Any]:
        self.calls += 1
        return self.step(carry, x)


def dropout() -> Case:
    step, carry, xs, captured = STEPS["rnn"]()
    return (lambda h, x: step(torch.dropout(h, 0.5, True), x)), carry, xs, captured


def computed(case: Case, policy: Policy, memory: str, **kw: Any) -> tuple[list[Tensor], int, int]:
    """Values and gradients; how often the step was called in forward, and in backward."""
    step, carry, xs, captured = case
    counted = Counted(step)
    torch.manual_seed(8)
    final, ys = scan(counted, carry, xs, gradient=policy, memory=memory, **kw)
    forward, inputs = counted.calls, [*floats(carry), *floats(xs), *captured]
    values = floats((final, ys))
    grads = torch.autograd.grad(weighed(values, 0), inputs, materialize_grads=True, retain_graph=True)
    return [*values, *grads], forward, counted.calls - forward


@pytest.mark.parametrize("name", [*STEPS, "dropout"])
@pytest.mark.parametrize("resets", [None, RESETS], ids=["", "resets"])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_recorded_and_run_again_give_the_same(name: str, policy: Policy, resets: Tensor | None) -> None:
    """Values bit by bit; gradients but for the order in which the terms of a sum are added."""
    case = dropout() if name == "dropout" else STEPS[name]()
    if name == "rowless":
        resets = None if resets is None else resets[:, 0]
        policy = Fixed(factors(1)) if isinstance(policy, Fixed) else policy
    got, forward, backward = computed(case, policy, "auto", resets=resets, rows="coupled")
    want, _, again = computed(case, policy, "states", resets=resets, rows="coupled")
    assert (forward, backward, again) == (T + 1, 1, T)
    values = len(got) - len([*floats(case[1]), *floats(case[2]), *case[3]])
    torch.testing.assert_close(got[:values], want[:values], rtol=0, atol=0)
    torch.testing.assert_close(got[values:], want[values:], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("policy", [Full(), Chunked(3)], ids=str)
def test_captured_tensors_of_one_step_in_the_middle(policy: Policy, agree: Agree) -> None:
    """Only the first step and the last two are monitored."""
    w, made = random(H), random(H)
    twice = 2 * made

    def step(carry: tuple[Tensor, int], x: Tensor) -> tuple[tuple[Tensor, int], Tensor]:
        h, t = carry
        h = torch.tanh(h * w * twice + x) if t == 3 else torch.tanh(h + x)
        return (h, t + 1), h

    case = step, (random(B, H), 0), random(T, B, H), [w, made]
    got, *_ = computed(case, policy, "auto")
    values = len(got) - 4
    torch.manual_seed(8)
    final, ys = loop(step, case[1], case[2], T)
    agree(got[:values], [final[0], torch.stack(ys)])
    want, *_ = computed(case, policy, "states")
    agree(got, want)


# State that is passed on in secret, from a later step on


def from_step(start: int, keep: Callable[[Tensor], Any]) -> Step:
    held: dict[str, Any] = {"mem": torch.zeros(B, H, dtype=DOUBLE)}
    w = random(H)

    def step(carry: tuple[Tensor, int], x: Tensor) -> tuple[tuple[Tensor, int], Tensor]:
        h, t = carry
        h = torch.tanh(h * w + x + 0.1 * held["mem"])
        if t >= start:
            held["mem"] = keep(h)
        return (h, t + 1), h * 1

    return step


KEPT: dict[str, Callable[[Tensor], Any]] = {
    "itself": lambda h: h,
    "made_of_it": lambda h: h * h,
    "detached": lambda h: (h * h).detach(),
    "without_gradient": lambda h: (h > 0).sum(),
}


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("start", [0, 1, 2, 4, T - 2])
@pytest.mark.parametrize("policy", [Full(), Chunked(3)], ids=str)
def test_state_outside_of_the_carry_from_a_later_step_on(policy: Policy, start: int, name: str) -> None:
    with pytest.raises(RuntimeError, match=OUTSIDE):
        scan(from_step(start, KEPT[name]), (random(B, H), 0), random(T, B, H), gradient=policy)


def test_a_buffer_that_is_written_to_from_a_later_step_on() -> None:
    total = torch.zeros(H, dtype=DOUBLE)

    def step(carry: tuple[Tensor, int], x: Tensor) -> tuple[tuple[Tensor, int], Tensor]:
        h, t = carry
        h = torch.tanh(h - total + x)
        if t > 2:
            total.add_(h.detach().mean(0))
        return (h, t + 1), h

    with pytest.raises(RuntimeError, match=rf"come from total, .*{OUTSIDE}"):
        scan(step, (random(B, H), 0), random(T, B, H))


@pytest.mark.parametrize("at", range(1, T - 2))
def test_state_between_two_steps_in_the_middle_has_the_gradient_of_a_loop(at: int, agree: Agree) -> None:
    """It is not found; nor is it lost, since the graph of all steps is one."""
    step, carry, xs, (w,) = STEPS["rnn"]()[0], (random(B, H), 0), random(T, B, X), (random(H),)
    held: list[Tensor] = []

    def secret(carry: tuple[Tensor, int], x: Tensor) -> tuple[tuple[Tensor, int], Tensor]:
        h, t = carry
        h, _ = step(h * w, x)
        if held:
            h = h * held.pop()
        if t == at:
            held.append(h.sin())
        return (h, t + 1), h

    case = secret, carry, xs, [w]
    got, *_ = computed(case, Full(), "auto")
    inputs = [carry[0], xs, w]
    final, ys = loop(*case[:3], T)
    want = torch.autograd.grad(weighed([final[0], torch.stack(ys)], 0), inputs)
    agree(got[2:], want)


# Blocks that overlap

OVERLAPPING = {"4/2": Truncated(4, every=2), "4/3": Truncated(4, every=3), "6/2": Truncated(6, every=2)}
each_window = pytest.mark.parametrize("policy", OVERLAPPING.values(), ids=OVERLAPPING)


@pytest.mark.parametrize("name", [*COUPLED, "dropout"])
@pytest.mark.parametrize("resets", [None, RESETS], ids=["", "resets"])
@each_window
def test_windows_of_coupled_rows(policy: Truncated, resets: Tensor | None, name: str) -> None:
    """Each block's steps are run once, and those of its window before its losses once more; none in backward."""
    case = dropout() if name == "dropout" else STEPS[name]()
    if name == "rowless":
        resets = None if resets is None else resets[:, 0]
    got, forward, backward = computed(case, policy, "auto", resets=resets, rows="coupled")
    want, _, again = computed(case, policy, "states", resets=resets, rows="coupled")
    run_again = sum(first - earliest for earliest, first, _ in policy.reach(T).blocks(T))
    assert (forward, backward, again) == (T + 1 + run_again, 1, T)
    values = len(got) - len([*floats(case[1]), *floats(case[2]), *case[3]])
    torch.testing.assert_close(got[:values], want[:values], rtol=0, atol=0)
    torch.testing.assert_close(got[values:], want[values:], rtol=1e-13, atol=1e-13)


@each_window
def test_rows_are_found_to_be_coupled_in_forward(policy: Truncated, monkeypatch: pytest.MonkeyPatch) -> None:
    """And independent rows lie side by side in backward, unless there are few blocks with short windows."""
    few = policy.window <= 2 * policy.every
    assert (computed(STEPS["lstm"](), policy, "auto")[2] == 1) == few
    monkeypatch.setattr(recorded, "_FEW_BLOCKS", 0)
    assert computed(STEPS["softmax_over_rows"](), policy, "auto")[2] == 1
    assert computed(STEPS["lstm"](), policy, "auto")[2] > 1


@each_window
def test_factors_of_windows(policy: Truncated, agree: Agree) -> None:
    fixed = FixedTruncated(policy.window, policy.every, factors(B))
    case = STEPS["softmax_over_rows"]()
    got, _, backward = computed(case, fixed, "auto", resets=RESETS)
    assert backward == 1
    agree(got, computed(case, fixed, "states", resets=RESETS)[0])


@each_window
def test_running_statistics_of_windows_are_updated_once(policy: Truncated) -> None:
    norm = nn.BatchNorm1d(H, dtype=DOUBLE)
    plain = copy.deepcopy(norm)
    h, xs = random(B, H), random(T, B, H)
    _, ys = scan(lambda h, x: (norm(h) + x, h), h, xs, gradient=policy)
    ys.square().sum().backward()
    loop(lambda h, x: (plain(h) + x, h), h, xs, T)
    for name, value in plain.named_buffers():
        torch.testing.assert_close(norm.get_buffer(name), value)


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("start", [0, 1, 2, T - 2])
@each_window
def test_state_outside_of_the_carry_in_windows(policy: Truncated, start: int, name: str) -> None:
    """Where a window runs again between the last two steps, its steps give something else, and backward raises."""
    with pytest.raises(RuntimeError, match=f"{OUTSIDE}|gave another result at step"):
        scan(from_step(start, KEPT[name]), (random(B, H), 0), random(T, B, H), gradient=policy)[1].sum().backward()


@each_window
def test_windows_that_give_something_else_when_run_again(policy: Truncated) -> None:
    calls: list[int] = []

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(0)
        h = torch.softmax(h, 0) * (1 if len(calls) < 5 else len(calls)) + x
        return h, h

    _, ys = scan(step, random(B, H), random(T, B, H), gradient=policy, rows="coupled")
    with pytest.raises(RuntimeError, match="gave another result at step"):
        ys.sum().backward()


def test_a_buffer_that_a_window_would_write_to_twice() -> None:
    largest = torch.zeros((), dtype=DOUBLE)

    def step(carry: tuple[Tensor, int], x: Tensor) -> tuple[tuple[Tensor, int], Tensor]:
        h, t = carry
        h = torch.tanh(h + x)
        if t > 1:
            largest.copy_(torch.maximum(largest, h.detach().abs().max()))
        return (h, t + 1), h

    h, xs = random(B, H), random(T, B, H)
    with pytest.raises(RuntimeError, match="a step writes to a tensor of its closure"):
        scan(step, (h, 0), xs, gradient=Truncated(4, every=2))
    scan(step, (h, 0), xs, gradient=Truncated(4, every=2), memory="states")


# What is not recorded


def test_a_step_that_keeps_what_it_makes_is_run_again(agree: Agree) -> None:
    """The gradient of what leaves it is refused, which the recorded graph could not do."""
    kept: list[Tensor] = []
    step, carry, xs, captured = STEPS["rnn"]()

    def keeping(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h, y = step(h, x)
        kept[:] = [h.exp()]
        return h, y

    got, _, backward = computed((keeping, carry, xs, captured), Full(), "auto")
    assert backward == T
    want, *_ = computed((step, carry, xs, captured), Full(), "states")
    agree(got, want)


def test_a_graph_that_would_be_too_large_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "_MOST_BYTES", 1000)
    _, forward, backward = computed(STEPS["rnn"](), Full(), "auto")
    assert (forward, backward) == (T + 1, T)


# Writing in place


def test_a_step_that_begins_late_to_write_in_place() -> None:
    """To a carry that the step before gave as its y too."""

    def step(carry: tuple[Tensor, int], x: Tensor) -> tuple[tuple[Tensor, int], Tensor]:
        h, t = carry
        if t == 3:
            h.mul_(2)
        h = h + x
        return (h, t + 1), h

    carry, xs = (random(B, H), 0), random(T, B, H)
    with pytest.raises(RuntimeError, match="step 3 writes in place to"):
        scan(step, carry, xs)
    got, *_ = computed((step, carry, xs, []), Full(), "states")
    assert got[0].isfinite().all()


def test_a_step_that_begins_late_to_write_to_its_x(agree: Agree) -> None:
    def step(carry: tuple[Tensor, int], x: Tensor) -> tuple[tuple[Tensor, int], Tensor]:
        h, t = carry
        if t >= 3:
            x.mul_(2)
        h = torch.tanh(h + x)
        return (h, t + 1), h

    carry, xs = (random(B, H), 0), random(T, B, H, grad=False)
    before = xs.clone()
    final, _ = scan(step, carry, xs)
    final[0].sum().backward()
    torch.testing.assert_close(xs, before, rtol=0, atol=0)
    want = loop(step, (carry[0].detach(), 0), xs.clone(), T)[0][0]
    agree(final[0].detach(), want)


# The graph


def test_outputs_may_be_written_to(agree: Agree) -> None:
    step, carry, xs, captured = STEPS["rnn"]()
    final, ys = scan(step, carry, xs)
    doubled = ys.mul_(2)
    final.add_(1)
    got = torch.autograd.grad(weighed([final, doubled], 0), [carry, xs, *captured])
    final, ys = scan(step, carry, xs, memory="states")
    agree(got, torch.autograd.grad(weighed([final + 1, ys * 2], 0), [carry, xs, *captured]))


def test_hooks_run_once(agree: Agree) -> None:
    cell = nn.GRUCell(X, H, dtype=DOUBLE)
    case: Case = (lambda h, x: (cell(x, h),) * 2), random(B, H), random(T, B, X), list(cell.parameters())
    want, *_ = computed(case, Full(), "states")
    seen: list[Tensor] = []

    def halve(grad: Tensor) -> Tensor:
        seen.append(grad)
        return grad / 2

    cell.weight_hh.register_hook(halve)
    got, *_ = computed(case, Full(), "auto")
    assert len(seen) == 1
    place = len(want) - 4 + [p is cell.weight_hh for p in cell.parameters()].index(True)
    agree(got[place], want[place] / 2)
