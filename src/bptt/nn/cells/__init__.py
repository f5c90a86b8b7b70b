"""Recurrent cells from the literature, as plain modules of ordinary torch operations: one step each.

They are called as torch.nn's cells are, and hold no state: `h = cell(x, h)` where there is one state, `h, c =
cell(x, (h, c))` where the output is the first of several, and `y, state = cell(x, state)` where it is none of them. A
loop calls them, or `bptt.scan`, under any gradient policy:

    cell = bptt.nn.cells.LayerNormLSTM(64, 128)

    def step(state, x):
        state = cell(x, state)
        return state, state[0]

    state, hs = bptt.scan(step, cell.initial_state(B), xs, gradient="truncated:35")

Rows stay apart, no branch depends on data, and every derivative is autograd's. `initial_state(batch_size)` is the state
to start from, `reset_parameters` draws the parameters anew.
"""

from ._alif import ALIF
from ._cfc import CfC
from ._cornn import CoRNN
from ._indrnn import IndRNN
from ._layer_norm_lstm import LayerNormLSTM
from ._leaky_rnn import LeakyRNN
from ._lif import LIF
from ._mgu import MGU
from ._slstm import SLSTM
from ._surrogate import fast_sigmoid_spike, triangular_spike

__all__ = [
    "ALIF",
    "LIF",
    "MGU",
    "SLSTM",
    "CfC",
    "CoRNN",
    "IndRNN",
    "LayerNormLSTM",
    "LeakyRNN",
    "fast_sigmoid_spike",
    "triangular_spike",
]


def __dir__() -> list[str]:
    return sorted(__all__)
