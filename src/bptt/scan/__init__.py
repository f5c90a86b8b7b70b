"""Backpropagation through time for any step function.

`function` is `scan` itself; `arguments` checks its arguments, `pytrees` splits carries, xs and ys into tensors and
structure, and `first_carry` finds a first carry that is like the others. `surroundings` are the settings of torch that
affect a step. `eager` keeps a compiler out.

A step that can be traced: `compiled` traces it and keeps the trace, in `kept`. `compiled_call` is a call by a traced
step, `direct` the short way of a small call whose kind was met before. `drawn` has the random numbers of its steps;
`lanes` makes one lane of a batch whose rows depend on one another, and `independence` tells whether they do.
`explanation` tells how a step is compiled, or why it is not. `mapped_call` is a call by a traced step inside the
transforms of torch.func, `plain_loop` one of any step there and in forward mode.

A step that is replayed: `recorded` records the steps as they run, as one `chain` for each block. Elsewhere `forward` is
the forward pass, `pullback` the backward pass. `monitor` observes the steps as they run and finds state that they keep
outside of the carry, which `located` names; `leaked` is for tensors that leave a step elsewhere. `replay` runs one step
again, as a graph of its own. `segments` says which carries are kept, recomputes the others, and compares every replay
with the forward pass. `sweep` is the block sweep over steps, `graph` the policy as a graph, for derivatives of higher
order, and `leaves` finds those of any graph.
"""

from .compiled_call import KERNELS as KERNELS
from .function import scan as scan
