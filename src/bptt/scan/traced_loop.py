"""A call of a traced step by the step itself, in a loop that autograd records: where torch has least to do so.

That it keeps nothing between its calls, and depends on nothing else, the trace has shown and the guard says. So nothing
is observed, run twice or compared: it is a plain loop, with the time edges that a policy cuts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..memory import Checkpoints, parse
from ..policies import Policy
from .arguments import Arguments
from .compiled import Compiled
from .forward import ScanResults, StepResults
from .pytrees import reset

__all__ = ["by_traced_loop", "loop_suffices"]


def loop_suffices(given: Arguments, policy: Policy, memory: str | Checkpoints, entry: Compiled) -> bool:
    """Whether a call may keep the graph of all its steps, and its blocks are one loop."""
    blocks = policy.reach(given.T).blocks(given.T)
    if policy.draws_factors or any(earliest < first for earliest, first, _ in blocks) or parse(memory) != "auto":
        return False
    if torch._C._is_any_autocast_enabled() or torch.is_inference_mode_enabled():
        return False
    return not torch.is_grad_enabled() or entry.graph_fits(given.T, given.lanes)


def by_traced_loop(given: Arguments, policy: Policy, copies: bool) -> ScanResults:
    """The results of a call. copies: the step writes to what it is given."""
    step, resets, join = given.step, given.resets, given.x_form.join
    cuts = {first for _, first, _ in policy.reach(given.T).blocks(given.T)} - {0}
    results, ys = StepResults(given.carry_form), list[list[Tensor]]()
    xs, carry = [x.unbind(0) for x in given.xs], list(given.carry)
    for t in range(given.T):
        if t in cuts:
            carry = [c.detach() for c in carry]
        if resets is not None:
            carry = reset(carry, resets, t)
        x = [rows[t] for rows in xs]
        if copies:
            carry, x = [c.clone() for c in carry], [r.clone() for r in x]
        carry, y = results.read(t, step(results.form.join(carry), join(x)), carry)
        ys.append(y)
    # Clones, so that no output is an input that a step passed through.
    together = [torch.stack(leaves) for leaves in zip(*ys, strict=True)]
    return ScanResults([c.clone() for c in carry], results.form, together, results.y_form)
