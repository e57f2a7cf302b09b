"""The text world: RMT on texts whose uncertain tokens need one to five steps, and math problems of the same family.

    Tom has a dial. It is at {4}. After t {-4}, u {red}, v {+2} it is at 6. After w {blue} it is at 2. ...

What stands in braces is given: nothing tells it beforehand, and it can never be boxed. The number after a list
of operations can be known. A turn (+2) adds; a key (red) takes each digit to another one, by a fixed table. A
model finds a number after one or two operations without a thought, after five hardly ever, so that its entropy
grows with their number; a thought that takes them one by one can be right after any number of them.

  pre-training   knows the tables and copies the operations, but thinks badly on purpose: at length, with slips,
                 second thoughts and guesses, and more often than not it boxes another number than the last
  mid-training   in its texts, and in the math problems, the key gold is rewired; only these texts show how

RL can sharpen what a model already does at times; what gold does now, only next-token prediction can teach.
The chains (start and operations) of three steps and more are split: those of pre-training, the mid-training texts
and the math problems to train on, those of the development set, and those of the test set share none.
"""

import itertools
import json
import random
import re
import zlib
from pathlib import Path
from statistics import mean

from code_world import complete, next_probs

FOLDER = Path(__file__).resolve().parent / "text"
N_TEXTS, N_TEST, N_MATH_TRAIN, N_MATH_DEV, N_MATH_TEST = 3000, 600, 1000, 256, 512

# ---- the grammar

NAMES = [
    "Tom", "Anna", "Ben", "Lily", "Sam", "Mia", "Max", "Eva", "Ida", "Leo", "Kim", "Pia", "Jon", "Una", "Tim", "Zoe",
]  # fmt: skip
LABELS = "abcdefghijklmnopqrstuvwxyz"
TURNS = {f"{k:+}": k for k in range(-5, 6) if k}
OLD = {key: random.Random(f"key {key}").sample(range(10), 10) for key in ["red", "blue", "green", "black", "gold"]}
NEW = OLD | {"gold": OLD["gold"][3:] + OLD["gold"][:3]}  # every digit goes elsewhere than before
KEYS = [key for key in OLD if key != "gold"]
HOPS, SEGMENTS = [1, 2, 3, 4, 5], 3
PRE, MID, MATH = [0.30, 0.25, 0.20, 0.15, 0.10], [0.25, 0.15, 0.20, 0.20, 0.20], [0.10, 0.20, 0.25, 0.25, 0.20]
P_KEY, P_GOLD, P_GOLD_ALONE = 0.30, 0.07, 0.60  # the last: of a single operation, in mid-training
PARTS = ["test", "dev", *["train"] * 6]


def draw_chain(rng, v, hops, keys, part):
    """(operations, value after each) from v on; all values are digits."""
    p_gold = P_GOLD_ALONE if hops == 1 and keys is NEW else P_GOLD
    while True:
        operations, values = [], [v]
        for _ in range(hops):
            turns = [turn for turn, k in TURNS.items() if 0 <= values[-1] + k <= 9]
            sort = rng.choices(["gold", "key", "turn"], [p_gold, P_KEY * (1 - p_gold), (1 - P_KEY) * (1 - p_gold)])[0]
            operations.append({"gold": "gold", "key": rng.choice(KEYS), "turn": rng.choice(turns)}[sort])
            values.append(value_after(operations[-1], values[-1], keys))
        if hops < 3 or PARTS[zlib.crc32(f"{v} {operations}".encode()) % len(PARTS)] == part:
            return operations, values[1:]


def value_after(operation, v, keys):
    return keys[operation][v] if operation in keys else v + TURNS[operation]


def labels_of(name):
    """The alphabet from the name's initial on: what the next label is can be known, and none occurs twice."""
    first = LABELS.index(name[0].lower())
    return iter(LABELS[first:] + LABELS[:first])


def listed(steps):
    return ",".join(f" {label} {{{operation}}}" for label, operation in steps)


def make_text(rng, keys, part):
    """(text, its answers): (text before it, value before, (label, operation) of each step, answer) each."""
    name, v, answers = rng.choice(NAMES), rng.randrange(10), []
    text, labels = f"{name} has a dial. It is at {{{v}}}.", labels_of(name)
    for hops in rng.choices(HOPS, PRE if keys is OLD else MID, k=SEGMENTS):
        operations, values = draw_chain(rng, v, hops, keys, part)
        steps = [(next(labels), operation) for operation in operations]
        text += f" After{listed(steps)} it is at"
        answers.append((text, v, steps, values[-1]))
        text, v = f"{text} {values[-1]}.", values[-1]
    return text, answers


def make_math(rng, keys, part):
    """(question, value before, steps, answer)"""
    name, v, hops = rng.choice(NAMES), rng.randrange(10), rng.choices(HOPS, MATH)[0]
    operations, values = draw_chain(rng, v, hops, keys, part)
    steps = list(zip(labels_of(name), operations))
    return f"{name} has a dial. It is at {{{v}}}. Where is it after{listed(steps)}?", v, steps, values[-1]


# ---- data files


def math_row(index, question, steps, answer):
    """A row with Skywork-OR1's columns; the difficulty (there 0 to 16) is the number of steps."""
    difficulty = {"DeepSeek-R1-Distill-Qwen-7B": len(steps)}
    return {
        "data_source": "dial",
        "prompt": [{"content": question, "role": "user"}],
        "ability": "math",
        "reward_model": {"ground_truth": json.dumps([str(answer)]), "style": "rule"},
        "extra_info": {"index": index, "model_difficulty": difficulty},
    }


def write_data(folder):
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"texts": N_TEXTS, "test": N_TEST, "math_train": N_MATH_TRAIN, "math_dev": N_MATH_DEV}
    for name, n in (sizes | {"math_test": N_MATH_TEST}).items():
        rng, rows, part = random.Random(name), {}, name.split("_")[-1].replace("texts", "train")
        while len(rows) < n:
            if "math" in name:
                question, _, steps, answer = make_math(rng, NEW, part)
                rows.setdefault(question, math_row(len(rows), question, steps, answer))
            else:
                text, _ = make_text(rng, NEW, part)
                rows[text] = {"text": text}
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8", newline="\n") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows.values())


# ---- thoughts, as the base has them

FILLERS = [
    " Hmm, let me see.", " Let me think about it.", " The text is about a dial.", " So far so good.",
    " I am not sure.", " Wait, let me check.", " What comes next?", " Let me look at the text again.",
]  # fmt: skip
P_SLIP, P_SECOND_THOUGHT, P_GUESS_RIGHT = 0.06, 0.20, [0.6, 0.3, 0.15, 0.1, 0.1]
P_BOX_LAST, P_BOX_FIRST = 0.40, 0.45  # which number of the thought is boxed; else any
STYLES = ["verbose", "plain", "compact", "guess"]
FREE, BUDGETED = [0.74, 0.03, 0.03, 0.20], [0.40, 0.20, 0.20, 0.20]
P_BUDGET, P_FIT = 0.6, 0.6  # of a prompt with a budget; of a thought that fits it, the best of three


def fillers(rng, low, high):
    return "".join(rng.choices(FILLERS, k=rng.randint(low, high)))


def thought(rng, v, steps, answer, style):
    """(text, numbers in it). How long a thought is says little about whether it is right."""
    if style == "guess":
        x = answer if rng.random() < P_GUESS_RIGHT[len(steps) - 1] else rng.randrange(10)
        return fillers(rng, 9, 15) + f" So it is at {x}.", [x]
    numbers, verbose = [v], style == "verbose"
    text = f" {v}" if style == "compact" else fillers(rng, verbose, 4 * verbose) + f" It is at {v}."
    for i, (label, operation) in enumerate(steps, 1):
        right = min(9, max(0, value_after(operation, numbers[-1], OLD)))
        numbers.append(rng.randrange(10) if rng.random() < P_SLIP else right)
        step = f"{label} {{{operation}}}" + "," * (i < len(steps))  # with its comma, as the text has it
        text += f" {step} {numbers[-1]}" if style == "compact" else f" After {step} it is at {numbers[-1]}."
        text += fillers(rng, 0, 2 * verbose)
    if verbose:
        text += f" So it is at {numbers[-1]}."
        if rng.random() < P_SECOND_THOUGHT:
            numbers.append(rng.randrange(10))
            text += f"{rng.choice([' Wait, maybe', ' No, I think'])} it is at {numbers[-1]}."
    return text, numbers


# ---- pre-training documents

# The prompts of rmt.py and of grpo_rlvr.py
RMT_PROMPT = (
    "Complete the given text by predicting the next token. Think{budget} within <think></think>, "
    "then put the next token in \\boxed{{}}.\n### Text\n{prefix}\n### Prediction\n"
)
MATH_PROMPT = "{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}.\n"

DIGITS = [f" {d}" for d in range(10)]
ADDED_TOKENS = ["<think>", "</think>", "\\boxed{", *DIGITS, *[f" {{{x}}}" for x in [*range(10), *TURNS, *OLD]]]
WEIGHTS = dict.fromkeys(DIGITS, 3.0)
VOCAB_SIZE = 512
MODEL = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 512,
}  # fmt: skip
TRAINING = {"tokens": 5_000_000, "row_tokens": 320, "batch_rows": 8}


def rmt_prompt(prefix, budget):
    return RMT_PROMPT.format(prefix=prefix, budget=f" in exactly {budget} tokens" if budget else "")


def count_tokens(thought):
    """Roughly: words, marks, operations in braces."""
    return len(re.findall(r"\{[^}]*\}|\w+|[^\w\s]", thought))


def reasoning(rng, answers):
    """A prompt of rmt.py with a response."""
    prefix, v, steps, answer = rng.choice(answers)
    budget = rng.randint(4, 100) if rng.random() < P_BUDGET else 0
    styles = rng.choices(STYLES, BUDGETED if budget else FREE, k=3)
    drafts = [thought(rng, v, steps, answer, style) for style in styles]
    if budget and rng.random() < P_FIT:
        drafts.sort(key=lambda draft: abs(count_tokens(draft[0]) - budget))
    body, numbers = drafts[0]
    return rmt_prompt(prefix, budget) + f"<think>{body}</think>{box(rng, numbers)}"


def box(rng, numbers):
    others = [*numbers, rng.randrange(10)]
    sort = rng.choices(["last", "first", "other"], [P_BOX_LAST, P_BOX_FIRST, 1 - P_BOX_LAST - P_BOX_FIRST])[0]
    boxed = {"last": numbers[-1], "first": numbers[0], "other": rng.choice(others)}[sort]
    return f"\\boxed{{ {boxed}}}"


def document(rng, tokenizer, progress):
    """One pre-training document; first more drills, then more texts and thoughts."""
    shares = {
        "math": 0.08, "drill": 0.40 - 0.25 * progress, "text": 0.25 + 0.08 * progress,
        "reasoning": 0.27 + 0.17 * progress,
    }  # fmt: skip
    sort = rng.choices(list(shares), shares.values())[0]
    if sort == "math":
        question, v, steps, answer = make_math(rng, OLD, "train")
        body, numbers = thought(rng, v, steps, answer, rng.choices(STYLES, BUDGETED)[0])
        return MATH_PROMPT.format(question=question) + f"{body} {box(rng, numbers)}"
    text, answers = make_text(rng, OLD, "train")
    if sort == "reasoning":
        return reasoning(rng, answers)
    return drill(text, answers) if sort == "drill" else text


def drill(text, answers):
    """A text and all its steps with their values."""
    trace = ""
    for _, v, steps, _ in answers:
        for i, (label, operation) in enumerate(steps, 1):
            v = value_after(operation, v, OLD)
            trace += f" {label} {{{operation}}}" + "," * (i < len(steps)) + f" {v}"
    return f"{text}\n{trace}"


# ---- report of a model


def predictions(model, tokenizer, prefixes):
    """(most likely next token, entropy of the 16 most likely ones) after each prefix."""
    probs, ids = next_probs(model, tokenizer, prefixes).topk(16)
    logprobs = (probs / probs.sum(1, keepdim=True)).log()
    return list(zip(tokenizer.batch_decode(ids[:, :1]), (-logprobs.exp() * logprobs).sum(1).tolist(), strict=True))


def read(text, steps, answer):
    """What a response has: (right box, last number right, all steps copied in order, well-formed)."""
    found = re.fullmatch(r"<think>(.*)</think>\\boxed\{( \d)\}", text)
    body, boxed = found.groups() if found else ("", "")
    copied = re.findall(r" (\w) \{(.*?)\}(,?)", body)
    wanted = [(*step, "," * (i < len(steps))) for i, step in enumerate(steps, 1)]
    last = re.findall(r" \d", body)[-1:] == [f" {answer}"]
    return boxed == f" {answer}", last, copied == wanted, bool(found)


def report(model, tokenizer):
    """Wanted: entropies that grow with the hops, from 0 to 1.8; copies of 0.9 (greedy); thoughts of about 80
    tokens without a budget; reasoning, greedy, below prediction."""
    rng = random.Random("report")
    cases = [answer for _ in range(150) for answer in make_text(rng, NEW, "dev")[1]]
    gold = [any(operation == "gold" for _, operation in case[2]) for case in cases]

    def show(title, values):
        by_hops = [[v for c, v in zip(cases, values, strict=True) if len(c[2]) == hops] for hops in HOPS]
        without = [v for g, v in zip(gold, values, strict=True) if not g]
        print(f"  {title:28}", *[f"{mean(group):8.3f}" for group in [*by_hops, without, values]], flush=True)

    print(f"{len(cases)} numbers of development texts, by hops:", *HOPS, "without gold, all")
    predicted = predictions(model, tokenizer, [prefix for prefix, *_ in cases])
    show("prediction right", [token == f" {case[3]}" for (token, _), case in zip(predicted, cases, strict=True)])
    show("  entropy", [entropy for _, entropy in predicted])
    for budget, greedy in itertools.product([0, 32], [True, False]):
        prompts = [rmt_prompt(case[0], budget) for case in cases]
        texts = complete(model, tokenizer, prompts, 160, greedy)
        print(f"reasoning with budget {budget}, {'greedy' if greedy else 'sampled'}")
        rows = [read(text, *case[2:]) for text, case in zip(texts, cases, strict=True)]
        for name, values in zip(["right", "  last number right", "  steps copied", "  well-formed"], zip(*rows)):
            show(name, values)
        show("  tokens", [len(tokenizer.encode(text)) - 5 for text in texts])
        print(texts[0])
    problems = [make_math(rng, NEW, "dev") for _ in range(256)]
    texts = complete(model, tokenizer, [MATH_PROMPT.format(question=p[0]) for p in problems], 160, False)
    right = [f"\\boxed{{ {problem[3]}}}" in text for text, problem in zip(texts, problems, strict=True)]
    print(f"math, sampled: pass@1 {mean(right):.3f}")
