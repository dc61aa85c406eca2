"""What cannot be true beside the chip's own ceilings, and how kernels are named."""

import pytest
import torch

from bench.ceilings import Ceilings, beyond
from bench.cells import Cell, Group, Prepared, rows_of
from bench.chip import Reading
from bench.kernels import short, tiles_of
from bench.record import environment
from bench.sampling import Series
from methods import METHODS, Problem

H200 = Ceilings(matmul_tflop_s=790.0, copy_gb_s=4300.0)
P = Problem()
PAIRS = METHODS["standard"].allowed_pairs(P)


@pytest.mark.parametrize(
    ("phase", "us", "word"),
    [
        ("fwd_bwd", 443.0, None),
        ("fwd_bwd", 150.0, "TFLOP/s"),
        ("fwd", 100.0, None),
        ("fwd", 40.0, "TFLOP/s"),
        ("bwd", 100.0, "TFLOP/s"),
    ],
)
def test_times_above_the_arithmetic_ceiling(phase, us, word):
    reason = beyond(H200, P, phase, PAIRS, us)
    assert (reason is None) if word is None else (word in reason and "790" in reason)


def test_times_above_the_bandwidth_ceiling():
    """A short sequence has little arithmetic, but at least half of its rows must be read."""
    p = Problem(seq_len=128)
    pairs = METHODS["standard"].allowed_pairs(p)
    read_us = (129 / 256) * 3 * p.q_heads * 128 * p.head_dim * 2 / (1.25 * 4300e3)
    assert beyond(H200, p, "fwd", pairs, 1.05 * read_us) is None
    assert "GB/s" in beyond(H200, p, "fwd", pairs, 0.95 * read_us)
    assert beyond(H200, p, "fwd", pairs // 2, 0.95 * read_us) is None


GROUP = Group(
    problem=P, block_size=(128, 128), cells=(), phases=("fwd",), device="cuda:0", seed=0,
    rounds=1, seconds=1.0, run="test",
)  # fmt: skip


def row_of(us, ceilings, clock="device"):
    prepared = Prepared(Cell("standard", "flex"), METHODS["standard"])
    prepared.facts["allowed_pairs"] = PAIRS
    samples = [] if us is None else [(0, us)]
    prepared.series["fwd", clock] = Series(samples, [Reading(1980, 600.0, 50, ())], discarded=2)
    rows = rows_of(GROUP, environment(torch.device("cpu")), prepared, ceilings)
    return next(row for row in rows if row.clock == clock)


def test_a_row_above_a_ceiling_has_no_number():
    row = row_of(40.0, H200)
    assert (row.status, row.median_us, row.samples) == ("mismatch", None, [])
    assert "TFLOP/s" in row.reason
    assert (row.matmul_tflop_s, row.copy_gb_s) == H200
    assert row_of(100.0, H200).median_us == 100.0
    assert row_of(40.0, None).status == row_of(40.0, H200, clock="host").status == "ok"


def test_the_other_clock_of_an_impossible_cell_has_none_either():
    prepared = Prepared(Cell("standard", "flex"), METHODS["standard"])
    prepared.facts["allowed_pairs"] = PAIRS
    for clock, us in (("device", 40.0), ("host", 500.0)):
        prepared.series["fwd", clock] = Series([(0, us)])
    rows = rows_of(GROUP, environment(torch.device("cpu")), prepared, H200)
    assert {(row.status, row.median_us) for row in rows} == {("mismatch", None)}


def test_a_row_of_a_chip_that_was_always_slowed_down_has_no_number():
    row = row_of(None, H200)
    assert (row.status, row.median_us, row.discarded) == ("timeout", None, 2)
    assert "slowed down" in row.reason


GENERATED = """
triton_tem_fused_0 = async_compile.triton('triton_tem_fused_0', '''
@triton.jit
def triton_tem_fused_0(arg_Q, arg_K):
    BLOCK_M : tl.constexpr = 128
    BLOCK_N : tl.constexpr = 64
''', device_str='cuda')
triton_tem_fused_1 = async_compile.triton('triton_tem_fused_1', '''
@triton.jit
def triton_tem_fused_1(arg_Q, arg_K):
    BLOCK_M1 : tl.constexpr = 32
    BLOCK_N1 : tl.constexpr = 96
''', device_str='cuda')
"""


@pytest.mark.parametrize(
    ("name", "shortened", "tiles"),
    [
        ("triton_tem_fused_0", "triton_tem_fused_0", "M=128 N=64"),
        ("triton_tem_fused_1", "triton_tem_fused_1", "M1=32 N1=96"),
        (
            "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 32, 4, false>>"
            "(pytorch_flash::Flash_fwd_params)",
            "pytorch_flash::flash_fwd_kernel", "128x32",
        ),
        (
            "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::Params)",
            "fmha_cutlassF_bf16_aligned_64x128_rf_sm80", "64x128",
        ),
        ("cudnn_sm90_flash_fprop_knob_7_64x128x128_4x1x1_kernel0", None, "64x128x128"),
        ("void at::native::elementwise<4>(int)", "at::native::elementwise", None),
    ],
)  # fmt: skip
def test_kernels_are_named_with_their_tiles(name, shortened, tiles):
    assert short(name) == (shortened or name)
    assert tiles_of(name, [GENERATED]) == tiles
