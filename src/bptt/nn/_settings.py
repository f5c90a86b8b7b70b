"""Settings of a layer, checked where they are assigned."""

from __future__ import annotations

from .. import policies
from ..memory import Checkpoints, Memory
from ..memory import parse as parse_memory
from ..scan import KERNELS

__all__ = ["Settings", "checked_kernel", "checked_memory"]


class Settings:
    """How far a layer's gradients reach, what it keeps for them, and who computes."""

    _gradient: policies.Policy
    _memory: Memory
    _kernel: str

    @property
    def gradient(self) -> policies.Policy:
        """The gradient policy; may be assigned a policy or its text form."""
        return self._gradient

    @gradient.setter
    def gradient(self, value: str | policies.Policy) -> None:
        self._gradient = policies.parse(value)

    @property
    def memory(self) -> Memory:
        """The tape policy: "auto", "states", of an RNN, GRU or LSTM also "gates", or `Checkpoints`; may be assigned one
        or its text form.
        """
        return self._memory

    @memory.setter
    def memory(self, value: str | Checkpoints) -> None:
        self._memory = self._checked_memory(value)

    @property
    def kernel(self) -> str:
        """The kernel: "auto" or the name of one."""
        return self._kernel

    @kernel.setter
    def kernel(self, value: str) -> None:
        self._kernel = self._checked_kernel(value)

    def _checked_memory(self, value: str | Checkpoints) -> Memory:
        return checked_memory(value)

    def _checked_kernel(self, value: str) -> str:
        return checked_kernel(value)


def checked_kernel(name: str) -> str:
    """The name, if it is "auto" or that of a kernel for steps, else ValueError."""
    if name not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(map(repr, KERNELS))}: got {name!r}")
    return name


def checked_memory(value: str | Checkpoints) -> Memory:
    """The tape policy, if it is one for steps, else ValueError."""
    memory = parse_memory(value)
    if memory == "gates":
        raise ValueError(
            "memory must be 'auto', 'states' or Checkpoints, since a cell of one's own has no gates: got 'gates'"
        )
    return memory
