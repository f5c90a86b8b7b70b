"""Series: forecasts and regressions over long streams of numbers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...flow.language import say
from ..batches import Batches
from ..carried import State
from ..columns import columns_of_series
from ..config import Config
from ..errors import InputError
from ..found import STORED
from ..model import Network
from ..recurrence import recurrent_layers
from ..scaling import Scaling, naive_errors, scaled_error
from ..streams import Stream, Streams
from ..tables import Numbers, Table, read_table
from ..window import Window
from .stream import inspected

__all__ = ["Forecaster", "Group", "Series", "groups_of"]

CONTEXT = 256
"""Steps read before the held-out ones, at least, if there are so many: they bring the state to where it would be."""


class Forecaster(Network):
    """o_t = V dropout(h_t) + c, with h_t from recurrent layers over the numbers of step t.

    Called with inputs `[T, B, inputs]`, a state (None: zero) and, if any, resets bool `[T, B]`; returns `[T, B,
    outputs]` and the final state. V and c begin at zero: an untrained forecast is the naive one.
    """

    def __init__(self, inputs: int, outputs: int, hidden: int, dropout: float, **options: Any) -> None:
        super().__init__()
        self.dropout = torch.nn.Dropout(dropout)
        self.recurrent = recurrent_layers(inputs=inputs, hidden=hidden, dropout=dropout, **options)
        self.output = torch.nn.Linear(hidden, outputs)
        torch.nn.init.zeros_(self.output.weight)
        torch.nn.init.zeros_(self.output.bias)

    def forward(self, x: Tensor, state: State = None, resets: Tensor | None = None) -> tuple[Tensor, State]:
        """Predictions `[T, B, outputs]` and the final state."""
        given = {} if resets is None else {"resets": resets}
        y, state = self.recurrent(x, state, **given)
        return self.output(self.dropout(y)), state


@dataclass(frozen=True, eq=False)
class Group:
    """The rows of one group, in order. name: "" where there are no groups. time: as read; None: there is none."""

    name: str
    time: list[Any] | None
    inputs: Numbers
    targets: Numbers


@dataclass(frozen=True, eq=False)
class Series:
    """A table of series in two parts: of every group the last steps are held out.

    train, heldout: inputs and targets of each group; the held-out ones begin with steps that have no target, which
    bring the state to where it would be. naive: held-out mean absolute error of the naive and of the seasonal-naive
    forecast, in units of `scaling.naive`.
    """

    name: ClassVar[str] = "series"
    file: ClassVar[str] = STORED["series"]
    what: ClassVar[str] = "scaling"
    data: ClassVar[str] = "series"
    units: ClassVar[str] = "values"

    scaling: Scaling
    train: list[Stream]
    heldout: list[Stream] | None
    sha256: str
    naive: tuple[float, float]
    cost: str = "squared"

    @property
    def stored(self) -> Scaling:
        return self.scaling

    @classmethod
    def prepare(cls, config: Config) -> Series:
        """Read, check, split and standardise.

        Raises InputError for a table that cannot be read, and for one from which nothing can be learned: a column that
        is missing or not of numbers, times out of order or twice, a group shorter than a window, all values missing.
        """
        if config.series is None:
            raise InputError("task=series needs series, the table to read: got none")
        table = read_table(Path(config.series))
        names = columns_of_series(config, table.path, list(table.columns))
        groups = groups_of(table, config.time, config.group, *names)
        cuts = [len(g.targets) - round(len(g.targets) * config.heldout) for g in groups]
        for group, cut in zip(groups, cuts, strict=True):
            need = config.seq_length + config.horizon
            if cut < need:
                of = f" of group {group.name}" if config.group else ""
                raise InputError(
                    f"{config.series} is too short: {cut} rows{of} are left to train on, a window of "
                    f"seq_length={config.seq_length} with horizon={config.horizon} needs {need}"
                )
        if config.season >= max(cuts):
            raise InputError(
                f"season must be below the {max(cuts)} rows to train on of {config.series}: got {config.season}"
            )
        scaling = _scaling(config, groups, cuts, *names)
        train, heldout = [], []
        for group, cut in zip(groups, cuts, strict=True):
            x = scaling.read(group.inputs)
            aims = scaling.aims(group.inputs, group.targets)
            within = scaling.aims(group.inputs[:cut], group.targets[:cut])
            last = cut - (1 if config.horizon else 0)
            train.append((x[:last], within[:last]))
            if cut < len(group.targets):
                start = max(0, last - max(CONTEXT, config.seq_length))
                aims[:last] = math.nan
                heldout.append((x[start:], aims[start:]))
        for part, which in ((train, "to train on"), (heldout, "held out")):
            if part and all(bool(y.isnan().all()) for _, y in part):
                raise InputError(
                    f"{config.series} has no value of {', '.join(scaling.targets)} {which}: all are missing"
                )
        if config.heldout and not heldout:
            raise InputError(f"heldout={config.heldout:g} leaves no row held out: give more rows, or --heldout 0")
        digest = hashlib.sha256(scaling.to_json().encode())
        for group in groups:
            digest.update(group.name.encode())
            digest.update(np.ascontiguousarray(group.inputs).tobytes())
            digest.update(np.ascontiguousarray(group.targets).tobytes())
        naive = _naive(scaling, groups, cuts)
        return cls(scaling, train, heldout or None, digest.hexdigest(), naive, config.loss)

    @classmethod
    def read(cls, text: str) -> Scaling:
        return Scaling.from_json(text)

    @classmethod
    def network(cls, config: Config, stored: Scaling) -> Forecaster:
        return Forecaster(
            stored.width,
            stored.outputs,
            config.hidden,
            config.dropout,
            cell=config.cell,
            nonlinearity=config.nonlinearity,
            layers=config.layers,
            gradient=config.gradient,
            memory=config.memory,
            kernel=config.kernel,
        )

    @classmethod
    def trial(cls, stored: Scaling) -> tuple[Tensor, ...]:
        return (torch.zeros(1, 1, stored.width, device="cpu"),)

    def batches(self, config: Config) -> Batches:
        return Streams(self.train, config.batch, config.seq_length, config.seed)

    def in_order(self, part: list[Stream], config: Config) -> Batches:
        return Streams(part, config.batch, config.seq_length)

    def carries(self, config: Config) -> bool:
        return True

    def longest(self, config: Config) -> int:
        return config.seq_length

    def arguments(self, batch: Window, state: State, like: Tensor) -> tuple[Any, ...]:
        resets = () if batch.resets is None else (batch.resets.to(like.device),)
        return batch.inputs.to(like), state, *resets

    def loss(self, output: Any, batch: Window) -> Tensor:
        """What errors cost in units of `Scaling.step`, summed over the values that are not missing."""
        error, known = self._errors(output, batch)
        there = torch.where(known, error, 0.0)
        return (there.square() if self.cost == "squared" else there.abs()).sum()

    def counts(self, output: Any, batch: Window) -> Tensor:
        """Of every target: absolute and squared errors in the units of the data, and how many there are."""
        error, known = self._errors(output, batch)
        error = torch.where(known, error, 0.0).double().unflatten(-1, (len(self.scaling.targets), -1))
        error = error * torch.tensor(self.scaling.step, dtype=torch.float64, device=error.device)[:, None]
        there = known.unflatten(-1, (len(self.scaling.targets), -1)).double()
        return torch.cat([t.sum((0, 1, 3)) for t in (error.abs(), error.square(), there)])

    def measures(self, counts: list[float]) -> dict[str, float]:
        """MAE and RMSE of each target, MASE over all: by the naive and, with a season, the seasonal-naive forecast.

        A target that does not change in training has no MASE: NaN where none does.
        """
        absolute, squared, there = np.asarray(counts).reshape(3, -1)
        many, found = len(self.scaling.targets) > 1, dict[str, float]()
        with np.errstate(invalid="ignore", divide="ignore"):
            mae, rmse = absolute / there, np.sqrt(squared / there)
        for i, target in enumerate(self.scaling.targets):
            after = f"_{target}" if many else ""
            found |= {f"mae{after}": float(mae[i]), f"rmse{after}": float(rmse[i])}
        found["mase"] = scaled_error(mae, self.scaling.naive)
        if self.scaling.season > 1:
            found["mase_seasonal"] = scaled_error(mae, self.scaling.seasonal)
        return found

    def pictures(self, counts: list[float]) -> Iterator[tuple[str, Any]]:
        return iter(())

    def perplexity(self, loss: float) -> None:
        return None

    def about(self) -> str:
        scaling, steps = self.scaling, sum(len(x) for x, _ in self.train)
        aims = f"{scaling.horizon} steps ahead" if scaling.horizon else "at the same step"
        held = 0 if self.heldout is None else sum(int((~y.isnan()).any(-1).sum()) for _, y in self.heldout)
        groups = f" in {len(self.train)} groups" if scaling.group else ""
        return (
            f"{', '.join(scaling.targets)} {aims} from {', '.join(scaling.inputs)}; "
            f"{steps:,} steps{groups} to train on, {held:,} held out"
        )

    def baseline(self) -> str:
        naive, seasonal = self.naive
        if not self.scaling.horizon:
            return f"the mean has loss {self._of_mean():.4g}"
        if math.isnan(naive):
            return "the naive forecast errs nowhere in training, or is measured nowhere: there is no mase"
        more = f", the seasonal-naive one {seasonal:.4g}" if self.scaling.season > 1 else ""
        return f"the naive forecast has mase {naive:.4g}{more}"

    def _of_mean(self) -> float:
        """The loss of a regression that always predicts the mean: in training 1, where errors are squared."""
        if self.cost == "squared":
            return 1.0
        return float(torch.cat([y.flatten() for _, y in self.train]).abs().nanmean())

    def shortfall(self, loss: float, measures: Mapping[str, float | None]) -> str:
        if not self.scaling.horizon:
            mean = self._of_mean()
            return "" if loss < mean else f"a held-out loss of {loss:.4g} is no better than the mean's, {mean:.4g}"
        known = {"naive": self.naive[0]} | ({"seasonal-naive": self.naive[1]} if self.scaling.season > 1 else {})
        mase = measures.get("mase")
        if mase is None or not (unbeaten := {name: error for name, error in known.items() if error <= mase}):
            return ""
        told = " and ".join(f"the {name} forecast's, {error:.4g}" for name, error in unbeaten.items())
        return f"a held-out mase of {mase:.4g} is no better than {told}"

    def hints(self, config: Config) -> list[str]:
        return []

    def inspected(self, config: Config, steps: int | None, lanes: int | None) -> tuple[list[Any], str]:
        there = sum(len(x) for x, _ in self.train)
        said = say("{source}, its training part of {count} steps", source=config.source, count=f"{there:,}")

        def windows(B: int, T: int) -> Batches:
            return Streams(self.train, B, T, seed=0)

        return inspected(config, steps, lanes, windows, there, self, True), said

    def _errors(self, output: Any, batch: Window) -> tuple[Tensor, Tensor]:
        """(prediction less target, whether there is one)."""
        targets = batch.targets.to(output[0])
        return output[0] - targets, ~targets.isnan()


def groups_of(
    table: Table, time: str | None, group: str | None, targets: tuple[str, ...], inputs: tuple[str, ...]
) -> list[Group]:
    """The groups of a table, in the order in which they first appear. Raises InputError for times out of order."""
    read = {name: table.numbers(name, "target") for name in targets}
    read |= {name: table.numbers(name, "inputs") for name in inputs if name not in read}
    rows, times = table.rows_of(group, time), None if time is None else table.column(time, "time")
    made = []
    for key, own in rows.items():
        x, y = (np.stack([read[name][own] for name in names], axis=1) for names in (inputs, targets))
        made.append(Group(key, None if times is None else [times[i] for i in own], x, y))
    return made


def _scaling(
    config: Config, groups: list[Group], cuts: list[int], targets: tuple[str, ...], inputs: tuple[str, ...]
) -> Scaling:
    x = np.concatenate([g.inputs[:cut] for g, cut in zip(groups, cuts, strict=True)])
    series = [g.targets[:cut] for g, cut in zip(groups, cuts, strict=True)]
    y = np.concatenate(series)
    for option, names, values in (("target", targets, y), ("inputs", inputs, x)):
        for i, name in enumerate(names):
            if np.isnan(values[:, i]).all():
                raise InputError(f"{option} {name} of {config.series} has no value to train on: all are missing")
    with np.errstate(over="ignore", invalid="ignore"):
        changes = np.concatenate([np.diff(each, axis=0) for each in series]) if config.horizon else y - np.nanmean(y, 0)
        step = np.sqrt(np.nansum(changes**2, 0) / np.maximum(1, (~np.isnan(changes)).sum(0)))
        scale = np.nanstd(x, 0)
    for option, columns, of in (("target", targets, step), ("inputs", inputs, scale)):
        for name, value in zip(columns, of.tolist(), strict=True):
            if not math.isfinite(value):
                raise InputError(f"{option} {name} of {config.series} has values too large for a mean and a deviation")
    return Scaling(
        targets,
        inputs,
        config.time,
        config.group,
        config.horizon,
        config.season,
        mean=tuple(np.nanmean(x, 0).tolist()),
        scale=tuple(np.where(scale > 0, scale, 1.0).tolist()),
        gaps=tuple(np.isnan(x).any(0).tolist()),
        step=tuple(np.where(step > 0, step, 1.0).tolist()),
        middle=tuple(np.nanmean(y, 0).tolist()),
        naive=naive_errors(series, 1),
        seasonal=naive_errors(series, config.season),
    )


def _naive(scaling: Scaling, groups: list[Group], cuts: list[int]) -> tuple[float, float]:
    """MASE of the naive and of the seasonal-naive forecast, from the same steps to the same held-out steps."""
    if not scaling.horizon:
        return math.nan, math.nan
    found = []
    for season in (1, scaling.season):
        errors: list[Numbers] = []
        for group, cut in zip(groups, cuts, strict=True):
            y = scaling.bases(group.inputs)  # missing values filled
            for h in range(1, scaling.horizon + 1):
                back = season * -(-h // season) - h if season > 1 else 0
                t = np.arange(max(cut - 1, back), len(y) - h)
                errors.append(np.abs(group.targets[t + h] - y[t - back]))
        every = np.concatenate(errors)
        with np.errstate(invalid="ignore"):
            known = (~np.isnan(every)).sum(0)
            mae = np.nansum(every, 0) / np.where(known, known, np.nan)
        found.append(scaled_error(mae, scaling.naive))
    return found[0], found[1]
