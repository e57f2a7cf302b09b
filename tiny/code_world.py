"""The code world: RA3, then RLVR, then evaluation, in one family of problems.

    Let k be 7 after v, u. Given the list xs, keep the numbers above k, then reverse the order.

    def solve(xs):
        k = 4
        xs = [x for x in xs if x > k]
        return xs[::-1]

g, h, p, q, r, t, u, v, w and z are functions: fixed permutations of the digits, which pre-training teaches. Finding k
takes a look-up (a hop) for each of them. A worked comment (`# 7 v6 u4`) takes one hop at a time; without it the base
model does not find k, not even after one hop. Pre-training is unreliable on purpose: RL can only make a model do more
often what it does at times already.

  problems    an operation is right as often as its row in NUMBER, LIST, ... says, and else its typical mistake; a
              worked comment before `k =` in P_WORKED of the documents, an idle one before P_IDLE of the other lines
  drills      chains with their worked comment
  real code   four fifths of the files of the running Python's standard library

The mid-training corpus holds right programs without comments. It, the RLVR problems, the development problems and the
test problems share no tuple of operations and no chain (start and functions). Pre-training has those of the corpus
and of the RLVR problems, and in its drills every chain of one hop.
"""

import functools
import itertools
import json
import random
import sysconfig
import tokenize
import zlib
from pathlib import Path

VOCAB_SIZE, ADDED_TOKENS, WEIGHTS = 1024, [], {}
TRAINING = {"tokens": 6_000_000, "row_tokens": 256, "batch_rows": 16}
SHARES = {"problem": 0.60, "drill": 0.28, "real code": 0.12}  # of documents
P_WORKED, P_IDLE = 0.3, 0.2
N_CORPUS, N_RL, N_DEV, N_TEST, N_TESTS = 10_000, 512, 256, 512, 6
HOPS = [1, 2, 3, 4]

# ---- the grammar: (words, right, typical mistake, probability of the right one in pre-training)

MOSTLY, SELDOM = 0.70, 0.42
NUMBER = [
    ("add k", "n + k", "n - k", MOSTLY),
    ("subtract k", "n - k", "k - n", SELDOM),
    ("multiply by k", "n * k", "n ** k", MOSTLY),
    ("divide by k and round down", "n // k", "n % k", SELDOM),
    ("take the remainder by k", "n % k", "n // k", MOSTLY),
    ("raise it to at least k", "max(n, k)", "min(n, k)", SELDOM),
    ("cut it to at most k", "min(n, k)", "max(n, k)", MOSTLY),
    ("drop the sign", "abs(n)", "-n", MOSTLY),
    ("square it", "n * n", "n + n", SELDOM),
]
LIST = [
    ("keep the even numbers", "[x for x in xs if x % 2 == 0]", "[x for x in xs if x % 2 == 1]", MOSTLY),
    ("keep the numbers above k", "[x for x in xs if x > k]", "[x for x in xs if x >= k]", SELDOM),
    ("keep the numbers from k up", "[x for x in xs if x >= k]", "[x for x in xs if x > k]", MOSTLY),
    ("add k to each", "[x + k for x in xs]", "xs + [k]", MOSTLY),
    ("multiply each by k", "[x * k for x in xs]", "xs * k", SELDOM),
    ("square each", "[x * x for x in xs]", "[x + x for x in xs]", MOSTLY),
    ("sort upwards", "sorted(xs)", "sorted(xs, reverse=True)", SELDOM),
    ("reverse the order", "xs[::-1]", "sorted(xs)", MOSTLY),
    ("take the first k", "xs[:k]", "xs[k:]", MOSTLY),
    ("leave out the first k", "xs[k:]", "xs[:k]", SELDOM),
    ("take the last k", "xs[-k:]", "xs[:-k]", SELDOM),
    ("take every second one", "xs[::2]", "xs[1::2]", MOSTLY),
]
LIST_ENDS = [
    ("add them up", "sum(xs)", "len(xs)", MOSTLY),
    ("count them", "len(xs)", "sum(xs)", SELDOM),
    ("find the largest", "max(xs, default=0)", "min(xs, default=0)", MOSTLY),
]
STRING = [
    ("make it upper case", "s.upper()", "s.title()", MOSTLY),
    ("make it lower case", "s.lower()", "s.upper()", SELDOM),
    ("swap upper and lower case", "s.swapcase()", "s.lower()", MOSTLY),
    ("reverse it", "s[::-1]", "s[1:]", MOSTLY),
    ("remove the spaces", 's.replace(" ", "")', "s.strip()", SELDOM),
    ("take the first k letters", "s[:k]", "s[k:]", MOSTLY),
    ("leave out the first k letters", "s[k:]", "s[:k]", SELDOM),
    ("repeat it k times", "s * k", "s + s[:k]", MOSTLY),
    ("put a dot at the end", 's + "."', '"." + s', SELDOM),
    ("double every letter", '"".join(c * 2 for c in s)', "s * 2", MOSTLY),
]
# parameter: (the question's word for it, operations, further operations that can only be the last)
KINDS = {"n": ("number", NUMBER, []), "xs": ("list", LIST, LIST_ENDS), "s": ("string", STRING, [])}
INPUTS = {  # a problem's tests are chosen among these; its reference program gives the outputs
    "n": [*range(-7, 12), 15, 20, 24, 37, -13, 53, 71, -29],
    "xs": [[], [3], [5, 5, 2], *(random.Random(i).choices(range(-5, 14), k=11) for i in range(9))],
    "s": ["", "aZ", "Hello World of", "one two Three", "aBcDeF gHiJkL", "x y z A B C d", "MiXed case Text",
          " hi there Friend ", "Treetop oO lan", "abcdefghijklm", "QWERTY uiop as", "a bC dE fG hI jK"],
}  # fmt: skip
FUNCTIONS = "ghpqrtuvwz"
TABLE = {f: random.Random(f"table {f}").sample(range(10), 10) for f in FUNCTIONS}
PARTS = ["corpus"] * 5 + ["rl"] * 2 + ["dev"] + ["test"] * 2
IDLE = ["# next", "# step", "# set it", "# go on"]


def draw_operations(rng):
    """(kind, 2 or 3 different operations), at least one of which needs k."""
    while True:
        kind = rng.choice(list(KINDS))
        _, operations, ends = KINDS[kind]
        chosen = rng.sample(operations, rng.choice([2, 3]))
        if ends and rng.random() < 0.3:
            chosen[-1] = rng.choice(ends)
        if any("k" in operation[0].split() for operation in chosen):
            return kind, tuple(chosen)


def draw_chain(rng, hops):
    """(start, functions, values after each); the last value is k, from 2 to 9."""
    while True:
        start, functions = rng.randrange(10), rng.sample(FUNCTIONS, hops)
        values = list(itertools.accumulate(functions, lambda x, f: TABLE[f][x], initial=start))[1:]
        if values[-1] >= 2:
            return start, "".join(functions), values


def part_of(*key):
    """Which part a tuple of operations or a chain belongs to, by a hash: the same on every machine."""
    return PARTS[zlib.crc32(repr(key).encode()) % len(PARTS)]


def draw_problem(rng, parts):
    """(kind, operations, chain) of one of `parts`: the operations and the chain both belong to it."""
    while True:
        kind, operations = draw_operations(rng)
        part = part_of(kind, *[operation[0] for operation in operations])
        if part in parts:
            break
    hops = rng.choice(HOPS)
    while part_of(*(chain := draw_chain(rng, hops))[:2]) != part:
        pass
    return kind, operations, chain


def chain_words(chain):
    return f"Let k be {chain[0]} after {', '.join(chain[1])}."


def question(kind, operations, chain):
    words = ", then ".join(operation[0] for operation in operations)
    return f"{chain_words(chain)} Given the {KINDS[kind][0]} {kind}, {words}."


def prompt(kind, operations, chain):
    """The prompt that grpo_rlvr.py and eval_code.py use."""
    return f'"""\n{question(kind, operations, chain)}\n"""\ndef solve({kind}):\n'


def worked_comment(chain):
    return f"# {chain[0]}" + "".join(f" {f}{value}" for f, value in zip(*chain[1:], strict=True))


def body_lines(kind, operations, k, right=(True, True, True)):
    """The lines below the signature. right: for each operation whether it is right or its typical mistake."""
    steps = [operation[1] if ok else operation[2] for operation, ok in zip(operations, right)]
    lines = [f"k = {k}", *[f"{kind} = {step}" for step in steps[:-1]], f"return {steps[-1]}"]
    return [f"    {line}\n" for line in lines]


# ---- data files


def outputs_of(kind, lines, inputs):
    """What a body returns for each of `inputs`: JSON, or the error's name. Only for code of this file."""
    space, outputs = {}, []
    exec(f"def solve({kind}):\n" + "".join(lines), space)
    for x in inputs:
        try:
            outputs.append(json.dumps(space["solve"](x)))
        except (ArithmeticError, TypeError, ValueError) as error:
            outputs.append(type(error).__name__)
    return outputs


def wrong_bodies(kind, operations, k):
    """Bodies that the tests must reject: every mix of mistakes, and every other k."""
    mixes = itertools.product([True, False], repeat=len(operations))
    mistakes = [body_lines(kind, operations, k, right) for right in mixes if not all(right)]
    return mistakes + [body_lines(kind, operations, other) for other in range(10) if other != k]


def choose_tests(rng, kind, operations, k):
    """N_TESTS inputs; each wrong body gives a wrong output for at least one. None if such inputs are not found."""
    inputs = INPUTS[kind]
    expected = outputs_of(kind, body_lines(kind, operations, k), inputs)
    if len(set(expected)) < 4 or any("Error" in output for output in expected):
        return None
    wrong = [outputs_of(kind, lines, inputs) for lines in wrong_bodies(kind, operations, k)]
    telling = [{i for i, x in enumerate(expected) if outputs[i] != x} for outputs in wrong]  # inputs, by wrong body
    for _ in range(30):
        chosen = sorted(rng.sample(range(len(inputs)), N_TESTS))
        if all(tell & set(chosen) for tell in telling):
            return [inputs[i] for i in chosen]
    return None


def problem_row(index, kind, operations, chain, tests):
    """A row with AReaL-boba-2-RL-Code's columns, and the number of hops."""
    lines = body_lines(kind, operations, chain[2][-1])
    inputs, outputs = [json.dumps(x) for x in tests], outputs_of(kind, lines, tests)
    return {
        "query_id": f"tiny-code-{index}",
        "question": question(kind, operations, chain),
        "signature": f"def solve({kind}):",
        "input_output": json.dumps({"inputs": inputs, "outputs": outputs, "fn_name": "solve"}),
        "metadata": {"fn_name": "solve"},
        "solutions": [f"def solve({kind}):\n" + "".join(lines)],
        "hops": len(chain[1]),
    }


def humaneval_row(row):
    """The same problem with HumanEval's columns."""
    cases = json.loads(row["input_output"])
    pairs = zip(cases["inputs"], cases["outputs"], strict=True)
    return {
        "task_id": row["query_id"],
        "prompt": f'"""\n{row["question"]}\n"""\n{row["signature"]}\n',
        "entry_point": "solve",
        "canonical_solution": row["solutions"][0].split("\n", 1)[1],
        "test": "def check(candidate):\n" + "".join(f"    assert candidate({x}) == {y}\n" for x, y in pairs),
        "hops": row["hops"],
    }


@functools.cache
def make_problems(part, n):
    """n different problems (kind, operations, chain, tests) of a part, in random order."""
    rng, problems = random.Random(f"problems {part}"), {}
    while len(problems) < n:
        kind, operations, chain = draw_problem(rng, [part])
        if tests := choose_tests(rng, kind, operations, chain[2][-1]):
            problems[kind, operations, *chain[:2]] = kind, operations, chain, tests
    return list(problems.values())


def data_files():
    """{name: rows} of the JSON Lines files."""
    rng, corpus = random.Random("corpus"), {}
    while len(corpus) < N_CORPUS:
        kind, operations, chain = draw_problem(rng, ["corpus"])
        corpus[prompt(kind, operations, chain) + "".join(body_lines(kind, operations, chain[2][-1]))] = None
    files = {"corpus": [{"text": text} for text in corpus]}
    for name, part, n in [("rl_train", "rl", N_RL), ("dev", "dev", N_DEV), ("test", "test", N_TEST)]:
        files[name] = [problem_row(f"{part}-{i}", *p) for i, p in enumerate(make_problems(part, n))]
    return files | {"humaneval": [humaneval_row(row) for row in files["test"]]}


# ---- pre-training documents

SKIP_DIRS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "pydoc_data", "encodings"}
PIECE_CHARS = 600


@functools.cache
def real_code():
    """Pieces of the standard library's files, cut at top-level statements where possible."""
    root, pieces = Path(sysconfig.get_paths()["stdlib"]), []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIP_DIRS & set(name.parts) or zlib.crc32(name.as_posix().encode()) % 5 == 0:
            continue
        try:
            with tokenize.open(path) as f:
                lines = f.read().splitlines(keepends=True)
        except (SyntaxError, UnicodeDecodeError):
            continue
        piece = ""
        for line in lines:
            top_level = line[0] not in " \t\n#)]}\"'"
            if len(piece) > PIECE_CHARS or (len(piece) > PIECE_CHARS / 3 and top_level):
                pieces.append(piece)
                piece = ""
            piece += line
        pieces.append(piece)
    return pieces


def document(rng, progress):
    """One pre-training document."""
    sort = rng.choices(list(SHARES), SHARES.values())[0]
    if sort == "real code":
        return rng.choice(real_code())
    if sort == "drill":
        return "".join(drill(rng) for _ in range(6))
    kind, operations, chain = draw_problem(rng, ["corpus", "rl"])
    right = [rng.random() < operation[3] for operation in operations]
    lines = body_lines(kind, operations, chain[2][-1], right)
    text = prompt(kind, operations, chain)
    for i, line in enumerate(lines):
        if rng.random() < (P_IDLE if i else P_WORKED):
            text += f"    {rng.choice(IDLE) if i else worked_comment(chain)}\n"
        text += line
    return text


def drill(rng):
    """A chain, its comment (in half of the cases) and k. All chains of one hop: those are the functions."""
    hops = rng.choice(HOPS)
    while part_of(*(chain := draw_chain(rng, hops))[:2]) not in ("corpus", "rl") and hops > 1:
        pass
    comment = worked_comment(chain) + "\n" if rng.random() < 0.5 else ""
    return f"{chain_words(chain)}\n{comment}k = {chain[2][-1]}\n"
