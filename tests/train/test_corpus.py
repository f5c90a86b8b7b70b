from __future__ import annotations

import sys
from pathlib import Path

import pooch
import pytest

from bptt.train import InputError, corpus


def test_python_docs_is_long_and_the_same_every_time():
    text = corpus.python_docs()
    assert len(text) > 300_000
    assert text == corpus.python_docs()


def test_letters_is_the_preprocessing_of_d2l():
    assert corpus.letters("The Time-Machine,\n\n1898: I\n") == "the time machine i "


def test_a_byte_order_mark_is_not_text(tmp_path: Path):
    (tmp_path / "bom.txt").write_bytes("\ufeffhello".encode())
    assert corpus.read_file(tmp_path / "bom.txt") == "hello"


def test_a_file_is_read_in_place_of_the_named_corpus(tmp_path: Path):
    (tmp_path / "a.txt").write_text("Hello, World", encoding="utf-8")
    assert corpus.load("python-docs", str(tmp_path / "a.txt"), "none") == "Hello, World"
    assert corpus.load("python-docs", str(tmp_path / "a.txt"), "letters") == "hello world"


@pytest.mark.parametrize(
    ("content", "preprocess", "message"),
    [
        (b"abc\xff\xfe", "none", "is not UTF-8: byte 3"),
        (b"", "none", "is empty"),
        (b" \n\t", "none", "is empty"),
        (b"123 456", "letters", "is empty after --preprocess letters"),
    ],
)
def test_text_that_cannot_be_used(tmp_path: Path, content: bytes, preprocess: str, message: str):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        corpus.load("python-docs", str(path), preprocess)


def test_missing_text_and_a_directory_in_its_place(tmp_path: Path):
    with pytest.raises(InputError, match=r"cannot read text .*none\.txt: No such file"):
        corpus.load("python-docs", str(tmp_path / "none.txt"), "none")
    with pytest.raises(InputError, match=r"cannot read text .*: Is a directory"):
        corpus.load("python-docs", str(tmp_path), "none")


@pytest.mark.parametrize(
    "error", [OSError("Failed to resolve 'd2l-data'\nand more"), ValueError("SHA1 hash does not match")]
)
def test_offline_the_time_machine_says_how_to_pass_a_file(monkeypatch: pytest.MonkeyPatch, error: Exception):
    def retrieve(url: str, **options: object) -> str:
        assert url == corpus.TIME_MACHINE_URL
        raise error

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    with pytest.raises(InputError) as caught:
        corpus.time_machine()
    assert "--text FILE --preprocess letters" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_time_machine_is_checked_and_preprocessed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "timemachine.txt").write_text("The Time Machine, by H. G. Wells [1898]\n", encoding="utf-8")
    seen = {}

    def retrieve(url: str, known_hash: str, fname: str, path: object) -> str:
        seen["hash"] = known_hash
        return str(tmp_path / fname)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    assert corpus.time_machine() == "the time machine by h g wells "
    assert seen["hash"] == "sha1:090b5e7e70c295757f55df93cb0a180b9691891a"


def test_without_pooch_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(InputError, match=r"pooch is not installed: pip install 'bptt\[corpora\]'"):
        corpus.time_machine()
