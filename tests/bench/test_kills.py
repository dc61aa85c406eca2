"""A sweep that is killed or loses its worker goes on; `make kills` says so at length."""

import csv
import sys
from collections import Counter

import pytest

from tests import kills
from tests.disturbed import KEY, complete_lines, intact, key

linux = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")


@linux
@pytest.mark.parametrize("kinds", [["sweep_kill", "worker_kill", "sigterm"]])
def test_random_kills(tmp_path, kinds):
    table = tmp_path / "kills.csv"
    status = kills.main(["--small", "--kills", "1", "--kinds", *kinds, "--output", str(table)])
    found = read(table)
    assert [x["kind"] for x in found] == kinds
    assert status == 0, found
    assert {x["rows"] for x in found} == {"12"}


def test_lines_of_incomplete_problems_may_go_and_others_may_not():
    lines = [
        ",".join({"seq_len": n, "phase": phase}.get(name, "x") for name in KEY)
        for n in ("64", "96")
        for phase in ("fwd", "bwd")
    ]
    whole = "\n".join([",".join(KEY), *lines, ""]).encode()
    expected = Counter(map(key, intact(whole)))
    assert expected.total() == 4
    torn = whole[:-3]
    assert len(intact(torn)) == 3
    assert complete_lines(torn, expected) == {line.encode() for line in lines[:2]}


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
