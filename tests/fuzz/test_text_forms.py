"""Text that a user writes, options and policies: any text gives what it names, or an error of ours."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any
from unittest.mock import patch

import pytest
import tomli_w
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bptt import memory, policies
from bptt.train import Config, InputError
from bptt.train.network import build_model

pytestmark = pytest.mark.slow

NAMES = [entry.name for entry in fields(Config)]
VALUES: st.SearchStrategy[Any] = st.one_of(
    st.integers(-3, 5),
    st.integers(-(2**63), 2**63 - 1),
    st.sampled_from([1000, 2**20, 2**31 - 1]).flatmap(lambda most: st.integers(most, most + 1)),
    st.floats(),
    st.booleans(),
    st.text(max_size=10),
    st.sampled_from(["full", "chunked:3", "truncated:4/2", "adaptive:0.5,max=9", "lstm", "rnn", "relu", "sgd", "cpu"]),
    st.dates(),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def read(text: str) -> Config | None:
    """None for a file that is refused; one that is not is written and read again."""
    try:
        config = Config.from_toml(text, "file")
    except InputError as error:
        message = str(error)
    else:
        assert Config.from_toml(config.to_toml(), "file") == config
        return config
    assert message.startswith("file")
    return None


@given(st.text())
def test_any_text_for_a_file_of_options(text: str):
    read(text)


@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), VALUES, max_size=3))
@settings(max_examples=300)
def test_any_values_for_the_options(entries: dict[str, Any]):
    config = read(tomli_w.dumps(entries))
    if config is None:
        return
    assert set(entries) <= {*NAMES, *(name.replace("_", "-") for name in NAMES), "optimizer"}
    for name, value in entries.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            assert asdict(config)[name.replace("-", "_")] == value


sizes = st.integers(1, 5) | st.integers(1, 2**31 - 1)


@given(sizes, sizes, st.integers(1, 3), st.sampled_from(["rnn", "gru", "lstm"]))
def test_any_sizes_of_a_network(hidden: int, embedding: int, layers: int, cell: str):
    """Without memory: what no tensor can be is an input error."""
    config = Config(hidden=hidden, embedding=embedding, layers=layers, cell=cell)
    told = f"no network of layers={layers}, hidden={hidden}, "
    with patch("bptt.train.network.on_cpu", lambda: torch.device("meta")), pytest.raises(InputError, match=told):
        build_model(config, 10)  # it cannot come to the CPU from there in any case


NUMBERS = [
    "0",
    "1",
    "2",
    "7",
    "35",
    "007",
    "+4",
    "-3",
    "0.5",
    ".5",
    "1e-400",
    "1e999",
    "nan",
    "٣",
    "9" * 30,
    "9" * 5000,
    "",
]
PIECES = [
    *("full", "chunked:", "truncated:", "randomized:", "adaptive:", "mean=", "tail=", "max=", "every=", "window="),
    *("checkpoints", ":", "steps=", "bytes=", "gates", "states", "auto"),
    *(",", "/", "=", " ", "\n", "\0"),
]
numbers = st.sampled_from(NUMBERS)
FORMS = st.one_of(
    st.lists(st.sampled_from(PIECES) | numbers, max_size=9).map("".join),
    st.builds("chunked:{}".format, numbers),
    st.builds("truncated:{}/{}".format, numbers, numbers),
    st.builds("randomized:{},{}".format, numbers, numbers),
    st.builds("randomized:mean={},tail={}".format, numbers, numbers),
    st.builds("adaptive:{},max={},every={},window={}".format, numbers, numbers, numbers, numbers),
    st.builds("checkpoints:{}={}".format, st.sampled_from(["steps", "bytes"]), numbers),
    st.text(),
)


@given(FORMS)
@settings(max_examples=500)
def test_any_text_for_a_policy(text: str):
    try:
        policy = policies.parse(text)
    except ValueError:
        return
    assert policies.parse(str(policy)) == policy


@given(FORMS)
@settings(max_examples=500)
def test_any_text_for_what_is_kept(text: str):
    try:
        kept = memory.parse(text)
    except ValueError:
        return
    assert memory.parse(str(kept)) == kept


counts = st.integers(1, 10**9)
shares = st.floats(0, 1, exclude_min=True, exclude_max=True)


@st.composite
def adaptive(draw: st.DrawFn) -> policies.Adaptive:
    every, more, most = sorted(draw(st.tuples(counts, counts, counts)))
    return policies.Adaptive(draw(shares), most, every, window=draw(st.none() | st.just(more)))


@given(adaptive())
def test_the_text_form_of_an_adaptive_policy(policy: policies.Adaptive):
    """The others are in test_properties.py."""
    assert policies.parse(str(policy)) == policy
