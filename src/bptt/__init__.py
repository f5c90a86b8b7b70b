"""Backpropagation through time for PyTorch, made explicit, fast and visible."""

from . import flow as flow
from . import nn as nn
from .kernels import explain as explain
from .memory import Checkpoints as Checkpoints
from .nn import convert as convert
from .nn import gradients as gradients
from .nn import plan as plan
from .nn import stream_gradients as stream_gradients
from .policies import Adaptive as Adaptive
from .policies import Chunked as Chunked
from .policies import Full as Full
from .policies import Randomized as Randomized
from .policies import Truncated as Truncated
from .scan import scan as scan
