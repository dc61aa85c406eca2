"""Methods as the command line names them."""

import pytest

from bench.failures import one_line
from bench.specs import parameters_text, parse_method, source_file
from methods import METHODS

MINE = """
from dataclasses import dataclass
from typing import ClassVar
from methods import Method

@dataclass(frozen=True)
class Every(Method):
    name: ClassVar[str] = "every"
    paper: ClassVar[str] = "none"
    step: int = 2

    def mask_mod(self, p, device, state=None):
        return lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & ((q_idx - kv_idx) % self.step == 0)

METHOD = Every()
NOT_A_METHOD = 3
"""


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


def test_a_preset_and_its_parameters():
    assert parse_method("standard") is METHODS["standard"]
    method = parse_method("sliding_window:window=64")
    assert method.window == 64
    assert parameters_text(method) == "window=64"
    assert parameters_text(METHODS["spattention"]) is None
    assert parse_method(f"sliding_window:{parameters_text(method)}") == method


def test_a_method_in_a_file_of_its_own(mine):
    method = parse_method(f"{mine}:METHOD:step=3")
    assert (method.name, method.step) == ("every", 3)
    assert source_file(f"{mine}:METHOD:step=3") == mine
    assert source_file("standard") is None


def test_an_error_of_an_author_says_where_it_is(mine):
    bad = parse_method(f"{mine}:METHOD:step=0")
    mask = bad.mask_mod(None, None)
    (at,) = (n for n, line in enumerate(MINE.splitlines(), 1) if "return lambda" in line)
    with pytest.raises(ZeroDivisionError) as caught:
        mask(0, 0, 4, 2)
    assert one_line(caught.value).endswith(f"(mine.py, line {at})")
    with pytest.raises(ValueError) as caught:
        METHODS["sliding_window"].__class__(window=0)
    assert "line" not in one_line(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("spatention", "did you mean spattention"),
        ("qqq", "known: standard"),
        ("sliding_window:w=3", "no parameter 'w'; it has window"),
        ("spattention:window=3", "no parameter 'window'; it has none"),
        ("sliding_window:window", "name=value"),
        ("sliding_window:window=import os", "name=value"),
        ("sliding_window:window=0", "must be a whole number above 0"),
        ("sliding_window:window=1.5", "must be a whole number above 0"),
        ("sliding_window:**{{}}", "name=value"),
        ("nowhere.py:METHOD", "does not exist"),
        ("{mine}:METHODS", "has no Method named 'METHODS'; it has METHOD"),
        ("{mine}:NOT_A_METHOD", "has no Method named 'NOT_A_METHOD'"),
        ("{mine}:METHOD:stride=2", "no parameter 'stride'; it has step"),
    ],
)
def test_what_is_wrong_is_one_line(mine, spec, message):
    with pytest.raises(ValueError) as caught:
        parse_method(spec.format(mine=mine))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_beside_it_takes_no_preset_s_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("longformer.py", "ours.py"):
        (tmp_path / name).touch()
    assert parse_method("longformer:window=64").window == 64
    for spec in ("ours:METHOD", "ours.py"):
        with pytest.raises(ValueError, match=r"one in a file is written FILE\.py:NAME"):
            parse_method(spec)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def (", "SyntaxError"),
        ("import no_such_module_at_all", "ModuleNotFoundError"),
        ("raise SystemExit(5)", "SystemExit: 5"),
        (MINE.replace('"every"', '"standard"'), "is a preset's name"),
        (MINE.replace("@dataclass(frozen=True)", ""), "frozen dataclass"),
        (
            MINE.replace("METHOD = Every()", "METHOD = Every"),
            r"METHOD in .* is a class, and has to be one of its instances: METHOD = Every\(\)",
        ),
        (MINE.replace("def mask_mod", "def mask"), "METHOD in .* defines no mask_mod, which says"),
    ],
)
def test_a_file_that_defines_no_usable_method(mine, source, message):
    mine.write_text(source)
    with pytest.raises(ValueError, match=message):
        parse_method(f"{mine}:METHOD")
