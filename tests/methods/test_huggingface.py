"""Every method inside models of transformers: against dense attention, padded, cached."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import (
    AttentionInterface,
    AutoModel,
    StaticCache,
    ViTConfig,
)

from methods import METHODS, Banded, Problem, pinned
from methods.bigbird import BigBird, draw_blocks
from methods.huggingface import register
from methods.reformer import Reformer
from tests.methods.models import (
    KINDS,
    register_dense,
    register_dense_shared,
    run,
    small_model,
    token_ids,
)

# Parts of these models compute in float32 whatever their dtype (normalisation, routing).
CLOSE = {"atol": 1e-6, "rtol": 1e-6}
# Enough tokens for every preset's parameters, and more than one window.
TOKENS = 530
SPATTENTION = METHODS["spattention"]
# One that makes its state from queries and keys needs a model that shares them.
NAMES = [name for name, method in METHODS.items() if method.static]


@pytest.fixture(autouse=True)
def presets():
    register()


def assert_same(model, reference, ids, **kwargs):
    logits, grads = run(model, ids, **kwargs)
    expected, expected_grads = run(reference, ids, **kwargs)
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert len(grads) > 10
    for name, grad in expected_grads.items():
        scale = grad.abs().max().clamp(min=1e-30)
        torch.testing.assert_close(grads[name] / scale, grad / scale, **CLOSE, msg=name)


def double(kind, attention, **changes):
    return small_model(kind, attention, **changes).double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_gradients_are_those_of_dense_attention_under_the_mask(name, kind):
    reference = double(kind, register_dense(f"dense_{name}", METHODS[name]))
    assert_same(double(kind, name), reference, token_ids(1, TOKENS))


@pytest.mark.parametrize("kind", KINDS)
def test_standard_is_sdpa(kind):
    ids = token_ids(2, 100)
    assert_same(double(kind, "standard"), double(kind, "sdpa"), ids)
    padding = torch.ones_like(ids)
    padding[0, 70:] = padding[1, 80:] = 0
    labels = ids.masked_fill(padding == 0, -100)
    grads = []
    for attention in ("standard", "sdpa"):
        model = double(kind, attention)
        model(ids, attention_mask=padding, labels=labels).loss.backward()
        grads.append([x.grad for x in model.parameters()])
    torch.testing.assert_close(*grads, **CLOSE)


def test_the_implementation_can_be_changed_and_the_kernel_is_compiled():
    """float32 without gradients is compiled flex; N is no multiple of any block."""
    model, ids = small_model("llama", "sdpa").eval(), token_ids(2, 101)
    model.set_attn_implementation("spattention")
    reference = small_model("llama", register_dense("dense", METHODS["spattention"])).eval()
    compiled = torch.compile(model, backend="aot_eager")
    before = counters["stats"]["unique_graphs"]
    with torch.no_grad():
        expected = reference(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, atol=5e-6, rtol=0)
        assert counters["stats"]["unique_graphs"] == before + 1
        torch.testing.assert_close(compiled(ids).logits, expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_padded_is_unpadded(name, side):
    """With N fixed each sample is what it is alone; gradients of the real tokens too."""
    register({name: METHODS[name]}, seq_len=TOKENS)
    model, lengths = double("llama", name), (150, 90)
    ids, padding = torch.zeros(2, 150, dtype=torch.long), torch.zeros(2, 150, dtype=torch.long)
    places = [slice(0, n) if side == "right" else slice(150 - n, 150) for n in lengths]
    samples = [token_ids(1, n) for n in lengths]
    for b, (place, sample) in enumerate(zip(places, samples, strict=True)):
        ids[b, place], padding[b, place] = sample, 1
    positions = (padding.cumsum(1) - 1).clamp(min=0)
    together = model(ids, attention_mask=padding, position_ids=positions).logits
    assert together.isfinite().all()
    alone = [model(sample).logits[0] for sample in samples]
    found = [together[b, place] for b, place in enumerate(places)]
    for padded, unpadded in zip(found, alone, strict=True):
        torch.testing.assert_close(padded, unpadded, **CLOSE)
    weights = list(model.parameters())
    padded, unpadded = (
        torch.autograd.grad(sum(x.square().sum() for x in logits), weights)
        for logits in (found, alone)
    )
    for a, b in zip(padded, unpadded, strict=True):
        torch.testing.assert_close(a / b.abs().max(), b / b.abs().max(), **CLOSE)


def test_a_mask_that_grows_needs_no_fixed_length_to_be_padded():
    model, ids = double("gpt_neox", "sliding_window"), token_ids(1, TOKENS)
    alone = model(ids).logits
    padded, padding = torch.cat((ids, ids[:, :50]), 1), torch.ones(1, TOKENS + 50)
    padding[:, TOKENS:] = 0
    found = model(padded, attention_mask=padding).logits
    torch.testing.assert_close(found[:, :TOKENS], alone, **CLOSE)


@pytest.mark.parametrize(
    ("name", "seq_len"),
    [("standard", None), ("sliding_window", None), ("longformer", None), ("bigbird", None)]
    + [(name, TOKENS) for name in NAMES],
)
def test_generation_with_cached_keys_is_generation_without(name, seq_len):
    tokens = 20 if seq_len else 400
    register({name: METHODS[name]}, seq_len=seq_len)
    model, ids = double("llama", name).eval(), token_ids(2, tokens)
    padding = torch.ones_like(ids)
    padding[1, :7] = 0
    given = {"attention_mask": padding, "max_new_tokens": 4, "do_sample": False}
    given |= {"output_logits": True, "return_dict_in_generate": True}
    whole = model.generate(ids, use_cache=False, **given)
    cached = model.generate(ids, use_cache=True, **given)
    assert cached.sequences.equal(whole.sequences)
    torch.testing.assert_close(cached.logits, whole.logits, **CLOSE)


def test_a_cache_of_fixed_size():
    """The model takes one; `generate`, which makes the mask itself, is refused it in words."""
    model, ids = double("llama", "sliding_window").eval(), token_ids(2, 20)
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        expected = model(ids).logits
        first = model(ids[:, :15], past_key_values=cache, use_cache=True).logits
        rest = model(ids[:, 15:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(torch.cat((first, rest), 1), expected, **CLOSE)
    with pytest.raises(ValueError, match="takes no cache of a fixed size; leave cache_implement"):
        model.generate(ids, cache_implementation="static", use_cache=True, max_new_tokens=4)


def test_the_scale_of_the_model_is_honoured():
    models = [double("llama", x) for x in ("spattention", register_dense("dense", SPATTENTION))]
    for model in models:
        for layer in model.model.layers:
            layer.self_attn.scaling = 0.7
    assert_same(*models, token_ids(1, 100))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    register({"spattention": SPATTENTION}, seq_len=100, backend="blockwise")
    model, ids = double("llama", "spattention").train(), token_ids(2, 100)
    padding = torch.ones_like(ids)
    padding[0, 60:] = 0
    _, expected = run(model, ids, attention_mask=padding)
    expected = {name: grad.clone() for name, grad in expected.items()}
    # The older name of the same, which newer versions warn of.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    _, found = run(model, ids, attention_mask=padding)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


# Said by torch at every break between graphs that a tensor with a gradient crosses.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("padded", [False, True])
def test_a_compiled_model_trains_as_the_model(padded):
    register({"spattention": SPATTENTION}, seq_len=101)
    model, ids = small_model("llama", "spattention"), token_ids(2, 101)
    padding = torch.ones_like(ids)
    padding[1, 60:] = 0
    kwargs = {"attention_mask": padding} if padded else {}
    compiled = torch.compile(model, backend="aot_eager")
    logits, grads = run(model, ids, **kwargs)
    grads = {name: grad.clone() for name, grad in grads.items()}
    found, found_grads = run(compiled, ids, **kwargs)
    torch.testing.assert_close(found, logits)
    torch.testing.assert_close(list(found_grads.values()), list(grads.values()))


def test_autocast():
    model, ids = small_model("llama", "spattention"), token_ids(1, 100)
    reference = small_model("llama", register_dense("dense", SPATTENTION))
    expected = reference(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        found = model(ids).logits
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0)


def test_autocast_leaves_float64_alone():
    model, ids = double("llama", "spattention"), token_ids(1, 50)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.model(ids).last_hidden_state.dtype == torch.float64


def test_global_tokens_reach_longformer():
    """Given the first tokens, in padded samples, they are its prefix."""
    short = replace(METHODS["longformer"], window=16, n_global=4)
    register({"longformer": short, "window": replace(short, n_global=0)})
    model, ids = double("llama", "longformer"), token_ids(2, 100)
    padding = torch.ones_like(ids)
    padding[0, :30] = 0
    chosen = torch.zeros(2, 100, dtype=torch.bool)
    chosen[0, 30:34] = chosen[1, :4] = True
    for kwargs, given in (({"attention_mask": padding}, chosen), ({}, chosen[[1, 1]])):
        expected = model(ids, **kwargs).logits
        model.set_attn_implementation("window")
        found = model(ids, global_tokens=given, **kwargs).logits
        without = model(ids, **kwargs).logits
        model.set_attn_implementation("longformer")
        real = padding.bool() if kwargs else torch.ones_like(given)
        torch.testing.assert_close(found[real], expected[real], **CLOSE)
        assert (without - expected)[real].abs().max() > 1e-3


@pytest.mark.parametrize("seq_len", [None, 128])
def test_random_blocks_reach_bigbird(seq_len):
    """Those of another seed, given, make it the method of that seed; padded too."""
    seeds = [BigBird(block=8, n_random=2, seed=seed) for seed in (0, 5)]
    register({"bigbird": seeds[0], "other": seeds[1]}, seq_len=seq_len)
    model, ids = double("llama", "bigbird"), token_ids(2, 100)
    padding = torch.ones_like(ids)
    padding[0, :30] = 0
    p = Problem(batch=2, q_heads=4, seq_len=seq_len or 100)
    blocks = draw_blocks(4, seeds[1].n_blocks(p), 2, seeds[1].seed, True)
    state = seeds[1].drawn_blocks(blocks, p)
    for kwargs in {}, {"attention_mask": padding}:
        found = model(ids, attention_state=state, **kwargs).logits
        without = model(ids, **kwargs).logits
        model.set_attn_implementation("other")
        expected = model(ids, **kwargs).logits
        model.set_attn_implementation("bigbird")
        real = padding.bool() if kwargs else torch.ones_like(ids, dtype=torch.bool)
        torch.testing.assert_close(found[real], expected[real], **CLOSE)
        assert (without - expected)[real].abs().max() > 1e-4


def test_layers_share_the_block_mask_of_given_global_tokens(monkeypatch):
    built, build = [], pinned.block_mask
    monkeypatch.setattr(pinned, "block_mask", lambda *a, **b: built.append(a) or build(*a, **b))
    model, ids = double("llama", "longformer"), token_ids(2, 100)
    for call in range(2):
        model(ids, global_tokens=torch.arange(100).expand(2, -1) % 40 == call)
        assert len(built) == call + 1


def test_a_model_without_masks_sees_both_ways():
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=32, patch_size=4,
    )  # fmt: skip
    image, found = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)), []
    for name in ("standard", "sdpa"):
        torch.manual_seed(0)
        model = AutoModel.from_config(config, attn_implementation=name).eval()
        found.append(model(image).last_hidden_state)
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


# Said by torch at every break between graphs that a tensor with a gradient crosses.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_model_has_as_few_graphs_as_it_has_kinds_of_layers():
    made = []
    for layers in (2, 12):
        torch.compiler.reset()
        counters.clear()
        model = small_model("llama", "spattention", num_hidden_layers=layers)
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            torch.compile(model, backend="aot_eager")(token_ids(1, 50)).logits.sum().backward()
        made.append(counters["stats"]["unique_graphs"])
    assert 0 < made[0] == made[1]


def test_a_model_that_sees_both_ways():
    model = double("llama", "longformer", is_causal=False)
    ids = token_ids(1, 90)
    first = model(ids).logits[0, 0]
    padded = torch.cat((ids, ids[:, :20]), 1)
    padding = torch.ones_like(padded)
    padding[:, 90:] = 0
    found = model(padded, attention_mask=padding).logits
    torch.testing.assert_close(found[0, 0], first, **CLOSE)
    ids[0, 89] += 1
    assert (model(ids).logits[0, 0] - first).abs().max() > 1e-6


def test_training_in_six_lines():
    register()
    model = small_model("llama", "spattention")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids, losses = token_ids(2, 100), []
    for _ in range(10):
        losses.append(model(ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]


def test_registering_twice_changes_nothing_and_gives_the_names():
    known = set(AttentionInterface._global_mapping)
    assert register() == register() == list(METHODS)
    assert set(AttentionInterface._global_mapping) == known


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "method", [Reformer(chunk=16, n_rounds=2), METHODS["reformer"], METHODS["standard"]]
)
def test_shared_queries_and_keys_are_dense_attention_under_the_mask(method, kind):
    """Whatever the scale, which counts once."""
    register({"shared": method})
    names = "shared", register_dense_shared("dense", method)
    models = [double(kind, name, num_key_value_heads=4) for name in names]
    for module in models[0].modules(), models[1].modules():
        for layer in module:
            if hasattr(layer, "scaling"):
                layer.scaling = 0.7
    ids = token_ids(1, TOKENS) if method is METHODS["reformer"] else token_ids(2, 101)
    logits, grads = run(models[0], ids, share_qk=True)
    expected, expected_grads = run(models[1], ids)
    torch.testing.assert_close(logits, expected, **CLOSE)
    for name, grad in expected_grads.items():
        if grad is None:  # of keys, where their projection is a layer of its own
            assert grads[name] is None
            continue
        scale = grad.abs().max().clamp(min=1e-30)
        torch.testing.assert_close(grads[name] / scale, grad / scale, **CLOSE, msg=name)


def test_buckets_reach_reformer():
    method = Reformer(chunk=16, n_rounds=2)
    register({"reformer": method})
    names = "reformer", register_dense_shared("dense", method)
    models = [double("gpt_neox", name) for name in names]
    p = Problem(batch=2, q_heads=4, seq_len=101)
    buckets = torch.randint(8, (2, 4, 2, 101), generator=torch.Generator().manual_seed(3))
    given = {"share_qk": True, "attention_state": method.rounds(buckets, p)}
    ids = token_ids(2, 101)
    found, expected = (model(ids, **given).logits for model in models)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert (models[0](ids, share_qk=True).logits - expected).abs().max() > 1e-4


@dataclass(frozen=True)
class Lsh(Banded):
    """Stands in for a method whose keys must be its queries."""

    name, paper, shared_qk = "lsh", "none", True

    def bands(self, p):
        return [[(0, p.seq_len)]]

    def prepare(self, q, k, p):
        assert q is k


def test_shared_queries_and_keys_only_where_asked_for():
    register({"shared": Lsh()})
    model, ids = small_model("gpt_neox", "shared"), token_ids(1, 30)
    with pytest.raises(ValueError, match=r"^shared: it shares queries and keys; share_qk=True"):
        model(ids)
    assert model(ids, share_qk=True).logits.isfinite().all()
    grouped = small_model("llama", "shared")
    with pytest.raises(ValueError, match=r"^shared: share_qk needs as many key as query heads"):
        grouped(ids, share_qk=True)
    with pytest.raises(ValueError, match=r"^shared: lsh's order has no padding"):
        model(ids, share_qk=True, attention_mask=torch.arange(30)[None] < 20)
