"""What models of transformers ask that a method cannot honour, refused in one line."""

import contextlib
from dataclasses import replace

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    MistralConfig,
    MptConfig,
    MptForCausalLM,
)

from methods import METHODS, huggingface
from methods.huggingface import register
from methods.pinned import Spans
from methods.reformer import Reformer
from tests.methods.models import VOCAB, small_model, token_ids
from tests.methods.test_huggingface import SPATTENTION, double


@pytest.fixture(autouse=True)
def presets():
    register()


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


def longformer(model):
    register({"spattention": METHODS["longformer"]})
    return model


def shared():
    """generate passes no share_qk on to a forward that does not name it."""
    register({"spattention": Reformer(chunk=16, n_rounds=1)})
    model = double("gpt_neox", "spattention").eval()
    plain = model.forward
    model.forward = lambda *given, **named: plain(*given, share_qk=True, **named)
    return model


def windows(model):
    register({"spattention": METHODS["sliding_window"]}, backend="varlen")
    return model


HOLES = torch.arange(64)[None] % 7 > 0
REFUSED = {
    "a cache": (
        lambda m: m.generate(
            token_ids(1, 64), attention_mask=torch.ones(1, 64), max_new_tokens=2, use_cache=True
        ),
        "so keys cannot be cached; fix it by register(seq_len=...), or use_cache=False",
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
    "a state": (
        lambda m: forward(m, attention_state=HOLES),
        "spattention has no attention_state to be given; bigbird and reformer have",
    ),
    "packed by lengths": (
        lambda m: forward(m, cu_seq_lens_q=torch.tensor([0, 32, 64])),
        "the model asks for cu_seq_lens_q",
    ),
    "keys of the model's choice": (
        lambda m: forward(m, block_indices=torch.zeros(1, 64, 2)),
        "the model asks for block_indices",
    ),
    "shared keys from a cache": (
        lambda _: shared().generate(token_ids(1, 64), max_new_tokens=3, use_cache=True),
        "share_qk takes no cached keys; use_cache=False",
    ),
    "varlen with padding": (
        lambda m: forward(windows(m), attention_mask=torch.arange(64)[None] < 50),
        "backend 'varlen' takes no padding, no seq_len and no global_tokens",
    ),
    "padding": (
        lambda m: forward(m, attention_mask=torch.arange(64)[None] < 50),
        "mask depends on the number of tokens, so padding would change it; fix it by register(",
    ),
    "a mask of another batch": (
        lambda m: forward(m, attention_mask=torch.ones(3, 64)),
        "attention_mask is [3, 64]; it must be [1, tokens]",
    ),
    "a mask of more tokens": (
        lambda m: forward(m, attention_mask=torch.arange(70)[None] > 5),
        "attention_mask is for 70 tokens; there are 64",
    ),
    "a mask of fewer tokens": (
        lambda m: forward(m, attention_mask=torch.ones(1, 50)),
        "attention_mask is for 50 tokens; there are 64",
    ),
    "half a wish": (
        lambda m: forward(m, share_qk="no"),
        "share_qk is 'no'; it must be True or False",
    ),
    "a sink": (
        lambda m: forward(m, s_aux=torch.ones(4)),
        "the model asks for s_aux, which is not",
    ),
    "a bias": (
        lambda m: forward(m, position_bias=torch.ones(4)),
        "the model asks for position_bias",
    ),
    "past the fixed length": (
        lambda m: pinned(m).generate(
            token_ids(1, 62), attention_mask=torch.ones(1, 62), max_new_tokens=5, use_cache=True
        ),
        "65 tokens; it was registered for 64",
    ),
    "a list of global tokens": (
        lambda m: longformer(m)(token_ids(1, 64), global_tokens=[True] * 64),
        "global_tokens is a list; it must be a bool tensor",
    ),
    "the argument of another": (
        lambda m: forward(m, global_attention_mask=HOLES),
        "global_attention_mask is not read; give global_tokens",
    ),
    "weights": (
        lambda m: forward(m, output_attentions=True),
        "attention weights are never made; output_attentions must be False",
    ),
    "a cap": (lambda m: forward(m, softcap=30.0), "the model asks for softcap"),
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


def test_a_mask_with_gaps_is_refused():
    """One that keeps the first token, and that after the query, as plain causality does."""
    mask = huggingface.Interface("spattention", SPATTENTION, None, "auto").mask
    for gap in (1, 4, 32):
        with pytest.raises(ValueError, match="asks for a mask of its own"):
            mask(1, 64, 64, mask_function=lambda b, h, q, k, gap=gap: (k <= q) & (q - k != gap))
        with pytest.raises(ValueError, match="asks for a mask of its own"):
            mask(1, 64, 64, mask_function=lambda b, h, q, k, gap=gap: (k <= q) | (k - q == gap))
        with pytest.raises(ValueError, match="asks for a mask of its own"):
            mask(1, 64, 64, mask_function=lambda b, h, q, k, gap=gap: k - q != gap)
    assert mask(1, 64, 64, mask_function=lambda b, h, q, k: k <= q).causal
    assert not mask(1, 64, 64, mask_function=lambda b, h, q, k: (q >= 0) & (k >= 0)).causal
    for given in {"use_vmap": True}, {"kv_offset": 1}:
        with pytest.raises(ValueError, match="asks for a mask of its own"):
            mask(1, 64, 64, **given)


def test_presets_are_registered_where_they_can_be_drawn():
    assert register(seq_len=100) == [x for x in METHODS if x not in ("reformer", "bigbird")]
    assert register(seq_len=512) == [name for name in METHODS if name != "reformer"]


def test_a_model_that_adds_its_mask_itself_is_told_so():
    config = MptConfig(d_model=32, n_heads=2, n_layers=1, vocab_size=50)
    model = MptForCausalLM(config)
    model.config._attn_implementation = "spattention"
    with pytest.raises(AttributeError, match=r"^the model asks its mask for '\w+', but these"):
        model(token_ids(1, 30) % 50)


def test_a_bidirectional_bigbird_does_not_grow_with_its_padding():
    """Its last block is global: a padded sample's would be another one."""
    call = huggingface.Call(causal=False, offset=0, spans=Spans(*torch.tensor([[0], [40]])))
    for causal in (True, False):
        method = huggingface.Interface("bigbird", METHODS["bigbird"], None, "auto")
        refused = contextlib.nullcontext() if causal else pytest.raises(ValueError, match="fix it")
        with refused:
            method._placed(replace(call, causal=causal), torch.zeros(1, 4, 64, 16), None, None)


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
        (({"mine": 3},), "method is 3; it must be a Method or the name of a preset"),
        ((["mine"],), r"methods is \['mine'\]; it must be a mapping of names to methods"),
        (({3: SPATTENTION},), "it must be a mapping of names to methods"),
    ],
)
def test_bad_registrations(arguments, message):
    with pytest.raises(ValueError, match=message):
        register(*arguments)
    assert "mine" not in AttentionInterface._global_mapping


def test_a_length_that_is_none():
    with pytest.raises(ValueError, match=r"^seq_len is 0; it must be a whole number"):
        register(seq_len=0)


def test_reformer_takes_no_length():
    with pytest.raises(ValueError, match=r"^mine: reformer takes no fixed seq_len"):
        register({"mine": "reformer"}, seq_len=64)


def test_the_backend_is_the_users():
    register({"spattention": SPATTENTION}, backend="flex")
    with pytest.raises(ValueError, match=r"^backend 'flex' has no backward on a CPU; blockwise"):
        forward(small_model("llama", "spattention").train())


def test_an_unknown_backend():
    with pytest.raises(ValueError, match=r"^backend is 'cuda'; it must be one of auto, flex"):
        register(backend="cuda")


def test_cross_attention_is_refused_even_where_the_lengths_agree():
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, is_decoder=True, add_cross_attention=True, use_cache=False,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config._attn_implementation = "standard"
    model = BertLMHeadModel(config)
    with pytest.raises(ValueError, match=r"^standard: the model has cross attention"):
        model(token_ids(1, 40), encoder_hidden_states=torch.randn(1, 40, 32))
