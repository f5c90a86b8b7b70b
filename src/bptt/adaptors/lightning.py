"""Lightning: `truncated_bptt_steps` as in version 1, and callbacks for the gradient policy and the doctor.

Works with the package `lightning` and with `pytorch_lightning`, version 2; where both are installed, with the one that
is already imported.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .doctor import StepDoctor
from .missing import missing
from .pieces import Piece, detached, split, started
from .policy import PolicyState

if TYPE_CHECKING:
    import lightning.pytorch as pl
else:
    try:
        if sys.modules.get("pytorch_lightning") and "lightning.pytorch" not in sys.modules:
            import pytorch_lightning as pl
        else:
            import lightning.pytorch as pl
    except ModuleNotFoundError as first:
        try:
            import pytorch_lightning as pl
        except ModuleNotFoundError:
            raise missing("lightning", ("lightning",), first) from None

__all__ = ["GradientDoctor", "GradientPolicy", "TruncatedBPTT"]

_NOT_GIVEN: Any = object()


class TruncatedBPTT:
    """`truncated_bptt_steps` as in Lightning 1: a batch in pieces along time, a detached state carried between them.

    Stands before LightningModule: `class Model(TruncatedBPTT, LightningModule)`. The module's
    `training_step(self, batch, batch_idx, hiddens)` gets one piece at a time, with the state after the piece before
    (None at a batch's first), and returns `{"loss": ..., "hiddens": ...}`. The state may be a tensor, or tuples, lists
    and mappings of them. Everything of automatic optimisation is done for each piece: backward, clipping, precision,
    hooks and callbacks. Attributes, of the class or set in `__init__`:

    truncated_bptt_steps: k, the steps of a piece. 0: the batch is not split, hiddens is None.
    truncated_bptt_update: "piece", one update after each piece, as in Lightning 1; or "batch", one after all of them,
        whose gradient is the one of `bptt.Chunked(k)`, while only one piece at a time is in memory.
    truncated_bptt_weights: "steps" multiplies the loss, a mean over the steps of a piece, by their number over that of
        the batch's first piece ("batch": of all pieces), so that every step counts alike; Lightning 1 let a short last
        piece count as much as a whole one. "given" takes each loss as it is, for losses that are sums.
    truncated_bptt_time: the dimension of time in the batch's tensors, 1 (the default) or 0.
    truncated_bptt_lengths: where a batch holds its lengths, as in `tbptt_split_batch`; None: it has none, or is packed.
    truncated_bptt_lanes: the dimension of the lanes in the state's tensors, by default 1, as torch.nn's layers have
        them; used where lanes end before others.

    `trainer.global_step` counts the updates. Learning-rate schedulers move once a batch. What callbacks get as a
    batch's outputs is of its last piece, without hiddens. With `accumulate_grad_batches` above 1 the update must be
    "batch"; batches that only accumulate then run their pieces in one graph. Under manual optimisation `training_step`
    is called for piece after piece, and does the rest itself, from the loss as returned: only automatic optimisation
    weighs it. Processes side by side must have equally many pieces.

    Raises TypeError where LightningModule stands first, or `training_step` lacks hiddens or does not return them, and
    ValueError for settings that are none of these.
    """

    truncated_bptt_steps: int = 0
    truncated_bptt_update: str = "piece"
    truncated_bptt_weights: str = "steps"
    truncated_bptt_time: int = 1
    truncated_bptt_lengths: Hashable = None
    truncated_bptt_lanes: int = 1

    _pieces: _Pieces | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if pl.LightningModule in order and order.index(pl.LightningModule) < order.index(TruncatedBPTT):
            raise TypeError(f"TruncatedBPTT must stand before LightningModule: got {cls.__name__} with it after")
        step = cls.__dict__.get("training_step")
        if step is not None:
            cls.training_step = _by_pieces(step)  # type: ignore[attr-defined]  # of a module of Lightning

    def tbptt_split_batch(self, batch: Any, split_size: int) -> list[Piece]:
        """The pieces of a batch, `bptt.adaptors.pieces.split`. May be overridden for batches that this cannot cut."""
        return split(batch, split_size, time=self.truncated_bptt_time, lengths=self.truncated_bptt_lengths)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Lightning's hook: an update for each piece, or one for all of them."""
        update: Callable[..., None] = super().optimizer_step  # type: ignore[misc]  # of the class that it is mixed with
        if not self.truncated_bptt_steps or optimizer_closure is None:
            return update(epoch, batch_idx, optimizer, optimizer_closure)
        closure = optimizer_closure
        _check(self)
        pieces = self._pieces = _Pieces(self)
        try:
            if self.truncated_bptt_update == "batch":

                def all_pieces() -> Any:
                    pieces.restart()
                    loss = closure()
                    while pieces.advance():
                        closure()
                    return loss

                return update(epoch, batch_idx, optimizer, all_pieces)
            update(epoch, batch_idx, optimizer, closure)
            progress = self.trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress  # type: ignore[attr-defined]  # of a module of Lightning
            while pieces.advance():
                progress.optimizer.step.increment_completed()  # the piece before; the trainer counts one a batch
                progress.optimizer.step.increment_ready()
                update(epoch, batch_idx, optimizer, closure)
        finally:
            self._pieces = None
        return None

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Lightning's hook: gradients of earlier pieces stay where all pieces share an update."""
        pieces = self._pieces
        if pieces is None or self.truncated_bptt_update == "piece" or pieces.index == 0:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)  # type: ignore[misc]  # of the class that it is mixed with


class _Pieces:
    """The pieces of the batch that is being trained on, and the state before the one at hand."""

    def __init__(self, module: TruncatedBPTT) -> None:
        self.module = module
        self.all: list[Piece] | None = None
        self.restart()

    def restart(self) -> None:
        self.index = 0
        self.before: Any = None
        self.after: Any = None

    def advance(self) -> bool:
        """Go to the next piece, if there is one."""
        if self.all is None or self.index + 1 >= len(self.all):
            return False
        self.index += 1
        self.before = started(self.after, self.all[self.index], self.module.truncated_bptt_lanes)
        return True

    def run(self, step: Callable[..., Any], batch: Any, batch_idx: int) -> Any:
        """The output of `training_step` for the piece at hand, its loss weighted."""
        if self.all is None:
            made = self.module.tbptt_split_batch(batch, self.module.truncated_bptt_steps)
            self.all = [piece if isinstance(piece, Piece) else Piece(piece, None, 1) for piece in made]
            if not self.all:
                raise ValueError("tbptt_split_batch must return at least one piece: got none")
        piece = self.all[self.index]
        output = step(self.module, piece.batch, batch_idx, self.before)
        if output is None:  # Lightning's way to leave a backward pass out
            self.after = self.before
            return None
        if not isinstance(output, Mapping) or "loss" not in output or "hiddens" not in output:
            got = sorted(output) if isinstance(output, Mapping) else type(output).__name__
            raise TypeError(f"training_step must return a dict with 'loss' and 'hiddens': got {got}")
        self.after = detached(output["hiddens"])
        rest = {name: value for name, value in output.items() if name != "hiddens"}
        if self.module.truncated_bptt_weights == "given" or rest["loss"] is None:
            return rest
        batch_wide = self.module.truncated_bptt_update == "batch"
        whole = sum(piece.steps for piece in self.all) if batch_wide else self.all[0].steps
        return {**rest, "loss": rest["loss"] * (piece.steps / whole)}


def _by_pieces(step: Callable[..., Any]) -> Callable[..., Any]:
    """A `training_step` that is called by Lightning without hiddens, and calls the module's own with them."""

    @functools.wraps(step)
    def training_step(self: Any, batch: Any, batch_idx: int = 0, hiddens: Any = _NOT_GIVEN) -> Any:
        if "hiddens" not in inspect.signature(step).parameters:
            if self.truncated_bptt_steps:
                raise TypeError("training_step must take (self, batch, batch_idx, hiddens): got one without hiddens")
            return step(self, batch, batch_idx)
        if hiddens is not _NOT_GIVEN:  # by a subclass, with super()
            return step(self, batch, batch_idx, hiddens)
        if not self.truncated_bptt_steps:
            output = step(self, batch, batch_idx, None)
            mapping = isinstance(output, Mapping)
            return {name: value for name, value in output.items() if name != "hiddens"} if mapping else output
        if self._pieces is not None:
            return self._pieces.run(step, batch, batch_idx)
        _check(self)
        pieces = _Pieces(self)
        total, last = None, pieces.run(step, batch, batch_idx)
        while True:
            if last is not None and isinstance(last["loss"], Tensor):
                total = last["loss"] if total is None else total + last["loss"]
            if not pieces.advance():
                break
            last = pieces.run(step, batch, batch_idx)
        if not self.automatic_optimization or last is None:
            return last
        return {**last, "loss": total}

    return training_step


def _check(module: TruncatedBPTT) -> None:
    """The settings, which may be set at any time."""
    for name, allowed in (("update", ("piece", "batch")), ("weights", ("steps", "given"))):
        value = getattr(module, f"truncated_bptt_{name}")
        if value not in allowed:
            raise ValueError(f"truncated_bptt_{name} must be {' or '.join(map(repr, allowed))}: got {value!r}")
    trainer = getattr(module, "_trainer", None)
    automatic: bool = module.automatic_optimization  # type: ignore[attr-defined]  # of a module of Lightning
    batches = 1 if trainer is None or not automatic else trainer.accumulate_grad_batches
    if batches > 1 and module.truncated_bptt_update == "piece":
        raise ValueError(
            f"accumulate_grad_batches must be 1 with an update after each piece: got {batches}; "
            "truncated_bptt_update = 'batch' accumulates"
        )


class GradientPolicy(PolicyState, pl.Callback):
    """A callback that converts the module's layers when the trainer sets up, and keeps their policies in checkpoints.

    gradient, memory, kernel: as in `bptt.convert`: `GradientPolicy("chunked:35")`. restore: False keeps what is given
    where a checkpoint is resumed; by default the checkpoint's policies are set, with a warning where they differ.

    A checkpoint's `["callbacks"]["GradientPolicy"]` is `{"gradient": text, "layers": {name: text}}`. Before
    `setup` the module's layers are torch's: make `torch.compile` of a *layer* wait until then.

    Raises TypeError for a module without a recurrent layer, and as `bptt.convert` does.
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Lightning's hook: convert, once for each module."""
        self.attach_to(pl_module)

    def __repr__(self) -> str:
        return f"GradientPolicy({None if self.gradient is None else str(self.gradient)!r})"


class GradientDoctor(StepDoctor, pl.Callback):
    """A callback that looks at each training step before its update, by `bptt.flow.watch`.

    on_nonfinite: "raise" (the default) stops with `bptt.train.NonFiniteError`, whose words are the diagnosis, before
    the weights change. "skip" takes the gradients away, so that the optimiser changes neither weights nor its own
    state, and later hooks see none; it counts in `skipped`, and the 10th in a row raises. carries, tell: as in
    `bptt.flow.watch`. The counts are kept in checkpoints.

    With a gradient scaler (precision "16-mixed") gradients that overflow are the scaler's to handle, and only loss and
    states are looked at. Of several processes, one that finds something stops or skips the step of all. It sees nothing
    under torch.compile.
    """

    _loss: Tensor | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Lightning's hook: watch."""
        self.begin(pl_module)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Lightning's hook: keep the loss."""
        self._loss = loss.detach()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Lightning's hook: without gradients an optimiser changes nothing."""
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None

        def anywhere(found: bool) -> bool:
            return bool(trainer.strategy.reduce_boolean_decision(found, all=False))

        loss, self._loss = self._loss, None
        if self.refuses(loss, trainer.global_step + 1, gradients=not scaled, anywhere=anywhere):
            optimizer.zero_grad(set_to_none=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Lightning's hook: watch no longer."""
        self.end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Lightning's hook: watch no longer."""
        self.end()
