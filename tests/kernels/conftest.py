"""The compiled kernel in each of its variants, and the number of threads."""

from collections.abc import Callable, Iterator

import pytest
import torch

from bptt import kernels
from bptt.kernels.cpu import Cpu, variants


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make kernel="cpu" that of one instruction set."""
    return lambda variant: monkeypatch.setitem(kernels.KERNELS, "cpu", Cpu(variant))


@pytest.fixture(params=variants())
def variant(request: pytest.FixtureRequest, use: Callable[[str], None]) -> str:
    """Each instruction set that this machine runs, in use."""
    use(request.param)
    return request.param


@pytest.fixture
def walkers(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Set the number of threads the kernel asks for, while torch's own products stay with one."""
    return lambda count: monkeypatch.setattr(torch, "get_num_threads", lambda: count)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Set the number of threads; what it was comes back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
