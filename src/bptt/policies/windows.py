"""The policies without random cuts: their windows and blocks alone say where gradients stop."""

from __future__ import annotations

from dataclasses import dataclass, field

from .arguments import count, real
from .policy import Policy
from .reach import EVERYTHING, Reach

__all__ = ["Adaptive", "Chunked", "Full", "Truncated"]


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
    """Chunks of k steps: every time edge into a multiple of k is cut, as `detach()` every k steps does.

    k: steps per chunk, at least 1. A shorter last chunk has only its own steps.

    Known elsewhere as `repackage_hidden`, `truncated_bptt_steps=k` (Lightning 1), `tbptt`. A dependency at lag d
    is seen by the fraction max(0, 1 - d/k) of the losses. Use it when speed matters most: the chunks are computed
    side by side. Use `Truncated` when every loss should reach equally far.

    >>> str(Chunked(35))
    'chunked:35'
    """

    k: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", count("k", self.k, "step"))

    def reach(self, T: int) -> Reach:
        return self.reach_of_any().within(T)

    def reach_of_any(self) -> Reach:
        return Reach(self.k, self.k, stops_at_start=True)

    def __str__(self) -> str:
        return f"chunked:{self.k}"


@dataclass(frozen=True)
class Truncated(Policy):
    """Truncation to a window: every block of `every` losses reaches back `window` steps from its own last step.

    window: steps whose use of the weights receives gradient from a block, its last step included; at least 1.
    every: losses per block, 1 <= every <= window. With 1, every loss reaches back exactly `window` steps.

    Known elsewhere as BPTT(h; h') (Williams and Peng 1990, "An efficient gradient-based algorithm for on-line
    training of recurrent network trajectories"), TBPTT(k1, k2) with k1 = every, k2 = window; and the two-loop code
    with `bptt_truncate` = window - 1. `Truncated(T)` equals `Full()`. In a stack of layers the window counts
    steps of the whole network; in a bidirectional stack a block of losses first..last reaches the steps from
    last-window+1 to first+window-1.

    `Truncated(k, every=k)` differs from `Chunked(k)` only in a shorter last block: here it still reaches back k steps.

    >>> str(Truncated(20)), str(Truncated(20, every=5))
    ('truncated:20', 'truncated:20/5')
    """

    window: int
    every: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", count("window", self.window, "step"))
        object.__setattr__(self, "every", count("every", self.every, "step"))
        if self.every > self.window:
            raise ValueError(
                f"every must be at most window, so that no loss is left out: "
                f"got every={self.every}, window={self.window}"
            )

    def reach(self, T: int) -> Reach:
        return self.reach_of_any().within(T)

    def reach_of_any(self) -> Reach:
        return Reach(self.window, self.every, stops_at_start=False)

    def __str__(self) -> str:
        return f"truncated:{self.window}" + (f"/{self.every}" if self.every != 1 else "")


@dataclass(frozen=True)
class Adaptive(Policy):
    """Truncation to the smallest window whose estimated relative bias is at most `max_bias`, as it was last measured.

    max_bias: largest |E[g] - g_full| / |g_full|, in (0, 1): at 1 nothing of the full gradient need be left.
    max_window: largest window, in steps; also the one in use before any measurement and where no window is good enough.
    every: losses per block, as in `Truncated`; no window is smaller.
    window: the one in use now, from every to max_window; None before a measurement.

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
        object.__setattr__(self, "max_bias", real("max_bias", self.max_bias))
        if not 0 < self.max_bias < 1:
            raise ValueError(f"max_bias must lie between 0 and 1, both excluded: got {self.max_bias}")
        object.__setattr__(self, "max_window", count("max_window", self.max_window, "step"))
        object.__setattr__(self, "every", count("every", self.every, "step"))
        if self.every > self.max_window:
            raise ValueError(
                f"every must be at most max_window, so that no loss is left out: "
                f"got every={self.every}, max_window={self.max_window}"
            )
        if self.window is not None:
            object.__setattr__(self, "window", count("window", self.window, "step"))
            if not self.every <= self.window <= self.max_window:
                raise ValueError(
                    f"window must be from every to max_window: got window={self.window}, every={self.every}, "
                    f"max_window={self.max_window}"
                )

    def reach(self, T: int) -> Reach:
        return self.reach_of_any().within(T)

    def reach_of_any(self) -> Reach:
        return Reach(self.max_window if self.window is None else self.window, self.every, stops_at_start=False)

    def __str__(self) -> str:
        every = f",every={self.every}" if self.every != 1 else ""
        window = f",window={self.window}" if self.window is not None else ""
        return f"adaptive:{self.max_bias!r},max={self.max_window}{every}{window}"
