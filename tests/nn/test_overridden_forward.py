"""A subclass whose `forward` does more than ours: what it adds happens once, in whatever form the sequences come."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import bptt


class DoubledGRU(bptt.nn.GRU):
    def forward(
        self, x: Any, state: Any = None, doubled: float = 2.0, **forms: Any
    ) -> Any:  # other parameters than ours
        y, final = super().forward(x, state, **forms)
        return (y._replace(data=doubled * y.data) if isinstance(y, PackedSequence) else doubled * y), doubled * final


class DoubledRecurrent(bptt.nn.Recurrent):
    def forward(self, x: Any, state: Any = None, doubled: float = 2.0, **forms: Any) -> Any:
        y, final = super().forward(x, state, **forms)
        return (y._replace(data=doubled * y.data) if isinstance(y, PackedSequence) else doubled * y), doubled * final


def data(form: str) -> tuple[Any, dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    if form == "packed, all as long":
        return pack_sequence([normal(9, 3), normal(9, 3)]), {}
    if form == "packed":
        return pack_sequence([normal(9, 3), normal(5, 3)]), {}
    if form == "cu_seqlens":
        return normal(14, 3), {"cu_seqlens": torch.tensor([0, 9, 14])}
    if form == "nested":
        return torch.nested.nested_tensor([normal(9, 3), normal(5, 3)], layout=torch.jagged), {}
    if form == "lengths":
        return normal(9, 2, 3), {"lengths": torch.tensor([9, 5])}
    return normal(9, 2, 3), {}


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
@pytest.mark.parametrize("form", ["tensor", "lengths", "packed, all as long", "packed", "cu_seqlens", "nested"])
@pytest.mark.parametrize("kind", ["GRU", "Recurrent"])
@pytest.mark.parametrize("gradient", ["full", "truncated:4"])
def test_it_runs_once(kind: str, form: str, gradient: str) -> None:
    torch.manual_seed(0)
    made = (3, 4) if kind == "GRU" else (torch.nn.GRUCell(3, 4),)
    ours = {"GRU": bptt.nn.GRU, "Recurrent": bptt.nn.Recurrent}[kind](*made, gradient=gradient).double()
    own = {"GRU": DoubledGRU, "Recurrent": DoubledRecurrent}[kind](*made, gradient=gradient).double()
    own.load_state_dict(ours.state_dict())
    x, forms = data(form)
    (y, final), (expected, state) = own(x, **forms), ours(x, **forms)
    values, before = (
        t.data if isinstance(t, PackedSequence) else t.values() if t.is_nested else t for t in (y, expected)
    )
    torch.testing.assert_close(values, 2 * before)
    torch.testing.assert_close(final, 2 * state)
