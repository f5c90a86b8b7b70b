"""Products of many matrices, with every singular value right, however far apart they are.

In plain floating point the smallest singular values of a product drown in the rounding of the largest after a few
factors, and after some hundred factors everything over- or underflows. So the product is held as U diag(e^l) X, with U
orthogonal, every row of X of length about 1, and l the logarithms of what would over- or underflow.

Legend: S rows and columns, K + 1 products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Product", "log_singular_values"]

_PASSES = 3
_MARGIN = 6.0  # nats


@dataclass(frozen=True, eq=False)
class Product:
    """U diag(e^l) X: U orthogonal `[S, S]`, l `[S]` (-inf for a row of zeros), X `[S, S]`."""

    U: Tensor
    l: Tensor
    X: Tensor

    @classmethod
    def empty(cls, like: Tensor) -> Product:
        """The product of no factors, for factors like this one `[S, S]`."""
        eye = torch.eye(len(like), dtype=like.dtype, device=like.device)
        return cls(eye, like.new_zeros(len(like)), eye)

    def after(self, J: Tensor) -> Product:
        """J times this product: (J U) diag(e^l) is orthogonalised with its largest columns first."""
        moved = J @ self.U
        order = torch.argsort(moved.norm(dim=0).log() + self.l, descending=True)
        U, R = torch.linalg.qr(moved[:, order])
        T, l = _rows(R, self.l[order])
        return Product(U, l, T @ self.X[order])


def log_singular_values(products: list[Product]) -> Tensor:
    """Natural logarithms of the singular values of each product `[K + 1, S]`, descending; -inf for 0.

    Rounds of transposing and QR decouple singular values from those that are far away: after p rounds what is left
    between two of ratio q < 1 is about q^(2p - 1). Then each window of neighbours is a small singular value problem,
    solved relative to its own largest, of which the middle is kept.

    Source: the rounds are the QR iteration without shifts; decomposition with scales apart as in Loh et al. 1992,
    "Stable numerical simulations of models of interacting electrons".
    """
    X, l = torch.stack([p.X for p in products]), torch.stack([p.l for p in products])
    for _ in range(_PASSES):  # X' diag(e^l) has the singular values of diag(e^l) X
        order = torch.argsort(l, dim=-1, descending=True)
        l = l.gather(-1, order)
        columns = X.gather(-2, order[..., None].expand_as(X)).mT
        R = torch.linalg.qr(columns, mode="r")[1]
        X, l = _rows(R, l)
    return torch.stack([_by_windows(x, scale) for x, scale in zip(X, l, strict=True)])


def _rows(R: Tensor, l: Tensor) -> tuple[Tensor, Tensor]:
    """R diag(e^l) as diag(e^m) X, the rows of X of length 1: (X, m). Nothing overflows on the way."""
    logs = R.abs().log() + l[..., None, :]
    top = logs.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    X = torch.sign(R) * torch.exp(logs - top)
    length = X.norm(dim=-1, keepdim=True)
    X = X / length.where(length > 0, 1)
    return X, (top + length.log())[..., 0]


def _by_windows(X: Tensor, l: Tensor) -> Tensor:
    """The logarithms of the singular values of diag(e^l) X `[S, S]`, whose far parts are decoupled."""
    order = torch.argsort(l, descending=True)
    l, X = l[order], X[order]
    found = torch.full_like(l, -torch.inf)
    rank = int(torch.isfinite(l).sum())
    start = 0
    while start < rank:
        end = int((l > l[start] - _MARGIN).sum())
        first = int((l > l[start] + _MARGIN).sum())
        last = int((l > l[start] - 2 * _MARGIN).sum())
        window = torch.exp(l[first:last, None] - l[first]) * X[first:last]
        found[start:end] = torch.linalg.svdvals(window)[start - first : end - first].log() + l[first]
        start = end
    return found
