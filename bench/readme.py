"""The README's figures, from the committed CSVs: python -m bench.readme."""

from __future__ import annotations

import csv
import math
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

from bench import report, train_report
from bench.derived import BASELINE, Board, Cell, boards, in_order
from bench.record import ROOT, Row, read_rows
from bench.step_attention import IDENTITY
from methods import METHODS

README = ROOT / "README.md"
RESULTS = ROOT / "results"


def sections() -> dict[str, Callable[[], str]]:
    """What stands between each pair of marks of the README, by the results that there are."""
    found = {
        "gpu": lambda: report.headline_markdown(
            _rows("h200/lengths"), backend="flex", clock="device", q_heads=8, head_dim=128
        ),
        "point": lambda: _clocks(_rows("h200/lengths")),
        "fastest": lambda: _fastest(_rows("h200/backends")),
        "rounds": lambda: _rounds(_rows("h200/rounds")),
        "stand-ins": lambda: _stand_ins(_rows("h200/lengths")),
        "cpu-forward": lambda: _forward(_rows("cpu/default")),
        "cpu": lambda: report.headline_markdown(_rows("cpu/default"), backend="blockwise"),
        "faults": _faults,
        "proofs": _proofs,
        "methods": _methods,
    }
    if references := _measured("h200/references*"):
        found["references"] = lambda: _references(references)
    if steps := [row for row in _measured("h200/train*") if row.model == "table2"]:
        found["train"] = lambda: _train(steps)
    return found


def render(text: str) -> str:
    """The README's text with every marked section made anew."""
    for name, body in sections().items():
        text = report.update_marked(text, name, body())
    return text


def _rows(name: str) -> list[Row]:
    return read_rows(RESULTS / f"{name}.csv")


def _measured(pattern: str) -> list[Row]:
    """Rows of all results files of a pattern, in the order in which they were measured."""
    paths = [path for path in RESULTS.glob(f"{pattern}.csv") if not path.stem.endswith(".time")]
    rows = [row for path in sorted(paths) for row in read_rows(path)]
    return sorted(rows, key=lambda row: row.time_utc)


def _records(name: str) -> list[dict[str, str]]:
    """Lines of a table that is no sweep's."""
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _methods() -> str:
    lines = ["| method | what query i sees | source |", "| --- | --- | --- |"]
    for name, method in METHODS.items():
        about = (type(method).__doc__ or "").splitlines()[0].rstrip(".")
        lines.append(f"| `{name}` | {about} | {method.paper} |")
    return "\n".join(lines)


def _forward(rows: list[Row]) -> str:
    """Forward on compiled flex: milliseconds, and times as fast as `standard`."""
    chosen = [row for row in rows if (row.backend, row.phase) == ("flex", "fwd")]
    lengths = sorted({row.seq_len for row in chosen})
    us = {(row.method, row.seq_len): row.median_us for row in chosen}
    lines = [
        f"| forward, `flex` | {' | '.join(f'N = {n}' for n in lengths)} |",
        f"| --- |{' ---: |' * len(lengths)}",
    ]
    for name in dict.fromkeys(row.method for row in chosen):
        cells = []
        for n in lengths:
            time, base = us[name, n], us["standard", n]
            gain = "" if name == "standard" or time is None else f" ({base / time:.2f}x)"
            cells.append("-" if time is None else f"{time / 1000:.1f} ms{gain}")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _clocks(rows: list[Row]) -> str:
    """The paper's point by every clock: forward + backward, and over `standard` on flex."""
    point = [
        row
        for row in rows
        if (row.phase, row.seq_len, row.q_heads, row.head_dim) == ("fwd_bwd", 4096, 8, 128)
    ]
    clocks = [c for c in ("device", "host") if c in {row.clock for row in point}]
    us = {(row.method, row.backend, row.clock): row.median_us for row in point}
    lines = [
        f"| method | backend | {' | '.join(f'{c} clock' for c in clocks)} |",
        f"| --- | --- |{' ---: |' * len(clocks)}",
    ]
    for method, backend in dict.fromkeys((row.method, row.backend) for row in point):
        times = [us.get((method, backend, clock)) for clock in clocks]
        bases = [us["standard", "flex", clock] for clock in clocks]
        cells = [
            "-" if time is None else f"{time:.0f} us ({base / time:.2f}x)"
            for time, base in zip(times, bases, strict=True)
        ]
        lines.append(f"| `{method}` | {backend} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _fastest(rows: list[Row]) -> str:
    """The fastest backend of dense attention and of each method, and their ratio, by N."""
    found = [board for board in boards(rows) if board.head.clock == "device"]
    found.sort(key=lambda board: (board.head.q_heads, board.head.seq_len))
    heads = [f"H = {board.head.q_heads}, N = {board.head.seq_len}" for board in found]
    lines = [f"| fastest backend | {' | '.join(heads)} |", f"| --- |{' ---: |' * len(found)}"]
    for method in in_order(row.method for row in rows):
        cells = []
        for board in found:
            best = board.fastest(method, "fwd_bwd")
            gain = best and board.over_fastest_dense(best, "fwd_bwd")
            times = f" ({gain.value:.2f}x)" if gain and method != BASELINE else ""
            us = best and board.us(best, "fwd_bwd")
            cells.append(f"{us:.0f} us, {best.backend}{times}" if best else "-")
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _rounds(rows: list[Row]) -> str:
    """Reformer by its rounds of hashing: time, and the part of the forward before the kernel."""
    found = [board for board in boards(rows) if board.head.clock == "device"]
    found.sort(key=lambda board: board.head.seq_len)
    lines = [
        f"| `reformer` | {' | '.join(f'N = {board.head.seq_len}' for board in found)} |",
        f"| --- |{' ---: |' * len(found)}",
    ]
    for cell in found[0].cells:
        if cell.method == BASELINE:
            continue
        rounds, cells = re.search(r"n_rounds=\d+", cell.params)[0], []
        for board in found:
            ms, share = board.us(cell, "fwd_bwd") / 1000, board.prepare_share(cell)
            cells.append(f"{ms:.2f} ms, {share:.0%}")
        lines.append(f"| `{rounds}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _stand_ins(rows: list[Row]) -> str:
    """The released stand-ins beside the methods that they stand for: pairs, blocks and time."""
    pairs = (
        "longformer",
        "mehc_longformer",
        "bigbird",
        "mehc_bigbird",
        "reformer",
        "mehc_reformer",
    )
    lengths = (4096, 16384, 65536)
    found = {
        (row.method, row.seq_len): row
        for row in rows
        if (row.phase, row.clock, row.backend) == ("fwd_bwd", "device", "flex")
    }
    columns = " | ".join(f"N = {n}: pairs, blocks, time" for n in lengths)
    lines = [f"| method | {columns} |", f"| --- |{' ---: |' * len(lengths)}"]
    for name in pairs:
        cells = []
        for n in lengths:
            row, dense = found[name, n], found["standard", n]
            allowed = 100 * row.allowed_pairs / dense.allowed_pairs
            computed = 100 * row.computed_pairs / dense.computed_pairs
            cells.append(f"{allowed:.1f} %, {computed:.1f} %, {row.median_us / 1000:.2f} ms")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _references(rows: list[Row]) -> str:
    """Each method on `flex` over its reference implementations, forward + backward."""
    rows = [row for row in rows if row.phase == "fwd_bwd"]
    titles = {report.problem_title(row, without=["seq_len", "dtype"]) for row in rows}
    if len(titles) > 1:
        raise ValueError(f"the rows differ in more than N and dtype: {'; '.join(sorted(titles))}")
    found = {(b.head.dtype, b.head.seq_len, b.head.clock): b for b in boards(rows)}
    lengths = sorted({row.seq_len for row in rows})
    lines = [
        f"| method | reference | dtype | {' | '.join(f'N = {n}' for n in lengths)} |",
        f"| --- | --- | --- |{' ---: |' * len(lengths)}",
    ]
    rivals = dict.fromkeys(
        (Cell(row.method, row.params, row.backend), row.dtype)
        for row in rows
        if row.backend != "flex" and row.status != "unsupported"
    )
    methods = in_order(row.method for row in rows)
    for rival, dtype in sorted(rivals, key=lambda pair: methods.index(pair[0].method)):
        mode = re.search(r"mode='\w+'", rival.params or "")
        label = f"{rival.method}:{mode[0]}" if mode else rival.method
        cells = [
            _over_reference(found.get((dtype, n, "device")), found.get((dtype, n, "host")), rival)
            for n in lengths
        ]
        lines.append(f"| `{label}` | {rival.backend} | {dtype} | {' | '.join(cells)} |")
    caption = (
        "Times as fast as the reference (reference : ours on `flex`), forward + backward, by the "
        "device clock, or by the host clock where it says so."
    )
    return "\n".join([*lines, "", f"{caption} {'; '.join(titles)}."])


def _over_reference(device: Board | None, host: Board | None, rival: Cell) -> str:
    """Speed-up by the first clock that has both; else the reference's status, and ours if bad."""
    ours = rival._replace(backend="flex")
    for board, mark in ((device, ""), (host, ", host")):
        times = [board.us(cell, "fwd_bwd") for cell in (rival, ours)] if board else []
        if times and all(times):
            return f"{times[0] / times[1]:.2f}x ({_ms(times[0])} : {_ms(times[1])}{mark})"
    rows = [host and host.row(cell, "fwd_bwd") for cell in (rival, ours)]
    theirs, own = (row.status if row else report.NOTHING for row in rows)
    return theirs if own == "ok" or theirs == report.NOTHING else f"{theirs} : {own}"


def _ms(us: float) -> str:
    """Milliseconds with two digits, or more before the point."""
    digits = max(0, 1 - math.floor(math.log10(us / 1000)))
    return f"{us / 1000:.{digits}f} ms"


def _train(rows: list[Row]) -> str:
    """Tokens/s of training, and in brackets over the fastest dense step of the same column."""
    found = train_report.trainings(rows)
    found.sort(key=lambda x: (x.head.world_size, x.head.data != "random", x.head.seq_len))
    heads = [_training_head(training.head) for training in found]
    if len(set(heads)) < len(heads):
        raise ValueError(f"two trainings have one column: {'; '.join(heads)}")
    lines = [
        f"| method | backend | {' | '.join(heads)} |",
        f"| --- | --- |{' ---: |' * len(heads)}",
    ]
    cells = list(dict.fromkeys(cell for training in found for cell in training.cells))
    methods = in_order(cell.method for cell in cells)
    cells.sort(key=lambda cell: (cell.method == IDENTITY.name, methods.index(cell.method)))
    for cell, label in zip(cells, report.labels(cells), strict=True):
        texts = [_training_cell(training, cell) for training in found]
        lines.append(f"| `{label}` | {cell.backend} | {' | '.join(texts)} |")
    titles = dict.fromkeys(train_report.title(x.head, length=False) for x in found)
    caption = (
        f"Tokens/s; in brackets the speed-up over `{BASELINE}` on its fastest backend. "
        f"`{IDENTITY.name}` is q + k + v in place of attention."
    )
    return "\n".join([*lines, "", f"{caption} {'; '.join(titles)}."])


def _training_head(row: Row) -> str:
    processes = f"{row.world_size} processes" if row.world_size > 1 else ""
    text = row.data if row.data != "random" else ""
    return ", ".join(filter(None, (f"N = {row.seq_len}", processes, text)))


def _training_cell(training: train_report.Training, cell: Cell) -> str:
    row = training.rows.get(cell)
    rate = row and train_report.tokens_per_s(row)
    if not rate:
        return row.status if row else report.NOTHING
    gain = training.speedup(cell)
    return report.quantity(rate.y) + (f" ({gain.y:.2f}x)" if gain else "")


def _proofs() -> str:
    """What the suite's own claims rest on: one line a proof, from its committed table."""
    proofs = [
        *_verdict_proofs(), *_clock_proofs(), *_kill_proofs(), *_sweep_proofs(), *_cost_proofs()
    ]  # fmt: skip
    lines = ["| what | measured | made by |", "| --- | --- | --- |"]
    return "\n".join(lines + [f"| {what} | {found} | {by} |" for what, found, by in proofs])


def _verdict_proofs() -> Iterator[tuple[str, str, str]]:
    for x in _records("h200/detection"):
        planted, mode = float(x["planted"]), x["mode"]
        extra = f"{float(x['measured']):.1%} of real extra work"
        what = extra if planted else "a call against its twin"
        rounds = "in the same rounds" if mode == "paired" else "one run after the other"
        found = ", ".join(f"{x[v]} {v}" for v in ("same", "unclear", "slower", "faster"))
        yield f"verdicts of `compare`: {what}, {rounds}", found, "`make detection`"


def _clock_proofs() -> Iterator[tuple[str, str, str]]:
    cells = _records("h200/clocks")
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


def _kill_proofs() -> Iterator[tuple[str, str, str]]:
    places = {"cpu": "CPU"}
    if (RESULTS / "h200" / "kills.csv").exists():
        places["h200"] = "on the GPU"
    for folder, place in places.items():
        kills = [x for x in _records(f"{folder}/kills") if not x["note"].startswith("skipped")]
        whole = sum(x["passed"] == "True" for x in kills)
        yield (
            f"sweeps killed, starved or damaged, then resumed ({place})",
            f"{whole} of {len(kills)} ended with every row once",
            "`make kills`",
        )


def _sweep_proofs() -> Iterator[tuple[str, str, str]]:
    for name in ("heads", "backends"):
        spent = {x["spent_on"]: float(x["seconds"]) for x in _records(f"h200/{name}.time")}
        parts = sorted(spent.items(), key=lambda item: -item[1])
        cells = len({_cell(row) for row in _rows(f"h200/{name}")})
        yield (
            f"the {sum(spent.values()):.0f} s of `{name}.csv`, {cells} cells, some in the caches",
            ", ".join(f"{part} {seconds:.0f} s" for part, seconds in parts if seconds >= 1),
            "`run_bench.py`",
        )
    cold, warm = (_rows(f"h200/sweep_{name}") for name in ("cold", "warm"))
    first = {_cell(row): row.median_us for row in cold if row.clock == "device"}
    pairs = [(first.get(_cell(row)), row.median_us) for row in warm if row.clock == "device"]
    both = [(a, b) for a, b in pairs if a is not None and min(a, b) >= 50]
    near = sum(abs(a / b - 1) <= 0.02 for a, b in both)
    yield (
        "two sweeps of 36 problems on one machine, device medians of 50 us and more",
        f"{near} of {len(both)} within 2 %",
        "`run_bench.py compare`",
    )
    (serial,) = _records("h200/serial")
    yield (
        "compiled and timed one after the other in one process, without a check",
        f"{float(serial['seconds']) / int(serial['cells']):.1f} s a cell, {serial['cells']} cells",
        "`make serial`",
    )


def _cost_proofs() -> Iterator[tuple[str, str, str]]:
    (cost,) = _records("h200/attend_cost")
    what = "host time of `attend` a call, beyond the compiled kernel's"
    yield what, f"{cost['beyond_us']} us", "`make attend-cost`"
    lists = {row.method: row for row in _rows("h200/block_lists")}
    ours, torchs = lists["spattention"], lists["spattention_gridless"]
    yield (
        "block lists against `create_block_mask`, N = 32768",
        (
            f"{torchs.median_us / ours.median_us:.0f} x faster, "
            f"{torchs.peak_bytes / ours.peak_bytes:.0f} x less memory"
        ),
        "`--phases layout`, `tests/gpu/gridless.py`",
    )


def _faults() -> str:
    """Share of the error budget that each planted fault takes; above 1 is caught."""
    found = _records("cpu/faults")
    columns = list(dict.fromkeys((x["seq_len"], x["dtype"]) for x in found))
    share = {(x["fault"], x["method"], x["seq_len"], x["dtype"]): x["error_budget"] for x in found}
    heads = " | ".join(f"N = {n}, {dtype}" for n, dtype in columns)
    lines = [f"| fault, in `spattention` | {heads} |", f"| --- |{' ---: |' * len(columns)}"]
    for fault in dict.fromkeys(x["fault"] for x in found):
        cells = " | ".join(share[fault, "spattention", n, dtype] for n, dtype in columns)
        lines.append(f"| {fault.replace('_', ' ')} | {cells} |")
    return "\n".join(lines)


def _cell(row: Row) -> tuple:
    return row.problem, row.method, row.params, row.backend


def main(path: Path = README) -> None:
    path.write_text(render(path.read_text()))


if __name__ == "__main__":
    main()
