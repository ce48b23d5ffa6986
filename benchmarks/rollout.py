"""Sampled tokens a second of the search loop, beside its limit and beside one barrier a turn.

    python benchmarks/rollout.py --model demo/stage1/model --json

Every trajectory has a prompt of its own, turns of drawn lengths and a documents block after every turn but the last, all as
long as the demo's. Four ways make sequences of the same lengths with as many sampled tokens, and take turns, so that noise
hits all alike:

    ours      rollout.Rollout over vLLM; results rejoin at a fixed engine step, so that a run repeats bit for bit
    eager     the same, but results rejoin as soon as they arrive
    bare      the limit: the engine alone; prompt and documents first, then all of the sampled tokens in one go
    barrier   the official code's: text in and out; all wait for the last of a turn, then compute the whole prefix again
"""

import json
import random
import sys
import time
from dataclasses import replace
from functools import partial, partialmethod
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.timing import arguments, compare, take_turns
from reward import TAGS
from rollout import Completion, Episode, Limits, Rollout, VLLMEngine

PROMPT, TURN, PASSAGE = 236, (11, 48), 20  # tokens, bounds of a turn's tokens, words: those of the demo's stage 1
# (trajectories, searches, latency in ms), each varied around the first
GRID = [(64, 2, 50), (64, 2, 200), (64, 2, 0), (64, 0, 50), (64, 1, 50), (64, 4, 50), (16, 2, 50), (256, 2, 50)]


class Workload(VLLMEngine):
    """The engine, but a turn ends after its drawn number of tokens; and a tokenizer that reads a query at the end of all."""

    def __init__(self, model: str):
        from transformers import AutoTokenizer

        super().__init__(model, max_context=1024)
        self.tokenizer, add = AutoTokenizer.from_pretrained(model), self.engine.add_request
        self.engine.add_request = lambda name, text, p, **more: setattr(p, "ignore_eos", True) or add(name, text, p, **more)

    def draw(self, trajectories: int, searches: int, latency: float) -> None:
        rng, decode = random.Random(0), self.tokenizer.decode
        words = [w for w in range(len(self.tokenizer)) if decode([w]).strip().isalpha()]
        self.passage = {"title": "T", "text": decode(rng.choices(words, k=PASSAGE))}
        self.search = lambda queries, k: time.sleep(latency) or [[self.passage] for _ in queries]
        self.prompts = [tuple(rng.choices(words, k=PROMPT)) for _ in range(trajectories)]
        self.lengths = [[rng.randint(*TURN) for _ in range(searches + 1)] for _ in range(trajectories)]  # of their turns
        self.documents = Rollout(self, self.tokenizer, self.search, TAGS, Limits())._encode_documents([self.passage])

    def decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids) + f"{TAGS.query[0]} red {TAGS.query[1]}"

    def submit(self, key, token_ids, **options):
        self.prompt_of[key] = prompt = tuple(token_ids[:PROMPT])
        stop = ["a stop string that", "the model never writes"]  # it would write the tags
        super().submit(key, token_ids, **options | {"max_tokens": self.left[prompt].pop(), "stop": stop})

    def step(self) -> list[Completion]:
        last = {key for key, prompt in self.prompt_of.items() if not self.left[prompt]}
        return [replace(c, stop=TAGS.answer[1] if c.key in last else TAGS.query[1]) for c in super().step()]

    def ours(self, deterministic: bool = True) -> None:
        self.prompt_of, self.left = {}, {p: n[::-1] for p, n in zip(self.prompts, self.lengths, strict=True)}
        rollout = Rollout(self, self.tokenizer, self.search, TAGS, Limits(max_context=1024), deterministic)
        rollout.tokenizer = self  # its `decode` is above
        episodes = rollout.run(Episode({}, list(prompt)) for prompt in self.prompts)
        assert sum(sum(e.action_mask) for e in episodes) == sum(map(sum, self.lengths))

    eager = partialmethod(ours, deterministic=False)

    def generate(self, inputs: list, lengths: list[int], **options) -> list:
        from vllm import SamplingParams

        params = [SamplingParams(max_tokens=length, ignore_eos=True, **options) for length in lengths]
        return self.llm.generate(inputs, params, use_tqdm=False)

    def bare(self) -> None:
        context = self.documents * (len(self.lengths[0]) - 1)
        self.generate([{"prompt_token_ids": [*p, *context]} for p in self.prompts], list(map(sum, self.lengths)))

    def barrier(self) -> None:
        texts = list(map(self.tokenizer.decode, self.prompts))
        for turn, lengths in enumerate(zip(*self.lengths, strict=True)):
            if turn:
                self.search(texts, 1)
                texts = [text + self.tokenizer.decode(self.documents) for text in texts]
            outputs = self.generate(texts, lengths, skip_reading_prefix_cache=True)
            texts = [text + o.outputs[0].text for text, o in zip(texts, outputs, strict=True)]

    def measure(self, repeats: int) -> dict:
        def afresh(way: str) -> int:
            self.llm.reset_prefix_cache()
            getattr(self, way)()
            return sum(map(sum, self.lengths))  # each way samples so many tokens

        rates = take_turns({way: partial(afresh, way) for way in ("ours", "eager", "bare", "barrier")}, repeats)
        return compare(rates, "ours / bare", "eager / bare", "ours / eager", "ours / barrier")


def main() -> None:
    args = arguments(__doc__, model="demo/stage1/model", cells=len(GRID))
    workload, ratios = Workload(args.model), {}
    workload.draw(8, 1, 0.0)
    workload.measure(1)  # warm up
    for trajectories, searches, latency in GRID[: args.cells]:
        workload.draw(trajectories, searches, latency / 1000)
        name, result = f"{trajectories} trajectories, {searches} searches, {latency} ms", workload.measure(args.repeats)
        ratios[name] = {key: value for key, value in result.items() if "/" in key}
        print(json.dumps({"name": name} | result) if args.json else f"{name}: {ratios[name]}", flush=True)
    print(json.dumps({"name": "ratios"} | ratios) if args.json else "")


if __name__ == "__main__":
    main()
