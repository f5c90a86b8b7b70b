"""The operations of aten in fewer, simpler ones: what a recorder writes down in place of what torch was asked for.

A rule computes the same values by operations of the canonical set: arithmetic, comparison and selection, the elementary
functions, sums and extremes along dimensions, matrix products, and views by permutation, slice and size.
"""

from . import (  # noqa: F401  their rules
    activations,
    arithmetic,
    attention,
    constants,
    distances,
    indexing,
    losses,
    normalisations,
    products,
    reductions,
    resampled,
    sampled,
    views,
    windows,
)
from .constants import OF_NUMBERS as OF_NUMBERS
from .decomposed import taken_apart as taken_apart
from .indexing import by_row as by_row
from .linear_algebra import solved as solved
from .linear_algebra import solved_again as solved_again
from .rules import RULES as RULES
from .writes import scattered as scattered
from .writes import without_write as without_write
