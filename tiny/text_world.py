"""The text world: RMT on texts whose uncertain tokens need one to five steps, and math problems of the same family.

    Tom has a dial. It is at {4}. After t {-4}, u {red}, v {+2} it is at 4. After w {green} it is at 2. ...

What stands in braces is given: it does not follow from the text before it, and it can never be boxed. The number after
a list of operations follows. A turn (+2) adds; a key (red) takes each digit to another one, by a fixed table. Without a
thought a model finds the number after one or two operations, and hardly ever after five, so that its entropy grows with
the operations. A thought that takes them one by one can be right after any number of them.

  pre-training   knows the tables and copies the operations, but thinks badly on purpose: at length, with slips,
                 second thoughts and guesses; in most cases it boxes another number than the last of the thought
  mid-training   in its texts, and in the math problems, the key gold has another table, which only these texts show

RL can make a model do more often what it does at times already; what gold does now, only next-token prediction can
teach. Chains (start and operations) of three steps and more are in one part only: that of pre-training, the
mid-training texts and the math problems to train on, that of the development set, or that of the test set.
"""

import json
import random
import re
import zlib

SIZES = {"texts": 3000, "test": 600, "math_train": 1000, "math_dev": 256, "math_test": 512}

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
    """The alphabet from the name's initial on, so that the next label is always certain."""
    first = LABELS.index(name[0].lower())
    return iter(LABELS[first:] + LABELS[:first])


def listed(steps):
    """Each step as a text has it, with its comma: ["t {red},", "u {+2}"]."""
    words = [f"{label} {{{operation}}}," for label, operation in steps]
    return [*words[:-1], words[-1][:-1]]


def make_text(rng, keys, part):
    """(text, its answers): (text before it, value before, (label, operation) of each step, answer) each."""
    name, v, answers = rng.choice(NAMES), rng.randrange(10), []
    text, labels = f"{name} has a dial. It is at {{{v}}}.", labels_of(name)
    for hops in rng.choices(HOPS, PRE if keys is OLD else MID, k=SEGMENTS):
        operations, values = draw_chain(rng, v, hops, keys, part)
        steps = [(next(labels), operation) for operation in operations]
        text += f" After {' '.join(listed(steps))} it is at"
        answers.append((text, v, steps, values[-1]))
        text, v = f"{text} {values[-1]}.", values[-1]
    return text, answers


def make_math(rng, keys, part):
    """(question, value before, steps, answer)"""
    name, v, hops = rng.choice(NAMES), rng.randrange(10), rng.choices(HOPS, MATH)[0]
    operations, values = draw_chain(rng, v, hops, keys, part)
    steps = list(zip(labels_of(name), operations))
    question = f"{name} has a dial. It is at {{{v}}}. Where is it after {' '.join(listed(steps))}?"
    return question, v, steps, values[-1]


# ---- data files


def math_row(index, question, steps, answer):
    """A row with Skywork-OR1's columns; the difficulty (there 0 to 16) is the number of steps."""
    return {
        "data_source": "dial",
        "prompt": [{"content": question, "role": "user"}],
        "ability": "math",
        "reward_model": {"ground_truth": json.dumps([str(answer)]), "style": "rule"},
        "extra_info": {"index": index, "model_difficulty": {"DeepSeek-R1-Distill-Qwen-7B": len(steps)}},
    }


def data_files():
    """{name: rows} of the JSON Lines files."""
    files = {}
    for name, n in SIZES.items():
        rng, rows, part = random.Random(name), {}, name.split("_")[-1].replace("texts", "train")
        while len(rows) < n:
            if "math" in name:
                question, _, steps, answer = make_math(rng, NEW, part)
                rows.setdefault(question, math_row(len(rows), question, steps, answer))
            else:
                text, _ = make_text(rng, NEW, part)
                rows[text] = {"text": text}
        files[name] = rows.values()
    return files


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
    for step, (_, operation) in zip(listed(steps), steps):
        right = min(9, max(0, value_after(operation, numbers[-1], OLD)))
        numbers.append(rng.randrange(10) if rng.random() < P_SLIP else right)
        text += f" {step} {numbers[-1]}" if style == "compact" else f" After {step} it is at {numbers[-1]}."
        text += fillers(rng, 0, 2 * verbose)
    if verbose:
        text += f" So it is at {numbers[-1]}."
        if rng.random() < P_SECOND_THOUGHT:
            numbers.append(rng.randrange(10))
            text += f"{rng.choice([' Wait, maybe', ' No, I think'])} it is at {numbers[-1]}."
    return text, numbers


# ---- pre-training documents

# The prompts of rmt.py and grpo_rlvr.py
RMT_PROMPT = (
    "Complete the given text by predicting the next token. Think{budget} within <think></think>, "
    "then put the next token in \\boxed{{}}.\n### Text\n{prefix}\n### Prediction\n"
)
MATH_PROMPT = "{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}.\n"

DIGITS = [f" {d}" for d in range(10)]
ADDED_TOKENS = ["<think>", "</think>", "\\boxed{", *DIGITS, *[f" {{{x}}}" for x in [*range(10), *TURNS, *OLD]]]
WEIGHTS = dict.fromkeys(DIGITS, 3.0)
VOCAB_SIZE = 512
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


def document(rng, progress):
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
    if sort == "drill":  # after the text all its steps with their values
        text += "\n"
        for _, v, steps, _ in answers:
            for step, (_, operation) in zip(listed(steps), steps):
                v = value_after(operation, v, OLD)
                text += f" {step} {v}"
    return text
