"""`bptt.gradients`: every gradient, and the adjoints, without autograd."""

import pytest
import torch
from functions import Agree, each_cell, each_net
from reference import NETS, as_hx, as_tuple, build, case, gradients, ours
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import bptt


@each_cell
@each_net
@pytest.mark.parametrize("policy", ["full", "chunked:3", "truncated:3", "truncated:4/3"])
def test_bptt_gradients(cell: str, net: str, policy: str, agree: Agree) -> None:
    """Parameters, x, hx and the adjoints lambda_t = dL/dh_t of the top layer, also under no_grad."""
    theirs = build(cell, **NETS[net])
    data = case(theirs)
    mine = ours(theirs)
    expected = gradients(theirs, data.x, data.initial, data.dy, data.dfinal, bptt.policies.parse(policy))
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            actual = bptt.gradients(mine, data.x, data.dy, as_hx(data.initial), as_hx(data.dfinal), gradient=policy)
        agree(actual.parameters, expected.parameters)
        agree(actual.x, expected.x)
        agree(as_tuple(actual.hx), expected.initial)
        agree(actual.adjoints, expected.adjoints)
    assert all(p.grad is None for p in mine.parameters())


@each_cell
def test_bptt_gradients_uses_the_layers_policy(cell: str, agree: Agree) -> None:
    theirs = build(cell, num_layers=2)
    data = case(theirs)
    actual = bptt.gradients(ours(theirs, gradient="truncated:3"), data.x, data.dy)
    zeros = tuple(torch.zeros_like(z) for z in data.initial)
    expected = gradients(theirs, data.x, zeros, data.dy, zeros, bptt.Truncated(3))
    agree(actual.parameters, expected.parameters)
    agree(actual.x, expected.x)
    agree(actual.adjoints, expected.adjoints)


@each_cell
def test_adjoints_are_those_of_a_plain_loop(cell: str, agree: Agree) -> None:
    """lambda_t against `retain_grad` on every state of torch.nn run one step at a time."""
    theirs = build(cell)
    data = case(theirs)
    state, hs = data.initial, []
    for t in range(len(data.x)):
        _, hx = theirs(data.x[t : t + 1], as_hx(state))
        state = as_tuple(hx)
        state[0].retain_grad()
        hs.append(state[0])
    torch.autograd.backward([*hs, *state], [*(dy[None] for dy in data.dy), *data.dfinal])
    grads = bptt.gradients(ours(theirs), data.x, data.dy, as_hx(data.initial), as_hx(data.dfinal))
    agree(grads.adjoints, torch.cat([h.grad for h in hs]))


@pytest.mark.parametrize("memory", ["gates", "checkpoints:steps=4"])
@pytest.mark.parametrize("policy", ["full", "chunked:3", "truncated:4/3", "randomized:0.5"])
@pytest.mark.parametrize(
    ("cell", "net", "kernel"),
    [("gru", "one", "cpu"), ("lstm_proj", "bi_two", "cpu"), ("tanh", "two", "eager"), ("lstm", "one", "eager")],
)
def test_per_sample(cell: str, net: str, kernel: str, policy: str, memory: str, agree: Agree) -> None:
    """Those of each lane are the gradients that a cotangent of this lane alone gives; all else is what it was."""
    theirs = build(cell, **NETS[net])
    data, layer = case(theirs), ours(theirs, kernel=kernel, memory=memory)
    B = data.x.shape[1]
    lengths = torch.tensor([len(data.x) - 2 * (b % 2) for b in range(B)])

    def pack(x: torch.Tensor) -> PackedSequence:
        return pack_padded_sequence(x, lengths, enforce_sorted=False)

    for resets, packed in ((None, False), (torch.rand(len(data.x), B) < 0.2, False), (None, True)):
        form = pack if packed else lambda x: x

        def found(lane: torch.Tensor, resets=resets, form=form, **options: bool) -> bptt.nn.Gradients:
            torch.manual_seed(1)
            dfinal = tuple(d * lane for d in data.dfinal)
            given = form(data.x), form(data.dy * lane), as_hx(data.initial), as_hx(dfinal)
            return bptt.gradients(layer, *given, gradient=policy, resets=resets, **options)

        everything = found(torch.ones(B, 1, dtype=data.x.dtype), per_sample=True)
        agree(everything.adjoints, found(torch.ones(B, 1, dtype=data.x.dtype)).adjoints)
        for b, lane in enumerate(torch.eye(B, dtype=data.x.dtype)):
            agree({n: g[b] for n, g in everything.parameters.items()}, found(lane[:, None]).parameters)


def test_per_sample_without_lanes_and_without_a_batch() -> None:
    layer = bptt.nn.GRU(3, 4)
    shapes = {n: p.shape for n, p in layer.named_parameters()}
    none = bptt.gradients(layer, torch.ones(5, 0, 3), torch.ones(5, 0, 4), per_sample=True)
    assert {n: g.shape for n, g in none.parameters.items()} == {n: (0, *shape) for n, shape in shapes.items()}
    one = bptt.gradients(layer, torch.ones(5, 3), torch.ones(5, 4), per_sample=True)
    assert {n: g.shape for n, g in one.parameters.items()} == {n: (1, *shape) for n, shape in shapes.items()}
    with pytest.raises(RuntimeError, match="fused"):
        bptt.gradients(bptt.nn.GRU(3, 4, kernel="fused"), torch.ones(5, 2, 3), torch.ones(5, 2, 4), per_sample=True)
