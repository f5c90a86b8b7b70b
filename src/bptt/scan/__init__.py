"""Backpropagation through time for any step function.

`function` is `scan` itself; `arguments` checks what enters it, `forward` runs the steps once, `pullback` is the way
back. `pytrees` takes carries, xs and ys apart. `monitor` sees steps as they run, and state that they keep outside of
the carry, which `located` names; `leaked` is for values that leave a step. `replay` is one step run again under the
same `surroundings`, as a graph of its own. `segments` says which carries are kept, computes the others again, and holds
every replay against what the forward pass gave. `sweep` is the block sweep over steps, `graph` the policy as a graph,
for derivatives of higher order. `eager` keeps a compiler out.
"""

from .function import scan as scan
