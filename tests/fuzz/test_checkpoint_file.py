"""A checkpoint cut short or altered anywhere is known as damaged; nothing else ever comes out of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bptt.train import InputError, checkpoints
from bptt.train.errors import DamagedError

pytestmark = pytest.mark.slow

STATE: dict[str, Any] = {
    "model": {"w": torch.arange(6.0).reshape(2, 3)},
    "position": {"step": 3},
    "carry": (torch.ones(1, 2, 2), torch.zeros(1, 2, 2)),
    "nothing": None,
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save(tmp_path_factory.mktemp("whole"), STATE, keep=1)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("altered") / "step-00000003.ckpt"


def test_the_whole_file_is_read(file: Path):
    torch.testing.assert_close(checkpoints.read(file)["model"], STATE["model"], rtol=0, atol=0)


def test_every_byte_of_the_first_line_counts(file: Path, other: Path):
    data = file.read_bytes()
    for i in range(checkpoints.LINE_BYTES):
        for bit in (1, 32, 128):
            other.write_bytes(data[:i] + bytes([data[i] ^ bit]) + data[i + 1 :])
            with pytest.raises(DamagedError, match="is damaged"):
                checkpoints.read(other)


@given(st.data())
def test_altered_anywhere(file: Path, other: Path, data: st.DataObject):
    """Bytes replaced, put in, or left out, once or several times."""
    whole = content = file.read_bytes()
    for _ in range(data.draw(st.integers(1, 3))):
        first = data.draw(st.integers(0, len(content)))
        last = data.draw(st.integers(first, min(len(content), first + 40)) | st.just(len(content)))
        content = content[:first] + data.draw(st.binary(max_size=20)) + content[last:]
    other.write_bytes(content)
    if content == whole:
        assert checkpoints.read(other)["position"] == STATE["position"]
    else:
        with pytest.raises(DamagedError, match="is damaged"):
            checkpoints.read(other)


@given(st.binary(max_size=300) | st.binary(max_size=300).map(b"bptt checkpoint 00000002 sha256 ".__add__))
def test_anything_for_a_file(other: Path, content: bytes):
    other.write_bytes(content)
    with pytest.raises(DamagedError, match="is damaged"):
        checkpoints.read(other)


@given(st.data())
def test_a_state_of_version_0_1_altered_anywhere(other: Path, data: st.DataObject):
    """It has no checksum: what comes out is a state of format 1, or an error of ours."""
    torch.save({"format": 1, **STATE}, other)
    content = bytearray(other.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    other.write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    try:
        state = checkpoints.read_plain(other)
    except InputError:
        return
    assert state["format"] <= 1
