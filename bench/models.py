"""The models of `train`: a plain decoder, and causal language models of transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bench.derived import FLOPS_PER_PAIR
from bench.failures import one_line
from bench.step_attention import Call, StepAttention
from bench.text import digest
from methods.compiled import INDUCTOR

VOCABULARY = 50304
ROTARY_BASE = 10000.0
STANDARD_DEVIATION = 0.02  # of initial weights
SIZES = "num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size"
PREFIX = "measured_"  # of the names of attention that transformers hears of
# How configs call the experts that a token takes.
CHOSEN = "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"


@dataclass(frozen=True)
class Model:
    """Shape of a model.

    Attributes:
        config: fields of a transformers config, with model_type; None for the plain decoder.
    """

    name: str
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    head_dim: int
    vocabulary: int = VOCABULARY
    config: dict[str, Any] | None = field(default=None, hash=False)

    def shortened(self, layers: int) -> Model:
        """The same model with so many layers."""

        def cut(value: Any) -> Any:
            by_layer = isinstance(value, list) and len(value) == self.layers
            return value[:layers] if by_layer else value

        config = self.config and {name: cut(value) for name, value in self.config.items()}
        config = config and config | {"num_hidden_layers": layers}
        return replace(self, layers=layers, config=config)


def _olmoe(name: str, hidden: int, expert: int) -> Model:
    config = {
        "model_type": "olmoe", "hidden_size": hidden, "intermediate_size": expert,
        "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16,
        "num_experts": 64, "num_experts_per_tok": 8, "vocab_size": VOCABULARY,
    }  # fmt: skip
    return Model(name, 16, 16, 16, hidden, hidden // 16, config=config)


# Table 2 and Table 1 of the SPAttention paper.
MODELS = {
    model.name: model
    for model in (
        Model("table2", layers=8, heads=8, kv_heads=8, hidden=1024, head_dim=128),
        _olmoe("olmoe-0.25b-1.75b", 1024, 512),
        _olmoe("olmoe-1b-7b", 2048, 1024),
    )
}


def model_of_file(path: Path) -> Model:
    """The model of a transformers config.json, named after the file and what it holds.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no config of a language model; `check` says whether one can train here.
    """
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"--model-config {path}: not JSON ({error})") from None
    if not isinstance(values, dict) or "model_type" not in values:
        raise ValueError(f"--model-config {path}: no model_type, which names the architecture")
    try:
        config = _config(values)
    except Exception as error:  # a config of transformers raises errors of many libraries
        told = f"transformers does not take it ({one_line(error)})"
        raise ValueError(f"--model-config {path}: {told}") from None
    if config.is_encoder_decoder:
        raise ValueError(f"--model-config {path}: an encoder-decoder; it must be a decoder alone")
    for name in SIZES:
        if not isinstance(size := getattr(config, name, None), int) or size < 1:
            raise ValueError(f"--model-config {path}: {name} is {size!r}; it must be above 0")
    heads = config.num_attention_heads
    return Model(
        f"{path.stem}@{digest(path)}", config.num_hidden_layers, heads,
        getattr(config, "num_key_value_heads", None) or heads, config.hidden_size,
        getattr(config, "head_dim", None) or config.hidden_size // heads, config.vocab_size,
        values,
    )  # fmt: skip


def _config(values: dict[str, Any]) -> Any:
    from transformers import AutoConfig, logging

    logging.set_verbosity_error()  # what is wrong with a config is one line of this suite's
    fixed = {"use_cache": False, "attention_dropout": 0.0}
    fixed |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    others = {name: value for name, value in values.items() if name != "model_type"}
    return AutoConfig.for_model(values["model_type"], **others | fixed)


class LanguageModel(nn.Module):
    """Token ids -> loss of the next token, from the head's plain product and nothing else.

    Attributes:
        layers: the repeated part of body.
        active_weights: of all products but attention's that a token takes part in.
    """

    def __init__(
        self, body: nn.Module, head: nn.Linear, layers: nn.ModuleList, active_weights: int
    ) -> None:
        super().__init__()
        self.body, self.head = body, head
        self.layers, self.active_weights = list(layers), active_weights  # no second registration
        self.loss: Callable[..., Tensor] = next_token_loss

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy over ids and targets, both int64 [B, N]."""
        return self.loss(self.hidden(ids), self.head.weight, self.head.bias, targets)

    def hidden(self, ids: Tensor) -> Tensor:
        """Ids [B, N] -> what the head is given, [B, N, hidden]."""
        hidden = self.body(ids)
        return getattr(hidden, "last_hidden_state", hidden)

    def step_flops(self, model: Model, batch: int, seq_len: int, allowed_pairs: int) -> float:
        """Of the products of one step, the backward's twice the forward's.

        As is usual for a model's own FLOPs: scores that a kernel computes again do not count.

        Args:
            allowed_pairs: over the heads of one layer and sequence.
        """
        pairs = 3 * FLOPS_PER_PAIR["fwd"] * model.head_dim * allowed_pairs * model.layers
        return float(batch * (6 * self.active_weights * seq_len + pairs))


def next_token_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> Tensor:
    logits = F.linear(hidden, weight, bias).flatten(0, 1).float()
    return F.cross_entropy(logits, targets.flatten())


def build(
    model: Model,
    attention: Call,
    seq_len: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> LanguageModel:
    """A model with random weights, its attention in place; nothing is compiled yet."""
    torch.manual_seed(seed)
    with device:
        if model.config is None:
            body = Decoder(model, attention, seq_len).to(dtype)
            # Tied, as in OLMo by default.
            head = nn.Linear(model.hidden, model.vocabulary, bias=False, dtype=dtype)
            head.weight = body.embedding.weight
            layers = body.layers
        else:
            body, head, layers = _of_transformers(model, attention, dtype)
    return LanguageModel(body, head, layers, _active_weights(body, head))


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _active_weights(body: nn.Module, head: nn.Linear) -> int:
    """Embeddings are looked up; of a layer's experts, which lie in one tensor, some take part.

    Raises:
        ValueError: nothing says how many.
    """
    tables = {id(x.weight) for x in body.modules() if isinstance(x, nn.Embedding)}
    weights = [
        x for x in body.parameters() if x.ndim > 1 and id(x) not in tables and x is not head.weight
    ]
    chosen = None
    if any(x.ndim == 3 for x in weights):
        given = (getattr(body.config, name, None) for name in CHOSEN)
        if (chosen := next(filter(None, given), None)) is None:
            raise ValueError(f"it has weights as of experts, but no {CHOSEN[0]}")
    count = sum(x.numel() // len(x) * chosen if x.ndim == 3 else x.numel() for x in weights)
    return count + head.weight.numel()


def _of_transformers(
    model: Model, attention: Call, dtype: torch.dtype
) -> tuple[nn.Module, nn.Linear, nn.ModuleList]:
    from transformers import AttentionInterface, AutoModelForCausalLM

    from methods.huggingface import UNHEARD

    # A name of its own: models look it up at every call. For a name without a mask they make none.
    name = f"{PREFIX}{id(attention)}"
    unheard = (*UNHEARD, "sliding_window")
    AttentionInterface.register(name, partial(_interface, attention, unheard))
    config = _config(model.config)
    whole = AutoModelForCausalLM.from_config(config, attn_implementation=name, dtype=dtype)
    body = whole.base_model
    lists = (x for x in body.modules() if isinstance(x, nn.ModuleList))
    if (layers := next((x for x in lists if len(x) == model.layers), None)) is None:
        raise ValueError(f"it has no list of {model.layers} layers")
    return body.train(), whole.get_output_embeddings(), layers


def _interface(
    attention: Call, unheard: Iterable[str], module: nn.Module, query: Tensor, key: Tensor,
    value: Tensor, attention_mask: None = None, scaling: float | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """A layer's call, as transformers makes it: -> [B, N, Hq, D].

    Raises:
        ValueError: it has an option that no method hears of.
    """
    if asked := [name for name in unheard if options.get(name) is not None]:
        raise ValueError(
            f"its attention has {', '.join(asked)}, which no method honours: turn that off in the "
            "config, if it can be"
        )
    factor = 1.0 if scaling is None else scaling * math.sqrt(query.shape[-1])
    if not math.isclose(factor, 1):
        query = query * factor
    return attention(query, key, value).transpose(1, 2).contiguous(), None


class Decoder(nn.Module):
    """Pre-norm decoder: RMSNorm, rotary positions, GELU MLP of four times the width, no biases."""

    def __init__(self, model: Model, attention: Call, seq_len: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(model.vocabulary, model.hidden)
        self.layers = nn.ModuleList(Layer(model, attention) for _ in range(model.layers))
        self.norm = nn.RMSNorm(model.hidden)
        half = torch.arange(0, model.head_dim, 2) / model.head_dim
        # No buffer: a cast to bfloat16 would lose late positions, and DDP send it every step.
        self.angles = torch.arange(seq_len)[:, None] * ROTARY_BASE**-half
        self._initialise(model)

    def _initialise(self, model: Model) -> None:
        for name, weight in self.named_parameters():
            if weight.ndim > 1:
                # Two of these a layer add to the residual stream.
                residual = name.endswith(("out.weight", "down.weight"))
                scale = math.sqrt(2 * model.layers) if residual else 1
                nn.init.normal_(weight, std=STANDARD_DEVIATION / scale)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [B, N] -> hidden states [B, N, hidden]."""
        x = self.embedding(ids)
        cos, sin = self.angles.cos(), self.angles.sin()
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


class Layer(nn.Module):
    """One layer of the decoder."""

    def __init__(self, model: Model, attention: Call) -> None:
        super().__init__()
        width = model.heads * model.head_dim
        self.attention, self.shape = attention, (3, model.heads, model.head_dim)
        self.norm_in, self.norm_mid = nn.RMSNorm(model.hidden), nn.RMSNorm(model.hidden)
        self.qkv = nn.Linear(model.hidden, 3 * width, bias=False)
        self.out = nn.Linear(width, model.hidden, bias=False)
        self.up = nn.Linear(model.hidden, 4 * model.hidden, bias=False)
        self.down = nn.Linear(4 * model.hidden, model.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, N, hidden]; cos and sin [N, head_dim / 2] of the rotary angles."""
        q, k, v = self.qkv(self.norm_in(x)).unflatten(-1, self.shape).unbind(2)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        out = self.attention(_rotated(q, cos, sin), _rotated(k, cos, sin), v)
        x = x + self.out(out.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_mid(x))))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    near, far = x.chunk(2, dim=-1)
    return torch.cat((near * cos - far * sin, far * cos + near * sin), dim=-1).to(x.dtype)


def compile_model(model: LanguageModel, attention: StepAttention) -> None:
    """Compiles each layer, of which all share one graph, and the loss.

    Only `forward` is compiled, so that hooks which gather and shard weights stay outside. Where
    attention is not inlined it stands between two graphs of a layer.
    """
    compiled = partial(torch.compile, dynamic=False, options=INDUCTOR)
    for layer in model.layers:
        layer.forward = compiled(layer.forward, fullgraph=attention.inlined)
    model.loss = compiled(next_token_loss, fullgraph=True)


def recompute_layers(model: LanguageModel) -> None:
    """Keeps of a layer only its input; the rest is computed again in the backward."""
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def with_options(
    model: Model, *, checkpointing: bool, compiled: bool, shard: bool | None
) -> Model:
    """The model named for how it runs, where that is not the usual way."""
    words = (
        " recomputing" if checkpointing else "",
        "" if compiled else " uncompiled",
        {None: "", True: " sharded", False: " copied"}[shard],
    )
    return replace(model, name=model.name + "".join(words))
