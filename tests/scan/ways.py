"""The two ways of a call whose kind is known, compared."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

function = importlib.import_module("bptt.scan.function")

Results = list[Tensor | None]


class Ways:
    """Which way calls take. taken: of each the short one, whether it was one that is known."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.short, self.taken, direct = True, list[bool](), function.direct_call

        def call(*arguments: Any) -> Any:
            found = direct(*arguments) if self.short else None
            self.taken.append(found is not None)
            return found

        monkeypatch.setattr(function, "direct_call", call)

    def both(self, call: Callable[[], Results]) -> None:
        """Compare the bits of a call's results by both ways, and demand that the short one is taken."""
        self.short = False
        for _ in range(4):  # at some a real step is compared
            expected = call()
        self.short = True
        self.taken.clear()
        for _ in range(3):
            got = call()
            assert len(got) == len(expected)
            for g, e in zip(got, expected, strict=True):
                assert (g is None) == (e is None)
                assert g is None or e is None or torch.equal(g, e)
        assert sum(self.taken) >= 2, self.taken


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Results:
    loss = torch.stack([(torch.sin(y) * (1 + i)).sum() for i, y in enumerate(outputs) if y.requires_grad]).sum()
    return [*outputs, *torch.autograd.grad(loss, inputs, allow_unused=True)]
