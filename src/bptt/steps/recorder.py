"""A recorder of operations: a graph of aten operations without side effects, from whatever torch is asked to do.

Writes to a tensor become new values: of the tensor, of what it is a view of, and, when they are read again, of the
other views. So a graph never reads a value that was overwritten.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves, tree_map_only

from .canonical import RULES, by_row, solved, taken_apart, without_write
from .draws import filling, memory_order, normal_parts
from .kinds import KNOWN
from .known_tensors import Known, KnownTensors, is_captured, place
from .lines import current_line
from .truths import truths

__all__ = ["NotTraceable", "Recorder"]

aten = torch.ops.aten


class NotTraceable(Exception):  # noqa: N818  it says what a step is, and is no fault
    """The reason why a step cannot be recorded as a graph.

    whatever_rows: it has nothing to do with what counts as a row. left: tensors of the trace that the step has kept.
    changing: the step does something else each time.
    """

    left: tuple[Tensor, ...] = ()
    changing = False

    def __init__(self, reason: str, whatever_rows: bool = False) -> None:
        super().__init__(reason)
        self.whatever_rows = whatever_rows


@dataclass(eq=False)
class Recorder(KnownTensors, TorchDispatchMode):
    """A mode in which operations run as they are asked for, and are recorded. Use it as a context.

    draws: what random numbers are drawn, in order: placeholders, whose "filling" says what fills them; probabilities:
    of each number of a draw. branches: a value of truths, "all" or "any", and whether that held, for each branch.
    checks: truths that all had this value. asked: the operations that torch was asked for, a view as half of one.
    reason: why what was recorded is no graph.
    """

    draws: list[Node] = field(default_factory=list)
    probabilities: list[Node | None] = field(default_factory=list)
    branches: list[tuple[Node, str, bool]] = field(default_factory=list)
    checks: list[tuple[Node, bool]] = field(default_factory=list)
    asked: float = 0.0
    reason: str | None = None
    _apart: list[Any] = field(default_factory=list)  # operations that are being taken apart
    _inside: int = 0  # so many operations of which the present one is a part

    def __post_init__(self) -> None:
        super().__init__()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch would load its compiler for this

    @staticmethod
    def active() -> bool:
        """Whether a step is being recorded now."""
        return any(isinstance(mode, Recorder) for mode in _get_current_dispatch_mode_stack())

    # Operations -------------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._inside:
            self.asked += 0.5 if func.is_view else 1.0
        self._inside += 1
        try:
            return self._written_down(func, args, kwargs or {})
        finally:
            self._inside -= 1

    def _written_down(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if self.reason is not None:
            raise NotTraceable(self.reason)
        if torch.is_inference_mode_enabled():
            raise self.refused(f"it turns on inference mode ({_name(func)})")
        if torch.Tag.data_dependent_output in func.tags or func in _VALUES:
            if func is aten._local_scalar_dense.default and (value := self._branch(args[0])) is not None:
                return value
            raise self.refused(f"its Python code reads a value of a tensor ({_name(func)})")
        rule = RULES.get(func)
        if rule is not None:
            with self, torch._C.DisableTorchFunction():
                result = by_row(self, func, args)
                result = rule(*args, **kwargs) if result is None else result
            if result is not NotImplemented:
                if func is aten._linalg_check_errors.default:
                    self.checks.append(solved(self.graph, self.node(args[0])))
                return self._as_view(func, args, kwargs, result)
        if torch.Tag.nondeterministic_seeded in func.tags:
            return self._drawn(func, args, kwargs)
        if "batch_norm" in _name(func):
            raise self.refused(f"its rows depend on one another ({_name(func)} of a batch)")
        if torch.Tag.inplace_view in func.tags:
            return self._reshaped(func, args, kwargs)
        if func._schema.is_mutable:
            return self._written(func, args, kwargs)
        if func in _OF_MEMORY:
            return func(*args, **kwargs)
        if func not in KNOWN and func not in self._apart and (apart := taken_apart(func)) is not None:
            self._apart.append(func)
            try:
                with self, torch._C.DisableTorchFunction():
                    result = apart(*args, **kwargs)
            finally:
                self._apart.pop()
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if func is aten.lift_fresh.default:
            return self._constant(result)
        self._record(func, args, kwargs, result)
        return result

    def _as_view(self, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        """What a rule gives of an operation: still a view of its argument where torch's is one, though it copies."""
        base: Any = args[0] if args else None
        alias = func._schema.arguments[0].alias_info if args else None
        if alias is None or alias.is_write or not isinstance(result, Tensor) or not isinstance(base, Tensor):
            return result
        if not result.numel() or place(result) == place(base):
            return result
        self.node(base)
        view = func(*args, **kwargs)
        known = self.note(view, self.node(result))
        again = self._again(func, args, kwargs, base, view, None)
        known.view = self.known[id(base)], again, (func, self.call(func, args, kwargs).args, kwargs)
        return view

    def _branch(self, tensor: Tensor) -> bool | None:
        """The value on which Python code branches, where whole numbers of the carry alone decide it, or all of a tensor
        or nothing of it holds, which every call can look at; else None.
        """
        node = self.made(tensor)
        found = None if node is None else truths(node)
        if found is None:
            return None
        value = bool(aten._local_scalar_dense.default(tensor))
        given, kind, of_carry = found
        if of_carry:
            self.branches.append((given, kind, value))
        elif value == (kind == "all"):
            self.checks.append((given, value))
        else:
            return None
        return value

    def _record(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        outputs = [result] if isinstance(result, Tensor) else list(result) if isinstance(result, (tuple, list)) else []
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not outputs:
            raise self.refused(f"its Python code reads what {_name(func)} returns")
        node = self.call(func, args, kwargs)
        if not isinstance(result, Tensor):
            node.meta["tensors"] = [(t.shape, t.dtype) if isinstance(t, Tensor) else None for t in outputs]
        for i, output in enumerate(outputs):
            if not isinstance(output, Tensor):
                continue
            own = node
            if not isinstance(result, Tensor):
                own = self.graph.call_function(operator.getitem, (node, i))
            own.meta["tensor"] = output.shape, output.dtype
            known = self.note(output, own)
            base = next((t for t in tensors if place(t) == place(output)), None)
            if base is not None and base is not output and output.numel():
                again = self._again(func, args, kwargs, base, output, None if isinstance(result, Tensor) else i)
                known.view = self.known[id(base)], again, (func, node.args, kwargs)

    def _again(
        self, func: Any, args: Any, kwargs: Any, base: Tensor, output: Tensor, i: int | None
    ) -> Callable[[Node], Node]:
        """What makes the value of a view anew from the value of its base."""
        like = output.shape, output.dtype

        def apply(node: Node) -> Node:
            arguments = tree_map_only(Tensor, lambda t: node if t is base else self.node(t), (args, kwargs))
            made = self.graph.call_function(func, *_whole(func, *arguments))
            made.meta["line"] = node.meta.get("line")
            made = made if i is None else self.graph.call_function(operator.getitem, (made, i))
            made.meta["tensor"] = like
            return made

        return apply

    def call(self, func: Any, args: Any, kwargs: Any) -> Node:
        """Add an operation on tensors whose values are in the graph, or captured."""
        node = self.graph.call_function(func, *_whole(func, *tree_map_only(Tensor, self.node, (args, kwargs))))
        node.meta["line"] = current_line()
        return node

    def _drawn(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation that draws random numbers: they are given to the graph."""
        if any(isinstance(v, torch.Generator) for v in (*args, *kwargs.values())):
            raise self.refused(f"it draws random numbers from a generator of its own ({_name(func)})")
        parts = normal_parts(func, args)
        if parts is not None:
            mean, std, size, like = parts
            with self:
                noise = aten.normal.float_float(0.0, 1.0 if isinstance(std, Tensor) else std, size, dtype=like.dtype,
                                                device=like.device)  # fmt: skip
                noise = aten.mul.Tensor(noise, std) if isinstance(std, Tensor) else noise
                return aten.add.Tensor(noise, mean)
        found = filling(func, args, kwargs)
        if found is None:
            raise self.refused(f"it draws random numbers that cannot be drawn before it runs ({_name(func)})")
        fill, in_place, probability = found
        known = self._target(func, args) if in_place else None
        by = None if probability is None else self.node(probability)
        if probability is not None and not probability.is_contiguous():
            raise self.refused(f"it draws random numbers by a tensor that is not contiguous ({_name(func)})")
        result = func(*args, **kwargs)
        order = memory_order(result)
        if order is None:
            raise self.refused(f"it draws random numbers into a tensor with gaps in its memory ({_name(func)})")
        node = self.graph.placeholder(f"draw_{len(self.draws)}")
        node.meta |= {"filling": fill, "order": order, "device": result.device, "line": current_line()}
        node.meta["tensor"] = result.shape, result.dtype
        self.draws.append(node)
        self.probabilities.append(by)
        if known is None:
            self.note(result, node)
        else:
            self.write(known, node)
        return result

    def _reshaped(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation that makes its first argument a view of what it was: `squeeze_`, `t_` and such."""
        target: Tensor = args[0]
        known = self.known.get(id(target))
        packet = getattr(aten, func._schema.name.removeprefix("aten::").removesuffix("_"), None)
        overload = getattr(packet, func._overloadname, getattr(packet, "int", None))  # `transpose` has no other
        if known is None or overload is None:
            raise self.refused(f"it changes the shape of a tensor in place ({_name(func)})")
        with self:
            made = overload(*args, **kwargs)
        if place(made) != place(target):
            raise self.refused(f"it changes the shape of a tensor in place ({_name(func)})")
        func(*args, **kwargs)
        view = self.known[id(made)]
        before = replace(known)  # what it was: of which it is a view from now on, as others may be
        for other in known.memory.tensors:
            if other.view is not None and other.view[0] is known:
                other.view = before, *other.view[1:]
        known.node, known.view, known.read = view.node, view.view, view.read
        return target

    def _written(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation that writes to its first argument: a new value of that one."""
        known = self._target(func, args)
        target: Tensor = args[0]
        with self:
            made = without_write(func, target, args[1:], kwargs)
        if made is None:
            raise self.refused(f"it writes in place by {_name(func)}")
        value = self.node(made)
        func(*args, **kwargs)
        self.write(known, value)
        return target

    def _target(self, func: Any, args: Any) -> Known:
        """The first argument of an operation that writes to it."""
        target = args[0] if args else None
        if not isinstance(target, Tensor) or not func._schema.arguments[0].is_write:
            raise self.refused(f"{_name(func)} writes to a tensor it is given (out=)")
        if not self.knows(target):
            raise self.refused(f"it writes to a captured tensor {list(target.shape)} ({_name(func)})")
        if torch._debug_has_internal_overlap(target) == 1:
            raise self.refused("it writes to an expanded tensor")
        known = self.known[id(target)]
        base = known
        while base.view is not None:
            base = base.view[0]
        if is_captured(base.node):
            raise self.refused(f"it writes to a captured tensor {list(base.tensor.shape)} ({_name(func)})")
        return known

    def _constant(self, tensor: Tensor) -> Tensor:
        """A tensor made of Python values inside of the step: the same at every call."""
        if tensor.numel() != 1:
            node = self.graph.placeholder(f"constant_{len(self.captured)}")
            node.meta["constant"] = True
            self.captured.append((tensor, node))
        else:
            node = self.graph.call_function(aten.full.default, (list(tensor.shape), tensor.item()),
                                            {"dtype": tensor.dtype, "device": tensor.device})  # fmt: skip
        node.meta["tensor"] = tensor.shape, tensor.dtype
        self.note(tensor, node)
        return tensor

    def refused(self, reason: str) -> NotTraceable:
        """The reason why what was recorded is no graph, with the line: to raise."""
        line = current_line()
        self.reason = reason if line is None else f"{reason}, at {line}"
        return NotTraceable(self.reason, whatever_rows=True)


_OF_MEMORY = {aten._has_same_storage_numel.default}
"""Operations that say how tensors lie in memory, which is the same at every call."""

_VALUES = {aten.equal.default, aten.is_nonzero.default, aten._local_scalar_dense.default, aten.item.default}


def _whole(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Arguments of an operation, with those that torch leaves out where they have their defaults."""
    defaults = _DEFAULTS.get(func, ())
    return (*args, *defaults[len(args) - 1 :]), kwargs


_DEFAULTS: dict[Any, tuple[Any, ...]] = {aten.slice.Tensor: (0, None, None, 1), aten.cat.default: (0,)}
"""Of an operation, its arguments after the first."""


def _name(func: Any) -> str:
    return str(func).removesuffix(".default")
