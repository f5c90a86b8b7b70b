"""Lightning and accelerate in two processes on the CPU, against one that has the lanes of both."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

SCRIPT = str(Path(__file__).with_name("two_processes.py"))


def run(*command: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("framework", "setting", "launcher"),
    [
        ("lightning", "piece", ()),
        ("lightning", "batch", ()),
        # accelerate's own launcher has several processes without a GPU by MPI alone.
        ("accelerate", "chunked:4", ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")),
    ],
)  # fmt: skip
def test_two_processes_are_one(framework: str, setting: str, launcher: tuple[str, ...], tmp_path: Path) -> None:
    if find_spec(framework) is None:
        pytest.skip(f"needs the extra {framework}")
    run(*launcher, SCRIPT, framework, setting, "3", str(tmp_path / "two.pt"))
    run(SCRIPT, framework, setting, "6", str(tmp_path / "one.pt"))
    two, one = (torch.load(tmp_path / name, weights_only=True) for name in ("two.pt", "one.pt"))
    torch.testing.assert_close(two, one, rtol=1e-10, atol=1e-12)
