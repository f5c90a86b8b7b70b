"""Any layer, policy, reset and length: the engine is the reference."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import CELLS, Fixed, build, case, gradients, measure, ours
from torch import Tensor

import bptt
from bptt.policies import Policy, Truncated, parse

Agree = Callable[..., None]

counts = st.integers(1, 4)


@dataclass(frozen=True)
class Net:
    """The arguments of a layer and the shape of its data."""

    cell: str
    I: int
    H: int
    kw: dict[str, Any]
    T: int
    B: int
    memory: str

    @property
    def rows(self) -> int:
        return 2 * self.kw["num_layers"] if self.kw["bidirectional"] else 1


@st.composite
def nets(draw: st.DrawFn) -> Net:
    kw = {
        "num_layers": draw(st.integers(1, 3)),
        "bidirectional": draw(st.booleans()),
        "bias": draw(st.booleans()),
    }
    return Net(
        draw(st.sampled_from(sorted(CELLS))),
        draw(counts),
        draw(st.integers(3, 4)),
        kw,
        draw(st.integers(1, 6)),
        draw(st.integers(1, 3)),
        draw(st.sampled_from(["gates", "states"])),
    )


@st.composite
def truncations(draw: st.DrawFn, T: int) -> Policy:
    window = draw(st.integers(1, T + 1))
    return draw(st.sampled_from([bptt.Chunked(window), Truncated(window, every=draw(st.integers(1, window)))]))


@st.composite
def policies(draw: st.DrawFn, net: Net) -> Policy:
    kind = draw(st.sampled_from(["full", "cut", "random"]))
    if kind == "full":
        return bptt.Full()
    if kind == "cut":
        return draw(truncations(net.T))
    factors = st.sampled_from([0.0, 0.5, 1.0, 1.25, 2.0])
    xi = []
    for _ in range(net.rows):
        rows = draw(st.lists(st.lists(factors, min_size=net.B, max_size=net.B), min_size=net.T, max_size=net.T))
        one = torch.tensor(rows, dtype=torch.float64)
        one[0] = 1
        xi.append(one)
    return Fixed(*xi)


def bools(T: int, B: int) -> st.SearchStrategy[Tensor]:
    lane = st.lists(st.booleans(), min_size=B, max_size=B)
    return st.lists(lane, min_size=T, max_size=T).map(lambda rows: torch.tensor(rows, dtype=torch.bool))


@given(st.data())
@settings(max_examples=100)
def test_engine_is_reference(agree: Agree, data: st.DataObject) -> None:
    net = data.draw(nets())
    policy = data.draw(policies(net))
    resets = data.draw(st.none() | bools(net.T, net.B))
    theirs = build(net.cell, net.I, net.H, **net.kw)
    numbers = case(theirs, net.T, net.B)
    expected = gradients(theirs, numbers.x, numbers.initial, numbers.dy, numbers.dfinal, policy, resets=resets)
    mine = ours(theirs, gradient=policy, memory=net.memory)
    agree(measure(mine, numbers, resets=resets).values(), expected.values())


@given(st.data())
@settings(max_examples=60)
def test_engine_is_reference_packed(agree: Agree, data: st.DataObject) -> None:
    net = data.draw(nets())
    policy = data.draw(policies(net))
    lengths = data.draw(st.lists(st.integers(1, net.T), min_size=net.B, max_size=net.B))
    lengths[data.draw(st.integers(0, net.B - 1))] = net.T
    theirs = build(net.cell, net.I, net.H, **net.kw)
    numbers = case(theirs, net.T, net.B)
    expected = gradients(theirs, numbers.x, numbers.initial, numbers.dy, numbers.dfinal, policy, lengths=lengths)
    mine = ours(theirs, gradient=policy, memory=net.memory)
    agree(measure(mine, numbers, packed=lengths).values(), expected.values())


@given(st.data())
@settings(max_examples=60)
def test_gradients_are_linear_in_the_cotangents(agree: Agree, data: st.DataObject) -> None:
    """Whatever the policy, what two losses send back adds up."""
    net = data.draw(nets())
    policy = data.draw(truncations(net.T))
    mine = ours(build(net.cell, net.I, net.H, **net.kw), gradient=policy, memory=net.memory)
    numbers = case(mine, net.T, net.B)
    cut = data.draw(st.integers(0, net.T))
    early, late = numbers.dy.clone(), numbers.dy.clone()
    early[cut:] = 0
    late[:cut] = 0
    whole = bptt.gradients(mine, numbers.x, numbers.dy)
    parts = [bptt.gradients(mine, numbers.x, dy) for dy in (early, late)]
    agree(parts[0].x + parts[1].x, whole.x)
    agree({n: parts[0].parameters[n] + parts[1].parameters[n] for n in whole.parameters}, whole.parameters)


@given(st.data())
@settings(max_examples=60)
def test_a_loss_reaches_its_window_and_no_further(data: st.DataObject) -> None:
    """dL/dx is exactly zero outside the span of a loss and not inside it."""
    net = data.draw(nets().filter(lambda net: net.cell != "relu"))  # whose gradient may vanish anywhere
    window = data.draw(st.integers(1, net.T))
    every = data.draw(st.integers(1, window))
    mine = ours(build(net.cell, net.I, net.H, **net.kw), gradient=Truncated(window, every=every), memory=net.memory)
    numbers = case(mine, net.T, net.B)
    t = data.draw(st.integers(0, net.T - 1))
    P = numbers.dy.shape[-1] // (2 if net.kw["bidirectional"] else 1)
    dy = torch.zeros_like(numbers.dy)
    dy[t, :, :P] = 1  # forward half only: its blocks are counted from step 0
    first = t - t % every
    last = min(first + every, net.T) - 1
    low = max(0, last - window + 1)
    high = min(net.T - 1, first + window - 1) if net.rows > 2 else t
    dx = bptt.gradients(mine, numbers.x, dy).x.abs().amax((1, 2))
    reached = torch.arange(net.T)
    expected = (reached >= low) & (reached <= high)
    assert dx.gt(0).tolist() == expected.tolist()


@given(st.integers(1, 40), st.integers(1, 45), st.data())
@settings(max_examples=200)
def test_blocks_partition_the_losses(T: int, window: int, data: st.DataObject) -> None:
    every = data.draw(st.integers(1, window))
    for policy in (Truncated(window, every=every), bptt.Chunked(window), bptt.Full()):
        blocks = policy.reach(T).blocks(T)
        assert [t for _, a, b in blocks for t in range(a, b + 1)] == list(range(T))
        for earliest, first, last in blocks:
            assert 0 <= earliest <= first <= last
            if isinstance(policy, Truncated):
                assert earliest == max(0, last - window + 1) or window >= T
                assert last - first + 1 <= every or window >= T


finite = st.floats(0, 1, exclude_min=True)
texts = st.one_of(
    st.just(bptt.Full()),
    st.builds(bptt.Chunked, st.integers(1, 10**6)),
    st.integers(1, 10**6).flatmap(lambda w: st.builds(Truncated, st.just(w), every=st.integers(1, w))),
    st.builds(bptt.Randomized, finite),
    st.builds(bptt.Randomized, st.lists(finite, min_size=2, max_size=4)),
)


@given(texts)
@settings(max_examples=200)
def test_text_form_round_trip(policy: Policy) -> None:
    assert parse(str(policy)) == policy


@given(st.floats(1.001, 1e6), st.floats(2.001, 50))
@settings(max_examples=100)
def test_text_form_of_a_polynomial_tail_round_trip(mean: float, tail: float) -> None:
    policy = bptt.Randomized.polynomial(mean, tail)
    assert parse(str(policy)) == policy
