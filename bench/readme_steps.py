"""Where training steps spend their time, by kind of kernel, in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench.derived import Cell, by_kind
from bench.notes import NOTHING
from bench.readme_training import titles
from bench.record import Row
from bench.step_attention import IDENTITY
from bench.tables import markdown
from bench.trainings import Training, latest, trainings

HEADS = (
    "N", "method", "backend", "a step", "attention", "products", "their rate", "generated",
    "optimizer", "other", "no kernel", "SM clock",
)  # fmt: skip


def step_kernels(rows: Sequence[Row]) -> str:
    """A line for each step that CUPTI looked at, in milliseconds.

    Raises:
        ValueError: CUPTI looked at none.
    """
    found = latest(trainings(rows))
    lines = [line for x in found for cell in x.cells for line in _line(x, cell)]
    if not lines:
        raise ValueError("no row has kernels of a step")
    most = max(row.matmul_tflop_s or 0 for x in found for row in x.rows.values())
    return "\n".join([
        *markdown(HEADS, lines, numbers=(0, *range(3, len(HEADS)))),
        "",
        "Milliseconds of a step, the mean of a few that CUPTI looked at after those that were "
        "timed, by the names of its kernels: attention; products, all but attention's own, with "
        "what they reach of a large product's rate on the same chip by the same process, "
        f"{most:.0f} TFLOP/s at most; what torch.compile generates for elementwise work and "
        "reductions; AdamW; others. `no kernel` is below 0 where kernels overlap. The clock was "
        f"read after the steps that were timed. {titles(found)}.",
    ])  # fmt: skip


def _line(found: Training, cell: Cell) -> Iterator[tuple[str, ...]]:
    row = found.rows[cell]
    if not row.step_kernels or row.attention_us is None:
        return
    spent, whole = by_kind(row.step_kernels), row.attention_us + row.other_us
    parts = [spent[kind] for kind in ("generated", "optimizer", "other")]
    yield (
        str(row.seq_len), f"`{cell.method}`", cell.backend, _ms(whole), _ms(spent["attention"]),
        _ms(spent["product"]), _rate(found, row, spent["product"]), *map(_ms, parts),
        _ms(whole - spent.total()), f"{row.sm_mhz} MHz" if row.sm_mhz else NOTHING,
    )  # fmt: skip


def _rate(found: Training, row: Row, us: float) -> str:
    """FLOPs of the model without attention over the time of products, and over the chip's rate."""
    bare = found.rows.get(found.best(IDENTITY.name, None))
    if not (us and bare and bare.model_flops and row.matmul_tflop_s):
        return NOTHING
    return f"{bare.model_flops / us * 1e-6 / row.matmul_tflop_s:.0%}"


def _ms(us: float) -> str:
    return f"{us / 1e3:.1f}"
