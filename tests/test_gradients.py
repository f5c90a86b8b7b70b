"""`bptt.gradients`: every gradient, and the adjoints, without autograd."""

import pytest
import torch
from functions import Agree, each_cell, each_net
from reference import NETS, as_hx, as_tuple, build, case, gradients, ours

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
