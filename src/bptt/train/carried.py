"""The state carried in the lanes: one tensor `[layers, B, H]`, a pair of them for an LSTM, or None for zero."""

from __future__ import annotations

import torch
from torch import Tensor

from .model import State
from .processes import Processes

__all__ = ["finite", "gathered", "lanes_of", "to"]


def to(state: State, device: str) -> State:
    """The same state on a device."""
    if state is None:
        return None
    return state.to(device) if isinstance(state, Tensor) else (state[0].to(device), state[1].to(device))


def finite(state: State) -> bool:
    """Whether all of a state is finite."""
    states = () if state is None else (state,) if isinstance(state, Tensor) else state
    return all(bool(torch.isfinite(s).all()) for s in states)


def lanes_of(state: State, processes: Processes) -> State:
    """The lanes of this process, of the state of all."""
    if state is None or processes.world == 1:
        return state
    own = processes.lanes((state if isinstance(state, Tensor) else state[0]).shape[1])
    return state[:, own].clone() if isinstance(state, Tensor) else (state[0][:, own].clone(), state[1][:, own].clone())


def gathered(state: State, processes: Processes) -> State:
    """The state of all processes' lanes, on the CPU if there are several processes. None is to be None on all."""
    if state is None or processes.world == 1:
        return state
    parts = processes.gather(to(state, "cpu"))
    if isinstance(state, Tensor):
        return torch.cat(parts, dim=1)
    return torch.cat([h for h, _ in parts], dim=1), torch.cat([c for _, c in parts], dim=1)
