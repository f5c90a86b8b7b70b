"""The gradient on lanes is that of each document alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import count

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bptt.train import Lanes, LanguageModel
from bptt.train.carried import detach
from bptt.train.window import IGNORE

SIZES = [7, 2, 12, 1, 5, 0, 9, 3]


VOCABULARY = 11


def random_documents() -> list[Tensor]:
    return [torch.randint(VOCABULARY, (size,)) for size in SIZES]


def model(cell: str, gradient: str = "full") -> LanguageModel:
    return LanguageModel(VOCABULARY, cell=cell, layers=2, hidden=5, embedding=3, gradient=gradient).double()


def gradient_on_lanes(net: LanguageModel, lanes: Lanes) -> dict[str, Tensor]:
    """Summed over the windows of an epoch, the state carried and cut off between them, as a trainer does it."""
    state = None
    for window in lanes:
        logits, state = net(window.inputs, None if window.fresh else state, window.resets)
        cross_entropy(logits.flatten(0, 1), window.targets.flatten(), ignore_index=IGNORE, reduction="sum").backward()
        state = detach(state)
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def gradient_alone(net: LanguageModel, document: Tensor, cuts: Sequence[int]) -> None:
    """Add the gradient of one document in a batch of one: no packing, no resets, cut off before the steps `cuts`."""
    state = None
    for start, stop in zip([0, *cuts], [*cuts, len(document) - 1], strict=True):
        logits, state = net(document[start:stop, None], state)
        cross_entropy(logits[:, 0], document[start + 1 : stop + 1], reduction="sum").backward()
        state = detach(state)


def starts(documents: list[Tensor], B: int) -> list[int]:
    """The step at which each document begins: it goes to the lane that is free first. A simulation step by step."""
    begins, left, waiting = [-1] * len(documents), [0] * B, [d for d, ids in enumerate(documents) if len(ids) >= 2]
    for t in count():
        for lane in range(B):
            if left[lane] == 0 and waiting:
                d = waiting.pop(0)
                begins[d], left[lane] = t, len(documents[d]) - 1
        if not any(left):
            return begins
        left = [max(n - 1, 0) for n in left]
    raise AssertionError


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
@pytest.mark.parametrize("B", [1, 2, 3, 10])
def test_one_window_gives_the_gradient_of_each_document_alone(cell: str, B: int, agree):
    documents, net = random_documents(), model(cell)
    alone = copy.deepcopy(net)
    lanes = Lanes(documents, B, 100)
    assert lanes.windows(0) == 1
    for document in documents:
        if len(document) >= 2:
            gradient_alone(alone, document, [])
    agree(gradient_on_lanes(net, lanes), {name: p.grad for name, p in alone.named_parameters()})


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
@pytest.mark.parametrize(("B", "T"), [(1, 4), (2, 3), (3, 1), (3, 5)])
def test_windows_give_the_gradient_of_each_document_alone_cut_where_they_end(cell: str, B: int, T: int, agree):
    documents, net = random_documents(), model(cell)
    alone = copy.deepcopy(net)
    lanes = Lanes(documents, B, T)
    assert lanes.windows(0) > 2
    for document, start in zip(documents, starts(documents, B), strict=True):
        if start >= 0:
            gradient_alone(alone, document, [t for t in range(1, len(document) - 1) if (start + t) % T == 0])
    agree(gradient_on_lanes(net, lanes), {name: p.grad for name, p in alone.named_parameters()})


def test_ranks_add_up_to_the_gradient_of_one_process(agree):
    documents, net = random_documents(), model("lstm")
    expected = gradient_on_lanes(copy.deepcopy(net), Lanes(documents, 5, 4))
    for rank in range(3):
        gradient = gradient_on_lanes(net, Lanes(documents, 5, 4, rank=rank, world=3))
    agree(gradient, expected)  # net has added up those of all ranks


def test_without_resets_the_gradient_is_another_one():
    documents, net = random_documents(), model("gru")
    expected = gradient_on_lanes(copy.deepcopy(net), Lanes(documents, 2, 100))
    window = Lanes(documents, 2, 100).window(0, 0)
    logits, _ = net(window.inputs)
    cross_entropy(logits.flatten(0, 1), window.targets.flatten(), ignore_index=IGNORE, reduction="sum").backward()
    name = "recurrent.weight_hh_l0"
    assert not torch.allclose(net.get_parameter(name).grad, expected[name], rtol=1e-3)
