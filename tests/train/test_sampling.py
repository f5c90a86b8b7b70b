from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from bptt.cli import main
from bptt.train import InputError, LanguageModel, RunDirectory, Vocabulary, fit, generate, start
from bptt.train.sampling import read_prompt
from bptt.train.trained import load

from .tiny import tiny, write_text


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    folder = tmp_path_factory.mktemp("sampling")
    trainer, run = start(tiny(write_text(folder), hidden=32, steps=150, learning_rate=0.02), folder / "run")
    fit(trainer, run)
    return run


def sample(run: RunDirectory, prompt: str, length: int = 30, **options: float) -> str:
    model, vocabulary, config = load(run)
    ids = read_prompt(prompt, vocabulary, config.preprocess)
    return vocabulary.decode(generate(model, vocabulary, ids, length, **options))


def test_what_was_learned_is_continued(run: RunDirectory):
    assert sample(run, "the quick br", temperature=0) == "own fox jumps over the lazy dog"[:30]


def test_the_same_seed_gives_the_same_text(run: RunDirectory):
    texts = [sample(run, "the", temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_torchs_own_generator_is_left_alone(run: RunDirectory):
    model, vocabulary, _ = load(run)
    state = torch.get_rng_state()
    list(generate(model, vocabulary, [1], 5))
    torch.testing.assert_close(torch.get_rng_state(), state)


def test_temperature_towards_zero_is_the_argmax(run: RunDirectory):
    assert sample(run, "fox", temperature=1e-12) == sample(run, "fox", temperature=0)


def test_an_empty_prompt_and_no_length(run: RunDirectory):
    assert len(sample(run, "", 10)) == 10
    assert sample(run, "the", 0) == ""


def test_a_prompt_of_unknown_characters_is_refused_by_name(run: RunDirectory):
    with pytest.raises(InputError, match="prompt holds what the training text did not: 'Q', '€'"):
        sample(run, "the Q€Q")


def test_where_training_knew_the_unknown_so_does_the_prompt():
    vocabulary = Vocabulary.build(["a", "a", "b"], "word", min_count=2)
    assert read_prompt("a c", vocabulary, "none") == [1, 0]


def test_the_prompt_is_treated_as_the_text_was():
    vocabulary = Vocabulary.build("the time", "char")
    assert vocabulary.decode(read_prompt("The -- TIME", vocabulary, "letters")) == "the time"


def test_the_unknown_is_never_drawn():
    torch.manual_seed(0)
    vocabulary = Vocabulary.build(["a", "a", "b"], "word", min_count=2)
    model = LanguageModel(2, hidden=3).eval()
    assert list(generate(model, vocabulary, [0], 50)) == [1] * 50


@pytest.mark.parametrize(
    ("length", "temperature", "message"),
    [
        (-1, 1.0, "length must be at least 0: got -1"),
        (1, -0.5, "temperature must be"),
        (1, float("nan"), "temperature must be"),
        (1, float("inf"), "temperature must be"),
    ],
)
def test_impossible_numbers(length: int, temperature: float, message: str):
    vocabulary = Vocabulary.build("ab", "char")
    with pytest.raises(ValueError, match=message):
        generate(LanguageModel(3, hidden=2), vocabulary, [], length, temperature=temperature)


def test_a_vocabulary_in_another_order_is_refused(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = RunDirectory(tmp_path / "other")
    shutil.copytree(run.path, other.path)
    known = run.stored()
    turned = Vocabulary(known.level, (known.tokens[0], *known.tokens[:0:-1]), known.counts)
    other.stored_file.write_text(turned.to_json(), encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        main(["sample", str(other.path), "--length", "5"])
    error = f"bptt: error: {other.stored_file} is not the vocabulary that weights.safetensors knows\n"
    assert capsys.readouterr() == ("", error)


def test_weights_that_do_not_belong_to_the_run_are_refused(run: RunDirectory, tmp_path: Path):
    _, other = start(tiny(write_text(tmp_path), hidden=9), tmp_path / "other")
    other.weights_file.write_bytes(run.weights_file.read_bytes())
    with pytest.raises(InputError, match="does not fit its configuration and vocabulary"):
        load(other)
