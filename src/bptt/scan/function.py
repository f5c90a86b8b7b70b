"""Backpropagation through time for any step function: `scan(step, carry, xs)` with a gradient policy.

A step that can be traced is compiled: traced once, split, and run by a kernel, forward and back. Any other is replayed.
Where the policy's blocks do not overlap, and memory allows, the forward then records the steps as autograd records a
plain loop, and the backward is autograd's. Elsewhere the forward runs the steps without recording them and keeps the
carries: they are the tape. The backward re-runs one step at a time from its stored carry and computes its
vector-Jacobian product, block by block as the policy says.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..engine import attach, named, transformed
from ..memory import Checkpoints
from ..memory import parse as parse_memory
from ..policies import Policy, parse
from ..steps import NotTraceable, Recorder
from .arguments import Arguments, check_not_traced
from .compiled_call import KERNELS, FirstStepDiffers, by_compiled_step, reason_to_replay
from .direct import direct_call
from .eager import kept_eager
from .first_carry import FirstCarryChanges, fitted, makes_its_own, may_fit, with_first_step_alone
from .forward import ForwardPass, ForwardRun, ScanResults
from .leaked import refuse_gradients
from .mapped_call import by_mapped_step
from .monitor import StepMonitor, complete, hidden
from .plain_loop import by_plain_loop
from .pullback import Rows, ScanPullback, edge_factors, obstacle_to_merging
from .pytrees import Step
from .recorded import record, recordable
from .segments import KeptCarries
from .surroundings import Surroundings, generator_states, set_generators

__all__ = ["scan"]


@kept_eager("bptt.scan runs any Python that its step holds")
def scan(
    step: Step,
    carry: Any,
    xs: Any = None,
    *,
    gradient: Policy | str = "full",
    resets: Tensor | None = None,
    reset_state: Any = None,
    reverse: bool = False,
    length: int | None = None,
    rows: Rows = "auto",
    memory: str | Checkpoints = "auto",
    kernel: str = "auto",
) -> tuple[Any, Any]:
    """Run `carry, y = step(carry, x)` over time; its gradient reaches back as far as a policy says.

    Forward: (c_t, y_t) = step(c_{t-1}, x_t). Backward, for every block of losses of the policy, from the block's last
    step to the earliest it reaches (equations/README.md, chapter 1; the policies, chapter 6):

        lambda_t = e_t + xi_{t+1} * J_{t+1}' lambda_{t+1}      e_t = 0 before the block's first loss

    where J_t is dc_t/dc_{t-1} and e_t comes from the cotangent of y_t; the cotangent of the final carry belongs to the
    last step's loss. The gradients that blocks send to x_t, to captured tensors and to the first carry add up.

    Derivatives of every order are those of the policy's graph: every time edge is the identity forward and multiplies
    by xi backward (0 is a `detach`), and blocks that overlap have a copy of their window each, which starts from the
    detached carry. So `Chunked(k)` equals a loop with a `detach` every k steps to every order, and `Full` is exact.

    A step is compiled where it can be: called a few times, on other numbers of rows, to be traced; from then on a
    program computes what it did, at all steps of this call and of later ones of the same kind, and the step itself is
    called only now and then. A step whose code changes or prints something, or reads a value of a tensor in Python, is
    not compiled but replayed: run itself, at every step, as below. One is traced anew where something that its code
    reads has changed, other than the values of tensors. Three real steps are compared with the trace in the first call,
    and one in every later call whose number is a power of two. What neither can see is in "A cell of your own" in the
    documentation; `bptt.explain` tells what is compiled, or why not.

    step: a function of (carry, x) alone, which does the same whenever it is called. Modules and tensors its closure
        captures receive their gradients. The step may write to the carry and x that it is given, where it does so from
        the start. Of a replayed step, every result in backward is compared with the forward's (of recorded steps,
        the last one's). Random numbers are those of torch's default generators, in the order of a plain loop; of a
        replayed step, those of any other generator are not drawn again. Writes to captured buffers happen in forward
        only, and what they change must not reach carry and y (the running statistics of a batch norm in train mode do
        not). Nor may a step use a tensor that an earlier step made and kept, as a neuron does that keeps its membrane:
        state belongs in the carry. A table made once of shapes and constants is not state. A value that leaves a step
        in any other way than carry and y (a loss appended to a list) has no gradient: asking for one raises.
    carry: pytree. Its structure, and every tensor's shape, dtype and device, stay the same from step to step; dicts
        are matched by key. Tensors of integers or bools and Python values pass without gradient. Where the first carry
        is of another kind than those after it, as in a plain loop it may be, it is expanded (`[1, H]` to `[B, H]`) and
        cast (to the dtype that autocast gives) if that has the same values and the first step then gives the same:
        of a cast, to the last bit. Where the step makes its own first state, of None or of an empty tensor, the first
        step runs by itself, if the policy cuts no edge (`Full`).
    xs: pytree of tensors `[T, ...]`, of which the step gets x_t `[...]`; or None, and the step gets None, length times.
    gradient: a policy, or its text form.
    resets: bool `[T, B]` or `[T]`: all tensors of the carry are zeroed, by row or wholly, before that step; no gradient
        crosses there. With `[T, B]` every tensor of the carry is `[B, ...]`. Python values in the carry stay.
    reset_state: the state that a reset restarts from instead of zero: like carry, the same for all resets, or with
        tensors `[T, ...]`, of which row t belongs to the reset at t. Its gradient at a reset is the one that carry
        would get if step t were the first: all that reaches that edge within the policy's window, without a random
        factor.
    reverse: run from the last step to the first. The ys stay in place; the policy counts from the step that runs first.
    length: T, where xs does not tell it.
    rows: of a replayed step; that those of a compiled one are independent its trace has shown. Whether row b of the new
        carry and of y depends on row b of carry and x alone. Where it does, blocks lie side by side in the first
        dimension, and `window` steps over (blocks * B) rows replace a sweep per block. This needs every tensor of
        carry, x and y to be `[B, ...]` and a step that draws no random numbers.
        "independent": it does. Tested only in that merged steps must reproduce the forward; a step that mixes rows
        in its Jacobian alone gets a wrong gradient.
        "coupled": it does not, as with batch norm, or a closure over a tensor `[B, ...]`; such a step is replayed.
        Where a compiled step does not, or where there are no rows, the whole batch counts as one row, for which resets
        and a policy's factors must be the same for all lanes.
        "auto": tested in every backward of more than one block. The last two steps are run as one of 2B rows; they must
        reproduce what the forward computed, and the Jacobian between different rows must be exactly zero (every pair of
        rows is tested). In the sweep itself every merged step must again reproduce the forward. Otherwise, or where the
        step raises in the test, the rows are coupled.
        Coupled rows: every step is re-run once, with one vector-Jacobian product per block that reaches it.

    memory: "auto" keeps, of a compiled step, the carries and the values that its adjoint needs, unless these would be
        large; "states" keeps the carries, from which one call of the program for all steps makes the others. Of a
        replayed step, "auto" records the steps while they run, as autograd does in a plain loop, and runs only the last
        of them again in backward, as a check, where blocks do not overlap (`Full`, `Chunked`, `Randomized`), or overlap
        but are few or have coupled rows (then the window of each block is run again, and recorded, in forward). This
        needs that rows is not "independent", that the graph takes no more than about 1 GiB, and that the first steps
        keep nothing that would have a gradient; a block that overlaps has two losses at least. Otherwise it is as
        "states", which keeps the carry before every step. `Checkpoints(...)`, or its text form, keeps one every so many
        steps and runs the steps of a segment again for the others: every step but the last of each segment once more,
        or as often as a binomial schedule says where a budget in bytes is too small for that. Of a replayed step the
        budget is for the carries alone; a segment's and the stored ones fill it, and the few that running steps use
        come on top. Of a compiled step it is for the kept values of a segment as well, where it is large enough for
        those. Where one segment would hold all steps, all carries are kept.
    kernel: "auto" compiles a step in calls of 8 steps or more, runs its program by the first of the kernels that can,
        and replays a step that cannot be traced. Where that kernel is "eager", would ask torch for more operations than
        the step itself, and the graph of all steps may be kept (as "auto" says of memory), a plain loop runs the step.
        "interpreter" (compiled code, on the CPU, float32 and float64) and "eager" (the same split by torch operations,
        on any device) compile it in calls of any length, or raise. "replay" never does.

    Returns (carry, ys): the final carry, and the ys stacked `[T, ...]`; numbers among the ys become tensors.

    Of a replayed step, when gradients are on, forward calls the step once more than there are steps: to find parameters
    in calls that torch's function modes do not see (twice more, to find state, where there are such calls), or to
    record the first one, which runs unrecorded before (the first two, where it keeps something). Recorded steps are
    watched for state in the first and in the last two; what others between them pass on in secret has the gradient of a
    plain loop. Memory holds the graph of recorded steps, or T carries (see `memory`), and in backward the graph of one
    step, or of one step of several blocks; for double backward, of a compiled step too, the whole graph of the policy,
    all steps of all blocks. torch.compile leaves scan out, at one break of the graph.

    Raises ValueError for a carry or y that changes its structure, shape, dtype or device; for lengths that disagree;
    for T = 0, where the structure of ys cannot be known; for resets or a reset_state that do not fit; for
    rows="independent" where the needs above are not met; for an unknown memory, or one with too few bytes. TypeError
    where the step does not return a pair; for a carry with an unregistered object that holds tensors. RuntimeError
    where steps pass something to one another outside of the carry; in backward where the step gives another result than
    in forward (apart from rounding) or finds other parameters in its closure; where a named kernel cannot run the step;
    where a later call finds that a compiled step no longer does what it did. NotImplementedError inside torch.jit.trace
    and torch.fx, whose graph would hold this number of steps for every input.

    Inside the transforms of torch.func and in forward mode a compiled step runs too, and keeps the carries: what vmap
    maps over becomes rows of one call, of captured tensors `[B, ...]` and of resets too; a tangent is that of another
    compiled step, of (carry, its tangent) and (x, its tangent), traced once; so are gradients of tangents, tangents of
    gradients and gradients of gradients, which are these transposed. So does the vmap of
    `torch.autograd.grad(..., is_grads_batched=True)`. The steps are a plain loop that torch transforms, in the time of
    that loop, where the step draws random numbers or reads values, where it captures what a vmap maps over, where an
    object of its own class holds what a transform has wrapped, under a tracer (`torch.func.linearize`), and in forward
    mode and gradients of gradients also for a step whose gradient is not the derivative of its operations, since it
    detaches or has an autograd.Function of its own; of such a step torch.autograd's second derivatives around a vmap
    raise NotImplementedError, but for kernel="replay". Memory says nothing in transforms, and a named kernel raises. A
    tangent is the full one under any policy, which changes adjoints alone; so a tangent of a gradient, or a gradient of
    a tangent, raises NotImplementedError under a policy that cuts edges.

    Use `bptt.nn` where the step is one of its cells: its adjoints are derived by hand.

    Example: the derivative of four nested f(x) = (1 + w x)^2.

    >>> import torch
    >>> import bptt
    >>> w = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    >>> x, ys = bptt.scan(lambda x, _: ((1 + w * x) ** 2, x), torch.ones((), dtype=torch.float64), length=4)
    >>> x.backward()
    >>> ys.tolist(), w.grad.item()
    ([1.0, 9.0, 361.0, 522729.0], 12926834988414.0)

    Source: the interface is that of jax.lax.scan. Williams and Peng 1990 for the sweep over blocks.
    """
    if resets is None and reset_state is None and rows == "auto" and not reverse:
        found = direct_call(step, carry, xs, length, gradient, memory, kernel)
        if found is not None:
            return found
    policy = parse(gradient)
    if rows not in ("auto", "independent", "coupled"):
        raise ValueError(f"rows must be 'auto', 'independent' or 'coupled': got {rows!r}")
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(map(repr, KERNELS))}: got {kernel!r}")
    if torch._C._len_torch_dispatch_stack() and Recorder.active():
        raise NotTraceable("it holds a scan of its own")
    check_not_traced(carry, xs, resets)
    recording, inside = torch.is_grad_enabled(), transformed()
    if inside and kernel not in ("auto", "replay"):
        raise RuntimeError(
            f"kernel={kernel!r} cannot run this step inside the transforms of torch.func or in forward mode: pass "
            "kernel='auto', which finds its own way there"
        )
    if memory != "auto" and parse_memory(memory) == "gates":
        raise ValueError(
            "memory must be 'auto', 'states' or Checkpoints, since a step of one's own has no gates: got 'gates'"
        )
    given = Arguments.of(step, carry, xs, length, resets)
    if reset_state is not None:
        given = given.restarting(reset_state)
    if reverse:
        given = given.reversed()
    elif recording and given.resets is not None:
        # Read again in backward: the caller may write the next ones into the same tensor.
        given = replace(given, resets=given.resets.clone())
    final, ys = _transformed(given, policy, rows, kernel) if inside else _scanned(given, policy, rows, memory, kernel)
    return final, tree_map_only(Tensor, lambda y: y.flip(0), ys) if reverse else ys


def _transformed(given: Arguments, policy: Policy, rows: Rows, kernel: str) -> tuple[Any, Any]:
    """(the final carry, ys in the order of the steps) inside a transform."""
    found = by_mapped_step(given, policy, kernel) if rows == "auto" else None
    return by_plain_loop(given, policy) if found is None else found.joined()


def _scanned(given: Arguments, policy: Policy, rows: Rows, memory: str | Checkpoints, kernel: str) -> tuple[Any, Any]:
    """(the final carry, ys in the order of the steps), with a first carry of the kind of the others if need be."""
    surroundings = Surroundings.current(given.devices)
    if not may_fit(given, surroundings):
        return _run(given, policy, rows, memory, kernel, surroundings)
    before = generator_states(given.devices)
    try:
        return _run(given, policy, rows, memory, kernel, surroundings)
    except FirstCarryChanges as error:
        set_generators(before)
        reason = error.reason

    def again(other: Arguments) -> tuple[Any, Any]:
        try:
            return _run(other, policy, rows, memory, kernel, surroundings)
        except FirstCarryChanges as error:
            raise error.reason from None

    found = fitted(given, surroundings)
    if found is not None:
        return again(found)
    results = with_first_step_alone(given, policy, again) if makes_its_own(given) else None
    if results is None:
        raise reason
    return results


def _run(
    given: Arguments,
    policy: Policy,
    rows: Rows,
    memory: str | Checkpoints,
    kernel: str,
    surroundings: Surroundings,
    first: bool = True,
) -> tuple[Any, Any]:
    """(the final carry, ys in the order of the steps). Raises FirstCarryChanges where that may be why it cannot be.

    first: the first of these steps may run by itself.
    """
    step, recording = given.step, torch.is_grad_enabled()
    reason = reason_to_replay(given, kernel)
    if reason is None:
        found = by_compiled_step(given, policy, memory, kernel, surroundings, rows == "independent")
        if isinstance(found, ScanResults):
            return found.joined()
        if first and isinstance(found, FirstStepDiffers):
            rest = with_first_step_alone(
                given, policy, lambda other: _run(other, policy, rows, memory, kernel, surroundings, False)
            )
            if rest is not None:
                return rest
        reason = found
    if kernel not in ("auto", "replay"):
        error = RuntimeError(f"kernel={kernel!r} cannot run this step: {reason}")
        raise FirstCarryChanges(error) if may_fit(given, surroundings) else error
    monitor, before = StepMonitor(step, given.devices, given.xs) if recording else None, generator_states(given.devices)
    with torch.no_grad(), surroundings.entered(), named("scan", "steps"):
        kept = KeptCarries.of(memory, given.T, given.carry)
        run, reach = ForwardRun(given, monitor, kept.before), policy.reach(given.T)
        recorded = None
        try:
            if recording and recordable(memory, rows):
                recorded = record(run, policy, reach.blocks(given.T), rows, surroundings)
            computed = run.finish() if recorded is None else recorded
        except ValueError as error:
            if run.t == 0 and may_fit(given, surroundings):
                raise FirstCarryChanges(error) from None
            raise
        except RuntimeError as error:
            # It differentiates something inside, which needs what autograd records outside, as in a plain loop.
            if not recording or run.t > 0 or "does not require grad" not in str(error):
                raise
            set_generators(before)
            with torch.enable_grad():
                return by_plain_loop(given, policy)
    outputs = (*computed.final, *computed.ys)
    if monitor is not None and isinstance(computed, ForwardPass):
        leaked = monitor.leaked()
        replay = monitor.replay(computed.forms, given.x_form, computed.y_form, surroundings)
        replay, fault = complete(replay, computed.last, given.xs, (*given.carry, *given.xs))
        fault = monitor.fault or fault
        tensors = (*given.carry, *given.xs, *replay.captured)
        if any(t.requires_grad for t in tensors):
            if fault is not None:
                raise hidden(fault)
            obstacle = obstacle_to_merging(replay, computed, given.xs)
            if obstacle is not None:
                if rows == "independent":
                    raise ValueError(f"rows='independent' cannot hold: {obstacle}")
                rows = "coupled"
            factors = edge_factors(policy, given)
            refuse_gradients(leaked, tensors)
            counts = len(given.carry), len(given.xs)
            pullback = ScanPullback(counts, replay, reach, factors, given.resets, rows, kept, len(outputs))
            outputs = attach(pullback, outputs, tuple(computed.kept), *tensors)
    return computed.joined(outputs)
