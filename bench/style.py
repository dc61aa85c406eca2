"""What all figures share: the look of each method, and how a figure becomes files."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure

from bench.derived import METHOD_ORDER, Cell, in_order


class Style(NamedTuple):
    colour: str
    marker: str
    line: str | tuple
    fill: str = "full"


_DASH_DOT_DOT = (0, (6, 1.5, 1, 1.5, 1, 1.5))
_LINES = ("-", ":", "-.", _DASH_DOT_DOT)
# In METHOD_ORDER. Plain dashes are left to the ideals. The mehc_ proxies look like what they stand
# for, but hollow. Lightness differs between neighbours, so that colours part in grey too.
_KNOWN = (
    Style("#000000", "o", "-"),
    Style("#4a9fd8", "s", "-."),
    Style("#f0b429", "^", ":"),
    Style("#d1420c", "D", "-"),
    Style("#0b4f8a", "v", _DASH_DOT_DOT),
    Style("#2f8f57", "P", ":"),
    Style("#cc79a7", "<", "-"),
    Style("#6a3d9a", "X", _DASH_DOT_DOT),
    Style("#a08040", "*", ":"),
    Style("#cc79a7", "<", "-.", "none"),
    Style("#6a3d9a", "X", ":", "none"),
    Style("#a08040", "*", "-", "none"),
)
# Methods of the user's own, by order of appearance.
_OTHERS = (
    Style("#d62728", "p", "-"),
    Style("#17becf", "h", "-."),
    Style("#7f7f7f", ">", ":"),
    Style("#bcbd22", "d", _DASH_DOT_DOT),
)
FASTEST_DENSE = Style("#666666", "|", (0, (1, 1)))
_VARIANT_FILLS = ("full", "none", "left", "right", "top", "bottom")


def styles(cells: Iterable[Cell]) -> dict[str, Style]:
    """Label -> style; further sets of parameters of a method differ in line and marker filling."""
    cells = list(cells)
    names = in_order(cell.method for cell in cells)
    known = dict(zip(METHOD_ORDER, _KNOWN, strict=True))
    own = [name for name in names if name not in known]
    known |= dict(zip(own, itertools.cycle(_OTHERS), strict=False))
    chosen: dict[str, Style] = {}
    for name in names:
        labels = dict.fromkeys(cell.label for cell in cells if cell.method == name)
        for variant, label in enumerate(labels):
            chosen[label] = _variant(known[name], variant)
    return chosen


def _variant(style: Style, number: int) -> Style:
    if number == 0:
        return style
    line = _LINES[(_LINES.index(style.line) + number) % len(_LINES)]
    return style._replace(line=line, fill=_VARIANT_FILLS[number % len(_VARIANT_FILLS)])


def save(figure: Figure, stem: Path) -> list[Path]:
    """STEM.png and STEM.svg, without dates or random ids: equal figures are equal files."""
    paths = [stem.with_name(stem.name + suffix) for suffix in (".png", ".svg")]
    with matplotlib.rc_context({"svg.hashsalt": "figure"}):
        figure.get_layout_engine().execute(figure)
        figure.set_layout_engine(None)  # else savefig draws it all once more, only to lay it out
        figure.savefig(paths[0], metadata={"Software": None})
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def drawn_into(folder: Path, files: int) -> str:
    """Where figures are, in a line; a training has some of several lengths, or of a text."""
    return f"figures: {folder} ({files} files)" if files else "no figures: nothing to draw"
