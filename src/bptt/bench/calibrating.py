"""torch's own layers against the compiled walks on a CPU, both inside of bptt's layer: what `kernel="auto"` goes by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product

import numpy as np
import torch

from ..cells import of_name
from ..kernels import BY_LIBRARY, Calibration, Measured, variants
from ..nn import LAYERS
from .cases import SHAPES, Case
from .contest import Call, Contest
from .layers import NAMES, Problem, layer_call
from .results import Machine, Row

__all__ = ["CALIBRATED", "CALIBRATED_CELLS", "CALIBRATION_TABLES", "calibration_contest", "calibration_of"]

CALIBRATION_TABLES = ("calibration", "calibration, inference")
"""The tables of calls with their gradient, and of those without: names in `tables.TABLES`."""

MOST = 230_000_000
"""T B H^2 up to which shapes of the grid are measured."""

GRID = tuple(
    (T, B, H, H) for T, B, H in product((64, 512), (8, 16, 32, 64), (64, 128, 256, 512)) if T * B * H * H <= MOST
)

CALIBRATED_CELLS = tuple(name for name in LAYERS if of_name(name).mode in BY_LIBRARY)
"""The cells that are measured where none are named: on a CPU torch runs the others one operation at a time."""

CALIBRATED = tuple(dict.fromkeys((*(shape for shape in SHAPES if shape[1] > 1), *GRID)))
"""T, B, I, H of what is measured where no shapes are given. Of one lane torch's layers are never the faster ones."""


def calibration_contest(case: Case, differentiated: bool) -> Contest:
    """bptt's layer by the walks, "cpu", and by torch's own layer, "fused": forward and backward, or forward alone.

    >>> contest = calibration_contest(Case("gru", 5, 2, 3, 4), differentiated=True)
    >>> {name: error < 1e-5 for name, (error, _) in contest.errors().items()}
    {'cpu': True, 'fused': True}
    """
    problem, names = Problem.of(case), ("cpu", "fused")
    if differentiated:
        calls = {name: layer_call(problem.ours(name), problem.x, problem.dy) for name in names}
        return Contest(NAMES, calls, problem.truth())
    truth = _inference(problem.exact(), problem.x.double())()
    calls = {name: _inference(problem.ours(name), problem.x) for name in names}
    return Contest(NAMES[:1], calls, [np.asarray(value) for value in truth])


def calibration_of(rows: Iterable[Row], machine: Machine) -> Calibration:
    """What rows of `CALIBRATION_TABLES` say, those in which both were timed."""
    found = []
    for row in rows:
        if row.table in CALIBRATION_TABLES and {"cpu", "fused"} <= row.times.keys():
            cpu, fused = ((t.low, t.median, t.high) for t in (row.times["cpu"], row.times["fused"]))
            differentiated = row.table == CALIBRATION_TABLES[0]
            mode = of_name(row.case.cell).mode
            found.append(Measured(mode, *row.case.shape, row.threads, differentiated, cpu, fused))
    return Calibration(variants()[0], machine.torch, machine.processor, machine.date, tuple(found))


def _inference(layer: torch.nn.Module, x: torch.Tensor) -> Call:
    def call() -> Sequence[torch.Tensor]:
        with torch.no_grad():
            return (layer(x)[0],)

    return call
