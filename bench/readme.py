"""Figures of the README and of plots/README.md, from committed CSVs: python -m bench.readme."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import report
from bench.complexity import Complexity
from bench.derived import BASELINE, cell_of, compare, in_order
from bench.notes import NOTHING
from bench.paper import MICRO_BENCHMARK
from bench.profile import Line, read_profile
from bench.readme_proofs import faults, proofs, sweeps
from bench.readme_speeds import (
    INTERVALS,
    answer,
    by_heads,
    clocks,
    fastest,
    headline_markdown,
    profiles,
    rounds,
    stand_ins,
    targets,
    times,
)  # fmt: skip
from bench.readme_steps import step_kernels
from bench.readme_training import training, training_summary
from bench.record import ROOT, STEP, Row, read_rows
from bench.specs import parameters_text
from bench.tables import markdown, read_table
from methods import METHODS

README = ROOT / "README.md"
PAGES = README, ROOT / "plots" / "README.md"  # what a newcomer reads, and results in detail
RESULTS = ROOT / "results"
PLOTS = ROOT / "plots" / "h200"
NOTED = "reference, `flex`: times as fast"


def sections() -> dict[str, Callable[[], str]]:
    """What stands between each pair of marks of the pages, by the results that there are."""
    found = {
        "gpu": _headline,
        "answer": lambda: answer(_rows("h200/lengths"), _rows("h200/backends"), _sweeps()),
        "point": lambda: clocks(_point_rows()),
        "fastest": lambda: fastest(_rows("h200/backends")),
        "heads": lambda: by_heads(_rows("h200/heads")),
        "fastest-all": lambda: fastest(_rows("h200/paper_speeds")),
        "targets": lambda: targets(_rows("h200/backends")),
        "profile-varlen": lambda: profiles(_profile("varlen") + _profile("varlen_heads")),
        "profile-reformer": lambda: profiles(_profile("reformer"), 0.05),
        "stand-ins": lambda: stand_ins(_rows("h200/lengths")),
        "cpu-forward": lambda: _forward(_rows("cpu/default")),
        "cpu": lambda: headline_markdown(_rows("cpu/default"), backend="blockwise"),
        "faults": lambda: faults(RESULTS),
        "proofs": lambda: proofs(RESULTS),
        "methods": _methods,
    }
    if (RESULTS / "h200/rounds.csv").exists():
        found["rounds"] = lambda: rounds(_rows("h200/rounds"))
    if others := [x for x in _measured("h200/xformers") if x.backend in ("flex", "xformers")]:
        found["xformers"] = lambda: _references(others)
    if references := _measured("h200/references*"):
        found["references"] = lambda: _references(references)
    if uncompiled := _measured("h200/uncompiled"):
        found["uncompiled"] = lambda: _references(uncompiled)
    for name in ("references", "rivals", "xformers"):
        if (RESULTS / f"h200/profile_{name}.csv").exists():
            found[f"profile-{name}"] = lambda name=name: profiles(_profile(name), 0.05)
    trained = _measured("h200/train*")
    if any(row.phase == STEP for row in trained):
        swept = _measured("h200/backends")
        found["train"] = lambda: training(trained, RESULTS / "h200", PLOTS, swept)
        found["train-summary"] = lambda: training_summary(trained)
    if (RESULTS / "h200/step_kernels.csv").exists():
        found["step-kernels"] = lambda: step_kernels(_rows("h200/step_kernels"))
    return found


def rendered(pages: Sequence[Path]) -> dict[Path, str]:
    """The text of every page with its marked sections made anew.

    Raises:
        ValueError: a section stands on no page, or on several.
    """
    texts = {path: path.read_text() for path in pages}
    for name, body in sections().items():
        own = [path for path, text in texts.items() if f"<!-- begin {name} -->" in text]
        if len(own) != 1:
            raise ValueError(f"section {name!r} is marked on {len(own)} pages; it must be on one")
        texts[own[0]] = update_marked(texts[own[0]], name, body())
    return texts


def _headline() -> str:
    rows = _with_rivals(_rows("h200/lengths"), _rows("h200/backends"))
    return headline_markdown(rows, backend="flex", clock="device", q_heads=8, head_dim=128)


def _rows(name: str) -> list[Row]:
    return read_rows(RESULTS / f"{name}.csv")


def _profile(name: str) -> list[Line]:
    return read_profile(RESULTS / f"h200/profile_{name}.csv")


def _point_rows() -> list[Row]:
    """Of a run of the paper's point alone, which has more samples, or of that of all lengths."""
    alone = (RESULTS / "h200/point.csv").exists()
    return _rows("h200/point" if alone else "h200/lengths")


def _sweeps() -> list[Row]:
    """Rows of every committed sweep of a GPU."""
    return sweeps(RESULTS / "h200")


def _with_rivals(rows: list[Row], others: list[Row]) -> list[Row]:
    """Rows of a run, and those of dense attention on backends that only another run had."""
    known = {row.backend for row in rows}
    return rows + [x for x in others if x.method == BASELINE and x.backend not in known]


def _measured(pattern: str) -> list[Row]:
    """Rows of all results files of a pattern, in the order in which they were measured."""
    paths = [path for path in RESULTS.glob(f"{pattern}.csv") if not path.stem.endswith(".time")]
    rows = [row for path in sorted(paths) for row in read_rows(path)]
    return sorted(rows, key=lambda row: row.time_utc)


def _methods() -> str:
    counted = read_table(RESULTS / "h200/paper/complexity.csv", Complexity)
    size = MICRO_BENCHMARK.seq_len, MICRO_BENCHMARK.q_heads
    empty = {x.method: x.empty_rows for x in counted if (x.seq_len, x.q_heads) == size}
    lines = []
    for name, method in METHODS.items():
        about = (type(method).__doc__ or "").splitlines()[0].rstrip(".")
        about = about.replace("|", "\\|")  # as in |i - j|, which would end the column
        share = NOTHING if empty[name] is None else f"{empty[name] / math.prod(size):.1%}"
        lines.append((f"`{name}`", about, share, method.paper))
    heads = ("method", "what query i sees", "rows without a key", "source")
    told = "Rows without a key: of the (head, query) at N = {}, {} heads, causal. ".format(*size)
    sizes = [(name, parameters_text(method)) for name, method in METHODS.items()]
    told += f"Sizes: {'; '.join(f'`{name}` {text}' for name, text in sizes if text)}."
    return "\n".join([*markdown(heads, lines, numbers=(2,)), "", told])


def _forward(rows: list[Row]) -> str:
    """Forward on compiled flex: milliseconds, and times as fast as `standard`."""
    chosen = [row for row in rows if (row.backend, row.phase) == ("flex", "fwd")]
    lengths = sorted({row.seq_len for row in chosen})
    us = {(row.method, row.seq_len): row.median_us for row in chosen}
    lines = []
    for name in dict.fromkeys(row.method for row in chosen):
        cells = []
        for n in lengths:
            time, base = us[name, n], us["standard", n]
            gain = "" if name == "standard" or time is None else f" ({base / time:.2f}x)"
            cells.append("-" if time is None else f"{time / 1000:.1f} ms{gain}")
        lines.append((f"`{name}`", *cells))
    return "\n".join(markdown(("forward, `flex`", *(f"N = {n}" for n in lengths)), lines))


def _references(rows: list[Row]) -> str:
    """Each method on `flex` over its reference implementations, forward + backward."""
    rows = [row for row in rows if row.phase == "fwd_bwd"]
    titles = {report.problem_title(row, without=["seq_len", "dtype", "q_block"]) for row in rows}
    if len(titles) > 1:
        raise ValueError(f"the rows differ in more than N and dtype: {'; '.join(sorted(titles))}")
    lengths = sorted({row.seq_len for row in rows})
    heads = ["method", "reference", "dtype", *(f"N = {n}: {NOTED}" for n in lengths)]
    lines = []
    rivals = dict.fromkeys(
        (cell_of(row), row.dtype)
        for row in rows
        if row.backend != "flex" and row.status != "unsupported"
    )
    methods = in_order(row.method for row in rows)
    for rival, dtype in sorted(rivals, key=lambda pair: methods.index(pair[0].method)):
        mode = re.search(r"mode='\w+'", rival.params or "")
        label = f"{rival.method}:{mode[0]}" if mode else rival.method
        sides = [
            [row for row in rows if (cell_of(row), row.dtype) == (cell, dtype)]
            for cell in (rival, rival._replace(backend="flex"))
        ]
        cells = [
            _over_reference(*([row for row in side if row.seq_len == n] for side in sides))
            for n in lengths
        ]
        lines.append((f"`{label}`", rival.backend, dtype, *cells))
    caption = (
        "Forward + backward of the reference and of `flex`, and how many times as fast `flex` is; "
        f"by the device clock, or by the host clock where it says so{INTERVALS}; samples of the "
        "same rounds, with blocks of 128x128 or, of those that both were timed with, the fastest."
    )
    table = markdown(heads, lines, numbers=range(3, len(heads)))
    return "\n".join([*table, "", f"{caption} {'; '.join(titles)}."])


def _over_reference(theirs: Sequence[Row], own: Sequence[Row]) -> str:
    """Speed-up by the first clock that has both; else the reference's status, and ours if bad.

    The rows are of one length, in the order in which they were measured.
    """
    for clock, mark in (("device", ""), ("host", ", host")):
        rivals, ours = (_timed(rows, clock) for rows in (theirs, own))
        if both := rivals.keys() & ours.keys():
            blocks = min(both, key=lambda size: ours[size].median_us)
            rival, row = rivals[blocks], ours[blocks]
            gain = compare(rival, row)
            size = "{}x{}".format(*blocks)
            told = "" if size == "128x128" else f" (blocks {size})"
            ratio = times(gain.ratio, gain.low, gain.high)
            return f"{_ms(rival.median_us)}, {_ms(row.median_us)}{told}: {ratio}{mark}"
    rival, row = (_status(rows) for rows in (theirs, own))
    if rival == row == "ok":
        return NOTHING  # no blocks that both were timed with
    return rival if row == "ok" or rival == NOTHING else f"{rival} : {row}"


def _timed(rows: Sequence[Row], clock: str) -> dict[tuple[int, int], Row]:
    """Rows with a time by this clock by their blocks: those of a problem share its rounds."""
    last = {(row.q_block, row.kv_block): row for row in rows if row.clock == clock}
    return {size: row for size, row in last.items() if row.status == "ok" and row.samples}


def _status(rows: Sequence[Row]) -> str:
    """By the host clock, which every call has."""
    found = [row.status for row in rows if row.clock == "host"]
    return "ok" if "ok" in found else next(iter(found), NOTHING)


def _ms(us: float) -> str:
    """Milliseconds with two digits, or more before the point."""
    digits = max(0, 1 - math.floor(math.log10(us / 1000)))
    return f"{us / 1000:.{digits}f} ms"


def update_marked(text: str, name: str, body: str) -> str:
    """The text with `body` between its lines `<!-- begin NAME -->` and `<!-- end NAME -->`.

    Raises:
        ValueError: the text has not exactly one such pair, in this order.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    if text.count(begin) != 1 or text.count(end) != 1 or rest.count(end) != 1:
        raise ValueError(f"one {begin!r} and, after it, one {end!r} are needed in the text")
    return f"{before}{begin}\n{body.strip()}\n{end}{after}"


def main(pages: Sequence[Path] = PAGES) -> None:
    for path, text in rendered(pages).items():
        path.write_text(text)


if __name__ == "__main__":
    main()
