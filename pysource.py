"""Python source as RA3 needs it: where a comment line is legal, and where one action ends and the next begins.

Pure functions of a text; nothing here knows of tokens or models. Inserting comment lines before any of the lines that
`legal_lines` names leaves `ast.dump(ast.parse(text))` as it was: tests/test_pysource.py does so for every file of the
standard library. CRLF, tabs, form feeds, Python 2 and texts that are no Python at all are allowed; where `tokenize`
gives up, the rest of the text has no legal line.
"""

import ast
import io
import keyword
import tokenize
from collections.abc import Iterator
from itertools import accumulate


def legal_lines(text: str) -> list[tuple[int, str, str]]:
    """(offset, line, kind) of the lines before which a comment line is legal and changes nothing, in order.

    kind: `blank`, `comment`, `doc` (a string that is a statement of its own) or `code`. Left out are lines inside a
    multi-line string, lines after a backslash continuation, and all that follows a place `tokenize` cannot read.
    """
    lines = io.StringIO(text, newline="").readlines()
    if any(line.endswith("\r") for line in lines):
        return []  # a lone carriage return ends a line for the parser, but not for tokenize
    kinds = ["code" if line.strip(" \t\f\r\n") else "blank" for line in lines]
    illegal, commented, read = set(), set(), 0  # line numbers from 1
    strings: list[
        int
    ] = []  # first lines of the f-strings that are open (Python 3.12 and later give them in parts)
    statement: list[tokenize.TokenInfo] = []
    try:
        for token in tokenize.generate_tokens(iter(lines).__next__):
            name, first, last = tokenize.tok_name[token.type], token.start[0], token.end[0]
            if name.endswith("STRING_START"):
                strings.append(first)
            elif name.endswith("STRING_END"):
                first = strings.pop()
            if name not in ("NEWLINE", "NL"):
                illegal.update(range(first + 1, last + 1))  # the later lines of a token that spans several
            if name == "COMMENT":
                commented.add(first)
                if not token.line[: token.start[1]].strip(" \t\f"):
                    kinds[first - 1] = "comment"
            elif name == "NEWLINE":
                if statement and all(t.type == tokenize.STRING for t in statement):
                    kinds[statement[0].start[0] - 1] = "doc"
                statement = []
            elif name not in ("NL", "INDENT", "DEDENT"):
                statement.append(token)
            read = max(read, last)
    except (tokenize.TokenError, SyntaxError):
        pass
    if strings:
        read = min(read, strings[0])
    for number, line in enumerate(lines, start=1):
        if line.rstrip("\r\n").endswith("\\") and number not in commented:
            illegal.add(number + 1)
    offsets = [0, *accumulate(map(len, lines))]
    legal = [i for i in range(min(len(lines), read)) if i + 1 not in illegal]
    return [(offsets[i], lines[i], kinds[i]) for i in legal]


def action_starts(text: str, granularity: str) -> list[tuple[int, str]]:
    """(offset, kind of its code line) of each action's first non-blank line.

    An action is a line of code with the comment, blank and docstring lines before it (`line`); the lines up to a blank
    line or a change of indentation (`block`); or everything (`snippet`).
    """
    starts: list[tuple[int, str]] = []
    pending, gap, indent_before = None, True, None
    for offset, line, kind in legal_lines(text):
        if kind == "blank":
            gap = True
            continue
        pending = offset if pending is None else pending
        if kind != "code":
            continue
        indent = len(line) - len(line.lstrip(" \t\f"))
        if (
            granularity == "line"
            or not starts
            or (granularity == "block" and (gap or indent != indent_before))
        ):
            starts.append((pending, line_kind(line)))
        pending, gap, indent_before = None, False, indent
    return starts


def line_kind(line: str) -> str:
    """A word for what a line of code does (the metrics split the think rate by it): assert, def, return, control ..."""
    words = line.replace("(", " ").replace(":", " ").split()
    first = words[0] if words else ""
    if first in ("def", "class", "async", "return", "import", "from", "assert"):
        return {"class": "def", "async": "def", "from": "import"}.get(first, first)
    if keyword.iskeyword(first):
        return "control"
    return "assign" if "=" in line.replace("==", "") else "other"


def cut_file(text: str, max_chars: int) -> Iterator[str]:
    """A text longer than max_chars in pieces of whole top-level statements; unchanged if it does not parse."""
    if len(text) <= max_chars:
        yield text
        return
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        yield text
        return
    lines = io.StringIO(text, newline="").readlines()
    # a statement's lines begin at its first decorator, and take the comments before it along
    firsts = [min([n.lineno, *(d.lineno for d in getattr(n, "decorator_list", []))]) - 1 for n in body]
    lasts = [0] + [n.end_lineno for n in body]
    piece = ""
    for first, last, end in zip(firsts, lasts, lasts[1:] + [len(lines)]):
        if first < last:  # two statements on one line
            piece += "".join(lines[last:end])
            continue
        part = "".join(lines[last:end])
        if piece and len(piece) + len(part) > max_chars:
            yield piece
            piece = ""
        piece += part
    piece += "".join(lines[lasts[-1] :])
    if piece.strip():
        yield piece
