"""`llms.txt` in the site: its pages in their order, a line each, for programs that read text (https://llmstxt.org)."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.nav import Navigation
from mkdocs.structure.pages import Page

_NAVIGATION: list[Navigation] = []
_FIRST = re.compile(r"^(?:# .*\n+)?((?:(?![#|>`!<{:]|- )\S.*\n?)+)")
_LINK = re.compile(r"\[([^\]]+)\]\([^)]*\)")


def on_nav(nav: Navigation, config: MkDocsConfig, files: object) -> None:
    """Keep the order of the pages."""
    _NAVIGATION[:] = [nav]


def on_post_build(config: MkDocsConfig) -> None:
    """Write the list beside the pages."""
    (Path(config.site_dir) / "llms.txt").write_text(listed(config, _NAVIGATION[0]), encoding="utf-8")


def listed(config: MkDocsConfig, nav: Navigation) -> str:
    """A heading, the site's one sentence, then each section with its pages."""
    sections: dict[str, list[str]] = {}
    for page in nav.pages:
        section = page.ancestors[-1].title if page.ancestors else "Pages"
        sections.setdefault(section, []).append(_line(page, config.site_url or ""))
    lines = [f"# {config.site_name}", "", f"> {config.site_description}"]
    for section, pages in sections.items():
        lines += ["", f"## {section}", "", *pages]
    return "\n".join(lines) + "\n"


def _line(page: Page, site: str) -> str:
    found = _FIRST.match(page.markdown or "")
    first = _LINK.sub(r"\1", " ".join(found[1].split())) if found else ""
    sentence = re.split(r"(?<=[.:]) ", first, maxsplit=1)[0].rstrip(":")
    return f"- [{page.title}]({site}{page.url})" + (f": {sentence}" if sentence else "")
