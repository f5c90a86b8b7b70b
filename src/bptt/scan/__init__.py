"""Backpropagation through time for any step function.

`_scan` is the function and its forward, `_replay` one step watched and run again, `_walk` the block sweep over steps.
"""

from ._scan import scan as scan
