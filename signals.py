"""What shows a collapse before the reward does, and which evaluation of a run was the best.

Runs of this kind collapse in an order (Search-R1 issues 88 and 188; RAGEN issue 52): first the
likelihood of right answers falls, then entropy or length runs away, then the reward goes, and the
last checkpoint is the worst. A signal that has no data yet is left out of the metrics.

Shapes: B episodes, T tokens, N tokens that were trained on.
"""

import math

import numpy as np
from torch import Tensor

from rollout import Episode

# The probe is the run's first PROBE_SIZE correct trajectories. It stays fixed from then on: the
# log-probability of fresh samples would follow the entropy alone.
PROBE_SIZE = 32


def extend_probe(probe: list[dict], episodes: list[Episode]) -> list[dict]:
    """The probe with the episodes that were right (EM = 1, right format), while it has room."""
    right = []
    for e in episodes:
        if e.rewards["em"] == 1 and e.rewards["failed_rule"] is None:
            right.append({"token_ids": e.token_ids, "action_mask": e.action_mask})
    return probe + right[: PROBE_SIZE - len(probe)]


def of_episodes(episodes: list[Episode]) -> dict[str, float]:
    """Entropy of the policy, from the log-probabilities of what it sampled."""
    sampled = sum(sum(e.action_mask) for e in episodes)
    if not sampled:
        return {}
    return {"entropy": -sum(sum(e.log_probs) for e in episodes) / sampled}


def of_advantages(rewards: Tensor, advantages: Tensor, loss_mask: Tensor) -> dict[str, float]:
    """How much there is to learn from a batch.

    Args:
        rewards: (groups, samples).
        advantages: (B, T).
        loss_mask: (B, T).
    """
    signals = {}
    if loss_mask.any():
        signals["advantages_std"] = advantages[loss_mask].std(correction=0).item()
    if rewards.shape[1] > 1:
        is_equal = (rewards == rewards[:, :1]).all(1)
        signals["frac_reward_zero_std"] = is_equal.double().mean().item()
    return signals


def of_sampler(log_ratio: Tensor, sampler_clip: float) -> dict[str, float]:
    """How far the sampler is from the policy.

    Args:
        log_ratio: (N,) log pi_old - log pi_sampler of at least one token.
    """
    gap = log_ratio.abs().cpu().numpy()
    signals = {
        "sampler_gap": float(gap.mean()),
        "sampler_gap_p99": float(np.percentile(gap, 99)),
    }
    if sampler_clip:
        signals["sampler_clip_frac"] = float((gap > math.log(sampler_clip)).mean())
    return signals


# --------------------------------------------------------------------------------------------------
# Evaluations of a run: a list of {"step", "eval_reward"}, with "log_prob_right" once there is a
# whole probe.


def best_evaluation(evaluations: list[dict]) -> dict | None:
    """The evaluation with the highest reward, the first of several; None without any."""
    return max(evaluations, key=lambda evaluation: evaluation["eval_reward"], default=None)


def note_evaluation(evaluations: list[dict], metrics: dict[str, float]) -> list[dict]:
    """`evaluations`, with that of these metrics appended if their step was evaluated."""
    if "eval_reward" not in metrics:
        return evaluations
    names = ("step", "eval_reward", "log_prob_right")
    return [*evaluations, {name: metrics[name] for name in names if name in metrics}]


def find_collapse(evaluations: list[dict], drop: float, count: int) -> str:
    """A sentence if each of the last `count` evaluations has a collapsed `log_prob_right`.

    Collapsed is more than `drop` below its best. Else, and if `drop` is 0, the empty string.
    """
    values = [each["log_prob_right"] for each in evaluations if "log_prob_right" in each]
    best = max(values, default=0.0)
    if not drop or len(values) < count or max(values[-count:]) >= best - drop:
        return ""
    return (
        f"log_prob_right is {values[-1]:.2f} at step {evaluations[-1]['step']}, and for {count} "
        f"evaluations it has been more than {drop} below its best, {best:.2f}"
    )
