"""common.py: the model and its check, sampling, the training forward, batches, data, the run folder."""

import ast
import contextlib
import dataclasses
import gzip
import json
import logging
import math
import os
import shutil
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LogitsProcessorList

import common
from common import (
    EVENT, Ranks, Run, Sampler, Stop, UserError, inverse_cdf, load_model, load_tokenizer, micro_batches,
    new_optimizer, optimizer_step, read_rows, token_logprobs, uniforms,
)  # fmt: skip

RANKS = Ranks(0, 1, torch.device("cpu"))
LONGEST = 40  # tokens of the longest row here
WINDOW, LAYERS = {"sliding_window": 16}, ["sliding_attention", "full_attention"]
FAMILIES = {  # name: (fields of its config, can it draft, can completions share a prompt)
    "Llama": ({}, True, True),
    "GPT2": ({}, True, True),
    "Bloom": ({}, True, True),  # ALiBi
    "Mistral": (WINDOW, False, True),
    "Qwen2": ({"vocab_size": 51, "use_sliding_window": True, "max_window_layers": 1, **WINDOW}, False, True),
    "Gemma3Text": ({"head_dim": 8, "layer_types": LAYERS, **WINDOW}, False, True),
    "Qwen3_5Text": (
        {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8,
         "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}, False, False,
    ),
    "Lfm2": ({"layer_types": ["conv", "full_attention"]}, False, False),
}  # fmt: skip


def small_tokenizer(size=50, eos=0, **options):
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    eos = None if eos is None else f"w{eos}"
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token=eos, **options)


def write_model(folder, kind="Llama", tokenizer=None, **changes):
    """Write a random model of a family (fewer key heads than heads) and its tokenizer; return the folder."""
    torch.manual_seed(0)
    fields = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    fields |= {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
    fields |= {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.3}
    fields |= FAMILIES.get(kind, ({},))[0] | changes
    if kind in ("GPT2", "Bloom"):  # which have no such fields
        del fields["num_key_value_heads"], fields["intermediate_size"], fields["max_position_embeddings"]
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**fields))
    model.save_pretrained(folder)
    (tokenizer or small_tokenizer()).save_pretrained(folder)
    return str(folder)


def load(folder, longest=LONGEST, **options):
    return load_model(folder, load_tokenizer(folder), RANKS, longest, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"), tie_word_embeddings=True, attention_dropout=0.3)


# ---------------------------------------------------------------- the training forward


@pytest.mark.parametrize("per_chunk", [2**25, 100])  # whole, and two positions at a time with recomputation
def test_token_logprobs_against_plain_arithmetic(folder, per_chunk, monkeypatch):
    monkeypatch.setattr(common, "LOGITS_PER_CHUNK", per_chunk)
    model, plain = load(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(1))
    rows, cols = torch.tensor([0, 1, 1, 2, 2]), torch.tensor([1, 4, 8, 3, 5])
    where = [np.array([1]), np.array([4, 8]), np.array([3, 5])]
    event = torch.zeros(50, dtype=torch.bool)
    event[10:20] = True
    targets = ids[rows, cols].clone()
    targets[[1, 3]] = EVENT
    targets[2] = 12  # of the set: its own probability, but the set is one outcome in the entropy
    merged = torch.tensor([False, True, True, True, False])
    found, entropy = token_logprobs(
        model, ids.tolist(), where, targets=targets, event=event, merged=merged, temperature=0.7, entropy=True
    )
    probs = (plain(ids).logits.double() / 0.7).softmax(-1)[rows, cols - 1]  # position t-1 predicts token t
    expected, entropies = [], []
    for p, target, one in zip(probs, targets, merged):
        expected.append((p[event].sum() if target == EVENT else p[target]).log())
        outcomes = torch.cat([p[~event], p[event].sum()[None]]) if one else p
        entropies.append(-(outcomes * outcomes.log()).sum())
    expected, entropies = torch.stack(expected), torch.stack(entropies)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy.double(), entropies, atol=1e-5, rtol=0)
    (found.sum() + entropy.sum()).backward()
    (expected.sum() + entropies.sum()).backward()
    for a, b in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad, atol=2e-4, rtol=1e-3)
    assert not token_logprobs(model, ids.tolist(), where)[1].any()  # entropies that nobody asked for


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_prompt_that_rows_share_is_read_once_and_changes_nothing(kind, tmp_path):
    """Prompts of several lengths, also beyond the window, against a plain forward of each row."""
    model, generator = load(write_model(tmp_path, kind)), torch.Generator().manual_seed(3)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (model.can_draft, model.shares_prompts) == FAMILIES[kind][1:]
    prompts = [torch.randint(0, 50, (n,), generator=generator).tolist() for n in (21, 4, 1)]
    prompts[0][5] = 0  # the pad token inside a prompt is a token
    chosen = [(0, [1, 2, 3]), (1, [5]), (0, [1, 2, 0, 0, 7] + [9] * 10), (2, [8, 9]), (0, [5]), (0, [5])]
    chosen.append((1, [0, 0, 6]))
    rows, lengths = [prompts[k] + rest for k, rest in chosen], [len(prompts[k]) for k, _ in chosen]
    where = [np.arange(n, len(row)) for row, n in zip(rows, lengths)]
    where[2] = np.array([21, 24, 35])
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda module, given, _: seen.append(given[0].shape))
    found, entropy = token_logprobs(model, rows, where, prompt_lengths=lengths, temperature=0.7, entropy=True)
    assert seen == ([(3, 21), (7, 14)] if model.shares_prompts else [(7, 36)])
    expected, entropies = [], []
    for row, columns in zip(rows, where):
        logprobs = (plain(torch.tensor([row])).logits[0] / 0.7).log_softmax(-1)
        expected += [logprobs[c - 1, row[c]] for c in columns]
        entropies += [-(logprobs[c - 1].exp() * logprobs[c - 1]).sum() for c in columns]
    torch.testing.assert_close(found, torch.stack(expected), atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(entropy, torch.stack(entropies), atol=5e-5, rtol=1e-4)
    weights = torch.rand(len(expected), generator=generator)
    (weights * found).sum().backward()
    (weights * torch.stack(expected)).sum().backward()
    for a, b in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad, atol=2e-4, rtol=1e-3)


def test_gradient_checkpointing_changes_memory_and_nothing_else(folder):
    rows, gradients, kept = torch.randint(1, 40, (4, 24)).tolist(), [], []
    for recompute in (False, True):
        model, sizes = load(folder, recompute=recompute), []
        assert model.shares_prompts != recompute  # a cache and recomputation exclude each other
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            loss = token_logprobs(model, rows, [np.arange(4, 24)] * 4)[0].sum()
        kept.append(sum(sizes))
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        with torch.no_grad():
            model.eval().generate(torch.tensor(rows)[:, :4], max_new_tokens=3)
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert kept[1] < 0.6 * kept[0]


# ---------------------------------------------------------------- models that are refused

DYNAMIC = {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 4.0}
LONGROPE = {"rope_theta": 1e4, "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}


@pytest.mark.parametrize(
    "kind, changes, words",
    [
        ("Cohere", {"logit_scale": 0.5}, "scaled or capped"),
        ("Granite", {"logits_scaling": 4.0}, "scaled or capped"),
        ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 2.0}, "scaled or capped"),
        ("Phi3", {"original_max_position_embeddings": 16, "rope_parameters": LONGROPE}, "rows of 40 tokens"),
        ("Llama", {"max_position_embeddings": 16, "rope_parameters": DYNAMIC}, "rows of 40 tokens"),
        ("Mamba", {}, "cannot use the model"),  # no left padding on a cache
        ("Mamba2", {"num_heads": 8, "head_dim": 8, "n_groups": 1}, "generate and"),  # nor does generate go on with it
    ],
)
def test_a_model_that_training_would_get_wrong_is_refused(kind, changes, words, tmp_path, monkeypatch):
    name = write_model(tmp_path, kind, **changes)
    if kind == "Llama":  # dynamic frequencies change beyond the config's context, which the scaling extends
        monkeypatch.setattr(common, "context_of", lambda name: 64)
    with pytest.raises(UserError, match=words) as caught:
        load(name)
    assert name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError) if "Mamba" in kind else contextlib.nullcontext():
        load(name, longest=0, train=False)  # only sampling, which leaves logits to the model
    if "rows" in words:
        load(name, longest=16)  # up to the original context the positions are fixed


def test_rows_beyond_the_context(folder, tmp_path):
    assert common.context_of(folder) == 64
    assert common.context_of(write_model(tmp_path, "Bloom")) >= 10**9  # it has no such limit
    load(folder, longest=64)
    with pytest.raises(UserError, match="have 65 tokens; .* takes 64"):
        load(folder, longest=65)
    with pytest.raises(UserError, match="cannot load the model"):
        common.context_of(str(tmp_path / "none"))


@pytest.mark.parametrize("tokenizer, eos", [(small_tokenizer(51), 0), (small_tokenizer(), [0, 50])])
def test_a_tokenizer_or_an_eos_beyond_the_model_is_one_line(tokenizer, eos, tmp_path):
    name = write_model(tmp_path, tokenizer=tokenizer)
    transformers.GenerationConfig(eos_token_id=eos).save_pretrained(name)
    with pytest.raises(UserError, match="more tokens than the model: call model.resize") as caught:
        load(name)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_as_the_scripts_need_it(tmp_path):
    short = small_tokenizer(model_max_length=9)
    tokenizer = load_tokenizer(write_model(tmp_path, tokenizer=short))
    assert tokenizer.model_max_length > 10**8
    transformers.GenerationConfig(eos_token_id=[0, 3]).save_pretrained(tmp_path)
    assert common.eos_ids(tokenizer, str(tmp_path)) == {0, 3}
    texts = common.token_texts(tokenizer, 52)  # a model may have more tokens
    assert len(texts) == 52 and texts[-2:] == ["", ""] and texts[7].strip() == "w7"
    assert common.token_texts(tokenizer, 10) == texts[:10]


def test_the_layers_are_not_their_experts():
    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(9))

    model = torch.nn.Module()
    model.config = LlamaConfig(num_hidden_layers=2)
    model.layers = torch.nn.ModuleList(Experts() for _ in range(2))
    assert common.decoder_layers(model) is model.layers


def test_the_plan_says_what_training_needs(folder):
    plan = common.memory_plan(folder, RANKS, (1000, 100), 10**6, False, 4)
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())
    assert f"{20 * parameters / 2**30:.2f} of weights and optimizer" in plan and "0.00 of gathered" in plan
    less = common.memory_plan(folder, RANKS, (1000, 100), 10**6, True, 4)
    needs = [float(text.split("in an update ")[1].split()[0]) for text in (plan, less)]
    assert 0 < needs[1] < needs[0]


# ---------------------------------------------------------------- the optimizer


def gradients(model, seed):
    rows = torch.randint(0, 50, (4, 12), generator=torch.Generator().manual_seed(seed)).tolist()
    loss = -token_logprobs(model, rows, [np.arange(1, 12)] * 4)[0].mean()
    loss.backward()
    return loss.item()


def test_the_optimizer_steps_like_a_plain_adamw(folder):
    mine, plain = load(folder), load(folder)
    optimizers = [new_optimizer(mine, 1e-2, 0.1, (0.9, 0.95))]
    for a, b in zip(mine.parameters(), plain.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=0)  # making the states moved nothing
    optimizers.append(torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95)))
    for step in range(4):
        for model, optimizer in zip((mine, plain), optimizers):
            norms = gradients(model, step), optimizer_step(model, optimizer, 0.0, 0.5, RANKS)
            assert norms[1] > 0.5 and all(p.grad is None for p in model.parameters())
    for a, b in zip(mine.parameters(), plain.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss, gradient", [(math.nan, 1), (math.inf, 1), (0.0, math.nan), (0.0, math.inf)])
def test_what_is_not_finite_changes_nothing(folder, loss, gradient):
    model = load(folder)
    optimizer = new_optimizer(model, 1e-2, 0.1)
    before = [p.clone() for p in model.parameters()]
    gradients(model, 0)
    next(model.parameters()).grad[0, 0] *= gradient
    assert math.isnan(optimizer_step(model, optimizer, loss, 1.0, RANKS))
    assert all(torch.equal(a, b) and a.grad is None for a, b in zip(model.parameters(), before))
    gradients(model, 0)
    assert optimizer_step(model, optimizer, 0.0, 1.0, RANKS) > 0  # and the next update is an ordinary one
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), before))


# ---------------------------------------------------------------- sampling


def test_inverse_cdf_is_the_distribution():
    p = torch.tensor([0.2, 0.0, 0.5, 0.3])
    n = 40_000
    drawn = inverse_cdf(p.repeat(n, 1), uniforms([n], "test"))
    counts = torch.bincount(drawn, minlength=4)
    assert counts[1] == 0
    assert ((counts / n - p).abs() < 4 * (p * (1 - p) / n).sqrt() + 1e-9).all()
    edges = torch.tensor([0.0, 0.999999999])
    assert inverse_cdf(torch.tensor([[0.0, 1.0, 0.0]] * 2), edges).tolist() == [1, 1]


def test_uniforms_depend_on_the_key_alone():
    assert torch.equal(uniforms([4], 0, "E", 3), uniforms([4], 0, "E", 3))
    assert not torch.equal(uniforms([4], 0, "E", 3), uniforms([4], 0, "E", 4))
    assert abs(uniforms([20000], 1, "mean").mean().item() - 0.5) < 0.01


def generate(model, ids, noise, temperature, **options):
    sampler = options.pop("sampler", None) or Sampler(noise, ids.shape[1], temperature, "cpu")
    options = {"max_new_tokens": noise.shape[1], "attention_mask": torch.ones_like(ids)} | options
    return model.generate(input_ids=ids, logits_processor=LogitsProcessorList([sampler]), **options), sampler


def test_generate_with_the_sampler_draws_from_the_tempered_model(folder):
    """Chi-square of pairs of tokens: 2,000 rows, against the model's own probabilities."""
    model, n = load(folder), 2000
    ids = torch.tensor([[4, 8, 15]])
    out, sampler = generate(model, ids.repeat(n, 1), uniforms([n, 2], "pairs"), 1.7)
    with torch.no_grad():
        follow = torch.cat([ids.repeat(50, 1), torch.arange(50)[:, None]], 1)
        logprobs = (model(follow).logits / 1.7).log_softmax(-1)
    first, second = logprobs[0, 2], logprobs[:, 3]  # [50], [50, 50]
    torch.testing.assert_close(sampler.logprobs[:, 0], first[out[:, 3]], atol=1e-4, rtol=0)
    torch.testing.assert_close(sampler.logprobs[:, 1], second[out[:, 3], out[:, 4]], atol=1e-4, rtol=0)
    expected = n * (first[:, None] + second).exp().flatten()
    counts = torch.bincount(out[:, 3] * 50 + out[:, 4], minlength=2500)
    order = expected.argsort(descending=True)
    kept = order[: int((expected > 5).sum())]  # the rest is one cell
    cells = [(counts[kept], expected[kept]), (counts.sum() - counts[kept].sum(), n - expected[kept].sum())]
    chi_square = sum(((c - e) ** 2 / e).sum().item() for c, e in cells)
    freedom = len(kept)
    assert freedom > 20 and abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom), (chi_square, freedom)


def test_temperature_zero_is_greedy(folder):
    model, ids = load(folder), torch.tensor([[4, 8, 15], [16, 23, 42]])
    out, sampler = generate(model, ids, torch.rand(2, 6), 0.0)
    for row, noted in zip(out, sampler.logprobs):
        logprobs = model(row[None]).logits[0].log_softmax(-1)
        assert logprobs[2:-1].argmax(-1).tolist() == row[3:].tolist()
        torch.testing.assert_close(noted, logprobs[2:-1].amax(-1), atol=1e-4, rtol=0)


def test_a_row_keeps_its_noise_when_others_leave(folder):
    model, ids, noise = load(folder), torch.tensor([[4, 8], [5, 9], [6, 7]]), uniforms([3, 6], "leave")
    whole, noted = generate(model, ids, noise, 1.0)
    cache = DynamicCache(config=model.config)
    options = {common.cache_argument(model): cache, "max_new_tokens": 3}
    out, sampler = generate(model, ids, noise, 1.0, **options)
    sampler.rows = left = torch.tensor([0, 2])
    cache.reorder_cache(left)
    out, _ = generate(model, out[left], noise, 1.0, sampler=sampler, **options)
    assert out.tolist() == whole[left].tolist()
    torch.testing.assert_close(sampler.logprobs[left], noted.logprobs[left])
    assert sampler.logprobs[1, 3:].tolist() == [0, 0, 0]


def test_nothing_of_a_checkpoint_changes_how_it_is_sampled(folder, tmp_path):
    plain, _ = generate(load(folder), torch.tensor([[4, 8]]), torch.full((1, 12), 0.4), 1.0)
    again = write_model(tmp_path, tie_word_embeddings=True)
    options = {"top_k": 2, "temperature": 0.2, "repetition_penalty": 5.0, "max_length": 4, "do_sample": True}
    transformers.GenerationConfig(**options, eos_token_id=plain[0, 4].item()).save_pretrained(again)
    found, _ = generate(load(again), torch.tensor([[4, 8]]), torch.full((1, 12), 0.4), 1.0)
    assert found.tolist() == plain.tolist() and found.shape == (1, 14)


# ---------------------------------------------------------------- batches


def test_micro_batches_hold_every_row_once_within_the_limit(monkeypatch):
    lengths = [5, 1, 9, 9, 3, 20, 2]
    batches = micro_batches(lengths, 18)
    assert sorted(i for b in batches for i in b) == list(range(7))
    assert all(len(b) * max(lengths[i] for i in b) <= 18 or len(b) == 1 for b in batches)
    assert len(micro_batches(lengths, 1)) == 7 and micro_batches([], 18) == []
    monkeypatch.setattr(common, "all_gather_list", lambda items, ranks: [*items, 6])  # another rank has six
    assert micro_batches(lengths, 18, Ranks(0, 2, None)) == batches + [[]] * (6 - len(batches))


def test_micro_batches_count_a_prompt_once():
    first, second = (1,) * 10, (2,) * 8
    prompts, lengths = [first, second, first, second, first], [2, 3, 2, 2, 2]
    # the first prompt's 10 + 3 x 2 = 16, the second one's 8 + 2 x 3
    assert micro_batches(lengths, 16, prompts=prompts) == [[0, 2, 4], [1, 3]]
    assert micro_batches(lengths, 15, prompts=prompts) == [[0, 2], [4], [1, 3]]
    # together: two prompts padded to 10 and five completions padded to 3
    assert micro_batches(lengths, 35, prompts=prompts) == [[0, 2, 4, 1, 3]]
    assert micro_batches(lengths, 34, prompts=prompts) == [[0, 2, 4, 1], [3]]


def test_a_rank_trains_on_whole_groups_if_they_divide():
    groups = [[[name] * (number + row) for row in range(3)] for number, name in enumerate("abcdefgh")]
    shares = [common.rank_share(groups, Ranks(rank, 4, None)) for rank in range(4)]
    assert sorted(sum(shares, [])) == sorted(sum(groups, []))
    assert all(len(share) == 6 and len({row[0] for row in share if row}) == 2 for share in shares)
    shares = [common.rank_share(groups[:3], Ranks(rank, 2, None)) for rank in range(2)]
    assert sorted(sum(shares, [])) == sorted(sum(groups[:3], [])) and {len(s) for s in shares} == {4, 5}


def test_problems_are_drawn_without_replacement_from_any_cursor():
    drawn = common.draw_problems(0, 30, 10, 1)
    assert [sorted(drawn[k : k + 10]) for k in (0, 10, 20)] == [list(range(10))] * 3
    assert drawn[:10] != drawn[10:20]
    assert common.draw_problems(7, 9, 10, 1) == drawn[7:16] != common.draw_problems(7, 9, 10, 2)


# ---------------------------------------------------------------- data


def test_read_rows(tmp_path, monkeypatch):
    rows = [{"text": "a"}, {"text": "b\u00e9"}]
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    for name, encoding in (("x.jsonl", "utf-8"), ("bom.jsonl", "utf-8-sig"), ("spark.jsonl/part-0.jsonl", "utf-8")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(lines, encoding=encoding)
    (tmp_path / "w.json").write_text(json.dumps(rows))
    with gzip.open(tmp_path / "y.jsonl.gz", "wt", encoding="utf-8") as handle:
        handle.write(lines)
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "z.parquet")
    for name in ("x.jsonl", "bom.jsonl", "spark.jsonl", "w.json", "y.jsonl.gz", "z.parquet"):
        assert list(read_rows(str(tmp_path / name))) == rows
    assert list(read_rows(str(tmp_path))) == 5 * rows
    monkeypatch.setattr("datasets.load_dataset", lambda path, **options: [options["name"], options["data_files"]])
    assert list(read_rows("org/name:20231101.en")) == ["20231101.en", None]  # a config
    for pattern in ("folder/*.arrow", "a.jsonl"):
        assert list(read_rows(f"org/name:{pattern}")) == [None, pattern]
    code = tmp_path / "code" / "sub"
    code.mkdir(parents=True)
    (code / "a.py").write_bytes(b"# -*- coding: latin-1 -*-\r\nx = '\xe9'\r\n")
    (code / "bad.py").write_bytes(b"x = '\xff\xfe'\n")  # not in its encoding: left out
    found = list(read_rows(str(tmp_path / "code")))
    assert [row["path"] for row in found] == ["sub/a.py"] and "\u00e9" in found[0]["text"]


def test_folders_of_code_and_of_tables(tmp_path):
    code, tables = tmp_path / "code", tmp_path / "tables"
    for name in ("mine.py", "sub/more.py", ".venv/lib/site-packages/numpy.py", "venv/site-packages/x.py"):
        (code / name).parent.mkdir(parents=True, exist_ok=True)
        (code / name).write_text("x = 1\n")
    (code / "requirements.txt").write_text("numpy\n")
    (code / "fixture.jsonl").write_text("{}\n")
    assert [row["path"] for row in read_rows(str(code))] == ["mine.py", "sub/more.py"]
    tables.mkdir()
    (tables / "loader.py").write_text("x = 1\n")  # a data set of the hub that comes with its script
    (tables / "test.jsonl").write_text('{"a": 1}\n')
    assert list(read_rows(str(tables))) == [{"a": 1}]


@pytest.mark.parametrize("script", ["common", "ra3", "rmt", "grpo_rlvr", "eval_code"])
def test_text_files_name_their_encoding(script):
    tree = ast.parse(Path(common.__file__).with_name(f"{script}.py").read_text(encoding="utf-8"))
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        function, name = ast.unparse(call.func), ast.unparse(call.func).split(".")[-1]
        text = name in ("read_text", "write_text", "open", "fdopen")
        binary = any("b'" in ast.unparse(mode) for mode in call.args[1:2])
        if text and function not in ("tokenize.open", "os.open") and not binary:
            assert any(k.arg == "encoding" for k in call.keywords), f"{script}.py, line {call.lineno}"


# ---------------------------------------------------------------- the run folder


@dataclasses.dataclass
class Arguments:
    model: str
    output_dir: str = ""
    seed: int = 0
    resume: str = ""
    penalty: float = 0.1
    updates: int = 5
    eval_every: int = 0
    em_iterations: int = 1
    track: bool = False
    bootstrap_only: bool = False
    task: str = "math"


def start(*args, data=(), **changes):
    common.setup(0)
    return Run(Arguments(*args, **changes), common.__file__, RANKS, data)


def rows_of(run):
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("unused", [False, True])
def test_checkpoints_are_whole_or_absent(folder, unused, tmp_path, monkeypatch):
    """unused: a parameter that never gets a gradient, as in a model with parts for images."""
    run, where = start(folder, str(tmp_path / "r")), str(tmp_path / "r")

    def fresh():
        model = load(folder)
        if unused:
            model.images = torch.nn.Linear(3, 3)
        return model, new_optimizer(model, 0.1, 0.01)

    def step(model, optimizer, seed):
        return gradients(model, seed), optimizer_step(model, optimizer, 0.0, 1.0, RANKS)

    model, optimizer = fresh()
    step(model, optimizer, 0)
    run.save({"update": 1, "cursor": 7}, {"policy": model}, optimizer)
    run.log({"update": 1, "x": 0.5})
    expected = [step(model, optimizer, k) for k in (1, 2)]
    run.log({"update": 2, "x": 1.0})

    def full(*args, **options):
        raise OSError(28, "No space left")

    monkeypatch.setattr(common.dcp, "save", full)
    with pytest.raises(UserError, match="No space left.*Earlier checkpoints are intact"):
        run.save({"update": 3, "cursor": 9}, {"policy": model}, optimizer)
    monkeypatch.undo()
    (tmp_path / "r" / "checkpoints" / "state_000004").mkdir()  # torn: no state.json
    again, (model, optimizer) = start(folder, where, resume="auto"), fresh()
    assert again.restore({"policy": model}, optimizer) == {"update": 1, "cursor": 7}
    assert [step(model, optimizer, k) for k in (1, 2)] == expected  # bit for bit
    assert [row["update"] for row in rows_of(run)] == [1]  # update 2 is to be done again
    model.more = torch.nn.Linear(3, 3)
    with pytest.raises(UserError, match="more") as caught:  # other keys: the file is not damaged
        start(folder, where, resume="auto").restore({"policy": model}, new_optimizer(model, 0.1, 0.0))
    assert "delete" not in str(caught.value)
    (tmp_path / "evaluation" / "batches").mkdir(parents=True)  # of eval_code.py
    for taken in (where, str(tmp_path / "evaluation")):
        with pytest.raises(UserError, match="already holds a run"):
            start(folder, taken)
    with pytest.raises(UserError, match="nothing to resume"):
        start(folder, resume=str(tmp_path / "none"))
    with pytest.raises(UserError, match="lies inside the data"):  # its files would be new data on --resume
        start(folder, str(tmp_path / "new"), data=[str(tmp_path)])


def test_what_may_change_on_resume(folder, tmp_path):
    source = tmp_path / "data.jsonl"
    source.write_text('{"text": "a"}\n')
    options = {"output_dir": str(tmp_path / "r"), "data": [str(source), "org/name", "stdlib"]}
    run = start(folder, **options)
    run.save({"update": 1}, {"policy": load(folder)}, None)
    options["resume"] = "auto"
    again = start(folder, **options, updates=99, eval_every=7, em_iterations=4)
    assert again.state["update"] == 1
    with pytest.raises(UserError, match="--penalty 0.1 -> 0.2"):
        start(folder, **options, penalty=0.2)
    source.write_text('{"text": "b"}\n')
    with pytest.raises(UserError, match=f"the data have changed .*{source}"):
        start(folder, **options)
    # of a folder, its data count, not what other programs write there
    code = tmp_path / "code"
    for name in ("a.py", "__pycache__/a.pyc", ".git/index", "b.py"):
        before = common.fingerprint([str(code)])
        (code / name).parent.mkdir(parents=True, exist_ok=True)
        (code / name).write_text("x = 1\n")
        assert (common.fingerprint([str(code)]) == before) == (not name.endswith(".py"))


def test_old_checkpoints_are_removed_and_models_export_as_they_were(tmp_path):
    """Only the weights change: not what the scripts set for themselves."""
    source = tmp_path / "source"
    fields = {"bos_token": "w2", "model_max_length": 77, "padding_side": "left", "truncation_side": "left"}
    name = write_model(source, tokenizer=small_tokenizer(**fields), attention_dropout=0.25)
    chat = {"eos_token_id": [0, 3], "bos_token_id": 2, "temperature": 0.6, "top_p": 0.95, "do_sample": True}
    transformers.GenerationConfig(**chat, repetition_penalty=1.1).save_pretrained(name)
    run, model = start(name, str(tmp_path / "r")), load(name)
    for update in range(1, 5):
        run.save({"update": update}, {"policy": model}, None)
    assert sorted(p for p in os.listdir(run.path / "checkpoints")) == ["state_000003", "state_000004"]
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    run.export(model, "em_001")
    exported = run.path / "checkpoints" / "em_001"
    assert {file.name for file in exported.iterdir()} == {file.name for file in source.iterdir()}
    for file in source.glob("*.json"):
        before, after = (json.loads((path / file.name).read_text()) for path in (source, exported))
        # transformers itself writes these
        for key in ("transformers_version", "_from_model_config", "is_local", "local_files_only"):
            before.pop(key, None), after.pop(key, None)
        assert before == after
    loaded, ids = AutoModelForCausalLM.from_pretrained(exported), torch.arange(6)[None]
    torch.testing.assert_close(loaded.eval()(ids).logits, model(ids).logits)
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())
    assert common.eos_ids(load_tokenizer(str(exported)), str(exported)) == {0, 3}
    load(str(exported))


@pytest.mark.parametrize("tied", [True, False])
def test_export_of_a_head_of_its_own(folder, tied, tmp_path):
    """The config says that it is tied; transformers believes the weights, and so does the export."""
    run, model = start(folder, str(tmp_path / "r")), load(folder)
    assert model.config.tie_word_embeddings
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    run.export(model, "x")
    loaded = AutoModelForCausalLM.from_pretrained(run.path / "checkpoints" / "x")
    ids = torch.arange(6)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    loaded.config.tie_word_embeddings = tied
    loaded.base_model.save_pretrained(tmp_path)  # without a head
    load_tokenizer(folder).save_pretrained(tmp_path)
    with contextlib.nullcontext() if tied else pytest.raises(UserError, match="no weights for lm_head.weight"):
        load(str(tmp_path))


def test_which_run_is_resumed(folder, tmp_path, monkeypatch):
    """The newest of this task, model and seed that has a checkpoint. Runs of the same second have folders of
    their own."""
    monkeypatch.chdir(tmp_path)
    model, days = load(folder), iter("1123456789")
    monkeypatch.setattr(common.time, "strftime", lambda _: f"2026010{next(days)}-000000")
    first, same = start(folder), start(folder)
    assert first.path != same.path and "_math__" in first.path.name and "__s0__" in first.path.name
    same.save({"update": 1}, {"policy": model}, None)
    second = start(folder)  # an evaluation, say
    second.log({"update": 0})
    code = start(folder, task="code")
    code.save({"update": 2}, {"policy": model}, None)
    start(folder, seed=1).save({"update": 3}, {"policy": model}, None)
    again = start(folder, resume="auto")
    assert again.path == same.path and again.state["update"] == 1 and rows_of(second)
    assert start(folder, resume="auto", task="code").path == code.path
    assert start(folder, resume="auto", seed=2).state is None  # nothing to resume: a new run
    other = tmp_path / "other" / Path(folder).name  # another model in a folder of the same name
    shutil.copytree(folder, other)
    assert start(str(other), resume="auto").state is None
    assert start(folder, resume="auto").path == same.path
    # RA3's --bootstrap-only has no checkpoints, but a file that it continues
    (second.path / "bootstrapped.jsonl").write_text("{}\n")
    third = Arguments(folder, resume="auto", bootstrap_only=True)
    (second.path / "args.json").write_text(json.dumps(dataclasses.asdict(third) | {"data_fingerprint": common.fingerprint([])}))
    assert start(folder, resume="auto", bootstrap_only=True).path == second.path
    monkeypatch.chdir(other)
    Path("runs").symlink_to("nowhere")  # as to a scratch disk that is not mounted
    with pytest.raises(UserError, match="File exists: runs"):
        start(folder)


def test_metrics_are_json_and_the_console_shows_what_there_is(folder, tmp_path, capsys):
    run = start(folder, str(tmp_path / "r"))
    capsys.readouterr()
    metrics = {"update": 1, "loss": math.nan, "rate": 0.25, "far": -math.inf, "phase": "E"}
    run.log(metrics, ("{rate:.2f}", "{loss:.1f}"), 9)
    text = (run.path / "metrics.jsonl").read_text()
    (row,) = (json.loads(line, parse_constant=lambda word: pytest.fail(word)) for line in text.splitlines())
    assert row["rate"] == 0.25 and row["phase"] == "E" and not {"loss", "far"} & row.keys()
    assert capsys.readouterr().out == "1/9 | 0.25\n"
    assert list((run.path / "tensorboard").iterdir())


def test_three_skipped_updates_in_a_row_end_the_run(folder, tmp_path, capsys):
    run = start(folder, str(tmp_path / "r"))
    for update, skipped in enumerate((True, True, False, True, True), start=1):
        run.log({"update": update}, total=9, skipped=skipped)
    run.save({"update": 5}, {"policy": load(folder)}, None)
    run = start(folder, str(tmp_path / "r"), resume="auto")
    run.restore({"policy": load(folder)}, None)
    with pytest.raises(UserError, match="3 updates in a row"):  # counted across a resume
        run.log({"update": 6}, total=9, skipped=True)
    assert [row["optim/skipped"] for row in rows_of(run)] == [1, 2, 2, 3, 4, 5]
    assert capsys.readouterr().out.count("not finite") == 5


def test_curves_and_samples(folder, tmp_path):
    run = start(folder, str(tmp_path / "r"))
    run.curves([("nothing yet", {"a": ""}, "update")])
    for update in range(20):
        run.log({"update": update, "a": float(update), "b": update % 3, "phase": "E" if update < 9 else "M"})
    panels = [("two", {"a": "A", "b": "B"}, "update"), ("none", {"c": ""}, "update")]
    panels.append(("one", {"b": ""}, "time/wall_s"))
    run.curves(panels)
    from matplotlib.image import imread

    wide = imread(run.path / "curves.png")
    run.curves(panels[:1])
    narrow = imread(run.path / "curves.png")  # one panel
    assert wide.std() > 0.05 and wide.shape[1] > 1.5 * narrow.shape[1]
    run.samples("first", "what the colours mean", ["<pre>\u221a2 <span class=thought># think</span></pre>"])
    for text in ("torn", "x"):  # the second time after a resume
        run.samples("second", "what the colours mean", [f"<pre>{text}</pre>"])
    html = (run.path / "samples.html").read_text(encoding="utf-8")
    assert html.count("<!DOCTYPE") == html.count("what the colours mean") == 1 and "\u221a2" in html and "torn" not in html
    assert html.index("<h2>first") < html.index("# think") < html.index("<h2>second")


def test_the_folder_says_how_the_run_was_made(folder, tmp_path):
    run = start(folder, str(tmp_path / "r"))
    assert json.loads((run.path / "args.json").read_text())["penalty"] == 0.1
    environment = (run.path / "env.txt").read_text()
    assert "torch: " in environment and "commit: " in environment and (run.path / "common.py").exists()
    Run(run.args, run.path / "common.py", RANKS)  # this copy can go on with the run


def test_a_signal_becomes_a_stop_and_the_second_ctrl_c_does_not_wait(capsys):
    interrupt = common.Interrupt(RANKS)
    interrupt.check()
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stop):
        interrupt.check()
    assert "stopping, then saving" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_deprecations_are_errors():
    for kind in (FutureWarning, DeprecationWarning):
        with pytest.raises(kind):
            warnings.warn("`x` is deprecated\nand will be removed in version 9", kind, stacklevel=1)
    with pytest.raises(AssertionError, match="old_name"):
        logging.getLogger("transformers.some.module").warning("`old_name` is deprecated")
