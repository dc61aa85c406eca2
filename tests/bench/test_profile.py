"""Profiles: what kernels add up to, what is put together, and what is refused."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import run_bench
from bench import profile
from bench.kernels import described
from bench.profile import BETWEEN, Line, calls, kernels_of, print_profile, read_profile, shown
from bench.request import expand
from bench.tables import write_table

LINE = Line(
    seq_len=1024, q_block=128, kv_block=128, device_name="chip", torch="2", code="abc",
    method="standard", params=None, backend="flex", phase="fwd", clock="device",
    kernel="large", launches=1.0, us=90.0, call_us=100.0,
)  # fmt: skip
CALL = [
    LINE,
    replace(LINE, kernel="small", us=0.9, launches=2.0),
    replace(LINE, kernel="tiny", us=0.1),
    replace(LINE, kernel=BETWEEN, us=9.0, launches=0.0),
]


def test_kernels_are_added_up_by_name_and_divided_by_the_calls():
    def event(name, us):
        return SimpleNamespace(
            name=name, time_range=SimpleNamespace(elapsed_us=lambda: us), device_type=None
        )

    replay = SimpleNamespace(count=4, events=lambda: [event("a", 8.0), event("a", 4.0)])
    spent, launches = kernels_of(replay)
    assert spent == pytest.approx({"a": 3.0})
    assert launches == pytest.approx({"a": 0.5})


def test_small_kernels_are_put_together_and_nothing_is_lost():
    rows = shown(CALL)
    assert [name for name, *_ in rows] == ["large", profile.OTHERS, BETWEEN]
    assert sum(us for *_, us in rows) == pytest.approx(LINE.call_us)
    assert rows[1][1] == 3.0  # launches


def test_lines_are_told_apart_by_call_and_survive_the_file(tmp_path):
    other = [replace(line, seq_len=2048) for line in CALL]
    write_table(tmp_path / "x.csv", CALL + other, Line)
    found = read_profile(tmp_path / "x.csv")
    assert found == CALL + other
    assert calls(found) == [CALL, other]


def test_the_table_names_the_call_and_each_share():
    console = Console(record=True, width=160)
    print_profile(CALL, console)
    text = console.export_text()
    assert "standard on flex, fwd, N = 1024" in text and "100.0 us by the device clock" in text
    assert "90.0%" in text and "9.0%" in text
    assert "blocks" not in text
    print_profile([replace(line, q_block=64, kv_block=32) for line in CALL], console)
    assert "128, bfloat16, blocks 64x32: 100.0 us" in console.export_text()


@pytest.mark.parametrize(
    ("name", "shortly"),
    [
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, "
            "std::array<char*, 1ul>>(int, at::native::FillFunctor<float>)",
            "at::native::vectorized_elementwise_kernel (FillFunctor)",
        ),
        (
            "kernel_cutlass_kernel_flash_attncuteflash_bwd_sm90FlashAttentionBackwardSm90_object"
            "_at__tensor000o111012_0",
            "FlashAttentionBackwardSm90",
        ),
        (
            "void at::native::(anonymous namespace)::elementwise_kernel_with_index<int, "
            "at::native::arange_cuda_out(c10::Scalar const&)::{lambda()#1}>(int)",
            "at::native::elementwise_kernel_with_index",
        ),
        ("triton_tem_fused_0", "triton_tem_fused_0"),
    ],
)
def test_kernels_of_many_uses_are_told_apart(name, shortly):
    assert described(name) == shortly


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_is_refused_in_one_line(capsys, tmp_path):
    command = ["profile", "--methods", "spattention", "--output", str(tmp_path)]
    assert run_bench.main(command) == 2
    complaint = capsys.readouterr().err
    assert "profile needs a CUDA device" in complaint and complaint.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.fixture
def on_a_gpu(monkeypatch):
    """A CUDA device as far as a request is looked at; nothing runs there."""
    monkeypatch.setattr(profile, "named_device", lambda text: torch.device("cuda:0"))
    monkeypatch.setattr(profile, "expand", lambda asked: expand(replace(asked, device="cpu")))
    monkeypatch.setattr(profile, "compile_ahead", lambda *asked: {})


COMMAND = ["profile", "--methods", "spattention", "--backends", "blockwise", "--run", "x"]


def outcome(monkeypatch, tmp_path, answer):
    def ran(function, jobs, set_up, time_limit, on_done, most):
        assert most == 1
        return [(job, answer) for job in jobs if answer is not None]

    monkeypatch.setattr(profile, "side_by_side", ran)
    return run_bench.main([*COMMAND, "--output", str(tmp_path)])


@pytest.mark.parametrize(
    ("answer", "status", "said"),
    [
        ((CALL, []), 0, "large"),
        (([], [("a call", "unsupported", "too wide")]), 0, "a call: unsupported: too wide"),
        (([], [("a call", "oom", "too much")]), 0, "a call: oom"),
        (([], [("a call", "mismatch", "out is off")]), 1, "a call: mismatch: out is off"),
        (None, 1, "spattention on blockwise, N = 4096, heads 8, dim 128, bfloat16: crash: no"),
    ],
)
def test_a_failed_check_or_a_dead_process_is_the_exit_status(
    monkeypatch, tmp_path, capsys, on_a_gpu, answer, status, said
):
    assert outcome(monkeypatch, tmp_path, answer) == status
    assert said in capsys.readouterr().out
    assert len(read_profile(tmp_path / "results" / "x.csv")) == (
        len(CALL) if answer and answer[0] else 0
    )
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_a_run_of_that_name_is_left_alone(monkeypatch, tmp_path, capsys, on_a_gpu):
    assert outcome(monkeypatch, tmp_path, (CALL, [])) == 0
    assert outcome(monkeypatch, tmp_path, ([], [])) == 2
    assert capsys.readouterr().err.endswith("x.csv exists; choose another --run\n")
    assert run_bench.main(["plot", str(tmp_path / "results" / "x.csv")]) == 0
    assert "100.0 us by the device clock" in capsys.readouterr().out
