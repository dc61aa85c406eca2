"""The README's figures, from the committed CSVs: python -m bench.readme."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

from bench import report, train_report
from bench.derived import BASELINE, Board, Cell, boards, in_order
from bench.profile import BETWEEN, OTHERS, calls, read_profile, shown
from bench.readme_proofs import faults, proofs
from bench.record import ROOT, Row, read_rows
from bench.step_attention import IDENTITY
from methods import METHODS

README = ROOT / "README.md"
RESULTS = ROOT / "results"
# Heads and N, and how many times as fast as dense attention the fastest way was to be there.
TARGETS = {(8, 4096): 4.2, (8, 16384): 5.8, (16, 32768): 13}
WIDTH = 60  # of a kernel's name


def sections() -> dict[str, Callable[[], str]]:
    """What stands between each pair of marks of the README, by the results that there are."""
    found = {
        "gpu": lambda: report.headline_markdown(
            _rows("h200/lengths"), backend="flex", clock="device", q_heads=8, head_dim=128
        ),
        "point": lambda: _clocks(_rows("h200/lengths")),
        "fastest": lambda: _fastest(_rows("h200/backends")),
        "targets": lambda: _targets(_rows("h200/backends")),
        "profile-varlen": lambda: _profiles("h200/profile_varlen"),
        "profile-reformer": lambda: _profiles("h200/profile_reformer", 0.05),
        "rounds": lambda: _rounds(_rows("h200/rounds")),
        "stand-ins": lambda: _stand_ins(_rows("h200/lengths")),
        "cpu-forward": lambda: _forward(_rows("cpu/default")),
        "cpu": lambda: report.headline_markdown(_rows("cpu/default"), backend="blockwise"),
        "faults": lambda: faults(RESULTS),
        "proofs": lambda: proofs(RESULTS),
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


def _targets(rows: list[Row]) -> str:
    """Aimed at and reached: `spattention` over dense attention, both on their fastest backend."""
    found = {(board.head.q_heads, board.head.seq_len, board.head.clock): board
             for board in boards(rows)}  # fmt: skip
    lines = [
        "| device clock (host clock) | dense | `spattention` | times as fast | aim |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for (heads, n), aim in TARGETS.items():
        device, host = (found[heads, n, clock] for clock in ("device", "host"))
        cells, ratios = [], []
        best = [device.fastest(name, "fwd_bwd") for name in (BASELINE, "spattention")]
        for cell in best:
            us, waited = (board.us(cell, "fwd_bwd") for board in (device, host))
            cells.append(f"{us:.0f} us ({waited:.0f} us), {cell.backend}")
        for board in (device, host):
            dense, sparse = (board.us(cell, "fwd_bwd") for cell in best)
            ratios.append(f"{dense / sparse:.2f}x")
        lines.append(
            f"| H = {heads}, N = {n} | {' | '.join(cells)} | {ratios[0]} ({ratios[1]}) | {aim}x |"
        )
    return "\n".join(lines)


def _profiles(name: str, least: float = 0.02) -> str:
    """Kernels of each call of a profile, the longest first: microseconds and share."""
    found = calls(read_profile(RESULTS / f"{name}.csv"))
    heads = [f"N = {x.seq_len}, {x.phase}: {x.call_us:.0f} us" for x, *_ in found]
    parts = [{kernel: us for kernel, _, us in shown(call, least)} for call in found]
    kernels = sorted({x for part in parts for x in part}, key=lambda x: _place(x, parts))
    lines = [
        f"| kernel | {' | '.join(heads)} |",
        f"| --- |{' ---: |' * len(found)}",
    ]
    for kernel in kernels:
        cells = [
            f"{part[kernel]:.0f} us, {part[kernel] / call[0].call_us:.0%}"
            if kernel in part
            else "-"
            for part, call in zip(parts, found, strict=True)
        ]
        name = kernel if len(kernel) <= WIDTH else f"{kernel[:WIDTH]}..."
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _place(kernel: str, parts: list[dict[str, float]]) -> tuple[bool, bool, float]:
    """The longest kernels first; what is put together, and what lies between, last."""
    return kernel == BETWEEN, kernel == OTHERS, -max(part.get(kernel, 0.0) for part in parts)


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
    lengths = (4096, 16384, 32768)
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


def main(path: Path = README) -> None:
    path.write_text(render(path.read_text()))


if __name__ == "__main__":
    main()
