"""How much heads of a trained model differ: against its own attention, and what is kept of it."""

from dataclasses import replace

import pytest
import torch

from bench import steps
from bench.masks import mask_grid
from bench.models import build
from bench.specialisation import measure, weights_of
from bench.step_attention import step_attention
from bench.trained_heads import INITIAL, MOST_TOKENS, TRAINED, after_training, head_measures
from methods import METHODS
from tests.bench.training import CPU, GRANITE, LLAMA, TINY, job, made, some_ids, step_row


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("heads that see the same differ by what they learn " * 40)
    return path


@pytest.mark.parametrize("config", [None, LLAMA, GRANITE], ids=["plain", "grouped", "scaled"])
@pytest.mark.parametrize("name", ["spattention", "longformer"])
def test_measures_are_those_of_the_models_own_attention(config, name):
    """Of queries and keys that reach the kernel, the second layer's after the first's output."""
    model = replace(TINY, config=config, kv_heads=4 if config is None else 2)
    given, method, (ids, _) = job(name, model=model), METHODS[name], some_ids()
    p = given.group.problem
    own, seen = step_attention(method, "blockwise", p, CPU, False).call, []

    def listening(q, k, v):
        seen.append((q, k.repeat_interleave(p.group, dim=1)))
        return own(q, k, v)

    trained = build(model, listening, p.seq_len, torch.float32, CPU, 1)
    found = head_measures(trained, model, method, given.group, ids[:, : p.seq_len], TRAINED)
    seen.clear()
    with torch.no_grad():
        trained.hidden(ids[:, : p.seq_len])
    allowed = torch.from_numpy(mask_grid(method, replace(p, batch=1)))
    assert len(found) == len(seen) == model.layers
    for layer, (line, (q, k)) in enumerate(zip(found, seen, strict=True), 1):
        expected = measure(weights_of(q, k, allowed), allowed, method=name, weights=TRAINED)
        assert (line.method, line.weights, line.layer) == (name, TRAINED, layer)
        assert line.by_head == pytest.approx(expected.by_head, rel=1e-4)
        assert line.excess == pytest.approx(expected.excess, rel=1e-3, abs=1e-7)
        if name == "spattention":  # whose heads share no keys
            assert line.divergence is expected.divergence is None
        else:
            assert line.divergence == pytest.approx(expected.divergence, rel=1e-3)


def test_a_text_leaves_the_heads_of_every_layer_before_and_after(text):
    row = step_row(job("spattention", text=text, data="words", steps=6, learning_rate=0.05))
    mask, *lines = after_training([row], "rows.csv")
    layers = range(1, TINY.layers + 1)
    assert (mask.weights, mask.layer, mask.normalised) == ("uniform", None, pytest.approx(1))
    assert [(x.weights, x.layer) for x in lines] == [
        (weights, layer) for weights in (INITIAL, TRAINED) for layer in layers
    ]
    assert {(x.model, x.data, x.source, x.seed) for x in lines} == {
        ("tiny", "words", "rows.csv", 0)
    }
    before, after = lines[: TINY.layers], lines[TINY.layers :]
    assert all(a.normalised != b.normalised for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("method", ["standard", "identity"])
def test_random_tokens_and_what_is_no_attention_leave_none(method, text):
    changes = {} if method == "standard" else {"text": text, "data": "words"}
    assert step_row(job(method, method.replace("standard", "blockwise"), **changes)).heads is None


def test_lengths_whose_weights_have_no_room_leave_none(text, monkeypatch):
    assert MOST_TOKENS >= 1024
    monkeypatch.setattr(steps, "MOST_TOKENS", 63)
    row = step_row(job(text=text, data="words"))
    assert (row.status, row.heads) == ("ok", None)


@pytest.mark.parametrize("moment", [INITIAL, TRAINED])
def test_a_step_is_not_lost_for_its_heads(moment, text, monkeypatch):
    def fails(trained, model, method, group, ids, weights):
        if weights == moment:
            raise RuntimeError("no room")
        return head_measures(trained, model, method, group, ids, weights)

    monkeypatch.setattr(steps, "head_measures", fails)
    row = step_row(job(text=text, data="words"))
    assert (row.status, row.heads) == ("ok", None)
    assert row.median_us > 0 and "heads not measured: RuntimeError: no room" in row.reason


def test_of_a_cell_that_trained_twice_the_last_counts(text):
    first = step_row(job(text=text, data="words"))
    again = replace(first, heads=first.heads.replace(f'"{TRAINED}"', '"again"'))
    assert {x.weights for x in after_training([first, again], "x")} == {
        "uniform",
        INITIAL,
        "again",
    }
    assert after_training([replace(first, heads=None), made()], "x") == []


@pytest.mark.parametrize("heads", ["[", "[1]", '[{"weights": "trained"}]', "7"])
def test_damaged_heads_are_named_by_their_file(heads):
    row = made(heads=heads, recipe="steps=3")
    with pytest.raises(ValueError, match=r"rows\.csv: the heads of a row of standard are damaged"):
        after_training([row], "rows.csv")
