"""How far gradients reach: gradient policies as pure data.

A policy says, for a sequence of T steps, which losses form a *block* (`every`), how many steps each block
walks back (`window`), and by which random factor xi the adjoint is multiplied at each time edge. The engine
interprets the answer; nothing here touches a kernel.

Legend: T time steps, B lanes. Steps are counted from 0; edge t joins step t-1 to step t.
"""

from __future__ import annotations

import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real

import torch

__all__ = ["Adaptive", "Chunked", "Full", "Policy", "PolynomialTail", "Randomized", "Reach", "Truncated", "parse"]


@dataclass(frozen=True)
class Reach:
    """What a policy asks for on a sequence of a given length: the data the block sweep interprets.

    window: steps each block walks back from its last step, that step included; `None` is all of them.
    every: losses per block, blocks counted from the first step; `None` is one block of all losses.
    fenced: the walk stops at the block's own first step, so that blocks never overlap (then window == every).
    """

    window: int | None
    every: int | None
    fenced: bool

    def first(self, block_first: int, block_last: int) -> int:
        """The earliest step the walk of a block [block_first, block_last] visits (0-based, inclusive)."""
        if self.fenced:
            return block_first
        return 0 if self.window is None else max(0, block_last - self.window + 1)

    def within(self, T: int) -> Reach:
        """The same on sequences of at most T steps: a window that has all of them is everything.

        >>> Reach(20, 5, fenced=False).within(20) == EVERYTHING
        True
        """
        return self if self.window is None or self.window < T else EVERYTHING

    def blocks(self, T: int) -> list[tuple[int, int, int]]:
        """Blocks of a sequence of T steps as (earliest step walked to, first loss, last loss), in order.

        >>> Truncated(3, every=2).reach(5).blocks(5)
        [(0, 0, 1), (1, 2, 3), (2, 4, 4)]
        >>> Chunked(2).reach(5).blocks(5)
        [(0, 0, 1), (2, 2, 3), (4, 4, 4)]
        """
        every = T if self.every is None else self.every
        spans = [(a, min(a + every, T) - 1) for a in range(0, T, max(every, 1))]
        return [(self.first(a, b), a, b) for a, b in spans]


EVERYTHING = Reach(None, None, fenced=False)
"""One block of all losses, which walks back to the first step."""


class Policy(ABC):
    """A gradient policy. Immutable; equal policies compare equal; `str(policy)` is its text form, for configurations.

    `torch.load` reads policies with `weights_only=True`.
    """

    @abstractmethod
    def reach(self, T: int) -> Reach:
        """Window and blocks for sequences of at most T steps."""

    def reach_of_any(self) -> Reach | None:
        """What `reach` is within T steps, for every T; None where it depends on T in another way."""
        return None

    def draw(self, T: int, B: int) -> torch.Tensor | None:
        """The factors xi `[T, B]` (float64, CPU) of this call, or None where they are all 1.

        xi[t] multiplies the adjoint on its way from step t to step t-1. xi[0] is 1: the edge from the initial
        state belongs to the caller.
        """
        return None

    @abstractmethod
    def __str__(self) -> str: ...

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)


@dataclass(frozen=True)
class Full(Policy):
    """The exact gradient: every loss reaches every earlier step (window = every = T, xi = 1).

    >>> str(Full())
    'full'
    """

    def reach(self, T: int) -> Reach:
        return EVERYTHING

    def reach_of_any(self) -> Reach:
        return EVERYTHING

    def __str__(self) -> str:
        return "full"


@dataclass(frozen=True)
class Chunked(Policy):
    """Cut every edge into a multiple of k: what `detach()` every k steps computes.

    k: steps per chunk, at least 1. The last chunk, when shorter, walks only its own steps.

    Known elsewhere as `repackage_hidden`, `truncated_bptt_steps=k` (Lightning 1), `tbptt`. A dependency at lag d
    is seen by the fraction max(0, 1 - d/k) of the losses. Use it when speed matters most: the chunks walk side by
    side. Use `Truncated` when every loss should reach equally far.

    >>> str(Chunked(35))
    'chunked:35'
    """

    k: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", _count("k", self.k))

    def reach(self, T: int) -> Reach:
        return self.reach_of_any().within(T)

    def reach_of_any(self) -> Reach:
        return Reach(self.k, self.k, fenced=True)

    def __str__(self) -> str:
        return f"chunked:{self.k}"


@dataclass(frozen=True)
class Truncated(Policy):
    """Every block of `every` losses walks back `window` steps from its own last step.

    window: steps whose use of the weights receives gradient from a block, its last step included; at least 1.
    every: losses per block, 1 <= every <= window. With 1, every loss reaches back exactly `window` steps.

    Known elsewhere as BPTT(h; h') (Williams and Peng 1990, "An efficient gradient-based algorithm for on-line
    training of recurrent network trajectories"), TBPTT(k1, k2) with k1 = every, k2 = window; the two-loop code
    with `bptt_truncate` = window - 1. `Truncated(T)` equals `Full()`. In a stack of layers the window counts
    steps of the whole network; in a bidirectional stack a block of losses first..last reaches the steps from
    last-window+1 to first+window-1.

    `Truncated(k, every=k)` differs from `Chunked(k)` only in a shorter last block: here it still walks k steps.

    >>> str(Truncated(20)), str(Truncated(20, every=5))
    ('truncated:20', 'truncated:20/5')
    """

    window: int
    every: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", _count("window", self.window))
        object.__setattr__(self, "every", _count("every", self.every))
        if self.every > self.window:
            raise ValueError(
                f"every must be at most window, so that no loss is left out: "
                f"got every={self.every}, window={self.window}"
            )

    def reach(self, T: int) -> Reach:
        return self.reach_of_any().within(T)

    def reach_of_any(self) -> Reach:
        return Reach(self.window, self.every, fenced=False)

    def __str__(self) -> str:
        return f"truncated:{self.window}" + (f"/{self.every}" if self.every != 1 else "")


@dataclass(frozen=True)
class PolynomialTail:
    """Keep probabilities under which the length of uncut pieces has mean `mean` and tail P(length > n) ~ n^(1-tail).

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
        object.__setattr__(self, "mean", _real("mean", self.mean))
        object.__setattr__(self, "tail", _real("tail", self.tail))
        if not 1 < self.mean < float("inf"):
            raise ValueError(f"mean must be a finite number of steps above 1: got {self.mean}")
        if not 2 < self.tail < float("inf"):
            raise ValueError(f"tail must be finite and above 2, else the mean length is infinite: got {self.tail}")

    def keep(self, distance: int) -> float:
        """Probability that the edge `distance` steps after the last cut is kept."""
        return 1 - (self.tail - 1) / ((self.tail - 2) * self.mean + distance)


@dataclass(frozen=True)
class Randomized(Policy):
    """Cut edges at random and weight the kept ones, so that the expected gradient is the full one.

    An edge is kept with probability p and then weighted xi = 1/p, else xi = 0: E[xi] = 1. Drawn per edge and lane
    at each forward call that will need a gradient; the layers of a one-directional stack share the draw, the
    directions and layers of a bidirectional one draw their own (a path may cross one time edge twice there).

    p: 0 < p <= 1; or a sequence of such, p[d-1] for an edge d steps after the last cut (the last entry holds for all
       larger d); or a `PolynomialTail`.
    generator: a torch.Generator on the CPU; default is torch's own, so `torch.manual_seed` reproduces a run. No part of
       the text form, nor of equality; `torch.save` keeps it with its state.

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
        if not isinstance(self.generator, torch.Generator | None):
            raise TypeError(f"generator must be a torch.Generator or None: got {type(self.generator).__name__}")
        if self.generator is not None and self.generator.device.type != "cpu":
            raise ValueError(f"generator must be on the CPU, where xi is drawn: got {self.generator.device}")
        if not isinstance(self.p, PolynomialTail):
            object.__setattr__(self, "p", self._checked())
        object.__setattr__(self, "_text", self._written())

    def _checked(self) -> float | tuple[float, ...]:
        """The probabilities as floats."""
        many = isinstance(self.p, Sequence) and not isinstance(self.p, str)
        given: Sequence[float] = self.p if many else [self.p]  # type: ignore[assignment,list-item]  # checked by _real
        values = tuple(_real("p", p) for p in given)
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
        """Probability that an edge is kept when the last cut lies `distance` >= 1 steps back."""
        if isinstance(self.p, PolynomialTail):
            return self.p.keep(distance)
        if isinstance(self.p, tuple):
            return self.p[min(distance, len(self.p)) - 1]
        return self.p

    def reach(self, T: int) -> Reach:
        return EVERYTHING

    def reach_of_any(self) -> Reach:
        return EVERYTHING

    def draw(self, T: int, B: int) -> torch.Tensor | None:
        if self.p == 1 or T < 2:
            return None
        uniform = torch.rand(T - 1, B, dtype=torch.float64, generator=self.generator, device="cpu")
        return self.weights(uniform)

    def weights(self, uniform: torch.Tensor) -> torch.Tensor:
        """xi `[T, B]` from numbers in [0, 1) `[T-1, B]`: row t-1 decides edge t, kept where the number is below p."""
        edges, B = uniform.shape
        xi = torch.ones(edges + 1, B, dtype=torch.float64, device=uniform.device)
        if isinstance(self.p, (int, float)):
            xi[1:] = (uniform < self.p).double() / self.p
            return xi
        keep = torch.tensor([self.keep(d) for d in range(1, edges + 1)], dtype=torch.float64, device=uniform.device)
        distance = torch.zeros(B, dtype=torch.long, device=uniform.device)  # edges kept since the last cut
        for t in range(1, edges + 1):
            p = keep[distance]
            kept = uniform[t - 1] < p
            xi[t] = kept / p
            distance = torch.where(kept, distance + 1, 0)
        return xi

    def __str__(self) -> str:
        return self._text

    def _written(self) -> str:
        if isinstance(self.p, PolynomialTail):
            mean, tail = (repr(number).removesuffix(".0") for number in (self.p.mean, self.p.tail))
            return f"randomized:mean={mean},tail={tail}"
        return "randomized:" + ",".join(map(repr, self.p if isinstance(self.p, tuple) else (self.p,)))


@dataclass(frozen=True)
class Adaptive(Policy):
    """The smallest window whose estimated relative bias is at most `max_bias`, in use until it is measured again.

    max_bias: largest |E[g] - g_full| / |g_full|, in (0, 1): at 1 nothing of the full gradient need be left.
    max_window: largest window, in steps; also the one in use before any measurement and where none is good enough.
    every: losses per block, as in `Truncated`; no window is smaller.
    window: in use now, from every to max_window; None before a measurement.

    A policy measures nothing itself: `bptt.flow.adapt` does, on a batch, and replaces the layer's policy by one with
    the new window. It reaches as far as `Truncated(window, every)`.

    >>> str(Adaptive(0.9, 100)), str(Adaptive(0.9, 100, every=5, window=17))
    ('adaptive:0.9,max=100', 'adaptive:0.9,max=100,every=5,window=17')

    Source: Aicher, Foti and Fox 2019 (arXiv 1905.07473), "Adaptively truncating backpropagation through time to control
    gradient bias".
    """

    max_bias: float
    max_window: int
    every: int = 1
    window: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_bias", _real("max_bias", self.max_bias))
        if not 0 < self.max_bias < 1:
            raise ValueError(f"max_bias must lie between 0 and 1, both excluded: got {self.max_bias}")
        object.__setattr__(self, "max_window", _count("max_window", self.max_window))
        object.__setattr__(self, "every", _count("every", self.every))
        if self.every > self.max_window:
            raise ValueError(
                f"every must be at most max_window, so that no loss is left out: "
                f"got every={self.every}, max_window={self.max_window}"
            )
        if self.window is not None:
            object.__setattr__(self, "window", _count("window", self.window))
            if not self.every <= self.window <= self.max_window:
                raise ValueError(
                    f"window must be from every to max_window: got window={self.window}, every={self.every}, "
                    f"max_window={self.max_window}"
                )

    def reach(self, T: int) -> Reach:
        return self.reach_of_any().within(T)

    def reach_of_any(self) -> Reach:
        return Reach(self.max_window if self.window is None else self.window, self.every, fenced=False)

    def __str__(self) -> str:
        every = f",every={self.every}" if self.every != 1 else ""
        window = f",window={self.window}" if self.window is not None else ""
        return f"adaptive:{self.max_bias!r},max={self.max_window}{every}{window}"


_FORMS = (
    "full, chunked:K, truncated:WINDOW, truncated:WINDOW/EVERY, randomized:P, randomized:P1,P2,..., "
    "randomized:mean=STEPS,tail=EXPONENT, adaptive:BIAS,max=WINDOW, adaptive:BIAS,max=WINDOW,every=EVERY"
)
_NUMBER = r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
_INTEGER = r"([-+]?[0-9]+)"


def parse(text: str | Policy) -> Policy:
    """The policy a text form names: the inverse of `str(policy)`. A policy is returned as it is.

    Raises ValueError for text that names none, TypeError for anything else.

    >>> parse("truncated:20/5")
    Truncated(window=20, every=5)
    >>> parse("randomized:0.9")
    Randomized(p=0.9)
    """
    if isinstance(text, Policy):
        return text
    if not isinstance(text, str):
        raise TypeError(f"gradient must be a policy or its text form ({_FORMS}): got {text!r} ({type(text).__name__})")
    form = text.strip().lower()
    if form == "full":
        return Full()
    if match := re.fullmatch(r"chunked:([-+]?[0-9]+)", form):
        return Chunked(int(match[1]))
    if match := re.fullmatch(r"truncated:([-+]?[0-9]+)(?:/([-+]?[0-9]+))?", form):
        return Truncated(int(match[1]), every=int(match[2] or 1))
    if match := re.fullmatch(rf"randomized:({_NUMBER}(?:,{_NUMBER})*)", form):
        numbers = tuple(float(number) for number in match[1].split(","))
        return Randomized(numbers[0] if len(numbers) == 1 else numbers)
    if match := re.fullmatch(rf"randomized:mean=({_NUMBER})(?:,tail=({_NUMBER}))?", form):
        return Randomized.polynomial(float(match[1]), float(match[2] or 4))
    if match := re.fullmatch(
        rf"adaptive:({_NUMBER}),max={_INTEGER}(?:,every={_INTEGER})?(?:,window={_INTEGER})?", form
    ):
        window = None if match[4] is None else int(match[4])
        return Adaptive(float(match[1]), int(match[2]), every=int(match[3] or 1), window=window)
    raise ValueError(f"gradient must be one of {_FORMS}: got {text!r}")


def _count(name: str, value: int) -> int:
    """`value` as a whole number of steps, at least 1."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a whole number of steps: got {value!r} ({type(value).__name__})")
    count = operator.index(value)
    if count < 1:
        raise ValueError(f"{name} must be at least 1 step: got {value}")
    return count


def _real(name: str, value: float) -> float:
    """`value` as a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number: got {value!r} ({type(value).__name__})")
    return float(value)


# Data without code of their own: what a checkpoint may hold under torch.load(weights_only=True).
torch.serialization.add_safe_globals([Full, Chunked, Truncated, PolynomialTail, Randomized, torch.Generator, Adaptive])
