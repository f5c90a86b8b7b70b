"""What stands beside the package for whoever contributes or cites: each fact agrees with its home."""

import re
import shlex
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import bptt

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
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
    project = PYPROJECT["project"]
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


def test_a_release_is_tried_with_every_python_that_the_package_names() -> None:
    jobs = read(ROOT / ".github" / "workflows" / "release.yml")["jobs"]
    named = [name.rpartition(" ")[2] for name in PYPROJECT["project"]["classifiers"] if ":: Python ::" in name]
    assert named == jobs["try"]["strategy"]["matrix"]["python"]
    assert PYPROJECT["project"]["requires-python"] == f">={named[0]}"

    wheels = PYPROJECT["tool"]["cibuildwheel"]
    oldest = "cp" + named[0].replace(".", "")  # the wheel of its stable ABI serves those after it
    assert wheels["build"] == f"{oldest}-*"
    assert wheels["config-settings"] == {"wheel.py-api": oldest}

    assert jobs["try"]["strategy"]["matrix"]["runner"] == jobs["wheel"]["strategy"]["matrix"]["runner"]
    assert jobs["try"]["needs"] == "wheel"
    assert set(jobs["publish"]["needs"]) == {"sdist", "try"}
    assert jobs["publish"]["permissions"] == {"id-token": "write"}


def test_ci_runs_the_script() -> None:
    [job] = read(ROOT / ".github" / "workflows" / "ci.yml")["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]


def test_the_groups_and_the_lock_are_those_of_the_package() -> None:
    project, tool = PYPROJECT["project"], PYPROJECT["tool"]
    for group, lines in PYPROJECT["dependency-groups"].items():
        assert lines == [f"bptt[{group}]"]
        assert group in project["optional-dependencies"]

    pinned = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    assert tool["uv"]["constraint-dependencies"] == pinned

    # `uv lock` writes it anew.
    lock = tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))
    [ours] = [package for package in lock["package"] if package["name"] == "bptt"]
    locked = {one["name"] + one.get("specifier", "") for one in ours["metadata"]["requires-dist"]} - {"bptt"}
    asked = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {re.sub(r"\[.*\]|[\s;].*", "", one) for lines in asked for one in lines}  # without extras and conditions
    assert locked == names - {"bptt"}


def test_the_readme_of_pypi_needs_no_file_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "cmake"))
    alone = __import__("pypi_readme").alone
    sys.modules.pop("pypi_readme")

    text = "A [page](docs/a.md#b), [`code`](c.py), [far](https://d.org), [here](#e), `[x](y)`.\n![P](p.png)\nEnd.\n"
    assert alone(text, None) == "A page, `code`, [far](https://d.org), [here](#e), `[x](y)`.\nEnd.\n"
    there = alone(text, "https://host/us/it")
    assert "[page](https://host/us/it/blob/HEAD/docs/a.md#b), [`code`](https://host/us/it/blob/HEAD/c.py)" in there
    assert "![P](https://host/us/it/raw/HEAD/p.png)" in there

    whole = alone((ROOT / "README.md").read_text(encoding="utf-8"), None)
    assert re.findall(r"\]\((?!https?:|#)[\w./#-]+\)", whole) == []
