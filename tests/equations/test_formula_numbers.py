"""Formula numbers cited in code are derived in README.md, once, and cited; the names README.md points to exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import bptt.equations

FOLDER = Path(bptt.equations.__file__).parent
NUMBER = re.compile(r"\(([1-9]\.\d+)\)")
RANGE = re.compile(r"\(([1-9])\.(\d+)\) to \(\1\.(\d+)\)")


def derived() -> list[str]:
    return re.findall(r"\\tag\{([1-9]\.\d+)\}", (FOLDER / "README.md").read_text(encoding="utf-8"))


def cited() -> set[str]:
    numbers: set[str] = set()
    for file in FOLDER.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        numbers |= set(NUMBER.findall(text))
        for chapter, low, high in RANGE.findall(text):
            numbers |= {f"{chapter}.{n}" for n in range(int(low), int(high) + 1)}
    return numbers


def test_numbers_run_without_gaps() -> None:
    numbers = derived()
    chapters = re.findall(r"^## (\d+)\. ", (FOLDER / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {n.split(".")[0] for n in numbers} == set(chapters)
    for chapter in chapters:
        own = [int(n.split(".")[1]) for n in numbers if n.startswith(f"{chapter}.")]
        assert own == list(range(1, len(own) + 1)), f"chapter {chapter}"


def test_every_number_in_code_is_derived_and_every_derivation_is_code() -> None:
    assert cited() == set(derived())


def test_every_number_the_text_mentions_exists() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert set(NUMBER.findall(text)) <= set(derived())


def test_every_test_the_readme_names_exists() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+)\.py::(test_\w+)`", text)
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (Path(__file__).parent / f"{file}.py").read_text(encoding="utf-8"), (file, test)


def test_every_name_of_code_the_readme_names_exists() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    modules = {file.stem for file in FOLDER.glob("*.py")}
    named = [n for n in re.findall(r"`(\w+(?:\.\w+)+)`", text) if n.split(".")[0] in modules and not n.endswith(".py")]
    assert len(named) > 20
    for name in named:
        module, *path = name.split(".")
        found = importlib.import_module(f"bptt.equations.{module}")
        for part in path:
            found = getattr(found, part)
