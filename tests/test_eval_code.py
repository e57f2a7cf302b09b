import base64
import contextlib
import dataclasses
import gzip
import itertools
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

import common
import modeling
import eval_code
import problems
from eval_code import Args, Problem

ROOT = Path(eval_code.__file__).parent
MODEL, PROBLEMS = str(common.TINY / "model"), f"humaneval={common.TINY / 'code_problems.jsonl'}"
SMALL = {"model": MODEL, "benchmarks": (PROBLEMS,), "limit": 5, "n_samples": 3, "k": (1, 2)}
SMALL |= {"max_new_tokens": 32, "batch_size": 4, "workers": 1}
FLAGS = [f"--model={MODEL}", f"--benchmarks={PROBLEMS}", "--limit=5", "--n-samples=3", "--k", "1", "2"]
FLAGS += ["--max-new-tokens=32", "--batch-size=4", "--workers=1"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny():
    ranks = common.setup(0)
    return modeling.load_model(SMALL["model"], ranks, train=False), modeling.load_tokenizer(SMALL["model"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One evaluation that was never interrupted, on one rank."""
    folder = tmp_path_factory.mktemp("finished")
    eval_code.main(Args(**SMALL, output_dir=str(folder)))
    environment = (folder / "env.txt").read_text()
    assert all(f"\n{word}: " in f"\n{environment}" for word in ("command", "commit", "device", "torch", "python"))
    return folder


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def key(sample: dict) -> tuple:
    return sample["benchmark"], sample["task_id"], sample["temperature"], sample["sample"]


def read_lines(folder: Path) -> dict:
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    records = {key(line): line for line in lines}
    assert len(records) == len(lines), "a sample was written twice"
    return records


def completions(folder: Path) -> dict:
    return {name: (record["completion"], record["passed"]) for name, record in read_lines(folder).items()}


def score(tmp_path: Path, benchmark: str, rows: list[dict], samples: list[dict], **options) -> dict:
    """results.json of --samples over rows in the hub's columns."""
    rows, samples = write_rows(tmp_path / "rows.jsonl", rows), write_rows(tmp_path / "file.jsonl", samples)
    folder = tmp_path / "out"
    args = Args(benchmarks=(f"{benchmark}={rows}",), samples=samples, output_dir=str(folder), **options)
    eval_code.main(args)
    return json.loads((folder / "results.json").read_text())


# ---------------------------------------------------------------- rows as on the hub

HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'import math\n\n\ndef add(a, b):\n    """Add."""\n',
    "canonical_solution": "    return a + b\n",
    "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate(1, 2) == 3\n"
    "    assert candidate(-1, 1) == 0\n",
    "entry_point": "add",
}
MBPP = {
    "task_id": 11,
    "text": "Write a function to add two numbers.",
    "code": "def helper(x):\r\n    return x\r\ndef add(a,b) :\r\n    return helper(a) + b",
    "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(-1, 1) == 0"],
    "test_setup_code": "",
    "challenge_test_list": [],
}
MBPP_PLUS = {
    "task_id": 11,
    "code": MBPP["code"],
    "prompt": MBPP["text"],
    "source_file": "x.ipynb",
    "test_imports": [],
    "test_list": MBPP["test_list"],
    "test": "import numpy as np\n\ninputs = [[1, 2], [3, 4]]\nresults = [3, 7]\n"
    "for inp, exp in zip(inputs, results):\n    assert np.allclose(add(*inp), exp)\n",
}


def lcb_row(functional: bool, packed: bool) -> dict:
    stdin = [("1 2\n", "3\n"), ("5 5\n", "10")]
    calls = [("[1, 2]\n1", "4"), ("[]\n0", "0")]
    cases = [
        {"input": given, "output": expected, "testtype": "functional" if functional else "stdin"}
        for given, expected in (calls if functional else stdin)
    ]
    private = json.dumps(cases[1:])
    if packed:
        private = base64.b64encode(zlib.compress(pickle.dumps(private))).decode()
    return {
        "question_title": "Add",
        "question_content": "Add what is given.",
        "platform": "leetcode" if functional else "atcoder",
        "question_id": "3000" if functional else "abc300_a",
        "contest_id": "weekly",
        "contest_date": "2024-09-01T00:00:00",
        "starter_code": "class Solution:\n    def total(self, xs: List[int], y: int) -> int:\n        "
        if functional
        else "",
        "difficulty": "easy",
        "public_test_cases": json.dumps(cases[:1]),
        "private_test_cases": private,
        "metadata": json.dumps({"func_name": "total"} if functional else {}),
    }


CODEFORCES = {
    "problem": "Print the double of a number.",
    "tests": json.dumps([{"input": str(i), "output": str(2 * i)} for i in range(4)]),
}
ADD_BODY = "    return a + b\n"


@pytest.mark.parametrize(
    "name, row, right, wrong",
    [
        ("humaneval", HUMANEVAL, ADD_BODY, "    return a\n"),
        ("humanevalplus", HUMANEVAL, "    return int(math.fsum([a, b]))\n", "    return None\n"),
        ("mbpp", MBPP, "def add(a, b):\n    return a + b\n", "def add(a, b):\n    return 3\n"),
        ("mbppplus", MBPP_PLUS, "def add(a, b):\n    return a + b\n", "def add(a, b):\n    return a\n"),
        ("livecodebench", lcb_row(True, True), "        return sum(xs) + y\n", "        return 4\n"),
        ("livecodebench", lcb_row(True, False), "        return sum(xs) + y\n", "        return 4\n"),
        ("livecodebench", lcb_row(False, True), "    print(sum(map(int, input().split())))", "    print(3)"),
        ("codeforces", CODEFORCES, "    print(2 * int(input()))\n", "    print(0)\n"),
    ],
)
def test_rows_of_the_hub_become_programs(tmp_path, name, row, right, wrong):
    for form in ("jsonl", "jsonl.gz", "parquet"):
        path = tmp_path / f"rows.{form}"
        if form == "jsonl":
            write_rows(path, [row])
        elif form == "jsonl.gz":
            path.write_bytes(gzip.compress(json.dumps(row).encode() + b"\n"))
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
        args = Args(benchmarks=(f"{name}={path}",), workers=1)
        [problem] = eval_code.load_problems(args)
    records = [(problem, {"completion": text}) for text in (right, wrong)]
    eval_code.judge(records, tmp_path / "batch.jsonl", args)
    verdicts = [json.loads(line) for line in (tmp_path / "batch.jsonl").read_text().splitlines()]
    assert {v["completion"]: v["passed"] for v in verdicts} == {right: True, wrong: False}, verdicts
    if name == "codeforces":  # all cases run: 0 is right for the first of four
        failed = next(v for v in verdicts if not v["passed"])
        assert (failed["tests_passed"], failed["tests_total"]) == (1, 4)


def test_tests_as_a_list_and_names_with_plus(tmp_path):
    row = CODEFORCES | {"tests": json.loads(CODEFORCES["tests"]), "id": "4/A"}
    codeforces = write_rows(tmp_path / "codeforces.jsonl", [row])
    humaneval = write_rows(tmp_path / "humaneval.jsonl", [HUMANEVAL])
    args = Args(benchmarks=(f"codeforces={codeforces}", f"HumanEval+={humaneval}"))
    first, second = eval_code.load_problems(args)
    assert (first.benchmark, first.task_id, len(first.checks["cases"])) == ("codeforces", "4/A", 4)
    assert (second.benchmark, second.checks["timeout_s"]) == ("humanevalplus", 20)


def test_both_mbpp_prompts():
    test_0, test_1 = MBPP["test_list"][:2]
    problem = eval_code.mbpp_problem(MBPP, Args())
    assert problem.prompt == f'"""\nWrite a function to add two numbers.\n{test_0}\n"""\n'
    assert problem.opening == "" and "\ndef" not in problem.stop_words
    assert problem.checks["entry_point"] == "add"  # the function that the tests call, not the first one
    problem = eval_code.mbpp_problem(MBPP, Args(mbpp_prompt="signature"))
    expected = ["def add(a,b):", f'    """ {MBPP["text"]}', f"    {test_0}", f"    {test_1}", '    """', ""]
    assert problem.prompt == problem.opening == "\n".join(expected)
    assert "\ndef" in problem.stop_words


def test_contest_prompts_are_those_of_training():
    import grpo_rlvr

    functional, stdin = lcb_row(True, False), lcb_row(False, False)
    for row in (functional, stdin):
        row_of_training = {"problem": row["question_content"], "tests": row["public_test_cases"]}
        row_of_training |= {key: row[key] for key in ("starter_code", "metadata")}
        question, checks = problems.code_problem(row_of_training, "rows")
        prompt = grpo_rlvr.code_prompt(question, checks["signature"])
        assert eval_code.livecodebench_problem(row, Args()).prompt == prompt


def test_setup_code_of_mbpp_runs_before_the_tests(tmp_path):
    row = MBPP | {
        "code": "class Node:\n    pass\ndef depth(node):\n    return 1",
        "test_setup_code": "root = Node()\r\nroot.left = Node()",
        "test_list": ["assert depth(root) == 1"],
    }
    samples = [{"task_id": "Mbpp/11", "solution": row["code"]}]
    assert score(tmp_path, "mbpp", [row], samples, workers=1)["mbpp"]["pass@1"] == 1.0


def test_no_pickle_is_loaded(tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    row = lcb_row(False, True)
    row["private_test_cases"] = base64.b64encode(zlib.compress(pickle.dumps(Malicious()))).decode()
    path = write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(common.UserError, match="row 0: not a problem of livecodebench"):
        eval_code.load_problems(Args(benchmarks=(f"livecodebench={path}",)))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "completion, stop_words, kept",
    [
        ("    return 1\n\ndef g():\n    pass", eval_code.HUMANEVAL_STOPS, "    return 1\n"),
        ("    return 1\n# a thought\n    x", eval_code.HUMANEVAL_STOPS, "    return 1"),
        ("    # thought\n    return 1\n", eval_code.HUMANEVAL_STOPS, "    # thought\n    return 1\n"),
        ("    return 1\nif x:\nclass A:", eval_code.HUMANEVAL_STOPS, "    return 1"),  # the earliest one
        ("def f():\n    return 1\n# thought\n", eval_code.MBPP_STOPS, "def f():\n    return 1\n# thought\n"),
        ("def f():\n    return 1\nassert f()", eval_code.MBPP_STOPS, "def f():\n    return 1"),
        ("x = 1\n```\ny", eval_code.MBPP_STOPS, "x = 1"),
        ("print(1)", eval_code.HUMANEVAL_STOPS, "print(1)"),  # the newline is the prompt's
        ("x<file_sep>y", eval_code.HUMANEVAL_STOPS, "x"),
        ("", eval_code.HUMANEVAL_STOPS, ""),
        ("\nclass A", eval_code.HUMANEVAL_STOPS, ""),
        ("x\ndef", (), "x\ndef"),
    ],
)
def test_stop_words(completion, stop_words, kept):
    assert eval_code.cut(completion, stop_words) == kept


# ---------------------------------------------------------------- pass@k and the report


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
            share = sum(map(any, subsets)) / len(subsets)
            assert eval_code.pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)
    assert eval_code.pass_at_k(200, 1, 100) == pytest.approx(0.5)


def test_summary_keeps_greedy_and_sampled_apart():
    def record(task, temperature, passed):
        known = {"benchmark": "mbpp", "task_id": task, "temperature": temperature}
        return known | {"passed": passed, "truncated": passed}

    records = [record("a", 0.0, True), record("b", 0.0, False)]
    records += [record("a", 0.6, False)] * 2 + [record("b", 0.6, True), record("b", 0.6, False)]
    expected = {"problems": 2, "pass@1": 0.5, "pass@2": 0.5, "truncated": 2 / 6}
    assert eval_code.summarise(records, (1, 2, 5), {}) == pytest.approx(expected)
    assert eval_code.summarise(records[2:], (1,), {})["pass@1"] == 0.25  # no greedy sample: the estimate


def test_table_has_the_shape_of_table_1():
    results = {
        "mbpp": {"pass@1": 0.5, "pass@5": 0.75},
        "humaneval": {"pass@1": 0.25, "pass@5": 0.25},
        "humaneval_cut": {"pass@1": 0.125},
    }
    lines = eval_code.table(results, "m", (1, 5)).splitlines()
    assert lines[0].split() == ["HumanEval", "MBPP", "Avg."]
    assert lines[1].split() == ["p@1", "p@5"] * 3
    assert lines[2].split() == ["m", "25.0", "25.0", "50.0", "75.0", "37.5", "50.0"]
    assert lines[3].split() == ["cut", "at", "\\n#", "12.5", "-", "50.0", "75.0", "31.2", "-"]
    assert lines[2].index("25.0") == lines[0].index("HumanEval") == lines[3].index("12.5")


# ---------------------------------------------------------------- --samples


def contest(ratings, points=(500, 1000)):
    """Participant k has solved the first problem if k is even, else nothing."""
    rows = [{"party": {"members": [{"handle": f"h{k}"}]}, "points": 500 * (k % 2 == 0), "penalty": 0}
            for k in range(len(ratings))]  # fmt: skip
    problems = [{"index": index, "points": p} for index, p in zip("AB", points)]
    changes = [{"handle": f"h{k}", "oldRating": rating} for k, rating in enumerate(ratings)]
    changes.append({"handle": "not in the standings", "oldRating": 4000})
    return {"standings": {"result": {"rows": rows, "problems": problems}}, "rating_changes": {"result": changes}}


def test_codeforces_rating():
    ratings = [1000 + 2 * k for k in range(400)]
    contests = {"7": contest(ratings), "8": contest(ratings[:200]), "9": contest(ratings)}

    def expected(better):
        """The rating r at which sum_k P(k beats r) = better, by search over all whole ratings."""
        beats = [sum(1 / (1 + 10 ** ((r - rating) / 400)) for rating in ratings) for r in range(2000)]
        return min(range(2000), key=lambda r: abs(beats[r] - better))

    rate = eval_code.codeforces_rating
    # both problems: nobody is as good; the first at the first attempt: the 200 even ones are; nothing: all are
    assert rate({"7A": [True], "7B": [False, True]}, contests) > 1890
    assert abs(rate({"7A": [True], "7B": [False]}, contests) - expected(200)) <= 1
    assert rate({"7A": [False], "7B": [False]}, contests) == 0
    # a failed attempt costs 50 points, and 450 are less than 500 and more than 0
    assert abs(rate({"7A": [False, True]}, contests) - expected(200)) <= 1
    one, both = rate({"7A": [True]}, contests), rate({"7A": [True], "9A": [True], "9B": [True]}, contests)
    assert both == pytest.approx((one + rate({"9A": [True], "9B": [True]}, contests)) / 2)
    assert math.isnan(rate({"8A": [True], "x": [True]}, contests))  # 200 participants are too few


def test_human_eval_format(tmp_path):
    rows = [HUMANEVAL, HUMANEVAL | {"task_id": "HumanEval/1"}]
    texts = (ADD_BODY, "    return 0\n", ADD_BODY)
    samples = [{"task_id": "HumanEval/0", "completion": text} for text in texts]
    samples += [{"task_id": "HumanEval/1", "completion": "    return 0\n"}] * 3
    results = score(tmp_path, "humaneval", rows, samples, k=(1, 2), workers=1)
    assert results["humaneval"] == pytest.approx({"problems": 2, "pass@1": 1 / 3, "pass@2": 0.5})


def test_one_file_is_judged_by_two_benchmarks(tmp_path):
    """HumanEval+ has HumanEval's tasks, so the same samples are scored on both, as evalplus does."""
    rows = write_rows(tmp_path / "rows.jsonl", [HUMANEVAL])
    strict = HUMANEVAL["test"] + "    assert candidate(0.5, 0) == 0.5\n"
    plus = write_rows(tmp_path / "plus.jsonl", [HUMANEVAL | {"test": strict}])
    file = write_rows(tmp_path / "file.jsonl", [{"task_id": "HumanEval/0", "completion": "    return int(a + b)\n"}])
    benchmarks = (f"humaneval={rows}", f"humanevalplus={plus}")
    eval_code.main(Args(benchmarks=benchmarks, samples=file, output_dir=str(tmp_path / "out"), workers=1))
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [results[name]["pass@1"] for name in ("humaneval", "humanevalplus")] == [1.0, 0.0]


@pytest.mark.parametrize("task_id", ["Mbpp/11", "11", 11])
def test_evalplus_format(tmp_path, task_id):
    samples = [{"task_id": task_id, "solution": "def add(a, b):\n    return a + b\n", "_identifier": "x"}]
    assert score(tmp_path, "mbpp+", [MBPP_PLUS], samples, workers=1)["mbppplus"]["pass@1"] == 1.0


def test_thoughts_are_counted_both_ways(tmp_path):
    samples = [{"task_id": "HumanEval/0", "completion": "    c = a + b\n# give it back\n    return c\n"}]
    results = score(tmp_path, "humaneval", [HUMANEVAL], samples, thoughts=True, workers=1)
    assert (results["humaneval"]["pass@1"], results["humaneval_cut"]["pass@1"]) == (1.0, 0.0)


def test_samples_of_an_evaluation_score_the_same(finished, tmp_path):
    args = dataclasses.replace(
        Args(**SMALL), samples=str(finished / "samples.jsonl"), output_dir=str(tmp_path)
    )
    eval_code.main(args)
    again, before = (json.loads((folder / "results.json").read_text()) for folder in (tmp_path, finished))
    del before["humaneval"]["truncated"]
    assert again == before


# ---------------------------------------------------------------- sampling


def test_choose_tokens_draws_the_top_p_part():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 6, generator=generator)
    temperature, top_p, draws = 0.6, 0.9, 20000
    order = sorted(range(6), key=lambda token: -logits[0, token].item())
    probs, kept, total = (logits[0].double() / temperature).softmax(-1), [], 0.0
    for token in order:  # the definition: most likely first, until they have top_p together
        if total >= top_p:
            break
        kept.append(token)
        total += probs[token].item()
    assert 1 < len(kept) < 6
    noise = (torch.arange(draws) + 0.5) / draws
    temperatures = torch.full((draws,), temperature)
    tokens = eval_code.choose_tokens(logits.expand(draws, -1), noise, temperatures, top_p)
    shares = torch.bincount(tokens, minlength=6).double() / draws
    expected = torch.tensor([probs[token] / total if token in kept else 0.0 for token in range(6)])
    assert torch.allclose(shares, expected.double(), atol=2e-4)
    greedy = eval_code.choose_tokens(logits.expand(3, -1), torch.rand(3), torch.tensor([0.0, 0.6, 0.0]), 1e-9)
    assert greedy.tolist() == [logits.argmax().item()] * 3  # of a tiny top-p part only the first is left


def generate(tiny, problems: list[Problem], temperatures=(0.0, 0.7), batch_size=64, **options) -> dict:
    model, tokenizer = tiny
    args = Args(**SMALL | options)
    jobs = []
    for problem in problems:
        for number, temperature in enumerate(temperatures):
            known = {"benchmark": "humaneval", "task_id": problem.task_id}
            jobs.append((problem, known | {"temperature": temperature, "sample": number}))
    for start in range(0, len(jobs), batch_size):
        eos = modeling.eos_ids(tokenizer, MODEL)
        eval_code.complete(model, tokenizer, eos, jobs[start : start + batch_size], args)
    return {key(sample): (sample["completion"], sample["truncated"]) for _, sample in jobs}


def prompts_of_all_lengths(count: int) -> list[Problem]:
    problems = eval_code.load_problems(Args(benchmarks=(PROBLEMS,), limit=count))
    for index, problem in enumerate(problems):
        problem.prompt = "# " + "a b " * 7 * (index % 3) + "\n" + problem.prompt
    return problems


def test_samples_do_not_depend_on_their_batch(tiny):
    problems = prompts_of_all_lengths(5)
    together = generate(tiny, problems)
    assert len({completion for completion, _ in together.values()}) > 5
    assert generate(tiny, problems, batch_size=1) == together
    assert generate(tiny, problems[::-1], batch_size=3) == together
    assert generate(tiny, problems, seed=1) != together


def test_cached_generation_equals_a_plain_forward(tiny):
    model, tokenizer = tiny
    problems = prompts_of_all_lengths(4)
    batch = generate(tiny, problems, temperatures=(0.0,))
    for problem in problems:
        ids = prompt = tokenizer(problem.prompt).input_ids
        for _ in range(SMALL["max_new_tokens"]):
            with torch.no_grad():
                token = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item()
            if token == tokenizer.eos_token_id:
                break
            ids = ids + [token]
        text = eval_code.cut(tokenizer.decode(ids)[len(tokenizer.decode(prompt)) :], problem.stop_words)
        assert batch["humaneval", problem.task_id, 0.0, 0][0] == text


def test_left_padding_shifts_no_position(tiny, monkeypatch):
    model, tokenizer = tiny
    seen = []

    def spy(module, args, kwargs):
        seen.append((kwargs["position_ids"], kwargs["attention_mask"]))

    handle = model.register_forward_pre_hook(spy, with_kwargs=True)
    problems = prompts_of_all_lengths(3)
    generate(tiny, problems, temperatures=(0.0,), max_new_tokens=2)
    handle.remove()
    lengths = [len(tokenizer(problem.prompt).input_ids) for problem in problems]
    assert len(set(lengths)) > 1
    for row, length in enumerate(lengths):
        assert seen[0][0][row, -length:].tolist() == list(range(length))
        assert seen[0][1][row].tolist() == [0] * (max(lengths) - length) + [1] * length
        assert seen[1][0][row].tolist() == [length]


def test_stop_words_end_generation_early(tiny, monkeypatch):
    steps, choose = [], eval_code.choose_tokens
    monkeypatch.setattr(eval_code, "choose_tokens", lambda *args: steps.append(1) or choose(*args))
    problems = prompts_of_all_lengths(3)
    for problem in problems:
        problem.stop_words = ("\n",)
    samples = generate(tiny, problems, max_new_tokens=200)
    assert all("\n" not in completion and not truncated for completion, truncated in samples.values())
    assert len(steps) <= 64
    cut_short = generate(tiny, problems, max_new_tokens=2)
    assert all(truncated for _, truncated in cut_short.values())


def test_thoughts_leave_the_stop_word_out(tiny, monkeypatch):
    _, tokenizer = tiny
    script = tokenizer("    x = 1\n# so\n    return x\nclass A:\n").input_ids + [tokenizer.eos_token_id] * 99
    monkeypatch.setattr(modeling, "uniforms", lambda shape, *key: torch.arange(shape[0]).float())
    monkeypatch.setattr(
        eval_code, "choose_tokens", lambda logits, step, *_: torch.tensor(script)[step.long()]
    )
    [problem] = prompts_of_all_lengths(1)
    for thoughts, expected in ((True, "    x = 1\n# so\n    return x"), (False, "    x = 1")):
        [(completion, _)] = generate(tiny, [problem], temperatures=(0.0,), thoughts=thoughts).values()
        assert completion == expected


def test_the_cut_count_is_that_of_an_evaluation_without_thoughts(tmp_path, monkeypatch):
    """The embedded model writes no thought at column 0, so a line that it does write stands for one."""
    monkeypatch.setattr(eval_code, "THOUGHT_STOP", "\n    return")
    monkeypatch.setattr(eval_code, "HUMANEVAL_STOPS", (*eval_code.HUMANEVAL_STOPS, "\n    return"))
    folders = {thoughts: tmp_path / str(thoughts) for thoughts in (False, True)}
    for thoughts, folder in folders.items():
        eval_code.main(Args(**SMALL, thoughts=thoughts, output_dir=str(folder)))
    plain, thinking = (read_lines(folder) for folder in folders.values())
    assert plain.keys() == thinking.keys() and len(plain) == 5 * 4
    for name, sample in thinking.items():
        shorter = eval_code.cut(sample["completion"], [eval_code.THOUGHT_STOP])
        assert (shorter, sample["passed_cut"]) == (plain[name]["completion"], plain[name]["passed"])
    assert any(sample["passed"] and not sample["passed_cut"] for sample in thinking.values())
    expected, results = (json.loads((folder / "results.json").read_text()) for folder in folders.values())
    assert results.keys() == {"humaneval", "humaneval_cut"}
    for name in ("pass@1", "pass@2"):
        assert results["humaneval_cut"][name] == expected["humaneval"][name]


# ---------------------------------------------------------------- the program


PROGRAM, ENVIRONMENT = str(ROOT / "eval_code.py"), os.environ | {"OMP_NUM_THREADS": "1"}


def test_two_ranks_give_the_samples_of_one(finished, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        PROGRAM,
        *FLAGS,
    ]
    process = subprocess.Popen([*command, f"--output-dir={tmp_path / 'out'}"], env=ENVIRONMENT)
    try:
        assert process.wait(timeout=900) == 0
    finally:
        process.terminate()  # the launcher ends its ranks
    assert completions(tmp_path / "out") == completions(finished)
    assert (tmp_path / "out/results.json").read_text() == (finished / "results.json").read_text()


def test_ctrl_c_leaves_no_process_and_no_folder(tmp_path):
    rows, temporary = write_rows(tmp_path / "rows.jsonl", [HUMANEVAL]), tmp_path / "temporary"
    temporary.mkdir()
    endless = [{"task_id": "HumanEval/0", "completion": f"    while True: {i}\n"} for i in range(60)]
    file = write_rows(tmp_path / "file.jsonl", endless)
    command = [sys.executable, PROGRAM, f"--samples={file}", f"--benchmarks=humanevalplus={rows}", "--workers=2"]
    environment = ENVIRONMENT | {"TMPDIR": str(temporary)}
    process = subprocess.Popen([*command, f"--output-dir={tmp_path / 'out'}"], env=environment)

    def workers() -> list[bytes]:
        """Command lines of all processes, ours or orphans, that run in a folder of this test."""
        lines = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # it has just ended
                lines.append(path.read_bytes())
        return [line for line in lines if str(temporary).encode() in line]

    def wait_for(condition) -> bool:
        deadline = time.monotonic() + 120
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.1)
        return condition()

    try:
        assert wait_for(lambda: len(workers()) == 8)  # two shells, zygotes, testers and programs
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert wait_for(lambda: not workers()) and wait_for(lambda: not list(temporary.glob("sandbox-*")))
    finally:
        process.kill()


@pytest.mark.parametrize("kept", [0, 2, 5])
def test_a_killed_evaluation_goes_on(finished, tmp_path, kept, monkeypatch):
    """A batch has a file, or has none: a kill while one is written leaves another name behind."""
    (tmp_path / "batches").mkdir()
    names = sorted(path.name for path in (finished / "batches").iterdir())
    assert len(names) == 5  # five problems, four samples each, four in a batch
    for name in names[:kept]:
        (tmp_path / "batches" / name).write_bytes((finished / "batches" / name).read_bytes())
    if kept < 5:
        (tmp_path / "batches" / f".{names[kept]}.partial").write_text('{"torn')
    (tmp_path / "args.json").write_text((finished / "args.json").read_text())
    generated, complete = [], eval_code.complete
    monkeypatch.setattr(eval_code, "complete", lambda *args: generated.append(1) or complete(*args))
    eval_code.main(Args(**SMALL | {"workers": 2}, output_dir=str(tmp_path)))  # how fast it runs may change
    assert len(generated) == 5 - kept
    assert completions(tmp_path) == completions(finished)
    assert (tmp_path / "results.json").read_text() == (finished / "results.json").read_text()


def test_what_has_changed_under_its_name_is_not_taken_for_judged(tmp_path):
    wrong, right = ({"task_id": "HumanEval/0", "completion": text} for text in ("    pass\n", "    return a + b\n"))
    assert score(tmp_path, "humaneval", [HUMANEVAL], [wrong], k=(1,))["humaneval"]["pass@1"] == 0
    with pytest.raises(common.UserError, match="other arguments .contents: "):
        score(tmp_path, "humaneval", [HUMANEVAL], [right], k=(1,))
    changed = HUMANEVAL | {"test": HUMANEVAL["test"].replace("== 3", "== 4")}
    with pytest.raises(common.UserError, match="other arguments .contents: "):
        score(tmp_path, "humaneval", [changed], [wrong], k=(1,))


def test_a_finished_evaluation_is_only_reported_again(finished, monkeypatch, capsys):
    before = (finished / "samples.jsonl").read_text()
    monkeypatch.setattr(modeling, "load_model", None)
    eval_code.main(Args(**SMALL, output_dir=str(finished)))
    assert (finished / "samples.jsonl").read_text() == before
    assert "HumanEval" in capsys.readouterr().out


def test_other_arguments_are_refused(finished):
    with pytest.raises(common.UserError, match="other arguments .seed: 0 -> 3, temperature: 0.6 -> 0.8."):
        args = Args(**SMALL | {"temperature": 0.8, "seed": 3}, output_dir=str(finished))
        eval_code.main(args)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"benchmarks": ("humanevil",)}, "unknown benchmark humanevil; there are humaneval, mbpp, "),
        ({"benchmarks": ("mbpp=nowhere.jsonl",)}, "no such data file or folder: nowhere.jsonl"),
        ({"benchmarks": ("mbpp={empty}",)}, "{empty} holds no problem"),
        ({"benchmarks": ("mbpp={rows}",)}, "{rows}, row 0: no column 'test_list'; it has: task_id, prompt, "),
        ({"benchmarks": ("livecodebench={rows}",)}, "row 0: no column 'private_test_cases'; it has: task_id"),
        ({"benchmarks": ("humaneval={rows}", "humaneval={rows}")}, "task HumanEval/0 of humaneval is there twice"),
        ({"benchmarks": ("humaneval={broken}",)}, "{broken}, row 0: not a problem of humaneval"),
        ({"model": "{empty}"}, "cannot load the model|no tokenizer at"),
        ({"max_new_tokens": 1020}, "the longest prompt and --max-new-tokens take .* the model's context is 1024"),
        ({"n_samples": 1}, "pass@2 needs --n-samples 2"),
        ({"top_p": 0.0}, "--top-p must be positive"),
        ({"top_p": 1.5}, "--top-p is at most 1"),
        ({"k": (0, 1)}, "every --k at least 1"),
        ({"n_samples": -1}, "--n-samples must not be negative"),
        ({"samples": "{rows}"}, "{rows} has no column `completion`"),
        ({"samples": "{empty}"}, "{empty} has no sample of task HumanEval/0 of humaneval"),
        ({"samples": "{other}"}, "{other} has no sample of task HumanEval/0 of humaneval"),
    ],
)
def test_bad_input_is_said_in_one_line(tmp_path, options, message):
    files = {
        "rows": write_rows(tmp_path / "rows.jsonl", [HUMANEVAL]),
        "empty": write_rows(tmp_path / "empty.jsonl", []),
        "broken": write_rows(tmp_path / "broken.jsonl", [[1]]),
        "other": write_rows(tmp_path / "other.jsonl", [{"task_id": "Mbpp/0", "completion": ""}]),
    }
    options = {"benchmarks": ("humaneval={rows}",)} | options
    for name, value in options.items():
        if isinstance(value, str):
            options[name] = value.format(**files)
    options["benchmarks"] = tuple(spec.format(**files) for spec in options["benchmarks"])
    with pytest.raises(common.UserError, match=message.format(**files)) as caught:
        eval_code.main(Args(**SMALL | options, output_dir=str(tmp_path / "out")))
    assert "\n" not in str(caught.value)


def test_exit_code_of_bad_input(monkeypatch, capsys):
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as caught:
        common.launch(eval_code.main, Args(benchmarks=("humanevil",)))
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert said.startswith("error: unknown benchmark humanevil") and said.count("\n") == 1
