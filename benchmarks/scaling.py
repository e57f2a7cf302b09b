"""RA3's steps on one and on two ranks, and their cost against snippet length, batch and group size.

    python benchmarks/scaling.py                              # the embedded model
    python benchmarks/scaling.py --ranks 1 2 4 --snippets 64 16 256 --rounds 5

The first value of --snippets, --lengths and --groups is the base case; each other one replaces its part.
Every rank has one thread. A run of torchrun goes through all cases, an E-step and an M-step each, after one
to warm up; the global batch is the same on any number of ranks. Runs with one and with more ranks take turns;
the median counts. Wall is from when all ranks begin until all have ended; CPU time is that of all ranks.
`per token`: CPU time for a corpus token; the step's base case on one rank is 1. On a CPU one rank works
without FSDP. A constant added to the logits of the tokens that open a thought sets the think rate to 0.1.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from midtraining import add_think_bias, joined_snippets, m_steps, machine

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402
import modeling  # noqa: E402
import ra3  # noqa: E402
from snippets import Vocabulary  # noqa: E402


def cases(given):
    """[(snippets of an update, tokens of the longest, rollouts of a group, the step)]"""
    snippets, length, group = given.snippets[0], given.lengths[0], given.groups[0]
    sizes = [(n, length, group) for n in given.snippets] + [(snippets, n, group) for n in given.lengths[1:]]
    groups = [(snippets, length, n, "E") for n in given.groups[1:]]  # the M-step has none
    return [(*size, step) for size in sizes for step in "EM"] + groups


def worker(given):
    """One rank: prints a JSON list of (wall, CPU, corpus tokens) of the cases."""
    torch.set_num_threads(1)
    ranks, found = common.setup(0), []
    pi, q = modeling.load_model(given.model, ranks), modeling.load_model(given.model, ranks)
    v = Vocabulary(modeling.load_tokenizer(given.model), pi.config.vocab_size, ranks.device)
    still = {model: torch.optim.AdamW(model.parameters(), lr=0.0, fused=True) for model in (pi, q)}
    everything = cases(given)
    for turn, (count, length, group, step) in enumerate([everything[0], *everything]):
        args = dataclasses.replace(ra3.TINY_DEFAULTS, group_size=group)
        snippets = joined_snippets(count, length, v)
        add_think_bias(q, snippets, v, 0.1)
        common.all_sum(0.0, ranks)  # all ranks are here
        wall, cpu = time.perf_counter(), time.process_time()
        if step == "M":
            m_steps(pi, q, still[pi], snippets, 1, v, args, ranks)
        else:
            ra3.e_step(q, pi, still[q], snippets, v, args, ranks, 20)
        cpu = common.all_sum(time.process_time() - cpu, ranks)
        if turn:
            found.append((time.perf_counter() - wall, cpu, sum(len(s.ids) - 1 for s in snippets)))
    if ranks.main:
        print(json.dumps(found), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--snippets", type=int, nargs="+", default=[16, 8, 32], help="of an update")
    parser.add_argument("--lengths", type=int, nargs="+", default=[96, 48, 192], help="of the longest")
    parser.add_argument("--groups", type=int, nargs="+", default=[3, 2, 6], help="rollouts of a snippet")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default=ra3.TINY_DEFAULTS.model)
    given = parser.parse_args()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun started this process
        common.launch(worker, given)
    rounds = {ranks: [] for ranks in given.ranks}
    for _ in range(given.rounds):
        for ranks, found in rounds.items():
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc_per_node", str(ranks), __file__, *sys.argv[1:]]
            variables = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=variables)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    torch.set_num_threads(1)
    print(f"{machine()}, median of {given.rounds} rounds")
    print(f"{'step':4} {'snippets':>8} {'tokens':>6} {'group':>5} {'ranks':>5} {'wall s':>7} {'speed-up':>8} "
          f"{'CPU s':>7} {'per token':>9}")
    base = {}
    for place, (count, length, group, step) in enumerate(cases(given)):
        measured = {ranks: zip(*[one[place] for one in found]) for ranks, found in rounds.items()}
        medians = {ranks: [statistics.median(part) for part in parts] for ranks, parts in measured.items()}
        for ranks, (wall, cpu, tokens) in medians.items():
            base.setdefault(step, cpu / tokens)
            print(f"{step:4} {count:8} {length:6} {group if step == 'E' else '':>5} {ranks:5} {wall:7.2f} "
                  f"{medians[given.ranks[0]][0] / wall:8.2f} {cpu:7.2f} {cpu / tokens / base[step]:9.2f}")


if __name__ == "__main__":
    main()
