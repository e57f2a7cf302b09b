"""RA3, Reasoning as Action Abstractions: EM mid-training that learns by RL where a thought pays.

Paper: "Learning to Reason as Action Abstractions with Scalable Mid-Training RL", arXiv 2509.25810; version 2
is the default here, version 1 where an option says so. Equation numbers are version 2's.

An expert's snippet is cut into actions a_1 .. a_T, one line of code each. Before every action the policy q
chooses a latent z_t: *act* (nothing) or *think* (one comment line). The algorithm, with the steps that
`e_step`, `m_step` and `main` name again:

  for every EM iteration i, starting from the model pi_i:
    E-step, rl_updates times; q starts as a copy of pi_i, pi_i itself is frozen:
      1 sample     G rollouts of each snippet: q samples the latents, the expert's lines are forced
      2 score      r_t = l_t - c [z_t is a thought]; l_t = mean log-likelihood of a_t under pi_i  (4.1)
      3 advantage  returns over the next 5 rewards, minus their mean over the G rollouts
      4 update     policy gradient on log q(z_t), plus a small entropy bonus
    M-step, ntp_updates times; q is frozen, pi starts again from pi_i:
      1 sample     one rollout of each snippet, of several updates at once: the bootstrapped text
      4 update     next-token prediction on it  (4.2); the result is pi_{i+1}
    5 log, evaluate, save

Notation: pi policy, q sampler of thoughts, z_t latent, a_t action, l_t `lines`, c `penalty`, G `group_size`.
Shapes: S snippets, G rollouts of each, R = S*G rows, W steps, T actions (padded), V vocabulary.

Deviations from the paper, and what it leaves open (docs/ra3.md has all, with both values):
  D1 thinking is decided by the first token of the line itself ("#" or not), so the code keeps its
     tokenisation; the paper removes the newline and lets the model write "\\n" or "\\n#".
  D2 l_t is a mean per token; the paper prints log pi(a_t | s_t, z_t), a sum. c = 0.05 fits the mean.
  D3 a malformed thought costs 2 in place of c. The paper gives it zero reward and its authors' code -2: both
     are *more* than a line that the model finds hard, l_t < -2, and then pay for breaking the format.
  D4 the penalty-free warm-up is that of the first E-step only.
  D5 the likelihood of a line's first token is that given the decision (renormalised without "#", unless the
     expert's line begins with a comment itself): see `expert_logprobs`.

  python ra3.py --tiny                                                     # this machine: no network, no GPU
  python ra3.py --model Qwen/Qwen2.5-1.5B --rl-batch-size 256              # one GPU
  torchrun --nproc_per_node 8 ra3.py --model Qwen/Qwen2.5-1.5B             # the paper's, one EM iteration
"""

import html
import itertools
import json
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import tyro
from torch.nn.utils.rnn import pad_sequence

from common import (
    TINY, Interrupt, Ranks, Run, UserError, all_gather_list, all_sum, check_sizes, launch, not_finite, setup,
    write_whole,
)
from modeling import (
    EVENT, LOGITS_PER_CHUNK, RowCache, copy_weights, gathered, inverse_cdf, load_model, load_tokenizer,
    memory_plan, micro_batches, optimizer_step, pad_right, positions, token_logprobs, uniforms,
)
from snippets import KINDS, Snippet, SnippetStream, Vocabulary, bootstrap_text


@dataclass
class Args:
    """RA3 mid-training, and its NTP, BRiTE-style and external-rationale baselines. Defaults: the paper's."""

    # ---- run
    tiny: bool = False
    """the embedded default: tiny model, small corpora, minutes on two cores; every flag still overrides"""
    output_dir: str = ""
    """folder of this run; empty: runs/ra3__<model>__s<seed>__<time>"""
    seed: int = 0
    """fixes the order of the data and all sampling noise, on any number of ranks"""
    resume: str = ""
    """`auto`: continue the newest run of this model and seed (or --output-dir) if any; or a run folder"""
    dry_run: bool = False
    """print the plan, one bootstrapped snippet and a memory estimate, and stop"""
    # ---- model and data
    model: str = "Qwen/Qwen2.5-1.5B"
    """pi_0: any causal LM that AutoModelForCausalLM loads, a hub id or a folder"""
    q_model: str = ""
    """this model (of the same tokenizer) samples the thoughts; no E-step (version 1, figure 7)"""
    dataset: tuple[str, ...] = (
        "OpenCoder-LLM/opc-annealing-corpus:synthetic_qa/*.arrow",
        "OpenCoder-LLM/opc-annealing-corpus:synthetic_code_snippet/*.arrow",
    )
    """see common.read_rows: hub ids, .jsonl/.jsonl.gz/.parquet files, folders of .py files, `stdlib`"""
    dataset_weights: tuple[float, ...] = (0.95, 0.05)
    """share of each source (the paper: 2.36M and 129K snippets); equal if there is not one for each"""
    text_column: str = "text"
    """the column that holds the code"""
    max_snippets: int = 0
    """read no more snippets than this; 0: all"""
    max_snippet_tokens: int = 1024
    """longer texts are cut at top-level statements, and if still longer, behind an action (tokens)"""
    granularity: Literal["line", "block", "snippet"] = "line"
    """how much code an action spans; `snippet`: one latent for all of it, as in BRiTE"""
    # ---- algorithm
    algo: Literal["ra3", "ntp"] = "ra3"
    """ntp: the M-step alone, with every latent act: the baseline, on the same snippets"""
    em_iterations: int = 1
    """number of EM iterations i (the paper: several; one reads 225K snippets)"""
    group_size: int = 3
    """G: rollouts of each snippet in the E-step"""
    penalty: float = 0.05
    """c: what a thought must add to the line's mean log-probability to pay (nats per token)"""
    penalty_warmup: int = 10
    """the first so many RL updates use c = 0 (version 2; 0 in version 1)"""
    return_horizon: int = 5
    """a return is the sum of this many rewards (version 2); 0: all that follow (version 1)"""
    normalize_std: bool = False
    """divide advantages by the standard deviation over the group (the paper does not)"""
    line_reward: Literal["mean", "logmean", "sum"] = "mean"
    """l_t: mean of the line's token log-probabilities, log of their mean probability, or the sum"""
    malformed_penalty: float = 2.0
    """in place of c, for a thought that does not end in time or would break the source (nats per token)"""
    entropy_coef: float = 0.001
    """weight of the entropy of q(z_t) (nats)"""
    mask_latents: bool = False
    """M-step: train on the expert's tokens only, eq. (4.2) to the letter, instead of on all tokens"""
    # ---- rollout
    max_latent_tokens: int = 16
    """longest thought (tokens, its newline included)"""
    temperature: float = 1.0
    """temperature of q, in sampling and in log q alike"""
    rollout_rows: int = 512
    """rows of a rollout batch on a rank, in the M-step of several updates; memory and speed only"""
    # ---- optimisation
    rl_updates: int = 40
    """E-step updates of an EM iteration"""
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
    """tokens of a forward-backward pass on a rank (shared ones once); memory and speed only"""
    gradient_checkpointing: bool = False
    """keep no activations inside layers, compute them again: much less memory, up to a third more time"""
    # ---- evaluation and saving
    eval_snippets: int = 256
    """held-out snippets"""
    eval_every: int = 0
    """also evaluate every so many updates; 0: only at the start and at the end of each step"""
    save_every: int = 50
    """updates between checkpoints that --resume continues from; the last two are kept"""
    bootstrap_only: bool = False
    """write the corpus with thoughts of --q-model, else --model, to bootstrapped.jsonl, and stop"""


TINY_DEFAULTS = Args(  # a thought in these programs serves the next line only; a longer horizon adds noise
    tiny=True, model=f"{TINY}/model", dataset=(f"{TINY}/programs.jsonl", "stdlib"),
    dataset_weights=(0.9, 0.1), max_snippet_tokens=96, return_horizon=1, rl_updates=80, rl_batch_size=32,
    rl_learning_rate=4e-5, ntp_updates=40, ntp_batch_size=64, ntp_learning_rate=3e-4, rollout_rows=128,
    micro_batch_tokens=4096,
)  # fmt: skip


# ---------------------------------------------------------------- 1 sample: draft, decide, insert thoughts

FORCED = -2  # `targets` of a token that q did not choose
DRAFT = 4  # decisions of a row that share a forward pass; memory and speed only


@dataclass
class Rollout:
    """One rolled-out snippet; arrays [W] over its tokens, of which the first is the separator."""

    snippet: Snippet
    ids: np.ndarray
    targets: np.ndarray  # FORCED, or what q drew at this place: a token, or EVENT for act
    actions: np.ndarray  # action that a token belongs to (an expert's) or leads to (a latent's); -1: none
    expert: np.ndarray  # bool: a token of the expert's code
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

    def thoughts(self, vocabulary: Vocabulary) -> dict[int, str]:
        """Action -> its thought, newline included; the well-formed ones."""
        r = self.without_malformed()
        rows = [r.ids[(r.actions == t) & (r.targets >= 0)].tolist() for t in r.thinks()]
        return dict(zip(r.thinks(), vocabulary.decode(rows)))


ARRAYS = ("ids", "targets", "actions", "expert", "malformed")  # of a Rollout


def all_act(snippet: Snippet) -> Rollout:
    """The rollout in which every latent is act: the plain snippet, for the NTP baseline and as a draft."""
    size = len(snippet.ids)
    actions = np.searchsorted(snippet.boundaries, np.arange(size), side="right") - 1
    expert, nothing = np.arange(size) > 0, np.zeros(size, dtype=bool)
    return Rollout(snippet, snippet.ids, np.full(size, FORCED), actions, expert, nothing)


def draw(model, hidden, noise, vocabulary: Vocabulary, args: Args) -> torch.Tensor:
    """Tokens [N] that q draws after hidden states [N, D] with noise [N]."""
    size = max(1, LOGITS_PER_CHUNK // len(vocabulary.opens))
    parts = []
    for h, u in zip(hidden.split(size), noise.split(size)):
        # q: the policy's full distribution at the given temperature
        probs = (model.lm_head(h).float() / args.temperature).softmax(-1)  # [N, V]
        parts.append(inverse_cdf(probs, u))
    return torch.cat(parts)


def think(cache: RowCache, rows: list[int], places: list[int], token, noise, vocabulary, args):
    """The thoughts of these rows, token by token, each from the `token` [B] that opened it at its place.

    A thought ends with its newline, with a token that breaks the source, or after max_latent_tokens; rows
    that have ended leave the batch. noise [R, W]. Returns a list of tokens for each row.
    """
    last, longest = max(places), args.max_latent_tokens
    tokens = token.new_full((len(rows), longest), FORCED)  # [B, M]
    going = torch.arange(len(rows), device=token.device)  # the rows of the B that still write
    rows, places = torch.tensor([rows, places], device=token.device)
    for size in range(longest):
        tokens[going, size] = token
        goes_on = ~(vocabulary.ends[token] | vocabulary.breaks[token])
        going, token = going[goes_on], token[goes_on]  # this waits for the device
        if size + 1 == longest or not len(going):
            break
        at, where, one = rows[going], places[going] + size, torch.ones_like(going)
        hidden = cache.feed_tensors(at, where, token.unsqueeze(1), one, last + size + 1)[:, 0]
        token = draw(cache.model, hidden, noise[at, where], vocabulary, args)
    return [[k for k in row if k != FORCED] for row in tokens.tolist()]


def insert_thought(r: Rollout, place: int, t: int, tokens: list[int], v: Vocabulary) -> int:
    """Put a thought before action t, which begins at `place`, and the indentation after it; tokens inserted.

    A thought that breaks the source, or has not ended in time, is closed by a newline as its last token.
    """
    malformed = tokens[-1] not in v.ending
    ids, indent = tokens[:-1] + [v.newline if malformed else tokens[-1]], r.snippet.indents[t]
    size = len(ids) + len(indent)
    closed = (np.arange(size) == len(ids) - 1) & malformed
    new = (ids + indent, tokens + [FORCED] * len(indent), t, False, closed)
    for name, values in zip(ARRAYS, new):
        setattr(r, name, np.insert(getattr(r, name), [place] * size, values))
    return size


@torch.no_grad()
def rollout(model, snippets: list[Snippet], noise, vocabulary: Vocabulary, args: Args) -> list[Rollout]:
    """Roll each snippet out once, through all its turns, with thoughts sampled from `model`; noise: R x [W].

    Rows of similar length share a batch. Call it inside `gathered(model)`.
    """
    rollouts: list[Rollout | None] = [None] * len(snippets)
    order = sorted(range(len(snippets)), key=lambda r: len(snippets[r].ids), reverse=True)
    for first in range(0, len(order), args.rollout_rows):
        chunk = order[first : first + args.rollout_rows]
        chosen, own = [snippets[r] for r in chunk], [noise[r] for r in chunk]
        for r, one in zip(chunk, rollout_batch(model, chosen, own, vocabulary, args)):
            rollouts[r] = one
    return rollouts


def rollout_batch(model, snippets: list[Snippet], noise, vocabulary: Vocabulary, args: Args) -> list[Rollout]:
    """A row is a whole text at any time: what is decided, then the expert's code as if every latent to come
    were act. One forward pass reads the next DRAFT actions of all rows and draws the decision before each.
    Those up to a row's first thought hold; it is written, and the code behind it, now further right, is read
    again. So the distribution is that of deciding one by one, with fewer passes than tokens.
    """
    rows, cache = [all_act(s) for s in snippets], RowCache(model, len(snippets))
    noise = pad_sequence(noise, batch_first=True).to(model.device)  # [R, W]
    turn = [0] * len(rows)  # the action to decide about next
    seen = [0] * len(rows)  # tokens that the cache holds and that are as they were
    moved = [0] * len(rows)  # tokens inserted, by which the rest of the code has moved
    while going := [i for i, s in enumerate(snippets) if turn[i] < len(s.boundaries)]:
        places = [snippets[i].boundaries[turn[i] : turn[i] + DRAFT] + moved[i] for i in going]
        starts = [seen[i] for i in going]
        hidden = cache.feed(going, starts, [rows[i].ids[seen[i] : p[-1]] for i, p in zip(going, places)])
        # the decision before the action at place p is drawn after token p - 1: N decisions in all
        k, cols = positions([p - 1 for p in places], model.device)  # [N]
        row, start = torch.tensor([going, starts], device=model.device)[:, k]  # [N]
        drawn = draw(model, hidden[k, cols - start], noise[row, cols], vocabulary, args)
        ends = np.cumsum([len(p) for p in places])
        opens = np.split(vocabulary.opens[drawn].cpu().numpy(), ends[:-1])
        thinking, opening = [], []  # rows that think, and with which of the N
        for i, place, opens_here, end in zip(going, places, opens, ends):
            # the draws up to a row's first thought hold; its later ones did not know of this thought
            acts = int(opens_here.argmax()) if opens_here.any() else len(place)
            rows[i].targets[place[:acts]] = EVENT
            seen[i] = int(place[: acts + 1][-1])
            turn[i] += acts
            if acts < len(place):
                thinking.append(i)
                opening.append(int(end) - len(place) + acts)
        if not thinking:
            continue
        starts = [seen[i] for i in thinking]
        thoughts = think(cache, thinking, starts, drawn[opening], noise, vocabulary, args)
        for i, tokens in zip(thinking, thoughts):
            moved[i] += insert_thought(rows[i], seen[i], turn[i], tokens, vocabulary)
            seen[i] += len(tokens) - 1  # its last token was not fed
            turn[i] += 1
    return rows


def sample(model, batches: list[list[Snippet]], keys: list, vocabulary, args, ranks) -> list[list[Rollout]]:
    """This rank's rollouts of each global batch, all sampled at once: a GPU takes about as long for many rows
    as for a few. keys: of each batch the key of its first row's noise; the last number counts on, so noise is
    the same on any number of ranks. Without a model (NTP) every latent is act.
    """
    shares = [range(len(snippets))[ranks.share(len(snippets))] for snippets in batches]
    rows = [snippets[i] for snippets, share in zip(batches, shares) for i in share]
    if model is None:
        rollouts = iter([all_act(snippet) for snippet in rows])
    else:
        names = [(args.seed, *key, first + i) for (*key, first), share in zip(keys, shares) for i in share]
        noise = [uniforms([s.width(args.max_latent_tokens)], *name) for s, name in zip(rows, names)]
        with gathered(model):
            rollouts = iter(rollout(model, rows, noise, vocabulary, args))
    return [[next(rollouts) for _ in share] for share in shares]


# ---------------------------------------------------------------- 2 score: the expert line's log-likelihood


def rollout_batches(rollouts: list[Rollout], args: Args, ranks: Ranks | None = None) -> list[list[int]]:
    """Micro-batches in which the rollouts of a snippet are together: what they begin with is read once."""
    rows, groups = [r.ids.tolist() for r in rollouts], [r.snippet.text for r in rollouts]
    return micro_batches(rows, args.micro_batch_tokens, ranks, groups)


@torch.no_grad()
def expert_logprobs(model, rollouts: list[Rollout], vocabulary: Vocabulary, args: Args, given_act=False):
    """Log-probability of each expert token given all before it, thoughts included: one array a rollout.

    With `given_act` an action's first token is conditioned on not opening one: log p - log(1 - sum_H p),
    the likelihood of a_t *given* that z_t is decided. The plain one would pay any thought, however idle, for
    taking away the probability that the model gives to "#" there (D5). Run it inside `gathered(model)`.
    """
    device = vocabulary.opens.device
    out: list[np.ndarray | None] = [None] * len(rollouts)
    for batch in rollout_batches(rollouts, args):
        chosen = [rollouts[i] for i in batch]
        ids = pad_right([r.ids for r in chosen], vocabulary.separator, device)  # [B, T]
        where = [np.flatnonzero(r.expert) for r in chosen]
        rows, cols = positions(where, device)  # [N]
        targets, n = ids[rows, cols], len(rows)
        if given_act:  # the decisions, too: 1 - sum_H p where an action begins
            begins = np.concatenate([np.diff(r.actions[w], prepend=-1) > 0 for r, w in zip(chosen, where)])
            begins &= ~vocabulary.opens[targets].cpu().numpy()  # an expert's comment: nothing was decided
            again = torch.from_numpy(np.flatnonzero(begins)).to(device)
            rows, cols = torch.cat([rows, rows[again]]), torch.cat([cols, cols[again]])
            targets = torch.cat([targets, torch.full_like(again, EVENT)])
        logprobs, _ = token_logprobs(model, ids, rows, cols, targets=targets, event=~vocabulary.opens)
        logprobs, acts = np.split(logprobs.double().cpu().numpy(), [n])
        if given_act:
            logprobs[begins] -= acts
        for i, part in zip(batch, np.split(logprobs, np.cumsum([len(w) for w in where])[:-1])):
            out[i] = part
    return out


LINE_REWARDS = {"mean": np.mean, "sum": np.sum, "logmean": lambda lp: np.log(np.exp(lp).mean() + 1e-30)}


def step_rewards(rollout: Rollout, logprobs: np.ndarray, penalty: float, args: Args) -> np.ndarray:
    """r_t of every action [T], eq. (4.1) with the fixed penalty of Algorithm 1 in place of the KL.

    logprobs: of the rollout's expert tokens under the frozen anchor.
    """
    actions, line_reward = rollout.actions[rollout.expert], LINE_REWARDS[args.line_reward]
    lines = [line_reward(logprobs[actions == t]) for t in range(len(rollout.snippet.boundaries))]  # l_t
    costs = np.zeros(len(lines))
    costs[rollout.thinks()] = penalty
    costs[rollout.actions[rollout.malformed]] = args.malformed_penalty
    return np.array(lines) - costs  # eq. (4.1), Algorithm 1 line 3


# ---------------------------------------------------------------- 3 advantage


def truncated_returns(rewards: torch.Tensor, horizon: int) -> torch.Tensor:
    """Return of step t: the sum of the next `horizon` rewards r_t .. r_{t+horizon-1}; 0: all to the end.

    rewards [..., G, T], zero behind a sequence's end; the result has the same shape and unit. Section 7 of
    version 2; horizon 0 is version 1's. ValueError for a negative horizon.
    """
    if horizon < 0:
        raise ValueError(f"the horizon must be 0 (to the end) or positive, got {horizon}")
    to_the_end = rewards.flip(-1).cumsum(-1).flip(-1)
    if horizon == 0 or horizon >= rewards.shape[-1]:
        return to_the_end
    beyond = torch.zeros_like(to_the_end)
    beyond[..., :-horizon] = to_the_end[..., horizon:]
    return to_the_end - beyond


def group_baseline_advantages(returns: torch.Tensor, normalize_std: bool = False) -> torch.Tensor:
    """Return minus its mean over the G rollouts of the same snippet at the same step; [..., G, T] -> same.

    The expert's lines are the same in all rollouts, so the steps align. Section 5 of the paper (b(s_t), after
    Algorithm 1); `normalize_std` also divides by the standard deviation over the group, as eq. (2.2) does.
    """
    advantages = returns - returns.mean(-2, keepdim=True)
    if normalize_std:
        advantages = advantages / (returns.std(-2, keepdim=True) + 1e-4)
    return advantages


# ---------------------------------------------------------------- 4 update: the two losses


def policy_gradient_loss(model, rollouts, vocabulary: Vocabulary, args: Args, decisions: float):
    """This micro-batch's part of the E-step loss, and the sum of its entropies (nats).

    loss = - (1 / decisions) sum_t A_t log q(z_t) - entropy_coef * mean entropy; log q(z_t) sums over the
    thought's tokens, `decisions` counts them in the whole global batch. Only latent positions get logits and
    gradients. One update per batch, so there is no ratio and no clipping.
    """
    device = vocabulary.opens.device
    ids = pad_right([r.ids for r in rollouts], vocabulary.separator, device)  # [B, T]
    where = [np.flatnonzero(r.targets != FORCED) for r in rollouts]
    rows, cols = positions(where, device)  # [N], [N]
    targets = torch.from_numpy(np.concatenate([r.targets[w] for r, w in zip(rollouts, where)])).to(device)
    advantages = np.concatenate([r.advantages[r.actions[w]] for r, w in zip(rollouts, where)])
    advantages = torch.from_numpy(advantages).float().to(device)  # [N]
    # at each decision, also where q has drawn a thought, all that means act is one outcome of z_t
    decisive = np.concatenate([np.diff(r.actions[w], prepend=-1) > 0 for r, w in zip(rollouts, where)])
    acts = {"event": ~vocabulary.opens, "merged": torch.from_numpy(decisive).to(device)}
    options = {"temperature": args.temperature, "entropy": True}
    logprobs, entropy = token_logprobs(model, ids, rows, cols, targets=targets, **acts, **options)
    loss = -(advantages * logprobs).sum() - args.entropy_coef * entropy.sum()
    return loss / decisions, entropy.detach().sum()


def ntp_loss(model, rollouts: list[Rollout], vocabulary: Vocabulary, mask_latents: bool, tokens: float):
    """This micro-batch's part of the M-step loss: mean negative log-likelihood per token (nats), eq. (4.2).

    tokens: those trained on in the whole global batch. Also returns the sum of the expert tokens' losses.
    """
    device = vocabulary.opens.device
    ids = pad_right([r.ids for r in rollouts], vocabulary.separator, device)  # [B, T]
    where = [np.flatnonzero(r.expert) if mask_latents else np.arange(1, len(r.ids)) for r in rollouts]
    expert = torch.from_numpy(np.concatenate([r.expert[w] for r, w in zip(rollouts, where)])).to(device)
    logprobs, _ = token_logprobs(model, ids, *positions(where, device))
    return -logprobs.sum() / tokens, -logprobs.detach()[expert].sum()  # eq. (4.2)


def update(model, optimizer, rollouts, loss_of, ranks: Ranks, args: Args) -> tuple[float, float, float]:
    """One optimiser step on all ranks' rollouts: (global loss, sum of the second value, gradient norm).

    loss_of(rollouts) -> (part of the global loss, a sum to report). If the loss or gradient is not finite
    nothing changes and the norm returned is NaN; nor does anything change without an optimizer.
    """
    total, reported = 0.0, 0.0
    for batch in rollout_batches(rollouts, args, ranks):  # as many on every rank: the missing ones are empty
        loss, extra = loss_of([rollouts[i] for i in batch or [0]])
        weight = float(bool(batch))
        (loss * weight * ranks.world_size).backward()  # FSDP averages over ranks; our losses add up over them
        total += weight * loss.item()
        reported += weight * extra.item()
    norm = optimizer_step(model, optimizer, total, args.max_grad_norm, ranks)
    return *all_sum([total, reported], ranks), norm


def culprits(model, rollouts, loss_of, ranks: Ranks, args: Args) -> str:
    """The snippets that make the loss or its gradient NaN or infinite."""

    def alone(i: int) -> tuple[float, float]:
        part = rollouts[i : i + 1] or rollouts[:1]
        return loss_of(part)[0].item(), update(model, None, part, loss_of, ranks, args)[2]

    return not_finite([f"snippet {r.snippet.text[:60]!r}" for r in rollouts], alone, ranks)


def e_step(policy, frozen, optimizer, snippets, vocabulary, args, ranks, update_index) -> tuple[dict, str]:
    """One E-step update: q = policy, pi_i = frozen; snippets: the global batch. -> metrics, why it failed."""
    G, clock = args.group_size, [time.perf_counter()]
    # 1 sample
    rows = [s for s in snippets for _ in range(G)]  # groups: G rows
    (rollouts,) = sample(policy, [rows], [("E", update_index, 0)], vocabulary, args, ranks)  # R of them
    clock.append(time.perf_counter())
    # 2 score
    with gathered(frozen):
        logprobs = expert_logprobs(frozen, rollouts, vocabulary, args, given_act=True)
    penalty = 0.0 if update_index < args.penalty_warmup else args.penalty  # D4
    rewards = [torch.from_numpy(step_rewards(r, lp, penalty, args)) for r, lp in zip(rollouts, logprobs)]
    rewards = pad_sequence(rewards, batch_first=True)  # [R, T]
    clock.append(time.perf_counter())
    # 3 advantage
    returns = truncated_returns(rewards.unflatten(0, (-1, G)), args.return_horizon)  # [S, G, T]
    advantages = group_baseline_advantages(returns, args.normalize_std).flatten(0, 1)  # [R, T]
    for r, row in zip(rollouts, advantages.numpy()):
        r.advantages = row
    # 4 update
    sums = rollout_sums(rollouts)
    sums |= {"reward": rewards.sum().item(), "line": -sum(lp.sum() for lp in logprobs)}
    sums = all_sum(sums, ranks)

    def loss_of(part):
        return policy_gradient_loss(policy, part, vocabulary, args, sums["decisions"])

    _, entropy, norm = update(policy, optimizer, rollouts, loss_of, ranks, args)
    cause = culprits(policy, rollouts, loss_of, ranks, args) if math.isnan(norm) else ""
    clock.append(time.perf_counter())
    return {
        "reward/mean": sums["reward"] / sums["decisions"],
        "reward/penalty": penalty,
        "reward/ce_code": sums["line"] / sums["expert_tokens"],
        "policy/entropy": entropy / sums["decisions"],
        **rollout_metrics(sums),
        **timing(clock, sums["tokens"]),
        "optim/grad_norm": norm,
    }, cause


def m_step(policy, optimizer, rollouts, sampling_s: float, vocabulary, args, ranks) -> tuple[dict, str]:
    """One M-step update of pi = policy on this rank's rollouts. -> metrics, why it failed."""
    clock = [time.perf_counter() - sampling_s, *[time.perf_counter()] * 2]  # nothing to score
    # 4 update
    sums = rollout_sums(rollouts)
    rollouts = [r.without_malformed() for r in rollouts]
    sums["trained"] = sum(r.expert.sum() if args.mask_latents else len(r.ids) - 1 for r in rollouts)
    sums = all_sum(sums, ranks)

    def loss_of(part):
        return ntp_loss(policy, part, vocabulary, args.mask_latents, sums["trained"])

    loss, expert_loss, norm = update(policy, optimizer, rollouts, loss_of, ranks, args)
    cause = culprits(policy, rollouts, loss_of, ranks, args) if math.isnan(norm) else ""
    clock.append(time.perf_counter())
    return {
        "train/loss": loss,
        "train/ce_code": expert_loss / sums["expert_tokens"],
        **rollout_metrics(sums),
        **timing(clock, sums["tokens"]),
        "optim/grad_norm": norm,
    }, cause


# ---------------------------------------------------------------- 5 log, evaluate, save

CURVES = (
    "reward/mean", "rollout/think_rate", "rollout/think_rate/assert", "rollout/latent_tokens",
    "rollout/format_rate", "policy/entropy", "train/ce_code", "eval/ce_code", "optim/grad_norm",
)
TAIL = (
    " | think {rollout/think_rate:.1%} ({rollout/latent_tokens:.1f} tokens) | grad {optim/grad_norm:.2f} | "
    "rollout {time/rollout_s:.1f} score {time/score_s:.1f} update {time/update_s:.1f} s, "
    "{perf/tokens_per_s:.0f} tokens/s, {perf/peak_memory_gib:.1f} GiB"
)
CONSOLE = {"E": "E reward {reward/mean:+.3f}" + TAIL, "M": "M loss {train/loss:.3f}" + TAIL}
HELDOUT = " | held-out ce {eval/ce_code:.4f}"


def rollout_sums(rollouts: list[Rollout]) -> dict[str, float]:
    """Counts to be added up over ranks, the same keys on all: of/KIND and at/KIND, decisions and thoughts."""
    of = Counter(kind for r in rollouts for kind in r.snippet.kinds)
    at = Counter(r.snippet.kinds[t] for r in rollouts for t in r.thinks())
    return {
        "decisions": of.total(),
        "thoughts": at.total(),
        "malformed": sum(int(r.malformed.sum()) for r in rollouts),
        "latent_tokens": sum(int((r.targets >= 0).sum()) for r in rollouts),
        "tokens": sum(len(r.ids) for r in rollouts),
        "expert_tokens": sum(int(r.expert.sum()) for r in rollouts),
        **{f"{name}/{kind}": count[kind] for name, count in (("of", of), ("at", at)) for kind in KINDS},
    }


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


def evaluate(model, snippets, title: str, vocabulary, args, run: Run) -> tuple[dict, list[Rollout]]:
    """Cross-entropy (nats per token) of held-out expert tokens, with thoughts sampled by `model` and without.

    The same noise every time. One draw of the thoughts; malformed ones are replaced by act, as in the M-step.
    Also the think rate by source and kind of line. Returns the metrics and this rank's rollouts.
    """
    if not snippets:
        return {}, []
    (rollouts,) = sample(model, [snippets], [("eval", 0)], vocabulary, args, run.ranks)
    with gathered(model):
        thinking = expert_logprobs(model, [r.without_malformed() for r in rollouts], vocabulary, args)
        acting = expert_logprobs(model, [all_act(r.snippet) for r in rollouts], vocabulary, args)
    metrics, everything = {}, Counter()
    for source in sorted({s.source for s in snippets}):
        mine = [i for i, r in enumerate(rollouts) if r.snippet.source == source]
        sums = rollout_sums([rollouts[i] for i in mine])
        for name, logprobs in (("ce_code", thinking), ("ce_code_act", acting)):
            sums[name] = -sum(logprobs[i].sum() for i in mine)
        sums = all_sum(sums, run.ranks)
        everything.update(sums)
        for name in ("ce_code", "ce_code_act"):
            metrics[f"eval/{name}"] = everything[name] / everything["expert_tokens"]  # the last one holds
            metrics[f"eval/{name}/{source}"] = sums[name] / sums["expert_tokens"]
        metrics |= think_rates(sums, f"eval/think_rate/{source}")
    if run.ranks.main:
        with open(run.path / "samples.html", "a", encoding="utf-8") as handle:
            handle.write(f"<meta charset='utf-8'><h2>{html.escape(title)}</h2>\n")
            for r in rollouts[:12]:
                text = rendered(r, vocabulary, '<b style="color:#0a7d33">', "</b>", html.escape)
                handle.write(f"<pre style='background:#f6f6f6;padding:1em'>{text}</pre>\n")
    return metrics, rollouts


def rendered(r: Rollout, vocabulary, before="\033[32m", after="\033[0m", escape=str) -> str:
    """A rollout's text with each thought between `before` and `after`."""
    marked = {t: f"\x02{thought.rstrip()}\x03\n" for t, thought in r.thoughts(vocabulary).items()}
    return escape(bootstrap_text(r.snippet, marked)).replace("\x02", before).replace("\x03", after)


def print_table(stages: list[tuple[str, dict]], rollouts: list[Rollout], vocabulary, run: Run) -> None:
    """What the run did, on held-out snippets: a row a metric, a column a stage; then a few samples."""
    wanted = [k for k in stages[-1][1] if k.startswith("eval/ce_code")]
    rates = [k for k in stages[-1][1] if k.startswith("eval/think_rate")]
    wanted += [k for k in rates if any(metrics.get(k, 0) >= 0.005 for _, metrics in stages)]
    name = max(len(k) for k in wanted) - len("eval/")
    print("\nheld-out snippets".ljust(name + 3) + "".join(f"{title:>12}" for title, _ in stages))
    for key in wanted:
        values = "".join(f"{metrics.get(key, math.nan):12.3f}" for _, metrics in stages)
        print(f"  {key.removeprefix('eval/').ljust(name)}{values}")
    print("ce_code: cross-entropy of the expert's tokens with the model's thoughts, _act: without (nats)\n")
    chosen = {r.snippet.source: r for r in reversed(rollouts)}.values()  # one of each source
    for r in chosen:
        print("\n".join(rendered(r, vocabulary).splitlines()[:16]) + "\n")
    print(f"samples {run.path}/samples.html   curves {run.path}/curves.png   models {run.path}/checkpoints/")


def bootstrap(model, vocabulary: Vocabulary, context: int, run: Run, args: Args, ranks: Ranks) -> None:
    """--bootstrap-only: bootstrapped.jsonl, an object a snippet: text, bootstrapped, latents [{line, text}].

    With --resume auto, an earlier file is continued.
    """
    target, started = run.path / "bootstrapped.jsonl", time.perf_counter()
    # without the last line's end, a run was killed there: that line is torn
    earlier = target.read_text(encoding="utf-8").split("\n")[:-1] if target.exists() else []
    count = first = len(earlier)
    all_sum(0.0, ranks)  # every rank has read the file before rank 0 cuts it
    if ranks.main:
        write_whole(target, "".join(line + "\n" for line in earlier))
    stream = itertools.islice(SnippetStream(args, "all", vocabulary, context), count, None)
    while snippets := list(itertools.islice(stream, args.rollout_rows * ranks.world_size)):
        lines = []
        keys = [("bootstrap", count)]
        (rollouts,) = sample(model, [snippets], keys, vocabulary, args, ranks)
        for r in rollouts:
            text, thoughts = r.snippet.text, r.thoughts(vocabulary)
            numbers = [text.count("\n", 0, r.snippet.starts[r.snippet.boundaries[t]]) for t in thoughts]
            latents = [{"line": n, "text": z.strip()} for n, z in zip(numbers, thoughts.values())]
            bootstrapped = bootstrap_text(r.snippet, thoughts)
            lines.append({"text": text, "bootstrapped": bootstrapped, "latents": latents})
        lines = all_gather_list(lines, ranks)
        count += len(snippets)
        if ranks.main:
            with open(target, "a", encoding="utf-8") as handle:
                handle.writelines(json.dumps(line) + "\n" for line in lines)
            print(f"{count} snippets  {(count - first) / (time.perf_counter() - started):.1f}/s", flush=True)


# ---------------------------------------------------------------- main


def check(args: Args, ranks: Ranks) -> None:
    """UserError for sizes that cannot work, naming the nearest that can."""
    for name in ("rl_batch_size", "ntp_batch_size"):
        size, flag = getattr(args, name), name.replace("_", "-")
        if size <= 0 or size % ranks.world_size:
            nearest = max(ranks.world_size, size // ranks.world_size * ranks.world_size)
            raise UserError(f"--{flag} {size} does not divide by {ranks.world_size} ranks: use {nearest}")
    positive = "group_size em_iterations ntp_updates max_latent_tokens temperature rollout_rows save_every "
    positive += "micro_batch_tokens max_grad_norm max_snippet_tokens"
    not_negative = "rl_updates return_horizon penalty_warmup max_snippets eval_every eval_snippets "
    not_negative += "rl_learning_rate ntp_learning_rate weight_decay malformed_penalty entropy_coef"
    check_sizes(args, positive, not_negative)
    if args.algo == "ntp" and args.q_model:
        raise UserError("--algo ntp has no thoughts, so it takes no --q-model")
    if args.algo == "ra3" and not args.q_model and args.group_size < 2:
        raise UserError("--group-size must be at least 2: advantages compare rollouts of one snippet")
    if min(args.dataset_weights, default=1) <= 0:
        raise UserError(f"--dataset-weights must be positive, got {args.dataset_weights}")
    if args.max_snippet_tokens < 4:
        raise UserError(f"--max-snippet-tokens {args.max_snippet_tokens} leaves no room for code")


def dry_run(policy, vocabulary: Vocabulary, context: int, args: Args, ranks: Ranks) -> None:
    """Print the plan, one bootstrapped snippet and a memory estimate."""
    snippets = SnippetStream(args, "M", vocabulary, context).batch(ranks.world_size)
    (rollouts,) = sample(policy, [snippets], [("dry run", 0)], vocabulary, args, ranks)
    width = max(s.width(args.max_latent_tokens) for s in snippets)
    memory = memory_plan(
        args.model, ranks, (args.rollout_rows, width), args.micro_batch_tokens, args.gradient_checkpointing,
        0 if args.algo == "ntp" else 4,
    )  # fmt: skip
    rl = args.rl_updates if args.algo == "ra3" and not args.q_model else 0
    if ranks.main:
        print(
            f"data {', '.join(args.dataset)}; an action is a {args.granularity}\n"
            f"{args.em_iterations} EM iteration(s) of {rl} E-step updates "
            f"({args.rl_batch_size} snippets x {args.group_size})\n"
            f"  and {args.ntp_updates} M-step updates ({args.ntp_batch_size} snippets)\n"
            f"{memory}\n\n{rendered(rollouts[0], vocabulary)}"
        )


def new_optimizer(model, learning_rate: float, args: Args) -> torch.optim.AdamW:
    options = {"weight_decay": args.weight_decay, "betas": (0.9, 0.95), "fused": True}
    return torch.optim.AdamW(model.parameters(), lr=learning_rate, **options)


def main(args: Args) -> None:
    ranks = setup(args.seed)
    check(args, ranks)
    name = args.q_model if args.bootstrap_only and args.q_model else args.model
    tokenizer = load_tokenizer(name)
    policy = load_model(name, ranks, recompute=args.gradient_checkpointing)
    config = policy.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or 10**9
    vocabulary = Vocabulary(tokenizer, config.vocab_size, ranks.device)
    if args.dry_run:
        dry_run(policy, vocabulary, context, args, ranks)
        return
    run = Run(args, __file__, ranks)
    if args.bootstrap_only:
        bootstrap(policy, vocabulary, context, run, args, ranks)
        return
    learns_q = args.algo == "ra3" and not args.q_model  # else there is no E-step
    frozen = None
    if args.algo != "ntp":  # trained in turn
        frozen = load_model(args.q_model or args.model, ranks, recompute=args.gradient_checkpointing)
    if frozen is not None and frozen.config.get_text_config().vocab_size != config.vocab_size:
        raise UserError(f"--q-model {args.q_model} has another vocabulary than {args.model}")
    rl_updates = args.rl_updates if learns_q else 0
    per_iteration = rl_updates + args.ntp_updates
    total = args.em_iterations * per_iteration

    # what a checkpoint holds beside the tensors; used: M-step updates done since cursors["M"]
    state = run.state or {"update": 0, "cursors": {"E": 0, "M": 0}, "used": 0, "stages": []}
    cursors, stages = state["cursors"], state["stages"]
    models, optimizer = {"policy": policy} | ({"frozen": frozen} if learns_q else {}), None
    if run.state is not None:
        optimizer = new_optimizer(policy, 0.0, args)  # restored with its learning rate
        run.restore(models, optimizer)
    streams = {part: SnippetStream(args, part, vocabulary, context, cursors[part]) for part in ("E", "M")}
    held_out = SnippetStream(args, "eval", vocabulary, context).batch(args.eval_snippets)
    # M-step updates that are sampled at once, and what is left of them: (rollouts, seconds) of each
    ahead = 1 if frozen is None else max(1, args.rollout_rows * ranks.world_size // args.ntp_batch_size)
    sampled, rollouts, interrupt = [], [], Interrupt()
    if not stages:
        metrics, rollouts = evaluate(policy, held_out, "before, pi_0", vocabulary, args, run)
        stages.append(("before", metrics))
        run.log({"update": 0, "phase": "start", **metrics}, HELDOUT, total)
    for update_number in range(state["update"] + 1, total + 1):
        iteration, k = divmod(update_number - 1, per_iteration)
        phase = "E" if k < rl_updates else "M"
        if k == 0 and learns_q:
            copy_weights(policy, frozen)  # q (the policy) starts from pi_i, whose frozen copy scores
        if phase == "E":
            if k == 0:
                optimizer = new_optimizer(policy, args.rl_learning_rate, args)
            snippets, index = streams["E"].batch(args.rl_batch_size), iteration * rl_updates + k
            metrics, cause = e_step(policy, frozen, optimizer, snippets, vocabulary, args, ranks, index)
            cursors["E"] = streams["E"].cursor
        else:
            if k == rl_updates:
                if learns_q:  # q_i is frozen and samples; pi starts again from pi_i
                    policy, frozen = frozen, policy
                    models = {"policy": policy, "frozen": frozen}
                optimizer = new_optimizer(policy, args.ntp_learning_rate, args)
            if not sampled:  # 1 sample; a resumed run samples the same updates again, and skips those done
                begin, used = time.perf_counter(), state["used"]
                count = min(max(ahead, used + 1), per_iteration - k + used)
                batches = [streams["M"].batch(args.ntp_batch_size) for _ in range(count)]
                keys = [("M", update_number - 1 - used + i, 0) for i in range(count)]
                sampled = sample(frozen, batches, keys, vocabulary, args, ranks)[used:]
                sampling_s = (time.perf_counter() - begin) / count
            metrics, cause = m_step(policy, optimizer, sampled.pop(0), sampling_s, vocabulary, args, ranks)
            state["used"] += 1
            if not sampled:
                cursors["M"], state["used"] = streams["M"].cursor, 0
        # 5 log, evaluate, save
        state["update"], last_of_phase = update_number, k + 1 in (rl_updates, per_iteration)
        evaluated = last_of_phase or (args.eval_every and update_number % args.eval_every == 0)
        if evaluated:
            title = f"after {phase}{iteration + 1}" if last_of_phase else f"update {update_number}"
            heldout_metrics, rollouts = evaluate(policy, held_out, title, vocabulary, args, run)
            metrics |= heldout_metrics
            if last_of_phase:
                stages.append((title, heldout_metrics))
        metrics |= {"update": update_number, "phase": phase, "iteration": iteration + 1}
        metrics["data/texts"] = streams[phase].cursor
        run.log(metrics, CONSOLE[phase] + HELDOUT * bool(evaluated), total, cause)
        if last_of_phase:
            run.export(policy, tokenizer, f"em_{iteration + 1:03d}" + "_q" * (phase == "E"))
        stop = interrupt.requested(ranks)
        if stop or update_number % args.save_every == 0 or last_of_phase:
            run.save(state, models, optimizer)
        if last_of_phase or stop:
            run.curves(CURVES)
        if stop:
            raise KeyboardInterrupt
    if ranks.main and held_out:
        print_table(stages, rollouts, vocabulary, run)


if __name__ == "__main__":
    launch(main, tyro.cli(Args, default=TINY_DEFAULTS if "--tiny" in sys.argv else Args()))
