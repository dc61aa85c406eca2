"""What a run knows of cells that earlier ones compiled."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench import ahead, recall
from bench.cells import Cell, Group
from bench.kernels import Ran
from bench.recall import Memory
from bench.record import environment
from methods import Problem

CELL = Cell("spattention", "flex")
SEEN = {"fwd": Ran("flex_attention;copy", "M=128 N=64;-"), "bwd": None}
ENV = environment(torch.device("cpu"))


@pytest.fixture
def group(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return Group(
        problem=Problem(seq_len=128, q_heads=2, head_dim=16, dtype="float32"),
        block_size=(128, 128), cells=(CELL,), phases=("fwd",), device="cpu", seed=0, rounds=2,
        seconds=0.1, run="test", shared=True,
    )  # fmt: skip


def test_what_was_seen_is_recalled_and_nothing_else(group):
    assert Memory(ENV).recall(group, CELL) is None
    Memory(ENV).add([(group, CELL, SEEN)])
    here = Memory(replace(ENV, git_sha="other", host="other"))
    assert here.recall(replace(group, run="other", seed=1), CELL) == SEEN
    others = [
        replace(group, problem=replace(group.problem, seq_len=256)),
        replace(group, block_size=(64, 64)), replace(group, phases=("fwd", "bwd")),
    ]  # fmt: skip
    assert [here.recall(other, CELL) for other in others] == [None] * 3
    assert here.recall(group, Cell("spattention", "eager")) is None
    for changed in {"code": "of another day"}, {"torch": "2.0"}, {"device": "other"}:
        assert Memory(replace(ENV, **changed)).recall(group, CELL) is None


def test_the_users_file_counts(group, tmp_path):
    path = tmp_path / "own.py"
    path.write_text("a = 1")
    cell = Cell(f"{path}:METHOD", "flex")
    Memory(ENV).add([(group, cell, SEEN)])
    assert Memory(ENV).recall(group, cell) == SEEN
    path.write_text("a = 2")
    assert Memory(ENV).recall(group, cell) is None


def test_a_line_that_was_cut_off_is_nothing_that_was_seen(group, tmp_path):
    Memory(ENV).add([(group, CELL, SEEN)])
    path = tmp_path / recall.NAME
    path.write_text(path.read_text()[:-20] + "\n")
    assert Memory(ENV).recall(group, CELL) is None
    Memory(ENV).add([(group, CELL, SEEN)])
    assert Memory(ENV).recall(group, CELL) == SEEN


def test_a_second_run_compiles_nothing_ahead(group, monkeypatch):
    done = []
    (known,) = ahead.compile_ahead([group], Memory(ENV), 60.0, lambda: done.append(1)).values()
    assert known.compile_s > 0
    monkeypatch.setattr(
        ahead, "side_by_side", lambda function, jobs, *_: [(x, 0 / 0) for x in jobs]
    )
    again = ahead.compile_ahead([group], Memory(ENV), 60.0, lambda: done.append(1))
    assert list(again.values()) == [replace(known, compile_s=None)] and len(done) == 2
    with pytest.raises(ZeroDivisionError):
        ahead.compile_ahead([group], None, 60.0, lambda: None)


def test_processes_that_compile_fit_on_the_device_together(monkeypatch):
    """Each has a context and the tensors of a cell; a small device holds fewer of large ones."""

    def room(seq_len: int, gigabytes: float, device: str = "cuda:0", beside: int = 0) -> int:
        held = SimpleNamespace(total_memory=int(gigabytes * 1e9))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: held)
        p = Problem(seq_len=seq_len, q_heads=32, head_dim=128)
        return ahead.room([SimpleNamespace(device=device, problem=p)], beside)

    assert room(1024, 80) == ahead.MOST
    assert 1 <= room(65536, 40) < room(65536, 80) < ahead.MOST
    assert room(1 << 20, 40) == 1
    assert room(1024, 80, beside=10**10) == 5
    assert room(65536, 40, "cpu") == ahead.MOST
