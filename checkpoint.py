"""The run folder: its log, its checkpoints, resume, export."""

import dataclasses
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from records import fingerprint, publish, whole, write_jsonl, write_text

MOMENTS = ("exp_avg", "exp_avg_sq")  # what Adam calls them


KEEP_CHECKPOINTS = 2


STEP_OF_MODEL = "nanosearcher_step.txt"  # in an exported folder: which of the run's steps it is of


MAY_CHANGE = (  # on --resume: they change no number but for rounding
    *("steps", "save_every", "eval_every", "eval_questions"),
    *("micro_batch_tokens", "gradient_checkpointing", "cpu_offload", "gpu_memory_utilization"),
)


START = {"step": 0, "updates": 0, "bad_in_a_row": 0}  # the progress of a run that has not begun


def whole_parameters(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, whole bf16 tensor), gathered one by one; all ranks must iterate together."""
    for name, parameter in policy.lm.named_parameters():
        yield name, parameter.detach().bfloat16().full_tensor()


def export(policy: nn.Module, model: str, out: Path, step: int) -> None:
    """Write a Hugging Face folder that transformers and vLLM load as it is; it is there as a whole or not at all."""
    from transformers import AutoTokenizer

    writes = dist.get_rank() == 0
    state = {name: tensor.cpu() for name, tensor in whole_parameters(policy) if writes}  # all ranks gather, rank 0 keeps
    if writes:
        partial, old = out.with_suffix(".partial"), out.with_suffix(".old")
        with writing(partial):
            policy.lm.save_pretrained(partial, state_dict=state)
            policy.lm.config.dtype = "bfloat16"  # save_pretrained names that of the fp32 parameters
            policy.lm.config.save_pretrained(partial)
            AutoTokenizer.from_pretrained(model).save_pretrained(partial)
            write_text(partial / STEP_OF_MODEL, str(step))
            shutil.rmtree(old, ignore_errors=True)
            if out.exists():
                out.rename(old)
            publish(partial, out)
        shutil.rmtree(old, ignore_errors=True)
    dist.barrier()


def training_state(policy: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters and Adam's moments by name; the moments are made here if the optimiser has not stepped yet."""
    state = {}
    for name, parameter in policy.named_parameters():
        moments = optimizer.state[parameter]
        if not moments:
            moments |= {"step": torch.zeros((), device=parameter.device)}
            moments |= {moment: torch.zeros_like(parameter) for moment in MOMENTS}
        state |= {f"model.{name}": parameter.detach()} | {f"{moment}.{name}": moments[moment] for moment in MOMENTS}
    return state


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """While a folder is written: if it cannot be, as on a full disk, what is there of it goes, and it is named in one line.

    Raises:
        OSError: also for what safetensors and torch.distributed.checkpoint raise.
    """
    from safetensors import SafetensorError
    from torch.distributed.checkpoint import CheckpointException

    try:
        yield
    except (OSError, SafetensorError, CheckpointException) as error:
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        whole_ones = "the checkpoints before are whole: --resume goes on from them"
        raise OSError(f"{folder.with_suffix('')}: cannot be written ({cause}); {whole_ones}") from None


def save_checkpoint(folder: Path, policy: nn.Module, optimizer: torch.optim.Optimizer, progress: dict) -> None:
    """Write beside, sync, rename to the step and the digest of what is written; the last KEEP_CHECKPOINTS stay.

    Raises:
        OSError: a rank could not write its shard, as on a full disk; what it wrote goes, the checkpoints before it stay.
    """
    import torch.distributed.checkpoint as dcp

    writes, name = dist.get_rank() == 0, f"step_{progress['step']:06d}"
    partial = folder / f"{name}.partial"
    if writes:
        for left in folder.glob("*.partial"):  # by a call that was killed
            shutil.rmtree(left)
        partial.mkdir(parents=True)
    dist.barrier()
    with writing(partial):
        writer = dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True)
        dcp.save(training_state(policy, optimizer), storage_writer=writer)
        dist.barrier()
        if writes:
            write_text(partial / "progress.json", json.dumps(progress))
            publish(partial, folder / f"{name}-{fingerprint(partial)[:16]}")
    if writes:
        for old in checkpoints(folder)[:-KEEP_CHECKPOINTS]:
            shutil.rmtree(old)
    dist.barrier()


def checkpoints(folder: Path) -> list[Path]:
    """By step; those under way and those set aside are not among them."""
    return sorted(folder.glob("step_??????-" + "?" * 16))


def newest_checkpoint(folder: Path) -> tuple[Path | None, dict]:
    """The newest checkpoint that is whole and its progress, or that of a start; damaged ones are named and passed over.

    Raises:
        ValueError: there are checkpoints and none is whole; to begin anew would lose what the run has logged.
    """
    for path in reversed(checkpoints(folder)):
        if path.name.endswith(fingerprint(path)[:16]):
            return path, json.loads((path / "progress.json").read_text())
        print(f"train.py: {path} is damaged and is passed over", file=sys.stderr)
    if checkpoints(folder):
        raise ValueError(f"{folder}: no checkpoint there is whole; give another --out to begin anew")
    return None, START


def load_checkpoint(path: Path, policy: nn.Module, optimizer: torch.optim.Optimizer, progress: dict) -> None:
    """Read the shards in place; they may come from another number of ranks."""
    import torch.distributed.checkpoint as dcp

    dcp.load(training_state(policy, optimizer), storage_reader=dcp.HuggingFaceStorageReader(str(path)))
    for moments in optimizer.state.values():
        moments["step"].fill_(progress["updates"])


class RunFolder:
    """config.json, metrics.jsonl, trajectories.jsonl, checkpoints/ and, at the end, model/. Only rank 0 reads and writes."""

    def __init__(self, path: Path, config, log: str | None):
        self.path, self.writes, self.logger, self.board = path, dist.get_rank() == 0, log, None
        data = [file for file in (config.questions, config.prompt_file) if Path(file).is_file()]
        self.config, self.contents = dataclasses.asdict(config), {file: fingerprint(file) for file in data}

    @contextmanager
    def held(self, resume: bool) -> Iterator[None]:
        """Keep other processes out.

        Raises:
            ValueError: another process holds the folder; there is a run in it and `resume` is off, or another run.
        """
        if not self.writes:
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # ranks that outlived their torchrun, for one
                raise ValueError(f"{self.path}: another process is training in it") from None
            except OSError:
                pass  # a file system that does not lock folders, as NFS
            self._refuse_another(resume)
            yield
        finally:
            os.close(folder)

    def _refuse_another(self, resume: bool) -> None:
        if not any((self.path / name).exists() for name in ("metrics.jsonl", "checkpoints")):
            return
        if not resume:
            raise ValueError(f"{self.path}: holds a run already; --resume goes on with it, --out names another folder")
        with whole(file := self.path / "config.json", "give another --out"):
            before = dict(json.loads(file.read_text()))
        for name, value in self.config.items():
            if name not in MAY_CHANGE and value != before.get(name):
                raise ValueError(f"{file}: this run has --{name} {before.get(name)}, not {value}")
        if before.get("contents") != self.contents:
            raise ValueError(f"{file}: {' or '.join(self.contents)} has changed since this run began; give another --out")

    def progress(self, resume: bool) -> tuple[Path | None, dict, bool]:
        """The checkpoint to go on from, if any, how far it is, and whether a model of that step is there; on all ranks."""
        found = [None]
        if self.writes:
            path, progress = newest_checkpoint(self.path / "checkpoints") if resume else (None, START)
            exported = self.path / "model" / STEP_OF_MODEL
            found = [(path, progress, exported.exists() and exported.read_text() == str(progress["step"]))]
        dist.broadcast_object_list(found)
        return found[0]

    def begin(self, step: int) -> None:
        """Drop what a lost stretch has logged after `step`, so that no step stands twice.

        Raises:
            ValueError: a log is damaged.
        """
        if not self.writes:
            return
        config = self.config | {"contents": self.contents}
        write_text(self.path / "config.json", json.dumps(config, indent=1))  # --resume needs it whole
        for file in (self.path / "metrics.jsonl", self.path / "trajectories.jsonl"):
            if file.exists():
                with whole(file):
                    lines = file.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last new line is torn
                    kept = [record for record in map(json.loads, lines) if record["step"] <= step]
                write_jsonl(file, kept)
        for path in checkpoints(self.path / "checkpoints"):
            if path.name[: len("step_000000")] > f"step_{step:06d}":  # damaged: out of the way of new ones
                shutil.rmtree(aside := path.with_suffix(".damaged"), ignore_errors=True)
                path.rename(aside)
        if self.logger == "wandb":
            import wandb

            wandb.init(project="nanosearcher", name=self.path.name, config=self.config, dir=self.path, sync_tensorboard=True)
        if self.logger:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(self.path)

    def append(self, name: str, records: list[dict]) -> None:
        if not self.writes:
            return
        try:
            with open(self.path / name, "a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
                stream.flush()
                os.fsync(stream.fileno())  # before the checkpoint of its step
        except OSError as error:
            raise OSError(f"{self.path / name}: cannot be written ({error})") from None

    def say(self, line: str) -> None:
        if self.writes:
            tqdm.write(line)

    def log(self, metrics: dict[str, float]) -> None:
        self.append("metrics.jsonl", [metrics])
        for name, value in metrics.items() if self.board else ():
            self.board.add_scalar(name, value, metrics["step"])
