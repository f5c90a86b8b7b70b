"""Backpropagation through time for any step function.

`_scan` is the function and its forward, `_arguments` the checks of what enters it. `_watch` sees steps as they run, and
state that they keep outside of the carry, which `_located` names; `_unseen` is for calls that it cannot see, `_leaked`
for values that leave a step. `_replay` is one step run again, `_tape` what the forward computed and a replay must give
again, `_rebuilt` carries that were not kept, `_walk` the block sweep over steps, `_graph` the policy as a graph, for
derivatives of higher order. `_eager` keeps a compiler out.
"""

from ._scan import scan as scan
