"""What the doctor keeps of a step: references to what went into a layer and came back, and how to run it again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..engine import Net
from ..nn import LAYERS
from ..nn.call import Call, net_of
from ..nn.layers import DropInLayer
from ..policies import Randomized
from ._layer_call import LayerCall, tensors_in
from ._recording import Recording, _twin
from ._recurrent_call import RecurrentCall
from ._scan_loss import ScanWithLoss

__all__ = ["Generators", "RecordedCall"]


@dataclass(frozen=True, eq=False)
class Generators:
    """The states of the random generators before a call that draws: dropout masks, xi."""

    cpu: Tensor
    device: Tensor | None
    policy: Tensor | None

    @classmethod
    def before(cls, layer: torch.nn.Module) -> Generators | None:
        """Of a recurrent layer about to be called; None where it draws nothing."""
        policy = layer.gradient if isinstance(layer, DropInLayer) else None
        drops = isinstance(layer, torch.nn.RNNBase) and layer.training and layer.dropout > 0
        if not drops and not isinstance(policy, Randomized):
            return None
        own = policy.generator if isinstance(policy, Randomized) else None
        weight = next(layer.parameters())
        device = torch.cuda.get_rng_state(weight.device) if weight.is_cuda else None
        return cls(torch.get_rng_state(), device, None if own is None else own.get_state())

    @contextmanager
    def again(self, layer: DropInLayer) -> Iterator[None]:
        """Inside `with`, the generators stand there; after it, where they stood before."""
        own = layer.gradient.generator if isinstance(layer.gradient, Randomized) else None
        kept = None if own is None else own.get_state()
        weight = next(layer.parameters())
        with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
            torch.set_rng_state(self.cpu)
            if self.device is not None:
                torch.cuda.set_rng_state(self.device, weight.device)
            if own is not None and self.policy is not None:
                own.set_state(self.policy)
            try:
                yield
            finally:
                if own is not None and kept is not None:
                    own.set_state(kept)


@dataclass(eq=False)
class RecordedCall:
    """One call of one module. Tensors are the caller's own, without history.

    errors: the cotangents of a recurrent layer's output (0) and final states (1, 2, ...), filled in by the backward
    pass. A dict of its own, since a hook on a tensor must not lead back to that tensor: nothing would ever free the
    two. scan: of a one-directional `bptt.nn.Recurrent`, how to make the call again.
    """

    name: str
    module: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    generators: Generators | None = None
    errors: dict[int, Tensor] = field(default_factory=dict)
    scan: RecurrentCall | None = None

    @property
    def recurrent(self) -> bool:
        """Whether it is an RNN, GRU or LSTM whose steps can be looked at: ours, or torch's own."""
        return isinstance(self.module, DropInLayer) or type(self.module) in {layer.torchs for layer in LAYERS.values()}

    @property
    def finals(self) -> tuple[Tensor, ...]:
        """A recurrent layer's final states."""
        return tuple(tensors_in(self.output[1]))

    @property
    def hx(self) -> Any:
        """A recurrent layer's initial state as it was given; None for none."""
        return self.args[1] if len(self.args) > 1 else self.kwargs.get("hx")

    @property
    def keeps_state(self) -> bool:
        """Whether it is a layer through time whose steps can be looked at, of whatever kind."""
        return self.recurrent or self.scan is not None

    def as_scan(self) -> ScanWithLoss | None:
        """The call of a `Recurrent` as a scan, with the errors that have come back, if any; None for other modules."""
        if self.scan is None:
            return None
        return self.scan.with_errors(self.errors_of_outputs())

    def errors_of_outputs(self) -> list[Tensor | None]:
        """The errors that have come back to y and to the tensors of the final state."""
        return [self.errors.get(i) for i in range(len(list(tensors_in(self.output))))]

    @torch.no_grad()
    def recording(self) -> Recording | None:
        """The call as the measurements take it; None where no error has come back."""
        layer, of_layer = self._call()
        if not self.errors:
            return None
        call = of_layer.call
        dy = of_layer.errors(self.output[0], self.errors.get(0)).to(call.x.dtype)
        dfinal = of_layer.final_errors([self.errors.get(i + 1) for i in range(len(call.hx))])
        return Recording(self.name, layer, call, dy, dfinal, None)

    @torch.no_grad()
    def net(self) -> tuple[DropInLayer, Call, Net]:
        """(the layer or its twin, the call, its net under the layer's own policy), with all it drew drawn again."""
        layer, of_layer = self._call()
        call = of_layer.call
        with nullcontext() if self.generators is None else self.generators.again(layer):
            return layer, call, net_of(layer, call, layer.gradient, differentiated=True, adjoints=True)

    def in_all_lanes(self, of_engine: Sequence[Tensor | None], given: Sequence[Tensor | None]) -> list[Tensor | None]:
        """States `[L*D, B, .]` with those of sequences without a step, which the engine does not have, numbered as the
        caller does. of_engine: what it has of them, given: what the caller has.
        """
        return list(of_engine if self._call()[1].flat is None else given)

    def lane(self, lane: int) -> int:
        """The caller's number of a lane of the engine, which has none for a sequence without a step."""
        return self._call()[1].lane(lane)

    def _call(self) -> tuple[DropInLayer, LayerCall]:
        layer = _twin(self.module)  # type: ignore[arg-type]  # `recurrent` says so
        return layer, LayerCall.of(layer, self.args, self.kwargs)
