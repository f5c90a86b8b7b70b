from __future__ import annotations

import json
import re
import tracemalloc
from itertools import groupby
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from resident import lines_of, needs_status

from bptt.train import InputError, Lanes, Numbered, Texts, Vocabulary, documents, textfiles
from bptt.train.vocabulary import tokenize
from bptt.train.window import IGNORE

from .tiny import write

TEXT = "one two\n\n  \nthree\nfour  five\n\n\nsix"


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
