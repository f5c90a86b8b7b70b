"""The text forms of policies, for configurations."""

from __future__ import annotations

import functools
import re

from .policy import Policy
from .randomized import Randomized
from .windows import Adaptive, Chunked, Full, Truncated

__all__ = ["COMPARED", "parse"]

COMPARED = (
    "full",
    "chunked:5",
    "chunked:20",
    "truncated:5",
    "truncated:20",
    "truncated:20/5",
    "randomized:0.5",
    "randomized:0.9",
    "randomized:mean=20,tail=4",
)
"""One or two settings of each kind: what a comparison takes where nothing else is asked for."""

_FORMS = (
    "full, chunked:K, truncated:WINDOW, truncated:WINDOW/EVERY, randomized:P, randomized:P1,P2,..., "
    "randomized:mean=STEPS,tail=EXPONENT, adaptive:BIAS,max=WINDOW, adaptive:BIAS,max=WINDOW,every=EVERY"
)
_NUMBER = r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
_INTEGER = r"([-+]?[0-9]+)"


def parse(text: str | Policy) -> Policy:
    """Read the policy that a text form names: the inverse of `str(policy)`. A policy is returned as it is.

    Raises ValueError for text that names no policy, TypeError for anything else.

    >>> parse("truncated:20/5")
    Truncated(window=20, every=5)
    >>> parse("randomized:0.9")
    Randomized(p=0.9)
    """
    if isinstance(text, Policy):
        return text
    if not isinstance(text, str):
        raise TypeError(f"gradient must be a policy or its text form ({_FORMS}): got {text!r} ({type(text).__name__})")
    form = text.strip().lower()
    fixed = _fixed(form)
    if fixed is not None:
        return fixed
    if match := re.fullmatch(rf"randomized:({_NUMBER}(?:,{_NUMBER})*)", form):
        numbers = tuple(float(number) for number in match[1].split(","))
        return Randomized(numbers[0] if len(numbers) == 1 else numbers)
    if match := re.fullmatch(rf"randomized:mean=({_NUMBER})(?:,tail=({_NUMBER}))?", form):
        return Randomized.polynomial(float(match[1]), float(match[2] or 4))
    if match := re.fullmatch(
        rf"adaptive:({_NUMBER}),max={_INTEGER}(?:,every={_INTEGER})?(?:,window={_INTEGER})?", form
    ):
        window = None if match[4] is None else int(match[4])
        return Adaptive(float(match[1]), int(match[2]), every=int(match[3] or 1), window=window)
    raise ValueError(f"gradient must be one of {_FORMS}: got {text!r}")


@functools.lru_cache(maxsize=256)  # read in every call of `scan`
def _fixed(form: str) -> Policy | None:
    """The policy of a form that says all of it: one object for every reader, which nobody can change."""
    if form == "full":
        return Full()
    if match := re.fullmatch(r"chunked:([-+]?[0-9]+)", form):
        return Chunked(int(match[1]))
    if match := re.fullmatch(r"truncated:([-+]?[0-9]+)(?:/([-+]?[0-9]+))?", form):
        return Truncated(int(match[1]), every=int(match[2] or 1))
    return None
