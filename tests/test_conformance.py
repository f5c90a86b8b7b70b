"""`bptt.nn` with the full gradient is `torch.nn`: every constructor and forward variant, every output and gradient."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import CELLS, NETS, Case, as_hx, as_tuple, build, case, gradients, measure, ours
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import bptt

Agree = Callable[..., None]

MEMORIES = ("auto", "gates", "states")
KINDS = ("RNN", "GRU", "LSTM")

CONSTRUCTORS: dict[str, dict[str, Any]] = {
    **NETS,
    "no_bias": {"bias": False},
    "no_bias_bi_two": {"bias": False, "num_layers": 2, "bidirectional": True},
    "batch_first": {"batch_first": True},
    "batch_first_bi_two": {"batch_first": True, "num_layers": 2, "bidirectional": True},
}

SIZES = {  # T, B, I, H
    "one_step": (1, 3, 5, 4),
    "one_lane": (7, 1, 5, 4),
    "one_of_all": (1, 1, 1, 3),
    "one_input": (5, 2, 1, 7),
    "wide_input": (6, 2, 13, 3),
    "wide_state": (3, 5, 2, 17),
    "long": (33, 2, 3, 5),
}

LENGTHS = {
    "sorted": (7, 5, 5, 2),
    "unsorted": (2, 7, 5, 5),
    "equal": (7, 7, 7),
    "ones": (1, 7, 1),
    "single": (7,),
}

each_cell = pytest.mark.parametrize("cell", CELLS)
each_net = pytest.mark.parametrize("net", NETS)


# The reference itself


@each_cell
@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_reference_is_torch(cell: str, constructor: str, agree: Agree) -> None:
    layer = build(cell, **CONSTRUCTORS[constructor])
    data = case(layer)
    expected = measure(layer, data)
    actual = gradients(layer, data.x, data.initial, data.dy, data.dfinal, bptt.Full())
    agree(actual.values(), expected.values())


@each_cell
@each_net
def test_reference_of_packed_is_torch(cell: str, net: str, agree: Agree) -> None:
    layer = build(cell, **NETS[net])
    data = case(layer, B=4)
    expected = measure(layer, data, packed=LENGTHS["unsorted"])
    actual = gradients(layer, data.x, data.initial, data.dy, data.dfinal, bptt.Full(), lengths=LENGTHS["unsorted"])
    agree(actual.values(), expected.values())


# Constructor and forward variants


@each_cell
@pytest.mark.parametrize("constructor", CONSTRUCTORS)
@pytest.mark.parametrize("memory", MEMORIES)
def test_constructor(cell: str, constructor: str, memory: str, agree: Agree) -> None:
    theirs = build(cell, **CONSTRUCTORS[constructor])
    data = case(theirs)
    agree(measure(ours(theirs, memory=memory), data).values(), measure(theirs, data).values())


@each_cell
@each_net
def test_initial_state_left_out(cell: str, net: str, agree: Agree) -> None:
    theirs = build(cell, **NETS[net])
    data = case(theirs)
    agree(measure(ours(theirs), data, hx=False).values(), measure(theirs, data, hx=False).values())


@each_cell
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("memory", ["gates", "states"])
def test_size(cell: str, size: str, memory: str, agree: Agree) -> None:
    T, B, I, H = SIZES[size]
    theirs = build(cell, I, H, num_layers=2, bidirectional=True)
    data = case(theirs, T, B)
    agree(measure(ours(theirs, memory=memory), data).values(), measure(theirs, data).values())


@each_cell
@pytest.mark.parametrize("net", ["one", "bi_two"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("hx", [False, True])
def test_unbatched(cell: str, net: str, batch_first: bool, hx: bool, agree: Agree) -> None:
    theirs = build(cell, batch_first=batch_first, **NETS[net])
    data = case(theirs, B=1)

    def run(layer: Any) -> list[Any]:
        x = data.x[:, 0].clone().requires_grad_()
        initial = tuple(z[:, 0].clone().requires_grad_() for z in data.initial)
        y, final = layer(x, as_hx(initial) if hx else None)
        loss = (y * data.dy[:, 0]).sum()
        for z, dz in zip(as_tuple(final), data.dfinal, strict=True):
            loss = loss + (z * dz[:, 0]).sum()
        leaves = [*layer.parameters(), x, *(initial if hx else ())]
        return [y, as_tuple(final), torch.autograd.grad(loss, leaves)]

    agree(run(ours(theirs)), run(theirs))


@each_cell
@each_net
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("hx", [False, True])
def test_packed(cell: str, net: str, lengths: str, hx: bool, agree: Agree) -> None:
    theirs = build(cell, **NETS[net])
    data = case(theirs, B=len(LENGTHS[lengths]))
    memory = "states" if hx else "gates"
    actual = measure(ours(theirs, memory=memory), data, packed=LENGTHS[lengths], hx=hx)
    agree(actual.values(), measure(theirs, data, packed=LENGTHS[lengths], hx=hx).values())


@each_cell
@pytest.mark.parametrize("net", ["two", "bi"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_packed_without_permutation(cell: str, net: str, batch_first: bool, agree: Agree) -> None:
    theirs = build(cell, batch_first=batch_first, **NETS[net])
    data = case(theirs, B=4)
    how = {"packed": LENGTHS["sorted"], "enforce_sorted": True}
    agree(measure(ours(theirs), data, **how).values(), measure(theirs, data, **how).values())


@each_cell
@pytest.mark.parametrize("net", ["two", "bi_two"])
def test_packed_batch_first(cell: str, net: str, agree: Agree) -> None:
    theirs = build(cell, batch_first=True, **NETS[net])
    data = case(theirs, B=4)
    actual = measure(ours(theirs), data, packed=LENGTHS["unsorted"])
    agree(actual.values(), measure(theirs, data, packed=LENGTHS["unsorted"]).values())


@each_cell
def test_packed_sequence_of_pieces(cell: str, agree: Agree) -> None:
    """Sequences packed as they are, without padding: the data itself is the leaf."""
    theirs = build(cell, num_layers=2, bidirectional=True)
    pieces = [torch.randn(n, 5, dtype=torch.float64) for n in (3, 6, 1)]

    def run(layer: Any) -> list[Any]:
        packed = pack_sequence(pieces, enforce_sorted=False)
        data = packed.data.clone().requires_grad_()
        y, final = layer(PackedSequence(data, *packed[1:]))
        loss = (y.data * torch.arange(1.0, y.data.numel() + 1, dtype=torch.float64).view_as(y.data).cos()).sum()
        return [y.data, as_tuple(final), torch.autograd.grad(loss, [data, *layer.parameters()])]

    agree(run(ours(theirs)), run(theirs))


def test_packed_padding_may_overflow(agree: Agree) -> None:
    """Whatever would happen after a sequence's last step does not: no infinity from there meets a zero."""
    theirs = build("relu", I=3, H=3)
    with torch.no_grad():
        theirs.weight_hh_l0.copy_(1e50 * torch.eye(3, dtype=torch.float64))
        theirs.weight_ih_l0.copy_(torch.eye(3))
        theirs.bias_ih_l0.zero_()
        theirs.bias_hh_l0.zero_()
    data = case(theirs, T=12, B=2)
    data.x.zero_()
    data.x[0, 0] = 1
    for z in data.initial:
        z.zero_()
    expected = measure(theirs, data, packed=(3, 12))
    for g in (*expected.parameters.values(), expected.x):
        torch.testing.assert_close(g, g.nan_to_num())
    for policy in ("full", "truncated:12/12", "truncated:12"):
        agree(measure(ours(theirs, gradient=policy), data, packed=(3, 12)).values(), expected.values(), policy)


@each_cell
@pytest.mark.parametrize("memory", ["gates", "states"])
def test_non_contiguous(cell: str, memory: str, agree: Agree) -> None:
    theirs = build(cell, num_layers=2, bidirectional=True)
    data = case(theirs, T=7, B=3)
    strided = Case(
        data.x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        tuple(z.repeat_interleave(2, -1)[..., ::2] for z in data.initial),
        data.dy.transpose(0, 2).contiguous().transpose(0, 2),
        tuple(z.transpose(0, 1).contiguous().transpose(0, 1) for z in data.dfinal),
    )
    assert not any(z.is_contiguous() for z in (strided.x, *strided.initial, strided.dy, *strided.dfinal))
    expected = measure(theirs, data)
    layer = ours(theirs, memory=memory)
    for p in layer.parameters():  # weights stored transposed
        p.data = p.data.t().contiguous().t() if p.dim() == 2 else p.data.repeat_interleave(2)[::2]

    def run() -> list[Tensor]:
        x = strided.x.detach().requires_grad_()
        initial = tuple(z.detach().requires_grad_() for z in strided.initial)
        y, final = layer(x, as_hx(initial))
        leaves = [*layer.parameters(), x, *initial]
        return list(torch.autograd.grad([y, *as_tuple(final)], leaves, [strided.dy, *strided.dfinal]))

    agree(run(), [*expected.parameters.values(), expected.x, *expected.initial])


@each_cell
def test_expanded_cotangent_and_input(cell: str, agree: Agree) -> None:
    """Stride 0: `y.sum()` sends an expanded cotangent; the lanes share one input."""
    theirs = build(cell, num_layers=2)

    def run(layer: Any) -> list[Any]:
        x = torch.linspace(-1, 1, 35, dtype=torch.float64).view(7, 1, 5).requires_grad_()
        y, final = layer(x.expand(7, 3, 5))
        (y.sum() + sum(z.sum() for z in as_tuple(final))).backward()
        return [y, x.grad, [p.grad for p in layer.parameters()]]

    agree(run(ours(theirs)), run(theirs))


@each_cell
@pytest.mark.parametrize("net", ["one", "two", "bi_two"])
@pytest.mark.parametrize("memory", ["gates", "states"])
def test_float32(cell: str, net: str, memory: str, agree: Agree) -> None:
    theirs = build(cell, 7, 9, dtype=torch.float32, **NETS[net])
    data = case(theirs, T=11, B=5)
    actual = measure(ours(theirs, memory=memory), data)
    wide = Case(*(z.double() if isinstance(z, Tensor) else tuple(s.double() for s in z) for z in vars(data).values()))
    expected = measure(copy.deepcopy(theirs).double(), wide)
    for z in (actual.y, *actual.final, actual.x, *actual.initial, *actual.parameters.values()):
        assert z.dtype == torch.float32
    agree(actual.values(), expected.values())


@each_cell
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("policy", ["full", "truncated:3/2"])
def test_half_precision(cell: str, dtype: torch.dtype, policy: str, agree: Agree) -> None:
    """A layer whose weights are of 16 bits computes in them."""
    theirs = build(cell, dtype=dtype, num_layers=2)
    data = case(theirs)
    wide = Case(*(z.double() if isinstance(z, Tensor) else tuple(s.double() for s in z) for z in vars(data).values()))
    actual = measure(ours(theirs, gradient=policy), data)
    expected = measure(ours(copy.deepcopy(theirs).double(), gradient=policy), wide)
    for z in (actual.y, *actual.final, actual.x, *actual.initial, *actual.parameters.values()):
        assert z.dtype == dtype
    agree(actual.values(), expected.values())


@each_cell
@pytest.mark.parametrize("which", ["y", "h", "c", "one_step"])
@pytest.mark.parametrize("net", ["two", "bi_two"])
def test_cotangent_of_one_output_only(cell: str, which: str, net: str, agree: Agree) -> None:
    """The other outputs receive no cotangent at all (None, not zeros)."""
    theirs = build(cell, **NETS[net])
    data = case(theirs)

    def run(layer: Any) -> tuple[Tensor, ...]:
        x = data.x.clone().requires_grad_()
        y, final = layer(x)
        state = as_tuple(final)
        out, cotangent = {
            "y": (y, data.dy),
            "h": (state[0], data.dfinal[0]),
            "c": (state[-1], data.dfinal[-1]),
            "one_step": (y[4], data.dy[4]),
        }[which]
        return torch.autograd.grad(out, [x, *layer.parameters()], cotangent)

    agree(run(ours(theirs)), run(theirs))


@each_cell
@pytest.mark.parametrize("net", ["three", "bi_two"])
@pytest.mark.parametrize("p", [0.4, 1.0])
@pytest.mark.parametrize("layout", ["time_first", "batch_first", "unbatched"])
def test_dropout_between_layers(cell: str, net: str, p: float, layout: str, agree: Agree) -> None:
    """The same seed gives the same mask as in torch.nn; a second call, another one; eval mode, none."""
    theirs = build(cell, dropout=p, batch_first=layout == "batch_first", **NETS[net])
    mine = ours(theirs)
    data = case(theirs, B=4)

    def run(layer: Any) -> list[Any]:
        torch.manual_seed(3)
        if layout == "unbatched":
            outs = []
            for lane in (0, 1):
                x = data.x[:, lane].clone().requires_grad_()
                y, final = layer(x)
                loss = (y * data.dy[:, lane]).sum()
                outs += [y, as_tuple(final), torch.autograd.grad(loss, [x, *layer.parameters()])]
            return outs
        return [measure(layer, data).values() for _ in range(2)]

    agree(run(mine), run(theirs))
    mine.eval()
    theirs.eval()
    agree(run(mine), run(theirs))


@each_cell
@pytest.mark.parametrize("net", ["two", "bi_two"])
@pytest.mark.parametrize("p", [0.4, 1.0])
@pytest.mark.parametrize("lengths", ["sorted", "unsorted"])
def test_dropout_between_layers_packed(cell: str, net: str, p: float, lengths: str, agree: Agree) -> None:
    theirs = build(cell, dropout=p, **NETS[net])
    data = case(theirs, B=4)

    def run(layer: Any) -> Any:
        torch.manual_seed(3)
        return measure(layer, data, packed=LENGTHS[lengths]).values()

    agree(run(ours(theirs)), run(theirs))


@each_cell
@pytest.mark.parametrize("net", ["one", "bi_two"])
@pytest.mark.parametrize("shape", [(3, 0, 5), (1, 0, 5)])
def test_empty_batch(cell: str, net: str, shape: tuple[int, ...], agree: Agree) -> None:
    theirs = build(cell, **NETS[net])
    T, B, _ = shape
    data = case(theirs, T=T, B=B)
    agree(measure(ours(theirs), data).values(), measure(theirs, data).values())
    for policy in ("truncated:2", "chunked:2", "randomized:0.5"):
        agree(measure(ours(theirs, gradient=policy), data).values(), measure(theirs, data).values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 2, 5), (0, 5), (0, 0, 5)])
def test_no_steps_raises_as_torch_does(kind: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match="sequence length") as theirs:
        getattr(nn, kind)(5, 4)(torch.zeros(shape))
    with pytest.raises(theirs.type, match="sequence length"):
        getattr(bptt.nn, kind)(5, 4)(torch.zeros(shape))


# Modules


@each_cell
@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_state_dict_both_ways(cell: str, constructor: str, agree: Agree) -> None:
    theirs = build(cell, **CONSTRUCTORS[constructor])
    mine = ours(build(cell, seed=1, **CONSTRUCTORS[constructor]))
    assert list(mine.state_dict()) == list(theirs.state_dict())
    mine.load_state_dict(theirs.state_dict(), strict=True)
    agree(dict(mine.state_dict()), dict(theirs.state_dict()), tolerance=0)
    other = build(cell, seed=2, **CONSTRUCTORS[constructor])
    other.load_state_dict(mine.state_dict(), strict=True)
    agree(dict(other.state_dict()), dict(theirs.state_dict()), tolerance=0)


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_initial_weights(kind: str, agree: Agree) -> None:
    made = []
    for home in (nn, bptt.nn):
        torch.manual_seed(4)
        made.append(getattr(home, kind)(5, 4, 2, bidirectional=True))
    theirs, mine = made
    agree(dict(mine.state_dict()), dict(theirs.state_dict()), tolerance=0)


POSITIONAL = {
    "RNN": (5, 4, 2, "relu", False, True, 0.25, True),
    "GRU": (5, 4, 2, False, True, 0.25, True),
    "LSTM": (5, 4, 2, False, True, 0.25, True, 3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_positional_arguments(kind: str) -> None:
    theirs, mine = getattr(nn, kind)(*POSITIONAL[kind]), getattr(bptt.nn, kind)(*POSITIONAL[kind])
    for name in nn.RNNBase.__constants__:
        assert getattr(mine, name) == getattr(theirs, name)
    assert [(n, p.shape) for n, p in mine.named_parameters()] == [(n, p.shape) for n, p in theirs.named_parameters()]


@pytest.mark.parametrize("kind", KINDS)
def test_device_and_dtype(kind: str) -> None:
    layer = getattr(bptt.nn, kind)(5, 4, device="cpu", dtype=torch.float64)
    assert {(p.dtype, p.device.type) for p in layer.parameters()} == {(torch.float64, "cpu")}


@pytest.mark.parametrize("kind", KINDS)
def test_extends_rnnbase_and_not_torch_layers(kind: str) -> None:
    cls = getattr(bptt.nn, kind)
    assert issubclass(cls, nn.RNNBase)
    assert not issubclass(cls, getattr(nn, kind))
    assert cls.__name__ == kind


@pytest.mark.parametrize("kind", KINDS)
def test_repr_shows_the_policy(kind: str) -> None:
    layer = getattr(bptt.nn, kind)(5, 4, 2, gradient=bptt.Truncated(20, every=5))
    assert repr(layer).startswith(f"{kind}(5, 4, num_layers=2")
    assert "truncated:20/5" in repr(layer)


@each_cell
@pytest.mark.parametrize("net", ["one", "bi_two"])
def test_text_form_of_the_policy(cell: str, net: str, agree: Agree) -> None:
    theirs = build(cell, **NETS[net])
    data = case(theirs)
    for text, policy in (("truncated:3/2", bptt.Truncated(3, every=2)), ("chunked:2", bptt.Chunked(2))):
        agree(
            measure(ours(theirs, gradient=text), data).values(),
            measure(ours(theirs, gradient=policy), data).values(),
            tolerance=0,
        )


# Convert


class Model(nn.Module):
    """Recurrent layers at several depths, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(5, 4, num_layers=2, bidirectional=True, dropout=0.3)
        self.inner = nn.ModuleDict({"gru": nn.GRU(8, 4, batch_first=True), "list": nn.ModuleList([nn.RNN(4, 4)])})
        self.again = self.inner["list"][0]
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.first(x)
        y, _ = self.inner["gru"](y.transpose(0, 1))
        y, _ = self.inner["list"][0](y.transpose(0, 1))
        return self.head(self.again(y)[0])


@pytest.mark.parametrize("training", [True, False])
def test_convert_swaps_every_layer_and_shares_parameters(training: bool, agree: Agree) -> None:
    model = Model().double().train(training)
    expected_model = copy.deepcopy(model)
    names, parameters = zip(*model.named_parameters(), strict=True)
    converted = bptt.convert(model, gradient=bptt.Full())
    assert [n for n, _ in converted.named_parameters()] == list(names)
    for p, before in zip(converted.parameters(), parameters, strict=True):
        assert p is before
    assert not any(isinstance(m, nn.RNN | nn.GRU | nn.LSTM) for m in converted.modules())
    assert converted.again is converted.inner["list"][0]
    assert all(m.training is training for m in converted.modules())
    x = torch.randn(7, 3, 5, dtype=torch.float64)
    results = []
    for m in (converted, expected_model):
        torch.manual_seed(5)
        y = m(x)
        results.append([y, torch.autograd.grad(y.square().sum(), list(m.parameters()))])
    agree(*results)


@each_cell
def test_convert_of_a_layer_alone(cell: str, agree: Agree) -> None:
    theirs = build(cell, num_layers=2)
    data = case(theirs)
    policy = bptt.Truncated(3)
    expected = measure(ours(theirs, gradient=policy), data)
    agree(measure(bptt.convert(copy.deepcopy(theirs), gradient=policy), data).values(), expected.values())
    agree(
        measure(bptt.convert(copy.deepcopy(theirs), gradient="truncated:3", memory="states"), data).values(),
        expected.values(),
    )


def test_convert_again_changes_the_policy(agree: Agree) -> None:
    theirs = build("gru", num_layers=2)
    data = case(theirs)
    expected = measure(ours(theirs, gradient="chunked:2"), data)
    layer = bptt.convert(copy.deepcopy(theirs), gradient="truncated:3")
    agree(measure(bptt.convert(layer, gradient="chunked:2"), data).values(), expected.values())


def test_convert_leaves_frozen_parameters_frozen() -> None:
    model = Model()
    model.first.weight_hh_l0.requires_grad_(False)
    assert not bptt.convert(model, gradient="full").first.weight_hh_l0.requires_grad


# Kernels


@each_cell
def test_named_kernel_is_used(cell: str, agree: Agree) -> None:
    theirs = build(cell, num_layers=2)
    data = case(theirs)
    agree(measure(ours(theirs, kernel="eager"), data).values(), measure(theirs, data).values())


@pytest.mark.parametrize("kind", KINDS)
def test_explain_says_what_was_chosen(kind: str) -> None:
    layer = getattr(bptt.nn, kind)(5, 4, num_layers=2, gradient="truncated:3")
    gates = 0 if kind == "RNN" else 7 * 3 * 2 * 4 * 4 * 4  # steps, lanes, layers, values a unit, units, bytes
    assert bptt.explain(layer, torch.zeros(7, 3, 5)).splitlines() == [
        f"kernel 'eager' for {kind.lower()}, torch.float32 on cpu: the most preferred of the kernels there are",
        f"keeps states{' and gates' if gates else ''}: memory='auto', the gates take {gates:,} bytes",
        "gradient truncated:3",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_meta_device_gives_shapes(kind: str) -> None:
    """Shapes forward and backward without values, as torch.nn."""
    for gradient in ("full", "chunked:2", "truncated:3", "randomized:0.5"):
        layer = getattr(bptt.nn, kind)(3, 4, 2, bidirectional=True, device="meta", gradient=gradient)
        y, _ = layer(torch.zeros(7, 2, 3, device="meta"))
        y.sum().backward()
        assert y.shape == (7, 2, 8)
        assert layer.weight_ih_l0.grad.shape == layer.weight_ih_l0.shape


def test_convert_leaves_our_settings_where_none_are_given() -> None:
    model = nn.ModuleList([bptt.nn.LSTM(5, 4, gradient="truncated:7", memory="gates"), nn.GRU(5, 4)])
    bptt.convert(model, memory="states")
    assert [str(layer.gradient) for layer in model] == ["truncated:7", "full"]
    assert [layer.memory for layer in model] == ["states", "states"]


@each_cell
def test_rebuilt_in_slices(cell: str, agree: Agree, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates rebuilt a few steps at a time, as they are for long sequences."""
    theirs = build(cell, **NETS["bi_two"])
    data = case(theirs, T=7)
    monkeypatch.setattr("bptt.engine.walk.REBUILD_VALUES", 2 * 3 * len(theirs.weight_hh_l0))
    agree(measure(ours(theirs, memory="states"), data).values(), measure(theirs, data).values())
