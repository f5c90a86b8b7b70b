"""One direction of a recorded call of a bidirectional `Recurrent` of one layer: a scan of its own."""

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
            "direction, in opposite times; of one layer, direction='forward' or 'reverse' takes one of them"
        )
    if layer.num_layers > 1 or hasattr(layer, "initial_states"):
        what = "several layers" if layer.num_layers > 1 else "a learned initial state"
        raise ValueError(
            f"the layer {name!r} must be one-directional: got a bidirectional one with {what}, of which no direction "
            "is a scan of its own. Measure a Recurrent of one of its cells at a time"
        )


def one_direction(
    call: RecurrentCall, output: tuple[Any, Any], errors: list[Tensor | None], direction: Direction
) -> tuple[RecurrentCall, list[Tensor | None]]:
    """(a call of one direction's cell alone, its part of the errors of y and of the tensors of the final state).

    The cell is the layer's own. What it draws at random is drawn as at the beginning of the recorded call.

    Raises ValueError for a call with `reset_state`.
    """
    layer, d = call.layer, int(direction == "reverse")
    options: dict[str, Any] = {"gradient": layer.gradient, "memory": layer.memory, "kernel": layer.kernel}
    alone = Recurrent(layer.cells[d], batch_first=layer.batch_first, reverse=bool(d), form=layer.form, **options)
    if call.kwargs.get("reset_state") is not None:
        raise ValueError("the call of a bidirectional layer must be without reset_state to be measured: got one")
    kwargs = {**call.kwargs, "hx": _of_one(call.hx, d)}
    part = RecurrentCall(alone, call.args[:1], kwargs, call.generators)
    with torch.no_grad():
        whole, own = tensors_of(output)[0], tensors_of(part.run(layer.gradient))[0]
    along = next(i for i, (both, one) in enumerate(zip(whole.shape, own.shape, strict=True)) if both != one)
    y = None if errors[0] is None else errors[0].chunk(2, along)[d]
    finals, places = errors[1:], [t for t in tree_leaves(output[1]) if isinstance(t, Tensor)]
    kept = {id(t) for t in tree_leaves(output[1][d])} if isinstance(output[1], list) else None
    if kept is not None:
        return part, [y, *(error for error, t in zip(finals, places, strict=True) if id(t) in kept)]
    return part, [y, *(None if error is None else error[d : d + 1] for error in finals)]


def _of_one(state: Any, d: int) -> Any:
    """The state of one direction out of that of both."""
    if state is None:
        return None
    if isinstance(state, list):
        return state[d : d + 1]
    return tree_map(lambda t: t[d : d + 1] if isinstance(t, Tensor) else t, state)
