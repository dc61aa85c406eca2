"""SPAttention without a grid, for `run_bench.py --methods tests/gpu/gridless.py:METHOD`.

Its block lists come from torch's create_block_mask: the yardstick of the layout phase.
"""

from dataclasses import dataclass

from methods.spattention import SPAttention


@dataclass(frozen=True)
class Gridless(SPAttention):
    name = "spattention_gridless"

    def grid(self, *args, **kwargs):
        return None


METHOD = Gridless()
