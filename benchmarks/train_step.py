"""Tokens a second of one optimiser step, beside the bare model's forward and backward pass.

    python benchmarks/train_step.py --model demo/stage1/model \
        --episodes demo/stage1/trajectories.jsonl --json

The episodes are those that a run of train.py has recorded, all of them in one step. Three ways take
turns:

    step       train.py's: advantages, micro-batches, clipping, AdamW; sequences of a row share their
               common prefix
    unshared   the same, but every episode computes its whole sequence
    bare       what `unshared` cannot beat: the model in bf16, forward and backward, as many tokens
               in rows of one length, the head over as many positions; no padding, no optimiser, no
               FSDP

Tokens are those of the episodes, each with its prompt. The last line of --json has the ratios: the
median, the least and the greatest.
"""

import json
import random
import sys
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import reinforce_pp
import train
from benchmarks.timing import arguments, compare, take_turns
from config import PRESETS, Config
from policy import load_policy, peak_memory_gib, start_distributed
from reinforce_pp import pack, token_log_probs
from rollout import Episode


def read_episodes(path: str) -> list[Episode]:
    """Those of trajectories.jsonl, with rewards drawn so that every episode has a gradient."""
    episodes = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        del record["step"]
        episode = Episode(**record)
        episode.rewards["reward"] = random.Random(episode.seed).random()
        episodes.append(episode)
    return episodes


class Workload:
    """The episodes with train.py's trainer, and the bare model beside it."""

    def __init__(self, model: str, episodes: list[Episode], micro_batch_tokens: int):
        from transformers import AutoModelForCausalLM

        start_distributed()
        demo = PRESETS["demo"][1] | {"model": model, "micro_batch_tokens": micro_batch_tokens}
        demo["learning_rate"] = 1e-9
        self.config, self.episodes = Config(**demo), episodes
        self.trainer = train.Trainer(self.config, load_policy(model))
        self.plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        self.tokens = sum(len(e.token_ids) for e in episodes)
        self.actions = sum(sum(e.action_mask) for e in episodes)

    # Each way returns the number of tokens.

    def step(self) -> int:
        samples = self.config.samples_per_prompt
        batch = train.make_batch(self.episodes, samples, self.trainer.device)
        self.trainer.compute_advantages(batch)
        self.trainer.update(batch)
        return self.tokens

    def unshared(self) -> int:
        with patch.object(reinforce_pp, "MAX_SHARED_ROW", 0):
            return self.step()

    def bare(self) -> int:
        length = round(self.tokens / len(self.episodes))
        rows, left = self.config.micro_batch_tokens // length, len(self.episodes)
        head = self.plain.get_output_embeddings().weight
        while left:
            count = min(rows, left)
            left -= count
            ids = torch.randint(len(head), (count, length))
            hidden = self.plain.base_model(ids, use_cache=False).last_hidden_state
            actions = self.actions * count // len(self.episodes)
            chosen = torch.randint(count * length, (actions,))
            targets = torch.randint(len(head), chosen.shape)
            token_log_probs(hidden.flatten(0, 1)[chosen], head, targets).sum().backward()
        self.plain.zero_grad(set_to_none=True)
        return self.tokens

    def computed(self) -> tuple[int, int]:
        """Tokens that `step` computes, with and without padding."""
        padded = plain = 0
        batch = train.make_batch(self.episodes, self.config.samples_per_prompt, torch.device("cpu"))
        for rows in self.trainer.plan(batch, list(range(len(self.episodes)))):
            sequences = []
            for row in rows:
                members = [self.episodes[i] for i in row]
                sequences.append([(e.token_ids, e.action_mask) for e in members])
            padded += pack(sequences)["input_ids"].numel()
            plain += sum(pack([row])["input_ids"].numel() for row in sequences)
        return padded, plain

    def head(self) -> int:
        """The head's part of `bare`."""
        size = self.plain.config.hidden_size
        hidden = torch.randn(self.actions, size, dtype=torch.bfloat16, requires_grad=True)
        weight = self.plain.get_output_embeddings().weight
        targets = torch.randint(len(weight), (self.actions,))
        token_log_probs(hidden, weight, targets).sum().backward()
        return self.tokens


def main() -> None:
    args = arguments(
        __doc__,
        model="demo/stage1/model",
        episodes="demo/stage1/trajectories.jsonl",
        micro_batch_tokens=2048,
    )
    workload = Workload(args.model, read_episodes(args.episodes), args.micro_batch_tokens)
    for way in ("step", "bare"):  # warm up
        getattr(workload, way)()
    ways = {way: getattr(workload, way) for way in ("step", "unshared", "bare")}
    rates = take_turns(ways, args.repeats)
    padded, plain = workload.computed()
    with patch.object(reinforce_pp, "MAX_SHARED_ROW", 0):
        padded_unshared, plain_unshared = workload.computed()
    part = take_turns({"bare": workload.bare, "head": workload.head}, 1)
    facts = {
        "episodes": len(workload.episodes),
        "tokens": workload.tokens,
        "action_tokens": workload.actions,
        "computed_tokens": padded,
        "padding": 1 - plain / padded,
        "padding_unshared": 1 - plain_unshared / padded_unshared,
        "head_share": part["bare"][0] / part["head"][0],
        "peak_gib": peak_memory_gib(),
    }
    ratios = compare(rates, "step / bare", "unshared / bare")
    for row in (facts, {"name": "ratios"} | ratios):
        print(json.dumps(row) if args.json else row)


if __name__ == "__main__":
    main()
