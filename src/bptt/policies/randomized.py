"""The policy that cuts time edges at random and leaves the gradient unbiased.

It asks for torch only where it draws, so that a text form can be read without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .arguments import real
from .policy import Policy
from .reach import EVERYTHING, Reach

if TYPE_CHECKING:
    import torch

__all__ = ["PolynomialTail", "Randomized"]


@dataclass(frozen=True)
class PolynomialTail:
    """Probabilities of keeping an edge, so that uncut pieces have mean length `mean` and P(length > n) ~ n^(1-tail).

    At distance d (steps since the last cut, from 1) an edge is cut with probability
    c_d = (tail - 1) / ((tail - 2) * mean + d), as in Tallec and Ollivier 2017 (arXiv 1705.08209, section 5.2).
    The probability that n edges in a row are kept is then
    Gamma(A+n+2-tail) Gamma(A+1) / (Gamma(A+2-tail) Gamma(A+n+1)), A = (tail - 2) * mean, whose sum over n >= 0 is
    `mean` exactly.

    mean: mean length of a piece in steps, above 1. tail: above 2, so that the mean exists.

    >>> round(PolynomialTail(mean=20, tail=4).keep(1), 4)
    0.9268
    """

    mean: float
    tail: float = 4.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", real("mean", self.mean))
        object.__setattr__(self, "tail", real("tail", self.tail))
        if not 1 < self.mean < float("inf"):
            raise ValueError(f"mean must be a finite number of steps above 1: got {self.mean}")
        if not 2 < self.tail < float("inf"):
            raise ValueError(f"tail must be finite and above 2, else the mean length is infinite: got {self.tail}")

    def keep(self, distance: int) -> float:
        """The probability that the edge `distance` steps after the last cut is kept."""
        return 1 - (self.tail - 1) / ((self.tail - 2) * self.mean + distance)


@dataclass(frozen=True)
class Randomized(Policy):
    """Random truncation: edges are cut at random and the rest weighted, so that the expected gradient is the full one.

    An edge is kept with probability p and then weighted by xi = 1/p; otherwise xi = 0, so that E[xi] = 1. The factors
    are drawn per edge and lane at each forward call that will need a gradient. The layers of a one-directional stack
    share them; each layer and direction of a bidirectional one draws its own (a path may cross one time edge twice).

    p: 0 < p <= 1; or a sequence of these, p[d-1] for an edge d steps after the last cut (the last entry holds for all
       larger d); or a `PolynomialTail`.
    generator: a torch.Generator on the CPU; default is torch's own, so `torch.manual_seed` reproduces a run. It is
       part neither of the text form nor of equality; `torch.save` keeps it with its state.

    Unbiased at fixed parameters. The variance stays finite as T grows only while p exceeds the square of the
    contraction per step. Sources: Tallec and Ollivier 2017 (arXiv 1705.08209, "Unbiasing truncated backpropagation
    through time"); Dive into Deep Learning, section 9.7.1.3.

    >>> str(Randomized(0.9)), str(Randomized((0.5, 0.9))), str(Randomized.polynomial(mean=20))
    ('randomized:0.9', 'randomized:0.5,0.9', 'randomized:mean=20,tail=4')
    """

    p: float | tuple[float, ...] | PolynomialTail
    generator: torch.Generator | None = field(default=None, compare=False, repr=False, kw_only=True)
    _text: str = field(init=False, compare=False, repr=False)  # written once: a compiler cannot write a number

    def __post_init__(self) -> None:
        if self.generator is not None:
            import torch

            if not isinstance(self.generator, torch.Generator):
                raise TypeError(f"generator must be a torch.Generator or None: got {type(self.generator).__name__}")
            if self.generator.device.type != "cpu":
                raise ValueError(f"generator must be on the CPU, where xi is drawn: got {self.generator.device}")
        if not isinstance(self.p, PolynomialTail):
            object.__setattr__(self, "p", self._checked())
        object.__setattr__(self, "_text", self._written())

    def _checked(self) -> float | tuple[float, ...]:
        """The probabilities as floats."""
        many = isinstance(self.p, Sequence) and not isinstance(self.p, str)
        given: Sequence[float] = self.p if many else [self.p]  # type: ignore[assignment,list-item]  # checked by real
        values = tuple(real("p", p) for p in given)
        if not values:
            raise ValueError("p must be a probability or a non-empty sequence of them: got an empty sequence")
        for p in values:
            if not 0 < p <= 1:
                raise ValueError(f"p must lie in (0, 1], since kept edges are weighted by 1/p: got {p}")
        return values if len(values) > 1 else values[0]

    @classmethod
    def polynomial(cls, mean: float, tail: float = 4.0, *, generator: torch.Generator | None = None) -> Randomized:
        """Pieces of mean length `mean` steps whose lengths have a polynomial tail: see `PolynomialTail`."""
        return cls(PolynomialTail(mean, tail), generator=generator)

    def keep(self, distance: int) -> float:
        """The probability that an edge is kept when the last cut lies `distance` >= 1 steps back."""
        if isinstance(self.p, PolynomialTail):
            return self.p.keep(distance)
        if isinstance(self.p, tuple):
            return self.p[min(distance, len(self.p)) - 1]
        return self.p

    def reach(self, T: int) -> Reach:
        return EVERYTHING

    def reach_of_any(self) -> Reach:
        return EVERYTHING

    @property
    def draws_factors(self) -> bool:
        return self.p != 1

    def draw(self, T: int, B: int) -> torch.Tensor | None:
        if self.p == 1 or T < 2:
            return None
        import torch

        uniform = torch.rand(T - 1, B, dtype=torch.float64, generator=self.generator, device="cpu")
        return self.weights(uniform)

    def weights(self, uniform: torch.Tensor) -> torch.Tensor:
        """The factors xi `[T, B]` from numbers in [0, 1) `[T-1, B]`: edge t is kept where row t-1 is below p."""
        import torch

        edges, B = uniform.shape
        xi = [torch.ones(1, B, dtype=torch.float64, device=uniform.device)]
        if isinstance(self.p, (int, float)):
            return torch.cat([*xi, (uniform < self.p).double() / self.p])
        keep = torch.tensor([self.keep(d) for d in range(1, edges + 1)], dtype=torch.float64, device=uniform.device)
        distance = torch.zeros(B, dtype=torch.long, device=uniform.device)  # edges kept since the last cut
        for t in range(1, edges + 1):
            p = keep[distance]
            kept = uniform[t - 1] < p
            xi.append((kept / p)[None])
            distance = torch.where(kept, distance + 1, 0)
        return torch.cat(xi)

    def __str__(self) -> str:
        return self._text

    def _written(self) -> str:
        if isinstance(self.p, PolynomialTail):
            mean, tail = (repr(number).removesuffix(".0") for number in (self.p.mean, self.p.tail))
            return f"randomized:mean={mean},tail={tail}"
        return "randomized:" + ",".join(map(repr, self.p if isinstance(self.p, tuple) else (self.p,)))
