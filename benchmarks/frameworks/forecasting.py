"""Frameworks for time series. All train by Lightning, whose callback `GradientPolicy` converts their models."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

import bptt

from .training import Row, folder

SERIES, LENGTH = 16, 300
CONTEXT, AHEAD, UNITS, BATCH = 48, 12, 64, 16

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


def values() -> np.ndarray:
    """Waves with noise `[series, steps]`, float32."""
    drawn, t = np.random.default_rng(0), np.arange(LENGTH)
    phases = drawn.uniform(0, 2 * math.pi, (SERIES, 1))
    waves = 10 + np.sin(2 * math.pi * t / 24 + phases) + 0.1 * drawn.standard_normal((SERIES, LENGTH))
    return waves.astype(np.float32)


def frame() -> Any:
    """The same as a table with a row for each value."""
    import pandas

    return pandas.DataFrame(
        {
            "unique_id": np.repeat([f"s{i}" for i in range(SERIES)], LENGTH),
            "ds": np.tile(np.arange(LENGTH), SERIES),
            "y": values().ravel(),
        }
    )


def callbacks(package: str, ours: bool) -> tuple[list[Any], list[float]]:
    """(what the trainer calls, the losses that it will find). package: of the two, the framework's Lightning."""
    pl = importlib.import_module(package)
    found: list[float] = []

    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *rest: Any) -> None:
            found.append(float(outputs["loss"]))

    if not ours:
        return [Losses()], found
    from bptt.adaptors.lightning import GradientPolicy

    return [Losses(), GradientPolicy("full")], found


def neuralforecast(cell: str, ours: bool, steps: int) -> list[float]:
    """Its recurrent encoder with a decoder."""
    from neuralforecast import NeuralForecast, models

    called, found = callbacks("pytorch_lightning", ours)
    model = getattr(models, cell)(
        h=AHEAD,
        input_size=CONTEXT,
        encoder_n_layers=1,
        encoder_hidden_size=UNITS,
        decoder_hidden_size=UNITS,
        max_steps=steps,
        batch_size=BATCH,
        windows_batch_size=BATCH,
        random_seed=0,
        callbacks=called,
        **QUIET,
    )
    NeuralForecast([model], freq=1).fit(frame())
    return found


def darts(cell: str, ours: bool, steps: int) -> list[float]:
    """RNNModel."""
    from darts import TimeSeries
    from darts.models import RNNModel

    called, found = callbacks("pytorch_lightning", ours)
    with folder() as path:
        model = RNNModel(
            CONTEXT,
            model=cell,
            hidden_dim=UNITS,
            training_length=CONTEXT + AHEAD,
            batch_size=BATCH,
            n_epochs=1,
            random_state=0,
            work_dir=path,
            pl_trainer_kwargs={**QUIET, "callbacks": called, "max_steps": steps},
        )
        model.fit([TimeSeries.from_values(one) for one in values()], verbose=False)
    return found


def gluonts(cell: str, ours: bool, steps: int) -> list[float]:
    """DeepAR, whose layer is an LSTM."""
    import pandas
    from gluonts.torch import DeepAREstimator

    torch.manual_seed(0)
    np.random.seed(0)
    called, found = callbacks("lightning.pytorch", ours)
    estimator = DeepAREstimator(
        freq="D",
        prediction_length=AHEAD,
        context_length=CONTEXT,
        num_layers=1,
        hidden_size=UNITS,
        batch_size=BATCH,
        num_batches_per_epoch=steps,
        lags_seq=[1, 24],
        trainer_kwargs={**QUIET, "enable_checkpointing": True, "callbacks": called, "max_epochs": 1},
    )
    data = [{"start": pandas.Period("2020-01-01", "D"), "target": one} for one in values()]
    with folder() as path:
        estimator.trainer_kwargs["default_root_dir"] = path
        estimator.train(data)
    return found


def pytorch_forecasting(cell: str, ours: bool, steps: int) -> list[float]:
    """DeepAR. Its layers have a forward of their own, for lengths of 0, beneath which ours stand here."""
    import lightning.pytorch as pl
    from pytorch_forecasting import DeepAR, TimeSeriesDataSet
    from pytorch_forecasting.models.nn import rnn

    pl.seed_everything(0, verbose=False)
    called, found = callbacks("lightning.pytorch", False)
    data = TimeSeriesDataSet(
        frame(),
        time_idx="ds",
        target="y",
        group_ids=["unique_id"],
        min_encoder_length=CONTEXT,
        max_encoder_length=CONTEXT,
        max_prediction_length=AHEAD,
        time_varying_unknown_reals=["y"],
    )
    model = DeepAR.from_dataset(data, cell_type=cell, hidden_size=UNITS, rnn_layers=1, dropout=0.0, learning_rate=1e-3)
    if ours:
        theirs = type(model.rnn)
        names = ("handle_no_encoding", "init_hidden_state", "repeat_interleave")
        kind = type(cell, (rnn.RNN, getattr(bptt.nn, cell)), {name: getattr(theirs, name) for name in names})
        layer = kind(model.rnn.input_size, model.rnn.hidden_size, batch_first=True)
        layer.load_state_dict(model.rnn.state_dict())
        model.rnn = layer
    pl.seed_everything(0, verbose=False)  # the layer that took the other's place has drawn its first weights
    with folder() as path:
        trainer = pl.Trainer(
            **QUIET,
            default_root_dir=path,
            max_epochs=1,
            limit_train_batches=steps,
            gradient_clip_val=0.1,
            callbacks=called,
        )
        trainer.fit(model, data.to_dataloader(train=True, batch_size=BATCH, num_workers=0))
    return found


MODELS: list[tuple[str, str, tuple[str, ...], str, Callable[..., list[float]], tuple[str, ...]]] = [
    (
        "neuralforecast",
        "neuralforecast",
        ("neuralforecast", "pytorch_lightning"),
        f"models.LSTM and GRU, {CONTEXT} steps, {AHEAD} ahead",
        neuralforecast,
        ("LSTM", "GRU"),
    ),
    ("darts", "darts", ("darts", "pytorch_lightning"), f"RNNModel, {CONTEXT + AHEAD} steps", darts, ("LSTM", "GRU")),
    ("gluonts", "gluonts", ("gluonts", "lightning"), f"DeepAREstimator, {CONTEXT + AHEAD} steps", gluonts, ("LSTM",)),
    (
        "pytorch-forecasting",
        "pytorch-forecasting",
        ("pytorch_forecasting", "lightning"),
        f"DeepAR, {CONTEXT + AHEAD} steps",
        pytorch_forecasting,
        ("LSTM", "GRU"),
    ),
]

ROWS = [
    Row(f"{name}, {cell}", package, needs, what, partial(run, cell))
    for name, package, needs, what, run, cells in MODELS
    for cell in cells
]
