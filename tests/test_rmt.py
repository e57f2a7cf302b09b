"""rmt.py: equations by hand, rewards and parsing, entropies, the losses and their footing, and short runs."""

import dataclasses
import importlib.util
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM

import common
import grpo_rlvr
import rmt
from common import TINY, Ranks, UserError, load_model, load_tokenizer, token_texts, uniforms

ONE = Ranks(0, 1, torch.device("cpu"))
ROOT = Path(rmt.__file__).parent
PIECES = ["<think>", "</think>", "\\boxed{", "}", "{", " the", " cat", "s", "\ufffd", "</", "think", ">", "}.\n", "", "<eos>",
          " box", "boxed", "\\"]  # fmt: skip
SHARED = ("rollout", "group_advantages", "completion_logprobs", "sample_batches")
torch.set_num_threads(1)


def ids(text):
    """Tokens of a text that has a bar after each: those of PIECES."""
    return [PIECES.index(piece) for piece in text.split("|")[:-1]]


def never():
    pass


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(f"{TINY}/text/model")


def save_llama(folder, kind=LlamaForCausalLM, config=LlamaConfig, **options):
    torch.manual_seed(0)
    tokenizer = load_tokenizer(f"{TINY}/text/model")
    options |= {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    options |= {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.3}
    kind(config(**options)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory, tokenizer):
    """Loads a random model, the same each time."""
    folder = save_llama(tmp_path_factory.mktemp("llama"))
    return lambda: load_model(folder, tokenizer, ONE, 64)


# ---------------------------------------------------------------- budget and positions


def test_token_budget_by_hand():
    """800 * 0.2^(t/10), rounded down; test_theory.py has the other equations."""
    assert [rmt.token_budget(t, 10, 800, 1, 0.2) for t in (0, 1, 5, 10)] == [800, 681, 357, 160]


def choose(levels, update=1, probs=(0.5, 0.3, 0.2), **changes):
    return rmt.choose_positions(levels, update, rmt.Args(updates=10**6, p1=probs, **changes))


def test_positions_have_the_curriculum_s_distribution():
    levels = np.array([-1, 0, 0, 1, -1, 2, 2, 2])  # two easy, one medium, three hard
    expected = {True: [0, 0.25, 0.25, 0.3, 0, *[0.2 / 3] * 3], False: [0, *[1 / 6] * 3, 0, *[1 / 6] * 3]}
    for curriculum, right in expected.items():
        counts = np.zeros(8)
        for update in range(1, 6001):
            ((text, t, level),) = choose([levels], update, curriculum=curriculum)
            assert text == 0 and level == levels[t]
            counts[t] += 1
        assert np.abs(counts / 6000 - right).max() < 4 * math.sqrt(0.25 / 6000)


def test_positions_are_different_and_levels_may_be_empty():
    levels = [np.array([0, 1]), np.array([1]), np.array([-1]), np.array([0])]
    found = [(0, 0, 0), (0, 1, 1), (1, 0, 1), (3, 0, 0)]
    for update in range(1, 200):
        assert sorted(choose(levels, update)) == found  # all, each once
    jump = rmt.Args(updates=4, t1=0.25, t2=0.26, p1=(1.0, 0.0, 0.0), p2=(0.0, 1.0, 0.0))  # after one update of four
    assert [rmt.choose_positions(levels[:1], update, jump)[0][2] for update in (1, 2, 3, 4)] == [0, 0, 1, 1]
    easy = [choose([levels[0]], update, (0.1, 0.3, 0.6))[0][2] == 0 for update in range(1, 2001)]
    assert np.mean(easy) == pytest.approx(0.25, abs=0.05)  # hard's 0.6 shared out as 1 : 3
    assert sorted(choose(levels, probs=(1.0, 0.0, 0.0))) == [found[0], found[3]]
    with pytest.raises(UserError, match="no candidate in its texts"):
        choose(levels, probs=(0.0, 0.0, 1.0))


def test_difficulty_levels(tokenizer):
    words = token_texts(tokenizer, len(tokenizer) + 2)
    everything = list(range(len(words)))
    (levels,) = rmt.difficulty([np.full(len(words), 9.0)], [everything], tokenizer, words, (0.5, 1.0, 1.5))
    boxable = [i for i in everything if levels[i] == 2]
    assert set(levels.tolist()) == {-1, 2} and tokenizer.eos_token_id not in boxable and max(boxable) < len(tokenizer)
    assert all(not {*words[i]} & {*"{}\ufffd"} and words[i] == tokenizer.decode([i]) for i in boxable)
    assert 0.5 < len(boxable) / len(words) < 1
    entropies = np.array([3.0, 0.49, 0.5, 3.0, 1.0, 1.5, 0.99])
    text = [*boxable[:3], words.index("{"), *boxable[3:6]]
    assert rmt.difficulty([entropies], [text], tokenizer, words, (0.5, 1.0, 1.5))[0].tolist() == [-1, -1, 0, -1, 1, 2, 0]
    tokenizer.bos_token, before = tokenizer.eos_token, tokenizer.bos_token
    levels = rmt.difficulty([entropies + 1], [text], tokenizer, words, (0.5, 1.0, 1.5))[0].tolist()
    tokenizer.bos_token = before
    assert levels == [-1, -1, 2, -1, 2, 2, 2]  # after BOS there is no text before the second


# ---------------------------------------------------------------- responses and rewards


RESPONSES = {  # tokens -> what is read, and after how many of them the response ends
    "<think>| the| cat|</think>|\\boxed{| the|}|": ((2, " the"), 7),
    "<think>|</think>|\\boxed{| the|s|}|}|": ((0, " thes"), 6),  # an empty thought; the first closing brace ends it
    "<think>|{|}|</think>| the|\\boxed{|s|}.\n|": ((2, "s"), 8),  # words before and after the box
    "<think>|\\boxed{|s|}|</think>|\\boxed{| cat|}|": ((3, " cat"), 8),  # a box in the thought
    "<think>|{|}|\\boxed{|s|}|</think>|}|\\boxed{|s|}.\n|": ((5, "s"), 11),
    "<think>|s|</|think|>|\\boxed{|s|}|": ((1, "s"), 8),  # a tag of several tokens
    "<think>|s|</think>|\\boxed{|}|": ((1, ""), 5),
    "<think>|s|</think>| box|{|s|}|\\|boxed|{|s|}|": ((1, "s"), 12),  # the first is no box
    " the|</think>|\\boxed{|s|}|": (None, 5),  # not opened; it may be that the prompt has
    "s|</|think|>|\\boxed{|}|": (None, 6),
    "<think>| the|\\boxed{|s|}|": (None, None),  # not closed
    "<think>|s|think|\\boxed{|}|<eos>|": (None, 6),
    "<think>|<think>|</think>|\\boxed{|s|}|": (None, 6),  # nested
    "<think>|s|</think>|</think>|\\boxed{|s|}|": (None, 7),
    "<think>|s|</think>|\\boxed{|{|s|}|}|": (None, 7),  # a brace in the box
    "<think>|s|</think>|\\boxed{|s|": (None, None),  # cut off
    "<think>|s|</think>|s|": (None, None),
    "s|<think>|s|</think>|\\boxed{|s|}|": (None, 7),  # text before the thought
    "}|<eos>|<eos>|": (None, 2),
    "": (None, None),
}


@pytest.mark.parametrize("text", RESPONSES)
def test_how_a_response_is_read_and_where_it_ends(text):
    right, length = RESPONSES[text]
    assert rmt.read_response(ids(text)[:length], PIECES, opened=False) == right
    tokens = torch.tensor([ids(" the|" + text)])  # the prompt's last token comes first
    ends = rmt.is_end((PIECES, {PIECES.index("<eos>")}), tokens)[0].tolist()
    assert (ends.index(True) + 1 if True in ends else None) == length


def test_read_response_after_a_prompt_that_opened_the_thought():
    completion = " the| cat|</think>|\\boxed{|s|}|"
    assert rmt.read_response(ids(completion), PIECES, opened=True) == (2, "s")
    assert rmt.read_response(ids("<think>|" + completion), PIECES, opened=True) is None


def test_matches():
    truth = [" the", " cat", "s"]
    for answer, right in {
        " the": (True, True),
        " the cat": (False, True),  # two whole tokens
        " the cats": (False, True),
        " the ca": (False, False),  # inside a token
        " th": (False, False),
        "the": (False, False),  # the space counts
        " the cats!": (False, False),  # goes beyond
        "": (False, False),
        " cat": (False, False),
    }.items():
        assert rmt.matches(answer, truth) == right, answer
    assert rmt.matches("s\ufffd", ["s", "\ufffd"]) == (False, False)  # a part of a character is no text


def test_composite_reward_by_hand():
    """Eq. (5) with w = 0.2; the thought has 3 tokens of the 4 that are asked."""
    thought = "<think>|s|s|s|</think>|\\boxed{|"
    for text, match, budget, right in (
        (f"{thought} the|}}|", "exact", 4, 0.8 + 0.2 * 0.75),
        (f"{thought} the| cat|}}|", "exact", 4, 0.2 * 0.75),
        (f"{thought} the| cat|}}|", "prefix", 4, 0.8 + 0.2 * 0.75),
        (f"{thought} the|}}|", "exact", 0, 1.0),  # without budgets
        ("<think>|s|s|s|\\boxed{| the|}|", "exact", 4, 0.0),  # malformed
    ):
        sample = rmt.Sample(0, [" the", " cat"], [], ids(text), [])
        rmt.Rollouts.reward(SimpleNamespace(texts=PIECES, args=rmt.Args(match=match)), sample, budget, opened=False)
        assert sample.reward == pytest.approx(right), text


def test_another_format_is_an_edit_of_its_constants(tmp_path):
    """The fork with answer tags, here of several tokens: all that reads a response follows."""
    diff = (ROOT / "tests" / "forks" / "rmt_answer_tags.diff").read_text(encoding="utf-8")
    old, new = re.findall(r"^[-+](\w.*)", diff, flags=re.MULTILINE)
    source = Path(rmt.__file__).read_text(encoding="utf-8")
    (tmp_path / "fork.py").write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("fork", tmp_path / "fork.py")
    fork = sys.modules["fork"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fork)
    pieces = ["<think>", "}", "</think>", "<", "answer", ">", " the", "</answ", "er>", " more"]
    assert fork.read_response(range(9), pieces, False) == (1, " the")
    assert fork.read_response(range(8), pieces, False) is None
    assert fork.is_end((pieces, set()), torch.tensor([[9, *range(10)]]))[0].tolist() == [False] * 8 + [True, False]
    assert "next token in <answer></answer>.\n" in fork.INSTRUCTION


# ---------------------------------------------------------------- entropy and its cache


def test_top_entropy_against_brute_force():
    logits = 3 * torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    for row, entropy in zip(logits, rmt.top_entropy(logits)):
        best = sorted(row.softmax(-1).tolist(), reverse=True)[:16]
        assert entropy.item() == pytest.approx(-sum(p / sum(best) * math.log(p / sum(best)) for p in best), abs=1e-5)
    assert rmt.top_entropy(torch.zeros(64)).item() == pytest.approx(math.log(16))


def test_score_texts_position_by_position(llama, monkeypatch):
    monkeypatch.setattr(rmt, "LOGITS_PER_CHUNK", 6000)  # so that the logits are made in parts
    model, rows = llama(), [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17]]
    for row, (entropies, predictions) in zip(rows, rmt.score_texts(model, rows, 8, ONE)):
        assert len(entropies) == len(row) and entropies[0] == predictions[0] == 0
        for t in range(1, len(row)):
            logits = model(torch.tensor([row[:t]])).logits[0, -1]
            assert entropies[t] == pytest.approx(rmt.top_entropy(logits).item(), abs=1e-4)
            assert predictions[t] == logits.argmax()


# ---------------------------------------------------------------- rollout


def test_rollout_stops_there_and_nowhere_else(tokenizer, monkeypatch):
    """The draws are replaced by scripts of tokens; rows end at different steps; thoughts hold braces."""
    model = load_model(f"{TINY}/text/model", tokenizer, ONE, 0)
    texts = token_texts(tokenizer, len(tokenizer))
    scripts = ["<think>{a} \\boxed{b}</think>\\boxed{ is} and on", "<think>x</think>\\boxed{s}}}", "<think>never ends"]
    encoded = [tokenizer.encode(script + " more" * 70)[:64] for script in scripts]
    noise = torch.arange(3)[:, None] + torch.arange(64) / 64  # says which row and step it is

    def scripted(probs, noise):
        return torch.tensor([encoded[int(u)][round(u % 1 * 64)] for u in noise.tolist()])

    monkeypatch.setattr(common, "inverse_cdf", scripted)
    rows = rmt.rollout(model, [[5, 6], [5, 6, 7], [8]], noise, 1.0, (texts, {tokenizer.eos_token_id}))
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
    log_ratio = ref_logprobs - logprobs
    kl_sum = ((log_ratio.exp() - log_ratio - 1) * mask).sum()
    expected = -((advantages * (logprobs * mask).sum(1)).sum() - beta * kl_sum) / responses
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6) and kl == pytest.approx(kl_sum.item(), abs=1e-6)
    # one update per rollout: the same gradient as the ratio form at ratio 1
    ratio_form = -(advantages[:, None] * (logprobs - logprobs.detach()).exp() * mask).sum() / responses
    plain, _ = rmt.rl_loss(logprobs, None, advantages, mask, 0.0, responses)
    for mine, other in ((loss, expected), (plain, ratio_form)):
        got, want = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (mine, other))
        assert torch.allclose(got, want, atol=1e-6)


def test_ntp_loss_sums_over_all_but_the_chosen_positions_of_a_text(llama):
    model = llama()
    rows, kept = [[5, 6, 7, 8, 9], [10, 11, 12], [13, 14]], [[1, 3], [2], []]  # of the last one nothing is left
    kept = [np.array(cols, dtype=np.int64) for cols in kept]
    terms = [
        -model(torch.tensor([row[:t]])).logits[0, -1].log_softmax(-1)[row[t]] for row, cols in zip(rows, kept) for t in cols
    ]
    loss = rmt.ntp_loss(model, rows, kept, total=3)  # eq. (8) of each text; their mean
    assert loss.item() == pytest.approx(sum(terms).item() / 3, abs=1e-5)
    got = torch.autograd.grad(loss, list(model.parameters()))
    want = torch.autograd.grad(sum(terms) / 3, list(model.parameters()))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want))
    nothing = rmt.ntp_loss(model, rows[2:], kept[2:], total=1)
    nothing.backward()
    assert nothing.item() == 0


def norm_of(model):
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    model.zero_grad()
    return norm


def test_both_losses_of_equation_9_are_on_one_footing(tokenizer):
    """At lambda = 0.1 the gradient of L_NTP is a fair part of that of L_RL, as with the sums that are printed."""
    args = rmt.Args(**rmt.TINY_RUN | {"train_texts": 40, "eval_texts": 20, "prompts_per_update": 16, "beta": 0.0})
    texts, _, _ = rmt.read_texts(args, tokenizer)
    texts, model = texts[:16], load_model(args.model, tokenizer, ONE, 256)
    entropies = [scores[0] for scores in rmt.score_texts(model, texts, 2048, ONE)]
    rollouts = rmt.Rollouts(model, tokenizer, args, ONE)
    levels = rmt.difficulty(entropies, texts, tokenizer, rollouts.texts, args.thresholds)
    chosen = rmt.choose_positions(levels, 1, args)
    places = [(texts[k], t, level) for k, t, level in chosen for _ in range(8)]
    samples = rollouts(places, uniforms([len(places), 64], "noise"), 24, 0.8, never)
    rewards = torch.tensor([sample.reward for sample in samples]).view(-1, 8)
    logprobs, _, mask = rmt.completion_logprobs(model, samples, args.temperature)
    rmt.rl_loss(logprobs, None, rmt.group_advantages(rewards).flatten(), mask, 0.0, len(samples))[0].backward()
    rl, taken = norm_of(model), {(k, t) for k, t, _ in chosen}
    kept = [np.array([t for t in range(1, len(text)) if (k, t) not in taken]) for k, text in enumerate(texts)]
    rmt.ntp_loss(model, texts, kept, len(texts)).backward()
    ratio = rmt.Args().ntp_weight * norm_of(model) / rl
    assert 0.05 < ratio < 1, ratio  # with a mean over tokens in eq. (8) about 50 times less
    assert rmt.TINY_RUN.get("ntp_weight", 0.1) == rmt.Args().ntp_weight == 0.1


def learn(model, optimizer, samples, texts, kept, args, ref_model=None):
    return rmt.learn(model, ref_model, optimizer, samples, texts, kept, args, ONE, lambda: None)


def test_a_step_raises_the_rewarded_response_and_the_text(llama):
    """Eq. (9) with its sign put right: both terms improve, and micro-batches add up to one batch."""
    text, kept, after = [20, 21, 22, 23, 24, 25], np.array([1, 2, 4, 5]), []
    for micro_batch_tokens in (4096, 1):
        model = llama()
        samples = [
            rmt.Sample(0, [], [5, 6, 7], completion, [0.0] * len(completion), True, advantage=advantage)
            for completion, advantage in (([30, 31], 1.0), ([32, 33, 34], -1.0))
        ]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
        args = rmt.Args(micro_batch_tokens=micro_batch_tokens, temperature=1.0, max_grad_norm=100.0)

        def measure(model=model, samples=samples):
            with torch.no_grad():
                rl = rmt.completion_logprobs(model, samples, 1.0)[0].sum(1)
                return [*rl.tolist(), rmt.ntp_loss(model, [text], [kept], 1).item()]

        before = measure()
        metrics = learn(model, optimizer, samples, [text] * 2, [kept] * 2, args)
        good, bad, ntp = measure()
        assert good > before[0] and bad < before[1] and ntp < before[2]
        assert metrics["policy/ntp_loss"] == pytest.approx(before[2], abs=1e-4)
        assert metrics["policy/ntp_ce"] == pytest.approx(before[2] / 4, abs=1e-4)
        after.append((good, bad, ntp, metrics["optim/grad_norm"]))
    assert after[0] == pytest.approx(after[1], rel=1e-4)


def test_weights_of_the_terms_scale_their_gradients(llama, monkeypatch):
    """lambda: 0 leaves L_NTP out. beta: the KL to another model pulls, to the same one it does not."""
    sample, norms = rmt.Sample(0, [], [5, 6], [7, 8], [0.0, 0.0], True), {}
    for weight in (0.0, 0.1, 0.2):
        model, args = llama(), rmt.Args(ntp_weight=weight)
        metrics = learn(model, torch.optim.SGD(model.parameters(), lr=0.0), [sample], [[9, 10, 11]], [np.array([2])], args)
        norms[weight] = metrics["optim/grad_norm"]
        assert ("policy/ntp_loss" in metrics) is (weight > 0)
    assert norms[0.0] == 0 and norms[0.2] == pytest.approx(2 * norms[0.1], rel=1e-4) and norms[0.1] > 0
    model, other = llama(), llama()
    with torch.no_grad():
        other.get_output_embeddings().weight.mul_(1.1)
    for ref_model, same in ((llama(), True), (other, False)):
        optimizer, args = torch.optim.SGD(model.parameters(), lr=0.0), rmt.Args(ntp_weight=0.0, beta=1.0)
        metrics = learn(model, optimizer, [sample], [], [], args, ref_model)
        assert (metrics["optim/grad_norm"] < 1e-4) is same and (abs(metrics["policy/kl"]) < 1e-6) is same
    both = model, optimizer, [sample], [[9, 10, 11]], [np.array([2])], rmt.Args(beta=1.0), other
    metrics = learn(*both)
    monkeypatch.setattr(rmt, "micro_batches", lambda *args: [*common.micro_batches(*args), []])
    assert learn(*both) == pytest.approx(metrics, rel=1e-5)  # a rank with less work than others


# ---------------------------------------------------------------- prompts and data


def test_prompt_is_the_one_the_tiny_model_knows(tokenizer):
    head, tail, _ = rmt.prompt_frame(tokenizer, 12, rmt.Args())  # it has no template
    assert tokenizer.decode(head + tail) == (
        "Complete the given text by predicting the next token. Think in exactly 12 tokens within "
        "<think></think>, then put the next token in \\boxed{}.\n### Text\n\n### Prediction\n"
    )
    free, _, opens = rmt.prompt_frame(tokenizer, 0, rmt.Args())
    assert "token. Think within <think></think>, then put" in tokenizer.decode(free) and not opens
    spaced = SimpleNamespace(encode=lambda text, **_: [*f" {text}"], bos_token_id=None, chat_template=None)
    head, tail, _ = rmt.prompt_frame(spaced, 12, rmt.Args())  # it puts a space before whatever it encodes
    assert "".join(head).startswith(" Complete the") and "".join(tail) == "\n### Prediction\n"


@pytest.mark.parametrize("suffix, opened", [("<|a|>", False), ("<|a|><think>{{ '\\n' }}", True)])
def test_prompt_with_a_chat_template(suffix, opened, tokenizer):
    tokenizer.chat_template = "<|u|>{{ messages[0]['content'] }}" + suffix
    head, tail, opens = rmt.prompt_frame(tokenizer, 12, rmt.Args())
    plain, _, _ = rmt.prompt_frame(tokenizer, 12, rmt.Args(chat_template=False))
    tokenizer.chat_template = None
    assert opens is opened and tokenizer.decode(tail).startswith("\n### Prediction\n<|a|>")
    assert tokenizer.decode(head).startswith("<|u|>Complete the given text")
    assert tokenizer.decode(plain).startswith("Complete the given text")


def rows_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_texts_are_split_once_and_for_all(tokenizer, tmp_path):
    rows = [{"problem": f"What is {i} + {i}?", "solution": f"It is {2 * i}." * 8} for i in range(40)]
    source = rows_file(tmp_path / "a.jsonl", rows)
    args = rmt.Args(dataset=source, train_texts=60, eval_texts=20, max_text_tokens=24)
    train, heldout, _ = rmt.read_texts(args, tokenizer)
    assert len(train) == 60 and len(heldout) == 20 and max(map(len, train)) <= 24
    again, _, _ = rmt.read_texts(dataclasses.replace(args, seed=5), tokenizer)
    assert train == again  # not by the run's seed
    assert not {tuple(text) for text in train if len(text) == 24} & {tuple(text) for text in heldout}
    tokenizer.bos_token, before = tokenizer.eos_token, tokenizer.bos_token
    begun, _, _ = rmt.read_texts(args, tokenizer)  # BOS comes before each, and takes no room of theirs
    tokenizer.bos_token = before
    assert begun == [[tokenizer.eos_token_id, *text] for text in train]


def test_rows_without_text_are_skipped_and_counted(tokenizer, tmp_path):
    good = [{"problem": f"Add {i} and {i}", "solution": i} for i in range(19)]  # numbers are text
    good += [{"problem": "half an emoji \ud83d", "solution": "cut off"}]
    bad = [{"problem": None, "solution": "x"}, {"problem": "x", "solution": " "}, {"problem": [1], "solution": "x"}]
    args = rmt.Args(dataset=rows_file(tmp_path / "a.jsonl", bad + good), train_texts=15, eval_texts=5)
    train, heldout, words = rmt.read_texts(args, tokenizer)
    assert len(train) == 15 and len(heldout) == 5 and "3 rows without text skipped" in words
    with pytest.raises(UserError, match="no column `text`; it has: problem, solution"):
        rmt.read_texts(dataclasses.replace(args, dataset=rows_file(tmp_path / "b.jsonl", good), text_column=("text",)), tokenizer)
    with pytest.raises(UserError, match="1 training and 0 held-out texts; 3 rows without text skipped: give more data"):
        rmt.read_texts(dataclasses.replace(args, dataset=rows_file(tmp_path / "c.jsonl", bad + good[:1])), tokenizer)


# ---------------------------------------------------------------- runs

SMALL = rmt.TINY_RUN | {
    "train_texts": 24, "eval_texts": 8, "max_text_tokens": 32, "prompts_per_update": 4, "group_size": 4, "max_new_tokens": 16,
    "initial_budget": 6, "updates": 3, "eval_positions": 4, "beta": 0.01, "rollout_rows": 6,
}  # fmt: skip


def small(folder, **changes):
    rmt.main(rmt.Args(**SMALL | {"output_dir": str(folder)} | changes))
    return folder


def run_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(row):
    return {key: value for key, value in row.items() if not key.startswith(("time/", "perf/"))}


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Curves take longer than all the rest of such a run; the fixture `whole` has them."""
    monkeypatch.setattr(common.Run, "curves", lambda *args: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return small(tmp_path_factory.mktemp("rmt") / "run")


def test_run_folder(whole):
    metrics = run_metrics(whole)
    assert [row["update"] for row in metrics] == [0, 1, 2, 3]
    assert [row["rollout/budget"] for row in metrics[1:]] == [6, 4, 3]  # 6 x 0.5^(t/3), t = 0, 1, 2
    assert [row["data/epoch"] for row in metrics[1:]] == pytest.approx([4 / 24, 8 / 24, 12 / 24], abs=1e-5)
    kinds = ("ntp", "ntr", "ntr_greedy", "ntr_prefix", "ntr_prefix_greedy")
    for row in (metrics[0], metrics[3]):
        for kind in kinds:
            levels = [row[f"eval/{kind}_{level}"] for level in rmt.LEVELS]
            assert row[f"eval/{kind}"] == pytest.approx(sum(levels) / 3, abs=1e-5)
        assert row["eval/ntr_prefix"] >= row["eval/ntr"] and row["eval/ntr_prefix_greedy"] >= row["eval/ntr_greedy"]
    assert [row["eval/budget"] for row in (metrics[0], metrics[3])] == [6, 3]
    assert all(row["policy/rollout_ratio"] == pytest.approx(1, abs=1e-3) for row in metrics[1:])
    for row in metrics[1:]:
        assert row["policy/loss"] == pytest.approx(row["policy/rl_loss"] + 0.1 * row["policy/ntp_loss"], abs=1e-5)
    assert all(row["optim/skipped"] == 0 and math.isfinite(row["optim/grad_norm"]) for row in metrics[1:])
    for name in ("curves.png", "samples.html", "args.json", "rmt.py"):
        assert (whole / name).exists(), name
    assert json.loads((whole / "args.json").read_text())["proxy_model"] == SMALL["model"]
    page = (whole / "samples.html").read_text(encoding="utf-8")
    assert page.count("<h2>") == 2 and page.count("<pre>") >= 12 and page.count("class=thought") >= 12
    documented = (ROOT / "docs" / "rmt.md").read_text()
    assert [name for name in sorted(set().union(*metrics)) if f"`{name}`" not in documented] == []


def test_a_text_that_an_update_has_twice_is_masked_in_both(tmp_path, monkeypatch):
    """As at the end of an epoch, or here, where an update has more texts than there are."""
    choose_positions, learn, seen = rmt.choose_positions, rmt.learn, []
    made, new_optimizer = [], rmt.new_optimizer
    monkeypatch.setattr(rmt, "new_optimizer", lambda model, *rest: made.append(rest) or new_optimizer(model, *rest))
    monkeypatch.setattr(rmt, "choose_positions", lambda *args: seen.append(choose_positions(*args)) or seen[0])
    monkeypatch.setattr(rmt, "learn", lambda *args: seen.append(args) or learn(*args))
    step = rmt.optimizer_step
    monkeypatch.setattr(rmt, "optimizer_step", lambda *args: made.append(args[3]) or step(*args))
    small(tmp_path / "run", train_texts=2, prompts_per_update=4, updates=1, thresholds=(0.1, 0.2, 0.3))
    chosen, (_, _, _, _, texts, kept, *_) = seen
    assert made == [(2e-4, 0.01), 1.0]  # the learning rate, the default weight decay; the norm
    for text, cols in zip(texts, kept):
        taken = {t for k, t, _ in chosen if texts[k] == text}
        assert taken and sorted({*cols.tolist()} | taken) == [*range(1, len(text))] and not {*cols.tolist()} & taken


def test_console(whole, capfd, tmp_path):
    """Lines of at most 120 columns; at the end the evaluations side by side, two samples, and the files."""
    small(tmp_path / "run", beta=0.0, updates=1)
    lines = capfd.readouterr().out.splitlines()
    updates = [line for line in lines if re.match(r"\d/1 \|", line)]
    assert len(updates) == 2 and max(map(len, updates)) <= 120 and "nan" not in "".join(updates)
    assert sum(bool(re.match(r"(ntp|ntr\w*) +([\d.]+ -> [\d.]+ *){4}$", line)) for line in lines) == 5
    assert sum(line.startswith(("right, ", "wrong, ", "malformed, ")) for line in lines) == 2
    assert lines[-1].startswith(str(tmp_path / "run")) and "samples.html" in lines[-1]
    stage, sample = dict.fromkeys(run_metrics(whole)[0], 1577.0), rmt.Sample(0, ["a"], [5], [6], [])
    rmt.report(SimpleNamespace(say=print, path=""), [stage], [sample], load_tokenizer(SMALL["model"]))
    assert "completion_tokens                 1577.000" in capfd.readouterr().out.splitlines()


def test_a_resumed_run_reads_the_entropies_from_disk(whole, tmp_path, monkeypatch):
    """test_robust.py resumes runs that were stopped and killed."""
    folder = shutil.copytree(whole, tmp_path / "run")
    monkeypatch.setattr(rmt, "score_texts", lambda *args: 1 / 0)
    small(folder, resume=str(folder))
    assert run_metrics(folder) == run_metrics(whole)


def test_eval_only_scores_the_positions_of_the_run(whole, tmp_path):
    """By the entropies of the model before training, which must be named."""
    (_, *_, last), final = run_metrics(whole), str(whole / "checkpoints" / "final")
    changes = {"model": final, "eval_only": True, "initial_budget": last["eval/budget"]}
    small(tmp_path / "again", proxy_model=SMALL["model"], **changes)
    (row,) = run_metrics(tmp_path / "again")
    right, found = ({key: r[key] for key in r if key.startswith("eval/")} for r in (last, row))
    assert found == right


def test_the_proxy_is_checked_before_its_pass(tokenizer, llama, tmp_path, monkeypatch):
    monkeypatch.setattr(rmt, "score_texts", lambda *args: 1 / 0)
    scaled = save_llama(tmp_path / "scaled", kind=GraniteForCausalLM, config=GraniteConfig, logits_scaling=8.0)
    with pytest.raises(UserError, match="scaled is not supported: its logits are not its output layer's"):
        small(tmp_path / "run", proxy_model=scaled)
    other = save_llama(tmp_path / "other")
    file = json.loads((tmp_path / "other" / "tokenizer.json").read_text(encoding="utf-8"))
    file["model"]["merges"] = file["model"]["merges"][:100]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(file), encoding="utf-8")
    with pytest.raises(UserError, match="tokenise the texts differently"):
        small(tmp_path / "run", proxy_model=other)
    with pytest.raises(ZeroDivisionError):  # the same folder again, because nothing was measured there
        small(tmp_path / "run", proxy_model=save_llama(tmp_path / "good"))


def test_a_model_without_the_format_is_told_so_once(tmp_path, capfd, monkeypatch):
    keys, uniforms = [], rmt.uniforms
    monkeypatch.setattr(rmt, "uniforms", lambda shape, *key: keys.append(key) or uniforms(shape, *key))
    small(tmp_path / "run", model=save_llama(tmp_path / "model"), updates=2)
    assert [key for key in keys if key[0] == 0 and len(key) == 3] == [(0, k, of) for k in (1, 2) for of in ("positions", "rollout")]
    assert capfd.readouterr().out.count("every response is malformed, so RL learns nothing: start from a model that writes <think>") == 1


def test_dry_run(capfd, tmp_path):
    small(tmp_path / "run", dry_run=True)
    out = capfd.readouterr().out
    assert "0.5 epochs; budget 6 to 3 tokens" in out and "Think in exactly 6 tokens" in out and not (tmp_path / "run").exists()


def test_levels_without_a_position():
    levels = [np.array([-1, 0, 1]), np.array([-1, 1])]
    with pytest.raises(UserError, match="no held-out position is hard"):
        rmt.heldout_positions(levels, 4)
    found = rmt.heldout_positions([*levels, np.array([2])], 9)  # nested: what is hard is also easy
    assert [sum(level == d for *_, level in found) for d in range(3)] == [4, 3, 1]


def test_greedy_and_sampled_reasoning_are_told_apart(tokenizer, monkeypatch):
    class Rollouts:
        model, texts = None, [""]

        def __call__(self, places, noise, budget, temperature, stop):
            return [rmt.Sample(d, [""], [1], [2], [], exact=temperature > 0, prefix=True) for *_, d in places]

    Rollouts.tokenizer = tokenizer
    monkeypatch.setattr(rmt, "score_texts", lambda *args: [np.zeros((2, 3))])
    chosen, run = [(0, 1, level) for level in range(3)], SimpleNamespace(ranks=None, samples=lambda *args: None)
    metrics, _ = rmt.evaluate(Rollouts(), [[1, 2, 3]], chosen, rmt.Args(), run, 0, None)
    found = [metrics[f"eval/{kind}"] for kind in ("ntr", "ntr_greedy", "ntr_prefix", "ntr_prefix_greedy", "ntp")]
    assert found == [1, 0, 1, 1, 0]


def test_a_run_of_no_updates_evaluates(whole, tokenizer, tmp_path, monkeypatch):
    """On held-out texts; what stands before a position is in the prompt, and no more."""
    seen, evaluate = [], rmt.evaluate
    monkeypatch.setattr(rmt, "evaluate", lambda *args: seen.append((*args, *evaluate(*args))) or seen[-1][-2:])
    temperatures, rollout = [], rmt.rollout
    monkeypatch.setattr(rmt, "rollout", lambda *args: temperatures.append(args[3]) or rollout(*args))
    small(tmp_path / "none", updates=0)
    assert temperatures == [0.8, 0.8, 0.0, 0.0]
    ((rollouts, texts, chosen, args, *_, metrics, samples),) = seen
    assert texts == rmt.read_texts(args, tokenizer)[1]
    head, tail, _ = rmt.prompt_frame(tokenizer, args.initial_budget, args)
    right = [[], [], []]
    for (k, t, level), s in zip(chosen, samples, strict=True):
        assert s.prompt_ids == head + texts[k][len(rmt.bos_ids(tokenizer)) : t] + tail and s.truth[0] == rollouts.texts[texts[k][t]]
        right[level].append(rollouts.model(torch.tensor([texts[k][:t]])).logits[0, -1].argmax() == texts[k][t])
    assert [metrics[f"eval/ntp_{name}"] for name in rmt.LEVELS] == [np.mean(values) for values in right]
    assert list(map(without_times, run_metrics(tmp_path / "none"))) == [without_times(run_metrics(whole)[0])]


def test_two_ranks_have_the_metrics_of_one(whole, tmp_path):
    changed = [f"--{key.replace('_', '-')}={SMALL[key]}" for key in SMALL if SMALL[key] != rmt.TINY_RUN.get(key)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "rmt.py", "--tiny"]
    command += [*changed, f"--output-dir={tmp_path / 'two'}", "--micro-batch-tokens=300"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for one, two in zip(run_metrics(whole), run_metrics(tmp_path / "two"), strict=True):
        assert without_times(two) == pytest.approx(without_times(one), rel=2e-3, abs=2e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 1}, "--group-size must be at least 2"),
        ({"thresholds": (1.0, 0.5, 2.0)}, "--thresholds must rise"),
        ({"t1": 0.8}, "0 < t1 < t2 < 1"),
        ({"p2": (0.5, 0.5, 0.5)}, "--p1 and --p2 must each be three probabilities"),
        ({"budget_decay": 1.0}, "--budget-decay must be between 0 and 1"),
        ({"initial_budget": 16}, "a budget needs 0 < --initial-budget < --max-new-tokens"),
        ({"eval_only": True}, "--eval-only needs --proxy-model"),
    ],
)
def test_arguments_that_do_not_fit_together(changes, message):
    rmt.check(rmt.Args(**SMALL))
    rmt.check(rmt.Args(**SMALL | {"budget": False, "initial_budget": 16}))
    with pytest.raises(UserError, match=message):
        rmt.check(rmt.Args(**SMALL | changes))


def test_functions_that_both_scripts_need_are_the_same():
    for name in SHARED:
        assert inspect.getsource(getattr(rmt, name)) == inspect.getsource(getattr(grpo_rlvr, name)), name
