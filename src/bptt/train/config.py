"""Every option of a training run, its default, its meaning and its check: one table."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, get_args, get_type_hints

import torch

from .. import kernels, memory, policies
from .corpus import CORPORA, PREPROCESSORS
from .errors import InputError
from .extras import require

__all__ = ["Config"]


@dataclass(frozen=True)
class _Check:
    """What a value must be, in words and as a predicate."""

    expected: str
    holds: Callable[[Any], bool]


def _one_of(*names: str) -> _Check:
    return _Check(f"one of {', '.join(names)}", lambda value: value in names)


def _at_least(least: int) -> _Check:
    return _Check(f"a whole number of at least {least}", lambda value: value >= least)


_POSITIVE = _Check("a finite number above 0", lambda value: 0 < value < math.inf)
_NOT_NEGATIVE = _Check("a finite number of at least 0", lambda value: 0 <= value < math.inf)
_FRACTION = _Check("a number of at least 0 and below 1", lambda value: 0 <= value < 1)
_TEXT = _Check("text", lambda value: bool(value))


def _option(default: Any, check: _Check, meaning: str) -> Any:
    return field(default=default, metadata={"check": check, "meaning": meaning})


@dataclass(frozen=True, kw_only=True)
class Config:
    """The options of a run. Immutable; every value is checked, and a bad one raises InputError.

    At most one of `steps` and `epochs` is given; with neither, 10 epochs.

    >>> Config(cell="gru", gradient="chunked:16").gradient
    'chunked:16'
    >>> Config(batch=0)
    Traceback (most recent call last):
    bptt.train.errors.InputError: batch must be a whole number of at least 1: got 0
    """

    corpus: str = _option("python-docs", _one_of(*CORPORA), "named corpus to read when no text file is given")
    text: str | None = _option(None, _TEXT, "UTF-8 file to read instead of a named corpus")
    preprocess: str = _option("none", _one_of(*PREPROCESSORS), "letters: keep lower-case letters and single spaces")
    tokens: str = _option("char", _one_of("char", "word"), "what a token is; words are what white space separates")
    min_count: int = _option(1, _at_least(1), "tokens seen less often in the training text become <unk>")
    limit: int = _option(0, _at_least(0), "use the first so many tokens only; 0: all")
    heldout: float = _option(0.1, _FRACTION, "fraction held out, the end of the text; 0: none")

    cell: str = _option("lstm", _one_of("rnn", "gru", "lstm"), "what recurs")
    nonlinearity: str = _option("tanh", _one_of("tanh", "relu"), "activation of the rnn cell")
    layers: int = _option(1, _at_least(1), "recurrent layers")
    hidden: int = _option(256, _at_least(1), "units per recurrent layer")
    embedding: int = _option(64, _at_least(0), "size of the token embedding; 0: one-hot")
    dropout: float = _option(0.0, _FRACTION, "probability, on the embedding, between layers and before the output")
    gradient: str = _option("full", _TEXT, "how far gradients reach inside a window: full, chunked:K, truncated:K, ...")
    memory: str = _option("auto", _one_of(*get_args(memory.Memory)), "what the forward pass keeps")
    kernel: str = _option("auto", _TEXT, "who computes the recurrence")

    steps: int | None = _option(None, _at_least(1), "optimiser steps in all (or give epochs)")
    epochs: int | None = _option(None, _at_least(1), "passes over the training text (or give steps); default 10")
    batch: int = _option(32, _at_least(1), "lanes B")
    seq_length: int = _option(64, _at_least(1), "steps T of a window; no gradient crosses into the last window")
    batching: str = _option(
        "sequential", _one_of("sequential", "random"), "contiguous lanes and carried state, or random windows"
    )
    optimiser: str = _option("adam", _one_of("adam", "sgd"), "update rule")
    learning_rate: float = _option(0.002, _POSITIVE, "step size")
    clip: float = _option(1.0, _NOT_NEGATIVE, "largest global norm of the gradient; 0: no clipping")

    seed: int = _option(0, _Check("a whole number in [0, 2**63)", lambda value: 0 <= value < 2**63), "random seed")
    dtype: str = _option("float32", _one_of("float32", "float64"), "of weights and states")
    device: str = _option("cpu", _TEXT, "torch device")
    threads: int = _option(0, _at_least(0), "CPU threads; 0: torch's choice")
    log_every: int = _option(50, _at_least(1), "steps between lines of metrics.jsonl")
    eval_every: int = _option(500, _at_least(1), "steps between measurements on the held-out text")
    save_every: int = _option(500, _at_least(1), "steps between checkpoints")

    def __post_init__(self) -> None:
        hints = get_type_hints(Config)
        for entry in fields(self):
            value = getattr(self, entry.name)
            check: _Check = entry.metadata["check"]
            allowed = get_args(hints[entry.name]) or (hints[entry.name],)
            if value is None and type(None) in allowed:
                continue
            if float in allowed and type(value) is int:
                object.__setattr__(self, entry.name, value := float(value))
            if type(value) not in allowed or not check.holds(value):
                raise InputError(f"{entry.name} must be {check.expected}: got {value!r}")
        try:
            object.__setattr__(self, "gradient", str(policies.parse(self.gradient)))
            kernels.check(self.kernel)
            torch.device(self.device)
        except (ValueError, RuntimeError) as error:
            raise InputError(str(error).splitlines()[0]) from None
        if self.steps is not None and self.epochs is not None:
            raise InputError(f"give steps or epochs, not both: got steps={self.steps} and epochs={self.epochs}")
        if self.steps is None and self.epochs is None:
            object.__setattr__(self, "epochs", 10)

    def override(self, **options: Any) -> Config:
        """A copy with some options changed. One of `steps` and `epochs` takes the place of the other."""
        if (options.get("steps") is None) != (options.get("epochs") is None):
            options = {"steps": None, "epochs": None, **options}
        return replace(self, **options)

    @classmethod
    def from_toml(cls, text: str, source: str) -> Config:
        """The options of a TOML document, defaults elsewhere. source: where it was found, for error messages."""
        try:
            entries = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"{source} is not TOML: {error}") from None
        known = [entry.name for entry in fields(cls)]
        if unknown := [name for name in entries if name not in known]:
            raise InputError(f"{source}: unknown option {', '.join(unknown)}; known are {', '.join(known)}")
        try:
            return cls(**entries)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None

    def to_toml(self) -> str:
        """Every option that has a value, as `from_toml` reads it."""
        tomli_w = require("tomli_w", "cli")
        text: str = tomli_w.dumps({name: value for name, value in asdict(self).items() if value is not None})
        return text
