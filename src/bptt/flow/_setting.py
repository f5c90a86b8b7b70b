"""The setting of a measurement: the net, the data, the window, and what ran it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import date

import torch

from ._recording import Recording
from ._scanned import Scanned
from .language import say

__all__ = ["Setting"]


@dataclass(frozen=True)
class Setting:
    """The setting of a measurement, with which a report opens. Each entry is in words, or "" where it is not known.

    net: cell, sizes, parameters. data: name, size, and the day of the measurement. window: the number of steps. lanes:
    how many of how many. policy: how far gradients reach when the net is trained, and what was measured instead. seed:
    the seed of what was drawn. versions: those of this package and of torch. The words are of the language in which it
    was made.

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
        return tuple((say(name), words) for name, words in named if words)

    @classmethod
    def of(cls, recording: Recording, lanes: int, data: str | None = None, seed: int | str | None = None) -> Setting:
        """The setting of a recording. lanes: how many were measured. data, seed: in words, where they are known."""
        return cls(
            net=net_in_words(recording),
            data=_measured(data, recording.loss is None),
            window=_window(recording),
            lanes=say("{lanes} of {all}", lanes=lanes, all=recording.B) if lanes < recording.B else f"{lanes}",
            policy=_trained_with(recording.layer.gradient),
            seed="" if seed is None else str(seed),
            versions=_versions(),
        )

    @classmethod
    def of_scan(cls, scan: Scanned, data: str | None = None, seed: int | str | None = None) -> Setting:
        """The setting of a scan, of which all lanes were measured."""
        chain = scan.chain
        parameters = sum(p.numel() for p in scan.parameters)
        mixed = chain.B == 1 and scan.B > 1
        lanes = say("{lanes}, as one state: the step mixes them", lanes=scan.B) if mixed else f"{chain.B}"
        net = "{name}: {size} numbers in the carry, {parameters} parameters"
        return cls(
            net=say(net, name=scan.label, size=chain.S, parameters=f"{parameters:,}"),
            data=_measured(data, scan.loss is None),
            window=say("{count} steps", count=scan.T),
            lanes=lanes,
            policy=_trained_with(scan.own),
            seed="" if seed is None else str(seed),
            versions=_versions(),
        )


def _measured(data: str | None, drawn: bool) -> str:
    """The data in words, and the day."""
    said = say("a batch of the caller's") if data is None else data
    said += say(", random errors of norm 1 at every step in place of a loss") if drawn else ""
    return said + say("; measured {day}", day=date.today().isoformat())


def _trained_with(policy: object) -> str:
    return say("gradient={policy} in training; what is told below is the full gradient's", policy=policy)


def _versions() -> str:
    from .. import __version__

    return f"bptt {__version__}, torch {torch.__version__}"


def net_in_words(recording: Recording) -> str:
    """The cell, sizes and number of parameters of the recurrent layer, in words."""
    layer = recording.layer
    cell = type(layer).__name__ + (f" ({layer.nonlinearity})" if hasattr(layer, "nonlinearity") else "")
    text = "{cell}: {layers}{units} units{projected}{ways} on {inputs} inputs, {parameters} parameters"
    return say(
        text,
        cell=f"{cell} `{recording.name}`" if recording.name else cell,
        layers=say("{count} layers of ", count=layer.num_layers) if layer.num_layers > 1 else "",
        units=layer.hidden_size,
        projected=say(" projected to {size}", size=layer.proj_size) if layer.proj_size else "",
        ways=say(" in each direction") if layer.bidirectional else "",
        inputs=layer.input_size,
        parameters=f"{sum(p.numel() for p in layer.parameters()):,}",
    )


def _window(recording: Recording) -> str:
    """How many steps, and those of the lanes where they differ."""
    low, high = int(recording.lengths.min()), int(recording.lengths.max())
    if low == high:
        return say("{count} steps", count=high)
    return say("{high} steps, lanes of {low} to {high}", low=low, high=high)
