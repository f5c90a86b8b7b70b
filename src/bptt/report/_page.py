"""The page around the charts: HTML and CSS, one style for light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from string import Template

from ..flow import Setting, Verdict
from ..flow.conclusions import NOTHING
from ..flow.language import current, say

__all__ = ["Section", "page", "table"]

PAGE = Template("""<!doctype html>
<html lang="$language">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline';
 style-src 'unsafe-inline'; img-src data: blob:">
<title>$title</title>
<style>$css</style>
<script>$plotly</script>
</head>
<body>
<header>
<h1>$name</h1>
<dl>$setting</dl>
<h2>$verdict_of</h2>
<p class="verdict">$verdict</p>
<p class="name">$conditions</p>
$advice
<nav>$contents</nav>
</header>
$sections
</body>
</html>
""")
"""The policy lets the page load nothing from anywhere."""

SECTION = Template("""<section id="$key">
<h2>$heading</h2>
$conclusions
<p>$explanation</p>
<div class="panels" style="--least: $least">$charts</div>
$table
</section>
""")

ADVICE = Template('<div class="advice"><strong>$advice</div>')

CSS = """
:root { color-scheme: light dark; --text: #1b1f24; --back: #ffffff; --card: #f4f5f7; --dim: #59626d; --link: #0b62a3; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e9ed; --back: #14171b; --card: #1e2329; --dim: #a5aeb8; --link: #6cb8f0; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem 1.25rem 4rem; font: 16px/1.5 system-ui, sans-serif;
  color: var(--text); background: var(--back); }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0.2rem 0 0.8rem; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.15rem 1rem; margin: 0 0 1.2rem; font-size: 0.95rem; }
dt { color: var(--dim); } dd { margin: 0; overflow-wrap: anywhere; }
.verdict { font-size: 1.2rem; margin: 0.3rem 0 0.6rem; max-width: 52rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(var(--least), 100%), 1fr)); }
.panels figure { min-width: 0; margin: 0; } figcaption { margin: 0.4rem 0 0; padding-left: 20px; font-weight: 600; }
h2 { font-size: 1.1rem; margin: 0; color: var(--dim); font-weight: 600; }
.name { margin: 0 0 0.8rem; color: var(--dim); max-width: 52rem; }
.conclusion { font-size: 1.15rem; font-weight: 600; margin: 0.3rem 0; }
.advice { background: var(--card); border-left: 4px solid #d55e00; padding: 0.6rem 1rem; border-radius: 4px; }
.advice ul { margin: 0.3rem 0 0; padding-left: 1.2rem; }
nav { margin: 1rem 0; } nav a { margin-right: 1rem; } a { color: var(--link); }
section { border-top: 1px solid var(--card); padding: 1.5rem 0 0.5rem; }
section p { max-width: 48rem; }
table { border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; margin-top: 1rem; }
th, td { padding: 0.25rem 0.6rem; white-space: nowrap; text-align: right; border-bottom: 1px solid var(--card); }
th:first-child, td:first-child { text-align: left; }
.js-plotly-plot .infolayer text, .js-plotly-plot [class*="tick"] text, .js-plotly-plot .textpoint text,
.js-plotly-plot .annotation text, .js-plotly-plot .cbaxis text {
  fill: var(--text) !important; }
.js-plotly-plot .updatemenu-button text { fill: #1b1f24 !important; }
"""


@dataclass(frozen=True)
class Section:
    """One measurement: its heading, what to conclude, what is shown; charts, each with its title, and table as HTML."""

    key: str
    heading: str
    conclusions: tuple[str, ...]
    explanation: str
    charts: tuple[tuple[str, str], ...]
    table: str = ""


def page(name: str, setting: Setting, verdict: Verdict, sections: Sequence[Section], plotly: str) -> str:
    """The whole file: what was measured on what, the verdict, what to change, and the sections. plotly: the library
    itself, once.
    """
    advice = "".join(f"<li>{escape(text, quote=False)}</li>" for text in verdict.advice)
    entries = "".join(f"<dt>{escape(name)}</dt><dd>{escape(words)}</dd>" for name, words in setting.entries)
    conditions = "".join(say("{sentence}. ", sentence=text) for text in verdict.conditions)
    change = f"{say('What to change')}</strong><ul>{advice}</ul>" if advice else f"{say(NOTHING)}</strong>"
    return PAGE.substitute(
        language=current(),
        title=escape(say("Gradient flow: {name}", name=name)),
        verdict_of=say("Verdict"),
        css=CSS,
        plotly=plotly,
        name=escape(name),
        setting=entries,
        verdict=escape(verdict.plain or verdict.headline, quote=False),
        conditions=escape(conditions.strip(), quote=False),
        advice=ADVICE.substitute(advice=change),
        contents="".join(f'<a href="#{section.key}">{escape(section.heading)}</a> ' for section in sections),
        sections="".join(_section(section) for section in sections),
    )


def _section(section: Section) -> str:
    said = "".join(f'<p class="conclusion">{escape(text, quote=False)}</p>' for text in section.conclusions)
    return SECTION.substitute(
        key=section.key,
        heading=escape(section.heading),
        conclusions=said,
        explanation=escape(section.explanation, quote=False),
        charts="".join(
            f"<figure>{f'<figcaption>{escape(title)}</figcaption>' * bool(title)}{chart}</figure>"
            for title, chart in section.charts
        ),
        least="17rem" if len(section.charts) % 3 == 0 else "24rem",  # no row of three with one below
        table=section.table,
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table, its cells escaped."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
