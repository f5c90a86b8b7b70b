"""The guard of a compiled step: each kind of change is found and named, and nothing where nothing has changed."""

import functools
import operator
import types
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bptt.steps.guard import Guard

from .guards import WHEN, guarded

scale = 1.0
gains = [1.0, 2.0]
table = {"gain": 1.0, "bias": 0.0}


def scaled(h: Tensor) -> Tensor:
    return h * scale


# Variables


def test_a_global(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = guarded(lambda h, x: (h * scale, x))
    monkeypatch.setitem(globals(), "scale", 2.0)
    assert guard.changed() == f"the global `scale` is 2.0, and was 1.0{WHEN}"
    monkeypatch.setitem(globals(), "scale", 1)
    assert guard.changed() == f"the global `scale` is 1, and was 1.0{WHEN}"
    monkeypatch.setitem(globals(), "scale", float("1.0"))
    assert guard.changed() is None
    monkeypatch.delitem(globals(), "scale")
    assert guard.changed() == "the global `scale` is gone since the step was traced"


def test_the_global_of_a_function_that_the_step_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = guarded(lambda h, x: (scaled(h) + x, x))
    monkeypatch.setitem(globals(), "scale", 2.0)
    assert guard.changed() == f"the global `scale` is 2.0, and was 1.0{WHEN}"


def test_a_function_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = guarded(lambda h, x: (scaled(h) + x, x))
    monkeypatch.setitem(globals(), "scaled", lambda h: h)
    assert guard.changed() == f"the global `scaled` is another function than{WHEN}"


def test_a_variable_of_the_closure() -> None:
    rate = 0.5

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return h * rate + x, h

    guard = guarded(step)
    rate = 0.25
    assert guard.changed() == f"`rate` is 0.25, and was 0.5{WHEN}"
    rate = float("nan")
    guard = guarded(step)
    rate = float("nan") * 1
    assert guard.changed() is None
    rate = -0.0
    guard = guarded(step)
    rate = 0.0
    assert guard.changed() == f"`rate` is 0.0, and was -0.0{WHEN}"


def test_a_variable_of_a_function_inside() -> None:
    rate = 0.5

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        decay = torch.exp(x)

        def leak(u: Tensor) -> Tensor:
            return u * rate * decay

        return leak(h), [leak(u) + scale for u in (h, x)]

    guard = guarded(step)
    rate = 0.25
    assert guard.changed() == f"`rate` is 0.25, and was 0.5{WHEN}"


def test_defaults() -> None:
    def step(h: Tensor, x: Tensor, k: float = 1.0, *, options: dict[str, float] = table, b: int = 2) -> Any:
        return h * k + options["bias"] * b, x

    guard = guarded(step)
    step.__kwdefaults__["b"] = 3
    assert guard.changed() == f"the default of `b` is 3, and was 2{WHEN}"
    step.__kwdefaults__["b"] = 2
    step.__defaults__ = (2.0,)
    assert guard.changed() == f"`step.__defaults__` is (2.0,), and was (1.0,){WHEN}"


def test_other_code() -> None:
    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return h + x, h

    guard = guarded(step)
    step.__code__ = (lambda h, x: (h - x, h)).__code__
    assert guard.changed() == f"`step.__code__` is another code than{WHEN}"


# Objects


@dataclass
class Config:
    scale: float = 1.0
    unread: int = 0
    gains: list[float] = field(default_factory=lambda: [1.0, 2.0])
    inner: Any = None


class Slots:
    __slots__ = ("rate",)

    def __init__(self) -> None:
        self.rate = 0.5


def test_a_configuration() -> None:
    config = Config(inner=Config())
    guard = guarded(lambda h, x: (h * config.scale + config.inner.gains[1], x))
    config.unread = 1
    assert guard.changed() is None
    config.scale = 2.0
    assert guard.changed() == f"`config.scale` is 2.0, and was 1.0{WHEN}"
    config.scale = 1.0
    config.inner.gains[1] = 3.0
    assert guard.changed() == f"`config.inner.gains[1]` is 3.0, and was 2.0{WHEN}"
    config.inner.gains.append(0.0)
    assert guard.changed() == f"`config.inner.gains` has 3 items, and had 2{WHEN}"
    config.inner = Config()
    assert guard.changed() == f"`config.inner` is another Config than{WHEN}"


def test_an_object_passed_on_or_found_by_name() -> None:
    def read(given: Any, name: str) -> Any:
        return getattr(given, name)

    config = Config()
    for step in (lambda h, x: (h * read(config, "scale"), x), lambda h, x: (h * [config][0].scale, x)):
        config.scale = 1.0
        guard = guarded(step)
        config.scale = 2.0
        assert guard.changed() == f"`config.scale` is 2.0, and was 1.0{WHEN}"


def test_an_object_reached_on_one_of_several_ways() -> None:
    first, second, third = Config(), Config(), Config()
    flag = True

    def chosen() -> Config:
        return third

    def ternary(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        config = first if flag else second
        return h * config.scale * chosen().scale, x

    def loop(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        config = first
        for one in [second, third]:
            h = h * config.scale
            config = one
        return h, x

    for step in (ternary, loop):
        for config, name in ((first, "first"), (second, "second"), (third, "third")):
            guard = guarded(step)
            config.scale = 2.0
            assert guard.changed() == f"`{name}.scale` is 2.0, and was 1.0{WHEN}"
            config.scale = 1.0


def test_attributes_of_modules_of_python_and_of_functions() -> None:
    settings: Any = types.ModuleType("settings")
    settings.rate = 0.5

    def helper(h: Tensor) -> Tensor:
        return h * helper.rate  # type: ignore[attr-defined]

    helper.rate = 1.0  # type: ignore[attr-defined]
    guard = guarded(lambda h, x: (helper(h) * settings.rate, x))
    settings.rate = 1.0
    assert guard.changed() == f"`settings.rate` is 1.0, and was 0.5{WHEN}"
    settings.rate = 0.5
    helper.rate = 2.0  # type: ignore[attr-defined]
    assert guard.changed() == f"`helper.rate` is 2.0, and was 1.0{WHEN}"


def test_attributes_read_by_names_that_are_not_in_the_code() -> None:
    class Private:
        _rate = 1.0

        def __init__(self) -> None:
            self._rate = 0.5

    private = Private()
    guard = guarded(lambda h, x: (h * getattr(private, "_" + "rate"), x))
    private._rate = 1.0
    assert guard.changed() == f"`private._rate` is 1.0, and was 0.5{WHEN}"

    config, get = Config(), operator.attrgetter("scale")
    for step in (
        lambda h, x: (h * get(config), x),
        lambda h, x: (h * operator.attrgetter("scale")(config), x),
        lambda h, x: (h * config.__dict__["scale"], x),
        lambda h, x: (h * vars(config)["scale"], x),
    ):
        config.scale = 1.0
        guard = guarded(step)
        config.scale = 2.0
        found = guard.changed()
        assert found is not None
        assert found.endswith(f" is 2.0, and was 1.0{WHEN}")


def test_attributes_of_classes_slots_and_properties() -> None:
    class Rates:
        shared = 1.0
        hidden = 2.0

        @property
        def doubled(self) -> float:
            return 2 * self.hidden

        @staticmethod
        def third() -> float:
            return table["gain"] / 3

        @classmethod
        def half(cls) -> float:
            return cls.shared / 2

    rates, slots = Rates(), Slots()
    guard = guarded(lambda h, x: (h * rates.shared * rates.doubled * slots.rate * rates.third() * rates.half(), x))
    rates.shared = 2.0
    assert guard.changed() == f"`rates.shared` is 2.0, and was 1.0{WHEN}"
    del rates.shared
    assert guard.changed() is None
    rates.hidden = 1.0
    assert guard.changed() == f"`rates.hidden` is 1.0, and was 2.0{WHEN}"
    del rates.hidden
    slots.rate = 1.0
    assert guard.changed() == f"`slots.rate` is 1.0, and was 0.5{WHEN}"


def test_a_method_and_a_callable_object() -> None:
    class Recurrence:
        def __init__(self) -> None:
            self.rate, self.unread = 0.5, 0

        def leak(self, h: Tensor) -> Tensor:
            return h * self.rate

        def __call__(self, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.leak(h) + x, h

    for method in (False, True):
        recurrence = Recurrence()
        guard = guarded(recurrence.__call__ if method else recurrence)
        recurrence.unread = 1
        assert guard.changed() is None
        recurrence.rate = 0.25
        found = guard.changed()
        assert found is not None
        assert found.endswith(f".rate` is 0.25, and was 0.5{WHEN}")


def test_a_partial() -> None:
    def step(rates: list[float], h: Tensor, x: Tensor, *, k: float) -> tuple[Tensor, Tensor]:
        return h * rates[0] * k, x

    rates = [0.5]
    bound = functools.partial(step, rates, k=1.0)
    guard = guarded(bound)
    rates[0] = 0.25
    assert guard.changed() == f"`step.args[0][0]` is 0.25, and was 0.5{WHEN}"
    rates[0] = 0.5
    bound.keywords["k"] = 2.0
    assert guard.changed() == f"`step.keywords['k']` is 2.0, and was 1.0{WHEN}"


def test_wrapped_functions() -> None:
    rate = 0.5

    @torch.no_grad()
    def decay(h: Tensor) -> Tensor:
        return h * rate

    @functools.lru_cache
    def power() -> float:
        return rate**2

    for step in (lambda h, x: (decay(h) + x, x), lambda h, x: (h * power(), x)):
        rate = 0.5
        guard = guarded(step)
        rate = 0.25
        assert guard.changed() == f"`rate` is 0.25, and was 0.5{WHEN}"


def test_containers() -> None:
    seen, nested = {1, 2}, [{"a": (1, 2)}]
    guard = guarded(lambda h, x: (h * table["gain"] * gains[0] * len(seen) + sum(nested[0]["a"]), x))
    seen.add(3)
    assert guard.changed() == f"`seen` has 3 items, and had 2{WHEN}"
    seen.remove(3)
    nested[0]["a"] = (1, 3)
    assert guard.changed() == f"`nested[0]['a']` is (1, 3), and was (1, 2){WHEN}"
    nested[0]["a"] = (int("1"), 2)
    assert guard.changed() is None
    nested[0]["b"] = (0,)
    assert guard.changed() == f"`nested[0]` has 2 items, and had 1{WHEN}"


def test_an_empty_container_filled() -> None:
    extra: list[float] = []
    guard = guarded(lambda h, x: (h + sum(extra), x))
    extra.append(1.0)
    assert guard.changed() == f"`extra` has 1 item, and had 0{WHEN}"


def test_arrays() -> None:
    array, large, frozen = np.zeros(3), np.zeros(2000), np.zeros(2000)
    guard = guarded(lambda h, x: (h + array[0], x))
    array[1] = 1.0
    assert guard.changed() == f"`array` has other values than{WHEN}"
    obstacle = Guard.of(lambda h, x: (h + large[0], x), ()).obstacle
    assert obstacle is not None
    assert obstacle.startswith("`large` is a NumPy array of 2000 elements, of which at most 1000 are compared")
    frozen.setflags(write=False)
    guarded(lambda h, x: (h + frozen[0], x))
