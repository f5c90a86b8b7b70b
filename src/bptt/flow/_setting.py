"""The setting of a measurement: the net, the data, the window, and what ran it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import date

import torch

from ._recording import Recording
from ._scanned import Scanned

__all__ = ["Setting"]


@dataclass(frozen=True)
class Setting:
    """The setting of a measurement, with which a report opens. Each entry is in words, or "" where it is not known.

    net: cell, sizes, parameters. data: name, size, and the day of the measurement. window: the number of steps. lanes:
    how many of how many. policy: how far gradients reach when the net is trained, and what was measured instead. seed:
    the seed of what was drawn. versions: those of this package and of torch.

    >>> Setting(net="GRU", window="64 steps").entries
    (('net', 'GRU'), ('window', '64 steps'))
    """

    net: str = ""
    data: str = ""
    window: str = ""
    lanes: str = ""
    policy: str = ""
    seed: str = ""
    versions: str = ""

    @property
    def entries(self) -> tuple[tuple[str, str], ...]:
        """Every entry that is known: (name, words)."""
        named = ((entry.name, getattr(self, entry.name)) for entry in fields(self))
        return tuple((name, words) for name, words in named if words)

    @classmethod
    def of(cls, recording: Recording, lanes: int, data: str | None = None, seed: int | str | None = None) -> Setting:
        """The setting of a recording. lanes: how many were measured. data, seed: in words, where they are known."""
        return cls(
            net=net_in_words(recording),
            data=_measured(data, recording.loss is None),
            window=_window(recording),
            lanes=f"{lanes} of {recording.B}" if lanes < recording.B else f"{lanes}",
            policy=f"gradient={recording.layer.gradient} in training; what is told below is the full gradient's",
            seed="" if seed is None else str(seed),
            versions=_versions(),
        )

    @classmethod
    def of_scan(cls, scan: Scanned, data: str | None = None, seed: int | str | None = None) -> Setting:
        """The setting of a scan, of which all lanes were measured."""
        chain = scan.chain
        parameters = sum(p.numel() for p in scan.parameters)
        lanes = f"{chain.B}" if chain.B > 1 or scan.B == 1 else f"{scan.B}, as one state: the step mixes them"
        return cls(
            net=f"{scan.label}: {chain.S} numbers in the carry, {parameters:,} parameters",
            data=_measured(data, scan.loss is None),
            window=f"{scan.T} steps",
            lanes=lanes,
            policy=f"gradient={scan.own} in training; what is told below is the full gradient's",
            seed="" if seed is None else str(seed),
            versions=_versions(),
        )


def _measured(data: str | None, drawn: bool) -> str:
    """The data in words, and the day."""
    said = "a batch of the caller's" if data is None else data
    said += ", random errors of norm 1 at every step in place of a loss" if drawn else ""
    return f"{said}; measured {date.today().isoformat()}"


def _versions() -> str:
    from .. import __version__

    return f"bptt {__version__}, torch {torch.__version__}"


def net_in_words(recording: Recording) -> str:
    """The cell, sizes and number of parameters of the recurrent layer, in words."""
    layer = recording.layer
    cell = type(layer).__name__ + (f" ({layer.nonlinearity})" if hasattr(layer, "nonlinearity") else "")
    layers = f"{layer.num_layers} layers of " if layer.num_layers > 1 else ""
    ways = " in each direction" if layer.bidirectional else ""
    projected = f" projected to {layer.proj_size}" if layer.proj_size else ""
    parameters = sum(p.numel() for p in layer.parameters())
    name = f" `{recording.name}`" if recording.name else ""
    sizes = f"{layers}{layer.hidden_size} units{projected}{ways} on {layer.input_size} inputs"
    return f"{cell}{name}: {sizes}, {parameters:,} parameters"


def _window(recording: Recording) -> str:
    """How many steps, and those of the lanes where they differ."""
    low, high = int(recording.lengths.min()), int(recording.lengths.max())
    return f"{high} steps" if low == high else f"{high} steps, lanes of {low} to {high}"
