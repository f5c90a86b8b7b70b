"""What an option may be: its check, in words and as a predicate, its default, and the tasks that it is for.

Nothing here imports torch: what a configuration can be refused for without it, it is refused for without.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import Any

__all__ = [
    "CELL",
    "CELLS",
    "FILE",
    "FLAG",
    "FRACTION",
    "KERNEL",
    "KERNELS",
    "LANES",
    "LITERATURE",
    "LOSSES",
    "NOT_NEGATIVE",
    "POOLS",
    "RATE",
    "SEED",
    "SIDE",
    "SPLIT",
    "STEP_KERNELS",
    "TEXT",
    "THREADS",
    "USES",
    "Check",
    "at_least",
    "check_device",
    "has_kernels",
    "kernels_of",
    "layer_cells",
    "named_cell",
    "one_of",
    "option",
    "with_nonlinearity",
]


@dataclass(frozen=True)
class Check:
    """What a value must be, in words and as a predicate. most: the largest number it may be. choices: all there are.

    hint: what to say of a text that it must not be.
    """

    expected: str
    holds: Callable[[Any], bool]
    most: float = math.inf
    choices: tuple[str, ...] = ()
    hint: Callable[[str], str] = lambda value: ""


CELLS = ("rnn", "gru", "lstm")
"""Those of `bptt.nn.LAYERS`, for help and messages without torch."""
NONLINEAR = ("rnn",)
"""Those whose activation can be chosen."""
LITERATURE = {
    "alif": "ALIF",
    "cfc": "CfC",
    "cornn": "CoRNN",
    "indrnn": "IndRNN",
    "layer-norm-lstm": "LayerNormLSTM",
    "leaky": "LeakyRNN",
    "lif": "LIF",
    "mgu": "MGU",
    "slstm": "SLSTM",
}
"""The names of the cells of `bptt.nn.cells`, with their classes there."""
ALSO = {"minimal-gated": "mgu", "minimal-gated-unit": "mgu"}
"""Other names of them."""
OWN = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
"""A class of the user's own."""
KERNELS = ("cpu", "fused", "eager")
"""Those of `bptt.kernels`, likewise."""
STEP_KERNELS = ("interpreter", "eager", "replay")
"""Those of `bptt.scan`, which runs every cell that has no kernels of its own."""
USES = {
    "text": "sample from it: bptt sample {run}",
    "series": "forecast with it: bptt predict {run} DATA.csv",
    "classify": "classify with it: bptt predict {run} FILE",
}
"""The tasks by name, and what a run of each is good for; `{run}`: its directory."""
DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "xla", "ipu", "hip", "meta", "maia", "privateuseone", "vulkan")
"""Devices that torch knows by name; others come from packages that it loads with it."""
LANES = 8
"""Lanes that are measured where no number is asked for: enough for a mean, few enough to be quick."""


def _known(names: tuple[str, ...], module: str, table: str) -> tuple[str, ...]:
    """The names of a table of the package, where its module is loaded; nobody can have added to it before."""
    loaded = sys.modules.get(f"bptt.{module}")
    return tuple(getattr(loaded, table, names))


def named_cell(text: str) -> str | None:
    """The cell of a name, of which case, dashes and underscores do not matter; None where nobody has that name.

    >>> named_cell("LayerNormLSTM"), named_cell("minimal_gated"), named_cell("my_cells:Mine"), named_cell("rrn")
    ('layer-norm-lstm', 'mgu', 'my_cells:Mine', None)
    """
    if has_kernels(text) or OWN.fullmatch(text):
        return text
    known = {_bare(name): name for name in layer_cells()}
    known |= {_bare(word): name for name, kind in LITERATURE.items() for word in (name, kind)}
    known |= {_bare(word): name for word, name in ALSO.items()}
    return known.get(_bare(text))


def layer_cells() -> tuple[str, ...]:
    """The names of the layers of `bptt.nn`."""
    return _known(CELLS, "nn", "LAYERS")


def has_kernels(cell: str) -> bool:
    """Whether a cell is a layer of `bptt.nn` with kernels of its own; the others are run by `bptt.scan`."""
    return cell in layer_cells()


def kernels_of(cell: str) -> tuple[str, ...]:
    """What may compute a cell, by name."""
    return ("auto", *(_known(KERNELS, "kernels", "KERNELS") if has_kernels(cell) else STEP_KERNELS))


def with_nonlinearity() -> tuple[str, ...]:
    """The layers whose activation can be chosen."""
    layers = getattr(sys.modules.get("bptt.nn"), "LAYERS", None)
    return NONLINEAR if layers is None else tuple(name for name, kind in layers.items() if kind.nonlinearities)


def nearest_cell(text: str) -> str:
    """What somebody may have meant, in words; else nothing."""
    near = get_close_matches(text.lower(), [*layer_cells(), *LITERATURE, *ALSO], n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _bare(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def check_device(text: str) -> None:
    """Raise ValueError for a device that torch can have from nowhere; it has the last word on the others."""
    kind = text.partition(":")[0]
    if kind not in DEVICES and not entry_points(group="torch.backends"):
        near = ["cuda"] if kind.lower() == "gpu" else get_close_matches(kind.lower(), DEVICES, n=1)
        raise ValueError(f"Expected one of {', '.join(DEVICES)}" + (f"; did you mean {near[0]}?" if near else ""))


def one_of(*names: str) -> Check:
    """One of some names."""
    return Check(f"one of {', '.join(names)}", lambda value: value in names, choices=names)


def at_least(least: int, most: int = 2**63 - 1) -> Check:
    """A whole number."""
    return Check(f"a whole number of at least {least}", lambda value: value >= least, most)


SIDE = 2**31 - 1  # of a side of a tensor
RATE = Check(  # float32 ends at 3.4e38, and Adam divides the rate by 0.1 in its first step
    "a finite number above 0", lambda value: 0 < value < math.inf, most=1e37
)
NOT_NEGATIVE = Check("a finite number of at least 0", lambda value: 0 <= value < math.inf)
FRACTION = Check("a number of at least 0 and below 1", lambda value: 0 <= value < 1)
CELL = Check(
    f"one of {', '.join((*CELLS, *LITERATURE))}, or MODULE:CLASS of your own",
    lambda value: named_cell(value) is not None,
    choices=(*CELLS, *LITERATURE, "MODULE:CLASS"),
    hint=nearest_cell,
)
TEXT = Check("text", lambda value: True)  # what it may say is checked where it is read
KERNEL = Check(
    f"one of auto, {', '.join(KERNELS)}; of a cell without kernels of its own {', '.join(STEP_KERNELS)}",
    lambda value: value in ("auto", *STEP_KERNELS) or value in _known(KERNELS, "kernels", "KERNELS"),
    choices=("auto", *dict.fromkeys((*KERNELS, *STEP_KERNELS))),
)
SPLIT = Check(
    "lines, paragraphs, files or jsonl:FIELD",
    lambda value: value in ("lines", "paragraphs", "files") or (value.startswith("jsonl:") and len(value) > 6),
)
FLAG = Check("true or false", lambda value: True)
FILE = Check("a file name", lambda value: bool(value) and "\0" not in value)
LOSSES = ("squared", "absolute")
"""What an error of a forecast costs."""
POOLS = ("last", "mean")
"""Which of a sequence's states a classifier reads: the last one, or the mean of all."""
SEED = Check("a whole number in [0, 2**63)", lambda value: 0 <= value < 2**63)
_MOST = 1024  # with very many more, OpenMP does not report that it cannot start them: it crashes
THREADS = Check(f"a whole number in [0, {_MOST}]", lambda value: 0 <= value <= _MOST)


def option(default: Any, check: Check, meaning: str, *tasks: str) -> Any:
    """A field of `Config`. tasks: those that the option is for, by name; none: all.

    One that is for some tasks is None under the others, and refused there where it is given.
    """
    about = {"check": check, "meaning": meaning, "default": default, "tasks": tasks}
    return field(default=None if tasks else default, metadata=about)
