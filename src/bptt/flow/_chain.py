"""A chain of states: what one layer of a recording and a scan of any step have in common.

Legend: T steps, B lanes, S numbers in a state, N rows: several vectors in the space of a state, at once. State s_t
bears the loss at step t, and J_t = ds_t/ds_{t-1}. So the part of the loss at t in the adjoint of s_{t-k} is
J_{t-k+1}' ... J_t' e_t, whatever the chain is made of.
"""

from __future__ import annotations

from functools import cached_property
from operator import index
from typing import Protocol

import torch
from torch import Tensor

from ..cells import Weights
from ..policies import Full
from ._recording import Recording

__all__ = ["Chain", "LayerChain", "jacobian", "lengths_of"]


class Chain(Protocol):
    """A chain: states s_t, the Jacobians between them, and a local error at each state.

    name: whose states these are ("layer 0", "carry"). T: the number of states that bear a loss, 0..T-1. B, S: the
    number of lanes, and of numbers in a lane's state. transitions: the steps t that have a J_t.
    """

    name: str
    T: int
    B: int
    S: int
    transitions: range
    dtype: torch.dtype
    device: torch.device

    def open(self, t: int) -> Tensor:
        """Whether a lane's state passes from t-1 to t, bool `[B]`: False at a reset, where J_t = 0."""
        ...

    def pull(self, t: int, rows: Tensor) -> Tensor:
        """J_t' rows: from cotangents of s_t to those of s_{t-1}, both `[N, B, S]`."""
        ...

    def push(self, t: int, rows: Tensor) -> Tensor:
        """J_t rows: from tangents of s_{t-1} to those of s_t, both `[N, B, S]`."""
        ...

    @property
    def errors(self) -> Tensor | None:
        """The local errors e_t `[T, B, S]`; None where they come from the layers above, a walk each."""
        ...


def jacobian(chain: Chain, t: int) -> Tensor:
    """J_t `[B, S, S]`: its row i is J_t' applied to unit vector i."""
    units = torch.eye(chain.S, dtype=chain.dtype, device=chain.device)
    return chain.pull(t, units[:, None].expand(chain.S, chain.B, chain.S)).transpose(0, 1)


class LayerChain:
    """One layer and direction of a recording, in the direction's own time.

    s_t is the state after step t: h_t, for an LSTM (h_t, c_t) in one vector, h first. J_0 leads from the initial state.
    """

    def __init__(self, recording: Recording, k: int = 0) -> None:
        """k: layer * directions + direction, as `Recording.names` orders them. Raises ValueError for another."""
        k = index(k)
        if not 0 <= k < len(recording.names):
            raise ValueError(f"layer must be one of 0..{len(recording.names) - 1}: got {k}")
        self.recording, self.k = recording, k
        self.name, self.cell, self.T, self.B = recording.names[k], recording.cell, recording.T, recording.B
        self.transitions = range(self.T)
        self.tape = recording.tapes()[k]
        self.w = Weights(*(None if w is None else w.detach() for w in recording.weights[k]))  # type: ignore[arg-type]  # ih and hh are always given
        self.sizes = [s.shape[-1] for s in self.tape.states]
        self.S = sum(self.sizes)
        self.dtype, self.device = self.tape.states[0].dtype, self.tape.states[0].device

    def open(self, t: int) -> Tensor:
        resets = self.tape.resets
        return torch.ones(self.B, dtype=torch.bool, device=self.device) if resets is None else ~resets[t, :, 0]

    @torch.no_grad()
    def pull(self, t: int, rows: Tensor) -> Tensor:
        return self._pull(t, rows)

    def push(self, t: int, rows: Tensor) -> Tensor:
        with torch.enable_grad():  # J' is linear: its derivative in the cotangents, transposed, is J
            cotangents = torch.zeros_like(rows, requires_grad=True)
            back = self._pull(t, cotangents)
            if not back.requires_grad:
                return torch.zeros_like(rows)
            return torch.autograd.grad(back, cotangents, rows)[0]

    def _pull(self, t: int, rows: Tensor) -> Tensor:
        """One step of the eager kernel's sweep: (6.2) of equations/README.md."""
        lam = rows.split(self.sizes, -1)
        gates = None if self.tape.gates is None else self.tape.gates[t]
        prev, state = tuple(s[t] for s in self.tape.prev), tuple(s[t] for s in self.tape.state)
        out = torch.cat(self.cell.before(lam, gates, prev, state, self.w)[1], -1)
        return out if self.tape.resets is None else out.masked_fill(self.tape.resets[t], 0)

    @cached_property
    def errors(self) -> Tensor | None:
        """e_t `[T, B, S]` of the top layer, zero in c but for dL/dc_n; None for the layers below.

        The cotangent of the final state belongs to the last step of each lane.
        """
        net, recording = self.recording.net(Full()), self.recording
        d = self.k % net.directions
        if self.k // net.directions < net.layers - 1:
            return None
        dh = net.turn(net.half(recording.dy, d), d)
        errors = torch.cat([dh, *(dh.new_zeros(self.T, self.B, size) for size in self.sizes[1:])], -1)
        lengths = torch.full((self.B,), self.T, device="cpu") if net.lengths is None else net.lengths
        lanes = torch.arange(self.B, device=self.device)
        for part, final in zip(errors.split(self.sizes, -1), recording.dfinal, strict=True):
            if final is not None:
                part[lengths.to(self.device) - 1, lanes] += final[self.k]
        return errors


def lengths_of(chain: Chain) -> Tensor:
    """The number of steps of every lane `[B]`, on the CPU. A step beyond them is padding and not part of the chain."""
    if isinstance(chain, LayerChain):
        return chain.recording.lengths
    lengths: Tensor | None = getattr(chain, "lengths", None)
    return (
        torch.full((chain.B,), chain.transitions[-1] + 1, device="cpu")
        if lengths is None
        else lengths + chain.transitions[0]
    )
