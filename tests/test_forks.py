"""Forks: every tests/forks/<script>_<name>.diff still applies, is short, runs, and is printed in docs/<script>.md.

A new fork needs its diff file and its place in the docs. What is special to it can be checked in CHECKS.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DIFFS = sorted((ROOT / "tests" / "forks").glob("*.diff"))
PATCH = ["patch", "-p1", "-i"] if shutil.which("patch") else ["git", "apply"]
SMALL = {  # flags of a run of seconds, after --tiny
    "grpo_rlvr.py": "--updates 2 --prompts-per-update 8 --group-size 4 --eval-problems 8",
    "rmt.py": "--updates 2 --train-texts 40 --eval-texts 20 --prompts-per-update 4 --group-size 4 --eval-positions 4",
    "ra3.py": "--em-iterations 1 --rl-updates 2 --rl-batch-size 8 --ntp-updates 2 --ntp-batch-size 8 --eval-snippets 8",
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


@pytest.mark.parametrize("diff", DIFFS, ids=lambda path: path.stem)
def test_fork(diff, tmp_path):
    text = diff.read_text(encoding="utf-8")
    (script,) = re.findall(r"^\+\+\+ b/(\S+)", text, flags=re.MULTILINE)
    assert len(re.findall(r"^[-+](?!\+\+ |-- )", text, flags=re.MULTILINE)) <= 25
    page = (ROOT / "docs" / script).with_suffix(".md").read_text(encoding="utf-8")
    assert f"```diff\n{text}```" in page

    shutil.copy(ROOT / script, tmp_path)
    for name in ("common.py", "sandbox.py", "tiny"):
        (tmp_path / name).symlink_to(ROOT / name)
    subprocess.run([*PATCH, str(diff)], cwd=tmp_path, check=True)
    command = [sys.executable, script, "--tiny", *SMALL[script].split(), "--output-dir", "run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    CHECKS.get(diff.stem, len)([json.loads(line) for line in lines])
