"""grpo_rlvr.py: the loss against TRL's numbers and the equation, the sampler against enumeration, whole runs.

The runs use a random model of 86 thousand parameters and a toy reward; the last two tests use tiny/ and the
sandbox.
"""

import dataclasses
import inspect
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import common
import modeling
import problems
import grpo_rlvr
from common import TINY, Ranks, UserError, launch
from modeling import load_model, load_tokenizer, uniforms
from grpo_rlvr import Args, Problem, Sample, group_advantages, grpo_loss, loss_normalizer

REPO = Path(__file__).parent.parent
FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "grpo_trl.json").read_text())
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")
ONE = Ranks(0, 1, torch.device("cpu"))
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A random model with tiny's tokenizer; a tenth of its tokens end a completion, so lengths vary."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True, initializer_range=0.3, eos_token_id=0, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=list(range(200)), pad_token_id=0)
    model.save_pretrained(folder)
    load_tokenizer(str(TINY / "model")).save_pretrained(folder)
    return str(folder)


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


def toy_rewards(self, problems, texts):
    return [(float(len(text) % 2), "" if len(text) % 2 else "even: length") for text in texts]


@pytest.fixture
def toy(monkeypatch, tmp_path, model_dir, problems_file):
    """make(**changes) -> Args of a short run; a completion of an odd number of characters is right."""
    monkeypatch.setattr(grpo_rlvr.Rollouts, "rewards", toy_rewards)
    monkeypatch.setattr(grpo_rlvr.Run, "curves", lambda self, keys: None)  # matplotlib is slow
    return lambda **changes: Args(
        **(toy_args(model_dir, problems_file) | {"output_dir": str(tmp_path / "run")} | changes)
    )


def toy_args(model_dir, problems_file) -> dict:
    return {
        "task": "math", "model": model_dir, "dataset": problems_file, "eval_problems": 4,
        "prompts_per_update": 4, "group_size": 4, "max_new_tokens": 12, "temperature": 0.8,
        "minibatches": 1, "updates": 4, "learning_rate": 1e-2, "micro_batch_tokens": 200, "eval_every": 0,
        "save_every": 0, "rollout_rows": 6,
    }  # fmt: skip


def metrics_of(args) -> list[dict]:
    lines = (Path(args.output_dir) / "metrics.jsonl").read_text().splitlines()
    timed = ("time/", "perf/")
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(timed)} for line in lines]


def weights_of(args, name="final") -> dict:
    return load_file(Path(args.output_dir) / "checkpoints" / name / "model.safetensors")


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


@pytest.mark.parametrize(
    "case", FIXTURE["cases"], ids=lambda c: f"{c['loss_type']}-{c['beta']}-{c['old_given']}"
)
def test_loss_and_gradient_equal_trl(case):
    """The fixture was made by calling TRL's own GRPOTrainer._compute_loss on these tensors, with a stand-in
    for the trainer whose model returns `logprobs`; epsilon 0.2 and 0.28, use_bias_correction_kl off."""
    logprobs, old, ref = (torch.tensor(FIXTURE[k]) for k in ("logprobs", "old_logprobs", "ref_logprobs"))
    logprobs.requires_grad_()
    mask = torch.arange(logprobs.shape[1]) < torch.tensor(FIXTURE["lengths"]).unsqueeze(1)
    loss, sums = grpo_loss(
        logprobs, old if case["old_given"] else logprobs.detach(), ref,
        torch.tensor(FIXTURE["advantages"]), mask,
        0.2, 0.28, case["beta"], case["loss_type"], FIXTURE["max_length"],
    )  # fmt: skip
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5, abs=1e-7)
    torch.testing.assert_close(logprobs.grad, torch.tensor(case["grad"]), rtol=1e-4, atol=1e-7)
    assert sums["clip_frac"] / sums["tokens"] == pytest.approx(case["clip_frac"], abs=1e-6)
    if case["beta"]:
        assert sums["kl"] / sums["tokens"] == pytest.approx(case["kl"], rel=1e-5)


def test_loss_is_the_equation():
    """One response and one token at a time, as section 2 prints it (with a mean over tokens inside)."""
    logprobs, old, ref = (
        torch.tensor(FIXTURE[k], dtype=torch.float64) for k in ("logprobs", "old_logprobs", "ref_logprobs")
    )
    logprobs.requires_grad_()
    advantages, lengths, beta = FIXTURE["advantages"], FIXTURE["lengths"], 0.1
    objective = 0.0
    for i, length in enumerate(lengths):
        for t in range(length):
            ratio = torch.exp(logprobs[i, t] - old[i, t])
            surrogate = torch.min(ratio * advantages[i], torch.clamp(ratio, 0.8, 1.28) * advantages[i])
            kl = torch.exp(ref[i, t] - logprobs[i, t]) - (ref[i, t] - logprobs[i, t]) - 1
            objective = objective + (surrogate - beta * kl) / length / len(lengths)
    (expected,) = torch.autograd.grad(-objective, logprobs)
    mask = torch.arange(logprobs.shape[1]) < torch.tensor(lengths).unsqueeze(1)
    loss, _ = grpo_loss(logprobs, old, ref, torch.tensor(advantages), mask, 0.2, 0.28, beta, "grpo", 9)
    (actual,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(actual, expected)
    assert loss.item() == pytest.approx(-objective.item())


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_parts_add_up_to_the_whole(loss_type):
    logprobs, old = torch.tensor(FIXTURE["logprobs"]), torch.tensor(FIXTURE["old_logprobs"])
    advantages, lengths = torch.tensor(FIXTURE["advantages"]), torch.tensor(FIXTURE["lengths"])
    mask = torch.arange(logprobs.shape[1]) < lengths.unsqueeze(1)

    def loss(rows, normalizer=None):
        tensors = logprobs[rows], old[rows], None, advantages[rows], mask[rows]
        return grpo_loss(*tensors, 0.2, 0.28, 0.0, loss_type, 9, normalizer)[0].item()

    normalizer = loss_normalizer(lengths, loss_type, 9)
    parts = [loss([0], normalizer), loss([1, 2, 3], normalizer), loss([4, 5], normalizer)]
    assert sum(parts) == pytest.approx(loss(list(range(6))), rel=1e-5)


# ---------------------------------------------------------------- rollout


def test_sampler_draws_from_the_models_distribution():
    """All sequences of two of seven tokens, against their probabilities at temperature 0.7."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=7, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    config.initializer_range = 0.5
    model = LlamaForCausalLM(config).eval()
    modeling.equip(model)
    table = torch.zeros(3, 7, dtype=torch.bool)
    table[0, 3] = True  # token 3 ends a completion
    prompt, rows = [1, 2, 4], 20_000
    first = (model(torch.tensor([prompt])).logits[0, -1] / 0.7).softmax(-1)
    expected = {}
    for a in range(7):
        then = (model(torch.tensor([[*prompt, a]])).logits[0, -1] / 0.7).softmax(-1)
        expected |= (
            {(3,): first[3].item()} if a == 3 else {(a, b): (first[a] * then[b]).item() for b in range(7)}
        )
    noise = uniforms([rows, 2], "enumeration")
    sampled = grpo_rlvr.rollout(model, [prompt] * rows, noise, 0.7, table)
    counts = dict.fromkeys(expected, 0)
    for ids, logprobs, ended in sampled:
        counts[tuple(ids)] += 1
        assert sum(logprobs) == pytest.approx(math.log(expected[tuple(ids)]), abs=1e-4)
        assert ended == (ids[-1] == 3)
    for key, p in expected.items():
        assert counts[key] / rows == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / rows) + 1e-9)


def test_rollout_equals_the_plain_forward(model_dir, monkeypatch):
    """A shared prompt read once, ended rows dropped: log-probabilities are those of a forward pass per row."""
    model = load_model(model_dir, ONE)
    table = torch.zeros(3, 2048, dtype=torch.bool)
    table[0, :200] = True
    generator = np.random.default_rng(0)
    prompts = [generator.integers(0, 2048, size).tolist() for size in (3, 9, 5, 14, 1, 9)]
    prompts[1][4] = 0  # the pad token inside a prompt is a token
    prompts.append(prompts[3])  # a group
    noise = uniforms([7, 20], "plain")
    monkeypatch.setattr(grpo_rlvr, "DROP_EVERY", 4)
    sampled = grpo_rlvr.rollout(model, prompts, noise, 0.7, table)
    monkeypatch.setattr(grpo_rlvr, "DROP_EVERY", 100)
    assert [row[0] for row in grpo_rlvr.rollout(model, prompts, noise, 0.7, table)] == [
        r[0] for r in sampled
    ]
    assert len({len(ids) for ids, _, _ in sampled}) > 2
    samples = []
    for prompt, (ids, logprobs, ended) in zip(prompts, sampled):
        assert ended == (ids[-1] < 200) and all(i >= 200 for i in ids[:-1]) and (ended or len(ids) == 20)
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / 0.7
        plain = logits.log_softmax(-1).gather(-1, torch.tensor(ids).unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(torch.tensor(logprobs), plain.detach(), rtol=1e-4, atol=1e-5)
        samples.append(Sample("", prompt, ids, logprobs, ended))
    training = grpo_rlvr.score(model, samples, Args(temperature=0.7, micro_batch_tokens=40))
    for sample, row in zip(samples, training):
        torch.testing.assert_close(
            torch.tensor(row), torch.tensor(sample.rollout_logprobs), rtol=1e-4, atol=1e-5
        )


def test_greedy_is_temperature_zero(model_dir):
    model = load_model(model_dir, ONE)
    table = torch.zeros(3, 2048, dtype=torch.bool)
    ((ids, _, ended),) = grpo_rlvr.rollout(model, [[5, 6, 7]], torch.rand(1, 8), 0.0, table)
    plain = model.generate(
        torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert ids == plain[0, 3:].tolist() and not ended


def test_a_body_ends_in_column_zero():
    tokenizer = load_tokenizer(str(TINY / "model"))
    eos = tokenizer.eos_token_id
    table = grpo_rlvr.end_table(tokenizer, {eos}, len(tokenizer) + 8, column_zero=True)
    signature = tokenizer.encode("def f(n):\n")

    def end(text: str, with_eos=False) -> int | None:
        ids = torch.tensor([signature[-1:] + tokenizer.encode(text) + [eos] * with_eos])
        ends = grpo_rlvr.is_end(table, ids)[0].nonzero()
        return None if not len(ends) else ends[0].item() + 1

    body = "    if n:\n\n        return 1\n    # so\n    return 2\n"
    length = len(tokenizer.encode(body))
    assert end(body) is None
    assert end(body, with_eos=True) == length + 1  # the token that ends a completion belongs to it
    for after in ("def g():\n", "print(1)\n", "# next\n", '"""\n'):
        assert tokenizer.decode(tokenizer.encode(body + after)[:length]) == body
        assert end(body + after) == length + 1
    assert end("return 1\n") == 1  # a body that is not indented
    only_eos = grpo_rlvr.end_table(tokenizer, {eos}, len(tokenizer), column_zero=False)
    assert only_eos.sum() == 1 and only_eos[0, eos]


# ---------------------------------------------------------------- update


def random_samples(model, count=8) -> list[Sample]:
    generator = np.random.default_rng(1)
    samples = []
    for index in range(count):
        prompt, ids = (
            generator.integers(0, 2048, size).tolist() for size in (2 + index % 3, 1 + 3 * index % 10)
        )
        ids[-1] = 0  # eos, which is also pad
        samples.append(
            Sample("p", prompt, ids, [0.0] * len(ids), True, advantage=generator.normal(), in_loss=True)
        )
    for sample, logprobs in zip(samples, grpo_rlvr.score(model, samples, Args())):
        sample.old_logprobs = [x + generator.normal() * 0.2 for x in logprobs]
        sample.ref_logprobs = [x + generator.normal() * 0.2 for x in logprobs]
    return samples


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches_change_nothing(model_dir, loss_type):
    weights = []
    for micro_batch_tokens in (1, 60, 10_000):
        args = Args(
            loss_type=loss_type,
            micro_batch_tokens=micro_batch_tokens,
            beta=0.1,
            max_grad_norm=1e9,
            minibatches=2,
        )
        model = load_model(model_dir, ONE)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        samples = random_samples(model)
        normalizer = loss_normalizer(torch.tensor([len(s.completion_ids) for s in samples]), loss_type, 1024)
        sums, norm = grpo_rlvr.train_minibatch(model, optimizer, samples, normalizer, args, ONE)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert sums["tokens"] == sum(len(s.completion_ids) for s in samples) and norm > 0
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=1e-4, atol=1e-6)


def test_stop_token_is_trained_and_truncation_can_be_masked(model_dir):
    """The completion [0] is one eos, equal to pad: its probability must rise with a positive advantage."""
    model = load_model(model_dir, ONE)
    sample = Sample("p", [0, 9, 0], [0], [0.0], ended=True, advantage=1.0, in_loss=True)
    args = Args(minibatches=1, temperature=1.0)
    (before,) = grpo_rlvr.score(model, [sample], args)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    grpo_rlvr.train_minibatch(model, optimizer, [sample], 1.0, args, ONE)
    (after,) = grpo_rlvr.score(model, [sample], args)
    assert after[0] > before[0] + 1e-4
    sample.in_loss = False
    sums, norm = grpo_rlvr.train_minibatch(model, optimizer, [sample], 1.0, args, ONE)
    assert norm == 0 and sums["tokens"] == 0
    sums, norm = grpo_rlvr.train_minibatch(model, optimizer, [], 1.0, args, ONE)  # a rank without work
    assert sums["tokens"] == 0


# ---------------------------------------------------------------- runs


def test_reward_rises(toy, monkeypatch):
    """A reward that any policy gradient learns: the completion is a single token."""

    def short(self, problems, texts):
        return [(float(len(self.tokenizer.encode(text)) <= 1), "long") for text in texts]

    monkeypatch.setattr(grpo_rlvr.Rollouts, "rewards", short)
    args = toy(updates=25, prompts_per_update=8, group_size=8, max_new_tokens=6)
    grpo_rlvr.main(args)
    history = metrics_of(args)
    assert history[1]["reward/mean"] < 0.4
    assert sum(row["reward/mean"] for row in history[-3:]) / 3 > 0.8


def test_resume_is_bit_exact(toy, tmp_path, monkeypatch):
    whole, parts = (
        toy(minibatches=2, beta=0.01),
        toy(minibatches=2, beta=0.01, output_dir=str(tmp_path / "parts")),
    )
    grpo_rlvr.main(whole)
    requested = iter([False, True])
    with monkeypatch.context() as patch:  # a signal arrives during the second update
        patch.setattr(grpo_rlvr.Interrupt, "requested", lambda self, ranks: next(requested))
        with pytest.raises(KeyboardInterrupt):
            grpo_rlvr.main(parts)
    assert len(metrics_of(parts)) == 3
    with pytest.raises(UserError, match="eps-high"):
        grpo_rlvr.main(dataclasses.replace(parts, resume=parts.output_dir, eps_high=0.5))
    grpo_rlvr.main(dataclasses.replace(parts, resume=parts.output_dir))
    assert metrics_of(parts) == metrics_of(whole)
    for key, weight in weights_of(whole).items():
        assert torch.equal(weight, weights_of(parts)[key]), key


def test_two_ranks_equal_one(toy, tmp_path, model_dir, problems_file):
    """The same global batches, so the same update to rounding; Adam amplifies it, hence the sums."""
    args = toy(updates=2, minibatches=2, beta=0.01, dynamic_sampling=2, learning_rate=1e-3)
    grpo_rlvr.main(args)
    fields = dataclasses.asdict(args) | {"output_dir": str(tmp_path / "two")}
    driver = tmp_path / "driver.py"
    driver.write_text(
        f"import sys; sys.path[:0] = [{str(REPO)!r}, {str(REPO / 'tests')!r}]\n"
        "import grpo_rlvr, test_grpo\n"
        "grpo_rlvr.Rollouts.rewards = test_grpo.toy_rewards\n"
        f"grpo_rlvr.launch(grpo_rlvr.main, grpo_rlvr.Args(**{fields!r}))\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--standalone",
        str(driver),
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    two = dataclasses.replace(args, output_dir=fields["output_dir"])
    for mine, other in zip(metrics_of(args), metrics_of(two), strict=True):
        assert mine == pytest.approx(other, rel=1e-3, abs=1e-5)
    start = load_file(Path(model_dir) / "model.safetensors")
    one, two = weights_of(args), weights_of(two)
    assert sum((one[k] - two[k]).abs().sum() for k in one) < 1e-2 * sum(
        (one[k] - start[k]).abs().sum() for k in one
    )


def test_several_minibatches_have_true_old_logprobs(toy, monkeypatch):
    gaps, real = [], grpo_rlvr.grpo_loss

    def spy(logprobs, old_logprobs, *rest):
        gaps.append((logprobs - old_logprobs).abs().max().item())
        return real(logprobs, old_logprobs, *rest)

    monkeypatch.setattr(grpo_rlvr, "grpo_loss", spy)
    grpo_rlvr.main(toy(updates=1, minibatches=2, micro_batch_tokens=10_000))
    assert gaps[0] < 1e-5 and gaps[1] > 1e-3  # the first step is on-policy, the second is not


def test_dynamic_sampling_and_overlong_filter(toy, monkeypatch):
    def rewards(self, problems, texts):  # only the even problems have a spread
        return [(float(len(text) % 2 and int(p.name) % 2 == 0), "no") for p, text in zip(problems, texts)]

    monkeypatch.setattr(grpo_rlvr.Rollouts, "rewards", rewards)
    seen, real = [], grpo_rlvr.train_minibatch

    def spy(model, optimizer, samples, *rest):
        seen.extend(samples)
        return real(model, optimizer, samples, *rest)

    monkeypatch.setattr(grpo_rlvr, "train_minibatch", spy)
    args = toy(updates=2, dynamic_sampling=3, filter_overlong=True)
    grpo_rlvr.main(args)
    assert seen and all(int(s.problem) % 2 == 0 for s in seen)
    assert any(not s.ended for s in seen) and all(s.in_loss == s.ended for s in seen)
    assert all(row["rollout/groups"] > 0 for row in metrics_of(args)[1:])


def test_bad_gradients_are_skipped_then_stop_the_run(toy, monkeypatch):
    real = grpo_rlvr.grpo_loss

    def nan(*tensors):
        loss, sums = real(*tensors)
        return loss * math.nan, sums

    monkeypatch.setattr(grpo_rlvr, "grpo_loss", nan)
    monkeypatch.setattr(common, "MAX_SKIPPED", 2)
    args = toy(save_every=1)
    with pytest.raises(UserError, match="2 updates in a row.*[0-9]"):
        grpo_rlvr.main(args)
    assert [row.get("optim/skipped") for row in metrics_of(args)] == [0, 1, 2]
    start, after = load_file(Path(args.model) / "model.safetensors"), weights_of(args, "update_000001")
    assert all(torch.equal(start[key], after[key]) for key in start)


# ---------------------------------------------------------------- data


def write(tmp_path, rows) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(tmp_path, rows, **changes) -> dict[str, Problem]:
    tokenizer = load_tokenizer(str(TINY / "model"))
    found = grpo_rlvr.read_problems(write(tmp_path, rows), Args(**changes), tokenizer)
    return {problem.prompt.split("\n")[1 if changes.get("task") != "math" else 0]: problem for problem in found}


def test_code_schemas(tmp_path):
    functional = {"inputs": ["[1, 2]\n3", "[1]\n2"], "outputs": ["6", "3"], "fn_name": "add"}
    lcb = [
        {"input": "3\n4", "output": "7", "testtype": "functional", "metadata": '{"func_name": "plus"}'}
    ] * 20
    prime = [{"type": "function_call", "input": [2, 3], "output": [5], "fn_name": "total"}]
    lists = {"inputs": ["1", "2"], "outputs": [[1], []], "fn_name": "some"}  # results that are lists
    taco = {"inputs": [["1 2", "3"]] + [f"{i}" for i in range(30)], "outputs": [["6"]] + ["x"] * 30}
    starter = "class Solution:\n    def plus(self, a, b):\n        "
    solution = (
        "class Solution:\n    def total(self, a, *,\n              b: int = 3) -> int:\n        return a + b"
    )
    found = read(tmp_path, [
        {"question": "boba", "input_output": json.dumps(functional), "metadata": {"fn_name": "add"}},
        {"question": "given", "input_output": json.dumps(functional), "signature": "def add(xs, y):"},
        {"problem": "lcb", "tests": json.dumps(lcb), "starter_code": starter,
         "metadata": json.dumps({"func_name": "plus"})},
        {"problem": "prime", "tests": json.dumps(prime), "solutions": [solution]},
        {"problem": "lists", "tests": json.dumps(lists)},
        {"problem": "taco", "tests": json.dumps(taco), "solutions": ["import sys"]},
        {"problem": "codeforces", "tests": [{"input": "1\n", "output": "2\n"}]},
    ])  # fmt: skip
    assert found["boba"].prompt == '"""\nboba\n"""\ndef add(arg1, arg2):\n'
    assert found["given"].prompt == '"""\ngiven\n"""\ndef add(xs, y):\n'
    assert found["given"].checks["fn_name"] == "add" and found["given"].checks["cases"][0]["output"] == "6"
    assert found["lcb"].prompt.endswith("class Solution:\n    def plus(self, a, b):\n")
    assert len(found["lcb"].checks["cases"]) == 20 and found["lcb"].checks["fn_name"] == "plus"
    assert found["prime"].prompt.endswith("def total(a, *, b: int = 3):\n")
    assert found["prime"].checks["cases"] == [{"input": [2, 3], "output": 5}]
    assert [case["output"] for case in found["lists"].checks["cases"]] == [[1], []]
    assert found["taco"].prompt.endswith("def main():\n") and found["taco"].checks["fn_name"] == ""
    assert len(found["taco"].checks["cases"]) == problems.MAX_TESTS  # those with the longest inputs
    assert found["taco"].checks["cases"][0] == {"input": "1 2\n3", "output": "6"}
    assert found["codeforces"].checks["cases"] == [{"input": "1\n", "output": "2\n"}]


def test_math_schema_and_stratification(problems_file):
    tokenizer = load_tokenizer(str(TINY / "model"))
    found = grpo_rlvr.read_problems(problems_file, Args(task="math", difficulty_key="M"), tokenizer)
    levels = [int(problem.name) % 17 for problem in found]
    assert sorted(levels[:13]) == list(range(1, 14)) and sorted(levels[13:26]) == list(range(1, 14))
    assert set(levels) == set(range(1, 14))
    for problem in found:
        assert problem.checks["answer"] == str(int(problem.name) + 1)
        assert problem.prompt.endswith(
            "\nPlease reason step by step, and put your final answer within \\boxed{}.\n"
        )
    with pytest.raises(UserError, match="no column `K`; it has: M"):
        grpo_rlvr.read_problems(problems_file, Args(task="math", difficulty_key="K"), tokenizer)


@pytest.mark.parametrize(
    "row", [{"prompt": "x"}, {"question": "q", "input_output": "{"}, {"question": "q", "input_output": "{}"}]
)
def test_rows_that_cannot_be_read(tmp_path, row):
    with pytest.raises(UserError, match="rows.jsonl"):
        read(tmp_path, [row])


def test_every_epoch_is_a_permutation():
    drawn = [i for cursor in range(0, 30, 5) for i in grpo_rlvr.draw_problems(cursor, 5, 10, seed=3)]
    assert drawn == grpo_rlvr.draw_problems(0, 30, 10, seed=3)
    epochs = [drawn[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and epochs[0] != epochs[1]


# ---------------------------------------------------------------- reward


def test_code_rewards():
    checks = {
        "signature": "def f(n):",
        "cases": [{"input": "2", "output": "4"}, {"input": "3", "output": "9"}],
        "fn_name": "f",
    }
    reads = {"signature": "def main():", "cases": [{"input": "5\n", "output": "25\n"}], "fn_name": ""}
    in_class = checks | {"signature": "class Solution:\n    def f(self, n: List[int]):"}
    cases = [
        (checks, "    return n * n\n", 1, "passed"),
        (checks, "    return n * n\ndef g():", 1, "passed"),  # cut at column 0
        (checks, "    return n + 2\n", 0, "wrong answer"),  # the first test passes: all or nothing
        (checks, "    while True: pass\n", 0, "timeout"),
        (checks, "    raise ValueError(n)\n", 0, "exception"),
        (checks, "    import sys; sys.exit(0)\n", 0, "e"),
        (checks, "    return (\n", 0, "e"),
        (checks, "", 0, "e"),
        (reads, "    print(int(input()) ** 2)\n", 1, "passed"),
        (in_class, "        return n * n\n", 1, "passed"),
    ]
    posed = [Problem("p", "", [], case[0]) for case in cases]
    scores = grpo_rlvr.code_rewards(
        posed, [case[1] for case in cases], Args(reward_timeout_s=1.0, workers=1)
    )
    for (_, body, reward, reason), (actual, actual_reason) in zip(cases, scores):
        assert actual == reward and actual_reason.startswith(reason), (body, actual_reason)


def test_an_idle_verifier_stays(monkeypatch):
    real = inspect.getsource
    monkeypatch.setattr(problems.inspect, "getsource", lambda f: real(f).replace("alarm(600)", "alarm(1)"))
    verify = problems.MathVerifier()
    assert verify("13", "\\boxed{13}", 20.0) == (1.0, "right")
    time.sleep(1.5)
    assert verify("13", "\\boxed{13}", 20.0) == (1.0, "right")


def test_math_rewards():
    verify = problems.MathVerifier()
    cases = [
        ("\\frac{1}{2}", "so it is \\boxed{0.5}", 1, "right"),
        ("13", "first \\boxed{12}, no: \\boxed{13}.", 1, "right"),
        ("13", "12 + 1 = 13. \\boxed{14}", 0, "wrong answer"),
        ("13", "The answer is 13.", 0, "no answer"),
        ("13", "", 0, "no answer"),
        ("13", "\\boxed{}", 0, "no answer"),
    ]
    for gold, text, reward, reason in cases:
        assert verify(gold, text, 20.0) == (reward, reason), text
    begin = time.time()
    assert verify("13", "\\boxed{9^{9^{9^9}}}", 0.5) == (0.0, "timeout")
    assert time.time() - begin < 3
    assert verify("13", "\\boxed{13}", 20.0) == (1.0, "right")  # a new process
    verify.process.kill()
    verify.process.wait()
    assert verify("13", "\\boxed{13}", 20.0)[0] == 0.0 and verify("13", "\\boxed{13}", 20.0)[0] == 1.0


# ---------------------------------------------------------------- command line


def test_sizes_that_do_not_fit():
    for changes in ({"group_size": 1}, {"temperature": 0.0}, {"chat_template": True}):
        with pytest.raises(UserError):
            grpo_rlvr.check(Args(**changes))


def test_defaults_follow_task_and_tiny(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["grpo_rlvr.py", "--task", "math", "--updates", "7"])
    args = grpo_rlvr.parse_args()
    assert (args.group_size, args.max_new_tokens, args.updates, args.train_problems) == (8, 4096, 7, 4096)
    monkeypatch.setattr(sys, "argv", ["grpo_rlvr.py", "--tiny", "--no-normalize-std"])
    args = grpo_rlvr.parse_args()
    assert args.tiny and args.dataset.endswith("code_train.jsonl") and not args.normalize_std


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--dataset", "missing.jsonl"], "no such data file or folder: missing.jsonl"),
        (["--model", "./nowhere"], "nowhere"),
        (["--eval-problems", "0"], "--eval-problems"),
        (["--max-prompt-tokens", "3"], "--max-prompt-tokens 3"),
        (["--minibatches", "5"], "the nearest that does is 4"),
        (["--task", "math", "--difficulty-key", "K"], "no column `K`"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, message, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["grpo_rlvr.py", "--tiny", *flags])
    monkeypatch.setattr(os, "_exit", sys.exit)
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
    assert "training and 98 held-out problems" in out and "def solve(" in out and "GiB" in out
    assert not list(tmp_path.iterdir())


def test_tiny_run_is_saved_on_sigterm(tmp_path):
    """The embedded model and problems and the sandbox: some updates, then the signal of a preemption."""
    folder = tmp_path / "run"
    sizes = ["--prompts-per-update", "4", "--group-size", "4", "--eval-problems", "8", "--updates", "500"]
    command = [sys.executable, str(REPO / "grpo_rlvr.py"), "--tiny", *sizes, "--output-dir", str(folder)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("2/500"):
            process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=100) == 130, process.stderr.read()
    assert lines[0] == f"run folder {folder}\n" and "held-out pass@1" in lines[1] and "tokens/s" in lines[2]
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in history] == list(range(len(history)))
    assert history[0]["eval/pass@1"] >= 0 and history[1]["policy/rollout_gap"] < 1e-4
    assert (folder / "checkpoints" / f"state_{len(history) - 1:06d}" / "state.json").exists()
    for name in ("args.json", "env.txt", "samples.md", "curves.png", "grpo_rlvr.py", "common.py", "modeling.py"):
        assert (folder / name).exists(), name
