"""Tokens a second of one optimiser step, beside TRL's GRPO trainer on the same model and the same episodes.

    pip install trl==1.16.0 && python benchmarks/trl_step.py --model demo/stage1/model --json

TRL's rollout is replaced by the recorded episodes (`rollout_func`, documents masked by `env_mask`), so that a step of either
is advantages, forward, backward, clipping and AdamW, in bf16 compute over fp32 parameters. They take turns. TRL
pads every micro-batch of 8 episodes on both sides; ours is measured with and without a prompt's computation shared.
"""

import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.timing import arguments, compare
from benchmarks.train_step import Workload, read_episodes


def main() -> None:
    args = arguments(__doc__, model="demo/stage1/model", episodes="demo/stage1/trajectories.jsonl")
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    workload = Workload(args.model, read_episodes(args.episodes), micro_batch_tokens=2048)
    samples = workload.config.samples_per_prompt
    rates: dict[str, list[float]] = {"trl": [], "step": [], "unshared": []}

    def replay(prompts: list[str], trainer) -> dict[str, list]:
        """A prompt is the number of its group; its samples come in order."""
        taken: Counter[str] = Counter()
        chosen = []
        for prompt in prompts:
            chosen.append(workload.episodes[int(prompt) * samples + taken[prompt] % samples])
            taken[prompt] += 1
        start = [len(e.prompt_ids) for e in chosen]
        return {
            "prompt_ids": [e.prompt_ids for e in chosen],
            "completion_ids": [e.token_ids[n:] for e, n in zip(chosen, start, strict=True)],
            "logprobs": [e.log_probs[n:] for e, n in zip(chosen, start, strict=True)],
            "env_mask": [e.action_mask[n:] for e, n in zip(chosen, start, strict=True)],
            "reward": [e.rewards["reward"] for e in chosen],
        }

    class TakeTurns(TrainerCallback):
        """Times TRL's steps, and after each of them ours."""

        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            rates["trl"].append(workload.tokens / (time.perf_counter() - self.start))
            for way in ("step", "unshared"):
                start = time.perf_counter()
                getattr(workload, way)()
                rates[way].append(workload.tokens / (time.perf_counter() - start))

    groups = [str(i) for i in range(len(workload.episodes) // samples)]
    with tempfile.TemporaryDirectory() as folder:
        options = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=samples,
            gradient_accumulation_steps=len(groups),
            num_generations=samples,
            max_completion_length=workload.config.max_context,
            max_steps=args.repeats + 1,  # one to warm up
            learning_rate=1e-9,
            beta=0.0,
            temperature=workload.config.temperature,
            bf16=True,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        GRPOTrainer(
            model=args.model,
            processing_class=AutoTokenizer.from_pretrained(args.model),
            reward_funcs=lambda prompts, completions, reward, **_: reward,
            args=options,
            train_dataset=Dataset(InMemoryTable.from_pydict({"prompt": groups}), fingerprint="recorded"),
            rollout_func=replay,
            callbacks=[TakeTurns()],
        ).train()
    result = {"name": "ratios"} | compare({way: rate[1:] for way, rate in rates.items()}, "step / trl", "unshared / trl")
    print(json.dumps(result) if args.json else result)


if __name__ == "__main__":
    main()
