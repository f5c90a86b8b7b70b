"""What there is to compute with: what `bptt info` shows."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from .. import __version__, kernels
from ..kernels.calibration import calibration

__all__ = ["processor", "rows"]

FOR_DEVELOPERS = ("docs", "dev")
"""Extras of those who change the package."""


def rows() -> Iterator[tuple[str, str]]:
    """(name, value) of each fact."""
    yield "bptt", __version__
    yield "python", f"{platform.python_version()} ({platform.platform()})"
    yield "torch", torch.__version__
    yield "processor", f"{processor()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    yield "threads", f"{torch.get_num_threads()} within an operation, {torch.get_num_interop_threads()} between"
    yield "BLAS", f"{_blas()}, oneDNN {'yes' if torch.backends.mkldnn.is_available() else 'no'}"
    yield "devices", ", ".join(_devices())
    yield "cpu kernel", f"{kernels.variants()[0]} (runs here: {', '.join(kernels.variants())})"
    yield "kernels", f"auto -> {', '.join(kernels.KERNELS)} (in order of preference)"
    yield "calibration", _calibration()
    yield "numpy", _version("numpy")
    for extra, names in _extras().items():
        yield f"bptt[{extra}]", ", ".join(f"{name} {_version(name)}" for name in names)


def _extras() -> dict[str, list[str]]:
    """The packages of each extra, those of other extras left out.

    >>> _extras()["plots"]
    ['matplotlib', 'pillow']
    """
    found: dict[str, list[str]] = {}
    for line in importlib.metadata.requires("bptt") or ():
        needed = re.match(r"([\w.-]+)(?:\[.*?\])?[^;]*; extra == \"([\w-]+)\"", line)
        if needed is not None and needed[1] != "bptt" and needed[2] not in FOR_DEVELOPERS:
            found.setdefault(needed[2], []).append(needed[1])
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "is not installed"


def _calibration() -> str:
    """By which table auto chooses between the compiled walks and torch's own layers on this CPU."""
    try:
        table = calibration()
    except ValueError as error:
        return str(error)
    if table is None:
        return "none holds here (bptt bench --calibrate makes one)"
    return f"{len(table.rows)} measurements, {table.processor}, torch {table.torch}, {table.date}"


def processor() -> str:
    """The processor's name, or its architecture."""
    cpuinfo = Path("/proc/cpuinfo")  # platform.processor() is empty on most Linux systems
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _blas() -> str:
    if torch.backends.mkl.is_available():
        return "MKL"
    found = [part.strip() for part in torch.__config__.show().split(",") if "BLAS_INFO=" in part]
    return found[0].partition("=")[2] if found else "unknown"


def _devices() -> Iterator[str]:
    yield "cpu"
    for number in range(torch.cuda.device_count()):
        yield f"cuda:{number} ({torch.cuda.get_device_name(number)})"
