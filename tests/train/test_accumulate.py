from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from bptt.train import NonFiniteError, Trainer, prepare
from bptt.train.window import IGNORE

from .tiny import tiny, write_text

EXACT = {"dtype": "float64", "optimiser": "sgd", "learning_rate": 0.5, "clip": 0}


def trainer(folder: Path, **options: object) -> Trainer:
    config = tiny(write_text(folder), **options)
    return Trainer(config, prepare(config))


@pytest.mark.parametrize("batching", ["sequential", "random"])
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_the_gradient_of_a_step_is_that_of_its_windows_by_tokens(tmp_path: Path, cell: str, batching: str):
    t = trainer(tmp_path, accumulate=8, epochs=1, cell=cell, batching=batching, **EXACT)
    windows, full = t.batches.windows(0), t.batches.full
    assert windows % 8 != 0
    while not t.finished:
        first, state, carry = t.index, {k: v.clone() for k, v in t.model.state_dict().items()}, t.carry
        step = t.advance()
        got = [p.grad.clone() for p in t.model.parameters()]
        after = t.model.state_dict()

        twin = trainer(tmp_path, cell=cell, **EXACT).model
        twin.load_state_dict(state)
        loss, tokens = torch.zeros((), dtype=torch.float64), 0
        for index in range(first, min(first + 8, windows)):
            window = t.batches.window(0, index)
            logits, carry = twin(window.inputs, None if window.fresh else carry)
            carry = carry.detach() if isinstance(carry, torch.Tensor) else tuple(s.detach() for s in carry)
            targets = window.targets.flatten()
            loss = loss + cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORE, reduction="sum")
            tokens += int((targets != IGNORE).sum())
        assert step.tokens == tokens
        assert math.isclose(step.nll, loss.item(), rel_tol=1e-12)
        expected = torch.autograd.grad(loss / (8 * full), list(twin.parameters()))
        torch.testing.assert_close(got, list(expected))
        for name, weight, gradient in zip(after, twin.parameters(), expected, strict=True):
            torch.testing.assert_close(after[name], weight - 0.5 * gradient)
    assert (t.step, t.total, t.epoch) == (-(-windows // 8),) * 2 + (1,)


def test_more_windows_than_an_epoch_has_weigh_as_those_there_are(tmp_path: Path):
    steps = []
    for accumulate in (21, 1000):
        t = trainer(tmp_path, accumulate=accumulate, epochs=2, **EXACT)
        assert t.batches.windows(0) == 21
        steps.append([(s.nll, s.tokens, s.grad_norm) for s in t.run()])
    assert len(steps[0]) == 2
    assert steps[0] == steps[1]


def test_it_goes_on_bit_for_bit(tmp_path: Path):
    options = {"accumulate": 3, "dropout": 0.2, "gradient": "randomized:0.8", "steps": 9}
    whole = trainer(tmp_path, **options)
    steps = [s.nll for s in whole.run()]
    first = trainer(tmp_path, **options)
    firsts = [first.advance().nll for _ in range(4)]
    state = first.state()
    second = trainer(tmp_path, **options)
    second.restore(state)
    assert firsts + [s.nll for s in second.run()] == steps


def test_what_is_not_finite_in_an_earlier_window_is_found_there(tmp_path: Path):
    t = trainer(tmp_path, accumulate=3)
    t.advance()
    t.carry[0, 2, 3] = math.nan  # of the first window of the next step
    with pytest.raises(NonFiniteError, match=r"step 2: .* layer 0 of `recurrent`, .*lane 2.*initial state"):
        t.advance()
