"""`scan`: any step, every policy, against one autograd backward per block of losses."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import Fixed
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from bptt import Chunked, Full, Randomized, Truncated, scan
from bptt.policies import Policy
from bptt.scan import sweep

from .loops import (
    COUPLED,
    DOUBLE,
    INDEPENDENT,
    POLICIES,
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
    branch_on_all_rows,
    closure_per_row,
    expected,
    factors,
    floats,
    loop,
    lstm,
    measured,
    random,
    rnn,
    rowless,
    tree,
    weighed,
)

each_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
each_memory = pytest.mark.parametrize("memory", ["auto", "states"])


# Values and gradients


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("reverse", [False, True])
def test_values_are_the_plain_loops(name: str, reverse: bool, agree: Agree) -> None:
    step, carry, xs, _ = STEPS[name]()
    final, ys = loop(step, carry, xs, T, reverse=reverse)
    got, got_ys = scan(step, carry, xs, reverse=reverse)
    torch.testing.assert_close(got, final)
    for leaf, *steps in zip(tree_leaves(got_ys), *map(tree_leaves, ys), strict=True):
        torch.testing.assert_close(leaf, None if leaf is None else torch.stack(steps))


@pytest.mark.parametrize("name", STEPS)
@each_memory
@each_policy
def test_gradient_of_every_policy(name: str, policy: Policy, memory: str, agree: Agree) -> None:
    case = STEPS[name]()
    agree(measured(case, policy, memory=memory), expected(case, policy))


@pytest.mark.parametrize("name", INDEPENDENT)
@pytest.mark.parametrize("rows", ["independent", "coupled"])
@each_policy
def test_declared_rows_do_not_change_the_gradient(name: str, rows: str, policy: Policy, agree: Agree) -> None:
    case = INDEPENDENT[name]()
    agree(measured(case, policy, rows=rows), expected(case, policy))


@pytest.mark.parametrize("name", ["lstm", "tree", "softmax_over_rows"])
@pytest.mark.parametrize("reverse", [False, True])
@each_memory
@each_policy
def test_resets_by_row(name: str, policy: Policy, memory: str, reverse: bool, agree: Agree) -> None:
    case = STEPS[name]()
    kw = {"resets": RESETS, "reverse": reverse}
    agree(measured(case, policy, memory=memory, **kw), expected(case, policy, **kw))


@pytest.mark.parametrize("name", ["rnn", "rowless"])
@each_policy
def test_resets_of_the_whole_carry(name: str, policy: Policy, agree: Agree) -> None:
    case = STEPS[name]()
    resets = RESETS[:, 1]
    agree(measured(case, policy, resets=resets), expected(case, policy, resets=resets[:, None]))


@pytest.mark.parametrize("name", ["lstm", "tree", "rowless", "softmax_over_rows"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("window", [None, 3])
@each_memory
def test_factors(name: str, reverse: bool, window: int | None, memory: str, agree: Agree) -> None:
    case = STEPS[name]()
    xi = factors(1 if name == "rowless" else B)
    policy = Fixed(xi) if window is None else FixedTruncated(window, 2, xi)
    agree(measured(case, policy, reverse=reverse, memory=memory), expected(case, policy, xi=xi, reverse=reverse))


@pytest.mark.parametrize("name", ["rnn", "softmax_over_rows"])
def test_factors_with_resets(name: str, agree: Agree) -> None:
    case, xi = STEPS[name](), factors(B)
    policy = FixedTruncated(4, 1, xi)
    agree(measured(case, policy, resets=RESETS), expected(case, policy, xi=xi, resets=RESETS))


def test_lanes_of_a_carry_without_a_common_size() -> None:
    policy = Fixed(torch.ones(3, 1, dtype=DOUBLE))
    carry = random(2, 3), random(4)
    final, _ = scan(lambda c, _: ((c[0] * 2, c[1] + c[0].sum()), None), carry, length=3, gradient=policy)
    assert policy.calls == [(3, 1)]
    final[1].sum().backward()
    torch.testing.assert_close(carry[0].grad, torch.full((2, 3), 4 * 7.0, dtype=DOUBLE))


@pytest.mark.parametrize("name", ["lstm", "next_row"])
def test_expectation_over_all_cuts_is_the_full_gradient(name: str, agree: Agree) -> None:
    p, T = 0.7, 4
    step, carry, xs, captured = STEPS[name]()
    case = step, carry, tree_map(lambda x: x[:T].detach().requires_grad_(), xs), captured
    mean = [torch.zeros_like(g) for g in measured(case, Full())]
    for kept in itertools.product([True, False], repeat=T - 1):
        xi = Randomized(p).weights(torch.tensor([[0.0 if k else 1.0] * B for k in kept], dtype=DOUBLE))
        probability = p ** sum(kept) * (1 - p) ** (T - 1 - sum(kept))
        mean = [m + probability * g for m, g in zip(mean, measured(case, Fixed(xi)), strict=True)]
    agree(mean, expected(case, Full(), T))


def test_randomized_draws_from_torchs_generator(agree: Agree) -> None:
    case = lstm()
    torch.manual_seed(3)
    xi = Randomized(0.6).draw(T, B)
    torch.manual_seed(3)
    agree(measured(case, "randomized:0.6"), expected(case, Full(), xi=xi))


@pytest.mark.parametrize("name", ["lstm", "tree", "batch_norm"])
@pytest.mark.parametrize("policy", [Randomized(1.0), Truncated(T), Truncated(T, every=3), Chunked(T), "full"])
def test_policies_that_are_full(name: str, policy: Policy | str) -> None:
    case = STEPS[name]()
    torch.testing.assert_close(measured(case, policy), measured(case, Full()), rtol=0, atol=0)


def test_four_nested_functions() -> None:
    w = torch.tensor(2.0, dtype=DOUBLE, requires_grad=True)
    one = torch.ones((), dtype=DOUBLE)
    x, _ = scan(lambda x, _: ((1 + w * x) ** 2, None), one, None, length=4)
    x.backward()
    assert w.grad is not None
    assert w.grad.item() == 12926834988414.0


@pytest.mark.parametrize("T", [1, 2])
@each_policy
def test_short_sequences(T: int, policy: Policy, agree: Agree) -> None:
    step, carry, xs, captured = rnn()
    case = step, carry, xs[:T].detach().requires_grad_(), captured
    agree(measured(case, policy), expected(case, policy, T))


# Walked side by side, or one at a time


class Counted:
    """A step that counts its calls and the rows it was given."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.rows: list[int] = []

    def __call__(self, carry: Any, x: Any) -> tuple[Any, Any]:
        self.rows.append(len(tree_leaves(carry)[0]))
        return self.step(carry, x)


def rows_walked(case: Case, policy: Policy, rows: str) -> list[int]:
    """How many rows each call of the step in the backward pass had."""
    counted = Counted(case[0])
    final, ys = scan(counted, case[1], case[2], gradient=policy, rows=rows, memory="states")
    assert counted.rows == [B] * (T + 1)
    counted.rows.clear()
    weighed(floats((final, ys)), 0).backward()
    return counted.rows


@pytest.mark.parametrize("name", INDEPENDENT)
def test_independent_rows_are_walked_side_by_side(name: str) -> None:
    case = INDEPENDENT[name]()
    every_step = [T * B, (T - 1) * B, (T - 2) * B]
    assert rows_walked(case, Truncated(3), "auto") == [2 * B, *every_step]
    assert rows_walked(case, Truncated(3), "independent") == every_step
    assert rows_walked(case, Truncated(4, every=3), "independent") == [3 * B, 3 * B, 3 * B, 2 * B]
    assert rows_walked(case, Chunked(3), "independent") == [3 * B, 2 * B, 2 * B]
    assert rows_walked(case, Truncated(3), "coupled") == [B] * T
    assert rows_walked(case, Full(), "auto") == [B] * T


@pytest.mark.parametrize("name", ["batch_norm", "softmax_over_rows", "next_row", "closure_per_row"])
def test_coupled_rows_are_found_out(name: str) -> None:
    probe, *walk = rows_walked(COUPLED[name](), Truncated(3), "auto")
    assert probe == 2 * B
    assert walk == [B] * T


def test_rows_that_turn_out_coupled_on_the_way() -> None:
    probe, *walk = rows_walked(branch_on_all_rows(), Truncated(3), "auto")
    assert probe == 2 * B
    assert walk == [T * B] + [B] * T


@pytest.mark.parametrize(("policy", "elements"), [(Truncated(3), 1), (Truncated(3, every=2), 120), (Chunked(2), 120)])
def test_groups_of_blocks_bound_the_memory(
    policy: Policy, elements: int, agree: Agree, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = lstm()
    monkeypatch.setattr(sweep, "_MERGED_ELEMENTS", elements)
    agree(measured(case, policy, rows="independent", resets=RESETS), expected(case, policy, resets=RESETS))
    assert max(rows_walked(case, policy, "independent")) == (B if elements == 1 else 2 * B)


@pytest.mark.parametrize("rows", ["independent", "coupled"])
def test_the_final_carry_belongs_to_the_last_loss(rows: str, agree: Agree) -> None:
    step, carry, xs, captured = rnn()
    final, _ = scan(step, carry, xs, gradient=Truncated(2), rows=rows)
    got = torch.autograd.grad(final.sum(), [carry, xs, *captured[:3]], materialize_grads=True)
    want = torch.autograd.grad(loop(step, carry, xs, T, detached=T - 2)[0].sum(), [xs, *captured[:3]])
    agree(got, (torch.zeros_like(carry), *want))


# Random numbers


def dropout() -> Case:
    step, carry, xs, captured = rnn()
    return (lambda h, x: step(torch.dropout(h, 0.5, True), x)), carry, xs, captured


@each_memory
@each_policy
def test_dropout_masks_are_replayed(policy: Policy, memory: str, agree: Agree) -> None:
    case = dropout()
    torch.manual_seed(9)
    agree(measured(case, policy, memory=memory), expected(case, policy, seed=9))


def test_the_random_generator_is_not_disturbed() -> None:
    step, carry, xs, _ = dropout()
    torch.manual_seed(9)
    loop(step, carry, xs, T)
    after = torch.get_rng_state()
    torch.manual_seed(9)
    final, _ = scan(step, carry, xs)
    torch.testing.assert_close(torch.get_rng_state(), after)
    torch.rand(3)
    now = torch.get_rng_state()
    final.sum().backward()
    torch.testing.assert_close(torch.get_rng_state(), now)


def test_only_some_steps_draw(agree: Agree) -> None:
    step, carry, xs, captured = rnn()

    def sometimes(carry: tuple[Tensor, int], x: Tensor) -> tuple[tuple[Tensor, int], Tensor]:
        h, t = carry
        h, y = step(torch.dropout(h, 0.5, True) if t % 3 == 2 else h, x)
        return (h, t + 1), y

    case = sometimes, (carry, 0), xs, captured
    torch.manual_seed(9)
    agree(measured(case, Truncated(3)), expected(case, Truncated(3), seed=9))


# Leaves that take no gradient


def test_python_values_in_the_carry(agree: Agree) -> None:
    w = random(B)

    def step(carry: tuple[Tensor, int, str], x: None) -> tuple[tuple[Tensor, int, str], tuple[int, Tensor, float]]:
        h, n, name = carry
        return (torch.sin(h * w + n), n + 1, name), (n, h, 0.5)

    case = step, (random(B), 0, "name"), None, [w]
    (_, n, name), (counts, _, halves) = scan(step, case[1], length=5)
    assert (n, name) == (5, "name")
    torch.testing.assert_close(counts, torch.arange(5))
    torch.testing.assert_close(halves, torch.full((5,), 0.5))
    agree(measured(case, Truncated(2), length=5), expected(case, Truncated(2), 5))


def test_integer_ys_and_final_carry_need_no_gradient() -> None:
    step, carry, xs, _ = tree()
    final, (_, counts, nothing) = scan(step, carry, xs)
    assert nothing is None
    assert not counts.requires_grad
    assert not final["n"].requires_grad
    torch.testing.assert_close(final["n"], xs[0].sum(0))


def test_a_carry_leaf_passed_through(agree: Agree) -> None:
    w = random(H)
    case = (
        (lambda c, x: ((c[0], torch.sin(c[1] * w * c[0]) + x), c[0])),
        (random(B, H), random(B, H)),
        random(T, B, H),
        [w],
    )
    for policy in POLICIES.values():
        agree(measured(case, policy), expected(case, policy), str(policy))


def test_an_empty_batch() -> None:
    step, _, _, captured = rnn()
    h, xs = torch.zeros(0, H, dtype=DOUBLE), torch.zeros(T, 0, X, dtype=DOUBLE)
    final, ys = scan(step, h, xs, gradient=Truncated(2), resets=RESETS[:, :0])
    assert ys.shape == (T, 0, 2)
    for grad in torch.autograd.grad(final.sum() + ys.sum(), captured):
        assert not grad.any()


# Errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"xs": None}, ValueError, "one number of steps"),
        ({"length": 3}, ValueError, r"leaves of xs of \[7\] steps, length=3"),
        ({"xs": (torch.ones(3, 2), torch.ones(4, 2))}, ValueError, r"\[3, 4\] steps"),
        ({"xs": torch.ones(())}, ValueError, "every leaf of xs"),
        ({"xs": (torch.ones(3, 2), 1.0)}, ValueError, "every leaf of xs"),
        ({"xs": torch.ones(0, 2)}, ValueError, "at least 1 step"),
        ({"xs": None, "length": 0}, ValueError, "at least 1 step"),
        ({"rows": "merged"}, ValueError, "rows must be"),
        ({"gradient": "half"}, ValueError, "gradient must be one of"),
        ({"gradient": 3}, TypeError, "gradient must be a policy"),
        ({"resets": RESETS.double()}, TypeError, "resets must be a bool tensor .* got float64"),
        ({"resets": RESETS[:, :2]}, ValueError, r"resets must have shape \[7\] or \[7, 3\].*got \[7, 2\]"),
        ({"resets": RESETS[:3]}, ValueError, r"got \[3, 3\]"),
        ({"step": lambda c, x: c}, TypeError, r"pair \(carry, y\): got float64 \[3, 4\] on cpu"),
        (
            {"step": lambda c, x: (c[:2], x)},
            ValueError,
            r"carry.* after step 0 .*float64 \[3, 4\].*got float64 \[2, 4\]",
        ),
        ({"step": lambda c, x: (c.float(), x)}, ValueError, "expected float64 .* got float32"),
        ({"step": lambda c, x: ((c, c), x)}, ValueError, "carry must have the same structure"),
        ({"step": lambda c, x: (c, object())}, ValueError, "y must hold tensors, numbers or None"),
    ],
)
def test_errors(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    step, carry, xs, _ = rnn()
    with pytest.raises(error, match=message):
        scan(**{"step": step, "carry": carry, "xs": xs, **arguments})


def test_errors_name_the_leaf() -> None:
    carry = {"h": torch.ones(2), "n": (0, torch.ones(3))}
    with pytest.raises(ValueError, match=r"carry\['n'\]\[1\] must be the same after step 0.*\[3\].*got float32 \[1\]"):
        scan(lambda c, _: ({"h": c["h"], "n": (1, c["n"][1][:1])}, None), carry, length=2)
    with pytest.raises(ValueError, match=r"carry\['n'\]\[0\] .*expected int, got float"):
        scan(lambda c, _: ({"h": c["h"], "n": (0.5, c["n"][1])}, None), carry, length=2)
    with pytest.raises(ValueError, match=r"y\[1\] must be the same at step 2 as at the first"):
        scan(lambda c, x: (c, (x, torch.ones(1 + int(x == 2)))), carry, torch.arange(4))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (rowless, "do not share one first dimension"),
        (dropout, "draws random numbers"),
        (lambda: ((lambda c, x: ((c[0] + x, c[1]), x)), (random(B, X), 0), random(T, B, X), []), "holds Python values"),
    ],
)
def test_rows_cannot_be_declared_independent(case: Callable[[], Case], message: str) -> None:
    step, carry, xs, _ = case()
    with pytest.raises(ValueError, match=message):
        scan(step, carry, xs, gradient=Truncated(2), rows="independent")


def test_rows_declared_independent_that_do_not_merge() -> None:
    step, carry, xs, _ = closure_per_row()
    _, ys = scan(step, carry, xs, gradient=Truncated(2), rows="independent", kernel="replay")
    with pytest.raises(ValueError, match="rows='independent' does not hold"):
        ys.sum().backward()
