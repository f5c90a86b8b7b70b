"""What a file is by its first bytes: heard of before it is read as text."""

from __future__ import annotations

from pathlib import Path

from .errors import InputError

__all__ = ["check_text"]

PACKED = "unpack it first"
FORMATS = {
    b"\x1f\x8b": ("compressed by gzip", PACKED),
    b"BZh": ("compressed by bzip2", PACKED),
    b"\xfd7zXZ": ("compressed by xz", PACKED),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", PACKED),
    b"PK\x03\x04": ("a ZIP archive, as .xlsx and .npz files are", "give a file of text"),
    b"PAR1": ("Parquet", "name it .parquet"),
    b"\x93NUMPY": ("an array of NumPy's", "name it .npy"),
    b"\xff\xfe": ("UTF-16", "save it as UTF-8"),
    b"\xfe\xff": ("UTF-16", "save it as UTF-8"),
}
"""The first bytes of files that are not UTF-8, what they are, and what to do."""


def check_text(begins: bytes, path: Path, what: str) -> None:
    """Raise InputError for a file of a known form that is no text. begins: its first bytes. what: it is to be."""
    for magic, (form, advice) in FORMATS.items():
        if begins.startswith(magic):
            raise InputError(f"{what} {path} is not UTF-8: it is {form}; {advice}")
