"""RA3's rollout against simpler ways to sample the same thoughts, on the same snippets with the same noise.

    python benchmarks/rollout.py                                                        # the embedded model
    python benchmarks/rollout.py --rows 64 16 256 --lengths 96 48 384 --designs d --draft 8

  ours  ra3.rollout: all latents are drafted as act, several decisions share a forward pass
  (a)   one generate call a turn, the cache kept: all rows wait for the longest thought of the turn
  (b)   one generate call a turn, every prefix encoded again
  (c)   no sampling: one forward pass over the tokens that ours returned. The floor: no rollout can be cheaper
  (d)   one generate call for all turns, a token a step: a logits processor forces the expert's tokens

(a), (b) and (d) leave out the log-probabilities that ours records. The first value of --rows, --lengths and
--rates is the base case; each other one replaces its part of it. A row is a snippet: joined programs of the
embedded corpus, of half of the length to all of it. A constant added to the logits of the tokens that open a
thought sets the think rate. A first round, not timed, counts the rows equal to ours token by token, the
forward passes, the tokens they ran over (with padding) for one of the result, and the memory needed on top of
what the process held. Then the designs take turns; the median round counts.
"""

import argparse
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from midtraining import add_think_bias, clock, joined_snippets, machine, peak_mib

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402
import modeling  # noqa: E402
import ra3  # noqa: E402
from snippets import Vocabulary  # noqa: E402

# ---- the designs: snippets -> [(token ids, targets)], targets as in ra3.Rollout


def forward_only(model, snippets, noise, v, args, result):
    for batch in modeling.micro_batches([list(ids) for ids, _ in result], 4096):
        where = [np.flatnonzero(result[i][1] != ra3.FORCED) for i in batch]  # what q decided about
        ids = modeling.pad_right([result[i][0] for i in batch], 0, model.device)
        modeling.token_logprobs(model, ids, *modeling.positions(where, model.device))
    return result


class Turn:
    """Draws the tokens of one turn inside `generate`; a row ends when it acts, or with its thought."""

    def __init__(self, noise, places, v, args):
        self.noise, self.places, self.v, self.temperature = noise, places, v, args.temperature
        self.drawn, self.over = [], torch.zeros_like(places, dtype=torch.bool)

    def __call__(self, input_ids, scores):
        v, step = self.v, len(self.drawn)
        noise = self.noise.gather(1, self.places[:, None] - 1 + step)[:, 0]
        drawn = modeling.inverse_cdf((scores.float() / self.temperature).softmax(-1), noise)
        self.drawn.append(drawn)
        self.over |= v.ends[drawn] | v.breaks[drawn] | (step == 0) & ~v.opens[drawn]
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn[:, None], 0.0)


def turn_by_turn(model, snippets, noise, v, args, _, keep=True):
    rows, device, noise = [ra3.all_act(s) for s in snippets], model.device, noise.to(model.device)
    moved, fed, going = [0] * len(rows), [0] * len(rows), list(range(len(rows)))
    cache = seen_ids = seen_mask = None
    for t in range(max(len(s.boundaries) for s in snippets)):
        staying = [k for k, i in enumerate(going) if t < len(snippets[i].boundaries)]
        going = [going[k] for k in staying]
        places = [int(snippets[i].boundaries[t]) + moved[i] for i in going]
        chunks = [rows[i].ids[fed[i] : place].tolist() for i, place in zip(going, places)]
        pads = [max(map(len, chunks)) - len(chunk) for chunk in chunks]  # on the left; the mask has holes
        ids = torch.tensor([[0] * n + chunk for n, chunk in zip(pads, chunks)], device=device)
        mask = torch.tensor([[0] * n + [1] * len(chunk) for n, chunk in zip(pads, chunks)], device=device)
        if cache is not None:
            cache.batch_select_indices(torch.tensor(staying, device=device))
            ids, mask = torch.cat([seen_ids[staying], ids], 1), torch.cat([seen_mask[staying], mask], 1)
        turn = Turn(noise[going], torch.tensor(places, device=device), v, args)
        out = model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=args.max_latent_tokens,
            do_sample=False, pad_token_id=0, return_dict_in_generate=True, logits_processor=[turn],
            stopping_criteria=[lambda *_, turn=turn: turn.over])
        drawn = torch.stack(turn.drawn, 1)  # [B, up to max_latent_tokens]
        last = (v.ends | v.breaks)[drawn].int()
        lengths = torch.where(last.any(1), last.argmax(1) + 1, drawn.shape[1]).tolist()
        for k, (i, place, size) in enumerate(zip(going, places, lengths)):
            fed[i] = place * keep
            if v.opens[drawn[k, 0]]:
                moved[i] += ra3.insert_thought(rows[i], place, t, drawn[k, :size].tolist(), v)
                fed[i] += (size - 1) * keep  # without the last one, which may be replaced by a newline
            else:
                rows[i].targets[place] = ra3.EVENT
        if keep:
            sizes = torch.tensor([fed[i] - place for i, place in zip(going, places)], device=device)
            valid = torch.arange(drawn.shape[1] - 1, device=device) < sizes[:, None]
            seen_mask, seen_ids = torch.cat([mask, valid], 1), out.sequences[:, :-1]
            cache = out.past_key_values
    return [(r.ids, r.targets) for r in rows]


class Forced:
    """(d)'s logits processor. A row's script is its snippet and a copy of each boundary's indentation."""

    def __init__(self, snippets, noise, v, args):
        width = max(len(s.ids) + sum(map(len, s.indents)) for s in snippets)
        script, follow, after, boundary = tables = np.zeros((4, len(snippets), width), dtype=np.int64)
        for r, s in enumerate(snippets):
            end = len(s.ids)
            script[r, :end], follow[r, 1 : end - 1], boundary[r, s.boundaries] = s.ids, np.arange(2, end), 1
            for b, indent in zip(s.boundaries, s.indents):  # after a thought: the indentation, back to b
                stop = end + len(indent)
                script[r, end:stop], follow[r, end:stop] = indent, [*range(end + 1, stop), b][: len(indent)]
                after[r, b], end = end if indent else b, stop
        self.tables, self.noise, self.v, self.args = torch.from_numpy(tables).to(noise.device), noise, v, args
        self.pointer = torch.ones(len(snippets), dtype=torch.long, device=noise.device)  # 0: the end
        self.length, self.decided = torch.zeros_like(self.pointer), torch.zeros_like(self.pointer).bool()
        self.targets = torch.full(noise.shape, -3, device=noise.device)  # -3: behind the end

    def __call__(self, input_ids, scores):
        v, step, thinking = self.v, input_ids.shape[1] - 1, self.length > 0
        script, follow, after, boundary = self.tables[:, torch.arange(len(self.pointer)), self.pointer]
        probs = (scores.float() / self.args.temperature).softmax(-1)
        drawn = modeling.inverse_cdf(probs, self.noise[:, step])
        deciding = boundary.bool() & ~self.decided & ~thinking
        writes, acts = (deciding & v.opens[drawn]) | thinking, deciding & ~v.opens[drawn]
        length = self.length + writes
        malformed = writes & (v.breaks[drawn] | ~v.ends[drawn] & (length >= self.args.max_latent_tokens))
        closes = writes & (v.ends[drawn] | malformed)
        kinds = torch.where(writes, drawn, torch.where(acts, ra3.EVENT, ra3.FORCED))
        self.targets[:, step] = torch.where(self.pointer > 0, kinds, -3)
        self.pointer = torch.where(writes, torch.where(closes, after, self.pointer), follow)
        self.decided = (self.decided | closes) & ~(boundary.bool() & ~writes)
        self.length = torch.where(writes & ~closes, length, 0)
        token = torch.where(writes, torch.where(malformed, v.newline, drawn), script)
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)


def token_a_step(model, snippets, noise, v, args, _):
    forced = Forced(snippets, noise.to(model.device), v, args)
    first = torch.full((len(snippets), 1), v.separator, device=model.device)
    ids = model.generate(
        first, attention_mask=torch.ones_like(first), max_new_tokens=noise.shape[1], do_sample=False,
        pad_token_id=0, logits_processor=[forced], stopping_criteria=[lambda *_: forced.pointer == 0])
    targets = np.insert(forced.targets.cpu().numpy(), 0, ra3.FORCED, axis=1)[:, : ids.shape[1]]
    return [(row[kinds > -3], kinds[kinds > -3]) for row, kinds in zip(ids.cpu().numpy(), targets)]


DESIGNS = {"ours": lambda *given: [(r.ids, r.targets) for r in ra3.rollout(*given[:-1])],
           "(a) call a turn, cache": turn_by_turn,
           "(b) call a turn, again": lambda *given: turn_by_turn(*given, keep=False),
           "(c) forward only": forward_only, "(d) token a step": token_a_step}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 8, 128])
    parser.add_argument("--lengths", type=int, nargs="+", default=[96, 48, 192], help="of the longest rows")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.0, 0.4], help="think rates")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--designs", default="abcd", help="those to compare with ours")
    parser.add_argument("--draft", type=int, default=ra3.DRAFT, help="of ours: decisions that share a pass")
    parser.add_argument("--model", default=ra3.TINY_DEFAULTS.model)
    given = parser.parse_args()
    ra3.DRAFT = given.draft
    designs = {name: run for name, run in DESIGNS.items() if name == "ours" or name[1] in given.designs}
    model = modeling.load_model(given.model, common.setup(0))
    v = Vocabulary(modeling.load_tokenizer(given.model), model.config.vocab_size, model.device)
    rows, length, rate = given.rows[0], given.lengths[0], given.rates[0]
    cases = [(n, length, rate) for n in given.rows] + [(rows, n, rate) for n in given.lengths[1:]]
    cases, passes = cases + [(rows, length, x) for x in given.rates[1:]], []  # tokens of each forward pass
    model.get_decoder().register_forward_pre_hook(
        lambda module, inputs, named: passes.append(named["input_ids"].numel()), with_kwargs=True)
    print(f"{machine()}, median of {given.rounds} rounds")
    for rows, length, rate in cases:
        args, snippets = ra3.Args(rollout_rows=rows), joined_snippets(rows, length, v)
        add_think_bias(model, snippets, v, rate)
        noise = modeling.uniforms((rows, max(s.width(args.max_latent_tokens) for s in snippets)), 0)
        inputs, first, result = (model, snippets, noise, v, args), {}, None
        for name, run in designs.items():
            passes.clear()
            mib, found = peak_mib(run, *inputs, result)
            result = result or found  # ours, by whose tokens the others are judged
            same = sum(all(map(np.array_equal, *pair)) for pair in zip(result, found))
            first[name] = same, len(passes), sum(passes), mib
        times = {name: [] for name in designs}
        for _ in range(given.rounds):
            for name, run in designs.items():
                times[name].append(clock(run, *inputs, result)[:2])
        tokens, turns = sum(len(ids) for ids, _ in result), sum(len(s.boundaries) for s in snippets)
        thoughts = sum(((k[1:] >= 0) & (k[:-1] < 0)).sum() for _, k in result)  # places where one begins
        print(f"\n{rows} rows of {length // 2} to {length} tokens, {turns / rows:.0f} decisions each, think "
              f"rate {thoughts / turns:.2f}: {tokens} tokens")
        print(" " * 23 + "same passes   run   MiB   CPU s x ours  wall s x ours tokens/s")
        wall_1, cpu_1 = map(statistics.median, zip(*times["ours"]))
        for name, (same, steps, ran, mib) in first.items():
            wall, cpu = map(statistics.median, zip(*times[name]))
            print(f"{name:22} {same:4} {steps:6} {ran / tokens:5.1f} {mib:5.0f} {cpu:7.3f} "
                  f"{cpu / cpu_1:6.2f} {wall:7.3f} {wall / wall_1:6.2f} {tokens / wall:8.0f}", flush=True)


if __name__ == "__main__":
    main()
