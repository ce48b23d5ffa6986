"""Evaluation: `python evaluate.py run` answers a question file with a model and a retriever and scores the answers.

It uses the loop, the prompt and the rules of training (the official code has other prompts, stops and caps in training than
in evaluation). Every question of the file is answered and counted, in the file's order; decoding is greedy by default.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from retriever import open_retriever, read_jsonl, read_questions, user_errors, write_jsonl
from reward import FORMAT_RULES, METRICS, PROMPTS, TAGS, judge, load_prompt
from rollout import Episode, Limits, Rollout, derive_seed, make_engine, prompt_encoder


def grade(episode: Episode, reward: str) -> None:
    """Judge a finished episode, in training and in evaluation alike."""
    episode.rewards = judge(episode.segments, len(episode.queries), episode.question["answers"], reward)


def record(episode: Episode) -> dict:
    """One line of `transcripts.jsonl`; the episode must have been judged."""
    return {
        **episode.question,
        **episode.rewards,
        "searches": len(episode.queries),
        "queries": episode.queries,
        "finish_reason": episode.finish_reason,
        "search_failures": episode.search_failures,
        "response_len": sum(episode.action_mask),
        "segments": episode.segments,
    }


def summarize(records: list[dict]) -> dict[str, float]:
    """The README's metrics of answers, searches and format over the records of finished episodes."""

    def mean(values: Iterable[float]) -> float:
        return sum(values) / len(records)

    rules = [rule.__name__ for rule in FORMAT_RULES]

    return {
        "n": len(records),
        "reward": mean(r["reward"] for r in records),
        **{name: mean(r[name] for r in records) for name in METRICS},
        "search_rate": mean(r["searches"] > 0 for r in records),
        "searches": mean(r["searches"] for r in records),
        "format_rate": mean(r["failed_rule"] is None for r in records),
        **{f"failed_{rule}": mean(r["failed_rule"] == rule for r in records) for rule in rules},
        "truncated_rate": mean(r["finish_reason"] == "length" for r in records),
        "response_len": mean(r["response_len"] for r in records),
        "search_failures": sum(r["search_failures"] for r in records) / max(1, sum(r["searches"] for r in records)),
    }


def summarize_by_dataset(records: list[dict]) -> dict[str, dict[str, float]]:
    """`summarize` of each dataset among the records, and of all of them as "all"."""
    names = sorted({r["dataset"] for r in records})
    parts = {name: summarize([r for r in records if r["dataset"] == name]) for name in names}
    return parts if len(parts) == 1 else parts | {"all": summarize(records)}


def answer(rollout: Rollout, encode, questions: list[dict], seed: int = 0, reward: str = "stage2") -> Iterable[dict]:
    """Roll the questions out and yield a judged record for each as it finishes."""
    episodes = (Episode(q, encode(q["question"]), seed=derive_seed(seed, i)) for i, q in enumerate(questions))
    for episode in rollout.run(episodes):
        grade(episode, reward)
        yield record(episode)


def read_results(folders: list[Path]) -> dict[str, dict[str, float]]:
    """The results of several evaluations, by folder and dataset."""
    saved = {folder.name: json.loads((folder / "metrics.json").read_text())["results"] for folder in folders}
    return {f"{folder} {dataset}": result for folder, results in saved.items() for dataset, result in results.items()}


def table(results: dict[str, dict[str, float]]) -> str:
    """Results by name as an aligned table: percent for shares, plain numbers for counts."""
    columns = ["n", "em", "f1", "acc_r", "search_rate", "searches", "format_rate", "truncated_rate"]
    plain = {"n": "{:d}", "searches": "{:.2f}"}
    rows = [["", *columns]]
    for name, result in results.items():
        rows.append([name, *(plain.get(c, "{:.1%}").format(result[c]) for c in columns)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])] for name, *cells in rows]
    return "\n".join("  ".join(line) for line in lines)


def run(args: argparse.Namespace) -> None:
    """Answer, score, write `transcripts.jsonl` and `metrics.json` into `--out`."""
    import torch
    from tqdm import tqdm
    from transformers import AutoTokenizer

    questions = read_questions(args.questions)[: args.limit or None]
    search = open_retriever(args.retriever).search
    args.out.mkdir(parents=True, exist_ok=True)
    protocol = {key: str(value) for key, value in vars(args).items() if key not in ("out", "handler")}
    metrics_file, transcripts = args.out / "metrics.json", args.out / "transcripts.jsonl"
    if metrics_file.exists():
        done = json.loads(metrics_file.read_text())
        if done["protocol"] != protocol:
            raise ValueError(f"{metrics_file}: holds another evaluation; give another --out")
        print(f"{args.out}: evaluated already")
    else:
        limits = Limits(**{name: getattr(args, name) for name in Limits.__dataclass_fields__})
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        encode = prompt_encoder(tokenizer, load_prompt(args.prompt_file))
        engine = make_engine(args.engine, args.model, args.max_context, args.gpu_memory_utilization)
        rollout = Rollout(engine, tokenizer, search, TAGS, limits, deterministic=not torch.cuda.is_available())
        records = list(tqdm(answer(rollout, encode, questions, args.seed), "evaluate", len(questions), unit="q"))
        order = {q["id"]: i for i, q in enumerate(questions)}
        records.sort(key=lambda r: order[r["id"]])
        write_jsonl(transcripts, records)
        done = {"protocol": protocol, "results": summarize_by_dataset(records)}
        metrics_file.write_text(json.dumps(done, indent=1))
    print(table(done["results"]))
    print(f"transcripts: {transcripts}\nmetrics: {metrics_file}")


def plot(args: argparse.Namespace) -> None:
    """Draw the training curves of runs, one after another, and print the evaluations beside each other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = ["reward", "search_rate", "format_rate", "f1", "response_len", "sampler_gap"]
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), sharex=True, constrained_layout=True)
    offset = 0
    for folder in args.runs:
        rows = read_jsonl(folder / "metrics.jsonl", lambda r: r | {"id": r["step"]}, "metrics")
        for name, axis in zip(panels, axes.flat, strict=True):
            axis.plot([offset + r["step"] for r in rows], [r[name] for r in rows], label=folder.name)
            axis.set_title(name)
            axis.grid(alpha=0.3)
        offset += rows[-1]["step"]
    axes[0, 0].legend()
    for axis in axes[1]:
        axis.set_xlabel("rollout batches")
    figure.savefig(args.out, dpi=120)
    for folder in args.runs:
        print(f"{folder.name}: {folder / 'model'}, {folder / 'metrics.jsonl'}, {folder / 'trajectories.jsonl'}")
    for folder in args.evaluations:
        print(f"{folder.name}: {folder / 'transcripts.jsonl'}, {folder / 'metrics.json'}")
    print(f"curves: {args.out}")
    if args.evaluations:
        print(table(read_results(args.evaluations)))


def add_rollout_arguments(parser: argparse.ArgumentParser) -> None:
    """What a rollout needs: model, retriever, prompt, limits."""
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face folder")
    add("--retriever", required=True, help="passage file (JSONL), index folder, search server URL or web:PROVIDER")
    add("--prompt_file", default="base", help=f"one of {', '.join(PROMPTS)}, or a text file with {{question}} in it")
    add("--engine", default="vllm", choices=["vllm", "transformers"])
    add("--gpu_memory_utilization", type=float, default=0.9, help="the engine's share of the GPU")
    add("--seed", type=int, default=0, help="of the sampling, if any")
    defaults = Limits(documents_per_search=5, temperature=0.0)  # 5 documents at evaluation (official code)
    for name in Limits.__dataclass_fields__:
        value = getattr(defaults, name)
        add(f"--{name}", type=type(value), default=value, help=f"default {value}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run_parser = commands.add_parser("run", help="answer a question file and score the answers")
    add_rollout_arguments(run_parser)
    run_parser.add_argument("--questions", required=True, help="question file (JSONL)")
    run_parser.add_argument("--limit", type=int, default=0, help="only the first so many questions; 0 is all")
    run_parser.add_argument("--out", type=Path, required=True, help="folder for transcripts.jsonl and metrics.json")
    run_parser.set_defaults(handler=run)
    plot_parser = commands.add_parser("plot", help="training curves as a PNG, evaluations as a table")
    plot_parser.add_argument("--runs", type=Path, nargs="+", required=True, help="run folders of train.py, in order")
    plot_parser.add_argument("--evaluations", type=Path, nargs="*", default=[], help="--out folders of evaluate.py run")
    plot_parser.add_argument("--out", type=Path, default=Path("curves.png"))
    plot_parser.set_defaults(handler=plot)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    with user_errors("evaluate.py"):
        args.handler(args)


if __name__ == "__main__":
    main()
