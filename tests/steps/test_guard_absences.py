"""What is set where the step's code looked in vain: it hides what the code found elsewhere, and is found and named."""

import builtins
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .guards import WHEN, guarded

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Case = tuple[Step, Callable[[pytest.MonkeyPatch], Any], str]


class Gain:
    """An object with what a class may have."""

    factor = 0.5

    def of(self, h: Tensor) -> Tensor:
        return h * self.factor

    @staticmethod
    def fixed(h: Tensor) -> Tensor:
        return h * 0.5


class Louder(Gain):
    pass


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2))

    def gate(self, h: Tensor) -> Tensor:
        return self.inner(h)

    def forward(self, h: Tensor) -> Tensor:
        return torch.tanh(self.gate(h))


class OtherCell(Cell):
    pass


def twice(h: Tensor) -> Tensor:
    return 2 * h


def method() -> Case:
    gain = Gain()
    return lambda h, x: (gain.of(h), x), lambda _: setattr(gain, "of", twice), "`gain.of` is set, and was not"


def static_method() -> Case:
    gain = Gain()
    return lambda h, x: (gain.fixed(h), x), lambda _: setattr(gain, "fixed", twice), "`gain.fixed` is set, and was not"


def attribute_of_a_class() -> Case:
    gain = Louder()
    return lambda h, x: (gain.of(h), x), lambda m: m.setattr(Louder, "factor", 2), "`gain.factor` is 2, and was 0.5"


def method_of_a_class_below() -> Case:
    gain = Louder()
    change = lambda m: m.setattr(Louder, "of", lambda self, h: h, raising=False)  # noqa: E731
    return lambda h, x: (gain.of(h), x), change, "`Louder.of` is set, and was not"


def method_of_a_module() -> Case:
    cell = Cell()
    return lambda h, x: (cell(h), x), lambda _: setattr(cell, "gate", twice), "`cell.gate` is set, and was not"


def forward_of_a_module() -> Case:
    cell = Cell()
    change = lambda _: setattr(cell.inner[0], "forward", twice)  # noqa: E731
    return lambda h, x: (cell(h), x), change, "`cell.inner[0].forward` is set, and was not"


def forward_of_a_module_of_torch() -> Case:
    layer = nn.Linear(2, 2)
    change = lambda m: m.setattr(nn.Linear, "forward", lambda self, h: h)  # noqa: E731
    return lambda h, x: (layer(h), x), change, "`Linear.forward` is another function than"


def class_of_a_module() -> Case:
    cell = Cell()
    change = lambda _: setattr(cell, "__class__", OtherCell)  # noqa: E731
    return lambda h, x: (cell(h), x), change, "`cell` is a OtherCell, and was a Cell"


def all_attributes() -> Case:
    gain = Gain()
    return lambda h, x: (gain.of(h), x), lambda _: setattr(gain, "__dict__", {"other": 2}), "`gain.__dict__` is another"


def all_parameters() -> Case:
    layer = nn.Linear(2, 2)
    change = lambda _: vars(layer).update(_parameters={"weight": torch.ones(2, 2), "bias": None})  # noqa: E731
    return lambda h, x: (layer(h), x), change, "`layer._parameters` is another dict than"


def missing_attribute() -> Case:
    gain = Gain()
    step = lambda h, x: (h * getattr(gain, "bias", 1.0), x)  # noqa: E731
    return step, lambda _: setattr(gain, "bias", 2.0), "`gain.bias` is set, and was not"


def missing_attribute_asked_for() -> Case:
    gain = Gain()
    step = lambda h, x: (2 * h if hasattr(gain, "bias") else h, x)  # noqa: E731
    return step, lambda _: setattr(gain, "bias", 2.0), "`gain.bias` is set, and was not"


def missing_attribute_tried() -> Case:
    gain = Gain()

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        try:
            return h * gain.bias, x  # type: ignore[attr-defined]
        except AttributeError:
            return h, x

    return step, lambda _: setattr(gain, "bias", 2.0), "`gain.bias` is set, and was not"


def attribute_of_a_tensor() -> Case:
    w = torch.ones(2)
    w.scale = 0.5  # type: ignore[attr-defined]
    return lambda h, x: (h * w * w.scale, x), lambda _: setattr(w, "scale", 2.0), "`w.scale` is 2.0, and was 0.5"


def missing_attribute_of_a_tensor() -> Case:
    w = torch.ones(2)
    step = lambda h, x: (h * w * getattr(w, "scale", 1.0), x)  # noqa: E731
    return step, lambda _: setattr(w, "scale", 2.0), "`w.scale` is set, and was not"


def global_that_hides_a_builtin() -> Case:
    change = lambda m: m.setitem(globals(), "max", min)  # noqa: E731
    return lambda h, x: (h * max(1, 2), x), change, "`max` is set, and was not"


def builtin() -> Case:
    change = lambda m: m.setattr(builtins, "max", min)  # noqa: E731
    return lambda h, x: (h * max(1, 2), x), change, "`max` is another builtin_function_or_method than"


def constant_of_a_library() -> Case:
    return lambda h, x: (h * math.pi, x), lambda m: m.setattr(math, "pi", 3.0), "`math.pi` is 3.0, and was 3.14"


def function_of_torch() -> Case:
    change = lambda m: m.setattr(nn.functional, "relu", twice)  # noqa: E731
    return lambda h, x: (nn.functional.relu(h), x), change, "`nn.functional.relu` is another function than"


CASES = [
    method, static_method, attribute_of_a_class, method_of_a_class_below, method_of_a_module, forward_of_a_module,
    forward_of_a_module_of_torch, class_of_a_module, all_attributes, all_parameters, missing_attribute,
    missing_attribute_asked_for, missing_attribute_tried, attribute_of_a_tensor, missing_attribute_of_a_tensor,
    global_that_hides_a_builtin, builtin, constant_of_a_library, function_of_torch,
]  # fmt: skip


@pytest.mark.parametrize("make", CASES)
def test_what_is_set_later_is_found(make: Callable[[], Case]) -> None:
    step, change, sentence = make()
    guard = guarded(step)
    with pytest.MonkeyPatch.context() as patch:
        change(patch)
        found = guard.changed()
    assert found is not None
    assert found.startswith(sentence)
    assert found.endswith(WHEN)
