"""What a step keeps beside the carry that is no state: caches, masks, statistics."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from bptt import Full, Truncated, scan
from bptt.policies import Policy

from .loops import DOUBLE, Agree, B, Case, H, T, expected, loop, measured, random


def rotary() -> Case:
    table: dict[int, tuple[Tensor, Tensor]] = {}
    w = random(H)

    def turned(h: Tensor) -> Tensor:
        n = h.shape[-1] // 2
        if n not in table:
            angles = torch.arange(n).to(h) / n
            table[n] = angles.cos(), angles.sin()
        cos, sin = table[n]
        a, b = h.chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(turned(h) * w + x)
        return h, h

    return step, random(B, H), random(T, B, H), [w]


def one_mask_for_all_steps() -> Case:
    held: dict[str, Tensor] = {}
    w = random(H)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        if "mask" not in held:
            held["mask"] = torch.dropout(torch.ones_like(h), 0.5, True)
        h = torch.tanh(h * held["mask"] * w + x)
        return h, h

    return step, random(B, H), random(T, B, H), [w]


def statistics_of_many_kinds() -> Case:
    norms = nn.ModuleList([nn.BatchNorm1d(H, dtype=DOUBLE), nn.BatchNorm1d(H, momentum=None, dtype=DOUBLE)])
    largest, seen = torch.zeros((), dtype=DOUBLE), torch.zeros(H, dtype=torch.long)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            largest.copy_(torch.maximum(largest, h.abs().max()))
            seen.add_((h > 0).sum(0))
        h = torch.tanh(norms[1](norms[0](h)) + x)
        return h, h

    return step, random(B, H), random(T, B, H), list(norms.parameters())


def norms_in_eval() -> Case:
    norm = nn.BatchNorm1d(H, dtype=DOUBLE).eval()
    return (lambda h, x: ((z := torch.tanh(norm(h) + x)), z)), random(B, H), random(T, B, H), list(norm.parameters())


@pytest.mark.parametrize("make", [rotary, one_mask_for_all_steps, statistics_of_many_kinds, norms_in_eval])
@pytest.mark.parametrize("policy", [Full(), Truncated(3)], ids=str)
def test_caches_and_statistics(make: Callable[[], Case], policy: Policy, agree: Agree) -> None:
    case = make()
    agree(measured(case, policy), expected(case, policy))


def test_a_lazy_module(agree: Agree) -> None:
    layer = nn.LazyLinear(H, dtype=DOUBLE)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(layer(h) + x)
        return h, h

    h, xs = random(B, H), random(T, B, H)
    final, _ = scan(step, h, xs)
    got = torch.autograd.grad(final.sum(), [h, xs, *layer.parameters()])
    agree(got, torch.autograd.grad(loop(step, h, xs, T)[0].sum(), [h, xs, *layer.parameters()]))


@pytest.mark.parametrize("inside", [False, True])
def test_cached_parametrizations(inside: bool, agree: Agree) -> None:
    layer = parametrizations.weight_norm(nn.Linear(H, H, dtype=DOUBLE))
    case = (lambda h, x: ((z := torch.tanh(layer(h) + x)), z)), random(B, H), random(T, B, H), list(layer.parameters())
    inputs = [case[1], case[2], *case[3]]
    want = torch.autograd.grad(loop(*case[:3], T)[0].sum(), inputs)
    with parametrize.cached():
        before = layer.weight
        final, _ = scan(*case[:3])
        assert layer.weight is before
        if inside:
            agree(torch.autograd.grad(final.sum(), inputs), want)
    if not inside:
        agree(torch.autograd.grad(final.sum(), inputs), want)
