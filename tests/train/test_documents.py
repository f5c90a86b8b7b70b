from __future__ import annotations

import json
import os
import pickle
import re
import tracemalloc
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from resident import lines_of, needs_status
from torch.utils.data import DataLoader

from bptt.train import InputError, Lanes, Numbered, Texts, Tokens, Vocabulary, documents, textfiles
from bptt.train.vocabulary import tokenize
from bptt.train.window import IGNORE

TEXT = "one two\n\n  \nthree\nfour  five\n\n\nsix"


def write(folder: Path, data: str | bytes, name: str = "text.txt") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textfiles, "PIECE", 5)
    monkeypatch.setattr(documents, "PIECE", 5)


@pytest.mark.parametrize("form", ["{}", "\ufeff{}", "{}\n", "\n{}\n\n"])
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("pieces", ["large", "small"])
def test_a_file_is_split_into_documents(
    tmp_path: Path, form: str, ends: str, pieces: str, request: pytest.FixtureRequest
):
    if pieces == "small":
        request.getfixturevalue("small_pieces")
    text = form.format(TEXT)
    path = write(tmp_path, text.replace("\n", ends))
    assert list(Texts.lines(path)) == ["one two", "three", "four  five", "six"]
    assert list(Texts.paragraphs(path)) == ["one two", "three\nfour  five", "six"]
    assert list(Texts.whole(path)) == [text.lstrip("\ufeff")]


chars = st.sampled_from(["a", "é", "語", "🎈", " ", "\n", "\r", "\t", "\x0b", "\u2028", "\ufeff"])


@given(st.text(chars), st.integers(3, 9))
def test_any_text_of_any_piece_size(tmp_path_factory: pytest.TempPathFactory, text: str, size: int):
    """Against Python's own reading of the text."""
    path = write(tmp_path_factory.mktemp("any"), text)
    expected = path.read_text(encoding="utf-8-sig")
    blank = " \t\n\v\f\r"
    lines = re.split("\r\n|\r|\n", text.removeprefix("\ufeff"))
    inked = [bool(line.strip(blank)) for line in lines]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(textfiles, "PIECE", size)
        patch.setattr(documents, "PIECE", size)
        if not expected.strip(blank):
            with pytest.raises(InputError, match="is empty"):
                Texts.whole(path)
            return
        assert list(Texts.whole(path)) == [expected]
        assert list(Texts.lines(path)) == [line for line, ink in zip(lines, inked, strict=True) if ink]
        runs = groupby(zip(inked, lines, strict=True), key=lambda pair: pair[0])
        assert list(Texts.paragraphs(path)) == ["\n".join(line for _, line in run) for ink, run in runs if ink]
        for level in ("char", "word"):
            tokens = tokenize(expected, level)
            texts = Texts.whole(path)
            assert list(texts.tokens(level)) == list(tokens)
            vocabulary = Vocabulary.build(tokens, level)
            numbered = Numbered(texts, vocabulary)
            assert numbered.sizes.tolist() == [len(tokens)]
            got = torch.as_tensor(numbered[0][0 : len(tokens)])
            assert got.tolist() == vocabulary.encode(tokens).tolist()


@pytest.mark.usefixtures("small_pieces")
def test_a_long_document_is_sliced_anywhere(tmp_path: Path):
    text = "a bc déf ghijklmno p qr"
    for level in ("char", "word"):
        tokens = tokenize(text, level)
        vocabulary = Vocabulary.build(tokens, level)
        document = Numbered(Texts.whole(write(tmp_path, text)), vocabulary)[0]
        assert not isinstance(document, torch.Tensor)
        expected = vocabulary.encode(tokens)
        for start in range(len(tokens)):
            for stop in range(start, len(tokens) + 1):
                torch.testing.assert_close(document[start:stop], expected[start:stop])


def test_a_directory_is_a_document_per_file_in_the_order_of_their_paths(tmp_path: Path):
    for name, text in [("b.txt", "two"), ("a/c.txt", "one"), ("d.md", "none"), ("e.txt", " \n"), ("f.txt", "three\n")]:
        write(tmp_path, text, name)
    assert list(Texts.directory(tmp_path)) == ["one", "two", "three\n"]
    assert list(Texts.directory(tmp_path, "*.md")) == ["none"]


def test_json_lines_are_read_by_field(tmp_path: Path):
    entries = [{"text": "é\nb", "n": 1}, {"n": [{}], "text": ""}, {"text": "🎈"}]
    lines = [json.dumps(entry, ensure_ascii=bool(i % 2)) for i, entry in enumerate(entries)]
    texts = Texts.json_lines(write(tmp_path, "\n\n".join(lines) + "\r\n"), "text")
    assert list(texts) == ["é\nb", "", "🎈"]
    assert list(texts.tokens("char")) == list("é\nb🎈")
    numbered = Numbered(texts, Vocabulary.build("éb", "char"))
    assert numbered.sizes.tolist() == [3, 0, 1]
    assert numbered[0].tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": 1, "id": 2}', "line 3: no field 'text', its fields are body, id$"),
        ("[]", "line 3: no field 'text', its fields are none$"),
        ('{"text": 5}', "line 3: field 'text' must be text: got int"),
        ('{"text": "\\ud800"}', "line 3: field 'text' holds half a character"),
        ('{"text": ', "line 3: not JSON"),
        pytest.param("[" * 100_000, "line 3: not JSON", id="deep"),
    ],
)
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.usefixtures("small_pieces")
def test_a_bad_json_line_is_named(tmp_path: Path, line: str, message: str, ends: str):
    texts = Texts.json_lines(write(tmp_path, ends.join(['{"text": "good"}', "", line, ""])), "text")
    with pytest.raises(InputError, match=message):
        Numbered(texts, Vocabulary.build("good", "char"))


@pytest.mark.parametrize("data", [b"", b" \n\t\r\n", b"\xef\xbb\xbf\n"])
def test_what_is_blank_is_empty(tmp_path: Path, data: bytes):
    path = write(tmp_path, data)
    for split in (Texts.lines, Texts.paragraphs, Texts.whole, lambda p: Texts.json_lines(p, "text")):
        with pytest.raises(InputError, match=r"text .*text\.txt is empty"):
            split(path)
    with pytest.raises(InputError, match="is empty"):
        Texts.directory(tmp_path)


@pytest.mark.parametrize(
    ("data", "byte"), [(b"ab\xff", 2), (b"abc\xe8\xaa", 3), (b"\xc3(", 0), (b"aaaa\xe8\xaa\x8e\xe8\xaa.", 7)]
)
@pytest.mark.parametrize("pieces", ["large", "small"])
def test_what_is_not_utf8_is_refused_with_the_byte(
    tmp_path: Path, data: bytes, byte: int, pieces: str, request: pytest.FixtureRequest
):
    if pieces == "small":
        request.getfixturevalue("small_pieces")
    path = write(tmp_path, data)
    with pytest.raises(InputError, match=rf"is not UTF-8: byte {byte} cannot be decoded"):
        Texts.lines(path)


def test_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(InputError, match=r"cannot read text .*none.*: No such file"):
        Texts.lines(tmp_path / "none")
    with pytest.raises(InputError, match=r"cannot read text .*: Is a directory"):
        Texts.whole(tmp_path)
    with pytest.raises(InputError, match="must be in a directory"):
        Texts.directory(tmp_path / "none")
    with pytest.raises(InputError, match=r"has no file that matches \*\.rst"):
        Texts.directory(tmp_path, "*.rst")


def test_a_file_that_changes_meanwhile_is_an_error(tmp_path: Path):
    path = write(tmp_path, "abcd\nefgh")
    texts = Texts.lines(path)
    write(tmp_path, "abcd\ne")
    with pytest.raises(InputError, match="has become shorter since it was indexed"):
        texts[1]
    write(tmp_path, b"abcd\ne\xffgh")
    with pytest.raises(InputError, match="has changed since it was indexed"):
        texts[1]
    path.unlink()
    with pytest.raises(InputError, match="cannot read text"):
        texts[0]


@pytest.mark.parametrize("ends", [b"\n", b"\r\n", b"\r"])
def test_what_finding_the_documents_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: bytes):
    """At its largest, besides what belongs to a piece: twice the 16 bytes of a line that stay; of one document none."""
    count = 300_000
    path = write(tmp_path, (b"a line" + ends) * count)
    monkeypatch.setattr(textfiles, "PIECE", 2**14)
    for split, found, limit in ((Texts.lines, count, 33), (Texts.whole, 1, 1)):
        tracemalloc.start()
        try:
            texts = split(path)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert len(texts) == found
        assert peak < limit * count + 64 * textfiles.PIECE


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


LARGE = """
import resource, sys
import numpy as np
from bptt.train import Lanes, Numbered, Texts, Tokens, Vocabulary

size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + 64 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (size, size))  # the files do not even fit in the address space
before = peak()
tokens = Tokens(sys.argv[1], dtype="uint16", offsets=[0, 10, 700_000_000, 2**30])
assert tokens.sizes.sum() == 2**30
lanes = Lanes(tokens, 2, 1000)
print(lanes.window(0, 0).resets.sum().item(), lanes.window(0, 300_000).tokens, lanes.window(0, 500_000).tokens)
assert lanes.windows(0) == 700_000
texts = Texts.whole(sys.argv[2])
documents = Numbered(texts, Vocabulary.build("\\0x", "char"))
print(documents.sizes.tolist(), documents[0][90_000_000:90_000_003].tolist(), documents[0][-2:].tolist())
print(peak() - before)
"""


@pytest.mark.slow
@needs_status
def test_files_larger_than_the_memory_allowed(tmp_path: Path):
    """A file of 2 GB of tokens and one text of 96 MB, sparse on disk, where 64 MB more are allowed."""
    for name, size, end in [("ids.bin", 2**31, b"\1\0"), ("text.txt", 96 * 2**20, b"x")]:
        with (tmp_path / name).open("wb") as file:
            file.seek(size - len(end))
            file.write(end)
    few = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    first, second, grown = lines_of(LARGE, tmp_path / "ids.bin", tmp_path / "text.txt", environment=few)
    # lane 0: documents of 10 and then 2**30 - 700,000,000 tokens; lane 1: the one between
    assert first == "3 2000 1000"
    assert second == "[100663296] [1, 1, 1] [1, 2]"
    assert 0 < float(grown) < 48


def test_from_a_file_to_windows(tmp_path: Path):
    """Each character but a line's first is predicted once, and no window joins two lines."""
    lines = ["the quick", "brown fox", "", "jumps", "over the lazy dog"]
    texts = Texts.lines(write(tmp_path, "\n".join(lines)))
    vocabulary = Vocabulary.build(texts.tokens("char"), "char")
    predicted = [w.targets[w.targets != IGNORE] for w in Lanes(Numbered(texts, vocabulary), 2, 5, shuffle=True)]
    expected = torch.cat([vocabulary.encode(line[1:]) for line in lines])
    torch.testing.assert_close(torch.cat(predicted).sort().values, expected.sort().values)
