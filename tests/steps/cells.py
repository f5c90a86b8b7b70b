"""Cores of recurrent steps, from the equations of their papers, for tests of the interpreter."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bptt.steps import SplitStep

from .handmade import split

Lists = tuple[list[Tensor], list[Tensor]]


def weights(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * (0.6 / max(shape) ** 0.5)


def lstm(H: int, dtype: torch.dtype) -> SplitStep:
    def core(carry: list[Tensor], x: list[Tensor], w: list[Tensor]) -> Lists:
        h, c = carry
        i, f, g, o = torch.split(x[0] + torch.mm(h, w[0]), H, 1)
        i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
        c = f * c + i * g
        h = o * torch.tanh(c)
        return [h, c], [h, i, g]

    return split(core, [(H,), (H,)], [(4 * H,)], [weights(H, 4 * H)], kept=2, dtype=dtype)


def taped_lstm(H: int, dtype: torch.dtype) -> SplitStep:
    """An LSTM whose gates are on the tape, as a minimum cut has it."""

    def core(carry: list[Tensor], x: list[Tensor], w: list[Tensor]) -> Lists:
        h, c = carry
        i, f, g, o = torch.split(x[0] + torch.mm(h, w[0]), H, 1)
        i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
        c = f * c + i * g
        h = o * torch.tanh(c)
        return [h, c], [h, i, f, g, o]

    def pull(*all_: Tensor) -> list[Tensor]:
        lam_h, lam_c, dy, _, c, w, i, f, g, o = all_
        t = torch.tanh(f * c + i * g)
        dh = lam_h + dy
        dc = lam_c + torch.ops.aten.tanh_backward(dh * o, t)
        sigmoid_backward = torch.ops.aten.sigmoid_backward
        da = torch.cat([sigmoid_backward(dc * g, i), sigmoid_backward(dc * c, f),
                        torch.ops.aten.tanh_backward(dc * i, g), sigmoid_backward(dh * t, o)], 1)  # fmt: skip
        return [torch.mm(da, w.t()), dc * f, da]

    return split(core, [(H,), (H,)], [(4 * H,)], [weights(H, 4 * H)], kept=4, dtype=dtype, pull=pull,
                 kept_for_pull=[1, 2, 3, 4])  # fmt: skip


def gru(H: int, dtype: torch.dtype) -> SplitStep:
    def core(carry: list[Tensor], x: list[Tensor], w: list[Tensor]) -> Lists:
        (h,) = carry
        a = torch.mm(h, w[0].t()) + w[1]
        (x_r, x_z, x_n), (a_r, a_z, a_n) = x[0].chunk(3, 1), a.chunk(3, 1)
        r, z = torch.sigmoid(x_r + a_r), torch.sigmoid(x_z + a_z)
        n = torch.tanh(x_n + r * a_n)
        h = n + z * (h - n)
        return [h], [h * 1.5]

    return split(core, [(H,)], [(3 * H,)], [weights(3 * H, H), weights(3 * H)], summed=[1], dtype=dtype)


def leaky(H: int, dtype: torch.dtype) -> SplitStep:
    def core(carry: list[Tensor], x: list[Tensor], w: list[Tensor]) -> Lists:
        (h,) = carry
        h = h + w[1] * (torch.tanh(torch.mm(torch.cat([x[0], h], 1), w[0])) - h)
        return [h], [h]

    return split(core, [(H,)], [(3,)], [weights(H + 3, H), weights(H)], summed=[1], dtype=dtype)


def normalised(a: Tensor) -> Tensor:
    centred = a - a.mean(1, keepdim=True)
    return centred * torch.rsqrt((centred * centred).mean(1, keepdim=True) + 1e-5)


def layer_norm_lstm(H: int, dtype: torch.dtype) -> SplitStep:
    def core(carry: list[Tensor], x: list[Tensor], w: list[Tensor]) -> Lists:
        h, c = carry
        a = normalised(torch.mm(h, w[0]) + x[0]) * w[1] + w[2]
        i, f, g, o = a.chunk(4, 1)
        c = torch.sigmoid(f + 1) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(normalised(c))
        return [h, c], [h]

    captured = [weights(H, 4 * H), 1 + weights(4 * H), weights(4 * H, seed=1)]
    return split(core, [(H,), (H,)], [(4 * H,)], captured, summed=[1, 2], dtype=dtype)


class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(v)
        return (v > 0).to(v.dtype)

    @staticmethod
    def backward(ctx, d):  # type: ignore[no-untyped-def]
        (v,) = ctx.saved_tensors
        return d / (1 + 4 * v.abs()) ** 2


def lif(H: int, dtype: torch.dtype) -> SplitStep:
    def core(carry: list[Tensor], x: list[Tensor], w: list[Tensor]) -> Lists:
        v, s = carry
        v = torch.where(s > 0.5, 0.0, v * w[1])
        v = (v + torch.nn.functional.softplus(x[0]) + torch.mm(s, w[0])).clamp(-2, 3)
        s = Spike.apply(v - 0.4)
        return [v, s], [s]

    captured = [weights(H, H), weights(1)]
    return split(core, [(H,), (H,)], [(H,)], captured, summed=[1], dtype=dtype)


def attention(H: int, dtype: torch.dtype) -> SplitStep:
    """Softmax over a memory of 3 slots in 2 heads, written to by an outer product."""

    def core(carry: list[Tensor], x: list[Tensor], w: list[Tensor]) -> Lists:
        memory, h = carry  # [R, 3, 2 H], [R, 2 H]
        heads = memory.view(-1, 3, 2, H).permute(0, 2, 1, 3).reshape(-1, 3, H)  # [2 R, 3, H]
        query = torch.mm(h, w[0]).view(-1, H, 1)
        scores = torch.bmm(heads, query).squeeze(2) / H**0.5
        scores = torch.exp(scores - scores.amax(1, keepdim=True))
        scores = scores / scores.sum(1, keepdim=True)
        read = torch.bmm(scores.unsqueeze(1), heads).reshape(-1, 2 * H)
        h = torch.tanh(read + x[0])
        gate = torch.sigmoid(x[1])
        memory = memory + torch.bmm(gate.unsqueeze(2), (h - memory.mean(1)).unsqueeze(1))
        return [memory, h], [memory.amax(2), read]

    return split(core, [(3, 2 * H), (2 * H,)], [(2 * H,), (3,)], [weights(2 * H, 2 * H)], dtype=dtype)


def slstm(H: int, dtype: torch.dtype) -> SplitStep:
    """Exponential gates and their stabiliser."""

    def core(carry: list[Tensor], x: list[Tensor], w: list[Tensor]) -> Lists:
        h, c, n, m = carry
        i, f, z, o = (x[0] + torch.mm(h, w[0])).chunk(4, 1)
        log_f = torch.nn.functional.logsigmoid(f)
        m_new = torch.maximum(log_f + m, i)
        i, f = torch.exp(i - m_new), torch.exp(log_f + m - m_new)
        c, n = f * c + i * torch.tanh(z), f * n + i
        h = torch.sigmoid(o) * c / n.clamp(min=1e-3)
        return [h, c, n, m_new], [h]

    return split(core, [(H,)] * 4, [(4 * H,)], [weights(H, 4 * H)], dtype=dtype)


CELLS: dict[str, Callable[[int, torch.dtype], SplitStep]] = {
    "lstm": lstm,
    "taped_lstm": taped_lstm,
    "gru": gru,
    "leaky": leaky,
    "layer_norm_lstm": layer_norm_lstm,
    "lif": lif,
    "attention": attention,
    "slstm": slstm,
}
