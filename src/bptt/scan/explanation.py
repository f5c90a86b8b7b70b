"""What `scan` does with a step, as data that prints itself: its parts, what is kept, the kernel; or why it replays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map

from ..steps import SplitStep, labels, listing, sizes
from .arguments import Arguments
from .compiled import FEWEST_STEPS, Compiled, compiled_step
from .compiled_call import reason_to_replay
from .pytrees import Form, Step
from .surroundings import Surroundings

__all__ = ["StepExplanation", "explain_scan", "explain_step"]

_HEADINGS = {
    "constants": "once a call, of captured tensors alone",
    "hoisted": "hoisted: for all steps at once, before the walk",
    "forward": "core forward: step by step",
    "outputs": "outputs: for all steps at once, after the walk",
    "errors": "errors: for all steps at once, before the walk back",
    "adjoint": "core adjoint: step by step, back",
    "deferred": "deferred: for all steps at once, after the walk back",
}
"""What is printed above each part."""


@dataclass(frozen=True, eq=False)
class StepExplanation:
    """The explanation of what `bptt.scan` does with a step, and why; `print` shows it.

    kernel: what runs: "interpreter", "eager", or "replay", the step itself. reason: why that one. variant: the
    instruction set that it was compiled for, if it was. rows: the first dimension of carry and x, None where they do
    not share one. dtype, device: those of the carry, None where it has no tensor. parts: the traced step, split; None
    where it is replayed. captured: of each tensor that the step captures, how its code reaches it. names: of a value of
    the parts, what is printed for it. setting: what else is told of the call.
    """

    kernel: str
    reason: str
    variant: str | None
    rows: int | None
    dtype: torch.dtype | None
    device: torch.device | None
    parts: SplitStep | None = field(default=None, repr=False)
    captured: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict, repr=False)
    setting: str = ""

    def __str__(self) -> str:
        lines = self._replayed() if self.parts is None else [*self._head(), *self._parts(), *self._kept()]
        return "\n".join([*lines, *filter(None, [self.setting])])

    def _replayed(self) -> list[str]:
        return [f"kernel 'replay', the step itself, {self._where()}", f"replayed: {self.reason}"]

    def _where(self) -> str:
        rows = "" if self.rows is None else f"on {self.rows} row{'' if self.rows == 1 else 's'}, "
        return f"{rows}{self.dtype} on {self.device}" if self.dtype else "without a tensor in the carry"

    def _head(self) -> list[str]:
        compiled = f" ({self.variant})" if self.variant else ""
        return [f"kernel {self.kernel!r}{compiled} for a traced step {self._where()}: {self.reason}"]

    def _parts(self) -> list[str]:
        step = self.parts
        assert step is not None
        shown = self.names
        after = {
            "forward": [*zip(_each("next carry", step.carry, shown, "carry"), step.next, strict=True),
                        *((shown[f"y_{i}"], n) for i, n in enumerate(step.y) if n not in step.outputs.outputs)],
            "outputs": [(shown[f"y_{i}"], n) for i, n in enumerate(step.y) if n in step.outputs.outputs],
            "adjoint": [*((f"{shown[c]} of the step before", n or "0")
                          for c, n in zip(step.adjoints, step.back, strict=True) if c),
                        *(("summed over steps", n) for n in step.summed)],
            "deferred": [(f"gradient of {shown[name]}", n) for names, grads in
                         ((step.x, step.dx), (step.captured, step.dcaptured))
                         for name, n in zip(names, grads, strict=True) if n],
        }  # fmt: skip
        lines = []
        for part, heading in _HEADINGS.items():
            ends = [f"{what} = {shown.get(n, n)}" for what, n in after.get(part, ())]
            found = [*listing(getattr(step, part), shown), *ends]
            lines += [heading, *(f"    {line}" for line in found)] if found else []
        return lines

    def _kept(self) -> list[str]:
        step = self.parts
        assert step is not None
        values = [f"{self.names.get(n, n)} {sizes(step.values[n])}" for n in step.kept]
        count, own = f"{len(values)} value{'' if len(values) == 1 else 's'}", step.row_bytes(step.kept)
        state = step.row_bytes(step.carry)
        kept = f"kept: {count}, {own:,} bytes a lane and step, beside the carry's {state:,}: {', '.join(values)}"
        lines = [kept if values else f"kept: nothing beside the carry, {state:,} bytes a lane and step"]
        return [*lines, f"captured: {', '.join(self.captured)}"] if self.captured else lines


def explain_step(step: Step, carry: Any, x: Any) -> StepExplanation:
    """What `scan` does with a step, where kernel="auto" and there are steps enough for a trace: see `bptt.explain`.

    carry, x: those of one step, as the step is given them. Raises TypeError for a step that is no function, and for an
    x that holds something else than tensors; TypeError and ValueError as `scan` does for a carry.
    """
    if not callable(step):
        raise TypeError(f"step must be a function of (carry, x): got a {type(step).__name__}")
    other = [type(leaf).__name__ for leaf in tree_leaves(x) if not isinstance(leaf, Tensor) and leaf is not None]
    if other:
        raise TypeError(f"x must hold tensors alone, those of one step: got a {other[0]}")
    with torch.enable_grad():  # so that it requires a gradient where x does
        xs = tree_map(lambda t: t[None] if isinstance(t, Tensor) else t, x)
    given = Arguments.of(step, carry, xs, length=None if any(isinstance(t, Tensor) for t in tree_leaves(x)) else 1)
    return _explained(replace(given, T=FEWEST_STEPS), "auto", "")


def explain_scan(
    step: Step, carry: Any, xs: Any, resets: Tensor | None = None, *, kernel: str = "auto", setting: str = ""
) -> StepExplanation:
    """What `scan` does with a step in a call with these arguments. setting: what else is printed.

    Raises TypeError and ValueError as `scan` does, and RuntimeError for a named kernel that cannot run the step.
    """
    return _explained(Arguments.of(step, carry, xs, None, resets), kernel, setting)


def _explained(given: Arguments, kernel: str, setting: str) -> StepExplanation:
    reason = reason_to_replay(given, kernel)
    sizes = {t.shape[0] if t.dim() else None for t in (*given.carry, *(x[0] for x in given.xs))}
    rows = sizes.pop() if len(sizes) == 1 else None
    first = given.carry[0] if given.carry else None
    dtype, device = (None, None) if first is None else (first.dtype, first.device)
    if reason is None:
        entry, captured = compiled_step(given, Surroundings.current(given.devices), whatever_it_takes=kernel != "auto")
        rows = 1 if entry.one_lane else rows
        reason = entry.obstacle(captured, rows or 0)
        reason = entry.as_it_is(kernel, given.carry, (*given.xs, *captured)) if reason is None else reason
        if reason is None:
            choice, names = entry.choice(kernel, given.carry), _names(entry, given)
            own, paths = choice.kernel, _captured(entry, captured, names)
            parts = entry.parts.for_operations if entry.parts and own.by_operations else entry.parts
            return StepExplanation(
                own.name, choice.reason, own.variant, rows, dtype, device, parts, paths, names, setting
            )
    if kernel not in ("auto", "replay"):
        raise RuntimeError(f"kernel={kernel!r} cannot run this step: {reason}")
    return StepExplanation("replay", reason, None, rows, dtype, device, setting=setting)


def _names(entry: Compiled, given: Arguments) -> dict[str, str]:
    """What is printed for each value of a traced step."""
    step, traced, guard = entry.parts, entry.traced, entry.guard
    assert step is not None
    assert traced is not None
    assert guard is not None
    assert entry.y_form is not None
    carry, x, y = _leaves("carry", given.carry_form), _leaves("x", given.x_form), _leaves("y", entry.y_form)
    x += [f"draw {i}" for i in range(len(traced.draws))]
    found = dict(zip((*step.carry, *step.x), (*carry, *x), strict=True)) | {f"y_{i}": name for i, name in enumerate(y)}
    found |= {n: f"adjoint{c.removeprefix('carry')}" for n, c in zip(step.adjoints, carry, strict=True) if n}
    found |= {n: f"d{name}" for n, name in zip(step.dys, y, strict=True) if n}
    found |= {n: path or n for n, path in zip(step.captured, guard.paths, strict=True)}
    return labels(step, found)


def _captured(entry: Compiled, captured: Sequence[Tensor], names: Mapping[str, str]) -> tuple[str, ...]:
    """Of each captured tensor, how it is reached and its sizes."""
    traced, guard = entry.traced, entry.guard
    assert traced is not None
    assert guard is not None
    found = []
    for t, name, path, lane, constant in zip(
        captured, traced.captured, guard.paths, traced.lanes, traced.constants, strict=True
    ):
        unknown = " (made by the step)" if constant else "" if path else " (no path to it was found)"
        shape = ", ".join(["R"] * lane + [str(n) for n in t.shape[lane:]])
        found.append(f"{names[name]} [{shape}]{unknown}")
    return tuple(found)


def _leaves(name: str, form: Form) -> list[str]:
    """The names of the tensors of a pytree: that of the whole, and how each is reached in it."""
    marks = [torch.empty(0, device="cpu") for _ in range(form.count)]
    paths = tree_flatten_with_path(form.join(marks))[0] if marks else []
    return [f"{name}{keystr(path)}" for path, leaf in paths if isinstance(leaf, Tensor)]


def _each(what: str, leaves: Sequence[str], shown: Mapping[str, str], root: str) -> list[str]:
    return [f"{what}{shown[leaf].removeprefix(root)}" for leaf in leaves]
