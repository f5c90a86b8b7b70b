"""Random steps, as the text of a Python function: drawn instruction by instruction, for tests of compiled steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor

__all__ = ["RandomStep", "drawn"]

Leaves = list[Tensor]
SIZES = [1, 2, 3, 4, 6]

UNARY = [
    "torch.tanh({})", "torch.sigmoid({})", "torch.sin({})", "torch.cos({})", "torch.exp(-{}.abs())", "{} * {}",
    "torch.log1p({} ** 2)", "F.softplus({})", "torch.relu({} + 0.13)", "F.gelu({})", "F.silu({})", "F.elu({} - 0.21)",
    "F.leaky_relu({} + 0.31)", "torch.sqrt({} ** 2 + 1)", "torch.rsqrt({} ** 2 + 0.5)", "1 / ({} ** 2 + 1)", "-{}",
    "torch.erf({})", "torch.expm1(torch.tanh({}))", "{}.clamp(-0.71, 0.83)", "F.logsigmoid({})", "{} ** 3 * 0.1",
    "2 - {}", "{} / 3", "0.7 * {} + 0.1", "{}.abs() * 0.5", "{}.detach()", "F.hardtanh({} * 0.7)",
    "{}.clamp_min(-0.37)", "torch.reciprocal(2 + torch.tanh({}))", "{}.clone()", "F.gelu({}, approximate='tanh')",
    "torch.atan({})", "F.softplus({}, beta=2)", "F.mish({})", "{}.square() * 0.2", "torch.zeros_like({}) + 0.3",
    "torch.log(1.5 + torch.cos({}))", "{}.exp().log1p()", "torch.sign({} + 0.17) * 0.1",
]  # fmt: skip
"""Functions of one value, element by element."""

BINARY = [
    "{} + {}", "{} - {}", "{} * {}", "{} / (1 + {} ** 2)", "torch.maximum({}, {} + 0.07)",
    "torch.minimum({}, {} - 0.09)",
    "torch.where({} > 0.113, {}, -0.4)", "torch.lerp({}, {}, 0.3)", "torch.add({}, {}, alpha=0.5)",
    "torch.hypot({}, {} + 2)",
    "{}.masked_fill({} < -0.217, 0.25)", "torch.where(({0} > 0.1719) & ({1} < 0.4413), {0}, {1})",
    "torch.addcmul({0}, {0}, {1}, value=0.3)",
    "torch.where(({0} <= 0.3917) | ({1} >= 0.2031), {1}, {0} * 0.5)", "{} * ({} > 0.0517)",
    "torch.sub({}, {}, alpha=2)",
    "torch.where({} != 0.1237, {}, 1.0)", "({0} > {1} + 0.0371).to({0}.dtype) * {1}",
]  # fmt: skip
"""Functions of two values that are broadcast against one another."""

REDUCE = [
    "{}.sum({})", "{}.mean({})", "{}.amax({})", "{}.amin({})", "{}.sum({}, keepdim=True)", "{}.mean({}, keepdim=True)",
    "{}.var({}, unbiased=False)", "torch.logsumexp({}, {})", "{}.amax({}, keepdim=True)", "({} + 0.1).norm(dim={})",
    "{}.max({}).values", "({} + 2).std({}, unbiased=False, keepdim=True)", "{}.prod({})",
]  # fmt: skip
"""Reductions of one dimension."""

ALONG = ["F.softmax({}, {})", "F.log_softmax({}, {})", "{}.cumsum({})", "{}.flip({})", "torch.roll({}, 1, {})",
         "F.normalize({} + 0.3, dim={})"]  # fmt: skip
"""Functions along one dimension that keep it."""

BOUND = ["torch.tanh({})", "0.8 * torch.sin({})", "{0} / (1 + {0}.abs())", "torch.sigmoid({})", "{}.clamp(-0.93, 0.87)",
         "torch.tanh({}) * 0.5 + 0.5 * {old}"]  # fmt: skip
"""What keeps a carry bounded."""


@dataclass(frozen=True)
class RandomStep:
    """A random step on lists of tensors, with its arguments.

    text: the Python code. captured: of the name of each captured tensor the tensor. lanes: names of those with a row
    for each lane.
    """

    text: str
    carry: Leaves
    xs: Leaves
    captured: dict[str, Tensor]

    @property
    def step(self) -> Callable[[Leaves, Leaves], tuple[Leaves, Leaves]]:
        """The function."""
        namespace: dict[str, Any] = {"torch": torch, "F": torch.nn.functional, **self.captured}
        exec(compile(self.text, "<random step>", "exec"), namespace)
        return namespace["step"]  # type: ignore[no-any-return]


@dataclass
class _Writer:
    """What has been written of a step so far. values: by name, on B rows; rows: names of those that have rows."""

    random: Random
    B: int
    values: dict[str, Any] = field(default_factory=dict)
    rows: list[str] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)
    captured: dict[str, Tensor] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    count: int = 0

    def tensor(self, *shape: int, grad: bool | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(self.random.randrange(10**6))
        t = torch.randn(list(shape), generator=generator, dtype=torch.float64) * 0.7
        return t.requires_grad_(self.random.random() < 0.8 if grad is None else grad)

    def capture(self, *shape: int) -> str:
        name = f"w{len(self.captured)}"
        self.captured[name] = self.values[name] = self.tensor(*shape)
        return name

    def run(self, line: str) -> None:
        space = {"torch": torch, "F": torch.nn.functional}
        with torch.no_grad():
            exec(line, space, self.values)
        self.lines.append(line)

    def let(self, expression: str, rows: bool = True) -> str:
        """Give an expression a name."""
        name = f"v{self.count}"
        self.count += 1
        self.run(f"{name} = {expression}")
        (self.rows if rows else self.shared).append(name)
        return name

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.values[name].shape)

    def pick(self, least: int = 1, most: int = 9) -> str | None:
        """A value with rows, of some number of dimensions; later ones are likelier."""
        found = [n for n in self.rows if least <= len(self.shape(n)) <= most]
        return None if not found else found[-1 - int(len(found) * self.random.random() ** 2)]

    def of_shape(self, shape: Sequence[int]) -> str:
        """A value with rows that can be broadcast to a shape."""

        def fits(n: str) -> bool:
            own = self.shape(n)
            return len(own) == len(shape) and all(a in (1, b) for a, b in zip(own[1:], shape[1:], strict=True))

        return self.random.choice([n for n in self.rows if fits(n)])


def _unary(w: _Writer) -> None:
    name, form = w.pick(), w.random.choice(UNARY)
    w.let(form.format(*[name] * form.count("{}")))


def _binary(w: _Writer) -> None:
    a = w.pick()
    assert a is not None
    b, form = w.of_shape(w.shape(a)), w.random.choice(BINARY)
    if w.random.random() < 0.3:
        a, b = b, a
    w.let(form.format(a, b))


def _with_shared(w: _Writer) -> None:
    """A value and a captured tensor, broadcast along the last dimensions."""
    a = w.pick()
    assert a is not None
    own = w.shape(a)
    kind = w.random.randrange(5)
    if kind == 0:
        b = w.capture(*[s if w.random.random() < 0.7 else 1 for s in own])  # a row for each lane, or for all of them
    elif kind == 1 and w.shared:
        fitting = [n for n in w.shared if len(w.shape(n)) < len(own)
                   and all(x in (1, y) for x, y in zip(w.shape(n)[::-1], own[::-1], strict=False))]  # fmt: skip
        b = w.random.choice(fitting) if fitting else w.capture()
    else:
        last = own[len(own) - w.random.randrange(len(own)) :]
        b = w.capture(*[s if w.random.random() < 0.8 else 1 for s in last])
        if w.random.random() < 0.3:
            b = w.let(w.random.choice(UNARY[:4]).format(b), rows=False)
    form = w.random.choice(BINARY)
    w.let(form.format(*((b, a) if w.random.random() < 0.3 else (a, b))))


def _product(w: _Writer) -> None:
    a = w.pick(2, 3)
    if a is None:
        return
    n, m = w.shape(a)[-1], w.random.choice(SIZES)
    kind = w.random.randrange(7)
    if kind < 2:
        w.let(f"0.6 * {a} @ {w.capture(n, m)}")
    elif kind == 2:
        w.let(f"F.linear({a}, {w.capture(m, n)}, {w.capture(m)})")
    elif kind == 3:
        w.let(f"{a} @ {w.capture(m, n)}.t() * 0.5")
    elif kind == 4:
        w.let(f"F.linear({a}, {w.capture(m, n)})")
    elif kind == 5 and len(w.shape(a)) == 2:
        w.let(
            f"{a} @ {w.capture(n)}"
            if w.random.random() < 0.5
            else f"torch.addmm({w.capture(m)}, {a}, {w.capture(n, m)}, alpha=0.5)"
        )
    elif len(w.shape(a)) == 3:
        w.let(
            w.random.choice(
                [f"torch.bmm({a}, {a}.transpose(1, 2)) * 0.2", f"torch.einsum('bij,jk->bik', {a}, {w.capture(n, m)})"]
            )
        )
    else:
        b = w.pick(2, 2)
        w.let(w.random.choice([f"torch.einsum('bi,bj->bij', {a}, {b})", f"{a}.unsqueeze(2) * {b}.unsqueeze(1)"]))


def _norm(w: _Writer) -> None:
    a = w.pick(2)
    if a is None:
        return
    n = w.shape(a)[-1]
    affine = w.random.random() < 0.6
    w.let(f"F.layer_norm({a}, ({n},), {w.capture(n)}, {w.capture(n)})" if affine else f"F.layer_norm({a}, ({n},))")


def _reduce(w: _Writer) -> None:
    a = w.pick(2)
    if a is None:
        return
    rank = len(w.shape(a))
    dim = w.random.randrange(1, rank)
    w.let(w.random.choice(REDUCE if w.random.random() < 0.6 else ALONG).format(a, w.random.choice([dim, dim - rank])))


def _view(w: _Writer) -> None:
    a = w.pick(2)
    if a is None:
        return
    own = w.shape(a)
    dim = w.random.randrange(1, len(own))
    size = own[dim]
    start = w.random.randrange(size)
    end = w.random.randrange(start, size) + 1
    at = ", ".join([":"] * dim)
    forms = [
        f"{a}[{at}, {start}:{end}]", f"{a}[{at}, {start}]", f"{a}.narrow({dim}, {start}, {end - start})",
        f"{a}.flatten(1)", f"{a}.unsqueeze({w.random.randrange(1, len(own) + 1)})", f"{a}.transpose({dim}, -1)",
        f"{a}.select({dim - len(own)}, {start - size})", f"{a}[..., None]", f"{a}.reshape({a}.shape[0], -1)",
        f"{a}.chunk(2, {dim})[0]", f"{a}.unbind({dim})[{start}]", f"{a}.squeeze({dim})", f"{a}[{at}, ::2]",
        f"{a}.reshape(-1, {own[-1]}).reshape({a}.shape)", f"{a}[{at}, -1:]",
        f"{a}.split({end - start}, {dim})[-1]",
        f"{a}.unsqueeze(1).expand(-1, 2, {', '.join(['-1'] * (len(own) - 1))})",
        f"{a}.flatten(1).unflatten(1, ({own[1]}, -1))",
        f"{a}[{at}, torch.tensor([{start}, {end - 1}, {start}])]",
        f"{a}.repeat(1, {', '.join(['2'] * (len(own) - 1))})",
    ]  # fmt: skip
    w.let(w.random.choice(forms))


def _join(w: _Writer) -> None:
    a = w.pick(1, 3)
    assert a is not None
    own = w.shape(a)
    same = [n for n in w.rows if w.shape(n) == own]
    parts = [a, *(w.random.choice(same) for _ in range(w.random.randrange(1, 3)))]
    dim = w.random.randrange(1, len(own)) if len(own) > 1 and w.random.random() < 0.7 else None
    w.let(f"torch.stack([{', '.join(parts)}], {w.random.randrange(1, len(own) + 1)})" if dim is None
          else f"torch.cat([{', '.join(parts)}], {w.random.choice([dim, dim - len(own)])})")  # fmt: skip


def _write(w: _Writer) -> None:
    """A fresh tensor, written to, itself or by views of it."""
    a = w.pick(2)
    if a is None:
        return
    own = w.shape(a)
    fresh = w.let(w.random.choice([f"{a}.clone()", f"torch.zeros_like({a})", f"{a}.new_zeros({a}.shape)", f"{a} * 0.9",
                                   f"torch.empty_like({a}).copy_({a})"]))  # fmt: skip
    for _ in range(w.random.randrange(1, 4)):
        dim = w.random.randrange(1, len(own))
        start = w.random.randrange(own[dim])
        end = w.random.randrange(start, own[dim]) + 1
        part = f"{fresh}[{', '.join([':'] * dim)}, {start}:{end}]"
        single = f"{fresh}[{', '.join([':'] * dim)}, {start}]"
        other = w.of_shape(own)
        if w.shape(other)[dim] == own[dim] and other != fresh:
            source = f"{other}[{', '.join([':'] * dim)}, {start}:{end}]"
        else:
            source = "0.3"
        kind = w.random.randrange(10)
        if kind == 0:
            w.run(f"{part} = {source}")
        elif kind == 1:
            w.run(f"{part} += {source}")
        elif kind == 2:
            w.run(f"{part}.mul_(0.7)")
        elif kind == 3:
            w.run(f"{fresh}.add_({source if own[dim] == end - start else 0.2})")
        elif kind == 4:
            view = w.let(part)
            w.run(f"{view}.tanh_()" if w.random.random() < 0.5 else f"{view}.fill_(0.2)")
        elif kind == 5:
            view = w.let(f"{fresh}.transpose({dim}, -1)")
            w.run(f"{view}.mul_(0.5)" if w.random.random() < 0.5 else f"{view}[:, -1] = 0.4")
        elif kind == 6:
            w.run(f"{single}.zero_()")
        elif kind == 7:
            view = w.let(f"{fresh}.view(-1, {own[-1]})") if w.values[fresh].is_contiguous() else fresh
            w.run(f"{view}[:, 0] *= 1.1")
            if view != fresh:
                w.rows.remove(view)
        elif kind == 8:
            w.run(f"{fresh}.masked_fill_({fresh} > 0.3713, 0.25)")
        else:
            w.run(f"{single} = {fresh}[{', '.join([':'] * dim)}, {end - 1}] * 0.5")


def _without_grad(w: _Writer) -> None:
    a = w.pick()
    w.lines.append("with torch.no_grad():")
    name = w.let(w.random.choice(UNARY[:8]).format(a, a))
    w.lines[-1] = "    " + w.lines[-1]
    assert name


KINDS: list[tuple[Callable[[_Writer], None], int]] = [
    (_unary, 5), (_binary, 5), (_with_shared, 4), (_product, 4), (_norm, 1), (_reduce, 3), (_view, 4), (_join, 2),
    (_write, 2), (_without_grad, 1),
]  # fmt: skip


def drawn(random: Random, T: int, B: int) -> RandomStep:
    """A step whose carry and x have B rows, and T steps."""
    w = _Writer(random, B)
    shapes = [
        (B, *(random.choice(SIZES) for _ in range(random.choice([1, 1, 1, 2, 0]))))
        for _ in range(random.choice([1, 1, 2, 3]))
    ]
    carry = [w.tensor(*s) for s in shapes]
    inputs = [
        (T, B, *(random.choice(SIZES) for _ in range(random.choice([1, 1, 2, 0]))))
        for _ in range(random.choice([0, 1, 1, 2]))
    ]
    xs = [w.tensor(*s) for s in inputs]
    for kind, given in (("c", carry), ("x", [x[0] for x in xs])):
        for i, t in enumerate(given):
            name = f"{kind}{i}"
            w.values[name] = t.detach().clone()
            w.rows.append(name)
    integer = random.random() < 0.15
    if integer:
        w.values["n"] = torch.zeros(B, dtype=torch.int64)
    for _ in range(random.randrange(2, 14)):
        function = random.choices([k for k, _ in KINDS], [n for _, n in KINDS])[0]
        function(w)
        large = w.rows and w.values[w.rows[-1]].numel() > 400 * B
        if large or len(w.shape(w.rows[-1])) > 4:
            w.rows.pop()
    nexts = []
    for i, c in enumerate(carry):
        same = [n for n in w.rows if w.shape(n) == tuple(c.shape)]
        value = random.choice(same[-3:])
        if random.random() < 0.5:
            other = random.choice(w.rows)
            mean = f"{other}.flatten(1).mean(1)" if len(w.shape(other)) > 1 else other
            wider = {1: "", 2: "[:, None]"}.get(c.dim(), "[:, None, None]")
            value = f"({value} + {mean}{wider})"
        if random.random() < 0.08 and value == f"c{i}":
            nexts.append(value)
        else:
            nexts.append(random.choice(BOUND).format(*[value] * 2, old=f"c{i}"))
    ys = [
        random.choice(w.rows[-6:] if random.random() < 0.7 else w.rows) for _ in range(random.choice([0, 1, 1, 2, 3]))
    ]
    names = [f"c{i}" for i in range(len(carry))] + ["n"] * integer
    lines = [
        f"{''.join(n + ', ' for n in names)} = c",
        *(["".join(f"x{i}, " for i in range(len(xs))) + " = x"] if xs else []),
    ]
    lines[0] = lines[0].replace(",  =", ", =")
    lines += w.lines
    if nexts and ys and random.random() < 0.3:
        lines.append(f"new = {nexts[0]}")
        nexts[0] = "new"
        ys.append("new")
    new = [*nexts, *(["n + 1"] if integer else [])]
    lines.append(f"return [{', '.join(new)}], [{', '.join(ys)}]")
    text = "def step(c, x):\n" + "".join(f"    {line}\n" for line in lines)
    return RandomStep(text, [*carry, *([torch.zeros(B, dtype=torch.int64)] if integer else [])], xs, w.captured)
