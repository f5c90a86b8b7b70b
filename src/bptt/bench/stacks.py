"""Networks of several layers, both ways, and of sequences of unequal lengths: bptt's layer against torch.nn's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from .. import nn
from ..nn import LAYERS
from .cases import Case
from .contest import Call, Contest

__all__ = ["STACKS", "stack_contest"]

STACKS = tuple(
    Case(cell, *shape, layers=layers, both_ways=both_ways, packed=packed)
    for shape, layers, both_ways, packed in (
        ((100, 16, 64, 128), 2, False, False),
        ((100, 16, 64, 128), 4, False, False),
        ((35, 32, 256, 256), 2, False, False),
        ((100, 16, 64, 128), 1, True, False),
        ((100, 16, 64, 128), 2, True, False),
        ((100, 1, 32, 32), 1, True, False),
        ((100, 32, 64, 128), 1, False, True),
        ((100, 32, 64, 128), 2, True, True),
    )
    for cell, layer in LAYERS.items()
    if layer.torchs is not None
)
"""What is timed of them."""


def stack_contest(case: Case, kernel: str = "auto") -> Contest:
    """bptt's layer against torch.nn's of the same arguments and weights, forward and backward.

    packed: lane b has about T (1 - b/2B) steps, in this order. The truth is torch.nn's layer in float64. Raises
    ValueError for a cell that torch.nn lacks.

    >>> contest = stack_contest(Case("gru", 5, 2, 3, 4, layers=2, both_ways=True, packed=True))
    >>> {name: error < 1e-5 for name, (error, _) in contest.errors().items()}
    {'bptt': True, 'torch.nn': True}
    """
    theirs: Any = None if case.cell not in LAYERS else LAYERS[case.cell].torchs
    if theirs is None:
        raise ValueError(f"case must be of a cell that torch.nn has: got {case}")
    sizes = {"input_size": case.I, "hidden_size": case.H, "num_layers": case.layers, "bidirectional": case.both_ways}
    layer, exact = theirs(**sizes), theirs(**sizes, dtype=torch.float64)
    kind: Any = nn.LAYERS[case.cell]
    mine = kind(**sizes, gradient=case.gradient, kernel=kernel)
    for other in (mine, exact):
        other.load_state_dict(layer.state_dict())
    x, dy = torch.randn(case.T, case.B, case.I), torch.randn(case.T, case.B, case.H * (1 + case.both_ways))
    lengths = [max(1, case.T - case.T * b // (2 * case.B)) for b in range(case.B)] if case.packed else None
    calls = {"bptt": _call(mine, x, dy, lengths), "torch.nn": _call(layer, x, dy, lengths)}
    truth = [np.asarray(value) for value in _call(exact, x.double(), dy.double(), lengths)()]
    return Contest(("y", "x", *(name for name, _ in layer.named_parameters())), calls, truth)


def _call(layer: torch.nn.Module, x: Tensor, dy: Tensor, lengths: Sequence[int] | None) -> Call:
    """The outputs of all steps that there are, then the gradients of their product with dy in x and the weights."""
    if lengths is None:
        given: Any = x.clone().requires_grad_()
        leaf = given
    else:
        packed = pack_padded_sequence(x, torch.tensor(lengths))
        dy = pack_padded_sequence(dy, torch.tensor(lengths)).data
        leaf = packed.data.clone().requires_grad_()
        given = PackedSequence(leaf, packed.batch_sizes)
    inputs = [leaf, *layer.parameters()]

    def call() -> Sequence[Tensor]:
        y, _ = layer(given)
        y = y if lengths is None else y.data
        return y.detach(), *torch.autograd.grad(y, inputs, dy)

    return call
