"""Checks of the arguments and results of `scan` and its step, with errors that name the value and what was expected."""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import index
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves

from ..engine import recorder
from ..steps import restarting
from .pytrees import Form, Step, differentiable, split, split_known
from .surroundings import CPU_ALONE

__all__ = ["Arguments", "check_no_tensor_hidden", "check_not_traced", "check_same", "described"]


@dataclass(frozen=True)
class Arguments:
    """The checked arguments of a scan: its pytrees as tensors and their forms.

    T: the number of steps. resets: `[T, B]` or `[T, 1]`.
    """

    step: Step
    carry: list[Tensor]
    carry_form: Form
    xs: list[Tensor]
    x_form: Form
    T: int
    resets: Tensor | None

    @classmethod
    def of(cls, step: Step, carry: Any, xs: Any, length: int | None = None, resets: Tensor | None = None) -> Arguments:
        """The arguments as a user gives them. Raises TypeError and ValueError as `scan` says."""
        if isinstance(xs, PackedSequence):
            raise TypeError("xs must hold tensors [T, ...]: got a PackedSequence, which bptt.nn.Recurrent takes")
        (state, form), (inputs, x_form) = split_known(carry), split_known(xs)
        check_no_tensor_hidden(form)
        T = _steps(inputs, x_form, length)
        return cls(step, state, form, inputs, x_form, T, _checked_resets(resets, T, state))

    def restarting(self, reset_state: Any) -> Arguments:
        """The same arguments, with resets to a state: `[...]` as the carry's tensors, or `[T, ...]`, one for each step.

        Raises TypeError and ValueError as `scan` says.
        """
        if self.resets is None:
            raise ValueError("reset_state is what resets restart from: got it without resets")
        states, form = split(reset_state, self.carry_form)
        if form.spec != self.carry_form.spec or len(states) != len(self.carry):
            raise ValueError(
                f"reset_state must have the carry's structure: expected {self.carry_form.spec}, got {form.spec}"
            )
        rows = []
        for state, c in zip(states, self.carry, strict=True):
            each = state.shape == (self.T, *c.shape)
            if (state.shape != c.shape and not each) or (state.dtype, state.device) != (c.dtype, c.device):
                raise ValueError(
                    f"reset_state must hold tensors like the carry's, or [T, ...] of them for {self.T} steps: expected "
                    f"{described(c)}, got {described(state)}"
                )
            rows.append(state if each else state.expand(self.T, *state.shape))
        lanes = {c.shape[0] if c.dim() else None for c in self.carry}
        B = lanes.pop() if len(lanes) == 1 else None
        mask = self.resets[:, 0] if B is None else self.resets.expand(self.T, B)
        xs = self.x_form.join(self.xs), mask.clone(), self.carry_form.of_tensors().join(rows)
        inputs, x_form = split(xs)
        return replace(self, step=restarting(self.step), xs=inputs, x_form=x_form)

    def reversed(self) -> Arguments:
        """The same arguments, from the last step to the first."""
        resets = None if self.resets is None else self.resets.flip(0)
        return replace(self, xs=[x.flip(0) for x in self.xs], resets=resets)

    @property
    def devices(self) -> frozenset[torch.device]:
        """The devices whose random generators and autocast may affect a step."""
        tensors = (*self.carry, *self.xs)
        return CPU_ALONE if False not in [t.is_cpu for t in tensors] else CPU_ALONE | {t.device for t in tensors}

    @property
    def lanes(self) -> int:
        """How many lanes a policy draws for: the first dimension that all tensors with a gradient share, or 1."""
        sizes = {c.shape[0] if c.dim() else None for c in self.carry if differentiable(c)}
        return sizes.pop() or 1 if len(sizes) == 1 else 1


def check_not_traced(*arguments: Any) -> None:
    """Raise NotImplementedError inside a tracer whose graph would hold this number of steps for every input."""
    symbolic = not all(map(_concrete, arguments)) and any(
        isinstance(leaf, torch.fx.Proxy) for leaf in tree_leaves(arguments)
    )
    tracer = "torch.fx" if symbolic else "torch.jit.trace" if recorder() is not None else None
    if tracer is not None:
        raise NotImplementedError(
            f"{tracer} cannot trace bptt.scan: its graph would hold this number of steps for every input. Use "
            "torch.export, which checks the number of steps, or, where the step is a cell of torch.nn, a bptt.nn layer "
            "and bptt.revert(model)"
        )


def _concrete(tree: Any) -> bool:
    """Whether a pytree is known to hold nothing but tensors: of most it can be told in less time than by its leaves."""
    return tree is None or isinstance(tree, Tensor) or (type(tree) is tuple and all(map(_concrete, tree)))


def _steps(xs: list[Tensor], form: Form, length: int | None) -> int:
    """T, which xs and length must agree on."""
    if form.values or any(x.dim() == 0 for x in xs):
        raise ValueError("every leaf of xs must be a tensor [T, ...] or None")
    if True in [x.is_nested for x in xs]:
        raise TypeError(
            "every leaf of xs must be a tensor [T, ...] or None: got a nested tensor, which bptt.nn.Recurrent takes "
            "where it is jagged"
        )
    try:
        length = length if length is None else index(length)
    except TypeError:
        raise TypeError(f"length must be an integer or None: got {length!r}") from None
    if any(isinstance(x.shape[0], torch.SymInt) for x in xs):
        raise NotImplementedError(
            "the graph of bptt.scan holds each of its steps, and so one number of them: got xs whose number of steps "
            "is dynamic. Leave that dimension out of dynamic_shapes; a bptt.nn.RNN, GRU or LSTM takes any T"
        )
    lengths = {x.shape[0] for x in xs} | (set() if length is None else {length})
    if len(lengths) != 1:
        raise ValueError(
            f"xs and length must tell one number of steps: got leaves of xs of {[len(x) for x in xs]} steps, {length=}"
        )
    T = lengths.pop()
    if T < 1:
        raise ValueError(f"scan needs at least 1 step, since the first step tells what ys look like: got {T}")
    return T


def _checked_resets(resets: Tensor | None, T: int, carry: list[Tensor]) -> Tensor | None:
    """The resets as `[T, B]` or `[T, 1]`."""
    if resets is None:
        return None
    if not isinstance(resets, Tensor) or resets.dtype != torch.bool:
        raise TypeError(f"resets must be a bool tensor [T, B] or [T]: got {described(resets)}")
    sizes = {c.shape[0] if c.dim() else None for c in carry}
    shapes = [[T], *([T, size] for size in sizes if len(sizes) == 1 and size is not None)]
    if list(resets.shape) not in shapes:
        raise ValueError(
            f"resets must have shape {' or '.join(map(str, shapes))}, for {T} steps and a carry with tensors of shape "
            f"{[list(c.shape) for c in carry]}: got {list(resets.shape)}"
        )
    for c in carry:
        if c.device != resets.device:
            raise ValueError(f"resets must be on the carry's device {c.device}: got {resets.device}")
    return resets if resets.dim() == 2 else resets[:, None]


def check_no_tensor_hidden(carry: Form) -> None:
    """Raise TypeError for a leaf that counts as a Python value but holds tensors: they would get no gradient."""
    for leaf in carry.values:
        names = [name for kind in type(leaf).__mro__ for name in getattr(kind, "__slots__", ())]
        held = [*getattr(leaf, "__dict__", {}).values(), *(getattr(leaf, name, None) for name in names)]
        if any(isinstance(t, Tensor) for t in tree_leaves(held)) and not isinstance(leaf, torch.nn.Module):
            name = type(leaf).__name__
            raise TypeError(
                f"carry holds a {name}, which is not a registered pytree: register it "
                f"(torch.export.register_dataclass for a dataclass), or put its tensors in a tuple or dict"
            )


def check_same(name: str, when: str, got: tuple[list[Tensor], Form], expected: tuple[list[Tensor], Form]) -> None:
    """Raise ValueError for the first leaf that differs in kind, shape, dtype or device."""
    kinds, kinds_before = ([type(leaf) for leaf in form.leaves] for _, form in (got, expected))
    if got[1].spec == expected[1].spec and kinds == kinds_before and all(map(_alike, got[0], expected[0])):
        return
    if got[1].spec != expected[1].spec:
        raise ValueError(f"{name} must have the same structure {when}: expected {expected[1].spec}, got {got[1].spec}")
    now, then = (tree_flatten_with_path(form.join(tensors))[0] for tensors, form in (got, expected))
    for (path, a), (_, b) in zip(now, then, strict=True):
        if described(a) != described(b):
            raise ValueError(
                f"{name}{keystr(path)} must be the same {when}: expected {described(b)}, got {described(a)}"
            )


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def described(value: Any) -> str:
    """The description of a value in an error."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
