"""A call in which nothing is drawn, reset or padded: what it runs is known from one such call to the next."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import has_torch_function

from .. import kernels, policies
from ..cells import Cell, Weights
from ..engine import Net, PlainCall, Stack, is_observed, named, seen
from ..kernels import Frames, Kernel, Request, WholeKernel, WholeRequest
from ..memory import Checkpoints, Memory, Tapes, keeps_gates
from .call import Call, Hidden, Layer, bare

__all__ = ["at_once", "by_torch", "plain", "undrawn"]


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
    x, cell, projection = call.x, layer.cell(), layer.proj_size > 0
    sizes = layer.num_layers, 2 if layer.bidirectional else 1, len(call.weights)
    kinds, reach = tuple(kernels.KERNELS.values()), gradient.reach(x.shape[0])
    return _known(layer.kernel, cell, x.device, x.dtype, projection, kinds, sizes, layer.bias, reach, memory)


@lru_cache(maxsize=256)
def _known(
    kernel: str,
    cell: Cell,
    device: torch.device,
    dtype: torch.dtype,
    projection: bool,
    kernels_there_are: tuple[Kernel, ...],
    sizes: tuple[int, int, int],
    biased: bool,
    reach: policies.Reach,
    memory: Tapes,
) -> Stack:
    layers, D, weights = sizes
    chosen = kernels.choose(kernel, Request(cell, device, dtype, projection=projection)).kernel
    return Stack(Net(cell, chosen, layers, D, weights // (layers * D), biased, reach), memory)


def plain(layer: Layer, input: Tensor, hx: Hidden | None) -> tuple[Tensor, Hidden] | None:
    """The result of a call without resets, where it is plain: see `engine.plain`. None for all others, among them those
    with something to refuse.
    """
    if is_observed() or input.is_nested:
        return None
    parameters = layer._parameters
    try:
        weights = [parameters[name] for name in layer._flat_weights_names]
    except KeyError:  # computed from others, as by weight_norm
        return None
    cell, gradient = layer.cell(), layer.gradient
    given: tuple[Any, ...] = () if hx is None else hx if type(hx) is tuple else (hx,)
    if hx is not None and (len(given) != cell.states or (type(hx) is tuple) != (cell.states == 2)):
        return None
    shape = input.shape
    if len(shape) != 3 or layer.batch_first or gradient.draws_factors:
        return None
    for t in (*given, *weights):
        if type(t) is not Parameter and type(t) is not Tensor:
            return None
    call = _plain(
        layer.kernel,
        cell,
        input.dtype,
        tuple(kernels.KERNELS.values()),
        shape,
        (layer.num_layers, layer.bidirectional, layer.proj_size, layer.hidden_size, len(weights)),
        layer.bias,
        gradient.reach(shape[0]),
        layer.memory,
    )
    if call is None or (
        shape[0] <= kernels.STEPS_BY_TORCH and cell.mode in kernels.BY_TORCH and torch.is_grad_enabled()
    ):
        return None
    tensors: Any = (input, *(given or call.initial), *weights)
    if has_torch_function(tensors):
        return None
    outputs = call(tensors)
    if outputs is None:
        return None
    return outputs[0], bare(outputs[1:])


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
) -> PlainCall | None:
    """The plain call on x of this shape on the CPU; None where it is not plain."""
    (T, B, inputs), (layers, bidirectional, proj_size, H, weights) = shape, sizes
    if layers > 1 or bidirectional or proj_size > 0 or isinstance(memory, Checkpoints) or T * B == 0:
        return None
    device = torch.device("cpu")
    stack = _known(kernel, cell, device, dtype, False, kernels_there_are, (1, 1, weights), biased, reach, memory)
    if not isinstance(stack.net.kernel, WholeKernel):
        return None
    frames = Frames.of(stack.net.blocks(T, B), None, T, B)
    gates = keeps_gates(memory, T * B * cell.taped_per_unit * H * dtype.itemsize)
    request = WholeRequest(cell, dtype, T, B, inputs, H, biased, frames, gates)
    passes = stack.net.kernel.whole(request)
    if passes is None:
        return None
    with torch.inference_mode(False):  # whatever the mode of the first call
        initial = tuple(torch.zeros(1, B, H, dtype=dtype, device=device) for _ in range(cell.states))
    return PlainCall(stack, passes, initial)


def by_torch(layer: Layer, call: Call) -> tuple[Tensor, ...] | None:
    """(y, the final state) of a differentiated call by torch's own layer, where that is faster; else None.

    It may be for one layer in one direction, where nothing is reset or padded and the gradient is the full one.
    """
    if call.x.shape[0] > kernels.STEPS_BY_TORCH or torch.compiler.is_compiling() or type(call.x) is not Tensor:
        return None
    plain = call.lengths is None and call.resets is None
    plain = plain and not torch._C._is_any_autocast_enabled()  # in which torch's layer computes products less precisely
    if not plain or has_torch_function(call.tensors):
        return None
    function = kernels.torch_layer(layer, call.x)
    if function is None:
        return None
    with named(Stack.name, "forward"):
        return function(call.x, call.hx[0], call.weights, layer.bias, 1, 0.0, False, False, False)


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
