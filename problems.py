"""Problems with a verifier: the rows of the public data sets, and the check of math answers.

    row -> code_problem, math_problem    the question, and what checks an answer
    MathVerifier                         runs math-verify; the counterpart of sandbox.run_tests

How a question becomes a prompt, and what is rewarded, is in grpo_rlvr.py.
"""

import inspect
import itertools
import json
import re
import select
import subprocess
import sys

from common import UserError, column

MAX_TESTS = 15  # DeepCoder's rule: those with the longest inputs


def parsed(value):
    """The data sets keep JSON in strings, some of it nested. {} if empty."""
    return json.loads(value) if isinstance(value, str) and value else value or {}


def code_problem(row: dict, source: str) -> tuple[str, dict]:
    """(question, checks) of a row of AReaL-boba-2 or DeepCoder; checks: cases, fn_name, signature.

    Without fn_name the program reads stdin; else a case's input is a JSON argument per line, or their list.
    """
    question = row["question"] if "question" in row else column(row, "problem", source)
    tests = parsed(row["input_output"] if "input_output" in row else column(row, "tests", source))
    if isinstance(tests, dict):  # boba-2, TACO
        about, pairs = tests, list(zip(tests["inputs"], tests["outputs"]))
    else:  # PrimeIntellect, LiveCodeBench, Codeforces
        about, pairs = tests[0] | parsed(tests[0].get("metadata")), [(t["input"], t["output"]) for t in tests]
    about = parsed(row.get("metadata")) | about
    fn_name = "" if about.get("testtype") == "stdin" else about.get("fn_name") or about.get("func_name") or ""
    if "testtype" not in about:  # LiveCodeBench's tests all stay
        pairs = sorted(pairs, key=lambda pair: len(str(pair[0])), reverse=True)[:MAX_TESTS]
    if not fn_name:  # TACO has lists of lines
        pairs = [["\n".join(map(str, x)) if isinstance(x, list) else x for x in pair] for pair in pairs]
    elif all(isinstance(wanted, list) and len(wanted) == 1 for _, wanted in pairs):  # and lists of one result
        pairs = [(given, wanted[0]) for given, wanted in pairs]
    cases = [{"input": given, "output": wanted} for given, wanted in pairs]
    return question, {"cases": cases, "fn_name": fn_name, "signature": code_signature(row, cases, fn_name)}


def code_signature(row: dict, cases: list[dict], fn_name: str) -> str:
    """What the model goes on from: given, or a solution's, or made up from the number of arguments."""
    if given := row.get("signature") or row.get("starter_code"):
        return given.rstrip()
    if not fn_name:
        return "def main():"  # so that a base model can complete it as well
    solutions = row.get("solutions") or []
    if isinstance(solutions, str):
        solutions = parsed(solutions) if solutions.startswith("[") else [solutions]
    for solution in solutions:
        if found := re.search(rf"def\s+{re.escape(fn_name)}\s*\(([^)]*)\)[^:\n]*:", solution):
            arguments = re.sub(r"^self\b,?\s*", "", " ".join(found[1].split()))  # of a method
            return f"def {fn_name}({arguments}):"
    given = cases[0]["input"]
    arity = len(given.splitlines() if isinstance(given, str) else given)
    return f"def {fn_name}({', '.join(f'arg{i + 1}' for i in range(arity))}):"


def math_problem(row: dict, source: str) -> tuple[str, dict]:
    """(question, {"answer"}) of a row with Skywork-OR1's columns, whose answers are JSON lists."""
    answer = column(row, "reward_model", source)["ground_truth"]
    answer = json.loads(answer)[0] if answer.startswith('["') else answer
    return column(row, "prompt", source)[-1]["content"], {"answer": answer}


def stratified(rows: list[dict], key: str) -> list[dict]:
    """One row of each difficulty 1-13 in turn, so that the first n are even over the levels (RMT, 5.1)."""
    levels = {level: [] for level in range(1, 14)}
    for row in rows:
        found = column(column(row, "extra_info", "row"), "model_difficulty", "extra_info")
        level = int(column(found, key, "model_difficulty"))
        if level in levels:
            levels[level].append(row)
    return [row for turn in itertools.zip_longest(*levels.values()) for row in turn if row]


def verify_lines():
    """The verifier's process: [gold, completion] per line in, [right, reason] per line out, as JSON."""
    import json
    import signal
    import sys

    from math_verify import LatexExtractionConfig, parse, verify

    boxed = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
    for line in sys.stdin:
        signal.alarm(600)  # busy, this process ends even if the one that would kill it is gone
        gold, text = json.loads(line)
        try:
            last_box = text[text.rfind("\\boxed") :]  # math-verify would make a set of several
            answer = parse(last_box, extraction_config=boxed, parsing_timeout=None)
            gold = parse(f"${gold}$", parsing_timeout=None)
            # gold first: verify is not symmetric
            right = bool(gold and answer) and verify(gold, answer, timeout_seconds=None)
            reason = "right" if right else "wrong answer" if answer else "no answer"
        except Exception as error:
            right, reason = False, f"error: {type(error).__name__}"
        signal.alarm(0)  # idle, it ends with its stdin
        print(json.dumps([right, reason]), flush=True)


class MathVerifier:
    """math-verify in a process that can be killed: some expressions take for ever, and its own time limit is
    an alarm, which needs a main thread and waits for the end of an operation on big numbers."""

    process = None

    def __call__(self, gold: str, completion: str, timeout_s: float) -> tuple[float, str]:
        """(1 if the last \\boxed{} of the completion is the answer, else 0; why)."""
        if self.process is None:
            command = [sys.executable, "-c", f"{inspect.getsource(verify_lines)}\nverify_lines()"]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            # a session of its own: Ctrl-C, which a terminal sends to all, must not change the last rewards
            self.process = subprocess.Popen(command, **pipes, start_new_session=True)
            if self("1", "\\boxed{1}", 300.0) != (1.0, "right"):  # the first call is slow
                raise UserError("math-verify does not start: pip install 'math-verify[antlr4_13_2]'")
        try:
            self.process.stdin.write(json.dumps([gold, completion]) + "\n")
            self.process.stdin.flush()
            if select.select([self.process.stdout], [], [], timeout_s)[0]:
                right, reason = json.loads(self.process.stdout.readline())
                return float(right), reason
            reason = "timeout"
        except (OSError, ValueError):
            reason = "error: the verifier ended"
        self.process.kill()
        self.process = None
        return 0.0, reason
