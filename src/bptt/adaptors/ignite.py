"""PyTorch-Ignite: handlers for the gradient policy and the doctor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .doctor import OptimizerDoctor
from .missing import missing
from .policy import PolicyState

if TYPE_CHECKING:
    import ignite.distributed as idist
    from ignite.engine import Events
else:
    try:
        import ignite.distributed as idist
        from ignite.engine import Events
    except ModuleNotFoundError as error:
        raise missing("ignite", ("ignite",), error) from None

__all__ = ["GradientDoctor", "GradientPolicy"]


class GradientPolicy(PolicyState):
    """A handler that converts a model's layers when a run starts, and keeps their policies in checkpoints as text.

    gradient, memory, kernel: as in `bptt.convert`. restore: False keeps what is given where a checkpoint is loaded; by
    default its policies are set, with a warning where they differ.

    `Checkpoint(to_save={"model": model, "policy": policy}, ...)` writes `{"gradient": text, "layers": {name: text}}`,
    and `Checkpoint.load_objects` sets them, before the run or during it.
    """

    def attach(self, engine: Any, model: torch.nn.Module) -> None:
        """Convert at `Events.STARTED`."""
        engine.add_event_handler(Events.STARTED, lambda: self.attach_to(model))


class GradientDoctor(OptimizerDoctor):
    """A handler that looks at each update of an optimiser just before it is made, by `bptt.flow.watch`.

    on_nonfinite: "raise" (the default) stops the run with `bptt.train.NonFiniteError`, before the weights change.
    "skip" takes the gradients away, so that the optimiser changes neither weights nor its own state; it counts in
    `skipped`, and the 10th in a row raises. carries, tell: as in `bptt.flow.watch`.

    It looks at gradients and states, since an engine's update function hands out its loss only afterwards. Of several
    processes, one that finds something stops or skips the update of all. A gradient scaler leaves out updates that
    overflow by itself, and the doctor does not see them. `state_dict` and `load_state_dict` are for ignite's
    `Checkpoint`. Raises TypeError for an optimiser whose step takes a closure, such as LBFGS.
    """

    def attach(self, engine: Any, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Watch from `Events.STARTED` to the end of the run."""
        engine.add_event_handler(Events.STARTED, lambda: self.follow(model, optimizer, _anywhere))
        engine.add_event_handler(Events.COMPLETED, self.end)
        engine.add_event_handler(Events.TERMINATE, self.end)


def _anywhere(found: bool) -> bool:
    return bool(idist.all_reduce(int(found)))
