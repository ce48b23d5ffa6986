"""Both stages on real questions over real passages, beside what needs no training.

    python benchmarks/real_questions.py --data DIR --model MODEL --out runs/real

DIR holds hotpotqa_500.jsonl and 2wiki_500.jsonl (the authors' data/eval_set) and
wiki_passages.jsonl, passages of Wikipedia to search ({"id", "title", "text"}). The questions of
both files are split by a seed: seven tenths to train on, one for validation, two held out. Recipe,
steps and checkpoint are chosen on validation. Stage 2 trains on the questions whose answer can be
found. The held-out questions are answered at the end: by the model untrained, after stage 1 and
after stage 2; then, untrained and after stage 2, from memory, after one search for the question
itself, and in the loop with an oracle. The command goes on where it stopped, and OUT/starts.log has
every start. It prints the table and the paired differences; OUT/curves.png and OUT/report.html show
the rest.
"""

import random
import sys
import time
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

import benchmarks.baselines as baselines
from answerability import in_first_passages
from benchmarks.measure import run_training
from evaluate import read_outputs
from metrics import measure
from records import read_questions, write_jsonl, write_text
from retriever import open_retriever
from tools.demo import make_prompt
from tools.report import page, plot

DATASETS = ("hotpotqa_500", "2wiki_500")
SHARES = {"train": 0.7, "validation": 0.1, "heldout": 0.2}

# One worked example of two searches; the film and the people are invented.
EXAMPLE = (
    "In which country was the director of the film Red Harbor born?",
    [
        (
            "Red Harbor",
            "Red Harbor is a 1962 drama film directed by Peter Lane.",
            "It was directed by Peter Lane.",
        ),
        (
            "Peter Lane",
            "Peter Lane (born 1921 in Cork, Ireland) was a film director.",
            "Peter Lane was born in Ireland.",
        ),
    ],
    "Ireland",
)
INSTRUCTIONS = {
    "search": "Answer each question with the help of a search engine. Ask for one fact at a time, "
    "with a few keywords. Then give a short answer.",
    "single": "Answer each question from what a search engine has found. Give a short answer.",
    "closed_book": "Answer each question from memory. Give a short answer.",
}
LIMITS = {
    "documents_per_search": 3,
    "max_searches": 3,
    "max_turn_tokens": 64,
    "max_document_tokens": 400,
    "max_context": 1792,
}
# Reinforce++ without a baseline needs more questions a step than this machine can answer.
COMMON = {"algorithm": "grpo", "learning_rate": 5e-6, "temperature": 0.8}
RECIPE = {1: COMMON | {"steps": 8}, 2: COMMON | {"steps": 28}}
FOUND = 5  # passages in which the answer of a question of stage 2 must stand


def split(data: Path, out: Path, seed: int) -> None:
    """Write the questions (train_2.jsonl: those of stage 2), the prompts and passages.jsonl."""
    questions = [q for name in DATASETS for q in read_questions(data / f"{name}.jsonl")]
    questions = [{**q, "id": f"{q['dataset']}-{q['id']}"} for q in questions]
    random.Random(seed).shuffle(questions)
    start = 0
    for name, share in SHARES.items():
        end = start + round(share * len(questions))
        write_jsonl(out / f"{name}.jsonl", questions[start:end])
        start = end
    for mode, instructions in INSTRUCTIONS.items():
        name = "prompt.txt" if mode == "search" else f"prompt_{mode}.txt"
        write_text(out / name, f"{instructions}\n\n{make_prompt(mode, [EXAMPLE])}")
    training = read_questions(out / "train.jsonl")
    chosen = choose_questions(training, data / "wiki_passages.jsonl")
    write_jsonl(out / "train_2.jsonl", chosen or training)
    (out / "passages.jsonl").symlink_to(data / "wiki_passages.jsonl")


def choose_questions(questions: list[dict], passages: Path) -> list[dict]:
    """Those whose answer stands in what a search for the question finds.

    The others, and "yes" and "no", would pay for guesses.
    """
    asked = [q for q in questions if not {a.lower() for a in q["answers"]} <= {"yes", "no"}]
    found = in_first_passages(open_retriever(str(passages)).search, asked, FOUND)
    return [question for question, is_found in zip(asked, found, strict=True) if is_found]


def answer(out: Path, model: str | Path, name: str, options: dict) -> list[Path]:
    """The loop and the baselines, of one model; their folders."""
    ways = {"search": baselines.LOOP}
    if name != "stage1":
        ways |= {way: baselines.BASELINES[way] for way in ("closed_book", "single", "oracle")}
    return [
        baselines.run(out, model, baseline, out / f"eval-{name}-{way}", options)
        for way, baseline in ways.items()
    ]


def report(out: Path, folders: list[Path]) -> None:
    """Write curves and page; print the table, and EM and F1 of stage 2 less those of each other."""
    runs = [out / f"stage{stage}" for stage in (1, 2)]
    plot(runs, folders, out / "curves.png")
    page([*runs, *folders], out / "report.html")
    outputs = {folder.name: read_outputs(folder / "transcripts.jsonl") for folder in folders}
    trained = "eval-stage2-search"
    own = outputs.pop(trained)
    for name, others in outputs.items():
        pairs = zip(own, others, strict=True)
        result = measure([{m: a[m] - b[m] for m in ("em", "f1")} for a, b in pairs])
        for metric, (low, high) in result["intervals"].items():
            interval = f"{100 * low:+.1f} to {100 * high:+.1f}"
            print(f"{trained} - {name}: {metric} {100 * result[metric]:+.1f} ({interval})")


def main(
    data: Path,
    model: str,
    out: Path = Path("runs/real"),
    seed: int = 0,
    steps: tuple[int, int] = (RECIPE[1]["steps"], RECIPE[2]["steps"]),
    eval_every: int = 4,
    limit: int = 0,
    engine: str = "vllm",
) -> None:
    """
    Args:
        data: folder with the questions and the passages
        model: Hugging Face folder or hub name
        out: folder to fill
        seed: of the split and of both stages
        steps: rollout batches of the stages
        eval_every: rollout batches between validations
        limit: answer only the first so many held-out questions
        engine: inference engine
    """
    data, out = data.resolve(), out.resolve()
    for name in (*DATASETS, "wiki_passages"):
        if not (data / f"{name}.jsonl").exists():
            sys.exit(f"real_questions.py: {data / name}.jsonl is not there; see --help")
    if not 0 < eval_every <= min(steps):
        sys.exit("real_questions.py: --eval_every must be from 1 to the steps of each stage")
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "starts.log", "a") as log:
        log.write(time.strftime("%Y-%m-%d %H:%M:%S\n"))
    if not (out / "passages.jsonl").exists():  # the last file of the split
        split(data, out, seed)
    models = {"untrained": model}
    for stage, questions in ((1, "train.jsonl"), (2, "train_2.jsonl")):
        options = RECIPE[stage] | LIMITS | {"steps": steps[stage - 1], "seed": seed}
        # A step takes minutes, and a checkpoint seconds.
        options |= {"eval_every": eval_every, "save_every": 1, "engine": engine}
        options |= {"stage": stage, "model": model, "questions": out / questions}
        run_training(out, out / f"stage{stage}", options)
        model = out / f"stage{stage}" / "model"
        models[f"stage{stage}"] = out / f"stage{stage}" / "model-best" if stage == 2 else model
    folders = []
    for name, path in models.items():
        folders += answer(out, path, name, LIMITS | {"limit": limit, "engine": engine})
    report(out, folders)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__, use_underscores=True)
