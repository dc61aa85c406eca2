"""Compiling a function so that it never runs uncompiled unnoticed."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# Inductor gives some buffers of 1024 elements a row and more a stride that suits the chip, and can
# then read by that stride what it wrote by another: wrong values, without a word
# (pytorch/pytorch#194281; here a softmax over rounds, N = 1100).
INDUCTOR = {"comprehensive_padding": False}
_serial = itertools.count()


def compiled_copy(function: types.FunctionType) -> Callable:
    """Compiles a function for static shapes, under a code object of its own.

    torch.compile keeps its compiled variants by code object: two wrappers of one function share
    them, and the ninth shape would run uncompiled. Reaching that limit raises, by fullgraph.
    """
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_serial)}")
    copy = types.FunctionType(code, function.__globals__, code.co_name)
    return torch.compile(copy, fullgraph=True, dynamic=False, options=INDUCTOR)


def fused(function: Callable, *given: Any) -> Any:
    """function(*given); on a GPU compiled, so that no step between is written out."""
    if not given[0].is_cuda or torch.compiler.is_compiling():
        return function(*given)
    kinds = (_kind(x) if isinstance(x, Tensor) else x for x in given)
    return _compiled(function, torch.is_grad_enabled(), tuple(kinds))(*given)


def _kind(x: Tensor) -> tuple:
    """All that torch compiles for: it does so eight times at the most for one function."""
    return x.shape, x.stride(), x.dtype, x.device, x.requires_grad


@lru_cache(maxsize=256)
def _compiled(function: types.FunctionType, grad: bool, kinds: tuple) -> Callable:
    return compiled_copy(function)
