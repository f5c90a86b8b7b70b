"""The documentation: its code runs, its formulas can be set, its links lead somewhere, and nothing is left out."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import bptt
from bptt.nn import LAYERS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
PICTURES = re.compile(r"\]\((?:\.\./)?pictures/([^)]+)\)")


@pytest.fixture
def snippets(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return in_docs("snippets", monkeypatch)


@pytest.fixture
def formulas(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return in_docs("formulas", monkeypatch)


def in_docs(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module that the site is built with."""
    monkeypatch.syspath_prepend(str(DOCS))
    return __import__(name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_runs_and_makes_the_pictures_that_the_page_shows(page: Path, snippets: ModuleType, tmp_path: Path) -> None:
    snippets.run(page, tmp_path)
    made = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert made == set(PICTURES.findall(page.read_text(encoding="utf-8")))


def test_a_block_that_is_not_run_says_so(snippets: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text('```python title="not run"\nimport nowhere\n```\n\n```python\nx = 1\nassert x == 2, x\n```\n')
    assert [block["code"] for block in snippets.blocks(page)] == ["x = 1\nassert x == 2, x\n"]
    with pytest.raises(AssertionError) as caught:
        snippets.run(page, tmp_path)
    assert caught.traceback[-1].lineno == 6  # counted from 0: the line of the page
    page.write_text('```python title="x"\n```\n')
    with pytest.raises(ValueError, match="a block of python may say"):
        snippets.blocks(page)


def test_every_formula_has_its_number_once_and_is_set_without_a_rest_of_latex(formulas: ModuleType) -> None:
    text = formulas.HOME.read_text(encoding="utf-8")
    tags = re.findall(r"\\tag\{([\d.]+)\}", text)
    assert len(tags) == len(set(tags))
    assert set(formulas.numbered()) == set(tags)
    for number, latex in formulas.numbered().items():
        page = formulas.set_formulas(f'<div class="arithmatex">\\[{latex}\\]</div>', anchors=True)
        assert f'id="{formulas.anchor(number)}"' in page
        assert "<math" in page
        assert "\\" not in page, number


NAMED = {
    "a recurrence given as any f and g": "## Any f and g",
    "the recursion and the sum of products": "chain.by_recursion(b, J), chain.by_expansion(b, J)",
    "full, truncated, randomized": "bptt.Full(), bptt.Chunked(4), bptt.Truncated(4), bptt.Randomized(0.7)",
    "unbiased exactly": "randomized.expectation",
    "the three strategies compared, and the picture": "pictures/reach.png",
    "carried and detached state": "state = tuple(s.detach() for s in state)",
    "sequential partition, random sampling": "`--batching sequential`",
    "the linear RNN, steps 1 to 4": "## The linear RNN in closed form",
    "powers of W_hh'": "torch.linalg.matrix_power(W, j - t)",
    "the stored adjoints": "grads.adjoints",
    "the drawing of the graph": "pictures/graph.png",
    "powers turn any vector": "pictures/turning.gif",
    "the network with index input": "{{ equations 3.11 3.12 3.13 }}",
    "scan over any step": "bptt.scan(step",
    "the two-loop code": "two_loops(net, words, targets, start, bptt_truncate)",
    "12926834988414": "12926834988414",
    "several layers, both directions": "num_layers=2, bidirectional=True",
    "shared factors once, and the update": "(products, products_anew) == (9, 45)",
    "pairs of a loss step and an earlier one": "{{ equations 1.11 1.12 }}",
    "short-range terms steer": "## Short-range terms hide it",
    "the cell path beside the full Jacobian": "pictures/cell_path.png",
    "every delta": "{{ equations 5.16 5.17 5.18 5.19 }}",
    "weights p x (m + n)": "p × (m + n)",
    "forget bias and chrono": "bptt.nn.init.chrono_",
    "fill in the blank": "John",
    "Jacobian products against the bound": "product.bound",
    "the recursion in colours": "\\textcolor{#D55E00}{\\frac{d h_t}{d w}}",
    "how frameworks do it": "## A recipe for each operation, and a record of them",
    "truncation as regularisation, measured": "<!-- regularisation -->",
    "NaN and silence": "## Exploding is loud, vanishing is silent",
}
"""What the notes that the project began with describe, by words of the pages."""


@pytest.mark.parametrize("subject", NAMED)
def test_what_the_notes_describe_is_named(subject: str) -> None:
    assert any(NAMED[subject] in page.read_text(encoding="utf-8") for page in PAGES)


SLIPS = [
    "in *magnitude*", "singular values do", "tuple `(h, c)`", "$z_t = b_t + \\xi_t J_t z_{t-1}$", "*above* 0",
    "the later factor stands on the left", "means the identity", "alone there", "yes, it is dropped", "ends in $x_n$",
    "`bptt_truncate + 1` steps", "*last row*", "take the *mean*", "from $t = 1$ to $T$", "tanh is at most **1**",
    "sigmoid at most **1/4**", "radius is meant", "\\sigma(W_f x_j + b_f)", "by both", "the step's own loss alone",
    "over $t$, the step of the loss", "at $k = t$, not at $T$", "*pre-activation*", "range is `inf`",
]  # fmt: skip
"""A few words of every correction in the table of slips in the equations' README."""


def test_every_slip_of_the_notes_has_its_box() -> None:
    text = "".join(page.read_text(encoding="utf-8") + "\n" for page in PAGES)
    found = re.findall(r'^!!! warning "(?:A c|C)ommon slip.*\n(?:    .*\n|\n(?=    ))+', text, re.MULTILINE)
    boxes = " ".join(" ".join(found).split())
    assert [words for words in SLIPS if words not in boxes] == []


def rows(page: str) -> list[list[str]]:
    """The cells of a page's tables, without their heads."""
    lines = [line for line in (DOCS / page).read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]


def test_the_chinese_slips_are_those_of_the_equations(formulas: ModuleType) -> None:
    """One for one, by the numbers of their formulas."""
    table = re.findall(r"^\| 00\d.*$", formulas.HOME.read_text(encoding="utf-8"), re.MULTILINE)
    number = re.compile(r"\((\d\.\d+)\)")
    english = sorted(sorted(number.findall(row)) for row in table)
    chinese = rows("zh/slips.md")
    assert len(chinese) == len(table)
    assert sorted(sorted(number.findall(row[3])) for row in chinese) == english


def test_every_chinese_page_has_the_slips_of_its_subject() -> None:
    boxes = sum(page.read_text(encoding="utf-8").count('!!! warning "常见笔误') for page in (DOCS / "zh").glob("*.md"))
    assert boxes >= 16


def test_the_glossary_tells_clipping_from_truncation() -> None:
    terms = rows("zh/glossary.md")
    assert len(terms) >= 60
    chinese, english, meanings = zip(*terms, strict=True)
    assert len(set(chinese)) == len(set(english)) == len(set(meanings)) == len(terms)
    found = dict(zip(chinese, english, strict=True))
    assert (found["梯度裁剪"], found["梯度截断"]) == ("gradient clipping", "gradient truncation")


D2L = ["ht_ot", "partial_L_wh", "partial_ht_wh_recur", "at", "partial_ht_wh_gen"]
D2L += ["partial_L_ot", "partial_L_hT_final_step", "partial_L_ht_recur", "partial_L_ht"]


def test_the_chinese_pages_name_the_equations_of_d2l() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "zh").glob("*.md"))
    assert [name for name in D2L if f"`eq_bptt_{name}`" not in text] == []


def test_the_reference_has_every_layer_and_public_name() -> None:
    def members(page: str) -> list[set[str]]:
        lists = re.findall(r"members: \[(.*)\]", (DOCS / "reference" / page).read_text(encoding="utf-8"))
        return [set(names.split(", ")) for names in lists]

    [package] = members("bptt.md")
    layers, cells = members("nn.md")
    assert package | {"flow", "nn"} == set(bptt.__all__)
    assert {layer.__name__ for layer in LAYERS.values()} <= layers
    assert cells == set(bptt.nn.cells.__all__)


def test_the_site_builds_strictly_and_fetches_nothing(tmp_path: Path) -> None:
    """Links, anchors, the reference, what stands in braces: with stand-ins for the pictures, which others test."""
    pictures, site = tmp_path / "pictures", tmp_path / "site"
    pictures.mkdir()
    for page in PAGES:
        for name in PICTURES.findall(page.read_text(encoding="utf-8")):
            (pictures / name).touch()
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(site)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "BPTT_DOCS_PICTURES": str(pictures)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    pages = {page: page.read_text(encoding="utf-8") for page in site.rglob("*.html")}
    assert len(pages) > len(PAGES)
    gallery = set(re.findall(r'src="?pictures/([^" >]+)', pages[site / "gallery.html"]))
    own = [page.read_text(encoding="utf-8") for page in PAGES if page.parent.name != "zh"]
    assert gallery == {name for text in own for name in PICTURES.findall(text)}
    listed = re.findall(r"^- \[.+\]\(([^)]+)\)", (site / "llms.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(page.relative_to(site).as_posix() for page in pages if page.name != "404.html")
    for page, text in pages.items():
        assert "{{ " not in text, page
        assert "arithmatex" not in text, page
        assert re.findall(r"""<(?:script|img|iframe)[^>]*src=["']?(?:https?:)?//[^>]+>""", text) == [], page
        assert re.findall(r"""<link[^>]*rel=["']?stylesheet[^>]*href=["']?(?:https?:)?//[^>]+>""", text) == [], page
