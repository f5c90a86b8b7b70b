"""The fused kernel against autograd of a plain loop: every cell, net and policy that it takes, on each device there is.

On a GPU the same tests run on cuDNN.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from reference import CELLS, NETS, Case, Gradients, as_hx, as_tuple, build, case, gradients, measure, ours
from torch.testing import assert_close
from variants import CONSTRUCTORS, LENGTHS, SIZES, Agree, each_cell, each_net

import bptt
from bptt.kernels import fused, torch_layers
from bptt.kernels.frames import Frames
from bptt.kernels.pieces import Pieces
from bptt.policies import EVERYTHING, Reach

POLICIES = ["full", "chunked:3", "truncated:3", "truncated:5/2", "truncated:4/4"]
MEMORIES = ["gates", "states", "checkpoints:steps=3"]

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU with CUDA")),
]

each_device = pytest.mark.parametrize("device", DEVICES)
each_policy = pytest.mark.parametrize("policy", POLICIES)


@pytest.fixture(autouse=True)
def whole_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's products are those of float32, not of TF32, which is coarser than any tolerance here."""
    if torch.backends.cudnn.is_available():
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def run(theirs: Any, data: Case, device: str, **kw: Any) -> dict[str, Any]:
    """Every output and gradient of the kernel on a device, back on the CPU. kw: of the layer, and of `measure`."""
    dtype = next(theirs.parameters()).dtype
    own = {name: kw.pop(name) for name in ("gradient", "memory") if name in kw}
    layer = ours(theirs, kernel="fused", **own).to(device)
    moved = Case(*(to(value, device, dtype) for value in vars(data).values()))
    if "resets" in kw:
        kw["resets"] = kw["resets"].to(device)
    return to(measure(layer, moved, **kw).values(), "cpu", dtype)


def to(value: Any, device: str, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {key: to(part, device, dtype) for key, part in value.items()}
    return value.to(device, dtype) if isinstance(value, torch.Tensor) else tuple(to(v, device, dtype) for v in value)


def expected(theirs: Any, data: Case, policy: str, **kw: Any) -> Gradients:
    return gradients(theirs, data.x, data.initial, data.dy, data.dfinal, bptt.policies.parse(policy), **kw)


@each_device
@each_cell
@each_net
@each_policy
def test_gradients(device: str, cell: str, net: str, policy: str, agree: Agree) -> None:
    theirs = build(cell, **NETS[net])
    data = case(theirs, T=8)
    wanted = expected(theirs, data, policy).values()
    for memory in MEMORIES:
        agree(run(theirs, data, device, gradient=policy, memory=memory), wanted, memory)


@each_device
@each_cell
@each_net
@each_policy
def test_packed(device: str, cell: str, net: str, policy: str, agree: Agree) -> None:
    """Sequences of unequal lengths, and of every second net with resets inside; each memory by turns."""
    theirs = build(cell, **NETS[net])
    lengths, data = (4, 8, 1), case(theirs, T=8)
    turn = list(CELLS).index(cell) + list(NETS).index(net) + POLICIES.index(policy)
    kw = {"resets": torch.rand(8, 3) < 0.3} if turn % 2 else {}
    wanted = expected(theirs, data, policy, lengths=lengths, **kw).values()
    memory = MEMORIES[turn % 3]
    agree(run(theirs, data, device, gradient=policy, memory=memory, packed=lengths, **kw), wanted, memory)


@each_device
@each_cell
@pytest.mark.parametrize(("net", "rate"), [("one", 0.3), ("bi_two", 0.3), ("one", 1.0)])
@each_policy
def test_resets(device: str, cell: str, net: str, policy: str, rate: float, agree: Agree) -> None:
    """Each piece between two resets is a sequence of its own; also where every step is one."""
    theirs = build(cell, **NETS[net])
    data, resets = case(theirs, T=8, B=2), torch.rand(8, 2) < rate
    wanted = expected(theirs, data, policy, resets=resets).values()
    for memory in MEMORIES:
        agree(run(theirs, data, device, gradient=policy, memory=memory, resets=resets), wanted, memory)


@each_device
@each_cell
@pytest.mark.parametrize("size", SIZES)
def test_sizes(device: str, cell: str, size: str, agree: Agree) -> None:
    T, B, I, H = SIZES[size]
    policy = POLICIES[(list(SIZES).index(size) + list(CELLS).index(cell)) % len(POLICIES)]  # by turns
    theirs = build(cell, I, H)
    data = case(theirs, T, B)
    agree(run(theirs, data, device, gradient=policy), expected(theirs, data, policy).values())


@each_device
@each_cell
@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_constructors(device: str, cell: str, constructor: str, agree: Agree) -> None:
    theirs = build(cell, **CONSTRUCTORS[constructor])
    data = case(theirs)
    agree(run(theirs, data, device), measure(theirs, data).values())


@each_device
@each_cell
@pytest.mark.parametrize("lengths", LENGTHS)
def test_lengths(device: str, cell: str, lengths: str, agree: Agree) -> None:
    theirs = build(cell, num_layers=2, bidirectional=True)
    data = case(theirs, B=len(LENGTHS[lengths]))
    packed = LENGTHS[lengths]
    agree(run(theirs, data, device, packed=packed), measure(theirs, data, packed=packed).values())


@each_device
@each_cell
@each_policy
def test_float32(device: str, cell: str, policy: str, agree: Agree) -> None:
    """Also of the state c, which a sweep computes from h where blocks begin."""
    theirs = build(cell, 7, 9, dtype=torch.float32)
    data = case(theirs, T=50)
    wanted = measure(ours(theirs.double(), kernel="eager", gradient=policy), Case(*_double(data))).values()
    agree(run(theirs.float(), data, device, gradient=policy), wanted)


def _double(data: Case) -> Iterator[Any]:
    return (to(value, "cpu", torch.float64) for value in vars(data).values())


@each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_cell
@pytest.mark.parametrize("policy", ["full", "chunked:3", "truncated:4/2"])
def test_half(device: str, dtype: torch.dtype, cell: str, policy: str, agree: Agree) -> None:
    theirs = build(cell, dtype=dtype)
    data = case(theirs)
    wanted = measure(ours(theirs.float(), kernel="eager", gradient=policy), Case(*_float(data))).values()
    agree(run(theirs.to(dtype), data, device, gradient=policy), wanted)


def _float(data: Case) -> Iterator[Any]:
    return (to(value, "cpu", torch.float32) for value in vars(data).values())


@each_device
@each_cell
@each_policy
def test_no_tensor_need_be_dense(device: str, cell: str, policy: str, agree: Agree) -> None:
    theirs = build(cell, 5, 4)
    data = case(theirs)
    data.dy = data.dy[:1, :1, :1].expand(data.dy.shape)
    wanted = expected(theirs, data, policy).values()
    data.x = data.x.transpose(0, 2).contiguous().transpose(0, 2)
    for name, weight in theirs.named_parameters():
        if weight.dim() == 2:
            setattr(theirs, name, torch.nn.Parameter(weight.detach().t().contiguous().t()))
    agree(run(theirs, data, device, gradient=policy), wanted)


@each_device
@each_cell
@pytest.mark.parametrize("policy", ["chunked:3", "truncated:5/2"])
def test_columns_in_groups(device: str, cell: str, policy: str, monkeypatch: pytest.MonkeyPatch, agree: Agree) -> None:
    """Where there are too many columns for one call."""
    monkeypatch.setattr("bptt.kernels.sums.SWEEP_VALUES", 1)
    monkeypatch.setattr("bptt.kernels.sums.SWEEP_SEQUENCES", 0)
    monkeypatch.setattr("bptt.kernels.fused.GATES", 1)
    for net in ("one", "two", "bi_two"):
        theirs = build(cell, **NETS[net])
        data = case(theirs, T=8)
        agree(run(theirs, data, device, gradient=policy), expected(theirs, data, policy).values())


@each_device
@pytest.mark.parametrize("cell", ["gru", "lstm_proj"])
@pytest.mark.parametrize("net", ["two", "bi_two"])
@each_policy
def test_dropout(device: str, cell: str, net: str, policy: str, agree: Agree) -> None:
    """The same mask in every kernel and at every second run."""
    theirs = build(cell, dropout=0.4, **NETS[net])
    data, found = case(theirs), []
    for kernel, memory in (("eager", "gates"), *(("fused", memory) for memory in MEMORIES)):
        layer = ours(theirs, kernel=kernel, memory=memory, gradient=policy).to(device)
        torch.manual_seed(3)
        moved = Case(*(to(value, device, torch.float64) for value in vars(data).values()))
        found.append(measure(layer, moved).values())
    for actual in found[1:]:
        agree(actual, found[0])


@each_device
@each_cell
@each_policy
def test_no_lane(device: str, cell: str, policy: str) -> None:
    theirs = build(cell, num_layers=2)
    found = run(theirs, case(theirs, B=0), device, gradient=policy)
    assert found["x"].shape == (7, 0, 5)
    assert all(not bool(grad.any()) for grad in found["parameters"].values())


@each_cell
@pytest.mark.parametrize("frozen", ["weights", "x"])
@each_policy
def test_what_needs_no_gradient_has_none(cell: str, frozen: str, policy: str) -> None:
    theirs = build(cell, num_layers=2)
    grads = []
    for kernel in ("fused", "eager"):
        layer = ours(theirs, kernel=kernel, gradient=policy).requires_grad_(frozen == "x")
        x = case(theirs).x.requires_grad_(frozen == "weights")
        layer(x)[0].square().sum().backward()
        grads.append([leaf.grad for leaf in (x, *layer.parameters())])
    for actual, wanted in zip(*grads, strict=True):
        assert (actual is None) == (wanted is None)
        if wanted is not None:
            assert_close(actual, wanted)


def test_padding_may_overflow(agree: Agree) -> None:
    """No step behind the end of a sequence is computed, in any segment."""
    theirs = build("relu", I=3, H=3)
    with torch.no_grad():
        theirs.weight_hh_l0.copy_(1e50 * torch.eye(3, dtype=torch.float64))
        theirs.weight_ih_l0.copy_(torch.eye(3))
        theirs.bias_ih_l0.zero_()
        theirs.bias_hh_l0.zero_()
    data = case(theirs, T=12, B=2)
    data.x.zero_()
    data.x[0, 0] = 1
    for state in data.initial:
        state.zero_()
    wanted = measure(theirs, data, packed=(3, 12)).values()
    for memory in MEMORIES:
        agree(run(theirs, data, "cpu", memory=memory, packed=(3, 12)), wanted)


def test_pieces() -> None:
    """Columns are cut where a state is replaced, and at most two calls run all pieces."""
    frames = Frames.of(Reach(4, 2, stops_at_start=False), None, 5, 1)
    assert frames.start.tolist() == [0, 0, 1]
    resets = torch.tensor([[True], [False], [True], [False], [False]])
    pieces = Pieces.of(frames, resets)
    assert pieces.start.tolist() == [0, 0, 2, 1, 2]
    assert pieces.length.tolist() == [2, 2, 2, 1, 3]
    assert pieces.column.tolist() == [0, 1, 1, 2, 2]
    assert pieces.fresh.tolist() == [True, True, True, False, True]
    assert pieces.opens.tolist() == [False, False, False, True, False]
    assert pieces.closes.tolist() == [True, False, True, False, True]
    (batch,) = pieces.batches()
    assert batch.sizes is not None
    assert (batch.index.tolist(), batch.sizes.tolist()) == ([4, 0, 1, 2, 3], [5, 4, 1])
    assert batch.addresses(by_position=False).tolist() == [2, 0, 0, 2, 1, 3, 1, 1, 3, 4]
    whole = Pieces.of(Frames.of(EVERYTHING, None, 5, 2), None)
    assert whole.entire
    assert [batch.sizes for batch in whole.batches()] == [None]
    long, short = Pieces.of(Frames.of(Reach(4, 4, stops_at_start=True), None, 10, 3), None).batches()
    assert (long.longest, len(long.index), long.sizes) == (4, 6, None)
    assert (short.longest, len(short.index), short.sizes) == (2, 3, None)


@pytest.mark.parametrize("T", [1, 2, 3, 10, 33])
def test_a_linear_recurrence_in_stretches(T: int) -> None:
    f, u, c = torch.rand(T, 2, 3).double(), torch.randn(T, 2, 3).double(), torch.randn(2, 3).double()
    wanted = []
    for t in range(T):
        wanted.append(f[t] * (wanted[-1] if wanted else c) + u[t])
    assert_close(fused._recurred(f, u, c), torch.stack(wanted))


@each_device
@each_cell
def test_without_a_gradient(device: str, cell: str, agree: Agree) -> None:
    for net in ("one", "bi_two"):
        theirs = build(cell, **NETS[net])
        data = case(theirs)
        layer = ours(theirs, kernel="fused").to(device)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                y, final = layer(data.x.to(device), as_hx(z.to(device) for z in data.initial))
                wanted, wanted_final = theirs(data.x, as_hx(data.initial))
                agree([y.cpu(), [z.cpu() for z in as_tuple(final)]], [wanted, as_tuple(wanted_final)])


@pytest.mark.parametrize("T", [1, 7])
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_one_call_forward_and_none_again(kind: str, T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The full gradient differentiates the call of the forward pass; blocks are run again, all of them in one call."""
    counts: list[int] = []
    for mode, function in list(torch_layers.CALLS.items()):

        def counted(*given: Any, function: Callable[..., Any] = function) -> Any:
            counts.append(given[0].shape[1] if given[0].dim() == 3 else -1)
            return function(*given)

        monkeypatch.setitem(torch_layers.CALLS, mode, counted)
    layer, x = getattr(bptt.nn, kind)(3, 4, kernel="fused"), torch.randn(T, 2, 3)
    layer(x)[0].sum().backward()
    assert counts == [2]
    counts.clear()
    layer.memory = "states"
    layer(x)[0].sum().backward()
    assert counts == [2, 2]
    if T > 1:
        counts.clear()
        layer.gradient = "chunked:3"
        layer(x)[0].sum().backward()
        assert counts == [2, 4, 2]  # two chunks of two lanes, and the last one
