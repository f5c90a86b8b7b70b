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


READMES = ["README.md", "README_zh.md"]


@pytest.mark.parametrize("readme", READMES)
def test_examples_run(readme, tmp_path, capsys):
    layer, own = re.findall(r"```python\n(.*?)```", (ROOT / readme).read_text(encoding="utf-8"), re.DOTALL)
    for name, code in (("layer", layer), ("own", own)):
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
    torch.manual_seed(0)
    runpy.run_path(str(tmp_path / "layer.py"))
    assert "its gradient fades" in capsys.readouterr().out.splitlines()[0]

    defined = runpy.run_path(str(tmp_path / "own.py"))
    assert defined["y"].shape == (100, 8, 128)
    assert bptt.explain(defined["layer"], torch.randn(100, 8, 64)).kernel == "interpreter"


@pytest.mark.parametrize("readme", READMES)
def test_the_readme_is_short_enough_to_be_read(readme):
    lines = (ROOT / readme).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150


@pytest.mark.parametrize("readme", READMES)
def test_its_links_lead_somewhere(readme):
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", (ROOT / readme).read_text(encoding="utf-8"))
    assert len(links) > 5
    assert [link for link in links if not (ROOT / link).exists()] == []
