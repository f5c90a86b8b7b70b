"""Steps without lanes, and steps whose lanes depend on one another: compiled with the whole batch as one row."""

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bptt
from bptt import scan
from bptt.policies import Policy

from .loops import (
    DOUBLE,
    POLICIES,
    Agree,
    B,
    Case,
    H,
    T,
    X,
    expected,
    floats,
    loop,
    measured,
    random,
    rowless,
    softmax_over_rows,
)

compiled = importlib.import_module("bptt.scan.compiled")


@pytest.fixture(autouse=True)
def _traced_as_often_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test makes steps of its own of the same code."""
    monkeypatch.setattr(compiled, "MOST_OF_A_KIND", 10_000)


MEMORIES = ["auto", "states", "checkpoints:steps=2", "checkpoints:bytes=400"]


def reservoir() -> Case:
    w, u = random(H, H), random(H, X)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(w @ h + u @ x)
        return h, h

    return step, random(H), random(T, X), [w, u]


def linear_with_scalars() -> Case:
    inner, gain = nn.Linear(H + 1, H, dtype=DOUBLE), random()

    def step(c: tuple[Tensor, Tensor], x: Tensor) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
        h, energy = c
        h = torch.tanh(gain * inner(torch.cat([h, x[None]])))
        return (h, 0.5 * energy + h @ h), {"h": h, "energy": energy}

    return step, (random(H), random()), random(T), [*inner.parameters(), gain]


def gru_of_one_lane() -> Case:
    cell = nn.GRUCell(X, H, dtype=DOUBLE)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = cell(x, h)
        return h, h

    return step, random(H), random(T, X), list(cell.parameters())


def lstm_of_one_lane() -> Case:
    cell = nn.LSTMCell(X, H, dtype=DOUBLE)

    def step(c: tuple[Tensor, Tensor], x: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        h, state = cell(x, c)
        return (h, state), h

    return step, (random(H), random(H)), random(T, X), list(cell.parameters())


def elman_of_one_lane() -> Case:
    cell = nn.RNNCell(X, H, nonlinearity="relu", bias=False, dtype=DOUBLE)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = cell(x, h)
        return h, h

    return step, random(H), random(T, X), list(cell.parameters())


def divided_by_the_lanes() -> Case:
    w = random(X, H)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(h / len(h) + x @ w - h.mean(0))
        return h, h

    return step, random(B, H), random(T, B, X), [w]


def batch_norm_in_eval() -> Case:
    norm, w = nn.BatchNorm1d(H, dtype=DOUBLE), random(X, H)
    norm.running_mean = torch.randn(H, dtype=DOUBLE)
    norm.running_var = torch.rand(H, dtype=DOUBLE) + 0.5
    norm.eval()

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(norm(h + x @ w))
        return h, h

    return step, random(B, H), random(T, B, X), [w, *norm.parameters()]


def batch_norm_of_the_batch() -> Case:
    norm, w = nn.BatchNorm1d(H, track_running_stats=False, dtype=DOUBLE), random(X, H)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(norm(h + x @ w))
        return h, h

    return step, random(B, H), random(T, B, X), [w, *norm.parameters()]


def with_a_counter() -> Case:
    w = random(X, H)

    def step(c: tuple[Tensor, Tensor, Tensor], x: Tensor) -> tuple[Any, Tensor]:
        h, n, trace = c
        h = torch.tanh(h / (1 + n) + x @ w * trace)
        return (h, n + 1, 0.5 * trace + h.sum()), h

    return step, (random(B, H), torch.zeros((), dtype=torch.long), random()), random(T, B, X), [w]


def product_over_lanes() -> Case:
    w = random(X, H)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.softmax(h @ h.t(), 1) @ torch.tanh(x @ w)
        return h, h.sum()

    return step, random(B, H), random(T, B, X), [w]


CASES: dict[str, Callable[[], Case]] = {
    made.__name__: made
    for made in (
        rowless, reservoir, linear_with_scalars, gru_of_one_lane, lstm_of_one_lane, elman_of_one_lane,
        softmax_over_rows, divided_by_the_lanes, batch_norm_in_eval, batch_norm_of_the_batch, with_a_counter,
        product_over_lanes,
    )
}  # fmt: skip


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_values_are_the_plain_loops(name: str, reverse: bool, agree: Agree) -> None:
    torch.manual_seed(0)
    step, carry, xs, _ = CASES[name]()
    final, ys = scan(step, carry, xs, reverse=reverse, kernel="eager")
    end, each = loop(step, carry, xs, T, reverse=reverse)
    agree(floats(final), floats(end))
    stacked = (
        {k: torch.stack([y[k] for y in each]) for k in each[0]} if isinstance(each[0], dict) else torch.stack(each)
    )
    agree(ys, stacked)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("name", CASES)
def test_gradient_of_every_policy(name: str, policy: Policy, agree: Agree) -> None:
    torch.manual_seed(0)
    case = CASES[name]()
    agree(measured(case, policy, kernel="eager"), expected(case, policy))


RESETS = torch.tensor([0, 1, 0, 0, 0, 1, 0]).bool()


@cache
def expected_with_resets(name: str, policy: str) -> Any:
    """The same for every memory."""
    torch.manual_seed(0)
    return expected(CASES[name](), POLICIES[policy], resets=RESETS[:, None])


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("policy", ["full", "chunked", "truncated_every"])
@pytest.mark.parametrize("name", CASES)
def test_memory_and_resets(name: str, policy: str, memory: str, agree: Agree) -> None:
    torch.manual_seed(0)
    case = CASES[name]()
    try:
        got = measured(case, POLICIES[policy], memory=memory, resets=RESETS, kernel="eager")
    except ValueError as error:
        assert "bytes" in str(error)  # noqa: PT017  # too few of them for this carry
        return
    agree(got, expected_with_resets(name, policy))


@pytest.mark.parametrize("name", ["reservoir", "linear_with_scalars", "gru_of_one_lane"])
def test_the_interpreter_runs_a_lane(name: str, agree: Agree) -> None:
    torch.manual_seed(0)
    case = CASES[name]()
    for policy in ("full", "truncated"):
        agree(measured(case, POLICIES[policy], kernel="interpreter"), expected(case, POLICIES[policy]))


@pytest.mark.parametrize("policy", ["full", "chunked", "truncated"])
@pytest.mark.parametrize("name", ["reservoir", "softmax_over_rows", "rowless"])
def test_second_derivatives(name: str, policy: str, agree: Agree) -> None:
    torch.manual_seed(0)
    step, carry, xs, captured = CASES[name]()

    def second(kernel: str) -> tuple[Tensor, ...]:
        final, ys = scan(step, carry, xs, gradient=POLICIES[policy], kernel=kernel)
        (grad,) = torch.autograd.grad(ys.sin().sum() + final.sum(), captured[:1], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), [*captured[:1], carry], materialize_grads=True)

    agree(second("eager"), second("replay"))


def test_resets_by_lane_are_replayed_where_lanes_meet(agree: Agree) -> None:
    torch.manual_seed(0)
    case = divided_by_the_lanes()
    resets = torch.rand(T, B) < 0.3
    agree(measured(case, bptt.Full(), resets=resets), expected(case, bptt.Full(), resets=resets))
    with pytest.raises(RuntimeError, match=r"kernel='eager' cannot run this step"):
        scan(*case[:3], resets=resets, kernel="eager")


def test_factors_by_lane_are_replayed_where_lanes_meet() -> None:
    torch.manual_seed(0)
    step, carry, xs, _ = divided_by_the_lanes()
    with pytest.raises(RuntimeError, match=r"kernel='eager' cannot run this step"):
        scan(step, carry, xs, gradient=bptt.Randomized(0.5), kernel="eager")
    scan(step, carry, xs, gradient=bptt.Randomized(0.5))


def test_no_xs() -> None:
    w = torch.tensor(2.0, dtype=DOUBLE, requires_grad=True)
    x, ys = scan(
        lambda x, _: ((1 + w * x) ** 2, x), torch.ones((), dtype=DOUBLE), length=4, kernel="eager"
    )  # fmt: skip
    x.backward()
    assert (ys.tolist(), w.grad.item()) == ([1.0, 9.0, 361.0, 522729.0], 12926834988414.0)


def test_another_number_of_lanes_is_another_row(agree: Agree) -> None:
    torch.manual_seed(0)
    w = random(X, H)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(h / len(h) + x @ w)
        return h, h

    for lanes in (3, 5, 3, 1):
        case = step, random(lanes, H), random(T, lanes, X), [w]
        agree(measured(case, "chunked:3", kernel="eager"), expected(case, POLICIES["chunked"]))


def test_a_step_with_a_branch_is_refused_with_its_reason() -> None:
    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(h if h.sum() > 0 else -h)
        return h, h

    with pytest.raises(RuntimeError, match=r"value of a tensor|data-dependent"):
        scan(step, random(H), random(T, X), kernel="eager")


def test_a_branch_on_a_counter_is_refused_where_the_policy_cuts_the_first_step_off() -> None:
    w = random(X, H)

    def step(c: tuple[Tensor, Tensor], x: Tensor) -> tuple[Any, Tensor]:
        h, n = c
        h = x @ w if torch.all(n == 0) else torch.tanh(h + x @ w)
        return (h, n + 1), h

    carry, xs = (random(B, H), torch.zeros(B, dtype=torch.long)), random(T, B, X)
    with pytest.raises(RuntimeError, match="its Python code reads a value of its carry, and branches another way"):
        scan(step, carry, xs, gradient="chunked:3", kernel="eager")
    assert torch.equal(scan(step, carry, xs)[1], torch.stack(loop(step, carry, xs, T)[1]))


def test_a_long_reservoir(agree: Agree) -> None:
    torch.manual_seed(0)
    w, u = random(40, 40, grad=False) / 5, random(40, 3, grad=False)
    out = random(40)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(w @ h + u @ x)
        return h, out @ h

    h, xs = torch.zeros(40, dtype=DOUBLE), random(300, 3, grad=False)
    _, ys = scan(step, h, xs, kernel="interpreter")
    each = torch.stack(loop(step, h, xs, 300)[1])
    agree(ys, each)
    agree(torch.autograd.grad(ys.sin().sum(), out), torch.autograd.grad(each.sin().sum(), out))
