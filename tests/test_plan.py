"""What `plan` tells beforehand is what a call then keeps."""

import pytest
import torch

import bptt

T, B, I, H = 300, 4, 5, 16

NETS = {
    "rnn": (bptt.nn.RNN, {}),
    "gru": (bptt.nn.GRU, {"num_layers": 2}),
    "lstm": (bptt.nn.LSTM, {}),
    "projected": (bptt.nn.LSTM, {"num_layers": 3, "proj_size": 7}),
    "both ways": (bptt.nn.GRU, {"num_layers": 2, "bidirectional": True}),
    "batch first": (bptt.nn.LSTM, {"num_layers": 2, "batch_first": True, "dropout": 0.0}),
}
MEMORIES = ["auto", "gates", "states", "checkpoints", "checkpoints:steps=20", "checkpoints:bytes=60000"]


def kept(layer):
    """Bytes that a forward call leaves alive beyond x, y and the parameters."""
    found = {}

    def pack(t):
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(), t
        return t

    x = torch.randn(B, T, I) if layer.batch_first else torch.randn(T, B, I)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y, final = layer(x)
    states = final if isinstance(final, tuple) else (final,)
    own = {t.untyped_storage().data_ptr() for t in (x, y, *states, *layer.parameters())}
    return sum(size for at, (size, _) in found.items() if at not in own)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("net", NETS)
def test_bytes(net, memory):
    kind, options = NETS[net]
    if net == "both ways" and "bytes" in memory:  # less than what lies between its layers
        memory = "checkpoints:bytes=200000"
    layer = kind(I, H, memory=memory, **options)
    told = bptt.plan(layer, T, B)
    measured = kept(layer)
    if memory.startswith("checkpoints"):
        taped = layer.cell().taped(type("W", (), {"hh": layer.weight_hh_l0})())
        one = sum(s.shape[-1] for s in _states(layer)) + taped
        layers = 1 if layer.bidirectional else layer.num_layers
        measured += 4 * B * layers * one * told.steps
    assert told.tape_bytes == pytest.approx(measured, rel=0.1, abs=4000)
    assert told.memory == memory
    assert (told.recomputed > 0) == memory.startswith("checkpoints")


def _states(layer):
    x = torch.zeros(1, 1, I)
    final = layer(x)[1]
    return final if isinstance(final, tuple) else (final,)


def test_less_memory_takes_more_recomputation():
    layer = bptt.nn.LSTM(I, H)
    plans = [bptt.plan(layer, 10_000, B, memory=f"checkpoints:bytes={n}") for n in (10**7, 10**6, 10**5, 3 * 10**4)]
    assert [p.tape_bytes for p in plans] == sorted((p.tape_bytes for p in plans), reverse=True)
    again = [p.recomputed for p in plans]
    assert again[0] == again[1] == 1
    assert 1 < again[2] < again[3]


def test_nothing_is_changed():
    model = torch.nn.ModuleDict({"a": bptt.nn.GRU(I, H, gradient="randomized:0.5"), "b": bptt.nn.LSTM(H, H, dropout=0)})
    before, random = [p.clone() for p in model.parameters()], torch.get_rng_state()
    told = bptt.plan(model, 50, 2)
    assert told.seconds > 0
    assert told.tape_bytes == sum(bptt.plan(layer, 50, 2).tape_bytes for layer in model.values())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None and torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert model.training
    assert [layer.memory for layer in model.values()] == ["auto", "auto"]


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"model must hold a bptt\.nn layer: got Linear"):
        bptt.plan(torch.nn.Linear(2, 3), 5, 1)
    with pytest.raises(ValueError, match="T must be at least 1: got 0"):
        bptt.plan(bptt.nn.GRU(2, 3), 0, 1)
    with pytest.raises(ValueError, match="bytes must hold the tape of a step"):
        bptt.plan(bptt.nn.GRU(2, 3), 5, 1, memory="checkpoints:bytes=3")
