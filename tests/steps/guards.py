"""Guards of steps that can be guarded."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from bptt.steps.guard import Guard

Step = Callable[[Any, Any], tuple[Any, Any]]

WHEN = " when the step was traced"


def guarded(step: Step, *captured: Tensor) -> Guard:
    """A guard of a step that can be guarded, which finds nothing as long as nothing has changed."""
    guard = Guard.of(step, captured)
    assert guard.obstacle is None
    assert [guard.changed() for _ in range(3)] == [None] * 3
    return guard
