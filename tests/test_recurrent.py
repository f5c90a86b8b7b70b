"""`bptt.nn.Recurrent` of torch's cells: the layers of the same weights, by the reference's loop over plain steps."""

import copy
from typing import Any

import pytest
import torch
from reference import NETS, Case, Gradients, build, case, gradients, measure, ours
from sweeps import LENGTHS, RESETS, Agree, T, some_policies
from torch import Tensor, nn

import bptt
from bptt.policies import Policy, parse

CELLS = {"tanh": nn.RNNCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}
POLICIES = ["full", "chunked:3", "truncated:4", "truncated:4/2", "truncated:5/3", "truncated:3/3"]
PARAMETERS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")

each_cell = pytest.mark.parametrize("cell", CELLS)
each_policy = pytest.mark.parametrize("policy", POLICIES)


def places(theirs: nn.RNNBase) -> dict[str, str]:
    """The names of the parameters of a `Recurrent`, with those of a layer's."""
    ends = ("", "_reverse") if theirs.bidirectional else ("",)
    suffixes = [f"_l{layer}{end}" for layer in range(theirs.num_layers) for end in ends]
    return {f"cells.{k}.{name}": name + suffix for k, suffix in enumerate(suffixes) for name in PARAMETERS}


def recurrent(theirs: nn.RNNBase, cell: str, **kw: Any) -> bptt.nn.Recurrent:
    """A `Recurrent` with the values of a layer."""
    I, H, D = theirs.input_size, theirs.hidden_size, 2 if theirs.bidirectional else 1
    kw = {"num_layers": theirs.num_layers, "bidirectional": theirs.bidirectional, "dropout": theirs.dropout, **kw}
    layer = bptt.nn.Recurrent(lambda n: CELLS[cell](H * D if n else I, H, dtype=torch.float64), **kw)
    values = theirs.state_dict()
    layer.load_state_dict({mine: values[name] for mine, name in places(theirs).items()})
    return layer


def renamed(found: Gradients, theirs: nn.RNNBase) -> Gradients:
    """Gradients with the names of the layer's parameters."""
    names = places(theirs)
    found.parameters = {names[name]: g for name, g in found.parameters.items()}
    return found


def judge(cell: str, net: str, policy: Policy, agree: Agree, memory: str = "auto", **kw: Any) -> None:
    """A `Recurrent` against the reference."""
    theirs = build(cell, **NETS[net])
    data = case(theirs, T=T, B=4)
    expected = gradients(theirs, data.x, data.initial, data.dy, data.dfinal, policy, **kw)
    if "lengths" in kw:
        kw["packed"] = kw.pop("lengths")
    actual = renamed(measure(recurrent(theirs, cell, gradient=policy, memory=memory), data, **kw), theirs)
    order = list(expected.parameters)
    actual.parameters = {name: actual.parameters[name] for name in order}
    agree(actual.values(), expected.values(), str(policy))


@each_cell
@each_policy
@pytest.mark.parametrize("net", ["one", "two", "bi"])
def test_equal_lengths(cell: str, net: str, policy: str, agree: Agree) -> None:
    judge(cell, net, parse(policy), agree)
    judge(cell, net, parse(policy), agree, memory="checkpoints:steps=3")


@each_cell
@pytest.mark.parametrize("net", NETS)
def test_edge_factors(cell: str, net: str, agree: Agree) -> None:
    fixed = some_policies(net, B=4)[-1]
    judge(cell, net, fixed, agree)


@each_policy
@pytest.mark.parametrize("net", ["one", "two", "bi"])
def test_packed(net: str, policy: str, agree: Agree) -> None:
    for cell in ("gru", "lstm"):
        judge(cell, net, parse(policy), agree, lengths=LENGTHS)
        judge(cell, net, parse(policy), agree, lengths=LENGTHS, resets=RESETS)


@each_policy
@pytest.mark.parametrize("net", ["one", "two", "bi"])
def test_resets(net: str, policy: str, agree: Agree) -> None:
    judge("lstm", net, parse(policy), agree, resets=RESETS)


@each_policy
@pytest.mark.parametrize("kw", [{}, {"lengths": LENGTHS}, {"resets": RESETS}], ids=["even", "packed", "resets"])
def test_bidirectional_stack(policy: str, kw: dict[str, Any], agree: Agree) -> None:
    judge("gru", "bi_two", parse(policy), agree, **kw)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_lengths_are_those_of_packed_sequences(policy: str, bidirectional: bool, agree: Agree) -> None:
    theirs = build("lstm", bidirectional=bidirectional)
    data = case(theirs, T=T + 2, B=4)
    for batch_first in (False, True):
        layer = recurrent(theirs, "lstm", gradient=policy, batch_first=batch_first)
        packed = measure(layer, data, packed=LENGTHS)
        padded = measure(layer, nan_beyond(data), lengths=torch.tensor(LENGTHS))
        agree(padded.values(), packed.values(), policy)
        agree(measure(layer, data, lengths=LENGTHS).values(), packed.values(), policy)


def nan_beyond(data: Case) -> Case:
    """The data with NaN beyond the sequences' ends, which nothing may read."""
    x = data.x.clone()
    for b, n in enumerate(LENGTHS):
        x[n:, b] = torch.nan
    return Case(x, data.initial, data.dy, data.dfinal)


@each_policy
def test_reverse_is_the_reverse_half(policy: str, agree: Agree) -> None:
    """Of a bidirectional layer, with lengths and resets."""
    both = build("gru", bidirectional=True)
    one = build("gru")
    one.load_state_dict({f"{name}_l0": getattr(both, f"{name}_l0_reverse") for name in PARAMETERS})
    data = case(both, T=T, B=4)
    half = Case(data.x, (data.initial[0][1:],), data.dy[..., 4:], (data.dfinal[0][1:],))
    data.dy[..., :4] = 0
    data.dfinal[0][0] = 0
    for kw in ({}, {"resets": RESETS}, {"packed": LENGTHS}, {"packed": LENGTHS, "resets": RESETS}):
        expected = measure(ours(both, gradient=policy), data, **kw)
        actual = measure(recurrent(one, "gru", reverse=True, gradient=policy), half, **kw)
        agree([actual.y, actual.x], [expected.y[..., 4:], expected.x])
        agree([actual.final[0], actual.initial[0]], [expected.final[0][1:], expected.initial[0][1:]])
        for name in PARAMETERS:
            agree(actual.parameters[f"cells.0.{name}"], expected.parameters[f"{name}_l0_reverse"])


@each_cell
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("packed", [None, LENGTHS], ids=["even", "packed"])
def test_random_numbers_are_the_layers(cell: str, net: str, packed: Any, agree: Agree) -> None:
    """Dropout and random edge factors, from the same seed; without hx."""
    dropout = 0.4 if NETS[net]["num_layers"] > 1 else 0.0
    theirs = build(cell, **NETS[net], dropout=dropout)
    data = case(theirs, T=T, B=4)
    torch.manual_seed(3)
    expected = measure(ours(theirs, gradient="randomized:0.7"), data, packed=packed, hx=False)
    layer = recurrent(theirs, cell, gradient="randomized:0.7")
    layer(data.x)  # the cells are tried once, which draws nothing
    torch.manual_seed(3)
    actual = renamed(measure(layer, data, packed=packed, hx=False), theirs)
    actual.parameters = {name: actual.parameters[name] for name in expected.parameters}
    agree(actual.values(), expected.values())
    again = recurrent(theirs, cell, gradient="randomized:0.7")
    torch.manual_seed(3)
    agree(measure(again, data, packed=packed, hx=False).y, expected.y)
    agree(again.eval()(data.x)[0], ours(theirs).eval()(data.x)[0])


@each_cell
@pytest.mark.parametrize("bidirectional", [False, True])
def test_unbatched_and_batch_first(cell: str, bidirectional: bool, agree: Agree) -> None:
    theirs = build(cell, bidirectional=bidirectional)
    data, mine, layer = case(theirs, T=T, B=1), ours(theirs), recurrent(theirs, cell)
    x, hx = data.x[:, 0], tuple(z[:, 0] for z in data.initial)
    state: Any = hx if cell == "lstm" else hx[0]
    for given in (None, state):
        agree(layer(x, given), mine(x, given))
    agree(layer(x, state, resets=RESETS[:, 3]), mine(x, state, resets=RESETS[:, 3]))
    first = recurrent(theirs, cell, batch_first=True)
    x, resets = data.x.expand(T, 4, 5), RESETS
    y, final = mine(x, resets=resets)
    agree(first(x.transpose(0, 1), resets=resets.t()), (y.transpose(0, 1), final))


def test_double_backward(agree: Agree) -> None:
    theirs = build("gru", num_layers=2)
    data = case(theirs, T=5, B=2)
    found = []
    for layer in (ours(theirs, gradient="truncated:3/2"), recurrent(theirs, "gru", gradient="truncated:3/2")):
        x = data.x.clone().requires_grad_()
        (g,) = torch.autograd.grad((layer(x)[0] * data.dy).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), [x, *layer.parameters()]))
    agree(found[1], found[0])


def test_empty_batch_and_one_step(agree: Agree) -> None:
    theirs = build("lstm", num_layers=2)
    layer, mine = recurrent(theirs, "lstm"), ours(theirs)
    for x in (torch.zeros(3, 0, 5, dtype=torch.float64), torch.ones(1, 2, 5, dtype=torch.float64)):
        agree(layer(x), mine(x))


def test_a_window_counts_steps_of_the_whole_net() -> None:
    """A loss at the last step must not reach an input further back than the window, through however many layers."""
    theirs = build("gru", num_layers=3)
    x: Tensor = case(theirs, T=T).x.requires_grad_()
    y, _ = recurrent(theirs, "gru", gradient="truncated:3")(x)
    (g,) = torch.autograd.grad(y[-1].sum(), x)
    assert [bool(row.any()) for row in g] == [False] * (T - 3) + [True] * 3


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_call_of_a_known_kind(batch_first):
    """The short way gives the bits of the long one, and sees what has changed: cells, weights, sizes, policy, mode."""
    cells = [torch.nn.LSTMCell(3, 5), torch.nn.LSTMCell(5, 5)]
    layer, x = bptt.nn.Recurrent(cells, batch_first=batch_first, dropout=0.5).eval(), torch.randn(6, 6, 3)

    def results(of, x):
        y, state = of(x)
        return [y, *state, *torch.autograd.grad(y.square().sum(), list(of.parameters()))]

    def agree(change=lambda: None, x=x):
        change()
        for _ in range(3):
            found = results(layer, x)
        for a, b in zip(found, results(copy.deepcopy(layer), x), strict=True):
            torch.testing.assert_close(a, b)
            assert a.stride() == b.stride()

    agree()
    agree(x=torch.randn(6, 4, 3))
    agree(lambda: cells[0].weight_hh.data.mul_(2))
    agree(lambda: setattr(layer, "gradient", "chunked:2"))
    agree(lambda: layer.cells.__setitem__(0, torch.nn.LSTMCell(3, 5)))
    layer.train()
    assert not torch.equal(layer(x)[0], layer(x)[0])
