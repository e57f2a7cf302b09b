"""Helpers that ra3.py, rmt.py, grpo_rlvr.py and eval_code.py share.

The algorithms are in the scripts. Only two things here change a gradient: `token_logprobs`, which tests pin, and
the optimizer, `new_optimizer` and `optimizer_step` (AdamW, clipping).

    1 errors and signals     UserError, launch, Interrupt
    2 processes              setup, Ranks, all_sum
    3 model                  load_tokenizer, load_model, check_forward, gathered, optimizer_step
    4 sampling               uniforms, inverse_cdf, Sampler, prefill
    5 training forward       micro_batches, token_logprobs
    6 data                   read_rows, column, draw_problems
    7 run folder             Run: arguments, metrics, curves, samples, checkpoints, resume

Shapes: B rows, T tokens, V vocabulary, D hidden size, N chosen positions.
"""

import contextlib
import dataclasses
import errno
import glob
import gzip
import hashlib
import importlib.util
import inspect
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import tokenize
import traceback
import types
import zlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from safetensors import SafetensorError
from torch.distributed.checkpoint import state_dict as distributed_state
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig, LogitsProcessor,
    LogitsProcessorList,
)

transformers.utils.logging.disable_progress_bar()

TINY = Path(__file__).parent / "tiny"  # the bundled toy models and their data


def run_tests(*args, **kw) -> list[dict]:
    """sandbox.run_tests. The import waits until it is called: a fork that runs no programs needs no sandbox.py."""
    from sandbox import run_tests

    return run_tests(*args, **kw)


def usable_cores() -> int:
    """sandbox.usable_cores: the cores of this rank, by affinity and quota. Imported late, like run_tests."""
    from sandbox import usable_cores

    return usable_cores()


# ---------------------------------------------------------------- 1 errors and signals


class UserError(Exception):
    """Something the user can put right. The message is one line and says what to change."""


class Stop(Exception):
    """A signal asked for the end of the run. Every rank raises it at the same place; see Interrupt."""


DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)  # no fault of the code


def launch(main: Callable, args) -> None:
    """Run `main(args)` and leave with an exit code: 0 done, 2 after one line about what the user can put
    right, 130 after an interrupt, 1 after a traceback.

    It leaves by os._exit, for two reasons. A rank that fails must not wait for the others, which may be inside a
    collective; torchrun then ends them. And the interpreter's own end can abort a rank that is done, when a
    thread of gloo still holds a tensor.
    """
    code, message = 0, ""
    try:
        main(args)
        if dist.is_initialized():
            all_sum(0.0, Ranks(dist.get_rank(), dist.get_world_size(), None))  # every rank is done
            dist.destroy_process_group()
    except UserError as error:
        code, message = 2, f"error: {error}\n"
    except (KeyboardInterrupt, Stop):
        code = 130
    except Exception as error:
        code, message = 1, traceback.format_exc()
        if isinstance(error, OSError) and error.errno in DISK:
            code, message = 2, f"error: {disk_error(error)}\n"
        elif isinstance(error, getattr(sys.modules.get("sandbox"), "SandboxError", ())):
            code, message = 2, f"error: {error}\n"  # a limit of the machine
    if message and int(os.environ.get("RANK", 0)):
        time.sleep(2)  # mostly all ranks meet the same error: rank 0 prints it, and torchrun ends the others
    sys.stdout.flush()
    print(message, end="", file=sys.stderr, flush=True)
    os._exit(code)


def disk_error(error: OSError) -> str:
    hint = " (is the disk full or the folder read-only?)" * (error.errno in DISK)
    return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}{hint}"


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_sizes(args, positive: str, not_negative: str) -> None:
    """UserError for an argument out of its range. positive, not_negative: names, separated by spaces."""
    for names, least, words in ((positive, 1e-300, "be positive"), (not_negative, 0, "not be negative")):
        for name in names.split():
            if not getattr(args, name) >= least:
                raise UserError(f"--{name.replace('_', '-')} must {words}, got {getattr(args, name)}")


class Interrupt:
    """Turns SIGTERM and Ctrl-C into a `Stop` at a place where the state can be saved."""

    def __init__(self, ranks: "Ranks") -> None:
        self.ranks, self.signal = ranks, 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number, frame) -> None:
        if self.signal and number == signal.SIGINT:  # the second Ctrl-C does not wait
            raise KeyboardInterrupt
        self.signal = number
        if self.ranks.main:
            print("\nstopping, then saving; press Ctrl-C again to stop at once", file=sys.stderr, flush=True)

    def check(self) -> None:
        """Raise Stop on all ranks if one of them got a signal (a collective: call it on all)."""
        if all_sum(float(self.signal != 0), self.ranks):
            raise Stop


# ---------------------------------------------------------------- 2 processes


@dataclasses.dataclass(frozen=True)
class Ranks:
    rank: int
    world_size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def share(self, size: int) -> slice:
        """This rank's contiguous part of a global batch of `size` rows."""
        return slice(size * self.rank // self.world_size, size * (self.rank + 1) // self.world_size)


def setup(seed: int) -> Ranks:
    """Join torchrun's process group, or make one of a single process. gloo on CPU, nccl on GPU."""
    if seed < 0:
        raise UserError(f"--seed must not be negative, got {seed}")
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"--nproc_per_node is larger than the node's {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("highest")  # some images allow TF32: `check_forward` would see it
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        try:
            dist.init_process_group(backend, timeout=timedelta(hours=12), **alone)
        except (RuntimeError, ValueError) as error:  # the port is in use, a variable of torchrun's is missing
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise UserError(f"cannot join the process group at {where}: {first_line(error)}") from None
    torch.manual_seed(seed)  # no dropout is on; all sampling noise comes from `uniforms`
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def all_sum(value, ranks: Ranks):
    """Sum of a number, a list of numbers or a dict of numbers over all ranks, in float64."""
    if isinstance(value, dict):
        return dict(zip(value, all_sum(list(value.values()), ranks)))
    if ranks.world_size == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def all_gather_list(items: list, ranks: Ranks) -> list:
    """Concatenation of every rank's list, in the order of the ranks, on all ranks."""
    if ranks.world_size == 1:
        return items
    parts = [None] * ranks.world_size
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def together(action: Callable, ranks: Ranks):
    """Run `action` on this rank; if it fails on any rank, all ranks raise the same UserError (no hang)."""
    outcome, error = None, None
    try:
        outcome = action()
    except (UserError, SafetensorError) as caught:
        error = str(caught)
    except OSError as caught:
        error = disk_error(caught)
    errors = [e for e in all_gather_list([error], ranks) if e]
    if errors:
        raise UserError(errors[0])
    return outcome


# ---------------------------------------------------------------- 3 model


def load_tokenizer(name: str):
    """The model's tokenizer. UserError if it is missing or has no eos."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # not found, no network, a torn file: there are as many kinds as formats
        hint = " (the models of a run are in its folder `checkpoints`)" * Path(name, "checkpoints").exists()
        raise UserError(f"no tokenizer at {name}{hint}: {first_line(error)}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name} has no eos token: set it in its tokenizer_config.json")
    tokenizer.clean_up_tokenization_spaces = False  # decode(encode(text)) must be the text
    tokenizer.model_max_length = int(1e9)  # the scripts cut texts themselves; no warning for long ones
    return tokenizer


def eos_ids(tokenizer, name: str) -> set[int]:
    """Tokens that end what the model `name` writes: the tokenizer's eos and those of its generation config."""
    with contextlib.suppress(OSError):
        more = GenerationConfig.from_pretrained(name).eos_token_id
        return {tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])} - {None}
    return {tokenizer.eos_token_id}


def token_texts(tokenizer, vocab_size: int) -> list[str]:
    """What each token adds to a text: [V] strings. A part of a character is U+FFFD.

    Decoded after a letter, because some tokenizers strip the space of a first token.
    """
    letter = tokenizer.encode("a", add_special_tokens=False)[-1]
    texts = tokenizer.batch_decode([[letter, token] for token in range(len(tokenizer))])
    texts = [text[len(tokenizer.decode([letter])) :] for text in texts] + [""] * vocab_size
    return texts[:vocab_size]


def load_model(name: str, tokenizer, ranks: Ranks, longest: int, train: bool = True, recompute: bool = False):
    """The causal language model `name` (hub id or folder) on this rank's device, ready for `token_logprobs`.

    longest: tokens of the longest row of the run; 0 for a model that only samples (scaled logits will do). train:
    weights in fp32, with gradients; else no gradients, and bf16 on a GPU. recompute: gradient checkpointing. On a
    GPU, or with several ranks, the model is sharded (FSDP2; bf16 compute on a GPU). UserError if it does not load,
    has fewer tokens than the tokenizer, if `longest` exceeds its context, or if `check_forward` refuses it.
    """
    on_cpu = ranks.device.type == "cpu"
    try:
        config = AutoConfig.from_pretrained(name)
        text_config = config.get_text_config()
        for key in [key for key in vars(text_config) if "dropout" in key or key.endswith("pdrop")]:
            setattr(text_config, key, 0.0)  # gradient checkpointing needs train mode, in which dropout is on
        dtype = torch.float32 if train or on_cpu else torch.bfloat16
        options = {"config": config, "dtype": dtype, "output_loading_info": True}
        model, found = AutoModelForCausalLM.from_pretrained(name, **options)
        if found["missing_keys"]:  # they would be random
            raise UserError(f"it has no weights for {', '.join(sorted(found['missing_keys'])[:3])}")
    except Exception as error:  # as for the tokenizer
        raise UserError(f"cannot load the model {name}: {first_line(error)}") from None
    if longest > context_of(name):
        raise UserError(f"the longest rows of this run have {longest} tokens; {name} takes {context_of(name)}")
    largest = max(*tokenizer.get_vocab().values(), *eos_ids(tokenizer, name))
    if largest >= model.get_input_embeddings().num_embeddings:
        raise UserError(f"the tokenizer of {name} has more tokens than the model: call model.resize_token_embeddings")
    # not the model's own, which may add top-k or a penalty: the Sampler draws, and generate takes what it drew
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    model.requires_grad_(train)
    model.run = types.MethodType(run_function, model)
    model.to(ranks.device)
    try:
        check_forward(model, name, longest)
        if recompute:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
    except UserError:
        raise
    except Exception as error:  # a model with a cache or an interface of its own, or one that does not fit
        raise UserError(f"cannot use the model {name}: {first_line(error)}") from None
    model.recompute, model.shares_prompts = recompute, bool(longest) and model.shares_prompts and not recompute
    return model if on_cpu and ranks.world_size == 1 else shard(model, ranks)


def context_of(name: str) -> int:
    """Tokens of the longest row that the model `name` has positions for."""
    try:
        config = AutoConfig.from_pretrained(name).get_text_config()
    except Exception as error:
        raise UserError(f"cannot load the model {name}: {first_line(error)}") from None
    return getattr(config, "max_position_embeddings", None) or 10**9


def run_function(model, function: Callable, *args, **kw):
    """`model.run(function, ...)` is function(model, ...). FSDP gathers the weights for it, as for forward."""
    return function(model, *args, **kw)


def check_forward(model, name: str, longest: int) -> None:
    """UserError unless, on short rows, the model's own forward agrees with `generate` on a cache and, if `longest`,
    with `token_logprobs`, also for a row of `longest` tokens. Sets model.shares_prompts (completions may continue
    on their prompt's cache) and model.can_draft (parts of that cache may be masked, too).
    """
    vocab_size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    row, other = torch.randint(vocab_size // 4, max(2, vocab_size // 2), (2, 12), generator=generator).tolist()
    filler = [row[i % 12] for i in range(12, longest)]

    def far(mine, theirs) -> bool:
        difference = (mine.float().cpu() - theirs.float().cpu()).abs()  # nats
        # bf16 rounds single logits by more than the mean; a NaN is far, too
        return not (difference.max() < 1e-3 if model.dtype == torch.float32 else difference.mean() < 0.3)

    def own(ids: list[int], start: int) -> torch.Tensor:
        ids = torch.tensor(ids, device=model.device)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, start - 1 : -1]
        return logits.float().log_softmax(-1).gather(-1, ids[start:, None])[:, 0]

    with torch.no_grad():
        where = [np.arange(1, 12)]
        plain, _ = token_logprobs(model, [row], where)  # [11]
        scaled = far(plain, own(row, 1))
        filled, _ = token_logprobs(model, [row + filler], where)
        ids, mask, cache = prefill(model, [row[:8], other[:3]])
        sampler = Sampler(torch.full((2, 6), 0.5), ids.shape[1], 1.0, model.device)
        options = {"logits_processor": LogitsProcessorList([sampler]), cache_argument(model): cache}
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, **options)
        done = [row[:8] + out[0, 8:].tolist(), other[:3] + out[1, 8:].tolist()], [np.arange(8, 14), np.arange(3, 9)]
        again = torch.cat([own(done[0][0], 8), own(done[0][1], 3)])
        # may a row continue on a cache of which a part is masked? Not with a recurrent state
        cache = DynamicCache(config=model.config)
        states = read_on(model, [row[:6] + other[:3]], [0], torch.zeros(1, 0, dtype=torch.long), cache)
        mask = torch.tensor([[1] * 6 + [0] * 3])
        states = read_on(model, [row[6:]], [6], mask, cache)[0]
        whole = model.get_decoder()(input_ids=torch.tensor([row], device=model.device), use_cache=False)
        attends = not any(cache.is_linear) and not far(states, whole.last_hidden_state[0, 6:])
        model.shares_prompts = attends
        shared, _ = token_logprobs(model, *done, prompt_lengths=[8, 3])
        model.shares_prompts &= not far(again, shared)
        model.can_draft = attends and not any(cache.is_sliding)  # a window would count what is masked
    if longest and scaled:
        raise UserError(f"{name} is not supported: its logits are not its output layer's (scaled or capped)")
    if far(plain, filled):
        raise UserError(
            f"{name} is not supported for rows of {longest} tokens: its positions depend on the longest row "
            "(rope_scaling); shorten the rows, or remove rope_scaling from its config.json"
        )
    if far(again, sampler.logprobs.flatten()):
        raise UserError(f"{name} is not supported: generate and the forward pass give other probabilities")


def cache_argument(model) -> str:
    """The name of the argument that takes the cache: `cache` since transformers 5.24."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def read_on(model, rows, starts, mask, cache) -> torch.Tensor:
    """Last hidden states [B, T, D], left-padded, of rows of tokens that continue on a cache.

    starts [B]: position of each row's first token. mask [B, columns of the cache]: 0 where the cache is ignored.
    """
    ids, new = pad_left(rows, model.device)
    place = (torch.tensor(starts, device=model.device)[:, None] + new.cumsum(1) - 1).clamp(min=0)
    mask = torch.cat([mask.to(model.device), new], 1)
    options = {"use_cache": True, cache_argument(model): cache}
    return model.get_decoder()(input_ids=ids, attention_mask=mask, position_ids=place, **options).last_hidden_state


def decoder_layers(model) -> torch.nn.ModuleList:
    depth = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]  # a layer's experts are one, too
    return next((m for m in lists if len(m) == depth), max(lists, key=len))


def shard(model, ranks: Ranks):
    """FSDP2: one group of parameters per decoder layer, one for the rest; gradients are averaged in fp32."""
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = bf16 if ranks.device.type == "cuda" else MixedPrecisionPolicy()
    mesh = dist.init_device_mesh(ranks.device.type, (ranks.world_size,))
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "run")
    return model


@contextlib.contextmanager
def gathered(model):
    """Inside, every rank has the whole weights: forward and generate need no collective, so ranks may do
    different work."""
    groups = [m for m in model.modules() if isinstance(m, FSDPModule)]
    model.eval()
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
    """target := source, in place; both are sharded alike."""
    for new, old in zip(source.parameters(), target.parameters()):
        old.copy_(new)


def new_optimizer(model, learning_rate: float, weight_decay: float, betas=(0.9, 0.999)) -> torch.optim.AdamW:
    """AdamW that has a state for every parameter from the start, even for one that never gets a gradient. So
    every checkpoint holds the same tensors, and a fresh optimizer can load it."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, weight_decay=weight_decay, betas=betas, fused=True
    )
    distributed_state.get_optimizer_state_dict(model, optimizer)  # makes the states, by a step of size 0
    for state in optimizer.state.values():
        state["step"].zero_()
    return optimizer


def optimizer_step(model, optimizer, loss: float, max_norm: float, ranks: Ranks) -> float:
    """Clip the global gradient to `max_norm`, step, clear it. Returns its norm before clipping.

    If the norm, or the sum of the ranks' losses, is NaN or infinite, no rank steps, and all return NaN.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
    if math.isfinite(norm) and math.isfinite(all_sum(loss, ranks)):
        optimizer.step()
    else:
        norm = math.nan
    model.zero_grad(set_to_none=True)
    return norm


def memory_plan(name: str, ranks: Ranks, rollout: tuple[int, int], tokens: int, recompute: bool, frozen: int):
    """What --dry-run says about memory: estimates in GiB for one rank, from the model's config alone.

    rollout: rows at once, and tokens of the longest. tokens: of a micro-batch. frozen: bytes per parameter of
    the second model; 0 if there is none.
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
        f"({ranks.device.type}): {gib[0]} of weights and optimizer,\n  in a rollout {gib[1]} of gathered "
        f"weights and {gib[2]} of cache ({rollout[0]} rows),\n"
        f"  in an update {gib[3]} of activations ({tokens} tokens)"
    )


# ---------------------------------------------------------------- 4 sampling


def uniforms(shape: Sequence[int], *key) -> torch.Tensor:
    """Uniform float32 noise in [0, 1) on the CPU that depends on `key` (seed, update, purpose ...) alone.

    A run is therefore the same on any number of ranks, and resumes without any generator state.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))
    return torch.rand(tuple(shape), generator=generator)


def inverse_cdf(probs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Draw one index per row of probs [B, V] (need not sum to 1) from noise [B] in [0, 1): [B] int64.

    Equal to torch.multinomial in distribution, but parallel, and the noise is the caller's.
    """
    cdf = probs.cumsum(-1)
    total = cdf[:, -1:]
    # right=True: the first index whose cdf exceeds the threshold, so an index of probability 0 is never drawn.
    # The threshold stays below the total; else rounding could leave no such index
    threshold = torch.minimum(noise.to(cdf).unsqueeze(-1) * total, total * (1 - 2**-22))
    return torch.searchsorted(cdf, threshold, right=True).squeeze(-1)


class Sampler(LogitsProcessor):
    """Draws each token for `generate` from its row's own noise, and notes the token's log-probability.

    All other tokens are masked, so generate, which is greedy, takes the drawn one. noise [B, T]: column t is
    for the t-th new token; start: columns of the prompts; temperature 0: the most likely token. The attribute
    `rows`: which rows of `noise` are still in the batch; the caller may shorten it.
    """

    def __init__(self, noise: torch.Tensor, start: int, temperature: float, device) -> None:
        self.noise, self.start, self.temperature = noise.to(device), start, temperature
        self.logprobs = torch.zeros(noise.shape, device=device)  # [B, T]
        self.rows = torch.arange(len(noise), device=device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.start
        logprobs = (scores.float() / (self.temperature or 1.0)).log_softmax(-1)  # [B, V]
        if self.temperature:
            token = inverse_cdf(logprobs.exp(), self.noise[self.rows, step])  # [B]
        else:
            token = logprobs.argmax(-1)
        self.logprobs[self.rows, step] = logprobs.gather(-1, token[:, None])[:, 0]
        return only(token, scores)


def only(token: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Scores [B, V] that leave one token of each row."""
    return torch.full_like(scores, -math.inf).scatter_(1, token[:, None], 0.0)


def prefill(model, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor, DynamicCache]:
    """Prompts for `generate`: ids and mask [B, P], padded on the left, and a cache with a row for each.

    The cache holds all but a prompt's last token, which generate reads. Equal prompts are read once. Call it
    inside `gathered(model)`.
    """
    rows = [tuple(prompt) for prompt in prompts]
    distinct = list(dict.fromkeys(rows))  # N
    number = {prompt: n for n, prompt in enumerate(distinct)}
    which = torch.tensor([number[row] for row in rows], device=model.device)  # [B]
    ids, mask = pad_left(distinct, model.device)  # [N, P]
    cache = DynamicCache(config=model.config)
    if ids.shape[1] > 1:
        nothing = torch.zeros(len(distinct), 0, dtype=torch.long)
        model.run(read_on, [prompt[:-1] for prompt in distinct], [0] * len(distinct), nothing, cache)
        cache.reorder_cache(which)
    return ids[which], mask[which], cache


# ---------------------------------------------------------------- 5 training forward


def rank_share(groups: Sequence[list], ranks: Ranks) -> list:
    """This rank's rows of `groups`: as many as every other rank's, give or take one, and about as many tokens.

    Groups stay whole if the ranks divide their number.
    """
    groups, n = sorted(groups, key=lambda rows: sum(map(len, rows))), ranks.world_size
    dealt = [row for rank in range(n) for rows in groups[rank::n] for row in rows]  # about equal work
    return dealt[ranks.share(len(dealt))]


def micro_batches(
    lengths: Sequence[int], max_tokens: int, ranks: Ranks | None = None, prompts: Sequence[tuple] | None = None
) -> list[list[int]]:
    """Indices of rows, the longest first, cut into parts of at most max_tokens (at least one row each).

    lengths: tokens of each row; a part counts as its rows times the longest (padding). prompts: each row's
    prompt (token ids), if `lengths` leaves it out: it counts once in a part, and rows that share it stay
    together. With `ranks`, every rank returns the same number of parts, because FSDP's collectives must pair
    up. Some may be empty; for these the caller runs one row with weight zero.
    """
    prompts = [()] * len(lengths) if prompts is None else prompts
    longest: dict = {}
    for prompt, length in zip(prompts, lengths):
        longest[prompt] = max(longest.get(prompt, 0), length)
    order = range(len(lengths))
    order = sorted(order, key=lambda i: (-longest[prompts[i]] - len(prompts[i]), prompts[i], -lengths[i]))
    batches: list[list[int]] = []
    for i in order:
        if batches:
            part = [*batches[-1], i]
            own = {prompts[j] for j in part}
            tokens = len(part) * max(lengths[j] for j in part) + len(own) * max(map(len, own))
        if not batches or tokens > max_tokens:
            batches.append([])
        batches[-1].append(i)
    if ranks is not None:
        batches += [[]] * (max(all_gather_list([len(batches)], ranks)) - len(batches))
    return batches


def pad_right(rows: Sequence[Sequence[int]], device=None) -> torch.Tensor:
    """Rows of token ids -> [B, T] int64, zero on the right. A causal model needs no mask for them."""
    width = max(len(row) for row in rows)
    padded = np.zeros((len(rows), width), dtype=np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return torch.from_numpy(padded).to(device)


def pad_left(rows: Sequence[Sequence[int]], device=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of token ids -> ids [B, T] and mask [B, T], zero on the left."""
    reverse = pad_right([row[::-1] for row in rows], device).flip(1)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    width = reverse.shape[1]
    return reverse, (torch.arange(width, device=device) >= width - lengths[:, None]).long()


def padded(rows: list[list[float]], device) -> torch.Tensor:
    """Rows of numbers -> [B, T] float32, zero on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)


LOGITS_PER_CHUNK = 2**25  # at most so many logits exist at once (128 MiB in fp32)
EVENT = -1  # a target that stands for the set of tokens `event`


def token_logprobs(model, rows, where, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """log pi(token | the tokens before it) and the entropy of pi there, at N chosen positions only.

    rows: B lists of token ids. where: for each row the positions (>= 1) of the tokens wanted; N in all, row
    by row. Options:
      targets [N]     tokens in place of the rows' own. The target EVENT (-1) stands for "any token of the set
                      `event`" (bool [V]); its log-probability log sum_{v in event} p_v is exact
      merged [N]      bool: where the set counts as one outcome in the entropy (default: where the target is EVENT)
      temperature     divides the logits
      entropy         False: its place is filled with zeros (it costs a second pass over the logits)
      prompt_lengths  how many tokens of each row are its prompt; the positions wanted are beyond them. Equal
                      prompts go through the model once, and the rest of each row continues on their cache
    Returns logprobs [N] and entropies [N] in nats, float32. Logits exist at these positions alone, in chunks
    that the backward pass computes again.
    """
    # gradient checkpointing works in train mode only
    model.train(torch.is_grad_enabled() and getattr(model, "recompute", False))
    return model.run(_token_logprobs, rows, where, **options)


def hidden_before(model, rows, where, prompt_lengths=None) -> torch.Tensor:
    """Last hidden states [N, D] from which the tokens at the positions `where` of the rows are predicted."""
    device, decoder = model.device, model.get_decoder()
    row = torch.from_numpy(np.repeat(np.arange(len(where)), [len(w) for w in where])).to(device)  # [N]
    before = torch.from_numpy(np.concatenate(where) - 1).to(device)  # [N]; position t - 1 predicts token t
    if prompt_lengths is None or not model.shares_prompts:
        return decoder(input_ids=pad_right(rows, device), use_cache=False).last_hidden_state[row, before]
    # not `prefill`: FSDP gathers a layer in the backward pass only if the layer's output gets a gradient, so the last
    # hidden state of the prompt must be in the loss
    prompts = [tuple(ids[:length]) for ids, length in zip(rows, prompt_lengths)]
    distinct = list(dict.fromkeys(prompts))
    number = {prompt: i for i, prompt in enumerate(distinct)}
    which = torch.tensor([number[prompt] for prompt in prompts], device=device)  # [B]
    cache = DynamicCache(config=model.config)
    options = {"use_cache": True, cache_argument(model): cache}
    ids, mask = pad_left([list(prompt) for prompt in distinct], device)
    place = (mask.cumsum(1) - 1).clamp(min=0)
    first = decoder(input_ids=ids, attention_mask=mask, position_ids=place, **options).last_hidden_state[:, -1:]
    cache.reorder_cache(which)  # a row of the cache for every completion; gradients flow back through it
    ids = pad_right([ids[length:] for ids, length in zip(rows, prompt_lengths)], device)  # [B, T]
    ids = ids[:, : max(1, ids.shape[1] - 1)]  # the last token predicts nothing
    mask = torch.cat([mask[which], torch.ones_like(ids)], 1)
    place = (mask.cumsum(1) - 1)[:, -ids.shape[1] :]
    rest = decoder(input_ids=ids, attention_mask=mask, position_ids=place, **options).last_hidden_state
    lengths = torch.tensor(prompt_lengths, device=device)
    return torch.cat([first[which], rest], 1)[row, before + 1 - lengths[row]]


def _token_logprobs(
    model, rows, where, targets=None, event=None, merged=None, temperature=1.0, entropy=False, prompt_lengths=None
):
    hidden = hidden_before(model, rows, where, prompt_lengths)  # [N, D]
    if targets is None:
        targets = torch.from_numpy(np.concatenate([np.asarray(r)[w] for r, w in zip(rows, where)])).to(hidden.device)
    merged = targets == EVENT if merged is None else merged
    chunk = max(1, LOGITS_PER_CHUNK // model.config.get_text_config().vocab_size)
    options = event, temperature, entropy
    head = model.get_output_embeddings()
    if len(targets) <= chunk:
        return _logprob_chunk(head, hidden, targets, merged, *options)
    parts = [
        checkpoint(_logprob_chunk, head, *part, *options, use_reentrant=False)
        for part in zip(hidden.split(chunk), targets.split(chunk), merged.split(chunk))
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _logprob_chunk(head, hidden, targets, merged, event, temperature, entropy):
    logits = head(hidden).float()  # [N, V]
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


# ---------------------------------------------------------------- 6 data


TABLES = (".jsonl", ".jsonl.gz", ".parquet")


def read_rows(source: str, split: str = "train") -> Iterator[dict]:
    """Stream the rows of a data set, in order.

    source: a .jsonl, .jsonl.gz, .json (a list), .parquet, .txt or .py file; a folder: its .py files if they
    outnumber its .jsonl, .jsonl.gz and .parquet files, else these, or its .txt files if it has neither; `stdlib`
    (this Python's standard library); or a hub id, with a config or a data-file pattern after a colon
    (`org/name:config`, `org/name:folder/*.arrow`). UserError for what does not exist or cannot be read.
    """
    path = Path(source)
    if source == "stdlib":
        yield from _python_files(Path(sysconfig.get_paths()["stdlib"]), ("test", "tests", "idlelib"))
    elif path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.name.endswith(TABLES) and p.is_file())
        if len(files) < sum(1 for _ in path.rglob("*.py")):  # a data set may come with a script
            yield from _python_files(path)
            return
        files = files or sorted(path.rglob("*.txt"))
        if not files:
            raise UserError(f"{source} holds no .py, .jsonl, .parquet or .txt file")
        for file in files:
            yield from _file_rows(file)
    elif path.is_file():
        yield from _file_rows(path)
    elif source.startswith((".", "/")) or source.endswith("/") or (
        path.suffix in (".jsonl", ".json", ".gz", ".parquet", ".txt", ".py") and ":" not in source
    ):
        raise UserError(f"no such data file or folder: {source}")
    else:
        yield from _hub_rows(source, split)


def _python_files(folder: Path, skip: Sequence[str] = ()) -> Iterator[dict]:
    skip = {"site-packages", "node_modules", *skip}
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder).parts  # .venv, .git and the like are not one's own code
        if not any(part in skip or part.startswith(".") for part in parts):
            try:
                with tokenize.open(file) as handle:  # honours the coding cookie and turns CRLF into LF
                    yield {"text": handle.read(), "path": str(file.relative_to(folder))}
            except (SyntaxError, UnicodeDecodeError, OSError):
                continue  # not Python in its declared encoding


def _file_rows(file: Path) -> Iterator[dict]:
    try:
        if file.suffix == ".parquet":
            import pyarrow.parquet

            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024):
                yield from batch.to_pylist()
        elif file.suffix in (".txt", ".py"):
            yield {"text": file.read_text(encoding="utf-8-sig", errors="replace"), "path": str(file)}
        else:
            opener = gzip.open if file.suffix == ".gz" else open
            with opener(file, "rt", encoding="utf-8-sig") as handle:  # Windows writes a BOM
                if file.suffix == ".json":
                    yield from json.load(handle)
                    return
                for number, line in enumerate(handle, start=1):
                    if line.strip():
                        try:
                            yield json.loads(line)
                        except json.JSONDecodeError as error:
                            where = f"{file}, line {number}"
                            raise UserError(f"{where}: not a JSON object ({error.msg})") from None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"cannot read {file}: {first_line(error)}") from None


def _hub_rows(source: str, split: str) -> Iterator[dict]:
    import datasets

    name, _, part = source.partition(":")
    is_pattern = "*" in part or "/" in part or part.endswith((*TABLES, ".json", ".arrow", ".csv", ".txt", ".zst"))
    try:
        files, config = (part, None) if is_pattern else (None, part or None)
        yield from datasets.load_dataset(name, name=config, data_files=files, split=split, streaming=True)
    except Exception as error:  # not found, no such config or split, no network: many libraries' kinds
        raise UserError(f"cannot load the data set {source} (split {split}): {first_line(error)}") from None


def fingerprint(sources: Sequence[str]) -> str:
    """A hash of the names, sizes and first MiB of data files. By it a resumed run notices that they changed."""
    digest = hashlib.sha256(sys.version.encode() * ("stdlib" in sources))  # each Python has its own
    for source in map(Path, filter(os.path.exists, sources)):
        # not what other programs write into a folder, as .git and __pycache__
        inside = (p for p in source.rglob("*") if p.name.endswith((*TABLES, ".py", ".txt")) and p.is_file())
        for file in sorted(inside) if source.is_dir() else [source]:
            with open(file, "rb") as handle:
                digest.update(repr((file.name, file.stat().st_size)).encode() + handle.read(2**20))
    return digest.hexdigest()[:16]


def column(row: dict, name: str, source: str):
    """row[name]; if it is missing, a UserError that names the columns there are."""
    if not isinstance(row, dict) or name not in row:
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{source} has no column `{name}`; it has: {found}")
    return row[name]


def draw_problems(cursor: int, count: int, size: int, seed: int) -> list[int]:
    """Indices of the `count` problems after the first `cursor`; each epoch of `size` has a seeded order."""
    positions = [divmod(position, size) for position in range(cursor, cursor + count)]
    orders = {epoch: np.random.default_rng([seed, 1, epoch]).permutation(size) for epoch, _ in positions}
    return [int(orders[epoch][place]) for epoch, place in positions]


# ---------------------------------------------------------------- 7 run folder

# arguments that may differ on --resume: they change memory, speed, output, or how long the run goes on
# (with another --updates, rmt.py's budget and curriculum change, too)
NOT_DEFINING = {"resume", "output_dir", "dry_run", "workers", "track", "save_every", "eval_every", "updates"}
NOT_DEFINING |= {"em_iterations", "micro_batch_tokens", "rollout_rows", "gradient_checkpointing"}
MAX_SKIPPED = 3  # the run ends after so many updates in a row whose loss or gradient is not finite
SAMPLES = """<!DOCTYPE html><meta charset="utf-8"><title>samples</title><style>
:root { color-scheme: light dark }
body { font: 15px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }
pre { background: light-dark(#f6f6f6, #222); padding: 1em; white-space: pre-wrap }
.thought { color: light-dark(#0a7d33, #5fd38a); font-weight: bold } .good { color: light-dark(#0a7d33, #5fd38a) }
.bad { color: light-dark(#b3261e, #f28b82) } .note { color: light-dark(#666, #aaa) }
</style><h1>"""


def write_whole(path: Path, text: str) -> None:
    """Write a small file aside, then rename it: a reader, or a run killed here, never sees half of it."""
    aside = path.with_name(f".{path.name}.partial")
    with open(aside, "w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(aside, path)


def discard(folder: Path) -> None:
    """Remove a checkpoint, state.json first: without it, what a killed run leaves is not taken for complete."""
    (folder / "state.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


class Run:
    """One folder per run: args.json, env.txt, sources, metrics.jsonl, samples.html, curves.png, checkpoints.

    data: the sources that it reads, for `fingerprint`. `state` is the state.json of the last complete checkpoint
    (None for a fresh run). UserError if the folder cannot be written, if there is nothing to resume, or if the
    arguments that define the run, or its data, differ.
    """

    def __init__(self, args, script: str, ranks: Ranks, data: Sequence[str] = ()) -> None:
        self.args, self.script, self.ranks, self.data = args, Path(script), ranks, data
        model = Path(args.model).resolve().name if Path(args.model).exists() else args.model.replace("/", "_")
        task = "".join(f"_{getattr(args, name)}" for name in ("task", "algo") if hasattr(args, name))
        self.stem = f"{self.script.stem}{task}__{model}__s{args.seed}__"
        path = together(self._claim if ranks.main else lambda: None, ranks)
        self.path = Path(all_gather_list([path], ranks)[0])
        self.state = together(self._open, ranks)  # changes no file: a rank may still refuse
        together(self._prepare, ranks)
        self.writer = self.tracker = self.first_log = None
        self.skipped = self.skipped_in_a_row = 0  # updates whose loss or gradient was not finite
        self.started, self.seconds_before = time.time(), 0.0  # seconds_before: of this run until it was resumed
        resumed = f", resumed at update {self.state['update']}" if self.state else ""
        self.say(f"run folder {self.path}{resumed}")

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.ranks.main:
            print(text, flush=True)

    def _claim(self) -> str:
        """The folder of this run; two runs that start in the same second get different ones."""
        args = self.args
        if args.resume not in ("", "auto"):
            return args.resume
        if args.output_dir:
            return args.output_dir
        if args.resume:
            bootstraps = getattr(args, "bootstrap_only", False)  # RA3: it continues a file, not a checkpoint
            kept = "bootstrapped.jsonl" if bootstraps else "checkpoints/state_*/state.json"
            found = sorted(Path("runs").glob(f"{glob.escape(self.stem)}*/{kept}"))
            earlier = [Path(*file.parts[:2]) for file in found]
            # the stem has only the last part of a folder's path, as `final`
            arguments = [json.loads((run / "args.json").read_text(encoding="utf-8")) for run in earlier]
            own = [run for run, a in zip(earlier, arguments) if a["model"] == args.model]
            if own:
                return str(own[-1])
        first, number = f"runs/{self.stem}{time.strftime('%Y%m%d-%H%M%S')}", 1
        path = first
        Path("runs").mkdir(exist_ok=True)  # an error if it is a link to nowhere
        while True:
            with contextlib.suppress(FileExistsError):
                Path(path).mkdir()
                return path
            number += 1
            path = f"{first}_{number}"

    def _open(self) -> dict | None:
        if getattr(self.args, "track", False) and importlib.util.find_spec("wandb") is None:
            raise UserError("--track needs Weights & Biases: pip install wandb")
        for source in map(Path, self.data):  # the run's own files would be new data on --resume
            if source.is_dir() and source.resolve() in self.path.resolve().parents:
                raise UserError(f"{self.path} lies inside the data, {source}: choose an --output-dir outside it")
        found = (self._complete() or [None])[-1] if self.args.resume else None
        outputs = [(self.path / name).exists() for name in ("bootstrapped.jsonl", "metrics.jsonl", "batches")]
        if self.args.resume not in ("", "auto") and found is None and not outputs[0]:
            raise UserError(f"nothing to resume in {self.path}: it holds no complete checkpoint")
        now = json.loads(json.dumps(dataclasses.asdict(self.args), default=str))
        data = {"data_fingerprint": fingerprint(self.data)}
        if self.args.resume and (self.path / "args.json").exists():
            before = json.loads((self.path / "args.json").read_text(encoding="utf-8"))
            differ = [k for k in now if k not in NOT_DEFINING and now[k] != before.get(k)]
            if differ:
                changes = ", ".join(f"--{k.replace('_', '-')} {before.get(k)} -> {now[k]}" for k in differ)
                raise UserError(f"cannot resume {self.path}: the arguments differ ({changes})")
            if not data.items() <= before.items():
                raise UserError(f"cannot resume {self.path}: the data have changed ({', '.join(self.data)})")
        self.written = {"args.json": json.dumps(now | data, indent=1)}
        if not self.args.resume and any(outputs):
            raise UserError(f"{self.path} already holds a run; choose another --output-dir, or --resume auto")
        return json.loads((found / "state.json").read_text(encoding="utf-8")) if found else None

    def _prepare(self) -> None:
        if not self.ranks.main:
            return
        if self.state is None:  # what a run left that was killed before its first checkpoint
            (self.path / "metrics.jsonl").unlink(missing_ok=True)
        (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        for torn in self.path.glob("checkpoints/.*.partial"):  # an earlier run was killed there
            shutil.rmtree(torn)
        for name, text in {**self.written, "env.txt": environment(self.ranks)}.items():
            write_whole(self.path / name, text)
        for source in {self.script.resolve(), Path(__file__).resolve()}:
            with contextlib.suppress(shutil.SameFileError):  # a run may go on with its own copy
                shutil.copy(source, self.path / source.name)

    # -- metrics

    def log(self, metrics: dict, console: Sequence[str] = (), total: int = 0, skipped: bool = False) -> None:
        """Append one object to metrics.jsonl and to TensorBoard, print a line (rank 0).

        metrics: must hold `update`; values that are not finite are left out. console: the parts of the line, as
        formats of keys of metrics; a part with a missing key is left out. total: updates of the run. skipped: the
        loss or the gradient was not finite; UserError after MAX_SKIPPED such updates in a row.
        """
        self.skipped += skipped
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * skipped
        if self.ranks.main:
            update, now = metrics["update"], time.time()
            if self.first_log is None:
                self.first_log = update, now
            first, begun = self.first_log
            own = {"optim/skipped": self.skipped, "perf/peak_memory_gib": peak_memory()}
            own["time/wall_s"] = self.seconds_before + now - self.started
            metrics = {k: v for k, v in (metrics | own).items() if not isinstance(v, float) or math.isfinite(v)}
            self._write({k: round(v, 6) if isinstance(v, float) else v for k, v in metrics.items()})
            parts = [f"{update:{len(str(total))}}/{total}"]
            for part in console:
                with contextlib.suppress(KeyError):
                    parts.append(part.format_map(metrics))
            if first < update < total:
                parts.append(f"{(now - begun) / (update - first) * (total - update) / 60:.1f} min left")
            parts += ["skipped: loss or gradient is not finite"] * skipped
            print(" | ".join(parts), flush=True)
        if self.skipped_in_a_row == MAX_SKIPPED:
            words = f"{MAX_SKIPPED} updates in a row without a finite loss and gradient"
            raise UserError(f"{words}. The last checkpoint is good; lower the learning rate")

    def _write(self, metrics: dict) -> None:
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as handle:
            handle.write(json.dumps(metrics, allow_nan=False) + "\n")
        if self.writer is None:
            self._start_writers(metrics["update"])
        numbers = {k: v for k, v in metrics.items() if isinstance(v, (int, float)) and k != "update"}
        for key, value in numbers.items():
            self.writer.add_scalar(key, value, metrics["update"])
        self.writer.flush()
        if self.tracker:
            self.tracker.log(numbers, step=metrics["update"])

    def _start_writers(self, update: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(self.path / "tensorboard", purge_step=update)
        arguments = dataclasses.asdict(self.args)
        rows = ["|argument|value|", "|-|-|", *(f"|{k}|{v}|" for k, v in arguments.items())]
        self.writer.add_text("arguments", "\n".join(rows))
        if getattr(self.args, "track", False):
            import wandb

            name = self.path.name
            self.tracker = wandb.init(project=self.script.stem, name=name, id=name, resume="allow", config=arguments)

    def curves(self, panels: Sequence[tuple]) -> None:
        """Draw curves.png (rank 0): raw points faint, a running mean over them.

        panels: (title, keys of metrics.jsonl with their labels, x key); a panel without a value is left out.
        """
        if not self.ranks.main or not (self.path / "metrics.jsonl").exists():
            return
        from matplotlib.figure import Figure

        lines = (self.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        history = [json.loads(line) for line in lines]
        panels = [p for p in panels if any(key in row for key in p[1] for row in history)]
        if not panels:
            return
        columns = min(3, len(panels))
        height = math.ceil(len(panels) / columns)
        figure = Figure(figsize=(4.4 * columns, 3.0 * height), layout="constrained")
        for index, (title, keys, x) in enumerate(panels):
            axis = figure.add_subplot(height, columns, index + 1)
            for key, label in keys.items():
                points = [(row[x], row[key]) for row in history if key in row and x in row]
                if points:
                    draw_series(axis, np.array(points, dtype=float), label)
            for before, row in zip(history, history[1:]):
                if before.get("phase") != row.get("phase") and x in row:  # RA3: E-step and M-step
                    axis.axvline(row[x], color="0.6", linewidth=0.8, linestyle="--")
                    where = {"transform": axis.get_xaxis_transform(), "va": "top"}
                    axis.text(row[x], 1.0, f" {row['phase']}", fontsize=8, **where)
            axis.set_title(title, fontsize=10)
            axis.set_xlabel({"update": "update", "time/wall_s": "seconds"}.get(x, x), fontsize=9)
            axis.grid(alpha=0.25)
            if len(keys) > 1:
                axis.legend(fontsize=8)
        figure.savefig(self.path / "curves.png", dpi=110)
        if self.tracker:
            import wandb

            self.tracker.log({"curves": wandb.Image(str(self.path / "curves.png"))})

    def samples(self, title: str, legend: str, blocks: Sequence[str]) -> None:
        """Add a section to samples.html (rank 0). If it is there, because the run was resumed before it, the new
        one replaces it and all after it. All arguments are HTML; blocks may use the classes of SAMPLES."""
        path, head = self.path / "samples.html", f"{SAMPLES}{self.path.name}</h1>\n<p>{legend}</p>\n"
        if self.ranks.main and blocks:
            earlier = path.read_text(encoding="utf-8") if path.exists() else head
            earlier = earlier.split(f"<h2>{title}</h2>\n")[0]
            write_whole(path, f"{earlier}<h2>{title}</h2>\n" + "\n".join(blocks) + "\n")

    # -- checkpoints

    def export(self, model, name: str) -> None:
        """Write checkpoints/<name>, which AutoModelForCausalLM.from_pretrained loads. Atomic; all ranks.

        Configuration and tokenizer are those of --model, unchanged: only the weights are new.
        """
        target, source = self.path / "checkpoints" / name, self.args.model
        weights, once = {}, {key for key, _ in model.named_parameters()}
        # second names of a tensor; the config is not asked, because it may claim a tie that does not exist
        tied = {key for key, _ in model.named_parameters(remove_duplicate=False)} - once
        for key, value in model.state_dict().items():
            if key in tied:
                continue
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value  # one tensor at a time
            if self.ranks.main:
                weights[key] = whole.detach().to("cpu", copy=True)

        def write(aside: Path) -> None:
            if self.ranks.main:
                model.save_pretrained(aside, state_dict=weights)
                AutoConfig.from_pretrained(source, dtype=torch.float32).save_pretrained(aside)
                AutoTokenizer.from_pretrained(source).save_pretrained(aside)
                (aside / "generation_config.json").unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    GenerationConfig.from_pretrained(source).save_pretrained(aside)

        self._publish(target, write)
        self.say(f"saved {target}")

    def save(self, state: dict, models: dict, optimizer) -> None:
        """Write the state that --resume continues from; the last two are kept. Atomic; all ranks.

        state: a dict for JSON that holds `update`, the number of updates done, and what else the script needs to
        go on. models: name -> model; "policy" is the optimizer's. optimizer may be None.
        """
        state = {**state, "skipped": [self.skipped, self.skipped_in_a_row]}
        state["seconds"] = self.seconds_before + time.time() - self.started
        tensors = saved_tensors(models, optimizer)

        def write(aside: Path) -> None:
            try:
                dcp.save(tensors, checkpoint_id=aside)
            except dcp.CheckpointException as error:  # of any rank; it is no subclass of Exception
                raise UserError(failures(error)) from None
            if self.ranks.main:
                write_whole(aside / "state.json", json.dumps(state))

        self._publish(self.path / "checkpoints" / f"state_{state['update']:06d}", write)
        if self.ranks.main:
            for old in self._complete()[:-2]:
                discard(old)

    def stopped(self, state: dict, models: dict, optimizer) -> None:
        """After a `Stop`: save, say how to go on, and leave."""
        self.save(state, models, optimizer)
        self.say(f"saved update {state['update']}; the same command with --resume {self.path} continues")
        raise Stop

    def _publish(self, target: Path, write: Callable) -> None:
        """Let all ranks `write(aside)`, then rename: `target` is whole or absent. UserError if one fails."""
        aside = target.with_name(f".{target.name}.partial")

        def clear() -> None:
            if self.ranks.main:
                shutil.rmtree(aside, ignore_errors=True)

        def rename() -> None:
            if self.ranks.main:
                discard(target)
                os.replace(aside, target)

        together(clear, self.ranks)
        try:
            together(lambda: write(aside), self.ranks)
            together(rename, self.ranks)
        except UserError as error:
            clear()  # a full disk needs the space
            reason = f"cannot write {target} ({error}). Earlier checkpoints are intact"
            raise UserError(reason) from None

    def _complete(self) -> list[Path]:
        return sorted(p.parent for p in self.path.glob("checkpoints/state_*/state.json"))

    def restore(self, models: dict, optimizer) -> dict:
        """Load the last complete checkpoint, cut metrics.jsonl back to it, return its state."""
        folder = self._complete()[-1]
        tensors = saved_tensors(models, optimizer)
        try:
            dcp.load(tensors, checkpoint_id=folder)
        except dcp.CheckpointException as error:
            words = failures(error)
            damaged = "" if "key" in words else ": if it is damaged, delete the folder to go on from the one before"
            raise UserError(f"cannot read {folder} ({words}){damaged}") from None
        for name, model in models.items():
            options = distributed_state.StateDictOptions(strict=False)  # without the tied head
            distributed_state.set_model_state_dict(model, tensors[name], options=options)
        if optimizer is not None:
            distributed_state.set_optimizer_state_dict(models["policy"], optimizer, tensors["optimizer"])
        metrics = self.path / "metrics.jsonl"
        if self.ranks.main and metrics.exists():
            lines = [line for line in metrics.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["update"] <= self.state["update"]]
            write_whole(metrics, "".join(line + "\n" for line in kept))
        self.skipped, self.skipped_in_a_row = self.state.pop("skipped")
        self.seconds_before = self.state.pop("seconds")
        return self.state


def draw_series(axis, points: np.ndarray, label: str) -> None:
    """Faint dots for points [n, 2], and their running mean over a tenth of them, with a gap where x has one."""
    x, y = points.T
    width = max(1, len(y) // 10)
    sums = np.cumsum(np.pad(y, (1, 0)))
    ends, starts = np.arange(1, len(y) + 1), np.maximum(0, np.arange(1, len(y) + 1) - width)
    steps = np.diff(x, prepend=x[0])
    mean = np.where(steps > 10 * np.median(steps), np.nan, (sums[ends] - sums[starts]) / (ends - starts))
    (line,) = axis.plot(x, mean, linewidth=1.5, label=label)
    axis.plot(x, y, ".", markersize=3, alpha=0.3 if width > 1 else 1.0, color=line.get_color())


def peak_memory() -> float:
    """The most GiB that this rank has used: of its GPU, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def saved_tensors(models: dict, optimizer) -> dict:
    """What a checkpoint holds, sharded as it is."""
    tensors = {name: distributed_state.get_model_state_dict(model) for name, model in models.items()}
    if optimizer is not None:
        tensors["optimizer"] = distributed_state.get_optimizer_state_dict(models["policy"], optimizer)
    return tensors


def failures(error: dcp.CheckpointException) -> str:
    """In one line, what went wrong on the first rank that failed."""
    return first_line(next(iter(error.failures.values()))[0])


def environment(ranks: Ranks) -> str:
    def git(*command: str) -> str:
        options = {"capture_output": True, "encoding": "utf-8", "errors": "replace", "cwd": Path(__file__).parent}
        return subprocess.run(["git", *command], **options).stdout.strip()

    on_gpu = ranks.device.type == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else f"cpu, {torch.get_num_threads()} threads"
    try:
        commit, diff = git("rev-parse", "HEAD"), git("diff", "HEAD")
    except OSError:
        commit, diff = "(no git)", ""
    lines = {"command": " ".join(sys.argv), "ranks": ranks.world_size, "device": device}
    lines |= {"python": sys.version.split()[0], "torch": torch.__version__}
    lines |= {"transformers": transformers.__version__, "commit": commit}
    return "".join(f"{name}: {value}\n" for name, value in lines.items()) + f"\n{diff}\n"
