"""What tables and figures of training derive from rows."""

from dataclasses import replace

import pytest
from rich.console import Console

from bench.derived import Cell
from bench.train_figures import _methods, draw_training
from bench.train_report import print_training
from bench.trainings import (
    attention_share,
    fall,
    missed,
    products_share,
    scaling,
    tokens_per_s,
    trainings,
    utilisation,
)
from tests.bench.rows import make_row
from tests.bench.training import made


def test_what_cannot_be_right_or_is_not_known_well_is_said(capsys):
    def said(*rows):
        print_training(rows, Console(width=200))
        return [line for line in capsys.readouterr().out.splitlines() if "warning" in line]

    dense, bare = made(backend="flex"), made("identity", 120.0, backend="identity")
    assert said(dense, made("identity", 60.0, backend="identity")) == []
    (line,) = said(dense, bare)
    assert "zero cost was slower" in line and "take more --steps" in line
    (line,) = said(replace(dense, ci_high_us=150.0))
    assert line.startswith("warning: 1 medians are known to worse than 5%")
    (line,) = said(replace(dense, samples_us="99;100;101"))
    assert line.startswith("warning: 1 medians are of fewer than 8 samples")


def test_what_rich_reads_as_markup_is_printed_as_it_is(capsys):
    rows = [
        made(backend="flex"), made("identity", 60.0, backend="[/x]", model="[/y]"),
        made("spattention", None, backend="flex", status="crash", reason="[/x] y"),
    ]  # fmt: skip
    out = printed(rows, capsys)
    assert "spattention, flex: crash: [/x] y" in out and "[/y] · N 1024" in out


def test_a_narrow_terminal_has_fewer_columns_and_whole_figures(capsys):
    whole = {"attention_us": 40.0, "other_us": 60.0, "model_flops": 1e9, "peak_bytes": 9 << 30,
             "matmul_tflop_s": 800.0, "losses": "10.872;10.871"}  # fmt: skip
    rows = [
        *(made(name, us, backend=f"sdpa-cudnn {us:.0f}", **whole)
          for name in ("standard", "spattention_released") for us in (6e5, 7e5)),
        made("identity", 5e5, backend="identity", **whole),
    ]  # fmt: skip
    print_training(rows, Console(width=80))
    out = capsys.readouterr().out
    head, *_ = (line for line in out.splitlines() if line.startswith("method"))
    assert "tokens/s" in head and "memory" not in head and "…" not in out
    assert "not shown at this width: step, " in out and "memory" in out
    print_training(rows, Console(width=160))
    assert "not shown" not in capsys.readouterr().out


def test_rates_speed_ups_and_ceilings_follow_from_the_rows():
    call = {"batch": 4, "seq_len": 1024}
    rows = [
        make_row(method="standard", backend="sdpa-cudnn", median_us=12.0, **call),
        made(backend="flex", us=200.0), made(backend="sdpa-cudnn", attention_us=40.0, other_us=58),
        make_row(method="spattention", median_us=3.0, **call),
        make_row(method="spattention", median_us=99.0, clock="host", **call),
        made("spattention", 80.0), made("identity", 50.0, backend="identity"),
    ]  # fmt: skip
    (training,) = trainings(rows)
    assert [cell.method for cell in training.cells][-1] == "identity"
    assert training.dense.backend == "sdpa-cudnn"
    cell = cell_of(rows[5])
    assert training.speedup(cell).y == pytest.approx(1.25)
    assert training.zero_cost() == 2
    assert training.amdahl(cell).y == pytest.approx(1 / (1 - 40 / 98 + 40 / 98 / 4))
    assert missed(rows[2]) == pytest.approx(0.02)
    rate = tokens_per_s(rows[5])
    assert rate.y == pytest.approx(4 * 1024 / 80e-6)
    assert rate.low == pytest.approx(rate.y / 1.01) and rate.high == pytest.approx(rate.y / 0.99)


def spread(us):
    """Thirteen samples within half a percent of a median."""
    return ";".join(str(us * (1 + k / 1200)) for k in range(-6, 7))


def split(method, backend, us, **changes):
    """A step of which attention takes 40 of 100."""
    return made(method, us, backend=backend, samples_us=spread(us), attention_us=0.4 * us,
                other_us=0.6 * us, **changes)  # fmt: skip


def device_call(method, backend, us, **changes):
    return make_row(method=method, backend=backend, median_us=us, batch=4, seq_len=1024,
                    samples_us=us and spread(us), **changes)  # fmt: skip


def printed(rows, capsys):
    print_training(rows, Console(width=400))
    return capsys.readouterr().out


def test_a_step_above_its_amdahl_figure_is_said(capsys):
    dense = [device_call("standard", "flex", 12.0), split("standard", "flex", 100.0)]
    call = device_call("spattention", "flex", 3.0)
    (training,) = trainings([*dense, call, split("spattention", "flex", 72.0)])
    bound = training.amdahl(cell_of(call))
    assert bound.y == pytest.approx(1 / 0.7) and bound.low < bound.y < bound.high
    for us, above in ((72.0, False), (70.0, False), (60.0, True)):
        out = printed([*dense, call, split("spattention", "flex", us)], capsys)
        assert ("spattention, flex: the step's" in out) == above
    assert "1.67x is above Amdahl's 1.43x" in out


def test_a_cell_without_an_amdahl_figure_says_why(capsys):
    dense = [device_call("standard", "flex", 12.0), split("standard", "flex", 100.0)]
    eager = [
        device_call("spattention", "eager", None, status="unsupported", reason="no graph: waits"),
        device_call("spattention", "eager", 900.0, clock="host"),
        split("spattention", "eager", 300.0),
    ]
    (training,) = trainings([*dense, *eager])
    assert training.amdahl(cell_of(eager[0])) is None
    text = "no Amdahl figure of spattention on eager: no device time of the attention call "
    assert f"{text}(no graph: waits)" in printed([*dense, *eager], capsys)
    two = [replace(row, world_size=2) if row.phase == "step" else row for row in dense]
    (training,) = trainings(two)
    assert training.amdahl(training.dense) is None
    out = printed(two, capsys)
    assert "no Amdahl figure of standard on flex: with several processes" in out
    assert "no Amdahl" not in printed(dense, capsys)


def test_a_step_that_the_profiler_slows_has_no_amdahl_figure(capsys):
    """One that waits for its launches waits longer then, and attention's share is too small."""
    calls = [device_call(method, "flex", us) for method, us in
             (("standard", 12.0), ("spattention", 3.0))]  # fmt: skip
    dense = replace(split("standard", "flex", 100.0), other_us=65.0)
    rows = [*calls, dense, split("spattention", "flex", 80.0)]
    (training,) = trainings(rows)
    assert training.amdahl(cell_of(calls[1])) is None
    assert "CUPTI made the dense step 5.0% longer" in printed(rows, capsys)
    (training,) = trainings([*calls, replace(dense, other_us=58.0), rows[-1]])
    assert training.amdahl(cell_of(calls[1])) is not None


def test_a_step_goes_with_the_call_of_its_own_process():
    """Other runs, recipes and numbers of processes time the same call again."""

    def cells(us, **changes):
        call = device_call("spattention", "flex", us, run=changes.get("run", "test"))
        return [call, split("spattention", "flex", 80.0, **changes)]

    failed = device_call("spattention", "flex", None, status="crash", reason="lost")
    found = trainings([
        *cells(3.0), *cells(4.0, recipe="steps=9"), *cells(5.0, run="other", world_size=2), failed,
    ])  # fmt: skip
    assert [[x.median_us for x in training.calls.values()] for training in found] == [
        [3],
        [4],
        [5],
    ]


def test_steps_of_another_machine_are_compared_apart(tmp_path):
    rows = [
        made(backend="flex", seq_len=n, batch=4096 // n, **machine)
        for machine in ({}, {"host": "other"}, {"torch": "2.0"}, {"driver": "1"})
        for n in (1024, 2048)
    ]  # fmt: skip
    assert [len(x.rows) for x in trainings(rows)] == [1] * 8
    assert len(draw_training(rows, tmp_path)) == 4 * 2 * 2
    assert [len(x.rows) for x in trainings([rows[0], replace(rows[0], code="1" * 12)])] == [1]


def test_attention_is_a_share_of_the_kernels_of_one_process():
    row = split("standard", "flex", 100.0)
    assert attention_share(row) == pytest.approx(0.4)
    assert attention_share(replace(row, attention_us=20.0, other_us=30.0)) == pytest.approx(0.4)
    assert attention_share(replace(row, world_size=2)) is None
    assert attention_share(made()) is None


def test_share_of_products():
    kernels = "20 product a;12 attention b;10 product c"
    row = made(attention_us=20.0, other_us=80.0, step_kernels=kernels)
    assert products_share(row) == pytest.approx(0.3)
    assert products_share(replace(row, step_kernels=None)) is None


def cell_of(row):
    return Cell(row.method, row.params, row.backend)


def test_scaling_and_utilisation():
    one, two = made(us=100.0), made(us=125.0, world_size=2)
    assert tokens_per_s(two).y == pytest.approx(2 * 4096 / 125e-6)
    assert scaling(two, [one, two]).y == pytest.approx(0.8)
    assert scaling(two, [two, made(model="other")]) is None
    assert scaling(one, [one, two]) is None
    slow, late = (made(us=us, time_utc=f"2026-01-0{k}T00:00:00Z") for k, us in ((2, 200), (3, 50)))
    assert scaling(two, [one, slow, late]).y == pytest.approx(0.4)
    same = replace(slow, recipe="steps=9")
    assert scaling(replace(two, recipe="steps=9"), [one, same, late]).y == pytest.approx(1.6)
    ends = {"ci_low_us": 90.0, "ci_high_us": 110.0}
    low, high = scaling(replace(two, **ends), [replace(one, **ends)])[1:]
    assert (low, high) == (pytest.approx(90 / 110), pytest.approx(110 / 90))
    for other in ({"torch": "2.0"}, {"driver": "1"}, {"code": "1" * 12}):
        assert scaling(two, [replace(one, **other)]) is None
    row = made(us=1e6, model_flops=4e14, matmul_tflop_s=800.0)
    assert utilisation(row) == pytest.approx(0.5)
    assert utilisation(replace(row, matmul_tflop_s=None)) is None
    failed = made(us=None, status="oom")
    assert tokens_per_s(failed) is None and scaling(failed, []) is None


def test_a_legend_names_parameters_only_where_it_must():
    window = [made("sliding_window", params=f"window={n}") for n in (4, 8)]
    (training,) = trainings([made(), window[0]])
    assert list(_methods([training]).values()) == ["standard", "sliding_window"]
    (training,) = trainings([made(), *window])
    names = list(_methods([training]).values())
    assert names[1:] == ["sliding_window:window=4", "sliding_window:window=8"]


def learning(losses, **changes):
    """A step on a text whose losses are given, two steps of warm-up before them."""
    samples = ";".join("100" for _ in losses)
    told = ";".join(map(str, [9.0, 9.0, *losses]))
    return made(**{"data": "book.txt@0badcafe", "samples_us": samples, "losses": told} | changes)


NOISE = [0.01 * (k * 7 % 5) for k in range(40)]


def test_a_loss_falls_where_its_ends_differ_by_more_than_their_noise():
    falling = fall(learning([5 - 0.02 * k + NOISE[k] for k in range(40)]))
    assert (falling.steps, falling.clear) == (4, True)
    assert falling.first == pytest.approx(4.97 + sum(NOISE[:4]) / 4)
    flat = fall(learning([5 + x for x in NOISE]))
    rising = fall(learning([5 + 0.02 * k + NOISE[k] for k in range(40)]))
    slight = fall(learning([5 - 0.0004 * k + NOISE[k] for k in range(40)]))
    assert not (flat.clear or rising.clear or slight.clear)
    assert rising.last > rising.first and slight.last < slight.first
    discarded = learning([5 - 0.02 * k + NOISE[k] for k in range(40)], discarded=10,
                         samples_us=";".join(["100"] * 30))  # fmt: skip
    assert fall(discarded) == falling
    assert fall(learning([5.0] * 12)) is None
    assert fall(learning([5 - k for k in range(40)], data="random")) is None


def test_a_loss_that_does_not_fall_is_said_and_marked(capsys):
    falling = learning([5 - 0.02 * k for k in range(40)], backend="flex")
    flat = learning([5 + x for x in NOISE], method="spattention", backend="flex")
    out = printed([falling, flat], capsys)
    (line,) = [line for line in out.splitlines() if "does not fall" in line]
    assert line == (
        "spattention, flex: the loss does not fall: 5.018 over the first 4 steps, 5.025 over the "
        "last"
    )
    assert out.count("not falling") == 1 and "5.03 not falling" in out


def test_figures_of_other_data_tokens_or_recipes_are_other_files(tmp_path):
    rows = [
        made(backend="flex", losses="2;1", batch=batch, seq_len=n, **changes)
        for changes in ({}, {"data": "a.txt@01"}, {"data": "a.txt@02"}, {"data": "b.txt@01"},
                        {"recipe": "steps=9"})
        for batch, n in ((4, 1024), (2, 2048), (8, 1024), (4, 2048))
    ]  # fmt: skip
    drawn = draw_training(rows, tmp_path)
    assert len(drawn) == len(set(drawn)) == 2 * (5 * 2 * 2 + 3 * 2 * 2)
    names = {path.stem for path in drawn}
    speed = {f"training_speedup_m_1_{tokens}{text}" for tokens in (4096, 8192)
             for text in ("", "_2", "_a", "_a_2", "_b")}  # fmt: skip
    assert {name for name in names if "speedup" in name} == speed
    assert "training_loss_m_1_8192_a_2_2048" in names


def test_of_one_length_and_no_text_there_is_no_figure_and_no_folder(tmp_path):
    assert draw_training([made(backend="flex")], tmp_path / "plots") == []
    assert list(tmp_path.iterdir()) == []


def test_the_newest_recipe_has_the_bare_name(tmp_path):
    def rows(recipe, day, us):
        return [made("standard", us, backend="flex", seq_len=n, batch=4096 // n, recipe=recipe,
                     time_utc=f"2026-01-0{day}T00:00:00Z") for n in (1024, 2048)]  # fmt: skip

    old, new = rows("steps=2", 1, 100.0), rows("steps=1", 2, 200.0)
    given = {"both": [*old, *new], "old": old, "new": new}
    drawn = {}
    for name, rows_ in given.items():
        draw_training(rows_, tmp_path / name)
        path = tmp_path / name / "training_tokens_per_s_m_1_4096.svg"
        drawn[name] = path.read_text()
    assert drawn["both"] == drawn["new"] != drawn["old"]
