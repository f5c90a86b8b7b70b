"""How far gradients reach: gradient policies as pure data.

A policy says, for a sequence of T steps, which losses form a *block* (`every`), how many steps each block
reaches back (`window`), and by which random factor xi the adjoint is multiplied at each time edge. The engine
interprets the answer; nothing here touches a kernel.

Legend: T time steps, B lanes. Steps are counted from 0; edge t joins step t-1 to step t.
"""

from .policy import Policy as Policy
from .randomized import PolynomialTail as PolynomialTail
from .randomized import Randomized as Randomized
from .reach import EVERYTHING as EVERYTHING
from .reach import Reach as Reach
from .text import COMPARED as COMPARED
from .text import parse as parse
from .windows import Adaptive as Adaptive
from .windows import Chunked as Chunked
from .windows import Full as Full
from .windows import Truncated as Truncated

SAVED = [Full, Chunked, Truncated, PolynomialTail, Randomized, Adaptive]
"""The classes that a checkpoint may hold, stored under this package's name, whichever of its files defines them."""

for _policy in SAVED:
    _policy.__module__ = __name__
