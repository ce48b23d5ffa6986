"""train.py with a fault in it: `faulty.py POINT COUNT RANK DEATH ...train.py's arguments`.

At its COUNT-th call of POINT the process of RANK says the time and kills itself (DEATH "kill") or raises (DEATH "raise").
For tests/test_train.py and benchmarks/faults.py.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import shutil

import safetensors.torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig

import checkpoint
import records
import train
from rollout import Rollout


def of_checkpoint(partial: bool) -> Callable[..., bool]:
    """Whether a call is about a checkpoint's folder or a file in it, one that is being written or one that has its name."""

    def counted(path, *_, **__) -> bool:
        return any(part.startswith("step_") and part.endswith(".partial") == partial for part in Path(path).parts[-2:])

    return counted


POINTS = {  # (owner, function), and which of its calls count, if not all
    "rollout": (Rollout, "_absorb"),
    "gather": (train, "gather"),
    "backward": (train.Batch, "backward"),
    "update": (train.nn.utils, "clip_grad_norm_"),
    "log": (checkpoint.RunFolder, "log"),
    "checkpoint begins": (checkpoint, "training_state"),
    "shard serialised": (safetensors.torch, "save"),
    "checkpoint written": (checkpoint, "fingerprint", of_checkpoint(partial=True)),
    "checkpoint synced": (records, "sync", of_checkpoint(partial=True)),
    "old checkpoint removed": (shutil, "rmtree", of_checkpoint(partial=False)),
    "weight sync": (DTensor, "full_tensor"),  # parameter by parameter
    "export": (PreTrainedConfig, "save_pretrained"),  # before the weights, and when they are written
}


def inject(point: str, count: int, death: str) -> None:
    owner, name, *counted = POINTS[point]
    original, calls = getattr(owner, name), 0

    def wrapper(*args, **kwargs):
        nonlocal calls
        calls += all(counts(*args, **kwargs) for counts in counted)
        if calls != count:
            return original(*args, **kwargs)
        print(f"fault at {time.time()}", flush=True)
        if death == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise KeyError("a fault was injected")

    setattr(owner, name, wrapper)


if __name__ == "__main__":
    point, count, rank, death, *arguments = sys.argv[1:]
    if os.environ.get("RANK", "0") == rank:
        inject(point, int(count), death)
    try:
        train.main(arguments)
    except BaseException as error:
        train.end(error)
