"""One optimiser step on the ranks that torchrun gives: `gradients.py MODEL OUT CASE`.

For test_train.py; the cases are those of `CASES` there.
"""

import json
import math
import os
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist

import packing
import train
from checkpoint import Progress
from config import Config
from policy import gather, load_policy, start_distributed
from rollout import Episode


def make_episodes(groups: int, samples: int, seed: int = 0) -> list[Episode]:
    """Episodes of uneven length with two turns each; the last group has one reward for all."""
    rng = random.Random(seed)

    def draw(low: int, high: int) -> list[int]:
        return [rng.randrange(3, 300) for _ in range(rng.randint(low, high))]

    episodes = []
    for group in range(groups):
        prompt = draw(20, 40)
        for _ in range(samples):
            episode = Episode({}, prompt)
            episode.add("prompt", prompt, "")
            for kind in ("policy", "documents", "policy"):
                ids = draw(1, 25)
                sampled = [-rng.random()] * len(ids) if kind == "policy" else None
                episode.add(kind, ids, "", sampled)
            alike = group == groups - 1 and groups > 1
            episode.rewards = {"reward": 1.0 if alike else rng.random()}
            episodes.append(episode)
    return episodes


def update_with_nan_on_rank_1(trainer: train.Trainer, batch: train.Batch, out: str) -> None:
    """Write what each rank says of the update."""
    parameters = list(trainer.policy.parameters())
    before = [p.to_local().clone() for p in parameters]
    plain = train.policy_loss
    if dist.get_rank() == 1:
        train.policy_loss = lambda *args: (plain(*args)[0] * math.nan, plain(*args)[1])
    trainer.compute_advantages(batch)
    metrics = trainer.update(batch, Progress())
    pairs = zip(before, parameters, strict=True)
    metrics["changed"] = any(not torch.equal(old, p.to_local()) for old, p in pairs)
    found = [each for share in gather([metrics]) for each in share]
    if dist.get_rank() == 0:
        kept = ("updates", "skipped_updates", "changed")
        Path(out).write_text(json.dumps([{name: each[name] for name in kept} for each in found]))


def write_gradients(trainer: train.Trainer, batch: train.Batch, out: str) -> None:
    everyone = list(range(len(batch.episodes)))
    trainer.compute_advantages(batch)
    micro_batches = len(trainer.plan(batch, everyone))
    trainer.backward(batch, everyone, batch.loss_mask.sum())
    gradients = {name: p.grad.full_tensor() for name, p in trainer.policy.named_parameters()}
    if dist.get_rank() == 0:
        torch.save({"gradients": gradients, "micro_batches": micro_batches}, out)


def main(model: str, out: str, case: str) -> None:
    start_distributed()
    groups, budget = 3, 110
    if case == "one":  # micro-batch, of plain rows
        groups, budget = 1, 4096
        packing.MAX_SHARED_ROW = 0
    config = Config(
        model=model,
        samples_per_prompt=3,
        prompts_per_step=groups,
        micro_batch_tokens=budget,
    )
    trainer = train.Trainer(config, load_policy(model, case == "checkpointing"))
    batch = train.make_batch(make_episodes(groups, 3), 3, trainer.device)
    run = update_with_nan_on_rank_1 if case == "nan" else write_gradients
    run(trainer, batch, out)
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
