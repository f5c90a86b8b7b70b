from __future__ import annotations

import math
import os
import random
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from bptt.flow import Diagnosis, Finding, Place
from bptt.train import Config, InputError, NonFiniteError, RunDirectory, Trainer, fit, prepare, resume, start
from bptt.train.batches import RandomWindows, Sequential
from bptt.train.distributed import begin
from bptt.train.processes import ALONE, ElsewhereError, Processes, Shared
from bptt.train.window import IGNORE

from .forked import forked
from .outcomes import run_to
from .tiny import TEXT, tiny, write_text

pytestmark = pytest.mark.slow

EXACT = {"dtype": "float64", "optimiser": "sgd", "learning_rate": 0.5, "clip": 0.3}

CASES: list[dict[str, Any]] = [
    {"cell": "rnn", "batch": 5},
    {"cell": "gru", "batch": 4, "accumulate": 3},
    {"cell": "lstm", "batch": 5, "accumulate": 2, "layers": 2},
    {"cell": "lstm", "batch": 3, "gradient": "truncated:4/2", "embedding": 0},
    {"cell": "gru", "batch": 5, "gradient": "adaptive:0.3,max=10", "adapt_every": 3},
    {"cell": "lstm", "batch": 5, "documents": "lines", "accumulate": 2, "seq_length": 7},
    {
        "cell": "gru",
        "batch": 3,
        "batching": "random",
        "seq_length": 9,
        "seed": 4,
    },  # the last batch of an epoch has one lane
]
"""Each an epoch and a half, whose last window leaves some lanes without a target."""


def configs(folder: Path) -> list[Config]:
    text, lines = write_text(folder, TEXT[:437]), folder / "lines.txt"
    lines.write_text("\n".join(TEXT[i : i + 3 + i % 17] for i in range(40)), encoding="utf-8")
    return [tiny(lines if "documents" in case else text, **EXACT, **{"seq_length": 11, **case}) for case in CASES]


def opened(config: Config, processes: Processes = ALONE) -> Trainer:
    trainer = Trainer(config, prepare(config))
    trainer.join(processes)
    return trainer


def trained(processes: Processes, configs: list[Config]) -> list[tuple[list[Any], str]]:
    """Of each run: by step the gradient, the summed NLL, the tokens and more; what it ends with; the policy in use."""
    results = []
    for config in configs:
        trainer = opened(config, processes)
        steps: list[Any] = []
        for _ in range(trainer.batches.windows(0) * 3 // 2):
            step = trainer.advance()
            gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
            steps.append((gradient, step.nll, step.tokens, step.clipped, step.epoch))
        state = trainer.state()
        carry = None if config.batching == "random" else state["carry"]
        steps.append((state["model"], carry, trainer.evaluate(trainer.task.heldout)))
        results.append((steps, state["gradient"]))
    return results


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_take_the_steps_of_one(tmp_path: Path, world: int):
    expected = trained(ALONE, configs(tmp_path))
    random = opened(configs(tmp_path)[-1]).batches
    assert random.window(0, random.windows(0) - 1).inputs.shape[1] == 1
    answers = forked(world, tmp_path, trained, configs(tmp_path))
    for answer in answers:
        for case, (one, policy), (several, their_policy) in zip(CASES, expected, answer, strict=True):
            assert their_policy == policy
            for step, (first, second) in enumerate(zip(one, several, strict=True)):
                torch.testing.assert_close(second, first, rtol=1e-9, atol=1e-12, msg=lambda m: f"{case}, {step}: {m}")  # noqa: B023  # called at once
    for answer in answers[1:]:  # the weights are the same bits everywhere
        for (one, _), (other, _) in zip(answers[0], answer, strict=True):
            torch.testing.assert_close(other[-1][0], one[-1][0], rtol=0, atol=0)
    assert all(len({tokens for _, _, tokens, *_ in steps[:-1]}) > 1 for steps, _ in expected)
    assert {clipped for steps, _ in expected for *_, clipped, _ in steps[:-1]} == {True, False}


def counted(processes: Processes, config: Config) -> tuple[int, int]:
    trainer = opened(config, processes)
    reduced = []

    def hook(group, bucket):  # torch wants no annotation, or its own
        reduced.append(bucket.index())
        return allreduce_hook(group, bucket)

    trainer.replica.register_comm_hook(None, hook)
    list(trainer.run())
    return trainer.step, len(reduced)


def test_the_gradient_is_exchanged_once_in_a_step(tmp_path: Path):
    config = tiny(write_text(tmp_path), accumulate=4, steps=7)  # 21 windows an epoch: the last step has one
    assert forked(2, tmp_path, counted, config) == [(7, 7)] * 2


@pytest.mark.parametrize("lanes", [1, 2, 3, 4, 5, 7, 32])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_lane_has_one_process(lanes: int, world: int):
    shares = [list(range(lanes)[Processes(rank, world).lanes(lanes)]) for rank in range(world)]
    assert [lane for share in shares for lane in share] == list(range(lanes))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert len(shares[0]) == max(map(len, shares))


@pytest.mark.parametrize("batches", [Sequential(torch.arange(41), 6, 4), RandomWindows(torch.arange(41), 6, 4, 0)])
def test_the_targets_of_all_processes_are_those_of_one(batches: Sequential | RandomWindows):
    for index in range(batches.windows(0)):
        whole = batches.window(0, index)
        parts = [Shared(batches, Processes(rank, 3)).window(0, index) for rank in range(3)]
        targets = sorted(t for part in parts for t in part.targets.flatten().tolist() if t != IGNORE)
        assert targets == sorted(t for t in whole.targets.flatten().tolist() if t != IGNORE)
        assert sum(part.tokens for part in parts) == whole.tokens
        assert {part.total for part in parts} == {whole.tokens}
        assert all(part.inputs.shape[1] > 0 for part in parts)


def plain(value: Any) -> Any:
    """Tensors, in whatever holds them, as numbers."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def in_parts(processes: Processes, folder: Path, config: Config) -> tuple[Any, Any]:
    whole = run_to(processes, folder / "whole", config, 9)
    run_to(processes, folder / "parts", config, 4)
    return whole, run_to(processes, folder / "parts", None, 9)


def test_a_run_of_three_processes_goes_on_bit_for_bit_and_each_draws_for_itself(tmp_path: Path):
    config = tiny(write_text(tmp_path), dropout=0.3, gradient="randomized:0.7", accumulate=2, cell="lstm")
    answers = forked(3, tmp_path, in_parts, tmp_path, config)
    for whole, parts in answers:
        assert plain(parts) == plain(whole)
    whole = answers[0][0]
    drawn = [whole["generator"], *(each["generator"] for each in whole["other_processes"])]
    assert len({bytes(state.numpy()) for state in drawn}) == 3
    first, second = RunDirectory(tmp_path / "whole"), RunDirectory(tmp_path / "parts")
    assert [m["loss"] for m in first.metrics() if m["step"] in (3, 9)] == [
        m["loss"] for m in second.metrics() if m["step"] in (3, 9)
    ]


def test_another_number_of_processes_can_go_on(tmp_path: Path):
    config = tiny(write_text(tmp_path), **EXACT)
    expected = run_to(ALONE, tmp_path / "one", config, 9)
    forked(3, tmp_path, run_to, tmp_path / "many", config, 3)
    forked(2, tmp_path, run_to, tmp_path / "many", None, 6)
    found = run_to(ALONE, tmp_path / "many", None, 9)
    torch.testing.assert_close(found["model"], expected["model"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found["carry"], expected["carry"], rtol=1e-9, atol=1e-12)


def poisoned(processes: Processes, config: Config) -> tuple[Any, ...]:
    """A step that is not finite in one lane of the second process."""
    trainer = opened(config, processes)
    trainer.advance()
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    good = trainer.carry.clone()
    if processes.rank == 1:
        trainer.carry[0, 0, 3] = math.nan
    spoilt = trainer.carry.clone()
    try:
        step = trainer.advance()
    except NonFiniteError as error:
        outcome: Any = str(error)
    else:
        outcome = step.skipped, trainer.skipped, trainer.in_a_row
    torch.testing.assert_close(trainer.model.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(trainer.carry, spoilt, rtol=0, atol=0, equal_nan=True)
    trainer.carry = good
    return outcome, None if config.on_nonfinite == "stop" else trainer.advance().skipped


@pytest.mark.parametrize("accumulate", [1, 3])
def test_what_is_not_finite_on_one_process_stops_or_skips_all(tmp_path: Path, accumulate: int):
    config = tiny(write_text(tmp_path), accumulate=accumulate, on_nonfinite="skip")
    assert forked(2, tmp_path, poisoned, config) == [((True, 1, 1), False)] * 2
    messages = forked(2, tmp_path, poisoned, config.override(on_nonfinite="stop"))
    assert messages[0] == messages[1]
    assert (
        "not finite in process 1, which counts lanes from its own first; forward: layer 0 of `recurrent`"
        in messages[0][0]
    )
    assert "lane 0" in messages[0][0]


def doubted(processes: Processes, config: Config) -> tuple[bool, str]:
    """A step whose gradient is finite, while one process finds something that is not."""
    trainer = opened(config, processes)
    found = Diagnosis((Finding.at("nan", "loss", Place(""), math.nan, "what", "advice"),))
    if processes.rank == 1:
        trainer.doctor.check = lambda *args, **kwargs: found
    return trainer.advance().skipped, trainer.take_findings()[0].message


def test_what_only_one_process_sees_counts_for_all(tmp_path: Path):
    config = tiny(write_text(tmp_path), on_nonfinite="skip")
    assert forked(2, tmp_path, doubted, config) == [(True, "loss: the model: what; advice")] * 2


def interrupted(processes: Processes, path: Path, config: Config) -> tuple[int | None, int]:
    trainer, run = begin(processes, lambda: start(config, path))

    def interrupt(step: Any) -> None:
        if step.step == 5 and processes.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    return fit(trainer, run, on_step=interrupt), trainer.step


def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path: Path):
    config = tiny(write_text(tmp_path))
    assert forked(2, tmp_path, interrupted, tmp_path / "run", config) == [(signal.SIGTERM, 5)] * 2
    assert resume(tmp_path / "run")[0].step == 5


def refused(processes: Processes, path: Path, config: Config) -> tuple[str, str]:
    with pytest.raises((InputError, ElsewhereError)) as caught:
        begin(processes, lambda: start(config, path))
    return type(caught.value).__name__, str(caught.value)


def test_an_error_of_the_first_process_is_heard_by_all(tmp_path: Path):
    first, second = forked(2, tmp_path, refused, tmp_path / "run", tiny(write_text(tmp_path), batch=5000))
    assert first[0] == "InputError"
    assert "the text is too short" in first[1]
    assert second[0] == "ElsewhereError"


def refused_late(processes: Processes, folder: Path, config: Config) -> list[tuple[str, str]]:
    """What the second process raises when it reads the text; the run of one lane, which two cannot go on with."""

    def fail(config: Config) -> Any:
        raise InputError("no such text")

    calls = [
        lambda: start(config, folder / "a" / "run"),
        lambda: start(config.override(hidden=9), folder / "old", overwrite=True),
        lambda: resume(folder / "old", steps=50),
        lambda: resume(folder / "one", steps=50),
    ]
    raised = []
    for call in calls:
        with pytest.MonkeyPatch.context() as patch:
            if processes.rank == 1 and call is not calls[-1]:
                patch.setattr("bptt.train.distributed.prepare", fail)
            with pytest.raises((InputError, ElsewhereError)) as caught:
                begin(processes, call)
        raised.append((type(caught.value).__name__, str(caught.value)))
    return raised


def test_nothing_is_written_until_all_processes_are_ready(tmp_path: Path):
    config = tiny(write_text(tmp_path), steps=7)
    for name, options in (("old", {}), ("one", {"batch": 1})):
        fit(*start(config.override(**options), tmp_path / name))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    first, second = forked(2, tmp_path, refused_late, tmp_path, config)
    assert [error for error, _ in first] == ["ElsewhereError"] * 3 + ["InputError"]
    assert first[-1][1] == "batch must be at least the number of processes, 2: got 1"
    assert second == [("InputError", "no such text")] * 3 + [("ElsewhereError", first[0][1])]
    rendezvous = tmp_path / "rendezvous-0"
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path != rendezvous}
    assert after == before
    assert not (tmp_path / "a").exists()


def draw() -> tuple[float, float]:
    return random.random(), float(np.random.rand())


def drawing(processes: Processes, folder: Path, config: Config) -> tuple[Any, Any]:
    """What callbacks draw in the steps after the fourth: of a run, and of one that was resumed there."""
    drawn: dict[str, list[Any]] = {"whole": [], "parts": []}
    for name, steps in (("whole", 7), ("parts", 4), ("parts", 7)):
        seed = processes.rank + 10 * steps * (drawn["parts"] != [])
        random.seed(seed)
        np.random.seed(seed)
        known = (folder / name).exists()
        with processes.together():
            pass
        trainer, run = begin(
            processes,
            partial(resume, folder / name, steps=steps)
            if known
            else partial(start, config.override(steps=steps), folder / name),
        )
        fit(trainer, run, on_step=lambda step, name=name: drawn[name].append(draw()))
    return drawn["whole"][4:], drawn["parts"][4:]


def test_python_s_and_numpy_s_generators_go_on_in_every_process(tmp_path: Path):
    (whole, parts), (other, other_parts) = forked(2, tmp_path, drawing, tmp_path, tiny(write_text(tmp_path)))
    assert len(whole) == 3
    assert (parts, other_parts) == (whole, other)
    assert other != whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 2}, "batch must be at least the number of processes, 3: got 2"),
        ({"device": "cuda:1"}, "device must be cuda, without a number, for several processes: got 'cuda:1'"),
        ({"device": "meta"}, "device must be cpu or cuda for several processes: got 'meta'"),
    ],
)
def test_options_for_fewer_processes_are_refused(tmp_path: Path, options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        Processes(0, 3).check(tiny(tmp_path, **options))
    ALONE.check(tiny(tmp_path, **options))
