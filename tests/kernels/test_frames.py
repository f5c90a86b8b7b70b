"""Where the columns of a sweep lie."""

from dataclasses import replace

import pytest
import torch

import bptt
from bptt import Truncated, policies
from bptt.kernels import Blocks, Columns, Frames, frames
from bptt.policies import Reach


@pytest.mark.parametrize("T", [1, 7, 23])
@pytest.mark.parametrize(("window", "every"), [(1, 1), (4, 1), (6, 4), (5, 5), (30, 1), (23, 9), (40, 7)])
def test_the_columns_that_cross_a_part_are_found_without_the_others(T, window, every):
    reach, B = Truncated(window, every=every).reach(T), 3
    if reach.every is None:
        return  # one block of all losses
    every_one = Frames.of(reach, None, T, B)
    for a in range(T):
        for b in range(a + 1, T + 1):
            got, expected = Frames.crossing(reach, T, B, a, b), every_one.within(a, b)
            assert got.R == expected.R
            for name in ("start", "lane", "first", "last", "end", "top", "arrives", "number", "offset"):
                assert torch.equal(getattr(got, name), getattr(expected, name)), name


@pytest.mark.parametrize("T", [12, 14])
@pytest.mark.parametrize("every", [None, 4])
def test_a_part_of_blocks_that_do_not_overlap_is_a_call_of_its_own(T, every):
    """Without numbers, where it begins with a block or lies in one; the columns that cross are those that go on."""
    reach, B = Reach(every, every, stops_at_start=every is not None), 3
    blocks, every_one = Blocks(reach, None, T, B), Frames.of(reach, None, T, B)
    for a in range(1, T):
        goes = ((every_one.start < a) & (every_one.top >= a)).nonzero()[:, 0]
        numbers = blocks.crossing(a)
        assert goes.tolist() == ([] if numbers is None else numbers.tolist())
        for b in range(a + 1, T + 1):
            got, expected = blocks.within(a, b), every_one.within(a, b)
            for name in ("T", "R", "start", "lane", "first", "last", "top"):
                assert torch.equal(torch.as_tensor(getattr(got, name)), torch.as_tensor(getattr(expected, name))), name
            inside = every is not None and a % every != 0 and a // every != (b - 1) // every
            assert (got.number is not None) == inside
            if not inside:  # the last column of each lane is the one that may come from a later part
                assert torch.equal(got.arrives, got.lane.where(got.top == b - a - 1, -1))


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize(("window", "every"), [(1, 1), (4, 1), (6, 4), (5, 5), (23, 9)])
@pytest.mark.parametrize("lengths", [None, [7, 23, 10]])
def test_a_final_state_is_the_start_of_one_column(
    directions: int, window: int, every: int, lengths: list[int] | None
) -> None:
    """Of each direction, in its own time: the column whose last loss is the sequence's, which begins there."""
    T, B = 23, 3
    ends = None if lengths is None else torch.tensor(lengths)
    columns = Columns.of(Reach(window, every, stops_at_start=False), ends, T, B, directions)
    for part, takes in zip(columns.frames, columns.owns_losses, strict=True):
        begin = part.arrives >= 0
        assert part.arrives[begin].sort()[0].tolist() == list(range(B))
        assert torch.equal(part.arrives[begin], part.lane[begin])
        assert (part.top[begin] == part.end[begin]).all()
        assert torch.equal(begin, (part.last == part.end) & takes)


def test_a_part_has_the_rows_of_the_columns_that_end_in_it() -> None:
    frames = Frames.of(Reach(4, 2, stops_at_start=False), torch.tensor([7, 12, 5]), 12, 3)
    for a, b in ((0, 6), (6, 9), (9, 12), (4, 8)):
        part = frames.within(a, b)
        assert part.number is not None
        ends = frames.end[part.number] < b
        assert torch.equal(part.arrives, frames.arrives[part.number].where(ends, -1))
    none = replace(frames, arrives=torch.full_like(frames.arrives, -1))
    assert (none.walks.columns[5] == -1).all()
    assert (frames.walks.columns[5] >= 0).sum() == 3


def held() -> int:
    """Bytes of the addresses that are kept."""
    found = {}
    for frame in frames._KEPT.values():
        tensors = [getattr(frame, name) for name in ("start", "lane", "first", "last", "end", "top", "arrives")]
        for tensor in (*tensors, frame.walks.columns, frame.walks.counts, frame.walks.short):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(found.values())


@pytest.mark.parametrize("policy", ["full", "chunked:3", "truncated:2", "truncated:6/2"])
def test_the_columns_kept_are_counted_as_they_are(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "_KEPT", {})
    Frames.of(policies.parse(policy).reach(50), None, 50, 4)
    [frame] = frames._KEPT.values()
    longest = 8 * (len(frame.start) - len(frame.walks.short))  # which are counted as if they were short too
    assert frame.kept_bytes - longest == held() > 0


def test_columns_of_many_lengths_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "_KEPT", {})
    for T in range(1000, 1032):
        Frames.of(Truncated(2).reach(T), None, T, 32)
        assert held() <= frames.KEPT_BYTES == 16 * 2**20
    assert T in {key[1] for key in frames._KEPT}


def test_columns_asked_for_longest_ago_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "_KEPT", {})
    reach = Truncated(2).reach(20)
    one = Frames.of(reach, None, 20, 4)
    monkeypatch.setattr(frames, "KEPT_BYTES", 3 * one.kept_bytes)
    two = Frames.of(reach, None, 21, 4)
    assert Frames.of(reach, None, 20, 4) is one
    Frames.of(reach, None, 22, 4)  # the three are too much
    assert Frames.of(reach, None, 20, 4) is one
    assert Frames.of(reach, None, 21, 4) is not two
    monkeypatch.setattr(frames, "KEPT_BYTES", one.kept_bytes - 1)
    assert Frames.of(reach, None, 23, 4) is not Frames.of(reach, None, 23, 4)


def test_small_columns_are_kept_in_bounded_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "_KEPT", {})
    monkeypatch.setattr(frames, "KEPT", 5)
    for T in range(1, 20):
        Frames.of(Reach(None, None, stops_at_start=False), None, T, 1)
    assert [key[1] for key in frames._KEPT] == [15, 16, 17, 18, 19]


def test_columns_made_in_inference_mode_serve_a_second_derivative() -> None:
    """Autograd refuses to save a tensor of inference mode, as the addresses of a recorded sweep are saved."""
    layer, x = bptt.nn.GRU(2, 3, gradient="truncated:2"), torch.randn(1, 11, 2)
    with torch.inference_mode():
        bptt.gradients(layer, x, torch.ones(1, 11, 3))
    y, _ = layer(x)
    (grad,) = torch.autograd.grad(y.square().sum(), layer.weight_hh_l0, create_graph=True)
    grad.square().sum().backward()


@pytest.mark.parametrize("policy", ["full", "truncated:2"])
def test_columns_made_inside_a_transform_outlive_it(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "_KEPT", {})
    layer, x = bptt.nn.GRU(2, 3, gradient=policy), torch.randn(11, 1, 2)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,))[0].square().sum())(parameters)
    kept = [
        getattr(f, name)
        for f in frames._KEPT.values()
        for name in ("start", "lane", "first", "last", "end", "top", "arrives")
    ]
    assert kept
    assert not any(map(torch._C._functorch.is_functorch_wrapped_tensor, kept))
