"""The four stages, once, and the only autograd boundary.

`boundary` puts a computation with a hand-written gradient into autograd's graph; `stack` is the stack of recurrent
layers as such a computation (stage 1); `walk` is its gradient (stages 3 and 4), `parameters` its last stage, `restart`
the way of an adjoint into a given state at a reset. `ops` is the boundary for a compiler: the stack as operators of
torch; `tracing` says who else needs them. `tangents` refuses forward-mode derivatives.
`device` says what torch's default device is.
"""

from .bothways import BothWays as BothWays
from .bothways import taped as taped
from .boundary import Program as Program
from .boundary import Pullback as Pullback
from .boundary import Tensors as Tensors
from .boundary import attach as attach
from .boundary import given as given
from .boundary import run as run
from .device import default_device as default_device
from .ops import draw as draw
from .ops import through_operators as through_operators
from .segments import Checkpointed as Checkpointed
from .stack import Stack as Stack
from .tangents import refuse_tangents as refuse_tangents
from .tracing import named as named
from .tracing import recorder as recorder
from .tracing import recording as recording
from .tracing import refusal as refusal
from .tracing import refuse_recording as refuse_recording
from .tracing import seen as seen
from .walk import Walk as Walk
