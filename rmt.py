"""RMT, reinforcement mid-training: RL on a few uncertain tokens of a text, next-token prediction on the rest.

Paper: "Reinforcement Mid-Training", arXiv 2509.24375 (sections 4, 5.1, 5.2). Without its three parts
(--no-budget --no-curriculum --ntp-weight 0: the ablations of table 4) it is RPT, "Reinforcement
Pre-Training", arXiv 2506.08007. Sampler, advantages and log-probabilities are grpo_rlvr.py's, word for word.

  0 prepare    entropy of every position under a proxy model, once: easy, medium, hard; the rest takes no RL
  1 sample     positions by the curriculum; G responses to each: think about B_t tokens, box the next token
                                                                                        eq. (1), (3), (4)
  2 score      is the boxed token right, and has the thought the length asked for           eq. (2), (5)
  3 advantage  A^i = (r^i - mean) / std, within the group of one position                        eq. (6)
  4 update     -L_RL on the responses + lambda L_NTP on the texts without the chosen positions
                                                                                        eq. (7), (8), (9)
  5 log, evaluate next-token prediction and next-token reasoning on held-out positions, save

Notation: tau_pos `truth[0]`, o^i `completion_ids`, c thought, y `answer`, l `thought_tokens`, B_t `budget`,
r_len `length_reward`, w `length_weight`, C `chosen`, lambda `ntp_weight`.
Shapes: N positions, G responses to each, B rows, T completion tokens, L prompt and completion tokens, P all
positions of the update's texts, V vocabulary, K chosen positions.

Deviations from the paper, and what it leaves open (docs/rmt.md has all, with both values):
  D1 eq. (9) adds an objective to a loss, and would lower the reward. Here: -L_RL + lambda L_NTP.
  D2 L_NTP is a mean over the tokens of the update; eq. (8) prints a sum over a text.
  D3 a malformed response gets no reward at all, also none for its length.
  D4 p^{t1}, p^{t2}, w, r_max, beta, the thresholds and the number of RL positions are not in the paper.

  python rmt.py --tiny                                                      # here: no network, no GPU
  python rmt.py --model Qwen/Qwen3-1.7B                                     # one GPU
  torchrun --nproc_per_node 8 rmt.py                                        # the paper's setting, RMT-Q3
"""

import bisect
import itertools
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import tyro

from common import (
    TINY, Interrupt, Ranks, Run, UserError, all_gather_list, all_sum, check_sizes, draw_problems, launch,
    not_finite, setup,
)
from modeling import (
    RowCache, check_context, eos_ids, gathered, inverse_cdf, load_model, load_tokenizer, memory_plan,
    micro_batches, optimizer_step, pad_right, padded, positions, rank_share, token_logprobs, token_texts,
    uniforms,
)
from texts import bos_ids, draw_entropies, proxy_entropies, read_texts, score_texts


@dataclass
class Args:
    """RMT mid-training; RPT and the ablations of table 4 are options. Defaults are the paper's values."""

    # ---- run
    tiny: bool = False
    """use the embedded default: a tiny model, minutes on two cores. Every flag still overrides"""
    output_dir: str = ""
    """folder of this run; empty: runs/rmt__<model>__s<seed>__<time>. The entropies are cached beside it"""
    seed: int = 1
    """fixes the order of the texts, the positions and all sampling noise, on any number of ranks"""
    resume: str = ""
    """`auto`: continue the newest run of this model and seed (or --output-dir), if any; or a run folder"""
    dry_run: bool = False
    """print the plan, one prompt and a memory estimate, and stop"""
    eval_only: bool = False
    """evaluate --model, with the first budget, and stop"""
    # ---- model and data
    model: str = "Qwen/Qwen3-14B"
    """the initial policy, hub id or folder; the paper's other: deepseek-ai/DeepSeek-R1-Distill-Qwen-14B"""
    proxy_model: str = ""
    """its entropies say how hard a position is; same tokenizer; empty: the model itself"""
    dataset: tuple[str, ...] = ("KbsdJames/Omni-MATH",)
    """sources, see common.read_rows: hub ids, .jsonl, .parquet or .txt files, folders, `stdlib`"""
    dataset_weights: tuple[float, ...] = (1.0,)
    """share of the texts that each source gives; equal if there is not one for each"""
    text_column: tuple[str, ...] = ("problem", "solution")
    """the columns that, joined by a newline, are the text"""
    chat_template: bool = True
    """put the prompt into the tokenizer's chat template, if it has one"""
    train_texts: int = 4051
    """texts to train on"""
    eval_texts: int = 200
    """held-out texts, of a random split that does not depend on the seed"""
    max_text_tokens: int = 2048
    """longer texts are cut into several; so this limits the prefix, too"""
    # ---- rollout
    prompts_per_update: int = 128
    """texts of an update, over all ranks"""
    rl_positions_per_text: int = 1
    """positions that take RL, on average over the texts of an update (not in the paper)"""
    group_size: int = 8
    """G, completions of each position's prompt"""
    max_new_tokens: int = 2048
    """completions are truncated here (tokens)"""
    temperature: float = 0.8
    """of the sampled distribution, and so of every log-probability (RPT's; not in the paper)"""
    rollout_rows: int = 16
    """completions that one rank generates at once; memory and speed only"""
    # ---- budget, curriculum, reward
    budget: bool = True
    """off: no budget in the prompt and no length reward (table 4, w/o DTB)"""
    initial_budget: int = 800
    """B_0 (tokens)"""
    min_budget: int = 1
    """B_min (tokens)"""
    budget_decay: float = 0.2
    """gamma: the last budget is gamma x B_0"""
    r_max: float = 1.0
    """the largest length reward (not in the paper)"""
    length_weight: float = 0.2
    """w; any right response outranks any wrong one if w < 1 / (1 + r_max) (not in the paper)"""
    match: Literal["exact", "prefix"] = "exact"
    """exact: the next token; prefix: or several whole tokens, RPT's rule"""
    thresholds: tuple[float, float, float] = (0.5, 1.0, 1.5)
    """entropies (nats) at which easy, medium and hard begin (RPT's evaluation; not in the paper)"""
    curriculum: bool = True
    """off: uniform over all positions that are at least easy (table 4, w/o CAS)"""
    t1: float = 0.3
    """end of the early phase, as a fraction of all updates"""
    t2: float = 0.7
    """start of the late phase, as a fraction of all updates"""
    p1: tuple[float, float, float] = (0.6, 0.3, 0.1)
    """p^{t1}: easy, medium, hard in the early phase (in the paper without numbers: easy and medium)"""
    p2: tuple[float, float, float] = (0.1, 0.3, 0.6)
    """p^{t2}: the same in the late phase (in the paper without numbers: hard)"""
    # ---- loss and optimisation
    beta: float = 0.0
    """weight of the KL to the initial policy, loaded only if this is positive (RPT: 0; not in the paper)"""
    ntp_weight: float = 0.1
    """lambda: weight of next-token prediction; 0 leaves it out (table 4, w/o NTP)"""
    updates: int = 317
    """T; 317 are the paper's 10 epochs of 4051 texts, 128 at a time"""
    learning_rate: float = 1e-6
    """of AdamW, constant"""
    weight_decay: float = 0.01
    """of AdamW (RPT's)"""
    max_grad_norm: float = 0.2
    """the global gradient is clipped to this norm (RPT's)"""
    micro_batch_tokens: int = 16384
    """tokens per forward pass on each rank, a shared prompt counted once; memory and speed only"""
    gradient_checkpointing: bool = True
    """keep no activations inside layers, compute them again: much less memory, up to a third more time"""
    # ---- evaluation and saving
    eval_every: int = 20
    """updates between evaluations; 0: only before the first and after the last"""
    eval_positions: int = 200
    """held-out positions per difficulty"""
    save_every: int = 50
    """updates between checkpoints; 0: only after the last. The last two states are kept, and all models"""


TINY_RUN = {  # lengths and optimisation settings for two million parameters; the method is a large run's
    "tiny": True, "model": f"{TINY}/model", "dataset": (f"{TINY}/text.jsonl", "stdlib"),
    "dataset_weights": (0.9, 0.1), "text_column": ("text",), "train_texts": 600, "eval_texts": 100,
    "max_text_tokens": 64, "prompts_per_update": 16, "max_new_tokens": 64, "rollout_rows": 256,
    "initial_budget": 24, "budget_decay": 0.4, "ntp_weight": 1.0, "updates": 120, "learning_rate": 1e-4,
    "max_grad_norm": 1.0, "micro_batch_tokens": 2048, "gradient_checkpointing": False, "eval_every": 40,
    "eval_positions": 128, "save_every": 0,
}


def parse_args() -> Args:
    """tyro's command line over the defaults that --tiny chooses."""
    return tyro.cli(Args, default=Args(**TINY_RUN) if "--tiny" in sys.argv else Args())


def check(args: Args) -> None:
    """UserError for values that do not fit together."""
    if args.group_size < 2:
        raise UserError("--group-size must be at least 2: advantages compare completions of one prompt")
    if args.temperature <= 0:
        raise UserError("--temperature must be positive: greedy completions of one prompt are all the same")
    positive = "train_texts eval_texts max_text_tokens prompts_per_update rl_positions_per_text rollout_rows"
    positive += " max_new_tokens max_grad_norm micro_batch_tokens eval_positions"
    not_negative = "updates length_weight r_max beta ntp_weight learning_rate weight_decay"
    check_sizes(args, positive, f"{not_negative} eval_every save_every")
    if min(args.dataset_weights, default=1) <= 0:
        raise UserError(f"--dataset-weights must be positive, got {args.dataset_weights}")
    if not args.thresholds[0] < args.thresholds[1] < args.thresholds[2]:
        raise UserError("--thresholds must rise")
    if not 0 < args.t1 < args.t2 < 1:
        raise UserError("--t1 and --t2 must be fractions of the run, 0 < t1 < t2 < 1")
    for name, probs in (("--p1", args.p1), ("--p2", args.p2)):
        if min(probs) < 0 or abs(sum(probs) - 1) > 1e-6:
            raise UserError(f"{name} must be three probabilities that sum to 1")
    if args.min_budget < 1 or args.initial_budget < args.min_budget or not 0 < args.budget_decay < 1:
        raise UserError("a budget needs --initial-budget >= --min-budget >= 1 and 0 < --budget-decay < 1")


# ---------------------------------------------------------------- prompts

INSTRUCTION = (
    "Complete the given text by predicting the next token. {think} within <think></think>, "
    "then put the next token in \\boxed{{}}.\n### Text\n"
)
SUFFIX = "\n### Prediction\n"


def prompt_frame(tokenizer, budget: int, chat_template: bool) -> tuple[list[int], list[int], bool]:
    """(ids before the prefix, ids after it, whether they open <think>, as some chat templates do).

    The prefix is put between them as ids, so that a text has one tokenisation. Budget 0 is not mentioned.
    """
    head = INSTRUCTION.format(think=f"Think in exactly {budget} tokens" if budget else "Think")
    rendered = f"{head}@@TEXT@@{SUFFIX}"
    in_chat = bool(chat_template and tokenizer.chat_template)
    if in_chat:
        message = [{"role": "user", "content": rendered}]
        rendered = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    head, tail = (tokenizer.encode(part, add_special_tokens=False) for part in rendered.split("@@TEXT@@"))
    return head if in_chat else bos_ids(tokenizer) + head, tail, rendered.rstrip().endswith("<think>")


# ---------------------------------------------------------------- 0 prepare

LEVELS = ("easy", "medium", "hard")


def boxable_tokens(tokenizer, texts: list[str]) -> np.ndarray:
    """bool [V]: what may stand in a box: valid UTF-8 by itself, without a brace, no tag, not special."""
    tags = ("", "<think>", "</think>")
    boxable = np.array([text not in tags and not re.search("[{}\ufffd]", text) for text in texts])
    boxable[tokenizer.all_special_ids] = False
    return boxable


def difficulty(entropies: np.ndarray, text: list[int], first: int, boxable: np.ndarray, thresholds):
    """Level of every position of a text: 0 easy, 1 medium, 2 hard, each up to the next threshold; -1: no RL.

    Positions before `first` have no prefix, and what cannot stand in a box cannot be answered.
    """
    levels = np.digitize(entropies, thresholds) - 1
    levels[~boxable[text]] = -1
    levels[:first] = -1
    return levels


def prepare(model, tokenizer, texts: list, boxable: np.ndarray, args: Args, run: Run) -> list[np.ndarray]:
    """Step 0: the level of every position of every text; entropy.png shows how many there are."""
    entropies = proxy_entropies(model, tokenizer, texts, args, run)
    first = 1 + len(bos_ids(tokenizer))  # position with a prefix
    levels = [difficulty(e, text, first, boxable, args.thresholds) for e, text in zip(entropies, texts)]
    counts = np.bincount(np.concatenate(levels) + 1, minlength=4)
    if not counts[1:].any():
        raise UserError(f"no position reaches an entropy of {args.thresholds[0]} nats: lower --thresholds")
    if run.ranks.main:
        shares = ", ".join(f"{n} {c / counts.sum():.1%}" for n, c in zip(("no RL", *LEVELS), counts))
        draw_entropies(entropies, args.thresholds, shares, run.path / "entropy.png")
        print(f"{counts.sum()} positions: {shares} (entropy.png)", flush=True)
    return levels


# ---------------------------------------------------------------- 1 sample

DROP_EVERY = 16  # tokens after which the rows that have ended leave the batch


def token_budget(step: int, total_steps: int, initial: int, minimum: int, decay: float) -> int:
    """B_t: how many tokens the prompt asks the thought to have; `step` t of `total_steps` T."""
    return max(minimum, math.floor(initial * decay ** (step / max(1, total_steps))))  # eq. (1)


def budget_at(step: int, args: Args) -> int:
    """The budget of the update after `step` others; 0 without budgets."""
    if not args.budget:
        return 0
    return token_budget(step, args.updates, args.initial_budget, args.min_budget, args.budget_decay)


def curriculum_probs(step: float, t1: float, t2: float, p1: Sequence, p2: Sequence) -> list[float]:
    """p^t over easy, medium, hard: p1 up to t1, p2 from t2 on, linear in between."""
    tau = min(max((step - t1) / (t2 - t1), 0.0), 1.0)
    return [(1 - tau) * early + tau * late for early, late in zip(p1, p2)]  # eq. (3), (4)


def draw_positions(levels: np.ndarray, probs: Sequence[float], noise: torch.Tensor) -> list[int]:
    """C: a position for each row of noise [K, 2], all different: d ~ Categorical(probs), uniform in d.

    levels [P]. A level without candidates left gives its probability to the others, in proportion. Fewer than
    K positions come back if no level that has any probability has candidates.
    """
    left = [np.flatnonzero(levels == d).tolist() for d in range(len(probs))]
    chosen = []
    for level_noise, position_noise in noise.tolist():
        sums = list(itertools.accumulate(p * bool(candidates) for p, candidates in zip(probs, left)))
        if sums[-1] == 0:
            break
        candidates = left[bisect.bisect(sums, level_noise * sums[-1])]
        chosen.append(candidates.pop(int(position_noise * len(candidates))))
    return chosen


def choose_positions(levels: list[np.ndarray], update: int, args: Args) -> list[tuple[int, int]]:
    """C among all positions of the update's texts: (which of the texts, position in it)."""
    flat, probs = np.concatenate(levels), [1.0]
    if args.curriculum:
        probs = curriculum_probs((update - 1) / args.updates, args.t1, args.t2, args.p1, args.p2)
    else:
        flat = np.where(flat >= 0, 0, -1)  # a single level
    noise = uniforms([len(levels) * args.rl_positions_per_text, 2], args.seed, update, "positions")
    where = [(k, t) for k, row in enumerate(levels) for t in range(len(row))]
    return [where[p] for p in draw_positions(flat, probs, noise)]


@dataclass
class Sample:
    """One completion and all that the steps find out about it. Every rank holds all samples of an update."""

    level: int
    truth: list[str]  # texts of the token at this position and of some after it
    prompt_ids: list[int]
    completion_ids: list[int]
    rollout_logprobs: list[float]  # noted while sampling
    ended: bool = False  # else truncated
    thought_tokens: int = -1  # -1: malformed
    match: float = 0.0
    length_reward: float = 0.0
    reward: float = 0.0
    advantage: float = 0.0
    ref_logprobs: list[float] | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


def end_table(texts: list[str], eos: set[int]) -> torch.Tensor:
    """What is_end must know of every token: bool [8, V]."""
    return torch.tensor([
        [token in eos for token in range(len(texts))],
        ["</think>" in text for text in texts],
        [text.endswith("</") for text in texts],  # a tag may be several tokens
        [text.startswith("think") for text in texts],
        ["\\box" in text for text in texts],
        [text.endswith("\\") for text in texts],
        [text.startswith("box") for text in texts],
        ["}" in text for text in texts],
    ])


def is_end(table: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Which tokens end a completion: bool [B, T] of tokens [B, 1 + T], whose first is the prompt's last.

    eos, and the first closing brace after \\boxed after </think>.
    """
    eos, tag, tag_head, tag_tail, box, box_head, box_tail, brace = table[:, tokens]  # [B, 1 + T] each
    tag[:, 1:] |= tag_head[:, :-1] & tag_tail[:, 1:]
    box[:, 1:] |= box_head[:, :-1] & box_tail[:, 1:]
    boxing = (box & (tag.cumsum(1) > 0)).cumsum(1) > 0
    return (eos | (brace & boxing))[:, 1:]


@torch.no_grad()
def rollout(model, prompt_ids: list[list[int]], noise, temperature: float, table) -> list[tuple]:
    """Complete every prompt once: a list of (completion ids, their log-probabilities, whether it ended).

    noise [B, T], T the longest completion; temperature 0 is greedy. A prompt that rows share is read once.
    """
    (size, steps), device, noise = noise.shape, model.device, noise.to(model.device)
    prompts = {ids: n for n, ids in enumerate(dict.fromkeys(map(tuple, prompt_ids)))}  # the N different ones
    which = torch.tensor([prompts[tuple(ids)] for ids in prompt_ids], device=device)  # [B]
    prompt_lengths = torch.tensor([len(ids) for ids in prompts], device=device)[which]  # [B]
    cache, longest = RowCache(model, len(prompts)), max(map(len, prompts))
    hidden = cache.feed(range(len(prompts)), [0] * len(prompts), list(prompts))  # [N, L, D]
    hidden = hidden[which, prompt_lengths - 1]  # [B, D], of every prompt's last token
    cache.keep(which)
    tokens = torch.zeros(size, 1 + steps, dtype=torch.long, device=device)  # [B, 1 + T]
    tokens[:, 0] = torch.tensor([ids[-1] for ids in prompt_ids])  # is_end looks at the token before
    logprobs = torch.zeros_like(noise)  # [B, T]
    rows, places = torch.arange(size, device=device), prompt_lengths  # still going; of a row's next token
    for step in range(steps):
        all_logprobs = (model.lm_head(hidden).float() / (temperature or 1.0)).log_softmax(-1)  # [B, V]
        noise_now = noise[rows, step]
        token = inverse_cdf(all_logprobs.exp(), noise_now) if temperature else all_logprobs.argmax(-1)
        tokens[rows, step + 1] = token
        logprobs[rows, step] = all_logprobs.gather(-1, token.unsqueeze(-1)).squeeze(-1)
        if step + 1 == steps:
            break
        if (step + 1) % DROP_EVERY == 0:  # the only wait for the device
            going = (~is_end(table, tokens[rows, : step + 2]).any(1)).nonzero().squeeze(1)
            if not len(going):
                break
            cache.keep(going)
            rows, places, token = rows[going], places[going], token[going]
        every, one = torch.arange(len(rows), device=device), torch.ones_like(rows)
        last = longest + step + 1
        hidden = cache.feed_tensors(every, places + step, token.unsqueeze(1), one, last)[:, 0]  # [B, D]
    # the eos that ends a completion belongs to it; masks come from these lengths, never from ids
    ends = is_end(table, tokens)  # [B, T]
    ended = ends.any(1)
    lengths = torch.where(ended, ends.int().argmax(1) + 1, steps).tolist()
    rows = zip(tokens[:, 1:].tolist(), logprobs.tolist(), lengths, ended.tolist())
    return [(ids[:length], logprobs[:length], end) for ids, logprobs, length, end in rows]


# ---------------------------------------------------------------- 2 score

RESPONSE = re.compile(  # one thought, anything, one box without braces in it
    r"\s*<think>(?P<thought>((?!</?think>).)*)</think>"
    r"((?!</?think>|\\boxed\{).)*\\boxed\{(?P<answer>[^{}]*)\}",
    re.DOTALL,
)


def read_response(completion_ids: list[int], texts: Sequence[str], opened: bool) -> tuple[int, str] | None:
    """(l, y): the thought's length in tokens, and what is in the box; None if the response is malformed.

    opened: the prompt has ended with <think>. A tag may be several tokens.
    """
    pieces = ["<think>"] * opened + [texts[token] for token in completion_ids]
    found = RESPONSE.match("".join(pieces))
    if found is None:
        return None
    ends = np.cumsum([len(piece) for piece in pieces])
    starts = np.concatenate([[0], ends[:-1]])
    return int(((ends > found.start("thought")) & (starts < found.end("thought"))).sum()), found["answer"]


def matches(answer: str, truth: Sequence[str], rule: str) -> bool:
    """Whether y is the next token (`exact`), or the text goes on with y up to the end of a token (`prefix`).

    Equal text is equal bytes, but for parts of characters (U+FFFD), which match nothing.
    """
    whole = [truth[0]]
    while rule == "prefix" and len(whole[-1]) < len(answer) and len(whole) < len(truth):
        whole.append(whole[-1] + truth[len(whole)])
    return answer in whole and "\ufffd" not in answer


def length_reward(length: int, budget: int, r_max: float) -> float:
    """A triangle: r_max for a thought as long as the budget, 0 for none and for twice the budget or more."""
    if length <= budget:
        return r_max * length / budget
    return r_max * max(0, 2 * budget - length) / budget  # eq. (2)


class Rollouts:
    """Steps 1 and 2 on all positions: each rank completes and scores its share, and gets all samples."""

    def __init__(self, model, tokenizer, args: Args, ranks: Ranks) -> None:
        self.model, self.tokenizer, self.args, self.ranks = model, tokenizer, args, ranks
        self.texts = token_texts(tokenizer, model.config.get_text_config().vocab_size)
        self.table = end_table(self.texts, eos_ids(tokenizer, args.model)).to(model.device)
        self.skip = len(bos_ids(tokenizer))  # a text's BOS is not part of a prompt

    def reward(self, sample: Sample, budget: int, opened: bool) -> None:
        """Step 2."""
        response = read_response(sample.completion_ids, self.texts, opened)
        if response is None:
            return  # D3
        args, w = self.args, self.args.length_weight if budget else 0.0
        sample.thought_tokens, answer = response
        sample.match = float(matches(answer, sample.truth, args.match))
        sample.length_reward = length_reward(sample.thought_tokens, budget, args.r_max) if budget else 0.0
        sample.reward = (1 - w) * sample.match + w * sample.length_reward  # eq. (5)

    def __call__(self, places: list[tuple], noise: torch.Tensor, budget: int):
        """(a Sample for every entry of the global list `places`, seconds); noise [len(places), T].

        places: (text, position in it, level).
        """
        start, samples = time.time(), {}
        head, tail, opened = prompt_frame(self.tokenizer, budget, self.args.chat_template)
        share = range(len(places))[self.ranks.share(len(places))]
        mine = sorted(share, key=lambda i: places[i][1])
        with gathered(self.model):
            for first in range(0, len(mine), self.args.rollout_rows):
                batch = mine[first : first + self.args.rollout_rows]
                prompt_ids = [head + places[i][0][self.skip : places[i][1]] + tail for i in batch]
                rows = rollout(self.model, prompt_ids, noise[batch], self.args.temperature, self.table)
                for i, ids, row in zip(batch, prompt_ids, rows):
                    text, t, level = places[i]
                    samples[i] = Sample(level, [self.texts[token] for token in text[t : t + 32]], ids, *row)
        generated = time.time()
        for sample in samples.values():
            self.reward(sample, budget, opened)
        everyone = all_gather_list([samples[i] for i in share], self.ranks)  # the slowest rank's time counts
        seconds = Counter({"time/rollout_s": generated - start, "time/reward_s": time.time() - generated})
        return everyone, seconds


# ---------------------------------------------------------------- 3 advantage


def group_advantages(rewards: torch.Tensor, normalize_std: bool = True, eps: float = 1e-4) -> torch.Tensor:
    """Rewards [N, G] -> advantages [N, G] within each group (RA3's eq. (2.2), RMT's (6)); eps as in TRL."""
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    std = rewards.std(dim=1, keepdim=True)  # ddof 1, as in TRL
    return centred / (std + eps) if normalize_std else centred  # eq. (2.2), (6)


# ---------------------------------------------------------------- 4 update

SUMS = ("rl_loss", "ntp_loss", "tokens", "kl", "entropy", "rollout_ratio")


def rl_loss(logprobs, ref_logprobs, advantages, mask, beta: float, responses: int):
    """This micro-batch's part of -L_RL, and the sum of the KL over its tokens (nats).

    logprobs, ref_logprobs (None at beta 0) and mask [B, T], advantages [B]; `responses` counts those of the
    whole update, N x G, so that the parts of micro-batches and ranks add up. There is one step per rollout:
    the ratio form has the same gradient, and no clip could act.
    """
    kl = torch.zeros_like(logprobs)
    if beta:
        log_ratio = ref_logprobs - logprobs
        kl = log_ratio.exp() - log_ratio - 1  # k3: unbiased, never negative
    objective = (advantages.unsqueeze(-1) * logprobs - beta * kl) * mask  # [B, T]; log pi(o^i) sums over T
    return -objective.sum() / responses, (kl * mask).sum().item()  # eq. (7)


def ntp_loss(model, texts: list[list[int]], kept: list[np.ndarray], tokens: int):
    """This micro-batch's part of L_NTP: mean negative log-likelihood (nats) of the positions not in C.

    kept: those positions of every text, int64, where m_pos = 1; `tokens` counts them in the whole update.
    """
    rows, cols = positions(kept, model.device)  # [K]
    logprobs, _ = token_logprobs(model, pad_right(texts, 0, model.device), rows, cols)  # [K]
    return -logprobs.sum() / tokens  # eq. (8), D2


def completion_logprobs(model, samples: list[Sample], temperature: float, entropy: bool = False):
    """The training forward: log-probabilities, entropies and mask of the completions' tokens, each [B, T]."""
    device = model.device
    input_ids = pad_right([s.prompt_ids + s.completion_ids for s in samples], 0, device)  # [B, L]
    starts = torch.tensor([len(s.prompt_ids) for s in samples], device=device)  # [B]
    lengths = torch.tensor([len(s.completion_ids) for s in samples], device=device)
    mask = torch.arange(int(lengths.max()), device=device) < lengths.unsqueeze(1)  # from lengths, not ids
    rows, offsets = mask.nonzero(as_tuple=True)  # [K]
    logprobs, entropies = token_logprobs(
        model, input_ids, rows, starts[rows] + offsets, temperature=temperature, entropy=entropy
    )  # [K]
    zeros = torch.zeros(mask.shape, device=device)
    return zeros.masked_scatter(mask, logprobs), zeros.masked_scatter(mask, entropies.detach()), mask


def sample_batches(samples: list[Sample], max_tokens: int, ranks: Ranks | None = None) -> list[list[int]]:
    """Micro-batches in which the completions of a prompt are together, so that it is read once."""
    rows = [s.prompt_ids + s.completion_ids for s in samples]
    return micro_batches(rows, max_tokens, ranks, groups=[tuple(s.prompt_ids) for s in samples])


@torch.no_grad()
def score(model, samples: list[Sample], args: Args) -> list[list[float]]:
    """The samples' log-probabilities under `model`, by the training forward."""
    scores = [[] for _ in samples]
    with gathered(model):
        for batch in sample_batches(samples, args.micro_batch_tokens):
            logprobs, _, _ = completion_logprobs(model, [samples[i] for i in batch], args.temperature)
            for i, row in zip(batch, logprobs.tolist()):
                scores[i] = row[: len(samples[i].completion_ids)]
    return scores


def train_batch(model, optimizer, samples, texts, responses: int, tokens: int, args: Args, ranks: Ranks):
    """One optimizer step on this rank's responses and texts: (sums over them, gradient norm).

    texts: (ids, kept positions) each. responses, tokens: the global denominators of rl_loss and ntp_loss.
    Without an optimizer the model stays as it is.
    """
    nothing = Sample(0, [], [0, 0], [0], [0.0], ref_logprobs=[0.0])
    sums = Counter()
    for batch in sample_batches(samples, args.micro_batch_tokens, ranks):
        micro = [samples[i] for i in batch] or [nothing]  # a rank without work still joins the collectives
        logprobs, entropies, mask = completion_logprobs(model, micro, args.temperature, entropy=True)
        device, mask = mask.device, mask & bool(batch)
        advantages = torch.tensor([s.advantage for s in micro], device=device)
        ref = padded([s.ref_logprobs for s in micro], device) if args.beta else None
        loss, kl = rl_loss(logprobs, ref, advantages, mask, args.beta, responses)
        (loss * ranks.world_size).backward()  # FSDP averages over ranks; the denominator is global already
        gap = (logprobs.detach() - padded([s.rollout_logprobs for s in micro], device))[mask]
        sums.update(rl_loss=loss.item(), kl=kl, tokens=mask.sum().item())
        sums.update(entropy=entropies[mask].sum().item(), rollout_ratio=gap.exp().sum().item())
    rows = [ids for ids, _ in texts] if args.ntp_weight else []
    for batch in micro_batches(rows, args.micro_batch_tokens, ranks):
        micro = [texts[i] for i in batch] or [([0, 0], np.ones(1, dtype=np.int64))]
        loss = ntp_loss(model, *zip(*micro), tokens) * bool(batch)
        (args.ntp_weight * loss * ranks.world_size).backward()  # eq. (9), D1: the gradients add up
        sums.update(ntp_loss=loss.item())
    loss = float(sums["rl_loss"] + sums["ntp_loss"])
    return sums, optimizer_step(model, optimizer, loss, args.max_grad_norm, ranks)


def culprits(model, tokenizer, samples, texts, args: Args, ranks: Ranks) -> str:
    """Those prompts and texts that make the loss or its gradient NaN or infinite."""
    names = [f"prompt ...{tokenizer.decode(s.prompt_ids[-40:])!r}" for s in samples]
    names += [f"text {tokenizer.decode(ids[:20])!r}" for ids, _ in texts]
    rows = [([s], []) for s in samples] + [([], [text]) for text in texts]

    def alone(i: int) -> tuple[float, float]:
        sums, norm = train_batch(model, None, *(rows[i] if i < len(rows) else ([], [])), 1, 1, args, ranks)
        return float(sums["rl_loss"] + sums["ntp_loss"]), norm

    return not_finite(names, alone, ranks)


# ---------------------------------------------------------------- 5 log, evaluate, save

CURVES = (
    "eval/ntr", "eval/ntp", "rollout/thought_tokens", "reward/match", "reward/length", "rollout/malformed",
    "policy/ntp_loss", "policy/entropy", "time/rollout_s",
)
CONSOLE = (
    "match {reward/match:.3f} | thought {rollout/thought_tokens:.1f} of {rollout/budget} tokens, "
    "{rollout/malformed:.0%} malformed | ntp {policy/ntp_loss:.3f} | entropy {policy/entropy:.2f} grad "
    "{optim/grad_norm:.2f} | rollout {time/rollout_s:.1f} update {time/update_s:.1f} s, "
    "{perf/tokens_per_s:.0f} tokens/s"
)
HELDOUT = " | held-out reasoning {eval/ntr:.3f}, prediction {eval/ntp:.3f}"


def sample_metrics(samples: list[Sample], group_size: int) -> dict:
    """What the samples of an update tell by themselves."""
    rewards = torch.tensor([s.reward for s in samples]).view(-1, group_size)  # [N, G]
    counts = Counter(LEVELS[s.level] for s in samples)
    return {
        "reward/mean": rewards.mean().item(),
        "reward/match": mean(s.match for s in samples),
        "reward/length": mean(s.length_reward for s in samples),
        "reward/group_std": rewards.std(dim=1).mean().item(),
        "reward/groups_without_spread": (rewards.amax(1) == rewards.amin(1)).float().mean().item(),
        "rollout/thought_tokens": mean(s.thought_tokens for s in samples if s.thought_tokens >= 0),
        "rollout/completion_tokens": mean(len(s.completion_ids) for s in samples),
        "rollout/malformed": mean(s.thought_tokens < 0 for s in samples),
        "rollout/truncated": mean(not s.ended for s in samples),
    } | {f"data/{level}": counts[level] / len(samples) for level in LEVELS}


def mean(values) -> float:
    values = list(values)
    return float(sum(values) / len(values)) if values else math.nan


def heldout_positions(levels: list[np.ndarray], count: int) -> list[tuple[int, int, int]]:
    """(text, position, level) to evaluate on, `count` per level; nested as in RPT: easy is at least easy.

    UserError if a level has none.
    """
    chosen = []
    for level in range(len(LEVELS)):
        where = [(k, t) for k, row in enumerate(levels) for t in np.flatnonzero(row >= level).tolist()]
        if not where:
            reason = "raise --eval-texts or lower --thresholds"
            raise UserError(f"no held-out position is {LEVELS[level]}: {reason}")
        order = uniforms([len(where)], "held-out positions").argsort().tolist()
        chosen += [(*where[i], level) for i in order[:count]]
    return chosen


def evaluate(rollouts: Rollouts, texts: list, chosen: list, args: Args, run: Run, update: int) -> dict:
    """Tables 1 and 3 on held-out positions, with the budget of the moment and the same noise every time.

    Next-token prediction: the most likely token. Next-token reasoning: the box of one sampled response.
    """
    start, tokenizer, budget = time.time(), rollouts.tokenizer, budget_at(update, args)
    _, predictions = score_texts(rollouts.model, texts, args.micro_batch_tokens, run.ranks)
    noise = uniforms([len(chosen), args.max_new_tokens], args.seed, "evaluation")
    samples, seconds = rollouts([(texts[k], t, level) for k, t, level in chosen], noise, budget)
    if run.ranks.main:
        with open(run.path / "samples.md", "a") as file:
            for s in samples[:: max(1, len(samples) // 6)]:
                verdict = "malformed" if s.thought_tokens < 0 else "right" if s.match else "wrong"
                prompt, response = tokenizer.decode(s.prompt_ids), tokenizer.decode(s.completion_ids)
                title = f"update {update}, {LEVELS[s.level]}, next token {s.truth[0]!r}: {verdict}"
                file.write(f"## {title}\n\n")
                file.write(f"~~~~\n{prompt}[->]{response}\n~~~~\n\n")
    metrics = {}
    for level, name in enumerate(LEVELS):
        right = [predictions[k][t] == texts[k][t] for k, t, d in chosen if d == level]
        metrics[f"eval/ntp_{name}"] = mean(right)
        metrics[f"eval/ntr_{name}"] = mean(s.match for s in samples if s.level == level)
    for kind in ("ntp", "ntr"):
        metrics[f"eval/{kind}"] = mean(metrics[f"eval/{kind}_{name}"] for name in LEVELS)  # the "Average"
    return metrics | {
        "eval/budget": budget,
        "eval/thought_tokens": mean(s.thought_tokens for s in samples if s.thought_tokens >= 0),
        "eval/completion_tokens": mean(len(s.completion_ids) for s in samples),
        "eval/malformed": mean(s.thought_tokens < 0 for s in samples),
        "time/eval_rollout_s": seconds["time/rollout_s"],
        "time/eval_s": time.time() - start,
    }


# ---------------------------------------------------------------- main


def plan(args: Args, ranks: Ranks, train: list[list[int]], heldout: list[list[int]], tokenizer) -> str:
    """What --dry-run prints: sizes, memory, and one prompt."""
    head, tail, _ = prompt_frame(tokenizer, budget_at(0, args), args.chat_template)
    longest = len(head + tail) + max(map(len, train)) + args.max_new_tokens
    reference = (2 if ranks.device.type == "cuda" else 4) * bool(args.beta)  # bytes a parameter
    rollout = args.rollout_rows, longest
    memory = memory_plan(
        args.model, ranks, rollout, args.micro_batch_tokens, args.gradient_checkpointing, reference
    )
    epochs = args.updates * args.prompts_per_update / len(train)
    return (
        f"{len(train)} training and {len(heldout)} held-out texts, {sum(map(len, train))} training tokens\n"
        f"{args.updates} updates of {args.prompts_per_update} texts, {args.rl_positions_per_text} x "
        f"{args.group_size} responses each: {epochs:.1f} epochs; "
        f"budget {budget_at(0, args)} to {budget_at(args.updates, args)} tokens\n"
        f"{memory}\n\na prompt:\n{tokenizer.decode(head + train[0][: len(train[0]) // 2] + tail)}"
    )


def main(args: Args) -> None:
    check(args)
    ranks = setup(args.seed)
    tokenizer = load_tokenizer(args.model)
    train, heldout = read_texts(args, tokenizer)
    if args.dry_run:
        if ranks.main:
            print(plan(args, ranks, train, heldout, tokenizer), flush=True)
        return
    run = Run(args, __file__, ranks)
    model = load_model(args.model, ranks, recompute=args.gradient_checkpointing)
    head, tail, _ = prompt_frame(tokenizer, budget_at(0, args), args.chat_template)
    longest = len(head + tail) + max(map(len, train + heldout))
    check_context(model, longest + args.max_new_tokens, "the longest prompt and --max-new-tokens")
    ref_model = load_model(args.model, ranks, train=False) if args.beta else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    rollouts = Rollouts(model, tokenizer, args, ranks)

    # 0 prepare; before a restore, because the default proxy is the initial model
    levels = prepare(model, tokenizer, train + heldout, boxable_tokens(tokenizer, rollouts.texts), args, run)
    to_evaluate = heldout_positions(levels[len(train) :], args.eval_positions)
    state = run.restore({"policy": model}, optimizer) if run.state else {"update": 0, "cursor": 0}
    interrupt, first = Interrupt(), state["update"]
    if first == 0:
        metrics = evaluate(rollouts, heldout, to_evaluate, args, run, 0)
        run.log({"update": 0, **metrics}, HELDOUT, args.updates)
    if args.eval_only:
        return

    for update in range(first + 1, args.updates + 1):
        # 1 sample, 2 score
        drawn = draw_problems(state["cursor"], args.prompts_per_update, len(train), args.seed)
        state["cursor"] += len(drawn)
        texts, budget = [train[i] for i in drawn], budget_at(update - 1, args)
        chosen = choose_positions([levels[i] for i in drawn], update, args)
        if not chosen:
            raise UserError(f"update {update}: no candidate in its texts; raise --prompts-per-update")
        places = [(texts[k], t, levels[drawn[k]][t]) for k, t in chosen for _ in range(args.group_size)]
        noise = uniforms([len(places), args.max_new_tokens], args.seed, update, "rollout")
        samples, seconds = rollouts(places, noise, budget)

        # 3 advantage
        rewards = torch.tensor([s.reward for s in samples]).view(-1, args.group_size)  # [N, G]
        advantages = group_advantages(rewards)  # [N, G], eq. (6)
        for sample, advantage in zip(samples, advantages.flatten().tolist()):
            sample.advantage = advantage

        # 4 update
        begin = time.time()
        groups = [samples[i : i + args.group_size] for i in range(0, len(samples), args.group_size)]
        mine = rank_share(groups, ranks)
        if ref_model is not None:
            for sample, logprobs in zip(mine, score(ref_model, mine, args)):
                sample.ref_logprobs = logprobs
        taken = set(chosen)  # C
        kept = [[t for t in range(1, len(text)) if (k, t) not in taken] for k, text in enumerate(texts)]
        ntp_tokens = max(1, sum(map(len, kept)))
        rows = [(text, np.array(cols, dtype=np.int64)) for text, cols in zip(texts, kept)]
        rows = sorted(rows, key=lambda row: len(row[0]))[ranks.rank :: ranks.world_size]
        sums, norm = train_batch(model, optimizer, mine, rows, len(samples), ntp_tokens, args, ranks)
        cause = "" if math.isfinite(norm) else culprits(model, tokenizer, mine, rows, args, ranks)
        seconds["time/update_s"] = time.time() - begin

        # 5 log, evaluate, save
        sums = all_sum({key: float(sums[key]) for key in SUMS}, ranks)
        tokens, rl, ntp = sums.pop("tokens"), sums.pop("rl_loss"), sums.pop("ntp_loss")
        if not args.beta:
            del sums["kl"]  # not measured
        metrics = {
            "update": update,
            **sample_metrics(samples, args.group_size),
            "rollout/budget": budget,
            "policy/loss": rl + args.ntp_weight * ntp,  # eq. (9)
            "policy/rl_loss": rl,
            **({"policy/ntp_loss": ntp} if args.ntp_weight else {}),
            **{f"policy/{key}": value / tokens for key, value in sums.items()},
            "optim/grad_norm": norm,
            "data/epoch": state["cursor"] / len(train),
            **seconds,
        }
        read = sum(map(len, samples)) + ntp_tokens * bool(args.ntp_weight)
        metrics["perf/tokens_per_s"] = read / sum(seconds.values())
        last, interrupted = update == args.updates, interrupt.requested(ranks)
        evaluated = last or (args.eval_every and update % args.eval_every == 0)
        if evaluated:
            metrics |= evaluate(rollouts, heldout, to_evaluate, args, run, update)
        run.log(metrics, CONSOLE + HELDOUT * bool(evaluated), args.updates, cause)
        state["update"] = update
        if last or interrupted or (args.save_every and update % args.save_every == 0):
            if last or not interrupted:  # before the state: a run killed between the two does it again
                run.export(model, tokenizer, "final" if last else f"update_{update:06d}")
            run.save(state, {"policy": model}, optimizer)
            run.curves(CURVES)
            if interrupted and not last:
                raise KeyboardInterrupt


if __name__ == "__main__":
    launch(main, parse_args())
