"""The result of `plan` and `plan_scan`."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """An estimate of the memory and time of forward and backward through a model's layers, as `plan` returns it.

    memory: the policy's text form. tape_bytes: what the forward call leaves for the backward call beyond x, y and the
    parameters, including initial states and random draws; and what the backward call makes of the tape, as much as
    exists at one time: the tape of the current segment, gates that are rebuilt. It is not the peak: while it runs, the
    backward call also holds the gradients of x, states and pre-activations of a layer for all steps of a segment
    (without checkpoints, of the sequence), measured at 1.5 to 4 times what the layer's gates take for these steps.
    segments: those of the layer that has most, 1 without checkpoints. steps: the length of the longest segment.
    recomputed: forward steps that the backward call runs again, divided by T. seconds: the time of forward and
    backward, including x's gradient, estimated from the median of several runs of the call's first steps. low, high:
    the same from their quartiles (of several layers, the sums). disturbed: whether other programs used so much of the
    machine meanwhile that the seconds mean little.
    """

    memory: str
    tape_bytes: int
    segments: int
    steps: int
    recomputed: float
    seconds: float
    low: float
    high: float
    disturbed: bool

    def __str__(self) -> str:
        doubt = ", on a disturbed machine" if self.disturbed else ""
        return (
            f"memory={self.memory}: a tape of {self.tape_bytes / 2**20:.3g} MiB in {self.segments} segment(s), "
            f"{self.recomputed:.0%} of the steps run again, about {self.seconds:.3g} s "
            f"({self.low:.3g} to {self.high:.3g}{doubt})"
        )
