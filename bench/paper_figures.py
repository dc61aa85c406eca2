"""Figures 1 and 2 of the paper by evaluating the presets, and pictures of the two tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from bench.complexity import Complexity, block_classes
from bench.derived import Cell, in_order
from bench.masks import mask_grid, panels
from bench.paper import FIGURE_2, FIGURES, READINGS, SPECIALISATION
from bench.specialisation import RECIPE, SEEDS, Specialised
from bench.style import save, styles
from methods import METHODS

FIGURE_2_HEAD = 3
# Of partial and of full blocks: amber and green, both bright on a dark mask.
CLASSES = {1: ("partial block", "#f0b429"), 2: ("full block", "#6ee7a0")}
# (seed, layer) -> how it is named and drawn; deeper layers lie on the second.
SHOWN = {
    (None, None): ("uniform", {}),
    (SEEDS[0], 1): ("untrained, layer 1", {}),
    (SEEDS[0], 2): ("untrained, layer 2", {"fillstyle": "none", "markersize": 10}),
}


class Panel(NamedTuple):
    """One head: its name, its pairs [N, N], and the class of each block."""

    name: str
    grid: np.ndarray
    classes: np.ndarray


def figure_1(method: str) -> list[Panel]:
    """The eight heads of a preset."""
    grid, classes = _evaluate(method)
    return [Panel(f"head {h}", grid[h], classes[h]) for h in range(FIGURES.q_heads)]


def figure_2() -> list[Panel]:
    """One head of each ablation."""
    panels = []
    for name, method in FIGURE_2.items():
        grid, classes = _evaluate(method)
        panels.append(Panel(name, grid[FIGURE_2_HEAD], classes[FIGURE_2_HEAD]))
    return panels


def _evaluate(method: str) -> tuple[np.ndarray, np.ndarray]:
    preset = METHODS[method]
    return mask_grid(preset, FIGURES), block_classes(preset, FIGURES).numpy()


def draw_mask_figures(folder: Path) -> list[Path]:
    """figure_1_METHOD and figure_2, each plain and with the classes of its blocks (_blocks)."""
    size = f"N {FIGURES.seq_len} · {FIGURES.q_heads} heads"
    figures = {
        f"figure_1_{method}": (f"Figure 1 · {method} · {size}", figure_1(method))
        for method in (reading["SPAttention"] for reading in READINGS.values())
    }
    figures["figure_2"] = (f"Figure 2 · ablations, head {FIGURE_2_HEAD} · {size}", figure_2())
    written = []
    for stem, (title, heads) in figures.items():
        grids = {panel.name: panel.grid for panel in heads}
        written += save(panels(title, grids, FIGURES.causal)[0], folder / stem)
        written += save(_with_blocks(title, grids, heads), folder / f"{stem}_blocks")
    return written


def _with_blocks(title: str, grids: Mapping[str, np.ndarray], heads: Sequence[Panel]) -> Figure:
    title += f" · blocks of {len(heads[0].grid) // len(heads[0].classes)}"
    figure, places = panels(title, grids, FIGURES.causal, side=2.6)  # frames need room
    for place, panel in zip(places, heads, strict=True):
        _outline(place, panel)
    present = np.unique([panel.classes for panel in heads])
    shown = [look for key, look in CLASSES.items() if key in present]
    handles = [Patch(fill=False, ec=colour, lw=1.6, label=name) for name, colour in shown]
    figure.legend(handles=handles, loc="outside lower right", fontsize=8, frameon=False,
                  ncol=2)  # fmt: skip
    return figure


def _outline(place: Axes, panel: Panel) -> None:
    """A frame inside each block that a kernel visits, in the colour of its class.

    It lies at the very edge: some blocks hold no more than a corner.
    """
    for across, down, colour in frames(panel):
        place.plot(across, down, color=colour, linewidth=0.9, solid_joinstyle="miter")


def frames(panel: Panel) -> Iterator[tuple[tuple[float, ...], tuple[float, ...], str]]:
    """Of each visited block the keys and the queries of its frame's corners, and its colour."""
    side = len(panel.grid) // len(panel.classes)
    inset = side / 28
    for row, column in zip(*panel.classes.nonzero(), strict=True):
        left, right = column * side + inset, (column + 1) * side - inset
        top, bottom = row * side + inset, (row + 1) * side - inset
        corners = (left, right, right, left, left), (top, top, bottom, bottom, top)
        yield *corners, CLASSES[panel.classes[row, column]][1]


def draw_complexity(lines: Iterable[Complexity], stem: Path) -> list[Path]:
    """Work of each head as a share of a dense head's: pairs, and pairs of the visited blocks."""
    shape = (FIGURES.seq_len, FIGURES.q_heads)
    found = {c.method: c for c in lines if (c.seq_len, c.q_heads) == shape and not c.reason}
    figure = Figure((10.5, 4.2), dpi=140, layout="constrained")
    places = figure.subplots(1, 2, sharey=True)
    looks = styles(Cell(name, None, "") for name in found)
    for place, (title, shares) in zip(places, work(found).items(), strict=True):
        for name in in_order(found):
            place.plot(
                shares[name], label=name, color=looks[name].colour, marker=looks[name].marker,
                linestyle=looks[name].line, fillstyle=looks[name].fill,
            )  # fmt: skip
        place.set_title("\n".join((title, *coinciding(shares))), fontsize=9)
        _by_head(place)
    places[0].set_ylabel("share of a dense head's", fontsize=9)
    places[0].set_ylim(0, 1.05)
    figure.legend(*places[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8,
                  frameon=False, handlelength=3.5)  # fmt: skip
    size = found["standard"].q_block
    title = f"Work of each head · N {shape[0]} · {shape[1]} heads · blocks {size}"
    figure.suptitle(title, fontsize=10, x=0.02, ha="left")
    return save(figure, stem)


def work(found: Mapping[str, Complexity]) -> dict[str, dict[str, np.ndarray]]:
    """Title of a panel -> method -> its pairs as shares of a dense head's, head by head."""
    sides = {"pairs that take part": "allowed", "pairs in visited blocks": "computed"}
    shares = {}
    for title, what in sides.items():
        by_head = {x: np.array(getattr(found[x], f"{what}_by_head")) for x in found}
        shares[title] = {x: pairs / by_head["standard"] for x, pairs in by_head.items()}
    return shares


def coinciding(shares: Mapping[str, np.ndarray]) -> Iterator[str]:
    """A line for each set of methods whose curves are one, of which only the last is seen."""
    groups: dict[tuple, list[str]] = {}
    for name in in_order(shares):
        groups.setdefault(tuple(shares[name]), []).append(name)
    for names in groups.values():
        if len(names) > 1:
            yield f"one curve: {', '.join(names)}"


def draw_specialisation(lines: Iterable[Specialised], stem: Path) -> list[Path]:
    """Entropy of each head: uniform attention as lines, layers of an untrained stack as points.

    The paper has means over the heads alone.
    """
    lines = [line for line in lines if (line.seed, line.layer) in SHOWN]
    figure = Figure((8.0, 4.2), dpi=140, layout="constrained")
    place = figure.subplots()
    looks = styles(Cell(line.method, None, "") for line in lines)
    for line in lines:
        label, kind = SHOWN[line.seed, line.layer]
        look = looks[line.method]
        kind = kind | {"linestyle": look.line if line.layer is None else ""}
        kind |= {"marker": None if line.layer is None else look.marker}
        place.plot(line.by_head, color=look.colour, label=f"{line.method}: {label}", **kind)
    for name, theirs in SPECIALISATION.items():
        method = READINGS["as released"][name]
        place.axhline(
            theirs.entropy, color=looks[method].colour, linestyle=(0, (1, 2)), linewidth=1,
            label=f"{method}: the paper's mean",
        )  # fmt: skip
    _by_head(place)
    place.set_ylabel("mean entropy of the head, nats", fontsize=9)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False, handlelength=3.5)
    size = f"N {RECIPE.seq_len} · {RECIPE.q_heads} heads · seed {SEEDS[0]}"
    figure.suptitle(f"Entropy of each head · {size}", fontsize=10, x=0.02, ha="left")
    return save(figure, stem)


def _by_head(place: Axes) -> None:
    place.set_xlabel("head", fontsize=9)
    place.set_axisbelow(True)
    place.grid(True, color="#dddddd", linewidth=0.6)
    place.tick_params(labelsize=8)
