"""RMT, reinforcement mid-training: RL on a few uncertain tokens, next-token prediction on the rest.

Paper: "Reinforcement Mid-Training", arXiv 2509.24375 (sections 4, 5.1, 5.2). Without budget, curriculum and NTP
it is RPT, arXiv 2506.08007. Functions that grpo_rlvr.py has, too, are exact copies. The algorithm, with the
numbers of the paper's equations:

  0 prepare    once: a position's entropy under a proxy model makes it easy, medium, hard, or without RL
  1 sample     positions by the curriculum (3, 4); G responses to each: think B_t tokens (1), box the next token
  2 score      is the boxed token right, and is the thought as long as asked (2); reward (5)
  3 advantage  A^i = (r^i - mean) / std, within the group of one position (6)
  4 update     -L_RL (7) on the responses + lambda L_NTP (8) on the texts without the chosen positions (9)
  5 log, evaluate prediction (NTP) and reasoning (NTR) at held-out positions, save

Notation: tau_pos `truth[0]`, o^i `completion_ids`, c thought, y `answer`, l `thought_tokens`, B_t `budget`,
r_len `length_reward`, w `length_weight`, C `chosen`, lambda `ntp_weight`.
Shapes: N chosen positions, G responses to each, B rows, T completion tokens, P positions of texts, V vocabulary.

Deviations from the paper, and what it leaves open (docs/rmt.md has all):
  D1 eq. (9) as printed adds an objective to a loss, and would lower the reward. Here: -L_RL + lambda L_NTP.
  D2 as printed, (7) and (8) are sums over the tokens of one response and of one text. Here: the means of these
     sums over an update's responses and over its texts.
  D3 a malformed response has reward 0, whatever its length.
  D4 p^{t1}, p^{t2}, w, r_max, beta, the thresholds and the number of RL positions are not in the paper.

  python rmt.py --tiny                                                      # here: no network, no GPU
  python rmt.py --model Qwen/Qwen3-1.7B                                     # one GPU
  torchrun --nproc_per_node 8 rmt.py                                        # the paper's RMT-Q3
"""

import bisect
import html
import itertools
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import tyro
from transformers import LogitsProcessorList

from common import (
    LOGITS_PER_CHUNK, TINY, Interrupt, Ranks, Run, Sampler, Stop, UserError, all_gather_list, all_sum,
    cache_argument, check_sizes, column, draw_problems, eos_ids, gathered, hidden_before, launch, load_model,
    load_tokenizer, memory_plan, micro_batches, new_optimizer, optimizer_step, padded, prefill, rank_share,
    read_rows, setup, token_logprobs, token_texts, uniforms,
)  # fmt: skip


@dataclass
class Args:
    """RMT mid-training; RPT and the ablations of table 4 are options. Defaults are the paper's values.

    The flags come in groups: run, model and data (from --model on), rollout (from --prompts-per-update), algorithm
    (from --budget), optimisation (from --updates), evaluation and saving (from --eval-only).
    """

    # ---- run
    tiny: bool = False
    """the bundled toy model and texts: minutes on two cores. It only changes defaults; flags still override"""
    output_dir: str = ""
    """folder of this run; empty: runs/rmt__<model>__s<seed>__<time>"""
    seed: int = 0
    """fixes the order of the texts, the positions and all sampling noise, on any number of ranks"""
    resume: str = ""
    """`auto`: continue the newest run of this model and seed (or --output-dir), if any; or a run folder"""
    dry_run: bool = False
    """print the plan, a prompt and a memory estimate, then stop"""
    track: bool = False
    """send metrics and curves to Weights & Biases as well (needs `pip install wandb`)"""
    # ---- model and data
    model: str = "Qwen/Qwen3-14B"
    """the initial policy, which must know the format; also deepseek-ai/DeepSeek-R1-Distill-Qwen-14B"""
    proxy_model: str = ""
    """a model with the same tokenizer, whose entropies say how hard a position is; empty: --model"""
    dataset: str = "KbsdJames/Omni-MATH"
    """texts: a hub id, a .jsonl, .parquet or .txt file, or a folder (more: read_rows in common.py)"""
    text_column: tuple[str, ...] = ("problem", "solution")
    """columns; joined by newlines they are the text"""
    chat_template: bool = True
    """put the prompt into the tokenizer's chat template, if it has one"""
    train_texts: int = 4051
    """number of texts to train on"""
    eval_texts: int = 200
    """number of held-out texts; the split is random, and the same for every seed"""
    max_text_tokens: int = 2048
    """a longer text is cut into several. So this limits the prefix in a prompt, too"""
    # ---- rollout
    prompts_per_update: int = 128
    """texts per update, over all ranks. As many positions take RL (the paper gives no number)"""
    group_size: int = 8
    """G, responses to each position"""
    max_new_tokens: int = 2048
    """responses are truncated here (tokens)"""
    temperature: float = 0.8
    """of sampling, and so of every log-probability (RPT's value; the paper gives none)"""
    rollout_rows: int = 16
    """responses that one rank generates at once; memory and speed only"""
    # ---- algorithm
    budget: bool = True
    """off: no budget in the prompt and no length reward (table 4, w/o DTB)"""
    initial_budget: int = 800
    """B_0 (tokens)"""
    budget_decay: float = 0.2
    """gamma: the budget falls from B_0 to gamma x B_0"""
    length_weight: float = 0.2
    """w: share of the length reward. Below 0.5 a right answer always earns more than a wrong one (not in the paper)"""
    match: Literal["exact", "prefix"] = "exact"
    """which answers are right: the next token, or (RPT) also several whole tokens. Both are always evaluated"""
    thresholds: tuple[float, float, float] = (0.5, 1.0, 1.5)
    """entropies (nats) at which easy, medium and hard begin (from RPT's evaluation; not in the paper)"""
    curriculum: bool = True
    """off: uniform over all positions that are at least easy (table 4, w/o CAS)"""
    t1: float = 0.3
    """end of the early phase, as a fraction of all updates"""
    t2: float = 0.7
    """start of the late phase, as a fraction of all updates"""
    p1: tuple[float, float, float] = (0.6, 0.3, 0.1)
    """p^{t1}: probability of easy, medium, hard in the early phase (the paper: easy and medium, no numbers)"""
    p2: tuple[float, float, float] = (0.1, 0.3, 0.6)
    """p^{t2}: the same in the late phase (the paper: hard, no numbers)"""
    beta: float = 0.0
    """weight of the KL to the initial policy, which is loaded only if this is positive (RPT's; not in the paper)"""
    ntp_weight: float = 0.1
    """lambda: weight of next-token prediction; 0 leaves it out (table 4, w/o NTP)"""
    # ---- optimisation
    updates: int = 317
    """T (10 epochs of 4051 texts). Budget and curriculum depend on it, so keep it on --resume"""
    learning_rate: float = 1e-6
    """of AdamW, constant"""
    weight_decay: float = 0.01
    """of AdamW (RPT's value)"""
    max_grad_norm: float = 0.2
    """the global gradient is clipped to this norm (RPT's value)"""
    micro_batch_tokens: int = 16384
    """tokens per forward pass on each rank, a shared prompt counted once; memory and speed only"""
    gradient_checkpointing: bool = True
    """compute activations again in the backward pass: much less memory, up to a third more time"""
    # ---- evaluation and saving
    eval_only: bool = False
    """evaluate --model at budget B_0, then stop; needs --proxy-model, the model from which it was trained"""
    eval_every: int = 20
    """updates between evaluations; 0: only before the first and after the last"""
    eval_positions: int = 200
    """held-out positions of each difficulty"""
    save_every: int = 50
    """updates between checkpoints; 0: only after the last. Of the states for --resume, two are kept"""


TINY_RUN = {  # settings for a million parameters; the method is that of a large run
    "tiny": True, "model": f"{TINY}/text/model", "dataset": f"{TINY}/text/texts.jsonl", "text_column": ("text",),
    "train_texts": 1000, "eval_texts": 200, "max_text_tokens": 96, "prompts_per_update": 16,
    "max_new_tokens": 160, "rollout_rows": 256, "initial_budget": 32, "budget_decay": 0.5,
    "thresholds": (0.75, 1.4, 2.0), "updates": 60, "learning_rate": 2e-4, "max_grad_norm": 1.0,
    "micro_batch_tokens": 4096, "gradient_checkpointing": False, "eval_every": 30, "eval_positions": 128,
    "save_every": 0,
}  # fmt: skip


def check(args: Args) -> None:
    """UserError for values that do not fit together."""
    positive = "temperature train_texts eval_texts max_text_tokens prompts_per_update rollout_rows"
    positive += " max_new_tokens max_grad_norm micro_batch_tokens eval_positions"
    not_negative = "updates length_weight beta ntp_weight learning_rate weight_decay eval_every save_every"
    check_sizes(args, positive, not_negative)
    wrong = {
        "--group-size must be at least 2: advantages compare responses to one prompt": args.group_size < 2,
        "--thresholds must rise": list(args.thresholds) != sorted(set(args.thresholds)),
        "--t1 and --t2 must be fractions of the run, 0 < t1 < t2 < 1": not 0 < args.t1 < args.t2 < 1,
        "--p1 and --p2 must each be three probabilities that sum to 1":
            any(min(p) < 0 or abs(sum(p) - 1) > 1e-6 for p in (args.p1, args.p2)),
        "--budget-decay must be between 0 and 1": not 0 < args.budget_decay < 1,
        "a budget needs 0 < --initial-budget < --max-new-tokens":
            args.budget and not 0 < args.initial_budget < args.max_new_tokens,
        "--eval-only needs --proxy-model: the model from which --model was trained":
            args.eval_only and not args.proxy_model,
    }  # fmt: skip
    for words, found in wrong.items():
        if found:
            raise UserError(words)


# ---------------------------------------------------------------- prompts and texts

# The format. All code that reads a response takes its tags from the first two lines
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
BOX_OPEN, BOX_CLOSE, NOT_IN_BOX = "\\boxed{", "}", "{}"  # the last: characters that cannot be boxed
INSTRUCTION = (
    f"Complete the given text by predicting the next token. Think@@BUDGET@@ within {THINK_OPEN}{THINK_CLOSE}, "
    f"then put the next token in {BOX_OPEN}{BOX_CLOSE}.\n### Text\n@@TEXT@@\n### Prediction\n"
)
BUDGET = " in exactly {} tokens"
POOL = 20  # the texts that a run uses are a random choice from the first POOL times as many


def bos_ids(tokenizer) -> list[int]:
    """What every text begins with: the tokenizer's BOS, or nothing if it has none."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def prompt_frame(tokenizer, budget: int, args: Args) -> tuple[list[int], list[int], bool]:
    """The prompt around the prefix of a text: (ids before it, ids after it, whether they open the thought)."""
    prompt, bos = INSTRUCTION.replace("@@BUDGET@@", BUDGET.format(budget) if budget else ""), bos_ids(tokenizer)
    if args.chat_template and tokenizer.chat_template:
        message = [{"role": "user", "content": prompt}]
        prompt, bos = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True), []
    head, tail = prompt.split("@@TEXT@@")
    # the tail after a letter: some tokenizers put a space before whatever they encode
    head, letter, tail = (tokenizer.encode(part, add_special_tokens=False) for part in (head, "a", "a" + tail))
    return bos + head, tail[len(letter) :], prompt.rstrip().endswith(THINK_OPEN)


def read_texts(args: Args, tokenizer) -> tuple[list[list[int]], list[list[int]], str]:
    """(training texts, held-out texts, a line about them); a text is token ids, with BOS if there is one."""
    texts, wanted, skipped = [], args.train_texts + args.eval_texts, 0
    for row in read_rows(args.dataset, split="test" if "Omni-MATH" in args.dataset else "train"):  # its only one
        values = [column(row, name, args.dataset) for name in args.text_column]
        if not all(isinstance(value, (str, int, float)) and str(value).strip() for value in values):
            skipped += 1
            continue
        text = "\n".join(map(str, values)).encode("utf-8", "replace").decode()  # lone surrogates
        ids = tokenizer.encode(text, add_special_tokens=False)
        cuts = [ids[i : i + args.max_text_tokens] for i in range(0, len(ids), args.max_text_tokens)]
        texts += [bos_ids(tokenizer) + cut for cut in cuts if len(cut) > 1]
        if len(texts) >= POOL * wanted:
            break
    order = uniforms([len(texts)], "split").argsort().tolist()[:wanted]  # not by the seed
    cut = round(len(order) * args.eval_texts / wanted)
    heldout, train = [texts[i] for i in order[:cut]], [texts[i] for i in order[cut:]]
    about = f"{args.dataset}: {len(train)} training and {len(heldout)} held-out texts"
    about += f"; {skipped} rows without text skipped" * bool(skipped)
    if not train or not heldout:
        raise UserError(f"{about}: give more data, or longer texts")
    return train, heldout, about


# ---------------------------------------------------------------- 0 prepare

LEVELS = ("easy", "medium", "hard")


def top_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy (nats) of the 16 most likely next tokens (RPT), renormalised. [..., V] -> [...]"""
    logprobs = logits.topk(16, dim=-1).values.float().log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


@torch.no_grad()
def score_texts(model, texts: list[list[int]], max_tokens: int, ranks: Ranks) -> list[np.ndarray]:
    """For every text an array [2, L]. Column t: the entropy of token t given those before, and the most likely one."""
    mine, head = texts[ranks.share(len(texts))], model.get_output_embeddings()
    scores, chunk = [None] * len(mine), LOGITS_PER_CHUNK // model.config.get_text_config().vocab_size
    with gathered(model):
        for batch in micro_batches([len(text) for text in mine], max_tokens):
            where = [np.arange(1, len(mine[i])) for i in batch]
            hidden = model.run(hidden_before, [mine[i] for i in batch], where)  # [P, D]
            logits = map(head, hidden.split(max(1, chunk)))  # of one chunk at a time
            found = [torch.stack([top_entropy(part), part.argmax(-1).float()]) for part in logits]
            found = torch.cat(found, 1).cpu()  # [2, P]
            for i, values in zip(batch, found.split([len(w) for w in where], 1)):
                scores[i] = np.pad(values.numpy(), ((0, 0), (1, 0)))  # none for the first token
    return all_gather_list(scores, ranks)


def proxy_entropies(model, tokenizer, texts: list[list[int]], args: Args, run: Run) -> list[np.ndarray]:
    """Entropies of every position of every text under the proxy, which may be `model` itself.

    A resumed run reads them from its folder. UserError if the proxy has another tokenizer.
    """
    lengths, path = [len(text) for text in texts], run.path / "entropies.npy"
    if run.state and path.exists():
        return np.split(np.load(path), np.cumsum(lengths)[:-1])
    if args.proxy_model != args.model:
        own, probe = load_tokenizer(args.proxy_model), [tokenizer.decode(text) for text in texts[:50]]
        if own(probe).input_ids != tokenizer(probe).input_ids:
            raise UserError(f"--proxy-model {args.proxy_model} and --model tokenise the texts differently")
        model = load_model(args.proxy_model, own, run.ranks, max(lengths), train=False)
    run.say(f"entropies of {sum(lengths)} positions under {args.proxy_model}, once ...")
    entropies = [scores[0] for scores in score_texts(model, texts, args.micro_batch_tokens, run.ranks)]
    if run.ranks.main:
        np.save(path, np.concatenate(entropies))
    return entropies


def difficulty(entropies: list, texts: list[list[int]], tokenizer, words: list[str], thresholds: tuple) -> list:
    """Level of every position of every text: 0 easy, 1 medium, 2 hard; -1 takes no RL. words: texts of all tokens.

    What has no text before it, and what cannot be boxed, takes no RL whatever its entropy.
    """
    never = (THINK_OPEN, THINK_CLOSE, "\ufffd", *NOT_IN_BOX, *tokenizer.all_special_tokens)
    boxable = np.array([bool(word) and not any(part in word for part in never) for word in words])  # [V]
    levels = [np.where(boxable[text], np.digitize(row, thresholds) - 1, -1) for row, text in zip(entropies, texts)]
    for row in levels:
        row[: 1 + len(bos_ids(tokenizer))] = -1
    return levels


def heldout_positions(levels: list[np.ndarray], count: int) -> list[tuple[int, int, int]]:
    """(text, position, level) to evaluate on: for each level `count` at it or above, as in RPT's evaluation."""
    chosen = []
    for level, name in enumerate(LEVELS):
        where = [(k, int(t), level) for k, row in enumerate(levels) for t in np.flatnonzero(row >= level)]
        if not where:
            raise UserError(f"no held-out position is {name}: raise --eval-texts or lower --thresholds")
        chosen += [where[i] for i in uniforms([len(where)], "held-out positions").argsort().tolist()[:count]]
    return chosen


# ---------------------------------------------------------------- 1 sample

CHUNK = 16  # tokens after which the rows that have ended leave the batch


def token_budget(step: int, total_steps: int, initial: int, minimum: int, decay: float) -> int:
    """B_t: the length (tokens) that the prompt asks of a thought; `step` t of `total_steps` T."""
    return max(minimum, math.floor(initial * decay ** (step / max(1, total_steps))))  # eq. (1)


def budget_at(step: int, args: Args) -> int:
    """The budget of the update after `step` others; 0 without budgets."""
    if not args.budget:
        return 0
    return token_budget(step, args.updates, args.initial_budget, minimum=1, decay=args.budget_decay)


def curriculum_probs(step: float, t1: float, t2: float, p1: Sequence, p2: Sequence) -> list[float]:
    """p^t over easy, medium, hard: p1 up to t1, p2 from t2 on, linear in between."""
    tau = min(max((step - t1) / (t2 - t1), 0.0), 1.0)
    return [(1 - tau) * early + tau * late for early, late in zip(p1, p2)]  # eq. (3), (4)


def choose_positions(levels: list[np.ndarray], update: int, args: Args) -> list[tuple[int, int, int]]:
    """C: as many different (text, position, level) as there are texts, from any of them. First a level is drawn
    by p^t, then a position at that level, uniformly.

    Levels without a candidate leave their probability to the others. Fewer come back when candidates run out.
    """
    everything = [(k, t, int(d)) for k, row in enumerate(levels) for t, d in enumerate(row) if d >= 0]
    probs, left, chosen = [1.0], [everything], []
    if args.curriculum:
        probs = curriculum_probs((update - 1) / args.updates, args.t1, args.t2, args.p1, args.p2)
        left = [[place for place in everything if place[2] == level] for level in range(len(LEVELS))]
    for level_noise, position_noise in uniforms([len(levels), 2], args.seed, update, "positions").tolist():
        sums = list(itertools.accumulate(p * bool(candidates) for p, candidates in zip(probs, left)))
        if sums[-1] > 0:
            candidates = left[bisect.bisect(sums, level_noise * sums[-1])]
            chosen.append(candidates.pop(int(position_noise * len(candidates))))
    if not chosen:
        raise UserError(f"update {update}: no candidate in its texts; raise --prompts-per-update")
    return chosen


@dataclass
class Sample:
    """One response and all that the steps find out about it. Every rank holds all samples of an update."""

    level: int
    truth: list[str]  # texts of the token at this position and of some after it
    prompt_ids: list[int]
    completion_ids: list[int]
    rollout_logprobs: list[float]  # noted while sampling
    ended: bool = False  # else truncated
    thought_tokens: int = -1  # -1: malformed
    exact: bool = False  # the answer is the next token
    prefix: bool = False  # it is one or several whole tokens with which the text goes on
    length_reward: float = 0.0
    reward: float = 0.0
    advantage: float = 0.0
    predicted: str = ""  # in an evaluation: the most likely token without a thought

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


def is_end(table: tuple[list[str], set[int]], tokens: torch.Tensor) -> torch.Tensor:
    """Which tokens end a response: bool [B, T] of tokens [B, 1 + T], whose first is the prompt's last."""
    texts, eos = table  # texts of all tokens; ids of those that end any text
    ends = torch.isin(tokens, torch.tensor(sorted(eos), device=tokens.device))[:, 1:]
    for row, ids in zip(ends, tokens[:, 1:].tolist()):
        pieces = [texts[token] for token in ids]
        if found := END.search("".join(pieces)):
            row[bisect.bisect_left(list(itertools.accumulate(map(len, pieces))), found.end())] = True  # the box closes
    return ends


@torch.no_grad()
def rollout(model, prompt_ids: list[list[int]], noise, temperature: float, table) -> list[tuple]:
    """Complete every prompt once: a list of (completion ids, their log-probabilities, whether it ended).

    noise [B, T], T tokens at most; temperature 0 is greedy. A prompt that rows share is read once.
    """
    (size, steps), device = noise.shape, model.device
    ids, mask, cache = prefill(model, prompt_ids)  # [B, P]
    start, sampler = ids.shape[1], Sampler(noise, ids.shape[1], temperature, device)
    tokens = torch.zeros(size, 1 + steps, dtype=torch.long, device=device)  # [B, 1 + T], the prompt's last first
    for first in range(0, steps, CHUNK):
        new = min(CHUNK, steps - first)
        ids = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new, synced_gpus=False, use_cache=True,
            logits_processor=LogitsProcessorList([sampler]), **{cache_argument(model): cache},
        )  # fmt: skip
        mask = torch.cat([mask, mask.new_ones(len(mask), new)], 1)
        tokens[sampler.rows, : 1 + first + new] = ids[:, start - 1 :]
        going = (~is_end(table, ids[:, start - 1 :]).any(1)).nonzero()[:, 0]
        if not len(going):
            break
        if len(going) < len(ids):  # rows that have ended leave
            cache.reorder_cache(going)
            ids, mask, sampler.rows = ids[going], mask[going], sampler.rows[going]
    ends = is_end(table, tokens)  # [B, T]; the token that ends a completion belongs to it
    ended = ends.any(1)
    lengths = torch.where(ended, ends.int().argmax(1) + 1, steps).tolist()
    rows = zip(tokens[:, 1:].tolist(), sampler.logprobs.tolist(), lengths, ended.tolist())
    return [(ids[:length], logprobs[:length], end) for ids, logprobs, length, end in rows]


# ---------------------------------------------------------------- 2 score

_O, _C, _B, _E = map(re.escape, (THINK_OPEN, THINK_CLOSE, BOX_OPEN, BOX_CLOSE))
END = re.compile(f"{_C}.*?{_B}.*?{_E}", re.DOTALL)  # a response ends with the first box after its thought
RESPONSE = re.compile(
    rf"\s*{_O}(?P<thought>((?!{_O}|{_C}).)*){_C}"  # one thought
    rf"((?!{_O}|{_C}|{_B}).)*"  # anything but another
    rf"{_B}(?P<answer>[^{re.escape(NOT_IN_BOX)}]*){_E}",  # one box
    re.DOTALL,
)


def read_response(completion_ids: list[int], texts: Sequence[str], opened: bool) -> tuple[int, str] | None:
    """(l, y): tokens of the thought, and what is in the box; None if malformed. opened: the prompt opened it."""
    pieces = [THINK_OPEN] * opened + [texts[token] for token in completion_ids]
    found = RESPONSE.match("".join(pieces))
    if found is None:
        return None
    sizes = np.array([len(piece) for piece in pieces])
    ends = sizes.cumsum()
    thought = (ends > found.start("thought")) & (ends - sizes < found.end("thought"))
    return int(thought.sum()), found["answer"]


def matches(answer: str, truth: Sequence[str]) -> tuple[bool, bool]:
    """(exact: y is the next token, prefix: y is one or several whole tokens with which the text goes on)."""
    whole = "\ufffd" not in answer  # a part of a character matches nothing
    return whole and answer == truth[0], whole and answer in itertools.accumulate(truth)


def length_reward(length: int, budget: int, r_max: float) -> float:
    """A triangle: r_max for a thought as long as the budget; 0 for no thought, and for twice the budget or more."""
    return r_max * max(0, budget - abs(length - budget)) / budget  # eq. (2)


class Rollouts:
    """Steps 1 and 2 on all positions: each rank completes and scores its share, and gets all samples."""

    def __init__(self, model, tokenizer, args: Args, ranks: Ranks) -> None:
        self.model, self.tokenizer, self.args, self.ranks = model, tokenizer, args, ranks
        self.texts = token_texts(tokenizer, model.config.get_text_config().vocab_size)
        self.table = self.texts, eos_ids(tokenizer, args.model)

    def __call__(self, places: list[tuple], noise, budget: int, temperature: float, stop: Callable) -> list[Sample]:
        """A Sample for each (text, position, level) of `places`, a list that all ranks share.

        stop: called between batches, by every rank equally often; it may raise Stop.
        """
        samples, skip = {}, len(bos_ids(self.tokenizer))  # no BOS inside a prompt
        head, tail, opened = prompt_frame(self.tokenizer, budget, self.args)
        share = range(len(places))[self.ranks.share(len(places))]
        mine, most = sorted(share, key=lambda i: places[i][1]), -(-len(places) // self.ranks.world_size)
        with gathered(self.model):
            for first in range(0, most, self.args.rollout_rows):
                stop()
                batch = mine[first : first + self.args.rollout_rows]
                prompt_ids = [head + places[i][0][skip : places[i][1]] + tail for i in batch]
                rows = rollout(self.model, prompt_ids, noise[batch], temperature, self.table) if batch else []
                for i, ids, row in zip(batch, prompt_ids, rows):
                    text, t, level = places[i]
                    truth = [self.texts[token] for token in text[t : t + 32]]
                    samples[i] = Sample(level, truth, ids, *row)
                    self.reward(samples[i], budget, opened)
        return all_gather_list([samples[i] for i in share], self.ranks)

    def reward(self, sample: Sample, budget: int, opened: bool) -> None:
        """Step 2. Notes both `exact` and `prefix`; --match says which one is rewarded."""
        if (response := read_response(sample.completion_ids, self.texts, opened)) is None:
            return  # D3
        sample.thought_tokens, answer = response
        sample.exact, sample.prefix = matches(answer, sample.truth)
        w = self.args.length_weight if budget else 0.0
        sample.length_reward = length_reward(sample.thought_tokens, budget, 1.0) if budget else 0.0
        sample.reward = (1 - w) * getattr(sample, self.args.match) + w * sample.length_reward  # eq. (5)


# ---------------------------------------------------------------- 3 advantage


def group_advantages(rewards: torch.Tensor, normalize_std: bool = True, eps: float = 1e-4) -> torch.Tensor:
    """Rewards [N, G] -> advantages [N, G] within each group (RA3's eq. (2.2), RMT's (6)); eps as in TRL."""
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    std = rewards.std(dim=1, keepdim=True)  # ddof 1, as in TRL
    return centred / (std + eps) if normalize_std else centred  # eq. (2.2), (6)


# ---------------------------------------------------------------- 4 update


def rl_loss(logprobs, ref_logprobs, advantages, mask, beta: float, responses: int):
    """A micro-batch's part of -L_RL over all `responses` of the update, and the sum of its KL (nats).

    logprobs, ref_logprobs (None at beta 0) and mask [B, T], advantages [B]. With one step per rollout, as
    here, the clipped ratio has the same gradient.
    """
    kl = torch.zeros_like(logprobs)
    if beta:
        log_ratio = ref_logprobs - logprobs
        kl = log_ratio.exp() - log_ratio - 1  # k3: unbiased, never negative
    objective = (advantages.unsqueeze(-1) * logprobs - beta * kl) * mask  # [B, T]; log pi(o^i) sums over T
    return -objective.sum() / responses, (kl * mask).sum().item()  # eq. (7), D2


def ntp_loss(model, texts: list[list[int]], kept: list[np.ndarray], total: int) -> torch.Tensor:
    """A micro-batch's part of L_NTP (nats) over all `total` texts of the update; kept: where m_pos = 1."""
    logprobs, _ = token_logprobs(model, texts, kept)  # [P]
    return -logprobs.sum() / total  # eq. (8), D2


def completion_logprobs(model, samples: list[Sample], temperature: float, entropy: bool = False):
    """The training forward: log-probabilities, entropies and mask of the completions' tokens, each [B, T]."""
    starts = [len(s.prompt_ids) for s in samples]
    lengths = torch.tensor([len(s.completion_ids) for s in samples], device=model.device)  # [B]
    mask = torch.arange(int(lengths.max()), device=model.device) < lengths.unsqueeze(1)  # from lengths, not ids
    logprobs, entropies = token_logprobs(
        model, [s.prompt_ids + s.completion_ids for s in samples],
        [np.arange(start, len(s)) for start, s in zip(starts, samples)],
        prompt_lengths=starts, temperature=temperature, entropy=entropy,
    )  # [K]  # fmt: skip
    zeros = torch.zeros(mask.shape, device=model.device)
    return zeros.masked_scatter(mask, logprobs), zeros.masked_scatter(mask, entropies.detach()), mask


def sample_batches(model, samples: list[Sample], max_tokens: int, ranks: Ranks | None = None) -> list[list[int]]:
    """Micro-batches. Where completions go on from their prompt's cache, those of a prompt are together."""
    if not model.shares_prompts:
        return micro_batches([len(s) for s in samples], max_tokens, ranks)
    prompts = [tuple(s.prompt_ids) for s in samples]
    return micro_batches([len(s.completion_ids) for s in samples], max_tokens, ranks, prompts)


def learn(model, ref_model, optimizer, samples, texts, kept, args: Args, ranks: Ranks, stop: Callable) -> dict:
    """Step 4: one optimizer step on all samples and on the `kept` positions of all texts; its metrics.

    stop: called before each micro-batch; it may raise Stop. A large update takes longer than the 30 s that
    torchrun leaves after a SIGTERM.
    """
    nothing, ref, sums = Sample(0, [], [0, 0], [0], [0.0]), None, Counter(ntp_loss=0.0)
    groups = [samples[i : i + args.group_size] for i in range(0, len(samples), args.group_size)]
    mine = rank_share(groups, ranks)
    for batch in sample_batches(model, mine, args.micro_batch_tokens, ranks):
        stop()
        micro = [mine[i] for i in batch] or [nothing]  # a rank without work still joins the collectives
        logprobs, entropies, mask = completion_logprobs(model, micro, args.temperature, entropy=True)
        if args.beta:
            with torch.no_grad():
                ref, _, _ = completion_logprobs(ref_model, micro, args.temperature)
        device, mask = mask.device, mask & bool(batch)
        advantages = torch.tensor([s.advantage for s in micro], device=device)
        loss, kl = rl_loss(logprobs, ref, advantages, mask, args.beta, len(samples))
        (loss * ranks.world_size).backward()  # FSDP averages over ranks; the denominator is global already
        gap = (logprobs.detach() - padded([s.rollout_logprobs for s in micro], device))[mask]
        sums.update(rl_loss=loss.item(), kl=kl if args.beta else math.nan, tokens=mask.sum().item())
        sums.update(entropy=entropies[mask].sum().item(), rollout_ratio=gap.exp().sum().item())
    rows = sorted(zip(texts, kept), key=lambda row: len(row[0])) if args.ntp_weight else []
    mine = rows[ranks.rank :: ranks.world_size]
    for batch in micro_batches([len(text) for text, _ in mine], args.micro_batch_tokens, ranks):
        stop()
        micro = [mine[i] for i in batch] or [([0, 0], np.array([1]))]
        loss = ntp_loss(model, *zip(*micro), len(texts)) * bool(batch)
        (args.ntp_weight * loss * ranks.world_size).backward()  # eq. (9), D1: the gradients add up
        sums.update(ntp_loss=loss.item())
    norm = optimizer_step(model, optimizer, sums["rl_loss"] + sums["ntp_loss"], args.max_grad_norm, ranks)
    sums = all_sum(dict(sums), ranks)
    tokens, rl, ntp = (sums.pop(key) for key in ("tokens", "rl_loss", "ntp_loss"))
    metrics = {
        "policy/loss": rl + args.ntp_weight * ntp,  # eq. (9)
        "policy/rl_loss": rl,
        **{f"policy/{key}": value / tokens for key, value in sums.items()},
        "optim/grad_norm": norm,
    }
    if args.ntp_weight:
        metrics |= {"policy/ntp_loss": ntp, "policy/ntp_ce": ntp * len(texts) / max(1, sum(map(len, kept)))}
    return metrics


# ---------------------------------------------------------------- 5 log, evaluate, save

CURVES = {  # title: keys of metrics.jsonl, and their labels
    "right at held-out positions": {"eval/ntr": "reasoning, NTR", "eval/ntp": "prediction, NTP"},
    "reasoning at held-out positions": {f"eval/ntr_{name}": name for name in LEVELS},
    "right boxes in training, by level": {f"reward/match_{name}": name for name in LEVELS},
    "tokens of a thought": {"rollout/thought_tokens": "written", "rollout/budget": "budget"},
    "reward": {"reward/mean": "reward", "reward/length": "length reward alone"},
    "shares that teach nothing": {"rollout/malformed": "malformed", "reward/groups_without_spread": "equal rewards"},
    "next-token loss of the texts (nats per token)": {"policy/ntp_ce": ""},
}
CONSOLE = (
    "match {reward/match:.3f}", "thought {rollout/thought_tokens:5.1f}", "budget {rollout/budget:3}",
    "malformed {rollout/malformed:3.0%}", "ntp {policy/ntp_ce:.3f}", "grad {optim/grad_norm:5.2f}",
    "{time/rollout_s:.1f} + {time/update_s:.1f} s",
)  # fmt: skip
HELDOUT = ("held-out NTR {eval/ntr:.3f}, NTP {eval/ntp:.3f}", "thought {eval/thought_tokens:5.1f}")
LEGEND = "The end of the prompt, the response (its thought in green), and the verdict on it."
HINTS = {  # said once, if the metric is 1
    "rollout/malformed": "every response is malformed, so RL learns nothing: start from a model that writes "
    f"{THINK_OPEN}...{THINK_CLOSE}{BOX_OPEN}...{BOX_CLOSE}, or raise --max-new-tokens",
    "reward/groups_without_spread": "in each group all rewards are equal, so RL learns nothing: see --thresholds",
}


def mean(values) -> float:
    return float(np.mean(values)) if (values := list(values)) else math.nan


def sample_metrics(samples: list[Sample], args: Args) -> dict:
    """Metrics of an update, from its samples."""
    rewards = torch.tensor([s.reward for s in samples]).view(-1, args.group_size)  # [N, G]
    metrics = {
        "reward/mean": rewards.mean().item(),
        "reward/match": mean(getattr(s, args.match) for s in samples),
        "reward/length": mean(s.length_reward for s in samples),
        "reward/group_std": rewards.std(dim=1).mean().item(),
        "reward/groups_without_spread": (rewards.amax(1) == rewards.amin(1)).float().mean().item(),
        "rollout/truncated": mean(not s.ended for s in samples),
        **lengths(samples, "rollout"),
    }
    for level, name in enumerate(LEVELS):
        metrics[f"data/{name}"] = mean(s.level == level for s in samples)
        metrics[f"reward/match_{name}"] = mean(getattr(s, args.match) for s in samples if s.level == level)
    return metrics


def lengths(samples: list[Sample], group: str) -> dict:
    """Metrics that training and evaluation share."""
    return {
        f"{group}/thought_tokens": mean(s.thought_tokens for s in samples if s.thought_tokens >= 0),
        f"{group}/completion_tokens": mean(len(s.completion_ids) for s in samples),
        f"{group}/malformed": mean(s.thought_tokens < 0 for s in samples),
    }


def evaluate(rollouts: Rollouts, texts: list, chosen: list, args: Args, run: Run, update: int, stop: Callable):
    """Tables 1 and 3 on held-out positions: (metrics, the sampled responses).

    Prediction (NTP): the most likely token. Reasoning (NTR): the box of a response, sampled and greedy.
    """
    start, budget = time.time(), budget_at(update, args)
    scores = score_texts(rollouts.model, texts, args.micro_batch_tokens, run.ranks)
    predicted = [int(scores[k][1, t]) for k, t, _ in chosen]
    places = [(texts[k], t, level) for k, t, level in chosen]
    noise = uniforms([len(places), args.max_new_tokens], args.seed, "evaluation")
    sampled = rollouts(places, noise, budget, args.temperature, stop)
    greedy = rollouts(places, noise, budget, 0.0, stop)
    right = {
        "ntp": [token == text[t] for token, (text, t, _) in zip(predicted, places)],
        "ntr": [s.exact for s in sampled],
        "ntr_prefix": [s.prefix for s in sampled],
        "ntr_greedy": [s.exact for s in greedy],
        "ntr_prefix_greedy": [s.prefix for s in greedy],
    }
    metrics = {"eval/budget": budget, **lengths(sampled, "eval")}
    for kind, values in right.items():
        for level, name in enumerate(LEVELS):
            metrics[f"eval/{kind}_{name}"] = mean(v for v, s in zip(values, sampled) if s.level == level)
        metrics[f"eval/{kind}"] = mean(metrics[f"eval/{kind}_{name}"] for name in LEVELS)  # the "Average"
    for sample, token in zip(sampled, predicted):
        sample.predicted = rollouts.texts[token]
    blocks = [block(sample, rollouts.tokenizer) for sample in sampled[:: max(1, len(sampled) // 6)]]
    run.samples(f"update {update}", LEGEND, blocks)
    return metrics | {"time/eval_s": time.time() - start}, sampled


def shown(sample: Sample, tokenizer) -> tuple[str, str, str]:
    """(end of the prompt, response, verdict)"""
    word = "malformed" if sample.thought_tokens < 0 else "right" if sample.exact else "wrong"
    verdict = f"{word}, {LEVELS[sample.level]} position: the text goes on with {sample.truth[0]!r}; "
    verdict += f"without a thought the model predicts {sample.predicted!r}"
    return tokenizer.decode(sample.prompt_ids)[-300:], tokenizer.decode(sample.completion_ids), verdict


def block(sample: Sample, tokenizer) -> str:
    """A sample as HTML."""
    prompt, response, verdict = map(html.escape, shown(sample, tokenizer))
    thought, close, rest = response.rpartition(html.escape(THINK_CLOSE))
    response = f"<span class=thought>{thought}</span>{close}{rest}"
    style = "good" if sample.exact else "bad"
    return f"<pre><span class=note>{prompt}</span>{response}\n<span class={style}>{verdict}</span></pre>"


def report(run: Run, stages: list[dict], answers: list[Sample], tokenizer) -> None:
    """The end of a run: the evaluations before and after, two responses, and where to look."""
    lines = ["", f"{'held-out':24}" + "".join(f"{name:>18}" for name in ("mean", *LEVELS))]
    accuracies = ("ntp", "ntr", "ntr_greedy", "ntr_prefix", "ntr_prefix_greedy")
    for kind in (*accuracies, "budget", "thought_tokens", "completion_tokens", "malformed"):
        keys = [f"eval/{kind}", *(f"eval/{kind}_{name}" for name in LEVELS if kind in accuracies)]
        cells = [" -> ".join(f"{stage[key]:.3f}" for stage in stages) for key in keys]
        lines.append(f"{kind:24}" + "".join(f"{cell:>18}" for cell in cells))
    for sign in (1, -1):  # right where prediction is wrong; wrong where prediction is right
        sample = max(answers, key=lambda s: (sign * (s.exact - (s.predicted == s.truth[0])), s.level))
        prompt, response, verdict = shown(sample, tokenizer)
        lines += ["", verdict, prompt + response]
    files = "samples.html" + ", curves.png, checkpoints/final" * (len(stages) > 1)
    run.say("\n".join([*lines, "", f"{run.path}/: {files}"]))


# ---------------------------------------------------------------- main


def plan(args: Args, ranks: Ranks, train: list[list[int]], longest: int, tokenizer, frame: tuple) -> str:
    """What --dry-run prints: sizes, memory, and one prompt."""
    reference = (2 if ranks.device.type == "cuda" else 4) * bool(args.beta)  # bytes a parameter
    sizes = ranks, (args.rollout_rows, longest), args.micro_batch_tokens, args.gradient_checkpointing
    prompt = tokenizer.decode(frame[0] + train[0][len(bos_ids(tokenizer)) : len(train[0]) // 2] + frame[1])
    return (
        f"{args.updates} updates, {args.updates * args.prompts_per_update / len(train):.1f} epochs; budget "
        f"{budget_at(0, args)} to {budget_at(args.updates, args)} tokens\n"
        f"{memory_plan(args.model, *sizes, reference)}\n\na prompt:\n{prompt}"
    )


def main(args: Args) -> None:
    check(args)
    ranks = setup(args.seed)
    updates = 0 if args.eval_only else args.updates
    args = replace(args, proxy_model=args.proxy_model or args.model, updates=updates)
    tokenizer = load_tokenizer(args.model)
    train, heldout, about = read_texts(args, tokenizer)
    all_texts, frame = train + heldout, prompt_frame(tokenizer, budget_at(0, args), args)
    longest = len(frame[0] + frame[1]) + max(map(len, all_texts)) + args.max_new_tokens
    learns, recompute = not args.eval_only, args.gradient_checkpointing
    model = load_model(args.model, tokenizer, ranks, longest, train=learns, recompute=recompute)
    if ranks.main:
        size = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"model {args.model}: {size:.1f}M parameters; proxy {args.proxy_model}\n{about}", flush=True)
        if args.dry_run:
            print(plan(args, ranks, train, longest, tokenizer, frame), flush=True)
    if args.dry_run:
        return
    run = Run(args, __file__, ranks, data=[args.dataset])
    ref_model = load_model(args.model, tokenizer, ranks, longest, train=False) if args.beta else None
    optimizer = new_optimizer(model, args.learning_rate, args.weight_decay) if learns else None
    rollouts, models = Rollouts(model, tokenizer, args, ranks), {"policy": model}

    # 0 prepare; before a restore, because the default proxy is the initial model
    entropies = proxy_entropies(model, tokenizer, all_texts, args, run)
    levels = difficulty(entropies, all_texts, tokenizer, rollouts.texts, args.thresholds)
    counts = np.bincount(np.concatenate(levels) + 1, minlength=4)
    run.say("positions: " + ", ".join(f"{c} {name}" for c, name in zip(counts, ("without RL", *LEVELS))))
    to_evaluate = heldout_positions(levels[len(train) :], args.eval_positions)

    state = run.restore(models, optimizer) if run.state else {"update": 0, "cursor": 0, "before": None}
    interrupt, hints, answers, after = Interrupt(ranks), dict(HINTS), [], None
    try:
        if state["before"] is None:
            state["before"], answers = evaluate(rollouts, heldout, to_evaluate, args, run, 0, interrupt.check)
            run.log({"update": 0, **state["before"]}, HELDOUT, args.updates)
        for update in range(state["update"] + 1, args.updates + 1):
            # 1 sample, 2 score
            drawn = draw_problems(state["cursor"], args.prompts_per_update, len(train), args.seed)
            texts, budget = [train[i] for i in drawn], budget_at(update - 1, args)
            chosen = choose_positions([levels[i] for i in drawn], update, args)  # C
            places = [(texts[k], t, level) for k, t, level in chosen for _ in range(args.group_size)]
            noise = uniforms([len(places), args.max_new_tokens], args.seed, update, "rollout")
            begin = time.time()
            samples = rollouts(places, noise, budget, args.temperature, interrupt.check)
            rollout_s = time.time() - begin  # of the slowest rank: all get all samples

            # 3 advantage
            rewards = torch.tensor([s.reward for s in samples]).view(-1, args.group_size)  # [N, G]
            for sample, advantage in zip(samples, group_advantages(rewards).flatten().tolist()):  # eq. (6)
                sample.advantage = advantage

            # 4 update
            begin = time.time()
            taken = [[t for k, t, _ in chosen if texts[k] is text] for text in texts]  # a text may come twice
            kept = [np.setdiff1d(np.arange(1, len(text)), cols) for text, cols in zip(texts, taken)]
            learnt = learn(model, ref_model, optimizer, samples, texts, kept, args, ranks, interrupt.check)
            update_s = time.time() - begin

            # 5 log, evaluate, save
            state |= {"update": update, "cursor": state["cursor"] + len(drawn)}
            tokens = sum(map(len, samples)) + sum(map(len, kept)) * bool(args.ntp_weight)
            metrics = {
                "update": update,
                **sample_metrics(samples, args),
                **learnt,
                "rollout/budget": budget or math.nan,  # what is not measured is not logged
                "data/epoch": state["cursor"] / len(train),
                "time/rollout_s": rollout_s,
                "time/update_s": update_s,
                "perf/tokens_per_s": tokens / (rollout_s + update_s),
            }
            for key in [key for key in hints if metrics[key] == 1]:
                run.say(f"note: {hints.pop(key)}")
            last, console = update == args.updates, CONSOLE
            saves = last or (args.save_every and update % args.save_every == 0)
            if saves:  # before the state, and before the evaluation, which may stop the run
                run.export(model, "final" if last else f"update_{update:06d}")
            try:
                if last or (args.eval_every and update % args.eval_every == 0):
                    stop = (lambda: None) if last else interrupt.check  # the last evaluation is finished
                    after, answers = evaluate(rollouts, heldout, to_evaluate, args, run, update, stop)
                    metrics, console = metrics | after, CONSOLE[:2] + HELDOUT
            finally:
                run.log(metrics, console, args.updates, not math.isfinite(learnt["optim/grad_norm"]))
            if saves:
                run.save(state, models, optimizer)
                run.curves([(title, keys, "update") for title, keys in CURVES.items()])
    except Stop:
        run.stopped(state, models, optimizer)
    if answers:
        report(run, [state["before"], *filter(None, [after])], answers, tokenizer)


if __name__ == "__main__":
    launch(main, tyro.cli(Args, default=Args(**TINY_RUN if "--tiny" in sys.argv else {})))
