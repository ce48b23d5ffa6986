"""`token_log_probs` beside the straightforward log_softmax of all logits: time, peak memory, values and gradients.

    python benchmarks/log_probs.py --json

8,192 action tokens, Qwen's vocabulary, hidden size 512, fp32, forward and backward, in turns. The straightforward way takes
14 GiB. Memory is the peak above what was resident before. The last line of --json has the ratios.
"""

import gc
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.timing import arguments
from reinforce_pp import token_log_probs


def straightforward(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (hidden @ weight.T).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def resident_gib(field: str) -> float:
    """VmRSS, what is resident now, or VmHWM, its peak since the last `forget_peak`."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 2**20


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(function, hidden, weight, targets) -> tuple[float, float, list[torch.Tensor]]:
    """Seconds, peak GiB, and log-probabilities with the gradients of hidden states and weight."""
    inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    gc.collect()
    forget_peak()
    before, start = resident_gib("VmRSS"), time.perf_counter()
    log_probs = function(*inputs, targets)
    (log_probs * torch.linspace(-1, 1, len(targets))).mean().backward()
    seconds, peak = time.perf_counter() - start, resident_gib("VmHWM") - before
    return seconds, peak, [log_probs.detach(), *(x.grad for x in inputs)]


def main() -> None:
    args = arguments(__doc__, repeats=3, tokens=8192, vocabulary=152_064, hidden=512)
    torch.manual_seed(0)
    hidden = torch.randn(args.tokens, args.hidden)
    weight = torch.randn(args.vocabulary, args.hidden) / args.hidden**0.5
    targets = torch.randint(args.vocabulary, (args.tokens,))
    rounds = []
    for number in range(args.repeats):
        seconds, peak, ours = measure(token_log_probs, hidden, weight, targets)
        limit_seconds, limit_peak, theirs = measure(straightforward, hidden, weight, targets)
        # relative to the largest entry: gradients of a mean over thousands of tokens are small
        error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))
        rounds.append({"seconds": seconds, "gib": peak, "straightforward_seconds": limit_seconds})
        rounds[-1] |= {"straightforward_gib": limit_peak, "largest_error": error}
        del ours, theirs
        print(json.dumps({"name": f"round {number + 1}"} | rounds[-1]) if args.json else rounds[-1], flush=True)
    ratios = {
        "time": statistics.median(r["seconds"] / r["straightforward_seconds"] for r in rounds),
        "memory": statistics.median(r["gib"] / r["straightforward_gib"] for r in rounds),
        "largest_error": max(r["largest_error"] for r in rounds),
    }
    print(json.dumps({"name": "ratios"} | ratios) if args.json else f"ours / straightforward: {ratios}")


if __name__ == "__main__":
    main()
