"""The default device, in every version of torch that the package allows."""

from __future__ import annotations

import torch

__all__ = ["default_device"]


def default_device() -> torch.device:
    """Where torch puts what is made without naming a device.

    torch.get_default_device() of 2.8 raises AttributeError once torch.set_default_device(None) has taken a setting
    back. The default is then what it is without a setting: the CPU.
    """
    try:
        return torch.get_default_device()
    except AttributeError:
        return torch.device("cpu")
