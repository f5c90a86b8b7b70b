from __future__ import annotations

import math

import pytest
import torch

from bptt.train import LanguageModel
from bptt.train.carried import detach
from bptt.train.model import unigram_perplexity


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
@pytest.mark.parametrize("embedding", [0, 3])
def test_the_state_carries_on_where_it_was(cell: str, embedding: int):
    torch.manual_seed(0)
    model = LanguageModel(7, cell=cell, hidden=5, layers=2, embedding=embedding).double()
    ids = torch.randint(7, (9, 2))
    whole, _ = model(ids)
    first, state = model(ids[:4])
    second, _ = model(ids[4:], detach(state))
    assert whole.shape == (9, 2, 7)
    torch.testing.assert_close(torch.cat([first, second]), whole)


@pytest.mark.parametrize("cell", ["rnn", "lstm"])
def test_a_detached_state_has_no_history(cell: str):
    _, state = LanguageModel(7, cell=cell, hidden=5)(torch.zeros(3, 1, dtype=torch.int64))
    detached = detach(state)
    assert not any(t.requires_grad for t in (detached if isinstance(detached, tuple) else [detached]))
    assert detach(None) is None


def test_one_hot_is_an_embedding_by_the_unit_matrix():
    torch.manual_seed(0)
    one_hot = LanguageModel(4, hidden=3)
    embedded = LanguageModel(4, hidden=3, embedding=4)
    embedded.load_state_dict({**one_hot.state_dict(), "embedding.weight": torch.eye(4)})
    ids = torch.randint(4, (5, 2))
    torch.testing.assert_close(embedded(ids)[0], one_hot(ids)[0])


def test_the_gradient_policy_reaches_the_layer():
    model = LanguageModel(4, gradient="truncated:5/2", memory="states", kernel="eager")
    assert str(model.recurrent.gradient) == "truncated:5/2"
    assert (model.recurrent.memory, model.recurrent.kernel) == ("states", "eager")


def test_unigram_perplexity_of_a_fair_die_is_its_sides():
    assert math.isclose(unigram_perplexity([5] * 6, [torch.arange(6), torch.arange(6).repeat(2)]), 6)


def test_a_token_training_never_saw_costs_something_finite():
    assert math.isfinite(unigram_perplexity([0, 10], [torch.tensor([0, 0])]))
