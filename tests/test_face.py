"""What importing the package costs, and what it shows: public names, signatures, documentation."""

import inspect
import json
import pydoc
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import bptt
from bptt.nn import LAYERS

PROBE = """
import json, sys
import torch

def state():
    return {
        "threads": torch.get_num_threads(),
        "interop": torch.get_num_interop_threads(),
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "anomaly": torch.is_anomaly_enabled(),
        "seed": torch.initial_seed(),
        "random": torch.get_rng_state().tolist(),
    }

before, loaded = state(), set(sys.modules)
import bptt
print(json.dumps({
    "before": before,
    "after": state(),
    "loaded": sorted(set(sys.modules) - loaded),
    "all": sorted(sys.modules),
}))
"""


@pytest.fixture(scope="module")
def imported() -> dict:
    """What `import bptt` does in a fresh interpreter in which torch is loaded."""
    run = subprocess.run([sys.executable, "-W", "error", "-c", PROBE], capture_output=True, text=True, check=True)
    assert run.stderr == ""
    return json.loads(run.stdout)


def test_import_loads_nothing_optional(imported: dict) -> None:
    optional = {"matplotlib", "triton", "typer", "rich", "plotly", "pooch", "safetensors", "tomli_w", "hypothesis"}
    assert not optional & {name.split(".")[0] for name in imported["all"]}
    ours = {name for name in imported["loaded"] if name.split(".")[0] == "bptt"}
    far = {"adaptors", "cli", "train", "plots", "report", "bench"}
    assert not far & {name.split(".")[1] for name in ours if "." in name}
    assert "bptt.nn.cells" not in ours


def test_import_loads_little_beyond_torch(imported: dict) -> None:
    foreign = {name.split(".")[0] for name in imported["loaded"]} - {"bptt", *sys.stdlib_module_names}
    assert foreign <= {"torch", "numpy"}


def test_import_changes_no_global_setting(imported: dict) -> None:
    assert imported["after"] == imported["before"]


# The public face


MODULES = ["flow", "nn"]
FUNCTIONS = ["convert", "explain", "gradients", "onnx_decompositions", "plan", "plan_scan", "revert", "scan"]
FUNCTIONS += ["stream_gradients", "stream_scan", "using"]
LATER = ["plots", "report", "train"]
PUBLIC = sorted(["Adaptive", "Checkpoints", "Chunked", "Full", "Randomized", "Truncated", *FUNCTIONS, *MODULES])

SIGNATURES = {
    "Adaptive": "(max_bias, max_window, every=1, *, window=None)",
    "Checkpoints": "(steps=None, bytes=None)",
    "Chunked": "(k)",
    "Full": "()",
    "Randomized": "(p, *, generator=None)",
    "Truncated": "(window, every=1)",
    "convert": "(model, gradient=None, *, memory=None, kernel=None, strict=False, subclasses=None)",
    "explain": "(subject, carry=Ellipsis, x=Ellipsis, *, cu_seqlens=None)",
    "onnx_decompositions": "()",
    "gradients": "(layer, x, dy, hx=None, dh_n=None, gradient=None, *, cu_seqlens=None, resets=None, reset_state=None, "
    "per_sample=False)",
    "plan": "(model, T, B, memory=None, x=None)",
    "plan_scan": ("(step, carry, xs=None, *, gradient='full', resets=None, length=None, memory='auto', kernel='auto')"),
    "revert": "(model, *, subclasses=None)",
    "using": "(model, gradient=None, *, memory=None, kernel=None)",
    "stream_gradients": "(layer, x, loss, hx=None, *, wrt=(), gradient=None, memory='checkpoints', resets=None, "
    "reset_state=None, lengths=None, cu_seqlens=None)",
    "stream_scan": "(step, carry, xs, loss, *, wrt=(), length=None, gradient='full', memory='checkpoints', "
    "resets=None, reset_state=None, kernel='auto')",
    "scan": "(step, carry, xs=None, *, gradient='full', resets=None, reset_state=None, reverse=False, length=None, "
    "rows='auto', "
    "memory='auto', kernel='auto')",
}


def bare_signature(callable_: object) -> str:
    signature = inspect.signature(callable_)
    empty = inspect.Parameter.empty
    parameters = [p.replace(annotation=empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


def test_public_names() -> None:
    """`nn` and `flow` are modules by design; other submodules are attributes because importing them makes it so."""
    names = [n for n, v in vars(bptt).items() if not n.startswith("_") and not isinstance(v, ModuleType)]
    assert sorted([*names, *MODULES]) == PUBLIC
    submodules = {n for n, v in vars(bptt).items() if isinstance(v, ModuleType) and not n.startswith("_")}
    rooms = {path.name.removesuffix(".py") for path in Path(bptt.__file__).parent.iterdir()}
    assert submodules <= rooms


def test_dir_and_help_show_the_public_names() -> None:
    assert sorted(bptt.__all__) == PUBLIC
    assert dir(bptt) == sorted([*PUBLIC, *LATER, "__version__"])
    nn = [n for n, v in vars(bptt.nn).items() if not n.startswith("_") and not isinstance(v, ModuleType)]
    assert dir(bptt.nn) == sorted(bptt.nn.__all__) == sorted([*nn, "cells", "init"])
    text = pydoc.plain(pydoc.render_doc(bptt))
    assert bptt.__doc__.splitlines()[0] in text
    shown = {line.split()[1].split("(")[0] for line in text.splitlines() if line.startswith("    class ")}
    assert shown == {name for name in PUBLIC if inspect.isclass(getattr(bptt, name))}
    functions = text.partition("\nFUNCTIONS\n")[2].partition("\nVERSION\n")[0]
    assert all(f"    {name}(" in functions for name in FUNCTIONS)
    assert "_import_module" not in text


LAZY = """
import sys, bptt
loaded = {name for name in sys.modules if name.startswith("bptt.")}
for name in ("plots", "report", "train"):
    assert f"bptt.{name}" not in loaded, name
    assert name in dir(bptt)
    assert getattr(bptt, name) is sys.modules[f"bptt.{name}"]
    assert getattr(bptt, name) is getattr(bptt, name)
assert bptt.plots.reach and bptt.report.write and bptt.train.Lanes
assert "cells" in dir(bptt.nn) and "bptt.nn.cells" not in loaded and bptt.nn.cells.LIF
from bptt import *
assert convert is bptt.convert
try:
    bptt.nothing
except AttributeError as error:
    print(error)
"""

WITHOUT_TORCH = """
import sys, bptt
from bptt import Full, Checkpoints
assert dir(bptt) and "gradients" in dir(bptt)
assert str(Full()) == "full" and bptt.Checkpoints is Checkpoints
print("torch" in sys.modules, "numpy" in sys.modules)
"""

FIRST = """
import io, sys, bptt
{first}
import torch
stored = {"policy": bptt.policies.Truncated(3), "memory": bptt.memory.Checkpoints(steps=2)}
file = io.BytesIO()
torch.save(stored, file)
file.seek(0)
assert torch.load(file, weights_only=True) == stored
assert torch.ops.bptt.stack_forward and bptt.flow.shown._DRAW
assert callable(bptt.scan) and callable(vars(bptt)["scan"]) and vars(bptt)["convert"]
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("bptt")]
assert type(torch.__spec__.loader).__module__ != "bptt.loading"
assert type(bptt.nn.__loader__).__module__ != "bptt.loading"
print("whole")
"""
"""Whatever is imported first: once torch is there, all of the package is, and torch knows what it must."""

MISSING = """
import sys
sys.modules["matplotlib"] = sys.modules["plotly"] = None
import bptt, pydoc
assert "plots" not in dir(bptt) and "report" not in dir(bptt) and "train" in dir(bptt)
pydoc.render_doc(bptt)
try:
    bptt.plots
except ImportError as error:
    print(error)
"""


FIRSTS = ["", "import bptt.scan.function", "bptt.Full()"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "words"),
    [
        (WITHOUT_TORCH, "False False"),
        *((FIRST.replace("{first}", first), "whole") for first in FIRSTS),
        (LAZY, "module 'bptt' has no attribute 'nothing'"),
        (MISSING, "bptt.plots needs matplotlib: pip install 'bptt[plots]'"),
    ],
    ids=["without torch", *FIRSTS, "used", "missing"],
)
def test_submodules_are_loaded_when_first_used(program: str, words: str) -> None:
    run = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert (run.stdout.strip(), run.stderr) == (words, "")


def test_version() -> None:
    project = tomllib.loads((Path(bptt.__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert bptt.__version__ == project["version"]


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    assert bare_signature(getattr(bptt, name)) == SIGNATURES[name]


@pytest.mark.parametrize("layer", LAYERS.values())
def test_layer_call_signature(layer: type) -> None:
    assert getattr(bptt.nn, layer.__name__) is layer
    expected = "(self, input, hx=None, *, lengths=None, cu_seqlens=None, resets=None, reset_state=None)"
    assert bare_signature(layer.forward) == expected


def test_recurrent_signature() -> None:
    assert bare_signature(bptt.nn.Recurrent) == (
        "(cell, num_layers=None, *, batch_first=False, dropout=0.0, reverse=False, bidirectional=False, form='auto', "
        "learn_initial_state=False, gradient='full', memory='auto', kernel='auto')"
    )
    expected = "(self, input, hx=None, *, lengths=None, cu_seqlens=None, resets=None, reset_state=None)"
    assert bare_signature(bptt.nn.Recurrent.forward) == expected
    assert ">>>" in (inspect.getdoc(bptt.nn.Recurrent) or "")


@pytest.mark.parametrize("name", [n for n in PUBLIC if n not in MODULES])
def test_public_names_are_documented(name: str) -> None:
    """One line, then an example that is run as a test."""
    doc = inspect.getdoc(getattr(bptt, name))
    assert doc
    assert doc.splitlines()[0].endswith((".", ":"))
    assert ">>>" in doc
