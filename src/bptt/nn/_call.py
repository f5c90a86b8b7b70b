"""From torch.nn's calling conventions to the engine's, and back.

Layouts, packed sequences, unbatched input and initial states are translated here and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .. import kernels, policies
from ..engine import Stack
from ..kernels import Request

if TYPE_CHECKING:
    from ._layers import Recurrent

__all__ = ["Call", "Hidden", "program"]

Hidden = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Call:
    """One forward call in the engine's terms, and the way back to the caller's."""

    x: Tensor  # [T, B, I]
    hx: tuple[Tensor, ...]  # h_0 [L*D, B, P], c_0 [L*D, B, H]
    weights: tuple[Tensor, ...]
    lengths: Tensor  # [B], on the CPU
    ragged: bool
    resets: Tensor | None  # [T, B]
    packed: PackedSequence | None
    batched: bool
    batch_first: bool

    @classmethod
    def of(cls, layer: Recurrent, input: Tensor | PackedSequence, hx: Hidden | None, resets: Tensor | None) -> Call:
        layer._update_flat_weights()
        weights = tuple(getattr(layer, name) for name in layer._flat_weights_names)
        name = type(layer).__name__
        packed = input if isinstance(input, PackedSequence) else None
        if packed is not None:
            flat, batch_sizes = packed.data, packed.batch_sizes
            batched, sizes = True, batch_sizes
        else:
            if not isinstance(input, Tensor):
                raise TypeError(f"{name}: input must be a Tensor or a PackedSequence: got {type(input).__name__}")
            if input.dim() not in (2, 3):
                raise ValueError(f"{name}: Expected input to be 2D or 3D, got {input.dim()}D instead")
            batched, sizes = input.dim() == 3, None
            flat = input if batched else input.unsqueeze(0 if layer.batch_first else 1)
        states = cls._hidden(layer, flat, hx, batched, sizes)
        layer.check_forward_args(flat, bare(states), sizes)  # type: ignore[arg-type]  # an LSTM takes the pair
        for state in states:
            if state.dtype != flat.dtype and not torch._C._is_any_autocast_enabled():
                raise RuntimeError(f"{name}: hx must have input's dtype {flat.dtype}: got {state.dtype}")
        if packed is not None:
            x, lengths = pad_packed_sequence(packed)
            ragged = bool((lengths != x.shape[0]).any())
        else:
            x, ragged = flat.transpose(0, 1) if layer.batch_first else flat, False
            if x.shape[0] == 0:
                raise RuntimeError(
                    f"{name}: Expected sequence length to be larger than 0, got an input of shape {tuple(flat.shape)}"
                )
            lengths = torch.full((x.shape[1],), x.shape[0], device="cpu")
        if torch._C._is_any_autocast_enabled():
            # The walk stays in the parameters' precision: a recurrence amplifies rounding step by step.
            x, states = x.to(weights[0].dtype), tuple(state.to(weights[0].dtype) for state in states)
        resets = cls._resets(name, resets, x, batched, layer.batch_first)
        return cls(x, states, weights, lengths, ragged, resets, packed, batched, layer.batch_first)

    @staticmethod
    def _hidden(
        layer: Recurrent, flat: Tensor, hx: Hidden | None, batched: bool, sizes: Tensor | None
    ) -> tuple[Tensor, ...]:
        """The initial states, zeros where none were given, with torch.nn's errors for a wrong number of dimensions."""
        count = layer.cell().states
        if hx is None:
            shapes = (layer.get_expected_hidden_size(flat, sizes), layer.get_expected_cell_size(flat, sizes))
            return tuple(flat.new_zeros(shape) for shape in shapes[:count])
        given = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        if len(given) != count or isinstance(hx, Tensor) != (count == 1):
            expected = "a tuple (h_0, c_0)" if count == 2 else "one tensor h_0"
            got = "one tensor" if isinstance(hx, Tensor) else f"a {type(hx).__name__} of {len(given)}"
            raise RuntimeError(f"{type(layer).__name__}: hx must be {expected}: got {got}")
        expected_dim = 3 if batched else 2
        if sizes is None and any(state.dim() != expected_dim for state in given):
            kind, dims = "batched 3-D" if batched else "unbatched 2-D", ", ".join(f"{s.dim()}-D" for s in given)
            raise RuntimeError(f"For {kind} input, hx should also be {expected_dim}-D but got ({dims}) tensors")
        return given if batched else tuple(state.unsqueeze(1) for state in given)

    @staticmethod
    def _resets(name: str, resets: Tensor | None, x: Tensor, batched: bool, batch_first: bool) -> Tensor | None:
        if resets is None:
            return None
        T, B = x.shape[:2]
        expected = (T,) if not batched else (B, T) if batch_first else (T, B)
        if not isinstance(resets, Tensor) or resets.dtype != torch.bool:
            got = resets.dtype if isinstance(resets, Tensor) else type(resets).__name__
            raise TypeError(f"{name}: resets must be a bool tensor of shape {expected}: got {got}")
        if tuple(resets.shape) != expected:
            raise ValueError(f"{name}: resets must have shape {expected}: got {tuple(resets.shape)}")
        if resets.device != x.device:
            raise ValueError(f"{name}: resets must be on input's device {x.device}: got {resets.device}")
        return resets[:, None] if not batched else resets.t() if batch_first else resets

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The engine's inputs, in its order."""
        return (self.x, *self.hx, *self.weights)

    def dropout_mask(self, layer: Recurrent) -> Tensor:
        """What multiplies the input of a layer above the first `[T, B, D*P]`: the numbers torch.nn would draw."""
        features = (2 if layer.bidirectional else 1) * (layer.proj_size or layer.hidden_size)
        if self.packed is None:
            return functional.dropout(self.x.new_ones(*self.x.shape[:2], features), layer.dropout)
        mask = functional.dropout(self.x.new_ones(len(self.packed.data), features), layer.dropout)
        return self.engine_layout(self.packed._replace(data=mask))

    def restore(self, y: Tensor) -> Tensor | PackedSequence:
        """`[T, B, D*P]` in the caller's layout."""
        if self.packed is not None:
            order, lengths = self.packed.sorted_indices, self.lengths
            if order is not None:
                y, lengths = y.index_select(1, order), lengths[order.cpu()]
            data = pack_padded_sequence(y, lengths).data
            return self.packed._replace(data=data)
        if not self.batched:
            return y.squeeze(1)
        return y.transpose(0, 1) if self.batch_first else y

    def restore_hidden(self, final: tuple[Tensor, ...]) -> Hidden:
        """Final states in the caller's layout."""
        return bare(final if self.batched else tuple(state.squeeze(1) for state in final))

    def engine_layout(self, dy: Tensor | PackedSequence) -> Tensor:
        """A cotangent of the output, in the caller's layout, as `[T, B, D*P]`."""
        if isinstance(dy, PackedSequence):
            return pad_packed_sequence(dy)[0]
        if not self.batched:
            return dy.unsqueeze(1)
        return dy.transpose(0, 1) if self.batch_first else dy


def bare(states: tuple[Tensor, ...]) -> Hidden:
    """(h,) as h and (h, c) as it is: torch.nn's form."""
    return states[0] if len(states) == 1 else (states[0], states[1])


def program(layer: Recurrent, call: Call, gradient: policies.Policy, differentiated: bool) -> Stack:
    """The stack of this call, with everything random in it drawn: xi only for a call that will be differentiated."""
    x, cell = call.x, layer.cell()
    T, B = x.shape[:2]
    D = 2 if layer.bidirectional else 1
    choice = kernels.choose(layer.kernel, Request(cell, x.device, x.dtype))
    masks: tuple[Tensor, ...] = ()
    if layer.training and layer.dropout > 0:
        masks = tuple(call.dropout_mask(layer) for _ in range(layer.num_layers - 1))
    xi: list[Tensor] = []
    if differentiated:
        # In a bidirectional stack a path may cross one time edge several times, so each k draws its own.
        draws = [gradient.draw(T, B) for _ in range(layer.num_layers * D if D == 2 else 1)]
        xi = [d[..., None].to(x) for d in draws if d is not None] * (layer.num_layers if D == 1 else 1)
    stack = Stack(
        cell=cell,
        kernel=choice.kernel,
        layers=layer.num_layers,
        directions=D,
        per_layer=len(call.weights) // (layer.num_layers * D),
        biased=layer.bias,
        reach=gradient.reach(T),
        memory=layer.memory,
        lengths=call.lengths,
        ragged=call.ragged,
        masks=masks,
        xi=tuple(xi),
    )
    if call.resets is None and not call.ragged:
        return stack
    none = torch.zeros(T, B, dtype=torch.bool, device=x.device)
    return stack.with_resets(none if call.resets is None else call.resets)
