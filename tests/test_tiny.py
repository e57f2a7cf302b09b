"""The bundled worlds (tiny/): the data are right, disjoint and rebuilt byte for byte; the base models are where the
demonstrations need them."""

import json
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import grpo_rlvr
import rmt

TINY = Path(__file__).resolve().parent.parent / "tiny"
sys.path.insert(0, str(TINY))
import build  # noqa: E402
import code_world as world  # noqa: E402
import text_world  # noqa: E402

PROBLEM_FILES = {"rl_train": ("rl", world.N_RL), "dev": ("dev", world.N_DEV), "test": ("test", world.N_TEST)}
QUESTION = re.compile(r"Let k be (\d) after ([a-z, ]+)\. Given the \w+ (n|xs|s), (.*)\.")


def rows_of(name, folder="code"):
    with open(TINY / folder / f"{name}.jsonl", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


@pytest.fixture(scope="module")
def base():
    """(model, tokenizer) of each world."""

    def load(folder):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(folder)

    return {name: load(TINY / name / "model") for name in ("code", "text")}


def parse(text):
    """(start, functions), (kind, operations) of a question, read from its words."""
    start, functions, kind, words = QUESTION.search(text).groups()
    return (int(start), functions.replace(", ", "")), (kind, *words.split(", then "))


def value_of(chain):
    value, functions = chain
    for f in functions:
        value = world.TABLE[f][value]
    return value


def outputs_of(code, inputs):
    space, outputs = {}, []
    exec(code, space)
    for x in inputs:
        try:
            outputs.append(space["solve"](x))
        except (ArithmeticError, TypeError, ValueError) as error:
            outputs.append(repr(error))
    return outputs


def complete(model, tokenizer, texts, max_new_tokens):
    """Greedy completions without eos."""
    batch = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    out = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def next_probs(model, tokenizer, texts):
    return model(**tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")).logits[:, -1].softmax(-1)


@pytest.mark.parametrize("name", ["code", "text"])
def test_data_are_rebuilt_byte_for_byte(name, tmp_path):
    build.write_data({"code": world, "text": text_world}[name], tmp_path)
    rebuilt, committed = ({p.name: p.read_bytes() for p in d.glob("*.jsonl")} for d in (tmp_path, TINY / name))
    assert rebuilt == committed


def test_folders_are_small():
    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file() and path.suffix != ".pyc") < 12e6


@pytest.mark.parametrize("name", PROBLEM_FILES)
def test_references_pass_and_every_mistake_fails(name):
    rows, problems = rows_of(name), world.make_problems(*PROBLEM_FILES[name])
    assert len(rows) == len(problems) == PROBLEM_FILES[name][1]
    for row, (kind, operations, *_) in zip(rows, problems, strict=True):
        chain, words = parse(row["question"])
        k = value_of(chain)
        assert words == (kind, *[operation[0] for operation in operations]) and 2 <= k <= 9
        assert row["hops"] == len(chain[1]) and f"    k = {k}\n" in row["solutions"][0]
        cases = json.loads(row["input_output"])
        inputs, outputs = ([json.loads(x) for x in cases[side]] for side in ("inputs", "outputs"))
        assert outputs_of(row["solutions"][0], inputs) == outputs
        wrong = list(world.wrong_bodies(kind, operations, k))
        assert len(wrong) == 2 ** len(operations) - 1 + 9
        for lines in wrong:
            code = row["signature"] + "\n" + "".join(lines)
            assert outputs_of(code, inputs) != outputs, (row["question"], lines)


def test_humaneval_file_is_the_test_set():
    for row, problem in zip(rows_of("test"), rows_of("humaneval"), strict=True):
        assert problem["prompt"] == f'"""\n{row["question"]}\n"""\n{row["signature"]}\n'
        code = problem["prompt"] + problem["canonical_solution"]
        assert code.endswith(row["solutions"][0])
        exec(f"{code}\n{problem['test']}\ncheck({problem['entry_point']})\n", {})


def test_corpus_is_right_and_has_no_comments():
    texts = [row["text"] for row in rows_of("corpus")]
    assert len(set(texts)) == len(texts) == world.N_CORPUS
    right = {(kind, o[0]): o[1] for kind, (_, first, ends) in world.KINDS.items() for o in [*first, *ends]}
    for text in texts:
        chain, (kind, *words) = parse(text)
        assert "#" not in text
        steps = [right[kind, word] for word in words]
        lines = [f"k = {value_of(chain)}", *[f"{kind} = {step}" for step in steps[:-1]]]
        lines += [f"return {steps[-1]}"]
        assert text.split('"""\n')[2] == f"def solve({kind}):\n" + "".join(f"    {line}\n" for line in lines)


def test_splits_share_no_operations_and_no_chain():
    chains, operations = {}, {}
    for name, key in [("corpus", "text"), *[(name, "question") for name in PROBLEM_FILES]]:
        pairs = [parse(row[key]) for row in rows_of(name)]
        chains[name], operations[name] = ({pair[side] for pair in pairs} for side in (0, 1))
    for found in (chains, operations):
        assert sum(map(len, found.values())) == len(set.union(*found.values()))
    assert all({len(functions) for _, functions in found} == set(world.HOPS) for found in chains.values())

    rng, seen = random.Random(0), set()
    for _ in range(4000):  # pre-training, too, has none of the development and test problems
        text = world.document(rng, 0.5)
        if QUESTION.search(text):
            chain, words = parse(text)
            assert words not in operations["dev"] | operations["test"]
            assert chain not in chains["dev"] | chains["test"]
        else:
            for start, functions in re.findall(r"Let k be (\d) after ([a-z, ]+)\.", text):
                seen.add((int(start), functions.replace(", ", "")))
    shared = seen & (chains["dev"] | chains["test"])
    assert seen and all(len(functions) == 1 for _, functions in shared)


def test_pretraining_documents_are_as_unreliable_as_they_should_be():
    rng = random.Random(1)
    texts = [text for text in (world.document(rng, 0.5) for _ in range(6000)) if QUESTION.search(text)]
    worked = [re.search(r"    (# \d .*)\n", text) for text in texts]
    assert abs(sum(map(bool, worked)) / len(texts) - world.P_WORKED) < 0.03
    for text, comment in zip(texts, worked, strict=True):
        (value, functions), _ = parse(text)
        expected = f"# {value}"
        for f in functions:
            value = world.TABLE[f][value]
            expected += f" {f}{value}"
        assert f"    k = {value}\n" in text and (comment is None or comment[1] == expected)
    for words, right, rate in [("take the last k", "xs[-k:]", 0.42), ("take the first k,", "xs[:k]", 0.70)]:
        found = [right in text for text in texts if words in text and "leave out the first k" not in text]
        assert len(found) > 100 and abs(sum(found) / len(found) - rate) < 0.12, words


def test_tokenizer(base):
    model, tokenizer = base["code"]

    def split(text):
        return [tokenizer.decode([i]) for i in tokenizer.encode(text)]

    texts = [row["text"] for row in rows_of("corpus")[::10]]
    texts += [row["question"] for name in PROBLEM_FILES for row in rows_of(name)]
    texts += world.real_code()[::32]
    texts += ["tabs\tand\r\n\x0cform feeds ", "é 中 \U0001f600 ' s n't .", ""]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer) == model.config.vocab_size == world.VOCAB_SIZE
    assert tokenizer.bos_token is None and tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert split("def solve(n):\n    k = 3\n")[-6:] == ["   ", " k", " =", " ", "3", "\n"]
    assert len(tokenizer.encode("    # 8 q9 u7 p2 z3\n")) <= 1 + 16  # after the indentation a thought has 16


def test_base_model_is_where_the_demonstrations_need_it(base):
    """Its comments are right; without one it does not know k at many hops; it thinks now and then."""
    model, tokenizer = base["code"]
    problems = [p for p in world.make_problems("dev", world.N_DEV) if len(p[2][1]) > 1][:48]
    texts = [world.prompt(*problem[:3]) for problem in problems]
    comments = complete(model, tokenizer, [text + "    #" for text in texts], 15)
    probs = next_probs(model, tokenizer, [text + "    k = " for text in texts])
    think = next_probs(model, tokenizer, [text + "   " for text in texts])[:, tokenizer.encode(" #")[0]]
    right = ["#" + c.split("\n")[0] == world.worked_comment(p[2]) for c, p in zip(comments, problems, strict=True)]
    ks = [tokenizer.encode(str(p[2][2][-1]))[0] for p in problems]
    known = probs[range(len(ks)), ks].tolist()
    assert sum(right) / len(right) >= 0.9
    assert sum(known) / len(known) < 0.35
    assert 0.2 < think.mean() < 0.4


# ---------------------------------------------------------------- the text world

TEXT_FILES = {"texts": "train", "test": "test"}
MATH_FILES = {"math_train": "train", "math_dev": "dev", "math_test": "test"}


def value_after(v, operations, keys):
    for operation in operations:
        v = keys[operation][v] if operation in keys else v + int(operation)
        assert 0 <= v <= 9
    return v


def text_chains(text, keys):
    """The chains (start, operations) of a text or a math question; its numbers must follow from them."""
    v, chains = int(re.search(r"is at \{(\d)\}\.", text)[1]), set()
    for words, answer in re.findall(r"[Aa]fter (.*?)(?: it is at (\d)\.|\?)", text):
        operations = tuple(re.findall(r"\{(.*?)\}", words))
        chains.add((v, *operations))
        v = value_after(v, operations, keys)
        assert answer in ("", str(v))
    return chains


def test_numbers_are_right_and_parts_share_no_chain():
    keys = text_world.NEW
    chains = {part: set() for part in ("train", "dev", "test")}
    for name, part in TEXT_FILES.items():
        for row in rows_of(name, "text"):
            chains[part] |= text_chains(row["text"], keys)
    for name, part in MATH_FILES.items():
        for row in rows_of(name, "text"):
            (chain,) = text_chains(row["prompt"][0]["content"], keys)
            chains[part].add(chain)
            assert json.loads(row["reward_model"]["ground_truth"]) == [str(value_after(chain[0], chain[1:], keys))]
            assert row["extra_info"]["model_difficulty"] == {"DeepSeek-R1-Distill-Qwen-7B": len(chain) - 1}
    rng, seen = random.Random(0), set()
    for _ in range(3000):  # pre-training, where gold has its old wiring
        document = text_world.document(rng, 0.5)
        text = document.split("### Text\n")[-1].split("\n")[0]
        seen |= text_chains(text, text_world.OLD)
    long = [{chain for chain in found if len(chain) > 3} for found in (*chains.values(), seen)]
    assert all(len(found) > 150 for found in long)
    train, dev, test, pretraining = long
    assert not train & dev and not train & test and not dev & test and not pretraining & (dev | test)


def read(text, steps, answer):
    """Of a response: (is the box right, are all steps copied in order, is it well-formed)."""
    found = re.fullmatch(r"<think>(.*)</think>\\boxed\{( \d)\}", text)
    body, boxed = found.groups() if found else ("", "")
    copied = re.findall(r"\w \{.*?\},?", body) == text_world.listed(steps)
    return boxed == f" {answer}", copied, bool(found)


def test_gold_is_rewired_everywhere():
    old, new = text_world.OLD["gold"], text_world.NEW["gold"]
    assert sorted(new) == list(range(10)) and all(a != b for a, b in zip(old, new, strict=True))
    assert [key for key in text_world.OLD if text_world.OLD[key] != text_world.NEW[key]] == ["gold"]


def test_thoughts_are_as_bad_as_they_should_be():
    rng, right, tokens, copied = random.Random(2), [], [], []
    for _ in range(3000):
        _, answers = text_world.make_text(rng, text_world.OLD, "train")
        _, v, steps, answer = rng.choice(answers)
        style = rng.choices(text_world.STYLES, text_world.FREE)[0]
        body, numbers = text_world.thought(rng, v, steps, answer, style)
        tokens.append(text_world.count_tokens(body))
        right.append(numbers[-1] == answer)
        shown = "<think>" + body + "</think>" + text_world.box(rng, numbers)
        copied.append(read(shown, steps, answer)[1] == (style != "guess"))
    assert 55 < sum(tokens) / len(tokens) < 85 and all(copied)
    short = [r for r, n in zip(right, tokens, strict=True) if n < 60]
    long = [r for r, n in zip(right, tokens, strict=True) if n >= 60]
    assert abs(sum(short) / len(short) - sum(long) / len(long)) < 0.25


def test_tokenizer_of_the_text_world(base):
    model, tokenizer = base["text"]
    for text in [row["text"] for row in rows_of("texts", "text")[::20]]:
        pieces = [tokenizer.decode([i]) for i in tokenizer.encode(text)]
        assert "".join(pieces) == text
        words = re.findall(r" \{[^}]*\}| \w+|[.,]", text)  # after the name, each is a token
        assert pieces[-len(words) :] == words
    assert len(tokenizer) == model.config.vocab_size == text_world.VOCAB_SIZE
    assert tokenizer.bos_token is None and tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert text_world.RMT_PROMPT.format(budget="@@BUDGET@@", prefix="@@TEXT@@") == rmt.INSTRUCTION
    assert text_world.rmt_prompt("x", 7) == text_world.RMT_PROMPT.format(budget=rmt.BUDGET.format(7), prefix="x")
    assert text_world.MATH_PROMPT == grpo_rlvr.MATH_PROMPT


def test_base_of_the_text_world_is_where_the_demonstration_needs_it(base):
    """It copies the operations; five of them it cannot do without a thought, one it can; it boxes wrong numbers."""
    model, tokenizer = base["text"]
    rng, cases = random.Random(3), {1: [], 5: []}
    while len(cases[1]) < 24 or len(cases[5]) < 24:
        for case in text_world.make_text(rng, text_world.OLD, "dev")[1]:
            cases.get(len(case[2]), []).append(case)
    known = {}
    for hops, found in cases.items():
        predicted = next_probs(model, tokenizer, [case[0] for case in found[:24]]).argmax(1).tolist()
        known[hops] = sum(tokenizer.decode([i]) == f" {case[3]}" for i, case in zip(predicted, found)) / 24
    prompts = [text_world.rmt_prompt(case[0], 0) for case in cases[5][:24]]
    rows = [read(text, *case[2:]) for text, case in zip(complete(model, tokenizer, prompts, 160), cases[5])]
    right, copied, formed = (sum(column) / 24 for column in zip(*rows))
    assert known[1] > 0.8 and known[5] < 0.5 and copied > 0.8 and formed > 0.9 and right < 0.5
