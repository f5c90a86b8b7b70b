"""Sequences in an NPZ file: `x`, with `lengths` or `offsets` where they differ in length, and labels `y`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..arrays import Array, arrays_of
from ..errors import InputError
from .sequences import Floats, Sequences, Whole

__all__ = ["read_npz"]

KNOWN = ("x", "y", "lengths", "offsets")


def read_npz(path: Path) -> Sequences:
    """The sequences of an NPZ file, with labels where it has `y`.

    x: numbers `[N, T, I]`, or `[N, T]` of one feature; with `lengths` `[N]` the steps after each length are padding.
    Or `[sum of lengths, I]`, the sequences one after another, with `lengths` `[N]`, or with `offsets`, where each
    begins: `[N]`, or `[N + 1]` with the end. y: `[N]`, whole numbers or text. NaN: a missing value.

    Raises InputError for other arrays, and for lengths beyond the data.
    """
    arrays = arrays_of(path, "sequences")
    if list(arrays) == [""]:
        raise InputError(f"{path} must be an NPZ file, as numpy.savez writes: got one array")
    if "x" not in arrays:
        raise InputError(f"{path} must hold an array x: got {', '.join(arrays) or 'none'}")
    if unknown := [name for name in arrays if name not in KNOWN]:
        raise InputError(f"{path} may hold {', '.join(KNOWN)}: got {', '.join(unknown)}")
    if "lengths" in arrays and "offsets" in arrays:
        raise InputError(f"{path} must hold lengths or offsets, not both")
    x = arrays["x"]
    if x.dtype.kind not in "iufb":
        raise InputError(f"{path}: x must be numbers: got {x.dtype}")
    if x.size == 0:
        raise InputError(f"{path} is empty: x is {list(x.shape)}")
    flat = x.ndim == 2 and ("lengths" in arrays or "offsets" in arrays)
    if x.ndim == 2 and not flat:
        x = x[:, :, None]
    if x.ndim not in (2, 3):
        raise InputError(
            f"{path}: x must be [N, T, I], [N, T], or [steps, I] with lengths or offsets: got {list(x.shape)}"
        )
    if "offsets" in arrays:
        if not flat:
            raise InputError(f"{path}: offsets are for x [steps, I]: got x {list(x.shape)}")
        lengths = _between(_whole(arrays["offsets"], "offsets", path), len(x), path)
    elif "lengths" in arrays:
        lengths = _whole(arrays["lengths"], "lengths", path)
    else:
        lengths = np.full(len(x), x.shape[1])
    if (lengths < 0).any():
        raise InputError(f"{path}: lengths must be at least 1: got {lengths.min()}")
    values = _flat(x, lengths, path) if flat else _unpadded(x, lengths, path)
    labels = _labels(arrays["y"], path) if "y" in arrays else None
    return Sequences.of(values, lengths, labels=labels, source=str(path))


def _whole(array: Array, name: str, path: Path) -> Whole:
    if array.ndim != 1 or array.dtype.kind not in "iu" or not len(array):
        raise InputError(f"{path}: {name} must be whole numbers [N]: got {array.dtype} {list(array.shape)}")
    return array.astype(np.int64)


def _between(offsets: Whole, steps: int, path: Path) -> Whole:
    """The lengths of sequences that begin at the offsets, of which the last may be the end."""
    if offsets[0] != 0 or (np.diff(offsets) < 0).any() or offsets[-1] > steps:
        raise InputError(f"{path}: offsets must rise from 0 to at most the {steps} steps of x: got {_shown(offsets)}")
    return np.diff(offsets if offsets[-1] == steps else np.append(offsets, steps))


def _flat(x: Array, lengths: Whole, path: Path) -> Floats:
    if lengths.sum() != len(x):
        beyond = " (x [N, T] of one feature with lengths: give it as [N, T, 1])" if len(lengths) == len(x) else ""
        raise InputError(f"{path}: lengths must add up to the {len(x)} steps of x: got {lengths.sum()}{beyond}")
    return x.astype(np.float64)


def _unpadded(x: Array, lengths: Whole, path: Path) -> Floats:
    N, T, _ = x.shape
    if len(lengths) != N:
        raise InputError(f"{path}: lengths must be one for each of the {N} sequences of x: got {len(lengths)}")
    if lengths.max() > T:
        raise InputError(f"{path}: lengths must be at most the {T} steps of x: got {lengths.max()}")
    return x[np.arange(T) < lengths[:, None]].astype(np.float64)


def _labels(y: Array, path: Path) -> list[str]:
    if y.ndim != 1 or y.dtype.kind not in "iubUS":
        raise InputError(f"{path}: y must be whole numbers or text [N]: got {y.dtype} {list(y.shape)}")
    if y.dtype.kind == "S":
        try:
            return [label.decode() for label in y.tolist()]
        except UnicodeDecodeError:
            raise InputError(f"{path}: y must be UTF-8") from None
    return [str(label) for label in y.tolist()]


def _shown(numbers: Whole) -> str:
    return f"[{', '.join(map(str, numbers[:4]))}{', ...' if len(numbers) > 4 else ''}]"
