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
