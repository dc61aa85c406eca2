"""What is measured together, what is known of a cell, and the rows that come of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from bench import chip, stats
from bench.backends import Attention
from bench.ceilings import Ceilings, Needed, beyond
from bench.confirm import Results
from bench.derived import FLOPS_PER_PAIR
from bench.record import STEP, Environment, Row, code_hash
from bench.sampling import Series
from bench.specs import parameters_text, parse_method, source_file
from bench.timing import Sampler
from methods import Method, Problem
from methods.method import ScoreMod

SLOWED = "more than by the host clock, since CUPTI slows down launches, of which this has many"
ON_HOST = ("layout", STEP)  # phases that have no other clock, and no state of the L2


@dataclass(frozen=True)
class Cell:
    """A method, as the command line names it, on a backend."""

    method: str
    backend: str


@dataclass(frozen=True, kw_only=True)
class Group:
    """Everything that is measured on one problem, so that its samples can be interleaved.

    Attributes:
        rounds, seconds: when sampling ends, as `sample_rounds` has it.
        shared: whether the cells' samples are interleaved; False for one that runs alone.
        cupti: whether CUPTI times what no graph can hold. It makes every later launch slower.
    """

    problem: Problem
    block_size: tuple[int, int]
    cells: tuple[Cell, ...]
    phases: tuple[str, ...]
    device: str
    seed: int
    rounds: int
    seconds: float
    run: str
    shared: bool = True
    cupti: bool = True

    def clocks(self, phase: str) -> tuple[str, ...]:
        on_host_alone = self.device == "cpu" or phase in ON_HOST
        return ("host",) if on_host_alone else ("device", "host")


@dataclass
class Prepared:
    """A cell that may be timed: what is known of it, and a sampler for every phase and clock.

    Attributes:
        kept: block lists and what else a captured graph reads by its address.
        refused: by phase, the status and the reason of what is not timed.
        uncaptured: by phase, why no graph could hold it: CUPTI timed it, or the host alone; of a
            step, why CUPTI did not.
        attention: the function, once it is gated.
        timed: by phase, runs what is timed once more; returns the number of the inputs that it
            takes last, and what it makes of them.
        cold: by phase and clock of a device, bytes that a call must move, as `cold_bytes` has it.
    """

    cell: Cell
    method: Method
    state: Any = None
    kept: tuple[BlockMask, ScoreMod | None] | None = None
    facts: dict = field(default_factory=dict)
    layout_bytes: int | None = None
    refused: dict[str, tuple[str, str]] = field(default_factory=dict)
    uncaptured: dict[str, str] = field(default_factory=dict)
    samplers: dict[tuple[str, str], Sampler] = field(default_factory=dict)
    attention: Attention | None = None
    timed: dict[str, Callable[[], tuple[int, Results]]] = field(default_factory=dict)
    needed: Needed | None = None
    cold: dict[tuple[str, str], float] = field(default_factory=dict)
    series: dict[tuple[str, str], Series] = field(default_factory=dict)

    def list_bytes(self) -> int:
        lists = vars(self.kept[0]).values() if self.kept else ()
        return sum(x.nbytes for x in lists if isinstance(x, Tensor))


def utc_now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def failure_rows(
    group: Group, env: Environment, cell: Cell, status: str, reason: str
) -> list[Row]:
    """A row for every phase and clock of a cell that could not be measured."""
    prepared = Prepared(cell, parse_method(cell.method))
    prepared.refused = {phase: (status, reason) for phase in group.phases}
    return rows_of(group, env, prepared, None)


def rows_of(
    group: Group, env: Environment, prepared: Prepared, ceilings: Ceilings | None,
    stamp: str | None = None,
) -> list[Row]:  # fmt: skip
    """A row for every phase and clock.

    Args:
        stamp: UTC time, the same for all cells whose samples were interleaved; by default now.
    """
    stamp = stamp or utc_now()
    _refuse_the_impossible(group.problem, prepared, ceilings)
    rows = []
    for phase in group.phases:
        for clock in group.clocks(phase):
            if clock == "device" and (phase, "kernels") in prepared.series:
                clock = "kernels"
            rows.append(_row(group, env, prepared, phase, clock, ceilings, stamp))
    return rows


def _refuse_the_impossible(p: Problem, prepared: Prepared, ceilings: Ceilings | None) -> None:
    """A cell that is faster than its chip can be has no number, in any phase."""
    for (phase, clock), series in prepared.series.items():
        unbounded = clock == "host" or phase not in FLOPS_PER_PAIR
        if ceilings is None or unbounded or not series.samples:
            continue
        pairs, cold = prepared.facts["allowed_pairs"], prepared.cold[phase, clock]
        reason = beyond(ceilings, p, phase, pairs, cold, series.median)
        if reason:
            prepared.refused |= {x: ("mismatch", reason) for x, _ in prepared.series}
            prepared.series.clear()
            return


def _row(
    group: Group, env: Environment, prepared: Prepared, phase: str, clock: str,
    ceilings: Ceilings | None, stamp: str,
) -> Row:  # fmt: skip
    user_file = source_file(prepared.cell.method)
    values = asdict(env) | ({"code": code_hash([user_file])} if user_file else {})
    values |= prepared.facts | (ceilings._asdict() if ceilings else {})
    if phase == "layout":
        values["peak_bytes"] = prepared.layout_bytes
    told = clock != "host" or phase == STEP
    graphless = _uncaptured(prepared, phase) if told else None
    sound = "unsupported" if graphless and clock == "device" else "ok", graphless
    values["status"], values["reason"] = prepared.refused.get(phase, sound)
    if series := prepared.series.get((phase, clock)):
        values |= figures(series, group.shared)
    return Row(
        run=group.run, time_utc=stamp,
        method=prepared.method.name, params=parameters_text(prepared.method),
        backend=prepared.cell.backend, **asdict(group.problem),
        q_block=group.block_size[0], kv_block=group.block_size[1], phase=phase, clock=clock,
        l2=None if group.device == "cpu" or phase in ON_HOST else "cold", **values,
    )  # fmt: skip


def _uncaptured(prepared: Prepared, phase: str) -> str | None:
    """Why no graph holds a phase, and whether the time that CUPTI took of it is too long."""
    reason = prepared.uncaptured.get(phase)
    traced, host = (prepared.series.get((phase, clock)) for clock in ("kernels", "host"))
    if reason and traced and host and (traced.median or 0) > (host.median or math.inf):
        return f"{reason}; {SLOWED}"
    return reason


def figures(series: Series, shared: bool) -> dict:
    """What samples say, as fields of a row; rounds pair where a cell shared them."""
    values = {"discarded": series.discarded} | chip.summary(series.readings)
    if not series.samples:
        reason = f"all {series.discarded} samples were taken while the chip was slowed down"
        values |= {"status": "timeout", "reason": reason}
    else:
        numbers, samples = zip(*series.samples, strict=True)
        median, low, high = stats.median_interval(samples)
        values |= {
            "samples_us": ";".join(f"{us:.6g}" for us in samples),
            "rounds": ";".join(map(str, numbers)) if shared else None,
            "median_us": median, "ci_low_us": low, "ci_high_us": high,
        }  # fmt: skip
    return values
