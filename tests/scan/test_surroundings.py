"""`scan` under a compiler, another default device, forward mode; sparse tensors; errors of the machine."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bptt import Full, Truncated, scan
from bptt.policies import Policy

from .loops import DOUBLE, RESETS, Agree, B, Case, H, T, expected, loop, measured, random, rnn

# torch loads its decompositions with the first dual tensor, and compiles them by a deprecated function.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")

# Under a compiler


# torch's compiler itself asks the ys, an input of its second graph, for their .grad.
quiet = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def counted() -> tuple[int, int, int]:
    """Graphs compiled, graph breaks and recompilations so far."""
    from torch._dynamo.utils import counters

    breaks, again = counters["graph_break"], counters["recompiles"]
    return counters["stats"]["unique_graphs"], sum(breaks.values()), sum(again.values())


@pytest.fixture
def compiler() -> Any:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo
    torch._dynamo.reset()


@quiet
@pytest.mark.parametrize("policy", ["full", "truncated:2", "randomized:0.5"])
def test_one_graph_break_and_no_recompilation(compiler: Any, policy: str) -> None:
    """Every call has a step, and a closure, of its own."""
    cell, head = nn.GRUCell(2, H), nn.Linear(H, 1)

    def model(x: Tensor, scale: Tensor) -> Tensor:
        def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            h = cell(x * scale, h)
            return h, h

        _, ys = scan(step, torch.zeros(B, H), x * 2, gradient=policy)
        return head(ys).square().sum()

    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD([*cell.parameters(), *head.parameters()], 0.01)
    seen = []
    for i in range(5):
        x, scale = torch.randn(T, B, 2), torch.ones(2)
        torch.manual_seed(i)
        loss = compiled(x, scale)
        torch.manual_seed(i)
        torch.testing.assert_close(loss, model(x, scale))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(counted())
    assert seen[0] == (2, 1, 0)
    assert seen == seen[:1] * 5
    assert torch._dynamo.explain(model)(x, scale).graph_break_count == 1


@quiet
def test_a_compiled_part_inside_the_step_of_a_compiled_function(compiler: Any, agree: Agree) -> None:
    layer = nn.Linear(H, H, dtype=DOUBLE)
    part = torch.compile(layer, backend="eager")
    h, xs = random(B, H), random(T, B, H)

    def run(call: Callable[[Tensor], Tensor]) -> Tensor:
        return scan(lambda h, x: (torch.tanh(call(h) + x), None), 1 * h, xs)[0].sum()

    inputs = [h, xs, *layer.parameters()]
    got = torch.autograd.grad(torch.compile(run, backend="eager")(part), inputs)
    agree(got, torch.autograd.grad(run(layer), inputs))


def test_the_whole_graph_cannot_be_had(compiler: Any) -> None:
    @torch.compile(backend="eager", fullgraph=True)
    def model(x: Tensor) -> Tensor:
        return scan(lambda h, x: (h + x, h), torch.zeros(B), x)[0]

    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"bptt\.scan runs any Python that its step holds"):
        model(torch.ones(T, B))


@pytest.mark.slow
def test_import_does_not_load_the_compiler() -> None:
    code = "import sys, bptt; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Another default device


POLICIES = ["full", "chunked:3", "truncated:3", "truncated:4/2", "randomized:0.5", "adaptive:0.5,max=3"]


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_another_default_device(policy: str, create_graph: bool) -> None:
    """Around the calls of scan and of backward, and around either of them."""
    step, carry, xs, captured = rnn()
    inputs = [carry, xs, *captured]

    def numbered(h: Tensor, x: Tensor) -> tuple[Tensor, tuple[Tensor, float]]:
        h, y = step(h, x)
        return h, (y, 0.5)

    def gradient(forward: str, backward: str) -> Any:
        torch.manual_seed(2)
        with torch.device(forward):
            final, (ys, halves) = scan(numbered, carry, xs, gradient=policy, resets=RESETS)
        assert halves.device.type == "cpu"
        loss = final.square().sum() + ys.square().sum()
        with torch.device(backward):
            return torch.autograd.grad(loss, inputs, create_graph=create_graph)

    want = gradient("cpu", "cpu")
    for devices in (("meta", "meta"), ("meta", "cpu"), ("cpu", "meta")):
        torch.testing.assert_close(gradient(*devices), want, rtol=0, atol=0)


def test_the_default_device_of_the_forward_is_that_of_the_backward() -> None:
    """A step that makes tensors of its own finds them where the forward did."""
    w = torch.ones(H, device="meta", requires_grad=True)
    devices = []

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, None]:
        devices.append(torch.zeros(1).device.type)
        return h * w + torch.arange(H) + x, None

    with torch.device("meta"):
        final, _ = scan(step, torch.zeros(B, H), torch.zeros(T, B, H))
    assert set(devices) == {"meta"}
    devices.clear()
    with pytest.raises(NotImplementedError, match="Meta"):  # values are compared, and meta has none
        final.sum().backward()
    assert set(devices) == {"meta"}


# Sparse tensors


def sparse(layout: torch.layout, leaf: bool) -> Case:
    dense = torch.randn(B, B, dtype=DOUBLE)
    dense[dense.abs() < 0.3] = 0
    w = dense.to_sparse(layout=layout).requires_grad_()
    used = w if leaf else w * 2

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(torch.sparse.mm(used, h) + x)
        return h, h

    return step, random(B, H), random(T, B, H), [w]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("policy", [Full(), Truncated(3)], ids=str)
def test_sparse_weights(layout: torch.layout, leaf: bool, policy: Policy) -> None:
    step, h, xs, (w,) = sparse(layout, leaf)
    case = step, h, xs, []
    torch.testing.assert_close(measured(case, policy), expected(case, policy))
    final, _ = scan(step, h, xs)
    want = torch.autograd.grad(loop(step, h, xs, T)[0].square().sum(), w, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(final.square().sum(), w)[0].to_dense(), want.to_dense())


# Errors


class ForeignError(Exception):
    """Not among what a wrong number of rows may raise."""


@pytest.mark.parametrize(
    "error", [MemoryError, RecursionError, torch.OutOfMemoryError, ForeignError, KeyboardInterrupt]
)
@pytest.mark.parametrize("rows", ["auto", "independent"])
def test_an_error_of_the_machine_goes_through(error: type[BaseException], rows: Any) -> None:
    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        if len(h) > B:
            raise error("at its end")
        h = torch.tanh(h + x)
        return h, h

    _, ys = scan(step, random(B, H), random(T, B, H), gradient=Truncated(2), rows=rows)
    with pytest.raises(error, match="at its end"):
        ys.sum().backward()


@pytest.mark.parametrize("error", [RuntimeError, ValueError, TypeError, IndexError, KeyError, AssertionError])
def test_an_error_of_the_rows_does_not(error: type[Exception], agree: Agree) -> None:
    w = random(H)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        if len(h) != B:
            raise error("made for three rows")
        h = torch.tanh(h * w + x)
        return h, h

    case = step, random(B, H), random(T, B, H), [w]
    agree(measured(case, Truncated(2)), expected(case, Truncated(2)))
    _, ys = scan(*case[:3], gradient=Truncated(2), rows="independent")
    with pytest.raises(ValueError, match="rows='independent' does not hold: the step fails"):
        ys.sum().backward()


def test_an_error_of_the_step_itself_is_not_hidden() -> None:
    broken = [False]

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        if broken[0]:
            raise ValueError("a bug of the step")
        return torch.sin(h + x), h

    _, ys = scan(step, random(B, H), random(T, B, H), gradient=Truncated(2))
    broken[0] = True
    with pytest.raises(ValueError, match="a bug of the step"):
        ys.sum().backward()
