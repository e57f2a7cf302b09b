"""GRPO with verifiable rewards: the post-training of RA3 (code) and of RMT (math).

Papers: "Learning to Reason as Action Abstractions with Scalable Mid-Training RL", arXiv 2509.25810v2 (section
2, eq. 2.2, and "Post-Training RLVR Results"); "Reinforcement Mid-Training", arXiv 2509.24375 (section 5.3).
GRPO is DeepSeekMath's (arXiv 2402.03300); eps_high, the mean over tokens, overlong filtering and dynamic
sampling are DAPO's (arXiv 2503.14476).

  1 sample     G completions of each of N problems; their log-probabilities are noted while sampling
  2 score      reward 1 if the program passes every test, or if the boxed answer is right, else 0
  3 advantage  A_i = (r_i - mean) / std, within the group of one problem                      eq. (2.2)
  4 update     clipped ratio x advantage, minus beta x KL to a reference                      section 2
  5 log, evaluate on held-out problems, save

Notation: s `prompt_ids`, o_i `completion_ids`, r(s, o_i) `reward`, A_i `advantage`, pi / pi_old `ratio`.
Shapes: N problems, G completions of each, B rows, T completion tokens, L prompt and completion tokens,
V vocabulary, K chosen positions.

Deviations from the papers, and what they leave open (docs/grpo_rlvr.md has all, with both values):
  D1 the ratio is clipped to 1 - 0.2 .. 1 + 0.28, as in the authors' scripts; the paper prints one epsilon.
  D2 the loss is a mean over all tokens of the update (`dapo`); the paper prints a mean over responses.
  D3 a function's body ends with eos or with the token that opens a line in column 0; that token is trained.
     The paper does not say what stops a base model, which goes on for ever.
  D4 problems that read stdin get the signature `def main():`, so that a base model can complete them as well.

  python grpo_rlvr.py --tiny                                                # here: no network, no GPU
  python grpo_rlvr.py --model Qwen/Qwen2.5-1.5B                             # one GPU
  torchrun --nproc_per_node 8 grpo_rlvr.py --model runs/RUN/checkpoints/em_001   # the paper's setting
"""

import json
import math
import os
import re
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import tyro

from transformers import DynamicCache, LogitsProcessorList

from common import (
    TINY, Interrupt, Ranks, Run, Sampler, UserError, all_gather_list, all_sum, cache_argument, check_sizes,
    draw_problems, eos_ids, gathered, launch, load_model, load_tokenizer, memory_plan, micro_batches, optimizer_step, pad_left, padded,
    rank_share, read_rows, run_tests, setup, token_logprobs, token_texts, uniforms,
)
from problems import MathVerifier, code_problem, math_problem, stratified


@dataclass
class Args:
    """GRPO with verifiable rewards. Defaults are RA3's values, those of --task math RMT's."""

    # ---- run
    task: Literal["code", "math"] = "code"
    """code: RA3's RLVR, reward by running tests; math: RMT's post-training, reward by comparing answers"""
    tiny: bool = False
    """use the embedded default: a tiny model, minutes on two cores. Every flag still overrides"""
    output_dir: str = ""
    """folder of this run; empty: runs/grpo_rlvr__<model>__s<seed>__<time>"""
    seed: int = 0
    """fixes the order of the problems and all sampling noise, on any number of ranks"""
    resume: str = ""
    """`auto`: continue the newest run of this model and seed (or --output-dir), if any; or a run folder"""
    dry_run: bool = False
    """print the plan, one prompt and a memory estimate, and stop"""
    # ---- model and data
    model: str = "Qwen/Qwen2.5-1.5B"
    """the initial policy: any causal LM that AutoModelForCausalLM loads, a hub id or a folder"""
    dataset: str = "inclusionAI/AReaL-boba-2-RL-Code:train/train.jsonl"
    """problems with the columns of AReaL-boba-2, DeepCoder or Skywork; see common.read_rows"""
    eval_dataset: str = ""
    """held-out problems; empty: eval_problems of the data set are held out"""
    train_problems: int = 0
    """use no more problems than this; 0: all"""
    eval_problems: int = 128
    """number of held-out problems"""
    max_prompt_tokens: int = 2048
    """problems with a longer prompt are left out (tokens)"""
    difficulty_key: str = ""
    """math: draw problems evenly from levels 1-13 of this key of Skywork's `model_difficulty`; empty: any"""
    chat_template: bool = False
    """math: put the problem into the tokenizer's chat template (base models have none)"""
    # ---- rollout
    prompts_per_update: int = 128
    """N, problems of an update, over all ranks"""
    group_size: int = 4
    """G, completions of each problem"""
    max_new_tokens: int = 1024
    """completions are truncated here (tokens)"""
    temperature: float = 0.6
    """of the sampled distribution, and so of every log-probability"""
    rollout_rows: int = 256
    """completions that one rank generates at once; memory and speed only"""
    reward_timeout_s: float = 6.0
    """limit for one test of a program, or for one comparison of answers (seconds)"""
    workers: int = 0
    """programs that run at once on each rank; 0: this machine's cores over its ranks"""
    # ---- algorithm
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "dapo"
    """denominator of the loss, with TRL's names: see grpo_loss"""
    eps_low: float = 0.2
    """the ratio is clipped below 1 - eps_low"""
    eps_high: float = 0.28
    """the ratio is clipped above 1 + eps_high (the paper: one epsilon)"""
    beta: float = 0.0
    """weight of the KL to the initial policy, loaded only if this is positive"""
    normalize_std: bool = True
    """divide advantages by the group's standard deviation, eq. (2.2); off: Dr. GRPO"""
    filter_overlong: bool = False
    """leave truncated completions out of the loss (DAPO, DeepCoder)"""
    dynamic_sampling: int = 0
    """k > 0: groups of equal rewards are dropped; up to k - 1 more rounds of problems replace them"""
    minibatches: int = 2
    """optimizer steps per rollout; with 1 the ratio is exactly 1"""
    # ---- optimisation
    updates: int = 300
    """rollouts of this run"""
    learning_rate: float = 1e-6
    """of AdamW, constant"""
    weight_decay: float = 0.01
    """of AdamW"""
    max_grad_norm: float = 1.0
    """the global gradient is clipped to this norm"""
    micro_batch_tokens: int = 16384
    """tokens per forward pass on each rank, a shared prompt counted once; memory and speed only"""
    gradient_checkpointing: bool = False
    """keep no activations inside layers, compute them again: much less memory, up to a third more time"""
    # ---- evaluation and saving
    eval_every: int = 10
    """updates between evaluations; 0: only before the first and after the last"""
    save_every: int = 50
    """updates between checkpoints; 0: only after the last. The last two states are kept, and all models"""


MATH = {  # RMT, sections 5.1 and 5.3: 10 epochs of 4096 problems, 128 at a time
    "task": "math", "model": "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B", "chat_template": True,
    "dataset": "Skywork/Skywork-OR1-RL-Data", "difficulty_key": "DeepSeek-R1-Distill-Qwen-7B",
    "train_problems": 4096, "eval_problems": 600, "group_size": 8, "max_new_tokens": 4096, "temperature": 1.0,
    "eps_high": 0.2, "minibatches": 1, "updates": 320, "gradient_checkpointing": True, "rollout_rows": 16,
}
TINY_RUN = {  # optimisation settings for two million parameters; the reward is that of a large run
    "tiny": True, "model": f"{TINY}/model", "train_problems": 0, "eval_problems": 128, "difficulty_key": "",
    "chat_template": False, "prompts_per_update": 16, "group_size": 8, "max_new_tokens": 64,
    "rollout_rows": 256, "temperature": 1.0, "reward_timeout_s": 2.0, "minibatches": 1, "updates": 40,
    "learning_rate": 1e-4, "micro_batch_tokens": 2048, "gradient_checkpointing": False, "save_every": 0,
}


def parse_args() -> Args:
    """tyro's command line over the defaults that --task and --tiny choose."""
    task = "math" if re.search(r"--task[ =]math\b", " ".join(sys.argv)) else "code"
    defaults = dict(MATH) if task == "math" else {}
    if "--tiny" in sys.argv:
        stem = f"{TINY}/{task}"
        defaults |= TINY_RUN | {"dataset": f"{stem}_train.jsonl", "eval_dataset": f"{stem}_heldout.jsonl"}
    return tyro.cli(Args, default=Args(**defaults))


def check(args: Args) -> None:
    """UserError for values that do not fit together."""
    if args.group_size < 2:
        raise UserError("--group-size must be at least 2: advantages compare completions of one prompt")
    if args.temperature <= 0:
        raise UserError("--temperature must be positive: greedy completions of one prompt are all the same")
    positive = "eval_problems prompts_per_update max_prompt_tokens max_new_tokens rollout_rows minibatches"
    positive += " reward_timeout_s max_grad_norm micro_batch_tokens"
    not_negative = "train_problems updates workers dynamic_sampling eps_low eps_high beta learning_rate"
    check_sizes(args, positive, f"{not_negative} weight_decay eval_every save_every")
    if args.prompts_per_update % args.minibatches:
        divisors = [m for m in range(1, args.prompts_per_update + 1) if args.prompts_per_update % m == 0]
        nearest = min(divisors, key=lambda m: abs(m - args.minibatches))
        raise UserError(f"--minibatches must divide --prompts-per-update; the nearest that does is {nearest}")
    if args.chat_template and args.task == "code":
        raise UserError("--chat-template is for --task math; a code problem is completed from its signature")


# ---------------------------------------------------------------- problems and prompts

MATH_INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}.\n"


@dataclass
class Problem:
    name: str
    prompt: str
    prompt_ids: list[int]
    checks: dict  # code: signature, cases, fn_name; math: answer


def code_prompt(question: str, signature: str) -> str:
    """The question, then the signature, for a base model to complete (RA3, section 7)."""
    return f'"""\n{question}\n"""\n{signature}\n'


def read_problems(source: str, args: Args, tokenizer) -> list[Problem]:
    """All problems of `source` whose prompt is short enough, in an order fixed by the seed."""
    rows = list(read_rows(source, split="math" if "Skywork" in source else "train"))
    rows = [rows[i] for i in np.random.default_rng([args.seed, 0]).permutation(len(rows))]
    problems = []
    try:
        for row in stratified(rows, args.difficulty_key) if args.difficulty_key else rows:
            if args.task == "code":
                question, checks = code_problem(row, source)
                prompt = code_prompt(question, checks["signature"])
            else:
                question, checks = math_problem(row, source)
                prompt = f"{question}{MATH_INSTRUCTION}"
            if args.chat_template:
                message = [{"role": "user", "content": prompt.strip()}]
                prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            prompt_ids = tokenizer(prompt, add_special_tokens=not args.chat_template)["input_ids"]
            if len(prompt_ids) <= args.max_prompt_tokens:
                name = str(row.get("query_id") or row.get("extra_info", {}).get("index", len(problems)))
                problems.append(Problem(name, prompt, prompt_ids, checks))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"{source}, row {str(row)[:80]}...: {type(error).__name__} {error}") from None
    if not problems:
        words = f"no problem, or all are longer than --max-prompt-tokens {args.max_prompt_tokens}"
        raise UserError(f"{source} holds {words}")
    return problems


# ---------------------------------------------------------------- 1 sample

CHUNK = 16  # tokens of one call of generate; then the rows that have ended leave the batch


@dataclass
class Sample:
    """One completion and all that the steps find out about it. Every rank holds all samples of an update."""

    problem: str
    prompt_ids: list[int]
    completion_ids: list[int]
    rollout_logprobs: list[float]  # noted while sampling
    ended: bool = False  # else truncated
    text: str = ""
    reward: float = 0.0
    reason: str = ""
    advantage: float = 0.0
    in_loss: bool = False
    old_logprobs: list[float] | None = None  # by the training forward, before the first minibatch
    ref_logprobs: list[float] | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


def end_table(tokenizer, eos: set[int], vocab_size: int, column_zero: bool) -> torch.Tensor:
    """What is_end must know of every token: bool [3, V]. Row 0: it ends a completion by itself, like eos and,
    with `column_zero`, text in column 0 (D3); row 1: it begins with text; row 2: it ends a line."""
    table = torch.zeros(3, vocab_size, dtype=torch.bool)
    table[0, sorted(eos)] = True
    if column_zero:
        texts = token_texts(tokenizer, vocab_size)
        table[0] |= torch.tensor([bool(re.search(r"\n\S", text)) for text in texts])
        table[1] = torch.tensor([bool(re.match(r"\S", text)) for text in texts])
        table[2] = torch.tensor([text.endswith("\n") for text in texts])
    return table


def is_end(table: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Which tokens end a completion: bool [B, T] of tokens [B, 1 + T], whose first is the prompt's last."""
    alone, begins_text, ends_line = table[:, tokens]  # [B, 1 + T] each
    return alone[:, 1:] | (begins_text[:, 1:] & ends_line[:, :-1])


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

PREAMBLE = "import bisect, collections, functools, heapq, itertools, math, re, sys\nfrom typing import *\n"
PREAMBLE += "sys.setrecursionlimit(50000)\n"


def code_rewards(problems: list[Problem], completions: list[str], args: Args) -> list[tuple[float, str]]:
    """(1 if every test passes, else 0; the sandbox's reason). Never raises for what a program does."""
    programs = []
    for problem, completion in zip(problems, completions):
        signature, fn_name = problem.checks["signature"], problem.checks["fn_name"]
        body = re.split(r"^(?=\S)", completion, maxsplit=1, flags=re.MULTILINE)[0]  # up to text in column 0
        code = f"{PREAMBLE}{signature}\n{body}\n" + ("" if fn_name else "main()\n")
        programs.append({"code": code, "cases": problem.checks["cases"], "fn_name": fn_name or None})
    workers = args.workers or max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    verdicts = run_tests(programs, timeout_s=args.reward_timeout_s, memory_mb=1024, workers=workers)
    return [(float(verdict["passed"]), verdict["reason"]) for verdict in verdicts]


class Rollouts:
    """Steps 1 and 2 on all problems: each rank completes and scores its share, and gets all samples."""

    def __init__(self, model, tokenizer, args: Args, ranks: Ranks) -> None:
        self.model, self.tokenizer, self.args, self.ranks = model, tokenizer, args, ranks
        self.pool, self.verify = ThreadPoolExecutor(1), MathVerifier()
        vocab_size, ends = model.config.get_text_config().vocab_size, eos_ids(tokenizer, args.model)
        self.table = end_table(tokenizer, ends, vocab_size, args.task == "code").to(model.device)

    def rewards(self, problems: list[Problem], texts: list[str]) -> list[tuple[float, str]]:
        """Step 2. What a completion does is never an error here, but a 0 with a reason."""
        if self.args.task == "code":
            return code_rewards(problems, texts, self.args)
        answers, limit_s = [problem.checks["answer"] for problem in problems], self.args.reward_timeout_s
        return [self.verify(answer, text, limit_s) for answer, text in zip(answers, texts)]

    def __call__(self, problems: list[Problem], noise: torch.Tensor, temperature: float):
        """(a Sample for every entry of the global list `problems`, seconds); noise [len(problems), T]."""
        start, samples, waiting = time.time(), {}, []
        share = range(len(problems))[self.ranks.share(len(problems))]
        mine = sorted(share, key=lambda i: len(problems[i].prompt_ids))
        with gathered(self.model):
            for first in range(0, len(mine), self.args.rollout_rows):
                batch = mine[first : first + self.args.rollout_rows]
                prompt_ids = [problems[i].prompt_ids for i in batch]
                rows = rollout(self.model, prompt_ids, noise[batch], temperature, self.table)
                for i, (ids, logprobs, ended) in zip(batch, rows):
                    samples[i] = Sample(problems[i].name, problems[i].prompt_ids, ids, logprobs, ended)
                    samples[i].text = self.text(problems[i].prompt_ids[-1:], ids)
                    samples[i].in_loss = ended or not self.args.filter_overlong
                texts = [samples[i].text for i in batch]  # scored while the next batch generates
                waiting.append((batch, self.pool.submit(self.rewards, [problems[i] for i in batch], texts)))
        generated = time.time()
        for batch, future in waiting:
            for i, (reward, reason) in zip(batch, future.result()):
                samples[i].reward, samples[i].reason = reward, reason
        everyone = all_gather_list([samples[i] for i in share], self.ranks)  # the slowest rank's time counts
        seconds = Counter({"time/rollout_s": generated - start, "time/reward_s": time.time() - generated})
        return everyone, seconds

    def text(self, before: list[int], ids: list[int]) -> str:
        """The completion's text; decoded behind the prompt's last token, see token_texts."""
        whole, prompt = self.tokenizer.batch_decode([before + ids, before], skip_special_tokens=True)
        return whole[len(prompt) :]


# ---------------------------------------------------------------- 3 advantage


def group_advantages(rewards: torch.Tensor, normalize_std: bool = True, eps: float = 1e-4) -> torch.Tensor:
    """Rewards [N, G] -> advantages [N, G] within each group (RA3's eq. (2.2), RMT's (6)); eps as in TRL."""
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    std = rewards.std(dim=1, keepdim=True)  # ddof 1, as in TRL
    return centred / (std + eps) if normalize_std else centred  # eq. (2.2), (6)


# ---------------------------------------------------------------- 4 update

SUMS = ("loss", "tokens", "kl", "clip_frac", "entropy", "rollout_ratio", "rollout_gap")


def loss_normalizer(lengths: torch.Tensor, loss_type: str, max_length: int) -> float:
    """Denominator of the loss of a batch whose completions have `lengths` [B] tokens in the loss."""
    if loss_type == "grpo":
        return len(lengths)
    if loss_type == "dr_grpo":
        return len(lengths) * max_length
    return max(1.0, float(lengths.sum()))  # bnpo, dapo


def grpo_loss(
    logprobs, old_logprobs, ref_logprobs, advantages, mask,
    eps_low, eps_high, beta, loss_type, max_length, normalizer=None,
) -> tuple[torch.Tensor, dict]:
    """-J_GRPO (section 2) of a batch, and the sums of its metrics over the tokens of `mask`.

    logprobs, old_logprobs, ref_logprobs (None if beta is 0) and mask are [B, T]; advantages [B]. loss_type,
    as in TRL: `grpo` mean over completions of their token means; `bnpo`, `dapo` mean over tokens; `dr_grpo`
    sum / (completions x max_length). `normalizer`: the global denominator, with which the losses of
    micro-batches and of ranks add up to the loss of the whole batch; if None, this batch's own.
    """
    advantages, mask = advantages.unsqueeze(-1), mask.to(logprobs.dtype)  # [B, 1], [B, T]
    ratio = (logprobs - old_logprobs).exp()  # [B, T]
    token_loss = -torch.min(ratio * advantages, ratio.clamp(1 - eps_low, 1 + eps_high) * advantages)
    kl = torch.zeros_like(ratio)
    if beta:
        log_ratio = ref_logprobs - logprobs
        kl = log_ratio.exp() - log_ratio - 1  # k3. TRL 1.x multiplies it by ratio (use_bias_correction_kl)
        token_loss = token_loss + beta * kl
    if normalizer is None:
        normalizer = loss_normalizer(mask.sum(-1), loss_type, max_length)
    if loss_type == "grpo":
        token_loss = token_loss / mask.sum(-1, keepdim=True).clamp(min=1)
    loss = (token_loss * mask).sum() / normalizer  # -J_GRPO, section 2
    clipped = ((ratio < 1 - eps_low) & (advantages < 0)) | ((ratio > 1 + eps_high) & (advantages > 0))
    sums = {"loss": loss, "tokens": mask.sum(), "kl": (kl * mask).sum(), "clip_frac": (clipped * mask).sum()}
    return loss, {key: value.item() for key, value in sums.items()}


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


def train_minibatch(model, optimizer, samples: list[Sample], normalizer: float, args: Args, ranks: Ranks):
    """One optimizer step on this rank's samples of a minibatch: (sums over their tokens, gradient norm).

    Without an optimizer the model stays as it is.
    """
    nothing = Sample("", [0, 0], [0], [0.0], old_logprobs=[0.0], ref_logprobs=[0.0])
    sums = Counter()
    for batch in sample_batches(samples, args.micro_batch_tokens, ranks):
        micro = [samples[i] for i in batch] or [nothing]  # a rank without work still joins the collectives
        logprobs, entropies, mask = completion_logprobs(model, micro, args.temperature, entropy=True)
        device = mask.device
        mask = mask & torch.tensor([s.in_loss for s in micro], device=device).unsqueeze(1)
        advantages = torch.tensor([s.advantage for s in micro], device=device)
        # with one minibatch the policy is still the one that sampled, and the ratio is exactly 1
        old = padded([s.old_logprobs for s in micro], device) if args.minibatches > 1 else logprobs.detach()
        ref = padded([s.ref_logprobs for s in micro], device) if args.beta else None
        loss, micro_sums = grpo_loss(
            logprobs, old, ref, advantages, mask,
            args.eps_low, args.eps_high, args.beta, args.loss_type, args.max_new_tokens, normalizer,
        )
        (loss * ranks.world_size).backward()  # FSDP averages over ranks; the denominator is global already
        gap = (old - padded([s.rollout_logprobs for s in micro], device))[mask]
        sums.update(micro_sums, entropy=entropies[mask].sum().item())
        sums.update(rollout_ratio=gap.exp().sum().item(), rollout_gap=gap.abs().sum().item())
    return sums, optimizer_step(model, optimizer, float(sums["loss"]), args.max_grad_norm, ranks)


def culprits(model, samples: list[Sample], normalizer: float, args: Args, ranks: Ranks) -> str:
    """The problems of those samples that make the loss or its gradient NaN or infinite."""

    def alone(i: int) -> tuple[float, float]:
        sums, norm = train_minibatch(model, None, samples[i : i + 1], normalizer, args, ranks)
        return float(sums["loss"]), norm

    return not_finite([f"problem {s.problem}" for s in samples], alone, ranks)


# ---------------------------------------------------------------- 5 log, evaluate, save

CURVES = (
    "reward/mean", "eval/pass@1", "reward/groups_without_spread", "rollout/completion_tokens",
    "rollout/truncated", "policy/entropy", "optim/grad_norm", "time/rollout_s", "time/update_s",
)
CONSOLE = (
    "reward {reward/mean:.3f} | {rollout/completion_tokens:.0f} tokens, {rollout/truncated:.0%} truncated | "
    "entropy {policy/entropy:.2f} grad {optim/grad_norm:.2f} | rollout {time/rollout_s:.1f} reward "
    "{time/reward_s:.1f} update {time/update_s:.1f} s, {perf/tokens_per_s:.0f} tokens/s"
)
HELDOUT = " | held-out pass@1 {eval/pass@1:.3f}"


def sample_metrics(samples: list[Sample], group_size: int) -> dict:
    """What the samples of an update tell by themselves."""
    rewards = torch.tensor([s.reward for s in samples]).view(-1, group_size)  # [N, G]
    lengths = [len(s.completion_ids) for s in samples]
    reasons = Counter(re.sub(r"\W+", "_", s.reason.split(":")[0]) for s in samples if not s.reward)
    return {
        "reward/mean": rewards.mean().item(),
        "reward/group_std": rewards.std(dim=1).mean().item(),
        "reward/solved_groups": rewards.amax(1).mean().item(),
        "reward/groups_without_spread": (rewards.amax(1) == rewards.amin(1)).float().mean().item(),
        "rollout/completion_tokens": sum(lengths) / len(samples),
        "rollout/completion_tokens_max": max(lengths),
        "rollout/truncated": sum(not s.ended for s in samples) / len(samples),
    } | {f"reward/fail_{reason}": count / len(samples) for reason, count in sorted(reasons.items())}


def evaluate(rollouts: Rollouts, problems: list[Problem], args: Args, run: Run, update: int) -> dict:
    """Held-out pass@1, greedy and sampled (with the same noise every time); some samples go to samples.md."""
    start = time.time()
    noise = uniforms([len(problems), args.max_new_tokens], args.seed, "evaluation")
    greedy, _ = rollouts(problems, noise, 0.0)
    sampled, _ = rollouts(problems, noise, args.temperature)
    if run.ranks.main:
        with open(run.path / "samples.md", "a") as file:
            for s in greedy[:6]:
                file.write(f"## update {update}, problem {s.problem}: reward {s.reward:g}, {s.reason}\n\n")
                file.write(f"~~~~\n{rollouts.tokenizer.decode(s.prompt_ids)}[->]{s.text}\n~~~~\n\n")
    return {
        "eval/pass@1": sum(s.reward for s in greedy) / len(greedy),
        "eval/pass@1_sampled": sum(s.reward for s in sampled) / len(sampled),
        "eval/completion_tokens": sum(len(s.completion_ids) for s in greedy) / len(greedy),
        "time/eval_s": time.time() - start,
    }


# ---------------------------------------------------------------- main


def plan(args: Args, ranks: Ranks, train: list[Problem], heldout: list[Problem]) -> str:
    """What --dry-run prints: sizes, memory, and one problem."""
    longest = max(len(problem.prompt_ids) for problem in train) + args.max_new_tokens
    reference = (2 if ranks.device.type == "cuda" else 4) * bool(args.beta)  # bytes a parameter
    rollout = args.rollout_rows, longest
    memory = memory_plan(
        args.model, ranks, rollout, args.micro_batch_tokens, args.gradient_checkpointing, reference
    )
    return (
        f"{args.task}: {len(train)} training and {len(heldout)} held-out problems\n"
        f"{args.updates} updates of {args.prompts_per_update} prompts x {args.group_size} completions in "
        f"{args.minibatches} minibatches: {args.updates * args.prompts_per_update / len(train):.1f} epochs\n"
        f"{memory}\n\n{train[0].prompt}\nchecks: {json.dumps(train[0].checks)[:800]}"
    )


def main(args: Args) -> None:
    check(args)
    ranks = setup(args.seed)
    tokenizer = load_tokenizer(args.model)
    train = read_problems(args.dataset, args, tokenizer)
    if args.eval_dataset:
        heldout = read_problems(args.eval_dataset, args, tokenizer)[: args.eval_problems]
    else:
        heldout, train = train[: args.eval_problems], train[args.eval_problems :]
    train = train[: args.train_problems or None]
    if not train or not heldout:
        raise UserError(f"{len(train)} training, {len(heldout)} held-out problems: change --eval-problems")
    if args.dry_run:
        if ranks.main:
            print(plan(args, ranks, train, heldout), flush=True)
        return
    run = Run(args, __file__, ranks)
    model = load_model(args.model, ranks, recompute=args.gradient_checkpointing)
    longest = max(len(problem.prompt_ids) for problem in train + heldout)
    check_context(model, longest + args.max_new_tokens, "the longest prompt and --max-new-tokens")
    ref_model = load_model(args.model, ranks, train=False) if args.beta else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    rollouts = Rollouts(model, tokenizer, args, ranks)
    state = run.restore({"policy": model}, optimizer) if run.state else {"update": 0, "cursor": 0}
    interrupt, first = Interrupt(), state["update"]
    if first == 0:
        run.log({"update": 0, **evaluate(rollouts, heldout, args, run, 0)}, HELDOUT, args.updates)

    for update in range(first + 1, args.updates + 1):
        samples, groups, seconds = [], [], Counter()
        for attempt in range(max(1, args.dynamic_sampling)):
            # 1 sample, 2 score
            drawn = draw_problems(state["cursor"], args.prompts_per_update, len(train), args.seed)
            state["cursor"] += len(drawn)
            problems = [train[i] for i in drawn for _ in range(args.group_size)]  # groups: G rows
            noise = uniforms([len(problems), args.max_new_tokens], args.seed, update, attempt)
            new, new_seconds = rollouts(problems, noise, args.temperature)
            seconds.update(new_seconds)
            samples += new

            # 3 advantage
            rewards = torch.tensor([s.reward for s in new]).view(-1, args.group_size)  # [N, G]
            advantages = group_advantages(rewards, args.normalize_std)  # [N, G]
            for sample, advantage in zip(new, advantages.flatten().tolist()):
                sample.advantage = advantage
            new = [new[i : i + args.group_size] for i in range(0, len(new), args.group_size)]
            groups += [g for g, r in zip(new, rewards) if not args.dynamic_sampling or r.min() < r.max()]
            if len(groups) >= args.prompts_per_update:
                break

        # 4 update
        begin = time.time()
        groups = groups[: args.prompts_per_update]
        parts = np.array_split(np.arange(len(groups)), args.minibatches)
        minibatches = [[groups[g] for g in part] for part in parts if len(part)]
        shares = [rank_share(part, ranks) for part in minibatches]
        mine = [sample for share in shares for sample in share]
        if args.minibatches > 1:  # true old log-probabilities, before the first of several steps
            for sample, logprobs in zip(mine, score(model, mine, args)):
                sample.old_logprobs = logprobs
        if ref_model is not None:
            for sample, logprobs in zip(mine, score(ref_model, mine, args)):
                sample.ref_logprobs = logprobs
        sums, norms, cause = Counter(), [], ""
        for part, share in zip(minibatches, shares):
            # global denominators. dapo's is that of the whole rollout over the number of steps, as in TRL
            counted, steps = (groups, len(minibatches)) if args.loss_type == "dapo" else (part, 1)
            lengths = torch.tensor([len(s.completion_ids) * s.in_loss for group in counted for s in group])
            normalizer = loss_normalizer(lengths, args.loss_type, args.max_new_tokens) / steps
            share_sums, norm = train_minibatch(model, optimizer, share, normalizer, args, ranks)
            sums.update(share_sums)
            norms.append(norm)
            if not math.isfinite(norm) and not cause:
                cause = culprits(model, share, normalizer, args, ranks)
        seconds["time/update_s"] = time.time() - begin

        # 5 log, evaluate, save
        sums = all_sum({key: float(sums[key]) for key in SUMS}, ranks)
        loss, tokens = sums.pop("loss"), sums.pop("tokens")
        if not args.beta:
            del sums["kl"]  # not measured
        metrics = {
            "update": update,
            **sample_metrics(samples, args.group_size),
            "rollout/groups": len(groups),
            "policy/loss": loss / max(1, len(shares)),
            **{f"policy/{key}": value / tokens for key, value in sums.items() if tokens},
            "optim/grad_norm": sum(norms) / max(1, len(norms)),
            "data/epoch": state["cursor"] / len(train),
            **seconds,
            "perf/tokens_per_s": sum(map(len, samples)) / sum(seconds.values()),
        }
        last, interrupted = update == args.updates, interrupt.requested(ranks)
        evaluated = last or (args.eval_every and update % args.eval_every == 0)
        if evaluated:
            metrics |= evaluate(rollouts, heldout, args, run, update)
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
