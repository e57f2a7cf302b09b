"""ra3.py: from text to snippets, the rollouts as a distribution, reward, returns, the gradient, the loop."""

import ast
import dataclasses
import functools
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

import common
import ra3
from common import EVENT, Ranks, Stop, UserError, inverse_cdf, load_model, load_tokenizer, read_rows, uniforms
from ra3 import Vocabulary, cut_text, rollout_drafted, rollout_forced, segment

ROOT = Path(__file__).parent.parent
RANKS = Ranks(0, 1, torch.device("cpu"))
ARGS = dataclasses.replace(ra3.TINY_DEFAULTS, max_latent_tokens=16, micro_batch_tokens=2048, max_snippet_tokens=10**6)
PATHS = pytest.mark.parametrize("rollout", [rollout_forced, rollout_drafted])

# ---------------------------------------------------------------- where a comment is legal

CASES = {  # text -> the lines (from 0) before which a comment line is legal
    "a = 1\nb = 2\n": [0, 1],
    "a = 1\nb = 2": [0, 1],  # no final newline
    'a = """x\ny\n"""\nb = 2\n': [0, 3],  # not inside a multi-line string
    "a = 1 + \\\n  2\nb = 2\n": [0, 2],  # not after a backslash
    "a = 1 + \\\n\\\n  2\nb = 2\n": [0, 3],
    "a = 1  # back \\\nb = 2\n": [0, 1],  # a backslash in a comment continues nothing
    "f(\n  1,\n  2)\n": [0, 1, 2],  # inside brackets a comment is legal
    "f('''\n''', 1,\n 2)\n": [0, 2],
    "if a:\r\n\tb\r\n": [0, 1],  # CRLF, tabs
    "a = 1\n\x0c\nb = 2\n": [0, 1, 2],  # a form feed
    "print 'old'\nexec code in ns\n": [0, 1],  # Python 2
    "a = 1\rb = 2\n": [],  # a lone carriage return: parser and tokenize disagree
    'a = 1\nb = """never\nclosed\nc = 3\n': [0, 1],  # nothing after the place that cannot be read
    "x = 's \\\n t'\ny = 1\n": [0, 2],
    "": [],
    "# only\n# comments\n": [0, 1],
    'a = f"""{\n1}\n"""\nb = 2\n': [0, 3],
    'a = f"""{\nf(\n1)}\n"""\nb = 2\n': [0, 4],  # of which Python 3.12 reports the ends of line
    "a = (1 +\n  2 + \\\n  3)\nb = 2\n": [0, 1, 3],
    "a = 1 \\\n\nb = 2\n": [0, 2],  # a blank line can continue a statement
}


@pytest.mark.parametrize("text", CASES)
def test_legal_lines(text):
    starts = [0]
    for line in text.splitlines(keepends=True) if "\r" in text and "\r\n" not in text else text.split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    found = [starts.index(offset) for offset, _, _ in ra3.legal_lines(text)]
    assert [n for n in found if n < text.count("\n") + (not text.endswith("\n"))] == CASES[text]


def test_a_line_of_code_takes_the_comments_blanks_and_docstrings_before_it():
    text = '# top\n\ndef f():\n    """doc\n    more"""\n    # why\n    return (1,\n            2)\n'
    starts = ra3.action_starts(text)
    assert [text[o:].split("\n")[0].strip() for o, _ in starts] == ["# top", '"""doc', "2)"]
    assert [kind for _, kind in starts] == ["first", "return", "other"]


def test_kinds_of_lines():
    kinds = {"import": ("import a", "from a import b"), "def": ("async def f():", "    class A: x = 1"), "return": ("return(1)",)}
    kinds |= {"control": ("assert a == b", "except* E as e:", "else:"), "assign": ("a[0] = b", "x: int = 1", "x = 1 + y")}
    kinds |= {"other": ("a == b", "f(x)", "@deco"), "constant": ("x = -1.5", "    s = 'a b'", "y = None")}
    for kind, lines in kinds.items():
        assert kind in ra3.KINDS and [ra3.line_kind(line) for line in lines] == [kind] * len(lines)


# ---------------------------------------------------------------- from text to tokens

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KINDS = ("qwen", "gpt2", "sentencepiece", "prepended")


@functools.cache
def stdlib():
    return [row["text"] for row in read_rows("stdlib")]


@functools.cache
def trained(kind):
    """A small tokenizer: byte-level BPE with Qwen's or GPT-2's words; SentencePiece-like, also with a space before each text."""
    if kind in ("qwen", "gpt2"):
        core = Tokenizer(models.BPE())
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2")
        split = pre_tokenizers.Split(Regex(QWEN), "isolated")
        core.pre_tokenizer = byte_level if kind == "gpt2" else pre_tokenizers.Sequence([split, byte_level])
        core.decoder = decoders.ByteLevel()
        letters = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=1200, special_tokens=["<|end|>"], initial_alphabet=letters)
        core.train_from_iterator(stdlib()[::40], trainer)
        return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", clean_up_tokenization_spaces=False)
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    prepend, replace = [normalizers.Prepend("\u2581")] * (kind == "prepended"), normalizers.Replace(" ", "\u2581")
    core.normalizer = normalizers.Sequence([*prepend, replace])
    strip = decoders.Strip(" ", 1, 0)
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    core.pre_tokenizer = pre_tokenizers.Split(Regex("\n|\u2581*[^\u2581\n]+"), "isolated")
    core.train_from_iterator(stdlib()[::40], trainers.BpeTrainer(vocab_size=1400, special_tokens=special))
    model = json.loads(core.to_str())["model"]
    merges = [tuple(m) for m in model["merges"]]
    core.model = models.BPE(vocab=model["vocab"], merges=merges, byte_fallback=True, unk_token="<unk>")
    core = Tokenizer.from_str(json.dumps(json.loads(core.to_str()) | {"added_tokens": []}))
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@functools.cache
def vocabulary(kind):
    return Vocabulary(trained(kind), len(trained(kind)), "cpu")


def pieces_of(text, v, limit=10**6, context=10**9, granularity="line"):
    """A text's snippets, which together are the text."""
    args = dataclasses.replace(ARGS, max_snippet_tokens=limit, granularity=granularity)
    pieces = list(cut_text(text, 4 * limit))
    assert "".join(piece for piece, *_ in pieces) == text and all(len(piece) <= 4 * limit for piece, *_ in pieces)
    assert [last for *_, last in pieces] == [False] * (len(pieces) - 1) + [True] * bool(text)
    return [s for piece in pieces for s in segment(piece, "x", v, args, context)]


def with_thoughts(snippets, v, rng):
    """The whole text with thoughts before half of its actions, whatever they say; checks tokens on the way."""
    written = []
    for s in snippets:
        for boundary, indent in zip(s.boundaries, s.indents, strict=True):
            start = s.starts[boundary]
            assert "".join(v.text[i] for i in indent) == s.text[s.text.rfind("\n", 0, start) + 1 : start]
        code = s.ids[1:].tolist()[: len(s.ids) - 1 - (s.ids[-1] == v.tokenizer.eos_token_id)]
        edges = [*s.boundaries - 1, len(code)]
        for a, b in rng.sample(list(itertools.pairwise(edges)), min(1, len(s.kinds))):  # decoding is slow: one of them
            assert v.decode([code[a:b]])[0] == s.text[s.starts[a + 1] : s.starts[b + 1]]
        thoughts = ["# x\n", "#\n", ' # \'""" ([{ \\\n', "#\t\x0c\u2028 \ufffd\n"]
        latents = {t: rng.choice(thoughts) for t in range(len(s.kinds)) if rng.random() < 0.5}
        written.append(ra3.bootstrap_text(s, latents))
    return "".join(written)


def tree(text):
    return ast.dump(ast.parse(text))


def test_the_tokenizer_that_prepends_a_space_does_so():
    assert vocabulary("prepended").decode([trained("prepended")("a\n").input_ids]) == [" a\n"]


@pytest.mark.parametrize(
    "kind, limit", [("qwen", 96), ("gpt2", 1024), ("sentencepiece", 10**6), ("prepended", 96)]
)
def test_no_character_of_the_standard_library_is_lost_and_thoughts_change_nothing(kind, limit):
    v, rng, found, offered = vocabulary(kind), random.Random(0), 0, 0
    eos, context = v.tokenizer.eos_token_id, 4 * limit
    for text in stdlib()[9 * KINDS.index(kind) :: 36]:
        snippets = pieces_of(text, v, limit, context)
        if not text or any(token in text for token in v.tokenizer.all_special_tokens):
            continue  # an empty __init__.py; a file that spells "<s>"
        assert "".join(s.text for s in snippets) == text
        assert [eos in s.ids[1:] for s in snippets] == [False] * (len(snippets) - 1) + [True] and snippets[-1].ids[-1] == eos
        assert all(len(s.ids) <= limit and s.width(16) <= context for s in snippets)
        assert tree(with_thoughts(snippets, v, rng)) == tree(text)
        found += sum(len(s.kinds) for s in snippets)
        offered += len(ra3.action_starts(text))
    # a statement longer than a piece has no decision inside; nor has a snippet's first line after a prepended space
    assert offered > 2000 and found > (0.7 if limit == 96 else 0.8) * offered


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text",
    [
        "if a:\r\n\tb = 1\r\n\tc = 2\r\n", "\x0cdef f():\n\treturn 1", "print 'x'\nexec y\n", "# only a comment\n", "", "a",
        "x = '\u00e9\U0001f600\u4e2d'\n\u00e9 = 2\n", "\n\n  \nx = 1\n", "a = 1\rb = 2\n", "\ufffd = broken bytes\n",
        "\n\n\n\n\n\n\n\n\n\n\n\nx = 1\n", "x = 1  # \ufffd", "x = 1\n# \ufffd\ufffd",
    ],
)  # fmt: skip
def test_odd_texts_do_not_break_segmentation(kind, text):
    for limit in (8, 10**6):
        snippets = pieces_of(text, vocabulary(kind), limit)
        assert "".join(s.text for s in snippets) == text
        written = with_thoughts(snippets, vocabulary(kind), random.Random(0))
        try:
            assert tree(text) == tree(written)
        except SyntaxError:
            with pytest.raises(SyntaxError):
                tree(text)


def test_texts_without_code_and_with_endless_lines_are_unusable():
    v = vocabulary("qwen")
    assert [segment((text, None, True), "x", v, ARGS, 10**9) for text in ("", " \n\n")] == [[]] * 2
    for limit in (1000, 10**6):  # whether the text would be cut or not
        (piece,) = ra3.cut_text("x = 1\ny = '" + "a" * ra3.MAX_LINE + "'\n", limit)
        assert segment(piece, "x", v, ARGS, 10**9) == []
    assert segment(("x = '<|end|>'\n", None, True), "x", v, ARGS, 10**9) == []  # it would spell the end


def test_long_texts_are_cut_before_actions_and_fit_with_the_longest_thoughts():
    v = vocabulary("qwen")
    text = "".join(f"value_{i} = {i} + 1\n" for i in range(100))
    for limit, context in ((200, 10**6), (10**6, 300)):
        snippets = pieces_of(text, v, limit, context)
        assert len(snippets) > 3 and all(s.text.startswith("value_") and s.text.endswith("\n") for s in snippets)
        assert [i for s in snippets for i in range(len(s.kinds))] and sum(len(s.kinds) for s in snippets) == 100
        fullest = max(s.width(16) if limit > 200 else len(s.ids) for s in snippets)
        assert min(limit, context) / 2 < fullest <= min(limit, context)
    for v in map(vocabulary, ("qwen", "prepended")):  # there, a snippet's first line has no boundary
        one, all_of_them = (pieces_of(text, v, 200, granularity=name) for name in ("snippet", "line"))
        assert [s.text for s in one] == [s.text for s in all_of_them] and [len(s.kinds) for s in one] == [1] * len(one)
        assert all(s.boundaries == o.boundaries[:1] and s.kinds == o.kinds[:1] for s, o in zip(one, all_of_them))


def test_cut_text_cuts_at_statements_of_all_blocks():
    text = "# head\nimport os\n\n\n@deco\ndef f():\n    return 1\n\n\nclass A:\n    x = 1\n\n    def f(self):\n        y = 1\n        z = 2\n\n# tail\nx = 1; y = 2\n"
    pieces = list(cut_text(text, 36))
    assert [piece.split("\n")[0] for piece, *_ in pieces] == ["# head", "@deco", "class A:", "    def f(self):", "        z = 2"]
    assert [(piece[o:].split("\n")[0].strip(), kind) for piece, own, _ in pieces for o, kind in own] == [
        (text[o:].split("\n")[0].strip(), kind) for o, kind in ra3.action_starts(text)
    ]  # fmt: skip
    assert list(cut_text(text, 1000)) == [(text, None, True)] and list(cut_text("", 9)) == []


@pytest.mark.parametrize("text, first", [
    ("not python (\n(\n", "(\n"), ("f(\n    1,\n)\na = 1\n", "a = 1\n"), ("if a:\n    b = 1\nelse:\n    c = 1\n", "    c = 1\n"),
])  # fmt: skip
def test_a_cut_does_not_separate_a_statement_from_what_continues_it(text, first):
    *_, (piece, _, last) = cut_text(text, len(text) - 2)
    assert piece == first and last


# ---------------------------------------------------------------- the stream of snippets


def data_file(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def stream_of(args, part, ranks=RANKS, **kw):
    return ra3.SnippetStream(args, part, vocabulary("qwen"), 512, ranks, **kw)


def test_all_of_a_file_is_in_one_part_and_a_cursor_continues_in_the_middle_of_a_piece(tmp_path):
    rows = [
        {"path": f"{i // 2}.py", "text": "".join(f"name_{i // 2}_{k} = {i}\n" for k in range(1 + i % 15))} for i in range(60)
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = dataclasses.replace(ARGS, dataset=(str(tmp_path / "x.jsonl"),), max_snippet_tokens=40, eval_snippets=10**6)

    def files(snippets):
        return {re.match(r"name_(\d+)_", s.text)[1] for s in snippets}

    whole, sizes, middle = stream_of(args, "all").batch(10**6), [], 0
    assert "".join(s.text for s in whole) == "".join(row["text"] for row in rows)  # everything, once, in order
    held = files(ra3.held_out(args, vocabulary("qwen"), 512, RANKS))
    for updates in (1, 1000):  # they move the border between E and M
        changed = dataclasses.replace(args, rl_updates=updates)
        e, m = (files(stream_of(changed, part).batch(200)) for part in "EM")
        assert held and e and m and not e & m and not held & (e | m) and e | m | held == files(whole)
        sizes.append(len(e))
    assert sizes[0] < sizes[1]
    for size in (1, 6, 11, 16):
        stream = stream_of(args, "M")
        stream.batch(size)
        again = stream_of(args, "M", cursor=json.loads(json.dumps(stream.cursor)))
        middle += stream.cursor[1] > 0
        assert [s.text for _ in range(2) for s in stream.batch(15)] == [s.text for s in again.batch(30)]
    # and in the next epoch
    stream.batch(200)
    again = stream_of(args, "M", cursor=stream.cursor)
    assert [s.text for s in stream.batch(20)] == [s.text for s in again.batch(20)] and middle


def test_sources_are_mixed_by_their_weights(tmp_path):
    assert ra3.WEIGHTS[ra3.Args.dataset] == (0.95, 0.05) and ra3.WEIGHTS[ra3.TINY_DEFAULTS.dataset] == (0.9, 0.1)
    files = tuple(data_file(tmp_path / f"{name}.jsonl", [f"{name} = {i}\n" for i in range(100)]) for name in "ab")
    args = dataclasses.replace(ARGS, dataset=files)
    for weights, share in (((), 0.5), ((3.0, 1.0), 0.75)):
        pieces = itertools.islice(ra3.interleaved(dataclasses.replace(args, dataset_weights=weights)), 40)
        assert [name for _, name, _ in pieces].count("a") == 40 * share
    stream = stream_of(args, "all")  # everything, whatever the weights
    snippets = stream.batch(1000)
    assert "".join(s.text for s in snippets) == "".join(row["text"] for file in files for row in read_rows(file))
    tokens = {name: sum(len(s.ids) for s in snippets if s.source == name) for name in "ab"}
    shares = {f"data/token_share/{name}": n / sum(tokens.values()) for name, n in tokens.items()}
    assert stream.metrics() == {"data/unusable": 0, "data/decisions": 1, **shares}
    (tmp_path / "other").mkdir()  # two files of one name
    files = (files[0], data_file(tmp_path / "other" / "a.jsonl", ["x = 1\n"]))
    assert {name for source in files for _, name, _ in ra3.source_pieces(source, dataclasses.replace(args, dataset=files))} == set(files)


def test_prose_and_unreadable_texts_are_counted_and_refused_when_there_is_nothing_else(tmp_path):
    texts = [f"a = {i}\n" if i % 2 else f"<|end|> {i}\n" for i in range(200)]
    stream = stream_of(dataclasses.replace(ARGS, dataset=(data_file(tmp_path / "half.jsonl", texts),)), "M")
    stream.batch(80)
    assert 0.3 < stream.metrics()["data/unusable"] < 0.7
    nothing = dataclasses.replace(ARGS, dataset=(data_file(tmp_path / "none.jsonl", texts[::2]),))
    with pytest.raises(UserError, match="none of the first 1000 texts .* can be used with --max-snippet-tokens"):
        stream_of(nothing, "M").batch(1)
    with pytest.raises(UserError, match="no Python text for the E-step"):
        stream_of(dataclasses.replace(nothing, dataset=(data_file(tmp_path / "one.jsonl", ["a = 5\n"]),)), "E").batch(1)


def test_rows_as_users_have_them(tmp_path):
    """A byte order mark; paths that are not UTF-8, or no text; another language."""
    rows = [{"text": "\ufeffx = 1\ny = 2\n"}, {"path": "caf\udce9.py"}, {"path": ["a", 1]}, {"lang": "Java"}, {"lang": ["C"]}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": "x = 1\ny = 2\n"} | row) + "\n" for row in rows))
    pieces = [piece for piece, _, _ in ra3.source_pieces(str(file), ARGS)]
    assert [text for text, _, _ in pieces] == ["x = 1\ny = 2\n"] * 3


# ---------------------------------------------------------------- a case small enough to enumerate

TOKENS = ["<eos>", "a", "=", "1", "\n", "#", " #", "x", "\r", "\n\n"]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.15, "tie_word_embeddings": False}
SIZES |= {"eos_token_id": 0, "bos_token_id": None, "pad_token_id": None}
LAYERS = {  # all attend to everything, but for these
    "gemma3_text": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2,
                     "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
}  # fmt: skip


def save_model(folder, tokenizer, family="llama", seed=0, v=None, snippets=(), **sizes):
    """A random model. snippets: at their decisions it often opens a thought, and it often ends one."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **SIZES | LAYERS.get(family, {}) | sizes)
    model = AutoModelForCausalLM.from_config(config)
    ends = [i for i, text in enumerate(v.text) if re.fullmatch("[^\n\r\0]*\n", text)] if v else []
    with torch.no_grad():
        for s in snippets:
            states, head = model.get_decoder()(torch.from_numpy(s.ids)[None]).last_hidden_state[0], model.get_output_embeddings()
            for tokens, mean, more in ((v.opens_ids, states[s.boundaries - 1].mean(0), 7), (ends, states.mean(0), 5.5)):
                head.weight[list(tokens)] += more / len(snippets) * mean / mean.square().sum()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def small_world(folder, seed=0, max_latent_tokens=2, text="a=1\na=a\n"):
    """A vocabulary of ten tokens, a random model, and a snippet of two actions."""
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate(TOKENS)}, unk_token="x"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n| #|[^\n]"), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", clean_up_tokenization_spaces=False)
    save_model(folder, tokenizer, seed=seed, hidden_size=16, intermediate_size=32, head_dim=8, initializer_range=0.35)
    model = load_model(str(folder), tokenizer, RANKS, longest=64)
    args = dataclasses.replace(ARGS, max_latent_tokens=max_latent_tokens, entropy_coef=0.0, penalty=0.3)
    v = Vocabulary(tokenizer, len(TOKENS), "cpu")
    (snippet,) = pieces_of(text, v)
    assert len(snippet.boundaries) == 2 and v.closing == 4
    assert [TOKENS[i] for i in v.opens.nonzero().flatten()] == ["#", " #"] and v.opens_ids == {5, 6}
    return model, v, snippet, args


@pytest.fixture
def small(tmp_path):
    return functools.partial(small_world, tmp_path)


def enumerate_latents(max_latent_tokens):
    """All z_t: act (None), or the tokens that q draws until the thought ends, breaks off or is too long."""
    closing = {TOKENS.index(t) for t in ("<eos>", "\r", "\n\n", "\n")}
    latents, open_ones = [None], [[5], [6]]
    while open_ones:
        z = open_ones.pop()
        if z[-1] in closing or len(z) == max_latent_tokens:
            latents.append(tuple(z))
        else:
            open_ones += [[*z, token] for token in range(len(TOKENS))]
    return latents


def enumerate_rollouts(snippet, args):
    """Every possible rollout, written down independently of the sampler."""
    b0, b1 = snippet.boundaries
    parts = [snippet.ids[b0:b1].tolist(), snippet.ids[b1:].tolist()]
    for latents in itertools.product(enumerate_latents(args.max_latent_tokens), repeat=2):
        columns, malformed = [(int(snippet.ids[0]), ra3.FORCED, -1, False)], []
        for t, (z, part) in enumerate(zip(latents, parts)):
            malformed += [t] * (z is not None and TOKENS[z[-1]] != "\n")
            for k, token in enumerate(z or ()):
                columns.append((4 if t in malformed and k == len(z) - 1 else token, token, t, False))
            for k, token in enumerate(part):
                columns.append((token, EVENT if z is None and k == 0 else ra3.FORCED, t, True))
        thoughts = {t: list(z) for t, z in enumerate(latents) if z}
        yield latents, ra3.Rollout(snippet, thoughts, malformed, *(np.array(c) for c in zip(*columns)))


def exact_logq(model, r, temperature=1.0):
    """log q of a rollout's latents [number of drawn tokens], by one plain forward pass and plain arithmetic."""
    probs = (model(torch.from_numpy(r.ids)[None]).logits[0] / temperature).double().softmax(-1)
    out = []
    for k in np.flatnonzero(r.targets != ra3.FORCED):
        p = probs[k - 1]
        out.append((1 - p[5] - p[6]).log() if r.targets[k] == EVENT else p[r.targets[k]].log())
    return torch.stack(out)


# ---------------------------------------------------------------- 1 sample


def same(a, b):
    arrays = all((getattr(a, name) == getattr(b, name)).all() for name in ra3.ARRAYS)
    return arrays and a.thoughts == b.thoughts and a.malformed == b.malformed


def noise_for(snippets, longest, *key):
    return uniforms((len(snippets), max(s.width(longest) for s in snippets) + 1), *key)


@torch.no_grad()
def check_draws(model, v, rollouts, noise):
    """What was drawn is what a plain forward pass over the final text draws with the same noise."""
    for r, own in zip(rollouts, noise, strict=True):
        k = np.flatnonzero(r.targets != ra3.FORCED)
        probs = model(input_ids=torch.from_numpy(r.ids)[None], use_cache=False).logits[0].softmax(-1)
        again, acts = inverse_cdf(probs[k - 1], own[k]).numpy(), r.targets[k] == EVENT
        assert (again[~acts] == r.targets[k][~acts]).all() and not v.opens[again[acts]].any()
        assert (r.ids[r.expert] == r.snippet.ids[1:]).all()  # the expert's tokens are all there, in order
        assert set(r.actions[k]) == set(range(len(r.snippet.boundaries)))  # one latent before each action


@PATHS
def test_the_sampler_is_the_distribution_q(small, rollout):
    model, v, snippet, args = small()
    args = dataclasses.replace(args, temperature=1.3)
    with torch.no_grad():
        exact = {z: exact_logq(model, r, 1.3).sum().exp().item() for z, r in enumerate_rollouts(snippet, args)}
        assert math.isclose(sum(exact.values()), 1, abs_tol=1e-6)
        n = 8000
        counts = dict.fromkeys(exact, 0)
        for r in rollout(model, [snippet] * n, noise_for([snippet] * n, 2, "test"), v, args):
            counts[tuple(tuple(r.thoughts.get(t, ())) or None for t in range(2))] += 1  # KeyError: something outside the support was sampled
    chi2 = sum((counts[z] - n * p) ** 2 / (n * p) for z, p in exact.items() if n * p >= 5)
    rare = sum(p for p in exact.values() if n * p < 5)
    cells = sum(n * p >= 5 for p in exact.values())
    assert cells > 20 and chi2 < cells + 5 * math.sqrt(2 * cells), (chi2, cells)
    assert abs(sum(c for z, c in counts.items() if n * exact[z] < 5) / n - rare) < 0.01
    thinks = sum(c for z, c in counts.items() if z[0] is not None) / n
    expected = sum(p for z, p in exact.items() if z[0] is not None)
    assert 0.05 < expected < 0.95 and abs(thinks - expected) < 4 * math.sqrt(0.25 / n)


@torch.no_grad()
@pytest.mark.parametrize("draft", [0, 1, 3, 100])
def test_what_was_drawn_is_what_a_plain_forward_over_the_final_sequence_draws(small, draft, monkeypatch):
    """Rows of other lengths and other thoughts in one batch: nothing that was drafted in vain is left over."""
    model, v, snippet, args = small(max_latent_tokens=5, seed=4)
    monkeypatch.setattr(ra3, "DRAFT", draft or 2)
    snippets = [snippet, *(pieces_of(text, v)[0] for text in ("a\n", "a=1\na=a\n=\n", "a\n1=\n" * 4))] * 30
    noise = noise_for(snippets, 5, "logq")
    rollouts = (rollout_drafted if draft else rollout_forced)(model, snippets, noise, v, args)
    check_draws(model, v, rollouts, noise)
    assert any(r.malformed for r in rollouts) and any(len(r.thoughts) > 3 for r in rollouts)
    other = (rollout_forced if draft else rollout_drafted)(model, snippets, noise, v, args)
    assert all(map(same, rollouts, other))


CODE = [
    "def f(a, b):\n    if a:\n        b = a + 1\n        return b\n    return f(b, a)\n", "x = 1\ny = x\n\n\nz = [\n  1,\n  2]\n",
    "import os\nfor i in range(9):\n    print(i)\n", "a = 1\n", "# note\na = '''\n1'''\nb = a\nassert b == a\nc = b\n",
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3", "gemma3_text", "lfm2", "qwen3_5_text", "toy"])
def test_both_rollouts_are_the_same_and_exact_for_every_architecture(family, tmp_path):
    v, folder = vocabulary("qwen"), tmp_path
    if family == "toy":  # as it was trained
        folder = min(path.parent for path in common.TINY.rglob("config.json"))
        v = Vocabulary(load_tokenizer(str(folder)), AutoConfig.from_pretrained(folder).vocab_size, "cpu")
    else:
        save_model(folder, v.tokenizer, family, v=v, snippets=[s for text in CODE for s in pieces_of(text, v)])
    model = load_model(str(folder), v.tokenizer, RANKS, longest=256)
    assert model.can_draft == (family not in LAYERS)
    args = dataclasses.replace(ARGS, max_latent_tokens=3, temperature=1.0 if family != "toy" else 1.5)
    snippets = [s for text in CODE for s in pieces_of(text, v)] * 6
    noise = noise_for(snippets, 3, family)
    forced = rollout_forced(model, snippets, noise, v, args)
    if family != "toy":
        check_draws(model, v, forced, noise)
    if model.can_draft:
        assert all(map(same, forced, rollout_drafted(model, snippets, noise, v, args)))
    decisions, thoughts = sum(len(s.kinds) for s in snippets), sum(len(r.thoughts) for r in forced)
    assert 0.02 * decisions < thoughts < 0.9 * decisions
    for r in forced:
        written = v.decode([r.ids[1:-1].tolist()])[0]
        assert tree(written) == tree(r.snippet.text)  # malformed thoughts are closed, too
        assert tree(ra3.bootstrap_text(r.snippet, r.texts(v))) == tree(r.snippet.text)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_indentation_is_forced_again_after_a_thought(kind, tmp_path):
    v, text = vocabulary(kind), "if a:\n        b = 1\n        c = 2\n"
    snippets = pieces_of(text, v) * 50
    save_model(tmp_path, v.tokenizer, v=v, snippets=snippets[:1])
    model = load_model(str(tmp_path), v.tokenizer, RANKS, longest=256)
    rollouts = rollout_drafted(model, snippets, noise_for(snippets, 16, "i"), v, ARGS)
    assert sum(len(r.texts(v)) for r in rollouts) > 10
    for r in rollouts:
        written = v.decode([r.ids[1:-1].tolist()])[0].removeprefix(" " * (kind == "prepended"))
        assert tree(written) == tree(text) and [s for s in written.split("\n") if "#" not in s] == text.split("\n")
        clean = r.without_malformed()
        assert v.decode([clean.ids[1:-1].tolist()])[0].lstrip() == ra3.bootstrap_text(r.snippet, r.texts(v)).lstrip()


@pytest.mark.parametrize("path", ["forced", "drafted"])
def test_noise_belongs_to_a_snippet_not_to_a_batch_an_update_or_a_rank(small, path):
    model, v, snippet, args = small(max_latent_tokens=4, seed=4)
    args = dataclasses.replace(args, rollout=path)
    longer = segment(("a\n" * 9, None, True), "x", v, args, 1024)[0]
    batches = [[snippet] * 12, [snippet, longer] * 4, [snippet] * 2]
    whole = ra3.sample(model, batches, "M", 7, v, args, RANKS)
    assert [len(rollouts) for rollouts in whole] == [12, 8, 2] and any(r.thoughts for r in sum(whole, []))
    assert len({r.ids.tobytes() for r in sum(whole, [])}) > 3
    for index, (first, batch) in enumerate(zip((7, 19, 27), batches)):  # one update at a time, in small parts, on two ranks
        few = dataclasses.replace(args, rollout_rows=1 + index)
        parts = [ra3.sample(model, [batch], "M", first, v, few, Ranks(rank, 2, None))[0] for rank in (0, 1)]
        assert all(same(a, b) for a, b in zip(whole[index], sum(parts, []), strict=True))
    (none,) = ra3.sample(None, [batches[1]], "M", 7, v, args, RANKS)
    assert all(same(r, ra3.all_act(s)) and not r.thoughts for r, s in zip(none, batches[1], strict=True))


def test_malformed_thoughts_become_act_in_the_m_step(small):
    _, v, snippet, args = small()
    seen = 0
    for _, r in enumerate_rollouts(snippet, args):
        well = {t: thought for t, thought in r.thoughts.items() if t not in r.malformed}
        expected = ra3.rolled_out(snippet, well, v)
        seen += bool(r.malformed)
        assert same(ra3.rolled_out(snippet, r.thoughts, v), r) and r.texts(v) == dict(zip(well, v.decode(list(well.values()))))
        assert (r.without_malformed().ids == expected.ids).all() and (r.without_malformed().expert == expected.expert).all()
    assert seen > 10


# ---------------------------------------------------------------- 2 score


def test_rewards_by_hand(small):
    _, v, snippet, args = small()
    rollouts = dict(enumerate_rollouts(snippet, args))
    r = rollouts[(5, 4), None]  # "#\n" before the first line
    logprobs = np.log([0.5, 0.25, 0.125, 0.5, 0.1, 0.2, 0.4, 0.8, 0.5])
    first, second = logprobs[:4].mean(), logprobs[4:].mean()
    assert np.allclose(ra3.step_rewards(r, logprobs, 0.3), [first - 0.3, second])
    malformed = rollouts[(5, 7), (6, 4)]  # "#x" does not end in time
    assert np.allclose(ra3.step_rewards(malformed, logprobs, 0.3), [first - 2, second - 0.3])


def test_expert_logprobs_are_a_plain_forward_whatever_the_micro_batch(small, monkeypatch):
    model, v, snippet, args = small()
    rollouts = [r for _, r in itertools.islice(enumerate_rollouts(snippet, args), 0, 60, 7)]
    rows, original = [], ra3.token_logprobs
    monkeypatch.setattr(ra3, "token_logprobs", lambda m, ids, *a, **kw: rows.extend(ids) or original(m, ids, *a, **kw))
    for given_decision, tokens in itertools.product((False, True), (1, 10**6)):
        args = dataclasses.replace(args, micro_batch_tokens=tokens)
        rows.clear()
        found = [rows[int(given_decision)] for rows in ra3.expert_logprobs(model, [*rollouts, *rollouts[::-1]], v, args)]
        assert len(rows) == len({r.ids.tobytes() for r in rollouts})  # equal rows are scored once
        for r, logprobs in zip([*rollouts, *rollouts[::-1]], found, strict=True):
            plain = model(torch.from_numpy(r.ids)[None]).logits[0].log_softmax(-1).detach()
            expected = [plain[k - 1, r.ids[k]].item() for k in np.flatnonzero(r.expert)]
            if given_decision:  # the first tokens of both actions, renormalised without "#" and " #"
                for place, t in ((0, 0), (4, 1)):
                    column = np.flatnonzero(r.expert & (r.actions == t))[0]
                    expected[place] -= math.log(1 - plain[column - 1, 5:7].exp().sum().item())
            assert np.allclose(logprobs, expected, atol=1e-5)


def test_a_line_that_begins_with_the_experts_own_comment(small):
    """Its "#" is no decision: renormalised without "#" it would be no probability, and could be above 1."""
    model, v, _, args = small(max_latent_tokens=5)
    (commented,), (bare,) = pieces_of("a\n#a\na\n", v), pieces_of("a\na\n", v)
    assert v.opens[commented.ids[commented.boundaries]].tolist() == [False, True]
    ((plain, given),) = ra3.expert_logprobs(model, [ra3.all_act(commented)], v, args)
    assert np.flatnonzero(plain != given).tolist() == [0] and (given <= 0).all()
    # the same tokens, but its comment is a thought: scored on its own
    rows = [ra3.all_act(commented), ra3.rolled_out(bare, {1: [5, 1, 4]}, v)]
    assert rows[0].ids.tolist() == rows[1].ids.tolist()
    assert [len(logprobs) for logprobs, _ in ra3.expert_logprobs(model, rows, v, args)] == [8, 5]


class Watch:
    """Stands for the optimizer: keeps what the E-step's loss has put into the gradients."""

    def __init__(self, model):
        self.model, self.gradients = model, []

    def step(self):
        self.gradients.append([p.grad.clone() for p in self.model.parameters()])


def never(interrupt=None):
    return types.SimpleNamespace(check=lambda: None)


@pytest.mark.parametrize("thinks", [True, False])
def test_gain_is_the_reward_over_never_thinking(small, thinks, monkeypatch):
    q, v, snippet, args = small(max_latent_tokens=3, seed=4)
    pi, *_ = small(seed=5)
    args = dataclasses.replace(args, group_size=2, penalty_warmup=0)
    if not thinks:  # the noise 0 always draws token 0, which is no "#"
        monkeypatch.setattr(ra3, "uniforms", lambda shape, *key: torch.zeros(tuple(shape)))
    drawn, original = [], ra3.sample
    monkeypatch.setattr(ra3, "sample", lambda *a: drawn.append(original(*a)) or drawn[-1])
    metrics = ra3.e_step(q, pi, Watch(q), [snippet, *pieces_of("a\n=\n1\n", v)], 0, v, args, RANKS, never())
    rewards, plain = (
        [ra3.step_rewards(r, lp, c) for r, (_, lp) in zip(rows, ra3.expert_logprobs(pi, rows, v, args))]
        for rows, c in ((drawn[0][0], 0.3), ([ra3.all_act(r.snippet) for r in drawn[0][0]], 0.0))
    )
    total, without = np.concatenate(rewards).sum(), np.concatenate(plain).sum()
    assert math.isclose(metrics["reward/mean"], total / 10, rel_tol=1e-6)
    assert math.isclose(metrics["reward/gain"], (total - without) / 10, abs_tol=1e-6)
    assert (metrics["rollout/think_rate"] > 0) == thinks == (abs(metrics["reward/gain"]) > 1e-3)
    assert thinks or metrics["reward/gain"] == 0
    # the samples of an evaluation show the same l_t
    shown = []
    run = types.SimpleNamespace(ranks=RANKS, samples=lambda title, legend, blocks: shown.extend(blocks))
    evaluated, _ = ra3.evaluate(q, [snippet] * 6, [], "x", v, args, run)
    rows = [r.without_malformed() for r in drawn[1][0]]
    likelihoods = [ra3.line_likelihoods(r, lp) for r, (_, lp) in zip(rows, ra3.expert_logprobs(q, rows, v, args))]
    expected = sorted(f"{likelihood[t]:.2f}" for r, likelihood in zip(rows, likelihoods) for t in r.thoughts)
    ((_, plain),) = ra3.expert_logprobs(q, [ra3.all_act(snippet)], v, args)
    without = ra3.line_likelihoods(ra3.all_act(snippet), plain).mean()
    for name, rolled in (("ce_code", rows), ("ce_code_act", [ra3.all_act(snippet)])):
        code = np.concatenate([lp for lp, _ in ra3.expert_logprobs(q, rolled, v, args)])  # not given the decisions
        assert math.isclose(evaluated[f"eval/{name}"], -code.mean(), abs_tol=1e-6)
    assert math.isclose(evaluated["eval/gain"], np.mean(likelihoods) - without, abs_tol=1e-6)
    assert sorted(re.findall(r"l_t (\S+),", "".join(shown))) == expected and bool(expected) == thinks


def test_an_update_without_decisions(small):
    model, v, _, args = small()
    metrics = ra3.e_step(model, model, Watch(model), pieces_of("#\n", v), 0, v, args, RANKS, never())
    assert metrics["reward/mean"] == metrics["optim/grad_norm"] == metrics["rollout/think_rate"] == 0


# ---------------------------------------------------------------- 3 advantage


def test_truncated_returns():
    rewards = torch.tensor([[1.0, 2, 3, 4], [0, 0, 5, 0]])
    assert ra3.truncated_returns(rewards, 2).tolist() == [[3, 5, 7, 4], [0, 5, 5, 0]]
    assert ra3.truncated_returns(rewards, 1).tolist() == rewards.tolist()
    for horizon in (0, 99):
        assert ra3.truncated_returns(rewards, horizon).tolist() == [[10, 9, 7, 4], [5, 5, 5, 0]]
    with pytest.raises(ValueError, match="horizon"):
        ra3.truncated_returns(rewards, -1)


def test_group_baseline_advantages():
    returns = torch.tensor([[[1.0, 4], [3, 4], [5, 1]]])  # [1, G = 3, T = 2]
    assert ra3.group_baseline_advantages(returns).tolist() == [[[-2, 1], [0, 1], [2, -2]]]


# ---------------------------------------------------------------- 4 update


def test_policy_gradient_equals_the_derivative_of_the_expected_return(small, monkeypatch):
    """Brute force: E_q[sum_t r_t] differentiated through the exact q over all latents, against the E-step's loss."""
    anchor, *_ = small(seed=5)  # another model scores, frozen
    model, v, snippet, args = small()
    rollouts = [r for _, r in enumerate_rollouts(snippet, args)]
    rewards = [ra3.step_rewards(r, lp, args.penalty) for r, (lp, _) in zip(rollouts, ra3.expert_logprobs(anchor, rollouts, v, args))]
    probs = torch.stack([exact_logq(model, r).sum() for r in rollouts]).exp()
    expected_return = (probs * torch.tensor([r.sum() for r in rewards])).sum()
    exact = torch.autograd.grad(expected_return, list(model.parameters()))
    returns = ra3.truncated_returns(torch.tensor(np.array(rewards)), 0).numpy()  # reward-to-go
    # every rollout weighs what its probability is: the weights ride on the advantages
    weights = probs.detach().numpy()[:, None]
    batch = [dataclasses.replace(r, advantages=adv) for r, adv in zip(rollouts, returns * weights)]
    loss, _ = ra3.policy_gradient_loss(model, batch, v, args, decisions=1.0)
    loss.backward()
    for parameter, gradient in zip(model.parameters(), exact):
        torch.testing.assert_close(-parameter.grad, gradient.float(), atol=2e-5, rtol=2e-3)
    assert max(g.abs().max() for g in exact) > 1e-2
    temperatures, token_logprobs = [], ra3.token_logprobs
    monkeypatch.setattr(ra3, "token_logprobs", lambda *a, **o: temperatures.append(o["temperature"]) or token_logprobs(*a, **o))
    ra3.policy_gradient_loss(model, batch, v, dataclasses.replace(args, temperature=0.5), decisions=1.0)
    assert temperatures == [0.5]


def test_entropy_bonus_is_that_of_the_latents(small):
    """Its mean over all rollouts is the entropy of z_1, z_2, in which all tokens that mean act are one outcome."""
    model, v, snippet, args = small()
    args = dataclasses.replace(args, entropy_coef=1.0)
    exact, found = 0.0, 0.0
    with torch.no_grad():
        for _, r in enumerate_rollouts(snippet, args):
            logq = exact_logq(model, r).sum().item()
            r.advantages = np.zeros(2)
            loss, entropy = ra3.policy_gradient_loss(model, [r], v, args, decisions=2.0)
            assert abs(loss.item() + entropy.item() / 2) < 1e-4
            exact -= math.exp(logq) * logq
            found += math.exp(logq) * entropy.item()
    assert abs(found - exact) < 1e-4


def test_ntp_loss_on_all_tokens_and_on_the_experts_only(small):
    model, v, snippet, args = small()
    r = dict(enumerate_rollouts(snippet, args))[(5, 4), None]
    logits = model(torch.from_numpy(r.ids)[None, :-1]).logits[0]
    nll = torch.nn.functional.cross_entropy(logits, torch.from_numpy(r.ids)[1:], reduction="none")
    loss, expert = ra3.ntp_loss(model, [r], False, tokens=len(nll))
    assert math.isclose(loss.item(), nll.mean().item(), rel_tol=1e-5)
    masked, expert_masked = ra3.ntp_loss(model, [r], True, tokens=float(r.expert.sum()))
    kept = nll[torch.from_numpy(r.expert[1:])]
    assert math.isclose(masked.item(), kept.mean().item(), rel_tol=1e-5)
    assert math.isclose(expert.item(), kept.sum().item(), rel_tol=1e-5) and expert.item() == expert_masked.item()


@pytest.mark.parametrize("loss", ["E", "M"])
def test_micro_batches_do_not_change_the_gradient(loss, small, monkeypatch):
    gradients = []
    for tokens in (1, 10**6):
        model, v, snippet, args = small()
        args = dataclasses.replace(args, micro_batch_tokens=tokens, max_grad_norm=1e9)
        rollouts = [r for _, r in itertools.islice(enumerate_rollouts(snippet, args), 0, 80, 10)]
        for r in rollouts:
            r.advantages = np.array([0.5, -1.0])

        def loss_of(part, model=model, v=v, args=args):
            if loss == "E":
                return ra3.policy_gradient_loss(model, part, v, args, 16.0)
            return ra3.ntp_loss(model, part, False, 99.0)

        watch = Watch(model)
        more = [[]] * (tokens == 1)  # at the end an empty one, as on a rank with less work
        monkeypatch.setattr(ra3, "micro_batches", lambda *args, more=more: [*common.micro_batches(*args), *more])
        ra3.update(model, watch, rollouts, loss_of, args, RANKS, never())
        gradients += watch.gradients
        assert all(p.grad is None for p in model.parameters())  # or they would add up, and stay in memory
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_a_nan_changes_nothing(small):
    model, _, snippet, args = small()
    before = [p.clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    rotten = lambda part: (next(model.parameters()).sum() * math.nan, torch.zeros(()))  # noqa: E731
    *_, norm = ra3.update(model, optimizer, [ra3.all_act(snippet)], rotten, args, RANKS, never())
    assert math.isnan(norm) and all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_pass_at_1_takes_the_completion_up_to_text_in_column_0(small, tmp_path, monkeypatch):
    v = vocabulary("qwen")
    save_model(tmp_path, v.tokenizer)
    model = load_model(str(tmp_path), v.tokenizer, RANKS, longest=0, train=False)
    more = GenerationConfig(eos_token_id=[v.tokenizer.eos_token_id, v.tokenizer("$").input_ids[0]])
    more.save_pretrained(tmp_path)  # as that of a chat model
    completions = ["    return a + 1\n\n\nraise SystemExit\n", "    return a\n", "    return a + 1<|end|>(", "    a = a\n" * 40 + "    return a + 1$("]
    rows = [{"prompt": f"def f{i}(a):\n", "test": f"def check(g):\n    assert g(1) == 2 and f{i}(2) == 3", "entry_point": f"f{i}"} for i in range(4)]
    ids = [v.tokenizer(text).input_ids for text in completions]
    asked = []

    def generate(input_ids, attention_mask, **options):
        asked.append([v.decode([row[m.bool()].tolist()[1:]])[0] for row, m in zip(input_ids, attention_mask)])
        first = sum(map(len, asked[:-1]))
        answers = common.pad_right([row[: options["max_new_tokens"]] for row in ids[first : first + len(input_ids)]])
        return torch.cat([input_ids, answers], 1)

    monkeypatch.setattr(model, "generate", generate)
    args = dataclasses.replace(ARGS, rollout_rows=2, model=str(tmp_path))
    assert ra3.pass_at_1(model, rows, v, args, RANKS) == 0.75
    assert asked == [[row["prompt"] for row in rows[:2]], [row["prompt"] for row in rows[2:]]]


# ---------------------------------------------------------------- the program


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Arguments of a run of eight updates on a random model that thinks, and on texts of several snippets."""
    folder, rng = tmp_path_factory.mktemp("world"), random.Random(0)
    texts = []
    for i in range(60):
        lines = [f"{rng.choice('abc')} = {rng.choice('abc')} {rng.choice('+-*')} {k}\n" for k in range(rng.randrange(1, 20))]
        texts.append(f"def f{i}(a, b, c):\n" + "".join(f"    {line}" for line in lines) + "    return a\n")
    v, data = vocabulary("qwen"), data_file(folder / "programs.jsonl", texts)
    save_model(folder / "model", v.tokenizer, v=v, snippets=[s for t in texts[:20] for s in pieces_of(t, v)], initializer_range=0.1)
    return dataclasses.replace(
        ra3.TINY_DEFAULTS, model=str(folder / "model"), dataset=(data,), eval_problems="", eval_snippets=3,
        em_iterations=2, rl_updates=2, ntp_updates=2, rl_batch_size=4, ntp_batch_size=4, save_every=1, max_snippet_tokens=48,
        rl_learning_rate=1e-3, ntp_learning_rate=1e-3, micro_batch_tokens=300, penalty_warmup=1, rollout_rows=8,
    )  # fmt: skip


def run(args, folder, **changes):
    ra3.main(dataclasses.replace(args, output_dir=str(folder), **changes))
    return folder


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Curves take longer than all the rest of such a run; the fixture `whole` is earlier, and has them."""
    monkeypatch.setattr(common.Run, "curves", lambda *args: None)


@pytest.fixture(scope="module")
def whole(quick, tmp_path_factory):
    """The whole run, with the checkpoints of all its updates."""
    folder = tmp_path_factory.mktemp("run") / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "discard", lambda folder: None)
        run(quick, folder)
    return folder


EXPORTS = ("em_001_q", "em_001", "em_002_q", "em_002")


def weights(folder, name="em_002"):
    return AutoModelForCausalLM.from_pretrained(folder / "checkpoints" / name).state_dict()


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def rows_of(folder, timeless=True):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not (timeless and k.startswith(("time/", "perf/", "data/")))} for row in rows]


def flags(args, folder):
    differ = {k: v for k, v in vars(args).items() if v != getattr(ra3.TINY_DEFAULTS, k)} | {"output_dir": folder, "tiny": True}
    named = [[f"--{k.replace('_', '-')}"] * (v != ()) + ([] if v is True else list(map(str, v)) if isinstance(v, tuple) else [str(v)]) for k, v in differ.items()]
    return [word for words in named for word in words]


def program(*words, ranks=1):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] * (ranks > 1)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run([sys.executable, *torchrun, "ra3.py", *words], cwd=ROOT, capture_output=True, text=True, env=environment)


def test_run_folder(whole, quick):
    rows = rows_of(whole, timeless=False)
    assert [row["update"] for row in rows] == list(range(9))
    assert [row["phase"] for row in rows] == list("EEEMMEEMM") and [row.get("iteration") for row in rows] == [None, *[1] * 4, *[2] * 4]
    names = "reward/mean reward/gain rollout/think_rate rollout/format_rate rollout/latent_tokens time/rollout_s time/score_s"
    names += " time/update_s perf/tokens_per_s eval/ce_code eval/ce_code_act data/decisions data/unusable"
    for name in names.split():
        assert any(name in row for row in rows), name
    assert [row["reward/penalty"] for row in rows if row["phase"] == "E" and row["update"]] == [0, 0.05, 0.05, 0.05]
    assert all(0.05 < row["rollout/think_rate"] < 0.95 for row in rows if row["update"])
    for name in ("args.json", "env.txt", "ra3.py", "common.py", "curves.png", "samples.html", "tensorboard"):
        assert (whole / name).exists(), name
    states = [weights(whole, name) for name in EXPORTS]
    assert not any(equal(a, b) for a, b in itertools.combinations(states, 2))


def test_a_run_killed_after_every_checkpoint_ends_bit_for_bit_the_same(whole, quick, tmp_path, monkeypatch):
    """In both steps of both EM iterations and at every border; what was written after the checkpoint is cut off."""
    save = common.Run.save

    def killed(self, state, *rest):
        save(self, state, *rest)
        self.log({"update": state["update"] + 1})
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "save", killed)
        for _ in range(8):
            with pytest.raises(InterruptedError):
                run(quick, tmp_path / "c", resume="auto")
    run(quick, tmp_path / "c", resume="auto")
    assert all(equal(weights(whole, name), weights(tmp_path / "c", name)) for name in EXPORTS)
    assert rows_of(whole) == rows_of(tmp_path / "c")


def test_a_failure_inside_an_evaluation_loses_no_model(quick, tmp_path, monkeypatch):
    evaluate = ra3.evaluate

    def failing(model, snippets, problems, title, *rest):
        if title == "after M1":
            raise MemoryError
        return evaluate(model, snippets, problems, title, *rest)

    monkeypatch.setattr(ra3, "evaluate", failing)
    with pytest.raises(MemoryError):
        run(quick, tmp_path / "l", em_iterations=1)
    assert (tmp_path / "l" / "checkpoints" / "em_001").exists()


def test_a_signal_inside_an_update_saves_the_last_finished_one(whole, quick, tmp_path, monkeypatch):
    """Between two rollouts, after them, after the scores, between micro-batches; every start ends with one until the run is done."""
    check, places = common.Interrupt.check, set()
    roll, rolled = ra3.rollout_drafted, []
    monkeypatch.setattr(ra3, "rollout_drafted", lambda *given: rolled.append(number) or roll(*given))
    for number in range(30):
        calls = itertools.count()

        def interrupted(self, calls=calls, number=number):
            if next(calls) == min(number, 8):
                os.kill(os.getpid(), signal.SIGTERM)
            check(self)

        monkeypatch.setattr(common.Interrupt, "check", interrupted)
        try:
            run(quick, tmp_path / "s", resume="auto", save_every=100)
            break
        except Stop:
            folder = sorted((tmp_path / "s" / "checkpoints").glob("state_*"))[-1]
            state = json.loads((folder / "state.json").read_text())
            assert state["update"] == rows_of(tmp_path / "s")[-1]["update"] == int(folder.name[6:])
            places.add((state["phase"], state["iteration"], state["done"]))
    assert rolled.count(1) == 1  # of the two of an update
    assert ("E", 0, 0) in places and {place[:2] for place in places} >= {("M", 0), ("E", 1)}
    assert all(equal(weights(whole, name), weights(tmp_path / "s", name)) for name in EXPORTS)
    assert rows_of(whole) == rows_of(tmp_path / "s")


def test_two_ranks_give_the_same_weights(quick, whole, tmp_path):
    done = program(*flags(quick, tmp_path / "b"), ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in EXPORTS:
        one, two = weights(whole, name), weights(tmp_path / "b", name)
        for key in one:
            torch.testing.assert_close(one[key], two[key], atol=1e-4, rtol=0)
    for key in ("reward/mean", "train/loss", "optim/grad_norm"):
        close = [[row.get(key, 0) for row in rows_of(folder)] for folder in (whole, tmp_path / "b")]
        assert np.allclose(*close, atol=1e-4, rtol=1e-3), key


def test_forced_and_drafted_runs_are_the_same(quick, whole, tmp_path):
    run(quick, tmp_path / "f", rollout="forced", em_iterations=1)
    for name in ("em_001_q", "em_001"):
        assert equal(weights(whole, name), weights(tmp_path / "f", name))


def test_every_step_starts_from_pi_with_a_fresh_optimizer(quick, tmp_path, monkeypatch):
    made, original = [], ra3.new_optimizer
    monkeypatch.setattr(ra3, "new_optimizer", lambda model, *rest: made.append(rest) or original(model, *rest))
    base = AutoModelForCausalLM.from_pretrained(quick.model).state_dict()
    numbers, uniforms = [], ra3.uniforms
    monkeypatch.setattr(ra3, "uniforms", lambda shape, *key: numbers.append(key[1:]) or uniforms(shape, *key))
    trained, ntp_loss = [], ra3.ntp_loss
    monkeypatch.setattr(ra3, "ntp_loss", lambda *args: trained.append((args[1], args[3])) or ntp_loss(*args))
    run(quick, tmp_path / "a", ntp_learning_rate=0.0, rollout_rows=4, micro_batch_tokens=10**6, max_latent_tokens=1)
    for rollouts, tokens in trained:  # well-formed thoughts only; all but the separators
        assert not any(r.malformed for r in rollouts) and tokens == sum(len(r.ids) - 1 for r in rollouts)
    for step, count in (("E", 2 * 2 * 4 * 3), ("M", 2 * 2 * 4)):  # each rollout of the run has noise of its own
        assert sorted(number for key, number in numbers if key == step) == list(range(count))
    assert made == [(rate, 0.01, (0.9, 0.95)) for rate in (1e-3, 0.0, 1e-3, 0.0)]
    assert equal(weights(tmp_path / "a"), base) and not equal(weights(tmp_path / "a", "em_002_q"), base)
    before, _, of_q, _, of_pi, *_ = [row.get("eval/ce_code") for row in rows_of(tmp_path / "a")]
    assert of_q != before == of_pi  # an evaluation is of the model that the step has trained
    run(quick, tmp_path / "b", rl_learning_rate=0.0)
    assert equal(weights(tmp_path / "b", "em_002_q"), weights(tmp_path / "b", "em_001"))
    assert equal(weights(tmp_path / "b", "em_001_q"), base)


def test_ntp_keeps_one_optimizer_through_all_iterations(quick, tmp_path, monkeypatch):
    quick = dataclasses.replace(quick, algo="ntp", rl_updates=100)  # the M part is the same, whatever ntp_updates says
    with monkeypatch.context() as patch:
        patch.setattr(common, "discard", lambda folder: None)
        folder = run(quick, tmp_path / "all")
    assert [row["phase"] for row in rows_of(folder)] == list("MMMMM") and all(row["rollout/think_rate"] == 0 for row in rows_of(folder)[1:])
    one = run(quick, tmp_path / "b", em_iterations=1, ntp_updates=4)
    assert equal(weights(folder, "em_002"), weights(one, "em_001"))
    for kept in (3, 2):  # resumed inside an iteration, and at the border between two
        shutil.copytree(tmp_path / "all", tmp_path / f"{kept}")
        for later in range(kept + 1, 5):
            shutil.rmtree(tmp_path / f"{kept}" / "checkpoints" / f"state_{later:06d}")
        run(quick, tmp_path / f"{kept}", resume="auto")
        assert equal(weights(tmp_path / f"{kept}"), weights(folder))


def test_external_thoughts_need_no_e_step(quick, tmp_path):
    run(quick, tmp_path / "q", q_model=quick.model, em_iterations=1, mask_latents=True)
    assert [row["phase"] for row in rows_of(tmp_path / "q")] == list("MMM")
    assert all(row["rollout/think_rate"] > 0.05 for row in rows_of(tmp_path / "q")[1:])
    # pi has a recurrent state, so its own thoughts, which an evaluation samples, cannot be drafted
    tokenizer = load_tokenizer(quick.model)
    save_model(tmp_path / "lfm2", tokenizer, family="lfm2")
    run(quick, tmp_path / "l", model=str(tmp_path / "lfm2"), q_model=quick.model, em_iterations=1)
    assert json.loads((tmp_path / "l" / "args.json").read_text())["rollout"] == "forced"
    save_model(tmp_path / "short", tokenizer, max_position_embeddings=80)  # its context holds for both
    run(quick, tmp_path / "c", q_model=str(tmp_path / "short"), em_iterations=1)
    padded = AutoModelForCausalLM.from_pretrained(quick.model)  # each token has a twin that is none
    padded.resize_token_embeddings(2 * len(tokenizer))
    padded.lm_head.weight.data[len(tokenizer) :] = padded.lm_head.weight.data[: len(tokenizer)]
    padded.save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    run(quick, tmp_path / "p", q_model=str(tmp_path / "padded"), em_iterations=1)
    assert any(row["rollout/format_rate"] < 1 for row in rows_of(tmp_path / "p")[1:])
    # as many tokens, but others
    other = json.loads(tokenizer.backend_tokenizer.to_str())
    words = list(other["model"]["vocab"])[1:]
    other["model"]["vocab"] |= dict(zip(words, map(other["model"]["vocab"].get, words[1:] + words[:1])))
    shutil.copytree(quick.model, tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="has another vocabulary"):
        run(quick, tmp_path / "o", q_model=str(tmp_path / "other"))


def test_bootstrap_only(quick, tmp_path, monkeypatch):
    sizes, batch = [], ra3.SnippetStream.batch
    monkeypatch.setattr(ra3.SnippetStream, "batch", lambda self, size: sizes.append(size) or batch(self, size))
    run(quick, tmp_path / "d", bootstrap_only=True)
    file = tmp_path / "d" / "bootstrapped.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert "".join(row["text"] for row in rows) == "".join(row["text"] for row in read_rows(quick.dataset[0]))
    assert sum(len(row["latents"]) for row in rows) > 20
    for row in rows:
        lines = row["text"].split("\n")
        for latent in reversed(row["latents"]):
            following = lines[latent["line"]]
            assert latent["text"].startswith("#")
            lines.insert(latent["line"], following[: len(following) - len(following.lstrip())] + latent["text"])
        assert [s.strip() for s in lines] == [s.strip() for s in row["bootstrapped"].split("\n")]
    # killed in the middle of a line, and continued with batches of another size
    kept = file.read_text()
    file.write_text(kept[: len(kept) // 2])
    run(quick, tmp_path / "d", bootstrap_only=True, resume="auto", rollout_rows=7)
    assert file.read_text() == kept
    assert max(sizes) == 8  # what the file holds is not read into memory all at once
    # and with the name of its folder
    file.write_text(kept[: len(kept) // 3])
    run(quick, "", bootstrap_only=True, resume=str(tmp_path / "d"))
    assert file.read_text() == kept
    for resume, words in (("", "already holds a run; choose another"), ("auto", "--seed 0 -> 3")):
        with pytest.raises(UserError, match=words):
            run(quick, tmp_path / "d", bootstrap_only=True, resume=resume, seed=3)
    with pytest.raises(UserError, match="no text of .* can be used"):
        run(quick, tmp_path / "e", bootstrap_only=True, dataset=(data_file(tmp_path / "e.jsonl", ["x" * 20_000]),))


def test_what_cannot_work_is_refused(quick, tmp_path):
    wrong = {"at least 2": {"group_size": 1}, "takes no --q-model": {"algo": "ntp", "q_model": "x"}}
    wrong |= {"--ntp-updates must be positive": {"ntp_updates": 0}, "does not divide": {"rl_batch_size": 0}}
    wrong |= {"--dataset-weights must be positive": {"dataset_weights": (0.0, 0.0)}, "needs 2 numbers": {"dataset_weights": (1.0,)}}
    wrong |= {"leaves no room": {"max_snippet_tokens": -3}, "--dataset needs": {"dataset": ()}}
    for words, changes in wrong.items():
        with pytest.raises(UserError, match=words) as caught:
            ra3.check(dataclasses.replace(ARGS, **changes), RANKS)
        assert "\n" not in str(caught.value)
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "a = 1\n" * 1000, "test": "", "entry_point": ""}))
    refused = {"none.jsonl": "no such data file", quick.dataset[0]: "has no column `prompt`; it has: text"}
    for file, words in (refused | {str(long): "a prompt and its completion take"}).items():
        with pytest.raises(UserError, match=words):
            run(quick, tmp_path / "e", eval_problems=file)


def test_dry_run_prints_the_plan_and_makes_no_folder(quick, tmp_path, capsys):
    run(quick, tmp_path / "f", dry_run=True)
    printed = capsys.readouterr().out
    assert "2 E-step updates" in printed and "#" in printed and not (tmp_path / "f").exists()
    assert re.search(r"\d+ snippets, about \d+\.\d epochs", printed)
