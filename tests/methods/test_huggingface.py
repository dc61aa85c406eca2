"""Every method inside models of transformers: against dense attention, padded, cached."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AttentionInterface, AutoModelForCausalLM, MistralConfig

from methods import METHODS, Banded, Method
from methods.huggingface import register
from tests.methods.models import KINDS, VOCAB, register_dense, run, small_model, token_ids

# Parts of these models compute in float32 whatever their dtype (normalisation, routing).
CLOSE = {"atol": 1e-6, "rtol": 1e-6}
# Enough tokens for every preset's parameters, and more than one window.
TOKENS = 530
SPATTENTION = METHODS["spattention"]
# One that makes its state from queries and keys needs a model that shares them.
NAMES = [name for name, method in METHODS.items() if type(method).prepare is Method.prepare]


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
    model, ids = double("llama", "sliding_window").eval(), token_ids(2, 20)
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    whole = model.generate(ids, use_cache=False, **given)
    assert model.generate(ids, cache_implementation="static", **given).equal(whole)


def test_the_scale_of_the_model_is_honoured():
    models = [double("llama", x) for x in ("spattention", register_dense("dense", SPATTENTION))]
    for model in models:
        for layer in model.model.layers:
            layer.self_attn.scaling = 0.7
    assert_same(*models, token_ids(1, 100))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    register({"spattention": SPATTENTION}, backend="blockwise")
    model, ids = double("llama", "spattention").train(), token_ids(2, 100)
    padding = torch.ones_like(ids)
    padding[0, 60:] = 0
    _, expected = run(model, ids, attention_mask=padding)
    expected = {name: grad.clone() for name, grad in expected.items()}
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    _, found = run(model, ids, attention_mask=padding)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


# Said by torch at every break between graphs that a tensor with a gradient crosses.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("padded", [False, True])
def test_a_compiled_model_trains_as_the_model(padded):
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


class Lsh(Banded):
    """Stands in for a method whose keys must be its queries."""

    name, paper = "reformer", "none"

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
    with pytest.raises(ValueError, match=r"^shared: neither padding nor a fixed seq_len"):
        model(ids, share_qk=True, attention_mask=torch.arange(30)[None] < 20)


def forward(model, tokens=64, **kwargs):
    return model(token_ids(1, tokens), **kwargs)


def narrow(model):
    """As where a layer keeps half of its heads."""
    attention = model.model.layers[1].self_attn
    attention.q_proj = torch.nn.Linear(64, 32).double()
    attention.k_proj = attention.v_proj = torch.nn.Linear(64, 16).double()
    attention.o_proj = torch.nn.Linear(32, 64).double()
    return model


def pinned(model):
    register({"spattention": SPATTENTION}, seq_len=64)
    return model


HOLES = torch.arange(64)[None] % 7 > 0
REFUSED = {
    "a cache": (
        lambda m: m.generate(
            token_ids(1, 64), attention_mask=torch.ones(1, 64), max_new_tokens=2, use_cache=True
        ),
        "mask depends on the number of tokens, so keys cannot be cached; use_cache=False",
    ),
    "a float mask": (
        lambda m: forward(m, attention_mask=torch.zeros(1, 1, 64, 64)),
        "attention_mask is torch.float32 [1, 1, 64, 64]; only padding masks",
    ),
    "fewer heads": (lambda m: forward(narrow(m)), "a layer has 2 heads where the config says 4"),
    "too long": (lambda m: forward(pinned(m), 65), "65 tokens; it was registered for 64"),
    "holes": (lambda m: forward(m, attention_mask=HOLES), "has padding between tokens"),
    "packed": (
        lambda m: forward(m, position_ids=torch.arange(64)[None] % 32),
        "asks for a mask of its own (packed sequences",
    ),
    "global tokens": (
        lambda m: forward(m, global_tokens=HOLES),
        "spattention has no global tokens to be given; longformer has",
    ),
    "a cap": (lambda m: forward(m, softcap=30.0), "the model changes scores by softcap"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_honoured_is_refused_in_one_line(case):
    act, message = REFUSED[case]
    with pytest.raises(ValueError) as caught:
        act(double("llama", "spattention").eval())
    assert str(caught.value).startswith("spattention")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_dropout_is_refused_in_training_alone():
    model = small_model("gpt_neox", "spattention", attention_dropout=0.1)
    with pytest.raises(ValueError, match=r"^spattention: attention dropout is 0\.1; only 0 is"):
        forward(model.train())
    assert forward(model.eval()).logits.isfinite().all()


def test_a_window_of_the_models_own_is_honoured_where_it_cuts_nothing_off():
    model = mistral(window=80)
    assert forward(model, 80).logits.isfinite().all()
    with pytest.raises(ValueError, match="a window shorter than the sequence"):
        forward(model, 82)


def mistral(window):
    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=window, use_cache=False,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="spattention")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"my_flex_attention": SPATTENTION},), "'my_flex_attention' cannot be registered"),
        (({"mine": "spatention"},), "did you mean spattention"),
    ],
)
def test_bad_registrations(arguments, message):
    with pytest.raises(ValueError, match=message):
        register(*arguments)
    assert "mine" not in AttentionInterface._global_mapping


def test_a_length_that_is_none():
    with pytest.raises(ValueError, match=r"^seq_len is 0; it must be a whole number"):
        register(seq_len=0)
