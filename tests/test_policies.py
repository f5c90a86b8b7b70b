"""Gradient policies are data: what they say and what they refuse."""

import io
import json
import pickle
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bptt
from bptt import Checkpoints, Chunked, Full, Randomized, Truncated, policies
from bptt.policies import SAVED, Adaptive, Policy, PolynomialTail, parse

FORMS = {
    "full": Full(),
    "chunked:1": Chunked(1),
    "chunked:35": Chunked(35),
    "truncated:20": Truncated(20),
    "truncated:20/5": Truncated(20, every=5),
    "truncated:5/5": Truncated(5, every=5),
    "randomized:0.9": Randomized(0.9),
    "randomized:1.0": Randomized(1.0),
    "randomized:0.5,0.75,1.0": Randomized((0.5, 0.75, 1.0)),
    "randomized:mean=20,tail=4": Randomized.polynomial(mean=20),
    "randomized:mean=12.5,tail=3.5": Randomized.polynomial(mean=12.5, tail=3.5),
    "adaptive:0.9,max=100": Adaptive(0.9, 100),
    "adaptive:0.9,max=100,window=17": Adaptive(0.9, 100, window=17),
    "adaptive:0.5,max=64,every=4": Adaptive(0.5, 64, every=4),
    "adaptive:0.5,max=64,every=4,window=4": Adaptive(0.5, 64, 4, window=4),
}


def test_no_policy_is_left_out() -> None:
    """Of what checkpoints hold, the text forms and those that a mistake is told, the public names, the README."""
    kinds = {kind for kind in vars(policies).values() if isinstance(kind, type) and issubclass(kind, Policy)} - {Policy}
    assert kinds | {PolynomialTail} == set(SAVED)
    assert kinds == {type(policy) for policy in FORMS.values()} == {type(parse(text)) for text in BLOCKS}
    with pytest.raises(ValueError, match="gradient must be one of") as told:
        parse("nothing")
    assert [text for text in FORMS if text.split(":")[0] not in str(told.value)] == []
    pages = [Path(__file__).parent.parent / name for name in ("README.md", "README_zh.md")]
    readmes = [page.read_text(encoding="utf-8") for page in pages]
    for kind in kinds:
        assert getattr(bptt, kind.__name__) is kind
        assert all(f"\n| `{kind.__name__}(" in readme for readme in readmes)


@pytest.mark.parametrize("text", FORMS)
def test_text_form_round_trip(text: str) -> None:
    assert parse(text) == FORMS[text]
    assert str(FORMS[text]) == text
    assert parse(f"  {text.upper()} ") == FORMS[text]


counts = st.integers(1, 10**12)
shares = st.floats(0, 1, exclude_min=True)
anything = st.one_of(
    st.just(Full()),
    st.builds(Chunked, counts),
    st.tuples(counts, counts).map(lambda two: Truncated(max(two), every=min(two))),
    st.builds(Randomized, shares),
    st.builds(Randomized, st.lists(shares, min_size=1, max_size=4)),
    st.builds(Randomized.polynomial, st.floats(1, 1e300, exclude_min=True), st.floats(2, 1e300, exclude_min=True)),
    st.tuples(st.floats(0, 1, exclude_min=True, exclude_max=True), st.lists(counts, min_size=3, max_size=3)).map(
        lambda a: Adaptive(a[0], sorted(a[1])[2], every=sorted(a[1])[0], window=sorted(a[1])[1])
    ),
)


@given(anything)
def test_every_policy_is_its_text_in_a_configuration(policy: Policy) -> None:
    assert parse(str(policy)) == policy
    assert parse(json.loads(json.dumps({"gradient": str(policy)}))["gradient"]) == policy
    assert parse(tomllib.loads(f'gradient = "{policy}"')["gradient"]) == policy
    assert f"{policy:>60}" == str(policy).rjust(60)


@given(anything)
def test_every_policy_is_loaded_from_a_checkpoint(policy: Policy) -> None:
    assert loaded({"gradient": policy, "step": 3}) == {"gradient": policy, "step": 3}


def test_a_generator_is_saved_with_its_state_and_is_no_part_of_the_text() -> None:
    policy = Randomized(0.5, generator=torch.Generator().manual_seed(7))
    assert parse(str(policy)) == policy
    assert parse(str(policy)).generator is None
    again = loaded(policy)
    assert torch.equal(again.draw(20, 3), policy.draw(20, 3))


@pytest.mark.parametrize("memory", [Checkpoints(), Checkpoints(steps=3), Checkpoints(bytes=10**6)])
def test_checkpoints_are_loaded_from_a_checkpoint(memory: Checkpoints) -> None:
    assert loaded([memory, "states"]) == [memory, "states"]


def loaded(value: object) -> object:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_checkpoints_name_policies_by_their_room() -> None:
    """Not by the file of the room that has one today, since a saved name is for good."""
    assert {policy.__module__ for policy in SAVED} == {"bptt.policies"}
    assert pickle.loads(b"cbptt.policies\nChunked\n)\x81}X\x01\x00\x00\x00kK\x05sb.") == Chunked(5)


@pytest.mark.slow
def test_a_checkpoint_is_read_by_a_process_that_has_only_imported_the_package(tmp_path) -> None:
    torch.save({"gradient": Truncated(20, every=5), "memory": Checkpoints(steps=9)}, tmp_path / "state.pt")
    program = f"import torch, bptt; print(torch.load({str(tmp_path / 'state.pt')!r}, weights_only=True))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == repr({"gradient": Truncated(20, every=5), "memory": Checkpoints(steps=9)})


def test_parse_returns_a_policy_as_it_is() -> None:
    policy = Truncated(3)
    assert parse(policy) is policy


def test_every_is_one_unless_said() -> None:
    assert Truncated(4) == Truncated(4, every=1) == Truncated(4, 1)
    assert parse("truncated:4/1") == Truncated(4)
    assert Truncated(4) != Truncated(4, every=2)
    assert Chunked(4) != Truncated(4, every=4)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "full:3",
        "chunked",
        "chunked:",
        "chunked:2.5",
        "chunked:2/1",
        "truncated:",
        "truncated:4/",
        "truncated:/4",
        "truncated:4/2/1",
        "randomized:",
        "randomized:p",
        "randomized:0.5,",
        "randomized:tail=4",
        "chunked:0",
        "chunked:-1",
        "truncated:0",
        "truncated:-2",
        "truncated:4/0",
        "truncated:4/5",
        "randomized:0",
        "randomized:1.5",
        "randomized:-0.1",
        "randomized:0.5,0",
        "randomized:nan",
        "randomized:mean=1",
        "randomized:mean=20,tail=2",
        "adaptive",
        "adaptive:0.5",
        "adaptive:max=5",
        "adaptive:0.5,max=5.5",
        "adaptive:0.5,max=5,window=",
        "adaptive:0.5,max=9,window=3,every=2",
        "adaptive:0,max=5",
        "adaptive:1,max=5",
        "adaptive:0.5,max=0",
        "adaptive:0.5,max=5,every=6",
        "adaptive:0.5,max=5,window=6",
        "adaptive:0.5,max=5,every=3,window=2",
    ],
)
def test_bad_text(text: str) -> None:
    with pytest.raises(ValueError, match=r"got"):
        parse(text)


@pytest.mark.parametrize("value", [None, 3, 0.9, ("full",), Full])
def test_parse_of_what_is_neither(value: object) -> None:
    with pytest.raises(TypeError, match="gradient must be"):
        parse(value)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Chunked(0), "k"),
        (lambda: Chunked(-3), "k"),
        (lambda: Truncated(0), "window"),
        (lambda: Truncated(-1), "window"),
        (lambda: Truncated(4, every=0), "every"),
        (lambda: Truncated(4, every=-1), "every"),
        (lambda: Truncated(4, every=5), "every"),
        (lambda: Randomized(0), "p"),
        (lambda: Randomized(0.0), "p"),
        (lambda: Randomized(-0.5), "p"),
        (lambda: Randomized(1.0001), "p"),
        (lambda: Randomized(float("nan")), "p"),
        (lambda: Randomized((0.5, 0.0)), "p"),
        (lambda: Randomized((0.5, 1.5)), "p"),
        (lambda: Randomized(()), "p"),
        (lambda: Randomized.polynomial(mean=1.0), "mean"),
        (lambda: Randomized.polynomial(mean=float("inf")), "mean"),
        (lambda: Randomized.polynomial(mean=20, tail=2.0), "tail"),
        (lambda: PolynomialTail(0.5), "mean"),
        (lambda: Adaptive(0.0, 5), "max_bias"),
        (lambda: Adaptive(1.0, 5), "max_bias"),
        (lambda: Adaptive(float("nan"), 5), "max_bias"),
        (lambda: Adaptive(0.5, 0), "max_window"),
        (lambda: Adaptive(0.5, 5, every=0), "every"),
        (lambda: Adaptive(0.5, 5, every=6), "every"),
        (lambda: Adaptive(0.5, 5, window=0), "window"),
        (lambda: Adaptive(0.5, 5, window=6), "window"),
        (lambda: Adaptive(0.5, 5, every=3, window=2), "window"),
    ],
)
def test_bad_value_names_argument(make: Callable[[], Policy], name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must.*(got|lie)"):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Chunked(2.0),
        lambda: Chunked(True),
        lambda: Truncated("3"),
        lambda: Truncated(4, every=1.5),
        lambda: Randomized("0.5"),
        lambda: Randomized(None),
        lambda: Randomized(True),
        lambda: Adaptive("0.5", 5),
        lambda: Adaptive(0.5, 5.0),
        lambda: Adaptive(0.5, 5, window=2.5),
    ],
)
def test_bad_type(make: Callable[[], Policy]) -> None:
    with pytest.raises(TypeError, match="must be"):
        make()


def test_policies_are_frozen_and_hashable() -> None:
    for policy in FORMS.values():
        assert len({policy, parse(str(policy))}) == 1
        with pytest.raises(FrozenInstanceError):
            policy.window = 3


BLOCKS = {
    "full": [(0, 0, 6)],
    "chunked:3": [(0, 0, 2), (3, 3, 5), (6, 6, 6)],
    "chunked:1": [(t, t, t) for t in range(7)],
    "chunked:7": [(0, 0, 6)],
    "chunked:8": [(0, 0, 6)],
    "truncated:1": [(t, t, t) for t in range(7)],
    "truncated:3": [(0, 0, 0), (0, 1, 1), (0, 2, 2), (1, 3, 3), (2, 4, 4), (3, 5, 5), (4, 6, 6)],
    "truncated:3/2": [(0, 0, 1), (1, 2, 3), (3, 4, 5), (4, 6, 6)],
    "truncated:3/3": [(0, 0, 2), (3, 3, 5), (4, 6, 6)],
    "truncated:5/4": [(0, 0, 3), (2, 4, 6)],
    "randomized:0.5": [(0, 0, 6)],
    "adaptive:0.5,max=3": [(0, 0, 0), (0, 1, 1), (0, 2, 2), (1, 3, 3), (2, 4, 4), (3, 5, 5), (4, 6, 6)],
    "adaptive:0.5,max=7,every=2,window=3": [(0, 0, 1), (1, 2, 3), (3, 4, 5), (4, 6, 6)],
    "adaptive:0.5,max=7": [(0, 0, 6)],
}


@pytest.mark.parametrize("text", BLOCKS)
def test_blocks_as_literals(text: str) -> None:
    assert parse(text).reach(7).blocks(7) == BLOCKS[text]


def test_an_adaptive_policy_is_a_truncated_one() -> None:
    for window in (None, 4, 9):
        policy = Adaptive(0.5, 9, every=2, window=window)
        for T in (3, 9, 20):
            assert policy.reach(T) == Truncated(window or 9, every=2).reach(T)
        assert policy.draw(20, 3) is None
    assert Adaptive(0.5, 9, window=9) != Adaptive(0.5, 9)


def test_numbers_of_other_libraries() -> None:
    assert str(Adaptive(np.float64(0.5), np.int64(9), window=np.int32(3))) == "adaptive:0.5,max=9,window=3"
    assert Truncated(np.int64(6), every=np.int32(3)) == Truncated(6, every=3)
    assert str(Chunked(np.int64(6))) == "chunked:6"
    assert str(Randomized(np.float64(0.5))) == "randomized:0.5"
    assert str(Randomized(1)) == "randomized:1.0"


@pytest.mark.parametrize("make", [lambda: Randomized(["a"]), lambda: Randomized("0.5"), lambda: Randomized(True)])
def test_probability_that_is_no_number(make: Callable[[], Policy]) -> None:
    with pytest.raises(TypeError, match="p must be a number"):
        make()


def test_generator_of_another_kind() -> None:
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator or None: got int"):
        Randomized(0.9, generator=5)
    with pytest.raises(TypeError, match="mean must be a number"):
        Randomized.polynomial("20")
