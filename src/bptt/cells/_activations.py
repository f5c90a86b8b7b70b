"""What a gate's activation is: the function, its adjoint, and where its values lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ACTIVATIONS", "Activation"]


class Activation(NamedTuple):
    """An activation: f; its adjoint, dL/da from dL/df and f(a); and what is true of its values."""

    f: Callable[[Tensor], Tensor]
    pull: Callable[[Tensor, Tensor], Tensor]
    slope: float
    """The largest |f'|."""
    ends: tuple[float, float] | None = None
    """What its values lie between; None: it has no bounds. Near an end its slope is near 0."""
    flat: float | None = None
    """The value that it has wherever its slope is 0 exactly."""
    onnx: str = ""
    """Its name in ONNX's operators; "Affine" there is a itself, with the factor 1 and the summand 0."""


ACTIVATIONS = {
    "tanh": Activation(torch.tanh, lambda dh, h: dh * (1 - h * h), 1.0, (-1.0, 1.0), onnx="Tanh"),
    "relu": Activation(torch.relu, lambda dh, h: dh.masked_fill(h <= 0, 0), 1.0, flat=0.0, onnx="Relu"),
    "sigmoid": Activation(torch.sigmoid, lambda dh, h: dh * h * (1 - h), 0.25, (0.0, 1.0), onnx="Sigmoid"),
    "identity": Activation(lambda a: a, lambda dh, _: dh, 1.0, onnx="Affine"),
}
