"""Programs per second of `run_tests` against a plain `subprocess [python, -c, program + tests]` per program.

    python benchmarks/sandbox.py                      # generated programs
    python benchmarks/sandbox.py --mbpp mbpp.jsonl    # MBPP's reference solutions as well

Both run with the same number of workers. The rounds are interleaved, so that a busy machine is busy for both,
and the median round counts. The plain subprocess has none of the protections.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sandbox import run_tests  # noqa: E402

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


def generated(count, fresh):
    """Programs that differ in a comment, so that none is run once for several; a third of them fails."""
    asserts, scripts = [], []
    for number, (code, tests) in zip(range(count), itertools.cycle(SOLUTIONS.values())):
        code = code.replace("return", "return None and") if number % 3 == 2 else code
        asserts.append({"code": code + f"\n# {fresh} {number}", "tests": tests})
        cases = [{"input": STDIN[1], "output": STDIN[2]}]
        scripts.append({"code": STDIN[0] + f"\n# {fresh} {number}", "cases": cases})
    return {"asserts": asserts, "stdin": scripts}


def mbpp(path, fresh):
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    slow = {123, 367}  # one computes for seconds, one needs its setup code
    return [{"code": row["code"] + f"\n# {fresh}", "tests": "\n".join(row["test_list"])}
            for row in rows if 11 <= row["task_id"] <= 510 and row["task_id"] not in slow]


def plain(program, timeout_s):
    """The usual short way: tests after the program; the exit status, or what is printed, is the verdict."""
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--programs", type=int, default=200, help="generated programs of each kind a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds a program may take")
    parser.add_argument("--mbpp", help="MBPP as a .jsonl file with the hub's columns")
    args = parser.parse_args()

    run_tests(generated(2 * args.workers, "warm")["asserts"], workers=args.workers)  # the workers start
    rates, verdicts = {}, {}
    for number in range(args.rounds):
        sets = generated(args.programs, number) | ({"mbpp": mbpp(args.mbpp, number)} if args.mbpp else {})
        for name, programs in sets.items():
            start = time.perf_counter()
            ours = run_tests(programs, timeout_s=args.timeout, workers=args.workers)
            middle = time.perf_counter()
            with ThreadPoolExecutor(args.workers) as pool:
                theirs = list(pool.map(plain, programs, [args.timeout] * len(programs)))
            end = time.perf_counter()
            rate = len(programs) / (middle - start), len(programs) / (end - middle)
            rates.setdefault(name, []).append(rate)
            verdicts[name] = sum(found["passed"] for found in ours), sum(theirs), len(programs)

    print(f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, Linux "
          f"{platform.release()}, Python {platform.python_version()}, {args.workers} workers, "
          f"median of {args.rounds} rounds")
    print(f"{'programs':10}{'sandbox /s':>12}{'subprocess /s':>15}{'ratio':>8}   passed (both ways, and of)")
    for name, pairs in rates.items():
        ours, theirs = (statistics.median(side) for side in zip(*pairs))
        print(f"{name:10}{ours:12.0f}{theirs:15.0f}{ours / theirs:8.1f}   {verdicts[name]}")


if __name__ == "__main__":
    main()
