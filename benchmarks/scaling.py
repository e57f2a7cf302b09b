"""How the time of an update grows with ranks, batch, group and length.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py       # on two idle cores: about ten minutes

Every line is a run of ra3.py or grpo_rlvr.py --tiny for some updates, by torchrun where there are two ranks. Shown is
the median time of an update (the sum of its `time/*_s`), without the first update of each step. The runs take turns.
"""

import argparse
import collections
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from midtraining import machine

ROOT = Path(__file__).resolve().parents[1]
RA3 = ["ra3.py", "--tiny", "--eval-snippets", "2", "--eval-problems", ""]
STDLIB = [*RA3, "--dataset", "stdlib", "--max-snippet-tokens"]  # long texts: snippets as long as they may be
GRPO = ["grpo_rlvr.py", "--tiny", "--eval-problems", "2"]
RUNS = {  # what is varied -> ranks, command
    "ra3, 32 snippets (E), 64 (M)": (1, RA3),
    "ra3, the same on two ranks": (2, RA3),
    "ra3, twice the snippets": (1, [*RA3, "--rl-batch-size", "64", "--ntp-batch-size", "128"]),
    "ra3, twice the snippets on two ranks": (2, [*RA3, "--rl-batch-size", "64", "--ntp-batch-size", "128"]),
    "ra3, G = 6 for 3": (1, [*RA3, "--group-size", "6"]),
    "ra3, standard library, 64 tokens": (1, [*STDLIB, "64"]),
    "ra3, standard library, 128 tokens": (1, [*STDLIB, "128"]),
    "grpo, 16 prompts, G = 8": (1, GRPO),
    "grpo, the same on two ranks": (2, GRPO),
    "grpo, 32 prompts": (1, [*GRPO, "--prompts-per-update", "32"]),
    "grpo, 32 prompts on two ranks": (2, [*GRPO, "--prompts-per-update", "32"]),
    "grpo, G = 16": (1, [*GRPO, "--group-size", "16"]),
}


def seconds_of(ranks: int, command: list[str], updates: int) -> dict[str, list[float]]:
    """Step (E, M, or blank for GRPO) -> seconds of its updates, after the first."""
    counts = ["--rl-updates", "--ntp-updates"] if command[0] == "ra3.py" else ["--updates"]
    counts = [word for flag in counts for word in (flag, str(updates + 1))]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        script = [ROOT / command[0], *command[1:], *counts, "--output-dir", folder]
        subprocess.run([sys.executable, *launcher, *script], check=True, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    seconds = collections.defaultdict(list)
    for row in rows:
        parts = [row[key] for key in row if key.startswith("time/") and key.endswith("_s") and key != "time/wall_s"]
        if parts:
            seconds[row.get("phase", "")].append(sum(parts))
    return {step: found[1:] for step, found in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", default="", help="runs whose name has this in it")
    args = parser.parse_args()
    print(machine())
    found = collections.defaultdict(list)
    for _ in range(args.rounds):
        for name, run in RUNS.items():
            if args.only in name:
                for step, seconds in seconds_of(*run, args.updates).items():
                    found[name, step] += seconds
    print("\n| run | step | seconds of an update |\n|---|---|---|")
    for (name, step), seconds in found.items():
        print(f"| {name} | {step} | {statistics.median(seconds):.2f} |")


if __name__ == "__main__":
    main()
