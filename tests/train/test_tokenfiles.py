"""Documents of tokens: arrays, files, and what cannot be used."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from bptt.train import InputError, Lanes, Tokens

from .tiny import write

IDS = [5, 1, 0, 0, 2, 7, 0, 3]


@pytest.mark.parametrize("source", ["array", "memmap", ".npy", ".bin", "big-endian"])
def test_tokens_are_split_at_separators_or_offsets(tmp_path: Path, source: str):
    ids, dtype = np.array(IDS, np.uint16), None
    path = tmp_path / f"ids{source if source.startswith('.') else '.npy'}"
    if source == ".bin":
        ids.tofile(path)
        dtype = "uint16"
    else:
        np.save(path, ids.astype(">u2") if source == "big-endian" else ids)
    given = ids if source == "array" else np.load(path, mmap_mode="r") if source == "memmap" else path
    for options, expected in [
        ({}, [IDS]),
        ({"separator": 0}, [[5, 1, 0], [0], [2, 7, 0], [3]]),
        ({"separator": 3}, [IDS]),
        ({"offsets": [0, 2, 2, 8]}, [[5, 1], [], [0, 0, 2, 7, 0, 3]]),
    ]:
        tokens = Tokens(given, dtype=dtype, **options)
        assert [d[0 : len(d)].tolist() for d in tokens] == expected
        assert [d.tolist() for d in tokens] == expected
        assert tokens.sizes.tolist() == [len(d) for d in expected]
        lanes = Lanes(tokens, 2, 3)
        for one, other in zip(lanes, Lanes(expected, 2, 3), strict=True):
            torch.testing.assert_close(one.inputs, other.inputs)
            torch.testing.assert_close(one.targets, other.targets)
    np.save(tmp_path / "offsets.npy", np.array([0, 3, 8]))
    assert Tokens(given, dtype=dtype, offsets=tmp_path / "offsets.npy").sizes.tolist() == [3, 5]


def test_separators_are_found_across_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("bptt.train.tokenfiles._BLOCK", 2)
    assert Tokens(np.array(IDS), separator=0).sizes.tolist() == [3, 1, 3, 1]


def test_a_file_of_tokens_is_not_sent_to_workers(tmp_path: Path):
    np.save(tmp_path / "ids.npy", np.arange(100_000))
    tokens = Tokens(tmp_path / "ids.npy")
    assert len(pickle.dumps(tokens)) < 2000
    lanes = Lanes(tokens, 1, 40_000)
    loaded = list(DataLoader(lanes, batch_size=None, num_workers=2))
    for one, other in zip(loaded, lanes, strict=True):
        torch.testing.assert_close(one.targets, other.targets)


def bad(tmp_path: Path) -> dict[str, tuple[Path, dict[str, object], str]]:
    """Files of tokens that cannot be used: (file, options, message)."""
    good = tmp_path / "good.npy"
    np.save(good, np.arange(4))
    np.save(tmp_path / "float.npy", np.ones(3))
    np.save(tmp_path / "object.npy", np.array([None]), allow_pickle=True)
    np.save(tmp_path / "square.npy", np.ones((2, 2), int))
    np.save(tmp_path / "empty.npy", np.ones(0, int))
    write(tmp_path, good.read_bytes()[:-1], "cut.npy")
    write(tmp_path, b"\x93NUMPY\x01\x00", "head.npy")
    write(tmp_path, b"\x93NUMPY\x09\x00" + bytes(200), "newer.npy")
    write(tmp_path, "text", "text.npy")
    write(tmp_path, good.read_bytes().replace(b"(4,)", b"(((,"), "garbled.npy")
    write(tmp_path, good.read_bytes().replace(b"(4,), }", b"(-3,),}"), "negative.npy")
    write(tmp_path, good.read_bytes().replace(b"'shape': (4,)", b"['shape']: 4,"), "list.npy")
    raw = write(tmp_path, bytes(7), "raw.bin")
    return {
        "float": (tmp_path / "float.npy", {}, "must be whole numbers: got float64"),
        "object": (tmp_path / "object.npy", {}, "must be whole numbers: got object"),
        "square": (tmp_path / "square.npy", {}, r"must be one array \[N\]: got the shape \[2, 2\]"),
        "empty": (tmp_path / "empty.npy", {}, "are empty"),
        "cut": (tmp_path / "cut.npy", {}, "are cut off: 4 were announced"),
        "head": (tmp_path / "head.npy", {}, r"are no \.npy file"),
        "newer": (tmp_path / "newer.npy", {}, r"are no \.npy file"),
        "text": (tmp_path / "text.npy", {}, r"are no \.npy file"),
        "garbled": (tmp_path / "garbled.npy", {}, r"are no \.npy file"),
        "negative": (tmp_path / "negative.npy", {}, r"must be one array \[N\]: got the shape \[-3\]"),
        "list": (tmp_path / "list.npy", {}, r"are no \.npy file"),
        "no separator": (good, {"separator": 4}, r"separator must occur in tokens .*good\.npy: got 4"),
        "missing": (tmp_path / "none.npy", {}, "cannot read tokens .*No such file"),
        "missing raw": (tmp_path / "none", {"dtype": "uint8"}, "cannot read tokens .*No such file"),
        "no dtype": (raw, {}, "need a dtype, such as uint16"),
        "odd": (raw, {"dtype": "uint16"}, "no whole number of uint16: 1 bytes are left over"),
        "float raw": (raw, {"dtype": "float32"}, "dtype must be a NumPy type of whole numbers: got 'float32'"),
        "no type": (raw, {"dtype": "int17"}, "dtype must be a NumPy type of whole numbers: got 'int17'"),
        "void": (raw, {"dtype": "V0"}, "dtype must be a NumPy type of whole numbers: got 'V0'"),
        "told twice": (good, {"dtype": "int64"}, "leave out dtype='int64'"),
        "offsets": (good, {"offsets": tmp_path / "float.npy"}, "must be whole numbers"),
        "far": (good, {"offsets": good}, "offsets must rise from 0 to the number of tokens, 4: got 4 from 0 to 3"),
    }


@pytest.mark.parametrize(
    "case",
    [
        *("float", "object", "square", "empty", "cut", "head", "newer", "text", "missing", "missing raw", "no dtype"),
        *("odd", "float raw", "no type", "void", "told twice", "offsets", "far"),
        *("garbled", "negative", "list", "no separator"),
    ],
)
def test_bad_files_of_tokens(tmp_path: Path, case: str):
    path, options, message = bad(tmp_path)[case]
    with pytest.raises(InputError, match=message):
        Tokens(path, **options)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (np.ones(3), {}, "source must be whole numbers"),
        (np.ones((2, 2), int), {}, r"source must be whole numbers \[N\]: got int64 \[2, 2\]"),
        (np.array(IDS), {"dtype": "int64"}, "dtype is for a file"),
        (np.array(IDS), {"separator": 0, "offsets": [0, 8]}, "separator or offsets, not both"),
        (np.array(IDS), {"separator": 9}, "separator must occur in tokens of the array: got 9"),
        (np.array(IDS), {"offsets": [8]}, "at least 2 whole numbers"),
        (np.array(IDS), {"offsets": [0, 5, 3, 8]}, "offsets must rise"),
        (np.array(IDS), {"offsets": [1, 8]}, "offsets must rise"),
        (np.array(IDS), {"offsets": [0.0, 8.0]}, "at least 2 whole numbers"),
    ],
)
def test_bad_arrays_of_tokens(source: np.ndarray, options: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        Tokens(source, **options)


@pytest.mark.parametrize("separator", [1.5, True, "0", 0.0])
def test_a_separator_is_a_whole_number(separator: object):
    with pytest.raises(TypeError, match=f"separator must be a whole number: got {separator!r}"):
        Tokens(np.array(IDS), separator=separator)


def test_a_file_of_tokens_that_shrinks_is_an_error(tmp_path: Path):
    np.arange(100, dtype=np.uint8).tofile(tmp_path / "ids.bin")
    tokens = Tokens(tmp_path / "ids.bin", dtype="uint8", offsets=[0, 50, 100])
    os.truncate(tmp_path / "ids.bin", 70)
    assert tokens[0].tolist() == list(range(50))
    with pytest.raises(InputError, match="have become fewer"):
        tokens[1].tolist()


HEADER = "{'descr': '<i8', 'fortran_order': False, 'shape': (4,), }\n"


@given(st.integers(0, len(HEADER)), st.integers(0, 9), st.text(st.sampled_from("{}()[],:'\\#\n 1-e"), max_size=4))
def test_no_header_crashes_the_reader_of_tokens(
    tmp_path_factory: pytest.TempPathFactory, at: int, count: int, other: str
):
    header = HEADER[:at] + other + HEADER[at + count :]
    start = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little")
    with pytest.raises(InputError):
        Tokens(write(tmp_path_factory.mktemp("any"), start + header.encode(), "ids.npy"))


@given(st.binary(max_size=200), st.booleans())
def test_no_bytes_crash_the_reader_of_tokens(tmp_path_factory: pytest.TempPathFactory, data: bytes, magic: bool):
    path = write(tmp_path_factory.mktemp("any"), b"\x93NUMPY\x01\x00" * magic + data, "ids.npy")
    with pytest.raises(InputError):
        Tokens(path)
