"""Each claim of the paper with its figure, and what the suite's tables say about it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import NamedTuple

from bench import paper
from bench.complexity import Complexity
from bench.paper_speeds import (
    AS_RELEASED,
    ATTENTION_ALONE,
    BACKEND,
    EAGER,
    NOT_MEASURED,
    TRAINING,
    Point,
    Throughput,
)
from bench.specialisation import RECIPE, Specialised
from bench.trained_heads import TrainedHeads
from methods import Problem

SPATTENTION, RELEASED = (reading["SPAttention"] for reading in paper.READINGS.values())
COMMAND, GPU_COMMAND = "`make paper`", "`make paper`, on a GPU"
# What Table 2 is measured as -> what makes it.
MADE_BY = {
    TRAINING: "`make results ARGS=train_table2`, then `make paper`, on a GPU",
    AS_RELEASED: "`make results ARGS=train_paper`, then `make paper`, on a GPU",
    ATTENTION_ALONE: GPU_COMMAND,
}


def shown(lines: Iterable[Throughput]) -> Iterator[tuple[str, list[Throughput]]]:
    """Lines by what they are measured as; without any, that of the released code is left out."""
    lines = list(lines)
    for measured in MADE_BY:
        found = [line for line in lines if line.measured == measured]
        if found or measured != AS_RELEASED:
            yield measured, found


@dataclass(frozen=True)
class Results:
    """The tables that a run of `paper` writes."""

    complexity: list[Complexity]
    micro_benchmark: list[Point]
    throughput: list[Throughput]
    specialisation: list[Specialised]
    trained_heads: list[TrainedHeads]


class Claim(NamedTuple):
    """A claim: where it stands, its figure, ours, and what makes ours."""

    text: str
    place: str
    theirs: str
    ours: str
    command: str = COMMAND


def claims(results: Results) -> Iterator[Claim]:
    """Every claim with a figure, in the order of the paper's argument."""
    yield from _pair_claims(results.complexity)
    yield from _speed_claims(results)
    yield from _specialisation_claims(results.specialisation)
    for table in (paper.TABLE_1, paper.TABLE_2, paper.TABLE_3):
        theirs = ", ".join(f"{'/'.join(x[:len(table.keys)])} {_average(table, x):.4f}"
                           for x in table.lines)  # fmt: skip
        yield Claim(
            "accuracy after pre-training (averages)", table.name, theirs,
            f"{NOT_MEASURED}: it needs the pre-training itself", "-",
        )  # fmt: skip


def _average(table: paper.Table, line: tuple) -> float:
    return line[len(table.keys) + table.columns.index("Avg")]


def _pair_claims(lines: Iterable[Complexity]) -> Iterator[Claim]:
    counted = [line for line in lines if line.reason is None]
    dense = {(c.seq_len, c.q_heads): c for c in counted if c.method == "standard"}

    def each(value: Callable[[Complexity], float], form: Callable[[float], str]) -> str:
        """The range over all (N, H), of both masks."""
        return _both({
            name: span([value(c) for c in counted if c.method == name], form)
            for name in (SPATTENTION, RELEASED)
        })  # fmt: skip

    def fewer(c: Complexity) -> float:
        return dense[c.seq_len, c.q_heads].allowed_pairs / c.allowed_pairs / c.q_heads

    yield Claim(
        "causal pairs that some head sees", "eq. 5", paper.PAIRS_SEEN,
        each(lambda c: 100 * c.seen_pairs / c.causal_pairs, percent),
    )  # fmt: skip
    yield Claim(
        "pairs of standard attention over those of SPAttention", "eqs. 6, 7", paper.PAIRS_FEWER,
        each(fewer, "{:.2f} H".format),
    )  # fmt: skip
    yield Claim(
        "pairs that more than one head sees", "eq. 8", paper.PAIRS_SEEN_TWICE,
        each(lambda c: 100 * (1 - c.seen_once / c.seen_pairs), "{:.1f} %".format),
    )  # fmt: skip


def _speed_claims(results: Results) -> Iterator[Claim]:
    points = results.micro_benchmark
    own = {(p.backend, p.clock) for p in points if p.backend in (BACKEND, EAGER)}
    for backend, clock in sorted(own, key=lambda x: (x[0] == EAGER, x[1])) or [(BACKEND, "any")]:
        chosen = sorted((p for p in points if (p.backend, p.clock) == (backend, clock)),
                        key=lambda p: p.speedup)  # fmt: skip
        # Of several sizes of blocks the fastest.
        found = {p.method: times(p.speedup, p.low, p.high) for p in chosen}
        ours = {name: found.get(name) for name in (SPATTENTION, RELEASED)}
        yield Claim(
            f"forward + backward over dense, {_shape(paper.MICRO_BENCHMARK)} (ours: `{backend}`, "
            f"{clock} clock)", "text", f"about {paper.MICRO_BENCHMARK_SPEEDUP:g} x", _both(ours),
            GPU_COMMAND,
        )  # fmt: skip
    for measured, found in shown(results.throughput):
        yield from _table_2_claims(found, measured)


def _table_2_claims(lines: Sequence[Throughput], measured: str) -> Iterator[Claim]:
    own = {x.method: x.ratio and times(x.ratio, x.low, x.high, digits=3)
           for x in lines if x.name == "SPAttention"}  # fmt: skip
    yield Claim(
        f"tokens/s of SPAttention over Standard (ours: {measured})", paper.TABLE_2.name,
        f"{paper.TABLE_2_SPEEDUP} x", _both(own), MADE_BY[measured],
    )  # fmt: skip
    theirs = sorted(paper.TABLE_2.column("tok/s").items(), key=lambda pair: -pair[1])
    for reading in paper.READINGS:
        yield Claim(
            f"order by tokens/s, methods {reading} (ours: {measured})", paper.TABLE_2.name,
            " > ".join(name for name, _ in theirs),
            order([x for x in lines if x.reading == reading]), MADE_BY[measured],
        )  # fmt: skip


def order(lines: Sequence[Throughput]) -> str:
    """Names by tokens/s: ">" where all ranks before it are below all ranks after it, else "or".

    Those that are missing are named after it.
    """
    ordered = sorted((x for x in lines if not x.reason), key=lambda x: -x.tokens_per_s)
    if len(ordered) < 2:
        return NOT_MEASURED
    text = ordered[0].name
    for at, line in enumerate(ordered[1:], 1):
        told = max(x.rank_high for x in ordered[:at]) < min(x.rank_low for x in ordered[at:])
        text += f" {'>' if told else 'or'} {line.name}"
    missing = ", ".join(x.name for x in lines if x.reason)
    return f"{text}; without {missing}" if missing else text


def _specialisation_claims(lines: Iterable[Specialised]) -> Iterator[Claim]:
    lines = list(lines)
    flat = {x.method: x for x in lines if x.weights == "uniform"}
    sigmas = {m: [x.sigma for x in lines if (x.method, x.weights) == (m, "untrained")]
              for m in flat}  # fmt: skip
    entropies = {method: untrained_entropy(lines, method) for method in flat}
    for name, theirs in paper.SPECIALISATION.items():
        method = paper.READINGS["as released"][name]
        yield Claim(
            f"head diversity sigma, {name}", "text",
            f"{theirs.sigma_low:.4f} to {theirs.sigma_high:.4f}",
            f"{span(sigmas[method])} untrained, "
            f"{flat[method].sigma:.4f} uniform (`{method}`)",
        )  # fmt: skip
        yield Claim(
            f"mean entropy, {name}", "text", f"{theirs.entropy:.4f}",
            f"{entropies[method]:.4f} untrained, {flat[method].entropy:.4f} uniform "
            f"(`{method}`)",
        )  # fmt: skip
    change = 100 * (entropies[RELEASED] / entropies["standard"] - 1)
    yield Claim(
        "change of the mean entropy", "text", f"{paper.SPECIALISATION_ENTROPY_PERCENT:.2f} %",
        f"{change:.2f} % untrained (`{RELEASED}`)",
    )  # fmt: skip
    ratios, most = _sigma_ratios(lines), paper.SPECIALISATION_SIGMA_RATIO
    over = sum(ratio > most for ratio in ratios)
    yield Claim(
        "sigma of SPAttention over Standard's", "text", f"over {most} x",
        f"{over} of {len(ratios)} seeds over {most} x, by seed at least "
        f"{span(ratios, '{:.0f} x'.format)}, untrained (`{RELEASED}`); Standard's is 0 for "
        "uniform attention",
    )  # fmt: skip
    limit = math.log(RECIPE.seq_len / RECIPE.q_heads)
    bounds = (f"{flat[method].bound:.3f} (`{method}`)" for method in flat)
    yield Claim(
        f"largest entropy of a query, nats; ours where log(N / H) is {limit:.3f}",
        "text", ", against ".join(paper.ENTROPY_BOUNDS), ", ".join(bounds),
    )  # fmt: skip


def _sigma_ratios(lines: Sequence[Specialised]) -> list[float]:
    """By seed, the least sigma of the released mask over standard's largest."""
    return [
        min(x.sigma for x in lines if (x.method, x.seed) == (RELEASED, seed))
        / max(x.sigma for x in lines if (x.method, x.seed) == ("standard", seed))
        for seed in dict.fromkeys(x.seed for x in lines if x.weights == "untrained")
    ]


def untrained_entropy(lines: Iterable[Specialised], method: str) -> float:
    """Mean over layers and seeds."""
    return mean(x.entropy for x in lines if x.method == method and x.weights == "untrained")


def percent(share: float) -> str:
    """A hundred only where nothing is missing."""
    return f"{share:.1f} %" if share == 100 or share < 99.95 else "99.9 %"


def times(ratio: float, low: float | None, high: float | None, digits: int = 2) -> str:
    """A speed-up, with its interval where there is one."""
    interval = "" if low is None else f" ({low:.{digits}f} to {high:.{digits}f})"
    return f"{ratio:.{digits}f} x{interval}"


def _both(ours: dict[str, str | None]) -> str:
    """One figure a mask, each with the preset that it is of."""
    given = [f"{text} (`{name}`)" for name, text in ours.items() if text]
    return "; ".join(given) or NOT_MEASURED


def span(values: Iterable[float], form: Callable[[float], str] = "{:.4f}".format) -> str:
    """The least and the largest, or one where both read alike."""
    values = list(values)
    texts = [form(end) for end in (min(values), max(values))]
    return texts[0] if texts[0] == texts[1] else " to ".join(texts)


def _shape(p: Problem) -> str:
    return f"({p.batch}, {p.q_heads}, {p.seq_len}, {p.head_dim})"
