"""Backpropagation through time for PyTorch, made explicit, fast and visible."""

from .policies import Chunked as Chunked
from .policies import Full as Full
from .policies import Randomized as Randomized
from .policies import Truncated as Truncated
