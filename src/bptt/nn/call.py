"""The translation of torch.nn's calling conventions to the engine's, and back.

Layouts, packed sequences, which are padded, unbatched input and initial states are translated here, for every call but
those that `undrawn` and `_packed` know a shorter way for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from .. import kernels, policies
from ..cells import CELLS
from ..engine import (
    Net,
    NetPrograms,
    Stack,
    draw,
    onnx_layers,
    recorder,
    refuse_recording,
    refuse_tangents,
    refuse_tracing_values,
    with_checkpoints,
)
from ..kernels import Kernel, Request
from ..memory import Checkpoints
from ._arguments import call_lengths, check_dtypes, no_weight, not_dense
from ._sequences import checked_resets
from .packing import packed_rows, padded, rows_of

__all__ = ["Call", "Hidden", "Layer", "bare", "by_onnx", "net_of", "plain_net", "program", "whole_tape"]

Hidden = Tensor | tuple[Tensor, Tensor]


class Layer(kernels.Layer, Protocol):
    """The part of a layer that a call uses: that of `kernels.explain`, and torch.nn.RNNBase's attributes and checks."""

    mode: str
    bias: bool
    dropout: float
    training: bool
    _flat_weights_names: list[str]
    _parameters: dict[str, torch.nn.Parameter | None]

    def _update_flat_weights(self) -> None: ...

    def _own_forward(self, input: Any, hx: Any, *, resets: Any, reset_state: Any) -> Any: ...

    def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None: ...


@dataclass(eq=False, slots=True)
class Call:
    """One forward call in the engine's layout, and the translation of its results to the caller's layout."""

    x: Tensor  # [T, B, I]
    hx: tuple[Tensor, ...]  # h_0 [L*D, B, P], c_0 [L*D, B, H]
    weights: tuple[Tensor, ...]
    lengths: Tensor | None  # [B], on the CPU; None where all are T
    resets: Tensor | None  # [T, B]
    reset_state: tuple[Tensor, ...]  # like hx, or with T before it; () for zero
    packed: PackedSequence | None
    batched: bool
    batch_first: bool
    # Under autocast, which casts them: the dtypes of the caller's x, states, weights, and of the states that resets
    # restart from; those of y and h, and of c. Else ().
    given: tuple[torch.dtype, ...] = ()
    results: tuple[torch.dtype, ...] = ()

    @classmethod
    def of(
        cls,
        layer: Layer,
        input: Tensor | PackedSequence,
        hx: Hidden | None,
        resets: Tensor | None,
        reset_state: Hidden | None = None,
        ends: Tensor | Sequence[int] | None = None,
        *,
        tangents: bool = False,
    ) -> Call:
        """The call of a layer with these arguments, checked. tangents: whether they may have forward-mode tangents."""
        names, parameters = layer._flat_weights_names, layer._parameters
        try:
            weights: tuple[Tensor, ...] = tuple([parameters[name] for name in names])  # type: ignore[misc]  # none is None
        except KeyError:  # computed from others, as by weight_norm
            weights = tuple(getattr(layer, name) for name in names)
        name = type(layer).__name__
        for weight in weights:
            if weight is None:
                raise no_weight(name, names[[w is None for w in weights].index(True)])
        packed = input if isinstance(input, PackedSequence) else None
        if packed is not None:
            flat, batch_sizes = packed.data, packed.batch_sizes
            batched, sizes = True, batch_sizes
        else:
            if not isinstance(input, Tensor):
                raise TypeError(f"{name}: input must be a Tensor or a PackedSequence: got {type(input).__name__}")
            if input.dim() not in (2, 3):
                raise ValueError(f"{name}: Expected input to be 2D or 3D, got {input.dim()}D instead")
            if input.layout is not torch.strided or input.is_nested:
                raise not_dense(name, input)
            batched, sizes = input.dim() == 3, None
            flat = input if batched else input.unsqueeze(0 if layer.batch_first else 1)
        if packed is not None or ends is not None:
            refuse_tracing_values(name, "the lengths of sequences")
        states = cls._hidden(layer, flat, hx, batched, sizes)
        if not tangents:
            refuse_tangents(name, (flat, *states, *weights))
        precision = None
        if torch._C._is_any_autocast_enabled():
            kinds = flat.dtype, () if hx is None else tuple([state.dtype for state in states])
            precision = kernels.precision(
                layer, flat.device, weights[0].dtype, *kinds, packed is not None, resets is not None
            )
        if not cls._fits(layer, flat, () if hx is None else states, weights[0].dtype, sizes):
            layer._update_flat_weights()
            layer.check_forward_args(flat, bare(states), sizes)
            if precision is None:
                check_dtypes(name, flat, states, weights[0].dtype)
        if packed is not None:
            x, own = padded(packed)
            lengths = own if recorder() is not None or (own != x.shape[0]).any() else None
            if ends is not None:
                raise ValueError(f"{name}: lengths must be None for a PackedSequence, which has its own")
        else:
            x, lengths = flat.transpose(0, 1) if layer.batch_first else flat, None
            if x.shape[0] == 0:
                raise RuntimeError(
                    f"{name}: Expected sequence length to be larger than 0, got an input of shape {tuple(flat.shape)}"
                )
            if ends is not None:
                lengths = call_lengths(name, ends, x)
                if lengths is not None:  # padding may hold anything, and gets no gradient
                    x = x.masked_fill(_ended(x, lengths), 0)
        given = (x, *states, *weights)
        if precision is not None:
            x, *others = [t.to(precision.walk) for t in given]
            states, weights = tuple(others[: len(states)]), tuple(others[len(states) :])
        if resets is not None:
            resets = checked_resets(resets, x, batched, layer.batch_first, f"{name}: ")
        elif reset_state is not None:
            raise ValueError(f"{name}: reset_state is what resets restart from: got it without resets")
        call = cls(x, states, weights, lengths, resets, (), packed, batched, layer.batch_first)
        if precision is not None:
            call.given, call.results = tuple([t.dtype for t in given]), precision.results
        if reset_state is not None:
            call.reset_state = call.restarts(layer, reset_state)
            if not tangents:
                refuse_tangents(name, call.reset_state)
        return call

    @staticmethod
    def _fits(layer: Layer, flat: Tensor, states: tuple[Tensor, ...], dtype: torch.dtype, sizes: Tensor | None) -> bool:
        """Whether input and initial states would pass torch.nn's checks, which take longer than a small step."""
        if flat.shape[-1] != layer.input_size or flat.dtype != dtype:
            return False
        if not states:
            return True
        B = flat.shape[0 if layer.batch_first else 1] if sizes is None else int(sizes[0])
        K, H = layer.num_layers * (2 if layer.bidirectional else 1), layer.hidden_size
        wide = (layer.proj_size or H, H)
        return all(s.shape == (K, B, n) and s.dtype == dtype for s, n in zip(states, wide[: len(states)], strict=True))

    @staticmethod
    def _hidden(
        layer: Layer, flat: Tensor, hx: Hidden | None, batched: bool, sizes: Tensor | None
    ) -> tuple[Tensor, ...]:
        """The initial states, zeros where none were given, with torch.nn's errors for a wrong number of dimensions."""
        count = CELLS[layer.mode].states
        if hx is None:
            if sizes is None:
                B: Any = flat.shape[0 if layer.batch_first else 1]
            else:
                B = sizes[0] if recorder() is not None else int(sizes[0])  # a record would hold an int for every batch
            K, H = layer.num_layers * (2 if layer.bidirectional else 1), layer.hidden_size
            h_0 = flat.new_zeros(K, B, layer.proj_size or H)
            return (h_0,) if count == 1 else (h_0, flat.new_zeros(K, B, H))
        given = (hx,) if isinstance(hx, Tensor) else tuple(hx) if hasattr(hx, "__len__") else ()
        if len(given) != count or isinstance(hx, Tensor) != (count == 1):
            expected = "a tuple (h_0, c_0)" if count == 2 else "one tensor h_0"
            if not hasattr(hx, "__len__"):
                raise TypeError(f"{type(layer).__name__}: hx must be {expected}, or None: got {type(hx).__name__}")
            got = "one tensor" if isinstance(hx, Tensor) else f"a {type(hx).__name__} of {len(given)}"
            raise RuntimeError(f"{type(layer).__name__}: hx must be {expected}: got {got}")
        for state in given:
            if not isinstance(state, Tensor):
                of = ", ".join(type(s).__name__ for s in given)
                raise TypeError(f"{type(layer).__name__}: hx must hold tensors, or be None for zeros: got ({of})")
        expected_dim = 3 if batched else 2
        if sizes is None and any(state.dim() != expected_dim for state in given):
            kind, dims = "batched 3-D" if batched else "unbatched 2-D", ", ".join(f"{s.dim()}-D" for s in given)
            raise RuntimeError(f"For {kind} input, hx should also be {expected_dim}-D but got ({dims}) tensors")
        return given if batched else tuple(state.unsqueeze(1) for state in given)

    def restarts(self, layer: Layer, given: Hidden | None) -> tuple[Tensor, ...]:
        """The states that resets restart from, checked: in the form of the initial states, or one such per step."""
        if given is None:
            return ()
        name, x, states, batched = type(layer).__name__, self.x, self.hx, self.batched
        form = "a tuple (h, c)" if len(states) == 2 else "one tensor h"
        found = (given,) if isinstance(given, Tensor) else given
        if isinstance(given, Tensor) != (len(states) == 1) or not isinstance(found, (tuple, list)):
            got = "one tensor" if isinstance(given, Tensor) else type(given).__name__
            raise TypeError(f"{name}: reset_state must be {form}: got {got}")
        if len(found) != len(states) or not all(isinstance(r, Tensor) for r in found):
            got = ", ".join(type(r).__name__ for r in found)
            raise TypeError(f"{name}: reset_state must be {form}: got {type(given).__name__} of ({got})")
        of_each = len(found[0].shape) > (3 if batched else 2)
        for part, r, state in zip(CELLS[layer.mode].state_names, found, states, strict=True):
            which = f"reset_state's {part}" if len(states) == 2 else "reset_state"
            shape = tuple(state.shape if batched else (state.shape[0], state.shape[2]))
            if tuple(r.shape) != ((len(x), *shape) if of_each else shape):
                either = f"{shape}, or {(len(x), *shape)} with one for each step"
                expected = either if part == "h" else f"{(len(x), *shape) if of_each else shape} as h has it"
                raise ValueError(f"{name}: {which} must have shape {expected}: got {tuple(r.shape)}")
            if r.dtype != x.dtype and not (self.results and r.dtype.is_floating_point):
                raise TypeError(f"{name}: {which} must have input's dtype {x.dtype}: got {r.dtype}")
            if r.device != x.device:
                raise ValueError(f"{name}: {which} must be on input's device {x.device}: got {r.device}")
        if self.results:
            self.given = (*self.given[: len(self.tensors) - len(self.reset_state)], *[r.dtype for r in found])
        own = tuple((r if batched else r.unsqueeze(-2)).to(x.dtype) for r in found)
        if self.lengths is None or self.resets is None:
            return own
        # Padding restarts too (see `Net.with_resets`), and must not overflow by values that no reset uses.
        used = self.resets & (torch.arange(len(x), device=x.device)[:, None] < self.lengths.to(x.device))
        unused = ~(used[:, None] if of_each else used.any(0))[..., None]
        return tuple(r.masked_fill(unused, 0) for r in own)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The engine's inputs, in its order."""
        return (self.x, *self.hx, *self.weights, *self.reset_state)

    def dropout_mask(self, layer: Layer) -> Tensor:
        """The dropout mask `[T, B, D*P]` of a layer above the first: the numbers that torch.nn would draw, of padded
        sequences those that it would once they are packed.
        """
        features = (2 if layer.bidirectional else 1) * (layer.proj_size or layer.hidden_size)
        T, B, _ = self.x.shape
        if self.packed is not None:
            mask = functional.dropout(self.x.new_ones(self.packed.data.shape[0], features), layer.dropout)
            return self.engine_layout(self.packed._replace(data=mask))
        if self.lengths is None or torch.compiler.is_compiling() or recorder() is not None:  # a graph for any lengths
            return functional.dropout(self.x.new_ones(T, B, features), layer.dropout)
        rows, _, lane = rows_of(self.lengths)
        mask = functional.dropout(self.x.new_ones(rows.S, features), layer.dropout)
        at = (rows.step * B + lane).to(mask.device)
        return mask.new_zeros(T * B, features).index_copy(0, at, mask).unflatten(0, (T, B))

    def returned(self, y: Tensor, final: Sequence[Tensor]) -> tuple[Tensor | PackedSequence, Hidden]:
        """What the layer returns: the output `[T, B, D*P]` and states `[L*D, B, .]` in the caller's layout."""
        if self.results:
            y, final = self.as_results(y, final)
        return self.restore(y), self.restore_hidden(tuple(final))

    def as_results(self, y: Tensor, final: Sequence[Tensor] = ()) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Outputs in the precision that autocast asks for; elsewhere as they are."""
        if not self.results:
            return y, tuple(final)
        return y.to(self.results[0]), tuple([s.to(of) for s, of in zip(final, self.results, strict=False)])

    def as_given(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of the engine's inputs, each in the precision of what the caller gave."""
        return [g.to(of) for g, of in zip(grads, self.given, strict=True)] if self.given else list(grads)

    def restore(self, y: Tensor) -> Tensor | PackedSequence:
        """The output `[T, B, D*P]` in the caller's layout."""
        if self.packed is not None:
            return self.packed._replace(data=packed_rows(y, self.packed, self.lengths))
        if self.lengths is not None:
            y = y.masked_fill(_ended(y, self.lengths), 0)
        if not self.batched:
            return y.squeeze(1)
        return y.transpose(0, 1) if self.batch_first else y

    def restore_hidden(self, final: tuple[Tensor, ...]) -> Hidden:
        """States `[.., L*D, B, .]` in the caller's layout."""
        return bare(final if self.batched else tuple(state.squeeze(-2) for state in final))

    def engine_layout(self, dy: Tensor | PackedSequence) -> Tensor:
        """A cotangent of the output, in the caller's layout, as `[T, B, D*P]`."""
        if isinstance(dy, PackedSequence):
            return padded(dy)[0]
        if not self.batched:
            return dy.unsqueeze(1)
        return dy.transpose(0, 1) if self.batch_first else dy


def _ended(x: Tensor, lengths: Tensor) -> Tensor:
    """Where the sequences of x `[T, B, .]` have ended `[T, B, 1]`."""
    return torch.arange(x.shape[0], device=x.device)[:, None, None] >= lengths.to(x.device)[:, None]


def bare(states: tuple[Tensor, ...]) -> Hidden:
    """The states in torch.nn's form: (h,) as h, and (h, c) as it is."""
    return states[0] if len(states) == 1 else (states[0], states[1])


def program(layer: Layer, call: Call, net: Net) -> NetPrograms:
    """The program of a call that keeps what the layer's memory policy asks for."""
    memory = layer.memory
    return with_checkpoints(net, memory, call.tensors) if isinstance(memory, Checkpoints) else whole_tape(layer, net)


def whole_tape(layer: Layer, net: Net) -> Stack:
    """The program of a call with a whole tape: what the layer's memory policy keeps, the gates for `Checkpoints`."""
    return Stack(net, "gates" if isinstance(layer.memory, Checkpoints) else layer.memory)


def by_onnx(layer: Layer, call: Call) -> tuple[Tensor | PackedSequence, Hidden]:
    """The results of this call by an operator of ONNX for each layer."""
    net = net_of(layer, call, layer.gradient, differentiated=False)
    net = net if call.resets is not None else replace(net, resets=())  # which are at padding alone
    y, *final = onnx_layers(net, call.tensors)
    return call.returned(y, final)


def net_of(
    layer: Layer,
    call: Call,
    gradient: policies.Policy,
    differentiated: bool,
    *,
    drops: bool | None = None,
    adjoints: bool = False,
    xi: Sequence[Tensor] | None = None,
) -> Net:
    """The net of this call, with everything random in it drawn: xi only for a call that will be differentiated.

    drops: whether dropout between layers is drawn; None: as the layer's mode says. adjoints: whether they will be asked
    for besides gradients. xi: the factors of each draw `[T, B, 1]`, in place of those that the policy draws.
    """
    x, cell = call.x, layer.cell()
    T, B, _ = x.shape
    D = 2 if layer.bidirectional else 1
    compiled = torch.compiler.is_compiling()  # by a compiler, which sees through a cache, and warns of it
    traced = compiled or recorder() is not None
    reach = gradient.reach_of_any() if traced else None  # a graph is for any T
    if reach is None:
        refuse_recording(f"gradient={str(gradient)!r}, whose reach depends on the number of steps")
        reach = gradient.reach(T)
    masks: tuple[Tensor, ...] = ()
    if layer.dropout > 0 and (layer.training if drops is None else drops):
        masks = tuple(call.dropout_mask(layer) for _ in range(layer.num_layers - 1))
    if xi is None and differentiated:
        # In a bidirectional stack a path may cross one time edge several times, so each k draws its own.
        count = layer.num_layers * D if D == 2 else 1
        draws = [draw(gradient, T, B) if traced else gradient.draw(T, B) for _ in range(count)]
        xi = [d[..., None] for d in draws if d is not None]
    factors = [d.to(x) for d in xi or ()] * (layer.num_layers if D == 1 else 1)
    adjoints = adjoints or len(call.reset_state) > 0  # whose gradient is made of them
    request = Request(cell, x.device, x.dtype, len(factors) > 0, call.resets is not None, adjoints, layer.proj_size > 0)
    sizes = layer.num_layers, D, len(call.weights)
    kinds = tuple(kernels.KERNELS.values())
    net = (plain_net.__wrapped__ if compiled else plain_net)(layer.kernel, request, kinds, *sizes, layer.bias, reach)
    if masks or factors or call.lengths is not None:
        net = replace(net, masks=masks, xi=tuple(factors), lengths=call.lengths)
    if call.resets is None and (call.lengths is None or net.kernel.own_gradients):
        return net
    if call.resets is None:
        resets = torch.zeros(T, B, dtype=torch.bool, device=x.device)
    else:  # of one's own where they are read again: environments write the next episode starts into the same tensor
        resets = call.resets.clone() if differentiated else call.resets
    return net.with_resets(resets)


@lru_cache(maxsize=256)
def plain_net(
    kernel: str,
    request: Request,
    kernels_there_are: tuple[Kernel, ...],
    layers: int,
    D: int,
    weights: int,
    biased: bool,
    reach: policies.Reach,
) -> Net:
    """The net of a call without dropout, random factors or lengths; cached, since a training loop repeats it."""
    chosen = kernels.choose(kernel, request).kernel
    return Net(request.cell, chosen, layers, D, weights // (layers * D), biased, reach)
