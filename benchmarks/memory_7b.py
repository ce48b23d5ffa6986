"""GPU memory of training a 7B model: simulated, not measured. `python benchmarks/memory_7b.py` prints the README's table.

The trainer's own code computes a micro-batch, clips and steps on tensors without storage, in a process group that sends
nothing, while FSDPMemTracker counts the bytes alive. Adam's moments and the gradients of the micro-batches before are there
from the start. The operators are the CPU's (PyTorch without CUDA fakes no GPU); their attention keeps for the backward pass
what FlashAttention keeps. Assumed: one row of one sequence, half of it sampled. Not counted: CUDA context, NCCL's buffers,
work space of kernels, fragmentation, what a sleeping engine keeps; a card of "80 GB" has 85e9 bytes, 5 are left for these.
`--json` prints all categories, and last the ratios of simulated bytes to computed ones, of all rows the farthest from 1.
"""

import json
import sys
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import reinforce_pp
import train
from benchmarks.log_probs import straightforward

CARD, CPU, RANKS, CONTEXTS = 80e9, torch.device("cpu"), (8, 16), (4096, 8192, 16384, 32768)
NAMES = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads".split()
MODELS = {  # preset; model_type and NAMES of config.json on the Hugging Face hub; neither ties its embeddings
    "Qwen2.5-7B": ("qwen", "qwen2", 152064, 3584, 18944, 28, 28, 4),
    "Llama-3.1-8B": ("llama", "llama", 128256, 4096, 14336, 32, 32, 8),
}
CASES = {"as preset": (1, 1), "whole head": (1, 0), "no checkpointing": (0, 1), "neither": (0, 0)}  # checkpointing, chunks
WIDTHS = {"parameters": 4, "gradients": 4, "optimizer": 8}  # bytes a parameter, over all ranks


def parameter_count(kind: str, vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> int:
    kv = hidden // heads * kv_heads
    biases = hidden + 2 * kv if kind == "qwen2" else 0
    return layers * (2 * hidden * (hidden + kv) + biases + 3 * hidden * inner + 2 * hidden) + 2 * vocab * hidden + hidden


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


def row(name: str, ranks: int, context: int, case: str) -> dict:
    """The peak of training, what is there while the engine is awake (both in GB), and ratios of simulated to computed."""
    (preset, *shape), found = MODELS[name], simulate(MODELS[name], ranks, context, *CASES[case])
    config, count, head = train.Config(**train.PRESETS[preset][1]), parameter_count(*shape), 2 * shape[1] * shape[2]  # bf16
    # a reference is frozen in bf16, and FSDP leaves gathered what belongs to no layer: embeddings and head
    found["reference"] = (2 * count / ranks + 2 * head) * (config.kl_coef > 0)
    found["total"] += found["reference"]
    found["engine"] = config.gpu_memory_utilization * CARD  # its weights and KV cache
    resident = sum(found[kind] for kind in ("parameters", "optimizer", "reference", "engine"))
    found["rolling_out"] = resident + head  # the largest parameter on its way to the engine
    ratios = {kind: round(found[kind] * ranks / width / count, 4) for kind, width in WIDTHS.items()}
    facts = dict(model=name, ranks=ranks, context=context, case=case, ratios=ratios)
    return facts | {kind: round(n / 1e9, 3) for kind, n in found.items()}


def table(rows: list[dict]) -> str:
    """Peaks in GB, in brackets those above the card's."""
    lines = [f"| model | GPUs | rolling out | context | {' | '.join(CASES)} |", "|" + "---|" * (4 + len(CASES))]
    for cells in zip(*[iter(rows)] * len(CASES), strict=True):
        peaks = [("{:.0f}" if r["total"] < CARD / 1e9 else "({:.0f})").format(r["total"]) for r in cells]
        lines.append(" | ".join(["| {model} | {ranks} | {rolling_out:.0f} | {context:,}".format(**cells[0]), *peaks]) + " |")
    return "\n".join(lines)


def main() -> None:
    rows, as_json = [], "--json" in sys.argv
    for case in tqdm(list(product(MODELS, RANKS, CONTEXTS, CASES)), disable=as_json):
        rows.append(row(*case))
        if as_json:
            print(json.dumps(rows[-1]), flush=True)
    worst = {kind: max((r["ratios"][kind] for r in rows), key=lambda ratio: abs(ratio - 1)) for kind in WIDTHS}
    print(json.dumps({"name": "ratios"} | worst) if as_json else table(rows))


if __name__ == "__main__":
    main()
