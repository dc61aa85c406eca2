"""The README's evidence for the suite's own claims, from committed tables."""

from __future__ import annotations

import csv
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from bench.chip import POWER_CAP
from bench.record import COLUMNS, Row, read_rows
from bench.tables import markdown

Proof = tuple[str, str, str]


def proofs(results: Path) -> str:
    """What the suite's own claims rest on: one line a proof, from its committed table.

    Args:
        results: the folder that has h200/ and cpu/.
    """
    parts = (
        verdict_proofs, _clock_proofs, kill_proofs, matrix_proofs, fault_proofs, time_proofs,
        _sweep_proofs, repeat_proofs, host_proofs, serial_proofs, _cost_proofs, block_list_proofs,
    )  # fmt: skip
    found = [proof for part in parts for proof in part(results)]
    return "\n".join(markdown(("what", "measured", "made by"), found, numbers=()))


def verdict_proofs(results: Path) -> Iterator[Proof]:
    """How often `compare` sees nothing, and work that was planted: of a GPU, then of a CPU."""
    for folder, place in (("h200", ""), ("cpu", " (CPU)")):
        for x in _records(results / folder / "detection.csv"):
            planted, measured = float(x["planted"]), float(x["measured"])
            extra = f"{planted:.0%} of real extra work (measured {measured:.1%})"
            what = extra if planted else "a call against its twin"
            apart = "in rounds of their own, right after"
            rounds = "in the same rounds" if x["mode"] == "paired" else apart
            found = ", ".join(f"{x[v]} {v}" for v in ("same", "unclear", "slower", "faster"))
            yield f"verdicts of `compare`{place}: {what}, {rounds}", found, "`make detection`"


def _clock_proofs(results: Path) -> Iterator[Proof]:
    cells = _records(results / "h200/clocks.csv")
    for column, name in (("cupti", "CUPTI's spans"), ("triton", "`do_bench_cudagraph`")):
        apart = [abs(float(x[f"device_over_{column}"]) - 1) for x in cells]
        middle, most = statistics.median(apart), max(apart)
        x = cells[apart.index(most)]
        yield (
            f"device clock against {name}, {len(cells)} cells",
            (
                f"{middle:.1%} apart at the median; at most {most:.1%}: `{x['method']}` on "
                f"{x['backend']}, N = {x['seq_len']}"
            ),
            "`make clocks`",
        )


def kill_proofs(results: Path) -> Iterator[Proof]:
    """Of a CPU, and of a GPU."""
    for folder, place in {"cpu": "CPU", "h200": "on the GPU"}.items():
        kills = [
            x
            for x in _records(results / f"{folder}/kills.csv")
            if not x["note"].startswith("skipped")
        ]
        whole = sum(x["passed"] == "True" for x in kills)
        yield (
            f"sweeps killed, starved or damaged, then resumed ({place})",
            f"{whole} of {len(kills)} ended with every row once",
            "`make kills`",
        )


def time_proofs(results: Path) -> Iterator[Proof]:
    """Where the time of whole sweeps went."""
    sweeps = {
        "default": ("the default sweep, {} cells, from empty caches", "`make bench`"),
        "sweep_cold": ("a sweep of {} cells from empty caches", "`run_bench.py`"),
        "sweep_warm": ("a sweep of {} cells from full caches", "`run_bench.py`"),
        "uncompiled": ("`flex` and uncompiled, {} cells", "`make results ARGS=uncompiled`"),
        "references_bfloat16": ("references, {} cells", "`make results ARGS=references_bf`"),
    }
    for name, (what, command) in sweeps.items():
        cells = {_cell(row) for row in read_rows(results / f"h200/{name}.csv")}
        spent = sweep_seconds(results / f"h200/{name}.time.csv")
        parts = sorted(spent.items(), key=lambda item: -item[1])
        yield (
            f"{what.format(len(cells))}: {sum(spent.values()):.0f} s",
            ", ".join(f"{part} {seconds:.0f} s" for part, seconds in parts if seconds >= 1),
            command,
        )


def sweep_seconds(path: Path) -> dict[str, float]:
    """What a sweep's time was spent on, from its NAME.time.csv; of several runs the last."""
    lines = _records(path)
    last = [x for x in lines if x["time_utc"] == lines[-1]["time_utc"]]
    return {x["spent_on"]: float(x["seconds"]) for x in last}


def _sweep_proofs(results: Path) -> Iterator[Proof]:
    cold, warm = (read_rows(results / f"h200/sweep_{name}.csv") for name in ("cold", "warm"))
    first = {_cell(row): row.median_us for row in cold if row.clock == "device"}
    pairs = [(first.get(_cell(row)), row.median_us) for row in warm if row.clock == "device"]
    both = [(a, b) for a, b in pairs if a is not None and min(a, b) >= 50]
    near = sum(abs(a / b - 1) <= 0.02 for a, b in both)
    problems = {row.problem for row in cold} & {row.problem for row in warm}
    longest = max(p.seq_len for p in problems)
    yield (
        f"two sweeps on one machine, {len(problems)} problems up to N = {longest}, device medians "
        "of 50 us and more",
        f"{near} of {len(both)} within 2 %",
        "`run_bench.py compare`",
    )


def serial_proofs(results: Path) -> Iterator[Proof]:
    """Cells without a sweep; and with one, where the very same cells were swept.

    Raises:
        ValueError: sweep_serial.csv has other cells, or one that could not be measured.
    """
    (serial,) = _records(results / "h200/serial.csv")
    seconds, cells = float(serial["seconds"]), int(serial["cells"])
    what = "compiled and timed one after the other in one process, without a check"
    path = results / "h200/sweep_serial.csv"
    spent = path.with_suffix(".time.csv")
    if not (path.exists() and spent.exists()):
        yield what, f"{seconds / cells:.1f} s a cell, {cells} cells", "`make serial`"
        return
    _must_be_those_of(serial, read_rows(path))
    swept = sum(sweep_seconds(spent).values())
    yield (
        f"{cells} cells {what}, or by a sweep; empty caches",
        f"{seconds:.0f} s one after the other, {swept:.0f} s by a sweep: "
        f"{math.floor(100 * seconds / swept) / 100:.2f} x",  # three would be an aim reached
        "`make serial`, `run_bench.py`",
    )


def _must_be_those_of(serial: dict[str, str], rows: Sequence[Row]) -> None:
    axes = (serial.get(axis, "").split() for axis in ("methods", "heads", "lengths"))
    taken = set(itertools.product(*axes))
    swept = {(x.method, str(x.q_heads), str(x.seq_len)) for x in rows if x.status == "ok"}
    cells = len({_cell(row) for row in rows})
    if taken != swept or not int(serial["cells"]) == cells == len(taken):
        raise ValueError(
            f"sweep_serial.csv has {cells} cells, {len(swept)} of them measured; they must be the "
            f"{serial['cells']} of serial.csv"
        )


def _cost_proofs(results: Path) -> Iterator[Proof]:
    for cost in _records(results / "h200/attend_cost.csv"):
        yield (
            f"host time of `attend` a call without gradients, {cost['attend_us']} us, beyond the "
            f"compiled kernel's, {cost['compiled_us']} us; code {cost['code']}",
            f"{cost['beyond_us']} us, the median of differences in the same rounds",
            "`make attend-cost`",
        )


def block_list_proofs(results: Path) -> Iterator[Proof]:
    """Against torch's where it has any, else what they take; and what was computed by them."""
    rows = [row for row in read_rows(results / "h200/block_lists.csv") if row.status == "ok"]
    lists = {(row.seq_len, row.method): row for row in rows if row.phase == "layout"}
    for n in sorted({n for n, method in lists if method == "spattention"}):
        ours, torchs = lists[n, "spattention"], lists.get((n, "spattention_gridless"))
        if torchs is None:
            took = f"{ours.median_us / 1000:.1f} ms, {ours.peak_bytes / 2**30:.2f} GiB at the peak"
            yield f"block lists at N = {n}", took, "`--phases layout`"
            continue
        yield (
            f"block lists against `create_block_mask`, N = {n}",
            (
                f"{torchs.median_us / ours.median_us:.0f} x faster, "
                f"{torchs.peak_bytes / ours.peak_bytes:.0f} x less memory"
            ),
            "`--phases layout`, `tests/gpu/gridless.py`",
        )
    for row in rows:
        if (row.phase, row.clock) == ("fwd_bwd", "device"):
            yield (
                f"`{row.method}` forward + backward at N = {row.seq_len}, {row.q_heads} heads, "
                f"head dim {row.head_dim}, on `{row.backend}`",
                f"{row.median_us / 1e6:.2f} s, {row.error_budget:.2f} of its error budget, "
                f"{row.peak_bytes / 2**30:.1f} GiB at the peak",
                "`make results ARGS=block_lists`",
            )


def matrix_proofs(results: Path) -> Iterator[Proof]:
    """How many cells of the matrix are right, and what the others are, where it was run."""
    path = results / "h200/matrix.csv"
    if not path.exists():
        return
    cells = _records(path)
    dims = {x["dtype"]: sorted({int(y["head_dim"]) for y in cells if y["dtype"] == x["dtype"]})
            for x in cells}  # fmt: skip
    types = {tuple(own): [x for x, other in dims.items() if other == own] for own in dims.values()}
    sizes = (
        f"{' and '.join(names)} at head dims {', '.join(map(str, own))}"
        for own, names in types.items()
    )
    others = Counter(
        f"{x['status']} ({x['limit']})" if x["limit"] else x["status"]
        for x in cells
        if x["status"] != "ok"
    )
    budgets = [float(x["error_budget"]) for x in cells if x["status"] == "ok"]
    right = f"{len(budgets)} of {len(cells)} right, at most {max(budgets):.2f} of an error budget"
    yield (
        "compiled FlexAttention against float64, forward alone and with gradients: "
        f"{len({x['method'] for x in cells})} presets, {'; '.join(sizes)}",
        "; ".join([right, *(f"{count} {what}" for what, count in others.most_common())]),
        "`make matrix`",
    )


def fault_proofs(results: Path) -> Iterator[Proof]:
    """What the check sees of faults in compiled kernels on a GPU."""
    lines = _records(results / "h200/faults.csv")
    planted = [x for x in lines if x["fault"] != "none"]
    missed = [x for x in planted if x["caught"] != "True"]
    names = dict.fromkeys(f"{x['fault'].replace('_', ' ')} in {x['dtype']}" for x in missed)
    rest = f"; not caught: {', '.join(names)}" if missed else ""
    lengths = " and ".join(dict.fromkeys(x["seq_len"] for x in lines))
    yield (
        f"faults planted in compiled FlexAttention on the GPU, N = {lengths}",
        f"{len(planted) - len(missed)} of {len(planted)} caught{rest}",
        "`make faults`",
    )


def faults(results: Path) -> str:
    """Share of the error budget that each planted fault takes; above 1 is caught."""
    found = _records(results / "cpu/faults.csv")
    columns = list(dict.fromkeys((x["seq_len"], x["dtype"]) for x in found))
    share = {(x["fault"], x["method"], x["seq_len"], x["dtype"]): x["error_budget"] for x in found}
    heads = ["fault, in `spattention`", *(f"N = {n}, {dtype}" for n, dtype in columns)]
    lines = [
        [fault.replace("_", " "), *(share[fault, "spattention", n, x] for n, x in columns)]
        for fault in dict.fromkeys(x["fault"] for x in found)
    ]
    return "\n".join(markdown(heads, lines))


def _records(path: Path) -> list[dict[str, str]]:
    """Lines of a table that is no sweep's."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def repeat_proofs(results: Path) -> Iterator[Proof]:
    """Cells that several runs timed, apart by whether the chip was at its power cap."""
    for capped, found in sorted(device_spread(sweeps(results / "h200")).items()):
        near = sum(x <= 1.02 for x in found)
        where = "at the chip's power cap" if capped else "of one code, below the chip's power cap"
        yield (
            f"the same cells in several runs {where}, device medians",
            f"{near} of {len(found)} within 2 %, at most {max(found) - 1:.1%} apart",
            "`run_bench.py compare`",
        )


def device_spread(rows: Iterable[Row]) -> dict[bool, list[float]]:
    """Of each cell that several runs timed, the longest over the shortest device median.

    By whether any of them met the power cap; where none did, of runs of one code alone.
    """
    rows = [row for row in _calls(rows) if row.clock == "device"]
    capped = {_same(row) for row in rows if POWER_CAP in (row.throttled or "")}
    found: dict[bool, dict[tuple, list[float]]] = {}
    for row in rows:
        hot = _same(row) in capped
        cells = found.setdefault(hot, {})
        cells.setdefault((_same(row), None if hot else row.code), []).append(row.median_us)
    return {hot: _spread(cells.values()) for hot, cells in found.items()}


def _calls(rows: Iterable[Row]) -> Iterator[Row]:
    """Of attention, with a time."""
    for row in rows:
        if row.status == "ok" and row.phase in ("fwd", "bwd", "fwd_bwd"):
            yield row


def _same(row: Row) -> tuple:
    """What two runs of a cell share, by the same libraries on the same chip."""
    with_what = row.device, row.torch, row.flash_attn
    return *_cell(row), row.q_block, row.kv_block, row.phase, *with_what


def _spread(found: Iterable[list[float]]) -> list[float]:
    return [max(times) / min(times) for times in found if len(times) > 1]


def host_proofs(results: Path) -> Iterator[Proof]:
    """How far the host clock's medians of one cell lie apart in different runs."""
    apart = host_spread(sweeps(results / "h200"))
    if apart:
        yield (
            f"{len(apart)} cells in several runs of one code, host medians",
            f"{statistics.median(apart):.2f} x apart at the median, at most {max(apart):.2f} x",
            "`run_bench.py`",
        )


def host_spread(rows: Iterable[Row]) -> list[float]:
    """Of each cell that several runs of one code timed, the longest over the shortest median."""
    found: dict[tuple, list[float]] = {}
    for row in _calls(rows):
        if row.clock == "host":
            found.setdefault((_same(row), row.code), []).append(row.median_us)
    return _spread(found.values())


def sweeps(folder: Path) -> list[Row]:
    """Rows of every results file of a folder; other tables have other columns."""
    starts = ",".join(COLUMNS[:3])
    with_rows = [
        path for path in sorted(folder.glob("*.csv")) if path.read_text().startswith(starts)
    ]
    return [row for path in with_rows for row in read_rows(path)]


def _cell(row: Row) -> tuple:
    return row.problem, row.method, row.params, row.backend
