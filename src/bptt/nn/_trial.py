"""How a cell is called and what state it starts from, found by calling it before the first sequence.

Legend: B lanes; a state is a pytree of tensors `[B, ...]`, in which Python values are let through.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

from ..scan.surroundings import Surroundings, generator_states, random_kept, set_generators
from ._forms import CallForm, CellCall, Form, Start, broadcast, equal, is_tensor, shown, zeros_like

__all__ = ["declared_starts", "try_cells"]

_RESULTS = {
    "auto": "its new state or the pair (output, new state)",
    "state": "its new state, with form='state'",
    "pair": "the pair (output, new state), with form='pair'",
    "spread": "the tensors of its new state, or the output and these, with form='spread'",
}

_FAILURES = (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError, AssertionError)
"""What a cell raises when it is given a state of another kind than its own."""


def declared_starts(cell: nn.Module, x: Tensor) -> tuple[list[Start], bool]:
    """The first states that a cell's attributes speak of, of which one has to fit; whether the cell itself names it,
    where the first that fits is meant.

    x: `[B, ...]`, whose device a state of zeros has, and its type, if that is a floating-point type.
    """
    own = getattr(cell, "initial_state", None)
    if own is not None and not isinstance(own, Tensor) and callable(own):
        like = x.detach()

        def of_zeros(B: int) -> Any:
            return broadcast(own(like.new_zeros(B, *like.shape[1:])), B)

        return [lambda B: broadcast(own(B), B), of_zeros], True
    if own is not None:
        of_one_lane = tree_map(lambda t: t[None] if isinstance(t, Tensor) else t, own)
        return [lambda B: broadcast(of_one_lane, B), lambda B: broadcast(own, B)], True
    for name in ("hidden_size", "state_size"):
        size = getattr(cell, name, None)
        if isinstance(size, int):
            like = next((p for p in cell.parameters() if p.is_floating_point()), x)
            like = x if x.is_floating_point() else like

            def zeros(B: int, size: int = size, like: Tensor = like) -> Tensor:
                return like.new_zeros(B, size)

            return [zeros, lambda B: (zeros(B), zeros(B))], False
    return [], False


def try_cells(
    cells: Sequence[nn.Module],
    D: int,
    x: Tensor,
    starts_of: Callable[[int, nn.Module, Tensor], tuple[list[Start], bool]],
    form: Form,
) -> list[CellCall]:
    """How the cells of a stack of D directions are called, each on what the layer below it puts out: see `try_cell`.

    starts_of: from the number of a cell, the cell and its input, the states to try and whether one of them has to fit.
    """
    calls: list[CellCall] = []
    for k, cell in enumerate(cells):
        if k and k % D == 0:
            x = torch.cat([call.output for call in calls[k - D : k]], 1) if D == 2 else calls[-1].output
        starts, named = starts_of(k, cell, x)
        name = f"cell {k}, a {type(cell).__name__}," if len(cells) > 1 else f"cell, a {type(cell).__name__},"
        calls.append(try_cell(cell, x, starts, named, form, name))
        if D == 2 and calls[-1].output.dim() < 2:
            raise TypeError(f"{name} must put out [B, F, ...] in a bidirectional layer: got one number a lane")
    return calls


def try_cell(cell: nn.Module, x: Tensor, starts: Sequence[Start], named: bool, form: Form, name: str) -> CellCall:
    """Call a cell with the states it may start from, and tell what it returns from the one that fits.

    x: `[rows, ...]`. starts: see `declared_starts`. named: one of them has to fit; else the cell may also make its own
    state. name: the cell's, for errors. What the calls change of the module, its buffers and torch's random generators
    is put back.

    Raises TypeError where no state fits, ValueError where several do.
    """
    trial = _Trial(cell, x)
    found: list[CellCall] = []
    with trial.entered():
        for spread in {"auto": (False, True), "spread": (True,)}.get(form, (False,)):
            count = _separate_states(cell, form) if spread else 1
            if spread and count < 2 and not (named and form == "spread"):
                continue
            forms = [CallForm(pair, spread) for pair in (False, True) if form != ("state" if pair else "pair")]
            tried = [_repeated(start, count) for start in starts[:1]] if spread and not named else starts
            calls: list[CellCall] = []
            for start in tried:
                if not (calls and named):
                    calls += trial.given(start, forms)
            found += calls or ([] if named else trial.of_its_own(forms, count))
    if len(found) == 1:
        _check_output(found[0], name)
        return found[0]
    if found:
        raise ValueError(
            f"{name} can be called in several ways: "
            f"{'; '.join(f'{call.form} with state = {shown(call.state)}' for call in found)}. Say which, by "
            "form='state', 'pair' or 'spread', by hx or by a method initial_state(batch_size) of the cell"
        )
    raise TypeError(
        f"{name} must return {_RESULTS[form]}; a new state has the form of the one that the cell was given: "
        f"{'; '.join(trial.refusals)}. A cell that needs another state has a method initial_state(batch_size), or is "
        "given hx"
    )


def _separate_states(cell: nn.Module, form: Form) -> int:
    """How many arguments after x a cell may have for parts of its state: those that are None unless given.

    form: with "spread", those that must be given count as well.
    """
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [p for p in inspect.signature(cell.forward).parameters.values() if p.kind in kinds][1:]
    defaults = (None, inspect.Parameter.empty) if form == "spread" else (None,)
    return len(list(takewhile(lambda p: any(p.default is default for default in defaults), parameters)))


def _repeated(start: Start, count: int) -> Start:
    """A state of several equal tensors, where a start makes one."""

    def state(B: int) -> Any:
        one = start(B)
        return (one,) * count if isinstance(one, Tensor) else one

    return state


class _Trial:
    """Calls of one cell, each from the same random numbers and with the module as it was.

    refusals: in words, what each state that did not fit has led to.
    """

    def __init__(self, cell: nn.Module, x: Tensor) -> None:
        self.cell, self.x = cell, x
        self.rows = len(x)
        self.devices = {torch.device("cpu"), x.device}
        self.states = generator_states(self.devices)
        self.refusals: list[str] = []

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The context of all calls."""
        with torch.no_grad(), random_kept([self.states]), Surroundings.current(self.devices).entered():
            yield

    def call(self, form: CallForm, state: Any) -> Any:
        """What the cell returns; None where it raises."""
        set_generators(self.states)
        try:
            with _put_back(self.cell), _exporter_kept():
                return form.call(self.cell, self.x, state)
        except _FAILURES as error:
            text = str(error).strip().partition("\n")[0]
            given = "no state" if state is None else shown(state)
            self._refuse(f"given {given}, it raised {type(error).__name__}: {text}")
            return None

    def _refuse(self, words: str) -> None:
        if words not in self.refusals:
            self.refusals.append(words)

    def given(self, start: Start, forms: Sequence[CallForm]) -> list[CellCall]:
        """The forms in which the cell takes and returns a state, all spread or none: one, or none."""
        try:
            state = start(self.rows)
        except _FAILURES as error:
            self._refuse(f"its initial_state raised {type(error).__name__}: {error}")
            return []
        if forms[0].spread and not (isinstance(state, tuple) and all(map(is_tensor, state))):
            return []
        result = self.call(forms[0], state)
        if result is None:
            return []
        if any(form.has_parts(result) for form in forms):
            state, result = self._completed(state, result, forms)
        fitting = [form for form in forms if form.fits(result, state)]
        if not fitting:
            self._refuse(f"given {shown(state)}, it returned {shown(result)}")
        return [self._found(form, result, start) for form in fitting]

    def _completed(self, state: Any, result: Any, forms: Sequence[CallForm]) -> tuple[Any, Any]:
        """The state, broadcast to the new one's shapes where the cell then returns the same, and what it returns."""
        for form in forms:
            if form.has_parts(result) and not form.fits(result, state):
                output, new = form.parts(result)
                whole = CellCall(form, self.rows, output, new, None).whole(state, self.rows)
                if form.fits(result, whole) and equal(self.call(form, whole), result):
                    return whole, result
        return state, result

    def of_its_own(self, forms: Sequence[CallForm], count: int) -> list[CellCall]:
        """The forms in which a cell takes the state that it made itself. count: the parts of one that is spread."""
        first, found = self.call(forms[0], None), []
        for form in forms:
            if not form.has_parts(first):
                continue
            state = form.parts(first)[1]
            if not any(map(is_tensor, tree_leaves(state))) or (form.spread and len(state) != count):
                continue
            result = self.call(form, state)
            if result is None or not form.fits(result, state):
                continue
            zero = zeros_like(state, self.rows, self.rows)
            same = equal(self.call(form, zero), first)
            start: Start | None = (lambda B, like=state: zeros_like(like, self.rows, B)) if same else None
            found.append(self._found(form, first, start))
        return found

    def _found(self, form: CallForm, result: Any, start: Start | None) -> CellCall:
        whole = not form.pair and not isinstance(result, (Tensor, tuple, list))
        output, state = (result, result) if whole else form.parts(result)
        return CellCall(form, self.rows, output, state, start)


def _check_output(call: CellCall, name: str) -> None:
    """Raise TypeError for an output that is not a tensor with a row for each lane."""
    if not is_tensor(call.output) or not call.output.dim() or len(call.output) != call.rows:
        raise TypeError(
            f"{name} must put out a tensor [B, ...]: got {shown(call.output)} for B = {call.rows}"
            + ("" if call.form.pair else " as the first part of its new state")
        )


@contextmanager
def _put_back(cell: nn.Module) -> Iterator[None]:
    """A context after which a module's attributes and buffers are as they were; of a lazy one, what it became."""
    if any(map(is_lazy, (*cell.parameters(), *cell.buffers()))):
        yield
        return
    attributes = [(m, dict(vars(m)), dict(m._buffers)) for m in cell.modules()]
    values = [(b, b.clone()) for b in cell.buffers()]
    try:
        yield
    finally:
        for module, own, buffers in attributes:
            vars(module).clear()
            vars(module).update(own)
            module._buffers.clear()
            module._buffers.update(buffers)
        for buffer, value in values:
            if not torch.equal(buffer, value):
                buffer.copy_(value)


@contextmanager
def _exporter_kept() -> Iterator[None]:
    """A context that torch.export's tracer leaves as it entered: it forgets to leave a module whose call raises."""
    if not torch.compiler.is_exporting():
        yield
        return
    from torch.fx.experimental import proxy_tensor  # which an exporter has loaded

    tracer = getattr(proxy_tensor, "_CURRENT_MAKE_FX_TRACER", None)
    stack: Any = getattr(getattr(tracer, "fx_tracer", None), "module_stack", None)
    inside = None if stack is None else list(stack.items())
    try:
        yield
    except _FAILURES:
        if inside is not None:
            stack.clear()
            stack.update(inside)
        raise
