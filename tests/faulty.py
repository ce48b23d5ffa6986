"""train.py with a fault in it: `faulty.py POINT COUNT RANK DEATH ...train.py's arguments`.

At its COUNT-th call of POINT the process of RANK kills itself (DEATH "kill") or raises (DEATH "raise"). For
tests/test_train.py and benchmarks/faults.py.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import shutil

import safetensors.torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig

import train
from rollout import Rollout

POINTS = {
    "rollout": (Rollout, "_absorb"),
    "gather": (train, "gather"),
    "backward": (train.Batch, "backward"),
    "update": (train.nn.utils, "clip_grad_norm_"),
    "log": (train.RunFolder, "log"),
    "checkpoint begins": (train, "training_state"),
    "shard serialised": (safetensors.torch, "save"),
    "checkpoint written": (train, "fingerprint"),  # of all its files, but it has no name yet
    "checkpoint synced": (train, "sync"),
    "old checkpoint removed": (shutil, "rmtree"),
    "weight sync": (DTensor, "full_tensor"),  # parameter by parameter
    "export": (PreTrainedConfig, "save_pretrained"),  # before the weights, and when they are written
}


def inject(point: str, count: int, death: str) -> None:
    owner, name = POINTS[point]
    original, calls = getattr(owner, name), 0

    def wrapper(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == count and death == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if calls == count:
            raise KeyError("a fault was injected")
        return original(*args, **kwargs)

    setattr(owner, name, wrapper)


if __name__ == "__main__":
    point, count, rank, death, *arguments = sys.argv[1:]
    if os.environ.get("RANK", "0") == rank:
        inject(point, int(count), death)
    try:
        train.main(arguments)
    except BaseException as error:
        train.end(error)
