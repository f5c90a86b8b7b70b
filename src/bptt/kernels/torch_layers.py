"""Calls of torch's own fused layers, of one layer and direction: their weights, and what autograd records of them.

Legend: as in `pieces`; I input features, H hidden units, P size of h.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cells import Cell, Weights
from .pieces import Batch

__all__ = ["AUTOGRAD", "BY_LIBRARY", "CALLS", "OwnWeights", "Walk", "can_record", "keeps_graph"]

CALLS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "RNN_TANH": torch._VF.rnn_tanh,
    "RNN_RELU": torch._VF.rnn_relu,
    "GRU": torch._VF.gru,
    "LSTM": torch._VF.lstm,
}
"""torch's own layer of each cell that has one, by the mode of the cell."""


BY_LIBRARY = ("LSTM",)
"""The modes that torch leaves to a library on a CPU, oneDNN; it runs the others one operation at a time."""

AUTOGRAD = ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView")
"""Where torch's dispatcher records what is called."""


@dataclass(frozen=True, eq=False)
class OwnWeights:
    """The weights of a layer and direction, as torch's own layers take them."""

    cell: Cell
    w: Weights
    tensors: list[Tensor]  # those that there are, in torch.nn's order

    @classmethod
    def of(cls, cell: Cell, w: Weights, record: bool) -> OwnWeights:
        """record: whether they are leaves that need a gradient."""
        own = [t.detach() for _, t in w.named]
        if on_cudnn(w.ih) and not _is_flat(own):
            own = _flattened(cell, w, own)
        return cls(cell, w, [t.requires_grad_() for t in own] if record else own)

    def call(self, x: Tensor, sizes: Tensor | None, hx: tuple[Tensor, ...], train: bool) -> tuple[Tensor, ...]:
        """y, and the final states `[1, M, .]`, of rows. hx: `[1, M, .]`. sizes: as `Batch` has them."""
        given: Any = hx if len(hx) > 1 else hx[0]
        rest = (given, self.tensors, self.w.b_ih is not None, 1, 0.0, train, False)
        function = CALLS[self.cell.mode]
        if self.w.hr is not None and x.is_cpu:
            with warnings.catch_warnings():  # torch warns that oneDNN has no projection, and runs its own layer
                warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
                return function(x, *rest, False) if sizes is None else function(x, sizes, *rest)
        return function(x, *rest, False) if sizes is None else function(x, sizes, *rest)


def can_record() -> bool:
    """Whether autograd records here, and hands what it keeps to nobody who would keep it elsewhere."""
    if torch.is_inference_mode_enabled() or torch._C._are_functorch_transforms_active():
        return False
    if torch._C._dispatch_tls_is_dispatch_key_excluded(AUTOGRAD[0]):  # inside an operator, which returns values
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is None


keeps_graph: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
"""Whether the backward call that runs leaves the graph for another one; where torch does not tell, it may."""


def on_cudnn(tensor: Tensor) -> bool:
    """Whether torch would leave a layer with such tensors to cuDNN."""
    return tensor.is_cuda and torch.cudnn_is_acceptable(tensor)


def _is_flat(weights: list[Tensor]) -> bool:
    """Whether cuDNN finds the weights one after the other in a storage of their own, as nn.RNNBase lays them."""
    storage = weights[0].untyped_storage()
    alone = storage.nbytes() == sum(t.numel() * t.element_size() for t in weights)
    return alone and all(t.untyped_storage().data_ptr() == storage.data_ptr() for t in weights)


def _flattened(cell: Cell, w: Weights, weights: list[Tensor]) -> list[Tensor]:
    """The weights, copied into one storage as cuDNN wants them; else it would copy them at each call and warn of it."""
    # Not what `detach` made, whose storage may not be changed.
    own = [t.new_empty(0).set_(t.untyped_storage(), t.storage_offset(), t.shape, t.stride()) for t in weights]
    if not torch._use_cudnn_rnn_flatten_weight():
        return own
    with torch.cuda.device_of(w.ih):
        from torch.backends.cudnn import rnn  # where there is cuDNN

        H, P = w.hh.shape[0] // cell.gates_per_unit, 0 if w.hr is None else w.hr.shape[0]
        mode = rnn.get_cudnn_mode(cell.mode)
        torch._cudnn_rnn_flatten_weight(own, len(own), w.ih.shape[1], mode, H, P, 1, False, False)
    return own


@dataclass(frozen=True, eq=False)
class Walk:
    """A call of torch's own layer on a batch, as autograd recorded it where it is to be differentiated."""

    batch: Batch
    roots: tuple[Tensor, ...]  # y as rows of the batch, then the final states [1, M, .]
    leaves: tuple[Tensor, ...]  # x as rows of the batch, the initial states [1, M, .], then the weights

    @classmethod
    def of(cls, batch: Batch, weights: OwnWeights, x: Tensor, initial: tuple[Tensor, ...], record: bool) -> Walk:
        """x: as rows of the batch. initial: `[M, .]`."""
        own = (x.detach().contiguous(), *(s.detach()[None].contiguous() for s in initial))
        with torch.set_grad_enabled(record):
            rows, *hx = (t.detach().requires_grad_() for t in own) if record else own
            roots = weights.call(rows, batch.sizes, tuple(hx), train=record)
        return cls(batch, roots, (rows, *hx, *weights.tensors))

    def pull(self, cotangents: Sequence[Tensor | None], wanted: Sequence[bool], again: bool) -> list[Tensor | None]:
        """The gradients of the leaves, None for those that are not wanted. again: whether this may be called again, for
        which cuDNN's layers copy what they keep.
        """
        reached = [(root, c) for root, c in zip(self.roots, cotangents, strict=True) if c is not None]
        asked = [leaf for leaf, want in zip(self.leaves, wanted, strict=True) if want]
        if not reached or not asked:
            return [None] * len(self.leaves)
        roots, given = zip(*reached, strict=True)
        found = iter(torch.autograd.grad(roots, asked, given, retain_graph=again, allow_unused=True))
        return [next(found) if want else None for want in wanted]
