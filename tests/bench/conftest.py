"""Fixtures of more than one file."""

import pytest

from bench import steps


@pytest.fixture
def short_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's attention call is timed once, however short it is."""
    monkeypatch.setattr(steps, "CALL_SECONDS", 0.0)
