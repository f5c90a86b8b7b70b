"""The code of the pages, run: every block of a page in order, in one namespace, as a reader would type it.

A block is a fence that opens with exactly three backticks and `python`. One with `title="not run"` shows code for a
library that is not installed here, and is left out. One with `title="with NAME"` runs where the package NAME is.
"""

from __future__ import annotations

import re
from contextlib import chdir, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from warnings import catch_warnings, simplefilter

import torch

DOCS = Path(__file__).parent
_FENCE = re.compile(r"^```python(?P<options>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
_NOT_RUN = 'title="not run"'
_WITH = re.compile(r'title="with (?P<name>\w+)"')


def pages() -> list[Path]:
    """Every page, in the order of its path."""
    return sorted(DOCS.rglob("*.md"))


def blocks(page: Path) -> list[re.Match[str]]:
    """The blocks of a page that run. Raises ValueError for options that mean nothing."""
    found = []
    for block in _FENCE.finditer(page.read_text(encoding="utf-8")):
        options = block["options"].strip()
        needs = _WITH.fullmatch(options)
        if options not in ("", _NOT_RUN) and not needs:
            raise ValueError(f'{page.name}: a block of python may say {_NOT_RUN} or title="with NAME": got {options!r}')
        if not options or (needs and find_spec(needs["name"])):
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
            with redirect_stdout(StringIO()) as out, catch_warnings():
                if block["options"].strip():
                    simplefilter("ignore")  # what a framework warns of is its own affair
                exec(program, names)
            printed.append(out.getvalue())
    return printed


def with_output(markdown: str, page: Path, printed: list[str]) -> str:
    """The page with what its blocks printed below them."""
    for block, output in zip(blocks(page), printed, strict=True):
        if output:
            markdown = markdown.replace(block[0], f"{block[0]}\n\n```text\n{output}```", 1)
    return markdown
