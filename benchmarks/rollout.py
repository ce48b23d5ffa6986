"""Sampled tokens a second of the search loop, beside its limit and beside one barrier a turn.

    python benchmarks/rollout.py --model demo/stage1/model

Every trajectory has a prompt of its own, turns of drawn lengths and a documents block after every
turn but the last, all as long as those of the demo. Four ways sample as many tokens in sequences of
the same lengths, and take turns:

    ours      rollout.Rollout over vLLM; documents rejoin at a fixed engine step
    eager     the same, but documents rejoin as soon as they arrive
    bare      the limit: the engine alone gets prompt and documents, then samples all tokens at once
    barrier   the official code's way: text in and out; all wait for the longest turn, then the
              engine computes the whole prefix again
"""

import random
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.measure import compare, show, take_turns
from engine import Completion, VLLMEngine
from reward import TAGS
from rollout import Episode, Limits, Rollout

# The lengths of the demo's stage 1.
PROMPT_TOKENS = 236
TURN_TOKENS = (11, 48)  # least and most
PASSAGE_WORDS = 20
LIMITS = Limits(max_context=1024)
# Trajectories, searches of each and latency of a search in ms; each varied around the first.
GRID = [(64, 2, 50), (64, 2, 200), (64, 2, 0), (64, 0, 50), (64, 1, 50), (64, 4, 50)]
GRID += [(16, 2, 50), (256, 2, 50)]


class Workload(VLLMEngine):
    """Trajectories of drawn lengths, and the ways to sample them.

    For `Rollout` it is the engine, whose turns end after their drawn number of tokens, and the
    tokenizer, which reads a query at the end of every turn.
    """

    def __init__(self, model: str):
        from transformers import AutoTokenizer

        super().__init__(model, LIMITS.max_context)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.add_request = self.engine.add_request
        self.engine.add_request = self.add_request_without_eos

    def add_request_without_eos(self, name, prompt, params, **options):
        params.ignore_eos = True
        self.add_request(name, prompt, params, **options)

    def draw(self, trajectories: int, searches: int, latency: float) -> None:
        """Draw prompts, lengths of turns and a passage; `latency` in seconds."""
        rng = random.Random(0)
        decode = self.tokenizer.decode
        words = [word for word in range(len(self.tokenizer)) if decode([word]).strip().isalpha()]
        self.latency = latency
        self.passage = {"title": "T", "text": decode(rng.choices(words, k=PASSAGE_WORDS))}
        self.turns: dict[tuple[int, ...], list[int]] = {}  # lengths in tokens, by prompt
        for _ in range(trajectories):
            prompt = tuple(rng.choices(words, k=PROMPT_TOKENS))
            self.turns[prompt] = [rng.randint(*TURN_TOKENS) for _ in range(searches + 1)]
        self.tokens = sum(map(sum, self.turns.values()))
        rollout = Rollout(self, self.tokenizer, self.search, TAGS, LIMITS)
        self.documents = rollout._encode_documents(Episode({}, []), [self.passage])

    # What `Rollout` calls.

    def search(self, queries: list[str], k: int) -> list[list[dict]]:
        time.sleep(self.latency)
        return [[self.passage] for _ in queries]

    def decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids) + f"{TAGS.query.opening} red {TAGS.query.closing}"

    def submit(self, key, token_ids, **options):
        self.left[key] = self.left_of_prompt[tuple(token_ids[:PROMPT_TOKENS])]
        options["max_tokens"] = self.left[key].pop(0)
        # As many stop strings as in a real rollout; the model could write the real ones.
        options["stop"] = ["a stop string that", "the model never writes"]
        super().submit(key, token_ids, **options)

    def step(self) -> list[Completion]:
        completions = []
        for completion in super().step():
            tag = TAGS.query if self.left[completion.key] else TAGS.answer
            completions.append(replace(completion, stop=tag.closing))
        return completions

    # The ways.

    def ours(self, deterministic: bool = True) -> None:
        self.left_of_prompt = {prompt: list(turns) for prompt, turns in self.turns.items()}
        self.left: dict[int, list[int]] = {}  # lengths of the turns to come, by the engine's key
        rollout = Rollout(self, self.tokenizer, self.search, TAGS, LIMITS, deterministic)
        rollout.tokenizer = self  # for `decode`
        episodes = rollout.run(Episode({}, list(prompt)) for prompt in self.turns)
        assert sum(sum(episode.action_mask) for episode in episodes) == self.tokens

    def eager(self) -> None:
        self.ours(deterministic=False)

    def bare(self) -> None:
        inputs = []
        for prompt, turns in self.turns.items():
            inputs.append({"prompt_token_ids": [*prompt, *self.documents * (len(turns) - 1)]})
        self.generate(inputs, map(sum, self.turns.values()))

    def barrier(self) -> None:
        texts = [self.tokenizer.decode(prompt) for prompt in self.turns]
        for turn, lengths in enumerate(zip(*self.turns.values(), strict=True)):
            if turn:
                self.search(texts, 1)
                texts = [text + self.tokenizer.decode(self.documents) for text in texts]
            outputs = self.generate(texts, lengths, skip_reading_prefix_cache=True)
            texts = [text + out.outputs[0].text for text, out in zip(texts, outputs, strict=True)]

    def generate(self, inputs: list, lengths, **options) -> list:
        from vllm import SamplingParams

        params = [SamplingParams(max_tokens=length, **options) for length in lengths]
        return self.llm.generate(inputs, params, use_tqdm=False)

    def run(self, way: str) -> int:
        """Sample all trajectories; returns the number of sampled tokens."""
        self.llm.reset_prefix_cache()
        getattr(self, way)()
        return self.tokens

    def measure(self, repeats: int) -> dict:
        ways = {way: partial(self.run, way) for way in ("ours", "eager", "bare", "barrier")}
        rates = take_turns(ways, repeats)
        return compare(rates, "ours / bare", "eager / bare", "ours / eager", "ours / barrier")


def main(model: str, cells: int = len(GRID), repeats: int = 5) -> None:
    """Measure the first `cells` settings of the grid."""
    workload = Workload(model)
    workload.draw(8, 1, 0.0)
    workload.measure(1)  # warm up
    ratios = {"name": "ratios"}
    for trajectories, searches, latency in GRID[:cells]:
        workload.draw(trajectories, searches, latency / 1000)
        name = f"{trajectories} trajectories, {searches} searches, {latency} ms"
        result = workload.measure(repeats)
        show({"name": name} | result)
        ratios[name] = {key: value for key, value in result.items() if " / " in key}
    show(ratios)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__, use_underscores=True)
