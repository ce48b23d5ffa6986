"""Rollouts until the first right answer, beside a fixed number of rollouts for every question.

    python benchmarks/difficulty.py --json

Both ways run in one continuous batch, one after the other, with one engine and on the same
questions: what `data_prep.py difficulty` does, and the loop that it spares. Model, questions and
limits are the demo's. The last line has the ratios.
"""

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))

import difficulty
from records import read_questions
from retriever import open_retriever
from reward import PROMPTS, TAGS, score_episode
from rollout import Limits, open_rollout


def never_right(*arguments) -> dict:
    """In place of `score_episode`: every question is rolled out up to the cap."""
    return score_episode(*arguments) | {"acc_r": 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--demo", type=Path, default=Path("demo"), help="folder of `make demo`")
    add("--model", default="demo/stage1/model", help="Hugging Face folder")
    add("--questions", type=int, default=60)
    add("--max_rollouts", type=int, default=10, help="the cap, and the fixed number")
    add("--engine", default="vllm", help="vllm or transformers")
    add("--json", action="store_true", help="a JSON line for each way; the ratios in the last")
    args = parser.parse_args()
    questions = read_questions(args.demo / "train.jsonl")[: args.questions]
    search = open_retriever(str(args.demo / "passages.jsonl")).search
    limits = Limits(
        max_searches=3, documents_per_search=1, max_turn_tokens=48, max_context=768, temperature=0.7
    )
    rollout, encode = open_rollout(args.model, search, TAGS, PROMPTS["demo"], limits, args.engine)
    rows = {}
    for way, score in (("until right", score_episode), ("fixed", never_right)):
        if args.engine == "vllm":
            rollout.engine.llm.reset_prefix_cache()
        verdicts = {question["id"]: [] for question in questions}
        start = time.perf_counter()
        with patch.object(difficulty, "score_episode", score):
            rollouts = difficulty.roll_out_until_right(
                rollout, encode, questions, verdicts, args.max_rollouts, right="acc_r", seed=0
            )
            count = sum(1 for _ in rollouts)
        seconds = time.perf_counter() - start
        solved = Counter(len(each) for each in verdicts.values() if True in each)
        rows[way] = {
            "seconds": seconds,
            "rollouts": count,
            "solved by number": sorted(solved.items()),
        }
        line = {"name": way} | rows[way]
        print(json.dumps(line) if args.json else line, flush=True)
    ratios = {"name": "ratios"}
    for key in ("seconds", "rollouts"):
        ratios[f"{key}, fixed / until right"] = rows["fixed"][key] / rows["until right"][key]
    print(json.dumps(ratios) if args.json else ratios)


if __name__ == "__main__":
    main()
