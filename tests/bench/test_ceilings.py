"""What cannot be true beside the chip's own ceilings, and how kernels are named."""

from types import SimpleNamespace

import pytest
import torch

from bench import timing
from bench.ceilings import (
    READS_OVER_COPY,
    Ceilings,
    Needed,
    beyond,
    cold_bytes,
    needed_rows,
)
from bench.cells import Cell, Group, Prepared, rows_of
from bench.chip import Reading
from bench.kernels import short, tiles_of
from bench.measure import Bench, Clockwork
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
    reason = beyond(H200, P, phase, PAIRS, 0.0, us)
    assert (reason is None) if word is None else (word in reason and "790" in reason)


def test_times_above_the_bandwidth_ceiling():
    cold = 3 * P.q_heads * P.seq_len * P.head_dim * 2
    least_us = cold / (READS_OVER_COPY * 4300e3)
    assert beyond(H200, P, "fwd", 1, cold, 1.001 * least_us) is None
    assert "GB/s" in beyond(H200, P, "fwd", 1, cold, 0.999 * least_us)


CPU = torch.device("cpu")
WIDTH = {"head_dim": 16, "dtype": "float32"}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("name", ["standard", "sliding_window", "spattention", "gapped_bands",
                                  "longformer", "bigbird"])  # fmt: skip
def test_needed_rows_are_those_of_the_mask(name, causal, kv_heads):
    """Heads of spattention see distant keys alone: first queries and last keys are in no pair."""
    p = Problem(batch=2, seq_len=256, q_heads=4, kv_heads=kv_heads, causal=causal, **WIDTH)
    b, h, i, j = (torch.arange(n) for n in (2, 4, 256, 256))
    axes = b[:, None, None, None], h[:, None, None], i[:, None], j
    pairs = METHODS[name].mask_mod(p, CPU)(*axes).expand(2, 4, 256, 256)
    keys = pairs.any(2).unflatten(1, (kv_heads, -1)).any(2)
    needed = needed_rows(METHODS[name], p, CPU)
    assert needed == (int(pairs.any(3).sum()), int(keys.sum()))
    all_rows = (2 * 4 * 256, 2 * kv_heads * 256)
    assert (needed < all_rows) == (name in ("spattention", "gapped_bands"))


def test_needed_rows_of_what_follows_the_inputs():
    reformer, p = METHODS["reformer"], Problem(batch=2, seq_len=256, q_heads=2, **WIDTH)
    q = torch.randn(2, 2, 256, 16)
    assert needed_rows(reformer, p, CPU, reformer.prepare(q, q, p)) == (1024, 1024)


class Given(type(METHODS["standard"])):
    def mask_mod(self, p, device, state=None):
        return self.mask


def test_needed_rows_of_other_masks():
    """None, where nothing is seen; keys count once that one head of a group or the other sees."""
    p = Problem(seq_len=256, q_heads=2, kv_heads=1, **WIDTH)
    method = Given()
    vars(method)["mask"] = lambda b, h, i, j: (i < 0) & (j < 0)
    assert needed_rows(method, p, CPU) == (0, 0)
    vars(method)["mask"] = lambda b, h, i, j: torch.where(
        h == 0, (i >= 32) & (j <= i), i - j == 32
    )
    assert needed_rows(method, p, CPU) == (2 * 224, 256)


ROW = 16 * 4  # bytes


@pytest.mark.parametrize(
    ("phase", "shared", "read", "written"),
    [
        ("fwd", False, 50 + 2 * 20, 2 * 4 * 64),
        ("bwd", False, 2 * 50 + 2 * 20, 2 * (4 + 2 * 2) * 64),
        ("fwd_bwd", False, 2 * 50 + 2 * 20, 2 * (4 + 2 * 2) * 64),
        ("fwd", True, 50 + 20, 2 * 4 * 64),
        ("bwd", True, 2 * 50 + 20, 2 * (4 + 2) * 64),
    ],
)
def test_cold_bytes(phase, shared, read, written):
    """All that is read and written, less what a cache holds of many sets and of one result."""
    p = Problem(batch=2, seq_len=64, q_heads=4, kv_heads=2, **WIDTH)

    def cold(l2_bytes, sets):
        return cold_bytes(p, phase, Needed(50, 20), shared_qk=shared, l2_bytes=l2_bytes, sets=sets)

    assert cold(0, 1) == (read + written) * ROW
    assert cold(10 * ROW, 1) == (read - 10 + written - 10) * ROW
    assert cold(10 * ROW, 5) == (read - 2 + written - 10) * ROW
    assert cold(1000 * ROW, 1000) == (read - 1) * ROW + max(0, written - 1000) * ROW
    assert cold(10000 * ROW, 1) == 0


@pytest.mark.parametrize("captured", [True, False])
def test_what_a_cell_must_move_is_known_of_every_product(monkeypatch, captured):
    """Calls of a graph go round all sets of inputs; a call by CUPTI has one."""
    bench = Bench(GROUP, CPU, Clockwork())
    bench.device, bench.inputs = torch.device("cuda:0"), bench.inputs * 3

    def sampler(calls, device):
        if not captured:
            raise RuntimeError("it waits")
        return SimpleNamespace(last=None)

    monkeypatch.setattr(timing, "device_sampler", sampler)
    monkeypatch.setattr(timing, "l2_bytes", lambda device: 3000)
    monkeypatch.setattr(timing, "host_sampler", lambda call, device: None)
    monkeypatch.setattr("bench.measure.raise_if_lost", lambda device: None)
    prepared = Prepared(Cell("standard", "flex"), METHODS["standard"])
    bench._add_samplers(prepared, None, "fwd")
    bench._add_samplers(prepared, None, "prepare")
    size = P.q_heads * P.seq_len * P.head_dim * 2
    left = 1000 if captured else 3000
    clock = "device" if captured else "kernels"
    assert prepared.cold == {("fwd", clock): (3 * size - left) + (size - 3000)}


GROUP = Group(
    problem=P, block_size=(128, 128), cells=(), phases=("fwd",), device="cuda:0", seed=0,
    rounds=1, seconds=1.0, run="test",
)  # fmt: skip


def row_of(us, ceilings, clock="device", cold=0.0):
    prepared = Prepared(Cell("standard", "flex"), METHODS["standard"])
    prepared.facts["allowed_pairs"] = PAIRS
    prepared.cold["fwd", "device"] = cold
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
    assert row_of(100.0, H200, cold=0.999 * 4300e3 * READS_OVER_COPY * 100).status == "ok"
    row = row_of(100.0, H200, cold=1.001 * 4300e3 * READS_OVER_COPY * 100)
    assert (row.status, row.median_us) == ("mismatch", None)
    assert "GB/s" in row.reason
    assert row_of(40.0, None).status == row_of(40.0, H200, clock="host").status == "ok"


def test_the_other_clock_of_an_impossible_cell_has_none_either():
    prepared = Prepared(Cell("standard", "flex"), METHODS["standard"])
    prepared.facts["allowed_pairs"] = PAIRS
    prepared.cold["fwd", "device"] = 0.0
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
