"""Every option of a training run, its default, its meaning and its check: one table.

What a configuration can be refused for without torch, it is refused for without: nothing here imports it at the top.
"""

from __future__ import annotations

import math
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from functools import cache
from typing import Any, get_args, get_type_hints

from .. import memory, policies
from .corpus import CORPORA, DEFAULT, PREPROCESSORS, encodable
from .errors import InputError
from .extras import require
from .rates import SCHEDULES

__all__ = ["ALIASES", "CELLS", "GROUPS", "LANES", "Config", "read_entries", "shown"]

ALIASES = {"optimizer": "optimiser"}
"""Other spellings of an option, in a file and as a flag."""

GROUPS = {"corpus": "Data", "cell": "Model", "gradient": "Gradient", "steps": "Optimisation", "seed": "Run"}
"""The first option of each group, and its name; the options that follow belong to it."""

LANES = 8
"""Lanes that are measured where no number is asked for: enough for a mean, few enough to be quick."""

EITHER = (("steps", "epochs"), ("text", "corpus"))
"""Pairs of options of which at most one is given: two answers to one question."""


@dataclass(frozen=True)
class _Check:
    """What a value must be, in words and as a predicate. most: the largest number it may be. choices: all there are."""

    expected: str
    holds: Callable[[Any], bool]
    most: float = math.inf
    choices: tuple[str, ...] = ()


CELLS = ("rnn", "gru", "lstm")
"""Those of `bptt.nn.LAYERS`, for help and messages without torch."""
KERNELS = ("cpu", "fused", "eager")
"""Those of `bptt.kernels`, likewise."""


def _known(names: tuple[str, ...], module: str, table: str) -> tuple[str, ...]:
    """The names of a table of the package, where its module is loaded; nobody can have added to it before."""
    loaded = sys.modules.get(f"bptt.{module}")
    return tuple(getattr(loaded, table, names))


def _one_of(*names: str) -> _Check:
    return _Check(f"one of {', '.join(names)}", lambda value: value in names, choices=names)


def _at_least(least: int, most: int = 2**63 - 1) -> _Check:
    return _Check(f"a whole number of at least {least}", lambda value: value >= least, most)


_SIDE = 2**31 - 1  # of a side of a tensor
_RATE = _Check(  # float32 ends at 3.4e38, and Adam divides the rate by 0.1 in its first step
    "a finite number above 0", lambda value: 0 < value < math.inf, most=1e37
)
_NOT_NEGATIVE = _Check("a finite number of at least 0", lambda value: 0 <= value < math.inf)
_FRACTION = _Check("a number of at least 0 and below 1", lambda value: 0 <= value < 1)
_CELL = _Check(f"one of {', '.join(CELLS)}", lambda value: value in _known(CELLS, "nn", "LAYERS"), choices=CELLS)
_TEXT = _Check("text", lambda value: True)  # what it may say is checked where it is read
_KERNEL = _Check(
    f"one of auto, {', '.join(KERNELS)}",
    lambda value: value == "auto" or value in _known(KERNELS, "kernels", "KERNELS"),
    choices=("auto", *KERNELS),
)
_SPLIT = _Check(
    "lines, paragraphs, files or jsonl:FIELD",
    lambda value: value in ("lines", "paragraphs", "files") or (value.startswith("jsonl:") and len(value) > 6),
)
_FILE = _Check("a file name", lambda value: bool(value) and "\0" not in value)
_THREADS = 1024  # with very many more, OpenMP does not report that it cannot start them: it crashes


def _option(default: Any, check: _Check, meaning: str) -> Any:
    return field(default=default, metadata={"check": check, "meaning": meaning})


@dataclass(frozen=True, kw_only=True)
class Config:
    """The options of a run. Immutable; every value is checked, and a bad one raises InputError.

    At most one of `steps` and `epochs` is given; with neither, 10 epochs. At most one of `text` and `corpus` is given;
    with neither, the corpus python-docs. `nonlinearity` is for the rnn cell alone.

    >>> Config(cell="gru", gradient="chunked:16").gradient
    'chunked:16'
    >>> Config(batch=0)
    Traceback (most recent call last):
    bptt.train.errors.InputError: batch must be a whole number of at least 1: got 0
    """

    corpus: str | None = _option(None, _one_of(*CORPORA), f"named corpus to read (or give text); default {DEFAULT}")
    text: str | None = _option(None, _FILE, "UTF-8 file to read (or give corpus)")
    documents: str | None = _option(
        None,
        _SPLIT,
        "what is a document, with a state of its own: lines, paragraphs, files (text: a directory), jsonl:KEY",
    )
    preprocess: str = _option("none", _one_of(*PREPROCESSORS), "letters: keep lower-case letters and single spaces")
    tokens: str = _option("char", _one_of("char", "word"), "what a token is; words are what white space separates")
    min_count: int = _option(1, _at_least(1), "tokens seen less often in the training text become <unk>")
    limit: int = _option(0, _at_least(0), "use the first so many tokens only; 0: all")
    heldout: float = _option(0.1, _FRACTION, "fraction held out, the end of the text; 0: none")

    cell: str = _option("lstm", _CELL, "what recurs")
    nonlinearity: str | None = _option(None, _one_of("tanh", "relu"), "activation of the rnn cell; default tanh")
    layers: int = _option(1, _at_least(1, 1000), "recurrent layers")
    hidden: int = _option(256, _at_least(1, _SIDE), "units per recurrent layer")
    embedding: int = _option(64, _at_least(0, _SIDE), "size of the token embedding; 0: one-hot")
    dropout: float = _option(0.0, _FRACTION, "probability, on the embedding, between layers and before the output")
    gradient: str = _option("full", _TEXT, "how far gradients reach inside a window: full, chunked:K, truncated:K, ...")
    adapt_every: int = _option(50, _at_least(1), "steps between measurements of the window of gradient=adaptive:...")
    memory: str = _option(
        "auto", _TEXT, "what the forward pass keeps: auto, gates, states, checkpoints[:steps=S or :bytes=N]"
    )
    kernel: str = _option("auto", _KERNEL, "who computes the recurrence")

    steps: int | None = _option(None, _at_least(1), "optimiser steps in all (or give epochs)")
    epochs: int | None = _option(None, _at_least(1), "passes over the training text (or give steps); default 10")
    batch: int = _option(32, _at_least(1, 2**20), "lanes B")
    accumulate: int = _option(1, _at_least(1), "windows per optimiser step, one after another")
    seq_length: int = _option(64, _at_least(1, _SIDE), "steps T of a window; no gradient crosses into the last window")
    batching: str = _option(
        "sequential", _one_of("sequential", "random"), "contiguous lanes and carried state, or random windows"
    )
    optimiser: str = _option("adam", _one_of("adam", "sgd"), "update rule")
    learning_rate: float = _option(0.002, _RATE, "step size")
    schedule: str = _option(
        "constant", _one_of(*SCHEDULES), "of the learning rate: constant, or falling to 0 at the end of the run"
    )
    warmup: int = _option(0, _at_least(0), "steps over which the learning rate rises before that")
    clip: float = _option(1.0, _NOT_NEGATIVE, "largest global norm of the gradient; 0: no clipping")
    on_nonfinite: str = _option(
        "stop", _one_of("stop", "skip"), "a step that is not finite: stop with the diagnosis, or skip it and go on"
    )

    seed: int = _option(0, _Check("a whole number in [0, 2**63)", lambda value: 0 <= value < 2**63), "random seed")
    dtype: str = _option("float32", _one_of("float32", "float64"), "of weights and states")
    device: str = _option("cpu", _TEXT, "torch device")
    threads: int = _option(
        0,
        _Check(f"a whole number in [0, {_THREADS}]", lambda value: 0 <= value <= _THREADS),
        "CPU threads; 0: torch's choice",
    )
    log_every: int = _option(50, _at_least(1), "steps between lines of metrics.jsonl")
    eval_every: int = _option(500, _at_least(1), "steps between measurements on the held-out text")
    save_every: int = _option(500, _at_least(1), "steps between checkpoints")
    keep: int = _option(3, _at_least(1), "checkpoints that stay; the older ones are removed")

    def __post_init__(self) -> None:
        for entry in fields(self):
            object.__setattr__(self, entry.name, self.check(entry.name, getattr(self, entry.name)))
        for one, other in EITHER:
            first, second = getattr(self, one), getattr(self, other)
            if first is not None and second is not None:
                raise InputError(f"give {one} or {other}, not both: got {one}={first} and {other}={second}")
        if self.documents is not None:
            for name, only in (("corpus", None), ("limit", 0), ("batching", "sequential")):
                if getattr(self, name) != only:
                    raise InputError(f"documents={self.documents} goes without {name}: got {getattr(self, name)}")
            if self.text is None:
                raise InputError(f"documents={self.documents} needs text, the file or directory to read: got none")
        if self.nonlinearity is not None:
            _check_nonlinearity(self.nonlinearity, self.cell)
        if self.steps is not None and self.warmup >= self.steps:
            raise InputError(f"warmup must be less than steps={self.steps}: got {self.warmup}")
        if self.steps is None and self.epochs is None:
            object.__setattr__(self, "epochs", 10)
        if self.text is None and self.corpus is None:
            object.__setattr__(self, "corpus", DEFAULT)

    @classmethod
    def check(cls, name: str, value: Any) -> Any:
        """`value` as option `name` holds it. Raises InputError where it cannot be that option's.

        >>> Config.check("clip", 5)
        5.0
        """
        entry = cls.__dataclass_fields__[name]
        check: _Check = entry.metadata["check"]
        allowed = _types()[name]
        if value is None and type(None) in allowed:
            return value
        if float in allowed and type(value) is int and abs(value) <= sys.float_info.max:
            value = float(value)
        if type(value) not in allowed or not check.holds(value):
            raise InputError(f"{name} must be {check.expected}: got {shown(value)}")
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
                case "device" if value != "cpu":
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


def _check_nonlinearity(nonlinearity: str, cell: str) -> None:
    from ..nn import LAYERS

    if not LAYERS[cell].nonlinearities:
        able = " or ".join(name for name, layer in LAYERS.items() if layer.nonlinearities)
        raise InputError(f"nonlinearity is for cell={able}: got nonlinearity={nonlinearity} and cell={cell}")


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
