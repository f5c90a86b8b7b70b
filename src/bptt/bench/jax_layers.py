"""The same layers in JAX: `lax.scan` over the steps, differentiated and compiled by JAX.

Weights, gate order and formulas are torch.nn's; the input product is taken over all steps before the scan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..train.extras import require
from .contest import Call

__all__ = ["jax_call"]


def jax_call(cell: str, weights: Mapping[str, Tensor], x: Tensor, dy: Tensor) -> Call:
    """One forward and one backward pass, compiled as one function.

    cell: "rnn", "gru" or "lstm". weights: torch.nn's state_dict of one layer. x: `[T, B, I]`. dy: `[T, B, H]`.
    Raises InputError where JAX is not installed.
    """
    jax, jnp = require("jax", "bench"), require("jax.numpy", "bench")
    forward = {"rnn": _rnn, "gru": _gru, "lstm": _lstm}[cell]
    parameters = [jnp.asarray(w.numpy()) for w in weights.values()]
    inputs, cotangent = jnp.asarray(x.numpy()), jnp.asarray(dy.numpy())

    def run(x: Any, parameters: Any, dy: Any) -> Any:
        y, pull = jax.vjp(lambda x, parameters: forward(jax, x, *parameters), x, parameters)
        dx, gradients = pull(dy)
        return [y, dx, *gradients]

    compiled = jax.jit(run)

    def call() -> Sequence[Any]:
        done: Sequence[Any] = jax.block_until_ready(compiled(inputs, parameters, cotangent))
        return done

    return call


def _rnn(jax: Any, x: Any, W_ih: Any, W_hh: Any, b_ih: Any, b_hh: Any) -> Any:
    jnp = jax.numpy

    def step(h: Any, gx: Any) -> Any:
        h = jnp.tanh(gx + h @ W_hh.T)
        return h, h

    start = jnp.zeros((x.shape[1], W_hh.shape[1]), x.dtype)
    return jax.lax.scan(step, start, x @ W_ih.T + (b_ih + b_hh))[1]


def _gru(jax: Any, x: Any, W_ih: Any, W_hh: Any, b_ih: Any, b_hh: Any) -> Any:
    jnp, sigmoid = jax.numpy, jax.nn.sigmoid

    def step(h: Any, gx: Any) -> Any:
        x_r, x_z, x_n = jnp.split(gx, 3, axis=1)
        h_r, h_z, h_n = jnp.split(h @ W_hh.T + b_hh, 3, axis=1)
        r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
        n = jnp.tanh(x_n + r * h_n)
        h = n + z * (h - n)
        return h, h

    start = jnp.zeros((x.shape[1], W_hh.shape[1]), x.dtype)
    return jax.lax.scan(step, start, x @ W_ih.T + b_ih)[1]


def _lstm(jax: Any, x: Any, W_ih: Any, W_hh: Any, b_ih: Any, b_hh: Any) -> Any:
    jnp, sigmoid = jax.numpy, jax.nn.sigmoid

    def step(state: Any, gx: Any) -> Any:
        h, c = state
        i, f, g, o = jnp.split(gx + h @ W_hh.T, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * jnp.tanh(g)
        h = sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zero = jnp.zeros((x.shape[1], W_hh.shape[1]), x.dtype)
    return jax.lax.scan(step, (zero, zero), x @ W_ih.T + (b_ih + b_hh))[1]
