"""Calls of a layer whose sizes and options are drawn, and everything that such a call returns."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from reference import CELLS, NETS, Case, Fixed, Gradients, as_hx, as_tuple, case, gradients, ours
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import bptt
from bptt import Chunked, Full, Randomized, Truncated
from bptt.policies import Policy

SIZES = {"H": (1, 3, 5, 16, 17, 33, 47), "B": (1, 2, 3, 7, 13), "T": (1, 2, 7, 33), "I": (1, 4, 19)}
"""Multiples of nothing: one unit, one less and one more than a register holds, more than a tile holds."""

LAYOUTS = ("dense", "strided", "transposed", "part of a row", "expanded cotangent")
KINDS = 10
"""Policies that `policy` knows."""


@dataclass
class Call:
    """One call of a layer, forward and backward."""

    name: str
    layer: nn.RNNBase
    """torch's, float64; the parameters hold values that float32 has too, and so does the data."""
    data: Case
    policy: Policy
    memory: str
    layout: str
    resets: Tensor | None
    lengths: tuple[int, ...] | None
    small: bool
    """Whether the products over all steps are left to the kernel, whatever the size."""

    def __str__(self) -> str:
        T, B, inputs = self.data.x.shape
        ragged = "" if self.lengths is None else f", lengths {self.lengths}"
        return (
            f"{self.name} {self.layer}, T={T} B={B} I={inputs}, {self.policy}, memory {self.memory}, {self.layout}, "
            f"resets {self.resets is not None}{ragged}, small {self.small}"
        )

    @property
    def has_reference(self) -> bool:
        """Whether the plain loop knows the policy, and is quick enough."""
        T, B, _ = self.data.x.shape
        lanes = 1 if self.lengths is None else B
        return not isinstance(self.policy, Randomized) and T * T * lanes * self.layer.num_layers <= 200

    def reference(self) -> dict[str, Any]:
        """What the plain loop makes of it."""
        d = self.data
        kw = {"resets": self.resets, "lengths": self.lengths}
        return gradients(self.layer, d.x, d.initial, d.dy, d.dfinal, self.policy, **kw).values()

    def run(self, kernel: str, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        """Outputs and every gradient, by autograd."""
        layer, x, initial, dy, dfinal = self._prepared(kernel, dtype)
        for z in (x, *initial):
            z.requires_grad_()
        y, final = layer(self._packed(x), as_hx(initial), resets=self.resets)
        parameters = dict(layer.named_parameters())
        outputs = [y.data if isinstance(y, PackedSequence) else y, *as_tuple(final)]
        cotangents = [self._packed(dy).data if self.lengths else dy, *dfinal]
        grads = torch.autograd.grad(outputs, [*parameters.values(), x, *initial], cotangents)
        n = len(parameters)
        padded = pad_packed_sequence(y, total_length=len(x))[0] if isinstance(y, PackedSequence) else y
        return Gradients(
            padded.detach(),
            tuple(z.detach() for z in as_tuple(final)),
            dict(zip(parameters, grads, strict=False)),
            grads[n],
            grads[n + 1 :],
        ).values()

    def run_without_autograd(self, kernel: str, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        """Every gradient and the adjoints of every layer, by `bptt.gradients`."""
        layer, x, initial, dy, dfinal = self._prepared(kernel, dtype)
        found = bptt.gradients(
            layer, self._packed(x), self._packed(dy), as_hx(initial), as_hx(dfinal), resets=self.resets
        )
        dx = pad_packed_sequence(found.x, total_length=len(x))[0] if self.lengths else found.x
        return {
            "parameters": found.parameters,
            "x": dx,
            "initial": as_tuple(found.hx),
            "adjoints": found.layer_adjoints,
        }

    def _prepared(self, kernel: str, dtype: torch.dtype) -> tuple[Any, Tensor, list[Tensor], Tensor, list[Tensor]]:
        if isinstance(self.policy, Randomized) and self.policy.generator is not None:
            self.policy.generator.manual_seed(7)
        layer = ours(self.layer, gradient=self.policy, memory=self.memory, kernel=kernel).to(dtype)
        if self.layout not in ("dense", "expanded cotangent"):
            for p in layer.parameters():
                p.data = laid_out(p.data, "strided" if p.dim() == 1 else self.layout)
        x, *initial = (laid_out(z.to(dtype), self.layout) for z in (self.data.x, *self.data.initial))
        dfinal = [laid_out(z.to(dtype), self.layout) for z in self.data.dfinal]
        if self.layout == "expanded cotangent":
            dy = self.data.dy[:1, :1, :1].to(dtype).expand(self.data.dy.shape)
        else:
            dy = laid_out(self.data.dy.to(dtype), self.layout)
        return layer, x, initial, dy, dfinal

    def _packed(self, z: Tensor) -> Any:
        return z if self.lengths is None else pack_padded_sequence(z, self.lengths, enforce_sorted=False)


def laid_out(z: Tensor, layout: str) -> Tensor:
    """The same values at other strides, between NaN where there is a between."""
    z = z.detach().clone(memory_format=torch.contiguous_format)
    if layout == "strided":
        return torch.stack([z, torch.full_like(z, torch.nan)], -1)[..., 0]
    if layout == "transposed":
        return z.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "part of a row":
        return nn.functional.pad(z, (2, 3), value=torch.nan)[..., 2:-3]
    return z


def policy(kind: int, T: int, B: int, rows: int, generator: torch.Generator) -> Policy:
    """One of `KINDS` policies; rows: how many draws of factors a call takes."""
    if kind < 7:
        return [
            Full(),
            Chunked(3),
            Chunked(8),
            Truncated(2),
            Truncated(5),
            Truncated(4, every=3),
            Truncated(6, every=2),
        ][kind]
    if kind == 7:
        xi = [2 * torch.rand(T, B, generator=generator, dtype=torch.float64) for _ in range(rows)]
        for factors in xi:
            factors[torch.rand(T, B, generator=generator) < 0.2] = 0
            factors[torch.rand(T, B, generator=generator) < 0.2] = 1
            factors[0] = 1
        return Fixed(*(factors.float().double() for factors in xi))
    own = torch.Generator()
    return Randomized(0.75, generator=own) if kind == 8 else Randomized.polynomial(mean=6, generator=own)


def draw(cell: str, index: int) -> Call:
    """The call of a number: sizes and options drawn, every policy in its turn."""
    rng = random.Random(f"{cell} {index}")
    generator = torch.Generator().manual_seed(index)
    sizes = {name: rng.choice(values) for name, values in SIZES.items()}
    mode, select = CELLS[cell]
    if cell == "lstm_proj":
        sizes["H"] = max(sizes["H"], 3)
        select = {"proj_size": rng.choice([p for p in (1, 2, 15, 16, 17, 31) if p < sizes["H"]])}
    net = NETS[rng.choice(["one", "one", "one", "two", "bi", "bi_two"])]
    with torch.random.fork_rng():
        torch.manual_seed(index)
        layer = getattr(nn, mode)(sizes["I"], sizes["H"], bias=rng.random() < 0.75, **select, **net).double()
    T, B = sizes["T"], sizes["B"]
    data = case(layer, T, B, seed=index)
    data = Case(*(z.float().double() if isinstance(z, Tensor) else tuple(s.float().double() for s in z)
                  for z in vars(data).values()))  # fmt: skip
    layout = rng.choice(LAYOUTS)
    if layout == "expanded cotangent":
        data.dy = data.dy[:1, :1, :1].expand(data.dy.shape)
    lengths = None
    if rng.random() < 0.35:
        lengths = tuple(rng.randint(1, T) for _ in range(B))
        lengths = tuple(sorted(lengths, reverse=True)) if rng.random() < 0.3 else lengths
        data.x, data.dy = data.x.clone(), data.dy.clone()
        if max(lengths) < T:  # what is packed has the steps of the longest
            lengths = (T, *lengths[1:])
        layout = "dense" if layout == "expanded cotangent" else layout
    rows = 2 * layer.num_layers if layer.bidirectional else 1
    return Call(
        name=f"{cell} {index}:",
        layer=layer,
        data=data,
        policy=policy(index % KINDS, T, B, rows, generator),
        memory=rng.choice(["gates", "states"]),
        layout=layout,
        resets=torch.rand(T, B, generator=generator) < 0.2 if rng.random() < 0.4 else None,
        lengths=lengths,
        small=rng.random() < 0.5,
    )
