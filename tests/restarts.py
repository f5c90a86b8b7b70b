"""States for resets to restart from."""

import pytest
import torch
from reference import Case
from torch import Tensor

FORMS = ("shared", "each_step")


each_form = pytest.mark.parametrize("form", FORMS)


def restart(data: Case, form: str) -> tuple[Tensor, ...]:
    """A state for resets to restart from."""
    generator = torch.Generator().manual_seed(3)
    lead = (len(data.x),) if form == "each_step" else ()
    return tuple(torch.randn(*lead, *z.shape, generator=generator, dtype=torch.float64).to(z) for z in data.initial)
