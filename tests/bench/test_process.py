"""A measurement in a process of its own."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import closing

import pytest

from bptt.bench import Case, Selection, measured
from bptt.bench.process import THREADS, _inherited

pytestmark = pytest.mark.slow


def test_a_row_comes_back():
    selection = Selection(("layers",), ("rnn",), ((5, 2, 3, 4),), ("torch.nn",), seconds=0.0, least=2)
    with closing(measured(selection, 1)) as measurement:
        [row] = measurement
    assert (row.case, row.threads, row.wrong) == (Case("rnn", 5, 2, 3, 4), 1, [])
    assert sorted(row.times) == ["bptt", "torch.nn"]


class Deadly:
    """Ends the process that reads it."""

    def __reduce__(self):
        return os._exit, (3,)


def test_a_process_that_dies_is_reported():
    with pytest.raises(RuntimeError, match="the measuring process died, exit status 3"):
        next(measured(Selection(tables=Deadly()), 1))


def test_what_the_process_finds_is_put_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(THREADS[0], "7")
    monkeypatch.delenv(THREADS[1], raising=False)

    def state() -> tuple[object, ...]:
        held = os.sched_getaffinity(0) if sys.platform == "linux" else set()
        return [os.environ.get(name) for name in THREADS], held, signal.getsignal(signal.SIGINT)

    before = state()
    with _inherited(1):
        environment, held, handler = state()
        assert environment == ["1", "1"]
        assert sys.platform != "linux" or len(held) == 1
        assert handler is signal.SIG_IGN
    assert state() == before
