"""Backpropagation through time for any step function.

`function` is `scan` itself; `arguments` checks what enters it, `forward` runs the steps once, `pullback` is the way
back. `forms` takes pytrees apart; `leaves` has what is done to one tensor. `monitor` sees steps as they run, and state
that they keep outside of the carry, which `located` names; `unseen` is for calls that it cannot see, `leaked` for
values that leave a step. `replay` is one step run again under the same `surroundings`, `visit` that step as a graph of
its own, `replays` those of a whole call, held against what the forward pass gave. `segments` says which carries are
kept and computes the others again, `sweep` is the block sweep over steps, `graph` the policy as a graph, for
derivatives of higher order. `eager` keeps a compiler out.
"""

from .function import scan as scan
