"""The steps of `STEP_CELLS` in JAX, line for line: (JAX, parameters, carry, x) -> (carry, y).

Parameters come in the order of the step in torch, where the formulas and their sources stand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .dynamics import CORNN, LEAK, LEM_DT, LIF, LTC_UNFOLDS, RK4_DT
from .memory import HEAD, LEAST_STD

__all__ = ["JAX_STEPS", "jax_scan"]

JaxStep = Callable[[Any, Any, Any, Any], tuple[Any, Any]]


def jax_scan(jax: Any, step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any, chunk: int | None) -> Any:
    """y `[T, ...]` of a step (carry, x) -> (carry, y); chunk: no gradient enters a step whose number it divides."""
    if chunk is None or chunk >= len(jax.tree.leaves(xs)[0]):
        return jax.lax.scan(step, carry, xs)[1]

    def run(carry: Any, xs: Any) -> tuple[Any, Any]:
        return jax.lax.scan(step, jax.tree.map(jax.lax.stop_gradient, carry), xs)

    whole, rest = divmod(len(jax.tree.leaves(xs)[0]), chunk)
    end = whole * chunk
    chunks = jax.tree.map(lambda x: x[:end].reshape(whole, chunk, *x.shape[1:]), xs)
    carry, y = jax.lax.scan(run, carry, chunks)
    y = y.reshape(end, *y.shape[2:])
    if not rest:
        return y
    return jax.numpy.concatenate([y, run(carry, jax.tree.map(lambda x: x[end:], xs))[1]])


def _lstm(jax: Any, w: Any, carry: Any, x: Any) -> Any:
    sigmoid, tanh = jax.nn.sigmoid, jax.numpy.tanh
    W_ih, W_hh, b_ih, b_hh = w
    h, c = carry
    i, f, g, o = jax.numpy.split(x @ W_ih.T + b_ih + h @ W_hh.T + b_hh, 4, axis=1)
    c = sigmoid(f) * c + sigmoid(i) * tanh(g)
    h = sigmoid(o) * tanh(c)
    return (h, c), h


def _gru(jax: Any, w: Any, h: Any, x: Any) -> Any:
    sigmoid, tanh, split = jax.nn.sigmoid, jax.numpy.tanh, jax.numpy.split
    W_ih, W_hh, b_ih, b_hh = w
    x_r, x_z, x_n = split(x @ W_ih.T + b_ih, 3, axis=1)
    h_r, h_z, h_n = split(h @ W_hh.T + b_hh, 3, axis=1)
    r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
    n = tanh(x_n + r * h_n)
    h = (1 - z) * n + z * h
    return h, h


def _layer_norm(jax: Any, v: Any, a: Any, b: Any) -> Any:
    mean = v.mean(1, keepdims=True)
    variance = ((v - mean) ** 2).mean(1, keepdims=True)
    return (v - mean) * jax.lax.rsqrt(variance + 1e-5) * a + b


def _layer_norm_lstm(jax: Any, w: Any, carry: Any, x: Any) -> Any:
    sigmoid, tanh = jax.nn.sigmoid, jax.numpy.tanh
    W_ih, W_hh, a_1, a_2, a_3, b_1, b_2, b_3 = w
    h, c = carry
    gates = _layer_norm(jax, x @ W_ih.T, a_1, b_1) + _layer_norm(jax, h @ W_hh.T, a_2, b_2)
    i, f, g, o = jax.numpy.split(gates, 4, axis=1)
    c = sigmoid(f) * c + sigmoid(i) * tanh(g)
    h = sigmoid(o) * tanh(_layer_norm(jax, c, a_3, b_3))
    return (h, c), h


def _peephole_lstm(jax: Any, w: Any, carry: Any, x: Any) -> Any:
    jnp, sigmoid = jax.numpy, jax.nn.sigmoid
    W, b, p_i, p_f, p_o = w
    h, c = carry
    i, f, g, o = jnp.split(jnp.concatenate((x, h), 1) @ W.T + b, 4, axis=1)
    c = sigmoid(f + p_f * c) * c + sigmoid(i + p_i * c) * jnp.tanh(g)
    h = sigmoid(o + p_o * c) * jnp.tanh(c)
    return (h, c), h


def _slstm(jax: Any, w: Any, carry: Any, x: Any) -> Any:
    jnp = jax.numpy
    W, R, b = w
    h, c, n, m = carry
    z, i, f, o = jnp.split(x @ W.T + b + h @ R.T, 4, axis=1)
    log_f = jax.nn.log_sigmoid(f) + m
    m = jnp.maximum(log_f, i)
    i, f = jnp.exp(i - m), jnp.exp(log_f - m)
    c = f * c + i * jnp.tanh(z)
    n = f * n + i
    h = jax.nn.sigmoid(o) * c / n
    return (h, c, n, m), h


def _conv_lstm(jax: Any, w: Any, carry: Any, x: Any) -> Any:
    jnp, sigmoid = jax.numpy, jax.nn.sigmoid
    W, b = w
    h, c = carry
    gates = jax.lax.conv(jnp.concatenate((x, h), 1), W, (1, 1), "SAME") + b[:, None, None]
    i, f, g, o = jnp.split(gates, 4, axis=1)
    c = sigmoid(f) * c + sigmoid(i) * jnp.tanh(g)
    h = sigmoid(o) * jnp.tanh(c)
    return (h, c), h


def _leaky(jax: Any, w: Any, h: Any, x: Any) -> Any:
    W, U, b = w
    h = (1 - LEAK) * h + LEAK * jax.numpy.tanh(h @ W.T + x @ U.T + b)
    return h, h


def _lif(jax: Any, w: Any, carry: Any, x: Any) -> Any:
    decay, threshold, steepness = LIF

    def derivative(primals: Any, tangents: Any) -> Any:
        (v,), (dv,) = primals, tangents
        return spike(v), dv / (1 + steepness * jax.numpy.abs(v)) ** 2

    spike = jax.custom_jvp(lambda v: (v > 0).astype(v.dtype))
    spike.defjvp(derivative)
    W, R = w
    v, s = carry
    v = decay * v * (1 - s) + x @ W.T + s @ R.T
    s = spike(v - threshold)
    return (v, s), s


def _cornn(jax: Any, w: Any, carry: Any, x: Any) -> Any:
    dt, gamma, epsilon = CORNN
    W, V, U, b = w
    y, z = carry
    z = z + dt * (jax.numpy.tanh(y @ W.T + z @ V.T + x @ U.T + b) - gamma * y - epsilon * z)
    y = y + dt * z
    return (y, z), y


def _lem(jax: Any, w: Any, carry: Any, x: Any) -> Any:
    sigmoid, tanh, split = jax.nn.sigmoid, jax.numpy.tanh, jax.numpy.split
    W, V, b, W_y = w
    y, z = carry
    x_1, x_2, x_z, x_y = split(x @ V.T + b, 4, axis=1)
    y_1, y_2, y_z = split(y @ W.T, 3, axis=1)
    d_1, d_2 = LEM_DT * sigmoid(x_1 + y_1), LEM_DT * sigmoid(x_2 + y_2)
    z = (1 - d_1) * z + d_1 * tanh(x_z + y_z)
    y = (1 - d_2) * y + d_2 * tanh(x_y + z @ W_y.T)
    return (y, z), y


def _rk4(jax: Any, w: Any, h: Any, x: Any) -> Any:
    W, U, b = w
    drive = x @ U.T + b

    def f(h: Any) -> Any:
        return jax.numpy.tanh(h @ W.T + drive) - h

    k_1 = f(h)
    k_2 = f(h + RK4_DT / 2 * k_1)
    k_3 = f(h + RK4_DT / 2 * k_2)
    k_4 = f(h + RK4_DT * k_3)
    h = h + RK4_DT / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)
    return h, h


def _ltc(jax: Any, w: Any, h: Any, x: Any) -> Any:
    W, U, b, A, t = w
    dt = 1 / LTC_UNFOLDS
    drive, rate = x @ U.T + b, 1 / jax.nn.softplus(t)
    for _ in range(LTC_UNFOLDS):
        f = jax.nn.sigmoid(h @ W.T + drive)
        h = (h + dt * f * A) / (1 + dt * (rate + f))
    return h, h


def _short_gru(jax: Any, x: Any, h: Any, W: Any, R: Any, b: Any) -> Any:
    sigmoid, split = jax.nn.sigmoid, jax.numpy.split
    x_r, x_z, x_n = split(x @ W.T + b, 3, axis=1)
    h_r, h_z, h_n = split(h @ R.T, 3, axis=1)
    z = sigmoid(x_z + h_z)
    n = jax.numpy.tanh(x_n + sigmoid(x_r + h_r) * h_n)
    return n + z * (h - n)


def _attention(jax: Any, w: Any, carry: Any, x: Any) -> Any:
    jnp = jax.numpy
    M, W, R, b, W_a, W_c = w
    h, a = carry
    h = _short_gru(jax, jnp.concatenate((x, a), 1), h, W, R, b)
    p = jax.nn.softmax(jnp.einsum("bsh,bh->bs", M, h @ W_a.T), axis=1)
    context = jnp.einsum("bs,bsh->bh", p, M)
    a = jnp.tanh(jnp.concatenate((context, h), 1) @ W_c.T)
    return (h, a), a


def _selective(jax: Any, w: Any, S: Any, x: Any) -> Any:
    jnp = jax.numpy
    W_d, b_d, W_BC, a, D = w
    d = jax.nn.softplus(x @ W_d.T + b_d)
    B, C = jnp.split(x @ W_BC.T, 2, axis=1)
    S = jnp.exp(d[:, :, None] * -jnp.exp(a)) * S + (d * x)[:, :, None] * B[:, None, :]
    return S, (S * C[:, None, :]).sum(2) + D * x


def _gated_delta(jax: Any, w: Any, S: Any, x: Any) -> Any:
    jnp = jax.numpy
    W, W_g, b_g = w
    lanes, heads = S.shape[:2]
    q, k, v = jnp.moveaxis(jax.nn.silu(x @ W.T).reshape(lanes, 3, heads, HEAD), 1, 0)
    q, k = (u / jnp.sqrt((u * u).sum(2, keepdims=True)) for u in (q, k))
    alpha, beta = jnp.moveaxis(jax.nn.sigmoid(x @ W_g.T + b_g).reshape(lanes, 2, heads, 1), 1, 0)
    S = alpha[..., None] * S
    error = beta * (v - (S @ k[..., None])[..., 0])
    S = S + error[..., :, None] * k[..., None, :]
    return S, (S @ q[..., None])[..., 0].reshape(lanes, -1)


def _kalman(jax: Any, w: Any, carry: Any, x: Any) -> Any:
    jnp = jax.numpy
    A, C, log_q, log_r = w
    m, P = carry
    F = 0.7 * jnp.eye(len(A), dtype=A.dtype) + A
    m = m @ F.T
    P = F @ P @ F.T + jnp.diag(jnp.exp(log_q))
    PC = P @ C.T
    S = C @ PC + jnp.diag(jnp.exp(log_r))
    K = jnp.linalg.solve(S, PC.mT).mT
    m = m + (K @ (x - m @ C.T)[:, :, None])[:, :, 0]
    P = P - K @ PC.mT
    return (m, P), m


def _world_model(jax: Any, w: Any, carry: Any, x: Any) -> Any:
    jnp, elu = jax.numpy, jax.nn.elu
    W_1, b_1, W, R, b, W_2, b_2, W_3, b_3 = w
    (h, s), (u, noise) = carry, x
    h = _short_gru(jax, elu(jnp.concatenate((s, u), 1) @ W_1.T + b_1), h, W, R, b)
    mean, v = jnp.split(elu(h @ W_2.T + b_2) @ W_3.T + b_3, 2, axis=1)
    s = mean + (jax.nn.softplus(v) + LEAST_STD) * noise
    return (h, s), jnp.concatenate((h, s), 1)


JAX_STEPS: dict[str, JaxStep] = {
    "lstm": _lstm,
    "gru": _gru,
    "layer-norm-lstm": _layer_norm_lstm,
    "leaky": _leaky,
    "lif": _lif,
    "slstm": _slstm,
    "cornn": _cornn,
    "lem": _lem,
    "peephole-lstm": _peephole_lstm,
    "attention": _attention,
    "conv-lstm": _conv_lstm,
    "rk4": _rk4,
    "ltc": _ltc,
    "selective": _selective,
    "gated-delta": _gated_delta,
    "kalman": _kalman,
    "world-model": _world_model,
}
"""By the names of `STEP_CELLS`."""
