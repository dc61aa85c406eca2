"""Planted faults: the gate catches them, and the committed table says the same."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path

import pytest
import torch

from bench.record import environment
from tests import faults
from tests.faults import CLEAN, FAULTS, GPU_TABLE, HIDDEN, TABLE, Finding, findings, read_table

METHODS = ("spattention", "standard")


def caught(found: list[Finding]) -> set[tuple[str, str]]:
    return {(x.fault, x.method) for x in found if x.caught}


def expected(dtype: str) -> set[tuple[str, str]]:
    return {(fault, method) for fault in set(FAULTS) - HIDDEN[dtype] for method in METHODS}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gate_catches_planted_faults(dtype: str) -> None:
    found = list(findings(1024, dtype))
    assert caught(found) == expected(dtype)
    assert all(x.error_budget < 0.9 for x in found if x.fault == CLEAN)
    # The committed table is of this gate: the same cases with the same figures.
    table = {(x.fault, x.method): x for x in read_table() if (x.seq_len, x.dtype) == (1024, dtype)}
    assert len(table) == len(found)
    for x in found:
        committed = table[x.fault, x.method].error_budget
        assert x.error_budget == committed == math.inf or 0.5 < x.error_budget / committed < 2


LONG = [(TABLE, 8192), (GPU_TABLE, 8192), (GPU_TABLE, 32768)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("path", "seq_len"), LONG)
def test_committed_tables_of_long_sequences(path: Path, seq_len: int, dtype: str) -> None:
    table = [x for x in read_table(path) if (x.seq_len, x.dtype) == (seq_len, dtype)]
    assert caught(table) == expected(dtype)
    assert all(x.caught == (x.error_budget > 1) for x in table)
    assert sorted(x.fault for x in table) == sorted([CLEAN, *FAULTS] * len(METHODS))


def test_every_line_says_device_torch_and_code(tmp_path, monkeypatch) -> None:
    found = [Finding("nan_row", "standard", 1024, "float32", math.inf, True)]
    monkeypatch.setattr(faults, "findings", lambda *case: iter(found))
    path = tmp_path / "x.csv"
    monkeypatch.setattr(sys, "argv", ["faults", "--output", str(path), "--seq-len", "1024"])
    faults.main()
    assert read_table(path) == found * 2  # a line a type
    env = environment(torch.device("cpu"))
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            assert (line["device"], line["torch"], line["code"]) == (
                env.device, env.torch, env.code
            )  # fmt: skip
    with TABLE.open(newline="") as file:
        assert all(x["device"] and x["torch"] and x["code"] for x in csv.DictReader(file))
