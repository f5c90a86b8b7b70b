from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from bptt.train import InputError, Lanes, NonFiniteError, Trainer, prepare
from bptt.train.network import build_model
from bptt.train.packing import Packing
from bptt.train.records import perplexity

from .tiny import tiny, write_text

FROZEN = {"optimiser": "sgd", "learning_rate": 1e-300, "dtype": "float64", "clip": 0}


def trainer(folder: Path, **options: object) -> Trainer:
    config = tiny(write_text(folder), **options)
    return Trainer(config, prepare(config))


def test_held_out_text_is_read_in_one_lane_as_one_sequence(tmp_path: Path):
    t = trainer(tmp_path, batch=1, dtype="float64")
    ids = t.task.heldout
    with torch.no_grad():
        logits, _ = t.model.eval()(ids[:-1, None])
    expected = cross_entropy(logits[:, 0], ids[1:])  # the mean over len(ids) - 1 predictions
    assert math.isclose(t.evaluate(ids), float(expected), rel_tol=1e-12)


def test_evaluation_does_not_depend_on_the_window(tmp_path: Path):
    losses = []
    for length in (1, 7, 1000):
        t = trainer(tmp_path, seq_length=length, dtype="float64")
        losses.append(t.evaluate(t.task.heldout))
    assert math.isclose(losses[0], losses[1], rel_tol=1e-12)
    assert math.isclose(losses[0], losses[2], rel_tol=1e-12)


@pytest.mark.parametrize("cell", ["rnn", "lstm"])
def test_an_epoch_carries_the_state_and_counts_every_token(tmp_path: Path, cell: str):
    t = trainer(tmp_path, epochs=1, cell=cell, **FROZEN)
    steps = list(t.run())
    tokens = sum(step.tokens for step in steps)
    assert tokens == len(t.task.train) - 1
    assert len(steps) == t.total == t.step
    assert math.isclose(sum(step.nll for step in steps) / tokens, t.evaluate(t.task.train), rel_tol=1e-12)


def test_random_windows_start_from_a_fresh_state(tmp_path: Path):
    t = trainer(tmp_path, batching="random", **FROZEN)
    for index in range(3):
        window = t.batches.window(0, index)
        with torch.no_grad():
            logits, _ = t.model(window.inputs)
        expected = cross_entropy(logits.flatten(0, 1), window.targets.flatten(), reduction="sum")
        assert math.isclose(t.advance().nll, float(expected), rel_tol=1e-12)


def test_a_token_of_the_shorter_last_window_weighs_the_same(tmp_path: Path):
    t = trainer(tmp_path, epochs=1, **FROZEN)
    while t.index < t.batches.windows(0) - 1:
        t.advance()
    window, carry = t.batches.window(0, t.index), t.carry
    assert window.tokens < t.batches.full == 4 * 10
    t.advance()
    logits, _ = t.model(window.inputs, carry)
    loss = cross_entropy(logits.flatten(0, 1), window.targets.flatten(), reduction="sum") / 40
    for parameter, expected in zip(
        t.model.parameters(), torch.autograd.grad(loss, list(t.model.parameters())), strict=True
    ):
        torch.testing.assert_close(parameter.grad, expected)


def test_a_record_is_the_token_weighted_mean_since_the_last(tmp_path: Path):
    t = trainer(tmp_path)
    steps = [t.advance() for _ in range(5)]
    record = t.record(heldout=True)
    assert (record.step, record.steps) == (5, 5)
    assert math.isclose(record.loss, sum(s.nll for s in steps) / sum(s.tokens for s in steps))
    assert record.perplexity == math.exp(record.loss)
    assert record.heldout_loss == t.evaluate(t.task.heldout)
    assert math.isclose(record.grad_norm, sum(s.grad_norm for s in steps) / 5)
    step = t.advance()
    assert math.isclose(t.record(heldout=False).loss, step.nll / step.tokens)


@pytest.mark.parametrize("batching", ["sequential", "random"])
def test_the_perplexity_of_an_epoch_is_over_all_its_tokens_and_no_others(tmp_path: Path, batching: str):
    t = trainer(tmp_path, epochs=2, batching=batching)
    seen: list[float | None] = []
    steps = []
    for step in t.run():
        steps.append(step)
        seen.append(t.record(heldout=False).epoch_perplexity)

    def whole(first: int, last: int) -> float:
        return math.exp(sum(s.nll for s in steps[first:last]) / sum(s.tokens for s in steps[first:last]))

    one, two = t.batches.windows(0), t.batches.windows(1)
    assert seen == [None] * (one - 1) + [whole(0, one)] * two + [whole(one, one + two)]
    assert seen[0] != seen[-1]


def test_clipping_bounds_the_update_and_is_counted(tmp_path: Path):
    t = trainer(tmp_path, optimiser="sgd", learning_rate=1.0, clip=0.01, dtype="float64")
    before = torch.nn.utils.parameters_to_vector(t.model.parameters()).clone()
    step = t.advance()
    after = torch.nn.utils.parameters_to_vector(t.model.parameters())
    assert step.clipped
    assert step.grad_norm > 0.01
    torch.testing.assert_close((after - before).norm(), torch.tensor(0.01, dtype=torch.float64), rtol=1e-3, atol=0)
    assert t.record(heldout=False).clipped == 1.0
    assert not trainer(tmp_path, clip=0).advance().clipped
    assert not trainer(tmp_path, clip=1e6).advance().clipped


def test_a_loss_that_is_not_finite_stops_with_the_weights_untouched(tmp_path: Path):
    t = trainer(tmp_path)
    t.advance()
    with torch.no_grad():
        t.model.output.bias[0] = math.nan
    before = {name: value.clone() for name, value in t.model.state_dict().items()}
    found = r"step 2: loss nan, gradient norm nan: not finite; forward: `output`: `output\.bias` holds NaN in row 0; go"
    with pytest.raises(NonFiniteError, match=found):
        t.advance()
    torch.testing.assert_close(t.model.state_dict(), before, equal_nan=True, rtol=0, atol=0)
    assert t.step == 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cell": "lstm", "layers": 2, "dropout": 0.3},
        {"cell": "rnn", "nonlinearity": "relu", "optimiser": "sgd", "learning_rate": 0.1, "embedding": 0},
        {"gradient": "randomized:0.7", "batching": "random"},
        {"gradient": "truncated:4/2", "dtype": "float64", "memory": "states"},
    ],
)
def test_twenty_steps_are_ten_and_ten_bit_for_bit(tmp_path: Path, options: dict[str, object]):
    whole = trainer(tmp_path, **options)
    steps = [s.nll for s in whole.run()]

    first = trainer(tmp_path, **options)
    firsts = [first.advance().nll for _ in range(10)]
    torch.save(first.state(), tmp_path / "state")
    torch.rand(3)  # what happens in between must not matter
    second = trainer(tmp_path, **options)
    second.restore(torch.load(tmp_path / "state", weights_only=True))
    seconds = [s.nll for s in second.run()]

    assert firsts + seconds == steps
    torch.testing.assert_close(second.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


def test_the_seed_decides_everything(tmp_path: Path):
    runs = [[s.nll for s in trainer(tmp_path, seed=seed, steps=5).run()] for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_epochs_or_steps_end_the_run(tmp_path: Path):
    t = trainer(tmp_path, epochs=2)
    last = list(t.run())[-1]
    assert (last.epoch, last.step) == (2, 2 * t.batches.windows(0))
    assert trainer(tmp_path, steps=7).total == 7
    random = trainer(tmp_path, epochs=3, batching="random")
    assert len(list(random.run())) == random.total


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
@pytest.mark.parametrize("tokens", ["char", "word"])
def test_a_repeated_sentence_is_learned(tmp_path: Path, cell: str, tokens: str):
    t = trainer(tmp_path, cell=cell, tokens=tokens, hidden=16, steps=60, learning_rate=0.02)
    start = t.evaluate(t.task.heldout)
    list(t.run())
    assert t.evaluate(t.task.heldout) < start / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 1000}, "the text is too short: 810 tokens to train on, batch=1000 lanes need at least 1001"),
        ({"seq_length": 500, "batching": "random"}, "random windows need at least 1000"),
        ({"limit": 5, "heldout": 0.2}, "heldout=0.2 of 5 tokens leaves 1 held-out tokens, at least 2 are needed"),
    ],
)
def test_a_text_too_short_is_refused(tmp_path: Path, options: dict[str, object], message: str):
    with pytest.raises(InputError, match=message):
        trainer(tmp_path, **options)


def test_without_held_out_text_nothing_is_measured(tmp_path: Path):
    t = trainer(tmp_path, heldout=0, limit=300)
    assert len(t.task.train) == 300
    t.advance()
    assert t.record(heldout=True).heldout_perplexity is None


def test_the_vocabulary_comes_from_the_training_text(tmp_path: Path):
    config = tiny(write_text(tmp_path, "ab" * 90 + "z" * 20))
    dataset = prepare(config)
    assert dataset.vocabulary.tokens == ("<unk>", "a", "b")
    assert dataset.heldout.tolist() == [0] * 20


@pytest.mark.parametrize("device", ["cuda:99", "meta", "vulkan", "hpu"])
def test_a_device_that_is_not_there_is_an_input_error(tmp_path: Path, device: str):
    message = rf"^device must be a torch device that is there: got '{device}' \(\S.*\)$"
    with pytest.raises(InputError, match=message) as caught:
        build_model(tiny(tmp_path, device=device), 5)
    assert "\n" not in str(caught.value)


def test_perplexity_overflows_to_infinity():
    assert perplexity(1e5) == math.inf


def test_a_later_epoch_is_laid_out_once_not_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    packed: list[int] = []
    pack = Lanes._pack

    def counted(self: Lanes, epoch: int) -> Packing:
        packed.append(epoch)
        return pack(self, epoch)

    monkeypatch.setattr(Lanes, "_pack", counted)
    text = tmp_path / "lines.txt"
    text.write_text("a line of some words\n" * 40, encoding="utf-8")
    config = tiny(text, documents="lines", heldout=0.0, epochs=3, seq_length=5, batch=2)
    t = Trainer(config, prepare(config))
    steps = list(t.run())
    assert len(steps) > 100
    assert len(packed) <= 2 * 3 + 1  # to count the windows of each epoch, and to read them
    assert t.total == len(steps)


def test_how_many_steps_there_will_be_is_told_at_once(tmp_path: Path):
    for options in ({}, {"batching": "random"}, {"accumulate": 3}):
        t = trainer(tmp_path, epochs=10**9, **options)
        assert t.total > 10**9
        windows = t.batches.windows(0)
        assert t.total == 10**9 * -(-windows // t.config.accumulate)


@pytest.mark.parametrize("change", ["no model", "no carry", "position", "meter"])
def test_a_state_of_something_else_is_refused(tmp_path: Path, change: str):
    t = trainer(tmp_path)
    state = t.state()
    if change.startswith("no "):
        del state[change[3:]]
    else:
        state[change] = {"what": 1}
    with pytest.raises(InputError, match="the checkpoint is not one of this program: "):
        trainer(tmp_path).restore(state)


def test_a_budget_below_a_step_is_refused_before_anything_is_run(tmp_path: Path):
    with pytest.raises(InputError, match=r"memory=checkpoints:bytes=1: bytes must hold the tape of a step, .*: got 1"):
        trainer(tmp_path, memory="checkpoints:bytes=1")


def test_the_learning_rate_follows_its_schedule_also_in_a_resumed_run(tmp_path: Path):
    """A step of plain descent moves by the rate; a run gone on with in its middle takes the same ones."""
    options = {"schedule": "linear", "warmup": 3, "steps": 8, "optimiser": "sgd", "clip": 0.0, "dtype": "float64"}
    t, again, rates = trainer(tmp_path, **options), trainer(tmp_path, **options), []
    for number in range(8):
        if number == 5:
            again.restore(t.state())
        before = t.model.output.weight.detach().clone()
        t.advance()
        gradient = t.model.output.weight.grad
        moved = before - t.model.output.weight.detach()
        rates.append(float(moved.norm() / gradient.norm()) / t.config.learning_rate)
        if number >= 5:
            again.advance()
            assert torch.equal(again.model.output.weight, t.model.output.weight)
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 1, 0.8, 0.6, 0.4, 0.2], rel=1e-9)
    with pytest.raises(InputError, match="warmup must be less than steps=8: got 8"):
        trainer(tmp_path, steps=8, warmup=8)
