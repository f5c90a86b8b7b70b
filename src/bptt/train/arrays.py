"""NumPy's own files, read without running anything that they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InputError

__all__ = ["Array", "arrays_of"]

Array = npt.NDArray[Any]


def arrays_of(path: Path, what: str) -> dict[str, Array]:
    """The arrays of a `.npz` file by name; the one of a `.npy` file has the name "". what: the file is, in words.

    Raises InputError for a file that cannot be read, is damaged, or holds Python objects.
    """
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            return dict(loaded.items()) if isinstance(loaded, np.lib.npyio.NpzFile) else {"": loaded}
    except OSError as error:
        raise InputError(f"cannot read {what} {path}: {error.strerror or error}") from None
    except Exception as error:  # a damaged file makes its readers raise whatever comes up
        said = " ".join(str(error).split())
        if "pickle" in said:
            said = "it holds Python objects, which are not read, or something else altogether"
        raise InputError(f"{what} {path} is no file of NumPy's: {said or type(error).__name__}") from None
