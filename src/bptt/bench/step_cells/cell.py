"""A recurrent step as somebody would write it, with its sizes, numbers and source: a row of `STEP_CELLS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

__all__ = ["Draws", "StepCell", "StepProblem", "Steps", "over_time"]

Steps = Callable[[Any, Any], tuple[Any, Tensor]]
"""(carry, x) -> (carry, y): carry and x any pytrees of tensors `[B, ...]`, y one tensor `[B, ...]`."""

CLEAR = 3e-6
"""Distance from a jump, in units of its argument, beyond which float32 and float64 fall on the same side of it."""

TRIES = 100
"""Drawings of a lane's inputs, at most."""


class StepProblem(NamedTuple):
    """A step with what it is given.

    carry: the first one. xs: a tensor `[T, B, ...]`, or a tuple of them. parameters: the tensors that the step
    captures, which ask for their gradients; xs and carry do not.
    """

    step: Steps
    carry: Any
    xs: Any
    parameters: list[Tensor]


@dataclass
class Draws:
    """The sizes of a problem and where its numbers come from.

    All are drawn in float32, so that two dtypes hold the same numbers.
    """

    T: int
    B: int
    H: int
    dtype: torch.dtype
    seed: int
    parameters: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def uniform(self, *size: int, low: float, high: float) -> Tensor:
        """A parameter, uniform in [low, high)."""
        values = torch.rand(size, generator=self.generator, dtype=torch.float32) * (high - low) + low
        self.parameters.append(values.to(self.dtype).requires_grad_())
        return self.parameters[-1]

    def normal(self, *size: int) -> Tensor:
        """A parameter, standard normal."""
        self.parameters.append(self._normal(*size).requires_grad_())
        return self.parameters[-1]

    def weight(self, *size: int) -> Tensor:
        """A parameter `[outputs, inputs, ...]`, uniform within one over the root of the inputs, as torch.nn has it."""
        bound = torch.Size(size[1:]).numel() ** -0.5
        return self.uniform(*size, low=-bound, high=bound)

    def bias(self, size: int) -> Tensor:
        """A parameter `[size]`, uniform within one over the root of H."""
        return self.uniform(size, low=-(self.H**-0.5), high=self.H**-0.5)

    def inputs(self, *size: int) -> Tensor:
        """Standard normal `[T, B, *size]`."""
        return self._normal(self.T, self.B, *size)

    def zeros(self, *size: int) -> Tensor:
        """Zeros `[B, *size]`, of a first carry."""
        return torch.zeros(self.B, *size, dtype=self.dtype)

    def problem(self, step: Steps, carry: Any, xs: Any) -> StepProblem:
        """The step with its carry and xs, and the parameters drawn so far."""
        return StepProblem(step, carry, xs, self.parameters)

    def _normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.generator, dtype=torch.float32).to(self.dtype)


@dataclass(frozen=True)
class StepCell:
    """A recurrent cell, as a step that somebody would write.

    name: what the command line calls it. build: draws its problem. source: the paper and equations that it is written
    from. layer: the name in `nn.LAYERS` of the layer that computes the same with the same parameters. distance: where
    the step jumps (a spike), |argument of the jump| `[B, ...]` from the carry after a step.

    >>> from bptt.bench import STEP_CELLS
    >>> step, carry, xs, parameters = STEP_CELLS["gru"].make(2, 3, T=5)
    >>> carry, y = step(carry, xs[0])
    >>> list(xs.shape), list(y.shape), [list(w.shape) for w in parameters]
    ([5, 2, 3], [2, 3], [[9, 3], [9, 3], [9], [9]])
    """

    name: str
    build: Callable[[Draws], StepProblem]
    source: str
    layer: str | None = None
    distance: Callable[[Any], Tensor] | None = None

    def make(self, B: int, H: int, dtype: torch.dtype = torch.float32, T: int = 10, seed: int = 0) -> StepProblem:
        """(step, first carry, xs, parameters) of T steps, B lanes and about H units, the same for the same seed.

        dtype: float32 or float64, which hold the same numbers. The global random state is neither read nor changed.
        Where the step jumps, inputs are drawn until none comes so close to a jump that rounding decides the side.

        Raises ValueError for sizes below 1 and for another dtype; RuntimeError where inputs clear of jumps are not
        found.
        """
        for name, size in (("T", T), ("B", B), ("H", H)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1: got {size}")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64: got {dtype}")
        problem = self.build(Draws(T, B, H, dtype, seed))
        if self.distance is None:
            return problem
        exact = problem if dtype == torch.float64 else self.build(Draws(T, B, H, torch.float64, seed))
        return problem._replace(xs=self._clear(exact, seed, self.distance).to(dtype))

    def _clear(self, problem: StepProblem, seed: int, distance: Callable[[Any], Tensor]) -> Tensor:
        """xs of which no lane comes close to a jump: every other lane is drawn again."""
        generator = torch.Generator().manual_seed(seed + 1)
        xs = problem.xs
        for _ in range(TRIES):
            nearest = xs.new_full((xs.shape[1],), torch.inf)
            carry = problem.carry
            with torch.no_grad():
                for x in xs.unbind():
                    carry, _ = problem.step(carry, x)
                    nearest = torch.minimum(nearest, distance(carry).flatten(1).amin(1))
            close = nearest < CLEAR
            if not close.any():
                return xs
            again = torch.randn(xs.shape, generator=generator, dtype=torch.float32).to(xs.dtype)
            xs = torch.where(close[:, None], again, xs)
        raise RuntimeError(f"{self.name}: no inputs clear of jumps in {TRIES} drawings of {list(xs.shape)}")


def over_time(xs: Any) -> list[Any]:
    """[x_0, ..., x_{T-1}] of a tensor `[T, ...]` or a tuple of them, each as the step is given it.

    >>> over_time((torch.tensor([1, 2]), torch.tensor([3, 4])))
    [(tensor(1), tensor(3)), (tensor(2), tensor(4))]
    """
    if isinstance(xs, Tensor):
        return list(xs.unbind())
    T = len(xs[0])
    unbound = tree_map(lambda x: x.unbind(), tuple(xs))
    return [tuple(leaf[t] for leaf in unbound) for t in range(T)]
