"""Measurements made up by hand, ordinary and odd ones."""

from typing import Any

import numpy as np

from bptt.cells import CELLS
from bptt.clock import Timing
from bptt.flow._by_lag import Lags
from bptt.flow._cell_path import CellPath
from bptt.flow._compare import Comparison, Row
from bptt.flow._gates import Gates
from bptt.flow._jacobians import Jacobians, Products
from bptt.flow._lags import LagMap
from bptt.flow._lyapunov import Lyapunov
from bptt.flow._shares import Shares
from bptt.flow._spectrum import Spectrum

NAN, INF = float("nan"), float("inf")


def lag_map(rate: float = 0.8, T: int = 40, K: int | None = None, layers: int = 1, stride: int = 1) -> LagMap:
    t, lag = np.arange(0, T, stride), np.arange(T if K is None else K)
    wave = 1 + 0.5 * np.sin(t / 3)
    one = wave[:, None] * rate ** lag[None, :].astype(float)
    one = np.where(t[:, None] >= lag[None, :], one, NAN)
    names = tuple(f"layer {i}" for i in range(layers))
    return LagMap(names, t, lag, np.stack([one] * layers), "h", T, 4)


def lags(*rates: float, K: int = 40, error: float = 0.001, complete: bool = True) -> Lags:
    lag = np.arange(K)
    norm = np.array([0.3 * rate**lag for rate in rates])
    parts = np.cumsum(norm, axis=1) / norm.sum(axis=1, keepdims=True)
    return Lags(
        layers=tuple(f"layer {i}" for i in range(len(rates))),
        lag=lag,
        norm=norm,
        losses=K - lag,
        rate=np.array(rates),
        rate_error=np.full(len(rates), error),
        horizon_90=np.argmax(parts >= 0.9, axis=1),
        horizon_99=np.argmax(parts >= 0.99, axis=1),
        complete=np.full(len(rates), complete),
    )


def lags_of(norm: list[float], rate: float = NAN) -> Lags:
    values = np.array([norm])
    zero = np.zeros(1, dtype=np.int64)
    lag = np.arange(len(norm))
    return Lags(("layer 0",), lag, values, lag + 1, np.array([rate]), np.zeros(1), zero, zero, np.array([False]))


def shares(rate: float = 0.8, bin_edges: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 32, 64, 128)) -> Shares:
    edge = np.array(bin_edges)
    part = rate ** edge[:-1] - rate ** edge[1:]
    total = part.sum()
    bias = (1 - np.cumsum(part) / total).clip(0)
    return Shares(("layer 0",), edge, part[None], (part / total)[None], bias[None], np.array([total]))


def jacobians(size: float = 0.9, T: int = 60, B: int = 4, bound: float | None = 1.3) -> Jacobians:
    t = np.arange(T)
    norm = size * (1 + 0.15 * np.sin(t[:, None] / 4 + np.arange(B)[None, :]))
    return Jacobians("layer 0", t, norm, norm * 0.05, bound)


def products(rate: float = 0.9, K: int = 60, S: int = 16, bound: float | None = 1.1) -> Products:
    n = np.arange(K + 1)
    log = n[:, None] * (np.log(rate) - 0.15 * np.arange(S)[None, :])
    with np.errstate(over="ignore"):
        singular = np.exp(log)
        bounds = None if bound is None else bound ** n.astype(float)
    return Products("layer 0", 0, 0, n, singular, log, bounds, bound, None if bound is None else 1.0)


def spectrum(*radii: float, H: int = 32) -> Spectrum:
    random = np.random.default_rng(3)
    values = []
    for radius in radii:
        angle, size = random.uniform(0, np.pi, H // 2), np.sqrt(random.uniform(0, 1, H // 2))
        half = radius * size / size.max() * np.exp(1j * angle)
        both = np.concatenate([half, half.conj()])
        values.append(both[np.argsort(-np.abs(both))])
    names = {1: ("h",), 3: ("r", "z", "n"), 4: ("i", "f", "g", "o")}[len(radii)]
    size = np.sort(np.abs(values), axis=1)[:, ::-1] * 1.4
    return Spectrum("layer 0", names, np.array(values), size, np.array(radii), size[:, 0], mode_of(names))


def mode_of(names: tuple[str, ...]) -> str:
    return next((mode for mode, cell in CELLS.items() if cell.gate_names == names), "")


def cell_path(forget: float = 0.97, K: int = 60, through_h: float = 1.0) -> CellPath:
    n = np.arange(K + 1)
    path = forget**n
    return CellPath(
        "layer 0",
        0,
        n,
        path,
        path * 0.9**n,
        path * through_h,
        path * through_h * 1.5,
        np.full(8, 1 / 0.03),
        cell="LSTM",
    )


def gates(low: float = 0.02, high: float = 0.1, names: tuple[str, ...] = ("i", "f", "g", "o")) -> Gates:
    random = np.random.default_rng(4)
    ends = [(-1.0, 1.0) if name in "hgn" else (0.0, 1.0) for name in names]
    bin_edges = np.array([np.linspace(a, b, 41) for a, b in ends])
    counts = []
    for i, edge in enumerate(bin_edges):
        middle = random.beta(2 + i, 3, 20000) * (edge[-1] - edge[0]) + edge[0]
        counts.append(np.histogram(middle, edge)[0])
    count = len(names)
    spread = np.linspace(1, 0.3, count)
    middles, cell = np.full(count, 0.5), mode_of(names)
    return Gates("layer 0", names, low * spread, high * spread, middles, bin_edges, np.array(counts), 0.05, cell=cell)


def lyapunov(largest: float = -0.05, error: float = 0.004, n: int = 24, steps: int = 400) -> Lyapunov:
    exponents = largest - 0.03 * np.arange(n)
    t = np.arange(1, steps + 1)[:, None]
    running = exponents + 0.3 * np.cos(t / 7 + np.arange(n)) / np.sqrt(t)
    return Lyapunov("layer 0", exponents, np.full(n, error), running, steps, 50, 8)


def row(policy: str, bias: float, variance: float, seconds: float, **fields: Any) -> Row:
    values = {"bias_error": 0.0, "cosine": 1 - bias, "variance_error": 0.0, "exact": True, "draws": 1, "bytes": None}
    time = Timing(seconds, 0.98 * seconds, 1.02 * seconds, 9)
    return Row(policy=policy, bias=bias, variance=variance, **(values | {"time": time} | fields))


def comparison(**fields: Any) -> Comparison:
    rows = (
        row("full", 0.0, 0.0, 5.1e-3, bytes=3 << 20),
        row("chunked:5", 0.45, 0.0, 2.0e-3, bytes=2 << 20),
        row("chunked:35", 0.06, 0.0, 2.6e-3, bytes=2 << 20),
        row("truncated:20", 0.02, 0.0, 31e-3, bytes=9 << 20),
        row("truncated:20/10", 0.03, 0.0, 8e-3, bytes=4 << 20),
        row(
            "randomized:0.9",
            0.004,
            0.6,
            5.2e-3,
            bytes=3 << 20,
            exact=False,
            draws=200,
            bias_error=0.003,
            variance_error=0.08,
        ),
        row("randomized:0.99", 0.0, 0.05, 5.2e-3, bytes=3 << 20, variance_error=0.008),
    )
    values = {
        "layer": "RNN(8, 32)",
        "T": 100,
        "B": 8,
        "rows": rows,
        "full_norm": 1.0,
        "contraction": 0.9,
        "critical_p": 0.81,
        "own": "full",
    }
    return Comparison(**(values | fields))


def records(count: int = 40, horizon: bool = True) -> list[dict[str, Any]]:
    out = []
    for i in range(1, count + 1):
        loss = 1.6 + 2.2 * np.exp(-i / 9)
        held = loss + 0.004 * i if i % 5 == 0 else None
        record = {
            "step": 50 * i,
            "epoch": 0,
            "steps": 50,
            "loss": loss,
            "perplexity": float(np.exp(loss)),
            "heldout_perplexity": None if held is None else float(np.exp(held)),
            "grad_norm": 0.6 + 1.5 / i,
            "clipped": max(0.0, 0.9 - i / 12),
        }
        if horizon and held is not None:
            record |= {"horizon": 3 + i // 4, "skipped": int(i == 10)}
        out.append(record)
    return out
