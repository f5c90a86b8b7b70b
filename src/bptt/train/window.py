"""What a training step reads: tensors only, so that every loop and loader can move, pin and send it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["IGNORE", "Window"]

IGNORE = -100
"""The target where there is nothing to predict; torch's cross_entropy ignores it by default."""


class _Tensors(NamedTuple):
    inputs: Tensor
    targets: Tensor
    resets: Tensor | None
    numbers: Tensor


class Window(_Tensors):
    """Inputs and targets of one training step: a named tuple of tensors.

    inputs, targets: int64 `[T, B]`, targets one token ahead, `IGNORE` where there is none; or, of a series, numbers
    `[T, B, I]` and `[T, B, K]`, NaN where there is no target.
    resets: bool `[T, B]`, where the state is zeroed before a step; None: nowhere.
    numbers: int64 `[1, 5]`, on the CPU, what the attributes `fresh`, `tokens`, `total` and `place` read.

    DataLoaders collate, pin and send it, and Lightning, accelerate and ignite move it to a device, as any tuple of
    tensors. `to` leaves the numbers on the CPU, where a loop reads them without waiting for the device. A batch of one
    window is that window; windows do not stack or join, since each continues the state of the one before.

    Raises ValueError for windows that a loader has stacked or joined.

    >>> Window.of(torch.zeros(3, 2), torch.ones(3, 2), fresh=True, tokens=6).to("meta").tokens
    6
    """

    __slots__ = ()

    def __new__(cls, inputs: Tensor, targets: Tensor, resets: Tensor | None, numbers: Tensor) -> Window:
        # What is no tensor is a loader's note of a tensor's size, or the like, in the shape of a window.
        stacked = isinstance(inputs, Tensor) and inputs.dim() not in ((2, 3) if inputs.is_floating_point() else (2,))
        if stacked or (isinstance(numbers, Tensor) and numbers.shape != (1, len(_NUMBERS))):
            got = " and ".join(str(list(t.shape)) for t in (inputs, numbers) if isinstance(t, Tensor))
            raise ValueError(f"a window must be inputs [T, B] and numbers [1, {len(_NUMBERS)}]: got {got}; {_ALONE}")
        return super().__new__(cls, inputs, targets, resets, numbers)

    @classmethod
    def of(
        cls,
        inputs: Tensor,
        targets: Tensor,
        *,
        fresh: bool,
        tokens: int,
        resets: Tensor | None = None,
        total: int | None = None,
        place: tuple[int, int] | None = None,
    ) -> Window:
        """From numbers; total: None, as many as tokens; place: None, nowhere that `Lanes` knows."""
        epoch, index = (-1, -1) if place is None else place
        numbers = [[int(fresh), tokens, tokens if total is None else total, epoch, index]]
        return cls(inputs, targets, resets, torch.tensor(numbers, dtype=torch.int64, device="cpu"))

    @property
    def fresh(self) -> bool:
        """Whether the state before the first step is zero rather than the last window's."""
        return bool(self._number("fresh"))

    @property
    def tokens(self) -> int:
        """Targets that count."""
        return self._number("tokens")

    @property
    def total(self) -> int:
        """Targets that count on all ranks together."""
        return self._number("total")

    @property
    def place(self) -> tuple[int, int] | None:
        """(epoch, index) of the window; None: it was asked for by these."""
        epoch = self._number("epoch")
        return None if epoch < 0 else (epoch, self._number("index"))

    @property
    def lanes(self) -> int:
        """How many there are, B."""
        return self.inputs.shape[1]

    def part(self, lanes: slice) -> Window:
        """Some of the lanes, with the `total` of all. No lanes: the first one, without a target.

        >>> window = Window.of(torch.zeros(3, 2), torch.ones(3, 2).long(), fresh=True, tokens=6)
        >>> window.part(slice(1, 2)).tokens, window.part(slice(2, 2)).tokens
        (3, 0)
        """
        idle = lanes.start == lanes.stop
        lanes = slice(0, 1) if idle else lanes
        targets, resets = self.targets[:, lanes], None if self.resets is None else self.resets[:, lanes]
        missing = math.nan if targets.is_floating_point() else IGNORE
        targets = torch.full_like(targets, missing) if idle else targets
        mine = int((~targets.isnan() if targets.is_floating_point() else targets != IGNORE).sum())
        parts = self.inputs[:, lanes], targets
        return Window.of(*parts, fresh=self.fresh, tokens=mine, resets=resets, total=self.tokens, place=self.place)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Window:
        """The same window with its tensors on a device; its numbers stay where they are."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        resets = None if self.resets is None else moved(self.resets)
        return Window(moved(self.inputs), moved(self.targets), resets, self.numbers)

    def _number(self, name: str) -> int:
        return int(self.numbers[0, _NUMBERS.index(name)])


_NUMBERS = ("fresh", "tokens", "total", "epoch", "index")

_ALONE = (
    "each window continues the state of the one before and is read alone: "
    "DataLoader(lanes, batch_size=None); over several processes each reads its own, Lanes(..., rank=, world=)"
)


def _collate(windows: list[Window], *, collate_fn_map: dict[Any, Callable[..., Any]] | None = None) -> Window:
    """A DataLoader's batch: of batch_size=1, its default, the window itself."""
    if len(windows) != 1:
        raise ValueError(f"a batch must be one window: got {len(windows)}; {_ALONE}")
    return windows[0]


try:
    from torch.utils.data._utils.collate import default_collate_fn_map
except ImportError:  # torch documents the table, not its place; without it `Window` refuses to be stacked
    pass
else:
    default_collate_fn_map[Window] = _collate
