"""The experiments run, measure what they say, keep what is done at Ctrl-C, and their README shows their results."""

import doctest
import importlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import typer
from torch.nn.functional import cross_entropy

import bptt
from bptt.train import Config, Sequential

pytestmark = pytest.mark.slow

pytest.importorskip("matplotlib", reason="the figures need the extra plots")

EXAMPLES = Path(__file__).parent.parent / "examples"
ROWS = {  # what a --quick run has: rows, and the keys of each
    "recall_distance": (14, {"cell", "gradient", "distance", "seed", "steps", "accuracy", "seconds"}),
    "strategies": (2, {"seed", "step", "training", "heldout", "milliseconds", "seconds"}),
    "forget_bias": (3, {"bias", "distance", "seed", "steps", "accuracy", "curve", "seconds"}),
    "long_range_share": (4, {"net", "seed", "step", "error", "total", "heldout", "seconds"}),
}


@pytest.fixture(autouse=True)
def scripts_can_import_each_other(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As when one of them is run; torch's thread count and generator are put back."""
    monkeypatch.syspath_prepend(EXAMPLES)
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


def results(name: str, folder: Path) -> dict:
    return json.loads((folder / "results" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ROWS)
def test_quick_run(name: str, tmp_path: Path) -> None:
    script(name).main(quick=True, seed=3, out=tmp_path)
    found = results(name, tmp_path)
    assert list(found) == ["experiment", "quick", "complete", "settings", "machine", "rows"]
    assert (found["experiment"], found["quick"], found["complete"]) == (name, True, True)
    count, keys = ROWS[name]
    assert len(found["rows"]) == count
    assert all(set(row) == keys and row["seed"] == 3 for row in found["rows"])
    assert 800 <= width(tmp_path / "figures" / f"{name}.png") <= 900


def width(png: Path) -> int:
    """Pixels, from the header; small enough to be kept in a repository."""
    content = png.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) < 120_000
    return struct.unpack(">I", content[16:20])[0]


@pytest.mark.parametrize("name", ROWS)
def test_saved_results_are_whole(name: str) -> None:
    text = (EXAMPLES / "results" / f"{name}.json").read_text(encoding="utf-8")
    found = json.loads(text)
    assert (found["quick"], found["complete"]) == (False, True)
    assert not {"/", "\\"} & set(text.replace("truncated:8/4", "")), "a path of the machine it ran on"
    assert width(EXAMPLES / "figures" / f"{name}.png") > 800


def test_readme_shows_the_results() -> None:
    with pytest.raises(typer.Exit) as exit:
        script("readme").main(check=True)
    assert exit.value.exit_code == 0, "run python examples/readme.py"


@pytest.mark.parametrize("name", ["experiment", "blank"])
def test_docstring_examples(name: str) -> None:
    outcome = doctest.testmod(script(name))
    assert outcome.attempted > 0
    assert outcome.failed == 0


def test_interrupted_experiment_keeps_the_runs_that_are_done(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    experiment, forget_bias = script("experiment"), script("forget_bias")

    def measure(run: int) -> dict:
        if run == 2:
            raise KeyboardInterrupt
        return {"bias": "1", "distance": 4, "seed": run, "steps": 50, "accuracy": 0.5, "curve": [0.5]}

    rows, complete = experiment.carry_out(range(5), measure)
    assert [row["seed"] for row in rows] == [0, 1]
    assert "2 of 5 runs are kept" in capsys.readouterr().err
    with pytest.raises(typer.Exit) as exit:
        experiment.publish("forget_bias", {}, rows, forget_bias.draw, complete=complete, quick=True, out=tmp_path)
    assert exit.value.exit_code == 130
    assert results("forget_bias", tmp_path)["complete"] is False
    assert len(results("forget_bias", tmp_path)["rows"]) == 2


def test_sentences_begin_with_the_name_and_end_with_the_blank() -> None:
    blank = script("blank")
    tokens, names = blank.sentences(6, 500, torch.Generator().manual_seed(0))
    assert tokens.shape == (7, 500)
    torch.testing.assert_close(tokens[0], names)
    assert set(names.tolist()) == set(range(8))
    assert set(tokens[1:-1].flatten().tolist()) == set(range(8, 16))
    assert set(tokens[-1].tolist()) == {16}


@pytest.mark.parametrize(("step", "expected"), [(0, 1.0), (1, 0.0)])
def test_accuracy_is_that_of_the_name(step: int, expected: float) -> None:
    """A "net" that reads off token `step`: the name, or a word, which is never the answer."""
    blank = script("blank")

    def reader(tokens: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.nn.functional.one_hot(tokens[step], 17).expand(7, -1, -1), None

    assert blank.accuracy(reader, 6) == expected


def test_window_decides_whether_the_name_gets_gradient() -> None:
    """The name's embedding has gradient from the blank exactly where distance < window, as the figure's lines say."""
    blank = script("blank")
    for distance in (3, 4):
        torch.manual_seed(0)
        model = blank.network("gru", "truncated:4", hidden=8)
        tokens, names = blank.sentences(distance, 16, torch.Generator().manual_seed(0))
        cross_entropy(model(tokens)[0][-1], names).backward()
        reached = bool(model.embedding.weight.grad[: len(blank.NAMES)].abs().sum() > 0)
        assert reached == (distance < 4)


def test_error_without_far_lags_is_that_of_a_truncated_gradient() -> None:
    """Lags below k are what the losses reach with `Truncated(k)`: compared with autograd through the layer."""
    share = script("long_range_share")
    config = Config(hidden=12, embedding=8, seq_length=24, batch=8, limit=4000, steps=1, dtype="float64")
    run = share.Run("LSTM, chrono", 5)
    row = share.measure(run, config)
    trainer = share.begin(config.override(seed=5, cell="lstm"), run.net)
    probe = Sequential(trainer.task.heldout, 24, 8).window(0, 0)

    def gradient(policy: bptt.policies.Policy) -> torch.Tensor:
        trainer.model.recurrent.gradient = policy
        loss = cross_entropy(trainer.model(probe.inputs)[0].flatten(0, 1), probe.targets.flatten())
        return torch.autograd.grad(loss, trainer.model.recurrent.weight_hh_l0)[0]

    whole = gradient(bptt.Full())
    expected = [
        float((gradient(bptt.Truncated(k)) - whole).norm() / whole.norm())
        for k in share.BIN_EDGES[1:]
        if k < config.seq_length
    ]
    assert row["step"] == [0, 1]
    np.testing.assert_allclose(row["error"][0], expected, atol=1e-5)


def test_conclusion_is_computed_from_the_rows() -> None:
    forget_bias = script("forget_bias")
    rows = [
        {"bias": bias, "distance": distance, "accuracy": accuracy}
        for bias, accuracies in {"0": (1.0, 0.1), "chrono": (1.0, 0.95)}.items()
        for distance, accuracy in zip((4, 16), accuracies, strict=True)
    ]
    assert forget_bias.conclusion(rows).endswith("bias 0: 4, chrono: 16")
