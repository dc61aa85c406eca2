"""Every method as an attn_implementation of transformers.

    from methods.huggingface import register

    register()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="spattention")

`model.set_attn_implementation("longformer")` changes it later. It takes a model that looks its
attention up by name, one whose `_supports_attention_backend` is true. All layers draw the same
pattern; each length of a sequence is compiled once. torch.compile of the model breaks its graph in
every layer, and with `use_cache` compiles every layer anew.

What a layer cannot honour is refused in one line: attention dropout, masks other than padding,
scores with a cap, a bias or a sink, keys chosen by the model, packed sequences, cross attention,
attention weights as outputs, and padding or cached keys where the mask depends on the number of
tokens and `seq_len` does not fix it.

Keyword arguments of the model's forward reach the method (`generate` takes none that it does not
know):
    global_tokens: Longformer's global tokens of each sample, bool [B, N], in place of its prefix.
    attention_state: for every layer, in place of what each would draw or hash: BigBird's
        `drawn_blocks` (with `seq_len`, of so many tokens) or Reformer's `rounds`.
    share_qk: True makes the model's queries its keys too, as Reformer demands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from methods.attend import BACKENDS, attend
from methods.bigbird import BigBird
from methods.longformer import GlobalTokens, Longformer
from methods.method import Method, Problem
from methods.pinned import Pinned, Spans
from methods.presets import METHODS, resolve

# transformers reads a meaning into names that contain these.
RESERVED = ("eager", "sdpa", "flash", "flex_attention", "|", "/")
# Arguments by which models change scores, choose keys, or pack sequences.
UNHEARD = (
    "softcap", "position_bias", "s_aux", "sinks", "indices", "block_indices", "cu_seq_lens_q",
    "cu_seq_lens_k",
)  # fmt: skip


def register(
    methods: Mapping[str, str | Method] | None = None,
    *,
    seq_len: int | None = None,
    backend: str = "auto",
) -> list[str]:
    """Makes methods known to transformers; a name registered before is replaced.

    Args:
        methods: name -> Method or name of a preset; where not given, all presets that it can be
            done for.
        seq_len: draws every pattern for so many tokens, of which a shorter sample sees the
            first. Without it a pattern that depends on the number of tokens is that of the call:
            samples cannot be padded, keys cannot be cached, and a call may be too short for the
            method's parameters. Reformer's order has no padding; it takes no seq_len.
        backend: as in `attend`; "auto" chooses by device. Queries behind cached keys are computed
            by PyTorch's scaled_dot_product_attention, from a table of all queries by all keys.

    Returns:
        The names, for `attn_implementation`.

    Raises:
        ValueError: transformers would read a name as one of its own; methods, seq_len or backend
            is not what it may be.
    """
    if methods is None:
        methods = {name: x for name, x in METHODS.items() if seq_len is None or _fits(x, seq_len)}
    if not isinstance(methods, Mapping) or not all(isinstance(name, str) for name in methods):
        raise ValueError(f"methods is {methods!r}; it must be a mapping of names to methods")
    if seq_len is not None:
        Problem(seq_len=seq_len)
    interfaces = [Interface(name, resolve(x), seq_len, backend) for name, x in methods.items()]
    for interface in interfaces:
        interface.validate()
    for interface in interfaces:
        AttentionInterface.register(interface.name, interface.attention)
        AttentionMaskInterface.register(interface.name, interface.mask)
    return list(methods)


@dataclass(frozen=True, eq=False)
class Call:
    """What a forward tells its layers, in place of a mask: nothing of the size N x N.

    Attributes:
        causal: whether query i sees only keys j <= i.
        offset: position of the first query; keys before it come from a cache.
        spans: where each sample's tokens are, or None without padding.
        columns: of the padding mask; 0 without one.
        given: what global tokens or a state given to the layers became, by the id of the object,
            which they keep alive.
    """

    causal: bool
    offset: int
    spans: Spans | None = None
    columns: int = 0
    given: dict[int, tuple[Any, Spans]] = field(default_factory=dict)

    def __getattr__(self, name: str) -> None:
        raise AttributeError(
            f"the model asks its mask for {name!r}, but these methods have none; "
            "they are for models that leave attention to the function of that name"
        )

    def contiguous(self) -> Call:
        """What `generate` asks of a mask first where the cache is of a fixed size.

        Raises:
            ValueError: always. The mask that it makes ahead would have to be a tensor.
        """
        raise ValueError(
            "generate with these methods takes no cache of a fixed size; "
            "leave cache_implementation at its default"
        )


@dataclass(frozen=True)
class Interface:
    """One method as the two functions that transformers calls: once a forward, once a layer."""

    name: str
    method: Method
    seq_len: int | None
    backend: str

    def validate(self) -> None:
        if not self.name or any(word in self.name for word in RESERVED):
            raise ValueError(
                f"attn_implementation {self.name!r} cannot be registered: transformers gives "
                f"names with {', '.join(RESERVED)} a meaning of their own"
            )
        if self.backend not in (known := ("auto", *BACKENDS)):
            raise ValueError(f"backend is {self.backend!r}; it must be one of {', '.join(known)}")
        if self.seq_len is not None and not self.method.static:
            raise ValueError(f"{self.name}: {self.method.name} takes no fixed seq_len")

    # Compiled models run both as they are: the kernel inside is compiled on its own.
    @torch.compiler.disable
    def mask(
        self, batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor = 0,
        kv_offset: int = 0, mask_function: Callable = causal_mask_function,
        attention_mask: Tensor | None = None, use_vmap: bool = False,
        device: torch.device | str = "cpu", **_: Any,
    ) -> Call:  # fmt: skip
        """What `create_causal_mask` and its like give to the layers; see `sdpa_mask` there."""
        offset = int(q_offset)
        causal = _causality(mask_function, batch_size, q_length, offset, device)
        if use_vmap or kv_offset or causal is None:
            raise ValueError(
                f"{self.name}: the model asks for a mask of its own (packed sequences, a window "
                "shorter than the sequence, an overlay); only padding is honoured"
            )
        if attention_mask is None:
            return Call(causal, offset)
        if attention_mask.ndim != 2 or len(attention_mask) != batch_size:
            raise ValueError(
                f"{self.name}: attention_mask is {list(attention_mask.shape)}; "
                f"it must be [{batch_size}, tokens]"
            )
        # A cache of fixed size is longer than what has been seen.
        seen, columns = offset + q_length if causal else kv_length, attention_mask.shape[1]
        if columns < seen:
            raise ValueError(
                f"{self.name}: attention_mask is for {columns} tokens; there are {seen}"
            )
        return Call(causal, offset, _spans(attention_mask[:, :seen].bool(), self.name), columns)

    @torch.compiler.disable
    def attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
        attention_mask: Call | None, scaling: float | None = None, dropout: float = 0.0,
        global_tokens: Tensor | None = None, attention_state: Any = None, share_qk: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """What a layer calls: q [B, Hq, N, D], k and v [B, Hkv, N, D] -> [B, N, Hq, D], None."""
        self._refuse(module, query, key, attention_mask, dropout, share_qk, kwargs)
        call, tokens = attention_mask, query.shape[2]
        if call is None:
            causal = kwargs.get("is_causal")
            causal = getattr(module, "is_causal", True) if causal is None else causal
            call = Call(causal, key.shape[2] - tokens if causal else 0)
        if call.causal:
            key, value = (x[:, :, : call.offset + tokens] for x in (key, value))
        query, key, value = _one_dtype(query, key, value)
        factor = 1.0 if scaling is None else scaling * math.sqrt(query.shape[-1])
        unscaled = query
        if not math.isclose(factor, 1):
            query = query * factor
        if share_qk:
            # Reformer demands the very tensor; its keys are normalised.
            key = query if self.method.shared_qk else unscaled
        method, state = self._placed(call, key, global_tokens, attention_state)
        if key.shape[2] == tokens:
            out = attend(query, key, value, method, call.causal, self.backend, state=state)
        else:
            out = self._last_rows(call, query, key, value, state)
        return out.transpose(1, 2).contiguous(), None

    def _refuse(
        self, module: nn.Module, query: Tensor, key: Tensor, mask: Any, dropout: float,
        share_qk: bool, kwargs: dict[str, Any],
    ) -> None:  # fmt: skip
        config = getattr(module, "config", None)
        heads = getattr(config, "num_attention_heads", query.shape[1])
        unheard = [name for name in UNHEARD if kwargs.get(name) is not None]
        if dropout > 0:
            why = f"attention dropout is {dropout}; only 0 is possible, set it in the config"
        elif mask is not None and not isinstance(mask, Call):
            kind = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask)
            why = f"attention_mask is {kind}; only padding masks [batch, tokens] are honoured"
        elif mask is not None and mask.columns > key.shape[2]:
            why = f"attention_mask is for {mask.columns} tokens; there are {key.shape[2]}"
        elif unheard:
            why = f"the model asks for {', '.join(unheard)}, which is not honoured"
        elif heads != query.shape[1]:
            why = f"a layer has {query.shape[1]} heads where the config says {heads}"
        elif any(getattr(config, x, False) for x in ("is_encoder_decoder", "add_cross_attention")):
            why = "the model has cross attention, which is not honoured"
        elif kwargs.get("output_attentions"):
            why = "attention weights are never made; output_attentions must be False"
        elif kwargs.get("global_attention_mask") is not None:
            why = "global_attention_mask is not read; give global_tokens, bool [batch, tokens]"
        elif not isinstance(share_qk, bool):
            why = f"share_qk is {share_qk!r}; it must be True or False"
        elif self.method.shared_qk and not share_qk:
            why = (
                "it shares queries and keys; share_qk=True, an argument of the model's forward, "
                "makes its queries its keys"
            )
        elif share_qk and key.shape[1] != query.shape[1]:
            why = f"share_qk needs as many key as query heads, not {key.shape[1]} and {heads}"
        elif share_qk and key.shape[2] != query.shape[2]:
            why = "share_qk takes no cached keys; use_cache=False computes every length anew"
        else:
            return
        raise ValueError(f"{self.name}: {why}")

    def _placed(
        self, call: Call, key: Tensor, global_tokens: Tensor | None, given: Any
    ) -> tuple[Method, Any]:
        """The method of a call and its state."""
        self._refuse_state(call, global_tokens, given)
        own, spans = given if global_tokens is None else global_tokens, call.spans
        if not self.method.static:
            return self.method, given
        if self.seq_len is None and spans is None and own is None:
            return self.method, None
        pinned = Pinned(self.method, self.seq_len)
        if own is None:
            return pinned, spans
        # The layers of a call share what they make, block masks above all.
        if id(own) not in call.given:
            spans = spans or _whole(key)
            inner = own if own is given else self._globals(spans, pinned, own, key)
            call.given[id(own)] = own, replace(spans, inner=inner, parts={})
        return pinned, call.given[id(own)][1]

    def _refuse_state(self, call: Call, global_tokens: Any, given: Any) -> None:
        method, padded = self.method, call.spans is not None
        if global_tokens is not None and not isinstance(method, Longformer):
            why = " has no global tokens to be given; longformer has"
        elif global_tokens is not None and not isinstance(global_tokens, Tensor):
            kind = type(global_tokens).__name__
            why = f": global_tokens is a {kind}; it must be a bool tensor"
        elif given is not None and method.static and not isinstance(method, BigBird):
            why = " has no attention_state to be given; bigbird and reformer have"
        elif self.backend == "varlen" and (padded or self.seq_len or global_tokens is not None):
            why = ": backend 'varlen' takes no padding, no seq_len and no global_tokens"
        elif padded and not method.static:
            why = f": {method.name}'s order has no padding"
        elif padded and self.seq_len is None and not method.grows(call.causal):
            why = (
                ": its mask depends on the number of tokens, so padding would change "
                "it; fix it by register(seq_len=...)"
            )
        else:
            return
        raise ValueError(f"{self.name}{why}")

    def _globals(
        self, spans: Spans, pinned: Pinned, global_tokens: Tensor, key: Tensor
    ) -> GlobalTokens:
        """Which tokens of samples are global, in positions of the pattern."""
        p = Problem(batch=key.shape[0], seq_len=key.shape[2])
        given = self.method.globals_state(global_tokens.to(key.device), p).tokens
        length = pinned.drawn_for(p).seq_len
        index = torch.arange(length, device=key.device) + spans.start.to(key.device)[:, None]
        return GlobalTokens(F.pad(given, (0, length)).gather(1, index))

    def _last_rows(
        self, call: Call, query: Tensor, key: Tensor, value: Tensor, state: Spans | None
    ) -> Tensor:
        """Attention of the last queries alone, where keys before them come from a cache."""
        batch, heads, tokens, dim = query.shape
        if not call.causal:
            raise ValueError(
                f"{self.name}: {tokens} queries, {key.shape[2]} keys: no cross attention"
            )
        if self.seq_len is None and not self.method.grows():
            raise ValueError(
                f"{self.name}: its mask depends on the number of tokens, so keys cannot be "
                "cached; fix it by register(seq_len=...), or use_cache=False, which computes (and "
                "compiles) every length anew"
            )
        p = Problem(batch=batch, q_heads=heads, seq_len=key.shape[2], head_dim=dim)
        method = Pinned(self.method, self.seq_len)
        method.validate(p)
        index = torch.arange(call.offset, call.offset + tokens, device=query.device)
        bias = method.rows(p, query.device, index.expand(heads, -1), state)
        empty = (bias == -torch.inf).all(-1, keepdim=True)
        bias, key = bias.masked_fill(empty, 0).to(query.dtype), method.keys(key)
        out = F.scaled_dot_product_attention(query, key, value, bias, enable_gqa=True)
        return out.masked_fill(empty, 0)


def _causality(
    mask_function: Callable, batch: int, tokens: int, offset: int, device: torch.device | str
) -> bool | None:
    """True for plain causality, False for no mask at all, None for anything else.

    A compiled model wraps its mask for packed sequences even where nothing is packed, and a
    window may be longer than the sequence. Every query is asked for the first token, which both
    cut off before any other, and for those at distances of powers of two.
    """
    if mask_function in (causal_mask_function, bidirectional_mask_function):
        return mask_function is causal_mask_function
    place = torch.arange(offset, offset + tokens, device=device)[None]
    b, h = torch.arange(batch, device=device)[:, None], torch.zeros_like(place[:, :1])
    reach = 1 << torch.arange((offset + tokens).bit_length() + 1, device=device)[:, None]
    before, after = (place - F.pad(reach, (0, 0, 1, 0))).clamp(min=0), place + reach
    there = after < offset + tokens
    behind = mask_function(b, h, place.repeat(1, len(before)), before.view(1, -1))
    ahead = mask_function(b, h, place.expand_as(after)[there][None], after[there][None])
    none, every = not ahead.any(), bool(ahead.all())
    return none if behind.all() and (none or every) else None


def _fits(method: Method, seq_len: int) -> bool:
    """Whether a method can be drawn for so many tokens."""
    p = Problem(seq_len=seq_len)
    try:
        method.validate(p)
    except ValueError:
        return False
    return method.static


def _whole(key: Tensor) -> Spans:
    """Samples without padding: all tokens of k [B, Hkv, N, D]."""
    start = torch.zeros(key.shape[0], dtype=torch.int32, device=key.device)
    return Spans(start, start + key.shape[2])


def _spans(valid: Tensor, name: str) -> Spans | None:
    """Spans of a padding mask, bool [B, N]; None where nothing is padded."""
    if valid.all():
        return None
    length = valid.sum(1, dtype=torch.int32)
    spans = Spans(valid.byte().argmax(1).int(), length)
    place = torch.arange(valid.shape[1], device=valid.device)
    sample = torch.arange(len(valid), device=valid.device)[:, None]
    if not valid.equal(spans.within(valid.device)(sample, place, place)[1]):
        raise ValueError(
            f"{name}: attention_mask has padding between tokens; only before or after"
        )
    return spans


def _one_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, which leaves float64 alone, its dtype: a model leaves the cast to its
    attention.
    """
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind) or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(kind)) for x in tensors)
