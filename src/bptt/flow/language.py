"""The language in which measurements speak: English as the code has it, or its translation in a table beside it.

A sentence is a template, English, with its values named: `say("{count} steps", count="3")`. The table has the template
in the other language; what it lacks is said in English, and a test sees to it that it lacks nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.resources import files

__all__ = ["LANGUAGES", "current", "language", "say", "translation"]

LANGUAGES = {"en": "English", "zh": "中文"}
"""What a language is called in itself, by its code (ISO 639-1)."""

_CURRENT: ContextVar[str] = ContextVar("bptt.flow.language", default="en")


@contextmanager
def language(code: str) -> Iterator[None]:
    """Have everything that measurements say inside a `with` block said in "en" (English) or "zh" (Chinese).

    Sentences, verdicts, the titles and labels of pictures, and the report; of a survey also the setting, in whose words
    it is made, so that one block holds both `survey` and what shows it. Error messages, names and numbers stay as they
    are. A context variable holds the choice: another thread keeps its own.

    Raises ValueError for another code.

    >>> import bptt
    >>> found = bptt.flow.spectrum(bptt.nn.RNN(2, 4))
    >>> with bptt.flow.language("zh"):
    ...     bptt.flow.conclusion(found)[:5]
    '特征值的模'
    """
    if code not in LANGUAGES:
        raise ValueError(f"code must be one of {', '.join(map(repr, LANGUAGES))}: got {code!r}")
    before = _CURRENT.set(code)
    try:
        yield
    finally:
        _CURRENT.reset(before)


def current() -> str:
    """The code of the language that is spoken here."""
    return _CURRENT.get()


def say(template: str, **values: object) -> str:
    """The template in the current language, with these values.

    >>> say("{count} steps", count=3)
    '3 steps'
    """
    code = _CURRENT.get()
    text = template if code == "en" else translation(code).get(template, template)
    return text.format(**values)


@cache
def translation(code: str) -> Mapping[str, str]:
    """Every template in another language, by the English one."""
    table: Mapping[str, str] = json.loads(files(__package__).joinpath(f"{code}.json").read_text(encoding="utf-8"))
    return table
