"""A call in which nothing is dropped or padded: what it runs is known from one such call to the next."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import has_torch_function

from .. import kernels, policies
from ..cells import Cell, Weights
from ..engine import Net, NetPrograms, PlainCall, Stack, is_observed, named, needs_gradient, seen, with_checkpoints
from ..kernels import Frames, Kernel, Request, WholeKernel, WholePasses, WholeRequest
from ..memory import Checkpoints, Memory, Tapes, keeps_gates
from ._packed import packed_call
from .call import Call, Hidden, Layer, bare, plain_net

__all__ = ["at_once", "plain", "plain_call", "undrawn"]


def undrawn(layer: Layer, call: Call, differentiated: bool) -> Stack | None:
    """The program of a call in which nothing is drawn, reset or padded; None of another one.

    It holds no tensor and nothing of the layer, and equal calls of any layer share it.
    """
    gradient, memory = layer.gradient, layer.memory
    if call.lengths is not None or call.resets is not None or torch.compiler.is_compiling():  # it sees through a cache
        return None
    if (layer.dropout > 0 and layer.training) or (differentiated and gradient.draws_factors):
        return None
    if isinstance(memory, Checkpoints):
        if differentiated:
            return None
        memory = "gates"
    x, cell = call.x, layer.cell()
    request = Request(cell, x.device, x.dtype, projection=layer.proj_size > 0)
    sizes = layer.num_layers, 2 if layer.bidirectional else 1, len(call.weights)
    kinds, reach = tuple(kernels.KERNELS.values()), gradient.reach(x.shape[0])
    return _known(layer.kernel, request, kinds, sizes, layer.bias, reach, memory)


@lru_cache(maxsize=256)
def _known(
    kernel: str,
    request: Request,
    kernels_there_are: tuple[Kernel, ...],
    sizes: tuple[int, int, int],
    biased: bool,
    reach: policies.Reach,
    memory: Tapes,
) -> Stack:
    return Stack(plain_net(kernel, request, kernels_there_are, *sizes, biased, reach), memory)


def plain(
    layer: Layer, input: Tensor | PackedSequence, hx: Hidden | None, resets: Tensor | None = None
) -> tuple[Tensor | PackedSequence, Hidden] | None:
    """The result of a call that is plain: see `engine.plain`, or packed without resets. None for all others, among them
    those with something to refuse.
    """
    if isinstance(input, PackedSequence):
        return packed_call(layer, input, hx) if resets is None else None
    if is_observed() or input.is_nested:
        return None
    parameters = layer._parameters
    try:
        weights: Any = [parameters[name] for name in layer._flat_weights_names]
    except KeyError:  # computed from others, as by weight_norm
        return None
    states = layer.cell().states
    given: tuple[Any, ...] = () if hx is None else hx if type(hx) is tuple else (hx,)
    if hx is not None and (len(given) != states or (type(hx) is tuple) != (states == 2)):
        return None
    for t in (*given, *weights):
        if type(t) is not Parameter and type(t) is not Tensor:
            return None
    tensors: Any = (input, *given, *weights)
    if has_torch_function(tensors) or input.dtype != weights[0].dtype:
        return None
    differentiated = torch.is_grad_enabled() and needs_gradient(tensors)
    x, dims, batch_first = input, len(input.shape), layer.batch_first
    if dims != 3 or batch_first:
        if input.layout is not torch.strided or dims not in (2, 3) or any(len(s.shape) != dims for s in given):
            return None
        if dims == 2:
            x, given = x.unsqueeze(1), tuple([s.unsqueeze(1) for s in given])
        else:
            x = x.transpose(0, 1).contiguous()
    call = plain_call(layer, x.shape, x.dtype, len(weights), differentiated, resets is not None)
    if call is None:
        return None
    inputs = (x, *(given or call.initial), *weights)
    places = call.places(inputs)
    if places is None:
        return None
    own_resets: tuple[Tensor, ...] = ()
    if resets is not None:
        if type(resets) is not Tensor or resets.dtype != torch.bool or not resets.is_cpu or resets.shape != x.shape[:2]:
            return None
        if dims == 2 or batch_first or resets.layout is not torch.strided:
            return None
        own = resets.clone(memory_format=torch.contiguous_format) if differentiated else resets.contiguous()
        own_resets = call.stack.net.with_resets(own).resets
    xi: tuple[Tensor, ...] = ()
    if differentiated and layer.gradient.draws_factors:
        xi = _drawn(layer.gradient, x, layer.num_layers, 2 if layer.bidirectional else 1)
    y, *final = call(inputs, places, differentiated, xi, own_resets)
    if dims == 2:
        return y.squeeze(1), bare(tuple([state.squeeze(1) for state in final]))
    return y.transpose(0, 1) if batch_first else y, bare(tuple(final))


def _drawn(gradient: policies.Policy, x: Tensor, layers: int, D: int) -> tuple[Tensor, ...]:
    """The factors that a policy draws for a call on x, as `net_of` does."""
    draws = [gradient.draw(*x.shape[:2]) for _ in range(layers * D if D == 2 else 1)]
    factors = tuple([d[..., None].to(x).contiguous() for d in draws if d is not None])
    return factors if D == 2 else factors * layers


def plain_call(
    layer: Layer, shape: torch.Size, dtype: torch.dtype, weights: int, differentiated: bool, resets: bool = False
) -> PlainCall | None:
    """The plain call of a layer on x of this shape `[T, B, I]` on the CPU; None where it is not plain.

    weights: how many the layer has. resets: whether states are reset.
    """
    gradient, memory, reach = layer.gradient, layer.memory, policies.EVERYTHING
    if layer.dropout > 0 and layer.training and layer.num_layers > 1:
        return None
    if not differentiated:
        memory, special = "gates", resets
    else:
        reach, special = gradient.reach(shape[0]), resets or gradient.draws_factors
    sizes = layer.num_layers, layer.bidirectional, layer.proj_size, layer.hidden_size, weights
    kinds, threads = tuple(kernels.KERNELS.values()), torch.get_num_threads()
    return _plain(
        layer.kernel, layer.cell(), dtype, kinds, shape, sizes, layer.bias, reach, memory, differentiated, special,
        threads,
    )  # fmt: skip


@lru_cache(maxsize=256)
def _plain(
    kernel: str,
    cell: Cell,
    dtype: torch.dtype,
    kernels_there_are: tuple[Kernel, ...],
    shape: torch.Size,
    sizes: tuple[int, bool, int, int, int],
    biased: bool,
    reach: policies.Reach,
    memory: Memory,
    differentiated: bool,
    special: bool,
    threads: int,
) -> PlainCall | None:
    """See `plain_call`. special: whether something is about the time edges."""
    (T, B, inputs), (layers, bidirectional, proj_size, H, weights) = shape, sizes
    if proj_size > 0 or T * B == 0:
        return None
    D = 2 if bidirectional else 1
    one, device, gains = layers * D == 1 and not special, torch.device("cpu"), None
    if not one and kernel not in ("auto", "cpu"):
        return None
    call = kernels.PlainSizes(cell, dtype, T, B, inputs, H)
    tapes: Tapes = "gates" if isinstance(memory, Checkpoints) else memory
    if kernel == "auto" and one and not isinstance(memory, Checkpoints):
        gains = kernels.gains(call, reach, memory, differentiated, threads)
    request = Request(cell, device, dtype, gains=gains)
    stack = _known(kernel, request, kernels_there_are, (layers, D, weights), biased, reach, tapes)
    net, chosen = stack.net, stack.net.kernel
    blocks = net.blocks(T, B)
    if not isinstance(chosen, WholeKernel) or net.by_block(blocks):
        return None
    runs_again = False
    if isinstance(memory, Checkpoints):
        keeper = None if chosen.own_gradients else _keeper(net, memory, shape, H, dtype)
        if keeper is None or keeper.segment_starts(T) != (0, T):
            return None
        runs_again = not isinstance(keeper, Stack)
    frames = Frames.of(blocks, None, T, B)
    taped = T * B * layers * D * chosen.taped_per_unit(cell, reach) * H * dtype.itemsize
    whole = WholeRequest(cell, dtype, T, B, inputs, H, biased, frames, keeps_gates(tapes, taped))
    by_torch = kernel == "auto" and one and not runs_again and kernels.left_to_torch(call, differentiated)
    passes = kernels.WholeTorch(whole, differentiated) if by_torch else chosen.whole(whole)
    if passes is not None and layers * D > 1:
        lowest, upper = (_each_way(chosen, whole._replace(I=width), D) for width in (inputs, D * H))
        passes = kernels.WholeNet(whole, layers, lowest, upper) if lowest and upper else None
    if passes is None or (differentiated and (layers * D > 1 or runs_again) and not passes.pulls):
        return None
    with torch.inference_mode(False):  # whatever the mode of the first call
        initial = tuple(torch.zeros(layers * D, B, H, dtype=dtype, device=device) for _ in range(cell.states))
    return PlainCall(stack, passes, initial, by_torch and differentiated, runs_again)


def _each_way(kernel: WholeKernel, whole: WholeRequest, D: int) -> tuple[WholePasses, ...]:
    """The passes over each direction of a layer; none where the kernel has none."""
    ways = [kernel.whole(whole._replace(reverse=d == 1)) for d in range(D)]
    return tuple([way for way in ways if way is not None])


def _keeper(net: Net, memory: Checkpoints, shape: torch.Size, H: int, dtype: torch.dtype) -> NetPrograms | None:
    """The program with checkpoints of a call on x of this shape; None where the budget is too small."""
    (_, B, inputs), D, GH = shape, net.directions, net.cell.gates_per_unit * H
    like = torch.empty(0, dtype=dtype, device="meta")  # sizes alone are looked at
    tensors = [like.new_empty(shape), *[like.new_empty(net.layers * D, B, H) for _ in range(net.cell.states)]]
    for k in range(net.layers * D):
        width = inputs if k < D else D * H
        tensors += [like.new_empty(GH, width), like.new_empty(GH, H), *[like.new_empty(GH)] * (2 * net.biased)]
    try:
        return with_checkpoints(net, memory, tuple(tensors))
    except ValueError:
        return None


def at_once(stack: Stack, call: Call) -> tuple[Tensor, ...] | None:
    """(y, the final state) of a call that is not differentiated, by the kernel alone; None where more is needed.

    The rest of a program's work may take longer than a step.
    """
    x, net = call.x, stack.net
    if net.layers * net.directions > 1 or type(x) is not Tensor or seen(x):
        return None
    if torch._C._are_functorch_transforms_active() or has_torch_function(call.tensors):
        return None
    with named(stack.name, "forward"):
        return net.kernel.infer(net.cell, x, call.hx, Weights.of(call.weights, net.biased))
