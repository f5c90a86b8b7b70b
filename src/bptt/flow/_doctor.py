"""The doctor: watches a model's training steps, says where the first NaN or infinity arose, and warns before that."""

from __future__ import annotations

import math
import statistics
import warnings
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..nn import Recurrent
from ._by_lag import Lags
from ._doctor_calls import Generators, RecordedCall
from ._doctor_findings import Diagnosis, Examination, Finding, Place
from ._doctor_search import first_not_finite
from ._doctor_symptoms import lags_of, lags_of_scan, symptoms, symptoms_of_scan
from ._layer_call import detached, tensors_in
from ._recurrent_call import RecurrentCall, tensors_of
from .language import say

__all__ = ["Watch", "watch"]

SPIKE = 100.0
"""Times the median of the last gradient norms, above which a norm is an explosion."""

NORMS = 32
"""Gradient norms that the median is over; no spike is seen before there are so many."""

DROPPED = 8
"""Steps in a row that begin at zero, after which a state that should be carried counts as dropped."""

CALLS = 256
"""Calls of modules kept of one step at most, the latest."""

NODES = 64
"""Nodes of the graph of an initial state that are looked at, at most."""


def watch(model: torch.nn.Module, *, carries: bool = False, tell: Callable[[Finding], None] | None = None) -> Watch:
    """Watch a model's training steps from now on, until `remove()` or the end of a `with`.

    model: any module. It looks into the RNN, GRU and LSTM layers of `bptt.nn` and `torch.nn` in it step by step, and
    into each one-directional `bptt.nn.Recurrent`, of whose calls `examine` measures the reach alone: it has no gates.
    carries: whether the state after one training step is meant to be the initial state of the next. tell: what is
    called with each warning, once for each; by default `warnings.warn` with its message.

    After each backward pass, before the optimiser's step, `check(loss)` returns None, or the `Diagnosis` of what is not
    finite: the first in the order of computation, by stage, layer, step, lane and gate. It sees the last call of the
    model since the check before. While nothing is wrong it costs a few reductions (`benchmarks/doctor.py`), and changes
    no number: not a gradient, not a random draw. `examine()` measures how far the gradient reaches, and which gates are
    saturated, at about the price of a training step.

    It warns of an *explosion*, where the gradient norm is 100 times the median of the last 32, or `examine` sees
    adjoints grow; of *vanishing* and *saturation*, which `examine` sees; of a carried state that is still *attached*,
    that is, whose gradient history leads, within 64 nodes of the graph, to a state of an earlier step; and of a state
    that is *dropped*: with carries=True, 8 steps in a row, in train mode, began at zero. Without carries=True it does
    not look for a dropped state, since independent sequences begin at zero too.

    It does not see what runs under torch.compile or without grad mode; functions between modules, which it knows only
    by what they hand to the next module; and a parameter that is infinite and leaves loss, gradients and states finite.

    Raises TypeError where model is not a module.

    >>> import torch, bptt
    >>> layer, x = bptt.nn.GRU(2, 3), torch.zeros(5, 4, 2)
    >>> x[3, 1] = torch.nan
    >>> with bptt.flow.watch(layer) as doctor:
    ...     loss = layer(x)[0].sum()
    ...     loss.backward()
    ...     print(doctor.check(loss))
    forward: the model, step 3, lane 1: its input holds NaN; look at the data, and at what computes it before this layer
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module: got {type(model).__name__}")
    return Watch(model, carries=carries, tell=tell)


class Watch:
    """A doctor that watches the training steps of a model. `watch` makes one."""

    def __init__(
        self, model: torch.nn.Module, *, carries: bool = False, tell: Callable[[Finding], None] | None = None
    ) -> None:
        self.model, self.carries = model, carries
        self._tell = _warn if tell is None else tell
        self._calls: deque[RecordedCall] = deque(maxlen=CALLS)
        self._names = {module: name for name, module in model.named_modules()}
        self._generators: dict[torch.nn.Module, Generators | None] = {}
        self._steps = 0  # that were checked
        self._checked = False  # whether the calls kept are those of a step that was
        self._zero: dict[str, bool] = {}  # whether this step began at zero, by recurrent layer
        self._ended: dict[str, bool] = {}  # whether the last step ended elsewhere
        self._from_zero: dict[str, int] = {}  # steps in a row that began at zero though the one before ended elsewhere
        self._norms: deque[float] = deque(maxlen=NORMS)
        self._told: set[tuple[str, ...]] = set()
        self._hooks = [model.register_forward_pre_hook(self._begin)]
        self._started: dict[torch.nn.Module, RecurrentCall] = {}
        inside = {cell for m in self._names if isinstance(m, Recurrent) for cell in m.modules() if cell is not m}
        for module in self._names:
            if isinstance(module, Recurrent):
                self._hooks.append(module.register_forward_pre_hook(self._before_scan, with_kwargs=True))
                self._hooks.append(module.register_forward_hook(self._after, with_kwargs=True))
            if module in inside or isinstance(module, Recurrent):
                continue  # the steps of a layer are traced and run again: hooks would see what is no call of a step
            if isinstance(module, torch.nn.RNNBase):
                self._hooks.append(module.register_forward_pre_hook(self._before))
            if isinstance(module, torch.nn.RNNBase) or not list(module.children()):
                self._hooks.append(module.register_forward_hook(self._after, with_kwargs=True))

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Stop watching: the model is as it was before."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._calls.clear()

    def check(self, loss: Tensor | float | None = None, *, grad_norm: Tensor | float | None = None) -> Diagnosis | None:
        """What is not finite in the step just computed, or None. To be called after backward, before the update.

        loss: its value, if it is to be looked at. grad_norm: the global norm of the gradient, where it is known
        already; else it is computed.
        """
        loss, grad_norm = detached(loss), detached(grad_norm)
        if grad_norm is None:
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            grad_norm = torch.nn.utils.get_total_norm(grads)
        states = [state for call in self._calls if call.keeps_state for state in call.finals]
        self._steps += 1
        self._checked = True
        if _finite((grad_norm, *(() if loss is None else (loss,)), *states)):
            self._watch_norm(float(grad_norm))
            self._count_starts()
            return None
        found = first_not_finite(self.model, tuple(self._calls), loss)
        return Diagnosis((found,))

    def examine(self) -> Examination:
        """Measure how far the gradient reaches and how saturated gates are, on the last step that was watched.

        Of a one-directional `Recurrent` it measures how far the gradient of its whole state reaches; a bidirectional
        one is left out. It takes the weights of now, that is, after an update if there was one, and the errors of the
        step. It measures nothing of a call that no error came back to, or whose numbers are not finite. Each warning is
        told once.
        """
        lags: dict[str, Lags] = {}
        findings: list[Finding] = []
        for call in self._calls:
            if call.scan is not None and call.errors and _finite((*call.errors.values(), *tensors_in(call.args))):
                with call.scan.drawing_again():
                    found = lags_of_scan(call.scan.with_errors(call.errors_of_outputs()))
                if found is not None:
                    lags[call.name] = found
                findings += symptoms_of_scan(found, call.name, call.scan.steps)
                continue
            recording = call.recording() if call.recurrent else None
            if recording is None or not _finite((recording.dy, *recording.call.tensors)):
                continue
            measured = lags_of(recording)
            if measured is not None:
                lags[call.name] = measured
            findings += symptoms(recording, measured)
        for finding in findings:
            self._warn_of(finding)
        return Examination(lags, tuple(findings))

    def state(self) -> dict[str, Any]:
        """The state that `restore` needs so that warnings go on as if there had been no interruption: numbers and text
        only.
        """
        told = sorted(map(list, self._told))
        return {"norms": list(self._norms), "from_zero": dict(self._from_zero), "told": told}

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a state that `state` has returned."""
        self._norms = deque(state["norms"], maxlen=NORMS)
        self._from_zero = dict(state["from_zero"])
        self._told = {tuple(key) for key in state["told"]}

    # Hooks -----------------------------------------------------------------------------------------------------------

    def _begin(self, module: torch.nn.Module, args: Any) -> None:
        if _sees():
            self._forget()

    def _forget(self) -> None:
        """Forget what was kept of the last step, since another one begins."""
        self._calls.clear()
        self._zero.clear()
        self._checked = False

    def _before(self, module: torch.nn.Module, args: Any) -> None:
        if _sees():
            if self._checked:  # the first call of a step that does not call the model itself
                self._forget()
            self._generators[module] = Generators.before(module)

    def _before_scan(self, module: Recurrent, args: Any, kwargs: dict[str, Any]) -> None:
        if _sees():
            if self._checked:
                self._forget()
            call = RecurrentCall.about_to(module, args, kwargs)
            if call.is_one_scan:
                self._started[module] = call

    def _after(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not _sees():
            return
        if self._checked:
            self._forget()
        generators = self._generators.get(module)
        given, named, returned = detached(args), detached(kwargs), detached(output)
        started = self._started.pop(module, None)
        call = RecordedCall(self._names[module], module, given, named, returned, generators, scan=started)
        self._calls.append(call)
        if call.keeps_state:
            self._look_at_start(call, tuple(tensors_in(args[1] if len(args) > 1 else kwargs.get("hx"))))
            for i, tensor in enumerate(tensors_of(output)):
                if tensor.requires_grad:
                    tensor.register_hook(_Keep(call.errors, i))
                    if i > 0 and tensor.grad_fn is not None:
                        _metadata(tensor.grad_fn)[self] = self._steps

    def _look_at_start(self, call: RecordedCall, states: tuple[Tensor, ...]) -> None:
        """Whether a call starts from an attached state, or from zero."""
        if any(state.grad_fn is not None for state in states) and self._leads_to_an_earlier_step(states):
            what = say("its initial state still carries the graph of an earlier step: the graph grows, step by step")
            advice = say("detach it between steps (state = state.detach(), of a pair both)")
            self._warn_of(Finding.at("attached", "forward", Place(call.name), None, what, advice))
        if self.carries and call.module.training and call.name not in self._zero:
            self._zero[call.name] = not any(bool(state.any()) for state in states)

    def _leads_to_an_earlier_step(self, states: tuple[Tensor, ...]) -> bool:
        nodes, seen = [state.grad_fn for state in states if state.grad_fn is not None], 0
        while nodes and seen < NODES:
            node, seen = nodes.pop(0), seen + 1
            if _metadata(node).get(self, self._steps) < self._steps:
                return True
            nodes += [parent for parent, _ in node.next_functions if parent is not None]
        return False

    # Warnings --------------------------------------------------------------------------------------------------------

    def _count_starts(self) -> None:
        for name, zero in self._zero.items():
            dropped = zero and self._ended.get(name, True)
            steps = self._from_zero[name] = self._from_zero.get(name, 0) + 1 if dropped else 0
            if steps >= DROPPED:
                text = "its state is dropped: the last {steps} steps began at zero, though it is meant to be carried"
                what = say(text, steps=steps)
                advice = say("hand the final state of one call, detached, to the next as hx")
                self._warn_of(Finding.at("dropped", "forward", Place(name), float(steps), what, advice))
        for call in self._calls if self._zero else ():
            if call.keeps_state:
                self._ended[call.name] = any(bool(state.any()) for state in call.finals)

    def _watch_norm(self, norm: float) -> None:
        if len(self._norms) == NORMS and norm > SPIKE * statistics.median(self._norms) > 0:
            times = norm / statistics.median(self._norms)
            text = "the gradient explodes: its norm {norm} is {times} times the median of the last {count}"
            what = say(text, norm=f"{norm:.3g}", times=f"{times:.0f}", count=NORMS)
            advice = say("clip the gradient, lower the learning rate, or scale the recurrent weights down")
            self._warn_of(Finding.at("explosion", "parameter gradient", Place(""), norm, what, advice))
        self._norms.append(norm)

    def _warn_of(self, finding: Finding) -> None:
        if finding.once not in self._told:
            self._told.add(finding.once)
            self._tell(finding)


class _Keep:
    """A hook that keeps the gradient of a tensor; it knows nothing of the tensor."""

    def __init__(self, errors: dict[int, Tensor], i: int) -> None:
        self.errors, self.i = errors, i

    def __call__(self, grad: Tensor | None) -> None:
        if grad is not None:  # an output that the loss does not use
            self.errors[self.i] = grad.detach()


def _sees() -> bool:
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _metadata(node: Any) -> dict[Any, Any]:
    """A dict that lives as long as a node of autograd's graph; torch's stubs take it for a method."""
    metadata: dict[Any, Any] = node.metadata
    return metadata


def _finite(values: tuple[Tensor | float, ...]) -> bool:
    """Whether all are finite. A device is waited for once."""
    if not all(math.isfinite(v) for v in values if not isinstance(v, Tensor)):
        return False
    flags = [torch.isfinite(v).all() for v in values if isinstance(v, Tensor)]
    return not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all())


def _warn(finding: Finding) -> None:
    warnings.warn(finding.message, UserWarning, stacklevel=4)
