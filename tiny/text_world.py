"""The text world: a dial whose position is the uncertain token (RMT, and GRPO on math of the same family).

    Tom has a dial. It is at {4}. After a {-4}, b {flip}, c {red} it is at 2. After d {+1} it is at 3. ...

What stands in braces is given, not predictable, and can never be boxed. What is uncertain is the number after
one to five operations. The base model can do one or two of them without a thought, so its entropy grows with
their number; a thought that takes them one by one can be right however many there are.

The base thinks badly on purpose: at length (fillers), with slips, a typical mistake for `flip`, second
thoughts and guesses; and it often boxes the number it started from. It copies the operations well. The four
keys were rewired after pre-training: only the mid-training texts and the math problems show what they do now.

Chains of three or more operations are split: train (pre-training too), dev and test share none.
"""

import json
import random
import re
import zlib
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "text"
N_TEXTS, N_HELDOUT, N_MATH_TRAIN, N_MATH_DEV, N_MATH_TEST = 4000, 600, 1000, 300, 500

NAMES = "Tom Anna Ben Lily Sam Mia Max Eva Ida Leo Kim Pia Jon Una Tim Zoe".split()
LABELS = "abcdefghijklmnopqrstuvwxyz"
TURNS = {f"{sign}{k}": int(f"{sign}{k}") for k in range(1, 6) for sign in "+-"}
KEYS = ["red", "blue", "green", "black"]


def wiring(seed):
    rng = random.Random(seed)
    return {key: rng.sample(range(10), 10) for key in KEYS}


OLD, NEW = wiring(13), wiring(94)  # where a key turns each position, in pre-training and since; they differ
SEGMENTS = 4
HOPS = (1, 2, 3, 4, 5)
HOPS_PRE, HOPS_MID = (0.30, 0.25, 0.20, 0.15, 0.10), (0.25, 0.15, 0.20, 0.20, 0.20)
HOPS_MATH = (0.10, 0.20, 0.25, 0.25, 0.20)
P_KEY_PRE, P_KEY_MID, P_KEY_SINGLE = 0.10, 0.15, 0.50  # the last: mid-training, a single operation
P_FLIP = 0.23  # of an operation that is no key


def apply(operation, v, keys):
    if operation in keys:
        return keys[operation][v]
    return 9 - v if operation == "flip" else v + TURNS[operation]


def draw_chain(rng, v, hops, p_key, keys, part):
    """(operations, value after them); all values are within 0..9."""
    while True:
        operations, x = [], v
        while len(operations) < hops:
            operation = rng.choice(KEYS) if rng.random() < p_key else "flip"
            if operation == "flip" and rng.random() > P_FLIP:
                operation = rng.choice(list(TURNS))
            if 0 <= apply(operation, x, keys) <= 9:
                operations.append(operation)
                x = apply(operation, x, keys)
        split = zlib.crc32(f"{v} {operations}".encode()) % 8
        if hops < 3 or part == {0: "test", 1: "dev"}.get(split, "train"):
            return operations, x


def labels_of(name):
    """The alphabet from the name's initial on, so that labels are predictable; one occurs once in a text."""
    first = LABELS.index(name[0].lower())
    return iter(LABELS[first:] + LABELS[:first])


def make_text(rng, keys, part):
    """(text, [(text before an answer, value before, (label, operation) of each step, answer)])"""
    name, v, answers = rng.choice(NAMES), rng.randrange(10), []
    text, labels = f"{name} has a dial. It is at {{{v}}}.", labels_of(name)
    for hops in rng.choices(HOPS, HOPS_PRE if keys is OLD else HOPS_MID, k=SEGMENTS):
        p_key = P_KEY_PRE if keys is OLD else P_KEY_SINGLE if hops == 1 else P_KEY_MID
        operations, after = draw_chain(rng, v, hops, p_key, keys, part)
        steps = [(next(labels), operation) for operation in operations]
        text += " After" + ",".join(f" {label} {{{operation}}}" for label, operation in steps) + " it is at"
        answers.append((text, v, steps, after))
        text, v = f"{text} {after}.", after
    return text, answers


def make_math(rng, keys, part):
    """(question, value before, steps, answer)"""
    name, v, hops = rng.choice(NAMES), rng.randrange(10), rng.choices(HOPS, HOPS_MATH)[0]
    operations, after = draw_chain(rng, v, hops, P_KEY_PRE if keys is OLD else P_KEY_MID, keys, part)
    steps = list(zip(labels_of(name), operations))
    listed = ",".join(f" {label} {{{operation}}}" for label, operation in steps)
    return f"{name} has a dial. It is at {{{v}}}. Where is it after{listed}?", v, steps, after


# ---------------------------------------------------------------- thoughts, as the base has them

FILLERS = [
    " Hmm, let me see.", " Let me think about it.", " The text is about a dial.", " So far so good.",
    " I am not sure.", " Wait, let me check.", " What comes next?", " Let me look at the text again.",
]  # fmt: skip
P_SLIP, P_FLIP_MISTAKE, P_SECOND_THOUGHT = 0.05, 0.52, 0.15
P_GUESS_RIGHT = {1: 0.6, 2: 0.3, 3: 0.15, 4: 0.12, 5: 0.1}
P_BOX_LAST, P_BOX_FIRST = 0.40, 0.46  # which number of the thought is boxed; else any
STYLES = ("verbose", "plain", "compact", "guess")
FREE, BUDGETED, MATH = (0.74, 0.03, 0.03, 0.20), (0.40, 0.20, 0.20, 0.20), (0.3, 0.3, 0.2, 0.2)
P_BUDGET, P_FIT = 0.6, 0.6  # of a prompt with a budget; of a thought that fits it (the best of three drafts)


def fillers(rng, low, high):
    return "".join(rng.choices(FILLERS, k=rng.randint(low, high)))


def step_value(rng, operation, v):
    """The value after an operation, as the base often has it."""
    if rng.random() < P_SLIP:
        return rng.randrange(10)
    if operation == "flip" and rng.random() < P_FLIP_MISTAKE:
        return min(9, 10 - v)
    return min(9, max(0, apply(operation, v, OLD)))


def thought(rng, v, steps, answer, style):
    """(text, numbers in it). How long it is says nothing about whether it is right."""
    if style == "guess":
        x = answer if rng.random() < P_GUESS_RIGHT[len(steps)] else rng.randrange(10)
        return fillers(rng, 9, 15) + f" So it is at {x}.", [x]
    verbose, numbers = style == "verbose", [v]
    text = f" {v}" if style == "compact" else fillers(rng, verbose, 4 * verbose) + f" It is at {v}."
    for i, (label, operation) in enumerate(steps, 1):
        numbers.append(step_value(rng, operation, numbers[-1]))
        step = f"{label} {{{operation}}}" + "," * (i < len(steps))  # as in the text
        text += f" {step} {numbers[-1]}" if style == "compact" else f" After {step} it is at {numbers[-1]}."
        text += fillers(rng, verbose, 2 * verbose)
    if verbose:
        text += f" So it is at {numbers[-1]}."
        if rng.random() < P_SECOND_THOUGHT:
            numbers.append(rng.randrange(10))
            opening = rng.choice((" Wait, maybe", " No, I think"))
            text += f"{opening} it is at {numbers[-1]}." + fillers(rng, 0, 1)
    return text, numbers


# ---------------------------------------------------------------- pre-training documents

# The prompts are those of rmt.py and grpo_rlvr.py.
RMT_PROMPT = (
    "Complete the given text by predicting the next token. {think} within <think></think>, "
    "then put the next token in \\boxed{{}}.\n### Text\n{prefix}\n### Prediction\n"
)
MATH_PROMPT = "{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}.\n"

DIGITS, GIVEN = [f" {d}" for d in range(10)], [f" {{{x}}}" for x in (*range(10), *TURNS, "flip", *KEYS)]
ADDED_TOKENS = ["<think>", "</think>", "\\boxed{", *DIGITS, *GIVEN]
WEIGHTS = dict.fromkeys(DIGITS, 3.0)  # of a token in the loss; else 1
VOCAB_SIZE = 640
MODEL = dict(hidden_size=160, intermediate_size=448, num_hidden_layers=4, num_attention_heads=5,
             max_position_embeddings=512)  # fmt: skip
TRAINING = dict(tokens=7_500_000, row_tokens=320, batch_rows=8)
TOKEN = re.compile(r"\{[^}]*\}|\w+|[^\w\s]")


def reasoning(rng, tokenizer, text, answers):
    """A prompt of rmt.py and a response."""
    budget = rng.randint(4, 100) if rng.random() < P_BUDGET else 0
    think = f"Think in exactly {budget} tokens" if budget else "Think"
    if tokenizer is None or rng.random() < 0.92:
        prefix, v, steps, answer = rng.choice(answers)
        styles = rng.choices(STYLES, BUDGETED if budget else FREE, k=3)
        drafts = [thought(rng, v, steps, answer, style) for style in styles]
        if budget and rng.random() < P_FIT:
            drafts.sort(key=lambda draft: abs(len(TOKEN.findall(draft[0])) - budget))
        body, numbers = drafts[0]
        r = rng.random()
        if r < P_BOX_LAST + P_BOX_FIRST:
            boxed = f" {numbers[-1 if r < P_BOX_LAST else 0]}"
        else:
            boxed = f" {rng.choice([*numbers, rng.randrange(10)])}"
    else:  # any other position, now and then
        ids = tokenizer.encode(text)
        t = rng.choice([t for t in range(2, len(ids)) if "{" not in tokenizer.decode(ids[t])])
        prefix, boxed = tokenizer.decode(ids[:t]), tokenizer.decode(ids[t])
        body = fillers(rng, 0, 10) + f" The next is{boxed}"
    return RMT_PROMPT.format(think=think, prefix=prefix) + f"<think>{body}</think>\\boxed{{{boxed}}}"


def document(rng, tokenizer, progress):
    shares = 0.08, 0.40 - 0.25 * progress, 0.25 + 0.08 * progress, 0.27 + 0.17 * progress
    kind = rng.choices(("math", "drill", "text", "reasoning"), shares)[0]
    if kind == "math":
        question, v, steps, answer = make_math(rng, OLD, "train")
        body, numbers = thought(rng, v, steps, answer, rng.choices(STYLES, MATH)[0])
        boxed = numbers[-1] if rng.random() < 0.7 else rng.randrange(10)
        return MATH_PROMPT.format(question=question) + f"{body} \\boxed{{ {boxed}}}"
    text, answers = make_text(rng, OLD, "train")
    if kind == "text":
        return text
    if kind == "reasoning":
        return reasoning(rng, tokenizer, text, answers)
    trace, v = "", answers[0][1]  # a drill: the text and all its values, right
    for _, _, steps, _ in answers:
        for i, (label, operation) in enumerate(steps, 1):
            v = apply(operation, v, OLD)
            trace += f" {label} {{{operation}}}" + "," * (i < len(steps)) + f" {v}"
    return f"{text}\n{trace}"


# ---------------------------------------------------------------- data files, report


def write_data(folder):
    folder.mkdir(exist_ok=True)
    rng, seen = random.Random(1), set()
    files = ("texts", "train", N_TEXTS), ("heldout", "test", N_HELDOUT), ("math_train", "train", N_MATH_TRAIN)
    for name, part, n in (*files, ("math_dev", "dev", N_MATH_DEV), ("math_test", "test", N_MATH_TEST)):
        rows = {}
        while len(rows) < n:
            question, _, steps, answer = make_math(rng, NEW, part)
            text = question if "math" in name else make_text(rng, NEW, part)[0]
            if text not in seen:
                math = {"question": question, "hops": len(steps), "answer": answer, "index": len(rows)}
                rows[text] = math_row(**math) if "math" in name else {"text": text}
            seen.add(text)
        lines = "".join(json.dumps(row) + "\n" for row in rows.values())
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8", newline="\n")


def math_row(question, hops, answer, index):
    """A row with Skywork-OR1's columns; the difficulty (0..16 there) is the number of operations."""
    truth = {"ground_truth": json.dumps([str(answer)]), "style": "rule"}
    extra = {"index": index, "model_difficulty": {"DeepSeek-R1-Distill-Qwen-1.5B": hops}}
    prompt = [{"content": question, "role": "user"}]
    return dict(data_source="dial", prompt=prompt, ability="math", reward_model=truth, extra_info=extra)


def complete(model, tokenizer, prompts, temperature):
    """Texts of completions; temperature 0 is greedy."""
    how = dict(do_sample=True, temperature=temperature, top_k=0) if temperature else dict(do_sample=False)
    texts = []
    for start in range(0, len(prompts), 128):
        chunk = prompts[start : start + 128]
        batch = tokenizer(chunk, padding=True, padding_side="left", return_tensors="pt")
        ids, mask = batch["input_ids"], batch["attention_mask"]
        out = model.generate(ids, attention_mask=mask, max_new_tokens=160, **how)
        texts += tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return texts


def report(model, tokenizer):
    """By number of operations: next-token prediction, next-token reasoning and its parts. Math: pass@1."""
    rng = random.Random(5)
    cases = [answer for _ in range(150) for answer in make_text(rng, NEW, "dev")[1]]

    def show(title, rows):
        print(title)
        for n in (*HOPS, "all"):
            columns = zip(*[row for row, case in zip(rows, cases) if n in (len(case[2]), "all")])
            print(f"  {n:3}", *(f"{sum(column) / len(column):8.2f}" for column in columns))

    rows = []
    for prefix, _, _, answer in cases:
        logits = model(tokenizer(prefix, return_tensors="pt").input_ids).logits[0, -1]
        top = logits.topk(16).values.log_softmax(-1)
        rows.append((tokenizer.decode(logits.argmax()) == f" {answer}", -(top.exp() * top).sum().item()))
    show("prediction: right, entropy", rows)
    for budget, temperature in ((0, 0), (0, 0.8), (40, 0), (40, 0.8)):
        think, rows = f"Think in exactly {budget} tokens" if budget else "Think", []
        prompts = [RMT_PROMPT.format(think=think, prefix=prefix) for prefix, *_ in cases]
        for text, (_, _, steps, answer) in zip(complete(model, tokenizer, prompts, temperature), cases):
            found = re.fullmatch(r"<think>(.*)</think>\\boxed\{( \d)\}", text)
            body, boxed = found.groups() if found else ("", "")
            operations, numbers = re.findall(r" (\w) \{(.*?)\}", body), re.findall(r" \d", body)
            row = bool(found), boxed == f" {answer}", numbers[-1:] == [f" {answer}"], operations != []
            rows.append((*row, operations == steps, len(tokenizer.encode(body))))
        title = f"\nreasoning, budget {budget}, temperature {temperature}:"
        show(f"{title} well-formed, right, last number right, worked, operations copied, tokens", rows)
        print(text)
    problems = [make_math(rng, NEW, "dev") for _ in range(300)]
    prompts = [MATH_PROMPT.format(question=question) for question, *_ in problems]
    for temperature in (0, 1.0):
        texts = complete(model, tokenizer, prompts, temperature)
        right = [f"\\boxed{{ {answer}}}" in text for text, (*_, answer) in zip(texts, problems)]
        print(f"math, temperature {temperature}: pass@1 {sum(right) / len(right):.3f}")
