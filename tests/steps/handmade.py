"""Steps split by hand: a core as a function of tensors becomes the graphs of a SplitStep; oracles that run them.

The core is traced with a number of rows unlike any dimension; that number in a graph becomes the rows it was.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from bptt.kernels.frames import Frames
from bptt.steps import Part, SplitStep, Value

ROWS = 97

Core = Callable[[list[Tensor], list[Tensor], list[Tensor]], tuple[list[Tensor], list[Tensor]]]
"""(carry, x, captured) -> (next carry, other values by row)."""

EMPTY = Part(Graph(), (), ())


def kind_of(x: Tensor) -> Value:
    if x.dim() and x.shape[0] and x.shape[0] % ROWS == 0:
        return Value(x.shape[0] // ROWS, tuple(x.shape[1:]), x.dtype)
    return Value(0 if ROWS not in x.shape else -1, tuple(x.shape), x.dtype)


aten = torch.ops.aten


def piece(node: Node, env: Mapping[Node, Node]) -> tuple[Any, tuple[Any, ...]]:
    """One of the results of a split, as a slice."""
    source, number = node.args
    x, sizes, dim = (*source.args, 0)[:3]
    sizes = [sizes] * (number + 1) if isinstance(sizes, int) else sizes
    start = sum(sizes[:number])
    return aten.slice.Tensor, (env[x], dim, start, start + node.meta["val"].shape[dim])


class Recorder(TorchDispatchMode):
    """A graph of the operations that run, each decomposed by a table. make_fx makes the same ten times as slowly."""

    def __init__(self, table: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.table, self.graph = table, Graph()
        self.known: dict[int, tuple[Tensor, Node]] = {}  # holds the tensors: none gets the identity of another

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch would load its compiler for this

    def record(self, function: Callable[..., list[Tensor]], inputs: Sequence[Tensor]) -> Graph:
        """The graph of a function of tensors, each of whose values is `meta["val"]` of a node."""
        inputs = [x.detach() for x in inputs]
        for i, x in enumerate(inputs):
            self.note(x, self.graph.placeholder(f"input_{i}"))
        with self:
            outputs = function(*inputs)
        self.graph.output(tuple(self.known[id(x)][1] for x in outputs))
        self.graph.eliminate_dead_code()
        return self.graph

    def note(self, x: Tensor, node: Node) -> None:
        node.meta["val"] = x
        self.known[id(x)] = x, node

    def written(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """What a tensor is after a write to it: another value."""
        into: Tensor = args[0]
        name = func._schema.name.removeprefix("aten::").removesuffix("_")
        shared = [x for x, _ in self.known.values() if x.untyped_storage()._cdata == into.untyped_storage()._cdata]
        assert all(x is into for x in shared), "a tensor is written to of which there are views"
        if func is aten.copy_.default and into.shape == args[1].shape and into.dtype == args[1].dtype:
            self.known[id(into)] = into, self.known[id(args[1])][1]
        else:
            pure = getattr(getattr(aten, name), func._overloadname)
            self.note(into, self.graph.call_function(pure, *self.nodes(args, kwargs)))
        return into

    def nodes(self, args: Any, kwargs: Any) -> Any:
        return tree_map_only(Tensor, lambda x: self.known[id(x)][1], (args, kwargs))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            result = self.table[func](*args, **kwargs) if func in self.table else NotImplemented
            result = func.decompose(*args, **kwargs) if result is NotImplemented else result
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        if func._schema.is_mutable:
            return self.written(func, args, kwargs)
        node = self.graph.call_function(func, *self.nodes(args, kwargs))
        if isinstance(result, Tensor):
            self.note(result, node)
        else:
            for i, x in enumerate(result):
                self.note(x, self.graph.call_function(operator.getitem, (node, i)))
        return result


@cache
def decompositions() -> dict[Any, Callable[..., Any]]:
    """Those to core aten, but for the derivatives that the interpreter has instructions for."""
    table = core_aten_decompositions()
    table.pop(aten.tanh_backward.default, None)
    table.pop(aten.sigmoid_backward.default, None)
    return table


def part_of(
    function: Callable[..., list[Tensor]],
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    values: dict[str, Value],
    prefix: str,
    decompose: bool,
) -> Part:
    """The part that a function of tensors is; the kinds of its values are added to `values`."""
    traced = Recorder(decompositions() if decompose else {}).record(function, list(inputs.values()))
    graph, env = Graph(), {}
    rows = graph.placeholder("R")
    names = iter(inputs)

    def sized(x: Any) -> Any:
        if isinstance(x, Node):
            return env[x]
        if isinstance(x, (list, tuple)):
            return type(x)(sized(y) for y in x)
        if isinstance(x, int) and not isinstance(x, bool) and x and x % ROWS == 0:
            return rows if x == ROWS else graph.call_function(operator.mul, (rows, x // ROWS))
        return x

    for node in traced.nodes:
        if node.op == "placeholder":
            name = next(names)
            env[node] = graph.placeholder(name)
            values.setdefault(name, kind_of(node.meta["val"]))
        elif node.op == "output":
            results = [env[n] for n in node.args[0]]
            for name, n in zip(outputs, node.args[0], strict=True):
                values.setdefault(name, kind_of(n.meta["val"]))
            graph.output(tuple(results))
        elif node.target in (aten.split.Tensor, aten.split_with_sizes.default):
            continue
        else:
            assert node.op == "call_function", node.format_node()
            if node.target is operator.getitem:
                env[node] = graph.create_node("call_function", *piece(node, env), name=f"{prefix}{node.name}")
                values[env[node].name] = kind_of(node.meta["val"])
                continue
            args = tuple(sized(a) for a in node.args)
            kwargs = {k: v for k, v in node.kwargs.items() if k not in ("device", "pin_memory", "layout")}
            new = graph.create_node("call_function", node.target, args, kwargs, name=f"{prefix}{node.name}")
            env[node] = new
            values[new.name] = kind_of(node.meta["val"])
    graph.lint()
    return Part(graph, tuple(inputs), tuple(outputs))


def split(
    core: Core,
    carry: Sequence[tuple[int, ...]],
    x: Sequence[tuple[int, ...]],
    captured: Sequence[Tensor] = (),
    *,
    summed: Sequence[int] = (),
    kept: int = 0,
    dtype: torch.dtype = torch.float64,
    decompose: bool = True,
    pull: Callable[..., list[Tensor]] | None = None,
    kept_for_pull: Sequence[int] = (),
) -> SplitStep:
    """A step whose adjoint core computes its forward values again, from the carry, x and what is captured.

    carry, x: the shapes of one row. summed: the captured tensors that get a gradient. kept: so many of the values by
    row besides the carry have no cotangent, and are for the tape alone. pull: another adjoint core, a function of the
    adjoints, the cotangents, the carry, captured tensors and of the values by row `kept_for_pull`.
    """
    values: dict[str, Value] = {}
    states = {f"h{i}": torch.rand(ROWS, *shape, dtype=dtype) * 0.5 + 0.25 for i, shape in enumerate(carry)}
    xs = {f"x{i}": torch.rand(ROWS, *shape, dtype=dtype) * 0.5 + 0.25 for i, shape in enumerate(x)}
    ws = {f"w{i}": w.detach().to(dtype) for i, w in enumerate(captured)}
    given = {**states, **xs, **ws}
    n, m = len(states), len(xs)

    def forward(*all_: Tensor) -> list[Tensor]:
        after, ys = core(list(all_[:n]), list(all_[n : n + m]), list(all_[n + m :]))
        return [*after, *ys]

    results = forward(*given.values())
    ys = results[n:]
    after = tuple(f"next{i}" for i in range(n))
    y_names = tuple(f"y{i}" for i in range(len(ys)))
    part = part_of(forward, given, (*after, *y_names), values, "f_", decompose)
    losses = len(ys) - kept
    lam = {f"lam{i}": torch.rand_like(r) for i, r in enumerate(results[:n])}
    dys = {f"dy{i}": torch.ones_like(y) for i, y in enumerate(ys[:losses])}

    def adjoint(*all_: Tensor) -> list[Tensor]:
        cotangents, rest = all_[: n + losses], [a.detach().requires_grad_() for a in all_[n + losses :]]
        with torch.enable_grad():
            outs = forward(*rest)[: n + losses]
        wanted = [*rest[: n + m], *(rest[n + m + i] for i in summed)]
        pairs = [(o, c) for o, c in zip(outs, cotangents, strict=True) if o.requires_grad]
        grads = torch.autograd.grad([o for o, _ in pairs], wanted, [c for _, c in pairs], allow_unused=True)
        return [torch.zeros_like(w) if g is None else g for g, w in zip(grads, wanted, strict=True)]

    back = tuple(f"back{i}" for i in range(n))
    sent = tuple(f"dx{i}" for i in range(m))
    sums = tuple(f"dw{i}" for i in summed)
    inputs = {**lam, **dys, **given}
    if pull is not None:
        inputs = {**lam, **dys, **states, **ws, **{y_names[i]: ys[i] for i in kept_for_pull}}
    pulled = part_of(pull or adjoint, inputs, (*back, *sent, *sums), values, "b_", decompose)
    return SplitStep(
        values=values, carry=tuple(states), x=tuple(xs), captured=tuple(ws), next=after, y=y_names,
        adjoints=tuple(lam), dys=tuple(dys), back=back, dx=sent, dcaptured=sums, constants=EMPTY, hoisted=EMPTY,
        forward=part, outputs=EMPTY, errors=EMPTY, adjoint=pulled, deferred=EMPTY,
        kept=y_names[losses:], owned=frozenset(dys), sent=sent, summed=sums,
    )  # fmt: skip


RUN: dict[int, tuple[Graph, GraphModule]] = {}
"""The graphs that were run, by identity, and their code: to write it takes longer than to run it."""


def run_part(part: Part, rows: int, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A part by torch operations."""
    if id(part.graph) not in RUN:
        RUN[id(part.graph)] = part.graph, GraphModule({}, part.graph)
    _, module = RUN[id(part.graph)]
    results = module(rows, *(values[name] for name in part.inputs))
    return dict(zip(part.outputs, results, strict=True))


def at(step: SplitStep, values: Mapping[str, Tensor], t: int, lanes: slice) -> dict[str, Tensor]:
    """The values of some lanes at a step."""
    found = {}
    for name, x in values.items():
        k = step.values[name].rows
        found[name] = x[t, lanes.start * k : lanes.stop * k] if k else x
    return found


def advance(
    step: SplitStep, values: Mapping[str, Tensor], carry: Sequence[Tensor], resets: Tensor | None, T: int,
    keep: Sequence[str],
) -> tuple[list[Tensor], dict[str, Tensor]]:  # fmt: skip
    """Stage 1 by torch operations, step by step."""
    B = len(carry[0]) // step.values[step.carry[0]].rows
    states, kept = [[c] for c in carry], {name: [] for name in keep}
    for t in range(T):
        now = [s[-1] for s in states]
        if resets is not None:
            closed = resets[t].expand(B)
            now = [torch.where(closed.repeat_interleave(len(s) // B).view(-1, *[1] * (s.dim() - 1)), 0, s) for s in now]
        out = run_part(step.forward, B, at(step, values, t, slice(0, B)) | dict(zip(step.carry, now, strict=True)))
        for s, name in zip(states, step.next, strict=True):
            s.append(out[name])
        for name in keep:
            kept[name].append(out[name])
    return [torch.stack(s) for s in states], {name: torch.stack(x) for name, x in kept.items()}


def sweep(
    step: SplitStep, values: Mapping[str, Tensor], frames: Frames, arriving: Sequence[Tensor | None],
    edge_factors: Tensor | None, leaving: bool,
) -> tuple[dict[str, Tensor], list[Tensor | None]]:  # fmt: skip
    """Stage 3 by torch operations, column by column, step by step."""
    T, B = frames.T, frames.B
    dtype = step.values[step.carry[0]].dtype
    found = {}
    for name in (*step.sent, *step.summed):
        kind = step.values[name]
        found[name] = torch.zeros((T, B * kind.rows, *kind.shape) if kind.rows else kind.shape, dtype=dtype)
    N = len(frames.start)
    lam = {a: torch.zeros(N, step.values[a].rows, *step.values[a].shape, dtype=dtype) for a in step.adjoints}
    factors = None if edge_factors is None else edge_factors.expand(T, B)
    for r in range(frames.R - 1, -1, -1):
        t = frames.start + r
        walks = (t <= frames.top).nonzero()[:, 0]
        t, lane = t[walks], frames.lane[walks]
        own = (frames.first[walks] <= t) & (t <= frames.last[walks])
        begins = (t == frames.top[walks]) & (frames.arrives[walks] >= 0)
        now = {}
        for name, x in values.items():
            k = step.values[name].rows
            if k:
                x = x.view(T, B, k, *x.shape[2:])[t, lane]
                x = x if name not in step.owned else torch.where(own.view(-1, *[1] * (x.dim() - 1)), x, 0)
            now[name] = x.flatten(0, 1) if k else x
        for name, a in zip(step.adjoints, arriving, strict=True):
            k = step.values[name].rows
            if a is not None:
                lam[name][walks[begins]] = a.view(-1, k, *a.shape[1:])[frames.arrives[walks[begins]]]
            now[name] = lam[name][walks].flatten(0, 1)
        out = run_part(step.adjoint, len(walks), now)
        for name in step.sent:
            k = step.values[name].rows
            into, x = found[name].view(T, B, k, *found[name].shape[2:]), out[name].view(-1, k, *out[name].shape[1:])
            into.index_put_((t, lane), x, accumulate=True)
        for name in step.summed:
            found[name] += out[name]
        for name, sent in zip(step.adjoints, step.back, strict=True):
            x = out[sent].view(len(walks), -1, *out[sent].shape[1:])
            if factors is not None:
                f = factors[t, lane].view(-1, *[1] * (x.dim() - 1))
                x = torch.where(f == 0, 0, x * f)
            lam[name][walks] = x
    return found, [x.flatten(0, 1) for x in lam.values()] if leaving else [None] * len(lam)
