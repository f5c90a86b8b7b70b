"""The working tree against another commit: whether a change that must cost nothing costs nothing.

    python benchmarks/against.py COMMIT [--rows small|bench|memory] [--runs 5] [--threads 1] [--save FILE]

COMMIT is anything that git can name, or a directory with another checkout. Its csrc/ is compiled where it differs from
ours; else both use the compiled module that is installed. Both packages are copied to a temporary directory first, so
that files may be edited while this runs.

Each tree has a process of its own, which stays alive and imports the tree's package past any editable installation.
Both make the same layers from the same seed, by the public interface alone, so that any commit can be compared. A row
is timed in `runs` rounds: in each both trees take a turn, and who goes first alternates. A turn is the fastest of three
calls or more (of one, where that takes 2 seconds), a tenth of a second together: other programs only add to a call's
time. What is reported is the median over the rounds of new time / old time, with its quartiles.

small   T = 100, B = 1, I = H = 32: what a call costs whatever its size, by policy, memory, direction and layers
bench   the sizes and cells of `bptt bench` (a few of its short calls), the policies of benchmarks/policies.py, memories
memory  bptt's rows of benchmarks/memory.py, each turn in a fresh process: times and the peak of resident memory, with
        malloc's threshold for mmap held where it is at the start, since it moves with chance and the peak with it

No row counts before both trees agree on its outputs and gradients, to 1e-5 of a tensor's largest entry (`memory`: 1e-4,
since rounding grows with T). The summary says in how many rows every bit is the same.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import geometric_mean, median
from subprocess import PIPE, Popen, run
from time import perf_counter
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

ROOT = Path(__file__).parents[1]
WORSE = 1.03  # the ratio above which a row is shown
TURN = 0.1  # seconds of calls in a turn, at least
LONG = 2.0  # seconds after which fewer than three calls are enough
Row = dict[str, Any]
OPTIONS = ("gradient", "memory", "num_layers", "bidirectional")  # of a layer, where a row has them

# In the process of a tree ---------------------------------------------------------------------------------------------


def computation(row: Row, T: int) -> Callable[[], Sequence[Tensor]]:
    """The call that is timed: what a row computes of T steps."""
    import bptt

    torch.manual_seed(0)
    options = {name: row[name] for name in OPTIONS if name in row}
    layer: Any = getattr(bptt.nn, row["cell"])(row["I"], row["H"], **options)
    x = torch.randn(T, row["B"], row["I"], requires_grad=row["call"] in ("backward", "scan"))
    dy = torch.randn(T, row["B"], row["H"] * (1 + layer.bidirectional))

    def step(state: tuple[Tensor, Tensor], gx: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        i, f, g, o = (gx + state[0] @ layer.weight_hh_l0.T).chunk(4, 1)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return (h, c), h

    def call() -> Sequence[Tensor]:
        if row["call"] == "stream":
            return list(bptt.stream_gradients(layer, x, lambda steps, y: y.square().sum()).parameters.values())
        if row["call"] == "scan":
            gx = x @ layer.weight_ih_l0.T + (layer.bias_ih_l0 + layer.bias_hh_l0)
            _, y = bptt.scan(step, (x.new_zeros(row["B"], row["H"]),) * 2, gx)
        else:
            with torch.set_grad_enabled(row["call"] != "no_grad"):
                y, _ = layer(x)
        if row["call"] == "loss":
            return torch.autograd.grad(y.square().sum(), list(layer.parameters()))
        return y.detach(), *(torch.autograd.grad(y, [x, *layer.parameters()], dy) if y.requires_grad else ())

    return call


def resident(which: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))


def work() -> None:
    """Answer every row that comes in, a line of JSON each; save its results where the row says."""
    answers, sys.stdout = sys.stdout, sys.stderr
    import bptt

    if Path(bptt.__file__).parents[1] != Path(os.environ["AGAINST_TREE"]):
        raise SystemExit(f"the wrong tree was imported: {bptt.__file__}")
    last: Row | None = None
    for line in sys.stdin:
        row = json.loads(line)
        try:
            if row["fresh"]:
                computation(row, 64)()
            is_new = row != last
            if is_new:
                last, call = row, computation(row, row["T"])
            before, times = resident("VmRSS"), []
            while sum(times) < TURN or (len(times) < 3 and sum(times) < LONG):
                start = perf_counter()
                results = call()
                times.append(perf_counter() - start)
                if is_new and len(times) == 1:
                    torch.save([tensor.detach() for tensor in results], row["file"])
            answer = {"seconds": min(times)} | ({"bytes": resident("VmHWM") - before} if row["fresh"] else {})
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


# The parent -----------------------------------------------------------------------------------------------------------


class Tree:
    """A package in a directory of its own, with its compiled module, and the process that runs it."""

    def __init__(self, name: str, folder: Path, threads: int) -> None:
        self.name, self.results = name, folder / "results.pt"
        settings = {"PYTHONPATH": os.pathsep.join([str(folder), *sys.path[1:]]), "AGAINST_TREE": str(folder)}
        self.env = os.environ | settings | {"OMP_NUM_THREADS": str(threads)}
        self.process: Popen[str] | None = None

    def answer(self, row: Row) -> Row:
        """What the process says of a row. Raises ValueError where it cannot run it."""
        if self.process is None:  # -S: no .pth file, so no editable installation. A session: Ctrl-C is for the parent
            command = [sys.executable, "-S", "-P", __file__, "--worker"]
            self.process = Popen(command, env=self.env, stdin=PIPE, stdout=PIPE, text=True, start_new_session=True)
        print(json.dumps(row | {"file": str(self.results)}), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if row["fresh"] or not line:
            self.end()
        answer = json.loads(line or '{"error": "the process died"}')
        if "error" in answer:
            raise ValueError(f"{self.name}: {answer['error']}")
        return answer

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def rows_of(kind: str) -> list[Row]:
    from bptt.bench import SHAPES, TABLES
    from bptt.nn import LAYERS

    def row(cell: str, shape: Sequence[int], call: str = "backward", **options: Any) -> Row:
        made = {"cell": LAYERS[cell].__name__, "call": call, "fresh": False}
        return made | dict(zip("TBIH", shape, strict=True)) | options

    small, middle, both = (100, 1, 32, 32), (100, 32, 128, 128), ("backward", "no_grad")
    checkpoints, overlapping = {"memory": "checkpoints"}, {"gradient": "truncated:20/5"}
    memories = [{"memory": "gates"}, {"memory": "states"}, checkpoints]
    if kind == "small":
        options = [{}, {"gradient": "chunked:10"}, overlapping, checkpoints, overlapping | checkpoints]
        options += [{"bidirectional": True}, {"num_layers": 2}, {"call": "no_grad"}]
        return [*(row(cell, small, **some) for cell in LAYERS for some in options), row("lstm", small, "scan")]
    if kind == "memory":
        shapes = [(1_000, 16, 32, 128), (10_000, 16, 32, 128), (100_000, 1, 16, 64), (1_000_000, 1, 16, 64)]
        cases = [(shape, {}) for shape in shapes] + [(shapes[1], {"gradient": "truncated:20"})]
        calls = [*(("loss", memory) for memory in memories), ("stream", checkpoints)]
        return [row("lstm", shape, call, **some, **case, fresh=True) for shape, case in cases for call, some in calls]
    policies = ["chunked:10", "truncated:10", "truncated:20/10", "truncated:20/5", "randomized:0.9"]
    few = [case for case in TABLES["short"].cases if case.T in (1, 8) and case.B in (1, 32) and case.H in (32, 512)]
    return [
        *(row(cell, shape, call) for shape in SHAPES for cell in LAYERS for call in both),
        *(row(cell, shape, gradient=text) for shape in (small, middle) for cell in LAYERS for text in policies),
        *(row(cell, middle, **memory) for cell in LAYERS for memory in memories),
        *(row(case.cell, case.shape, gradient=case.gradient) for case in TABLES["windows"].cases),
        *(row(case.cell, case.shape, "scan") for case in TABLES["scan"].cases),
        *(row(case.cell, case.shape, call) for case in few for call in both),
    ]


def trees(commit: str, folder: Path, threads: int) -> list[Tree]:
    """Ours, then the other. Raises SystemExit where there is no such commit, or it does not compile."""
    import bptt

    if Path(bptt.__file__).parents[1] != ROOT / "src":
        raise SystemExit(f"the package that is installed is not this tree's: {bptt.__file__}")
    other = Path(commit).resolve()
    if not (other / "src" / "bptt").is_dir():
        other = folder / "commit"
        other.mkdir()
        archive = run(["git", "archive", commit], cwd=ROOT, stdout=PIPE)
        if archive.returncode:
            raise SystemExit(f"neither a commit nor a directory with a checkout: {commit!r}")
        run(["tar", "-x"], cwd=other, input=archive.stdout, check=True)
    loaded = [module.__file__ or "" for name, module in sys.modules.items() if name.startswith("bptt.kernels.")]
    [binary] = [file for file in loaded if file and not file.endswith(".py")]
    for name, tree in (("new", ROOT), ("old", other)):
        if sources(tree) == sources(ROOT):
            ignored = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(tree / "src" / "bptt", folder / name / "bptt", ignore=ignored)
            shutil.copy(binary, folder / name / "bptt" / "kernels")
        else:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--target"]
            if run([*pip, str(folder / name), str(tree)], stdout=sys.stderr).returncode:
                raise SystemExit(f"not compiled: {commit}")
    return [Tree(name, folder / name, threads) for name in ("new", "old")]


def sources(tree: Path) -> dict[str, bytes]:
    """What the compiled module is made of."""
    files = [tree / "CMakeLists.txt", *sorted((tree / "csrc").iterdir())]
    return {file.name: file.read_bytes() for file in files}


def measured(row: Row, new: Tree, old: Tree, runs: int) -> Row:
    """The row with its ratios, and how far the trees are apart. Raises ValueError where the row does not count."""
    ratios: dict[str, list[float]] = {}
    for turn in range(runs):
        answers = {tree.name: tree.answer(row) for tree in ((new, old) if turn % 2 == 0 else (old, new))}
        for what, value in answers["new"].items():
            ratios.setdefault(what, []).append(value / answers["old"][what])
    pairs = zip(torch.load(new.results), torch.load(old.results), strict=True)
    error = max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs)
    if not error <= (1e-4 if row["fresh"] else 1e-5):
        raise ValueError(f"the trees differ by {error:.1e} of the largest entry")
    return row | {"error": error, "ratios": ratios}


def named(row: Row) -> str:
    options = [f"{name}={row[name]}" for name in OPTIONS if name in row]
    return " ".join([row["cell"], f"({', '.join(str(row[name]) for name in 'TBIH')})", *options, row["call"]])


def show(rows: Sequence[Row], console: Console) -> None:
    """The rows that are worse, and a summary."""
    from bptt.clock import Timing

    for what in dict.fromkeys(what for row in rows for what in row["ratios"]):
        ratios = sorted(((Timing.of(row["ratios"][what]), named(row)) for row in rows), key=lambda r: -r[0].median)
        table = Table("row", f"new / old {what}", "quartiles")
        for ratio, name in ratios:
            if ratio.median > WORSE:
                table.add_row(name, f"{ratio.median:.3f}", f"{ratio.low:.3f} .. {ratio.high:.3f}")
        if table.row_count:
            console.print(table)
        mean, worst = geometric_mean([ratio.median for ratio, _ in ratios]), ratios[0]
        spread = median([ratio.spread for ratio, _ in ratios])
        console.print(
            f"{what}: geometric mean {mean:.3f} over {len(rows)} rows, {table.row_count} above {WORSE}; worst "
            f"{worst[0].median:.3f}, {worst[1]}; the quartiles are {spread:.3f} apart in the median row",
            soft_wrap=True,
        )
    console.print(f"every bit is the same in {sum(row['error'] == 0 for row in rows)} of {len(rows)} rows")


def main(
    commit: Annotated[str, typer.Argument(help="what git can name, or a directory with another checkout")],
    rows: Annotated[Literal["small", "bench", "memory"], typer.Option(help="which rows")] = "small",
    runs: Annotated[int, typer.Option(min=2, help="rounds of each row")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 1,
    save: Annotated[Path | None, typer.Option(metavar="FILE", help="where to save the ratios, as JSON")] = None,
) -> None:
    """Print what got worse. Ctrl-C shows what has been measured so far. Exit status 1 where a row does not count."""
    console, found, refused = Console(stderr=True), [], 0
    if rows == "memory":
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(128 * 1024)
    with tempfile.TemporaryDirectory() as folder:
        pair = trees(commit, Path(folder), threads)
        try:
            for row in track(rows_of(rows), description="comparing", console=console, transient=True):
                try:
                    found.append(measured(row, *pair, runs))
                except ValueError as reason:
                    refused += 1
                    console.print(f"does not count: {named(row)}: {reason}", style="red", markup=False, soft_wrap=True)
        except KeyboardInterrupt:
            console.print("interrupted")
        finally:
            for tree in pair:
                tree.end()
    show(found, Console(width=None if console.is_terminal else 140))
    if save is not None:
        save.write_text(json.dumps({"commit": commit, "threads": threads, "rows": found}, indent=1) + "\n")
    if refused:
        raise typer.Exit(1)


if __name__ == "__main__":
    work() if sys.argv[1:] == ["--worker"] else typer.run(main)
