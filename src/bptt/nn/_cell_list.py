"""The cells of a layer: made from its arguments, with inputs to try them and initial states to learn."""

from __future__ import annotations

from collections.abc import Iterable
from operator import index
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from ._forms import Form
from ._trial import declared_starts, try_cell

__all__ = ["cells_of", "learnable_state", "learned_state", "sample", "unlike"]


def cells_of(cell: Any, num_layers: int | None, D: int) -> list[nn.Module]:
    """One cell per layer and direction."""
    if num_layers is not None:
        try:
            num_layers = index(num_layers)
        except TypeError:
            raise TypeError(f"num_layers must be a whole number or None: got {num_layers!r}") from None
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1: got {num_layers}")
    if isinstance(cell, (list, tuple, nn.ModuleList)):
        cells = list(cell)
        if not cells or len(cells) % D or num_layers not in (None, len(cells) // D):
            wanted = "some" if num_layers is None else str(num_layers * D)
            raise ValueError(
                f"cell, a list, must hold {wanted} modules, one for each layer{' and direction' if D == 2 else ''}: "
                f"got {len(cells)}"
            )
    elif isinstance(cell, nn.Module):
        if (num_layers or 1) * D > 1:
            raise ValueError(
                f"cell must be a list of {(num_layers or 1) * D} modules, or a function of a layer's number that makes "
                f"one, for {num_layers or 1} layer(s) in {D} direction(s): got one {type(cell).__name__}"
            )
        cells = [cell]
    elif callable(cell):
        cells = [cell(layer) for layer in range(num_layers or 1) for _ in range(D)]
    else:
        raise TypeError(f"cell must be a module, a list of modules or a function: got {type(cell).__name__}")
    for made in cells:
        if not isinstance(made, nn.Module):
            raise TypeError(f"cell must be, hold or return torch.nn.Modules: got a {type(made).__name__}")
    return cells


def learnable_state(k: int, cell: nn.Module, form: Form) -> Any:
    """The first state of one lane that a cell tells, as parameters."""
    parameter = next((p for p in cell.parameters() if p.is_floating_point()), torch.zeros((), device="cpu"))
    features = getattr(cell, "input_size", None)
    starts, named = declared_starts(cell, parameter)
    if not starts or not (isinstance(features, int) or (named and len(starts) == 1)):
        raise ValueError(
            f"learn_initial_state must be False, or cell {k} must tell the shape of its state, by a method "
            f"initial_state(batch_size) or by input_size and hidden_size: got a {type(cell).__name__}"
        )
    if isinstance(features, int):
        x = sample(parameter.new_empty(1, features), unlike([cell], parameter))
        call = try_cell(cell, x, starts, True, form, f"cell {k}, a {type(cell).__name__},")
        assert call.start is not None
        state = call.start(1)
    else:
        state = starts[0](1)
    leaves, spec = tree_flatten(state)
    for t in leaves:
        if not isinstance(t, Tensor) or not t.is_floating_point() or not t.dim():
            raise TypeError(f"learn_initial_state needs states of floating-point tensors [B, ...]: got {t!r}")
    return spec.unflatten([nn.Parameter(t[0].detach().clone()) for t in leaves])


def learned_state(learned: Any, places: Any, B: int) -> Any:
    """The first state of B lanes. places: a state that holds the number of a learned tensor in the place of each."""
    return tree_map(lambda i: learned[i].expand(B, *learned[i].shape), places)


def unlike(cells: Iterable[nn.Module], x: Tensor, given: Any = None) -> int:
    """A number of lanes that no size in cells, input or states can be mistaken for."""
    modules = nn.ModuleList(cells)
    held = (t for t in (*modules.parameters(), *modules.buffers()) if not is_lazy(t))
    sizes = {n for t in (x, *held, *tree_leaves(given)) if isinstance(t, Tensor) for n in t.shape if isinstance(n, int)}
    return next(n for n in range(5, 10_000) if n not in sizes)


def sample(x: Tensor, rows: int) -> Tensor:
    """An input `[rows, ...]` to try a cell with: irregular numbers from 0 to 1, or the first lane's tokens."""
    if x.is_floating_point():
        values = torch.arange(1, 1 + rows * x.shape[1:].numel(), dtype=torch.float64, device="cpu")
        golden = (values * ((5**0.5 - 1) / 2)).remainder(1)  # which no random generator has drawn
        return golden.reshape(rows, *x.shape[1:]).to(x)
    return x[:1].expand(rows, *x.shape[1:]) if len(x) else x.new_zeros(rows, *x.shape[1:])
