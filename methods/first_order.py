"""Gradients that have none themselves, and say so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def first_order(backward: Callable) -> Callable:
    """A backward of an autograd.Function without a second derivative.

    torch's own decorator lets a graph be made through the backward as long as the cotangent is a
    constant, and takes what the backward depends on for constants, too: a gradient penalty would
    be wrong in silence.

    Raises:
        RuntimeError: on its call with create_graph=True.
    """
    inner = once_differentiable(backward)

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "this attention has no second derivative: call backward without create_graph"
            )
        return inner(ctx, *grads)

    return checked
