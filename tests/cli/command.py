"""The command line, run in this process."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from bptt.cli import main


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str


def bptt(capsys: pytest.CaptureFixture[str], *arguments: object) -> Result:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert isinstance(exit_.value.code, int)
    return Result(exit_.value.code, captured.out, captured.err)


def error_of(result: Result) -> str:
    """The one line that a command which could not begin prints, exit status 2."""
    assert result.status == 2, result
    lines = result.err.splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith("bptt: error: ")
    return lines[0].removeprefix("bptt: error: ")
