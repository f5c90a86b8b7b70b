"""The doctor before each update of an optimiser: what is not finite stops the run, or leaves the update out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..flow import Diagnosis, Finding, Watch, watch
from ..train.errors import NonFiniteError
from ..train.loop import TOO_MANY

__all__ = ["OptimizerDoctor", "StepDoctor"]


class StepDoctor:
    """`bptt.flow.watch` around every training step, and what follows from what it finds.

    on_nonfinite: "raise": `NonFiniteError` with the diagnosis, before the weights change; "skip": the update is left
        out and counted. The 10th in a row raises all the same, as in `bptt train`.
    carries, tell: as in `bptt.flow.watch`.

    skipped: updates left out. in_a_row: of these, since the last one that was made. diagnosis: of the last one.

    Raises ValueError for an on_nonfinite that is neither.
    """

    def __init__(
        self,
        on_nonfinite: str = "raise",
        *,
        carries: bool = False,
        tell: Callable[[Finding], None] | None = None,
    ) -> None:
        if on_nonfinite not in ("raise", "skip"):
            raise ValueError(f"on_nonfinite must be 'raise' or 'skip': got {on_nonfinite!r}")
        self.on_nonfinite, self.carries, self.tell = on_nonfinite, carries, tell
        self.skipped = self.in_a_row = 0
        self.diagnosis: Diagnosis | None = None
        self._watch: Watch | None = None
        self._pending: dict[str, Any] | None = None

    def begin(self, model: torch.nn.Module) -> None:
        """Watch this model from now on, and no other."""
        self.end()
        self._watch = watch(model, carries=self.carries, tell=self.tell)
        if self._pending is not None:
            self._watch.restore(self._pending)
            self._pending = None

    def end(self) -> None:
        """Watch no longer: the model is as it was."""
        if self._watch is not None:
            self._pending = self._watch.state()
            self._watch.remove()
            self._watch = None

    def refuses(
        self,
        loss: Tensor | float | None,
        step: int,
        *,
        gradients: bool = True,
        anywhere: Callable[[bool], bool] = bool,
    ) -> bool:
        """Whether the update after the gradients just computed is to be left out.

        step: its number, for words. gradients: whether they are looked at; not where a gradient scaler does that.
        anywhere: what tells, of several processes, whether any found something.

        Raises NonFiniteError as the class says.
        """
        if self._watch is None:
            return False
        found = self._watch.check(loss, grad_norm=None if gradients else 0.0)
        if not anywhere(found is not None):
            self.in_a_row = 0
            return False
        self.diagnosis = found
        what = "another process found what is not finite" if found is None else str(found)
        if self.on_nonfinite == "raise":
            raise NonFiniteError(f"step {step}: {what}")
        if self.in_a_row + 1 >= TOO_MANY:
            raise NonFiniteError(f"step {step}, the {TOO_MANY}th in a row: {what}")
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        warnings.warn(f"step {step} is left out: {what}", UserWarning, stacklevel=2)
        return True

    def state_dict(self) -> dict[str, Any]:
        """The counts, and what the doctor knows of earlier steps: numbers and text."""
        known = self._pending if self._watch is None else self._watch.state()
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "watch": known}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` has returned."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        if self._watch is None or state["watch"] is None:
            self._pending = state["watch"]
        else:
            self._watch.restore(state["watch"])


class OptimizerDoctor(StepDoctor):
    """A `StepDoctor` in front of one optimiser's `step`, whoever calls it; it knows gradients and states, no loss."""

    def __init__(
        self,
        on_nonfinite: str = "raise",
        *,
        carries: bool = False,
        tell: Callable[[Finding], None] | None = None,
    ) -> None:
        super().__init__(on_nonfinite, carries=carries, tell=tell)
        self._hook: RemovableHandle | None = None
        self._anywhere: Callable[[bool], bool] = bool
        self._step = 0

    def follow(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, anywhere: Callable[[bool], bool] = bool
    ) -> None:
        """Watch a model, and look before every step of its optimiser, until `end`."""
        self.begin(model)
        self._anywhere = anywhere
        self._hook = optimizer.register_step_pre_hook(self._before)

    def end(self) -> None:
        """Watch no longer: model and optimiser are as they were."""
        super().end()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._step = state["step"]

    def _before(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Without gradients an optimiser changes nothing."""
        if any(callable(given) for given in (*args[1:], *kwargs.values())):
            raise TypeError(
                "the optimizer's step must be called without a closure, whose gradients come after the doctor's look: "
                f"got one for {type(optimizer).__name__}"
            )
        self._step += 1
        if self.refuses(None, self._step, anywhere=self._anywhere):
            optimizer.zero_grad(set_to_none=True)
