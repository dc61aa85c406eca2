"""What tables and figures of training derive from rows."""

from dataclasses import replace

import pytest
from rich.console import Console

from bench.derived import Cell
from bench.train_figures import _methods
from bench.train_report import print_training
from bench.trainings import missed, scaling, tokens_per_s, trainings, utilisation
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


def test_rates_speed_ups_and_ceilings_follow_from_the_rows():
    call = {"batch": 4, "seq_len": 1024}
    rows = [
        made(backend="flex", us=200.0), made(backend="sdpa-cudnn", attention_us=40.0, other_us=50),
        made("spattention", 80.0), made("identity", 50.0, backend="identity"),
        make_row(method="standard", backend="sdpa-cudnn", median_us=12.0, **call),
        make_row(method="spattention", median_us=3.0, **call),
        make_row(method="spattention", median_us=99.0, clock="host", **call),
    ]  # fmt: skip
    (training,) = trainings(rows)
    assert [cell.method for cell in training.cells][-1] == "identity"
    assert training.dense.backend == "sdpa-cudnn"
    cell = cell_of(rows[2])
    assert training.speedup(cell).y == pytest.approx(1.25)
    assert training.zero_cost() == 2
    assert training.amdahl(cell) == pytest.approx(100 / (60 + 40 / 4))
    assert missed(rows[1]) == pytest.approx(0.1)
    rate = tokens_per_s(rows[2])
    assert rate.y == pytest.approx(4 * 1024 / 80e-6)
    assert rate.low == pytest.approx(rate.y / 1.01) and rate.high == pytest.approx(rate.y / 0.99)


def cell_of(row):
    return Cell(row.method, row.params, row.backend)


def test_scaling_and_utilisation():
    one, two = made(us=100.0), made(us=125.0, world_size=2)
    assert tokens_per_s(two).y == pytest.approx(2 * 4096 / 125e-6)
    assert scaling(two, [one, two]) == pytest.approx(0.8)
    assert scaling(two, [two, made(model="other")]) is None
    assert scaling(one, [one, two]) is None
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
