"""What the demo's trained model answers without its searches, or with another search engine.

    python benchmarks/baselines.py --demo demo

Each row is an `evaluate.py run` on the held-out questions, into DEMO/baselines; what is finished
there stays. The table begins with what `make demo` measured:

    closed_book     no search: what the model knows
    single          one search with the question itself, then the answer
    single-oracle   the same, but of a search engine that knows the answers
    random          the loop, with random passages
    oracle          the loop, with the search engine that knows the answers
"""

import sys
from contextlib import nullcontext
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

import evaluate
from benchmarks.measure import search_server
from config import PRESETS
from metrics import table

# By name: the mode of evaluate.py, its prompt, and flags of a search server, if one is needed.
BASELINES = {
    "closed_book": ("closed_book", "prompt_closed_book.txt", []),
    "single": ("single", "prompt_single.txt", []),
    "single-oracle": ("single", "prompt_single.txt", ["--control", "oracle"]),
    "random": ("search", "prompt.txt", ["--control", "random"]),
    "oracle": ("search", "prompt.txt", ["--control", "oracle"]),
}
LOOP = ("search", "prompt.txt", [])  # the loop itself, with which they are compared
# Of the preset: what a trajectory may use, as in training.
LIMITS = {
    name: PRESETS["demo"][2][name]
    for name in ("documents_per_search", "max_searches", "max_turn_tokens", "max_context")
}

# Always the same, since the URL is part of an evaluation's protocol.
PORT = 8931


def run(folder: Path, model: str | Path, baseline: tuple, out: Path, options: dict) -> Path:
    """Evaluate one baseline on the held-out questions of a folder; returns `out`.

    Args:
        baseline: LOOP, or one of BASELINES.
        options: further ones of `evaluate.py run`.
    """
    mode, prompt, flags = baseline
    passages, questions = folder / "passages.jsonl", folder / "heldout.jsonl"
    if "oracle" in flags:
        flags = [*flags, "--questions", questions]
    serve = search_server(passages, *flags, port=PORT) if flags else nullcontext((None, passages))
    with serve as (_, retriever):
        options = options | {"model": model, "questions": questions, "retriever": retriever}
        options |= {"prompt_file": folder / prompt, "out": out, "mode": mode}
        evaluate.main(["run", *(f"--{option}={value}" for option, value in options.items())])
    return out


def main(
    demo: Path = Path("demo"), model: Path | None = None, engine: str = "vllm",
) -> None:  # fmt: skip
    """
    Args:
        demo: folder that `make demo` filled
        model: DEMO/stage2/model-best by default
    """
    model = model or demo / "stage2" / "model-best"
    options = LIMITS | {"engine": engine}
    folders = sorted(file.parent for file in demo.glob("eval-*/metrics.json"))
    for name, baseline in BASELINES.items():
        folders.append(run(demo, model, baseline, demo / "baselines" / name, options))
    print(table(evaluate.read_results(folders)))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__, use_underscores=True)
