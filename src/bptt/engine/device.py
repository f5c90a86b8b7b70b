"""The default device, in every version of torch that the package allows."""

from __future__ import annotations

import torch

__all__ = ["default_device"]


def default_device() -> torch.device:
    """Where torch puts what is made without naming a device.

    torch.get_default_device() of 2.8 raises AttributeError once torch.set_default_device(None) has taken a setting
    back. The default is then what it is without a setting: the CPU.
    """
    if not torch._C._len_torch_function_stack() and not hasattr(_SET, "device_context"):
        return _CPU  # told in a fraction of the time: a setting is a mode, and is noted there
    try:
        return torch.get_default_device()
    except AttributeError:
        return _CPU


_CPU = torch.device("cpu")
_SET = getattr(torch, "_GLOBAL_DEVICE_CONTEXT", torch)
