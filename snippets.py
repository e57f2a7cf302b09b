"""RA3's data: an expert's Python text, cut into actions, as tokens.

    sources -> SnippetStream    the texts of one part of the data, in a seeded order
    text    -> legal_lines      where a comment line is legal and changes nothing
            -> action_starts    where one action ends and the next begins
            -> segment          the same in tokens: a Snippet with its boundaries
    Snippet + thoughts -> bootstrap_text

Inserting comment lines before any of the lines that `legal_lines` names leaves `ast.dump(ast.parse(text))` as
it was: tests/test_ra3.py does so for every file of the standard library. CRLF, tabs, form feeds, Python 2 and
texts that are no Python at all are allowed; where `tokenize` gives up, the rest of the text has no legal
line.
"""

import ast
import contextlib
import io
import itertools
import keyword
import random
import re
import tokenize
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import torch

from common import UserError, column, read_rows

# ---------------------------------------------------------------- text


def legal_lines(text: str) -> list[tuple[int, str, str]]:
    """(offset, line, kind) of the lines before which a comment line is legal and changes nothing, in order.

    kind: `blank`, `comment`, `doc` (a string that is a statement of its own) or `code`. A comment is legal
    after every end of line that `tokenize` says is one: not one inside a multi-line string, not one after a
    backslash, none behind a place that `tokenize` cannot read.
    """
    lines = io.StringIO(text, newline="").readlines()
    if any(line.endswith("\r") for line in lines):
        return []  # a lone carriage return ends a line for the parser, but not for tokenize
    kinds = ["code" if line.strip(" \t\f\r\n") else "blank" for line in lines]
    legal, fstrings = {0}, 0  # Python 3.12 gives f-strings in parts, with ends of line among them
    statement: list[tokenize.TokenInfo] = []
    with contextlib.suppress(tokenize.TokenError, SyntaxError):
        for token in tokenize.generate_tokens(iter(lines).__next__):
            name, line = tokenize.tok_name[token.type], token.start[0] - 1
            fstrings += name.endswith("STRING_START") - name.endswith("STRING_END")
            if name in ("NEWLINE", "NL") and not fstrings:
                legal.add(line + 1)
            if name == "COMMENT" and not lines[line][: token.start[1]].strip(" \t\f"):
                kinds[line] = "comment"
            if name == "NEWLINE":
                if statement and all(part.type == tokenize.STRING for part in statement):
                    kinds[statement[0].start[0] - 1] = "doc"
                statement = []
            elif name not in ("NL", "COMMENT", "INDENT", "DEDENT"):
                statement.append(token)
    offsets = [0, *accumulate(map(len, lines))]
    return [(offsets[i], lines[i], kinds[i]) for i in sorted(legal) if i < len(lines)]


def action_starts(text: str, granularity: str) -> list[tuple[int, str]]:
    """(offset, kind of its code line) of each action's first non-blank line.

    An action is a line of code with the comment, blank and docstring lines before it (`line`); the lines up
    to a blank line or a change of indentation (`block`); or everything (`snippet`). A text's first action is
    a kind of its own, `first`: any thought there tells what sort of text follows.
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
        new_block = granularity == "block" and (gap or indent != indent_before)
        if granularity == "line" or not starts or new_block:
            starts.append((pending, line_kind(line) if starts else "first"))
        pending, gap, indent_before = None, False, indent
    return starts


LINE_KINDS = {"def": "def", "class": "def", "async": "def", "import": "import", "from": "import"}
LINE_KINDS |= {"return": "return", "assert": "assert"}
KINDS = ("assert", "assign", "control", "def", "first", "import", "other", "return")


def line_kind(line: str) -> str:
    """A word for what a line of code does, by which the metrics split the think rate: assert, def, ..."""
    first = re.match(r"\s*(\w*)", line)[1]
    if keyword.iskeyword(first):
        return LINE_KINDS.get(first, "control")
    return "assign" if "=" in line.replace("==", "") else "other"


def cut_file(text: str, max_chars: int) -> Iterator[str]:
    """A text longer than max_chars in pieces of whole top-level statements; whole if it does not parse."""
    try:
        body = ast.parse(text).body if len(text) > max_chars else []
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        body = []
    lines = io.StringIO(text, newline="").readlines()
    # a cut is behind a statement, so the next one has the comments before it; never inside a line
    cuts = [one.end_lineno for one, following in pairwise(body) if one.end_lineno < following.lineno]
    piece = ""
    for start, end in pairwise([0, *cuts, len(lines)]):
        part = "".join(lines[start:end])
        if piece and len(piece) + len(part) > max_chars:
            yield piece
            piece = ""
        piece += part
    yield piece


# ---------------------------------------------------------------- tokens


class Vocabulary:
    """What each token's text means for a thought; bool [V] on the device. Decided by its text, never by ids.

    opens    H: "#" after leading spaces and tabs; at a boundary such a token opens a thought
    ends     holds a newline and nothing after it: the thought ends with this token
    breaks   would break the source inside a comment: text after a newline, carriage return, NUL, special
    """

    def __init__(self, tokenizer, size: int, device) -> None:
        self.tokenizer = tokenizer
        self.anchor = tokenizer("a", add_special_tokens=False).input_ids  # SentencePiece drops a first space
        self.anchor_length = len(tokenizer.decode(self.anchor))
        known = min(size, len(tokenizer))
        self.text = self.decode([[i] for i in range(known)])
        self.special = set(tokenizer.all_special_ids)
        names = tokenizer.convert_ids_to_tokens(list(range(known)))
        flags = []  # [V, 3]
        for i, (text, name) in enumerate(zip(self.text, names)):
            # behind half a character, a byte-fallback decoder (SentencePiece) turns a newline into U+FFFD
            half = bool(re.fullmatch("<0x[89A-F][0-9A-F]>", name or ""))
            breaks = i in self.special or half or "\r" in text or "\0" in text or "\n" in text[:-1]
            flags.append((text.lstrip(" \t").startswith("#"), "\n" in text and not breaks, breaks))
        flags += [(False, False, True)] * (size - known)  # rows of the embedding that are no token
        self.opens, self.ends, self.breaks = torch.tensor(flags, device=device).T.contiguous()
        self.ending = {i for i, flag in enumerate(flags) if flag[1]}  # `ends` on the host
        canonical = tokenizer("a\n", add_special_tokens=False).input_ids[-1]
        newlines = [i for i in (canonical, *range(known)) if self.text[i] == "\n" and i not in self.special]
        if not newlines or not self.opens.any():
            raise UserError("this tokenizer has no token for a newline or for '#': it cannot write a comment")
        self.newline = newlines[0]  # the one that the tokenizer itself would write, if that is a token alone
        has_bos = tokenizer.bos_token_id is not None
        self.separator = tokenizer.bos_token_id if has_bos else tokenizer.eos_token_id

    def decode(self, rows: list[list[int]]) -> list[str]:
        """Text of each row of tokens, as it is in the middle of a text."""
        rows = [self.anchor + row for row in rows]
        texts = self.tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)
        return [text[self.anchor_length :] for text in texts]


@dataclass
class Snippet:
    """One expert demonstration. Token k of `ids` is text[starts[k]:starts[k + 1]]; ids[0] the separator."""

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
    """Cut one text into actions; a text that is too long ends with the last action that fits, or, if not even
    the first one does, inside of that.

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
        if starts[index] < offset:
            continue
        line_start = int(np.searchsorted(starts, offset))
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
        room = context - 1 - worst[min(1, len(boundaries))]
        if not actions and room > 0:  # not even one action fits: its beginning
            end = min(end, room)
            actions = sum(boundary < end for boundary in boundaries[:1])
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
    """The text with thoughts; latents: action -> its comment line, without indentation, with newline."""
    pieces, done = [], 0
    for action, latent in sorted(latents.items()):
        start = snippet.starts[snippet.boundaries[action]]
        line_start = snippet.text.rfind("\n", 0, start) + 1
        pieces += [snippet.text[done:start], latent, snippet.text[line_start:start]]
        done = start
    return "".join([*pieces, snippet.text[done:]])


# ---------------------------------------------------------------- the stream


class SnippetStream:
    """Endless, seeded stream of the snippets of one part of the data; `cursor` counts the texts taken.

    args: ra3.Args. part: `eval` (one pass), `E` or `M` (endless), or `all` (everything once, in order). The
    part of a text follows from a hash of it: parts are disjoint, duplicates stay together, and NTP sees what
    RA3's M-step sees. Every rank reads the whole stream and takes its share of each batch.
    """

    def __init__(self, args, part: str, vocabulary: Vocabulary, context: int, cursor: int = 0) -> None:
        self.args, self.part, self.vocabulary, self.context = args, part, vocabulary, context
        self.cursor, self.unusable = cursor, 0
        self.texts = itertools.islice(self._texts(), cursor, None)

    def __iter__(self) -> Iterator[Snippet]:
        args = self.args
        for text, source in self.texts:
            self.cursor += 1
            limits = args.max_snippet_tokens, self.context, args.max_latent_tokens
            snippet = segment(text, self.vocabulary, *limits, args.granularity, source)
            if snippet is not None and (self.part != "E" or len(snippet.boundaries)):
                yield snippet
                continue
            self.unusable += 1  # nothing to decide in it, or the tokenizer does not give it back unchanged
            if self.unusable == self.cursor == 1000:
                raise UserError(f"none of the first 1000 texts of {', '.join(args.dataset)} can be used")

    def batch(self, size: int) -> list[Snippet]:
        return list(itertools.islice(iter(self), size))

    def _texts(self) -> Iterator[tuple[str, str]]:
        args = self.args
        e_share = args.rl_updates * args.rl_batch_size
        e_share = e_share / max(1, e_share + args.ntp_updates * args.ntp_batch_size)
        first_m = 50 + round(950 * min(0.5, max(0.1, e_share)))  # of 1000: 50 held out, then E, then M
        parts = {"eval": range(50), "E": range(50, first_m), "M": range(first_m, 1000), "all": range(1000)}
        part = parts[self.part]
        for epoch in itertools.count():
            items = (item for item in interleaved(args) if zlib.crc32(item[0].encode()) % 1000 in part)
            if self.part != "all":
                items = shuffled(items, random.Random(f"{args.seed} {self.part} {epoch}"))
            empty = True
            for item in items:
                empty = False
                yield item
            if self.part in ("eval", "all"):
                return
            if empty:
                sources = ", ".join(args.dataset)
                raise UserError(f"{sources}: no text for the {self.part}-step; give more data")


def interleaved(args) -> Iterator[tuple[str, str]]:
    """(text, source) pairs of all sources, drawn by their weights, until the first source is exhausted."""
    weights = args.dataset_weights
    if len(weights) != len(args.dataset):
        weights = (1.0,) * len(args.dataset)
    pieces = {source: source_pieces(source, args) for source in args.dataset}
    owed = dict.fromkeys(pieces, 0.0)
    for _ in range(args.max_snippets) if args.max_snippets else itertools.count():
        for source, weight in zip(args.dataset, weights):
            owed[source] += weight
        source = max(owed, key=owed.__getitem__)
        owed[source] -= sum(weights)
        text = next(pieces[source], None)
        if text is None:
            return
        yield text, Path(source.split(":")[-1].split("/*")[0]).name.split(".")[0]


def source_pieces(source: str, args) -> Iterator[str]:
    """The Python texts of one source; the OpenCoder corpus names the language in `lang` or `program_lang`."""
    for row in read_rows(source):
        text = column(row, args.text_column, source)
        language = row.get("lang") or row.get("program_lang") or "python"
        if isinstance(text, str) and text.strip() and language.lower() == "python":
            text = text.encode("utf-8", "replace").decode()  # lone surrogates
            yield from cut_file(text, 4 * args.max_snippet_tokens)


def shuffled(items: Iterator, generator: random.Random, size: int = 10_000) -> Iterator:
    """Shuffle a stream through a buffer of `size` items; a shorter stream is shuffled as a whole."""
    buffer = []
    for item in items:
        buffer.append(item)
        if len(buffer) == size:
            index = generator.randrange(size)
            buffer[index], buffer[-1] = buffer[-1], buffer[index]
            yield buffer.pop()
    generator.shuffle(buffer)
    yield from buffer
