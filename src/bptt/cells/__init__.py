"""What recurs: the torch definition of each cell, one file a cell. See `_cell` for what a cell is."""

from ._cell import Cell as Cell
from ._cell import Pullback as Pullback
from ._cell import Weights as Weights
from .gru import GRU as GRU
from .lstm import LSTM as LSTM
from .rnn import NONLINEARITIES as NONLINEARITIES
from .rnn import RNN as RNN

CELLS: dict[str, Cell] = {f"RNN_{name.upper()}": RNN(name) for name in NONLINEARITIES} | {"GRU": GRU(), "LSTM": LSTM()}
"""The cell of each mode of a layer: torch.nn's modes, and RNN_SIGMOID and RNN_IDENTITY."""
