"""The guard of a compiled step: what the step's Python code reads besides its arguments, compared at each call."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, is_, itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .absences import KeptAbsences
from .objects import described, form, item_path, redescribed, same, told
from .reading import Reads
from .rebinding import Rebinding

__all__ = ["Guard"]


class _Check(NamedTuple):
    """Values that are compared at once: `read(holder)` is a tuple like `values`, each of which `names` names.

    keys: those of a namespace; or the name of a container, whose number of items may change.
    """

    read: Callable[[Any], tuple[Any, ...]]
    holder: Any
    values: tuple[Any, ...]
    names: tuple[str, ...]
    keys: tuple[str, ...] | str


@dataclass(frozen=True, eq=False, repr=False)
class Guard:
    """The guard of a compiled step: it tells when the step itself would no longer do what it did when it was traced.

    A traced step is not called any more. So whatever its code reads besides `(carry, x)` is found once, by `of`, in
    its bytecode and in the objects that the code reaches, and compared at each call by `changed`: closures, globals,
    defaults, attributes that the code reads by name, items of lists, sets and dictionaries, small NumPy
    arrays; of modules the parameters, buffers, submodules, hooks and training flags; of tensors the shape, strides,
    dtype, device and requires_grad, but not their values, which the traced step reads as the step does. Functions that
    the code calls are read likewise, those of torch, NumPy and the standard library excepted. Where a name was looked
    up in vain, on the way to where it was found or at all (`Absences`), it must not have been set since.

    captured: the tensors of the traced graph. obstacle: why the step must be run itself, or None: its code changes what
    outlives the call (a variable of its closure, a global, an attribute or an item of what it has captured), gives
    other values at each call, or cannot be read.

    No guard can see:

    - state of objects made in C, of queues and such of the standard library, or behind weak references; a container
      changed by a library's function (`heapq.heappush`);
    - what a function changes that came to it by `*args`, or is a part of what it was given or of a call's result;
    - that Python read a captured tensor's value (`if w.sum() > 0`, `float(w)`) while the step was traced: whoever
      traces must refuse that; here only the names `item`, `tolist` and `numpy` are seen, and tensors of one element
      that need no gradient and are not in the graph are compared by value;
    - warnings, and settings of torch: autocast, grad mode, default dtype and device, determinism, hooks of all modules;
    - what `id` gives for an object that is another at each call.

    And it may see more than the step depends on: branches that are not taken are read as well, and an object that is
    passed on counts with all attributes whose names any code of the step mentions. Of a module that is called, every
    parameter, buffer, submodule and training flag counts.

    A guard holds what it compares, and so keeps an object that has been replaced until the guard itself is dropped.

    >>> import torch
    >>> scale, cell = [0.5], torch.nn.RNNCell(2, 3)
    >>> def step(h, x):
    ...     h = cell(x, h * scale[0])
    ...     return h, h
    >>> guard = Guard.of(step, list(cell.parameters()))
    >>> print(guard.obstacle, guard.paths, guard.changed())
    None ('cell.weight_ih', 'cell.weight_hh', 'cell.bias_ih', 'cell.bias_hh') None
    >>> scale[0] = 0.25
    >>> guard.changed()
    '`scale[0]` is 0.25, and was 0.5 when the step was traced'
    """

    step: Callable[..., Any]
    captured: tuple[Tensor, ...]
    obstacle: str | None
    _checks: tuple[_Check, ...]
    _empty: tuple[_Check, ...]
    _emptied: tuple[Any, ...]
    _tensors: tuple[tuple[str, Tensor, tuple[Any, ...]], ...]
    _flags: tuple[tuple[str, Tensor, int, Tensor], ...]
    _arrays: tuple[tuple[str, np.ndarray[Any, Any], tuple[Any, ...]], ...]
    _holders: Mapping[int, set[int]]
    _lanes: frozenset[int]
    _absences: KeptAbsences
    _computed: tuple[tuple[nn.Module, tuple[str, ...]], ...] = ()

    @classmethod
    def of(cls, step: Callable[..., Any], captured: Sequence[Tensor], lanes: Sequence[bool] = ()) -> Guard:
        """The guard of a step `(carry, x) -> (carry, y)` as it is now. captured: the tensors in its traced graph.

        lanes: which of them have a row for each lane: another in the place of such a one may have more or fewer.
        """
        reads = Reads.of(step)
        checks = [*_namespaces(reads), *_containers(reads)]
        empty = tuple(check for check in checks if not check.values)
        unreached = [t for t in captured if id(t) not in reads.tensors]
        names = tuple(f"a captured {str(t.dtype).removeprefix('torch.')} tensor {list(t.shape)}" for t in unreached)
        tensors = [(f"`{path}`", t) for path, t in reads.tensors.values()] + list(zip(names, unreached, strict=True))
        in_graph = {id(t) for t in captured}
        flags = [(name, t) for name, t in tensors if id(t) not in in_graph and _may_decide(t)]
        return cls(
            step=step,
            captured=tuple(captured),
            obstacle=reads.obstacle,
            _checks=tuple(check for check in checks if check.values),
            _empty=empty,
            _emptied=tuple(check.holder for check in empty),
            _tensors=tuple((name, t, described(t)) for name, t in tensors),
            _flags=tuple((name, t, t._version, t.detach().clone()) for name, t in flags),
            _arrays=tuple((f"`{path}`", array, _bytes(array)) for path, array in reads.arrays.values()),
            _holders={id(t): reads.holders.get(id(t), set()) for t in captured},
            _lanes=frozenset(id(t) for t, own in zip(captured, lanes, strict=False) if own),
            _absences=reads.absences.kept(),
            _computed=tuple(reads.computed),
        )

    def restoring(self) -> Callable[[], None]:
        """What puts attributes that hooks of torch compute, as a normed weight, back to what they are now."""
        kept = [(vars(module), name, vars(module).get(name)) for module, names in self._computed for name in names]

        def restore() -> None:
            for own, name, value in kept:
                if name in own:
                    own[name] = value

        return restore

    @property
    def paths(self) -> tuple[str | None, ...]:
        """Of each captured tensor the expression by which the step's code reaches it; None where none was found.

        Whether another tensor has taken the place of such a one cannot be told.
        """
        found = {id(t): name[1:-1] if name.startswith("`") else None for name, t, _ in self._tensors}
        return tuple(found[id(t)] for t in self.captured)

    @property
    def wrapped(self) -> bool:
        """Whether a tensor that the step reads is the wrapper of a transform of torch.func."""
        return any(torch._C._functorch.is_functorch_wrapped_tensor(t) for _, t, _ in self._tensors)

    def captured_by(self, step: Callable[..., Any]) -> tuple[Tensor, ...] | str:
        """The tensors that another step has in the places of `captured`; or what else differs, in a sentence.

        A lambda in a training loop is another function at each call, of the same code; and so is each `cell.step`
        another method. Such a step does what the traced one did if `changed` finds nothing, and if its closure,
        defaults and bound arguments hold the same objects, equal values, or other tensors of the same description.

        >>> def make(w):
        ...     return lambda h, x: (h * w, x)
        >>> guard = Guard.of(make(w := torch.ones(2)), [w])
        >>> guard.captured_by(make(torch.zeros(2)))
        (tensor([0., 0.]),)
        >>> guard.captured_by(make(torch.zeros(3)))
        '`w.shape` is (3,), and was (2,) when the step was traced'
        """
        if step is self.step:
            return self.captured
        rebinding = Rebinding(self._holders, self._lanes)
        difference = rebinding.difference(self.step, step, "step")
        return difference or tuple(rebinding.replacements.get(id(t), t) for t in self.captured)

    def changed(self) -> str | None:
        """What differs from when the step was traced, in a sentence; None where nothing does."""
        for check in self._checks:
            read, holder, values, _, _ = check
            try:
                now = read(holder)
            except (KeyError, AttributeError, ValueError):
                return f"{_gone(check)} is gone since the step was traced"
            # Most are the same objects, which takes one call to tell; else those of equal value count as the same.
            if (len(now) != len(values) or not all(map(is_, now, values))) and (difference := _difference(check, now)):
                return difference
        if any(self._emptied):
            return next(filter(None, (_difference(check, check.read(check.holder)) for check in self._empty)))
        for name, t, before in self._tensors:
            if form(t) != before[0] or (before[1] is not None and t.stride() != before[1]):
                return redescribed(name, before, described(t))
        if (found := self._absences.changed()) is not None:
            return found
        for name, t, version, value in self._flags:
            if t._version != version and not torch.equal(t, value):
                return f"{name} is {t.item()}, and was {value.item()} when the step was traced"
        for name, array, before in self._arrays:
            if _bytes(array) != before:
                return f"{name} has other values than when the step was traced"
        return None


# What is compared


def _may_decide(t: Tensor) -> bool:
    """Whether a tensor that is not in the graph may have been read as a number or a flag."""
    return t.numel() == 1 and not t.requires_grad and not t.is_inference()


def _namespaces(reads: Reads) -> Iterator[_Check]:
    for getter, kind in ((itemgetter, reads.entries), (attrgetter, reads.attributes)):
        for fields in kind.values():
            keys = (*fields.values, next(iter(fields.values)))  # two at least, so that a tuple comes
            values, names = (tuple(of[key] for key in keys) for of in (fields.values, fields.paths))
            yield _Check(getter(*keys), fields.holder, values, names, keys)


def _containers(reads: Reads) -> Iterator[_Check]:
    for path, container in reads.containers.values():
        whole = path.removesuffix(".")
        if isinstance(container, dict):
            items = [item_path(whole, key) if path != whole else f"{whole}[{key!r}]" for key in container]
            names = (*(f"`{item}`" for item in items), *[f"a key of `{whole}`"] * len(items))
            yield _Check(_entries, container, _entries(container), names, f"`{whole}`")
        else:
            ordered = isinstance(container, list | deque)
            names = tuple(f"`{path}[{i}]`" if ordered else f"an item of `{path}`" for i in range(len(container)))
            yield _Check(tuple, container, tuple(container), names, f"`{path}`")


def _entries(container: dict[Any, Any]) -> tuple[Any, ...]:
    return (*container.values(), *container)


def _bytes(array: np.ndarray[Any, Any]) -> tuple[Any, ...]:
    return array.tobytes(), array.shape, array.dtype


# What is said


def _difference(check: _Check, now: tuple[Any, ...]) -> str | None:
    """The first difference that is one of value, in a sentence."""
    if len(now) != len(check.values):
        each = 2 if check.read is _entries else 1
        before = len(check.values) // each
        return f"{check.keys} has {_items(len(now) // each)}, and had {before} when the step was traced"
    for value, before, name in zip(now, check.values, check.names, strict=True):
        if not same(value, before):
            return told(name, value, before)
    return None


def _gone(check: _Check) -> str:
    """The name of the first value that can no longer be read."""
    of = check.holder
    keys = zip(check.keys, check.names, strict=True)
    return next(name for key, name in keys if (key not in of if isinstance(of, dict) else not hasattr(of, key)))


def _items(n: int) -> str:
    return f"{n} item{'' if n == 1 else 's'}"
