"""Reformer: attention among tokens that hash alike (Kitaev et al. 2020, arXiv:2001.04451)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from methods.chunks import PENALTY, Chunks, Listings, Rounds, merge, sort, stable_order
from methods.compiled import fused
from methods.hashing import draw, nearest, parts, rotated
from methods.method import Layout, MaskMod, Method, Problem, ScoreMod, static_parts

MODES = ("exact", "transformers", "reformer_pytorch")
# As in trax: two rotations in place of one, whose memory would grow with N^2 / chunk.
MOST_IN_ONE_ROTATION = 128
MAX_POSITIONS = 4096  # transformers' default, from which follows when it takes two
MOST_ROUNDS = 1 << 10
FAR = -(1 << 30)  # from every chunk
MOST_BUCKETS = 1 << 31  # kernels hold them in int32
# Of a check in float64: tokens at once, and the share that float32 may round into other buckets.
TOKENS_AT_ONCE, MOST_OTHER_BUCKETS = 4096, 0.001


@dataclass(frozen=True)
class Reformer(Method):
    """Reformer: near chunks in hash order; its buckets leak the future, as the references' do.

    Queries and keys are one tensor x; a score is x_i . x_j / |x_j| / sqrt(D). Each of n_rounds
    rounds hashes every token by random rotations, sorts by (bucket, position) and cuts the order
    into chunks. A query's candidates are its own chunk and the one before. Exact mode is one
    softmax over the union of all rounds' candidates, as in the paper: a pair takes part in the
    first round that lists it, and rounds are merged by their log-sum-exp.
    A token's score with itself is lowered by 1e5, so that it counts where nothing else does; of
    scores beyond 5e4, which only x of such a length has, it counts beside others.

    Under causality j <= i in the text. Values obey it; but where chunks begin depends on all
    tokens, so that another x of a later token moves outputs of earlier ones. The original and
    both libraries leak the future in this way too. No gradient passes through the hash.

    The state of a call is `rounds(buckets)` of buckets that `hash` or the caller gives.

    Attributes:
        chunk: slots in a chunk; the last one is shorter where N is no multiple (exact mode).
        n_buckets: an even number, or several, each of a rotation of its own, whose product
            counts. None for 2 N / chunk, rounded down to a power of two and from 256 on split
            between two rotations (in mode transformers where its config's default would be); in
            mode reformer_pytorch N / chunk.
        n_rounds: rounds of hashing; the libraries' num_hashes and n_hashes.
        seed: of the rotations, one a head and round; layers of one model should differ in it.
        before, after: chunks that a query sees before and after its own.
        within_buckets: of these, only tokens in the query's bucket.
        mode: "exact", or what a library computes: "transformers" (5.23) or "reformer_pytorch"
            (1.4.4). There all rounds are one ring, chunk 0 looks at the last chunk of the round
            before, and a key counts as often as it is listed; transformers does not divide scores
            by sqrt(D). (reformer_pytorch without duplicates inside buckets is exact mode.)
    """

    name: ClassVar[str] = "reformer"
    paper: ClassVar[str] = "Kitaev et al. 2020, arXiv:2001.04451"
    shared_qk: ClassVar[bool] = True
    # trax's chunk, and the block of the kernels: shorter chunks would visit as many blocks. Of the
    # paper's 1 to 8 rounds the middle.
    chunk: int = 128
    n_buckets: int | tuple[int, ...] | None = None
    n_rounds: int = 4
    seed: int = 0
    before: int = 1
    after: int = 0
    within_buckets: bool = False
    mode: str = "exact"

    def __post_init__(self) -> None:
        least = {"chunk": 1, "n_rounds": 1, "seed": 0, "before": 0, "after": 0}
        for field, low in least.items():
            value = getattr(self, field)
            most = MOST_ROUNDS if field == "n_rounds" else (1 << 63) - 1
            if type(value) is not int or not low <= value <= most:
                raise ValueError(
                    f"reformer: {field} is {value!r}; it must be a whole number, {low} to {most}"
                )
        sizes = self.n_buckets if isinstance(self.n_buckets, tuple) else (self.n_buckets,)
        even = sizes and all(type(x) is int and x > 0 and x % 2 == 0 for x in sizes)
        if self.n_buckets is not None and not even:
            raise ValueError(
                f"reformer: n_buckets is {self.n_buckets!r}; "
                "it must be an even number above 0, a tuple of such, or None"
            )
        if type(self.within_buckets) is not bool or self.mode not in MODES:
            raise ValueError(
                f"reformer: within_buckets is {self.within_buckets!r} and mode {self.mode!r}; "
                f"they must be True or False, and one of {', '.join(MODES)}"
            )

    @property
    def ring(self) -> bool:
        """Whether the rounds form one ring of chunks, rather than a line each."""
        return self.mode != "exact"

    @property
    def needs_lse(self) -> bool:
        return self.n_rounds > 1

    def validate(self, p: Problem) -> None:
        fault = None
        if p.kv_heads != p.q_heads:
            fault = f"{p.q_heads} query and {p.kv_heads} key heads; it shares them: give as many"
        elif self.chunk > p.seq_len:
            fault = f"chunk is {self.chunk}; there are only {p.seq_len} tokens"
        elif self.ring and p.seq_len % self.chunk:
            fault = (
                f"{p.seq_len} tokens are no multiple of chunk {self.chunk}, "
                f"which mode {self.mode!r} needs; exact does not"
            )
        elif self.ring and self.n_rounds * p.seq_len // self.chunk <= self.before + self.after:
            fault = (
                f"before {self.before} and after {self.after} go round the ring of "
                f"{self.n_rounds * p.seq_len // self.chunk} chunks; more chunks are needed"
            )
        elif (most := max(self.rotations(p))) > 2 * p.seq_len:
            fault = f"n_buckets has {most} in one rotation; {p.seq_len} tokens fill fewer"
        elif any(size % 2 for size in self.rotations(p)):
            fault = f"N / chunk is {p.seq_len // self.chunk}; give an even n_buckets"
        elif (count := math.prod(self.rotations(p))) >= MOST_BUCKETS:
            fault = f"n_buckets multiply to {count}; they must stay below {MOST_BUCKETS}"
        if fault is not None:
            raise ValueError(f"reformer: {fault}")

    def rotations(self, p: Problem) -> tuple[int, ...]:
        """Buckets of each rotation; their product is the number of buckets."""
        if self.n_buckets is not None:
            return self.n_buckets if isinstance(self.n_buckets, tuple) else (self.n_buckets,)
        if self.mode == "reformer_pytorch":
            return (p.seq_len // self.chunk,)
        exponent, most = (2 * (p.seq_len // self.chunk)).bit_length() - 1, MOST_IN_ONE_ROTATION
        if self.mode == "transformers":
            most = 2 * max(math.isqrt(MAX_POSITIONS // self.chunk), self.chunk)
        if 2**exponent <= most:
            return (2**exponent,)
        return 2 ** (exponent // 2), 2 ** (exponent - exponent // 2)

    @torch.no_grad()
    def hash(self, q: Tensor, p: Problem) -> Tensor:
        """Bucket of each token in each round, by angular LSH: int64 [B, H, R, N].

        The draw is that of transformers: its hash_seed = seed gives the same buckets in float32
        on a CPU.

        Args:
            q: [B, H, N, D].
        """
        with torch.autocast(q.device.type, enabled=False):  # 16 bits are other buckets
            # The product is not compiled: torch would warn that it is not in TF32.
            turned = rotated(q.float(), self._drawn(q, p))
        return fused(nearest, turned, self.rotations(p))

    def _drawn(self, q: Tensor, p: Problem) -> Tensor:
        columns = sum(self.rotations(p)) // 2
        return draw(p.q_heads, p.head_dim, self.n_rounds, columns, self.seed, q.device)

    def rounds(self, buckets: Tensor, p: Problem) -> Rounds:
        """State of a call with these buckets.

        Args:
            buckets: [B, H, n_rounds, N], whole numbers from -2^31 to 2^31 - 1 in any integer
                dtype; within a round only their order counts.

        Raises:
            ValueError: another shape or dtype, or a number outside that range.
        """
        wanted = self._shape(p)
        if not isinstance(buckets, Tensor):
            kind = type(buckets).__name__
            raise ValueError(f"reformer: buckets are a {kind}; they must be a tensor of integers")
        if buckets.shape != wanted:
            raise ValueError(
                f"reformer: buckets have shape {list(buckets.shape)}; they must be {list(wanted)}"
            )
        if buckets.is_floating_point() or buckets.is_complex() or buckets.dtype == torch.bool:
            raise ValueError(f"reformer: buckets are {buckets.dtype}; they must be integers")
        low, high = (int(x) for x in buckets.double().aminmax())  # no dtype of integers holds all
        if not -MOST_BUCKETS <= low <= high < MOST_BUCKETS:
            raise ValueError(f"reformer: buckets are {low} to {high}; they must fit in int32")
        return self._rounds(buckets, p, None)

    def _shape(self, p: Problem) -> tuple[int, ...]:
        return p.batch, p.q_heads, self.n_rounds, p.seq_len

    def check_state(self, state: Rounds, p: Problem) -> None:
        """As `Method.check_state`; what is in it is believed, also what is no order."""
        if fault := _given(state).fault(self._shape(p)):
            raise ValueError(f"reformer: the state's {fault}")

    def _rounds(self, buckets: Tensor, p: Problem, count: int | None) -> Rounds:
        """As `rounds`, of sound buckets; below `count` where that is known."""
        order = stable_order(buckets, together=buckets.is_cuda, count=count)
        slots = torch.arange(p.seq_len, device=buckets.device).expand_as(order)
        return Rounds(buckets.long(), order, torch.empty_like(order).scatter_(-1, order, slots))

    def prepare(self, q: Tensor, k: Tensor, p: Problem) -> Rounds:
        return self._rounds(self.hash(q, p), p, math.prod(self.rotations(p)))

    def state_fault(self, q: Tensor, k: Tensor, p: Problem, state: Rounds) -> str | None:
        """As `Method.state_fault`: every token's buckets in float64, and every line's order."""
        others, drawn = 0, self._drawn(q, p)
        tokens, known = (
            x.split(TOKENS_AT_ONCE, d) for x, d in ((q.detach(), 2), (state.buckets, 3))
        )
        for some, own in zip(tokens, known, strict=True):
            buckets, counted = 0, 1
            for part, size in parts(rotated(some.double(), drawn), self.rotations(p)):
                buckets = buckets + counted * torch.cat((part, -part), -1).argmax(-1)
                counted *= size
            others += int((buckets != own).sum())
        if (share := others / state.buckets.numel()) > MOST_OTHER_BUCKETS:
            return f"{share:.2%} of the tokens are in other buckets than in float64"
        if not torch.equal(state.order, state.buckets.argsort(dim=-1, stable=True)):
            return "slots are not in the order of buckets and positions"
        slots = torch.arange(p.seq_len, device=q.device).expand_as(state.slot)
        if not torch.equal(state.slot.gather(-1, state.order), slots):
            return "the way back is not the inverse of the order"
        return None

    def keys(self, k: Tensor) -> Tensor:
        return fused(_of_length_root_d if self.mode == "transformers" else _of_length_1, k)

    def spans(self, slots: int) -> list[tuple[int, int]]:
        """First and last difference, chunk of the query less chunk of the key, of candidates."""
        near, chunks = (-self.after, self.before), slots // self.chunk
        if not self.ring:
            return [near]
        if chunks == self.before + self.after + 1:
            return [(-chunks, chunks)]
        return [(near[0] + turn, near[1] + turn) for turn in (-chunks, 0, chunks)]

    def near(self, slots: int) -> Callable[[Tensor], Tensor]:
        """A closure difference of chunks -> whether it is one of candidates."""
        spans = self.spans(slots)

        def inside(difference: Tensor) -> Tensor:
            found = False
            for first, last in spans:
                above, width = difference - first, last - first + 1
                # Kernels ask this of every pair of tokens: of a power of two in one comparison.
                one = width & (width - 1) == 0
                found = found | ((above & -width) == 0 if one else (above >= 0) & (above < width))
            return found

        return inside

    def listings(self, p: Problem, state: Rounds) -> Listings:
        """A closure (b, h, i, j) -> N_ij: how often token i lists token j, causal or not."""
        listed = self._listed(p, state)
        rounds, across = range(self.n_rounds), self.ring and not self.within_buckets
        pairs = [(x, y) for x in rounds for y in rounds if x == y or across]

        def count(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return sum(listed(own, other, b, h, i, j).int() for own, other in pairs)

        return count

    def listed_before(self, p: Problem, state: Rounds) -> Callable[..., Tensor]:
        """A closure (b, h, i, j, r) -> whether a round before r lists token j for i; no ring."""
        listed = self._listed(p, state)

        def before(b: Tensor, h: Tensor, i: Tensor, j: Tensor, r: Tensor) -> Tensor:
            found = False
            for own in range(self.n_rounds - 1):
                # A query that is nowhere near: once a row, where `& (own < r)` is once a pair.
                found = found | listed(own, own, b, h, i, j, own < r)
            return found

        return before

    def _listed(self, p: Problem, state: Rounds) -> Callable[..., Tensor]:
        """A closure (r, s, b, h, i, j) -> whether i of round r lists j of round s."""
        # On a ring the chunks of all rounds are numbered on.
        chunks = p.seq_len // self.chunk if self.ring else 0
        number = torch.arange(self.n_rounds, device=state.slot.device)[:, None]
        places = _each((state.slot // self.chunk + number * chunks).int())
        buckets = _each(state.buckets.int()) if self.within_buckets else None
        near = self.near(p.seq_len * self.n_rounds)

        def listed(
            r: int, s: int, b: Tensor, h: Tensor, i: Tensor, j: Tensor,
            counts: Tensor | None = None,
        ) -> Tensor:  # fmt: skip
            place = places[r][b, h, i]
            if counts is not None:
                place = torch.where(counts, place, FAR)
            found = near(place - places[s][b, h, j])
            if buckets is not None:
                found = found & (buckets[r][b, h, i] == buckets[r][b, h, j])
            return found

        return listed

    def mask_mod(self, p: Problem, device: torch.device, state: Rounds | None = None) -> MaskMod:
        """The union of all rounds' candidates, in token order.

        Raises:
            ValueError: there is no state.
        """
        listings, causal = self.listings(p, _given(state)), p.causal

        def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            listed = listings(b, h, q_idx, kv_idx) > 0
            return listed & (kv_idx <= q_idx) if causal else listed

        return mask

    def score_mod(self, p: Problem, device: torch.device, state: Rounds | None = None) -> ScoreMod:
        """In token order: a token's penalty with itself, and on a ring log N_ij."""
        listings = self.listings(p, _given(state)) if self.ring else None

        def bias(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            score = torch.where(q_idx == kv_idx, score - PENALTY, score)
            if listings is None:
                return score
            return score + listings(b, h, q_idx, kv_idx).clamp(min=1).to(score.dtype).log()

        return bias

    def rows(
        self, p: Problem, device: torch.device, index: Tensor, state: Rounds | None = None
    ) -> Tensor:
        """As `Method.rows`; without the penalty in a row that sees itself alone.

        There it changes nothing, but the gate would allow for rounding errors of 1e5.
        """
        bias = super().rows(p, device, index, state)
        alone = bias.amax(-1, keepdim=True) < -PENALTY / 2
        return torch.where(alone, bias + PENALTY, bias)

    def allowed_pairs(self, p: Problem, state: Rounds | None = None) -> int:
        """As `Method.allowed_pairs`; pairs of the first sample's union, in memory linear in N."""
        return Chunks(self).pairs(p, _given(state))

    def layout(
        self, q: Tensor, k: Tensor, v: Tensor, p: Problem, state: Rounds | None = None,
        block_size: tuple[int, int] = (128, 128),
    ) -> Layout:  # fmt: skip
        """Slots in place of tokens: [B, H R, N, D], or on a ring [B, H, R N, D].

        q and k may be two tensors of equal values, so that their gradients can be told apart.
        """
        state, chunks = _given(state), Chunks(self)
        slots = chunks.problem(p)
        mask = copy.copy(static_parts(chunks, slots, q.device, block_size)[0])
        mask.mask_mod = chunks.mask_mod(slots, q.device, state)
        q, k, v = map(chunks.fold, sort(state, q, self.keys(k), v))
        return Layout(
            q, k, v, mask, chunks.score_mod(slots, q.device, state),
            restore=lambda out, lse: merge(out, lse, state), needs_lse=self.needs_lse,
        )  # fmt: skip

    def blocks(
        self, p: Problem, device: torch.device, block_size: tuple[int, int] = (128, 128),
        state: Rounds | None = None,
    ) -> BlockMask:  # fmt: skip
        """As `Method.blocks`, over slots and for any state."""
        chunks = Chunks(self)
        return chunks.blocks(chunks.problem(p), device, block_size)


def _of_length_1(x: Tensor) -> Tensor:
    """A token that is 0 stays 0, and its gradient finite: it has no direction."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    square = wide.square().sum(-1, keepdim=True)
    return (wide * torch.where(square > 0, square, 1).rsqrt()).to(x.dtype)


def _of_length_root_d(x: Tensor) -> Tensor:
    """As transformers does it, which undoes the division of the score by sqrt(D)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)


def _given(state: Rounds | None) -> Rounds:
    if not isinstance(state, Rounds):
        kind = type(state).__name__
        raise ValueError(f"reformer: the state is a {kind}; rounds(buckets) makes what it must be")
    return state


def _each(x: Tensor) -> tuple[Tensor, ...]:
    """[B, H, R, N] -> [B, H, N] of each round, for a closure that kernels inline."""
    return x.movedim(2, 0).contiguous().unbind()
