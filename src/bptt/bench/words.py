"""Numbers as they are shown."""

from __future__ import annotations

__all__ = ["digits", "threads_in_words"]


def digits(value: float) -> str:
    """Three digits, or all of those before the point.

    >>> digits(0.012345), digits(12.345), digits(12345.6)
    ('0.0123', '12.3', '12346')
    """
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def threads_in_words(threads: int) -> str:
    """The number with its noun.

    >>> threads_in_words(1), threads_in_words(2)
    ('1 thread', '2 threads')
    """
    return f"{threads} thread{'s' if threads > 1 else ''}"
