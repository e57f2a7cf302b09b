"""The language model: loading, sharding, and the forward passes that all scripts need.

What changes a gradient is in the scripts, with one exception: `token_logprobs` stands here once and is pinned
by tests. In the order of use:

    1 loading             load_tokenizer, token_texts, load_model, memory_plan
    2 sharding            shard, gathered, copy_weights, optimizer_step
    3 rows                rank_share, micro_batches, pad_right, positions; attention for a pass without
                          padding, and once over what a row has in common with the one before
    4 sampling            uniforms, inverse_cdf, RowCache
    5 log-probabilities   hidden_before, token_logprobs

Shapes: B rows, T tokens, U distinct tokens, V vocabulary, N selected positions, H heads, D channels.
"""

import contextlib
import math
import types
import zlib
from collections.abc import Sequence
from functools import partial
from os.path import commonprefix

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.functional import embedding
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers import AutoTokenizer, GenerationConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from common import Ranks, UserError, all_max, all_sum, first_line

transformers.utils.logging.disable_progress_bar()

# ---------------------------------------------------------------- 1 loading


def load_tokenizer(name: str):
    """The model's tokenizer; right padding, pad = eos if it has none. UserError if missing or without eos."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # not found, no network, a torn file: there are as many kinds as formats
        raise UserError(f"no tokenizer at {name}: {first_line(error)}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name} has no eos token: set it in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: all masks come from lengths, never from ids
    tokenizer.padding_side = "right"
    tokenizer.clean_up_tokenization_spaces = False  # decode(encode(text)) must be the text
    tokenizer.model_max_length = int(1e9)  # the scripts cut texts themselves; no warning for long ones
    return tokenizer


def eos_ids(tokenizer, name: str) -> set[int]:
    """Tokens that end what the model `name` writes: the tokenizer's eos, and a chat model's end of a turn."""
    with contextlib.suppress(OSError):
        more = GenerationConfig.from_pretrained(name).eos_token_id
        return {tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])} - {None}
    return {tokenizer.eos_token_id}


def token_texts(tokenizer, vocab_size: int) -> list[str]:
    """What each token adds to a text; a part of a character is U+FFFD.

    Decoded behind a letter, because some tokenizers strip the space of a first token.
    """
    letter = tokenizer.encode("a", add_special_tokens=False)[-1]
    texts = tokenizer.batch_decode([[letter, token] for token in range(len(tokenizer))])
    texts = [text[len(tokenizer.decode([letter])) :] for text in texts] + [""] * vocab_size
    return texts[:vocab_size]


LOGIT_CHANGES = ("logit_scale", "logits_scaling", "final_logit_softcapping")  # of Cohere, Granite, Gemma


def load_model(name: str, ranks: Ranks, train: bool = True, recompute: bool = False):
    """The causal language model `name` (hub id or folder) on this rank's device.

    fp32 masters with `train` and on a CPU, else bf16; sharded over the ranks (FSDP2, bf16 compute on a GPU),
    but for a single CPU rank. recompute: gradient checkpointing of every layer. UserError if there is no such
    model, or if it cannot be trained because its logits are not simply those of its output layer.
    """
    dtype = torch.float32 if train or ranks.device.type == "cpu" else torch.bfloat16
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except Exception as error:  # as for the tokenizer
        raise UserError(f"cannot load the model {name}: {first_line(error)}") from None
    config = model.config.get_text_config()
    changed = [key for key in LOGIT_CHANGES if getattr(config, key, None) not in (None, 1)]
    if train and (changed or not hasattr(model, "lm_head")):
        what = f"changes its output layer's logits by {changed[0]}" if changed else "has no lm_head"
        raise UserError(f"{name} {what}, which is not supported")
    model.eval()  # no dropout anywhere; generate needs eval mode to keep its cache
    # nothing else of its own, which may add top-k or a penalty
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    model.requires_grad_(train)
    equip(model)
    if recompute:
        for layer in decoder_layers(model):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    if ranks.device.type == "cpu" and ranks.world_size == 1:
        return model
    return shard(model.to(ranks.device), ranks)


def equip(model) -> None:
    """Our forward passes as the model's methods, for FSDP to gather weights before them; our attention."""
    model.token_logprobs = types.MethodType(_token_logprobs, model)
    model.last_hidden_state = types.MethodType(_last_hidden_state, model)
    model.hidden_before = types.MethodType(_hidden_before, model)
    # sdpa has a flash kernel of its own, and unlike the flash-attn package it takes RowCache's masks
    if has_attention(model, "sdpa") and model._supports_attention_backend and not other_layers(model):
        model.set_attn_implementation(PREFIX_TREE)


def decoder_layers(model) -> torch.nn.ModuleList:
    depth = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]  # a layer may hold experts
    return next((m for m in lists if len(m) == depth), None) or max(lists, key=len)


def memory_plan(name: str, ranks: Ranks, rollout: tuple[int, int], tokens: int, recompute: bool, frozen: int):
    """What --dry-run says about memory: estimates in GiB of a rank, from the config of the model alone.

    rollout: rows at once, tokens of the longest; tokens: of a micro-batch; frozen: bytes a parameter of a
    second model.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name))
    config, weights = model.config.get_text_config(), sum(p.numel() for p in model.parameters())
    layers, width = config.num_hidden_layers, 2 if ranks.device.type == "cuda" else 4  # bytes
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    channels = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    state = (16 + frozen) * weights / ranks.world_size  # fp32 weight, gradient, AdamW's two moments
    gathered_weights = 0 if ranks.device.type == "cpu" and ranks.world_size == 1 else width * weights
    cache = 2 * layers * heads * channels * width * math.prod(rollout)
    of_layer, kept = (20 * config.hidden_size + 4 * inner) * width, config.hidden_size * width  # a token
    activations = tokens * (layers * kept + of_layer if recompute else layers * of_layer)
    gib = [f"{number / 2**30:.2f}" for number in (state, gathered_weights, cache, activations)]
    return (
        f"{name}: {weights / 1e6:.1f}M parameters; estimated GiB on each of {ranks.world_size} ranks "
        f"({ranks.device.type}): {gib[0]} of weights and optimizer,\n  and in a rollout {gib[1]} of gathered "
        f"weights, {gib[2]} of cache ({rollout[0]} rows);\n"
        f"  in an update {gib[3]} of activations ({tokens} tokens)"
    )


def other_layers(model) -> str:
    """What the model has beside attention to all or to the last tokens; "" for most models."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or [])
    kinds -= {"full_attention", "sliding_attention"}
    return ", ".join(sorted(kinds)) or "a recurrent state" * getattr(model, "_is_stateful", False)


def check_context(model, tokens: int, words: str) -> None:
    """UserError if the longest rows, of `tokens` tokens, have more positions than the model."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or tokens
    if tokens > context:
        raise UserError(f"{words} take {tokens} tokens, and the model's context is {context}")


# ---------------------------------------------------------------- 2 sharding


def shard(model, ranks: Ranks):
    """FSDP2: one group of parameters per decoder layer, one for the rest; gradients are summed in fp32."""
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = bf16 if ranks.device.type == "cuda" else MixedPrecisionPolicy()
    mesh = dist.init_device_mesh(ranks.device.type, (ranks.world_size,))
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for method in ("token_logprobs", "last_hidden_state", "hidden_before"):
        register_fsdp_forward_method(model, method)
    return model


@contextlib.contextmanager
def gathered(model):
    """Whole weights on every rank inside: no collective in forward or generate, so ranks may differ."""
    groups = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for group in groups:
        group.set_reshard_after_forward(False)
        group.unshard()
    try:
        yield model
    finally:
        for group in groups:
            group.set_reshard_after_forward(group is not model)
            group.reshard()


@torch.no_grad()
def copy_weights(source, target) -> None:
    """target := source, in place; both sharded alike."""
    for new, old in zip(source.parameters(), target.parameters()):
        old.copy_(new)


def optimizer_step(model, optimizer, loss: float, max_norm: float, ranks: Ranks) -> float:
    """Clip the (global) gradient to `max_norm`, step, clear it; its norm before, the same on all ranks.

    If the norm, or the sum of the ranks' losses, is NaN or infinite, it returns NaN and nothing steps; nor
    without an optimizer.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
    if not math.isfinite(norm) or not math.isfinite(all_sum(loss, ranks)):
        norm = math.nan
    elif optimizer is not None:
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return norm


# ---------------------------------------------------------------- 3 rows


def rank_share(groups: Sequence[list], ranks: Ranks) -> list:
    """The rows of `groups` that this rank trains on: as many as the others', whole groups if they divide."""
    groups, n = sorted(groups, key=lambda rows: sum(map(len, rows))), ranks.world_size
    dealt = [row for rank in range(n) for rows in groups[rank::n] for row in rows]  # about equal work
    return dealt[ranks.share(len(dealt))]


def micro_batches(
    rows: Sequence[list[int]], max_tokens: int, ranks: Ranks | None = None, groups: Sequence | None = None
) -> list[list[int]]:
    """Indices of rows of token ids, the longest first, cut into parts of max_tokens (at least one row each).

    Rows with the same entry in `groups` come together. Tokens are counted with padding, but not those with
    which a row begins like the row before it: `token_logprobs` runs over them once. With `ranks` given, every
    rank returns the same number of micro-batches (FSDP's collectives must pair up); the missing ones are
    empty lists, for which the caller runs one row with weight zero.
    """
    groups = range(len(rows)) if groups is None else groups
    longest: dict = {}
    for group, row in zip(groups, rows):
        longest[group] = max(longest.get(group, 0), len(row))
    batches: list[list[int]] = []
    tokens, width, before = math.inf, 0, []
    for i in sorted(range(len(rows)), key=lambda i: (-longest[groups[i]], groups[i], rows[i])):
        shared = len(commonprefix([rows[i], before]))
        if tokens + width - shared > max_tokens:
            batches.append([])
            tokens, width, shared = 0, longest[groups[i]], 0
        batches[-1].append(i)
        tokens, before = tokens + width - shared, rows[i]
    if ranks is not None:
        batches += [[]] * (int(all_max(len(batches), ranks)) - len(batches))
    return batches


def pad_right(rows: Sequence[Sequence[int]], pad: int, device=None) -> torch.Tensor:
    """Rows of token ids -> [B, T] int64, padded on the right. A causal model needs no mask for them."""
    width = max(len(row) for row in rows)
    padded = np.full((len(rows), width), pad, dtype=np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return torch.from_numpy(padded).to(device)


def padded(rows: list[list[float]], device) -> torch.Tensor:
    """Rows of numbers -> [B, T] float32, zero on the right."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)


def positions(where: Sequence[np.ndarray], device=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns wanted in each row -> (rows [N], cols [N]), row by row, as token_logprobs takes them."""
    rows = np.repeat(np.arange(len(where)), [len(columns) for columns in where])
    return torch.from_numpy(rows).to(device), torch.from_numpy(np.concatenate(where)).to(device)


PREFIX_TREE = "prefix_tree"  # our attention, among transformers' implementations


def has_attention(model, *names: str) -> bool:
    return model.config.get_text_config()._attn_implementation in names


def distinct_tokens(
    input_ids: torch.Tensor, lengths: torch.Tensor, share: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """The U tokens of rows [B, T] of `lengths` [B] tokens; with `share`, without those with which a row
    begins like the one before it, because a causal model makes the same of them.

    Returns index [B, T], which of the U a cell has, and cells [U], their places in input_ids.flatten().
    """
    real = torch.arange(input_ids.shape[1], device=input_ids.device) < lengths.unsqueeze(1)  # [B, T]
    new = real.clone()
    if share:
        new[1:] &= ~((input_ids[1:] == input_ids[:-1]) & real[:-1]).cumprod(1).bool()
    number = new.flatten().cumsum(0).view(new.shape) - 1
    index = torch.where(new, number, 0).cummax(0).values  # what is not new has the number of the row before
    return index, new.flatten().nonzero().squeeze(1)


def unpack(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """[1, H, U, D] -> the rows that they make up, [B, H, T, D]."""
    # an embedding, because its gradient is added up in fp32 and without atomics
    rows = embedding(index, tokens[0].transpose(0, 1).flatten(1))  # [B, T, H * D]
    return rows.view(*index.shape, tokens.shape[1], -1).transpose(1, 2)


def attend(module, query, key, value, attention_mask, packed=None, cached=False, **kw):
    """transformers' sdpa attention. With `packed`, the result of distinct_tokens, it is between rows, while
    queries [1, H, U, D] (and, unless `cached`, keys and values) are those of the U tokens: whatever else a
    layer does, it does to each token by itself.
    """
    if packed is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kw)
    (index, cells), length = packed, packed[0].shape[1]
    if not cached:
        key, value, attention_mask = unpack(key, index), unpack(value, index), None
        kw["is_causal"] = True  # whatever the model concluded from the mask that it was given
        window = kw.get("sliding_window") or length
        if window < length:
            mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=index.device)
            attention_mask = mask.tril().triu(1 - window)
    out, _ = sdpa_attention_forward(module, unpack(query, index), key, value, attention_mask, **kw)
    return out.flatten(0, 1).index_select(0, cells)[None], None  # [B, T, H, D] -> [1, U, H, D]


AttentionInterface.register(PREFIX_TREE, attend)
AttentionMaskInterface.register(PREFIX_TREE, sdpa_mask)


def masks(model, full: torch.Tensor, sliding: torch.Tensor):
    """The attention masks as the model takes them: one for each kind of layer, if it has such. Without a
    window both are the same."""
    if hasattr(model.config.get_text_config(), "layer_types"):
        return {"full_attention": full, "sliding_attention": sliding}
    return sliding


# ---------------------------------------------------------------- 4 sampling


def uniforms(shape: Sequence[int], *key) -> torch.Tensor:
    """Uniform float32 noise in [0, 1) on the CPU that depends on `key` (seed, update, purpose ...) alone.

    All sampling noise is drawn so, for the whole global batch at once, and each rank takes its rows. A run is
    then the same on any number of ranks, and resumes without any generator state.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))
    return torch.rand(tuple(shape), generator=generator)


def inverse_cdf(probs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Draw one index per row of probs [B, V] (need not sum to 1) from noise [B] in [0, 1): [B] int64.

    Equal to torch.multinomial in distribution, but parallel, and the noise is the caller's.
    """
    cdf = probs.cumsum(-1)
    total = cdf[:, -1:]
    # right=True: the first index whose cdf exceeds the threshold, so an index of probability 0 is never drawn
    threshold = torch.minimum(noise.to(cdf).unsqueeze(-1) * total, total * (1 - 2**-22))
    return torch.searchsorted(cdf, threshold, right=True).squeeze(-1)


class RowCache:
    """Keys and values [R, H, W, D] of every layer for R rows that grow, and go back, each at its own pace.

    The token at place p of a row is in column p and sees the columns up to its own. So a row can go back:
    what is fed later writes over what came after, and until then nothing looks at it. UserError for a model
    with a recurrent state, which cannot go back.
    """

    def __init__(self, model, rows: int) -> None:
        what = other_layers(model)
        if what or not has_attention(model, "sdpa", PREFIX_TREE):
            what = what or "no scaled_dot_product_attention"
            raise UserError(f"rollouts need a model with attention only; {type(model).__name__} has {what}")
        self.model, self.rows, self.stored = model, rows, {}
        self.window = getattr(model.config.get_text_config(), "sliding_window", None) or math.inf

    def feed(self, rows: list[int], starts: list[int], tokens: list) -> torch.Tensor:
        """Last hidden states [B, C, D] of next tokens (padded to C), which begin at `starts`, of these rows,
        which ascend.

        The model runs over no padding, and once over what texts fed from their start have in common with the
        one before.
        """
        lengths, share, device = [len(ids) for ids in tokens], not any(starts), self.model.device
        last = max(start + length for start, length in zip(starts, lengths))
        rows, starts, lengths = torch.tensor([rows, starts, lengths], device=device)
        ids = pad_right(tokens, 0, device)  # [B, C]
        packed = distinct_tokens(ids, lengths, share) if has_attention(self.model, PREFIX_TREE) else None
        return self.feed_tensors(rows, starts, ids, lengths, last, packed)

    def feed_tensors(self, rows, starts, ids, lengths, last: int, packed=None) -> torch.Tensor:
        """The same for tensors: rows, starts, lengths [B], ids [B, C]; no row ends behind place `last`."""
        self.used, device = last + 1, ids.device
        rows, starts, ends = rows.unsqueeze(1), starts.unsqueeze(1), (starts + lengths).unsqueeze(1)  # [B, 1]
        # padding goes to the column behind the row's tokens
        places = torch.minimum(starts + torch.arange(ids.shape[1], device=device), ends)  # [B, C]
        columns, own = torch.arange(self.used, device=device), places.unsqueeze(1).unsqueeze(-1)
        mask = local = columns <= own  # [B, 1, C, used]: a token sees the columns up to its own
        if self.window < math.inf:
            local = mask & (columns > own - self.window)
        self.where, self.packed = (rows, places), packed  # for `update`, which the layers call meanwhile
        position_ids = torch.minimum(places, ends - 1)  # padding may be beyond the model's context
        options = {"attention_mask": masks(self.model, mask, local), "cache": self}
        if packed is None:
            return self.model.last_hidden_state(ids, position_ids=position_ids, **options)
        index, cells = packed
        ids, position_ids = ids.flatten()[cells][None], position_ids.flatten()[cells][None]  # [1, U]
        options |= {"packed": packed, "cached": True}
        return self.model.last_hidden_state(ids, position_ids=position_ids, **options)[0, index]

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows [B] alone, in this order; a row may come several times."""
        self.rows, self.stored = len(rows), {name: stored[rows] for name, stored in self.stored.items()}

    def update(self, keys, values, layer: int, *_):
        """Attention layers give their new keys and values [B, H, C, D] and get all [B, H, used, D]."""
        return self._keep((layer, "keys"), keys), self._keep((layer, "values"), values)

    def _keep(self, name, new):
        new = unpack(new, self.packed[0]) if self.packed else new
        stored, (rows, places) = self.stored.get(name), self.where
        if stored is None or stored.shape[2] < self.used:
            wider = new.new_zeros(self.rows, new.shape[1], self.used + 64, new.shape[3])
            if stored is not None:
                wider[:, :, : stored.shape[2]] = stored
            self.stored[name] = stored = wider
        stored[rows, :, places] = new.transpose(1, 2)
        return stored[:, :, : self.used] if len(rows) == self.rows else stored[rows[:, 0], :, : self.used]

    def get_seq_length(self, *_) -> int:
        return 0  # the model asks before it makes a mask; the mask is given


# ---------------------------------------------------------------- 5 log-probabilities


LOGITS_PER_CHUNK = 2**25  # at most so many logits exist at once (128 MiB in fp32)
EVENT = -1  # a target that stands for the set of tokens `event`


def token_logprobs(model, input_ids, rows, cols, **kw) -> tuple[torch.Tensor, torch.Tensor]:
    """log pi(input_ids[rows, cols] | the tokens before), and the entropy of pi there, at N chosen positions
    only.

    input_ids [B, T] right-padded; rows, cols [N] with cols >= 1: the position of the *predicted* token.
    Options: `targets` [N] replaces the tokens at those positions; the target EVENT (-1) stands for "any token
    of the set `event`" (bool [V]), whose log-probability log sum_{v in event} p_v is exact. `temperature`
    divides the logits. Returns logprobs [N] and entropy [N] in nats, float32; the entropy at the positions
    `merged` (bool [N]; if None, those of EVENT) is that of the distribution in which the set is one outcome,
    and it is zero everywhere if `entropy` is False (it costs a second pass). Logits exist for these positions
    alone, in chunks that the backward pass computes again. The forward pass runs over no padding, and once
    over the tokens with which a row begins like the row before it: put completions of the same prompt next to
    each other.
    """
    return model.token_logprobs(input_ids, rows, cols, **kw)


def _last_hidden_state(self, input_ids, cache=None, **kw) -> torch.Tensor:
    """[B, T, D], of which lm_head makes the logits."""
    options = {"past_key_values": cache, "use_cache": cache is not None, **kw}
    return self.get_decoder()(input_ids=input_ids, **options).last_hidden_state


def _hidden_before(self, input_ids, rows, cols) -> torch.Tensor:
    """[N, D], of which lm_head makes the logits of the tokens at rows, cols; see token_logprobs."""
    if not has_attention(self, PREFIX_TREE):
        return _last_hidden_state(self, input_ids)[rows, cols - 1]  # t - 1 predicts token t
    # of each row only the tokens before its last chosen position are needed
    lengths = input_ids.new_ones(len(input_ids)).scatter_reduce(0, rows, cols, "amax")  # [B]
    index, cells = distinct_tokens(input_ids, lengths)  # [B, T], [U]
    # given a mask, the model makes none; an attention that is not `attend` fails on this empty one
    empty = torch.ones(1, 1, 0, 0, dtype=torch.bool, device=cells.device)
    options = {"attention_mask": masks(self, empty, empty), "packed": (index, cells)}
    place, tokens = (cells % input_ids.shape[1])[None], input_ids.flatten()[cells][None]  # [1, U]
    hidden = _last_hidden_state(self, tokens, position_ids=place, **options)
    return embedding(index[rows, cols - 1], hidden[0])  # t - 1 predicts token t


def _token_logprobs(
    self, input_ids, rows, cols, targets=None, event=None, merged=None, temperature=1.0, entropy=False
):
    hidden = _hidden_before(self, input_ids, rows, cols)  # [N, D]
    targets = input_ids[rows, cols] if targets is None else targets
    chunk = max(1, LOGITS_PER_CHUNK // self.config.get_text_config().vocab_size)
    merged = targets == EVENT if merged is None else merged
    options = event, temperature, entropy
    if len(targets) <= chunk:
        return _logprob_chunk(self.lm_head, hidden, targets, merged, *options)
    parts = [
        checkpoint(_logprob_chunk, self.lm_head, *part, *options, use_reentrant=False)
        for part in zip(hidden.split(chunk), targets.split(chunk), merged.split(chunk))
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _logprob_chunk(lm_head, hidden, targets, merged, event, temperature, entropy):
    logits = lm_head(hidden).float()  # [N, V]
    if temperature != 1.0:
        logits = logits / temperature  # the sampled distribution, not the model's at temperature 1
    normaliser = logits.logsumexp(-1)  # [N]
    logprobs = logits.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1) - normaliser
    if event is not None:
        event_logprobs = logits[merged].masked_fill(~event, -math.inf).logsumexp(-1) - normaliser[merged]
        is_event = targets == EVENT  # [N], a part of `merged`
        logprobs = logprobs.masked_scatter(is_event, event_logprobs[is_event[merged]])
    if not entropy:
        return logprobs, torch.zeros_like(logprobs)
    all_logprobs = logits - normaliser.unsqueeze(-1)
    plogp = all_logprobs.exp() * all_logprobs
    entropies = -plogp.sum(-1)
    if event is not None:  # merged: -sum_{v not in event} p log p - p_event log p_event
        outside = -plogp[merged].masked_fill(event, 0.0).sum(-1)
        entropies = entropies.masked_scatter(merged, outside - event_logprobs.exp() * event_logprobs)
    return logprobs, entropies
