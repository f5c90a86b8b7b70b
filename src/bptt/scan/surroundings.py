"""What affects a step besides its arguments: autocast, the default device, random generators."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from ..engine import default_device

__all__ = [
    "CPU_ALONE",
    "GeneratorStates",
    "Surroundings",
    "generator_states",
    "not_in_inference_mode",
    "random_kept",
    "set_generators",
]

GeneratorStates = dict[torch.device, Tensor]

CPU_ALONE = frozenset({torch.device("cpu")})
"""The devices of a call on the CPU."""


@dataclass(frozen=True)
class Surroundings:
    """The settings of torch that affect a step besides its arguments.

    autocast: its state by kind of device. Its cache stays off: entries made without grad would hide weights from it.
    device: the default device.
    """

    autocast: dict[str, tuple[bool, torch.dtype]]
    device: torch.device

    @classmethod
    def current(cls, devices: Iterable[torch.device]) -> Surroundings:
        """The surroundings that a call on these devices has now."""
        if devices is CPU_ALONE and not torch._C._is_any_autocast_enabled():
            return cls({"cpu": (False, torch.get_autocast_dtype("cpu"))}, default_device())
        types = {device.type for device in devices if torch.amp.is_autocast_available(device.type)}
        autocast = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in types}
        return cls(autocast, default_device())

    def entered(self) -> AbstractContextManager[None]:
        """A context with these surroundings for one step or more, except for the default device."""
        needed = getattr(parametrize, "_cache_enabled", 0) or any(
            enabled or torch.is_autocast_enabled(kind) for kind, (enabled, _) in self.autocast.items()
        )
        return self._entered() if needed else nullcontext()

    @contextmanager
    def _entered(self) -> Iterator[None]:
        with ExitStack() as stack:
            for kind, (enabled, dtype) in self.autocast.items():
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False))
            if cached := getattr(parametrize, "_cache_enabled", 0):
                # torch.nn.utils.parametrize.cached would hand a weight made without grad in one step to the next.
                stack.callback(setattr, parametrize, "_cache_enabled", cached)
                parametrize._cache_enabled = 0
            yield

    def on_default_device(self) -> AbstractContextManager[Any]:
        """A context with the default device of the forward, which factory calls of a step use."""
        return nullcontext() if default_device() == self.device else self.device


@contextmanager
def _out_of_inference_mode() -> Iterator[None]:
    recording = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(recording):
        yield


def not_in_inference_mode() -> AbstractContextManager[None]:
    """A context in which steps can be recorded, in a backward call inside inference mode too; grad mode stays."""
    return _out_of_inference_mode() if torch.is_inference_mode_enabled() else nullcontext()


def random_kept(states: Sequence[GeneratorStates | None]) -> AbstractContextManager[None]:
    """A context that leaves the random generators as they were, whatever is replayed inside."""
    devices = {device for state in states if state is not None for device in state}
    if not devices:
        return nullcontext()
    cuda = [device for device in devices if device.type == "cuda"]
    return torch.random.fork_rng(cuda, device_type="cuda")


def generator_states(devices: Iterable[torch.device]) -> GeneratorStates:
    """The states of torch's default random generators."""
    return {d: torch.cuda.get_rng_state(d) if d.type == "cuda" else torch.get_rng_state() for d in devices}


def set_generators(states: GeneratorStates) -> None:
    """Put the generators into these states."""
    for device, state in states.items():
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)
