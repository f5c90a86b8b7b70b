"""A batch in pieces along time: what is cut, which lanes go on, how much each piece weighs, and the state between them.

Legend: T steps, B lanes (sequences of the batch), k steps of a piece.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

__all__ = ["Piece", "detached", "split", "started"]

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Piece:
    """Consecutive steps of a batch.

    batch: what the batch is, of these steps and of the lanes that have not ended before them.
    lanes: which of the piece before's lanes these are (of the batch's, for the first piece); None: all of them.
    steps: how many steps it has, those of all its lanes added up, without padding.
    """

    batch: Any
    lanes: Tensor | None
    steps: int


def split(batch: Any, steps: int, *, time: int = 1, lengths: Hashable = None) -> list[Piece]:
    """The pieces of a batch, `steps` steps each, the last one of what is left.

    batch: a tensor, a PackedSequence, or tuples, lists and mappings of them. Tensors of two dimensions or more have
        time at dimension `time` and lanes at the other of the first two; they are cut. One of a single dimension with
        an entry for each lane loses the lanes that have ended. Whatever else there is goes into every piece as it is.
    lengths: where the batch, a tuple, list or mapping, holds its lengths: the position or key of an integer tensor
        `[B]`. A piece's lengths are those within it, all at least 1, so that they may be packed. A PackedSequence in
        the batch gives the lengths too, and becomes a PackedSequence of each piece.

    Raises ValueError where nothing can be cut, and where tensors, or lengths, do not agree.

    >>> x = torch.arange(10).reshape(2, 5)
    >>> for piece in split({"x": x, "lengths": torch.tensor([5, 3])}, 2, lengths="lengths"):
    ...     print(piece.batch["x"].tolist(), piece.batch["lengths"].tolist(), piece.lanes, piece.steps)
    [[0, 1], [5, 6]] [2, 2] None 4
    [[2, 3], [7, 8]] [2, 1] None 3
    [[4]] [1] tensor([0]) 1
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1: got {steps!r}")
    if time not in (0, 1):
        raise ValueError(f"time must be 0 or 1, the dimension of the steps: got {time!r}")
    found = _leaves(batch)
    packed = {id(leaf): pad_packed_sequence(leaf, time == 1) for leaf in found if isinstance(leaf, PackedSequence)}
    cut = [leaf for leaf in found if isinstance(leaf, Tensor) and leaf.ndim > 1] + [x for x, _ in packed.values()]
    sizes = {(leaf.shape[time], leaf.shape[1 - time]) for leaf in cut}
    if len(sizes) != 1:
        raise ValueError(
            f"batch must hold tensors with one number of steps at dimension {time}, and of lanes at {1 - time}: got "
            + (" and ".join(f"{T} steps of {B} lanes" for T, B in sorted(sizes)) or f"none in {type(batch).__name__}")
            + "; for any other batch, split it yourself"
        )
    [(T, B)] = sizes
    given = [n for _, n in packed.values()]
    named = None
    if lengths is not None:
        named = _named(batch, lengths, B)
        given.append(named.cpu())
    if any(not torch.equal(given[0], n.to(given[0].dtype)) for n in given):
        raise ValueError(
            f"batch must have one length for each lane: got {' and '.join(str(n.tolist()) for n in given)}"
        )
    whole = given[0].long() if given else torch.full((B,), T, device="cpu")
    if len(whole) != B or int(whole.min()) < 0 or int(whole.max()) > T or int(whole.max()) < 1:
        raise ValueError(f"lengths must hold {B} numbers from 0 to {T}, not all of them 0: got {whole.tolist()}")
    pieces: list[Piece] = []
    lanes, longest = torch.arange(B, device="cpu"), int(whole.max())
    for start in range(0, longest, steps):
        ahead = lanes[whole[lanes] > start]
        kept = None if len(ahead) == len(lanes) else torch.searchsorted(lanes, ahead)
        lanes = ahead
        part = _Part(start, min(steps, longest - start), None if len(lanes) == B else lanes, whole[lanes], time, B)
        of_piece = _mapped(batch, lambda leaf, part=part: part.of(leaf, named, packed))  # type: ignore[misc]  # a default that mypy cannot infer
        pieces.append(Piece(of_piece, kept, int(part.lengths.sum())))
    return pieces


@dataclass(frozen=True)
class _Part:
    """Where a piece lies in its batch. lanes: None for all; whole: their lengths in the batch."""

    start: int
    size: int
    lanes: Tensor | None
    whole: Tensor
    time: int
    B: int

    @property
    def lengths(self) -> Tensor:
        return (self.whole - self.start).clamp(max=self.size)

    def of(self, leaf: Any, named: Tensor | None, packed: Mapping[int, tuple[Tensor, Tensor]]) -> Any:
        """The piece of one tensor; of anything else, the thing itself."""
        if isinstance(leaf, PackedSequence):
            inside = self.of(packed[id(leaf)][0], None, {})
            return pack_padded_sequence(inside, self.lengths, self.time == 1, enforce_sorted=False)
        if not isinstance(leaf, Tensor) or leaf.ndim == 0:
            return leaf
        if leaf is named:
            return self.lengths.to(leaf.device, leaf.dtype)
        if leaf.ndim > 1:
            leaf = leaf.narrow(self.time, self.start, self.size)
            return leaf if self.lanes is None else leaf.index_select(1 - self.time, self.lanes.to(leaf.device))
        per_lane = self.lanes is not None and len(leaf) == self.B
        return leaf.index_select(0, self.lanes.to(leaf.device)) if per_lane and self.lanes is not None else leaf


def detached(state: Any) -> Any:
    """A state without its history: every tensor in tuples, lists and mappings, however deep."""
    return _mapped(state, lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf)


def started(state: Any, piece: Piece, dim: int = 1) -> Any:
    """The state that a piece starts from: that of the lanes that go on. dim: where a state's tensors have their lanes.

    Raises ValueError for a tensor without as many lanes there.

    >>> h = torch.arange(4.0).reshape(1, 2, 2)
    >>> started((h, {"c": h}), Piece(None, torch.tensor([1]), 3))
    (tensor([[[2., 3.]]]), {'c': tensor([[[2., 3.]]])})
    """
    lanes = piece.lanes
    if lanes is None:
        return state

    def narrowed(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.ndim <= dim or leaf.shape[dim] <= int(lanes[-1]):
            raise ValueError(f"state must have its lanes at dimension {dim} of every tensor: got {tuple(leaf.shape)}")
        return leaf.index_select(dim, lanes.to(leaf.device))

    return _mapped(state, narrowed)


def _leaves(tree: Any) -> list[Any]:
    found: list[Any] = []
    _mapped(tree, found.append)
    return found


def _mapped(tree: Any, function: Callable[[Any], Any]) -> Any:
    """The tree with a function of each leaf in its place; what is no tuple, list or mapping is a leaf."""
    if isinstance(tree, PackedSequence):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: _mapped(value, function) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_mapped(value, function) for value in tree))
    if isinstance(tree, tuple | list):
        return type(tree)(_mapped(value, function) for value in tree)
    return function(tree)


def _named(batch: Any, where: Hashable, B: int) -> Tensor:
    """The batch's lengths."""
    try:
        found = getattr(batch, str(where)) if isinstance(where, str) and hasattr(batch, "_fields") else batch[where]
    except (AttributeError, KeyError, IndexError, TypeError):
        what = type(batch).__name__
        raise ValueError(f"lengths must be a position or key of the batch, a {what}: got {where!r}") from None
    if not isinstance(found, Tensor) or found.dtype not in INTEGERS or found.shape != (B,):
        what = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"the batch's lengths, at {where!r}, must be an integer tensor of {B} lanes: got {what}")
    return found
