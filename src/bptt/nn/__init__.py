"""Drop-in recurrent layers with a choice of gradient, `RNN`, `GRU` and `LSTM`, and the functions that work on them.
`LAYERS` holds them by the names of their cells: "rnn", "gru", "lstm".

They extend torch.nn.RNNBase, so that parameters, initialisation, state_dict and argument checks are torch's own.
"""

from . import init
from ._convert import convert, revert
from ._gradients import Gradients, gradients
from ._plan import Plan, plan
from ._stream import StreamGradients, stream_gradients
from ._using import using
from .layers import GRU, LAYERS, LSTM, RNN

__all__ = [
    "GRU",
    "LAYERS",
    "LSTM",
    "RNN",
    "Gradients",
    "Plan",
    "StreamGradients",
    "convert",
    "gradients",
    "init",
    "plan",
    "revert",
    "stream_gradients",
    "using",
]


def __dir__() -> list[str]:
    return sorted(__all__)
