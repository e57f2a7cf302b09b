"""Builds what `rmt.py --tiny` and `grpo_rlvr.py --tiny --task math` use: tiny/model, text.jsonl, math_*.jsonl.

    python tiny/build_mixed.py                    data, tokenizer, model (about an hour on one core)
    python tiny/build_mixed.py --parts data       the JSON Lines files only (seconds); the same bytes every time

The model is pre-trained on one mixture (PHASES below): real code, programs and coding problems, math (word
problems with worked solutions), text (small synthetic English), and next-token reasoning over all of them. It
is unreliable on purpose, because RL can only sharpen what a model already does now and then: solutions use a
typical mistake instead of the right operation, as often as the operation's row says, and the next-token
reasoner boxes its draft's first token only in half of the cases. The JSON Lines files hold no such noise.
"""

import argparse
import functools
import itertools
import json
import math
import random
import sysconfig
import time
import tokenize
import zlib
from pathlib import Path

HERE = Path(__file__).resolve().parent

# --------------------------------------------------------------------------------------------------
# Numbers. Documents are drawn until each part has its share of the training tokens.
# --------------------------------------------------------------------------------------------------

# Training has three phases: (tokens, peak of the learning rates, weight of next-token reasoning, shares).
# A phase drills what the one before was too short to teach: the second arithmetic and following a program's
# values, the third next-token reasoning, whose few telling tokens it also weighs. (The ends of documents that
# packing cuts off count as drawn: 8.7 of the 10.5 million tokens are trained on.)
PHASES = {
    "pretrain": (7_500_000, 1.0, 0, {"real_code": 0.36, "programs": 0.15, "problems": 0.15, "math": 0.13,
                                     "text": 0.04, "rmt": 0.17}),
    "drill": (1_500_000, 0.5, 0, {"real_code": 0.10, "programs": 0.13, "traces": 0.27, "problems": 0.14,
                                  "math": 0.14, "sums": 0.06, "text": 0.02, "rmt": 0.14}),
    "reason": (1_500_000, 0.4, 1, {"real_code": 0.14, "programs": 0.12, "traces": 0.06, "problems": 0.14,
                                   "math": 0.13, "text": 0.02, "rmt": 0.39}),
}

N_PROGRAMS = 9000  # RA3's demonstration sees each program once
N_TEXTS = 2500
N_MATH_TRAIN, N_MATH_HELDOUT = 1000, 200
N_CODE_TRAIN, N_CODE_HELDOUT = 512, 128  # about a fifth of them are left out: DOCUMENTS_ONLY

# Probability that a pre-training document renders an operation rightly. With about half of the operations at
# each value and two steps per problem, a third of the sampled and of the greedy solutions are right at first.
# Signs are learnt less sharply than code; a mistake must be more frequent for greedy decoding to make it.
# (The committed model had 0.42 in its first two phases.)
RIGHT_MOSTLY, RIGHT_SELDOM, SIGN_SELDOM = 0.70, 0.42, 0.30

VOCAB_SIZE = 2048
EOS = "<|endoftext|>"


def write_jsonl(name, rows):
    with open(HERE / name, "w", encoding="utf-8", newline="\n") as f:
        for row in rows:
            f.write(json.dumps(row, ensure_ascii=False) + "\n")


# --------------------------------------------------------------------------------------------------
# Part 1: real code
# --------------------------------------------------------------------------------------------------

SKIP_DIRS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "pydoc_data", "encodings"}
PIECE_CHARS = 1300  # about 400 tokens, so that a piece fits a training row


@functools.cache
def real_code(heldout=False):
    """Pieces of the standard library's files; `heldout=True`: of the fifth of the files never trained on."""
    root = Path(sysconfig.get_paths()["stdlib"])
    pieces = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIP_DIRS & set(name.parts) or name.name.startswith("test_"):
            continue
        if (zlib.crc32(name.as_posix().encode()) % 5 == 0) != heldout:
            continue
        try:
            with tokenize.open(path) as f:
                lines = f.read().splitlines(keepends=True)
        except (SyntaxError, UnicodeDecodeError):
            continue
        piece = ""
        for line in lines:
            # cut in front of a top-level statement, at any line when the piece gets too long
            top_level = line[0] not in " \t\n#)]}\"'"
            if piece and (len(piece) > PIECE_CHARS or (len(piece) > PIECE_CHARS / 3 and top_level)):
                pieces.append(piece)
                piece = ""
            piece += line
        if piece.strip():
            pieces.append(piece)
    return pieces


# --------------------------------------------------------------------------------------------------
# Part 2: programs for RA3. Each step depends on the one before and may flip the sign, so the last value
# cannot be summed up in one go; a single step is one digit and another. All programs have the same number
# of lines, because the policy decides whether to think before it sees the next line.
# --------------------------------------------------------------------------------------------------

NAMES = "abcdef"
IDLE_COMMENTS = ["# next", "# step", "# set it", "# go on"]
P_WORKED, P_IDLE = 0.5, 0.2


def make_program(rng):
    """Returns (lines, values of all variables). Every value is uniform and independent of the others."""
    values = [rng.randint(0, 9)]
    lines = [f"a = {values[0]}"]
    for previous, name in itertools.pairwise(NAMES):
        x, y = values[-1], rng.randint(0, 9)
        forms = [f"{previous} + {y - x}"] if y >= x else [f"{previous} - {x - y}"]
        if x + y <= 9:
            forms.append(f"{x + y} - {previous}")
        lines.append(f"{name} = {rng.choice(forms)}")
        values.append(y)
    lines.append(f"assert {NAMES[-1]} == {values[-1]}")
    return lines, values


def program_document(rng, taken, p_worked=P_WORKED):
    """A pre-training document: a program that is not in `taken`, with comments."""
    while True:
        lines, values = make_program(rng)
        if "\n".join(lines) + "\n" not in taken:
            break
    text = ""
    for line in lines[:-1]:
        if rng.random() < P_IDLE:
            text += rng.choice(IDLE_COMMENTS) + "\n"
        text += line + "\n"
    if rng.random() < p_worked:
        text += "#" + "".join(f" {name}{value}" for name, value in list(zip(NAMES, values))[1:]) + "\n"
    return text + lines[-1] + "\n"


@functools.cache
def make_programs():
    rng = random.Random(2)
    programs = {}
    while len(programs) < N_PROGRAMS:
        programs["\n".join(make_program(rng)[0]) + "\n"] = None
    return [{"text": text} for text in programs]


# --------------------------------------------------------------------------------------------------
# Part 3: coding problems: one operation, or two of a kind one after the other. {k} is a small constant.
# (words, right, typical mistake, probability of the right one in pre-training)
# --------------------------------------------------------------------------------------------------

M, S = RIGHT_MOSTLY, RIGHT_SELDOM

NUMBER_STEPS = [
    ("add {k}", "n + {k}", "n - {k}", M),
    ("subtract {k}", "n - {k}", "{k} - n", S),
    ("multiply by {k}", "n * {k}", "n ** {k}", M),
    ("divide by {k} and round down", "n // {k}", "n % {k}", S),
    ("take the remainder by {k}", "n % {k}", "n // {k}", M),
    ("raise it to at least {k}", "max(n, {k})", "min(n, {k})", S),
    ("cut it to at most {k}", "min(n, {k})", "max(n, {k})", M),
    ("drop the sign", "abs(n)", "-n", M),
    ("change the sign", "-n", "abs(n)", S),
    ("square it", "n * n", "n + n", M),
]
LIST_STEPS = [
    ("keep the even numbers", "[x for x in xs if x % 2 == 0]", "[x for x in xs if x % 2 == 1]", M),
    ("keep the odd numbers", "[x for x in xs if x % 2 == 1]", "[x for x in xs if x % 2 == 0]", S),
    ("keep the numbers above {k}", "[x for x in xs if x > {k}]", "[x for x in xs if x >= {k}]", S),
    ("keep the numbers from {k} up", "[x for x in xs if x >= {k}]", "[x for x in xs if x > {k}]", M),
    ("add {k} to each", "[x + {k} for x in xs]", "xs + [{k}]", M),
    ("multiply each by {k}", "[x * {k} for x in xs]", "xs * {k}", S),
    ("square each", "[x * x for x in xs]", "[x + x for x in xs]", M),
    ("sort upwards", "sorted(xs)", "sorted(xs, reverse=True)", M),
    ("sort downwards", "sorted(xs, reverse=True)", "sorted(xs)", S),
    ("reverse the order", "xs[::-1]", "sorted(xs)", M),
    ("take the first {k}", "xs[:{k}]", "xs[{k}:]", M),
    ("leave out the first {k}", "xs[{k}:]", "xs[:{k}]", S),
    ("take the last {k}", "xs[-{k}:]", "xs[:-{k}]", S),
    ("take every second one", "xs[::2]", "xs[1::2]", M),
]
LIST_ENDS = [
    ("add them up", "sum(xs)", "len(xs)", M),
    ("count them", "len(xs)", "sum(xs)", S),
    ("find the largest", "max(xs, default=0)", "min(xs, default=0)", M),
    ("find the smallest", "min(xs, default=0)", "max(xs, default=0)", S),
]
STRING_STEPS = [
    ("make it upper case", "s.upper()", "s.title()", M),
    ("make it lower case", "s.lower()", "s.upper()", S),
    ("swap upper and lower case", "s.swapcase()", "s.lower()", M),
    ("reverse it", "s[::-1]", "s[1:]", M),
    ("remove the spaces", 's.replace(" ", "")', "s.strip()", S),
    ("take the first {k} letters", "s[:{k}]", "s[{k}:]", M),
    ("leave out the first {k} letters", "s[{k}:]", "s[:{k}]", S),
    ("repeat it {k} times", "s * {k}", "s + s[:{k}]", M),
    ("put a dot at the end", 's + "."', '"." + s', S),
    ("double every letter", '"".join(c * 2 for c in s)', "s * 2", M),
]
KINDS = {  # parameter: (words for it, first or only step, last step)
    "n": ("number", NUMBER_STEPS, NUMBER_STEPS),
    "xs": ("list", LIST_STEPS, LIST_STEPS + LIST_ENDS),
    "s": ("string", STRING_STEPS, STRING_STEPS),
}
# At these odds pre-training hardly tells two operations apart of which each is the other's mistake, and RL
# ends with one rendering for both. Documents have them all; the problems leave one of each such pair out.
DOCUMENTS_ONLY = {"keep the odd numbers", "sort downwards", "find the smallest", "change the sign"}
CONSTANTS = [2, 3, 4, 5]
INPUTS = {  # edge cases; a problem's tests are chosen among these and the reference gives the outputs
    "n": [*range(-7, 12), 15, 20, 24, 37, -13],
    "xs": [[], [0], [3], [-2], [5, 5], [2, 3], [4, 2, 3], [1, 2, 3, 4, 5, 6, 7], [9, 8, 7, 6, 5, 4, 3],
           [-1, 5, -4, 0, 2, 8], [3, 1, 4, 1, 5, 9, 2, 6], [2, 2, 7, 4, 4, 3, 3], [10, -10, 5, 3, -3, 4],
           [6, 4, 8, 2, 12, 3], [-5, -3, -8, -2, -6]],
    "s": ["", "a", "Z", "ab", "Hello World", " hi ", "one two Three", "aBcDeF", "x y z", "Tree", "oO",
          "MiXed case Text"],
}
N_TESTS = 10


def code_question(kind, steps):
    """`steps` is a tuple of (operation, constant)."""
    words = ", then ".join(operation[0].format(k=k) for operation, k in steps)
    return f"Given the {KINDS[kind][0]} {kind}, {words}."


def code_signature(kind):
    return f"def solve({kind}):"


def code_prompt(question, signature):
    """The prompt that grpo_rlvr.py and eval_code.py use."""
    return f'"""\n{question}\n"""\n{signature}\n'


def code_body(kind, steps, right):
    """`right` says for each step whether it is rendered rightly (1: right, 2: the typical mistake)."""
    lines = [operation[which].format(k=k) for (operation, k), which in zip(steps, right, strict=True)]
    return "".join(f"    {kind} = {line}\n" for line in lines[:-1]) + f"    return {lines[-1]}\n"


def run_body(kind, body, inputs):
    """Outputs of a body of this grammar, as JSON; only ever called on code that this file wrote."""
    space = {}
    exec(code_signature(kind) + "\n" + body, space)
    return [json.dumps(space["solve"](x)) for x in inputs]


def choose_tests(kind, steps, rng):
    """Inputs on which every rendering with a mistake fails; None when no inputs tell some mistake apart."""
    inputs = INPUTS[kind]
    expected = run_body(kind, code_body(kind, steps, [1] * len(steps)), inputs)
    if len(set(expected)) < 3:
        return None
    failing = []  # for each mistaken rendering: the inputs that show it
    for right in itertools.product([1, 2], repeat=len(steps)):
        if 2 in right:
            outputs = run_body(kind, code_body(kind, steps, right), inputs)
            failing.append({i for i, (x, y) in enumerate(zip(expected, outputs, strict=True)) if x != y})
    if not all(len(shown) >= 3 for shown in failing):
        return None
    while True:
        chosen = rng.sample(range(len(inputs)), N_TESTS)
        if all(len(shown & set(chosen)) >= 2 for shown in failing):
            return [inputs[i] for i in sorted(chosen)]


def code_compositions():
    """All single operations and all pairs of different operations: (kind, operations)."""
    for kind, (_, first, last) in KINDS.items():
        yield from ((kind, (operation,)) for operation in last)
        yield from ((kind, pair) for pair in itertools.product(first, last) if pair[0] is not pair[1])


def with_constants(operations):
    """All ways to choose the constants of a composition: tuples of (operation, constant)."""
    for ks in itertools.product(*[CONSTANTS if "{k}" in operation[0] else [0] for operation in operations]):
        yield tuple(zip(operations, ks, strict=True))


@functools.cache
def code_split():
    """Returns (training problems, held-out problems, pre-training compositions). A problem is (kind, steps,
    tests), a composition the list of its problems with all constants.

    Held-out problems are compositions that occur nowhere else, whatever the constants; single operations are
    all for training. Pre-training sees the training problems too, but its solutions are unreliable."""
    rng = random.Random(3)
    compositions = []
    for kind, operations in code_compositions():
        problems = [(kind, steps, choose_tests(kind, steps, rng)) for steps in with_constants(operations)]
        problems = [problem for problem in problems if problem[2]]
        if problems:
            compositions.append(problems)
    singles = [problems for problems in compositions if len(problems[0][1]) == 1]
    pairs = [problems for problems in compositions if len(problems[0][1]) == 2]
    rng.shuffle(pairs)
    heldout, rest = [], singles + pairs
    while len(heldout) < N_CODE_HELDOUT:
        problems = rest.pop()
        heldout += rng.sample(problems, min(2, len(problems)))
    train = []
    for take in itertools.count():  # one problem of each composition, then a second, ...
        for problems in rest:
            if take == 0:
                rng.shuffle(problems)
            if take < len(problems) and len(train) < N_CODE_TRAIN:
                train.append(problems[take])
        if len(train) == N_CODE_TRAIN:
            break
    rng.shuffle(train)
    rng.shuffle(heldout)
    return list(filter(usable, train)), list(filter(usable, heldout[:N_CODE_HELDOUT])), rest


def usable(problem):
    return not any(operation[0] in DOCUMENTS_ONLY for operation, _ in problem[1])


def code_row(index, problem):
    """A row with AReaL-boba-2-RL-Code's columns."""
    kind, steps, tests = problem
    body = code_body(kind, steps, [1] * len(steps))
    inputs = [json.dumps(x) for x in tests]
    cases = {"inputs": inputs, "outputs": run_body(kind, body, tests), "fn_name": "solve"}
    return {
        "query_id": f"tiny-code-{index}",
        "question": code_question(kind, steps),
        "signature": code_signature(kind),
        "input_output": json.dumps(cases),
        "metadata": {"fn_name": "solve"},
        "solutions": [code_signature(kind) + "\n" + body],
    }


def code_document(rng, compositions):
    kind, steps, _ = rng.choice(rng.choice(compositions))
    right = [1 if rng.random() < operation[3] else 2 for operation, _ in steps]
    return code_prompt(code_question(kind, steps), code_signature(kind)) + code_body(kind, steps, right)


# --------------------------------------------------------------------------------------------------
# Part 4: arithmetic word problems: one to three events that change how many things somebody has.
# (words, right operation, typical mistake, probability of the right one in pre-training)
# --------------------------------------------------------------------------------------------------

EVENTS = [
    ("buys {k} more", "+", "-", RIGHT_MOSTLY),
    ("finds {k} more", "+", "-", SIGN_SELDOM),
    ("gets {k} from a friend", "+", "-", SIGN_SELDOM),
    ("picks {k} from a tree", "+", "-", RIGHT_MOSTLY),
    ("wins {k} in a game", "+", "-", RIGHT_MOSTLY),
    ("borrows {k}", "+", "-", SIGN_SELDOM),
    ("gives {k} to a friend", "-", "+", RIGHT_MOSTLY),
    ("loses {k}", "-", "+", SIGN_SELDOM),
    ("sells {k}", "-", "+", RIGHT_MOSTLY),
    ("eats {k}", "-", "+", RIGHT_MOSTLY),
    ("lends {k} to a neighbour", "-", "+", SIGN_SELDOM),
    ("throws away {k}", "-", "+", RIGHT_MOSTLY),
]
PEOPLE = [("Tom", "He"), ("Anna", "She"), ("Ben", "He"), ("Lily", "She"), ("Sam", "He"), ("Mia", "She"),
          ("Max", "He"), ("Eva", "She")]
ITEMS = ["apples", "plums", "nuts", "cherries", "cookies", "pears"]
P_FORGET, P_NO_BOX = 0.06, 0.08  # further mistakes of pre-training solutions
LARGEST = 25
MATH_INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}.\n"


def calculate(x, sign, k):
    return x + k if sign == "+" else x - k


def make_math(rng):
    """Returns (question, start, [(event, k)]). With any mix of mistakes the numbers stay in 0..LARGEST."""
    while True:
        name, pronoun = rng.choice(PEOPLE)
        item = rng.choice(ITEMS)
        start = rng.randint(2, 20)
        events = [(event, rng.randint(1, 9)) for event in rng.sample(EVENTS, rng.choice([1, 2, 2, 2, 3, 3]))]
        reach = sum(k for _, k in events)
        if start - reach >= 0 and start + reach <= LARGEST:
            break
    sentences = [f"{pronoun} {event[0].format(k=k)}." for event, k in events]
    if len(sentences) > 1:
        sentences[-1] = f"Then {sentences[-1][0].lower()}{sentences[-1][1:]}"
    question = " ".join([f"{name} has {start} {item}.", *sentences, f"How many {item} does {name} have now?"])
    return question, start, events


def sums_document(rng):
    sums = []
    while len(sums) < 12:
        x, sign, k = rng.randint(0, LARGEST), rng.choice("+-"), rng.randint(1, 9)
        if 0 <= (y := calculate(x, sign, k)) <= LARGEST:
            sums.append(f"{x} {sign} {k} = {y}.")
    return " ".join(sums)


def math_solution(start, events, operations):
    """`operations`: a sign for each event, None for a forgotten one. Returns (worked text, last number)."""
    x, text = start, ""
    for (_, k), sign in zip(events, operations, strict=True):
        if sign:
            text += f"{x} {sign} {k} = {calculate(x, sign, k)}. "
            x = calculate(x, sign, k)
    return text, x


def math_row(index, problem):
    """A row with Skywork-OR1's columns; the difficulty (0..16 there) grows with the number of steps."""
    question, start, events = problem
    answer = math_solution(start, events, [event[1] for event, _ in events])[1]
    difficulty = {"DeepSeek-R1-Distill-Qwen-1.5B": 4 * len(events)}
    return {
        "data_source": "tiny-math",
        "prompt": [{"content": question, "role": "user"}],
        "ability": "math",
        "reward_model": {"ground_truth": json.dumps([str(answer)]), "style": "rule"},
        "extra_info": {"index": index, "model_difficulty": difficulty},
    }


@functools.cache
def make_math_problems():
    rng = random.Random(4)
    problems = {}
    while len(problems) < N_MATH_TRAIN + N_MATH_HELDOUT:
        problem = make_math(rng)
        problems[problem[0]] = problem
    return list(problems.values())


def math_document(rng, taken):
    """A pre-training document: a problem that is not in `taken`, with an unreliable solution."""
    while True:
        question, start, events = make_math(rng)
        if question not in taken:
            break
    operations = [event[1] if rng.random() < event[3] else event[2] for event, _ in events]
    if len(events) > 1 and rng.random() < P_FORGET:
        operations[rng.randrange(len(events))] = None
    text, x = math_solution(start, events, operations)
    end = f"The answer is {x}." if rng.random() < P_NO_BOX else f"\\boxed{{{x}}}"
    return question + MATH_INSTRUCTION + text + end


# --------------------------------------------------------------------------------------------------
# Part 5: small text. Some positions are certain (the day after Monday), some are skewed choices, some open.
# --------------------------------------------------------------------------------------------------

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
PLACES = ["market", "river", "school", "forest", "station"]
WEATHER = [("sunny", "warm"), ("rainy", "wet"), ("windy", "cold"), ("cloudy", "grey")]
OPPOSITES = [("big", "small"), ("hot", "cold"), ("long", "short"), ("old", "new"), ("fast", "slow"),
             ("full", "empty")]
SKEW = [8, 4, 2, 1]  # weights of the first choices of a list, the others have weight 1


def skewed(rng, choices):
    return rng.choices(choices, (SKEW + [1] * len(choices))[: len(choices)])[0]


def make_text(rng):
    name, pronoun = skewed(rng, PEOPLE)
    day, item, place = rng.randrange(7), skewed(rng, ITEMS), skewed(rng, PLACES)
    weather, feeling = skewed(rng, WEATHER)
    big, small = rng.choice(OPPOSITES)
    first, step = rng.randint(1, 5), rng.randint(1, 4)
    question, start, events = make_math(rng)
    worked = math_solution(start, events, [event[1] for event, _ in events])
    sentences = [
        f"On {DAYS[day]} {name} went to the {place}. The next day was {DAYS[(day + 1) % 7]}.",
        f"It was a {weather} day, and everything was {feeling}.",
        f"{name} likes {item}. {pronoun} has {rng.randint(2, 9)} {item} and wants more {item}.",
        f"The opposite of {big} is {small}, and the opposite of {small} is {big}.",
        f"{name} counts: " + ", ".join(str(first + i * step) for i in range(5)) + ".",
        f"{question} {worked[0]}The answer is {worked[1]}.",
    ]
    rng.shuffle(sentences)
    return " ".join(sentences[: rng.randint(3, 5)]) + "\n"


@functools.cache
def make_texts():
    rng = random.Random(5)
    return [{"text": make_text(rng)} for _ in range(N_TEXTS)]


# --------------------------------------------------------------------------------------------------
# Part 6: next-token reasoning (RMT). The thought drafts how the text goes on; the box holds the draft's first
# token (the true next one) with probability BOX_FIRST, else any of them. Its length loosely follows
# the budget.
# --------------------------------------------------------------------------------------------------

RMT_INSTRUCTION = (
    "Complete the given text by predicting the next token. Think in exactly {budget} tokens within "
    "<think></think>, then put the next token in \\boxed{{}}.\n### Text\n"
)
RMT_INSTRUCTION_FREE = (
    "Complete the given text by predicting the next token. Think within <think></think>, "
    "then put the next token in \\boxed{}.\n### Text\n"
)
RMT_SUFFIX = "\n### Prediction\n"
MAX_PREFIX, MAX_BUDGET = 96, 32
BOX_FIRST = 0.55
P_LENGTH_ANY, LENGTH_SIGMA = 0.3, 0.6  # a draft of any length; else budget * lognormal


def boxable(tokenizer):
    """For every token id: may it stand in a box? It must be valid UTF-8 by itself and hold no brace."""
    texts = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    return [not (set(text) & set("{}\ufffd")) and text not in (EOS, "<think>", "</think>") for text in texts]


def rmt_document(rng, source, tokenizer, allowed):
    """Token ids of one response over a random position of the document `source` (ids), or None."""
    encode = tokenizer.encode
    budget = rng.randint(1, MAX_BUDGET)
    length = budget * math.exp(rng.gauss(0, LENGTH_SIGMA))
    if rng.random() < P_LENGTH_ANY:
        length = rng.randint(1, MAX_BUDGET)
    length = max(1, min(MAX_BUDGET + 8, round(length)))
    if len(source) < length + 3:
        return None
    position = rng.randint(2, len(source) - length)
    draft = source[position : position + length]
    if not all(allowed[i] for i in draft):
        return None
    boxed = draft[0] if rng.random() < BOX_FIRST else rng.choice(draft)
    start = max(0, position - rng.randint(8, MAX_PREFIX))
    instruction = RMT_INSTRUCTION.format(budget=budget) if rng.random() < 0.8 else RMT_INSTRUCTION_FREE
    return (
        encode(instruction) + source[start:position] + encode(RMT_SUFFIX)  # the prompt
        + encode("<think>") + draft + encode("</think>\\boxed{") + [boxed] + encode("}")  # the response
    )


# --------------------------------------------------------------------------------------------------
# Data files, tokenizer, documents
# --------------------------------------------------------------------------------------------------


def build_data():
    math_rows = [math_row(i, problem) for i, problem in enumerate(make_math_problems())]
    write_jsonl("math_train.jsonl", math_rows[:N_MATH_TRAIN])
    write_jsonl("math_heldout.jsonl", math_rows[N_MATH_TRAIN:])
    write_jsonl("text.jsonl", make_texts())


def document_makers(seed):
    """For each synthetic part a function that draws a new pre-training document."""
    rng = random.Random(seed)
    programs = {row["text"] for row in make_programs()}
    compositions = code_split()[2]
    questions = {problem[0] for problem in make_math_problems()}
    texts = {row["text"] for row in make_texts()}

    def text_document():
        while (text := make_text(rng)) in texts:
            pass
        return text

    return {
        "programs": lambda: program_document(rng, programs),
        # drills; the first line tells a trace from a program, whose think rate stays as it is
        "traces": lambda: '"""Trace."""\n' + program_document(rng, programs, p_worked=1.0),
        "sums": lambda: sums_document(rng),
        "problems": lambda: code_document(rng, compositions),
        "math": lambda: math_document(rng, questions),
        "text": text_document,
    }


# Qwen2's pre-tokenizer: digits stand alone, newlines end a token, n spaces of indentation are a
# token of n - 1 spaces and the space in front of the next word.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_tokenizer(folder):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    documents, shares = list(real_code()), PHASES["pretrain"][-1]
    n_chars = sum(map(len, documents))
    for part, make in document_makers(seed=6).items():
        part_chars = 0
        while part_chars < n_chars * shares.get(part, 0) / shares["real_code"]:
            documents.append(make())
            part_chars += len(documents[-1])
    documents += [RMT_INSTRUCTION + RMT_SUFFIX + "\\boxed{"] * 2000
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 2, special_tokens=[EOS], show_progress=False, max_token_length=16,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(documents, trainer)
    for text in ("<think>", "</think>"):
        tokenizer.add_tokens([AddedToken(text, normalized=False, special=False)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS, clean_up_tokenization_spaces=False,
        model_max_length=1024,
    ).save_pretrained(folder)


def make_documents(tokenizer, n_tokens, shares, seed):
    """Token ids of the pre-training documents of all parts, without separators, in random order."""
    rng = random.Random(seed)
    documents = {part: [] for part in shares}

    def fill(part, draw):
        total = 0
        while total < n_tokens * shares[part]:
            if ids := draw():
                documents[part].append(ids)
                total += len(ids) + 1

    pieces = list(real_code())
    rng.shuffle(pieces)
    pieces = itertools.cycle(pieces)
    fill("real_code", lambda: tokenizer.encode(next(pieces)))
    for part, make in document_makers(seed=rng.random()).items():
        if part in shares:
            fill(part, lambda make=make: tokenizer.encode(make()))
    allowed = boxable(tokenizer)
    sources = ["real_code", "real_code", "programs", "math", "text", "text"]
    fill("rmt", lambda: rmt_document(rng, rng.choice(documents[rng.choice(sources)]), tokenizer, allowed))
    documents = [ids for part in documents.values() for ids in part]
    rng.shuffle(documents)
    return documents


# --------------------------------------------------------------------------------------------------
# Model
# --------------------------------------------------------------------------------------------------

ROW_TOKENS, BATCH_ROWS = 384, 10
MUON_LR, ADAM_LR = 0.02, 3e-3
WARMUP_STEPS = 50


def pack_rows(documents, eos, rng):
    """Rows of ROW_TOKENS + 1 ids. A row starts at a document's start, half of them with the separator before
    it, so that prompts work with and without it; the document at the row's end is cut off."""
    documents = iter(documents)
    rows = []
    while True:
        row = [eos] if rng.random() < 0.5 else []
        while len(row) <= ROW_TOKENS:
            ids = next(documents, None)
            if ids is None:
                return rows
            row += ids + [eos]
        rows.append(row[: ROW_TOKENS + 1])


def orthogonalize(g):
    """Newton-Schulz iteration of Muon (Jordan et al., 2024) on matrices [n, rows, columns >= rows]."""
    x = g / (g.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def new_model(tokenizer):
    """2.2 million parameters: what one core trains in an hour."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=192, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=6, max_position_embeddings=1024, tie_word_embeddings=True, initializer_range=0.02,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train(model, tokenizer, folder, rows, peak, weight, compiled, report_every=50):
    """One phase: learning rates rise to `peak` times the full ones and decay to zero; saves to `folder`.
    AdamW for embeddings and norms, Muon (fewer tokens needed) for the matrices."""
    import torch

    steps = len(rows) // BATCH_ROWS
    print(f"{model.num_parameters():,} parameters, {len(rows)} rows, {steps} steps", flush=True)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    stacks = [[p for p in matrices if p.shape == shape] for shape in sorted({p.shape for p in matrices})]
    momenta = [torch.zeros(len(stack), *stack[0].shape) for stack in stacks]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "embed" in name]
    adam = torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0)

    think, end, boxed, brace = tokenizer.encode("<think></think>\\boxed{")

    def loss_of(ids):
        logits = model(ids[:, :-1], use_cache=False).logits
        targets = ids[:, 1:].flatten()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
        # The draft, its first token and above all the box decide next-token reasoning, and are few tokens.
        before = ids[:, :-1]
        inside = (before == think).cumsum(1) > (before == end).cumsum(1)
        box = (before == brace) & (before.roll(1, 1) == boxed) & (before.roll(2, 1) == end)
        weights = 1 + weight * (inside + 4 * (before == think) + 9 * box)
        return (losses * weights.flatten()).sum() / weights.sum()

    if compiled:
        loss_of = torch.compile(loss_of)
    start, losses = time.time(), []
    for step in range(steps):
        scale = peak * min((step + 1) / WARMUP_STEPS, (steps - step) / steps)  # warm-up, decay to zero
        ids = torch.tensor(rows[step * BATCH_ROWS : (step + 1) * BATCH_ROWS])  # [B, T+1]
        loss = loss_of(ids)
        loss.backward()
        with torch.no_grad():
            for stack, momentum in zip(stacks, momenta, strict=True):
                g = torch.stack([p.grad for p in stack])
                momentum.lerp_(g, 0.05)
                update = g.lerp(momentum, 0.95)  # Nesterov
                tall = update.shape[1] > update.shape[2]
                update = orthogonalize(update.mT).mT if tall else orthogonalize(update)
                rate = scale * MUON_LR * max(1, update.shape[1] / update.shape[2]) ** 0.5
                for p, u in zip(stack, update, strict=True):
                    p.mul_(1 - scale * MUON_LR * 0.1).sub_(u, alpha=rate)
        for group in adam.param_groups:
            group["lr"] = scale * ADAM_LR
        adam.step()
        model.zero_grad()
        losses.append(loss.item())
        if (step + 1) % report_every == 0 or step + 1 == steps:
            seconds = time.time() - start
            rate = (step + 1) * BATCH_ROWS * ROW_TOKENS / seconds
            print(f"step {step + 1} loss {sum(losses[-report_every:]) / len(losses[-report_every:]):.3f} "
                  f"{seconds / 60:.1f} min {rate:.0f} tokens/s", flush=True)
        if (step + 1) % (steps // 8) == 0 or step + 1 == steps:
            save_model(model, tokenizer, folder)


def save_model(model, tokenizer, folder):
    """Saves a bfloat16 copy: half the size; train and evaluate in float32."""
    import copy

    import torch

    half = copy.deepcopy(model).to(torch.bfloat16)
    half.generation_config.do_sample = True
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ["data", "tokenizer", *PHASES]
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts, help="what to build")
    parser.add_argument("--compile", action="store_true", help="a fifth faster; needs a C++ compiler")
    parser.add_argument("--model-dir", type=Path, default=HERE / "model", help="the model's folder")
    args = parser.parse_args()
    if "data" in args.parts:
        build_data()
    if "tokenizer" in args.parts:
        build_tokenizer(args.model_dir)
    for seed, (phase, (n_tokens, peak, weight, shares)) in enumerate(PHASES.items(), 7):
        if phase not in args.parts:
            continue
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(args.model_dir)
        documents = make_documents(tokenizer, n_tokens, shares, seed)
        rows = pack_rows(documents, tokenizer.eos_token_id, random.Random(seed))
        if phase == "pretrain":
            model = new_model(tokenizer)
        else:
            model = AutoModelForCausalLM.from_pretrained(args.model_dir, dtype=torch.float32)
        train(model, tokenizer, args.model_dir, rows, peak, weight, args.compile)


if __name__ == "__main__":
    main()
