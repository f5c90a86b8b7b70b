"""Pooling, interpolation and sampling of images as states: a NaN or an infinity goes where torch lets it go."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  as everybody calls it

import bptt
from bptt.scan import compiled

B, T = 2, 9
DOUBLE = torch.float64

Resample = Callable[[Tensor], Tensor]

OF_IMAGES: dict[str, Resample] = {
    "average": lambda h: F.avg_pool2d(h, 2),
    "average, padded": lambda h: F.avg_pool2d(h, 3, stride=2, padding=1, ceil_mode=True, count_include_pad=False),
    "average, strided": lambda h: F.avg_pool2d(h, 2, stride=3),
    "average of all": lambda h: F.adaptive_avg_pool2d(h, 1),
    "average to some": lambda h: F.adaptive_avg_pool2d(h, (2, 4)),
    "bilinear": lambda h: F.interpolate(h, scale_factor=2.0, mode="bilinear", align_corners=False),
    "bilinear, smaller": lambda h: F.interpolate(h, size=(3, 2), mode="bilinear", align_corners=True),
    "bicubic": lambda h: F.interpolate(h, size=(7, 4), mode="bicubic", align_corners=False),
    "nearest": lambda h: F.interpolate(h, size=(7, 4), mode="nearest-exact"),
    "reflected": lambda h: F.pad(h, (1, 2, 2, 1), mode="reflect"),
    "replicated": lambda h: F.pad(h, (3, 0, 2, 1), mode="replicate"),
    "linear": lambda h: F.interpolate(h.flatten(1, 2), size=7, mode="linear", align_corners=False),
    "average of rows": lambda h: F.avg_pool1d(h.flatten(1, 2), 3, stride=1, padding=1),
    "average to rows": lambda h: F.adaptive_avg_pool1d(h.flatten(2), 3),
    "trilinear": lambda h: F.interpolate(h[:, :, None], size=(2, 3, 7), mode="trilinear", align_corners=False),
    "average of volumes": lambda h: F.avg_pool3d(h[:, :, None], (1, 2, 2)),
}


def grids(mode: str, padding: str, corners: bool) -> Resample:
    """An image read at places that lie beyond it too, and that move with it."""

    def sample(h: Tensor) -> Tensor:
        grid = 1.3 * torch.tanh(h.mean(1).nan_to_num(0.0, 0.0, 0.0))[..., None].expand(-1, -1, -1, 2)
        return F.grid_sample(h, grid + torch.tensor([0.1, -0.3]), mode, padding, corners)

    return sample


MODES = [("bilinear", "zeros", False), ("bilinear", "border", True), ("bilinear", "reflection", False),
         ("bilinear", "reflection", True), ("nearest", "zeros", True), ("nearest", "border", False)]  # fmt: skip

OF_IMAGES |= {f"sampled, {' '.join(map(str, mode))}": grids(*mode) for mode in MODES}


@pytest.fixture(autouse=True)
def _double() -> object:
    compiled._KEPT.clear()
    before = torch.get_default_dtype()
    torch.set_default_dtype(DOUBLE)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("name", OF_IMAGES)
def test_images_are_resampled_as_in_a_loop(name: str, special: bool) -> None:
    """The y is what has the special values, so that they stay in their step, and the state finite."""
    resample, w = OF_IMAGES[name], torch.randn(1, 3, 1, 1, requires_grad=True)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        made = resample(h * w + x)
        return torch.tanh(h + made.nan_to_num(0.0, 0.0, 0.0).flatten(1).mean(1)[:, None, None, None]), made

    h = torch.randn(B, 3, 4, 5, requires_grad=True)
    xs = torch.randn(T, B, 3, 4, 5)
    if special:
        xs[4, 1, 2, 1, 3], xs[6, 1, 2, 1, 3] = (
            math.nan,
            math.nan if name == "trilinear" else math.inf,  # a volume of one layer: torch multiplies it by 0 too
        )
    xs.requires_grad_()
    assert bptt.explain(step, h, xs[0]).kernel != "replay" or "ask torch for" in bptt.explain(step, h, xs[0]).reason
    found = []
    for by_loop in (True, False):
        if by_loop:
            c, made = h, []
            for x in xs:
                c, y = step(c, x)
                made.append(y)
            ys = torch.stack(made)
        else:
            c, ys = bptt.scan(step, h, xs, gradient="truncated:9/8")
            again = bptt.scan(step, h, xs, memory="states")[1]
            torch.testing.assert_close(again, ys, equal_nan=True)
        weigh = torch.linspace(0.3, 1.0, ys[0].numel()).view(ys[0].shape)
        finite = torch.where(ys.isfinite(), ys, 0.0)
        found.append([c, ys, *torch.autograd.grad((finite * weigh).sum() + c.sum(), (h, xs, w))])
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)
