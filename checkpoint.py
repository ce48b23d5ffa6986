"""Checkpoints and the export of a model.

A checkpoint is a folder: a safetensors file of every rank, readable by any number of ranks, and
progress.json. Its name ends in the fingerprint of these files. Each rank reads and writes its own
share; a folder appears as a whole or not at all.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from policy import Policy, gather, whole_parameters
from records import fingerprint, fsync_and_rename, reraise_corrupt, write_text
from signals import best_evaluation, note_evaluation

KEEP_CHECKPOINTS = 2  # besides the one with the best evaluation
MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's names of its moments
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}  # those of safetensors
EXPORT_STEP_FILE = "nanosearcher_step.txt"  # in an exported model folder: the step of its run


@dataclass(frozen=True)
class Progress:
    """How far a run is; data order and sampling derive from the step."""

    step: int = 0  # rollout batches done
    updates: int = 0  # optimiser steps done
    consecutive_skipped: int = 0  # updates skipped since the last one that was done
    evaluations: list[dict] = field(default_factory=list)  # see signals.py
    probe: list[dict] = field(default_factory=list)  # sequences, see `signals.extend_probe`

    def after_step(self, metrics: dict[str, float], probe: list[dict]) -> "Progress":
        """How far the run is after the step that gave these metrics."""
        return Progress(
            metrics["step"],
            self.updates + metrics["updates"],
            metrics["consecutive_skipped"],
            note_evaluation(self.evaluations, metrics),
            probe,
        )


# --------------------------------------------------------------------------------------------------
# Shards in safetensors files


class Shard(NamedTuple):
    """The rows of a parameter or moment that one rank holds."""

    first: int  # row of the whole tensor with which the shard begins
    rows: Tensor  # may be empty


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy if the tensor is in host memory."""
    return memoryview(tensor.cpu().reshape(-1).view(torch.uint8).numpy())


def write_shards(file: Path, shards: dict[str, Shard]) -> str:
    """Write a safetensors file, flush it to the disk and return its SHA-256.

    safetensors' own `save_file` would copy all shards from a GPU to host memory before it writes.
    This function copies one at a time. The format: the header's length (8 bytes, little-endian),
    the header (JSON), the bytes of the tensors. The header's metadata holds `Shard.first`.
    """
    starts = {name: str(shard.first) for name, shard in shards.items()}
    header: dict[str, Any] = {"__metadata__": starts}
    end = 0
    for name, (_, rows) in shards.items():
        begin, end = end, end + rows.nbytes
        dtype = DTYPE_NAMES[rows.dtype]
        header[name] = {"dtype": dtype, "shape": rows.shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors begin at a multiple of 8 bytes
    start = len(encoded).to_bytes(8, "little") + encoded
    digest = hashlib.sha256(start)
    with open(file, "wb") as stream:
        stream.write(start)
        for _, rows in shards.values():
            content = as_bytes(rows)
            stream.write(content)
            digest.update(content)
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest()


def read_shards(folder: Path, shards: dict[str, Shard]) -> None:
    """Fill the shards from the files of any number of ranks.

    Raises:
        ValueError: rows are in no file.
    """
    from safetensors import safe_open

    missing = sum(len(rows) for _, rows in shards.values())
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as saved:
            starts = saved.metadata()
            for name, (first, rows) in shards.items():
                piece, start = saved.get_slice(name), int(starts[name])
                begin = max(first, start)
                end = min(first + len(rows), start + piece.get_shape()[0])
                if begin < end:
                    rows[begin - first : end - first] = piece[begin - start : end - start]
                    missing -= end - begin
    if missing:
        raise ValueError(f"{folder}: {missing} rows of parameters are missing; try --resume again")


# --------------------------------------------------------------------------------------------------
# Checkpoints


def create_moments(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Make Adam's state after `updates` steps, with moments of zero."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            step = torch.tensor(float(updates), device=parameter.device)
            optimizer.state[parameter] = {"step": step}
            for moment in MOMENTS:
                optimizer.state[parameter][moment] = torch.zeros_like(parameter)


def training_state(
    policy: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Shard]:
    """This rank's shards of parameters, and of Adam's moments if its optimiser is given.

    They are views of the tensors that are trained, no copies: writing to them changes the model.
    """
    state = {}
    for name, parameter in policy.named_parameters():
        (place,) = parameter.__create_chunk_list__()  # where the shard is in the whole tensor
        first, *_ = place.offsets
        state[f"model.{name}"] = Shard(first, parameter.detach().to_local())
        if optimizer is not None:
            for moment in MOMENTS:
                rows = optimizer.state[parameter][moment].to_local()
                state[f"{moment}.{name}"] = Shard(first, rows)
    return state


@contextmanager
def remove_partial(partial: Path) -> Iterator[None]:
    """Remove a folder that a rank could not write, as on a full disk, and say so in one line.

    All ranks enter and leave together, so that none waits for one that failed.

    Raises:
        OSError: on all ranks, also in place of safetensors' own error.
    """
    from safetensors import SafetensorError

    failure = None
    try:
        yield
    except (OSError, SafetensorError) as error:
        failure = str(error)
    causes = [cause for [cause] in gather([failure]) if cause]
    if causes:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"{partial.with_suffix('')}: cannot be written ({causes[0]}); "
            "the checkpoints before it are whole: --resume goes on from them"
        )


def combine(digests: dict[str, str]) -> str:
    """Fingerprint of a checkpoint, from the SHA-256 of its files; each rank has those of some."""
    items = [item for share in gather(list(digests.items())) for item in share]
    return hashlib.sha256(json.dumps(sorted(items)).encode()).hexdigest()[:16]


def save_checkpoint(
    folder: Path, policy: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress
) -> None:
    """Write a checkpoint beside its final place, flush it, rename it; remove older ones.

    Raises:
        OSError: a rank could not write its file. The checkpoints before it stay.
    """
    rank = dist.get_rank()
    name = f"step_{progress.step:06d}"
    partial = folder / f"{name}.partial"
    if rank == 0:
        for left_by_a_kill in folder.glob("*.partial"):
            shutil.rmtree(left_by_a_kill)
        partial.mkdir(parents=True)
    dist.barrier()
    digests = {}
    with remove_partial(partial):
        file = partial / f"rank_{rank:04d}.safetensors"
        digests[file.name] = write_shards(file, training_state(policy, optimizer))
        if rank == 0:
            file = partial / "progress.json"
            write_text(file, json.dumps(dataclasses.asdict(progress)))
            digests[file.name] = fingerprint(file)
    whole = folder / f"{name}-{combine(digests)}"
    with remove_partial(partial):
        if rank == 0:
            fsync_and_rename(partial, whole)
    if rank == 0:
        remove_old_checkpoints(folder, progress.evaluations)
    dist.barrier()


def remove_old_checkpoints(folder: Path, evaluations: list[dict]) -> None:
    """Keep the last KEEP_CHECKPOINTS, and the best of the evaluations until each of them."""
    kept = {step_of(path) for path in list_checkpoints(folder)[-KEEP_CHECKPOINTS:]}
    for step in list(kept):
        best = best_evaluation([each for each in evaluations if each["step"] <= step])
        if best is not None:
            kept.add(best["step"])
    for path in list_checkpoints(folder):
        if step_of(path) not in kept:
            shutil.rmtree(path)


def list_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints by step."""
    return sorted(folder.glob("step_??????-" + "?" * 16))


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name[len("step_") :].partition("-")[0])


def newest_checkpoint(folder: Path, step: int | None = None) -> tuple[Path | None, Progress]:
    """The newest checkpoint that is whole; damaged ones that are newer are named.

    The ranks share the files of a checkpoint out among themselves, to read them side by side.

    Args:
        step: consider only the checkpoint of this step; None is returned if it is not whole.
    Raises:
        ValueError: there are checkpoints and none is whole. To begin anew would lose the run's log.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    listed = []
    if rank == 0:  # a network file system may show another rank an old folder
        paths = [path for path in list_checkpoints(folder) if step in (None, step_of(path))]
        listed = [(path, sorted(path.iterdir())) for path in paths]
    checkpoints = gather(listed)[0]
    for path, files in reversed(checkpoints):
        digests = {file.name: fingerprint(file) for file in files[rank::world]}
        if path.name.endswith(combine(digests)):
            with reraise_corrupt(path, "give another --out"):
                return path, Progress(**json.loads((path / "progress.json").read_text()))
        if rank == 0:
            instead = "; the one before it is used" if step is None else ""
            print(f"train.py: {path} is damaged{instead}", file=sys.stderr)
    if checkpoints and step is None:
        raise ValueError(f"{folder}: no checkpoint there is whole; give another --out")
    return None, Progress()


def load_checkpoint(
    path: Path, policy: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Read parameters, and moments if their optimiser is given; see `create_moments`.

    The checkpoint may be of another number of ranks.
    """
    read_shards(path, training_state(policy, optimizer))


# --------------------------------------------------------------------------------------------------
# Export


def export(policy: Policy, source: str, out: Path, step: int) -> None:
    """Write a Hugging Face folder that transformers and vLLM load as it is.

    The folder appears as a whole or not at all, in place of a model that is there.

    Args:
        source: the folder or hub name of its tokenizer and generation_config.json.
        step: the step of the run, which the folder notes.
    """
    from transformers import AutoTokenizer, GenerationConfig
    from transformers.utils import GENERATION_CONFIG_NAME, cached_file

    lm, on_rank0 = policy.lm, dist.get_rank() == 0
    state = {}
    for name, tensor in whole_parameters(policy):
        if on_rank0:
            state[name] = tensor.cpu()
    partial = out.with_suffix(".partial")
    with remove_partial(partial):
        if on_rank0:
            # Many published generation configurations are such that transformers refuses to save
            # them, so that save_pretrained gets an empty one and the source's file is copied.
            lm.generation_config = GenerationConfig()
            lm.save_pretrained(partial, state_dict=state)
            (partial / GENERATION_CONFIG_NAME).unlink()
            original = Path(cached_file(source, "config.json")).with_name(GENERATION_CONFIG_NAME)
            if original.exists():
                shutil.copy(original, partial)
            lm.config.dtype = tensor.dtype  # save_pretrained has noted that of the fp32 parameters
            lm.config.save_pretrained(partial)
            AutoTokenizer.from_pretrained(source).save_pretrained(partial)
            write_text(partial / EXPORT_STEP_FILE, str(step))
            shutil.rmtree(out, ignore_errors=True)
            fsync_and_rename(partial, out)
