"""Forking a process that has threads, which is what is tested."""

import multiprocessing
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

PATIENCE = 300
"""Seconds after which something hangs."""

needs_fork = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork"
)


@contextmanager
def forking() -> Iterator[None]:
    """Without the warnings that Python, and JAX where some other test has loaded it, give at a fork."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, RuntimeWarning):
            warnings.filterwarnings("ignore", category=category, message=".*fork")
        yield
