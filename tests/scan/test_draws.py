"""Steps that draw random numbers, compiled: the numbers of a plain loop, and its state of the generators after it."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import bptt
from bptt import scan
from bptt.policies import Policy

from .loops import DOUBLE, POLICIES, RESETS, Agree, B, Case, H, T, X, expected, floats, loop, measured, random

compiled = importlib.import_module("bptt.scan.compiled")


@pytest.fixture(autouse=True)
def _traced_as_often_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test makes steps of its own of the same code."""
    monkeypatch.setattr(compiled, "MOST_OF_A_KIND", 10_000)


def of_rows(noisy: Callable[[Tensor], Tensor]) -> Callable[[], Case]:
    """A tanh network whose state passes through a function that draws."""

    def made() -> Case:
        w, u = random(X, H), random(H, H)

        def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(x @ w + noisy(h) @ u)
            return h, h

        return step, random(B, H), random(T, B, X), [w, u]

    return made


def zoneout() -> Case:
    cell = nn.GRUCell(X, H, dtype=DOUBLE)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        new = cell(x, h)
        keep = torch.rand(len(h), 1, dtype=DOUBLE) < 0.4
        h = torch.where(keep, h, new)
        return h, functional.dropout(h, 0.3)

    return step, random(B, H), random(T, B, X), list(cell.parameters())


def module_with_dropout() -> Case:
    inner = nn.Sequential(nn.Linear(X + H, H), nn.Tanh(), nn.Dropout(0.4), nn.Linear(H, H)).double()

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(inner(torch.cat([x, h], 1)))
        return h, h

    return step, random(B, H), random(T, B, X), list(inner.parameters())


def normal_about_the_state() -> Case:
    w, spread = random(X, H), random(H)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(h + x @ w + torch.normal(torch.zeros_like(h), 0.2) * spread)
        return h, torch.normal(h, h.detach().abs() + 0.1)

    return step, random(B, H), random(T, B, X), [w, spread]


def shared_by_all_lanes() -> Case:
    w = random(X, H)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(h + x @ w + 0.1 * torch.randn(H, dtype=DOUBLE))
        return h, h

    return step, random(B, H), random(T, B, X), [w]


def without_lanes() -> Case:
    w, u = random(H, H), random(H, X)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(w @ functional.dropout(h, 0.3) + u @ x + 0.1 * torch.randn_like(h))
        return h, h * torch.rand((), dtype=DOUBLE)

    return step, random(H), random(T, X), [w, u]


def spikes_by_x() -> Case:
    w, v = random(X, H), random(X, H)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        spikes = torch.bernoulli(torch.sigmoid(x @ v))
        h = torch.tanh(h * spikes + torch.bernoulli(x.abs().clamp(0, 1)) @ w + torch.rand_like(h))
        return h, spikes + x @ v

    return step, random(B, H), random(T, B, X), [w, v]


def gates_by_a_parameter() -> Case:
    w, keep = random(X, H), random(B, H)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        gate = torch.empty_like(h).bernoulli_(torch.sigmoid(keep))
        h = torch.tanh(gate * h + x @ w + keep)
        return h, h

    return step, random(B, H), random(T, B, X), [w, keep]


ROWS = {
    "dropout": of_rows(lambda h: functional.dropout(h, 0.5)),
    "alpha dropout": of_rows(lambda h: functional.alpha_dropout(h, 0.25, training=True)),
    "into a transposed tensor": of_rows(lambda h: h + torch.empty(H, len(h), dtype=DOUBLE).t().uniform_()),
    "rows in the last dimension": of_rows(lambda h: h + torch.randn(H, len(h), dtype=DOUBLE).t()),
    "gaussian noise": of_rows(lambda h: h + 0.1 * torch.randn_like(h)),
    "many numbers": of_rows(lambda h: h + torch.randn(len(h), 7, H, dtype=DOUBLE).mean(1)),
    "uniform": of_rows(lambda h: h * torch.rand(len(h), 1, dtype=DOUBLE)),
    "float32 of float64": of_rows(lambda h: h * torch.rand(h.shape)),
    "a mask filled in place": of_rows(lambda h: h * torch.empty_like(h).bernoulli_(0.7)),
    "two fills of one tensor": of_rows(lambda h: h * torch.empty_like(h).uniform_(-1, 1).exponential_(2.0)),
    "integers": of_rows(lambda h: h * torch.randint(1, 4, (len(h), H))),
    "integers in place": of_rows(lambda h: h + torch.zeros_like(h).random_(3)),
    "gumbel": of_rows(lambda h: functional.gumbel_softmax(h)),
    "several": of_rows(lambda h: functional.dropout(h + torch.randn_like(h), 0.2) * torch.rand_like(h)),
    "a draw that is not used": of_rows(lambda h: (torch.rand(len(h)), h)[1]),
    "zoneout": zoneout,
    "module with dropout": module_with_dropout,
    "normal about the state": normal_about_the_state,
}
ROWS |= {"spikes by x": spikes_by_x, "gates by a parameter": gates_by_a_parameter}
WHOLE = {"shared by all lanes": shared_by_all_lanes, "without lanes": without_lanes}
CASES = {**ROWS, **WHOLE}


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_are_those_of_a_plain_loop(name: str, agree: Agree) -> None:
    torch.manual_seed(0)
    step, carry, xs, _ = CASES[name]()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.manual_seed(5)
            final, ys = scan(step, carry, xs, kernel="eager")
            after = torch.get_rng_state()
            torch.manual_seed(5)
            end, each = loop(step, carry, xs, T)
            assert torch.equal(after, torch.get_rng_state())
        agree(floats(final), floats(end))
        agree(ys, torch.stack(each))


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("name", CASES)
def test_gradient_of_every_policy(name: str, policy: Policy, agree: Agree) -> None:
    torch.manual_seed(0)
    case = CASES[name]()
    torch.manual_seed(5)
    got = measured(case, policy, kernel="eager")
    agree(got, expected(case, policy, seed=5))


@pytest.mark.parametrize("memory", ["states", "checkpoints:steps=2"])
@pytest.mark.parametrize("name", CASES)
def test_memory_and_resets(name: str, memory: str, agree: Agree) -> None:
    torch.manual_seed(0)
    case = CASES[name]()
    resets = RESETS if name in ROWS else RESETS[:, :1].expand(T, 1)[:, 0]
    for policy in ("full", "chunked", "truncated_every"):
        torch.manual_seed(5)
        got = measured(case, POLICIES[policy], memory=memory, resets=resets, kernel="eager")
        wanted = expected(case, POLICIES[policy], resets=resets if name in ROWS else resets[:, None], seed=5)
        agree(got, wanted)


@pytest.mark.parametrize("policy", ["full", "chunked", "truncated"])
@pytest.mark.parametrize("name", ["dropout", "several", "zoneout", "without lanes"])
def test_second_derivatives_by_the_same_numbers(name: str, policy: str, agree: Agree) -> None:
    torch.manual_seed(0)
    step, carry, xs, captured = CASES[name]()

    def second(kernel: str) -> tuple[Any, ...]:
        torch.manual_seed(5)
        final, ys = scan(step, carry, xs, gradient=POLICIES[policy], kernel=kernel)
        before = torch.get_rng_state()
        (grad,) = torch.autograd.grad(ys.sin().sum() + final.sum(), captured[:1], create_graph=True)
        found = torch.autograd.grad(grad.square().sum(), [*captured[:1], carry], materialize_grads=True)
        assert torch.equal(before, torch.get_rng_state())
        return found

    agree(second("eager"), second("replay"))


def test_a_backward_pass_and_another_one_use_the_same_numbers(agree: Agree) -> None:
    torch.manual_seed(0)
    step, carry, xs, captured = CASES["several"]()
    _, ys = scan(step, carry, xs, kernel="eager", memory="checkpoints:steps=2")
    first = torch.autograd.grad(ys.sum(), captured, retain_graph=True)
    torch.rand(3)
    agree(torch.autograd.grad(ys.sum(), captured), first)


def test_each_call_draws_anew_and_needs_no_new_trace(monkeypatch: pytest.MonkeyPatch, agree: Agree) -> None:
    monkeypatch.setattr(compiled, "MOST_OF_A_KIND", 1)
    torch.manual_seed(0)
    step, _, _, _ = CASES["dropout"]()
    for lanes, steps in ((3, 7), (3, 7), (5, 9), (1, 4)):
        h, xs = torch.randn(lanes, H, dtype=DOUBLE), torch.randn(steps, lanes, X, dtype=DOUBLE)
        torch.manual_seed(lanes + steps)
        _, ys = scan(step, h, xs, kernel="eager")
        torch.manual_seed(lanes + steps)
        agree(ys, torch.stack(loop(step, h, xs, steps)[1]))


def test_random_edge_factors_are_drawn_after_the_steps(agree: Agree) -> None:
    torch.manual_seed(0)
    step, carry, xs, captured = CASES["dropout"]()

    def gradient(kernel: str) -> tuple[Tensor, ...]:
        torch.manual_seed(5)
        _, ys = scan(step, carry, xs, gradient=bptt.Randomized(0.6), kernel=kernel)
        return torch.autograd.grad(ys.sum(), captured)

    agree(gradient("eager"), gradient("replay"))


OWN = torch.Generator()
REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "probabilities of the carry": (
        lambda h: torch.bernoulli(torch.sigmoid(h)).detach(), r"probabilities that depend on the carry"
    ),
    "probabilities that are drawn": (
        lambda h: h * torch.bernoulli(torch.rand_like(h)), r"probabilities that depend on other random numbers"
    ),
    "a generator of its own": (
        lambda h: h + torch.rand(H, generator=OWN, dtype=DOUBLE), r"whose state changes with each draw"
    ),
    "a choice by the carry": (lambda h: h + torch.multinomial(h.detach().softmax(1), 1), r"multinomial"),
    "into every second": (lambda h: h + torch.zeros(len(h), 2 * H, dtype=DOUBLE)[:, ::2].uniform_(), r"with gaps"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_draws_are_refused_with_the_reason(name: str) -> None:
    draws, reason = REFUSED[name]
    step, carry, xs, _ = of_rows(draws)()
    with pytest.raises(RuntimeError, match=reason):
        scan(step, carry, xs, kernel="eager")


def test_a_step_that_seeds_is_found_out_and_replayed(agree: Agree) -> None:
    w = random(X, H)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        h = torch.tanh(h + x @ w + torch.rand_like(h))
        return h, h

    carry, xs = random(B, H), random(T + 2, B, X)
    _, ys = scan(step, carry, xs)
    agree(ys, torch.stack(loop(step, carry, xs, T + 2)[1]))
    with pytest.raises(RuntimeError, match="manual_seed` changes torch's settings or random generators"):
        scan(step, carry, xs, kernel="eager")


def test_where_the_layout_of_memory_may_order_draws_the_step_is_replayed(agree: Agree) -> None:
    step, _, xs, _ = CASES["gaussian noise"]()
    carry = torch.randn(H, B, dtype=DOUBLE).t()
    with pytest.raises(RuntimeError, match="not contiguous"):
        scan(step, carry, xs, kernel="eager")


@pytest.mark.parametrize("name", ["dropout", "gaussian noise", "zoneout", "spikes by x", "without lanes"])
def test_the_interpreter_runs_them(name: str, agree: Agree) -> None:
    torch.manual_seed(0)
    case = CASES[name]()
    for policy in ("full", "truncated"):
        torch.manual_seed(5)
        got = measured(case, POLICIES[policy], kernel="interpreter")
        agree(got, expected(case, POLICIES[policy], seed=5))


def test_in_reverse_steps_draw_in_the_order_in_which_they_run(agree: Agree) -> None:
    torch.manual_seed(0)
    step, carry, xs, captured = CASES["several"]()
    torch.manual_seed(5)
    _, ys = scan(step, carry, xs, reverse=True, kernel="eager")
    torch.manual_seed(5)
    each = torch.stack(loop(step, carry, xs, T, reverse=True)[1])
    agree(ys, each)
    agree(torch.autograd.grad(ys.sin().sum(), captured), torch.autograd.grad(each.sin().sum(), captured))


def test_a_module_in_eval_draws_nothing(agree: Agree) -> None:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(X + H, H), nn.Dropout(0.4)).double()

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(inner(torch.cat([x, h], 1)))
        return h, h

    carry, xs = random(B, H), random(T, B, X)
    for train in (True, False, True):
        inner.train(train)
        before = torch.get_rng_state()
        torch.manual_seed(5)
        _, ys = scan(step, carry, xs, kernel="eager")
        torch.manual_seed(5)
        agree(ys, torch.stack(loop(step, carry, xs, T)[1]))
        torch.set_rng_state(before)
