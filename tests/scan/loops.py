"""Steps of many kinds, and what `scan` is judged by: one autograd backward per block of losses over a plain loop.

Written from the definition of the policies, not from the engine.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from bptt import Chunked, Full, Truncated, scan
from bptt.policies import Policy, Reach

Agree = Callable[..., None]
Step = Callable[[Any, Any], tuple[Any, Any]]
Case = tuple[Step, Any, Any, list[Tensor]]  # step, first carry, xs, captured tensors

T, B, X, H = 7, 3, 2, 4  # steps, rows, entries of x and of the state
DOUBLE = torch.float64


# The reference


def blocks_of(policy: Policy, T: int) -> list[tuple[int, int, int]]:
    """(step the carry is detached at, first loss, last loss), from the definition of the policies."""
    if isinstance(policy, Chunked):
        window, every = policy.k, policy.k
    elif isinstance(policy, Truncated | FixedTruncated):
        window, every = policy.window, policy.every
    else:
        window, every = T, T
    blocks = []
    for first in range(0, T, every):
        last = min(first + every, T) - 1
        blocks.append((first if isinstance(policy, Chunked) else max(0, last - window + 1), first, last))
    return blocks


class FixedTruncated(Policy):
    """Overlapping blocks and given factors at once."""

    def __init__(self, window: int, every: int, xi: Tensor) -> None:
        self.window, self.every, self.xi = window, every, xi

    def reach(self, T: int) -> Reach:
        return Reach(self.window, self.every, stops_at_start=False)

    def draw(self, T: int, B: int) -> Tensor:
        return self.xi

    def __str__(self) -> str:
        return "fixed"


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def beside(rows: Tensor, value: Tensor) -> Tensor:
    return rows.reshape(-1, *[1] * (value.dim() - 1)) if value.dim() else rows.reshape(())


def loop(
    step: Step,
    carry: Any,
    xs: Any,
    T: int,
    *,
    detached: int = 0,
    xi: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Any, list[Any]]:
    """Final carry and ys in time's order; what enters the `detached`-th step walked has no past."""
    ys: list[Any] = [None] * T
    for t in range(T):
        now = T - 1 - t if reverse else t

        def enter(c: Any, t: int = t, now: int = now) -> Any:
            if is_float(c) and detached == t > 0:
                c = c.detach()
            if is_float(c) and xi is not None:
                factor = beside(xi[t], c)
                c = c * factor + (c * (1 - factor)).detach()
            if isinstance(c, Tensor) and resets is not None:
                c = torch.where(beside(resets[now], c), torch.zeros_like(c), c)
            return c

        carry, ys[now] = step(tree_map(enter, carry), tree_map(lambda x, now=now: x if x is None else x[now], xs))
    return carry, ys


def floats(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if is_float(leaf)]


def weighed(values: Sequence[Tensor], seed: int) -> Tensor:
    """A scalar whose gradient in each of the values is irregular."""
    generator = torch.Generator().manual_seed(seed)
    terms = [(v * torch.randn(v.shape, generator=generator, dtype=DOUBLE).to(v)).sum() for v in values]
    return torch.stack(terms).sum()


def expected(case: Case, policy: Policy, T: int = T, seed: int | None = None, **kw: Any) -> list[Tensor | None]:
    """The gradient of first carry, xs and captured tensors: one backward pass per block."""
    step, carry, xs, captured = case
    inputs = [*floats(carry), *floats(xs), *captured]
    total: list[Tensor | None] = [None] * len(inputs)
    reverse = kw.get("reverse", False)
    for detached, first, last in blocks_of(policy, T):
        if seed is not None:
            torch.manual_seed(seed)
        final, ys = loop(step, carry, xs, T, detached=detached, **kw)
        losses = []
        for t in range(first, last + 1):
            losses.append(weighed(floats(ys[T - 1 - t if reverse else t]), T - 1 - t if reverse else t))
        if last == T - 1:
            losses.append(weighed(floats(final), 1000))
        loss = torch.stack(losses).sum()
        if not loss.requires_grad:
            continue
        for i, grad in enumerate(torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=True)):
            if grad is not None:
                total[i] = grad if total[i] is None else total[i] + grad
    return [torch.zeros_like(t) if g is None else g for g, t in zip(total, inputs, strict=True)]


def measured(case: Case, policy: Policy | str, **kw: Any) -> list[Tensor]:
    step, carry, xs, captured = case
    final, ys = scan(step, carry, xs, gradient=policy, **kw)
    inputs = [*floats(carry), *floats(xs), *captured]
    steps = len(floats(ys)[0])
    loss = torch.stack([*(weighed([y[t] for y in floats(ys)], t) for t in range(steps)), weighed(floats(final), 1000)])
    grads = torch.autograd.grad(loss.sum(), inputs, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, inputs, strict=True)]


# The steps


def random(*shape: int, grad: bool = True, dtype: torch.dtype = DOUBLE) -> Tensor:
    return (torch.randn(shape, dtype=dtype) * 0.7).requires_grad_(grad)


def rnn(dtype: torch.dtype = DOUBLE) -> Case:
    w, u, b, v = (random(*shape, dtype=dtype) for shape in [(X, H), (H, H), (H,), (H, 2)])

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(x @ w + h @ u + b)
        return h, h @ v

    return step, random(B, H, dtype=dtype), random(T, B, X, dtype=dtype), [w, u, b, v]


def lstm() -> Case:
    cell = nn.LSTMCell(X, H, dtype=DOUBLE)

    def step(carry: tuple[Tensor, Tensor], x: Tensor) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
        h, c = cell(x, carry)
        return (h, c), {"h": h, "square": c * c}

    return step, (random(B, H), random(B, H)), random(T, B, X), list(cell.parameters())


def gru() -> Case:
    cell = nn.GRUCell(X, H, dtype=DOUBLE)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return (cell(x, h),) * 2

    return step, random(B, H), random(T, B, X), list(cell.parameters())


def tree() -> Case:
    """Dicts and tuples, leaves of several ranks, tokens and a counter per row, a carry leaf without gradient."""
    table, w = random(5, H), random(H, H)

    def step(carry: dict[str, Any], x: tuple[Tensor, Tensor]) -> tuple[dict[str, Any], tuple[Any, ...]]:
        h, cube, n = carry["h"], carry["cube"], carry["n"]
        token, scale = x
        h = torch.sin(h @ w + torch.nn.functional.embedding(token, table) * scale[:, None])
        cube = 0.5 * cube + h[:, :2, None, None] * cube.mean((1, 2, 3), keepdim=True)
        return {"h": h, "cube": cube, "n": n + token}, (h.sum(1), n, None)

    carry = {"h": random(B, H), "cube": random(B, 2, 1, 2), "n": torch.zeros(B, dtype=torch.long)}
    return step, carry, (torch.randint(5, (T, B)), random(T, B)), [table, w]


def rowless() -> Case:
    """Scalars: no rows at all, and a step index among the xs."""
    w = random()

    def step(c: Tensor, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        c = torch.cos(w * c + x[0] / (1 + x[1]))
        return c, c * w

    return step, random(), (random(T), torch.arange(T)), [w]


def batch_norm() -> Case:
    norm = nn.BatchNorm1d(H, dtype=DOUBLE)
    w = random(X, H)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(norm(h + x @ w))
        return h, h

    return step, random(B, H), random(T, B, X), [w, *norm.parameters()]


def softmax_over_rows() -> Case:
    w = random(X, H)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.softmax(h + x @ w, 0)
        return h, h

    return step, random(B, H), random(T, B, X), [w]


def next_row() -> Case:
    """Each row reads the one after it; the last reads itself."""
    w = random(X, H)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(torch.cat([h[1:], h[-1:]]) + x @ w)
        return h, h

    return step, random(B, H), random(T, B, X), [w]


def closure_per_row() -> Case:
    w, offset = random(X, H), random(B, H)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(h + x @ w + offset)
        return h, h

    return step, random(B, H), random(T, B, X), [w, offset]


def branch_on_all_rows() -> Case:
    """Rows do not mix in the last steps, where one branch is taken; which one is decided by all rows together."""
    w, u = random(X, H), random(X, H)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(h + x @ (w if x.sum() > 0 else u))
        return h, h

    xs = random(T, B, X, grad=False).abs()
    return step, random(B, H), (xs * torch.tensor([-1, -1, -1, 1, -1, 1, 1])[:, None, None]).requires_grad_(), [w, u]


INDEPENDENT = {"rnn": rnn, "lstm": lstm, "gru": gru, "tree": tree}
COUPLED = {
    "rowless": rowless,
    "batch_norm": batch_norm,
    "softmax_over_rows": softmax_over_rows,
    "next_row": next_row,
    "closure_per_row": closure_per_row,
    "branch_on_all_rows": branch_on_all_rows,
}
STEPS = {**INDEPENDENT, **COUPLED}
POLICIES = {
    "full": Full(),
    "chunked": Chunked(3),
    "chunked_one": Chunked(1),
    "truncated": Truncated(3),
    "truncated_one": Truncated(1),
    "truncated_every": Truncated(4, every=3),
    "truncated_chunks": Truncated(3, every=3),
    "longer": Truncated(T + 1, every=2),
}
RESETS = torch.tensor([[0, 1, 0], [0, 0, 0], [0, 1, 1], [0, 0, 0], [0, 0, 1], [0, 0, 0], [1, 0, 0]]).bool()


def factors(lanes: int) -> Tensor:
    xi = 2 * torch.rand(T, lanes, generator=torch.Generator().manual_seed(6), dtype=DOUBLE)
    xi[0], xi[3] = 1, 0
    return xi
