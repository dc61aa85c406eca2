"""Small models of transformers, and dense attention under a method's mask to hold them against."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    OlmoeConfig,
    PreTrainedModel,
)

from methods import Method, Problem
from methods.pinned import Pinned
from tests.methods.dense import CPU, dense_mask

VOCAB = 97
KINDS = ("llama", "gpt_neox", "olmoe")


def small_model(kind: str, attention: str, **changes) -> PreTrainedModel:
    """Two layers of four heads, the same weights for the same kind."""
    shape = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "attention_dropout": 0.0, "use_cache": False, "pad_token_id": 0,
        "eos_token_id": None,
    }  # fmt: skip
    config = {
        "llama": lambda: LlamaConfig(**shape | {"num_key_value_heads": 2} | changes),
        "gpt_neox": lambda: GPTNeoXConfig(**shape | {"hidden_dropout": 0.0} | changes),
        # All experts take part: a choice of them could turn on the last bit of a score.
        "olmoe": lambda: OlmoeConfig(
            **shape | {"num_experts": 4, "num_experts_per_tok": 4, "intermediate_size": 32}
            | {"num_key_value_heads": 2} | changes
        ),
    }[kind]()  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    if kind == "olmoe":
        model.set_experts_implementation("eager")  # the only one in float64
    return model


def token_ids(batch: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(1, VOCAB, (batch, tokens), generator=generator)


def run(model: PreTrainedModel, ids: Tensor, **kwargs) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of the language model's loss by name of the parameter."""
    model.zero_grad()
    answer = model(ids, labels=ids, **kwargs)
    answer.loss.backward()
    return answer.logits.detach(), {name: x.grad for name, x in model.named_parameters()}


def register_dense(name: str, method: Method, seq_len: int | None = None) -> str:
    """Registers softmax over all N x N scores under mask_mod, at least in float32."""

    def attention(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: None, scaling: float, **_
    ) -> tuple[Tensor, None]:
        allowed = _dense_mask(Pinned(method, seq_len), q.shape[1], q.shape[2]).to(q.device)
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = q.to(wide) @ k.to(wide).mT * scaling
        lowest = torch.finfo(scores.dtype).min
        weights = scores.masked_fill(~allowed, lowest).softmax(-1) * allowed
        return (weights.to(q.dtype) @ v).transpose(1, 2).contiguous(), None

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, lambda **_: None)
    return name


@lru_cache(maxsize=32)
def _dense_mask(method: Method, heads: int, tokens: int) -> Tensor:
    p = Problem(q_heads=heads, seq_len=tokens)
    method.validate(p)
    return dense_mask(method, p, None).to(CPU)


def register_dense_shared(name: str, method: Method) -> str:
    """As register_dense, with q as keys, under what `rows` says of the method and its state."""

    def attention(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: None, scaling: float,
        attention_state: Any = None, **_,
    ) -> tuple[Tensor, None]:  # fmt: skip
        p = Problem(batch=len(q), q_heads=q.shape[1], seq_len=q.shape[2], head_dim=q.shape[3])
        state = attention_state or method.prepare(q, q, p)
        every = torch.arange(p.seq_len, device=q.device).expand(p.q_heads, -1)
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = q.to(wide) @ method.keys(q).to(wide).mT * scaling
        weights = (scores + method.rows(p, q.device, every, state)).softmax(-1)
        return (weights.to(q.dtype) @ v).transpose(1, 2).contiguous(), None

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, lambda **_: None)
    return name
