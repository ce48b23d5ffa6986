"""Tokens a second of one optimiser step, beside the bare model's forward and backward pass.

    python benchmarks/train_step.py --model demo/stage1/model \
        --episodes demo/stage1/trajectories.jsonl

The episodes are those that a run of train.py has recorded, all of them in one step. Four ways take
turns; their tokens are those of the episodes, each with its prompt:

    step       train.py's: advantages, micro-batches, clipping, AdamW; the sequences of a row share
               what they begin with alike
    unshared   the same, but every episode computes its whole sequence
    copying    as `step`, but FSDP copies weights and gradients for every micro-batch
    bare       what `unshared` cannot beat: the model, forward and backward, as many tokens in rows
               of one length, the head over as many positions; no padding, optimiser or FSDP
"""

import json
import random
import sys
from pathlib import Path
from unittest.mock import patch

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

import packing
from benchmarks.measure import compare, show, take_turns
from checkpoint import Progress
from config import PRESETS, Config
from engine import compute_dtype
from packing import pack, plan_micro_batches
from policy import Policy, load_policy, peak_memory_gib, start_distributed
from reinforce_pp import token_log_probs
from rollout import Episode
from train import Trainer, make_batch


def read_episodes(path: str) -> list[Episode]:
    """Those of trajectories.jsonl, with rewards drawn so that every episode has a gradient."""
    episodes = []
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            del record["step"]
            episode = Episode(**record)
            episode.rewards["reward"] = random.Random(episode.seed).random()
            episodes.append(episode)
    return episodes


class Workload:
    """The episodes with train.py's trainer, and the bare model beside it.

    `step`, `unshared`, `copying` and `bare` are ways: they return the number of tokens.
    """

    def __init__(self, model: str, episodes: list[Episode], micro_batch_tokens: int):
        from transformers import AutoModelForCausalLM

        start_distributed()
        options = {"model": model, "micro_batch_tokens": micro_batch_tokens, "learning_rate": 1e-9}
        self.config = Config(**PRESETS["demo"][1] | options)
        self.episodes = episodes
        self.trainer = Trainer(self.config, load_policy(model))
        plain = AutoModelForCausalLM.from_pretrained(model, dtype=compute_dtype())
        self.plain = plain.to(self.trainer.device)
        self.head_weight = self.plain.get_output_embeddings().weight
        self.tokens = sum(len(episode.token_ids) for episode in episodes)
        self.actions = sum(sum(episode.action_mask) for episode in episodes)

    def step(self) -> int:
        samples = self.config.samples_per_prompt
        batch = make_batch(self.episodes, samples, self.trainer.device)
        self.trainer.compute_advantages(batch)
        self.trainer.update(batch, Progress())
        return self.tokens

    def unshared(self) -> int:
        with patch.object(packing, "MAX_SHARED_ROW", 0):
            return self.step()

    def copying(self) -> int:
        with patch.object(Policy, "begin_micro_batch"):
            return self.step()

    def bare(self) -> int:
        left = len(self.episodes)
        length = round(self.tokens / left)
        while left:
            count = min(max(1, self.config.micro_batch_tokens // length), left)
            left -= count
            ids = torch.randint(len(self.head_weight), (count, length), device=self.plain.device)
            hidden = self.plain.base_model(ids, use_cache=False).last_hidden_state.flatten(0, 1)
            chosen = torch.randint(len(hidden), (self.actions * count // len(self.episodes),))
            targets = torch.randint(len(self.head_weight), chosen.shape, device=hidden.device)
            token_log_probs(hidden[chosen], self.head_weight, targets).sum().backward()
        self.plain.zero_grad(set_to_none=True)
        return self.tokens

    def facts(self) -> dict[str, float]:
        """Tokens in all, those that `step` computes, and the padding among these."""
        ids = {number: episode.token_ids for number, episode in enumerate(self.episodes)}
        padded = plain = 0
        for rows in plan_micro_batches(ids, self.config.micro_batch_tokens):
            packed = [[(ids[i], self.episodes[i].action_mask) for i in row] for row in rows]
            padded += pack(packed)["input_ids"].numel()
            plain += sum(pack([row])["input_ids"].numel() for row in packed)
        return {
            "episodes": len(self.episodes),
            "tokens": self.tokens,
            "action_tokens": self.actions,
            "computed_tokens": padded,
            "padding": 1 - plain / padded,
            "peak_gib": peak_memory_gib(),
        }


def main(
    model: str = "demo/stage1/model", episodes: str = "demo/stage1/trajectories.jsonl",
    micro_batch_tokens: int = 2048, repeats: int = 5,
) -> None:  # fmt: skip
    workload = Workload(model, read_episodes(episodes), micro_batch_tokens)
    ways = {name: getattr(workload, name) for name in ("step", "unshared", "copying", "bare")}
    take_turns(ways, 1)  # warm up
    rates = take_turns(ways, repeats)
    show(workload.facts())
    show({"name": "ratios"} | compare(rates, "step / bare", "unshared / bare", "step / copying"))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__, use_underscores=True)
