"""What a user of a preemptible cluster meets, in all three training scripts: kills, signals, full disks,
other numbers of ranks, bad numbers, bad input.

Every run is a process of its own, forked from one that has imported everything: a fork takes milliseconds,
the imports take seconds. `plant` functions run in it first and make it fail at a chosen place.
"""

import gzip
import hashlib
import importlib
import json
import math
import multiprocessing
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import common
import conftest  # noqa: F401  (in the processes, too, a deprecation is an error)
from common import TINY, load_tokenizer

SCRIPTS = ("ra3", "rmt", "grpo_rlvr")
ROOT = Path(common.__file__).parent
TOKENIZER = str(TINY / "code" / "model")
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["test_robust", *SCRIPTS, "torch.utils.tensorboard", "matplotlib.figure"])


# ---------------------------------------------------------------- small runs in processes


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A random model with tiny's tokenizer; some tokens end a completion, and it thinks now and then."""
    folder, tokenizer = tmp_path_factory.mktemp("model"), load_tokenizer(TOKENIZER)
    torch.manual_seed(0)
    size = len(tokenizer)
    config = transformers.LlamaConfig(
        vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True, initializer_range=0.3, eos_token_id=0, pad_token_id=0, bos_token_id=None,
        max_position_embeddings=256,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    hashes = [k for k in range(size) if tokenizer.decode([k]).lstrip(" \t").startswith("#")]
    model.model.embed_tokens.weight.data[hashes] *= 4
    model.generation_config = transformers.GenerationConfig(eos_token_id=list(range(200)), pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sizes(model_dir, tmp_path_factory):
    """script -> fields of its Args; most texts and problems have the word zebra in them."""
    folder = tmp_path_factory.mktemp("data")
    animals = [("zebra" if k % 5 else "horse") for k in range(120)]
    programs = [f"{a} = {k}\nif {a} > 3:\n    {a} = {a} + {k}\n" for k, a in enumerate(animals)]
    texts = [f"{a} number {k} eats {k + 1} apples" for k, a in enumerate(animals)]
    problems = [
        {
            "prompt": [{"content": f"A {a}: {k} + 1?" + " Think." * (k % 4), "role": "user"}],
            "reward_model": {"ground_truth": f'["{k + 1}"]', "style": "rule"},
            "extra_info": {"index": f"{a}-{k}", "model_difficulty": {"M": k % 13}},
        }
        for k, a in enumerate(animals[:16])
    ]
    for name, rows in (("ra3", [{"text": p} for p in programs]), ("rmt", [{"text": t} for t in texts])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "grpo_rlvr.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    shared = {"model": str(model_dir), "save_every": 1, "micro_batch_tokens": 200, "rollout_rows": 6}
    return {
        "ra3": shared | {
            "dataset": (str(folder / "ra3.jsonl"),), "em_iterations": 2, "rl_updates": 1, "ntp_updates": 2,
            "rl_batch_size": 8, "ntp_batch_size": 12, "group_size": 2, "max_latent_tokens": 4,
            "max_snippet_tokens": 48, "eval_snippets": 4, "rl_learning_rate": 1e-3,
            "ntp_learning_rate": 1e-3, "penalty_warmup": 0, "rollout_rows": 24,  # two M-updates at once
        },
        "rmt": shared | {
            "dataset": str(folder / "rmt.jsonl"), "text_column": ("text",), "chat_template": False,
            "train_texts": 12, "eval_texts": 4, "max_text_tokens": 24, "prompts_per_update": 8,
            "group_size": 2, "max_new_tokens": 8, "initial_budget": 6, "updates": 5, "eval_positions": 3,
            "eval_every": 0, "learning_rate": 1e-3, "beta": 0.01, "gradient_checkpointing": False,
        },
        "grpo_rlvr": shared | {
            "task": "math", "dataset": str(folder / "grpo_rlvr.jsonl"), "eval_problems": 4, "updates": 4,
            "prompts_per_update": 8, "group_size": 2, "max_new_tokens": 8, "temperature": 0.8,
            "minibatches": 2, "dynamic_sampling": 2, "eval_every": 0, "learning_rate": 1e-3, "beta": 0.01,
        },
    }  # fmt: skip


def toy_reward(problem, text):
    odd = len(text) % 2
    return float(odd), bool(odd), "" if odd else "even: length"


def child(script, fields, environment, log, plant, arguments):
    os.environ.update(environment)
    tempfile.tempdir = None
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        setattr(sys, f"std{name}", os.fdopen(number, "w"))
    warnings.filterwarnings("error", "(?is).*deprecated.*removed", FutureWarning)
    torch.set_num_threads(1)
    module = importlib.import_module(script)
    if plant is not watch:
        common.Run.curves = lambda self, panels: None  # drawing is slow
    if script == "grpo_rlvr" and plant is not real_rewards:
        module.reward = toy_reward
    if plant is not None:
        plant(module, *arguments)
    common.launch(module.main, module.Args(**fields))


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run(script, fields, folder, plant=None, *arguments, ranks=1, limit_s=120, **changes):
    """(exit codes of the ranks, what each wrote to stderr), all within the time limit.

    changes: of fields of Args; in capitals, of the environment.
    """
    alone = {key: changes.pop(key) for key in list(changes) if key.isupper()}
    fields = fields[script] | {"output_dir": str(folder)} | changes
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    processes, logs = [], [f"{folder}.{rank}" for rank in range(ranks)]
    for rank, log in enumerate(logs):
        place = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else alone
        processes.append(FORK.Process(target=child, args=(script, fields, place, log, plant, arguments)))
        processes[-1].start()
    until = time.time() + limit_s
    for process in processes:
        process.join(max(0.1, until - time.time()))
        if process.exitcode is None:
            process.kill()
            process.join()
    return [process.exitcode for process in processes], [Path(f"{log}.err").read_text() for log in logs]


def metrics_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


def weights_of(folder):
    """Weights of all exported models: name -> tensor."""
    files = sorted(folder.glob("checkpoints/[!s.]*/model.safetensors"))
    return {f"{file.parent.name} {key}": w for file in files for key, w in load_file(file).items()}


def states_of(folder):
    return sorted(int(path.parent.name[6:]) for path in folder.glob("checkpoints/state_*/state.json"))


def state_of(folder):
    """What the last checkpoint says, without times."""
    text = (folder / f"checkpoints/state_{states_of(folder)[-1]:06d}/state.json").read_text()
    return json.loads(re.sub(r'"(time/\w+|seconds)": [\d.e-]+', r'"\1": 0', text))


def one_line(error, words):
    lines = [line for line in error.splitlines() if line.strip() and "it/s]" not in line]  # a progress bar's
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0], error


def close(folder, right, start):
    """The same run to rounding, which Adam amplifies: the weights differ by little of what training moved."""
    assert [row["update"] for row in metrics_of(folder)] == [row["update"] for row in metrics_of(right)]
    found, right = weights_of(folder), weights_of(right)
    assert found.keys() == right.keys() and len(right) > 10
    moved = sum((right[key] - start[key.split()[1]]).abs().sum() for key in right)
    assert sum((found[key] - right[key]).abs().sum() for key in right) < 2e-2 * moved


def watch(module, log):
    """Note what the process holds at every line of metrics."""
    original = common.Run.log

    def noting(*args):
        original(*args)
        with open(log, "a") as handle:
            handle.write(f"{len(os.listdir('/proc/self/fd'))} {threading.active_count()}\n")

    common.Run.log = noting


@pytest.fixture(scope="module")
def whole(sizes, tmp_path_factory):
    """script -> folder of a run that nothing disturbed."""
    folders = {}

    def of(script):
        if script not in folders:
            folder = tmp_path_factory.mktemp(script) / "whole"
            os.makedirs(f"{folder}.tmp")
            codes, errors = run(script, sizes, folder, watch, f"{folder}.held", TMPDIR=f"{folder}.tmp")
            assert codes == [0], errors
            folders[script] = folder
        return folders[script]

    return of


# ---------------------------------------------------------------- nothing is lost


def stop(module, place, number, how):
    """Send this process `how` at the number-th time that it comes to `place`."""
    left = iter(range(number - 1, -1, -1))

    def at(here):
        if here == place and next(left, 1) == 0:
            os.kill(os.getpid(), how)

    step, check = module.optimizer_step, common.Interrupt.check
    write_whole, replace = common.write_whole, os.replace

    def stopping_check(interrupt):
        at("check")
        check(interrupt)

    def stopping_step(*args):
        at("step")
        return step(*args)

    def stopping_write(path, text):
        at({"state.json": "checkpoint", "metrics.jsonl": "restore"}.get(path.name))
        write_whole(path, text)

    def stopping_replace(source, target):
        name = Path(target).name
        if not name.startswith("state"):
            at("export" if Path(target).parent.name == "checkpoints" else None)
        replace(source, target)
        at("renamed" if name.startswith("state_") else None)

    module.optimizer_step, common.write_whole, os.replace = stopping_step, stopping_write, stopping_replace
    common.Interrupt.check = stopping_check


PLACES = [  # where, the how many-th time, signal, updates that a signal still finishes
    ("step", 1, signal.SIGKILL, 0),  # before any checkpoint
    ("check", 5, signal.SIGTERM, 0),  # between the micro-batches of the first update: there is none to save
    ("step", 2, signal.SIGKILL, 0),  # between two checkpoints
    ("checkpoint", 1, signal.SIGKILL, 0),  # all its tensors are written, but not its name
    ("renamed", 1, signal.SIGKILL, 0),  # right after
    ("restore", 1, signal.SIGKILL, 0),  # while metrics.jsonl is cut back
    ("step", 1, signal.SIGINT, 1),  # Ctrl-C after the last check of an update, which is finished
    ("check", 2, signal.SIGTERM, 0),  # between two steps of an update
    ("export", 1, signal.SIGKILL, 0),
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_that_is_killed_everywhere_is_the_same_run(script, sizes, whole, tmp_path):
    folder = tmp_path / "run"
    # the places in common.py once
    places = [p for p in PLACES if script == "ra3" or p[0] not in ("checkpoint", "restore")]
    for k, (place, number, how, finishes) in enumerate(places):
        before = states_of(folder) or [0]
        codes, errors = run(script, sizes, folder, stop, place, number, how, resume="auto" if k else "")
        assert codes == [-how if how == signal.SIGKILL else 130], (place, errors)
        if how != signal.SIGKILL:
            assert states_of(folder)[-1] == before[-1] + finishes, place
            assert f"saved update {states_of(folder)[-1]}; " in Path(f"{folder}.0.out").read_text()
    assert list(folder.glob("checkpoints/.*.partial"))  # it was killed while it wrote
    codes, errors = run(script, sizes, folder, resume="auto")
    assert codes == [0], errors
    assert metrics_of(folder) == metrics_of(whole(script))
    found, right = weights_of(folder), weights_of(whole(script))
    assert found.keys() == right.keys() and len(right) > 10
    assert all(torch.equal(found[key], right[key]) for key in found)
    assert state_of(folder) == state_of(whole(script))
    left = [p for p in folder.rglob("*") if "partial" in p.name]
    assert not left and len(states_of(folder)) == 2
    codes, errors = run(script, sizes, folder, resume="auto")  # a run that is complete
    assert codes == [0] and metrics_of(folder) == metrics_of(whole(script)), errors


@pytest.mark.parametrize("script, shorter", [("ra3", {"em_iterations": 1}), ("grpo_rlvr", {"updates": 2})])
def test_a_run_can_be_extended(script, shorter, sizes, whole, tmp_path):
    for changes in (shorter, {"resume": "auto"}):
        codes, errors = run(script, sizes, tmp_path / "run", **changes)
        assert codes == [0], errors
    found, right = metrics_of(tmp_path / "run"), metrics_of(whole(script))
    last = 3 if script == "ra3" else 2  # which was evaluated as the end
    assert [{key: row[key] for key in other} for row, other in zip(found, right)] == right
    assert len(found) == len(right) and "eval/" in " ".join(found[last])


def test_positions_beyond_the_first_epoch_are_part_of_that(whole):
    """Else the tests above would not show that the place in the data is kept."""
    for script in ("rmt", "grpo_rlvr"):
        assert metrics_of(whole(script))[-1]["data/epoch"] > 2
    state = json.loads((whole("ra3") / "checkpoints" / "state_000006" / "state.json").read_text())
    assert state["cursors"]["E"][0] >= 16 and state["cursors"]["M"][0] >= 48


def note_recompute(module, log):
    load_model = module.load_model

    def noting(*args, **options):
        model = load_model(*args, **options)
        with open(log, "a") as handle:
            handle.write(f"{model.recompute}\n")
        return model

    module.load_model = noting


@pytest.mark.parametrize("script", SCRIPTS)
def test_gradient_checkpointing_changes_no_weight(script, sizes, whole, model_dir, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "recompute"
    codes, errors = run(script, sizes, folder, note_recompute, str(log), gradient_checkpointing=True)
    assert codes == [0] and log.read_text().startswith("True"), errors
    close(folder, whole(script), load_file(model_dir / "model.safetensors"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_piles_up_and_all_files_are_there(script, whole):
    assert os.listdir(f"{whole(script)}.tmp") == []
    held = Path(f"{whole(script)}.held").read_text().splitlines()
    assert len(set(held[2:])) == 1, held  # open files and threads, once the first curves are drawn
    files = {file.name for file in whole(script).iterdir()}
    assert files >= {"args.json", "env.txt", "common.py", f"{script}.py", "metrics.jsonl", "tensorboard"}
    assert files >= {"curves.png", "samples.html", "checkpoints"}


def real_rewards(module, log):
    """math-verify in its own process, which is noted, in place of toy_reward; killed in the first checkpoint
    (not in an update: a random model is never right, so no group has spread and there is none)."""
    popen = subprocess.Popen

    def noting(*args, **kw):
        process = popen(*args, **kw)
        Path(log).write_text(str(process.pid))
        return process

    module.subprocess.Popen = noting
    stop(module, "checkpoint", 1, signal.SIGKILL)


def test_no_process_is_left_behind(sizes, tmp_path):
    codes, errors = run("grpo_rlvr", sizes, tmp_path / "run", real_rewards, str(tmp_path / "pid"))
    assert codes == [-9], errors
    command, until = Path(f"/proc/{(tmp_path / 'pid').read_text()}/cmdline"), time.time() + 60
    while command.exists() and b"verify" in command.read_bytes():
        assert time.time() < until
        time.sleep(0.1)


def fill(module, place):
    """From the second checkpoint, model or line of metrics on there is no room for it."""
    original, calls = getattr(common.Run, place), []

    def limited(self, *args, **kw):
        calls.append(1)
        if len(calls) == 2 and place == "log":
            metrics = self.path / "metrics.jsonl"
            metrics.unlink()
            metrics.symlink_to("/dev/full")
        elif len(calls) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        return original(self, *args, **kw)

    setattr(common.Run, place, limited)


@pytest.mark.parametrize("script, place", [("ra3", "export"), ("rmt", "save"), ("grpo_rlvr", "log")])
def test_a_full_disk_ends_the_run_with_one_line(script, place, sizes, whole, tmp_path):
    folder = tmp_path / "run"
    codes, errors = run(script, sizes, folder, fill, place)
    assert codes == [2]
    one_line(errors[0], "No space left" if place == "log" else "Earlier checkpoints are intact")
    assert not list(folder.glob("checkpoints/.*"))
    if place != "log":
        assert states_of(folder)
        codes, errors = run(script, sizes, folder, resume="auto")
        assert codes == [0] and metrics_of(folder) == metrics_of(whole(script)), errors


def test_a_damaged_checkpoint_is_refused(sizes, whole, tmp_path):
    folder = tmp_path / "run"
    assert run("rmt", sizes, folder, stop, "step", 2, signal.SIGTERM)[0] == [130]
    assert states_of(folder) == [1, 2]
    torn = folder / "checkpoints" / "state_000002" / "__0_0.distcp"
    content = torn.read_bytes()
    for damaged in (content[: len(content) // 2], b"x" * len(content)):
        torn.write_bytes(damaged)
        codes, errors = run("rmt", sizes, folder, resume="auto")
        assert codes == [2]
        one_line(errors[0], "state_000002")
        assert "delete the folder to go on from the one before" in errors[0]
    common.discard(torn.parent)  # as the message says
    codes, errors = run("rmt", sizes, folder, resume="auto")
    assert codes == [0] and metrics_of(folder) == metrics_of(whole("rmt")), errors


# ---------------------------------------------------------------- ranks


def spy(module, log):
    """Note the noise that this rank samples with, and a hash of the whole weights that it sees."""
    export, mine, name = common.Run.export, f"{log}.{os.environ['RANK']}", "rollout_drafted"
    name = name if hasattr(module, name) else "rollout"
    rollout = getattr(module, name)

    def noting(model, rows, noise, *rest):
        with open(f"{mine}.noise", "a") as handle:
            handle.writelines(row.numpy().tobytes().hex()[:32] + "\n" for row in noise)
        return rollout(model, rows, noise, *rest)

    def hashing(self, model, name):
        digest = hashlib.sha256()
        for value in model.state_dict().values():
            digest.update((value.full_tensor() if hasattr(value, "full_tensor") else value).numpy().tobytes())
        with open(f"{mine}.weights", "a") as handle:
            handle.write(f"{name} {digest.hexdigest()}\n")
        return export(self, model, name)

    common.Run.export = hashing
    setattr(module, name, noting)


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_ranks(script, sizes, whole, model_dir, tmp_path):
    start, two = load_file(model_dir / "model.safetensors"), tmp_path / "two"
    codes, errors = run(script, sizes, two, spy, str(two), ranks=2)
    assert codes == [0, 0], errors
    close(two, whole(script), start)
    hashes = [Path(f"{two}.{rank}.weights").read_text() for rank in range(2)]
    assert hashes[0] == hashes[1] and len(hashes[0].splitlines()) >= 4  # all ranks have the same parameters
    noise = [set(Path(f"{two}.{rank}.noise").read_text().splitlines()) for rank in range(2)]
    assert all(noise) and not noise[0] & noise[1]  # and different samples
    # a state of one rank goes on with two, and a state of two with one
    for first, second in {"ra3": [(1, 2), (2, 1)], "rmt": [(2, 1)], "grpo_rlvr": [(1, 2)]}[script]:
        folder = tmp_path / f"from {first}"
        codes, errors = run(script, sizes, folder, stop, "check", 12, signal.SIGTERM, ranks=first)
        assert codes == [130] * first and states_of(folder), errors
        codes, errors = run(script, sizes, folder, ranks=second, resume="auto")
        assert codes == [0] * second, errors
        close(folder, whole(script), start)


def die(module, how):
    """The second rank fails in its first update."""
    step = module.optimizer_step

    def failing(*args):
        if os.environ["RANK"] == "1":
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("this rank has failed")
        return step(*args)

    module.optimizer_step = failing


@pytest.mark.parametrize("script, how", [("ra3", "failed"), ("rmt", "killed")])
def test_a_rank_that_dies_ends_the_others(script, how, sizes, tmp_path):
    """Even where no torchrun ends them: a collective with a rank that is gone fails."""
    codes, errors = run(script, sizes, tmp_path / "run", die, how, ranks=2, limit_s=60)
    assert codes == [1, 1 if how == "failed" else -signal.SIGKILL], errors
    assert how == "killed" or "this rank has failed" in errors[1]


def test_a_port_in_use_is_one_line(sizes, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        first = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
        first |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        codes, errors = run("ra3", sizes, tmp_path / "run", **first)
    assert codes == [2]
    one_line(errors[0], f"127.0.0.1:{port}")


# ---------------------------------------------------------------- numbers that are not finite


def poison(module, kind):
    """The loss, or only the gradient, of every row with a zebra in it is NaN."""
    original, tokenizer = module.token_logprobs, load_tokenizer(TOKENIZER)

    def poisoned(model, rows, where, **options):
        logprobs, entropies = original(model, rows, where, **options)
        if logprobs.requires_grad:
            bad = ["zebra" in tokenizer.decode(row) for row in rows]
            factor = torch.tensor([math.nan if b else 1.0 for b, columns in zip(bad, where) for _ in columns])
            if kind == "loss":
                logprobs = logprobs * factor
            else:
                logprobs.register_hook(lambda gradient: gradient * factor)
        return logprobs, entropies

    module.token_logprobs = poisoned


@pytest.mark.parametrize(
    "script, kind, ranks", [("ra3", "loss", 2), ("rmt", "gradient", 1), ("grpo_rlvr", "loss", 1)]
)
def test_what_is_not_finite_is_skipped_and_ends_the_run(script, kind, ranks, sizes, model_dir, tmp_path):
    more = {} if script == "ra3" else {"updates": 9}
    more |= {"minibatches": 1} if script == "grpo_rlvr" else {}
    folder = tmp_path / "run"
    codes, errors = run(script, sizes, folder, poison, kind, ranks=ranks, **more)
    assert codes == [2] * ranks
    one_line(errors[0], "3 updates in a row without a finite loss and gradient")
    rows = metrics_of(folder)[1:]
    last = rows[-1]["update"]  # a batch without a zebra may have come first
    assert [row["update"] for row in rows] == list(range(1, last + 1))
    assert states_of(folder) == [last - 2, last - 1]
    assert [row["optim/skipped"] for row in rows[-3:]] == [1, 2, 3]
    assert "NaN" not in (folder / "metrics.jsonl").read_text()
    if last == 3:  # nothing has changed
        start = load_file(model_dir / "model.safetensors")
        assert all(torch.equal(w, start[key.split()[1]]) for key, w in weights_of(folder).items())


# ---------------------------------------------------------------- bad input


class Left(BaseException):
    pass


def broken(tmp_path, model_dir):
    """Folders and files with something wrong."""

    def copy(name, leave_out=(), **changes):
        folder = tmp_path / name
        folder.mkdir()
        for file in Path(model_dir).iterdir():
            if file.name not in leave_out:
                (folder / file.name).write_bytes(file.read_bytes())
        for file, change in changes.items():
            path = folder / f"{file}.json"
            path.write_text(json.dumps(change(json.loads(path.read_text()))))
        return folder

    copy("no_tokenizer", ("tokenizer.json", "tokenizer_config.json"))
    copy("no_eos", tokenizer_config=lambda c: {k: v for k, v in c.items() if k != "eos_token"})
    copy("no_weights", ("model.safetensors",))
    weights = copy("torn") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    copy("short", config=lambda c: c | {"max_position_embeddings": 16})
    copy("eos", generation_config=lambda c: c | {"eos_token_id": [10**6]})
    (tmp_path / "other.jsonl").write_text('{"body": "x", "lang": "python"}\n')
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "list.jsonl").write_text("[1, 2]\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\nnot json\n')
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no parquet")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9\xff"}\n')
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a = 1"}\n' * 99)[:-20])
    return tmp_path


ALL = {
    "no such model": ({"model": "./nowhere"}, "at ./nowhere"),
    "no tokenizer": ({"model": "@no_tokenizer"}, "no tokenizer at"),
    "a run, not its model": ({"model": "@run"}, "@run (the models of a run are in its folder `checkpoints`)"),
    "no eos": ({"model": "@no_eos"}, "has no eos token"),
    "an eos beyond the model": ({"model": "@eos"}, "has more tokens than the model"),
    "no weights": ({"model": "@no_weights"}, "cannot load the model"),
    "torn weights": ({"model": "@torn"}, "cannot load the model"),
    "no data": ({"dataset": "@none.jsonl"}, "no such data file or folder"),
    "no folder": ({"dataset": "my_code/"}, "no such data file or folder"),
    "missing column": ({"dataset": "@other.jsonl"}, "it has: body, lang"),
    "no objects": ({"dataset": "@list.jsonl"}, "it has: list"),
    "empty data": ({"dataset": "@empty.jsonl"}, "empty.jsonl"),
    "torn gzip": ({"dataset": "@torn.jsonl.gz"}, "cannot read"),
    "not json": ({"dataset": "@bad.jsonl"}, "bad.jsonl, line 2: not a JSON object"),
    "not parquet": ({"dataset": "@bad.parquet"}, "cannot read"),
    "not utf-8": ({"dataset": "@latin.jsonl"}, "cannot read"),
    "negative size": ({"group_size": -1}, "--group-size must be"),
    "no micro-batch": ({"micro_batch_tokens": 0}, "--micro-batch-tokens must be positive, got 0"),
    "negative rate": ({"weight_decay": -0.1}, "--weight-decay must not be negative, got -0.1"),
    "negative seed": ({"seed": -1}, "--seed must not be negative"),
    "no such folder": ({"output_dir": "@other.jsonl/run"}, "Not a directory"),
    "nothing to resume": ({"resume": "@none"}, "holds no complete checkpoint"),
    "no wandb": ({"track": True}, "pip install wandb"),
}
SOME = {
    "ra3": {"too long": ({"model": "@short", "max_latent_tokens": 16}, "can be used")},
    "rmt": {
        "too long": ({"model": "@short"}, "@short takes 16"),
        "too short": ({"max_text_tokens": 1}, "give more data, or longer texts"),
    },
    "grpo_rlvr": {
        "too long": ({"max_prompt_tokens": 3}, "longer than --max-prompt-tokens 3"),
        "context": ({"model": "@short"}, "@short takes 16"),
        "negative": ({"prompts_per_update": -8}, "--prompts-per-update must be positive, got -8"),
        "missing column": ({"dataset": "@other.jsonl"}, "columns: body, lang"),
        "no objects": ({"dataset": "@list.jsonl"}, "1 of 1 rows cannot be used"),
    },
}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_bad_input_is_one_line_and_exit_code_2(script, sizes, model_dir, tmp_path, capfd, monkeypatch):
    files, module = broken(tmp_path, model_dir), importlib.import_module(script)

    def leave(code):
        raise Left(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.chdir(tmp_path)
    transformers.utils.logging.set_verbosity_error()
    for name, (changes, words) in (ALL | SOME[script]).items():
        fields = sizes[script] | {"output_dir": str(tmp_path / f"run {name}")} | changes
        for key in ("dataset", "model", "output_dir", "resume"):
            wanted = fields.get(key, "")
            if isinstance(wanted, str):
                fields[key] = wanted.replace("@", f"{files}/")
        if script == "ra3" and isinstance(fields["dataset"], str):
            fields["dataset"] = (fields["dataset"],)
        with pytest.raises(Left) as left:
            common.launch(module.main, module.Args(**fields))
        error = capfd.readouterr().err
        assert left.value.args == (2,), (name, error)
        one_line(error, words.replace("@", f"{files}/"))
    transformers.utils.logging.set_verbosity_warning()


# ---------------------------------------------------------------- torchrun

DRIVER = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
import test_robust
log = {folder!r} + "." + os.environ["RANK"]
test_robust.child("rmt", {fields!r}, {{}}, log, getattr(test_robust, {plant!r}), {arguments!r})
"""


def tell(module, how):
    """In its second update the first rank sends torchrun the signal of a preemption."""
    step, calls = module.optimizer_step, []

    def telling(*args):
        calls.append(1)
        if len(calls) == 2 and os.environ["RANK"] == "0":
            os.kill(os.getppid(), how)
        return step(*args)

    module.optimizer_step = telling


@pytest.mark.parametrize("plant, arguments", [("tell", (int(signal.SIGTERM),)), ("die", ("failed",))])
def test_torchrun(plant, arguments, sizes, tmp_path):
    """A signal reaches all ranks, which save and leave; a rank that fails ends the job, with its error."""
    folder, driver = tmp_path / "run", tmp_path / "driver.py"
    fields = sizes["rmt"] | {"output_dir": str(folder), "updates": 10_000, "save_every": 0}
    places = {"root": str(ROOT), "tests": str(ROOT / "tests"), "folder": str(folder)}
    driver.write_text(DRIVER.format(fields=fields, plant=plant, arguments=arguments, **places))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", driver]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=60)
    errors = [Path(f"{folder}.{rank}.err").read_text() for rank in range(2)]
    assert done.returncode
    if plant == "die":
        assert "RuntimeError: this rank has failed" in errors[1] and not states_of(folder)
    else:
        assert "stopping, then saving" in errors[0] and not errors[1]
        assert states_of(folder) == [metrics_of(folder)[-1]["update"]] and states_of(folder)[0] >= 2
