"""A call of a `bptt.nn.Recurrent`, that can be made again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves, tree_map

from .. import nn
from ..nn import Recurrent
from ..nn.flat import is_flat
from ..policies import Policy
from ._scan_loss import ScanWithLoss

__all__ = ["RecurrentCall", "devices_of", "tensors_of", "weighted"]


@dataclass(frozen=True, eq=False)
class RecurrentCall:
    """A call of a `Recurrent`, without history, that can be made again with all that it drew.

    args, kwargs: as it was called. generators: the state of torch's random generators before it, the CPU's first.
    """

    layer: Recurrent
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    generators: tuple[Tensor, ...]

    @classmethod
    def about_to(cls, layer: Recurrent, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RecurrentCall:
        """A call that is about to be made. Its tensors are shared."""
        states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices_of(layer))]
        return cls(layer, _detached(args), _detached(kwargs), tuple(states))

    @property
    def is_flat(self) -> bool:
        """Whether the sequences lie one after the other, rather than side by side."""
        return is_flat(self.input, self.kwargs.get("cu_seqlens"))

    @property
    def is_one_scan(self) -> bool:
        """Whether it is a single scan of whole sequences: in one direction, and none one after the other."""
        return not self.layer.bidirectional and not self.is_flat

    @property
    def input(self) -> Tensor | PackedSequence:
        return self.args[0] if self.args else self.kwargs["input"]

    @property
    def hx(self) -> Any:
        return self.args[1] if len(self.args) > 1 else self.kwargs.get("hx")

    @property
    def lengths(self) -> Tensor | None:
        """The steps of every lane `[B]`, on the CPU; None where all are alike."""
        given = self.input
        if isinstance(given, PackedSequence):
            return pad_packed_sequence(given)[1]
        found = self.kwargs.get("lengths")
        return None if found is None else torch.as_tensor(found, device="cpu").long()

    @property
    def steps(self) -> int:
        """The steps of the longest sequence."""
        lengths, given = self.lengths, self.input
        if lengths is not None:
            return int(lengths.max())
        assert isinstance(given, Tensor)
        tokens = not (given.is_floating_point() or given.is_complex())
        return given.shape[1 if self.layer.batch_first and given.dim() > (1 if tokens else 2) else 0]

    @contextmanager
    def drawing_again(self) -> Iterator[None]:
        """Inside `with`, torch's generators stand where they stood before the call; after it, where they stood."""
        devices = devices_of(self.layer)
        with torch.random.fork_rng(devices):
            torch.set_rng_state(self.generators[0])
            for device, state in zip(devices, self.generators[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            yield

    def as_scan(self) -> tuple[Any, Any, Any, Tensor | None]:
        """(step, carry, xs, resets) of the call, dropout drawn as it was."""
        with self.drawing_again():
            return self.layer.as_scan(*self.args, **self.kwargs)

    def outputs(self, scanned: tuple[Any, Any]) -> tuple[Any, Any]:
        """(y, final state) of the call, from what `bptt.scan` returned."""
        return self.layer.from_scan(scanned, self.input, self.hx, lengths=self.kwargs.get("lengths"))

    def run(self, policy: Policy) -> tuple[Any, Any]:
        """(y, final state) of the call under a policy."""
        with nn.using(self.layer, gradient=policy), self.drawing_again():
            return self.layer(*self.args, **self.kwargs)

    def with_errors(self, errors: list[Tensor | None]) -> ScanWithLoss:
        """The scan, with a loss that has these gradients in y and the tensors of the final state."""
        step, carry, xs, resets = self.as_scan()
        lengths = self.lengths

        def loss(carry: Any, ys: Any) -> Tensor:
            return weighted(self.outputs((carry, ys)), errors)

        return ScanWithLoss(step, carry, xs, loss, None, resets, lengths)


def weighted(outputs: tuple[Any, Any], errors: list[Tensor | None]) -> Tensor:
    """A scalar whose gradients in y and the tensors of the final state are given."""
    tensors = tensors_of(outputs)
    parts = [(d * t).sum() for d, t in zip(errors, tensors, strict=True) if d is not None and t.is_floating_point()]
    return torch.stack([part.double() for part in parts]).sum() if parts else tensors[0].new_zeros(()).double()


def tensors_of(outputs: tuple[Any, Any]) -> list[Tensor]:
    """y, then the tensors of the final state."""
    y, final = outputs
    found = [t for t in tree_leaves(final) if isinstance(t, Tensor)]
    return [y.data if isinstance(y, PackedSequence) else y, *found]


def _detached(value: Any) -> Any:
    if isinstance(value, PackedSequence):
        return value._replace(data=value.data.detach())
    if isinstance(value, (tuple, list, dict)):
        return tree_map(lambda v: _detached(v) if isinstance(v, (Tensor, PackedSequence)) else v, value)
    return value.detach() if isinstance(value, Tensor) else value


def devices_of(layer: Recurrent) -> list[torch.device]:
    """The CUDA devices whose generators a layer may draw from."""
    return sorted({p.device for p in layer.parameters() if p.is_cuda}, key=str)
