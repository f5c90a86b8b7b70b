"""What recurs: the torch definition of each cell, one file a cell. See `_cell` for what a cell is.

`CELLS` is the one table of cells. What else needs to know a cell (kernels, measurements, plots, the trainer, the bench)
asks it of the cell; the layers stand in `bptt.nn.LAYERS`, by the cell's name.
"""

from ._activations import ACTIVATIONS as ACTIVATIONS
from ._activations import Activation as Activation
from ._cell import AllSteps as AllSteps
from ._cell import Cell as Cell
from ._cell import Pullback as Pullback
from ._cell import TapedSteps as TapedSteps
from ._cell import Weights as Weights
from .gru import GRU as GRU
from .lstm import LSTM as LSTM
from .rnn import RNN as RNN

CELLS: dict[str, Cell] = {cell.mode: cell for cell in (*map(RNN, ACTIVATIONS), GRU(), LSTM())}
"""The cell of each mode of a layer: torch.nn's modes, and RNN_SIGMOID and RNN_IDENTITY."""


def of_name(name: str) -> Cell:
    """The cell of that name; of those that share one, as the simple RNNs do, the first.

    Raises ValueError for a name that no cell has.

    >>> of_name("rnn").mode, of_name("lstm").gate_names
    ('RNN_TANH', ('i', 'f', 'g', 'o'))
    """
    for cell in CELLS.values():
        if cell.name == name:
            return cell
    names = dict.fromkeys(cell.name for cell in CELLS.values())
    raise ValueError(f"cell must be one of {', '.join(map(repr, names))}: got {name!r}")
