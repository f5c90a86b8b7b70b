"""transformers: the gradient policy in a model's configuration, and the doctor as a callback of its Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .. import policies
from ..memory import Checkpoints
from ..nn import convert
from .doctor import StepDoctor
from .missing import missing

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerCallback
else:
    try:
        from transformers import PreTrainedModel, TrainerCallback
    except ModuleNotFoundError as error:
        raise missing("transformers", ("transformers",), error) from None

__all__ = ["GradientDoctor", "PolicyFromConfig", "set_policy"]


class PolicyFromConfig:
    """Stands before PreTrainedModel: the model's layers are converted as its configuration says, each time it is built.

    `config.bptt_gradient`, `bptt_memory` and `bptt_kernel`, text or not there, are `bptt.convert`'s arguments. They are
    applied at the end of `post_init`, after the weights were initialised, which looks at the layers' classes. So
    `save_pretrained` writes the policy into `config.json`, and `from_pretrained` builds a model with it.

    Raises TypeError where the class stands after PreTrainedModel, and for a model without a recurrent layer.
    """

    config: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if PreTrainedModel in order and order.index(PreTrainedModel) < order.index(PolicyFromConfig):
            raise TypeError(f"PolicyFromConfig must stand before PreTrainedModel: got {cls.__name__} with it after")

    def post_init(self) -> None:
        """transformers' method: what is done when a model is complete, and the conversion."""
        super().post_init()  # type: ignore[misc]  # of the class that it is mixed with
        given = {name: getattr(self.config, f"bptt_{name}", None) for name in ("gradient", "memory", "kernel")}
        if any(value is not None for value in given.values()):
            convert(self, strict=True, **given)  # type: ignore[type-var]  # of the class that it is mixed with


def set_policy(
    model: PreTrainedModel,
    gradient: str | policies.Policy | None = None,
    *,
    memory: str | Checkpoints | None = None,
    kernel: str | None = None,
) -> None:
    """Convert a model's layers, and write the settings into its configuration as text, for a `PolicyFromConfig`.

    gradient, memory, kernel: as in `bptt.convert`. None leaves a setting, and its entry, as it is.

    Raises TypeError for a model without a recurrent layer, and as `bptt.convert` does; nothing is changed then.
    """
    convert(model, gradient, memory=memory, kernel=kernel, strict=True)
    for name, value in (("gradient", gradient), ("memory", memory), ("kernel", kernel)):
        if value is not None:
            setattr(model.config, f"bptt_{name}", str(value))


class GradientDoctor(StepDoctor, TrainerCallback):
    """A callback of transformers' Trainer that looks at each update just before it is made, by `bptt.flow.watch`.

    on_nonfinite: "raise" (the default) stops with `bptt.train.NonFiniteError`, before the weights change. "skip" takes
    the gradients away, so that the optimiser changes neither weights nor its own state; it counts in `skipped`, and the
    10th in a row raises. carries, tell: as in `bptt.flow.watch`.

    It looks at gradients and states, after clipping, and under gradient accumulation at the last batch of each update.
    In float16 gradients that overflow are the scaler's to handle, and only states are looked at. It is for one process:
    of several, each decides for itself.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """transformers' hook: watch."""
        self.begin(model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """transformers' hook: without gradients an optimiser changes nothing."""
        scaled = getattr(optimizer, "scaler", None) is not None
        if self.refuses(None, state.global_step + 1, gradients=not scaled):
            inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
            inner.zero_grad(set_to_none=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """transformers' hook: watch no longer."""
        self.end()
