"""The device of scripts that measure a GPU and nothing else."""

from __future__ import annotations

import argparse

import torch


def the_gpu(parser: argparse.ArgumentParser) -> torch.device:
    """The first GPU; without one the script ends, in one line and with status 2."""
    if not torch.cuda.is_available():
        parser.exit(2, "error: this measures a CUDA GPU, and there is none here\n")
    return torch.device("cuda:0")
