"""Backpropagation through time for any step function.

`function` is `scan` itself; `arguments` checks its arguments. `compiled` traces a step and keeps the trace,
`compiled_call` is a call by a traced step, `explanation` tells how a step is compiled, or why it is not. The others are
for a step that is replayed: `recorded` records the steps as they run; elsewhere `forward` is the forward pass,
`pullback` the backward pass. `pytrees` splits carries, xs and ys into tensors and structure. `monitor` observes the
steps as they run and finds state that they keep outside of the carry, which `located` names; `leaked` is for tensors
that leave a step elsewhere. `replay` runs one step again under the same `surroundings`, as a graph of its own.
`segments` says which carries are kept, recomputes the others, and compares every replay with the forward pass. `sweep`
is the block sweep over steps, `graph` the policy as a graph, for derivatives of higher order. `mapped_call` is a call
by a traced step inside the transforms of torch.func, `plain_loop` one of any step there and in forward mode. `eager`
keeps a compiler out.
"""

from .compiled_call import KERNELS as KERNELS
from .function import scan as scan
