"""What a step hands to the next beside the carry, and what leaves it beside its y."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bptt import scan

from .loops import DOUBLE, B, H, Step, T, loop, random

OUTSIDE = "what a step hands to the next must be in the carry"


class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        return (v > 0).to(v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / (1 + ctx.saved_tensors[0].abs()) ** 2


class Neuron(nn.Module):
    """A spiking neuron that keeps its membrane."""

    def __init__(self, threshold: float = 1.0, detached: bool = False) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.tensor(0.9, dtype=DOUBLE))
        self.threshold, self.detached = threshold, detached
        self.mem: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        mem = x if self.mem is None else self.decay * self.mem + x
        spikes = Spike.apply(mem - self.threshold)
        mem = mem - spikes * self.threshold
        self.mem = mem.detach() if self.detached else mem
        return spikes


# Each makes a step of what it captures.


def neuron(**kw: Any) -> Callable[[], Step]:
    def make() -> Step:
        net = nn.ModuleDict({"inner": nn.Sequential(nn.Linear(H, H, dtype=DOUBLE), Neuron(**kw))})
        return lambda h, x: ((s := net["inner"](x) + 0 * h), s)

    return make


def in_a_list() -> Step:
    states: list[Tensor] = [torch.zeros(B, H, dtype=DOUBLE)]

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        states.append(torch.tanh(states[-1] + x))
        return h + x, states[-1] * 0

    return step


def in_a_dict_of_lists() -> Step:
    held: dict[str, Any] = {"a": [[random(B, H, grad=False)]]}

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        new = torch.stack([held["a"][0][0], x]).sum(0)
        held["a"][0] = [new]
        return h * 0.5, new.relu()

    return step


def given_as_it_is() -> Step:
    """Returned, without a call of torch in between."""
    held = {"last": random(B, H, grad=False)}

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        before = held["last"]
        held["last"] = h * x
        return h + x, before

    return step


def the_x_of_the_step_before() -> Step:
    held: dict[str, Tensor] = {}

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(h + x - held.get("x", x))
        held["x"] = x
        return h, h

    return step


def the_spikes_alone() -> Step:
    """What autograd.Function.apply gave, which torch function modes do not see."""
    held = {"spikes": torch.zeros(B, H, dtype=DOUBLE)}

    def step(v: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        v = 0.9 * v + x - held["spikes"]
        held["spikes"] = Spike.apply(v - 100)
        return v, v

    return step


def by_data() -> Step:
    held: list[Tensor] = []

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(h * 0.5 + x + (held[-1] if held else 0))
        held[:] = [h.data]
        return h, h

    return step


def written_by_data() -> Step:
    state = torch.zeros(B, H, dtype=DOUBLE)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.sin(state + x)
        state.data = h * 0.5
        return h + x, y

    return step


def a_buffer() -> Step:
    module = nn.Module()
    module.register_buffer("mean", torch.zeros(H, dtype=DOUBLE))

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            module.mean.mul_(0.9).add_(h.mean(0))
        h = torch.tanh(h - module.mean + x)
        return h, h

    return step


def a_buffer_that_is_read_before_it_is_written() -> Step:
    total = torch.zeros(H, dtype=DOUBLE)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(h - total + x)
        total.add_(h.detach().mean(0))
        return h, h

    return step


def rows_of_a_buffer() -> Step:
    rows = torch.zeros(T + 9, B, H, dtype=DOUBLE)
    count = [0]

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        here = rows[count[0]]
        here.copy_(h)
        count[0] += 1
        out = torch.zeros(B, H, dtype=DOUBLE)
        out[:] = rows.sum(0)
        return h + x, out

    return step


def a_counter() -> Step:
    """Nothing that has a gradient; another tensor at every step."""
    held = {"n": torch.zeros((), dtype=torch.long)}

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        held["n"] = held["n"] + 1
        return torch.sin(h * held["n"] + x), x

    return step


def batch_norm_with_momentum_read() -> Step:
    norm = nn.BatchNorm1d(H, dtype=DOUBLE)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(norm(h) + x)
        return h, h + norm.running_mean

    return step


def normalized_weight(norm: type[nn.Module] = nn.BatchNorm1d, train: bool = True) -> Callable[[], Step]:
    """What a normalisation gives of the carry, kept at the first step and used at every one."""

    def make() -> Step:
        module, held = norm(H, dtype=DOUBLE, affine=True).train(train), dict[str, Tensor]()

        def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            if "normal" not in held:
                given = torch.sin(h * module.weight)
                held["normal"] = module(given) if norm is nn.BatchNorm1d else module(given.t()[None])[0].t()
            h = torch.tanh(h * held["normal"] + x)
            return h, h

        return step

    return make


STATES: dict[str, tuple[Callable[[], Step], str]] = {
    "neuron": (
        neuron(),
        r"step 1 uses net\.inner\[1\]\.mem, a float64 tensor \[3, 4\], which step 0 made by torch",
    ),
    "silent": (neuron(threshold=1e9), r"\.mem, a float64 tensor"),
    "detached": (
        neuron(threshold=1e9, detached=True),
        r"\.mem, a float64 tensor \[3, 4\], which step 0 made by .*detach",
    ),
    "list": (in_a_list, r"step 1 uses states\[1\], a float64 tensor \[3, 4\], which step 0 made by torch.tanh"),
    "dict": (in_a_dict_of_lists, r"held\['a'\]\[0\]\[0\], a float64"),
    "given": (given_as_it_is, r"step 1 uses a float64 tensor \[3, 4\], which step 0 made by .*mul"),
    "x": (the_x_of_the_step_before, r"held\['x'\], a float64 tensor \[3, 4\], which step 0 received"),
    "spikes": (the_spikes_alone, r"held\['spikes'\], a float64"),
    "data": (by_data, r"step 1 uses held\[0\], a float64"),
    "written_by_data": (
        written_by_data,
        r"carry and y come from state, a float64 tensor \[3, 4\], which the step writes to",
    ),
    "buffer": (a_buffer, r"carry and y come from module\.mean, a float64 tensor \[4\], which the step writes to"),
    "read_first": (a_buffer_that_is_read_before_it_is_written, "come from total, "),
    "rows": (rows_of_a_buffer, "come from rows, "),
    "counter": (a_counter, r"held\['n'\], a int64 tensor \[\], which step \d made by"),
    "normal": (normalized_weight(), r"step 1 uses held\['normal'\], a float64 tensor .*, which step 0 made by"),
    "normal_eval": (normalized_weight(train=False), r"step 1 uses held\['normal'\], a float64 tensor"),
    "instance": (normalized_weight(nn.InstanceNorm1d), r"step 1 uses held\['normal'\], a float64 tensor"),
    "statistics": (batch_norm_with_momentum_read, r"come from norm\.running_mean, "),
}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("policy", ["full", "truncated:2"])
def test_state_outside_of_the_carry(name: str, policy: str) -> None:
    make, message = STATES[name]
    h, xs = random(B, H), random(T, B, H)
    with pytest.raises(RuntimeError, match=rf"(?s){message}.*{OUTSIDE}"):
        scan(make(), h, xs, gradient=policy)
    torch.manual_seed(1)
    with torch.no_grad():
        final, _ = scan(make(), h, xs)
    torch.manual_seed(1)
    torch.testing.assert_close(final, loop(make(), h.detach(), xs.detach(), T)[0])
    if name not in (
        "neuron",
        "silent",
        "detached",
        "statistics",
        "normal",
        "normal_eval",
        "instance",
    ):  # these capture parameters
        assert not scan(make(), h.detach(), xs.detach())[0].requires_grad


def test_state_inside_a_call_that_is_not_seen() -> None:
    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(H, dtype=DOUBLE))
            self.mem = torch.zeros(B, H, dtype=DOUBLE)

        def forward(self, x: Tensor) -> Tensor:
            self.mem = torch.tanh(self.mem * self.weight + x)
            return self.mem

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        net = torch.jit.script(Leaky())
    with pytest.raises(RuntimeError, match=OUTSIDE):
        scan(lambda h, x: (h + x, net(x) * 0), random(B, H), random(T, B, H))


# Values that leave a step


LEAVING: dict[str, Callable[[Tensor], Any]] = {
    "scalar": lambda h: h.square().mean(),
    "state": lambda h: h,
    "view": lambda h: h[:, 0],
    "two_views": lambda h: h.exp().chunk(2, 1),
    "detached_view": lambda h: {"a": [h.exp()[0]]},
    "spikes": lambda h: Spike.apply(h).sum(),
}


@pytest.mark.parametrize("name", LEAVING)
@pytest.mark.parametrize("as_attribute", [False, True])
def test_values_that_leave_a_step_have_no_silent_gradient(name: str, as_attribute: bool) -> None:
    aux: list[Any] = []
    w = random(H)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(h * w + x)
        if as_attribute:
            aux[:] = [LEAVING[name](h)]
        else:
            aux.append(LEAVING[name](h))
        return h, h * 1

    h, xs = random(B, H), random(T, B, H)
    _, ys = scan(step, h, xs)
    left = tree_leaves(aux)
    assert all(t.requires_grad for t in left)
    for inputs in ([w], [h], [xs], [w, h, xs]):
        for t in left:
            with pytest.raises(RuntimeError, match=r"a tensor made inside the step of bptt\.scan has no gradient"):
                torch.autograd.grad(t.sum() + ys.sum(), inputs, retain_graph=True)
    with pytest.raises(RuntimeError, match="return it in y"):
        (ys.sum() + torch.stack([t.sum() for t in left]).sum()).backward()
    _, ys = scan(step, h, xs)
    values = torch.stack([t.detach().sum() for t in tree_leaves(aux)])
    assert values.isfinite().all()
    ys.sum().backward()
    assert w.grad is not None


def test_what_a_module_keeps_is_that_of_the_last_step() -> None:
    kept: dict[str, Tensor] = {}
    w = random(H)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(h * w + x)
        kept["last"] = h.sum(0)
        return h, h

    h, xs = random(B, H), random(T, B, H)
    final, _ = scan(step, h, xs)
    torch.testing.assert_close(kept["last"].detach(), final.detach().sum(0))


def test_what_leaves_without_a_gradient_stays_as_it_is() -> None:
    """Tables, indices, what depends on an x that has no gradient, and what is made where nothing has one."""
    left: list[Tensor] = []
    w = random(H)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        left.extend([x.mean(), (h > 0).sum(), torch.arange(3.0), torch.rand(2)])
        h = torch.tanh(h * w + x)
        return h, h

    scan(step, random(B, H), random(T, B, H, grad=False))
    assert not any(t.requires_grad for t in left)

    def frozen(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        left.append(h * x)
        return h + x, h

    scan(frozen, random(B, H, grad=False), random(T, B, H, grad=False))
    assert not left[-1].requires_grad
