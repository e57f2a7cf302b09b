"""benchmarks/gpu.py works, so that it is ready when there is a GPU; the plan in docs/performance.md says what its script says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_gpu_benchmark_runs_with_tiny_models_on_any_machine():
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--smoke"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout.splitlines()[-1])
    assert not [name for name in numbers if name.startswith("failed")], done.stdout
    assert numbers["grpo/rollout_ratio/qwen2"] == pytest.approx(1, abs=1e-3)
    assert numbers["checkpointing/on/qwen2/loss"] == pytest.approx(numbers["checkpointing/off/qwen2/loss"], abs=1e-5)
    assert all(numbers[f"ra3/rollout/{how}/qwen2"] > 0 for how in ("forced", "drafted"))


def test_the_plan_of_the_papers_run_is_what_its_script_prints():
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    rows = re.findall(r"^\| (1\.5B|8B) \| (\d+) GPU-hours \| (\d+) \| (\d+) \| (\d+) GiB \|$", page, flags=re.MULTILINE)
    assert [tuple(re.findall(r"1\.5B|8B|\d+", line)[i] for i in (0, 1, -3, -2, -1)) for line in printed.splitlines()] == rows
