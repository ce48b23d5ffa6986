"""Tokens a second of one optimiser step, beside the limit: the bare model's forward and backward without padding.

    python benchmarks/train_step.py --model demo/stage1/model --episodes demo/stage1/trajectories.jsonl --json

The episodes are those that a run of train.py has recorded, all of them in one step. Three ways take turns:

    step       train.py's: prepare, micro-batches, clipping, AdamW; a prompt is computed once for its samples
    unshared   the same, but every episode computes its own prompt
    bare       what `unshared` cannot beat: the model in bf16, forward and backward, as many tokens in rows of one length,
               the head over as many positions; no padding, no optimiser, no FSDP

Tokens are those of the episodes, each with its prompt. The last line of --json has the ratios: medians over the repeats.
"""

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import reinforce_pp
import train
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

    def step(self, share: float = reinforce_pp.SHARE_PROMPT_FROM) -> float:
        """The share of padding."""
        reinforce_pp.SHARE_PROMPT_FROM, before = share, reinforce_pp.SHARE_PROMPT_FROM
        batch = Batch(self.episodes, self.config, self.device)
        train.optimize(batch, self.policy, None, self.optimizer)
        needed = computed = 0
        for rows in batch.plan(range(len(self.episodes))):
            members = [[self.episodes[i] for i in row] for row in rows]
            sequences = [[(e.token_ids, e.action_mask, len(e.prompt_ids)) for e in row] for row in members]
            computed += pack(sequences)["input_ids"].numel()
            needed += sum(pack([row])["input_ids"].numel() for row in sequences)
        reinforce_pp.SHARE_PROMPT_FROM = before
        return 1 - needed / computed

    def unshared(self) -> float:
        return self.step(share=float("inf"))

    def bare(self) -> float:
        length = round(self.tokens / len(self.episodes))
        rows, left = self.config.micro_batch_tokens // length, len(self.episodes)
        head = self.plain.get_output_embeddings().weight
        while left:
            count = min(rows, left)
            left -= count
            hidden = self.plain.base_model(torch.randint(1000, (count, length)), use_cache=False).last_hidden_state
            chosen = torch.randint(count * length, (self.actions * count // len(self.episodes),))
            targets = torch.randint(1000, chosen.shape)
            token_log_probs(hidden.flatten(0, 1)[chosen], head, targets).sum().backward()
        self.plain.zero_grad(set_to_none=True)
        return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo/stage1/model", help="Hugging Face folder")
    parser.add_argument("--episodes", default="demo/stage1/trajectories.jsonl", help="trajectories.jsonl of a demo run")
    parser.add_argument("--micro_batch_tokens", type=int, default=2048, help="default 2048, the demo's")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="a line of JSON for each way; the ratios in the last")
    args = parser.parse_args()
    workload = Workload(args.model, read_episodes(args.episodes), args.micro_batch_tokens)
    ways = ["step", "unshared", "bare"]
    rates, padding = {way: [] for way in ways}, {}
    for repeat in range(-1, args.repeats):  # one round to warm up
        for way in ways if repeat % 2 else ways[::-1]:
            start = time.perf_counter()
            padding[way] = getattr(workload, way)()
            if repeat >= 0:
                rates[way].append(workload.tokens / (time.perf_counter() - start))
    print(json.dumps({"episodes": len(workload.episodes), "tokens": workload.tokens, "action_tokens": workload.actions}))
    for way in ways:
        row = {"name": way, "tokens_per_s": statistics.median(rates[way]), "padding": padding[way]}
        print(json.dumps(row) if args.json else row)
    print(json.dumps({"peak_gib": train.peak_memory_gib()}))
    ratios = {way: sorted(a / b for a, b in zip(rates[way], rates["bare"], strict=True)) for way in ways[:2]}
    result = {f"{way} / bare": statistics.median(r) for way, r in ratios.items()}
    spread = {f"{way} / bare from to": [r[0], r[-1]] for way, r in ratios.items()}
    print(json.dumps({"name": "ratios"} | result | spread) if args.json else f"{result} {spread}")


if __name__ == "__main__":
    main()
