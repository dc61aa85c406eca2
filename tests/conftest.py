"""Tests marked `gpu` are skipped where there is no CUDA device; the others share the cores."""

import os

import pytest

MOST = 8  # processes: each takes some GB
# For torch, which no test has imported yet, and for what tests start: each would take all cores.
if count := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(count))))


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """For `-n auto`: tests that share a GPU would take its memory and time from one another."""
    return 0 if _has_gpu() else min(os.cpu_count() or 1, MOST)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if _has_gpu():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
