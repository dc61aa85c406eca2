"""How detection is counted: by what `compare` does, with a stand-in for time."""

from __future__ import annotations

import csv
import itertools
import math
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from bench import derived
from bench.compare import sides
from bench.record import Store
from tests import detection


def drifting(factor):
    """A sampler of a machine that swings by 20 %; what it costs goes up by the factor."""
    rounds = itertools.count()
    return lambda: 100 * factor * (1 + 0.2 * math.sin(1.7 * next(rounds)))


def pairs(factor, count=4):
    env = SimpleNamespace(cuda="13.0")
    runs = detection.comparisons(drifting(1.0), drifting(factor), count, lambda: None, env)
    return list(runs)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Eight rounds, however fast the machine is."""
    monkeypatch.setattr(detection, "SECONDS", 0.0)
    monkeypatch.setattr(detection, "ROUNDS", 8)


@pytest.mark.parametrize(("factor", "word"), [(1.0, "same"), (1.03, "slower"), (0.97, "faster")])
def test_rounds_of_one_run_pair_and_those_of_two_do_not(factor, word):
    """What both went through in a round cancels; between runs it is in the way."""
    found = detection.verdicts(pairs(factor))
    assert found == {"paired": Counter({word: 4}), "apart": Counter({"unclear": 4})}


def test_two_runs_by_the_host_clock_tell_no_small_difference():
    env = SimpleNamespace(cuda=None)
    steady = [lambda us=us: us for us in (100.0, 130.0)]
    found = detection.verdicts(list(detection.comparisons(*steady, 4, lambda: None, env)))
    assert found == {"paired": Counter(slower=4), "apart": Counter(unclear=4)}


def test_apart_are_runs_right_after_one_another(monkeypatch):
    asked = []
    one = derived.compare
    monkeypatch.setattr(
        derived, "compare", lambda a, b: (asked.append((a.run, b.run)), one(a, b))[1]
    )
    detection.verdicts(pairs(1.0, count=3))
    assert asked == [
        *((f"run {x}", f"run {x}") for x in range(3)),
        ("run 0", "run 1"), ("run 1", "run 2"), ("run 2", "run 1"),
    ]  # fmt: skip


def test_the_rows_are_such_as_compare_reads_from_a_file(tmp_path):
    """The same ratio and interval, though a file keeps six digits of a sample."""
    ((a, b),) = pairs(1.03, count=1)
    path = tmp_path / "x.csv"
    with Store(path) as store:
        store.append([a, b])
    ((read_a,), (read_b,)) = (x.rows.values() for x in sides(path, None, "b", "a"))
    assert (read_a.method, read_b.method) == ("a", "b")
    ratio = derived.compare(read_a, read_b)
    assert ratio == derived.compare(a, b)
    assert (ratio.paired, ratio.rounds) == (True, 8)


def test_a_line_says_how_many_of_which(tmp_path, monkeypatch):
    path = tmp_path / "detection.csv"
    monkeypatch.setattr(
        sys, "argv", ["x", "--device", "cpu", "--comparisons", "2", "--output", str(path)]
    )
    monkeypatch.setattr(detection, "the_call", lambda device: None)
    monkeypatch.setattr(detection, "samplers", lambda device, call, extra: lambda: 100.0)
    monkeypatch.setattr(detection, "plant", lambda *given: lambda: 100 * (1 + given[2]))
    detection.main()
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    counted = [(x["planted"], x["mode"], x["comparisons"], x["slower"]) for x in lines]
    assert counted[::2] == [
        ("0.0", "paired", "4", "0"), ("0.03", "paired", "2", "2"), ("0.01", "paired", "2", "0"),
    ]  # fmt: skip
    assert [float(x["measured"]) for x in lines[::2]] == pytest.approx([0, 0.03, 0.01], abs=1e-4)
    for x in lines:
        words = ("same", "unclear", "slower", "faster")
        assert sum(int(x[word]) for word in words) == int(x["comparisons"])


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("share", [0.03, 0.01])
def test_planted_work_is_what_was_asked_for(monkeypatch, kind, share):
    """On a CPU whose calls swing by 20 % too."""
    swing = [0.2 if kind == "cpu" else 0.0]
    rounds = itertools.count()

    def sampler(device, call, extra):
        def us():
            if call != "call":
                return call
            return 1e4 * (1 + swing[0] * math.sin(1.7 * next(rounds))) + (extra or 0.0)

        return us

    monkeypatch.setattr(detection, "samplers", sampler)
    monkeypatch.setattr(detection, "work", lambda device, size: size / 1e3)
    slow = detection.plant(torch.device(kind), "call", share)
    swing[0] = 0.0
    assert slow() / 1e4 - 1 == pytest.approx(share, rel=0.05)
