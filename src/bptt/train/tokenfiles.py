"""Documents that are numbers already: token ids in one long array, on a file or in memory."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from pathlib import Path
from typing import Any

import numpy as np

from .errors import InputError

__all__ = ["Tokens"]

_BLOCK = 1 << 20  # tokens looked at together
_Array = np.ndarray[Any, np.dtype[Any]]


class Tokens:
    """Documents `[n_d]` that lie one after another in an array of token ids `[N]`: what `Lanes` takes.

    source: an array, a memory map included, or a file: `.npy`, or raw numbers of `dtype` under any other name. Of a
    file only what is asked for is read.
    separator: the id that is the last of each document (what follows the last one is a document too); it must occur,
    and is predicted like any other. offsets: where each document begins, and at the end N: whole numbers `[D + 1]`, or
    a `.npy` file of them. Give at most one; with neither, the array is one document.

    sizes: int64 `[D]`. Raises InputError for files that do not hold this, ValueError for arrays; TypeError for a
    separator that is no whole number.

    >>> [d.tolist() for d in Tokens(np.array([5, 1, 0, 2, 0, 3]), separator=0)]
    [[5, 1, 0], [2, 0], [3]]
    >>> [d.tolist() for d in Tokens(np.array([5, 1, 0, 2]), offsets=[0, 1, 4])]
    [[5], [1, 0, 2]]
    """

    def __init__(
        self,
        source: str | Path | _Array,
        *,
        dtype: str | None = None,
        separator: int | None = None,
        offsets: str | Path | Sequence[int] | _Array | None = None,
    ) -> None:
        if separator is not None and offsets is not None:
            raise ValueError(f"give separator or offsets, not both: got {separator} and {offsets!r}")
        if isinstance(source, np.ndarray):
            if source.ndim != 1 or source.dtype.kind not in "iu":
                raise ValueError(f"source must be whole numbers [N]: got {source.dtype} {list(source.shape)}")
            if dtype is not None:
                raise ValueError(f"dtype is for a file of raw numbers: got {dtype!r} with an array")
            self.array: _Array | _OnFile = source
        else:
            self.array = _OnFile(Path(source), dtype)
        if len(self.array) == 0:
            raise InputError(f"tokens {self._name(source)} are empty")
        if offsets is not None:
            self.offsets = self._given(offsets)
        else:
            self.offsets = np.array([0, len(self.array)]) if separator is None else self._behind(separator, source)
        self.sizes: np.ndarray[Any, np.dtype[np.int64]] = np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> _Array | _Part:
        """One document: a view of the array, or what reads slices of the file."""
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}): got {index}")
        start, stop = self.offsets[index : index + 2].tolist()
        return self.array[start:stop] if isinstance(self.array, np.ndarray) else _Part(self.array, start, stop)

    def _behind(self, separator: int, source: str | Path | _Array) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Where the documents begin, and the end: after each separator."""
        if isinstance(separator, bool) or not hasattr(separator, "__index__"):
            raise TypeError(f"separator must be a whole number: got {separator!r}")
        ends = [np.zeros(1, np.int64)]
        for start in range(0, len(self.array), _BLOCK):
            ends.append(start + 1 + np.flatnonzero(self.array[start : start + _BLOCK] == index(separator)))
        found = np.concatenate(ends)
        if len(found) == 1:
            error: type[ValueError] = InputError if isinstance(self.array, _OnFile) else ValueError
            raise error(f"separator must occur in tokens {self._name(source)}: got {separator}")
        return found if found[-1] == len(self.array) else np.append(found, len(self.array))

    def _given(self, offsets: str | Path | Sequence[int] | _Array) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Offsets as int64, checked."""
        named = isinstance(offsets, str | Path)
        if isinstance(offsets, str | Path):
            file = _OnFile(Path(offsets), None)
            values = file[0 : len(file)]
        else:
            values = np.asarray(offsets)
        error: type[ValueError] = InputError if named else ValueError
        if values.ndim != 1 or values.dtype.kind not in "iu" or len(values) < 2:
            raise error(f"offsets must be at least 2 whole numbers: got {values.dtype} {list(values.shape)}")
        result = values.astype(np.int64)
        if result[0] != 0 or result[-1] != len(self.array) or (np.diff(result) < 0).any():
            raise error(
                f"offsets must rise from 0 to the number of tokens, {len(self.array)}: "
                f"got {len(result)} from {result[0]} to {result[-1]}"
            )
        return result

    @staticmethod
    def _name(source: str | Path | _Array) -> str:
        return "of the array" if isinstance(source, np.ndarray) else str(source)


class _OnFile:
    """An array `[N]` on a file, read by slices.

    Not a memory map: reading needs no address space, leaves nothing resident, and ends in an error instead of a signal
    where the file has been cut off meanwhile.
    """

    def __init__(self, path: Path, dtype: str | None) -> None:
        self.path = path
        try:
            if path.suffix == ".npy":
                if dtype is not None:
                    raise InputError(f"tokens {path} say themselves what they are: leave out dtype={dtype!r}")
                self.dtype, self.size, self.begin = _header(path)
            else:
                self.dtype, self.begin = _named(dtype, path), 0
                self.size, rest = divmod(path.stat().st_size, self.dtype.itemsize)
                if rest:
                    raise InputError(f"tokens {path} are no whole number of {self.dtype}: {rest} bytes are left over")
            if path.stat().st_size < self.begin + self.size * self.dtype.itemsize:
                raise InputError(f"tokens {path} are cut off: {self.size} were announced")
        except OSError as error:
            raise InputError(f"cannot read tokens {path}: {error.strerror}") from None

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, at: slice) -> _Array:
        start, stop, _ = at.indices(self.size)
        count = max(stop - start, 0)
        try:
            with self.path.open("rb") as file:
                file.seek(self.begin + start * self.dtype.itemsize)
                values = np.frombuffer(file.read(count * self.dtype.itemsize), self.dtype)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read tokens {self.path}: {error}") from None
        if len(values) < count:
            raise InputError(f"tokens {self.path} have become fewer since they were first read")
        return values


class _Part:
    """Tokens start up to stop of an array on a file, read by slices of their own."""

    def __init__(self, array: _OnFile, start: int, stop: int) -> None:
        self.array, self.start, self.stop = array, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, at: slice) -> _Array:
        start, stop, _ = at.indices(len(self))
        return self.array[self.start + start : self.start + stop]

    def tolist(self) -> list[int]:
        """All of it."""
        ids: list[int] = self[0 : len(self)].tolist()
        return ids


def _header(path: Path) -> tuple[np.dtype[Any], int, int]:
    """(dtype, N, byte of the first number) of a `.npy` file of one dimension."""
    with path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            shape, _, dtype = read(file)
        except OSError:
            raise
        except Exception as error:  # NumPy reads the header as Python's own text: anything can be wrong with that
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"tokens {path} are no .npy file: {reason}") from None
        if len(shape) != 1 or shape[0] < 0:
            raise InputError(f"tokens {path} must be one array [N]: got the shape {list(shape)}")
        if dtype.kind not in "iu":
            raise InputError(f"tokens {path} must be whole numbers: got {dtype}")
        return dtype, shape[0], file.tell()


def _named(dtype: str | None, path: Path) -> np.dtype[Any]:
    """The type of a file of raw numbers."""
    if dtype is None:
        raise InputError(f"tokens {path} need a dtype, such as uint16: only a .npy file says what it holds")
    try:
        result = np.dtype(dtype)
    except (TypeError, ValueError, SyntaxError):
        result = np.dtype("void")
    if result.kind not in "iu":
        raise InputError(f"dtype must be a NumPy type of whole numbers: got {dtype!r}")
    return result
