"""Backpropagation through time for any step function.

`_scan` is the function and its forward, `_arguments` the checks of what enters it, `_replay` one step watched and run
again, `_tape` what the forward computed and a replay must give again, `_rebuilt` carries that were not kept, `_walk`
the block sweep over steps.
"""

from ._scan import scan as scan
