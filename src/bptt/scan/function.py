"""Backpropagation through time for any step function: `scan(step, carry, xs)` with a gradient policy.

The forward runs the steps without recording them and keeps the carries: they are the tape. The backward re-runs one
step at a time from its stored carry and computes its vector-Jacobian product, block by block as the policy says.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..engine import attach, forward_mode, named, refuse_tangents
from ..memory import Checkpoints
from ..policies import Policy, parse
from .arguments import Arguments, check_not_traced
from .eager import kept_eager
from .forward import run_forward
from .leaked import refuse_gradients
from .monitor import StepMonitor, complete, hidden
from .pullback import Rows, ScanPullback, edge_factors, obstacle_to_merging
from .pytrees import Step
from .segments import KeptCarries
from .surroundings import Surroundings

__all__ = ["scan"]


@kept_eager("bptt.scan runs any Python that its step holds")
def scan(
    step: Step,
    carry: Any,
    xs: Any = None,
    *,
    gradient: Policy | str = "full",
    resets: Tensor | None = None,
    reverse: bool = False,
    length: int | None = None,
    rows: Rows = "auto",
    memory: str | Checkpoints = "auto",
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

    step: a function of (carry, x) alone: called again in backward, it must do the same, and every result is compared
        with the forward's. Modules and tensors its closure captures receive their gradients. Random numbers from
        torch's default generators are replayed; those of any other generator are not. Writes to captured buffers
        happen in forward only, and what they change must not reach carry and y (the running statistics of a batch
        norm in train mode do not). Nor may a step use a tensor that an earlier step made and kept, as a neuron does
        that keeps its membrane: state belongs in the carry. A table made once of shapes and constants is not
        state. A value that leaves a step in any other way than carry and y (a loss appended to a list) has no gradient:
        asking for one raises. The step may write to the carry and x that it is given.
    carry: pytree. Its structure, and every tensor's shape, dtype and device, stay the same from step to step; dicts
        are matched by key. Tensors of integers or bools and Python values pass without gradient.
    xs: pytree of tensors `[T, ...]`, of which the step gets x_t `[...]`; or None, and the step gets None, length times.
    gradient: a policy, or its text form.
    resets: bool `[T, B]` or `[T]`: all tensors of the carry are zeroed, by row or wholly, before that step; no gradient
        crosses there. With `[T, B]` every tensor of the carry is `[B, ...]`. Python values in the carry stay.
    reverse: run from the last step to the first. The ys stay in place; the policy counts from the step that runs first.
    length: T, where xs does not tell it.
    rows: whether row b of the new carry and of y depends on row b of carry and x alone. Where it does, blocks lie side
        by side in the first dimension, and `window` steps over (blocks * B) rows replace a sweep per block. This needs
        every tensor of carry, x and y to be `[B, ...]` and a step that draws no random numbers.
        "independent": it does. Tested only in that merged steps must reproduce the forward; a step that mixes rows
        in its Jacobian alone gets a wrong gradient.
        "coupled": it does not, as with batch norm, or a closure over a tensor `[B, ...]`.
        "auto": tested in every backward of more than one block. The last two steps are run as one of 2B rows; they must
        reproduce what the forward computed, and the Jacobian between different rows must be exactly zero (every pair of
        rows is tested). In the sweep itself every merged step must again reproduce the forward. Otherwise, or where the
        step raises in the test, the rows are coupled.
        Coupled rows: every step is re-run once, with one vector-Jacobian product per block that reaches it.

    memory: "auto" or "states" keeps the carry before every step. `Checkpoints(...)`, or its text form, keeps one every
        so many steps and runs the steps of a segment again for the others: every step but the last of each segment once
        more, or as often as a binomial schedule says where a budget in bytes is too small for that. The budget is for
        the carries alone; a segment's and the stored ones fill it, and the few that running steps use come on top.
        Where one segment would hold all steps, all carries are kept.

    Returns (carry, ys): the final carry, and the ys stacked `[T, ...]`; numbers among the ys become tensors.

    When gradients are on, forward calls the step once more than there are steps, to find parameters in calls that
    torch's function modes do not see (twice more, to find state, where there are such calls). Memory holds T carries
    (see `memory`), and in backward the graph of one step, or of one step of several blocks; for double backward the
    whole graph of the policy, all steps of all blocks. torch.compile leaves scan out, at one break of the graph.

    Raises ValueError for a carry or y that changes its structure, shape, dtype or device; for lengths that disagree;
    for T = 0, where the structure of ys cannot be known; for resets that do not fit; for rows="independent" where the
    needs above are not met; for an unknown memory, or one with too few bytes. TypeError where the step does not return
    a pair; for a carry with an unregistered object that holds tensors. RuntimeError where steps pass something to one
    another outside of the carry; in backward where the step gives another result than in forward (apart from
    rounding) or finds other parameters in its closure; and inside the transforms of torch.func.
    NotImplementedError for forward-mode derivatives; and inside torch.jit.trace and torch.fx, whose graph would hold
    this number of steps for every input.

    Use `bptt.nn` where the step is one of its cells: its adjoints are derived by hand and cost no re-run.

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
    policy = parse(gradient)
    if rows not in ("auto", "independent", "coupled"):
        raise ValueError(f"rows must be 'auto', 'independent' or 'coupled': got {rows!r}")
    check_not_traced(carry, xs, resets)
    refuse_tangents("scan", (leaf for leaf in tree_leaves((carry, xs)) if isinstance(leaf, Tensor)))
    recording = torch.is_grad_enabled()
    if recording and torch._C._are_functorch_transforms_active():
        error = NotImplementedError if forward_mode() else RuntimeError
        raise error(
            "bptt.scan does not work inside the transforms of torch.func (grad, vjp, jvp, jacrev, vmap, ...): "
            "use torch.autograd.grad on what it returns, or call it under torch.no_grad"
        )
    given = Arguments.of(step, carry, xs, length, resets)
    if reverse:
        given = given.reversed()
    elif recording and given.resets is not None:
        # Read again in backward: the caller may write the next ones into the same tensor.
        given = replace(given, resets=given.resets.clone())
    monitor = StepMonitor(step, given.devices, given.xs) if recording or forward_mode() else None
    surroundings = Surroundings.current(given.devices)
    with torch.no_grad(), surroundings.entered(), named("scan", "steps"):
        kept = KeptCarries.of(memory, given.T, given.carry)
        computed = run_forward(given, monitor, kept.before)
    outputs = (*computed.final, *computed.ys)
    if monitor is not None and recording:
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
            blocks, factors = policy.reach(given.T).blocks(given.T), edge_factors(policy, given)
            refuse_gradients(leaked, tensors)
            counts = len(given.carry), len(given.xs)
            pullback = ScanPullback(counts, replay, blocks, factors, given.resets, rows, kept, len(outputs))
            outputs = attach(pullback, outputs, tuple(computed.kept), *tensors)
    final, ys = outputs[: len(given.carry)], outputs[len(given.carry) :]
    return computed.final_form.join(final), computed.y_form.join(y.flip(0) if reverse else y for y in ys)
