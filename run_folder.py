"""The run folder of train.py: configuration, logs, checkpoints and the exported models.

    config.json            the options of the run, and fingerprints of what they name
    metrics.jsonl          one line a step
    trajectories.jsonl     each step's first group of episodes
    checkpoints/           the last two, and the one with the best evaluation (checkpoint.py)
    model/                 a Hugging Face folder, written after the last step
    model-best/            the same of the best evaluation, if the run evaluates

Only rank 0 writes here, but for the checkpoints: every rank writes its shards.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch.distributed as dist
from filelock import FileLock, Timeout
from tqdm import tqdm

from checkpoint import EXPORT_STEP_FILE, Progress, list_checkpoints, newest_checkpoint, step_of
from config import Config
from inference import describe_options
from policy import gather
from records import fingerprint, refuse_changed_settings, reraise_corrupt, write_text
from rollout import Episode
from signals import best_evaluation, find_collapse

# Metrics of a step that are printed too.
SHOWN = ("reward", "search_rate", "format_rate", "f1", "grad_norm", "eval_reward")
# Options that --resume may change: they change no step's numbers, except by rounding.
MAY_CHANGE = {
    "steps",
    "save_every",
    "eval_every",
    "stop_on_collapse",
    "collapse_evaluations",
    "micro_batch_tokens",
    "gradient_checkpointing",
    "cpu_offload",
    "gpu_memory_utilization",
}


def holds_run(path: Path, resume: bool) -> bool:
    """Whether the folder holds a run; with `resume` it may.

    Raises:
        ValueError: it does, and `resume` is false.
    """
    is_there = any((path / name).exists() for name in ("metrics.jsonl", "checkpoints"))
    if is_there and not resume:
        raise ValueError(f"{path}: holds a run already; give --resume to go on, or another --out")
    return is_there


def run_settings(config: Config) -> dict[str, Any]:
    """What the numbers of a run depend on: its options, and fingerprints of what they name."""
    settings = describe_options(config)
    settings["questions_fingerprint"] = fingerprint(config.questions)
    if config.eval_questions:
        settings["eval_questions_fingerprint"] = fingerprint(config.eval_questions)
    return settings


def refuse_changed_run(path: Path, settings: dict[str, Any]) -> None:
    """Raises ValueError if the run in the folder has other settings."""
    file, remedy = path / "config.json", "give another --out"
    with reraise_corrupt(file, remedy):
        # A run that was begun before there was an option had its default.
        before = asdict(Config()) | json.loads(file.read_text())
    refuse_changed_settings(file, before, settings, remedy, MAY_CHANGE)


class RunFolder:
    """The files of one run.

    Args:
        path: the folder.
        settings: those of `run_settings`; ranks other than 0 need no fingerprints.
        logger: "tensorboard" or "wandb", to log there too.
    """

    def __init__(self, path: Path, settings: dict[str, Any], logger: str | None = None):
        self.path, self.settings, self.logger, self.board = path, settings, logger, None
        self.on_rank0 = dist.get_rank() == 0
        if self.on_rank0 and logger == "wandb" and find_spec("wandb") is None:
            raise ValueError("--log wandb needs its package: pip install wandb")

    @contextmanager
    def lock(self, resume: bool) -> Iterator[None]:
        """Keep other processes out of the folder.

        Raises:
            ValueError: another process has locked it; it holds a run with other settings; or it
                holds a run and `resume` is false.
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
            if holds_run(self.path, resume):
                refuse_changed_run(self.path, self.settings)
            yield
        finally:
            self._close_loggers()
            file_lock.release()

    def find_progress(self, resume: bool) -> tuple[Path | None, Progress, bool]:
        """The checkpoint to go on from, its progress, and whether all models are exported.

        Raises:
            ValueError: the run is past its last step.
        """
        checkpoint, progress = None, Progress()
        if resume:
            checkpoint, progress = newest_checkpoint(self.path / "checkpoints")
        steps = self.settings["steps"]
        if progress.step > steps:
            raise ValueError(
                f"{self.path}: the run is at step {progress.step}, past --steps {steps}; "
                "give another --out"
            )
        is_over = progress.step == steps or self.find_collapse(progress) != ""
        finished = gather([is_over and self._is_exported(progress)])[0]  # what rank 0 sees
        return checkpoint, progress, finished == [True]

    def find_collapse(self, progress: Progress) -> str:
        """Why --stop_on_collapse ends the run; empty if it does not."""
        drop = self.settings["stop_on_collapse"]
        return find_collapse(progress.evaluations, drop, self.settings["collapse_evaluations"])

    def models(self, progress: Progress) -> dict[str, int]:
        """The step of each model to export, by its folder's name."""
        steps = {"model": progress.step}
        best = best_evaluation(progress.evaluations)
        if best is not None:
            steps["model-best"] = best["step"]
        return steps

    def _is_exported(self, progress: Progress) -> bool:
        for name, step in self.models(progress).items():
            file = self.path / name / EXPORT_STEP_FILE
            if not file.exists() or file.read_text() != str(step):
                return False
        return True

    def begin(self, step: int) -> None:
        """Write the configuration, and remove what a run that died has left after `step`.

        These are log lines, and checkpoints that are damaged: the run will write them again.

        Raises:
            ValueError: a log is damaged.
        """
        if not self.on_rank0:
            return
        write_text(self.path / "config.json", json.dumps(self.settings, indent=1))
        for name in ("metrics.jsonl", "trajectories.jsonl"):
            file = self.path / name
            if file.exists():
                with reraise_corrupt(file, "give another --out"):
                    # What follows the last line end is empty, or a line that was being written.
                    *lines, _ = file.read_text(encoding="utf-8").split("\n")
                    kept = [line for line in lines if json.loads(line)["step"] <= step]
                write_text(file, "".join(f"{line}\n" for line in kept))
        for checkpoint in list_checkpoints(self.path / "checkpoints"):
            if step_of(checkpoint) > step:
                shutil.rmtree(checkpoint)
        if self.logger == "wandb":
            import wandb

            wandb.init(
                project="nanosearcher",
                name=self.path.name,
                config=self.settings,
                dir=self.path,
                sync_tensorboard=True,
            )
        if self.logger:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(self.path, purge_step=step + 1)

    def log(self, metrics: dict[str, float], episodes: list[Episode]) -> None:
        """Append a step's metrics and some of its episodes, and print the main metrics.

        They are on the disk before the step's checkpoint.
        """
        if not self.on_rank0:
            return
        trajectories = [{"step": metrics["step"]} | asdict(e) for e in episodes]
        records = {"metrics.jsonl": [metrics], "trajectories.jsonl": trajectories}
        for name in records:
            file = self.path / name
            try:
                with open(file, "a", encoding="utf-8") as stream:
                    for record in records[name]:
                        stream.write(json.dumps(record, ensure_ascii=False) + "\n")
                    stream.flush()
                    os.fsync(stream.fileno())
            except OSError as error:
                raise OSError(f"{file}: cannot be written ({error})") from None
        if self.board is not None:
            for name, value in metrics.items():
                self.board.add_scalar(name, value, metrics["step"])
        values = "  ".join(f"{name} {metrics[name]:.3f}" for name in SHOWN if name in metrics)
        self.print_rank0(f"step {metrics['step']:4d}  {values}")

    def _close_loggers(self) -> None:
        """Write what they still hold: a process of train.py ends without Python's exit handlers."""
        if self.board is not None:
            self.board.close()
            if self.logger == "wandb":
                import wandb

                wandb.finish()

    def print_rank0(self, line: str) -> None:
        """Print above the progress bars."""
        if self.on_rank0:
            tqdm.write(line)
