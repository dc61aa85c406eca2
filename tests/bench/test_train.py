"""Training throughput: steps, ranks, and what is derived from their rows."""

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

import run_bench
from bench import ahead, steps, train
from bench.backends import BACKENDS
from bench.cells import Prepared, rows_of
from bench.chip import Reading
from bench.compare import sides
from bench.models import MODELS, model_of_file
from bench.ranks import Apart, JobFailed, Ranks
from bench.record import ROOT, Store, environment, read_rows
from bench.steps import World, method_of, run_job
from bench.text import digest
from bench.trainings import scaling, trainings
from tests.bench.rows import make_row
from tests.bench.training import (
    CPU,
    LLAMA,
    built,
    config_file,
    job,
    losses,
    made,
    some_ids,
    step_row,
)

pytestmark = pytest.mark.usefixtures("short_calls")


def test_the_losses_of_backends_and_options_agree():
    reference = step_row(job())
    assert reference.status == "ok" and len(losses(reference)) == 5
    for other in (job(backend="sdpa-flash"), job(checkpointing=True)):
        row = step_row(other)
        assert row.status == "ok"
        # Five digits are written; float32 sums in another order are far below them.
        assert losses(row) == pytest.approx(losses(reference), abs=2e-4)
    sparse = step_row(job("spattention"))
    assert losses(sparse) != pytest.approx(losses(reference), abs=2e-4)


def test_a_row_holds_what_a_step_needs(monkeypatch):
    slow = Reading(1000, 300.0, 50, ("thermal",))
    fine = Reading(1980, 500.0, 40, ())
    seen = iter([slow] + 100 * [fine])
    monkeypatch.setattr(steps.chip, "reader", lambda device: lambda: next(seen, fine))
    monkeypatch.setattr(
        steps, "_call_rows", lambda *args: [make_row(clock="host", allowed_pairs=8320)]
    )
    row = step_row(job())
    assert (row.phase, row.clock, row.world_size, row.model) == ("step", "host", 1, "tiny")
    assert (row.data, row.q_heads, row.batch, row.rounds) == ("random", 4, 2, None)
    assert (row.discarded, len(row.samples), row.sm_mhz) == (1, 3, 1980)
    assert row.parameters == 2 * (12 * 64**2 + 2 * 64) + 256 * 64 + 64
    assert row.model_flops == 2 * (6 * (2 * 12 * 64**2 + 256 * 64) * 64 + 2 * 12 * 16 * 8320)


def test_the_call_of_a_model_is_gated_and_timed_before_it_trains(monkeypatch):
    call, step = run_job(job("spattention"), World(), lambda text: None)
    assert (call.phase, call.status, step.status) == ("fwd_bwd", "ok", "ok")
    assert (call.model, call.world_size, call.data) == ("tiny", 1, "random")
    assert call.recipe == step.recipe
    assert 0 < step.error_budget == call.error_budget <= 1
    assert step.allowed_pairs == call.allowed_pairs == 64 * 65 // 2
    right = BACKENDS["blockwise"]

    def wrong(*args):
        run = right.build(*args)
        return lambda q, k, v: (1.1 * run(q, k, v)[0], None)

    monkeypatch.setitem(BACKENDS, "blockwise", replace(right, build=wrong))
    monkeypatch.setattr(steps, "build", lambda *args: pytest.fail("a model was built"))
    row = step_row(job("spattention"))
    assert row.status == "mismatch" and row.median_us is None
    assert row.reason.startswith("attention by itself: ")


def test_the_identity_is_a_row_and_keeps_every_projection(tmp_path):
    row = step_row(job("identity", "identity"))
    assert (row.status, row.method, row.allowed_pairs) == ("ok", "identity", 0)
    model, _ = built(model_of_file(config_file(tmp_path, LLAMA)), "identity")
    model(*some_ids()).backward()
    assert all(x.grad.abs().max() > 0 for x in model.parameters())


def test_a_loss_that_is_no_number_is_a_mismatch():
    row = step_row(job(learning_rate=1e30))
    assert (row.status, row.median_us, row.losses) == ("mismatch", None, None)
    assert "is no number" in row.reason


def test_tokens_of_a_text_are_its_bytes_and_differ_by_rank(tmp_path):
    text = tmp_path / "text"
    text.write_bytes(bytes(range(256)) * 2)
    draw = steps.tokens(job(text=text), World(), CPU)
    ids, targets = draw()
    assert ids.shape == targets.shape == (2, 64)
    assert ((ids + 1) % 256).equal(targets)
    assert not draw()[0].equal(ids)
    assert steps.tokens(job(text=text), World(), CPU)()[0].equal(ids)
    assert not steps.tokens(job(text=text), World(1, 2), CPU)()[0].equal(ids)


def test_steps_of_two_models_are_compared_apart(tmp_path):
    samples = ";".join(f"{99 + k % 3}" for k in range(20))
    rows = [made(model=name, samples_us=samples, backend="flex") for name in ("m", "n")]
    for name in ("a.csv", "b.csv"):
        with Store(tmp_path / name) as store:
            store.append(rows)
    assert len(sides(tmp_path / "a.csv", tmp_path / "b.csv", None, None)[0].rows) == 2


@pytest.mark.parametrize(
    ("failure", "said", "status"),
    [("oom", b"0", 0), ("unsupported", b"0", 0), (None, b"1", 0), ("crash", b"1", 0),
     ("oom", None, 1)],
)  # fmt: skip
def test_a_rank_that_writes_nothing_leaves_the_status_to_the_one_that_does(
    monkeypatch, failure, said, status
):
    """torchrun ends all ranks where one fails, and the one that writes may still be drawing."""

    def run_here(*args):
        if failure:
            raise JobFailed(failure, "here or elsewhere")
        return []

    store = dist.HashStore()
    store.set("todo", "[0]")
    if said is not None:
        store.set("status", said)
    monkeypatch.setattr(Apart, "run", run_here)
    monkeypatch.setattr(train, "LAST_WORD", timedelta(milliseconds=50))
    assert train._follow([job()], train.Train(), Ranks(1, 1, 2, store)) == status


def test_without_the_baseline_only_what_was_asked_for_trains():
    asked = {"methods": ("spattention",), "backends": ("blockwise", "sdpa-flash"), "device": "cpu"}
    for baseline, dense in ((True, ["blockwise", "sdpa-flash"]), (False, [])):
        jobs = train.expand(train.Train(baseline=baseline, **asked), Ranks())
        cells = [(x.cell.method, x.cell.backend) for x in jobs]
        assert cells == [
            *(("standard", name) for name in dense), ("spattention", "blockwise"),
            ("identity", "identity"),
        ]  # fmt: skip


@pytest.fixture
def in_this_process(monkeypatch):
    """The command line without processes of its own; collects what it ran."""
    ran = []

    def run_here(apart, given, number, limit, announce):
        ran.append(given.cell)
        return run_job(given, World(), announce)

    monkeypatch.setattr(Apart, "run", run_here)
    monkeypatch.setattr(train, "ProcessPoolExecutor", lambda n, _: ThreadPoolExecutor(n))
    return ran


def test_a_run_writes_rows_and_figures_and_is_gone_on_with(tmp_path, in_this_process, capsys):
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh" * 100)
    config = config_file(tmp_path, LLAMA)
    given = [
        "train", "--model-config", str(config), "--methods", "spattention",
        "--backends", "blockwise", "--seq-len", "32", "64", "--tokens", "64", "--steps", "2",
        "--warmup", "1", "--no-compiled", "--device", "cpu", "--text", str(text), "--run", "a",
        "--output", str(tmp_path),
    ]  # fmt: skip
    assert run_bench.main(given) == 0
    rows = read_rows(tmp_path / "results" / "a.csv")
    found = [(row.seq_len, row.batch, row.method) for row in rows if row.phase == "step"]
    names = ("standard", "spattention", "identity")
    assert found == [(n, 64 // n, name) for n in (32, 64) for name in names]
    assert all(row.status == "ok" and row.data == "text.txt@031c26a1" for row in rows)
    assert {row.recipe for row in rows} == {"steps=2,warmup=1,learning_rate=0.0003,seed=0"}
    drawn = {path.stem for path in (tmp_path / "plots" / "a").iterdir()}
    model = f"tiny@{digest(config)}-uncompiled_1_64_text"
    names = f"tokens_per_s_{model}", f"speedup_{model}", f"loss_{model}_32", f"loss_{model}_64"
    assert drawn == {f"training_{name}" for name in names}
    assert "zero cost" in capsys.readouterr().out
    assert len(in_this_process) == 6
    assert run_bench.main([*given, "--resume"]) == 0
    assert len(in_this_process) == 6
    assert run_bench.main(given) == 2
    assert run_bench.main([*given, "--resume", "--methods", "local_only"]) == 0
    assert [cell.method for cell in in_this_process[6:]] == ["local_only", "local_only"]


def test_what_a_run_was_ended_in_is_tried_again_and_a_failure_of_its_own_is_not():
    given = job()
    env = environment(CPU)
    run = train._Run([given], train.Train(), Ranks(), None, Console())
    for reason, complete in ((train.ENDED, False), ("rank 1: the process was ended", True)):
        rows = run._failed(given, env, "crash", reason)
        assert run._complete(given, rows, env) is complete


def test_a_cell_that_is_measured_again_replaces_its_rows(tmp_path, monkeypatch, capsys):
    failures = {0: JobFailed("crash", train.ENDED), 1: JobFailed("crash", "[/x] y")}

    def run_here(apart, given, number, limit, announce):
        if number in failures:
            raise failures[number]
        prepared = Prepared(given.cell, method_of(given.cell), facts=steps._about(given, 1))
        both = replace(given.group, phases=("fwd_bwd", "step"))
        return rows_of(both, environment(CPU), prepared, None)

    monkeypatch.setattr(Apart, "run", run_here)
    monkeypatch.setattr(train, "ProcessPoolExecutor", lambda n, _: ThreadPoolExecutor(n))
    given = command(config_file(tmp_path, LLAMA), tmp_path, "--methods", "spattention", "--run",
                    "a")[1:]  # fmt: skip
    path = tmp_path / "results" / "a.csv"
    assert run_bench.main(given) == 1
    assert "N 64  spattention  blockwise: crash: [/x] y" in capsys.readouterr().out
    assert [(x.method, x.phase) for x in read_rows(path)] == [
        ("standard", "step"), ("spattention", "step"), ("identity", "fwd_bwd"),
        ("identity", "step"),
    ]  # fmt: skip
    failures.pop(0)
    assert run_bench.main([*given, "--resume"]) == 1
    failures.clear()
    monkeypatch.setattr(train._Run, "_complete", lambda *args: False)  # as after a change of code
    for _ in range(2):
        assert run_bench.main([*given, "--resume"]) == 0
        rows = read_rows(path)
        assert [(x.method, x.phase) for x in rows] == [
            (method, phase) for method in ("standard", "spattention", "identity")
            for phase in ("fwd_bwd", "step")
        ]  # fmt: skip
    assert {row.status for row in rows} == {"ok"}
    assert run_bench.main([*given, "--resume", "--seed", "1"]) == 0
    assert len(read_rows(path)) == 12


def test_no_more_processes_compile_than_the_device_holds(monkeypatch):
    """Each holds a layer of the model, too."""
    held = SimpleNamespace(total_memory=int(16e9))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: held)
    asked = []
    monkeypatch.setattr(train, "side_by_side", lambda *args: asked.append(args[-1]))
    for tokens in (1024, 32768, 1 << 20):
        given = job(model=MODELS["olmoe-1b-7b"])
        p = replace(given.group.problem, batch=1, seq_len=tokens, dtype="bfloat16")
        given = replace(given, group=replace(given.group, problem=p, device="cuda:0"))
        run = train._Run([given], train.Train(), Ranks(), None, Console())
        run._compile([given])
    few, fewer, one = asked
    assert ahead.MOST > few > fewer >= one == 1


@pytest.mark.parametrize(
    "change", [("--steps", "3"), ("--warmup", "2"), ("--seed", "1"), ("--learning-rate", "1e-4"),
               ("--text", "other")],
)  # fmt: skip
def test_another_recipe_or_text_is_measured_again(tmp_path, in_this_process, change):
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh" * 100)
    given = [
        "train", "--model-config", str(config_file(tmp_path, LLAMA)), "--methods", "standard",
        "--backends", "blockwise", "--seq-len", "32", "--tokens", "32", "--steps", "2",
        "--warmup", "1", "--no-compiled", "--device", "cpu", "--text", str(text), "--run", "a",
        "--output", str(tmp_path),
    ]  # fmt: skip
    assert run_bench.main(given) == 0 and len(in_this_process) == 2
    if change[0] == "--text":
        text.write_text("hgfedcba" * 100)
        change = ()
    assert run_bench.main([*given, "--resume", *change]) == 0
    assert len(in_this_process) == 4
    rows = [x for x in read_rows(tmp_path / "results" / "a.csv") if x.phase == "step"]
    assert len(trainings(rows)) == 2


FATAL = """
import multiprocessing, os
from dataclasses import dataclass
from methods.standard import Standard

if multiprocessing.parent_process() is not None and os.environ.get("RANK") == "1":
    os.kill(os.getpid(), 9)

@dataclass(frozen=True)
class Fatal(Standard):
    name = "fatal"

FATAL = Fatal()
"""


def command(config, folder, *arguments):
    return [
        str(ROOT / "run_bench.py"), "train", "--model-config", str(config), "--backends",
        "blockwise", "--seq-len", "64", "--tokens", "64", "--steps", "3", "--warmup", "1",
        "--no-compiled", "--device", "cpu", "--output", str(folder), *arguments,
    ]  # fmt: skip


def on_two(*arguments):
    """What torchrun has two processes do."""
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*start, *arguments], capture_output=True, text=True, env=environment, timeout=300
    )


def test_two_processes_train_together_and_one_that_dies_is_a_row(tmp_path):
    (tmp_path / "mine.py").write_text(FATAL)
    config = config_file(tmp_path, LLAMA)
    fatal = "--methods", f"{tmp_path / 'mine.py'}:FATAL", "--run", "two"
    done = on_two(*command(config, tmp_path, *fatal))
    assert done.returncode != 0 and "2 processes, DDP" in done.stdout, done.stderr[-2000:]
    rows = [x for x in read_rows(Path(tmp_path / "results/two.csv")) if x.phase == "step"]
    standard, fatal = rows
    assert (standard.status, standard.world_size, standard.batch) == ("ok", 2, 1)
    assert all(math.isfinite(loss) for loss in losses(standard))
    assert (fatal.method, fatal.status, fatal.world_size) == ("fatal", "crash", 2)
    assert "rank 1: the process was ended by SIGKILL" in fatal.reason


def test_two_processes_go_on_with_the_run_of_one_and_show_how_they_scale(
    tmp_path, in_this_process
):
    given = command(config_file(tmp_path, LLAMA), tmp_path, "--methods", "standard", "--run", "a")
    assert run_bench.main(given[1:]) == 0
    done = on_two(*given, "--resume")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [x for x in read_rows(tmp_path / "results/a.csv") if x.phase == "step"]
    assert [(x.method, x.world_size) for x in rows] == [
        (method, size) for size in (1, 2) for method in ("standard", "identity")
    ]
    shares = [scaling(row, rows) for row in rows]
    assert shares[:2] == [None, None] and all(share.y > 0 for share in shares[2:])
    assert "scaling" in done.stdout and f"{shares[2].y:.1%}" in done.stdout
    assert all(row.attention_us is None for row in rows)
