"""The chain of states of a scan: any step function, measured as a layer is. Legend as in `_chain`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from ..scan.arguments import Arguments
from ..scan.forward import StepVisits
from ..scan.pytrees import fresh
from ..scan.replay import Visit
from ._chain import jacobian
from ._recording import Loss

__all__ = ["RowsMix", "StepChain", "batched", "steps"]

_SEED = 0  # of the errors that stand in for a loss, and of the test of rows


class RowsMix(ValueError):  # noqa: N818  # it says what the step does
    """The rows of a carry depend on one another."""


class StepChain:
    """The carries of a scan. `steps` makes one, and says what its states are.

    lengths: the number of steps of every lane `[B]` on the CPU, of which fewer than T may be data; None for all.
    """

    name = "carry"

    def __init__(
        self,
        step: Callable[[Any, Any], tuple[Any, Any]],
        carry: Any,
        xs: Any = None,
        loss: Loss | None = None,
        *,
        length: int | None = None,
        resets: Tensor | None = None,
        rows: Literal["coupled", "independent"] = "coupled",
        final: Sequence[Tensor | None] | None = None,
        lengths: Tensor | None = None,
    ) -> None:
        """final: the cotangent of each tensor of the final carry, which belongs to the last step's loss."""
        if rows not in ("coupled", "independent"):
            raise ValueError(f"rows must be 'coupled' or 'independent': got {rows!r}")
        given = Arguments.of(step, carry, xs, length, resets)
        state = given.carry
        self._float = [i for i, s in enumerate(state) if s.is_floating_point()]
        floats = [state[i] for i in self._float]
        self._final = None if final is None else [final[i] for i in self._float]
        if not floats or any(s.is_complex() for s in state):
            raise ValueError("carry must hold a floating-point tensor, and no complex one, to have a Jacobian")
        firsts = {s.shape[0] if s.dim() else None for s in floats}
        if rows == "independent" and (len(firsts) != 1 or None in firsts):
            raise ValueError(
                "rows='independent' needs floating-point tensors [B, ...] in the carry: "
                f"got {[list(s.shape) for s in floats]}"
            )
        self.B = floats[0].shape[0] if rows == "independent" else 1
        self.lengths = lengths if rows == "independent" else None
        self._shapes = [s.shape for s in floats]
        self._sizes = [s.numel() // max(self.B, 1) for s in floats]
        self.S = sum(self._sizes)
        self.dtype, self.device = floats[0].dtype, floats[0].device
        self.T, self._resets = given.T, given.resets
        if self.lengths is not None and self._resets is not None:  # a lane that ends passes its state on to its end
            ends = torch.arange(self.T, device="cpu")[:, None] == self.lengths
            self._resets = self._resets & ~ends.to(self._resets.device)
        self.transitions = range(1, self.T + 1)
        self._loss = loss
        self._latest: tuple[int, Visit] | None = None  # of the step that was asked for last
        self._steps = StepVisits.of(given)
        if self.B > 1:
            self._check_independent()

    def open(self, t: int) -> Tensor:
        if self._resets is None or t == self.T:
            return torch.ones(self.B, dtype=torch.bool, device=self.device)
        closed = self._resets[t]
        if self.B == 1:  # coupled: the state is closed where all of it is zeroed
            closed = closed.all().reshape(1)
        return ~closed.expand(self.B)

    def pull(self, t: int, rows: Tensor) -> Tensor:
        self._check_edge(t)
        visit = self._visit(t - 1)
        cotangents: list[Tensor | None] = [None] * len(visit.outputs)
        for i, shape, part in zip(self._float, self._shapes, rows.split(self._sizes, -1), strict=True):
            part = part.reshape(len(rows), *shape).to(visit.outputs[i])
            if self._resets is not None and t < self.T:
                closed = self._resets[t]
                part = part.masked_fill(closed.reshape(-1, *(1,) * (len(shape) - 1)) if shape else closed[0], 0)
            cotangents[i] = part
        return self._back(visit, cotangents, len(rows)).to(rows)

    def push(self, t: int, rows: Tensor) -> Tensor:
        return torch.einsum("bij,nbj->nbi", jacobian(self, t).to(rows), rows)

    @cached_property
    def errors(self) -> Tensor:
        """e_t `[T, B, S]`: (dy_t/ds_t)' dL/dy_t, at the last step with J_T' dL/ds_T. Without a loss and a cotangent of
        the final carry, random directions of norm 1 from a fixed seed.
        """
        found, final = self.errors_of_ys, self.final
        if final is None:
            return found
        found = found.clone()
        found[-1] += self.pull(self.T, final[None])[0]
        return found

    @cached_property
    def final(self) -> Tensor | None:
        """The cotangent of the final carry `[B, S]`; None where none was given."""
        if self._final is None:
            return None
        parts = [
            torch.zeros(shape, dtype=self.dtype, device=self.device) if d is None else d.to(self.dtype)
            for d, shape in zip(self._final, self._shapes, strict=True)
        ]
        return torch.cat([d.reshape(self.B, -1) for d in parts], -1)

    @cached_property
    def errors_of_ys(self) -> Tensor:
        """The local errors `[T, B, S]` without what the final carry sends."""
        if self._loss is None and self._final is not None:
            return torch.zeros(self.T, self.B, self.S, dtype=self.dtype, device=self.device)
        if self._loss is None:
            noise = torch.randn(
                self.T, self.B, self.S, generator=torch.Generator("cpu").manual_seed(_SEED), device="cpu"
            )
            return (noise / noise.norm(dim=-1, keepdim=True)).to(self.device, self.dtype)
        with torch.enable_grad():
            ys = [fresh(y, True) for y in self._steps.computed.ys]
            value = self._loss(self._steps.computed.y_form.join(ys))
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"loss must give a scalar tensor: got {got}")
        wanted = [y for y in ys if y.requires_grad]
        if not value.requires_grad:
            raise ValueError("loss must depend on the ys")
        found = iter(torch.autograd.grad(value.reshape(()), wanted, allow_unused=True))
        dys = [next(found) if y.requires_grad else None for y in ys]
        errors = []
        for t in range(self.T):
            visit = self._visit(t)
            cotangents: list[Tensor | None] = [None] * len(self._steps.given.carry)
            cotangents += [None if dy is None else dy[t][None] for dy in dys]
            errors.append(self._back(visit, cotangents, 1)[0])
        return torch.stack(errors)

    def _visit(self, t: int) -> Visit:
        """Step t again, recorded; the latest one is kept, since one step is asked many things."""
        if self._latest is None or self._latest[0] != t:
            self._latest = t, self._steps.visit(t)
        return self._latest[1]

    def _back(self, visit: Visit, cotangents: list[Tensor | None], N: int) -> Tensor:
        """The vector-Jacobian products `[N, B, S]` of a step, from cotangents `[N, ...]` of its outputs."""
        arrived = [(o, c) for o, c in zip(visit.outputs, cotangents, strict=True) if o.requires_grad and c is not None]
        entries = [visit.entries[i] for i in self._float]
        grads: list[Tensor | None] = [None] * len(entries)
        if arrived and N:
            outputs, rows = [o for o, _ in arrived], [c for _, c in arrived]
            grads = batched(outputs, entries, rows, N)
        filled = [e.new_zeros(N, *e.shape) if g is None else g for g, e in zip(grads, entries, strict=True)]
        return torch.cat([g.reshape(N, self.B, -1).to(self.dtype) for g in filled], -1)

    def _check_edge(self, t: int) -> None:
        if t not in self.transitions:
            raise IndexError(f"t must be in 1..{self.T}, no state comes before the first carry: got {t}")

    def _check_independent(self) -> None:
        """Raise ValueError where the first step carries a lane's cotangent to another lane."""
        generator = torch.Generator("cpu").manual_seed(_SEED)
        noise = torch.randn(self.B, self.S, generator=generator, device="cpu").to(self.device, self.dtype)
        own = torch.eye(self.B, dtype=torch.bool, device=self.device)[..., None]
        with torch.no_grad():
            back = self.pull(self.transitions[0], torch.where(own, noise, 0))
        if back.masked_fill(own, 0).any():
            raise RowsMix("rows='independent' does not hold: the step mixes the rows of its carry")


def batched(outputs: list[Tensor], entries: list[Tensor], rows: list[Tensor], N: int) -> list[Tensor | None]:
    """Gradients `[N, ...]` of N cotangents at once, one after the other where an operation cannot be batched."""
    try:
        return list(
            torch.autograd.grad(outputs, entries, rows, retain_graph=True, allow_unused=True, is_grads_batched=True)
        )
    except RuntimeError:  # what vmap cannot take: an autograd.Function, for one
        one = [
            torch.autograd.grad(outputs, entries, [r[n] for r in rows], retain_graph=True, allow_unused=True)
            for n in range(N)
        ]
        return [None if per[0] is None else torch.stack(list(per)) for per in zip(*one, strict=True)]


def steps(
    step: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Any = None,
    loss: Loss | None = None,
    *,
    length: int | None = None,
    resets: Tensor | None = None,
    rows: Literal["coupled", "independent"] = "coupled",
) -> StepChain:
    """Make the chain of states of a scan, for measurements of any step function.

    Its state s_t is the carry as step t receives it, all floating-point tensors in one vector in the order of the
    pytree, for t = 0..T-1; s_T is the final carry. J_t = ds_t/ds_{t-1} belongs to step t-1, for t = 1..T. The output of
    step t is made of s_t, so the loss at y_t enters at s_t, e_t = (dy_t/ds_t)' dL/dy_t: at lag 0 it is at the carry
    that its own step receives. (In a layer, y_t is part of the state after step t, and enters there.)

    step, carry, xs, length, resets: as for `bptt.scan`. Integers, bools and Python values pass without gradient. loss:
    from the ys, stacked `[T, ...]`, to a scalar; without one, errors of norm 1 in random directions from a fixed seed
    stand in for e_t. rows: "coupled", the whole carry is one state, B = 1; "independent", every floating-point tensor
    is `[B, ...]`, its rows are lanes and do not depend on one another, which the first step is tested for. Take it
    where it holds: a Jacobian has S^2 numbers.

    The step runs T times here, and again for each J_t, with the same random numbers; torch's generators are left alone.

    Raises ValueError for a carry without floating-point tensors or with complex ones, for rows that are not
    independent, and as `bptt.scan` does.

    >>> import torch, bptt
    >>> chain = bptt.flow.steps(lambda s, x: (torch.sin(s) + x, s), torch.zeros(3), torch.ones(5, 3))
    >>> chain.T, chain.B, chain.S
    (5, 1, 3)
    >>> chain.pull(1, torch.ones(1, 1, 3)).tolist()  # J_1 = diag(cos(0))
    [[[1.0, 1.0, 1.0]]]
    """
    return StepChain(step, carry, xs, loss, length=length, resets=resets, rows=rows)
