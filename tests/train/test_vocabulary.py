from __future__ import annotations

import pytest

from bptt.train import InputError, Vocabulary
from bptt.train.vocabulary import UNKNOWN, tokenize

LETTERS = "the quick brown fox jumps over the lazy dog"


def test_the_time_machine_alphabet_has_28_entries_as_in_d2l():
    assert len(Vocabulary.build(LETTERS, "char")) == 28


@pytest.mark.parametrize("level", ["char", "word"])
def test_what_was_seen_comes_back(level: str):
    tokens = tokenize(LETTERS, level)
    vocabulary = Vocabulary.build(tokens, level)
    assert vocabulary.decode(vocabulary.encode(tokens).tolist()) == LETTERS


def test_characters_are_numbered_as_one_by_one():
    vocabulary = Vocabulary.build("abé😀 \n", "char")
    text = "ab\U0010ffffé😀\x00z ß\ud800\n"
    assert vocabulary.encode(text).tolist() == vocabulary.encode(list(text)).tolist()
    assert vocabulary.encode("").tolist() == []
    assert Vocabulary.build([], "char").encode("ab").tolist() == [0, 0]


def test_rare_tokens_are_counted_as_unknown():
    vocabulary = Vocabulary.build(["a", "a", "a", "b", "b", "c"], "word", min_count=2)
    assert vocabulary.tokens == (UNKNOWN, "a", "b")
    assert vocabulary.counts == (1, 3, 2)
    assert vocabulary.encode(["c", "a"]).tolist() == [0, 1]


def test_the_word_unk_in_a_text_is_the_unknown_entry():
    vocabulary = Vocabulary.build(f"a {UNKNOWN} a".split(), "word")
    assert vocabulary.tokens == (UNKNOWN, "a")
    assert vocabulary.counts == (1, 2)


def test_json_there_and_back():
    vocabulary = Vocabulary.build('é"\\\n\u2028 ', "char")
    assert Vocabulary.from_json(vocabulary.to_json()) == vocabulary


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"level": "char", "tokens": 3, "counts": []}',
        '{"level": "syllable", "tokens": ["<unk>"], "counts": [0]}',
        '{"level": "char", "tokens": ["a"], "counts": [1]}',
        '{"level": "char", "tokens": ["<unk>", "a"], "counts": [1]}',
        '{"level": "char", "tokens": ["<unk>", 1], "counts": [1, 1]}',
        '{"level": "char", "tokens": ["<unk>"], "counts": [-1]}',
        '{"level": "char", "tokens": ["<unk>"], "counts": [9223372036854775808]}',
        pytest.param("[" * 100_000, id="deep"),
        pytest.param('{"level": ' + "9" * 5000, id="long"),
    ],
)
def test_json_of_something_else_is_refused(text: str):
    with pytest.raises(InputError, match="vocabulary must"):
        Vocabulary.from_json(text)
