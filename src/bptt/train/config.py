"""Every option of a training run, its default, its meaning and its check: one table.

What a configuration can be refused for without torch, it is refused for without: nothing here imports it at the top.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from functools import cache
from typing import Any, get_args, get_type_hints

from .. import memory, policies
from .corpus import CORPORA, DEFAULT, PREPROCESSORS, encodable
from .errors import InputError
from .extras import require
from .options import (
    CELL,
    FILE,
    FLAG,
    FRACTION,
    KERNEL,
    LOSSES,
    NOT_NEGATIVE,
    POOLS,
    RATE,
    SEED,
    SIDE,
    SPLIT,
    TEXT,
    THREADS,
    USES,
    Check,
    at_least,
    check_device,
    has_kernels,
    kernels_of,
    layer_cells,
    named_cell,
    one_of,
    option,
    with_nonlinearity,
)
from .rates import SCHEDULES

__all__ = ["ALIASES", "FILES", "GROUPS", "TASKS", "Config", "read_entries", "shown"]

ALIASES = {"optimizer": "optimiser"}
"""Other spellings of an option, in a file and as a flag."""

GROUPS = {
    "task": "Data",
    "series": "Series and sequences",
    "cell": "Model",
    "gradient": "Gradient",
    "steps": "Optimisation",
    "seed": "Run",
}
"""The first option of each group, and its name; the options that follow belong to it."""

TASKS = tuple(USES)
"""The names of the tasks."""

COLUMNS = ("series", "classify")
"""The tasks that read columns of a table."""

TELLING = {"text": "text", "corpus": "text", "series": "series", "classify": "classify"}
"""The options that name data, each with the task that they are for."""

EITHER = (("steps", "epochs"), ("text", "corpus"))
"""Pairs of options of which at most one is given: two answers to one question."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The options of a run. Immutable; every value is checked, and a bad one raises InputError.

    At most one of `steps` and `epochs` is given; with neither, 10 epochs. At most one of `text` and `corpus` is given;
    with neither, the corpus python-docs. `nonlinearity` is for the rnn cell alone. An option that is for another task
    than `task` is None, and refused where it is given.

    >>> Config(cell="gru", gradient="chunked:16").gradient
    'chunked:16'
    >>> Config(batch=0)
    Traceback (most recent call last):
    bptt.train.errors.InputError: batch must be a whole number of at least 1: got 0
    """

    task: str = option(None, one_of(*TASKS), "what is learned; default: what the data are for, else text")
    corpus: str | None = option(
        None, one_of(*CORPORA), f"named corpus to read (or give text); default {DEFAULT}", "text"
    )
    text: str | None = option(None, FILE, "UTF-8 file to read (or give corpus)", "text")
    documents: str | None = option(
        None,
        SPLIT,
        "what is a document, with a state of its own: lines, paragraphs, files (text: a directory), jsonl:KEY",
        "text",
    )
    preprocess: str = option(
        "none", one_of(*PREPROCESSORS), "letters: keep lower-case letters and single spaces", "text"
    )
    tokens: str = option(
        "char", one_of("char", "word"), "what a token is; words are what white space separates", "text"
    )
    min_count: int = option(1, at_least(1), "tokens seen less often in the training text become <unk>", "text")
    limit: int = option(0, at_least(0), "use the first so many tokens only; 0: all", "text")
    heldout: float = option(0.1, FRACTION, "fraction held out, the end of the data or of each class; 0: none")

    series: str | None = option(None, FILE, "table to read: .csv, .parquet, .npy or .npz", "series")
    classify: str | None = option(
        None, FILE, "sequences with a label each: a table with a step a row, .npz, or .ts (aeon's)", "classify"
    )
    heldout_file: str | None = option(None, FILE, "sequences to measure on, in place of a fraction", "classify")
    target: str | None = option(
        None,
        TEXT,
        "columns to predict, with commas between; default: all that have no other use; of sequences label",
        *COLUMNS,
    )
    inputs: str | None = option(
        None, TEXT, "further columns to predict from, with commas between; of sequences all others", *COLUMNS
    )
    time: str | None = option(None, TEXT, "column of times, numbers or ISO dates, which must rise", *COLUMNS)
    group: str | None = option(
        None, TEXT, "column that tells series apart, each with a state of its own; of sequences id", *COLUMNS
    )
    horizon: int = option(1, at_least(0, 10_000), "steps ahead to forecast; 0: the same step, from inputs", "series")
    loss: str = option(
        "squared", one_of(*LOSSES), "what an error costs: its square, or its size, which outliers rule less", "series"
    )
    season: int = option(1, at_least(1, SIDE), "steps of a season, for the seasonal-naive forecast", "series")

    cell: str = option("lstm", CELL, "what recurs: a layer with kernels, a cell of the literature, or your own")
    nonlinearity: str | None = option(None, one_of("tanh", "relu"), "activation of the rnn cell; default tanh")
    layers: int = option(1, at_least(1, 1000), "recurrent layers")
    bidirectional: bool = option(False, FLAG, "read every sequence from its end as well", "classify")
    hidden: int = option(256, at_least(1, SIDE), "units per recurrent layer")
    embedding: int = option(64, at_least(0, SIDE), "size of the token embedding; 0: one-hot", "text")
    pool: str = option("last", one_of(*POOLS), "which state is classified: the last, or the mean of all", "classify")
    dropout: float = option(0.0, FRACTION, "probability, on the embedding, between layers and before the output")
    gradient: str = option("full", TEXT, "how far gradients reach inside a window: full, chunked:K, truncated:K, ...")
    adapt_every: int = option(50, at_least(1), "steps between measurements of the window of gradient=adaptive:...")
    memory: str = option(
        "auto", TEXT, "what the forward pass keeps: auto, gates, states, checkpoints[:steps=S or :bytes=N]"
    )
    kernel: str = option("auto", KERNEL, "who computes the recurrence")

    steps: int | None = option(None, at_least(1), "optimiser steps in all (or give epochs)")
    epochs: int | None = option(None, at_least(1), "passes over the training data (or give steps); default 10")
    batch: int = option(32, at_least(1, 2**20), "lanes B")
    accumulate: int = option(1, at_least(1), "windows per optimiser step, one after another")
    seq_length: int = option(
        64, at_least(1, SIDE), "steps T of a window; no gradient crosses into the last window", "text", "series"
    )
    batching: str = option(
        "sequential", one_of("sequential", "random"), "contiguous lanes and carried state, or random windows", "text"
    )
    optimiser: str = option("adam", one_of("adam", "sgd"), "update rule")
    learning_rate: float = option(0.002, RATE, "step size")
    schedule: str = option(
        "constant", one_of(*SCHEDULES), "of the learning rate: constant, or falling to 0 at the end of the run"
    )
    warmup: int = option(0, at_least(0), "steps over which the learning rate rises before that")
    clip: float = option(1.0, NOT_NEGATIVE, "largest global norm of the gradient; 0: no clipping")
    on_nonfinite: str = option(
        "stop", one_of("stop", "skip"), "a step that is not finite: stop with the diagnosis, or skip it and go on"
    )

    seed: int = option(0, SEED, "random seed")
    dtype: str = option("float32", one_of("float32", "float64"), "of weights and states")
    device: str = option("cpu", TEXT, "torch device")
    threads: int = option(0, THREADS, "CPU threads; 0: torch's choice")
    log_every: int = option(50, at_least(1), "steps between lines of metrics.jsonl")
    eval_every: int = option(500, at_least(1), "steps between measurements on the held-out data")
    patience: int = option(
        0, at_least(0), "measurements in a row without a better held-out loss, after which it stops; 0: never"
    )
    save_every: int = option(500, at_least(1), "steps between checkpoints")
    keep: int = option(3, at_least(1), "checkpoints that stay; the older ones are removed")

    def __post_init__(self) -> None:
        for entry in fields(self):
            object.__setattr__(self, entry.name, self.check(entry.name, getattr(self, entry.name)))
        for one, other in EITHER:
            first, second = getattr(self, one), getattr(self, other)
            if first is not None and second is not None:
                raise InputError(f"give {one} or {other}, not both: got {one}={first} and {other}={second}")
        self._choose_task()
        if self.documents is not None:
            for name, only in (("corpus", None), ("limit", 0), ("batching", "sequential")):
                if getattr(self, name) != only:
                    raise InputError(f"documents={self.documents} goes without {name}: got {getattr(self, name)}")
            if self.text is None:
                raise InputError(f"documents={self.documents} needs text, the file or directory to read: got none")
        if self.patience and not self.heldout and self.heldout_file is None:
            raise InputError(f"patience={self.patience} needs held-out data: got heldout={self.heldout:g}")
        self._check_cell()
        if self.steps is not None and self.warmup >= self.steps:
            raise InputError(f"warmup must be less than steps={self.steps}: got {self.warmup}")
        if self.steps is None and self.epochs is None:
            object.__setattr__(self, "epochs", 10)
        if self.task == "classify":
            if self.classify is None:
                raise InputError("task=classify needs classify, the file of sequences with labels: got none")
            share, given = self.__dataclass_fields__["heldout"].default, self.heldout_file
            if given is not None and self.heldout != share:
                raise InputError(f"give heldout or heldout_file, not both: got {self.heldout:g} and {given}")
        if self.task == "text" and self.text is None and self.corpus is None:
            object.__setattr__(self, "corpus", DEFAULT)

    def _check_cell(self) -> None:
        """Refuse what is for other cells."""
        if self.nonlinearity is not None and self.cell not in with_nonlinearity():
            able = " or ".join(with_nonlinearity())
            raise InputError(
                f"nonlinearity is for cell={able}: got nonlinearity={self.nonlinearity} and cell={self.cell}"
            )
        if self.kernel not in (kernels := kernels_of(self.cell)):
            raise InputError(f"kernel must be one of {', '.join(kernels)} for cell={self.cell}: got {self.kernel!r}")
        if not has_kernels(self.cell) and self.gradient.startswith("adaptive"):
            layers = ", ".join(layer_cells())
            raise InputError(f"gradient=adaptive:... is for cell={layers}: got {self.gradient} and cell={self.cell}")

    def _choose_task(self) -> None:
        """Say which task it is, refuse the options of others, and fill in the defaults of its own."""
        told = [name for name in TELLING if getattr(self, name) is not None]
        if self.task is None:
            object.__setattr__(self, "task", TELLING[told[0]] if told else TASKS[0])
        for entry in fields(self):
            tasks, value = entry.metadata["tasks"], getattr(self, entry.name)
            if not tasks:
                continue
            if self.task in tasks:
                object.__setattr__(self, entry.name, entry.metadata["default"] if value is None else value)
            elif value is not None:
                why = f" with {told[0]}={getattr(self, told[0])}" if told and TELLING[told[0]] == self.task else ""
                raise InputError(
                    f"{entry.name} is for task={' or '.join(tasks)}: got {entry.name}={shown(value)} "
                    f"and task={self.task}{why}"
                )

    @property
    def source(self) -> str:
        """The data's name, as given."""
        return next((getattr(self, name) for name in TELLING if getattr(self, name) is not None), self.task)

    @classmethod
    def check(cls, name: str, value: Any) -> Any:
        """`value` as option `name` holds it. Raises InputError where it cannot be that option's.

        >>> Config.check("clip", 5)
        5.0
        """
        entry = cls.__dataclass_fields__[name]
        check: Check = entry.metadata["check"]
        allowed = _types()[name]
        if value is None and (type(None) in allowed or entry.default is None):
            return value
        if float in allowed and type(value) is int and abs(value) <= sys.float_info.max:
            value = float(value)
        if type(value) not in allowed or not check.holds(value):
            hint = check.hint(value) if type(value) is str else ""
            raise InputError(f"{name} must be {check.expected}: got {shown(value)}{hint}")
        if type(value) is str and not encodable(value):
            raise InputError(f"{name} must be UTF-8, or config.toml could not hold it: got {value!r}")
        if type(value) is not str and value > check.most:
            raise InputError(f"{name} must be at most {check.most}: got {shown(value)}")
        try:
            match name:
                case "gradient":
                    return str(policies.parse(value))
                case "memory":
                    return str(memory.parse(value))
                case "cell":
                    return named_cell(value)
                case "device" if value != "cpu":
                    check_device(value)
                    from torch import device

                    device(value)
        except (ValueError, RuntimeError) as error:
            if name == "device":
                raise bad_device(value, error) from None
            raise InputError(str(error).splitlines()[0]) from None
        return value

    def override(self, **options: Any) -> Config:
        """A copy with some options changed. One of `steps` and `epochs`, `text` and `corpus` replaces the other."""
        return replace(self, **_replaced(options), **options)

    @classmethod
    def from_toml(cls, text: str, source: str) -> Config:
        """The options of a TOML document, defaults elsewhere. source: where it was found, for error messages."""
        return cls.from_entries(read_entries(text, source), source)

    @classmethod
    def from_entries(cls, entries: Mapping[str, Any], source: str, **flags: Any) -> Config:
        """The options of a document already read. flags: options that win over it."""
        for name, value in flags.items():
            cls.check(name, value)
        replaced = _replaced(flags)
        try:
            return cls(**{name: value for name, value in entries.items() if name not in replaced} | flags)
        except InputError as error:
            raise InputError(f"{source}{' with the flags' if flags else ''}: {error}") from None

    def to_toml(self) -> str:
        """Every option that has a value, as `from_toml` reads it."""
        tomli_w = require("tomli_w", "cli")
        text: str = tomli_w.dumps({name: value for name, value in asdict(self).items() if value is not None})
        return text


FILES = tuple(entry.name for entry in fields(Config) if entry.metadata["check"] is FILE)
"""The options that name a file of data, which may move."""


def read_entries(text: str, source: str, also: Sequence[str] = ()) -> dict[str, Any]:
    """The entries of a TOML document by option, values unchecked. also: names allowed that are no options.

    Dashes count as underscores, as in the flags. Raises InputError, beginning with `source`, for what is not TOML and
    for names that are unknown or given twice.

    >>> read_entries("learning-rate = 1", "here")
    {'learning_rate': 1}
    """
    try:
        entries = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also for numbers of thousands of digits
        raise InputError(f"{source} is not TOML: {error}") from None
    known = [*(entry.name for entry in fields(Config)), *also]
    result: dict[str, Any] = {}
    unknown: dict[str, list[str]] = {}  # with the nearest known name
    for written, value in entries.items():
        name = written.replace("-", "_")
        name = ALIASES.get(name, name)
        if name not in known:
            unknown[written] = get_close_matches(name, known, n=1)
        elif name in result:
            raise InputError(f"{source}: {name} is given twice")
        else:
            result[name] = value
    if unknown:
        named = ", ".join(f"{name} (did you mean {near[0]}?)" if near else name for name, near in unknown.items())
        rest = "" if all(unknown.values()) else f"; known are {', '.join(known)}"
        raise InputError(f"{source}: unknown option {named}{rest}")
    return result


def shown(value: Any) -> str:
    """A value as messages show it."""
    try:
        return repr(value)
    except (ValueError, RecursionError):  # Python writes no number of thousands of digits, and nothing nested so deep
        return f"{type(value).__name__} too large to be shown"


def bad_device(device: str, error: Exception) -> InputError:
    """What to raise for a device that torch refuses. error: torch's words, of which the first line is kept."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return InputError(f"device must be a torch device that is there: got {device!r} ({reason})")


@cache
def _types() -> dict[str, tuple[type, ...]]:
    """The types that each option's value may have."""
    return {name: get_args(hint) or (hint,) for name, hint in get_type_hints(Config).items()}


def _replaced(options: Mapping[str, Any]) -> dict[str, Any]:
    """What `options` put out of force without naming it, as changes of their own: the other one of each pair."""
    given = {name for name, value in options.items() if value is not None}
    return {
        other: None for pair in EITHER for one, other in (pair, pair[::-1]) if one in given and other not in options
    }
