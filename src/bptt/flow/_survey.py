"""A survey: every measurement of one recording."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..policies import Policy
from ._by_lag import Lags, by_lag
from ._cell_path import CellPath, cell_path, has_cell_path
from ._chain import Chain, LayerChain, lengths_of
from ._compare import POLICIES, Comparison, NotComparable, compare
from ._gates import Gates, gates
from ._jacobians import Jacobians, Products, jacobians, products
from ._lags import LAGS, LagMap, lag_map
from ._lyapunov import Lyapunov, NothingToMeasure, lyapunov
from ._recording import Loss, Recording, recorded
from ._scanned import Scanned
from ._setting import Setting
from ._shares import Shares, shares
from ._spectrum import Spectrum, spectrum
from ._subjects import scan_of
from ._verdict import Verdict, verdict
from .conclusions import stuck
from .language import say
from .shown import Shown

__all__ = ["LARGEST", "STAGES", "Survey", "survey"]

STAGES = ("lags", "shares", "W_hh", "gates", "Jacobians", "products", "exponents", "cell path", "policies")
"""What `survey` measures, in order."""

LANES = 8
"""Lanes that the map, the shares and the policies are measured on, at most."""

LOSSES = 2048
"""About how many losses, over all lanes, walk back for the map and the shares at most: it says at every how many steps
one does, and in how many lanes."""

LOSS_LAGS = LOSSES * LAGS
"""About how many losses times lags the map has at most: of more lags, fewer losses walk back."""

COMPARED = 1024
"""On about how many steps, over all lanes, policies are compared at most."""

STEPS = 100
"""Steps whose Jacobian is measured, about at most."""

LARGEST = 1024
"""Numbers in a state up to which Jacobians are measured: a step's singular values take their cube."""

DRAWS = 50
"""Of each random policy: enough for the variance to a tenth or so."""

EXPONENTS = 16
"""Lyapunov exponents, at most."""

_CONDITIONS = ("name", "dropout", "lanes", "batch", "layers", "notes", "setting")


@dataclass(frozen=True, eq=False, repr=False)
class Survey(Shown):
    """The measurements of `survey`. One is None where the layer lacks what it is about, or where it was left out.

    Several bidirectional layers have no map, lags or shares, since a loss reaches both ways there; a gradient that is 0
    or not finite has no comparison.

    name: the name of what was measured. The measurements of a cell (all but lag_map, lags, shares and comparison) are
    those of the top layer, forward; the gates those of the layer and direction with most values at an end, by one gate.
    layers: how many layers and directions there are. records: those of a training run, as in its metrics.jsonl.
    dropout: the probability of the dropout between layers that the layer was in the mode to draw; every measurement
    leaves it out, and the verdict says so. lanes, batch: on how many lanes the map, the lags and the policies were
    measured, and how many there are; the Jacobians, their products, the exponents and the cell path are those of one
    lane. notes: what else the verdict should say of the way it was measured. setting: what was measured and on what,
    for the head of a report.
    """

    name: str
    lag_map: LagMap | None = None
    lags: Lags | None = None
    shares: Shares | None = None
    jacobians: Jacobians | None = None
    products: Products | None = None
    spectrum: Spectrum | None = None
    lyapunov: Lyapunov | None = None
    cell_path: CellPath | None = None
    gates: Gates | None = None
    comparison: Comparison | None = None
    records: Sequence[dict[str, Any]] = field(default=())
    dropout: float = 0.0
    lanes: int = 0
    batch: int = 0
    layers: int = 1
    notes: Sequence[str] = field(default=())
    setting: Setting = field(default=Setting())  # it is frozen

    def __repr__(self) -> str:
        there = [entry.name for entry in fields(self) if entry.name not in _CONDITIONS and getattr(self, entry.name)]
        said = f"\n{self.verdict.headline}" if self.measures else ""
        measured = ", ".join(there) or say("nothing measured")
        return say("Survey of {name}: {measured}", name=self.name, measured=measured) + said

    @property
    def measures(self) -> tuple[Any, ...]:
        """The measurements that there are, without the name and the conditions."""
        found = (getattr(self, entry.name) for entry in fields(self) if entry.name not in _CONDITIONS)
        return tuple(measure for measure in found if measure is not None and measure != ())

    @property
    def verdict(self) -> Verdict:
        """The verdict on all measurements. Raises ValueError where nothing was measured."""
        said = list(self.notes)
        compared = self.lanes if self.comparison is None else self.comparison.B
        if min(self.lanes, compared) < self.batch:
            policies = "" if compared == self.lanes else say(", the policies on {count}", count=compared)
            text = (
                "Measured on {lanes} of {batch} lanes{policies}; the weights on as few as time allows, steps, products "
                "and exponents on one"
            )
            said.append(say(text, lanes=self.lanes, batch=self.batch, policies=policies))
        elif (
            self.products is not None and self.jacobians is not None and self.jacobians.norm.shape[1] == 1 < self.batch
        ):
            said.append(say("Steps, products and exponents are those of lane {lane}", lane=self.products.lane))
        if self.layers > 1 and self.spectrum is not None and self.gates is not None:
            text = (
                "W_hh, steps, products and exponents are those of {layer}; the gates are those of {gates}, of all "
                "layers the one with most values at an end"
            )
            said.append(say(text, layer=self.spectrum.layer, gates=self.gates.layer))
        if self.dropout:
            text = "Measured without the dropout of {p} between the layers, which a training step draws"
            said.append(say(text, p=f"{self.dropout:g}"))
        return replace(verdict(*self.measures), conditions=tuple(said))


def survey(
    subject: torch.nn.Module | Recording | Scanned,
    batch: Any = None,
    loss: Loss | None = None,
    *,
    name: str | None = None,
    lags: int | None = None,
    policies: Sequence[str | Policy] = POLICIES,
    records: Sequence[dict[str, Any]] = (),
    data: str | None = None,
    seed: int | str | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Survey:
    """Take every measurement of a layer that there is: what `bptt flow` and the report show.

    subject, batch, loss: as in `record`, or a Recording alone; or as in `record_scan`, for a `bptt.nn.Recurrent`; or a
    scan of any step, as `scanned` gives it, alone. Of a scan and of a `Recurrent` it measures the carry, in its own
    precision and on all lanes: there are no shares, spectrum, gates or cell path, and no map, Jacobians, products or
    exponents where the state has more than 1024 numbers. name: by default the layer's own text form. lags: as in
    `lag_map`. policies: those to compare; an empty list leaves the comparison out. records: those of a training run,
    which the verdict takes into account. data, seed: what the batch is and what it was drawn with, in words, for
    `Survey.setting`. on_stage: called with the name of each measurement, out of `STAGES`, before it begins.

    What grows with the length of the sequence is bounded. The map is that of at most 8 lanes and, on long sequences, of
    every so many-th loss; there the shares are those of fewer lanes. The Jacobians are those of one lane, on long
    sequences at every so many-th step, for a state of at most 1024 numbers. The lanes are chosen among those that a
    loss reaches, evenly over their lengths; those whose gradient is not finite come first, else the longest of those
    in which errors grow most, to within a factor of 10, of which the products of a scan are too. Padding is measured
    nowhere.

    Raises what `record`, `lag_map` and `compare` raise.

    >>> import torch, bptt
    >>> found = bptt.flow.survey(bptt.nn.LSTM(2, 3), torch.randn(12, 2, 2), policies=["full", "chunked:4"])
    >>> found.lag_map.norm.shape, found.comparison.rows[1].policy, found.verdict.headline[:16]
    ((1, 12, 12), 'chunked:4', 'Gradients vanish')
    """

    def run(stage: str, measure: Callable[[], Any]) -> Any:
        on_stage(stage)
        return measure()

    scan = scan_of(subject, batch, loss)
    if scan is not None:
        return _of_scan(scan, scan.label if name is None else name, lags, policies, records, data, seed, run)
    assert not isinstance(subject, Scanned)
    recording = recorded(subject, batch, loss)
    top = len(recording.names) - (2 if recording.layer.bidirectional else 1)
    first = _first(recording, top)
    few, one = recording.sample(LANES, first), recording.sample(1, first)
    lane = int(recording.sampled(1, first)[0])
    K = min(LAGS if lags is None else max(lags, 1), few.T)
    compared = few.sample(max(1, min(LANES, COMPARED // few.T)), _first(few, top) if first.any() else None)
    lanes = recording.sample(max(1, min(LANES, LOSSES // recording.T)), first)

    two_ways = recording.layer.bidirectional and recording.layer.num_layers > 1  # a loss has no lag there
    map = None if two_ways else run("lags", lambda: lag_map(few, lags=lags, at=few.losses(min(LOSSES, LOSS_LAGS // K))))
    S = sum(s.shape[-1] for s in recording.call.hx)
    chain = LayerChain(one.to(torch.float64), top) if S <= LARGEST else None
    return Survey(
        name=str(recording.layer) if name is None else name,
        lag_map=map,
        lags=None if map is None else by_lag(map),
        shares=None if two_ways else run("shares", lambda: shares(lanes)),
        spectrum=run("W_hh", lambda: spectrum(recording, layer=top)),
        gates=run("gates", lambda: _most_stuck(recording, top)),
        jacobians=None if chain is None else run("Jacobians", lambda: jacobians(chain, every=-(-one.T // STEPS))),
        products=None if chain is None else run("products", lambda: replace(products(chain), lane=lane)),
        lyapunov=None if chain is None else run("exponents", lambda: _exponents(chain, min(S, EXPONENTS))),
        cell_path=(
            run("cell path", lambda: cell_path(one, layer=top))
            if has_cell_path(recording.cell) and chain is not None
            else None
        ),
        comparison=run("policies", lambda: _compared(compared, policies)) if policies else None,
        records=tuple(records),
        dropout=recording.dropout,
        lanes=few.B,
        batch=recording.B,
        layers=len(recording.names),
        notes=_drawn(recording.loss),
        setting=Setting.of(recording, few.B, data, seed),
    )


def _of_scan(
    scan: Scanned,
    name: str,
    lags: int | None,
    policies: Sequence[str | Policy],
    records: Sequence[dict[str, Any]],
    data: str | None,
    seed: int | str | None,
    run: Callable[[str, Callable[[], Any]], Any],
) -> Survey:
    """The survey of a scan: what its chain of carries tells, and its policies."""
    chain = scan.chain if scan.chain.S <= LARGEST else None
    map = None
    if chain is not None:
        K = min(LAGS if lags is None else max(lags, 1), chain.T)
        map = run("lags", lambda: lag_map(chain, lags=lags, at=scan.losses(min(LOSSES, LOSS_LAGS // K))))
    count = 0 if chain is None else min(chain.S, EXPONENTS)
    return Survey(
        name=name,
        lag_map=map,
        lags=None if map is None else by_lag(map),
        jacobians=None if chain is None else run("Jacobians", lambda: jacobians(chain, every=-(-chain.T // STEPS))),
        products=None if chain is None else run("products", lambda: products(chain, lane=_lane_of(chain))),
        lyapunov=None if chain is None else run("exponents", lambda: _exponents(chain, count)),
        comparison=run("policies", lambda: _compared(scan, policies)) if policies else None,
        records=tuple(records),
        lanes=scan.chain.B,
        batch=scan.chain.B,
        notes=_drawn(scan.loss),
        setting=Setting.of_scan(scan, data, seed),
    )


def _drawn(loss: object) -> tuple[str, ...]:
    """What a verdict says of errors that were drawn in the place of a loss."""
    return () if loss is not None else (say("Measured with random errors of norm 1 at every step in place of a loss"),)


@torch.no_grad()
def _first(recording: Recording, top: int) -> Tensor:
    """The lanes `[B]` that are measured before others: those whose input, local errors or adjoints are not finite. Else
    the one of `_leading`, where that is not the longest that a loss reaches, which is among the measured ones anyway.
    """
    program, saved = recording.forward()
    adjoints = program.backward(saved, recording.asked(adjoints=True)).adjoints
    padding = torch.arange(recording.T, device="cpu")[:, None] >= recording.lengths
    first = torch.zeros(recording.B, dtype=torch.bool, device="cpu")
    for values in (recording.call.x, recording.dy, *adjoints):
        first |= (~torch.isfinite(values).all(-1).cpu() & ~padding).any(0)
    if first.any():
        return first
    D = 2 if recording.layer.bidirectional else 1
    dy = recording.dy[..., : recording.dy.shape[-1] // D]
    adjoint, error = (t.abs().amax(-1).cpu().masked_fill(padding, 0).amax(0) for t in (adjoints[top], dy))
    for final in recording.dfinal:
        error = error if final is None else error.maximum(final[top].abs().amax(-1).cpu())
    lane = _leading(adjoint, error, recording.lengths)
    first[lane] = lane != int(recording.sampled(1)[0])
    return first


@torch.no_grad()
def _lane_of(chain: Chain) -> int:
    """The lane of `_leading` of a chain."""
    largest, error, adjoint = torch.zeros((3, chain.B, chain.S), dtype=chain.dtype, device=chain.device)
    for t in reversed(range(chain.T)):
        if chain.errors is not None:
            adjoint, error = adjoint + chain.errors[t], error.maximum(chain.errors[t].abs())
        largest = largest.maximum(adjoint.abs())
        if t in chain.transitions:
            adjoint = chain.pull(t, adjoint[None])[0]
    return _leading(largest.amax(-1).cpu(), error.amax(-1).cpu(), lengths_of(chain))


def _leading(adjoint: Tensor, error: Tensor, lengths: Tensor) -> int:
    """The longest lane of those in which errors grow most on their way back, to within a factor of 10; of equals the
    first. So none is taken for all others in which they die. adjoint, error: the largest ones; with lengths, all `[B]`.
    """
    growth = (adjoint / error).where(error > 0, 0).nan_to_num(torch.inf)
    large = (growth >= growth.max() / 10).nonzero()[:, 0].tolist()
    return int(max(large, key=lambda lane: int(lengths[lane])))


def _most_stuck(recording: Recording, top: int) -> Gates:
    """The gates of the layer and direction in which most values of one gate lie at an end; the top one of equals."""
    found = [gates(recording, layer=k) for k in (top, *(k for k in range(len(recording.names)) if k != top))]
    return max(found, key=lambda measure: float(stuck(measure).max()))


def _exponents(chain: Chain, count: int) -> Lyapunov | None:
    """None where resets close every step."""
    try:
        return lyapunov(chain, count=count)
    except NothingToMeasure:
        return None


def _compared(subject: Recording | Scanned, policies: Sequence[str | Policy]) -> Comparison | None:
    """None where the full gradient is 0 or not finite: the other measurements say why."""
    try:
        return compare(subject, policies=policies, draws=DRAWS)
    except NotComparable:
        return None
