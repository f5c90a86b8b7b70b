"""`bptt.scan` with steps that people write, against a loop under autograd and what else there is.

`cell_contest` times a row of `STEP_CELLS`; `step_contest` an LSTM step whose input product its user took out of the
loop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .. import nn
from ..policies import Chunked, Full, Truncated, parse
from ..scan import KERNELS, scan
from ..train.extras import require
from .cases import Case
from .contest import Call, Contest
from .layers import NAMES, Problem, layer_call
from .limited import COMPILE_SECONDS, first_within
from .step_cells import JAX_STEPS, STEP_CELLS, StepCell, StepProblem, jax_scan, over_time

__all__ = ["STEP_SHAPES", "USUAL_STEPS", "cell_contest", "contenders", "step_cases", "step_contest"]

STEP_SHAPES = ((100, 1, 32), (100, 32, 128), (1000, 8, 64), (100, 64, 256), (37, 5, 19))
"""T, B, H of the steps, one of odd sizes."""

USUAL_STEPS = tuple(STEP_CELLS)[:7]
"""The cells that are timed where none is named."""

WITH_POLICIES = ("lstm", "gru", "leaky")
POLICIES = ("chunked:10", "truncated:20/10")
"""Timed for those cells beside the full gradient, where there are more steps than they reach."""

State = tuple[Tensor, Tensor]


def step_cases(cells: Sequence[str], shapes: Sequence[tuple[int, int, int]], policies: bool = True) -> list[Case]:
    """The cases of some of `STEP_CELLS`; policies: those of `POLICIES` too.

    >>> [str(case) for case in step_cases(["leaky", "lif"], [(100, 1, 32)])]  # doctest: +NORMALIZE_WHITESPACE
    ['LEAKY (100, 1, 32, 32)', 'LEAKY (100, 1, 32, 32) chunked:10', 'LEAKY (100, 1, 32, 32) truncated:20/10',
     'LIF (100, 1, 32, 32)']
    """
    cases = []
    for T, B, H in shapes:
        for cell in cells:
            more = POLICIES if policies and cell in WITH_POLICIES else ()
            reaching = [gradient for gradient in more if (parse(gradient).reach(T).window or T) < T]
            cases += [Case(cell, T, B, H, H, gradient) for gradient in ("full", *reaching)]
    return cases


def contenders(case: Case, kernel: str = "auto", jax: bool = False, compiled: bool = False) -> list[str]:
    """Who is in `cell_contest`, those that may refuse among them.

    >>> contenders(Case("lstm", 30, 1, 4, 4, "chunked:10"), jax=True, compiled=True)
    ['scan', 'loop', 'replay', 'eager', 'module', 'JAX']
    """
    policy = parse(case.gradient)
    there = {
        "scan": True,
        "loop": True,
        "replay": kernel != "replay",
        "eager": kernel != "eager",
        "module": STEP_CELLS[case.cell].layer is not None,
        "JAX": jax and isinstance(policy, Full | Chunked),
        "compiled": compiled and isinstance(policy, Full),
    }
    return [name for name, holds in there.items() if holds]


def cell_contest(
    case: Case, kernel: str = "auto", jax: bool = False, compiled: bool = False, seconds: float = COMPILE_SECONDS
) -> Contest:
    """`bptt.scan` on a step of `STEP_CELLS`, against the plain loop and whoever else can.

    scan: with that kernel. loop: the step in a Python loop under autograd; `detach()` every k steps for `Chunked(k)`,
    and a backward pass for each block of losses for other policies. replay: scan that runs the steps themselves.
    eager: scan that runs the parts of the traced step by torch operations; it refuses what is not traced. module: the
    layer of `bptt.nn` that computes the same. JAX: its scan, compiled, for the full gradient, and with `stop_gradient`
    where a chunk begins. compiled: the loop with `torch.compile` of the step, for the full gradient; it refuses where
    to compile forward and backward takes longer than so many seconds. The truth is the loop in float64.

    Raises ValueError for a case of another cell, for I != H, for a policy that draws, and for a kernel that scan does
    not have; InputError where JAX is asked for and not installed.

    >>> contest = cell_contest(Case("leaky", 5, 2, 4, 4))
    >>> all(error < 1e-5 for error, _ in contest.errors().values())
    True
    """
    if case.cell not in STEP_CELLS:
        raise ValueError(f"case must be of one of {', '.join(STEP_CELLS)}: got {case}")
    if case.I != case.H:
        raise ValueError(f"case must have as many inputs as units: got {case}")
    if not isinstance(parse(case.gradient), Full | Chunked | Truncated):
        raise ValueError(f"case must have a policy that draws nothing, full, chunked or truncated: got {case}")
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}: got {kernel!r}")
    cell = STEP_CELLS[case.cell]
    problem = cell.make(case.B, case.H, torch.float32, T=case.T)
    exact = cell.make(case.B, case.H, torch.float64, T=case.T)
    _, y = problem.step(problem.carry, over_time(problem.xs)[0])
    dy = torch.randn(case.T, *y.shape, generator=torch.Generator().manual_seed(case.T))
    _first_scan(kernel)
    calls = {
        "scan": _scanned(problem, dy, case.gradient, kernel),
        "loop": _looped(problem, dy, case.gradient, problem.step),
    }
    names = contenders(case, kernel, jax, compiled)
    calls |= {name: _scanned(problem, dy, case.gradient, name) for name in ("replay", "eager") if name in names}
    if cell.layer is not None:
        calls["module"] = _module(cell.layer, problem, dy, case.gradient)
    if "JAX" in names:
        calls["JAX"] = _in_jax(cell, problem, dy, case.gradient)
    if "compiled" in names:
        torch.compiler.reset()
        loop = _looped(problem, dy, case.gradient, torch.compile(problem.step, dynamic=False))
        calls["compiled"] = first_within(seconds, loop, "torch.compile")
    xs = ["x"] if isinstance(problem.xs, Tensor) else [f"x[{i}]" for i in range(len(problem.xs))]
    tensors = ("y", *xs, *(f"parameters[{i}]" for i in range(len(problem.parameters))))
    truth = [np.asarray(value) for value in _looped(exact, dy.double(), case.gradient, exact.step)()]
    return Contest(tensors, calls, truth, may_refuse=frozenset({"eager", "compiled"}))


@functools.cache
def _first_scan(kernel: str) -> None:
    """A scan of another step: what the first one in a process pays once, imports among it, is not the cell's."""
    w = torch.ones(3, requires_grad=True)
    _, y = scan(lambda h, x: ((h * w + x).tanh(),) * 2, torch.zeros(2, 3), torch.ones(9, 2, 3), kernel=kernel)
    y.sum().backward()


def _differentiated(problem: StepProblem, dy: Tensor, run: Callable[[Any], Tensor]) -> Call:
    """y, then the gradients of <y, dy> in xs and parameters. run: from xs to y `[T, B, ...]`."""
    xs = tree_map(lambda x: x.clone().requires_grad_(), problem.xs)
    inputs = [*([xs] if isinstance(xs, Tensor) else xs), *problem.parameters]

    def call() -> Sequence[Tensor]:
        y = run(xs)
        return y.detach(), *torch.autograd.grad(y, inputs, dy)

    return call


def _scanned(problem: StepProblem, dy: Tensor, gradient: str, kernel: str) -> Call:
    return _differentiated(
        problem, dy, lambda xs: scan(problem.step, problem.carry, xs, gradient=gradient, kernel=kernel)[1]
    )


def _looped(problem: StepProblem, dy: Tensor, gradient: str, step: Callable[[Any, Any], Any]) -> Call:
    T = len(dy)
    reach = parse(gradient).reach(T)
    blocks = reach.blocks(T)
    if reach.overlaps:
        return _block_by_block(problem, dy, blocks, step)
    cuts = {start for start, _, _ in blocks if start}

    def run(xs: Any) -> Tensor:
        carry, ys = problem.carry, []
        for t, x in enumerate(over_time(xs)):
            if t in cuts:
                carry = tree_map(torch.Tensor.detach, carry)
            carry, y = step(carry, x)
            ys.append(y)
        return torch.stack(ys)

    return _differentiated(problem, dy, run)


def _block_by_block(
    problem: StepProblem, dy: Tensor, blocks: Sequence[tuple[int, int, int]], step: Callable[[Any, Any], Any]
) -> Call:
    """A backward pass for each block of losses, from the carry before the first step that it reaches."""
    xs = tree_map(lambda x: x.clone().requires_grad_(), problem.xs)
    inputs = [*([xs] if isinstance(xs, Tensor) else xs), *problem.parameters]

    def call() -> Sequence[Tensor]:
        carry, ys, carries = problem.carry, [], []
        with torch.no_grad():
            for x in over_time(xs):
                carries.append(carry)
                carry, y = step(carry, x)
                ys.append(y)
        for tensor in inputs:
            tensor.grad = None
        for start, first, last in blocks:
            carry, owned = carries[start], []
            for t, x in enumerate(over_time(_part(xs, start, last)), start):
                carry, y = step(carry, x)
                owned += [y] if t >= first else []
            torch.stack(owned).backward(dy[first : last + 1])
        return torch.stack(ys), *(torch.zeros_like(t) if t.grad is None else t.grad for t in inputs)

    return call


def _part(xs: Any, first: int, last: int) -> Any:
    """The steps from first to last, both included."""
    return tree_map(lambda x: x[first : last + 1], xs)


def _module(name: str, problem: StepProblem, dy: Tensor, gradient: str) -> Call:
    kind: Any = nn.LAYERS[name]
    layer: torch.nn.RNNBase = kind(dy.shape[-1], dy.shape[-1], gradient=gradient)
    layer.load_state_dict({f"{key}_l0": w.detach() for key, w in zip(NAMES[2:], problem.parameters, strict=True)})
    return layer_call(layer, problem.xs, dy)


def _in_jax(cell: StepCell, problem: StepProblem, dy: Tensor, gradient: str) -> Call:
    jax, jnp = require("jax", "bench"), require("jax.numpy", "bench")
    step, policy = JAX_STEPS[cell.name], parse(gradient)
    chunk = policy.k if isinstance(policy, Chunked) else None
    carry, xs, parameters, cotangent = tree_map(
        lambda tensor: jnp.asarray(tensor.detach().numpy()), (problem.carry, problem.xs, problem.parameters, dy)
    )

    def run(xs: Any, parameters: Any, dy: Any) -> Any:
        def scanned(xs: Any, parameters: Any) -> Any:
            return jax_scan(jax, lambda carry, x: step(jax, parameters, carry, x), carry, xs, chunk)

        y, pull = jax.vjp(scanned, xs, parameters)
        dx, gradients = pull(dy)
        return [y, *jax.tree.leaves(dx), *gradients]

    compiled = jax.jit(run)

    def call() -> Sequence[Any]:
        done: Sequence[Any] = jax.block_until_ready(compiled(xs, parameters, cotangent))
        return done

    return call


def step_contest(case: Case, kernel: str = "auto") -> Contest:
    """`bptt.scan`, `bptt.nn` and a Python loop on an LSTM of the case's shape, the full gradient.

    Raises ValueError for a case of another kind.

    >>> contest = step_contest(Case("lstm", 5, 2, 3, 4))
    >>> {name: error < 1e-5 for name, (error, _) in contest.errors().items()}
    {'scan': True, 'module': True, 'loop': True}
    """
    if case.cell != "lstm" or case.gradient != "full":
        raise ValueError(f"case must be an lstm with the full gradient: got {case}")
    problem = Problem.of(case)
    calls = {
        "scan": _call(problem, by_loop=False),
        "module": layer_call(problem.ours(kernel), problem.x, problem.dy),
        "loop": _call(problem, by_loop=True),
    }
    return Contest(NAMES, calls, problem.truth())


def _call(problem: Problem, by_loop: bool) -> Call:
    x = problem.x.clone().requires_grad_()
    W_ih, W_hh, b_ih, b_hh = parameters = list(problem.layer.parameters())
    zero = x.new_zeros(problem.case.B, problem.case.H)

    def step(state: State, gx: Tensor) -> tuple[State, Tensor]:
        h, c = state
        i, f, g, o = (gx + h @ W_hh.T).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return (h, c), h

    def call() -> Sequence[Tensor]:
        gx = x @ W_ih.T + (b_ih + b_hh)
        if by_loop:
            state, ys = (zero, zero), []
            for gx_t in gx.unbind():
                state, y_t = step(state, gx_t)
                ys.append(y_t)
            y = torch.stack(ys)
        else:
            _, y = scan(step, (zero, zero), gx)
        return y.detach(), *torch.autograd.grad(y, [x, *parameters], problem.dy)

    return call
