"""What `plan` tells beforehand is what a call then keeps and runs."""

import weakref

import pytest
import torch
from clock import Clock

import bptt
from bptt.engine import Stack, segments
from bptt.engine.backward import BackwardPass

T, B, I, H = 300, 4, 5, 16

NETS = {
    "rnn": (bptt.nn.RNN, {}),
    "gru": (bptt.nn.GRU, {"num_layers": 2}),
    "lstm": (bptt.nn.LSTM, {}),
    "projected": (bptt.nn.LSTM, {"num_layers": 3, "proj_size": 7}),
    "both ways": (bptt.nn.GRU, {"num_layers": 2, "bidirectional": True}),
    "batch first": (bptt.nn.LSTM, {"num_layers": 2, "batch_first": True, "dropout": 0.0}),
}
MEMORIES = ["auto", "gates", "states", "checkpoints", "checkpoints:steps=20", "checkpoints:bytes=60000"]
POLICIES = [
    ("gru", {"dropout": 0.3}, "full", "gates"),
    ("both ways", {"dropout": 0.3}, "full", "checkpoints:steps=17"),
    ("projected", {"dropout": 0.3}, "randomized:0.8", "checkpoints:steps=17"),
    ("rnn", {}, "randomized:0.8", "checkpoints:steps=10"),
    ("both ways", {}, "randomized:0.8", "states"),
    ("lstm", {}, "chunked:35", "checkpoints:bytes=20000"),
    ("gru", {}, "chunked:35", "checkpoints:bytes=30000"),
    ("both ways", {}, "chunked:35", "checkpoints:bytes=200000"),
    ("gru", {}, "truncated:40", "states"),
    ("gru", {}, "truncated:40/30", "checkpoints:bytes=30000"),
    ("both ways", {}, "truncated:40/10", "checkpoints:steps=17"),
    ("both ways", {}, "truncated:45/40", "checkpoints:bytes=160000"),
    ("both ways", {}, "truncated:40/10", "states"),
    ("lstm", {}, "full", "checkpoints:bytes=3000"),
    ("lstm", {}, "full", "checkpoints:bytes=6000"),
]


class Measured:
    """A call and its backward call, watched."""

    def __init__(self, layer, monkeypatch):
        x = torch.randn(B, T, I) if layer.batch_first else torch.randn(T, B, I)
        saved = {}
        with monkeypatch.context() as patch:
            patch.setattr("bptt.nn.layers.undrawn", lambda *_: None)
            patch.setattr("bptt.nn.layers.plain", lambda *_: None)  # whose bytes are below
            nets = self._returned(patch, "bptt.nn.layers.net_of")
            with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(id(t), t), lambda t: t):
                y, final = layer(x)
        states = final if isinstance(final, tuple) else (final,)
        own = _storages((x, y, *states, *layer.parameters()))
        kept = _storages((*saved.values(), *nets[0].masks, *nets[0].xi))
        with monkeypatch.context() as patch:
            self.steps, self.made, self.rebuilt, self.stored, alive = 0, 0, 0, 0, weakref.WeakSet()
            self._watch_segments(patch)
            self._watch_rebuilt(patch, alive)
            self._watch_stored(patch, {*kept, *own})
            y.sum().backward()
        self.bytes = sum(n for at, n in kept.items() if at not in own) + self.made + self.rebuilt + self.stored
        self.again = self.steps / (T * layer.num_layers * (2 if layer.bidirectional else 1))

    @staticmethod
    def _returned(patch, name):
        returned, net_of = [], bptt.nn.layers.net_of

        def watched(*args, **kwargs):
            returned.append(net_of(*args, **kwargs))
            return returned[-1]

        patch.setattr(name, watched)
        return returned

    def _watch_segments(self, patch):
        forward = Stack.forward

        def watched(stack, tensors, keep):
            outputs, tape = forward(stack, tensors, keep)
            self.steps += len(tensors[0]) * stack.net.layers * stack.net.directions
            self.made = max(self.made, sum(_storages(tape).values()))
            return outputs, tape

        patch.setattr(Stack, "forward", watched)

    def _watch_rebuilt(self, patch, alive):
        rebuilt = BackwardPass._rebuilt

        def watched(*args):
            gates = rebuilt(*args)
            alive.add(gates)
            self.rebuilt = max(self.rebuilt, sum(t.nbytes for t in alive))
            return gates

        patch.setattr(BackwardPass, "_rebuilt", watched)

    def _watch_stored(self, patch, before):
        reversals, alive = segments.reversals, weakref.WeakSet()

        def keep(state):
            for s in state:
                alive.add(s)
            stored = _storages(alive)
            self.stored = max(self.stored, sum(n for at, n in stored.items() if at not in before))
            return state

        patch.setattr(segments, "reversals", lambda *given: reversals(*given, keep))


@pytest.mark.parametrize("kernel", ["auto", "fused"])
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_the_copy_of_y_of_a_plain_call_is_told(kind, kernel):
    """Up to 64 KiB of y are a copy of the tape's h; torch's layers keep what they like, and their y."""
    layer, x, saved = getattr(bptt.nn, kind)(I, H, kernel=kernel), torch.randn(100, B, I), {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(id(t), t), lambda t: t):
        y, final = layer(x)
    own = _storages((x, y, *(final if isinstance(final, tuple) else (final,)), *layer.parameters()))
    kept = sum(n for at, n in _storages(saved.values()).items() if at not in own)
    told = bptt.plan(layer, 100, B).tape_bytes
    if kernel == "auto":
        assert told == pytest.approx(kept, rel=0.03)
        assert told - y.nbytes < 0.9 * kept
    layer.gradient = "chunked:10"  # of which torch's layers keep no copy
    without = bptt.plan(layer, 100, B).tape_bytes
    assert without == (told if kernel == "auto" else told - y.nbytes)


def _storages(tensors):
    """Bytes by address."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("net", NETS)
def test_bytes_and_steps(net, memory, monkeypatch):
    if net == "both ways" and "bytes" in memory:  # less than what lies between its layers
        memory = "checkpoints:bytes=200000"
    _check(net, {}, "full", memory, monkeypatch)


@pytest.mark.parametrize(("net", "options", "gradient", "memory"), POLICIES)
def test_bytes_and_steps_of_policies(net, options, gradient, memory, monkeypatch):
    _check(net, options, gradient, memory, monkeypatch)


def _check(net, options, gradient, memory, monkeypatch):
    kind, own = NETS[net]
    layer = kind(I, H, memory=memory, gradient=gradient, **own | options)
    told, found = bptt.plan(layer, T, B), Measured(layer, monkeypatch)
    assert told.tape_bytes == pytest.approx(found.bytes, rel=0.01)
    assert told.recomputed == pytest.approx(found.again, rel=1e-12)
    assert told.memory == memory
    assert (told.recomputed > 0) == memory.startswith("checkpoints")


def test_steps_of_many_groups_of_columns(monkeypatch):
    monkeypatch.setattr(bptt.kernels.sums, "SWEEP_VALUES", 2**16)  # 27 groups
    _check("both ways", {}, "truncated:20/5", "checkpoints:steps=17", monkeypatch)
    monkeypatch.setattr(bptt.nn._plan, "GROUPS", 10)
    layer = bptt.nn.GRU(I, H, 2, bidirectional=True, gradient="truncated:20/5", memory="checkpoints:steps=17")
    assert bptt.plan(layer, T, B).recomputed == pytest.approx(Measured(layer, monkeypatch).again, rel=0.05)


def test_less_memory_takes_more_recomputation():
    layer = bptt.nn.LSTM(I, H)
    plans = [bptt.plan(layer, 10_000, B, memory=f"checkpoints:bytes={n}") for n in (10**7, 10**6, 10**5, 3 * 10**4)]
    assert [p.tape_bytes for p in plans] == sorted((p.tape_bytes for p in plans), reverse=True)
    again = [p.recomputed for p in plans]
    assert again[0] == again[1] == 1
    assert 1 < again[2] < again[3]


@pytest.mark.parametrize(
    ("gradient", "memory", "steps"),
    [("full", "checkpoints:steps=1", 1500), ("full", "checkpoints:bytes=3000", 1000), ("truncated:90", "gates", 1500),
     ("truncated:90", "checkpoints:steps=17", 1000)],
)  # fmt: skip
def test_seconds(gradient, memory, steps, monkeypatch):
    """On a machine where a step takes as long whenever it is walked."""
    clock = Clock(monkeypatch)
    layer = bptt.nn.LSTM(I, H, gradient=gradient, memory=memory, kernel="cpu")
    told, x = bptt.plan(layer, steps, B), torch.randn(steps, B, I)
    begun = clock()
    layer(x)[0].sum().backward()
    assert told.seconds == pytest.approx(clock() - begun, rel=0.01)


def test_planning_is_quick(monkeypatch):
    """The first steps are run, not all."""
    clock = Clock(monkeypatch)
    layer = bptt.nn.LSTM(64, 128, 2, gradient="truncated:5000", memory="checkpoints:steps=17", kernel="cpu")
    told = bptt.plan(layer, 100_000, 8)
    assert clock() < 2
    assert told.seconds > 60


def test_the_first_call_does_not_count(monkeypatch):
    """It pays for more than its steps: the estimate is that of the others."""
    clock = Clock(monkeypatch)
    layer, x = bptt.nn.LSTM(I, H, kernel="cpu"), torch.randn(1000, B, I)
    begun = clock()
    layer(x)[0].sum().backward()
    usual, timed, first = clock() - begun, bptt.nn._plan._timed, iter([30.0])

    def slow_at_first(*arguments):
        ahead, back, again = timed(*arguments)
        clock.now += (cold := next(first, 0.0))
        return ahead + cold, back, again

    monkeypatch.setattr("bptt.nn._plan._timed", slow_at_first)
    assert bptt.plan(layer, 1000, B).seconds == pytest.approx(usual, rel=0.01)


def test_seconds_have_their_spread(monkeypatch):
    """Every other run takes half as long again."""
    clock, timed, runs = Clock(monkeypatch), bptt.nn._plan._timed, []
    layer, x = bptt.nn.LSTM(I, H, kernel="cpu"), torch.randn(1000, B, I)
    begun = clock()
    layer(x)[0].sum().backward()
    usual = clock() - begun

    def uneven(*arguments):
        runs.append(arguments[-1])
        ahead, back, again = timed(*arguments)
        factor = 1.5 if len(runs) % 2 else 1.0
        return factor * ahead, factor * back, again

    monkeypatch.setattr("bptt.nn._plan._timed", uneven)
    told = bptt.plan(layer, 1000, B)
    assert (told.low, told.high) == pytest.approx((usual, 1.5 * usual), rel=0.01)
    assert told.seconds in (pytest.approx(told.low), pytest.approx(told.high))
    assert runs[-5:] == [runs[-1]] * 5
    assert f"{told.seconds:.3g} s ({told.low:.3g} to {told.high:.3g})" in str(told)
    assert not told.disturbed


def test_a_disturbed_machine_is_told(monkeypatch):
    Clock(monkeypatch, cores=0.5)
    told = bptt.plan(bptt.nn.GRU(I, H, kernel="cpu"), 50, B)
    assert told.disturbed
    assert str(told).endswith("on a disturbed machine)")


def test_nothing_is_changed():
    own = torch.Generator().manual_seed(3)
    policy = bptt.Randomized(0.5, generator=own)
    nets = {
        "a": bptt.nn.GRU(I, H, 2, dropout=0.3, gradient=policy),
        "b": bptt.nn.LSTM(H, H, batch_first=True, memory="states"),
        "c": torch.nn.utils.parametrizations.weight_norm(bptt.nn.RNN(H, H), "weight_hh_l0"),
    }
    model, called = torch.nn.ModuleDict(nets), []
    for layer in model.values():
        layer.register_forward_hook(lambda *_: called.append(1))
    before, held = [p.clone() for p in model.parameters()], [dict(vars(layer)) for layer in model.values()]
    random = torch.get_rng_state(), own.get_state()
    told = bptt.plan(model, 50, 2, memory="checkpoints")
    assert told.seconds > 0
    assert told.tape_bytes == sum(bptt.plan(layer, 50, 2, memory="checkpoints").tape_bytes for layer in model.values())
    assert torch.equal(torch.get_rng_state(), random[0])
    assert torch.equal(own.get_state(), random[1])
    assert all(p.grad is None and torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert [dict(vars(layer)) for layer in model.values()] == held
    assert not called


def test_nothing_is_changed_by_an_error():
    layer = bptt.nn.GRU(I, H, memory="states")
    with pytest.raises(ValueError, match="bytes must hold the tape of a step"):
        bptt.plan(layer, 50, 2, memory="checkpoints:bytes=3")
    assert layer.training
    assert layer.memory == "states"


def test_in_inference_mode():
    layer = bptt.nn.GRU(I, H, gradient="truncated:7")
    with torch.inference_mode():
        told = bptt.plan(layer, 23, 3)
    assert told.tape_bytes == bptt.plan(layer, 23, 3).tape_bytes
    frames = bptt.kernels.Frames.of(layer.gradient.reach(23), None, 23, 3)  # kept from one call to the next
    assert not frames.start.is_inference()


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"model must hold a bptt\.nn layer: got Linear"):
        bptt.plan(torch.nn.Linear(2, 3), 5, 1)
    for T, B, message in ((100.0, 2, r"T must be a whole number: got 100.0 \(float\)"), (5, "2", "B must be .* '2'")):
        with pytest.raises(TypeError, match=message):
            bptt.plan(bptt.nn.GRU(2, 3), T, B)
    with pytest.raises(ValueError, match="T must be at least 1: got 0"):
        bptt.plan(bptt.nn.GRU(2, 3), 0, 1)
