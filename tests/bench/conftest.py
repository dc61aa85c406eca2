"""Fixtures of more than one file."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bench import steps
from bench.record import Store


@pytest.fixture
def short_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's attention call is timed once, however short it is."""
    monkeypatch.setattr(steps, "CALL_SECONDS", 0.0)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """(name, rows...) -> a results file of these."""

    def put(name, *rows):
        path = tmp_path / name
        with Store(path) as store:
            store.append(rows)
        return path

    return put
