"""Which kernel runs, what it says for itself, and what it refuses."""

import copy

import pytest
import torch
from reference import CELLS, build, case, measure, ours

import bptt
from bptt import kernels
from bptt.kernels import Eager, Request, cpu
from bptt.kernels.cpu import Cpu
from bptt.kernels.whole import WholeWalks
from bptt.kernels.whole_torch import WholeTorch

KINDS = ("RNN", "GRU", "LSTM")

each_kind = pytest.mark.parametrize("kind", KINDS)


def test_the_compiled_kernel_is_preferred() -> None:
    assert list(kernels.KERNELS) == ["cpu", "fused", "eager"]
    for name in ("auto", "cpu", "fused", "eager"):
        assert kernels.check(name) == name
    with pytest.raises(ValueError, match=r"kernel must be one of 'auto', 'cpu', 'fused', 'eager': got 'gpu'"):
        kernels.check("gpu")


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_explain(kind: str, dtype: torch.dtype) -> None:
    layer = getattr(bptt.nn, kind)(3, 5, dtype=dtype)
    x = torch.zeros(7, 2, 3, dtype=dtype)
    who = f"kernel 'cpu' ({cpu.variants()[0]}) for {kind.lower()}, {dtype} on cpu"
    assert bptt.explain(layer, x).startswith(f"{who}: the most preferred")
    layer.kernel = "cpu"
    assert bptt.explain(layer, x).startswith(f"{who}: named by kernel=\n")
    layer.kernel = "eager"
    assert bptt.explain(layer, x).startswith("kernel 'eager'")


@each_kind
def test_other_precisions(kind: str) -> None:
    """Refused by name, with the reason; "auto" takes another kernel and says why."""
    dtype = torch.float16
    reason = f"it computes float32, float64 and bfloat16, not {dtype}"
    x = torch.zeros(7, 2, 3, dtype=dtype)
    layer = getattr(bptt.nn, kind)(3, 5, dtype=dtype, kernel="cpu")
    for call in (layer, lambda x: bptt.explain(layer, x), lambda x: bptt.gradients(layer, x, None)):
        with pytest.raises(RuntimeError, match=f"kernel='cpu' cannot run this layer: {reason}"):
            call(x)
    automatic = getattr(bptt.nn, kind)(3, 5, dtype=dtype)
    assert bptt.explain(automatic, x).startswith(
        f"kernel 'eager' for {kind.lower()}, {dtype} on cpu: 'cpu' cannot: {reason}"
    )
    y, _ = automatic(x)
    y.sum().backward()
    assert y.dtype == automatic.weight_hh_l0.grad.dtype == dtype


@each_kind
def test_other_devices(kind: str) -> None:
    layer = getattr(bptt.nn, kind)(3, 5, device="meta", kernel="cpu")
    x = torch.zeros(7, 2, 3, device="meta")
    with pytest.raises(RuntimeError, match=r"kernel='cpu' cannot run this layer: it runs on the CPU, not on meta"):
        layer(x)
    automatic = getattr(bptt.nn, kind)(3, 5, device="meta")
    assert "'cpu' cannot: it runs on the CPU, not on meta" in bptt.explain(automatic, x)
    assert automatic(x)[0].shape == (7, 2, 5)


def test_autocast_keeps_the_kernel() -> None:
    """Under autocast a layer computes in bfloat16, which this kernel has, or in float32, where it has no float16."""
    layer = bptt.nn.LSTM(3, 5, kernel="cpu")
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = layer(torch.zeros(7, 2, 3, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.float16):
        y, _ = layer(torch.zeros(7, 2, 3))
    assert y.dtype == torch.float16


def test_variants() -> None:
    names = cpu.variants()
    assert names
    assert names[-1] == "portable"
    assert Cpu().variant == names[0]
    for name in names:
        kernel = Cpu(variant=name)
        assert (kernel.name, kernel.variant) == ("cpu", name)
        assert kernel.refuses(Request(bptt.nn.GRU(3, 5).cell(), torch.device("cpu"), torch.float32)) is None
    for unknown in ("nope", "AVX2", ""):
        with pytest.raises(ValueError, match=rf"variant must be one of .*'portable': got '{unknown}'"):
            Cpu(variant=unknown)


@pytest.mark.parametrize("cell", CELLS)
def test_the_named_kernel_is_the_one_that_runs(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and back; a copy of the layer keeps the name."""
    ran: list[str] = []
    ways = [(name, kernel, method) for name, kernel in kernels.KERNELS.items() for method in ("forward", "sweep")]
    whole = [
        (n, kind, method) for n, kind in (("cpu", WholeWalks), ("fused", WholeTorch)) for method in ("taped", "pulled")
    ]
    for name, kernel, method in [*ways, *whole]:

        def spy(*arguments: object, name: str = name, own: object = getattr(kernel, method)) -> object:
            result = own(*arguments)  # type: ignore[operator]  # a method
            ran.extend([] if result is None else [name])
            return result

        monkeypatch.setattr(kernel, method, spy)
    theirs = build(cell)
    data = case(theirs)
    for name, expected in (("cpu", "cpu"), ("fused", "fused"), ("eager", "eager"), ("auto", "cpu")):
        ran.clear()
        measure(copy.deepcopy(ours(theirs, kernel=name)), data)
        assert ran == [expected] * 2


@pytest.mark.parametrize(("kind", "H"), [("RNN", 448), ("GRU", 448)])
def test_a_step_left_to_torch_is_told_and_keeps_its_precision(kind: str, H: int) -> None:
    """One step of one lane, whose gradient is as large as the weights; also where that is differentiated again."""
    make, x = getattr(bptt.nn, kind), torch.randn(1, 1, H, requires_grad=True)
    layer = make(H, H)
    assert bptt.explain(layer, x).startswith("torch's own layer where it is differentiated without resets")
    assert "torch's own" not in bptt.explain(make(H, H, kernel="cpu"), x)
    assert "torch's own" not in bptt.explain(make(H, 5), x)
    for sizes in ((2, 1, H), (1, 2, H)):
        assert "torch's own" not in bptt.explain(layer, torch.zeros(sizes))
    other = make(H, H, kernel="cpu")
    other.load_state_dict(layer.state_dict())
    found = []
    for each in (layer, other):
        y, h = each(x)
        first = torch.autograd.grad(y.square().sum() + h.sum(), [x, *each.parameters()], create_graph=True)
        found.append((y, *first, *torch.autograd.grad(first[0].square().sum(), [x, each.weight_ih_l0])))
    assert "Plain" not in type(layer(x)[0].grad_fn).__name__
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = layer(x)
    wide = kind == "GRU"
    torch.testing.assert_close(y.float(), found[0][0], rtol=0, atol=1e-6 if wide else 2e-2)
    assert y.dtype == (torch.float32 if wide else torch.bfloat16)


def test_a_step_of_many_lanes_left_to_torch() -> None:
    """With its gradient one step, without it two; in double precision none."""
    H = 512
    layer, other = bptt.nn.RNN(H, H, gradient="truncated:1"), bptt.nn.RNN(H, H, kernel="cpu")
    other.load_state_dict(layer.state_dict())
    x, h = torch.randn(2, 16, H), torch.randn(1, 16, H)
    told = "torch's own layer"
    assert bptt.explain(layer, x[:1]).startswith(told)
    for sizes in ((2, 16, H), (1, 15, H)):
        assert told not in bptt.explain(layer, torch.zeros(sizes))
    with torch.no_grad():
        assert bptt.explain(layer, x).startswith(told)
        assert told not in bptt.explain(layer, torch.zeros(3, 16, H))
        torch.testing.assert_close(layer(x, h), other(x, h), rtol=1e-5, atol=1e-5)
    found = []
    for each in (layer, other):
        leaves = [x[:1].clone().requires_grad_(), h.clone().requires_grad_()]
        y, h_n = each(*leaves)
        found.append(torch.autograd.grad(y.square().sum() + h_n.sum(), [*leaves, *each.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert told not in bptt.explain(layer.double(), x[:1].double())


class Narrow(Eager):
    """A kernel that walks nothing but plain sequences, and writes down what it was asked."""

    name = "narrow"

    def __init__(self) -> None:
        self.asked: list[Request] = []

    def refuses(self, request: Request) -> str | None:
        self.asked.append(request)
        asked = [name for name in ("edge_factors", "resets", "adjoints") if getattr(request, name)]
        return f"it has no {', '.join(asked)}" if asked else None


@each_kind
def test_a_kernel_is_asked_what_a_call_needs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passed over by "auto", with the reason, where it cannot; and where it is named, an error."""
    narrow = Narrow()
    monkeypatch.setattr(kernels, "KERNELS", {"narrow": narrow, **kernels.KERNELS})
    x, dy = torch.randn(7, 2, 3), torch.ones(7, 2, 5)
    resets = torch.zeros(7, 2, dtype=torch.bool)
    cases = {
        "": lambda layer: layer(x)[0].sum().backward(),
        "edge_factors": lambda layer: layer(x)[0].sum().backward(),
        "resets": lambda layer: layer(x, resets=resets)[0].sum().backward(),
        "adjoints": lambda layer: bptt.gradients(layer, x, dy),
    }
    for lacks, call in cases.items():
        gradient = "randomized:0.5" if lacks == "edge_factors" else "full"
        layer = getattr(bptt.nn, kind)(3, 5, gradient=gradient)
        narrow.asked.clear()
        call(layer)
        (asked,) = narrow.asked
        assert [name for name in ("edge_factors", "resets", "adjoints") if getattr(asked, name)] == [lacks] * bool(
            lacks
        )
        layer.kernel = "narrow"
        if not lacks:
            call(layer)
            continue
        with pytest.raises(RuntimeError, match=f"kernel='narrow' cannot run this layer: it has no {lacks}"):
            call(layer)
    layer = getattr(bptt.nn, kind)(3, 5, gradient="randomized:0.5")
    assert "'narrow' cannot: it has no edge_factors" in bptt.explain(layer, x)
    with torch.no_grad():
        layer(x)  # nothing is drawn for a call that is not differentiated
    layer.kernel = "narrow"
    with torch.no_grad():
        layer(x)
    with pytest.raises(RuntimeError, match="it has no edge_factors"):
        bptt.explain(layer, x)


@pytest.mark.parametrize(
    ("memory", "keeps"),
    [
        ("gates", "states and gates"),
        ("states", "states"),
        ("checkpoints", "no tape, and runs the call again"),
        ("checkpoints:steps=4", "a state now and then, and runs segments again"),
        ("checkpoints:bytes=100000", "states and gates"),
    ],
)
def test_explain_says_what_this_call_keeps(memory: str, keeps: str) -> None:
    layer = bptt.nn.LSTM(3, 5, 2, dropout=0.5, memory=memory, gradient="randomized:0.5")
    x, before = torch.zeros(10, 2, 3), torch.get_rng_state()
    lengths = torch.tensor([2, 8])
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    jagged = torch.nested.nested_tensor_from_jagged(x.flatten(0, 1), torch.tensor([0, 8, 20]))
    for given in (x, x[:, 0], packed, jagged):
        assert f"\nkeeps {keeps}: memory={memory!r}" in bptt.explain(layer, given)
        with torch.no_grad():
            assert "\nkeeps nothing: grad mode is off\n" in bptt.explain(layer, given)
    assert torch.equal(torch.get_rng_state(), before)
    run_again = bptt.plan(layer, 10, 2).recomputed
    assert (run_again > 0) == ("again" in keeps)


def test_explain_measures_a_window_by_the_longest_sequence() -> None:
    layer = bptt.nn.LSTM(3, 5, kernel="fused", gradient="truncated:8")
    packed = torch.nn.utils.rnn.pack_padded_sequence(torch.zeros(8, 3, 3), [8, 8, 3])  # 19 steps in all
    assert "what torch's layer keeps takes" in bptt.explain(layer, packed)  # of one block, which is one call
