"""Rollouts until the first right answer, beside a fixed number each: `python benchmarks/difficulty.py --json`.

Each in one continuous batch, one after the other, with one engine, on the same questions: what `data_prep.py difficulty`
does, and the loop that it spares. Model, questions and limits are the demo's. The last line has the ratios.
"""

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))

import data_prep
import reward
from records import read_questions
from retriever import open_retriever
from rollout import Limits, Rollout, VLLMEngine, prompt_encoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="folder of `make demo`")
    parser.add_argument("--model", default="demo/stage1/model", help="Hugging Face folder")
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--max_rollouts", type=int, default=10, help="the cap, and the fixed number")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each way; the ratios in the last")
    args = parser.parse_args()
    from transformers import AutoTokenizer

    questions = read_questions(str(args.demo / "train.jsonl"))[: args.questions]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    limits = Limits(max_searches=3, documents_per_search=1, max_turn_tokens=48, max_context=768, temperature=0.7)
    search, engine = open_retriever(str(args.demo / "passages.jsonl")).search, VLLMEngine(args.model, 768, 0.9)
    rollout = Rollout(engine, tokenizer, search, reward.TAGS, limits, deterministic=True)
    encode, judge = prompt_encoder(tokenizer, reward.PROMPTS["demo"]), reward.judge
    options = argparse.Namespace(max_rollouts=args.max_rollouts, seed=0, right="acc_r", retriever="demo")
    rows = {}
    for way, grade in (("until right", judge), ("fixed", lambda *a: judge(*a) | {"acc_r": 0})):  # never right: to the cap
        engine.llm.reset_prefix_cache()
        verdicts, start = {q["id"]: [] for q in questions}, time.perf_counter()
        with patch.object(reward, "judge", grade):
            count = sum(1 for _ in data_prep.roll_out_until_right(rollout, encode, questions, verdicts, options))
        seconds, solved = time.perf_counter() - start, Counter(len(v) for v in verdicts.values() if True in v)
        rows[way] = {"seconds": seconds, "rollouts": count, "solved by number": sorted(solved.items())}
        print(json.dumps({"name": way} | rows[way]) if args.json else f"{way}: {rows[way]}", flush=True)
    ratios = {
        f"{key}, fixed / until right": rows["fixed"][key] / rows["until right"][key] for key in ("seconds", "rollouts")
    }
    print(json.dumps({"name": "ratios"} | ratios) if args.json else ratios)


if __name__ == "__main__":
    main()
