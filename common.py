"""Shared helpers of ra3.py, rmt.py, grpo_rlvr.py and eval_code.py; those of the model are in modeling.py.
What changes a gradient is in the scripts. In the order of use:

    1 errors and signals      UserError, launch, Interrupt
    2 processes               setup, Ranks, all_sum
    3 data                    read_rows, column, draw_problems
    4 run folder              Run: args, metrics, curves, checkpoints, resume
    5 sandbox                 run_tests (from sandbox.py)

Shapes: B rows, T tokens, N selected positions.
"""

import dataclasses
import errno
import glob
import gzip
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
import zlib
from collections import defaultdict
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

from sandbox import run_tests  # noqa: F401  (section 5; the scripts import it from here)

TINY = Path(__file__).parent / "tiny"  # the embedded default: model, tokenizer, small corpora


# ---------------------------------------------------------------- 1 errors and signals


class UserError(Exception):
    """Something the user can put right. The message is one line and says what to change."""


DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)  # no fault of the code


def launch(main: Callable, args) -> None:
    """Run `main(args)` and leave with exit code 0; with 2 after one line on stderr about what the user can
    put right (a UserError, a full or read-only disk); 130 after an interrupt; else 1 after a traceback.

    It leaves by os._exit. A rank that fails must not wait for the others, which may be inside a collective:
    torchrun then ends the job. And the end of the interpreter can abort a rank that is done, when a thread of
    gloo still holds a tensor that Python knows.
    """
    code, message = 0, ""
    try:
        main(args)
        if dist.is_initialized():
            all_sum(0.0, Ranks(dist.get_rank(), dist.get_world_size(), None))  # every rank is done
            dist.destroy_process_group()
    except UserError as error:
        code, message = 2, f"error: {error}\n"
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        code, message = 1, traceback.format_exc()
        if isinstance(error, OSError) and error.errno in DISK:
            code, message = 2, f"error: {disk_error(error)}\n"
    if message and int(os.environ.get("RANK", 0)):
        time.sleep(2)  # mostly every rank meets the same error: rank 0 says it, and torchrun ends the others
    sys.stdout.flush()
    print(message, end="", file=sys.stderr, flush=True)
    os._exit(code)


def disk_error(error: OSError) -> str:
    hint = " (is the disk full or the folder read-only?)" * (error.errno in DISK)
    return f"{error.strerror or error}: {error.filename or ''}{hint}"


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_sizes(args, positive: str, not_negative: str) -> None:
    """UserError for a field out of its range. Names are separated by blanks."""
    for names, least, words in ((positive, 1e-300, "be positive"), (not_negative, 0, "not be negative")):
        for name in names.split():
            if not getattr(args, name) >= least:
                raise UserError(f"--{name.replace('_', '-')} must {words}, got {getattr(args, name)}")


class Interrupt:
    """SIGTERM (preemption) and Ctrl-C ask for a checkpoint; the loop looks at `requested` between updates."""

    def __init__(self) -> None:
        self.signal = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number, frame) -> None:
        if self.signal and number == signal.SIGINT:  # the second Ctrl-C does not wait
            raise KeyboardInterrupt
        self.signal = number

    def requested(self, ranks: "Ranks") -> bool:
        """True on all ranks as soon as one of them got a signal (a collective: call it on all)."""
        return bool(all_sum(float(self.signal != 0), ranks))


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
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        try:
            dist.init_process_group(backend, timeout=timedelta(hours=12), **alone)
        except (RuntimeError, ValueError) as error:  # the port is in use, a variable of torchrun's is missing
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise UserError(f"cannot join the process group at {where}: {first_line(error)}") from None
    torch.manual_seed(seed)  # the models have no dropout; all sampling noise comes from `uniforms`
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


def all_max(value: float, ranks: Ranks) -> float:
    """Largest of a number over all ranks."""
    if ranks.world_size == 1:
        return value
    largest = torch.tensor(float(value), dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()


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


def not_finite(names: Sequence[str], alone: Callable, ranks: Ranks) -> str:
    """Names of the rows whose own loss or gradient is NaN or infinite. Slow, for an update that failed.

    names: of this rank's rows. alone(i): (this rank's loss, global gradient norm) of row i; behind the last
    row it only joins the collectives.
    """
    found = []
    for i in range(int(all_max(len(names), ranks))):
        loss, norm = alone(i)
        if i < len(names) and not (math.isfinite(loss) and math.isfinite(norm)):
            found.append((math.isfinite(loss), names[i]))
    found = sorted(all_gather_list(found, ranks), key=lambda item: item[0])
    # the norm is every rank's: if a loss is not finite, rows beside it are not to blame
    names = [name for finite, name in found if finite == found[0][0]]
    return ", ".join(dict.fromkeys(names))[:500] or "no row by itself"


# ---------------------------------------------------------------- 3 data


def read_rows(source: str, split: str = "train") -> Iterator[dict]:
    """Stream the rows of a data set, in order.

    source: a .jsonl, .jsonl.gz, .json (a list), .parquet or .txt file; a folder (of .py files, unless it has
    as many tables); `stdlib` (this Python's standard library); or a hub id, with a config or a data-file
    pattern after a colon (`org/name:config`, `org/name:folder/*.arrow`). Raises UserError for what does not
    exist or cannot be read.
    """
    path = Path(source)
    if source == "stdlib":
        yield from _python_files(Path(sysconfig.get_paths()["stdlib"]), ("test", "tests", "idlelib"))
    elif path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.name.endswith((".jsonl", ".jsonl.gz", ".parquet")))
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
    elif source.startswith((".", "/")) or (
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
            yield {"text": file.read_text(encoding="utf-8", errors="replace"), "path": str(file)}
        else:
            opener = gzip.open if file.suffix == ".gz" else open
            with opener(file, "rt", encoding="utf-8") as handle:
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
    is_pattern = any(mark in part for mark in "*./")
    try:
        files, config = (part, None) if is_pattern else (None, part or None)
        yield from datasets.load_dataset(name, name=config, data_files=files, split=split, streaming=True)
    except Exception as error:  # not found, no such config or split, no network: many libraries' kinds
        raise UserError(f"cannot load the data set {source} (split {split}): {first_line(error)}") from None


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


# ---------------------------------------------------------------- 4 run folder

NOT_DEFINING = {"resume", "output_dir", "dry_run", "save_every", "workers"}
NOT_DEFINING |= {"micro_batch_tokens", "rollout_rows", "gradient_checkpointing"}
MAX_SKIPPED = 3  # a run ends after so many updates in a row without a finite loss and gradient


def write_whole(path: Path, text: str) -> None:
    """Write a small file aside, then rename it: a reader, or a run killed here, never sees half of it."""
    aside = path.with_name(f".{path.name}.partial")
    with open(aside, "w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(aside, path)


def discard(folder: Path) -> None:
    """Remove a checkpoint. First what makes it complete, so that it is never taken for one while it goes."""
    (folder / "state.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


class Run:
    """One folder per run: args.json, env.txt, sources, metrics.jsonl, curves.png, TensorBoard, checkpoints.

    `state` is what the last good checkpoint holds in state.json (None for a fresh run). UserError if the
    folder cannot be written, if there is nothing to resume, or if the arguments that define the run differ.
    """

    def __init__(self, args, script: str, ranks: Ranks) -> None:
        self.args, self.script, self.ranks = args, Path(script), ranks
        model = Path(args.model).resolve().name if Path(args.model).exists() else args.model.replace("/", "_")
        stem = f"{self.script.stem}__{model}__s{args.seed}__"
        path = None
        if ranks.main:
            path = args.output_dir or f"runs/{stem}{time.strftime('%Y%m%d-%H%M%S')}"
            if args.resume == "auto" and not args.output_dir:
                bootstraps = getattr(args, "bootstrap_only", False)  # RA3: it continues a file
                kept = "bootstrapped.jsonl" if bootstraps else "checkpoints/state_*/state.json"
                earlier = sorted(glob.glob(f"runs/{glob.escape(stem)}*/{kept}"))
                path = "/".join(earlier[-1].split("/")[:2]) if earlier else path
            elif args.resume and args.resume != "auto":
                path = args.resume
        self.path = Path(all_gather_list([path], ranks)[0])
        self.state = together(self._open, ranks)
        self.writer = self.first_log = None
        self.skipped = self.skipped_in_a_row = 0  # updates without a finite loss and gradient

    def _open(self) -> dict | None:
        found = (self._complete() or [None])[-1] if self.args.resume else None
        if self.args.resume not in ("", "auto") and found is None:
            raise UserError(f"nothing to resume in {self.path}: it holds no complete checkpoint")
        now = json.loads(json.dumps(dataclasses.asdict(self.args), default=str))
        if self.args.resume and (self.path / "args.json").exists():
            before = json.loads((self.path / "args.json").read_text())
            differ = [k for k in now if k not in NOT_DEFINING and now[k] != before.get(k)]
            if differ:
                changes = ", ".join(f"--{k.replace('_', '-')} {before.get(k)} -> {now[k]}" for k in differ)
                raise UserError(f"cannot resume {self.path}: the arguments differ ({changes})")
        state = json.loads((found / "state.json").read_text()) if found else None
        if not self.ranks.main:
            return state
        written = [self.path / name for name in ("metrics.jsonl", "bootstrapped.jsonl")]
        if found is None and any(file.exists() for file in written):
            if self.args.resume != "auto":
                reason = "already holds a run; choose another --output-dir, or --resume auto"
                raise UserError(f"{self.path} {reason}")
            written[0].unlink(missing_ok=True)  # it was killed before its first checkpoint
        (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        for torn in self.path.glob("checkpoints/.*.partial"):  # an earlier run was killed there
            shutil.rmtree(torn)
        write_whole(self.path / "args.json", json.dumps(now, indent=1))
        write_whole(self.path / "env.txt", environment(self.ranks))
        loaded = {Path(getattr(module, "__file__", None) or ".") for module in list(sys.modules.values())}
        for source in {self.script.resolve(), *loaded.intersection(Path(__file__).parent.glob("*.py"))}:
            shutil.copy(source, self.path / source.name)
        return state

    # -- metrics

    def log(self, metrics: dict, console: str = "", total: int = 0, cause: str = "") -> None:
        """Append one object to metrics.jsonl and to TensorBoard, print a line (rank 0).

        metrics: holds `update`. console: format of the line, of `total` updates, with keys of metrics.
        cause: why the update was skipped; UserError if that is so for MAX_SKIPPED in a row.
        """
        self.skipped += bool(cause)
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * bool(cause)
        if self.ranks.main:
            metrics = {**metrics, "optim/skipped": self.skipped, "perf/peak_memory_gib": peak_memory()}
            self._write(metrics)
            update, now = metrics["update"], time.time()
            if self.first_log is None:
                print(f"run folder {self.path}")
                self.first_log = update, now
            first, begun = self.first_log
            line = console.format_map(defaultdict(lambda: math.nan, metrics)).lstrip(" |")
            if update > first:
                line += f" | {(now - begun) / (update - first) * (total - update) / 60:.1f} min left"
            print(f"{update}/{total} {line}" + f"\nskipped, not finite: {cause}" * bool(cause), flush=True)
        if self.skipped_in_a_row == MAX_SKIPPED:
            words = f"{MAX_SKIPPED} updates in a row without a finite loss and gradient"
            raise UserError(f"{words}: {cause}. The last checkpoint is good; lower the learning rate")

    def _write(self, metrics: dict) -> None:
        metrics = {k: round(v, 6) if isinstance(v, float) else v for k, v in metrics.items()}
        with open(self.path / "metrics.jsonl", "a") as handle:
            handle.write(json.dumps(metrics) + "\n")
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(self.path / "tensorboard", purge_step=metrics["update"])
        for key, value in metrics.items():
            if isinstance(value, (int, float)) and key != "update":
                self.writer.add_scalar(key, value, metrics["update"])
        self.writer.flush()

    def curves(self, keys: Sequence[str]) -> None:
        """Draw curves.png: one panel per key of metrics.jsonl, over updates (rank 0)."""
        if not self.ranks.main or not (self.path / "metrics.jsonl").exists():
            return
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        history = [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]
        keys = [k for k in keys if any(isinstance(row.get(k), (int, float)) for row in history)]
        if not keys:
            return
        columns = min(3, len(keys))
        lines = math.ceil(len(keys) / columns)
        figure, axes = pyplot.subplots(lines, columns, figsize=(4.2 * columns, 2.8 * lines), squeeze=False)
        for axis, key in zip(axes.flat, keys):
            points = [(row["update"], row[key]) for row in history if isinstance(row.get(key), (int, float))]
            axis.plot(*zip(*points), marker="." if len(points) < 40 else None, linewidth=1.2)
            for before, row in zip(history, history[1:]):
                if before.get("phase") != row.get("phase"):  # RA3: from the E-step to the M-step
                    axis.axvline(row["update"] - 0.5, color="0.6", linewidth=0.8, linestyle="--")
            axis.set_title(key, fontsize=9)
            axis.set_xlabel("update", fontsize=8)
            axis.grid(alpha=0.25)
        for axis in axes.flat[len(keys) :]:
            axis.axis("off")
        figure.tight_layout()
        figure.savefig(self.path / "curves.png", dpi=110)
        pyplot.close(figure)

    # -- checkpoints

    def export(self, model, tokenizer, name: str) -> None:
        """Write checkpoints/<name>, which AutoModelForCausalLM.from_pretrained loads. Atomic; all ranks."""
        target = self.path / "checkpoints" / name
        weights = {}
        names = [{n for n, _ in model.named_parameters(remove_duplicate=alike)} for alike in (False, True)]
        tied = names[0] - names[1]  # second names of a tensor; the config may speak of a tie that is none
        for key, value in model.state_dict().items():
            if key in tied:
                continue
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value  # one tensor at a time
            if self.ranks.main:
                weights[key] = whole.detach().to("cpu", copy=True)

        def write(aside: Path) -> None:
            if self.ranks.main:
                model.save_pretrained(aside, state_dict=weights)
                tokenizer.save_pretrained(aside)

        self._publish(target, write)
        if self.ranks.main:
            print(f"saved {target}", flush=True)

    def save(self, state: dict, models: dict, optimizer) -> None:
        """Write the state that --resume continues from; the last two are kept. Atomic; all ranks.

        state: JSON-able, with `update`, which is done (and cursors, phase ...); models: name -> model, all
        saved; optimizer may be None.
        """
        state = {**state, "skipped": [self.skipped, self.skipped_in_a_row]}
        tensors = saved_tensors(models, optimizer)

        def write(aside: Path) -> None:
            try:
                dcp.save(tensors, checkpoint_id=aside)
            except dcp.CheckpointException as error:  # what any of the ranks met; no subclass of Exception
                raise UserError(failures(error)) from None
            if self.ranks.main:
                write_whole(aside / "state.json", json.dumps(state))

        self._publish(self.path / "checkpoints" / f"state_{state['update']:06d}", write)
        if self.ranks.main:
            for old in self._complete()[:-2]:
                discard(old)

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
            clear()  # on a full disk its place is needed
            reason = f"cannot write {target} ({error}); is the disk full? Those before are intact"
            raise UserError(reason) from None

    def _complete(self) -> list[Path]:
        return sorted(p.parent for p in self.path.glob("checkpoints/state_*/state.json"))

    def restore(self, models: dict, optimizer) -> dict:
        """Load the last good checkpoint, cut metrics.jsonl back to it, return its state."""
        folder = self._complete()[-1]
        tensors = saved_tensors(models, optimizer)
        try:
            dcp.load(tensors, checkpoint_id=folder)
        except dcp.CheckpointException as error:
            reason = f"cannot read {folder} ({failures(error)}): delete it to go on from the one before"
            raise UserError(reason) from None
        for name, model in models.items():
            options = distributed_state.StateDictOptions(strict=False)  # without the tied head
            distributed_state.set_model_state_dict(model, tensors[name], options=options)
        if optimizer is not None:
            distributed_state.set_optimizer_state_dict(models["policy"], optimizer, tensors["optimizer"])
        metrics = self.path / "metrics.jsonl"
        if self.ranks.main and metrics.exists():
            lines = [line for line in metrics.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["update"] <= self.state["update"]]
            write_whole(metrics, "".join(line + "\n" for line in kept))
        self.skipped, self.skipped_in_a_row = self.state.pop("skipped", (0, 0))
        return self.state


def peak_memory() -> float:
    """GiB that this rank has needed at most: of its GPU, else of the process."""
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
    """In one line, what the first rank met that failed."""
    return first_line(next(iter(error.failures.values()))[0])


def environment(ranks: Ranks) -> str:
    def git(*command: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *command], capture_output=True, text=True, cwd=here).stdout.strip()

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
