"""The commands behind results/h200: each is one that the suite takes, and of what its file has."""

import csv
import itertools
import sys
from pathlib import Path

import pytest

from bench.backends import BACKENDS
from bench.record import ROOT, read_rows
from bench.specs import parse_method
from run_bench import _parse
from tests.gpu import results
from tests.gpu.results import COMMANDS, SWEEP, TRAIN, arguments, chosen, run

H200 = ROOT / "results" / "h200"
FILES = sorted(x.stem for x in H200.glob("*.csv") if "." not in x.stem)
# A flag of a command, and the column that has its values.
AXES = {
    "seq_len": "seq_len", "backends": "backend", "phases": "phase", "head_dim": "head_dim",
    "heads": "q_heads", "dtype": "dtype", "causal": "causal", "batch": "batch",
    "block_size": "q_block",
}  # fmt: skip


def requests(name):
    """What the suite makes of the commands of a file, as far as they are its own."""
    for command in COMMANDS[name]:
        words = arguments(name, command, Path("out"))
        (start,) = (k for k, word in enumerate(words, 1) if word.endswith("run_bench.py"))
        yield _parse(words[start:])


def cells_of(request, backends):
    """Names of the methods that are asked for, and those of the backends that compute each."""
    specs = (*request.methods, *(["standard"] if request.baseline else []))
    return {
        (method.name, backend)
        for method in map(parse_method, specs)
        for backend in backends
        if BACKENDS[backend].computes(method)
    }


@pytest.mark.parametrize("name", [x for x in COMMANDS if "-m " not in COMMANDS[x][0]])
def test_the_suite_takes_every_command(name):
    for request in requests(name):
        assert str(request.output) == "out"
        assert request.run in (name, name.removesuffix("_speeds"))


@pytest.mark.parametrize("name", FILES)
def test_a_committed_file_has_nothing_that_its_commands_do_not_ask_for(name):
    """Of those that a sweep or a training made; an axis that a command leaves open is its own."""
    if not COMMANDS[name][0].startswith((SWEEP, TRAIN)):
        return
    asked = list(requests(name))
    with (H200 / f"{name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = {parse_method(spec).name for request in asked for spec in request.methods}
    assert {row["method"] for row in rows} <= names | {"standard", "identity"}
    assert {row["run"] for row in rows} <= {name, name.removesuffix("_float32"), f"{name}_2"}
    for flag, column in AXES.items():
        given = [getattr(request, flag, None) for request in asked]
        if None not in given:
            allowed = {str(value) for values in given for value in values} | {"identity", "step"}
            assert {row[column] for row in rows} <= allowed, column


# What the README says is not measured yet: method, backend, N, processes.
STAND_INS = "mehc_longformer", "mehc_bigbird", "mehc_reformer"
UNMEASURED = {
    "train_table2": {("identity", "identity", 8192, 2)},
    "train_paper": {(name, where, 1024, 1) for name in STAND_INS for where in ("flex", "eager")},
}  # fmt: skip


CELL_AXES = "seq_len", "heads", "head_dim", "dtype", "phases"
ON_A_GPU = {"seq_len": (1024, 4096, 16384), "head_dim": (128,), "dtype": ("bfloat16",)}
SWEEPS = [x for x in FILES if COMMANDS[x][0].startswith(SWEEP)]


@pytest.mark.parametrize("name", SWEEPS)
def test_a_committed_sweep_has_every_cell_that_its_commands_ask_for(name):
    """On the backends that it had: `default` and others ran without flash-attn-4."""
    rows = read_rows(H200 / f"{name}.csv")
    had = {row.backend for row in rows}
    asked = set()
    for request in requests(name):
        axes = [getattr(request, x) or ON_A_GPU[x] for x in CELL_AXES]
        cells = itertools.product(cells_of(request, request.backends or had), *axes)
        asked |= {(*cell, *place) for cell, *place in cells}
    columns = "method", "backend", *(AXES[x] for x in CELL_AXES)
    found = {tuple(getattr(row, x) for x in columns) for row in rows}
    assert asked and asked <= found


@pytest.mark.parametrize("name", [x for x in FILES if TRAIN in COMMANDS[x][0]])
def test_a_committed_training_lacks_nothing_but_what_the_readme_says(name):
    asked = set()
    for command, request in zip(COMMANDS[name], requests(name), strict=True):
        cells = cells_of(request, request.backends) | {("identity", "identity")}
        processes = 2 if command.startswith("torchrun") else 1
        asked |= {(*cell, n, processes) for cell in cells for n in request.seq_len}
    steps = [row for row in read_rows(H200 / f"{name}.csv") if row.phase == "step"]
    found = {(row.method, row.backend, row.seq_len, row.world_size) for row in steps}
    assert asked - found == UNMEASURED.get(name, set())


def test_names_stand_for_all_that_begin_so():
    assert chosen([]) == list(COMMANDS)
    assert chosen(["train_olmoe", "point"]) == ["point", "train_olmoe_small", "train_olmoe_large"]
    with pytest.raises(ValueError, match="'nothing' is no file's name; they are default, "):
        chosen(["nothing"])


@pytest.mark.parametrize(("status", "good"), [(0, True), (3, False)])
def test_a_file_is_made_by_all_its_commands_even_where_one_fails(
    monkeypatch, tmp_path, capsys, status, good
):
    script = tmp_path / "said.py"
    script.write_text(f"import sys; print(sys.argv[1:]); sys.exit({status})")
    commands = ("run_bench.py sweep --heads 1", "torchrun -- run_bench.py train", "-m x y")
    monkeypatch.setitem(results.COMMANDS, "made", commands)
    monkeypatch.setattr(results.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(
        results, "arguments", lambda name, command, folder: [sys.executable, script, command]
    )
    assert run("made", tmp_path, tmp_path) is good
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == ["made"] * 3
    assert said[0].startswith(f"made: status {status}, ")
    assert said[1] == f"made: left out, which needs two GPUs: {commands[1]}"
    assert (tmp_path / "made.log").read_text().splitlines() == [
        str([commands[0]]), str([commands[2]])
    ]  # fmt: skip


def test_without_a_gpu_nothing_is_begun(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["results", "lengths", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        results.main()
    said = capsys.readouterr().err
    assert (stop.value.code, said.count("\n"), list(tmp_path.iterdir())) == (2, 1, [])
    assert "there is none here" in said
