"""What a cell is: its facts, and four formulas, each over any number of rows at once.

Legend: H hidden units, P size of h (H, or `proj_size`), G gates, I input features. "..." stands for any leading
shape: one step `[B]`, all steps `[T, B]`, or the rows of a block sweep.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["AllSteps", "Cell", "Pullback", "State", "TapedSteps", "Weights"]

State = tuple[Tensor, ...]
"""(h,) or (h, c): h `[..., P]`, c `[..., H]`."""


class Weights(NamedTuple):
    """The parameters of one layer and direction, named and shaped as in torch.nn."""

    ih: Tensor  # [G*H, I]
    hh: Tensor  # [G*H, P]
    b_ih: Tensor | None = None  # [G*H]
    b_hh: Tensor | None = None  # [G*H]
    hr: Tensor | None = None  # [P, H], an LSTM's projection

    @classmethod
    def of(cls, given: Sequence[Tensor | None], biased: bool) -> Weights:
        """Those of one layer and direction, from all that it has, in torch.nn's order."""
        pieces = given if biased else (*given[:2], None, None, *given[2:])
        return cls(*pieces)  # type: ignore[arg-type]  # ih and hh are always given

    def to(self, dtype: torch.dtype) -> Weights:
        """The same in a dtype."""
        return Weights(*[None if w is None else w.to(dtype) for w in self])  # type: ignore[arg-type]  # as they were

    @property
    def named(self) -> list[tuple[str, Tensor]]:
        """(name, weight) of those that there are, in torch.nn's order."""
        return [(name, w) for name, w in zip(self._fields, self, strict=True) if w is not None]


class Pullback(NamedTuple):
    """What one step sends back."""

    da: Tensor  # [..., G*H]  dL/d(pre-activation), as the input product sees it
    direct: Tensor | None = None  # dL/dh_{t-1} [..., P] by the paths that avoid the recurrent product
    carried: State = ()  # dL/dc_{t-1} [..., H], for a state (h, c)


class TapedSteps(Protocol):
    """What the forward pass kept of all steps of one layer and direction, h `[T, B, P]` and c `[T, B, H]`."""

    @property
    def prev(self) -> State:
        """The states before the steps, resets applied."""

    @property
    def state(self) -> State:
        """The states after the steps."""

    @property
    def gates(self) -> Tensor | None:
        """`[T, B, F]`; None for a cell whose state is its tape."""


@dataclass(eq=False)
class AllSteps:
    """The values of all steps of one layer and direction `[T, B, .]` that the gradients of its weights are made of."""

    x: Tensor
    tape: TapedSteps
    da: Tensor
    recurrent: tuple[Tensor, ...]  # `Cell.recurrent` of da, in parts along its features; () where it is not known
    adjoints: State  # lambda of h and of c, as many as were asked for


class Cell(ABC):
    """One recurrent cell: what is true of it, and its formulas. Stateless: parameters arrive as `Weights`.

    Whatever anybody asks of a cell stands here, so that nobody else keeps a table of cells or tells them by a number.
    """

    name: ClassVar[str]
    """Of its layer in `bptt.nn.LAYERS`, of its equations, and in words."""
    mode: str
    """Its name in `CELLS`, and the mode of a layer that repeats it; torch.nn's where torch has the cell."""
    gate_names: ClassVar[tuple[str, ...]]
    """The G gates, in the order of the weights' rows; of a cell without gates the state itself."""
    activations: tuple[str, ...]
    """Of each gate, a name in `ACTIVATIONS`."""
    tape_names: ClassVar[tuple[str, ...]] = ()
    """The gate that each taped part belongs to: the gates' own values in the order of the rows, then what else is kept.
    None: the state is the tape, and its values are the gate's."""
    state_names: ClassVar[tuple[str, ...]] = ("h",)
    """("h",) or ("h", "c")."""
    keeps: ClassVar[str | None] = None
    """The gate that multiplies the state of before, the last one of `state_names`: near 1 it remembers."""
    admits: ClassVar[str | None] = None
    """The gate that multiplies what is new, where that is not 1 minus `keeps`."""
    inner: ClassVar[str | None] = None
    """The last gate, where its recurrent product, bias included, stands inside a product with another gate: there
    `recurrent` differs from `da`."""
    projects: ClassVar[bool] = False
    """Whether h may be projected, by `Weights.hr`."""
    onnx: ClassVar[str | None] = None
    """Its operator in ONNX; None where ONNX has none."""
    onnx_gates: ClassVar[tuple[str, ...]] = ()
    """The gates in the order of that operator's rows."""
    onnx_attributes: ClassVar[dict[str, int]] = {}
    """What else tells the operator that it is this cell."""
    slope: float | None = None
    """beta_h, the largest |f'|, of a cell that is h_t = f(W_hh h_{t-1} + ...) and no more."""

    # Derived from the names, once for each class: a call of a small net asks for them often.
    gates_per_unit: ClassVar[int]
    """G: rows of the weights per hidden unit."""
    gated: ClassVar[bool]
    """Whether it has gates: more than the state itself."""
    taped_per_unit: ClassVar[int]
    """Gate values kept per hidden unit and step."""
    states: ClassVar[int]
    """1: the state is h. 2: it is (h, c)."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.gates_per_unit, cls.taped_per_unit = len(cls.gate_names), len(cls.tape_names)
        cls.gated, cls.states = len(cls.gate_names) > 1, len(cls.state_names)

    def taped(self, w: Weights) -> int:
        """F: gate values kept per lane and step."""
        return self.taped_per_unit * w.hh.shape[0] // self.gates_per_unit

    def project(self, x: Tensor, w: Weights) -> Tensor:
        """The input product `[..., G*H]` of any number of steps, with every bias that can be added beforehand."""
        bias = None if w.b_ih is None or w.b_hh is None else w.b_ih + w.b_hh
        return functional.linear(x, w.ih, bias)

    @abstractmethod
    def gates(self, gx: Tensor, h: Tensor, w: Weights) -> Tensor:
        """The taped gate values `[..., F]` from gx `[..., G*H]` and the previous h `[..., P]`.

        Needs no walk: with every h known, all steps are one product.
        """

    @abstractmethod
    def advance(self, gates: Tensor, prev: State, w: Weights) -> State:
        """The state of step t from its gates and the state of step t-1."""

    @abstractmethod
    def pull(self, lam: State, gates: Tensor, prev: State, state: State, w: Weights) -> Pullback:
        """The adjoint of one step: from dL/d(state_t) through everything later, to the pre-activations."""

    def recurrent(self, da: Tensor, gates: Tensor) -> Tensor:
        """`da` as the recurrent product sees it `[..., G*H]`: the same, but for cells that gate that product."""
        return da

    def push(
        self, da: Tensor, dr: Tensor, tangent: State, gates: Tensor, prev: State, state: State, w: Weights
    ) -> State:
        """The tangent of the state of step t, the weights' own part of `Weights.hr` left out.

        da: of the input product with its biases `[..., G*H]`. dr: of the recurrent product with its biases. tangent: of
        the state before. A tangent is what the transpose of `pull` makes of them, (6.34); a cell may say it in closed
        form.
        """

        def back(*lam: Tensor) -> tuple[Tensor, ...]:
            pulled = self.pull(lam, gates, prev, state, w)
            direct = () if pulled.direct is None else (pulled.direct,)
            return (pulled.da, self.recurrent(pulled.da, gates), *direct, *pulled.carried)

        count = len(back(*state)) - 2
        _, transposed = torch.func.vjp(back, *map(torch.zeros_like, state))  # type: ignore[misc]  # of torch
        moved: State = transposed((da, dr, *tangent[len(tangent) - count :]))
        return moved

    def projected(self, gates: Tensor, state: State) -> Tensor:
        """What `Weights.hr` multiplies `[..., H]`."""
        raise TypeError(f"{self.name} has no projection")

    def linear(self, gates: Tensor) -> tuple[Tensor, Tensor]:
        """(f, u) `[..., H]` of c_t = f_t c_{t-1} + u_t, for a state (h, c)."""
        raise TypeError(f"{self.name} has no c")

    # What follows from these ------------------------------------------------------------------------------------------

    def before(self, lam: State, gates: Tensor | None, prev: State, state: State, w: Weights) -> tuple[Tensor, State]:
        """(dL/d(pre-activation), the adjoint of the state before) of one step, recurrent product included."""
        gates = lam[0] if gates is None else gates  # a cell that tapes no gates does not look at them
        back = self.pull(lam, gates, prev, state, w)
        through = self.recurrent(back.da, gates) @ w.hh
        return back.da, (through if back.direct is None else through + back.direct, *back.carried)

    def factors(self, weight: str, steps: AllSteps) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """The factors of a weight's gradient, (6.4): the errors of its rows `[..., rows]`, in parts along its rows, and
        what its columns multiply `[..., columns]`, None for a bias. The gradient is the sum of their products.

        weight: a field of `Weights`.
        """
        if weight == "hr":
            assert steps.tape.gates is not None
            return steps.adjoints[:1], self.projected(steps.tape.gates, steps.tape.state)
        if weight in ("ih", "b_ih"):
            return (steps.da,), steps.x if weight == "ih" else None
        if not steps.recurrent and self.inner is not None:
            assert steps.tape.gates is not None
            steps.recurrent = (self.recurrent(steps.da, steps.tape.gates),)
        return steps.recurrent or (steps.da,), steps.tape.prev[0] if weight == "hh" else None

    def needs_adjoint(self, w: Weights) -> bool:
        """Whether the gradient of a weight takes lambda of h, as that of a projection does."""
        return w.hr is not None

    def input_weight(self, w: Weights) -> Tensor:
        """The weight `[G*H, I]` through which da reaches x."""
        return w.ih

    def state_sizes(self, w: Weights) -> tuple[int, ...]:
        """The size of each state: P of h, H of c."""
        H = w.hh.shape[0] // self.gates_per_unit
        return (w.hh.shape[1], H)[: self.states]

    def products(self, w: Weights) -> tuple[int, int, int]:
        """Multiplications of a step and lane forward in the products of the input, of the recurrence and of the
        projection; on the way back through time those of the last two.
        """
        return w.ih.numel(), w.hh.numel(), 0 if w.hr is None else w.hr.numel()


def parts(x: Tensor, count: int) -> tuple[Tensor, ...]:
    """The last dimension cut into equal parts."""
    return torch.chunk(x, count, dim=-1)
