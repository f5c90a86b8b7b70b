"""The same gradients from every source there is: what `bptt check` shows.

Sources: the NumPy equations (the reference), each kernel in float64 and float32, torch's autograd through a plain loop
that detaches by hand, and finite differences of the loss.

Nets: two layers, T = 7 steps, B = 3 lanes, random cotangents on the outputs and on the final states, random resets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import equations, kernels, nn
from ..bench.loop import rival
from ..cells import of_name
from ..equations import stacks
from ..policies import Chunked, Full, Policy, Randomized, Truncated

__all__ = ["Row", "compare", "largest_error", "sources", "tolerance"]

T, B, INPUTS, H, P, LAYERS = 7, 3, 3, 4, 2, 2
SEED = 1
Answer = dict[str, Any]
"""NumPy arrays by name: y, h_n, c_n and the gradients of x, h_0, c_0 and each parameter."""
TORCH_NAMES = {"W_ih": "weight_ih", "W_hh": "weight_hh", "b_ih": "bias_ih", "b_hh": "bias_hh", "W_hr": "weight_hr"}
DIFFERENCE = 1e-5
"""Step of the central differences: their error is of order DIFFERENCE**2, rounding's of order 1e-16 / DIFFERENCE."""


@dataclass(frozen=True)
class Net:
    """One kind of layer that ours and the equations have: its cell, and the constructor's arguments."""

    cell: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ours(self) -> Callable[..., Any]:
        return nn.LAYERS[self.cell]

    @property
    def rival(self) -> Callable[..., torch.nn.Module]:
        """torch.nn's layer, or a loop over the cell's formulas where torch has none."""
        return rival(self.cell)

    @property
    def equations(self) -> Callable[..., Any]:
        return equations.CELLS[self.cell]


NETS = {
    "rnn tanh": Net("rnn", {"nonlinearity": "tanh"}),
    "rnn relu": Net("rnn", {"nonlinearity": "relu"}),
    "gru": Net("gru"),
    "lstm": Net("lstm"),
    "lstm projected": Net("lstm", {"proj_size": P}),
}


def policies() -> list[Policy]:
    """One of each kind; T is a multiple of none. The random one replays its draws from a generator of its own."""
    return [
        Full(),
        Chunked(3),
        Truncated(3),
        Truncated(4, every=2),
        Randomized(0.6, generator=torch.Generator().manual_seed(SEED)),
    ]


@dataclass(frozen=True)
class Row:
    """One net under one policy: the largest relative error of each source against the equations, None for no answer."""

    net: str
    policy: str
    errors: dict[str, float | None]

    @property
    def agrees(self) -> bool:
        """Whether every source is within its tolerance; an error that is not a number is not."""
        return all(error is None or error <= tolerance(source) for source, error in self.errors.items())


def sources() -> list[str]:
    """The columns: every kernel in both precisions, autograd, finite differences."""
    names = [f"{kernel} {precision}" for kernel in kernels.KERNELS for precision in ("float64", "float32")]
    return [*names, "autograd", "differences"]


def tolerance(source: str) -> float:
    """Largest relative error that counts as agreement."""
    return 1e-5 if source.endswith("float32") else 1e-6 if source == "differences" else 1e-10


def compare() -> Iterator[Row]:
    """Every net under every policy."""
    for name, net in NETS.items():
        case = _Case(net)
        differences = case.differences()
        for policy in policies():
            xi = policy.draw(T, B)
            blocks = policy.reach(T).blocks(T)
            truth = case.equations(blocks, xi)
            answers: dict[str, list[Answer]] = {
                f"{kernel} {precision}": case.ours(policy, kernel, getattr(torch, precision))
                for kernel in kernels.KERNELS
                for precision in ("float64", "float32")
            }
            answers["autograd"] = [case.autograd(blocks, xi)]
            # A truncated gradient is no function's derivative, so that differences know the full one only.
            answers["differences"] = [differences] if policy == Full() else []
            errors = {s: max((largest_error(a, truth) for a in given), default=None) for s, given in answers.items()}
            yield Row(name, str(policy), errors)


def largest_error(answer: Answer, truth: Answer) -> float:
    """The largest over the tensors of max |answer - truth| / max |truth|; infinite where that is not a number."""
    worst = 0.0
    for name, value in answer.items():
        error = float(np.abs(value - truth[name]).max()) / float(np.abs(truth[name]).max())
        worst = max(worst, error if np.isfinite(error) else np.inf)
    return worst


class _Case:
    """A net with weights, inputs and cotangents, float64, drawn from a seed of its own."""

    def __init__(self, net: Net) -> None:
        g = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.net, self.states = net, of_name(net.cell).states
        self.output = net.arguments.get("proj_size", H)
        self.rival = net.rival(INPUTS, H, num_layers=LAYERS, dtype=torch.float64, **net.arguments)
        with torch.no_grad():
            for parameter in self.rival.parameters():
                parameter.copy_(0.5 * random(*parameter.shape))
        self.x, self.dy = random(T, B, INPUTS), random(T, B, self.output)
        sizes = (self.output, H)[: self.states]
        self.initial = [random(LAYERS, B, size) for size in sizes]
        self.dfinal = [random(LAYERS, B, size) for size in sizes]
        self.resets = torch.rand(T, B, generator=g) < 0.1
        self.names = [*("h_0", "c_0")[: self.states], *(name for name, _ in self.rival.named_parameters())]

    def ours(self, policy: Policy, kernel: str, dtype: torch.dtype) -> list[Answer]:
        """The drop-in layer with either tape; none if the kernel refuses the call."""
        layer = self.net.ours(
            INPUTS, H, num_layers=LAYERS, dtype=dtype, gradient=policy, kernel=kernel, **self.net.arguments
        )
        layer.load_state_dict(self.rival.state_dict())
        draws = policy.draws_factors
        request = kernels.Request(layer.cell(), self.x.device, dtype, edge_factors=draws, resets=True)
        if kernels.KERNELS[kernel].refuses(request) is not None:
            return []
        return [self._run(layer, memory, dtype) for memory in ("gates", "states")]

    def _run(self, layer: Any, memory: str, dtype: torch.dtype) -> Answer:
        if isinstance(layer.gradient, Randomized) and layer.gradient.generator is not None:
            layer.gradient.generator.manual_seed(SEED)
        layer.memory = memory
        x, *initial = (t.to(dtype, copy=True).requires_grad_() for t in (self.x, *self.initial))
        y, final = layer(x, _bare(initial), resets=self.resets)
        finals = [final] if isinstance(final, Tensor) else list(final)
        cotangents = [t.to(dtype) for t in (self.dy, *self.dfinal)]
        grads = torch.autograd.grad([y, *finals], [x, *initial, *layer.parameters()], cotangents)
        return self._answer(y, finals, grads)

    def _answer(self, y: Tensor, finals: Sequence[Tensor], grads: Sequence[Tensor]) -> Answer:
        named = {"y": y, "x": grads[0], **dict(zip(("h_n", "c_n"), finals, strict=False))}
        named |= dict(zip(self.names, grads[1:], strict=True))
        return {name: value.detach().double().numpy() for name, value in named.items()}

    def equations(self, blocks: list[tuple[int, int, int]], xi: Tensor | None) -> Answer:
        """Chapter 7 of the equations."""
        layers = [[self._cell(layer)] for layer in range(LAYERS)]
        pairs = [[np.concatenate([s[layer] for s in self.initial], axis=1)] for layer in range(LAYERS)]
        errors = [[np.concatenate([d[layer] for d in self.dfinal], axis=1)] for layer in range(LAYERS)]
        out = stacks.sweep(
            layers,
            self.x.numpy(),
            pairs,
            self.dy.numpy(),
            errors,
            [(earliest, first, last, last) for earliest, first, last in blocks],
            None if xi is None else [[xi.numpy()]] * LAYERS,
            self.resets.numpy(),
        )
        answer: Answer = {"y": out["y"], "x": out["x"]}
        for key, name in (("final", "_n"), ("s_0", "_0")):
            whole = np.stack([out[key][layer][0] for layer in range(LAYERS)])
            answer |= {"h" + name: whole[:, :, : self.output], "c" + name: whole[:, :, self.output :]}
        for layer in range(LAYERS):
            for name, gradient in out["weights"][layer][0].items():
                answer[f"{TORCH_NAMES[name]}_l{layer}"] = gradient
        return answer

    def _cell(self, layer: int) -> Any:
        weights = self.rival.state_dict()
        named = {
            ours: weights[f"{name}_l{layer}"].numpy()
            for ours, name in TORCH_NAMES.items()
            if f"{name}_l{layer}" in weights
        }
        if "nonlinearity" in self.net.arguments:
            named["activation"] = self.net.arguments["nonlinearity"]
        return self.net.equations(**named)

    def autograd(self, blocks: list[tuple[int, int, int]], xi: Tensor | None) -> Answer:
        """The rival's layer, one step a call, one backward pass a block, histories cut by `detach`."""
        leaves = [t.clone().requires_grad_() for t in (self.x, *self.initial)]
        totals = [torch.zeros_like(t) for t in (*leaves, *self.rival.parameters())]
        y, finals = self._outputs()
        for earliest, first, last in blocks:
            x, *states = leaves
            loss = torch.zeros((), dtype=torch.float64)
            for t in range(last + 1):
                if t <= earliest and t > 0:  # before the walk's first step nothing is remembered
                    states = [state.detach() for state in states]
                elif t > 0 and xi is not None:
                    factor = xi[t][:, None]
                    states = [factor * state + ((1 - factor) * state).detach() for state in states]
                y_t, states = self._step(x[t] if t >= earliest else x[t].detach(), states, t)
                if t >= first:
                    loss = loss + (y_t * self.dy[t]).sum()
            if last == T - 1:
                loss = loss + sum((s * d).sum() for s, d in zip(states, self.dfinal, strict=True))
            grads = torch.autograd.grad(loss, [*leaves, *self.rival.parameters()], allow_unused=True)
            totals = [a if g is None else a + g for a, g in zip(totals, grads, strict=True)]
        return self._answer(y, finals, totals)

    def differences(self) -> Answer:
        """Central differences of the loss, entry by entry, the forward pass the rival's."""
        inputs = [self.x, *self.initial, *(p.data for p in self.rival.parameters())]
        grads = []
        for tensor in inputs:
            flat, grad = tensor.view(-1), torch.zeros_like(tensor)
            for i, value in enumerate(flat.tolist()):
                sides = []
                for sign in (1, -1):
                    flat[i] = value + sign * DIFFERENCE
                    y, finals = self._outputs()
                    sides.append(
                        (y * self.dy).sum() + sum((s * d).sum() for s, d in zip(finals, self.dfinal, strict=True))
                    )
                flat[i] = value
                grad.view(-1)[i] = (sides[0] - sides[1]) / (2 * DIFFERENCE)
            grads.append(grad)
        return self._answer(*self._outputs(), grads)

    @torch.no_grad()
    def _outputs(self) -> tuple[Tensor, list[Tensor]]:
        states, ys = self.initial, []
        for t in range(T):
            y, states = self._step(self.x[t], states, t)
            ys.append(y)
        return torch.stack(ys), states

    def _step(self, x: Tensor, states: list[Tensor], t: int) -> tuple[Tensor, list[Tensor]]:
        """One step of the rival's layer, the states zeroed first in lanes that are reset."""
        keep = (~self.resets[t])[:, None].double()
        y, after = self.rival(x[None], _bare([keep * state for state in states]))
        return y[0], [after] if isinstance(after, Tensor) else list(after)


def _bare(states: list[Tensor]) -> Any:
    """torch.nn's form of the states: h, or the pair (h, c)."""
    return states[0] if len(states) == 1 else tuple(states)
