"""One group: the gate comes before every number, rounds are interleaved, failures are rows."""

import weakref
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch._inductor.exc import InductorError

from bench import measure, timing
from bench.backends import BACKENDS
from bench.cells import SLOWED, Cell, Group, Prepared, rows_of
from bench.failures import one_line, status_of
from bench.measure import Clockwork, Machine, measure_group
from bench.record import environment
from bench.sampling import Series
from methods import METHODS, Problem

GROUP = Group(
    problem=Problem(seq_len=200, q_heads=4, kv_heads=2, head_dim=16, dtype="float32"),
    block_size=(64, 32),
    cells=(
        Cell("standard", "blockwise"), Cell("spattention", "blockwise"),
        Cell("standard", "sdpa-flash"),
    ),
    phases=("layout", "fwd", "bwd", "fwd_bwd"), device="cpu", seed=3, rounds=3, seconds=0.0,
    run="test",
)  # fmt: skip
ENVIRONMENT = environment(torch.device("cpu"))


def run(group=GROUP, announce=lambda cell: None):
    """As the process that owns a device does it: what has to run alone comes after the others."""
    found = measure_group(group, Machine(ENVIRONMENT), announce, Clockwork())
    for cell in found.alone:
        found.rows.update(run(replace(group, cells=(cell,), shared=False), announce))
    return found.rows


def test_every_cell_and_phase_has_a_gated_row():
    rows = run()
    assert list(rows) == list(GROUP.cells)
    for cell, measured in rows.items():
        assert [row.phase for row in measured] == list(GROUP.phases)
        for row in measured:
            assert row.problem == GROUP.problem
            assert (row.clock, row.method, row.backend) == ("host", cell.method, cell.backend)
            assert 0 < row.error_budget <= 1
            assert None not in (row.error_out, row.error_dq, row.error_dk, row.error_dv)
            if row.phase == "layout" and cell.backend == "sdpa-flash":
                assert (row.status, row.samples, row.computed_pairs) == ("unsupported", [], None)
            else:
                assert row.status == "ok"
                assert row.rounds == "0;1;2"
                assert row.ci_low_us <= row.median_us <= row.ci_high_us
                assert min(row.samples) <= row.median_us <= max(row.samples)


def test_pairs_are_those_of_the_method():
    rows = run(replace(GROUP, phases=("fwd",)))
    standard, ours, sdpa = (measured[0] for measured in rows.values())
    assert standard.allowed_pairs == sdpa.allowed_pairs == 4 * 200 * 201 // 2
    assert ours.allowed_pairs == 200 * 201 // 2
    assert ours.allowed_pairs < ours.computed_pairs < standard.computed_pairs
    assert standard.computed_pairs % (64 * 32) == 0


def test_a_method_in_which_no_query_sees_a_key_has_no_time():
    """It would be the fastest of all; here its bands are narrower than a token."""
    tiny = replace(GROUP.problem, seq_len=3)
    cells = Cell("gapped_bands", "blockwise"), Cell("spattention", "blockwise")
    nothing, some = run(replace(GROUP, problem=tiny, cells=cells, phases=("fwd",))).values()
    assert [(row.status, row.allowed_pairs) for row in nothing] == [("mismatch", 0)]
    assert nothing[0].reason == "no query sees a key: the method allows no pair of them"
    assert [(row.status, row.allowed_pairs > 0) for row in some] == [("ok", True)]


def test_samples_are_interleaved():
    """Every cell is sampled once a round before any is sampled twice, in changing orders."""
    announced = []
    run(replace(GROUP, phases=("fwd",)), announced.append)
    preparing, sampling, confirming = announced[:3], announced[3:12], announced[12:]
    assert preparing == confirming == list(GROUP.cells)
    rounds = [tuple(sampling[i : i + 3]) for i in range(0, len(sampling), 3)]
    assert len(rounds) == 3
    assert all(set(order) == set(GROUP.cells) for order in rounds)
    assert len(set(rounds)) > 1


def test_what_needs_cupti_is_sampled_when_all_else_is_done():
    order = []
    ready = [Prepared(cell, METHODS["standard"]) for cell in GROUP.cells[:2]]
    for prepared in ready:
        for clock in ("kernels", "host"):
            prepared.samplers["fwd", clock] = lambda clock=clock: order.append(clock) or 1.0
    bench = SimpleNamespace(group=GROUP, clockwork=Clockwork(), device=torch.device("cpu"))
    for cupti in (False, True):
        measure.Bench.sample(bench, ready, cupti, lambda: None, lambda cell: None)
        order.append("then")
    assert order == ["host"] * 6 + ["then"] + ["kernels"] * 6 + ["then"]
    assert all(len(x.series["fwd", "kernels"].samples) == 3 for x in ready)


def test_what_was_sampled_without_cupti_stays_where_memory_ends_with_it():
    """Afterwards every launch takes longer; what found no memory has another process."""
    order = []

    def fails():
        order.append("kernels")
        raise MemoryError("the others hold it")

    ready = [Prepared(cell, METHODS["standard"]) for cell in GROUP.cells[:2]]
    for prepared, traced in zip(
        ready, (lambda: order.append("kernels") or 1.0, fails), strict=True
    ):
        prepared.samplers["fwd", "host"] = lambda: order.append("host") or 1.0
        prepared.samplers["fwd", "kernels"] = traced
    bench = SimpleNamespace(group=GROUP, clockwork=Clockwork(), device=torch.device("cpu"))
    bench.sample = partial(measure.Bench.sample, bench)
    machine = Machine(ENVIRONMENT)
    for cupti in (False, True):
        short = measure._sample(bench, ready, cupti, machine, lambda cell: None)
    assert short == [GROUP.cells[1]] and [x.cell for x in ready] == [GROUP.cells[0]]
    assert order[:6] == ["host"] * 6 and set(order[6:]) == {"kernels"}
    assert len(ready[0].series["fwd", "host"].samples) == 3


@pytest.mark.parametrize(("span", "slowed"), [(4.0, False), (5.0, False), (6.0, True)])
def test_what_no_graph_could_hold_says_why(span, slowed):
    group, cell = replace(GROUP, phases=("fwd",), device="cuda:0"), GROUP.cells[0]
    prepared = Prepared(cell, METHODS["standard"], facts={"allowed_pairs": 1})
    prepared.uncaptured["fwd"] = "no graph: RuntimeError: it waits"
    for clock, us in (("kernels", span), ("host", 5.0)):
        prepared.series["fwd", clock] = Series(samples=[(0, us), (1, us)])
    found = {row.clock: row for row in rows_of(group, ENVIRONMENT, prepared, None)}
    why = "no graph: RuntimeError: it waits"
    assert found["kernels"].reason == (f"{why}; {SLOWED}" if slowed else why)
    assert (found["kernels"].status, found["host"].reason) == ("ok", None)
    del prepared.series["fwd", "kernels"]
    found = {row.clock: row for row in rows_of(group, ENVIRONMENT, prepared, None)}
    assert (found["device"].status, found["device"].reason) == (
        "unsupported", "no graph: RuntimeError: it waits"
    )  # fmt: skip
    assert (found["host"].status, found["host"].median_us) == ("ok", 5.0)


@pytest.mark.parametrize(("cupti", "clocks"), [(True, ["kernels"]), (False, [])])
def test_cupti_times_what_no_graph_can_hold_only_where_it_may(monkeypatch, cupti, clocks):
    def waits(calls, device):
        raise RuntimeError("it waits")

    monkeypatch.setattr(measure.timing, "device_sampler", waits)
    monkeypatch.setattr(measure, "raise_if_lost", lambda device: None)
    prepared = Prepared(GROUP.cells[0], METHODS["standard"])
    bench = SimpleNamespace(
        group=replace(GROUP, cupti=cupti), device=torch.device("cuda:0"),
        _cold_bytes=lambda prepared, phase, sets: sets,
    )  # fmt: skip
    measure.Bench._add_device_sampler(bench, prepared, "fwd", [lambda: None] * 3)
    assert [clock for _, clock in prepared.samplers] == clocks
    assert prepared.uncaptured == {"fwd": "no graph: RuntimeError: it waits"}
    assert prepared.cold == dict.fromkeys(prepared.samplers, 1)


def test_a_graph_goes_round_every_set_of_inputs(monkeypatch):
    sampler = SimpleNamespace(last=lambda: (2, ()))
    monkeypatch.setattr(measure.timing, "device_sampler", lambda calls, device: sampler)
    prepared = Prepared(GROUP.cells[0], METHODS["standard"])
    bench = SimpleNamespace(
        group=GROUP, device=torch.device("cuda:0"),
        _cold_bytes=lambda prepared, phase, sets: sets,
    )  # fmt: skip
    measure.Bench._add_device_sampler(bench, prepared, "fwd", [lambda: None] * 3)
    assert prepared.samplers == {("fwd", "device"): sampler}
    assert prepared.cold == {("fwd", "device"): 3}
    assert prepared.timed["fwd"]() == (2, ())  # the graph, whose last call reads the third set


def raising(error, *cell):
    raise error


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError("needs 12 GiB"), "oom"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "oom"),
        (IndexError("of the method's author"), "crash"),
        (NotImplementedError("no such kernel"), "unsupported"),
        (RuntimeError("a launch failed"), "crash"),
    ],
)
def test_a_cell_that_cannot_run_is_a_row(monkeypatch, error, status):
    broken = replace(BACKENDS["sdpa-flash"], build=partial(raising, error))
    monkeypatch.setitem(BACKENDS, "sdpa-flash", broken)
    rows = run(replace(GROUP, phases=("fwd", "bwd")))
    for row in rows[Cell("standard", "sdpa-flash")]:
        assert (row.status, row.median_us) == (status, None)
        assert str(error) in row.reason
    assert {row.status for row in rows[Cell("standard", "blockwise")]} == {"ok"}


def test_what_does_not_fit_beside_the_others_runs_alone(monkeypatch):
    build, attempts = BACKENDS["sdpa-flash"].build, []

    def crowded(*cell):
        attempts.append(cell)
        if len(attempts) == 1:
            raise MemoryError("the others hold it")
        return build(*cell)

    monkeypatch.setitem(BACKENDS, "sdpa-flash", replace(BACKENDS["sdpa-flash"], build=crowded))
    rows = run(replace(GROUP, phases=("fwd",)))
    (alone,), (beside,) = rows[Cell("standard", "sdpa-flash")], rows[Cell("standard", "blockwise")]
    assert (alone.status, alone.rounds, len(alone.samples)) == ("ok", None, 3)
    assert beside.rounds == "0;1;2"


def test_what_runs_alone_finds_the_memory_of_the_others_free(monkeypatch):
    build, held, alive = BACKENDS["sdpa-flash"].build, [], []
    add = measure.Bench._add_samplers

    def remember(bench, prepared, *job):
        held.append(weakref.ref(prepared))
        add(bench, prepared, *job)

    def crowded(*cell):
        alive.append(sum(x() is not None for x in held))
        if len(alive) == 1:
            raise MemoryError("the others hold it")
        return build(*cell)

    monkeypatch.setattr(measure.Bench, "_add_samplers", remember)
    monkeypatch.setitem(BACKENDS, "sdpa-flash", replace(BACKENDS["sdpa-flash"], build=crowded))
    run(replace(GROUP, phases=("fwd",)))
    assert alive == [2, 0]


def test_what_finds_no_memory_while_it_is_sampled_runs_alone(monkeypatch):
    made, sampler_of = [], timing.host_sampler

    def second_fails(call, device):
        made.append(call)
        second = partial(raising, RuntimeError("CUDA error: out of memory"))
        return second if len(made) == 2 else sampler_of(call, device)

    monkeypatch.setattr(timing, "host_sampler", second_fails)
    rows = run(replace(GROUP, phases=("fwd",)))
    assert len(made) == 4
    assert {row.status for cell in GROUP.cells for row in rows[cell]} == {"ok"}
    alone = [cell for cell in GROUP.cells if rows[cell][0].rounds is None]
    assert alone == [GROUP.cells[1]]


def test_two_variants_of_a_method_keep_their_rows_apart():
    cells = tuple(Cell(f"sliding_window:window={w}", "blockwise") for w in (8, 16))
    rows = run(replace(GROUP, cells=cells, phases=("fwd",)))
    assert [rows[cell][0].params for cell in cells] == ["window=8", "window=16"]


@pytest.mark.parametrize("block_size", [(64, 32), (128, 256)])
def test_blocks_without_tiles_are_unsupported_in_plain_words(monkeypatch, block_size):
    error = NotImplementedError("LoweringException: NoValidChoicesError: No choices to select")
    broken = replace(BACKENDS["sdpa-flash"], build=partial(raising, error))
    monkeypatch.setitem(BACKENDS, "sdpa-flash", broken)
    group = replace(GROUP, cells=GROUP.cells[2:], block_size=block_size, phases=("fwd",))
    (row,) = run(group)[GROUP.cells[2]]
    assert row.status == "unsupported"
    assert ("blocks of 64x32" in row.reason) == (block_size == (64, 32))
    assert ("No choices to select" in row.reason) == (block_size != (64, 32))


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "oom"),
        (RuntimeError("CUDA error: out of memory"), "oom"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "oom"),
        (InductorError(RuntimeError("Triton Error [CUDA]: out of memory"), None), "oom"),
        (InductorError(RuntimeError("out of resource: shared memory"), None), "unsupported"),
        (NotImplementedError("no kernel"), "unsupported"),
        (InductorError(RuntimeError("a bug"), None), "crash"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "crash"),
    ],
    ids=str,
)
def test_errors_mean(error, status):
    assert status_of(error) == status


def test_failures_say_what_they_are():
    assert one_line(ValueError("a\n  b")) == "ValueError: a b"
