"""One update of grpo_rlvr.py against one of TRL's GRPOTrainer: same model, prompts, lengths, reward and loss.

    pip install trl                                            # for this benchmark only
    python benchmarks/grpo.py                                  # the bundled toy model and math problems
    python benchmarks/grpo.py --completions ended              # completions end where the model ends them
    python benchmarks/grpo.py --vocab 32768 --same-allocator   # random weights, a larger vocabulary

All sample N x G completions (no vLLM), score them with the same trivial function, and take one AdamW step on
the `dapo` loss with beta 0 (TRL's defaults) in fp32. `full`: eos is made impossible, so that all completions
have --tokens tokens. One more row: TRL with its default settings, which are bf16 and gradient checkpointing. The
micro-batches of ours are those of --tiny.
Each measurement is a fresh process: one update to warm up, then the median of some. The sides take turns,
and the median round counts. MiB: the peak of the process, and what the updates added to it with the model loaded.
On a CPU a part of the time is page faults; with --same-allocator malloc keeps its pages, for all sides.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from midtraining import kib, machine
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import grpo_rlvr  # noqa: E402
from common import TINY, load_model, load_tokenizer, setup, uniforms  # noqa: E402

try:
    import trl
except ImportError:
    trl = None

SIDES = {"ours": "grpo_rlvr.py", "trl": "TRL, fp32", "trl-defaults": "TRL, its defaults"}
SEED, TEMPERATURE, LEARNING_RATE = 0, 1.0, 1e-6


def reward(text):
    return float(len(text) % 2)


class Clock:
    def __init__(self):
        self.wall, self.cpu, self.loaded = [], [], kib("VmRSS")

    def start(self):
        self.begun = time.perf_counter(), time.process_time()

    def stop(self):
        self.wall.append(time.perf_counter() - self.begun[0])
        self.cpu.append(time.process_time() - self.begun[1])


def ours(model, tokenizer, problems, given):
    """Steps 1 to 4 of grpo_rlvr.main, `given.updates` times and once to warm up."""
    args = grpo_rlvr.Args(
        task="math", model=given.model, group_size=given.group, max_new_tokens=given.tokens, minibatches=1,
        temperature=TEMPERATURE, eps_high=0.2, micro_batch_tokens=given.micro_batch_tokens,
    )
    ranks, clock, lengths = setup(SEED), Clock(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    rollouts = grpo_rlvr.Rollouts(model, tokenizer, args, ranks)
    grpo_rlvr.reward = lambda problem, text: (reward(text), False, "")
    rows = [problem for problem in problems for _ in range(given.group)]
    for update in range(1 + given.updates):
        clock.start()
        noise = uniforms([len(rows), given.tokens], SEED, update)
        samples, _ = rollouts(rows, noise, TEMPERATURE, lambda: None)
        rewards = torch.tensor([sample.reward for sample in samples]).view(-1, given.group)
        for sample, advantage in zip(samples, grpo_rlvr.group_advantages(rewards).flatten().tolist()):
            sample.advantage = advantage
        lengths = torch.tensor([len(sample.completion_ids) for sample in samples])
        normalizer = grpo_rlvr.loss_normalizer(lengths, args.loss_type, given.tokens)
        grpo_rlvr.train_minibatch(model, optimizer, samples, normalizer, args, ranks, lambda: None)
        clock.stop()
    return clock, lengths.float().mean().item()


def theirs(model, tokenizer, problems, given):
    """The same with TRL."""
    from datasets import Dataset

    lengths, clock, folder = [], Clock(), tempfile.TemporaryDirectory()
    plain = {"bf16": False, "gradient_checkpointing": False} if given.one == "trl" else {}
    config = trl.GRPOConfig(
        output_dir=folder.name, max_steps=1 + given.updates, num_generations=given.group,
        per_device_train_batch_size=len(problems) * given.group // given.accumulation,
        gradient_accumulation_steps=given.accumulation, max_completion_length=given.tokens,
        temperature=TEMPERATURE, learning_rate=LEARNING_RATE, lr_scheduler_type="constant", seed=SEED,
        shuffle_dataset=False, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(), **plain,
    )

    class Steps(TrainerCallback):
        def on_step_begin(self, *_, **__):
            clock.start()

        def on_step_end(self, *_, **__):
            clock.stop()

    def rewards(completions, completion_ids, **_):
        lengths[:] = map(len, completion_ids)
        return [reward(text) for text in completions]

    rows = Dataset.from_list([{"prompt": problem.prompt} for problem in problems])
    trainer = trl.GRPOTrainer(
        model, rewards, args=config, train_dataset=rows, processing_class=tokenizer, callbacks=[Steps()]
    )
    trainer.train()
    return clock, statistics.mean(lengths)


def measure(given):
    tokenizer = load_tokenizer(given.model)
    args = grpo_rlvr.Args(task="math", model=given.model)
    problems, _ = grpo_rlvr.read_problems(f"{TINY}/text/math_train.jsonl", args, tokenizer)
    problems = problems[: given.prompts]
    mine = given.one == "ours"
    if mine:
        model = load_model(given.model, tokenizer, setup(SEED), 256)
    else:
        model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    if given.completions == "full":
        never = torch.zeros(model.config.vocab_size, device=model.device)
        never[tokenizer.eos_token_id] = -1e4
        model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + never.to(logits))
    clock, length = (ours if mine else theirs)(model, tokenizer, problems, given)
    wall, cpu = statistics.median(clock.wall[1:]), statistics.median(clock.cpu[1:])
    peak = kib("VmHWM") / 1024
    print(json.dumps([wall, cpu, peak, peak - clock.loaded / 1024, length]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="of the longest completion")
    parser.add_argument("--completions", choices=["full", "ended"], default="full")
    parser.add_argument("--vocab", type=int, default=0, help="of a model with random weights; 0: as it is")
    parser.add_argument("--model", default=f"{TINY}/text/model")
    parser.add_argument("--micro-batch-tokens", type=int, default=2048, help="of ours")
    parser.add_argument("--accumulation", type=int, default=1, help="of TRL: micro-batches of an update")
    parser.add_argument("--same-allocator", action="store_true", help="malloc keeps its pages")
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", choices=SIDES, help="a single measurement, as JSON")
    given = parser.parse_args()
    if given.one:
        measure(given)
        return
    sides = {side: [] for side in SIDES if trl or not side.startswith("trl")}
    if not trl:
        print("TRL is not installed: pip install trl")
    variables = dict(os.environ, TOKENIZERS_PARALLELISM="false", PYTHONWARNINGS="ignore")
    if given.same_allocator:
        variables["MALLOC_MMAP_MAX_"], variables["MALLOC_TRIM_THRESHOLD_"] = "0", str(2**40)
    with tempfile.TemporaryDirectory() as folder:
        more = []
        if given.vocab:
            config = AutoConfig.from_pretrained(given.model, vocab_size=given.vocab)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
            load_tokenizer(given.model).save_pretrained(folder)
            more = ["--model", folder]
        for _ in range(given.rounds):
            for side, found in sides.items():
                command = [sys.executable, __file__, *sys.argv[1:], *more, "--one", side]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=variables)
                found.append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{machine()}, TRL {trl.__version__ if trl else '-'}, median of {given.rounds} rounds")
    print(f"{given.prompts} prompts x {given.group} completions of up to {given.tokens} tokens")
    print(f"{'':18} {'tokens each':>11} {'wall s':>7} {'x ours':>6} {'CPU s':>7} {'x ours':>6} {'MiB':>6} "
          f"{'added':>6}")
    for side, found in sides.items():
        wall, cpu, peak, added, length = map(statistics.median, zip(*found))
        if side == "ours":
            wall_1, cpu_1 = wall, cpu
        print(f"{SIDES[side]:18} {length:11.1f} {wall:7.2f} {wall / wall_1:6.2f} {cpu:7.2f} "
              f"{cpu / cpu_1:6.2f} {peak:6.0f} {added:6.0f}")


if __name__ == "__main__":
    main()
