"""Patterns drawn for a longer sequence, and padded samples: masks, block lists, attention."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from methods import METHODS, Problem, attend
from methods.bigbird import BigBird
from methods.longformer import GlobalTokens, Longformer
from methods.pinned import Pinned, Spans
from tests.methods.dense import CPU, assert_lists_equal, both_masks, dense_mask, listed

# As the presets, with figures that bite within few tokens.
SMALL = {
    **{name: x for name, x in METHODS.items() if x.static},
    "sliding_window": replace(METHODS["sliding_window"], window=40),
    "longformer": Longformer(window=24, n_global=3),
    "longformer_dilated": Longformer(window=12, n_global=3, dilation=(1, 2, 1)),
    "bigbird": BigBird(block=8, n_random=2),
    "bigbird_counted": BigBird(block=8, n_random=2, multiplicity=True, last_row_dense=True),
}
START, LENGTH = (0, 37, 5, 0), (90, 53, 71, 0)


def spans(inner=None):
    return Spans(torch.tensor(START).int(), torch.tensor(LENGTH).int(), inner)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", SMALL)
def test_a_method_says_whether_its_mask_grows(name, causal):
    """It does iff every shorter mask is a corner of the longer one."""
    if name.startswith("mehc_") and not causal:
        return
    lengths, p = (60, 90, 200, 700), Problem(q_heads=3, causal=causal)
    masks = [dense_mask(SMALL[name], replace(p, seq_len=n)) for n in lengths]
    corners = [
        torch.equal(short, masks[-1][..., :n, :n]) for short, n in zip(masks, lengths, strict=True)
    ]
    assert SMALL[name].grows(causal) == all(corners)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", SMALL)
def test_a_padded_sample_sees_its_own_part_of_the_pattern(name, causal):
    if name.startswith("mehc_") and not causal:
        return
    p = Problem(batch=4, q_heads=3, seq_len=90, causal=causal)
    method = Pinned(SMALL[name], 200)
    whole = dense_mask(SMALL[name], replace(p, batch=1, seq_len=200))[0]
    expected = torch.zeros(4, 3, 90, 90, dtype=torch.bool)
    for b, (start, length) in enumerate(zip(START, LENGTH, strict=True)):
        end = start + length
        expected[b, :, start:end, start:end] = whole[:, :length, :length]
    assert dense_mask(method, p, spans()).equal(expected)
    assert dense_mask(method, replace(p, batch=1))[0].equal(whole[:, :90, :90])


@pytest.mark.parametrize("block_size", [(16, 16), (32, 16), (16, 128)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", SMALL)
def test_block_lists(name, causal, block_size):
    """Those of every single pair; where the inner method's are not, at least as safe."""
    if name.startswith("mehc_") and not causal:
        return
    p = Problem(batch=4, q_heads=3, seq_len=90, causal=causal)
    for method in (Pinned(SMALL[name], 200), Pinned(SMALL[name])):
        assert_lists_equal(method, p, block_size, spans())
    assert_lists_equal(Pinned(SMALL[name], 200), replace(p, batch=1), block_size)


def test_global_tokens_of_a_padded_sample_are_in_its_own_positions():
    p = Problem(batch=4, q_heads=3, seq_len=90)
    tokens = torch.rand(4, 200, generator=torch.Generator().manual_seed(1)) < 0.1
    method, state = Pinned(SMALL["longformer"], 200), spans(GlobalTokens(tokens))
    whole = dense_mask(SMALL["longformer"], replace(p, seq_len=200), GlobalTokens(tokens))
    mask = dense_mask(method, p, state)
    for b, (start, length) in enumerate(zip(START, LENGTH, strict=True)):
        end = start + length
        assert mask[b, :, start:end, start:end].equal(whole[b, :, :length, :length])
    mine, reference = both_masks(method, p, (16, 16), state)
    for kind in ("kv", "full_kv", "q", "full_q"):
        assert listed(mine, kind, p).equal(listed(reference, kind, p)), kind


def test_a_counted_bias_moves_with_the_sample():
    p, whole_p = Problem(batch=4, q_heads=3, seq_len=90), Problem(q_heads=3, seq_len=200)
    method = Pinned(SMALL["bigbird_counted"], 200)
    blocks = torch.randint(0, 5, (3, 25, 2), generator=torch.Generator().manual_seed(0))
    drawn = method.inner.drawn_blocks(blocks, whole_p)
    index = torch.arange(37, 90).expand(3, -1)
    rows = method.rows(p, CPU, index, spans(drawn))[1, :, :, 37:]
    whole = method.inner.rows(whole_p, CPU, index - 37, drawn)[0, :, :, :53]
    assert rows.equal(whole)
    assert rows.max() > 0


def test_padding_gives_zero_and_gets_no_gradient():
    q, k, v = (
        torch.randn(4, 4, 90, 16, dtype=torch.float64, requires_grad=True) for _ in range(3)
    )
    out = attend(q, k, v, Pinned(METHODS["standard"]), state=spans())
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    padded = torch.ones(4, 90, dtype=torch.bool)
    for b, (start, length) in enumerate(zip(START, LENGTH, strict=True)):
        padded[b, start : start + length] = False
    for x in (out, *grads):
        assert (x.transpose(1, 2)[padded] == 0).all()
    assert (out.transpose(1, 2)[~padded] != 0).any(-1).all()


def test_layers_share_a_block_mask_only_where_all_is_the_same():
    q, state, method = torch.randn(4, 2, 90, 16).double(), spans(), Pinned(SMALL["longformer"])
    for causal in (True, False, True):
        fresh = attend(q, q, q, method, causal, state=spans())
        assert attend(q, q, q, method, causal, state=state).equal(fresh)
    assert len(state.parts) == 2


def test_paddings_share_one_compiled_kernel():
    q, k, v = (torch.randn(2, 2, 90, 16) for _ in range(3))
    method, before = Pinned(METHODS["standard"]), counters["stats"]["unique_graphs"]
    for start, length in (((0, 50), (90, 40)), ((7, 0), (20, 65))):
        state = Spans(torch.tensor(start).int(), torch.tensor(length).int())
        out = attend(q, k, v, method, state=state)
        for b in range(2):
            part = slice(start[b], start[b] + length[b])
            alone = (x[b : b + 1, :, part] for x in (q, k, v))
            expected = F.scaled_dot_product_attention(*alone, is_causal=True)
            torch.testing.assert_close(out[b : b + 1, :, part], expected, atol=5e-6, rtol=0)
            assert out[b].count_nonzero() == expected.numel()
    assert counters["stats"]["unique_graphs"] == before + 1


def test_a_sequence_beyond_the_fixed_length_is_refused_in_one_line():
    q = torch.randn(1, 2, 65, 16)
    with pytest.raises(ValueError, match=r"^spattention: 65 tokens; it was registered for 64$"):
        attend(q, q, q, Pinned(METHODS["spattention"], 64))
