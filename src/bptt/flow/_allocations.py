"""The largest number of bytes that torch's tensors hold at the same time while something runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["peak_bytes"]


def peak_bytes(call: Callable[[], object]) -> int:
    """The largest number of bytes of tensors that `call` makes and that are alive at the same time, on any device.

    Tensors that existed before do not count, nor does memory that is not torch's, such as what a compiled kernel
    allocates for itself.

    >>> import torch
    >>> peak_bytes(lambda: (torch.ones(1000) + 1).sum())  # float32: two tensors of 1000
    8000
    """
    with _Storages() as storages:
        call()
    return storages.peak


class _Storages(TorchDispatchMode):
    """Follows the storages of all that operators return, from their making to their end."""

    sees_inside = True
    """A layer runs without its operators, which would hide what it allocates for a while."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.held = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {self._address(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and self._address(tensor) not in given:
                self._made(tensor)
        return result

    @staticmethod
    def _address(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _made(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self.alive:
            return
        self.alive[address] = storage.nbytes()
        self.held += storage.nbytes()
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._gone, address).atexit = False

    def _gone(self, address: int) -> None:
        self.held -= self.alive.pop(address, 0)
