import base64
import dataclasses
import gzip
import itertools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import types
import zlib
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

import common
import eval_code
from eval_code import Args, Problem

ROOT = Path(eval_code.__file__).parent
MODEL, PROBLEMS = str(common.TINY / "code" / "model"), f"humaneval={common.TINY / 'code' / 'humaneval.jsonl'}"
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
    tokenizer = common.load_tokenizer(MODEL)
    return common.load_model(MODEL, tokenizer, common.setup(0), longest=0, train=False), tokenizer


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
MBPP_SANITIZED = {
    "source_file": "x.ipynb",
    "task_id": 11,
    "prompt": MBPP["text"],
    "code": MBPP["code"],
    "test_imports": ["from math import tau"],
    "test_list": ["assert add(tau, 0) == tau", "assert add(1, 1) == 2"],
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
        ("mbpp", MBPP_SANITIZED, "def add(a, b):\n    return a + b\n", "def add(a, b):\n    return 3\n"),
        ("mbppplus", MBPP_PLUS, "def add(a, b):\n    return a + b\n", "def add(a, b):\n    return a\n"),
        ("livecodebench", lcb_row(True, True), "        return sum(xs) + y\n", "        return 4\n"),
        ("livecodebench", lcb_row(True, False), "        return sum(xs) + y\n", "        return 4\n"),
        ("livecodebench", lcb_row(False, True), "    print(sum(map(int, input().split())))", "    print(3)"),
        ("livecodebench", lcb_row(True, True) | {"contest_date": None}, "        return sum(xs) + y\n", "        return 4\n"),
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
        [problem], _ = eval_code.load_problems(args)
    records = [(problem, {"completion": text}) for text in (right, wrong)]
    eval_code.judge(records, tmp_path / "batch.jsonl", args)
    verdicts = [json.loads(line) for line in (tmp_path / "batch.jsonl").read_text().splitlines()]
    assert {v["completion"]: v["passed"] for v in verdicts} == {right: True, wrong: False}, verdicts


def test_tests_as_a_list_and_names_with_plus(tmp_path):
    row = CODEFORCES | {"tests": json.loads(CODEFORCES["tests"]), "id": "4/A"}
    codeforces = write_rows(tmp_path / "codeforces.jsonl", [row])
    humaneval = write_rows(tmp_path / "humaneval.jsonl", [HUMANEVAL])
    args = Args(benchmarks=(f"codeforces={codeforces}", f"HumanEval+={humaneval}"))
    (first, second), _ = eval_code.load_problems(args)
    assert (first.benchmark, first.task_id, len(first.checks["cases"])) == ("codeforces", "4/A", 4)
    assert (second.benchmark, second.checks["timeout_s"]) == ("humanevalplus", 20)


def test_both_mbpp_prompts():
    test_0, test_1 = MBPP["test_list"][:2]
    problem = eval_code.mbpp_problem(MBPP, Args(mbpp_prompt="bigcode"))
    assert problem.prompt == f'"""\nWrite a function to add two numbers.\n{test_0}\n"""\n'
    assert problem.opening == "" and "\ndef" not in problem.stop_words
    assert problem.checks["entry_point"] == "add"  # the function that the tests call, not the first one
    problem = eval_code.mbpp_problem(MBPP, Args())
    expected = ["def add(a,b):", f'    """ {MBPP["text"]}', f"    {test_0}", f"    {test_1}", '    """', ""]
    assert problem.prompt == problem.opening == "\n".join(expected)
    assert problem.checks["entry_point"] == "add" and "\ndef" in problem.stop_words


def test_contest_prompts_are_those_of_training():
    import grpo_rlvr

    for row in (lcb_row(True, False), lcb_row(False, False)):
        signature = row["starter_code"].rstrip() or "def main():"
        prompt = grpo_rlvr.CODE_PROMPT.format(question=row["question_content"], signature=signature)
        assert eval_code.contest_problem(row, Args()).prompt == prompt


def test_a_completion_cannot_redefine_what_the_tests_call(tmp_path):
    """As in HumanEval 32, 38 and 50, whose tests call a helper of the prompt."""
    helper = "def double(x):\n    return 2 * x\n\n\n"
    row = HUMANEVAL | {
        "prompt": helper + "def half(x):\n",  # no statement yet: the completion is the body
        "entry_point": "half",
        "test": "def check(candidate):\n    assert double(candidate(6)) == 6\n",
    }
    texts = {"right": "    return x // 2\n", "forged": "    return 0\n\n\ndef double(x):\n    return 6\n"}
    rows = [row | {"task_id": name} for name in texts]
    samples = [{"task_id": name, "completion": text} for name, text in texts.items()]
    score(tmp_path, "humaneval", rows, samples, workers=1)
    verdicts = {sample["task_id"]: sample["passed"] for sample in read_lines(tmp_path / "out").values()}
    assert verdicts == {"right": True, "forged": False}


def test_titles_and_labels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write_rows(tmp_path / "humaneval.jsonl", [HUMANEVAL])
    _, titles = eval_code.load_problems(Args(benchmarks=(f"humaneval={file}",)))
    assert titles == {"humaneval": "humaneval.jsonl"}  # of a local file its path, from here
    _, titles = eval_code.load_problems(Args(benchmarks=(PROBLEMS,), limit=1))
    assert titles == {"humaneval": "tiny/code/humaneval.jsonl"}
    run, short_path = "ra3_ra3__model__s0__20261130-041500/checkpoints/em_001", eval_code.short_path
    assert short_path(f"{tmp_path}/runs/{run}") == short_path(f"runs/{run}/") == run
    assert short_path("Qwen/Qwen2.5-1.5B") == "Qwen/Qwen2.5-1.5B"


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
    assert eval_code.summarise(records, (1, 2, 5)) == pytest.approx(expected)
    assert eval_code.summarise(records[2:], (1,))["pass@1"] == 0.25  # no greedy sample: the estimate
    some = [*records[:1], *records[2:]]  # only `a` has a greedy sample: `b` counts as well
    assert eval_code.summarise(some, (1,))["pass@1"] == (1.0 + 0.5) / 2


def test_table_has_the_shape_of_table_1():
    results = {
        "humaneval": {"problems": 164, "pass@1": 0.25, "pass@5": 0.25},
        "mbpp": {"problems": 3, "pass@1": 0.5, "pass@5": 0.75},
    }
    titles = {"humaneval": "HumanEval", "mbpp": "tiny/mbpp.jsonl"}
    lines = eval_code.table(results, titles, "run/em_001").splitlines()
    assert lines[0].split() == ["HumanEval", "(164)", "tiny/mbpp.jsonl", "(3)", "Avg."]
    assert lines[1].split() == ["p@1", "p@5"] * 3
    assert lines[2].split() == ["run/em_001", "25.0", "25.0", "50.0", "75.0", "37.5", "50.0"]
    assert lines[2].index("25.0") == lines[1].index("p@1") == lines[0].index("HumanEval")
    del results["mbpp"]["pass@5"]
    lines = eval_code.table(results, titles, "m").splitlines()
    assert lines[2].split() == ["m", "25.0", "25.0", "50.0", "-", "37.5", "-"]
    assert "Avg." not in eval_code.table({"mbpp": results["mbpp"]}, titles, "m")
    same = {"humaneval": results["humaneval"], "humanevalplus": results["humaneval"]}  # two readings of one file
    lines = eval_code.table(same, dict.fromkeys(same, "f.jsonl"), "m").splitlines()
    assert lines[0].split() == ["f.jsonl", "(164)", "f.jsonl", "(164)", "Avg."]


# ---------------------------------------------------------------- --samples


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


def test_a_file_that_lacks_tasks_is_scored_only_if_asked(tmp_path):
    rows = [HUMANEVAL, HUMANEVAL | {"task_id": "HumanEval/1"}]
    samples = [{"task_id": "HumanEval/1", "completion": ADD_BODY}]
    with pytest.raises(common.UserError, match="no sample of 1 of 2 tasks .HumanEval/0 of .*--partial"):
        score(tmp_path, "humaneval", rows, samples, workers=1)
    results = score(tmp_path, "humaneval", rows, samples, workers=1, partial=True)
    assert results["humaneval"] == {"problems": 1, "pass@1": 1.0}


def test_a_benchmark_without_a_sample_is_left_out(tmp_path):
    rows = {"humaneval": HUMANEVAL, "mbpp": MBPP}
    specs = tuple(f"{name}={write_rows(tmp_path / name, [row])}" for name, row in rows.items())
    samples = write_rows(tmp_path / "file.jsonl", [{"task_id": "HumanEval/0", "completion": ADD_BODY}])
    eval_code.main(Args(benchmarks=specs, samples=samples, partial=True, workers=1, output_dir=str(tmp_path / "out")))
    assert list(json.loads((tmp_path / "out" / "results.json").read_text())) == ["humaneval"]


def test_what_is_null_or_empty_in_samples(tmp_path, capsys):
    """A table of mixed rows has nulls for `completion` or `solution`; a null completion is an empty one."""
    rows = [HUMANEVAL | {"task_id": f"HumanEval/{number}"} for number in range(5)]
    samples = [
        {"task_id": "HumanEval/0", "completion": ADD_BODY, "solution": None},
        {"task_id": "HumanEval/1", "completion": None, "solution": HUMANEVAL["prompt"] + ADD_BODY},
        {"task_id": "HumanEval/2", "completion": None, "solution": None},
        {"task_id": "HumanEval/3", "completion": "\ud83d"},
        {"task_id": "HumanEval/4", "solution": ""},
    ]
    assert score(tmp_path, "humaneval", rows, samples, workers=1)["humaneval"]["pass@1"] == 0.4
    assert "HumanEval/3: exception: SyntaxError" in capsys.readouterr().out  # half of a character is printed as ?


def test_files_are_read_as_utf_8(tmp_path):
    """Whatever the locale: in the C locale, Python opens text files as ASCII unless told otherwise."""
    row = HUMANEVAL | {"prompt": 'def add(a, b):\n    """Größe ≤ ∞"""\n'}
    paths = [tmp_path / "rows.jsonl", tmp_path / "file.jsonl"]
    for path, line in zip(paths, (row, {"task_id": "HumanEval/0", "completion": "    # ≤\n" + ADD_BODY})):
        path.write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    command = [sys.executable, "-X", "utf8=0", PROGRAM, f"--benchmarks=humaneval={paths[0]}", f"--samples={paths[1]}"]
    environment = ENVIRONMENT | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "utf-8"}
    subprocess.run([*command, "--workers=1", f"--output-dir={tmp_path / 'out'}"], env=environment, check=True)
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["humaneval"] == {"problems": 1, "pass@1": 1.0}


def test_samples_of_an_evaluation_score_the_same(finished, tmp_path):
    args = dataclasses.replace(
        Args(**SMALL), samples=str(finished / "samples.jsonl"), output_dir=str(tmp_path)
    )
    eval_code.main(args)
    again, before = (json.loads((folder / "results.json").read_text()) for folder in (tmp_path, finished))
    del before["humaneval"]["truncated"]
    assert again == before


# ---------------------------------------------------------------- sampling


def top_p_part(probs: list[float], top_p: float) -> set[int]:
    """By the definition: the most likely tokens, until they have top_p together."""
    kept, total = set(), 0.0
    for token in sorted(range(len(probs)), key=lambda token: -probs[token]):
        if total >= top_p:
            break
        kept.add(token)
        total += probs[token]
    return kept


def test_first_tokens_have_the_distribution_of_the_top_p_part(tiny, monkeypatch):
    """Noise 0, 1/n, 2/n ... draws each token as often as its probability says."""
    model, tokenizer = tiny
    [problem] = prompts_of_all_lengths(1)
    problem.prompt, temperature, top_p, draws = "def solve(xs):\n    return", 1.3, 0.9, 2000
    problem.prompt_ids = eval_code.encode(tokenizer, problem.prompt)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([problem.prompt_ids])).logits[0, -1]
    probs = (logits.double() / temperature).softmax(-1)
    kept = sorted(top_p_part(probs.tolist(), top_p))
    assert 1 < len(kept) < len(probs) / 2
    drawn = []

    class Noted(common.Sampler):
        def __call__(self, input_ids, scores):
            chosen = super().__call__(input_ids, scores)
            drawn.append(chosen.argmax(-1))
            return chosen

    monkeypatch.setattr(eval_code, "Sampler", Noted)
    monkeypatch.setattr(eval_code, "uniforms", lambda shape, *key: torch.full(shape, (key[-1] + 0.5) / draws))
    generate(tiny, [problem], {temperature: draws}, draws, top_p=top_p, max_new_tokens=1)
    shares = torch.bincount(drawn[0], minlength=len(probs)).double() / draws
    expected = torch.zeros_like(probs).index_copy(0, torch.tensor(kept), probs[kept] / probs[kept].sum())
    assert torch.allclose(shares, expected, atol=1 / draws)
    drawn.clear()
    generate(tiny, [problem], {0.0: 3}, top_p=1e-9, max_new_tokens=1)
    assert drawn[0].tolist() == [logits.argmax().item()] * 3


def generate(tiny, problems: list[Problem], draws=None, batch_size=64, **options) -> dict:
    """draws: temperature -> how many samples of each problem."""
    model, tokenizer = tiny
    args, done = Args(**SMALL | options), {}
    for problem in problems:
        problem.prompt_ids = eval_code.encode(tokenizer, problem.prompt)
    for temperature, count in (draws or {0.0: 1, 0.7: 1}).items():
        known = {"benchmark": "humaneval", "temperature": temperature}
        jobs = [(p, known | {"task_id": p.task_id, "sample": number}) for p in problems for number in range(count)]
        for start in range(0, len(jobs), batch_size):
            batch, eos = jobs[start : start + batch_size], common.eos_ids(tokenizer, MODEL)
            eval_code.complete(model, tokenizer, eos, batch, args)
        done |= {key(sample): (sample["completion"], sample["truncated"]) for _, sample in jobs}
    return done


def prompts_of_all_lengths(count: int) -> list[Problem]:
    problems, _ = eval_code.load_problems(Args(benchmarks=(PROBLEMS,), limit=count))
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
    batch = generate(tiny, problems, {0.0: 1})
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


def test_left_padding_shifts_no_position(tiny):
    model, tokenizer = tiny
    seen = []

    def spy(module, args, kwargs):
        seen.append((kwargs["position_ids"], kwargs["attention_mask"]))

    handle = model.get_decoder().register_forward_pre_hook(spy, with_kwargs=True)
    problems = prompts_of_all_lengths(3)
    generate(tiny, problems, {0.0: 1}, max_new_tokens=2)
    handle.remove()
    lengths = [len(tokenizer(problem.prompt).input_ids) for problem in problems]
    assert len(set(lengths)) > 1 and len(seen) == 3  # all but the last token of the prompts, it, the first new one
    for row, length in enumerate(lengths):
        assert seen[0][0][row, 1 - length :].tolist() == list(range(length - 1))
        assert seen[0][1][row].tolist() == [0] * (max(lengths) - length) + [1] * (length - 1)
        assert seen[1][0][row].tolist() == [length - 1]
        assert seen[2][0][row].tolist() == [length]


def test_a_prompt_is_read_once_and_ended_rows_leave(tiny):
    decoder = tiny[0].get_decoder()
    sizes = []
    handle = decoder.register_forward_pre_hook(lambda *call: sizes.append(tuple(call[2]["input_ids"].shape)), with_kwargs=True)
    problems = prompts_of_all_lengths(3)
    problems[0].stop_words = ("\n",)
    samples = generate(tiny, problems, {0.7: 4}, max_new_tokens=64)
    handle.remove()
    assert sizes[0][0] == 3 and sizes[1] == (12, 1)  # three prompts, twelve samples
    assert len(sizes) > 1 + eval_code.CHUNK and sizes[-1][0] <= 8
    assert [rows for rows, _ in sizes[1:]] == sorted((rows for rows, _ in sizes[1:]), reverse=True)
    alone = generate(tiny, problems[1:], {0.7: 4}, max_new_tokens=64)
    assert all(samples[name] == alone[name] for name in alone)  # those that stay are what they would have been


def test_stop_words_end_generation_early(tiny):
    steps = []
    handle = tiny[0].register_forward_pre_hook(lambda *call: steps.append(1))
    problems = prompts_of_all_lengths(3)
    for problem in problems:
        problem.stop_words = ("\n",)
    samples = generate(tiny, problems, max_new_tokens=200)
    handle.remove()
    assert all("\n" not in completion and not truncated for completion, truncated in samples.values())
    assert len(steps) <= 2 * 64
    cut_short = generate(tiny, problems, max_new_tokens=2)
    assert all(truncated for _, truncated in cut_short.values())


def test_thoughts_leave_the_stop_word_out():
    for thoughts, kept in ((True, "    x = 1\n# so\n    return x"), (False, "    x = 1")):
        problem = eval_code.humaneval_problem(HUMANEVAL, Args(thoughts=thoughts))
        assert eval_code.cut("    x = 1\n# so\n    return x\nclass A:\n", problem.stop_words) == kept


def test_a_prompt_never_ends_with_eos(tiny):
    _, tokenizer = tiny

    class AppendsEos:
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, text):
            return types.SimpleNamespace(input_ids=[*tokenizer(text).input_ids, self.eos_token_id])

    ids = tuple(tokenizer("def f():\n").input_ids)
    assert eval_code.encode(AppendsEos(), "def f():\n") == eval_code.encode(tokenizer, "def f():\n") == ids


# ---------------------------------------------------------------- the program


PROGRAM, ENVIRONMENT = str(ROOT / "eval_code.py"), os.environ | {"OMP_NUM_THREADS": "1"}


def test_two_ranks_give_the_samples_of_one(finished, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", PROGRAM, *FLAGS]
    process = subprocess.Popen([*command, f"--output-dir={tmp_path / 'out'}"], env=ENVIRONMENT)
    try:
        assert process.wait(timeout=900) == 0
    finally:
        process.terminate()  # the launcher ends its ranks
    assert completions(tmp_path / "out") == completions(finished)
    assert (tmp_path / "out/results.json").read_text() == (finished / "results.json").read_text()


def test_ctrl_c_does_not_wait_for_programs(tmp_path):
    """test_sandbox.py tests that the programs end, too."""
    rows = write_rows(tmp_path / "rows.jsonl", [HUMANEVAL])
    endless = [{"task_id": "HumanEval/0", "completion": f"    while True: {i}\n"} for i in range(60)]
    file = write_rows(tmp_path / "file.jsonl", endless)
    command = [sys.executable, PROGRAM, f"--samples={file}", f"--benchmarks=humanevalplus={rows}", "--workers=2"]
    command += [f"--output-dir={tmp_path / 'out'}"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    try:
        assert [process.stdout.readline().split()[0] for _ in range(2)] == ["data", "folder"]
        time.sleep(1)  # the programs run
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        process.kill()


@pytest.mark.parametrize("kept", [0, 2, 6])
def test_a_killed_evaluation_goes_on(finished, tmp_path, kept, monkeypatch):
    """A batch has a file, or has none: a kill while one is written leaves another name behind."""
    (tmp_path / "batches").mkdir()
    names = sorted(path.name for path in (finished / "batches").iterdir())
    assert len(names) == 6  # of five problems, five greedy samples and fifteen others, four in a batch
    for name in names[:kept]:
        (tmp_path / "batches" / name).write_bytes((finished / "batches" / name).read_bytes())
    if kept < 6:
        (tmp_path / "batches" / f".{names[kept]}.partial").write_text('{"torn')
    (tmp_path / "args.json").write_text((finished / "args.json").read_text())
    generated, complete = [], eval_code.complete
    monkeypatch.setattr(eval_code, "complete", lambda *args: generated.append(1) or complete(*args))
    eval_code.main(Args(**SMALL | {"workers": 2}, output_dir=str(tmp_path)))  # how fast it runs may change
    assert len(generated) == 6 - kept
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
    monkeypatch.setattr(eval_code, "load_model", None)
    eval_code.main(Args(**SMALL, output_dir=str(finished)))
    assert (finished / "samples.jsonl").read_text() == before
    said = capsys.readouterr().out
    assert "code/model" in said and "humaneval.jsonl (5)" in said and "0 of 20 completions" in said
    assert "HumanEval" not in said  # it is not that benchmark


def test_other_weights_under_the_same_name_are_refused(tmp_path):
    """A longer run exports its `checkpoints/final` once more."""
    shutil.copytree(eval_code.TINY_DEFAULTS.model, tmp_path / "model")
    args = Args(**SMALL | {"model": str(tmp_path / "model"), "n_samples": 0, "k": (1,)}, output_dir=str(tmp_path / "out"))
    eval_code.main(args)
    os.utime(tmp_path / "model" / "model.safetensors", (1, 1))
    with pytest.raises(common.UserError, match="other arguments .contents: "):
        eval_code.main(args)


def test_other_arguments_and_the_folder_of_a_run_are_refused(finished, tmp_path):
    (tmp_path / "checkpoints").mkdir()  # args.json is a run's there
    with pytest.raises(common.UserError, match="holds a training run; choose another --output-dir"):
        eval_code.main(Args(**SMALL, output_dir=str(tmp_path)))
    with pytest.raises(common.UserError, match="other arguments .seed: 0 -> 3, temperature: 0.6 -> 0.8."):
        args = Args(**SMALL | {"temperature": 0.8, "seed": 3}, output_dir=str(finished))
        eval_code.main(args)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"benchmarks": ("humanevil",)}, "unknown benchmark humanevil; there are humaneval, mbpp, "),
        ({"benchmarks": ("mbpp=nowhere.jsonl",)}, "no such data file or folder: nowhere.jsonl"),
        ({"benchmarks": ("mbpp={empty}",)}, "{empty} holds no problem"),
        ({"benchmarks": ("mbpp={rows}",)}, "{rows}, row 0: not a problem of mbpp .KeyError: 'test_list'.; it has: task_id, prompt, "),
        ({"benchmarks": ("livecodebench={rows}",)}, "not a problem of livecodebench .KeyError: 'question_content'.; it has: task_id"),
        ({"benchmarks": ("humaneval={twice}",)}, "{twice}, row 1: task HumanEval/0 of humaneval is there twice"),
        ({"benchmarks": ("humaneval={rows}", "humaneval={other}")}, "humaneval is named twice"),
        ({"benchmarks": ("humaneval={broken}",)}, "{broken}, row 0: not a problem of humaneval"),
        ({"model": "{empty}"}, "cannot load the model|no tokenizer at"),
        ({"max_new_tokens": 1020}, "a prompt and --max-new-tokens take .* takes 512"),
        ({"n_samples": 1}, "pass@2 needs --n-samples 2"),
        ({"top_p": 0.0}, "--top-p must be positive"),
        ({"top_p": 1.5}, "--top-p is at most 1"),
        ({"k": (0, 1)}, "every --k at least 1"),
        ({"k": ()}, "every --k at least 1"),
        ({"benchmarks": ()}, "--benchmarks needs a name"),
        ({"n_samples": -1}, "--n-samples must not be negative"),
        ({"samples": "{rows}"}, "{rows} has no column `completion`"),
        ({"samples": "{empty}"}, "{empty} has no sample of 1 of 1 tasks .HumanEval/0 of humaneval"),
        ({"samples": "{other}"}, "{other} has no sample of 1 of 1 tasks .HumanEval/0 of humaneval"),
    ],
)
def test_bad_input_is_said_in_one_line(tmp_path, options, message):
    files = {
        "rows": write_rows(tmp_path / "rows.jsonl", [HUMANEVAL]),
        "twice": write_rows(tmp_path / "twice.jsonl", [HUMANEVAL, HUMANEVAL]),
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
