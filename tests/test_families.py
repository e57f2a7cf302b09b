"""One update of grpo_rlvr.py on a small random model of every family: sampling and training agree on it."""

import json

import pytest
import torch
import transformers

import grpo_rlvr
from common import TINY, load_tokenizer

TOKENIZER = load_tokenizer(str(next(p for p in (TINY / "code" / "model", TINY / "model") if p.exists())))
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
