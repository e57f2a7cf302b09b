"""Forks: every tests/forks/<script>_<name>.diff still applies, is short, runs, and is in docs/<script>.md.

A new fork needs its diff file and its place in the docs. What is special to it can be checked in CHECKS.
"""

import ast
import dataclasses
import importlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common import load_tokenizer, read_rows

ROOT = Path(__file__).parent.parent
DIFFS = sorted((ROOT / "tests" / "forks").glob("*.diff"))
PATCH = ["patch", "-p1", "-i"] if shutil.which("patch") else ["git", "apply"]
SMALL = {  # flags of a run of seconds, after --tiny
    "grpo_rlvr.py": "--updates 2 --prompts-per-update 8 --group-size 4 --eval-problems 8",
    "rmt.py": "--updates 2 --train-texts 40 --eval-texts 20 --prompts-per-update 4 --group-size 4 --eval-positions 4",
    "ra3.py": "--em-iterations 1 --rl-updates 2 --rl-batch-size 8 --ntp-updates 2 --ntp-batch-size 8 --eval-snippets 8 --eval-problems=",
}


def partial_credit(history):
    """The reward has a part of each of the problem's tests; pass@1 still counts whole passes."""
    updates = history[1:]
    assert all(row["reward/mean"] >= row["reward/passed"] for row in updates)
    assert any(row["reward/mean"] > row["reward/passed"] for row in updates)
    for row in updates:  # shares of 8 x 4 completions and of 8 held-out problems
        failed = sum(value for key, value in row.items() if key.startswith("reward/fail_"))
        assert row["reward/passed"] * 32 % 1 == 0 and row["reward/passed"] + failed == pytest.approx(1, abs=1e-4)
        assert row.get("eval/pass@1", 0) * 8 % 1 == 0


def answer_tags(history):
    """The toy model boxes, so no response has the new format, and next-token prediction goes on."""
    assert all(row["rollout/malformed"] == 1 and row["policy/ntp_ce"] > 0 for row in history[1:])


CHECKS = {"grpo_partial_credit": partial_credit, "rmt_answer_tags": answer_tags}


def apply(diff, folder):
    """A copy of the script, changed by the diff, with what it needs beside it."""
    (script,) = re.findall(r"^\+\+\+ b/(\S+)", diff.read_text(encoding="utf-8"), flags=re.MULTILINE)
    shutil.copy(ROOT / script, folder)
    for name in ("common.py", "sandbox.py", "tiny"):
        (folder / name).symlink_to(ROOT / name)
    subprocess.run([*PATCH, str(diff)], cwd=folder, check=True)
    return script


@pytest.mark.parametrize("diff", DIFFS, ids=lambda path: path.stem)
def test_fork(diff, tmp_path):
    script, text = apply(diff, tmp_path), diff.read_text(encoding="utf-8")
    assert len(re.findall(r"^[-+](?!\+\+ |-- )", text, flags=re.MULTILINE)) <= 25
    page = (ROOT / "docs" / script).with_suffix(".md").read_text(encoding="utf-8")
    assert f"```diff\n{text}```" in page or f"forks/{diff.name}" in page
    command = [sys.executable, script, "--tiny", *SMALL[script].split(), "--output-dir", "run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    CHECKS.get(diff.stem, len)([json.loads(line) for line in lines])


def test_docstring_thoughts_are_legal_where_they_are_offered(tmp_path, monkeypatch):
    """Real files with a docstring at every boundary of the forked ra3.py can still be parsed."""
    apply(ROOT / "tests" / "forks" / "ra3_docstring_thoughts.diff", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ra3", raising=False)
    ra3 = importlib.import_module("ra3")
    monkeypatch.delitem(sys.modules, "ra3")  # no other test gets the fork
    args = dataclasses.replace(ra3.TINY_DEFAULTS, max_snippet_tokens=10**6)
    tokenizer = load_tokenizer(args.model)
    v, offered = ra3.Vocabulary(tokenizer, len(tokenizer), "cpu"), 0
    for row in itertools.islice(read_rows("stdlib"), 0, None, 40):
        written = []
        for piece in ra3.cut_text(row["text"], 2000):
            for s in ra3.segment(piece, "x", v, args, 10**9):
                first = [v.text[token] for token in s.ids[s.boundaries]]
                thoughts = [f'{text[: len(text) - len(text.lstrip())]}"""x"""\n' for text in first]
                written.append(ra3.bootstrap_text(s, dict(enumerate(thoughts))))
                offered += len(thoughts)
                for t, thought in enumerate(thoughts[:2]):
                    assert not v.malformed(v.encode(thought), s, t)
                    assert v.malformed(v.encode(" " + thought), s, t) and v.malformed(v.encode('"""x\n'), s, t)
        ast.parse("".join(written))
    assert offered > 1000
