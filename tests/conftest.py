"""The tiny model of tiny.py, and an engine that plays a script."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # over a tiny model threads mostly wait

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from tiny import make_model, make_world

from engine import Completion
from reward import TAGS
from rollout import Episode, Limits, Rollout


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


class ScriptedEngine:
    """Answers the n-th turn of a sequence with the n-th text of the script; keeps its inputs."""

    def __init__(self, tokenizer, script: list[str]):
        self.tokenizer, self.script, self.waiting, self.given = tokenizer, script, [], []

    def submit(self, key, token_ids, *, max_tokens, stop, temperature, seed):
        turn = self.tokenizer.decode(token_ids).count(TAGS.documents.closing)
        self.given.append(list(token_ids))
        self.waiting.append((key, min(turn, len(self.script) - 1), max_tokens, stop))

    def step(self, count=1):
        """Finish the next `count` turns."""
        completions = []
        for key, turn, max_tokens, stop in self.waiting[:count]:
            text = self.script[turn]
            ids = self.tokenizer.encode(text, add_special_tokens=False)
            ended_by = next((s for s in stop if s in text), "eos")
            if len(ids) > max_tokens:
                ids, ended_by = ids[:max_tokens], None
            completions.append(Completion(key, ids, [-0.5] * len(ids), ended_by))
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

    def run(script, search=words, **limits):
        engine = ScriptedEngine(tokenizer, script)
        limits = Limits(**{"max_context": 4000, **limits})
        rollout = Rollout(engine, tokenizer, search, TAGS, limits, deterministic=True)
        question = {"id": "0", "question": "q", "answers": ["a"]}
        episode = Episode(question, tokenizer.encode("Question: q\n<think>"))
        (finished,) = rollout.run([episode])
        assert finished is episode
        return episode, engine

    return run
