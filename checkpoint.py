"""The run folder of train.py: configuration, logs, checkpoints, resume and the exported model.

    config.json            the options of the run, and fingerprints of its questions and prompt
    metrics.jsonl          one line a step
    trajectories.jsonl     each step's first group of episodes
    checkpoints/           the last two: safetensors shards of every rank, readable by any number of
                           ranks; a checkpoint's name ends in the fingerprint of its files
    model/                 a Hugging Face folder, written after the last step

Only rank 0 reads and writes, but for the shards of checkpoints.
"""

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch import Tensor, nn
from tqdm import tqdm

from records import fingerprint, fsync_and_rename, reraise_corrupt, write_jsonl, write_text

KEEP_CHECKPOINTS = 2
MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's names of its moments
EXPORT_STEP_FILE = "nanosearcher_step.txt"  # in an exported model folder: the step of its run
# Options that --resume may change: a step that both runs do has the same numbers but for rounding.
MAY_CHANGE = {
    "steps",
    "save_every",
    "eval_every",
    "eval_questions",
    "micro_batch_tokens",
    "gradient_checkpointing",
    "cpu_offload",
    "gpu_memory_utilization",
}


@dataclass(frozen=True)
class Progress:
    """How far a run is; data order and sampling derive from the step."""

    step: int = 0  # rollout batches done
    updates: int = 0  # optimiser steps done
    consecutive_skipped: int = 0  # updates skipped since the last one that was done


# --------------------------------------------------------------------------------------------------
# Checkpoints


def create_moments(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Make Adam's state after `updates` steps, with moments of zero, where a parameter has none."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if optimizer.state[parameter]:
                continue
            step = torch.tensor(float(updates), device=parameter.device)
            optimizer.state[parameter] = {"step": step}
            for moment in MOMENTS:
                optimizer.state[parameter][moment] = torch.zeros_like(parameter)


def training_state(policy: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters and Adam's moments by name, as they stand in memory."""
    state = {}
    for name, parameter in policy.named_parameters():
        state[f"model.{name}"] = parameter.detach()
        for moment in MOMENTS:
            state[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    return state


@contextmanager
def remove_partial(partial: Path) -> Iterator[None]:
    """Remove a folder that could not be written, as on a full disk, and say so in one line.

    Raises:
        OSError: also in place of the errors of safetensors and torch.distributed.checkpoint.
    """
    from safetensors import SafetensorError
    from torch.distributed.checkpoint import CheckpointException

    try:
        yield
    except (OSError, SafetensorError, CheckpointException) as error:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        cause = error
        if isinstance(error, CheckpointException):
            cause, _ = next(iter(error.failures.values()))  # of the first rank that failed
        raise OSError(
            f"{partial.with_suffix('')}: cannot be written ({cause}); "
            "the checkpoints before it are whole: --resume goes on from them"
        ) from None


def save_checkpoint(
    folder: Path, policy: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress
) -> None:
    """Write a checkpoint beside its final place, flush it, rename it; keep KEEP_CHECKPOINTS.

    Raises:
        OSError: a rank could not write its shard. The checkpoints before it stay.
    """
    import torch.distributed.checkpoint as dcp

    on_rank0 = dist.get_rank() == 0
    name = f"step_{progress.step:06d}"
    partial = folder / f"{name}.partial"
    if on_rank0:
        for left_by_a_kill in folder.glob("*.partial"):
            shutil.rmtree(left_by_a_kill)
        partial.mkdir(parents=True)
    dist.barrier()
    create_moments(optimizer, progress.updates)  # where no gradient has made them
    with remove_partial(partial):
        writer = dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True)
        dcp.save(training_state(policy, optimizer), storage_writer=writer)
        dist.barrier()
        if on_rank0:
            write_text(partial / "progress.json", json.dumps(dataclasses.asdict(progress)))
            fsync_and_rename(partial, folder / f"{name}-{fingerprint(partial)[:16]}")
    if on_rank0:
        for old in list_checkpoints(folder)[:-KEEP_CHECKPOINTS]:
            shutil.rmtree(old)
    dist.barrier()


def list_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints by step."""
    return sorted(folder.glob("step_??????-" + "?" * 16))


def newest_checkpoint(folder: Path) -> tuple[Path | None, Progress]:
    """The newest checkpoint that is whole; damaged ones that are newer are named.

    Raises:
        ValueError: there are checkpoints and none is whole. To begin anew would lose the run's log.
    """
    for path in reversed(list_checkpoints(folder)):
        if path.name.endswith(fingerprint(path)[:16]):
            with reraise_corrupt(path, "give another --out"):
                return path, Progress(**json.loads((path / "progress.json").read_text()))
        print(f"train.py: {path} is damaged; the one before it is used", file=sys.stderr)
    if list_checkpoints(folder):
        raise ValueError(
            f"{folder}: no checkpoint there is whole; give another --out to begin anew"
        )
    return None, Progress()


def load_checkpoint(
    path: Path, policy: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress
) -> None:
    """Read the shards into the parameters and moments; they may be of another number of ranks."""
    import torch.distributed.checkpoint as dcp

    create_moments(optimizer, progress.updates)
    reader = dcp.HuggingFaceStorageReader(str(path))
    dcp.load(training_state(policy, optimizer), storage_reader=reader)


# --------------------------------------------------------------------------------------------------
# Export


def export(
    lm: nn.Module, named_tensors: Iterable[tuple[str, Tensor]], source: str, out: Path, step: int
) -> None:
    """Write a Hugging Face folder that transformers and vLLM load as it is.

    The folder appears as a whole or not at all; a model that is there stays until then.

    Args:
        lm: the model, for its configuration.
        named_tensors: its whole parameters; all ranks iterate, since all ranks gather.
        source: the folder or hub name of its tokenizer.
        step: the step of the run, which the folder notes.
    """
    from transformers import AutoTokenizer

    on_rank0 = dist.get_rank() == 0
    state = {}
    for name, tensor in named_tensors:
        if on_rank0:
            state[name] = tensor.cpu()
    if on_rank0:
        partial, old = out.with_suffix(".partial"), out.with_suffix(".old")
        with remove_partial(partial):
            lm.save_pretrained(partial, state_dict=state)
            lm.config.dtype = (
                "bfloat16"  # save_pretrained has noted the dtype of the fp32 parameters
            )
            lm.config.save_pretrained(partial)
            AutoTokenizer.from_pretrained(source).save_pretrained(partial)
            write_text(partial / EXPORT_STEP_FILE, str(step))
            shutil.rmtree(old, ignore_errors=True)
            if out.exists():
                out.rename(old)
            fsync_and_rename(partial, out)
        shutil.rmtree(old, ignore_errors=True)
    dist.barrier()


# --------------------------------------------------------------------------------------------------
# The run folder


class RunFolder:
    """The files of one run.

    Args:
        path: the folder.
        config: the options of the run, a dataclass.
        logger: "tensorboard" or "wandb", to log there too.
    """

    def __init__(self, path: Path, config, logger: str | None = None):
        self.path, self.logger, self.board = path, logger, None
        self.on_rank0 = dist.get_rank() == 0
        self.config = dataclasses.asdict(config)
        data = [file for file in (config.questions, config.prompt_file) if Path(file).is_file()]
        self.contents = {file: fingerprint(file) for file in data}

    @contextmanager
    def lock(self, resume: bool) -> Iterator[None]:
        """Keep other processes out of the folder.

        Raises:
            ValueError: another process has locked it; it contains a run with other options; or it
                contains a run and `resume` is false.
        """
        if not self.on_rank0:
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        file_lock = FileLock(self.path / ".lock", timeout=0, fallback_to_soft=False)
        try:
            file_lock.acquire()
        except Timeout:  # for one, ranks that outlived their torchrun
            raise ValueError(f"{self.path}: another process is training in it") from None
        except OSError:
            pass  # a file system without locks
        try:
            self._refuse_another_run(resume)
            yield
        finally:
            file_lock.release()

    def _refuse_another_run(self, resume: bool) -> None:
        if not any((self.path / name).exists() for name in ("metrics.jsonl", "checkpoints")):
            return
        if not resume:
            raise ValueError(
                f"{self.path}: holds a run already; --resume goes on with it, "
                "--out names another folder"
            )
        file = self.path / "config.json"
        with reraise_corrupt(file, "give another --out"):
            before = dict(json.loads(file.read_text()))
        for name, value in self.config.items():
            if name not in MAY_CHANGE and value != before.get(name):
                raise ValueError(f"{file}: this run has --{name} {before.get(name)}, not {value}")
        if before.get("contents") != self.contents:
            changed = " or ".join(self.contents)
            raise ValueError(
                f"{file}: {changed} has changed since this run began; give another --out"
            )

    def find_progress(self, resume: bool) -> tuple[Path | None, Progress, bool]:
        """The checkpoint to go on from, its progress, and whether its model is exported."""
        found: list[Any] = [None]
        if self.on_rank0:
            checkpoint, progress = None, Progress()
            if resume:
                checkpoint, progress = newest_checkpoint(self.path / "checkpoints")
            noted = self.path / "model" / EXPORT_STEP_FILE
            exported = noted.exists() and noted.read_text() == str(progress.step)
            found = [(checkpoint, progress, exported)]
        dist.broadcast_object_list(found)
        return found[0]

    def begin(self, step: int) -> None:
        """Write the configuration, and remove what a run that died has left after `step`.

        These are log lines, and checkpoints that are damaged: the run will write them again.

        Raises:
            ValueError: a log is damaged.
        """
        if not self.on_rank0:
            return
        config = self.config | {"contents": self.contents}
        write_text(self.path / "config.json", json.dumps(config, indent=1))
        for name in ("metrics.jsonl", "trajectories.jsonl"):
            file = self.path / name
            if file.exists():
                with reraise_corrupt(file):
                    # What follows the last line end is empty, or a line that was being written.
                    *lines, _ = file.read_text(encoding="utf-8").split("\n")
                    logged = [json.loads(line) for line in lines]
                    kept = [record for record in logged if record["step"] <= step]
                write_jsonl(file, kept)
        for checkpoint in list_checkpoints(self.path / "checkpoints"):
            if checkpoint.name[: len("step_000000")] > f"step_{step:06d}":
                shutil.rmtree(checkpoint)
        if self.logger == "wandb":
            import wandb

            wandb.init(
                project="nanosearcher",
                name=self.path.name,
                config=self.config,
                dir=self.path,
                sync_tensorboard=True,
            )
        if self.logger:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(self.path)

    def log(self, metrics: dict[str, float], trajectories: list[dict]) -> None:
        """Append a step's metrics and trajectories; they are on the disk before its checkpoint."""
        if not self.on_rank0:
            return
        self._append("metrics.jsonl", [metrics])
        self._append("trajectories.jsonl", trajectories)
        if self.board is not None:
            for name, value in metrics.items():
                self.board.add_scalar(name, value, metrics["step"])

    def _append(self, name: str, records: list[dict]) -> None:
        file = self.path / name
        try:
            with open(file, "a", encoding="utf-8") as stream:
                for record in records:
                    stream.write(json.dumps(record, ensure_ascii=False) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise OSError(f"{file}: cannot be written ({error})") from None

    def print_rank0(self, line: str) -> None:
        """Print above the progress bars."""
        if self.on_rank0:
            tqdm.write(line)
