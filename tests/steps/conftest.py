"""The interpreter in each of its variants."""

import pytest

from bptt.kernels.cpu import variants
from bptt.kernels.interpreter import Interpreter

KERNELS = {name: Interpreter(name) for name in variants()}


@pytest.fixture(params=variants())
def interpreter(request: pytest.FixtureRequest) -> Interpreter:
    """Each instruction set that this machine runs."""
    return KERNELS[request.param]
