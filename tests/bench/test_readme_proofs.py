"""Proofs of the README that wait for results of a GPU, from small tables with made-up figures."""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace

import pytest

from bench.readme_proofs import (
    block_list_proofs,
    fault_proofs,
    matrix_proofs,
    repeat_proofs,
    serial_proofs,
    verdict_proofs,
)
from bench.record import Store
from tests.bench.rows import make_row
from tests.gpu import serial

METHODS, LENGTHS = ("standard", "spattention"), (1024, 2048)
ALONE = "compiled and timed one after the other in one process, without a check"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "h200").mkdir()
    return tmp_path


def write(folder, name, text):
    (folder / "h200" / name).write_text(text)


@pytest.fixture
def timed(folder, monkeypatch):
    """A run of `tests.gpu.serial` that took 20 s a cell."""
    path = folder / "h200" / "serial.csv"
    monkeypatch.setattr(serial, "METHODS_TAKEN", METHODS)
    monkeypatch.setattr(serial, "LENGTHS", LENGTHS)
    monkeypatch.setattr(serial, "the_gpu", lambda parser: None)
    monkeypatch.setattr(serial, "one_by_one", lambda heads, device: 80.0 * len(heads))
    env = SimpleNamespace(device="Chip X", code="abc")
    monkeypatch.setattr(serial, "environment", lambda device: env)
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "put back afterwards")
    monkeypatch.setattr(sys, "argv", ["serial", "--output", str(path), "--heads", "8", "16"])
    serial.main()


def swept(folder, axes, **changes):
    with Store(folder / "h200" / "sweep_serial.csv") as store:
        for method, heads, n in axes:
            row = {"method": method, "q_heads": heads, "seq_len": n, "median_us": 9.0} | changes
            store.append(make_row(clock=clock, **row) for clock in ("device", "host"))
    text = "time_utc,spent_on,seconds\nnow,compile,30.5\nnow,rest,9.5\n"
    write(folder, "sweep_serial.time.csv", text)


def test_cells_one_after_the_other_alone(folder, timed):
    assert list(serial_proofs(folder)) == [(ALONE, "20.0 s a cell, 8 cells", "`make serial`")]


def test_cells_one_after_the_other_against_a_sweep_of_the_same(folder, timed):
    swept(folder, itertools.product(METHODS, (8, 16), LENGTHS))
    ((what, measured, _),) = serial_proofs(folder)
    assert what == f"8 cells {ALONE}, or by a sweep; empty caches"
    assert measured == "160 s one after the other, 40 s by a sweep: 4.00 x"
    write(folder, "sweep_serial.time.csv", "time_utc,spent_on,seconds\nnow,compile,53.4\n")
    ((_, measured, _),) = serial_proofs(folder)
    assert measured.endswith("53 s by a sweep: 2.99 x")  # 2.996: three times is not reached


@pytest.mark.parametrize(
    ("axes", "changes"),
    [
        (itertools.product(METHODS, (8,), LENGTHS), {}),
        (itertools.product(METHODS, (8, 32), LENGTHS), {}),
        (itertools.product(METHODS, (8, 16), LENGTHS), {"status": "oom", "median_us": None}),
    ],
)
def test_a_sweep_of_other_cells_is_no_proof(folder, timed, axes, changes):
    swept(folder, axes, **changes)
    with pytest.raises(ValueError, match=r"must be the 8 of serial\.csv"):
        list(serial_proofs(folder))


def test_a_sweep_of_more_than_one_head_dim_is_no_proof(folder, timed):
    for dim in (64, 128):
        swept(folder, itertools.product(METHODS, (8, 16), LENGTHS), head_dim=dim)
    with pytest.raises(ValueError, match="has 16 cells, 8 of them measured"):
        list(serial_proofs(folder))


def test_verdicts_of_a_gpu_and_of_a_cpu(folder):
    head = "planted,measured,mode,same,unclear,slower,faster"
    write(folder, "detection.csv", f"{head}\n0.0,0.00095,paired,199,1,0,0\n")
    (folder / "cpu").mkdir()
    write(folder, "../cpu/detection.csv", f"{head}\n0.03,0.0312,apart,0,60,39,1\n")
    assert list(verdict_proofs(folder)) == [
        ("verdicts of `compare`: a call against its twin, in the same rounds",
         "199 same, 1 unclear, 0 slower, 0 faster", "`make detection`"),
        ("verdicts of `compare` (CPU): 3% of real extra work (measured 3.1%), in rounds of "
         "their own, right after", "0 same, 60 unclear, 39 slower, 1 faster", "`make detection`"),
    ]  # fmt: skip


def test_block_lists_are_held_against_those_of_torch_where_it_has_any(folder):
    def lists(n, method, ms, gib, **changes):
        sizes = {"median_us": ms and ms * 1000, "peak_bytes": gib and int(gib * 2**30)}
        where = {"phase": "layout", "clock": "host", "seq_len": n, "method": method}
        return make_row(**where | sizes | changes)

    with Store(folder / "h200" / "block_lists.csv") as store:
        store.append([
            lists(1 << 20, "standard", 900, 2), lists(1 << 20, "spattention", 112.34, 1.25),
            lists(1 << 20, "spattention_gridless", None, None, status="oom"),
            lists(32768, "spattention", 2, 0.25), lists(32768, "spattention_gridless", 124, 80),
            lists(1 << 20, "spattention", 1456.1, 9, phase="fwd_bwd", clock="device",
                  error_budget=0.47, head_dim=64),
        ])  # fmt: skip
    assert list(block_list_proofs(folder)) == [
        ("block lists against `create_block_mask`, N = 32768", "62 x faster, 320 x less memory",
         "`--phases layout`, `tests/gpu/gridless.py`"),
        ("block lists at N = 1048576", "112.3 ms, 1.25 GiB at the peak", "`--phases layout`"),
        ("`spattention` forward + backward at N = 1048576, 8 heads, head dim 64, on `flex`",
         "1.46 s, 0.47 of its error budget, 9.0 GiB at the peak",
         "`make results ARGS=block_lists`"),
    ]  # fmt: skip


def test_the_matrix_is_counted_by_status_and_limit(folder):
    assert list(matrix_proofs(folder)) == []
    lines = ["method,dtype,head_dim,status,error_budget,limit,reason"]
    for dim, status in ((64, "ok,0.5,,"), (256, "unsupported,,shared memory,too large")):
        lines += [f"{name},{x},{dim},{status}" for name in METHODS for x in ("float32", "float16")]
    lines.append("standard,float32,192,mismatch,7,,dq of head 0")
    write(folder, "matrix.csv", "\n".join(lines))
    ((what, measured, _),) = matrix_proofs(folder)
    assert what.endswith(
        "2 presets, float32 at head dims 64, 192, 256; float16 at head dims 64, 256"
    )
    right = "4 of 9 right, at most 0.50 of an error budget"
    assert measured == f"{right}; 4 unsupported (shared memory); 1 mismatch"


@pytest.mark.parametrize("more", [("", ""), (",device,torch,code", ",Chip X,2.11,abc")])
def test_faults_on_a_gpu_are_counted_and_the_missed_ones_named(folder, more):
    heads, facts = more
    lines = [f"fault,method,seq_len,dtype,error_budget,caught{heads}"]
    for n, (fault, caught) in itertools.product(
        (8192, 32768), {"none": False, "nan_row": True, "scale_off_slightly": False}.items()
    ):
        lines.append(f"{fault},standard,{n},bfloat16,0.5,{caught}{facts}")
    write(folder, "faults.csv", "\n".join(lines))
    ((what, measured, _),) = fault_proofs(folder)
    assert what.endswith("on the GPU, N = 8192 and 32768")
    assert measured == "2 of 4 caught; not caught: scale off slightly in bfloat16"


def test_two_runs_are_told_apart_by_the_power_cap(folder):
    free, capped = {"throttled": None}, {"throttled": "power cap 3/9"}
    runs = {
        "lengths": [(1024, 100.0, free), (2048, 100.0, free), (4096, 100.0, free)],
        "backends": [(1024, 101.0, free), (2048, 97.0, free), (4096, 80.0, capped)],
    }
    for name, cells in runs.items():
        with Store(folder / "h200" / f"{name}.csv") as store:
            for n, us, more in cells:
                store.append([make_row(seq_len=n, median_us=us, **more)])
                store.append([make_row(seq_len=n, median_us=1.0, clock="host")])
            store.append([make_row(method="bigbird", seq_len=len(name), median_us=1.0)])
    below, at = repeat_proofs(folder)
    assert below[:2] == (
        "the same cells in several runs of one code, below the chip's power cap, device medians",
        "1 of 2 within 2 %, at most 3.1% apart",
    )
    assert at[1] == "0 of 1 within 2 %, at most 25.0% apart"
