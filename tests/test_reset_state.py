"""Resets to a given state: forward's keyword `reset_state`, and the gradient into it."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from reference import CELLS, NETS, Case, as_hx, as_tuple, build, case, gradients, measure, ours
from restarts import FORMS, each_form, restart
from sweeps import LENGTHS, RESETS, Agree, T, each_cell, each_net, some_policies
from torch import Tensor

import bptt
from bptt.kernels import cpu


def expected(theirs: Any, data: Case, policy: Any, **kw: Any) -> dict[str, Any]:
    return gradients(theirs, data.x, data.initial, data.dy, data.dfinal, policy, **kw).values()


def posed(cell: str, net: str, form: str, packed: bool) -> tuple[Any, Case, dict[str, Any]]:
    """A layer of torch.nn, what goes in, and the resets with their states.

    packed: with rows beyond the end of a sequence, and, of a state for each step, NaN where there is no reset.
    """
    theirs = build(cell, **NETS[net])
    data = case(theirs, T=T, B=4)
    resets, state = RESETS, restart(data, form)
    if packed:
        resets = RESETS | (torch.arange(T)[:, None] % 3 == 2)
    if packed and form == "each_step":
        used = resets & (torch.arange(T)[:, None] < torch.tensor(LENGTHS))
        for z in state:
            z.transpose(1, 2)[~used] = torch.nan
    return theirs, data, {"resets": resets, "reset_state": state}


@cache
def answers(cell: str, net: str, form: str, packed: bool) -> list[dict[str, Any]]:
    """What is expected under each of some policies. The same for every kernel and memory, and slow to compute."""
    theirs, data, kw = posed(cell, net, form, packed)
    if packed:
        kw["lengths"] = LENGTHS
    return [expected(theirs, data, policy, **kw) for policy in some_policies(net, B=4)]


def judge(cell: str, net: str, form: str, agree: Agree, packed: bool = False, **settings: Any) -> None:
    """A layer with these settings against the reference, under each of some policies."""
    theirs, data, kw = posed(cell, net, form, packed)
    if packed:
        kw["packed"] = LENGTHS
    for policy, answer in zip(some_policies(net, B=4), answers(cell, net, form, packed), strict=True):
        agree(measure(ours(theirs, gradient=policy, **settings), data, **kw).values(), answer, str(policy))


@each_cell
@each_net
@each_form
@pytest.mark.parametrize("kernel", ["cpu", "eager"])
def test_every_policy(cell: str, net: str, form: str, kernel: str, agree: Agree) -> None:
    judge(cell, net, form, agree, kernel=kernel)


@each_cell
@each_form
@pytest.mark.parametrize(
    ("net", "memory"),
    [
        ("one", "checkpoints:steps=2"),
        ("two", "states"),
        ("two", "checkpoints:steps=3"),
        ("bi", "checkpoints:steps=2"),
        ("bi_two", "states"),
        ("bi_two", "checkpoints:steps=3"),
    ],
)
def test_every_memory(cell: str, net: str, form: str, memory: str, agree: Agree) -> None:
    judge(cell, net, form, agree, memory=memory)


def test_checkpoints_of_a_budget(agree: Agree) -> None:
    """Few enough bytes for a binomial schedule, which runs steps more than twice."""
    for net in ("two", "bi_two"):
        theirs = build("lstm", **NETS[net])
        data = case(theirs, T=33, B=2)
        resets = torch.rand(33, 2, generator=torch.Generator().manual_seed(1)) < 0.2
        for form in FORMS:
            kw = {"resets": resets, "reset_state": restart(data, form)}
            for policy in ("full", "truncated:5"):
                whole = measure(ours(theirs, gradient=policy), data, **kw)
                budget = 10_000 if net == "bi_two" else 3000
                mine = ours(theirs, gradient=policy, memory=f"checkpoints:bytes={budget}")
                agree(measure(mine, data, **kw).values(), whole.values())


@pytest.mark.parametrize(
    ("cell", "form", "net"),  # every two of the three together
    [(cell, form, ("two", "bi_two")[(i + j) % 2]) for i, cell in enumerate(CELLS) for j, form in enumerate(FORMS)],
)
@pytest.mark.parametrize(("memory", "kernel"), [("gates", "eager"), ("gates", "cpu"), ("checkpoints:steps=3", "cpu")])
def test_packed(cell: str, net: str, form: str, memory: str, kernel: str, agree: Agree) -> None:
    """Rows beyond the end of a sequence, and where there is no reset, are nobody's, whatever they hold."""
    judge(cell, net, form, agree, packed=True, memory=memory, kernel=kernel)


@each_cell
@each_form
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("policy", ["full", "chunked:8", "truncated:5", "truncated:6/2"])
def test_kernels_agree(
    cell: str, form: str, dtype: torch.dtype, small: bool, policy: str, agree: Agree, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "SMALL", 10**12 if small else 0)
    theirs = build(cell, 19, 33, num_layers=2)
    data = case(theirs, T=21, B=13)
    resets = torch.rand(21, 13, generator=torch.Generator().manual_seed(2)) < 0.2
    kw = {"resets": resets, "reset_state": restart(data, form)}
    exact = measure(ours(theirs, gradient=policy, kernel="eager"), data, **kw)
    mine = ours(theirs, gradient=policy, kernel="cpu").to(dtype)
    cast = Case(*(z.to(dtype) if isinstance(z, Tensor) else tuple(s.to(dtype) for s in z) for z in vars(data).values()))
    kw["reset_state"] = tuple(z.to(dtype) for z in kw["reset_state"])
    agree(measure(mine, cast, **kw).values(), exact.values(), tolerance=None if dtype == torch.float64 else 3e-5)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("policy", ["full", "truncated:3"])
def test_threads(threads: int, policy: str, agree: Agree) -> None:
    theirs = build("lstm", 9, 40)
    data = case(theirs, T=40, B=24)
    resets = torch.rand(40, 24, generator=torch.Generator().manual_seed(2)) < 0.2
    kw = {"resets": resets, "reset_state": restart(data, "shared")}
    exact = measure(ours(theirs, gradient=policy, kernel="eager"), data, **kw)
    torch.set_num_threads(threads)
    try:
        agree(measure(ours(theirs, gradient=policy, kernel="cpu"), data, **kw).values(), exact.values())
    finally:
        torch.set_num_threads(1)


@each_cell
@each_form
@pytest.mark.parametrize("kernel", ["cpu", "eager"])
def test_zeros_are_a_plain_reset(cell: str, form: str, kernel: str, agree: Agree) -> None:
    theirs = build(cell, num_layers=2, bidirectional=True)
    data = case(theirs, T=T, B=4)
    zeros = tuple(torch.zeros_like(z) for z in restart(data, form))
    with_zeros = measure(ours(theirs, kernel=kernel), data, resets=RESETS, reset_state=zeros).values()
    without = measure(ours(theirs, kernel=kernel), data, resets=RESETS).values()
    del with_zeros["reset_state"], without["reset_state"]
    agree(with_zeros, without)


@each_cell
@each_form
@pytest.mark.parametrize("memory", ["gates", "checkpoints:steps=2"])
def test_episodes_by_hand(cell: str, form: str, memory: str, agree: Agree) -> None:
    """One call is every episode run alone by torch.nn, from the given state in the place of hx."""
    theirs = build(cell, num_layers=2)
    data = case(theirs, T=T, B=4)
    state = tuple(z.requires_grad_() for z in restart(data, form))
    initial = tuple(z.clone().requires_grad_() for z in data.initial)
    ys = []
    for b in range(4):
        hx, pieces = tuple(z[:, b] for z in initial), []
        for t in range(T):
            if RESETS[t, b]:
                hx = tuple((z if form == "shared" else z[t])[:, b] for z in state)
            y, final = theirs(data.x[t : t + 1, b], as_hx(hx))
            hx = as_tuple(final)
            pieces.append(y)
        ys.append(torch.cat(pieces))
    y = torch.stack(ys, 1)
    by_hand = torch.autograd.grad(y, [*theirs.parameters(), *initial, *state], data.dy)
    mine = ours(theirs, memory=memory)
    own, _ = mine(data.x, as_hx(initial), resets=RESETS, reset_state=as_hx(state))
    agree(own, y)
    agree(torch.autograd.grad(own, [*mine.parameters(), *initial, *state], data.dy), by_hand)


@each_cell
@pytest.mark.parametrize("window", [1, 2, 4])
def test_window(cell: str, window: int, agree: Agree) -> None:
    """The given state gets at a reset what hx gets at step 0: from the losses whose windows hold the step."""
    theirs = build(cell)
    data = case(theirs, T=T, B=1)
    resets = torch.zeros(T, 1, dtype=torch.bool)
    resets[3] = True
    mine = ours(theirs, gradient=bptt.Truncated(window))
    state = tuple(z.clone().requires_grad_() for z in data.initial)
    y, _ = mine(data.x, resets=resets, reset_state=as_hx(state))
    alone, _ = mine(data.x[3:], as_hx(state))
    agree(torch.autograd.grad(y, state, data.dy), torch.autograd.grad(alone, state, data.dy[3:]))


@each_form
def test_random_factors_are_not_on_the_way(form: str, agree: Agree) -> None:
    """Every edge cut by the policy: the step of a reset still reaches the state it restarts from, unscaled."""
    theirs = build("lstm")
    data = case(theirs, T=T, B=4)
    state = tuple(z.requires_grad_() for z in restart(data, form))
    torch.manual_seed(0)
    y, _ = ours(theirs, gradient="randomized:0.0000001")(data.x, resets=RESETS, reset_state=as_hx(state))
    chunks, _ = ours(theirs, gradient="chunked:1")(data.x, resets=RESETS, reset_state=as_hx(state))
    agree(torch.autograd.grad(y, state, data.dy), torch.autograd.grad(chunks, state, data.dy))


@each_cell
@each_form
@pytest.mark.parametrize("net", ["one", "bi_two"])
def test_layouts(cell: str, form: str, net: str, agree: Agree) -> None:
    """batch_first, unbatched, expanded and strided: the same numbers; the state stays `[T, L*D, B, .]`."""
    theirs = build(cell, **NETS[net])
    data = case(theirs, T=T, B=4)
    state = restart(data, form)
    kw = {"resets": RESETS, "reset_state": state}
    one = measure(ours(theirs), data, **kw)
    first = ours(build(cell, batch_first=True, **NETS[net]))
    agree(measure(first, data, resets=RESETS.T, reset_state=state).values(), one.values())
    for strided in (
        [z.transpose(-1, -2).contiguous().transpose(-1, -2) for z in state],
        [torch.stack([z, torch.full_like(z, torch.nan)], -1)[..., 0] for z in state],
    ):
        assert not any(z.is_contiguous() for z in strided)
        for kernel in ("cpu", "eager"):
            mine = ours(theirs, kernel=kernel)
            agree(measure(mine, data, resets=RESETS, reset_state=tuple(strided)).values(), one.values())
    for layer in (ours(theirs), first):
        lane = tuple(z[..., 2, :].clone().requires_grad_() for z in state)
        y, _ = layer(data.x[:, 2], as_hx(z[:, 2] for z in data.initial), resets=RESETS[:, 2], reset_state=as_hx(lane))
        agree(y, one.y[:, 2])
        whole = tuple(z.clone().requires_grad_() for z in state)
        again, _ = ours(theirs)(data.x, as_hx(data.initial), resets=RESETS, reset_state=as_hx(whole))
        grads = torch.autograd.grad(again[:, 2], whole, data.dy[:, 2])
        agree(torch.autograd.grad(y, lane, data.dy[:, 2]), tuple(g[..., 2, :] for g in grads))


@each_cell
@pytest.mark.parametrize("net", ["one", "bi_two"])
@pytest.mark.parametrize("kernel", ["cpu", "eager"])
def test_one_state_for_all_lanes(cell: str, net: str, kernel: str, agree: Agree) -> None:
    """Learned initial states: one row, expanded over lanes, and over steps."""
    theirs = build(cell, **NETS[net])
    data = case(theirs, T=T, B=4)
    row = tuple(z[:, :1].clone().requires_grad_() for z in data.initial)
    found = []
    for lead in ((), (T,)):
        state = tuple(z.expand(*lead, -1, 4, -1) for z in row)
        y, _ = ours(theirs, kernel=kernel)(data.x, resets=RESETS, reset_state=as_hx(state))
        found.append(torch.autograd.grad(y, row, data.dy))
    agree(found[0], found[1])
    state = tuple(z.detach().expand(-1, 4, -1) for z in row)
    exact = gradients(
        theirs,
        data.x,
        tuple(torch.zeros_like(z) for z in data.initial),
        data.dy,
        tuple(torch.zeros_like(z) for z in data.dfinal),
        bptt.Full(),
        resets=RESETS,
        reset_state=state,
    )
    agree(found[0], tuple(z.sum(1, keepdim=True) for z in exact.reset_state))


def functional(layer: Any, x: Tensor, count: int) -> Callable[..., tuple[Tensor, ...]]:
    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        y, final = layer(
            x, as_hx(tensors[:count]), resets=RESETS[:4, 1:3], reset_state=as_hx(tensors[count : 2 * count])
        )
        return (y, *as_tuple(final))

    return function


@pytest.mark.parametrize(
    ("cell", "form", "net"),  # every two of the three together
    [(cell, form, ("two", "bi")[(i + j) % 2]) for i, cell in enumerate(CELLS) for j, form in enumerate(FORMS)],
)
def test_gradcheck_and_double_backward(cell: str, form: str, net: str) -> None:
    """The second derivatives along random directions, which a wrong entry anywhere changes."""
    memory = {"two": "gates", "bi": "checkpoints:steps=2"}[net]
    theirs = build(cell, 2, 3 if cell == "lstm_proj" else 2, **NETS[net])
    data = case(theirs, T=4, B=2)
    states = [*(z.requires_grad_() for z in data.initial), *(z.requires_grad_() for z in restart(data, form))]
    function = functional(ours(theirs, memory=memory), data.x, len(data.initial))
    assert torch.autograd.gradcheck(function, states)
    assert torch.autograd.gradgradcheck(function, states, fast_mode=True)


def test_it_alone_needs_a_gradient(agree: Agree) -> None:
    theirs = build("gru", num_layers=2)
    data = case(theirs, T=T, B=4)
    state = restart(data, "shared")
    whole = measure(ours(theirs), data, resets=RESETS, reset_state=state)
    mine = ours(theirs).requires_grad_(False)
    leaf = state[0].clone().requires_grad_()
    y, h = mine(data.x, data.initial[0], resets=RESETS, reset_state=leaf)
    (y * data.dy).sum().add((h * data.dfinal[0]).sum()).backward()
    agree(leaf.grad, whole.reset_state[0])


def test_no_reset_no_gradient() -> None:
    layer, leaf = bptt.nn.GRU(3, 4), torch.ones(1, 2, 4, requires_grad=True)
    y, _ = layer(torch.randn(5, 2, 3), resets=torch.zeros(5, 2, dtype=torch.bool), reset_state=leaf)
    y.sum().backward()
    torch.testing.assert_close(leaf.grad, torch.zeros(1, 2, 4))


def test_no_lanes() -> None:
    for kernel in ("cpu", "eager"):
        layer, leaf = bptt.nn.LSTM(3, 4, kernel=kernel), torch.ones(1, 0, 4, requires_grad=True)
        y, _ = layer(torch.zeros(5, 0, 3), resets=torch.zeros(5, 0, dtype=torch.bool), reset_state=(leaf, leaf))
        y.sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.shape == (1, 0, 4)


@each_form
@pytest.mark.parametrize("policy", ["full", "chunked:3", "truncated:3"])
def test_dropout_is_drawn_once(form: str, policy: str, agree: Agree) -> None:
    theirs = build("lstm", num_layers=3, dropout=0.5)
    data = case(theirs, T=T, B=4)
    state = restart(data, form)
    found = []
    for memory in ("gates", "checkpoints:steps=2"):
        torch.manual_seed(4)
        mine = ours(theirs, gradient=policy, memory=memory).train()
        found.append(measure(mine, data, resets=RESETS, reset_state=state).values())
    agree(found[1], found[0])
    torch.manual_seed(4)
    masks = [torch.nn.functional.dropout(torch.ones(T, 4, 4, dtype=torch.float64)) for _ in range(2)]
    exact = expected(theirs, data, bptt.policies.parse(policy), resets=RESETS, masks=masks, reset_state=state)
    agree(found[0], exact)
