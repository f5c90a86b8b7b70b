"""Accelerate: the gradient policy in its checkpoints, and the doctor before its updates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .doctor import OptimizerDoctor
from .missing import missing
from .policy import PolicyState

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
else:
    try:
        from accelerate import Accelerator
        from accelerate.optimizer import AcceleratedOptimizer
    except ModuleNotFoundError as error:
        raise missing("accelerate", ("accelerate",), error) from None

__all__ = ["GradientDoctor", "GradientPolicy"]


class GradientPolicy(PolicyState):
    """The policies of a model's layers, which `save_state` writes as text and `load_state` sets again.

    gradient, memory, kernel: as in `bptt.convert`. restore: False keeps what is given where a checkpoint is loaded; by
    default its policies are set, with a warning where they differ.

    `GradientPolicy("chunked:35").attach(accelerator, model)` stands before `accelerator.prepare(model, ...)`, since
    what shards or compiles a layer keeps hold of the old one.
    """

    def attach(self, accelerator: Accelerator, model: torch.nn.Module) -> None:
        """Convert the model, and register for checkpoints."""
        self.attach_to(accelerator.unwrap_model(model))
        accelerator.register_for_checkpointing(self)


class GradientDoctor(OptimizerDoctor):
    """The doctor before each update of a prepared optimiser, by `bptt.flow.watch`; its counts are in the checkpoints.

    on_nonfinite: "raise" (the default) stops with `bptt.train.NonFiniteError`, before the weights change. "skip" takes
    the gradients away, so that the optimiser changes neither weights nor its own state; it counts in `skipped`, and the
    10th in a row raises. carries, tell: as in `bptt.flow.watch`.

    It looks at gradients and states, and under gradient accumulation at the last batch of each update. Of several
    processes, one that finds something stops or skips the update of all. In float16 accelerate's scaler leaves out
    updates that overflow by itself, and the doctor does not see them. Raises TypeError for an optimiser whose step
    takes a closure, such as LBFGS.
    """

    def attach(self, accelerator: Accelerator, model: torch.nn.Module, optimizer: Any) -> None:
        """Watch a model and its optimiser, prepared or not, until `end()`, and register for checkpoints."""
        inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer

        def anywhere(found: bool) -> bool:
            return bool(accelerator.reduce(torch.tensor(float(found), device=accelerator.device)) > 0)

        self.follow(accelerator.unwrap_model(model), inner, anywhere)
        accelerator.register_for_checkpointing(self)
