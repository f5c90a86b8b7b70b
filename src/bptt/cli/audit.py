"""Somebody's recurrent layer against the equations: what `bptt check --module` shows.

The layer has torch.nn's call form: its constructor, its parameters' names, `(y, h_n) = layer(x, h_0)`, for an LSTM
`(y, (h_n, c_n)) = layer(x, (h_0, c_0))`. Everything it puts out and every gradient, from cotangents on all outputs, is
compared with chapters 3 to 5 and 7 of the equations, lane by lane, in float64.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .. import equations
from ..cells import of_name
from ..equations import stacks
from ..nn import LAYERS
from ..train import InputError
from .check_options import DTYPES, LAYER

__all__ = ["AuditResult", "audit", "load"]

T, B, INPUTS, H, P = 7, 3, 3, 4, 2
DROPOUT = 0.5
WEIGHTS = {"W_ih": "weight_ih", "W_hh": "weight_hh", "b_ih": "bias_ih", "b_hh": "bias_hh", "W_hr": "weight_hr"}
CELLS = {of_name(name).gates_per_unit: name for name in reversed(equations.CELLS)}  # the first of those that share it
"""What the cell is by gates per hidden unit, which is all that the parameters of somebody's layer tell."""

Answer = dict[str, Any]
"""NumPy arrays by name; None for a gradient that should be there and is not."""


@dataclass(frozen=True)
class Case:
    """One way to build and call the layer."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = ()  # of a packed batch
    steps: int = T
    lanes: int = B
    batched: bool = True
    starts: bool = True  # an initial state is given
    losses: str = "both"  # on "y", on the "final" state, or on both
    needs: str = "all"  # what requires grad: "all", the "inputs", x and the initial state, or the "weights"
    trains: bool = True

    @property
    def layers(self) -> int:
        return int(self.arguments.get("num_layers", 1))

    @property
    def directions(self) -> int:
        return 2 if self.arguments.get("bidirectional") else 1

    @property
    def masked(self) -> bool:
        return self.trains and "dropout" in self.arguments


DEEP, BOTH = {"num_layers": 2}, {"bidirectional": True}
CASES = (
    Case("one layer"),
    Case("a loss on y alone", losses="y"),
    Case("a loss on the final state alone", losses="final"),
    Case("no initial state given", starts=False),
    Case("x and the state alone need gradients", needs="inputs"),
    Case("weights alone need gradients", needs="weights"),
    Case("one step", steps=1),
    Case("one lane", lanes=1),
    Case("not batched", lanes=1, batched=False),
    Case("batch_first", {"batch_first": True}),
    Case("no biases", {"bias": False}),
    Case("two layers", DEEP),
    Case("both directions", BOTH),
    Case("two layers, both directions", DEEP | BOTH),
    Case("packed", lengths=(7, 4, 1)),
    Case("packed, lengths in any order", lengths=(4, 1, 7)),
    Case("packed, two layers, both directions", DEEP | BOTH, lengths=(4, 7, 2)),
    Case("dropout", DEEP | {"dropout": DROPOUT}),
    Case("dropout, both directions", DEEP | BOTH | {"dropout": DROPOUT}),
    Case("dropout, packed", DEEP | {"dropout": DROPOUT}, lengths=(7, 4, 1)),
    Case("dropout, evaluated", DEEP | {"dropout": DROPOUT}, trains=False),
)
OF_A_NONLINEARITY = (Case("nonlinearity relu", {"nonlinearity": "relu"}),)
OF_A_PROJECTION = (Case("projection", {"proj_size": P}), Case("projection, two layers", DEEP | {"proj_size": P}))


@dataclass(frozen=True)
class AuditResult:
    """A case: the largest relative error of each tensor against the equations; or why the layer did not take it."""

    case: str
    errors: dict[str, float]
    refused: str = ""

    def wrong(self, dtype: str) -> list[str]:
        """The tensors that are off by more than rounding, or missing."""
        return [name for name, error in self.errors.items() if not error <= DTYPES[dtype]]


def load(name: str) -> Callable[..., torch.nn.Module]:
    """The layer's class by its dotted name, looked for in the working directory too, as `python -m` does.

    Raises InputError where there is none.
    """
    module, _, attribute = name.rpartition(".")
    sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:  # whatever somebody's module raises
        raise InputError(f"{LAYER}: importing {module!r} raised {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove("")
    if found is None:
        raise InputError(f"{LAYER}: got {name!r}, and {module!r} has no {attribute!r}")
    if not (inspect.isclass(found) and issubclass(found, torch.nn.Module)):
        raise InputError(f"{LAYER}: got {name!r}, which is no subclass of torch.nn.Module")
    return found


def audit(kind: Callable[..., torch.nn.Module], device: torch.device, dtype: torch.dtype) -> Iterator[AuditResult]:
    """Every case in turn. Raises InputError for a class that is no recurrent layer with torch.nn's call form."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        cell = _cell_of(kind)
        own: tuple[Case, ...] = OF_A_NONLINEARITY if LAYERS[cell].nonlinearities else ()
        own += OF_A_PROJECTION if of_name(cell).projects else ()
        for case in (*CASES, *own):
            try:
                with warnings.catch_warnings():  # that a fast path is not taken is nothing wrong
                    warnings.simplefilter("ignore")
                    errors = _Audit(kind, cell, case, device, dtype).errors()
            except Exception as error:  # a layer may refuse what it cannot do: told, and nothing wrong
                yield AuditResult(case.name, {}, f"{type(error).__name__}: {error}")
            else:
                yield AuditResult(case.name, errors)


def _cell_of(kind: Callable[..., torch.nn.Module]) -> str:
    name = getattr(kind, "__name__", repr(kind))
    try:
        layer = kind(INPUTS, H)
    except Exception as error:  # whatever somebody's constructor raises
        raise InputError(f"{LAYER}: {name}({INPUTS}, {H}) raised {type(error).__name__}: {error}") from error
    shapes = {key: tuple(value.shape) for key, value in layer.named_parameters()}
    rows = shapes.get("weight_hh_l0", (0, 0))[0]
    if rows % H or rows // H not in CELLS or shapes.get("weight_ih_l0") != (rows, INPUTS):
        gates = " or ".join(", ".join(map(str, CELLS)).rsplit(", ", 1))
        raise InputError(
            f"{LAYER}, with parameters weight_ih_l0 [G*H, I] and weight_hh_l0 [G*H, H] of G = {gates} gates: "
            f"{name}({INPUTS}, {H}) has {shapes or 'none'}"
        )
    return CELLS[rows // H]


class _Audit:
    """One case: the layer with weights, inputs and cotangents that are drawn from a seed of its own."""

    def __init__(
        self,
        kind: Callable[..., torch.nn.Module],
        cell: str,
        case: Case,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.kind, self.cell, self.case, self.device, self.dtype = kind, cell, case, device, dtype
        self.P = case.arguments.get("proj_size", H)
        self.K = case.layers * case.directions
        self.lengths = case.lengths or (case.steps,) * case.lanes
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.layer = self._built(**case.arguments)
        with torch.no_grad():
            for parameter in self.layer.parameters():
                parameter.copy_(0.5 * random(*parameter.shape))
        states = (self.P, H)[: of_name(cell).states]
        steps, lanes = case.steps, case.lanes
        self.x, self.dy = random(steps, lanes, INPUTS), random(steps, lanes, self.P * case.directions)
        self.initial = [random(self.K, lanes, size) * case.starts for size in states]
        self.d_final = [random(self.K, lanes, size) * (case.losses != "y") for size in states]
        for b, length in enumerate(self.lengths):
            self.x[length:, b] = self.dy[length:, b] = 0
        self.dy *= case.losses != "final"

    def errors(self) -> dict[str, float]:
        """Of each tensor: the largest |found - equations| over the largest |equations|; infinite if it is missing."""
        masks = self._masks() if self.case.masked else None
        truth, found = self._equations(masks), self._found()
        return {name: _error(found.get(name), value) for name, value in truth.items() if name in found}

    # The layer -------------------------------------------------------------------------------------------------------

    def _built(self, **arguments: Any) -> torch.nn.Module:
        return self.kind(INPUTS, H, **arguments).to(self.device, self.dtype).train(self.case.trains)

    def _call(self, layer: torch.nn.Module, x: Tensor, initial: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """(y `[T, B, D*P]` with zeros past the end, the final states `[K, B, .]`), the seed set first."""
        case = self.case
        given: Any = initial[0] if len(initial) == 1 else tuple(initial)
        input: Tensor | PackedSequence = x
        if case.lengths:
            input = pack_padded_sequence(x, torch.tensor(case.lengths), enforce_sorted=False)
            if tuple(sorted(case.lengths, reverse=True)) == case.lengths:
                input = pack_padded_sequence(x, torch.tensor(case.lengths))
        elif not case.batched:
            input = x.squeeze(1)
            given = given.squeeze(1) if isinstance(given, Tensor) else tuple(s.squeeze(1) for s in given)
        elif case.arguments.get("batch_first"):
            input = x.transpose(0, 1)
        torch.manual_seed(1)
        y, final = layer(input, given) if case.starts else layer(input)
        finals = [final] if isinstance(final, Tensor) else list(final)
        if case.lengths:
            y = pad_packed_sequence(y)[0]
        elif not case.batched:
            y, finals = y.unsqueeze(1), [s.unsqueeze(1) for s in finals]
        elif case.arguments.get("batch_first"):
            y = y.transpose(0, 1)
        return y, finals

    def _found(self) -> Answer:
        case, layer = self.case, self.layer
        leaves = [t.to(self.device, copy=True) for t in (self.x, *(self.initial if case.starts else ()))]
        inputs = dict(zip(("x", "h_0", "c_0"), leaves, strict=False)) if case.needs != "weights" else {}
        weights = dict(layer.named_parameters()) if case.needs != "inputs" else {}
        layer.requires_grad_(case.needs != "inputs")
        for leaf in inputs.values():
            leaf.requires_grad_()
        y, finals = self._call(layer, leaves[0], leaves[1:])
        found: Answer = {"y": y, **dict(zip(("h_n", "c_n"), finals, strict=False))}
        pairs = [(y, self.dy)] if case.losses != "final" else []
        pairs += list(zip(finals, self.d_final, strict=True)) if case.losses != "y" else []
        loss = sum((value * d.to(self.device)).sum() for value, d in pairs)
        assert isinstance(loss, Tensor)
        wanted = inputs | weights
        # As a training loop does it: a backward pass that fills .grad, of which each tensor has its own.
        for tensor in wanted.values():
            tensor.grad = None
        loss.backward()
        found |= {name: tensor.grad for name, tensor in wanted.items()}
        return {n: None if v is None else v.detach().cpu().double().numpy() for n, v in found.items()}

    def _masks(self) -> Tensor:
        """The dropout mask between two layers `[T, B, D*H]`, as the seed draws it: read off a net that shows it.

        Its first layer puts out one number everywhere, its second what it reads, and remembers nothing.
        """
        probe = self._built(**self.case.arguments)
        with torch.no_grad():
            for name, parameter in probe.named_parameters():
                gates = parameter.zero_().view(-1, H, *parameter.shape[1:])  # [G, H, ..]
                reads = name.startswith("weight_ih_l1")
                if name.startswith("bias_ih"):
                    # What keeps the state is 0 (z, f), all else that opens 1; n, g, a simple RNN's h of layer 0 tanh 1.
                    cell = of_name(self.cell)
                    for i, gate in enumerate(cell.gate_names):
                        if i != self._candidate:
                            gates[i] += -40.0 if gate == cell.keeps else 40.0
                        elif "_l0" in name:
                            gates[i] += 1
                if reads:
                    half = H if name.endswith("_reverse") else 0
                    gates[self._candidate, :, half : half + H] = torch.eye(H)
            zeros = [torch.zeros_like(s, device=self.device) for s in self.initial]
            shown = [self._call(probe, self.x.to(self.device), zeros)[0].abs() > 0.01 for _ in range(2)]
        if not shown[0].equal(shown[1]):
            raise RuntimeError("two calls after the same torch.manual_seed draw different dropout masks")
        return shown[0].cpu().double() / (1 - DROPOUT)

    @property
    def _candidate(self) -> int:
        """Which gate is the candidate: all there is, n, or g."""
        return of_name(self.cell).activations.index("tanh")

    # The equations ---------------------------------------------------------------------------------------------------

    def _equations(self, masks: Tensor | None) -> Answer:
        """Lane by lane, each of its own length; gradients of weights summed over lanes."""
        case, layers, D = self.case, self._cells(), self.case.directions
        answer: Answer = {"y": np.zeros(self.dy.shape), "x": np.zeros(self.x.shape)}
        for name, states in (("h", self.initial[:1]), ("c", self.initial[1:])):
            answer |= {f"{name}{end}": np.zeros(s.shape) for s in states for end in ("_n", "_0")}
        for b, length in enumerate(self.lengths):
            out = stacks.sweep(
                layers,
                self.x[:length, [b]].double().numpy(),
                self._by_direction(self.initial, b),
                self.dy[:length, [b]].double().numpy(),
                self._by_direction(self.d_final, b),
                stacks.spans(length, length, length, D),
                masks=None if masks is None else [masks[:length, [b]].numpy()],
            )
            answer["y"][:length, [b]], answer["x"][:length, [b]] = out["y"], out["x"]
            for key, end in (("final", "_n"), ("s_0", "_0")):
                rows = np.concatenate([state for row in out[key] for state in row])  # [K, S]
                answer["h" + end][:, b] = rows[:, : self.P]
                if len(self.initial) == 2:
                    answer["c" + end][:, b] = rows[:, self.P :]
            for k in range(self.K):
                for name, gradient in out["weights"][k // D][k % D].items():
                    key = f"{WEIGHTS[name]}_l{k // D}{'_reverse' if k % D else ''}"
                    answer[key] = answer.get(key, 0) + gradient
        if not case.starts:
            del answer["h_0"]
            answer.pop("c_0", None)
        return answer

    def _by_direction(self, states: Sequence[Tensor], b: int) -> list[list[Any]]:
        """[layer][direction] `[1, S]` of one lane."""
        D = self.case.directions
        whole = torch.cat(list(states), -1)[:, [b]].double().numpy()
        return [[whole[layer * D + d] for d in range(D)] for layer in range(self.case.layers)]

    def _cells(self) -> list[list[Any]]:
        found = {name: value.detach().cpu().double().numpy() for name, value in self.layer.named_parameters()}
        cells: list[list[Any]] = []
        for layer in range(self.case.layers):
            cells.append([])
            for suffix in ("", "_reverse")[: self.case.directions]:
                named: dict[str, Any] = {ours: found.get(f"{name}_l{layer}{suffix}") for ours, name in WEIGHTS.items()}
                rows = len(named["W_hh"])
                named |= {name: np.zeros(rows) for name in ("b_ih", "b_hh") if named[name] is None}
                if not of_name(self.cell).projects:
                    del named["W_hr"]
                if LAYERS[self.cell].nonlinearities:
                    named["activation"] = getattr(self.layer, "nonlinearity", "tanh")
                cells[-1].append(equations.CELLS[self.cell](**named))
        return cells


def _error(found: Any, truth: Any) -> float:
    if found is None or found.shape != truth.shape:
        return np.inf if found is not None or np.abs(truth).max() > 0 else 0.0
    largest = float(np.abs(truth).max())
    error = float(np.abs(found - truth).max()) / (largest or 1.0)
    return error if np.isfinite(error) else np.inf
