"""Drop-in recurrent layers whose gradient is chosen: `RNN`, `GRU`, `LSTM`, and what one does with them.
`LAYERS` has them by the name of their cell: "rnn", "gru", "lstm".

They extend torch.nn.RNNBase, so that parameters, initialisation, state_dict and argument checks are torch's own.
"""

from . import init as init
from ._convert import convert as convert
from ._convert import revert as revert
from ._gradients import Gradients as Gradients
from ._gradients import gradients as gradients
from ._plan import Plan as Plan
from ._plan import plan as plan
from ._stream import StreamGradients as StreamGradients
from ._stream import stream_gradients as stream_gradients
from ._using import using as using
from .layers import GRU as GRU
from .layers import LAYERS as LAYERS
from .layers import LSTM as LSTM
from .layers import RNN as RNN

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
