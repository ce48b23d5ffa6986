"""Tokens a second of one optimiser step, beside the limit: the bare model's forward and backward without padding.

    python benchmarks/train_step.py --model demo/stage1/model --episodes demo/stage1/trajectories.jsonl --json

The episodes are those that a run of train.py has recorded, all of them in one step. Three ways take turns:

    step       train.py's: prepare, micro-batches, clipping, AdamW; a prompt is computed once for its samples
    unshared   the same, but every episode computes its own prompt
    bare       what `unshared` cannot beat: the model in bf16, forward and backward, as many tokens in rows of one length,
               the head over as many positions; no padding, no optimiser, no FSDP

Tokens are those of the episodes, each with its prompt. The last line of --json has the ratios: median, least and greatest.
"""

import json
import math
import random
import sys
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import reinforce_pp
import train
from benchmarks.timing import arguments, compare, take_turns
from reinforce_pp import Batch, pack, token_log_probs
from rollout import Episode


def read_episodes(path: str) -> list[Episode]:
    """Those of trajectories.jsonl, with rewards drawn so that every one has an advantage and is computed."""
    records = map(json.loads, Path(path).read_text(encoding="utf-8").splitlines())
    episodes = [Episode(**{name: value for name, value in r.items() if name != "step"}) for r in records]
    for episode in episodes:
        episode.rewards["reward"] = random.Random(episode.seed).random()
    return episodes


class Workload:
    """The episodes in train.py's policy, and the bare model beside it."""

    def __init__(self, model: str, episodes: list[Episode], micro_batch_tokens: int):
        from transformers import AutoModelForCausalLM

        demo = train.PRESETS["demo"][1] | dict(model=model, micro_batch_tokens=micro_batch_tokens)
        self.config, self.episodes, self.device = train.Config(**demo), episodes, train.start_distributed()
        self.policy = train.load_policy(self.config, self.device)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-9, fused=True)
        self.plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        self.tokens = sum(len(e.token_ids) for e in episodes)
        self.actions = sum(sum(e.action_mask) for e in episodes)

    # each way returns the number of tokens

    def step(self) -> int:
        train.optimize(Batch(self.episodes, self.config, self.device), self.policy, None, self.optimizer)
        return self.tokens

    def unshared(self) -> int:
        with patch.object(reinforce_pp, "SHARE_PROMPT_FROM", math.inf):
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
            chosen = torch.randint(count * length, (self.actions * count // len(self.episodes),))
            targets = torch.randint(len(head), chosen.shape)
            token_log_probs(hidden.flatten(0, 1)[chosen], head, targets).sum().backward()
        self.plain.zero_grad(set_to_none=True)
        return self.tokens

    def padding(self) -> float:
        """The share of padding in what `step` computes."""
        batch, needed, computed = Batch(self.episodes, self.config, self.device), 0, 0
        for rows in batch.plan(list(range(len(self.episodes)))):
            members = [[self.episodes[i] for i in row] for row in rows]
            sequences = [[(e.token_ids, e.action_mask, len(e.prompt_ids)) for e in row] for row in members]
            computed += pack(sequences)["input_ids"].numel()
            needed += sum(pack([row])["input_ids"].numel() for row in sequences)
        return 1 - needed / computed

    def head(self) -> float:
        """The share of `bare` that is the head's."""
        hidden = torch.randn(self.actions, self.plain.config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        weight = self.plain.get_output_embeddings().weight
        targets = torch.randint(len(weight), (self.actions,))
        ways = {"bare": self.bare, "head": lambda: token_log_probs(hidden, weight, targets).sum().backward() or self.tokens}
        rates = take_turns(ways, 1)
        return rates["bare"][0] / rates["head"][0]


def main() -> None:
    args = arguments(__doc__, model="demo/stage1/model", episodes="demo/stage1/trajectories.jsonl", micro_batch_tokens=2048)
    workload = Workload(args.model, read_episodes(args.episodes), args.micro_batch_tokens)
    for way in ("step", "bare"):  # warm up
        getattr(workload, way)()
    rates = take_turns({way: getattr(workload, way) for way in ("step", "unshared", "bare")}, args.repeats)
    facts = {"episodes": len(workload.episodes), "tokens": workload.tokens, "action_tokens": workload.actions}
    with patch.object(reinforce_pp, "SHARE_PROMPT_FROM", math.inf):
        facts["padding_unshared"] = workload.padding()
    facts |= {"padding": workload.padding(), "head_share": workload.head(), "peak_gib": train.peak_memory_gib()}
    ratios = compare(rates, "step / bare", "unshared / bare")
    for row in (facts, {"name": "ratios"} | ratios):
        print(json.dumps(row) if args.json else row)


if __name__ == "__main__":
    main()
