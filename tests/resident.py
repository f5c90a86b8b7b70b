"""How much memory a script of its own takes."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

STATUS = Path("/proc/self/status")

needs_status = pytest.mark.skipif(not STATUS.exists(), reason="how much memory a process had is read as Linux tells it")

MEASURE = f"""
def peak():
    lines = open("{STATUS}").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
"""
"""The most MiB in use at a time so far. Not `ru_maxrss`: a process inherits that from the one that has started it, so
that below a large test run a difference of it is always zero."""


def lines_of(script: str, *arguments: object, environment: Mapping[str, str] | None = None) -> list[str]:
    """What a script prints that can call `peak()`."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE + script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | (environment or {}),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
