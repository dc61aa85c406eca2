"""The paper's figures as data, and what is made of a sweep's rows, of masks and of tables."""

import ast
import dataclasses
import re

import numpy as np
import pytest
from matplotlib.axes import Axes

from bench import paper, paper_figures
from bench.complexity import complexity
from bench.paper_claims import Results, claims
from bench.paper_page import page
from bench.paper_run import read_results, write_results
from bench.paper_speeds import micro_benchmark, throughput
from bench.record import ROOT
from bench.specialisation import RECIPE, specialisation
from bench.tables import read_table, write_table
from bench.trained_heads import INITIAL, TRAINED, TrainedHeads
from methods import METHODS
from tests.bench.rows import sweep_rows

TABLES = (paper.TABLE_1, paper.TABLE_2, paper.TABLE_3)


@pytest.fixture(scope="module")
def results():
    rows = list(sweep_rows((1024, 4096), methods=("standard", "spattention", "longformer")))
    small = dataclasses.replace(RECIPE, batch=1, seq_len=64, head_dim=16)
    return Results(
        complexity=complexity(sizes=((1024, 8),)),
        micro_benchmark=micro_benchmark(rows, "rows.csv"),
        throughput=throughput(rows, "rows.csv"),
        specialisation=list(specialisation(p=small, layers=2, seeds=(0,))),
        trained_heads=trained_heads(),
    )


def trained_heads():
    """Of a model of one layer, under one mask."""
    about = {"method": "spattention", "sigma": 0.25, "excess": 0.0, "bound": 4.0, "empty": 0.4,
             "head_entropy": "2;3", "divergence": None, "device": "Chip X", "torch": "2.11",
             "source": "train.csv", "model": "table2", "data": "words@12", "seq_len": 1024,
             "recipe": "steps=300,seed=0", "sequences": 2, "params": None,
             "backend": "flex"}  # fmt: skip
    moments = {"uniform": (3.0, 1.0), INITIAL: (2.5, 0.9), TRAINED: (1.5, 0.4321)}
    return [
        TrainedHeads(weights=weights, seed=None if weights == "uniform" else 0,
                     layer=None if weights == "uniform" else 1, entropy=entropy,
                     normalised=normalised, **about)
        for weights, (entropy, normalised) in moments.items()
    ]  # fmt: skip


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_an_average_of_a_table_is_that_of_its_line(table):
    """One line's average is not that of its figures."""
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


def figures_of_the_paper():
    yield from (x for table in TABLES for line in table.lines for x in line[len(table.keys) :])
    yield from (x for figures in paper.SPECIALISATION.values() for x in figures)
    yield from (paper.TABLE_2_SPEEDUP, paper.MICRO_BENCHMARK_SPEEDUP)
    yield from (paper.SPECIALISATION_SIGMA_RATIO, -paper.SPECIALISATION_ENTROPY_PERCENT)


def numbers(path):
    """Values of the number literals of a module, and of the numbers within its strings."""
    for node in ast.walk(ast.parse(path.read_text())):
        value = node.value if isinstance(node, ast.Constant) else None
        if isinstance(value, str):
            yield from map(float, re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?!\w)", value))
        elif type(value) in (int, float):
            yield float(value)


def test_figures_of_the_paper_stand_nowhere_else():
    """By value. One of fewer than three digits (300, 0.0005, 0.57) means other things elsewhere:
    such a one must only be absent from what makes the page; and 0 and 2 count and index there."""
    figures = set(map(float, figures_of_the_paper()))
    long = {x for x in figures if len(f"{x:.10g}".replace(".", "").strip("0")) >= 3}
    short = figures - long - {0.0, 2.0}
    assert {0.2789, 20.2, 4.5461, 6340, 1.919} <= long and {300, 0.0005, 0.57} <= short
    of_the_page = {"specialisation.py", "complexity.py"}
    folders = (ROOT / "bench", ROOT / "methods")
    modules = [ROOT / "run_bench.py", *(path for x in folders for path in x.glob("*.py"))]
    modules.remove(ROOT / "bench" / "paper.py")
    assert len(modules) > 50
    for path in modules:
        own = path.name in of_the_page or path.name.startswith("paper_")
        assert not set(numbers(path)) & (figures - {0.0, 2.0} if own else long), path


def test_every_name_of_table_2_has_a_reading_twice():
    names = [line[0] for line in paper.TABLE_2.lines]
    for reading in paper.READINGS.values():
        assert list(reading) == names
        assert set(reading.values()) <= set(METHODS)
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
    i, j = np.mgrid[:1024, :1024]
    first = 3 * 128  # head 3 of 8: 128 distances a band
    expected = {
        "Sliding Window": (i >= j) & (i - j <= 128),
        "EBALL": (i - j >= first) & (i - j < first + 128),
        "GBHALF": (i - j >= first) & (i - j < first + 64),
    }
    assert [panel.name for panel in before] == list(expected)
    assert all((panel.grid == expected[panel.name]).all() for panel in before)
    monkeypatch.setitem(METHODS, "gapped_bands", METHODS["local_only"])
    after = paper_figures.figure_2()
    assert [(a.grid == b.grid).all() for a, b in zip(before, after, strict=True)] == [1, 1, 0]


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
    assert "ours: `flex`, device clock" in speed.text
    assert speed.ours == f"{point.speedup:.2f} x (`spattention`)"
    slower = dataclasses.replace(point, speedup=1.5, low=1.25, high=1.75)
    other = dataclasses.replace(slower, backend="flash", speedup=7.0)
    small = dataclasses.replace(slower, blocks="64x64", speedup=1.4)
    eager = dataclasses.replace(slower, backend="eager", speedup=0.5, low=None, clock="host")
    changed = dataclasses.replace(results, micro_benchmark=[slower, other, small, eager])
    speed, uncompiled = [c for c in claims(changed) if "(1, 8, 4096, 128)" in c.text]
    assert speed.ours == "1.50 x (1.25 to 1.75) (`spattention`)"
    assert uncompiled.ours == "0.50 x (`spattention`)" and "`eager`, host clock" in uncompiled.text


def test_ratios_of_sigma_are_counted(results):
    def ours(largest):
        lines = [dataclasses.replace(x, sigma=largest) if x.method == "standard" else x
                 for x in results.specialisation]  # fmt: skip
        found = claims(dataclasses.replace(results, specialisation=lines))
        return next(c.ours for c in found if c.text == "sigma of SPAttention over Standard's")

    assert ours(1e-9).startswith("1 of 1 seeds over 300 x")
    assert ours(1e-1).startswith("0 of 1 seeds over 300 x")


def test_a_speed_is_beside_the_command_that_makes_it(results):
    made_by = {c.text: c.command for c in claims(results) if c.text.startswith("tokens/s of")}
    steps, alone = made_by.values()
    assert "`make results ARGS=train_table2`" in steps and alone == "`make paper`, on a GPU"


def test_page_without_any_speed_says_so(results):
    bare = dataclasses.replace(results, micro_benchmark=[], throughput=[])
    text = page(bare)
    assert text.count("Not measured: no rows of this shape.") == 3
    assert "was not measured here" not in text
    assert "`eager` was not measured here." in page(results)
    (point, *_) = results.micro_benchmark
    uncompiled = dataclasses.replace(point, backend="eager")
    with_eager = dataclasses.replace(results, micro_benchmark=[point, uncompiled])
    assert "was not measured here" not in page(with_eager)
    for x in results.complexity:
        counted = f"| `{x.method}` | {x.allowed_pairs} |"
        assert (counted if x.reason is None else f"Skipped: `{x.method}`: {x.reason}.") in text


def test_the_page_counts_pairs_as_its_heads_say(results):
    """Of eq. 4 at N = 1024, H = 8: all sums are known in closed form."""
    lines = page(results).splitlines()
    heads, own = (
        [x.strip() for x in line.strip("|").split("|")]
        for start in ("| method | allowed |", "| `spattention` | 524800 |")
        for line in lines
        if line.startswith(start)
    )
    n, w = 1024, 128
    busiest = 8 * (n * w - w * (w - 1) // 2) / (n * (n + 1) // 2)
    empty = sum(w * h for h in range(8)) / (8 * n)
    visited = 64 * 128 * 128  # blocks on two diagonals a head, seven of them beyond the first row
    assert dict(zip(heads, own, strict=True)) == {
        "method": "`spattention`", "allowed": "524800", "visited": f"{visited}",
        "allowed, of standard's": "1 / 8.00", "visited, of standard's": "1 / 4.50",
        "covered": "100.0 %", "once": "100.0 %", "overlap": "1.00",
        "empty rows": f"{100 * empty:.1f} %", "busiest head": f"{busiest:.2f} x",
    }  # fmt: skip
    released = next(x for x in lines if x.startswith("| `spattention_released` | 1391680 |"))
    # Every head sees the local band, so those pairs are not seen once: 129 distances of 1024.
    local = sum(n - d for d in range(129))
    assert f"| {100 * (1 - local / 524800):.1f} % | {1391680 / 524800:.2f} |" in released


def test_every_figure_of_the_paper_is_on_the_page(results):
    text = page(results)
    assert text.count("the mean of its figures is") == 1
    assert "Sliding Window: the mean of its figures is 0.3342." in text
    for table in TABLES:
        for line in table.lines:
            for value in line[len(table.keys) :]:
                assert (f"{value:.4f}" if isinstance(value, float) else f"{value}") in text
    lines = text.splitlines()
    for theirs in paper.SPECIALISATION.values():
        assert any(
            f"| {theirs.entropy:.4f} |" in line
            and f"| {theirs.sigma_low:.4f} to {theirs.sigma_high:.4f} |" in line
            for line in lines
        )
    told = {claim.theirs for claim in claims(results)}
    assert {"1.919 x", "-20.20 %", "over 300 x", "about 2 x", "all", "H", "none"} <= told
    assert "about log(N / H), against log(i + 1)" in told
    assert "The paper: 4 x A100; 8 layers, 8 heads, hidden 1024, N = 1024, 3000 steps" in text


def test_the_page_has_heads_of_a_trained_model_or_says_that_there_are_none(results):
    text = page(results)
    assert "`table2`, trained on the text `words@12` (steps=300, seed=0), on 2 seq" in text
    narrow = [dataclasses.replace(x, params="window=64") for x in results.trained_heads]
    assert "| `spattention:window=64` | trained |" in page(
        dataclasses.replace(results, trained_heads=narrow)
    )
    line = next(x for x in text.splitlines() if x.startswith("| `spattention` | trained |"))
    assert line == ("| `spattention` | trained | 40.0 % | 1.5000 | 0.2500 | 0.4321 | 0.0000 | - |")
    bare = page(dataclasses.replace(results, trained_heads=[]))
    assert "Not measured here: no rows of `make results ARGS=train_text`" in bare
    assert "words@12" not in bare


def test_the_page_says_what_the_released_code_does(results):
    text = page(results)
    for fact in (
        "Whether the paper's runs used this code cannot be told from the repository.",
        "attention runs across the heads of one token and mixes no tokens",
        "calls `flex_attention` without `torch.compile`", "`spattention` is EBALL",
        "where no compiled model surrounds the call",
    ):  # fmt: skip
        assert text.count(fact) == 1, fact


def test_the_page_says_how_tokens_were_measured(results):
    steps = [
        dataclasses.replace(x, measured="a training step", processes=2, tokens=4096, data="random",
                            common_rounds=False)
        for x in results.throughput
    ]  # fmt: skip
    text = page(dataclasses.replace(results, throughput=steps + results.throughput))
    _, by_step, alone = re.split("### By .*\n", text)
    assert (
        "on 2 x Chip X; 4096 tokens a step, random data; measured: each method by itself, not in "
        "rounds common to all." in by_step
    )
    assert "on 1 x Chip X; 1024 tokens a call" in alone
    assert "no measure of the paper's" in by_step and "no measure" not in alone


def test_frames_lie_round_the_blocks_that_are_visited():
    """Keys run across and queries down."""
    panel = paper_figures.figure_1("spattention")[1]
    drawn = list(paper_figures.frames(panel))
    assert len(drawn) == np.count_nonzero(panel.classes) > 0
    for across, down, colour in drawn:
        (left, right), (top, bottom) = ((int(min(x)), int(max(x)) + 1) for x in (across, down))
        assert (left % 128, top % 128) == (4, 4) and bottom - top == right - left == 120
        whole = panel.grid[top - 4 : bottom + 4, left - 4 : right + 4]
        assert whole.any() and (colour == paper_figures.CLASSES[1][1]) == (not whole.all())


def test_work_is_that_of_each_head_by_pairs_and_by_blocks(results):
    found = {line.method: line for line in results.complexity if not line.reason}
    pairs, blocks = paper_figures.work(found).values()
    own = pairs["spattention"]
    assert len(own) == 8 and (np.diff(own) < 0).all()  # a head whose band is farther has less
    assert own.sum() == pytest.approx(1) and (pairs["standard"] == 1).all()
    assert own[0] == pytest.approx(128 * (2 * 1024 - 127) / (1024 * 1025))
    assert (blocks["spattention"] > own).all()


def test_the_drawn_heads_are_in_order(results, tmp_path, monkeypatch):
    """What reaches the picture of specialisation: head by head, and no layer but those named."""
    drawn, plot = [], Axes.plot

    def noted(place, y, **look):
        drawn.append((look["label"], y))
        return plot(place, y, **look)

    monkeypatch.setattr(Axes, "plot", noted)
    paper_figures.draw_specialisation(results.specialisation, tmp_path / "x")
    assert len(drawn) == 9
    for line in results.specialisation:
        label = f"{line.method}: {paper_figures.SHOWN[line.seed, line.layer][0]}"
        assert (label, line.by_head) in drawn


def test_curves_that_hide_each_other_are_named():
    shares = {"standard": [1, 1], "longformer": [0.5, 0.25], "mehc_longformer": [0.5, 0.25]}
    assert list(paper_figures.coinciding(shares)) == ["one curve: longformer, mehc_longformer"]
    assert list(paper_figures.coinciding({"standard": [1, 1], "bigbird": [1, 0.5]})) == []
