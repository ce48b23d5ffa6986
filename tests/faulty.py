"""train.py with a fault in it: `faulty.py POINT COUNT RANK DEATH ...train.py's arguments`.

At its COUNT-th call of POINT the process of RANK prints the time and kills itself (DEATH "kill"),
raises (DEATH "raise") or finds the disk full (DEATH "full"). For tests/test_checkpoint.py and
benchmarks/faults.py.
"""

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import shutil

from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig

import checkpoint
import records
import run_folder
import sampler
import signals
import train
from policy import end_process
from rollout import Rollout


def every_call(*_, **__) -> bool:
    return True


def of_partial_checkpoint(path: str | Path, *_, **__) -> bool:
    """Whether the path is a checkpoint's folder while it is written, or a file in it."""
    names = Path(path).parts[-2:]
    return any(name.startswith("step_") and name.endswith(".partial") for name in names)


def of_finished_checkpoint(path: str | Path, *_, **__) -> bool:
    name = Path(path).name
    return name.startswith("step_") and not name.endswith(".partial")


def of_file_in_finished_checkpoint(path: str | Path, *_, **__) -> bool:
    return of_finished_checkpoint(Path(path).parent)


def of_parameter(tensor: DTensor, *_, **__) -> bool:
    return tensor.ndim > 0  # the norm of the gradient is a number


class Point(NamedTuple):
    owner: Any
    function: str
    counts: Callable[..., bool] = every_call  # whether a call with these arguments counts


POINTS = {
    "rollout": Point(Rollout, "_absorb"),
    "gather": Point(sampler, "gather"),
    "backward": Point(train.Trainer, "backward"),
    "update": Point(train.nn.utils, "clip_grad_norm_"),
    "log": Point(run_folder.RunFolder, "log"),
    "checkpoint begins": Point(train, "save_checkpoint"),
    "shard written": Point(checkpoint, "as_bytes"),  # tensor by tensor
    "checkpoint written": Point(checkpoint, "fingerprint", of_partial_checkpoint),
    "checkpoint synced": Point(records, "fsync_path", of_partial_checkpoint),
    "old checkpoint removed": Point(shutil, "rmtree", of_finished_checkpoint),
    "checkpoint read": Point(checkpoint, "fingerprint", of_file_in_finished_checkpoint),
    "weight sync": Point(DTensor, "full_tensor", of_parameter),  # parameter by parameter
    # Before the weights are written, and after them.
    "export": Point(PreTrainedConfig, "save_pretrained"),
}


def inject(point: str, count: int, death: str) -> None:
    owner, function, counts = POINTS[point]
    original = getattr(owner, function)
    calls = 0

    def wrapper(*args, **kwargs):
        nonlocal calls
        calls += counts(*args, **kwargs)
        if calls != count or not counts(*args, **kwargs):
            return original(*args, **kwargs)
        print(f"fault at {time.time()}", flush=True)
        if death == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if death == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise KeyError("a fault was injected")

    setattr(owner, function, wrapper)


if __name__ == "__main__":
    point, count, rank, death, *arguments = sys.argv[1:]
    signals.PROBE_SIZE = 4  # so that the runs of the tests have a probe
    if os.environ.get("RANK", "0") == rank:
        inject(point, int(count), death)
    try:
        train.main(arguments)
    except BaseException as error:
        end_process(error)
