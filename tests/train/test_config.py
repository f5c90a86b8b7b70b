from __future__ import annotations

import dataclasses
import tomllib

import pytest

from bptt.train import Config, InputError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corpus": "bible"}, "corpus must be one of python-docs, timemachine: got 'bible'"),
        ({"text": ""}, "text must be a file name: got ''"),
        ({"cell": "LTSM"}, r"cell must be one of rnn, gru, lstm, .*: got 'LTSM' \(did you mean lstm\?\)"),
        ({"nonlinearity": "sigmoid"}, "nonlinearity must be one of tanh, relu: got 'sigmoid'"),
        ({"layers": 0}, "layers must be a whole number of at least 1: got 0"),
        ({"hidden": 2.5}, "hidden must be a whole number of at least 1: got 2.5"),
        ({"batch": True}, "batch must be a whole number of at least 1: got True"),
        ({"seq_length": "35"}, "seq_length must be a whole number of at least 1: got '35'"),
        ({"heldout": 1.0}, "heldout must be a number of at least 0 and below 1: got 1.0"),
        ({"heldout": float("nan")}, "heldout must be a number of at least 0 and below 1: got nan"),
        ({"dropout": -0.1}, "dropout must be"),
        ({"learning_rate": 0}, "learning_rate must be a finite number above 0: got 0.0"),
        ({"learning_rate": float("inf")}, "learning_rate must be a finite number above 0: got inf"),
        ({"clip": -1}, "clip must be a finite number of at least 0: got -1.0"),
        ({"optimiser": "adagrad"}, "optimiser must be one of adam, sgd: got 'adagrad'"),
        ({"seed": -1}, "seed must be a whole number in"),
        ({"dtype": "float16"}, "dtype must be one of float32, float64: got 'float16'"),
        ({"memory": "disk"}, "memory must be one of"),
        ({"kernel": "quantum"}, "kernel must be one of .*: got 'quantum'"),
        ({"gradient": "chunked:0"}, "k must be at least 1 step: got 0"),
        ({"gradient": "sometimes"}, "gradient must be one of full, .*: got 'sometimes'"),
        ({"text": "a\0b"}, "text must be a file name"),
        ({"text": "a.txt", "corpus": "timemachine"}, "give text or corpus, not both: got text=a.txt and corpus=timem"),
        ({"cell": "lstm", "nonlinearity": "relu"}, "nonlinearity is for cell=rnn: got nonlinearity=relu and cell=lstm"),
        ({"cell": "gru", "nonlinearity": "tanh"}, "nonlinearity is for cell=rnn: got nonlinearity=tanh and cell=gru"),
        (
            {"device": "toaster"},
            r"device must be a torch device that is there: got 'toaster' \(Expected one of cpu, .*",
        ),
        ({"device": ""}, "device must be a torch device that is there: got ''"),
        ({"kernel": ""}, "kernel must be one of .*: got ''"),
        ({"gradient": ""}, "gradient must be one of .*: got ''"),
        ({"gradient": 3}, "gradient must be text: got 3"),
        ({"threads": -1}, r"threads must be a whole number in \[0, 1024\]: got -1"),
        ({"threads": 100_000}, r"threads must be a whole number in \[0, 1024\]: got 100000"),
        ({"layers": 1001}, "layers must be at most 1000: got 1001"),
        ({"hidden": 2**31}, "hidden must be at most 2147483647: got 2147483648"),
        ({"embedding": 10**19}, "embedding must be at most 2147483647: got 1"),
        ({"seq_length": 10**19}, "seq_length must be at most 2147483647: got 1"),
        ({"batch": 2**31}, "batch must be at most 1048576: got 2147483648"),
        ({"steps": 2**63}, "steps must be at most 9223372036854775807: got 9223372036854775808"),
        ({"keep": 2**63}, "keep must be at most 9223372036854775807: got 9223372036854775808"),
        ({"learning_rate": 1e39}, r"learning_rate must be at most 1e\+37: got 1e\+39"),
        ({"learning_rate": 10**400}, "learning_rate must be a finite number above 0: got 100000"),
        ({"clip": -(10**400)}, "clip must be a finite number of at least 0: got -100000"),
        ({"seed": 16**5000}, r"seed must be a whole number in \[0, 2\*\*63\): got int too large to be shown"),
        ({"steps": 16**5000}, "steps must be at most 9223372036854775807: got int too large to be shown"),
        ({"text": "caf\udce9"}, r"text must be UTF-8, or config.toml could not hold it: got 'caf\\udce9'"),
        ({"documents": "jsonl:\ud800"}, "documents must be UTF-8"),
        ({"device": "\ud800"}, "device must be"),
        ({"steps": 5, "epochs": 5}, "steps or epochs, not both"),
        ({"steps": 0}, "steps must be a whole number of at least 1: got 0"),
    ],
)
def test_a_bad_value_is_named_with_what_was_expected(options: dict[str, object], message: str):
    with pytest.raises(InputError, match=message) as caught:
        Config(**options)
    assert "\n" not in str(caught.value)


def test_defaults():
    config = Config()
    assert (config.epochs, config.steps) == (10, None)
    assert Config(clip=0).clip == 0.0


def test_toml_there_and_back():
    config = Config(text="a b/ü.txt", gradient="randomized:0.9", steps=7, learning_rate=1, seed=2**62)
    assert Config.from_toml(config.to_toml(), "here") == config


def test_toml_has_every_option_that_has_a_value():
    names = {f.name for f in dataclasses.fields(Config) if not f.metadata["tasks"] or "text" in f.metadata["tasks"]}
    assert set(tomllib.loads(Config(text="x").to_toml())) == names - {"steps", "corpus", "documents", "nonlinearity"}
    rnn = Config(cell="rnn", nonlinearity="relu", steps=1)
    assert set(tomllib.loads(rnn.to_toml())) == names - {"epochs", "documents", "text"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hiden = 3", r"conf.toml: unknown option hiden \(did you mean hidden\?\)$"),
        ("learning-rat = 3", r"conf.toml: unknown option learning-rat \(did you mean learning_rate\?\)$"),
        ("zzz = 1", "conf.toml: unknown option zzz; known are task, corpus, text, .*"),
        ("learning-rate = 1\nlearning_rate = 1", "conf.toml: learning_rate is given twice"),
        ("steps = 1\nepochs = 1", "conf.toml: give steps or epochs, not both"),
        ("hidden = 'big'", "conf.toml: hidden must be a whole number of at least 1: got 'big'"),
        ("hidden = ", "conf.toml is not TOML"),
        ("[model]\nhidden = 3", "conf.toml: unknown option model"),
        pytest.param("steps = " + "[" * 20_000 + "]" * 20_000, "conf.toml is not TOML: ", id="deep"),
        pytest.param("steps = " + "9" * 5000, "conf.toml is not TOML: ", id="long"),
        pytest.param(
            "steps = 0x" + "f" * 5000, "conf.toml: steps must be at most .*: got int too large", id="long hex"
        ),
        pytest.param("clip = 1" + "0" * 400, "conf.toml: clip must be a finite number", id="no float"),
        pytest.param("steps" + ".a" * 5000 + " = 1", "conf.toml: steps must be .*: got dict too large", id="deep keys"),
    ],
)
def test_bad_toml_names_the_file(text: str, message: str):
    with pytest.raises(InputError, match=message):
        Config.from_toml(text, "conf.toml")


def test_toml_takes_dashes_and_both_spellings_of_the_optimiser():
    config = Config.from_toml("learning-rate = 1\nlog_every = 7\noptimizer = 'sgd'\n", "here")
    assert (config.learning_rate, config.log_every, config.optimiser) == (1.0, 7, "sgd")


def test_flags_win_over_a_file_before_the_two_are_judged_together():
    def merged(entries: dict[str, object], **flags: object) -> Config:
        return Config.from_entries(entries, "conf.toml", **flags)

    assert merged({"nonlinearity": "relu"}, cell="rnn").nonlinearity == "relu"
    assert merged({"epochs": 3}, steps=5).epochs is None
    assert merged({"corpus": "timemachine"}, text="a").corpus is None
    assert merged({"text": "a"}, corpus="timemachine").text is None
    assert merged({"hidden": 0}, hidden=3).hidden == 3
    with pytest.raises(InputError, match=r"^conf\.toml with the flags: nonlinearity is for cell=rnn"):
        merged({"nonlinearity": "relu"}, cell="gru")
    with pytest.raises(InputError, match=r"^hidden must be"):
        merged({"layers": 2}, hidden=0)


def test_text_and_corpus_take_each_others_place():
    assert Config().corpus == "python-docs"
    assert Config(text="a").corpus is None
    assert Config(corpus="timemachine").override(text="a").corpus is None
    assert Config(text="a").override(corpus="timemachine").text is None
    assert Config(text="a").override(hidden=3).text == "a"


def test_steps_and_epochs_take_each_others_place():
    assert Config(epochs=3).override(steps=5).steps == 5
    assert Config(epochs=3).override(steps=5).epochs is None
    assert Config(steps=3).override(epochs=5).steps is None
    assert Config(steps=3).override(hidden=5).steps == 3
    with pytest.raises(InputError, match="not both"):
        Config().override(steps=1, epochs=1)
