"""The engine: the four stages, written once, and the only autograd boundary.

`net` is the recurrent layers of a call as data. Its programs, by what they keep: `stack` (a whole tape), `segments`
and `bidirectional` (checkpoints); `programs` chooses. `steps` is the program of a traced step, `step_plan` what it
decides beforehand. `backward` is stages 3 and 4 of a net over a whole tape. Over segments they come one after the other
as `rerun` says, and `crossing` says which columns arrive in each, cross to the one before and reach the first state;
its `block_sweep` drives layers, compiled steps and replayed steps. `source` is the places of x, y and their errors,
`sweep` the driver through layers and directions; `parameters` is stage 4.

`packed` is a net on packed sequences, whose rows lie as they were given; `rebuilt` makes gates that no tape has.

`boundary` puts a computation with a hand-written gradient into autograd's graph; `records` are the arguments and
results of its backward call; `plain` is the short way through it for plain calls of layers, `plain_steps` for those of
a traced step; `graph` is the policy as a graph, for derivatives of higher order; `ops` is the boundary for a compiler:
the programs as operators of torch, `flops` their cost; `onnx` is a net as operators of ONNX; `tracing` says which
observers need them. `transforms` is the boundary inside torch.func's transforms and dual levels, by the `rules` of each
kind of program; `levels` takes a function through them, and `mapped` makes lanes of the calls that vmap maps over;
`pull_request` is a backward call there as data, which lanes divide; `mapped_steps` is a traced step for them.
`pushforward` is the tangents of a net; `tangents` says where there are some, and refuses those that would be lost.
`device` says what torch's default device is.
"""

from .backward import BackwardPass as BackwardPass
from .backward import Observer as Observer
from .boundary import attach as attach
from .boundary import needs_gradient as needs_gradient
from .boundary import own_precision as own_precision
from .boundary import run as run
from .crossing import block_sweep as block_sweep
from .device import default_device as default_device
from .graph import EdgeFactor as EdgeFactor
from .mapped_steps import MappedSteps as MappedSteps
from .net import Net as Net
from .onnx import onnx_decompositions as onnx_decompositions
from .onnx import onnx_layers as onnx_layers
from .ops import draw as draw
from .ops import through_operators as through_operators
from .packed import PackedStack as PackedStack
from .plain import PlainCall as PlainCall
from .plain import is_observed as is_observed
from .plain_steps import Again as Again
from .plain_steps import PlainSteps as PlainSteps
from .programs import NetPrograms as NetPrograms
from .programs import with_checkpoints as with_checkpoints
from .pushforward import push as push
from .records import Asked as Asked
from .records import Grads as Grads
from .records import Saved as Saved
from .records import Tensors as Tensors
from .records import given as given
from .rerun import reversals as reversals
from .rules import reaches_all as reaches_all
from .segments import Checkpointed as Checkpointed
from .stack import Stack as Stack
from .step_plan import StepPlan as StepPlan
from .steps import Check as Check
from .steps import StepProgram as StepProgram
from .tangents import forward_mode as forward_mode
from .tangents import refuse_tangents as refuse_tangents
from .tracing import for_onnx as for_onnx
from .tracing import named as named
from .tracing import recorder as recorder
from .tracing import recording as recording
from .tracing import refusal as refusal
from .tracing import refuse_recording as refuse_recording
from .tracing import refuse_tracing_values as refuse_tracing_values
from .tracing import seen as seen
from .transforms import refuse_mapped as refuse_mapped
from .transforms import transformed as transformed
from .transforms import whole_numbers as whole_numbers
