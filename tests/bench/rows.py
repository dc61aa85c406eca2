"""Rows with made-up figures, for tests of what is drawn from rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from bench.record import Row
from methods import METHODS, Problem, block_mask
from methods.blocks import computed_pairs

FAMILY = (
    "standard", "sliding_window", "local_only", "spattention", "spattention_released",
    "gapped_bands",
)  # fmt: skip
_DEFAULTS = {
    "run": "test", "time_utc": "2026-01-01T00:00:00Z", "git_sha": None, "code": "0" * 12,
    "host": "host", "device": "Chip X", "driver": None, "cuda": None, "torch": "2.13.0",
    "triton": None, "flash_attn": None, "python": "3.12.0", "threads": 2,
    "method": "spattention", "params": None, "backend": "flex", "batch": 1, "q_heads": 8,
    "seq_len": 4096, "head_dim": 128, "dtype": "bfloat16", "causal": True, "q_block": 128,
    "kv_block": 128, "phase": "fwd_bwd", "clock": "device",
}  # fmt: skip


def make_row(**changes: object) -> Row:
    """A row of spattention on flex; a median without an interval gets one of 1 % either side."""
    values = _DEFAULTS | changes
    values.setdefault("kv_heads", values["q_heads"])
    if (median := values.get("median_us")) is not None:
        values.setdefault("ci_low_us", median * 0.99)
        values.setdefault("ci_high_us", median * 1.01)
    return Row(**values)


def sweep_rows(
    lengths: tuple[int, ...] = (512, 1024, 2048),
    heads: tuple[int, ...] = (8,),
    methods: tuple[str, ...] = FAMILY,
    backends: tuple[str, ...] = ("flex",),
    clocks: tuple[str, ...] = ("device",),
    **changes: object,
) -> Iterator[Row]:
    """A whole sweep: times are 1 us a million flops of the blocks, and 10 us."""
    for n in lengths:
        for h in heads:
            for name in methods:
                yield from _cell_rows(name, n, h, backends, clocks, changes)


def _cell_rows(
    name: str, n: int, h: int, backends: tuple[str, ...], clocks: tuple[str, ...], changes: dict
) -> Iterator[Row]:
    method = METHODS[name]
    p = Problem(seq_len=n, q_heads=h)
    computed = computed_pairs(block_mask(method, p, "cpu"), p)
    params = ",".join(f"{f.name}={getattr(method, f.name)}" for f in dataclasses.fields(method))
    shared = {
        "method": name, "params": params or None, "seq_len": n, "q_heads": h,
        "allowed_pairs": method.allowed_pairs(p), "computed_pairs": computed,
        "peak_bytes": n * h * 128 * 20,
    }  # fmt: skip
    for slower, backend in enumerate(backends, 1):
        for clock in clocks:
            for phase, flops in (("fwd", 4), ("bwd", 10), ("fwd_bwd", 14)):
                us = slower * (flops * 128 * computed / 4e8 + 10 + 90 * (clock == "host"))
                row = {"backend": backend, "clock": clock, "phase": phase, "median_us": us}
                yield make_row(**shared | row | changes)
