"""The variants of constructors, sizes and lengths that conformance is tested on."""

from collections.abc import Callable
from typing import Any

import pytest
from reference import CELLS, NETS

Agree = Callable[..., None]

MEMORIES = ("auto", "gates", "states")
KINDS = ("RNN", "GRU", "LSTM")

CONSTRUCTORS: dict[str, dict[str, Any]] = {
    **NETS,
    "no_bias": {"bias": False},
    "no_bias_bi_two": {"bias": False, "num_layers": 2, "bidirectional": True},
    "batch_first": {"batch_first": True},
    "batch_first_bi_two": {"batch_first": True, "num_layers": 2, "bidirectional": True},
}

SIZES = {  # T, B, I, H
    "one_step": (1, 3, 5, 4),
    "one_lane": (7, 1, 5, 4),
    "one_of_all": (1, 1, 1, 3),
    "one_input": (5, 2, 1, 7),
    "wide_input": (6, 2, 13, 3),
    "wide_state": (3, 5, 2, 17),
    "long": (33, 2, 3, 5),
}

LENGTHS = {
    "sorted": (7, 5, 5, 2),
    "unsorted": (2, 7, 5, 5),
    "equal": (7, 7, 7),
    "ones": (1, 7, 1),
    "single": (7,),
}

each_cell = pytest.mark.parametrize("cell", CELLS)
each_kind = pytest.mark.parametrize("kind", KINDS)
each_net = pytest.mark.parametrize("net", NETS)
