"""Series: what is read, what is refused, what is measured; and all that holds for text holds for them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from bptt.train import Config, InputError, RunDirectory, Series, Step, Trainer, fit, prepare, record_run, resume, start
from bptt.train.config import TASKS as NAMES
from bptt.train.forecasting import forecast
from bptt.train.processes import ALONE, Processes, Shared
from bptt.train.scaling import Scaling
from bptt.train.streams import Streams
from bptt.train.tables import read_table
from bptt.train.tasks import TASKS
from bptt.train.trained import load

from .forked import forked
from .outcomes import assert_same, outcome


def rows(n: int = 90, groups: str = "ab") -> str:
    """Two waves with a gap now and then, and a column of its own drive."""
    lines = ["when,who,y,z"]
    for k, who in enumerate(groups):
        for t in range(n - 10 * k):
            y = "" if t % 17 == 5 else f"{math.sin(0.4 * t + k) + 0.01 * t:.6f}"
            lines.append(f"{2000 + t},{who},{y},{math.cos(0.3 * t):.6f}")
    return "\n".join(lines) + "\n"


def config(folder: Path, text: str | None = None, **options: Any) -> Config:
    file = folder / "data.csv"
    file.write_text(rows() if text is None else text)
    given: dict[str, Any] = {"target": "y", "inputs": "z", "time": "when", "group": "who", "horizon": 3, "season": 4}
    given |= {"cell": "gru", "hidden": 7, "batch": 3, "seq_length": 11, "steps": 9, "threads": 1, "heldout": 0.2}
    given |= {"log_every": 2, "eval_every": 4, "save_every": 3}
    return Config(series=str(file), **given | options)


def test_the_registry_has_the_names_that_options_know() -> None:
    assert tuple(TASKS) == NAMES
    assert all(task.name == name for name, task in TASKS.items())


@pytest.mark.parametrize("options", [{"tokens": "char"}, {"embedding": 64}, {"batching": "sequential"}])
def test_an_option_of_another_task_is_refused_also_where_it_is_the_default(tmp_path: Path, options: dict[str, Any]):
    [name] = options
    with pytest.raises(InputError, match=rf"^{name} is for task=text: got {name}=.* and task=series with series="):
        config(tmp_path, **options)
    with pytest.raises(InputError, match=r"series is for task=series: got series=.* and task=text with text=a"):
        config(tmp_path, text=None).override(text="a", task=None)
    with pytest.raises(InputError, match="horizon is for task=series: got horizon=1 and task=text"):
        Config(horizon=1)


def test_targets_and_inputs_are_those_of_the_definition(tmp_path: Path) -> None:
    task = prepare(config(tmp_path))
    assert isinstance(task, Series)
    s, table = task.scaling, read_table(tmp_path / "data.csv")
    y, z = table.numbers("y", "")[:90], table.numbers("z", "")[:90]
    known, last = [], s.mean[0]
    for value in y:
        last = last if math.isnan(value) else value
        known.append(last)
    x, aims = task.train[0]
    assert (s.width, s.outputs, len(x)) == (4, 3, 71)  # y, z, the gaps of y, its change; 72 rows to train on
    for t in (0, 1, 5, 6, 40, 70):
        change = (known[t] - known[max(0, t - 1)]) / s.step[0]
        expected = [(known[t] - s.mean[0]) / s.scale[0], (z[t] - s.mean[1]) / s.scale[1], float(math.isnan(y[t]))]
        assert_close(x[t], torch.tensor([*expected, change], dtype=torch.float64))
        for h in (1, 2, 3):
            aim = (y[t + h] - known[t]) / s.step[0] if t + h < 72 else math.nan  # what is held out is no target
            assert_close(float(aims[t, h - 1]), aim, equal_nan=True, rtol=1e-12, atol=1e-12)
    assert s.mean[0] == pytest.approx(np.nanmean([*y[:72], *table.numbers("y", "")[90:154]]))
    assert Scaling.from_json(s.to_json()) == s


def test_the_measures_are_those_of_the_held_out_steps(tmp_path: Path) -> None:
    """An untrained network is the naive forecast: every measure follows from the table alone."""
    task = prepare(config(tmp_path, dtype="float64"))
    trainer = Trainer(config(tmp_path, dtype="float64"), task)
    loss, found = trainer.measure(task.heldout)
    table, errors, changes = read_table(tmp_path / "data.csv"), [], []
    for begin, n in ((0, 90), (90, 80)):
        y, cut = table.numbers("y", "")[begin : begin + n], n - round(0.2 * n)
        known = y.copy()
        for t in range(1, n):
            known[t] = known[t - 1] if math.isnan(y[t]) else y[t]
        errors += [y[t + h] - known[t] for t in range(cut - 1, n) for h in (1, 2, 3) if t + h < n]
        changes += [abs(y[t] - y[t - 1]) for t in range(1, cut)]
    error = np.array(errors)
    assert loss == pytest.approx(np.nanmean(error**2) / task.scaling.step[0] ** 2)
    assert found["mae"] == pytest.approx(np.nanmean(abs(error)))
    assert found["rmse"] == pytest.approx(np.nanmean(error**2) ** 0.5)
    assert found["mase"] == pytest.approx(np.nanmean(abs(error)) / np.nanmean(changes))
    assert task.naive[0] == pytest.approx(found["mase"])


def test_errors_cost_their_square_or_their_size(tmp_path: Path) -> None:
    losses = []
    for loss in ("squared", "absolute"):
        task = prepare(config(tmp_path, loss=loss, heldout=0.0, dtype="float64"))
        window = task.batches(config(tmp_path)).window(0, 0)
        losses.append(float(task.loss((torch.zeros_like(window.targets), None), window)))
    errors = window.targets[~window.targets.isnan()]
    assert_close(torch.tensor(losses), torch.stack([errors.square().sum(), errors.abs().sum()]), check_dtype=False)
    with pytest.raises(InputError, match="loss must be one of squared, absolute: got 'cubed'"):
        config(tmp_path, loss="cubed")
    with pytest.raises(InputError, match="loss is for task=series"):
        Config(loss="squared")


def test_every_step_is_read_once_an_epoch_and_the_state_ends_with_its_series() -> None:
    streams = [(torch.arange(n)[:, None] + 100.0 * i, torch.ones(n, 1)) for i, n in enumerate((23, 9))]
    batches = Streams(streams, 4, 5, seed=1)
    for epoch in (0, 1, 2):
        before: dict[int, float] = {}
        seen = []
        for index in range(batches.windows(epoch)):
            window = batches.window(epoch, index)
            for t in range(len(window.inputs)):
                for lane in range(batches.lanes):
                    if window.targets[t, lane].isnan():
                        continue
                    value = float(window.inputs[t, lane])
                    assert bool(window.resets[t, lane]) or before[lane] + 1 == value
                    before[lane] = value
                    seen.append(value)
        assert sorted(seen) == [*range(23), *range(100, 109)]


@pytest.mark.parametrize("options", [{"accumulate": 2, "dropout": 0.2}, {"cell": "lstm", "gradient": "truncated:4/2"}])
def test_a_run_goes_on_bit_for_bit_and_is_measured(tmp_path: Path, options: dict[str, Any]) -> None:
    fit(*start(config(tmp_path, **options), tmp_path / "whole"))

    def die(step: Step) -> None:
        if step.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(*start(config(tmp_path, **options), tmp_path / "parts"), on_step=die)
    trainer, run = resume(tmp_path / "parts")
    assert trainer.step == 3
    fit(trainer, run)
    assert_same(outcome(run.path), outcome(tmp_path / "whole"))
    assert run.metrics()[-1]["measures"]["mase"] > 0
    recording = record_run(RunDirectory.open(run.path), steps=6, lanes=2)
    assert (recording.T, recording.B, recording.name) == (6, 2, "recurrent")
    alone = fit(prepare(config(tmp_path, **options)), config(tmp_path, **options))
    assert_close(alone.model.state_dict(), run.weights(), rtol=0, atol=0)
    (tmp_path / "data.csv").write_text(rows().replace("0.955336", "0.955337"))
    with pytest.raises(InputError, match="the series is not the one this run began with"):
        resume(run.path)


def stepped(processes: Processes, options: Config) -> list[Any]:
    trainer = Trainer(options, prepare(options))
    trainer.join(processes)
    found: list[Any] = [(step.nll, step.tokens) for step in trainer.run()]
    return [*found, trainer.measure(trainer.task.heldout), trainer.state()["model"]]


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    options = config(tmp_path, dtype="float64", optimiser="sgd", accumulate=2, learning_rate=0.1)
    expected = stepped(ALONE, options)
    for found in forked(2, tmp_path, stepped, options):
        assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_an_idle_process_has_no_target() -> None:
    streams = Streams([(torch.zeros(4, 2), torch.ones(4, 1))], 3, 4)
    parts = [Shared(streams, Processes(rank, 2)).window(0, 0) for rank in (0, 1)]
    assert [(part.tokens, part.total) for part in parts] == [(4, 4), (0, 4)]


def test_a_wave_is_forecast_and_a_regression_found(tmp_path: Path) -> None:
    wave = "y\n" + "\n".join(f"{math.sin(0.4 * t):.6f}" for t in range(200))
    alone = {"target": None, "inputs": None, "time": None, "group": None}
    options = config(tmp_path, wave, **alone, steps=150, learning_rate=0.01, hidden=16, batch=4)
    fit(*start(options, tmp_path / "run"))
    model, scaling, _ = load(RunDirectory.open(tmp_path / "run"), task="series")
    [found] = forecast(model, scaling, read_table(tmp_path / "data.csv"))
    assert found.times == [1, 2, 3]
    assert np.abs(found.values[:, 0] - np.sin(0.4 * np.arange(200, 203))).max() < 0.1

    text = "x,y\n" + "\n".join(f"{t % 7},{3 * (t % 7) - (t - 1) % 7}" for t in range(200))
    options = config(tmp_path, text, **alone | {"target": "y"}, horizon=0, steps=200, learning_rate=0.02)
    trainer = fit(prepare(options), options)
    assert trainer.measure(trainer.task.heldout)[0] < 0.05


BAD = {
    "no such column": ({"target": "w"}, None, "target must be a column of .*: got 'w'; it has when, who, y, z"),
    "not numeric": ({}, ("2003,a,", "2003,a,x"), "target y of .* must be finite numbers: line 5 has 'x"),
    "ragged": ({}, ("2003,a,", "2003,a,1,"), "must have 4 values in every row: line 5 has 5"),
    "out of order": ({}, ("2003,a", "1999,a"), "time when of group a of .* is out of order: line 5 has '1999'"),
    "twice": ({}, ("2003,a", "2002,a"), "time when of group a of .* is twice: line 5 has '2002'"),
    "short": ({"seq_length": 65}, None, "too short: 64 rows of group b .* seq_length=65 with horizon=3 needs 68"),
    "no time": ({"time": "who"}, None, "time and the group|time who of .* must be numbers or ISO dates"),
    "infinite": ({}, ("2003,a,", "2003,a,1e999 ,#"), "4 values in every row"),
    "infinite time": ({}, ("2003,a", "inf,a"), "time when of .* must be numbers or ISO dates: line 5 has 'inf'"),
    "no group": ({}, ("2003,a", "2003,"), "group who of .* must name the group of every row: line 5 has none"),
    "too large": ({}, ("2003,a,", "2002.5,a,9e307,0\n2003,a,"), "target y of .* has values too large for a mean"),
    "semicolons": ({}, ("when,who,y,z", "when;who;y;z"), "must have commas between its columns: .* has semicolons"),
    "no names": (
        {},
        ("when,who,y,z", "2000,1,2,3"),
        "with the names of its columns: .* numbers alone, 2000",
    ),
    "two alike": ({}, ("when,who,y,z", "when,y,y,z"), "a name of each column, each once: got .'when', 'y', 'y'"),
    "a long season": ({"season": 72}, None, "season must be below the 72 rows to train on of .*: got 72"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    options, change, message = BAD[name]
    text = rows() if change is None else rows().replace(*change, 1)
    with pytest.raises(InputError, match=message) as caught:
        start(config(tmp_path, text, **options), tmp_path / "deep" / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    ("text", "message"), [("", "is empty"), ("when,who,y,z\n", "is empty"), (None, "all are missing")]
)
def test_nothing_to_learn_from(tmp_path: Path, text: str | None, message: str) -> None:
    lines = "when,who,y,z\n" + "".join(f"{t},a,,1\n" for t in range(90)) if text is None else text
    with pytest.raises(InputError, match=message):
        prepare(config(tmp_path, lines))


def test_a_constant_has_no_mase_and_nothing_warns(tmp_path: Path) -> None:
    lines = "when,who,y,z\n" + "".join(f"{t},a,5,1\n" for t in range(90))
    task = prepare(config(tmp_path, lines))
    trainer = Trainer(config(tmp_path, lines), task)
    _, measures = trainer.measure(task.heldout)
    assert measures["mae"] == 0
    assert math.isnan(measures["mase"])
    assert task.baseline().endswith("there is no mase")


DAMAGED = {
    "objects.npy": lambda path: np.save(path, np.array([1, "a", None], dtype=object), allow_pickle=True),
    "objects.npz": lambda path: np.savez(path, y=np.array([1, "a", None], dtype=object)),
    "empty.npy": lambda path: np.save(path, np.ones((0, 3))),
    "three.npy": lambda path: np.save(path, np.ones((2, 2, 2))),
    "cut.npz": lambda path: (np.savez(path, y=np.ones(90)), path.write_bytes(path.read_bytes()[:200])),
    "junk.npz": lambda path: path.write_bytes(b"junk"),
    "none.npy": lambda path: path.write_bytes(b""),
    "picture.csv": lambda path: path.write_bytes(bytes(range(256))),
    "field.csv": lambda path: path.write_text("y\n" + "9" * 200_000),
    "quote.csv": lambda path: path.write_text('y\n"1\n2'),
    "folder.npz": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_file_that_is_none_of_ours_is_one_line(tmp_path: Path, name: str) -> None:
    DAMAGED[name](tmp_path / name)
    said = "which are not read" if "objects" in name else f"table .*{name}"
    with pytest.raises(InputError, match=said) as caught:
        read_table(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_arrays_of_numpy_are_tables(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(6.0).reshape(3, 2))
    np.savez(tmp_path / "b.npz", u=np.arange(3), v=np.array(["x", "y", "z"]))
    assert read_table(tmp_path / "a.npy").columns == {"0": [0.0, 2.0, 4.0], "1": [1.0, 3.0, 5.0]}
    assert read_table(tmp_path / "b.npz").columns == {"u": [0, 1, 2], "v": ["x", "y", "z"]}
    np.savez(tmp_path / "c.npz", u=np.arange(3), v=np.arange(4))
    with pytest.raises(InputError, match="must hold arrays"):
        read_table(tmp_path / "c.npz")


def test_patience_stops_and_keeps_the_best_weights_also_of_a_run_gone_on_with(tmp_path: Path) -> None:
    options = config(tmp_path, patience=2, eval_every=2, learning_rate=0.3, steps=60)
    trainer, run = start(options, tmp_path / "whole")
    fit(trainer, run)
    measured = [(m["heldout_loss"], m["step"]) for m in run.metrics() if m["heldout_loss"] is not None]
    best, at = min(measured)
    assert trainer.finished
    assert trainer.step == measured[-1][1] < 60
    assert [step for _, step in measured][-3] == at
    model, _, _ = load(run)
    trainer.model.load_state_dict(model.state_dict())
    assert trainer.evaluate(trainer.task.heldout) == best

    def die(step: Step) -> None:
        if step.step == at + 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(*start(options, tmp_path / "parts"), on_step=die)
    fit(*resume(tmp_path / "parts"))
    assert_same(outcome(tmp_path / "parts"), outcome(run.path))
    with pytest.raises(InputError, match="patience=1 needs held-out data: got heldout=0"):
        config(tmp_path, patience=1, heldout=0.0)
