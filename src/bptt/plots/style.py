"""How pictures look: the only place where colours, sizes and fonts are chosen."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from functools import cache, wraps
from io import BytesIO
from typing import Any, Literal, ParamSpec, TypeVar

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findSystemFonts, fontManager
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from ..flow.language import current, language
from ..flow.wording import number

__all__ = [
    "BLACK",
    "COLOURS",
    "GREY",
    "HEAT",
    "LINES",
    "PALE",
    "STYLE",
    "Picture",
    "blank",
    "empty",
    "font_of",
    "logarithmic",
    "readable",
    "sparse",
    "styled",
    "title",
]

P = ParamSpec("P")
R = TypeVar("R")

BLACK, BLUE, VERMILLION, ORANGE, GREY = "#000000", "#0072b2", "#d55e00", "#e69f00", "#767676"
PALE = "#e4e4e4"
"""What lies outside of the data."""

COLOURS = (BLACK, VERMILLION, BLUE, ORANGE)
"""Of Okabe and Ito's palette (Color Universal Design, 2008), which colour-blind readers can tell apart. In grey,
vermillion and blue come close: every line also has its own dashes and marker."""

LINES: tuple[dict[str, Any], ...] = tuple(
    {"color": colour, "linestyle": dashes, "marker": marker}
    for colour, dashes, marker in zip(COLOURS, ("-", "--", "-.", ":"), "osD^", strict=True)
)

HEAT = "cividis"
"""Brightness rises evenly, so that it reads in grey; blue to yellow, which nearly all colour-blind readers see."""

STYLE: Any = {
    "figure.figsize": (8.0, 4.0),
    "figure.dpi": 110,
    "savefig.dpi": 110,
    "figure.facecolor": "white",
    "font.size": 10.5,
    "font.family": "sans-serif",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelsize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "axes.formatter.useoffset": False,
    "figure.titlesize": 12,
    "figure.titleweight": "bold",
    "grid.color": "#cccccc",
    "grid.linewidth": 0.6,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}
"""A figure is 8 inches and 880 pixels wide; no letter is smaller than 9 points."""

BOLD = ("semibold", "bold", 600, 700)
"""Weights of fonts that titles can be set in; matplotlib lists them by name or by number."""

FONTS = {
    "zh": (
        "Noto Sans CJK SC",
        "Source Han Sans SC",
        "Noto Sans SC",
        "PingFang SC",
        "Hiragino Sans GB",
        "Microsoft YaHei",
        "WenQuanYi Zen Hei",
        "WenQuanYi Micro Hei",
        "SimHei",
        "Noto Sans CJK JP",
        "Arial Unicode MS",
    )
}
"""The fonts that have the letters of a language, the one to take first, for those that matplotlib's own font lacks."""


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Draw in this style, and leave matplotlib's settings as they were.

    The words are in the current language where a font for it is installed, else in English: better than empty boxes.
    """

    @wraps(draw)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        code = current()
        font = font_of(code)
        if code in FONTS and font is None:
            with language("en"), mpl.rc_context(STYLE):
                return draw(*args, **kwargs)
        own: Any = {} if font is None else {"font.family": [*mpl.rcParamsDefault["font.sans-serif"][:1], font]}
        if font is not None and not any(entry.name == font and entry.weight in BOLD for entry in fontManager.ttflist):
            own |= dict.fromkeys(("axes.titleweight", "figure.titleweight"), "normal")
        with mpl.rc_context(STYLE | own):
            return draw(*args, **kwargs)

    return inside


@cache
def font_of(code: str) -> str | None:
    """The installed font that has a language's letters; None where there is none, and where none is needed."""
    wanted = FONTS.get(code, ())
    if wanted and not any(entry.name in wanted for entry in fontManager.ttflist):
        known = {entry.fname for entry in fontManager.ttflist}
        for path in findSystemFonts():  # one that was installed since matplotlib listed them
            if path not in known:
                with suppress(Exception):  # a file that it cannot read is no font to it
                    fontManager.addfont(path)
    there = {entry.name for entry in fontManager.ttflist}
    return next((name for name in wanted if name in there), None)


class Picture(Figure):
    """A figure that a notebook shows as it is: without pyplot, and without `%matplotlib inline`."""

    def _repr_png_(self) -> bytes:
        content = BytesIO()
        self.savefig(content, format="png", dpi=self.dpi)
        return content.getvalue()


def blank(ax: Axes | None, size: tuple[float, float] = (8.0, 4.0)) -> tuple[Figure, Axes]:
    """The axes given with their figure, or new ones, in a figure that belongs to no pyplot state."""
    if ax is None:
        figure = Picture(figsize=size, layout="constrained")
        return figure, figure.add_subplot()
    own = ax.get_figure(root=True)
    if own is None:
        raise ValueError("ax must belong to a figure: it was removed from its own")
    return own, ax


def title(target: Axes | Figure, text: str) -> None:
    """Write what to conclude, in lines as long as there is room: over a whole figure, or over axes within one."""
    if isinstance(target, Figure):
        target.suptitle(_wrapped(text, target.get_figwidth() - 0.2), x=0.01, ha="left")
        return
    figure, place = target.get_figure(root=True), target.get_subplotspec()
    share = 1.0 if place is None else len(place.colspan) / place.get_gridspec().ncols
    target.set_title(_wrapped(text, share * (8.0 if figure is None else figure.get_figwidth()) - 0.9))


def sparse(count: int, most: int = 25) -> dict[str, Any]:
    """Markers far enough apart to be told from one another."""
    return {"markevery": max(1, -(-count // most))}


def empty(ax: Axes, text: str) -> None:
    """Say in the axes why nothing is drawn."""
    ax.set_xticks([])
    ax.set_yticks([])
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=GREY)


def logarithmic(ax: Axes, values: npt.ArrayLike, axis: Literal["x", "y"] = "y", least: float = 10.0) -> None:
    """A logarithmic axis over the finite values above 0, at least `least` wide, with ticks that can be read."""
    numbers = np.asarray(values, dtype=np.float64)
    numbers = numbers[np.isfinite(numbers) & (numbers > 0)]
    low, high = (float(numbers.min()), float(numbers.max())) if numbers.size else (1.0, 1.0)
    high = min(max(high, 1e-250), 1e250)
    low = max(low, high * 1e-250)  # matplotlib cannot scale more decades than a float holds
    if high / low < least:
        middle = (low * high) ** 0.5 if low * high > 0 else low
        low, high = middle / least**0.5, middle * least**0.5
    room = (high / low) ** 0.06
    limits = (low / room, high * room)
    if axis == "y":  # the limits first: they keep matplotlib from scaling to the values, which may overflow there
        ax.set_ylim(*limits)
        ax.set_yscale("log")
    else:
        ax.set_xlim(*limits)
        ax.set_xscale("log")
    readable(ax.yaxis if axis == "y" else ax.xaxis, high / low)


def readable(side: Axis, ratio: float) -> None:
    """Numbers on a logarithmic axis whose ends have this ratio: decades alone would leave a short one with none."""
    if ratio < 300:
        fine = (
            (1, 2, 5)
            if ratio > 4
            else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
            if ratio < 2
            else (1, 1.5, 2, 3, 5, 7)
        )
        side.set_major_locator(LogLocator(subs=fine))
        side.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        side.set_minor_locator(NullLocator())
    side.set_minor_formatter(NullFormatter())


def _wrapped(text: str, inches: float) -> str:
    """Lines that fit, measured in the font of titles: broken at spaces, and between the letters of Chinese, which has
    none, but not before a mark that ends a part of a sentence.
    """
    font = FontProperties(size=STYLE["figure.titlesize"], weight=mpl.rcParams["figure.titleweight"])
    lines = [""]
    for word in re.findall(rf"\s*(?:{_WIDE}{_ENDS}*|(?:(?!{_WIDE})\S)+{_ENDS}*)", text):
        longer = (lines[-1] + word).strip()
        width, _, _ = text_to_path.get_text_width_height_descent(longer, font, ismath=False)
        if lines[-1] and width > 72 * inches:
            lines.append(word.strip())
        else:
            lines[-1] = longer
    return "\n".join(lines)


_WIDE, _ENDS = "[\u3000-\u30ff\u3400-\u9fff\uff00-\uffef]", "[\u3001\u3002\uff01\uff09\uff0c\uff1a\uff1b\uff1f]"
