"""`bptt train --tensorboard`: what TensorBoard reads back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train.tiny import write_text

from .command import bptt

pytestmark = pytest.mark.slow


def read(run: Path) -> EventAccumulator:
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    return events


def test_curves_and_maps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, text = tmp_path / "run", write_text(tmp_path)
    options = ("--cell", "gru", "--hidden", 8, "--layers", 2, "--batch", 4, "--seq-length", 10, "--threads", 1)
    often = ("--log-every", 2, "--eval-every", 4, "--steps", 8)
    result = bptt(capsys, "train", "--text", text, "--out", run, *options, *often, "--tensorboard")
    assert result.status == 0, result.err
    events = read(run)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for tag, name in (("loss/training", "loss"), ("gradient/norm", "grad_norm"), ("gradient/horizon", "horizon")):
        expected = [(r["step"], r[name]) for r in records if r[name] is not None]
        assert [(e.step, e.value) for e in events.Scalars(tag)] == [(s, pytest.approx(v)) for s, v in expected]
    for layer in ("layer 0", "layer 1"):
        images = events.Images(f"lag map/{layer}")
        assert [image.step for image in images] == [4, 8]
        assert images[0].width > 400
        assert images[0].encoded_image_string.startswith(b"\x89PNG")

    assert bptt(capsys, "train", "--resume", run, "--steps", 12, "--tensorboard").status == 0
    assert [e.step for e in read(run).Scalars("loss/training")] == [2, 4, 6, 8, 10, 12]
    without = bptt(capsys, "train", "--text", text, "--out", tmp_path / "plain", *options, *often)
    assert without.status == 0
    assert not (tmp_path / "plain" / "tensorboard").exists()
