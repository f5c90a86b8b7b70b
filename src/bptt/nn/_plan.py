"""What a call will need, told before it is run."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter

import torch
from torch import Tensor

from ..engine import BothWays, Stack
from ..memory import Checkpoints, Memory, keeps_gates, parse
from ..policies import Full
from ._call import Call, program, taped
from ._layers import Recurrent

__all__ = ["Plan", "plan"]

TRIED = 64
"""Steps that are run to time them."""


@dataclass(frozen=True)
class Plan:
    """What `plan` returns.

    memory: the policy's text form. tape_bytes: what the forward call leaves for the backward one beyond x, y and the
    parameters, and the tape of a segment in work. segments: of the layer that is cut most, 1 without checkpoints;
    steps: of the longest one.
    recomputed: forward steps run again, as a fraction of all. seconds: of forward and backward, estimated from a run
    of at most 64 steps.
    """

    memory: str
    tape_bytes: int
    segments: int
    steps: int
    recomputed: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"memory={self.memory}: a tape of {self.tape_bytes / 2**20:.3g} MiB in {self.segments} segment(s), "
            f"{self.recomputed:.0%} of the steps run again, about {self.seconds:.3g} s"
        )


def plan(model: torch.nn.Module, T: int, B: int, memory: str | Checkpoints | None = None) -> Plan:
    """Tape, recomputation and time of forward and backward through the layers of `bptt.nn` in a model.

    model: a layer, or a model with several, which are taken to be run one after the other, each over T steps and B
    lanes without packing. memory: a tape policy; default each layer's own. Sizes are counted, not measured; time is, on
    random input, which changes no parameter, gradient or generator.

    Raises TypeError for a model without such a layer, ValueError for T or B below 1 and for a budget that is too small.

    >>> import torch, bptt
    >>> print(str(bptt.plan(bptt.nn.LSTM(8, 16), T=10_000, B=4, memory="checkpoints")).split(",")[0])
    memory=checkpoints: a tape of 0.12 MiB in 244 segment(s)
    """
    layers = [module for module in model.modules() if isinstance(module, Recurrent)]
    if not layers:
        raise TypeError(f"model must hold a bptt.nn layer: got {type(model).__name__} without one")
    for name, value in (("T", T), ("B", B)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1: got {value}")
    parts = [_of_layer(layer, T, B, layer.memory if memory is None else parse(memory)) for layer in layers]
    return Plan(
        memory=", ".join(dict.fromkeys(part.memory for part in parts)),
        tape_bytes=sum(part.tape_bytes for part in parts),
        segments=max(part.segments for part in parts),
        steps=max(part.steps for part in parts),
        recomputed=sum(part.recomputed for part in parts) / len(parts),
        seconds=sum(part.seconds for part in parts),
    )


def _of_layer(layer: Recurrent, T: int, B: int, memory: Memory) -> Plan:
    own = layer.memory
    weight = next(layer.parameters())
    size = weight.element_size()
    x = weight.new_zeros(1, B, layer.input_size).expand(T, B, layer.input_size)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        call = Call.of(layer, x.transpose(0, 1) if layer.batch_first else x, None, None)
        layer.memory = memory
        try:
            training, layer.training = layer.training, False
            stack = program(layer, call, Full(), differentiated=True)
            keeper = taped(layer, call, stack)
            layer.training = training
        finally:
            layer.memory = own
    widths = [sum(state.shape[2] for state in call.hx)] * (stack.layers * stack.directions)
    h = call.hx[0].shape[2]
    gates = [stack.cell.taped(w) for w in stack.weights(call.tensors)]
    forward, both = _times(layer, min(T, TRIED), B)
    steps = T / min(T, TRIED)
    if isinstance(keeper, Stack):
        kept = sum(widths) * (T + 1) - h * (T + 1) * stack.directions  # y holds the top layer's h
        whole = T * B * sum(gates) * size
        if stack.cell.taped_per_unit and keeps_gates(stack.memory, whole):
            kept += T * sum(gates)
        return Plan(str(memory), kept * B * size, 1, T, 0.0, steps * both)
    # A bidirectional stack works on one layer and direction at a time, and keeps what lies between layers.
    at_once = 1 if isinstance(keeper, BothWays) else stack.layers
    kept = T * 2 * h * (stack.layers - 1) if isinstance(keeper, BothWays) else -h * len(keeper.schedule.stored_forward)
    kept += len(keeper.schedule.stored_forward) * sum(widths)
    longest = max(b - a for a, b in pairwise(keeper.edges))
    tape = at_once * (longest + 1) * widths[0] + longest * sum(gates[:at_once])
    segments = len(keeper.edges) - 1
    again = 1 + (keeper.schedule.advanced - (segments - 1)) / segments
    return Plan(str(memory), (kept + tape) * B * size, segments, longest, again, steps * (both + again * forward))


def _times(layer: Recurrent, T: int, B: int) -> tuple[float, float]:
    """Seconds of a forward call that keeps nothing, and of forward and backward, the best of three."""
    weight = next(layer.parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(T, B, layer.input_size, generator=generator).to(weight)
    x = x.transpose(0, 1) if layer.batch_first else x
    own, training = layer.memory, layer.training
    layer.memory, layer.training = "gates", False
    wanted: list[Tensor] = [p for p in layer.parameters() if p.requires_grad] or [x.requires_grad_()]
    times: tuple[list[float], list[float]] = ([], [])
    try:
        with torch.random.fork_rng(devices=[]):
            for _ in range(3):
                for taken, differentiated in zip(times, (False, True), strict=True):
                    start = perf_counter()
                    with torch.set_grad_enabled(differentiated):
                        y = layer(x)[0]
                        if differentiated:
                            torch.autograd.grad(y.sum(), wanted)
                    taken.append(perf_counter() - start)
    finally:
        layer.memory, layer.training = own, training
    return min(times[0]), min(times[1])
