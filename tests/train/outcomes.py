"""Runs to compare, and what two must have in common to be the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bptt.train import Config, RunDirectory, fit, resume, start
from bptt.train.distributed import begin
from bptt.train.processes import Processes


def run_to(processes: Processes, path: Path, config: Config | None, steps: int) -> dict[str, Any]:
    """A run, new or gone on with, for some steps more, through its directory; the first process's checkpoint."""
    trainer, run = begin(
        processes, lambda: resume(path, steps=steps) if config is None else start(config.override(steps=steps), path)
    )
    assert fit(trainer, run) is None
    state = trainer.state()
    return {name: state[name] for name in ("model", "carry", "generator", "other_processes") if name in state}


def outcome(path: Path) -> dict[str, Any]:
    """Everything a run leaves but its times: weights, metrics, findings, and all of its last checkpoint."""
    run = RunDirectory.open(path)
    state = run.state()
    for meter in ("meter", "epoch_meter"):
        state[meter] = {name: value for name, value in state[meter].items() if name != "seconds"}
    state.pop("generators")  # Python's and NumPy's own: training draws nothing from them
    metrics = [{name: value for name, value in r.items() if name != "tokens_per_second"} for r in run.metrics()]
    return {"weights": run.weights(), "metrics": metrics, "findings": run.findings(), "state": state}


def assert_same(actual: dict[str, Any], expected: dict[str, Any], where: str = "") -> None:
    """Bit for bit."""
    assert actual["metrics"] == expected["metrics"], where
    assert actual["findings"] == expected["findings"], where
    _same(actual["weights"], expected["weights"], f"{where} weights")
    _same(actual["state"], expected["state"], f"{where} state")


def _same(actual: Any, expected: Any, where: str) -> None:
    if isinstance(expected, dict):
        assert list(actual) == list(expected), where
        for name in expected:
            _same(actual[name], expected[name], f"{where}.{name}")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), where
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            _same(a, e, f"{where}[{i}]")
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{where}: {m}")
    else:
        assert actual == expected, where
