"""attend: every method through its executors, and what a compiled cell costs and refuses."""

import sys
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters

from methods import METHODS, Banded, Problem, attend
from methods.attend import compiled_copy, plan
from methods.bigbird import BigBird, DrawnBlocks
from methods.longformer import GlobalTokens, Longformer
from methods.method import static_parts
from tests.methods.dense import STATIC


@dataclass(frozen=True)
class Listed(Banded):
    name: ClassVar[str] = "listed"
    widths: list

    def bands(self, p):
        return [[(0, width)] for width in self.widths]


@dataclass(frozen=True)
class Flat(Banded):
    name: ClassVar[str] = "flat"

    def bands(self, p):
        return [(0, 5)]


@dataclass(frozen=True)
class Swapped(Banded):
    name: ClassVar[str] = "swapped"
    band: tuple = ()

    def bands(self, p):
        return [[self.band]]


def dense(method, q, k, v, causal=True):
    """float64 attention under a method's mask; rows without a key are 0."""
    p = Problem(
        batch=q.shape[0], q_heads=q.shape[1], kv_heads=k.shape[1], seq_len=q.shape[2],
        head_dim=q.shape[3], causal=causal,
    )  # fmt: skip
    index = torch.arange(p.seq_len).expand(p.q_heads, -1)
    k, v = (x.double().repeat_interleave(p.group, dim=1) for x in (k, v))
    bias = METHODS[method].rows(p, q.device, index)
    scores = q.double() @ k.mT / p.head_dim**0.5 + bias.clamp(min=-1e300)
    return (scores.softmax(-1) * bias.isfinite()) @ v


def tensors(n=200, heads=4, kv_heads=4, dim=16, dtype=torch.float32, grad=False):
    generator = torch.Generator().manual_seed(n + heads + kv_heads)
    return [
        torch.randn(2, h, n, dim, generator=generator).to(dtype).requires_grad_(grad)
        for h in (heads, kv_heads, kv_heads)
    ]


@pytest.mark.parametrize("method", ["spattention", "local_only"])
def test_forward_on_a_cpu_is_compiled_flex(method):
    q, k, v = tensors()
    before = counters["stats"]["unique_graphs"]
    out = attend(q, k, v, method=method)
    assert counters["stats"]["unique_graphs"] == before + 1
    torch.testing.assert_close(out.double(), dense(method, q, k, v), atol=5e-6, rtol=0)


CASES = [(m, c) for m in STATIC for c in (True, False) if c or not m.startswith("mehc_")]


@pytest.mark.parametrize(("method", "causal"), CASES)
def test_gradients_and_float64_go_through_blockwise(method, causal):
    q, k, v = tensors(n=600, kv_heads=2, dtype=torch.float64, grad=True)
    out = attend(q, k, v, method=method, causal=causal)
    expected = dense(method, q, k, v, causal)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    cotangent = torch.randn(out.shape, dtype=out.dtype)
    for got, want in zip(
        torch.autograd.grad(out, (q, k, v), cotangent),
        torch.autograd.grad(expected, (q, k, v), cotangent),
        strict=True,
    ):
        torch.testing.assert_close(got, want, atol=1e-11, rtol=0)


def test_longformers_global_tokens_and_their_projections():
    """Rows of global tokens come from their own q, k, v and see everything, forward and back."""
    method = Longformer(window=8)
    q, k, v = tensors(n=60, dtype=torch.float64, grad=True)
    own = tensors(n=60, dtype=torch.float64, grad=True)
    chosen = torch.zeros(2, 60, dtype=torch.bool)
    chosen[0, [3, 40]] = chosen[1, 17] = True
    out = attend(q, k, v, method, causal=False, global_tokens=chosen, global_qkv=own)
    near = (torch.arange(60)[:, None] - torch.arange(60)).abs() <= 4
    seen = (near | chosen[:, None, :])[:, None]
    ordinary = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    expected = torch.where(
        chosen[:, None, :, None], F.scaled_dot_product_attention(*own), ordinary
    )
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    cotangent = torch.randn_like(out)
    for got, want in zip(
        torch.autograd.grad(out, (q, k, v, *own), cotangent),
        torch.autograd.grad(expected, (q, k, v, *own), cotangent),
        strict=True,
    ):
        torch.testing.assert_close(got, want, atol=1e-11, rtol=0)


def test_a_given_set_takes_the_place_of_the_prefix():
    """Also where there are fewer tokens than the preset has in its prefix."""
    q, k, v = tensors(n=8, dtype=torch.float64)
    none = torch.zeros(2, 8, dtype=torch.bool)
    out = attend(q, k, v, "longformer", global_tokens=none)
    expected = attend(q, k, v, Longformer(n_global=0))
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    listed = attend(q, k, v, "longformer", global_tokens=none.tolist())
    torch.testing.assert_close(listed, expected, atol=1e-12, rtol=0)


def test_a_state_goes_with_no_global_tokens():
    q, k, v = tensors(n=96)
    tokens = torch.zeros(2, 96, dtype=torch.bool)
    for given in ({"global_tokens": tokens}, {"global_qkv": (q, k, v)}):
        with pytest.raises(ValueError, match=r"^state goes with neither .*$"):
            attend(q, k, v, "longformer", state=tokens, **given)


def test_random_blocks_of_the_callers_own():
    q, k, v = tensors(n=96, dtype=torch.float64)
    method, p = BigBird(block=16, n_random=1), Problem(batch=2, q_heads=4, seq_len=96, head_dim=16)
    drawn = torch.full((4, 6, 1), -1)
    without = attend(q, k, v, method, state=method.drawn_blocks(drawn, p))
    drawn[:, 5, 0] = 2
    out = attend(q, k, v, method, state=method.drawn_blocks(drawn, p))
    torch.testing.assert_close(out[:, :, :80], without[:, :, :80], atol=1e-12, rtol=0)
    keys = torch.cat([torch.arange(16), torch.arange(32, 48), torch.arange(64, 96)])
    scores = q[:, :, 95:] @ k[:, :, keys].mT / 4
    expected = scores.softmax(-1) @ v[:, :, keys]
    torch.testing.assert_close(out[:, :, 95:], expected, atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match=r"^bigbird: the state is a Tensor; drawn_blocks makes"):
        attend(q, k, v, method, state=drawn)
    shorter = method.drawn_blocks(drawn[:, :5], replace(p, seq_len=80))
    for blocks, given in (
        (shorter.blocks, r"torch.int64 of shape \[4, 5, 1\]; .* of shape \[4, 6, any\]$"),
        (drawn + 97, "99; they must be -1 .none. to 5$"),
        (drawn > 0, "torch.bool of shape"),
        (drawn[..., 0], r"shape \[4, 6\]; "),
        (drawn.tolist(), "a list; they must be whole numbers"),
    ):
        with pytest.raises(ValueError, match=f"^bigbird: random blocks are .*{given}"):
            attend(q, k, v, method, state=DrawnBlocks(blocks))


@pytest.mark.parametrize(
    "method",
    [*METHODS.values(), Longformer(window=64, dilation=16)],
    ids=[*METHODS, "in residue order"],
)
def test_what_inference_leaves_behind_serves_training(method):
    """Tensors made in inference mode can be saved for no backward."""
    p = Problem(batch=1, q_heads=2, seq_len=1030, head_dim=16, dtype="float32")
    q, k, v = (torch.randn(1, 2, 1030, 16, requires_grad=True) for _ in range(3))
    k = q if method.shared_qk else k
    with torch.inference_mode():
        attend(q, k, v, method, backend="blockwise")
    attend(q, k, v, method, backend="blockwise").sum().backward()
    if method.static:
        mask, _ = static_parts(method, p, torch.device("cpu"), (128, 128))
        tables = [mask.kv_num_blocks, mask.kv_indices, mask.q_indices, *closed_over(mask.mask_mod)]
        assert not any(table.is_inference() for table in tables)


def closed_over(function):
    """Tensors that a mask reads, however deep."""
    for cell in function.__closure__ or ():
        held = cell.cell_contents
        for x in held if isinstance(held, (list, tuple)) else [held]:
            if isinstance(x, torch.Tensor):
                yield x
            elif hasattr(x, "__closure__"):
                yield from closed_over(x)


def test_sets_of_global_tokens_share_one_compiled_kernel():
    """More sets than one code object holds variants: the lists' shapes do not follow the data."""
    q, k, v = tensors(n=300)
    counters.clear()
    for seed in range(10):
        chosen = torch.rand(2, 300, generator=torch.Generator().manual_seed(seed)) < 0.02
        out = attend(q, k, v, Longformer(window=16), global_tokens=chosen)
        assert out.isfinite().all()
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_tensors_that_want_gradients_run_under_no_grad():
    q, k, v = tensors(grad=True)
    with torch.no_grad():
        out = attend(q, k, v, backend="eager")
    torch.testing.assert_close(out.double(), dense("spattention", q, k, v), atol=5e-6, rtol=0)


def test_more_than_eight_shapes_all_run_compiled():
    """One code object holds eight compiled shapes; each cell has its own, so twelve compile."""
    counters.clear()
    for n in range(16, 16 * 13, 16):
        x = torch.randn(2, n)
        torch.testing.assert_close(compiled_copy(_double)(x), 2 * x)
    assert counters["stats"]["unique_graphs"] == 12


def test_flex_cells_compile_past_the_limit_of_one_code_object():
    counters.clear()
    for n in range(128, 128 + 9 * 8, 8):
        p = Problem(seq_len=n, q_heads=1, head_dim=16, dtype="float32")
        q, k, v = (torch.randn(1, 1, n, 16) for _ in range(3))
        plan(METHODS["standard"], p, "flex")(q, k, v)
    assert counters["stats"]["unique_graphs"] == 9


def test_reaching_the_recompile_limit_raises():
    call = compiled_copy(_double)
    with pytest.raises(FailOnRecompileLimitHit):
        for n in range(2, 12):
            call(torch.randn(2, n))


def _double(x):
    return x + x


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "longfromer"}, "longfromer"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
        ({"q": torch.zeros(2, 4, 200, 16, dtype=torch.float64)}, "differ in dtype or device"),
        ({"k": None}, "are Tensor, NoneType, Tensor; they must be 3 (and 3) tensors"),
        ({"global_qkv": 5}, "are Tensor, Tensor, Tensor, int; they must be 3 (and 3) tensors"),
        ({"method": "longformer", "global_qkv": [torch.zeros(2, 4, 200, 16)]}, "3 (and 3)"),
        ({"method": "longformer", "global_tokens": "all"}, "global_tokens is a str; it must be"),
        ({"method": "longformer", "global_tokens": [None]}, "global_tokens is a list"),
        ({"backend": ["flex"]}, "backend is ['flex']; it must be one of auto, flex"),
        ({"method": Listed([1])}, "listed: a field cannot be hashed"),
        ({"causal": [True]}, "causal is [True]; it must be True or False"),
        ({"method": Flat()}, "flat gives bands [(0, 5)]; for each head they must be a list"),
        ({"method": Swapped((9, 5))}, "swapped gives bands [[(9, 5)]]; for each head they must"),
        ({"method": Swapped((0, 5.5))}, "whole numbers with first <= last"),
        ({"state": torch.zeros(3)}, "spattention takes no state; a Tensor was given"),
        ({"method": "longformer", "state": torch.zeros(2, 200)}, "none that globals_state makes"),
        (
            {"method": "longformer", "state": GlobalTokens(torch.zeros(2, 100).bool())},
            "global_tokens is torch.bool [2, 100]; it must be torch.bool [2, 200]",
        ),
        (
            {"method": "longformer", "state": GlobalTokens(torch.zeros(2, 200).bool(), True)},
            "none that globals_state makes",
        ),
        ({"k": torch.zeros(2, 4, 100, 16)}, "k [2, 4, 100, 16]"),
        ({"q": torch.zeros(2, 6, 200, 16)}, "q_heads 6 is not a multiple of kv_heads 4"),
        ({"q": torch.zeros(4, 200, 16)}, "attend needs q"),
        ({"global_tokens": torch.zeros(2, 200, dtype=torch.bool)}, "spattention has no global"),
    ],
)
def test_bad_input_is_one_line(change, message):
    q, k, v = tensors()
    arguments = {"q": q, "k": k, "v": v} | change
    with pytest.raises(ValueError) as caught:
        attend(**arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_was_asked_before_makes_no_other_value_true():
    q, k, v = tensors(n=16)
    attend(q, k, v, causal=True), attend(q, k, v, causal=False)
    for causal in (1, 0, 1.0):
        with pytest.raises(ValueError, match=rf"^causal is {causal}; it must be True or False$"):
            attend(q, k, v, causal=causal)


@pytest.mark.parametrize("backend", ["auto", "flex", "eager", "blockwise"])
def test_tensors_without_elements(backend):
    q, k, v = (x.to("meta") for x in tensors())
    with pytest.raises(ValueError, match=r"^q, k, v are on meta, without elements; give tensors"):
        attend(q, k, v, backend=backend)


def test_a_method_is_compiled_once_however_it_is_named():
    q, k, v = tensors(n=48)
    counters.clear()
    for method in ("local_only", METHODS["local_only"], replace(METHODS["local_only"])):
        attend(q, k, v, method)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", ["spattention", "reformer"])
@pytest.mark.parametrize("backend", ["flex", "blockwise"])
def test_autocast_changes_nothing(name, backend):
    """It would hash in 16 bits, and choose the output's type by the kernel."""
    if (name, backend) == ("reformer", "flex"):
        backend = "auto"
    x, v = torch.randn(2, 1, 2, 512, 64)
    expected = attend(x, x, v, name, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(x, x, v, name, backend=backend)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_a_model_that_is_compiled_leaves_attention_to_itself():
    """Without a word; a compiler that took it in would compile it for any length, and fails."""
    method = METHODS["reformer"].__class__(chunk=32, n_rounds=1)
    compiled = torch.compile(lambda x, v: 2 * attend(x, x, v, method))
    for n in (256, 300, 320):
        x, v = torch.randn(2, 1, 2, n, 64)
        assert torch.equal(compiled(x, v), 2 * attend(x, x, v, method))


def test_no_backward_of_flex_on_a_cpu_is_said():
    q, k, v = tensors(grad=True)
    with pytest.raises(ValueError, match="no backward on a CPU"):
        attend(q, k, v, backend="flex")


@pytest.mark.parametrize("block_size", [(128, 128), (64, 64), (16, 16), (64, 128), (256, 32)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_tiles_divide_blocks_and_one_another(block_size, dtype, monkeypatch):
    module = sys.modules["methods.attend"]
    monkeypatch.setattr(module, "_three_tf32", lambda: True)
    tiles = module._tiles(Problem(seq_len=1024, head_dim=64, dtype=dtype), block_size) or {}
    rows, keys = block_size
    for whole, parts in (
        (rows, ("fwd_BLOCK_M", "bwd_BLOCK_M1", "bwd_BLOCK_M2")),
        (keys, ("fwd_BLOCK_N", "bwd_BLOCK_N1", "bwd_BLOCK_N2")),
    ):
        assert all(whole % tiles.get(part, 1) == 0 for part in parts)
    assert tiles.get("bwd_BLOCK_N1", 1) % tiles.get("bwd_BLOCK_M1", 1) == 0
    assert tiles.get("bwd_BLOCK_M2", 1) % tiles.get("bwd_BLOCK_N2", 1) == 0
    assert (tiles == {}) == (dtype == "bfloat16" and block_size == (128, 128))
    short = module._tiles(Problem(seq_len=100, head_dim=64, dtype="float32"), (128, 128))
    assert not any(name.startswith("fwd_") for name in short)


@pytest.mark.parametrize("head_dim", [129, 160, 192, 255])
@pytest.mark.parametrize("three_tf32", [True, False])
def test_tiles_of_wide_heads_fit_in_float32(head_dim, three_tf32, monkeypatch):
    module = sys.modules["methods.attend"]
    monkeypatch.setattr(module, "_three_tf32", lambda: three_tf32)
    tiles = module._tiles(Problem(seq_len=1024, head_dim=head_dim, dtype="float32"), (128, 128))
    rows = tiles["fwd_BLOCK_M"] + 2 * tiles["fwd_num_stages"] * tiles["fwd_BLOCK_N"]
    assert rows * 256 * 4 <= 163 << 10  # what a block may use of an A100, and of no other less
    whole = module._tiles(Problem(seq_len=1024, head_dim=256, dtype="float32"), (128, 128))
    assert whole is None  # torch has tiles for it
