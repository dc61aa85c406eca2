"""The README: its figures are those of the committed CSVs, and what it tells to write works."""

import re
from dataclasses import replace

import pytest
import torch

from bench.cells import Cell, Group
from bench.measure import Clockwork, Machine, measure_group
from bench.readme import PAGES, README, rendered, sections
from bench.record import ROOT, environment
from bench.specs import parse_method
from methods import Problem


def test_every_figure_is_that_of_a_committed_csv():
    texts = {path: path.read_text() for path in PAGES}
    assert rendered(PAGES) == texts
    marks = [x for text in texts.values() for x in re.findall(r"<!-- begin (.*?) -->", text)]
    assert sorted(marks) == sorted(sections())


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_picture_file_and_heading_that_a_page_names_exists(page):
    text = page.read_text()
    named = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    own = re.findall(r"`((?:bench|methods|tests)/[\w/]+\.py)`", text)
    assert len(named) >= 2
    for place in [page.parent / name for name in named] + [ROOT / name for name in own]:
        assert place.is_file(), place
    for name, heading in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", text):
        other = (page.parent / name if name else page).read_text()
        titles = [re.sub(r"[^\w -]", "", x.lower()).replace(" ", "-")
                  for x in re.findall(r"^#+ (.*)$", other, re.MULTILINE)]  # fmt: skip
        assert heading in titles, heading


def example(number, tmp_path):
    sources = re.findall(r"```python\n(from dataclasses.*?)```", README.read_text(), re.DOTALL)
    (tmp_path / "mine.py").write_text(sources[number])


def test_the_banded_example_is_a_method(tmp_path):
    example(1, tmp_path)
    method = parse_method(f"{tmp_path / 'mine.py'}:RECENT:step=2")
    p = Problem(seq_len=256, q_heads=2)
    assert method.allowed_pairs(p) == sum(
        min(i + 1, 64 + 2 * h) for h in range(2) for i in range(256)
    )


def test_the_method_of_the_example_is_measured(tmp_path):
    example(0, tmp_path)
    spec = f"{tmp_path / 'mine.py'}:METHOD:window=48"
    assert parse_method(spec).window == 48
    group = Group(
        problem=Problem(seq_len=256, q_heads=2, head_dim=16, dtype="float32"),
        block_size=(64, 64), cells=(Cell(spec, "blockwise"), Cell(spec, "flex")),
        phases=("fwd",), device="cpu", seed=0, rounds=1, seconds=0.0, run="test",
    )  # fmt: skip
    env = replace(environment(torch.device("cpu")), code="0")
    rows = measure_group(group, Machine(env), lambda cell: None, Clockwork()).rows
    pairs = sum(i - j < 48 or j % 64 == 0 for i in range(256) for j in range(i + 1))
    for cell in group.cells:
        assert rows[cell][0].status == "ok", rows[cell][0].reason
        assert rows[cell][0].allowed_pairs == 2 * pairs


def test_the_call_of_the_example_is_differentiable():
    (source,) = re.findall(r"```python\n(from torch import.*?)```", README.read_text(), re.DOTALL)
    ran = {}
    exec(source, ran)
    assert ran["out"].shape == ran["q"].shape == (1, 8, 1024, 64)
    ran["out"].sum().backward()
    assert all(ran[name].grad.isfinite().all() for name in "qkv")


def test_the_model_of_the_example_is_trained():
    (source,) = re.findall(r"```python\n(import torch.*?)```", README.read_text(), re.DOTALL)
    torch.manual_seed(0)
    ran = {}
    exec(source, ran)
    model, ids = ran["model"], ran["ids"]
    assert model.config._attn_implementation == "spattention"
    assert model(ids, labels=ids).loss < 10.3  # of 10.4 at the start
