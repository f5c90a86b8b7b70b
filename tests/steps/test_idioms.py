"""Idioms of users' steps that are compiled: gathers by an index, weight norm, weights of as many rows as lanes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from steps_by_loop import Stepped, by_loop
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import bptt
from bptt.policies import parse
from bptt.scan import compiled

B, H, T, V, S = 3, 4, 7, 9, 6
DOUBLE = torch.float64
Leaves = list[Tensor]
Made = Callable[[], tuple[Callable[[Leaves, Leaves], tuple[Leaves, Leaves]], Leaves, Leaves, Leaves]]
"""A step on lists of tensors, the carry, xs, and captured tensors with a gradient."""

Taken = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def _no_traces_of_other_tests() -> None:
    compiled._KEPT.clear()


def rows(*sizes: int) -> Tensor:
    return torch.randn(*sizes, dtype=DOUBLE, requires_grad=True)


def words(*sizes: int) -> Tensor:
    return torch.randint(0, V, (T, B, *sizes))


def simple(f: Callable[[Tensor, Tensor], Tensor], captured: Sequence[Tensor], xs: Tensor | None = None) -> Any:
    """A step h -> f(h, x) without anything else."""

    def step(c: Leaves, x: Leaves) -> tuple[Leaves, Leaves]:
        h = f(c[0], x[0])
        return [h], [h]

    return step, [rows(B, H)], [rows(T, B, H) if xs is None else xs], list(captured)


def embedding(size: tuple[int, ...] = (), **options: Any) -> Made:
    def make() -> Any:
        table, w = nn.Embedding(V, H, dtype=DOUBLE, **options), rows(H, H)

        def f(h: Tensor, x: Tensor) -> Tensor:
            e = table(x)
            return torch.tanh(h @ w + (e.sum(1) if size else e))

        return simple(f, [table.weight, w], words(*size))

    return make


def table(
    take: Callable[[Tensor, Tensor], Tensor], size: tuple[int, ...] = (), shape: tuple[int, int] = (V, H)
) -> Made:
    def make() -> Any:
        values, w = rows(*shape), rows(H, H)
        return simple(lambda h, x: torch.tanh(h @ w + take(values, x)), [values, w], words(*size))

    return make


def columns(index: Any, n: int = H) -> Made:
    def make() -> Any:
        w = rows(n, H)
        return simple(lambda h, x: torch.tanh(h[:, index] @ w + x), [w])

    return make


def own_words() -> Any:
    """The word that a step puts out is the next one's input."""
    words_in, w, out = nn.Embedding(V, H, dtype=DOUBLE), rows(H, H), rows(H, V)

    def step(c: Leaves, x: Leaves) -> tuple[Leaves, Leaves]:
        h = torch.tanh(c[0] @ w + words_in(c[1]) + x[0])
        return [h, (h @ out).argmax(1)], [h @ out]

    first = [rows(B, H), torch.zeros(B, dtype=torch.int64)]
    return step, first, [rows(T, B, H)], [words_in.weight, w, out]


def attended(read: Taken) -> Made:
    def make() -> Any:
        memory, w = rows(B, S, H), rows(H, H)

        def f(h: Tensor, x: Tensor) -> Tensor:
            where = (h.abs() * 4).long().clamp(max=S - 1)[:, 0]
            return torch.tanh(h @ w + read(memory, where) + x)

        return simple(f, [memory, w])

    return make


def by_heads() -> Any:
    """A layer that merges rows with the places of a memory, of as many as a trace has rows."""
    layer, m = nn.MultiheadAttention(H, 2, batch_first=True, dtype=DOUBLE), rows(B, 5, H)

    def read(h: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(h + layer(h.unsqueeze(1), m, m, need_weights=False)[0].squeeze(1) + x)

    return simple(read, [m, *layer.parameters()])


def ring() -> Any:
    """The last states in a ring of places, and whole numbers that count."""
    w = rows(H, H)

    def step(c: Leaves, x: Leaves) -> tuple[Leaves, Leaves]:
        h, places, n = c
        places = places.scatter(1, (n % 3)[:, None, None].expand(-1, 1, H), h[:, None])
        h = torch.tanh(places.mean(1) @ w + x[0])
        return [h, places, n + 1], [h]

    return step, [rows(B, H), rows(B, 3, H), torch.arange(B)], [rows(T, B, H)], [w]


def summed(f: Callable[[Tensor], Tensor]) -> Made:
    def make() -> Any:
        w = rows(H, H)
        return simple(lambda h, x: torch.tanh(f(h @ w) + x), [w])

    return make


def masked() -> Any:
    w = rows(H, H)

    def f(h: Tensor, x: Tensor) -> Tensor:
        h = torch.tanh(h @ w + x).clone()
        h[h > 0.4] = 0.0
        h[h[:, 0] < -0.5] = 0.1
        return h

    return simple(f, [w])


def normed(wrap: Callable[[nn.Linear], nn.Module], train: bool = True) -> Made:
    def make() -> Any:
        inner = wrap(nn.Linear(H, H, dtype=DOUBLE)).train(train)
        return simple(lambda h, x: torch.tanh(inner(h) + x), list(inner.parameters()))

    return make


def by_hook(wrap: Callable[[nn.Linear], nn.Module]) -> Callable[[nn.Linear], nn.Module]:
    def make(inner: nn.Linear) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return wrap(inner)

    return make


def square() -> Any:
    """All sizes are B: weights, biases, gates and noise of a lane, an attended memory, a layer."""
    memory, w, noise, gate, bias = rows(B, S, B), rows(B, B), rows(B, B), rows(B), rows(B)
    inner = nn.Linear(2 * B, B, dtype=DOUBLE)

    def step(c: Leaves, x: Leaves) -> tuple[Leaves, Leaves]:
        h = c[0]
        a = torch.softmax((memory @ h[:, :, None])[:, :, 0], 1)
        h = torch.tanh(inner(torch.cat([x[0], (a[:, None] @ memory)[:, 0]], 1)) + h @ w + bias + noise)
        return [h * torch.sigmoid(gate)[:, None]], [h, gate[:, None].expand(-1, B) * 1]

    captured = [memory, w, noise, gate, bias, *inner.parameters()]
    return step, [rows(B, B)], [rows(T, B, B)], captured


CASES: dict[str, Made] = {
    "embedding": embedding(),
    "embedding with padding": embedding(padding_idx=2),
    "embedding of several": embedding((2,)),
    "its own words": own_words,
    "W[i]": table(lambda w, i: w[i]),
    "W[-i]": table(lambda w, i: w[-i]),
    "W[i] of several": table(lambda w, i: w[i].mean(1), (2,)),
    "W[:, i]": table(lambda w, i: w[:, i].t(), (), (H, V)),
    "one_hot": table(lambda w, i: nn.functional.one_hot(i, V).to(w) @ w),
    "index_select": table(lambda w, i: torch.index_select(w, 0, i)),
    "h[:, list]": columns([2, 0, 1, 3]),
    "h[:, tensor]": columns(torch.tensor([3, 0, 0, 1, -1]), 5),
    "attended by heads": by_heads,
    "attended by gather": attended(lambda m, i: m.gather(1, i[:, None, None].expand(-1, 1, H))[:, 0]),
    "attended by index": attended(lambda m, i: m[torch.arange(len(i)), i]),
    "ring": ring,
    "cumsum": summed(lambda a: a.cumsum(1)),
    "cumprod": summed(lambda a: a.cumprod(1)),
    "logcumsumexp": summed(lambda a: a.logcumsumexp(1)),
    "cummax": summed(lambda a: a.cummax(1)[0]),
    "sorted": summed(lambda a: a.sort(1)[0]),
    "masked": masked,
    "weight norm": normed(weight_norm),
    "weight norm of columns": normed(lambda m: weight_norm(m, dim=1)),
    "spectral norm in eval": normed(spectral_norm, False),
    "weight norm by a hook": normed(by_hook(nn.utils.weight_norm)),
    "spectral norm by a hook, in eval": normed(by_hook(nn.utils.spectral_norm), False),
    "square": square,
}


@pytest.mark.parametrize("policy", ["full", "chunked:3", "truncated:4/2"])
@pytest.mark.parametrize("name", CASES)
def test_idioms_are_compiled_and_give_what_a_loop_gives(name: str, policy: str) -> None:
    step, carry, xs, captured = CASES[name]()
    dcarry = [torch.randn_like(c) if c.is_floating_point() else None for c in carry]
    ys = step(carry, [x[0] for x in xs])[1]
    dys = [torch.randn(T, *y.shape, dtype=DOUBLE) for y in ys]
    blocks = parse(policy).reach(T).blocks(T)
    final, outputs, expected = by_loop(Stepped(step, carry, xs, captured), blocks, None, dcarry, dys)
    found, got = bptt.scan(step, carry, xs, gradient=policy, kernel="eager")
    for g, e in zip((*found, *got), (*final, *outputs), strict=True):
        torch.testing.assert_close(g, e)
    pairs = [(t, d) for t, d in zip((*found, *got), (*dcarry, *dys), strict=True) if d is not None]
    inputs = [t for t in (*carry, *xs, *captured) if t.requires_grad]
    grads = torch.autograd.grad([t for t, _ in pairs], inputs, [d for _, d in pairs], allow_unused=True)
    by_id = dict(zip(map(id, inputs), grads, strict=True))
    for t, e in zip((*carry, *xs, *captured), expected, strict=True):
        if t.requires_grad:
            torch.testing.assert_close(torch.zeros_like(t) if (g := by_id[id(t)]) is None else g, e)


@pytest.mark.parametrize("name", CASES)
def test_each_lane_is_a_row(name: str) -> None:
    step, carry, xs, _ = CASES[name]()
    found = bptt.explain(step, carry, [x[0] for x in xs])
    traced = found.kernel != "replay" or "ask torch for" in found.reason
    assert (traced, found.rows) == (True, B), found.reason


def test_a_memory_of_more_lanes_than_a_trace_has_rows_has_lanes() -> None:
    """`gather` takes an index of fewer rows than its input without an error."""
    memory, w = torch.randn(8, S, H, dtype=DOUBLE), rows(H, H)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        where = (h.abs() * 4).long().clamp(max=S - 1)[:, :1, None].expand(-1, 1, H)
        h = torch.tanh(h @ w + memory.gather(1, where)[:, 0] + x @ w)
        return h, h

    h, xs = torch.randn(8, H, dtype=DOUBLE), torch.randn(T, 8, H, dtype=DOUBLE)
    results = [bptt.scan(step, h, xs, gradient="truncated:3", kernel=kernel)[1] for kernel in ("eager", "replay")]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), w)[0] for y in results))
    assert "memory [R, 6, 4]" in str(bptt.explain(step, h, xs[0]))


def test_weights_of_as_many_rows_as_lanes_are_weights() -> None:
    step, carry, xs, _ = square()
    said = str(bptt.explain(step, carry, [x[0] for x in xs]))
    for text in ("memory [R, 6, 3]", "w [3, 3]", "noise [R, 3]", "gate [R]", "bias [3]", "inner.weight [3, 6]"):
        assert text in said


def test_classes_that_are_not_there_are_an_error() -> None:
    step = lambda h, i: (torch.tanh(h + nn.functional.one_hot(i, num_classes=H)), h)  # noqa: E731
    h, words_in = torch.zeros(B, H), torch.zeros(T, B, dtype=torch.int64)
    words_in[4, 1] = H - 1
    bptt.scan(step, h, words_in, kernel="eager")
    words_in[4, 1] = H
    for kernel in ("eager", "replay"):
        with pytest.raises(RuntimeError, match=r"out of bounds|smaller than num_classes"):
            bptt.scan(step, h, words_in, kernel=kernel)


def test_a_weight_that_a_hook_computes_needs_no_new_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    traces = list[Any]()
    monkeypatch.setattr(compiled, "split", lambda traced, own=compiled.split: traces.append(1) or own(traced))
    inner = by_hook(nn.utils.weight_norm)(nn.Linear(H, H))
    step = lambda h, x: (torch.tanh(inner(h) + x), h)  # noqa: E731
    before = inner.weight
    for _ in range(9):
        bptt.scan(step, torch.zeros(B, H), torch.zeros(T, B, H), kernel="eager")
        inner(torch.zeros(B, H))
    assert len(traces) == 1
    assert inner.weight is not before


def test_what_is_taken_by_a_mask_is_replayed() -> None:
    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(h + x)
        return h, h[h > 0].sum().expand(len(h))

    h, xs = torch.randn(B, H, dtype=DOUBLE), torch.randn(T, B, H, dtype=DOUBLE)
    with pytest.raises(RuntimeError, match=r"test_idioms\.py:"):
        bptt.scan(step, h, xs, kernel="eager")
    carry, (loop, got) = h, ([], bptt.scan(step, h, xs)[1])
    for x in xs:
        carry, y = step(carry, x)
        loop.append(y)
    torch.testing.assert_close(got, torch.stack(loop))
