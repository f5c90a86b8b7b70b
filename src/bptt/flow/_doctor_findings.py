"""What the doctor finds, and the sentence that says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ._by_lag import Lags
from .language import say
from .shown import Shown

__all__ = ["Diagnosis", "Examination", "Finding", "Kind", "Place", "Stage"]

Kind = Literal["nan", "inf", "overflow", "explosion", "vanishing", "saturation", "attached", "dropped"]
"""overflow: infinity out of finite numbers. inf: infinity that was there already, or of unknown origin."""

Stage = Literal["forward", "loss", "local error", "adjoint", "parameter gradient"]


@dataclass(frozen=True)
class Place:
    """A place in a model's own terms; None where it does not apply or is not known.

    module: its name in the model, "" for the model itself. layer: "layer 0", "layer 0 reversed", ... step: t in forward
    time, from 0. lane: row of the batch. gate: "i", "f", "g", "o", "r", "z", "n" or "h"; "c" for the cell state.
    parameter: its name in the model. output: of a step of one's own, by its place in the pytree: "carry", "carry[0]",
    "y['rate']", "x"; of a `bptt.nn.Recurrent`: "state", "state[0]" (of the cell of that layer), "y" or "input".
    """

    module: str
    layer: str | None = None
    step: int | None = None
    lane: int | None = None
    gate: str | None = None
    parameter: str | None = None
    output: str | None = None

    def __str__(self) -> str:
        whose = f"`{self.module}`" if self.module else say("the model")
        parts = [whose if self.layer is None else say("{layer} of {whose}", layer=self.layer, whose=whose)]
        parts += [] if self.step is None else [say("step {number}", number=self.step)]
        parts += [] if self.lane is None else [say("lane {number}", number=self.lane)]
        parts += [] if self.gate is None else [say("gate {gate}", gate=self.gate)]
        parts += [] if self.output is None else [self.output]
        return say(", ").join(parts)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or is about to be.

    kind, stage: see `Kind` and `Stage`. module, layer, step, lane, gate, parameter, output: see `Place`. value: what
    stands there: NaN, an infinity, or what was measured (a growth rate, a horizon in steps, a saturated fraction).
    message: one sentence, with what to do, in the language in which it was found (`bptt.flow.language`).
    """

    kind: Kind
    stage: Stage
    module: str
    layer: str | None
    step: int | None
    lane: int | None
    gate: str | None
    parameter: str | None
    value: float | None
    message: str
    output: str | None = None

    @classmethod
    def at(cls, kind: Kind, stage: Stage, place: Place, value: float | None, what: str, advice: str) -> Finding:
        """The finding at a place; its message is "stage: place: what; advice". what, advice: in the language spoken."""
        text = "{stage}: {place}: {what}; {advice}"
        message = say(text, stage=say(stage), place=place, what=what, advice=advice)
        where = place.module, place.layer, place.step, place.lane, place.gate, place.parameter
        return cls(kind, stage, *where, value, message, place.output)

    @property
    def once(self) -> tuple[str, ...]:
        """What makes two findings the same one at another step; "" for what does not apply."""
        return self.kind, self.stage, self.module, self.layer or "", self.gate or ""


@dataclass(frozen=True, repr=False)
class Diagnosis(Shown):
    """The diagnosis of a step: what is not finite in it.

    findings: the first in the order of computation, which is the cause of the rest.
    """

    findings: tuple[Finding, ...]

    def __repr__(self) -> str:
        if not self.findings:
            return say("Diagnosis: everything is finite")
        more = len(self.findings) - 1
        return say("Diagnosis: {first}", first=self.findings[0].message) + (
            "\n" + say("(and {count} more; print it to read them)", count=more) if more else ""
        )

    def __str__(self) -> str:
        return " ".join(finding.message for finding in self.findings)


@dataclass(frozen=True)
class Examination:
    """The measurements of `Watch.examine`.

    lags: by the recurrent layer's name in the model. findings: all that hold now, those told before included.
    """

    lags: Mapping[str, Lags]
    findings: tuple[Finding, ...]

    @property
    def horizon(self) -> int | None:
        """The lag within which 90 % of the gradient arises, in steps, of the layer that reaches farthest back."""
        return max((int(h) for lags in self.lags.values() for h in lags.horizon_90[lags.measured > 0]), default=None)

    @property
    def settled(self) -> bool | None:
        """Whether that is the net's own horizon (`Lags.settled`); else it is at least so far. None without one."""
        if self.horizon is None:
            return None
        return all(bool(lags.settled()[lags.measured > 0].all()) for lags in self.lags.values())
