"""Measures whether the tiny model starts where the demonstrations need it, and prints samples to read.

    python tiny/report.py                     the committed model (about three minutes on one core)
    python tiny/report.py --model-dir DIR     another one

Everything is sampled at T = 1 from the full distribution unless it says greedy. Wanted:

  programs   think rate 0.40-0.65 before the assert and 0.15-0.25 elsewhere; the asserted value has a mean
             probability of at least 0.9 after a sampled comment, and costs at least 1.2 nats without one
  problems   held-out pass@1 between 0.15 and 0.45, sampled and greedy; single operations right in >= 0.35
  math       held-out pass@1 between 0.15 and 0.45, sampled and greedy
  RMT        well-formed >= 0.9; exact match at least 0.1 below greedy next-token prediction at the same
             positions; the mean length rises loosely with the budget
"""

import argparse
import collections
import itertools
import json
import math
import random
import re
from pathlib import Path
from statistics import mean

import build
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def read_jsonl(name):
    with open(build.HERE / name, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def generate(model, prompts, max_new_tokens, stop, greedy=False):
    """Completions of prompts of ids, up to and without the token `stop`; None where it never came."""
    pad, completions = model.config.eos_token_id, []
    for batch in chunks(prompts, 64):
        width = max(map(len, batch))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in batch])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
        how = {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0, "top_p": 1.0}
        how |= {"max_new_tokens": max_new_tokens, "eos_token_id": stop}
        out = model.generate(ids, attention_mask=mask, **how)
        completions += [row[: row.index(stop)] if stop in row else None for row in out[:, width:].tolist()]
    return completions


def chunks(items, size):
    return [items[i : i + size] for i in range(0, len(items), size)]


def token_losses(model, ids):
    """Negative log-probability of every token of `ids` but the first."""
    ids = torch.tensor(ids)[None]
    return torch.nn.functional.cross_entropy(model(ids[:, :-1]).logits[0], ids[0, 1:], reduction="none")


def report_code(model, tokenizer):
    eos = tokenizer.eos_token_id
    pieces = random.Random(1).sample(build.real_code(heldout=True), 150)
    losses = torch.cat([token_losses(model, [eos] + tokenizer.encode(piece)[:500]) for piece in pieces])
    print(f"REAL CODE held out: {losses.mean():.3f} nats per token\n")
    for start in ("def read_lines(path):\n", "class Node:\n"):
        prompt = tokenizer.encode(start)
        out = model.generate(torch.tensor([[eos] + prompt]), max_new_tokens=70, do_sample=True, top_k=0)
        print(tokenizer.decode(out[0, 1:]), "\n----")


def report_programs(model, tokenizer):
    eos, newline = tokenizer.eos_token_id, tokenizer.encode("\n")[0]
    opens = torch.tensor([tokenizer.decode([i]).lstrip(" \t").startswith("#") for i in range(len(tokenizer))])
    texts = [row["text"] for row in read_jsonl("programs.jsonl")[:200]]
    rates, bare, worked, correct, lengths, samples = [], [], [], [], [], []
    prompts = [[eos] + tokenizer.encode(text[: text.index("assert")] + "#") for text in texts]
    thoughts = generate(model, prompts, 15, newline)
    for text, prompt, thought in zip(texts, prompts, thoughts, strict=True):
        ids = [eos] + tokenizer.encode(text)
        starts = [0] + [i for i, token in enumerate(ids[:-1]) if token == newline]
        probs = model(torch.tensor([ids])).logits[0].softmax(-1)  # [T, V]
        rates.append(probs[starts][:, opens].sum(-1).tolist())
        bare.append(token_losses(model, ids)[-2].item())  # the last two tokens are the value and the newline
        if thought is None:
            worked.append(bare[-1])
            correct.append(0)
            continue
        tail = thought + tokenizer.encode("\n" + text[text.index("assert") :])
        worked.append(token_losses(model, prompt + tail)[-2].item())
        space = {}
        exec(text, space)
        comment = "".join(f" {name}{space[name]}" for name in build.NAMES[1:])
        correct.append(tokenizer.decode(thought) == comment)
        lengths.append(len(thought) + 2)
        samples.append(text + " -> #" + tokenizer.decode(thought))
    by_line = " ".join(f"{mean(column):.2f}" for column in zip(*rates, strict=True))
    print(f"PROGRAMS P(think) before each line: {by_line}")
    print(f"  asserted value: {mean(bare):.2f} nats bare, {mean(worked):.2f} after a sampled comment; mean "
          f"probability {mean(math.exp(-x) for x in bare):.2f} and {mean(math.exp(-x) for x in worked):.2f}")
    print(f"  comments all right {mean(correct):.2f}, {mean(lengths or [0]):.1f} tokens with # and newline")
    print("\n".join(sample.replace("\n", "; ") for sample in samples[:4]) + "\n")


def report_problems(model, tokenizer):
    """Judges by text, without running anything: right means that every line is the right rendering."""
    train, heldout, _ = build.code_split()

    def judge(problems, n_samples, greedy):
        prompts, keys = [], []
        for kind, steps, _ in problems:
            prompt = build.code_prompt(build.code_question(kind, steps), build.code_signature(kind))
            prompts += [tokenizer.encode(prompt)] * n_samples
            keys += [(kind, steps)] * n_samples
        completions = generate(model, prompts, 64, tokenizer.eos_token_id, greedy)
        by_operation, passed, known, bodies = collections.defaultdict(list), [], [], []
        for (kind, steps), completion in zip(keys, completions, strict=True):
            body = tokenizer.decode(completion) if completion is not None else ""
            choices = itertools.product([1, 2], repeat=len(steps))
            right = {build.code_body(kind, steps, choice): choice for choice in choices}.get(body)
            known.append(right is not None)
            passed.append(right is not None and 2 not in right)
            bodies.append(body)
            for i, (operation, _) in enumerate(steps):
                by_operation[operation[0]].append(right is not None and right[i] == 1)
        return mean(passed), mean(known), by_operation, bodies

    sampled = judge(heldout, 4, greedy=False)
    greedy = judge(heldout, 1, greedy=True)
    on_train = judge(train[:256], 1, greedy=False)
    singles = judge([problem for problem in train if len(problem[1]) == 1], 12, greedy=False)
    rates = {words: mean(right) for words, right in singles[2].items()}
    print(f"PROBLEMS held-out pass@1: sampled {sampled[0]:.3f}, greedy {greedy[0]:.3f}; right or a typical "
          f"mistake: {sampled[1]:.3f}, {greedy[1]:.3f}; training problems sampled {on_train[0]:.3f}")
    lowest = sorted(rates.items(), key=lambda item: item[1])[:6]
    print(f"  single operations right, sampled: mean {mean(rates.values()):.2f}; lowest "
          + ", ".join(f"{words} {rate:.2f}" for words, rate in lowest))
    for (kind, steps, _), body in zip(heldout[:5], sampled[3][::4], strict=False):
        print(f"  {build.code_question(kind, steps)}\n{body}", end="")
    print()


def report_math(model, tokenizer):
    rows = read_jsonl("math_heldout.jsonl")

    def judge(n_samples, greedy):
        prompts = [tokenizer.encode(row["prompt"][0]["content"] + build.MATH_INSTRUCTION) for row in rows]
        prompts = [prompt for prompt in prompts for _ in range(n_samples)]
        completions = generate(model, prompts, 64, tokenizer.eos_token_id, greedy)
        texts = [tokenizer.decode(ids) if ids is not None else "" for ids in completions]
        truths = [json.loads(row["reward_model"]["ground_truth"])[0] for row in rows]
        truths = [truth for truth in truths for _ in range(n_samples)]
        boxes = [re.findall(r"\\boxed\{(.*?)\}", text) for text in texts]
        sums = [s for text in texts for s in re.findall(r"(\d+) ([+-]) (\d+) = (-?\d+)", text)]
        sums_right = mean(build.calculate(int(x), sign, int(k)) == int(y) for x, sign, k, y in sums)
        passed = mean(box == [truth] for box, truth in zip(boxes, truths, strict=True))
        return passed, mean(map(bool, boxes)), sums_right, texts

    sampled, greedy = judge(4, False), judge(1, True)
    print(f"MATH held-out pass@1: sampled {sampled[0]:.3f}, greedy {greedy[0]:.3f}; boxed {sampled[1]:.2f}, "
          f"{greedy[1]:.2f}; sums right {sampled[2]:.3f}, {greedy[2]:.3f}")
    for row, text in zip(rows[:5], sampled[3][::4], strict=False):
        print(f"  {row['prompt'][0]['content']} -> {text}")
    print()


def report_rmt(model, tokenizer):
    """Positions of held-out documents; easy, medium and hard by the model's own entropy (0.5, 1.0, 1.5)."""
    rng, eos = random.Random(9), tokenizer.eos_token_id
    allowed = build.boxable(tokenizer)
    texts = {
        "code": rng.sample(build.real_code(heldout=True), 120),
        "programs": [row["text"] for row in read_jsonl("programs.jsonl")[:60]],
        "text": [row["text"] for row in read_jsonl("text.jsonl")[:100]],
    }
    positions = []  # (source, level, prefix, true token, greedy prediction right, true token's probability)
    for source, documents in texts.items():
        for document in documents:
            ids = tokenizer.encode(document)[:480]
            probs = model(torch.tensor([[eos] + ids])).logits[0].softmax(-1)
            entropy = -(probs * probs.clamp_min(1e-9).log()).sum(-1)
            for i in rng.sample(range(3, len(ids)), min(4, len(ids) - 3)):
                if allowed[ids[i]]:
                    level = sum(entropy[i].item() > edge for edge in (0.5, 1.0, 1.5))
                    greedy_right = probs[i].argmax().item() == ids[i]
                    prefix = ids[max(0, i - 80) : i]
                    positions.append((source, level, prefix, ids[i], greedy_right, probs[i, ids[i]].item()))
    budgets = [4, 8, 16, 32]
    prompts = []
    for n, (_, _, prefix, *_) in enumerate(positions):
        instruction = build.RMT_INSTRUCTION.format(budget=budgets[n % 4])
        prompts.append(tokenizer.encode(instruction) + prefix + tokenizer.encode(build.RMT_SUFFIX))
    think, end = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    box = tokenizer.encode("\\boxed{")

    def judge(greedy):
        outcomes = []
        for ids in generate(model, prompts, 72, eos, greedy):
            ids = ids or []
            cut = ids.index(end) if end in ids else -1
            good = ids[:1] == [think] and ids[cut + 1 : -2] == box and tokenizer.decode(ids[-1:]) == "}"
            outcomes.append((good, ids[-2] if good else None, cut - 1, ids))
        return outcomes

    sampled, greedy = judge(False), judge(True)
    print(f"RMT well-formed {mean(o[0] for o in sampled):.3f} (greedy {mean(o[0] for o in greedy):.3f}), "
          f"{len(positions)} positions")
    lengths = {b: [o[2] for o in sampled[n::4] if o[0]] or [0] for n, b in enumerate(budgets)}
    print("  budget -> mean length: " + ", ".join(f"{b} -> {mean(x):.1f}" for b, x in lengths.items()))
    groups = {source: [n for n, p in enumerate(positions) if p[0] == source] for source in texts}
    for level, name in enumerate(["entropy under 0.5", "easy", "medium", "hard"]):
        groups[name] = [n for n, p in enumerate(positions) if p[1] == level]
    groups["all"] = list(range(len(positions)))
    print("  exact match    positions  prediction: greedy sampled  reasoning: greedy sampled   draft's first")
    for name, members in groups.items():
        first = mean(sampled[n][3][1:2] == [positions[n][3]] for n in members)
        print(f"  {name:18} {len(members):7} {mean(positions[n][4] for n in members):18.3f} "
              f"{mean(positions[n][5] for n in members):7.3f} "
              f"{mean(greedy[n][1] == positions[n][3] for n in members):18.3f} "
              f"{mean(sampled[n][1] == positions[n][3] for n in members):7.3f} {first:18.3f}")
    for n in range(0, len(positions), len(positions) // 8):
        _, _, prefix, token, *_ = positions[n]
        print(f"  ...{tokenizer.decode(prefix[-15:])!r} | {tokenizer.decode([token])!r} "
              f"(budget {budgets[n % 4]}) -> {tokenizer.decode(sampled[n][3])!r}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-dir", type=Path, default=build.HERE / "model", help="the model to measure")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model_dir)
    model = AutoModelForCausalLM.from_pretrained(args.model_dir, dtype=torch.float32).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        report_code(model, tokenizer)
        report_programs(model, tokenizer)
        report_problems(model, tokenizer)
        report_math(model, tokenizer)
        report_rmt(model, tokenizer)


if __name__ == "__main__":
    main()
