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

import sys as _sys
from importlib.util import find_spec as _find_spec
from types import ModuleType as _Module
from typing import TYPE_CHECKING

from .loading import attribute as _attribute
from .loading import once_loaded as _once_loaded

if TYPE_CHECKING:
    from typing import Any as _Any

    from . import flow as flow
    from . import nn as nn
    from . import plots as plots
    from . import report as report
    from . import train as train
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

_HOMES = {
    **dict.fromkeys(["flow", "nn"], ""),
    "Checkpoints": "memory",
    **dict.fromkeys(["Adaptive", "Chunked", "Full", "Randomized", "Truncated"], "policies"),
    **dict.fromkeys(["convert", "explain", "gradients", "onnx_decompositions", "plan", "plan_scan", "revert"], "nn"),
    **dict.fromkeys(["stream_gradients", "stream_scan", "using"], "nn"),
    "scan": "scan",
}
"""Where each name of `__all__` lives: what is loaded when it is first used, or once torch is there."""

_LATER = {"plots": ("matplotlib", "PIL"), "report": ("plotly",), "train": ()}
"""What is loaded when first used, whether torch is there or not, and the packages of its extra."""


def __getattr__(name: str) -> "_Any":
    return _attribute(__name__, _HOMES | dict.fromkeys(_LATER, ""), name)


def __dir__() -> list[str]:
    later = (name for name, needs in _LATER.items() if all(_find_spec(package) for package in needs))
    return sorted([*__all__, *later, "__version__"])


class _Face(_Module):
    """The package as a module. `scan` stays the function when the module that has it is imported by its own name."""

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value.scan if name == "scan" and isinstance(value, _Module) else value)


_sys.modules[__name__].__class__ = _Face


def _html(measure: object) -> str | None:
    """A measurement as a notebook shows it: by `bptt.plots`, which is loaded then. None, and the repr, without it."""
    if any(not _find_spec(package) for package in _LATER["plots"]):
        return None
    html: str | None = __getattr__("plots").html(measure)
    return html


def _load() -> None:
    """Load all but what comes later, and tell torch what a checkpoint may hold under `weights_only=True`."""
    for name in _HOMES:
        __getattr__(name)
    from torch import Generator
    from torch.serialization import add_safe_globals

    from .flow.shown import draw_with
    from .memory import Checkpoints
    from .policies import SAVED

    add_safe_globals([*SAVED, Checkpoints, Generator])  # data without code of their own
    draw_with(_html)


_once_loaded("torch", __name__, _load)
