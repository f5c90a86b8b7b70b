"""`reset_state` in other calls: without autograd, streamed, in low precision, compiled; and what is refused."""

from typing import Any

import pytest
import torch
from reference import NETS, as_hx, as_tuple, build, case, measure, ours
from restarts import FORMS, each_form, restart
from sweeps import RESETS, Agree, T, each_cell, some_policies
from torch import Tensor

import bptt


@each_cell
@pytest.mark.parametrize("net", ["one", "bi_two"])
@each_form
def test_without_autograd(cell: str, net: str, form: str, agree: Agree) -> None:
    theirs = build(cell, **NETS[net])
    data = case(theirs, T=T, B=4)
    state = restart(data, form)
    for policy in some_policies(net, B=4)[:4]:
        exact = measure(ours(theirs, gradient=policy), data, resets=RESETS, reset_state=state)
        found = bptt.gradients(
            ours(theirs, gradient=policy),
            data.x,
            data.dy,
            as_hx(data.initial),
            as_hx(data.dfinal),
            resets=RESETS,
            reset_state=as_hx(state),
        )
        assert found.reset_state is not None
        agree(as_tuple(found.reset_state), exact.reset_state)
        agree([found.parameters, found.x, as_tuple(found.hx)], [exact.parameters, exact.x, exact.initial])
    assert bptt.gradients(ours(theirs), data.x, data.dy, resets=RESETS).reset_state is None


@each_form
@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("policy", ["full", "chunked:3", "truncated:3"])
@pytest.mark.parametrize("pieces", [False, True])
def test_streamed(form: str, cell: str, policy: str, pieces: bool, agree: Agree) -> None:
    theirs = build(cell, num_layers=2)
    data = case(theirs, T=T, B=4)
    mine, state = ours(theirs, gradient=policy), restart(data, form)
    kw = {"resets": RESETS, "reset_state": as_hx(state)}
    x = iter(data.x.split(2)) if pieces else data.x
    found = bptt.nn.stream_gradients(
        mine, x, lambda steps, y: (y * data.dy[steps]).sum(), as_hx(data.initial), memory="checkpoints:steps=2", **kw
    )
    exact = bptt.gradients(mine, data.x, data.dy, as_hx(data.initial), **kw)
    assert found.reset_state is not None
    assert exact.reset_state is not None
    agree(as_tuple(found.reset_state), as_tuple(exact.reset_state))
    agree([found.parameters, as_tuple(found.hx)], [exact.parameters, as_tuple(exact.hx)])


@pytest.mark.parametrize("pieces", [False, True])
def test_streamed_errors(pieces: bool) -> None:
    layer, x = bptt.nn.GRU(3, 4, gradient="chunked:3"), torch.zeros(7, 2, 3)
    resets = torch.zeros(7, 2, dtype=torch.bool)

    def stream(**kw: Any) -> Any:
        return bptt.nn.stream_gradients(layer, iter(x.split(2)) if pieces else x, lambda _, y: y.sum(), **kw)

    with pytest.raises(ValueError, match="reset_state is what resets restart from"):
        stream(reset_state=torch.zeros(1, 2, 4))
    for shape in ((1, 2, 5), (6, 1, 2, 4), (8, 1, 2, 4)):
        with pytest.raises(ValueError, match="reset_state must"):
            stream(resets=resets, reset_state=torch.zeros(shape))


def test_bfloat16(agree: Agree) -> None:
    theirs = build("gru")
    data = case(theirs, T=T, B=4)
    state = restart(data, "shared")
    exact = measure(ours(theirs), data, resets=RESETS, reset_state=state)
    low = ours(theirs).bfloat16()
    leaf = state[0].bfloat16().requires_grad_()
    y, h = low(data.x.bfloat16(), data.initial[0].bfloat16(), resets=RESETS, reset_state=leaf)
    torch.autograd.backward([y, h], [data.dy.bfloat16(), data.dfinal[0].bfloat16()])
    assert leaf.grad is not None
    agree(leaf.grad, exact.reset_state[0])


def test_autocast_casts_them_too() -> None:
    layer = bptt.nn.LSTM(5, 4)
    state = tuple(torch.randn(1, 4, 4).bfloat16().requires_grad_() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = layer(torch.randn(T, 4, 5).bfloat16(), resets=RESETS, reset_state=state)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert [z.grad.dtype for z in state if z.grad is not None] == [torch.bfloat16] * 2
    with torch.autocast("cpu", torch.bfloat16):
        own = bptt.gradients(layer, torch.randn(T, 4, 5), torch.ones(T, 4, 4), resets=RESETS, reset_state=state)
    assert own.reset_state is not None
    assert {z.dtype for z in own.reset_state} == {torch.bfloat16}


@each_form
@pytest.mark.parametrize("net", ["two", "bi"])
def test_compiled(form: str, net: str, agree: Agree) -> None:
    theirs = build("lstm", **NETS[net])
    data = case(theirs, T=T, B=4)
    mine, state = ours(theirs, gradient="truncated:3"), restart(data, form)
    kw = {"resets": RESETS, "reset_state": state}
    exact = measure(mine, data, **kw)
    compiled = torch.compile(mine, backend="aot_eager", fullgraph=True)
    leaves = [data.x.clone(), *(z.clone() for z in (*data.initial, *state))]
    x, h, c, rh, rc = [z.requires_grad_() for z in leaves]
    y, final = compiled(x, (h, c), resets=RESETS, reset_state=(rh, rc))
    grads = torch.autograd.grad([y, *final], [x, h, c, rh, rc], [data.dy, *data.dfinal])
    agree([y, final, *grads], [exact.y, exact.final, exact.x, *exact.initial, *exact.reset_state])


@each_form
def test_exported(form: str, agree: Agree) -> None:
    theirs = build("gru", num_layers=2)
    data = case(theirs, T=T, B=4)
    mine, (state,) = ours(theirs), restart(data, form)
    with torch.no_grad():
        exported = torch.export.export(mine, (data.x,), {"resets": RESETS, "reset_state": state})
        other = data.x.flip(0)
        y, h = exported.module()(other, resets=RESETS, reset_state=state)
        agree([y, h], list(mine(other, resets=RESETS, reset_state=state)))


def test_recorded_calls_restart_from_it(agree: Agree) -> None:
    """What is measured of a call is that of the call as it was: the adjoints of its own forward pass."""
    layer = ours(build("lstm", num_layers=2))
    data = case(layer, T=T, B=4)

    class Net(torch.nn.Module):
        def __init__(self, state: Any) -> None:
            super().__init__()
            self.rnn, self.state = layer, state

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x, resets=RESETS, reset_state=self.state)[0]

    for form in FORMS:
        state = restart(data, form)
        recording = bptt.flow.record(Net(state), data.x, lambda y: (y * data.dy).sum())
        exact = bptt.gradients(layer, data.x, data.dy, resets=RESETS, reset_state=state)
        for part in (recording, recording.lanes(slice(0, 2))):
            found = bptt.gradients(
                layer,
                part.call.x,
                part.dy,
                as_hx(part.call.hx),
                resets=part.call.resets,
                reset_state=as_hx(part.call.reset_state),
            )
            agree(found.adjoints, exact.adjoints[:, : found.adjoints.shape[1]])
        survey = bptt.flow.survey(recording)
        assert survey is not None


Z = torch.zeros


BAD: dict[str, tuple[str, Any, type[Exception], str]] = {
    "number": ("GRU", 1.0, TypeError, "one tensor h: got float"),
    "pair_for_one": ("GRU", (Z(2, 3, 4), Z(2, 3, 4)), TypeError, "one tensor h: got tuple"),
    "one_for_pair": ("LSTM", Z(2, 3, 4), TypeError, r"a tuple \(h, c\): got one tensor"),
    "three": ("LSTM", (Z(2, 3, 4),) * 3, TypeError, r"a tuple \(h, c\): got tuple of \(Tensor, Tensor, Tensor\)"),
    "no_tensors": ("LSTM", (1, None), TypeError, r"got tuple of \(int, NoneType\)"),
    "units": ("GRU", Z(2, 3, 5), ValueError, r"shape \(2, 3, 4\), or \(7, 2, 3, 4\) .*got \(2, 3, 5\)"),
    "layers": ("GRU", Z(1, 3, 4), ValueError, r"got \(1, 3, 4\)"),
    "lanes": ("GRU", Z(2, 1, 4), ValueError, r"got \(2, 1, 4\)"),
    "steps": ("GRU", Z(6, 2, 3, 4), ValueError, r"got \(6, 2, 3, 4\)"),
    "batch_first": ("GRU", Z(3, 7, 2, 4), ValueError, r"got \(3, 7, 2, 4\)"),
    "no_dimension": ("GRU", Z(()), ValueError, r"got \(\)"),
    "unbatched": ("GRU", Z(2, 4), ValueError, r"got \(2, 4\)"),
    "two_forms": ("LSTM", (Z(2, 3, 4), Z(7, 2, 3, 4)), ValueError, r"\(2, 3, 4\) as h has it: got \(7, 2"),
    "c": ("LSTM", (Z(2, 3, 4), Z(2, 3, 5)), ValueError, r"\(2, 3, 4\) as h has it: got \(2, 3, 5\)"),
    "dtype": ("GRU", Z(2, 3, 4).double(), TypeError, r"input's dtype torch.float32: got torch.float64"),
    "device": ("GRU", Z(2, 3, 4, device="meta"), ValueError, "input's device cpu: got meta"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(name: str) -> None:
    kind, state, error, words = BAD[name]
    layer = getattr(bptt.nn, kind)(5, 4, 2)
    with pytest.raises(error, match=rf"{kind}: reset_state.* must .*{words}"):
        layer(torch.zeros(7, 3, 5), resets=Z(7, 3, dtype=torch.bool), reset_state=state)


def test_it_needs_resets() -> None:
    with pytest.raises(ValueError, match="GRU: reset_state is what resets restart from: got it without resets"):
        bptt.nn.GRU(5, 4)(torch.zeros(7, 3, 5), reset_state=torch.zeros(1, 3, 4))
