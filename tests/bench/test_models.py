"""Models that train: their sizes, their attention, compiled, sharded and by themselves."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from bench.model_check import check
from bench.models import MODELS, build, compile_model, model_of_file, parameters
from bench.step_attention import step_attention
from bench.steps import World, compile_first, run_job
from methods import METHODS, Problem, attend
from methods.huggingface import register
from methods.sliding_window import SlidingWindow
from tests.bench.training import (
    CPU,
    GRANITE,
    LLAMA,
    OLMOE,
    TINY,
    built,
    config_file,
    job,
    losses,
    some_ids,
    step_row,
)

pytestmark = pytest.mark.usefixtures("short_calls")


@pytest.fixture
def traced(monkeypatch):
    """Graphs are made as ever, but run as they are: no kernel is generated."""
    compile_once = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **kwargs: compile_once(f, backend="aot_eager", **kwargs)
    )
    torch.compiler.reset()


# Layers: 12 hidden^2 and two norms; tables; OLMoE: attention, its two norms, router, experts.
def _olmoe_parameters(hidden, expert):
    layer = 4 * hidden**2 + 2 * hidden + 2 * hidden + 64 * hidden + 64 * 3 * hidden * expert
    return 16 * layer + 2 * 50304 * hidden + hidden


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("table2", 8 * (12 * 1024**2 + 2 * 1024) + 50304 * 1024 + 1024),
        ("olmoe-0.25b-1.75b", _olmoe_parameters(1024, 512)),
        ("olmoe-1b-7b", _olmoe_parameters(2048, 1024)),
    ],
)
def test_parameters_of_the_named_models(name, expected):
    model = build(MODELS[name], None, 8, torch.bfloat16, torch.device("meta"), 0)
    assert parameters(model) == expected
    assert {x.dtype for x in model.parameters()} == {torch.bfloat16}


def test_the_arithmetic_of_a_step_counts_what_a_token_takes_part_in():
    model = build(MODELS["table2"], None, 8, torch.bfloat16, torch.device("meta"), 0)
    weights = 8 * 12 * 1024**2 + 50304 * 1024
    assert model.step_flops(MODELS["table2"], 3, 1024, 1000) == 3 * (
        6 * weights * 1024 + 8 * 12 * 128 * 1000
    )
    moe = build(MODELS["olmoe-0.25b-1.75b"], None, 8, torch.bfloat16, torch.device("meta"), 0)
    layer = 4 * 1024**2 + 64 * 1024 + 8 * 3 * 1024 * 512
    assert moe.active_weights == 16 * layer + 50304 * 1024


@pytest.mark.parametrize("told", [{}, {"num_experts_per_tok": 2}, {"num_local_experts": 8}])
def test_experts_that_a_config_leaves_to_transformers_count_as_they_are(tmp_path, told):
    mixtral = LLAMA | {"model_type": "mixtral"} | told
    model = model_of_file(config_file(tmp_path, mixtral))
    found = check(model, Problem(q_heads=4, kv_heads=2, seq_len=64, head_dim=16))
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 8 * 64 + 2 * 3 * 64 * 96
    assert found.active_weights == 2 * layer + 256 * 64


def test_a_model_whose_forward_reads_values_is_counted_by_a_layer_of_it(tmp_path):
    """As that of dynamic rotary positions does, which no meta tensor can tell."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = model_of_file(config_file(tmp_path, LLAMA | {"rope_parameters": rope}))
    p = Problem(batch=4, q_heads=4, kv_heads=2, seq_len=4096, head_dim=16)
    assert parameters(check(model, p)) == parameters(build(model, None, 8, torch.float32,
                                                           torch.device("meta"), 0))  # fmt: skip
    bloom = {"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 4,
             "vocab_size": 256}  # fmt: skip
    own = model_of_file(config_file(tmp_path, bloom))
    with pytest.raises(ValueError, match=r"2 layers call the attention .* 0 times"):
        check(own, Problem(q_heads=4, seq_len=64, head_dim=16))


def test_models_of_two_files_of_one_name_are_two(tmp_path):
    names = []
    for k, hidden in enumerate((64, 128, 64)):
        (tmp_path / str(k)).mkdir()
        path = config_file(tmp_path / str(k), LLAMA | {"hidden_size": hidden}, "table2.json")
        names.append(model_of_file(path).name)
    assert names[0] == names[2] != names[1]
    assert all(name.startswith("table2@") for name in names)


def test_a_model_is_shortened_with_what_its_config_lists_by_layer(tmp_path):
    listed = LLAMA | {"model_type": "qwen3", "head_dim": 16, "layer_types": ["full_attention"] * 2}
    model = model_of_file(config_file(tmp_path, listed)).shortened(1)
    found = build(model, None, 8, torch.bfloat16, torch.device("meta"), 0)
    assert len(found.layers) == 1


def test_a_token_reaches_later_positions_and_no_earlier_one():
    model, _ = built(TINY)
    ids, _ = some_ids()
    other = ids.clone()
    other[0, 40] = (other[0, 40] + 1) % 256
    with torch.no_grad():
        moved = (model.body(ids) - model.body(other)).abs().amax(-1)
    assert moved[0, :40].max() == 0 and moved[1].max() == 0
    assert (moved[0, 40:] > 0).all()


@pytest.mark.parametrize("config", [LLAMA, OLMOE, GRANITE], ids=["llama", "olmoe", "granite"])
@pytest.mark.parametrize("method", ["standard", "spattention"])
def test_a_model_of_transformers_is_the_one_with_a_registered_method(tmp_path, config, method):
    from transformers import AttentionInterface

    model, _ = built(model_of_file(config_file(tmp_path, config)), method)
    ids, targets = some_ids()
    with torch.no_grad():
        here = model(ids, targets)
        (name,) = register({"registered": method}, backend="blockwise")
        assert name in AttentionInterface()
        model.body.set_attn_implementation(name)
        assert here != 0
        torch.testing.assert_close(here, model(ids, targets), atol=1e-6, rtol=1e-6)


@dataclass(frozen=True)
class Unit(SlidingWindow):
    """Scores with keys of length 1."""

    name = "unit"

    def keys(self, k):
        return k / k.norm(dim=-1, keepdim=True)


def test_what_trains_is_what_the_gate_judged():
    """A kernel inside the compiled model takes its tensors, which not every layout does."""
    p = Problem(q_heads=2, seq_len=64, head_dim=16, dtype="float32")
    unit = step_attention(Unit(window=8), "flex", p, CPU, True)
    assert not unit.inlined
    assert step_attention(METHODS["sliding_window"], "flex", p, CPU, True).inlined
    q, k, v = (torch.randn(1, 2, 64, 16) for _ in range(3))
    with torch.no_grad():
        expected = attend(q, k, v, Unit(window=8), backend="blockwise")
        torch.testing.assert_close(unit.call(q, k, v), expected, atol=1e-5, rtol=1e-5)


# Said by torch where a graph takes a tensor with a gradient from outside.
NO_LEAF = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@NO_LEAF
@pytest.mark.parametrize("config", [None, OLMOE], ids=["decoder", "olmoe"])
def test_a_compiled_model_is_the_same_and_its_layers_share_a_graph(tmp_path, traced, config):
    source = config and config_file(tmp_path, config | {"num_hidden_layers": 10})
    given = model_of_file(source) if source else TINY
    model, attention = built(given, "standard", "sdpa-flash", compiled=True)
    assert attention.inlined
    ids, targets = some_ids()
    expected = model(ids, targets)
    before = counters["stats"]["unique_graphs"]
    compile_model(model, attention)
    found = model(ids, targets)
    assert counters["stats"]["unique_graphs"] - before == 2  # a layer's, and the loss
    torch.testing.assert_close(found, expected)
    found.backward()
    assert all(x.grad.isfinite().all() for x in model.parameters())


@NO_LEAF
def test_what_is_compiled_ahead_is_found_again():
    """The layer, forward and backward; the loss is compiled by whoever comes first."""
    with fresh_cache():
        compile_first(job(backend="sdpa-flash", compiled=True))
        torch.compiler.reset()
        counters.clear()
        model, attention = built(TINY, "standard", "sdpa-flash", compiled=True)
        compile_model(model, attention)
        model(*some_ids()).backward()
    assert counters["inductor"]["fxgraph_cache_hit"] == 2
    assert counters["inductor"]["fxgraph_cache_miss"] == 2


@pytest.fixture
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@NO_LEAF
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("config", "shard"), [(None, False), (None, True), (OLMOE, True)],
    ids=["DDP", "FSDP2", "FSDP2 of experts"],
)  # fmt: skip
def test_a_model_over_processes_trains_as_by_itself(
    tmp_path, monkeypatch, traced, alone, config, shard, compiled
):
    # One process stands for two, so a sum over both is its own value.
    monkeypatch.setattr(World, "means", lambda self, values, device: list(values))
    model = model_of_file(config_file(tmp_path, config)) if config else TINY
    given = job(backend="sdpa-flash", model=model, compiled=compiled)
    single = losses(step_row(given))
    for checkpointing in (False, True):
        spread = replace(given, shard=shard, checkpointing=checkpointing)
        with torch._dynamo.config.patch(optimize_ddp=False, fail_on_recompile_limit_hit=True):
            row = run_job(spread, World(0, 2), lambda text: None)[-1]
        assert (row.status, row.world_size) == ("ok", 2)
        assert losses(row) == pytest.approx(single, abs=2e-4)


@pytest.mark.parametrize("method", ["spattention", "longformer"])
def test_flex_is_inside_the_graph_of_the_model(traced, method):
    """Forward alone: FlexAttention has no backward on a CPU."""
    fitting = METHODS[method] if method != "longformer" else replace(METHODS[method], window=16)
    p = replace(job().group.problem, batch=2)
    found = []
    for backend in ("blockwise", "flex"):
        attention = step_attention(fitting, backend, p, CPU, compiled=True)
        model = build(TINY, attention.call, 64, torch.float32, CPU, 0)
        if backend == "flex":
            compile_model(model, attention)
        with torch.no_grad():
            found.append(model(*some_ids()))
        assert attention.inlined == (backend == "flex")
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
