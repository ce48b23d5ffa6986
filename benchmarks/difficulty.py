"""Rollouts until the first right answer, beside a fixed number of rollouts for every question.

    python benchmarks/difficulty.py --json

Both ways run in one continuous batch, one after the other, with one engine and on the same
questions: what `data_prep.py difficulty` does, and the loop that it spares. Model, questions and
limits are those of the demo. The last line has the ratios.
"""

import sys
import time
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

import difficulty
from benchmarks.measure import show
from records import read_questions
from retriever import open_retriever
from reward import PROMPTS, TAGS, score_episode
from rollout import Limits, open_rollout

LIMITS = Limits(
    max_searches=3, documents_per_search=1, max_turn_tokens=48, max_context=768, temperature=0.7
)


def never_right(*arguments) -> dict:
    """In place of `score_episode`: every question is rolled out up to the cap."""
    return score_episode(*arguments) | {"acc_r": 0.0}


def main(
    demo: Path = Path("demo"), model: str = "demo/stage1/model", questions: int = 60,
    max_rollouts: int = 10, json: bool = False,
) -> None:  # fmt: skip
    asked = read_questions(demo / "train.jsonl")[:questions]
    search = open_retriever(str(demo / "passages.jsonl")).search
    rollout, encode = open_rollout(model, search, TAGS, PROMPTS["demo"], LIMITS)
    rows = {}
    for way, score in (("until right", score_episode), ("fixed", never_right)):
        rollout.engine.llm.reset_prefix_cache()
        verdicts = {question["id"]: [] for question in asked}
        start = time.perf_counter()
        with patch.object(difficulty, "score_episode", score):
            rollouts = difficulty.roll_out_until_right(
                rollout, encode, asked, verdicts, max_rollouts, right="acc_r", seed=0
            )
            count = sum(1 for _ in rollouts)
        seconds = time.perf_counter() - start
        solved = Counter(len(each) for each in verdicts.values() if True in each)
        rows[way] = {"name": way, "seconds": seconds, "rollouts": count}
        show(rows[way] | {"solved by number": sorted(solved.items())}, json)
    ratios = {"name": "ratios"}
    for key in ("seconds", "rollouts"):
        ratios[f"{key}, fixed / until right"] = rows["fixed"][key] / rows["until right"][key]
    show(ratios, json)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__, use_underscores=True)
