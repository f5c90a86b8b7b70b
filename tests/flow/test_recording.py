"""`record`: what a layer inside a model gets and what comes back to it."""

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence, pad_sequence
from torch.testing import assert_close

import bptt
from bptt.flow import lag_map, record, record_scan, watch


class Tagger(torch.nn.Module):
    def __init__(self, kind=torch.nn.LSTM, **options):
        super().__init__()
        self.embed = torch.nn.Embedding(7, 3)
        self.rnn = kind(3, 4, **options)
        self.out = torch.nn.Linear(4, 7)

    def forward(self, ids, hx=None):
        y, state = self.rnn(self.embed(ids), hx)
        return self.out(y), state


def loss(output):
    return output[0].logsumexp(-1).mean()


def ids(T=6, B=3):
    return torch.randint(7, (T, B), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", [torch.nn.LSTM, torch.nn.GRU, bptt.nn.LSTM, bptt.nn.RNN])
def test_inside_a_model(kind):
    torch.manual_seed(0)
    model = Tagger(kind)
    recording = record(model, (ids(),), loss)
    x = model.embed(ids())
    y, _ = model.rnn(x)
    y.retain_grad()
    value = loss((model.out(y),))
    value.backward()
    assert recording.name == "rnn"
    assert_close(recording.dy, y.grad)
    assert_close(recording.call.x, x.detach())
    assert recording.loss == pytest.approx(value.item())
    assert recording.weights[0].hh is model.rnn.weight_hh_l0


def test_nothing_is_changed():
    model = Tagger()
    before = {n: p.clone() for n, p in model.named_parameters()}
    random = torch.get_rng_state()
    recording = record(model, (ids(),), loss)
    lag_map(recording)
    bptt.flow.shares(recording)
    assert torch.equal(torch.get_rng_state(), random)
    assert type(model.rnn) is torch.nn.LSTM
    assert not model.rnn._forward_hooks
    for name, p in model.named_parameters():
        assert p.grad is None
        assert torch.equal(p, before[name])


def test_batch_first_and_initial_states():
    torch.manual_seed(0)
    model = Tagger(torch.nn.GRU, batch_first=True)
    h = torch.randn(1, 3, 4)
    recording = record(model, (ids().T, h), loss)
    assert recording.call.x.shape == (6, 3, 3)
    assert_close(recording.call.hx[0], h)
    plain = Tagger(torch.nn.GRU)
    plain.load_state_dict(model.state_dict())
    assert_close(recording.dy, record(plain, (ids(), h), loss).dy)


def test_packed_sequences():
    torch.manual_seed(0)
    layer = torch.nn.GRU(3, 4)
    sequences = [torch.randn(n, 3) for n in (2, 5, 3)]
    packed = pack_sequence(sequences, enforce_sorted=False)
    recording = record(layer, packed, lambda y: y.data.square().sum())
    for b, sequence in enumerate(sequences):
        n = len(sequence)
        alone = record(layer, sequence[:, None], lambda y: y.square().sum())
        assert_close(recording.dy[:n, b], alone.dy[:, 0])
        assert not recording.dy[n:, b].any()


LENGTHS = [4, 7, 1]


class Lengths(torch.nn.Module):
    """A layer on sequences of unequal lengths, in each of the forms that it takes; its loss reads padding too."""

    def __init__(self, form, layer):
        super().__init__()
        self.form, self.rnn = form, layer

    def forward(self, sequences, hx):
        if self.form == "packed":
            return self.rnn(pack_sequence(sequences, enforce_sorted=False), hx)
        if self.form == "lengths":
            x = pad_sequence(sequences, padding_value=9.0, batch_first=self.rnn.batch_first)
            return self.rnn(x, hx, lengths=torch.tensor(LENGTHS))
        if self.form == "cu_seqlens":
            ends = torch.tensor([0, *LENGTHS]).cumsum(0)
            return self.rnn(torch.cat(sequences), hx=hx, cu_seqlens=ends)
        return self.rnn(torch.nested.as_nested_tensor(sequences, layout=torch.jagged), hx)

    def loss(self, output):
        y, final = output
        y = y.data if self.form == "packed" else y.values() if self.form == "nested" else y
        return (2 * y).sin().sum() + (y + 1).sum() + final.square().sum()


@pytest.mark.parametrize("form", ["lengths", "cu_seqlens", "nested"])
@pytest.mark.parametrize("options", [{"bidirectional": True}, {"batch_first": True}], ids=str)
def test_sequences_of_unequal_lengths(form, options):
    """However a model hands them over, the record is that of the PackedSequence, and so is the doctor's."""
    torch.manual_seed(0)
    layer = bptt.nn.GRU(3, 4, dtype=torch.float64, **options)
    sequences = [torch.randn(n, 3, dtype=torch.float64) for n in LENGTHS]
    hx = torch.randn(1 + layer.bidirectional, 3, 4, dtype=torch.float64)
    found, expected = (
        record(model, (sequences, hx), model.loss) for model in (Lengths(form, layer), Lengths("packed", layer))
    )
    assert found.lengths.tolist() == LENGTHS
    assert_close(found.call.x, expected.call.x)
    assert_close((found.dy, *found.dfinal), (expected.dy, *expected.dfinal))
    model = Lengths(form, layer)
    with watch(model) as doctor:
        value = model.loss(model(sequences, hx))
        value.backward()
        assert doctor.check(value) is None
        [seen] = [call.recording() for call in doctor._calls if call.recurrent]
    assert_close((seen.dy, *seen.dfinal), (expected.dy, *expected.dfinal))


def test_sequences_without_a_step():
    layer = bptt.nn.LSTM(3, 4)
    model = Lengths("nested", layer)
    model.loss = lambda output: output[0].values().sum() + sum(s.square().sum() for s in output[1])
    recording = record(model, ([torch.randn(2, 3), torch.zeros(0, 3), torch.randn(5, 3)], None), model.loss)
    assert recording.lengths.tolist() == [2, 5]
    assert recording.dfinal[0].shape == (1, 2, 4)
    with pytest.raises(ValueError, match="GRU: a sequence must have a step for anything to be measured: got none"):
        record(bptt.nn.GRU(3, 4), torch.nested.as_nested_tensor([torch.zeros(0, 3)], layout=torch.jagged))
    with pytest.raises(ValueError, match="called on padded or packed sequences to be recorded: got nested ones or cu"):
        record_scan(
            Lengths("nested", bptt.nn.Recurrent(torch.nn.GRUCell(3, 4))), ([torch.randn(2, 3)], None), model.loss
        )


def test_a_layer_without_a_loss_gets_errors_of_norm_one():
    layer, x = bptt.nn.GRU(3, 4), torch.zeros(5, 2, 3)
    recording = record(layer, x)
    assert recording.loss is None
    assert_close(recording.dy.norm(dim=-1), torch.ones(5, 2))
    assert_close(record(layer, x).dy, recording.dy)


def test_one_of_several():
    model = torch.nn.Sequential(torch.nn.GRU(3, 4))
    pair = torch.nn.ModuleDict({"a": torch.nn.GRU(3, 4), "b": torch.nn.GRU(4, 4)})

    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = pair

        def forward(self, x):
            return self.pair["b"](self.pair["a"](x)[0])[0]

    x = torch.randn(5, 2, 3)
    with pytest.raises(ValueError, match=r"name must be one of 'pair\.a', 'pair\.b'"):
        record(Pair(), x, lambda y: y.sum())
    assert record(Pair(), x, lambda y: y.sum(), name="pair.a").call.x.shape == (5, 2, 3)
    with pytest.raises(ValueError, match=r"name must be one of .*: got 'c'"):
        record(Pair(), x, lambda y: y.sum(), name="c")
    assert record(model, x, lambda out: out[0].sum()).name == "0"


def test_bad_arguments():
    layer, x = bptt.nn.RNN(3, 4), torch.zeros(5, 2, 3)
    with pytest.raises(TypeError, match=r"subject must be a layer or a model .*: got int"):
        record(3, x)
    with pytest.raises(TypeError, match="subject must hold an RNN, GRU or LSTM layer: got Linear"):
        record(torch.nn.Linear(3, 4), x)
    with pytest.raises(ValueError, match="loss must be given for a model"):
        record(Tagger(), (ids(),))
    with pytest.raises(TypeError, match=r"loss must give a scalar tensor: got a tensor \[5, 2, 4\]"):
        record(layer, x, lambda y: y)
    with pytest.raises(ValueError, match="must depend on the output"):
        record(layer, x, lambda y: torch.ones((), requires_grad=True))
    with pytest.raises(TypeError, match="batch must be given"):
        lag_map(layer)
    with pytest.raises(TypeError, match="a Recording has its own"):
        lag_map(record(layer, x), x)

    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = layer

        def forward(self, x):
            y, h = self.rnn(x)
            return self.rnn(x, h)[0] + y

    with pytest.raises(ValueError, match="must run once in a call: it ran 2 times"):
        record(Twice(), x, lambda y: y.sum())


@pytest.mark.parametrize("kind", [bptt.nn.GRU, bptt.nn.LSTM])
def test_the_first_lanes(kind):
    """They are measured as if they were alone."""
    torch.manual_seed(0)
    layer = kind(3, 4, num_layers=2)
    sequences = [torch.randn(n, 3) for n in (5, 4, 6)]
    packed = pack_sequence(sequences, enforce_sorted=False)
    whole = record(layer, packed, lambda y: y.data.square().sum())
    two = whole.lanes(slice(2))
    alone = record(layer, pack_sequence(sequences[:2], enforce_sorted=False), lambda y: y.data.square().sum())
    assert (two.B, whole.B) == (2, 3)
    assert_close(two.dy[:5], alone.dy)
    measured, expected = lag_map(two).norm[:, :5, :5], lag_map(alone).norm
    assert_close(torch.tensor(measured), torch.tensor(expected), equal_nan=True)


class Scaled(Tagger):
    def __init__(self, in_place):
        super().__init__(torch.nn.GRU)
        self.in_place = in_place

    def forward(self, ids):
        y, state = self.rnn(input=self.embed(ids))
        if self.in_place:
            y *= 5
        else:
            y = y * 5
        return self.out(y), state


def test_an_output_changed_in_place_is_refused():
    torch.manual_seed(0)
    assert record(Scaled(in_place=False), ids(), loss).dy.any()
    with pytest.raises(ValueError, match="changes the output of 'rnn' in place"):
        record(Scaled(in_place=True), ids(), loss)
