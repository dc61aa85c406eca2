"""Processes that train together: whose failure counts, and who waits for whom."""

from dataclasses import replace

import pytest
import torch.distributed as dist
from rich.console import Console

from bench import ranks, train
from bench.ranks import Apart, JobFailed, Ranks
from tests.bench.training import (
    LLAMA,
    config_file,
    job,
)


def test_the_cause_is_the_failure_that_explains_the_others():
    store = dist.HashStore()
    ranks = [Ranks(k, k, 3, store) for k in range(3)]
    assert not ranks[0].failed(5)
    ranks[0].tell(5, "crash", "connection closed")
    ranks[2].tell(5, "oom", "no memory")
    assert ranks[1].failed(5) and not ranks[1].failed(6)
    assert ranks[1].cause(5) == ("oom", "rank 0: connection closed; rank 2: no memory")
    assert Ranks().agree("todo", [1, 2]) == [1, 2]


def test_a_process_that_does_not_get_on_is_given_up():
    with pytest.raises(JobFailed, match="timeout: no progress within 0 s, in starting"):
        Apart(Ranks(), ahead=False).run(job(), 0, 0.05, lambda text: None)


def test_the_next_process_waits_while_one_is_at_work(monkeypatch):
    used = []
    monkeypatch.setattr(ranks, "_watch", lambda own, *_: used.append(own.process))
    with Apart(Ranks(), ahead=True) as apart:
        for number in range(2):
            apart.run(job(), number, 60, lambda text: None)
        waiting = apart._next.process
        assert waiting.is_alive()
        assert len({process.pid for process in (*used, waiting)}) == 3
        assert not any(process.is_alive() for process in used)
    assert not waiting.is_alive()


def test_ranks_hear_how_the_first_ended_whatever_ended_it(tmp_path, monkeypatch):
    ranks = Ranks(0, 0, 2, dist.HashStore())
    monkeypatch.setattr(Ranks, "of_environment", lambda: ranks)

    def broken(*args):
        raise OSError("no space left")

    monkeypatch.setattr(train._Run, "measure", broken)
    config = config_file(tmp_path, LLAMA)
    request = train.Train(model_config=config, device="cpu", output=str(tmp_path), run="a")
    with pytest.raises(OSError, match="no space"):
        train.train(request, Console())
    assert ranks.store.get("status") == b"1"
    other = replace(ranks, rank=1, local=1)
    assert other.agree("todo", None) == []
    assert train._follow([job()], request, other) == 0  # it has heard
