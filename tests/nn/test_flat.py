"""Sequences one after the other (cu_seqlens, jagged nested tensors) and padded with lengths: as each sequence alone."""

from typing import Any

import pytest
import torch
from reference import as_tuple
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence, pad_sequence

import bptt

I, H = 3, 4
LENGTHS = (5, 0, 9, 1, 5, 0, 3)

LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn": ("RNN", {"gradient": "truncated:3"}),
    "sigmoid": ("RNN", {"nonlinearity": "sigmoid", "num_layers": 2, "gradient": "chunked:2"}),
    "gru": ("GRU", {"num_layers": 2, "bidirectional": True, "gradient": "truncated:4/2"}),
    "gru_first": ("GRU", {"batch_first": True, "gradient": "truncated:5/3", "bias": False}),
    "gru_full": ("GRU", {"num_layers": 2}),
    "lstm": ("LSTM", {"num_layers": 2, "gradient": "truncated:4", "memory": "states"}),
    "lstm_chunked": ("LSTM", {"bidirectional": True, "gradient": "chunked:3", "kernel": "eager"}),
    "lstm_projected": ("LSTM", {"num_layers": 2, "proj_size": 2, "bidirectional": True}),
    "gru_fused": ("GRU", {"kernel": "fused", "gradient": "chunked:3", "num_layers": 2}),
    "lstm_checkpoints": ("LSTM", {"memory": "checkpoints:steps=2", "gradient": "truncated:3"}),
}


def layer_of(name: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    kind, own = LAYERS[name]
    return getattr(bptt.nn, kind)(I, H, dtype=torch.float64, **{**own, **settings})


def batch(layer: Any, lengths: tuple[int, ...] = LENGTHS) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """The sequences, and a first state of each."""
    torch.manual_seed(1)
    K = layer.num_layers * (2 if layer.bidirectional else 1)
    sizes = (layer.proj_size or H, H)[: layer.cell().states]
    states = tuple(torch.randn(K, len(lengths), n, dtype=torch.float64).requires_grad_() for n in sizes)
    return [torch.randn(n, I, dtype=torch.float64) for n in lengths], states


def bare(states: tuple[Tensor, ...]) -> Any:
    return states[0] if len(states) == 1 else states


def offsets_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def gradients(layer: Any, out: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Of a loss that every output has a part in, with weights of its own."""
    torch.manual_seed(2)
    loss = sum((t * torch.randn_like(t)).sum() for t in out)
    found = torch.autograd.grad(loss, [*inputs, *layer.parameters()], allow_unused=True)
    return [*(t.detach() for t in out), *(g for g in found if g is not None)]


def alone(layer: Any, sequences: list[Tensor], states: tuple[Tensor, ...] | None) -> tuple[list[Tensor], list[Tensor]]:
    """(the outputs of a loop over the sequences, its inputs)."""
    xs = [x.clone().requires_grad_() for x in sequences]
    K, sizes = layer.num_layers * (2 if layer.bidirectional else 1), (layer.proj_size or H, H)[: layer.cell().states]
    ys, finals = [], []
    for i, x in enumerate(xs):
        own = None if states is None else tuple(state[:, i : i + 1] for state in states)
        if len(x) == 0:
            finals.append(own or tuple(x.new_zeros(K, 1, n) for n in sizes))
            continue
        y, final = layer(x[None] if layer.batch_first else x[:, None], None if own is None else bare(own))
        ys.append(y.flatten(0, 1))
        finals.append(as_tuple(final))
    return [torch.cat(ys), *(torch.cat(part, 1) for part in zip(*finals, strict=True))], xs


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_flat_sequences_are_each_sequence_alone(name: str, given: bool) -> None:
    layer = layer_of(name)
    sequences, hx = batch(layer)
    expected, xs = alone(layer, sequences, hx if given else None)
    states = list(hx) if given else []
    of_each = gradients(layer, expected, [*xs, *states])
    x = torch.cat(sequences).requires_grad_()
    y, final = layer(x, bare(hx) if given else None, cu_seqlens=offsets_of(LENGTHS).int())
    found = gradients(layer, [y, *as_tuple(final)], [x, *states])
    count = 1 + len(hx)
    whole = torch.cat(of_each[count : count + sum(map(bool, LENGTHS))])  # an empty one has no part in it
    torch.testing.assert_close(found[:count], of_each[:count])
    torch.testing.assert_close(found[count], whole)
    torch.testing.assert_close(found[count + 1 :], of_each[-len(found[count + 1 :]) :])


@pytest.mark.parametrize("name", ["gru", "gru_first", "lstm"])
def test_a_jagged_tensor_is_a_flat_one(name: str) -> None:
    layer = layer_of(name)
    sequences, hx = batch(layer)
    flat = torch.cat(sequences).requires_grad_()
    y, final = layer(flat, bare(hx), cu_seqlens=offsets_of(LENGTHS))
    expected = gradients(layer, [y, *as_tuple(final)], [flat, *hx])
    values = flat.detach().clone().requires_grad_()
    jagged = torch.nested.nested_tensor_from_jagged(values, offsets=offsets_of(LENGTHS))
    out, final = layer(jagged, bare(hx))
    assert out.layout is torch.jagged
    assert [len(part) for part in out.unbind()] == list(LENGTHS)
    torch.testing.assert_close(gradients(layer, [out.values(), *as_tuple(final)], [values, *hx]), expected)
    projected = torch.nn.functional.linear(jagged, torch.randn(out.shape[2], I, dtype=torch.float64))
    assert (out + projected).shape == out.shape  # of one ragged size with its input


@pytest.mark.parametrize("bidirectional", [False, True])
def test_random_factors_are_those_of_a_packed_sequence(bidirectional: bool) -> None:
    layer = layer_of("gru_full", gradient="randomized:0.6", bidirectional=bidirectional)
    lengths = tuple(n for n in LENGTHS if n)
    sequences, hx = batch(layer, lengths)
    results = []
    for form in ("packed", "flat"):
        x = torch.cat(sequences).requires_grad_()
        torch.manual_seed(3)
        if form == "packed":
            packed, final = layer(pack_sequence(x.split(list(lengths)), enforce_sorted=False), *hx)
            padded, _ = torch.nn.utils.rnn.pad_packed_sequence(packed)
            y = torch.cat([padded[:n, i] for i, n in enumerate(lengths)])
        else:
            y, final = layer(x, *hx, cu_seqlens=offsets_of(lengths))
        results.append(gradients(layer, [y, final], [x, *hx]))
    torch.testing.assert_close(*results)


def test_resets_of_flat_sequences() -> None:
    """One for each row, with a state to restart from for each sequence."""
    for name in ("gru", "gru_first", "lstm"):
        layer = layer_of(name)
        sequences, hx = batch(layer)
        resets, restart = torch.rand(sum(LENGTHS)) < 0.3, tuple(torch.randn_like(s) for s in hx)
        y, final = layer(
            torch.cat(sequences), bare(hx), cu_seqlens=offsets_of(LENGTHS), resets=resets, reset_state=bare(restart)
        )
        rows, own = y.split(list(LENGTHS)), resets.split(list(LENGTHS))
        for i, x in enumerate(sequences):
            if len(x):
                first = bare(tuple(s[:, i] for s in hx))
                alone, last = layer(x, first, resets=own[i], reset_state=bare(tuple(s[:, i] for s in restart)))
                torch.testing.assert_close(rows[i], alone)
                torch.testing.assert_close(tuple(s[:, i] for s in as_tuple(final)), as_tuple(last))


@pytest.mark.parametrize("name", ["rnn", "gru", "gru_first", "lstm_projected", "lstm_checkpoints"])
def test_gradients_of_flat_sequences_are_those_of_autograd(name: str) -> None:
    layer = layer_of(name)
    sequences, hx = batch(layer)
    x, offsets = torch.cat(sequences).requires_grad_(), offsets_of(LENGTHS)
    out = (y := layer(x, bare(hx), cu_seqlens=offsets))[0], *as_tuple(y[1])
    dy, *dh_n = (torch.randn_like(t) for t in out)
    expected = torch.autograd.grad(out, [x, *hx, *layer.parameters()], [dy, *dh_n])
    plain, given = x.detach(), bare(tuple(h.detach() for h in hx))
    grads = bptt.gradients(layer, plain, dy, given, bare(tuple(dh_n)), cu_seqlens=offsets)
    torch.testing.assert_close((grads.x, *as_tuple(grads.hx), *grads.parameters.values()), expected)
    long = LENGTHS.index(max(LENGTHS))
    lane = x.detach().split(list(LENGTHS))[long], dy.split(list(LENGTHS))[long]
    own = (bare(tuple(s[:, long].detach() for s in part)) for part in (hx, dh_n))
    alone = bptt.gradients(layer, *lane, *own)
    torch.testing.assert_close(grads.adjoints[:, long], alone.adjoints[:, 0])
    given_all = (layer, plain, dy, given, bare(tuple(dh_n)))
    of_each = bptt.gradients(*given_all, cu_seqlens=offsets, per_sample=True).parameters
    for weight, each in of_each.items():
        torch.testing.assert_close(each.sum(0), grads.parameters[weight])
        torch.testing.assert_close(each[long], alone.parameters[weight])
        assert not each[LENGTHS.index(0)].any()
    assert grads.adjoints.shape == (max(LENGTHS), len(LENGTHS), dy.shape[1])
    assert not grads.adjoints[:, LENGTHS.index(0)].any()
    if grads.x.shape[1] == I and name == "gru":
        jagged = [torch.nested.nested_tensor_from_jagged(t, offsets=offsets) for t in (plain, dy)]
        found = bptt.gradients(layer, *jagged, given, bare(tuple(dh_n)))
        assert found.x.layout is torch.jagged
        torch.testing.assert_close(found.x.values(), grads.x)
        other = torch.nested.nested_tensor_from_jagged(dy, offsets=torch.tensor([0, len(dy)]))
        with pytest.raises(ValueError, match="dy must have the offsets of the input"):
            bptt.gradients(layer, jagged[0], other, given)
        with pytest.raises(TypeError, match="dy must be a jagged nested tensor"):
            bptt.gradients(layer, jagged[0], dy, given)


def test_gradients_of_flat_sequences_without_a_step_and_of_resets() -> None:
    layer = layer_of("lstm")
    _, hx = batch(layer, (0, 0))
    none = torch.zeros(3, dtype=torch.int32)
    grads = bptt.gradients(layer, torch.zeros(0, I).double(), None, hx, (None, hx[1].detach()), cu_seqlens=none)
    assert grads.x.shape == (0, I)
    assert grads.adjoints.shape == (0, 2, H)
    torch.testing.assert_close(grads.hx, (torch.zeros_like(hx[0]), hx[1].detach()))
    assert not any(g.any() for g in grads.parameters.values())
    of_each = bptt.gradients(layer, torch.zeros(0, I).double(), None, hx, None, cu_seqlens=none, per_sample=True)
    assert of_each.parameters["bias_hh_l0"].shape == (2, 4 * H)
    with pytest.raises(ValueError, match=r"dh_n must have 2 tensor\(s\), one per final state: got 1"):
        bptt.gradients(layer, torch.zeros(0, I).double(), None, None, (hx[0].detach(),), cu_seqlens=none)
    layer, (sequences, hx) = layer_of("gru"), batch(layer_of("gru"))
    resets, restart = torch.rand(sum(LENGTHS)) < 0.3, torch.randn_like(hx[0]).requires_grad_()
    x, keywords = torch.cat(sequences), {"cu_seqlens": offsets_of(LENGTHS), "resets": resets}
    y, _ = layer(x, *hx, reset_state=restart, **keywords)
    expected = torch.autograd.grad(y, [*hx, restart], torch.ones_like(y))
    found = bptt.gradients(layer, x, torch.ones_like(y).detach(), *hx, reset_state=restart, **keywords)
    torch.testing.assert_close((found.hx, found.reset_state), expected)
    for wrong, error, said in (
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "cu_seqlens must rise from 0 to input's 23 rows"),
        ({"cu_seqlens": [0, 23]}, TypeError, "cu_seqlens must be a tensor of whole numbers: got list"),
        ({"dy": torch.ones(22, 8).double()}, ValueError, r"dy must have shape \[23, D\*P\]"),
        ({"dh_n": torch.ones(4, 2, H).double()}, ValueError, "dh_n must hold a state for each of 7 sequences"),
    ):
        with pytest.raises(error, match=said):
            bptt.gradients(layer, **{"x": x, "dy": None, "cu_seqlens": offsets_of(LENGTHS), **wrong})


def test_no_sequence_with_a_step() -> None:
    layer = layer_of("lstm")
    _, hx = batch(layer, (0, 0))
    x = torch.zeros(0, I, dtype=torch.float64, requires_grad=True)
    for offsets, states in ((offsets_of((0, 0)), hx), (torch.tensor([0]), None)):
        y, final = layer(x, states, cu_seqlens=offsets)
        assert y.shape == (0, H)
        assert [s.shape[1] for s in final] == [len(offsets) - 1] * 2
        y.sum().backward()
        assert states is None or torch.equal(final[0], hx[0])


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_a_compiled_call_runs() -> None:
    layer = layer_of("lstm")
    sequences, hx = batch(layer)
    x, offsets = torch.cat(sequences), offsets_of(LENGTHS)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: layer(x, hx, cu_seqlens=offsets)[0] * 2, backend="eager")
    torch.testing.assert_close(compiled(x), 2 * layer(x, hx, cu_seqlens=offsets)[0])


WRONG: dict[str, tuple[Any, str]] = {
    "list": (lambda m, x: m(x, cu_seqlens=[0, 4]), "cu_seqlens must be a tensor of whole numbers: got list"),
    "float": (lambda m, x: m(x, cu_seqlens=torch.zeros(2)), "cu_seqlens must be int32 or int64: got torch.float32"),
    "none": (lambda m, x: m(x, cu_seqlens=torch.zeros(0).long()), r"cu_seqlens must have shape \[N \+ 1\]"),
    "end": (lambda m, x: m(x, cu_seqlens=torch.tensor([0, 3])), "must rise from 0 to input's 4 rows"),
    "start": (lambda m, x: m(x, cu_seqlens=torch.tensor([1, 4])), "must rise from 0 to input's 4 rows"),
    "falls": (lambda m, x: m(x, cu_seqlens=torch.tensor([0, 3, 2, 4])), "must rise from 0 to input's 4 rows"),
    "batched": (lambda m, x: m(x[None], cu_seqlens=torch.tensor([0, 4])), r"input must have shape \[S, I\]"),
    "lanes": (lambda m, x: m(x, torch.zeros(4, 3, H), cu_seqlens=torch.tensor([0, 4])), "hx must hold a state for"),
    "lengths": (lambda m, x: m(x, cu_seqlens=torch.tensor([0, 4]), lengths=[4]), "lengths must be None"),
    "packed": (lambda m, x: m(pack_sequence([x]), cu_seqlens=torch.tensor([0, 4])), "cu_seqlens must be None"),
    "resets": (lambda m, x: m(x, cu_seqlens=torch.tensor([0, 4]), resets=torch.zeros(3).bool()), "resets must be"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named(name: str) -> None:
    call, words = WRONG[name]
    with pytest.raises((TypeError, ValueError), match=words):
        call(layer_of("gru"), torch.randn(4, I, dtype=torch.float64))


# Padded, with lengths


@pytest.mark.parametrize("lengths", [(5, 2, 9, 1, 3), (4, 4), (3, 6)])
@pytest.mark.parametrize("name", LAYERS)
def test_lengths_are_each_sequence_alone(name: str, lengths: tuple[int, ...]) -> None:
    """Padding is not read, and y is zero there; also where all sequences end before the padding does."""
    layer = layer_of(name)
    sequences, hx = batch(layer, lengths)
    expected, xs = alone(layer, sequences, hx)
    of_each = gradients(layer, expected, [*xs, *hx])
    x = pad_sequence([*sequences, torch.zeros(max(lengths) + 2, I)], padding_value=torch.nan)[:, :-1].requires_grad_()
    y, final = layer(x.transpose(0, 1) if layer.batch_first else x, bare(hx), lengths=torch.tensor(lengths))
    y = y.transpose(0, 1) if layer.batch_first else y
    assert all((y[n:, i] == 0).all() for i, n in enumerate(lengths))
    rows = torch.cat([y[:n, i] for i, n in enumerate(lengths)])
    found = gradients(layer, [rows, *as_tuple(final)], [x, *hx])
    count = 1 + len(hx)
    torch.testing.assert_close(found[:count], of_each[:count])
    for i, n in enumerate(lengths):
        torch.testing.assert_close(found[count][:n, i], of_each[count + i])
        assert (found[count][n:, i] == 0).all()
    torch.testing.assert_close(found[count + 1 :], of_each[count + len(lengths) :])
