"""`token_log_probs` beside log_softmax of all logits: time, peak memory, values and gradients.

    python benchmarks/log_probs.py --json

8,192 action tokens, Qwen's vocabulary, hidden size 512, fp32, forward and backward, in turns. The
straightforward way takes 14 GiB. Memory is the peak above what was resident before. The last line
of --json has the ratios.
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

from benchmarks.measure import show
from policy import peak_memory_gib
from reinforce_pp import token_log_probs


def straightforward(hidden: Tensor, head: Tensor, targets: Tensor, temperature=1.0) -> Tensor:
    log_probs = ((hidden @ head.T).float() / temperature).log_softmax(-1)
    return log_probs.gather(-1, targets[:, None])[:, 0]


def measure(function, hidden: Tensor, head: Tensor, targets: Tensor):
    """Seconds, peak GiB, and log-probabilities with the gradients of hidden states and head."""
    inputs = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = psutil.Process().memory_info().rss / 2**30
    start = time.perf_counter()
    log_probs = function(*inputs, targets)
    (log_probs * torch.linspace(-1, 1, len(targets))).mean().backward()
    seconds = time.perf_counter() - start
    gib = peak_memory_gib() - before
    return seconds, gib, [log_probs.detach(), *(tensor.grad for tensor in inputs)]


def largest_error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Relative to the largest entry: gradients of a mean over thousands of tokens are small."""
    errors = [(a - b).abs().max() / b.abs().max() for a, b in zip(ours, theirs, strict=True)]
    return float(max(errors))


def main(
    tokens: int = 8192,
    vocabulary: int = 152_064,
    hidden: int = 512,
    repeats: int = 3,
    json: bool = False,
) -> None:
    torch.manual_seed(0)
    states = torch.randn(tokens, hidden)
    head = torch.randn(vocabulary, hidden) / hidden**0.5
    targets = torch.randint(vocabulary, (tokens,))
    rounds = []
    for number in range(repeats):
        row = {"name": f"round {number + 1}"}
        row["seconds"], row["gib"], ours = measure(token_log_probs, states, head, targets)
        seconds, gib, theirs = measure(straightforward, states, head, targets)
        row |= {"straightforward_seconds": seconds, "straightforward_gib": gib}
        row["largest_error"] = largest_error(ours, theirs)
        del ours, theirs
        rounds.append(row)
        show(row, json)
    ratios = {
        "name": "ratios",
        "time": statistics.median(r["seconds"] / r["straightforward_seconds"] for r in rounds),
        "memory": statistics.median(r["gib"] / r["straightforward_gib"] for r in rounds),
        "largest_error": max(r["largest_error"] for r in rounds),
    }
    show(ratios, json)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__, use_underscores=True)
