"""Calls on packed sequences that run on their rows as they lie, without padding; and on padded ones as if packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter, functional
from torch.nn.utils.rnn import PackedSequence

from .. import kernels
from ..engine import PackedStack, is_observed, needs_gradient, run
from ..kernels import PackedRows, Request
from ..memory import Checkpoints
from ._sequences import checked_lengths
from .call import Hidden, Layer, bare, plain_net
from .packing import rows_of

__all__ = ["packed_call", "padded_call"]


def padded_call(
    layer: Layer, input: Tensor, hx: Hidden | None, lengths: Tensor | Sequence[int]
) -> tuple[Tensor, Hidden] | None:
    """The result of a call without resets on padded sequences, of which the steps alone are read and computed: as of
    packed ones, whose rows lie where the caller has them. None where all are as long as the input, or as in
    `packed_call`.
    """
    if is_observed(profiled=False) or input.dim() != 3 or input.layout is not torch.strided or 0 in input.shape[:2]:
        return None
    if not (type(lengths) is Tensor or (isinstance(lengths, list | tuple) and all(type(n) is int for n in lengths))):
        return None
    if layer.gradient.draws_factors or isinstance(layer.memory, Checkpoints):
        return None
    ends = checked_lengths(lengths, input.transpose(0, 1) if layer.batch_first else input)
    T, B = input.shape[:2] if not layer.batch_first else (input.shape[1], input.shape[0])
    if ends is None or bool((ends == T).all()):
        return None
    rows, order, lane = rows_of(ends)
    at = lane * T + rows.step if layer.batch_first else rows.step * B + lane
    at, order = at.to(input.device), order.to(input.device)
    data = input.flatten(0, 1).index_select(0, at)
    found = packed_call(layer, PackedSequence(data, rows.sizes, order, order.argsort()), hx)
    if found is None:
        return None
    y = found[0].data
    padded = y.new_zeros(T * B, y.shape[1]).index_copy(0, at, y)
    return padded.view(*input.shape[:2], y.shape[1]), found[1]


def packed_call(layer: Layer, packed: PackedSequence, hx: Hidden | None) -> tuple[PackedSequence, Hidden] | None:
    """The result of a call without resets on its rows, as they lie; None where it has to be padded, or refused."""
    if is_observed(profiled=False):
        return None
    tensors = _fitting(layer, packed, hx)
    if tensors is None:
        return None
    states, weights = tensors
    data, sizes, order, back = packed
    gradient, memory = layer.gradient, layer.memory
    differentiated = torch.is_grad_enabled() and needs_gradient((data, *states, *weights))
    if differentiated and (gradient.draws_factors or isinstance(memory, Checkpoints)):
        return None
    if order is not None:
        states = tuple([state.index_select(1, order) for state in states])
    rows = PackedRows(sizes)
    T, B = rows.T, rows.B
    if rows.S == T * B:  # all as long as the first: rows of a tensor
        x = data.unflatten(0, (T, B))
        x = x.transpose(0, 1) if layer.batch_first else x
        y, last = layer._own_forward(x, bare(states), resets=None, reset_state=None)
        y = (y.transpose(0, 1) if layer.batch_first else y).flatten(0, 1)
        final = (last,) if isinstance(last, Tensor) else last
    else:
        cell, D = layer.cell(), 2 if layer.bidirectional else 1
        request = Request(cell, data.device, data.dtype, projection=layer.proj_size > 0)
        sizes_of_net = layer.num_layers, D, len(weights), layer.bias
        kinds = tuple(kernels.KERNELS.values())
        net = plain_net(layer.kernel, request, kinds, *sizes_of_net, gradient.reach(T))
        net = replace(net, lengths=rows.lengths)
        if not PackedStack.takes(net, T, B):
            return None
        if layer.dropout > 0 and layer.training:
            ones = data.new_ones(rows.S, D * (layer.proj_size or layer.hidden_size))
            masks = [functional.dropout(ones, layer.dropout) for _ in range(layer.num_layers - 1)]
            net = replace(net, masks=tuple(masks))
        program = PackedStack(net, rows, "gates" if isinstance(memory, Checkpoints) else memory)
        y, *final = run(program, data, *states, *weights)
    if back is not None:
        final = [state.index_select(1, back) for state in final]
    return packed._replace(data=y), bare(tuple(final))


def _fitting(
    layer: Layer, packed: PackedSequence, hx: Hidden | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None:
    """(the initial states, the weights), all of one dtype on the CPU and of the sizes they must have; else None."""
    data, sizes = packed.data, packed.batch_sizes
    parameters = layer._parameters
    try:
        weights: Any = [parameters[name] for name in layer._flat_weights_names]
    except KeyError:  # computed from others, as by weight_norm
        return None
    count = layer.cell().states
    given: Any = () if hx is None else hx if type(hx) is tuple else (hx,)
    if hx is not None and (len(given) != count or (type(hx) is tuple) != (count == 2)):
        return None
    for t in (data, *given, *weights):
        if (type(t) is not Parameter and type(t) is not Tensor) or not t.is_cpu or t.dtype != data.dtype:
            return None
    if data.layout is not torch.strided or data.dim() != 2 or data.shape[1] != layer.input_size or len(data) == 0:
        return None
    if bool((sizes[1:] > sizes[:-1]).any()) or int(sizes[-1]) < 1 or int(sizes.sum()) != len(data):
        return None
    K, B, H = layer.num_layers * (2 if layer.bidirectional else 1), int(sizes[0]), layer.hidden_size
    wide = (layer.proj_size or H, H)[:count]
    if hx is None:
        given = [data.new_zeros(K, B, size) for size in wide]
    elif any(state.shape != (K, B, size) for state, size in zip(given, wide, strict=True)):
        return None
    return tuple(given), tuple(weights)
