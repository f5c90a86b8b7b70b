"""The recurrent layers of a network, of any cell: a layer with kernels, one from the literature, or the user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import nn
from ..policies import Policy
from .errors import InputError
from .imported import imported
from .options import LITERATURE, has_kernels

__all__ = ["recurrent_layers"]


def recurrent_layers(
    cell: str,
    inputs: int,
    hidden: int,
    *,
    nonlinearity: str | None = None,
    layers: int = 1,
    bidirectional: bool = False,
    dropout: float = 0.0,
    gradient: str | Policy = "full",
    memory: str = "auto",
    kernel: str = "auto",
) -> Any:
    """The recurrent layers of a network: `[T, B, inputs]` to `[T, B, hidden]`, or twice as many in both directions.

    cell: a name in `bptt.nn.LAYERS`, or, for a `bptt.nn.Recurrent`, one of a cell of `bptt.nn.cells` or MODULE:CLASS.
    dropout: between layers.

    Raises InputError for a class that cannot be imported, is no module, cannot be made of (input_size, hidden_size), or
    is no cell that puts out `[B, hidden_size]`.
    """
    options: dict[str, Any] = {
        "dropout": dropout if layers > 1 else 0.0,  # torch warns of dropout without a layer above
        "bidirectional": bidirectional,
        "gradient": gradient,
        "memory": memory,
        "kernel": kernel,
    }
    if has_kernels(cell):
        given = {} if nonlinearity is None else {"nonlinearity": nonlinearity}
        kind: Any = nn.LAYERS[cell]
        return kind(inputs, hidden, num_layers=layers, **options, **given)
    width = hidden * (2 if bidirectional else 1)
    make = _maker(cell)
    made = nn.Recurrent(lambda layer: make(width if layer else inputs, hidden), layers, **options)
    _try(cell, made, inputs, hidden, width)
    return made


def _maker(cell: str) -> Callable[[int, int], torch.nn.Module]:
    """What makes a cell of (input_size, hidden_size)."""
    if cell in LITERATURE:
        return getattr(nn.cells, LITERATURE[cell])
    kind = imported("cell", cell)
    if not (isinstance(kind, type) and issubclass(kind, torch.nn.Module)):
        what = f"the class {kind.__name__}" if isinstance(kind, type) else f"a {type(kind).__name__}"
        raise InputError(f"cell {cell} must be a class of torch.nn.Module: got {what}")

    def make(inputs: int, hidden: int) -> torch.nn.Module:
        try:
            return kind(inputs, hidden)
        except Exception as error:  # whatever somebody's constructor raises
            raise InputError(
                f"cell {cell} must be made by {kind.__name__}(input_size, hidden_size): ({inputs}, {hidden}) raised "
                f"{_said(error)}"
            ) from error

    return make


def _try(cell: str, layers: nn.Recurrent, inputs: int, hidden: int, width: int) -> None:
    """Raise InputError for what cannot be called as a cell, or puts out something else than `[B, hidden]`."""
    like = next((p for p in layers.parameters() if p.is_floating_point()), None)
    x = torch.zeros(2, 3, inputs, dtype=None if like is None else like.dtype, device="cpu")
    layers.eval()  # nothing is counted, as by a batch norm
    try:
        with torch.no_grad():
            y, _ = layers(x)
    except Exception as error:  # whatever somebody's forward raises
        raise InputError(
            f"cell {cell} cannot run as a layer of {inputs} inputs and {hidden} units: {_said(error)}"
        ) from error
    layers.train()
    if y.shape != (2, 3, width):
        got = "one number a lane" if y.dim() < 3 else f"[B, {', '.join(map(str, y.shape[2:]))}]"
        raise InputError(f"cell {cell} must put out [B, hidden_size], here [B, {hidden}]: got {got}")


def _said(error: Exception) -> str:
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
