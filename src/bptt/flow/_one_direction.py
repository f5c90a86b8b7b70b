"""One direction of the top layer of a recorded call of a bidirectional `Recurrent`: a scan of its own."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..nn import Recurrent
from ._recurrent_call import RecurrentCall, tensors_of

__all__ = ["Direction", "check_direction", "one_direction"]

Direction = Literal["forward", "reverse"]


def check_direction(layer: Recurrent, name: str, direction: Direction | None) -> None:
    """Raise ValueError where a layer is no single scan, and for a direction that it does not have."""
    if direction not in (None, "forward", "reverse"):
        raise ValueError(f"direction must be 'forward' or 'reverse': got {direction!r}")
    if not layer.bidirectional:
        if direction is not None:
            raise ValueError(f"direction is for a bidirectional layer: got {direction!r} for {name!r}")
        return
    if direction is None:
        raise ValueError(
            f"the layer {name!r} must be one-directional: got a bidirectional one, which is a scan for each layer and "
            "direction, in opposite times; direction='forward' or 'reverse' takes one of the top layer's"
        )
    if hasattr(layer, "initial_states"):
        raise ValueError(
            f"the layer {name!r} must be one-directional: got a bidirectional one with a learned initial state, of "
            "which no direction is a scan of its own. Measure a Recurrent of one of its cells at a time"
        )


def one_direction(
    call: RecurrentCall, output: tuple[Any, Any], errors: list[Tensor | None], direction: Direction
) -> tuple[RecurrentCall, list[Tensor | None]]:
    """(a call of the top layer's cell of one direction alone, its part of the errors of y and of the tensors of the
    final state).

    The cell is the layer's own, and reads what the layers below gave it, dropout drawn as it was. What the cell itself
    draws at random is drawn as at the beginning of the recorded call.

    Raises ValueError for a call with `reset_state`.
    """
    layer, d = call.layer, int(direction == "reverse")
    k = len(layer.cells) - 2 + d
    options: dict[str, Any] = {"gradient": layer.gradient, "memory": layer.memory, "kernel": layer.kernel}
    alone = Recurrent(layer.cells[k], batch_first=layer.batch_first, reverse=bool(d), form=layer.form, **options)
    if call.kwargs.get("reset_state") is not None:
        raise ValueError("the call of a bidirectional layer must be without reset_state to be measured: got one")
    others = {name: value for name, value in call.kwargs.items() if name in ("lengths", "resets")}
    with torch.no_grad():
        with call.drawing_again():
            read = layer.top_input(call.input, call.hx, **others)
        part = RecurrentCall(alone, (read,), {**others, "hx": _of_one(call.hx, k)}, call.generators)
        whole, own = tensors_of(output)[0], tensors_of(part.run(layer.gradient))[0]
    along = next(i for i, (both, one) in enumerate(zip(whole.shape, own.shape, strict=True)) if both != one)
    y = None if errors[0] is None else errors[0].chunk(2, along)[d]
    finals, places = errors[1:], [t for t in tree_leaves(output[1]) if isinstance(t, Tensor)]
    kept = {id(t) for t in tree_leaves(output[1][k])} if isinstance(output[1], list) else None
    if kept is not None:
        return part, [y, *(error for error, t in zip(finals, places, strict=True) if id(t) in kept)]
    return part, [y, *(None if error is None else error[k : k + 1] for error in finals)]


def _of_one(state: Any, k: int) -> Any:
    """The state of cell k out of that of all."""
    if state is None:
        return None
    if isinstance(state, list):
        return state[k : k + 1]
    return tree_map(lambda t: t[k : k + 1] if isinstance(t, Tensor) else t, state)
