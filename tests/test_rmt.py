"""rmt.py: equations by hand, rewards and parsing, entropy and its cache, the loss, and short runs as processes."""

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import rmt
from common import Ranks, load_tokenizer, uniforms

ONE = Ranks(0, 1, torch.device("cpu"))
PIECES = ["<think>", "</think>", "\\boxed{", "}", "{", " the", " cat", "s", "\ufffd", "</", "think", ">", "}.\n", ""]
torch.set_num_threads(1)


def ids(*pieces):
    return [PIECES.index(piece) for piece in pieces]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny/model")


def tiny_llama(vocab_size=64, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=2, max_position_embeddings=512, initializer_range=0.3)  # fmt: skip
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
    for step, expected in ((0, p1), (30, p1), (40, (0.475, 0.3, 0.225)), (50, (0.35, 0.3, 0.35)), (70, p2), (99, p2)):
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
    first = [rmt.draw_positions(levels, (0.1, 0.3, 0.6), noise)[0] for noise in uniforms((2000, 1, 2), "no hard")]
    assert np.isin(first, [0, 4]).mean() == pytest.approx(0.25, abs=0.05)  # hard's 0.6 shared out as 1 : 3
    assert rmt.draw_positions(levels, (0.0, 0.0, 1.0), uniforms((3, 2), "none")) == []
    assert len(rmt.draw_positions(levels, (1.0, 0.0, 0.0), uniforms((3, 2), "few"))) == 2


def test_difficulty_levels():
    text = ids(" the", " cat", "s", "{", "\ufffd", " the", " cat", " the")
    boxable = np.array([piece in (" the", " cat", "s") for piece in PIECES])
    entropy = np.array([3.0, 0.49, 0.5, 3.0, 3.0, 1.0, 1.5, 0.99])
    assert rmt.difficulty(entropy, text, boxable, (0.5, 1.0, 1.5)).tolist() == [-1, -1, 0, -1, -1, 1, 2, 0]


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
    assert "".join(texts[i] for i in tokens if "\ufffd" not in texts[i]) in sample.replace("é", "")  or "é" in texts
    boxable = rmt.boxable_tokens(tokenizer, texts)
    assert not boxable[tokenizer.eos_token_id]
    for i in range(len(texts)):
        if boxable[i]:
            assert not {*texts[i]} & {*"{}"} and texts[i] == tokenizer.decode([i])


# ---------------------------------------------------------------- entropy and its cache


def test_top_entropy_against_brute_force():
    logits = 3 * torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    for row, entropy in zip(logits, rmt.top_entropy(logits)):
        best = sorted(row.softmax(-1).tolist(), reverse=True)[:16]
        assert entropy.item() == pytest.approx(-sum(p / sum(best) * math.log(p / sum(best)) for p in best), abs=1e-5)
    assert rmt.top_entropy(torch.zeros(64)).item() == pytest.approx(math.log(16))


@pytest.mark.parametrize("bos", [[], [1]])
def test_score_texts_position_by_position(bos):
    model = tiny_llama()
    texts = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17]]
    entropies, predictions = rmt.score_texts(model, texts, bos, 8, ONE, "")
    for text, entropy, prediction in zip(texts, entropies, predictions):
        assert len(entropy) == len(prediction) == len(text)
        for t in range(len(text)):
            prefix = bos + text[:t]
            if not prefix:
                assert entropy[t] == 0
                continue
            logits = model(torch.tensor([prefix])).logits[0, -1]
            assert entropy[t] == pytest.approx(rmt.top_entropy(logits).item(), abs=1e-4)
            assert prediction[t] == logits.argmax()


def test_entropy_cache_is_reused_and_invalidated(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(rmt, "score_texts", lambda model, texts, *a: (calls.append(1), [np.full(len(t), 0.7, np.float32) for t in texts])[::-1])
    tiny_llama().save_pretrained(tmp_path / "model")
    texts, cache = [[5, 6, 7], [8, 9]], tmp_path / "cache"

    def entropy(texts=texts, bos=()):
        return rmt.corpus_entropy(None, str(tmp_path / "model"), texts, list(bos), str(cache), 64, ONE)

    first, again = entropy(), entropy()
    assert len(calls) == 1 and [e.tolist() for e in first] == [e.tolist() for e in again]
    entropy(texts=[[5, 6], [7, 8, 9]])  # other windows over the same tokens
    entropy(texts=[[5, 6, 7], [8, 10]])
    entropy(bos=[1])
    assert len(calls) == 4
    tiny_llama(seed=1).save_pretrained(tmp_path / "model")  # other weights under the same name
    entropy()
    assert len(calls) == 5 and len(list(cache.glob("*.npy"))) == 5
