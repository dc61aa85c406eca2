"""The page "What the paper says and what we measured", from the tables of a run alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from statistics import mean

from bench import paper
from bench.compare import LIMIT
from bench.complexity import Complexity
from bench.paper_claims import Results, claims, percent, shown, span, times, untrained_entropy
from bench.paper_figures import FIGURE_2_HEAD
from bench.paper_speeds import ATTENTION_ALONE, EAGER, NOT_MEASURED, Point, Throughput
from bench.report import quantity
from bench.specialisation import (
    ENTROPY_TOLERANCE,
    LOG_FLOOR,
    RECIPE,
    SIGMA_TOLERANCE,
    Specialised,
)
from bench.specs import parameters_text
from bench.tables import markdown
from bench.trained_heads import INITIAL, TRAINED, TrainedHeads
from methods import METHODS

ROUNDED = 1.5e-4  # how far the mean of figures of four digits can lie from their printed average


def page(results: Results) -> str:
    """Markdown; its pictures are expected in the same folder."""
    sections = (
        _head(),
        _claims(results),
        RELEASED_CODE,
        _masks(),
        _complexity(results.complexity),
        _micro_benchmark(results.micro_benchmark),
        _throughput(results.throughput),
        _specialisation(results.specialisation),
        _trained_heads(results.trained_heads),
        _quoted(),
    )
    return "\n".join(line for section in sections for line in (*section, ""))


def _head() -> Iterator[str]:
    yield "# What the paper says and what we measured"
    yield ""
    yield f"{paper.TITLE} ({paper.SOURCE})."
    yield ""
    yield (
        "`spattention` is the paper's equations 2 to 4, `spattention_released` the mask of its "
        "released `SPAttention.py`, which gives every head a local band besides its own. They "
        "are two masks, so each figure says which one it is of. The released file of the ablation "
        "EBALL is equation 4 too: `spattention` is EBALL, which Table 3 lists beside SPAttention. "
        "The paper's figures are quoted from `bench/paper.py`; ours are made by the command "
        "beside them. Speeds are those of the results file under their table: ratios of medians "
        "of one run of one code, with 99 % intervals."
    )


def _claims(results: Results) -> Iterator[str]:
    yield "## Claims"
    yield ""
    heads = ("claim", "where", "the paper", "measured here", "made by")
    yield from markdown(heads, claims(results), numbers=())
    yield ""
    yield RANKS_TEXT


RANKS_TEXT = (
    f"Samples that do not tell methods apart by {100 * (LIMIT - 1):.0f} % leave them several "
    "ranks: from 1 more than the methods told to be faster, to as many as are not told to be "
    "slower. In an order, `>` stands where all ranks before it are below all ranks after it, and "
    "`or` elsewhere. Ranks are among the methods that were measured."
)
RELEASED_CODE = (
    "## The released code",
    "",
    "Harry-Miral/MEHC, besides its masks:",
    "",
    "- As released, `model.py` hands q, k and v to the attention transposed, so attention runs "
    "across the heads of one token and mixes no tokens, in every variant, the baseline included "
    "(run with ai2-olmo 0.6.0: replacing token 5 changes the logits at position 5 only). Whether "
    "the paper's runs used this code cannot be told from the repository.",
    "- It calls `flex_attention` without `torch.compile`, which materialises the N x N scores "
    f"where no compiled model surrounds the call. The backend `{EAGER}` is that call.",
)


def _masks() -> Iterator[str]:
    yield "## Figures 1 and 2"
    for text, stem in (
        ("Figure 1 by equation 4", "figure_1_spattention"),
        ("Figure 1 by the released mask", "figure_1_spattention_released"),
        (f"Figure 2, the ablations, head {FIGURE_2_HEAD}", "figure_2"),
    ):
        yield ""
        yield f"{text}; then with the blocks of 128 that a kernel visits."
        yield ""
        yield f"![{text}]({stem}.png)"
        yield ""
        yield f"![{text}, with the classes of its blocks]({stem}_blocks.png)"


def _complexity(lines: Sequence[Complexity]) -> Iterator[str]:
    yield "## Complexity (eqs. 5 to 8)"
    yield ""
    yield (
        "Pairs are (head, query, key), causal, counted by evaluating the definition on all of "
        "them. Visited: pairs in the blocks of 128 that hold an allowed one. Covered: (query, "
        "key) that some head sees; once: that exactly one sees; both of all causal ones. "
        "Overlap: heads that see a covered pair, on average. Empty rows: (head, query) without "
        "a key. Busiest head: its pairs over those of the mean head. Blocks are counted whole, "
        "pairs beyond the diagonal or the last token too. The methods are the presets: "
        f"{', '.join(_presets())}. No runnable reference of Longformer or BigBird is causal: "
        "these are the published masks, cut at the diagonal."
    )
    heads = ("method", "allowed", "visited", "allowed, of standard's", "visited, of standard's",
             "covered", "once", "overlap", "empty rows", "busiest head")  # fmt: skip
    for (n, h), group in groupby(lines, key=lambda c: (c.seq_len, c.q_heads)):
        group = list(group)
        dense = next(c for c in group if c.method == "standard")
        yield ""
        yield f"N = {n}, H = {h}:"
        yield ""
        counted = [c for c in group if c.reason is None]
        yield from markdown(heads, [_complexity_cells(c, dense) for c in counted])
        for c in group:
            if c.reason is not None:
                yield ""
                yield f"Skipped: `{c.method}`: {c.reason}."
    yield ""
    yield "![Work of each head](complexity.png)"


def _presets() -> Iterator[str]:
    """Those with parameters."""
    for name in ("sliding_window", "longformer", "bigbird"):
        yield f"`{name}` with {parameters_text(METHODS[name]).replace(',', ', ')}"


def _complexity_cells(c: Complexity, dense: Complexity) -> list[str]:
    rows = c.q_heads * c.seq_len
    return [
        f"`{c.method}`",
        f"{c.allowed_pairs}",
        f"{c.computed_pairs}",
        f"1 / {dense.allowed_pairs / c.allowed_pairs:.2f}",
        f"1 / {dense.computed_pairs / c.computed_pairs:.2f}",
        percent(100 * c.seen_pairs / c.causal_pairs),
        percent(100 * c.seen_once / c.causal_pairs),
        f"{c.allowed_pairs / c.seen_pairs:.2f}",
        f"{100 * c.empty_rows / rows:.1f} %",
        f"{max(c.allowed_by_head) * c.q_heads / c.allowed_pairs:.2f} x",
    ]


def _micro_benchmark(points: Sequence[Point]) -> Iterator[str]:
    p = paper.MICRO_BENCHMARK
    yield "## Micro-benchmark"
    yield ""
    yield (
        f"Forward + backward, batch {p.batch}, {p.q_heads} heads, N = {p.seq_len}, head dim "
        f"{p.head_dim}. The paper: about {paper.MICRO_BENCHMARK_SPEEDUP:g} x over dense. "
        "Speed-up: over `standard` on the same backend, with its 99 % interval. Bounds: pairs of "
        "`standard` over pairs of the method, all pairs and those of visited blocks. Fastest "
        "dense: of all backends of the run by the same clock. Device "
        "clock: what the GPU takes, by replay of a CUDA graph. Host clock: what a caller waits "
        "who launches every kernel anew; at this size that is mostly the processor's time, and "
        "other work on the machine raises it. `flex` is compiled FlexAttention, `flash` its "
        "kernels of flash-attn-4, `varlen` windows over shifted keys in calls of flash-attn-4, "
        f"`{EAGER}` FlexAttention that is not compiled. No graph can capture a call of that; a "
        "time from its first kernel's start to the last one's end (kernels clock) is shown where "
        "measuring it did not make it longer. Blocks are of 128 where others are not named. "
        "`-`: no other backend was timed beside it."
    )
    if points and not any(x.backend == EAGER for x in points):
        yield f"`{EAGER}` was {NOT_MEASURED} here."
    yield ""
    if not points:
        yield f"{NOT_MEASURED.capitalize()}: no rows of this shape."
        return
    heads = ("mask", "backend", "clock", "dtype", "time", "dense", "the paper", "speed-up",
             "interval", "over fastest dense", "bound, pairs", "bound, blocks")  # fmt: skip
    yield from markdown(heads, map(_point_cells, points), numbers=range(4, len(heads)))
    yield ""
    yield _sources(points)


def _point_cells(x: Point) -> list[str]:
    blocks = "" if x.blocks == "128x128" else f", blocks {x.blocks}"
    return [
        f"`{x.method}`", x.backend + blocks, x.clock, x.dtype,
        f"{x.us:.0f} us", f"{x.dense_us:.0f} us",
        f"about {paper.MICRO_BENCHMARK_SPEEDUP:g} x", f"{x.speedup:.2f} x",
        f"{x.low:.2f} to {x.high:.2f}" if x.low and x.high else "-",
        f"{x.over_fastest:.2f} x ({x.fastest})" if x.fastest else "-",
        f"{x.ideal_elements:.2f} x" if x.ideal_elements else "-",
        f"{x.ideal_blocks:.2f} x" if x.ideal_blocks else "-",
    ]  # fmt: skip


def _throughput(lines: Sequence[Throughput]) -> Iterator[str]:
    yield "## Table 2: tokens/s"
    yield ""
    yield (
        f"The paper: {paper.TABLE_2.setting}; training. As published: the methods of the papers "
        "that the names come from. As released: the masks of Harry-Miral/MEHC."
    )
    for measured, found in shown(lines):
        yield ""
        yield f"### By {measured}"
        yield ""
        if found:
            yield from _one_throughput(found)
        else:
            yield f"{NOT_MEASURED.capitalize()}: no rows of this shape."


def _one_throughput(lines: Sequence[Throughput]) -> Iterator[str]:
    first = lines[0]
    alone = first.measured == ATTENTION_ALONE
    rounds = "all methods in common rounds"
    if not first.common_rounds:
        rounds = "each method by itself, not in rounds common to all"
    yield (
        f"`{first.backend}`, {first.dtype}, {first.clock} clock, on {first.processes} x "
        f"{first.device}; "
        f"{first.tokens} tokens a {'call' if alone else 'step'}, "
        f"{first.data or 'random'} data; measured: {rounds}."
    )
    if alone:
        yield (
            "A training step has other work too, which brings every ratio nearer to 1: compare "
            "the order with the paper's, and not the figures."
        )
    else:
        yield (
            "Tokens/s on other GPUs and with other tokens a step are no measure of the paper's: "
            "compare the ratios."
        )
    heads = ("name", "the paper, tokens/s", "over Standard", "rank", "measured as", "tokens/s",
             "over Standard", "rank")  # fmt: skip
    for reading, group in groupby(lines, key=lambda x: x.reading):
        group = list(group)
        count = sum(not x.reason for x in group)
        yield ""
        yield f"Methods {reading}:{STAND_INS_TEXT.get(reading, '')}"
        yield ""
        cells = (_throughput_cells(x, count) for x in group)
        yield from markdown(heads, cells, numbers=(1, 2, 3, 5, 6, 7))
    yield ""
    yield _sources(lines)


def _throughput_cells(x: Throughput, count: int) -> list[str]:
    """Of one of `count` methods that were measured."""
    theirs = paper.TABLE_2.column("tok/s")
    ranking = sorted(theirs, key=theirs.get, reverse=True)
    ours = [x.reason, "-", "-"]
    if x.reason is None:
        ours = [quantity(x.tokens_per_s), times(x.ratio, x.low, x.high, digits=3),
                f"{_rank(x)} of {count}"]  # fmt: skip
    ratio = theirs[x.name] / theirs["Standard"]
    rank = ranking.index(x.name) + 1
    return [x.name, f"{theirs[x.name]}", f"{ratio:.3f} x", f"{rank} of {len(theirs)}",
            f"`{x.method}`", *ours]  # fmt: skip


def _rank(x: Throughput) -> str:
    return f"{x.rank_low}" if x.rank_low == x.rank_high else f"{x.rank_low} to {x.rank_high}"


def _sources(lines: Iterable[Point | Throughput]) -> str:
    places = dict.fromkeys(f"{x.device}, torch {x.torch} (`{x.source}`)" for x in lines)
    return f"Measured on {'; '.join(places)}."


RECIPE_TEXT = (
    "The recipe: an untrained stack of "
    f"{paper.SPECIALISATION_LAYERS} attention layers (no residual, no normalisation, default "
    f"weights of `nn.Linear`, width {RECIPE.q_heads * RECIPE.head_dim}), {RECIPE.q_heads} "
    f"heads, N = {RECIPE.seq_len}, {RECIPE.batch} sequences of normal noise, "
    "`spattention_released`. Entropy of a query: "
    f"-sum a log(a + {LOG_FLOOR:g}); of a head: mean over queries; sigma: population standard "
    f"deviation over the heads. Tests hold its mean entropies to within {ENTROPY_TOLERANCE:g} "
    f"of the paper's for each seed, and its sigmas to within {SIGMA_TOLERANCE:g} of the paper's "
    "ranges: for Standard that is more than the whole of the range. N, heads, mask and the "
    "kind of deviation follow from the figures by counting; that the network was like this is a "
    "guess that fits. Uniform attention over the same mask needs no network and gives nearly the "
    "same: both figures are properties of the mask."
)
MEASURES_TEXT = (
    "The last three columns part what weights do from the mask: uniform attention has 1, 0 and 0 "
    "under any mask. Random weights are not uniform either, so compare a trained model with the "
    "untrained row. Normalised: entropy over log(keys), of queries with two keys or more. Excess: "
    "standard deviation over heads of that. Divergence: Jensen-Shannon, in bits, of two heads "
    "over the keys that both see (`-`: no two heads share two keys of a query). Rows without a "
    "key do not count. Ranges are over layers and seeds."
)
STAND_INS_TEXT = {
    "as released": " the stand-ins of BigBird and Reformer touch every block of a kernel at this "
    "N, so that their speed is that of a dense one and says nothing of the methods so named."
}
TRAIN_ON_A_TEXT = "make results ARGS=train_text"


def _specialisation(lines: Sequence[Specialised]) -> Iterator[str]:
    yield from ("## Head specialisation", "", RECIPE_TEXT, "", MEASURES_TEXT, "")
    yield from _measures(lines)
    yield ""
    heads = ("", "entropy, the paper", "the recipe", "sigma, the paper", "the recipe")
    yield from markdown(heads, _by_the_recipe(lines))
    yield ""
    yield "![Entropy of each head](specialisation.png)"


def _measures(lines: Iterable[Specialised]) -> Iterator[str]:
    heads = ("mask", "weights", "empty rows", "entropy", "sigma", "normalised", "excess",
             "divergence")  # fmt: skip
    groups = [list(group) for _, group in groupby(lines, key=lambda x: (_mask(x), x.weights))]
    yield from markdown(heads, map(_specialised_cells, groups), numbers=range(2, len(heads)))


def _trained_heads(lines: Iterable[TrainedHeads]) -> Iterator[str]:
    yield from ("### After training", "")
    trainings: dict[tuple, list[TrainedHeads]] = {}
    for x in lines:
        about = x.model, x.data, x.recipe, x.seq_len, x.sequences, x.device, x.torch, x.source
        trainings.setdefault(about, []).append(x)
    if not trainings:
        yield f"{NOT_MEASURED.capitalize()} here: no rows of `{TRAIN_ON_A_TEXT}`."
    for (model, data, recipe, n, sequences, device, torch, source), own in trainings.items():
        yield (
            f"`{model}`, trained on the text `{data}` ({recipe.replace(',', ', ')}), on "
            f"{sequences} sequences of it, N = {n}: before the first step (`{INITIAL}`) and after "
            f"the last (`{TRAINED}`). Ranges are over layers. Measured on {device}, torch {torch} "
            f"(`{source}`), by `{TRAIN_ON_A_TEXT}`."
        )
        yield ""
        yield from _measures(own)
        yield ""


def _by_the_recipe(lines: Sequence[Specialised]) -> Iterator[list[str]]:
    for name, theirs in paper.SPECIALISATION.items():
        method = paper.READINGS["as released"][name]
        ours = [x.sigma for x in lines if (x.method, x.weights) == (method, "untrained")]
        yield [
            name, f"{theirs.entropy:.4f}", f"{untrained_entropy(lines, method):.4f}",
            f"{theirs.sigma_low:.4f} to {theirs.sigma_high:.4f}", span(ours),
        ]  # fmt: skip


def _specialised_cells(group: Sequence[Specialised]) -> list[str]:
    first = group[0]
    seeds = len({x.seed for x in group})
    weights = f"{first.weights}, {seeds} seeds" if seeds > 1 else first.weights
    divergences = [x.divergence for x in group if x.divergence is not None]
    return [
        f"`{_mask(first)}`", weights, f"{100 * first.empty:.1f} %",
        f"{mean(x.entropy for x in group):.4f}", span(x.sigma for x in group),
        span(x.normalised for x in group), span(x.excess for x in group),
        span(divergences) if divergences else "-",
    ]  # fmt: skip


def _mask(x: Specialised) -> str:
    """The method, with the parameters that it was trained with."""
    params = x.params if isinstance(x, TrainedHeads) else None
    return f"{x.method}:{params}" if params else x.method


def _quoted() -> Iterator[str]:
    yield "## Accuracy (Tables 1 to 3), as the paper has it"
    yield ""
    yield f"{NOT_MEASURED.capitalize()} here: each line is a model pre-trained at length."
    for table in (paper.TABLE_1, paper.TABLE_2, paper.TABLE_3):
        yield ""
        yield f"{table.name}: {table.setting}."
        yield ""
        # Tokens/s have a section of their own.
        shown = [c for c in table.columns if c != "tok/s"]
        width = len(table.keys)
        cells = (
            [*line[:width], *(f"{x:.4f}" for x in line[width : width + len(shown)])]
            for line in table.lines
        )
        yield from markdown((*table.keys, *shown), cells, numbers=range(width, width + len(shown)))
        for line in table.lines:
            *figures, average = line[width : width + len(shown)]
            if abs(mean(figures) - average) > ROUNDED:
                yield ""
                yield f"{line[width - 1]}: the mean of its figures is {mean(figures):.4f}."
