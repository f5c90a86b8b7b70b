"""The README as PyPI shows it: no file lies beside it there.

A link to a file of the repository leads to `Source` of `[project.urls]` in pyproject.toml. As long as that names
nothing, the link's text stays without its link, and a picture is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

README = Path(__file__).parent.parent / "README.md"

# Code, which stays, or a link or a picture, whose text may be code. A picture takes the end of its line with it.
_FOUND = re.compile(
    r"^```.*?^```$ | `[^`\n]+` | (?P<mark>!?)\[(?P<text>[^\]]+)\]\((?P<to>[^)\s]+)\) (?P<end>\n?)",
    re.MULTILINE | re.DOTALL | re.VERBOSE,
)
_FAR = ("https:", "http:", "#")


def alone(text: str, source: str | None) -> str:
    """The text without relative links. source: the address of the repository, as "https://host/owner/name"."""

    def rewritten(found: re.Match[str]) -> str:
        mark, shown, to, end = found.group("mark", "text", "to", "end")
        if to is None or to.startswith(_FAR):
            return found[0]
        if source:
            return f"{mark}[{shown}]({source}/{'raw' if mark else 'blob'}/HEAD/{to}){end}"
        return "" if mark else shown + end

    return _FOUND.sub(rewritten, text)


def dynamic_metadata(settings: Mapping[str, Any], project: Mapping[str, Any]) -> dict[str, Any]:
    """What scikit-build-core asks for: the fields of `[project]` that are given here."""
    if settings:
        raise ValueError(f"the readme takes no settings, got {dict(settings)}")
    source = project.get("urls", {}).get("Source")
    return {"readme": {"text": alone(README.read_text(encoding="utf-8"), source), "content-type": "text/markdown"}}
