"""GPU memory of training a 7B model: simulated, not measured. `python benchmarks/memory_7b.py` prints the README's table.

A step of the trainer under fake tensors (fake_step.py). The operators are the CPU's (PyTorch without CUDA fakes no GPU);
their attention keeps for the backward pass what FlashAttention keeps. Assumed: one row of one sequence, half of it sampled.
Not counted: CUDA context, NCCL's buffers, work space of kernels, fragmentation, what a sleeping engine keeps; a card of
"80 GB" has 85e9 bytes, 5 are left for these.
`--json` prints all categories, and last the ratios of simulated bytes to computed ones, of all rows the farthest from 1.
"""

import json
import sys
from itertools import product
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from benchmarks.fake_step import simulate

CARD, RANKS, CONTEXTS = 80e9, (8, 16), (4096, 8192, 16384, 32768)
MODELS = {  # preset; model_type and fake_step.NAMES of config.json on the Hugging Face hub; neither ties its embeddings
    "Qwen2.5-7B": ("qwen", "qwen2", 152064, 3584, 18944, 28, 28, 4),
    "Llama-3.1-8B": ("llama", "llama", 128256, 4096, 14336, 32, 32, 8),
}
CASES = {"as preset": (1, 1), "whole head": (1, 0), "no checkpointing": (0, 1), "neither": (0, 0)}  # checkpointing, chunks
WIDTHS = {"parameters": 4, "gradients": 4, "optimizer": 8}  # bytes a parameter, over all ranks


def parameter_count(kind: str, vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> int:
    kv = hidden // heads * kv_heads
    biases = hidden + 2 * kv if kind == "qwen2" else 0
    return layers * (2 * hidden * (hidden + kv) + biases + 3 * hidden * inner + 2 * hidden) + 2 * vocab * hidden + hidden


def row(name: str, ranks: int, context: int, case: str) -> dict:
    """The peak of training, what is there while the engine is awake (both in GB), and ratios of simulated to computed."""
    (preset, *shape), found = MODELS[name], simulate(MODELS[name], ranks, context, *CASES[case])
    config, count, head = train.Config(**train.PRESETS[preset][1]), parameter_count(*shape), 2 * shape[1] * shape[2]  # bf16
    found["reference"] = 2 * count / ranks * (config.kl_coef > 0)  # frozen in bf16, its passes before those that train
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
