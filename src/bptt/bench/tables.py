"""Which contests there are, and how one is measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf

import torch

from ..clock import interleaved, product
from ..nn import LAYERS
from .bounds import layer_parts
from .calibrating import CALIBRATION_TABLES, calibration_contest
from .cases import SHAPES, Case
from .contest import TOLERANCE, Call, Contest
from .layers import PEERS, layer_contest
from .limited import COMPILE_SECONDS
from .results import Row
from .short import SHORT, inference_contest, short_contest
from .stacks import STACKS, stack_contest
from .steps import STEP_SHAPES, USUAL_STEPS, cell_contest, contenders, step_cases, step_contest
from .training import training_contest
from .windows import window_contest

__all__ = ["TABLES", "Selection", "Table", "measure"]


@dataclass(frozen=True)
class Selection:
    """What to measure, and for how long.

    tables: names in `TABLES`. cells: of all tables but "steps". shapes: T, B, I, H of the layers; the other tables have
    their own. peers: of the layers, names in `layers.PEERS`, and JAX of the steps. kernel: of bptt's layers and of its
    scan of the steps. seconds: of each row, about. least: samples of each contender, at least.

    step_cells: names in `STEP_CELLS`. step_shapes: their T, B, H. policies: whether steps are timed under policies too.
    compiled: whether `torch.compile` of the step is a contender; compile_seconds: that it may take.

    known: rows measured before; `left` leaves out those that have all contenders.
    """

    tables: tuple[str, ...] = ("layers", "windows", "scan", "train")
    cells: tuple[str, ...] = tuple(LAYERS)
    shapes: tuple[tuple[int, int, int, int], ...] = SHAPES
    peers: tuple[str, ...] = tuple(PEERS)
    kernel: str = "auto"
    seconds: float = 2.0
    least: int = 5
    step_cells: tuple[str, ...] = USUAL_STEPS
    step_shapes: tuple[tuple[int, int, int], ...] = STEP_SHAPES[:2]
    policies: bool = True
    compiled: bool = False
    compile_seconds: float = COMPILE_SECONDS
    known: tuple[Row, ...] = ()

    def cases(self) -> list[tuple[str, Case]]:
        """Every row's table and case, in order.

        >>> [str(case) for _, case in Selection(("layers", "scan"), ("lstm",), shapes=((7, 1, 2, 3),)).cases()]
        ['LSTM (7, 1, 2, 3)', 'LSTM (100, 1, 32, 32)', 'LSTM (100, 32, 128, 128)']
        """
        made = {
            "layers": [Case(cell, *shape) for shape in self.shapes for cell in self.cells],
            "steps": step_cases(self.step_cells, self.step_shapes, self.policies),
        }
        made |= dict.fromkeys(CALIBRATION_TABLES, made["layers"])
        rows = [(name, case) for name in self.tables for case in made.get(name, TABLES[name].cases)]
        return [(name, case) for name, case in rows if name == "steps" or case.cell in self.cells]

    def left(self, threads: int) -> list[tuple[str, Case]]:
        """Those of `cases` that are not known on so many threads."""
        known = {row.place: {*row.errors, *row.missing} for row in self.known}
        return [
            (name, case)
            for name, case in self.cases()
            if (name, case, threads) not in known or not known[name, case, threads] >= self._contenders(name, case)
        ]

    def _contenders(self, name: str, case: Case) -> set[str]:
        """Those of a step; of another table there is no choice, or one of peers."""
        if name == "steps":
            return {*contenders(case, self.kernel, "JAX" in self.peers, self.compiled)}
        return {*self.peers} if name == "layers" and LAYERS[case.cell].torchs is not None else set()


@dataclass(frozen=True)
class Table:
    """A kind of contest. cases: of the table, where a selection has none. parts: what is timed beside it."""

    title: str
    contest: Callable[[Case, Selection], Contest]
    cases: tuple[Case, ...] = ()
    parts: Callable[[Case], dict[str, Call]] | None = None


def _steps(case: Case, selection: Selection) -> Contest:
    return cell_contest(case, selection.kernel, "JAX" in selection.peers, selection.compiled, selection.compile_seconds)


_WITH_GRADIENT, _INFERENCE = CALIBRATION_TABLES

TABLES = {
    "layers": Table(
        "layers", lambda case, selection: layer_contest(case, selection.peers, selection.kernel), parts=layer_parts
    ),
    "windows": Table(
        "truncation",
        lambda case, selection: window_contest(case, selection.kernel),
        (
            Case("rnn", 1000, 1, 64, 64, "truncated:32"),
            *(Case(cell, 1000, 8, 64, 64, "chunked:35") for cell in ("rnn", "lstm")),
        ),
    ),
    "scan": Table(
        "scan",
        lambda case, selection: step_contest(case, selection.kernel),
        (Case("lstm", 100, 1, 32, 32), Case("lstm", 100, 32, 128, 128)),
    ),
    "train": Table(
        "training step",
        lambda case, selection: training_contest(case, selection.kernel),
        tuple(Case(cell, 64, 32, 64, 256) for cell in LAYERS),
    ),
    "steps": Table("steps", _steps),
    "inference": Table(
        "a few steps, no_grad", lambda case, selection: inference_contest(case, selection.kernel), SHORT
    ),
    "short": Table(
        "a few steps, forward + backward", lambda case, selection: short_contest(case, selection.kernel), SHORT
    ),
    _WITH_GRADIENT: Table("forward + backward by kernel", lambda case, selection: calibration_contest(case, True)),
    _INFERENCE: Table("no_grad by kernel", lambda case, selection: calibration_contest(case, False)),
    "stacks": Table("layers, both ways, packed", lambda case, selection: stack_contest(case, selection.kernel), STACKS),
}


def measure(selection: Selection, threads: int) -> Iterator[Row]:
    """Every row of a selection that is not known yet, in this process, as it is: threads is only noted.

    A contender that fails its check is not timed.

    Raises InputError for the peer JAX where it is not installed, RuntimeError where a named kernel cannot run a layer.

    >>> few = Selection(("layers",), ("rnn",), ((5, 2, 3, 4),), ("torch.nn",), seconds=0.0, least=2)
    >>> [row] = measure(few, threads=1)
    >>> sorted(row.times), row.wrong
    (['bptt', 'torch.nn'], [])
    """
    products = [product()]
    for name, case in selection.left(threads):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            contest = TABLES[name].contest(case, selection)
        checks = contest.checked()
        errors = {contender: check.error for contender, check in checks.items()}
        right = {
            contender: call for contender, call in contest.calls.items() if errors.get(contender, inf) <= TOLERANCE
        }
        parts = TABLES[name].parts
        beside = {} if parts is None else parts(case)
        timed = interleaved(right | beside, selection.seconds, selection.least)
        times = {contender: timed[contender] for contender in right}
        products.append(product())
        rate, got = (statistics.median(values) for values in zip(*products, strict=True))
        first = {contender: max(0.0, checks[contender].seconds - timing.median) for contender, timing in times.items()}
        yield Row(name, case, threads, errors, times, rate, got, first, dict(contest.missing),
                  parts={part: timed[part] for part in beside})  # fmt: skip
