"""The policies of a model's layers: set once, and kept as text in a framework's checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from .. import policies
from ..memory import Checkpoints
from ..nn import Recurrent, convert
from ..nn.layers import DropInLayer

__all__ = ["PolicyState"]


class PolicyState:
    """The policies of a model's layers as text, in a `state_dict` of their own: that of torch has none.

    gradient, memory, kernel: as in `bptt.convert`. None leaves the settings that the layers have.
    restore: whether `load_state_dict` sets the policies of the checkpoint, the usual case; False: those given stay.

    The state is `{"gradient": text, "layers": {name: text}}`: each layer's own policy, also where it was set apart from
    the others, or has been adapted (`bptt.flow.adapt`).

    Raises ValueError for a text that names no policy, TypeError for anything else.

    >>> import bptt
    >>> model = torch.nn.Sequential(torch.nn.GRU(3, 5))
    >>> policy = PolicyState("chunked:35")
    >>> policy.attach_to(model)
    >>> policy.state_dict()
    {'gradient': 'chunked:35', 'layers': {'0': 'chunked:35'}}
    >>> policy.load_state_dict({"gradient": "chunked:35", "layers": {"0": "truncated:20"}})
    >>> model[0].gradient
    Truncated(window=20, every=1)
    """

    def __init__(
        self,
        gradient: str | policies.Policy | None = None,
        *,
        memory: str | Checkpoints | None = None,
        kernel: str | None = None,
        restore: bool = True,
    ) -> None:
        self.gradient = None if gradient is None else policies.parse(gradient)
        self.memory, self.kernel, self.restore = memory, kernel, restore
        self._model: torch.nn.Module | None = None
        self._pending: dict[str, Any] | None = None

    def attach_to(self, model: torch.nn.Module) -> None:
        """Convert a model, if it is not the one that was converted last, and set what a checkpoint has said.

        Raises TypeError for a model that holds neither torch's recurrent layers nor ours, and as `bptt.convert` does.
        """
        if model is self._model:
            return
        made = convert(model, self.gradient, memory=self.memory, kernel=self.kernel, strict=True)
        if made is not model:
            raise TypeError(f"model must be a module around its layers, which are swapped in it: got {model}")
        self._model = model
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._set(model, pending)

    def state_dict(self) -> dict[str, Any]:
        """The policies as text."""
        own = None if self.gradient is None else str(self.gradient)
        layers = {} if self._model is None else {n: str(layer.gradient) for n, layer in _layers(self._model).items()}
        return {"gradient": own, "layers": layers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the policies that `state_dict` has returned; before a model is attached, as soon as it is.

        A UserWarning says so where they differ from the policy that this object was made with.
        """
        if not self.restore:
            return
        for text in state["layers"].values():
            policies.parse(text)
        if self._model is None:
            self._pending = dict(state)
        else:
            self._set(self._model, state)

    def _set(self, model: torch.nn.Module, state: Mapping[str, Any]) -> None:
        given = None if self.gradient is None else str(self.gradient)
        saved = state["gradient"]
        if given is not None and saved != given:
            warnings.warn(
                f"the checkpoint's policies take the place of gradient={given!r}: {saved or 'those of the layers'}; "
                "restore=False keeps what is given",
                UserWarning,
                stacklevel=4,
            )
        for name, layer in _layers(model).items():
            text = state["layers"].get(name)
            if text is not None and text != str(layer.gradient):  # an equal one may have a generator of its own
                layer.gradient = policies.parse(text)


def _layers(model: torch.nn.Module) -> dict[str, DropInLayer | Recurrent]:
    """The layers of ours in a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DropInLayer | Recurrent)}
