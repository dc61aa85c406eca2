"""The paper's figures as data, and what is made of a sweep's rows, of masks and of tables."""

import contextlib
import dataclasses
import io
import re

import numpy as np
import pytest
from matplotlib.image import imread

from bench import paper, paper_figures, paper_run
from bench.complexity import complexity
from bench.masks import mask_grid
from bench.paper_claims import Results, claims
from bench.paper_page import page
from bench.paper_run import read_results, write_results
from bench.paper_speeds import micro_benchmark, throughput
from bench.record import ROOT, Store, read_rows
from bench.specialisation import RECIPE, specialisation
from bench.tables import read_table, write_table
from methods import METHODS
from run_bench import main
from tests.bench.rows import make_row, sweep_rows

TABLES = (paper.TABLE_1, paper.TABLE_2, paper.TABLE_3)
COMMITTED = ROOT / "results" / "cpu" / "paper"


@pytest.fixture(scope="module")
def results():
    rows = list(sweep_rows((1024, 4096), methods=("standard", "spattention", "longformer")))
    small = dataclasses.replace(RECIPE, batch=1, seq_len=64, head_dim=16)
    return Results(
        complexity=complexity(sizes=((1024, 8),)),
        micro_benchmark=micro_benchmark(rows, "rows.csv"),
        throughput=throughput(rows, "rows.csv"),
        specialisation=list(specialisation(p=small, layers=2, seeds=(0,))),
    )


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_an_average_of_a_table_is_that_of_its_line(table):
    """A slip of the pen in any figure shows; one line's average is not that of its figures."""
    for line in table.lines:
        if (table.name, line[0]) == ("Table 3", "Sliding Window"):
            assert np.mean(line[1:-1]) == pytest.approx(0.3342) != line[-1]
            continue
        figures = dict(zip(table.columns, line[len(table.keys) :], strict=True))
        average = figures.pop("Avg")
        figures.pop("tok/s", None)
        # Half a unit of the last printed digit, of the average and of what it is the mean of.
        assert np.mean(list(figures.values())) == pytest.approx(average, abs=1.01e-4), line


def test_figures_of_the_paper_agree_with_each_other():
    tokens = paper.TABLE_2.column("tok/s")
    assert tokens["SPAttention"] / tokens["Standard"] == pytest.approx(
        paper.TABLE_2_SPEEDUP, abs=5e-4
    )
    dense, own = (paper.SPECIALISATION[name] for name in ("Standard", "SPAttention"))
    change = 100 * (own.entropy / dense.entropy - 1)
    assert change == pytest.approx(paper.SPECIALISATION_ENTROPY_PERCENT, abs=5e-3)
    assert own.sigma_low / dense.sigma_high > paper.SPECIALISATION_SIGMA_RATIO


def test_figures_of_the_paper_stand_nowhere_else():
    figures = {f"{x:.4f}".lstrip("0") for t in TABLES for line in t.lines for x in line
               if isinstance(x, float)}  # fmt: skip
    figures |= {str(int(x)) for x in paper.TABLE_2.column("tok/s").values()}
    figures |= {str(x) for s in paper.SPECIALISATION.values() for x in s if x > 0.001}
    figures |= {str(paper.TABLE_2_SPEEDUP)}
    assert len(figures) > 60
    sources = "".join(p.read_text() for p in sorted((ROOT / "bench").glob("*.py"))
                      if p.name != "paper.py")  # fmt: skip
    assert [x for x in figures if re.search(rf"(?<![\d]){re.escape(x)}(?!\d)", sources)] == []


def test_every_name_of_table_2_has_a_reading_twice():
    names = [line[0] for line in paper.TABLE_2.lines]
    for reading in paper.READINGS.values():
        assert list(reading) == names
        assert set(reading.values()) - {"reformer"} <= set(METHODS)
    assert paper.READINGS["as published"]["SPAttention"] == "spattention"


def test_figure_1_follows_the_preset(monkeypatch):
    panels = paper_figures.figure_1("spattention")
    i, j = np.mgrid[:1024, :1024]
    for h, panel in enumerate(panels):
        assert (panel.grid == ((i - j >= 128 * h) & (i - j < 128 * (h + 1)))).all()
        assert panel.classes[h:].diagonal().tolist() == [1] * (8 - h)
    altered = dataclasses.replace(METHODS["sliding_window"], window=100)
    monkeypatch.setitem(METHODS, "spattention", altered)
    after = paper_figures.figure_1("spattention")
    assert (after[3].grid == ((i - j >= 0) & (i - j < 100))).all()
    assert (after[3].classes != panels[3].classes).any()


def test_figure_2_follows_the_presets(monkeypatch):
    before = paper_figures.figure_2()
    assert [panel.name for panel in before] == ["Sliding Window", "EBALL", "GBHALF"]
    for panel, method in zip(before, ("local_only", "spattention", "gapped_bands"), strict=True):
        assert (panel.grid == mask_grid(METHODS[method], paper.FIGURES)[3]).all()
    monkeypatch.setitem(METHODS, "gapped_bands", METHODS["local_only"])
    after = paper_figures.figure_2()
    assert [(a.grid == b.grid).all() for a, b in zip(before, after, strict=True)] == [1, 1, 0]


def test_micro_benchmark_has_every_clock_and_backend():
    methods = ("standard", "spattention", "spattention_released", "longformer")
    rows = sweep_rows((1024, 4096), (8, 16), methods, ("flex", "other"), ("device", "host"))
    points = micro_benchmark(rows, "x.csv")
    assert {(x.method, x.backend, x.clock) for x in points} == {
        (m, b, c) for m in methods[1:3] for b in ("flex", "other") for c in ("device", "host")
    }
    own = next(x for x in points if (x.method, x.backend) == ("spattention", "other"))
    assert own.speedup == pytest.approx(own.dense_us / own.us)
    assert (own.ideal_elements, own.ideal_blocks) == (8.0, pytest.approx(6.6))
    # Each further backend of these rows is slower: the fastest dense one is the first.
    assert own.fastest == "flex" and own.over_fastest == pytest.approx(own.speedup / 2, rel=0.3)
    assert micro_benchmark(sweep_rows((1024,)), "x.csv") == []


def test_micro_benchmark_gives_the_interval_of_the_speedup():
    taken = {"samples_us": "9.9;10;10.1", "rounds": "0;1;2", "median_us": 10.0}
    slow = {"samples_us": "39;40;41", "rounds": "0;1;2", "median_us": 40.0}
    rows = [make_row(**taken), make_row(method="standard", **slow)]
    (point,) = micro_benchmark(rows, "x.csv")
    assert point.low < point.speedup == 4.0 < point.high
    rows = [make_row(median_us=10.0), make_row(method="standard", status="oom")]
    assert micro_benchmark(rows, "x.csv") == []


def table_2_rows(phase="fwd_bwd", **us):
    return [
        make_row(method=name, seq_len=1024, median_us=float(time), phase=phase)
        for name, time in us.items()
    ]


def test_table_2_ranks_attention_alone():
    rows = table_2_rows(standard=100, spattention=25, longformer=50, mehc_longformer=200)
    rows.append(make_row(method="bigbird", seq_len=1024, status="oom"))
    narrow = {"method": "longformer", "params": "window=2,n_global=1,dilation=1"}
    rows.append(make_row(seq_len=1024, median_us=1.0, **narrow))  # no preset
    lines = {(x.reading, x.name): x for x in throughput(rows, "x.csv")}
    assert len(lines) == 10 and {x.measured for x in lines.values()} == {"attention alone"}
    own = lines["as published", "SPAttention"]
    assert (own.tokens_per_s, own.ratio, own.rank) == (1024 / 25e-6, 4.0, 1)
    assert lines["as published", "Longformer"].rank == 2
    assert lines["as published", "Standard"].rank == 3
    assert lines["as released", "Longformer"].ratio == 0.5
    assert lines["as released", "Standard"].rank == 1
    assert lines["as published", "BigBird"].reason == "oom"
    assert lines["as published", "Reformer"].reason == "not measured"
    assert lines["as published", "Reformer"].rank is None


def test_table_2_prefers_training_steps():
    rows = table_2_rows(standard=100, spattention=25)
    rows += table_2_rows("step", standard=1000, spattention=800)
    lines = {x.name: x for x in throughput(rows, "x.csv") if x.reading == "as published"}
    assert lines["SPAttention"].measured == "a training step"
    assert lines["SPAttention"].ratio == 1.25
    assert lines["Longformer"].reason == "not measured"
    assert throughput(rows[:2], "x.csv")[0].measured == "attention alone"
    assert throughput([make_row(method="standard", median_us=1.0)], "x.csv") == []


def test_table_2_is_of_one_run_of_the_papers_model():
    """Tokens/s of all processes and sequences; the more processes, the nearer to the paper."""
    step = {"phase": "step", "seq_len": 1024, "batch": 32, "clock": "host"}
    rows = [
        make_row(method=method, model=model, world_size=size, median_us=us, **step)
        for model, size, us in (("mine", 4, 7e6), ("table2", 1, 1e6), ("table2", 2, 2e6))
        for method, us in (("standard", us), ("spattention", us / 2))
    ]
    found = {x.method: x.tokens_per_s for x in throughput(rows, "x.csv") if x.rank}
    assert found == {"standard": 32768, "spattention": 65536}
    assert throughput(rows[:2], "x.csv") == []


def test_only_rows_of_the_very_shape_count():
    alike = {"seq_len": 1024, "median_us": 9.0}
    for change in ({"causal": False}, {"kv_heads": 2}, {"head_dim": 64}):
        rows = [make_row(method=m, **alike, **change) for m in ("standard", "spattention")]
        assert throughput(rows, "x.csv") == []
    rows = [make_row(method=m, median_us=9.0, batch=8) for m in ("standard", "spattention")]
    assert micro_benchmark(rows, "x.csv") == []


def test_the_devices_clock_comes_first():
    rows = [
        make_row(method=m, seq_len=1024, median_us=us, clock=clock)
        for clock, us in (("host", 50.0), ("device", 20.0))
        for m in ("standard", "spattention")
    ]
    assert {x.clock for x in throughput(rows, "x.csv")} == {"device"}


def test_a_table_comes_from_the_file_that_has_most_of_it(quick, tmp_path):
    for name, methods in (("one", ("standard",)), ("all", ("standard", "spattention"))):
        with Store(tmp_path / f"{name}.csv") as store:
            store.append(list(sweep_rows((1024, 4096), methods=methods)))
    files = [str(tmp_path / f"{name}.csv") for name in ("one", "all")]
    assert main(["paper", "--output", str(tmp_path), "--rows", *files]) == 0
    found = read_results(tmp_path / "results" / "paper")
    assert {x.source for x in (*found.micro_benchmark, *found.throughput)} == {"all.csv"}


def test_tables_come_back_as_they_were(results, tmp_path):
    write_results(results, tmp_path)
    again = read_results(tmp_path)
    assert again.complexity == results.complexity
    assert again.throughput[0].tokens_per_s == pytest.approx(
        results.throughput[0].tokens_per_s, rel=1e-5
    )
    assert [x.reason for x in again.throughput] == [x.reason for x in results.throughput]
    assert page(again) == page(results)


def test_a_file_that_is_no_such_table_is_named(tmp_path):
    kind = type(micro_benchmark(sweep_rows((4096,)), "x")[0])
    write_table(tmp_path / "t.csv", [], kind)
    assert read_table(tmp_path / "t.csv", kind) == []
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"t\.csv: not a table of this version"):
        read_table(tmp_path / "t.csv", kind)
    write_table(tmp_path / "t.csv", micro_benchmark(sweep_rows((4096,)), "x"), kind)
    text = (tmp_path / "t.csv").read_text().replace("128x128,", "128x128,fast", 1)
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=r"t\.csv, line 2: damaged"):
        read_table(tmp_path / "t.csv", kind)


def test_claims_follow_the_tables(results):
    found = {claim.text: claim for claim in claims(results)}
    assert len(found) > 12
    pairs = found["pairs of standard attention over those of SPAttention"]
    assert (pairs.theirs, pairs.ours) == (
        "H", "1.00 H (`spattention`); 0.38 H (`spattention_released`)",
    )  # fmt: skip
    point = next(x for x in results.micro_benchmark if x.method == "spattention")
    (speed,) = [c for text, c in found.items() if "(1, 8, 4096, 128)" in text]
    assert speed.ours == f"{point.speedup:.2f} x on flex (`spattention`)"
    slower = [dataclasses.replace(point, speedup=1.5)]
    changed = dataclasses.replace(results, micro_benchmark=slower)
    assert any(c.ours.startswith("1.50 x on flex") for c in claims(changed))


def test_page_without_any_speed_says_so(results):
    bare = dataclasses.replace(results, micro_benchmark=[], throughput=[])
    text = page(bare)
    assert text.count("not measured: no rows of this shape.") == 2
    for x in results.complexity:
        counted = f"| `{x.method}` | {x.allowed_pairs} |"
        assert (counted if x.reason is None else f"Skipped: `{x.method}`: {x.reason}.") in text


def test_every_figure_of_the_paper_is_on_the_page(results):
    text = page(results)
    assert text.count("the mean of its figures is") == 1
    assert "Sliding Window: the mean of its figures is 0.3342." in text
    for table in TABLES:
        for line in table.lines:
            for value in line[len(table.keys) :]:
                assert (f"{value:.4f}" if isinstance(value, float) else f"{value}") in text
    for theirs in paper.SPECIALISATION.values():
        assert f"{theirs.entropy:.4f}" in text and f"{theirs.sigma_high:.4f}" in text


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
    assert "nor are there older rows" in said
    assert sorted(p.name for p in tables.iterdir()) == [
        "complexity.csv", "micro_benchmark.csv", "specialisation.csv", "throughput.csv",
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
    (request,) = asked
    assert (request.seq_len, request.heads, request.head_dim) == ((1024, 4096), (8,), (128,))
    assert request.methods == tuple(METHODS) and request.output == str(tmp_path)
    assert request.resume
    results = read_results(tmp_path / "results" / "paper")
    assert [x.method for x in results.micro_benchmark] == ["spattention"]
    assert {x.source for x in results.throughput} == {"paper_speeds.csv"}


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
    assert (ROOT / "plots" / "cpu" / "paper" / "README.md").read_text() == page(
        read_results(COMMITTED)
    )


def test_the_committed_tables_are_those_of_the_committed_rows():
    results = read_results(COMMITTED)
    for table, make in (
        (results.micro_benchmark, micro_benchmark), (results.throughput, throughput),
    ):  # fmt: skip
        (source,) = {line.source for line in table}
        again = make(read_rows(ROOT / source), source)
        assert len(table) == len(again) > 8
        for line, other in zip(table, again, strict=True):
            for field in dataclasses.fields(line):
                value, wanted = (getattr(x, field.name) for x in (line, other))
                near = isinstance(value, float)
                assert value == (pytest.approx(wanted, rel=1e-5) if near else wanted), field.name
    counted = [line for line in results.complexity if (line.seq_len, line.q_heads) == (1024, 8)]
    assert counted == complexity(sizes=((1024, 8),))
