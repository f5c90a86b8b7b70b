"""What `bptt bench` can be asked for, by name: help and mistakes need no torch. Tests compare it with `bptt.bench`."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Sequence

from ..train import InputError
from ..train.options import KERNELS, STEP_KERNELS, layer_cells

__all__ = [
    "CALIBRATION_FILE",
    "COMPILE_SECONDS",
    "FLAGS",
    "LAYER_SHAPES",
    "STEP_CELLS",
    "STEP_SHAPES",
    "TABLES",
    "USUAL_STEPS",
    "USUAL_STEP_SHAPES",
    "USUAL_TABLES",
    "cells_of",
    "check_kernel",
    "cores",
    "names_of",
    "shapes_of",
    "threads_of",
]

TABLES = ("layers", "windows", "scan", "train", "steps", "inference", "short", "stacks")
USUAL_TABLES = TABLES[:4]
STEP_CELLS = (
    *("lstm", "gru", "layer-norm-lstm", "leaky", "lif", "slstm", "cornn", "lem", "peephole-lstm", "attention"),
    *("conv-lstm", "rk4", "ltc", "selective", "gated-delta", "kalman", "world-model"),
)
USUAL_STEPS = STEP_CELLS[:7]
LAYER_SHAPES, USUAL_STEP_SHAPES, STEP_SHAPES = 8, 2, 5
"""How many there are."""
COMPILE_SECONDS = 120.0
CALIBRATION_FILE = "BPTT_CALIBRATION"
"""The environment variable that names one."""

FLAGS = {"torch": "torch.nn", "jax": "JAX"}
"""What --peers says, and whom it means."""


def names_of(option: str, given: Sequence[str], allowed: Collection[str]) -> tuple[str, ...]:
    """Names out of `allowed`, each once, or an InputError."""
    for name in given:
        if name not in allowed:
            raise InputError(f"{option} must be one of {', '.join(allowed)}: got {name!r}")
    return tuple(dict.fromkeys(given))


def cells_of(tables: Collection[str], text: str | None, everything: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The cells of the layers, and those of the steps."""
    if text is None:
        return layer_cells(), STEP_CELLS if everything else USUAL_STEPS
    layers = layer_cells()
    known = dict.fromkeys((*(layers if {*tables} - {"steps"} else ()), *(STEP_CELLS if "steps" in tables else ())))
    given = names_of("cell", text.split(","), known)
    return tuple(name for name in given if name in layers), tuple(name for name in given if name in STEP_CELLS)


def shapes_of(
    tables: Collection[str], given: Sequence[str]
) -> tuple[tuple[tuple[int, int, int, int], ...], tuple[tuple[int, int, int], ...]]:
    """Those of four numbers, for the layers, and those of three, for the steps."""
    forms = {"layers": "four whole numbers of at least 1, T,B,I,H", "steps": "three, T,B,H"}
    layers: list[tuple[int, int, int, int]] = []
    steps: list[tuple[int, int, int]] = []
    for text in given:
        sizes = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
        match sizes:
            case [T, B, I, H] if min(sizes) > 0 and "layers" in tables:
                layers.append((T, B, I, H))
            case [T, B, H] if min(sizes) > 0 and "steps" in tables:
                steps.append((T, B, H))
            case _ if "layers" not in tables:
                raise InputError(f"shape must be three whole numbers of at least 1, T,B,H, for steps: got {text!r}")
            case _:
                wanted = " or ".join(form for name, form in forms.items() if name in tables)
                raise InputError(f"shape must be {wanted}: got {text!r}")
    return tuple(layers), tuple(steps)


def threads_of(text: str | None) -> list[int]:
    """Numbers of threads, each once: by default 1 and 2, as far as there are cores."""
    if text is None:
        return [count for count in (1, 2) if count <= cores()]
    counts = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if not all(1 <= count <= cores() for count in counts):
        raise InputError(f"threads must be whole numbers in [1, {cores()}], the cores there are: got {text!r}")
    return list(dict.fromkeys(counts))


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def check_kernel(tables: Collection[str], name: str) -> None:
    """Raise InputError for a kernel that the layers or the steps of these tables cannot have."""
    for what, kernels in (("layers", KERNELS), ("steps", STEP_KERNELS)):
        asked = "steps" in tables if what == "steps" else bool({*tables} - {"steps"})
        if asked and name not in ("auto", *kernels):
            raise InputError(f"kernel must be one of auto, {', '.join(kernels)} for {what}: got {name!r}")
