"""The README's generated parts are up to date, and its examples run."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bptt

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_generated_parts_are_up_to_date():
    check = subprocess.run(
        [sys.executable, ROOT / "docs" / "readme.py", "--check"], capture_output=True, text=True, check=False
    )
    assert check.returncode == 0, check.stderr


def test_example_runs_and_gives_the_derivative_it_claims(tmp_path, capsys):
    own, example, carried, seen = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    cell = tmp_path / "cell.py"
    cell.write_text(own, encoding="utf-8")
    defined = runpy.run_path(str(cell))
    assert defined["y"].shape == (100, 8, 128)
    assert bptt.explain(defined["layer"], torch.randn(100, 8, 64)).kernel == "interpreter"

    script = tmp_path / "example.py"
    script.write_text(example, encoding="utf-8")
    names = runpy.run_path(str(script))
    assert capsys.readouterr().out.splitlines()[-1] == "12926834988414.0"

    names["windows"] = [(names["x"], torch.zeros(100, 8, 32)) for _ in range(3)]
    exec(carried, {**names, "loss": torch.nn.functional.mse_loss})

    exec(seen, names)
    out = capsys.readouterr().out.splitlines()
    assert "its gradient fades" in out[0]
    assert out[-1] == "None"
