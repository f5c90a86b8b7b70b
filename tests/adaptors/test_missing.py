"""Each adaptor is loaded by its name alone, and names its extra where the framework is missing."""

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from bptt.adaptors.missing import missing

ROOT = Path(__file__).parent.parent.parent
SHARED = {"__init__", "missing", "pieces", "policy", "doctor"}
ADAPTORS = sorted({path.stem for path in (ROOT / "src/bptt/adaptors").glob("*.py")} - SHARED)


@pytest.mark.parametrize("name", ADAPTORS)
def test_a_missing_framework_is_named_with_its_extra(name, monkeypatch):
    for module in [m for m in sys.modules if m.split(".")[0] in {name, f"pytorch_{name}", "stable_baselines3"}]:
        monkeypatch.delitem(sys.modules, module)
    for absent in (name, f"pytorch_{name}"):
        monkeypatch.setitem(sys.modules, absent, None)
    monkeypatch.delitem(sys.modules, f"bptt.adaptors.{name}", raising=False)
    extra = name.replace("_", "-")
    with pytest.raises(ImportError, match=rf"bptt.adaptors.{name} needs \w+: pip install 'bptt\[{extra}\]'"):
        importlib.import_module(f"bptt.adaptors.{name}")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert extra in extras


def test_what_else_is_missing_is_another_error():
    error = ModuleNotFoundError(name="einops")
    assert missing("lightning", ("lightning",), error) is error


def test_the_room_itself_needs_nothing():
    code = "import sys, bptt.adaptors; assert not any(m.startswith('bptt.adaptors.') for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
