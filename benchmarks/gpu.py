"""On a GPU: layers, policies and `bptt train` against torch.nn on cuDNN, in one command of at most 8 minutes.

    python benchmarks/gpu.py [--seconds 4] [--out FILE] [--rehearse]

`auto` is bptt's layer with kernel="auto", which takes torch's own layers ("fused") where it can; `eager` is bptt's with
kernel="eager", one step after the other by torch operations; `torch.nn` is torch's layer in one call. `loop` is what
people write on torch.nn where it has no such call: with resets a call per step, whose state is multiplied by zero where
an episode starts; chunks as a call each, whose state is detached; windows as a call each, from states of a call without
gradient. In rows with resets or windows `torch.nn` has none of them: it is the least that could be hoped for.

Nothing is timed before it has passed: outputs and every gradient agree with bptt's eager kernel in float64, which
`bptt check` and the tests hold against the equations, within the tolerance of the precision, or within four times the
error of torch.nn's own call where that is more. float32 is float32: TF32 is off. Times are medians of interleaved runs,
with quartiles; the device is waited for at the end of each. peak: bytes that the device's allocator gave out at most in
a call, beyond what was there before it.

--rehearse runs every row on the CPU at small sizes and writes nothing: whether this file works, and no more.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import bptt
from bptt.bench import Machine
from bptt.bench.training import TOKENS
from bptt.cli.inventory import processor
from bptt.clock import Timing, interleaved
from bptt.train import Config, Text, Trainer, Vocabulary, atomic

RESULTS = Path(__file__).parent / "results" / "gpu.json"
MOST = 420.0
"""Seconds after which no further row is begun."""

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO = {"cuda": "auto", "cpu": "fused"}  # a rehearsal names what a GPU would be given
WINDOWS = 8  # of the text that is trained on

Call = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Row:
    """What is computed. autocast: in the precision `dtype`, with parameters of float32."""

    cell: str
    T: int
    B: int
    I: int
    H: int
    dtype: str = "float32"
    gradient: str = "full"
    layers: int = 1
    bidirectional: bool = False
    resets: float = 0.0  # the share of steps before which a lane's state is zeroed
    lengths: bool = False  # unequal, packed
    autocast: bool = False
    trains: bool = False  # a whole step of `bptt train`

    @property
    def name(self) -> str:
        more = [f"{self.layers} layers"] * (self.layers > 1) + ["both ways"] * self.bidirectional
        more += [f"resets {self.resets:.0%}"] * (self.resets > 0) + ["packed"] * self.lengths
        more += ["autocast"] * self.autocast + ["bptt train"] * self.trains
        return ", ".join(
            [f"{self.cell.upper()} {self.T},{self.B},{self.I},{self.H} {self.dtype}", self.gradient, *more]
        )


ROWS = (
    Row("lstm", 1024, 16, 768, 768, "bfloat16"),
    Row("gru", 64, 128, 256, 256, resets=1 / 32),
    Row("lstm", 1000, 32, 256, 256, gradient="chunked:35"),
    Row("lstm", 1000, 32, 256, 256, gradient="truncated:32/16"),
    Row("gru", 64, 128, 256, 256, trains=True),
    Row("lstm", 1024, 16, 768, 768),
    Row("lstm", 1024, 16, 768, 768, "bfloat16", autocast=True),
    Row("lstm", 1000, 32, 256, 256, "bfloat16", gradient="chunked:35"),
    Row("lstm", 1000, 32, 256, 256, "bfloat16", gradient="truncated:32/16"),
    Row("gru", 1000, 32, 256, 256, gradient="truncated:32/16"),
    Row("rnn", 1000, 32, 256, 256, gradient="truncated:32/16"),
    Row("lstm", 200, 32, 256, 256, layers=2),
    Row("lstm", 200, 32, 256, 256, gradient="truncated:32/16", layers=2),
    Row("gru", 200, 64, 256, 256, bidirectional=True),
    Row("gru", 200, 64, 256, 256, lengths=True),
    Row("lstm", 35, 32, 256, 256),
    Row("gru", 100, 1, 32, 32),
    Row("lstm", 64, 32, 64, 256, gradient="truncated:16", trains=True),
)
"""What people run first, the rest while there is time."""


@dataclass
class Measured:
    """A row's results by contender."""

    row: Row
    errors: dict[str, float] = field(default_factory=dict)
    times: dict[str, Timing] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    kernels: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    skipped: str | None = None


class Problem:
    """A row's layers, input and cotangent on a device."""

    def __init__(self, row: Row, device: str) -> None:
        self.row, self.device = row, device
        generator = torch.Generator().manual_seed(0)
        self.dtype = DTYPES[row.dtype]
        self.kept = torch.float32 if row.autocast else self.dtype  # that of parameters and input
        D = 2 if row.bidirectional else 1
        torch.manual_seed(0)
        self.options: dict[str, Any] = {"num_layers": row.layers, "bidirectional": row.bidirectional}
        self.theirs: Any = getattr(torch.nn, row.cell.upper())(row.I, row.H, **self.options)
        with torch.no_grad():  # what every precision can hold, so that all compute the same problem
            for parameter in self.theirs.parameters():
                parameter.copy_(parameter.to(self.dtype).float())
        self.state = {name: value.clone() for name, value in self.theirs.state_dict().items()}
        self.theirs.to(device, self.kept)
        self.x = torch.randn(row.T, row.B, row.I, generator=generator).to(self.dtype).to(device, self.kept)
        self.dy = torch.randn(row.T, row.B, D * row.H, generator=generator).to(self.dtype).to(device, self.kept)
        self.resets: Tensor | None = None
        if row.resets:
            self.resets = (torch.rand(row.T, row.B, generator=generator) < row.resets).to(device)
        self.lengths = torch.linspace(row.T // 8 + 1, row.T, row.B).long() if row.lengths else None

    def ours(self, kernel: str, dtype: torch.dtype | None = None) -> Any:
        kind: Any = bptt.nn.LAYERS[self.row.cell]
        layer = kind(self.row.I, self.row.H, **self.options, gradient=self.row.gradient, kernel=kernel)
        layer.load_state_dict(self.state)
        return layer.to(self.device, dtype or self.kept)

    def call(self, layer: Any, forward: Callable[[Any, Tensor], Tensor], exact: bool = False) -> Call:
        """Forward and backward: the output, the gradient of x, then that of each parameter."""
        dtype = torch.float64 if exact else self.kept
        x, dy = self.x.to(dtype).requires_grad_(), self.dy.to(dtype)
        leaves, autocast = [x, *layer.parameters()], self.row.autocast and not exact

        def run() -> Sequence[Tensor]:
            with torch.autocast(self.device, self.dtype, enabled=autocast):
                y = forward(layer, x)
            grads = torch.autograd.grad(y, leaves, dy[: len(y)].to(y.dtype) if y.dim() == 3 else self._packed(dy, y))
            return y.detach(), *grads

        return run

    def _packed(self, dy: Tensor, y: Tensor) -> Tensor:
        return pack_padded_sequence(dy, self.lengths, enforce_sorted=False).data.to(y.dtype)

    # The ways through the layer ------------------------------------------------------------------------------------

    def in_one(self, layer: Any, x: Tensor) -> Tensor:
        """torch.nn's call, and ours."""
        given = x if self.lengths is None else pack_padded_sequence(x, self.lengths, enforce_sorted=False)
        ours = isinstance(layer, bptt.nn.LAYERS[self.row.cell])
        y, _ = layer(given, resets=self.resets) if ours and self.resets is not None else layer(given)
        return y if self.lengths is None else y.data

    def by_steps(self, layer: Any, x: Tensor) -> Tensor:
        """A call per step, whose state is multiplied by zero at a reset."""
        assert self.resets is not None
        ys, state = [], None
        for t in range(len(x)):
            if state is not None:
                keep = (~self.resets[t]).to(x.dtype)[None, :, None]
                state = tuple(keep * s for s in state) if isinstance(state, tuple) else keep * state
            y, state = layer(x[t : t + 1], state)
            ys.append(y)
        return torch.cat(ys)

    def by_chunks(self, layer: Any, x: Tensor) -> Tensor:
        """A call per chunk, whose state is detached."""
        ys, state = [], None
        for part in x.split(int(self.row.gradient.split(":")[1])):
            y, state = layer(part, state)
            state = detached(state)
            ys.append(y)
        return torch.cat(ys)

    def by_windows(self, layer: Any, x: Tensor) -> Tensor:
        """A call per block of losses over its whole window, from states of a call without gradient."""
        window, every = map(int, self.row.gradient.split(":")[1].split("/"))
        ys, states, state, T = [], {0: None}, None, len(x)
        starts = [max(min(a + every, T) - window, 0) for a in range(0, T, every)]
        with torch.no_grad():
            for a, b in zip([0, *starts], starts, strict=False):
                if b > a:
                    _, state = layer(x[a:b], state)
                    states[b] = detached(state)
        for a, start in zip(range(0, T, every), starts, strict=True):
            y, _ = layer(x[start : min(a + every, T)], states[start])
            ys.append(y[a - start :])
        return torch.cat(ys)

    def calls(self) -> tuple[dict[str, Call], dict[str, str]]:
        """Every contender's call; and which kernel bptt's takes."""
        row = self.row
        auto, eager = self.ours(AUTO[self.device]), self.ours("eager")
        found = {"auto": self.call(auto, self.in_one), "torch.nn": self.call(self.theirs, self.in_one)}
        if row.resets:
            found["loop"] = self.call(self.theirs, self.by_steps)
        elif row.gradient.startswith("chunked"):
            found["loop"] = self.call(self.theirs, self.by_chunks)
        elif row.gradient.startswith("truncated") and row.layers == 1 and not row.bidirectional:
            found["loop"] = self.call(self.theirs, self.by_windows)
        found["eager"] = self.call(eager, self.in_one)
        return found, {"auto": bptt.explain(auto, self.x).splitlines()[0]}

    def truth(self, plain: bool = False) -> list[Tensor]:
        """In float64; plain: without policy and resets, what torch.nn's own call computes."""
        layer = self.ours("eager", torch.float64)
        if not plain:
            return list(self.call(layer, self.in_one, exact=True)())
        layer.gradient, resets, self.resets = "full", self.resets, None
        found = list(self.call(layer, self.in_one, exact=True)())
        self.resets = resets
        return found


def detached(state: Any) -> Any:
    return tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()


def error(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest over the tensors of max |found - truth| / max |truth|; infinite where that is no number."""
    worst = 0.0
    for value, true in zip(found, truth, strict=True):
        off = float((value.double() - true).abs().max() / true.abs().max().clamp(min=1e-30))
        worst = max(worst, off if off == off else float("inf"))
    return worst


def waited(call: Call, device: str) -> Call:
    """The same, until the device is done."""

    def run() -> Sequence[Tensor]:
        found = call()
        if device == "cuda":
            torch.cuda.synchronize()
        return found

    return run


def peak(call: Call, device: str) -> int:
    if device != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(row: Row, device: str, seconds: float) -> Measured:
    """A row: checked, then timed."""
    if row.trains:
        return training(row, device, seconds)
    problem, result = Problem(row, device), Measured(row)
    calls, result.kernels = problem.calls()
    differs = row.gradient != "full" or bool(row.resets)
    truth = problem.truth()
    plain = problem.truth(plain=True) if differs else truth
    for name, call in calls.items():
        result.errors[name] = error(call(), plain if name == "torch.nn" else truth)
    allowed = max(TOLERANCE[problem.dtype], 4 * result.errors["torch.nn"])
    result.wrong = [name for name, off in result.errors.items() if not off <= allowed and name != "torch.nn"]
    timed = {name: waited(call, device) for name, call in calls.items() if name not in result.wrong}
    result.peaks = {name: peak(call, device) for name, call in timed.items()}
    result.times = interleaved(timed, seconds, least=3)
    return result


def training(row: Row, device: str, seconds: float) -> Measured:
    """A whole optimiser step by the trainer, with bptt's layer of two kernels and with torch.nn's in its place."""
    result, vocabulary = Measured(row), Vocabulary.build(TOKENS, "char")
    ids = torch.randint(len(vocabulary), (WINDOWS * row.T * row.B + 1,), generator=torch.Generator().manual_seed(0))
    text, steps = Text(vocabulary, ids, heldout=None, sha256=""), {}
    for name in ("auto", "torch.nn", "eager"):
        config = Config(cell=row.cell, seq_length=row.T, batch=row.B, embedding=row.I, hidden=row.H, clip=0.0,
                        gradient=row.gradient, kernel="eager" if name == "eager" else AUTO[device], device=device,
                        steps=2**62)  # fmt: skip
        trainer = Trainer(config, text)
        if name == "torch.nn":
            ours = trainer.model.recurrent
            theirs: Any = getattr(torch.nn, row.cell.upper())(ours.input_size, ours.hidden_size).to(device)
            theirs.load_state_dict(ours.state_dict())
            for key in list(dict(theirs.named_parameters())):  # which the optimiser has
                ours.get_parameter(key).data = theirs.get_parameter(key).data
                setattr(theirs, key, ours.get_parameter(key))
            trainer.model.recurrent = theirs
        steps[name] = trainer
    losses = {name: [float(trainer.advance().nll) for _ in range(3)] for name, trainer in steps.items()}
    exact = losses["eager"]
    for name, found in losses.items():
        result.errors[name] = max(abs(a - b) / abs(b) for a, b in zip(found, exact, strict=True))
    if row.gradient != "full":  # torch.nn's gradient is the full one
        result.errors["torch.nn"] = abs(losses["torch.nn"][0] - exact[0]) / abs(exact[0])
    result.wrong = [name for name, off in result.errors.items() if not off <= 1e-3]
    timed = {name: (lambda trainer=trainer: trainer.advance()) for name, trainer in steps.items()}
    result.times = interleaved({name: waited(call, device) for name, call in timed.items()}, seconds, least=3)
    return result


def small(row: Row) -> Row:
    """The same at a size at which it takes no time."""
    values = asdict(row) | {"T": min(row.T, 70), "B": min(row.B, 4), "I": 6, "H": 6}
    return Row(**values)


def shown(results: Sequence[Measured]) -> Table:
    names = ("auto", "torch.nn", "loop", "eager")
    table = Table("row", *(f"{name}, ms" for name in names), "torch.nn / auto", "peak auto / torch.nn", "wrong")
    for result in results:
        cells = [f"{result.times[n].median * 1e3:.2f}" if n in result.times else "" for n in names]
        both = "auto" in result.times and "torch.nn" in result.times
        ratio = f"{result.times['torch.nn'].median / result.times['auto'].median:.2f}" if both else ""
        peaks = result.peaks.get("torch.nn") and f"{result.peaks['auto'] / result.peaks['torch.nn']:.2f}"
        table.add_row(result.row.name, *cells, ratio, peaks or "", result.skipped or ", ".join(result.wrong))
    return table


def where(device: str) -> dict[str, Any]:
    """The machine and its GPU."""
    known: dict[str, Any] = asdict(Machine.here(processor(), torch.get_num_threads()))
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        known |= {"gpu": properties.name, "gpu_bytes": properties.total_memory, "cuda": torch.version.cuda}
        known["cudnn"] = torch.backends.cudnn.version()
    return known


def measured(rows: Sequence[Row], device: str, seconds: float, console: Console) -> Iterator[Measured]:
    begun = monotonic()
    for row in rows:
        if monotonic() - begun > MOST:
            yield Measured(row, skipped="not measured: the time was over")
            continue
        try:
            result = measure(row, device, seconds)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            result = Measured(row, skipped="not measured: the device has too little memory")
        took = ", ".join(f"{name} {timing.median * 1e3:.2f} ms" for name, timing in result.times.items())
        console.print(f"{monotonic() - begun:5.0f} s  {row.name}: {result.skipped or took}", markup=False)
        yield result


def main(
    seconds: Annotated[float, typer.Option(help="of each row, about")] = 4.0,
    out: Annotated[Path, typer.Option(help="where results are written, after every row")] = RESULTS,
    rehearse: Annotated[bool, typer.Option("--rehearse", help="small sizes on the CPU; writes nothing")] = False,
) -> None:
    """Measure, print the table, write the results."""
    console = Console(width=160)
    if not rehearse and not torch.cuda.is_available():
        raise SystemExit("not measured: this needs a GPU, and torch.cuda finds none (--rehearse runs on the CPU)")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device, rows = ("cpu", tuple(map(small, ROWS))) if rehearse else ("cuda", ROWS)
    results: list[Measured] = []
    for result in measured(rows, device, 0.0 if rehearse else seconds, console):
        results.append(result)
        if not rehearse:
            text = json.dumps({"machine": where(device), "rows": [asdict(r) for r in results]}, indent=1)
            atomic.write(out, f"{text}\n".encode())
    console.print(shown(results))
    if any(result.wrong for result in results):
        raise SystemExit("wrong: " + "; ".join(f"{r.row.name}: {', '.join(r.wrong)}" for r in results if r.wrong))


if __name__ == "__main__":
    typer.run(main)
