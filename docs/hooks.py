"""What mkdocs runs while it builds the site: the pages' code for its pictures, and what stands between braces.

In a page, outside of code:

    {{ equations 1.8 1.9 }}                 numbered formulas, from the equations' README
    (1.8)                                   a link to that formula, wherever such a number stands in parentheses
    {{ readme policies }}                   a generated part of the README; {{ readme_zh policies }} of the Chinese one
    {{ gallery FOLDER ... }}                every picture of the pages in these folders, on a page at the top
    {{ slower OTHER | TABLE CELL POLICY }}  a peer's time over the package's, as `bptt bench` measured it on one thread

Two pages have their home elsewhere: the equations, and the experiments, whose numbers their own scripts write.
"""

from __future__ import annotations

import json
import os
import re
from functools import partial
from pathlib import Path

import drawings  # noqa: F401  # a page's code imports it, when mkdocs has taken this folder off the path again
import formulas
import snippets
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import bptt

ROOT = Path(__file__).parent.parent
GIVEN = os.environ.get("BPTT_DOCS_PICTURES")
"""A folder of pictures made before: then no page's code runs."""
MADE = ROOT / "build" / "docs"
"""Where the pages' code runs, and leaves its pictures in `pictures/`."""
EQUATIONS = "equations.md"

_PRINTED: dict[str, list[str]] = {}
_CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
_BRACES = re.compile(r"\{\{ (\w+) ([^}]*?) \}\}")
_PICTURE = re.compile(r"!\[([^\]]+)\]\((?:\.\./)?(pictures/[^)]+)\)")
_NUMBER = re.compile(r"\((\d\.\d{1,2})\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Say on every page which version it describes."""
    config.copyright = f"bptt {bptt.__version__}, Apache-2.0"
    return config


def on_pre_build(config: MkDocsConfig) -> None:
    """Run the code of every page; what it saves in `pictures/` becomes part of the site."""
    for page in [] if GIVEN else snippets.pages():
        try:
            _PRINTED[page.relative_to(snippets.DOCS).as_posix()] = snippets.run(page, MADE)
        except Exception as error:
            raise PluginError(f"{page.relative_to(ROOT)}: its code failed: {type(error).__name__}: {error}") from error


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the equations with the font of their formulas, the experiments, and all pictures."""
    files.append(File.generated(config, EQUATIONS, content=formulas.chapter()))
    files.append(File.generated(config, "experiments.md", content=_experiments()))
    files.append(File.generated(config, "math.ttf", abs_src_path=str(formulas.font())))
    for folder, pictures in (
        ("pictures", Path(GIVEN or MADE / "pictures")),
        ("experiments", ROOT / "examples" / "figures"),
    ):
        for picture in sorted(pictures.glob("*.[pg][ni][gf]")):
            files.append(File.generated(config, f"{folder}/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Show what the code printed, fill the braces, link the numbers of formulas."""
    source = page.file.src_uri
    if source in _PRINTED:
        markdown = snippets.with_output(markdown, snippets.DOCS / source, _PRINTED[source])
    to_equations = os.path.relpath(EQUATIONS, os.path.dirname(source) or ".")

    def filled(found: re.Match[str]) -> str:
        verb, arguments = found[1], found[2]
        if verb not in _VERBS:
            raise PluginError(f"{source}: {{{{ {verb} }}}} must be one of {', '.join(_VERBS)}")
        try:
            return _VERBS[verb](arguments)
        except (KeyError, OSError, ValueError) as error:
            raise PluginError(f"{source}: {found[0]}: {type(error).__name__}: {error}") from error

    def linked(found: re.Match[str]) -> str:
        number = found[1]
        return f"[({number})]({to_equations}#{formulas.anchor(number)})" if number in formulas.numbered() else found[0]

    texts = _CODE.split(markdown)
    for i in range(0, len(texts), 2):  # the others are code
        prose = texts[i] if source == EQUATIONS else _NUMBER.sub(linked, texts[i])
        texts[i] = _BRACES.sub(filled, prose)
    return "".join(texts)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Set the formulas, and tell mkdocs, which checks links, of the anchors among them."""
    here = page.file.src_uri == EQUATIONS
    if here and page.present_anchor_ids is not None:
        page.present_anchor_ids |= {formulas.anchor(number) for number in formulas.numbered()}
    return formulas.set_formulas(html, anchors=here)


def _experiments() -> str:
    text = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    text = text.replace("](figures/", "](experiments/")
    return re.sub(r"\[([^\]]+)\]\((?:\.\./)?[\w/]+\.(?:py|ipynb)\)", lambda link: f"`{link[1].strip('`')}`", text)


def _equations(numbers: str) -> str:
    return "\n\n".join(f"$$\n{formulas.numbered()[number]}\n$$" for number in numbers.split())


def _readme(part: str, file: str = "README.md") -> str:
    text = (ROOT / file).read_text(encoding="utf-8")
    found = re.search(rf"<!-- {part} -->\n(.*?)<!-- /{part} -->", text, re.DOTALL)
    if found is None:
        raise ValueError(f"{file} has no part {part!r}")
    return found[1]


def _slower(arguments: str) -> str:
    other, _, which = (part.strip() for part in arguments.partition("|"))
    rows = json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text(encoding="utf-8"))["rows"]
    for row in rows:
        named = (row["table"], row["case"]["cell"], row["case"]["gradient"])
        if named == tuple(which.split()) and row["threads"] == 1:
            return f"{row['times'][other]['median'] / row['times']['bptt']['median']:.0f}"
    raise ValueError("no such row")


def _gallery(pages: str) -> str:
    """All pictures of some folders' pages, each with its words and a link to where it is made; "." is the front."""
    shown = []
    for page in snippets.pages():
        source = page.relative_to(snippets.DOCS)
        if source.parent.as_posix() in pages.split():
            for words, picture in _PICTURE.findall(page.read_text(encoding="utf-8")):
                shown.append(f"- [![{words}]({picture})]({source.as_posix()})\n\n    {words}\n")
    if not shown:
        raise ValueError("no page there has a picture")
    return '<div class="gallery" markdown>\n\n' + "\n".join(shown) + "\n</div>"


_VERBS = {
    "gallery": _gallery,
    "equations": _equations,
    "readme": _readme,
    "readme_zh": partial(_readme, file="README_zh.md"),
    "slower": _slower,
}
