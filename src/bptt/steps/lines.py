"""The line of the user's code that an operation, or an error, comes from."""

from __future__ import annotations

import sys
from pathlib import Path
from traceback import walk_tb
from types import FrameType

import torch

__all__ = ["current_line", "raised_at"]

_OWN = (str(Path(torch.__file__).parent), str(Path(__file__).parent.parent))

_CALLS = {(str(Path(__file__).with_name("trace.py")), name) for name in ("_record", "_with_gradients")}
"""The functions that call a step, and ask for its gradient."""


def current_line() -> str | None:
    """The line of the user's code that runs now."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_own(frame.f_code.co_filename):
        # Beyond it stands who asked for the trace: the operations of a gradient are no line's of the step.
        frame = None if (frame.f_code.co_filename, frame.f_code.co_name) in _CALLS else frame.f_back
    return None if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def raised_at(error: BaseException) -> str:
    """The last line of the user's code on an error's way, to end a sentence with."""
    lines = [(f.f_code.co_filename, n) for f, n in walk_tb(error.__traceback__) if not _is_own(f.f_code.co_filename)]
    return f", at {Path(lines[-1][0]).name}:{lines[-1][1]}" if lines else ""


def _is_own(name: str) -> bool:
    return name.startswith(_OWN)
