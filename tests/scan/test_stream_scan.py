"""`stream_scan` is one backward pass of a scan over all steps, whatever is in memory at once."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from resident import lines_of, needs_status
from steps_by_loop import STEPS, Stepped, by_loop
from torch import Tensor
from torch.testing import assert_close

import bptt
from bptt.policies import parse

T, B = 23, 3


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as sqrt(T / alpha) asks for, also where their tape is small."""
    monkeypatch.setattr("bptt.nn._segmented_scan.SEGMENT_BYTES", 0)


def streamed(made: Stepped, dys: list[Tensor], **kw: Any) -> tuple[Any, list[slice]]:
    """(what `stream_scan` finds for a linear loss of the ys, the steps of the segments)."""
    seen = []

    def loss(steps: slice, ys: list[Tensor]) -> Tensor:
        seen.append(steps)
        return sum(((y * dy[steps]).sum() for y, dy in zip(ys, dys, strict=True)), torch.zeros((), dtype=torch.float64))

    xs = kw.pop("xs", [x.detach() for x in made.xs])
    wrt = [p for p in made.captured if p.requires_grad]
    return bptt.stream_scan(made.step, made.carry, xs, loss, wrt=wrt, **kw), seen


def cotangents(made: Stepped) -> list[Tensor]:
    """A cotangent of each y."""
    with torch.no_grad():
        ys = made.step([c.clone() for c in made.carry], [x[0] for x in made.xs])[1]
    return [torch.randn(T, *y.shape, dtype=torch.float64) for y in ys]


def agree(found: Any, made: Stepped, total: list[Tensor], final: list[Tensor]) -> None:
    n, m = len(made.carry), len(made.xs)
    expected = [g for g, p in zip(total[n + m :], made.captured, strict=True) if p.requires_grad]
    assert_close(list(found.wrt), expected, rtol=1e-9, atol=1e-10)
    for got, g, c in zip(found.carry, total[:n], made.carry, strict=True):
        if c.is_floating_point():
            assert_close(got, g if c.requires_grad else got, rtol=1e-9, atol=1e-10)
        else:
            assert got is None
    assert_close(list(found.final), final, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kernel", ["auto", "replay"])
@pytest.mark.parametrize("memory", ["checkpoints:steps=9", "checkpoints:bytes=12000"])
@pytest.mark.parametrize("policy", ["full", "chunked:6", "chunked:2", "truncated:9", "truncated:6/4", "truncated:4/4"])
@pytest.mark.parametrize("name", ["lstm", "leaky with a counter"])
def test_the_gradients_of_a_loop(name: str, policy: str, memory: str, kernel: str) -> None:
    torch.manual_seed(0)
    made = STEPS[name](T, B)
    dys, resets = cotangents(made), torch.rand(T, B) < 0.1
    blocks = parse(policy).reach(T).blocks(T)
    final, _, total = by_loop(made, blocks, resets, [None] * len(made.carry), dys)
    found, seen = streamed(made, dys, gradient=policy, memory=memory, kernel=kernel, resets=resets)
    agree(found, made, total, final)
    assert sorted(t for steps in seen for t in range(steps.start, steps.stop)) == list(range(T))
    assert len(seen) > 1 or "bytes" in memory
    assert all(p.grad is None for p in made.captured)


@pytest.mark.parametrize("policy", ["full", "chunked:6", "truncated:6/4"])
@pytest.mark.parametrize("name", STEPS)
def test_each_step(name: str, policy: str) -> None:
    torch.manual_seed(0)
    made = STEPS[name](T, B)
    dys = cotangents(made)
    final, _, total = by_loop(made, parse(policy).reach(T).blocks(T), None, [None] * len(made.carry), dys)
    found, _ = streamed(made, dys, gradient=policy)
    agree(found, made, total, final)


@pytest.mark.parametrize("kernel", ["auto", "replay"])
def test_random_factors(kernel: str) -> None:
    torch.manual_seed(0)
    made = STEPS["gru"](T, B)
    dys = cotangents(made)
    policy = bptt.Randomized(0.6)
    torch.manual_seed(3)
    factors = policy.draw(T, B)
    final, _, total = by_loop(made, [(0, 0, T - 1)], None, [None], dys, factors)
    torch.manual_seed(3)
    found, _ = streamed(made, dys, gradient=policy, kernel=kernel)
    agree(found, made, total, final)


def cut_up(x: Tensor) -> Iterator[list[Any]]:
    """Pieces in one buffer, each written over the one before."""
    buffer = torch.empty_like(x[:5])
    for piece in x.split(5):
        yield [buffer[: len(piece)].copy_(piece)]


@pytest.mark.parametrize("memory", ["checkpoints", "checkpoints:steps=4"])
@pytest.mark.parametrize("policy", ["full", "chunked:6", "truncated:6/4"])
@pytest.mark.parametrize("source", ["pieces", "arrays", "memory map"])
def test_sources(source: str, policy: str, memory: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    made = STEPS["gru"](T, B)
    dys, resets = cotangents(made), torch.rand(T, B) < 0.1
    x = made.xs[0].detach()
    np.save(tmp_path / "x.npy", x.numpy())
    xs = {
        "pieces": lambda: cut_up(x),
        "arrays": lambda: ([piece.numpy()] for piece in x.split([1, 20, 2])),
        "memory map": lambda: [np.load(tmp_path / "x.npy", mmap_mode="r")],
    }[source]()
    found, seen = streamed(made, dys, xs=xs, gradient=policy, memory=memory, resets=resets)
    final, _, total = by_loop(made, parse(policy).reach(T).blocks(T), resets, [None], dys)
    agree(found, made, total, final)
    if policy == "chunked:6" and source != "memory map" and memory == "checkpoints":
        assert seen == [slice(a, min(a + 6, T)) for a in range(0, T, 6)]


@pytest.mark.parametrize("kernel", ["auto", "replay"])
@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("policy", ["full", "chunked:6", "truncated:6/4", "truncated:9"])
@pytest.mark.parametrize("each", [False, True])
def test_a_state_to_reset_to(each: bool, policy: str, pieces: bool, kernel: str) -> None:
    torch.manual_seed(0)
    made = STEPS["lstm"](T, B)
    (dy,), resets = cotangents(made), torch.rand(T, B) < 0.2
    state = [torch.randn(*((T,) if each else ()), *c.shape, dtype=torch.float64).requires_grad_() for c in made.carry]
    x = made.xs[0].detach()
    _, (y,) = bptt.scan(made.step, made.carry, [x], gradient=policy, resets=resets, reset_state=state)
    expected = torch.autograd.grad(y, [*made.carry, *made.captured, *state], dy)
    xs = ([piece] for piece in x.split(7)) if pieces else [x]
    found, _ = streamed(made, [dy], xs=xs, gradient=policy, kernel=kernel, resets=resets, reset_state=state)
    assert_close([*found.carry, *found.wrt, *found.reset_state], list(expected), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kernel", ["auto", "replay"])
@pytest.mark.parametrize("memory", ["checkpoints:steps=5", "checkpoints:bytes=9000"])
@pytest.mark.parametrize("policy", ["full", "truncated:6/4"])
def test_the_numbers_of_a_loop(policy: str, memory: str, kernel: str) -> None:
    """Dropout and noise are those of one call; the generator is left as that leaves it, and the loss draws after it."""
    torch.manual_seed(0)
    made = STEPS["gru"](T, B)
    cell = torch.nn.GRUCell(4, 6, dtype=torch.float64)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = cell(torch.nn.functional.dropout(x, 0.3), h) + 0.1 * torch.randn_like(h)
        return h, h

    x, h = made.xs[0].detach(), made.carry[0]
    torch.manual_seed(7)
    final, ys = bptt.scan(step, h, x, gradient=policy)
    expected = torch.autograd.grad(ys.square().sum(), [h, *cell.parameters()])
    after = torch.rand(3)
    torch.manual_seed(7)
    found = bptt.stream_scan(
        step,
        h,
        x,
        lambda _, ys: ys.square().sum(),
        wrt=cell.parameters(),
        gradient=policy,
        memory=memory,
        kernel=kernel,
    )
    assert_close([found.carry, *found.wrt], list(expected), rtol=1e-9, atol=1e-10)
    assert_close(found.final, final.detach())
    assert_close(torch.rand(3), after)


def test_a_history_of_what_the_step_uses() -> None:
    """The graph that a captured tensor comes from is gone through in every segment."""
    torch.manual_seed(0)
    log, x = torch.randn(4, dtype=torch.float64, requires_grad=True), torch.randn(T, B, 4, dtype=torch.float64)
    decay = torch.exp(-torch.exp(log))

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = decay * h + x
        return h, h

    h = torch.zeros(B, 4, dtype=torch.float64)
    found = bptt.stream_scan(step, h, x, lambda _, ys: (ys * decay).square().sum(), wrt=[log])
    _, ys = bptt.scan(step, h, x)
    assert_close(found.wrt[0], torch.autograd.grad((ys * decay).square().sum(), log)[0], rtol=1e-9, atol=1e-10)


def test_no_xs_and_other_forms() -> None:
    """A carry with Python values, a first one that broadcasts, ys that are a dict, numbers without gradient."""
    torch.manual_seed(0)
    w = torch.randn(4, 4, dtype=torch.float64).mul(0.3).requires_grad_()

    def step(carry: dict[str, Any], _: None) -> tuple[dict[str, Any], dict[str, Any]]:
        h = torch.tanh(carry["h"] @ w + 0.1)
        return {"h": h, "n": carry["n"] + 1}, {"h": h, "n": torch.as_tensor(carry["n"])}

    start = torch.randn(B, 4, dtype=torch.float64)
    h = start.clone().requires_grad_()
    expected = torch.autograd.grad(bptt.scan(step, {"h": h, "n": 0}, length=T)[1]["h"].square().sum(), [h, w])
    seen = {}

    def loss(steps: slice, ys: dict[str, Tensor]) -> Tensor:
        seen[steps.start] = ys["n"].tolist()
        return ys["h"].square().sum()

    found = bptt.stream_scan(step, {"h": start, "n": 0}, None, loss, wrt=[w], length=T, memory="checkpoints:steps=8")
    assert_close([found.carry["h"], found.wrt[0]], list(expected), rtol=1e-9, atol=1e-10)
    assert (found.carry["n"], found.final["n"]) == (None, T)
    assert seen == {16: [*range(16, 23)], 8: [*range(8, 16)], 0: [*range(8)]}


def test_a_first_carry_that_broadcasts() -> None:
    torch.manual_seed(0)
    w = torch.randn(4, 4, dtype=torch.float64).mul(0.3).requires_grad_()
    h, x = torch.randn(1, 4, dtype=torch.float64, requires_grad=True), torch.randn(T, B, 4, dtype=torch.float64)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(h @ w + x)
        return h, h

    expected = torch.autograd.grad(bptt.scan(step, h, x)[1].square().sum(), [h, w])
    found = bptt.stream_scan(step, h, x, lambda _, ys: ys.square().sum(), wrt=[w])
    assert_close([found.carry, *found.wrt], list(expected), rtol=1e-9, atol=1e-10)


SCRIPT = """
import torch, bptt
torch.set_num_threads(1)
cell = torch.nn.GRUCell(8, 16)

class Ones:
    def __len__(self): return 60_000
    def __getitem__(self, steps): return torch.ones(len(range(*steps.indices(len(self)))), 2, 8)

def step(h, x):
    h = cell(x, h)
    return h, h

h = torch.zeros(2, 16)
for kernel in ("auto", "replay"):
    xs = torch.ones(500 if kernel == "replay" else 2000, 2, 8)
    bptt.stream_scan(step, h, xs, lambda steps, ys: ys.sum(), wrt=cell.parameters(), kernel=kernel)
before = peak()
bptt.stream_scan(step, h, Ones(), lambda steps, ys: ys.sum(), wrt=cell.parameters(), gradient="truncated:40/8")
print(peak() - before)
"""


@pytest.mark.slow
@needs_status
def test_a_long_scan_takes_little_memory() -> None:
    """x and y would take 11 MiB, the whole tape about 40 MiB."""
    (grown,) = lines_of(SCRIPT)
    assert 0 <= float(grown) < 12


def plain(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.tanh(h + x)
    return h, h


X, NO = torch.zeros(T, B, 4), torch.zeros(T, B, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"xs": 3}, TypeError, "xs must be a pytree of what has a length and slices .*got a int"),
        ({"xs": (X, X[1:])}, ValueError, r"one number of steps: got leaves of xs of \[23, 22\] steps"),
        ({"xs": None}, ValueError, "one number of steps"),
        ({"xs": torch.nn.utils.rnn.pack_sequence([X[:, 0]])}, TypeError, "lanes of one length: got a PackedSequence"),
        ({"xs": (X, torch.nested.nested_tensor([X[:, 0]], layout=torch.jagged))}, TypeError, "got a nested tensor"),
        ({"length": 7}, ValueError, "one number of steps"),
        ({"xs": X[:0]}, ValueError, "at least 1 step: got 0"),
        ({"xs": iter([])}, ValueError, "at least 1 step: got 0"),
        ({"xs": iter([]), "gradient": "chunked:3"}, ValueError, "at least 1 step: got 0"),
        ({"xs": iter([X, X[:, :2]])}, ValueError, "pieces like the first"),
        ({"xs": iter([X]), "length": T}, ValueError, "length must be None where xs are pieces"),
        ({"xs": iter([3.0])}, ValueError, r"x must have pieces \[n, ...\]"),
        ({"loss": None}, TypeError, "loss must be a function of .*got NoneType"),
        ({"loss": lambda _, ys: ys}, TypeError, "loss must give a scalar"),
        ({"wrt": X}, TypeError, "wrt must be an iterable of tensors"),
        ({"wrt": [X]}, ValueError, r"wrt\[0\] must require a gradient"),
        ({"memory": "states"}, ValueError, "memory must be Checkpoints"),
        ({"memory": "checkpoints:bytes=5"}, ValueError, "bytes must hold the tape of a step, .*: got 5"),
        (
            {"memory": "checkpoints:bytes=200", "gradient": "truncated:9"},
            ValueError,
            "bytes must hold the tape of a step and of the steps before it in the window, .*: got 200",
        ),
        ({"kernel": "cpu"}, ValueError, "kernel must be one of"),
        ({"resets": X}, TypeError, "resets must be bool"),
        ({"resets": NO[:, :2]}, ValueError, "resets must have shape"),
        ({"resets": torch.zeros(T + 1, B, dtype=torch.bool)}, ValueError, "with x's 23 steps: got 24"),
        ({"reset_state": X[0]}, ValueError, "reset_state is what resets restart from"),
        ({"resets": NO, "reset_state": (X[0], X[0])}, ValueError, "reset_state must have the carry's structure"),
        ({"resets": NO, "reset_state": X[0, :, :2]}, ValueError, "reset_state must hold tensors like the carry's"),
        ({"resets": NO, "reset_state": torch.zeros(T + 1, B, 4)}, ValueError, "x's 23 steps of them: got 24"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"step": plain, "carry": torch.zeros(B, 4), "xs": X, "loss": lambda _, ys: ys.sum()}
    with pytest.raises(error, match=message):
        bptt.stream_scan(**({"memory": "checkpoints:steps=10"} | good | arguments))
