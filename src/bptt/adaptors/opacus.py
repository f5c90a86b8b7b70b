"""opacus: gradients of each sample for the layers, at the price of about two plain backward passes.

`model = ModuleValidator.fix(bptt.convert(model))`, then `PrivacyEngine().make_private(module=model, ...)`
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..nn import GRU, LSTM, RNN, gradients
from ..nn.call import Hidden
from ..nn.layers import DropInLayer
from .missing import missing

if TYPE_CHECKING:
    import opacus
else:
    try:
        import opacus
        import opacus.grad_sample
        import opacus.validators
    except ModuleNotFoundError as error:
        raise missing("opacus", ("opacus",), error) from None

__all__ = ["PrivateLayer"]

_LAYER = "layer."


class PrivateLayer(nn.Module):
    """A layer of `bptt.nn` in the form of which opacus gets the gradient of each sample, under the layer's policy.

    layer: a `bptt.nn.RNN`, GRU or LSTM, which is taken over: from here on it is called as a part of this module alone.
    The module has the layer's call for batched input, with its dtype, and its `state_dict`; its parameters are the
    layer's own, and `bptt.using` or an assignment to `.layer.gradient` changes the policy.

    Whatever reaches y or the final state counts, of padded, packed and reset sequences, with dropout and under a policy
    that draws: the gradients are those of `bptt.gradients(..., per_sample=True)`, which runs the layer again. opacus
    itself sees one input and one output, so a plain layer of ours inside its `GradSampleModule` would lose the part
    that goes through the state. A sample is a lane, wherever the layer and opacus have the batch.

    Importing this module teaches `opacus.validators.ModuleValidator` to refuse a plain layer of ours, and `fix` to put
    this one in its place, with the layer's weights and settings.

    Raises TypeError where layer is another module, and as the layer does; ValueError for unbatched input.
    """

    def __init__(self, layer: DropInLayer) -> None:
        super().__init__()
        if type(layer) not in _LANES:
            names = ", ".join(f"bptt.nn.{kind.__name__}" for kind in _LANES)
            raise TypeError(f"layer must be one of {names}: got {type(layer).__module__}.{type(layer).__name__}")
        layer.__class__ = _LANES[type(layer)]
        self.layer = layer
        self.register_state_dict_post_hook(_without_layer)
        self.register_load_state_dict_pre_hook(_with_layer)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Hidden | None = None,
        *,
        resets: Tensor | None = None,
        reset_state: Hidden | None = None,
    ) -> tuple[Tensor | PackedSequence, Hidden]:
        """The layer's forward: see `bptt.nn.RNN`."""
        layer: Any = self.layer
        packed = isinstance(input, PackedSequence)
        if not isinstance(input, PackedSequence) and input.dim() != 3:
            raise ValueError(f"opacus needs a batch: input must be 3-D or packed, got {input.dim()}-D")
        order = [input.sorted_indices, input.unsorted_indices] if isinstance(input, PackedSequence) else []
        ordered = [i for i in order if i is not None]
        states, restarts = _listed(hx), _listed(reset_state)
        x = input.data if isinstance(input, PackedSequence) else input
        B = int(input.batch_sizes[0]) if isinstance(input, PackedSequence) else x.shape[0 if layer.batch_first else 1]
        form = torch.tensor([packed, len(ordered), len(states), resets is not None, len(restarts)], device="cpu")
        given = [x, *([input.batch_sizes, *ordered] if isinstance(input, PackedSequence) else []), *states]
        given += [*([] if resets is None else [resets]), *restarts]
        # Two dimensions at least, since opacus turns the first two round where its batch is not the first.
        flat = layer(*[t[None] if t.dim() < 2 else t for t in (form, *given)], _generators(layer), _marked(x, B))
        return _apart(layer, flat[:, 0], input, B)


class _Lanes:
    """What a layer becomes inside of a `PrivateLayer`: a module of opacus, all of whose inputs are tensors, and whose
    one output holds y and the final states of each lane `[B, 1, N]`.
    """

    def forward(self, *tensors: Tensor) -> Tensor:
        form, *given = tensors[:-2]
        input, keywords = _arguments(form, given)
        y, final = super().forward(input, **keywords)  # type: ignore[misc]  # of the layer that it is mixed with
        layer: Any = self
        if isinstance(y, PackedSequence):  # every row, at a place of its own
            y = nn.utils.rnn.pad_packed_sequence(y)[0]
        elif layer.batch_first:
            y = y.transpose(0, 1)
        lanes = [t.transpose(0, 1).flatten(1) for t in (y, *_listed(final))]
        return torch.cat(lanes, 1)[:, None]


def _arguments(form: Tensor, given: Sequence[Tensor]) -> tuple[Tensor | PackedSequence, dict[str, Any]]:
    """(the input, the other arguments) of the call of a layer, from its tensors."""
    packed, ordered, states, resets, restarts = form[0].tolist()
    some = iter(given)
    input: Any = next(some)
    if packed:
        sizes, *order = (t[0] for t in islice(some, 1 + ordered))
        input = PackedSequence(input, sizes, *order)
    keywords: dict[str, Any] = {"hx": _hidden(list(islice(some, states)))}
    keywords |= {"resets": next(some)} if resets else {}
    return input, keywords | ({"reset_state": _hidden(list(islice(some, restarts)))} if restarts else {})


def _apart(layer: Any, flat: Tensor, input: Any, B: int) -> tuple[Tensor | PackedSequence, Hidden]:
    """(y, the final state) from what `_Lanes` puts out `[B, N]`, as the layer has them; the same of cotangents."""
    packed = isinstance(input, PackedSequence)
    K, P = layer.num_layers * (1 + layer.bidirectional), layer.proj_size or layer.hidden_size
    T = len(input.batch_sizes) if packed else input.shape[1 if layer.batch_first else 0]
    sizes = [(T, (1 + layer.bidirectional) * P), *[(K, P), (K, layer.hidden_size)][: layer.cell().states]]
    y, *final = (
        part.unflatten(1, size) for part, size in zip(flat.split([a * b for a, b in sizes], 1), sizes, strict=True)
    )
    if packed:
        lengths = torch.bincount(_lane_of(input), minlength=B)
        made = nn.utils.rnn.pack_padded_sequence(y, lengths, batch_first=True, enforce_sorted=False)
        y = input._replace(data=made.data) if input.sorted_indices is None else made
    elif not layer.batch_first:
        y = y.transpose(0, 1)
    states = [s.transpose(0, 1).contiguous() for s in final]
    return y, states[0] if len(states) == 1 else (states[0], states[1])


def _lane_of(packed: PackedSequence) -> Tensor:
    """The lane of each row of a packed sequence."""
    sorted_lane = torch.cat([torch.arange(int(size), device="cpu") for size in packed.batch_sizes])
    return sorted_lane if packed.sorted_indices is None else packed.sorted_indices.cpu()[sorted_lane]


def _sampler(layer: Any, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """The gradient of each sample for each parameter of a layer: what opacus calls a grad sampler."""
    turned = activations[-1].stride(0) > activations[-1].stride(1)
    if turned:
        activations, backprops = [t.transpose(0, 1) for t in activations], backprops.transpose(0, 1)
    form, *given, generators, lanes = activations
    input, keywords = _arguments(form, given)
    dy, dh_n = _apart(layer, backprops[:, 0], input, len(lanes))
    with _drawn_again(layer, generators):
        found = gradients(layer, input, dy, dh_n=dh_n, per_sample=True, **keywords)
    return {p: found.parameters[name] for name, p in layer.named_parameters() if p.requires_grad}


def _marked(x: Tensor, B: int) -> Tensor:
    """A tensor `[B, B]`, by which opacus counts samples, and whose strides tell whether opacus has turned it round."""
    return x.detach().new_zeros(B).as_strided((B, B), (0, 1))


def _generators(layer: Any) -> Tensor:
    """The states of the generators from which the layer draws `[1, n]`: the policy's own or torch's, and the device's;
    nothing where it draws nothing.
    """
    if not (layer.gradient.draws_factors or (layer.training and layer.dropout)):
        return torch.empty(1, 0, device="cpu", dtype=torch.uint8)
    return torch.cat([get().flatten() for get, _ in _sources(layer)])[None]


def _sources(layer: Any) -> Iterator[tuple[Any, Any]]:
    """How to get and to set the state of each generator."""
    device, own = layer.weight_ih_l0.device, getattr(layer.gradient, "generator", None)
    yield torch.get_rng_state, torch.set_rng_state
    if device.type == "cuda":
        yield (lambda: torch.cuda.get_rng_state(device)), (lambda state: torch.cuda.set_rng_state(state, device))
    if own is not None:
        yield own.get_state, own.set_state


@contextmanager
def _drawn_again(layer: Any, states: Tensor) -> Iterator[None]:
    """A context in which the generators are in these states; after it they are as they were."""
    sources = list(_sources(layer)) if states.numel() else []
    before = [get() for get, _ in sources]
    own = states.flatten().split([len(state) for state in before]) if sources else ()
    for (_, put), state in zip(sources, own, strict=True):
        put(state.clone())
    try:
        yield
    finally:
        for (_, put), state in zip(sources, before, strict=True):
            put(state)


def _listed(state: Hidden | None) -> list[Tensor]:
    return [] if state is None else [state] if isinstance(state, Tensor) else list(state)


def _hidden(states: list[Tensor]) -> Any:
    return None if not states else states[0] if len(states) == 1 else tuple(states)


def _without_layer(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """A hook of `state_dict`: the names of the layer itself."""
    for key in [k for k in state if k.startswith(prefix + _LAYER)]:
        state[prefix + key.removeprefix(prefix + _LAYER)] = state.pop(key)


def _with_layer(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook of `load_state_dict`: the reverse of `_without_layer`."""
    for name in dict(module.layer.named_parameters()):  # type: ignore[union-attr]  # a layer, as the class says
        if prefix + name in state:
            state[prefix + _LAYER + name] = state.pop(prefix + name)


class _RNN(_Lanes, RNN):  # type: ignore[misc]  # it is called with tensors alone
    pass


class _GRU(_Lanes, GRU):  # type: ignore[misc]  # likewise
    pass


class _LSTM(_Lanes, LSTM):  # type: ignore[misc]  # likewise
    pass


_LANES: Mapping[type[DropInLayer], type[DropInLayer]] = {RNN: _RNN, GRU: _GRU, LSTM: _LSTM}


def _valid(layer: nn.Module) -> list[Exception]:
    """What opacus calls a validator: a plain layer is to be replaced."""
    name = type(layer).__name__
    return [
        opacus.validators.errors.ShouldReplaceModuleError(
            f"bptt.nn.{name} hands its state over where opacus does not look: ModuleValidator.fix puts a "
            "bptt.adaptors.opacus.PrivateLayer in its place"
        )
    ]


def _fixed(layer: DropInLayer, **_: Any) -> PrivateLayer:
    """What opacus calls a fixer."""
    return PrivateLayer(layer)


opacus.grad_sample.register_grad_sampler(list(_LANES.values()))(_sampler)
opacus.validators.register_module_validator(list(_LANES))(_valid)
opacus.validators.register_module_fixer(list(_LANES))(_fixed)
