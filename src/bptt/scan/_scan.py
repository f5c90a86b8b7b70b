"""Backpropagation through time for any step function: `scan(step, carry, xs)` with a gradient policy.

The forward runs the steps without recording them and keeps the carries: they are the tape. The backward re-runs one
step at a time from its stored carry and takes its vector-Jacobian product, block by block as the policy says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..engine import Tensors, named, refuse_tangents, run
from ..memory import Checkpoints
from ..policies import Policy, parse
from ._arguments import (
    check_no_tensor_hidden,
    check_not_traced,
    check_same,
    checked_resets,
    described,
    steps_of,
)
from ._eager import kept_eager
from ._graph import Block, Graph
from ._leaked import refuse_gradients
from ._rebuilt import Kept, Rebuilt
from ._replay import (
    Form,
    Replay,
    Step,
    Surroundings,
    Visit,
    differentiable,
    fresh,
    random_kept,
    split,
    split_y,
)
from ._tape import Recorded, Span, Tape, reset
from ._unseen import complete
from ._walk import MISFITS, Grads, Sweep, exhausted, independent
from ._watch import Watch, forward_mode, hidden

__all__ = ["scan"]

Rows = Literal["auto", "independent", "coupled"]

_Y_LEAVES = (Tensor, bool, int, float, complex, type(None))


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
    last step's loss. What blocks send to x_t, to captured tensors and to the first carry adds up.

    Derivatives of every order are those of the policy's graph: every time edge is the identity forward and multiplies
    by xi backward (0 is a `detach`), and blocks that overlap have a copy of their window each, which starts from the
    detached carry. So `Chunked(k)` equals a loop with a `detach` every k steps to every order, and `Full` is exact.

    step: a function of (carry, x) alone: called again in backward, it must do the same, and every result is compared
        with the forward's. Modules and tensors its closure captures receive their gradients. Random numbers from
        torch's default generators are replayed; those of any other generator are not. Writes to captured buffers
        happen in forward only, and what they change must not reach carry and y (the running statistics of a batch
        norm in train mode do not). Nor may a step use a tensor that an earlier step made and kept, as a neuron does
        that keeps its membrane: state belongs in the carry. A table made once of shapes and constants is none. What
        leaves a step beside carry and y (a loss appended to a list) is a value without gradient: asked for one, it
        raises. The carry and x that it is given are its own to write to.
    carry: pytree. Its structure, and every tensor's shape, dtype and device, stay the same from step to step; dicts
        are matched by key. Tensors of integers or bools and Python values pass without gradient.
    xs: pytree of tensors `[T, ...]`, of which the step gets x_t `[...]`; or None, and the step gets None, length times.
    gradient: a policy, or its text form.
    resets: bool `[T, B]` or `[T]`: all tensors of the carry are zeroed, by row or wholly, before that step; no gradient
        crosses there. With `[T, B]` every tensor of the carry is `[B, ...]`. Python values in the carry stay.
    reverse: walk from the last step to the first. The ys stay in place; the policy counts from the step walked first.
    length: T, where xs does not tell it.
    rows: whether row b of the new carry and of y depends on row b of carry and x alone. Where it does, blocks lie side
        by side in the first dimension, and `window` steps over (blocks * B) rows replace a walk per block. This needs
        every tensor of carry, x and y to be `[B, ...]` and a step that draws no random numbers.
        "independent": it does. Tested only in that merged steps must reproduce the forward; a step that mixes rows
        in its Jacobian alone gets a wrong gradient.
        "coupled": it does not, as with batch norm, or a closure over a tensor `[B, ...]`.
        "auto": tested in every backward of more than one block. The last two steps are run as one of 2B rows; they must
        reproduce what the forward computed, and the Jacobian between different rows must be exactly zero (every pair of
        rows is tested). In the walk itself every merged step must again reproduce the forward. Else, or where the step
        raises in the test, the rows are coupled.
        Coupled rows: every step is re-run once, with one vector-Jacobian product per block that walks over it.

    memory: "auto" or "states" keeps the carry before every step. `Checkpoints(...)`, or its text form, keeps one every
        so many steps and runs the steps of a segment again for the others: every step but the last of each segment once
        more, or as often as a binomial schedule says where a budget in bytes is too small for that. The budget is for
        the carries alone; a segment's and the stored ones fill it, and a few that steps are at work on come on top.
        Where one segment would hold all steps, all carries are kept.

    Returns (carry, ys): the final carry, and the ys stacked `[T, ...]`; numbers among the ys become tensors.

    In forward the step is called once more than there are steps when gradients are on, to find parameters in calls
    that torch's function modes do not see (twice, to find state, where there are such calls). In memory: T carries (see
    `memory`), and in backward the graph of one step, or of one step of several blocks; for double backward the whole
    graph of the policy, all steps of all blocks. torch.compile leaves scan out, at one break of the graph.

    Raises ValueError for a carry or y that changes its structure, shape, dtype or device; for lengths that disagree;
    for T = 0, where the structure of ys cannot be known; for resets that do not fit; for rows="independent" where the
    above needs are not met; for a memory that is none, or whose bytes are too few. TypeError where
    the step does not return a pair; for a carry with an unregistered object that holds tensors. RuntimeError where
    steps hand one another something beside the carry; in backward where the step gives another result than in forward
    (but for rounding) or finds other parameters in its closure; and inside the transforms of torch.func.
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

    Source: the interface is that of jax.lax.scan. Williams and Peng 1990 for the walk over blocks.
    """
    policy = parse(gradient)
    if rows not in ("auto", "independent", "coupled"):
        raise ValueError(f"rows must be 'auto', 'independent' or 'coupled': got {rows!r}")
    check_not_traced(carry, xs, resets)
    (state, form), (inputs, x_form) = split(carry), split(xs)
    refuse_tangents("scan", (*state, *inputs))
    if torch.is_grad_enabled() and torch._C._are_functorch_transforms_active():
        error = NotImplementedError if forward_mode() else RuntimeError
        raise error(
            "bptt.scan does not work inside the transforms of torch.func (grad, vjp, jvp, jacrev, vmap, ...): "
            "use torch.autograd.grad on what it returns, or call it under torch.no_grad"
        )
    check_no_tensor_hidden(form)
    T = steps_of(inputs, x_form, length)
    resets = checked_resets(resets, T, state)
    if reverse:
        inputs = [x.flip(0) for x in inputs]
        resets = None if resets is None else resets.flip(0)

    devices = {torch.device("cpu"), *(t.device for t in (*state, *inputs))}
    recording = torch.is_grad_enabled()
    watch = Watch(step, devices, inputs) if recording or forward_mode() else None
    if recording and resets is not None:
        resets = resets.clone()  # read again in backward: the caller may write the next ones into the same tensor
    surroundings = Surroundings.current(devices)
    with torch.no_grad(), surroundings.entered(), named("scan", "steps"):
        kept = Kept.of(memory, T, state)
        walked = _forward(step, state, form, [x.detach() for x in inputs], x_form, T, resets, watch, kept.before)
    outputs = [*walked.carry, *walked.ys]
    leaked = [] if watch is None else watch.leaked()
    if watch is not None and recording:
        replay = watch.replay(walked.forms, x_form, walked.y_form, surroundings)
        replay, fault = complete(replay, walked.last, inputs, (*state, *inputs))
        fault = watch.fault or fault
        tensors = (*state, *inputs, *replay.captured)
        if any(t.requires_grad for t in tensors):
            if fault is not None:
                raise hidden(fault)
            obstacle = _obstacle(replay, walked, inputs)
            if rows == "independent" and obstacle is not None:
                raise ValueError(f"rows='independent' cannot hold: {obstacle}")
            blocks, edges = policy.reach(T).blocks(T), _edge_factors(policy, T, state, resets)
            refuse_gradients(leaked, tensors)
            program = _Program(
                outputs=len(outputs),
                counts=(len(state), len(inputs)),
                replay=replay,
                sweep=Sweep(blocks, edges),
                resets=resets,
                rows=rows,
                obstacle=obstacle,
                kept=kept,
                recorded=[(tuple(outputs), tuple(walked.tape))],
            )
            outputs = list(run(program, *tensors))
    final, ys = outputs[: len(state)], outputs[len(state) :]
    return walked.carry_form.join(final), walked.y_form.join(y.flip(0) if reverse else y for y in ys)


@dataclass
class _Walked:
    """What the forward computed.

    carry: the final one. ys: `[T, ...]`. tape: the carries that were kept `[n, ...]`. last: that which entered the last
    step. forms: of the carry that entered each step.
    """

    carry: list[Tensor]
    carry_form: Form
    ys: list[Tensor]
    y_form: Form
    tape: list[Tensor]
    last: list[Tensor]
    forms: list[Form]


def _forward(
    step: Step,
    carry: list[Tensor],
    form: Form,
    xs: list[Tensor],
    x_form: Form,
    T: int,
    resets: Tensor | None,
    watch: Watch | None,
    keep: Sequence[int] | None = None,
) -> _Walked:
    """Every step once. keep: the steps before which the carry is kept, where someone watches; None is all."""
    keep = range(T) if keep is None else keep
    tape = [] if watch is None else [c.new_empty((len(keep), *c.shape)) for c in carry]
    number = {t: n for n, t in enumerate(keep)}
    ys: list[Tensor] = []
    first: tuple[list[Tensor], Form] | None = None
    forms = []
    # Copies: a step may write to what it is given.
    carry = [c.clone() for c in carry]
    for t in range(T):
        carry = reset([c.detach() for c in carry], resets, t)
        forms.append(form)
        for kept, c in zip(tape if t in number else (), carry, strict=False):
            kept[number[t]] = c
        x = x_form.join(x[t].clone() for x in xs)
        last = [c.clone() for c in carry] if watch is not None and t == T - 1 else []
        result = step(form.join(carry), x) if watch is None else watch.call(form.join(carry), x)
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(f"step must return a pair (carry, y): got {described(result)}")
        before = carry, form
        carry, form = split(result[0], form)
        check_no_tensor_hidden(form)
        check_same("carry", f"after step {t} as before it", (carry, form), before)
        y, y_form = split_y(result[1], first[1] if first else None)
        if first is None:
            if not y_form.tensors_only:
                held = next(leaf for leaf in tree_leaves(result[1]) if not isinstance(leaf, _Y_LEAVES))
                raise ValueError(f"y must hold tensors, numbers or None: got {described(held)}")
            first = y, y_form
            ys = [leaf.new_empty((T, *leaf.shape)) for leaf in y]
        check_same("y", f"at step {t} as at the first", (y, y_form), first)
        _put(ys, t, y)
        del result, before, y  # whatever of them is still there at the next step, the step keeps
    # Clones, so that no output is an input that a step passed through.
    return _Walked([c.clone() for c in carry], form, ys, y_form, tape, last, forms)


def _put(rows: Sequence[Tensor], t: int, values: Sequence[Tensor]) -> None:
    for kept, value in zip(rows, values, strict=True):
        kept[t] = value


@dataclass
class _Program:
    """The program of one call of `scan`: its inputs are the tensors of carry and xs, and the captured ones.

    obstacle: why steps cannot be merged, or None. kept: which carries are in the tape. recorded: (outputs, tape) until
    `forward` hands them over.
    """

    name: ClassVar[str] = "scan"

    outputs: int
    counts: tuple[int, int]
    replay: Replay
    sweep: Sweep
    resets: Tensor | None
    rows: Rows
    obstacle: str | None
    kept: Kept
    recorded: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]

    repeats = False

    @property
    def reads(self) -> int:
        return self.outputs

    @property
    def held(self) -> Tensors:
        return self.resets, self.sweep.edges

    def holding(self, tensors: Tensors) -> _Program:
        resets, edges = tensors
        return replace(self, resets=resets, sweep=replace(self.sweep, edges=edges))

    def forward(self, tensors: Tensors, keep: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        # The steps ran before, to find the captured tensors. Handed over, so that the program keeps no tensor alive.
        return self.recorded.pop()

    @kept_eager("bptt.scan runs its step again")
    def backward(
        self,
        tensors: Tensors,
        outputs: tuple[Tensor, ...],
        tape: tuple[Tensor, ...] | None,
        cotangents: Tensors,
        needs: tuple[bool, ...],
    ) -> Tensors:
        n, m = self.counts
        T = len(self.replay.carry)
        given = [t for t in tensors if t is not None]
        carry, xs, captured = given[:n], given[n : n + m], given[n + m :]
        dcarry, dys = cotangents[:n], cotangents[n:]
        recorded = Recorded(T, outputs[:n], outputs[n:], self.resets)
        with random_kept(self.replay.states), self.replay.surroundings.on_default_device():
            if tape is None:
                graph = Graph(self.replay, recorded, carry, xs, captured, self.sweep.edges)
                chains = graph.chains(self.sweep.blocks)

                def recorded_for(t: int) -> Callable[[Block], Visit]:
                    return lambda block: chains[block][t - block[0]]

                grads = self.sweep.one_by_one(recorded_for, T, m, dcarry, dys)
            else:
                held = [fresh(w, True) for w in captured]

                def taped() -> Tape:
                    spans = self._spans(tape, carry, xs, held)
                    return Tape(self.replay, recorded, xs, held, needs[n:], next(spans), spans)

                grads = self._side_by_side(taped, dcarry, dys) or self._one_by_one(taped(), m, dcarry, dys)
        return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))

    def _spans(
        self, tape: tuple[Tensor, ...], carry: list[Tensor], xs: list[Tensor], captured: list[Tensor]
    ) -> Iterator[Span]:
        """The carries of all steps, from the last to the first: those on the tape, or run again from them."""
        edges, schedule = self.kept.edges, self.kept.schedule
        if schedule is None:
            return iter([Span(0, edges[-1], tape)])
        first = [c.detach() for c in reset(carry, self.resets, 0)]
        stored = {segment: [c[i] for c in tape] for i, segment in enumerate(schedule.stored_forward)}
        return Rebuilt(self.replay, edges, schedule, first, stored, xs, captured, self.resets).spans()

    def _side_by_side(self, taped: Callable[[], Tape], dcarry: Tensors, dys: Tensors) -> Grads | None:
        """The gradient from blocks walked side by side, or None where they are not to be."""
        if self.rows == "coupled" or len(self.sweep.blocks) == 1 or self.obstacle is not None:
            return None
        # Each visit is compared with the forward: a step may branch on values of the whole batch.
        tape = taped()
        if self.rows == "auto":
            return self.sweep.merged(tape, dcarry, dys, tape.fits) if independent(tape) else None
        try:
            grads = self.sweep.merged(tape, dcarry, dys, partial(tape.fits, rounding=self.replay.rounding))
        except MISFITS as error:
            if exhausted(error):
                raise
            raise ValueError(
                "rows='independent' does not hold: the step fails on the rows of several blocks at once"
            ) from error
        if grads is None:
            tape = taped()
            for t in reversed(range(tape.T)):
                tape.visit(t)  # raises where the step differs on its own rows too
            raise ValueError(
                "rows='independent' does not hold: on the rows of several blocks at once the step gives another result"
            )
        return grads

    def _one_by_one(self, tape: Tape, m: int, dcarry: Tensors, dys: Tensors) -> Grads:
        """The gradient from one step after the other, each run again once for all blocks that walk over it."""

        def shared(t: int) -> Callable[[Block], Visit]:
            visit = tape.visit(t)
            return lambda block: visit

        return self.sweep.one_by_one(shared, tape.T, m, dcarry, dys)


def _obstacle(replay: Replay, walked: _Walked, xs: list[Tensor]) -> str | None:
    """Why several steps cannot be run as one with more rows, or None."""
    if not (replay.carry[0].tensors_only and replay.x.tensors_only):
        return "the carry holds Python values"
    if any(state is not None for state in replay.states):
        return "the step draws random numbers"
    leaves = [*walked.tape, *xs, *walked.ys]
    sizes = {t.shape[1] if t.dim() > 1 else None for t in leaves}
    if len(sizes) != 1 or sizes <= {None, 0}:
        return f"carry, x and y do not share one first dimension: got {[list(t.shape[1:]) for t in leaves]}"
    return None


def drawn_lanes(carry: list[Tensor]) -> int:
    """For how many lanes a policy draws: the first dimension that all tensors with a gradient share, or 1."""
    sizes = {c.shape[0] if c.dim() else None for c in carry if differentiable(c)}
    return sizes.pop() or 1 if len(sizes) == 1 else 1


def _edge_factors(policy: Policy, T: int, carry: list[Tensor], resets: Tensor | None) -> Tensor | None:
    """What multiplies the adjoint from step t to step t-1, `[T, B]` or `[T, 1]`: xi, and 0 at a reset."""
    floats = [c for c in carry if differentiable(c)]
    if not floats:
        return None
    with torch.device("cpu"):  # as a policy's factors are, whatever the default device is
        xi = policy.draw(T, drawn_lanes(carry))
    if xi is None and resets is None:
        return None
    dtype = reduce(torch.promote_types, (c.dtype for c in floats))
    xi = torch.ones(T, 1, device="cpu") if xi is None else xi
    factors = xi.to(floats[0].device, dtype)
    return factors if resets is None else factors * ~resets
