"""What `bptt check` can be asked for: help and mistakes need no torch."""

from __future__ import annotations

from ..train import Config, InputError
from ..train.imported import found_module

__all__ = ["DTYPES", "LAYER", "check_asked"]

DTYPES = {"float64": 1e-10, "float32": 1e-5}
"""The precisions a layer is run in, and the largest relative error that counts as agreement."""

LAYER = "--module must name a recurrent layer with torch.nn's call form, as torch.nn.LSTM"


def check_asked(module: str | None, device: str | None, dtype: str | None) -> None:
    """Raise InputError for options that no audit can have."""
    for option, value in (("--device", device), ("--dtype", dtype)):
        if module is None and value is not None:
            raise InputError(f"{option} is for the layer that --module names: got {value!r} without it")
    if module is not None:
        if "." not in module:
            raise InputError(f"{LAYER}: got {module!r}, which names no module")
        found_module("--module", module.rpartition(".")[0])
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype must be one of {', '.join(DTYPES)}: got {dtype!r}")
    if device is not None:
        Config.check("device", device)
