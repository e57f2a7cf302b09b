"""GRPO with verifiable rewards: the post-training of RA3 (code) and of RMT (math), on one page.

Papers: Learning to Reason as Action Abstractions with Scalable Mid-Training RL (arXiv 2509.25810v2, section 2,
eq. 2.2 and the RLVR experiment); Reinforcement Mid-Training (arXiv 2509.24375v1, section 5.3); GRPO itself is
DeepSeekMath (arXiv 2402.03300), eps_high and the token mean are DAPO (arXiv 2503.14476).

    1 sample      G completions of each of N prompts from the policy, log-probabilities noted while sampling
    2 score       reward 1 if the program passes every test (sandbox), or the boxed answer is right (math-verify)
    3 advantage   A_i = (r_i - mean) / std within the group of one prompt                         eq. (2.2)
    4 update      clipped surrogate, optional KL to a reference, global denominators              J_GRPO, section 2
    5 log, evaluate held-out problems, save

Notation: s -> problem, o_i -> completion_ids, r(s, o_i) -> reward, A_i -> advantage, pi/pi_old -> ratio,
epsilon -> eps_low, eps_high, beta -> beta. Shapes: N prompts, G group size, B rows, T completion tokens, L tokens
of prompt and completion, V vocabulary.

Where we differ from the papers, or they are silent (docs/grpo_rlvr.md has the whole list):
D1  The clip is asymmetric (0.2 / 0.28, the authors' scripts) where the paper writes one epsilon.
D2  The loss is a mean over the tokens of the whole update ("dapo"); the paper's 1/G sum over whole responses.
D3  A body ends at the token that opens a line in column 0, or at eos; that token is trained like eos. (No word on
    how base models stop.)
D4  Problems that read stdin get the signature `def main():`, so that they, too, are completed and not chatted.

    python grpo_rlvr.py --tiny                                              this machine, no network
    python grpo_rlvr.py --model Qwen/Qwen2.5-Coder-1.5B                     one GPU
    torchrun --nproc_per_node 8 grpo_rlvr.py --model runs/.../checkpoints/em_001 --task code
"""

import argparse
import collections
import dataclasses
import inspect
import json
import math
import os
import re
import select
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import tyro
from torch.nn.utils.rnn import pad_sequence
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
    run_tests,
    setup,
    token_logprobs,
    uniforms,
)


# ---------------------------------------------------------------- arguments


@dataclass(frozen=True)
class Args:
    # -- run
    task: Literal["code", "math"] = "code"
    """code: RA3's RLVR; math: RMT's continual post-training. Chooses the other defaults, too."""
    tiny: bool = False
    """Defaults for the embedded model and problems: no network, two CPU cores, a few minutes."""
    seed: int = 1
    """Decides every random choice: the order of the prompts and all sampling noise."""
    output_dir: str = ""
    """Run folder; empty: runs/grpo_rlvr__<model>__s<seed>__<time>."""
    resume: str = ""
    """`auto` (the latest run of this model and seed, or a new one) or a run folder."""
    dry_run: bool = False
    """Print the plan, one prompt and a memory estimate, and stop."""
    # -- model and data
    model: str = "Qwen/Qwen2.5-Coder-1.5B"
    """Hub id or folder of a causal language model. The papers start from their mid-trained checkpoints."""
    dataset: str = "inclusionAI/AReaL-boba-2-RL-Code:train/train.jsonl"
    """Training problems: hub id or local file with the columns of AReaL-boba-2, DeepCoder or Skywork."""
    eval_dataset: str = ""
    """Held-out problems; empty: `eval_problems` of the training problems are held out."""
    train_problems: int = 0
    """Use so many training problems; 0: all. RMT: 4096."""
    difficulty_key: str = ""
    """Skywork's `extra_info.model_difficulty` key: problems are taken evenly from its levels 1-13 (RMT)."""
    chat_template: bool = False
    """Math: put the problem into the tokenizer's chat template. Base models have none."""
    max_prompt_tokens: int = 2048
    """Longer prompts are left out."""
    max_tests: int = 15
    """Keep the tests with the longest inputs, so many per problem (DeepCoder's rule). Code only."""
    # -- rollout
    prompts_per_update: int = 128
    """N, over all ranks."""
    group_size: int = 4
    """G, completions of each prompt. RMT: 8."""
    max_new_tokens: int = 1024
    """Longest completion. RMT: 4096."""
    temperature: float = 0.6
    """Of sampling, and of every log-probability."""
    rollout_rows: int = 256
    """Completions generated at once on a rank. Memory and speed only."""
    # -- reward
    reward_timeout_s: float = 6.0
    """Limit for one program (all its tests) or one comparison of answers."""
    reward_memory_mb: int = 1024
    """Memory limit of one program."""
    reward_workers: int = 0
    """Programs that run at once on a rank; 0: the machine's cores over its ranks."""
    # -- algorithm
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "dapo"
    """How token losses are averaged; TRL's names. See `grpo_loss`."""
    eps_low: float = 0.2
    """Clip of the ratio below 1."""
    eps_high: float = 0.28
    """Clip of the ratio above 1 (clip-higher)."""
    beta: float = 0.0
    """Weight of the KL to the initial model, which is loaded only if this is positive."""
    normalize_std: bool = True
    """Divide by the group's standard deviation (eq. 2.2)."""
    filter_overlong: bool = False
    """Leave truncated completions out of the loss (DeepCoder, DAPO)."""
    dynamic_sampling: int = 0
    """0: off. k: groups without spread leave the batch, and up to k - 1 further rounds of prompts refill it."""
    minibatches: int = 2
    """Optimizer steps per rollout. 1: the ratio is exactly 1."""
    # -- optimisation
    updates: int = 300
    """Rollouts in the run."""
    learning_rate: float = 1e-6
    """Of AdamW, constant."""
    weight_decay: float = 0.01
    """Of AdamW."""
    max_grad_norm: float = 1.0
    """Clip of the global gradient norm."""
    micro_batch_tokens: int = 16384
    """Padded tokens per forward and backward pass on a rank. Memory and speed only."""
    max_skipped: int = 5
    """Stop after so many updates in a row with a NaN or infinite gradient; each is skipped and counted."""
    # -- evaluation and saving
    eval_every: int = 10
    """Updates between evaluations; 0: only before the first and after the last."""
    eval_problems: int = 128
    """Held-out problems. RMT: 600."""
    save_every: int = 50
    """Updates between checkpoints; 0: only the last."""
    keep_checkpoints: int = 2
    """States to resume from that are kept; exported models all are."""


MATH = {  # RMT, sections 5.1 and 5.3: 10 epochs of 4096 problems at 128 per batch
    "task": "math", "dataset": "Skywork/Skywork-OR1-RL-Data", "model": "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B",
    "chat_template": True, "difficulty_key": "DeepSeek-R1-Distill-Qwen-7B", "train_problems": 4096, "eval_problems": 600,
    "group_size": 8, "max_new_tokens": 4096, "temperature": 1.0, "eps_high": 0.2, "minibatches": 1, "updates": 320,
}  # fmt: skip
TINY_RUN = {
    "tiny": True, "model": str(TINY / "model"), "prompts_per_update": 32, "group_size": 8, "max_new_tokens": 64,
    "temperature": 1.0, "updates": 40, "learning_rate": 3e-4, "minibatches": 1, "save_every": 0, "reward_timeout_s": 2.0,
    "eval_problems": 128, "train_problems": 0, "difficulty_key": "", "chat_template": False,
}  # fmt: skip


def parse_args() -> Args:
    """tyro, with the default values that --task and --tiny choose."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--task", default="code")
    first.add_argument("--tiny", action="store_true")
    chosen, _ = first.parse_known_args()
    defaults = MATH if chosen.task == "math" else {}
    if chosen.tiny:
        files = {"dataset": f"{TINY}/{chosen.task}_train.jsonl", "eval_dataset": f"{TINY}/{chosen.task}_heldout.jsonl"}
        defaults = {**defaults, **TINY_RUN, **files}
    return tyro.cli(Args, default=Args(**defaults), description=__doc__.split("\n")[0])


def check(args: Args) -> None:
    """UserError for sizes that do not fit, with the nearest that do."""
    if args.group_size < 2:
        raise UserError("--group-size must be at least 2: an advantage compares completions of one prompt")
    if args.prompts_per_update % args.minibatches:
        fits = [m for m in range(1, args.prompts_per_update + 1) if args.prompts_per_update % m == 0]
        nearest = min(fits, key=lambda m: abs(m - args.minibatches))
        raise UserError(f"--minibatches {args.minibatches} does not divide --prompts-per-update; nearest: {nearest}")
    if args.temperature <= 0:
        raise UserError("--temperature must be positive: greedy completions of one prompt do not differ")


# ---------------------------------------------------------------- prompts and data


@dataclass(frozen=True)
class Problem:
    name: str
    prompt: str
    prompt_ids: list[int]
    checks: dict  # code: signature, cases, fn_name; math: answer


def as_json(value):
    """Data sets keep JSON inside strings; nested ones as well."""
    return json.loads(value) if isinstance(value, str) and value.strip() else value or {}


def code_cases(row: dict, source: str, max_tests: int) -> tuple[list[dict], str]:
    """Tests of a row of AReaL-boba-2 or DeepCoder: ([{input, output}], name of the function or "" for stdin)."""
    tests = as_json(row["input_output"] if "input_output" in row else column(row, "tests", source))
    metadata = as_json(row.get("metadata"))
    if isinstance(tests, dict):
        cases = [{"input": i, "output": o} for i, o in zip(tests["inputs"], tests["outputs"])]
        first = tests
    else:
        cases, first = tests, {**tests[0], **as_json(tests[0].get("metadata"))}
    names = [d.get(k) for d in (metadata, first) for k in ("fn_name", "func_name")]
    fn_name = next((name for name in names if name), "")
    if first.get("testtype") == "stdin":
        fn_name = ""
    if "testtype" not in first:  # LiveCodeBench keeps all its tests
        cases = sorted(cases, key=lambda case: len(str(case["input"])), reverse=True)[:max_tests]
    plain = []
    for case in cases:
        given, expected = case["input"], case["output"]
        if not isinstance(given, str):  # TACO: a list of arguments or of lines, the result in a list
            given = "\n".join(json.dumps(a) if fn_name else str(a) for a in given)
        if not isinstance(expected, str):
            if fn_name:
                expected = json.dumps(expected[0] if isinstance(expected, list) and len(expected) == 1 else expected)
            else:
                expected = "\n".join(map(str, expected))
        plain.append({"input": given, "output": expected})
    return plain, fn_name


def code_signature(row: dict, cases: list[dict], fn_name: str) -> str:
    """The line(s) that the model goes on from."""
    given = row.get("signature") or row.get("starter_code")
    if given:
        return given.rstrip()
    if not fn_name:
        return "def main():"  # D4: reads stdin, prints to stdout
    solutions = as_json(row.get("solutions")) if str(row.get("solutions"))[:1] == "[" else row.get("solutions")
    for solution in [solutions] if isinstance(solutions, str) else solutions or []:
        found = re.search(rf"def\s+{re.escape(fn_name)}\s*\(([^)]*)\)\s*(->[^:\n]+)?:", solution)
        if found:
            arguments = re.sub(r"^\s*self\s*,?\s*", "", found[1])
            return f"def {fn_name}({' '.join(arguments.split())}):"
    arity = len(cases[0]["input"].strip().splitlines()) if cases else 1
    return f"def {fn_name}({', '.join(f'arg{i + 1}' for i in range(arity))}):"


def code_problem(row: dict, source: str, max_tests: int) -> tuple[str, dict]:
    """(prompt, checks) of one row: the question as a docstring, then the signature (RA3 v2, section 7)."""
    question = row["question"] if "question" in row else column(row, "problem", source)
    cases, fn_name = code_cases(row, source, max_tests)
    signature = code_signature(row, cases, fn_name)
    return f'"""\n{question}\n"""\n{signature}\n', {"signature": signature, "cases": cases, "fn_name": fn_name}


def math_problem(row: dict, source: str) -> tuple[str, dict]:
    """(prompt, checks) of one row with Skywork-OR1's columns."""
    question = column(row, "prompt", source)[-1]["content"]
    answer = column(row, "reward_model", source)["ground_truth"]
    if answer.startswith("["):
        answer = json.loads(answer)[0]
    return f"{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}.\n", {"answer": answer}


def stratified(rows: list[dict], key: str, rng) -> list[dict]:
    """Rows of difficulty 1-13, one of each level in turn, so that every beginning of the list is balanced (RMT, 5.1)."""
    levels = collections.defaultdict(list)
    for index in rng.permutation(len(rows)):
        difficulty = column(rows[index].get("extra_info") or {}, "model_difficulty", "extra_info")
        level = int(column(difficulty, key, "model_difficulty"))
        if 1 <= level <= 13:
            levels[level].append(rows[index])
    longest = max(map(len, levels.values()), default=0)
    return [levels[level][i] for i in range(longest) for level in sorted(levels) if i < len(levels[level])]


def read_problems(source: str, args: Args, tokenizer) -> list[Problem]:
    """All problems of `source` in a seeded order, those with too long a prompt left out."""
    rng = np.random.default_rng([args.seed, 0])
    rows = list(read_rows(source, split="math" if args.task == "math" and "Skywork" in source else "train"))
    rows = stratified(rows, args.difficulty_key, rng) if args.difficulty_key else [rows[i] for i in rng.permutation(len(rows))]
    problems = []
    for index, row in enumerate(rows):
        try:
            prompt, checks = code_problem(row, source, args.max_tests) if args.task == "code" else math_problem(row, source)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise UserError(f"{source}: cannot read problem {index}: {type(error).__name__}: {error}") from None
        if args.chat_template:
            message = [{"role": "user", "content": prompt.strip()}]
            prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        prompt_ids = tokenizer(prompt, add_special_tokens=not args.chat_template)["input_ids"]
        if len(prompt_ids) <= args.max_prompt_tokens:
            name = str(row.get("query_id") or (row.get("extra_info") or {}).get("index", index))
            problems.append(Problem(name, prompt, prompt_ids, checks))
    if not problems:
        raise UserError(f"{source} has no problem with at most --max-prompt-tokens {args.max_prompt_tokens} tokens")
    return problems


def draw_problems(cursor: int, count: int, size: int, seed: int) -> list[int]:
    """Indices of the `count` problems after the first `cursor`: a new seeded order in each epoch of `size` problems."""
    orders = {}
    drawn = []
    for position in range(cursor, cursor + count):
        epoch, place = divmod(position, size)
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([seed, 1, epoch]).permutation(size)
        drawn.append(int(orders[epoch][place]))
    return drawn


# ---------------------------------------------------------------- rollout

DROP_EVERY = 32  # tokens after which finished rows leave the batch


def end_tables(tokenizer, eos_ids: set[int], vocab_size: int, column_zero: bool) -> torch.Tensor:
    """What ends a completion, as a bool table [3, V] for `is_end`: eos, and with `column_zero` text in column 0.

    Rows: the token ends it alone; it begins with text (not white space); it ends a line.
    """
    ends = torch.zeros(3, vocab_size, dtype=torch.bool)
    ends[0, sorted(eos_ids)] = True
    if column_zero:
        anchor = tokenizer.encode("a", add_special_tokens=False)[-1]  # some tokenizers strip a first token's space
        texts = tokenizer.batch_decode([[anchor, token] for token in range(len(tokenizer))])
        texts = [text[len(tokenizer.decode([anchor])) :] for text in texts]
        ends[0, : len(texts)] |= torch.tensor([bool(re.search(r"\n\S", text)) for text in texts])
        ends[1, : len(texts)] = torch.tensor([bool(text) and not text[0].isspace() for text in texts])
        ends[2, : len(texts)] = torch.tensor([text.endswith("\n") for text in texts])
    return ends


def is_end(ends: torch.Tensor, previous: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Whether the token `last` after `previous` ends a completion; any shape."""
    return ends[0][last] | (ends[1][last] & ends[2][previous])


class Sampler:
    """Draws each row's next token from noise that was drawn before, and notes the token's log-probability.

    `generate(do_sample=False)` calls `draw` as a logits processor and `ended` as a stopping criterion. So the noise
    is the run's, not a generator's; the same draws come on one rank or eight; and no second pass finds log-probs.
    """

    def __init__(self, noise: torch.Tensor, temperature: float, ends: torch.Tensor, width: int) -> None:
        self.noise, self.temperature, self.ends, self.width = noise, temperature, ends, width
        self.rows = torch.arange(len(noise), device=noise.device)  # those still in the batch
        self.logprobs = torch.zeros_like(noise)  # [B, T]

    def draw(self, input_ids, scores):
        step = min(input_ids.shape[1] - self.width, self.noise.shape[1] - 1)
        logprobs = (scores.float() / (self.temperature or 1.0)).log_softmax(-1)  # [B, V]
        if self.temperature:
            tokens = inverse_cdf(logprobs.exp(), self.noise[self.rows, step])  # [B]
        else:
            tokens = logprobs.argmax(-1)
        self.logprobs[self.rows, step] = logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        return torch.full_like(scores, -math.inf).scatter_(-1, tokens.unsqueeze(-1), 0.0)

    def ended(self, input_ids, scores):
        return is_end(self.ends, input_ids[:, -2], input_ids[:, -1])


@torch.no_grad()
def rollout(model, prompt_ids: list[list[int]], noise, temperature: float, ends, pad: int) -> list[tuple]:
    """Complete each prompt once: a list of (completion ids, their log-probabilities, whether it ended).

    noise [B, max_new_tokens]; temperature 0 is greedy. Prompts are padded on the left, so rows of similar length go
    together. Every DROP_EVERY tokens the rows that have ended leave the batch and its cache.
    """
    width, steps, device = max(map(len, prompt_ids)), noise.shape[1], model.device
    input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompt_ids], device=device)  # [B, width]
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompt_ids], device=device)
    sampler = Sampler(noise.to(device), temperature, ends, width)
    tokens = torch.zeros(noise.shape, dtype=torch.long, device=device)  # [B, T]
    previous, cache = input_ids[:, -1:], None
    while input_ids.shape[1] < width + steps and len(input_ids):
        start = input_ids.shape[1]
        out = model.generate(
            input_ids, attention_mask=mask, past_key_values=cache, do_sample=False, return_dict_in_generate=True,
            max_new_tokens=min(DROP_EVERY, width + steps - start), pad_token_id=pad,
            logits_processor=LogitsProcessorList([sampler.draw]),
            stopping_criteria=StoppingCriteriaList([sampler.ended]),
        )  # fmt: skip
        input_ids, cache = out.sequences, out.past_key_values
        tokens[sampler.rows, start - width : input_ids.shape[1] - width] = input_ids[:, start:]
        going = (~is_end(ends, input_ids[:, start - 1 : -1], input_ids[:, start:]).any(1)).nonzero().squeeze(1)
        cache.batch_select_indices(going)
        input_ids, sampler.rows = input_ids[going], sampler.rows[going]
        mask = torch.cat([mask[going], mask.new_ones(len(going), input_ids.shape[1] - start)], dim=1)
    # lengths by the first end, never by pad ids: pad may be eos, and eos belongs to the completion
    ended = is_end(ends, torch.cat([previous, tokens[:, :-1]], dim=1), tokens)  # [B, T]
    lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, steps).tolist()
    rows = zip(tokens.tolist(), sampler.logprobs.tolist(), lengths, ended.any(1).tolist())
    return [(ids[:length], logprobs[:length], end) for ids, logprobs, length, end in rows]


# ---------------------------------------------------------------- reward

PREAMBLE = "import bisect, collections, functools, heapq, itertools, math, re, string, sys\nfrom typing import *\n"


def program(checks: dict, completion: str) -> dict:
    """What `run_tests` runs: the signature, the body (up to the first line in column 0), a call if it reads stdin."""
    body = re.split(r"^(?=\S)", completion, maxsplit=1, flags=re.MULTILINE)[0]
    code = f"{PREAMBLE}{checks['signature']}\n{body}\n"
    if not checks["fn_name"]:
        return {"code": code + "main()\n", "cases": checks["cases"]}
    if checks["signature"].lstrip().startswith("class"):
        code += f"{checks['fn_name']} = Solution().{checks['fn_name']}\n"
    return {"code": code, "cases": checks["cases"], "fn_name": checks["fn_name"]}


def code_rewards(problems: list[Problem], completions: list[str], args: Args) -> list[tuple[float, str]]:
    """(1 if all tests pass else 0, the sandbox's reason). Equal programs of a group run once."""
    programs = [program(problem.checks, text) for problem, text in zip(problems, completions)]
    keys = [(problem.name, p["code"]) for problem, p in zip(problems, programs)]
    unique = dict(zip(keys, programs))
    workers = args.reward_workers or max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    verdicts = run_tests(list(unique.values()), args.reward_timeout_s, args.reward_memory_mb, workers)
    verdicts = dict(zip(unique, verdicts))
    return [(float(verdicts[key]["passed"]), verdicts[key]["reason"]) for key in keys]


def verify_lines():
    """Runs as a process of its own: one [gold, completion] per line in, one [passed, reason] per line out."""
    import json
    import sys

    from math_verify import LatexExtractionConfig, parse, verify

    boxed = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
    for line in sys.stdin:
        gold, text = json.loads(line)
        try:
            answer = parse(text, extraction_config=boxed, extraction_mode="first_match")
            right = bool(answer) and bool(verify(parse(f"${gold}$"), answer))  # gold first: verify is not symmetric
            reason = "ok" if right else "wrong answer" if answer else "no answer"
        except Exception as error:
            right, reason = False, f"error: {type(error).__name__}"
        print(json.dumps([right, reason]), flush=True)


class MathVerifier:
    """math-verify in a process that can be killed: some expressions take for ever, and its own limit is an alarm that
    works on a main thread only and not inside one long operation."""

    process = None

    def __call__(self, gold: str, text: str, timeout_s: float) -> tuple[float, str]:
        if self.process is None or self.process.poll() is not None:
            source = f"{inspect.getsource(verify_lines)}\nprint('ready', flush=True)\nverify_lines()"
            self.process = subprocess.Popen(
                [sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            self.process.stdout.readline()
        try:
            self.process.stdin.write(json.dumps([gold, text]) + "\n")
            self.process.stdin.flush()
            if select.select([self.process.stdout], [], [], timeout_s)[0]:
                right, reason = json.loads(self.process.stdout.readline())
                return float(right), reason
        except (OSError, ValueError):
            return 0.0, "error: verifier ended"
        self.process.kill()
        self.process = None
        return 0.0, "timeout"


# ---------------------------------------------------------------- advantages and loss


def group_advantages(rewards: torch.Tensor, normalize_std: bool = True, eps: float = 1e-4) -> torch.Tensor:
    """eq. (2.2): rewards [N, G] -> advantages [N, G], each compared with its group; std with ddof 1, as in TRL."""
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred / (rewards.std(dim=1, keepdim=True) + eps) if normalize_std else centred


def loss_normalizer(lengths: torch.Tensor, loss_type: str, max_length: int) -> float:
    """The denominator of a batch's loss. lengths [B]: tokens of each completion that are in the loss."""
    if loss_type == "grpo":
        return len(lengths)
    if loss_type == "dr_grpo":
        return len(lengths) * max_length
    return max(1.0, float(lengths.sum()))  # bnpo, dapo


def grpo_loss(
    logprobs, old_logprobs, ref_logprobs, advantages, mask, eps_low, eps_high, beta, loss_type, max_length, normalizer=None
) -> tuple[torch.Tensor, dict]:
    """J_GRPO of section 2, negated, and sums of its metrics over tokens.

    logprobs, old_logprobs, ref_logprobs (unused at beta 0) and mask are [B, T], advantages [B]. loss_type, as in TRL:
    grpo: mean over sequences of token means; bnpo, dapo: mean over tokens; dr_grpo: sum / (sequences x max_length).
    `normalizer` replaces this batch's own denominator by the global one, so that the losses of micro-batches and ranks
    add up to the loss of the global batch.
    """
    mask = mask.to(logprobs.dtype)
    advantages = advantages.unsqueeze(-1)  # [B, 1]
    ratio = (logprobs - old_logprobs).exp()  # [B, T]
    token_loss = -torch.min(ratio * advantages, ratio.clamp(1 - eps_low, 1 + eps_high) * advantages)
    kl = torch.zeros_like(ratio)
    if beta:
        log_ratio = ref_logprobs - logprobs
        kl = log_ratio.exp() - log_ratio - 1  # k3: unbiased, never negative
        token_loss = token_loss + beta * kl  # TRL 1.x multiplies kl by ratio here (use_bias_correction_kl); not the papers
    clipped = ((ratio < 1 - eps_low) & (advantages < 0)) | ((ratio > 1 + eps_high) & (advantages > 0))
    if normalizer is None:
        normalizer = loss_normalizer(mask.sum(-1), loss_type, max_length)
    if loss_type == "grpo":
        token_loss = token_loss / mask.sum(-1, keepdim=True).clamp(min=1)
    loss = (token_loss * mask).sum() / normalizer
    sums = {"loss": loss, "kl": (kl * mask).sum(), "clipped": (clipped * mask).sum(), "loss_tokens": mask.sum()}
    return loss, {key: value.item() for key, value in sums.items()}


# ---------------------------------------------------------------- update


@dataclass
class Sample:
    """One completion, with all that later steps add to it."""

    problem: str  # its name
    prompt_ids: list[int]
    completion_ids: list[int]
    rollout_logprobs: list[float]  # noted while sampling
    ended: bool  # False: truncated at max_new_tokens
    text: str = ""
    reward: float = 0.0
    reason: str = ""
    advantage: float = 0.0
    old_logprobs: list[float] | None = None  # of the training forward, before the first minibatch
    ref_logprobs: list[float] | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


def completion_logprobs(model, samples: list[Sample], temperature: float, entropy: bool = False) -> tuple:
    """The training forward: log-probabilities, entropies and mask of the completions' tokens, each [B, T]."""
    device = model.device
    input_ids = pad_right([s.prompt_ids + s.completion_ids for s in samples], 0, device)  # [B, L]
    starts = torch.tensor([len(s.prompt_ids) for s in samples], device=device)
    lengths = torch.tensor([len(s.completion_ids) for s in samples], device=device)
    mask = torch.arange(int(lengths.max()), device=device) < lengths.unsqueeze(1)  # from lengths, never from ids
    rows, offsets = mask.nonzero(as_tuple=True)  # [N]
    kw = {"temperature": temperature, "entropy": entropy}  # the sampled distribution, so the sampling temperature
    logprobs, entropies = token_logprobs(model, input_ids, rows, starts[rows] + offsets, **kw)
    zeros = torch.zeros(mask.shape, device=device)
    return zeros.masked_scatter(mask, logprobs), zeros.masked_scatter(mask, entropies.detach()), mask


@torch.no_grad()
def score(model, samples: list[Sample], args: Args) -> list[list[float]]:
    """Log-probabilities of the samples' tokens under `model`, as the training forward computes them."""
    scores = [[]] * len(samples)
    with gathered(model):
        for batch in micro_batches([len(s) for s in samples], args.micro_batch_tokens):
            logprobs, _, _ = completion_logprobs(model, [samples[i] for i in batch], args.temperature)
            for index, row in zip(batch, logprobs.tolist()):
                scores[index] = row[: len(samples[index].completion_ids)]
    return scores


def padded(rows: list[list[float]], device) -> torch.Tensor:
    """[B, T] float32, zero on the right."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)


def train_minibatch(model, optimizer, samples: list[Sample], normalizer: float, args: Args, ranks: Ranks):
    """One optimizer step on this rank's samples of a minibatch: (sums over this rank's tokens, gradient norm)."""
    sums = collections.Counter()
    empty = Sample("", [0, 0], [0], [0.0], ended=False)
    for batch in micro_batches([len(s) for s in samples], args.micro_batch_tokens, ranks):
        micro = [samples[i] for i in batch] or [empty]  # a rank with less work still joins FSDP's collectives
        logprobs, entropies, mask = completion_logprobs(model, micro, args.temperature, entropy=True)
        rollout_logprobs = padded([s.rollout_logprobs for s in micro], mask.device)
        old = logprobs.detach()  # one minibatch: the policy is still the one that sampled
        if args.minibatches > 1 and batch:
            old = padded([s.old_logprobs for s in micro], mask.device)
        ref = padded([s.ref_logprobs for s in micro], mask.device) if args.beta and batch else old
        counted = [bool(batch) and (s.ended or not args.filter_overlong) for s in micro]
        in_loss = mask & torch.tensor(counted, device=mask.device).unsqueeze(1)  # [B, T]
        loss, micro_sums = grpo_loss(
            logprobs, old, ref, torch.tensor([s.advantage for s in micro], device=mask.device), in_loss,
            args.eps_low, args.eps_high, args.beta, args.loss_type, args.max_new_tokens, normalizer,
        )  # fmt: skip
        (loss * ranks.world_size).backward()  # FSDP averages over ranks; the denominator is global already
        if batch:
            gap = (old - rollout_logprobs)[mask]
            micro_sums |= {"entropy": entropies[mask].sum().item(), "tokens": len(gap)}
            micro_sums |= {"rollout_ratio": gap.exp().sum().item(), "rollout_gap": gap.abs().sum().item()}
            sums.update(micro_sums)
    norm = grad_norm(model, args.max_grad_norm)
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return sums, norm


# ---------------------------------------------------------------- the loop

SUMS = ("loss", "kl", "clipped", "loss_tokens", "entropy", "tokens", "rollout_ratio", "rollout_gap")
CURVES = ("reward/mean", "eval/pass@1", "reward/groups_without_spread", "rollout/completion_tokens", "rollout/truncated",
          "policy/entropy", "optim/grad_norm", "time/rollout_s", "time/update_s")  # fmt: skip


class Rollouts:
    """Steps 1 and 2 for a list of problems: this rank's share is completed and scored, all ranks get all samples."""

    def __init__(self, model, tokenizer, args: Args, ranks: Ranks) -> None:
        self.model, self.tokenizer, self.args, self.ranks = model, tokenizer, args, ranks
        self.pad = tokenizer.pad_token_id
        self.pool = ThreadPoolExecutor(1)  # rewards of one batch while the next one generates
        self.verify = MathVerifier()
        eos_ids = {tokenizer.eos_token_id}
        try:  # chat models end their turn with another token
            more = GenerationConfig.from_pretrained(args.model).eos_token_id
            eos_ids |= set(more if isinstance(more, list) else [more]) - {None}
        except OSError:
            pass
        vocab_size = model.config.get_text_config().vocab_size
        self.ends = end_tables(tokenizer, eos_ids, vocab_size, args.task == "code").to(model.device)

    def rewards(self, problems: list[Problem], texts: list[str]) -> list[tuple[float, str]]:
        """Step 2. Never raises for what a completion does: that is a 0 with a reason."""
        if self.args.task == "code":
            return code_rewards(problems, texts, self.args)
        limit = self.args.reward_timeout_s
        return [self.verify(problem.checks["answer"], text, limit) for problem, text in zip(problems, texts)]

    def __call__(self, problems: list[Problem], noise: torch.Tensor, temperature: float) -> tuple[list[Sample], dict]:
        """One sample per problem of the global list, noise [len(problems), T]; seconds in rollout and reward."""
        start = time.time()
        mine = sorted(range(len(problems))[self.ranks.share(len(problems))], key=lambda i: len(problems[i].prompt_ids))
        samples, waiting = {}, []
        with gathered(self.model):  # whole weights on every rank: no collective while the ranks generate
            for first in range(0, len(mine), self.args.rollout_rows):
                batch = mine[first : first + self.args.rollout_rows]
                prompts = [problems[i].prompt_ids for i in batch]
                rows = rollout(self.model, prompts, noise[batch], temperature, self.ends, self.pad)
                for i, (ids, logprobs, ended) in zip(batch, rows):
                    context = problems[i].prompt_ids[-1:]  # some tokenizers strip the space of a first token
                    text = self.tokenizer.decode(context + ids, skip_special_tokens=True)
                    text = text[len(self.tokenizer.decode(context, skip_special_tokens=True)) :]
                    samples[i] = Sample(problems[i].name, problems[i].prompt_ids, ids, logprobs, ended, text)
                texts = [samples[i].text for i in batch]
                waiting.append((batch, self.pool.submit(self.rewards, [problems[i] for i in batch], texts)))
        generated = time.time()
        for batch, future in waiting:
            for i, (reward, reason) in zip(batch, future.result()):
                samples[i].reward, samples[i].reason = reward, reason
        seconds = {"time/rollout_s": generated - start, "time/reward_s": time.time() - generated}
        return all_gather_list([samples[i] for i in sorted(samples)], self.ranks), seconds


def evaluate(rollouts: Rollouts, problems: list[Problem], args: Args) -> tuple[dict, list[Sample]]:
    """Held-out pass@1, greedy and sampled at the training temperature (the same noise at every evaluation)."""
    start = time.time()
    noise = uniforms([len(problems), args.max_new_tokens], args.seed, "eval")
    greedy, _ = rollouts(problems, noise, 0.0)
    sampled, _ = rollouts(problems, noise, args.temperature)
    metrics = {
        "eval/pass@1": sum(s.reward for s in greedy) / len(greedy),
        "eval/pass@1_sampled": sum(s.reward for s in sampled) / len(sampled),
        "eval/completion_tokens": sum(len(s.completion_ids) for s in greedy) / len(greedy),
        "eval/truncated": sum(not s.ended for s in greedy) / len(greedy),
        "time/eval_s": time.time() - start,
    }
    return metrics, greedy


def sample_metrics(samples: list[Sample], args: Args) -> dict:
    """What the samples of a rollout tell by themselves; every rank holds all of them."""
    rewards = torch.tensor([s.reward for s in samples]).view(-1, args.group_size)
    reasons = collections.Counter(re.sub(r"\W+", "_", s.reason.split(":")[0].strip()) for s in samples if not s.reward)
    lengths = [len(s.completion_ids) for s in samples]
    return {
        "reward/mean": rewards.mean().item(),
        "reward/group_std": rewards.std(dim=1).mean().item(),
        f"reward/pass@{args.group_size}": (rewards.amax(1) > 0).float().mean().item(),
        "reward/groups_without_spread": (rewards.amax(1) == rewards.amin(1)).float().mean().item(),
        **{f"reward/fail_{reason}": count / len(samples) for reason, count in sorted(reasons.items())},
        "rollout/completion_tokens": sum(lengths) / len(lengths),
        "rollout/completion_tokens_max": max(lengths),
        "rollout/truncated": sum(not s.ended for s in samples) / len(samples),
        "rollout/samples": len(samples),
    }


def write_samples(run: Run, update: int, samples: list[Sample], tokenizer, count: int = 6) -> None:
    """Append the first few held-out completions, with their verdicts, to samples.md (rank 0)."""
    if run.ranks.main:
        with open(run.path / "samples.md", "a") as file:
            file.write(f"\n# after update {update}\n")
            for s in samples[:count]:
                verdict = "right" if s.reward else f"0: {s.reason}"
                prompt = tokenizer.decode(s.prompt_ids)
                file.write(f"\n## {s.problem}: {verdict}\n\n~~~~\n{prompt}|>{s.text}{'' if s.ended else ' [truncated]'}\n~~~~\n")


def plan(args: Args, ranks: Ranks, train: list[Problem], heldout: list[Problem]) -> str:
    """What --dry-run prints: sizes, memory and one prompt."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.model))
    weights = sum(p.numel() for p in model.parameters())
    rows, gib = args.prompts_per_update * args.group_size, 2**30
    held = 16 * weights / ranks.world_size + (2 * weights if ranks.device.type == "cuda" else 0)
    held += 4 * weights / ranks.world_size if args.beta else 0
    return (
        f"{args.task}: {len(train)} training and {len(heldout)} held-out problems, {ranks.world_size} ranks on "
        f"{ranks.device.type}\n{args.updates} updates x {args.prompts_per_update} prompts x {args.group_size} completions = "
        f"{args.updates * args.prompts_per_update / len(train):.1f} epochs; {rows / ranks.world_size:g} rows per rank and "
        f"update, {args.minibatches} optimizer steps each\n{weights / 1e6:.1f}M parameters; weights, gradients and AdamW: "
        f"{held / gib:.2f} GiB per rank, before activations ({args.micro_batch_tokens} tokens at once)\n"
        f"---- a prompt ({len(train[0].prompt_ids)} tokens) ----\n{train[0].prompt}---- its reward ----\n"
        f"{json.dumps(train[0].checks)[:600]}"
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
        raise UserError(f"{len(train)} training and {len(heldout)} held-out problems: lower --eval-problems")
    if args.dry_run:
        print(plan(args, ranks, train, heldout) if ranks.main else "", flush=True)
        return
    run = Run(args, __file__, ranks)
    model = load_model(args.model, ranks)
    ref_model = load_model(args.model, ranks, train=False) if args.beta else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    state = {"update": 0, "cursor": 0, "skipped": 0, "skipped_in_a_row": 0}
    if run.state:
        state = run.restore({"policy": model}, optimizer)
    rollouts = Rollouts(model, tokenizer, args, ranks)
    interrupt, begun, first = Interrupt(), time.time(), state["update"]
    if ranks.main:
        print(f"{run.path}: {len(train)} training problems, {len(heldout)} held out, from update {first}", flush=True)
    if first == 0:
        metrics, greedy = evaluate(rollouts, heldout, args)
        run.log({"update": 0, **metrics})
        write_samples(run, 0, greedy, tokenizer)
        if ranks.main:
            print(f"update 0: held-out pass@1 {metrics['eval/pass@1']:.3f}", flush=True)

    for update in range(first + 1, args.updates + 1):
        # 1 sample and 2 score: rounds of N prompts x G completions; more than one only with dynamic sampling
        samples, groups, seconds = [], [], collections.Counter()
        for attempt in range(max(1, args.dynamic_sampling)):
            drawn = draw_problems(state["cursor"], args.prompts_per_update, len(train), args.seed)
            state["cursor"] += args.prompts_per_update
            problems = [train[i] for i in drawn for _ in range(args.group_size)]  # a group's rows are neighbours
            noise = uniforms([len(problems), args.max_new_tokens], args.seed, update, attempt)
            new, new_seconds = rollouts(problems, noise, args.temperature)
            seconds.update(new_seconds)
            samples += new

            # 3 advantage
            rewards = torch.tensor([s.reward for s in new]).view(-1, args.group_size)  # [N, G]
            advantages = group_advantages(rewards, args.normalize_std)
            for sample, advantage in zip(new, advantages.flatten().tolist()):
                sample.advantage = advantage
            keep = rewards.amax(1) > rewards.amin(1) if args.dynamic_sampling else torch.ones(len(rewards))
            groups += [new[g * args.group_size : (g + 1) * args.group_size] for g in keep.nonzero().flatten().tolist()]
            if len(groups) >= args.prompts_per_update:
                break

        # 4 update: every rank takes every world_size-th row of each minibatch, by length, which balances the work
        begin = time.time()
        parts = np.array_split(np.arange(len(groups[: args.prompts_per_update])), args.minibatches)
        parts = [[s for g in part for s in groups[g]] for part in parts if len(part)]
        shares = [sorted(part, key=len, reverse=True)[ranks.rank :: ranks.world_size] for part in parts]
        mine = [s for share in shares for s in share]
        if args.minibatches > 1:  # true old log-probabilities: of the training forward, before the first step
            for sample, logprobs in zip(mine, score(model, mine, args)):
                sample.old_logprobs = logprobs
        if ref_model is not None:
            for sample, logprobs in zip(mine, score(ref_model, mine, args)):
                sample.ref_logprobs = logprobs
        sums, norms = collections.Counter(), []
        for part, share in zip(parts, shares):
            # TRL's dapo divides by the tokens of the whole rollout, the others by their own minibatch
            scope = [s for p in parts for s in p] if args.loss_type == "dapo" else part
            lengths = [len(s.completion_ids) * (s.ended or not args.filter_overlong) for s in scope]
            normalizer = loss_normalizer(torch.tensor(lengths), args.loss_type, args.max_new_tokens)
            normalizer /= len(parts) if args.loss_type == "dapo" else 1
            share_sums, norm = train_minibatch(model, optimizer, share, normalizer, args, ranks)
            sums.update(share_sums)
            norms.append(norm)
        bad = not all(map(math.isfinite, norms))
        state["skipped"] += bad
        state["skipped_in_a_row"] = state["skipped_in_a_row"] + 1 if bad else 0
        seconds["time/update_s"] = time.time() - begin

        # 5 log, evaluate, save
        sums = collections.Counter(all_sum({key: float(sums[key]) for key in SUMS}, ranks))
        tokens, loss_tokens = max(1.0, sums["tokens"]), max(1.0, sums["loss_tokens"])
        total_s = sum(seconds.values())
        metrics = {
            "update": update, **sample_metrics(samples, args), "rollout/groups_kept": len(groups),
            "policy/loss": sums["loss"] / max(1, len(parts)), "policy/entropy": sums["entropy"] / tokens,
            "policy/clip_frac": sums["clipped"] / loss_tokens, "policy/kl": sums["kl"] / loss_tokens,
            "policy/rollout_ratio": sums["rollout_ratio"] / tokens, "policy/rollout_gap": sums["rollout_gap"] / tokens,
            "optim/grad_norm": sum(norms) / max(1, len(norms)), "optim/skipped": state["skipped"],
            "data/epoch": state["cursor"] / len(train), **seconds,
            "perf/tokens_per_s": sum(map(len, samples)) / total_s,
        }  # fmt: skip
        last, interrupted = update == args.updates, interrupt.requested(ranks)
        if last or (args.eval_every and update % args.eval_every == 0):
            eval_metrics, greedy = evaluate(rollouts, heldout, args)
            metrics |= eval_metrics
            write_samples(run, update, greedy, tokenizer)
        if ranks.device.type == "cuda":
            metrics["perf/peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        run.log(metrics)
        if ranks.main:
            eta = (time.time() - begun) / (update - first) * (args.updates - update)
            held_out = f" | held-out {metrics['eval/pass@1']:.3f}" if "eval/pass@1" in metrics else ""
            print(
                f"{update}/{args.updates} reward {metrics['reward/mean']:.3f}{held_out} | "
                f"{metrics['rollout/completion_tokens']:.0f} tokens, {metrics['rollout/truncated']:.0%} truncated | "
                f"grad {metrics['optim/grad_norm']:.2f} | rollout {seconds['time/rollout_s']:.1f} reward "
                f"{seconds['time/reward_s']:.1f} update {seconds['time/update_s']:.1f} s | "
                f"{metrics['perf/tokens_per_s']:.0f} tokens/s | ETA {eta / 60:.1f} min",
                flush=True,
            )
        if state["skipped_in_a_row"] >= args.max_skipped:
            names = ", ".join(dict.fromkeys(s.problem for s in samples))
            raise UserError(f"the gradient was not finite {args.max_skipped} times in a row, last on problems {names[:500]}")
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
