"""Small models, their steps and configurations, for tests of training."""

import json
from dataclasses import replace

import torch

from bench.cells import Cell, Group
from bench.models import Model, build
from bench.step_attention import IDENTITY, step_attention
from bench.steps import Job, World, run_job
from methods import METHODS, Problem
from tests.bench.rows import make_row

CPU = torch.device("cpu")
TINY = Model("tiny", layers=2, heads=4, kv_heads=4, hidden=64, head_dim=16, vocabulary=256)
LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
}  # fmt: skip
OLMOE = {
    "model_type": "olmoe", "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256, "num_experts": 4,
    "num_experts_per_tok": 2,
}  # fmt: skip

# Its scores are not divided by the root of the head's features.
GRANITE = LLAMA | {"model_type": "granite", "attention_multiplier": 3.0}


def config_file(folder, values, name="tiny.json"):
    path = folder / name
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


def job(method="standard", backend="blockwise", model=TINY, **changes):
    p = Problem(batch=2, q_heads=model.heads, kv_heads=model.kv_heads, seq_len=64,
                head_dim=model.head_dim, dtype="float32")  # fmt: skip
    group = Group(
        problem=p, block_size=(128, 128), cells=(Cell(method, backend),), phases=("step",),
        device="cpu", seed=0, rounds=3, seconds=0.0, run="test", shared=False,
    )  # fmt: skip
    values = {
        "steps": 4, "warmup": 1, "learning_rate": 1e-3, "text": None, "checkpointing": False,
        "compiled": False, "shard": False,
    }  # fmt: skip
    return Job(group=group, model=model, **values | changes)


def step_row(given):
    return run_job(given, World(), lambda text: None)[-1]


def losses(row):
    return [float(loss) for loss in row.losses.split(";")]


def built(model, method="standard", backend="blockwise", compiled=False):
    p = replace(job(model=model).group.problem, q_heads=model.heads, kv_heads=model.kv_heads)
    attention = step_attention(METHODS.get(method, IDENTITY), backend, p, CPU, compiled)
    return build(model, attention.call, 64, torch.float32, CPU, 0), attention


def some_ids(seed=0):
    drawn = torch.randint(256, (2, 65), generator=torch.Generator().manual_seed(seed))
    return drawn[:, :-1], drawn[:, 1:]


def made(method="standard", us=100.0, **changes):
    """A row of a step with made-up figures."""
    return make_row(
        **{
            "method": method, "phase": "step", "clock": "host", "median_us": us, "batch": 4,
            "seq_len": 1024, "model": "m", "world_size": 1, "data": "random",
        } | changes
    )  # fmt: skip


def table2_step(method="standard", backend="flex", us=100.0, **changes):
    """A step of the paper's model with made-up figures."""
    model = {"model": "table2", "world_size": 1, "data": "random", "batch": 4, "seq_len": 1024}
    values = model | {"phase": "step", "clock": "host", "losses": "10.8;10.7"} | changes
    return make_row(method=method, backend=backend, median_us=us, **values)
