"""The paper's speeds: what of a sweep's and of training's rows is taken, compared and ranked."""

import dataclasses
import random
import re

import pytest

from bench.cells import SLOWED
from bench.paper_claims import MADE_BY, order, shown, times
from bench.paper_page import TRAIN_ON_A_TEXT
from bench.paper_speeds import micro_benchmark, throughput
from tests.bench.rows import make_row, sweep_rows
from tests.gpu.results import COMMANDS


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


def timed(us, spread=0.001):
    """A median, and sixteen samples within a share of it to either side."""
    drawn = random.Random(us)
    samples = [us * (1 + spread * drawn.uniform(-1, 1)) for _ in range(16)]
    return {
        "median_us": float(us), "samples_us": ";".join(map(str, samples)),
        "rounds": ";".join(map(str, range(16))),
    }  # fmt: skip


def table_2_rows(phase="fwd_bwd", spread=0.001, **us):
    return [
        make_row(method=name, seq_len=1024, phase=phase, **timed(time, spread))
        for name, time in us.items()
    ]


WHOLE = {"standard": 100, "spattention": 25, "longformer": 50, "bigbird": 80, "reformer": 200}


def published(rows, measured="attention alone"):
    return {
        x.name: x
        for x in throughput(rows, "x.csv")
        if (x.reading, x.measured) == ("as published", measured)
    }


def test_table_2_of_attention_alone():
    rows = table_2_rows(standard=100, spattention=25, longformer=50, mehc_longformer=200)
    rows.append(make_row(method="bigbird", seq_len=1024, status="oom"))
    narrow = {"method": "longformer", "params": "window=2,n_global=1,dilation=1"}
    rows.append(make_row(seq_len=1024, median_us=1.0, **narrow))  # no preset
    lines = {(x.reading, x.name): x for x in throughput(rows, "x.csv")}
    assert len(lines) == 10 and {x.measured for x in lines.values()} == {"attention alone"}
    own = lines["as published", "SPAttention"]
    assert (own.tokens_per_s, own.ratio, own.tokens) == (1024 / 25e-6, 4.0, 1024)
    assert 3.9 < own.low < 4 < own.high < 4.1 and own.common_rounds
    assert lines["as published", "Standard"].low is None
    assert lines["as released", "Longformer"].ratio == 0.5
    assert lines["as published", "BigBird"].reason == "oom"
    assert lines["as published", "Reformer"].reason == "not measured"


def ranks(lines):
    return {name: (x.rank_low, x.rank_high) for name, x in lines.items()}


def test_ranks_and_the_order_are_of_what_was_measured():
    lines = published(table_2_rows(**WHOLE))
    assert ranks(lines) == {
        "SPAttention": (1, 1), "Longformer": (2, 2), "BigBird": (3, 3), "Standard": (4, 4),
        "Reformer": (5, 5),
    }  # fmt: skip
    names = "SPAttention > Longformer > BigBird > Standard > Reformer"
    assert order(list(lines.values())) == names
    part = published(table_2_rows(**{k: v for k, v in WHOLE.items() if k != "bigbird"}))
    assert ranks(part) == {
        "SPAttention": (1, 1), "Longformer": (2, 2), "BigBird": (None, None), "Standard": (3, 3),
        "Reformer": (4, 4),
    }  # fmt: skip
    rest = "SPAttention > Longformer > Standard > Reformer; without BigBird"
    assert order(list(part.values())) == rest
    assert order([]) == order([lines["Standard"], part["BigBird"]]) == "not measured"


def test_methods_that_samples_do_not_tell_apart_share_their_ranks():
    near = WHOLE | {"standard": 100, "bigbird": 100.5, "longformer": 97}
    lines = published(table_2_rows(**near))
    assert ranks(lines) == {
        "SPAttention": (1, 1), "Longformer": (2, 2), "Standard": (3, 4), "BigBird": (3, 4),
        "Reformer": (5, 5),
    }  # fmt: skip
    text = "SPAttention > Longformer > Standard or BigBird > Reformer"
    assert order(list(lines.values())) == text
    wide = published(table_2_rows(spread=0.2, **near))
    assert ranks(wide)["Longformer"] == (2, 4)
    bare = [dataclasses.replace(x, samples_us=None, rounds=None) for x in table_2_rows(**near)]
    assert set(ranks(published(bare)).values()) == {(1, 5)}


def test_ranks_need_not_be_transitive():
    """The middle one is told from neither of its neighbours, which are told from each other."""
    chain = {"standard": 100, "spattention": 101, "longformer": 102, "bigbird": 300}
    lines = published(table_2_rows(spread=0.0001, **chain, reformer=900))
    assert ranks(lines) == {
        "Standard": (1, 2), "SPAttention": (1, 3), "Longformer": (2, 3), "BigBird": (4, 4),
        "Reformer": (5, 5),
    }  # fmt: skip
    text = "Standard or SPAttention or Longformer > BigBird > Reformer"
    assert order(list(lines.values())) == text


def test_an_order_parts_all_before_from_all_after():
    lines = published(table_2_rows(**WHOLE))
    lines["SPAttention"] = dataclasses.replace(lines["SPAttention"], rank_high=3)
    text = "SPAttention or Longformer or BigBird > Standard > Reformer"
    assert order(list(lines.values())) == text


def test_training_steps_and_attention_alone_are_two_tables():
    rows = table_2_rows(standard=100, spattention=25)
    rows += table_2_rows("step", standard=1000, spattention=800)
    steps, alone = published(rows, "a training step"), published(rows)
    assert (steps["SPAttention"].ratio, alone["SPAttention"].ratio) == (1.25, 4.0)
    assert steps["Longformer"].reason == "not measured"
    cannot = "not measured: reformer shares queries and keys, which the models of `train` do not"
    assert steps["Reformer"].reason == cannot
    assert throughput([make_row(method="standard", median_us=1.0)], "x.csv") == []


def test_table_2_is_of_one_run_of_the_papers_model():
    """Tokens/s of all processes and sequences; the more processes, the nearer to the paper."""
    step = {"phase": "step", "seq_len": 1024, "batch": 32, "clock": "host"}
    rows = [
        make_row(method=method, model=model, world_size=size, median_us=us, **step)
        for model, size, us in (("mine", 4, 7e6), ("table2", 1, 1e6), ("table2", 2, 2e6))
        for method, us in (("standard", us), ("spattention", us / 2))
    ]
    found = {x.method: x for x in throughput(rows, "x.csv") if not x.reason}
    assert {name: x.tokens_per_s for name, x in found.items()} == {
        "standard": 32768, "spattention": 65536,
    }  # fmt: skip
    own = found["spattention"]
    assert (own.processes, own.tokens, own.common_rounds) == (2, 65536, False)
    assert throughput(rows[:2], "x.csv") == []


@pytest.mark.parametrize("what", ["code", "torch", "run", "device", "host"])
def test_only_rows_of_one_run_of_one_code_are_divided(what):
    shape = {"seq_len": 1024, "median_us": 90.0}
    rows = [make_row(method="standard", **shape), make_row(**shape)]
    assert {x.ratio for x in throughput(rows, "x.csv") if not x.reason} == {1.0}
    rows[1] = dataclasses.replace(rows[1], **{what: "another"})
    assert [x.name for x in throughput(rows, "x.csv") if not x.reason] == ["Standard"] * 2
    point = [dataclasses.replace(row, seq_len=4096) for row in rows]
    assert micro_benchmark(point, "x.csv") == []
    alike = [*point, dataclasses.replace(point[1], **{what: getattr(rows[0], what)})]
    assert len(micro_benchmark(alike, "x.csv")) == 1


def of_code(digit, time_utc, **us):
    rows = table_2_rows(**us)
    return [dataclasses.replace(x, code=digit * 12, time_utc=time_utc) for x in rows]


def test_of_runs_in_one_file_the_fuller_counts_and_of_equal_ones_the_last():
    def tokens(*runs):
        for rows in (runs, reversed(runs)):
            line = published([row for run in rows for row in run])["Standard"]
            yield round(1024e6 / line.tokens_per_s)  # microseconds

    old = of_code("0", "2026-01-01T00:00:00Z", **WHOLE)
    new = of_code("1", "2026-01-02T00:00:00Z", standard=50)
    assert set(tokens(old, new)) == {100}
    again = of_code("2", "2026-01-03T00:00:00Z", **WHOLE | {"standard": 40})
    assert set(tokens(old, again)) == {40}
    # What failed or has no name in the table makes no run fuller.
    failed = [dataclasses.replace(x, status="oom", median_us=None) for x in again[1:]]
    others = of_code("2", "2026-01-03T00:00:00Z", sliding_window=1, gapped_bands=2, local_only=3)
    assert set(tokens(old, [again[0], *failed, *others])) == {100}


def test_points_of_two_types_are_two_lines():
    rows = [
        make_row(method=method, median_us=us, dtype=dtype)
        for dtype in ("bfloat16", "float32")
        for method, us in (("standard", 36), ("spattention", 9))
    ]
    assert [x.dtype for x in micro_benchmark(rows, "x.csv")] == ["bfloat16", "float32"]


def test_the_commands_behind_training_steps_make_files_that_are_looked_for():
    for told in (*MADE_BY.values(), TRAIN_ON_A_TEXT):
        for name in re.findall(r"ARGS=(\w+)", told):
            assert name in COMMANDS and name.startswith("train")
    assert sum("ARGS=" in told for told in MADE_BY.values()) == 2


def test_of_several_runs_the_last_is_shown_and_no_time_that_cupti_made_too_long():
    def points(us, **changes):
        shape = {"time_utc": "2026-01-01T00:00:00Z"} | changes
        return [make_row(method="standard", median_us=us, **shape), make_row(median_us=9, **shape)]

    early, late = points(36), points(18, time_utc="2026-01-02T00:00:00Z", code="1" * 12)
    for rows in ([*early, *late], [*late, *early]):
        assert [x.speedup for x in micro_benchmark(rows, "x.csv")] == [2.0]
    eager = {"backend": "eager", "clock": "kernels", "reason": f"no graph: it waits; {SLOWED}"}
    assert [x.backend for x in micro_benchmark([*early, *points(9, **eager)], "x.csv")] == ["flex"]


def test_what_was_timed_beside_no_other_backend_is_over_no_fastest():
    (alone,) = micro_benchmark(
        [make_row(method="standard", median_us=36), make_row(median_us=9)], "x.csv"
    )
    assert (alone.fastest, alone.over_fastest, alone.speedup) == (None, None, 4.0)


def test_steps_as_the_released_code_attends_are_a_table_of_their_own():
    eager = {"phase": "step", "seq_len": 1024, "backend": "eager", "clock": "host"}
    released = eager | {"model": "table2 uncompiled"}
    rows = table_2_rows("step", standard=1000, spattention=800)
    assert [measured for measured, _ in shown(throughput(rows, "x.csv"))] == [
        "a training step", "attention alone"
    ]  # fmt: skip
    rows += [
        make_row(method="standard", median_us=100.0, **released),
        make_row(method="spattention_released", median_us=300.0, **released),
        make_row(method="spattention", median_us=1.0, **eager | {"model": "table2"}),
    ]
    found = dict(shown(throughput(rows, "x.csv")))
    lines = found["a training step, FlexAttention not compiled"]
    own = {x.method: x.ratio for x in lines if not x.reason}
    assert own == {"standard": 1.0, "spattention_released": pytest.approx(1 / 3)}
    assert {x.backend for x in lines} == {"eager"} and len(lines) == 10
    assert {x.ratio for x in found["a training step"] if x.name == "SPAttention"} >= {1.25}


def test_a_ratio_is_written_with_its_interval():
    assert times(1.2345, 1.2, 1.3) == "1.23 x (1.20 to 1.30)"
    assert times(1.2345, None, None, digits=3) == "1.234 x"


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
