"""Recurrent layers with a choice of gradient, and the functions that work on them.

`RNN`, `GRU` and `LSTM` take the place of torch.nn's: they extend torch.nn.RNNBase, so that parameters, initialisation,
state_dict and argument checks are torch's own. `LAYERS` holds them by the names of their cells: "rnn", "gru", "lstm".
`Recurrent` makes a layer of any cell. `cells` has cells from the literature as modules, and is loaded when it is first
used.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

from ..engine import onnx_decompositions
from ..scan.explanation import StepExplanation
from . import init
from ._convert import convert, revert
from ._explain import explain
from ._gradients import Gradients, gradients
from ._plan import plan
from ._plan_scan import plan_scan
from ._planned import Plan
from ._stream import StreamGradients, stream_gradients
from ._stream_scan import StreamedScan, stream_scan
from ._using import using
from .layers import GRU, LAYERS, LSTM, RNN
from .recurrent import Recurrent

if TYPE_CHECKING:
    from types import ModuleType as _ModuleType

    from . import cells as cells
del TYPE_CHECKING

__all__ = [
    "GRU",
    "LAYERS",
    "LSTM",
    "RNN",
    "Gradients",
    "Plan",
    "Recurrent",
    "StepExplanation",
    "StreamGradients",
    "StreamedScan",
    "cells",
    "convert",
    "explain",
    "gradients",
    "init",
    "onnx_decompositions",
    "plan",
    "plan_scan",
    "revert",
    "stream_gradients",
    "stream_scan",
    "using",
]


def __getattr__(name: str) -> "_ModuleType":
    if name == "cells":
        return _import_module(f"{__name__}.cells")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
