"""A STEP AS DATA: a user's step, traced once, split by when each value can be computed, and explained.

`trace` records a step and its vector-Jacobian product as one graph of aten operations; `parts` says what a split step
consists of; `split` makes the parts; `guard` tells when a traced step would no longer do what it did; `listing` prints.
"""

from .draws import Draw as Draw
from .draws import draw_all as draw_all
from .guard import Guard as Guard
from .listing import labels as labels
from .listing import listing as listing
from .listing import sizes as sizes
from .parts import Part as Part
from .parts import SplitStep as SplitStep
from .parts import Value as Value
from .rebinding import holds_wrapped as holds_wrapped
from .rebinding import module_in as module_in
from .rebinding import origin as origin
from .rebinding import without_history as without_history
from .recorder import NotTraceable as NotTraceable
from .recorder import Recorder as Recorder
from .restarts import restarting as restarting
from .split import split as split
from .substitutes import counts_rows as counts_rows
from .tangent import TangentStep as TangentStep
from .tangent import tangent_step as tangent_step
from .trace import trace as trace
from .traced import TracedStep as TracedStep
from .unwrapped import Unwrapped as Unwrapped
from .unwrapped import is_mapped as is_mapped
