"""The numbered formulas: read from `src/bptt/equations/README.md`, their one home, and set as MathML.

Browsers draw MathML themselves, so that a page needs no script; the font, which has large sums and brackets, comes with
the site.
"""

from __future__ import annotations

import html
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from latex2mathml.converter import convert

HOME = Path(__file__).parent.parent / "src" / "bptt" / "equations" / "README.md"
_TAG = re.compile(r"\s*\\tag\{([\d.]+)\}")
_BLOCK = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SET = re.compile(r'<(div|span) class="arithmatex">\\[\[(](.*?)\\[\])]</\1>', re.DOTALL)

_PUT_RIGHT = [
    (r">\\[lr]Vert<", ">&#x02016;<"),
    (r"<mo>(&#x02016;|&#x0007C;)</mo>", r'<mo stretchy="false">\1</mo>'),  # no higher than what it stands beside
    (r"<mo><mrow><mo>&#x0002B;</mo></mrow></mo><mo>&#x0003D;</mo>", "<mo>+=</mo>"),
    (r"(<mi>(?:exp|log|tanh)</mi>(?:<mn>2</mn></msup>)?)(?=<m[is])", r'\1<mspace width="0.17em"/>'),
]
"""(what `convert` makes, what it should be)."""


def font() -> Path:
    """STIX Two Math (SIL Open Font License), which ziamath brings along."""
    ziamath = find_spec("ziamath")  # not imported: its import warns
    if ziamath is None or ziamath.origin is None:
        raise ModuleNotFoundError("the site needs ziamath: pip install 'bptt[docs]'")
    return Path(ziamath.origin).parent / "fonts" / "STIXTwoMath-Regular.ttf"


@cache
def numbered() -> dict[str, str]:
    """Every numbered formula, in LaTeX with its tag, by its number."""
    blocks = (block.strip() for block in _BLOCK.findall(HOME.read_text(encoding="utf-8")))
    return {tag[1]: block for block in blocks if (tag := _TAG.search(block))}


def chapter() -> str:
    """The equations' README as a page: its formulas in the dollar signs that the pages use."""
    text = HOME.read_text(encoding="utf-8")
    text = _BLOCK.sub(lambda block: f"$$\n{block[1]}$$", text)
    return re.sub(r"\$`(.*?)`\$", r"$\1$", text, flags=re.DOTALL)


def anchor(number: str) -> str:
    """The fragment under which a formula stands on the page of equations."""
    return "eq-" + number.replace(".", "-")


def mathml(latex: str, display: Literal["block", "inline"] = "inline") -> str:
    """A formula in MathML, put right where the converter and TeX differ."""
    made = convert(latex, display=display)
    for wrong, right in _PUT_RIGHT:
        made = re.sub(wrong, right, made)
    return made


def set_formulas(page: str, anchors: bool) -> str:
    """Put MathML where Markdown marked LaTeX. anchors: name the numbered ones, so that links find them."""

    def placed(found: re.Match[str]) -> str:
        latex = html.unescape(found[2]).strip()
        if found[1] == "span":
            return mathml(latex)
        tag = _TAG.search(latex)
        formula = mathml(_TAG.sub("", latex), "block")
        if tag is None:
            return f'<div class="formula">{formula}</div>'
        name = f' id="{anchor(tag[1])}"' if anchors else ""
        return f'<div class="formula"{name}>{formula}<span class="number">({tag[1]})</span></div>'

    return _SET.sub(placed, page)
