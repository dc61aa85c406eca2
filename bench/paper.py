"""What the paper reports: every figure once, under the table or section that it stands in.

Zhao, Hu et al., "Making Every Head Count: Sparse Attention Without the Speed-Performance
Trade-off", AAAI 2026, arXiv:2511.09596. Nothing here is measured by this suite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from methods import Problem

TITLE = "Making Every Head Count: Sparse Attention Without the Speed-Performance Trade-off"
SOURCE = "AAAI 2026, arXiv:2511.09596"


@dataclass(frozen=True)
class Table:
    """A table of the paper.

    Attributes:
        name: "Table 1".
        setting: what all of its lines share.
        keys: the first columns, which name a line.
        columns: the headings of its figures.
        lines: (keys..., figures...) of each line, as printed.
    """

    name: str
    setting: str
    keys: tuple[str, ...]
    columns: tuple[str, ...]
    lines: tuple[tuple, ...]

    def column(self, heading: str) -> dict[str, float]:
        """Last key of a line -> its figure in one column."""
        at = len(self.keys) + self.columns.index(heading)
        return {line[len(self.keys) - 1]: line[at] for line in self.lines}


_OLMOE = ("Wino", "COPA", "STEM", "SocSci", "STEM 5-shot", "Hum 5-shot", "Avg")

TABLE_1 = Table(
    "Table 1",
    "OLMoE, pre-trained on DCLM; N = 1024 for 0.25B-1.75B and 4096 for 1B-7B",
    ("model", "method"),
    _OLMOE,
    (
        ("0.25B-1.75B", "Standard", 0.5130, 0.6400, 0.2528, 0.2640, 0.2440, 0.2520, 0.3610),
        ("0.25B-1.75B", "SPAttention", 0.5154, 0.6600, 0.2666, 0.2552, 0.2664, 0.2468, 0.3684),
        ("1B-7B", "Standard", 0.5040, 0.5900, 0.2926, 0.2181, 0.1809, 0.2553, 0.3402),
        ("1B-7B", "SPAttention", 0.4956, 0.6100, 0.3022, 0.2533, 0.2000, 0.2578, 0.3532),
    ),
)

TABLE_2_ATTENTION = Problem(q_heads=8, seq_len=1024, head_dim=128)
TABLE_2_GPUS, TABLE_2_GPU = 4, "A100"
TABLE_2_LAYERS, TABLE_2_HIDDEN, TABLE_2_STEPS = 8, 1024, 3000
TABLE_2 = Table(
    "Table 2",
    f"{TABLE_2_GPUS} x {TABLE_2_GPU}; {TABLE_2_LAYERS} layers, {TABLE_2_ATTENTION.q_heads} heads, "
    f"hidden {TABLE_2_HIDDEN}, N = {TABLE_2_ATTENTION.seq_len}, {TABLE_2_STEPS} steps",
    ("method",),
    ("HellaSwag", "Winogrande", "COPA", "STEM", "Avg", "tok/s"),
    (
        ("Longformer", 0.2789, 0.5178, 0.5700, 0.2200, 0.3967, 6340),
        ("Reformer", 0.2778, 0.5185, 0.5600, 0.2211, 0.3944, 6014),
        ("BigBird", 0.2772, 0.5241, 0.5300, 0.2250, 0.3891, 5736),
        ("Standard", 0.2778, 0.5170, 0.5700, 0.2122, 0.3943, 3214),
        ("SPAttention", 0.2856, 0.5263, 0.5800, 0.2271, 0.4048, 6167),
    ),
)
TABLE_2_SPEEDUP = 1.919  # SPAttention over Standard, tokens/s

TABLE_3 = Table(
    "Table 3",
    "ablation, OLMoE 0.25B-1.75B",
    ("method",),
    _OLMOE,
    (
        ("GBHALF", 0.5099, 0.5200, 0.2599, 0.2306, 0.2349, 0.2336, 0.3315),
        ("EBALL", 0.5091, 0.4800, 0.2577, 0.2361, 0.2548, 0.2353, 0.3289),
        ("Sliding Window", 0.5178, 0.5300, 0.2688, 0.2128, 0.2333, 0.2425, 0.3376),
        ("SPAttention", 0.5272, 0.5400, 0.2661, 0.2221, 0.2608, 0.2440, 0.3434),
    ),
)

# Eqs. 5 to 8: causal pairs that some head sees, pairs of dense attention over SPAttention's, and
# pairs that more than one head sees; text: the largest entropy of a query, SPAttention and dense.
PAIRS_SEEN, PAIRS_FEWER, PAIRS_SEEN_TWICE = "all", "H", "none"
ENTROPY_BOUNDS = "about log(N / H)", "log(i + 1)"

# Text, micro-benchmark: one forward-backward pass, "approximately 2 x" over dense.
MICRO_BENCHMARK = Problem(batch=1, q_heads=8, seq_len=4096, head_dim=128)
MICRO_BENCHMARK_SPEEDUP = 2.0

# Figures 1 (eight heads of SPAttention) and 2 (one head of each ablation).
FIGURES = Problem(q_heads=8, seq_len=1024)
FIGURE_2 = {"Sliding Window": "local_only", "EBALL": "spattention", "GBHALF": "gapped_bands"}


class Specialisation(NamedTuple):
    """Head specialisation of one attention: range over the layers, and mean entropy in nats."""

    sigma_low: float
    sigma_high: float
    entropy: float


# Text, head specialisation.
SPECIALISATION_LAYERS, SPECIALISATION_HEADS = 4, 8
SPECIALISATION = {
    "Standard": Specialisation(0.0000, 0.0005, 4.5461),
    "SPAttention": Specialisation(0.1845, 0.1847, 3.6276),
}
SPECIALISATION_SIGMA_RATIO = 300  # "over 300 x"
SPECIALISATION_ENTROPY_PERCENT = -20.20

# The presets behind a name of Table 2: the method as published, and what the released code runs.
READINGS = {
    "as published": {
        "Longformer": "longformer", "Reformer": "reformer", "BigBird": "bigbird",
        "Standard": "standard", "SPAttention": "spattention",
    },
    "as released": {
        "Longformer": "mehc_longformer", "Reformer": "mehc_reformer", "BigBird": "mehc_bigbird",
        "Standard": "standard", "SPAttention": "spattention_released",
    },
}  # fmt: skip
