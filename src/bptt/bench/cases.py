"""What is measured: a cell on a shape under a gradient policy, and how much arithmetic that is."""

from __future__ import annotations

from dataclasses import dataclass

from ..cells import of_name

__all__ = ["SHAPES", "Case"]

SHAPES = (
    (100, 1, 32, 32),
    (100, 1, 128, 128),
    (100, 32, 32, 64),
    (100, 32, 128, 128),
    (35, 32, 256, 256),
    (100, 32, 512, 512),
    (100, 64, 256, 256),
    (1000, 8, 64, 64),
)
"""T, B, I, H of the layers that are compared."""


@dataclass(frozen=True)
class Case:
    """A cell, by its name in `nn.LAYERS` or in `STEP_CELLS`, on T steps, B lanes, I inputs and H units, float32.

    packed: the lanes are sequences of unequal lengths, the longest of T steps.

    >>> case = Case("lstm", 100, 32, 128, 128, "chunked:10")
    >>> str(case), case.flop
    ('LSTM (100, 32, 128, 128) chunked:10', 2516582400)
    """

    cell: str
    T: int
    B: int
    I: int
    H: int
    gradient: str = "full"
    layers: int = 1
    both_ways: bool = False
    packed: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(T, B, I, H)."""
        return self.T, self.B, self.I, self.H

    @property
    def flop(self) -> int:
        """Useful operations of a full forward and backward pass: one product with [W_ih W_hh] forward, two backward.

        6 T B G H (I + H) of one layer, one way, all lanes whole; biases and activations are not counted.
        """
        return 6 * self.T * self.B * of_name(self.cell).gates_per_unit * self.H * (self.I + self.H)

    def __str__(self) -> str:
        return " ".join((f"{self.cell.upper()} {self.shape}", *self.marks))

    @property
    def marks(self) -> tuple[str, ...]:
        """What sets it apart from one layer, one way, of whole lanes with the full gradient, in words."""
        marks = {
            self.gradient: self.gradient != "full",
            f"{self.layers} layers": self.layers > 1,
            "both ways": self.both_ways,
            "packed": self.packed,
        }
        return tuple(mark for mark, holds in marks.items() if holds)
