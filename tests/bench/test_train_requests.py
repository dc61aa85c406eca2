"""What may not be asked of training: each is refused in one line, before anything is run."""

import json

import pytest

import run_bench
from bench import train
from bench.ranks import Apart, Ranks
from tests.bench.training import LLAMA, config_file

SMALL = {"n_embd": 64, "n_layer": 4, "n_head": 4, "vocab_size": 300}
NEVER = "its 4 layers call the attention that is to be measured 0 times"
MISFIT = "it takes no attention but its own"
UNFIT = [
    ({"model_type": "bloom", "hidden_size": 64, **SMALL}, NEVER),
    ({"model_type": "codegen", "rotary_dim": 8, **SMALL}, NEVER),
    ({"model_type": "openai-gpt", "n_positions": 1024, **SMALL}, NEVER),
    ({"model_type": "xglm", "d_model": 64, "ffn_dim": 96, "num_layers": 4, "attention_heads": 4},
     NEVER),
    ({"model_type": "xlnet", "d_model": 64, "d_inner": 96, **SMALL}, "num_experts_per_tok"),
    (LLAMA | {"model_type": "falcon"}, MISFIT),
    ({"model_type": "gptj", "rotary_dim": 8, **SMALL}, MISFIT),
    ({"model_type": "gpt_neo", "hidden_size": 64, "num_layers": 4, "num_heads": 4,
      "attention_types": [[["global", "local"], 2]]}, MISFIT),
    (LLAMA | {"model_type": "qwen3_next", "num_hidden_layers": 4, "head_dim": 16,
              "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
     "its 4 layers call the attention that is to be measured 1 times"),
    (LLAMA | {"model_type": "deepseek_v2", "num_key_value_heads": 4, "num_experts_per_tok": 2,
              "n_routed_experts": 4, "kv_lora_rank": 16, "q_lora_rank": 16,
              "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 16},
     "its attention is called with q, k, v of [(2, 4, 1024, 48), "),
    ({"model_type": "gpt2", "n_positions": 128, **SMALL},
     "N = 1024 is given; it has positions for 128 tokens alone"),
    (LLAMA | {"model_type": "gpt_oss", "sliding_window": None, "head_dim": 16}, "s_aux"),
    (LLAMA | {"num_attention_heads": 5}, "(64) is not a multiple of the number of attention"),
    (LLAMA | {"num_attention_heads": 0}, "--model-config"),
    (LLAMA | {"num_key_value_heads": 3}, "q_heads 4 is not a multiple of kv_heads 3"),
    (LLAMA | {"hidden_act": "foo"}, "does not run with its attention replaced (KeyError: 'foo')"),
    (LLAMA | {"rope_scaling": {"type": "nope"}}, "KeyError: 'nope'"),
    (LLAMA | {"head_dim": 15}, "even rotary dimension"),
    (LLAMA | {"hidden_size": -64}, "hidden_size is -64; it must be above 0"),
    (LLAMA | {"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be above 0"),
    (LLAMA | {"vocab_size": 0}, "vocab_size is 0; it must be above 0"),
    ({"model_type": "t5"}, "an encoder-decoder; it must be a decoder alone"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "table3"], "--model is 'table3'; it takes table2, "),
        (["--tokens", "100", "--seq-len", "64"], "must be a multiple of --seq-len 64"),
        (["--seq-len", "0"], "--seq-len has 0; it must be 1 or more"),
        (["--methods", "reformer"], "shares queries and keys"),
        (["--steps", "0"], "--steps is 0"),
        (["--time-limit", "inf"], "--time-limit is inf; it must be above 0, and 1000000 at most"),
        (["--time-limit", "3e6"], "--time-limit is 3000000.0"),
        (["--backends", "nope"], "--backends has 'nope'"),
        (["--device", "tpu"], "--device is 'tpu'"),
        (["--run", "a/b"], "--run is 'a/b'"),
        (["--model-config", "{"], "not JSON"),
        (["--model", "olmoe-1b-7b", "--model-config", "{}"], "are two models; give one"),
        (["--model-config", "{}"], "no model_type"),
        (["--model-config", '{"model_type": "nothing"}'], "transformers does not take it"),
        (["--model-config", json.dumps(LLAMA | {"model_type": "mistral", "sliding_window": 8})],
         "its attention has sliding_window, which no method honours"),
        *((["--model-config", json.dumps(config)], said) for config, said in UNFIT),
        (["--text", "short"], "has 5 bytes; N = 1024 needs at least 1025"),
        (["--model-config", json.dumps(LLAMA | {"vocab_size": 100}), "--text", "s" * 2000],
         "256 tokens"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_one_line(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(Apart, "run", lambda *args: pytest.fail("something was run"))
    for flag in ("--model-config", "--text"):
        if flag in arguments:
            place = arguments.index(flag) + 1
            arguments = arguments.copy()
            file = config_file(tmp_path, arguments[place], f"{place}.txt")
            arguments[place] = str(file)
    given = ["train", "--backends", "blockwise", "--device", "cpu", "--output", str(tmp_path)]
    assert run_bench.main(given + arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_a_process_of_torchrun_has_a_device_of_its_own():
    for given in ("cuda:1", "cuda:0"):
        with pytest.raises(ValueError, match=f"--device is '{given}'; under torchrun every"):
            train.expand(train.Train(device=given), Ranks(1, 1, 2))
    assert train.expand(train.Train(device="cpu"), Ranks(1, 1, 2))[0].group.device == "cpu"


def test_sharding_is_asked_for_with_a_word(capsys):
    for word, value in (("True", True), ("False", False), ("None", None)):
        assert run_bench._parse(["train", "--shard", word]).shard is value
    assert run_bench.main(["train", "--shard", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "--shard" in error and error.count("\n") == 1
