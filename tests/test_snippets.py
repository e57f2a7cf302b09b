"""Where a comment is legal, and where actions begin."""

import ast

import pytest

from common import TINY
from modeling import load_tokenizer
from snippets import Vocabulary, action_starts, cut_file, legal_lines, line_kind, segment

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
    found = [starts.index(offset) for offset, _, _ in legal_lines(text)]
    assert [n for n in found if n < text.count("\n") + (not text.endswith("\n"))] == CASES[text]


def test_a_line_of_code_takes_the_comments_blanks_and_docstrings_before_it():
    text = '# top\n\ndef f():\n    """doc\n    more"""\n    # why\n    return (1,\n            2)\n'
    starts = action_starts(text, "line")
    assert [text[o:].split("\n")[0].strip() for o, _ in starts] == ["# top", '"""doc', "2)"]
    assert [kind for _, kind in starts] == ["first", "return", "other"]


def test_blocks_and_snippets():
    text = "a = 1\nb = 2\n\nif a:\n    c = 3\n    d = 4\ne = 5\n"
    assert [text[o] for o, _ in action_starts(text, "block")] == ["a", "i", " ", "e"]
    assert [o for o, _ in action_starts(text, "snippet")] == [0]


def test_a_snippet_that_is_too_long_keeps_its_one_latent():
    vocabulary = Vocabulary(load_tokenizer(f"{TINY}/model"), 2048, "cpu")
    text = "".join(f"name_{i} = {i}\n" for i in range(200))
    for granularity, context in (("snippet", 1000), ("snippet", 60), ("line", 1000)):
        snippet = segment(text, vocabulary, 64, context, 16, granularity)
        actions = 1 if granularity == "snippet" else len(snippet.boundaries)
        assert actions == len(snippet.boundaries) == len(snippet.kinds) == len(snippet.indents) > 0
        assert len(snippet.ids) <= 64 and snippet.width(16) <= context
        assert len(snippet.ids) > (40 if context == 60 else 55)
    for limit in (64, 8):  # a first action that is too long, and one for whose latent there is no room
        snippet = segment(f"x = {list(range(99))}\n", vocabulary, limit, 20, 16)
        assert (len(snippet.boundaries), len(snippet.ids)) == (1, 4)
        assert len(segment("x = 1\n" * 9, vocabulary, limit, 17, 16).boundaries) == 0


def test_cut_file_gives_whole_statements_back():
    text = "# head\nimport os\n\n\n@deco\ndef f():\n    return 1\n\n\nclass A:\n    x = 1\n\n# tail\nx = 1; y = 2\n"
    pieces = list(cut_file(text, 40))
    assert "".join(pieces) == text and len(pieces) > 2
    for piece in pieces:
        ast.parse(piece)
    assert list(cut_file("not python (", 5)) == ["not python ("]
    assert list(cut_file(text, 1000)) == [text]


def test_kinds_of_lines():
    lines = {"import a": "import", "from a import b": "import", "async def f():": "def", "return(1)": "return"}
    lines |= {"assert a == b": "assert", "    class A: x = 1": "def", "except* E as e:": "control", "else:": "control"}
    lines |= {"a[0] = b": "assign", "x: int = 1": "assign", "a == b": "other", "f(x)": "other", "@deco": "other"}
    assert {line: line_kind(line) for line in lines} == lines
