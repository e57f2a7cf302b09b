"""common.py: batches, data reading, checkpoints; modeling.py: sampling, packed rows, log-probabilities."""

import dataclasses
import gzip
import json
import os
import random
import types

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import common
import modeling
from common import Ranks, UserError, read_rows
from modeling import EVENT, inverse_cdf, token_logprobs, uniforms

RANKS = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.4,
    )
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("per_chunk", [2**25, 100])  # whole, and two positions at a time with recomputation
@pytest.mark.parametrize("attention", [modeling.PREFIX_TREE, "sdpa"])  # sdpa: for models that ours does not fit
def test_token_logprobs_against_plain_arithmetic(folder, attention, per_chunk, monkeypatch):
    monkeypatch.setattr(modeling, "LOGITS_PER_CHUNK", per_chunk)
    model, plain = modeling.load_model(folder, RANKS), AutoModelForCausalLM.from_pretrained(folder)
    assert modeling.has_attention(model, modeling.PREFIX_TREE)
    model.set_attn_implementation(attention)
    ids = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(1))
    rows, cols = torch.tensor([0, 1, 1, 2, 2]), torch.tensor([1, 4, 8, 3, 5])
    event = torch.zeros(50, dtype=torch.bool)
    event[10:20] = True
    targets = ids[rows, cols].clone()
    targets[[1, 3]] = EVENT
    found, entropy = token_logprobs(
        model, ids, rows, cols, targets=targets, event=event, temperature=0.7, entropy=True
    )
    probs = (plain(ids).logits.double() / 0.7).softmax(-1)[rows, cols - 1]  # position t-1 predicts token t
    for n in range(5):
        p, is_event = probs[n], targets[n] == EVENT
        expected = p[event].sum() if is_event else p[targets[n]]
        assert abs(found[n].item() - expected.log().item()) < 1e-5
        outcomes = torch.cat([p[~event], p[event].sum()[None]]) if is_event else p
        assert abs(entropy[n].item() + (outcomes * outcomes.log()).sum().item()) < 1e-5
    (found.sum() + entropy.sum()).backward()
    reference = (
        probs[[0, 2, 4]].gather(1, targets[[0, 2, 4], None]).log().sum()
        + probs[[1, 3]][:, event].sum(-1).log().sum()
    )
    for n in range(5):
        p = probs[n]
        outcomes = torch.cat([p[~event], p[event].sum()[None]]) if targets[n] == EVENT else p
        reference = reference - (outcomes * outcomes.log()).sum()
    reference.backward()
    for a, b in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad, atol=2e-4, rtol=1e-3)


def test_right_padding_needs_no_mask(folder):
    model = modeling.load_model(folder, RANKS)
    ids = modeling.pad_right([[1, 2, 3], [4, 5, 6, 7, 8, 9]], pad=0)
    both = token_logprobs(model, ids, torch.tensor([0, 0]), torch.tensor([1, 2]))[0]
    alone = token_logprobs(model, ids[:1, :3], torch.tensor([0, 0]), torch.tensor([1, 2]))[0]
    torch.testing.assert_close(both, alone)


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


def test_micro_batches_hold_every_row_once_within_the_limit():
    lengths = [5, 1, 9, 9, 3, 20, 2]
    rows = [[i] * length for i, length in enumerate(lengths)]  # which begin with nothing in common
    batches = modeling.micro_batches(rows, 18)
    assert sorted(i for b in batches for i in b) == list(range(7))
    assert all(len(b) * max(lengths[i] for i in b) <= 18 or len(b) == 1 for b in batches)
    assert len(modeling.micro_batches(rows, 1)) == 7


def test_micro_batches_count_what_a_group_shares_once():
    first, second = [1] * 10, [2] * 10  # prompts; completions of 2 or 3 tokens
    rows = [[*first, 3, 3], [*second, 3, 3, 3], [*first, 4, 4], [*second, 4, 4], [*first, 3, 5]]
    groups = [1, 2, 1, 2, 1]
    # 13 + 3 tokens, then 12 + 1 + 2: [3, 5] comes after [3, 3]
    assert modeling.micro_batches(rows, 16, groups=groups) == [[1, 3], [0, 4, 2]]
    assert modeling.micro_batches(rows, 14, groups=groups) == [[1], [3], [0, 4], [2]]
    # side by side the second group has the first one's width, 13: 13 + 3 + 13 + 2 + 3
    assert modeling.micro_batches(rows, 34, groups=groups) == [[1, 3, 0, 4, 2]]
    assert modeling.micro_batches(rows, 33, groups=groups) == [[1, 3, 0, 4], [2]]


def test_a_rank_trains_on_whole_groups_if_they_divide():
    groups = [[[name] * (number + row) for row in range(3)] for number, name in enumerate("abcdefgh")]
    shares = [modeling.rank_share(groups, Ranks(rank, 4, None)) for rank in range(4)]
    assert sorted(sum(shares, [])) == sorted(sum(groups, []))
    assert all(len(share) == 6 and len({row[0] for row in share if row}) == 2 for share in shares)
    shares = [modeling.rank_share(groups[:3], Ranks(rank, 2, None)) for rank in range(2)]
    assert sorted(sum(shares, [])) == sorted(sum(groups[:3], [])) and {len(s) for s in shares} == {4, 5}


def test_read_rows(tmp_path):
    rows = [{"text": "a"}, {"text": "b\u00e9"}]
    lines = "".join(json.dumps(r) + "\n" for r in rows)
    (tmp_path / "x.jsonl").write_text(lines)
    with gzip.open(tmp_path / "y.jsonl.gz", "wt") as handle:
        handle.write(lines)
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "z.parquet")
    for name in ("x.jsonl", "y.jsonl.gz", "z.parquet"):
        assert list(read_rows(str(tmp_path / name))) == rows
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


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("no.jsonl", None, "no such data file"),
        ("bad.jsonl", "{}\nnot json\n", "line 2"),
        ("bad.parquet", "x", "cannot"),
    ],
)
def test_unreadable_data_is_one_clear_line(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        list(read_rows(str(tmp_path / name)))
    assert "\n" not in str(caught.value)


def test_a_missing_column_names_those_there_are():
    with pytest.raises(UserError, match="no column `text`; it has: code, lang"):
        common.column({"code": 1, "lang": 2}, "text", "x")


@dataclasses.dataclass
class Arguments:
    model: str
    output_dir: str
    seed: int = 0
    resume: str = ""
    penalty: float = 0.1
    bootstrap_only: bool = False


def test_checkpoints_are_whole_or_absent(folder, tmp_path, monkeypatch):
    common.setup(0)
    model = modeling.load_model(folder, RANKS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    run = common.Run(Arguments(folder, str(tmp_path / "r")), common.__file__, RANKS)
    ids = torch.arange(12).view(2, 6)

    def step():
        optimizer.zero_grad()
        loss = -token_logprobs(model, ids, torch.tensor([0, 1]), torch.tensor([3, 4]))[0].sum()
        loss.backward()
        optimizer.step()
        return loss.item()

    step()
    run.save({"update": 1, "cursor": 7}, {"policy": model}, optimizer)
    expected = [step(), step()]
    run.log({"update": 2, "x": 1.0})
    # a full disk in the middle of the second checkpoint
    monkeypatch.setattr(
        common.dcp, "save", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(UserError, match="No space left"):
        run.save({"update": 3, "cursor": 9}, {"policy": model}, optimizer)
    monkeypatch.undo()
    (tmp_path / "r" / "checkpoints" / "state_000004").mkdir()  # torn: no state.json
    again = common.Run(Arguments(folder, str(tmp_path / "r"), resume="auto"), common.__file__, RANKS)
    assert again.restore({"policy": model}, optimizer) == {"update": 1, "cursor": 7}
    assert [step(), step()] == expected  # bit for bit
    assert (tmp_path / "r" / "metrics.jsonl").read_text() == ""  # update 2 is to be done again
    with pytest.raises(UserError, match="--penalty 0.1 -> 0.2"):
        common.Run(Arguments(folder, str(tmp_path / "r"), resume="auto", penalty=0.2), common.__file__, RANKS)
    with pytest.raises(UserError, match="already holds a run"):
        common.Run(Arguments(folder, str(tmp_path / "r")), common.__file__, RANKS)
    with pytest.raises(UserError, match="nothing to resume"):
        common.Run(Arguments(folder, "", resume=str(tmp_path / "none")), common.__file__, RANKS)


def test_old_checkpoints_are_removed_and_models_export(folder, tmp_path):
    common.setup(0)
    model, tokenizer = modeling.load_model(folder, RANKS), modeling.load_tokenizer(str(common.TINY / "model"))
    run = common.Run(Arguments(folder, str(tmp_path / "r")), common.__file__, RANKS)
    for update in range(1, 5):
        run.save({"update": update}, {"policy": model}, None)
    kept = sorted(p for p in os.listdir(tmp_path / "r" / "checkpoints") if p.startswith("state"))
    assert kept == ["state_000003", "state_000004"]
    model.generation_config.eos_token_id = [0, 3]  # a chat model's
    run.export(model, tokenizer, "em_001")
    exported = str(run.path / "checkpoints" / "em_001")
    assert modeling.eos_ids(tokenizer, exported) == {tokenizer.eos_token_id, 0, 3}
    again = modeling.load_model(exported, RANKS)
    assert again.generation_config.eos_token_id == [0, 3]
    loaded = AutoModelForCausalLM.from_pretrained(exported)
    ids = torch.arange(6)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_export_of_a_head_of_its_own(folder, tied, tmp_path):
    """The config says that it is tied; transformers believes the weights, and so does the export."""
    common.setup(0)
    tokenizer = modeling.load_tokenizer(str(common.TINY / "model"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.tie_word_embeddings
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    modeling.equip(model)
    run = common.Run(Arguments("m", str(tmp_path / "r")), common.__file__, RANKS)
    run.export(model, tokenizer, "x")
    loaded = AutoModelForCausalLM.from_pretrained(run.path / "checkpoints" / "x")
    ids = torch.arange(6)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_resume_auto_takes_the_newest_run_that_has_a_checkpoint(folder, tmp_path, monkeypatch):
    common.setup(0)
    monkeypatch.chdir(tmp_path)
    model = modeling.load_model(folder, RANKS)
    times = (f"2026010{day}-000000" for day in range(1, 10))
    monkeypatch.setattr(common.time, "strftime", lambda _: next(times))
    first = common.Run(Arguments(folder, ""), common.__file__, RANKS)
    first.save({"update": 1}, {"policy": model}, None)
    second = common.Run(Arguments(folder, ""), common.__file__, RANKS)  # an evaluation, say
    second.log({"update": 0})
    assert second.path != first.path
    again = common.Run(Arguments(folder, "", resume="auto"), common.__file__, RANKS)
    assert again.path == first.path and again.state["update"] == 1
    assert (second.path / "metrics.jsonl").read_text()
    # RA3's --bootstrap-only has no checkpoints, but a file that it continues
    (second.path / "bootstrapped.jsonl").write_text("{}\n")
    third = Arguments(folder, "", resume="auto", bootstrap_only=True)
    (second.path / "args.json").write_text(json.dumps(dataclasses.asdict(third)))
    assert common.Run(third, common.__file__, RANKS).path == second.path


def test_gradient_checkpointing_changes_memory_and_nothing_else(folder):
    common.setup(0)
    ids = torch.randint(1, 40, (4, 24))
    rows, cols = torch.arange(4).repeat_interleave(20), torch.arange(4, 24).repeat(4)
    gradients, kept = [], []
    for recompute in (False, True):
        model, sizes = modeling.load_model(folder, RANKS, recompute=recompute), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            loss = token_logprobs(model, ids, rows, cols)[0].sum()
        kept.append(sum(sizes))
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        with torch.no_grad():  # rollouts, with and without a cache of their own
            model.generate(ids[:, :4], max_new_tokens=3, do_sample=False)
            modeling.RowCache(model, 1).feed([0], [0], [[1, 2, 3]])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert kept[1] < 0.6 * kept[0]


def test_the_layers_are_not_their_experts():
    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(9))

    model = torch.nn.Module()
    model.config = LlamaConfig(num_hidden_layers=2)
    model.layers = torch.nn.ModuleList(Experts() for _ in range(2))
    assert modeling.decoder_layers(model) is model.layers


def test_a_tokenizer_that_knows_more_tokens_than_the_model():
    tokenizer = modeling.load_tokenizer(str(common.TINY / "model"))
    texts = modeling.token_texts(tokenizer, len(tokenizer) + 2)
    assert len(texts) == len(tokenizer) + 2 and texts[-2:] == ["", ""]
    assert modeling.token_texts(tokenizer, 100) == texts[:100]


def test_the_plan_says_what_training_needs(folder):
    plan = modeling.memory_plan(folder, RANKS, (1000, 100), 10**6, False, 4)
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())
    assert f"{20 * parameters / 2**30:.2f} of weights and optimizer" in plan and "0.00 of gathered" in plan
    less = modeling.memory_plan(folder, RANKS, (1000, 100), 10**6, True, 4)
    needs = [float(text.split("in an update ")[1].split()[0]) for text in (plan, less)]
    assert 0 < needs[1] < needs[0]


def test_a_model_that_changes_its_logits_is_refused(tmp_path):
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = transformers.CohereConfig(**sizes, num_attention_heads=2, logit_scale=0.5)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="logit_scale"):
        modeling.load_model(str(tmp_path), RANKS)
    modeling.load_model(str(tmp_path), RANKS, train=False)  # for evaluation, which leaves logits to the model


def test_no_model_no_tokenizer_no_eos(folder, tmp_path):
    with pytest.raises(UserError, match="cannot load the model"):
        modeling.load_model(str(tmp_path), RANKS)
    with pytest.raises(UserError, match="no tokenizer at"):
        modeling.load_tokenizer(str(tmp_path))


SLIDING = {"sliding_window": 8}  # the rows have up to 24 tokens
MODELS = {
    "Llama": {},
    "GPT2": {},
    "Qwen2": {"use_sliding_window": True, "max_window_layers": 1, **SLIDING},  # one layer of each kind
    "Gemma3Text": {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], **SLIDING},
    "Mistral": SLIDING,  # all layers
}


def model_of(kind):
    """Random weights; fewer key heads than heads."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, **MODELS[kind]}
    if kind != "GPT2":
        sizes |= {"num_key_value_heads": 2, "intermediate_size": 48}
    config = getattr(transformers, f"{kind}Config")(**sizes, max_position_embeddings=24, initializer_range=0.3)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", MODELS)
def test_what_rows_share_is_read_once_and_changes_nothing(kind):
    model, plain, chance = model_of(kind), model_of(kind), random.Random(0)
    modeling.equip(model)
    prompt = [chance.randrange(50) for _ in range(9)]
    prompt[4] = 0  # the pad token inside a prompt is a token
    rows = [prompt, [*prompt, 1, 2, 3], [*prompt, 1, 2, 0, 0, 7], [*prompt, 5], [*prompt, 5]]
    rows += [[*prompt[:5], 6, 6, 8, 9], [4], [4, 0], [4, 0, 0, 9]]
    rows.append([chance.randrange(50) for _ in range(24)])  # beyond the window
    where = [np.arange(1, len(row)) for row in rows]
    where[1] = np.array([3, 11])
    ids, (at, cols) = modeling.pad_right(rows, 0), modeling.positions(where)
    seen = []
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, given, _: seen.append(given[0].numel()))
    found, entropy = token_logprobs(model, ids, at, cols, temperature=0.7, entropy=True)
    assert seen == [len({tuple(row[: n + 1]) for row in rows for n in range(max(1, len(row) - 1))})]
    expected, entropies = [], []
    for row, columns in zip(rows, where):
        logprobs = (plain(torch.tensor([row])).logits[0] / 0.7).log_softmax(-1)
        expected += [logprobs[c - 1, row[c]] for c in columns]
        entropies += [-(logprobs[c - 1].exp() * logprobs[c - 1]).sum() for c in columns]
    torch.testing.assert_close(found, torch.stack(expected), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(entropy, torch.stack(entropies), atol=2e-5, rtol=1e-4)
    weights = torch.rand(len(expected))
    (weights * found).sum().backward()
    (weights * torch.stack(expected)).sum().backward()
    for a, b in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", MODELS)
def test_row_cache_equals_a_plain_forward(kind):
    """Rows that grow, and go back, each at its own pace, and are kept or copied; with fewer key heads than
    heads, and with sliding windows."""
    model, plain = model_of(kind), model_of(kind)
    modeling.equip(model)
    cache, texts, chance = modeling.RowCache(model, 3), [[], [], []], random.Random(0)
    with torch.no_grad():
        for step in range(30):
            if step in (10, 20) and all(texts):
                kept = [2, 0, 2]
                cache.keep(torch.tensor(kept))
                texts = [texts[r] for r in kept]
            rows = sorted(chance.sample(range(3), chance.choice((1, 2, 3))))
            starts = [chance.randint(max(0, min(len(texts[r]), 20) - 3), min(len(texts[r]), 20)) for r in rows]
            new = [[chance.randrange(3) for _ in range(chance.randint(1, 24 - s))] for s in starts]
            new = [tokens[: chance.choice((1, 4, 24))] for tokens in new]
            hidden = cache.feed(rows, starts, new)
            for r, start, tokens, found in zip(rows, starts, new, hidden):
                texts[r] = texts[r][:start] + tokens
                whole = plain.get_decoder()(torch.tensor([texts[r]])).last_hidden_state[0]
                torch.testing.assert_close(found[: len(tokens)], whole[start:], atol=2e-5, rtol=1e-4)


def test_row_cache_refuses_what_it_cannot_do():
    def model(stateful=False, **fields):
        config = types.SimpleNamespace(get_text_config=lambda: types.SimpleNamespace(**fields))
        return types.SimpleNamespace(config=config, _is_stateful=stateful, device=torch.device("cpu"))

    for config in ({"stateful": True}, {"layer_types": ["full_attention", "linear_attention"]}):
        with pytest.raises(UserError, match="recurrent state|linear_attention"):
            modeling.RowCache(model(**config), 3)
