"""Where text comes from: a UTF-8 file, or a corpus known by name."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path

from .errors import InputError
from .extras import require
from .formats import check_text

__all__ = ["CORPORA", "DEFAULT", "PREPROCESSORS", "encodable", "load", "read_file"]

TIME_MACHINE_URL = "http://d2l-data.s3-accelerate.amazonaws.com/timemachine.txt"
TIME_MACHINE_SHA1 = "090b5e7e70c295757f55df93cb0a180b9691891a"


def letters(text: str) -> str:
    """Lower-case letters and single spaces only: the preprocessing of Dive into Deep Learning, section 9.2.

    >>> letters("The Time Machine, by H. G. Wells [1898]")
    'the time machine by h g wells '
    """
    return re.sub("[^A-Za-z]+", " ", text).lower()


def python_docs() -> str:
    """The language reference of `help("for")`, which ships with CPython: about 0.4 million characters.

    The topics are joined in the order of their names. Lines of tables drawn with | and + are left out: from them a
    model learns to count spaces. The text differs from one Python version to the next.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ModuleNotFoundError:  # some distributions package it apart
        raise InputError(
            "the corpus python-docs needs Python's own module pydoc_data, which is missing here: pass --text FILE"
        ) from None
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith(("|", "+")))


def time_machine() -> str:
    """H. G. Wells, The Time Machine, letters only: downloaded once, checked, kept in the user's cache."""
    pooch = require("pooch", "corpora")
    try:
        path = pooch.retrieve(
            TIME_MACHINE_URL,
            known_hash=f"sha1:{TIME_MACHINE_SHA1}",
            fname="timemachine.txt",
            path=pooch.os_cache("bptt"),
        )
    except (OSError, ValueError) as error:  # no network, no such host; a checksum that differs
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"cannot download the corpus timemachine; pass the text with --text FILE --preprocess letters ({reason})"
        ) from error
    return letters(read_file(Path(path)))


CORPORA: dict[str, Callable[[], str]] = {"python-docs": python_docs, "timemachine": time_machine}
DEFAULT = "python-docs"
PREPROCESSORS: dict[str, Callable[[str], str]] = {"none": str, "letters": letters}


def encodable(text: str) -> bool:
    r"""Whether UTF-8 can hold a text: it has no half of a character.

    >>> encodable("é"), encodable("\ud800")
    (True, False)
    """
    return re.search("[\ud800-\udfff]", text) is None


def read_file(path: Path, what: str = "text") -> str:
    """The text of a UTF-8 file (a byte order mark is dropped). InputError, saying `what` it is, for any other file."""
    try:
        data = path.read_bytes()
        check_text(data, path, what)
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")  # as Python's text mode
    except UnicodeDecodeError as error:
        raise InputError(f"{what} {path} is not UTF-8: byte {error.start} cannot be decoded") from None
    except OSError as error:
        raise InputError(f"cannot read {what} {path}: {error.strerror}") from None


def load(corpus: str | None, text: str | None, preprocess: str) -> str:
    """The preprocessed text of a file, or of the named (or the default) corpus when no file is given. Never empty."""
    corpus = corpus or DEFAULT
    raw = CORPORA[corpus]() if text is None else read_file(Path(text))
    result = PREPROCESSORS[preprocess](raw)
    if not result.strip():
        source = f"corpus {corpus}" if text is None else f"text {text}"
        raise InputError(f"{source} is empty" + ("" if not raw.strip() else f" after --preprocess {preprocess}"))
    return result
