"""`bptt train --documents`: texts of documents, from the option to the trained weights."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from resident import lines_of, needs_status
from torch.nn.functional import cross_entropy

from bptt.train import Config, InputError, Lanes, Text, Trainer, fit, prepare, record_run, resume, start
from bptt.train.documents import Numbered
from bptt.train.tasks.text import Part

from .tiny import tiny

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]


def sentences(count: int = 40) -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 9))) for _ in range(count)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(sentences()) + "\n", encoding="utf-8")
    return path


def documents(part: Part | None) -> list[torch.Tensor]:
    assert isinstance(part, Numbered)
    return [document[:] for document in part]


def decoded(dataset: Text, part: Part | None) -> list[str]:
    return [dataset.vocabulary.decode(ids.tolist()) for ids in documents(part)]


def test_each_form_gives_the_same_documents(text: Path, tmp_path: Path):
    expected = sentences()
    (tmp_path / "folder").mkdir()
    for i, sentence in enumerate(expected):
        (tmp_path / f"folder/{i:02}.txt").write_text(sentence, encoding="utf-8")
    (tmp_path / "paragraphs.txt").write_text("\n\n\n".join(expected), encoding="utf-8")
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps({"body": s}) for s in expected), encoding="utf-8")
    found = [
        prepare(tiny(tmp_path / name, documents=form))
        for name, form in [
            ("lines.txt", "lines"),
            ("paragraphs.txt", "paragraphs"),
            ("folder", "files"),
            ("lines.jsonl", "jsonl:body"),
        ]
    ]
    assert len({dataset.sha256 for dataset in found}) == 1
    for dataset in found:
        assert decoded(dataset, dataset.train) == expected[:36]
        assert decoded(dataset, dataset.heldout) == expected[36:]


def test_two_ways_of_cutting_are_two_texts(tmp_path: Path):
    found = set()
    for name, text in (("a", "ab\ncdd\n"), ("b", "abc\ndd\n"), ("c", "ab\ncd\nd\n")):
        (tmp_path / name).write_text(text)
        found.add(prepare(tiny(tmp_path / name, documents="lines", heldout=0.0, batch=1)).sha256)
    assert len(found) == 3


def test_more_lanes_than_tokens_to_predict(tmp_path: Path):
    (tmp_path / "text").write_text("abc\nd\nef\n")
    config = tiny(tmp_path / "text", documents="lines", heldout=0.0, batch=3)
    assert prepare(config).batches(config).full == 3
    with pytest.raises(InputError, match="have 3 tokens to predict, batch=4 lanes need at least 4"):
        prepare(config.override(batch=4))


def test_long_documents_are_read_in_pieces(text: Path, monkeypatch: pytest.MonkeyPatch):
    """The same text, counts, ids and windows, whatever is read at a time; letters are changed document by document."""
    for options in ({}, {"tokens": "word", "min_count": 3}, {"preprocess": "letters"}):
        config = tiny(text, documents="lines", heldout=0.3, **options)
        whole = prepare(config)
        for module in ("documents", "textfiles"):
            monkeypatch.setattr(f"bptt.train.{module}.PIECE", 7)
        pieces = prepare(config)
        assert pieces.vocabulary == whole.vocabulary
        assert pieces.sha256 == whole.sha256
        assert decoded(pieces, pieces.train) == decoded(whole, whole.train)
        for one, other in ((pieces.train, whole.train), (pieces.heldout, whole.heldout)):
            assert isinstance(one, Numbered)
            assert isinstance(other, Numbered)
            assert torch.equal(torch.cat(list(one.predicted())), torch.cat(list(other.predicted())))
            assert torch.equal(torch.cat(list(one.predicted())), torch.cat([d[1:] for d in documents(other)]))
        for a, b in zip(Lanes(pieces.train, 3, 5), Lanes(whole.train, 3, 5), strict=True):
            assert torch.equal(a.inputs, b.inputs)
        monkeypatch.undo()


SCRIPT = """
import sys
from bptt.train import Config, prepare
before = peak()
data = prepare(Config(text=sys.argv[1], documents="lines", cell="gru"))
windows = data.batches(Config(text=sys.argv[1], documents="lines", cell="gru"))
for index in range(20):
    windows.window(0, index)
print(peak() - before)
"""


@pytest.mark.slow
@needs_status
def test_a_text_is_never_in_memory_as_a_whole(tmp_path: Path):
    """Two documents of 24 MiB each and many short ones: their ids would take 400 MiB."""
    path = tmp_path / "text.txt"
    line = "the quick brown fox jumps over a lazy dog " * 600_000
    path.write_text("\n".join([line, *["a short one"] * 1000, line, *["another"] * 200]))
    (grown,) = lines_of(SCRIPT, path)
    assert 0 < float(grown) < 60


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_the_held_out_loss_is_that_of_each_document_alone(text: Path, cell: str):
    dataset = prepare(tiny(text, documents="lines", heldout=0.3))
    trainer = Trainer(tiny(text, documents="lines", heldout=0.3, cell=cell, dtype="float64"), dataset)
    assert dataset.heldout is not None
    total, tokens = 0.0, 0
    for ids in documents(dataset.heldout):
        logits, _ = trainer.model.eval()(ids[:-1, None])
        total += float(cross_entropy(logits[:, 0], ids[1:], reduction="sum").detach())
        tokens += len(ids) - 1
    torch.testing.assert_close(trainer.evaluate(dataset.heldout), total / tokens, rtol=1e-12, atol=0)


def test_a_step_is_the_gradient_of_its_documents_alone(text: Path):
    """One window holds all of it, so plain gradient descent moves by the sum over documents read one by one."""
    config = tiny(
        *(text,), documents="lines", heldout=0.0, seq_length=5000, steps=1, optimiser="sgd", clip=0.0, dtype="float64"
    )
    dataset = prepare(config)
    trainer, alone = Trainer(config, dataset), Trainer(config, dataset)
    trainer.advance()
    for ids in documents(dataset.train):
        logits, _ = alone.model(ids[:-1, None])
        cross_entropy(logits[:, 0], ids[1:], reduction="sum").backward()
    for (name, moved), before in zip(trainer.model.named_parameters(), alone.model.parameters(), strict=True):
        assert before.grad is not None
        expected = before - config.learning_rate * before.grad / trainer.batches.full
        torch.testing.assert_close(moved, expected, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def test_a_resumed_run_ends_with_the_same_bits(text: Path, tmp_path: Path):
    options: dict[str, Any] = {"documents": "lines", "epochs": 3, "save_every": 1}
    trainer, run = start(tiny(text, **options), tmp_path / "whole")
    fit(trainer, run)
    assert trainer.epoch == 3
    assert isinstance(trainer.batches, Lanes)
    first, run = start(tiny(text, **options | {"epochs": 1}), tmp_path / "halves")
    fit(first, run)
    second, again = resume(tmp_path / "halves", epochs=3)
    fit(second, again)
    for one, other in zip(second.model.parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    recording = record_run(again)
    assert recording.call.resets is not None
    assert recording.call.resets.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"documents": "words"}, "documents must be lines, paragraphs, files or jsonl:FIELD: got 'words'"),
        ({"documents": "jsonl:"}, "documents must be lines"),
        ({"documents": "lines", "batching": "random"}, "documents=lines goes without batching: got random"),
        ({"documents": "lines", "limit": 5}, "documents=lines goes without limit: got 5"),
    ],
)
def test_options_that_do_not_go_together(text: Path, options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        tiny(text, **options)
    with pytest.raises(InputError, match="documents=lines needs text, the file or directory to read: got none"):
        Config(documents="lines")


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("a\nb\n", {}, "of 2 documents 2 are left to train on, none of at least 2 tokens; give more, or --heldout 0"),
        ("ab\ncd\n", {}, "of 2 documents 0 are left to hold out"),
        ("a\nb\n", {"heldout": 0.0}, "2 are left to train on, none of at least 2 tokens$"),
        ("ab1\n22\n", {"heldout": 0.5, "preprocess": "letters"}, "of 2 documents 1 are left to hold out"),
    ],
)
def test_too_few_documents(tmp_path: Path, content: str, options: dict[str, Any], message: str):
    (tmp_path / "short.txt").write_text(content, encoding="utf-8")
    config: Config = tiny(tmp_path / "short.txt", documents="lines", **options)
    with pytest.raises(InputError, match=message):
        prepare(config)
