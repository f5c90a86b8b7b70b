"""A run small enough to train in a fraction of a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bptt.train import Config

TEXT = "the quick brown fox jumps over the lazy dog. " * 20  # 900 characters, 28 of them different


def write_text(folder: Path, text: str = TEXT) -> Path:
    path = folder / "text.txt"
    path.write_text(text, encoding="utf-8")
    return path


def write(folder: Path, data: str | bytes, name: str = "text.txt") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def tiny(text: Path, **options: Any) -> Config:
    defaults: dict[str, Any] = {
        "text": str(text),
        "cell": "gru",
        "hidden": 8,
        "embedding": 4,
        "batch": 4,
        "seq_length": 10,
        "steps": 20,
        "threads": 1,
        "log_every": 3,
        "eval_every": 8,
        "save_every": 7,
    }
    defaults |= options
    if defaults.get("epochs") is not None:
        defaults["steps"] = None
    return Config(**defaults)


def of_task(folder: Path, task: str, **options: Any) -> Config:
    """A run of a task: series of two columns in two groups with gaps, or short sequences of several lengths."""
    if task == "text":
        return tiny(write_text(folder), **{"steps": 12, **options})
    given = {"cell": "gru", "hidden": 6, "batch": 3, "steps": 12, "threads": 1} | options
    given = {"log_every": 3, "eval_every": 8, "save_every": 7} | given
    if task == "series":
        lines = [f"{g},{'' if t % 13 == 7 else t * t % 5},{3 * t % 4}" for g in (0, 1) for t in range(60 - 20 * g)]
        data = write(folder, "\n".join(["g,a,b", *lines]), "data.csv")
        return Config(series=str(data), **{"group": "g", "seq_length": 9} | given)
    lines = [f"{i},{i * t % 7},{i % 2}" for i in range(14) for t in range(3 + 3 * i % 5)]
    data = write(folder, "\n".join(["id,x,label", *lines]), "data.csv")
    return Config(classify=str(data), **{"heldout": 0.3} | given)
