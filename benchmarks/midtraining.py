"""What RA3's steps cost, compared with next-token prediction (NTP) on the same snippets.

    python benchmarks/midtraining.py                              # the bundled toy model and corpus
    python benchmarks/midtraining.py --snippets 128 --rates 0.1 0.4
    torchrun --nproc_per_node 2 benchmarks/midtraining.py         # on two ranks

NTP, M-step and E-step are ra3.py's own, with learning rate 0, so that every round does the same work. NTP and
M-step also cut the texts into snippets. The M-step is measured with both rollouts. `floor` is one forward pass
over what was rolled out: no rollout can be cheaper. A constant added to the logits of the tokens that open a thought
sets the think rate. The steps take turns in every round, and the median round counts. Costs are per token of the
snippets; an E-step rolls out each snippet G = 3 times. CPU time hardly depends on what else runs; MiB is what a step
needs on top of what the process holds.
"""

import argparse
import ctypes
import dataclasses
import os
import platform
import re
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402
import ra3  # noqa: E402


class NeverStop:
    def check(self) -> None:
        pass


# ---- for the other benchmarks as well


def machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPUs"
    return (
        f"{platform.machine()}, {device}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )


def clock(run, *inputs):
    """Seconds on the clock and CPU seconds of `run(*inputs)`, and what it returns."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = run(*inputs)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu, found


def kib(name: str) -> int:
    """A number of /proc/self/status: VmRSS is what the process holds, VmHWM the most that it has held."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def peak_mib(run, *inputs):
    """Memory that `run(*inputs)` needs on top of what the process holds (MiB, Linux), and what it returns."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before, found = torch.cuda.memory_allocated(), run(*inputs)
        return (torch.cuda.max_memory_allocated() - before) / 2**20, found
    ctypes.CDLL(None).malloc_trim(0)  # give back what is free
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, found = kib("VmRSS"), run(*inputs)
    return (kib("VmHWM") - before) / 1024, found


@torch.no_grad()
def set_think_rate(model, snippets, v, rate: float):
    """From now on, a share `rate` of the model's decisions thinks (if those before them were act)."""
    head = model.get_output_embeddings()
    if hasattr(head, "bias_hook"):
        head.bias_hook.remove()
    rows = snippets[:32]
    where = [s.boundaries for s in rows]
    targets = torch.full((sum(map(len, where)),), common.EVENT, device=model.device)
    act, _ = common.token_logprobs(model, [s.ids for s in rows], where, targets=targets, event=~v.opens)  # log q(act)
    log_odds, low, high = torch.log1p(-act.exp()) - act, -100.0, 100.0
    for _ in range(40):
        bias = (low + high) / 2
        low, high = (bias, high) if (log_odds + bias).sigmoid().mean() < rate else (low, bias)
    head.bias_hook = head.register_forward_hook(lambda module, inputs, logits: logits + bias * v.opens)


# ---- this one


def main(_=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.0, 0.1, 0.2], help="think rates")
    parser.add_argument("--snippets", type=int, default=64, help="of an update")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default=ra3.TINY_DEFAULTS.model)
    parser.add_argument("--dataset", nargs="+", default=ra3.TINY_DEFAULTS.dataset[:1])
    given = parser.parse_args()
    ranks = common.setup(0)
    args = dataclasses.replace(
        ra3.TINY_DEFAULTS, model=given.model, dataset=tuple(given.dataset), dataset_weights=(),
        ntp_batch_size=given.snippets,
    )  # fmt: skip
    tokenizer, longest = common.load_tokenizer(given.model), 4 * args.max_snippet_tokens
    longest = min(longest, common.context_of(given.model))
    pi, q = (common.load_model(given.model, tokenizer, ranks, longest) for _ in "pq")
    v = ra3.Vocabulary(tokenizer, pi.config.get_text_config().vocab_size, ranks.device)
    fixed = ra3.SnippetStream(args, "M", v, longest, ranks).batch(given.snippets)
    still = {model: torch.optim.AdamW(model.parameters(), lr=0.0, fused=True) for model in (pi, q)}
    updates = max(1, args.rollout_rows * ranks.world_size // given.snippets)  # that an M-step samples at once

    def m_steps(model, how: str) -> dict:
        stream = ra3.SnippetStream(args, "M", v, longest, ranks)
        options = dataclasses.replace(args, rollout=how)
        for rollouts, seconds, _ in ra3.bootstrapped(model, stream, 0, updates, v, options, ranks):
            metrics = ra3.m_step(pi, still[pi], rollouts, seconds, options, ranks, NeverStop())
        return metrics

    def floor() -> dict:
        (rollouts,) = ra3.sample(q, [fixed], "M", 0, v, args, ranks)
        where = [np.flatnonzero(r.targets != ra3.FORCED) for r in rollouts]
        wall, cpu, _ = clock(scored, rollouts, where)
        return {"wall": wall, "cpu": cpu}

    @torch.no_grad()
    def scored(rollouts, where) -> None:
        for batch in common.micro_batches([len(r.ids) for r in rollouts], args.micro_batch_tokens):
            common.token_logprobs(q, [rollouts[i].ids for i in batch], [where[i] for i in batch])

    def measure(step: str, rate: float):
        """(seconds on the clock, CPU seconds, metrics) of one update."""
        set_think_rate(q, fixed, v, rate)
        if step == "floor":
            found = floor()
            return found["wall"], found["cpu"], {}
        if step == "E":
            return clock(ra3.e_step, q, pi, still[q], fixed, 20, v, args, ranks, NeverStop())
        wall, cpu, metrics = clock(m_steps, None if step == "NTP" else q, step[2:] or "drafted")
        return wall / updates, cpu / updates, metrics

    steps = ["NTP", *(["M drafted"] if q.can_draft else []), "M forced", "E", "floor"]
    cases = [("NTP", 0.0), *[(step, rate) for step in steps[1:] for rate in given.rates]]
    peaks = {case: peak_mib(measure, *case)[0] for case in cases}
    rounds = {case: [] for case in cases}
    for _ in range(given.rounds):
        for case in cases:
            rounds[case].append(measure(*case))
    tokens = sum(len(s.ids) - 1 for s in fixed)  # without the separators
    if not ranks.main:
        return
    print(f"{machine()}, {ranks.world_size} ranks, median of {given.rounds} rounds")
    decisions = sum(len(s.boundaries) for s in fixed)
    print(f"{len(fixed)} snippets of {tokens / len(fixed):.0f} tokens and {decisions / len(fixed):.1f} decisions")
    print(f"{'step':10} {'think rate':>10} {'s / M tokens':>12} {'x NTP':>6} {'CPU s / M':>10} {'x NTP':>6} "
          f"{'rollout':>8} {'score':>6} {'update':>7} {'MiB':>6}")  # fmt: skip
    for (step, rate), found in rounds.items():
        wall, cpu = (statistics.median(one[i] for one in found) for i in range(2))
        if step == "NTP":
            ntp_wall, ntp_cpu = wall, cpu
        parts = [statistics.median(one[2].get(f"time/{name}_s", 0.0) for one in found) / wall
                 for name in ("rollout", "score", "update")]  # fmt: skip
        thinks = statistics.median(one[2].get("rollout/think_rate", rate) for one in found)
        print(f"{step:10} {thinks:10.2f} {1e6 * wall / tokens:12.0f} {wall / ntp_wall:6.2f} "
              f"{1e6 * cpu / tokens:10.0f} {cpu / ntp_cpu:6.2f} "
              f"{parts[0]:8.0%} {parts[1]:6.0%} {parts[2]:7.0%} {peaks[step, rate]:6.0f}")  # fmt: skip


if __name__ == "__main__":
    common.launch(main, None)
