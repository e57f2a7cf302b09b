"""RMT's data: texts as tokens, and how uncertain a proxy model is at each of their positions.

    sources -> read_texts         training and held-out texts
    texts   -> proxy_entropies    computed once, over all ranks, and kept on disk
            -> score_texts        entropies and most likely tokens; the latter are next-token prediction

What the entropies mean (easy, medium, hard) is in rmt.py.
"""

import hashlib
import math
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoConfig

from common import Ranks, Run, UserError, all_gather_list, all_sum, column, read_rows, together
from modeling import (
    LOGITS_PER_CHUNK, gathered, load_model, load_tokenizer, micro_batches, pad_right, positions, uniforms,
)

POOL = 20  # the texts used are a random choice of so many times more, read from the start of a source
TOP_TOKENS = 16  # the entropy is that of the 16 most likely next tokens (RPT), renormalised


def bos_ids(tokenizer) -> list[int]:
    """The token that every text begins with, if the tokenizer has one."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def read_texts(args, tokenizer) -> tuple[list[list[int]], list[list[int]]]:
    """(training texts, held-out texts) as token ids, with BOS if there is one; each source has its share.

    args: rmt.Args. Longer texts are cut. UserError if there is no text for one of the two.
    """
    total, train, heldout, bos = args.train_texts + args.eval_texts, [], [], bos_ids(tokenizer)
    weights = args.dataset_weights
    if len(weights) != len(args.dataset):
        weights = [1.0] * len(args.dataset)
    for source, weight in zip(args.dataset, weights):
        texts, wanted = [], math.ceil(total * weight / sum(weights))
        for row in read_rows(source, split="test" if "Omni-MATH" in source else "train"):  # it has no other
            text = "\n".join(str(column(row, name, source) or "") for name in args.text_column)
            ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
            cuts = [ids[i : i + args.max_text_tokens] for i in range(0, len(ids), args.max_text_tokens)]
            texts += [bos + cut for cut in cuts if len(cut) > 1]
            if len(texts) >= POOL * wanted:
                break
        order = uniforms([len(texts)], "split").argsort().tolist()[:wanted]  # not by the seed
        cut = round(len(order) * args.eval_texts / total)
        heldout += [texts[i] for i in order[:cut]]
        train += [texts[i] for i in order[cut:]]
    if not train or not heldout:
        found = f"{len(train)} training, {len(heldout)} held-out texts"
        raise UserError(f"{found} in {', '.join(args.dataset)}: give more data, or longer texts")
    return train, heldout


def top_entropy(logits: torch.Tensor, k: int = TOP_TOKENS) -> torch.Tensor:
    """Entropy (nats) of the k most likely next tokens, their probabilities renormalised. [..., V] -> [...]"""
    logprobs = logits.topk(min(k, logits.shape[-1]), dim=-1).values.float().log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


@torch.no_grad()
def score_texts(model, texts: list[list[int]], max_tokens: int, ranks: Ranks, title=""):
    """(entropies, most likely tokens) at every position of every text: two lists of arrays, on all ranks.

    Entry t is about token t given the tokens before it; both are 0 for the first, which has none.
    """
    mine = texts[ranks.share(len(texts))]
    entropies, predictions = [None] * len(mine), [None] * len(mine)
    chunk = max(1, LOGITS_PER_CHUNK // model.config.get_text_config().vocab_size)  # positions
    with gathered(model):
        batches = micro_batches(mine, max_tokens)
        for batch in tqdm(batches, title, disable=not (title and ranks.main), leave=False):
            where = [np.arange(1, len(mine[i])) for i in batch]
            input_ids = pad_right([mine[i] for i in batch], 0, ranks.device)  # [B, L]
            hidden = model.hidden_before(input_ids, *positions(where, ranks.device))  # [K, D]
            chunks = map(model.lm_head, hidden.split(chunk))
            parts = zip(*[(top_entropy(logits), logits.argmax(-1)) for logits in chunks])
            cuts = np.cumsum([len(cols) for cols in where])[:-1]
            found = [np.split(torch.cat(part).cpu().numpy(), cuts) for part in parts]  # a row's each
            for i, *values in zip(batch, *found):
                entropies[i], predictions[i] = (np.pad(row, (1, 0)) for row in values)
    return all_gather_list(entropies, ranks), all_gather_list(predictions, ranks)


def entropy_file(name: str, texts: list[list[int]], folder: Path) -> Path:
    """Where the entropies of these texts under the model `name` are kept.

    Named by a hash of the model's files (sizes and times; on the hub: the commit) and of all token ids, so
    that other weights, another tokenizer, other texts or cuts never meet it.
    """
    files = [f for f in sorted(Path(name).glob("*")) if f.suffix in (".json", ".safetensors", ".bin")]
    model = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    model = model or [name, AutoConfig.from_pretrained(name)._commit_hash]
    key = hashlib.sha256(repr([TOP_TOKENS, [len(text) for text in texts], model]).encode())
    key.update(np.concatenate(texts).tobytes())
    return folder / f"{key.hexdigest()[:24]}.npy"


def proxy_entropies(model, tokenizer, texts: list[list[int]], args, run: Run) -> list[np.ndarray]:
    """Entropies at every position of every text under args.proxy_model, else `model`; from disk if they are
    there. UserError if the proxy has another tokenizer."""
    name, ranks = args.proxy_model or args.model, run.ranks
    if args.proxy_model:
        other, probe = load_tokenizer(name), [tokenizer.decode(text) for text in texts[:50]]
        if other(probe).input_ids != tokenizer(probe).input_ids:
            raise UserError(f"--proxy-model {name} and {args.model} tokenise the texts differently")
    path = entropy_file(name, texts, run.path.parent / "entropies")
    if all_sum(float(path.is_file()), ranks) == ranks.world_size:
        return np.split(np.load(path), np.cumsum([len(text) for text in texts])[:-1])
    proxy = load_model(name, ranks, train=False) if args.proxy_model else model
    title = f"entropies of {len(texts)} texts, once"
    entropies, _ = score_texts(proxy, texts, args.micro_batch_tokens, ranks, title)

    def write() -> None:
        if ranks.main:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path.with_suffix(".partial.npy"), np.concatenate(entropies))
            path.with_suffix(".partial.npy").replace(path)

    together(write, ranks)
    return entropies


def draw_entropies(entropies: list[np.ndarray], thresholds, title: str, path: Path) -> None:
    """A histogram over all positions, with the thresholds in it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axis = figure.subplots()
    axis.hist(np.concatenate(entropies), bins=60, log=True)
    for threshold in thresholds:
        axis.axvline(threshold, color="0.4", linestyle="--", linewidth=1)
    axis.set(xlabel=f"entropy of the top {TOP_TOKENS} tokens (nats)", ylabel="positions", title=title)
    figure.savefig(path, dpi=110)
