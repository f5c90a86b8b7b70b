"""Cells with a memory of another form: attended states, selective states, outer products, beliefs, a world model."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import elu, linear, normalize, silu, softplus

from .cell import Draws, StepProblem

__all__ = [
    "ATTENDED",
    "HEAD",
    "LEAST_STD",
    "SELECTIVE_STATES",
    "attention",
    "gated_delta",
    "kalman",
    "selective",
    "world_model",
]

ATTENDED = 20
"""States of the encoder that is attended to."""

SELECTIVE_STATES = 8
"""States for each unit of a selective state space."""

HEAD = 8
"""Length of the keys and values of a head."""

LEAST_STD = 0.1
"""Standard deviation of a world model's state, at least."""

Pair = tuple[Tensor, Tensor]


def _gru(x: Tensor, h: Tensor, W: Tensor, R: Tensor, b: Tensor) -> Tensor:
    """A GRU's step, Cho et al. 2014, with the reset gate after the product and no second bias."""
    x_r, x_z, x_n = linear(x, W, b).chunk(3, 1)
    h_r, h_z, h_n = linear(h, R).chunk(3, 1)
    z = torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    return n + z * (h - n)


def attention(draws: Draws) -> StepProblem:
    """Decoder that attends to the states M `[B, S, H]` of an encoder, fed with the attended state of the step before.

        h' = GRU([x; a], h)                 p = softmax(M W_a h')
        a' = tanh(W_c [p M; h'])            y = a'

    M is a captured tensor with a row for each lane, and asks for its gradient.

    Luong, Pham and Manning 2015 (arXiv 1508.04025), equations 5 to 8, "general", with input feeding.
    """
    H = draws.H
    M = draws.normal(draws.B, ATTENDED, H)
    W, R, b = draws.weight(3 * H, 2 * H), draws.weight(3 * H, H), draws.bias(3 * H)
    W_a, W_c = draws.weight(H, H), draws.weight(H, 2 * H)

    def step(carry: Pair, x: Tensor) -> tuple[Pair, Tensor]:
        h, a = carry
        h = _gru(torch.cat((x, a), 1), h, W, R, b)
        p = torch.softmax(torch.bmm(M, linear(h, W_a)[:, :, None])[:, :, 0], 1)
        context = torch.bmm(p[:, None, :], M)[:, 0]
        a = torch.tanh(linear(torch.cat((context, h), 1), W_c))
        return (h, a), a

    return draws.problem(step, (draws.zeros(H), draws.zeros(H)), draws.inputs(H))


def selective(draws: Draws) -> StepProblem:
    """Selective state space: H units, each with `SELECTIVE_STATES` states, whose step of time the input chooses.

        d = softplus(W_d x + b_d)               B = W_B x           C = W_C x
        S' = exp(d A) S + (d x) B'              y = S' C + D x      A = -exp(a)

    The state S is `[B, H, N]`; the step of time has a product of full rank.

    Gu and Dao 2023 (arXiv 2312.00752), equation 2 and algorithm 2.
    """
    H, N = draws.H, SELECTIVE_STATES
    W_d, b_d, W_BC = draws.weight(H, H), draws.bias(H), draws.weight(2 * N, H)
    a, D = draws.uniform(H, N, low=-1.0, high=1.0), draws.uniform(H, low=0.5, high=1.5)

    def step(S: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        d = softplus(linear(x, W_d, b_d))
        B, C = linear(x, W_BC).chunk(2, 1)
        S = torch.exp(d[:, :, None] * -torch.exp(a)) * S + (d * x)[:, :, None] * B[:, None, :]
        y = (S * C[:, None, :]).sum(2) + D * x
        return S, y

    return draws.problem(step, draws.zeros(H, N), draws.inputs(H))


def gated_delta(draws: Draws) -> StepProblem:
    """Gated delta rule: a memory S `[B, heads, HEAD, HEAD]` that forgets, and corrects what it holds for a key.

        S' = alpha S (I - beta k k') + beta v k' = alpha S + beta (v - alpha S k) k'        y = S' q

    q and k are SiLU of a product, of length 1; v is SiLU of a product; alpha and beta are sigmoids, one for each head.
    There are H // HEAD heads, at least one.

    Yang, Kautz and Hatamizadeh 2024 (arXiv 2412.06464), equation 10.
    """
    H = draws.H
    heads = max(1, H // HEAD)
    W, W_g, b_g = draws.weight(3 * heads * HEAD, H), draws.weight(2 * heads, H), draws.bias(2 * heads)

    def step(S: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = silu(linear(x, W)).unflatten(1, (3, heads, HEAD)).unbind(1)
        q, k = normalize(q, dim=2), normalize(k, dim=2)
        alpha, beta = torch.sigmoid(linear(x, W_g, b_g)).unflatten(1, (2, heads, 1)).unbind(1)
        S = alpha[..., None] * S
        error = beta * (v - (S @ k[..., None])[..., 0])
        S = S + error[..., :, None] * k[..., None, :]
        return S, (S @ q[..., None])[..., 0].flatten(1)

    return draws.problem(step, draws.zeros(heads, HEAD, HEAD), draws.inputs(H))


def kalman(draws: Draws) -> StepProblem:
    """Kalman filter: the mean `[B, n]` and the covariance P `[B, n, n]` of a hidden state, from measurements x.

        predict     m = A m             P = A P A' + Q
        update      S = C P C' + R      K = P C' S^-1      m' = m + K (x - C m)      P' = P - K C P

    n is about the root of H, measurements are n // 2 numbers; Q and R are diagonal, exp of a parameter each.

    Kalman 1960; in this form Särkkä 2013, "Bayesian Filtering and Smoothing", theorem 4.2.
    """
    n = max(2, math.isqrt(draws.H))
    measured = n // 2
    A, C = draws.uniform(n, n, low=-0.9 / n, high=0.9 / n), draws.weight(measured, n)
    log_q, log_r = draws.uniform(n, low=-2.0, high=0.0), draws.uniform(measured, low=-1.0, high=1.0)
    first = torch.eye(n, dtype=draws.dtype).repeat(draws.B, 1, 1)
    memory = 0.7 * torch.eye(n, dtype=draws.dtype)

    def step(carry: Pair, x: Tensor) -> tuple[Pair, Tensor]:
        m, P = carry
        F = memory + A
        m = linear(m, F)
        P = F @ P @ F.T + torch.diag(torch.exp(log_q))
        PC = P @ C.T
        S = C @ PC + torch.diag(torch.exp(log_r))
        K = torch.linalg.solve(S, PC.mT).mT
        m = m + (K @ (x - linear(m, C))[:, :, None])[:, :, 0]
        P = P - K @ PC.mT
        return (m, P), m

    return draws.problem(step, (draws.zeros(n), first), draws.inputs(measured))


def world_model(draws: Draws) -> StepProblem:
    """Recurrent state-space model as it imagines: a deterministic state h and a stochastic one s `[B, H // 4]`.

        h' = GRU(elu(W_1 [s; u] + b_1), h)
        mean, v = W_3 elu(W_2 h' + b_2) + b_3       s' = mean + (softplus(v) + LEAST_STD) noise

    x is (u, noise): what is done, and standard normal numbers, given, so that the step draws none. y is [h'; s'].

    Hafner et al. 2019 (arXiv 1811.04551), equation 4, the prior.
    """
    H = draws.H
    Z = max(1, H // 4)
    W_1, b_1 = draws.weight(H, Z + H), draws.bias(H)
    W, R, b = draws.weight(3 * H, H), draws.weight(3 * H, H), draws.bias(3 * H)
    W_2, b_2, W_3, b_3 = draws.weight(H, H), draws.bias(H), draws.weight(2 * Z, H), draws.bias(2 * Z)

    def step(carry: Pair, x: Pair) -> tuple[Pair, Tensor]:
        (h, s), (u, noise) = carry, x
        h = _gru(elu(linear(torch.cat((s, u), 1), W_1, b_1)), h, W, R, b)
        mean, v = linear(elu(linear(h, W_2, b_2)), W_3, b_3).chunk(2, 1)
        s = mean + (softplus(v) + LEAST_STD) * noise
        return (h, s), torch.cat((h, s), 1)

    return draws.problem(step, (draws.zeros(H), draws.zeros(Z)), (draws.inputs(H), draws.inputs(Z)))
