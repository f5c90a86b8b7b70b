"""What stands beside the package for whoever contributes or cites: each fact agrees with its home."""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import bptt

ROOT = Path(__file__).parent.parent
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def lint() -> list[str]:
    """The commands of `make lint`, those of the targets it needs before its own."""
    rule = re.search(r"^lint: setup (.*?)\s+##.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert rule is not None
    own = [line.strip().replace("$(BIN)", ".venv/bin") for line in rule[2].splitlines()]
    return [*(f"make {target}" for target in rule[1].split()), *own]


def test_pre_commit_runs_what_make_lint_runs() -> None:
    [repo] = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repo["repo"] == "local"
    commands = []
    for hook in repo["hooks"]:
        assert (hook["language"], hook["pass_filenames"], hook["always_run"]) == ("system", False, True), hook
        words = shlex.split(hook["entry"])
        commands.append(words[2] if words[:2] == ["sh", "-c"] else hook["entry"])  # a shell, for its *
    assert commands == lint()


def test_the_citation_is_of_this_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = read(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)  # those that the format requires
    assert citation["authors"]
    assert citation["version"] == project["version"] == bptt.__version__
    assert citation["license"] == project["license"]
    assert citation["abstract"] == project["description"]
    assert citation["keywords"] == project["keywords"]


@pytest.mark.parametrize("form", [form for form in FORMS if form.stem != "config"], ids=lambda form: form.stem)
def test_an_issue_form_has_what_github_requires(form: Path) -> None:
    asked = read(form)
    assert {"name", "description", "body"} <= set(asked)
    names = [part["id"] for part in asked["body"]]
    assert len(names) == len(set(names))
    for part in asked["body"]:
        assert part["type"] in ("checkboxes", "dropdown", "input", "textarea")
        assert part["attributes"]["label"]
    assert any(part.get("validations", {}).get("required") for part in asked["body"])
