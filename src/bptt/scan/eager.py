"""A decorator for functions that a compiler is to call without tracing them, or anything that they call."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, ParamSpec, TypeVar

import torch

__all__ = ["kept_eager"]

_P = ParamSpec("_P")
_R = TypeVar("_R")


def kept_eager(reason: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """`torch.compiler.disable` without its costs: the compiler loaded at import, and a frame of its own in every call.

    A compiler that meets the function ends its graph there, once, and begins another one after it. Otherwise it would
    trace the steps as plain Python, and again for each new closure, up to its limit of recompilations.
    """

    def keep(function: Callable[_P, _R]) -> Callable[_P, _R]:
        try:
            from torch._C._dynamo.eval_frame import (  # what torch.compiler.disable itself rests on
                _FrameAction,
                _FrameExecStrategy,
                set_code_exec_strategy,
            )
        except ImportError:  # another version of torch
            return torch.compiler.disable(function, reason=reason)
        assert isinstance(function, FunctionType)
        set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
        marked: Any = function
        marked._torchdynamo_disable, marked._torchdynamo_disable_msg = True, reason
        marked._torchdynamo_disable_recursive = True
        return function

    return keep
