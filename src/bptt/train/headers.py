"""Whether a table has the columns that are named, from its first line or its schema, before its rows are read and
without torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from .columns import (
    check_column,
    check_features,
    check_has_columns,
    check_names,
    columns_of_sequences,
    columns_of_series,
    opened_csv,
)
from .config import Config
from .corpus import read_file
from .errors import InputError
from .found import STORED

__all__ = ["check_columns", "check_predictable", "header_of", "parquet_names"]


def header_of(path: Path) -> list[str] | None:
    """The names of a table's columns; None for what has none, for what can be read only once, such as a pipe, and for
    a damaged file of NumPy's, which is refused when it is read.
    """
    form = path.suffix.lower()
    if form == ".ts" or not path.is_file():
        return None
    if form == ".parquet":
        return parquet_names(path)
    if form in (".npy", ".npz"):
        return _numpy_names(path)
    with opened_csv(path) as (names, _):
        return names


def parquet_names(path: Path) -> list[str]:
    """The names of the columns of a Parquet file. Raises InputError for what is none, and without a reader of them."""
    try:
        try:
            from pyarrow import parquet

            names = list(parquet.read_schema(path).names)
        except ModuleNotFoundError:
            import polars

            names = list(polars.read_parquet_schema(path))
    except ModuleNotFoundError:
        raise InputError("neither pyarrow nor polars is installed: pip install 'bptt[parquet]'") from None
    except Exception as error:  # each library has errors of its own
        raise InputError(f"table {path} is no Parquet: {' '.join(str(error).split())}") from None
    check_names(path, names)
    return names


def check_columns(config: Config) -> None:
    """Raise InputError where the tables that a configuration reads lack columns that it names, or need others."""
    if config.series is not None and (there := header_of(Path(config.series))) is not None:
        columns_of_series(config, Path(config.series), there)
    for name in (config.classify, config.heldout_file):
        if name is not None and check_has_columns(config, Path(name)) and (there := header_of(Path(name))) is not None:
            columns_of_sequences(config, Path(name), there)


def check_predictable(config: Config, run: Path, data: Path) -> None:
    """Raise InputError where data to predict from lack columns, or features, that a run was trained on.

    config: the run's. What the run keeps of them is read as far as that goes: `bptt.train.trained.load` judges it.
    """
    tables = config.task == "series" or check_has_columns(config, data)
    if not tables or (there := header_of(data)) is None:
        return
    try:
        stored = json.loads(read_file(run / STORED[config.task or ""], "what the run keeps"))
        if config.task == "series":
            needed = [("target", name) for name in (stored["targets"] if stored["horizon"] else ())]
            needed += [("inputs", name) for name in stored["inputs"]]
        features = tuple(stored.get("features", ()))
    except (ValueError, KeyError, TypeError, AttributeError):
        return
    if config.task == "series":
        apart = [(option, getattr(config, option)) for option in ("group", "time")]
        _check_each(data, there, [*needed, *((option, name) for option, name in apart if name is not None)])
    else:
        check_features(str(data), features, columns_of_sequences(config, data, there, labelled=False)[-1])


def _check_each(path: Path, there: list[str], needed: Iterable[tuple[str, str]]) -> None:
    """Raise InputError for the first column that is not there. needed: (the option that names it, its name)."""
    for option, name in needed:
        check_column(path, there, name, option)


def _numpy_names(path: Path) -> list[str] | None:
    if path.suffix.lower() == ".npz":
        try:
            with ZipFile(path) as arrays:
                return [name.removesuffix(".npy") for name in arrays.namelist()]
        except (BadZipFile, OSError):
            return None
    import numpy as np

    try:
        shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
    except Exception:  # a damaged file makes its reader raise whatever comes up
        return None
    return [str(i) for i in range(1 if len(shape) == 1 else shape[1])] if len(shape) in (1, 2) else None
