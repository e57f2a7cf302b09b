"""RMT, reinforcement mid-training: RL on a few uncertain tokens of a text, next-token prediction on all the others.

Paper: Reinforcement Mid-Training (arXiv 2509.24375v1). Its ablations (table 4) are options, and all three together are
RPT (Reinforcement Pre-Training, arXiv 2506.08007): --no-budget --no-curriculum --ntp-weight 0.
This file is grpo_rlvr.py with other prompts, another reward and a second loss: read `diff grpo_rlvr.py rmt.py`.

    0 prepare     entropy of every position of the corpus under a proxy model -> easy, medium, hard     once
    1 sample      difficulty by the curriculum, a position at that level, G responses with budget B_t   eq. (1, 3, 4)
    2 score       does the box hold the next token; is the thought as long as asked for                 eq. (2, 5)
    3 advantage   A^i = (r^i - mean) / std within the group of one position                             eq. (6)
    4 update      -L_RL on the responses + lambda L_NTP on the texts, chosen positions masked           eq. (7, 8, 9)
    5 log, evaluate next-token prediction and next-token reasoning on held-out positions, save

Notation: tau_pos -> truth, o^i -> completion_ids, c -> thought, y -> answer, l -> thought_tokens, B_t -> budget, r_max,
w -> length_weight, lambda -> ntp_weight, p^t -> curriculum_probs, C -> chosen. Shapes: N positions, G group size,
B rows, T completion tokens, L tokens of prompt and completion, V vocabulary.

Where we differ from the paper, or it is silent (docs/rmt.md has the whole list):
D1  Eq. (9) adds an objective to a loss. We minimise -L_RL + lambda L_NTP.
D2  L_NTP is a mean per token of the batch; eq. (8) prints a sum, which would outweigh L_RL by the texts' length.
D3  A malformed response gets neither the match nor the length reward.
D4  Difficulty levels are disjoint in training, and nested (entropy above the threshold) in evaluation, as in RPT.
D5  p^{t1}, p^{t2}, w, r_max, beta and the thresholds are not given; the defaults are ours (thresholds: RPT's).

    python rmt.py --tiny                                                       this machine, no network
    python rmt.py --model Qwen/Qwen3-1.7B --micro-batch-tokens 8192            one GPU
    torchrun --nproc_per_node 8 rmt.py                                         the paper's RMT-Q3
"""

import argparse
import collections
import dataclasses
import hashlib
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from common import (
    TINY,
    Interrupt,
    Ranks,
    Run,
    UserError,
    all_gather_list,
    all_sum,
    column,
    gathered,
    grad_norm,
    inverse_cdf,
    launch,
    load_model,
    load_tokenizer,
    micro_batches,
    pad_right,
    read_rows,
    setup,
    together,
    token_logprobs,
    uniforms,
)


# ---------------------------------------------------------------- arguments


@dataclass(frozen=True)
class Args:
    # -- run
    tiny: bool = False
    """Defaults for the embedded model and texts: no network, two CPU cores, a few minutes."""
    seed: int = 1
    """Decides every random choice: the order of the texts, the positions and all sampling noise."""
    output_dir: str = ""
    """Run folder; empty: runs/rmt__<model>__s<seed>__<time>. The entropy cache lies beside it."""
    resume: str = ""
    """`auto` (the latest run of this model and seed, or a new one) or a run folder."""
    dry_run: bool = False
    """Print the plan, one prompt and a memory estimate, and stop."""
    eval_only: bool = False
    """Evaluate --model (with the initial budget) and stop."""
    # -- model and data
    model: str = "Qwen/Qwen3-14B"
    """Hub id or folder of a causal language model. The paper: Qwen3-14B and DeepSeek-R1-Distill-Qwen-14B."""
    proxy_model: str = ""
    """Whose entropy makes a position easy or hard; the same tokenizer; empty: the model itself."""
    dataset: tuple[str, ...] = ("KbsdJames/Omni-MATH",)
    """Corpora, in equal parts: hub ids, .jsonl, .parquet or .txt files, folders, `stdlib`."""
    text_column: tuple[str, ...] = ("problem", "solution")
    """Columns whose contents, joined by a newline, are the text."""
    train_texts: int = 4051
    """Texts to train on, of a fixed random split."""
    eval_texts: int = 200
    """Held-out texts."""
    max_text_tokens: int = 2048
    """Longer texts are cut into texts of this length, so it limits a prefix."""
    chat_template: bool = True
    """Put the prompt into the tokenizer's chat template, if it has one."""
    # -- rollout
    prompts_per_update: int = 128
    """Texts of an update, over all ranks."""
    rl_positions_per_text: int = 1
    """Positions with RL, on average over the texts of an update. The paper: few, no number."""
    group_size: int = 8
    """G, responses for each position."""
    max_new_tokens: int = 2048
    """Longest response."""
    temperature: float = 0.8
    """Of sampling (also in evaluation), and of the responses' log-probabilities. RPT's value; the paper has none."""
    rollout_rows: int = 256
    """Responses generated at once on a rank. Memory and speed only."""
    # -- difficulty and curriculum
    thresholds: tuple[float, float, float] = (0.5, 1.0, 1.5)
    """Entropy (nats) from which a position is easy, medium, hard. RPT's evaluation; the paper has none."""
    curriculum: bool = True
    """Off (table 4, w/o CAS): all positions that are at least easy are equally likely."""
    transition: tuple[float, float] = (0.3, 0.7)
    """t_1 and t_2 as fractions of all updates."""
    p1: tuple[float, float, float] = (0.6, 0.3, 0.1)
    """p^{t1}: probability of easy, medium, hard up to t_1. The paper: emphasises easy and medium, no numbers."""
    p2: tuple[float, float, float] = (0.1, 0.3, 0.6)
    """p^{t2}: the same from t_2 on. The paper: leverages hard, no numbers."""
    # -- budget and reward
    budget: bool = True
    """Off (table 4, w/o DTB): no budget in the prompt and no length reward."""
    initial_budget: int = 800
    """B_0 (tokens)."""
    min_budget: int = 1
    """B_min (tokens)."""
    budget_decay: float = 0.2
    """gamma: the last budget is gamma B_0."""
    r_max: float = 1.0
    """Largest length reward. The paper has no number."""
    length_weight: float = 0.2
    """w. A right answer outranks any wrong one if w < 1 / (1 + r_max). The paper has no number."""
    match: Literal["exact", "prefix"] = "exact"
    """exact: the box holds the next token; prefix: it, and any number of whole tokens after it (RPT's rule)."""
    # -- loss
    beta: float = 0.0
    """Weight of the KL to the initial model, which is loaded only if this is positive. RPT: 0."""
    ntp_weight: float = 0.1
    """lambda. 0 (table 4, w/o NTP): RL only."""
    # -- optimisation
    updates: int = 317
    """T, the total number of steps; 317 are the paper's 10 epochs of 4051 texts at 128."""
    learning_rate: float = 1e-6
    """Of AdamW, constant."""
    weight_decay: float = 0.01
    """Of AdamW (RPT's)."""
    max_grad_norm: float = 0.2
    """Clip of the global gradient norm (RPT's)."""
    micro_batch_tokens: int = 16384
    """Padded tokens per forward and backward pass on a rank. Memory and speed only."""
    max_skipped: int = 5
    """Stop after so many updates in a row with a NaN or infinite gradient; each is skipped and counted."""
    # -- evaluation and saving
    eval_every: int = 20
    """Updates between evaluations; 0: only before the first and after the last."""
    eval_positions: int = 200
    """Held-out positions per difficulty."""
    save_every: int = 50
    """Updates between checkpoints; 0: only the last."""
    keep_checkpoints: int = 2
    """States to resume from that are kept; exported models all are."""


TINY_RUN = {
    "tiny": True, "model": str(TINY / "model"), "dataset": (str(TINY / "text.jsonl"), "stdlib"), "text_column": ("text",),
    "train_texts": 600, "eval_texts": 100, "max_text_tokens": 80, "prompts_per_update": 16, "max_new_tokens": 64,
    "initial_budget": 24, "updates": 60, "learning_rate": 2e-4, "eval_every": 30, "eval_positions": 64, "save_every": 0,
    "max_grad_norm": 1.0, "micro_batch_tokens": 8192,
}  # fmt: skip


def parse_args() -> Args:
    """tyro, with the default values that --tiny chooses."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--tiny", action="store_true")
    chosen, _ = first.parse_known_args()
    return tyro.cli(Args, default=Args(**TINY_RUN if chosen.tiny else {}), description=__doc__.split("\n")[0])


def check(args: Args) -> None:
    """UserError for values that do not fit."""
    if args.group_size < 2:
        raise UserError("--group-size must be at least 2: an advantage compares responses for one position")
    if args.temperature <= 0:
        raise UserError("--temperature must be positive: greedy responses for one position do not differ")
    if not args.thresholds[0] < args.thresholds[1] < args.thresholds[2]:
        raise UserError(f"--thresholds must rise, got {args.thresholds}")
    if not 0 < args.transition[0] < args.transition[1] < 1:
        raise UserError(f"--transition must satisfy 0 < t1 < t2 < 1, got {args.transition}")
    for name, p in (("--p1", args.p1), ("--p2", args.p2)):
        if min(p) < 0 or abs(sum(p) - 1) > 1e-6:
            raise UserError(f"{name} must be three probabilities that sum to 1, got {p}")
    if not args.initial_budget >= args.min_budget >= 1 or not 0 < args.budget_decay < 1:
        raise UserError("budgets: --initial-budget >= --min-budget >= 1 and 0 < --budget-decay < 1 are needed")


# ---------------------------------------------------------------- prompts and data

INSTRUCTION = (
    "Complete the given text by predicting the next token. {think} within <think></think>, "
    "then put the next token in \\boxed{{}}.\n### Text\n"
)
SUFFIX = "\n### Prediction\n"
CORPUS_POOL = 20  # texts read for each one that is used, so that the choice spreads over the rows


def prompt_frame(tokenizer, budget: int, chat: bool) -> tuple[list[int], list[int], bool]:
    """(ids before the prefix, ids after it, whether the prompt itself opens <think>); budget 0 is not mentioned.

    The prefix goes between them as ids, so that the text keeps the one tokenisation it has in the corpus.
    """
    head = INSTRUCTION.format(think=f"Think in exactly {budget} tokens" if budget else "Think")
    if not (chat and tokenizer.chat_template):
        bos = bos_ids(tokenizer)
        return bos + tokenizer.encode(head, add_special_tokens=False), tokenizer.encode(SUFFIX, add_special_tokens=False), False
    message = [{"role": "user", "content": f"{head}@@TEXT@@{SUFFIX}"}]
    rendered = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    head, tail = (tokenizer.encode(part, add_special_tokens=False) for part in rendered.split("@@TEXT@@"))
    return head, tail, rendered.rstrip().endswith("<think>")


def bos_ids(tokenizer) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def read_corpus(source: str, args: Args, tokenizer, wanted: int) -> list[list[int]]:
    """`wanted` texts of one source, as token ids: longer rows are cut; a fixed random choice from the first rows."""
    texts = []
    for row in read_rows(source, split="test" if "Omni-MATH" in source else "train"):  # it has no other split
        text = "\n".join(str(column(row, name, source) or "") for name in args.text_column)
        ids = tokenizer.encode(text, add_special_tokens=False)
        cuts = [ids[i : i + args.max_text_tokens] for i in range(0, len(ids), args.max_text_tokens)]
        texts += [cut for cut in cuts if len(cut) > 1]
        if len(texts) >= wanted * CORPUS_POOL:
            break
    order = uniforms([len(texts)], source, "choice").argsort().tolist()  # not by args.seed: held out stays held out
    return [texts[i] for i in order[:wanted]]


def read_texts(args: Args, tokenizer) -> tuple[list[list[int]], list[list[int]]]:
    """(training texts, held-out texts), both with equal parts of every source."""
    total, train, heldout = args.train_texts + args.eval_texts, [], []
    for source in args.dataset:
        texts = read_corpus(source, args, tokenizer, -(-total // len(args.dataset)))
        cut = round(len(texts) * args.eval_texts / total)
        heldout, train = heldout + texts[:cut], train + texts[cut:]
    if not train or not heldout:
        raise UserError(f"{len(train)} training and {len(heldout)} held-out texts in {', '.join(args.dataset)}: too few")
    return train, heldout


def draw_problems(cursor: int, count: int, size: int, seed: int) -> list[int]:
    """Indices of the next `count` problems after the first `cursor`; each epoch of `size` has its own seeded order."""
    positions = [divmod(position, size) for position in range(cursor, cursor + count)]
    orders = {epoch: np.random.default_rng([seed, 1, epoch]).permutation(size) for epoch, _ in positions}
    return [int(orders[epoch][place]) for epoch, place in positions]


# ---------------------------------------------------------------- 0 prepare: how hard each position is

TOP_TOKENS = 16  # the entropy is that of the 16 most likely next tokens, their probabilities renormalised (RPT)
LEVELS = ("easy", "medium", "hard")


def top_entropy(logits: torch.Tensor, k: int = TOP_TOKENS) -> torch.Tensor:
    """Entropy (nats) of the k most likely next tokens, their probabilities renormalised. [..., V] -> [...]"""
    logprobs = logits.topk(min(k, logits.shape[-1]), dim=-1).values.float().log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


@torch.no_grad()
def score_texts(model, texts: list[list[int]], bos: list[int], max_tokens: int, ranks: Ranks, label: str = ""):
    """(entropy, most likely token) of every position of every text under `model`: two lists of arrays, on all ranks.

    Entry t is about token t given all before it in the text; where nothing is before it, both are 0.
    """
    mine = texts[ranks.share(len(texts))]
    entropies, predictions = [None] * len(mine), [None] * len(mine)
    batches = micro_batches([len(bos) + len(text) for text in mine], max_tokens)
    with gathered(model):
        for batch in tqdm(batches, desc=label, disable=not (ranks.main and label), leave=False):
            input_ids = pad_right([bos + mine[i] for i in batch], 0, ranks.device)  # [B, L]
            logits = model(input_ids=input_ids, use_cache=False).logits  # [B, L, V]
            entropy, best = top_entropy(logits).cpu().numpy(), logits.argmax(-1).cpu().numpy()  # [B, L]
            first = 1 - len(bos)  # the shift by one: column t tells of token t + 1 of what was put in
            for row, i in enumerate(batch):
                here = slice(0, len(mine[i]) - first)
                entropies[i] = np.pad(entropy[row, here], (first, 0))
                predictions[i] = np.pad(best[row, here], (first, 0))
    return all_gather_list(entropies, ranks), all_gather_list(predictions, ranks)


def model_fingerprint(name: str) -> list:
    """What tells one model's weights from another's without reading them."""
    if not Path(name).is_dir():
        return [name, AutoConfig.from_pretrained(name)._commit_hash]
    files = [file for file in sorted(Path(name).iterdir()) if file.suffix in (".safetensors", ".bin", ".json")]
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def corpus_entropy(load, name: str, texts: list[list[int]], bos, folder: Path, max_tokens: int, ranks: Ranks) -> list:
    """Entropy of every position of every text under the proxy model `name`: computed once, then read from `folder`.

    The file is named by a hash of the model (sizes and times of its files, or its commit on the hub) and of all token
    ids, so another model, tokenizer, text or length of texts never meets old values.
    """
    lengths, ids = [len(text) for text in texts], np.concatenate(texts)
    key = hashlib.sha256(repr([TOP_TOKENS, bos, lengths, model_fingerprint(name)]).encode() + ids.tobytes())
    path = folder / f"entropy_{key.hexdigest()[:20]}.npy"
    if all_sum(float(path.is_file()), ranks) == ranks.world_size:
        return np.split(np.load(path), np.cumsum(lengths)[:-1])
    entropies, _ = score_texts(load(), texts, bos, max_tokens, ranks, f"entropy of {len(texts)} texts, once")

    def write() -> None:
        if ranks.main:
            folder.mkdir(parents=True, exist_ok=True)
            np.save(path.with_suffix(".partial.npy"), np.concatenate(entropies))
            path.with_suffix(".partial.npy").replace(path)

    together(write, ranks)
    return entropies


def difficulty(entropy: np.ndarray, text: list[int], boxable: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
    """Level of each position of a text: 0 easy, 1 medium, 2 hard, each from its threshold to the next; -1: no RL.

    The first token has no prefix, and tokens that cannot stand in a box are never candidates.
    """
    levels = np.digitize(entropy, thresholds) - 1
    levels[~boxable[text]] = -1
    levels[0] = -1
    return levels


def draw_histogram(path: Path, entropy: np.ndarray, thresholds: Sequence[float]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 3))
    axis.hist(entropy, bins=60, log=True)
    for threshold, level in zip(thresholds, LEVELS):
        axis.axvline(threshold, color="0.3", linestyle="--", linewidth=1)
        axis.text(threshold, axis.get_ylim()[1], f" {level}", va="top", fontsize=8)
    axis.set(xlabel=f"entropy of the top {TOP_TOKENS} next tokens (nats)", ylabel="positions", title=f"{len(entropy)} positions")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# ---------------------------------------------------------------- 1 sample: curriculum and budget


def token_budget(step: int, total_steps: int, initial: int, minimum: int, decay: float) -> int:
    """B_t: how many tokens the prompt asks the thought to have."""
    return max(minimum, math.floor(initial * decay ** (step / total_steps)))  # eq. (1)


def curriculum_probs(step: int, t1: float, t2: float, p1: Sequence[float], p2: Sequence[float]) -> list[float]:
    """p^t over easy, medium, hard: p1 until t1, p2 from t2 on, linear between them."""
    tau = min(max((step - t1) / (t2 - t1), 0.0), 1.0)
    return [(1 - tau) * early + tau * late for early, late in zip(p1, p2)]  # eq. (3, 4): p1 = p^{t1}, p2 = p^{t2}


def draw_positions(levels: np.ndarray, probs: Sequence[float], noise: torch.Tensor) -> list[int]:
    """C: different positions, one per row of noise [K, 2]; d ~ Categorical(probs), then uniformly at that level.

    levels [P] of all positions of the update's texts, -1: no candidate. A level with no candidate left hands its
    probability to the others in proportion; fewer than K come back if none with any probability is left.
    """
    left = [np.flatnonzero(levels == d).tolist() for d in range(len(probs))]
    chosen = []
    for level_noise, position_noise in noise:
        available = torch.tensor([p * bool(candidates) for p, candidates in zip(probs, left)])
        if not available.any():
            break
        candidates = left[inverse_cdf(available.unsqueeze(0), level_noise.unsqueeze(0)).item()]
        chosen.append(candidates.pop(int(position_noise * len(candidates))))
    return chosen


@dataclass(frozen=True)
class Position:
    """A position to reason about: the question that the prompt asks, and its answer."""

    text: int  # index of the text
    index: int  # pos, in tokens
    level: int  # index into LEVELS
    prompt_ids: list[int]
    truth: list[str]  # texts of tau_pos and the tokens after it


def make_position(text: int, index: int, level: int, ids: list[int], frame: tuple, texts: Sequence[str]) -> Position:
    head, tail, _ = frame
    return Position(text, index, level, head + ids[:index] + tail, [texts[i] for i in ids[index : index + 32]])


# ---------------------------------------------------------------- rollout

DROP_EVERY = 32  # tokens after which finished rows leave the batch


def token_texts(tokenizer, vocab_size: int) -> list[str]:
    """What each token id adds to a text; a part of a character is U+FFFD.

    Decoded behind another token, because some tokenizers strip the space of a first one.
    """
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1]
    cut = len(tokenizer.decode([anchor]))
    texts = tokenizer.batch_decode([[anchor, token] for token in range(len(tokenizer))], clean_up_tokenization_spaces=False)
    return [text[cut:] for text in texts] + [""] * (vocab_size - len(texts))


def boxable_tokens(tokenizer, texts: list[str]) -> np.ndarray:
    """bool [V]: may the token stand in a box? Valid UTF-8 by itself, no brace, no tag, no special token."""
    plain = np.array([bool(text) and not {*text} & {*"{}\ufffd"} and text not in TAGS for text in texts])
    plain[tokenizer.all_special_ids] = False
    return plain


TAGS = ("<think>", "</think>")


def end_table(texts: list[str], eos_ids: set[int]) -> torch.Tensor:
    """What `is_end` must know of each token: a bool table [6, V]."""
    rows = [
        [token in eos_ids for token in range(len(texts))],
        ["</think>" in text for text in texts],
        [text.endswith("</") for text in texts],  # a tag of several tokens
        [text.startswith("think") for text in texts],
        ["box" in text for text in texts],
        ["}" in text for text in texts],
    ]
    return torch.tensor(rows)


def is_end(table: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Whether each completion token ends the response: eos, or the first closing brace after </think> and \\boxed.

    tokens [B, 1 + T]: a completion and the prompt token before it; returns [B, T].
    """
    eos, tag, tag_head, tag_tail, box, brace = table[:, tokens]  # each [B, 1 + T]
    tag[:, 1:] |= tag_head[:, :-1] & tag_tail[:, 1:]
    answering = (box & (tag.cumsum(1) > 0)).cumsum(1) > 0
    return (eos | (brace & answering))[:, 1:]


class Sampler:
    """Draws every row's next token from noise drawn before, and notes the log-probability of what it drew.

    `generate(do_sample=False)` calls `draw` as a logits processor, `ended` as a stopping criterion. All on the device.
    """

    def __init__(self, noise: torch.Tensor, temperature: float, table: torch.Tensor, width: int) -> None:
        self.noise, self.temperature, self.table, self.width = noise, temperature, table, width
        self.rows = torch.arange(len(noise), device=noise.device)  # those still in the batch
        self.logprobs = torch.zeros_like(noise)  # [B, T]

    def draw(self, input_ids, scores):
        step = min(input_ids.shape[1] - self.width, self.noise.shape[1] - 1)
        logprobs = (scores.float() / (self.temperature or 1.0)).log_softmax(-1)  # [B, V], of the sampled distribution
        noise = self.noise[self.rows, step]  # [B]
        tokens = inverse_cdf(logprobs.exp(), noise) if self.temperature else logprobs.argmax(-1)
        self.logprobs[self.rows, step] = logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        return torch.full_like(scores, -math.inf).scatter_(-1, tokens.unsqueeze(-1), 0.0)

    def ended(self, input_ids, scores):
        return is_end(self.table, input_ids[:, self.width - 1 :])[:, -1]


@torch.no_grad()
def rollout(model, prompt_ids: list[list[int]], noise, temperature: float, table, pad: int) -> list[tuple]:
    """Complete every prompt once: a list of (completion ids, their log-probabilities, whether it ended).

    noise [B, T], T the longest completion; temperature 0 is greedy. Prompts are padded on the left, so rows of similar
    length should come together.
    """
    width, steps, device = max(map(len, prompt_ids)), noise.shape[1], model.device
    input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompt_ids], device=device)  # [B, width]
    attention_mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompt_ids], device=device)
    sampler = Sampler(noise.to(device), temperature, table, width)
    tokens = torch.zeros(noise.shape, dtype=torch.long, device=device)  # [B, T]
    previous, cache = input_ids[:, -1:], None
    while len(input_ids) and input_ids.shape[1] < width + steps:
        start = input_ids.shape[1]
        out = model.generate(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            max_new_tokens=min(DROP_EVERY, width + steps - start),
            do_sample=False,
            pad_token_id=pad,
            logits_processor=LogitsProcessorList([sampler.draw]),
            stopping_criteria=StoppingCriteriaList([sampler.ended]),
            return_dict_in_generate=True,
        )
        new, cache = out.sequences[:, start:], out.past_key_values  # [rows, up to DROP_EVERY]
        tokens[sampler.rows, start - width : start - width + new.shape[1]] = new
        going = (~is_end(table, out.sequences[:, width - 1 :]).any(1)).nonzero().squeeze(1)
        cache.batch_select_indices(going)
        input_ids, sampler.rows = out.sequences[going], sampler.rows[going]
        attention_mask = torch.cat([attention_mask[going], torch.ones_like(new[going])], dim=1)
    # the first end, never the pads: pad may be eos, and the eos that ends a completion belongs to it
    ends = is_end(table, torch.cat([previous, tokens], dim=1))  # [B, T]
    ended = ends.any(1)
    lengths = torch.where(ended, ends.int().argmax(1) + 1, steps).tolist()
    rows = zip(tokens.tolist(), sampler.logprobs.tolist(), lengths, ended.tolist())
    return [(ids[:length], logprobs[:length], end) for ids, logprobs, length, end in rows]


# ---------------------------------------------------------------- 2 score

RESPONSE = re.compile(  # one thought, then anything, then one box without braces in it
    r"\s*<think>(?P<thought>(?:(?!</?think>).)*)</think>(?:(?!</?think>|\\boxed\{).)*\\boxed\{(?P<answer>[^{}]*)\}",
    re.DOTALL,
)


def read_response(completion_ids: list[int], texts: Sequence[str], opened: bool) -> tuple[int, str] | None:
    """(l, y): tokens of the thought and content of the box; None if the response is malformed.

    opened: the prompt has ended with <think>. Tags need not be single tokens.
    """
    pieces = ["<think>"] * opened + [texts[i] for i in completion_ids]
    found = RESPONSE.match("".join(pieces))
    if not found:
        return None
    lengths = np.array([len(piece) for piece in pieces])
    start, end = found.span("thought")
    return int(((lengths.cumsum() > start) & (lengths.cumsum() - lengths < end)).sum()), found["answer"]


def matches(answer: str, truth: Sequence[str], rule: str) -> bool:
    """Whether y is tau_pos ("exact"), or the text goes on with y and y ends where a token ends ("prefix").

    Equal texts are equal bytes, but for parts of characters (U+FFFD): they match nothing.
    """
    whole = [truth[0]]
    while rule == "prefix" and len(whole) < len(truth) and len(whole[-1]) < len(answer):
        whole.append(whole[-1] + truth[len(whole)])
    return answer in whole and "\ufffd" not in answer


def length_reward(length: int, budget: int, r_max: float) -> float:
    """Triangle over the thought's length: r_max at the budget, 0 for no thought and from twice the budget on."""
    if length <= budget:
        return r_max * length / budget
    return r_max * max(0, 2 * budget - length) / budget  # eq. (2)


# ---------------------------------------------------------------- 3 advantage


def group_advantages(rewards: torch.Tensor, normalize_std: bool = True, eps: float = 1e-4) -> torch.Tensor:
    """eq. (2.2): rewards [N, G] -> advantages [N, G], within each group. std with ddof 1 and eps as in TRL."""
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred / (rewards.std(dim=1, keepdim=True) + eps) if normalize_std else centred


# ---------------------------------------------------------------- 4 update


@dataclass
class Sample:
    """One response, with all that later steps add to it."""

    position: Position
    prompt_ids: list[int]
    completion_ids: list[int]
    rollout_logprobs: list[float]  # noted while sampling
    ended: bool  # False: truncated at max_new_tokens
    thought_tokens: int = -1  # l; -1: malformed
    match: float = 0.0
    length_reward: float = 0.0
    reward: float = 0.0
    advantage: float = 0.0
    ref_logprobs: list[float] | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


def completion_logprobs(model, samples: list[Sample], temperature: float, entropy: bool = False):
    """The training forward: log-probabilities, entropies and mask of the completions' tokens, each [B, T]."""
    device = model.device
    input_ids = pad_right([s.prompt_ids + s.completion_ids for s in samples], 0, device)  # [B, L]
    starts = torch.tensor([len(s.prompt_ids) for s in samples], device=device)  # [B]
    lengths = torch.tensor([len(s.completion_ids) for s in samples], device=device)
    mask = torch.arange(int(lengths.max()), device=device) < lengths.unsqueeze(1)  # from lengths, never from ids
    rows, offsets = mask.nonzero(as_tuple=True)  # [K]
    chosen = (rows, starts[rows] + offsets)
    logprobs, entropies = token_logprobs(model, input_ids, *chosen, temperature=temperature, entropy=entropy)  # [K]
    zeros = torch.zeros(mask.shape, device=device)
    return zeros.masked_scatter(mask, logprobs), zeros.masked_scatter(mask, entropies.detach()), mask


@torch.no_grad()
def score(model, samples: list[Sample], args: Args) -> list[list[float]]:
    """The samples' log-probabilities under `model`, by the training forward."""
    scores = [[] for _ in samples]
    with gathered(model):
        for batch in micro_batches([len(s) for s in samples], args.micro_batch_tokens):
            logprobs, _, _ = completion_logprobs(model, [samples[i] for i in batch], args.temperature)
            for i, row in zip(batch, logprobs.tolist()):
                scores[i] = row[: len(samples[i].completion_ids)]
    return scores


def padded(rows: list[list[float]], device) -> torch.Tensor:
    """Rows of numbers -> [B, T] float32, zero on the right."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)


def rl_loss(logprobs, ref_logprobs, advantages, mask, beta: float, responses: int) -> tuple[torch.Tensor, torch.Tensor]:
    """-L_RL of eq. (7), this micro-batch's part, and the sum of the KL over its tokens (nats).

    logprobs, ref_logprobs (unused at beta 0) and mask [B, T], advantages [B]; responses: of the whole global batch,
    N x G, so that the parts of micro-batches and ranks add up. One update per rollout: the gradient of A log pi equals
    that of the ratio form, and no clip could act.
    """
    kl = torch.zeros_like(logprobs)
    if beta:
        log_ratio = ref_logprobs - logprobs
        kl = log_ratio.exp() - log_ratio - 1  # k3: unbiased, never negative
    objective = (advantages.unsqueeze(-1) * logprobs - beta * kl) * mask  # [B, T]; log pi(o) is the sum over its tokens
    return -objective.sum() / responses, (kl * mask).detach().sum()  # eq. (7)


def ntp_loss(model, texts: list[list[int]], chosen: list[set[int]], bos: list[int], tokens: int) -> torch.Tensor:
    """L_NTP of eq. (8), this micro-batch's part: negative log-likelihood of the positions without RL, per token (nats).

    chosen: for each text its positions in C; tokens: how many positions of the whole global batch are trained on.
    """
    input_ids = pad_right([bos + text for text in texts], 0, model.device)  # [B, L]
    where = [[b, len(bos) + t] for b, text in enumerate(texts) for t in range(1 - len(bos), len(text)) if t not in chosen[b]]
    rows, cols = torch.tensor(where, device=model.device).T
    logprobs, _ = token_logprobs(model, input_ids, rows, cols)  # [positions with m_pos = 1]
    return -logprobs.sum() / tokens  # eq. (8)


SUMS = ("rl_loss", "ntp_loss", "kl", "entropy", "tokens", "rollout_ratio")


def train_batch(model, optimizer, samples, responses: int, texts, chosen, bos, ntp_tokens: int, args: Args, ranks: Ranks):
    """One optimizer step on this rank's share of responses and texts: (sums over this rank, gradient norm)."""
    sums = collections.Counter()
    empty = Sample(None, [0, 0], [0], [0.0], ended=False)
    for batch in micro_batches([len(s) for s in samples], args.micro_batch_tokens, ranks):
        micro = [samples[i] for i in batch] or [empty]  # a rank with less work still joins FSDP's collectives
        logprobs, entropies, mask = completion_logprobs(model, micro, args.temperature, entropy=True)
        mask = mask & bool(batch)
        rollout_logprobs = padded([s.rollout_logprobs for s in micro], mask.device)
        ref = padded([s.ref_logprobs for s in micro], mask.device) if args.beta and batch else logprobs.detach()
        advantages = torch.tensor([s.advantage for s in micro], device=mask.device)
        loss, kl = rl_loss(logprobs, ref, advantages, mask, args.beta, responses)
        (loss * ranks.world_size).backward()  # FSDP averages over ranks; the denominator is global already
        ratio = (logprobs.detach() - rollout_logprobs)[mask].exp()
        micro_sums = {"entropy": entropies[mask].sum(), "tokens": mask.sum(), "rollout_ratio": ratio.sum()}
        sums.update({key: value.item() for key, value in {"rl_loss": loss, "kl": kl, **micro_sums}.items()})
    lengths = [len(bos) + len(text) for text in texts] if args.ntp_weight else []
    for batch in micro_batches(lengths, args.micro_batch_tokens, ranks):
        parts = [texts[i] for i in batch] or [[0, 0]], [chosen[i] for i in batch] or [set()]
        loss = ntp_loss(model, *parts, bos, ntp_tokens) * bool(batch)
        (args.ntp_weight * loss * ranks.world_size).backward()  # eq. (9): gradients of -L_RL + lambda L_NTP add up here
        sums["ntp_loss"] += loss.item()
    norm = grad_norm(model, args.max_grad_norm)
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return sums, norm


# ---------------------------------------------------------------- the loop

CURVES = ("reward/match", "eval/ntr_accuracy", "rollout/thought_tokens", "reward/length", "rollout/malformed", "policy/ntp_loss",
          "data/hard", "policy/entropy", "time/rollout_s")  # fmt: skip


class Rollouts:
    """Steps 1 and 2 for a list of positions: this rank's share is completed and scored, all ranks get all samples."""

    def __init__(self, model, tokenizer, args: Args, ranks: Ranks) -> None:
        self.model, self.tokenizer, self.args, self.ranks = model, tokenizer, args, ranks
        self.pad = tokenizer.pad_token_id
        eos_ids = {tokenizer.eos_token_id}
        try:  # chat models end their turn with another token
            more = GenerationConfig.from_pretrained(args.model).eos_token_id
            eos_ids |= set(more if isinstance(more, list) else [more]) - {None}
        except OSError:
            pass
        self.texts = token_texts(tokenizer, model.config.get_text_config().vocab_size)
        self.table = end_table(self.texts, eos_ids).to(model.device)

    def reward(self, sample: Sample, budget: int, opened: bool) -> None:
        """Step 2."""
        args, response = self.args, read_response(sample.completion_ids, self.texts, opened)
        if response is None:
            return  # D3: malformed, reward 0
        sample.thought_tokens, answer = response
        sample.match = float(matches(answer, sample.position.truth, args.match))
        w = args.length_weight if budget else 0.0
        sample.length_reward = length_reward(sample.thought_tokens, budget, args.r_max) if budget else 0.0
        sample.reward = (1 - w) * sample.match + w * sample.length_reward  # eq. (5)

    def __call__(self, positions: list[Position], noise: torch.Tensor, budget: int, opened: bool) -> tuple[list[Sample], dict]:
        """One sample per position of the global list, noise [len(positions), T]; seconds in rollout and reward."""
        start = time.time()
        mine = sorted(range(len(positions))[self.ranks.share(len(positions))], key=lambda i: len(positions[i].prompt_ids))
        samples = {}
        with gathered(self.model):  # whole weights on every rank: no collective while the ranks generate
            for first in range(0, len(mine), self.args.rollout_rows):
                batch = mine[first : first + self.args.rollout_rows]
                prompts = [positions[i].prompt_ids for i in batch]
                rows = rollout(self.model, prompts, noise[batch], self.args.temperature, self.table, self.pad)
                for i, row in zip(batch, rows):
                    samples[i] = Sample(positions[i], positions[i].prompt_ids, *row)
        generated = time.time()
        for sample in samples.values():
            self.reward(sample, budget, opened)
        seconds = {"time/rollout_s": generated - start, "time/reward_s": time.time() - generated}
        return all_gather_list([samples[i] for i in sorted(samples)], self.ranks), seconds


def choose_heldout(levels: list[np.ndarray], args: Args) -> list[tuple[int, int, int]]:
    """(text, position, level) of the held-out positions, the same at every evaluation. D4: nested sets, as in RPT:
    easy is every candidate with an entropy above the first threshold, so also the hard ones."""
    chosen = []
    for level in range(len(LEVELS)):
        where = [(i, int(t)) for i, row in enumerate(levels) for t in np.flatnonzero(row >= level)]
        order = uniforms([len(where)], "held-out positions", level).argsort().tolist()
        chosen += [(*where[k], level) for k in order[: args.eval_positions]]
    return chosen


def evaluate(rollouts: Rollouts, texts, heldout, frame, budget: int, bos) -> tuple[dict, list[Sample]]:
    """Next-token prediction (argmax) and next-token reasoning (one sampled response) accuracy on held-out positions,
    with the budget of the moment and the same noise at every evaluation (tables 1 and 3)."""
    start, args = time.time(), rollouts.args
    used = sorted({i for i, _, _ in heldout})
    _, predictions = score_texts(rollouts.model, [texts[i] for i in used], bos, args.micro_batch_tokens, rollouts.ranks)
    predictions = dict(zip(used, predictions))
    positions = [make_position(i, t, level, texts[i], frame, rollouts.texts) for i, t, level in heldout]
    noise = uniforms([len(positions), args.max_new_tokens], args.seed, "eval")
    samples, seconds = rollouts(positions, noise, budget, frame[2])
    metrics = {}
    for level, name in enumerate(LEVELS):
        here = [k for k, position in enumerate(positions) if position.level == level]
        if here:
            right = [predictions[positions[k].text][positions[k].index] == texts[positions[k].text][positions[k].index] for k in here]
            metrics[f"eval/ntp_{name}"] = float(np.mean(right))
            metrics[f"eval/ntr_{name}"] = float(np.mean([samples[k].match for k in here]))
    for kind in ("ntp", "ntr"):  # the tables' Average: of the three levels
        metrics[f"eval/{kind}_accuracy"] = float(np.mean([v for k, v in metrics.items() if k.startswith(f"eval/{kind}_")]))
    metrics |= {
        "eval/response_tokens": sum(len(s.completion_ids) for s in samples) / len(samples),
        "eval/thought_tokens": thought_tokens(samples),
        "eval/malformed": sum(s.thought_tokens < 0 for s in samples) / len(samples),
        "eval/budget": budget,
        "time/eval_rollout_s": seconds["time/rollout_s"],
        "time/eval_s": time.time() - start,
    }
    return metrics, samples


def thought_tokens(samples: list[Sample]) -> float:
    """Mean length of the thoughts of the well-formed responses (tokens)."""
    lengths = [s.thought_tokens for s in samples if s.thought_tokens >= 0]
    return sum(lengths) / max(1, len(lengths))


def sample_metrics(samples: list[Sample], args: Args) -> dict:
    """What the samples of a rollout tell by themselves; every rank holds all of them."""
    rewards = torch.tensor([s.reward for s in samples]).view(-1, args.group_size)
    count, lengths = len(samples), [len(s.completion_ids) for s in samples]
    shares = {f"data/{name}": sum(s.position.level == d for s in samples) / count for d, name in enumerate(LEVELS)}
    matched = {
        f"reward/match_{name}": float(np.mean([s.match for s in samples if s.position.level == d]))
        for d, name in enumerate(LEVELS) if shares[f"data/{name}"]
    }  # fmt: skip
    return {
        "reward/mean": rewards.mean().item(),
        "reward/match": sum(s.match for s in samples) / count,
        **matched,
        "reward/length": sum(s.length_reward for s in samples) / count,
        "reward/group_std": rewards.std(dim=1).mean().item(),
        "reward/groups_without_spread": (rewards.amax(1) == rewards.amin(1)).float().mean().item(),
        "rollout/thought_tokens": thought_tokens(samples),
        "rollout/response_tokens": sum(lengths) / count,
        "rollout/malformed": sum(s.thought_tokens < 0 for s in samples) / count,
        "rollout/truncated": sum(not s.ended for s in samples) / count,
        "rollout/samples": count,
        **shares,
    }


def write_samples(run: Run, update: int, samples: list[Sample], tokenizer, count: int = 6) -> None:
    """Append a few held-out responses, with their verdicts, to samples.md (rank 0)."""
    if run.ranks.main:
        with open(run.path / "samples.md", "a") as file:
            file.write(f"\n# after update {update}\n")
            for s in samples[:: max(1, len(samples) // count)]:
                verdict = "malformed" if s.thought_tokens < 0 else "right" if s.match else "wrong"
                head = f"{LEVELS[s.position.level]}, {verdict}; next: {s.position.truth[0]!r}"
                text = f"{tokenizer.decode(s.prompt_ids)}|>{tokenizer.decode(s.completion_ids)}"
                file.write(f"\n## {head}\n\n~~~~\n{text}{'' if s.ended else ' [truncated]'}\n~~~~\n")


def plan(args: Args, ranks: Ranks, train: list, heldout: list, tokenizer) -> str:
    """What --dry-run prints: sizes, memory and one prompt."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.model))
    weights = sum(p.numel() for p in model.parameters())
    rows = args.prompts_per_update * args.rl_positions_per_text * args.group_size
    held = 16 * weights / ranks.world_size + (2 * weights if ranks.device.type == "cuda" else 0)
    held += 4 * weights / ranks.world_size if args.beta else 0
    head, tail, _ = prompt_frame(tokenizer, args.initial_budget * args.budget, args.chat_template)
    return (
        f"{len(train)} training texts ({sum(map(len, train))} tokens) and {len(heldout)} held-out texts, "
        f"{ranks.world_size} ranks on {ranks.device.type}\n{args.updates} updates x {args.prompts_per_update} texts = "
        f"{args.updates * args.prompts_per_update / len(train):.1f} epochs; {rows} responses per update\n"
        f"budget {args.initial_budget} -> {budget_at(args.updates, args)} tokens\n"
        f"{weights / 1e6:.1f}M parameters; weights, gradients and AdamW: "
        f"{held / 2**30:.2f} GiB per rank, before activations ({args.micro_batch_tokens} tokens at once)\n"
        f"---- a prompt ----\n{tokenizer.decode(head + train[0][: len(train[0]) // 2] + tail)}"
    )


def budget_at(step: int, args: Args) -> int:
    """B_t, or 0 without a budget."""
    if not args.budget:
        return 0
    return token_budget(step, args.updates, args.initial_budget, args.min_budget, args.budget_decay)


def prepare(model, tokenizer, train: list, heldout: list, boxable: np.ndarray, run: Run, args: Args) -> tuple[list, list]:
    """Step 0: levels of every position of the training texts and of the held-out texts."""
    name, ranks, bos = args.proxy_model or args.model, run.ranks, bos_ids(tokenizer)
    if args.proxy_model:
        other, probe = load_tokenizer(name), [tokenizer.decode(text) for text in heldout[:20]]
        if other(probe, add_special_tokens=False)["input_ids"] != tokenizer(probe, add_special_tokens=False)["input_ids"]:
            raise UserError(f"--proxy-model {name} tokenises the corpus differently from {args.model}; take another")

    def load():
        return load_model(name, ranks, train=False) if args.proxy_model else model

    folder = run.path.parent / "entropy"
    entropies = corpus_entropy(load, name, train + heldout, bos, folder, args.micro_batch_tokens, ranks)
    levels = [difficulty(e, text, boxable, args.thresholds) for e, text in zip(entropies, train + heldout)]
    if ranks.main:
        draw_histogram(run.path / "entropy.png", np.concatenate(entropies), args.thresholds)
        counts = np.bincount(np.concatenate(levels) + 1, minlength=4)
        shares = ", ".join(f"{name} {count / counts.sum():.1%}" for name, count in zip(("no RL", *LEVELS), counts))
        print(f"{run.path}: {len(train)} training and {len(heldout)} held-out texts; positions: {shares}", flush=True)
    if not any((row >= 0).any() for row in levels[: len(train)]) or not any((row >= 0).any() for row in levels[len(train) :]):
        raise UserError(f"no position has an entropy of {args.thresholds[0]} nats: lower --thresholds")
    return levels[: len(train)], levels[len(train) :]


def choose_positions(levels: list[np.ndarray], update: int, args: Args) -> list[tuple[int, int]]:
    """C for the texts of an update: (row of the batch, position in the text), by the curriculum at t = update - 1."""
    flat, step = np.concatenate(levels), (update - 1) / args.updates
    probs = curriculum_probs(step, *args.transition, args.p1, args.p2)
    if not args.curriculum:
        flat, probs = np.where(flat >= 0, 0, -1), [1.0]  # one level
    noise = uniforms([args.prompts_per_update * args.rl_positions_per_text, 2], args.seed, update, "positions")
    ends = np.cumsum([len(row) for row in levels])
    rows = [(int(np.searchsorted(ends, k, side="right")), k) for k in draw_positions(flat, probs, noise)]
    return [(row, int(k - ends[row] + len(levels[row]))) for row, k in rows]


def main(args: Args) -> None:
    check(args)
    ranks = setup(args.seed)
    tokenizer = load_tokenizer(args.model)
    train, heldout = read_texts(args, tokenizer)
    if args.dry_run:
        print(plan(args, ranks, train, heldout, tokenizer) if ranks.main else "", flush=True)
        return
    run = Run(args, __file__, ranks)
    model = load_model(args.model, ranks)
    rollouts = Rollouts(model, tokenizer, args, ranks)

    # 0 prepare
    bos, boxable = bos_ids(tokenizer), boxable_tokens(tokenizer, rollouts.texts)
    levels, heldout_levels = prepare(model, tokenizer, train, heldout, boxable, run, args)
    heldout_positions = choose_heldout(heldout_levels, args)

    def evaluation(step: int) -> dict:
        frame = prompt_frame(tokenizer, budget_at(step, args), args.chat_template)
        metrics, samples = evaluate(rollouts, heldout, heldout_positions, frame, budget_at(step, args), bos)
        write_samples(run, step, samples, tokenizer)
        return metrics

    ref_model = load_model(args.model, ranks, train=False) if args.beta and not args.eval_only else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    state = {"update": 0, "cursor": 0, "skipped": 0, "skipped_in_a_row": 0}
    if run.state:
        state = run.restore({"policy": model}, optimizer)
    interrupt, begun, first = Interrupt(), time.time(), state["update"]
    if first == 0:
        metrics = evaluation(0)
        run.log({"update": 0, **metrics})
        if ranks.main:
            print(" | ".join(f"{k.removeprefix('eval/')} {v:.3g}" for k, v in metrics.items()), flush=True)
    if args.eval_only:
        return

    for update in range(first + 1, args.updates + 1):
        # 1 sample and 2 score
        begin = time.time()
        drawn = draw_problems(state["cursor"], args.prompts_per_update, len(train), args.seed)
        state["cursor"] += args.prompts_per_update
        budget = budget_at(update - 1, args)
        frame = prompt_frame(tokenizer, budget, args.chat_template)
        chosen = choose_positions([levels[i] for i in drawn], update, args)
        if not chosen:
            raise UserError(f"no candidate position in the texts of update {update}: raise --prompts-per-update")
        positions = [
            make_position(drawn[row], t, levels[drawn[row]][t], train[drawn[row]], frame, rollouts.texts)
            for row, t in chosen for _ in range(args.group_size)  # a group's rows are neighbours
        ]  # fmt: skip
        noise = uniforms([len(positions), args.max_new_tokens], args.seed, update, "rollout")
        samples, seconds = rollouts(positions, noise, budget, frame[2])

        # 3 advantage
        rewards = torch.tensor([s.reward for s in samples]).view(-1, args.group_size)  # [N, G]
        for sample, advantage in zip(samples, group_advantages(rewards).flatten().tolist()):  # eq. (6)
            sample.advantage = advantage

        # 4 update: every rank takes every world_size-th response and text, by length, which balances the work
        middle = time.time()
        mine = sorted(samples, key=len, reverse=True)[ranks.rank :: ranks.world_size]
        if ref_model is not None:
            for sample, logprobs in zip(mine, score(ref_model, mine, args)):
                sample.ref_logprobs = logprobs
        taken = [{t for row, t in chosen if row == k} for k in range(len(drawn))]  # the positions that NTP leaves out
        by_length = sorted(range(len(drawn)), key=lambda k: len(train[drawn[k]]), reverse=True)[ranks.rank :: ranks.world_size]
        texts, taken_here = [train[drawn[k]] for k in by_length], [taken[k] for k in by_length]
        ntp_tokens = sum(len(train[i]) + len(bos) - 1 for i in drawn) - len(chosen)
        sums, norm = train_batch(
            model, optimizer, mine, len(samples), texts, taken_here, bos, ntp_tokens, args, ranks
        )
        state["update"] = update
        state["skipped"] += not math.isfinite(norm)
        state["skipped_in_a_row"] = 0 if math.isfinite(norm) else state["skipped_in_a_row"] + 1
        seconds["time/update_s"] = time.time() - middle

        # 5 log, evaluate, save
        sums = all_sum({key: float(sums[key]) for key in SUMS}, ranks)
        tokens = max(1.0, sums["tokens"])
        metrics = {
            "update": update, "rollout/budget": budget, **sample_metrics(samples, args),
            "policy/loss": sums["rl_loss"] + args.ntp_weight * sums["ntp_loss"],  # eq. (9)
            "policy/rl_loss": sums["rl_loss"], "policy/ntp_loss": sums["ntp_loss"], "policy/kl": sums["kl"] / tokens,
            "policy/entropy": sums["entropy"] / tokens, "policy/rollout_ratio": sums["rollout_ratio"] / tokens,
            "optim/grad_norm": norm, "optim/skipped": state["skipped"], "data/epoch": state["cursor"] / len(train),
            **seconds, "time/batch_s": time.time() - begin,
            "perf/tokens_per_s": (sum(map(len, samples)) + ntp_tokens) / (time.time() - begin),
        }  # fmt: skip
        last, interrupted = update == args.updates, interrupt.requested(ranks)
        if last or (args.eval_every and update % args.eval_every == 0):
            metrics |= evaluation(update)
        if ranks.device.type == "cuda":
            metrics["perf/peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        run.log(metrics)
        if ranks.main:
            eta = (time.time() - begun) / (update - first) * (args.updates - update)
            held_out = f" | held-out {metrics['eval/ntr_accuracy']:.3f}" if "eval/ntr_accuracy" in metrics else ""
            print(
                f"{update}/{args.updates} match {metrics['reward/match']:.3f}{held_out} | thought "
                f"{metrics['rollout/thought_tokens']:.1f} of {budget} tokens, {metrics['rollout/malformed']:.0%} malformed | "
                f"ntp {sums['ntp_loss']:.3f} | grad {norm:.2f} | rollout {seconds['time/rollout_s']:.1f} update "
                f"{seconds['time/update_s']:.1f} s | {metrics['perf/tokens_per_s']:.0f} tokens/s | ETA {eta / 60:.1f} min",
                flush=True,
            )
        if state["skipped_in_a_row"] >= args.max_skipped:
            raise UserError(f"the gradient was not finite {args.max_skipped} times in a row, last in texts {drawn[:20]}")
        if last or interrupted or (args.save_every and update % args.save_every == 0):
            run.save(update, state, {"policy": model}, optimizer, args.keep_checkpoints)
            run.curves(CURVES)
            if interrupted and not last:
                raise KeyboardInterrupt
            path = run.export(model, tokenizer, "final" if last else f"update_{update:06d}")
            if ranks.main:
                print(f"saved {path}", flush=True)


if __name__ == "__main__":
    launch(main, parse_args())
