"""The engine's own way through the levels of torch.func, against torch's, of one function in nested transforms."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from bptt.engine.levels import apply

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by torch's own forward mode


class Cubed(torch.autograd.Function):
    """(scale * a^3 * b, a^2) element by element."""

    @staticmethod
    def forward(scale: float, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return scale * a**3 * b, a**2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.scale, *given = inputs
        ctx.save_for_backward(*given)
        ctx.save_for_forward(*given)

    @staticmethod
    def backward(ctx: Any, d: Tensor, e: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        return None, 3 * ctx.scale * a**2 * b * d + 2 * a * e, ctx.scale * a**3 * d

    @staticmethod
    def jvp(ctx: Any, _: None, da: Tensor | None, db: Tensor | None) -> tuple[Tensor, ...]:
        a, b = ctx.saved_tensors
        da, db = (torch.zeros_like(t) if d is None else d for d, t in ((da, a), (db, b)))
        return 3 * ctx.scale * a**2 * b * da + ctx.scale * a**3 * db, 2 * a * da

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], scale: float, *given: Tensor) -> Any:
        whole = [
            t[None].expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
            for t, d in zip(given, in_dims[1:], strict=True)
        ]
        return apply(Cubed, scale, *whole), (0, 0)


def value(through: Callable[..., Any]) -> Callable[[Tensor, Tensor], Tensor]:
    def of(a: Tensor, b: Tensor) -> Tensor:
        product, square = through(Cubed, 2.0, a, b)
        return (product.sin() + square).sum()

    return of


NESTED: dict[str, Callable[[Any], Callable[[Tensor, Tensor], Any]]] = {
    "grad": lambda f: grad(f, (0, 1)),
    "second": lambda f: grad(lambda a, b: grad(f)(a, b).cos().sum(), (0, 1)),
    "vmap(grad)": lambda f: vmap(grad(f, (0, 1)), (1, 0)),
    "vmap of one": lambda f: vmap(grad(f, (0, 1)), (None, 0)),
    "vmap(vmap)": lambda f: vmap(vmap(f, (0, None)), (None, 1)),
    "jacrev(grad)": lambda f: jacrev(grad(f), 1),
    "hessian": lambda f: hessian(f),
    "jacfwd": lambda f: jacfwd(f, (0, 1)),
    "jvp of a vjp": lambda f: lambda a, b: jvp(lambda a: vjp(f, a, b)[1](torch.ones_like(f(a, b))), (a,), (b,)),
    "grad of a jvp": lambda f: grad(lambda a, b: jvp(f, (a, b), (b, a))[1], (0, 1)),
    "without grad mode": lambda f: lambda a, b: torch.no_grad()(grad(f, (0, 1)))(a, b),
}


@pytest.mark.parametrize("nested", NESTED)
def test_as_torch_does(nested: str) -> None:
    a, b = torch.randn(2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    leaves = [a.requires_grad_(), b.requires_grad_()]
    own, expected = (
        NESTED[nested](value(through))(a, b) for through in (apply, lambda function, *given: function.apply(*given))
    )
    torch.testing.assert_close(own, expected, rtol=1e-14, atol=1e-14)
    flat, like = (torch.utils._pytree.tree_leaves(result) for result in (own, expected))
    assert [t.requires_grad for t in flat] == [t.requires_grad for t in like]
    if flat[0].requires_grad:
        first, second = (torch.autograd.grad(sum(t.sin().sum() for t in r), leaves) for r in (flat, like))
        torch.testing.assert_close(first, second, rtol=1e-14, atol=1e-14)


def test_torch_speaks_where_it_has_no_way() -> None:
    with pytest.raises(Exception, match="custom_function_call"):
        functionalize(lambda a: apply(Cubed, 1.0, a, a)[0])(torch.ones(2))
