"""Step Jacobians J_t = ds_t/ds_{t-1} and their products: how large the factors of the chain are."""

from __future__ import annotations

from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..equations.bounds import beta_w
from ._chain import Chain, LayerChain, jacobian, lengths_of
from ._graded import Product, log_singular_values
from ._recording import Loss
from ._subjects import Subject, chain_of
from .shown import Shown

__all__ = ["FACTORS", "Jacobians", "Products", "checked_span", "jacobians", "products", "singular_values", "stretch"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

FACTORS = 100
"""Factors of a product where no number is asked for."""

_VALUES = 2**22  # of the products decomposed at once


@dataclass(frozen=True, eq=False, repr=False)
class Jacobians(Shown):
    """The largest and the smallest singular value of every step Jacobian J_t.

    layer: whose states these are ("layer 0", "carry"). t: `[T]` the steps. norm, smallest: `[T, B]` the largest and the
    smallest singular value of J_t (per step, without a unit); 0 where a reset closes the step, NaN where the lane has
    ended or J_t is not finite. bound: beta_W * beta_h, which no norm exceeds; None for cells without that bound.
    passes: `[T, B]` whether the state of the lane passes the step, that is, whether there are data and no reset. By
    default it passes everywhere.
    """

    layer: str
    t: Ints
    norm: Floats
    smallest: Floats
    bound: float | None
    passes: Bools | None = None

    @property
    def there(self) -> Bools:
        """`passes`, or what it is by default."""
        return np.ones(self.norm.shape, dtype=bool) if self.passes is None else self.passes


@dataclass(frozen=True, eq=False, repr=False)
class Products(Shown):
    """The singular values of the products J_{k+n} ... J_{k+1} of one lane, for n = 0..K factors.

    layer: whose states these are. start: k. lane: which one. n: `[K+1]` the number of factors. singular: `[K+1, S]`
    descending, all 1 at n = 0, NaN from the first factor on that is not finite. bound: `[K+1]` (beta_W * beta_h)^n, or
    None. beta_w = |W_hh| (the spectral norm) and beta_h = max |phi'| are its parts; None where there is no such bound.
    log_singular: `[K+1, S]` natural logarithms, which do not under- or overflow as the others may (to 0 and inf); -inf
    where a singular value is exactly 0. reset: the first n whose factor a reset makes 0, None where there is none.
    """

    layer: str
    start: int
    lane: int
    n: Ints
    singular: Floats
    log_singular: Floats
    bound: Floats | None
    beta_w: float | None
    beta_h: float | None
    reset: int | None = None

    @property
    def least(self) -> float:
        """The natural logarithm of the smallest singular value worth a picture: beside the largest one of the same
        product, float64 would round away what is smaller.
        """
        largest = self.log_singular[:, 0]
        return float(np.min(largest, where=np.isfinite(largest), initial=0.0) + np.log(np.finfo(np.float64).eps))


def jacobians(
    subject: Subject,
    batch: Any = None,
    loss: Loss | None = None,
    *,
    layer: int = 0,
    every: int = 1,
    lanes: int | None = None,
) -> Jacobians:
    """Compute the largest and the smallest singular value of every step Jacobian J_t = ds_t/ds_{t-1}, in float64.

    subject, batch, loss: as in `record`; or a Recording or a chain (`steps`) alone. layer: which layer and direction,
    numbered as torch.nn orders their parameters. every: measure only every so many-th step, from the first one on.
    lanes: how many lanes are measured, from the first on. The work is of the order of S^3 per step and lane.

    s_t is h_t, for an LSTM the pair (h_t, c_t), for `steps` the carry; t counts in the direction's own time. For a
    simple RNN no norm exceeds |W_hh| max |phi'|: 1/4 for the sigmoid, else 1.

    Raises ValueError for a layer that does not exist and for every or lanes below 1; otherwise what `record` raises.

    >>> import torch, bptt
    >>> layer = bptt.nn.RNN(2, 3, nonlinearity="identity")
    >>> _ = torch.nn.init.eye_(layer.weight_hh_l0.data).mul_(0.5)
    >>> j = bptt.flow.jacobians(layer, torch.zeros(4, 1, 2))
    >>> j.norm[:, 0].tolist(), j.bound
    ([0.5, 0.5, 0.5, 0.5], 0.5)

    Source: Pascanu, Mikolov, Bengio 2013 (arXiv 1211.5063), section 2.1; equations/README.md, (8.1) to (8.4).
    """
    chain = chain_of(subject, batch, loss, layer)
    for name, value in (("every", every), ("lanes", lanes)):
        if value is not None and index(value) < 1:
            raise ValueError(f"{name} must be at least 1: got {value}")
    t = chain.transitions[::every]
    singular = torch.stack([singular_values(jacobian(chain, i)[:lanes].double()) for i in t]).cpu().numpy()
    bound = stretch(chain)
    ended = (torch.tensor(list(t), device="cpu")[:, None] >= lengths_of(chain)).numpy()[:, :lanes]
    passes = torch.stack([chain.open(i)[:lanes] for i in t]).cpu().numpy() & ~ended
    singular = np.where(ended[..., None], np.nan, singular)
    limit = None if bound is None else bound[0] * bound[1]
    return Jacobians(chain.name, np.array(t), singular[..., 0], singular[..., -1], limit, passes)


def products(
    subject: Subject,
    batch: Any = None,
    loss: Loss | None = None,
    *,
    layer: int = 0,
    start: int = 0,
    steps: int | None = None,
    lane: int = 0,
) -> Products:
    """Compute all singular values of ds_{k+n}/ds_k = J_{k+n} ... J_{k+1} in one lane, for n = 0, 1, ..., in float64.

    subject, batch, loss, layer: as in `jacobians`. start: k. steps: the largest n; by default all steps that follow in
    the lane, at most 100. lane: which one.

    Small ones are as exact as large ones, in logarithms: the product is orthogonalised at each factor and never
    multiplied out (as in `_graded`), so that 1000 factors neither drown the small ones in rounding nor overflow.

    Raises ValueError for a layer, start, steps or lane that does not exist; otherwise what `record` raises.

    >>> import torch, bptt
    >>> layer = bptt.nn.RNN(2, 2, nonlinearity="identity")
    >>> layer.weight_hh_l0.data = torch.tensor([[0.5, 0.0], [0.0, 0.25]])
    >>> p = bptt.flow.products(layer, torch.zeros(1001, 1, 2), steps=1000)
    >>> p.singular[3].round(9).tolist(), float(p.bound[3])
    ([0.125, 0.015625], 0.125)
    >>> (p.log_singular[1000] / 0.6931471805599453).round(9).tolist()  # 2^-2000 is below the smallest float
    [-1000.0, -2000.0]

    Source: equations/README.md, (8.2) to (8.4).
    """
    chain = chain_of(subject, batch, loss, layer)
    start, lane, steps = checked_span(chain, start, steps, lane)
    reset = next((n for n in range(1, steps + 1) if not bool(chain.open(start + n)[lane])), None)
    shown = [Product.empty(torch.empty(chain.S, chain.S, dtype=torch.float64, device=chain.device))]
    for t in range(start + 1, start + steps + 1):
        J = jacobian(chain, t)[lane].double()
        if not torch.isfinite(J).all():
            break
        shown.append(shown[-1].after(J))
    logs = np.full((steps + 1, chain.S), np.nan)
    at_once = max(1, _VALUES // chain.S**2)
    for i in range(0, len(shown), at_once):
        found = log_singular_values(shown[i : i + at_once]).cpu().numpy()
        logs[i : i + len(found)] = found
    n: Ints = np.arange(steps + 1)
    limit = stretch(chain)
    with np.errstate(over="ignore", under="ignore"):
        singular = np.exp(logs)
        bound = None if limit is None else np.power(limit[0] * limit[1], n.astype(np.float64))
    beta = limit or (None, None)
    return Products(chain.name, start, lane, n, singular, logs, bound, beta[0], beta[1], reset)


def stretch(chain: Chain) -> tuple[float, float] | None:
    """(beta_W, beta_h) of a simple RNN: J_t stretches no vector more than by their product; None for other chains."""
    if not isinstance(chain, LayerChain) or chain.cell.slope is None:
        return None
    return beta_w(chain.w.hh.double().cpu().numpy()), chain.cell.slope


def checked_span(chain: Chain, start: int, steps: int | None, lane: int | None = None) -> tuple[int, int, int]:
    """(start, lane, steps) as given, or all steps that follow in the lane (in the longest one where none is given), at
    most `FACTORS`. Raises ValueError where none are.
    """
    lengths = lengths_of(chain)
    if lane is not None and not 0 <= index(lane) < chain.B:
        raise ValueError(f"lane must be one of 0..{chain.B - 1}: got {lane}")
    lane = int(lengths.argmax()) if lane is None else index(lane)
    start, last = index(start), int(lengths[lane]) - 1
    if not 0 <= start <= last:
        raise ValueError(f"start must be a state that steps follow, 0..{last}: got {start}")
    steps = min(FACTORS, last - start) if steps is None else index(steps)
    if not 0 <= steps <= last - start:
        raise ValueError(f"steps must be 0..{last - start}, what follows state {start}: got {steps}")
    return start, lane, steps


def singular_values(J: Tensor) -> Tensor:
    """Singular values `[B, S]`, NaN for a matrix that is not finite."""
    finite = torch.isfinite(J).flatten(1).all(1)
    return torch.linalg.svdvals(J.where(finite[:, None, None], 0)).where(finite[:, None], torch.nan)
