"""A call of an RNN, GRU or LSTM layer with the arguments that it was made with, in the engine's terms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..engine import own_precision
from ..nn.call import Call
from ..nn.flat import Flat, is_flat
from ..nn.layers import DropInLayer

__all__ = ["LayerCall", "dense", "detached", "tensors_in"]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a module's arguments or output, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, PackedSequence):
        yield value.data
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))


def dense(tensor: Tensor) -> Tensor:
    """The tensor itself; of a nested one its values, one sequence after the other."""
    if not tensor.is_nested:
        return tensor
    return tensor.values() if tensor.layout is torch.jagged else torch.cat([part.flatten() for part in tensor.unbind()])


def detached(value: Any) -> Any:
    """The same arguments without their history, so that no graph is kept alive; values are shared."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, PackedSequence):
        return value._replace(data=value.data.detach())
    if isinstance(value, tuple | list):
        return tuple(detached(item) for item in value)
    if isinstance(value, dict):
        return {key: detached(item) for key, item in value.items()}
    return value


@dataclass(frozen=True, eq=False)
class LayerCall:
    """A layer's call. flat: how its sequences lie in the caller's tensors, where they lie one after the other."""

    call: Call
    flat: Flat | None

    @classmethod
    def of(cls, layer: DropInLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerCall:
        """The call with these arguments of `forward`, in the precision of the layer's parameters.

        Raises TypeError for an argument that a layer does not have, ValueError where no sequence has a step.
        """
        given = _forward(*args, **kwargs)
        input, resets = given["input"], given["resets"]
        dtype, states = next(layer.parameters()).dtype, [given["hx"], given["reset_state"]]
        if next(tensors_in(input)).dtype != dtype:  # under autocast
            input = input.to(dtype)
            for i, state in enumerate(states):
                found = tuple(s.to(dtype) for s in tensors_in(state))
                states[i] = None if state is None else found[0] if len(found) == 1 else found
        if not is_flat(input, given["cu_seqlens"]):
            with own_precision(next(layer.parameters()).device):
                return cls(Call.of(layer, input, states[0], resets, states[1], given["lengths"]), None)
        name = type(layer).__name__
        flat = Flat.of(name, input, given["cu_seqlens"])
        if flat.packed is None:
            raise ValueError(f"{name}: a sequence must have a step for anything to be measured: got none")
        hx, restart = (flat.states(of, state) for of, state in zip(("hx", "reset_state"), states, strict=True))
        with own_precision(next(layer.parameters()).device):
            return cls(Call.of(layer, flat.packed, hx, flat.resets(resets, layer.batch_first), restart), flat)

    def lane(self, lane: int) -> int:
        """The caller's number of a lane of `call`, which has none for a sequence without a step."""
        return lane if self.flat is None or self.flat.present is None else int(self.flat.present[lane])

    def errors(self, y: Any, dy: Tensor | None) -> Tensor:
        """The local errors `[T, B, D*P]`, zero beyond the end of a sequence.

        y: the output. dy: the gradient in it, of a PackedSequence in its data; None: 0.
        """
        rows = y.data if isinstance(y, PackedSequence) else y
        rows = torch.zeros_like(rows) if dy is None else dy
        given: Any = y._replace(data=rows) if isinstance(y, PackedSequence) else rows
        if self.flat is not None:
            given = self.flat.like_packed("dy", rows)
        errors, lengths = self.call.engine_layout(given), self.call.lengths
        if lengths is None:
            return errors
        steps = torch.arange(len(errors), device=errors.device)
        return errors.masked_fill((steps[:, None] >= lengths.to(errors.device))[..., None], 0)

    def final_errors(self, dfinal: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """The gradients in the final states, `[L*D, B, .]` of the sequences that have a step."""

        def own(d: Tensor) -> Tensor:
            d = d if self.call.batched else d.unsqueeze(1)
            return d if self.flat is None else self.flat.among_present(d)

        return tuple(None if d is None else own(d) for d in dfinal)


def _forward(
    input: Any,
    hx: Any = None,
    *,
    lengths: Any = None,
    cu_seqlens: Any = None,
    resets: Any = None,
    reset_state: Any = None,
) -> dict[str, Any]:
    """The arguments of a layer's `forward` by their names."""
    return locals()
