"""Figures of training, from rows alone: tokens/s and speed-ups over N, losses over steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from bench.derived import BASELINE, Cell, labels
from bench.figures import Value, doubling_axis, draw_series, factor_scale, log_scale
from bench.record import Row
from bench.step_attention import IDENTITY
from bench.style import Style, save, styles
from bench.train_report import title
from bench.trainings import Training, fall, tokens_per_s, trainings

CEILING = Style("#000000", "|", (0, (1, 1)))


def draw_training(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Tokens/s and speed-up over N, each method on its fastest backend, and losses over steps.

    Returns:
        The files: training_tokens_per_s_MODEL_PROCESSES_TOKENS and so on, of a text with its name
        behind, each as .png and .svg.
    """
    grouped: dict[tuple, list[Training]] = {}
    for training in trainings(rows):
        head = training.head
        machine = head.device, head.host, head.torch, head.driver
        key = _stem(head), *machine, head.dtype, head.data, head.recipe
        grouped.setdefault(key, []).append(training)
    written: list[Path] = []
    seen: Counter[str] = Counter()
    # The newest has the bare name: tables take it.
    newest = sorted(grouped.items(), key=lambda x: max(t.measured for t in x[1]), reverse=True)
    for (stem, *_), found in newest:
        found.sort(key=lambda training: training.head.seq_len)
        seen[stem] += 1
        if seen[stem] > 1:  # of another machine, type, recipe or version of a text
            stem = f"{stem}_{seen[stem]}"
        if len(found) > 1 or found[0].head.data != "random":
            folder.mkdir(parents=True, exist_ok=True)
        looks = styles(cell for training in found for cell in training.cells)
        if len(found) > 1:
            written += save(_rates(found, looks), folder / f"training_tokens_per_s_{stem}")
            written += save(_speedups(found, looks), folder / f"training_speedup_{stem}")
        for training in found:
            if training.head.data != "random":
                name = f"training_loss_{stem}_{training.head.seq_len}"
                written += save(_losses(training, looks), folder / name)
    return written


def figure_name(kind: str, head: Row) -> str:
    """Name of a picture without its suffix: tokens_per_s, speedup or loss of what a row trains."""
    length = f"_{head.seq_len}" if kind == "loss" else ""
    return f"training_{kind}_{_stem(head)}{length}"


def _stem(head: Row) -> str:
    tokens = head.world_size * head.batch * head.seq_len
    text = "" if head.data == "random" else f"_{Path(head.data.rpartition('@')[0]).stem}"
    return f"{head.model.replace(' ', '-')}_{head.world_size}_{tokens}{text}"


def _rates(found: Sequence[Training], looks: dict[str, Style]) -> Figure:
    figure, axes = _figure(found, "tokens/s")
    across, drawn = [training.head.seq_len for training in found], []
    for (method, params), name in _methods(found).items():
        best = [training.best(method, params) for training in found]
        values = [c and tokens_per_s(t.rows[c]) for t, c in zip(found, best, strict=True)]
        bare = method == IDENTITY.name
        look = CEILING if bare else looks[Cell(method, params, "").label]
        draw_series(axes, across, values, look, "attention of zero cost" if bare else name)
        drawn += [value.y for value in values if value]
    return _finished(figure, axes, drawn, log_scale)


def _speedups(found: Sequence[Training], looks: dict[str, Style]) -> Figure:
    figure, axes = _figure(found, "speed-up over the fastest dense")
    across, drawn, known = [training.head.seq_len for training in found], [1.0], False
    for (method, params), name in _methods(found).items():
        if method in (BASELINE, IDENTITY.name):
            continue
        look = looks[Cell(method, params, "").label]
        best = [training.best(method, params) for training in found]
        values = [c and t.speedup(c) for t, c in zip(found, best, strict=True)]
        bounds = [x and x.y for x in (c and t.amdahl(c) for t, c in zip(found, best, strict=True))]
        draw_series(axes, across, values, look, name)
        axes.plot(across, [x or np.nan for x in bounds], "--", color=look.colour, lw=1)
        drawn += [value.y for value in values if value] + [x for x in bounds if x]
        known |= any(bounds)
    if known:
        axes.plot([], [], "--", color="#444444", linewidth=1, label="Amdahl, by colour")
    ceiling = [bound and Value(bound) for bound in (t.zero_cost() for t in found)]
    draw_series(axes, across, ceiling, CEILING, "attention of zero cost")
    axes.axhline(1, color="#000000", linewidth=1, zorder=1, label=BASELINE)
    drawn += [bound.y for bound in ceiling if bound]
    return _finished(figure, axes, drawn, factor_scale)


def _losses(training: Training, looks: dict[str, Style]) -> Figure:
    figure = Figure((7.6, 4.3), dpi=140, layout="constrained")
    axes = figure.subplots()
    for (method, params), name in _methods([training]).items():
        best = training.best(method, params)
        if best is None or not training.rows[best].losses or method == IDENTITY.name:
            continue
        losses = [float(loss) for loss in training.rows[best].losses.split(";")]
        ends = fall(training.rows[best])
        told = f"{name} (not falling)" if ends and not ends.clear else name
        axes.plot(range(1, len(losses) + 1), losses, color=looks[best.label].colour, lw=1,
                  linestyle=looks[best.label].line, label=told)  # fmt: skip
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel("loss", fontsize=9)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    figure.suptitle(title(training.head), fontsize=9, x=0.02, ha="left")
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _methods(found: Iterable[Training]) -> dict[tuple[str, str | None], str]:
    """Methods and parameters, and how a legend names them: by parameters only where it must."""
    cells = [cell for training in found for cell in training.cells]
    return dict(zip((cell[:2] for cell in cells), labels(cells), strict=True))


def _figure(found: Sequence[Training], label: str) -> tuple:
    figure = Figure((7.6, 4.3), dpi=140, layout="constrained")
    axes = figure.subplots()
    axes.set_ylabel(label, fontsize=9)
    axes.set_xlabel("sequence length N (k = 1024)", fontsize=9)
    doubling_axis(axes, [training.head.seq_len for training in found])
    figure.suptitle(title(found[0].head, length=False), fontsize=9, x=0.02, ha="left")
    return figure, axes


def _finished(figure: Figure, axes: object, drawn: Sequence[float], scale: object) -> Figure:
    if drawn:
        scale(axes, min(drawn), max(drawn))
    axes.yaxis.set_minor_locator(NullLocator())
    figure.legend(loc="outside right upper", fontsize=8, frameon=False, handlelength=3.5)
    figure.supxlabel("Each method on its fastest backend. Bars: 99 % interval.", fontsize=8)
    return figure
