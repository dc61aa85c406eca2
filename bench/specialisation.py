"""How much heads differ: the paper's two figures, and measures that part weights from the mask.

An untrained stack of attention layers (no residual, no normalisation, nn.Linear's default weights,
normal inputs, N = 256) under the released mask comes near the paper's mean entropy and sigma: to
ENTROPY_TOLERANCE and SIGMA_TOLERANCE. Uniform attention over the same mask gives nearly the same:
both figures are properties of the mask. So three measures stand beside them that are 0 (or 1) for
uniform attention whatever the mask is. They part what weights do from the mask, and random weights
do something too: what training did is the difference from the untrained row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.masks import mask_grid
from bench.paper import SPECIALISATION_HEADS, SPECIALISATION_LAYERS
from methods import METHODS, Method, Problem

RECIPE = Problem(batch=4, q_heads=SPECIALISATION_HEADS, seq_len=256, head_dim=64, dtype="float32")
MASKS = ("standard", "spattention_released", "spattention")
SEEDS = (0, 1, 2, 3, 4)
ENTROPY_TOLERANCE, SIGMA_TOLERANCE = 3e-4, 6e-4
LOG_FLOOR = 1e-9  # the recipe's: a head's entropy is -sum a log(a + 1e-9)


@dataclass(frozen=True, kw_only=True)
class Specialised:
    """Measures of one layer's attention; entropies in nats. Rows without a key do not count.

    Attributes:
        weights: "uniform" over the mask's keys, "untrained", or of a model of `train`.
        seed, layer: None for uniform attention; layers count from 1.
        entropy: mean over heads of each head's mean over queries.
        sigma: standard deviation of the heads' entropies over the heads (ddof 0).
        normalised: as entropy, of entropy / log(keys) of the queries with two keys or more;
            uniform attention has 1.
        excess: standard deviation over the heads of their normalised entropies; uniform has 0.
        divergence: mean Jensen-Shannon divergence, in bits, of two heads on the keys that both
            see, where there are two or more; uniform has 0. None where heads share none.
        bound: the largest entropy that a query can have, log of the most keys.
        empty: share of the (head, query) rows without a key.
        head_entropy: of each head; semicolon-separated.
    """

    method: str
    weights: str
    seed: int | None = None
    layer: int | None = None
    entropy: float
    sigma: float
    normalised: float
    excess: float
    divergence: float | None
    bound: float
    empty: float
    head_entropy: str

    @property
    def by_head(self) -> list[float]:
        return [float(x) for x in self.head_entropy.split(";")]


def specialisation(
    methods: Sequence[Method] = tuple(METHODS[name] for name in MASKS),
    p: Problem = RECIPE,
    layers: int = SPECIALISATION_LAYERS,
    seeds: Sequence[int] = SEEDS,
) -> Iterator[Specialised]:
    """Uniform attention over each mask, then the layers of an untrained stack for each seed."""
    for method in methods:
        allowed = torch.from_numpy(mask_grid(method, p))
        yield measure(uniform(allowed), allowed, method=method.name, weights="uniform")
        for seed in seeds:
            maps = untrained(allowed, p, layers, seed)
            for layer, attention in enumerate(maps, 1):
                yield measure(
                    attention, allowed, method=method.name, weights="untrained", seed=seed,
                    layer=layer,
                )  # fmt: skip


def uniform(allowed: Tensor) -> Tensor:
    """Attention [1, H, N, N] that spreads evenly over the keys of each query."""
    return (allowed / allowed.sum(-1, keepdim=True).clamp(min=1)).double()[None]


def untrained(allowed: Tensor, p: Problem, layers: int, seed: int) -> Iterator[Tensor]:
    """Attention [B, H, N, N] of each layer of the recipe's stack; width q_heads x head_dim."""
    random = torch.Generator().manual_seed(seed)
    width = p.q_heads * p.head_dim

    def linear(x: Tensor) -> Tensor:
        """A new layer as nn.Linear draws it: weights and biases uniform within 1 / sqrt(width)."""
        drawn = torch.rand(width + 1, width, generator=random) * 2 - 1
        weight, bias = (drawn / math.sqrt(width)).split((width, 1))
        return x @ weight + bias

    def heads(x: Tensor) -> Tensor:
        return linear(x).unflatten(-1, (p.q_heads, p.head_dim)).transpose(1, 2)

    x = torch.randn(p.batch, p.seq_len, width, generator=random)
    for _ in range(layers):
        q, k, v = heads(x), heads(x), heads(x)
        attention = weights_of(q, k, allowed)
        yield attention
        x = linear((attention @ v).transpose(1, 2).flatten(2))


def weights_of(q: Tensor, k: Tensor, allowed: Tensor) -> Tensor:
    """Attention weights [B, H, N, N] of q and k [B, H, N, D]; a row without a key is 0."""
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~allowed, torch.finfo(q.dtype).min)
    return scores.softmax(-1) * allowed


def measure(
    attention: Tensor, allowed: Tensor, *, method: str, weights: str, seed: int | None = None,
    layer: int | None = None,
) -> Specialised:  # fmt: skip
    """Measures of attention weights [B, H, N, N] under a mask [H, N, N] of the same heads."""
    entropy = -(attention * (attention + LOG_FLOOR).log()).sum(-1)
    keys = allowed.sum(-1)
    by_head = _mean_of_rows(entropy, keys > 0)
    normalised = _mean_of_rows(entropy / keys.clamp(min=2).log(), keys > 1)
    return Specialised(
        method=method, weights=weights, seed=seed, layer=layer,
        entropy=float(by_head.mean()),
        sigma=float(by_head.std(correction=0)),
        normalised=float(normalised.mean()),
        excess=float(normalised.std(correction=0)),
        divergence=divergence(attention, allowed),
        bound=math.log(keys.max()),
        empty=float((keys == 0).double().mean()),
        head_entropy=";".join(f"{x:.6g}" for x in by_head.tolist()),
    )  # fmt: skip


def divergence(attention: Tensor, allowed: Tensor) -> float | None:
    """Mean Jensen-Shannon divergence in bits over pairs of heads and queries with common keys."""
    total, rows = 0.0, 0
    for a, b in itertools.combinations(range(len(allowed)), 2):
        common = allowed[a] & allowed[b]
        counted = common.sum(-1) > 1
        if not counted.any():
            continue
        shares = [_share(attention[:, head] * common)[:, counted] for head in (a, b)]
        mixed = _bits((shares[0] + shares[1]) / 2)
        found = mixed - (_bits(shares[0]) + _bits(shares[1])) / 2
        total, rows = total + float(found.clamp(min=0).sum()), rows + found.numel()
    return total / rows if rows else None


def _share(x: Tensor) -> Tensor:
    return x / x.sum(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)


def _bits(x: Tensor) -> Tensor:
    """Entropy of the last dimension in bits."""
    return -torch.xlogy(x, x).sum(-1) / math.log(2)


def _mean_of_rows(x: Tensor, counted: Tensor) -> Tensor:
    """Mean over batch and counted queries of x [B, H, N]: [H]."""
    return (x * counted).sum((0, 2)) / (len(x) * counted.sum(-1))
