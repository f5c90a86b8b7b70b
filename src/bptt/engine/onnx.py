"""The operators of ONNX that a net is: LSTM, GRU or RNN for each layer, both directions in one.

Only the forward pass: a policy, memory and kernel are about gradients and speed, of which ONNX knows nothing. The
operators stand in a graph of torch.export as `torch.onnx.ops` has them, with what lies around them by torch operations.

Legend: T steps, B lanes, I input features, H hidden units, P size of h, G gates, L layers, D directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..cells import ACTIVATIONS, Cell, Weights
from .net import Net
from .ops import has_series, received, shaped_results
from .records import Tensors, given

__all__ = ["onnx_decompositions", "onnx_layers"]

OPSET = 14
"""The version of ONNX that the operators are those of; those of later versions differ in what they allow besides."""


def onnx_layers(net: Net, inputs: Tensors) -> tuple[Tensor, ...]:
    """The outputs of a net, from its inputs, by operators of ONNX.

    Raises NotImplementedError for resets, which they lack.
    """
    operator = net.cell.onnx
    if operator is None:
        raise NotImplementedError(f"ONNX has no operator that is the cell {net.cell.name!r}")
    if net.resets:
        raise NotImplementedError(
            "ONNX's operators have no resets: export the model without resets=, and call it once for each episode, "
            "with its first state. Of a program of torch.export with lengths=, which are resets in its padding, pass "
            "the model itself to torch.onnx.export(dynamo=True)"
        )
    y, weights, D = given(inputs[0]), net.weights(inputs), net.directions
    finals: list[tuple[Tensor, ...]] = []
    for layer in range(net.layers):
        ks = slice(layer * D, (layer + 1) * D)
        initial = [given(state)[ks] for state in inputs[1 : 1 + net.cell.states]]
        y, *final = _layer(operator, net, net.masked(y, layer), initial, weights[ks])
        finals.append(tuple(final))
    return (y, *map(torch.cat, zip(*finals, strict=True)))


def _layer(
    operator: str, net: Net, x: Tensor, initial: Sequence[Tensor], weights: Sequence[Weights]
) -> tuple[Tensor, ...]:
    """(y `[T, B, D*P]`, the final states `[D, B, .]`) of one layer."""
    cell, (T, B, _), D = net.cell, x.shape, len(weights)
    H = weights[0].ih.shape[0] // cell.gates_per_unit
    projections = [w.hr for w in weights if w.hr is not None]
    ih, hh = [w.ih for w in weights], [w.hh for w in weights]
    if projections:
        # The operator has no projection. W_hh h_{t-1} is (W_hh W_hr) m_{t-1} with what is projected, m; at the first
        # step of each direction it comes as a part of the input, which is zero at the others.
        x = torch.cat([x, *_at_first_step(net, x, initial[0])], -1)
        ih = [torch.cat([w.ih, *(w.hh if e == d else torch.zeros_like(w.hh) for e in range(D))], 1)
              for d, w in enumerate(weights)]  # fmt: skip
        hh = [w.hh @ given(w.hr) for w in weights]
        initial = [x.new_zeros(D, B, H), *initial[1:]]
    bias = None
    if net.biased:
        both = [torch.cat([_ordered(cell, given(w.b_ih)), _ordered(cell, given(w.b_hh))]) for w in weights]
        bias = torch.stack(both)
    lengths = None if net.lengths is None else net.lengths.to(x.device, torch.int32)
    W, R = (torch.stack([_ordered(cell, w) for w in of_each]) for of_each in (ih, hh))
    y, *final = torch.onnx.ops.symbolic_multi_out(
        operator,
        (x, W, R, bias, lengths, *initial),
        _attributes(cell, H, D),
        dtypes=[x.dtype] * (1 + cell.states),
        shapes=[(T, D, B, H), *[(D, B, H)] * cell.states],
        version=OPSET,
    )
    if projections:
        y = torch.stack([y[:, d] @ hr.t() for d, hr in enumerate(projections)], 1)
        final[0] = torch.stack([final[0][d] @ hr.t() for d, hr in enumerate(projections)])
    return y.transpose(1, 2).flatten(2), *final


def _attributes(cell: Cell, H: int, D: int) -> dict[str, Any]:
    """What an operator of ONNX is told of a cell."""
    attributes: dict[str, Any] = {"hidden_size": H, "direction": "bidirectional" if D == 2 else "forward"}
    if cell.slope is not None:  # a simple RNN, whose activation is a choice
        name = ACTIVATIONS[cell.activations[0]].onnx
        attributes["activations"] = [name] * D
        if name == "Affine":
            attributes |= {"activation_alpha": [1.0] * D, "activation_beta": [0.0] * D}
    return {**attributes, **cell.onnx_attributes}


def _ordered(cell: Cell, w: Tensor) -> Tensor:
    """Rows `[G*H, ...]` with the gates in the operator's order."""
    if cell.onnx_gates == cell.gate_names:
        return w
    H = w.shape[0] // cell.gates_per_unit
    firsts = [cell.gate_names.index(name) * H for name in cell.onnx_gates]
    return torch.cat([w[first : first + H] for first in firsts])  # slices, which ONNX's tools compute beforehand


def _at_first_step(net: Net, x: Tensor, h: Tensor) -> list[Tensor]:
    """For each direction a series `[T, B, P]`: h_0 at its first step, zero at the others."""
    t = torch.arange(x.shape[0], device=x.device)[:, None]
    last = x.shape[0] - 1 if net.lengths is None else net.lengths.to(x.device) - 1
    firsts = [t == (0 if d == 0 else last) for d in range(len(h))]
    return [h[d] * first[..., None].to(x.dtype) for d, first in enumerate(firsts)]


# For a graph that was exported before ---------------------------------------------------------------------------------


def onnx_decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """The decompositions of bptt's operators into ONNX's, for a program that torch.export has made.

    `torch.onnx.export(model, args, dynamo=True)` of a *model* needs none: each layer puts ONNX's operators into the
    graph. A *program* of torch.export holds a layer as `bptt::stack_forward`, which these take apart:

        program = torch.export.export(model, args)
        torch.onnx.export(program.run_decompositions(bptt.onnx_decompositions()), dynamo=True)

    The decomposed program is for ONNX alone: torch computes zeros with operators of `torch.onnx.ops`. They have no
    resets, which raise NotImplementedError.

    >>> import bptt
    >>> [str(operator) for operator in bptt.onnx_decompositions()]
    ['bptt.stack_forward.default', 'bptt.draw.default']
    """
    return {torch.ops.bptt.stack_forward.default: _decomposed, torch.ops.bptt.draw.default: _undrawn}


def _decomposed(tensors: list[Tensor], layout: str, keep: bool) -> list[Tensor]:
    """`bptt::stack_forward` by operators of ONNX; of what a backward pass would read the shapes alone."""
    net, memory, inputs = received(tensors, layout)
    y, *finals = onnx_layers(net, inputs)
    series, shapes = has_series(net, memory), shaped_results(tensors, layout, keep)
    return [torch.cat([y[:1], y]) if series else y, *finals, *shapes[net.outputs :]]


def _undrawn(uniform: Tensor, policy: str) -> Tensor:
    """`bptt::draw`, whose factors act in a backward pass alone."""
    return torch.ones_like(torch.cat([uniform[:1], uniform]))
