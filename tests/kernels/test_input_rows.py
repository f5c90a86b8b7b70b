"""The input product that a walk does itself, some steps at a time, against the same product of all steps at once."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import bptt
from bptt.kernels import cpu

CELLS = (bptt.nn.RNN, bptt.nn.GRU, bptt.nn.LSTM)


def outputs(layer: torch.nn.Module, x: Tensor | PackedSequence) -> list[Tensor]:
    y, state = layer(x)
    return [y.data if isinstance(y, PackedSequence) else y, *([state] if isinstance(state, Tensor) else state)]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("B", "threads"), [(9, 1), (9, 2), (5, 2)])
def test_any_number_of_steps_at_a_time(
    cell: type[torch.nn.Module],
    B: int,
    threads: int,
    variant: str,
    walkers: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Several times as many rows as stay near, both ways; threads that share lanes, and that share units (B = 5)."""
    torch.manual_seed(3)
    T, inputs, H = 61, 37, 150
    layer = cell(inputs, H, bidirectional=True, dtype=torch.float64, kernel="cpu")
    x = torch.randn(T, B, inputs, dtype=torch.float64)
    packed = pack_padded_sequence(x, torch.arange(T, T - 7 * B, -7).clamp(min=1))
    walkers(threads)
    results = []
    for most in (0, 10**12):
        monkeypatch.setattr(cpu, "NEAR", (0, 0))
        monkeypatch.setattr(cpu, "SMALL", most)
        results.append([*outputs(layer, x), *outputs(layer, packed)])
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
