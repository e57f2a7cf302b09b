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
Shapes: N problems, G completions of each, B rows, T completion tokens, L prompt tokens, V vocabulary,
K completion tokens of all rows.

Deviations from the papers, and what they leave open (docs/grpo_rlvr.md has all, with both values):
  D1 the ratio is clipped to 1 - 0.2 .. 1 + 0.28, as in the authors' scripts; the paper prints one epsilon.
  D2 the loss is a mean over all tokens of the update (`dapo`); the paper prints a mean over responses.
  D3 a function's body ends with eos or with the first token that puts text into column 0; this last token is
     trained, too. The paper does not say what stops a base model, which never stops by itself.
  D4 problems that read stdin get the signature `def main():`, so that a base model can complete them as well.

  python grpo_rlvr.py --tiny                                                # here: no network, no GPU
  python grpo_rlvr.py --model Qwen/Qwen2.5-1.5B                             # one GPU
  torchrun --nproc_per_node 8 grpo_rlvr.py --model runs/RUN/checkpoints/em_001   # the paper's setting
"""

import ast
import builtins
import html
import inspect
import itertools
import json
import math
import re
import signal
import subprocess
import sys
import threading
import time
import typing
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import tyro
from transformers import LogitsProcessorList

from common import (
    TINY, Interrupt, Ranks, Run, Sampler, Stop, UserError, all_gather_list, all_sum, cache_argument,
    check_sizes, draw_problems, eos_ids, gathered, launch, load_model, load_tokenizer, memory_plan,
    micro_batches, new_optimizer, optimizer_step, padded, prefill, rank_share, read_rows, run_tests, setup,
    token_logprobs, token_texts, uniforms, usable_cores,
)  # fmt: skip


@dataclass
class Args:
    """GRPO with verifiable rewards. Defaults are RA3's values, those of --task math RMT's.

    The flags come in groups: run, model and data (from --model on), rollout (from --prompts-per-update), algorithm
    (from --loss-type), optimisation (from --updates), evaluation and saving (from --eval-every).
    """

    # ---- run
    task: Literal["code", "math"] = "code"
    """code: RA3's RLVR, reward by running tests; math: RMT's post-training, reward by comparing answers"""
    tiny: bool = False
    """the bundled toy model and problems: minutes on two cores. It only changes defaults; flags still override"""
    output_dir: str = ""
    """folder of this run; empty: runs/grpo_rlvr_<task>__<model>__s<seed>__<time>"""
    seed: int = 0
    """fixes the order of the problems, the choice of those held out, and all sampling noise, on any number of ranks"""
    resume: str = ""
    """`auto`: continue the newest run of this task, model and seed (or --output-dir), if any; or a run folder"""
    dry_run: bool = False
    """load and check everything, print the plan, a prompt and a memory estimate, then stop"""
    track: bool = False
    """send metrics and curves to Weights & Biases as well (needs `pip install wandb`)"""
    # ---- model and data
    model: str = "Qwen/Qwen2.5-1.5B"
    """the initial policy: any causal LM that AutoModelForCausalLM loads, a hub id or a folder"""
    dataset: str = "inclusionAI/AReaL-boba-2-RL-Code:train/train.jsonl"
    """hub id, file or folder with the columns of AReaL-boba-2, DeepCoder or Skywork (more: read_rows in common.py)"""
    eval_dataset: str = ""
    """held-out problems, also the rows of HumanEval(+) or MBPP(+); empty: --eval-problems of --dataset"""
    train_problems: int = 0
    """number of training problems, at most; 0: all"""
    eval_problems: int = 128
    """number of held-out problems, at most; --seed chooses them"""
    max_prompt_tokens: int = 2048
    """problems with a longer prompt are left out (tokens)"""
    difficulty_key: str = ""
    """math: a key of Skywork's `model_difficulty`: problems of levels 1-13 only, one of each in turn; empty: all"""
    chat_template: bool = False
    """math: put the problem into the tokenizer's chat template, for a model that was trained with it"""
    # ---- rollout
    prompts_per_update: int = 128
    """N, problems per update, over all ranks"""
    group_size: int = 4
    """G, completions of each problem"""
    max_new_tokens: int = 1024
    """completions are truncated here (tokens)"""
    temperature: float = 0.6
    """of sampling, and so of every log-probability"""
    rollout_rows: int = 256
    """completions that one rank generates at once; memory and speed only"""
    reward_timeout_s: float = 6.0
    """limit for one test of a program, or for one comparison of answers (seconds)"""
    # ---- algorithm
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "dapo"
    """how the loss is averaged, with TRL's names (grpo_loss explains them); dapo: over all tokens of the update"""
    eps_low: float = 0.2
    """the ratio is clipped below 1 - eps_low"""
    eps_high: float = 0.28
    """the ratio is clipped above 1 + eps_high (the paper: one epsilon)"""
    beta: float = 0.0
    """weight of the KL to the initial policy, which is loaded only if this is positive"""
    normalize_std: bool = True
    """divide advantages by the group's standard deviation, eq. (2.2); off: Dr. GRPO"""
    filter_overlong: bool = False
    """leave truncated completions out of the loss (DAPO, DeepCoder)"""
    dynamic_sampling: int = 0
    """groups with equal rewards are dropped and replaced, in at most so many rounds of sampling; 0: all groups stay"""
    minibatches: int = 2
    """optimizer steps per update; with 1 the ratio is exactly 1"""
    # ---- optimisation
    updates: int = 300
    """number of updates, each with a rollout of its own"""
    learning_rate: float = 1e-6
    """of AdamW, constant"""
    weight_decay: float = 0.01
    """of AdamW"""
    max_grad_norm: float = 1.0
    """the global gradient is clipped to this norm"""
    micro_batch_tokens: int = 16384
    """tokens per forward pass on each rank, a shared prompt counted once; memory and speed only"""
    gradient_checkpointing: bool = False
    """compute activations again in the backward pass: much less memory, up to a third more time"""
    # ---- evaluation and saving
    eval_every: int = 10
    """updates between evaluations; 0: only before the first and after the last"""
    save_every: int = 50
    """updates between checkpoints; 0: only after the last. All models stay, and the two newest states for --resume"""


MATH = {  # RMT, sections 5.1 and 5.3: 10 epochs of 4096 problems, 128 at a time
    "task": "math", "model": "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B", "chat_template": True,
    "dataset": "Skywork/Skywork-OR1-RL-Data", "difficulty_key": "DeepSeek-R1-Distill-Qwen-7B",
    "train_problems": 4096, "eval_problems": 600, "group_size": 8, "max_new_tokens": 4096, "temperature": 1.0,
    "eps_high": 0.2, "minibatches": 1, "updates": 320, "gradient_checkpointing": True, "rollout_rows": 16,
}  # fmt: skip
TINY_CODE = {  # for a model of a million parameters
    "tiny": True, "prompts_per_update": 16, "group_size": 8, "max_new_tokens": 64, "temperature": 1.0,
    "reward_timeout_s": 2.0, "minibatches": 1, "updates": 30, "learning_rate": 1e-4,
    "micro_batch_tokens": 2048, "save_every": 0, "model": f"{TINY}/code/model",
    "dataset": f"{TINY}/code/rl_train.jsonl", "eval_dataset": f"{TINY}/code/test.jsonl",
}  # fmt: skip
TINY_MATH = TINY_CODE | {
    "task": "math", "model": f"{TINY}/text/model", "dataset": f"{TINY}/text/math_train.jsonl",
    "eval_dataset": f"{TINY}/text/math_test.jsonl", "eps_high": 0.2, "max_new_tokens": 128, "updates": 20,
}  # fmt: skip


def parse_args() -> Args:
    """tyro's command line over the defaults that --task and --tiny choose."""
    tiny = "--tiny" in sys.argv
    if re.search(r"--task[ =]math\b", " ".join(sys.argv)):
        defaults = TINY_MATH if tiny else MATH
    else:
        defaults = TINY_CODE if tiny else {}
    return tyro.cli(Args, default=Args(**defaults))


def check(args: Args) -> None:
    """UserError for values that do not fit together."""
    if args.group_size < 2:
        raise UserError("--group-size must be at least 2: advantages compare completions of one prompt")
    positive = "eval_problems max_prompt_tokens prompts_per_update max_new_tokens temperature rollout_rows"
    positive += " reward_timeout_s minibatches max_grad_norm micro_batch_tokens"
    not_negative = "train_problems eps_low eps_high beta dynamic_sampling updates learning_rate weight_decay"
    check_sizes(args, positive, f"{not_negative} eval_every save_every")
    if args.chat_template and args.task == "code":
        raise UserError("--chat-template is for --task math; a code problem is completed from its signature")


# ---------------------------------------------------------------- prompts and problems

# the format: a base model completes code from the signature (RA3, section 7); math ends with a boxed answer
CODE_PROMPT = '"""\n{question}\n"""\n{signature}\n'
STDIN_SIGNATURE = "def main():"  # D4
MATH_PROMPT = "{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}.\n"
PREAMBLE = "import bisect, collections, functools, heapq, itertools, math, re, sys\nfrom typing import *\n"
PREAMBLE += "sys.setrecursionlimit(50000)\n"  # before every program
NAMES = {*dir(builtins), *typing.__all__, *re.findall(r"\w+", PREAMBLE)}  # what a signature may refer to
MAX_TESTS = 15  # of a problem: those with the longest inputs, DeepCoder's rule
LEVELS = range(1, 14)  # of Skywork's model_difficulty (RMT, 5.1)


@dataclass
class Problem:
    name: str
    prompt: str
    prompt_ids: list[int]
    checks: dict  # code: signature, and cases and fn_name, or tests and entry_point; math: answer
    level: int = 0  # Skywork's difficulty


def need(value, what: str):
    """The value; ValueError if it is empty."""
    if value in (None, "", [], {}):
        raise ValueError(f"no {what}")
    return value


def parsed(value):
    """The value of a column that may hold JSON in a string; {} if it is empty."""
    return (json.loads(value) if isinstance(value, str) and value else value) or {}


def math_problem(row: dict) -> tuple[str, dict]:
    """(prompt, checks) of a row with Skywork-OR1's columns, whose answers may be JSON lists."""
    if row.get("ability") == "code":  # Skywork's folder holds both
        raise ValueError("code, not math")
    message = need(row.get("prompt"), "prompt")
    question = message if isinstance(message, str) else message[-1]["content"]
    answer = need((row.get("reward_model") or {}).get("ground_truth"), "answer")
    answer = json.loads(answer)[0] if str(answer).startswith('["') else answer
    return MATH_PROMPT.format(question=need(question, "question")), {"answer": str(need(answer, "answer"))}


def code_problem(row: dict) -> tuple[str, dict]:
    """(prompt, checks) of a row of HumanEval(+), of MBPP(+), or of AReaL-boba-2 and DeepCoder."""
    if row.get("entry_point") and row.get("test"):  # HumanEval: the prompt is code
        tests, signature = f"{row['test']}\ncheck({row['entry_point']})\n", row["prompt"].rstrip()
        return f"{signature}\n", {"signature": signature, "tests": tests, "entry_point": row["entry_point"]}
    if row.get("code") and row.get("test_list"):  # MBPP: the description, two examples, the signature
        question, examples = row.get("text") or row["prompt"], row["test_list"]
        called = [(signature_of(row["code"], name), name) for name in re.findall(r"\w+", examples[0])]
        signature, name = [pair for pair in called if pair[0]][0]
        setup = [*(row.get("test_imports") or []), row.get("test_setup_code") or ""]
        tests = row.get("test") or "\n".join([*setup, *examples])
        prompt = CODE_PROMPT.format(question="\n".join([question, *examples[:2]]), signature=signature)
        return prompt, {"signature": signature, "tests": tests, "entry_point": name}

    question = need(row.get("question") or row.get("problem"), "question")
    tests = need(parsed(row.get("input_output") or row.get("tests")), "tests")
    if isinstance(tests, list):  # DeepCoder's PrimeIntellect, LiveCodeBench and Codeforces
        about = tests[0] | parsed(tests[0].get("metadata"))
        pairs = [(test["input"], test["output"]) for test in tests]
    else:  # boba-2, and DeepCoder's TACO
        about, pairs = tests, zip(tests["inputs"], tests["outputs"], strict=True)
    cases = need([{"input": given, "output": wanted} for given, wanted in pairs], "tests")
    if any(None in case.values() for case in cases):
        raise ValueError("a test without input or output")
    names = [part.get(key) for part in (about, parsed(row.get("metadata"))) for key in ("fn_name", "func_name")]
    fn_name = None if about.get("testtype") == "stdin" else next(filter(None, names), None)
    if not about.get("testtype"):  # LiveCodeBench's tests all stay
        cases = sorted(cases, key=lambda case: len(str(case["input"])), reverse=True)[:MAX_TESTS]
    if fn_name and all(isinstance(case["output"], list) and len(case["output"]) == 1 for case in cases):
        cases = [{**case, "output": case["output"][0]} for case in cases]  # TACO puts a result into a list
    signature = row.get("signature") or row.get("starter_code")
    signature = signature or signature_for(fn_name, row.get("solutions"), cases[0])
    checks = {"signature": signature.rstrip(), "cases": cases, "fn_name": fn_name}
    return CODE_PROMPT.format(question=question, **checks), checks


def signature_for(fn_name: str | None, solutions: str | list | None, case: dict) -> str:
    """The signature of the first solution that has one, else fn_name(arg1, arg2 ...). No fn_name: reads stdin."""
    if not fn_name:
        return STDIN_SIGNATURE
    for solution in [solutions] if isinstance(solutions, str) else solutions or []:
        if signature := signature_of(solution, fn_name):
            return signature
    count = len(case["input"].splitlines() if isinstance(case["input"], str) else case["input"])
    return f"def {fn_name}({', '.join(f'arg{i + 1}' for i in range(count))}):"


def signature_of(source: str, name: str) -> str | None:
    """`def name(...):` in one line as the source has it, without self.

    None if the source has no such function, or if its arguments use names that are not in NAMES.
    """
    try:
        nodes = list(ast.walk(ast.parse(re.sub(r"(?m)^```.*", "", source))))  # PrimeIntellect's have a fence
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError):
        return None
    for node in nodes:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            for arguments in (node.args.posonlyargs, node.args.args):
                arguments[:] = [argument for argument in arguments if argument.arg != "self"]
            used = {part.id for part in ast.walk(node.args) if isinstance(part, ast.Name)}
            return f"def {name}({ast.unparse(node.args)}):" if used <= NAMES else None
    return None


def read_problem(row: dict, number: int, args: Args, tokenizer) -> Problem:
    """The problem of a row. ValueError with the reason if it is not to be used; other errors if it is malformed."""
    prompt, checks = code_problem(row) if args.task == "code" else math_problem(row)
    info, level = row.get("extra_info") or {}, 0
    if args.difficulty_key:
        level = (info.get("model_difficulty") or {}).get(args.difficulty_key)
        if int(need(level, f"difficulty `{args.difficulty_key}`")) not in LEVELS:
            raise ValueError(f"difficulty outside {LEVELS[0]}-{LEVELS[-1]}")
    if args.chat_template:
        message = [{"role": "user", "content": prompt.strip()}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=not args.chat_template)["input_ids"]
    if ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token):
        ids = ids[:-1]  # some tokenizers append it, but the completion goes on from here
    if len(ids) > args.max_prompt_tokens:
        raise ValueError(f"longer than --max-prompt-tokens {args.max_prompt_tokens}")
    names = row.get("query_id"), row.get("task_id"), info.get("index"), number
    name = str(next(name for name in names if name is not None))
    return Problem(name, prompt, ids, {**checks, "timeout_s": args.reward_timeout_s}, int(level))


def read_problems(source: str, args: Args, tokenizer, split: str = "train") -> tuple[list[Problem], str]:
    """The problems of `source` in an order fixed by the seed, and a note that counts the rows left out.

    UserError if no problem is left, or if more than half of the rows are of no use (and no option leaves them out).
    """
    warnings.simplefilter("ignore", SyntaxWarning)  # a `\d` in a solution
    problems, left_out, row, number = [], Counter(), {}, 0
    for number, row in enumerate(read_rows(source, "math" if "Skywork" in source else split), start=1):
        try:
            problems.append(read_problem(row, number, args, tokenizer))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            left_out[str(error) if type(error) is ValueError else f"malformed ({type(error).__name__})"] += 1
    reasons = ", ".join(f"{n} {reason}" for reason, n in left_out.most_common(6))
    unusable = sum(n for reason, n in left_out.items() if not reason.startswith(("difficulty outside", "longer than")))
    if not problems or 2 * unusable > number:
        columns, words = ", ".join(row) if isinstance(row, dict) else type(row).__name__, "rows cannot be used"
        raise UserError(f"{source}: {left_out.total()} of {number} {words} ({reasons}); columns: {columns}")
    problems = [problems[i] for i in np.random.default_rng([args.seed, 0]).permutation(len(problems))]
    if args.difficulty_key:  # one problem of each level in turn: the first n are even over the levels
        levels = [[problem for problem in problems if problem.level == level] for level in LEVELS]
        problems = [problem for turn in itertools.zip_longest(*levels) for problem in turn if problem]
    return problems, f"; left out: {reasons}" * bool(reasons)


# ---------------------------------------------------------------- 1 sample

CHUNK = 16  # tokens of one call of generate; then the rows that have ended leave the batch


@dataclass
class Sample:
    """One completion and all that the steps find out about it. Every rank holds all samples of an update."""

    prompt_ids: list[int]
    completion_ids: list[int]
    rollout_logprobs: list[float]  # noted while sampling
    ended: bool = False  # else truncated
    in_loss: bool = False
    text: str = ""
    reward: float = 0.0
    passed: bool = False
    reason: str = ""
    advantage: float = 0.0
    old_logprobs: list[float] | None = None  # by the training forward, before the first minibatch

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


def end_table(tokenizer, eos: set[int], vocab_size: int, column_zero: bool) -> torch.Tensor:
    """What is_end needs to know about each token: bool [3, V]. With `column_zero`, text in column 0 ends a
    completion, too (D3)."""
    texts = token_texts(tokenizer, vocab_size) if column_zero else [""] * vocab_size
    alone = [token in eos or bool(re.search(r"\n\S", text)) for token, text in enumerate(texts)]
    begins_text = [bool(re.match(r"\S", text)) for text in texts]
    ends_line = [text.endswith("\n") for text in texts]
    return torch.tensor([alone, begins_text, ends_line])


def is_end(table: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Which tokens end a completion: bool [B, T] of tokens [B, 1 + T], whose first is the prompt's last."""
    alone, begins_text, ends_line = table[:, tokens]  # [B, 1 + T] each; alone: the token ends it by itself
    return alone[:, 1:] | (begins_text[:, 1:] & ends_line[:, :-1])


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


def reward(problem: Problem, completion: str) -> tuple[float, bool, str]:
    """(reward, right, why). The reward trains; pass@1 and the metrics count `right`, so a fork changes only the
    reward. Runs in a thread. Whatever a completion does, the worst is a 0."""
    if "answer" in problem.checks:
        passed, reason = verify(problem.checks["answer"], completion, problem.checks["timeout_s"])
    else:
        (verdict,) = run_tests([program(problem, completion)], workers=1)
        passed, reason = verdict["passed"], verdict["reason"]
    return float(passed), passed, reason


def program(problem: Problem, completion: str) -> dict:
    """What the sandbox runs: the signature, and the completion up to its first text in column 0."""
    body = re.split(r"^(?=\S)", completion, maxsplit=1, flags=re.MULTILINE)[0]
    reads_stdin = "cases" in problem.checks and not problem.checks["fn_name"]
    code = f"{PREAMBLE}{problem.checks['signature']}\n{body}\n" + "main()\n" * reads_stdin
    return {**problem.checks, "code": code}


def verify_lines():
    """The verifier's process: reads [gold, completion, seconds] and writes [right, reason], a JSON line each."""
    from math_verify import LatexExtractionConfig, parse, verify

    boxed = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]

    def latex(text):  # for the signs that math-verify does not read itself
        text = re.sub(r"√\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+|\w))", r"\\sqrt{\1\2\3}", text)
        return text.replace("∞", "\\infty ").replace("·", "\\cdot ")

    def compare(gold, text):
        last_box = text[text.rfind("\\boxed") :]  # math-verify would make a set of several
        answer = parse(latex(last_box), extraction_config=boxed, parsing_timeout=None)
        gold = parse(f"${latex(gold)}$", parsing_timeout=None)
        right = bool(gold and answer) and verify(gold, answer, timeout_seconds=None)  # not symmetric
        return bool(right), "right" if right else "wrong answer" if answer else "no answer"

    compare("1", "\\boxed{1}")  # the first call is slow
    for line in sys.stdin:
        gold, text, timeout_s = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, timeout_s)  # then SIGALRM kills this process
        try:
            verdict = compare(gold, text)
        except Exception as error:
            verdict = False, f"error: {type(error).__name__}"
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(verdict), flush=True)


# read now, because this file may be edited during a run
VERIFIER = f"import json, re, signal, sys\n\n{inspect.getsource(verify_lines)}\nverify_lines()"


class MathVerifier:
    """math-verify in a process of its own, which SIGALRM kills when an expression takes for ever. (math-verify's
    own time limit needs the main thread, and waits for the end of an operation on big numbers.)"""

    def __init__(self) -> None:
        self.process, self.lock = None, threading.Lock()

    def __call__(self, gold: str, completion: str, timeout_s: float) -> tuple[bool, str]:
        """(whether the last \\boxed{} of the completion is the answer, why)."""
        with self.lock:
            for _ in range(2):  # if the machine killed the process, that is no verdict: once more
                if self.process is None or self.process.returncode is not None:
                    # a session of its own, which Ctrl-C in the terminal does not reach
                    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
                    options = {"encoding": "utf-8", "start_new_session": True}
                    self.process = subprocess.Popen([sys.executable, "-c", VERIFIER], **pipes, **options)
                try:
                    self.process.stdin.write(json.dumps([gold, completion, timeout_s]) + "\n")
                    self.process.stdin.flush()
                    return tuple(json.loads(self.process.stdout.readline()))
                except (OSError, ValueError):  # a closed pipe, an empty line: the process has ended
                    status = self.process.wait()
                if status == -signal.SIGALRM:
                    return False, "timeout"
                if status > 0:
                    raise UserError("math-verify does not start: pip install -r requirements.txt")
        return False, "error: the verifier ended"


verify = MathVerifier()


class Rollouts:
    """Steps 1 and 2 on all problems: each rank completes and scores its share, and gets all samples."""

    def __init__(self, model, tokenizer, args: Args, ranks: Ranks) -> None:
        self.model, self.tokenizer, self.args, self.ranks = model, tokenizer, args, ranks
        self.pool = ThreadPoolExecutor(usable_cores())  # what scores completions
        vocab_size, ends = model.config.get_text_config().vocab_size, eos_ids(tokenizer, args.model)
        self.table = end_table(tokenizer, ends, vocab_size, args.task == "code").to(model.device)

    def __call__(self, problems: list[Problem], noise: torch.Tensor, temperature: float, stop: Callable):
        """(a Sample for every entry of the global list `problems`, seconds); noise [len(problems), T].

        stop: called between batches, by every rank equally often; it may raise Stop.
        """
        start, samples, scores = time.time(), {}, {}
        share = range(len(problems))[self.ranks.share(len(problems))]
        mine = sorted(share, key=lambda i: len(problems[i].prompt_ids))
        most = -(-len(problems) // self.ranks.world_size)  # the largest share of a rank
        with gathered(self.model):
            for first in range(0, most, self.args.rollout_rows):
                stop()
                batch = mine[first : first + self.args.rollout_rows]
                prompt_ids = [problems[i].prompt_ids for i in batch]
                rows = rollout(self.model, prompt_ids, noise[batch], temperature, self.table) if batch else []
                for i, (ids, logprobs, ended) in zip(batch, rows):
                    last = problems[i].prompt_ids[-1:]  # some tokenizers strip the space of a first token
                    whole, before = self.tokenizer.batch_decode([last + ids, last], skip_special_tokens=True)
                    text, in_loss = whole[len(before) :], ended or not self.args.filter_overlong
                    samples[i] = Sample(problems[i].prompt_ids, ids, logprobs, ended, in_loss, text)
                    key = id(problems[i]), text  # scored while the next batch generates, equal ones once
                    scores[key] = scores.get(key) or self.pool.submit(reward, problems[i], text)
        generated = time.time()
        stop()
        for i in share:
            s = samples[i]
            trains, passed, s.reason = scores[id(problems[i]), s.text].result()
            s.reward, s.passed = float(trains), bool(passed)  # a fork may count with integers
        everyone = all_gather_list([samples[i] for i in share], self.ranks)  # waits for all ranks
        seconds = Counter({"time/rollout_s": generated - start, "time/reward_s": time.time() - generated})
        return everyone, seconds


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


@torch.no_grad()
def note_old_logprobs(model, samples: list[Sample], args: Args) -> None:
    """Set old_logprobs: the samples' log-probabilities under `model`, by the training forward."""
    with gathered(model):
        for batch in sample_batches(model, samples, args.micro_batch_tokens):
            logprobs, _, _ = completion_logprobs(model, [samples[i] for i in batch], args.temperature)
            for i, row in zip(batch, logprobs.tolist()):
                samples[i].old_logprobs = row[: len(samples[i].completion_ids)]


def train_minibatch(model, optimizer, samples, normalizer: float, args: Args, ranks: Ranks, stop, ref_model=None):
    """One optimizer step on this rank's samples of a minibatch: (sums over their tokens, gradient norm).

    stop: called before each micro-batch; it may raise Stop.
    """
    nothing, ref, sums = Sample([0, 0], [0], [0.0], old_logprobs=[0.0]), None, Counter()
    for batch in sample_batches(model, samples, args.micro_batch_tokens, ranks):
        stop()
        micro = [samples[i] for i in batch] or [nothing]  # a rank without work still joins the collectives
        logprobs, entropies, mask = completion_logprobs(model, micro, args.temperature, entropy=True)
        if args.beta:
            with torch.no_grad():
                ref, _, _ = completion_logprobs(ref_model, micro, args.temperature)
        device = mask.device
        mask = mask & torch.tensor([s.in_loss for s in micro], device=device).unsqueeze(1)
        advantages = torch.tensor([s.advantage for s in micro], device=device)
        # with one minibatch the policy is still the one that sampled, and the ratio is exactly 1
        old = padded([s.old_logprobs for s in micro], device) if args.minibatches > 1 else logprobs.detach()
        loss, micro_sums = grpo_loss(
            logprobs, old, ref, advantages, mask,
            args.eps_low, args.eps_high, args.beta, args.loss_type, args.max_new_tokens, normalizer,
        )  # fmt: skip
        (loss * ranks.world_size).backward()  # FSDP averages over ranks; the denominator is global already
        gap = (old - padded([s.rollout_logprobs for s in micro], device))[mask]
        sums.update(micro_sums, entropy=entropies[mask].sum().item())
        sums.update(rollout_ratio=gap.exp().sum().item(), rollout_gap=gap.abs().sum().item())
    return sums, optimizer_step(model, optimizer, float(sums["loss"]), args.max_grad_norm, ranks)


def learn(model, ref_model, optimizer, groups: list[list[Sample]], args: Args, ranks: Ranks, stop: Callable) -> dict:
    """Step 4: the metrics of the optimizer steps on the groups, one step for each minibatch of them."""
    size = max(1, -(-len(groups) // args.minibatches))
    minibatches = [groups[i : i + size] for i in range(0, len(groups), size)]
    shares = [rank_share(minibatch, ranks) for minibatch in minibatches]
    if args.minibatches > 1:  # true old log-probabilities, before the first of several steps
        note_old_logprobs(model, [sample for share in shares for sample in share], args)
    sums, norms = Counter(), []
    for minibatch, share in zip(minibatches, shares):
        # global denominators. dapo's is that of the whole rollout over the number of steps, as in TRL
        counted, steps = (groups, len(minibatches)) if args.loss_type == "dapo" else (minibatch, 1)
        lengths = torch.tensor([len(s.completion_ids) * s.in_loss for group in counted for s in group])
        normalizer = loss_normalizer(lengths, args.loss_type, args.max_new_tokens) / steps
        may_stop = (lambda: None) if norms else stop  # after the first step, the update is finished
        share_sums, norm = train_minibatch(model, optimizer, share, normalizer, args, ranks, may_stop, ref_model)
        sums.update(share_sums)
        norms.append(norm)
    sums = all_sum({key: float(sums[key]) for key in SUMS if key != "kl" or args.beta}, ranks)
    loss, tokens = sums.pop("loss"), sums.pop("tokens")
    return {
        "policy/loss": loss / max(1, len(norms)),
        **{f"policy/{key}": value / tokens for key, value in sums.items() if tokens},
        "optim/grad_norm": sum(norms) / max(1, len(norms)),
    }


# ---------------------------------------------------------------- 5 log, evaluate, save

PANELS = (  # title, metrics, x axis
    ("Reward, mean of an update", {"reward/mean": ""}, "update"),
    ("Reward against time", {"reward/mean": ""}, "time/wall_s"),
    ("Held-out pass@1", {"eval/pass@1": "greedy", "eval/pass@1_sampled": "sampled"}, "update"),
    ("Share of groups without spread", {"reward/groups_without_spread": ""}, "update"),
    ("Tokens of a completion", {"rollout/completion_tokens": ""}, "update"),
    ("Share of truncated completions", {"rollout/truncated": ""}, "update"),
    ("Entropy per token (nats)", {"policy/entropy": ""}, "update"),
    ("Gradient norm before clipping", {"optim/grad_norm": ""}, "update"),
)
CONSOLE = (
    "reward {reward/mean:.3f}", "{rollout/completion_tokens:4.0f} tokens, {rollout/truncated:4.0%} cut",
    "entropy {policy/entropy:.2f} grad {optim/grad_norm:5.2f}",
    "{time/rollout_s:.1f} + {time/reward_s:.1f} + {time/update_s:.1f} s", "{perf/tokens_per_s:5.0f} tok/s",
    "held-out {eval/pass@1:.3f}",
)  # fmt: skip
HINTS = {  # said once, if the metric is 1
    "reward/groups_without_spread": "no group has different rewards, so nothing can be learnt: the problems are too "
    "hard (metrics reward/fail_* say why) or too easy; see also --dynamic-sampling",
    "rollout/truncated": "no completion has ended: raise --max-new-tokens, or the model does not know when to stop",
}


def sample_metrics(samples: list[Sample], group_size: int) -> dict:
    """Metrics of an update that need its samples alone."""
    rewards = torch.tensor([s.reward for s in samples]).view(-1, group_size)  # [N, G]
    passed = torch.tensor([float(s.passed) for s in samples]).view(-1, group_size)
    lengths = [len(s.completion_ids) for s in samples]
    reasons = Counter(re.sub(r"\W+", "_", s.reason.split(":")[0]) for s in samples if not s.passed)
    return {
        "reward/mean": rewards.mean().item(),
        "reward/passed": passed.mean().item(),
        "reward/group_std": rewards.std(dim=1).mean().item(),
        "reward/solved_groups": passed.amax(1).mean().item(),
        "reward/groups_without_spread": (rewards.amax(1) == rewards.amin(1)).float().mean().item(),
        "rollout/completion_tokens": sum(lengths) / len(samples),
        "rollout/completion_tokens_max": max(lengths),
        "rollout/truncated": sum(not s.ended for s in samples) / len(samples),
    } | {f"reward/fail_{reason}": count / len(samples) for reason, count in sorted(reasons.items())}


def evaluate(rollouts: Rollouts, problems: list[Problem], args: Args, run: Run, update: int, stop: Callable):
    """Held-out pass@1, greedy and sampled (with the same noise every time): (metrics, the greedy samples)."""
    start = time.time()
    noise = uniforms([len(problems), args.max_new_tokens], args.seed, "evaluation")
    greedy, _ = rollouts(problems, noise, 0.0, stop)
    sampled, _ = rollouts(problems, noise, args.temperature, stop)
    legend = "The first held-out problems, greedy completions. Thoughts and comments are in colour."
    run.samples(f"update {update}", legend, [*map(block, problems[:6], greedy)])
    return {
        "eval/pass@1": sum(s.passed for s in greedy) / len(greedy),
        "eval/pass@1_sampled": sum(s.passed for s in sampled) / len(sampled),
        "eval/completion_tokens": sum(len(s.completion_ids) for s in greedy) / len(greedy),
        "time/eval_s": time.time() - start,
    }, greedy


def block(problem: Problem, sample: Sample) -> str:
    """A sample as HTML: problem, verdict and reason, prompt, completion."""
    text = html.escape(sample.text, quote=False)
    text = re.sub(r"(?s)&lt;think&gt;.*?(&lt;/think&gt;|\Z)|#[^\n]*", r'<span class="thought">\g<0></span>', text)
    kind, verdict = ("good", "right") if sample.passed else ("bad", "wrong")
    reason = f"{sample.reason}, reward {sample.reward:g}" + ", truncated" * (not sample.ended)
    return (
        f'<h3>{html.escape(problem.name)}: <span class="{kind}">{verdict}</span> ({html.escape(reason)})</h3>\n'
        f'<pre><span class="note">{html.escape(problem.prompt)}</span>{text}</pre>'
    )


def report(run: Run, problems: list[Problem], before: dict, metrics: dict, samples: list[Sample]) -> str:
    """The end of a run: pass@1 before and after, a right completion and a wrong one, and where to look."""
    lines = [f"\n{'held-out problems: ' + str(len(problems)):24} {'before':>8} {'after':>8}"]
    for key in ("eval/pass@1", "eval/pass@1_sampled", "eval/completion_tokens"):
        lines.append(f"{key:24} {before[key]:8.3f} {metrics[key]:8.3f}")
    for passed in (True, False):
        for problem, sample in [pair for pair in zip(problems, samples) if pair[1].passed == passed][:1]:
            lines.append(f"\nproblem {problem.name}: {sample.reason}")
            for text in (problem.prompt, sample.text):  # the first lines
                lines += [f"    {line[:100]}" for line in text.strip("\n").splitlines()[:8]]
    return "\n".join([*lines, f"\nsamples {run.path}/samples.html, curves {run.path}/curves.png"])


# ---------------------------------------------------------------- main


def plan(args: Args, ranks: Ranks, train: list[Problem], longest: int) -> str:
    """What --dry-run prints: sizes, memory, and one problem."""
    reference = (2 if ranks.device.type == "cuda" else 4) * bool(args.beta)  # its bytes per parameter
    rollout, recompute = (args.rollout_rows, longest), args.gradient_checkpointing
    memory = memory_plan(args.model, ranks, rollout, args.micro_batch_tokens, recompute, reference)
    return (
        f"{args.updates} updates of {args.prompts_per_update} prompts x {args.group_size} completions in "
        f"{args.minibatches} minibatches: {args.updates * args.prompts_per_update / len(train):.1f} epochs\n"
        f"{memory}\n\n{train[0].prompt}\nchecks: {json.dumps(train[0].checks)[:800]}"
    )


def load_problems(args: Args, tokenizer) -> tuple[list[Problem], list[Problem], str]:
    """(training problems, held-out problems, a line about them)."""
    train, note = read_problems(args.dataset, args, tokenizer)
    if args.eval_dataset:
        split = "test" if re.search("humaneval|mbpp", args.eval_dataset, re.I) else "train"
        heldout, more = read_problems(args.eval_dataset, replace(args, difficulty_key=""), tokenizer, split)
        note += f"\nheld-out problems{more}" * bool(more)
        heldout = heldout[: args.eval_problems]
    else:
        heldout, train = train[: args.eval_problems], train[args.eval_problems :]
    train = train[: args.train_problems or None]
    if not train:
        raise UserError(f"no training problem is left: lower --eval-problems, now {args.eval_problems}")
    return train, heldout, f"data {args.dataset}: {len(train)} training, {len(heldout)} held-out problems{note}"


def main(args: Args) -> None:
    check(args)
    ranks = setup(args.seed)
    tokenizer = load_tokenizer(args.model)
    train, heldout, about = load_problems(args, tokenizer)
    reward(heldout[0], "")  # refuses here if the verifier does not start
    longest = max(len(problem.prompt_ids) for problem in train + heldout) + args.max_new_tokens
    model = load_model(args.model, tokenizer, ranks, longest, recompute=args.gradient_checkpointing)
    if ranks.main:
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"model {args.model}: {millions:.1f}M parameters\n{about}", flush=True)
    if args.dry_run:
        if ranks.main:
            print(plan(args, ranks, train, longest), flush=True)
        return
    run = Run(args, __file__, ranks, data=list(filter(None, (args.dataset, args.eval_dataset))))
    ref_model = load_model(args.model, tokenizer, ranks, longest, train=False) if args.beta else None
    optimizer = new_optimizer(model, args.learning_rate, args.weight_decay)
    rollouts, models = Rollouts(model, tokenizer, args, ranks), {"policy": model}
    state = run.restore(models, optimizer) if run.state else {"update": 0, "cursor": 0, "before": None}
    interrupt, hints, after = Interrupt(ranks), dict(HINTS), None
    try:
        if state["before"] is None:
            state["before"], _ = evaluate(rollouts, heldout, args, run, 0, interrupt.check)
            run.log({"update": 0, **state["before"]}, CONSOLE, args.updates)
        for update in range(state["update"] + 1, args.updates + 1):
            samples, groups, seconds, cursor = [], [], Counter(), state["cursor"]
            for attempt in range(max(1, args.dynamic_sampling)):
                # 1 sample, 2 score
                drawn = draw_problems(cursor, args.prompts_per_update, len(train), args.seed)
                cursor += len(drawn)
                problems = [train[i] for i in drawn for _ in range(args.group_size)]  # G rows of each
                noise = uniforms([len(problems), args.max_new_tokens], args.seed, update, attempt)
                scored, took = rollouts(problems, noise, args.temperature, interrupt.check)
                samples += scored
                seconds.update(took)

                # 3 advantage
                rewards = torch.tensor([s.reward for s in scored]).view(-1, args.group_size)  # [N, G]
                advantages = group_advantages(rewards, args.normalize_std)  # [N, G]
                for sample, advantage in zip(scored, advantages.flatten().tolist()):
                    sample.advantage = advantage
                spread = (rewards.amax(1) > rewards.amin(1)).tolist()  # a group without it teaches nothing
                parts = [scored[i : i + args.group_size] for i in range(0, len(scored), args.group_size)]
                groups += [group for group, good in zip(parts, spread) if good or not args.dynamic_sampling]
                if len(groups) >= args.prompts_per_update:
                    break

            # 4 update
            begin, groups = time.time(), groups[: args.prompts_per_update]
            learnt = learn(model, ref_model, optimizer, groups, args, ranks, interrupt.check)
            seconds["time/update_s"] = time.time() - begin

            # 5 log, evaluate, save
            state |= {"update": update, "cursor": cursor}
            metrics = {
                "update": update, **sample_metrics(samples, args.group_size), **learnt, **seconds,
                "rollout/groups": len(groups), "data/epoch": cursor / len(train),
                "perf/tokens_per_s": sum(map(len, samples)) / sum(seconds.values()),
            }  # fmt: skip
            for key in [key for key in hints if metrics[key] == 1]:
                run.say(f"note: {hints.pop(key)}")
            last = update == args.updates
            saves = last or (args.save_every and update % args.save_every == 0)
            if saves:  # before the evaluation, which may stop the run
                run.export(model, "final" if last else f"update_{update:06d}")
            try:
                if last or (args.eval_every and update % args.eval_every == 0):
                    stop = (lambda: None) if last else interrupt.check  # the last evaluation is finished
                    evaluated, after = evaluate(rollouts, heldout, args, run, update, stop)
                    metrics |= evaluated
            finally:
                run.log(metrics, CONSOLE, args.updates, not math.isfinite(learnt["optim/grad_norm"]))
            if saves:
                run.save(state, models, optimizer)
                run.curves(PANELS)
    except Stop:
        run.stopped(state, models, optimizer)
    if after:
        run.say(report(run, heldout, state["before"], metrics, after))


if __name__ == "__main__":
    launch(main, parse_args())
