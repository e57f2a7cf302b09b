"""rmt.py: equations by hand, rewards and parsing, entropy and its cache, the losses, and short runs."""

import dataclasses
import inspect
import json
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import common
import modeling
import grpo_rlvr
import rmt
import texts
from common import TINY, Ranks, UserError, launch
from modeling import load_model, load_tokenizer, uniforms

ONE = Ranks(0, 1, torch.device("cpu"))
PIECES = [
    "<think>",
    "</think>",
    "\\boxed{",
    "}",
    "{",
    " the",
    " cat",
    "s",
    "\ufffd",
    "</",
    "think",
    ">",
    "}.\n",
    "",
    "<eos>",
    " box",
    "boxed",
    "\\",
]
EOS = PIECES.index("<eos>")
SHARED = (
    "rollout", "group_advantages", "completion_logprobs", "sample_batches", "score",
)  # fmt: skip
torch.set_num_threads(1)


def ids(*pieces):
    return [PIECES.index(piece) for piece in pieces]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny/model")


def tiny_llama(vocab_size=64, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    config.num_attention_heads, config.num_key_value_heads, config.initializer_range = 2, 2, 0.3
    return LlamaForCausalLM(config).eval()


# ---------------------------------------------------------------- equations 1-4


def test_token_budget_by_hand():
    # 800 * 0.2^(t/10): t = 0, 1, 5, 10
    assert [rmt.token_budget(t, 10, 800, 1, 0.2) for t in (0, 1, 5, 10)] == [800, 681, 357, 160]
    assert rmt.token_budget(10, 10, 800, 300, 0.2) == 300  # the minimum
    schedule = [rmt.token_budget(t, 317, 24, 2, 0.1) for t in range(318)]
    assert schedule == sorted(schedule, reverse=True) and isinstance(schedule[0], int)


def test_length_reward_by_hand():
    assert [rmt.length_reward(n, 8, 2.0) for n in (0, 4, 8, 12, 16, 17, 400)] == [0, 1.0, 2.0, 1.0, 0, 0, 0]
    for budget in (1, 7, 160):
        rewards = [rmt.length_reward(n, budget, 1.0) for n in range(3 * budget)]
        assert np.argmax(rewards) == budget and max(rewards) == 1 and min(rewards) == 0


def test_curriculum_by_hand():
    p1, p2 = (0.6, 0.3, 0.1), (0.1, 0.3, 0.6)
    for step, expected in (
        (0, p1),
        (30, p1),
        (40, (0.475, 0.3, 0.225)),
        (50, (0.35, 0.3, 0.35)),
        (70, p2),
        (99, p2),
    ):
        assert rmt.curriculum_probs(step, 30, 70, p1, p2) == pytest.approx(expected)
    assert all(sum(rmt.curriculum_probs(t, 30, 70, p1, p2)) == pytest.approx(1) for t in range(100))


def test_draw_positions_has_the_curriculum_s_distribution():
    levels = np.array([-1, 0, 0, 1, -1, 2, 2, 2])  # two easy, one medium, three hard
    probs, n = (0.5, 0.3, 0.2), 6000
    counts = np.zeros(8)
    for noise in uniforms((n, 1, 2), "one"):
        counts[rmt.draw_positions(levels, probs, noise)] += 1
    expected = np.array([0, 0.25, 0.25, 0.3, 0, 0.2 / 3, 0.2 / 3, 0.2 / 3])
    assert np.abs(counts / n - expected).max() < 4 * math.sqrt(0.25 / n)
    assert (counts[expected == 0] == 0).all()


def test_draw_positions_without_replacement_and_with_empty_levels():
    levels = np.array([0, 1, 1, -1, 0])
    for noise in uniforms((200, 4, 2), "all"):
        assert sorted(rmt.draw_positions(levels, (0.5, 0.1, 0.4), noise)) == [0, 1, 2, 4]  # all, each once
    first = [
        rmt.draw_positions(levels, (0.1, 0.3, 0.6), noise)[0] for noise in uniforms((2000, 1, 2), "no hard")
    ]
    assert np.isin(first, [0, 4]).mean() == pytest.approx(0.25, abs=0.05)  # hard's 0.6 shared out as 1 : 3
    assert rmt.draw_positions(levels, (0.0, 0.0, 1.0), uniforms((3, 2), "none")) == []
    assert len(rmt.draw_positions(levels, (1.0, 0.0, 0.0), uniforms((3, 2), "few"))) == 2


def test_difficulty_levels():
    text = ids(" the", " cat", "s", "{", "\ufffd", " the", " cat", " the")
    boxable = np.array([piece in (" the", " cat", "s") for piece in PIECES])
    entropy = np.array([3.0, 0.49, 0.5, 3.0, 3.0, 1.0, 1.5, 0.99])
    for first, expected in ((1, [-1, -1, 0, -1, -1, 1, 2, 0]), (3, [-1, -1, -1, -1, -1, 1, 2, 0])):
        assert rmt.difficulty(entropy, text, first, boxable, (0.5, 1.0, 1.5)).tolist() == expected


# ---------------------------------------------------------------- responses and rewards


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (("<think>", " the", " cat", "</think>", "\\boxed{", " the", "}"), (2, " the")),
        (("<think>", "</think>", "\\boxed{", " the", "s", "}"), (0, " thes")),  # empty thought
        (("<think>", "{", "}", "</think>", " the", "\\boxed{", "s", "}.\n"), (2, "s")),  # words before, after
        (("<think>", "\\boxed{", "s", "}", "</think>", "\\boxed{", " cat", "}"), (3, " cat")),  # a box in it
        (("<think>", "s", "</", "think", ">", "\\boxed{", "s", "}"), (1, "s")),  # a tag of several tokens
        (("<think>", "s", "</think>", "\\boxed{", "}"), (1, "")),
        ((" the", "</think>", "\\boxed{", "s", "}"), None),  # not opened
        (("<think>", " the", "\\boxed{", "s", "}"), None),  # not closed
        (("<think>", "<think>", "</think>", "\\boxed{", "s", "}"), None),  # nested
        (("<think>", "s", "</think>", "</think>", "\\boxed{", "s", "}"), None),
        (("<think>", "s", "</think>", "\\boxed{", "{", "s", "}", "}"), None),  # a brace in the box
        (("<think>", "s", "</think>", "\\boxed{", "s"), None),  # cut off
        (("<think>", "s", "</think>", "s"), None),
        (("s", "<think>", "s", "</think>", "\\boxed{", "s", "}"), None),  # text before the thought
        ((), None),
    ],
)
def test_read_response(pieces, expected):
    assert rmt.read_response(ids(*pieces), PIECES, opened=False) == expected


def test_read_response_after_a_prompt_that_opened_the_thought():
    completion = ids(" the", " cat", "</think>", "\\boxed{", "s", "}")
    assert rmt.read_response(completion, PIECES, opened=True) == (2, "s")
    assert rmt.read_response(ids("<think>") + completion, PIECES, opened=True) is None


def test_matches():
    truth = [" the", " cat", "s"]
    for answer, exact, prefix in [
        (" the", True, True),
        (" the cat", False, True),  # two whole tokens
        (" the cats", False, True),
        (" the ca", False, False),  # inside a token
        (" th", False, False),
        ("the", False, False),  # the space counts
        (" the cats!", False, False),  # goes beyond
        ("", False, False),
        (" cat", False, False),
    ]:
        assert rmt.matches(answer, truth, "exact") is exact, answer
        assert rmt.matches(answer, truth, "prefix") is prefix, answer
    assert not rmt.matches("s\ufffd", ["s", "\ufffd"], "prefix")  # a part of a character is no text


def test_token_texts_and_boxable(tokenizer):
    texts = rmt.token_texts(tokenizer, len(tokenizer))
    sample = "def f(x):\n    return {'a': x}  # é\n"
    tokens = tokenizer.encode(sample, add_special_tokens=False)
    assert (
        "".join(texts[i] for i in tokens if "\ufffd" not in texts[i]) in sample.replace("é", "")
        or "é" in texts
    )
    boxable = rmt.boxable_tokens(tokenizer, texts)
    assert not boxable[tokenizer.eos_token_id]
    for i in range(len(texts)):
        if boxable[i]:
            assert not {*texts[i]} & {*"{}"} and texts[i] == tokenizer.decode([i])


# ---------------------------------------------------------------- entropy and its cache


def test_top_entropy_against_brute_force():
    logits = 3 * torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    for row, entropy in zip(logits, texts.top_entropy(logits)):
        best = sorted(row.softmax(-1).tolist(), reverse=True)[:16]
        assert entropy.item() == pytest.approx(
            -sum(p / sum(best) * math.log(p / sum(best)) for p in best), abs=1e-5
        )
    assert texts.top_entropy(torch.zeros(64)).item() == pytest.approx(math.log(16))


def test_score_texts_position_by_position(monkeypatch):
    monkeypatch.setattr(texts, "LOGITS_PER_CHUNK", 3 * 64)  # so that the logits are made in parts
    model = tiny_llama()
    modeling.equip(model)
    rows = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17]]
    entropies, predictions = texts.score_texts(model, rows, 8, ONE, "")
    for row, entropy, prediction in zip(rows, entropies, predictions):
        assert len(entropy) == len(prediction) == len(row) and entropy[0] == 0
        for t in range(1, len(row)):
            logits = model(torch.tensor([row[:t]])).logits[0, -1]
            assert entropy[t] == pytest.approx(texts.top_entropy(logits).item(), abs=1e-4)
            assert prediction[t] == logits.argmax()


def test_entropies_are_kept_and_invalidated(tokenizer, tmp_path, monkeypatch):
    calls = []

    def stand_in(model, rows, *_):
        calls.append(1)
        return [np.full(len(row), 0.7, np.float32) for row in rows], None

    monkeypatch.setattr(texts, "score_texts", stand_in)
    tiny_llama().save_pretrained(tmp_path / "model")
    args = rmt.Args(model=str(tmp_path / "model"))
    run = SimpleNamespace(path=tmp_path / "run", ranks=ONE)

    def entropies(rows):
        return texts.proxy_entropies(None, tokenizer, rows, args, run)

    first, again = entropies([[5, 6, 7], [8, 9]]), entropies([[5, 6, 7], [8, 9]])
    assert len(calls) == 1 and [e.tolist() for e in first] == [e.tolist() for e in again]
    entropies([[5, 6], [7, 8, 9]])  # other windows over the same tokens
    entropies([[5, 6, 7], [8, 10]])
    assert len(calls) == 3
    tiny_llama(seed=1).save_pretrained(tmp_path / "model")  # other weights under the same name
    entropies([[5, 6, 7], [8, 9]])
    assert len(calls) == 4 and len(list((tmp_path / "entropies").glob("*.npy"))) == 4


# ---------------------------------------------------------------- where a response ends


def ends_of(*pieces, prompt=" the"):
    table = rmt.end_table(PIECES, {EOS})
    return rmt.is_end(table, torch.tensor([ids(prompt, *pieces)]))[0].tolist()


@pytest.mark.parametrize(
    ("pieces", "end"),
    [
        (
            ("<think>", "s", "</think>", "\\boxed{", "s", "}", "}"),
            5,
        ),  # the first closing brace, not the second
        (
            ("<think>", "{", "}", "\\boxed{", "s", "}", "</think>", "}", "\\boxed{", "s", "}.\n"),
            10,
        ),  # not in it
        (
            ("s", "</", "think", ">", "\\boxed{", "}"),
            5,
        ),  # the prompt opened the thought; a tag of several tokens
        (("<think>", "s", "think", "\\boxed{", "}", "<eos>"), 5),
        (("<think>", "s", "\\boxed{", "}"), None),
        (("<think>", "s", "</think>", " box", "{", "s", "}", "\\", "boxed", "{", "s", "}"), 11),  # no \\box
    ],
)
def test_a_response_ends_at_the_closing_brace(pieces, end):
    assert [k for k, ended in enumerate(ends_of(*pieces)) if ended][:1] == ([] if end is None else [end])


def test_rollout_stops_there_and_nowhere_else(tokenizer):
    """The model is replaced by scripts of tokens; rows end at different steps; thoughts hold braces."""
    texts = rmt.token_texts(tokenizer, len(tokenizer))
    table = rmt.end_table(texts, {tokenizer.eos_token_id})
    scripts = [
        "<think>{a} \\boxed{b}</think>\\boxed{ is} and on",
        "<think>x</think>\\boxed{s}}}",
        "<think>never ends",
    ]
    encoded = [tokenizer.encode(script + " more" * 70)[:64] for script in scripts]
    noise = torch.arange(3)[:, None] + torch.arange(64) / 64  # says which row and step it is

    def scripted(probs, noise):
        return torch.tensor([encoded[int(u)][round(u % 1 * 64)] for u in noise.tolist()])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rmt, "inverse_cdf", scripted)
        model = load_model("tiny/model", Ranks(0, 1, torch.device("cpu")))
        rows = rmt.rollout(model, [[5, 6], [5, 6, 7], [8]], noise, 1.0, table)
    responses = [tokenizer.decode(completion) for completion, _, _ in rows]
    assert responses[0] == "<think>{a} \\boxed{b}</think>\\boxed{ is}"
    assert responses[1] == "<think>x</think>\\boxed{s}" and [row[2] for row in rows] == [True, True, False]
    assert len(rows[2][0]) == 64
    assert rmt.read_response(rows[0][0], texts, False)[1] == " is"


# ---------------------------------------------------------------- loss


def test_rl_loss_is_equation_7_by_autograd():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 3, 5, generator=generator, requires_grad=True)  # [B, T, V]
    ref = torch.randn(2, 3, 5, generator=generator).log_softmax(-1)
    tokens, beta, responses = torch.tensor([[1, 4, 0], [2, 3, 0]]), 0.3, 6
    mask, advantages = torch.tensor([[1, 1, 0], [1, 1, 1]]), torch.tensor([0.7, -1.2])
    logprobs = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    ref_logprobs = ref.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    loss, kl = rmt.rl_loss(logprobs, ref_logprobs, advantages, mask, beta, responses)
    value, kl_value = 0.0, 0.0
    for b in range(2):
        sequence = 0.0
        for t in range(3):
            if mask[b, t]:
                p, r = logprobs[b, t], ref_logprobs[b, t]
                kl_value = kl_value + (torch.exp(r - p) - (r - p) - 1)
                sequence = sequence + p
        value = value + advantages[b] * sequence
    expected = -(value - beta * kl_value) / responses
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6) and kl == pytest.approx(
        kl_value.item(), abs=1e-6
    )
    (got,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (want,) = torch.autograd.grad(expected, logits, retain_graph=True)
    assert torch.allclose(got, want, atol=1e-6)
    # one update per rollout: the same gradient as the ratio form at ratio 1
    ratio_form = -(advantages.unsqueeze(-1) * (logprobs - logprobs.detach()).exp() * mask).sum() / responses
    plain, _ = rmt.rl_loss(logprobs, None, advantages, mask, 0.0, responses)
    assert torch.allclose(
        torch.autograd.grad(plain, logits, retain_graph=True)[0],
        torch.autograd.grad(ratio_form, logits)[0],
        atol=1e-6,
    )


def test_ntp_loss_leaves_out_exactly_the_chosen_positions(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    model = load_model(str(tmp_path), ONE)
    rows, kept = [[5, 6, 7, 8, 9], [10, 11, 12], [13, 14]], [[1, 3], [2], []]  # of the last one nothing is left
    terms = []
    for row, cols in zip(rows, kept):
        for t in cols:
            terms.append(-model(torch.tensor([row[:t]])).logits[0, -1].log_softmax(-1)[row[t]])
    kept = [np.array(cols, dtype=np.int64) for cols in kept]
    loss = rmt.ntp_loss(model, rows, kept, tokens=3)
    assert loss.item() == pytest.approx(torch.stack(terms).mean().item(), abs=1e-5)
    got = torch.autograd.grad(loss, list(model.parameters()))
    want = torch.autograd.grad(torch.stack(terms).mean(), list(model.parameters()))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want))
    nothing = rmt.ntp_loss(model, rows[2:], kept[2:], tokens=1)
    nothing.backward()
    assert nothing.item() == 0


def test_a_step_raises_the_rewarded_response_and_the_text(tmp_path):
    """Eq. (9) with its sign put right: both terms improve, and micro-batches add up to one batch."""
    tiny_llama().save_pretrained(tmp_path)
    text, kept = [20, 21, 22, 23, 24, 25], np.array([1, 2, 4, 5])
    after = []
    for micro_batch_tokens in (4096, 1):
        model = load_model(str(tmp_path), ONE)
        samples = [rmt.Sample(0, [], [5, 6, 7], completion, [0.0] * len(completion), True, advantage=advantage)
                   for completion, advantage in (([30, 31], 1.0), ([32, 33, 34], -1.0))]  # fmt: skip
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
        args = rmt.Args(micro_batch_tokens=micro_batch_tokens, temperature=1.0, max_grad_norm=100.0)

        def measure(model=model, samples=samples):
            with torch.no_grad():
                rl = rmt.completion_logprobs(model, samples, 1.0)[0].sum(1)
                return [*rl.tolist(), rmt.ntp_loss(model, [text], [kept], 4).item()]

        before = measure()
        sums, norm = rmt.train_batch(model, optimizer, samples, [(text, kept)] * 2, 2, 8, args, ONE)
        good, bad, ntp = measure()
        assert good > before[0] and bad < before[1] and ntp < before[2]
        assert sums["ntp_loss"] == pytest.approx(before[2], abs=1e-5)
        after.append((good, bad, ntp, norm))
    assert after[0] == pytest.approx(after[1], rel=1e-4)


def test_ntp_weight_scales_its_gradient_and_zero_leaves_it_out(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    norms = {}
    for weight in (0.0, 0.1, 0.2):
        model = load_model(str(tmp_path), ONE)
        sample = rmt.Sample(0, [], [5, 6], [7, 8], [0.0, 0.0], True, advantage=0.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        args = rmt.Args(ntp_weight=weight)
        rows = [([9, 10, 11], np.array([2]))]
        _, norms[weight] = rmt.train_batch(model, optimizer, [sample], rows, 1, 1, args, ONE)
    assert norms[0.0] == 0 and norms[0.2] == pytest.approx(2 * norms[0.1], rel=1e-4) and norms[0.1] > 0


# ---------------------------------------------------------------- prompts and data


def test_prompt_is_the_one_the_tiny_model_knows(tokenizer):
    head, tail, _ = rmt.prompt_frame(tokenizer, 12, True)  # it has no template
    assert tokenizer.decode(head + tail) == (
        "Complete the given text by predicting the next token. Think in exactly 12 tokens within "
        "<think></think>, then put the next token in \\boxed{}.\n### Text\n\n### Prediction\n"
    )
    free, _, opens = rmt.prompt_frame(tokenizer, 0, True)
    assert "token. Think within <think></think>, then put" in tokenizer.decode(free) and not opens


def test_prompt_with_a_chat_template(tokenizer):
    for suffix, expected in (("<|a|>", False), ("<|a|><think>{{ '\\n' }}", True)):
        tokenizer.chat_template = "<|u|>{{ messages[0]['content'] }}" + suffix
        head, tail, opens = rmt.prompt_frame(tokenizer, 12, True)
        tokenizer.chat_template = None
        assert opens is expected and tokenizer.decode(tail).startswith("\n### Prediction\n<|a|>")
        assert tokenizer.decode(head).startswith("<|u|>Complete the given text")


def test_texts_are_split_once_and_for_all(tokenizer, tmp_path):
    rows = [{"problem": f"What is {i} + {i}?", "solution": f"It is {2 * i}." * 8} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = rmt.Args(dataset=(str(tmp_path / "a.jsonl"),), train_texts=60, eval_texts=20, max_text_tokens=24)
    train, heldout = rmt.read_texts(args, tokenizer)
    assert len(train) == 60 and len(heldout) == 20 and max(map(len, train)) <= 24
    again, _ = rmt.read_texts(dataclasses.replace(args, seed=5), tokenizer)
    assert train == again  # not by the run's seed
    assert not {tuple(text) for text in train if len(text) == 24} & {tuple(text) for text in heldout}
    tokenizer.bos_token, before = tokenizer.eos_token, tokenizer.bos_token
    begun, _ = rmt.read_texts(args, tokenizer)  # BOS comes before each, and takes no room of theirs
    tokenizer.bos_token = before
    assert begun == [[tokenizer.eos_token_id, *text] for text in train]
    with pytest.raises(UserError, match="no column `text`; it has: problem, solution"):
        rmt.read_texts(dataclasses.replace(args, text_column=("text",)), tokenizer)


def test_sources_give_the_texts_that_their_weights_say(tokenizer, tmp_path):
    for name in "ab":
        rows = [json.dumps({"text": f"{name} {k}"}) for k in range(200)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    sources = (str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    args = rmt.Args(dataset=sources, text_column=("text",), train_texts=80, eval_texts=20)
    for weights, shares in (((0.9, 0.1), (72, 18)), ((3.0, 1.0), (60, 15)), ((1.0,), (40, 10))):
        parts = rmt.read_texts(dataclasses.replace(args, dataset_weights=weights), tokenizer)
        found = [sum(tokenizer.decode(text).startswith("a") for text in part) for part in parts]
        assert tuple(found) == shares and [len(part) for part in parts] == [80, 20]


# ---------------------------------------------------------------- runs

SMALL = rmt.TINY_RUN | {
    "train_texts": 24,
    "eval_texts": 8,
    "max_text_tokens": 32,
    "prompts_per_update": 4,
    "group_size": 4,
    "max_new_tokens": 16,
    "initial_budget": 6,
    "updates": 3,
    "eval_positions": 4,
    "beta": 0.01,
}
ROOT = Path(rmt.__file__).parent


def run_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(row):
    return {key: value for key, value in row.items() if not key.startswith(("time/", "perf/"))}


def weights(folder):
    return load_model(str(folder / "checkpoints" / "final"), ONE).state_dict()


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rmt") / "run"
    rmt.main(rmt.Args(**SMALL, output_dir=str(folder)))
    return folder


def test_run_folder(small_run):
    metrics = run_metrics(small_run)
    assert [row["update"] for row in metrics] == [0, 1, 2, 3]
    assert [row["rollout/budget"] for row in metrics[1:]] == [6, 4, 3]  # 6 x 0.4^(t/3), t = 0, 1, 2
    for row in (metrics[0], metrics[3]):
        assert {f"eval/{kind}_{level}" for kind in ("ntp", "ntr") for level in rmt.LEVELS} <= row.keys()
    assert [row["eval/budget"] for row in (metrics[0], metrics[3])] == [6, 2]
    assert all(row["policy/rollout_ratio"] == pytest.approx(1, abs=1e-3) for row in metrics[1:])
    assert all(row["optim/skipped"] == 0 and math.isfinite(row["optim/grad_norm"]) for row in metrics[1:])
    for name in ("entropy.png", "curves.png", "samples.md", "args.json", "rmt.py"):
        assert (small_run / name).exists(), name
    documented = (ROOT / "docs" / "rmt.md").read_text()
    assert [name for name in sorted(set().union(*metrics)) if f"`{name}`" not in documented] == []


def test_kill_and_resume_is_the_same_run_bit_for_bit(small_run, monkeypatch):
    folder, original = small_run.parent / "killed", rmt.train_batch

    def killed(*args):
        os.kill(os.getpid(), signal.SIGTERM)  # the loop saves after this update and leaves
        return original(*args)

    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(rmt, "train_batch", killed)
        rmt.main(rmt.Args(**SMALL, output_dir=str(folder)))
    assert [row["update"] for row in run_metrics(folder)] == [0, 1]
    with pytest.raises(UserError, match="ntp-weight"):
        rmt.main(rmt.Args(**SMALL | {"ntp_weight": 0.5}, resume=str(folder)))
    rmt.main(rmt.Args(**SMALL, resume=str(folder)))
    assert list(map(without_times, run_metrics(small_run))) == list(map(without_times, run_metrics(folder)))
    first, second = weights(small_run), weights(folder)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_gradient_that_is_not_finite_is_skipped(small_run, monkeypatch):
    original = rmt.rl_loss
    monkeypatch.setattr(rmt, "rl_loss", lambda *a: (original(*a)[0] * math.nan, original(*a)[1]))
    folder = small_run.parent / "nan"
    monkeypatch.setattr(common, "MAX_SKIPPED", 2)
    with pytest.raises(UserError, match="2 updates in a row without a finite loss and gradient"):
        rmt.main(rmt.Args(**SMALL, output_dir=str(folder)))
    assert [row["optim/skipped"] for row in run_metrics(folder)[1:]] == [1, 2]


def test_levels_without_a_position(small_run):
    with pytest.raises(UserError, match="no position reaches an entropy of 7 nats"):
        rmt.main(rmt.Args(**SMALL | {"thresholds": (7, 8, 9)}, output_dir=str(small_run.parent / "easy")))
    levels = [np.array([-1, 0, 1]), np.array([-1, 1])]
    with pytest.raises(UserError, match="no held-out position is hard: raise --eval-texts"):
        rmt.heldout_positions(levels, 4)
    found = rmt.heldout_positions([*levels, np.array([2])], 9)  # nested: what is hard is also easy
    assert [sum(level == d for *_, level in found) for d in range(3)] == [4, 3, 1]


def test_a_run_of_no_updates_evaluates(small_run):
    folder = small_run.parent / "none"
    rmt.main(rmt.Args(**SMALL | {"updates": 0}, output_dir=str(folder)))
    assert without_times(run_metrics(folder)[0]) == without_times(run_metrics(small_run)[0])


def test_two_ranks_of_the_script_equal_one(small_run):
    folder = small_run.parent / "two"
    changed = [
        f"--{key.replace('_', '-')}={SMALL[key]}" for key in SMALL if SMALL[key] != rmt.TINY_RUN.get(key)
    ]
    command = [
        sys.executable,
        "rmt.py",
        "--tiny",
        *changed,
        f"--output-dir={folder}",
        "--micro-batch-tokens=300",
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            command, cwd=ROOT, env=shared | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE
        )
        for rank in "01"
    ]
    errors = [rank.communicate(timeout=300)[1].decode()[-2000:] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    for one, two in zip(run_metrics(small_run), run_metrics(folder), strict=True):
        assert without_times(two) == pytest.approx(without_times(one), rel=2e-3, abs=2e-4)
    first, second = weights(small_run), weights(folder)
    assert max((first[key] - second[key]).abs().max().item() for key in first) < 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "./nowhere"], "nowhere"),
        (["--p1", "0.5", "0.5", "0.5"], "--p1 must be three probabilities"),
        (["--dataset", "./none.jsonl"], "no such data file"),
        (["--text-column", "problem"], "has no column `problem`; it has: text"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, capfd, monkeypatch):
    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(sys, "argv", ["rmt.py", "--tiny", *arguments])
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as left:
        launch(rmt.main, rmt.parse_args())
    error = capfd.readouterr().err.strip().splitlines()
    assert left.value.code == 2 and len(error) == 1 and error[0].startswith("error: ") and message in error[0]


def test_functions_that_both_scripts_need_are_the_same():
    for name in SHARED:
        assert inspect.getsource(getattr(rmt, name)) == inspect.getsource(getattr(grpo_rlvr, name)), name


def test_grpo_starts_from_the_checkpoint(small_run):
    """RMT's continual post-training: grpo_rlvr.py --task math from what this script wrote."""
    folder = small_run.parent / "grpo"
    files = {"dataset": f"{TINY}/math_train.jsonl", "eval_dataset": f"{TINY}/math_heldout.jsonl"}
    sizes = {"updates": 1, "prompts_per_update": 4, "group_size": 2, "eval_problems": 4, "max_new_tokens": 8}
    model = {"model": str(small_run / "checkpoints" / "final"), "output_dir": str(folder)}
    grpo_rlvr.main(grpo_rlvr.Args(**grpo_rlvr.MATH | grpo_rlvr.TINY_RUN | files | sizes | model))
    assert (folder / "checkpoints" / "final" / "config.json").exists()
    assert [row["update"] for row in run_metrics(folder)] == [0, 1]
