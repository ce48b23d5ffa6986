"""A training step on tensors without storage, and the bytes that are alive in it; for memory_7b.py.

The trainer's own code computes a micro-batch, clips and steps in a process group that sends nothing, while FSDPMemTracker
counts. Adam's moments and the gradients of the micro-batches before are there from the start.
"""

import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import reinforce_pp
import train
from benchmarks.log_probs import straightforward

CPU = torch.device("cpu")
NAMES = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads".split()


@contextmanager
def training(mode, model: tuple, ranks: int, context: int, checkpointing: bool, chunked: bool):
    """The policy, its optimizer, a micro-batch and the step that a rank does on it; `mode` fakes tensors or does not."""
    preset, kind, *shape = model
    config = train.Config(**train.PRESETS[preset][1] | dict(gradient_checkpointing=bool(checkpointing)))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    with mode:
        shapes = AutoConfig.for_model(kind, **dict(zip(NAMES, shape, strict=True)), tie_word_embeddings=False)
        lm = AutoModelForCausalLM.from_config(shapes, dtype=torch.float32)
    policy = train.shard(lm, config, CPU)  # outside of the mode: the device mesh is real
    optimizer = torch.optim.AdamW(policy.parameters(), betas=train.ADAM_BETAS, weight_decay=0.0, fused=True)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(policy.parameters(), train.MAX_GRAD_NORM)
        optimizer.step()

    def step() -> None:
        log_probs = policy(**inputs, temperature=config.temperature)
        old = log_probs.detach()
        loss, _ = reinforce_pp.policy_loss(log_probs, old, torch.ones_like(old), config.clip_eps, old, config.sampler_clip)
        (loss.sum() / len(old)).backward()
        update()

    # all logits at once, kept for the backward pass; the presets' temperature is 1
    plain = patch.object(reinforce_pp, "token_log_probs", lambda *args: straightforward(*args[:3]))
    with mode, nullcontext() if chunked else plain:
        inputs = reinforce_pp.pack([[([0] * context, [0] * (context - context // 2) + [1] * (context // 2), 1)]])
        for parameter in policy.parameters():
            parameter.grad = torch.zeros_like(parameter)
        update()  # makes the moments; and DTensor works out its shapes now, where the tracker does not count them
        yield policy, optimizer, inputs, step
    dist.destroy_process_group()


def simulate(*case) -> dict[str, int]:
    """Bytes on a rank at the peak of a step, by category and in total, and in total at its start."""
    # transformers looks into the positions for packed sequences; into fake ones it cannot, and would build a mask
    causal = patch("transformers.masking_utils.find_packed_sequence_indices", return_value=None)
    with training(FakeTensorMode(), *case) as (policy, optimizer, inputs, step), causal:
        tracker = FSDPMemTracker(policy, optimizer)
        tracker.track_inputs(tuple(inputs.values()))
        with tracker:
            start = tracker.get_tracker_snapshot("current")[CPU]["Total"]
            step()
        peak = {getattr(key, "value", key): n for key, n in tracker.get_tracker_snapshot("peak")[CPU].items()}
    found = {"parameters": peak["Sharded Param"], "gradients": peak["Sharded Grad"], "optimizer": peak["OptState"]}
    found["activations"] = peak["Activation"] + peak["Inputs"] + peak["Buffer"]
    return found | {"temporary": peak["Total"] - sum(found.values()), "total": peak["Total"], "start": start}
