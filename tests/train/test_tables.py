"""What tables may hold, and what is refused, in words that say where it stands."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bptt.train import Config, InputError, prepare
from bptt.train.numerals import number_of
from bptt.train.tables import read_table
from bptt.train.times import later

DAYS = [f"2024-01-{day:02d}" for day in range(1, 31)]


def written(folder: Path, data: str | bytes, name: str = "data.csv") -> Path:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def config(path: Path, **options: Any) -> Config:
    given: dict[str, Any] = {"cell": "gru", "hidden": 3, "batch": 2, "seq_length": 8, "steps": 1, "threads": 1}
    return Config(series=str(path), **given | options)


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(InputError) as error:
        prepare(config(path, **options))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_numbers_are_decimal_and_nothing_that_python_alone_takes_for_one():
    for text, number in {"1.5e3": 1500, " 12 ": 12, "+.5": 0.5, "5.": 5, "-0": 0, "1E-400": 0}.items():
        assert number_of(text) == number
    for text in ("", "NA", "n/a", "NaN", "null", "None", "?", None):
        assert np.isnan(number_of(text) if number_of(text) is not None else 0)
    for wrong in ("1_0", "１２", "1,5", "1 000", "0x10", "inf", "-Infinity", "1e400", "٣", "1e", b"1", 1j, 10**400):
        assert number_of(wrong) is None, wrong


@pytest.mark.parametrize("value", ["1_0", "１２", "inf", "1e400", "1,5"])
def test_what_is_no_number_is_named_with_its_line(tmp_path: Path, value: str):
    rows = "".join(f'{i},"{value if i == 7 else i}"\n' for i in range(30))
    said = refused(written(tmp_path, "t,y\n" + rows), time="t")
    assert said.endswith(f"must be finite numbers: line 9 has {value!r}")
    said = refused(written(tmp_path, "y,t\n" + rows), time="t")
    assert "must be numbers or ISO dates: line 9 has" in said or "twice" in said


def test_a_table_may_begin_with_a_mark_and_end_its_lines_as_it_likes(tmp_path: Path):
    plain = written(tmp_path, "t,y\n1,2\n3,4\n", "plain.csv")
    for name, data in {
        "mark.csv": "\ufefft,y\n1,2\n3,4\n",
        "windows.csv": "t,y\r\n1,2\r\n3,4\r\n",
        "quoted.csv": '"t","y"\n"1"," 2 "\n"3","4"\n\n',
        "late.csv": "\n\nt,y\n1,2\n3,4",
        "tabs.tsv": "t\ty\n1\t2\n3\t4\n",
    }.items():
        found = read_table(written(tmp_path, data, name))
        for column in ("t", "y"):
            assert found.numbers(column, "").tolist() == read_table(plain).numbers(column, "").tolist(), name


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (gzip.compress(b"t,y\n1,2\n"), "is not UTF-8: it is compressed by gzip; unpack it first"),
        (b"PK\x03\x04" + bytes(40), "a ZIP archive, as .xlsx and .npz files are"),
        ("t,y\n1,2\n".encode("utf-16"), "it is UTF-16; save it as UTF-8"),
        (b"PAR1" + bytes(40), "it is Parquet; name it .parquet"),
        (",y\n0,1\n1,2\n", "each once: got ['', 'y'] (pandas leaves out its index with to_csv(index=False))"),
        ("y,y\n0,1\n", "a name of each column, each once: got ['y', 'y']"),
        ("y\n", "is empty: it must have at least one row"),
        ("", "is empty: it must begin with the names of its columns"),
        ("t;y\n0;0,5\n", "must have commas between its columns: its first line has semicolons"),
        ("y\n1\n", "is too short: 1 rows are left to train on"),
    ],
)
def test_what_is_no_table_says_what_it_is(tmp_path: Path, data: str | bytes, said: str):
    assert said in refused(written(tmp_path, data))


def test_times_of_several_kinds_are_not_compared(tmp_path: Path):
    zoned = [f"{day}T00:00:00+01:00" for day in DAYS]
    for times in ([*DAYS[:20], *zoned[20:]], [*DAYS[:20], *map(str, range(20300, 20310))]):
        table = written(tmp_path, "t,y\n" + "".join(f"{t},{i}\n" for i, t in enumerate(times)))
        said = refused(table, time="t")
        assert "must be all numbers, all dates, or all dates with a time zone: line 2 has '2024-01-01', line 22" in said


def test_an_hour_that_a_clock_shows_twice_is_two_times(tmp_path: Path):
    """27 October 2024, 3:00, of a zone that then goes back to 2:00."""
    hours = [f"2024-10-27T{h:02d}:30:00+02:00" for h in range(3)] + ["2024-10-27T02:30:00+01:00"]
    table = read_table(written(tmp_path, "t,y\n" + "".join(f"{t},1\n" for t in hours)))
    assert table.rows_of(None, "t") == {"": [0, 1, 2, 3]}
    assert later(hours, 1) == ["2024-10-27T03:30:00+01:00"]
    local = [hour[:-6] for hour in hours]
    with pytest.raises(InputError, match="is twice: line 5 has"):
        read_table(written(tmp_path, "t,y\n" + "".join(f"{t},1\n" for t in local))).rows_of(None, "t")


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (DAYS[:3], ["2024-01-04", "2024-01-05"]),
        (["2023-11-30", "2023-12-31"], ["2024-01-31", "2024-02-29"]),
        (["2020-01-01", "2020-04-01", "2020-07-01"], ["2020-10-01", "2021-01-01"]),
        (["0.1", "0.2", "0.3"], [0.4, 0.5]),
        ([1700, 1701], [1702, 1703]),
        (["9999-12-30", "9999-12-31"], [1, 2]),
        (["2024-01-01", "2024-01-02", "2024-01-04"], [1, 2]),
        (["2024-01-01"], [1, 2]),
        (None, [1, 2]),
    ],
)
def test_times_go_on_as_they_went(times: list[Any] | None, expected: list[Any]):
    assert later(times, 2) == expected
