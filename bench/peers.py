"""Reference implementations as backends: transformers, reformer-pytorch and xformers.

The same tensors and the same work. A library's own code runs, uncompiled where it is plain
PyTorch, on the problem's q, k, v [B, H, N, D] in the problem's type; the gate judges it like any
other backend. What is not the library's:

- Projections are left out: layers that would project hidden states return q, k, v. They return
  views where the library allows it, so that no copy into its usual [B, N, H D] is charged to it.
- Reformer's buckets come from `Reformer.hash`, inside the timed call, as for every other backend:
  transformers would draw its rotations on the device, and reformer-pytorch without a seed. Both
  take one tensor as queries and keys, whose gradient is the sum of those of q and k.
- BigBird's random blocks are the method's, in place of lists that transformers draws anew in every
  training step, by loops on the host. Masks of padding, here of none, are made ahead, as by its
  model, for all layers together. That it fills an N x N matrix of probabilities stays in.

What they cost in precision stays in, too, and the gate says where it is too much: transformers'
Longformer has a float32 softmax whatever the type; several keep scores and probabilities in 16
bits, where most fail it; and both LSH modules, causal and with several rounds, give a token that
sees itself alone weights whose sum is 1 to a few thousandths in float32, since its scores are -1e5
or -5e4.

Libraries are imported where they are first needed: they are optional, and slow to import.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from methods import Method, Problem
from methods.banded import Banded, shared_window
from methods.bigbird import BigBird, draw_blocks
from methods.longformer import Longformer
from methods.reformer import Reformer

Attention = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, None]]
# What the import of a package that was built for another torch raises, or its first call.
LOAD_ERRORS = (AttributeError, ImportError, OSError, RuntimeError)


def not_installed(package: str) -> str | None:
    """Why a package cannot be used, or None."""
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


# transformers


def hf_refuses(method: Method, p: Problem, device: torch.device, phase: str) -> str | None:
    """Why transformers does not compute this, or None."""
    if p.kv_heads != p.q_heads:
        return "transformers' module has as many key heads as query heads"
    reasons = {"longformer": _longformer_refuses, "bigbird": _bigbird_refuses}
    return reasons.get(method.name, _lsh_refuses)(method, p)


def hf_build(
    method: Method, p: Problem, device: torch.device, block_size: tuple[int, int]
) -> Attention:
    """The self-attention of transformers that a method names."""
    builders = {"longformer": _longformer, "bigbird": _bigbird, "reformer": _lsh}
    return builders[method.name](method, p, device)


def _longformer_refuses(method: Longformer, p: Problem) -> str | None:
    if p.causal:
        return "transformers' LongformerSelfAttention is not causal"
    if max(method.steps(p)) > 1:
        return "transformers' LongformerSelfAttention has no dilation"
    return _no_multiple("LongformerSelfAttention", p, "window", method.window)


def _bigbird_refuses(method: BigBird, p: Problem) -> str | None:
    if p.causal:
        return "transformers' BigBirdBlockSparseAttention is not causal"
    if not method.n_random:
        return "transformers' BigBirdBlockSparseAttention needs a random block"
    return _no_multiple("BigBirdBlockSparseAttention", p, "block", method.block)


def _lsh_refuses(method: Reformer, p: Problem) -> str | None:
    if method.mode != "transformers" or method.within_buckets:
        return (
            "transformers' LSHSelfAttention computes mode='transformers', "
            "within_buckets=False alone"
        )
    if p.seq_len == method.chunk:
        return "transformers' LSHSelfAttention is dense where one chunk holds all tokens"
    return None


def _no_multiple(module: str, p: Problem, name: str, size: int) -> str | None:
    if p.seq_len % size == 0:
        return None
    return f"{p.seq_len} tokens are no multiple of {name} {size}, as transformers' {module} needs"


def _longformer(method: Longformer, p: Problem, device: torch.device) -> Attention:
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    width = p.q_heads * p.head_dim
    config = LongformerConfig(
        attention_window=[method.window], num_hidden_layers=1, hidden_size=width,
        num_attention_heads=p.q_heads, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    with torch.device("meta"):  # its weights are dropped
        module = LongformerSelfAttention(config, layer_id=0).eval()
    _drop(module, "query", "key", "value", "query_global", "key_global", "value_global")
    is_global = (torch.arange(p.seq_len, device=device) < method.n_global).repeat(p.batch, 1)
    masks = {
        "attention_mask": is_global.to(p.torch_dtype), "is_index_global_attn": is_global,
        "is_index_masked": torch.zeros_like(is_global), "is_global_attn": method.n_global > 0,
    }  # fmt: skip
    # Read for its sizes, and where tokens are global, whose projections ignore it.
    hidden = torch.zeros((), dtype=p.torch_dtype, device=device)
    hidden = hidden.expand(p.batch, p.seq_len, width)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        q, k, v = (x.permute(2, 0, 1, 3) for x in (q, k, v))  # [N, B, H, D]
        module.query = lambda _: q.clone()  # it is divided by sqrt(D) in place
        module.query_global = lambda _: q[: method.n_global].clone()
        module.key = module.key_global = lambda _: k
        module.value = module.value_global = lambda _: v
        return _by_head(module(hidden, **masks)[0], p), None

    return run


def _bigbird(method: BigBird, p: Problem, device: torch.device) -> Attention:
    from transformers import BigBirdConfig, BigBirdModel
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention

    config = BigBirdConfig(
        block_size=method.block, num_random_blocks=method.n_random,
        hidden_size=p.q_heads * p.head_dim, num_attention_heads=p.q_heads,
    )  # fmt: skip
    with torch.device("meta"):
        # In training it would seed numpy's global generator; nothing else depends on it.
        module = BigBirdBlockSparseAttention(config).eval()
    _drop(module, "query", "key", "value")
    drawn = draw_blocks(p.q_heads, method.n_blocks(p), method.n_random, method.seed, False)
    drawn = list(drawn[:, 1:-1].numpy())  # the first and the last row have none
    module._bigbird_block_rand_mask_with_head = lambda *_, **__: drawn
    every = torch.ones(p.batch, p.seq_len, dtype=p.torch_dtype, device=device)
    blocked, *masks = BigBirdModel.create_masks_for_block_sparse_attn(every, method.block)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        heads = iter(drawn)  # at some lengths it asks head by head
        module._bigbird_block_rand_mask = lambda *_, **__: next(heads)
        module.query, module.key, module.value = (
            lambda _, x=x: x.transpose(1, 2) for x in (q, k, v)
        )
        sizes = q[:, 0]  # [B, N, any] in place of hidden states
        out = module(sizes, *masks, from_blocked_mask=blocked, to_blocked_mask=blocked)[0]
        return _by_head(out, p), None

    return run


def _lsh(method: Reformer, p: Problem, device: torch.device) -> Attention:
    from transformers import ReformerConfig
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    config = ReformerConfig(
        attn_layers=["lsh"], axial_pos_embds=False, hidden_size=p.q_heads,
        num_attention_heads=p.q_heads, attention_head_size=p.head_dim,
        num_hashes=method.n_rounds, num_buckets=list(method.rotations(p)),
        lsh_attn_chunk_length=method.chunk, is_decoder=p.causal,
        lsh_num_chunks_before=method.before, lsh_num_chunks_after=method.after,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # its weights are drawn, and dropped
        module = LSHSelfAttention(config, layer_idx=0).eval()
    _drop(module, "query_key", "value")
    module.to(device)
    module._split_hidden_size_dim = lambda x, *_: x  # [B, H, N, D] already
    buckets = _buckets(method, p, device)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        module.query_key, module.value = lambda _: q, lambda _: v
        sizes = q[:, 0]
        return _by_head(module(sizes, buckets=buckets(q)).hidden_states, p), None

    return run


def _drop(module: torch.nn.Module, *layers: str) -> None:
    """Makes room for functions in place of a module's layers."""
    for layer in layers:
        delattr(module, layer)


def _by_head(out: Tensor, p: Problem) -> Tensor:
    """[B, N, H D] -> [B, H, N, D]."""
    return out.unflatten(-1, (p.q_heads, p.head_dim)).transpose(1, 2)


def _buckets(method: Reformer, p: Problem, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A closure q -> buckets [B, H, R, N], other numbers in each round, as both libraries sort."""
    offsets = torch.arange(method.n_rounds, device=device)[:, None]
    offsets = offsets * math.prod(method.rotations(p))
    return lambda q: method.hash(q, p) + offsets


# reformer-pytorch


def reformer_pytorch_refuses(
    method: Reformer, p: Problem, device: torch.device, phase: str
) -> str | None:
    """Why reformer-pytorch does not compute this, or None."""
    if method.mode == "transformers" or (method.mode == "exact" and not method.within_buckets):
        return (
            "reformer-pytorch computes mode='reformer_pytorch', "
            "or mode='exact' with within_buckets=True"
        )
    if (method.before, method.after) != (1, 0):
        return "reformer-pytorch sees one chunk before a query's own and none after"
    if method.mode == "exact" and not p.causal and p.seq_len == 2 * method.chunk:
        return "reformer-pytorch lists every pair of two chunks twice"
    if p.seq_len % (2 * method.chunk):
        return f"{p.seq_len} tokens are no multiple of two chunks of {method.chunk}"
    if method.mode == "exact" and p.dtype in ("bfloat16", "float16"):
        return f"reformer-pytorch without duplicates takes no {p.dtype}"
    return None


def reformer_pytorch_build(
    method: Reformer, p: Problem, device: torch.device, block_size: tuple[int, int]
) -> Attention:
    """LSHAttention of reformer-pytorch, all batches and heads as one batch."""
    from reformer_pytorch import LSHAttention

    module = LSHAttention(
        bucket_size=method.chunk, n_hashes=method.n_rounds, causal=p.causal,
        attend_across_buckets=not method.within_buckets,
        allow_duplicate_attention=method.mode != "exact",
    ).eval()  # fmt: skip
    buckets = _buckets(method, p, device)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        hashed = buckets(q).flatten(2).flatten(0, 1)
        module.hash_vectors = lambda *_, **__: hashed
        return module(q.flatten(0, 1), v.flatten(0, 1))[0].view_as(q), None

    return run


# xformers


def xformers_missing(device: torch.device) -> str | None:
    """Why xformers cannot run on a device, or None."""
    if reason := not_installed("xformers"):
        return reason
    return xformers_fault(device) if device.type == "cuda" else "xformers has CUDA kernels alone"


def _xformers(name: str) -> ModuleType:
    """A module of xformers, which takes flash-attn-4 for flash-attn 2: both are `flash_attn`."""
    taken = importlib.util.find_spec("flash_attn")
    if taken is None or importlib.util.find_spec("flash_attn.flash_attn_interface"):
        return importlib.import_module(f"xformers.{name}")
    before = sys.modules.get("flash_attn")
    sys.modules["flash_attn"] = None  # found nowhere: it then uses torch's own kernels
    try:
        return importlib.import_module(f"xformers.{name}")
    finally:
        del sys.modules["flash_attn"]
        if before is not None:
            sys.modules["flash_attn"] = before


@lru_cache(maxsize=8)
def xformers_fault(device: torch.device) -> str | None:
    """What a small call of xformers on a device raises, in one line; None where it runs."""
    try:
        ops = _xformers("ops")
        x = torch.zeros(1, 128, 1, 64, dtype=torch.float16, device=device)
        ops.memory_efficient_attention(x, x, x)
    except LOAD_ERRORS as error:
        text = " ".join(str(error).split())[:200]
        return f"xformers does not run with torch {torch.__version__}: {text}"
    return None


def xformers_refuses(method: Method, p: Problem, device: torch.device, phase: str) -> str | None:
    """Why xformers does not compute this, or None; of types and shapes it says so itself."""
    if shared_window(method, p) is None:
        return "xformers' biases are one window of all heads, without global tokens or dilation"
    if p.kv_heads != p.q_heads:
        return "xformers has no backward where query heads share key heads"
    return "xformers has no float64" if p.dtype == "float64" else None


def xformers_build(
    method: Banded, p: Problem, device: torch.device, block_size: tuple[int, int]
) -> Attention:
    """memory_efficient_attention under a causal or local bias, by the operator it chooses."""
    ops, biases = _xformers("ops"), _xformers("ops.fmha.attn_bias")
    reach = shared_window(method, p)
    if reach < p.seq_len - 1:
        ahead = 0 if p.causal else reach
        bias = biases.LocalAttentionFromBottomRightMask(window_left=reach, window_right=ahead)
    else:
        bias = biases.LowerTriangularMask() if p.causal else None

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, N, H, D]
        return ops.memory_efficient_attention(q, k, v, attn_bias=bias).transpose(1, 2), None

    return run
