"""Cells with gates: LSTM, GRU, layer-norm LSTM, peephole LSTM, sLSTM, ConvLSTM."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d, layer_norm, linear, logsigmoid

from .cell import Draws, StepProblem

__all__ = ["SIDE", "conv_lstm", "gru", "layer_norm_lstm", "lstm", "peephole_lstm", "slstm"]

SIDE = 4
"""Height and width of a ConvLSTM's images."""

Pair = tuple[Tensor, Tensor]


def lstm(draws: Draws) -> StepProblem:
    """Long short-term memory, in the form and with the parameters of torch.nn.LSTM.

        i, f, g, o = W_ih x + b_ih + W_hh h + b_hh
        c' = sigmoid(f) c + sigmoid(i) tanh(g)      h' = sigmoid(o) tanh(c')

    Hochreiter and Schmidhuber 1997; the forget gate of Gers, Schmidhuber and Cummins 2000.
    """
    H = draws.H
    W_ih, W_hh, b_ih, b_hh = draws.weight(4 * H, H), draws.weight(4 * H, H), draws.bias(4 * H), draws.bias(4 * H)

    def step(carry: Pair, x: Tensor) -> tuple[Pair, Tensor]:
        h, c = carry
        i, f, g, o = (linear(x, W_ih, b_ih) + linear(h, W_hh, b_hh)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return (h, c), h

    return draws.problem(step, (draws.zeros(H), draws.zeros(H)), draws.inputs(H))


def gru(draws: Draws) -> StepProblem:
    """Gated recurrent unit, in the form and with the parameters of torch.nn.GRU.

        r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)      z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
        n = tanh(W_in x + b_in + r (W_hn h + b_hn))     h' = (1 - z) n + z h

    Cho et al. 2014, with the reset gate after the product.
    """
    H = draws.H
    W_ih, W_hh, b_ih, b_hh = draws.weight(3 * H, H), draws.weight(3 * H, H), draws.bias(3 * H), draws.bias(3 * H)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        x_r, x_z, x_n = linear(x, W_ih, b_ih).chunk(3, 1)
        h_r, h_z, h_n = linear(h, W_hh, b_hh).chunk(3, 1)
        r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
        n = (x_n + r * h_n).tanh()
        h = (1 - z) * n + z * h
        return h, h

    return draws.problem(step, draws.zeros(H), draws.inputs(H))


def layer_norm_lstm(draws: Draws) -> StepProblem:
    """LSTM with layer normalisation of both products and of the cell state.

        i, f, g, o = LN(W_ih x; a_1, b_1) + LN(W_hh h; a_2, b_2)
        c' = sigmoid(f) c + sigmoid(i) tanh(g)      h' = sigmoid(o) tanh(LN(c'; a_3, b_3))

    The gains a_2 are small: with gains of 1 the gradient grows without bound over some hundred steps.

    Ba, Kiros and Hinton 2016 (arXiv 1607.06450), equations 20 to 22; the bias b stands in b_1.
    """
    H = draws.H
    W_ih, W_hh = draws.weight(4 * H, H), draws.weight(4 * H, H)
    a_1, a_2 = draws.uniform(4 * H, low=0.5, high=1.0), draws.uniform(4 * H, low=0.1, high=0.3)
    a_3 = draws.uniform(H, low=0.5, high=1.0)
    b_1, b_2, b_3 = (draws.bias(size) for size in (4 * H, 4 * H, H))

    def step(carry: Pair, x: Tensor) -> tuple[Pair, Tensor]:
        h, c = carry
        gates = layer_norm(linear(x, W_ih), [4 * H], a_1, b_1) + layer_norm(linear(h, W_hh), [4 * H], a_2, b_2)
        i, f, g, o = gates.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * layer_norm(c, [H], a_3, b_3).tanh()
        return (h, c), h

    return draws.problem(step, (draws.zeros(H), draws.zeros(H)), draws.inputs(H))


def peephole_lstm(draws: Draws) -> StepProblem:
    """LSTM whose gates see the cell state.

        i = sigmoid(W_i [x; h] + p_i c + b_i)       f = sigmoid(W_f [x; h] + p_f c + b_f)
        c' = f c + i tanh(W_g [x; h] + b_g)
        o = sigmoid(W_o [x; h] + p_o c' + b_o)      h' = o tanh(c')

    Gers and Schmidhuber 2000 ("Recurrent nets that time and count"); Graves 2013 (arXiv 1308.0850), equations 7 to 11.
    """
    H = draws.H
    W, b = draws.weight(4 * H, 2 * H), draws.bias(4 * H)
    p_i, p_f, p_o = draws.bias(H), draws.bias(H), draws.bias(H)

    def step(carry: Pair, x: Tensor) -> tuple[Pair, Tensor]:
        h, c = carry
        i, f, g, o = linear(torch.cat((x, h), 1), W, b).chunk(4, 1)
        i, f = torch.sigmoid(i + p_i * c), torch.sigmoid(f + p_f * c)
        c = f * c + i * torch.tanh(g)
        h = torch.sigmoid(o + p_o * c) * torch.tanh(c)
        return (h, c), h

    return draws.problem(step, (draws.zeros(H), draws.zeros(H)), draws.inputs(H))


def slstm(draws: Draws) -> StepProblem:
    """Scalar LSTM with exponential gating, a normaliser n and a stabiliser m; one head.

        z, i, f, o = W x + R h + b                 m' = max(log sigmoid(f) + m, i)
        i' = exp(i - m')                           f' = exp(log sigmoid(f) + m - m')
        c' = f' c + i' tanh(z)      n' = f' n + i'      h' = sigmoid(o) c' / n'

    Beck et al. 2024 (arXiv 2405.04517), equations 8 to 17.
    """
    H = draws.H
    W, R, b = draws.weight(4 * H, H), draws.weight(4 * H, H), draws.bias(4 * H)

    def step(carry: tuple[Tensor, ...], x: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        h, c, n, m = carry
        z, i, f, o = (linear(x, W, b) + linear(h, R)).chunk(4, 1)
        log_f = logsigmoid(f) + m
        m = torch.maximum(log_f, i)
        i, f = torch.exp(i - m), torch.exp(log_f - m)
        c = f * c + i * z.tanh()
        n = f * n + i
        h = o.sigmoid() * c / n
        return (h, c, n, m), h

    return draws.problem(step, tuple(draws.zeros(H) for _ in range(4)), draws.inputs(H))


def conv_lstm(draws: Draws) -> StepProblem:
    """LSTM over images, with convolutions of 3 x 3 for products, without peepholes.

        i, f, g, o = W * [X; H] + b
        C' = sigmoid(f) C + sigmoid(i) tanh(g)      H' = sigmoid(o) tanh(C')

    The images have H // 16 channels, at least one, of `SIDE` x `SIDE` pixels: about H units in all.

    Shi et al. 2015 (arXiv 1506.04214), equation 3.
    """
    channels = max(1, draws.H // SIDE**2)
    size = channels, SIDE, SIDE
    W, b = draws.weight(4 * channels, 2 * channels, 3, 3), draws.bias(4 * channels)

    def step(carry: Pair, x: Tensor) -> tuple[Pair, Tensor]:
        h, c = carry
        i, f, g, o = conv2d(torch.cat((x, h), 1), W, b, padding=1).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return (h, c), h

    return draws.problem(step, (draws.zeros(*size), draws.zeros(*size)), draws.inputs(*size))
