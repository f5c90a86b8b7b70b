"""The LSTM's cell path, the product of forget gates, beside the full Jacobian of (h, c)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..cells import Cell
from ._chain import LayerChain, jacobian, lengths_of
from ._jacobians import checked_span
from ._recording import Loss, Recording, recorded
from .shown import Shown

__all__ = ["CellPath", "cell_path", "has_cell_path"]


@dataclass(frozen=True, eq=False, repr=False)
class CellPath(Shown):
    """The size of a perturbation of the state at step `start`, so many steps later, by the cell alone and by all paths.

    Every number is a mean over the lanes that last so long without a reset.

    layer: the name of the layer. start: k. n: `[K+1]` how many steps later. path: `[K+1]` the largest entry of prod
    f_j, that is, the norm of the diagonal matrix by which the path through the cell alone multiplies. path_mean:
    `[K+1]` the mean of its entries over units. full_c: `[K+1]` the spectral norm of dc_{k+n}/dc_k by all paths. full:
    `[K+1]` the spectral norm of d(h, c)_{k+n}/d(h, c)_k. A number that over- or underflows a float is inf or 0;
    `products` has logarithms. memory: `[H]` 1/(1 - mean f), the number of steps that each unit remembers, over all
    lanes and steps. cell: the cell, by its name in `bptt.cells.CELLS`; "" for an unknown one.
    """

    layer: str
    start: int
    n: npt.NDArray[np.int64]
    path: npt.NDArray[np.float64]
    path_mean: npt.NDArray[np.float64]
    full_c: npt.NDArray[np.float64]
    full: npt.NDArray[np.float64]
    memory: npt.NDArray[np.float64]
    lanes: npt.NDArray[np.int64] | None = None
    cell: str = ""


def cell_path(
    subject: torch.nn.Module | Recording,
    batch: Any = None,
    loss: Loss | None = None,
    *,
    layer: int = 0,
    start: int = 0,
    steps: int | None = None,
    lanes: int | None = None,
) -> CellPath:
    """Measure the product of forget gates, said to explain an LSTM's memory, beside what gradients do, in float64.

        path   f_{k+n} ... f_{k+1}, the part of dc_{k+n}/dc_k that goes through the cell alone
        full   J_{k+n} ... J_{k+1}, the Jacobians of the pair (h, c), with the paths through h

    The two agree where the gates do not depend on h. The path never exceeds 1; the full product may explode.

    subject, batch, loss: as in `record`, or a Recording alone; an LSTM. layer: which layer and direction, numbered as
    torch.nn orders their parameters. start: k. steps: the largest n; by default all steps that follow, at most
    100. lanes: how many lanes are measured, from the first on (`memory` is that of all lanes). The work is of the
    order of (P + H)^3 per step and lane.

    Raises TypeError for another cell than the LSTM; ValueError for a layer, start or steps that does not exist and for
    lanes below 1; otherwise what `record` raises.

    >>> import torch, bptt
    >>> layer = bptt.nn.LSTM(2, 3)
    >>> for p in layer.parameters():
    ...     _ = torch.nn.init.zeros_(p)
    >>> p = bptt.flow.cell_path(layer, torch.zeros(5, 1, 2))  # every gate is 1/2
    >>> p.path.round(9).tolist(), p.memory.tolist()
    ([1.0, 0.5, 0.25, 0.125, 0.0625], [2.0, 2.0, 2.0])

    Source: Hochreiter and Schmidhuber 1997; equations/README.md, (8.7) to (8.9).
    """
    chain = LayerChain(recorded(subject, batch, loss).to(torch.float64), layer)
    if not has_cell_path(chain.cell):
        raise TypeError(f"subject must hold an LSTM: got {chain.recording.layer.mode}, whose state has no cell")
    start, _, steps = checked_span(chain, start, steps)
    if lanes is not None and index(lanes) < 1:
        raise ValueError(f"lanes must be at least 1: got {lanes}")
    passes = _passes(chain, start, steps)[:, :lanes]
    units = _log_path(chain, start, steps)[:, :lanes]
    by_cell, by_all = _log_full(chain, start, steps, lanes)
    return CellPath(
        layer=chain.name,
        start=start,
        n=np.arange(steps + 1),
        path=_mean(units.amax(-1), passes),
        path_mean=_mean(units.logsumexp(-1) - math.log(units.shape[-1]), passes),
        full_c=_mean(by_cell, passes),
        full=_mean(by_all, passes),
        memory=_memory(chain),
        lanes=passes.sum(1).cpu().numpy(),
        cell=chain.cell.mode,
    )


def has_cell_path(cell: Cell) -> bool:
    """Whether the state has a c that a gate keeps."""
    return cell.states == 2 and cell.keeps is not None


def _passes(chain: LayerChain, start: int, steps: int) -> Tensor:
    """Whether every lane lasts to step `start` + n without a reset on the way, bool `[steps + 1, B]`."""
    span = range(start + 1, start + steps + 1)
    lengths = lengths_of(chain).to(chain.device)
    rows = [lengths > start, *(chain.open(t) & (lengths > t) for t in span)]
    return torch.stack(rows).long().cumprod(0).bool()


def _forget(chain: LayerChain) -> Tensor:
    """f_t `[T, B, H]`."""
    cell = chain.cell
    assert chain.tape.gates is not None
    assert cell.keeps is not None
    return chain.tape.gates.chunk(cell.taped_per_unit, -1)[cell.gate_names.index(cell.keeps)]


def _log_path(chain: LayerChain, start: int, steps: int) -> Tensor:
    """log prod f_j of every lane and unit `[steps + 1, B, H]`: (8.7)."""
    span = range(start + 1, start + steps + 1)
    factors = _forget(chain)[span.start : span.stop].log()
    closed = [~chain.open(t) for t in span]
    if closed:
        factors = factors.masked_fill(torch.stack(closed)[..., None], -torch.inf)
    return torch.cat([factors.new_zeros(1, *factors.shape[1:]), factors]).cumsum(0)


def _log_full(chain: LayerChain, start: int, steps: int, lanes: int | None) -> tuple[Tensor, Tensor]:
    """Logarithms of |dc_{k+n}/dc_k|, (8.9), and |d(h, c)_{k+n}/d(h, c)_k|, each `[steps + 1, B]`."""
    H = chain.sizes[1]
    product = torch.eye(chain.S, dtype=chain.dtype, device=chain.device).repeat(chain.B, 1, 1)[:lanes]
    scale = product.new_zeros(len(product))  # logarithm of what the product was divided by
    by_cell, by_all = [scale], [scale]
    for t in range(start + 1, start + steps + 1):
        product = jacobian(chain, t)[:lanes] @ product
        size = product.abs().amax((1, 2))
        product = product / size.where(size > 0, 1)[:, None, None]
        scale = scale + size.log()
        by_cell.append(_norm(product[:, -H:, -H:]).log() + scale)
        by_all.append(_norm(product).log() + scale)
    return torch.stack(by_cell), torch.stack(by_all)


def _norm(J: Tensor) -> Tensor:
    """Spectral norms `[B]` by the eigenvalues of J'J, as exact for the largest and faster; NaN where not finite."""
    finite = torch.isfinite(J).flatten(1).all(1)
    square = J.mT @ J
    values = torch.linalg.eigvalsh(square.where(finite[:, None, None], 0))[:, -1]
    return values.clamp(min=0).sqrt().where(finite, torch.nan)


def _mean(logs: Tensor, passes: Tensor) -> npt.NDArray[np.float64]:
    """The mean of exp(logs) over the lanes that pass, both `[K + 1, B]`; only what is too large itself overflows."""
    total = logs.masked_fill(~passes, -torch.inf).logsumexp(-1)
    count = passes.sum(-1, dtype=logs.dtype)
    return (total - count.log()).exp().where(count > 0, torch.nan).cpu().numpy()


def _memory(chain: LayerChain) -> npt.NDArray[np.float64]:
    f, lengths = _forget(chain), chain.recording.call.lengths
    rows = f.flatten(0, 1) if lengths is None else f[torch.arange(chain.T, device="cpu")[:, None] < lengths]
    return (1 / (1 - rows.mean(0))).cpu().numpy()
