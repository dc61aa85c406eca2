"""The command line from end to end: a real process, its CSV, its exit status, its refusals."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import run_bench
from bench import sweep
from bench.record import ROOT, read_rows
from bench.request import Sweep, expand, left_out, title
from tests.bench.rows import make_row

SMALL = [
    "--seq-len", "96", "--heads", "4", "--head-dim", "16", "--rounds", "3", "--seconds", "0.01",
    "--methods", "spattention", "--backends", "blockwise", "sdpa-flash",
]  # fmt: skip


def run(*arguments, folder):
    command = [sys.executable, str(ROOT / "run_bench.py"), *arguments, "--output", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def test_a_sweep_writes_rows_tables_and_figures_and_resumes(tmp_path):
    first = run(*SMALL, "--run", "a", folder=tmp_path)
    assert first.returncode == 0, first.stderr
    path = tmp_path / "results" / "a.csv"
    rows = read_rows(path)
    cells = {(row.method, row.backend) for row in rows}
    assert cells == {("standard", "blockwise"), ("standard", "sdpa-flash"),
                     ("spattention", "blockwise")}  # fmt: skip
    assert len(rows) == len({(row.method, row.backend, row.phase) for row in rows}) == 12
    assert "spattention" in first.stdout
    progress = first.stdout.split("spattention")[0].splitlines()
    assert "measuring N 96, heads 4, dim 16, float32: problem 1 of 1" in progress
    assert list((tmp_path / "plots" / "a").glob("*.png"))

    refused = run(*SMALL, "--run", "a", folder=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "--resume" in refused.stderr

    text = path.read_text()
    path.write_text(text + text.splitlines()[1][:40])  # as an interrupted write leaves it
    again = run(*SMALL[:2], "96", "128", *SMALL[2:], "--run", "a", "--resume", folder=tmp_path)
    assert again.returncode == 0, again.stderr
    assert path.read_text().startswith(text)  # what was complete is not measured again
    assert [row.seq_len for row in read_rows(path)] == [96] * 12 + [128] * 12


def test_without_the_baseline_nothing_dense_is_measured(tmp_path):
    done = run(*SMALL, "--no-baseline", "--phases", "fwd_bwd", "--run", "a", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    (row,) = read_rows(tmp_path / "results" / "a.csv")
    assert (row.method, row.backend, row.status) == ("spattention", "blockwise", "ok")
    assert "spattention" in done.stdout and "standard  " not in done.stdout


def test_incomplete_groups_are_measured_again_whole(tmp_path):
    assert run(*SMALL, "--run", "a", folder=tmp_path).returncode == 0
    path = tmp_path / "results" / "a.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5]))
    assert run(*SMALL, "--run", "a", "--resume", folder=tmp_path).returncode == 0
    rows = read_rows(path)
    assert len(rows) == len({(row.method, row.backend, row.phase) for row in rows}) == 12
    other = ["local_only" if word == "spattention" else word for word in SMALL]
    assert run(*other, "--run", "a", "--resume", folder=tmp_path).returncode == 0
    methods = [row.method for row in read_rows(path)]  # what was not asked for stays
    assert {name: methods.count(name) for name in methods} == {
        "spattention": 4, "standard": 8, "local_only": 4,
    }  # fmt: skip


def test_a_problem_that_no_memory_holds_is_rows_and_the_sweep_goes_on(tmp_path):
    huge = ["--seq-len", "16777216", "96", "--heads", "64", "--head-dim", "1024"]
    answer = run(*huge, *SMALL[6:], "--run", "a", "--phases", "fwd", folder=tmp_path)
    rows = read_rows(tmp_path / "results" / "a.csv")
    assert answer.returncode == 0, answer.stderr
    assert {row.status for row in rows if row.seq_len > 96} == {"oom"}
    assert {row.status for row in rows if row.seq_len == 96} == {"ok"}


def test_only_methods_that_were_measured_are_drawn_in_this_process(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("""
from dataclasses import dataclass
from typing import ClassVar
from methods import Method

@dataclass(frozen=True)
class Mine(Method):
    name: ClassVar[str] = "mine"
    paper: ClassVar[str] = "none"
    wrong: bool = False

    def mask_mod(self, p, device, state=None):
        if self.wrong:
            raise SystemExit("drawn")
        return lambda b, h, i, j: i >= j

METHOD = Mine()
""")
    specs = (f"{file}:METHOD", f"{file}:METHOD:wrong=True")
    rows = [make_row(method="mine", params="wrong=False"),
            make_row(method="mine", params="wrong=True", status="crash")]  # fmt: skip
    drawn = sweep._draw_own_masks(Sweep(methods=specs), rows, tmp_path)
    assert {path.stem for path in drawn} == {"mask_mine_wrong=False"}
    with pytest.raises(SystemExit):
        changed = [rows[0], replace(rows[1], status="ok")]
        sweep._draw_own_masks(Sweep(methods=specs), changed, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "spatention"], "did you mean spattention"),
        (["--methods"], "--methods is an empty list"),
        (["--seq-len"], "--seq-len is an empty list"),
        (["--methods", "sliding_window:w=3"], "it has window"),
        (["--heads", "6", "--kv-heads", "4"], "--heads 6 is not a multiple of --kv-heads 4"),
        (["--seq-len", "0"], "--seq-len is 0"),
        (["--seq-len", "-4"], "--seq-len is -4"),
        (["--seq-len", "99999999999"], "1 to 16777216"),
        (["--seq-len", "many"], "error: --seq-len is 'many'; it takes whole numbers\n"),
        (["--seconds", "long"], "error: --seconds is 'long'; it takes numbers\n"),
        (["--seq-lenn", "256"], "error: --seq-lenn is no option of sweep; perhaps --seq-len; "),
        (["--methods", "sliding_window:window=wide"], "a value is no number, text in quotes"),
        (["--head-dim", "8"], "--head-dim is 8"),
        (["--dtype", "fp8"], "bfloat16, float16, float32, float64"),
        (["--device", "tpu"], "--device is 'tpu'"),
        (["--backends", "sdpa-cudnn", "--device", "cpu"], "this machine lacks"),
        (["--backends", "flexx"], "--backends has 'flexx'"),
        (["--methods", "spattention", "--backends", "sdpa-flash"], "none of sdpa-flash computes"),
        (["--phases", "step"], "--phases has 'step'"),
        (["--block-size", "12"], "--block-size has '12'"),
        (["--block-size", "64x"], "--block-size has '64x'"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--time-limit", "inf"], "--time-limit is inf; it must be above 0, and 1000000 at most"),
        (["--seconds", "nan"], "--seconds is nan"),
        (["--run", "a/b"], "--run is 'a/b'"),
        (["--resume"], "--resume goes on with a run, so it needs its name: --run NAME"),
        (["train", "--resume"], "so it needs its name: --run NAME"),
        (["--frobnicate", "3"], "--frobnicate"),
        (["--methods", "nowhere.py:METHOD"], "does not exist"),
        (["dance"], "'dance' is no command; it takes sweep, train, profile, plot, compare,"),
        (["--method", "standard"], "error: --method is no option of sweep; perhaps --methods; "),
        (["plot"], "error: plot needs PATH; plot --help says what that is\n"),
        (["compare", "--methods", "x", "a"], "error: compare needs csv; compare --help says"),
        (["train", "--model"], "error: --model needs a value; train --help says what it takes"),
        (["plot", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_a_wrong_request_is_one_line_and_writes_nothing(arguments, message, tmp_path, capsys):
    writes = [] if arguments[0] in ("plot", "dance") else ["--output", str(tmp_path)]
    assert run_bench.main([*arguments, *writes]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_resuming_what_is_not_there_says_so(tmp_path):
    """The name may be mistyped."""
    there, missing = tmp_path / "a.csv", tmp_path / "b.csv"
    there.touch()
    assert title(there, resume=True) == f"run a: {there}"
    assert title(missing, resume=False) == f"run b: {missing}"
    told = f"run b: {missing}; there is none to go on with, so it begins"
    assert title(missing, resume=True) == told


def test_backends_of_no_use_are_named():
    banded = {"methods": ("spattention", "bigbird"), "device": "cpu"}
    asked = Sweep(**banded, backends=("flex", "sdpa-flash", "hf"))
    assert left_out(asked) is None  # one is there for `standard`, one for `bigbird`
    alone = replace(asked, methods=("spattention",), baseline=False)
    assert left_out(alone) == "left out: sdpa-flash, hf (computes none of the methods)"


def test_an_interrupted_run_says_where_its_time_went(monkeypatch, tmp_path):
    def measure(request, groups, store, clockwork, console):
        with clockwork.on("sample"):
            raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "_measure", measure)
    assert run_bench.main([*SMALL, "--output", str(tmp_path)]) == 130
    (path,) = (tmp_path / "results").glob("*.time.csv")
    lines = path.read_text().splitlines()
    assert [line.split(",")[1] for line in lines] == ["spent_on", "sample", "rest"]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, capsys):
    (tmp_path / "results").touch()
    assert run_bench.main([*SMALL, "--output", str(tmp_path)]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_every_combination_is_a_group_and_standard_is_always_there():
    request = Sweep(
        methods=("spattention",), seq_len=(64, 128), heads=(4, 8), kv_heads=(2, 4),
        head_dim=(16,), causal=(True, False), device="cpu", block_size=("64", "64x32"),
    )  # fmt: skip
    groups = expand(request)
    assert len(groups) == len({(g.problem, g.block_size) for g in groups}) == 2 * 2 * 2 * 2 * 2
    assert {cell.method for cell in groups[0].cells} == {"standard", "spattention"}
    assert groups[0].problem.dtype == "float32"


def test_a_method_named_twice_is_one_cell():
    names = ("sliding_window", "standard", "sliding_window:window=512", "sliding_window:window=64")
    cells = expand(Sweep(methods=names, seq_len=(64,), device="cpu", backends=("flex",)))[0].cells
    assert [cell.method for cell in cells] == ["standard", names[0], names[3]]


def test_a_method_that_fits_no_problem_is_refused_and_one_that_fits_some_is_not():
    request = Sweep(methods=("longformer:n_global=100",), seq_len=(64,), device="cpu")
    with pytest.raises(ValueError, match="n_global"):
        expand(request)
    assert len(expand(replace(request, seq_len=(64, 1024)))) == 2
    assert expand(replace(request, methods=Sweep.methods))  # those that do not fit are rows


def test_list_says_that_reformer_s_buckets_leak_the_future(capsys):
    assert run_bench.main(["list"]) == 0
    assert "its buckets leak the future, as the references' do" in capsys.readouterr().out


def test_list_names_every_method_and_backend(capsys):
    assert run_bench.main(["list"]) == 0
    out = capsys.readouterr().out
    for name in ("spattention_released", "window=512", "sdpa-cudnn", "not here"):
        assert name in out


def test_the_command_line_is_its_own_help():
    command = [sys.executable, str(Path(run_bench.__file__)), "sweep", "--help"]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0
    assert "--seq-len" in answer.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="finds what is loaded in /proc")
def test_an_interrupt_while_torch_is_imported_leaves_no_traceback():
    command = [sys.executable, str(Path(run_bench.__file__)), "list"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored here
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    with process:
        deadline = time.monotonic() + 120
        while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == ""
    assert process.returncode == -signal.SIGINT
