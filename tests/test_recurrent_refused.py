"""What `bptt.nn.Recurrent` refuses, with errors that name the argument; and what makes an ambiguous call clear."""

from typing import Any

import pytest
import torch
from sweeps import Agree
from torch import Tensor, nn

import bptt

T, B, I, H = 7, 3, 2, 4
DOUBLE = torch.float64

X = torch.zeros(T, B, I)


def jagged(layout: torch.layout = torch.jagged) -> Tensor:
    return torch.nested.nested_tensor([torch.zeros(n, I) for n in (3, 2)], layout=layout)


def plain(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return h + x, h


def gru(**kw: Any) -> bptt.nn.Recurrent:
    return bptt.nn.Recurrent(nn.GRUCell(I, H), **kw)


def both_ways() -> bptt.nn.Recurrent:
    """Two layers in both directions, with blocks that overlap."""
    return bptt.nn.Recurrent(lambda n: nn.GRUCell(2 * H if n else I, H), 2, bidirectional=True, gradient="truncated:3")


class NoState(nn.Module):
    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        return x + state.sum()


class Indexed(nn.Module):
    """Takes a tensor for a state, too, as rows that broadcast."""

    hidden_size = H

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTMCell(I, H, dtype=DOUBLE)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.inner(x)[0] + state[0]), torch.sin(self.inner(x)[1] + state[1])


class Ambiguous(nn.Module):
    """(h, c), or an output and a state."""

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        first = x.mean() if state is None else state[0].mean()
        return x + first, x - first


class Number(nn.Module):
    def initial_state(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, H)

    def forward(self, x: Tensor, h: Tensor) -> tuple[int, Tensor]:
        return 3, h


class Noisy(nn.Module):
    """A cell that draws random numbers."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.cell = nn.GRUCell(2 * H if n else I, H)

    def initial_state(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, H)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return nn.functional.dropout(self.cell(x, h), 0.5)


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "cell": (
        lambda: bptt.nn.Recurrent(3),
        TypeError,
        "cell must be a module, a list of modules or a function: got int",
    ),
    "made": (lambda: bptt.nn.Recurrent(lambda n: n), TypeError, "cell must be, hold or return .*got a int"),
    "one": (lambda: gru(num_layers=2), ValueError, "cell must be a list of 2 modules, or a function"),
    "one_bidirectional": (lambda: gru(bidirectional=True), ValueError, "cell must be a list of 2 modules"),
    "list": (
        lambda: bptt.nn.Recurrent([nn.GRUCell(I, H)] * 3, bidirectional=True),
        ValueError,
        "cell, a list, must hold some modules, one for each layer and direction: got 3",
    ),
    "layers": (lambda: gru(num_layers=0), ValueError, "num_layers must be at least 1: got 0"),
    "layers_kind": (lambda: gru(num_layers=1.5), TypeError, "num_layers must be a whole number or None: got 1.5"),
    "dropout": (lambda: gru(dropout=2), ValueError, "dropout must be a probability from 0 to 1: got 2"),
    "dropout_alone": (lambda: gru(dropout=0.5), ValueError, "dropout must be 0 for one layer"),
    "form": (lambda: gru(form="h"), ValueError, "form must be one of 'auto', 'state', 'pair', 'spread': got 'h'"),
    "reverse": (lambda: gru(reverse=True, bidirectional=True), ValueError, "reverse must be False"),
    "gradient": (lambda: gru(gradient="most"), ValueError, "most"),
    "memory": (lambda: gru(memory="gates"), ValueError, "memory must be 'auto', 'states' or Checkpoints"),
    "kernel": (lambda: gru(kernel="cpu"), ValueError, "kernel must be one of 'auto', 'interpreter', .*: got 'cpu'"),
    "input": (lambda: gru()([1.0]), TypeError, "input must be a Tensor or a PackedSequence: got list"),
    "input_dims": (lambda: gru()(torch.zeros(3)), ValueError, r"at least 2 dimensions: got \[3\]"),
    "input_sparse": (
        lambda: gru()(X.to_sparse()),
        TypeError,
        "input must be a dense tensor: .* sparse_coo",
    ),
    "scan_jagged": (
        lambda: bptt.scan(plain, X[0], jagged()),
        TypeError,
        "got a nested tensor, which bptt.nn.Recurrent",
    ),
    "scan_packed": (
        lambda: bptt.scan(plain, X[0], nn.utils.rnn.pack_sequence([X[:, 0]])),
        TypeError,
        r"xs must hold tensors \[T, ...\]: got a PackedSequence",
    ),
    "features": (
        lambda: gru()(torch.zeros(T, B, 9)),
        TypeError,
        "a GRUCell, must return .*inconsistent input_size",
    ),
    "no_steps": (lambda: gru()(X[:0]), ValueError, "input must have at least one step"),
    "lengths": (lambda: gru()(X, lengths=[7, 8, 1]), ValueError, r"between 1 and input's 7 steps: got \[7, 8, 1\]"),
    "lengths_zero": (lambda: gru()(X, lengths=[7, 0, 1]), ValueError, "lengths must lie between 1"),
    "lengths_count": (lambda: gru()(X, lengths=[7]), ValueError, "one entry for each of 3 lanes"),
    "lengths_kind": (lambda: gru()(X, lengths=torch.ones(3)), TypeError, "lengths must be whole numbers"),
    "lengths_packed": (
        lambda: gru()(nn.utils.rnn.pack_sequence([X[:, 0]]), lengths=[7]),
        ValueError,
        "lengths must be None for a PackedSequence",
    ),
    "resets": (lambda: gru()(X, resets=torch.zeros(T, B)), TypeError, "resets must be a bool tensor"),
    "resets_shape": (lambda: gru()(X, resets=torch.zeros(B, T).bool()), ValueError, r"resets must have shape \(7, 3\)"),
    "hx": (lambda: gru()(X, 3.0), TypeError, r"hx must hold tensors \[1, 3, ...\]"),
    "hx_shape": (
        lambda: gru()(X, torch.zeros(2, B, H)),
        ValueError,
        r"hx must hold .*\[2, 3, 4\]",
    ),
    "hx_lanes": (lambda: gru()(X, torch.zeros(1, 2, H)), ValueError, r"hx must hold tensors \[1, 3, ...\]"),
    "hx_list": (lambda: gru()(X, [X, X]), ValueError, "hx, a list, must hold one state for each of 1 cells: got 2"),
    "hx_empty": (lambda: gru()(X, ()), TypeError, "hx must hold tensors, or be None"),
    "hx_kind": (lambda: gru()(X, (torch.zeros(1, B, H),) * 2), TypeError, "a GRUCell, must return its new state"),
    "no_state": (lambda: bptt.nn.Recurrent(NoState())(X), TypeError, "is given hx"),
    "ambiguous": (lambda: bptt.nn.Recurrent(Ambiguous())(X), ValueError, "several ways.*Say which, by form='state'"),
    "indexed": (lambda: bptt.nn.Recurrent(Indexed())(X.double()), ValueError, "can be called in several ways"),
    "output": (lambda: bptt.nn.Recurrent(Number())(X), TypeError, r"must put out a tensor \[B, ...\]: got int"),
    "learned": (
        lambda: bptt.nn.Recurrent(Ambiguous(), learn_initial_state=True),
        ValueError,
        "learn_initial_state must be False, or cell 0 must tell the shape of its state.*got a Ambiguous",
    ),
    "overlap": (
        lambda: bptt.nn.Recurrent(lambda n: Noisy(n), 2, bidirectional=True, gradient="truncated:3")(X),
        NotImplementedError,
        "'truncated:3' has blocks that overlap, .* must not draw random numbers",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    call, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        call()


def test_a_form_that_is_said(agree: Agree) -> None:
    x = torch.randn(T, B, H, dtype=DOUBLE)
    for form in ("state", "pair"):
        y, state = bptt.nn.Recurrent(Ambiguous(), form=form)(x)
        cell, s, ys = Ambiguous(), None, []
        for x_t in x:
            result = cell(x_t, s)
            s = result if form == "state" else result[1]
            ys.append(result[0])
        agree(y, torch.stack(ys))
        agree(state, tuple(t[None] for t in s) if form == "state" else s[None])
    indexed, x = Indexed(), torch.randn(T, B, I, dtype=DOUBLE)
    assert bptt.nn.Recurrent(indexed, form="state")(x)[0].shape == (T, B, H)


def test_overlapping_blocks_without_a_gradient() -> None:
    layer = both_ways()
    with torch.no_grad():
        assert layer(X)[0].shape == (T, B, 2 * H)
    assert layer(X[:3])[0].shape == (3, B, 2 * H)
