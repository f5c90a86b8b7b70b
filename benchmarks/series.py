"""Forecasts by `bptt train --series` beside others', on three public series that statsmodels ships.

    pip install --target DIR --no-deps statsmodels
    pip install --target PEER neuralforecast        # or none: then its rows say that it is not there
    PYTHONPATH=PEER python benchmarks/series.py DIR/statsmodels/datasets --out benchmarks/results/series.json

Everybody learns from the same rows, all but the last fifth, for the same number of optimiser steps, and keeps the
weights it ends with: nothing is chosen by the held-out rows. Then each forecasts the next `horizon` values from every
held-out row that so many follow, knowing all rows before. Missing values are filled with the last known one first,
for all alike, since one of the peers does not take them.

bptt            `bptt.train`'s own loop, one LSTM layer, forecasts of every step of a window of `seq_length`; learned
                by the square of errors, and by their size
torch.nn.LSTM   the same network on the same windows, in a plain loop; so it differs by rounding, and in time
neuralforecast  its LSTM of as many units and steps, on windows of `seq_length`, else as it comes: windows drawn at
                random, a robust scaler for each window, absolute errors as loss, a decoder of two layers
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import importlib.util
import json
import logging
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bptt.train import Config, Series, Trainer, atomic, prepare
from bptt.train.numerals import number_of
from bptt.train.rates import factor
from bptt.train.scaling import naive_errors, scaled_error
from bptt.train.tables import read_table
from bptt.train.tasks.series import groups_of

SERIES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "sunspots": ("sunspots/sunspots.csv", ("SUNACTIVITY",), {"horizon": 6, "season": 11, "seq_length": 32}),
    "co2": ("co2/co2.csv", ("co2",), {"horizon": 13, "season": 52, "seq_length": 64}),
    "macrodata": (
        "macrodata/macrodata.csv",
        ("realgdp", "realinv", "unemp", "tbilrate"),
        {"horizon": 4, "season": 4, "seq_length": 24},
    ),
}
"""File, columns, and the options of each. macrodata: four of its columns, chosen for their different courses."""

COMMON: dict[str, Any] = {
    "cell": "lstm",
    "hidden": 32,
    "batch": 8,
    "heldout": 0.2,
    "threads": 1,
}

Floats = np.ndarray[Any, np.dtype[np.float64]]


def filled(folder: Path, name: str, scratch: Path) -> Path:
    """The columns of a series as a table of their own, without missing values."""
    source, columns, _ = SERIES[name]
    made, last = scratch / f"{name}.csv", dict.fromkeys(columns, "")
    with (folder / source).open() as read, made.open("w") as write:
        writer = csv.writer(write)
        writer.writerow(columns)
        for row in csv.DictReader(read):
            last |= {column: row[column] for column in columns if not np.isnan(number_of(row[column]) or 0.0)}
            if all(last.values()):
                writer.writerow(last.values())
    return made


def on_torch(trainer: Trainer) -> None:
    """Give a trainer torch.nn.LSTM, with the very weights, in the place of our layer."""
    ours = trainer.model.recurrent
    theirs = torch.nn.LSTM(ours.input_size, ours.hidden_size)
    theirs.load_state_dict(ours.state_dict())
    trainer.model.recurrent = _Resetting(theirs)
    trainer.optimiser = torch.optim.Adam(trainer.model.parameters(), lr=trainer.config.learning_rate)


class _Resetting(torch.nn.Module):
    """torch.nn.LSTM, called once for every stretch without a reset, as it has to be."""

    def __init__(self, layer: torch.nn.LSTM) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor, state: Any = None, resets: torch.Tensor | None = None) -> Any:
        cuts = [0, len(x)]
        if resets is not None:
            cuts = sorted({*cuts, *resets.any(1).nonzero()[:, 0].tolist()})
        parts = []
        for start, stop in pairwise(cuts):
            if resets is not None and state is not None:
                kept = (~resets[start]).to(x)[None, :, None]
                state = tuple(s * kept for s in state)
            y, state = self.layer(x[start:stop], state)
            parts.append(y)
        return torch.cat(parts), state


def plain(trainer: Trainer) -> None:
    """The peer's steps, of a loop without anything else."""
    state, epoch, index, config = None, 0, 0, trainer.config
    assert config.steps is not None
    for step in range(config.steps):
        window = trainer.batches.window(epoch, index)
        trainer.optimiser.zero_grad()
        weight = next(trainer.model.parameters())
        output = trainer.model(*trainer.task.arguments(window, None if window.fresh else state, weight))
        (trainer.task.loss(output, window) / trainer.batches.full).backward()
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), config.clip)
        for group in trainer.optimiser.param_groups:
            group["lr"] = config.learning_rate * factor(config.schedule, config.warmup, step, config.steps)
        trainer.optimiser.step()
        state = tuple(s.detach() for s in output[1])
        index += 1
        if index == trainer.batches.windows(epoch):
            epoch, index = epoch + 1, 0


def own(trainer: Trainer) -> None:
    """The package's own steps, the doctor watching."""
    for _ in trainer.run():
        pass


def of_network(path: Path, config: Config, train: Callable[[Trainer], None]) -> tuple[Floats, float]:
    """(forecasts `[rows, targets, horizon]` from every row, seconds of CPU of training)."""
    task = prepare(config)
    assert isinstance(task, Series)
    trainer = Trainer(config, task)
    if train is plain:
        trainer.doctor.remove()
        on_torch(trainer)
    trainer.model.train()
    began = time.process_time()
    train(trainer)
    seconds = time.process_time() - began
    scaling, trainer.model = task.scaling, trainer.model.eval()
    [group] = groups_of(read_table(path), None, None, scaling.targets, scaling.inputs)
    with torch.no_grad():
        x = scaling.read(group.inputs)[:, None].to(next(trainer.model.parameters()))
        return scaling.values(trainer.model(x)[0][:, 0], group.inputs), seconds


def of_neuralforecast(values: Floats, cut: int, config: Config, options: dict[str, Any]) -> tuple[Floats, float]:
    """The same of neuralforecast's LSTM, NaN before the first held-out row; each column is a series of its own."""
    import pandas
    from neuralforecast import NeuralForecast
    from neuralforecast.models import LSTM

    n, columns = values.shape
    frame = pandas.DataFrame(
        {"unique_id": np.repeat(np.arange(columns), n), "ds": np.tile(np.arange(n), columns), "y": values.T.ravel()}
    )
    quiet = {"enable_progress_bar": False, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    model = LSTM(
        h=config.horizon,
        input_size=config.seq_length,
        max_steps=config.steps,
        random_seed=config.seed,
        enable_model_summary=False,
        **quiet,
        **options,
    )
    forecaster = NeuralForecast([model], freq=1)
    began = time.process_time()
    forecaster.fit(frame[frame["ds"] < cut])
    seconds = time.process_time() - began
    found = forecaster.cross_validation(frame, test_size=n - cut, n_windows=None, use_fitted=True)
    forecasts = np.full((n, columns, config.horizon), np.nan)
    for row in found.itertuples():
        forecasts[row.cutoff, row.unique_id, row.ds - row.cutoff - 1] = row.LSTM
    return forecasts, seconds


def repeated(values: Floats, horizon: int, season: int) -> Floats:
    """The naive forecast, with a season above 1 the seasonal-naive one, from every row that has a season before it."""
    n, columns = values.shape
    forecasts = np.full((n, columns, horizon), np.nan)
    for h in range(1, horizon + 1):
        back = season * -(-h // season) - h if season > 1 else 0
        forecasts[back:, :, h - 1] = values[: n - back]
    return forecasts


def errors(forecasts: Floats, values: Floats, cut: int) -> dict[str, Any]:
    """MAE and RMSE of each column, and MASE over all, of the forecasts of whole horizons from the held-out rows."""
    n, _, horizon = forecasts.shape
    rows = np.arange(cut - 1, n - horizon)
    error = forecasts[rows] - np.stack([values[rows + h] for h in range(1, horizon + 1)], axis=-1)
    assert np.isfinite(error).all()
    mae, rmse = np.abs(error).mean((0, 2)), np.sqrt((error**2).mean((0, 2)))
    return {
        "mase": scaled_error(mae, naive_errors([values[:cut]], 1)),
        "mae": mae.tolist(),
        "rmse": rmse.tolist(),
    }


def summary(found: list[tuple[dict[str, Any], float]]) -> dict[str, Any]:
    """The mean over seeds, the standard deviation of MASE, and the median time."""
    mase = [each["mase"] for each, _ in found]
    return {
        "mase": statistics.mean(mase),
        "sd": statistics.stdev(mase) if len(mase) > 1 else 0.0,
        **{name: np.mean([each[name] for each, _ in found], axis=0).tolist() for name in ("mae", "rmse")},
        "cpu_seconds": statistics.median(seconds for _, seconds in found),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="statsmodels/datasets")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--learning-rate", type=float, default=0.005)
    parser.add_argument("--schedule", default="cosine", help="of bptt and torch.nn")
    parser.add_argument("--series", default=",".join(SERIES), help="which of them")
    given = parser.parse_args()
    warnings.simplefilter("ignore")  # the peers' own, of their loaders
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    peer = "neuralforecast"
    missing = None if importlib.util.find_spec(peer) else f"{peer} is not installed: pip install --target DIR {peer}"
    if missing:
        print(f"left out: {missing}")
    size = {"encoder_hidden_size": COMMON["hidden"], "encoder_n_layers": 1, "learning_rate": given.learning_rate}
    size["decoder_hidden_size"] = COMMON["hidden"]
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in given.series.split(","):
            _, columns, options = SERIES[name]
            path = filled(given.folder, name, Path(scratch))
            values = np.stack([read_table(path).numbers(column, "target") for column in columns], axis=1)
            cut = len(values) - round(len(values) * COMMON["heldout"])
            found: dict[str, list[tuple[dict[str, Any], float]]] = {}
            for seed in range(given.seeds):
                config = Config(
                    series=str(path),
                    target=",".join(columns),
                    seed=seed,
                    steps=given.steps,
                    learning_rate=given.learning_rate,
                    schedule=given.schedule,
                    **COMMON,
                    **options,
                )
                made = {
                    "bptt": of_network(path, config, own),
                    "torch.nn.LSTM": of_network(path, config, plain),
                    "bptt, loss=absolute": of_network(path, config.override(loss="absolute"), own),
                }
                if missing is None:
                    made[peer] = of_neuralforecast(values, cut, config, size)
                    made[f"{peer}, its own learning rate"] = of_neuralforecast(
                        values, cut, config, size | {"learning_rate": 0.001}
                    )
                for who, (forecasts, seconds) in made.items():
                    found.setdefault(who, []).append((errors(forecasts, values, cut), seconds))
            row: dict[str, Any] = {"series": name, "columns": columns, "rows": cut, "heldout": len(values) - cut}
            row |= {**options, "seeds": given.seeds}
            for who, season in (("naive", 1), ("seasonal naive", options["season"])):
                row[who] = errors(repeated(values, options["horizon"], season), values, cut)
            row |= {who: summary(results) for who, results in found.items()}
            rows.append(row)
            print(json.dumps(row), flush=True)
    about = {"steps": given.steps, "learning_rate": given.learning_rate, "schedule": given.schedule, "options": COMMON}
    about |= {"torch": torch.__version__, "machine": platform.machine(), "python": platform.python_version()}
    about |= {peer: missing or importlib.metadata.version(peer)}
    atomic.write(given.out, (json.dumps({**about, "rows": rows}, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
