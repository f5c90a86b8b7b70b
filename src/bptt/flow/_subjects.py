"""What the measurements of a chain take: layers, models, scans, and what was recorded of them."""

from __future__ import annotations

from typing import Any

import torch

from ._chain import Chain, LayerChain
from ._recording import Loss, Recording, recorded
from ._recurrent import holds_recurrent, record_scan
from ._scanned import Scanned

__all__ = ["Subject", "chain_of", "scan_of"]

Subject = torch.nn.Module | Recording | Scanned | Chain
"""What a chain is made of: a layer or a model; or what `record`, `record_scan`, `scanned` or `steps` gave."""


def scan_of(subject: object, batch: Any = None, loss: Loss | None = None) -> Scanned | None:
    """The scan that is to be measured: one that is given, or that of a model with a `bptt.nn.Recurrent`; None for
    any other subject.

    Raises TypeError for a scan with a batch or loss beside it, and for a model without a batch.
    """
    if isinstance(subject, Scanned):
        if batch is not None or loss is not None:
            raise TypeError("batch and loss belong to a layer or a model: a scan that is given has its own")
        return subject
    if not isinstance(subject, torch.nn.Module) or not holds_recurrent(subject):
        return None
    if batch is None:
        raise TypeError("batch must be given with a layer or a model: what it is called with")
    return record_scan(subject, batch, loss)


def chain_of(subject: Subject, batch: Any = None, loss: Loss | None = None, layer: int = 0) -> Chain:
    """The chain that a measurement looks at: one that is given, that of a scan, in its own precision, or a layer and
    direction of a recording, in float64.

    Raises TypeError for anything else and for a chain with a batch, loss or layer beside it, ValueError for a layer
    that is not there.
    """
    scan = scan_of(subject, batch, loss)
    if scan is not None:
        if layer != 0:
            raise ValueError(f"layer must be 0: the carry of a scan is one state, of all its cells: got {layer}")
        return scan.chain
    if isinstance(subject, torch.nn.Module | Recording):
        return LayerChain(recorded(subject, batch, loss).to(torch.float64), layer)
    if not hasattr(subject, "pull"):
        raise TypeError(
            f"subject must be a layer, a model, a Recording, a scan or a chain: got {type(subject).__name__}"
        )
    if batch is not None or loss is not None or layer != 0:
        raise TypeError("batch, loss and layer belong to a layer or a model: a chain has its own")
    assert not isinstance(subject, Scanned)
    return subject
