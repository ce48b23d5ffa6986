"""`token_log_probs` beside log_softmax of all logits: time, peak memory, values and gradients.

    python benchmarks/log_probs.py

8,192 action tokens, Qwen's vocabulary, hidden size 512, fp32, forward and backward, in turns. The
straightforward way takes 14 GiB. Memory is the peak above what was resident before. The last line
has the ratios.
"""

import gc
import statistics
import sys
import time
from pathlib import Path

import psutil
import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.measure import peak_mib, show
from reinforce_pp import token_log_probs


def straightforward(hidden: Tensor, head: Tensor, targets: Tensor, temperature=1.0) -> Tensor:
    log_probs = ((hidden @ head.T).float() / temperature).log_softmax(-1)
    return log_probs.gather(-1, targets[:, None])[:, 0]


def measure(function, *inputs: Tensor) -> tuple[float, float, list[Tensor]]:
    """Seconds, peak GiB, and log-probabilities with the gradients of hidden states and head."""
    hidden, head, targets = inputs
    hidden, head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = psutil.Process().memory_info().rss / 2**20
    start = time.perf_counter()
    log_probs = function(hidden, head, targets)
    (log_probs * torch.linspace(-1, 1, len(targets))).mean().backward()
    seconds = time.perf_counter() - start
    gib = (peak_mib() - before) / 1024
    return seconds, gib, [log_probs.detach(), hidden.grad, head.grad]


def main(
    tokens: int = 8192, vocabulary: int = 152_064, hidden: int = 512, repeats: int = 3
) -> None:
    torch.manual_seed(0)
    head = torch.randn(vocabulary, hidden) / hidden**0.5
    inputs = (torch.randn(tokens, hidden), head, torch.randint(vocabulary, (tokens,)))
    times, memories, errors = [], [], []
    for number in range(repeats):
        seconds, gib, ours = measure(token_log_probs, *inputs)
        row = {"name": f"round {number + 1}", "seconds": seconds, "gib": gib}
        plain_seconds, plain_gib, theirs = measure(straightforward, *inputs)
        row |= {"straightforward_seconds": plain_seconds, "straightforward_gib": plain_gib}
        times.append(seconds / plain_seconds)
        memories.append(gib / plain_gib)
        # Relative to the largest entry: gradients of a mean over thousands of tokens are small.
        for a, b in zip(ours, theirs, strict=True):
            errors.append(float((a - b).abs().max() / b.abs().max()))
        del ours, theirs
        show(row)
    ratios = {"time": statistics.median(times), "memory": statistics.median(memories)}
    show({"name": "ratios"} | ratios | {"largest_error": max(errors)})


if __name__ == "__main__":
    tyro.cli(main, description=__doc__, use_underscores=True)
