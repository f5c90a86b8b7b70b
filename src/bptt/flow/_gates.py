"""How far gates and activations are saturated: where their slope is near zero, no gradient passes."""

from __future__ import annotations

from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..cells import ACTIVATIONS, Activation
from ._chain import LayerChain
from ._recording import Loss, Recording, recorded
from .shown import Shown

__all__ = ["Gates", "gates"]

HUGE = 1e150
"""Values from here on are in no histogram, as NaN: their range would have no width that a float can hold."""


@dataclass(frozen=True, eq=False, repr=False)
class Gates(Shown):
    """The values of every gate over all steps, lanes and units.

    layer: the name of the layer. names: of the G gates ("h" of a simple RNN; "r", "z", "n"; "i", "f", "g", "o"). low,
    high: `[G]` the fraction of values within `margin` of the lower and of the upper end of the activation. For relu low
    is the fraction of zeros, where its slope is 0, and high is 0; for identity both are 0. NaN counts as neither. mean:
    `[G]` the mean value. bin_edges `[G, bins+1]` and counts `[G, bins]`: a histogram over the range of the activation;
    for relu and identity over the range of the finite values. margin: a fraction of the range of the activation.
    bounded: whether the activation has ends (tanh and sigmoid have them, relu and identity do not). cell: the cell, by
    its name in `bptt.cells.CELLS`; "" for an unknown one.
    """

    layer: str
    names: tuple[str, ...]
    low: npt.NDArray[np.float64]
    high: npt.NDArray[np.float64]
    mean: npt.NDArray[np.float64]
    bin_edges: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]
    margin: float
    bounded: bool = True
    cell: str = ""


def gates(
    subject: torch.nn.Module | Recording,
    batch: Any = None,
    loss: Loss | None = None,
    *,
    layer: int = 0,
    margin: float = 0.05,
    bins: int = 40,
) -> Gates:
    """Measure how the values of every gate lie over their range, and the part of them that lies near its ends.

    sigmoid' = s (1 - s) and tanh' = 1 - s^2: within a margin of 0.05 of the range they are below a fifth of their
    largest value, 0.0475 of 0.25 and 0.19 of 1.

    subject, batch, loss: as in `record`, or a Recording alone. layer: which layer and direction, numbered as torch.nn
    orders their parameters. margin: a fraction of the range, above 0 and below 0.5. bins: of the histograms.

    Steps past the end of a shorter lane do not count. A GRU's n and an LSTM's g are candidates, with tanh for their
    activation; the only "gate" of a simple RNN is h itself.

    Raises ValueError for a layer that does not exist, a margin outside (0, 0.5) and bins below 1; otherwise what
    `record` raises.

    >>> import torch, bptt
    >>> g = bptt.flow.gates(bptt.nn.LSTM(2, 3), torch.zeros(5, 4, 2))
    >>> g.names, g.low.tolist(), g.counts.sum(1).tolist()
    (('i', 'f', 'g', 'o'), [0.0, 0.0, 0.0, 0.0], [60, 60, 60, 60])
    """
    if not 0 < margin < 0.5:
        raise ValueError(f"margin must be above 0 and below 0.5: got {margin}")
    if index(bins) < 1:
        raise ValueError(f"bins must be at least 1: got {bins}")
    chain = LayerChain(recorded(subject, batch, loss).to(torch.float64), layer)
    recording, cell = chain.recording, chain.cell
    values = chain.tape.state[0] if chain.tape.gates is None else chain.tape.gates
    lengths = recording.call.lengths
    if lengths is not None:
        values = values[torch.arange(chain.T, device="cpu")[:, None] < lengths]
    per_gate = values.reshape(-1, values.shape[-1]).cpu().numpy()
    H, kinds = recording.layer.hidden_size, [ACTIVATIONS[name] for name in cell.activations]
    rows = [_spread(per_gate[:, g * H : (g + 1) * H].ravel(), kind, margin, bins) for g, kind in enumerate(kinds)]
    low, high, mean, bin_edges, counts = (np.array(column) for column in zip(*rows, strict=True))
    bounded = all(kind.ends is not None for kind in kinds)
    return Gates(chain.name, cell.gate_names, low, high, mean, bin_edges, counts, margin, bounded, cell.mode)


def _spread(
    values: npt.NDArray[np.float64], activation: Activation, margin: float, bins: int
) -> tuple[float, float, float, npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """(low, high, mean, bin_edges, counts) of one gate."""
    finite = values[np.abs(values) < HUGE]  # and NaN left out
    total, ends = max(1, len(values)), activation.ends
    if ends is None:
        lowest, highest = (float(f(initial=0.0)) for f in (finite.min, finite.max))
        counts, bin_edges = np.histogram(finite, bins, (lowest, highest if highest > lowest else lowest + 1))
        low, high = 0.0 if activation.flat is None else np.count_nonzero(values == activation.flat) / total, 0.0
    else:
        counts, bin_edges = np.histogram(finite, bins, ends)
        near = margin * (ends[1] - ends[0])
        low = np.count_nonzero(finite <= ends[0] + near) / total
        high = np.count_nonzero(finite >= ends[1] - near) / total
    return low, high, float(values.mean()) if len(values) else float("nan"), bin_edges, counts
