"""Every method inside models of transformers on a CUDA device, by compiled FlexAttention."""

import pytest
import torch
from transformers import AutoModelForCausalLM, OlmoeConfig

from methods import METHODS, Problem
from methods.huggingface import register
from tests.methods.models import (
    KINDS,
    register_dense,
    register_dense_shared,
    run,
    small_model,
    token_ids,
)

pytestmark = [
    pytest.mark.gpu,
    # Said by torch at every break between graphs that a tensor with a gradient crosses.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    # Of the router's softmax in OLMoE.
    pytest.mark.filterwarnings(r"ignore:\s*Online softmax is disabled"),
]

DEVICE = torch.device("cuda:0")
TOKENS = 600


def model_of(kind, attention, **changes):
    return small_model(kind, attention, **changes).bfloat16().to(DEVICE)


def results(model, ids, **given):
    """Logits and every gradient, in float64."""
    logits, grads = run(model, ids.to(DEVICE), **given)
    found = {name: x.double() for name, x in grads.items() if x is not None}
    return {"logits": logits.double()} | found


def reference(name):
    """Dense attention, what the model needs for it, and keyword arguments.

    Of Reformer the buckets are given: a rounded query may have another one than the exact query.
    """
    method = METHODS[name]
    if not method.shared_qk:
        return register_dense(f"dense_{name}", method), {}, {}
    p = Problem(batch=1, q_heads=4, seq_len=TOKENS)
    generator = torch.Generator().manual_seed(0)
    buckets = torch.randint(16, (1, 4, method.n_rounds, TOKENS), generator=generator).to(DEVICE)
    given = {"share_qk": True, "attention_state": method.rounds(buckets, p)}
    return register_dense_shared(f"dense_{name}", method), {"num_key_value_heads": 4}, given


@pytest.mark.parametrize(
    ("kind", "compiled"),
    [(kind, False) for kind in KINDS] + [("llama", True), ("olmoe", True)],
)
@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_is_within_the_budget_of_dense_bfloat16(name, kind, compiled):
    """Frobenius errors against float64 with the same weights, tensor by tensor.

    At most twice those of dense attention in bfloat16 with float32 scores, plus one rounding to
    bfloat16 (2^-8) of the result.
    """
    register({name: METHODS[name]})
    dense, changes, given = reference(name)
    ids = token_ids(1, TOKENS)
    exact = results(model_of(kind, dense, **changes).double(), ids, **given)
    rounded = results(model_of(kind, dense, **changes), ids, **given)
    model = model_of(kind, name, **changes)
    if compiled:
        # The ninth method would find the limit of compiled variants reached.
        torch.compiler.reset()
        model.compile()
    found = results(model, ids, **given)
    # What Reformer makes no use of has no gradient; or, across a graph's break, one of zeros.
    unused = {part: x for part, x in found.items() if part not in exact}
    assert not any(x.any() for x in unused.values()), unused.keys()
    for part, truth in exact.items():
        budget = 2 * (rounded[part] - truth).norm() + 2**-8 * truth.norm()
        assert (found[part] - truth).norm() <= budget, part


@pytest.mark.parametrize("name", ["spattention", "longformer", "bigbird"])
def test_padded_is_unpadded(name):
    register({name: METHODS[name]}, seq_len=TOKENS)
    model = small_model("llama", name).to(DEVICE)
    ids, padding = token_ids(2, 300).to(DEVICE), torch.ones(2, 300, dtype=torch.long)
    padding[0, :100] = padding[1, 250:] = 0
    positions = (padding.cumsum(1) - 1).clamp(min=0).to(DEVICE)
    together = model(ids, attention_mask=padding.to(DEVICE), position_ids=positions).logits
    parts = ((0, slice(100, 300)), (1, slice(0, 250)))
    alone = [model(ids[b : b + 1, part]).logits[0] for b, part in parts]
    found = [together[b, part] for b, part in parts]
    # float32: sums of 64 products twice a layer.
    for padded, unpadded in zip(found, alone, strict=True):
        torch.testing.assert_close(padded, unpadded, atol=1e-4, rtol=1e-4)
    weights = list(model.parameters())
    grads = (
        torch.autograd.grad(sum(x.square().sum() for x in logits), weights)
        for logits in (found, alone)
    )
    for padded, unpadded in zip(*grads, strict=True):
        assert (padded - unpadded).norm() <= 1e-4 * unpadded.norm()


def test_generation_with_cached_keys_is_generation_without():
    register({"spattention": METHODS["spattention"]}, seq_len=TOKENS)
    model, ids = small_model("llama", "spattention").to(DEVICE).eval(), token_ids(2, 200)
    padding = torch.ones_like(ids)
    padding[1, :7] = 0
    given = {"attention_mask": padding.to(DEVICE), "max_new_tokens": 2, "do_sample": False}
    given |= {"output_logits": True, "return_dict_in_generate": True}
    whole = model.generate(ids.to(DEVICE), use_cache=False, **given)
    cached = model.generate(ids.to(DEVICE), use_cache=True, **given)
    torch.testing.assert_close(cached.logits, whole.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_olmoe_of_1_75_billion_parameters_takes_ten_steps(name):
    """OLMoE-0.25B-1.75B as it is: ten steps on one batch, whose loss falls."""
    register({name: METHODS[name]})
    config = OlmoeConfig(
        hidden_size=1024, intermediate_size=512, num_hidden_layers=16, num_attention_heads=16,
        num_experts=64, num_experts_per_tok=8, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with DEVICE:
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=name, dtype=torch.bfloat16
        )
        ids = torch.randint(config.vocab_size, (1, 1024))
    assert 1.7e9 < sum(x.numel() for x in model.parameters()) < 1.8e9
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    losses, given = [], {"share_qk": True} if METHODS[name].shared_qk else {}
    for _ in range(10):
        loss = model(ids, labels=ids, **given).loss
        loss.backward()
        assert all(x.grad.isfinite().all() for x in model.parameters() if x.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1, losses
