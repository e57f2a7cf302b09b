"""What the scripts do on one GPU: correctness and speed, in a few minutes and without a network.

    python benchmarks/gpu.py                # a GPU of 80 GB or more
    python benchmarks/gpu.py --smoke        # tiny models, any machine: does the benchmark itself work?

Models have random weights in the shapes of Qwen2.5-1.5B and Llama-3.1-8B, and the toy model's tokenizer. Each
part prints its lines as it goes, and the last line is all numbers as JSON. A part that fails says why, and the
others go on. Tokens/s count the tokens of rolled-out or trained text; MFU is that of training:
6 x parameters x tokens/s over --peak-tflops.
"""

import argparse
import dataclasses
import importlib.util
import json
import sys
import tempfile
import time
import traceback
import types
from pathlib import Path

import torch

if importlib.util.find_spec("tyro") is None:  # only a script's last line needs it
    sys.modules["tyro"] = types.ModuleType("tyro")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from transformers import AutoModelForCausalLM, LlamaConfig, LogitsProcessorList, Qwen2Config  # noqa: E402

import common  # noqa: E402
import grpo_rlvr  # noqa: E402
import ra3  # noqa: E402
from midtraining import NeverStop, machine, set_think_rate  # noqa: E402

QWEN = Qwen2Config(
    vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
    num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True,
)  # fmt: skip
LLAMA = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=8192,
)  # fmt: skip
SMALL = Qwen2Config(
    vocab_size=2048, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=4096,
)  # fmt: skip
numbers: dict[str, float] = {}


def note(name: str, value: float, unit: str = "") -> None:
    numbers[name] = round(value, 6)
    print(f"  {name:52} {value:12.4g} {unit}", flush=True)


def timed(run, *inputs, repeats: int = 2):
    """Seconds of the last of some runs, and what it returned."""
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        found = run(*inputs)
        synchronize()
    return time.perf_counter() - start, found


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Bench:
    def __init__(self, given) -> None:
        self.given, self.ranks = given, common.setup(0)
        self.folder = Path(tempfile.mkdtemp(dir=given.folder or None))
        self.tokenizer = common.load_tokenizer(f"{common.TINY}/code/model")
        self.tokens = 128 if given.smoke else 1024  # of a row

    def model_folder(self, config) -> str:
        """A model of this shape with random weights, on disk in bf16."""
        target = self.folder / config.model_type
        if not target.exists():
            with torch.device(self.ranks.device):
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            model.save_pretrained(target)
            self.tokenizer.save_pretrained(target)
        return str(target)

    def load(self, config, **options):
        return common.load_model(self.model_folder(config), self.tokenizer, self.ranks, self.tokens, **options)

    def snippets(self, v, count: int):
        args = dataclasses.replace(
            ra3.TINY_DEFAULTS, dataset=("stdlib",), dataset_weights=(), max_snippet_tokens=self.tokens // 4 * 3,
            rollout_rows=count,
        )  # fmt: skip
        return args, ra3.SnippetStream(args, "M", v, self.tokens, self.ranks).batch(count)

    # ---- parts

    def grpo(self, config, rows: int) -> None:
        """Rollout, its log-probabilities against the training forward, dynamic and static cache."""
        model = self.load(config, train=False)
        prompt, new, device = [list(range(100, 100 + self.tokens // 4))] * rows, self.tokens // 4, model.device
        table = torch.zeros(3, config.vocab_size, dtype=torch.bool, device=device)  # nothing ends a completion
        noise = common.uniforms([rows, new], "gpu")
        with common.gathered(model):
            seconds, found = timed(grpo_rlvr.rollout, model, prompt, noise, 1.0, table)
        note(f"grpo/rollout/{config.model_type}", rows * new / seconds, "tokens/s")
        done = [p + list(ids) for p, (ids, *_) in zip(prompt, found)]
        noted = torch.tensor([lp for _, lp, _ in found]).flatten()
        where = [torch.arange(len(p), len(d)).numpy() for p, d in zip(prompt, done)]
        with torch.no_grad():
            again = torch.cat([
                common.token_logprobs(model, done[i : i + 8], where[i : i + 8])[0].cpu() for i in range(0, rows, 8)
            ])  # fmt: skip
        note(f"grpo/rollout_ratio/{config.model_type}", (again - noted).exp().mean().item())
        note(f"grpo/rollout_gap_max/{config.model_type}", (again - noted).abs().max().item(), "nats")
        ids, mask = common.pad_left(prompt, device)
        for cache in ("dynamic", "static"):
            options = {"cache_implementation": "static"} if cache == "static" else {}

            def plain(options=options):
                sampler = common.Sampler(noise, ids.shape[1], 1.0, device)
                return model.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=new, synced_gpus=False,
                    logits_processor=LogitsProcessorList([sampler]), **options,
                )  # fmt: skip

            with common.gathered(model):
                seconds, _ = timed(plain)
            note(f"grpo/generate/{cache}/{config.model_type}", rows * new / seconds, "tokens/s")

    def ra3(self, config, rows: int) -> None:
        """Both rollouts, and the three kinds of update."""
        pi, q = self.load(config), self.load(config)
        v = ra3.Vocabulary(self.tokenizer, config.vocab_size, self.ranks.device)
        args, snippets = self.snippets(v, rows)
        set_think_rate(q, snippets, v, 0.1)
        for how in ("forced", "drafted"):
            options = dataclasses.replace(args, rollout=how)
            seconds, (found,) = timed(ra3.sample, q, [snippets], "gpu", 0, v, options, self.ranks)
            note(f"ra3/rollout/{how}/{config.model_type}", sum(len(r.ids) for r in found) / seconds, "tokens/s")
        parameters = sum(p.numel() for p in pi.parameters())
        optimizers = {m: common.new_optimizer(m, 0.0, 0.0) for m in (pi, q)}
        for name, rollouts in (("NTP", [ra3.all_act(s) for s in snippets]), ("M", found)):
            self.reset()
            seconds, _ = timed(ra3.m_step, pi, optimizers[pi], rollouts, 0.0, args, self.ranks, NeverStop())
            rate = sum(len(r.ids) for r in rollouts) / seconds
            note(f"ra3/update/{name}/{config.model_type}", rate, "tokens/s")
            note(f"ra3/mfu/{name}/{config.model_type}", 6 * parameters * rate / self.given.peak_tflops / 1e12)
            self.memory(f"ra3/peak/{name}/{config.model_type}")
        few = snippets[: max(2, rows // 4)]
        seconds, metrics = timed(ra3.e_step, q, pi, optimizers[q], few, 20, v, args, self.ranks, NeverStop())
        note(f"ra3/e_step/{config.model_type}", metrics["perf/tokens_per_s"], "tokens/s")
        name, tokens = self.model_folder(config), args.micro_batch_tokens
        print(common.memory_plan(name, self.ranks, (rows, self.tokens), tokens, False, 4))

    def checkpointing(self, config, rows: int) -> None:
        """NTP with and without gradient checkpointing: memory, time, and the same loss."""
        for recompute in (False, True):
            self.reset()
            model = self.load(config, recompute=recompute)
            v = ra3.Vocabulary(self.tokenizer, config.vocab_size, self.ranks.device)
            args, snippets = self.snippets(v, rows)
            rollouts, optimizer = [ra3.all_act(s) for s in snippets], common.new_optimizer(model, 0.0, 0.0)
            seconds, metrics = timed(ra3.m_step, model, optimizer, rollouts, 0.0, args, self.ranks, NeverStop())
            name = f"checkpointing/{'on' if recompute else 'off'}/{config.model_type}"
            note(f"{name}/loss", metrics["train/loss"], "nats")
            note(f"{name}/s", seconds, "s")
            self.memory(f"{name}/peak")
            del model, optimizer

    def toy(self) -> None:
        """ra3.py --tiny for two updates, on this device and on the CPU: the same metrics within rounding."""
        options = {"rl_updates": 1, "ntp_updates": 1, "eval_problems": "", "eval_snippets": 8, "rl_batch_size": 8,
                   "ntp_batch_size": 8, "dataset_weights": (),
                   "dataset": (f"{common.TINY}/code/corpus.jsonl",)}  # fmt: skip
        found = {}
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            args = dataclasses.replace(ra3.TINY_DEFAULTS, output_dir=str(self.folder / f"toy_{device}"), **options)
            available, torch.cuda.is_available = torch.cuda.is_available, lambda on=device == "cuda": on
            setup, common.setup = common.setup, lambda seed, d=device: common.Ranks(0, 1, torch.device(d))
            ra3.setup = common.setup
            try:
                ra3.main(args)
            finally:
                torch.cuda.is_available, common.setup, ra3.setup = available, setup, setup
            lines = (Path(args.output_dir) / "metrics.jsonl").read_text().splitlines()
            found[device] = [json.loads(line) for line in lines]
        for key in ("reward/mean", "train/loss", "eval/ce_code"):
            values = [[row[key] for row in rows if key in row] for rows in found.values()]
            note(f"toy/{key}/cpu", values[0][-1])
            if len(values) > 1:
                note(f"toy/{key}/difference", max(abs(a - b) for a, b in zip(*values)))

    def reset(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def memory(self, name: str) -> None:
        if torch.cuda.is_available():
            note(name, torch.cuda.max_memory_allocated() / 2**30, "GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="tiny models")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of the GPU in bf16 (H100, H200: 989)")
    parser.add_argument("--folder", default="", help="for the models (20 GB); empty: the temporary folder")
    given = parser.parse_args()
    print(machine(), flush=True)
    bench, rows = Bench(given), 4 if given.smoke else 64
    qwen, llama = (SMALL, SMALL) if given.smoke else (QWEN, LLAMA)
    parts = [("grpo, 1.5B", bench.grpo, qwen, rows), ("RA3, 1.5B", bench.ra3, qwen, rows),
             ("checkpointing, 1.5B", bench.checkpointing, qwen, rows), ("toy model", bench.toy),
             ("grpo, 8B", bench.grpo, llama, rows)]  # fmt: skip
    for title, run, *inputs in parts:
        print(f"{title}", flush=True)
        start = time.perf_counter()
        try:
            bench.reset()
            run(*inputs)
        except Exception as error:
            numbers[f"failed/{title}"] = 1
            print(f"  FAILED: {type(error).__name__}: {error}")
            traceback.print_exc()
        print(f"  ({time.perf_counter() - start:.0f} s)", flush=True)
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
