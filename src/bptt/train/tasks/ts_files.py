"""Files of the `.ts` form, in which aeon, sktime and the UCR and UEA archives keep series with their classes.

Lines that begin with `#` or `%` are remarks, `@name value` a header that ends at `@data`. Then each line is a case: its
dimensions, divided by colons, each with its values, divided by commas; after the last colon stands the class. A value
that is missing is `?` or `NaN`. With `@timeStamps true` a value is a pair, (time, value).

Read here rather than by aeon, whose reader makes labels lower-case and needs pandas, scikit-learn and numba:
https://www.aeon-toolkit.org/en/stable/api_reference/file_specifications/ts.html
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..corpus import read_file
from ..errors import InputError
from ..numerals import number_of
from .sequences import Floats, Sequences

__all__ = ["read_ts"]

PAIR = re.compile(r"\(\s*([^()]*?)\s*,\s*([^(),]*?)\s*\)")
"""A time, which may hold commas of its own, and a value."""


@dataclass
class _Header:
    """What stands before the data, as far as reading needs it. classes: None where cases have none."""

    pairs: bool = False
    dimensions: int | None = None
    classes: tuple[str, ...] | None = field(default=None)


def read_ts(path: Path, labelled: bool = False) -> Sequences:
    """The sequences of a `.ts` file, with labels where it has classes. Raises InputError that names the line.

    labelled: whether it must have classes.
    """
    lines = read_file(path, "sequences").splitlines()
    header, first = _header(lines, str(path))
    if labelled and header.classes is None:
        raise InputError(f"{path} has no labels: its header must have a line @classLabel true, with the classes")
    values: list[Floats] = []
    labels: list[str] = []
    for number, line in enumerate(lines[first:], start=first + 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        parts = _dimensions(line, header.pairs)
        if header.classes is not None:
            if len(parts) < 2:
                raise InputError(f"{where} must have values, a colon and a class: got {line.strip()[:40]!r}")
            labels.append(parts.pop().strip())
            if labels[-1] not in header.classes:
                raise InputError(f"{where} has the class {labels[-1]!r}, which @classLabel does not name")
        wanted = header.dimensions if header.dimensions is not None else values[0].shape[1] if values else len(parts)
        if len(parts) != wanted:
            raise InputError(f"{where} must have {wanted} dimensions: got {len(parts)}")
        values.append(_case(parts, header.pairs, where))
    if not values:
        raise InputError(f"{path} is empty: nothing stands after @data")
    given = labels if header.classes is not None else None
    return Sequences.of(np.concatenate(values), [len(case) for case in values], labels=given, source=str(path))


def _header(lines: list[str], source: str) -> tuple[_Header, int]:
    """What it says, and the index of the line after @data."""
    header = _Header()
    for index, line in enumerate(lines):
        words = line.split()
        if not words or not words[0].startswith("@"):
            if words and words[0][0] not in "#%":
                raise InputError(f"{source}, line {index + 1} must be a remark, a header or @data: got {line[:40]!r}")
            continue
        name, rest = words[0].lower(), words[1:]
        true = bool(rest) and rest[0].lower() == "true"
        match name:
            case "@data":
                return header, index + 1
            case "@timestamps":
                header.pairs = true
            case "@dimensions" | "@dimension":
                if len(rest) != 1 or not rest[0].isdecimal():
                    raise InputError(f"{source}: @dimensions must be a whole number: got {' '.join(rest)!r}")
                header.dimensions = int(rest[0])
            case "@targetlabel" if true:
                raise InputError(f"{source} has a number to predict (@targetLabel), not a class")
            case "@classlabel" if true:
                header.classes = tuple(rest[1:])
    raise InputError(f"{source} is not a .ts file, or is cut short: it has no @data")


def _dimensions(line: str, pairs: bool) -> list[str]:
    """The dimensions of a case, and its class: what colons divide, but for those in times."""
    return re.split(r":(?![^(]*\))", line) if pairs else line.split(":")


def _case(parts: list[str], pairs: bool, where: str) -> Floats:
    """The values `[n, I]` of a case's dimensions."""
    texts, times = [], []
    for part in parts:
        if pairs:
            found = PAIR.findall(part)
            if PAIR.sub("", part).strip(" ,\t"):
                raise InputError(f"{where} must have pairs (time, value): got {part.strip()[:40]!r}")
            times.append([time for time, _ in found])
            texts.append([value for _, value in found])
        else:
            texts.append([value.strip() for value in part.split(",")] if part.strip() else [])
    sizes = [len(text) for text in texts]
    if len(set(sizes)) > 1:
        raise InputError(f"{where} must have as many values in every dimension: got {min(sizes)} and {max(sizes)}")
    if any(time != times[0] for time in times):
        raise InputError(f"{where} must have the same times in every dimension")
    case = np.empty((sizes[0], len(texts)))
    for i, text in enumerate(texts):
        for step, value in enumerate(text):
            number = number_of(value)
            if number is None:
                raise InputError(f"{where}, dimension {i}, must be finite numbers: step {step} is {value!r}")
            case[step, i] = number
    return case
