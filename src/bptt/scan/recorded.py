"""The forward pass of a scan whose steps autograd records, as it records those of a plain loop.

The policy's graph (see `graph`) is recorded while the values are computed: where blocks do not overlap, it is one chain
of steps, each run once. Backward is then autograd's own, through all steps, and derivatives of every order are those of
this graph, captured tensors and all. It holds what the steps keep for their derivatives, as a plain loop does.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ..engine import named, own_precision
from ..memory import Checkpoints, parse
from ..policies import Policy
from .chain import StepChain
from .forward import ForwardPass, ForwardRun, ScanResults
from .graph import Block
from .monitor import hidden
from .pullback import edge_factors, obstacle_to_merging
from .pytrees import differentiable, fresh
from .replay import Replay, Visit, differs, graph_edge
from .segments import ScanCall, Segment, StepReplays, close
from .surroundings import Surroundings, not_in_inference_mode, random_kept
from .sweep import independent

__all__ = ["record", "recordable"]

_MOST_BYTES = 2**30
"""The largest graph that is recorded where memory is "auto": 1 GiB, by the size of what the first step makes."""

_FEW_BLOCKS = 16
"""So many blocks that overlap are recorded, whether or not their rows could lie side by side, if the windows are no
longer than two blocks: it saves the monitor at every step, and the steps that are run again in backward."""


def recordable(memory: str | Checkpoints, rows: str) -> bool:
    """Whether a call may be recorded: its memory is "auto", and blocks are not declared to be best side by side."""
    return parse(memory) == "auto" and rows != "independent"


def record(
    run: ForwardRun, policy: Policy, blocks: Sequence[Block], rows: str, surroundings: Surroundings
) -> ScanResults | None:
    """Run all steps recorded, so that the results have autograd's graph; None where they are to be run without: `run`
    then goes on from where it is.

    The first step is run by itself before, monitored and not recorded: it tells whether steps keep what they make (its
    gradient could not be refused), whether they pass on state in another way than by the carry, whether they write to
    what they are given, and how large the graph will be. Where it left something, the second step is run so as well;
    and where blocks overlap, to see whether rows are independent: then blocks side by side cost less.

    After that, the last steps are monitored: state that is passed between these raises. What a step between others
    does in secret has the gradient that it has in a plain loop; where it shows when a window is run again, backward
    raises.

    Raises RuntimeError for hidden state, and as `scan` does.
    """
    given, monitor = run.given, run.monitor
    assert monitor is not None
    overlapping = any(earliest < first for earliest, first, _ in blocks)
    if overlapping and blocks[0][2] == 0:
        return None
    run.advance(1)
    left = monitor.holds()
    if overlapping and left:
        return None
    runs = sum(last - earliest + 1 for earliest, _, last in blocks)
    few = len(blocks) <= _FEW_BLOCKS and runs <= 2 * given.T
    merging = overlapping and rows != "coupled" and not few and _obstacle(run, surroundings) is None
    if (left or merging) and monitor.fault is None and not monitor.leaks():
        run.advance(min(2, given.T))
    size = monitor.bytes * runs
    if (
        monitor.fault is not None
        or monitor.leaks()
        or size > _MOST_BYTES
        or (merging and _independent(run, surroundings))
    ):
        return None
    with torch.enable_grad():
        chain = StepChain(run, monitor, policy, blocks, surroundings)
        if not chain.repeat():
            return None
        chain.extend()
        return _finish(chain, policy)


def _obstacle(run: ForwardRun, surroundings: Surroundings) -> str | None:
    """Why steps cannot be run as one with more rows, as far as the first one tells; or None."""
    assert run.monitor is not None
    results = run.results
    replay = run.monitor.replay(run.forms, run.given.x_form, results.y_form, surroundings)
    computed = ForwardPass(run.carry, results.form, run.ys, results.y_form, run.kept, [], run.forms)
    return obstacle_to_merging(replay, computed, run.given.xs)


def _independent(run: ForwardRun, surroundings: Surroundings) -> bool:
    """Whether the first two steps, run as one of 2B rows, give what they gave and mix no rows."""
    given, monitor = run.given, run.monitor
    assert monitor is not None
    replay = replace(monitor.replay(run.forms, given.x_form, run.results.y_form, surroundings), captured=())
    if len(run.forms) < 2 or any(state is not None for state in replay.states):
        return False
    kept = [c[:2] for c in run.kept]
    resets = None if given.resets is None else given.resets[:2]
    xs, ys = [x[:2].detach() for x in given.xs], [y[:2] for y in run.ys]
    call = ScanCall(replay, [c[0] for c in kept], xs, [], run.carry, ys, resets)
    return independent(StepReplays(call, [True] * len(xs), Segment(0, 2, kept), iter(()), checked=True))


def _finish(chain: StepChain, policy: Policy) -> ScanResults:
    """The outputs, after all steps."""
    run, given, monitor = chain.run, chain.run.given, chain.monitor
    for steps, versions in zip(chain.ys, chain.versions, strict=True):
        changed = [t for t, y in enumerate(steps) if y._version != versions[t]]
        if changed:
            raise _overwritten(changed[0] + 1)
    if chain.starts and set(monitor.written) - chain.written:
        raise RuntimeError(
            "a step writes to a tensor of its closure, and the first steps did not: where memory is 'auto' and blocks "
            "overlap, only a step that does so from the start writes once. Pass memory='states'"
        )
    last = [*chain.carry, *(steps[-1] for steps in chain.ys)]
    replay = monitor.replay([chain.form], given.x_form, run.results.y_form, chain.surroundings)
    whole, replay = replay, replace(replay, captured=(), states=monitor.states[-1:])
    wanted = [*[True] * len(given.carry), *(x.requires_grad for x in given.xs)]
    captured = list(monitor.captured.values())
    expected = [t.detach() for t in last]
    step = _LastStep(replay, given.T, chain.last, wanted, expected, captured, chain.visit, chain.differs)
    # Clones, so that no output is an input that a step passed through.
    outputs = [*(c.clone() for c in chain.carry), *map(torch.stack, chain.ys)]
    if any(t.requires_grad for t in outputs):
        if monitor.fault is not None:
            raise hidden(monitor.fault)
        if chain.edge_factors is not None:
            chain.edge_factors.know(edge_factors(policy, given))
        inputs = [t for t in (*given.carry, *given.xs, *whole.captured) if t.requires_grad]
        outputs = list(_Checked.apply(step, len(outputs), *outputs, *inputs))
    n = len(chain.carry)
    return ScanResults(outputs[:n], run.results.form, outputs[n:], run.results.y_form)


@dataclass(frozen=True)
class _LastStep:
    """The last step of a recorded pass, to be run again in backward: it must give what it gave in forward.

    entries: carry and x, as they entered it. expected: what it gave. captured: tensors that its closure was seen to
    hold. recorded: it as a graph. The recorded graph has no need of the check, but calls with another policy or another
    memory have, and a step is to mean the same in all of them. differs: a step that gave something else already when
    the window of a block was run again; or None.
    """

    replay: Replay
    T: int
    entries: Sequence[Tensor]
    wanted: Sequence[bool]
    expected: Sequence[Tensor]
    captured: Sequence[Tensor]
    recorded: Visit
    differs: int | None

    def check(self) -> None:
        """Raise RuntimeError where the step does not give what the forward pass gave."""
        replay = self.replay
        if self.differs is not None:
            raise differs(self.differs)
        with random_kept(replay.states), replay.surroundings.on_default_device(), not_in_inference_mode():
            visit = replay.visit(0, list(map(fresh, self.entries, self.wanted)))
            replay.check(visit, self.captured, self.recorded)
        got, expected = visit.outputs, self.expected
        if len(got) != len(expected) or not all(
            close(g, e) for g, e in zip(got, expected, strict=True) if differentiable(e)
        ):
            raise differs(self.T - 1)


class _Checked(torch.autograd.Function):
    """The outputs of a recorded pass as they are; the last step is checked in backward.

    Inputs: n outputs, and the tensors that they come from. Under autocast autograd would go back through the steps in
    another precision than they were computed in, as it does not elsewhere: there the gradients of these are found here.
    """

    @staticmethod
    def forward(ctx: Any, last: _LastStep, n: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        with named("scan", "forward"):
            ctx.last, ctx.inputs = last, len(tensors) - n
            ctx.graph_edges = [graph_edge(t) if t.requires_grad else None for t in tensors]
            ctx.devices = {t.device for t in tensors[:n]}
            ctx.set_materialize_grads(False)
            ctx.mark_dirty(*tensors[:n])  # not copied
        return tensors[:n]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        with named("scan", "backward"):  # the steps of the graph follow, under the names of what they are
            ctx.last.check()
        n, graph_edges = len(cotangents), ctx.graph_edges
        arrived = [(e, c) for e, c in zip(graph_edges, cotangents, strict=False) if e is not None and c is not None]
        if not torch._C._is_any_autocast_enabled() or not arrived or not _comes_from(arrived, graph_edges[n:]):
            return None, None, *cotangents, *[None] * ctx.inputs
        with ExitStack() as stack:
            for device in ctx.devices:
                stack.enter_context(own_precision(device))
            grads = torch.autograd.grad(
                [GradientEdge(*edge) for edge, _ in arrived],
                [GradientEdge(*edge) for edge in graph_edges[n:]],
                [c for _, c in arrived],
                retain_graph=True,  # autograd goes on from here, with nothing to add up
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
        return None, None, *[None] * n, *grads


def _comes_from(arrived: Sequence[tuple[Any, Tensor]], inputs: Sequence[Any]) -> bool:
    """Whether a graph has no other leaves than these: a step may capture what no observed step does."""
    known, todo = set(inputs), [edge for edge, _ in arrived]
    seen = set(todo)
    while todo:
        edge = todo.pop()
        if edge in known:
            continue
        if hasattr(edge[0], "variable"):
            return False
        for following in edge[0].next_functions:
            if following[0] is not None and following not in seen:
                seen.add(following)
                todo.append(following)
    return True


def _overwritten(t: int) -> RuntimeError:
    """The error for a step that begins late to write to what it is given."""
    return RuntimeError(
        f"step {t} writes in place to the y of the step before (which may be its carry as well), and the first steps "
        "wrote to nothing: where memory is 'auto' and blocks do not overlap, only a step that does so from the start "
        "gets copies. Let it make new tensors, or pass memory='states'"
    )
