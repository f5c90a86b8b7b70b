"""`bptt.nn.Recurrent` of cells of many kinds: how they are called, what they start from, and what is refused."""

import copy
import pickle
import weakref
from typing import Any, NamedTuple

import pytest
import torch
from sweeps import Agree
from torch import Tensor, nn

import bptt

T, B, I, H = 7, 3, 2, 4
DOUBLE = torch.float64
LENGTHS = [7, 4, 5]


class Cell(nn.Module):
    """A recurrence of two tensors, which the cells below call, take and return in their own ways."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTMCell(I, H, dtype=DOUBLE)

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(x, (h, c))


class Sized(Cell):
    hidden_size = H

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, c = state
        return self.step(x, h, c)


class Output(Cell):
    """Returns (output, state), where the state is a dict."""

    def initial_state(self, batch_size: int) -> dict[str, Tensor]:
        return {name: torch.zeros(batch_size, H, dtype=DOUBLE) for name in ("c", "h")}

    def forward(self, x: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        h, c = self.step(x, state["h"], state["c"])
        return h, {"h": h, "c": c}


class Broadcasting(Output):
    """Starts from one lane, in its first tensor even from a scalar."""

    def initial_state(self, batch_size: int) -> dict[str, Tensor]:
        return {"h": torch.zeros((), dtype=DOUBLE), "c": torch.zeros(1, H, dtype=DOUBLE)}

    def forward(self, x: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return super().forward(x, {name: t.expand(len(x), H) for name, t in state.items()})


class State(NamedTuple):
    h: Tensor
    c: Tensor


class FromNone(Cell):
    """Makes its own state, of zeros, and returns a named tuple."""

    def forward(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        state = State(x.new_zeros(len(x), H), x.new_zeros(len(x), H)) if state is None else state
        new = State(*self.step(x, *state))
        return new.h, new


class Spread(Cell):
    """Takes the tensors of its state one by one."""

    def forward(self, x: Tensor, h: Tensor | None = None, c: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        zeros = x.new_zeros(len(x), H)
        new = self.step(x, zeros if h is None else h, zeros if c is None else c)
        return new[0], *new


class SpreadState(Spread):
    """Returns them without an output."""

    def forward(self, x: Tensor, h: Tensor | None = None, c: Tensor | None = None) -> Any:
        return super().forward(x, h, c)[1:]


CELLS: dict[str, tuple[type[Cell], dict[str, Any]]] = {
    "sized": (Sized, {}),
    "output": (Output, {}),
    "broadcasting": (Broadcasting, {}),
    "from_none": (FromNone, {}),
    "spread": (Spread, {}),
    "spread_state": (SpreadState, {"form": "spread"}),
}
POLICIES = ["full", "chunked:3", "truncated:4", "truncated:4/2", "randomized:0.8"]


def measured(layer: nn.Module, x: Tensor, **kw: Any) -> list[Tensor]:
    """y, the final state's tensors, and the gradients of an irregular loss of all of them."""
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(5)
    y, state = layer(x, **kw)
    outputs = [y, *sorted(torch.utils._pytree.tree_leaves(state), key=lambda t: t.sum().item())]
    generator = torch.Generator().manual_seed(6)
    loss = sum((t * torch.randn(t.shape, generator=generator, dtype=DOUBLE)).sum() for t in outputs)
    return [*outputs, *torch.autograd.grad(loss, [x, *layer.parameters()])]


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_form_is_the_layer(name: str, policy: str, agree: Agree) -> None:
    kind, kw = CELLS[name]
    cell, x = kind(), torch.randn(T, B, I, dtype=DOUBLE)
    reference = bptt.nn.Recurrent(cell.inner, gradient=policy)
    layer = bptt.nn.Recurrent(cell, gradient=policy, **kw)
    agree(measured(layer, x), measured(reference, x))
    agree(measured(layer, x, lengths=LENGTHS), measured(reference, x, lengths=LENGTHS))
    _, state = layer(x)
    again, _ = layer(x, state)
    agree(again, reference(x, reference(x)[1])[0])


class Warm(Cell):
    """Starts from what its first input says: from None, and not from zero."""

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if state is None:
            state = torch.cos(x.sum(1, keepdim=True)).expand(-1, H), x.new_ones(len(x), H)
        new = self.step(x, *state)
        return new[0], new


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["even", "lengths"])
def test_a_state_of_the_cells_own(policy: str, lengths: list[int] | None, agree: Agree) -> None:
    """It is made in the first step, which is a step of the policy: x_0 gets its part of the gradient."""
    cell, x = Warm(), torch.randn(T, B, I, dtype=DOUBLE)
    layer = bptt.nn.Recurrent(cell, gradient=policy)
    start = bptt.nn.Recurrent(cell, gradient=policy)
    x = x.requires_grad_()
    hx = [t[None] for t in (torch.cos(x[0].sum(1, keepdim=True)).expand(-1, H), x.new_ones(B, H))]
    found = []
    for one, state in ((layer, None), (start, tuple(hx))):
        torch.manual_seed(5)
        y, final = one(x, state, lengths=lengths)
        generator = torch.Generator().manual_seed(6)
        loss = sum((t * torch.randn(t.shape, generator=generator, dtype=DOUBLE)).sum() for t in (y, *final))
        found.append([y, *final, *torch.autograd.grad(loss, [x, *one.parameters()], retain_graph=True)])
    agree(found[0], found[1])


def test_what_trying_a_cell_leaves_behind() -> None:
    """Nothing: random numbers, buffers, attributes and training are as they were, and it happens once."""

    class Noisy(nn.Module):
        hidden_size = H

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(H)
            self.calls = 0

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            self.calls += 1
            return self.norm(h + x + torch.rand_like(h))

    cell = Noisy()
    layer = bptt.nn.Recurrent(cell)
    torch.manual_seed(0)
    with torch.no_grad():
        y, _ = layer(torch.zeros(1, B, H))
    assert cell.calls == 1
    assert int(cell.norm.num_batches_tracked) == 1
    torch.manual_seed(0)
    expected = nn.BatchNorm1d(H)(torch.rand(B, H))
    torch.testing.assert_close(y[0], expected)


def test_learned_initial_state(agree: Agree) -> None:
    x = torch.randn(T, B, I, dtype=DOUBLE)
    layer = bptt.nn.Recurrent(
        [nn.LSTMCell(I, H, dtype=DOUBLE), nn.LSTMCell(H, 5, dtype=DOUBLE)],
        learn_initial_state=True,
        gradient="truncated:4/2",
    )
    assert [tuple(p.shape) for p in layer.initial_states] == [(H,), (H,), (5,), (5,)]
    with torch.no_grad():
        for p in layer.initial_states:
            p.normal_()
    hx = [tuple(p.detach().expand(B, -1) for p in [*layer.initial_states][i : i + 2]) for i in (0, 2)]
    leaves = [tuple(t.clone().requires_grad_() for t in pair) for pair in hx]
    found, expected = layer(x), layer(x, leaves)
    agree(found, expected)
    grads = torch.autograd.grad(found[0].square().sum(), [*layer.initial_states])
    wanted = torch.autograd.grad(expected[0].square().sum(), [t for pair in leaves for t in pair])
    agree(grads, tuple(g.sum(0) for g in wanted))


def test_attribute_and_tokens(agree: Agree) -> None:
    """A state that is an attribute, for one lane; x of integers."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.inner = nn.Embedding(5, I, dtype=DOUBLE), nn.GRUCell(I, H, dtype=DOUBLE)
            self.initial_state = nn.Parameter(torch.randn(H, dtype=DOUBLE))

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return self.inner(self.embed(x), h)

    cell, x = Tokens(), torch.randint(5, (T, B))
    y, h = bptt.nn.Recurrent(cell, gradient="truncated:3")(x)
    reference = bptt.nn.Recurrent(cell.inner, gradient="truncated:3")
    hx = cell.initial_state.expand(1, B, H)
    agree((y, h), reference(cell.embed(x), hx))
    parameters = list(cell.parameters())
    agree(
        torch.autograd.grad(y.square().sum(), parameters),
        torch.autograd.grad(reference(cell.embed(x), hx)[0].square().sum(), parameters),
    )
    one, _ = bptt.nn.Recurrent(cell)(x[:, 0])
    agree(one, y[:, 0])


def test_states_with_other_dimensions(agree: Agree) -> None:
    """A convolution's state, in both directions and two layers, and a counter among the tensors."""

    class Image(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.conv = nn.Conv1d(channels + 2, 2, 3, padding=1, dtype=DOUBLE)

        def initial_state(self, batch_size: int) -> Any:
            return torch.zeros(batch_size, 2, 6, dtype=DOUBLE), 0

        def forward(self, x: Tensor, state: tuple[Tensor, int]) -> Any:
            h, n = state
            h = torch.tanh(self.conv(torch.cat([x, h], 1)))
            return h * (1 + n), (h, n + 1)

    layer = bptt.nn.Recurrent(lambda n: Image(4 if n else 3), 2, bidirectional=True)
    x = torch.randn(T, B, 3, 6, dtype=DOUBLE)
    y, states = layer(x)
    assert y.shape == (T, B, 4, 6)
    assert [n for _, n in states] == [T] * 4

    def one(cell: nn.Module, x: Tensor) -> Tensor:
        state, ys = cell.initial_state(B), []
        for x_t in x:
            y, state = cell(x_t, state)
            ys.append(y)
        return torch.stack(ys)

    for layer_cells in (layer.cells[:2], layer.cells[2:]):
        x = torch.cat([one(layer_cells[0], x), one(layer_cells[1], x.flip(0)).flip(0)], 2)
    agree(y, x)
    agree(layer(torch.zeros(T, B, 3, 6, dtype=DOUBLE), states)[1][0][1], 2 * T)


def test_copies_pickles_and_state_dict(agree: Agree) -> None:
    layer = bptt.nn.Recurrent(lambda n: nn.GRUCell(H if n else I, H), 2, learn_initial_state=True, gradient="chunked:3")
    x = torch.randn(T, B, I)
    y, h = layer(x)
    y.sum().backward()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        agree(other(x), (y, h))
        assert repr(other) == repr(layer)
    names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
    states = [f"initial_states.{i}" for i in (0, 1)]
    assert list(layer.state_dict()) == [*(f"cells.{k}.{n}" for k in (0, 1) for n in names), *states]
    fresh = bptt.nn.Recurrent(lambda n: nn.GRUCell(H if n else I, H), 2, learn_initial_state=True)
    fresh.load_state_dict(layer.state_dict())
    agree(fresh(x), (y, h))
    layer.cells[1] = nn.GRUCell(H, H)
    assert not torch.equal(layer(x)[0], y)


def test_settings() -> None:
    layer = bptt.nn.Recurrent(nn.GRUCell(I, H), gradient="chunked:3", batch_first=True)
    model = nn.Sequential(layer, bptt.nn.GRU(H, H))
    with bptt.using(model, "truncated:4", memory="checkpoints:steps=2"):
        assert (str(layer.gradient), str(layer.memory)) == ("truncated:4", "checkpoints:steps=2")
    with pytest.raises(ValueError, match="memory must be"), bptt.using(model, "full", memory="gates"):
        pass
    with pytest.raises(ValueError, match="kernel must be"), bptt.using(model, kernel="cpu"):
        pass
    assert (str(layer.gradient), layer.memory, layer.kernel) == ("chunked:3", "auto", "auto")
    assert "gradient=chunked:3, batch_first=True" in repr(layer)


def test_convert_and_plan() -> None:
    """A cell inside of a layer is no cell that is left; its layer gets the settings; and plan does not leave it out."""
    model = nn.Sequential(bptt.nn.Recurrent(nn.GRUCell(I, H)), nn.GRU(H, H))
    with pytest.raises(ValueError, match="memory must be"):
        bptt.convert(model, "truncated:4", memory="gates")
    with pytest.raises(ValueError, match="kernel must be"):
        bptt.convert(model, "truncated:4", kernel="cpu")
    assert type(model[1]) is nn.GRU
    bptt.convert(model, "truncated:4", memory="states")
    assert [str(layer.gradient) for layer in model] == ["truncated:4"] * 2
    assert bptt.convert(model[0], "full") is model[0]
    assert bptt.plan(model, 5, 2).segments == 1


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["even", "lengths"])
def test_as_scan(lengths: list[int] | None, agree: Agree) -> None:
    layer = bptt.nn.Recurrent(lambda n: nn.GRUCell(H if n else I, H), 2, dropout=0.3, reverse=True)
    x = torch.randn(T, B, I)
    torch.manual_seed(1)
    step, carry, xs, resets = layer.as_scan(x, lengths=lengths)
    assert step is layer.as_scan(x, lengths=lengths)[0]
    final, (y, _) = bptt.scan(step, carry, xs, resets=resets)
    torch.manual_seed(1)
    expected, h = layer(x, lengths=lengths)
    if lengths is None:
        agree((y.flip(0), torch.stack(final)), (expected, h))
    else:
        agree(y[0], torch.stack([expected[n - 1, b] for b, n in enumerate(lengths)]))
    both = bptt.nn.Recurrent(lambda n: nn.GRUCell(I, H), bidirectional=True)
    with pytest.raises(ValueError, match="as_scan is for a layer of one direction"):
        both.as_scan(x)


def test_lazy_modules_are_made_by_the_trial() -> None:
    class Lazy(nn.Module):
        hidden_size = H

        def __init__(self) -> None:
            super().__init__()
            self.into = nn.LazyLinear(H)

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return torch.tanh(self.into(x) + h)

    layer = bptt.nn.Recurrent(Lazy())
    layer(torch.randn(T, B, I))[0].sum().backward()
    assert layer.cells[0].into.weight.grad is not None


def test_nothing_keeps_a_given_state_alive() -> None:
    layer = bptt.nn.Recurrent(nn.GRUCell(I, H))
    hx = torch.zeros(1, B, H, requires_grad=True)
    y, _ = layer(torch.zeros(T, B, I), hx)
    ref = weakref.ref(hx)
    del y, hx, _
    assert ref() is None


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_under_a_compiler_and_autocast(agree: Agree) -> None:
    """A graph breaks there, and the numbers are the same; autocast may change a state's type at the first step."""

    class Rate(nn.Module):
        hidden_size = H

        def __init__(self) -> None:
            super().__init__()
            self.into, self.back = nn.Linear(I, H), nn.Linear(H, H)

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return self.into(x) + self.back(h)

    layer, x = bptt.nn.Recurrent(Rate(), gradient="truncated:3"), torch.randn(T, B, I)
    model = torch.compile(lambda x: 2 * layer(x)[0].square(), backend="eager")
    agree(model(x), 2 * layer(x)[0].square())
    with torch.autocast("cpu", torch.bfloat16):
        y, h = layer(x, torch.zeros(1, B, H))
        again, _ = layer(x)
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.bfloat16)
    agree(again, y)
    y.float().sum().backward()
    agree(layer(x)[1].dtype, torch.float32)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_tracers_are_refused() -> None:
    layer, x = bptt.nn.Recurrent(nn.GRUCell(I, H)), torch.randn(T, B, I)
    with pytest.raises(NotImplementedError, match=r"torch.jit.trace cannot trace"):
        torch.jit.trace(layer, (x,))
    with pytest.raises(NotImplementedError, match=r"torch.fx cannot trace"):
        torch.fx.symbolic_trace(nn.Sequential(layer))
