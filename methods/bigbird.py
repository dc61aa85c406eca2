"""BigBird: window, global and random blocks (Zaheer et al. 2020, arXiv:2007.14062)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from methods.method import MaskMod, Method, Problem, ScoreMod, kept


@dataclass(frozen=True, eq=False)
class DrawnBlocks:
    """State of a call: int [H, n_blocks, n], -1 where a row has no block."""

    blocks: Tensor


@dataclass(frozen=True)
class BigBird(Method):
    """BigBird-ITC: a window of three blocks, global blocks, and random blocks by head.

    With A and C the blocks of query and key: not causal, a pair is allowed iff A or C is the
    first or the last block, or |A - C| <= 1, or C is one of n_random blocks drawn for (head, A).
    Causal, iff j <= i and C is the first block, or A - C <= 1, or C was drawn from the past of A;
    early rows, whose past is shorter, draw fewer, and no draw depends on N. Where N is not a
    multiple of `block` the last block is shorter, as if padded with masked keys.

    The state of a call, where there is one, is `drawn_blocks` given by the caller.

    Attributes:
        block: tokens in a block.
        n_random: blocks drawn for each head and row, without replacement, uniformly from those
            that neither window nor global blocks cover.
        seed: of the draw; layers of one model should differ in it.
        multiplicity: count a key as often as its block is listed, as transformers and the
            original code do where given blocks repeat or hit the window.
        last_row_dense: causal only; the last block row sees all of its past, like the original's
            last global block. It ties the pattern to N.
    Deviations: the causal form is ours, the original has none.
    """

    name: ClassVar[str] = "bigbird"
    paper: ClassVar[str] = "Zaheer et al. 2020, arXiv:2007.14062"
    block: int = 64
    n_random: int = 3
    seed: int = 0
    multiplicity: bool = False
    last_row_dense: bool = False

    def __post_init__(self) -> None:
        for field, least in (("block", 1), ("n_random", 0), ("seed", 0)):
            value = getattr(self, field)
            if type(value) is not int or not least <= value < 1 << 63:
                raise ValueError(
                    f"bigbird: {field} is {value!r}; it must be a whole number, {least} or more"
                )
        for field in ("multiplicity", "last_row_dense"):
            if type(value := getattr(self, field)) is not bool:
                raise ValueError(f"bigbird: {field} is {value!r}; it must be True or False")

    def validate(self, p: Problem) -> None:
        free = max(0, self.n_blocks(p) - (3 if p.causal else 5))
        if self.n_random > free:
            raise ValueError(
                f"bigbird: n_random is {self.n_random}; {p.seq_len} tokens in blocks of "
                f"{self.block} leave {free} outside window and global blocks"
            )

    def grows(self, causal: bool = True) -> bool:
        # Not causal, the last block row and column are global.
        return causal and not self.last_row_dense

    def n_blocks(self, p: Problem) -> int:
        return -(-p.seq_len // self.block)

    def drawn_blocks(self, blocks: Tensor, p: Problem) -> DrawnBlocks:
        """State of a call whose random blocks the caller gives.

        Args:
            blocks: int [H, n_blocks, n], -1 where there is none. In a causal call later blocks,
                and in rows that see all (bidirectional: the first and the last) any, do not count.

        Raises:
            ValueError: wrong shape or type, or a block that does not exist.
        """
        state = DrawnBlocks(blocks)
        self.check_state(state, p)
        return state

    def check_state(self, state: DrawnBlocks, p: Problem) -> None:
        if not isinstance(state, DrawnBlocks):
            kind = type(state).__name__
            raise ValueError(f"bigbird: the state is a {kind}; drawn_blocks makes what it must be")
        blocks, wanted = state.blocks, (p.q_heads, self.n_blocks(p))
        given, dtype = f"a {type(blocks).__name__}", torch.bool
        if isinstance(blocks, Tensor):
            given, dtype = f"{blocks.dtype} of shape {list(blocks.shape)}", blocks.dtype
        whole = not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
        if not whole or blocks.ndim != 3 or blocks.shape[:2] != wanted:
            raise ValueError(
                f"bigbird: random blocks are {given}; "
                f"they must be whole numbers of shape [{wanted[0]}, {wanted[1]}, any]"
            )
        low, high = torch.stack(blocks.long().aminmax()).tolist() if blocks.numel() else (-1, -1)
        if low < -1 or high >= wanted[1]:
            raise ValueError(
                f"bigbird: random blocks are {low} to {high}; "
                f"they must be -1 (none) to {wanted[1] - 1}"
            )

    def mask_mod(
        self, p: Problem, device: torch.device, state: DrawnBlocks | None = None
    ) -> MaskMod:
        block, causal = self.block, p.causal
        always, drawn = self._always(p), self._drawn(p, device, state)

        def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            row, column = q_idx // block, kv_idx // block
            allowed = always(row, column)
            for blocks in drawn:
                allowed = allowed | (column == blocks[h, row])
            return allowed & (kv_idx <= q_idx) if causal else allowed

        return mask

    def score_mod(
        self, p: Problem, device: torch.device, state: DrawnBlocks | None = None
    ) -> ScoreMod | None:
        if not self.multiplicity:
            return None
        block, always, drawn = self.block, self._always(p), self._drawn(p, device, state)

        def by_listings(
            score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor
        ) -> Tensor:
            row, column = q_idx // block, kv_idx // block
            listings = always(row, column).int()
            for blocks in drawn:
                listings = listings + (column == blocks[h, row]).int()
            # Outside the mask there are no listings; the score there must stay finite.
            return score + listings.clamp(min=1).to(score.dtype).log()

        return by_listings

    def grid(
        self, p: Problem, device: torch.device, b: Tensor, h: Tensor,
        q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor, state: DrawnBlocks | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        listed = self._counter(p, device, state)
        first, last = k0 // self.block, k1 // self.block
        first_row, last_row = q0 // self.block, q1 // self.block
        some, every = False, True
        for step in range(int((last_row - first_row).max()) + 1):
            count = listed(h, torch.minimum(first_row + step, last_row), first, last)
            some, every = some | (count > 0), every & (count == last - first + 1)
        # A listed block below the diagonal counts whole; on it, k0 <= q1 leaves some pair.
        return (some & (k0 <= q1), every & (k1 <= q0)) if p.causal else (some, every)

    def allowed_pairs(self, p: Problem, state: DrawnBlocks | None = None) -> int:
        device = torch.device("cpu") if state is None else state.blocks.device
        n_blocks = self.n_blocks(p)
        row = torch.arange(n_blocks, device=device)
        size = (p.seq_len - row * self.block).clamp(max=self.block)
        last = row - 1 if p.causal else torch.full_like(row, n_blocks - 1)
        head = torch.arange(p.q_heads, device=device)[:, None]
        listed = self._counter(p, device, state)(head, row, torch.zeros_like(row), last)
        keys = self.block * listed.expand(p.q_heads, n_blocks)
        if p.causal:
            return int((size * keys + size * (size + 1) // 2).sum())
        # The last block, which all rows list, may be shorter.
        return int((size * (keys - self.block * n_blocks + p.seq_len)).sum())

    def _sees_all(self, p: Problem) -> Callable[[Tensor], Tensor]:
        """A closure block row -> whether it lists every block (under causality, of its past)."""
        last = self.n_blocks(p) - 1
        if not p.causal:
            return lambda row: (row == 0) | (row == last)
        dense = last if self.last_row_dense else -1
        return lambda row: row == dense

    def _always(self, p: Problem) -> Callable[[Tensor, Tensor], Tensor]:
        """A closure (row, column) -> listed before any draw; causality is left to the caller."""
        sees_all, last, causal = self._sees_all(p), self.n_blocks(p) - 1, p.causal

        def listed(row: Tensor, column: Tensor) -> Tensor:
            near = (column == 0) | ((row - column).abs() <= 1) | sees_all(row)
            return near if causal else near | (column == last)

        return listed

    def _drawn(self, p: Problem, device: torch.device, state: DrawnBlocks | None) -> list[Tensor]:
        """The random blocks, one tensor [H, n_blocks] a draw."""
        if state is None:
            drawn = draw_blocks(p.q_heads, self.n_blocks(p), self.n_random, self.seed, p.causal)
            state = DrawnBlocks(drawn)
        self.check_state(state, p)
        blocks = state.blocks.to(device, torch.int32)  # one that is unsigned has no -1
        row = torch.arange(self.n_blocks(p), device=device)[:, None]
        void = self._sees_all(p)(row) | (p.causal & (blocks > row))
        return list(blocks.masked_fill(void, -1).movedim(-1, 0).contiguous())

    def _counter(
        self, p: Problem, device: torch.device, state: DrawnBlocks | None
    ) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """A closure (head, row, first, last) -> how many columns of first..last the row lists."""
        sees_all, always, end = self._sees_all(p), self._always(p), self.n_blocks(p) - 1
        rows = torch.arange(end + 1, device=device, dtype=torch.int32)
        drawn, fresh = self._drawn(p, device, state), []
        for turn, blocks in enumerate(drawn):
            known = always(rows, blocks)
            for earlier in drawn[:turn]:
                known = known | (blocks == earlier)
            fresh.append(blocks.masked_fill(known, -1))

        def count(h: Tensor, row: Tensor, first: Tensor, last: Tensor) -> Tensor:
            low, high = (row - 1).clamp(min=0), (row + 1).clamp(max=end)
            listed = (torch.minimum(high, last) - torch.maximum(low, first) + 1).clamp(min=0)
            listed = listed + ((first == 0) & (low > 0))
            if not p.causal:
                listed = listed + ((last == end) & (high < end))
            for blocks in fresh:
                column = blocks[h, row]
                listed = listed + ((column >= first) & (column <= last))
            return torch.where(sees_all(row), last - first + 1, listed)

        return count


@kept(256)  # a seed for each layer of a deep model
def draw_blocks(heads: int, n_blocks: int, n_random: int, seed: int, causal: bool) -> Tensor:
    """Random blocks int32 [H, n_blocks, n_random]; -1 where a row has no block left to draw.

    Uniform and without replacement among the blocks from 1 to n_blocks - 2 other than the row's
    own and its neighbours; under causality from 1 to two before the row.
    """
    with torch.device("cpu"):
        return _draw_blocks(heads, n_blocks, n_random, seed, causal)


def _draw_blocks(heads: int, n_blocks: int, n_random: int, seed: int, causal: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Row after row, so that under causality a longer sequence continues the same draws.
    uniform = torch.rand(n_blocks, heads, n_random, generator=generator, dtype=torch.float64)
    uniform = uniform.permute(2, 1, 0)
    row = torch.arange(n_blocks)
    low, end = (row - 1).clamp(min=1), torch.full_like(row, n_blocks - 2)
    covered = (end if causal else torch.minimum(row + 1, end)) - low + 1
    free = n_blocks - 2 - covered
    places = torch.empty(0, heads, n_blocks, dtype=torch.long)
    for turn in range(n_random):
        # The place among those left, moved past each that is taken.
        place = (uniform[turn] * (free - turn)).long()
        for taken in places.sort(0).values:
            place = place + (place >= taken)
        places = torch.cat((places, place[None]))
    blocks = places + 1
    blocks = blocks + covered * (blocks >= low)
    exhausted = torch.arange(n_random)[:, None, None] >= free
    return blocks.masked_fill(exhausted, -1).permute(1, 2, 0).int()
