"""Python's and NumPy's own random generators in a checkpoint, for whatever a callback or a data set draws from them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

__all__ = ["restore", "state"]


def state() -> dict[str, Any]:
    """The states of both generators, as tensors and numbers.

    >>> import random
    >>> kept, drawn = state(), random.random()
    >>> restore(kept)
    >>> random.random() == drawn
    True
    """
    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    key = numpy["state"]["key"]
    return {
        "python": {"version": version, "words": torch.tensor(words, device="cpu"), "gauss": gauss},
        "numpy": {
            "bit_generator": numpy["bit_generator"],
            "key": torch.from_numpy(key.astype(np.int64)),
            "pos": int(numpy["state"]["pos"]),
            "has_gauss": int(numpy["has_gauss"]),
            "gauss": float(numpy["gauss"]),
        },
    }


def restore(kept: dict[str, Any]) -> None:
    """Set both generators to a `state`. Those that are missing from it, or of another kind, stay as they are."""
    if "python" in kept:
        python = kept["python"]
        random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    if "numpy" in kept and kept["numpy"]["bit_generator"] == "MT19937":
        numpy = kept["numpy"]
        np.random.set_state(
            {
                "bit_generator": "MT19937",
                "state": {"key": numpy["key"].numpy().astype(np.uint32), "pos": numpy["pos"]},
                "has_gauss": numpy["has_gauss"],
                "gauss": numpy["gauss"],
            }
        )
