"""One update of grpo_rlvr.py on a small random model of every family, and of every script on a model in bf16:
sampling and training agree."""

import dataclasses
import json

import pytest
import torch
import transformers

import common
import grpo_rlvr
import ra3
import rmt
from common import TINY, load_model, load_tokenizer

TOKENIZER = load_tokenizer(f"{TINY}/code/model")
SIZES = {
    "vocab_size": len(TOKENIZER), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
    "initializer_range": 0.3, "tie_word_embeddings": True, "pad_token_id": 0, "eos_token_id": 0, "bos_token_id": None,
}  # fmt: skip
LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "full_attention_interval": 2,
}  # fmt: skip
FAMILIES = {  # configuration class -> what it has beyond SIZES; windows are shorter than the rows
    "LlamaConfig": {},
    "Qwen2Config": {},
    "Qwen3Config": {},
    "Qwen3MoeConfig": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "SmolLM3Config": {},
    "Olmo3Config": {"sliding_window": 8},
    "GPTNeoXConfig": {},
    "Phi3Config": {"sliding_window": 8},
    "MistralConfig": {"sliding_window": 8},
    "Gemma3TextConfig": {"sliding_window": 8, "sliding_window_pattern": 2},
    "Qwen3_5TextConfig": LINEAR,
    "Lfm2Config": {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_and_training_agree(family, tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = getattr(transformers, family)(**SIZES | FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    question = {"prompt": "What is 1 + 1?" + " Think." * 4, "reward_model": {"ground_truth": "2"}}
    rows = [question | {"prompt": question["prompt"] + " Now." * (i % 4)} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(grpo_rlvr, "reward", lambda problem, text: (len(text) % 5, len(text) % 5 > 2, "short"))
    monkeypatch.setattr(grpo_rlvr.Run, "curves", lambda self, panels: None)
    args = grpo_rlvr.Args(
        task="math", model=str(tmp_path / "model"), dataset=str(tmp_path / "rows.jsonl"), eval_problems=2,
        output_dir=str(tmp_path / "run"), prompts_per_update=4, group_size=4, max_new_tokens=20, temperature=0.8,
        minibatches=1, updates=1, learning_rate=1e-3, micro_batch_tokens=400, rollout_rows=8,
    )  # fmt: skip
    grpo_rlvr.main(args)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    update = json.loads(lines[1])
    assert abs(update["policy/rollout_ratio"] - 1) < 1e-3 and update["policy/rollout_gap"] < 1e-3
    assert update["optim/grad_norm"] > 0 and (tmp_path / "run" / "checkpoints" / "final" / "config.json").exists()


SMALL = {  # script -> the smallest run of it
    ra3: dataclasses.replace(
        ra3.TINY_DEFAULTS, rl_updates=1, ntp_updates=1, rl_batch_size=4, ntp_batch_size=4, eval_snippets=4,
        eval_problems="",
    ),
    rmt: rmt.Args(
        **rmt.TINY_RUN | {"updates": 1, "train_texts": 100, "prompts_per_update": 4, "eval_positions": 4}
    ),
    grpo_rlvr: grpo_rlvr.Args(
        **grpo_rlvr.TINY_MATH | {"updates": 1, "prompts_per_update": 4, "eval_problems": 4, "minibatches": 2, "beta": 0.1}
    ),
}  # fmt: skip


@pytest.mark.parametrize("script", SMALL, ids=lambda script: script.__name__)
def test_a_model_as_on_a_gpu(script, tmp_path, monkeypatch):
    """Sharded, with fp32 weights and bf16 compute."""
    policy = common.MixedPrecisionPolicy(torch.bfloat16, torch.float32)

    def load(name, tokenizer, ranks, *rest, **options):
        return common.shard(load_model(name, tokenizer, ranks, *rest, **options), ranks)

    monkeypatch.setattr(common, "MixedPrecisionPolicy", lambda **_: policy)
    monkeypatch.setattr(script, "load_model", load)
    args = dataclasses.replace(SMALL[script], output_dir=str(tmp_path))
    script.main(args)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    norms = [row["optim/grad_norm"] for row in rows[1:]]
    assert min(norms) > 0 and rows[-1]["optim/skipped"] == 0
    for ratio in [row["policy/rollout_ratio"] for row in rows if "policy/rollout_ratio" in row]:
        assert 1e-7 < abs(ratio - 1) < 0.01  # it is not fp32
    before, after = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        for folder in (args.model, max((tmp_path / "checkpoints").glob("[ef]*")))
    )
    changes = [(a.float() - b.float()).abs().max().item() for a, b in zip(before.parameters(), after.parameters())]
    assert after.dtype == torch.float32 and min(changes) > 0 and max(changes) < 1e-2
