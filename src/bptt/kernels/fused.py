"""The fused kernel: torch's own layers (cuDNN on a GPU, oneDNN or aten on a CPU), one layer and direction at a time.

Sequences and blocks of losses are rows of a batch, each of which begins with a state that is known. A block sweep runs
its columns forward once more, as rows, and autograd differentiates that call; the call of the forward pass is kept and
differentiated where it is the only block. So a sweep gives the gradients of x, of the weights and of the initial
states themselves; what happens at each step inside a fused layer, nobody sees.

Legend: as in `pieces`; T steps, B lanes, I input features, H hidden units, P size of h, R positions and N columns of a
sweep (see `frames`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from ..cells import Cell, Weights
from ..policies import EVERYTHING, Reach
from .addresses import computed_in
from .frames import Frames
from .kernel import Request, Sweep, SweepResult, Tape, WholePasses, WholeRequest
from .pieces import Batch, Pieces
from .sums import columns_at_once
from .torch_layers import AUTOGRAD, CALLS, OwnWeights, Walk, can_record, keeps_graph
from .whole_torch import WholeTorch

__all__ = ["Fused"]

DEVICES = {"cpu", "cuda", "mps"}
"""The types of devices on which torch has these layers."""

PRECISIONS = {torch.float64, torch.float32, torch.bfloat16, torch.float16}

GATES = 2**24
"""The number of gate values that are computed at a time, where c is."""


class Fused:
    """The fused kernel: stage 1 by torch's own layers, stages 3 and 4 by their gradients."""

    name = "fused"
    variant: str | None = None
    own_gradients = True

    def refuses(self, request: Request) -> str | None:
        device, dtype = request.device, request.dtype
        if request.cell.mode not in CALLS:
            return f"torch has no fused layer for {request.cell.name} with {request.cell.activations[0]}"
        if device.type not in DEVICES:
            return f"it runs on {', '.join(sorted(DEVICES))}, not on {device}"
        if dtype not in PRECISIONS or (device.type == "mps" and dtype == torch.float64):
            return f"torch's fused layers do not compute {dtype} on {device.type}"
        if request.projection and device.type == "mps":
            return "torch's fused LSTM has no projection on mps"
        if request.edge_factors:
            return "torch's fused layers have no factors on time edges, as a randomized gradient draws them"
        if request.adjoints:
            return "torch's fused layers give gradients, not the adjoint of every step that is asked for here"
        return None

    def hesitates(self, request: Request) -> str | None:
        if request.device.type == "cpu" and request.gains is None:
            return "on a CPU it is chosen where it is measured to be faster; else kernel='fused' names it"
        return None

    def taped_per_unit(self, cell: Cell, reach: Reach) -> int:
        """An estimate: what torch's layer keeps for its gradient, gates and states. Blocks are run forward again."""
        return cell.gates_per_unit + cell.states if reach.every is None else 0

    # Stage 1 ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def forward(
        self,
        cell: Cell,
        x: Tensor,
        initial: tuple[Tensor, ...],
        resets: Tensor | None,
        w: Weights,
        tape_gates: bool,
        lengths: Tensor | None,
        reset_state: tuple[Tensor, ...] = (),
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]:
        T, B, _ = x.shape
        P = w.hh.shape[1]
        c = [torch.stack([s, s]) for s in initial[1:]]
        if B == 0:
            return (x.new_zeros(T + 1, 0, P), *c), None
        pieces = Pieces.of(Frames.of(EVERYTHING, lengths, T, B), _resets(resets))
        record = tape_gates and can_record()
        batches = [pieces.batch()] if record or pieces.entire else pieces.batches()
        weights, before = OwnWeights.of(cell, w, record), [s[None] for s in initial]
        h = x.new_empty(T + 1, B, P) if pieces.entire else x.new_zeros(T + 1, B, P)
        h[0] = initial[0]
        for batch in batches:
            walk = Walk.of(batch, weights, batch.take(x), tuple(map(batch.start, before)), record)
            y, finals = walk.roots[0].detach(), [s.detach()[0] for s in walk.roots[2:]]
            if pieces.entire:
                h[1:] = y
                for series, final in zip(c, finals, strict=True):
                    series[1] = final
                continue
            h[1:].view(T * B, P).index_copy_(0, batch.addresses(by_position=False).to(x.device), y.reshape(-1, P))
            closing = pieces.closes[batch.index].nonzero()[:, 0]
            lane, rows = pieces.lane[batch.index[closing]].to(x.device), closing.to(x.device)
            for series, final in zip(c, finals, strict=True):
                series[1].index_copy_(0, lane, final.index_select(0, rows))
        return (h, *c), (*walk.roots, *walk.leaves) if record else None

    @torch.no_grad()
    def infer(self, cell: Cell, x: Tensor, hx: tuple[Tensor, ...], w: Weights) -> tuple[Tensor, ...] | None:
        if x.shape[1] == 0:
            return None
        weights = OwnWeights.of(cell, w, record=False)
        return weights.call(x.contiguous(), None, tuple(s.contiguous() for s in hx), train=False)

    def whole(self, request: WholeRequest) -> WholePasses | None:
        if request.T * request.B == 0 or not (request.frames.whole and request.gates):
            return None
        return WholeTorch(request)

    # Stages 3 and 4 ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sweep(self, request: Sweep) -> SweepResult:
        sums = _Sums(request)
        if len(request.frames.start):
            with _above_autograd():
                for walk, number in self._walks(request):
                    sums.add(walk, number)
        return sums.result()

    def _walks(self, request: Sweep) -> Iterator[tuple[Walk, int]]:
        """Every call that is differentiated, and the number of its first column among those of the request."""
        cell, w, tape, frames = request.cell, request.w, request.tape, request.frames
        resets = _resets(tape.resets)
        if frames.whole and tape.record:
            batch = Pieces.of(frames, resets).batch()
            n = 1 + cell.states
            yield Walk(batch, tape.record[:n], tape.record[n:]), 0
            return
        assert request.x is not None
        weights, number = OwnWeights.of(cell, w, record=True), 0
        if bool((frames.start > 0).any()):
            _complete(cell, w, tape, request.x)
        at_once = len(frames.start) if request.by_position else columns_at_once(frames, w)
        for group in frames.groups(at_once):
            for batch in Pieces.of(group, resets).batches():
                rows = batch.take(request.x)
                yield Walk.of(batch, weights, rows, tuple(map(batch.start, tape.states)), record=True), number
            number += len(group.start)


class _Sums:
    """The sums of the gradients of all calls of one sweep; of half precision, in float32 where there are several."""

    def __init__(self, request: Sweep) -> None:
        self.request, frames, states = request, request.frames, request.tape.states
        self.N = len(frames.start)
        self.shape = (frames.R, self.N) if request.by_position else (frames.T, frames.B)
        self.dx: Tensor | None = None  # of the shape of its first two dimensions as one
        self.weights: list[Tensor | None] = [None] * len(request.w.named)
        self.leaving = [s.new_zeros(self.N, s.shape[2]) for s in states] if request.leaving else []

    def add(self, walk: Walk, number: int) -> None:
        """Add the gradients of one call. number: of its first column among all."""
        request, batch, states = self.request, walk.batch, len(self.request.tape.states)
        wanted = [request.dx, *[request.leaving] * states, *[request.weights] * len(self.weights)]
        kept = len(self.request.tape.record) > 0 and walk.roots[0] is self.request.tape.record[0]
        again = kept and keeps_graph()
        dx, *found = walk.pull([self._errors(batch), *self._arriving(batch)], wanted, again)
        if dx is not None:
            self._add_input(batch, dx.reshape(-1, dx.shape[-1]))
        for total, grad in zip(self.leaving, found[:states], strict=False):
            if grad is not None and batch.pieces.entire:
                total.copy_(grad[0])
            elif grad is not None:
                rows = batch.pieces.opens[batch.index].nonzero()[:, 0]
                column = batch.pieces.column[batch.index[rows]] + number
                total.index_copy_(0, column.to(total.device), grad[0].index_select(0, rows.to(total.device)))
        for i, (before, grad) in enumerate(zip(self.weights, found[states:], strict=True)):
            if grad is not None:
                self.weights[i] = grad if before is None else _wide(before) + grad

    def _add_input(self, batch: Batch, rows: Tensor) -> None:
        """Add a gradient of x `[S, I]`."""
        if batch.pieces.entire:
            self.dx = rows if self.dx is None else self.dx + rows
            return
        if self.dx is None:
            self.dx = _wide(rows.new_zeros(self.shape[0] * self.shape[1], rows.shape[1]))
        address = batch.addresses(self.request.by_position).to(rows.device)
        self.dx.index_add_(0, address, rows.to(self.dx.dtype))

    def _errors(self, batch: Batch) -> Tensor | None:
        """dL/dy as rows of the batch."""
        request = self.request
        if request.errors is None:
            return None
        errors = batch.take(request.errors, request.by_position)
        foreign = None if request.by_position else batch.foreign()
        if foreign is None:
            return errors
        return errors.masked_fill(foreign.view(*errors.shape[:-1], 1).to(errors.device), 0)

    def _arriving(self, batch: Batch) -> list[Tensor | None]:
        """The cotangents of the final states `[1, M, .]`."""
        pieces, states = batch.pieces, self.request.tape.states
        found: list[Tensor | None] = [None] * len(states)
        if all(arriving is None for arriving in self.request.arriving):
            return found
        if pieces.entire and torch.equal(pieces.frames.arrives, batch.index):  # nothing is moved to a device
            return [None if arriving is None else arriving[None] for arriving in self.request.arriving]
        arrives = pieces.frames.arrives[pieces.column].where(pieces.closes, -1)[batch.index]
        rows = (arrives >= 0).nonzero()[:, 0]
        for i, (arriving, state) in enumerate(zip(self.request.arriving, states, strict=False)):
            if arriving is not None and len(rows):
                comes = arriving.index_select(0, arrives[rows].to(arriving.device))
                zeros = state.new_zeros(1, len(batch.index), state.shape[2])
                found[i] = zeros.index_copy(1, rows.to(state.device), comes[None].to(state.dtype))
        return found

    def result(self) -> SweepResult:
        """All of it, in the precision of the weights; zeros where nothing has arrived."""
        w, dx = self.request.w, self.dx
        if self.request.dx:
            dx = w.ih.new_zeros(self.shape[0] * self.shape[1], w.ih.shape[1]) if dx is None else dx.to(w.ih.dtype)
            dx = dx.view(*self.shape, w.ih.shape[1])
        weights: tuple[Tensor | None, ...] = ()
        if self.request.weights:
            found = iter(self.weights)
            weights = tuple(None if t is None else _or_zeros(next(found), t) for t in w)
        return SweepResult(None, (), tuple(self.leaving), (), weights, dx)


def _or_zeros(total: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if total is None else total.to(like.dtype)


def _wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.float() if x.dtype.itemsize < 4 else x


def _above_autograd() -> AbstractContextManager[Any]:
    """A context in which autograd records, also inside an operator, where torch leaves it out."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    if not torch._C._dispatch_tls_is_dispatch_key_excluded(AUTOGRAD[0]):
        return nullcontext()
    for key in AUTOGRAD:
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def _resets(resets: Tensor | None) -> Tensor | None:
    """`[T, B, 1]` -> `[T, B]` on the CPU, where addresses are computed; None where there are none."""
    if resets is None:
        return None
    found = resets[..., 0].cpu()
    return found if bool(found.any()) else None


def _complete(cell: Cell, w: Weights, tape: Tape, x: Tensor) -> None:
    """Put c of every step `[T+1, B, H]` into a tape that has it at both ends: h gives all gates by one product."""
    if cell.states == 1 or len(tape.states[1]) == len(tape.states[0]):
        return
    h, (c_0, _) = tape.states[0], tape.states[1]
    reset = tape.resets
    before = h[:-1] if reset is None else h[:-1].masked_fill(reset, 0)
    dtype = torch.float32 if h.dtype.itemsize < 4 else h.dtype
    f, u = c_0.new_empty(2, *x.shape[:2], c_0.shape[1], dtype=dtype)
    at_once = max(1, GATES // (x.shape[1] * w.hh.shape[0]))
    computed = computed_in(x.dtype) if x.is_cpu else x.dtype
    w = w.to(computed)
    for a in range(0, len(x), at_once):
        part = slice(a, a + at_once)
        f[part], u[part] = cell.linear(cell.gates(cell.project(x[part].to(computed), w), before[part].to(computed), w))
    if reset is not None:
        f.masked_fill_(reset, 0)
    c = _recurred(f, u, c_0.to(dtype))
    tape.states = (h, torch.cat([c_0[None], c.to(h.dtype)]))


def _recurred(f: Tensor, u: Tensor, c: Tensor) -> Tensor:
    """c_t = f_t c_{t-1} + u_t of all steps `[T, B, H]`, from c_{-1} `[B, H]`, in about 2 sqrt(T) operations.

    The steps are cut into sqrt(T) stretches, which are followed side by side: c is linear in the state before each.
    """
    T = len(f)
    n = isqrt(T - 1) + 1  # steps of a stretch
    m = -(-T // n)  # stretches
    more = n * m - T
    f = torch.cat([f, f.new_ones(more, *f.shape[1:])]).view(m, n, *f.shape[1:])
    u = torch.cat([u, u.new_zeros(more, *u.shape[1:])]).view(m, n, *u.shape[1:])
    for j in range(1, n):
        u[:, j].addcmul_(f[:, j], u[:, j - 1])
        f[:, j] *= f[:, j - 1]
    before = [c]
    for i in range(m - 1):
        before.append(torch.addcmul(u[i, -1], f[i, -1], before[-1]))
    return torch.addcmul(u, f, torch.stack(before)[:, None]).flatten(0, 1)[:T]
