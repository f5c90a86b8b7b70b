"""Checkpoints in a scan: the same gradients from fewer carries."""

import weakref
from functools import cache

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bptt
from bptt import Checkpoints, Truncated
from bptt.memory import parse
from bptt.scan import sweep
from bptt.scan.segments import KeptCarries
from bptt.schedules import advances, binomial

from .loops import POLICIES as POLICIES_OF_LOOPS
from .loops import RESETS, STEPS, expected, measured

T, B = 17, 3
SIZES = ["steps=1", "steps=5", "steps=99", "bytes=2000", "bytes=1300", "bytes=700", "bytes=500", "bytes=250"]
MEMORIES = ["checkpoints", *(f"checkpoints:{size}" for size in SIZES)]
POLICIES = ["full", "chunked:4", "truncated:3", "truncated:6/2", "randomized:0.7"]


def run(memory, policy, resets=None, draws=False):
    torch.manual_seed(0)
    cell = torch.nn.LSTMCell(2, 4, dtype=torch.float64)
    x = torch.randn(T, B, 2, dtype=torch.float64, requires_grad=True)
    h = torch.randn(B, 4, dtype=torch.float64, requires_grad=True)
    c = torch.randn(B, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(T, B, 4, dtype=torch.float64)

    def step(carry, x):
        h, c, count = carry
        h, c = cell(torch.nn.functional.dropout(x, 0.5) if draws else x, (h, c))
        return (h, c, count + 1), h

    torch.manual_seed(5)
    count = torch.zeros(B, dtype=torch.int64)
    (h_n, c_n, n), ys = bptt.scan(step, (h, c, count), x, gradient=policy, resets=resets, memory=memory)
    loss = (ys * weights).sum() + h_n.sum() + 2 * c_n.sum()
    return [ys, h_n, c_n, n, *torch.autograd.grad(loss, [x, h, c, *cell.parameters()])]


def options():
    return {}, {"resets": torch.rand(T, B, generator=torch.Generator().manual_seed(1)) < 0.15}, {"draws": True}


@cache
def whole(policy):
    return [run("auto", policy, **kw) for kw in options()]


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_gradients(memory, policy):
    for kw, want in zip(options(), whole(policy), strict=True):
        assert_close(run(memory, policy, **kw), want, rtol=1e-10, atol=1e-12)


def test_fewer_carries_are_kept():
    def kept(memory):
        found = {}

        def pack(t):
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            w = torch.ones(1000, requires_grad=True)
            bptt.scan(lambda c, _: (w * c, c.sum()), torch.ones(1000), length=400, memory=memory)
        return sum(found.values())

    assert kept("states") > 400 * 4000
    assert kept("checkpoints") < 25 * 4000
    assert kept("checkpoints:bytes=200000") < 50 * 4000 + 10_000


def test_a_second_derivative():
    w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def last(w):
        return bptt.scan(lambda c, _: (torch.sin(w * c), None), torch.ones((), dtype=torch.float64), length=6,
                         memory="checkpoints:steps=2")[0]  # fmt: skip

    assert torch.autograd.gradgradcheck(last, w)


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ("gates", "has no gates"),
        ("some", "memory must be one of"),
        ("checkpoints:bytes=7", "bytes must hold the tape of a step, 8 bytes"),
    ],
)
def test_bad_arguments(memory, message):
    with pytest.raises(ValueError, match=message):
        bptt.scan(lambda c, _: (2 * c, c), torch.ones(2, requires_grad=True), length=50, memory=memory)


# How often steps are run


def backward_calls(T, memory, policy="full", rows="auto"):
    """The rows of every call of the step in backward."""
    ran = []
    w = torch.ones(2, requires_grad=True)

    def step(c, x):
        ran.append(len(c))
        return torch.sin(w * c + x), c

    _, ys = bptt.scan(step, torch.ones(2, 2), torch.ones(T, 2, 2), gradient=policy, memory=memory, rows=rows)
    ran.clear()
    ys.sum().backward()
    return ran


@pytest.mark.parametrize("policy", ["full", "chunked:5", "truncated:5"])
@pytest.mark.parametrize("T", [1, 2, 12, 13, 17, 60])
@pytest.mark.parametrize("steps", [1, 2, 4, 5, 12, 99])
def test_one_level_runs_a_step_once_more(T, steps, policy):
    segments = -(-T // steps)
    rebuilt = T - segments if 1 < steps < T else 0
    assert len(backward_calls(T, f"checkpoints:steps={steps}", policy, "coupled")) == T + rebuilt


@pytest.mark.parametrize(("T", "carries"), [(40, 8), (60, 8), (60, 5), (120, 12), (200, 9), (200, 3)])
def test_a_budget_runs_what_the_schedule_says(T, carries):
    memory = Checkpoints(bytes=16 * carries)
    steps = max(2, memory.cut(T, 16, 16).steps)
    segments, rest = divmod(T, steps)
    assert rest == 0
    kept = KeptCarries.of(memory, T, [torch.ones(2, 2)])
    slots = (carries - steps) // 2
    assert kept.schedule == binomial(segments, slots)
    assert slots < segments - 1
    advanced = advances(segments, slots) - max(kept.schedule.stored_forward, default=0)
    reversals = T - segments + T
    assert len(backward_calls(T, memory)) == steps * advanced + reversals


@pytest.mark.parametrize("memory", ["steps=60", "steps=61", "bytes=960", "bytes=99999", "steps=1"])
@pytest.mark.parametrize("policy", ["full", "chunked:7", "truncated:5"])
def test_nothing_is_rebuilt_where_all_fits(memory, policy):
    assert backward_calls(60, f"checkpoints:{memory}", policy) == backward_calls(60, "states", policy)


@pytest.mark.parametrize(
    ("policy", "rows"),
    [
        # In the last span 20 blocks, of which one leaves at each step back; behind it 4 more come in, and end.
        ("truncated:5", [40, 38, 36, 34, 32] + 2 * [48, 44, 40, 36, 32]),
        ("chunked:5", 15 * [8]),
    ],
)
def test_blocks_of_a_segment_lie_side_by_side(policy, rows):
    ran = backward_calls(60, "checkpoints:steps=20", policy)
    assert [n for n in ran if n > 2] == [4, *rows]
    assert ran.count(2) == 57


@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize("elements", [120, 2**20])
@pytest.mark.parametrize("name", ["lstm", "tree", "branch_on_all_rows", "next_row"])
@pytest.mark.parametrize("policy", POLICIES_OF_LOOPS.values(), ids=str)
def test_blocks_that_cross_segments(policy, name, elements, steps, agree, monkeypatch):
    monkeypatch.setattr(sweep, "_MERGED_ELEMENTS", elements)
    case = STEPS[name]()
    options = {"resets": RESETS} if name == "lstm" else {}
    got = measured(case, policy, memory=Checkpoints(steps=steps), **options)
    agree(got, expected(case, policy, **options))


def test_rows_declared_independent():
    case, policy = STEPS["rnn"](), Truncated(3)
    got = measured(case, policy, memory="checkpoints:steps=2", rows="independent")
    assert_close(got, measured(case, policy))
    step, carry, xs, _ = STEPS["closure_per_row"]()
    _, ys = bptt.scan(
        step, carry, xs, gradient=policy, rows="independent", memory="checkpoints:steps=2", kernel="replay"
    )
    with pytest.raises(ValueError, match="rows='independent' does not hold"):
        ys.sum().backward()


@pytest.mark.parametrize("shape", [(3, 2), (1, 2), (2,)])
def test_a_step_that_gives_another_shape_when_run_again(shape):
    forward = [True]

    def step(c, x):
        return (torch.sin(c) if forward[0] else torch.ones(shape)), x

    c, _ = bptt.scan(
        step, torch.ones(2, 2, requires_grad=True), length=9, memory="checkpoints:steps=3", kernel="replay"
    )
    forward[0] = False
    with pytest.raises(RuntimeError, match="step, run again in backward, gave another result at step 6"):
        c.sum().backward()


# How many carries are in memory


class Live(TorchDispatchMode):
    """The most carries of 4000 bytes that live storages made inside have held at once."""

    def __init__(self):
        super().__init__()
        self.living, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            storage = t.untyped_storage() if isinstance(t, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.living:
                self.note(storage, storage._cdata, storage.nbytes() // 4000)
        self.peak = max(self.peak, self.now)
        return out

    def note(self, storage, key, carries):
        def drop(_):
            self.now -= carries
            del self.living[key]

        self.now += carries
        self.living[key] = weakref.ref(storage, drop)


def most_carries(T, memory):
    w = torch.ones(1000, requires_grad=True)
    with Live() as live:
        _, ys = bptt.scan(lambda c, _: (torch.sin(w * c), c.sum()), torch.ones(1000), length=T, memory=memory)
        ys.sum().backward()
    return live.peak


@pytest.mark.parametrize("T", [150, 300])
@pytest.mark.parametrize("memory", ["steps=2", "steps=50", "steps=140", "bytes=32000", "bytes=80000", "bytes=160000"])
def test_carries_in_memory(T, memory):
    policy = parse(f"checkpoints:{memory}")
    held = -(-T // policy.steps) - 1 + policy.steps if policy.steps else policy.bytes // 4000
    at_work = most_carries(T, "states") - T  # the step's own
    assert most_carries(T, policy) - at_work <= held + 3
