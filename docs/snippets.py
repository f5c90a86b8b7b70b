"""The code of the pages, run: every block of a page in order, in one namespace, as a reader would type it.

A block is a fence that opens with exactly three backticks and `python`. One with `title="not run"` shows code for a
library that is not installed here, and is left out.
"""

from __future__ import annotations

import re
from contextlib import chdir, redirect_stdout
from io import StringIO
from pathlib import Path

import torch

DOCS = Path(__file__).parent
_FENCE = re.compile(r"^```python(?P<options>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
_NOT_RUN = 'title="not run"'


def pages() -> list[Path]:
    """Every page, in the order of its path."""
    return sorted(DOCS.rglob("*.md"))


def blocks(page: Path) -> list[re.Match[str]]:
    """The blocks of a page that run. Raises ValueError for options that mean nothing."""
    found = []
    for block in _FENCE.finditer(page.read_text(encoding="utf-8")):
        options = block["options"].strip()
        if options not in ("", _NOT_RUN):
            raise ValueError(f"{page.name}: a block of python may say {_NOT_RUN}: got {options!r}")
        if not options:
            found.append(block)
    return found


def run(page: Path, folder: Path) -> list[str]:
    """Run a page's blocks in `folder`, where they may save pictures in `pictures/`: what each of them prints.

    torch's seed is 0 at the start, and its generator afterwards as it was. A traceback shows the page's own lines.
    """
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    names = {"__name__": page.stem}
    printed = []
    with chdir(folder), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for block in blocks(page):
            lines_before = block.string.count("\n", 0, block.start("code"))
            program = compile("\n" * lines_before + block["code"], str(page), "exec")
            with redirect_stdout(StringIO()) as out:
                exec(program, names)
            printed.append(out.getvalue())
    return printed


def with_output(markdown: str, page: Path, printed: list[str]) -> str:
    """The page with what its blocks printed below them."""
    for block, output in zip(blocks(page), printed, strict=True):
        if output:
            markdown = markdown.replace(block[0], f"{block[0]}\n\n```text\n{output}```", 1)
    return markdown
