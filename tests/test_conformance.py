"""`bptt.nn` with the full gradient is `torch.nn`: every constructor and forward variant, every output and gradient."""

import copy
from typing import Any

import pytest
import torch
from reference import NETS, Case, as_hx, as_tuple, build, case, gradients, measure, ours
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from variants import CONSTRUCTORS, KINDS, LENGTHS, MEMORIES, SIZES, Agree, each_cell, each_net

import bptt

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


@each_cell
def test_rebuilt_in_slices(cell: str, agree: Agree, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates rebuilt a few steps at a time, as they are for long sequences."""
    theirs = build(cell, **NETS["bi_two"])
    data = case(theirs, T=7)
    monkeypatch.setattr("bptt.engine.rebuilt.REBUILD_VALUES", 2 * 3 * len(theirs.weight_hh_l0))
    agree(measure(ours(theirs, memory="states"), data).values(), measure(theirs, data).values())
