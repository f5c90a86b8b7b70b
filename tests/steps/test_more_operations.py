"""Steps that people write with more of torch than a cell needs: compiled, with the results and gradients of a loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

import bptt
from bptt.scan import compiled

B, H, T = 3, 6, 13
Step = Callable[[Any, Tensor], tuple[Any, Any]]
Made = tuple[Step, Any, list[Tensor]]
"""A step, its first carry, and what it captures with a gradient."""


def weights(*shape: int) -> Tensor:
    return (torch.randn(*shape) * 0.5).requires_grad_()


def plain(f: Callable[[Tensor, Tensor, Tensor], Tensor], *shape: int) -> Callable[[], Made]:
    """Of a new state from (h, x, W)."""

    def make() -> Made:
        w = weights(H, H)
        return lambda h, x: ((n := f(h, x, w)), n), torch.randn(B, *(shape or (H,))), [w]

    return make


def module(make_module: Callable[[], nn.Module], *shape: int) -> Callable[[], Made]:
    """Of a new state that a module makes of (h + x)."""

    def make() -> Made:
        m = make_module()
        step = lambda h, x: ((n := torch.tanh(m(h + x.view(-1, *shape)))), n)  # noqa: E731
        return step, torch.randn(B, *shape), list(m.parameters())

    return make


def encoder() -> Made:
    m, u = nn.TransformerEncoderLayer(H, 2, 8, batch_first=True, dropout=0.0), nn.Linear(H, H)
    return (
        lambda h, x: ((n := m(h + u(x)[:, None])), n.mean(1)),
        torch.randn(B, 4, H),
        [*m.parameters(), *u.parameters()],
    )


def decoder() -> Made:
    m, memory = nn.TransformerDecoderLayer(H, 2, 8, batch_first=True, dropout=0.0), weights(B, 5, H)
    return lambda h, x: ((n := m(h + x[:, None], memory)), n.mean(1)), torch.randn(B, 4, H), [*m.parameters(), memory]


def hamiltonian() -> Made:
    net = nn.Sequential(nn.Linear(H, 8), nn.Tanh(), nn.Linear(8, 1))

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        n = h - 0.1 * torch.func.grad(lambda q: net(q).sum())(h) + 0.1 * x
        return n, n

    return step, torch.randn(B, H), list(net.parameters())[:3]


def learning() -> Made:
    key = nn.Linear(H, 3)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        loss = lambda w, k: ((w @ k - k.roll(1)) ** 2).sum()  # noqa: E731
        n = h - 0.1 * torch.vmap(torch.func.grad(loss))(h, key(x))
        return n, torch.einsum("bij,bj->bi", n, key(x))

    return step, torch.randn(B, 3, 3), list(key.parameters())


def tokens() -> Made:
    cell, table = nn.GRUCell(H, H), nn.Embedding(H, H)

    def step(c: Any, x: Tensor) -> tuple[Any, Tensor]:
        h, token, count = c
        h = torch.where((count < 11)[:, None], cell(x + table(token), h), h)
        return (h, h.argmax(1), count + 1), h

    first = torch.randn(B, H), torch.tensor([0, 5, 2]), torch.zeros(B, dtype=torch.int64)
    return step, first, [*cell.parameters(), *table.parameters()]


def ring() -> Made:
    w = weights(H, H)

    def step(c: Any, x: Tensor) -> tuple[Any, Tensor]:
        h, buffer, at = c
        place = (at % 4)[:, None, None].expand(-1, 1, H)
        n = torch.tanh((h + buffer.gather(1, place)[:, 0]) @ w + x)
        return (n, buffer.scatter(1, place, n[:, None]), at + 1), n

    return step, (torch.randn(B, H), torch.randn(B, 4, H), torch.tensor([0, 3, -2])), [w]


def kalman() -> Made:
    a = weights(3, 3)

    def step(c: Any, x: Tensor) -> tuple[Any, Tensor]:
        mean, cov = c
        eye = torch.eye(3, dtype=x.dtype)
        cov = a @ cov @ a.T + eye
        factor = torch.linalg.cholesky(cov + eye)
        gain = torch.cholesky_solve(cov, factor).transpose(1, 2)
        off = x[:, :3] - mean @ a.T
        mean, cov = mean @ a.T + (gain @ off[..., None])[..., 0], cov - gain @ cov
        return (mean, cov), factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    return step, (torch.randn(B, 3), torch.eye(3).expand(B, 3, 3).clone()), [a]


def unitary() -> Made:
    angle, real, imaginary = weights(H), weights(H, H), weights(H, H)

    def step(z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.fft.fft(z * torch.polar(torch.ones_like(angle), angle), norm="ortho")
        z = z + torch.complex(x @ real, x @ imaginary)
        return z / (1 + z.abs()), torch.view_as_real(z).flatten(1)

    return step, torch.complex(torch.randn(B, H), torch.randn(B, H)), [angle, real, imaginary]


def latent() -> Made:
    net = nn.Linear(H, 2 * H)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, spread = net(h + x).chunk(2, 1)
        normal = torch.distributions.Normal(mean, functional.softplus(spread) + 0.1)
        z = normal.rsample()
        return torch.tanh(z + x), normal.log_prob(z.detach()).sum(1)

    return step, torch.randn(B, H), list(net.parameters())


def pooled(h: Tensor, x: Tensor, w: Tensor) -> Tensor:
    n = (h.flatten(1) @ w + x).view(-1, 1, H)
    n = functional.max_pool1d(n, 3, 2, 1) + functional.avg_pool1d(n, 2)
    return torch.tanh(functional.interpolate(n, H, mode="linear")[:, 0])


def image(h: Tensor, x: Tensor, w: Tensor) -> Tensor:
    n = functional.max_pool2d(functional.pad(h, (1, 2, 1, 0), mode="reflect"), (2, 3), 2)
    n = functional.interpolate(n, (4, 5), mode="bilinear") + functional.adaptive_avg_pool2d(h, (4, 5))
    return torch.tanh(
        n + functional.fold(functional.unfold(h, 3, padding=1), (4, 5), 3, padding=1) * x[:, :1, None, None]
    )


def resized(h: Tensor, x: Tensor, w: Tensor, groups: int) -> Tensor:
    kernel = torch.cat([w, w * 2], 1).flatten()[: 4 * 4 // groups * 4].view(4, 4 // groups, 2, 2)
    n = functional.conv2d(h, kernel, w[0, :4], (2, 1), (1, 1), (1, 2), groups=groups)
    n = functional.conv_transpose2d(n, kernel, None, (2, 1), (1, 1), (1, 0), groups, (1, 2))
    return torch.tanh(n + x[:, :4, None, None])


def columns(h: Tensor, x: Tensor, w: Tensor) -> Tensor:
    n = h.clone()
    n[:, [4, 1]] = x[:, :2]
    return torch.tanh(n @ w)


STEPS: dict[str, Callable[[], Made]] = {
    "transformer encoder": encoder,
    "transformer decoder": decoder,
    "group norm of images": module(lambda: nn.Sequential(nn.GroupNorm(2, 2), nn.InstanceNorm1d(2, affine=True)), 2, 3),
    "an inner recurrence": module(lambda: Last(nn.GRU(2, 2, batch_first=True)), 3, 2),
    "a gradient inside": hamiltonian,
    "a gradient by row inside": learning,
    "vmap": plain(lambda h, x, w: torch.vmap(lambda a, b: torch.tanh(w @ a + b))(h, x)),
    "jvp": plain(lambda h, x, w: torch.func.jvp(lambda a: torch.tanh(a @ w), (h,), (x,))[1] + x),
    "recomputed inside": plain(lambda h, x, w: checkpoint(lambda a: torch.tanh(a @ w), h + x, use_reentrant=False)),
    "tokens": tokens,
    "a ring": ring,
    "a maximum and where": plain(
        lambda h, x, w: torch.tanh((m := (h @ w + x).max(1, keepdim=True))[0] * 0.3 + m[1] - h)
    ),
    "in order": plain(lambda h, x, w: torch.tanh((s := (h @ w + x).sort(1, descending=True))[0] + 0.1 * s[1])),
    "columns written": plain(columns),
    "some of a triangle": plain(
        lambda h, x, w: torch.tanh((h[:, :3, None] * x[:, None, :3])[:, [0, 1, 1, 2, 2, 2], [0, 0, 1, 0, 1, 2]] @ w)
    ),
    "distances": plain(lambda h, x, w: torch.tanh(torch.cdist(h, w) + x)),
    "a power": plain(lambda h, x, w: torch.tanh((h.abs() + 0.1) ** torch.sigmoid(x) @ w)),
    "a running product": plain(lambda h, x, w: torch.cumprod(torch.sigmoid(h @ w + x) + 0.3, 1)),
    "a running product of zeros": plain(
        lambda h, x, w: torch.tanh(
            torch.cumprod(torch.relu(h @ w + x + 1), 1) + torch.relu(h + 1).prod(1, keepdim=True)
        )
    ),
    "pooled": plain(pooled),
    "pooled images": plain(image, 2, 4, 5),
    "strided images": plain(partial(resized, groups=1), 4, 5, 6),
    "grouped images": plain(partial(resized, groups=2), 4, 5, 6),
    "images by channel": plain(partial(resized, groups=4), 4, 5, 6),
    "orthogonal weights": plain(lambda h, x, w: torch.tanh(h @ torch.matrix_exp(w - w.T) + x)),
    "factored weights": plain(
        lambda h, x, w: torch.tanh(h @ torch.linalg.qr(w)[0] @ torch.linalg.cholesky(w @ w.T + torch.eye(H).to(w)) + x)
    ),
    "a Kalman filter": kalman,
    "a unitary state": unitary,
    "a spectrum": plain(lambda h, x, w: torch.tanh(torch.fft.irfft(torch.fft.rfft(h) * w[0, :4], n=H) + x)),
    "a checked distribution": latent,
}

EAGER = {"an inner recurrence", "a Kalman filter", "a unitary state", "a spectrum"}
"""Steps that the interpreter has no instructions for."""


class Last(nn.Module):
    """A layer's input times its last state."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        last: Tensor = self.inner(x)[1]
        return x * last.transpose(0, 1)


@pytest.fixture(autouse=True)
def _double() -> Any:
    compiled._KEPT.clear()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def loss(*values: Any) -> Tensor:
    parts = [torch.view_as_real(t) if t.is_complex() else t for t in tree_leaves(values)]
    found = [(t.sin() * torch.arange(1, t.numel() + 1).view(t.shape)).sum() for t in parts if t.requires_grad]
    return torch.stack(found).sum()


def wanting(c: Any) -> Any:
    return tree_map(lambda t: t.detach().clone().requires_grad_(t.is_floating_point() or t.is_complex()), c)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("gradient", ["full", "chunked:4"])
@pytest.mark.parametrize("name", STEPS)
def test_it_is_compiled_with_the_gradient_of_a_loop(name: str, gradient: str) -> None:
    step, first, captured = STEPS[name]()
    xs = torch.randn(T, B, H, requires_grad=True)
    told = bptt.explain(step, first, xs[0])
    assert told.kernel == ("eager" if name in EAGER else "interpreter"), told.reason
    found: list[list[Any]] = []
    for by_loop in (True, False):
        torch.manual_seed(3)
        start = wanting(first)
        c, ys = start, []
        if by_loop:
            for t in range(T):
                c = tree_map(Tensor.detach, c) if gradient != "full" and t and t % 4 == 0 else c
                c, y = step(c, xs[t])
                ys.append(y)
            y = torch.stack(ys)
        else:
            c, y = bptt.scan(step, start, xs, gradient=gradient)
        inputs = [t for t in (*tree_leaves(start), xs, *captured) if t.requires_grad]
        grads = torch.autograd.grad(loss(y, c), inputs, materialize_grads=True)
        found.append([y, *tree_leaves(c), *grads])
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert bptt.explain(step, first, xs[0]).kernel != "replay", "nothing has shown that its trace is another"


def test_whole_numbers_too_large_for_a_program_are_run_by_operations() -> None:
    w = torch.randn(H, H, dtype=torch.float32)

    def step(c: Any, x: Tensor) -> tuple[Any, Tensor]:
        h, n = c
        return (torch.tanh(h @ w + x), n + 1), n

    h, xs = torch.randn(B, H, dtype=torch.float32), torch.randn(T, B, H, dtype=torch.float32)
    for start in (0, 2**24 - 3, 2**40):
        first = torch.tensor([start, start + 1, 5])
        (_, end), ys = bptt.scan(step, (h, first), xs)
        assert end.tolist() == (first + T).tolist()
        assert ys[:, 0].tolist() == list(range(start, start + T))
    assert bptt.explain(step, (h, first), xs[0]).kernel != "interpreter"
    with pytest.raises(RuntimeError, match="whole numbers beyond"):
        bptt.scan(step, (h, first), xs, kernel="interpreter")


def test_an_index_beyond_its_table_raises_as_in_a_loop() -> None:
    table = torch.randn(4, H)
    step = lambda c, x: ((torch.tanh(c[0] + table[c[1]] + x), c[1] + 1), c[0])  # noqa: E731
    xs = torch.randn(T, B, H)
    with pytest.raises(IndexError):
        bptt.scan(step, (torch.randn(B, H), torch.tensor([0, 1, 0])), xs)


@pytest.mark.parametrize("draws", [False, True])
def test_a_check_that_fails_acts_as_in_the_step(draws: bool) -> None:
    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        normal = torch.distributions.Normal(h, x, validate_args=True)  # whatever another library has set
        return torch.tanh(normal.rsample() if draws else h + x), normal.log_prob(h)

    h, xs = torch.randn(B, H), torch.rand(T, B, H) + 0.1
    bptt.scan(step, h, xs)
    assert bptt.explain(step, h, xs[0]).kernel == "interpreter"
    xs[5, 2, 1] = -1
    with pytest.raises(ValueError, match="scale"):
        bptt.scan(step, h, xs)


def test_a_matrix_that_is_not_definite_raises_as_in_a_loop() -> None:
    step = lambda c, x: (torch.linalg.cholesky(c @ c.mT + torch.diag_embed(x[:, :2])), x)  # noqa: E731
    xs = torch.rand(T, B, H) + 0.1
    first = torch.eye(2).expand(B, 2, 2).clone()
    bptt.scan(step, first, xs)
    assert bptt.explain(step, first, xs[0]).kernel != "interpreter"
    xs[7, 1, 0] = -50
    with pytest.raises(torch.linalg.LinAlgError):
        bptt.scan(step, first, xs)


def test_a_diagonal_is_a_view() -> None:
    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        a = h.view(-1, 2, 3)[:, :, :2].clone()
        a.diagonal(dim1=1, dim2=2).add_(x[:, :2])
        d = a.diagonal(dim1=1, dim2=2)
        a.mul_(0.5)
        n = torch.cat([a.flatten(1), d], 1)
        return torch.tanh(n), n

    h, xs = torch.randn(B, H, requires_grad=True), torch.randn(T, B, H)
    c, ys = h, []
    for x in xs:
        c, y = step(c, x)
        ys.append(y)
    found = bptt.scan(step, h, xs)[1]
    torch.testing.assert_close(found, torch.stack(ys))
