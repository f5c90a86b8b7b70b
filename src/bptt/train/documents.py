"""Where documents come from: text files split into documents, numbered by a vocabulary when they are read.

Files are indexed once, in one pass of bounded memory, and from then on read a document at a time, so that a text may be
larger than memory. The index takes 16 bytes a document. `tokenfiles` has documents that are numbers already.

    Texts.lines("reviews.txt")  ->  Numbered(texts, vocabulary)  ->  Lanes(documents, ...)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from .corpus import encodable
from .errors import InputError
from .found import found_directory, opening
from .textfiles import PIECE, Spans, line_of, read, spans_of
from .vocabulary import Vocabulary, tokenize

__all__ = ["Numbered", "Texts"]


class Texts:
    """Documents of text: a sequence of str, read from their files when they are asked for.

    files: what the documents lie in. spans: int64 `[D, 2]`, the bytes of its file at which each document begins and
    ends. firsts: `[F]`, the number of each file's first document, counted from the first of `spans`. field: the
    documents are JSON objects, the text is in this field. change: what is done to each document's text when it is read.

    Use one of `lines`, `paragraphs`, `whole`, `directory` and `json_lines`, which take UTF-8 files (a byte order mark
    is dropped, line ends of any system become newlines) and raise InputError for a file that is missing, not UTF-8 or
    holds nothing but white space. Documents of ASCII white space alone are left out.
    """

    def __init__(
        self,
        files: list[Path],
        spans: Spans,
        firsts: Spans,
        field: str | None = None,
        change: Callable[[str], str] | None = None,
    ) -> None:
        self.files, self.spans, self.firsts, self.field, self.change = files, spans, firsts, field, change

    @classmethod
    def lines(cls, path: str | Path) -> Texts:
        """A document per line, without its line end."""
        return cls([Path(path)], *spans_of([Path(path)], "lines"))

    @classmethod
    def paragraphs(cls, path: str | Path) -> Texts:
        """A document per run of lines between blank ones."""
        return cls([Path(path)], *spans_of([Path(path)], "paragraphs"))

    @classmethod
    def whole(cls, path: str | Path) -> Texts:
        """The file is one document."""
        return cls([Path(path)], *spans_of([Path(path)], "whole"))

    @classmethod
    def directory(cls, path: str | Path, pattern: str = "**/*.txt") -> Texts:
        """A document per file of a directory that matches the pattern, in the order of their paths."""
        folder = Path(path)
        found_directory(folder)
        files = sorted(file for file in folder.glob(pattern) if file.is_file())
        if not files:
            raise InputError(f"the directory {folder} has no file that matches {pattern}")
        return cls(files, *spans_of(files, "whole"))

    @classmethod
    def json_lines(cls, path: str | Path, field: str) -> Texts:
        """A document per line, which is a JSON object with the text in `field`.

        A line without it raises InputError when it is read; `Numbered` reads them all.
        """
        return cls([Path(path)], *spans_of([Path(path)], "lines"), field)

    def changed(self, change: Callable[[str], str]) -> Texts:
        """The same documents, each with its text changed when it is read."""
        return Texts(self.files, self.spans, self.firsts, self.field, change)

    def part(self, start: int, stop: int) -> Texts:
        """The documents start up to stop."""
        return Texts(self.files, self.spans[start:stop], self.firsts - start, self.field, self.change)

    def __len__(self) -> int:
        return len(self.spans)

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> str:
        """One document. InputError if its file has changed or, in JSON lines, has no such text."""
        start, stop = self.spans[index].tolist()
        return self._read(index, read(self._file(index), start, stop - start))

    def piece(self, index: int, level: str, start: int, opened: BinaryIO | None = None) -> bytes:
        """About `PIECE` bytes of a document, from byte `start` of its file, that end between two tokens of `level`.

        Of JSON lines, and of texts that are changed, all that is left of it. opened: the file, if it is open.
        """
        stop = int(self.spans[index, 1])
        size = PIECE if self.field is None and self.change is None else stop - start
        while True:
            data = read(self._file(index), start, min(size, stop - start), opened)
            cut = len(data) if start + len(data) == stop else _cut(data, level)
            if cut:
                return data[:cut]
            size *= 2  # a word longer than that

    def pieces(self, level: str) -> Iterator[tuple[int, int, str]]:
        """All documents in order, a piece at a time: (index, the byte at which the piece begins, its text)."""
        bounds = np.append(self.firsts, len(self)).clip(0, len(self)).tolist()
        for file, first, last in zip(self.files, bounds[:-1], bounds[1:], strict=True):
            with opening(file) as opened:
                for index in range(first, last):
                    start, stop = self.spans[index].tolist()
                    while start < stop:
                        piece = self.piece(index, level, start, opened)
                        yield index, start, self._read(index, piece)
                        start += len(piece)

    def tokens(self, level: str) -> Iterator[str]:
        """The tokens of all documents, one by one: what `Vocabulary.build` counts.

        Documents do not run into one another, whatever the level.
        """
        for _, _, text in self.pieces(level):
            yield from tokenize(text, level)

    def decode(self, index: int, piece: bytes) -> str:
        """A piece of a document as text."""
        try:
            text = piece.decode()
        except UnicodeDecodeError:
            raise InputError(f"text {self._file(index)} has changed since it was indexed") from None
        return text.replace("\r\n", "\n").replace("\r", "\n")

    def _read(self, index: int, data: bytes) -> str:
        """The text of a document, or of a piece of one."""
        text = self.decode(index, data)
        text = text if self.field is None else self._text(index, text)
        return text if self.change is None else self.change(text)

    def _file(self, index: int) -> Path:
        return self.files[int(np.searchsorted(self.firsts, range(len(self))[index], side="right")) - 1]

    def _text(self, index: int, line: str) -> str:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self._where(index)}: not JSON: {str(error).splitlines()[0]}") from None
        if not isinstance(entry, dict) or self.field not in entry:
            known = ", ".join(entry) if isinstance(entry, dict) and entry else "none"
            raise InputError(f"{self._where(index)}: no field {self.field!r}, its fields are {known}")
        text = entry[self.field]
        if not isinstance(text, str):
            raise InputError(f"{self._where(index)}: field {self.field!r} must be text: got {type(text).__name__}")
        if not encodable(text):
            raise InputError(f"{self._where(index)}: field {self.field!r} holds half a character, \\ud800 to \\udfff")
        return text

    def _where(self, index: int) -> str:
        """The file and the line in which a document begins."""
        file = self._file(index)
        return f"{file}, line {line_of(file, int(self.spans[index, 0]))}"


class Numbered:
    r"""Documents of text as token ids: what `Lanes` takes.

    An item is an int64 tensor `[n]` or, of a long document, what reads slices of it.

    texts: what to number; read through once, to count the tokens (`sizes`, int64 `[D]`), then a document at a time.
    Of one larger than `PIECE` bytes only the part that is asked for is read (a JSON line is read whole).

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "text.txt"
    ...     _ = path.write_text("abba\n\nbab\n")
    ...     documents = Numbered(Texts.lines(path), Vocabulary.build("aabbb", "char"))
    ...     documents.sizes.tolist(), documents[1].tolist()
    ([4, 3], [1, 2, 1])
    """

    def __init__(self, texts: Texts, vocabulary: Vocabulary) -> None:
        self.texts, self.vocabulary = texts, vocabulary
        self.sizes: np.ndarray[Any, np.dtype[np.int64]] = np.zeros(len(texts), np.int64)
        begins: dict[int, list[tuple[int, int]]] = {}  # of documents in several pieces: each one's byte and token
        for index, start, text in texts.pieces(vocabulary.level):
            if start > texts.spans[index, 0]:
                begins.setdefault(index, [(int(texts.spans[index, 0]), 0)]).append((start, int(self.sizes[index])))
            self.sizes[index] += len(tokenize(text, vocabulary.level))
        self._long = {
            index: _Long(texts, index, vocabulary, [*pieces, (-1, int(self.sizes[index]))])
            for index, pieces in begins.items()
        }

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.sizes.sum())

    def predicted(self) -> Iterator[Tensor]:
        """The ids of all tokens but each document's first, in order, a piece at a time."""
        for index, start, text in self.texts.pieces(self.vocabulary.level):
            ids = self.vocabulary.encode(tokenize(text, self.vocabulary.level))
            yield ids[1:] if start == self.texts.spans[index, 0] else ids

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> Tensor | _Long:
        """The ids of one document, 0 for tokens that are not in the vocabulary."""
        if index in self._long:
            return self._long[index]
        return self.vocabulary.encode(tokenize(self.texts[index], self.vocabulary.level))


class _Long:
    """The ids of a document too long to be held, by slices. The piece read last is kept."""

    def __init__(self, texts: Texts, index: int, vocabulary: Vocabulary, pieces: list[tuple[int, int]]) -> None:
        self.texts, self.index, self.vocabulary = texts, index, vocabulary
        self.begins, self.tokens = np.array(pieces).T  # each piece's first byte in the file and first token
        self._kept: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return int(self.tokens[-1])

    def __getitem__(self, at: slice) -> Tensor:
        start, stop, _ = at.indices(len(self))
        parts = [torch.zeros(0, dtype=torch.int64, device="cpu")]
        while start < stop:
            p = int(np.searchsorted(self.tokens, start, side="right")) - 1
            first, last = self.tokens[p : p + 2].tolist()
            parts.append(self._piece(p)[start - first : min(stop, last) - first])
            start = min(stop, last)
        return torch.cat(parts)

    def _piece(self, p: int) -> Tensor:
        if self._kept is None or self._kept[0] != p:
            piece = self.texts.piece(self.index, self.vocabulary.level, int(self.begins[p]))
            text = self.texts.decode(self.index, piece)
            self._kept = p, self.vocabulary.encode(tokenize(text, self.vocabulary.level))
        return self._kept[1]


def _cut(data: bytes, level: str) -> int:
    """Where to end a piece so that its tokens are those of the whole: after white space, or after a character."""
    if level == "word":
        return max(data.rfind(blank) for blank in (b" ", b"\n", b"\t")) + 1
    cut = len(data) - 1  # what follows may be the rest of a character, or the \n of \r\n
    while cut > 0 and (data[cut] & 0xC0 == 0x80 or data[cut - 1] == 0x0D):
        cut -= 1
    return cut
