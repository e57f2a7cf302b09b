"""RA3's data: an expert's Python text, cut into actions, as tokens.

    text -> legal_lines      where a comment line is legal and changes nothing
         -> action_starts    where one action ends and the next begins
         -> segment          the same in tokens: a Snippet with its boundaries
    Snippet + thoughts -> bootstrap_text

Inserting comment lines before any of the lines that `legal_lines` names leaves `ast.dump(ast.parse(text))` as
it was: tests/test_ra3.py does so for every file of the standard library. CRLF, tabs, form feeds, Python 2 and
texts that are no Python at all are allowed; where `tokenize` gives up, the rest of the text has no legal
line.
"""

import ast
import io
import keyword
import re
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from common import UserError

# ---------------------------------------------------------------- text


def legal_lines(text: str) -> list[tuple[int, str, str]]:
    """(offset, line, kind) of the lines before which a comment line is legal and changes nothing, in order.

    kind: `blank`, `comment`, `doc` (a string that is a statement of its own) or `code`. Left out are lines
    inside a multi-line string, lines after a backslash continuation, and all that follows a place `tokenize`
    cannot read.
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

    An action is a line of code with the comment, blank and docstring lines before it (`line`); the lines up
    to a blank line or a change of indentation (`block`); or everything (`snippet`).
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
    """A word for what a line of code does (the metrics split the think rate by it): assert, def, return,
    control ..."""
    words = line.replace("(", " ").replace(":", " ").split()
    first = words[0] if words else ""
    if first in ("def", "class", "async", "return", "import", "from", "assert"):
        return {"class": "def", "async": "def", "from": "import"}.get(first, first)
    if keyword.iskeyword(first):
        return "control"
    return "assign" if "=" in line.replace("==", "") else "other"


def cut_file(text: str, max_chars: int) -> Iterator[str]:
    """A text longer than max_chars in pieces of whole top-level statements; unchanged if it does not
    parse."""
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


# ---------------------------------------------------------------- tokens


class Vocabulary:
    """What each token's text means for a thought; bool [V] on the device. Decided by decoded text, never by
    ids.

    opens    H: the text begins with "#" after leading spaces and tabs; such a token at a boundary opens a
    thought ends     holds a newline and nothing after it: the thought ends with this token breaks   would
    break the source inside a comment: text after a newline, carriage return, NUL, special token
    """

    def __init__(self, tokenizer, size: int, device) -> None:
        self.tokenizer = tokenizer
        self.anchor = tokenizer(
            "a", add_special_tokens=False
        ).input_ids  # keeps SentencePiece from dropping a space
        self.anchor_length = len(tokenizer.decode(self.anchor))
        known = min(size, len(tokenizer))
        self.text = self.decode([[i] for i in range(known)])
        self.special = set(tokenizer.all_special_ids)
        opens = [text.lstrip(" \t").startswith("#") for text in self.text]
        # a byte-fallback decoder (SentencePiece) turns a newline into U+FFFD if it follows half a character
        names = tokenizer.convert_ids_to_tokens(list(range(known)))
        half = [bool(re.fullmatch("<0x[89A-F][0-9A-F]>", name or "")) for name in names]
        breaks = [
            i in self.special or half[i] or "\r" in text or "\0" in text or "\n" in text[:-1]
            for i, text in enumerate(self.text)
        ]
        ends = ["\n" in text and not broken for text, broken in zip(self.text, breaks)]
        padding = size - known  # a model's embedding may have more rows than the tokenizer has tokens
        self.opens = torch.tensor(opens + [False] * padding, device=device)
        self.breaks = torch.tensor(breaks + [True] * padding, device=device)
        self.ends = torch.tensor(ends + [False] * padding, device=device)
        newlines = [i for i, text in enumerate(self.text) if text == "\n" and i not in self.special]
        canonical = tokenizer("a\n", add_special_tokens=False).input_ids[-1]
        self.newline = canonical if canonical in newlines else next(iter(newlines), None)
        if self.newline is None or not any(opens):
            raise UserError(
                "this tokenizer has no token for a newline or for '#', so it cannot write a comment line"
            )
        self.separator = (
            tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        )

    def decode(self, rows: list[list[int]]) -> list[str]:
        """Text of each row of tokens, as it is in the middle of a text."""
        texts = self.tokenizer.batch_decode(
            [self.anchor + row for row in rows], clean_up_tokenization_spaces=False
        )
        return [text[self.anchor_length :] for text in texts]


@dataclass
class Snippet:
    """One expert demonstration. Token k of `ids` covers text[starts[k]:starts[k + 1]]; ids[0] is the
    separator."""

    text: str
    source: str
    ids: np.ndarray  # [L] separator, the text's canonical tokens, eos (if the text was not cut)
    starts: np.ndarray  # [L + 1] where each token begins in `text` (characters)
    boundaries: np.ndarray  # [T] index into ids of the first token of each action
    indents: list[list[int]]  # [T] the indentation before it, forced once more after a thought
    kinds: list[str]  # [T] kind of each action's code line, for the metrics

    def width(self, max_latent_tokens: int) -> int:
        """Most tokens that a rollout of this snippet can have."""
        return len(self.ids) + sum(max_latent_tokens + len(indent) for indent in self.indents)


def token_starts(text: str, ids: Sequence[int], vocabulary: Vocabulary) -> list[int] | None:
    """[len(ids) + 1] character offset where each token begins; None if the tokens do not spell the text.

    Of several tokens that share a character the first is said to hold it. The tokenizer's own offsets are not
    used: some kinds leave the white space out of them.
    """
    starts, pieces, offset, pending = [0], [], 0, []
    for token in ids:
        piece = vocabulary.text[token]
        if pending or "\ufffd" in piece:  # a part of a character: decode the parts together
            pending.append(token)
            piece = vocabulary.decode([pending])[0]
            if piece.endswith("\ufffd") and len(pending) < 8:
                starts.append(offset + 1)
                continue
            pending = []
        pieces.append(piece)
        offset += len(piece)
        starts.append(offset)
    return starts if "".join(pieces) == text else None


def segment(
    text: str,
    vocabulary: Vocabulary,
    max_tokens: int,
    context: int,
    max_latent_tokens: int,
    granularity: str = "line",
    source: str = "",
) -> Snippet | None:
    """Cut one text into actions; a text that is too long ends with the last action that fits.

    A boundary is the token that holds the first non-space character of an action; a line whose first token
    also holds the end of the line before has none. Fits: at most max_tokens tokens, and at most `context`
    with the longest possible thought at every boundary. None if the tokenizer does not give the text back
    unchanged, or it is empty.
    """
    tokenizer = vocabulary.tokenizer
    ids = tokenizer(text, add_special_tokens=False).input_ids
    starts = token_starts(text, ids, vocabulary)
    if not ids or starts is None or vocabulary.special.intersection(ids):
        return None
    starts = np.array(starts)
    boundaries, indents, kinds, worst = [], [], [], [0]
    for offset, kind in action_starts(text, granularity):
        first = re.compile(r"[ \t\f]*").match(text, offset).end()  # the first character that is no space
        index = int(np.searchsorted(starts, first, side="right")) - 1  # the token that holds `first`
        line_start = int(np.searchsorted(starts, offset))
        if starts[index] < offset:
            continue
        if starts[line_start] == offset:  # the indentation is tokens of its own
            indent = ids[line_start:index]
        else:  # its beginning is in a token with the newline before
            indent = tokenizer(text[offset : starts[index]], add_special_tokens=False).input_ids
        boundaries.append(index)
        indents.append(indent)
        kinds.append(kind)
        worst.append(worst[-1] + max_latent_tokens + len(indent))

    def fits(end: int, actions: int) -> bool:  # 1: the separator
        return 1 + end <= max_tokens and 1 + end + worst[actions] <= context

    tail = [tokenizer.eos_token_id]
    if not fits(len(ids) + 1, len(boundaries)):
        actions = max((k for k in range(1, len(boundaries)) if fits(boundaries[k], k)), default=0)
        end = boundaries[actions] if actions else min(len(ids), max_tokens - 1, context - 1)
        boundaries, indents, kinds, tail = boundaries[:actions], indents[:actions], kinds[:actions], []
        ids, text, starts = ids[:end], text[: starts[end]], starts[: end + 1]
    return Snippet(
        text=text,
        source=source,
        ids=np.array([vocabulary.separator, *ids, *tail]),
        starts=np.array([0, *starts, *[len(text)] * len(tail)]),
        boundaries=np.array(boundaries, dtype=np.int64) + 1,  # 1: the separator
        indents=indents,
        kinds=kinds,
    )


def bootstrap_text(snippet: Snippet, latents: dict[int, str]) -> str:
    """The text with thoughts: latents maps an action to its comment line (without indentation, with
    newline)."""
    pieces, done = [], 0
    for action, latent in sorted(latents.items()):
        start = snippet.starts[snippet.boundaries[action]]
        line_start = snippet.text.rfind("\n", 0, start) + 1
        pieces += [snippet.text[done:start], latent, snippet.text[line_start:start]]
        done = start
    return "".join([*pieces, snippet.text[done:]])
