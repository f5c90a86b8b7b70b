"""Everything that measurements say can be said in Chinese: the table lacks nothing, and nothing in it is dead."""

import ast
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from string import Formatter
from typing import get_args

import measurements as made
import pytest
import torch

import bptt
from bptt.flow import Setting, conclusion, language, verdict
from bptt.flow._doctor_findings import Stage
from bptt.flow._verdict import TOPICS
from bptt.flow.language import LANGUAGES, current, say, translation
from bptt.plots import style

SOURCE = Path(bptt.__file__).parent
NAMES = re.compile(
    r"bptt[\w.]*(\([\w, ]*\))?|gradient|truncated|randomized|chunked|full|mean|tail|orthogonal_|torch|layer|carry|step"
    r"|float64|LSTM|GRU|RNN|MiB|NaN|nan|W_hh|dL|dW_hh|J_t|clip"
)
"""What stays as it is: names of the package, of policies, of layers, and symbols."""


def templates_in(path: Path) -> Iterator[str]:
    """Every template that a file gives to `say`: literal, chosen between two, or held by a name of the file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if "language import" not in path.read_text(encoding="utf-8") and path.name != "language.py":
        return
    held: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    held.setdefault(target.id, set()).update(strings(node.value))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "say" and node.args:
            yield from strings(node.args[0])
            for name in ast.walk(node.args[0]):
                if isinstance(name, ast.Name):
                    yield from held.get(name.id, ())


def strings(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return {node.value}
    return strings(node.body) | strings(node.orelse) if isinstance(node, ast.IfExp) else set()


def spoken() -> set[str]:
    """Every template that the package says."""
    from bptt.flow.conclusions import NOTHING
    from bptt.report._write import COLUMNS, SECTIONS

    found = {text for path in SOURCE.rglob("*.py") for text in templates_in(path)}
    found |= {*get_args(Stage), *TOPICS.values(), *Setting.__dataclass_fields__, NOTHING, *COLUMNS}
    found |= {text for heading, explanation, _ in SECTIONS.values() for text in (heading, explanation)}
    return found - {""}


def fields_of(template: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(template) if name is not None}


@pytest.mark.parametrize("code", [code for code in LANGUAGES if code != "en"])
def test_the_table_has_every_template_with_its_fields_and_no_other(code):
    table, templates = translation(code), spoken()
    assert len(templates) > 300
    assert sorted(templates - set(table)) == [], "not translated"
    assert sorted(set(table) - templates) == [], "said nowhere"
    assert {text: fields_of(table[text]) for text in table} == {text: fields_of(text) for text in table}
    pairs = (SOURCE / "flow" / f"{code}.json").read_text(encoding="utf-8")
    assert len(json.loads(pairs, object_pairs_hook=list)) == len(table), "a template stands there twice"


MEASURES = {
    "lags": made.lags(0.8),
    "explosion": made.lags(1.1),
    "two layers": made.lags(0.9, 0.5),
    "map": made.lag_map(0.8),
    "shares": made.shares(0.8),
    "Jacobians": made.jacobians(0.5),
    "products": made.products(0.9),
    "spectrum": made.spectrum(0.5),
    "cell path": made.cell_path(0.97),
}


@pytest.mark.parametrize("name", MEASURES)
def test_no_english_is_left(name):
    with language("zh"):
        said = f"{conclusion(MEASURES[name])}\n{verdict(MEASURES[name])}"
    assert re.findall(r"[A-Za-z]{3,}", NAMES.sub("", said)) == []
    assert re.search("[一-鿿]", said)


def test_a_finding_is_in_the_language_in_which_it_is_found():
    w = torch.tensor(1.0, requires_grad=True)
    xs = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    looped = bptt.flow.scanned(lambda h, x: ((w * h - x).sqrt(), h), torch.full((2,), 4.0), xs, lambda h, ys: h.sum())
    with language("zh"):
        found = bptt.flow.diagnose(looped)
    assert found is not None
    said = found.findings[0].message
    assert said.startswith("伴随：")
    assert "第 1 步，第 1 道" in said
    assert re.findall(r"[A-Za-z]{3,}", NAMES.sub("", re.sub(r"`[^`]*`", "", said))) == []
    assert bptt.flow.diagnose(looped) != found


def test_a_language_ends_with_its_block_and_belongs_to_its_thread():
    there = []
    with language("zh"):
        other = threading.Thread(target=lambda: there.append(current()))
        other.start()
        other.join()
        with language("en"):
            assert say("{count} steps", count=2) == "2 steps"
        assert say("{count} steps", count=2) == "2 步"
    assert (current(), there) == ("en", ["en"])


def test_an_unknown_language_is_named():
    with pytest.raises(ValueError, match="code must be one of 'en', 'zh': got 'fr'"), language("fr"):
        pass


@pytest.mark.filterwarnings("ignore:Glyph")
def test_pictures_are_english_without_a_font_and_chinese_with_one(monkeypatch):
    monkeypatch.setattr(style, "font_of", lambda code: None)
    with language("zh"):
        assert "steps back" in bptt.plots.decay(made.lags(0.8)).axes[0].get_xlabel()
    monkeypatch.setattr(style, "font_of", lambda code: "some font" if code == "zh" else None)
    with language("zh"):
        axes = bptt.plots.decay(made.lags(0.8)).axes[0]
    assert "滞后" in axes.get_xlabel()
    assert axes.xaxis.label.get_fontfamily()[-1] == "some font"


def test_chinese_titles_break_between_letters_but_not_before_a_mark(monkeypatch):
    monkeypatch.setattr(
        style.text_to_path, "get_text_width_height_descent", lambda text, *a, **k: (12 * len(text), 0, 0)
    )
    lines = style._wrapped("梯度消失：每步只保留 50 %；产生 90 % 的范围为 3 步（测量范围 60 步），" * 3, 3.0).split(
        "\n"
    )
    assert len(lines) > 3
    assert not any(line.startswith(tuple("，；：）。")) for line in lines)
