"""The tiny model of tiny.py, and an engine that plays a script."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # over a tiny model threads mostly wait
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # without a network it would be asked again and again

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from tiny import make_model, make_world

from engine import Completion
from reward import TAGS
from rollout import Episode, Limits, Rollout

SLOWEST_FILES = """
    test_benchmarks test_families test_train test_checkpoint test_run_folder test_readme
""".split()


def pytest_collection_modifyitems(items):
    """Begin with the slowest files, so that two processes end at about the same time."""
    items.sort(key=lambda item: item.path.stem not in SLOWEST_FILES)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> str:
    """The folder of the tiny model."""
    folder = tmp_path_factory.mktemp("model")
    make_model(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer(model_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture
def world(tmp_path, model_folder, monkeypatch):
    """The tiny world in the current directory; the configuration of a run in it."""
    import policy

    monkeypatch.chdir(tmp_path)
    policy.start_distributed()
    return make_world(tmp_path, model_folder)


def end_turn(tokenizer, ids: list[int], stop: list[str]) -> tuple[list[int], str]:
    """The ids up to the token that completes a stop string, and that string; else all and "eos"."""
    for length in range(len(ids) + 1):
        text = tokenizer.decode(ids[:length])
        for stop_string in stop:
            if stop_string in text:
                return ids[:length], stop_string
    return ids, "eos"


class ScriptedEngine:
    """Answers the n-th turn of a sequence with the n-th text of the script; keeps its inputs.

    As a real engine it ends a turn with the token that completes a stop string. KEY in the text
    stands for the engine's key of the sequence.
    """

    def __init__(self, tokenizer, script: list[str], tags=TAGS):
        self.tokenizer, self.script, self.tags = tokenizer, script, tags
        self.waiting, self.given, self.stops = [], [], set()

    def submit(self, key, token_ids, *, max_tokens, stop, temperature, seed):
        turn = self.tokenizer.decode(token_ids).count(self.tags.documents.closing)
        self.stops.update(stop)
        self.given.append(list(token_ids))
        self.waiting.append((key, min(turn, len(self.script) - 1), max_tokens, stop))

    def step(self, count=1):
        """Finish the next `count` turns."""
        completions = []
        for key, turn, max_tokens, stop in self.waiting[:count]:
            text = self.script[turn].replace("KEY", str(key))
            ids = self.tokenizer.encode(text, add_special_tokens=False)
            sampled, ended_by = end_turn(self.tokenizer, ids[:max_tokens], stop)
            if ended_by == "eos" and len(ids) > max_tokens:
                ended_by = None
            completions.append(Completion(key, sampled, [-0.5] * len(sampled), ended_by))
        del self.waiting[:count]
        return completions


@pytest.fixture
def scripted(tokenizer):
    """Make a `ScriptedEngine` of a script."""
    return lambda script: ScriptedEngine(tokenizer, script)


def words(queries, k):
    """A search that finds one passage for every query."""
    return [[{"title": "T", "text": "words"}] for _ in queries]


@pytest.fixture
def play(tokenizer):
    """Roll out one episode against a script; returns (episode, engine)."""

    def run(script, search=words, queries=(), tags=TAGS, **limits):
        engine = ScriptedEngine(tokenizer, script, tags)
        limits = Limits(**{"max_context": 4000, **limits})
        rollout = Rollout(engine, tokenizer, search, tags, limits, deterministic=True)
        question = {"id": "0", "question": "q", "answers": ["a"]}
        prompt_ids = tokenizer.encode("Question: q\n<think>")
        episode = Episode(question, prompt_ids, queries=list(queries))
        (finished,) = rollout.run([episode])
        assert finished is episode
        return episode, engine

    return run
