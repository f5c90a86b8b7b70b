"""Whether the rows of a step are known to be independent."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .arguments import Arguments
from .compiled import compiled_step
from .compiled_call import reason_to_replay
from .pytrees import Step
from .surroundings import Surroundings

__all__ = ["rows_are_independent"]


def rows_are_independent(step: Step, carry: Any, xs: Any, resets: Tensor | None, kernel: str) -> bool:
    """Whether a trace has shown that row b of what a step returns depends on row b of carry and x alone.

    Of a step that draws random numbers, or captures a tensor with a row for each lane, it has not.

    >>> import torch
    >>> w, h, x = torch.ones(3), torch.zeros(2, 3), torch.zeros(9, 2, 3)
    >>> rows_are_independent(lambda h, x: (h * w + x, h), h, x, None, "auto")
    True
    >>> rows_are_independent(lambda h, x: (h - h.mean(0) + x, h), h, x, None, "auto")
    False
    """
    given = Arguments.of(step, carry, xs, None, resets)
    if reason_to_replay(given, kernel) is not None:
        return False
    entry, _ = compiled_step(given, Surroundings.current(given.devices), one_lane=False)
    traced = entry.traced
    return entry.reason is None and traced is not None and not (traced.draws or any(traced.lanes))
