"""Sparse attention methods as FlexAttention plugins; importable without the benchmark."""

from methods.blocks import block_mask
from methods.method import Layout, Method, Problem
from methods.sliding_window import SlidingWindow
from methods.spattention import GappedBands, LocalOnly, SPAttention, SPAttentionReleased
from methods.standard import Standard

# In the order of every table and figure.
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Standard(),
        SlidingWindow(),
        LocalOnly(),
        SPAttention(),
        SPAttentionReleased(),
        GappedBands(),
    )
}

__all__ = ["METHODS", "Layout", "Method", "Problem", "block_mask"]
