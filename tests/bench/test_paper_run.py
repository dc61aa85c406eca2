"""The command: what it makes, measures, takes and refuses; and what of it is committed."""

import contextlib
import dataclasses
import io
import re
from dataclasses import fields

import numpy as np
import pytest
from matplotlib.image import imread

from bench import paper_figures, paper_run
from bench.complexity import complexity
from bench.paper_page import page
from bench.paper_run import read_results
from bench.paper_speeds import micro_benchmark, throughput
from bench.record import ROOT, Store, read_rows
from bench.specialisation import RECIPE, Specialised, specialisation
from bench.trained_heads import written
from methods import METHODS
from run_bench import main
from tests.bench.rows import make_row, sweep_rows
from tests.bench.test_paper import trained_heads


def test_a_table_comes_from_the_file_that_has_most_of_it(quick, tmp_path):
    for name, methods in (("one", ("standard",)), ("all", ("standard", "spattention"))):
        with Store(tmp_path / f"{name}.csv") as store:
            store.append(list(sweep_rows((1024, 4096), methods=methods)))
    files = [str(tmp_path / f"{name}.csv") for name in ("one", "all")]
    assert main(["paper", "--output", str(tmp_path), "--rows", *files]) == 0
    found = read_results(tmp_path / "results" / "paper")
    assert {x.source for x in (*found.micro_benchmark, *found.throughput)} == {"all.csv"}


@pytest.fixture(scope="module")
def quick():
    """The command with fewer counts and one small untrained stack, without a GPU or old rows."""
    small = dataclasses.replace(RECIPE, batch=1, seq_len=64, head_dim=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper_run, "complexity", lambda: complexity(sizes=((1024, 8),)))
        patch.setattr(
            paper_run, "specialisation", lambda: specialisation(p=small, layers=2, seeds=(0,))
        )
        patch.setattr("torch.cuda.is_available", lambda: False)
        patch.setattr(paper_run, "COMMITTED", ROOT / "results" / "none")
        yield


@pytest.fixture(scope="module")
def made(quick, tmp_path_factory):
    """The folders of tables and of pictures, and what was said."""
    base, said = tmp_path_factory.mktemp("paper"), io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main(["paper", "--output", str(base), "--run", "again"]) == 0
    folders = (base / kind / "again" for kind in ("results", "plots"))
    return (*folders, " ".join(said.getvalue().split()))


def test_the_command_makes_all_and_says_what_it_skips(made):
    tables, plots, said = made
    assert "skipped: measuring the micro-benchmark and Table 2 needs a GPU" in said
    assert "speeds: none" in said
    assert sorted(p.name for p in tables.iterdir()) == [
        "complexity.csv", "micro_benchmark.csv", "specialisation.csv", "throughput.csv",
        "trained_heads.csv",
    ]  # fmt: skip
    text = (plots / "README.md").read_text()
    assert text == page(read_results(tables))
    pictures = re.findall(r"\]\((\S+\.png)\)", text)
    assert sorted(pictures) == sorted(path.name for path in plots.glob("*.png"))
    assert len(pictures) == 8
    assert {path.with_suffix(".svg") for path in plots.glob("*.png")} == set(plots.glob("*.svg"))


def test_pictures_show_masks_and_block_classes(made):
    _, plots, _ = made

    def share(name, colour):
        picture = imread(plots / f"{name}.png")[..., :3]
        wanted = np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)]) / 255
        return (np.abs(picture - wanted).max(-1) < 0.04).mean()

    (_, partial), (_, full) = paper_figures.CLASSES.values()
    for stem in ("figure_1_spattention", "figure_1_spattention_released", "figure_2"):
        assert share(stem, "#12406f") > 0.01
        assert share(stem, partial) == 0 < share(f"{stem}_blocks", partial)
    assert share("figure_1_spattention_released_blocks", full) > 0
    assert share("figure_1_spattention_blocks", full) == 0


@pytest.mark.parametrize("status", [0, 1])
def test_with_a_gpu_both_shapes_are_measured(quick, tmp_path, monkeypatch, status):
    asked = []

    def measured(request, console):
        asked.append(request)
        with Store(tmp_path / "results" / f"{request.run}.csv") as store:
            store.append(sweep_rows((1024, 4096), methods=("standard", "spattention")))
        return status

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(paper_run, "sweep", measured)
    monkeypatch.setattr(paper_run, "draw", lambda results, folder: None)
    assert main(["paper", "--output", str(tmp_path)]) == status
    request, uncompiled = asked
    assert (request.seq_len, request.heads, request.head_dim) == ((1024, 4096), (8,), (128,))
    assert request.methods == tuple(METHODS) and request.backends is None
    assert (uncompiled.seq_len, uncompiled.heads, uncompiled.head_dim) == ((4096,), (8,), (128,))
    assert uncompiled.methods == ("spattention", "spattention_released")
    assert (uncompiled.backends, uncompiled.phases) == (("eager",), ("fwd_bwd",))
    assert {(x.run, x.output, x.resume) for x in asked} == {
        ("paper_speeds", str(tmp_path), True)
    }  # fmt: skip
    results = read_results(tmp_path / "results" / "paper")
    assert [x.method for x in results.micro_benchmark] == ["spattention"]
    assert {x.source for x in results.throughput} == {"paper_speeds.csv"}


def test_training_steps_are_those_of_this_machine_or_committed_ones(quick, tmp_path, monkeypatch):
    """And what their heads were like; with and without a GPU."""
    committed, own = tmp_path / "committed", tmp_path / "own"
    step = {"seq_len": 1024, "phase": "step", "clock": "host", "model": "table2",
            "world_size": 1, "batch": 4, "data": "words@12", "recipe": "steps=3"}  # fmt: skip
    kept = written([Specialised(**{f.name: getattr(line, f.name) for f in fields(Specialised)})
                    for line in trained_heads()])  # fmt: skip
    for folder, name in ((committed, "train_old.csv"), (own / "results", "train_new.csv")):
        folder.mkdir(parents=True)
        with Store(folder / name) as store:
            store.append([make_row(method=m, median_us=9.0, heads=kept, **step)
                          for m in ("standard", "spattention")])  # fmt: skip
    monkeypatch.setattr(paper_run, "COMMITTED", committed)
    monkeypatch.setattr(paper_run, "sweep", lambda request, console: 0)
    monkeypatch.setattr(paper_run, "draw", lambda results, folder: None)
    for gpu, folder, source in (
        (False, own, "train_old.csv"), (True, own, "train_new.csv"),
        (True, tmp_path / "bare", "train_old.csv"),
    ):  # fmt: skip
        monkeypatch.setattr("torch.cuda.is_available", lambda gpu=gpu: gpu)
        monkeypatch.setattr(paper_run, "_measured", lambda run, base, _: (speeds(base), 0))
        assert main(["paper", "--output", str(folder)]) == 0
        found = read_results(folder / "results" / "paper")
        assert {x.source for x in (*found.throughput, *found.trained_heads)} == {source}


def speeds(base):
    path = base / "results" / "paper_speeds.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with Store(path):
        return path


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--run", "a/b"], "it must be a plain file name"),
        (["--rows", "nowhere.csv"], "nowhere.csv: No such file"),
        (["--colour", "red"], "--colour"),
    ],
)
def test_wrong_requests_are_one_line(quick, tmp_path, capsys, arguments, complaint):
    assert main(["paper", "--output", str(tmp_path / "new"), *arguments]) == 2
    assert not (tmp_path / "new").exists()
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1


def test_the_committed_page_is_that_of_the_committed_tables():
    written = (ROOT / "plots" / "h200" / "paper" / "README.md").read_text()
    assert written == page(read_results(ROOT / "results" / "h200" / "paper"))


def test_the_committed_tables_are_those_of_the_committed_rows():
    results = read_results(ROOT / "results" / "h200" / "paper")
    sources = dict.fromkeys(x.source for x in (*results.micro_benchmark, *results.throughput))
    read = [(read_rows(ROOT / source), source) for source in sources]
    speeds = [throughput(*file) for file in read]
    for table, again in (
        (results.micro_benchmark, max((micro_benchmark(*file) for file in read), key=len)),
        (results.throughput, paper_run.fullest(speeds)),
    ):
        assert len(table) == len(again) > 8
        for line, other in zip(table, again, strict=True):
            for field in dataclasses.fields(line):
                value, wanted = (getattr(x, field.name) for x in (line, other))
                near = isinstance(value, float)
                assert value == (pytest.approx(wanted, rel=1e-5) if near else wanted), field.name
    counted = [line for line in results.complexity if (line.seq_len, line.q_heads) == (1024, 8)]
    assert counted == complexity(sizes=((1024, 8),))
