"""A batch in pieces along time."""

from typing import NamedTuple

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from bptt.adaptors.pieces import Piece, detached, split, started

T, B = 10, 3


class Named(NamedTuple):
    x: torch.Tensor
    n: torch.Tensor
    words: str


@pytest.mark.parametrize("time", [0, 1])
def test_tensors_are_cut_along_time(time):
    x, y = torch.randn(B, T, 2), torch.randn(B, T)
    if time == 0:
        x, y = x.transpose(0, 1), y.transpose(0, 1)
    pieces = split((x, [y, "text", torch.tensor(3)]), 4, time=time)
    assert [piece.steps for piece in pieces] == [4 * B, 4 * B, 2 * B]
    assert all(piece.lanes is None for piece in pieces)
    torch.testing.assert_close(torch.cat([piece.batch[0] for piece in pieces], time), x)
    torch.testing.assert_close(torch.cat([piece.batch[1][0] for piece in pieces], time), y)
    assert pieces[2].batch[1][1:] == ["text", torch.tensor(3)]
    assert pieces[0].batch[0].data_ptr() == x.data_ptr(), "a view"


@pytest.mark.parametrize("kind", ["dict", "tuple", "named"])
def test_lanes_leave_as_they_end(kind):
    x, lengths, label = torch.randn(B, T, 2), torch.tensor([3, 10, 7]), torch.tensor([1, 2, 3])
    batch, where = {
        "dict": ({"x": x, "n": lengths, "label": label}, "n"),
        "tuple": ((x, lengths, label), 1),
        "named": (Named(x, lengths, "a"), "n"),
    }[kind]
    pieces = split(batch, 4, lengths=where)
    assert [piece.steps for piece in pieces] == [3 + 4 + 4, 4 + 3, 2]
    assert [None if p.lanes is None else p.lanes.tolist() for p in pieces] == [None, [1, 2], [0]]
    inside = [piece.batch[where] if kind != "named" else piece.batch.n for piece in pieces]
    assert [n.tolist() for n in inside] == [[3, 4, 4], [4, 3], [2]]
    assert inside[0].dtype == lengths.dtype
    first = pieces[1].batch["x"] if kind == "dict" else pieces[1].batch[0]
    torch.testing.assert_close(first, x[[1, 2], 4:8])
    if kind == "dict":
        assert pieces[2].batch["label"].tolist() == [2]
    if kind == "named":
        assert isinstance(pieces[0].batch, Named)
        assert pieces[0].batch.words == "a"


def test_what_is_past_the_longest_is_no_piece():
    pieces = split((torch.randn(B, T), torch.tensor([0, 4, 5])), 4, lengths=1)
    assert [piece.steps for piece in pieces] == [8, 1]
    assert [p.lanes.tolist() for p in pieces] == [[1, 2], [1]]
    assert pieces[1].batch[0].shape == (1, 1)


@pytest.mark.parametrize("first", [False, True])
def test_packed_sequences_are_packed_again(first):
    x, lengths = torch.randn(B, T, 2), torch.tensor([3, 10, 7])
    x = x if first else x.transpose(0, 1)
    packed = pack_padded_sequence(x, lengths, first, enforce_sorted=False)
    pieces = split((packed, torch.randn(x.shape[:2])), 4, time=int(first))
    assert [piece.steps for piece in pieces] == [11, 7, 2]
    assert all(isinstance(piece.batch[0], PackedSequence) for piece in pieces)
    y, n = pad_packed_sequence(pieces[1].batch[0], batch_first=True)
    assert n.tolist() == [4, 3]
    whole = x if first else x.transpose(0, 1)
    torch.testing.assert_close(y[0], whole[1, 4:8])
    torch.testing.assert_close(y[1, :3], whole[2, 4:7])


def test_states():
    h = torch.randn(2, B, 5, requires_grad=True)
    state = detached(({"h": h * 1, "more": [h * 1, None]}, h * 1))
    assert not any(t.requires_grad for t in (state[0]["h"], state[0]["more"][0], state[1]))
    one = started(state, Piece(None, torch.tensor([0, 2]), 4))
    torch.testing.assert_close(one[0]["h"], h[:, [0, 2]].detach())
    assert one[0]["more"][1] is None
    assert started(state, Piece(None, None, 4)) is state
    torch.testing.assert_close(started(h[0], Piece(None, torch.tensor([2]), 4), 0), h[0, [2]])
    with pytest.raises(ValueError, match=r"state must have its lanes at dimension 1 of every tensor: got \(5,\)"):
        started(torch.zeros(5), Piece(None, torch.tensor([1]), 4))


@pytest.mark.parametrize(
    ("batch", "options", "words"),
    [
        ((torch.zeros(3, 10), torch.zeros(3, 9)), {}, "9 steps of 3 lanes and 10 steps of 3 lanes"),
        (torch.zeros(3), {}, "none in Tensor"),
        (torch.zeros(3, 10), {"steps": 0}, "steps must be a whole number of at least 1: got 0"),
        (torch.zeros(3, 10), {"time": 2}, "time must be 0 or 1"),
        ({"x": torch.zeros(3, 10)}, {"lengths": "n"}, "position or key of the batch, a dict: got 'n'"),
        ((torch.zeros(3, 10), torch.zeros(3)), {"lengths": 1}, r"integer tensor of 3 lanes: got torch.float32 \(3,\)"),
        ((torch.zeros(3, 10), torch.tensor([1, 2, 11])), {"lengths": 1}, r"from 0 to 10, not all of them 0"),
        ((torch.zeros(3, 10), torch.tensor([0, 0, 0])), {"lengths": 1}, "not all of them 0"),
    ],
)
def test_what_cannot_be_cut(batch, options, words):
    with pytest.raises(ValueError, match=words):
        split(batch, options.pop("steps", 4), **options)


def test_lengths_must_agree():
    x = torch.zeros(3, 10)
    packed = pack_padded_sequence(x, torch.tensor([10, 5, 5]), True)
    with pytest.raises(ValueError, match=r"one length for each lane: got \[10, 5, 5\] and \[10, 4, 4\]"):
        split((packed, torch.tensor([10, 4, 4])), 4, lengths=1)
