"""Whether a model can be measured: one forward that counts its calls of attention."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from bench.failures import one_line
from bench.models import PREFIX, LanguageModel, Model, build
from bench.specs import AUTHOR_ERRORS
from methods import Problem

FEW_TOKENS = 64  # of a forward on a CPU


def check(model: Model, p: Problem) -> LanguageModel:
    """The model without its weights, after a forward that made one call of attention a layer.

    Raises:
        ValueError: its calls are others, or it cannot run at this size.
    """
    nowhere = torch.device("meta")
    try:
        # In the type that products of experts take there; shapes are the same in another.
        found, calls = _counted(model, p, nowhere, torch.bfloat16)
        if calls is None:  # its forward reads values: it is run with few, on a CPU
            few = replace(p, batch=1, seq_len=min(p.seq_len, FEW_TOKENS))
            calls = _counted(model.shortened(1), few, torch.device("cpu"), torch.float32)[1]
            calls *= model.layers
    except ValueError as error:
        raise ValueError(" ".join(str(error).split())[:300]) from None
    except AUTHOR_ERRORS as error:
        if isinstance(error, KeyError) and PREFIX in str(error):
            raise ValueError("it takes no attention but its own") from None
        told = one_line(error)
        raise ValueError(f"it does not run with its attention replaced ({told})") from None
    if calls != model.layers:
        raise ValueError(
            f"its {model.layers} layers call the attention that is to be measured {calls} times; "
            "each must call it once"
        )
    return found


def _counted(
    model: Model, p: Problem, device: torch.device, dtype: torch.dtype
) -> tuple[LanguageModel, int | None]:
    """A model, and how often a forward calls attention; None where meta tensors cannot tell.

    Raises:
        ValueError: with tensors of other shapes than the problem's.
    """
    shapes = [(p.batch, heads, p.seq_len, p.head_dim) for heads in (p.q_heads, p.kv_heads)]
    wanted, calls = [shapes[0], shapes[1], shapes[1]], 0

    def count(*tensors: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if (given := [tuple(x.shape) for x in tensors]) != wanted:
            raise ValueError(f"its attention is called with q, k, v of {given}, not of {wanted}")
        return tensors[0]

    found = build(model, count, p.seq_len, dtype, device, 0)
    _check_positions(found.body, p.seq_len)
    ids = torch.zeros(p.batch, p.seq_len, dtype=torch.long, device=device)
    try:
        with torch.no_grad():
            found.hidden(ids)
    except RuntimeError as error:
        if "meta tensors" not in str(error):
            raise
        return found, None
    return found, calls


def _check_positions(body: nn.Module, seq_len: int) -> None:
    """Raises ValueError where positions are learned or tabled, and not so many."""
    config = getattr(body, "config", None)
    most = getattr(config, "max_position_embeddings", None)
    rotary = any("Rotary" in type(module).__name__ for module in body.modules())
    if most and not rotary and seq_len > most:
        raise ValueError(f"N = {seq_len} is given; it has positions for {most} tokens alone")
