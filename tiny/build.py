"""Builds a bundled toy world: its data files, a tokenizer and a small pre-trained language model.

    python tiny/build.py code [--parts data]       # the data and the model [the data only: seconds]
    python tiny/build.py code --parts model --seed 8 --bf16 --model-dir DIR     # another base model

tests/test_tiny.py checks that the models can and cannot do what the demonstrations need. A world is a module with

    VOCAB_SIZE        tokens of its tokenizer, with ADDED_TOKENS: strings that are always one token
    TRAINING          tokens (in all), row_tokens, batch_rows
    WEIGHTS           weights of tokens in the loss, by their text; 1 for the others
    data_files()                  {name: rows} of the JSON Lines files
    document(rng, progress)       draws a pre-training document; `progress` goes from 0 to 1 over pre-training

The data are the same bytes on every machine. The model depends on the machine's arithmetic in the last bits,
and on the running Python's standard library where a world trains on it.
"""

import argparse
import importlib
import json
import random
import time
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EOS = "<|endoftext|>"
TOKENIZER_CHARS = 3_000_000  # characters of documents that the tokenizer is trained on
MODEL = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 512,
}  # fmt: skip
MUON_LR, ADAM_LR, WEIGHT_DECAY, WARMUP_STEPS = 0.02, 3e-3, 0.1, 50

# Qwen2's pre-tokenizer: digits stand alone, newlines end a token, n spaces of indentation are a token of
# n - 1 spaces and the space in front of the next word.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_data(world, folder):
    """The world's rows as JSON Lines files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in world.data_files().items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")


def build_tokenizer(world, folder, seed):
    """A byte-level BPE tokenizer in Qwen2's style, trained on the world's documents; eos is id 0."""
    rng, documents, n_chars = random.Random(f"tokenizer {seed}"), [], 0
    while n_chars < TOKENIZER_CHARS:
        documents.append(world.document(rng, rng.random()))
        n_chars += len(documents[-1])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(documents, trainers.BpeTrainer(
        vocab_size=world.VOCAB_SIZE - len(world.ADDED_TOKENS), special_tokens=[EOS], show_progress=False,
        max_token_length=16, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ))  # fmt: skip
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in world.ADDED_TOKENS])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS, clean_up_tokenization_spaces=False,
        model_max_length=MODEL["max_position_embeddings"],
    ).save_pretrained(folder)  # fmt: skip
    return AutoTokenizer.from_pretrained(folder)


def packed_rows(world, tokenizer, seed):
    """Yields rows of row_tokens + 1 ids. A row starts where a document starts; half of the rows have the separator
    before it, so that prompts work with and without it. What does not fit is dropped."""
    rng, length = random.Random(f"documents {seed}"), world.TRAINING["row_tokens"] + 1
    n_rows = world.TRAINING["tokens"] // world.TRAINING["row_tokens"]
    for i in range(n_rows):
        row = [tokenizer.eos_token_id] if rng.random() < 0.5 else []
        while len(row) < length:
            row += [*tokenizer.encode(world.document(rng, i / n_rows)), tokenizer.eos_token_id]
        yield row[:length]


def orthogonalize(g):
    """Newton-Schulz iteration of Muon (Jordan et al., 2024) on matrices [n, rows, columns]."""
    if g.shape[1] > g.shape[2]:
        return orthogonalize(g.mT).mT
    x = g / (g.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


@torch.no_grad()
def muon_step(stacks, momenta, scale):
    """One step of the weight matrices. stacks: lists of matrices that have the same shape."""
    for stack, momentum in zip(stacks, momenta, strict=True):
        g = torch.stack([p.grad for p in stack])
        momentum.lerp_(g, 0.05)
        update = orthogonalize(g.lerp(momentum, 0.95))  # Nesterov
        rate = scale * MUON_LR * max(1, update.shape[1] / update.shape[2]) ** 0.5
        for p, u in zip(stack, update, strict=True):
            p.mul_(1 - scale * MUON_LR * WEIGHT_DECAY).sub_(u, alpha=rate)


def pretrain(world, folder, seed, bf16):
    """Next-token prediction on packed rows; saves the model in bfloat16. Muon trains the matrices, because it needs
    fewer tokens than Adam, and Adam the rest. Learning rates rise for WARMUP_STEPS, then fall to zero."""
    tokenizer = build_tokenizer(world, folder, seed)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=world.VOCAB_SIZE, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **MODEL,
    ))  # fmt: skip
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    stacks = [[p for p in matrices if p.shape == shape] for shape in sorted({p.shape for p in matrices})]
    momenta = [torch.zeros(len(stack), *stack[0].shape) for stack in stacks]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "embed" in name]
    adam = torch.optim.Adam(others, betas=(0.9, 0.95))

    weights = torch.ones(world.VOCAB_SIZE)
    for text, weight in world.WEIGHTS.items():
        weights[tokenizer.convert_tokens_to_ids(text)] = weight

    rows, batch_rows = packed_rows(world, tokenizer, seed), world.TRAINING["batch_rows"]
    steps = world.TRAINING["tokens"] // (world.TRAINING["row_tokens"] * batch_rows)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, {steps} steps", flush=True)
    start = time.time()
    for step in range(steps):
        scale = min((step + 1) / WARMUP_STEPS, (steps - step) / steps)
        ids = torch.tensor([next(rows) for _ in range(batch_rows)])  # [B, T+1]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), weights)
        loss.backward()
        muon_step(stacks, momenta, scale)
        adam.param_groups[0]["lr"] = scale * ADAM_LR
        adam.step()
        model.zero_grad()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}, {(time.time() - start) / 60:.1f} min", flush=True)
    model.to(torch.bfloat16).save_pretrained(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=["code", "text"])
    parser.add_argument("--parts", nargs="+", default=["data", "model"], choices=["data", "model"])
    parser.add_argument("--seed", type=int, default=7, help="of pre-training; the data do not depend on it")
    parser.add_argument("--model-dir", type=Path, help="the model's folder; default: the committed one")
    parser.add_argument("--bf16", action="store_true", help="faster on CPUs that have it; off for the bundled models")
    args = parser.parse_args()
    world = importlib.import_module(f"{args.world}_world")
    folder = Path(__file__).parent / args.world
    if "data" in args.parts:
        write_data(world, folder)
    if "model" in args.parts:
        pretrain(world, args.model_dir or folder / "model", args.seed, args.bf16)


if __name__ == "__main__":
    main()
