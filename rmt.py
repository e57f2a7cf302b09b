"""RMT, reinforcement mid-training: RL on a few uncertain tokens of a text, next-token prediction on the rest.

Paper: "Reinforcement Mid-Training", arXiv 2509.24375 (sections 4, 5.1, 5.2). Without its three parts it is RPT,
"Reinforcement Pre-Training", arXiv 2506.08007. What grpo_rlvr.py has, too, is here word for word.

  0 prepare    entropy of every position under a proxy model, once: easy, medium, hard; the rest takes no RL
  1 sample     positions by the curriculum; G responses to each: think about B_t tokens, box the next token
                                                                                        eq. (1), (3), (4)
  2 score      is the boxed token right, and is the thought as long as asked                eq. (2), (5)
  3 advantage  A^i = (r^i - mean) / std, within the group of one position                        eq. (6)
  4 update     -L_RL on the responses + lambda L_NTP on the texts without the chosen positions
                                                                                        eq. (7), (8), (9)
  5 log, evaluate prediction (NTP) and reasoning (NTR) at held-out positions, save

Notation: tau_pos `truth[0]`, o^i `completion_ids`, c thought, y `answer`, l `thought_tokens`, B_t `budget`,
r_len `length_reward`, w `length_weight`, C `chosen`, lambda `ntp_weight`.
Shapes: N positions, G responses to each, B rows, T completion tokens, P positions, V vocabulary.

Deviations from the paper, and what it leaves open (docs/rmt.md has all):
  D1 eq. (9) as printed adds an objective to a loss, and would lower the reward. Here: -L_RL + lambda L_NTP.
  D2 as printed, (7) sums over a response's tokens and (8) over a text's. The update takes means of these
     sums: over its responses, and over its texts.
  D3 a malformed response earns nothing, for its length neither.
  D4 p^{t1}, p^{t2}, w, r_max, beta, the thresholds and the number of RL positions are not in the paper.

  python rmt.py --tiny                                                      # here: no network, no GPU
  python rmt.py --model Qwen/Qwen3-1.7B                                     # one GPU
  torchrun --nproc_per_node 8 rmt.py                                        # the paper's RMT-Q3
"""

import bisect
import hashlib
import html
import itertools
import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from transformers import DynamicCache, LogitsProcessorList

from common import (
    LOGITS_PER_CHUNK, TINY, Interrupt, Ranks, Run, Sampler, Stop, UserError, all_gather_list, all_sum,
    cache_argument, check_sizes, column, draw_problems, eos_ids, gathered, hidden_before, launch, load_model,
    load_tokenizer, memory_plan, micro_batches, new_optimizer, optimizer_step, pad_left, padded, rank_share,
    read_rows, setup, together, token_logprobs, token_texts, uniforms,
)  # fmt: skip


@dataclass
class Args:
    """RMT mid-training; RPT and the ablations of table 4 are options. Defaults are the paper's values."""

    # ---- run
    tiny: bool = False
    """use the bundled toy model and texts: minutes on two cores. Every flag still overrides"""
    output_dir: str = ""
    """folder of this run; empty: runs/rmt__<model>__s<seed>__<time>. The entropies are cached beside it"""
    seed: int = 0
    """fixes the order of the texts, the positions and all sampling noise, on any number of ranks"""
    resume: str = ""
    """`auto`: continue the newest run of this model and seed (or --output-dir), if any; or a run folder"""
    dry_run: bool = False
    """print the plan, one prompt and a memory estimate, and stop"""
    track: bool = False
    """send the metrics to Weights & Biases, too"""
    # ---- model and data
    model: str = "Qwen/Qwen3-14B"
    """the initial policy, which must know the format. The paper's other: deepseek-ai/DeepSeek-R1-Distill-Qwen-14B"""
    proxy_model: str = ""
    """its entropies say how hard a position is; same tokenizer; empty: the initial model"""
    dataset: str = "KbsdJames/Omni-MATH"
    """texts: a hub id, a .jsonl, .parquet or .txt file, or a folder; see common.read_rows"""
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
    """texts of an update, over all ranks; as many positions take RL (their number is not in the paper)"""
    group_size: int = 8
    """G, responses to each position"""
    max_new_tokens: int = 2048
    """responses are truncated here (tokens)"""
    temperature: float = 0.8
    """of the sampled distribution, and so of every log-probability (RPT's; not in the paper)"""
    rollout_rows: int = 16
    """responses that one rank generates at once; memory and speed only"""
    # ---- algorithm
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
    """what is rewarded: the next token, or (RPT) also several whole tokens. Both are always evaluated"""
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
    beta: float = 0.0
    """weight of the KL to the initial policy, loaded only if this is positive (RPT: 0; not in the paper)"""
    ntp_weight: float = 0.1
    """lambda: weight of next-token prediction; 0 leaves it out (table 4, w/o NTP)"""
    # ---- optimisation
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
    eval_only: bool = False
    """evaluate --model with the first budget, and stop. --proxy-model: the model that it was trained from"""
    eval_every: int = 20
    """updates between evaluations; 0: only before the first and after the last"""
    eval_positions: int = 200
    """held-out positions per difficulty"""
    save_every: int = 50
    """updates between checkpoints; 0: only after the last. The last two states are kept, and all models"""


TINY_RUN = {  # lengths and optimisation settings for two million parameters; the method is a large run's
    "tiny": True, "model": f"{TINY}/model", "dataset": f"{TINY}/text.jsonl", "text_column": ("text",),
    "train_texts": 600, "eval_texts": 100, "max_text_tokens": 64, "prompts_per_update": 16,
    "max_new_tokens": 64, "rollout_rows": 256, "initial_budget": 24, "budget_decay": 0.4, "updates": 120,
    "learning_rate": 1e-4, "max_grad_norm": 1.0, "micro_batch_tokens": 2048, "gradient_checkpointing": False,
    "eval_every": 40, "eval_positions": 128, "save_every": 0,
}  # fmt: skip


def parse_args() -> Args:
    """tyro's command line over the defaults that --tiny chooses."""
    return tyro.cli(Args, default=Args(**TINY_RUN) if "--tiny" in sys.argv else Args())


def check(args: Args) -> None:
    """UserError for values that do not fit together."""
    positive = "temperature train_texts eval_texts max_text_tokens prompts_per_update rollout_rows min_budget"
    positive += " max_new_tokens max_grad_norm micro_batch_tokens eval_positions"
    not_negative = "updates length_weight r_max beta ntp_weight learning_rate weight_decay eval_every save_every"
    check_sizes(args, positive, not_negative)
    good = {
        "--group-size must be at least 2: advantages compare responses to one prompt": args.group_size > 1,
        "--thresholds must rise": args.thresholds[0] < args.thresholds[1] < args.thresholds[2],
        "--t1 and --t2 must be fractions of the run, 0 < t1 < t2 < 1": 0 < args.t1 < args.t2 < 1,
        "--min-budget must not be larger than --initial-budget": args.min_budget <= args.initial_budget,
        "--budget-decay must be between 0 and 1": 0 < args.budget_decay < 1,
        "--max-new-tokens must be larger than --initial-budget, or all responses are cut off":
            args.max_new_tokens > args.initial_budget * args.budget,
    }  # fmt: skip
    for name, probs in (("--p1", args.p1), ("--p2", args.p2)):
        good[f"{name} must be three probabilities that sum to 1"] = min(probs) >= 0 and abs(sum(probs) - 1) < 1e-6
    for words, fits in good.items():
        if not fits:
            raise UserError(words)


# ---------------------------------------------------------------- prompts and texts

# The format: how a prompt asks, and how a response is written. All that reads a response follows these strings.
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
BOX_OPEN, BOX_CLOSE, NOT_IN_BOX = "\\boxed{", "}", "{}"  # the last: characters that cannot be boxed
THINK, THINK_BUDGET = "Think", "Think in exactly {budget} tokens"
INSTRUCTION = (
    f"Complete the given text by predicting the next token. @@THINK@@ within {THINK_OPEN}{THINK_CLOSE}, "
    f"then put the next token in {BOX_OPEN}{BOX_CLOSE}.\n### Text\n@@TEXT@@\n### Prediction\n"
)
POOL = 20  # the texts used are a random choice of so many times more, read from the start of the source


def bos_ids(tokenizer) -> list[int]:
    """The token that every text begins with, if the tokenizer has one."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def prompt_frame(tokenizer, budget: int, args: Args, started: float) -> tuple[list[int], list[int], bool]:
    """(ids before the prefix, ids after it, whether they open the thought, as some chat templates do).

    The prefix is put between them as ids, so that a text has one tokenisation. Budget 0 is not mentioned.
    started: a template's today (seconds), the same in a resumed run.
    """
    prompt = INSTRUCTION.replace("@@THINK@@", THINK_BUDGET.format(budget=budget) if budget else THINK)
    bos = bos_ids(tokenizer)
    if args.chat_template and tokenizer.chat_template:
        day, message = time.localtime(started), [{"role": "user", "content": prompt}]
        options = {"add_generation_prompt": True, "strftime_now": lambda form: time.strftime(form, day)}
        prompt, bos = tokenizer.apply_chat_template(message, tokenize=False, **options), []
    head, tail = (tokenizer.encode(part, add_special_tokens=False) for part in prompt.split("@@TEXT@@"))
    return bos + head, tail, prompt.rstrip().endswith(THINK_OPEN)


def read_texts(args: Args, tokenizer) -> tuple[list[list[int]], list[list[int]], str]:
    """(training texts, held-out texts, words about them); a text is token ids, with BOS if there is one.

    Longer texts are cut. A row that lacks text in one of the columns is skipped and counted. UserError if most
    rows are, or if no text is left for one of the two.
    """
    texts, wanted, usable, unusable = [], args.train_texts + args.eval_texts, 0, []
    for row in read_rows(args.dataset, split="test" if "Omni-MATH" in args.dataset else "train"):  # no other
        values = [row.get(name) if isinstance(row, dict) else None for name in args.text_column]
        if not all(isinstance(value, (str, int, float)) and str(value).strip() for value in values):
            unusable.append(row)
            continue
        usable += 1
        ids = tokenizer.encode("\n".join(map(str, values)), add_special_tokens=False, verbose=False)
        cuts = [ids[i : i + args.max_text_tokens] for i in range(0, len(ids), args.max_text_tokens)]
        texts += [bos_ids(tokenizer) + cut for cut in cuts if len(cut) > 1]
        if len(texts) >= POOL * wanted:
            break
    if len(unusable) > usable:
        for name in args.text_column:
            column(unusable[0], name, args.dataset)  # says which columns there are
        raise UserError(f"{args.dataset}: most rows have no text in the columns {' '.join(args.text_column)}")
    order = uniforms([len(texts)], "split").argsort().tolist()[:wanted]  # not by the seed
    cut = round(len(order) * args.eval_texts / wanted)
    heldout, train = [texts[i] for i in order[:cut]], [texts[i] for i in order[cut:]]
    words = f"{args.dataset}: {len(train)} training and {len(heldout)} held-out texts"
    if not train or not heldout:
        raise UserError(f"{words}: give more data, or longer texts")
    words += f", {sum(map(len, train))} training tokens"
    return train, heldout, words + f"; {len(unusable)} rows without text skipped" * bool(unusable)


# ---------------------------------------------------------------- 0 prepare

LEVELS = ("easy", "medium", "hard")
TOP_TOKENS = 16  # the entropy is that of the 16 most likely next tokens (RPT), renormalised


def top_entropy(logits: torch.Tensor, k: int = TOP_TOKENS) -> torch.Tensor:
    """Entropy (nats) of the k most likely next tokens, their probabilities renormalised. [..., V] -> [...]"""
    logprobs = logits.topk(min(k, logits.shape[-1]), dim=-1).values.float().log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


@torch.no_grad()
def score_texts(model, texts: list[list[int]], max_tokens: int, ranks: Ranks) -> list[np.ndarray]:
    """For every text [2, L]: the entropies and the most likely tokens of its positions. On all ranks.

    Column t is about token t given the tokens before it; column 0 is 0, nothing is before it.
    """
    mine = texts[ranks.share(len(texts))]
    scores = [None] * len(mine)
    head, chunk = model.get_output_embeddings(), LOGITS_PER_CHUNK // model.config.get_text_config().vocab_size
    with gathered(model):
        for batch in micro_batches([len(text) for text in mine], max_tokens):
            where = [np.arange(1, len(mine[i])) for i in batch]
            hidden = hidden_before(model, [mine[i] for i in batch], where)  # [P, D]
            logits = map(head, hidden.split(max(1, chunk)))  # of one chunk at a time
            found = [torch.stack([top_entropy(part), part.argmax(-1).float()]) for part in logits]
            found = np.split(torch.cat(found, 1).cpu().numpy(), np.cumsum([len(w) for w in where])[:-1], 1)
            for i, values in zip(batch, found):
                scores[i] = np.pad(values, ((0, 0), (1, 0)))
    return all_gather_list(scores, ranks)


def proxy_entropies(proxy, texts: list[list[int]], args: Args, run: Run) -> list[np.ndarray]:
    """Entropies of every position of every text under the proxy, from disk if they are there.

    The file is named by a hash of token ids and weights: other texts, tokenizers or weights never meet it.
    """
    lengths = [len(text) for text in texts]
    key = hashlib.sha256(repr([TOP_TOKENS, lengths]).encode() + np.concatenate(texts).tobytes())
    with gathered(proxy):
        for weight in proxy.parameters():
            key.update(weight.detach().flatten()[:64].float().cpu().numpy().tobytes())
    path = run.path.parent / "entropies" / f"{key.hexdigest()[:24]}.npy"
    if all_sum(float(path.is_file()), run.ranks) < run.ranks.world_size:
        run.say(f"entropies of {sum(lengths)} positions under {args.proxy_model}, once ...")
        entropies = np.concatenate([s[0] for s in score_texts(proxy, texts, args.micro_batch_tokens, run.ranks)])

        def write() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_suffix(f".{run.ranks.rank}.npy")
            np.save(aside, entropies)
            aside.replace(path)

        together(write, run.ranks)
    return np.split(np.load(path), np.cumsum(lengths)[:-1])


def base_model(args: Args) -> str:
    """The proxy: --proxy-model, else the initial model; for --eval-only what the checkpoint's run folder says.

    UserError if --eval-only cannot know: by a trained model's own entropies, other positions would be scored.
    """
    if args.proxy_model or not args.eval_only:
        return args.proxy_model or args.model
    try:
        arguments = Path(args.model).resolve().parents[1] / "args.json"  # of RUN/checkpoints/final
        return json.loads(arguments.read_text(encoding="utf-8"))["proxy_model"]
    except (OSError, KeyError, IndexError):
        raise UserError("--eval-only needs --proxy-model: the model from which --model was trained") from None


def load_proxy(model, tokenizer, texts: list[list[int]], args: Args, ranks: Ranks):
    """The proxy, which may be `model`. UserError if it has another tokenizer."""
    if args.proxy_model == args.model:
        return model
    own, probe = load_tokenizer(args.proxy_model), [tokenizer.decode(text) for text in texts[:50]]
    if own(probe).input_ids != tokenizer(probe).input_ids:
        raise UserError(f"--proxy-model {args.proxy_model} and {args.model} tokenise the texts differently")
    return load_model(args.proxy_model, own, ranks, max(map(len, texts)), train=False)


def boxable_tokens(tokenizer, texts: list[str]) -> np.ndarray:
    """bool [V]: what may stand in a box: whole characters that the format allows there, no tag, not special."""
    no = re.compile(f"[{re.escape(NOT_IN_BOX)}\ufffd]|{re.escape(THINK_OPEN)}|{re.escape(THINK_CLOSE)}")
    special = set(tokenizer.all_special_ids)
    return np.array([bool(text) and not no.search(text) and i not in special for i, text in enumerate(texts)])


def difficulty(entropies: np.ndarray, text: list[int], first: int, boxable: np.ndarray, thresholds) -> np.ndarray:
    """Level of every position of a text: 0 easy, 1 medium, 2 hard, each up to the next threshold; -1: no RL.

    Positions before `first` have no prefix, and what cannot stand in a box cannot be answered.
    """
    levels = np.digitize(entropies, thresholds) - 1
    levels[~boxable[text]] = -1
    levels[:first] = -1
    return levels


def heldout_positions(levels: list[np.ndarray], count: int) -> list[tuple[int, int, int]]:
    """(text, position, level) to evaluate on, `count` per level; nested as in RPT: easy is at least easy."""
    chosen = []
    for level, name in enumerate(LEVELS):
        where = [(k, t) for k, row in enumerate(levels) for t in np.flatnonzero(row >= level).tolist()]
        if not where:
            raise UserError(f"no held-out position is {name}: raise --eval-texts or lower --thresholds")
        order = uniforms([len(where)], "held-out positions").argsort().tolist()
        chosen += [(*where[i], level) for i in order[:count]]
    return chosen


# ---------------------------------------------------------------- 1 sample

CHUNK = 16  # tokens after which the rows that have ended leave the batch


def token_budget(step: int, total_steps: int, initial: int, minimum: int, decay: float) -> int:
    """B_t: how many tokens the prompt asks the thought to have; `step` t of `total_steps` T."""
    return max(minimum, math.floor(initial * decay ** (step / max(1, total_steps))))  # eq. (1)


def budget_at(step: int, args: Args) -> int:
    """The budget of the update after `step` others; 0 without budgets."""
    return args.budget * token_budget(
        step, args.updates, args.initial_budget, args.min_budget, args.budget_decay
    )


def curriculum_probs(step: float, t1: float, t2: float, p1: Sequence, p2: Sequence) -> list[float]:
    """p^t over easy, medium, hard: p1 up to t1, p2 from t2 on, linear in between."""
    tau = min(max((step - t1) / (t2 - t1), 0.0), 1.0)
    return [(1 - tau) * early + tau * late for early, late in zip(p1, p2)]  # eq. (3), (4)


def draw_positions(levels: np.ndarray, probs: Sequence[float], noise: torch.Tensor) -> list[int]:
    """C: a position for each row of noise [K, 2], all different: d ~ Categorical(probs), uniform in d.

    levels [P]. A level without candidates left gives its probability to the others, in proportion. Fewer than
    K positions come back if no level that has any probability has candidates.
    """
    left, chosen = [np.flatnonzero(levels == d).tolist() for d in range(len(probs))], []
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
    where = [(k, t) for k, row in enumerate(levels) for t in range(len(row))]
    chosen = draw_positions(flat, probs, uniforms([len(levels), 2], args.seed, update, "positions"))
    if not chosen:
        raise UserError(f"update {update}: no candidate in its texts; raise --prompts-per-update")
    return [where[p] for p in chosen]


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
    exact: float = 0.0  # whether it matches by either rule
    prefix: float = 0.0
    length_reward: float = 0.0
    reward: float = 0.0
    advantage: float = 0.0
    ref_logprobs: list[float] | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


def is_end(table: tuple[list[str], set[int]], tokens: torch.Tensor) -> torch.Tensor:
    """Which tokens end a response: bool [B, T] of tokens [B, 1 + T], whose first is the prompt's last.

    Any eos, and the token in which the first box after a thought closes. table: all tokens' texts, and eos.
    """
    texts, eos = table
    ends = torch.isin(tokens, torch.tensor(sorted(eos), device=tokens.device))[:, 1:]
    for row, ids in zip(ends, tokens[:, 1:].tolist()):
        pieces = [texts[token] for token in ids]
        if found := END.search("".join(pieces)):
            row[bisect.bisect_left(list(itertools.accumulate(map(len, pieces))), found.end())] = True
    return ends


@torch.no_grad()
def rollout(model, prompt_ids: list[list[int]], noise, temperature: float, table) -> list[tuple]:
    """Complete every prompt once: a list of (completion ids, their log-probabilities, whether it ended).

    noise [B, T], T tokens at most; temperature 0 is greedy. A prompt that rows share is read once.
    """
    (size, steps), device = noise.shape, model.device
    prompts = list(dict.fromkeys(map(tuple, prompt_ids)))  # the N different ones
    number = {prompt: n for n, prompt in enumerate(prompts)}
    which = torch.tensor([number[tuple(ids)] for ids in prompt_ids], device=device)  # [B]
    ids, mask = pad_left(prompts, device)  # [N, L]
    start, cache = ids.shape[1], DynamicCache(config=model.config)
    options = {"use_cache": True, cache_argument(model): cache}
    if start > 1:  # all but the last token of a prompt, which generate reads
        place = (mask.cumsum(1) - 1).clamp(min=0)[:, :-1]
        part = {"input_ids": ids[:, :-1], "attention_mask": mask[:, :-1], "position_ids": place}
        model(**part, logits_to_keep=1, **options)
        cache.reorder_cache(which)  # a row for every completion
    ids, mask = ids[which], mask[which]  # [B, L]
    sampler = Sampler(noise, start, temperature, device)
    tokens = torch.zeros(size, 1 + steps, dtype=torch.long, device=device)  # [B, 1 + T], the prompt's last first
    for first in range(0, steps, CHUNK):
        new = min(CHUNK, steps - first)
        ids = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new, synced_gpus=False,
            logits_processor=LogitsProcessorList([sampler]), **options,
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
END = re.compile(f"{_C}.*?{_B}.*?{_E}", re.DOTALL)
RESPONSE = re.compile(  # one thought, anything, one box
    rf"\s*{_O}(?P<thought>((?!{_O}|{_C}).)*){_C}((?!{_O}|{_C}|{_B}).)*"
    rf"{_B}(?P<answer>[^{re.escape(NOT_IN_BOX)}]*){_E}",
    re.DOTALL,
)


def read_response(completion_ids: list[int], texts: Sequence[str], opened: bool) -> tuple[int, str] | None:
    """(l, y): the thought's length in tokens, and what is in the box; None if the response is malformed.

    opened: the prompt has opened the thought. A tag may be several tokens.
    """
    pieces = [THINK_OPEN] * opened + [texts[token] for token in completion_ids]
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

    def __init__(self, model, tokenizer, args: Args, ranks: Ranks, started: float) -> None:
        self.model, self.tokenizer, self.args, self.ranks, self.started = model, tokenizer, args, ranks, started
        self.texts = token_texts(tokenizer, model.config.get_text_config().vocab_size)
        self.table = self.texts, eos_ids(tokenizer, args.model)

    def reward(self, sample: Sample, budget: int, opened: bool) -> None:
        """Step 2. Both rules are noted, whichever is rewarded."""
        args, response = self.args, read_response(sample.completion_ids, self.texts, opened)
        if response is None:
            return  # D3
        sample.thought_tokens, answer = response
        sample.exact, sample.prefix = (float(matches(answer, sample.truth, rule)) for rule in ("exact", "prefix"))
        w = args.length_weight if budget else 0.0
        sample.length_reward = length_reward(sample.thought_tokens, budget, args.r_max) if budget else 0.0
        sample.reward = (1 - w) * getattr(sample, args.match) + w * sample.length_reward  # eq. (5)

    def __call__(self, places: list[tuple], noise: torch.Tensor, budget: int, temperature: float):
        """(a Sample for every entry of the global list `places`, seconds); noise [len(places), T].

        places: (text, position in it, level).
        """
        start, samples, skip = time.time(), {}, len(bos_ids(self.tokenizer))  # no BOS inside a prompt
        head, tail, opened = prompt_frame(self.tokenizer, budget, self.args, self.started)
        share = range(len(places))[self.ranks.share(len(places))]
        mine = sorted(share, key=lambda i: places[i][1])
        with gathered(self.model):
            for first in range(0, len(mine), self.args.rollout_rows):
                batch = mine[first : first + self.args.rollout_rows]
                prompt_ids = [head + places[i][0][skip : places[i][1]] + tail for i in batch]
                rows = rollout(self.model, prompt_ids, noise[batch], temperature, self.table)
                for i, ids, row in zip(batch, prompt_ids, rows):
                    text, t, level = places[i]
                    samples[i] = Sample(level, [self.texts[token] for token in text[t : t + 32]], ids, *row)
        generated = time.time()
        for sample in samples.values():
            self.reward(sample, budget, opened)
        everyone = all_gather_list([samples[i] for i in share], self.ranks)  # the slowest rank's time counts
        return everyone, {"time/rollout_s": generated - start, "time/reward_s": time.time() - generated}


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
    return -objective.sum() / responses, (kl * mask).sum().item()  # eq. (7), D2


def ntp_loss(model, texts: list[list[int]], kept: list[np.ndarray], total: int) -> torch.Tensor:
    """This micro-batch's part of L_NTP: -log p (nats), summed over a text's positions that are not in C.

    kept: those positions of every text, int64, where m_pos = 1; `total` counts the texts of the whole update.
    """
    logprobs, _ = token_logprobs(model, texts, kept)  # [P]
    return -logprobs.sum() / total  # eq. (8), D2


def completion_logprobs(model, samples: list[Sample], temperature: float, entropy: bool = False):
    """The training forward: log-probabilities, entropies and mask of the completions' tokens, each [B, T]."""
    rows, starts = [s.prompt_ids + s.completion_ids for s in samples], [len(s.prompt_ids) for s in samples]
    where = [np.arange(start, len(row)) for start, row in zip(starts, rows)]
    logprobs, entropies = token_logprobs(
        model, rows, where, prompt_lengths=starts, temperature=temperature, entropy=entropy
    )  # [K]
    lengths = torch.tensor([len(s.completion_ids) for s in samples], device=model.device)
    mask = torch.arange(int(lengths.max()), device=model.device) < lengths.unsqueeze(1)  # from lengths, not ids
    zeros = torch.zeros(mask.shape, device=model.device)
    return zeros.masked_scatter(mask, logprobs), zeros.masked_scatter(mask, entropies.detach()), mask


def sample_batches(samples: list[Sample], max_tokens: int, ranks: Ranks | None = None) -> list[list[int]]:
    """Micro-batches in which the completions of a prompt are together, so that it is read once."""
    return micro_batches([len(s) for s in samples], max_tokens, ranks, [tuple(s.prompt_ids) for s in samples])


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


def train_batch(model, optimizer, samples, texts, responses: int, total: int, args: Args, ranks: Ranks, check_stop):
    """One optimizer step on this rank's responses and texts: (sums over them, gradient norm).

    texts: (ids, kept positions) each. responses, total: the global denominators of rl_loss and ntp_loss.
    check_stop: called before every micro-batch, see common.Interrupt.
    """
    nothing = Sample(0, [], [0, 0], [0], [0.0], ref_logprobs=[0.0])
    sums = Counter()
    for batch in sample_batches(samples, args.micro_batch_tokens, ranks):
        check_stop()
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
    lengths = [len(ids) for ids, _ in texts] if args.ntp_weight else []
    for batch in micro_batches(lengths, args.micro_batch_tokens, ranks):
        check_stop()
        micro = [texts[i] for i in batch] or [([0, 0], np.ones(1, dtype=np.int64))]
        loss = ntp_loss(model, *zip(*micro), total) * bool(batch)
        (args.ntp_weight * loss * ranks.world_size).backward()  # eq. (9), D1: the gradients add up
        sums.update(ntp_loss=loss.item())
    return sums, optimizer_step(
        model, optimizer, float(sums["rl_loss"] + sums["ntp_loss"]), args.max_grad_norm, ranks
    )


# ---------------------------------------------------------------- 5 log, evaluate, save

CURVES = (
    ("right at held-out positions", {"eval/ntr": "reasoning (NTR)", "eval/ntp": "prediction (NTP)"}, "update"),
    ("reasoning at held-out positions", {f"eval/ntr_{name}": name for name in LEVELS}, "update"),
    ("right boxes in training, by level", {f"reward/match_{name}": name for name in LEVELS}, "update"),
    ("tokens of a thought", {"rollout/thought_tokens": "written", "rollout/budget": "budget"}, "update"),
    ("reward", {"reward/mean": "reward", "reward/length": "its length part"}, "update"),
    ("teaches nothing", {"rollout/malformed": "malformed", "reward/groups_without_spread": "equal rewards"}, "update"),
    ("next-token loss of the texts (nats per token)", {"policy/ntp_ce": ""}, "update"),
    ("reasoning at held-out positions, by time", {"eval/ntr": ""}, "time/wall_s"),
)  # fmt: skip
CONSOLE = (
    "match {reward/match:.3f}", "thought {rollout/thought_tokens:5.1f}", "budget {rollout/budget:3}",
    "malformed {rollout/malformed:4.0%}", "ntp {policy/ntp_ce:.3f}", "grad {optim/grad_norm:5.2f}",
    "{time/rollout_s:.1f} + {time/update_s:.1f} s", "{perf/tokens_per_s:.0f} tokens/s",
)  # fmt: skip
HELDOUT = ("held-out NTR {eval/ntr:.3f}, NTP {eval/ntp:.3f}", "thought {eval/thought_tokens:5.1f}")
KINDS = {
    "ntp": "NTP, most likely token", "ntr": "NTR, sampled", "ntr_greedy": "NTR, greedy",
    "ntr_prefix": "NTR, sampled, prefix rule", "ntr_prefix_greedy": "NTR, greedy, prefix rule",
}  # fmt: skip
LEGEND = "The end of a prompt, the response (its thought in green), and whether the box holds the text's next token."
HINTS = {  # said once, if the metric is 1
    "rollout/malformed": "every response is malformed, so RL learns nothing: start from a model that writes "
    f"{THINK_OPEN}...{THINK_CLOSE}{BOX_OPEN}...{BOX_CLOSE}, or raise --max-new-tokens",
    "reward/groups_without_spread": "no group has different rewards, so RL learns nothing: see --thresholds",
}


def mean(values) -> float:
    values = list(values)
    return float(sum(values) / len(values)) if values else math.nan


def sample_metrics(samples: list[Sample], args: Args) -> dict:
    """What the samples of an update tell by themselves."""
    rewards = torch.tensor([s.reward for s in samples]).view(-1, args.group_size)  # [N, G]
    metrics = {
        "reward/mean": rewards.mean().item(),
        "reward/match": mean(getattr(s, args.match) for s in samples),
        "reward/length": mean(s.length_reward for s in samples),
        "reward/group_std": rewards.std(dim=1).mean().item(),
        "reward/groups_without_spread": (rewards.amax(1) == rewards.amin(1)).float().mean().item(),
        "rollout/thought_tokens": mean(s.thought_tokens for s in samples if s.thought_tokens >= 0),
        "rollout/completion_tokens": mean(len(s.completion_ids) for s in samples),
        "rollout/malformed": mean(s.thought_tokens < 0 for s in samples),
        "rollout/truncated": mean(not s.ended for s in samples),
    }
    for level, name in enumerate(LEVELS):
        metrics[f"data/{name}"] = mean(s.level == level for s in samples)
        metrics[f"reward/match_{name}"] = mean(getattr(s, args.match) for s in samples if s.level == level)
    return metrics


def evaluate(rollouts: Rollouts, texts: list, chosen: list, args: Args, run: Run, update: int) -> tuple[dict, list]:
    """Tables 1 and 3 on held-out positions, with the budget of the moment and the same noise every time.

    Prediction (NTP): the most likely token. Reasoning (NTR): the box of a response, sampled and greedy. Returns
    the metrics, and the sampled responses, each with the token that is predicted without a thought.
    """
    start, budget = time.time(), budget_at(update, args)
    scores = score_texts(rollouts.model, texts, args.micro_batch_tokens, run.ranks)
    predicted = [int(scores[k][1, t]) for k, t, _ in chosen]
    noise = uniforms([len(chosen), args.max_new_tokens], args.seed, "evaluation")
    places = [(texts[k], t, level) for k, t, level in chosen]
    sampled, seconds = rollouts(places, noise, budget, args.temperature)
    greedy, _ = rollouts(places, noise, budget, 0.0)
    right = {"ntp": [token == text[t] for token, (text, t, _) in zip(predicted, places)]}
    for ending, samples in (("", sampled), ("_greedy", greedy)):
        right[f"ntr{ending}"], right[f"ntr_prefix{ending}"] = zip(*[(s.exact, s.prefix) for s in samples])
    metrics = {}
    for kind, values in right.items():
        for level, name in enumerate(LEVELS):
            metrics[f"eval/{kind}_{name}"] = mean(v for v, place in zip(values, chosen) if place[2] == level)
        metrics[f"eval/{kind}"] = mean(metrics[f"eval/{kind}_{name}"] for name in LEVELS)  # the "Average"
    metrics |= {
        "eval/budget": budget,
        "eval/thought_tokens": mean(s.thought_tokens for s in sampled if s.thought_tokens >= 0),
        "eval/completion_tokens": mean(len(s.completion_ids) for s in sampled),
        "eval/malformed": mean(s.thought_tokens < 0 for s in sampled),
        "time/eval_rollout_s": seconds["time/rollout_s"],
        "time/eval_s": time.time() - start,
    }
    samples, tokenizer = list(zip(sampled, [rollouts.texts[token] for token in predicted])), rollouts.tokenizer
    blocks = [html_sample(*pair, tokenizer) for pair in samples[:: max(1, len(samples) // 6)]]
    run.samples(f"update {update}", LEGEND, blocks)
    return metrics, samples


def verdict(sample: Sample, predicted: str) -> str:
    word = "malformed" if sample.thought_tokens < 0 else "right" if sample.exact else "wrong"
    return f"{word}: {LEVELS[sample.level]}, the text has {sample.truth[0]!r}, without a thought {predicted!r}"


def html_sample(sample: Sample, predicted: str, tokenizer) -> str:
    """A block of samples.html."""
    prompt, response = tokenizer.decode(sample.prompt_ids)[-300:], tokenizer.decode(sample.completion_ids)
    thought, close, rest = html.escape(response).rpartition(html.escape(THINK_CLOSE))
    response = f"<span class=thought>{thought}</span>{close}{rest}"
    style, words = "good" if sample.exact else "bad", html.escape(verdict(sample, predicted))
    return f"<pre><span class=note>{html.escape(prompt)}</span>{response}\n<span class={style}>{words}</span></pre>"


def report(run: Run, stages: list[dict], samples: list, tokenizer) -> None:
    """The end of a run: its evaluations side by side, two responses that make the point, and the files."""
    lines = ["", f"{'held-out':28}" + "".join(f"{name:>16}" for name in (*LEVELS, "mean"))]
    for kind, words in KINDS.items():
        keys = [f"eval/{kind}_{name}" for name in LEVELS] + [f"eval/{kind}"]
        cells = [" -> ".join(f"{stage[key]:.3f}" for stage in stages) for key in keys]
        lines.append(f"{words:28}" + "".join(f"{cell:>16}" for cell in cells))
    for key in ("budget", "thought_tokens", "completion_tokens", "malformed"):
        cell = " -> ".join(f"{stage[f'eval/{key}']:.3g}" for stage in stages)
        lines.append(f"{key.replace('_', ' '):28}{cell:>16}")
    for sign in (1, -1):  # right where prediction is wrong; then wrong where prediction is right
        order = [(sign * (s.exact - (word == s.truth[0])), s.level) for s, word in samples]
        sample, predicted = samples[order.index(max(order))]
        text = tokenizer.decode(sample.prompt_ids)[-200:] + tokenizer.decode(sample.completion_ids)
        lines += ["", verdict(sample, predicted), text]
    files = [str(run.path / name) for name in ("samples.html", "curves.png") if (run.path / name).exists()]
    run.say("\n".join([*lines, "", " ".join(files)]))


# ---------------------------------------------------------------- main


def plan(args: Args, ranks: Ranks, text: list[int], frame: tuple, longest: int, tokenizer) -> str:
    """What --dry-run prints: sizes, memory, and one prompt."""
    reference = (2 if ranks.device.type == "cuda" else 4) * bool(args.beta)  # bytes a parameter
    rows = args.rollout_rows, longest
    memory = memory_plan(args.model, ranks, rows, args.micro_batch_tokens, args.gradient_checkpointing, reference)
    budgets = f"budget {budget_at(0, args)} to {budget_at(args.updates, args)} tokens"
    return (
        f"{args.updates} updates of {args.prompts_per_update} texts, as many positions x {args.group_size} "
        f"responses: {args.updates * args.prompts_per_update / args.train_texts:.1f} epochs; {budgets}\n"
        f"{memory}\n\na prompt:\n{tokenizer.decode(frame[0] + text[: len(text) // 2] + frame[1])}"
    )


def main(args: Args) -> None:
    check(args)
    ranks = setup(args.seed)
    args = replace(args, proxy_model=base_model(args))
    tokenizer = load_tokenizer(args.model)
    train, heldout, words = read_texts(args, tokenizer)
    run = None if args.dry_run else Run(args, __file__, ranks, [args.dataset])
    started = run.started if run else time.time()
    frame = prompt_frame(tokenizer, budget_at(0, args), args, started)
    longest = len(frame[0] + frame[1]) + max(map(len, train + heldout)) + args.max_new_tokens
    model = load_model(args.model, tokenizer, ranks, longest, recompute=args.gradient_checkpointing)
    proxy = load_proxy(model, tokenizer, train + heldout, args, ranks)
    if ranks.main:
        size = sum(weight.numel() for weight in model.parameters()) / 1e6
        print(f"model {args.model}, {size:.1f}M parameters; proxy {args.proxy_model}\n{words}", flush=True)
    if args.dry_run:
        if ranks.main:
            print(plan(args, ranks, train[0], frame, longest, tokenizer), flush=True)
        return
    ref_model = load_model(args.model, tokenizer, ranks, longest, train=False) if args.beta else None
    optimizer = new_optimizer(model, args.learning_rate, args.weight_decay)
    rollouts = Rollouts(model, tokenizer, args, ranks, started)

    # 0 prepare; before a restore, because the default proxy is the initial model
    entropies, boxable = proxy_entropies(proxy, train + heldout, args, run), boxable_tokens(tokenizer, rollouts.texts)
    first = 1 + len(bos_ids(tokenizer))  # position with a prefix
    levels = [difficulty(e, t, first, boxable, args.thresholds) for e, t in zip(entropies, train + heldout)]
    counts = np.bincount(np.concatenate(levels) + 1, minlength=4)
    run.say("positions: " + ", ".join(f"{c} {n}" for c, n in zip(counts, ("without RL", *LEVELS))))
    to_evaluate = heldout_positions(levels[len(train) :], args.eval_positions)
    del proxy

    state = run.restore({"policy": model}, optimizer) if run.state else {"update": 0, "cursor": 0, "before": {}}
    interrupt, samples, hints = Interrupt(ranks), [], dict(HINTS)
    if not state["before"]:
        metrics, samples = evaluate(rollouts, heldout, to_evaluate, args, run, 0)
        run.log({"update": 0, **metrics}, HELDOUT, args.updates)
        state["before"] = {key: value for key, value in metrics.items() if key.startswith("eval/")}
    stages = [state["before"]]
    try:
        for update in range(state["update"] + 1, 1 if args.eval_only else args.updates + 1):
            # 1 sample, 2 score
            interrupt.check()
            drawn = draw_problems(state["cursor"], args.prompts_per_update, len(train), args.seed)
            texts, budget = [train[i] for i in drawn], budget_at(update - 1, args)
            chosen = choose_positions([levels[i] for i in drawn], update, args)
            places = [(texts[k], t, levels[drawn[k]][t]) for k, t in chosen for _ in range(args.group_size)]
            noise = uniforms([len(places), args.max_new_tokens], args.seed, update, "rollout")
            samples, seconds = rollouts(places, noise, budget, args.temperature)

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
            kept = [np.setdiff1d(np.arange(1, len(text)), [t for j, t in chosen if j == k]) for k, text in enumerate(texts)]
            rows = sorted(zip(texts, kept), key=lambda row: len(row[0]))[ranks.rank :: ranks.world_size]
            sums, norm = train_batch(
                model, optimizer, mine, rows, len(samples), len(texts), args, ranks, interrupt.check
            )
            seconds["time/update_s"] = time.time() - begin

            # 5 log, evaluate, save
            state = {**state, "update": update, "cursor": state["cursor"] + len(drawn)}
            sums = all_sum({key: float(sums[key]) for key in SUMS}, ranks)
            tokens, rl, ntp, ntp_tokens = sums.pop("tokens"), sums.pop("rl_loss"), sums.pop("ntp_loss"), sum(map(len, kept))
            if not args.beta:
                del sums["kl"]  # not measured
            metrics = {
                "update": update,
                **sample_metrics(samples, args),
                **({"rollout/budget": budget} if budget else {}),
                "policy/loss": rl + args.ntp_weight * ntp,  # eq. (9)
                "policy/rl_loss": rl,
                **({"policy/ntp_loss": ntp, "policy/ntp_ce": ntp * len(texts) / ntp_tokens} if args.ntp_weight else {}),
                **{f"policy/{key}": value / tokens for key, value in sums.items()},
                "optim/grad_norm": norm,
                "data/epoch": state["cursor"] / len(train),
                **seconds,
            }
            read = sum(map(len, samples)) + ntp_tokens * bool(args.ntp_weight)
            metrics["perf/tokens_per_s"] = read / sum(seconds.values())
            for key in [key for key in hints if metrics[key] == 1]:
                run.say(f"note: {hints.pop(key)}")
            last, console = update == args.updates, CONSOLE
            if last or (args.eval_every and update % args.eval_every == 0):
                after, samples = evaluate(rollouts, heldout, to_evaluate, args, run, update)
                metrics, console, stages[1:] = metrics | after, CONSOLE[:2] + HELDOUT, [after]
            run.log(metrics, console, args.updates, not math.isfinite(norm))
            if last or (args.save_every and update % args.save_every == 0):
                run.export(model, "final" if last else f"update_{update:06d}")  # before the state
                run.save(state, {"policy": model}, optimizer)
                run.curves(CURVES)
    except Stop:
        run.stopped(state, {"policy": model}, optimizer)
    report(run, stages, samples, tokenizer)


if __name__ == "__main__":
    launch(main, parse_args())
