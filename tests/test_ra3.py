"""ra3.py: segmentation by tokens, the sampler as a distribution, reward, returns, the gradient, the loop."""

import ast
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import modeling
import ra3
import snippets
from common import Ranks, UserError, read_rows
from modeling import EVENT, uniforms
from snippets import segment

ROOT = Path(__file__).parent.parent
RANKS = Ranks(0, 1, torch.device("cpu"))
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ARGS = dataclasses.replace(ra3.TINY_DEFAULTS, max_latent_tokens=16, micro_batch_tokens=2048)


@pytest.fixture(scope="session")
def stdlib():
    return [row["text"] for row in read_rows("stdlib")]


def train_tokenizer(kind, texts):
    """A small tokenizer of each kind, trained here: byte-level BPE with Qwen's or GPT-2's words, or SentencePiece-like."""
    if kind == "sentencepiece":
        core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        core.normalizer = normalizers.Replace(" ", "\u2581")
        core.decoder = decoders.Sequence(
            [
                decoders.Replace("\u2581", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
        core.pre_tokenizer = pre_tokenizers.Split(Regex("\n|\u2581*[^\u2581\n]+"), "isolated")
        core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1400, special_tokens=special))
        core.model = models.BPE(
            vocab=json.loads(core.to_str())["model"]["vocab"],
            merges=[tuple(m) for m in json.loads(core.to_str())["model"]["merges"]],
            byte_fallback=True,
            unk_token="<unk>",
        )
        core = Tokenizer.from_str(json.dumps(json.loads(core.to_str()) | {"added_tokens": []}))
        return PreTrainedTokenizerFast(
            tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
    core = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2")
    split = pre_tokenizers.Split(Regex(QWEN), "isolated")
    core.pre_tokenizer = byte_level if kind == "gpt2" else pre_tokenizers.Sequence([split, byte_level])
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", clean_up_tokenization_spaces=False
    )


@pytest.fixture(scope="session", params=["qwen", "gpt2", "sentencepiece"])
def tokenizer(request, stdlib):
    return request.param, train_tokenizer(request.param, stdlib[::40])


def check_segments(text, vocabulary, rng):
    """Segments concatenate to the text; arbitrary thoughts leave the syntax tree as it was."""
    snippet = segment(text, vocabulary, 10**9, 10**9, 16)
    if snippet is None:
        return None
    edges = [0, *snippet.starts[snippet.boundaries], len(text)]
    spans = [0, *snippet.boundaries - 1, len(snippet.ids) - 2]
    code = snippet.ids[1:-1].tolist()
    for t in rng.sample(range(len(edges) - 1), min(3, len(edges) - 1)):  # decoding is slow: three of them
        piece = vocabulary.decode([code[spans[t] : spans[t + 1]]])[0]
        assert piece == text[edges[t] : edges[t + 1]]
    for boundary, indent in zip(snippet.boundaries, snippet.indents):
        start = snippet.starts[boundary]
        assert "".join(vocabulary.text[i] for i in indent) == text[text.rfind("\n", 0, start) + 1 : start]
    latents = {
        t: rng.choice(["# x\n", "#\n", ' # \'""" ([{ \\\n', "#\t\x0c\u2028 \ufffd\n"])
        for t in range(len(snippet.kinds))
    }
    latents = {t: z for t, z in latents.items() if rng.random() < 0.5}
    return ra3.bootstrap_text(snippet, latents)


@functools.cache
def tree(text):
    return hashlib.sha256(ast.dump(ast.parse(text)).encode()).digest()


known_starts = functools.cache(snippets.action_starts)  # they do not depend on the tokenizer


def test_every_file_of_the_standard_library(tokenizer, stdlib, monkeypatch):
    monkeypatch.setattr(snippets, "action_starts", known_starts)
    vocabulary = ra3.Vocabulary(tokenizer[1], len(tokenizer[1]), "cpu")
    rng = random.Random(0)
    boundaries = 0
    for text in stdlib:
        bootstrapped = check_segments(text, vocabulary, rng)
        if not text or any(token in text for token in tokenizer[1].all_special_tokens):
            assert bootstrapped is None  # an empty __init__.py; a file that spells "<s>"
            continue
        assert bootstrapped is not None, "the tokenizer must give every file back"
        boundaries += bootstrapped != text
        assert hashlib.sha256(ast.dump(ast.parse(bootstrapped)).encode()).digest() == tree(text)
    assert boundaries > 0.9 * len([t for t in stdlib if len(t) > 200])


@pytest.mark.parametrize(
    "text",
    [
        "if a:\r\n\tb = 1\r\n\tc = 2\r\n",
        "\x0cdef f():\n\treturn 1",
        "print 'x'\nexec y\n",
        "# only a comment\n",
        "",
        "x = '\u00e9\U0001f600\u4e2d'\n\u00e9 = 2\n",
        "\n\n  \n",
        "a = 1\rb = 2\n",
        "\ufffd = broken bytes\n",
    ],
)
def test_odd_texts_do_not_break_segmentation(tokenizer, text):
    vocabulary = ra3.Vocabulary(tokenizer[1], len(tokenizer[1]), "cpu")
    bootstrapped = check_segments(text, vocabulary, random.Random(0))
    assert bootstrapped is not None or not text
    try:
        tree = ast.dump(ast.parse(text))
    except SyntaxError:
        return
    assert ast.dump(ast.parse(bootstrapped or "")) == tree


def test_long_texts_end_at_an_action_and_fit_with_the_longest_thoughts(tokenizer):
    vocabulary = ra3.Vocabulary(tokenizer[1], len(tokenizer[1]), "cpu")
    text = "".join(f"value_{i} = {i} + 1\n" for i in range(100))
    snippet = segment(text, vocabulary, 200, 10**6, 16)
    assert len(snippet.ids) <= 200 and snippet.text.endswith("\n") and text.startswith(snippet.text)
    assert snippet.ids[-1] != tokenizer[1].eos_token_id  # a cut text has no end
    snippet = segment(text, vocabulary, 10**6, 300, 16)
    assert 100 < snippet.width(ARGS.max_latent_tokens) <= 300


# ---------------------------------------------------------------- a case small enough to enumerate

TOKENS = ["<eos>", "a", "=", "1", "\n", "#", " #", "x", "\r", "\n\n"]


def small_world(seed=0, max_latent_tokens=2, text="a=1\na=a\n"):
    """A vocabulary of ten tokens, a random model, and a snippet of two actions."""
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate(TOKENS)}, unk_token="x"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n| #|[^\n]"), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", clean_up_tokenization_spaces=False
    )
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.35,
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config = (
        GenerationConfig()
    )  # as load_model does: no eos, no sampling settings of its own
    modeling.equip(model)
    args = dataclasses.replace(ARGS, max_latent_tokens=max_latent_tokens, entropy_coef=0.0, penalty=0.3)
    vocabulary = ra3.Vocabulary(tokenizer, len(TOKENS), "cpu")
    snippet = segment(text, vocabulary, 64, 128, max_latent_tokens)
    assert len(snippet.boundaries) == 2 and vocabulary.newline == 4
    assert [TOKENS[i] for i in vocabulary.opens.nonzero().flatten()] == ["#", " #"]
    return model, vocabulary, snippet, args


def enumerate_latents(max_latent_tokens):
    """All z_t: act (None), or the tokens that q draws until the thought ends, breaks off or is too long."""
    closing = {TOKENS.index(t) for t in ("<eos>", "\r", "\n\n", "\n")}
    latents, open_ones = [None], [[5], [6]]
    while open_ones:
        z = open_ones.pop()
        if z[-1] in closing or len(z) == max_latent_tokens:
            latents.append(tuple(z))
        else:
            open_ones += [[*z, token] for token in range(len(TOKENS))]
    return latents


def enumerate_rollouts(snippet, vocabulary, args):
    """Every possible rollout, written down independently of the sampler."""
    b0, b1 = snippet.boundaries
    parts = [snippet.ids[b0:b1].tolist(), snippet.ids[b1:].tolist()]
    for latents in itertools.product(enumerate_latents(args.max_latent_tokens), repeat=2):
        columns = [(int(snippet.ids[0]), ra3.FORCED, -1, False, False)]
        for t, (z, part) in enumerate(zip(latents, parts)):
            for k, token in enumerate(z or ()):
                last = k == len(z) - 1
                bad = last and TOKENS[token] != "\n"
                columns.append((4 if bad else token, token, t, False, bad))
            for k, token in enumerate(part):
                columns.append((token, EVENT if z is None and k == 0 else ra3.FORCED, t, True, False))
        ids, targets, actions, expert, malformed = (np.array(c) for c in zip(*columns))
        yield latents, ra3.Rollout(snippet, ids, targets, actions, expert, malformed)


def exact_logq(model, r, vocabulary, temperature=1.0):
    """log q of a rollout's latents [number of drawn tokens], by one plain forward pass and plain arithmetic."""
    logits = model(torch.from_numpy(r.ids)[None]).logits[0] / temperature
    probs = logits.double().softmax(-1)
    out = []
    for k in np.flatnonzero(r.targets != ra3.FORCED):
        p = probs[k - 1]
        out.append((1 - p[5] - p[6]).log() if r.targets[k] == EVENT else p[r.targets[k]].log())
    return torch.stack(out)


def test_the_sampler_is_the_distribution_q():
    model, vocabulary, snippet, args = small_world()
    args = dataclasses.replace(args, temperature=1.3, rollout_rows=4000)
    with torch.no_grad():
        exact = {
            z: exact_logq(model, r, vocabulary, 1.3).sum().exp().item()
            for z, r in enumerate_rollouts(snippet, vocabulary, args)
        }
    assert math.isclose(sum(exact.values()), 1, abs_tol=1e-6)
    n = 8000
    noise = uniforms((n, snippet.width(2)), "test")
    counts = dict.fromkeys(exact, 0)
    for r in ra3.rollout(model, [snippet] * n, noise, vocabulary, args):
        z = [tuple(r.targets[(r.actions == t) & (r.targets >= 0)].tolist()) or None for t in range(2)]
        counts[tuple(z)] += 1  # KeyError: something outside the support was sampled
    chi2 = sum((counts[z] - n * p) ** 2 / (n * p) for z, p in exact.items() if n * p >= 5)
    rare = sum(p for p in exact.values() if n * p < 5)
    cells = sum(n * p >= 5 for p in exact.values())
    assert cells > 20 and chi2 < cells + 5 * math.sqrt(2 * cells), (chi2, cells)
    assert abs(sum(c for z, c in counts.items() if n * exact[z] < 5) / n - rare) < 0.01
    thinks = sum(c for z, c in counts.items() if z[0] is not None) / n
    expected = sum(p for z, p in exact.items() if z[0] is not None)
    assert 0.05 < expected < 0.95 and abs(thinks - expected) < 4 * math.sqrt(0.25 / n)


@pytest.mark.parametrize("draft", [1, 3, 100])
def test_what_was_drawn_is_what_a_plain_forward_over_the_final_sequence_draws(draft, monkeypatch):
    """Rows of other lengths and other thoughts in one batch: nothing that was drafted in vain is left over."""
    monkeypatch.setattr(ra3, "DRAFT", draft)
    model, vocabulary, snippet, args = small_world(max_latent_tokens=5, seed=4)
    texts = ("a\n", "a=1\na=a\n=\n", "a\n1=\n" * 4)
    others = [segment(text, vocabulary, 64, 128, 5) for text in texts]
    noise = uniforms((120, others[-1].width(5)), "logq")
    rollouts = ra3.rollout(model, [snippet, *others] * 30, noise, vocabulary, args)
    for r, row_noise in zip(rollouts, noise):
        drawn = r.targets != ra3.FORCED
        probs = model(torch.from_numpy(r.ids)[None]).logits[0].softmax(-1)
        k = np.flatnonzero(drawn)  # what a plain forward over the final text draws with the same noise
        again = modeling.inverse_cdf(probs[k - 1], row_noise[k - 1]).numpy()
        acts = r.targets[k] == EVENT
        assert (again[~acts] == r.targets[k][~acts]).all() and not vocabulary.opens[again[acts]].any()
        assert (r.ids[r.expert] == r.snippet.ids[1:]).all()  # the expert's tokens are all there, in order
        assert set(r.actions[drawn]) == set(range(len(r.snippet.boundaries)))  # one latent before each action
    assert any(r.malformed.any() for r in rollouts) and any(len(set(r.actions[r.targets >= 0])) > 3 for r in rollouts)
    monkeypatch.setattr(ra3, "DRAFT", 2)
    for a, b in zip(rollouts, ra3.rollout(model, [snippet, *others] * 30, noise, vocabulary, args)):
        assert (a.ids == b.ids).all()


def test_noise_belongs_to_a_row_not_to_a_batch():
    model, vocabulary, snippet, args = small_world(max_latent_tokens=4)
    noise = uniforms((12, snippet.width(4)), "rows")
    whole = ra3.rollout(model, [snippet] * 12, noise, vocabulary, args)
    small = dataclasses.replace(args, rollout_rows=5)
    for a, b in zip(whole, ra3.rollout(model, [snippet] * 12, noise, vocabulary, small)):
        assert (a.ids == b.ids).all()


def test_updates_sampled_at_once_equal_those_sampled_one_by_one():
    model, vocabulary, snippet, args = small_world(max_latent_tokens=4)
    longer = segment("a\n" * 9, vocabulary, 64, 1024, 4)
    assert longer.width(4) > snippet.width(4)  # the noise of an update is as wide as its longest snippet
    batches, ranks = [[snippet] * 4, [snippet, longer] * 2, [snippet] * 2], Ranks(1, 2, None)
    at_once = ra3.sample(model, batches, [("M", i, 0) for i in (7, 8, 9)], vocabulary, args, ranks)
    assert [len(rollouts) for rollouts in at_once] == [2, 2, 1]
    thoughts = 0
    for index, (batch, rollouts) in enumerate(zip(batches, at_once), start=7):
        (alone,) = ra3.sample(model, [batch], [("M", index, 0)], vocabulary, args, ranks)
        for a, b in zip(rollouts, alone, strict=True):
            assert (a.ids == b.ids).all()
            thoughts += len(a.thoughts(vocabulary))
    assert thoughts


def test_indentation_is_forced_again_after_a_thought(tokenizer):
    vocabulary = ra3.Vocabulary(tokenizer[1], len(tokenizer[1]), "cpu")
    text = "if a:\n        b = 1\n        c = 2\n"
    snippet = segment(text, vocabulary, 64, 1024, 16)
    rows, scores = 200, torch.full((1, len(vocabulary.text)), -3.0)
    scores[:, vocabulary.opens] = 4.0  # a stand-in for a model: mostly opens thoughts, often ends them
    scores[:, vocabulary.newline] = 6.0
    stand_in = types.SimpleNamespace(
        device=torch.device("cpu"),
        config=LlamaConfig(attn_implementation="sdpa"),
        last_hidden_state=lambda ids, **_: torch.zeros(*ids.shape, 1),
        lm_head=lambda hidden: scores.expand(len(hidden), -1),
    )
    rollouts = ra3.rollout(stand_in, [snippet] * rows, uniforms((rows, snippet.width(16)), "i"), vocabulary, ARGS)
    assert sum(len(r.thoughts(vocabulary)) for r in rollouts) > 50
    for r in rollouts:
        written = vocabulary.decode([r.ids[1:].tolist()])[0].split(tokenizer[1].eos_token)[0]
        assert ast.dump(ast.parse(written)) == ast.dump(ast.parse(text))
        lines = [line for line in written.split("\n") if "#" not in line]
        assert lines == text.split("\n")


def test_malformed_thoughts_become_act_in_the_m_step():
    model, vocabulary, snippet, args = small_world()
    seen = 0
    for _, r in enumerate_rollouts(snippet, vocabulary, args):
        cleaned = r.without_malformed()
        bad = set(r.actions[r.malformed].tolist())
        seen += bool(bad)
        assert set(cleaned.actions[cleaned.targets >= 0]) == set(r.actions[r.targets >= 0]) - bad
        assert (cleaned.ids[cleaned.expert] == snippet.ids[1:]).all()
        if len(bad) == 2:
            assert (cleaned.ids == snippet.ids).all()
    assert seen > 10


# ---------------------------------------------------------------- reward, returns, advantage


def test_rewards_by_hand():
    _, vocabulary, snippet, args = small_world()
    rollouts = {z: r for z, r in enumerate_rollouts(snippet, vocabulary, args)}
    r = rollouts[(5, 4), None]  # "#\n" before the first line
    logprobs = np.log([0.5, 0.25, 0.125, 0.5, 0.1, 0.2, 0.4, 0.8, 0.5])
    first, second = logprobs[:4].mean(), logprobs[4:].mean()
    assert np.allclose(ra3.step_rewards(r, logprobs, 0.3, args), [first - 0.3, second])
    total = dataclasses.replace(args, line_reward="sum")
    assert np.allclose(ra3.step_rewards(r, logprobs, 0.0, total), [logprobs[:4].sum(), logprobs[4:].sum()])
    logmean = dataclasses.replace(args, line_reward="logmean")
    assert np.allclose(ra3.step_rewards(r, logprobs, 0.0, logmean), np.log([0.34375, 0.4]))
    malformed = rollouts[(5, 7), (6, 4)]  # "#x" does not end in time
    assert np.allclose(ra3.step_rewards(malformed, logprobs, 0.3, args), [first - 2, second - 0.3])


def test_expert_logprobs_are_a_plain_forward_whatever_the_micro_batch():
    model, vocabulary, snippet, args = small_world()
    rollouts = [r for _, r in itertools.islice(enumerate_rollouts(snippet, vocabulary, args), 0, 60, 7)]
    for given_act, tokens in itertools.product((False, True), (1, 10**6)):
        args = dataclasses.replace(args, micro_batch_tokens=tokens)
        found = ra3.expert_logprobs(model, rollouts, vocabulary, args, given_act)
        for r, logprobs in zip(rollouts, found):
            plain = model(torch.from_numpy(r.ids)[None]).logits[0].log_softmax(-1).detach()
            expected = [plain[k - 1, r.ids[k]].item() for k in np.flatnonzero(r.expert)]
            if given_act:  # the first tokens of both actions, renormalised without "#" and " #"
                for place, t in ((0, 0), (4, 1)):
                    column = np.flatnonzero(r.expert & (r.actions == t))[0]
                    expected[place] -= math.log(1 - plain[column - 1, 5:7].exp().sum().item())
            assert np.allclose(logprobs, expected, atol=1e-5)


def test_truncated_returns():
    rewards = torch.tensor([[1.0, 2, 3, 4], [0, 0, 5, 0]])
    assert ra3.truncated_returns(rewards, 2).tolist() == [[3, 5, 7, 4], [0, 5, 5, 0]]
    assert ra3.truncated_returns(rewards, 1).tolist() == rewards.tolist()
    full = [[10, 9, 7, 4], [5, 5, 5, 0]]
    assert ra3.truncated_returns(rewards, 0).tolist() == full
    assert ra3.truncated_returns(rewards, 99).tolist() == full
    with pytest.raises(ValueError, match="horizon"):
        ra3.truncated_returns(rewards, -1)


def test_group_baseline_advantages():
    returns = torch.tensor([[[1.0, 4], [3, 4], [5, 1]]])  # [1, G = 3, T = 2]
    advantages = ra3.group_baseline_advantages(returns)
    assert advantages.tolist() == [[[-2, 1], [0, 1], [2, -2]]]
    scaled = ra3.group_baseline_advantages(returns, normalize_std=True)
    torch.testing.assert_close(scaled[0, :, 0], torch.tensor([-1.0, 0, 1]), atol=1e-3, rtol=0)


# ---------------------------------------------------------------- gradient


def test_policy_gradient_equals_the_derivative_of_the_expected_return():
    """Brute force: E_q[sum_t r_t] differentiated through the exact q over all latents, against the E-step's loss."""
    model, vocabulary, snippet, args = small_world()
    pairs = list(enumerate_rollouts(snippet, vocabulary, args))
    anchor, *_ = small_world(seed=5)  # another model scores, frozen
    rewards = [
        ra3.step_rewards(r, lp, args.penalty, args)
        for (_, r), lp in zip(pairs, ra3.expert_logprobs(anchor, [r for _, r in pairs], vocabulary, args))
    ]
    logq = torch.stack([exact_logq(model, r, vocabulary).sum() for _, r in pairs])
    probs = logq.exp()
    expected_return = (probs * torch.tensor([r.sum() for r in rewards])).sum()
    exact = torch.autograd.grad(expected_return, list(model.parameters()))
    returns = ra3.truncated_returns(torch.tensor(np.array(rewards)), 0).numpy()  # reward-to-go
    model.zero_grad()
    # every rollout weighs what its probability is: the weights ride on the advantages
    weights = probs.detach().numpy()[:, None]
    batch = [dataclasses.replace(r, advantages=adv) for (_, r), adv in zip(pairs, returns * weights)]
    loss, _ = ra3.policy_gradient_loss(model, batch, vocabulary, args, decisions=1.0)
    loss.backward()
    for parameter, gradient in zip(model.parameters(), exact):
        torch.testing.assert_close(-parameter.grad, gradient.float(), atol=2e-5, rtol=2e-3)
    assert max(g.abs().max() for g in exact) > 1e-2


def test_entropy_bonus_is_that_of_the_latents():
    """Its mean over all rollouts is the entropy of z_1, z_2, in which all tokens that mean act are one outcome."""
    model, vocabulary, snippet, args = small_world()
    args = dataclasses.replace(args, entropy_coef=1.0)
    exact, found = 0.0, 0.0
    with torch.no_grad():
        for _, r in enumerate_rollouts(snippet, vocabulary, args):
            logq = exact_logq(model, r, vocabulary).sum().item()
            r.advantages = np.zeros(2)
            loss, entropy = ra3.policy_gradient_loss(model, [r], vocabulary, args, decisions=2.0)
            assert abs(loss.item() + entropy.item() / 2) < 1e-4
            exact -= math.exp(logq) * logq
            found += math.exp(logq) * entropy.item()
    assert abs(found - exact) < 1e-4


def test_a_line_that_begins_with_the_experts_own_comment():
    """Its "#" is no decision: renormalised without "#" it would be no probability, and could be above 1."""
    model, vocabulary, _, args = small_world(max_latent_tokens=5)
    commented = segment("a\n#a\na\n", vocabulary, 64, 128, 5)
    assert vocabulary.opens[commented.ids[commented.boundaries]].tolist() == [False, True]
    r = ra3.all_act(commented)
    plain = ra3.expert_logprobs(model, [r], vocabulary, args)[0]
    given = ra3.expert_logprobs(model, [r], vocabulary, args, given_act=True)[0]
    assert np.flatnonzero(plain != given).tolist() == [0] and (given <= 0).all()


def test_ntp_loss_on_all_tokens_and_on_the_experts_only():
    model, vocabulary, snippet, args = small_world()
    r = next(r for z, r in enumerate_rollouts(snippet, vocabulary, args) if z == ((5, 4), None))
    nll = torch.nn.functional.cross_entropy(
        model(torch.from_numpy(r.ids)[None, :-1]).logits[0], torch.from_numpy(r.ids)[1:], reduction="none"
    )
    loss, expert = ra3.ntp_loss(model, [r], vocabulary, False, tokens=len(nll))
    assert math.isclose(loss.item(), nll.mean().item(), rel_tol=1e-5)
    masked, expert_masked = ra3.ntp_loss(model, [r], vocabulary, True, tokens=float(r.expert.sum()))
    kept = nll[torch.from_numpy(r.expert[1:])]
    assert math.isclose(masked.item(), kept.mean().item(), rel_tol=1e-5)
    assert (
        math.isclose(expert.item(), kept.sum().item(), rel_tol=1e-5) and expert.item() == expert_masked.item()
    )


@pytest.mark.parametrize("loss", ["E", "M"])
def test_micro_batches_do_not_change_the_gradient(loss):
    gradients = []
    for tokens in (1, 10**6):
        model, vocabulary, snippet, args = small_world()
        args = dataclasses.replace(args, micro_batch_tokens=tokens, max_grad_norm=1e9)
        rollouts = [r for _, r in itertools.islice(enumerate_rollouts(snippet, vocabulary, args), 0, 80, 10)]
        for r in rollouts:
            r.advantages = np.array([0.5, -1.0])

        def loss_of(part, model=model, vocabulary=vocabulary, args=args):
            if loss == "E":
                return ra3.policy_gradient_loss(model, part, vocabulary, args, 16.0)
            return ra3.ntp_loss(model, part, vocabulary, False, 99.0)

        def note(model=model):
            gradients.append([p.grad.clone() for p in model.parameters()])

        ra3.update(model, types.SimpleNamespace(step=note), rollouts, loss_of, RANKS, args)
        assert all(p.grad is None for p in model.parameters())  # or they would add up, and stay in memory
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_a_nan_changes_nothing():
    model, vocabulary, snippet, args = small_world()
    before = [p.clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    *_, norm = ra3.update(
        model,
        optimizer,
        [ra3.all_act(snippet)],
        lambda part: (next(model.parameters()).sum() * math.nan, torch.zeros(())),
        RANKS,
        args,
    )
    assert math.isnan(norm) and all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


# ---------------------------------------------------------------- data


def test_parts_are_disjoint_and_a_cursor_continues(tmp_path):
    rows = [{"text": f"a = {i}\nb = a\n"} for i in range(400)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    vocabulary = ra3.Vocabulary(ra3.load_tokenizer(str(ROOT / "tiny" / "model")), 2048, "cpu")
    args = dataclasses.replace(
        ARGS, dataset=(str(tmp_path / "x.jsonl"),), rl_batch_size=64, ntp_batch_size=64
    )
    texts = {
        p: {s.text for s in ra3.SnippetStream(args, p, vocabulary, 512).batch(300)}
        for p in ("E", "M", "eval")
    }
    assert all(texts.values()) and sum(map(len, texts.values())) == len(set.union(*texts.values())) <= 400
    stream = ra3.SnippetStream(args, "M", vocabulary, 512)
    stream.batch(37)
    again = ra3.SnippetStream(args, "M", vocabulary, 512, cursor=stream.cursor)
    assert [s.text for s in stream.batch(500)] == [s.text for s in again.batch(500)]  # over an epoch's end


# ---------------------------------------------------------------- the program

QUICK = [
    "--tiny",
    "--rl-updates",
    "2",
    "--ntp-updates",
    "2",
    "--rl-batch-size",
    "4",
    "--ntp-batch-size",
    "4",
    "--eval-snippets",
    "4",
    "--save-every",
    "1",
] + ["--dataset", "tiny/programs.jsonl"]


def run(*flags, ranks=1, **kw):
    launcher = (
        [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    )
    launcher += [] if ranks == 1 else [f"--nproc_per_node={ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(
        [*launcher, "ra3.py", *map(str, flags)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
        **kw,
    )


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "a"
    done = run(*QUICK, "--output-dir", folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def weights(folder, name):
    return AutoModelForCausalLM.from_pretrained(folder / "checkpoints" / name).state_dict()


def test_run_folder(whole_run):
    folder, printed = whole_run
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["phase"] for row in rows] == ["start", "E", "E", "M", "M"]
    names = (
        "reward/mean rollout/think_rate rollout/format_rate rollout/latent_tokens time/rollout_s time/score_s"
    )
    for name in (names + " time/update_s perf/tokens_per_s eval/ce_code").split():
        assert any(name in row for row in rows), name
    for name in ("args.json", "env.txt", "ra3.py", "common.py", "modeling.py", "curves.png", "samples.html", "tensorboard"):
        assert (folder / name).exists(), name
    assert "ce_code" in printed and "think_rate/programs/assert" in printed
    pi, q = weights(folder, "em_001"), weights(folder, "em_001_q")
    assert any(not torch.equal(pi[k], q[k]) for k in pi)


def test_two_ranks_give_the_same_weights(whole_run, tmp_path):
    done = run(*QUICK, "--output-dir", tmp_path / "b", ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("em_001", "em_001_q"):
        one, two = weights(whole_run[0], name), weights(tmp_path / "b", name)
        for key in one:
            torch.testing.assert_close(one[key], two[key], atol=2e-5, rtol=0)


def test_a_killed_run_resumes_bit_for_bit(whole_run, tmp_path):
    folder = tmp_path / "c"
    launched = subprocess.Popen(
        [sys.executable, "ra3.py", *QUICK, "--output-dir", str(folder)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while launched.poll() is None and not list(folder.glob("checkpoints/state_*/state.json")):
        time.sleep(0.02)
    launched.send_signal(signal.SIGKILL)
    launched.wait()
    done = run(*QUICK, "--output-dir", folder, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    for name in ("em_001", "em_001_q"):
        one, two = weights(whole_run[0], name), weights(folder, name)
        assert all(torch.equal(one[k], two[k]) for k in one)
    timeless = [
        {k: v for k, v in json.loads(line).items() if not k.startswith(("time/", "perf/"))}
        for path in (whole_run[0], folder)
        for line in (path / "metrics.jsonl").read_text().splitlines()
    ]
    assert timeless[:5] == timeless[5:]
    refused = run(*QUICK, "--output-dir", folder, "--resume", "auto", "--penalty", "0.1")
    assert refused.returncode == 2 and "--penalty 0.05 -> 0.1" in refused.stderr


def test_ntp_trains_on_the_same_snippets_without_thoughts(tmp_path):
    done = run(*QUICK, "--output-dir", tmp_path / "n", "--algo", "ntp")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "n" / "metrics.jsonl").read_text().splitlines()]
    assert [row["phase"] for row in rows] == ["start", "M", "M"]
    assert all(row["rollout/think_rate"] == 0 for row in rows[1:])


def test_bootstrap_only(tmp_path):
    done = run(*QUICK, "--output-dir", tmp_path / "d", "--bootstrap-only", "--max-snippets", 30)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "d" / "bootstrapped.jsonl").read_text().splitlines()]
    assert len(rows) == 30 and sum(len(row["latents"]) for row in rows) > 5
    for row in rows:
        assert ast.dump(ast.parse(row["text"])) == ast.dump(ast.parse(row["bootstrapped"]))
        lines = row["text"].split("\n")
        for latent in reversed(row["latents"]):
            assert latent["text"].startswith("#")
            lines.insert(latent["line"], latent["text"])
        assert "\n".join(lines) == row["bootstrapped"]
    # killed in the middle of a line, and continued with batches of another size
    whole, flags = (tmp_path / "d" / "bootstrapped.jsonl").read_text(), ["--output-dir", str(tmp_path / "d")]
    (tmp_path / "d" / "bootstrapped.jsonl").write_text(whole[: len(whole) // 2])
    flags = [*QUICK, *flags, "--bootstrap-only", "--max-snippets", "30"]
    ra3.main(tyro.cli(ra3.Args, args=[*flags, "--resume", "auto", "--rollout-rows", "7"], default=ra3.TINY_DEFAULTS))
    assert (tmp_path / "d" / "bootstrapped.jsonl").read_text() == whole
    for more, words in (([], "already holds a run; choose another"), (["--resume", "auto"], "--seed 0 -> 3")):
        with pytest.raises(UserError, match=words):
            ra3.main(tyro.cli(ra3.Args, args=[*flags, *more, "--seed", "3"], default=ra3.TINY_DEFAULTS))


def test_what_cannot_work_is_refused():
    wrong = {"at least 2": {"group_size": 1}, "takes no --q-model": {"algo": "ntp", "q_model": "x"}}
    wrong["--ntp-updates must be positive"] = {"ntp_updates": 0}
    for words, changes in wrong.items():
        with pytest.raises(UserError, match=words):
            ra3.check(dataclasses.replace(ARGS, **changes), RANKS)
    ra3.check(dataclasses.replace(ARGS, group_size=1, algo="ntp"), RANKS)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--model", "no/such/folder/here"], "no tokenizer"),
        (["--dataset", "missing.jsonl"], "no such data file"),
        (["--dataset", "tiny/code_train.jsonl"], "no column `text`"),
        (["--rl-batch-size", "0"], "does not divide"),
        (["--max-snippet-tokens", "-3"], "must be positive"),
        (["--dataset-weights", "0", "0"], "--dataset-weights must be positive"),
        (["--seed", "-1"], "seed"),
    ],
)
def test_bad_input_is_one_line(tmp_path, flags, words):
    args = tyro.cli(
        ra3.Args, args=[*QUICK, "--output-dir", str(tmp_path / "e"), *flags], default=ra3.TINY_DEFAULTS
    )
    with pytest.raises(UserError, match=words) as caught:
        ra3.main(args)
    assert "\n" not in str(caught.value)


def test_bad_input_exits_with_code_2_and_no_trace(tmp_path):
    done = run(*QUICK, "--output-dir", tmp_path / "e", "--dataset", "missing.jsonl")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: no such data file or folder: missing.jsonl\n"


def test_dry_run_prints_the_plan_and_makes_no_folder(tmp_path):
    done = run(*QUICK, "--output-dir", tmp_path / "f", "--dry-run")
    assert done.returncode == 0 and "2 E-step updates" in done.stdout and not (tmp_path / "f").exists()
