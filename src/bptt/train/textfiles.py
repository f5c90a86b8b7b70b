"""Text files by their bytes: checked to be UTF-8, and where their lines and paragraphs lie.

One pass of bounded memory for each file; what is found takes 24 bytes a line while it is looked for.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .errors import InputError

__all__ = ["PIECE", "Spans", "opening", "read", "spans_of"]

PIECE = 1 << 20
"""Bytes read at a time."""

Spans = np.ndarray[Any, np.dtype[np.int64]]
"""`[D, 3]`: of each document its file's number and the bytes at which it begins and ends."""

_BLANK = np.isin(np.arange(256), list(b" \t\n\v\f\r"))


@contextmanager
def opening(file: Path) -> Iterator[BinaryIO]:
    """The file, open inside `with`. InputError where that fails, there or inside."""
    try:
        with file.open("rb") as opened:
            yield opened
    except OSError as error:
        raise InputError(f"cannot read text {file}: {error.strerror}") from None


def read(file: Path, start: int, count: int, opened: BinaryIO | None = None) -> bytes:
    """Bytes of a file.

    opened: the file, if it is open. Else it is opened for this alone, so that nothing open is shared with, or sent to,
    another process.
    """
    if opened is None:
        with opening(file) as opened:
            return read(file, start, count, opened)
    opened.seek(start)
    data = opened.read(count)
    if len(data) < count:
        raise InputError(f"text {file} has become shorter since it was indexed")
    return data


def spans_of(files: list[Path], split: str) -> Spans:
    """The spans of the documents of some files; none is white space alone. InputError where there are none."""
    spans = []
    for number, file in enumerate(files):
        found = _spans(file, split)
        spans.append(np.column_stack([np.full(len(found), number), found]))
    result = np.concatenate(spans)
    if not len(result):
        raise InputError(f"text {files[0] if len(files) == 1 else files[0].parent} is empty")
    return result


def _spans(file: Path, split: str) -> Spans:
    """int64 `[D, 2]`: the bytes at which the documents of a file begin and end."""
    lines, size = _lines(file)
    full = np.flatnonzero(lines[:, 2])
    if split == "lines":
        return lines[full, :2]
    if not len(full):
        return np.zeros((0, 2), np.int64)
    if split == "whole":
        return np.array([[lines[0, 0], size]])
    first = full[np.diff(full, prepend=-2) > 1]
    last = full[np.diff(full, append=len(lines) + 1) > 1]
    return np.column_stack([lines[first, 0], lines[last, 1]])


def _lines(file: Path) -> tuple[Spans, int]:
    """Of each line `[L, 3]`: the bytes at which its text begins and ends, and how many are not white space; the size.

    Checks that the file is UTF-8.
    """
    breaks, returns, inked = [], [], []  # of each newline: where; behind a return; bytes so far that are not blank
    decoder = codecs.getincrementaldecoder("utf-8")()
    at = ink = begin = last = 0
    with opening(file) as opened:
        while data := opened.read(PIECE):
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(data)
            except UnicodeDecodeError as error:
                raise _not_utf8(file, at - pending + error.start) from None
            if at == 0 and data.startswith(codecs.BOM_UTF8):
                begin = len(codecs.BOM_UTF8)
                ink = -begin  # the mark is no text
            values = np.frombuffer(data, np.uint8)
            found = np.flatnonzero(values == 0x0A)
            total = ink + np.cumsum(~_BLANK[values])
            breaks.append(at + found)
            returns.append(np.concatenate([[last], values])[found] == 0x0D)
            inked.append(total[found])
            at, ink, last = at + len(data), int(total[-1]), data[-1]
    if pending := len(decoder.getstate()[0]):
        raise _not_utf8(file, at - pending)
    newline = np.concatenate([*breaks, [at]])  # the last line may have none
    ends = newline - np.concatenate([*returns, [False]])
    begins = np.concatenate([[begin], newline[:-1] + 1])
    return np.column_stack([begins, ends, np.diff(np.concatenate([*inked, [ink]]), prepend=0)]), at


def _not_utf8(file: Path, byte: int) -> InputError:
    return InputError(f"text {file} is not UTF-8: byte {byte} cannot be decoded")
