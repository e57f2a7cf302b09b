"""The embedded default (tiny/): the data are right, disjoint and rebuilt byte for byte; the model loads."""

import importlib.util
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TINY = Path(__file__).resolve().parent.parent / "tiny"
DATA_FILES = ["programs", "code_train", "code_heldout", "code_problems", "math_train", "math_heldout", "text"]

spec = importlib.util.spec_from_file_location("tiny_build", TINY / "build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)


def rows_of(name):
    with open(TINY / f"{name}.jsonl", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY / "model")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TINY / "model", dtype=torch.float32).eval()


def test_folder_is_small():
    files = [path for path in TINY.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 8e6
    assert {f"{name}.jsonl" for name in DATA_FILES} <= {path.name for path in files}


def test_data_are_rebuilt_byte_for_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "HERE", tmp_path)
    build.build_data()
    for name in DATA_FILES:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (TINY / f"{name}.jsonl").read_bytes(), name


def test_programs_have_no_comments_and_hold():
    texts = [row["text"] for row in rows_of("programs")]
    assert len(set(texts)) == len(texts) == build.N_PROGRAMS
    for text in texts:
        assert "#" not in text
        space = {}
        exec(text, space)  # the assert at the end holds
        assert all(0 <= space[name] <= 9 for name in build.NAMES)
    last_values = [re.search(r"== (\d)", text)[1] for text in texts]
    assert all(0.08 < last_values.count(str(value)) / len(texts) < 0.12 for value in range(10))  # no guessing


def test_pretraining_programs_are_others_and_their_comments_are_right():
    make = build.document_makers(seed=1)["programs"]
    documents = [make() for _ in range(1500)]
    programs = {row["text"] for row in rows_of("programs")}
    worked = 0
    for document in documents:
        lines = document.splitlines()
        assert "\n".join(line for line in lines if line[0] != "#") + "\n" not in programs
        if lines[-2][0] == "#" and lines[-2] not in build.IDLE_COMMENTS:
            space = {}
            exec(document, space)
            assert lines[-2] == "#" + "".join(f" {name}{space[name]}" for name in "bcdef")
            worked += 1
    assert abs(worked / len(documents) - build.P_WORKED) < 0.05


def run_reference(code, function, argument):
    space = {}
    exec(code, space)
    return space[function](argument)


def test_code_references_pass_and_every_mistake_fails():
    train, heldout, _ = build.code_split()
    rows = rows_of("code_train") + rows_of("code_heldout")
    assert len(rows) == len(train) + len(heldout)
    for row, (kind, steps, _) in zip(rows, train + heldout, strict=True):
        cases = json.loads(row["input_output"])
        assert cases["fn_name"] == row["metadata"]["fn_name"] == "solve" and 8 <= len(cases["inputs"]) <= 12
        inputs, outputs = ([json.loads(x) for x in cases[side]] for side in ("inputs", "outputs"))
        assert all("\n" not in x for x in cases["inputs"])  # one line is one positional argument
        assert row["solutions"] == [row["signature"] + "\n" + build.code_body(kind, steps, [1] * len(steps))]
        for right in itertools.product([1, 2], repeat=len(steps)):
            code = row["signature"] + "\n" + build.code_body(kind, steps, right)
            got = [run_reference(code, "solve", x) for x in inputs]
            assert (got == outputs) == (2 not in right), code


def test_humaneval_file_is_the_heldout_set():
    heldout, problems = rows_of("code_heldout"), rows_of("code_problems")
    assert len(heldout) == len(problems)
    for row, problem in zip(heldout, problems, strict=True):
        assert problem["prompt"] == f'"""\n{row["question"]}\n"""\n{row["signature"]}\n'
        code = problem["prompt"] + problem["canonical_solution"]
        assert code.endswith(row["solutions"][0])
        space = {}
        exec(code + "\n" + problem["test"] + f"\ncheck({problem['entry_point']})\n", space)


def test_train_and_heldout_are_disjoint():
    train, heldout = rows_of("code_train"), rows_of("code_heldout")
    for key in ("question", "solutions"):
        values = [str(row[key]) for row in train + heldout]
        assert len(set(values)) == len(values), key
    train, heldout = rows_of("math_train"), rows_of("math_heldout")
    questions = [row["prompt"][0]["content"] for row in train + heldout]
    assert len(set(questions)) == len(questions)
    # pre-training draws its problems without the held-out ones, whatever the constants
    _, heldout, pretraining = build.code_split()

    def composition(problem):
        return tuple(operation[0] for operation, _ in problem[1])

    seen = {composition(problem) for problems in pretraining for problem in problems}
    assert not seen & {composition(problem) for problem in heldout}


def test_pretraining_solutions_are_right_as_often_as_the_table_says():
    makers = build.document_makers(seed=2)
    questions = {row["prompt"][0]["content"] for row in rows_of("math_train") + rows_of("math_heldout")}
    documents = [makers["math"]() for _ in range(2000)]
    assert not any(document.split("\nPlease")[0] in questions for document in documents)
    sold = [document for document in documents if document.count("He ") == 1 and "He sells" in document]
    rate = sum(" - " in document for document in sold) / len(sold)
    assert 0.55 < rate < 0.85


def test_math_answers_are_right():
    signs = {event[0].split("{k}")[0].strip(): event[1] for event in build.EVENTS}
    for row in rows_of("math_train") + rows_of("math_heldout"):
        question = row["prompt"][0]["content"]
        start, *events = re.split(r"\. (?:Then )?", question)[:-1]
        value = int(re.search(r"\d+", start)[0])
        for event in events:  # "He buys 3 more", "she loses 2"
            words, k = re.match(r"\w+ (.*?) (\d+)", event).groups()
            value = value + int(k) if signs[words] == "+" else value - int(k)
        assert json.loads(row["reward_model"]["ground_truth"]) == [str(value)], question
        assert 0 <= row["extra_info"]["model_difficulty"]["DeepSeek-R1-Distill-Qwen-1.5B"] <= 16


def test_tokenizer_round_trip(tokenizer):
    texts = [(TINY / f"{name}.jsonl").read_text(encoding="utf-8") for name in DATA_FILES]
    texts += build.real_code(heldout=True)[::8]
    texts += ["tabs\tand\r\n\x0cform feeds ", "é 中 \U0001f600 ' s n't .", ""]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_tokens(tokenizer, model):
    def split(text):
        return [tokenizer.decode([i]) for i in tokenizer.encode(text)]

    assert len(tokenizer) == model.config.vocab_size == build.VOCAB_SIZE
    assert tokenizer.bos_token is None and tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.chat_template is None
    assert split("x = 123\n") == ["x", " =", " ", "1", "2", "3", "\n"]
    assert split("<think> so</think>\\boxed{")[0::2] == ["<think>", "</think>", "{"]
    assert split("def solve(n):\n    return n")[-4:] == ["):\n", "   ", " return", " n"]
    thought = tokenizer.encode("# b7 c2 d8 e7 f1\n")
    assert len(thought) == 12 and tokenizer.decode(thought[:1]) == "#"  # ra3.py allows 16
    special = tokenizer.decode(tokenizer.encode("<think>a</think><|endoftext|>"), skip_special_tokens=True)
    assert special == "<think>a</think>"


def test_checkpoint_is_finite_and_knows_its_mixture(tokenizer, model):
    """Far below the log(2048) = 7.6 nats of a random model, on every part."""
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    parts = {
        "programs": (rows_of("programs")[0]["text"], 1.5),
        "problems": (build.code_document(build.random.Random(0), build.code_split()[2]), 0.8),
        "math": (rows_of("math_train")[0]["prompt"][0]["content"] + build.MATH_INSTRUCTION, 1.0),
        "text": (rows_of("text")[0]["text"], 1.0),
        "real code": ("".join(build.real_code(heldout=True)[40:42]), 4.0),
    }
    for part, (text, most) in parts.items():
        ids = torch.tensor([[tokenizer.eos_token_id] + tokenizer.encode(text)[:400]])
        with torch.no_grad():
            logits = model(ids).logits
        assert logits.isfinite().all()
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
        assert loss < most, (part, loss)


def test_real_code_parts_are_disjoint():
    trained, heldout = build.real_code(), build.real_code(heldout=True)
    repeated = set(heldout) & set(trained)  # a few pieces stand in several files
    assert len(heldout) > 500 and len(repeated) < 0.02 * len(heldout)
    assert all(piece.strip() for piece in trained)
    assert sum(len(piece) > 1.2 * build.PIECE_CHARS for piece in trained) < 0.01 * len(trained)  # long lines
