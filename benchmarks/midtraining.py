"""Seconds per million corpus tokens: RA3's E-step and M-step, and NTP's update on the same snippets.

    python benchmarks/midtraining.py                                          # the embedded model and corpus
    python benchmarks/midtraining.py --length 384 --rates 0.1                 # longer snippets

All are ra3.py's own steps (`e_step`, `sample`, `m_step`; NTP has no sampler) with the sizes of --tiny,
and learning rate 0, so that every round does the same work. A constant added to the logits of the tokens that
open a thought sets the think rate of the sampler q. As in ra3.py, as many M-steps are sampled at once as
--rollout-rows allows. The steps take turns in every round; the median counts. A corpus token is one of the
snippets; an E-step rolls each snippet out G = 3 times. `text` is how many tokens of rolled-out text come
from one of the corpus; rollout, score and update are shares of the time on the clock; MiB is what the step
needs on top of what the process holds. CPU time hardly depends on what else runs.
"""

import argparse
import ctypes
import dataclasses
import os
import platform
import random
import re
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402
import modeling  # noqa: E402
import ra3  # noqa: E402
from snippets import SnippetStream, Vocabulary, segment  # noqa: E402

# ---- for the other benchmarks as well


def machine():
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPUs"
    return (f"{platform.machine()}, {device}, {torch.get_num_threads()} threads, "
            f"load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}, torch {torch.__version__}, "
            f"transformers {transformers.__version__}")


def clock(run, *inputs):
    """Seconds on the clock and CPU seconds of `run(*inputs)`, and what it returns."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = run(*inputs)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu, found


def kib(name):
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


def joined_snippets(count, length, vocabulary, seed=0):
    """`count` snippets of length / 2 to `length` tokens: joined programs of the embedded corpus, cut at an
    action's end. Those that are longer than the model's context cost what others of their length do."""
    texts = [row["text"] for row in common.read_rows(f"{common.TINY}/programs.jsonl")]
    generator, snippets = random.Random(seed), []
    for _ in range(count):
        limit = generator.randint(length // 2, length)
        text = "".join(generator.choices(texts, k=2 + limit // 40))  # a program has about 47 tokens, 7 lines
        lines = text.splitlines(keepends=True)[generator.randrange(7) :]  # or all rows' asserts are in step
        snippets.append(segment("".join(lines), vocabulary, limit, 10**9, 16))
    return snippets


@torch.no_grad()
def add_think_bias(model, snippets, vocabulary, rate):
    """From now on a share `rate` of the model's decisions thinks (if those before it were act)."""
    model.lm_head._forward_hooks.clear()
    rows, cols = modeling.positions([s.boundaries for s in snippets[:32]], model.device)
    ids, act = modeling.pad_right([s.ids for s in snippets[:32]], 0, model.device), ~vocabulary.opens
    targets = torch.full_like(rows, modeling.EVENT)
    act, _ = modeling.token_logprobs(model, ids, rows, cols, targets=targets, event=act)  # log q(act)
    log_odds, low, high = torch.log1p(-act.exp()) - act, -100.0, 100.0
    for _ in range(40):
        bias = (low + high) / 2
        low, high = (bias, high) if (log_odds + bias).sigmoid().mean() < rate else (low, bias)
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + bias * vocabulary.opens)


def m_steps(pi, q, optimizer, snippets, updates, vocabulary, args, ranks):
    """M-step updates, sampled at once as in ra3.main, or without q NTP updates; the last one's metrics."""
    start, keys = time.perf_counter(), [("M", i, 0) for i in range(updates)]
    sampled = ra3.sample(q, [snippets] * updates, keys, vocabulary, args, ranks)
    seconds = (time.perf_counter() - start) / updates
    for rollouts in sampled:
        metrics, _ = ra3.m_step(pi, optimizer, rollouts, seconds, vocabulary, args, ranks)
    return metrics


# ---- this one


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.0, 0.1, 0.4], help="think rates")
    parser.add_argument("--snippets", type=int, default=64, help="of an update")
    parser.add_argument("--length", type=int, default=0, help="of joined programs (tokens); 0: the corpus")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default=ra3.TINY_DEFAULTS.model)
    parser.add_argument("--profile", action="store_true", help="also print which operations take the time")
    given = parser.parse_args()
    ranks = common.setup(0)
    args = dataclasses.replace(ra3.TINY_DEFAULTS, max_snippets=2000)
    pi, q = modeling.load_model(given.model, ranks), modeling.load_model(given.model, ranks)
    config = pi.config.get_text_config()
    v = Vocabulary(modeling.load_tokenizer(given.model), config.vocab_size, ranks.device)
    if given.length:
        snippets = joined_snippets(given.snippets, given.length, v)
    else:
        snippets = SnippetStream(args, "M", v, config.max_position_embeddings).batch(given.snippets)
    count, tokens = len(snippets), sum(len(s.ids) - 1 for s in snippets)  # without the separators
    ahead = max(1, args.rollout_rows // given.snippets)  # updates
    still = {model: torch.optim.AdamW(model.parameters(), lr=0.0, fused=True) for model in (pi, q)}

    def update(step, rate):
        """(seconds on the clock, CPU seconds, metrics) of one update."""
        add_think_bias(q, snippets, v, rate)
        if step == "E":
            wall, cpu, (metrics, _) = clock(ra3.e_step, q, pi, still[q], snippets, v, args, ranks, 20)
            return wall, cpu, metrics
        q_or_none = None if step == "NTP" else q
        wall, cpu, metrics = clock(m_steps, pi, q_or_none, still[pi], snippets, ahead, v, args, ranks)
        return wall / ahead, cpu / ahead, metrics

    cases = [("NTP", 0.0), *[("M", rate) for rate in given.rates], *[("E", rate) for rate in given.rates]]
    peaks = {case: peak_mib(update, *case)[0] for case in cases}
    rounds = {case: [] for case in cases}
    for _ in range(given.rounds):
        for case in cases:
            rounds[case].append(update(*case))
    print(f"{machine()}, median of {given.rounds} rounds")
    decisions = sum(len(s.boundaries) for s in snippets)
    print(f"{count} snippets of {tokens / count:.0f} tokens, {decisions / count:.1f} decisions")
    print(f"{'step':5} {'think rate':>10} {'text':>5} {'s / M tokens':>12} {'x NTP':>6} {'CPU s / M':>10} "
          f"{'x NTP':>6} {'rollout':>8} {'score':>6} {'update':>7} {'MiB':>6}")
    for (step, rate), found in rounds.items():
        wall, cpu = (statistics.median(one[i] for one in found) for i in range(2))
        numbers = {key for key, value in found[0][2].items() if isinstance(value, float)}
        metrics = {key: statistics.median(one[2][key] for one in found) for key in numbers}
        parts = [metrics[f"time/{name}_s"] / wall for name in ("rollout", "score", "update")]
        if step == "NTP":
            ntp_wall, ntp_cpu = wall, cpu
        text = metrics["perf/tokens_per_s"] * wall / tokens
        print(f"{step:5} {metrics['rollout/think_rate']:10.2f} {text:5.2f} {1e6 * wall / tokens:12.0f} "
              f"{wall / ntp_wall:6.2f} {1e6 * cpu / tokens:10.0f} {cpu / ntp_cpu:6.2f} "
              f"{parts[0]:8.0%} {parts[1]:6.0%} {parts[2]:7.0%} {peaks[step, rate]:6.0f}")
    for step, rate in cases if given.profile else []:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            wall, *_ = clock(update, step, rate)
        found = sorted(profile.key_averages(), key=lambda one: one.self_cpu_time_total, reverse=True)
        shares = {one.key.removeprefix("aten::"): one.self_cpu_time_total / 1e6 / wall for one in found}
        first = ", ".join(f"{name} {share:.0%}" for name, share in list(shares.items())[:8])
        print(f"{step} {rate}: {first}; Python and others {1 - sum(list(shares.values())[:8]):.0%}")


if __name__ == "__main__":
    main()
