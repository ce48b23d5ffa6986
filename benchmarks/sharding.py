"""Host memory and seconds of two ranks that load a model, and that save and load a checkpoint.

    python benchmarks/sharding.py    # 630 M parameters; wants 12 GB of memory, 16 of disk

The model has the shape of Qwen2.5-0.5B, a head of its own and random weights. Every way runs in
processes of its own, under torchrun:

    whole      every rank loads the model in fp32, then shards it: the usual way
    sharded    train.py's: every rank reads its own slices into shards
    plain      the bytes of the checkpoint in one file a rank, written, flushed and read back

Memory is what the ranks hold together beyond what they held before, at their peak. What is read was
written a moment before, so that most of it comes from the page cache.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import psutil
import torch
import torch.distributed as dist
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.measure import ROOT, peak_mib, show, torchrun_command
from checkpoint import (
    Progress,
    as_bytes,
    create_moments,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    training_state,
)
from policy import gather, load_policy, shard, start_distributed

SHAPE = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


def make_model(folder: Path, shape: dict) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("qwen2", **shape)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def load(model: str, way: str):
    if way == "sharded":
        return load_policy(model)
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return shard(lm, gradient_checkpointing=False, cpu_offload=False)


def timed(function, *arguments) -> tuple[float, object]:
    """Seconds until all ranks have done it, and what it returned here."""
    dist.barrier()
    start = time.perf_counter()
    result = function(*arguments)
    dist.barrier()
    return time.perf_counter() - start, result


def write_plainly(file: Path, state: dict) -> None:
    with open(file, "wb") as stream:
        for _, rows in state.values():
            stream.write(as_bytes(rows))
        stream.flush()
        os.fsync(stream.fileno())


def read_plainly(file: Path, state: dict) -> None:
    with open(file, "rb") as stream:
        for _, rows in state.values():
            stream.readinto(as_bytes(rows))


def run_rank(model: str, out: Path, way: str) -> None:
    """What one rank does; rank 0 prints the row."""
    start_distributed()
    import transformers  # noqa: F401  what it takes is not the model's

    held = psutil.Process().memory_info().rss / 2**20
    seconds, policy = timed(load, model, way)
    row = {"way": way, "ranks": dist.get_world_size(), "load_s": seconds}
    row["parameters"] = sum(p.numel() for p in policy.parameters())
    row["load_peak_gib"] = sum(map(sum, gather([peak_mib() - held]))) / 1024
    if way == "sharded":
        optimizer = torch.optim.AdamW(policy.parameters())
        create_moments(optimizer, 1)
        state = training_state(policy, optimizer)
        for _, rows in state.values():  # a page that nothing was written to takes no memory
            rows.uniform_()
        row["checkpoint_gb"] = sum(map(sum, gather([sum(r.nbytes for _, r in state.values())])))
        row["checkpoint_gb"] /= 1e9
        before = peak_mib()
        plain = out / f"plain_{dist.get_rank()}"
        row["plain_write_s"], _ = timed(write_plainly, plain, state)
        row["plain_read_s"], _ = timed(read_plainly, plain, state)
        plain.unlink()
        row["save_s"], _ = timed(save_checkpoint, out, policy, optimizer, Progress(1, 1))
        row["save_adds_to_peak"] = (peak_mib() - before) / before
        row["prove_whole_s"], (checkpoint, _) = timed(newest_checkpoint, out)
        row["read_s"], _ = timed(load_checkpoint, checkpoint, policy, optimizer)
    if dist.get_rank() == 0:
        rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
        show(rounded)
    dist.barrier()
    os._exit(0)  # PyTorch's threads may outlive the interpreter (pytorch#179291)


def measure(model: Path, out: Path, way: str, ranks: int) -> dict:
    words = ("--rank_of", way, "--model", model, "--out", out)
    command = torchrun_command(ranks, __file__, *words)
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def main(
    ranks: int = 2,
    layers: int = SHAPE["num_hidden_layers"],
    hidden: int = SHAPE["hidden_size"],
    rank_of: Literal["whole", "sharded"] | None = None,
    model: str = "",
    out: Path = Path("."),
) -> None:
    """--rank_of and --model are for the ranks that the command starts; --out takes a few GB."""
    if rank_of:
        run_rank(model, out, rank_of)
    with TemporaryDirectory(dir=out) as folder:
        path = Path(folder)
        make_model(path / "model", SHAPE | {"num_hidden_layers": layers, "hidden_size": hidden})
        rows = {way: measure(path / "model", path, way, ranks) for way in ("whole", "sharded")}
        for row in rows.values():
            show(row)
        whole, sharded = rows["whole"], rows["sharded"]
        ratios = {
            "load peak: sharded / whole": sharded["load_peak_gib"] / whole["load_peak_gib"],
            "save / plain write": sharded["save_s"] / sharded["plain_write_s"],
            "prove and read / plain read": (sharded["prove_whole_s"] + sharded["read_s"])
            / sharded["plain_read_s"],
        }
        show({"name": "ratios"} | {name: round(value, 3) for name, value in ratios.items()})


if __name__ == "__main__":
    tyro.cli(main, description=__doc__, use_underscores=True)
