"""Pictures of masks: which keys each head sees, by evaluating a method's mask_mod."""

from __future__ import annotations

import contextlib
import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from bench.record import Row
from bench.specs import parameters_text, parse_method, source_file
from bench.style import save
from methods import METHODS, Method, Problem
from methods.banded import dense_pairs

COLUMNS = 4
PIXELS = 256
MOST_PANELS = 16
PICTURED = Problem(seq_len=1024, head_dim=16, dtype="float32")
# Dark where a pair takes part; the two part as well in grey.
COLOURS = LinearSegmentedColormap.from_list("mask", ["#ebebeb", "#12406f"])


def mask_grid(method: Method, p: Problem) -> np.ndarray:
    """Which pairs take part: bool [q_heads, N, N], query by key, of the first batch element.

    A method whose mask depends on its inputs gets normally distributed q and k of a fixed seed.
    """
    method.validate(p)
    device = torch.device("cpu")
    random = torch.Generator().manual_seed(0)
    q, k = (
        torch.randn(p.batch, heads, p.seq_len, p.head_dim, generator=random).to(p.torch_dtype)
        for heads in (p.q_heads, p.kv_heads)
    )
    mask = method.mask_mod(p, device, method.prepare(q, k, p))
    at = torch.arange(p.seq_len, dtype=torch.int32)
    heads = torch.arange(p.q_heads, dtype=torch.int32)
    grids = [mask(heads[0] * 0, head, at[:, None], at[None, :]) for head in heads]
    return torch.stack([grid.expand(p.seq_len, p.seq_len) for grid in grids]).numpy()


def mask_figure(method: Method, p: Problem, stem: Path) -> list[Path]:
    """STEM.png and STEM.svg: a panel for each head, queries downwards and keys across."""
    grids = {f"head {h}": grid for h, grid in enumerate(mask_grid(method, p)[:MOST_PANELS])}
    parameters = parameters_text(method)
    causal = "causal" if p.causal else "not causal"
    facts = [parameters.replace(",", ", ")] if parameters else []
    title = " · ".join([method.name, *facts, f"N {p.seq_len}", f"{p.q_heads} heads", causal])
    figure, _ = panels(title, grids, p.causal)
    return save(figure, stem)


def panels(
    title: str, grids: Mapping[str, np.ndarray], causal: bool, side: float = 2.0
) -> tuple[Figure, list[Axes]]:
    """A figure with a panel, `side` inches wide, for each name and its pairs, bool [N, N]."""
    columns = min(COLUMNS, len(grids))
    rows = -(-len(grids) // columns)
    figure = Figure((1.0 + side * columns, 1.1 + side * rows), dpi=140, layout="constrained")
    places = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for place in places[len(grids) :]:
        place.remove()
    for place, (name, grid) in zip(places, grids.items(), strict=False):
        _draw(place, grid, name, causal)
    figure.suptitle(textwrap.fill(title, 26 * columns), fontsize=10)
    figure.supxlabel("key", fontsize=9)
    figure.supylabel("query", fontsize=9)
    return figure, places[: len(grids)]


def _draw(place: Axes, grid: np.ndarray, name: str, causal: bool) -> None:
    size = len(grid)
    place.imshow(
        _shrunk(grid), cmap=COLOURS, vmin=0, vmax=1, interpolation="antialiased",
        extent=(0, size, size, 0),
    )  # fmt: skip
    share = grid.sum() / dense_pairs(size, causal)
    place.set_title(f"{name}: {share:.1%} of {'causal ' if causal else ''}pairs", fontsize=8)
    place.tick_params(labelsize=7)
    place.set_xticks([0, size // 2, size])
    place.set_yticks([0, size // 2, size])


def _shrunk(grid: np.ndarray) -> np.ndarray:
    """At most PIXELS a side: the share of each square's pairs that take part."""
    step = -(-len(grid) // PIXELS)
    edges = np.arange(0, len(grid), step)
    sums = np.add.reduceat(np.add.reduceat(grid.astype(np.float32), edges, 0), edges, 1)
    sizes = np.diff(np.append(edges, len(grid)))
    return sums / np.outer(sizes, sizes)


def draw_masks(rows: Sequence[Row], folder: Path) -> list[Path]:
    """A picture for each method of the suite that was measured, with its parameters.

    Parameters come from a file that anybody may have written, so only a preset's name and
    literals reach the parser; those that the preset no longer takes get no picture, and neither
    does a method of the user's own, which a results file does not hold.
    """
    sound = [row for row in rows if row.status == "ok"]  # others may need more than there is
    heads = {row.causal: row.q_heads for row in reversed(sound)}
    measured = dict.fromkeys((row.method, row.params, row.causal) for row in sound)
    presets = [key for key in measured if key[0] in METHODS]
    several = Counter(name for name, _ in {key[:2] for key in presets})
    written = []
    for name, parameters, causal in presets:
        label = f"{name}:{parameters}" if parameters else name
        shown = re.sub(r"[^\w=.-]+", "_", label if several[name] > 1 else name)
        stem = folder / f"mask_{shown}{'' if causal else '_not_causal'}"
        p = replace(PICTURED, q_heads=heads[causal], kv_heads=heads[causal], causal=causal)
        if source_file(label) is None:
            with contextlib.suppress(ValueError):
                written += mask_figure(parse_method(label), p, stem)
    return written
