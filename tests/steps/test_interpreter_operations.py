"""Every operation of the interpreter against torch: both dtypes, every variant, odd sizes, views, special values."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bptt.kernels.interpreter import Interpreter
from bptt.steps import SplitStep

from .handmade import ROWS, split

aten = torch.ops.aten
inf, nan = float("inf"), float("nan")
Core = Callable[[list[Tensor], list[Tensor]], Tensor]

SPECIAL = (0.0, -0.0, 1.0, -1.0, inf, -inf, nan, 1e-40, -1e-40, 5e-324, 88.5, -88.5, 103.0, -103.5, 709.5, -745.0, 1e4,
           -1e4, 1e30, -1e30, 3e38, 0.5, -0.5, 1e-5, -1e-5, 1e-20, 2.5, -2.5, 1.5707964, 3.1415927)  # fmt: skip

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "neg": torch.neg, "abs": torch.abs, "sign": torch.sign, "exp": torch.exp, "expm1": torch.expm1, "log": torch.log,
    "log1p": torch.log1p, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal, "relu": torch.relu, "sin": torch.sin, "cos": torch.cos, "erf": torch.erf,
    "floor": torch.floor, "round": torch.round, "ceil": torch.ceil, "trunc": torch.trunc,
    "square": torch.square, "not": torch.logical_not, "rsub": lambda a: 1.5 - a,
    "to bool": lambda a: a.to(torch.bool), "to bool and back": lambda a: a.to(torch.bool).to(a.dtype) * 2,
    "bitwise not": lambda a: ~(a > 0), "clamp": lambda a: a.clamp(-0.5, 1.5), "clamp min": lambda a: a.clamp_min(0.25),
    "clamp max": lambda a: a.clamp_max(0.25), "clamp to nan": lambda a: a.clamp(nan, 1.0), "a power": lambda a: a**2,
    "clone": torch.clone, "detach": torch.detach, "alpha": lambda a: torch.add(a, 1.5, alpha=2),
    "powers": lambda a: a**3 + a**0.5 + a**-1 + a**1 + a**0 + a**5 - a**-0.5 + a**-2.0 + a**11,
    "odd powers": lambda a: a.abs() ** 1.7 + (a.abs() + 1) ** -2.3, "softplus": torch.nn.functional.softplus,
    "silu": torch.nn.functional.silu, "gelu": lambda a: a * 0.5 * (1 + torch.erf(a * 0.5**0.5)),
    "where a number": lambda a: aten.where.ScalarOther(a > 0, a, 2.0) + aten.where.ScalarSelf(a < 1, 0.5, a),
}  # fmt: skip

BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "maximum": torch.maximum,
    "minimum": torch.minimum, "eq": torch.eq, "ne": torch.ne, "lt": torch.lt, "le": torch.le, "gt": torch.gt,
    "ge": torch.ge, "and": torch.logical_and, "or": torch.logical_or, "xor": torch.logical_xor,
    "bitwise and": lambda a, b: (a > 0) & (b > 0), "bitwise or": lambda a, b: (a > 0) | (b > 0),
    "where": lambda a, b: torch.where(a > 0, a, b), "tanh backward": aten.tanh_backward,
    "sigmoid backward": aten.sigmoid_backward, "a b + a": lambda a, b: a * b + a, "a - a b": lambda a, b: a - a * b,
    "a b - a": lambda a, b: a * b - a, "alpha": lambda a, b: torch.sub(a, b, alpha=0.5),
    "isnan": lambda a, b: torch.isnan(a) | (b > 0), "pow": torch.pow,
    "clamp by tensors": lambda a, b: torch.clamp(a, b, b + 1), "sum of truth": lambda a, b: (a > 0) + (b > 0),
}  # fmt: skip

FORMS: dict[str, tuple[list[tuple[int, ...]], list[tuple[int, ...]], Core]] = {  # x, captured, operands
    "rows": ([(5, 7), (5, 7)], [], lambda x, w: (x[0], x[1])),
    "one each row": ([(5, 7), (1, 1)], [], lambda x, w: (x[0], x[1])),
    "a column": ([(5, 7), (5, 1)], [], lambda x, w: (x[1], x[0])),
    "a line": ([(5, 7), (1, 7)], [], lambda x, w: (x[0], x[1])),
    "a vector": ([(5, 37)], [(37,)], lambda x, w: (x[0], w[0])),
    "a vector first": ([(5, 37)], [(37,)], lambda x, w: (w[0], x[0])),
    "one for all": ([(33,)], [()], lambda x, w: (x[0], w[0])),
    "one for all first": ([(33,)], [()], lambda x, w: (w[0], x[0])),
    "numbers": ([()], [()], lambda x, w: (x[0], w[0])),
    "one a row": ([(1,)], [(1,)], lambda x, w: (x[0], w[0])),
    "captured column": ([(5, 7)], [(1, 5, 1)], lambda x, w: (x[0], w[0])),
    "captured alone": ([], [(5, 7), (7,)], lambda x, w: (w[0], w[1])),
    "both transposed": ([(5, 7), (5, 7)], [], lambda x, w: (x[0].transpose(1, 2), x[1].transpose(1, 2))),
    "one transposed": ([(5, 7), (7, 5)], [], lambda x, w: (x[0].transpose(1, 2), x[1])),
    "every second": ([(5, 7), (5, 4)], [], lambda x, w: (x[0][:, :, ::2], x[1])),
    "an inner part": ([(5, 7), (5, 7)], [], lambda x, w: (x[0][:, 1:4, 2:6], x[1][:, 2:5, :4])),
    "slices of one": ([(4 * 9,)], [], lambda x, w: (x[0][:, 9:18], x[0][:, 27:])),
    "selected": ([(5, 7), (7, 5)], [], lambda x, w: (x[0].select(1, 2), x[1].select(2, -1))),
    "more rows": ([(6, 7), (3, 14)], [], lambda x, w: (x[0].reshape(-1, 3, 7), x[1].reshape(-1, 3, 7))),
    "expanded": ([(5, 1)], [(1, 7)], lambda x, w: (x[0].expand(-1, 5, 7), w[0].expand(5, 7))),
    "viewed after a turn": ([(5, 7), (35,)], [], lambda x, w: (x[0].transpose(1, 2).reshape(-1, 35), x[1])),
    "two squeezed": ([(5, 1, 7), (5, 7)], [], lambda x, w: (x[0].squeeze(2), x[1].unsqueeze(2).squeeze(2))),
    "few": ([(37, 8), (37, 1)], [], lambda x, w: (x[0], x[1])),
    "few, one for all": ([(37, 4), (37, 1)], [(4,)], lambda x, w: (w[0], x[1])),
    "few, a line": ([(21, 2), (1, 2)], [], lambda x, w: (x[0], x[1])),
    "few, many rows of them": ([(67, 8), (1, 8)], [], lambda x, w: (x[1], x[0])),
    "permuted": ([(2, 3, 5), (5, 2, 3)], [], lambda x, w: (x[0].permute(0, 3, 1, 2), x[1])),
}  # type: ignore[dict-item]

SHAPED: dict[str, tuple[list[tuple[int, ...]], list[tuple[int, ...]], Core]] = {
    "sum": ([(5, 37)], [], lambda x, w: x[0].sum(2)),
    "sums of 8": ([(37, 8)], [], lambda x, w: x[0].sum(2)),
    "sums of 4": ([(5, 13, 4)], [], lambda x, w: x[0].sum(3)),
    "means of 2": ([(5, 7, 2)], [], lambda x, w: x[0].mean(3)),
    "sum of many lines": ([(23, 7)], [], lambda x, w: x[0].sum(1)),
    "sum of one": ([(5, 1)], [], lambda x, w: x[0].sum(2, keepdim=True)),
    "sum keeps": ([(5, 37)], [], lambda x, w: x[0].sum(-1, keepdim=True)),
    "sum of all": ([(5, 7)], [], lambda x, w: x[0].sum((1, 2))),
    "sum of middle": ([(5, 7)], [], lambda x, w: x[0].sum(1)),
    "sum of outer": ([(3, 5, 7)], [], lambda x, w: x[0].sum((1, 3), keepdim=True)),
    "mean": ([(70,)], [], lambda x, w: x[0].mean(1, keepdim=True)),
    "mean of a view": ([(5, 14)], [], lambda x, w: x[0][:, :, 3:10].mean(2)),
    "amax": ([(5, 7)], [], lambda x, w: x[0].amax(2)),
    "amin": ([(5, 7)], [], lambda x, w: x[0].amin(1, keepdim=True)),
    "a count": ([(5, 7)], [], lambda x, w: (x[0] > 0).sum(2) * x[0].sum(2)),
    "of captured": ([(7,)], [(5, 7)], lambda x, w: x[0] * w[0].sum(0)),
    "softmax": ([(5, 7)], [], lambda x, w: (e := (x[0] - x[0].amax(2, True)).exp()) / e.sum(2, keepdim=True)),
    "cat": ([(5,), (3,)], [(2,)], lambda x, w: torch.cat([x[0] * 2, x[1], x[0], w[0].expand(ROWS, 2)], 1)),
    "cat in cat": ([(5,), (3,)], [], lambda x, w: torch.cat([torch.cat([x[0].exp(), x[1]], 1), x[1].exp()], 1).exp()),
    "cat of outer": ([(5, 7), (3, 7)], [], lambda x, w: torch.cat([x[0] + 1, x[1] + x[0][:, :3]], 1)),
    "stack": ([(5,), (5,)], [], lambda x, w: torch.stack([x[0].exp(), x[1].exp(), x[0]], 2)),
    "full": ([(5,)], [], lambda x, w: x[0] + torch.full((ROWS, 5), 0.5, dtype=x[0].dtype)),
    "scattered": ([(5,), (2,)], [], lambda x, w: torch.slice_scatter(x[0], x[1], 1, 1, 3)),
    "product": ([(33,)], [(33, 70)], lambda x, w: torch.mm(x[0], w[0])),
    "product by a turn": ([(33,)], [(70, 33)], lambda x, w: torch.mm(x[0], w[0].t())),
    "product by a part": ([(20,)], [(70, 33)], lambda x, w: torch.mm(x[0], w[0].t()[5:25, 3:40])),
    "product by every second": ([(20,)], [(40, 9)], lambda x, w: torch.mm(x[0], w[0][::2, ::2])),
    "product of a part": ([(33,)], [(20, 5)], lambda x, w: torch.mm(x[0][:, 4:24], w[0])),
    "product of every second": ([(33,)], [(17, 5)], lambda x, w: torch.mm(x[0][:, ::2], w[0])),
    "product of one": ([(1,)], [(1, 1)], lambda x, w: torch.mm(x[0], w[0])),
    "product and bias": ([(33,)], [(33, 70), (70,)], lambda x, w: w[1] + torch.mm(x[0], w[0])),
    "product and number": ([(33,)], [(33, 70)], lambda x, w: torch.mm(x[0], w[0]) + 1.5),
    "product and rows": ([(33,), (70,)], [(33, 70)], lambda x, w: x[1] + torch.mm(x[0], w[0])),
    "product and turned": ([(33,), (7, 10)], [(33, 70)],
                           lambda x, w: torch.mm(x[0], w[0]) + x[1].transpose(1, 2).reshape(-1, 70)),
    "two products": ([(33,), (5,)], [(33, 70), (5, 70), (70,)],
                     lambda x, w: torch.mm(x[0], w[0]) + (w[2] + torch.mm(x[1], w[1]))),
    "product of heads": ([(3, 33)], [(33, 9)], lambda x, w: torch.mm(x[0].reshape(-1, 33), w[0]).view(-1, 3, 9) * 2),
    "product of captured": ([(9,)], [(4, 33), (33, 9)], lambda x, w: x[0] * torch.mm(w[0], w[1]).sum(0)),
    "product by a product": ([(4,)], [(4, 33), (33, 9)], lambda x, w: torch.mm(x[0], torch.mm(w[0], w[1]))),
    "batched": ([(3, 20), (20, 37)], [], lambda x, w: torch.bmm(x[0], x[1])),
    "batched by a turn": ([(3, 20), (37, 20)], [], lambda x, w: torch.bmm(x[0], x[1].transpose(1, 2))),
    "batched turned": ([(20, 3), (37, 20)], [], lambda x, w: torch.bmm(x[0].transpose(1, 2), x[1].transpose(1, 2))),
    "outer": ([(5,), (7,)], [], lambda x, w: torch.bmm(x[0].unsqueeze(2), x[1].unsqueeze(1))),
    "batched heads": ([(6, 20), (6, 20)], [], lambda x, w: torch.bmm(x[0].view(-1, 3, 20), x[1].view(-1, 3, 20).mT)),
    "batched by captured": ([(3, 20)], [(20, 7)], lambda x, w: torch.bmm(x[0], w[0].expand(ROWS, 20, 7))),
}  # fmt: skip


STEPS: dict[tuple[object, ...], SplitStep] = {}


def forward_only(
    x: list[tuple[int, ...]], captured: list[tuple[int, ...]], core: Core, dtype: torch.dtype, *key: object
) -> SplitStep:
    """A step whose carry stays and which returns core(x, captured); made once for a key."""
    if key and (*key, dtype) in STEPS:
        return STEPS[*key, dtype]
    STEPS[*key, dtype] = step = split(
        lambda carry, x, w: ([carry[0]], [core(x, w)]), [(1,)], x, [torch.ones(s) for s in captured], dtype=dtype,
        pull=lambda *all_: [all_[0], *(torch.zeros(ROWS, *s, dtype=dtype) for s in x)],
    )  # fmt: skip
    return step


def check(interpreter: Interpreter, step: SplitStep, core: Core, x: list[Tensor], w: list[Tensor]) -> None:
    T, B = x[0].shape[:2] if x else (2, 3)
    dtype = step.values["h0"].dtype
    values = {f"x{i}": a for i, a in enumerate(x)} | {f"w{i}": a for i, a in enumerate(w)}
    assert interpreter.refuses(step, torch.device("cpu"), dtype) is None
    kept = interpreter.advance(step, values, [torch.zeros(B, 1, dtype=dtype)], None, T, ["y0"])[1]["y0"]
    expected = []
    for t in range(T):
        rows = [torch.cat([a[t], a[t].new_zeros(ROWS - B, *a.shape[2:])]) for a in x]
        y = core(rows, w)
        k = step.values["y0"].rows
        expected.append(y[: B * k] if k else y)
    single = dtype == torch.float32
    want = torch.stack(expected) if step.values["y0"].rows else expected[0]
    torch.testing.assert_close(
        kept, want, rtol=1e-5 if single else 1e-10, atol=3e-6 if single else 1e-14, equal_nan=True
    )


each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def drawn(shapes: list[tuple[int, ...]], dtype: torch.dtype, *rows: int) -> list[Tensor]:
    return [torch.randn((*rows, *shape), dtype=dtype) for shape in shapes]


@each_dtype
@pytest.mark.parametrize("name", UNARY)
def test_of_one(interpreter: Interpreter, name: str, dtype: torch.dtype) -> None:
    special = torch.tensor(SPECIAL, dtype=torch.float64).to(dtype)
    x = torch.cat([special, torch.randn(5 * 37 - len(special), dtype=dtype) * 3]).view(1, 5, 37).contiguous()

    def core(x: list[Tensor], w: list[Tensor]) -> Tensor:
        return UNARY[name](x[0])

    check(interpreter, forward_only([(37,)], [], core, dtype, name), core, [x], [])


@each_dtype
@pytest.mark.parametrize("name", BINARY)
def test_of_two_special_numbers(interpreter: Interpreter, name: str, dtype: torch.dtype) -> None:
    """Every pair."""
    special = torch.tensor([*SPECIAL[:8], 2.0, -3.0, 0.3], dtype=dtype)
    a, b = (x.flatten().view(1, 11, 11).contiguous() for x in torch.meshgrid(special, special, indexing="ij"))

    def core(x: list[Tensor], w: list[Tensor]) -> Tensor:
        return BINARY[name](x[0], x[1])

    check(interpreter, forward_only([(11,), (11,)], [], core, dtype, 2, name), core, [a, b], [])


@each_dtype
@pytest.mark.parametrize("form", FORMS)
def test_of_two_in_every_form(interpreter: Interpreter, form: str, dtype: torch.dtype) -> None:
    x, w, operands = FORMS[form]
    for name in ("add", "sub", "where", "a b + a"):

        def core(x: list[Tensor], w: list[Tensor], f: Callable[..., Tensor] = BINARY[name]) -> Tensor:
            return f(*operands(x, w))

        check(interpreter, forward_only(x, w, core, dtype, form, name), core, drawn(x, dtype, 2, 3), drawn(w, dtype))


@each_dtype
@pytest.mark.parametrize("name", SHAPED)
def test_with_dimensions(interpreter: Interpreter, name: str, dtype: torch.dtype) -> None:
    x, w, core = SHAPED[name]
    step = forward_only(x, w, core, dtype, name)
    for T, B in ((2, 3), (1, 1), (3, 7), (1, 41)):
        check(interpreter, step, core, drawn(x, dtype, T, B), [a * 0.3 for a in drawn(w, dtype)])


@pytest.mark.parametrize("name", ["amax", "amin", "sum", "mean"])
def test_a_reduction_tells_of_nan(interpreter: Interpreter, name: str) -> None:
    for place in range(19):
        x = torch.randn(1, 1, 19, dtype=torch.float64)
        x[..., place] = nan

        def core(x: list[Tensor], w: list[Tensor]) -> Tensor:
            return getattr(x[0], name)(1)

        check(interpreter, forward_only([(19,)], [], core, torch.float64, "nan", name), core, [x], [])
