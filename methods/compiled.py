"""Compiling a function so that it never runs uncompiled unnoticed."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable

import torch

_serial = itertools.count()


def compiled_copy(function: types.FunctionType) -> Callable:
    """Compiles a function for static shapes, under a code object of its own.

    torch.compile keeps its compiled variants by code object: two wrappers of one function share
    them, and the ninth shape would run uncompiled. Reaching that limit raises, by fullgraph.
    """
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_serial)}")
    copy = types.FunctionType(code, function.__globals__, code.co_name)
    return torch.compile(copy, fullgraph=True, dynamic=False)
