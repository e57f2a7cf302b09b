"""RA3, Reasoning as Action Abstractions: EM mid-training in which RL learns where a thought helps.

Paper: "Learning to Reason as Action Abstractions with Scalable Mid-Training RL", arXiv 2509.25810v2. Sections
and equations are those of version 2; "the other manuscript" is another, probably earlier, text of the paper.

A Python text is cut into actions a_1 .. a_T: a line of code each, with the comments before it. Before every
action the model chooses a latent z_t: *act* (write nothing) or *think* (write one comment line). The algorithm:

  for every EM iteration i, starting from the model pi_i:
    E-step, rl_updates times; q starts as a copy of pi_i, and pi_i itself is frozen:
      1 sample     G rollouts of each snippet: q draws the latents, the lines of code are given
      2 score      r_t = l_t - c [z_t is a thought]; l_t = mean log-likelihood of a_t under pi_i  (4.1)
      3 advantage  r_t + ... + r_{t+4}, minus the mean of this sum over the G rollouts
      4 update     policy gradient on log q(z_t), plus a small entropy bonus
    M-step, ntp_updates times; q is frozen, and pi starts again from pi_i:
      1 sample     one rollout of each snippet: the *bootstrapped* text, code with q's thoughts
      4 update     next-token prediction on it; the result is pi_{i+1}  (4.2)
    5 log, evaluate, save

Notation: pi `pi`, q `q`, z_t latent, a_t action, l_t `line_likelihoods`, c `penalty`, G `group_size`.
Shapes: S snippets of L tokens, G rollouts of each, R = S*G rows of W tokens, T actions of a snippet, N tokens
that q draws, V vocabulary. In one forward pass: B rows, C tokens of each, D hidden size.

Where this differs from the paper, or the paper leaves a choice open (docs/ra3.md has the full list):
  D1 The model decides with the first token of the line itself: a token that begins with "#" opens a thought;
     any other means act, and the line's own token takes its place. So the code keeps its tokens, and the model
     sees the line's indentation when it decides. In the paper it writes "\\n" or "\\n#" after the line before.
  D2 l_t is a mean over the line's tokens. The paper prints a sum; its c = 0.05 fits the mean.
  D3 A malformed thought costs 2 instead of c. In the paper its reward is 0, in the authors' code -2. A hard
     line earns less than that (l_t < -2), so q would learn to write malformed thoughts there.
  D4 The 10 updates without the penalty come once, at the start of the run. The paper does not say when.
  D5 l_t is the likelihood of the line *given* the decision: the probability of its first token is
     renormalised without "#". Otherwise any thought would raise l_t, because pi hardly expects a second "#".

  python ra3.py --tiny                                                     # this machine: no network, no GPU
  python ra3.py --model Qwen/Qwen2.5-1.5B --rl-batch-size 256              # one GPU
  torchrun --nproc_per_node 8 ra3.py --model Qwen/Qwen2.5-1.5B             # the paper's, one EM iteration
"""

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
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from common import (
    EVENT as ACT, LOGITS_PER_CHUNK, TINY, Interrupt, Ranks, Run, Sampler, Stop, UserError, all_gather_list,
    all_sum, cache_argument, check_sizes, column, context_of, copy_weights, eos_ids, gathered, inverse_cdf,
    launch, load_model, load_tokenizer, memory_plan, micro_batches, new_optimizer, only, optimizer_step,
    pad_left, read_on, read_rows, run_tests, setup, token_logprobs, uniforms, write_whole,
)  # fmt: skip


@dataclass
class Args:
    """RA3 mid-training, and next-token prediction (NTP) on the same data. Defaults are the paper's.

    The flags come in groups: run, model and data (from --model on), rollout (from --rollout), algorithm (from
    --algo), optimisation (from --rl-updates), evaluation and saving (from --eval-snippets).
    """

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
    """send metrics and curves to Weights & Biases as well (needs `pip install wandb`)"""
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
    """how often each source is read, relative to the others; empty: equally, or WEIGHTS for the default sources.
    All start again when the first one ends"""
    text_column: str = "text"
    """the column that holds the code"""
    max_snippet_tokens: int = 1024
    """longer texts are cut into several snippets (tokens)"""
    granularity: Literal["line", "snippet"] = "line"
    """the code that follows one latent: a line, or the whole snippet, as in BRiTE"""
    # ---- rollout
    rollout: Literal["drafted", "forced"] = "drafted"
    """drafted: several lines a pass; forced: token by token, always for models without full attention. Same results"""
    max_latent_tokens: int = 16
    """longest thought, its newline included (tokens)"""
    temperature: float = 1.0
    """temperature of q, in sampling and in log q alike"""
    rollout_rows: int = 512
    """rows that one rank rolls out at once; memory and speed only"""
    # ---- algorithm
    algo: Literal["ra3", "ntp"] = "ra3"
    """ntp: the baseline, which is the M-step alone, without thoughts, on the same snippets"""
    em_iterations: int = 1
    """number of EM iterations (the paper's one billion tokens are about 11)"""
    group_size: int = 3
    """G: rollouts of each snippet in the E-step"""
    penalty: float = 0.05
    """c: what a thought must add to the line's mean log-likelihood (nats per token)"""
    penalty_warmup: int = 10
    """E-step updates at the start of the run that use c = 0"""
    return_horizon: int = 5
    """how many rewards a return adds up; 0: all that follow, as in the other manuscript"""
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
    """updates between evaluations; 0: only before training and after each E-step and M-step"""
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
WEIGHTS = {Args.dataset: (0.95, 0.05), TINY_DEFAULTS.dataset: (0.9, 0.1)}  # as the paper's 2.36M : 129K snippets; ours
MALFORMED_PENALTY = 2.0  # nats per token, in place of c (D3)
BETAS = (0.9, 0.95)  # of AdamW
EVAL_TOKENS = 384  # longest completion of an evaluation problem; eval_code.py takes 512


# ---------------------------------------------------------------- data 1: where a thought may stand

MAX_LINE = 10_000  # characters; `tokenize` takes quadratic time on longer lines in some versions
# The length of the match says how far a line is indented. A line that continues the statement above matches as
# a whole: it counts as deeply indented, so that the text is cut there only if it must be
INDENTED = re.compile(r"[ \t\f]*(?:(?:[)\]}]|(?:elif|else|except|finally)\b).*)?")


def cut_text(text: str, max_chars: int) -> Iterator[tuple[str, list[tuple[int, str]] | None, bool]]:
    """A text in pieces of at most max_chars: (piece, its actions, whether the text ends with it).

    The pieces together are the text. It is cut before the least indented action in the second half of what
    fits, else before the last action that fits, else after a line. A text that needs no cut comes with None for
    its actions: every rank reads it, but only the rank that calls `segment` on it needs them. A text with a line of
    more than MAX_LINE characters becomes an empty piece, which counts as unusable.
    """
    if max(map(len, text.split("\n"))) > MAX_LINE:
        yield "", None, True
        return
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


def action_starts(text: str) -> list[tuple[int, str]]:
    """(offset, kind of its code line) of each action: a line of code with the comment, blank and docstring
    lines before it. The offset is that of its first non-blank line.
    """
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


KINDS = {  # kind of a line of code -> how it begins; the first that fits. The metrics split the think rate by it
    "import": r"(import|from)\b",
    "def": r"(def|class|async)\b",
    "return": r"return\b",
    "control": r"(if|elif|else|for|while|try|except|finally|with|assert|raise|del)\b",
    "constant": r"\w+ = (-?\d+(\.\d+)?|'[^']*'|\"[^\"]*\"|True|False|None)\s*$",
    "assign": r".*(?<!=)(==)*=(?!=)",
    "first": r"(?!)",  # a text's first line, whatever it does
    "other": r"",
}


def line_kind(line: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.match(pattern, line.lstrip()))


# ---------------------------------------------------------------- data 2: from text to tokens


# The form of a thought; another one begins with an edit of these three lines (docs/ra3.md names a fork)
OPENING = re.compile(r"[ \t]*#")  # matches a token that opens a thought
THOUGHT = re.compile(r"[ \t]*#[^\n\r\0]*\n")  # a well-formed thought; the first token with a newline ends it
CLOSING = "\n"  # the token that ends a malformed one


class Vocabulary:
    """The tokenizer, and what each token's text means for a thought.

    text                what each token adds to a text
    opens, opens_ids    tokens that open a thought at a decision: bool [V] on the device, and as a set of ids
    ends_ids            tokens that end a thought: they hold a newline, or would break the source in a comment
    broken              those of ends_ids that make any thought malformed
    closing             the token CLOSING
    separator           the first token of every row: bos, or eos if there is none
    """

    def __init__(self, tokenizer, size: int, device) -> None:
        self.tokenizer = tokenizer
        # decoded before every row: SentencePiece drops a first space
        self.anchor = tokenizer("a", add_special_tokens=False).input_ids
        self.anchor_length = len(tokenizer.decode(self.anchor))
        known = min(size, len(tokenizer))
        self.text = self.decode([[i] for i in range(known)])
        self.special = set(tokenizer.all_special_ids)
        names = tokenizer.convert_ids_to_tokens(list(range(known)))
        # after half a character, a byte-fallback decoder (SentencePiece) turns a newline into U+FFFD
        halves = {i for i, name in enumerate(names) if re.fullmatch("<0x[89A-F][0-9A-F]>", name or "")}
        self.broken = self.special | halves | set(range(known, size))  # the last: rows of the embedding, no token
        self.opens_ids = {i for i, text in enumerate(self.text) if OPENING.match(text)}
        self.ends_ids = {i for i, text in enumerate(self.text) if set("\n\r\0") & set(text)} | self.broken
        self.opens = torch.zeros(size, dtype=torch.bool, device=device)
        self.opens[list(self.opens_ids)] = True
        canonical = tokenizer(f"a{CLOSING}", add_special_tokens=False).input_ids[-1]
        closing = [i for i in (canonical, *range(known)) if self.text[i] == CLOSING and i not in self.special]
        if not closing or not self.opens_ids:
            raise UserError("this tokenizer has no token for a newline or for '#': it cannot write a comment")
        self.closing = closing[0]  # the tokenizer's own choice, if that is this text alone
        self.separator = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    def malformed(self, thought: list[int]) -> bool:
        """Whether a thought (its tokens up to the first that ends it, or all that fit) is not well-formed."""
        return thought[-1] in self.broken or not THOUGHT.fullmatch(self.decode([thought])[0])

    def encode(self, text: str, after: str = "") -> list[int]:
        """Tokens of `text` where it follows `after`. Some tokenizers put a space before the start of a text."""
        before = self.tokenizer(after, add_special_tokens=False).input_ids
        both = self.tokenizer(after + text, add_special_tokens=False).input_ids
        return both[len(before) :] if both[: len(before)] == before else self.encode(text)

    def decode(self, rows: list[list[int]]) -> list[str]:
        """Text of each row of tokens, as it is when other text stands before it."""
        rows = [self.anchor + row for row in rows]
        texts = self.tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)
        return [text[self.anchor_length :] for text in texts]

    def starts(self, text: str, ids: Sequence[int]) -> list[int] | None:
        """[len(ids) + 1] character offset where each token begins; None if the tokens do not spell the text.

        Of several tokens that share a character, the first is said to hold it. The tokenizer's own offsets are
        not used: some tokenizers leave white space out of them.
        """
        starts, spelt, pending = [0], "", []
        for place, token in enumerate(ids, start=1):
            pending.append(token)
            piece = self.text[token] if len(pending) == 1 else self.decode([pending])[0]
            # a part of a character: decode the parts together
            if piece.endswith("\ufffd") and len(pending) < 8 and place < len(ids):
                starts.append(len(spelt) + 1)
                continue
            spelt += piece
            pending = []
            starts.append(len(spelt))
        if spelt == " " + text:  # the tokenizer put a space before the text
            return [max(0, start - 1) for start in starts]
        return starts if spelt == text else None


@dataclass
class Snippet:
    """A text, or a part of one. Token k of `ids` is text[starts[k]:starts[k + 1]]."""

    text: str
    source: str
    ids: np.ndarray  # [L] separator, the text's canonical tokens, eos if the text ends here
    starts: np.ndarray  # [L + 1] where each token begins in `text` (characters)
    boundaries: np.ndarray  # [T] index into ids of the first token of each action
    indents: list[list[int]]  # [T] tokens of each action's indentation, written once more after a thought
    kinds: list[str]  # [T] kind of each action's code line, for the metrics

    def width(self, max_latent_tokens: int) -> int:
        """Most tokens that a rollout of this snippet can have."""
        return len(self.ids) + sum(max_latent_tokens + len(indent) for indent in self.indents)


def tokenised(text: str, actions: list[tuple[int, str]], last: bool, source: str, v: Vocabulary) -> Snippet | None:
    """One piece of text with its actions (offset, kind). None if the tokenizer does not give the text back, or if
    the text holds a special token.

    A boundary is the token that holds the first non-space character of an action. If that token also holds the
    end of the line before, or the space that the tokenizer put before the text, the line gets no boundary: it
    belongs to the action before.
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
        else:  # the newline before is in the same token as its beginning
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
    """Cut a piece from cut_text into snippets, which together are the piece; [] if it cannot be used.

    A snippet has at most max_snippet_tokens tokens, and at most `context` with the longest thoughts. What is
    longer is cut in two, before the action nearest to its middle, else after a line, else anywhere. Only the
    end of a text gets eos.
    """
    text, actions, last = piece
    if not text.strip():
        return []
    waiting, snippets = [(0, len(text))], []
    actions = action_starts(text) if actions is None else actions
    while waiting:
        begin, end = waiting.pop()
        own = [(offset - begin, kind) for offset, kind in actions if begin <= offset < end]
        snippet = tokenised(text[begin:end], own, last and end == len(text), source, v)
        if snippet is None:
            return []
        if args.granularity == "snippet":  # the first boundary: the first action may have none
            one = {name: getattr(snippet, name)[:1] for name in ("boundaries", "indents", "kinds")}
            snippet = replace(snippet, **one)
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
    """Snippets of one part of the data: `E` or `M`, endless and in a seeded order; or `all`, once and in order.

    A hash of a text, or of its path, says which part it is in. So E, M and the held-out texts are disjoint,
    and NTP sees what RA3's M-step sees. Every rank reads all texts, but tokenises only its share.
    cursor: (pieces that are used up, snippets of the next piece that are used).
    """

    def __init__(self, args: Args, part: str, v: Vocabulary, context: int, ranks: Ranks, cursor=(0, 0)) -> None:
        self.args, self.part, self.v, self.context, self.ranks = args, part, v, context, ranks
        self.taken, self.skip = cursor
        self.ready: list[tuple[int, int, Snippet]] = []  # (number of its piece, number within it, snippet)
        self.counts, self.tokens = Counter(), Counter()  # tokens: of each source
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
            mine = pieces[self.ranks.share(len(pieces))]
            mine = [segment(piece, source, self.v, self.args, self.context) for piece, source, _ in mine]
            for snippets in all_gather_list(mine, self.ranks):
                self.ready += [(self.taken, i, s) for i, s in enumerate(snippets) if i >= self.skip]
                self.taken, self.skip = self.taken + 1, 0
                self.counts.update(pieces=1, unusable=not snippets)
            if self.counts["pieces"] == self.counts["unusable"] >= 1000:
                limits = f"{self.args.max_snippet_tokens} and --max-latent-tokens {self.args.max_latent_tokens}"
                words = f"none of the first 1000 texts of {', '.join(self.args.dataset)} can be used"
                raise UserError(f"{words} with --max-snippet-tokens {limits}")
        snippets, self.ready = [s for _, _, s in self.ready[:size]], self.ready[size:]
        self.counts.update(snippets=len(snippets), decisions=sum(len(s.kinds) for s in snippets))
        for s in snippets:
            self.tokens[s.source] += len(s.ids)
        return snippets

    def metrics(self) -> dict[str, float]:
        c = self.counts
        unusable, decisions = c["unusable"] / c["pieces"], c["decisions"] / c["snippets"]
        shares = {f"data/token_share/{name}": n / self.tokens.total() for name, n in self.tokens.items()}
        return {"data/unusable": unusable, "data/decisions": decisions, **shares}

    def _pieces(self) -> Iterator[tuple[tuple, str, int]]:
        args = self.args
        if self.part == "all":
            yield from itertools.chain.from_iterable(source_pieces(source, args) for source in args.dataset)
            return
        # E has the share of the texts that it needs, but at least a tenth and at most a half
        e, m = args.rl_updates * args.rl_batch_size, args.ntp_updates * args.ntp_batch_size
        e_share = 1000 * min(0.5, max(0.1, e / max(1, e + m)))
        for epoch in itertools.count():
            # i[2]: the hash of the text; its multiples of 20 are held out
            items = (i for i in interleaved(args) if i[2] % 20 and (i[2] // 20 % 1000 < e_share) == (self.part == "E"))
            items = shuffled(items, random.Random(f"{args.seed} {self.part} {epoch}"))
            first = next(items, None)
            if first is None:
                raise UserError(f"{', '.join(args.dataset)}: no Python text for the {self.part}-step; give more data")
            yield first
            yield from items


def held_out(args: Args, v: Vocabulary, context: int, ranks: Ranks) -> list[Snippet]:
    """eval_snippets snippets of every source, from a twentieth of its texts; the same on all ranks."""
    found = []
    for source in args.dataset:
        items = (item for item in source_pieces(source, args) if item[2] % 20 == 0)
        items = list(itertools.islice(items, 2 * args.eval_snippets))
        random.Random("held out").shuffle(items)
        mine = [segment(piece, name, v, args, context) for piece, name, _ in items[ranks.share(len(items))]]
        found += [s for snippets in all_gather_list(mine, ranks) for s in snippets][: args.eval_snippets]
    return found


def source_pieces(source: str, args: Args) -> Iterator[tuple[tuple, str, int]]:
    """(piece, name of the source in the metrics, hash of the text) for every piece of a source's Python texts."""
    name, *others = (Path(s.split(":")[-1].split("/*")[0]).name.split(".")[0] for s in (source, *args.dataset))
    name = source if others.count(name) > 1 or not name else name
    for row in read_rows(source):
        text = column(row, args.text_column, source)
        language = row.get("lang") or row.get("program_lang") or "python"  # OpenCoder's columns
        if isinstance(text, str) and text.strip() and str(language).lower() == "python":
            text = text.encode("utf-8", "replace").decode()  # lone surrogates
            text = text.removeprefix("\ufeff")  # a comment before a byte order mark would break the source
            key = zlib.crc32(str(row.get("path") or text).encode("utf-8", "replace"))
            for piece in cut_text(text, 4 * args.max_snippet_tokens):
                yield piece, name, key


def interleaved(args: Args) -> Iterator[tuple[tuple, str, int]]:
    """Pieces of all sources, each as often as its weight says, until the first source is exhausted."""
    weights = args.dataset_weights or WEIGHTS.get(args.dataset) or (1.0,) * len(args.dataset)
    sources, owed = [source_pieces(source, args) for source in args.dataset], [0.0] * len(args.dataset)
    while True:
        owed = [o + w for o, w in zip(owed, weights)]
        chosen = owed.index(max(owed))
        owed[chosen] -= sum(weights)
        item = next(sources[chosen], None)
        if item is None:
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

FORCED = -2  # in `targets`: a token that q did not choose. ACT stands for "any token but one that opens a thought"
DRAFT = 4  # decisions of a row that share a forward pass; memory and speed only
ARRAYS = ("ids", "targets", "actions", "expert")  # of a Rollout, one value for each of its tokens


@dataclass
class Rollout:
    """One rolled-out snippet: the separator, then the code with q's thoughts in it. The ARRAYS are [W]."""

    snippet: Snippet
    thoughts: dict[int, list[int]]  # action -> the tokens of the thought that q drew before it
    malformed: list[int]  # the actions whose thought had to be closed
    ids: np.ndarray
    targets: np.ndarray  # what q drew at this place: a token, ACT for act, or FORCED if nothing
    actions: np.ndarray  # the action that a token belongs to; a thought belongs to the action after it; -1: none
    expert: np.ndarray  # bool: a token of the code
    advantages: np.ndarray | None = None  # [T]

    def without_malformed(self) -> "Rollout":
        """The same without its malformed thoughts, as if q had acted there."""
        keep = self.expert | ~np.isin(self.actions, self.malformed)
        thoughts = {t: thought for t, thought in self.thoughts.items() if t not in self.malformed}
        return Rollout(self.snippet, thoughts, [], *(getattr(self, name)[keep] for name in ARRAYS))

    def texts(self, v: Vocabulary) -> dict[int, str]:
        """Action -> text of its thought, newline included; well-formed thoughts only."""
        thoughts = self.without_malformed().thoughts
        return dict(zip(thoughts, v.decode(list(thoughts.values()))))


def all_act(s: Snippet) -> Rollout:
    """The rollout in which q always acts: the plain snippet."""
    size = len(s.ids)
    targets = np.full(size, FORCED)
    targets[s.boundaries] = ACT
    actions = np.searchsorted(s.boundaries, np.arange(size), side="right") - 1
    return Rollout(s, {}, [], s.ids, targets, actions, np.arange(size) > 0)


def written(s: Snippet, t: int, drawn: list[int], v: Vocabulary) -> list[int]:
    """What stands before action t if q drew this thought: the thought, then the indentation once more.

    A malformed thought is closed: its last token becomes CLOSING.
    """
    return [*drawn[:-1], v.closing if v.malformed(drawn) else drawn[-1], *s.indents[t]]


def rolled_out(s: Snippet, thoughts: dict[int, list[int]], v: Vocabulary) -> Rollout:
    """The rollout in which q drew these thoughts, and act before every other action."""
    r = all_act(s)
    r.thoughts, r.malformed = thoughts, [t for t, drawn in thoughts.items() if v.malformed(drawn)]
    for t, drawn in sorted(thoughts.items(), reverse=True):  # from the end, so that earlier places stay
        tokens = written(s, t, drawn, v)
        places = [s.boundaries[t]] * len(tokens)
        r.targets[s.boundaries[t]] = FORCED
        r.ids = np.insert(r.ids, places, tokens)
        r.targets = np.insert(r.targets, places, drawn + [FORCED] * len(s.indents[t]))
        r.actions = np.insert(r.actions, places, t)
        r.expert = np.insert(r.expert, places, False)
    return r


def turns(s: Snippet, thoughts: dict[int, list[int]], v: Vocabulary, longest: int):
    """Writes one snippet, as a coroutine: it is sent the token that q draws at the next place, and yields the
    token to write there. It notes in `thoughts` what q drew: action -> tokens.
    """
    action_at = {boundary: t for t, boundary in enumerate(s.boundaries.tolist())}
    drawn = yield
    for place, token in enumerate(s.ids[1:].tolist(), start=1):
        t = action_at.get(place)
        if t is not None and drawn in v.opens_ids:  # q thinks
            thoughts[t] = [drawn]
            while not (drawn in v.ends_ids or len(thoughts[t]) == longest):
                drawn = yield drawn
                thoughts[t].append(drawn)
            for forced in written(s, t, thoughts[t], v)[len(thoughts[t]) - 1 :]:  # its last token, the indentation
                drawn = yield forced
        drawn = yield token
    while True:  # other rows are longer
        yield v.tokenizer.eos_token_id


class Forcing(LogitsProcessor):
    """Lets `generate` write what the rows' coroutines say. The token in column p is drawn with noise[:, p]."""

    def __init__(self, rows: list, noise: torch.Tensor, temperature: float) -> None:
        self.rows, self.noise, self.temperature = rows, noise, temperature
        for row in rows:
            next(row)  # to its first yield

    def __call__(self, input_ids, scores):
        probs = (scores.float() / self.temperature).softmax(-1)
        drawn = inverse_cdf(probs, self.noise[:, input_ids.shape[1]]).tolist()
        tokens = [row.send(token) for row, token in zip(self.rows, drawn)]
        return only(torch.tensor(tokens, device=scores.device), scores)


def rollout_forced(model, snippets: list[Snippet], noise, v: Vocabulary, args: Args) -> list[Rollout]:
    """Token by token, for every architecture: one call of `generate` writes all snippets."""
    thoughts: list[dict] = [{} for _ in snippets]
    rows = [turns(s, own, v, args.max_latent_tokens) for s, own in zip(snippets, thoughts)]
    ids = torch.tensor([[int(s.ids[0])] for s in snippets], device=noise.device)
    model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=noise.shape[1] - 1, synced_gpus=False,
        logits_processor=LogitsProcessorList([Forcing(rows, noise, args.temperature)]),
        eos_token_id=v.tokenizer.eos_token_id,
    )  # fmt: skip
    return [rolled_out(s, own, v) for s, own in zip(snippets, thoughts)]


@dataclass
class Draft:
    """How far rollout_drafted has come in one row."""

    snippet: Snippet
    thoughts: dict[int, list[int]]  # that q drew
    turn: int = 0  # the next action
    code: int = 0  # tokens of the code that are read
    read: int = 0  # tokens of the row that are read
    unread: Sequence[int] = ()  # a thought and the indentation after it: written, but not read


def rollout_drafted(model, snippets: list[Snippet], noise, v: Vocabulary, args: Args) -> list[Rollout]:
    """The same rollouts in fewer passes, for models whose only state is attention to all tokens.

    One pass reads the code before the next DRAFT actions of each row, as if q acted before all of them, and
    draws these decisions. Those up to a row's first thought hold; what was read after it is masked in the
    cache for good. `generate` writes the thought on a copy of the cache.
    """
    device, cache = model.device, DynamicCache(config=model.config)
    rows = going = [Draft(s, {}) for s in snippets]  # going: those that have actions left
    mask = torch.zeros(len(rows), 0, dtype=torch.long, device=device)
    while True:
        keep = [k for k, row in enumerate(going) if row.turn < len(row.snippet.boundaries)]
        if not keep:
            return [rolled_out(row.snippet, row.thoughts, v) for row in rows]
        if len(keep) < len(going):
            index = torch.tensor(keep, device=device)
            cache.reorder_cache(index)
            going, mask, noise = [going[k] for k in keep], mask[index], noise[index]
        ahead = [row.snippet.boundaries[row.turn : row.turn + DRAFT] for row in going]
        chunks = [[*row.unread, *row.snippet.ids[row.code : to[-1]].tolist()] for row, to in zip(going, ahead)]
        hidden = model.run(read_on, chunks, [row.read for row in going], mask, cache)  # [B, C, D]
        # a chunk ends where its last boundary is; the others are counted back from there
        decisions = [(k, boundary - to[-1]) for k, to in enumerate(ahead) for boundary in to]
        index, back = torch.tensor(decisions, device=device).T  # [N]
        ends = torch.tensor([row.read + len(chunk) for row, chunk in zip(going, chunks)], device=device)  # [B]
        drawn = iter(draw(model, hidden[index, back - 1], noise[index, ends[index] + back], args).tolist())  # [N]
        thinking, holds = [], np.zeros(hidden.shape[:2], dtype=np.int64)  # [B, C] 1: stays in the cache
        for k, (row, to, chunk) in enumerate(zip(going, ahead, chunks)):
            tokens = list(itertools.islice(drawn, len(to)))
            acts = next((i for i, token in enumerate(tokens) if token in v.opens_ids), len(to))
            row.code = to[min(acts, len(to) - 1)]
            wasted = to[-1] - row.code  # tokens that were read after the place of the thought
            holds[k, holds.shape[1] - len(chunk) : holds.shape[1] - wasted] = 1
            row.turn, row.read, row.unread = row.turn + acts, row.read + len(chunk) - wasted, ()
            if acts < len(to):
                thinking.append((k, tokens[acts], row.read))
        mask = torch.cat([mask, torch.from_numpy(holds).to(device)], 1)
        if thinking:
            index, token, place = torch.tensor(thinking, device=device).T
            for k, thought in zip(index.tolist(), think(model, cache, mask, index, token, noise, place, v, args)):
                row = going[k]
                row.thoughts[row.turn], row.unread = thought, written(row.snippet, row.turn, thought, v)
                row.turn += 1


def draw(model, hidden, noise, args: Args) -> torch.Tensor:
    """Tokens [N] that q draws after hidden states [N, D] with noise [N]."""
    head, size = model.get_output_embeddings(), max(1, LOGITS_PER_CHUNK // model.config.get_text_config().vocab_size)
    parts = zip(hidden.split(size), noise.split(size))
    return torch.cat([inverse_cdf((head(h).float() / args.temperature).softmax(-1), u) for h, u in parts])


def think(model, cache, mask, index, token, noise, place, v: Vocabulary, args: Args) -> list[list[int]]:
    """What q draws in the rows `index` [B] of the cache: a thought that begins with `token` [B] at `place` [B].

    noise: of all rows of the cache. The cache itself stays as it is.
    """
    own = copy.copy(cache)  # shallow copies are enough: reordering makes new tensors
    own.layers = [copy.copy(layer) for layer in cache.layers]
    own.reorder_cache(index)
    ids = torch.cat([torch.zeros_like(mask[index]), token[:, None]], 1)  # what is in the cache needs no ids
    mask, start = torch.cat([mask[index], torch.ones_like(token)[:, None]], 1), ids.shape[1]
    places = place[:, None] + torch.arange(1, args.max_latent_tokens, device=place.device)
    own_noise = noise[index].gather(1, places)
    if args.max_latent_tokens > 1:
        ids = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=args.max_latent_tokens - 1, synced_gpus=False,
            logits_processor=LogitsProcessorList([Sampler(own_noise, start, args.temperature, noise.device)]),
            eos_token_id=sorted(v.ends_ids), **{cache_argument(model): own},
        )  # fmt: skip
    thoughts = ids[:, start - 1 :].tolist()
    ends = [next((i for i, token in enumerate(row) if token in v.ends_ids), len(row)) for row in thoughts]
    return [row[: end + 1] for row, end in zip(thoughts, ends)]


@torch.no_grad()
def sample(
    model, batches: list[list[Snippet]], key: str, first: int, v: Vocabulary, args: Args, ranks: Ranks,
    stop=lambda: None,
) -> list[list[Rollout]]:  # fmt: skip
    """This rank's rollouts of each of the global batches, all sampled at once. Without a model q always acts.

    The snippets are numbered from `first` on, through all batches. Each has the noise of (seed, key, number),
    so that draws are the same on any number of ranks. Rows of similar length are rolled out together.
    stop: called before each of these rollouts, by every rank equally often; it may raise Stop.
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
                stop()
                snippets, own = zip(*rows[begin : begin + args.rollout_rows])
                widths = [s.width(args.max_latent_tokens) + 1 for s in snippets]
                noise = [uniforms([width], args.seed, key, n) for width, n in zip(widths, own)]
                noise = pad_sequence(noise, batch_first=True).to(model.device)  # [R, W]
                rollouts.update(zip(own, roll(model, snippets, noise, v, args)))
    return [[rollouts[number] for _, number in share] for share in shares]


# ---------------------------------------------------------------- 2 score


@torch.no_grad()
def expert_logprobs(model, rollouts: list[Rollout], v: Vocabulary, args: Args) -> list[np.ndarray]:
    """Log-probability of each token of the code given all before it, thoughts included: [2, tokens] a rollout.

    The second row is given the decisions (D5): the first token of an action is conditioned on not opening a thought,
    log p minus the log-probability of act, unless the code itself has a comment there. Equal rows are scored once.
    """
    keys = [r.ids.tobytes() + r.expert.tobytes() for r in rollouts]
    distinct, scored = list(dict(zip(keys, rollouts)).items()), {}
    with gathered(model):
        for batch in micro_batches([len(r.ids) for _, r in distinct], args.micro_batch_tokens):
            own_keys, chosen = zip(*(distinct[i] for i in batch))
            code = [np.flatnonzero(r.expert) for r in chosen]
            # where the probability of act is wanted, too
            acts = [c[np.diff(r.actions[c], prepend=-1) > 0] for r, c in zip(chosen, code)]
            acts = [a[~np.isin(r.ids[a], list(v.opens_ids))] for r, a in zip(chosen, acts)]
            targets = [np.append(r.ids[c], np.full(len(a), ACT)) for r, c, a in zip(chosen, code, acts)]
            where = [np.append(c, a) for c, a in zip(code, acts)]
            logprobs, _ = token_logprobs(
                model, [r.ids for r in chosen], where, event=~v.opens,
                targets=torch.from_numpy(np.concatenate(targets)).to(v.opens.device),
            )  # fmt: skip
            parts = np.split(logprobs.double().cpu().numpy(), np.cumsum(list(map(len, where)))[:-1])
            for key, c, a, part in zip(own_keys, code, acts, parts):
                scored[key] = np.stack([part[: len(c)]] * 2)
                scored[key][1, np.searchsorted(c, a)] -= part[len(c) :]
    return [scored[key] for key in keys]


def line_likelihoods(rollout: Rollout, logprobs: np.ndarray) -> np.ndarray:
    """l_t of every action [T]: the mean of the log-probabilities of its tokens (D2)."""
    actions = rollout.actions[rollout.expert]
    return np.array([logprobs[actions == t].mean() for t in range(len(rollout.snippet.boundaries))])


def step_rewards(rollout: Rollout, logprobs: np.ndarray, penalty: float) -> np.ndarray:
    """r_t of every action [T], eq. (4.1) with the fixed penalty of Algorithm 1 in place of the KL."""
    costs = np.zeros(len(rollout.snippet.boundaries))
    costs[list(rollout.thoughts)] = penalty
    costs[rollout.malformed] = MALFORMED_PENALTY  # D3
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
    if horizon == 0:
        return to_the_end
    return to_the_end - torch.nn.functional.pad(to_the_end, (0, horizon))[..., horizon:]


def group_baseline_advantages(returns: torch.Tensor) -> torch.Tensor:
    """Return minus its mean over the G rollouts of the same snippet at the same step; [..., G, T] -> same.

    The code is the same in all rollouts, so the steps align. Section 5 of the paper (b(s_t), after Algorithm 1).
    """
    return returns - returns.mean(-2, keepdim=True)


# ---------------------------------------------------------------- 4 update


def policy_gradient_loss(model, rollouts: list[Rollout], v: Vocabulary, args: Args, decisions: float):
    """This micro-batch's part of the E-step loss, and the sum of its entropies (nats).

    loss = - (1 / decisions) sum_t A_t log q(z_t) - entropy_coef * mean entropy; log q(z_t) sums over the
    tokens of z_t, and `decisions` is the number of z_t in the whole global batch. Only latents get logits. There
    is one update per batch, so no ratio and no clipping.
    """
    where = [np.flatnonzero(r.targets != FORCED) for r in rollouts]
    latents = list(zip(rollouts, where))
    targets = np.concatenate([r.targets[w] for r, w in latents])
    advantages = np.concatenate([r.advantages[r.actions[w]] for r, w in latents])
    first = np.concatenate([np.diff(r.actions[w], prepend=-1) > 0 for r, w in latents])  # tokens that decide
    targets, advantages, first = (torch.from_numpy(a).to(v.opens.device) for a in (targets, advantages, first))  # [N]
    logprobs, entropy = token_logprobs(  # in the entropy of a decision, all tokens that mean act are one outcome
        model, [r.ids for r in rollouts], where, targets=targets, event=~v.opens, merged=first,
        temperature=args.temperature, entropy=True,
    )  # fmt: skip
    loss = -(advantages.float() * logprobs).sum() - args.entropy_coef * entropy.sum()
    return loss / decisions, entropy.detach().sum()


def ntp_loss(model, rollouts: list[Rollout], mask_latents: bool, tokens: float):
    """This micro-batch's part of the M-step loss: mean negative log-likelihood per token (nats), eq. (4.2).

    tokens: how many the whole global batch trains on. Also returns the sum of the losses of the code's tokens.
    """
    where = [np.flatnonzero(r.expert) if mask_latents else np.arange(1, len(r.ids)) for r in rollouts]
    expert = torch.from_numpy(np.concatenate([r.expert[w] for r, w in zip(rollouts, where)])).to(model.device)
    logprobs, _ = token_logprobs(model, [r.ids for r in rollouts], where)
    return -logprobs.sum() / tokens, -logprobs.detach()[expert].sum()  # eq. (4.2)


def update(model, optimizer, rollouts, loss_of, args: Args, ranks: Ranks, interrupt: Interrupt):
    """One optimizer step on all ranks' rollouts: (global loss, sum of the second value, gradient norm).

    loss_of(rollouts) -> (part of the global loss, a sum to report). If the loss or the gradient is not finite,
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


# ---------------------------------------------------------------- one update of either step


def e_step(q, pi, optimizer, snippets, number: int, v, args: Args, ranks: Ranks, interrupt: Interrupt) -> dict:
    """E-step update `number` on the global batch `snippets`: q learns, pi scores. Returns metrics."""
    G, clock = args.group_size, [time.perf_counter()]
    # 1 sample
    rows = [s for s in snippets for _ in range(G)]  # groups of G
    (rollouts,) = sample(q, [rows], "E", number * len(rows), v, args, ranks, interrupt.check)  # R
    clock.append(time.perf_counter())
    interrupt.check()
    # 2 score; also the snippets without thoughts, for `reward/gain`
    plain = [all_act(r.snippet) for r in rollouts[::G]]
    logprobs = [given for _, given in expert_logprobs(pi, rollouts + plain, v, args)]
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
    sums = all_sum(rollout_sums(rollouts) | {"reward": rewards.sum().item(), "act": act_rewards}, ranks)
    decisions = max(1, sums["decisions"])

    def loss_of(part):
        return policy_gradient_loss(q, part, v, args, decisions)

    _, entropy, norm = update(q, optimizer, rollouts, loss_of, args, ranks, interrupt)
    clock.append(time.perf_counter())
    return {
        "reward/mean": sums["reward"] / decisions, "reward/gain": (sums["reward"] - sums["act"]) / decisions,
        "reward/penalty": penalty, "policy/entropy": entropy / decisions, "optim/grad_norm": norm,
        **shared_metrics(sums, clock),
    }  # fmt: skip


def bootstrapped(q, stream: SnippetStream, first: int, count: int, v, args: Args, ranks: Ranks, stop=lambda: None):
    """M-step 1 for `count` updates, numbered from `first`: yields (this rank's rollouts, seconds, cursor).

    q is frozen, so several updates are sampled at once: a GPU takes about as long for many rows as for a few.
    """
    at_once = 1 if q is None else max(1, args.rollout_rows * ranks.world_size // args.ntp_batch_size)
    for begin in range(first, first + count, at_once):
        clock = time.perf_counter()
        updates = range(min(at_once, first + count - begin))
        batches = [(stream.batch(args.ntp_batch_size), stream.cursor) for _ in updates]
        rolled = sample(q, [b for b, _ in batches], "M", begin * args.ntp_batch_size, v, args, ranks, stop)
        seconds = (time.perf_counter() - clock) / len(batches)
        yield from ((rollouts, seconds, cursor) for rollouts, (_, cursor) in zip(rolled, batches))


def m_step(pi, optimizer, rollouts: list[Rollout], seconds: float, args: Args, ranks: Ranks, interrupt) -> dict:
    """One M-step update of pi on this rank's rollouts, which took `seconds` to sample. Returns metrics."""
    now = time.perf_counter()
    clock = [now - seconds, now, now]  # nothing to score
    sums = rollout_sums(rollouts)
    rollouts = [r.without_malformed() for r in rollouts]
    sums["trained"] = sum(r.expert.sum() if args.mask_latents else len(r.ids) - 1 for r in rollouts)
    sums = all_sum(sums, ranks)

    def loss_of(part):
        return ntp_loss(pi, part, args.mask_latents, sums["trained"])

    # 4 update
    loss, code_loss, norm = update(pi, optimizer, rollouts, loss_of, args, ranks, interrupt)
    clock.append(time.perf_counter())
    return {
        "train/loss": loss, "train/ce_code": code_loss / sums["expert_tokens"], "optim/grad_norm": norm,
        **shared_metrics(sums, clock),
    }  # fmt: skip


# ---------------------------------------------------------------- 5 log, evaluate, save

CONSOLE = (
    "{phase}", "gain {reward/gain:+.3f}", "loss {train/loss:.3f}", "think {rollout/think_rate:5.1%}",
    "format {rollout/format_rate:.0%}", "grad {optim/grad_norm:.2f}",
    "{time/rollout_s:.1f} + {time/score_s:.1f} + {time/update_s:.1f} s", "{perf/tokens_per_s:.0f} tokens/s",
    "{perf/peak_memory_gib:.1f} GiB", "held-out ce {eval/ce_code:.4f}", "pass@1 {eval/pass@1:.3f}",
)  # fmt: skip
KINDS_SHOWN = {f"rollout/think_rate/{kind}": kind for kind in ("constant", "assign", "return")}
PANELS = (
    ("reward per line, over never thinking (nats)", {"reward/gain": "E-step"}, "update"),
    ("think rate", {"rollout/think_rate": "all lines"} | KINDS_SHOWN, "update"),
    ("cross-entropy of the code, training (nats per token)", {"train/ce_code": "M-step"}, "update"),
    ("cross-entropy of held-out code (nats per token)",
     {"eval/ce_code": "with its thoughts", "eval/ce_code_act": "without"}, "update"),
    ("pass@1, greedy", {"eval/pass@1": ""}, "update"),
    ("share of thoughts that are well-formed", {"rollout/format_rate": ""}, "update"),
    ("reward over wall time", {"reward/gain": "E-step"}, "time/wall_s"),
)  # fmt: skip
LEGEND = (
    "Thoughts in green. After each: l_t, the next line's mean log-likelihood per token; then l_t without any thought."
)


def rollout_sums(rollouts: list[Rollout]) -> dict[str, float]:
    """Counts to be added up over ranks, with the same keys on all; two of them also by kind of line."""
    decisions = Counter(kind for r in rollouts for kind in r.snippet.kinds)
    thoughts = Counter(r.snippet.kinds[t] for r in rollouts for t in r.thoughts)
    return {
        "decisions": decisions.total(), "thoughts": thoughts.total(),
        "malformed": sum(len(r.malformed) for r in rollouts),
        "latent_tokens": sum(len(thought) for r in rollouts for thought in r.thoughts.values()),
        "tokens": sum(len(r.ids) for r in rollouts), "expert_tokens": sum(int(r.expert.sum()) for r in rollouts),
        **{f"decisions/{kind}": decisions[kind] for kind in KINDS},
        **{f"thoughts/{kind}": thoughts[kind] for kind in KINDS},
    }  # fmt: skip


def think_rates(sums: dict[str, float], name: str) -> dict[str, float]:
    """Share of decisions to think, for each kind of line that there is."""
    kinds = [kind for kind in KINDS if sums[f"decisions/{kind}"]]
    return {f"{name}/{kind}": sums[f"thoughts/{kind}"] / sums[f"decisions/{kind}"] for kind in kinds}


def shared_metrics(sums: dict[str, float], clock: list[float]) -> dict[str, float]:
    """Metrics of both steps. clock: when the rollout, the score and the update began, and when it ended (s)."""
    seconds = np.diff(clock)
    return {
        "rollout/think_rate": sums["thoughts"] / max(1, sums["decisions"]),
        "rollout/format_rate": 1 - sums["malformed"] / max(1, sums["thoughts"]),
        "rollout/latent_tokens": sums["latent_tokens"] / max(1, sums["thoughts"]),
        **think_rates(sums, "rollout/think_rate"), "perf/tokens_per_s": sums["tokens"] / sum(seconds),
        **dict(zip(("time/rollout_s", "time/score_s", "time/update_s"), seconds)),
    }  # fmt: skip


def evaluate(model, snippets, problems, title: str, v: Vocabulary, args: Args, run: Run) -> tuple[dict, list[str]]:
    """Cross-entropy (nats per token) of held-out code with the model's own thoughts and without; their gain; pass@1.

    The noise is the same every time. Malformed thoughts are left out, as in the M-step. Returns the metrics and
    the texts of the two snippets in which a thought helped most.
    """
    (drawn,) = sample(model, [snippets], "eval", 0, v, args, run.ranks)
    rollouts, plain = [r.without_malformed() for r in drawn], [all_act(r.snippet) for r in drawn]
    thinking, acting = (expert_logprobs(model, rows, v, args) for rows in (rollouts, plain))
    metrics, totals = {}, Counter()
    for source in sorted({s.source for s in snippets}):
        mine = [i for i, r in enumerate(drawn) if r.snippet.source == source]
        sums = rollout_sums([drawn[i] for i in mine])
        for name, logprobs in (("ce_code", thinking), ("ce_code_act", acting)):
            sums[name] = -sum(logprobs[i][0].sum() for i in mine)
        sums = all_sum(sums, run.ranks)
        totals.update(sums)
        for name in ("ce_code", "ce_code_act"):
            metrics[f"eval/{name}"] = totals[name] / totals["expert_tokens"]  # of the sources so far
            metrics[f"eval/{name}/{source}"] = sums[name] / sums["expert_tokens"]
        metrics |= think_rates(sums, f"eval/think_rate/{source}")
    if problems:
        metrics["eval/pass@1"] = pass_at_1(model, problems, v, args, run.ranks)
    samples, gains = [], []
    for r, p, (_, given), (_, given_act) in zip(rollouts, plain, thinking, acting):
        lines, lines_act = line_likelihoods(r, given), line_likelihoods(p, given_act)
        gains.extend(lines - lines_act)
        marked = {  # the marks become HTML
            t: f"\x02{text.rstrip()}\x03   [l_t {lines[t]:.2f}, without {lines_act[t]:.2f}]\n"
            for t, text in r.texts(v).items()
        }
        samples.append((max((lines - lines_act)[list(marked)], default=-math.inf), bootstrap_text(r.snippet, marked)))
    gain, decisions = all_sum([float(sum(gains)), len(gains)], run.ranks)
    metrics |= {"eval/gain": gain / decisions} if decisions else {}
    samples.sort(key=lambda item: -item[0])
    blocks = [f"<pre>{html.escape(text)}</pre>" for _, text in samples[:6] + samples[6::40]]
    blocks = [block.replace("\x02", "<span class=thought>").replace("\x03", "</span>") for block in blocks]
    run.samples(title, LEGEND, blocks)
    return metrics, [re.sub("[\x02\x03]", "", text) for gain, text in samples[:2] if gain > 0]


@torch.no_grad()
def pass_at_1(model, problems: list[dict], v: Vocabulary, args: Args, ranks: Ranks) -> float:
    """Share of problems (HumanEval's columns) whose greedy completion, up to text in column 0, passes its tests."""
    programs, mine, eos = [], problems[ranks.share(len(problems))], eos_ids(v.tokenizer, args.model)
    with gathered(model):
        for first in range(0, len(mine), args.rollout_rows):
            batch = mine[first : first + args.rollout_rows]
            ids, mask = pad_left([[v.separator, *v.encode(row["prompt"])] for row in batch], model.device)
            out = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=EVAL_TOKENS, eos_token_id=[*eos], synced_gpus=False
            )
            for row, tokens in zip(batch, out[:, ids.shape[1] :].tolist()):
                (text,) = v.decode([list(itertools.takewhile(lambda token: token not in eos, tokens))])
                body = re.split(r"^(?=\S)", text, maxsplit=1, flags=re.MULTILINE)[0]
                tests = f"{row['test']}\ncheck({row['entry_point']})"
                programs.append({"code": row["prompt"] + body, "tests": tests})
    passed = [verdict["passed"] for verdict in run_tests(programs, timeout_s=3.0, memory_mb=1024, workers=0)]
    return all_sum(float(sum(passed)), ranks) / len(problems)


def print_end(stages: list[tuple[str, dict]], shown: list[str], run: Run) -> None:
    """What the run did: the metrics on held-out data before and after each step; then two samples."""
    last = stages[-1][1]
    keys = [k for k in sorted(last) if "think_rate" not in k or any(m[k] >= 0.005 for _, m in stages)]
    width = max(map(len, keys), default=10)
    run.say(f"\n{'held out':{width}}" + "".join(f"{title:>12}" for title, _ in stages))
    for key in keys:
        run.say(f"{key:{width}}" + "".join(f"{m[key]:12.3f}" for _, m in stages))
    run.say("ce_code: cross-entropy of the code, nats per token, with the model's thoughts; _act: without")
    run.say("gain: what its thoughts add to a line's mean log-likelihood, given the decisions to think or act\n")
    if run.args.algo == "ra3" and run.args.model == TINY_DEFAULTS.model and "eval/pass@1" in last:
        run.say("Next-token prediction alone (--algo ntp) ends with pass@1 0.06 to 0.15, see README.md\n")
    for text in shown:
        run.say("\n".join(text.splitlines()[:16]) + "\n")
    if run.args.algo == "ra3" and last.get("eval/gain", 1) <= 0:
        run.say("Thoughts did not help: the base model writes no useful comments here, or the penalty is too large.\n")
    run.say(f"samples {run.path}/samples.html   curves {run.path}/curves.png   models {run.path}/checkpoints/")


def bootstrap(model, v: Vocabulary, context: int, run: Run, args: Args, ranks: Ranks) -> None:
    """--bootstrap-only: bootstrapped.jsonl, one object a snippet: text, bootstrapped, latents [{line, text}].

    With --resume auto, an earlier file is continued.
    """
    target = run.path / "bootstrapped.jsonl"
    # a last line without its end is torn: the run was killed there
    earlier = target.read_text(encoding="utf-8").split("\n")[:-1] if target.exists() else []
    all_sum(0.0, ranks)  # every rank has read the file before rank 0 cuts it
    if ranks.main:
        write_whole(target, "".join(line + "\n" for line in earlier))
    stream, count = SnippetStream(args, "all", v, context, ranks), len(earlier)
    size = args.rollout_rows * ranks.world_size
    for begin in range(0, count, size):  # those that the file holds
        stream.batch(min(size, count - begin))
    while snippets := stream.batch(size):
        lines = []
        (rollouts,) = sample(model, [snippets], "bootstrap", count, v, args, ranks)
        for r in rollouts:
            text, thoughts = r.snippet.text, r.texts(v)
            numbers = [text.count("\n", 0, r.snippet.starts[r.snippet.boundaries[t]]) for t in thoughts]
            latents = [{"line": n, "text": thought.strip()} for n, thought in zip(numbers, thoughts.values())]
            lines.append({"text": text, "bootstrapped": bootstrap_text(r.snippet, thoughts), "latents": latents})
        lines = all_gather_list(lines, ranks)
        count += len(snippets)
        if ranks.main:
            with open(target, "a", encoding="utf-8") as handle:
                handle.writelines(json.dumps(line) + "\n" for line in lines)
        run.say(f"{count} snippets")
    if not count:
        raise UserError(f"no text of {', '.join(args.dataset)} can be used")


# ---------------------------------------------------------------- main


def check(args: Args, ranks: Ranks) -> None:
    """UserError for sizes that cannot work, naming the nearest that can."""
    n = ranks.world_size
    for flag, size in (("rl", args.rl_batch_size), ("ntp", args.ntp_batch_size)):
        if size <= 0 or size % n:
            raise UserError(f"--{flag}-batch-size {size} does not divide by {n} rank(s): use {max(n, size // n * n)}")
    positive = "em_iterations ntp_updates max_latent_tokens temperature rollout_rows save_every micro_batch_tokens"
    not_negative = "rl_updates return_horizon penalty_warmup eval_every eval_snippets rl_learning_rate"
    check_sizes(args, f"{positive} max_grad_norm", f"{not_negative} ntp_learning_rate weight_decay entropy_coef")
    weights, sources = args.dataset_weights, len(args.dataset)
    wrong = {
        "--algo ntp has no thoughts, so it takes no --q-model": args.algo == "ntp" and args.q_model,
        "--group-size must be at least 2: advantages compare rollouts of one snippet": args.group_size < 2,
        "--dataset needs at least one source": not sources,
        f"--dataset-weights needs {sources} numbers, one for each --dataset": weights and len(weights) != sources,
        f"--dataset-weights must be positive, got {weights}": min(weights, default=1) <= 0,
        f"--max-snippet-tokens {args.max_snippet_tokens} leaves no room for code": args.max_snippet_tokens < 4,
    }
    for message, found in wrong.items():
        if found:
            raise UserError(message)


def dry_run(model, v: Vocabulary, context: int, args: Args, ranks: Ranks) -> None:
    """Print the plan, one bootstrapped snippet and a memory estimate."""
    stream = SnippetStream(args, "M", v, context, ranks)
    snippets = stream.batch(64 * ranks.world_size)
    (rollouts,) = sample(model, [snippets], "dry run", 0, v, args, ranks)
    rows = args.rollout_rows, max(s.width(args.max_latent_tokens) for s in snippets)
    frozen = 0 if args.algo == "ntp" else 4  # bytes per parameter
    memory = memory_plan(args.model, ranks, rows, args.micro_batch_tokens, args.gradient_checkpointing, frozen)
    rl = args.rl_updates if args.algo == "ra3" and not args.q_model else 0
    tokens, decisions = sum(len(s.ids) for s in snippets) / len(snippets), stream.metrics()["data/decisions"]
    needed, epochs = args.em_iterations * (rl * args.rl_batch_size + args.ntp_updates * args.ntp_batch_size), ""
    if ranks.main and all(source == "stdlib" or Path(source).exists() for source in args.dataset):
        pieces = sum(key % 20 > 0 for _, _, key in interleaved(args))  # not those that are held out
        epochs = f", about {needed / max(1, pieces):.1f} epochs"
    if ranks.main:
        print(
            f"data {', '.join(args.dataset)}; on average {tokens:.0f} tokens and {decisions:.1f} decisions a snippet\n"
            f"{args.em_iterations} EM iteration(s) of {rl} E-step updates ({args.rl_batch_size} snippets x "
            f"{args.group_size} rollouts) and {args.ntp_updates} M-step updates ({args.ntp_batch_size} snippets):\n"
            f"  {needed} snippets{epochs}\n"
            f"{memory}\n\n{bootstrap_text(rollouts[0].snippet, rollouts[0].texts(v))}"
        )


def main(args: Args) -> None:
    ranks = setup(args.seed)
    check(args, ranks)
    name = args.q_model if args.bootstrap_only and args.q_model else args.model
    tokenizer = load_tokenizer(name)
    context = min(context_of(name), context_of(args.q_model or name))
    longest = min(4 * args.max_snippet_tokens, context)  # of a row with its thoughts
    pi = load_model(name, tokenizer, ranks, longest, recompute=args.gradient_checkpointing)
    v = Vocabulary(tokenizer, pi.config.get_text_config().vocab_size, ranks.device)
    q, of_q = None, v  # in a dry run pi stands for it
    if args.algo == "ra3" and not args.bootstrap_only and (args.q_model or not args.dry_run):
        q = load_model(args.q_model or name, tokenizer, ranks, longest, recompute=args.gradient_checkpointing)
        if load_tokenizer(args.q_model or name).get_vocab() != tokenizer.get_vocab():
            raise UserError(f"--q-model {args.q_model} has another vocabulary than {name}")
        if args.q_model:  # its embedding may have other rows that are no token (Qwen2.5-7B, not 1.5B)
            of_q = Vocabulary(tokenizer, q.config.get_text_config().vocab_size, ranks.device)
    if args.rollout == "drafted" and not (pi.can_draft and (q or pi).can_draft):
        args = replace(args, rollout="forced")
    problems = list(read_rows(args.eval_problems)) if args.eval_problems else []
    for row, key in itertools.product(problems, ("prompt", "test", "entry_point")):
        column(row, key, args.eval_problems)  # refuses a file without it
    needed = max([len(v.encode(row["prompt"])) + 1 + EVAL_TOKENS for row in problems], default=0)
    if needed > context:
        raise UserError(f"--eval-problems: a prompt and its completion take {needed} tokens; {name} takes {context}")
    if args.dry_run:
        dry_run(None if args.algo == "ntp" else q or pi, of_q, longest, args, ranks)
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
        "update": 0, "iteration": 0, "phase": "E" if learns_q else "M", "done": 0, "stages": [],
        "cursors": {"E": (0, 0), "M": (0, 0)},
    }  # fmt: skip
    # what a checkpoint holds: the model that learns, and the other one unless it never learns
    models = {"E": {"policy": q, "frozen": pi}, "M": {"policy": pi} | ({"frozen": q} if learns_q else {})}
    optimizer, stages, shown, interrupt = None, state["stages"], [], Interrupt(ranks)
    if run.state:
        optimizer = new_optimizer(models[state["phase"]]["policy"], 0.0, args.weight_decay, BETAS)
        run.restore(models[state["phase"]], optimizer)  # with its learning rate
    streams = {part: SnippetStream(args, part, v, longest, ranks, state["cursors"][part]) for part in ("E", "M")}

    def finish(metrics: dict, cursor, last: bool) -> list[str]:
        """5 log, evaluate, save: the end of an update of the step that `state` names. Returns samples to print."""
        phase, iteration = state["phase"], state["iteration"] + 1
        state["update"], state["done"], state["cursors"][phase] = state["update"] + 1, state["done"] + 1, cursor
        update, learner, held, shown = state["update"], models[phase]["policy"], {}, []
        if last:  # before the evaluation, in which the run may be killed
            run.export(learner, f"em_{iteration:03d}" + "_q" * (phase == "E"))
        if last or (args.eval_every and update % args.eval_every == 0):
            title = f"after {phase}{iteration}" if last else f"update {update}"
            held, shown = evaluate(learner, snippets, problems, title, v, args, run)
        metrics |= {"update": update, "phase": phase, "iteration": iteration, **streams[phase].metrics(), **held}
        run.log(metrics, CONSOLE, total, math.isnan(metrics["optim/grad_norm"]))
        if update == 1 and metrics["data/decisions"] < 1:
            run.say("warning: less than one decision a snippet; RA3 is then plain prediction. Is --dataset code?")
        if last:
            stages.append((title, held))
            run.curves(PANELS)
        if last or update % args.save_every == 0:
            run.save(state, models[phase], optimizer)
        return shown

    if not stages:
        held, _ = evaluate(pi, snippets, problems, "before", v, args, run)
        stages.append(("before", held))
        run.log({"update": 0, "phase": state["phase"], **held}, CONSOLE, total)
    try:
        for iteration in range(state["iteration"], args.em_iterations):
            state["iteration"] = iteration
            # E-step: q starts from pi and learns where a thought helps
            if state["phase"] == "E":
                if optimizer is None:  # else the run was resumed within this step
                    copy_weights(pi, q)
                    optimizer = new_optimizer(q, args.rl_learning_rate, args.weight_decay, BETAS)
                for k in range(state["done"], args.rl_updates):
                    batch, number = streams["E"].batch(args.rl_batch_size), iteration * args.rl_updates + k
                    metrics = e_step(q, pi, optimizer, batch, number, v, args, ranks, interrupt)
                    shown = finish(metrics, streams["E"].cursor, k + 1 == args.rl_updates)
                state |= {"phase": "M", "done": 0}
                optimizer = None
            # M-step: pi learns the code with q's thoughts
            if optimizer is None:
                optimizer = new_optimizer(pi, args.ntp_learning_rate, args.weight_decay, BETAS)
            first, count = iteration * args.ntp_updates + state["done"], args.ntp_updates - state["done"]
            sampled = bootstrapped(q, streams["M"], first, count, of_q, args, ranks, interrupt.check)
            for rollouts, seconds, cursor in sampled:
                metrics = m_step(pi, optimizer, rollouts, seconds, args, ranks, interrupt)
                shown = finish(metrics, cursor, state["done"] + 1 == args.ntp_updates)
            state |= {"phase": "E" if learns_q else "M", "done": 0}
            if args.algo == "ra3":  # NTP keeps its optimizer through all iterations
                optimizer = None
    except Stop:
        run.stopped(state, models[state["phase"]], optimizer)
    print_end(stages, shown, run)


if __name__ == "__main__":
    launch(main, tyro.cli(Args, default=TINY_DEFAULTS if "--tiny" in sys.argv else Args()))
