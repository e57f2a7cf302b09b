"""Reinforcement mid-training (RMT): positions, budget, curriculum, rewards. The training loop follows."""

import hashlib
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoConfig

from common import (
    Ranks,
    all_gather_list,
    all_sum,
    gathered,
    inverse_cdf,
    micro_batches,
    pad_right,
    together,
)

TOP_TOKENS = 16  # the entropy is that of the 16 most likely next tokens (RPT)
LEVELS = ("easy", "medium", "hard")
INSTRUCTION = (
    "Complete the given text by predicting the next token. {think} within <think></think>, "
    "then put the next token in \\boxed{{}}.\n### Text\n"
)
SUFFIX = "\n### Prediction\n"
RESPONSE = re.compile(  # <think>thought</think> ... \boxed{answer}, one pair of tags, no brace in the answer
    r"\s*<think>(?P<thought>(?:(?!</?think>).)*)</think>(?:(?!</?think>|\\boxed\{).)*\\boxed\{(?P<answer>[^{}]*)\}",
    re.DOTALL,
)
ANSWERED = re.compile(r"</think>.*\\boxed\{[^{}]*\}", re.DOTALL)  # here a response ends


# ---------------------------------------------------------------- positions


def top_entropy(logits: torch.Tensor, k: int = TOP_TOKENS) -> torch.Tensor:
    """Entropy in nats of the k most likely next tokens, their probabilities renormalised. [..., V] -> [...]"""
    logprobs = logits.float().topk(min(k, logits.shape[-1]), dim=-1).values.log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


@torch.no_grad()
def score_texts(model, texts, bos, max_tokens: int, ranks: Ranks, label: str) -> tuple[list, list]:
    """(entropy, most likely token) for every position of every text under `model`: two lists of arrays.

    Entry t is about token t given the tokens before it; a position without any token before it has entropy 0.
    """
    mine = texts[ranks.share(len(texts))]
    entropies, predictions = [None] * len(mine), [None] * len(mine)
    lengths = [len(bos) + len(text) for text in mine]
    with gathered(model):
        for batch in tqdm(micro_batches(lengths, max_tokens), desc=label, disable=not ranks.main, leave=False):
            input_ids = pad_right([bos + mine[i] for i in batch], 0, ranks.device)  # [B, T]
            logits = model(input_ids=input_ids, use_cache=False).logits  # [B, T, V]
            entropy, best = top_entropy(logits).cpu().numpy(), logits.argmax(-1).cpu().numpy()  # [B, T]
            for row, i in enumerate(batch):
                first = 1 - len(bos)  # without BOS nothing predicts the first token
                here = slice(0, lengths[i] - 1)
                entropies[i] = np.pad(entropy[row, here], (first, 0)).astype(np.float32)
                predictions[i] = np.pad(best[row, here], (first, 0)).astype(np.int64)
    return all_gather_list(entropies, ranks), all_gather_list(predictions, ranks)


def corpus_entropy(model, name: str, texts, bos, cache_dir: str, max_tokens: int, ranks: Ranks) -> list:
    """Entropy of every position of every text under the proxy model; computed once, then read from cache_dir.

    The file's name is a hash of the model (its weights' sizes and times, or its commit on the hub) and of all
    token ids, so that another model, tokenizer, text or window length never meets old values.
    """
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    key = hashlib.sha256(repr([TOP_TOKENS, bos, model_fingerprint(name)]).encode())
    key.update(lengths.tobytes())
    key.update(np.concatenate(texts).astype(np.int64).tobytes())
    path = Path(cache_dir) / f"entropy_{key.hexdigest()[:20]}.npy"
    if all_sum(float(path.is_file()), ranks) == ranks.world_size:
        return np.split(np.load(path), lengths.cumsum()[:-1])
    entropies, _ = score_texts(model, texts, bos, max_tokens, ranks, "entropy of the corpus")

    def write() -> None:
        if ranks.main:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_suffix(".partial.npy")
            np.save(aside, np.concatenate(entropies))
            aside.replace(path)

    together(write, ranks)
    return entropies


def model_fingerprint(name: str) -> list:
    """What tells one model's weights from another's without reading them."""
    if not Path(name).is_dir():
        return [name, AutoConfig.from_pretrained(name)._commit_hash]
    files = [f for f in sorted(Path(name).iterdir()) if f.suffix in (".safetensors", ".bin", ".json")]
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]


def difficulty(entropy: np.ndarray, text: Sequence[int], boxable: np.ndarray, thresholds) -> np.ndarray:
    """Level of each position of a text: 0 easy, 1 medium, 2 hard; -1 is left to next-token prediction.

    A level reaches from its threshold up to the next one. The first token (no prefix) and tokens that cannot stand
    in a box are never candidates.
    """
    levels = np.digitize(entropy, thresholds) - 1
    levels[~boxable[np.asarray(text)]] = -1
    levels[:1] = -1
    return levels


def draw_positions(levels: np.ndarray, probs: Sequence[float], noise: torch.Tensor) -> list[int]:
    """Different positions, one per row of noise [K, 2]: d ~ Categorical(probs), then uniformly at that level.

    levels [P]: of all positions of the batch's texts, -1 no candidate. A level with no candidate left hands its
    probability to the others in proportion; fewer than K come back if no level with probability has any left.
    """
    left = [np.flatnonzero(levels == d).tolist() for d in range(len(probs))]
    chosen = []
    for level_noise, position_noise in noise:
        available = torch.tensor([p * bool(c) for p, c in zip(probs, left)])
        if not available.any():
            break
        candidates = left[inverse_cdf(available.unsqueeze(0), level_noise.unsqueeze(0)).item()]
        chosen.append(candidates.pop(int(position_noise * len(candidates))))
    return chosen


# ---------------------------------------------------------------- budget, curriculum


def token_budget(step: int, total_steps: int, initial: int, minimum: int, decay: float) -> int:
    """B_t, the number of tokens that the prompt asks the thought to have."""
    return max(minimum, math.floor(initial * decay ** (step / total_steps)))  # eq. (1)


def length_reward(length: int, budget: int, r_max: float) -> float:
    """Triangle over the thought's length: r_max at the budget, 0 at no thought and from twice the budget on."""
    if length <= budget:
        return r_max * length / budget
    return r_max * max(0, 2 * budget - length) / budget  # eq. (2)


def curriculum_probs(step: int, t1: float, t2: float, p1: Sequence[float], p2: Sequence[float]) -> list[float]:
    """p^t over (easy, medium, hard): p1 (p^{t1}) before t1, p2 (p^{t2}) from t2 on, linear in between. eq. (3)"""
    tau = min(max((step - t1) / (t2 - t1), 0.0), 1.0)
    return [(1 - tau) * a + tau * b for a, b in zip(p1, p2)]  # eq. (4)


# ---------------------------------------------------------------- responses and reward


def token_texts(tokenizer, size: int) -> list[str]:
    """Text of every token id as it stands inside a sentence; a part of a character becomes U+FFFD.

    Decoded behind another token, because SentencePiece tokenizers drop the space of a first one.
    """
    anchor = tokenizer.encode(".", add_special_tokens=False)[-1]
    whole = tokenizer.batch_decode([[anchor, i] for i in range(size)], clean_up_tokenization_spaces=False)
    cut = len(tokenizer.decode([anchor], clean_up_tokenization_spaces=False))
    return [text[cut:] for text in whole]


def boxable_tokens(tokenizer, texts: Sequence[str]) -> np.ndarray:
    """bool [V]: may the token stand in \\boxed{}? It has no brace, is valid UTF-8 alone and is no tag or special."""
    special = {*tokenizer.all_special_ids}
    return np.array(
        [
            i not in special and text not in ("", "<think>", "</think>") and not {*text} & {*"{}\ufffd"}
            for i, text in enumerate(texts)
        ]
    )


def read_response(completion: Sequence[int], texts: Sequence[str], opened: bool) -> tuple[int, str] | None:
    """(l, answer): tokens of the thought and content of the box; None for a malformed response.

    opened: the chat template's prompt has ended with <think> already. Tags need not be single tokens.
    """
    pieces = ["<think>"] * opened + [texts[i] for i in completion]
    found = RESPONSE.match("".join(pieces))
    if not found:
        return None
    start, end = found.span("thought")
    ends = np.cumsum([len(piece) for piece in pieces])
    length = int(((ends > start) & (ends - [len(piece) for piece in pieces] < end)).sum())
    return length, found["answer"]


def matches(answer: str, truth: Sequence[str], rule: str) -> bool:
    """Whether the box holds the next token (exact), or the next token and any number of whole ones after it (prefix).

    truth: texts of the tokens from the position on. Equal text is equal bytes but for parts of characters (U+FFFD),
    which never match.
    """
    if rule == "exact":
        return answer == truth[0]
    ends = [truth[0]]
    while len(ends[-1]) < len(answer) and len(ends) < len(truth):
        ends.append(ends[-1] + truth[len(ends)])
    return answer in ends and "\ufffd" not in answer
