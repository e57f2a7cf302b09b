"""Pass@k of a code model on HumanEval(+), MBPP(+), LiveCodeBench and Codeforces.

The protocol behind Table 1 of "Learning to Reason as Action Abstractions with Scalable Mid-Training RL" (RA3,
arXiv 2509.25810v2), which evaluates with the BigCode harness:

  1 problems  the prompt, the stop words and the tests of every problem, from the benchmark's rows
  2 sample    of each problem one greedy completion (pass@1) and n sampled ones (pass@5); or read --samples
  3 judge     run each completion, cut at its first stop word, in the sandbox, while 2 goes on
  4 report    pass@k = 1 - C(n-c, k) / C(n, k) for c right completions among n, averaged over the problems

A sample's noise depends on (seed, benchmark, task, sample) alone, not on ranks or batches. A killed run goes
on with what is missing when the same command is given again with the same --output-dir.
Shapes: B rows, T tokens of the padded prompt, V vocabulary.

Deviations from BigCode (docs/eval_code.md has all):
  D1 An RA3 model may think at column 0, where HumanEval's stop word "\\n#" would end it. With --thoughts it
     is no stop word, and both counts are reported: `humaneval`, and `humaneval_cut` with the stop word.
  D2 512 is the number of new tokens, as in the authors' scripts; BigCode's default counts the prompt, too.
  D3 MBPP's `test_setup_code` (one test task has it) runs before the tests; BigCode leaves it out.

  python eval_code.py --tiny                                                                  # this machine
  python eval_code.py --model runs/my_run/checkpoints/em_001 --thoughts                       # one GPU
  torchrun --nproc_per_node 8 eval_code.py --model Qwen/Qwen2.5-1.5B --output-dir runs/base   # eight GPUs
"""

import base64
import collections
import contextlib
import io
import itertools
import json
import math
import os
import pickle
import re
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Literal

import torch
import tyro
from tqdm import tqdm

import common
from common import UserError


@dataclass
class Args:
    """Evaluate a code model. Defaults are the paper's values."""

    # ---- run
    tiny: bool = False
    """the embedded default: tiny model and problems, a minute on two cores; every flag still overrides"""
    output_dir: str = ""
    """folder of this evaluation; one begun before goes on. Empty: runs/eval_code__<model>__s<seed>__<time>"""
    seed: int = 0
    """fixes all sampling noise"""
    # ---- model and problems
    model: str = "Qwen/Qwen2.5-1.5B"
    """any causal LM that AutoModelForCausalLM loads, a hub id or a folder"""
    benchmarks: tuple[str, ...] = ("humaneval", "mbpp", "humanevalplus", "mbppplus")
    """of humaneval, mbpp, humanevalplus, mbppplus, livecodebench, codeforces; name=FILE: a local file"""
    samples: str = ""
    """judge what this human-eval or evalplus file holds (`task_id`, `completion` or `solution`) instead"""
    contests: str = ""
    """file of Codeforces' contests (all_contest_data.json): adds a rating, see `codeforces_rating`"""
    limit: int = 0
    """only the first so many problems of each benchmark; 0: all"""
    mbpp_prompt: Literal["bigcode", "signature"] = "bigcode"
    """bigcode: a docstring with one test; signature (the authors' fork): a `def` line, two tests"""
    # ---- sampling
    n_samples: int = 10
    """sampled completions per problem for pass@k with k > 1; 0: only the greedy one"""
    k: tuple[int, ...] = (1, 5)
    """which pass@k to report"""
    temperature: float = 0.6
    """of the sampled completions"""
    top_p: float = 0.95
    """sample among the most likely tokens that together have this probability"""
    max_new_tokens: int = 512
    """longest completion (tokens); LiveCodeBench and Codeforces need more: 1024 in the authors' RLVR runs"""
    thoughts: bool = False
    """the model was trained to write `#` thoughts (RA3): see D1"""
    # ---- speed only
    batch_size: int = 64
    """completions generated together on a rank"""
    workers: int = 0
    """programs that run at once on a rank; 0: the machine's cores over its ranks"""


TINY_PROBLEMS = (f"humaneval={common.TINY / 'code_problems.jsonl'}",)
TINY_DEFAULTS = replace(Args(), tiny=True, model=str(common.TINY / "model"), benchmarks=TINY_PROBLEMS)
TINY_DEFAULTS = replace(TINY_DEFAULTS, n_samples=5, max_new_tokens=64)
SPEED_ONLY = ("output_dir", "batch_size", "workers")  # these may change when an evaluation is continued

# ---------------------------------------------------------------- 1 problems

HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```", "<file_sep>")
MBPP_STOPS = ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```")
THOUGHT_STOP = "\n#"
# LiveCodeBench's checker imports these before every program, first their names and then the modules
MODULES = (
    "string, re, datetime, collections, heapq, bisect, copy, math, random, statistics, itertools, functools, "
    "operator, io, sys, json, builtins, typing"
)
CONTEST_IMPORTS = "".join(f"from {name} import *\n" for name in MODULES.split(", ")) + f"import {MODULES}\n"


@dataclass
class Problem:
    """A program is imports + opening + completion + closing, or imports + a whole solution."""

    task_id: str
    prompt: str
    opening: str  # what the prompt holds of the program's beginning
    stop_words: tuple[str, ...]
    checks: dict  # what run_tests needs beside the code
    closing: str = ""
    imports: str = ""
    benchmark: str = ""


def humaneval_problem(row: dict, args: Args) -> Problem:
    """HumanEval and HumanEval+: the prompt with its last newline (BigCode's `humaneval-unstripped`)."""
    checks = {"tests": f"{row['test']}\ncheck({row['entry_point']})\n", "entry_point": row["entry_point"]}
    return Problem(row["task_id"], row["prompt"], row["prompt"], HUMANEVAL_STOPS, checks)


def mbpp_problem(row: dict, args: Args) -> Problem:
    """MBPP, and MBPP+, which calls the description `prompt` and has a `test` instead of the examples."""
    examples, description = row["test_list"], row["prompt"] if "prompt" in row else row["text"]
    functions = re.findall(r"^def\s+((\w+)\s*\(.*\))", row["code"], re.MULTILINE)  # [("f(a, b)", "f"), ...]
    head, name = next((f for f in functions if re.search(rf"\b{f[1]}\b", examples[0])), (None, None))
    if name is None:
        raise ValueError("the first test calls no function of `code`")
    tests = row.get("test") or "\n".join([row.get("test_setup_code") or "", *examples])
    checks = {"tests": tests, "entry_point": name}
    if args.mbpp_prompt == "bigcode":
        return Problem(row["task_id"], f'"""\n{description}\n{examples[0]}\n"""\n', "", MBPP_STOPS, checks)
    prompt = "\n    ".join([f"def {head}:", f'""" {description}', *examples[:2], '"""']) + "\n"
    return Problem(row["task_id"], prompt, prompt, (*MBPP_STOPS, "\ndef"), checks)


def contest_problem(task_id, question: str, signature: str, checks: dict) -> Problem:
    """The question as a docstring, then the signature to go on from, as in grpo_rlvr.py (RA3 v2, section 7).

    A program that reads stdin is the body of `main`.
    """
    opening, closing = (signature.rstrip() + "\n", "") if signature else ("def main():\n", "\nmain()\n")
    stop_words = (*MBPP_STOPS, "\ndef", "\nmain(")
    prompt = f'"""\n{question}\n"""\n{opening}'
    return Problem(task_id, prompt, opening, stop_words, checks, closing, CONTEST_IMPORTS)


class PlainUnpickler(pickle.Unpickler):
    """Makes strings, numbers and lists. A pickle that runs code must look up a name, and none is given."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"refused: {module}.{name}")


def livecodebench_problem(row: dict, args: Args) -> Problem:
    """All public and private tests must pass. Functional: one JSON argument per line, and the JSON result."""
    private = row["private_test_cases"]
    if not private.startswith("["):  # else: a pickled string of JSON, compressed, in base 64
        private = PlainUnpickler(io.BytesIO(zlib.decompress(base64.b64decode(private)))).load()
    cases = json.loads(row["public_test_cases"]) + json.loads(private)
    checks = {"cases": [{"input": case["input"], "output": case["output"]} for case in cases]}
    if cases[0]["testtype"] == "functional":
        checks["fn_name"] = json.loads(row["metadata"])["func_name"]
    return contest_problem(row["question_id"], row["question_content"], row["starter_code"], checks)


def codeforces_problem(row: dict, args: Args) -> Problem:
    """stdin and stdout. All tests run, also after a failed one: the share that passes is reported."""
    cases = json.loads(row["tests"]) if isinstance(row["tests"], str) else row["tests"]
    cases = [{"input": case["input"], "output": case["output"]} for case in cases]
    return contest_problem(row.get("id"), row["problem"], "", {"cases": cases, "all_cases": True})


# LiveCodeBench's repository holds a loading script, which `datasets` refuses to run, so its files are named.
LCB_WINDOW = ("2024-08-01", "2025-02-01")  # contest dates of DeepCoder's 279; a local file is taken whole
LCB_FILES = "json:hf://datasets/livecodebench/code_generation_lite/test*.jsonl"
CODEFORCES = "agentica-org/DeepCoder-Preview-Dataset:codeforces"
BENCHMARKS = {  # title, hub source, split, timeout in s (BigCode's; of the contests: per test), reader
    "humaneval": ("HumanEval", "openai/openai_humaneval", "test", 3, humaneval_problem),
    "mbpp": ("MBPP", "google-research-datasets/mbpp:full", "test", 3, mbpp_problem),
    "humanevalplus": ("HumanEval+", "evalplus/humanevalplus", "test", 20, humaneval_problem),
    "mbppplus": ("MBPP+", "evalplus/mbppplus", "test", 10, mbpp_problem),
    "livecodebench": ("LiveCodeBench", LCB_FILES, "train", 6, livecodebench_problem),
    "codeforces": ("Codeforces", CODEFORCES, "test", 12, codeforces_problem),
}


def load_problems(args: Args) -> list[Problem]:
    """UserError for an unknown benchmark, for an empty one, and for rows that are not as on the hub."""
    problems = {}
    for spec in args.benchmarks:
        name, _, file = spec.partition("=")
        name = name.lower().replace("+", "plus")
        if name not in BENCHMARKS:
            raise UserError(f"unknown benchmark {name}; there are {', '.join(BENCHMARKS)}")
        _, source, split, timeout_s, read = BENCHMARKS[name]
        rows = common.read_rows(file or source, split)
        if not file and name == "livecodebench":
            dated = ((str(common.column(row, "contest_date", source))[:10], row) for row in rows)
            rows = (row for date, row in dated if LCB_WINDOW[0] <= date <= LCB_WINDOW[1])
        index = -1
        for index, row in enumerate(itertools.islice(rows, args.limit or None)):
            where = f"{file or source}, row {index}"
            try:
                problem = read(row, args)
            except KeyError as missing:
                raise UserError(f"{where}: no column {missing}; it has: {', '.join(row)}") from None
            except (ValueError, TypeError, AttributeError, IndexError, pickle.PickleError, zlib.error) as e:
                raise UserError(f"{where}: not a problem of {name}: {e}") from None
            problem.benchmark, problem.checks["timeout_s"] = name, timeout_s
            problem.task_id = str(index if problem.task_id is None else problem.task_id)
            if (name, problem.task_id) in problems:
                raise UserError(f"{where}: task {problem.task_id} of {name} is there twice")
            problems[name, problem.task_id] = problem
            if args.thoughts and THOUGHT_STOP in problem.stop_words:  # D1
                problems[f"{name}_cut", problem.task_id] = replace(problem, benchmark=f"{name}_cut")
                problem.stop_words = tuple(word for word in problem.stop_words if word != THOUGHT_STOP)
        if index < 0:
            raise UserError(f"{file or source} holds no problem")
    return list(problems.values())


# ---------------------------------------------------------------- 2 sample

# A sample is a dict, in the end a line of samples.jsonl: benchmark, task_id, sample (a number), temperature,
# prompt, completion (or solution), truncated; then passed, reason, seconds, tests_passed, tests_total.
Job = tuple[Problem, dict]  # a sample and what it is to solve


def key(sample: dict) -> tuple:
    """What a sample is known by."""
    return sample["benchmark"], sample["task_id"], sample["temperature"], sample["sample"]


def plan_samples(args: Args, problems: list[Problem]) -> list[Job]:
    """What to generate: of each problem one greedy completion (temperature 0) and n sampled ones."""
    jobs = []
    for problem in problems:
        known = {"benchmark": problem.benchmark, "task_id": problem.task_id, "prompt": problem.prompt}
        for temperature, count in ((0.0, 1), (args.temperature, args.n_samples)):
            for number in range(count):
                jobs.append((problem, {**known, "temperature": temperature, "sample": number}))
    return jobs


def read_samples(args: Args, problems: list[Problem]) -> list[Job]:
    """What to judge: a human-eval or evalplus file, or a samples.jsonl. "Mbpp/2" is the same task as 2."""
    found, jobs = collections.defaultdict(list), []
    for row in common.read_rows(args.samples):
        task = str(common.column(row, "task_id", args.samples)).removeprefix("Mbpp/")
        kind = "solution" if "solution" in row else "completion"
        text = common.column(row, kind, args.samples)
        found[row.get("benchmark"), task].append((kind, text, row.get("temperature")))
    for problem in problems:
        benchmark, known = problem.benchmark, {"benchmark": problem.benchmark, "task_id": problem.task_id}
        rows = [found[b, problem.task_id] for b in (benchmark.removesuffix("_cut"), None)]
        if not any(rows):
            raise UserError(f"{args.samples} has no sample of task {problem.task_id} of {benchmark}")
        for number, (kind, text, temperature) in enumerate(rows[0] or rows[1]):
            if kind == "completion" and benchmark.endswith("_cut"):
                text = cut(text, [THOUGHT_STOP])
            jobs.append((problem, {**known, "temperature": temperature, "sample": number, kind: text}))
    return jobs


def cut(completion: str, stop_words) -> str:
    """The completion up to its first stop word."""
    return completion[: min((i for i in map(completion.find, stop_words) if i >= 0), default=None)]


def choose_tokens(logits, noise, temperatures, top_p: float) -> torch.Tensor:
    """The next token of each row [B]: argmax where temperatures [B] are 0, else drawn from the top-p part.

    logits [B, V], noise [B] in [0, 1). Drawn in the vocabulary's order, not in that of the probabilities: so
    a rounding error that swaps two nearly equal tokens changes nothing, whatever the batch.
    """
    probs = (logits.float() / temperatures.clamp(min=1e-6).unsqueeze(1)).softmax(-1)  # [B, V]
    ordered = probs.sort(descending=True).values
    inside = ordered.cumsum(-1) - ordered < top_p  # what lies before a token; the first is always inside
    smallest = ordered.masked_fill(~inside, math.inf).amin(-1, keepdim=True)  # [B, 1]
    drawn = common.inverse_cdf(probs.masked_fill(probs < smallest, 0.0), noise)
    return torch.where(temperatures > 0, drawn, logits.argmax(-1))


@torch.no_grad()
def complete(model, tokenizer, batch: list[Job], args: Args) -> None:
    """Generate `completion` and `truncated` of each sample of the batch."""
    problems, samples = zip(*batch)
    prompts = [tokenizer(problem.prompt).input_ids for problem in problems]
    width, device = max(map(len, prompts)), model.device
    room = model.config.get_text_config().max_position_embeddings - args.max_new_tokens
    if width > room:
        raise UserError(f"a prompt has {width} tokens; beside --max-new-tokens the model has room for {room}")
    input_ids = common.pad_right([p[::-1] for p in prompts], tokenizer.pad_token_id, device).flip(1)  # [B, T]
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    mask = torch.arange(width, device=device) >= width - lengths.unsqueeze(1)  # [B, T], left padding
    # one source of noise per sample, and the same with and without the stop word of D1
    names = [(sample["benchmark"].removesuffix("_cut"), *key(sample)[1:]) for sample in samples]
    noise = [common.uniforms([args.max_new_tokens], args.seed, *name) for name in names]
    noise = torch.stack(noise).to(device)  # [B, max_new_tokens]
    temperatures = torch.tensor([sample["temperature"] for sample in samples], device=device)  # [B]
    eos = model.config.eos_token_id  # an id, a list, or None
    eos = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}

    def choose(ids, logits):
        tokens = choose_tokens(logits, noise[:, ids.shape[1] - width], temperatures, args.top_p)
        return torch.full_like(logits, -math.inf).scatter(1, tokens.unsqueeze(1), 0.0)

    def ended(ids, logits, **_):  # decoding is slow: every 16 tokens, search the text of the last 32
        if (ids.shape[1] - width) % 16:
            return torch.zeros(len(ids), dtype=torch.bool, device=device)
        tails = tokenizer.batch_decode(ids[:, max(width, ids.shape[1] - 32) :])
        found = [cut(tail, problem.stop_words) != tail for tail, problem in zip(tails, problems)]
        return torch.tensor(found, device=device)

    # generate counts the positions by the mask. `choose` has drawn already: the largest logit is the token.
    # The weights are gathered, so no rank waits for the longest row of another
    options = {"max_new_tokens": args.max_new_tokens, "do_sample": False, "synced_gpus": False}
    options |= {"eos_token_id": sorted(eos), "pad_token_id": tokenizer.pad_token_id}
    options |= {"logits_processor": [choose], "stopping_criteria": [ended]}
    output = model.generate(input_ids, attention_mask=mask.long(), **options)
    for problem, sample, prompt, new in zip(problems, samples, prompts, output[:, width:].tolist()):
        end = next((i for i, token in enumerate(new) if token in eos), None)
        both = [prompt, prompt + new[:end]]  # decoded alone, a completion may lose its first space
        before, text = tokenizer.batch_decode(both, clean_up_tokenization_spaces=False)
        sample["completion"] = cut(text[len(before) :], problem.stop_words)
        sample["truncated"] = end is None and before + sample["completion"] == text


# ---------------------------------------------------------------- 3 judge


def judge(jobs: list[Job], write, args: Args) -> None:
    """Run the programs in the sandbox; each sample goes to `write` as soon as it has its verdict."""
    programs = []
    for problem, sample in jobs:
        code = sample.get("solution") or problem.opening + sample.get("completion", "") + problem.closing
        programs.append({"code": problem.imports + code, **problem.checks})
    workers = args.workers or max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    common.run_tests(programs, workers=workers, on_result=lambda i, verdict: write({**jobs[i][1], **verdict}))


# ---------------------------------------------------------------- 4 report


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k samples, drawn without replacement from n of which c are right, hold a right one."""
    return 1.0 if n - c < k else 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def summarise(samples: list[dict], ks: tuple[int, ...]) -> dict:
    """Shares in [0, 1] of one benchmark. pass@1 is that of the greedy samples if there are any."""
    greedy = [sample for sample in samples if sample["temperature"] == 0]
    verdicts = collections.defaultdict(list)  # task -> verdicts of its sampled completions
    for sample in samples:
        if sample["temperature"] != 0:
            verdicts[sample["task_id"]].append(sample["passed"])
    summary = {"problems": len({sample["task_id"] for sample in samples})}
    for k in ks:
        if k == 1 and greedy:
            summary["pass@1"] = fmean(sample["passed"] for sample in greedy)
        elif k <= min(map(len, verdicts.values()), default=0):
            summary[f"pass@{k}"] = fmean(pass_at_k(len(v), sum(v), k) for v in verdicts.values())
    if "truncated" in samples[0]:
        summary["truncated"] = fmean(sample["truncated"] for sample in samples)
    if samples[0]["benchmark"] == "codeforces":
        summary["tests_passed"] = fmean(s["tests_passed"] / s["tests_total"] for s in greedy or samples)
    return summary


def codeforces_rating(attempts: dict[str, list[bool]], contests: dict) -> float:
    """Mean over contests of the rating at which as many participants are expected to be better as were.

    The method of CodeElo (arXiv 2501.01257). attempts: "1914A" -> verdicts in order; contests: "1914" ->
    {"standings", "rating_changes"}, the answers of Codeforces' API as AReaL-boba-2-RL-Code ships them. Failed
    attempts before the right one cost 50 points, or 10 minutes where problems have no points. NaN without a
    contest that rates over 200 participants.
    """
    ratings = []
    for contest in {re.match(r"\d*", task)[0] for task in attempts} & contests.keys():
        standings, changes = (contests[contest][name]["result"] for name in ("standings", "rating_changes"))
        old = {change["handle"]: change["oldRating"] for change in changes}
        rows = {row["party"]["members"][0]["handle"]: row for row in standings["rows"]}
        rated = [(old[name], row["points"], row["penalty"]) for name, row in rows.items() if name in old]
        points = penalty = 0
        for problem in standings["problems"]:
            verdicts = attempts.get(f"{contest}{problem['index']}", [])
            if True in verdicts:
                failed = verdicts.index(True)
                points += max(0, problem["points"] - 50 * failed) if "points" in problem else 1
                penalty += 0 if "points" in problem else 10 * failed
        better = sum((theirs, -late) >= (points, -penalty) for _, theirs, late in rated)
        low, high = 0.0, max([rating for rating, _, _ in rated], default=0) + 100.0
        while high - low > 0.5:
            middle = (low + high) / 2
            expected = sum(1 / (1 + 10 ** ((middle - rating) / 400)) for rating, _, _ in rated)
            low, high = (low, middle) if expected < better else (middle, high)
        ratings += [low] if len(rated) > 200 else []
    return fmean(ratings) if ratings else math.nan


def table(results: dict, label: str, ks: tuple[int, ...]) -> str:
    """Table 1 of the paper, in percent; with --thoughts a second row: completions cut at a thought (D1)."""
    names = [name for name in BENCHMARKS if name in results]
    width = max(7 * len(ks), 13) + 1
    lines = [" " * 24 + "".join(f"{title:{width}}" for title in [*(BENCHMARKS[n][0] for n in names), "Avg."])]
    lines.append(" " * 24 + "".join(f"{f'p@{k}':7}" for k in ks).ljust(width) * (len(names) + 1))
    for suffix, title in (("", label), ("_cut", "  cut at \\n#")):
        if any(name + suffix in results for name in names):
            rows = [results.get(name + suffix, results[name]) for name in names]
            cells = [[row.get(f"pass@{k}", math.nan) for k in ks] for row in rows]
            cells.append([fmean(shares) for shares in zip(*cells)])
            shown = ["".join(f"{100 * share:<7.1f}" for share in cell).ljust(width) for cell in cells]
            lines.append(f"{title[-23:]:24}" + "".join(shown).replace("nan", "-  "))
    return "\n".join(lines)


def report(folder: Path, jobs: list[Job], label: str, args: Args) -> None:
    """Write results.json and print the table."""
    judged, samples = read_judged(folder / "samples.jsonl"), collections.defaultdict(list)
    for _, sample in jobs:
        if key(sample) not in judged:
            raise UserError(f"{folder} lacks the verdict of {key(sample)}: run the same command again")
        samples[sample["benchmark"]].append(judged[key(sample)])
    results = {name: summarise(found, args.k) for name, found in samples.items()}
    if args.contests and "codeforces" in samples:
        attempts = collections.defaultdict(list)
        for sample in samples["codeforces"]:
            if sample["temperature"] != 0 or not args.n_samples:
                attempts[sample["task_id"]].append(sample["passed"])
        contests = json.loads(Path(args.contests).read_text())
        results["codeforces"]["rating"] = codeforces_rating(attempts, contests)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{table(results, label, args.k)}\n\n{folder / 'results.json'}")


# ---------------------------------------------------------------- the evaluation


def open_folder(folder: Path, args: Args, ranks: common.Ranks) -> set:
    """Begin or continue an evaluation -> keys of what is judged. UserError if its arguments were others."""
    now = json.loads(json.dumps({k: v for k, v in asdict(args).items() if k not in SPEED_ONLY}))
    if (folder / "samples.jsonl").exists():
        before = json.loads((folder / "args.json").read_text())
        differ = [f"{name}: {before.get(name)} -> {v}" for name, v in now.items() if v != before.get(name)]
        if differ:
            raise UserError(f"{folder} holds an evaluation with other arguments ({', '.join(differ)})")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "args.json").write_text(json.dumps(now, indent=1))
    (folder / "env.txt").write_text(common._environment(ranks))
    return set(read_judged(folder / "samples.jsonl"))


def read_judged(file: Path) -> dict[tuple, dict]:
    """key -> sample. A last line torn by a kill is removed from the file."""
    content = file.read_bytes() if file.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        os.truncate(file, len(whole))
    return {key(sample): sample for sample in map(json.loads, whole.splitlines())}


def main(args: Args) -> None:
    ranks = common.setup(args.seed)
    if min(args.max_new_tokens, args.batch_size, args.temperature, args.top_p, *args.k) <= 0:
        raise UserError("--max-new-tokens, --batch-size, --temperature, --top-p and --k must be positive")
    if not args.samples and max(args.k) > max(1, args.n_samples):  # pass@1 is greedy
        raise UserError(f"pass@{max(args.k)} needs --n-samples {max(args.k)} or more; or choose another --k")
    if args.contests and not Path(args.contests).is_file():
        raise UserError(f"no such file: --contests {args.contests}")
    label = Path(args.samples or args.model).name
    stem = f"runs/eval_code__{label}__s{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(common.all_gather_list([args.output_dir or stem], ranks)[0])  # that of rank 0

    # 1 problems. Batches do not depend on the ranks, and one that a kill interrupted is generated again as a
    # whole, so samples are the same to the last bit. Longest prompts first: a lack of memory shows at once
    problems = load_problems(args)
    jobs = read_samples(args, problems) if args.samples else plan_samples(args, problems)
    done = common.together(lambda: open_folder(folder, args, ranks) if ranks.main else None, ranks)
    done = common.all_gather_list([done], ranks)[0]
    longest = sorted(jobs, key=lambda job: -len(job[0].prompt))
    batches = [longest[start : start + args.batch_size] for start in range(0, len(jobs), args.batch_size)]
    batches = [batch for batch in batches if any(key(sample) not in done for _, sample in batch)]
    model = None
    if batches and not args.samples:
        tokenizer = common.load_tokenizer(args.model)
        model = common.load_model(args.model, ranks, train=False)

    # 2 sample and 3 judge, at the same time. One unbuffered append per line: the ranks share the file
    mine = batches[ranks.rank :: ranks.world_size]
    bar = tqdm(total=sum(map(len, mine)), unit="sample", disable=not ranks.main)
    samples_file = open(folder / "samples.jsonl", "ab", buffering=0)  # noqa: SIM115

    def write(sample: dict) -> None:
        samples_file.write((json.dumps(sample) + "\n").encode())
        bar.update()

    background, judged = ThreadPoolExecutor(1), []
    with common.gathered(model) if model else contextlib.nullcontext():
        for batch in mine:
            if model:
                complete(model, tokenizer, batch, args)
            missing = [(problem, sample) for problem, sample in batch if key(sample) not in done]
            judged.append(background.submit(judge, missing, write, args))
            if judged[0].done():
                judged.pop(0).result()  # raises what went wrong in the background
    common.together(lambda: [future.result() for future in judged], ranks)
    bar.close()

    # 4 report
    common.together(lambda: report(folder, jobs, label, args) if ranks.main else None, ranks)


if __name__ == "__main__":
    defaults = TINY_DEFAULTS if "--tiny" in sys.argv else Args()
    common.launch(main, tyro.cli(Args, default=defaults, description=__doc__))
