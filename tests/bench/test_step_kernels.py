"""A step's time by kernels, from a device that runs what the tests say."""

from types import SimpleNamespace

import pytest
import torch

from bench import step_kernels, steps
from bench.derived import by_kind
from bench.step_kernels import COUNTED, WARM_US, Parts, kernel_split, kind_of
from bench.steps import World
from tests.bench.training import CPU, job, step_row

CUDA = torch.device("cuda:0")
STEP = (
    ("## Call CompiledFxGraph ##", 0, 100), ("nvjet_sm90_tst_128x256", 0, 10),
    ("triton_tem_fused_flex_attention_0", 10, 30), ("ncclDevKernel", 25, 45),
    ("pytorch_flash::flash_fwd_kernel", 50, 55),
)  # fmt: skip
BOUNDARY = "vectorized_elementwise_kernel<erfinv, double>"


class Device:
    """Runs kernels one step after the other; the first steps after a rest are twice as fast."""

    def __init__(self, monkeypatch, kernels=STEP, fast=0):
        self.kernels, self.fast, self.now, self.steps, self.events = kernels, fast, 0.0, 0, []
        monkeypatch.setattr(step_kernels.timing, "kernel_events", self.kernel_events)
        monkeypatch.setattr(step_kernels, "_boundary", lambda device: self.boundary)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    def kernel_events(self, call, device):
        self.events, self.steps = [], 0
        call()
        return self.events

    def step(self):
        speed = 2 if self.steps < self.fast else 1
        for name, *ends in self.kernels:
            self.run(name, *(self.now + x / speed for x in ends))
        self.now, self.steps = self.now + 100 / speed, self.steps + 1

    def boundary(self):
        self.run(BOUNDARY, self.now, self.now + 1)
        self.now += 1

    def run(self, name, start, end):
        note = name.startswith("##")
        span = SimpleNamespace(start=start, end=end)
        self.events.append(SimpleNamespace(name=name, time_range=span, is_user_annotation=note))


def test_a_step_is_kernels_of_attention_and_the_rest(monkeypatch):
    """What runs beside attention is no rest; gaps between kernels are, but for the last's end."""
    whole = 100 - 45 / COUNTED  # the last step counts up to its last kernel
    split = kernel_split(Device(monkeypatch).step, CUDA, WARM_US, True)
    assert split[:2] == pytest.approx((25, whole - 25))
    listed = (
        "20 attention triton_tem_fused_flex_attention_0;20 other ncclDevKernel;"
        "10 product nvjet_sm90_tst_128x256;5 attention pytorch_flash::flash_fwd_kernel"
    )
    assert split.step_kernels == listed
    unnamed = Device(monkeypatch, [STEP[1], STEP[3]])
    listed = "20 other ncclDevKernel;10 product nvjet_sm90_tst_128x256"
    assert kernel_split(unnamed.step, CUDA, WARM_US, True) == Parts(None, None, listed)
    split = kernel_split(unnamed.step, CUDA, WARM_US, False)
    assert split[:2] == pytest.approx((0, 100 - 55 / COUNTED))
    assert kernel_split(unnamed.step, CPU, WARM_US, True) == Parts(None, None, None)


def test_steps_of_a_rested_chip_run_first_and_do_not_count(monkeypatch):
    device = Device(monkeypatch, fast=7)
    attention, rest, _ = kernel_split(device.step, CUDA, WARM_US / 6.5, True)
    assert (attention, attention + rest) == pytest.approx((25, 100 - 45 / COUNTED))
    assert device.steps == 7 + COUNTED


def test_copies_that_inductor_names_by_their_reader_are_no_attention(monkeypatch):
    """In a model compiled with scaled_dot_product_attention inside."""
    copies = "triton_poi_fused__scaled_dot_product_flash_attention_clone_0", 60, 70
    device = Device(monkeypatch, [*STEP, copies])
    assert kernel_split(device.step, CUDA, WARM_US, True)[0] == pytest.approx(25)
    own = "triton_per_fused_flex_attention_backward_0", 60, 70
    device = Device(monkeypatch, [*STEP, own])
    assert kernel_split(device.step, CUDA, WARM_US, True)[0] == pytest.approx(35)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("kernel_cutlass_kernel_flash_attncuteflash_bwd_sm90FlashAttentionBackwardSm90_object_at_",
         "attention"),
        ("void cutlass::device_kernel<flash::FlashAttnFwdSm90<flash::CollectiveMainloop>>(Params)",
         "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7", "attention"),
        ("nvjet_sm90_tst_192x192_64x4_1x2_h_bz_coopB_TNN", "product"),
        ("void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<int>>(Params)",
         "product"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>(Params)", "product"),
        ("triton_tem_fused__grouped_mm_12", "product"),
        ("triton_poi_fused__to_copy_mm_mul_silu_7", "generated"),
        ("triton_poi_fused__scaled_dot_product_flash_attention_clone_0", "generated"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous"
         " namespace)::FusedOptimizerTensorListMetadata<4>, at::native::(anonymous namespace)::"
         "FusedAdamMathFunctor<c10::BFloat16, 4>>(Params)", "optimizer"),
        ("Memset (Device)", "other"),
    ],
)  # fmt: skip
def test_the_kind_of_a_kernel_is_in_its_name(name, kind):
    assert kind_of(name) == kind


def test_small_kernels_of_a_kind_are_one_line(monkeypatch):
    """Not those of two: the sum of a kind stays whole."""
    small = [(f"triton_poi_{k}", 60 + k * 0.1, 60.1 + k * 0.1) for k in range(30)]
    device = Device(monkeypatch, [*STEP, *small])
    listed = kernel_split(device.step, CUDA, WARM_US, True).step_kernels
    assert "3 generated others" in listed and "triton_poi" not in listed
    assert by_kind(listed) == pytest.approx(
        {"attention": 25, "other": 20, "product": 10, "generated": 3}
    )


def test_a_profiler_that_sees_nothing_is_an_error(monkeypatch):
    device = Device(monkeypatch)
    monkeypatch.setattr(step_kernels.timing, "kernel_events", lambda call, on: [])
    with pytest.raises(RuntimeError, match="CUPTI did not see where"):
        kernel_split(device.step, CUDA, WARM_US, False)


def test_a_step_that_cannot_be_split_keeps_its_time(monkeypatch):
    def fails(*args):
        raise RuntimeError("CUPTI has no memory")

    monkeypatch.setattr(steps, "kernel_split", fails)
    row = steps.run_job(job("identity", "identity"), World(), lambda text: None)[-1]
    assert (row.status, row.attention_us) == ("ok", None) and row.median_us > 0 and row.losses
    assert row.reason == "not split by kernels: RuntimeError: CUPTI has no memory"


def test_of_a_step_whose_attention_has_no_name_there_are_its_kernels(monkeypatch):
    """As of FlexAttention that is not compiled: products and elementwise work, like any other."""
    parts = Parts(step_kernels="9 product bmm")
    monkeypatch.setattr(steps, "kernel_split", lambda *args: parts)
    row = step_row(job("standard"))
    assert (row.status, row.attention_us, row.step_kernels) == ("ok", None, "9 product bmm")
    assert row.reason == "not split: no kernel is named for attention"


def test_kernels_that_are_no_list_are_named():
    with pytest.raises(ValueError, match="step_kernels is '1 product', not lists of us, kind"):
        by_kind("1 product")


@pytest.mark.parametrize(("world", "split"), [(World(), Parts(3.0, 4.0)), (World(0, 2), None)])
def test_one_process_alone_is_split(monkeypatch, world, split):
    """Of several, each would count what it waits for the others in kernels."""
    monkeypatch.setattr(World, "_reduced", lambda self, values, device, by: list(values))
    monkeypatch.setattr(steps, "_spread", lambda model, *rest: model)
    monkeypatch.setattr(steps, "kernel_split", lambda *args: split)
    row = steps.run_job(job("identity", "identity"), world, lambda text: None)[-1]
    assert (row.status, row.world_size) == ("ok", world.size)
    assert (row.attention_us, row.other_us) == (split or Parts())[:2]
