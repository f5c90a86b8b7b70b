"""Where the columns of a sweep lie."""

import pytest
import torch

from bptt import Truncated
from bptt.kernels import Frames


@pytest.mark.parametrize("T", [1, 7, 23])
@pytest.mark.parametrize(("window", "every"), [(1, 1), (4, 1), (6, 4), (5, 5), (30, 1), (23, 9), (40, 7)])
def test_the_columns_that_cross_a_part_are_found_without_the_others(T, window, every):
    reach, B = Truncated(window, every=every).reach(T), 3
    if reach.every is None:
        return  # one block of all losses
    every_one = Frames.of(reach, None, T, B)
    for a in range(T):
        for b in range(a + 1, T + 1):
            got, expected = Frames.crossing(reach, T, B, a, b), every_one.within(a, b)
            assert got.R == expected.R
            for name in ("start", "lane", "first", "last", "end", "top", "number", "offset"):
                assert torch.equal(getattr(got, name), getattr(expected, name)), name
