"""The fused kernel inside torch: what autograd, autocast, a compiler and a checkpoint do with it; what it refuses."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.backends.cudnn.rnn
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import bptt
from bptt import kernels
from bptt.kernels import Request, torch_layers

KINDS = ["RNN", "GRU", "LSTM"]
POLICIES = ["full", "chunked:3", "truncated:4/2"]

each_kind = pytest.mark.parametrize("kind", KINDS)
each_policy = pytest.mark.parametrize("policy", POLICIES)


def pair(kind: str, policy: str, dtype: torch.dtype = torch.float64, **kw: Any) -> tuple[Any, Any]:
    """A layer with this kernel, and the same with the eager one."""
    kw = {"num_layers": 2, **kw}
    layer, other = (
        getattr(bptt.nn, kind)(3, 4, dtype=dtype, gradient=policy, kernel=kernel, **kw) for kernel in ("fused", "eager")
    )
    other.load_state_dict(layer.state_dict())
    return layer, other


def squares(y: Tensor) -> Tensor:
    return y.double().square().sum()


def compare(found: Callable[[Any, Tensor], Any], kind: str, policy: str) -> None:
    """What a function of (layer, x) gives is the same for both."""
    layer, other = pair(kind, policy)
    x = torch.randn(7, 2, 3, dtype=torch.float64)
    assert_close(found(layer, x.clone().requires_grad_()), found(other, x.clone().requires_grad_()))


@each_kind
@each_policy
def test_a_graph_that_is_kept_can_be_used_again(kind: str, policy: str) -> None:
    layer, _ = pair(kind, policy)
    x = torch.randn(7, 2, 3, dtype=torch.float64, requires_grad=True)
    loss = squares(layer(x)[0])
    leaves = [x, *layer.parameters()]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert_close(torch.autograd.grad(loss, leaves), first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


@each_kind
@each_policy
def test_second_derivatives(kind: str, policy: str) -> None:
    """Those of the policy as a graph, which need no derivative of torch's own layers."""

    def found(layer: Any, x: Tensor) -> Any:
        (grad,) = torch.autograd.grad(squares(layer(x)[0]), [x], create_graph=True)
        return torch.autograd.grad(squares(grad), [x, *layer.parameters()])

    compare(found, kind, policy)


@each_kind
@each_policy
def test_an_output_that_was_changed_in_place(kind: str, policy: str) -> None:
    def found(layer: Any, x: Tensor) -> Any:
        y, _ = layer(x)
        y.mul_(2)
        return torch.autograd.grad(squares(y), [x, *layer.parameters()])

    compare(found, kind, policy)


@each_kind
@each_policy
def test_a_weight_that_was_changed_before_backward(kind: str, policy: str) -> None:
    layer, _ = pair(kind, policy)
    loss = squares(layer(torch.randn(7, 2, 3, dtype=torch.float64))[0])
    with torch.no_grad():
        layer.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each_kind
@each_policy
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_of_torch(kind: str, policy: str, reentrant: bool) -> None:
    def found(layer: Any, x: Tensor) -> Any:
        squares(checkpoint(lambda x: layer(x)[0], x, use_reentrant=reentrant)).backward()
        return [x.grad, *(p.grad for p in layer.parameters())]

    compare(found, kind, policy)


@each_kind
@each_policy
def test_what_is_saved_may_be_kept_elsewhere(kind: str, policy: str) -> None:
    def found(layer: Any, x: Tensor) -> Any:
        with torch.autograd.graph.save_on_cpu():
            y, _ = layer(x)
        return torch.autograd.grad(squares(y), [x, *layer.parameters()])

    compare(found, kind, policy)


@each_kind
@each_policy
def test_transforms(kind: str, policy: str) -> None:
    compare(lambda layer, x: torch.func.grad(lambda x: squares(layer(x)[0]))(x.detach()), kind, policy)


@each_kind
@each_policy
def test_compiled(kind: str, policy: str) -> None:
    torch._dynamo.reset()

    def found(layer: Any, x: Tensor) -> Any:
        run = torch.compile(layer, backend="aot_eager") if layer.kernel == "fused" else layer
        return torch.autograd.grad(squares(run(x)[0]), [x, *layer.parameters()])

    compare(found, kind, policy)


@each_kind
@each_policy
@pytest.mark.parametrize("memory", ["auto", "checkpoints:steps=3"])
def test_counted(kind: str, policy: str, memory: str) -> None:
    """Also where the forward call was not seen, or the backward call is not."""

    def found(layer: Any, x: Tensor) -> Any:
        layer.memory = memory
        with FlopCounterMode(display=False) as both:
            squares(layer(x)[0]).backward()
        seen = [x.grad, *(p.grad for p in layer.parameters())]
        x.grad = None
        layer.zero_grad()
        loss = squares(layer(x)[0])
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        grads = [x.grad, *(p.grad for p in layer.parameters())]
        assert_close(seen, grads)
        assert both.get_total_flops() > 0
        assert backward.get_total_flops() > 0
        return grads

    compare(found, kind, policy)


@each_kind
@each_policy
def test_autocast_is_followed(kind: str, policy: str) -> None:
    """As torch.nn's layers follow it; the gradients of the parameters are in their precision."""
    layer, other = pair(kind, policy, torch.float32)
    x = torch.randn(7, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y, final = layer(x)
        again, _ = layer(x, final)
    assert y.dtype == again.dtype == (torch.float32 if kind == "GRU" else torch.bfloat16)
    squares(y).backward()
    squares(other(x)[0]).backward()
    for name, parameter in layer.named_parameters():
        wanted = other.get_parameter(name).grad
        assert parameter.grad.dtype == torch.float32
        assert_close(parameter.grad, wanted, rtol=0.05, atol=0.05 * wanted.abs().max().item())


@pytest.mark.parametrize("kind", ["RNN", "LSTM"])
def test_autocast_as_torch_nn(kind: str) -> None:
    """Of whose layers on a CPU all but the GRU follow it: the same bits."""
    layer, theirs = bptt.nn.LAYERS[kind.lower()](3, 4, kernel="fused"), getattr(torch.nn, kind)(3, 4)
    theirs.load_state_dict(layer.state_dict())
    x, grads = torch.randn(7, 2, 3), []
    for one in (layer, theirs):
        with torch.autocast("cpu", torch.bfloat16):
            y, _ = one(x)
        squares(y).backward()
        grads.append([y.detach(), *(p.grad for p in one.parameters())])
    assert_close(*grads, rtol=0, atol=0)


# Choice and refusal

LACKS = {
    "edge_factors": (
        {"gradient": "randomized:0.5"},
        lambda layer, x: layer(x),
        "torch's fused layers have no factors on time edges, as a randomized gradient draws them",
    ),
    "adjoints": (
        {},
        lambda layer, x: bptt.gradients(layer, x, torch.ones(7, 2, 4)),
        "torch's fused layers give gradients, not the adjoint of every step that is asked for here",
    ),
    "reset_state": (
        {},
        lambda layer, x: layer(x, resets=torch.ones(7, 2, dtype=torch.bool), reset_state=torch.zeros(1, 2, 4)),
        "torch's fused layers give gradients, not the adjoint of every step that is asked for here",
    ),
    "nonlinearity": (
        {"nonlinearity": "sigmoid"},
        lambda layer, x: layer(x),
        "torch has no fused layer for rnn with sigmoid",
    ),
    "dtype": (
        {"dtype": torch.complex64},
        lambda layer, x: layer(x.to(torch.complex64)),
        r"torch's fused layers do not compute torch.complex64 on cpu",
    ),
    "device": (
        {"device": "meta"},
        lambda layer, x: layer(x.to("meta")),
        "it runs on cpu, cuda, mps, not on meta",
    ),
}


@pytest.mark.parametrize("lacks", LACKS)
def test_it_refuses_with_the_reason(lacks: str) -> None:
    options, call, reason = LACKS[lacks]
    layer = bptt.nn.RNN(3, 4, kernel="fused", **options)
    with pytest.raises(RuntimeError, match=f"kernel='fused' cannot run this layer: {reason}"):
        call(layer, torch.randn(7, 2, 3))


def test_factors_are_drawn_for_gradients_alone() -> None:
    layer = bptt.nn.GRU(3, 4, kernel="fused", gradient="randomized:0.5")
    with torch.no_grad():
        layer(torch.randn(7, 2, 3))
    with pytest.raises(RuntimeError, match="no factors on time edges"):
        bptt.explain(layer, torch.randn(7, 2, 3))


@each_kind
@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_automatic_on_a_gpu(kind: str, device: str) -> None:
    """It is taken where it can, and passed over with its reason where it cannot; no GPU is needed to choose."""
    cell = getattr(bptt.nn, kind)(3, 4).cell()
    plain = Request(cell, torch.device(device), torch.float32)
    for request in (plain, plain._replace(resets=True), plain._replace(dtype=torch.bfloat16)):
        choice = kernels.choose("auto", request)
        assert (choice.kernel.name, choice.reason) == ("fused", f"'cpu' cannot: it runs on the CPU, not on {device}")
    for lacks in ("edge_factors", "adjoints"):
        choice = kernels.choose("auto", plain._replace(**{lacks: True}))
        assert choice.kernel.name == "eager"
        assert "'fused' cannot: torch's fused layers" in choice.reason
    projected = kernels.choose("auto", plain._replace(projection=True))
    assert projected.kernel.name == ("eager" if device == "mps" else "fused")
    assert kernels.choose("auto", plain._replace(dtype=torch.float64)).kernel.name == (
        "eager" if device == "mps" else "fused"
    )


@each_kind
def test_automatic_on_a_cpu(kind: str) -> None:
    cell = getattr(bptt.nn, kind)(3, 4).cell()
    for dtype, name in ((torch.float32, "cpu"), (torch.bfloat16, "cpu"), (torch.float16, "eager")):
        choice = kernels.choose("auto", Request(cell, torch.device("cpu"), dtype))
        assert choice.kernel.name == name
    assert "'fused': on a CPU it is chosen where it is measured to be faster" in choice.reason


def test_explain() -> None:
    layer, x = bptt.nn.LSTM(3, 5, kernel="fused"), torch.zeros(7, 2, 3)
    assert bptt.explain(layer, x) == (
        "kernel 'fused' for lstm, torch.float32 on cpu: named by kernel=\n"
        "keeps states and what torch's layer keeps: memory='auto', what torch's layer keeps takes about 1,680 bytes\n"
        "gradient full"
    )
    layer.gradient = "chunked:3"
    assert "keeps states, from which blocks run forward again: memory='auto'\n" in bptt.explain(layer, x)
    layer.memory = "checkpoints:steps=3"
    assert "keeps a state now and then, and runs segments again" in bptt.explain(layer, x)


@each_policy
def test_plan(policy: str) -> None:
    plan = bptt.plan(bptt.nn.LSTM(3, 4, 2, kernel="fused", gradient=policy), T=20, B=2)
    assert plan.tape_bytes > 0
    assert plan.seconds > 0


@each_kind
@each_policy
def test_another_default_device(kind: str, policy: str) -> None:
    """Addresses are computed on the CPU, whatever torch takes where no device is named."""

    def found(layer: Any, x: Tensor) -> Any:
        resets = torch.tensor([False, False, True, False, False, False, True], device="cpu")[:, None].expand(7, 2)
        with torch.device("meta"):
            y, _ = layer(x, resets=resets)
            loss = squares(y) + squares(layer(x)[0])
            return torch.autograd.grad(loss, [x, *layer.parameters()])

    compare(found, kind, policy)


@each_kind
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_weights_as_cudnn_wants_them(
    kind: str, projected: bool, bias: bool, monkeypatch: pytest.MonkeyPatch, agree: Callable[..., None]
) -> None:
    """They are copied into one storage, of which torch is told what it asks nn.RNNBase for; a stand-in does it here."""
    if projected and kind != "LSTM":
        pytest.skip("only the LSTM has a projection")
    told: list[tuple[int, ...]] = []

    def flatten(weights: list[Tensor], *rest: int) -> None:
        told.append((len(weights), *rest))
        buffer = torch.cat([weight.reshape(-1) for weight in weights])
        at = 0
        for weight in weights:
            weight.set_(buffer.untyped_storage(), at, weight.shape, torch.empty(weight.shape).stride())
            at += weight.numel()

    modes = {"RNN_TANH": 1, "LSTM": 2, "GRU": 3}
    monkeypatch.setattr(torch_layers, "on_cudnn", lambda tensor: True)
    monkeypatch.setattr(torch, "_use_cudnn_rnn_flatten_weight", lambda: True)
    monkeypatch.setattr(torch, "_cudnn_rnn_flatten_weight", flatten)
    monkeypatch.setattr(torch.backends.cudnn.rnn, "get_cudnn_mode", modes.__getitem__)
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
    layer, other = pair(kind, "truncated:4/2", bias=bias, **({"proj_size": 2} if projected else {}))
    x = torch.randn(7, 2, 3, dtype=torch.float64)
    grads = [torch.autograd.grad(squares(one(x)[0]), list(one.parameters())) for one in (layer, other)]
    agree(*grads)
    mode, P, count = modes[layer.mode], 2 if projected else 0, 2 * (1 + bias) + projected
    first, second = ((count, count, I, mode, 4, P, 1, False, False) for I in (3, P or 4))
    assert set(told) == {first, second}
    with torch.inference_mode():
        agree(layer(x)[0].clone(), other(x)[0].clone())
    told.clear()
    flat = getattr(bptt.nn, kind)(3, 4, dtype=torch.float64, kernel="fused")
    weights = [weight.detach().clone() for weight in flat.parameters()]
    flatten(weights)
    told.clear()
    for parameter, weight in zip(flat.parameters(), weights, strict=True):
        parameter.data = weight
    flat(x)
    assert not told  # as nn.RNNBase lays them
