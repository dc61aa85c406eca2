"""Sparse attention methods as FlexAttention plugins; importable without the benchmark."""

from methods.attend import attend
from methods.banded import Banded
from methods.blocks import block_mask
from methods.method import Layout, Method, Problem
from methods.presets import METHODS

__all__ = ["METHODS", "Banded", "Layout", "Method", "Problem", "attend", "block_mask"]
