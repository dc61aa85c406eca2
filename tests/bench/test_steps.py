"""When a step is not measured, and what sets two runs of a model apart."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from bench import steps
from bench.chip import Reading
from bench.models import MODELS, with_options
from bench.record import STATUSES
from bench.steps import World, _no_step, kept
from bench.trainings import trainings
from tests.bench.rows import make_row
from tests.bench.training import job, step_row

CPU = torch.device("cpu")
CLOCKS = "device", "host"


@dataclass(frozen=True)
class Beside(World):
    """One of two processes; the other's status is known."""

    other: str = "ok"

    def maxima(self, values, device):
        return [max(values[0], float(STATUSES.index(self.other)))]


@pytest.mark.parametrize(
    ("own", "other", "status", "reason"),
    [
        ("mismatch", "ok", "mismatch", "attention by itself: own reason"),
        ("mismatch", "crash", "mismatch", "attention by itself: own reason"),
        ("ok", "oom", "oom", "attention by itself, on another rank"),
    ],
)
def test_attention_that_fails_on_one_rank_rules_out_the_step_on_all(own, other, status, reason):
    rows = [make_row(clock=clock, status=own, reason="own reason") for clock in CLOCKS]
    assert _no_step(rows, Beside(0, 2, other), CPU) == (status, reason)


def test_a_step_is_measured_where_attention_is_right_though_no_graph_can_hold_it():
    rows = [make_row(median_us=9.0, clock=clock) for clock in CLOCKS]
    assert _no_step(rows, World(), CPU) is None
    rows[0] = make_row(clock="device", status="unsupported", reason="no graph: it waits")
    assert _no_step(rows, World(), CPU) is None


def test_the_call_of_a_model_is_never_timed_by_cupti(monkeypatch):
    asked = []

    def measure_group(group, *rest):
        asked.append(group)
        return SimpleNamespace(rows={group.cells[0]: []})

    monkeypatch.setattr(steps, "measure_group", measure_group)
    steps._call_rows(job("spattention"), 1, None, lambda text: None)
    assert [(x.phases, x.cupti) for x in asked] == [(("fwd_bwd",), False)]


def test_a_step_counts_where_no_chip_was_slowed_down():
    """One that waited for a slower rank is as slow as it."""

    class Second(World):
        def maxima(self, values, device):
            return [max(pair) for pair in zip(values, (0.0, 0.0, 1.0, 0.0), strict=True)]

    cool, hot = (Reading(1980, 500.0, 60, reasons) for reasons in ((), ("thermal",)))
    series = kept([1.0, 2.0, 3.0, 4.0], [cool, hot, cool, None], Second(0, 2), CPU)
    assert (series.samples, series.discarded) == ([(0, 1.0), (3, 4.0)], 2)
    assert series.readings == [cool]


def test_what_ran_before_the_first_step_that_counts_is_no_matter_to_it(monkeypatch):
    """A reader of a CPU tells of what others did since it was read last: compiling, above all."""
    read = []

    def reader(device):
        own = []
        read.append(own)
        return lambda: own.append("read")

    monkeypatch.setattr(steps.chip, "reader", reader)
    row = step_row(job("spattention"))
    assert row.status == "ok" and len(row.samples) == len(read[-1]) == job().steps


def test_how_a_model_runs_is_part_of_its_name():
    told = {"checkpointing": False, "compiled": True, "shard": None}
    changes = ({}, {"shard": True}, {"shard": False}, {"compiled": False}, {"checkpointing": True})
    names = {with_options(MODELS["table2"], **told | change).name for change in changes}
    assert "table2" in names and len(names) == len(changes)


def test_random_tokens_and_text_are_two_runs():
    made = {"phase": "step", "model": "table2", "world_size": 1, "clock": "host"}
    rows = [make_row(median_us=9.0, data=data, **made) for data in ("random", "book.txt")]
    assert len(trainings(rows)) == 2
