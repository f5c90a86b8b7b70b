"""The four stages, once, and the only autograd boundary.

`boundary` puts a computation with a hand-written gradient into autograd's graph; `stack` is the stack of recurrent
layers as such a computation (stage 1); `walk` is its gradient (stages 3 and 4), `parameters` its last stage. `ops` is
the boundary for a compiler: the stack as operators of torch. `tangents` refuses forward-mode derivatives.
"""

from .bothways import BothWays as BothWays
from .boundary import Program as Program
from .boundary import Tensors as Tensors
from .boundary import given as given
from .boundary import run as run
from .ops import draw as draw
from .segments import Checkpointed as Checkpointed
from .stack import Stack as Stack
from .tangents import refuse_tangents as refuse_tangents
from .walk import Walk as Walk
