"""The interpreter's functions against the same in more digits: the bounds that csrc/functions.hpp states."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bptt.kernels import _walks, cpu

ULPS = {  # in float32 and float64, of whichever variant is worst
    "exp": (1.05, 1.05),
    "expm1": (1.8, 2.0),
    "log": (0.9, 0.9),
    "log1p": (1.5, 1.5),
    "sin": (2.3, 2.0),
    "cos": (2.3, 2.0),
    "erf": (2.7, 2.2),
    "sqrt": (0.51, 0.51),
    "rsqrt": (1.5, 1.5),
    "floor": (0.0, 0.0),
}

OPERATIONS = _walks.operations()
DTYPES = (np.float32, np.float64)


def apply(variant: str, name: str, x: NDArray[Any]) -> NDArray[Any]:
    """f(x), into memory that holds NaN before and a mark behind."""
    place = [v for v, _ in _walks.variants()].index(variant)
    function = _walks.apply_operation_float32 if x.dtype == np.float32 else _walks.apply_operation_float64
    out = np.full(len(x) + 40, np.nan, x.dtype)
    out[len(x) :] = 77
    at = x.ctypes.data
    function(place, OPERATIONS.index(name), 0, len(x), out.ctypes.data, at, at, at)
    assert (out[len(x) :] == 77).all()
    return out[: len(x)]


def exact(name: str, x: NDArray[Any]) -> NDArray[Any]:
    """The same in more digits: long double."""
    wide = x.astype(np.longdouble)
    with np.errstate(all="ignore"):
        if name == "rsqrt":
            return 1 / np.sqrt(wide)
        if name == "erf":
            return erf(wide)
        return getattr(np, name)(wide)


def erf(x: NDArray[Any]) -> NDArray[Any]:
    """The series by Kummer's transformation, all of whose terms have one sign; 1 beyond 7."""
    size = np.minimum(np.abs(x), 7)
    term, total = size.copy(), size.copy()
    for n in range(1, 200):
        term = term * 2 * size * size / (2 * n + 1)
        total = total + term
    y = total * np.exp(-size * size) * 2 / np.sqrt(np.longdouble("3.14159265358979323846264338327950288"))
    return np.copysign(np.where(np.abs(x) >= 7, np.longdouble(1), y), x)


def ulps(actual: NDArray[Any], expected: NDArray[Any]) -> NDArray[Any]:
    """The error in units in the last place; infinite where one alone is NaN or infinity."""
    with np.errstate(all="ignore"):
        rounded = expected.astype(actual.dtype)
        unit = np.spacing(np.abs(rounded)).astype(expected.dtype)
        error = np.abs(actual.astype(expected.dtype) - expected) / unit
    finite = np.isfinite(rounded) & np.isfinite(actual)
    same = (rounded == actual) | (np.isnan(rounded) & np.isnan(actual))
    return np.where(finite, error, np.where(same, 0, np.inf)).astype(np.float64)


def samples(dtype: Any, name: str) -> NDArray[Any]:
    """Random bits, uniform and log-spaced numbers, and special ones."""
    rng, count = np.random.default_rng(7), 40_000
    integers = np.uint32 if dtype == np.float32 else np.uint64
    bits = rng.integers(0, np.iinfo(integers).max, count, dtype=integers, endpoint=True).view(dtype)
    if name in ("sin", "cos"):  # beyond, they are the C library's
        bits = rng.uniform(-8000, 8000, count).astype(dtype)
    uniform = rng.uniform(-110, 110, count).astype(dtype)
    unit = rng.uniform(-2, 2, count).astype(dtype)
    small = (rng.choice([-1.0, 1.0], count) * 2 ** rng.uniform(-40, 3, count)).astype(dtype)
    far = rng.uniform(-760, 760, count // 4).astype(dtype)
    info = np.finfo(dtype)
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, -1, 1, info.tiny, info.max, -info.max, info.smallest_subnormal]
    return np.concatenate([bits[~np.isnan(bits)], uniform, unit, small, far, np.array(special, dtype)])


@pytest.fixture(scope="module")
def references() -> dict[tuple[str, Any], tuple[NDArray[Any], NDArray[Any]]]:
    """(x, f(x) in more digits) of each function and precision."""
    xs = {(name, dtype): samples(dtype, name) for name in ULPS for dtype in DTYPES}
    return {key: (x, exact(key[0], x)) for key, x in xs.items()}


@pytest.mark.parametrize("variant", cpu.variants())
@pytest.mark.parametrize("name", ULPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_within_its_bound(variant: str, name: str, dtype: Any, references: Any) -> None:
    if dtype == np.float64 and np.finfo(np.longdouble).eps > 1e-18:
        pytest.skip("long double has no more digits than double on this machine")
    x, expected = references[name, dtype]
    y = apply(variant, name, x)
    errors = ulps(y, expected)
    worst = errors.argmax()
    assert errors[worst] <= ULPS[name][dtype == np.float64], (x[worst], y[worst], expected[worst], errors[worst])
    zeros = apply(variant, name, np.array([-0.0, 0.0], dtype))
    assert (np.signbit(zeros) == np.signbit(exact(name, np.array([-0.0, 0.0], dtype)))).all()


@pytest.mark.parametrize("variant", cpu.variants())
@pytest.mark.parametrize("dtype", DTYPES)
def test_waves_far_away(variant: str, dtype: Any) -> None:
    """Up to 1e6 by three parts of pi in float64, then by the C library."""
    rng = np.random.default_rng(3)
    x = np.concatenate([rng.uniform(-1e6, 1e6, 20_000), rng.uniform(-1e9, 1e9, 1000), [1e22]]).astype(dtype)
    for name in ("sin", "cos"):
        wrong = np.abs(apply(variant, name, x) - exact(name, x))
        assert wrong.max() <= 2 * np.finfo(dtype).eps
