"""Backpropagation through time for PyTorch, made explicit, fast and visible.

    import bptt

    rnn = bptt.nn.LSTM(64, 128, gradient=bptt.Truncated(35))  # torch.nn.LSTM with a choice of how far gradients reach
    bptt.convert(model, gradient="chunked:35")                # replaces every torch.nn.RNN, GRU and LSTM in a model
    carry, ys = bptt.scan(step, carry, xs)                    # runs any step (carry, x) -> (carry, y)

The gradient policies Full, Chunked, Truncated, Randomized and Adaptive say how far gradients reach; Checkpoints says
what is kept for the backward pass. `bptt.nn` has the layers. convert, revert and using change the layers inside a
model. gradients computes gradients without autograd, stream_gradients and stream_scan those of sequences that do not
fit into memory. plan and plan_scan tell what a call costs, and explain which kernel runs it, and how it is compiled.
onnx_decompositions takes apart a program of torch.export for ONNX.

`bptt.flow` measures how gradients flow. `bptt.plots` (pictures), `bptt.report` (an interactive page) and `bptt.train`
(language models) are loaded when they are first used.
"""

from importlib import import_module as _import_module
from importlib.util import find_spec as _find_spec
from typing import TYPE_CHECKING

from . import flow as flow
from . import nn as nn
from .flow.shown import draw_with as _draw_with
from .memory import Checkpoints as Checkpoints
from .nn import convert as convert
from .nn import explain as explain
from .nn import gradients as gradients
from .nn import onnx_decompositions as onnx_decompositions
from .nn import plan as plan
from .nn import plan_scan as plan_scan
from .nn import revert as revert
from .nn import stream_gradients as stream_gradients
from .nn import stream_scan as stream_scan
from .nn import using as using
from .policies import Adaptive as Adaptive
from .policies import Chunked as Chunked
from .policies import Full as Full
from .policies import Randomized as Randomized
from .policies import Truncated as Truncated
from .scan import scan as scan

if TYPE_CHECKING:
    from types import ModuleType as _ModuleType

    from . import plots as plots
    from . import report as report
    from . import train as train
del TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "Adaptive",
    "Checkpoints",
    "Chunked",
    "Full",
    "Randomized",
    "Truncated",
    "convert",
    "explain",
    "flow",
    "gradients",
    "nn",
    "onnx_decompositions",
    "plan",
    "plan_scan",
    "revert",
    "scan",
    "stream_gradients",
    "stream_scan",
    "using",
]

_LATER = {"plots": ("matplotlib", "PIL"), "report": ("plotly",), "train": ()}
"""What is loaded when first used, and the packages of its extra."""


def __getattr__(name: str) -> "_ModuleType":
    if name in _LATER:
        return _import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _html(measure: object) -> str | None:
    """A measurement as a notebook shows it: by `bptt.plots`, which is loaded then. None, and the repr, without it."""
    if any(not _find_spec(package) for package in _LATER["plots"]):
        return None
    html: str | None = __getattr__("plots").html(measure)
    return html


_draw_with(_html)


def __dir__() -> list[str]:
    later = (name for name, needs in _LATER.items() if all(_find_spec(package) for package in needs))
    return sorted([*__all__, *later, "__version__"])
