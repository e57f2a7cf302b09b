"""grpo_rlvr.py: the loss against TRL's numbers and the equation, rollouts against plain forward passes, rows of
data sets as users have them, rewards, runs of a random model of 86 thousand parameters with a toy reward.

test_common.py tests the sampler, test_robust.py resume and faults, test_forks.py a run of --tiny.
"""

import ast
import json
import math
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

import grpo_rlvr
from common import TINY, Ranks, Stop, UserError, launch, load_model, load_tokenizer, uniforms
from grpo_rlvr import Args, Problem, Sample, group_advantages, grpo_loss, loss_normalizer, signature_of

REPO = Path(__file__).parent.parent
FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "grpo_trl.json").read_text())
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")
ONE = Ranks(0, 1, torch.device("cpu"))
TOKENIZER = load_tokenizer(str(next(p for p in (TINY / "code" / "model", TINY / "model") if p.exists())))
V = len(TOKENIZER)
torch.set_num_threads(1)


def nothing():
    """In place of Interrupt.check."""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A random model with a toy tokenizer; a tenth of its tokens end a completion, so lengths vary."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True, initializer_range=0.3, eos_token_id=0, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=list(range(V // 10)), pad_token_id=0)
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


def load(model_dir):
    return load_model(model_dir, TOKENIZER, ONE, longest=64)


@pytest.fixture(scope="module")
def problems_file(tmp_path_factory):
    """Math problems with Skywork's columns, prompts of many lengths."""
    path = tmp_path_factory.mktemp("data") / "math.jsonl"
    rows = [
        {
            "prompt": [{"content": f"What is {i} + 1?" + " Think." * (i % 5), "role": "user"}],
            "reward_model": {"ground_truth": f'["{i + 1}"]', "style": "rule"},
            "extra_info": {"index": i, "model_difficulty": {"M": i % 17}},
        }
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def toy_reward(problem, text):
    odd = len(text) % 2
    return float(odd), bool(odd), "" if odd else "even: length"


@pytest.fixture
def toy(monkeypatch, tmp_path, model_dir, problems_file):
    """make(**changes) -> Args of a short run; a completion of an odd number of characters is right."""
    monkeypatch.setattr(grpo_rlvr, "reward", toy_reward)
    monkeypatch.setattr(grpo_rlvr.Run, "curves", lambda self, panels: None)  # matplotlib is slow
    sizes = {
        "task": "math", "model": model_dir, "dataset": problems_file, "eval_problems": 4, "output_dir": str(tmp_path / "run"),
        "prompts_per_update": 4, "group_size": 4, "max_new_tokens": 12, "temperature": 0.8,
        "minibatches": 1, "updates": 4, "learning_rate": 1e-2, "micro_batch_tokens": 200, "eval_every": 0,
        "save_every": 0, "rollout_rows": 6,
    }  # fmt: skip
    return lambda **changes: Args(**(sizes | changes))


def metrics_of(args) -> list[dict]:
    lines = (Path(args.output_dir) / "metrics.jsonl").read_text().splitlines()
    timed = ("time/", "perf/")
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(timed)} for line in lines]


# ---------------------------------------------------------------- advantages and loss


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    third, half = math.sqrt(1 / 3), 0.5  # standard deviations with ddof 1
    expected = [[0.5, -0.5, -0.5, 0.5], [0, 0, 0, 0], [0.75, -0.25, -0.25, -0.25]]
    torch.testing.assert_close(group_advantages(rewards, normalize_std=False), torch.tensor(expected))
    normalized = torch.tensor(expected) / torch.tensor([[third + 1e-4], [1.0], [half + 1e-4]])
    torch.testing.assert_close(group_advantages(rewards), normalized)
    torch.testing.assert_close(
        group_advantages(torch.tensor(FIXTURE["rewards"])).flatten(), torch.tensor(FIXTURE["advantages"])
    )


@pytest.mark.parametrize("case", FIXTURE["cases"], ids=lambda c: f"{c['loss_type']}-{c['beta']}-{c['old_given']}")
def test_loss_and_gradient_equal_trl(case):
    """The fixture was made by calling TRL's own GRPOTrainer._compute_loss on these tensors, with a stand-in
    for the trainer whose model returns `logprobs`; epsilon 0.2 and 0.28, use_bias_correction_kl off.
    Here at once, and in parts whose losses and gradients add up."""
    lengths, loss_type, longest = torch.tensor(FIXTURE["lengths"]), case["loss_type"], FIXTURE["max_length"]
    for parts in ([[0, 1, 2, 3, 4, 5]], [[0], [1, 2, 3], [4, 5]]):
        logprobs, old, ref = (torch.tensor(FIXTURE[k]) for k in ("logprobs", "old_logprobs", "ref_logprobs"))
        logprobs.requires_grad_()
        old, advantages = old if case["old_given"] else logprobs.detach(), torch.tensor(FIXTURE["advantages"])
        mask = torch.arange(logprobs.shape[1]) < lengths.unsqueeze(1)
        normalizer = loss_normalizer(lengths, loss_type, longest) if len(parts) > 1 else None
        total, sums = 0.0, Counter()
        for rows in parts:
            tensors = logprobs[rows], old[rows], ref[rows], advantages[rows], mask[rows]
            loss, part = grpo_loss(*tensors, 0.2, 0.28, case["beta"], loss_type, longest, normalizer)
            loss.backward()
            total, sums = total + loss.item(), sums + Counter(part)
        assert total == pytest.approx(case["loss"], rel=1e-5, abs=1e-7)
        torch.testing.assert_close(logprobs.grad, torch.tensor(case["grad"]), rtol=1e-4, atol=1e-7)
        assert sums["clip_frac"] / sums["tokens"] == pytest.approx(case["clip_frac"], abs=1e-6)
        if case["beta"]:
            assert sums["kl"] / sums["tokens"] == pytest.approx(case["kl"], rel=1e-5)


def test_loss_is_the_equation():
    """One response and one token at a time, as section 2 prints it (with a mean over tokens inside)."""
    logprobs, old, ref = (torch.tensor(FIXTURE[k]).double() for k in ("logprobs", "old_logprobs", "ref_logprobs"))
    logprobs.requires_grad_()
    advantages, lengths, objective = torch.tensor(FIXTURE["advantages"]), FIXTURE["lengths"], 0.0
    for i, length in enumerate(lengths):
        for t in range(length):
            ratio = torch.exp(logprobs[i, t] - old[i, t])
            surrogate = torch.min(ratio * advantages[i], torch.clamp(ratio, 0.8, 1.28) * advantages[i])
            kl = torch.exp(ref[i, t] - logprobs[i, t]) - (ref[i, t] - logprobs[i, t]) - 1
            objective = objective + (surrogate - 0.1 * kl) / length / len(lengths)
    mask = torch.arange(logprobs.shape[1]) < torch.tensor(lengths).unsqueeze(1)
    loss, _ = grpo_loss(logprobs, old, ref, advantages, mask, 0.2, 0.28, 0.1, "grpo", 9)
    assert loss.item() == pytest.approx(-objective.item())
    torch.testing.assert_close(*(torch.autograd.grad(x, logprobs)[0] for x in (loss, -objective)))


# ---------------------------------------------------------------- rollout


def test_rollout_equals_the_plain_forward(model_dir, monkeypatch):
    """A shared prompt read once, ended rows gone: log-probabilities are those of a forward pass per row."""
    model, table = load(model_dir), torch.zeros(3, V, dtype=torch.bool)
    table[0, : V // 10] = True
    generator = np.random.default_rng(0)
    prompts = [generator.integers(0, V, size).tolist() for size in (3, 9, 5, 14, 1, 9)]
    prompts[1][4] = 0  # the pad token inside a prompt is a token
    prompts.append(prompts[3])  # a group
    noise, rolled = uniforms([7, 20], "plain"), []
    for chunk in (4, 7, 100):
        monkeypatch.setattr(grpo_rlvr, "CHUNK", chunk)
        rolled.append(grpo_rlvr.rollout(model, prompts, noise, 0.7, table))
    assert [[row[0] for row in rows] for rows in rolled[1:]] == [[row[0] for row in rolled[0]]] * 2
    assert len({len(ids) for ids, _, _ in rolled[0]}) > 2
    samples = []
    for prompt, (ids, logprobs, ended) in zip(prompts, rolled[0]):
        ends = [i < V // 10 for i in ids]
        assert ended == ends[-1] and not any(ends[:-1]) and (ended or len(ids) == 20)
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / 0.7
        plain = logits.log_softmax(-1).gather(-1, torch.tensor(ids).unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(torch.tensor(logprobs), plain.detach(), rtol=1e-4, atol=1e-5)
        samples.append(Sample(prompt, ids, logprobs, ended))
    for shares in (True, False):  # completions on their prompt's cache, and plain rows
        model.shares_prompts = shares
        grpo_rlvr.note_old_logprobs(model, samples, Args(temperature=0.7, micro_batch_tokens=40))
        for sample in samples:
            assert sample.old_logprobs == pytest.approx(sample.rollout_logprobs, rel=1e-4, abs=1e-5)


def test_prompts_of_one_token(model_dir):
    model, table = load(model_dir), torch.zeros(3, V, dtype=torch.bool)
    rows = grpo_rlvr.rollout(model, [[5], [6], [5]], torch.full((3, 3), 0.5), 1.0, table)
    assert rows[0] == rows[2] and [len(ids) for ids, _, _ in rows] == [3] * 3


def test_a_body_ends_in_column_zero():
    eos = TOKENIZER.eos_token_id
    table = grpo_rlvr.end_table(TOKENIZER, {eos}, V + 8, column_zero=True)
    signature = TOKENIZER.encode("def f(n):\n")

    def end(text: str, with_eos=False) -> int | None:
        ids = torch.tensor([signature[-1:] + TOKENIZER.encode(text) + [eos] * with_eos])
        ends = grpo_rlvr.is_end(table, ids)[0].nonzero()
        return None if not len(ends) else ends[0].item() + 1

    body = "    if n:\n\n        return 1\n    # so\n    return 2\n"
    length = len(TOKENIZER.encode(body))
    assert end(body) is None
    assert end(body, with_eos=True) == length + 1  # the token that ends a completion belongs to it
    for after in ("def g():\n", "print(1)\n", "# next\n", '"""\n'):
        assert TOKENIZER.decode(TOKENIZER.encode(body + after)[:length]) == body
        assert end(body + after) == length + 1
    assert end("return 1\n") == 1  # a body that is not indented
    only_eos = grpo_rlvr.end_table(TOKENIZER, {eos}, V, column_zero=False)
    assert only_eos.sum() == 1 and only_eos[0, eos]


# ---------------------------------------------------------------- update


def random_samples(model, count=8) -> list[Sample]:
    generator = np.random.default_rng(1)
    samples = []
    for index in range(count):
        prompt, ids = (generator.integers(0, V, n).tolist() for n in (2 + index % 3, 1 + 3 * index % 10))
        ids[-1] = 0  # eos, which is also pad
        samples.append(Sample(prompt, ids, [0.0] * len(ids), True, advantage=generator.normal(), in_loss=True))
    grpo_rlvr.note_old_logprobs(model, samples, Args())
    for sample in samples:
        sample.old_logprobs = [x + generator.normal() * 0.2 for x in sample.old_logprobs]
    return samples


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches_change_nothing(model_dir, loss_type):
    weights, reference = [], load(model_dir)
    with torch.no_grad():
        for weight in reference.parameters():
            weight *= 1.1  # so that the KL is not 0
    for micro_batch_tokens, shares in ((1, True), (60, True), (60, False), (10_000, True)):
        args = Args(
            loss_type=loss_type, micro_batch_tokens=micro_batch_tokens, beta=0.1, max_grad_norm=1e9, minibatches=2
        )
        model = load(model_dir)
        model.shares_prompts = shares
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        samples = random_samples(model)
        normalizer = loss_normalizer(torch.tensor([len(s.completion_ids) for s in samples]), loss_type, 1024)
        sums, norm = grpo_rlvr.train_minibatch(model, optimizer, samples, normalizer, args, ONE, nothing, reference)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert sums["tokens"] == sum(len(s.completion_ids) for s in samples) and norm > 0 and sums["kl"] > 1e-3
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=1e-4, atol=1e-6)


def test_stop_token_is_trained_and_truncation_can_be_masked(model_dir):
    """The completion [0] is one eos, equal to pad: its probability must rise with a positive advantage."""
    model, args = load(model_dir), Args(minibatches=1, temperature=1.0)
    sample = Sample([4, 9, 5], [0], [0.0], ended=True, advantage=1.0, in_loss=True)
    grpo_rlvr.note_old_logprobs(model, [sample], args)
    (before,), optimizer = sample.old_logprobs, torch.optim.SGD(model.parameters(), lr=0.01)
    rest = 1.0, args, ONE, nothing
    grpo_rlvr.train_minibatch(model, optimizer, [sample], *rest)
    grpo_rlvr.note_old_logprobs(model, [sample], args)
    assert sample.old_logprobs[0] > before + 1e-4
    with_kl = Args(minibatches=1, beta=1.0, temperature=0.5)
    sums, _ = grpo_rlvr.train_minibatch(model, optimizer, [sample], 1.0, with_kl, ONE, nothing, ref_model=model)
    assert sums["kl"] < 1e-6  # to itself, at the temperature of both
    sample.in_loss = False
    sums, norm = grpo_rlvr.train_minibatch(model, optimizer, [sample], *rest)
    assert norm == 0 and sums["tokens"] == 0
    sums, _ = grpo_rlvr.train_minibatch(model, optimizer, [], *rest)  # a rank without work
    assert sums["tokens"] == 0


# ---------------------------------------------------------------- runs


def test_reward_rises(toy, monkeypatch):
    """A reward that any policy gradient learns: the completion is a single token."""

    def short(problem, text):
        good = len(TOKENIZER.encode(text)) <= 1
        return float(good), good, "long"

    monkeypatch.setattr(grpo_rlvr, "reward", short)
    args = toy(updates=25, prompts_per_update=8, group_size=8, max_new_tokens=6)
    grpo_rlvr.main(args)
    history = metrics_of(args)
    assert history[1]["reward/mean"] < 0.4
    assert sum(row["reward/mean"] for row in history[-3:]) / 3 > 0.8


def test_two_ranks_have_the_metrics_of_one(toy, tmp_path):
    args = toy(updates=2, minibatches=2, beta=0.01, dynamic_sampling=2, learning_rate=1e-3)
    grpo_rlvr.main(args)
    fields = vars(args) | {"output_dir": str(tmp_path / "two")}
    (tmp_path / "driver.py").write_text(
        f"import sys; sys.path[:0] = [{str(REPO)!r}, {str(REPO / 'tests')!r}]\n"
        "import grpo_rlvr, test_grpo\n"
        "grpo_rlvr.reward = test_grpo.toy_reward\n"
        f"grpo_rlvr.launch(grpo_rlvr.main, grpo_rlvr.Args(**{fields!r}))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "driver.py"]
    options = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "cwd": tmp_path, "timeout": 300}
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    for mine, other in zip(metrics_of(args), metrics_of(Args(**fields)), strict=True):
        assert mine == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_several_minibatches_have_true_old_logprobs(toy, monkeypatch, tmp_path):
    gaps, tokens, normalizers, real = [], [], [], grpo_rlvr.grpo_loss

    def spy(logprobs, old_logprobs, *rest):
        gaps.append((logprobs - old_logprobs).abs().max().item())
        tokens.append(rest[2].sum().item())
        normalizers.append(rest[-1])
        return real(logprobs, old_logprobs, *rest)

    made, new_optimizer = [], grpo_rlvr.new_optimizer
    monkeypatch.setattr(grpo_rlvr, "new_optimizer", lambda model, *rest: made.append(rest) or new_optimizer(model, *rest))
    monkeypatch.setattr(grpo_rlvr, "grpo_loss", spy)
    step = grpo_rlvr.optimizer_step
    monkeypatch.setattr(grpo_rlvr, "optimizer_step", lambda *args: made.append(args[3]) or step(*args))
    grpo_rlvr.main(toy(updates=1, minibatches=2, micro_batch_tokens=10_000, max_grad_norm=0.7))
    assert made == [(1e-2, 0.01), 0.7, 0.7]  # the learning rate, the default weight decay; the norm of each step
    assert normalizers == [sum(tokens) / 2] * 2  # of the whole update, over its steps
    grpo_rlvr.main(toy(updates=1, minibatches=2, micro_batch_tokens=10_000, loss_type="bnpo", output_dir=f"{tmp_path}/bnpo"))
    assert normalizers[2:] == tokens[2:]  # of the step
    assert gaps[0] < 1e-5 and gaps[1] > 1e-3  # the first step is on-policy, the second is not


def test_dynamic_sampling_and_overlong_filter(toy, monkeypatch):
    def rewards(problem, text):  # only the even problems have a spread
        good = len(text) % 2 == 1 and int(problem.name) % 2 == 0
        return float(good), good, "no"

    monkeypatch.setattr(grpo_rlvr, "reward", rewards)
    seen, real = [], grpo_rlvr.train_minibatch

    def spy(model, optimizer, samples, *rest):
        seen.extend(samples)
        return real(model, optimizer, samples, *rest)

    monkeypatch.setattr(grpo_rlvr, "train_minibatch", spy)
    keys, uniforms = [], grpo_rlvr.uniforms
    monkeypatch.setattr(grpo_rlvr, "uniforms", lambda shape, *key: keys.append(key) or uniforms(shape, *key))
    args = toy(updates=2, dynamic_sampling=3, filter_overlong=True)
    grpo_rlvr.main(args)
    keys = [key for key in keys if "evaluation" not in key]
    assert len(set(keys)) == len(keys) > 3  # every round of every update has noise of its own
    assert metrics_of(args)[-1]["data/epoch"] == pytest.approx(len(keys) * 4 / 36, abs=1e-5)  # and problems
    assert seen and all(any(s.advantage for s in seen[i : i + 4]) for i in range(0, len(seen), 4))
    assert any(not s.ended for s in seen) and all(s.in_loss == s.ended for s in seen)
    assert all(row["rollout/groups"] > 0 for row in metrics_of(args)[1:])


def test_a_stop_inside_an_evaluation_loses_no_model(toy, monkeypatch):
    evaluated = []

    def stopped(rollouts, problems, args, run, update, stop):
        evaluated.append(problems)
        if update:
            raise Stop
        return {"eval/pass@1": 0.0}, []

    monkeypatch.setattr(grpo_rlvr, "evaluate", stopped)
    args = toy(updates=2, save_every=1, eval_every=1)
    with pytest.raises(Stop):
        grpo_rlvr.main(args)
    saved = sorted(path.name for path in Path(args.output_dir, "checkpoints").iterdir())
    assert saved == ["state_000001", "update_000001"]
    assert evaluated == [grpo_rlvr.load_problems(args, TOKENIZER)[1]] * 2  # the held-out ones


def test_greedy_and_sampled_pass_at_1_are_told_apart():
    right = {0.0: [True, True, True, False], 0.8: [True, False, False, False]}

    def rollouts(problems, noise, temperature, stop):
        return [Sample([1], [2], [0.0], passed=passed) for passed in right[temperature]], {}

    problems, run = [Problem("x", "", [1], {})] * 4, SimpleNamespace(samples=lambda *args: None)
    metrics, _ = grpo_rlvr.evaluate(rollouts, problems, Args(temperature=0.8), run, 0, nothing)
    assert (metrics["eval/pass@1"], metrics["eval/pass@1_sampled"]) == (0.75, 0.25)


def test_metrics_count_what_passed_and_the_run_says_what_cannot_be_learnt(toy, monkeypatch, capfd):
    """A fork with partial credit: the reward is 0.5 everywhere, and nothing passes."""
    monkeypatch.setattr(grpo_rlvr, "reward", lambda problem, text: (0.5, False, "half: <b>"))
    temperatures, rollout = [], grpo_rlvr.rollout
    monkeypatch.setattr(grpo_rlvr, "rollout", lambda *args: temperatures.append(args[3]) or rollout(*args))
    args = toy(updates=2)
    grpo_rlvr.main(args)
    assert temperatures[:2] == temperatures[-2:] == [0.0, 0.8]  # an evaluation: greedy, then sampled
    for row in metrics_of(args)[1:]:
        assert (row["reward/mean"], row["reward/passed"], row["reward/solved_groups"]) == (0.5, 0, 0)
        assert row["reward/fail_half"] == 1 and row["reward/groups_without_spread"] == 1
    assert metrics_of(args)[-1]["eval/pass@1"] == 0
    out, error = capfd.readouterr()
    assert out.count("note: no group has different rewards") == 1 and "eval/pass@1_sampled" in out and not error
    lines = out.splitlines()
    assert lines[0].startswith("model ") and lines[1].endswith(" training, 4 held-out problems")
    assert lines[2] == f"run folder {args.output_dir}" and "held-out" in lines[3] and "tok/s" in lines[5]
    assert all(len(line) <= 120 for line in lines if re.match(r" *\d/2 ", line))
    page = (Path(args.output_dir) / "samples.html").read_text()
    assert "wrong</span> (half: &lt;b&gt;, reward 0.5" in page and "<b>" not in page


def test_samples_colour_thoughts_and_comments():
    for text, coloured in (("f('a')  # <b>\ng()", "# &lt;b&gt;"), ("<think>1 < 2\n</think> x", "&lt;think&gt;1 &lt; 2\n&lt;/think&gt;")):
        block = grpo_rlvr.block(Problem("p", "", [], {}), Sample([], [], [], text=text))
        assert re.findall('<span class="thought">(.*?)</span>', block, re.DOTALL) == [coloured]


# ---------------------------------------------------------------- data


def read(tmp_path, rows, tokenizer=TOKENIZER, **changes) -> tuple[dict[str, Problem], str]:
    """(problems by the question's first word, what was left out)."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems, note = grpo_rlvr.read_problems(str(path), Args(**{"reward_timeout_s": 2.0} | changes), tokenizer)
    return {p.prompt.removeprefix('"""\n').split()[0]: p for p in problems}, note


def io(inputs, outputs, **more) -> str:
    return json.dumps({"inputs": inputs, "outputs": outputs, **more})


def test_code_schemas(tmp_path):
    functional = io(["[1, 2]\n3", "[1]\n2"], ["6", "3"], fn_name="add")
    lcb = [{"input": "3\n4", "output": "7", "testtype": "functional", "metadata": '{"func_name": "plus"}'}] * 20
    prime = [{"type": "function_call", "input": [2, 3], "output": [5], "fn_name": "total"}]
    taco = {"inputs": [["1 2", "3"]] + [f"{i}" for i in range(30)], "outputs": [["6"]] + ["x"] * 30}
    starter = "class Solution:\n    def plus(self, a: List[int], b):\n        "
    solution = "class Solution:\n    def total(self, a, *,\n              b: int = 3) -> int:\n        return a + b"
    found, _ = read(tmp_path, [
        {"question": "boba", "input_output": functional, "metadata": {"fn_name": "add"}},
        {"question": "given", "input_output": functional, "signature": "def add(xs, y):"},
        {"problem": "lcb", "tests": json.dumps(lcb), "starter_code": starter,
         "metadata": json.dumps({"func_name": "plus"})},
        {"problem": "prime", "tests": json.dumps(prime), "solutions": [solution]},
        {"problem": "taco", "tests": json.dumps(taco), "solutions": ["import sys"]},
        {"problem": "codeforces", "tests": [{"input": "1\n", "output": "2\n"}]},
        {"problem": "null", "tests": [{"input": "1\n", "output": "2\n", "testtype": None, "fn_name": None}] * 20},
        {"task_id": "H/0", "prompt": 'humaneval = 1\ndef f(n):\n    """Doubles.\n    """\n', "entry_point": "f",
         "test": "def check(c):\n    assert c(2) == 4", "canonical_solution": "    return 2 * n\n"},
        {"task_id": 11, "text": "mbpp", "code": "def g(a,\n  b=set()): return a", "test_setup_code": "",
         "test_list": ["assert g(1) == 1", "assert g(2) == 2", "assert g(3) == 3"]},
        {"task_id": 12, "prompt": "mbppplus", "code": "def h(a): return a", "test_imports": [],
         "test_list": ["assert h(1) == 1"], "test": "assert h(5) == 5"},
        {"task_id": 13, "prompt": "sanitized", "code": "def k(a): return a", "test_imports": ["from math import tau"],
         "test_list": ["assert k(tau) == tau"]},
    ])  # fmt: skip
    prompts, checks = {k: p.prompt for k, p in found.items()}, {k: p.checks for k, p in found.items()}
    assert prompts["boba"] == '"""\nboba\n"""\ndef add(arg1, arg2):\n'
    assert prompts["given"] == '"""\ngiven\n"""\ndef add(xs, y):\n'
    assert checks["given"]["fn_name"] == "add" and checks["given"]["cases"][0]["output"] == "6"
    assert prompts["lcb"].endswith("class Solution:\n    def plus(self, a: List[int], b):\n")
    assert len(checks["lcb"]["cases"]) == 20 and checks["lcb"]["fn_name"] == "plus"
    assert prompts["prime"].endswith("def total(a, *, b: int=3):\n")
    assert checks["prime"]["cases"] == [{"input": [2, 3], "output": 5}]
    assert prompts["taco"].endswith("def main():\n") and checks["taco"]["fn_name"] is None
    assert len(checks["taco"]["cases"]) == len(checks["null"]["cases"]) == grpo_rlvr.MAX_TESTS  # the longest inputs
    assert checks["taco"]["cases"][0] == {"input": ["1 2", "3"], "output": ["6"]}
    assert checks["codeforces"]["cases"] == [{"input": "1\n", "output": "2\n"}]
    assert prompts["humaneval"] == 'humaneval = 1\ndef f(n):\n    """Doubles.\n    """\n'
    assert prompts["mbpp"] == '"""\nmbpp\nassert g(1) == 1\nassert g(2) == 2\n"""\ndef g(a, b=set()):\n'
    assert checks["mbppplus"]["tests"] == "assert h(5) == 5"
    for name, right, wrong in (
        ("humaneval", "    return 2 * n\n", "    return n"), ("mbpp", "    return a\n", "    return 1"),
        ("mbppplus", "    return a\n", "    return 1"), ("lcb", "        return a + b\n", "        pass"),
        ("sanitized", "    return a\n", "    return 1"),
    ):  # fmt: skip
        assert grpo_rlvr.reward(found[name], right)[:2] == (1.0, True), name
        assert grpo_rlvr.reward(found[name], wrong)[:2] == (0.0, False), name


def f_with(solution):
    return {"question": "Id.", "input_output": io(["3"], ["3"], fn_name="f"), "solutions": [solution]}


CODE_ROWS = [  # row, the signature of its problem or the reason why there is none
    ({"question": None, "input_output": None, "problem": "Add.", "solutions": [], "metadata": "null",
      "tests": '[{"type": "stdin_stdout", "input": "1 2", "output": "3"}]'}, "def main():"),
    ({"question": None, "input_output": io(["1"], ["1"])}, "1 no question"),
    ({"question": "Add.", "input_output": io([], [])}, "1 no tests"),
    ({"question": "Add.", "input_output": io(["1", "2", "3"], ["1"])}, "1 zip() argument 2 is shorter than argument 1"),
    ({"question": "Add.", "input_output": io(["1"], [None])}, "1 a test without input or output"),
    ({"question": "Add.", "input_output": "{"}, "1 malformed (JSONDecodeError)"),
    ({"question": "Add.", "input_output": "3"}, "1 malformed (TypeError)"),
    ({"question": "Add.", "input_output": io(["1\n2"], ["3"], fn_name=None), "metadata": {"fn_name": "add"}},
     "def add(arg1, arg2):"),
    (f_with("def f(x, seen=set()):\n    return x"), "def f(x, seen=set()):"),
    (f_with("import numpy as np\ndef f(x: np.ndarray, m=MOD):\n    return x"), "def f(arg1):"),
    (f_with("def f(x,  # the number\n      y=1):\n    return x"), "def f(x, y=1):"),
    (f_with("def f(x: List[int], y=r'\\d') -> Optional[int]:\n    return x"), "def f(x: List[int], y='\\\\d'):"),
    (f_with("f = lambda x: x"), "def f(arg1):"),
    (f_with("```python\ndef f(x, y=1):\n    return x\n```"), "def f(x, y=1):"),
    (f_with(None), "def f(arg1):"),
]  # fmt: skip


@pytest.mark.parametrize("row, expected", CODE_ROWS)
def test_code_rows_as_users_have_them(tmp_path, row, expected):
    fine = {"query_id": "fine", "question": "Fine.", "input_output": io(["1"], ["1"])}
    found, note = read(tmp_path, [fine, row])
    found.pop("Fine.")
    if expected.startswith("def"):
        (problem,) = found.values()
        assert problem.prompt.endswith(f'\n"""\n{expected}\n') and "None" not in problem.prompt
    else:
        assert not found and note == f"; left out: {expected}"
        with pytest.raises(UserError, match=r"rows.jsonl: 1 of 1 rows cannot be used.*columns: question"):
            read(tmp_path, [row])
        with pytest.raises(UserError, match="2 of 3 rows cannot be used"):  # more than half
            read(tmp_path, [row, fine, row])


MATH_ROW = {"prompt": "Fine.", "reward_model": {"ground_truth": "1"}, "extra_info": {"model_difficulty": {"K": 1}}}
MATH_ROWS = [
    ({"extra_info": None}, "", "2"),
    ({"extra_info": {"model_difficulty": {"K": None}}}, "K", "1 no difficulty `K`"),
    ({"extra_info": {"model_difficulty": {"K": 16}}}, "K", "1 difficulty outside 1-13"),
    ({"reward_model": {"ground_truth": 2}}, "", "2"),
    ({"reward_model": {"ground_truth": 0}}, "", "0"),
    ({"reward_model": {"ground_truth": '[""]'}}, "", "1 no answer"),
    ({"reward_model": None}, "", "1 no answer"),
    ({"prompt": [{"role": "user", "content": None}]}, "", "1 no question"),
    ({"prompt": []}, "", "1 no prompt"),
    ({"ability": "math"}, "", "2"),
    ({"ability": "code", "reward_model": {"ground_truth": '{"inputs": ["1"]}'}}, "", "1 code, not math"),
]


@pytest.mark.parametrize("change, key, expected", MATH_ROWS)
def test_math_rows_as_users_have_them(tmp_path, change, key, expected):
    row = {"prompt": [{"role": "user", "content": "1+1?"}], "reward_model": {"ground_truth": '["2"]'}} | change
    found, note = read(tmp_path, [MATH_ROW, row], task="math", difficulty_key=key)
    assert found.pop("Fine.").checks["answer"] == "1"
    assert [p.checks["answer"] for p in found.values()] == ([expected] if expected.isdigit() else [])
    assert note == ("" if expected.isdigit() else f"; left out: {expected}")


def test_signatures_of_the_standard_library():
    """By `ast`: no parenthesis, comment or string misleads it. Each is one line that runs after the preamble."""
    signatures, modules = [], sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    for source in [path.read_text(encoding="utf-8") for path in modules[::4]]:
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and (node.args.defaults or node.returns):
                signatures.append(signature_of(ast.get_source_segment(source, node), node.name))
    found = list(filter(None, signatures))
    assert len(found) > 50 and len(found) > 0.7 * len(signatures)
    assert not any("\n" in signature.replace("\\n", "") for signature in found)
    imports = grpo_rlvr.PREAMBLE.replace("sys.setrecursionlimit", "#")
    exec(imports + "".join(f"{signature}\n    pass\n" for signature in found), {})


def test_math_schema_and_stratification(problems_file):
    args = Args(task="math", difficulty_key="M")
    found, note = grpo_rlvr.read_problems(problems_file, args, TOKENIZER)
    levels = [int(problem.name) % 17 for problem in found]
    assert sorted(levels[:13]) == list(range(1, 14)) and sorted(levels[13:26]) == list(range(1, 14))
    assert set(levels) == set(range(1, 14)) and "9 difficulty outside 1-13" in note
    for problem in found:
        assert problem.checks["answer"] == str(int(problem.name) + 1)
        assert problem.prompt.endswith("\nPlease reason step by step, and put your final answer within \\boxed{}.\n")


def test_benchmarks_are_held_out_by_their_test_split(monkeypatch):
    row = {"text": "Id.", "code": "def f(a): return a", "test_list": ["assert f(1) == 1"]}
    splits = []
    monkeypatch.setattr(grpo_rlvr, "read_rows", lambda source, split: splits.append(split) or [row] * 3)
    mbpp = "google-research-datasets/mbpp:full"
    grpo_rlvr.load_problems(Args(dataset=mbpp, eval_dataset=mbpp), TOKENIZER)
    grpo_rlvr.load_problems(Args(dataset="Skywork/Skywork-OR1-RL-Data", eval_dataset="me/problems"), TOKENIZER)
    assert splits == ["train", "test", "math", "train"]


def test_levels_are_of_the_training_problems(problems_file, tmp_path):
    (tmp_path / "heldout.jsonl").write_text(json.dumps(MATH_ROW | {"extra_info": None}) + "\n")
    args = Args(task="math", difficulty_key="M", dataset=problems_file, eval_dataset=str(tmp_path / "heldout.jsonl"))
    train, heldout, _ = grpo_rlvr.load_problems(args, TOKENIZER)
    assert {problem.level for problem in train} == set(range(1, 14)) and len(heldout) == 1
    train, heldout, _ = grpo_rlvr.load_problems(Args(task="math", dataset=problems_file, eval_problems=9), TOKENIZER)
    assert sorted(int(problem.name) for problem in train + heldout) == list(range(40)) and len(heldout) == 9


def test_prompts_do_not_end_with_an_appended_eos(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER.name_or_path)
    eos = tokenizer.eos_token
    ends = TemplateProcessing(single=f"{eos} $A {eos}", special_tokens=[(eos, tokenizer.eos_token_id)])
    tokenizer.backend_tokenizer.post_processor = ends
    assert tokenizer("x").input_ids[-1] == tokenizer.eos_token_id
    found, _ = read(tmp_path, [{"question": "Fine.", "input_output": io(["1"], ["1"])}], tokenizer)
    plain = TOKENIZER(found["Fine."].prompt, add_special_tokens=False).input_ids
    assert found["Fine."].prompt_ids == [tokenizer.eos_token_id, *plain]


def test_chat_template(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER.name_or_path)
    tokenizer.chat_template = "User: {{ messages[0]['content'] }} A:"
    found, _ = read(tmp_path, [MATH_ROW], tokenizer, task="math", chat_template=True)
    assert found["User:"].prompt.startswith("User: Fine.\nPlease") and found["User:"].prompt.endswith(". A:")
    with pytest.raises(UserError, match="chat_template is not set"):
        read(tmp_path, [MATH_ROW], task="math", chat_template=True)


# ---------------------------------------------------------------- reward


def test_code_rewards():
    cases = [{"input": "2", "output": "4"}, {"input": "3", "output": "9"}]
    f = {"signature": "def f(n):", "cases": cases, "fn_name": "f", "timeout_s": 1.0}
    reads = f | {"signature": "def main():", "cases": [{"input": "5\n", "output": "25\n"}], "fn_name": None}
    in_class = f | {"signature": "class Solution:\n    def f(self, n: List[int]):"}
    for checks, body, passed, reason in [
        (f, "    return n * n\n", True, "passed"),
        (f, "    return n * n\ndef g():", True, "passed"),  # cut at column 0
        (f, "    return n + 2\n", False, "wrong answer"),  # the first test passes: all or nothing
        (f, "    while True: pass\n", False, "timeout"),
        (f, "    raise ValueError(n)\n", False, "exception"),
        (f, "    import sys; sys.exit(0)\n", False, "e"),
        (f, "    return (\n", False, "e"),
        (f, "", False, "e"),
        (reads, "    print(int(input()) ** 2)\n", True, "passed"),
        (in_class, "        return n * n\n", True, "passed"),
    ]:
        trains, right, why = grpo_rlvr.reward(Problem("p", "", [], checks), body)
        assert (trains, right) == (float(passed), passed) and why.startswith(reason), (body, why)


def test_math_rewards(capfd, monkeypatch):
    verify = grpo_rlvr.MathVerifier()
    for gold, text, right, reason in [
        ("\\frac{1}{2}", "so it is \\boxed{0.5}", True, "right"),
        ("13", "first \\boxed{12}, no: \\boxed{13}.", True, "right"),
        ("13", "12 + 1 = 13. \\boxed{14}", False, "wrong answer"),
        ("13", "The answer is 13.", False, "no answer"),
        ("13", "", False, "no answer"),
        ("13", "\\boxed{}", False, "no answer"),
        ("√2", "\\boxed{\\sqrt{2}}", True, "right"),
        ("√2", "\\boxed{2}", False, "wrong answer"),
        ("2√(3)", "\\boxed{2\\sqrt{3}}", True, "right"),
        ("\\sqrt{2}", "\\boxed{√2}", True, "right"),
        ("∞", "\\boxed{\\infty}", True, "right"),
        ("−2π", "\\boxed{-2\\pi}", True, "right"),
        ("2·3", "\\boxed{2 × 3}", True, "right"),
    ]:
        assert verify(gold, text, 20.0) == (right, reason), (gold, text)
    begin = time.time()
    assert verify("13", "\\boxed{9^{9^{9^9}}}", 0.5) == (False, "timeout")
    assert time.time() - begin < 3
    assert verify("13", "\\boxed{13}", 20.0) == (True, "right")  # a new process
    os.kill(verify.process.pid, signal.SIGKILL)  # the machine's fault, not the completion's
    assert verify("13", "\\boxed{13}", 0.5) == (True, "right")
    time.sleep(0.8)  # the limit ends with the comparison
    assert verify("13", "\\boxed{13}", 20.0) == (True, "right")
    assert capfd.readouterr() == ("", "")  # no warning of math-verify
    monkeypatch.setattr(grpo_rlvr, "VERIFIER", "import no_math_verify")
    with pytest.raises(UserError, match="math-verify does not start"):
        grpo_rlvr.MathVerifier()("13", "\\boxed{13}", 20.0)


# ---------------------------------------------------------------- command line


def test_defaults_follow_task_and_tiny(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["grpo_rlvr.py", "--task", "math", "--updates", "7"])
    args = grpo_rlvr.parse_args()
    assert (args.group_size, args.max_new_tokens, args.updates, args.train_problems) == (8, 4096, 7, 4096)
    monkeypatch.setattr(sys, "argv", ["grpo_rlvr.py", "--tiny", "--no-normalize-std"])
    args = grpo_rlvr.parse_args()
    assert args.tiny and Path(args.dataset).exists() and not args.normalize_std


BAD_INPUT = [
    (["--eval-problems", "0"], "--eval-problems"),
    (["--max-new-tokens", "100000"], "the longest rows"),
    (["--temperature", "0"], "--temperature"),
    (["--chat-template"], "--chat-template"),
    (["--task", "math", "--difficulty-key", "K"], "no difficulty `K`"),
]


@pytest.mark.parametrize("flags, message", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(flags, message, capfd, monkeypatch, tmp_path):
    """A dry run refuses what the run refuses, and neither leaves a folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "_exit", sys.exit)
    for more in ([], ["--dry-run"]):
        monkeypatch.setattr(sys, "argv", ["grpo_rlvr.py", "--tiny", *flags, *more])
        with pytest.raises(SystemExit) as left:
            launch(grpo_rlvr.main, grpo_rlvr.parse_args())
        error = capfd.readouterr().err.strip().splitlines()
        assert left.value.code == 2 and len(error) == 1 and error[0].startswith("error: ") and message in error[0]
        assert not list(tmp_path.iterdir())


def test_dry_run_prints_the_plan_and_writes_nothing(capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["grpo_rlvr.py", "--tiny", "--dry-run"])
    grpo_rlvr.main(grpo_rlvr.parse_args())
    out = capfd.readouterr().out
    assert re.search(r"training, \d+ held-out problems", out) and "def solve(" in out and "GiB" in out
    assert not list(tmp_path.iterdir())
