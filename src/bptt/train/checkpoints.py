"""Checkpoints on disk: one file each, never altered once written, recognised when damaged.

A file is one line of text, `bptt checkpoint FORMAT sha256 DIGEST`, and what `torch.save` makes of the state. DIGEST
is SHA-256 over FORMAT's digits and everything after the line; that holds for every format there will be, so that a
file from a newer version is told from a damaged one. Reading never executes code: `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
from pathlib import Path
from typing import Any

import torch

from . import atomic
from .errors import DamagedError, InputError

__all__ = ["FORMAT", "latest", "listing", "prune", "read", "read_plain", "save"]

FORMAT = 2
"""Of the state; a larger number is from a newer version and is refused. 1 was a plain `state.pt`."""

LINE = re.compile(rb"bptt checkpoint ([0-9]{8}) sha256 ([0-9a-f]{64})\n")
LINE_BYTES = len(b"bptt checkpoint 00000000 sha256 \n") + 64

LOG = logging.getLogger(__name__)


def listing(folder: Path) -> list[Path]:
    """The checkpoint files in a folder, the newest first; none where there is no folder."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _step(p) >= 0), key=_step, reverse=True)


def save(folder: Path, state: dict[str, Any], keep: int) -> Path:
    """Write `state`, of step `state["position"]["step"]`, to a file of its own; once that is on disk, `prune`."""
    step = state["position"]["step"]
    path = folder / f"step-{step:08d}.ckpt"
    digits = b"%08d" % FORMAT
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with buffer.getbuffer() as data:
        line = b"bptt checkpoint %b sha256 %b\n" % (digits, _digest(digits, data).encode())
        atomic.write(path, line, data)
    prune(folder, step, keep)
    return path


def prune(folder: Path, step: int, keep: int) -> None:
    """Remove all but the last `keep` files up to `step`. Later ones go too: a run that is at `step` gave them up.

    A directory of such a name is nobody's checkpoint: `.aside` is put to its name.
    """
    for file in listing(folder):
        if file.is_dir():
            file.rename(f"{file}.aside")
    files = listing(folder)
    past = [file for file in files if _step(file) <= step]
    for file in {*files} - {*past[:keep]}:
        file.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    """The state in a file.

    Raises DamagedError where the file was cut short or altered, InputError where it is from a newer version.
    """
    with path.open("rb") as file:
        line, data = file.read(LINE_BYTES), file.read()
    match = LINE.fullmatch(line)
    if match is None:
        raise DamagedError(f"{path} is damaged: its first line is not a checkpoint's")
    if _digest(match[1], data) != match[2].decode():
        raise DamagedError(f"{path} is damaged: its SHA-256 is not the one in its first line")
    if int(match[1]) > FORMAT:
        raise InputError(f"{path} has format {int(match[1])}, newer than {FORMAT}: upgrade bptt")
    return _load(io.BytesIO(data), path)


def read_plain(path: Path) -> dict[str, Any]:
    """The state in a `state.pt` of version 0.1, which has no checksum. Raises InputError where it cannot be read."""
    state = _load(io.BytesIO(path.read_bytes()), path)
    if not isinstance(state.get("format"), int):
        raise InputError(f"{path} is not a checkpoint of bptt train")
    if state["format"] > 1:
        raise InputError(f"{path} has format {state['format']}, newer than 1: upgrade bptt")
    return state


def latest(folder: Path) -> dict[str, Any] | None:
    """The newest state that is whole, or None where there are no files. Every file passed over is logged: those that
    are damaged, and those that the disk does not give.

    Raises DamagedError where that is all of them, InputError where the newest whole one is from a newer version.
    """
    files = listing(folder)
    damage: list[DamagedError] = []
    for file in files:
        try:
            state = read(file)
        except DamagedError as error:
            damage.append(error)
            continue
        except OSError as error:
            damage.append(DamagedError(f"{file} cannot be read: {error.strerror or error}"))
            continue
        for passed_over in damage:
            LOG.warning("%s; going back to %s", passed_over, file.name)
        return state
    if damage:
        raise DamagedError(f"{damage[0]}; no checkpoint in {folder} is whole")
    return None


def _step(path: Path) -> int:
    """The step of a checkpoint file, by its name; -1 for other files."""
    match = re.fullmatch(r"step-([0-9]{8,18})\.ckpt", path.name)
    return int(match[1]) if match else -1


def _digest(digits: bytes, data: bytes | memoryview) -> str:
    digest = hashlib.sha256(digits)
    digest.update(data)
    return digest.hexdigest()


def _load(file: io.BytesIO, path: Path) -> dict[str, Any]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle makes its reader raise whatever comes up
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} cannot be read: {reason}") from None
    if not isinstance(state, dict):
        raise InputError(f"{path} is not a checkpoint of bptt train")
    return state
