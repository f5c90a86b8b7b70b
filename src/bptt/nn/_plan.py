"""`plan`: the memory and time that a call will need, estimated before it is run."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..clock import Guard, Timing, now
from ..engine import Asked, NetPrograms, Saved
from ..memory import Checkpoints, Memory, parse
from ..policies import Randomized, Reach
from ..policies.arguments import count
from ._plan_scan import plan_scan
from ._planned import Plan
from ._sequences import Sequences
from .call import Call, net_of, program
from .flat import Flat, is_flat
from .layers import DropInLayer
from .recurrent import Recurrent
from .undrawn import plain_call

__all__ = ["plan"]

ENOUGH, MOST = 0.05, 0.1
"""Seconds after which a run is long enough to be scaled: the first if it covers two windows, the second if not."""

SAMPLES = 5
"""The number of runs of the longest length, whose median and quartiles are scaled."""

GROUPS = 64
"""The number of groups of columns whose segments are counted; where there are more, about this many stand for all."""


def plan(
    model: torch.nn.Module,
    T: int,
    B: int,
    memory: str | Checkpoints | None = None,
    x: Tensor | PackedSequence | None = None,
) -> Plan:
    """Estimate the tape, recomputation and time of forward and backward through the layers of `bptt.nn` in a model.

    model: a layer, or a model with several, which are assumed to run one after another, each over T steps and B
    lanes without packing, resets or a given state. memory: a tape policy; default is each layer's own. x: an input of
    the model, which is called with it once: it tells what each `Recurrent` gets whose first cell has no input_size.

    Sizes are counted. Time is measured in five runs over the first steps of random input, in segments of their real
    length, and assumed to grow with T or, where blocks overlap, with the steps that they visit; for a window too long
    to be run this is a guess. The quartiles are those of the five runs: they hold for the machine as it is now, and do
    not include the error of the guess. Neither the model nor any random generator changes.

    Raises TypeError for a model without a layer and for T or B that is not a whole number, ValueError for T or B below
    1, for a budget that is too small, and for a `Recurrent` whose input is not known; NotImplementedError for a
    bidirectional one.

    >>> import torch, bptt
    >>> print(str(bptt.plan(bptt.nn.LSTM(8, 16), T=10_000, B=4, memory="checkpoints:steps=100")).split(",")[0])
    memory=checkpoints:steps=100: a tape of 0.172 MiB in 100 segment(s)
    """
    layers = [module for module in model.modules() if isinstance(module, (DropInLayer, Recurrent))]
    if not layers:
        raise TypeError(f"model must hold a bptt.nn layer: got {type(model).__name__} without one")
    T, B = count("T", T), count("B", B)
    guard = Guard()
    guard.look()
    parts = []
    inputs = _inputs(model, [layer for layer in layers if isinstance(layer, Recurrent)], x)
    for layer in layers:
        kept = layer.memory if memory is None else parse(memory)
        if isinstance(layer, Recurrent):
            parts.append(_of_recurrent(layer, T, B, kept, inputs[layer]))
        else:
            parts.append(_of_layer(layer, T, B, kept))
        guard.look()
    return Plan(
        memory=", ".join(dict.fromkeys(part.memory for part in parts)),
        tape_bytes=sum(part.tape_bytes for part in parts),
        segments=max(part.segments for part in parts),
        steps=max(part.steps for part in parts),
        recomputed=sum(part.recomputed for part in parts) / len(parts),
        seconds=sum(part.seconds for part in parts),
        low=sum(part.low for part in parts),
        high=sum(part.high for part in parts),
        disturbed=guard.disturbed,
    )


def _inputs(model: torch.nn.Module, layers: list[Recurrent], x: Any) -> dict[Recurrent, Tensor]:
    """One step of one lane of what each layer of any cell gets, `[1, 1, ...]`."""
    found: dict[Recurrent, Tensor] = {}
    names = {module: name for name, module in model.named_modules()}
    for layer in layers:
        if layer.bidirectional:
            raise NotImplementedError(f"plan is for a Recurrent of one direction: got {names[layer]!r}, bidirectional")
        size, weight = getattr(layer.cells[0], "input_size", None), next(layer.parameters(), None)
        if isinstance(size, int) and weight is not None:
            found[layer] = weight.new_zeros(1, 1, size)
    if x is not None:

        def find(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args[0] if args else kwargs["input"]
            found[layer] = _first_step(layer, given, kwargs.get("cu_seqlens"))

        hooks = [layer.register_forward_pre_hook(find, with_kwargs=True) for layer in layers]
        try:
            with torch.no_grad(), torch.random.fork_rng():
                model(x)
        finally:
            for hook in hooks:
                hook.remove()
    for layer in layers:
        if layer not in found:
            raise ValueError(
                f"plan must know the input of {names[layer]!r}, whose first cell has no input_size: give x, an input "
                "of the model"
            )
    return found


def _first_step(layer: Recurrent, input: Any, cu_seqlens: Tensor | None) -> Tensor:
    """One step of one lane `[1, 1, ...]` of what a layer of any cell is called with, in any of its forms."""
    if is_flat(input, cu_seqlens):
        rows = Flat.of(type(layer).__name__, input, cu_seqlens, any_features=True).values
    elif isinstance(input, PackedSequence):
        rows = input.data
    else:
        return Sequences.of(input, None, None, layer.batch_first).x[:1, :1]
    return rows[:1, None] if len(rows) else rows.new_zeros(1, 1, *rows.shape[1:])


def _of_recurrent(layer: Recurrent, T: int, B: int, memory: Memory, one: Tensor) -> Plan:
    """The plan of the scan that a layer of any cell is."""
    sizes = (B, T) if layer.batch_first else (T, B)
    with torch.inference_mode(False), torch.random.fork_rng():
        step, carry, xs, resets = layer.as_scan(one.detach().expand(*sizes, *one.shape[2:]))
        return plan_scan(step, carry, xs, gradient=layer.gradient, resets=resets, memory=memory, kernel=layer.kernel)


def _of_layer(layer: DropInLayer, T: int, B: int, memory: Memory) -> Plan:
    weight = next(layer.parameters())
    # What is kept by a call of its own, as frames are, must not be of inference mode.
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []),
    ):
        own = _second_layer(layer, memory)
        one = weight.new_zeros(1, B, layer.input_size)
        call, short = (Call.of(own, one.expand(n, -1, -1), None, None) for n in (T, min(T, 2)))
        drawn = net_of(own, short, own.gradient, differentiated=True)
        net = replace(drawn, reach=own.gradient.reach(T), masks=(), xi=())
        given = sum(s.nbytes for s in call.hx)
        plain = plain_call(own, call.x.shape, one.dtype, len(call.weights), True) if one.is_cpu else None
        if plain is not None:
            net = replace(net, kernel=plain.stack.net.kernel)
            copies = layer.num_layers * 2 if layer.bidirectional else 1  # y is one, and what both directions put out
            given += 0 if plain.by_autograd else copies * T * B * layer.hidden_size * weight.element_size()
        keeper = program(own, call, net)
        given += sum({t.data_ptr(): t.nbytes for t in (*drawn.masks, *drawn.xi)}.values()) * T // short.x.shape[0]
        tape = keeper.tape_values(call.tensors) * B * weight.element_size()
        starts, recomputed = keeper.segment_starts(T), _recomputed(keeper, call)
        time = _seconds(own, keeper, call, recomputed)
    return Plan(
        memory=str(memory),
        tape_bytes=given + tape,
        segments=len(starts) - 1,
        steps=max(b - a for a, b in pairwise(starts)),
        recomputed=recomputed,
        seconds=time.median,
        low=time.low,
        high=time.high,
        disturbed=False,
    )


def _second_layer(layer: DropInLayer, memory: Memory) -> DropInLayer:
    """A second layer with the same tensors, time first; not made by `copy`, which a parametrized layer refuses."""
    gradient = layer.gradient
    if isinstance(gradient, Randomized):
        gradient = replace(gradient, generator=None)
    twin: DropInLayer = object.__new__(type(layer))
    twin.__dict__.update(layer.__dict__, _memory=memory, _gradient=gradient, batch_first=False)
    return twin


def _recomputed(keeper: NetPrograms, call: Call) -> float:
    """Forward steps that the backward call runs again, divided by T; in a bidirectional layer, by 2 T."""
    steps = sum((r.b - r.a) * r.times for r in keeper.rerun(call.tensors, GROUPS))
    return steps / (keeper.net.directions * call.x.shape[0])


def _seconds(layer: DropInLayer, keeper: NetPrograms, call: Call, recomputed: float) -> Timing:
    """The seconds of forward and backward, from runs of the first steps, each about twice as long as the one before.

    The first length is run twice, since a first call pays for more than its steps; the last one `SAMPLES` times more.
    """
    T = call.x.shape[0]
    keeper = keeper.decided(call.tensors)
    net = keeper.net
    starts, reach, by_block = keeper.segment_starts(T), net.reach, net.by_block(net.reach)
    if by_block and net.directions == 2 and reach.window is not None and reach.every is not None:
        reach = replace(reach, window=2 * reach.window - reach.every)  # to both sides
    full = by_block and len(starts) == 2  # columns that are swept together are padded to equal length
    n, ran, rate, density = min(T, 8), 0, 0.0, 0.0
    _timed(layer, keeper, call, n)
    while True:
        whole = starts[bisect_right(starts, n) - 1]
        n = whole if whole > ran else n
        forward, backward, _ = _timed(layer, keeper, call, n)
        ran, rate_before, density_before = n, rate, density
        rate, density = backward / n, _visits_per_step(reach, n, full)
        if n == T or forward + backward > MOST or (forward + backward > ENOUGH and n >= 2 * (reach.window or 0)):
            break
        n = min(2 * n, T)
    more = _visits_per_step(reach, T, full) - density

    def of_all(forward: float, backward: float, recomputed_first: float) -> float:
        rate = backward / n
        if more > 0 and density > density_before > 0:
            slope = (rate - rate_before) / (density - density_before)
            rate += more * min(max(slope, 0), rate / density)
        return T * (forward / n * (1 + max(recomputed - recomputed_first, 0)) + rate)

    return Timing.of([of_all(*_timed(layer, keeper, call, n)) for _ in range(SAMPLES)])


def _visits_per_step(reach: Reach, n: int, full: bool) -> float:
    """How often the blocks of the first n steps visit a step, on average.

    full: whether every block counts as a whole window, if there are so many steps; else it ends at the first step.
    """
    if reach.window is None or not reach.overlaps or reach.every is None:
        return 1.0
    longest = min(n, reach.window)
    return longest * (n if full else n - longest / 2) / (reach.every * n)


def _timed(layer: DropInLayer, keeper: NetPrograms, call: Call, n: int) -> tuple[float, float, float]:
    """The seconds of forward and of backward over the first n steps; the steps that ran again, divided by n."""
    x = torch.randn(n, *call.x.shape[1:], device="cpu").to(call.x)
    short = replace(call, x=x)
    start = now(x.device)
    drawn = net_of(layer, short, layer.gradient, differentiated=True)
    run = keeper.first_steps(n, replace(keeper.net, masks=drawn.masks, xi=drawn.xi))
    outputs, tape = run.forward(short.tensors, keep=True)
    middle = now(x.device)
    dy = torch.ones_like(outputs[0])
    needs = (True, *(False for _ in call.hx), *(True for _ in call.weights))
    run.backward(Saved(short.tensors, outputs, tape), Asked((dy, *(None for _ in call.hx)), needs))
    return middle - start, now(x.device) - middle, _recomputed(run, short)
