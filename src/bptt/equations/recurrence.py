"""Chapter 1, second half: any recurrence h_t = f(x_t, h_{t-1}, w), and its adjoint.

Legend: T steps, B lanes, I inputs, S numbers in a state, P numbers in an output (the first P of a state).
One lane is one column vector, so that every line reads like its formula.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np

from .chain import Array

STEP = 1e-100
"""Size of a complex step: no difference is taken, so no digits are lost however small it is."""


class Cell(Protocol):
    """One lane of a recurrence; a frozen dataclass whose array fields are its weights: (1.6)."""

    @property
    def state_size(self) -> int:
        """S."""
        ...

    @property
    def output_size(self) -> int:
        """P: the output y_t is the first P numbers of the state."""
        ...

    def step(self, x: Array, s: Array) -> tuple[Array, Any]:
        """f: (state of step t `[S]`, what the adjoint needs) from x_t `[I]` and the state before `[S]`."""
        ...

    def step_adjoint(self, values: Any, lam: Array) -> tuple[Array, Array, dict[str, Array]]:
        """((df/dx)' lam `[I]`, J' lam `[S]`, b' lam for each weight in that weight's shape)."""
        ...


@dataclass(frozen=True)
class AnyStep:
    """The cell of any analytic f(x, s, w), differentiated by complex steps: (1.6), (1.19).

    >>> cell = AnyStep(lambda x, s, w: np.sin(w * s + x), w=np.array([0.5]), state_size=1)
    >>> cell.step(np.array([0.0]), np.array([0.0]))[0].tolist()
    [0.0]
    """

    f: Callable[[Array, Array, Array], Array]
    w: Array
    state_size: int

    @property
    def output_size(self) -> int:
        return self.state_size

    def step(self, x: Array, s: Array) -> tuple[Array, Any]:
        return self.f(x, s, self.w), (x, s)

    def step_adjoint(self, values: Any, lam: Array) -> tuple[Array, Array, dict[str, Array]]:
        K, J, b = partials(self, *values)
        return K.T @ lam, J.T @ lam, {name: np.tensordot(lam, part, 1) for name, part in b.items()}


def weights(cell: Any) -> dict[str, Array]:
    """The weights of a cell by name."""
    named = {field.name: getattr(cell, field.name) for field in fields(cell)}
    return {name: value for name, value in named.items() if isinstance(value, np.ndarray)}


def partials(cell: Any, x: Array, s: Array) -> tuple[Array, Array, dict[str, Array]]:
    """The partials of one step, each computed once, by complex steps through `cell.step` alone: (1.19).

    Exact to rounding and independent of `cell.step_adjoint`. Source: Squire and Trapp 1998, "Using complex variables to
    estimate derivatives of real functions", SIAM Review 40(1).

    Returns (df/dx_t `[S, I]`, J_t = df/dh_{t-1} `[S, S]`, b_t = df/dw: for each weight `[S, *its shape]`).
    """

    def derivative(at: Array, f: Callable[[Array], Array]) -> Array:
        columns = []
        for index in np.ndindex(at.shape):
            stepped = at.astype(complex)
            stepped[index] += 1j * STEP
            columns.append(f(stepped).imag / STEP)
        return np.array(columns).T.reshape(-1, *at.shape)

    K = derivative(x, lambda z: cell.step(z, s)[0])
    J = derivative(s, lambda z: cell.step(x, z)[0])
    b = {
        name: derivative(value, lambda z, name=name: replace(cell, **{name: z}).step(x, s)[0])  # type: ignore[misc]  # a dataclass
        for name, value in weights(cell).items()
    }
    return K, J, b


def output_gradients(g: Callable[[Array, Array], Array], h: Array, v: Array, dl_do: Array) -> tuple[Array, Array]:
    """dL/dv and the local errors of outputs o_t = g(h_t, v), g analytic: (1.7), (1.15).

    h: `[T, H]`. v: any shape. dl_do: `[T, q]`, dL/do_t (a mean over steps has its 1/T in here).
    Returns (dL/dv in v's shape, e `[T, H]`).
    """
    dv, e = np.zeros_like(v), np.zeros_like(h)
    for t in range(len(h)):
        for index in np.ndindex(v.shape):
            stepped = v.astype(complex)
            stepped[index] += 1j * STEP
            dv[index] += dl_do[t] @ g(h[t], stepped).imag / STEP
        for j in range(h.shape[1]):
            moved = h[t].astype(complex)
            moved[j] += 1j * STEP
            e[t, j] = dl_do[t] @ g(moved, v).imag / STEP
    return dv, e


def run(cell: Cell, x: Array, s_0: Array, resets: Array | None = None) -> tuple[Array, list[list[Any]]]:
    """Stage 1, forward: (1.6), and (6.6) where there are resets.

    x: `[T, B, I]`. s_0: `[B, S]`. resets: bool `[T, B]`, the state is zeroed before that step.
    Returns (states `[T, B, S]`, tapes by step and lane).
    """
    T, B, _ = x.shape
    states: list[list[Array]] = []
    tapes: list[list[Any]] = []
    for t in range(T):
        states.append([])
        tapes.append([])
        for b in range(B):
            before = s_0[b] if t == 0 else states[t - 1][b]
            if resets is not None and resets[t, b]:
                before = np.zeros_like(before)
            after, values = cell.step(x[t, b], before)
            states[t].append(after)
            tapes[t].append(values)
    return np.array(states).reshape(T, B, cell.state_size), tapes


def local_error(cell: Cell, dy: Array, ds_T: Array) -> Array:
    """Stage 2: e_t `[T, B, S]` from cotangents of the outputs `[T, B, P]` and of the final state `[B, S]`: (1.15).

    The final state's cotangent is part of the last step's loss.
    """
    T, B, P = dy.shape
    e = np.zeros((T, B, cell.state_size))
    e[:, :, :P] = dy
    e[T - 1] += ds_T
    return e


def adjoint(cell: Cell, x: Array, s_0: Array, e: Array) -> dict[str, Array]:
    """Stages 3 and 4, the full gradient: (1.16), (1.17), (1.18).

    x: `[T, B, I]`. s_0: `[B, S]`. e: `[T, B, S]`.
    Returns "lambda" `[T, B, S]`, "x" `[T, B, I]`, "s_0" `[B, S]`, and each weight's gradient by its name.
    """
    T, B, _ = x.shape
    _, tapes = run(cell, x, s_0)
    lam, dx, dw = np.zeros_like(e), np.zeros_like(x), {name: np.zeros_like(w) for name, w in weights(cell).items()}
    carried = np.zeros_like(s_0)
    for t in range(T - 1, -1, -1):
        for b in range(B):
            lam[t, b] = e[t, b] + carried[b]  # (1.16)
            dx[t, b], carried[b], part = cell.step_adjoint(tapes[t][b], lam[t, b])  # (1.18)
            for name in dw:
                dw[name] += part[name]  # (1.17)
    return {"lambda": lam, "x": dx, "s_0": carried, **dw}
