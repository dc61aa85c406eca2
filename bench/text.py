"""A text to train on: its bytes are the tokens, and its name and content what rows call it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

BYTES = 256  # tokens


def text_name(path: Path) -> str:
    """NAME@HASH, so that a text of the same name is another where its content is.

    Raises:
        OSError: it cannot be read.
    """
    return f"{path.name}@{digest(path)}"


def digest(path: Path) -> str:
    """The start of the hash of what a file holds.

    Raises:
        OSError: it cannot be read.
    """
    return hashlib.sha256(path.read_bytes()).hexdigest()[:8]


def read_text(path: Path, seq_len: int, vocabulary: int) -> Tensor:
    """The bytes of a file, uint8; each is a token.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too short, or the model has too few tokens.
    """
    content = path.read_bytes()
    if len(content) <= seq_len:
        raise ValueError(
            f"--text {path} has {len(content)} bytes; N = {seq_len} needs at least {seq_len + 1}"
        )
    if vocabulary < BYTES:
        raise ValueError(f"--text needs {BYTES} tokens, one a byte; the model has {vocabulary}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
