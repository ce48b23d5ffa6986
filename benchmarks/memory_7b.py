"""GPU memory of training a 7B model: simulated, not measured.

`python benchmarks/memory_7b.py` prints all categories of bytes, and to stderr RESULTS.md's table.
The trainer's own code computes a micro-batch, clips and steps on tensors without storage, in a
process group that sends nothing, while FSDPMemTracker counts the bytes that are alive. Adam's
moments and the gradients of earlier micro-batches are there from the start. The operators are the
CPU's (PyTorch without CUDA fakes no GPU); their attention keeps for the backward pass what
FlashAttention keeps. Assumed: one row of one sequence, half of it sampled. Not counted: CUDA
context, NCCL's buffers, work space of kernels, fragmentation, what a sleeping engine keeps; a card
of "80 GB" has 85e9 bytes, 5 are left for these.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
import tyro
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))

import policy
from benchmarks.log_probs import straightforward
from benchmarks.measure import show
from config import PRESETS, Config
from packing import pack
from reinforce_pp import policy_loss
from tools.check import CARD, RESERVED
from train import MAX_GRAD_NORM, Trainer

RANKS = (8, 16)
CONTEXTS = (4096, 8192, 16384, 32768)
SHAPES = """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads
""".split()
# Preset, model type and SHAPES, as in config.json on the Hugging Face hub.
MODELS = {
    "Qwen2.5-7B": ("qwen", "qwen2", (152064, 3584, 18944, 28, 28, 4)),
    "Llama-3.1-8B": ("llama", "llama", (128256, 4096, 14336, 32, 32, 8)),
}
# Whether gradients are checkpointed, and whether the head works in chunks.
CASES = {
    "as preset": (True, True),
    "whole head": (True, False),
    "no checkpointing": (False, True),
    "neither": (False, False),
}


@contextmanager
def training(
    mode, model: tuple, ranks: int, context: int, checkpointing: bool, chunked: bool
) -> Iterator[tuple]:
    """The trainer, a micro-batch and a function that does a rank's step on it.

    Args:
        mode: context in which tensors are made, such as FakeTensorMode().
        model: a value of MODELS.
    """
    preset, model_type, sizes = model
    shapes = dict(zip(SHAPES, sizes, strict=True))
    config = Config(**PRESETS[preset][1])
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    with mode:
        architecture = AutoConfig.for_model(model_type, **shapes, tie_word_embeddings=False)
        lm = AutoModelForCausalLM.from_config(architecture, dtype=torch.float32)
    # Outside of the mode, since the device mesh is real.
    with patch.object(policy, "compute_dtype", lambda: torch.bfloat16):  # a GPU's
        trainer = Trainer(config, policy.shard(lm, checkpointing, cpu_offload=False))

    def update() -> None:
        nn.utils.clip_grad_norm_(trainer.policy.parameters(), MAX_GRAD_NORM)
        trainer.optimizer.step()

    def step() -> None:
        log_probs = trainer.policy(**inputs, temperature=config.temperature)
        old = log_probs.detach()
        ones = torch.ones_like(old)
        loss, _ = policy_loss(
            log_probs, old, ones, sampler_log_probs=old, sampler_clip=config.sampler_clip
        )
        (loss.sum() / len(old)).backward()
        update()

    whole_head = patch.object(policy, "token_log_probs", straightforward)
    with mode, nullcontext() if chunked else whole_head:
        sampled = context // 2
        inputs = pack([[([0] * context, [0] * (context - sampled) + [1] * sampled)]])
        for parameter in trainer.policy.parameters():
            parameter.grad = torch.zeros_like(parameter)
        # Makes the moments; and DTensor works out its shapes here, where nothing counts them.
        update()
        yield trainer, inputs, step
    dist.destroy_process_group()


def simulate(*case) -> dict[str, float]:
    """Bytes on a rank at the peak of a step, by category and in total, and in total at its start.

    Args:
        case: arguments of `training` after its first.
    """
    # transformers looks into the positions for packed sequences; into fake ones it cannot, and
    # would build a mask.
    causal = patch("transformers.masking_utils.find_packed_sequence_indices", return_value=None)
    with training(FakeTensorMode(), *case) as (trainer, inputs, step), causal:
        tracker = FSDPMemTracker(trainer.policy, trainer.optimizer)
        tracker.track_inputs(tuple(inputs.values()))
        with tracker:
            start = tracker.get_tracker_snapshot("current")[trainer.device]["Total"]
            step()
        snapshot = tracker.get_tracker_snapshot("peak")[trainer.device]
    peak = {getattr(key, "value", key): count for key, count in snapshot.items()}
    found = {
        "parameters": peak["Sharded Param"],
        "gradients": peak["Sharded Grad"],
        "optimizer": peak["OptState"],
        "activations": peak["Activation"] + peak["Inputs"] + peak["Buffer"],
    }
    found["temporary"] = peak["Total"] - sum(found.values())
    return found | {"total": peak["Total"], "start": start}


def simulate_row(name: str, ranks: int, context: int, case: str) -> dict:
    """GB at the peak of training, and while the engine is awake (`rolling_out`)."""
    preset, _, (vocab_size, hidden_size, *_) = MODELS[name]
    config = Config(**PRESETS[preset][1])
    found = simulate(MODELS[name], ranks, context, *CASES[case])
    # The reference is frozen in bf16, and its passes come before those that train.
    found["reference"] = found["parameters"] / 2 if config.kl_coef > 0 else 0
    found["total"] += found["reference"]
    found["engine"] = config.gpu_memory_utilization * CARD  # its weights and KV cache
    # In bf16 the largest parameter, on its way to the engine.
    found["rolling_out"] = 2 * vocab_size * hidden_size
    for kind in ("parameters", "optimizer", "reference", "engine"):
        found["rolling_out"] += found[kind]
    row = {"model": name, "ranks": ranks, "context": context, "case": case}
    return row | {kind: round(size / 1e9, 3) for kind, size in found.items()}


def table(rows: list[dict]) -> str:
    """Peaks in GB, in brackets those above the card's."""
    header = ["model", "GPUs", "rolling out", "context", *CASES]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for start in range(0, len(rows), len(CASES)):
        first = rows[start]
        cells = [first["model"], str(first["ranks"]), f"{first['rolling_out']:.0f}"]
        cells.append(f"{first['context']:,}")
        for row in rows[start : start + len(CASES)]:
            fits = row["total"] < (CARD - RESERVED) / 1e9
            cells.append(f"{row['total']:.0f}" if fits else f"({row['total']:.0f})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    rows = []
    for setting in tqdm(list(product(MODELS, RANKS, CONTEXTS, CASES))):
        rows.append(simulate_row(*setting))
        show(rows[-1])
    print(table(rows), file=sys.stderr)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__, use_underscores=True)
