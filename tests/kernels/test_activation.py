"""The kernel's own tanh and sigmoid against the same in more digits: the bounds that csrc/activation.hpp states."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bptt.kernels import _walks, cpu

CODES = {name: cpu.CODES[f"RNN_{name.upper()}"] for name in ("tanh", "relu", "identity", "sigmoid")}

ULPS = {
    "avx512": {"sigmoid": {np.float32: 2.46, np.float64: 2.43}, "tanh": {np.float32: 1.76, np.float64: 3.28}},
    "avx2": {"sigmoid": {np.float32: 2.46, np.float64: 2.43}, "tanh": {np.float32: 2.83, np.float64: 3.28}},
    "portable": {"sigmoid": {np.float32: 2.67, np.float64: 2.64}, "tanh": {np.float32: 3.24, np.float64: 3.50}},
}
"""By tables; by exponentials, with fused multiply-add, and without."""

SMOOTH = ("tanh", "sigmoid")
DTYPES = (np.float32, np.float64)

each_variant = pytest.mark.parametrize("variant", cpu.variants())
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def apply(variant: str, name: str, x: NDArray[Any]) -> NDArray[Any]:
    """f(x), into memory that holds NaN before and a mark behind."""
    place = [v for v, _ in _walks.variants()].index(variant)
    function = _walks.apply_float32 if x.dtype == np.float32 else _walks.apply_float64
    x, out = np.ascontiguousarray(x), np.full(len(x) + 40, np.nan, x.dtype)
    out[len(x) :] = 77
    function(place, CODES[name], len(x), x.ctypes.data, out.ctypes.data)
    assert (out[len(x) :] == 77).all()
    return out[: len(x)]


def exact(name: str, x: NDArray[Any]) -> NDArray[Any]:
    """The same in more digits: float64 for float32, long double for float64."""
    wide = x.astype(np.float64 if x.dtype == np.float32 else np.longdouble)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return np.tanh(wide) if name == "tanh" else 1 / (1 + np.exp(-wide))


def ulps(actual: NDArray[Any], expected: NDArray[Any]) -> NDArray[Any]:
    """The error in units in the last place of the expected number; 0 where a result below the normal ones is zero."""
    rounded = expected.astype(actual.dtype)
    unit = np.spacing(np.abs(rounded)).astype(expected.dtype)
    error = np.abs(actual.astype(expected.dtype) - expected) / unit
    below = np.abs(expected) < np.finfo(actual.dtype).tiny
    return np.where(below & (actual == 0), 0, error).astype(np.float64)


def samples(dtype: Any, count: int) -> NDArray[Any]:
    """Random bits, uniform and log-spaced numbers, and those around multiples of ln2 / 4, where the formula changes."""
    rng = np.random.default_rng(5)
    integers = np.uint32 if dtype == np.float32 else np.uint64
    bits = rng.integers(0, np.iinfo(integers).max, count, dtype=integers, endpoint=True).view(dtype)
    uniform = rng.uniform(-25, 25, count).astype(dtype)
    far = rng.uniform(-800, 800, count // 8).astype(dtype)
    small = (rng.choice([-1.0, 1.0], count) * 2 ** rng.uniform(-40, 3, count)).astype(dtype)
    edges = np.arange(-160, 160) * np.log(2) / 4
    around = (edges[:, None] + np.linspace(-1e-3, 1e-3, 201)).astype(dtype).ravel()
    return np.concatenate([bits[~np.isnan(bits)], uniform, far, small, around])


@pytest.fixture(scope="module")
def references() -> dict[tuple[str, Any], tuple[NDArray[Any], NDArray[Any]]]:
    """(x, f(x) in more digits) of each function and precision."""
    xs = {np.float32: samples(np.float32, 1_000_000), np.float64: samples(np.float64, 200_000)}
    return {(name, dtype): (xs[dtype], exact(name, xs[dtype])) for name in SMOOTH for dtype in DTYPES}


@each_variant
@pytest.mark.parametrize("name", SMOOTH)
@each_dtype
def test_error_is_within_its_bound(variant: str, name: str, dtype: Any, references: Any) -> None:
    if dtype == np.float64 and np.finfo(np.longdouble).eps > 1e-18:
        pytest.skip("long double has no more digits than double on this machine")
    x, expected = references[name, dtype]
    y = apply(variant, name, x)
    errors = ulps(y, expected)
    worst = errors.argmax()
    assert errors[worst] <= ULPS[variant][name][dtype], (x[worst], y[worst], errors[worst])
    assert (np.abs(y) <= 1).all()
    if name == "sigmoid":
        assert (y >= 0).all()


@each_variant
def test_dense_around_zero_and_where_results_become_constant(variant: str) -> None:
    """Consecutive float32 numbers, a quarter of a million at a time."""
    for start in (1e-4, 7.7e-3, 0.06, 0.17, 0.34, 0.52, 1.0, 2.1, 9.0, 9.09, 9.99, 16.6, 29.9, 87.3, 88.5):
        first = np.float32(start).view(np.uint32)
        positive = (first + np.arange(2**16, dtype=np.uint32)).view(np.float32)
        for name in SMOOTH:
            for x in (positive, -positive):
                errors = ulps(apply(variant, name, x), exact(name, x))
                assert errors.max() <= ULPS[variant][name][np.float32]


@each_variant
@each_dtype
def test_exact_values(variant: str, dtype: Any) -> None:
    inf, tiny = np.inf, np.finfo(dtype).smallest_subnormal
    largest, least = np.finfo(dtype).max, np.finfo(dtype).tiny
    x = np.array([0.0, -0.0, inf, -inf, largest, -largest, tiny, -tiny, least, -least], dtype)
    y = apply(variant, "tanh", x)
    np.testing.assert_array_equal(y, np.concatenate([x[:2], np.tile(np.array([1, -1], dtype), 2), x[6:]]))
    np.testing.assert_array_equal(np.signbit(y), np.signbit(x))
    y = apply(variant, "sigmoid", x)
    np.testing.assert_array_equal(y, np.array([0.5, 0.5, 1, 0, 1, 0, *[0.5] * 4], dtype))
    np.testing.assert_array_equal(apply(variant, "relu", x), np.where(x > 0, x, 0))
    np.testing.assert_array_equal(apply(variant, "identity", x), x)


@each_variant
@each_dtype
@pytest.mark.parametrize("name", CODES)
def test_nan_gives_nan(variant: str, dtype: Any, name: str) -> None:
    """At any place of a register, and without touching its neighbours."""
    for n in range(1, 36):
        for place in {0, n // 2, n - 1}:
            x = np.linspace(-2, 2, n, dtype=dtype)
            expected = apply(variant, name, x)
            x[place] = -np.nan if n % 2 else np.nan
            y = apply(variant, name, x)
            assert np.isnan(y[place])
            np.testing.assert_array_equal(np.delete(y, place), np.delete(expected, place))


@each_variant
@each_dtype
@pytest.mark.parametrize("name", CODES)
def test_any_count(variant: str, dtype: Any, name: str) -> None:
    """The result at a place depends on the number there alone; what lies behind is not written to."""
    x = np.random.default_rng(3).standard_normal(70).astype(dtype)
    whole = apply(variant, name, x)
    for n in range(70):
        np.testing.assert_array_equal(apply(variant, name, x[:n]), whole[:n])
        np.testing.assert_array_equal(apply(variant, name, x[n:]), whole[n:])


def test_variants_outside_the_list_are_refused() -> None:
    x = np.zeros(1)
    for place in (-1, len(_walks.variants())):
        with pytest.raises(ValueError, match="variant must be"):
            _walks.apply_float64(place, 0, 1, x.ctypes.data, x.ctypes.data)
