"""`bptt predict` of a run that classifies."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np

from ..train import RunDirectory, atomic
from ..train.extras import require
from ..train.tasks.classification import predictions
from ..train.trained import load
from .pictures import write_picture

__all__ = ["write_classes"]


def write_classes(run: Path, data: Path, target: Path, device: str) -> str:
    """Write the class of each sequence, and the confusion matrix of those with known labels; says what was written."""
    model, stored, config = load(RunDirectory.open(run), device, "classify")
    found = predictions(model, stored, config, data)
    numbers = {name: number for number, name in enumerate(stored.names)}
    known = [each for each in found if each.true in numbers]
    plots = require("bptt.plots", "plots") if known and require("matplotlib", "plots") else None
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["sequence", "label", "probability", *(f"p({name})" for name in stored.names)])
    for each in found:
        writer.writerow([each.name, each.label, max(each.probabilities), *each.probabilities])
    atomic.write(target, text.getvalue().encode())
    said = f"{target}: {len(found)} sequences"
    if plots is None:
        return said
    counts = np.zeros((len(numbers), len(numbers)), dtype=np.int64)
    for each in known:
        counts[numbers[each.true or ""], numbers[each.label]] += 1
    picture = target.with_suffix(".png")
    write_picture(plots.confusion(counts, stored.names), picture)
    right, total = int(counts.trace()), sum(each.true is not None for each in found)
    return f"{said}; {right} of {total} labels are right, accuracy {right / total:.4f}; picture: {picture}"
