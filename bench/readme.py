"""The README's figures, from the committed CSVs: python -m bench.readme."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

from bench import report
from bench.record import ROOT, Row, read_rows
from methods import METHODS

README = ROOT / "README.md"


def sections() -> dict[str, Callable[[], str]]:
    """What stands between each pair of marks of the README."""
    return {
        "gpu": lambda: report.headline_markdown(
            _rows("h200/lengths"), backend="flex", clock="device", q_heads=8, head_dim=128
        ),
        "point": lambda: _clocks(_rows("h200/lengths")),
        "stand-ins": lambda: _stand_ins(_rows("h200/lengths")),
        "cpu-forward": lambda: _forward(_rows("cpu/default")),
        "cpu": lambda: report.headline_markdown(_rows("cpu/default"), backend="blockwise"),
        "faults": _faults,
        "methods": _methods,
    }


def render(text: str) -> str:
    """The README's text with every marked section made anew."""
    for name, body in sections().items():
        text = report.update_marked(text, name, body())
    return text


def _rows(name: str) -> list[Row]:
    return read_rows(ROOT / "results" / f"{name}.csv")


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
            gain = "" if name == "standard" else f" ({base / time:.2f}x)"
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


def _stand_ins(rows: list[Row]) -> str:
    """The released stand-ins beside the methods that they stand for: pairs, blocks and time."""
    pairs = ("longformer", "mehc_longformer", "bigbird", "mehc_bigbird", "mehc_reformer")
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


def _faults() -> str:
    """Share of the error budget that each planted fault takes; above 1 is caught."""
    with (ROOT / "results" / "cpu" / "faults.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    columns = list(dict.fromkeys((x["seq_len"], x["dtype"]) for x in found))
    share = {(x["fault"], x["method"], x["seq_len"], x["dtype"]): x["error_budget"] for x in found}
    heads = " | ".join(f"N = {n}, {dtype}" for n, dtype in columns)
    lines = [f"| fault, in `spattention` | {heads} |", f"| --- |{' ---: |' * len(columns)}"]
    for fault in dict.fromkeys(x["fault"] for x in found):
        cells = " | ".join(share[fault, "spattention", n, dtype] for n, dtype in columns)
        lines.append(f"| {fault.replace('_', ' ')} | {cells} |")
    return "\n".join(lines)


def main(path: Path = README) -> None:
    path.write_text(render(path.read_text()))


if __name__ == "__main__":
    main()
