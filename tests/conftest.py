"""What every test shares: one thread, fixed seeds, one table of tolerances."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from bptt.clock import Product

settings.register_profile(
    "bptt",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],  # how slow depends on who else runs
    database=None,
    print_blob=False,
)
settings.load_profile("bptt")

RELATIVE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest error allowed, as a share of the largest entry of the expected tensor."""


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The CPU alone: for devices that are not there torch writes down the stack, longer than many a test takes."""
    torch.default_generator.manual_seed(20)


@pytest.fixture(autouse=True)
def undisturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed is timed in few samples, and no guard sees who else runs; a test of either moves its own clock."""
    monkeypatch.setattr("bptt.flow._compare.SECONDS", 0.0)
    monkeypatch.setattr("bptt.clock.sleep", lambda seconds: None)
    monkeypatch.setattr("bptt.clock.product", lambda order: Product(1e9, float(torch.get_num_threads())))


@pytest.fixture(scope="session")
def agree() -> Callable[..., None]:
    """Compare tensors, or dicts, tuples and lists of them, at the tolerance of the less precise dtype."""

    def compare(actual: Any, expected: Any, where: str = "", *, tolerance: float | None = None) -> None:
        if isinstance(expected, Mapping):
            assert list(actual) == list(expected), where
            for key in expected:
                compare(actual[key], expected[key], f"{where}.{key}", tolerance=tolerance)
        elif isinstance(expected, tuple | list):
            assert isinstance(actual, tuple | list), where
            assert len(actual) == len(expected), where
            for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
                compare(a, e, f"{where}[{i}]", tolerance=tolerance)
        elif isinstance(expected, Tensor):
            relative = max(RELATIVE[actual.dtype], RELATIVE[expected.dtype]) if tolerance is None else tolerance
            largest = expected.detach().abs().max().item() if expected.numel() else 0.0
            torch.testing.assert_close(
                actual,
                expected,
                rtol=relative,
                atol=relative * largest,
                check_dtype=False,
                msg=lambda text: f"{where}: {text}",
            )
        else:
            assert actual is expected, f"{where}: {actual!r} is not {expected!r}"

    return compare
