"""TorchRL: LSTMModule and GRUModule with a layer of `bptt.nn` inside, which takes a batch of trajectories in one call.

Legend: T steps, B rows of the batch, L layers, H units.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import policies
from ..memory import Checkpoints
from ..nn import convert
from ..nn.layers import DropInLayer
from .missing import missing

if TYPE_CHECKING:
    from tensordict import TensorDictBase
    from tensordict.nn import dispatch
    from torchrl import modules
else:
    try:
        from tensordict import TensorDictBase
        from tensordict.nn import dispatch
        from torchrl import modules
    except ModuleNotFoundError as error:
        raise missing("torchrl", ("torchrl", "tensordict"), error) from None

__all__ = ["GRUModule", "InOneCall", "LSTMModule"]


class InOneCall:
    """What a recurrent module of TorchRL gets, where this class stands before it: a layer of ours as its back end.

    gradient, memory, kernel: as in `bptt.nn.LSTM`. None leaves the settings of a layer of ours that is handed in as
    `lstm=` or `gru=`, and is "full", "auto" and "auto" for any other. Everything else is TorchRL's, except for
    `python_based` and `recurrent_backend`, which must be left out, and `bidirectional`.

    In recurrent mode a tensordict `[..., T]` is one call. Where `is_init` is True within a row, a trajectory starts:
    the state restarts there from the hidden state that the tensordict holds at that step (zero without one), with the
    values and gradients of TorchRL's own "pad". Out of recurrent mode it is TorchRL's own step.

    Of the hidden states that are written back, the one at the last step of each row is the state there; all others are
    zero, also at the ends of trajectories within a row, where TorchRL has theirs, though it says not to use them.

    Raises ValueError for what must be left out, and TypeError for a layer that cannot be swapped.
    """

    layer_name: str
    in_keys: Any
    out_keys: Any
    recurrent_mode: bool

    def __init__(
        self,
        *args: Any,
        gradient: str | policies.Policy | None = None,
        memory: str | Checkpoints | None = None,
        kernel: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        backend: str = self.recurrent_backend  # type: ignore[attr-defined]  # of the class that it is mixed with
        if backend != "pad":
            raise ValueError(f"recurrent_backend must be left out, the layer takes its place: got {backend!r}")
        given = getattr(self, self.layer_name)
        if given.bidirectional:
            raise ValueError("bidirectional must be False: trajectories restart in one direction")
        if not isinstance(given, DropInLayer) and type(given) not in (torch.nn.LSTM, torch.nn.GRU):
            raise TypeError(f"{self.layer_name} must be of torch.nn or bptt.nn, not python_based: got {given}")
        setattr(self, self.layer_name, convert(given, gradient, memory=memory, kernel=kernel))

    @dispatch  # type: ignore[untyped-decorator]  # of the class that it is mixed with
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """TorchRL's method: run the layer on a tensordict, which gets the outputs and the states."""
        if not self.recurrent_mode:
            return super().forward(tensordict)  # type: ignore[misc]  # of the class that it is mixed with
        if tensordict.ndim == 0:
            raise ValueError("tensordict must have a batch dimension, the last of which is time: got batch_size []")
        if tensordict.ndim == 1:
            rows = tensordict.unsqueeze(0)
        else:
            rows = tensordict if tensordict.ndim == 2 else tensordict.flatten(0, -2)
        value, starts = rows.get(self.in_keys[0]), rows.get("is_init").squeeze(-1)
        stored = [rows.get(key, None) for key in self.in_keys[1:-1]]  # each [B, T, L, H]; the last key is is_init
        absent = [state is None for state in stored]
        if any(absent) and not all(absent):
            raise ValueError(f"tensordict must hold all of {self.in_keys[1:-1]}, or none of them")
        y, final = self._run(value, starts, [] if all(absent) else stored)
        written = {self.out_keys[0]: y}
        for key, state in zip(self.out_keys[1:], final, strict=True):
            last = state.transpose(0, 1).unsqueeze(1)  # [B, 1, L, H]
            before = last.new_zeros(()).expand(len(last), y.shape[1] - 1, *last.shape[2:])
            written[key] = torch.cat([before, last], 1)
        for key, part in written.items():
            tensordict.set(key, part.reshape(*tensordict.shape, *part.shape[2:]))
        return tensordict

    def _run(self, value: Tensor, starts: Tensor, stored: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The layer's outputs `[B, T, H]` and final states, each `[L, B, H]`."""
        layer: DropInLayer = getattr(self, self.layer_name)
        inside = starts.clone()
        inside[:, 0] = False  # a row begins with its own state, whether or not a trajectory does
        first: Any = tuple(state[:, 0].transpose(0, 1).contiguous() for state in stored)
        if not bool(inside.any()):
            y, final = layer(value, _one_or_pair(first))
        else:
            again = tuple(state.permute(1, 2, 0, 3) for state in stored)  # [T, L, B, H]
            y, final = layer(value, _one_or_pair(first), resets=inside, reset_state=_one_or_pair(again))
        return y, final if isinstance(final, tuple) else (final,)


def _one_or_pair(states: tuple[Tensor, ...]) -> Any:
    """A layer's state: None, h, or (h, c)."""
    return (states[0] if len(states) == 1 else states) if states else None


class LSTMModule(InOneCall, modules.LSTMModule):
    """torchrl.modules.LSTMModule with `bptt.nn.LSTM` as its back end (see `InOneCall`)."""

    layer_name = "lstm"


class GRUModule(InOneCall, modules.GRUModule):
    """torchrl.modules.GRUModule with `bptt.nn.GRU` as its back end (see `InOneCall`)."""

    layer_name = "gru"
