"""`stream_scan`: gradients of a scan of any step whose xs are never in memory as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_is_leaf

from .. import policies
from ..memory import Checkpoints, parse
from ..scan import KERNELS
from ..scan.pytrees import Form, Step, split
from ._pieces import Sliceable, check_lanes, is_sliceable, rechunked
from ._scan_stream import ScanStream, zeros_for_none
from ._stream_loss import StreamLoss, checked_tensors

__all__ = ["StreamedScan", "stream_scan"]


@dataclass(frozen=True)
class StreamedScan:
    """The loss and every gradient of a scan, as `stream_scan` returns them."""

    loss: float
    """The loss, summed over all steps."""
    wrt: tuple[Tensor, ...]
    """The gradients of the tensors given as `wrt`, zero where neither step nor loss uses one."""
    carry: Any
    """The gradient of the first carry, in its form; None in the place of what can have none."""
    final: Any
    """The final carry."""
    reset_state: Any = None
    """The gradient of the state that resets restart from, in the form of that state; None where none was given."""


@torch.no_grad()
def stream_scan(
    step: Step,
    carry: Any,
    xs: Any,
    loss: Callable[[slice, Any], Tensor | None],
    *,
    wrt: Iterable[Tensor] = (),
    length: int | None = None,
    gradient: policies.Policy | str = "full",
    memory: Checkpoints | str = "checkpoints",
    resets: Sliceable | Tensor | None = None,
    reset_state: Any = None,
    kernel: str = "auto",
) -> StreamedScan:
    """Compute every gradient of L = sum over segments of loss(steps, ys), with neither xs nor ys in memory as a whole.

    Forward keeps checkpoints of the carry only. Backward reads and runs each segment again, computes its loss, and
    carries its adjoint over to the segment before: the gradient is that of one backward pass of `bptt.scan` over all T
    steps, under any policy. Where blocks overlap, a segment is run together with the steps before it that its losses
    reach, up to `window - 1`. Peak memory: the checkpoints, and x, ys and tape of one segment and of these steps. In
    memory for all steps are only tensors given so, and the factors that `Randomized` draws beforehand.

    step, carry, length, gradient, kernel: as for `bptt.scan`. xs: a pytree of what has a length T and slices of steps
    that become tensors `[n, ...]`: tensors, NumPy memory maps; it is read twice (three times or more where `memory`
    asks for a binomial schedule). Or an iterator, such as a generator, of pieces: pytrees of tensors or arrays
    `[n, ...]`, of any lengths, which is read once: under a `Chunked` policy each chunk is finished before the next is
    read; under others the pieces are written to temporary files. Or None, with a length. loss: called once for each
    segment (the last one first; in chunks, the last one of each chunk first), with the slice of its steps and ys
    `[n, ...]`, in the form of the step's y; returns the sum (not the mean) of its losses as a scalar, or None for no
    loss. wrt: the tensors whose gradients are wanted, which step or loss use: those of modules, `module.parameters()`.
    memory: `Checkpoints(...)` or its text form, applied to each chunk where there are chunks. resets: bool `[T, B]` or
    `[T]`, anything with slices. reset_state: as for `bptt.scan`.

    A step draws the numbers that it draws in a loop, and the same ones when it is run again. What it writes to buffers
    it writes again whenever it is run. The loss draws after all steps. `.grad` is not touched.

    Raises TypeError where xs have neither slices nor pieces, loss is no function or gives no scalar, wrt holds anything
    but tensors, or resets have no slices or are not bool; ValueError for xs without steps, leaves or pieces that
    disagree, a tensor of wrt that needs no gradient, a reset_state without resets, a memory that is not checkpoints or
    too small; and as `bptt.scan` does.

    >>> import torch, bptt
    >>> cell, x = torch.nn.GRUCell(2, 3), torch.randn(50, 4, 2)
    >>> def step(h, x):
    ...     h = cell(x, h)
    ...     return h, h
    >>> h = torch.zeros(4, 3)
    >>> found = bptt.stream_scan(step, h, x, lambda steps, ys: ys.square().sum(), wrt=cell.parameters())
    >>> bptt.scan(step, h, x)[1].square().sum().backward()
    >>> torch.allclose(found.wrt[0], cell.weight_ih.grad, atol=1e-5)
    True

    Source: checkpoints as in `bptt.Checkpoints`; stages 1 to 4, equations/README.md, chapter 1.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(map(repr, KERNELS))}: got {kernel!r}")
    policy, kept = policies.parse(gradient), parse(memory)
    if not isinstance(kept, Checkpoints):
        raise ValueError(f"memory must be Checkpoints(...) or its text form: got {memory!r}")
    if reset_state is not None and resets is None:
        raise ValueError("reset_state is what resets restart from: got it without resets")
    stream = _Steps(step, carry, StreamLoss(loss, checked_tensors(wrt)), kept, kernel, resets)
    if reset_state is not None:
        stream.restart_from(reset_state, carry)
    tensors, form = split(carry)
    if not _are_pieces(xs):
        leaves, T = stream.of_leaves(xs, length)
        stream.in_segments(leaves, T, policy)
    elif length is not None:
        raise ValueError(f"length must be None where xs are pieces, which tell it: got {length!r}")
    else:
        stream.in_pieces(partial(stream.rechunked, xs), policy)
    return StreamedScan(
        loss=stream.loss.total,
        wrt=tuple(stream.loss.grads),
        carry=_joined(form, zeros_for_none(tensors, stream.sent)),
        final=stream.final,
        reset_state=None if reset_state is None else stream.restarted(stream.of_restarts),
    )


def _are_pieces(xs: Any) -> bool:
    """Whether xs are given piece by piece, and not as a pytree."""
    return hasattr(xs, "__next__") or (tree_is_leaf(xs) and hasattr(xs, "__iter__") and not is_sliceable(xs))


def _joined(form: Form, grads: Sequence[Tensor | None]) -> Any:
    """Gradients in the form of a carry."""
    given = iter(grads)
    return form.of_tensors().join(g for g in given)  # type: ignore[misc]  # None for what has no gradient


class _Steps(ScanStream):
    """A scan of a step that a user gives."""

    spec: TreeSpec
    kinds: list[tuple[int, ...]] | None = None

    def __init__(self, step: Step, carry: Any, loss: StreamLoss, memory: Checkpoints, kernel: str, resets: Any) -> None:
        super().__init__(loss, memory, kernel, resets)
        self.step, self.carry = step, carry
        self.device = next((t.device for t in split(carry)[0]), None)
        self.places: list[bool] = []

    def begin(self, first: list[Tensor], T: int) -> None:
        """Nothing: step and carry are given."""

    def joined(self, leaves: list[Tensor], a: int, b: int) -> Any:
        given = iter(leaves)
        return self.spec.unflatten([next(given) if place else None for place in self.places])

    def as_computed(self, piece: Any) -> Tensor:
        found = super().as_computed(piece)
        return found if self.device is None else found.to(self.device)

    def of_leaves(self, xs: Any, length: int | None) -> tuple[list[Any], int]:
        """The leaves of xs, and T."""
        check_lanes("xs", xs)
        leaves, self.spec = tree_flatten(xs)
        self.places = [leaf is not None for leaf in leaves]
        leaves = [leaf for leaf in leaves if leaf is not None]
        for leaf in leaves:
            check_lanes("xs", leaf)
            if not is_sliceable(leaf):
                raise TypeError(
                    f"xs must be a pytree of what has a length and slices of steps, or an iterator of pieces: got a "
                    f"{type(leaf).__name__}"
                )
        lengths = {*map(len, leaves), *(() if length is None else (length,))}
        if len(lengths) != 1:
            raise ValueError(
                f"xs and length must tell one number of steps: got leaves of xs of {[*map(len, leaves)]} steps, "
                f"{length=}"
            )
        T = lengths.pop()
        if T < 1:
            raise ValueError(f"x must have at least 1 step: got {T}")
        return leaves, T

    def rechunked(self, pieces: Iterable[Any], k: int) -> Any:
        """The leaves of the same steps in chunks of k."""
        return rechunked(pieces, k, self._leaves_of, self.as_computed)

    def _leaves_of(self, piece: Any) -> list[Any]:
        """The leaves of a piece. Raises ValueError where it is not like the first."""
        leaves, spec = tree_flatten(piece)
        shapes = [list(getattr(leaf, "shape", ())) for leaf in leaves if leaf is not None]
        if not shapes or [] in shapes or len({shape[0] for shape in shapes}) != 1:
            raise ValueError(f"x must have pieces [n, ...], pytrees of arrays of n steps: got leaves {shapes}")
        kinds = [tuple(shape[1:]) for shape in shapes]
        if self.kinds is None:
            self.kinds, self.spec, self.places = kinds, spec, [leaf is not None for leaf in leaves]
        if spec != self.spec or kinds != self.kinds:
            first = [["n", *kind] for kind in self.kinds]
            raise ValueError(f"x must have pieces like the first, with leaves {first}: got {shapes}")
        return [leaf for leaf in leaves if leaf is not None]
