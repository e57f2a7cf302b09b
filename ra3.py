"""RA3, Reasoning as Action Abstractions: EM mid-training in which RL learns where a thought helps.

Paper: "Learning to Reason as Action Abstractions with Scalable Mid-Training RL", arXiv 2509.25810v2. Equation
numbers are version 2's; "the other manuscript" is an earlier-looking text of the same paper.

A Python text is cut into actions a_1 .. a_T, one line of code each. Before every action the model chooses a
latent z_t: *act* (write nothing) or *think* (write one comment line). The algorithm:

  for every EM iteration i, starting from the model pi_i:
    E-step, rl_updates times; q starts as a copy of pi_i, and pi_i itself is frozen:
      1 sample     G rollouts of each snippet: q draws the latents, the lines of code are given
      2 score      r_t = l_t - c [z_t is a thought]; l_t = mean log-likelihood of a_t under pi_i  (4.1)
      3 advantage  sum of the next 5 rewards, minus its mean over the G rollouts
      4 update     policy gradient on log q(z_t), plus a small entropy bonus
    M-step, ntp_updates times; q is frozen, and pi starts again from pi_i:
      1 sample     one rollout of each snippet: the *bootstrapped* text, code with q's thoughts
      4 update     next-token prediction on it; the result is pi_{i+1}  (4.2)
    5 log, evaluate, save

Notation: pi `pi`, q `q`, z_t latent, a_t action, l_t `line`, c `penalty`, G `group_size`.
Shapes: S snippets, G rollouts of each, R = S*G rows, W tokens of a row, T actions, V vocabulary, N decisions.

Where this differs from the paper, or the paper leaves a choice open (docs/ra3.md has the full list):
  D1 The model decides with the first token of the line itself: a token that begins with "#" opens a thought,
     any other means act. So the code keeps its tokenisation, and the model sees the line's indentation when
     it decides. In the paper it writes "\\n" or "\\n#" after a line without its newline.
  D2 l_t is a mean over the line's tokens. The paper prints a sum; its c = 0.05 fits the mean.
  D3 A malformed thought costs 2 instead of c. In the paper its reward is 0, in the authors' code -2; both are
     more than the reward of a hard line (l_t < -2), and so would reward breaking the format there.
  D4 The first 10 updates, without the penalty, are those of the first E-step only.
  D5 l_t is the likelihood of the line *given* that a thought was or was not opened: its first token's
     probability is renormalised without "#". Otherwise any thought would gain what pi gives to "#" there.

  python ra3.py --tiny                                                     # this machine: no network, no GPU
  python ra3.py --model Qwen/Qwen2.5-1.5B --rl-batch-size 256              # one GPU
  torchrun --nproc_per_node 8 ra3.py --model Qwen/Qwen2.5-1.5B             # the paper's, one EM iteration
"""

import ast
import contextlib
import copy
import html
import io
import itertools
import json
import math
import random
import re
import sys
import time
import tokenize
import zlib
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from common import (
    EVENT, LOGITS_PER_CHUNK, TINY, Interrupt, Ranks, Run, Sampler, Stop, UserError, all_gather_list, all_sum,
    cache_argument, check_sizes, column, context_of, copy_weights, gathered, inverse_cdf, launch, load_model,
    load_tokenizer, memory_plan, micro_batches, new_optimizer, only, optimizer_step, pad_left, read_on, read_rows,
    run_tests, setup, token_logprobs, uniforms, write_whole,
)  # fmt: skip


@dataclass
class Args:
    """RA3 mid-training, and next-token prediction (NTP) on the same data. Defaults are the paper's."""

    # ---- run
    tiny: bool = False
    """the bundled toy model and data: minutes on two cores. It only changes defaults; flags still override"""
    output_dir: str = ""
    """folder of this run; empty: runs/ra3_<algo>__<model>__s<seed>__<time>"""
    seed: int = 0
    """fixes the order of the data and all sampling noise, on any number of ranks"""
    resume: str = ""
    """`auto`: continue the newest run of this model and seed (or --output-dir), if any; or a run folder"""
    dry_run: bool = False
    """print the plan, one bootstrapped snippet and a memory estimate, and stop"""
    track: bool = False
    """send metrics to Weights & Biases, if it is installed"""
    # ---- model and data
    model: str = "Qwen/Qwen2.5-1.5B"
    """pi_0: a causal LM, as a hub id or a folder"""
    q_model: str = ""
    """this model (with the same tokenizer) writes the thoughts, and there is no E-step"""
    dataset: tuple[str, ...] = (
        "OpenCoder-LLM/opc-annealing-corpus:synthetic_qa/*.arrow",
        "OpenCoder-LLM/opc-annealing-corpus:synthetic_code_snippet/*.arrow",
    )
    """sources, see common.read_rows: hub ids, .jsonl or .parquet files, folders of .py files, `stdlib`"""
    dataset_weights: tuple[float, ...] = ()
    """share of each source in the snippets; empty: equal, but for the default sources see WEIGHTS"""
    text_column: str = "text"
    """the column that holds the code"""
    max_snippet_tokens: int = 1024
    """longer texts are cut into several snippets (tokens)"""
    granularity: Literal["line", "snippet"] = "line"
    """how much code an action spans; `snippet`: one latent for all of it, as in BRiTE"""
    # ---- rollout
    rollout: Literal["drafted", "forced"] = "drafted"
    """forced: token by token, for any model; drafted: several lines a pass, for full attention (same results)"""
    max_latent_tokens: int = 16
    """longest thought, its newline included (tokens)"""
    temperature: float = 1.0
    """temperature of q, in sampling and in log q alike"""
    rollout_rows: int = 512
    """rows that one rank rolls out at once; memory and speed only"""
    # ---- algorithm
    algo: Literal["ra3", "ntp"] = "ra3"
    """ntp: the M-step alone, without thoughts: the baseline, on the same snippets"""
    em_iterations: int = 1
    """number of EM iterations (the paper's one billion tokens are about 11)"""
    group_size: int = 3
    """G: rollouts of each snippet in the E-step"""
    penalty: float = 0.05
    """c: what a thought must add to the line's mean log-likelihood (nats per token)"""
    penalty_warmup: int = 10
    """the first so many RL updates use c = 0"""
    return_horizon: int = 5
    """a return is the sum of so many rewards; 0: of all that follow, as in the other manuscript"""
    entropy_coef: float = 0.001
    """weight of the entropy of q(z_t)"""
    mask_latents: bool = False
    """M-step: train on the code only, eq. (4.2) to the letter, instead of on code and thoughts"""
    # ---- optimisation
    rl_updates: int = 40
    """E-step updates of an EM iteration; 0: the M-step uses pi_i's own thoughts"""
    rl_batch_size: int = 1024
    """snippets of an E-step update, over all ranks"""
    rl_learning_rate: float = 2e-6
    """AdamW, constant"""
    ntp_updates: int = 360
    """M-step updates of an EM iteration"""
    ntp_batch_size: int = 512
    """snippets of an M-step update, over all ranks"""
    ntp_learning_rate: float = 2e-5
    """AdamW, constant"""
    weight_decay: float = 0.01
    """AdamW, both steps (the paper names none)"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this global norm (the paper names none)"""
    micro_batch_tokens: int = 16384
    """tokens of a forward-backward pass on a rank; memory and speed only"""
    gradient_checkpointing: bool = False
    """compute activations again in the backward pass: much less memory, up to a third more time"""
    # ---- evaluation and saving
    eval_snippets: int = 300
    """held-out snippets of each source"""
    eval_problems: str = ""
    """a file with HumanEval's columns: also report pass@1 (greedy) on it"""
    eval_every: int = 0
    """also evaluate every so many updates; 0: only at the start and at the end of each step"""
    save_every: int = 50
    """updates between checkpoints for --resume; the last two are kept"""
    bootstrap_only: bool = False
    """write the data with thoughts of --q-model, else --model, to bootstrapped.jsonl, and stop"""


TINY_DEFAULTS = Args(  # a thought in these programs serves the next line only; a longer horizon adds noise
    tiny=True, model=f"{TINY}/code/model", dataset=(f"{TINY}/code/corpus.jsonl", "stdlib"),
    max_snippet_tokens=128, return_horizon=1, rl_updates=60, rl_batch_size=32,
    rl_learning_rate=4e-5, ntp_updates=40, ntp_batch_size=64, ntp_learning_rate=6e-5, rollout_rows=128,
    micro_batch_tokens=4096, eval_problems=f"{TINY}/code/humaneval.jsonl",
)  # fmt: skip
WEIGHTS = {Args.dataset: (0.95, 0.05), TINY_DEFAULTS.dataset: (0.9, 0.1)}  # the paper's 2.36M and 129K snippets; ours
MALFORMED_PENALTY = 2.0  # nats per token, in place of c (D3)
EVAL_TOKENS = 96  # longest completion of an evaluation problem


# ---------------------------------------------------------------- data 1: where a thought may stand

MAX_LINE = 10_000  # characters; `tokenize` takes quadratic time on longer lines in some versions
# the indentation of a line, and what says that it continues the statement above
INDENTED = re.compile(r"[ \t\f]*(?:(?:[)\]}]|(?:elif|else|except|finally)\b).*)?")


def cut_text(text: str, max_chars: int) -> Iterator[tuple[str, list[tuple[int, str]] | None, bool]]:
    """A text in pieces of at most max_chars: (piece, its actions, whether the text ends with it). Nothing is
    lost.

    Cut before the least indented action in the second half of what fits, else before any action, else after a
    line. A text that needs no cut comes without its actions: see action_starts.
    """
    if 0 < len(text) <= max_chars:
        yield text, None, True
        return
    begin, starts = 0, action_starts(text)
    offsets = [offset for offset, _ in starts]
    while begin < len(text):
        end = begin + max_chars
        if end < len(text):
            inside = offsets[bisect_right(offsets, begin) : bisect_right(offsets, end)]
            late = inside[bisect_left(inside, begin + max_chars // 2) :] or inside[-1:]
            after_line = text.rfind("\n", begin, end) + 1 or end
            end = min(late, key=lambda offset: INDENTED.match(text, offset).end() - offset, default=after_line)
        own = starts[bisect_left(offsets, begin) : bisect_left(offsets, end)]
        yield text[begin:end], [(offset - begin, kind) for offset, kind in own], end >= len(text)
        begin = end


def legal_lines(text: str) -> list[tuple[int, str, str]]:
    """(offset, line, kind) of the lines before which a comment line is legal and changes nothing, in order.

    kind: `blank`, `comment`, `doc` (a string that is a statement of its own) or `code`. A comment is legal
    after every end of line that `tokenize` says is one: not inside a multi-line string, not after a
    backslash, not after a place that `tokenize` cannot read.
    """
    lines = io.StringIO(text, newline="").readlines()
    if any(line.endswith("\r") or len(line) > MAX_LINE for line in lines):
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


def action_starts(text: str) -> list[tuple[int, str]]:
    """(offset, kind of its code line) of each action: a line of code with the comment, blank and docstring
    lines before it; the offset is that of its first non-blank line. A text's first action is a kind of its
    own."""
    starts: list[tuple[int, str]] = []
    pending = None
    for offset, line, kind in legal_lines(text):
        if kind == "blank":
            continue
        pending = offset if pending is None else pending
        if kind == "code":
            starts.append((pending, line_kind(line) if starts else "first"))
            pending = None
    return starts


KINDS = ("assign", "constant", "control", "def", "first", "import", "other", "return")
STATEMENTS = {"def": "def", "class": "def", "async": "def", "import": "import", "from": "import", "return": "return"}
CONTROL = {"if", "elif", "else", "for", "while", "try", "except", "finally", "with", "assert", "raise", "del"}


def line_kind(line: str) -> str:
    """What a line of code does, by which the metrics split the think rate. `constant` assigns a literal."""
    first = re.match(r"\s*(\w*)", line)[1]
    if first in STATEMENTS or first in CONTROL:
        return STATEMENTS.get(first, "control")
    if re.match(r"\s*\w+ = (-?\d+(\.\d+)?|'[^']*'|\"[^\"]*\"|True|False|None)\s*$", line):
        return "constant"
    return "assign" if "=" in line.replace("==", "") else "other"


# ---------------------------------------------------------------- data 2: from text to tokens


# The form of a thought; another one is an edit of these three lines (a fork in docs/ra3.md shows it)
OPENING = re.compile(r"[ \t]*#")  # matches a token that opens a thought
THOUGHT = re.compile(r"[ \t]*#[^\n\r\0]*\n")  # a well-formed thought; the first token with a newline ends it
CLOSING = "\n"  # the token that ends a malformed one


class Vocabulary:
    """What each token's text means for a thought: bool [V] on the device, and the same as sets of ids.

    opens    at a decision, such a token opens a thought
    over     a thought ends with this token: it holds a newline, or would break the source inside a comment
    """

    def __init__(self, tokenizer, size: int, device) -> None:
        self.tokenizer = tokenizer
        self.anchor = tokenizer("a", add_special_tokens=False).input_ids  # SentencePiece drops a first space
        self.anchor_length = len(tokenizer.decode(self.anchor))
        known = min(size, len(tokenizer))
        self.text = self.decode([[i] for i in range(known)])
        self.special = set(tokenizer.all_special_ids)
        names = tokenizer.convert_ids_to_tokens(list(range(known)))
        # after half a character, a byte-fallback decoder (SentencePiece) turns a newline into U+FFFD
        halves = {i for i, name in enumerate(names) if re.fullmatch("<0x[89A-F][0-9A-F]>", name or "")}
        self.broken = self.special | halves | set(range(known, size))  # the last: rows of the embedding, no token
        self.opens_ids = {i for i, text in enumerate(self.text) if OPENING.match(text)}
        self.over_ids = {i for i, text in enumerate(self.text) if set("\n\r\0") & set(text)} | self.broken
        self.opens, self.over = torch.zeros(2, size, dtype=torch.bool, device=device)
        self.opens[list(self.opens_ids)] = self.over[list(self.over_ids)] = True
        canonical = tokenizer(f"a{CLOSING}", add_special_tokens=False).input_ids[-1]
        closing = [i for i in (canonical, *range(known)) if self.text[i] == CLOSING and i not in self.special]
        if not closing or not self.opens_ids:
            raise UserError("this tokenizer has no token for a newline or for '#': it cannot write a comment")
        self.closing = closing[0]  # the one that the tokenizer itself would write, if that is a token alone
        has_bos = tokenizer.bos_token_id is not None
        self.separator = tokenizer.bos_token_id if has_bos else tokenizer.eos_token_id

    def malformed(self, thought: list[int]) -> bool:
        """Whether a thought, read up to the first token that is `over`, has not ended as it should."""
        return thought[-1] in self.broken or not THOUGHT.fullmatch(self.decode([thought])[0])

    def encode(self, text: str, after: str = "") -> list[int]:
        """Tokens of `text` in a line that follows `after`; some tokenizers put a space before a text's
        start."""
        before = self.tokenizer(after, add_special_tokens=False).input_ids
        both = self.tokenizer(after + text, add_special_tokens=False).input_ids
        return both[len(before) :] if both[: len(before)] == before else self.encode(text)

    def decode(self, rows: list[list[int]]) -> list[str]:
        """Text of each row of tokens, as it is in the middle of a text."""
        rows = [self.anchor + row for row in rows]
        texts = self.tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)
        return [text[self.anchor_length :] for text in texts]

    def starts(self, text: str, ids: Sequence[int]) -> list[int] | None:
        """[len(ids) + 1] character offset where each token begins; None if the tokens do not spell the text.

        Of several tokens that share a character the first is said to hold it. The tokenizer's own offsets are
        not used: some kinds leave the white space out of them.
        """
        starts, pieces, offset, pending = [0], [], 0, []
        for token in ids:
            piece = self.text[token]
            if pending or "\ufffd" in piece:  # a part of a character: decode the parts together
                pending.append(token)
                piece = self.decode([pending])[0]
                if piece.endswith("\ufffd") and len(pending) < 8:
                    starts.append(offset + 1)
                    continue
                pending = []
            pieces.append(piece)
            offset += len(piece)
            starts.append(offset)
        spelt = "".join(pieces)
        if spelt == " " + text:  # the tokenizer put a space before the text
            return [max(0, start - 1) for start in starts]
        return starts if spelt == text else None


@dataclass
class Snippet:
    """A text, or a piece of one. Token k of `ids` is text[starts[k]:starts[k + 1]]; ids[0] is the
    separator."""

    text: str
    source: str
    ids: np.ndarray  # [L] separator, the text's canonical tokens, eos if the text ends here
    starts: np.ndarray  # [L + 1] where each token begins in `text` (characters)
    boundaries: np.ndarray  # [T] index into ids of the first token of each action
    indents: list[list[int]]  # [T] the indentation before it, forced once more after a thought
    kinds: list[str]  # [T] kind of each action's code line, for the metrics

    def width(self, max_latent_tokens: int) -> int:
        """Most tokens that a rollout of this snippet can have."""
        return len(self.ids) + sum(max_latent_tokens + len(indent) for indent in self.indents)


def tokenised(text: str, actions: list[tuple[int, str]], last: bool, source: str, v: Vocabulary) -> Snippet | None:
    """One piece of text with its actions (offset, kind). None if the tokenizer does not give the text back.

    A boundary is the token that holds the first non-space character of an action. A line has none if that
    token also holds the end of the line before, or the space that the tokenizer put before the text.
    """
    ids = v.encode(text)
    starts = v.starts(text, ids)
    if starts is None or v.special.intersection(ids):
        return None
    starts, boundaries, indents, kinds = np.array(starts), [], [], []
    for offset, kind in actions:
        first = re.compile(r"[ \t\f]*").match(text, offset).end()  # the first character that is no space
        index = int(np.searchsorted(starts, first, side="right")) - 1  # the token that holds `first`
        added_space = index == 0 and starts[1] - starts[0] < len(v.text[ids[0]])
        if starts[index] < offset or added_space:
            continue
        line_start = int(np.searchsorted(starts, offset))
        if starts[line_start] == offset and offset:  # the indentation is tokens of its own
            indent = ids[line_start:index]
        else:  # its beginning is in a token with the newline before
            indent = v.encode(text[offset : starts[index]], after="\n")
        boundaries.append(index + 1)  # 1: the separator
        indents.append(indent)
        kinds.append(kind)
    tail = [v.tokenizer.eos_token_id] * last
    return Snippet(
        text, source, np.array([v.separator, *ids, *tail]), np.array([0, *starts, *[len(text)] * len(tail)]),
        np.array(boundaries, dtype=np.int64), indents, kinds,
    )  # fmt: skip


def segment(piece: tuple[str, list | None, bool], source: str, v: Vocabulary, args: Args, context: int):
    """The snippets of a piece that cut_text made, [] if it cannot be used. Again nothing is lost.

    A snippet has at most max_snippet_tokens tokens, and at most `context` with the longest thoughts. What is
    longer is cut in two, before the action nearest to its middle, else after a line, else anywhere. Only a
    text's end has eos.
    """
    text, actions, last = piece
    if not text.strip() or max(map(len, text.split("\n"))) > MAX_LINE:
        return []
    waiting, snippets = [(0, len(text))], []
    actions = action_starts(text) if actions is None else actions
    while waiting:
        begin, end = waiting.pop()
        own = [(offset - begin, kind) for offset, kind in actions if begin <= offset < end]
        own = own[:1] if args.granularity == "snippet" else own
        snippet = tokenised(text[begin:end], own, last and end == len(text), source, v)
        if snippet is None:
            return []
        if len(snippet.ids) <= args.max_snippet_tokens and snippet.width(args.max_latent_tokens) <= context:
            snippets.append(snippet)
            continue
        if end - begin < 2:
            return []
        middle = (begin + end) // 2
        inside = [offset for offset, _ in actions if begin < offset < end]
        other = text.rfind("\n", begin, middle) + 1 or middle
        cut = min(inside, key=lambda offset: abs(offset - middle), default=other)
        waiting += [(cut, end), (begin, cut)]
    return snippets


def bootstrap_text(snippet: Snippet, latents: dict[int, str]) -> str:
    """The text with thoughts; latents: action -> its comment line, without indentation, with newline."""
    pieces, done = [], 0
    for action, latent in sorted(latents.items()):
        start = snippet.starts[snippet.boundaries[action]]
        line_start = snippet.text.rfind("\n", 0, start) + 1
        pieces += [snippet.text[done:start], latent, snippet.text[line_start:start]]
        done = start
    return "".join([*pieces, snippet.text[done:]])


# ---------------------------------------------------------------- data 3: the stream of snippets


class SnippetStream:
    """Endless, seeded stream of the snippets of one part of the data.

    part: `E` or `M`, or `all` (everything once, in order). A text's part follows from a hash of it, or of its
    path: the parts and the held-out texts are disjoint, and NTP sees what RA3's M-step sees. cursor: (pieces
    taken, snippets of the next piece that are used). Every rank reads all texts but tokenises only its share.
    """

    def __init__(self, args: Args, part: str, v: Vocabulary, context: int, ranks: Ranks, cursor=(0, 0)) -> None:
        self.args, self.part, self.ranks, self.limits = args, part, ranks, (v, args, context)
        self.taken, self.skip = cursor
        self.ready: list[tuple[int, int, Snippet]] = []  # (number of its piece, number within it, snippet)
        self.counts = Counter()  # pieces, unusable ones, snippets, decisions, tokens of each source
        self.pieces = itertools.islice(self._pieces(), self.taken, None)

    @property
    def cursor(self) -> tuple[int, int]:
        return self.ready[0][:2] if self.ready else (self.taken, 0)

    def batch(self, size: int) -> list[Snippet]:
        """The next snippets, the same on all ranks (a collective); fewer at the end of `all`."""
        while len(self.ready) < size:
            pieces = list(itertools.islice(self.pieces, size - len(self.ready)))
            if not pieces:
                break
            mine = [segment(p, source, *self.limits) for p, source in pieces[self.ranks.share(len(pieces))]]
            for snippets in all_gather_list(mine, self.ranks):
                self.ready += [(self.taken, i, s) for i, s in enumerate(snippets) if i >= self.skip]
                self.taken, self.skip = self.taken + 1, 0
                self.counts.update(pieces=1, unusable=not snippets)
            if self.counts["pieces"] == self.counts["unusable"] >= 1000:
                raise UserError(f"none of the first 1000 texts of {', '.join(self.args.dataset)} can be used")
        snippets, self.ready = [s for _, _, s in self.ready[:size]], self.ready[size:]
        for s in snippets:
            self.counts.update({"snippets": 1, "decisions": len(s.kinds), f"tokens/{s.source}": len(s.ids)})
        return snippets

    def metrics(self) -> dict[str, float]:
        c, sources = self.counts, [key for key in self.counts if key.startswith("tokens/")]
        tokens = sum(c[key] for key in sources)
        return {
            "data/pieces": self.taken, "data/unusable": c["unusable"] / max(1, c["pieces"]),
            "data/decisions": c["decisions"] / max(1, c["snippets"]),
            **{f"data/token_share/{key[7:]}": c[key] / tokens for key in sources},
        }  # fmt: skip

    def _pieces(self) -> Iterator[tuple[tuple, str]]:
        args = self.args
        e, m = args.rl_updates * args.rl_batch_size, args.ntp_updates * args.ntp_batch_size
        e_share = 1000 * min(0.5, max(0.1, e / max(1, e + m)))
        for epoch in itertools.count():
            items = interleaved(self.args)
            if self.part != "all":
                items = (i for i in items if i[2] % 20 and (i[2] // 20 % 1000 < e_share) == (self.part == "E"))
                items = shuffled(items, random.Random(f"{self.args.seed} {self.part} {epoch}"))
            empty = True
            for piece, source, _ in items:
                empty = False
                yield piece, source
            if self.part == "all":
                return
            if empty:
                raise UserError(f"{', '.join(self.args.dataset)}: no text for the {self.part}-step; give more data")


def held_out(args: Args, v: Vocabulary, context: int, ranks: Ranks) -> list[Snippet]:
    """eval_snippets snippets of every source, from every twentieth of its texts, the same on all ranks."""
    found = []
    for source in args.dataset:
        pieces = (piece for piece, _, key in source_pieces(source, args) if key % 20 == 0)
        pieces = list(itertools.islice(pieces, 2 * args.eval_snippets))
        random.Random("held out").shuffle(pieces)
        name = short_name(source)
        mine = [segment(piece, name, v, args, context) for piece in pieces[ranks.share(len(pieces))]]
        found += [s for snippets in all_gather_list(mine, ranks) for s in snippets][: args.eval_snippets]
    return found


def short_name(source: str) -> str:
    return Path(source.split(":")[-1].split("/*")[0]).name.split(".")[0]


def source_pieces(source: str, args: Args) -> Iterator[tuple[tuple, str, int]]:
    """(piece, short name, hash of its text) of one source; OpenCoder's rows name `lang` or `program_lang`."""
    for row in read_rows(source):
        text = column(row, args.text_column, source)
        language = row.get("lang") or row.get("program_lang") or "python"
        if isinstance(text, str) and text.strip() and language.lower() == "python":
            text = text.encode("utf-8", "replace").decode()  # lone surrogates
            key = zlib.crc32((row.get("path") or text).encode())
            for piece in cut_text(text, 4 * args.max_snippet_tokens):
                yield piece, short_name(source), key


def source_weights(args: Args) -> tuple[float, ...]:
    return args.dataset_weights or WEIGHTS.get(args.dataset) or (1.0,) * len(args.dataset)


def interleaved(args: Args) -> Iterator[tuple[tuple, str, int]]:
    """Pieces of all sources, drawn by their weights, until the first source is exhausted."""
    weights, owed = source_weights(args), [0.0] * len(args.dataset)
    sources = [source_pieces(source, args) for source in args.dataset]
    while True:
        owed = [o + w for o, w in zip(owed, weights)]
        chosen = owed.index(max(owed))
        owed[chosen] -= sum(weights)
        if (item := next(sources[chosen], None)) is None:
            return
        yield item


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


# ---------------------------------------------------------------- 1 sample

FORCED = -2  # `targets` of a token that q did not choose
DRAFT = 4  # decisions of a row that share a forward pass; memory and speed only


@dataclass
class Rollout:
    """One rolled-out snippet; arrays [W] over its tokens, of which the first is the separator."""

    snippet: Snippet
    ids: np.ndarray
    targets: np.ndarray  # FORCED, or what q drew at this place: a token, or EVENT for act
    actions: np.ndarray  # action that a token belongs to (the code's) or leads to (a latent's); -1: none
    expert: np.ndarray  # bool: a token of the code
    malformed: np.ndarray  # bool: the thought was closed here
    advantages: np.ndarray | None = None  # [T]

    def thinks(self) -> list[int]:
        """The actions before which q thought, well-formed or not."""
        return np.unique(self.actions[self.targets >= 0]).tolist()

    def without_malformed(self) -> "Rollout":
        """The same with every malformed thought (and the indentation forced after it) replaced by act."""
        keep = self.expert | ~np.isin(self.actions, self.actions[self.malformed])
        keep[0] = True
        return Rollout(self.snippet, *(getattr(self, name)[keep] for name in ARRAYS))

    def thoughts(self, v: Vocabulary) -> dict[int, str]:
        """Action -> its thought, newline included; the well-formed ones."""
        r = self.without_malformed()
        rows = [r.ids[(r.actions == t) & (r.targets >= 0)].tolist() for t in r.thinks()]
        return dict(zip(r.thinks(), v.decode(rows)))


ARRAYS = ("ids", "targets", "actions", "expert", "malformed")  # of a Rollout


def all_act(snippet: Snippet) -> Rollout:
    """The rollout in which every latent is act: the plain snippet, for the NTP baseline and as a draft."""
    size = len(snippet.ids)
    actions = np.searchsorted(snippet.boundaries, np.arange(size), side="right") - 1
    expert, nothing = np.arange(size) > 0, np.zeros(size, dtype=bool)
    return Rollout(snippet, snippet.ids, np.full(size, FORCED), actions, expert, nothing)


def turns(s: Snippet, thoughts: dict[int, list[int]], v: Vocabulary, longest: int):
    """All turns of one snippet, as a coroutine: it is sent the token that q draws at the next place, and
    yields the token to write there. Fills in `thoughts`: action -> the tokens that q drew for it.

    A thought is over with a token that is `over`, or when it is `longest` tokens long; then the indentation is
    written again, and the line of code follows.
    """
    action_at = {boundary: t for t, boundary in enumerate(s.boundaries.tolist())}
    drawn = yield
    for place, token in enumerate(s.ids[1:].tolist(), start=1):
        t = action_at.get(place)
        if t is not None and drawn in v.opens_ids:  # at every other boundary q acts
            thoughts[t], over = [], False
            while not over:
                thoughts[t].append(drawn)
                over = drawn in v.over_ids or len(thoughts[t]) == longest
                drawn = yield v.closing if over and v.malformed(thoughts[t]) else drawn
            for indent in s.indents[t]:
                drawn = yield indent
        drawn = yield token


class Forcing(LogitsProcessor):
    """Lets `generate` write what the rows' coroutines say. The token in column p is drawn with noise[:,
    p]."""

    def __init__(self, rows: list, noise: torch.Tensor, temperature: float) -> None:
        self.rows, self.noise, self.temperature, self.going = rows, noise, temperature, True
        for row in rows:
            next(row)

    def __call__(self, input_ids, scores):
        probs = (scores.float() / self.temperature).softmax(-1)
        drawn = inverse_cdf(probs, self.noise[:, input_ids.shape[1]]).tolist()
        token = [self.send(row, one) for row, one in zip(self.rows, drawn)]
        self.going = any(one is not None for one in token)
        return only(torch.tensor([one or 0 for one in token], device=scores.device), scores)

    def send(self, row, drawn: int) -> int | None:
        try:
            return row.send(drawn)
        except StopIteration:
            return None  # the snippet has ended


class Until(StoppingCriteria):
    """Ends `generate` when `done(ids)`, bool [B], holds for every row."""

    def __init__(self, done) -> None:
        self.done = done

    def __call__(self, input_ids, scores, **kw):
        return self.done(input_ids)


def rollout_forced(model, snippets: list[Snippet], noise, v: Vocabulary, args: Args) -> list[Rollout]:
    """Token by token: one call of generate writes all snippets through all their turns. For every
    architecture."""
    thoughts: list[dict] = [{} for _ in snippets]
    coroutines = [turns(s, t, v, args.max_latent_tokens) for s, t in zip(snippets, thoughts)]
    forcing = Forcing(coroutines, noise, args.temperature)
    ids = torch.tensor([[int(s.ids[0])] for s in snippets], device=noise.device)
    until = Until(lambda ids: ids.new_full((len(ids),), not forcing.going, dtype=torch.bool))
    model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=noise.shape[1] - 1, synced_gpus=False,
        logits_processor=LogitsProcessorList([forcing]), stopping_criteria=StoppingCriteriaList([until]),
    )  # fmt: skip
    rollouts = [all_act(s) for s in snippets]
    for r, own in zip(rollouts, thoughts):
        r.targets[r.snippet.boundaries] = EVENT
        moved = 0
        for t, tokens in own.items():
            place = int(r.snippet.boundaries[t]) + moved
            r.targets[place] = FORCED
            moved += insert_thought(r, place, t, tokens, v)
    return rollouts


def rollout_drafted(model, snippets: list[Snippet], noise, v: Vocabulary, args: Args) -> list[Rollout]:
    """The same rollouts in fewer passes, for models whose only state is attention to all tokens.

    A row is a whole text at any time: what is decided, then the code as if every latent to come were act. One
    pass reads the next DRAFT actions and draws the decision before each. Those up to a row's first thought
    hold; what was read after it is masked in the cache for good. `generate` writes the thought on a copy of
    the cache.
    """
    device, rows, cache = model.device, [all_act(s) for s in snippets], DynamicCache(config=model.config)
    turn, seen, moved = np.zeros((3, len(rows)), dtype=np.int64)  # next action, tokens read, tokens inserted
    alive, mask = np.arange(len(rows)), torch.zeros(len(rows), 0, dtype=torch.long, device=device)
    while True:
        keep = torch.tensor([k for k, i in enumerate(alive) if turn[i] < len(snippets[i].boundaries)], device=device)
        if not len(keep):
            return rows
        if len(keep) < len(alive):
            cache.reorder_cache(keep)
            mask, alive = mask[keep], alive[keep.cpu().numpy()]
        places = [snippets[i].boundaries[turn[i] : turn[i] + DRAFT] + moved[i] for i in alive]
        chunks = [rows[i].ids[seen[i] : p[-1]].tolist() for i, p in zip(alive, places)]
        hidden = model.run(read_on, chunks, seen[alive], mask, cache)  # [B, C, D]
        width = hidden.shape[1]
        # the decision before the action at place p is drawn after token p - 1
        columns = [width - len(c) + p - 1 - seen[i] for i, p, c in zip(alive, places, chunks)]
        row = torch.from_numpy(np.repeat(np.arange(len(alive)), list(map(len, places)))).to(device)  # [N]
        column, place = (torch.from_numpy(np.concatenate(x)).to(device) for x in (columns, places))
        who = torch.from_numpy(alive).to(device)
        drawn = draw(model, hidden[row, column], noise[who[row], place], args)  # [N]
        opens = np.split(v.opens[drawn].cpu().numpy(), np.cumsum(list(map(len, places)))[:-1])
        read, thinking, first = np.zeros(len(alive), dtype=np.int64), [], []
        for k, (i, p, o) in enumerate(zip(alive, places, opens)):
            acts = int(o.argmax()) if o.any() else len(p)
            rows[i].targets[p[:acts]] = EVENT
            place = int(p[: acts + 1][-1])
            read[k], seen[i], turn[i] = place - seen[i], place, turn[i] + acts
            if acts < len(p):
                thinking.append(k)
                first.append(sum(map(len, places[:k])) + acts)
        pads = torch.tensor([width - len(c) for c in chunks], device=device)
        new = torch.arange(width, device=device) - pads[:, None]  # [B, C] index in the chunk
        kept = (new >= 0) & (new < torch.from_numpy(read).to(device)[:, None])
        mask = torch.cat([mask, kept.long()], 1)
        if thinking:
            index = torch.tensor(thinking, device=device)
            at = torch.from_numpy(seen[alive[thinking]]).to(device)
            thoughts = think(model, cache, mask, index, drawn[first], noise[who[index]], at, v, args)
            for i, tokens in zip(alive[thinking], thoughts):
                moved[i] += insert_thought(rows[i], int(seen[i]), int(turn[i]), tokens, v)
                turn[i] += 1


def think(model, cache, mask, index, token, noise, at, v: Vocabulary, args: Args) -> list[list[int]]:
    """The thoughts of the rows `index` [B] of the cache, each from the `token` [B] that opened it at place
    `at` [B].

    A thought is over with a token that is `over`, or after max_latent_tokens. noise [B, W].
    """
    own = copy.copy(cache)  # of the layers, too; reordering makes new tensors
    own.layers = [copy.copy(layer) for layer in cache.layers]
    own.reorder_cache(index)
    mask = torch.cat([mask[index], torch.ones_like(token)[:, None]], 1)
    ids, start = torch.zeros_like(mask), mask.shape[1]
    ids[:, -1] = token
    places = (at[:, None] + torch.arange(1, args.max_latent_tokens, device=at.device)).clamp(max=noise.shape[1] - 1)
    sampler = Sampler(noise.gather(1, places), start, args.temperature, noise.device)
    if args.max_latent_tokens > 1:
        ids = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=args.max_latent_tokens - 1, synced_gpus=False,
            logits_processor=LogitsProcessorList([sampler]), **{cache_argument(model): own},
            stopping_criteria=StoppingCriteriaList([Until(lambda ids: v.over[ids[:, start - 1 :]].any(1))]),
        )  # fmt: skip
    tokens = ids[:, start - 1 :]
    over = v.over[tokens]
    lengths = torch.where(over.any(1), over.int().argmax(1) + 1, tokens.shape[1]).tolist()
    return [row[:length] for row, length in zip(tokens.tolist(), lengths)]


def draw(model, hidden, noise, args: Args) -> torch.Tensor:
    """Tokens [N] that q draws after hidden states [N, D] with noise [N]."""
    head, size = model.get_output_embeddings(), max(1, LOGITS_PER_CHUNK // model.config.get_text_config().vocab_size)
    parts = zip(hidden.split(size), noise.split(size))
    return torch.cat([inverse_cdf((head(h).float() / args.temperature).softmax(-1), u) for h, u in parts])


def insert_thought(r: Rollout, place: int, t: int, tokens: list[int], v: Vocabulary) -> int:
    """Put a thought before action t, which begins at `place`, and the indentation after it; tokens inserted.

    A malformed thought is closed: its last token becomes CLOSING.
    """
    malformed = v.malformed(tokens)
    ids, indent = tokens[:-1] + [v.closing if malformed else tokens[-1]], r.snippet.indents[t]
    size = len(ids) + len(indent)
    closed = (np.arange(size) == len(ids) - 1) & malformed
    for name, values in zip(ARRAYS, (ids + indent, tokens + [FORCED] * len(indent), t, False, closed)):
        setattr(r, name, np.insert(getattr(r, name), [place] * size, values))
    return size


@torch.no_grad()
def sample(
    model, batches: list[list[Snippet]], key: str, first: int, v: Vocabulary, args: Args, ranks: Ranks
) -> list[list[Rollout]]:
    """This rank's rollouts of each of the global batches, all sampled at once; without a model every latent
    is act.

    The snippets are numbered from `first` on, through all batches; each has the noise of (seed, key, number),
    so that draws are the same on any number of ranks. Rows of similar length are rolled out together.
    """
    numbers = accumulate([first, *map(len, batches)])
    shares = [[(s, n + i) for i, s in enumerate(b)][ranks.share(len(b))] for b, n in zip(batches, numbers)]
    rows = [row for share in shares for row in share]
    if model is None:
        rollouts = {number: all_act(snippet) for snippet, number in rows}
    else:
        rollouts, roll = {}, rollout_drafted if args.rollout == "drafted" else rollout_forced
        rows.sort(key=lambda row: len(row[0].ids), reverse=True)
        with gathered(model):
            for begin in range(0, len(rows), args.rollout_rows):
                snippets, own = zip(*rows[begin : begin + args.rollout_rows])
                widths = [s.width(args.max_latent_tokens) + 1 for s in snippets]
                noise = [uniforms([width], args.seed, key, n) for width, n in zip(widths, own)]
                noise = pad_sequence(noise, batch_first=True).to(model.device)  # [R, W]
                rollouts.update(zip(own, roll(model, snippets, noise, v, args)))
    return [[rollouts[number] for _, number in share] for share in shares]


# ---------------------------------------------------------------- 2 score


@torch.no_grad()
def expert_logprobs(model, rollouts: list[Rollout], v: Vocabulary, args: Args, given_decision=False):
    """Log-probability of each token of the code given all before it, thoughts included: one array a rollout.

    With `given_decision` an action's first token is conditioned on not opening a thought: log p - log(1 -
    sum_H p), unless the code itself has a comment there (D5). Equal rows are scored once.
    """
    texts = [r.ids.tobytes() for r in rollouts]
    distinct = list({text: i for i, text in enumerate(texts)}.values())
    scored: dict[bytes, np.ndarray] = {}
    with gathered(model):
        for batch in micro_batches([len(rollouts[i].ids) for i in distinct], args.micro_batch_tokens):
            chosen = [rollouts[distinct[i]] for i in batch]
            where = [np.flatnonzero(r.expert) for r in chosen]
            options, n = {}, sum(map(len, where))
            targets = np.concatenate([r.ids[w] for r, w in zip(chosen, where)])
            if given_decision:  # the probability of act, too, where an action begins
                begins = [np.diff(r.actions[w], prepend=-1) > 0 for r, w in zip(chosen, where)]
                acts = [w[b & ~np.isin(r.ids[w], list(v.opens_ids))] for r, w, b in zip(chosen, where, begins)]
                order = [np.concatenate([w, a]) for w, a in zip(where, acts)]
                targets = [np.append(r.ids[w], np.full(len(a), EVENT)) for r, w, a in zip(chosen, where, acts)]
                targets = np.concatenate(targets)
                where, options = order, {"event": ~v.opens}
            logprobs, _ = token_logprobs(
                model, [r.ids for r in chosen], where, targets=torch.from_numpy(targets).to(v.opens.device), **options
            )
            parts = np.split(logprobs.double().cpu().numpy(), np.cumsum(list(map(len, where)))[:-1])
            for r, w, part in zip(chosen, where, parts):
                n = int(r.expert.sum())
                own = part[:n].copy()
                own[np.searchsorted(w[:n], w[n:])] -= part[n:]
                scored[r.ids.tobytes()] = own
    return [scored[text] for text in texts]


def line_likelihoods(rollout: Rollout, logprobs: np.ndarray) -> np.ndarray:
    """l_t of every action [T]: the mean log-probability of its tokens (D2); logprobs: of the tokens of the
    code."""
    actions = rollout.actions[rollout.expert]
    return np.array([logprobs[actions == t].mean() for t in range(len(rollout.snippet.boundaries))])


def step_rewards(rollout: Rollout, logprobs: np.ndarray, penalty: float) -> np.ndarray:
    """r_t of every action [T], eq. (4.1) with the fixed penalty of Algorithm 1 in place of the KL."""
    costs = np.zeros(len(rollout.snippet.boundaries))
    costs[rollout.thinks()] = penalty
    costs[rollout.actions[rollout.malformed]] = MALFORMED_PENALTY  # D3
    return line_likelihoods(rollout, logprobs) - costs  # eq. (4.1), Algorithm 1 line 3


# ---------------------------------------------------------------- 3 advantage


def truncated_returns(rewards: torch.Tensor, horizon: int) -> torch.Tensor:
    """Return of step t: the sum of the next `horizon` rewards r_t .. r_{t+horizon-1}; 0: all to the end.

    rewards [..., G, T], zero after a sequence's end; the result has the same shape and unit. Section 7 of the
    paper. ValueError for a negative horizon.
    """
    if horizon < 0:
        raise ValueError(f"the horizon must be 0 (to the end) or positive, got {horizon}")
    to_the_end = rewards.flip(-1).cumsum(-1).flip(-1)
    if horizon == 0 or horizon >= rewards.shape[-1]:
        return to_the_end
    beyond = torch.zeros_like(to_the_end)
    beyond[..., :-horizon] = to_the_end[..., horizon:]
    return to_the_end - beyond


def group_baseline_advantages(returns: torch.Tensor) -> torch.Tensor:
    """Return minus its mean over the G rollouts of the same snippet at the same step; [..., G, T] -> same.

    The code is the same in all rollouts, so the steps align. Section 5 of the paper (b(s_t), after Algorithm
    1).
    """
    return returns - returns.mean(-2, keepdim=True)


# ---------------------------------------------------------------- 4 update


def policy_gradient_loss(model, rollouts: list[Rollout], v: Vocabulary, args: Args, decisions: float):
    """This micro-batch's part of the E-step loss, and the sum of its entropies (nats).

    loss = - (1 / decisions) sum_t A_t log q(z_t) - entropy_coef * mean entropy; log q(z_t) sums over the
    thought's tokens, and `decisions` counts them in the whole global batch. Only latents get logits and
    gradients. There is one update per batch, so no ratio and no clipping.
    """
    device = v.opens.device
    where = [np.flatnonzero(r.targets != FORCED) for r in rollouts]
    targets = torch.from_numpy(np.concatenate([r.targets[w] for r, w in zip(rollouts, where)])).to(device)
    advantages = np.concatenate([r.advantages[r.actions[w]] for r, w in zip(rollouts, where)])
    # at each decision, also where q has opened a thought, all that means act is one outcome of z_t
    decisive = np.concatenate([np.diff(r.actions[w], prepend=-1) > 0 for r, w in zip(rollouts, where)])
    logprobs, entropy = token_logprobs(
        model, [r.ids for r in rollouts], where, targets=targets, event=~v.opens,
        merged=torch.from_numpy(decisive).to(device), temperature=args.temperature, entropy=True,
    )  # fmt: skip
    advantages = torch.from_numpy(advantages).float().to(device)  # [N]
    loss = -(advantages * logprobs).sum() - args.entropy_coef * entropy.sum()
    return loss / decisions, entropy.detach().sum()


def ntp_loss(model, rollouts: list[Rollout], mask_latents: bool, tokens: float):
    """This micro-batch's part of the M-step loss: mean negative log-likelihood per token (nats), eq. (4.2).

    tokens: those trained on in the whole global batch. Also returns the sum of the losses of the code's
    tokens.
    """
    where = [np.flatnonzero(r.expert) if mask_latents else np.arange(1, len(r.ids)) for r in rollouts]
    expert = torch.from_numpy(np.concatenate([r.expert[w] for r, w in zip(rollouts, where)])).to(model.device)
    logprobs, _ = token_logprobs(model, [r.ids for r in rollouts], where)
    return -logprobs.sum() / tokens, -logprobs.detach()[expert].sum()  # eq. (4.2)


def update(model, optimizer, rollouts, loss_of, args: Args, ranks: Ranks, interrupt: Interrupt):
    """One optimizer step on all ranks' rollouts: (global loss, sum of the second value, gradient norm).

    loss_of(rollouts) -> (part of the global loss, a sum to report). If the loss or gradient is not finite,
    nothing changes and the norm is NaN.
    """
    total, reported = 0.0, 0.0
    for batch in micro_batches([len(r.ids) for r in rollouts], args.micro_batch_tokens, ranks):
        interrupt.check()
        loss, extra = loss_of([rollouts[i] for i in batch or [0]])  # [] stands for a row of weight zero
        weight = float(bool(batch))
        (loss * weight * ranks.world_size).backward()  # FSDP averages over ranks; our losses add up over them
        total += weight * loss.item()
        reported += weight * extra.item()
    norm = optimizer_step(model, optimizer, total, args.max_grad_norm, ranks)
    return *all_sum([total, reported], ranks), norm


def e_step(q, pi, optimizer, snippets, number: int, v, args: Args, ranks: Ranks, interrupt: Interrupt) -> dict:
    """E-step update `number` on the global batch `snippets`: q learns, pi scores. Returns metrics."""
    G, clock = args.group_size, [time.perf_counter()]
    # 1 sample
    rows = [s for s in snippets for _ in range(G)]  # groups of G
    (rollouts,) = sample(q, [rows], "E", number * len(rows), v, args, ranks)  # R
    clock.append(time.perf_counter())
    interrupt.check()
    # 2 score; also each snippet without thoughts, which costs little: most rollouts have few
    plain = [all_act(r.snippet) for r in rollouts[::G]]
    logprobs = expert_logprobs(pi, rollouts + plain, v, args, given_decision=True)
    penalty = 0.0 if number < args.penalty_warmup else args.penalty  # D4
    rewards = [torch.from_numpy(step_rewards(r, lp, penalty)) for r, lp in zip(rollouts, logprobs)]
    act_rewards = sum(step_rewards(r, lp, 0.0).sum() for r, lp in zip(plain, logprobs[len(rollouts) :])) * G
    rewards = pad_sequence(rewards, batch_first=True)  # [R, T]
    clock.append(time.perf_counter())
    interrupt.check()
    # 3 advantage
    returns = truncated_returns(rewards.unflatten(0, (-1, G)), args.return_horizon)  # [S, G, T]
    for r, row in zip(rollouts, group_baseline_advantages(returns).flatten(0, 1).numpy()):
        r.advantages = row
    # 4 update
    sums = rollout_sums(rollouts) | {"reward": rewards.sum().item(), "act": act_rewards}
    sums = all_sum(sums, ranks)
    _, entropy, norm = update(
        q, optimizer, rollouts, lambda part: policy_gradient_loss(q, part, v, args, sums["decisions"]), args, ranks,
        interrupt,
    )  # fmt: skip
    clock.append(time.perf_counter())
    return {
        "reward/mean": sums["reward"] / sums["decisions"],
        "reward/gain": (sums["reward"] - sums["act"]) / sums["decisions"],
        "reward/penalty": penalty, "policy/entropy": entropy / sums["decisions"], "optim/grad_norm": norm,
        **rollout_metrics(sums), **timing(clock, sums["tokens"]),
    }  # fmt: skip


def m_step(pi, optimizer, rollouts: list[Rollout], seconds: float, args: Args, ranks: Ranks, interrupt) -> dict:
    """One M-step update of pi on this rank's rollouts, which took `seconds` to sample. Returns metrics."""
    clock = [time.perf_counter() - seconds, *[time.perf_counter()] * 2]  # nothing to score
    sums = rollout_sums(rollouts)
    rollouts = [r.without_malformed() for r in rollouts]
    sums["trained"] = sum(r.expert.sum() if args.mask_latents else len(r.ids) - 1 for r in rollouts)
    sums = all_sum(sums, ranks)
    # 4 update
    loss, code_loss, norm = update(
        pi, optimizer, rollouts, lambda part: ntp_loss(pi, part, args.mask_latents, sums["trained"]), args, ranks,
        interrupt,
    )  # fmt: skip
    clock.append(time.perf_counter())
    return {
        "train/loss": loss, "train/ce_code": code_loss / sums["expert_tokens"], "optim/grad_norm": norm,
        **rollout_metrics(sums), **timing(clock, sums["tokens"]),
    }  # fmt: skip


# ---------------------------------------------------------------- 5 log, evaluate, save

CONSOLE = (
    "{phase}", "gain {reward/gain:+.3f}", "loss {train/loss:.3f}", "think {rollout/think_rate:5.1%}",
    "format {rollout/format_rate:.0%}", "grad {optim/grad_norm:.2f}",
    "{time/rollout_s:.1f} + {time/score_s:.1f} + {time/update_s:.1f} s", "{perf/tokens_per_s:.0f} tokens/s",
    "{perf/peak_memory_gib:.1f} GiB",
)  # fmt: skip
HELDOUT = ("held-out ce {eval/ce_code:.4f}", "pass@1 {eval/pass@1:.3f}")
SHOWN = ("constant", "assign", "return")  # kinds of line
PANELS = (
    ("reward per line, over never thinking (nats)", {"reward/gain": "E-step"}, "update"),
    ("think rate", {"rollout/think_rate": "all lines", **{f"rollout/think_rate/{k}": k for k in SHOWN}}, "update"),
    ("cross-entropy of the code, training (nats per token)", {"train/ce_code": "M-step"}, "update"),
    ("cross-entropy of held-out code (nats per token)",
     {"eval/ce_code": "with its thoughts", "eval/ce_code_act": "without"}, "update"),
    ("pass@1, greedy", {"eval/pass@1": ""}, "update"),
    ("share of thoughts that are well-formed", {"rollout/format_rate": ""}, "update"),
    ("reward over wall time", {"reward/gain": "E-step"}, "time/wall_s"),
    ("gradient norm", {"optim/grad_norm": ""}, "update"),
)  # fmt: skip
LEGEND = "Thoughts in green. After each: l_t, the line's mean log-likelihood per token, with the thought and without."


def rollout_sums(rollouts: list[Rollout]) -> dict[str, float]:
    """Counts to be added up over ranks, the same keys on all: of/KIND decisions and at/KIND thoughts."""
    of = Counter(kind for r in rollouts for kind in r.snippet.kinds)
    at = Counter(r.snippet.kinds[t] for r in rollouts for t in r.thinks())
    return {
        "decisions": of.total(), "thoughts": at.total(), "malformed": sum(int(r.malformed.sum()) for r in rollouts),
        "latent_tokens": sum(int((r.targets >= 0).sum()) for r in rollouts),
        "tokens": sum(len(r.ids) for r in rollouts), "expert_tokens": sum(int(r.expert.sum()) for r in rollouts),
        **{f"{name}/{kind}": count[kind] for name, count in (("of", of), ("at", at)) for kind in KINDS},
    }  # fmt: skip


def think_rates(sums: dict[str, float], name: str) -> dict[str, float]:
    return {f"{name}/{kind}": sums[f"at/{kind}"] / sums[f"of/{kind}"] for kind in KINDS if sums[f"of/{kind}"]}


def rollout_metrics(sums: dict[str, float]) -> dict[str, float]:
    return {
        "rollout/think_rate": sums["thoughts"] / max(1, sums["decisions"]),
        "rollout/format_rate": 1 - sums["malformed"] / max(1, sums["thoughts"]),
        "rollout/latent_tokens": sums["latent_tokens"] / max(1, sums["thoughts"]),
        **think_rates(sums, "rollout/think_rate"),
    }


def timing(clock: list[float], tokens: float) -> dict[str, float]:
    seconds = np.diff(clock)
    names = ("time/rollout_s", "time/score_s", "time/update_s")
    return dict(zip(names, seconds)) | {"perf/tokens_per_s": tokens / sum(seconds)}


def evaluate(model, snippets, problems, title: str, v: Vocabulary, args: Args, run: Run) -> tuple[dict, list[str]]:
    """Cross-entropy (nats per token) of held-out code with the model's own thoughts and without; pass@1.

    The same noise every time, one draw of the thoughts; malformed ones become act, as in the M-step. Returns
    the metrics, and the two snippets as text in which thoughts helped most.
    """
    (drawn,) = sample(model, [snippets], "eval", 0, v, args, run.ranks)
    rollouts = [r.without_malformed() for r in drawn]
    plain = [all_act(r.snippet) for r in rollouts]
    thinking, acting = (expert_logprobs(model, rows, v, args) for rows in (rollouts, plain))
    metrics, everything = {}, Counter()
    for source in sorted({s.source for s in snippets}):
        mine = [i for i, r in enumerate(rollouts) if r.snippet.source == source]
        sums = rollout_sums([drawn[i] for i in mine])
        for name, logprobs in (("ce_code", thinking), ("ce_code_act", acting)):
            sums[name] = -sum(logprobs[i].sum() for i in mine)
        sums = all_sum(sums, run.ranks)
        everything.update(sums)
        for name in ("ce_code", "ce_code_act"):
            metrics[f"eval/{name}"] = everything[name] / everything["expert_tokens"]  # the last one holds
            metrics[f"eval/{name}/{source}"] = sums[name] / sums["expert_tokens"]
        metrics |= think_rates(sums, f"eval/think_rate/{source}")
    if problems:
        metrics["eval/pass@1"] = pass_at_1(model, problems, v, args, run.ranks)
    shown = []
    for r, p, lp, lp_act in zip(rollouts, plain, thinking, acting):
        lines = np.stack([line_likelihoods(r, lp), line_likelihoods(p, lp_act)])  # [2, T]
        gains = (lines[0] - lines[1])[r.thinks()]
        shown.append((max(gains, default=-math.inf), r, dict(zip(r.thinks(), lines.T[r.thinks()].tolist()))))
    shown.sort(key=lambda item: -item[0])
    blocks = [f"<pre>{rendered(r, v, HTML, html.escape, lines)}</pre>" for _, r, lines in shown[:6] + shown[6::40]]
    run.samples(title, LEGEND, blocks)
    return metrics, [rendered(r, v, TERMINAL, str, lines) for gain, r, lines in shown[:2] if gain > 0]


HTML, TERMINAL = ("<span class=thought>", "</span>"), ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("", "")


def rendered(r: Rollout, v: Vocabulary, marks: tuple[str, str], escape, lines: dict[int, list[float]]) -> str:
    """A rollout's text with each thought between the two marks, and l_t with and without it."""
    marked = {}
    for t, thought in r.thoughts(v).items():
        note = "   [l_t {:.2f}, without {:.2f}]".format(*lines[t]) if t in lines else ""
        marked[t] = f"\x02{thought.rstrip()}\x03{note}\n"
    return escape(bootstrap_text(r.snippet, marked)).replace("\x02", marks[0]).replace("\x03", marks[1])


@torch.no_grad()
def pass_at_1(model, problems: list[dict], v: Vocabulary, args: Args, ranks: Ranks) -> float:
    """Share of problems (HumanEval's columns) whose greedy completion, up to text in column 0, passes its
    tests."""
    programs, mine, eos = [], problems[ranks.share(len(problems))], v.tokenizer.eos_token_id
    with gathered(model):
        for first in range(0, len(mine), args.rollout_rows):
            batch = mine[first : first + args.rollout_rows]
            ids, mask = pad_left([[v.separator, *v.encode(row["prompt"])] for row in batch], model.device)
            width = ids.shape[1]
            sampler = Sampler(torch.zeros(len(batch), EVAL_TOKENS), width, 0.0, model.device)
            until = Until(lambda ids, width=width: (ids[:, width:] == eos).any(1))
            out = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=EVAL_TOKENS, synced_gpus=False,
                logits_processor=LogitsProcessorList([sampler]), stopping_criteria=StoppingCriteriaList([until]),
            )  # fmt: skip
            rows = [row[: row.index(eos)] if eos in row else row for row in out[:, width:].tolist()]
            for row, text in zip(batch, v.decode(rows)):
                body = re.split(r"^(?=\S)", text, maxsplit=1, flags=re.MULTILINE)[0]
                tests = f"{row['test']}\ncheck({row['entry_point']})"
                programs.append({"code": row["prompt"] + body, "tests": tests})
    passed = [verdict["passed"] for verdict in run_tests(programs, timeout_s=3.0, memory_mb=1024, workers=0)]
    return all_sum(float(sum(passed)), ranks) / len(problems)


def print_end(stages: list[tuple[str, dict]], shown: list[str], run: Run) -> None:
    """What the run did: a row for each metric on held-out data, a column for each stage; then two samples."""
    last = stages[-1][1]
    wanted = [k for k in last if "pass@1" in k or k.startswith("eval/ce_code")]
    wanted += [k for k in last if k.startswith("eval/think_rate") and any(m.get(k, 0) >= 0.005 for _, m in stages)]
    name = max((len(k) for k in wanted), default=5) - len("eval/")
    run.say("\nheld out".ljust(name + 3) + "".join(f"{title:>12}" for title, _ in stages))
    for key in wanted:
        values = "".join(f"{m.get(key, math.nan):12.3f}" for _, m in stages)
        run.say(f"  {key.removeprefix('eval/').ljust(name)}{values}")
    run.say("ce_code: cross-entropy of the code, nats per token, with the model's thoughts; _act: without\n")
    for text in shown:
        run.say("\n".join(text.splitlines()[:16]) + "\n")
    if run.args.algo == "ra3" and not shown:
        run.say("No thought helped: the base model writes no useful comments here, or the penalty is too large.\n")
    run.say(f"samples {run.path}/samples.html   curves {run.path}/curves.png   models {run.path}/checkpoints/")


def bootstrap(model, v: Vocabulary, context: int, run: Run, args: Args, ranks: Ranks) -> None:
    """--bootstrap-only: bootstrapped.jsonl, one object a snippet: text, bootstrapped, latents [{line, text}].

    With --resume auto, an earlier file is continued.
    """
    target, started = run.path / "bootstrapped.jsonl", time.perf_counter()
    # without the last line's end, a run was killed there: that line is torn
    earlier = target.read_text(encoding="utf-8").split("\n")[:-1] if target.exists() else []
    count = first = len(earlier)
    all_sum(0.0, ranks)  # every rank has read the file before rank 0 cuts it
    if ranks.main:
        write_whole(target, "".join(line + "\n" for line in earlier))
    stream = SnippetStream(args, "all", v, context, ranks)
    stream.batch(count)
    while snippets := stream.batch(args.rollout_rows * ranks.world_size):
        lines = []
        (rollouts,) = sample(model, [snippets], "bootstrap", count, v, args, ranks)
        for r in rollouts:
            text, thoughts = r.snippet.text, r.thoughts(v)
            numbers = [text.count("\n", 0, r.snippet.starts[r.snippet.boundaries[t]]) for t in thoughts]
            latents = [{"line": n, "text": z.strip()} for n, z in zip(numbers, thoughts.values())]
            lines.append({"text": text, "bootstrapped": bootstrap_text(r.snippet, thoughts), "latents": latents})
        lines = all_gather_list(lines, ranks)
        count += len(snippets)
        if ranks.main:
            with open(target, "a", encoding="utf-8") as handle:
                handle.writelines(json.dumps(line) + "\n" for line in lines)
        run.say(f"{count} snippets  {(count - first) / (time.perf_counter() - started):.1f}/s")


# ---------------------------------------------------------------- main


def check(args: Args, ranks: Ranks) -> None:
    """UserError for sizes that cannot work, naming the nearest that can."""
    for name in ("rl_batch_size", "ntp_batch_size"):
        size, flag = getattr(args, name), name.replace("_", "-")
        if size <= 0 or size % ranks.world_size:
            nearest = max(ranks.world_size, size // ranks.world_size * ranks.world_size)
            raise UserError(f"--{flag} {size} does not divide by {ranks.world_size} ranks: use {nearest}")
    positive = "em_iterations ntp_updates max_latent_tokens temperature rollout_rows save_every micro_batch_tokens"
    not_negative = "rl_updates return_horizon penalty_warmup eval_every eval_snippets rl_learning_rate"
    check_sizes(args, f"{positive} max_grad_norm", f"{not_negative} ntp_learning_rate weight_decay entropy_coef")
    if args.algo == "ntp" and args.q_model:
        raise UserError("--algo ntp has no thoughts, so it takes no --q-model")
    if args.group_size < 2:
        raise UserError("--group-size must be at least 2: advantages compare rollouts of one snippet")
    if args.dataset_weights and len(args.dataset_weights) != len(args.dataset):
        raise UserError(f"--dataset-weights needs {len(args.dataset)} numbers, one for each --dataset")
    if min(args.dataset_weights, default=1) <= 0:
        raise UserError(f"--dataset-weights must be positive, got {args.dataset_weights}")
    if args.max_snippet_tokens < 4:
        raise UserError(f"--max-snippet-tokens {args.max_snippet_tokens} leaves no room for code")


def dry_run(model, v: Vocabulary, context: int, args: Args, ranks: Ranks) -> None:
    """Print the plan, one bootstrapped snippet and a memory estimate."""
    stream = SnippetStream(args, "M", v, context, ranks)
    snippets = stream.batch(64 * ranks.world_size)
    (rollouts,) = sample(model, [snippets], "dry run", 0, v, args, ranks)
    rows = args.rollout_rows, max(s.width(args.max_latent_tokens) for s in snippets)
    frozen = 0 if args.algo == "ntp" else 4
    memory = memory_plan(args.model, ranks, rows, args.micro_batch_tokens, args.gradient_checkpointing, frozen)
    rl = args.rl_updates if args.algo == "ra3" and not args.q_model else 0
    if ranks.main:
        mean = stream.counts["decisions"] / len(snippets)
        tokens = sum(len(s.ids) for s in snippets) / len(snippets)
        print(
            f"data {', '.join(args.dataset)}; a snippet has {tokens:.0f} tokens and {mean:.1f} decisions on average\n"
            f"{args.em_iterations} EM iteration(s) of {rl} E-step updates ({args.rl_batch_size} snippets x "
            f"{args.group_size} rollouts) and {args.ntp_updates} M-step updates ({args.ntp_batch_size} snippets):\n"
            f"  {args.em_iterations * (rl * args.rl_batch_size + args.ntp_updates * args.ntp_batch_size)} snippets\n"
            f"{memory}\n\n{rendered(rollouts[0], v, TERMINAL, str, {})}"
        )


def bootstrapped(q, stream: SnippetStream, first: int, count: int, v, args: Args, ranks: Ranks):
    """M-step 1, for `count` updates from number `first` on: (this rank's rollouts, seconds, the stream's
    cursor then).

    q is frozen, so several updates are sampled at once: a GPU takes about as long for many rows as for a few.
    """
    at_once = 1 if q is None else max(1, args.rollout_rows * ranks.world_size // args.ntp_batch_size)
    for begin in range(first, first + count, at_once):
        clock = time.perf_counter()
        updates = range(min(at_once, first + count - begin))
        batches = [(stream.batch(args.ntp_batch_size), stream.cursor) for _ in updates]
        rolled = sample(q, [b for b, _ in batches], "M", begin * args.ntp_batch_size, v, args, ranks)
        seconds = (time.perf_counter() - clock) / len(batches)
        yield from ((rollouts, seconds, cursor) for rollouts, (_, cursor) in zip(rolled, batches))


def main(args: Args) -> None:
    ranks = setup(args.seed)
    check(args, ranks)
    name = args.q_model if args.bootstrap_only and args.q_model else args.model
    tokenizer = load_tokenizer(name)
    longest = min(4 * args.max_snippet_tokens, context_of(name))  # of a row with its thoughts
    pi = load_model(name, tokenizer, ranks, longest, recompute=args.gradient_checkpointing)
    v = Vocabulary(tokenizer, pi.config.get_text_config().vocab_size, ranks.device)
    q = None
    if args.algo == "ra3" and not args.bootstrap_only and (args.q_model or not args.dry_run):
        q = load_model(args.q_model or name, tokenizer, ranks, longest, recompute=args.gradient_checkpointing)
        if q.config.get_text_config().vocab_size != pi.config.get_text_config().vocab_size:
            raise UserError(f"--q-model {args.q_model} has another vocabulary than {name}")
    if args.rollout == "drafted" and not (q or pi).can_draft:
        args = replace(args, rollout="forced")
    problems = list(read_rows(args.eval_problems)) if args.eval_problems else []
    if args.dry_run:
        dry_run(q or pi, v, longest, args, ranks)
        return
    run = Run(args, __file__, ranks, [*args.dataset, *filter(None, [args.eval_problems])])
    if args.bootstrap_only:
        bootstrap(pi, v, longest, run, args, ranks)
        return
    snippets = held_out(args, v, longest, ranks)
    run.say(f"model {name}, {sum(p.numel() for p in pi.parameters()) / 1e6:.1f}M parameters; {args.rollout} rollouts")
    run.say(f"data {', '.join(args.dataset)}; held out: {len(snippets)} snippets, {len(problems)} problems")
    learns_q = q is not None and not args.q_model
    total = args.em_iterations * (args.rl_updates * learns_q + args.ntp_updates)
    state = run.state or {
        "update": 0, "iteration": 0, "phase": "E" if learns_q else "M", "done": 0, "optimizer": False, "stages": [],
        "cursors": {"E": (0, 0), "M": (0, 0)},
    }  # fmt: skip
    optimizer, stages, shown, interrupt = None, state["stages"], [], Interrupt(ranks)

    def models() -> dict:  # the one that learns, and the other one if it learns in its turn
        learner, other = (q, pi) if state["phase"] == "E" else (pi, q)
        return {"policy": learner} | ({"frozen": other} if learns_q else {})

    def finish(metrics: dict, cursor, last: bool) -> list[str]:
        """5 log, evaluate, save: the end of an update of the step that `state` names."""
        phase, iteration = state["phase"], state["iteration"] + 1
        state["update"], state["done"], state["optimizer"] = state["update"] + 1, state["done"] + 1, True
        state["cursors"][phase], shown = cursor, []
        evaluated = last or (args.eval_every and state["update"] % args.eval_every == 0)
        if evaluated:
            title = f"after {phase}{iteration}" if last else f"update {state['update']}"
            held, shown = evaluate(models()["policy"], snippets, problems, title, v, args, run)
            metrics |= held
            if last:
                stages.append((title, held))
        metrics |= {"update": state["update"], "phase": phase, "iteration": iteration, **streams[phase].metrics()}
        run.log(metrics, CONSOLE + HELDOUT * evaluated, total, math.isnan(metrics["optim/grad_norm"]))
        if state["update"] == 1 and metrics["data/decisions"] < 1:
            run.say("warning: next to no line can be decided about; is --dataset code? RA3 is then plain prediction")
        if last:
            run.export(models()["policy"], f"em_{iteration:03d}" + "_q" * (phase == "E"))
            run.curves(PANELS)
        if last or state["update"] % args.save_every == 0:
            run.save(state, models(), optimizer)
        return shown

    if run.state:
        optimizer = new_optimizer(models()["policy"], 0.0, args.weight_decay, BETAS) if state["optimizer"] else None
        run.restore(models(), optimizer)  # with its learning rate
    streams = {part: SnippetStream(args, part, v, longest, ranks, state["cursors"][part]) for part in ("E", "M")}
    if not stages:
        held, _ = evaluate(pi, snippets, problems, "before", v, args, run)
        stages.append(("before", held))
        run.log({"update": 0, "phase": state["phase"], **held}, HELDOUT, total)
    try:
        for iteration in range(state["iteration"], args.em_iterations):
            state["iteration"] = iteration
            # E-step: q starts from pi and learns where a thought helps
            if state["phase"] == "E":
                if optimizer is None:
                    copy_weights(pi, q)
                    optimizer = new_optimizer(q, args.rl_learning_rate, args.weight_decay, BETAS)
                for k in range(state["done"], args.rl_updates):
                    batch, number = streams["E"].batch(args.rl_batch_size), iteration * args.rl_updates + k
                    metrics = e_step(q, pi, optimizer, batch, number, v, args, ranks, interrupt)
                    shown = finish(metrics, streams["E"].cursor, k + 1 == args.rl_updates)
                state |= {"phase": "M", "done": 0, "optimizer": False}
                optimizer = None
            # M-step: pi learns the code with q's thoughts
            if optimizer is None:
                optimizer = new_optimizer(pi, args.ntp_learning_rate, args.weight_decay, BETAS)
            first, count = iteration * args.ntp_updates + state["done"], args.ntp_updates - state["done"]
            for rollouts, seconds, cursor in bootstrapped(q, streams["M"], first, count, v, args, ranks):
                metrics = m_step(pi, optimizer, rollouts, seconds, args, ranks, interrupt)
                shown = finish(metrics, cursor, state["done"] + 1 == args.ntp_updates)
            if args.algo == "ra3":  # NTP keeps its optimizer through all iterations
                optimizer = None
            state |= {"phase": "E" if learns_q else "M", "done": 0, "optimizer": optimizer is not None}
    except Stop:
        run.stopped(state, models(), optimizer if state["optimizer"] else None)
    print_end(stages, shown, run)


BETAS = (0.9, 0.95)  # AdamW

if __name__ == "__main__":
    launch(main, tyro.cli(Args, default=TINY_DEFAULTS if "--tiny" in sys.argv else Args()))
