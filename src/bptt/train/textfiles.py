"""Text files by their bytes: checked to be UTF-8, and where their lines and paragraphs lie.

One pass of bounded memory for each file, besides what is found.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .errors import InputError
from .found import opening

__all__ = ["PIECE", "Spans", "line_of", "read", "spans_of"]

PIECE = 1 << 20
"""Bytes read at a time."""

Spans = np.ndarray[Any, np.dtype[np.int64]]
"""`[D, 2]`: the bytes of its file at which each document begins and ends."""

_BLANK = np.isin(np.arange(256), list(b" \t\n\v\f\r"))


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


def spans_of(files: list[Path], split: str) -> tuple[Spans, Spans]:
    """(the spans of the documents of some files, none white space alone; which is the first of each file `[F]`).

    InputError where there are none.
    """
    spans, firsts, count = [], [], 0
    for file in files:
        firsts.append(count)
        for found in {"lines": _inked, "paragraphs": _runs, "whole": _whole}[split](_lines(file)):
            spans.append(found)
            count += len(found)
    if not count:
        raise InputError(f"text {files[0] if len(files) == 1 else files[0].parent} is empty")
    return np.concatenate(spans), np.array(firsts)


def line_of(file: Path, byte: int) -> int:
    """The number of the line that begins at a byte, counted from 1."""
    before = takewhile(lambda some: some[0, 0] < byte, _lines(file))
    return 1 + sum(int((some[:, 0] < byte).sum()) for some in before)


def _inked(lines: Iterator[Spans]) -> Iterator[Spans]:
    """The lines that are not white space."""
    return (some[some[:, 2] > 0, :2] for some in lines)


def _whole(lines: Iterator[Spans]) -> Iterator[Spans]:
    """From the first line to the end of the last, if any is not white space."""
    begin, end, ink = None, 0, 0
    for some in lines:
        begin = some[0, 0] if begin is None else begin
        end, ink = some[-1, 1], ink + some[:, 2].sum()
    if ink:
        yield np.array([[begin, end]])


def _runs(lines: Iterator[Spans]) -> Iterator[Spans]:
    """From the first to the last line of each run of lines that are not white space."""
    begun = np.zeros((0, 2), np.int64)  # a run that may go on
    for some in lines:
        full = np.flatnonzero(some[:, 2])
        first, last = full[np.diff(full, prepend=-2) > 1], full[np.diff(full, append=len(some) + 1) > 1]
        found = np.column_stack([some[first, 0], some[last, 1]])
        if len(begun) and len(full) and full[0] == 0:
            found[0, 0] = begun[0, 0]
        else:
            found = np.concatenate([begun, found])
        goes_on = len(full) > 0 and full[-1] == len(some) - 1
        begun = found[len(found) - goes_on :]
        yield found[: len(found) - goes_on]
    yield begun


def _lines(file: Path) -> Iterator[Spans]:
    r"""Of each line, some lines at a time `[n, 3]`, n > 0: the bytes at which its text begins and ends, and how many
    are not white space. A line ends in \n, \r\n or \r. Checks that the file is UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    at = begin = ink = 0  # of the line that a piece begins in: its first byte, what is not blank so far
    with opening(file) as opened:
        for data in _pieces(opened):
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(data)
            except UnicodeDecodeError as error:
                raise _not_utf8(file, at - pending + error.start) from None
            if at == 0 and data.startswith(codecs.BOM_UTF8):
                begin = len(codecs.BOM_UTF8)
                ink = -begin  # the mark is no text
            values = np.frombuffer(data, np.uint8)
            newline, back = values == 0x0A, values == 0x0D
            pairs = back[:-1] & newline[1:]
            back[:-1] &= ~pairs
            ends = np.flatnonzero(newline | back)  # the last byte of each line
            inked = ink + np.cumsum(~_BLANK[values])
            if len(ends):
                longer = np.concatenate([[False], pairs])[ends]
                begins = np.concatenate([[begin], at + ends[:-1] + 1])
                yield np.column_stack([begins, at + ends - longer, np.diff(inked[ends], prepend=0)])
                begin, ink = at + int(ends[-1]) + 1, int(inked[-1] - inked[ends[-1]])
            else:
                ink = int(inked[-1])
            at += len(data)
    if pending := len(decoder.getstate()[0]):
        raise _not_utf8(file, at - pending)
    yield np.array([[begin, at, ink]])  # the last line may have no newline


def _pieces(opened: BinaryIO) -> Iterator[bytes]:
    r"""A file, `PIECE` bytes at a time, never cut between \r and \n."""
    held = b""
    while data := opened.read(PIECE):
        data = held + data
        held = data[-1:] if data.endswith(b"\r") else b""
        if piece := data.removesuffix(held):
            yield piece
    if held:
        yield held


def _not_utf8(file: Path, byte: int) -> InputError:
    return InputError(f"text {file} is not UTF-8: byte {byte} cannot be decoded")
