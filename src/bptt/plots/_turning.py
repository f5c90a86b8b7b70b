"""An animation: powers of a matrix turn vectors toward its dominant eigenvector."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.animation import PillowWriter
from matplotlib.axes import Axes

from ..equations.bounds import power_directions
from ..flow.wording import number
from .style import COLOURS, GREY, Picture, styled

__all__ = ["turning"]


@styled
def turning(W: npt.ArrayLike, v: npt.ArrayLike, steps: int, path: str | Path, *, per_second: int = 2) -> Path:
    """Write a GIF of v, W v, W^2 v, ..., each at length 1, with the line of the dominant eigenvector: steps + 1 frames.

    W: `[2, 2]`. v: `[2]`, or several vectors `[N, 2]`. path: where the GIF goes; it is returned. per_second: frames.
    A negative dominant eigenvalue flips the vectors at each step; a complex pair turns them for ever: (8.6).

    Raises ValueError for other shapes, steps < 1, and a vector that is 0 or that W maps to 0.

    >>> import tempfile, bptt.plots
    >>> with tempfile.TemporaryDirectory() as place:
    ...     bptt.plots.turning([[1, 0.5], [0.5, 1]], [1, -0.5], 4, place + "/turning.gif").stat().st_size > 1000
    True
    """
    matrix, vectors = np.asarray(W, dtype=np.float64), np.atleast_2d(np.asarray(v, dtype=np.float64))
    if matrix.shape != (2, 2):
        raise ValueError(f"W must have the shape [2, 2], to be drawn in a plane: got {list(matrix.shape)}")
    if vectors.ndim != 2 or vectors.shape[1] != 2:
        raise ValueError(f"v must have the shape [2] or [N, 2]: got {list(np.shape(v))}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1: got {steps}")
    with np.errstate(divide="ignore", invalid="ignore"):
        turned = np.array([power_directions(matrix, vector, steps) for vector in vectors])
    if not np.all(np.isfinite(turned)):
        raise ValueError(f"v must hold vectors that powers of W do not map to 0: got {vectors.tolist()}")
    target = Path(path)
    figure = Picture(figsize=(5.6, 5.8), layout="constrained")
    ax = figure.add_subplot()
    writer = PillowWriter(fps=per_second)
    with writer.saving(figure, str(target), dpi=90):
        for n in range(steps + 1):
            ax.clear()
            _frame(ax, matrix, turned, n)
            writer.grab_frame()
    return target


def _frame(ax: Axes, W: npt.NDArray[np.float64], turned: npt.NDArray[np.float64], n: int) -> None:
    """The vectors after n products, the earlier ones pale behind them."""
    angle = np.linspace(0, 2 * np.pi, 181)
    ax.plot(np.cos(angle), np.sin(angle), color=GREY, linewidth=0.8)
    dominant = _dominant(W)
    if dominant is not None:
        ax.axline((0, 0), tuple(dominant), color=GREY, linestyle="--", linewidth=1.6, label="dominant eigenvector")
        ax.legend(loc="lower right", frameon=True, edgecolor="none")
    for i, path in enumerate(turned):
        colour = COLOURS[i % len(COLOURS)]
        for k in range(n + 1):
            ax.annotate(
                "",
                xy=tuple(path[k]),
                xytext=(0, 0),
                arrowprops={
                    "arrowstyle": "-|>",
                    "color": colour,
                    "linewidth": 2.4 if k == n else 0.9,
                    "alpha": 1.0 if k == n else 0.25,
                    "shrinkA": 0,
                    "shrinkB": 0,
                },
            )
    ax.set_aspect("equal")
    ax.set_xlim(-1.15, 1.15)
    ax.set_ylim(-1.15, 1.15)
    ax.set_xlabel("first coordinate")
    ax.set_ylabel("second coordinate")
    ax.set_title(_conclusion(W, turned[:, n], dominant, n))


def _dominant(W: npt.NDArray[np.float64]) -> npt.NDArray[np.float64] | None:
    """The eigenvector of the one eigenvalue that is largest in magnitude, where there is one."""
    values, vectors = np.linalg.eig(W)
    size = np.abs(values)
    if np.isclose(size[0], size[1], rtol=1e-9):
        return None
    direction: npt.NDArray[np.float64] = vectors[:, int(np.argmax(size))].real
    return direction


def _conclusion(
    W: npt.NDArray[np.float64], now: npt.NDArray[np.float64], dominant: npt.NDArray[np.float64] | None, n: int
) -> str:
    """How far the vectors still are from the line they turn to."""
    values = sorted(np.linalg.eigvals(W), key=abs, reverse=True)
    if dominant is None:
        pair = "a complex pair: they turn for ever" if abs(values[0].imag) > 0 else "of the same size: none dominates"
        return f"After {n} products with W\neigenvalues {pair}"
    cosine = np.clip(np.abs(now @ dominant) / np.linalg.norm(dominant), 0, 1)
    angle = float(np.degrees(np.arccos(cosine)).max())
    sizes = ", ".join(number(float(value.real)) for value in values)
    return f"After {n} products with W (eigenvalues {sizes}):\nat most {angle:.1f}° from the dominant eigenvector"
