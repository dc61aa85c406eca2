"""The README's tables of training, in Markdown, from the rows and pictures that there are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from bench import paper
from bench.derived import BASELINE, Cell, in_order, labels
from bench.docstrings import Source
from bench.notes import NOTHING
from bench.paper_speeds import EAGER, TABLE_2_MODEL, UNCOMPILED_MODEL
from bench.readme_aims import aims, as_released
from bench.readme_speeds import INTERVALS, WIDE, times
from bench.record import Row
from bench.report import quantity
from bench.step_attention import IDENTITY
from bench.tables import markdown, read_table
from bench.train_figures import figure_name
from bench.train_report import failure, remarks, title
from bench.trainings import (
    SPLIT,
    Training,
    fall,
    latest,
    missed,
    scaling,
    tokens_per_s,
    trainings,
    utilisation,
)

NAMED = 3  # of the steps that their two parts miss, those by most


def training(rows: Sequence[Row], results: Path, plots: Path, swept: Sequence[Row] = ()) -> str:
    """Every table that there are rows for, each with its pictures.

    Args:
        results, plots: folders of the files that the rows come from, and of their runs' pictures.
        swept: of a sweep, beside whose attention calls those of the trainings are held.
    """
    found = latest(trainings(rows))
    random = [x for x in found if x.head.data == "random"]
    models = dict.fromkeys(x.head.model for x in random if x.head.model != UNCOMPILED_MODEL)
    parts: list[str] = []
    for model in sorted(models, key=lambda name: name != TABLE_2_MODEL):
        own, first = [x for x in random if x.head.model == model], model == TABLE_2_MODEL
        parts += [] if first else [f"#### `{model}`"]
        parts += pictures(own, "speedup", "Speed-up of training steps over sequence length", plots)
        parts.append(model_table(own, rows, memory=not first))
        parts += aims(own, swept) if first else []
    parts += paper_setting(random)
    texts = [x for x in found if x.head.data != "random"]
    parts += ["#### A text", *loss_tables(texts, results, plots)] if texts else []
    return "\n\n".join(parts)


def training_summary(rows: Sequence[Row]) -> str:
    """Steps of the paper's model on one GPU: each method on its fastest backend, by N."""
    found = [
        x
        for x in latest(trainings(rows))
        if (x.head.model, x.head.data, x.head.world_size) == (TABLE_2_MODEL, "random", 1)
    ]
    methods = in_order(cell.method for x in found for cell in x.cells)
    methods.sort(key=lambda name: name == IDENTITY.name)
    best = {(name, x): _fastest_step(x, name) for name in methods for x in found}
    lines = [
        (f"`{name}`", *(_on_backend(x, best[name, x]) for x in found)) for name in methods
    ]  # fmt: skip
    heads = ("method", *(f"N = {x.head.seq_len}" for x in found))
    notes = _notes([(x, cell) for (_, x), cell in best.items() if cell])
    caption = (
        "Tokens/s of training steps, each method on the fastest backend that it was measured on; "
        f"in brackets over `{BASELINE}` on its own{INTERVALS}. `{IDENTITY.name}` is q + k + v "
        f"in place of attention: no method gets above it. {titles(found)}.{notes}"
    )
    return "\n".join([*markdown(heads, lines, numbers=range(1, len(heads))), "", caption])


def _fastest_step(found: Training, method: str) -> Cell | None:
    timed = [cell for cell in found.cells if cell.method == method and found.us(cell)]
    return min(timed, key=found.us, default=None)


def _on_backend(found: Training, cell: Cell | None) -> str:
    if cell is None:
        return NOTHING
    where = "" if cell.method == IDENTITY.name else f", {cell.backend}"
    return f"{_rate(found, cell, memory=False)}{where}"


def model_table(found: Sequence[Training], rows: Sequence[Row], memory: bool = False) -> str:
    """Tokens/s of a model, and in brackets over the fastest dense step of the same column.

    Raises:
        ValueError: two trainings would have one column.
    """
    heads = [_head(x.head, found) for x in found]
    if len(set(heads)) < len(heads):
        raise ValueError(f"two trainings have one column: {'; '.join(heads)}")
    cells = _cells(found)
    columns = []
    for name, x in zip(heads, found, strict=True):
        columns.append([name, *(_rate(x, cell, memory, bound=True) for cell in cells)])
        scaled = [_scaling(x.rows.get(cell), rows) for cell in cells]
        if any(text != NOTHING for text in scaled):
            columns.append([f"{name}: scaling", *scaled])
    names = zip(labels(cells), (cell.backend for cell in cells), strict=True)
    lines = [(f"`{label}`", backend) for label, backend in names]
    first, *others = zip(*columns, strict=True)
    table = markdown(
        ("method", "backend", *first),
        [(*line, *other) for line, other in zip(lines, others, strict=True)],
        numbers=range(2, 2 + len(columns)),
    )
    notes = _beyond(found) + _notes([(x, cell) for x in found for cell in _cells([x])])
    caption = _caption(found, memory, scaled=len(columns) > len(found))
    return "\n".join([*table, "", f"{caption} {titles(found)}.{notes}"])


def _caption(found: Sequence[Training], memory: bool, scaled: bool) -> str:
    """What stands in a model's table."""
    told = (
        f"Tokens/s; in brackets the speed-up over `{BASELINE}` on its fastest backend{INTERVALS}; "
        "then, on one GPU, what Amdahl's law makes of the attention call's own speed-up"
        f"{'; memory at the peak of a step' if memory else ''}. "
        f"`{IDENTITY.name}` is q + k + v in place of attention: what no method gets above."
    )
    if scaled:
        told += (
            " Scaling: tokens/s over those of one process, of the same code, times processes, "
            "likewise."
        )
    if used := [x for y in found for row in y.rows.values() if (x := utilisation(row))]:
        told += (
            f" Model FLOPs utilisation: {min(used):.0%} to {max(used):.0%} of the rate of a large "
            "matrix product on the same chip."
        )
    return told


def _cells(found: Sequence[Training]) -> list[Cell]:
    """In the order of every table; what is no attention comes last."""
    cells = list(dict.fromkeys(cell for x in found for cell in x.cells))
    methods = in_order(cell.method for cell in cells)
    return sorted(cells, key=lambda c: (c.method == IDENTITY.name, methods.index(c.method)))


def titles(found: Sequence[Training]) -> str:
    """What trains, each setting once."""
    return "; ".join(dict.fromkeys(title(x.head, length=False) for x in found))


def _beyond(found: Sequence[Training]) -> str:
    """Steps that are above Amdahl's figure for certain, and why that can be."""
    above = []
    for x in found:
        for cell in x.cells:
            most, gain = x.amdahl(cell), x.speedup(cell)
            if most and gain and (gain.low or 0) > (most.high or most.y):
                told = f"`{cell.method}` on {cell.backend}, {_head(x.head, found)}"
                if rest := x.rows[cell].other_us:
                    dense = x.rows[x.dense].other_us
                    told += f" ({rest / 1000:.1f} ms, not {dense / 1000:.1f})"
                above.append((gain.y / most.y, told))
    if not above:
        return ""
    return (
        " Amdahl's law takes the rest of a step to be what it is beside dense attention; where it "
        f"is shorter, a step can lie above that figure, as does {_worst(above)}."
    )


def _worst(found: Sequence[tuple[float, str]]) -> str:
    """By their figures, largest first: some, and how many others there are."""
    told = [text for _, text in sorted(found, reverse=True)]
    more = f"; and {len(told) - NAMED} more by less" if len(told) > NAMED else ""
    return "; ".join(told[:NAMED]) + more


def _notes(shown: Iterable[tuple[Training, Cell]]) -> str:
    """Why cells have no figure, and which steps their two parts miss by more than they may."""
    cells = dict.fromkeys(shown)
    found = list(dict.fromkeys(x for x, _ in cells))
    several = len({x.head.model for x in found}) > 1
    failed, amiss, split = [], [], 0
    for (x, cell), label in zip(cells, labels([cell for _, cell in cells]), strict=True):
        row = x.rows[cell]
        place = f"`{label}` on {cell.backend}, {_head(row, found)}"
        place += f", {row.model}" if several else ""
        share = missed(row)
        split += share is not None
        if row.status != "ok":
            failed.append(f"{place} ({failure(row)})")
        elif abs(share or 0) > SPLIT:
            amiss.append((abs(share), f"{-share:+.1%} {place}"))
    told = f" Without a figure: {'; '.join(failed)}." if failed else ""
    if not amiss:
        return told
    return told + (
        f" {len(amiss)} of {split} steps that CUPTI split into attention and the rest took more "
        f"than {SPLIT:.0%} more or less time than unobserved: {_worst(amiss)}."
    )


def _head(row: Row, found: Sequence[Training]) -> str:
    """N, the number of processes, and tokens where they differ."""
    processes = f", {row.world_size} processes" if row.world_size > 1 else ""
    alike = [x.head for x in found if _shape(x.head)[:2] == _shape(row)[:2]]
    several = len({x.batch for x in alike}) > 1
    tokens = f", {row.world_size * row.batch * row.seq_len} tokens" if several else ""
    return f"N = {row.seq_len}{processes}{tokens}"


def _shape(row: Row) -> tuple[int, int, int]:
    return row.seq_len, row.world_size, row.batch


def _rate(
    found: Training, cell: Cell, memory: bool, over: Cell | None = None, bound: bool = False
) -> str:
    """Tokens/s, and over another cell or the fastest dense one; the status where there is none."""
    row = found.rows.get(cell)
    rate = row and tokens_per_s(row)
    if not rate:
        return row.status if row else NOTHING
    gain = found.speedup(cell, over)
    held = f", {row.peak_bytes / 2**30:.1f} GiB" if memory and row.peak_bytes else ""
    itself = cell == (over or found.dense)
    most = None if itself or not bound else found.amdahl(cell)
    shown = gain and times(gain.y, *((None, None) if itself else gain[1:]))
    told = f" ({shown}{f'; {most.y:.2f}x' if most else ''})" if gain else ""
    return quantity(rate.y) + told + held


def _scaling(row: Row | None, rows: Sequence[Row]) -> str:
    share = row and scaling(row, rows)
    if not share:
        return NOTHING
    wide = share.low and share.high and share.high / share.low > 1 + WIDE
    return f"{share.y:.0%}" + (f", {share.low:.0%} to {share.high:.0%}" if wide else "")


def paper_setting(found: Sequence[Training]) -> Iterator[str]:
    """The paper's Table 2: attention not compiled, as released, and compiled, beside its rates."""
    columns = _paper_columns(found)
    if not any(x.head.model == UNCOMPILED_MODEL for _, x, _ in columns):
        return
    theirs = _paper_rates()
    methods = in_order(cell.method for _, x, _ in columns for cell in x.cells)
    methods = [name for name in methods if name in theirs] + [IDENTITY.name]
    lines = [
        (f"`{name}`", *(_in_column(x, name, backend) for _, x, backend in columns),
         theirs.get(name, NOTHING))
        for name in methods
    ]  # fmt: skip
    notes = _notes(
        (x, cell)
        for _, x, backend in columns
        for cell in _cells([x])
        if cell.method in methods and cell.backend in (backend, IDENTITY.name)
    )
    shapes = titles([x for _, x, _ in columns])
    theirs = f"the paper, {paper.TABLE_2_GPUS} x {paper.TABLE_2_GPU}"
    heads = ("method", *(name for name, *_ in columns), theirs)
    yield "#### The paper's setting"
    yield "\n".join(markdown(heads, lines))
    yield (
        f"Tokens/s; in brackets over `{BASELINE}` in the same column{INTERVALS}. `{EAGER}` is "
        "FlexAttention as the released code calls it, not compiled, and `flex` the same call "
        f"compiled, in a model that is not. `{IDENTITY.name}`, q + k + v in place of attention, "
        f"is the ceiling: no attention gets above it. {shapes}.{notes}"
    )
    told = (as_released(x) for _, x, backend in columns if backend == EAGER)
    yield from filter(None, told)


def _paper_columns(found: Sequence[Training]) -> list[tuple[str, Training, str]]:
    """Headings, trainings and backends."""
    at = 1, paper.TABLE_2_ATTENTION.seq_len
    here = [x for x in found if (x.head.world_size, x.head.seq_len) == at]
    as_released = [x for x in here if x.head.model == UNCOMPILED_MODEL]
    compiled = [x for x in here if x.head.model == TABLE_2_MODEL]
    shapes = {_shape(x.head) for x in as_released}  # of so many tokens where there are any
    compiled = [x for x in compiled if _shape(x.head) in shapes] or compiled[-1:]
    return [
        (f"`{backend}`{note}", x, backend)
        for chosen, backends, note in (
            (as_released, (EAGER, "flex"), ""),
            (compiled, ("flex",), ", the model compiled"),
        )
        for x in chosen
        for backend in backends
        if any(cell.backend == backend for cell in x.cells)
    ]


def _paper_rates() -> dict[str, str]:
    """Preset -> the paper's tokens/s under its name, and over Standard's."""
    rates = paper.TABLE_2.column("tok/s")
    return {
        method: f"{rates[name]} ({rates[name] / rates['Standard']:.2f}x)"
        for reading in paper.READINGS.values()
        for name, method in reading.items()
    }


def _in_column(found: Training, method: str, backend: str) -> str:
    own = IDENTITY.name if method == IDENTITY.name else backend
    cells = {(cell.method, cell.backend): cell for cell in found.cells}
    if (cell := cells.get((method, own))) is None:
        return NOTHING
    # Never over another column's: the fastest dense step is seldom of this backend.
    over = cells.get((BASELINE, backend))
    if over is None or not found.us(over):
        rate = tokens_per_s(found.rows[cell])
        return quantity(rate.y) if rate else found.rows[cell].status
    return _rate(found, cell, memory=False, over=over)


def loss_tables(found: Sequence[Training], results: Path, plots: Path) -> Iterator[str]:
    """Whether each method's loss falls on a text, and whose words that is."""
    for x in found:
        cells = [cell for cell in _cells([x]) if cell.method != IDENTITY.name]
        lines = [
            (f"`{label}`", cell.backend, *_fall(x.rows[cell]))
            for label, cell in zip(labels(cells), cells, strict=True)
        ]
        yield from pictures([x], "loss", "Loss over steps", plots)
        heads = ("method", "backend", "first steps", "last steps", "highest", "falls")
        yield "\n".join(markdown(heads, lines, numbers=(2, 3, 4)))
        steps = {ends.steps for row in x.rows.values() if (ends := fall(row))}
        yield (
            f"Mean losses of the first and the last {', '.join(map(str, sorted(steps)))} steps "
            "after the warm-up, from the same seed, and the highest of any step: a spike, or the "
            "first. One falls where the last lies below the first by three standard errors. "
            f"{title(x.head)} · {x.head.recipe}."
            f"{_sources(x.head.data, results)}"
            f"{_notes((x, cell) for cell in cells if x.rows[cell].status == 'ok')}"
        )


def _fall(row: Row) -> tuple[str, ...]:
    ends = fall(row)
    if row.status != "ok" or ends is None:
        return *[NOTHING] * 3, "; ".join(remarks(row)) or "too few steps to tell"
    losses = (f"{loss:.3f}" for loss in (ends.first, ends.last, ends.highest))
    return *losses, "yes" if ends.clear else "**no**"


def _sources(data: str, results: Path) -> str:
    """The packages that a text of docstrings is made of; nothing of another text.

    Raises:
        ValueError: it is of docstrings, and nothing says whose.
    """
    path = results / "docstrings.sources.csv"
    sources = read_table(path, Source) if path.exists() else []
    content = data.rpartition("@")[2]
    own = [x for x in sources if x.text.rpartition("@")[2] == content]
    if data.startswith("docstrings") and not own:
        raise ValueError(f"{path} does not say what {data} is made of")
    told = ", ".join(f"{x.package} {x.version} ({x.licence})" for x in own)
    return f" The text is the docstrings of {told}." if own else ""


def pictures(found: Sequence[Training], kind: str, alt: str, plots: Path) -> list[str]:
    """The pictures of one kind that runs have drawn."""
    places = dict.fromkeys(f"{x.head.run}/{figure_name(kind, x.head)}.png" for x in found)
    return [f"![{alt}]({(plots / place).relative_to(plots.parent)})"
            for place in places if (plots / place).exists()]  # fmt: skip
