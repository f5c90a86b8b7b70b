"""Nets whose gradients are known beforehand, and what may be said of them.

`nets` plants: it builds a layer, a batch and a loss with constant step Jacobians. `truth` says by NumPy what follows
from these. `sentences`, with `courses` and `printed`, reads what a verdict prints, and
judges each claim by that truth.
"""
