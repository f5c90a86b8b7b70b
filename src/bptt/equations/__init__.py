"""The mathematics of backpropagation through time: NumPy, float64, loops, formula by formula.

Nothing here is fast. Every other part of the package is compared with it, and cites its formula numbers. The
derivations stand in README.md beside this file, in this order of chapters:

1 `chain`, `recurrence`  2 `linear`  3 `rnn`  4 `gru`  5 `lstm`  6 `policies`, `randomized`, `tangents`  7 `stacks`
8 `bounds`

Legend: T time steps, B lanes, I inputs, H hidden units, P numbers in an output (H, or less with a projection),
S numbers in a state (P, or P + H for an LSTM's pair). Formulas count steps from 1 and call the initial state h_0;
arrays count from 0, so that h[t] belongs to formula step t + 1 and the initial state is an argument of its own.
"""

from collections.abc import Callable
from typing import Any

from . import gru, lstm, rnn

CELLS: dict[str, Callable[..., Any]] = {"rnn": rnn.RNN, "gru": gru.GRU, "lstm": lstm.LSTM}
"""The cells of chapters 3 to 5, by name."""
