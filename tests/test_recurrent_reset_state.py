"""Resets of a Recurrent to a state that is given, against those of the layers of bptt.nn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import bptt

T, B, F, H = 9, 4, 3, 5
DOUBLE = torch.float64
RESETS = torch.zeros(T, B, dtype=torch.bool)
RESETS[0, 0] = RESETS[3, 1] = RESETS[4, 1] = RESETS[6] = True
LENGTHS = [9, 5, 8, 3]
NETS: dict[str, dict[str, Any]] = {
    "one": {},
    "two": {"num_layers": 2},
    "both ways": {"bidirectional": True},
    "two both ways": {"num_layers": 2, "bidirectional": True},
}


def rows(*sizes: int) -> Tensor:
    return torch.randn(*sizes, dtype=DOUBLE, requires_grad=True)


def pair(lstm: bool, net: dict[str, Any], policy: str, **kw: Any) -> tuple[Any, Any]:
    """A layer of bptt.nn and a Recurrent of torch's cells with the same weights."""
    theirs = (bptt.nn.LSTM if lstm else bptt.nn.GRU)(F, H, gradient=policy, dtype=DOUBLE, **net, **kw)
    D = 2 if net.get("bidirectional") else 1
    cell = nn.LSTMCell if lstm else nn.GRUCell
    mine = bptt.nn.Recurrent(lambda n: cell(D * H if n else F, H, dtype=DOUBLE), net.get("num_layers", 1),
                             bidirectional=D == 2, gradient=policy, **kw)  # fmt: skip
    with torch.no_grad():
        for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
            p.copy_(q)
    return theirs, mine


def given(lstm: bool, net: dict[str, Any], each: bool) -> tuple[Any, Any]:
    """(hx, reset_state) in the form of the layers."""
    K = net.get("num_layers", 1) * (2 if net.get("bidirectional") else 1)
    sizes = (T, K, B, H) if each else (K, B, H)
    return ((rows(K, B, H), rows(K, B, H)), (rows(*sizes), rows(*sizes))) if lstm else (rows(K, B, H), rows(*sizes))


def measured(layer: Any, x: Tensor, hx: Any, state: Any, **kw: Any) -> list[Tensor]:
    y, final = layer(x, hx, reset_state=state, **kw)
    y = pad_packed_sequence(y)[0] if not isinstance(y, Tensor) else y
    finals = final if isinstance(final, tuple) else (final,)
    leaves = [t for part in (hx, state) for t in (part if isinstance(part, tuple) else (part,))]
    loss = y.square().sum() + sum(f.sin().sum() for f in finals)
    inputs = [*leaves, *layer.parameters(), *([x] if isinstance(x, Tensor) else [])]
    return [y, *finals, *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize(
    ("each", "policy"), [(False, "full"), (True, "chunked:4"), (False, "truncated:4"), (True, "truncated:5/2")]
)
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("lstm", [True, False])
def test_as_the_layers(lstm: bool, net: str, each: bool, policy: str) -> None:
    theirs, mine = pair(lstm, NETS[net], policy)
    (hx, state), x = given(lstm, NETS[net], each), rows(T, B, F)
    expected = measured(theirs, x, hx, state, resets=RESETS)
    torch.testing.assert_close(measured(mine, x, hx, state, resets=RESETS), expected)


@pytest.mark.parametrize("policy", ["full", "truncated:5/2"])
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("net", ["one", "both ways"])
def test_sequences_of_unequal_lengths(net: str, each: bool, policy: str) -> None:
    theirs, mine = pair(True, NETS[net], policy)
    hx, state = given(True, NETS[net], each)
    packed = pack_padded_sequence(torch.randn(T, B, F, dtype=DOUBLE), torch.tensor(LENGTHS), enforce_sorted=False)
    if each:  # what belongs to no reset is not read
        used = RESETS & (torch.arange(T)[:, None] < torch.tensor(LENGTHS))
        with torch.no_grad():
            for s in state:
                s.transpose(1, 2)[~used] = torch.nan
    expected = measured(theirs, packed, hx, state, resets=RESETS)
    torch.testing.assert_close(measured(mine, packed, hx, state, resets=RESETS), expected)


@pytest.mark.parametrize("each", [False, True])
def test_unbatched_and_batch_first(each: bool) -> None:
    theirs, mine = pair(True, {}, "full")
    hx, state = given(True, {}, each)
    first = lambda t: t.select(-2, 0).detach().requires_grad_()  # noqa: E731
    hx, state, x = tuple(map(first, hx)), tuple(map(first, state)), rows(T, F)
    expected = measured(theirs, x, hx, state, resets=RESETS[:, 1])
    torch.testing.assert_close(measured(mine, x, hx, state, resets=RESETS[:, 1]), expected)
    theirs, mine = pair(True, {}, "full", batch_first=True)
    (hx, state), x = given(True, {}, each), rows(B, T, F)
    expected = measured(theirs, x, hx, state, resets=RESETS.t())
    torch.testing.assert_close(measured(mine, x, hx, state, resets=RESETS.t()), expected)


def test_a_list_of_states_of_cells_that_differ() -> None:
    layer = bptt.nn.Recurrent([nn.GRUCell(F, H, dtype=DOUBLE), nn.LSTMCell(H, 2, dtype=DOUBLE)])
    state = [rows(B, H), (rows(T, B, 2), rows(T, B, 2))]
    y, _ = layer(rows(T, B, F), resets=RESETS, reset_state=state)
    at = torch.autograd.grad(y.square().sum(), [state[0], *state[1]])
    assert at[0].abs().sum(1).gt(0).all()
    assert at[1].abs().sum(2).gt(0).equal(RESETS)


def test_what_does_not_fit_is_an_error() -> None:
    layer, x = bptt.nn.Recurrent(nn.GRUCell(F, H)), torch.zeros(T, B, F)
    with pytest.raises(ValueError, match="got it without resets"):
        layer(x, reset_state=torch.zeros(1, B, H))
    with pytest.raises(ValueError, match=r"tensors \[1, 4, 5\], or \[9, 1, 4, 5\], one for each step: got \[4, 5\]"):
        layer(x, resets=RESETS, reset_state=torch.zeros(B, H))
    with pytest.raises(ValueError, match="must have the form of hx"):
        layer(x, resets=RESETS, reset_state=(torch.zeros(1, B, H),) * 2)
    with pytest.raises(ValueError, match="one state for each of 1 cells: got 2"):
        layer(x, resets=RESETS, reset_state=[torch.zeros(B, H)] * 2)
