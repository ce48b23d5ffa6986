"""One optimiser step's gradients on the ranks that torchrun gives: `gradients.py MODEL OUT CASE`; see test_train.py."""

import json
import math
import os
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist

import reinforce_pp
import train
from rollout import Episode


def make_episodes(groups: int, samples: int, seed: int = 0) -> list[Episode]:
    """Episodes of uneven length with two turns each and a random reward; the last group has one reward for all."""
    rng = random.Random(seed)
    ids = lambda low, high: [rng.randrange(3, 300) for _ in range(rng.randint(low, high))]  # noqa: E731
    episodes = []
    for group in range(groups):
        prompt = ids(20, 40)
        for _ in range(samples):
            episode = Episode({}, prompt)
            episode.add("prompt", prompt, "")
            for kind in ("policy", "documents", "policy"):
                part = ids(1, 25)
                episode.add(kind, part, "", [-rng.random()] * len(part) if kind == "policy" else None)
            episode.rewards = {"reward": 1.0 if group == groups - 1 and groups > 1 else rng.random()}
            episodes.append(episode)
    return episodes


def optimize_with_nan_on_rank_1(batch: train.Batch, policy: train.Policy, out: str) -> None:
    """Write what each rank says of the update."""
    before, plain = [p.to_local().clone() for p in policy.parameters()], reinforce_pp.policy_loss
    if dist.get_rank() == 1:
        reinforce_pp.policy_loss = lambda *args: (plain(*args)[0] * math.nan, plain(*args)[1])
    metrics = train.optimize(batch, policy, None, torch.optim.AdamW(policy.parameters(), lr=1.0))
    changed = any(not torch.equal(a, p.to_local()) for a, p in zip(before, policy.parameters(), strict=True))
    found = [each for share in train.gather([metrics | {"changed": changed}]) for each in share]
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps([{k: each[k] for k in ("updates", "bad_updates", "changed")} for each in found]))


def write_gradients(batch: train.Batch, policy: train.Policy, out: str) -> None:
    batch.prepare(policy, None)
    micro_batches = len(batch.plan(list(range(len(batch.episodes)))))
    batch.backward(policy, list(range(len(batch.episodes))))
    gradients = {name: p.grad.full_tensor() for name, p in policy.named_parameters()}
    if dist.get_rank() == 0:
        torch.save({"gradients": gradients, "micro_batches": micro_batches}, out)


def main(model: str, out: str, case: str) -> None:
    device = train.start_distributed()
    groups, budget = (1, 4096) if case == "one" else (3, 110)
    config = train.Config(
        model=model,
        samples_per_prompt=3,
        prompts_per_step=groups,
        micro_batch_tokens=budget,
        gradient_checkpointing=case == "checkpointing",
    )
    policy = train.load_policy(config, device)
    batch = train.Batch(make_episodes(groups, 3), config, device, dist.get_rank(), dist.get_world_size(), dist.all_reduce)
    (optimize_with_nan_on_rank_1 if case == "nan" else write_gradients)(batch, policy, out)
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
