"""What tests of the block sweep share: which nets, windows and policies they try, and the judgement."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import CELLS, NETS, Case, Fixed, gradients, measure, ours
from torch import nn

from bptt import Chunked, Full, Truncated
from bptt.policies import Policy

Agree = Callable[..., None]

T = 7
STEPS = {"one": 7, "two": 7, "three": 5, "bi": 5, "bi_two": 5}
"""Steps at which each net is tried with every window and block length."""

LENGTHS = (2, 7, 5, 5)
RESETS = torch.tensor(  # lanes: none; at the start; in the middle, twice in a row; at the start and the end
    [[0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
).bool()

each_cell = pytest.mark.parametrize("cell", CELLS)
each_net = pytest.mark.parametrize("net", NETS)


def pairs(steps: int) -> list[tuple[int, int]]:
    """Every (window, every) up to one more than there are steps."""
    return [(window, every) for window in range(1, steps + 2) for every in range(1, window + 1)]


def some_policies(net: str, B: int) -> list[Policy]:
    """One policy of each kind; the factors are arbitrary numbers, so that each must land where it belongs."""
    generator = torch.Generator().manual_seed(6)
    rows = NETS[net]["num_layers"] * 2 if "bidirectional" in NETS[net] else 1
    xi = [2 * torch.rand(T, B, generator=generator, dtype=torch.float64) for _ in range(rows)]
    for factors in xi:
        factors[0] = 1
        factors[3] = 0
    return [Full(), Chunked(3), Truncated(2), Truncated(4, every=3), Fixed(*xi)]


def judge(theirs: nn.RNNBase, data: Case, policy: Policy, agree: Agree, *memories: str, **kw: Any) -> None:
    """The engine, once for each of the memories, against the reference, which takes longer. kw: resets or lengths."""
    expected = gradients(theirs, data.x, data.initial, data.dy, data.dfinal, policy, **kw)
    if "lengths" in kw:
        kw["packed"] = kw.pop("lengths")
    for memory in memories or ("auto",):
        actual = measure(ours(theirs, gradient=policy, memory=memory), data, **kw)
        agree(actual.values(), expected.values(), f"{policy}, {memory}")
