"""The cells' papers in NumPy, one row and one unit at a time, in float64: what the modules are judged by.

Every function takes a cell, for its numbers, its parameters by name, x [I] and the states [H], and returns (output,
states) of the step.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray
Parameters = dict[str, Array]
Result = tuple[Array, tuple[Array, ...]]
Formula = Callable[[Any, Parameters, Array, tuple[Array, ...]], Result]


def sigmoid(a: float) -> float:
    return 1 / (1 + math.exp(-a))


def entry(p: Parameters, name: str, j: int) -> float:
    return float(p[name][j]) if name in p else 0.0


def product(W: Array, v: Array, j: int) -> float:
    """Entry j of W v."""
    return sum(float(W[j, k] * v[k]) for k in range(len(v)))


def rectifier(name: str) -> Callable[[float], float]:
    return {
        "relu": lambda a: max(a, 0.0),
        "tanh": math.tanh,
        "sigmoid": sigmoid,
        "softplus": lambda a: math.log(1 + math.exp(a)),
    }[name]


def normalised(z: Array, gain: Array, eps: float) -> Array:
    mean = sum(z) / len(z)
    variance = sum((a - mean) ** 2 for a in z) / len(z)
    return np.array([(a - mean) / math.sqrt(variance + eps) * g for a, g in zip(z, gain, strict=True)])


def layer_norm_lstm(cell: Any, p: Parameters, x: Array, states: tuple[Array, ...]) -> Result:
    h, c = states
    H = len(h)
    from_h = np.array([product(p["weight_hh"], h, j) for j in range(4 * H)])
    from_x = np.array([product(p["weight_ih"], x, j) for j in range(4 * H)])
    gates = normalised(from_h, p["gain_hh"], cell.eps) + normalised(from_x, p["gain_ih"], cell.eps)
    gates = [gates[j] + entry(p, "bias", j) for j in range(4 * H)]
    i, f, g, o = (gates[k * H : (k + 1) * H] for k in range(4))
    c = np.array([sigmoid(f[j]) * c[j] + sigmoid(i[j]) * math.tanh(g[j]) for j in range(H)])
    norm = normalised(c, p["gain_c"], cell.eps)
    h = np.array([sigmoid(o[j]) * math.tanh(norm[j] + entry(p, "bias_c", j)) for j in range(H)])
    return h, (h, c)


def leaky_rnn(cell: Any, p: Parameters, x: Array, states: tuple[Array, ...]) -> Result:
    (u,) = states
    H, f, alpha = len(u), rectifier(cell.nonlinearity), cell.dt / cell.tau
    W = p["weight_hh"].copy()
    if cell.excitatory is not None:
        for j in range(H):
            W[:, j] = abs(W[:, j]) * (1 if j < round(cell.excitatory * H) else -1)
    if "allowed" in p:
        W[p["allowed"] == 0] = 0
    r = np.array([f(a) for a in u])
    drive = [product(W, r, j) + product(p["weight_ih"], x, j) + entry(p, "bias", j) for j in range(H)]
    u = np.array([u[j] + alpha * (drive[j] - u[j]) for j in range(H)])
    return np.array([f(a) for a in u]), (u,)


def lif(cell: Any, p: Parameters, x: Array, states: tuple[Array, ...]) -> Result:
    v, i = states
    H, alpha, beta = len(v), math.exp(-cell.dt / cell.tau_syn), math.exp(-cell.dt / cell.tau_mem)
    s = np.array([1.0 if a > cell.threshold else 0.0 for a in v])
    new_v, new_i = np.zeros(H), np.zeros(H)
    for j in range(H):
        new_i[j] = alpha * i[j] + product(p["weight_ih"], x, j) + entry(p, "bias", j)
        if cell.recurrent:
            new_i[j] += product(p["weight_hh"], s, j)
        new_v[j] = beta * v[j] + i[j] - cell.threshold * s[j]
    return np.array([1.0 if a > cell.threshold else 0.0 for a in new_v]), (new_v, new_i)


def alif(cell: Any, p: Parameters, x: Array, states: tuple[Array, ...]) -> Result:
    v, a = states
    H, alpha, rho = len(v), math.exp(-cell.dt / cell.tau_m), math.exp(-cell.dt / cell.tau_a)
    B = [cell.threshold + cell.beta * a[j] for j in range(H)]
    s = np.array([1.0 if v[j] > B[j] else 0.0 for j in range(H)])
    new_v, new_a = np.zeros(H), np.zeros(H)
    for j in range(H):
        current = product(p["weight_ih"], x, j) + entry(p, "bias", j)
        if cell.recurrent:
            current += product(p["weight_hh"], s, j)
        new_a[j] = rho * a[j] + (1 - rho) * s[j]
        new_v[j] = alpha * v[j] + (1 - alpha) * current - B[j] * s[j]
    new_B = [cell.threshold + cell.beta * new_a[j] for j in range(H)]
    return np.array([1.0 if new_v[j] > new_B[j] else 0.0 for j in range(H)]), (new_v, new_a)


def slstm(cell: Any, p: Parameters, x: Array, states: tuple[Array, ...]) -> Result:
    h, c, n, m = states
    H = len(h)
    gates = [product(p["weight_ih"], x, j) + product(p["weight_hh"], h, j) + entry(p, "bias", j) for j in range(4 * H)]
    new = [np.zeros(H) for _ in range(4)]
    for j in range(H):
        i, f, z, o = (gates[k * H + j] for k in range(4))
        log_f = f if cell.forget == "exp" else math.log(sigmoid(f))
        new[3][j] = max(log_f + m[j], i)
        keep, write = math.exp(log_f + m[j] - new[3][j]), math.exp(i - new[3][j])
        new[1][j] = keep * c[j] + write * math.tanh(z)
        new[2][j] = keep * n[j] + write
        new[0][j] = sigmoid(o) * new[1][j] / new[2][j]
    return new[0], tuple(new)


def mgu(cell: Any, p: Parameters, x: Array, states: tuple[Array, ...]) -> Result:
    (h,) = states
    H, W, U = len(h), p["weight_ih"], p["weight_hh"]
    f = np.array([sigmoid(product(W, x, j) + product(U, h, j) + entry(p, "bias", j)) for j in range(H)])
    n = [math.tanh(product(W, x, H + j) + product(U, f * h, H + j) + entry(p, "bias", H + j)) for j in range(H)]
    h = np.array([(1 - f[j]) * h[j] + f[j] * n[j] for j in range(H)])
    return h, (h,)


def cornn(cell: Any, p: Parameters, x: Array, states: tuple[Array, ...]) -> Result:
    y, z = states
    new_y, new_z = np.zeros(len(y)), np.zeros(len(y))
    for j in range(len(y)):
        drive = product(p["weight_hh"], y, j) + product(p["weight_hz"], z, j)
        drive += product(p["weight_ih"], x, j) + entry(p, "bias", j)
        new_z[j] = z[j] + cell.dt * math.tanh(drive) - cell.dt * cell.gamma * y[j] - cell.dt * cell.epsilon * z[j]
        new_y[j] = y[j] + cell.dt * new_z[j]
    return new_y, (new_y, new_z)


def indrnn(cell: Any, p: Parameters, x: Array, states: tuple[Array, ...]) -> Result:
    (h,) = states
    f, u = rectifier(cell.nonlinearity), p["weight_hh"]
    h = np.array([f(product(p["weight_ih"], x, j) + u[j] * h[j] + entry(p, "bias", j)) for j in range(len(h))])
    return h, (h,)


def cfc(cell: Any, p: Parameters, x: Array, states: tuple[Array, ...], elapsed: float = 1.0) -> Result:
    (h,) = states
    H = len(h)
    W = np.concatenate([p["weight_ih"], p["weight_hh"]], 1)
    xh = np.concatenate([x, h])
    bottom = np.array([product(W, xh, j) + entry(p, "bias", j) for j in range(len(W))])
    if cell.backbone:
        units = np.array([math.tanh(a) for a in bottom])
        bottom = np.array([product(p["weight_heads"], units, j) + entry(p, "bias_heads", j) for j in range(3 * H)])
    new = np.zeros(H)
    for j in range(H):
        f, g, k = (bottom[n * H + j] for n in range(3))
        gate = sigmoid(-f * elapsed)
        new[j] = gate * math.tanh(g) + (1 - gate) * math.tanh(k)
    return new, (new,)
