"""The search for the first number in a scan that is not finite: step by step, forward and back.

Legend: T steps, B lanes, N blocks of a policy that walk back side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path

from ..policies import Policy, Randomized
from ..scan.arguments import Arguments
from ..scan.forward import StepVisits
from ..scan.pytrees import Form, reset, split, split_y
from ..scan.replay import Visit
from ..scan.surroundings import Surroundings
from ._scan_loss import ScanWithLoss
from ._steps import batched

__all__ = ["Hit", "first_back", "first_error", "first_forward", "first_index"]


@dataclass(frozen=True)
class Hit:
    """A number that is not finite. what: "input", "carry" or "output" of the forward pass; "error" of the loss;
    "adjoint" or "captured" of the backward pass.

    step: in the scan's own time; for a final carry the last. lane: row of the batch, None where there are no lanes.
    paths: of the tensors that hold such a number at this step, the first one being where it stands ("carry[0]",
    "y['rate']", "x"). captured: the tensor of the closure whose gradient it is.
    """

    what: str
    step: int
    lane: int | None
    paths: tuple[str, ...]
    value: float
    captured: Tensor | None = None


def first_forward(scan: ScanWithLoss) -> Hit | None:
    """The first step whose input or output is not finite; lanes that have ended are not looked at."""
    given = Arguments.of(scan.step, scan.carry, scan.xs, scan.length, scan.resets)
    look = _Look(given, scan.lengths)
    devices = [d for d in given.devices if d.type == "cuda"]
    with torch.no_grad(), torch.random.fork_rng(devices), Surroundings.current(given.devices).entered():
        carry, form, y_form = [c.detach().clone() for c in given.carry], given.carry_form, None
        found = look("carry", 0, [("carry", carry, form)])
        for t in range(given.T):
            if found is not None:
                return found
            carry, x = reset(carry, given.resets, t), [x[t].detach().clone() for x in given.xs]
            found = look("input", t, [("x", x, given.x_form)])
            if found is not None:
                return found
            result = given.step(form.join(carry), given.x_form.join(x))
            carry, form = split(result[0], form)
            y, y_form = split_y(result[1], y_form)
            found = look("output", t, [("carry", carry, form), ("y", y, y_form)])
    return found


@torch.no_grad()
def first_error(scan: ScanWithLoss) -> Hit | None:
    """The last step at which the loss sends back what is not finite: where a walk back meets it."""
    final, dys = scan.cotangents()
    given = Arguments.of(scan.step, scan.carry, scan.xs, scan.length, scan.resets)
    look = _Look(given, None)
    for t in reversed(range(given.T)):
        arriving = [("the final carry", d) for d in (final if t == given.T - 1 else ())]
        arriving += [("y", None if d is None else d[t]) for d in dys]
        for name, d in arriving:
            if d is not None and (index := first_index(d)) is not None:
                return Hit("error", t, look.lane(d, index), (name,), float(d[index]))
    return None


@torch.no_grad()
def first_back(scan: ScanWithLoss, policy: Policy) -> Hit | None:
    """The first step on the way back through which an adjoint, or what the step sends to a tensor that it captures,
    becomes infinite or NaN. Blocks walk as the policy says. None under random factors, which are not known here.
    """
    if isinstance(policy, Randomized):
        return None
    given = Arguments.of(scan.step, scan.carry, scan.xs, scan.length, scan.resets)
    final, dys = scan.cotangents()
    steps, look = StepVisits.of(given), _Look(given, None)
    floats = [i for i, c in enumerate(given.carry) if c.is_floating_point()]
    blocks = policy.reach(given.T).blocks(given.T)
    walking: list[tuple[int, int, int]] = []
    rows = [c.new_zeros(0, *c.shape) for c in (given.carry[i].detach() for i in floats)]  # [N, ...] by leaf
    for t in reversed(range(given.T)):
        while blocks and blocks[-1][2] >= t:
            walking.append(blocks.pop())
            arriving = [final[i] if t == given.T - 1 else None for i in floats]
            rows = [
                torch.cat([r, (r.new_zeros(1, *r.shape[1:]) if d is None else d[None].to(r))])
                for r, d in zip(rows, arriving, strict=True)
            ]
        if not walking:
            continue
        owns = torch.tensor([a <= t <= b for _, a, b in walking], device=given.carry[0].device)
        cotangents: list[Tensor | None] = [None] * len(given.carry)
        begins = len(walking) == 1 and walking[0][2] == t
        for i, r in zip(floats, rows, strict=True):
            cotangents[i] = None if begins and (t < given.T - 1 or final[i] is None) else r
        cotangents += [None if d is None else _at(owns, d[t]) for d in dys]
        rows, sent = _through(steps.visit(t), cotangents, floats, len(walking))
        if given.resets is not None:
            rows = [torch.stack(reset(list(r), given.resets, t)) if len(r) else r for r in rows]
        for i, r in zip(floats, rows, strict=True):
            if (index := first_index(r)) is not None:
                path = look.paths("carry", given.carry, given.carry_form)[i]
                return Hit("adjoint", t, look.lane(r[index[0]], index[1:]), (path,), float(r[index]))
        for tensor, grad in zip(steps.replay.captured, sent[len(given.carry) + len(given.xs) :], strict=True):
            if grad is not None and (index := first_index(grad)) is not None:
                return Hit("captured", t, None, (), float(grad[index]), tensor)
        on = [n for n, block in enumerate(walking) if block[0] < t]
        walking, rows = [walking[n] for n in on], [r[on] for r in rows]
    return None


def _through(
    visit: Visit, cotangents: list[Tensor | None], floats: list[int], N: int
) -> tuple[list[Tensor], list[Tensor | None]]:
    """(the adjoints `[N, ...]` of the carry that entered a step, the gradients of all its entries, summed over N)."""
    entries, n = visit.entries, len(floats)
    summed = visit.vjp([None if c is None else c.sum(0) for c in cotangents])
    grads: Sequence[Tensor | None] = [None if (g := summed[i]) is None else g[None] for i in floats]
    if N > 1:
        arrived = [(o, c) for o, c in zip(visit.outputs, cotangents, strict=True) if o.requires_grad and c is not None]
        outputs, rows = [o for o, _ in arrived], [c.to(o) for o, c in arrived]
        grads = batched(outputs, [entries[i] for i in floats], rows, N) if arrived else [None] * n
    filled = [
        entries[i].new_zeros(N, *entries[i].shape) if g is None else g for i, g in zip(floats, grads, strict=True)
    ]
    return filled, summed


def _at(owns: Tensor, d: Tensor) -> Tensor:
    """A cotangent `[N, ...]` in the blocks whose loss it is, and zero in the others."""
    return torch.where(owns.reshape(-1, *(1,) * d.dim()), d, torch.zeros_like(d))


class _Look:
    """Looks at tensors of a step: which are not finite, where they stand in their pytree, and in which lane."""

    def __init__(self, given: Arguments, lengths: Tensor | None) -> None:
        self.given, self.lengths = given, lengths

    def __call__(self, what: str, t: int, parts: Sequence[tuple[str, list[Tensor], Form]]) -> Hit | None:
        hits = []
        for name, tensors, form in parts:
            for path, tensor in zip(self.paths(name, tensors, form), tensors, strict=True):
                index = first_index(self._of_lanes(tensor, t))
                if index is not None:
                    hits.append((path, self.lane(tensor, index), float(tensor[index])))
        if not hits:
            return None
        return Hit(what, t, hits[0][1], tuple(path for path, _, _ in hits), hits[0][2])

    def paths(self, name: str, tensors: Sequence[Tensor], form: Form) -> list[str]:
        leaves = tree_flatten_with_path(form.join(tensors))[0]
        return [f"{name}{keystr(path)}" for path, leaf in leaves if isinstance(leaf, Tensor)]

    def lane(self, tensor: Tensor, index: tuple[int, ...]) -> int | None:
        """The lane of an entry, where the rows of the tensor are as many as there are lanes."""
        return index[0] if index and self.given.lanes > 1 and len(tensor) == self.given.lanes else None

    def _of_lanes(self, tensor: Tensor, t: int) -> Tensor:
        """The tensor, with zeros in lanes that have ended."""
        if self.lengths is None or not tensor.dim() or len(tensor) != len(self.lengths):
            return tensor
        ended = (self.lengths <= t).to(tensor.device)
        return tensor.masked_fill(ended.reshape(-1, *(1,) * (tensor.dim() - 1)), 0)


def first_index(x: Tensor) -> tuple[int, ...] | None:
    """The first entry that is not finite, by the first dimension, then the second, ..."""
    if not (x.is_floating_point() or x.is_complex()):
        return None
    bad = (~torch.isfinite(x)).nonzero()
    return None if len(bad) == 0 else tuple(bad[0].tolist())
