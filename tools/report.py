"""Training curves as a PNG and one HTML page of runs and evaluations."""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluate import read_results, record, table
from records import MALFORMED, read_jsonl, user_errors, write_text
from reward import FORMAT_RULES, TAGS
from rollout import Episode


def plot(args: argparse.Namespace) -> None:
    """Draw the training curves of runs, one after another, and print the evaluations beside each other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = ["reward", "search_rate", "format_rate", "f1", "response_len", "sampler_gap"]
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), sharex=True, constrained_layout=True)
    offset = 0
    for folder in args.runs:
        read = lambda r: {name: r[name] for name in ("step", *panels)} | {"id": r["step"]}  # noqa: E731
        rows = read_jsonl(folder / "metrics.jsonl", read, "metrics")
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


def read_for_page(text: bytes, source: str) -> dict:
    """JSON of a file of ours: NaN, which a browser's JSON lacks, is null; what is named like a key stays behind."""

    def without_keys(entries: dict) -> dict:
        return {name: value for name, value in entries.items() if not name.upper().endswith("API_KEY")}

    try:
        return json.loads(text, parse_constant=lambda name: None, object_hook=without_keys)
    except MALFORMED as error:
        raise ValueError(f"{source}: expected JSON, got {error!r:.200}") from None


def read_log(path: Path, limit: int | None = None) -> tuple[list[dict], int]:
    """`limit` records of a JSONL file, evenly spread over it, and how many it holds.

    A last line without its new line is left out: its run is still writing, or was killed while it did.
    """
    from tqdm import tqdm

    with open(path, "rb") as lines:
        total = sum(line.endswith(b"\n") for line in lines)
    kept = total if limit is None else min(limit, total)
    chosen = {i * total // kept for i in range(kept)}
    with open(path, "rb") as lines:
        shown = tqdm(enumerate(lines, 1), f"reading {path}", total, delay=2)
        return [read_for_page(line, f"{path}:{number}") for number, line in shown if number - 1 in chosen], total


def read_folder(folder: Path, limit: int) -> dict:
    """What the page shows of a folder of `train.py` or of `evaluate.py run`, with at most `limit` of its trajectories."""
    trained = not (folder / "metrics.json").exists()
    needed = ("config.json", "metrics.jsonl") if trained else ("metrics.json",)
    if missing := [name for name in needed if not (folder / name).exists()]:
        raise FileNotFoundError(f"{folder}: no evaluation (metrics.json), and no training run: {', '.join(missing)} missing")
    settings = read_for_page((folder / needed[0]).read_bytes(), str(folder / needed[0]))
    logs = ("trajectories.jsonl",) if trained else ("transcripts.judged.jsonl", "transcripts.jsonl")
    log = next((folder / name for name in logs if (folder / name).exists()), None)
    lines, total = read_log(log, limit) if log else ([], None)
    try:
        if trained:
            lines = [{"step": line.pop("step")} | record(Episode(**line)) for line in lines]
            parts = {"settings": settings, "metrics": read_log(folder / "metrics.jsonl")[0]}
        else:
            results = {name.removeprefix(f"{folder.name} "): result for name, result in read_results([folder]).items()}
            parts = {"settings": settings["protocol"], "results": results}
        lines = [line | {name: line[name] for name in ("question", "answers", "segments", "failed_rule")} for line in lines]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: not of this project, or of another version: {error!r}") from None
    return parts | {"name": folder.resolve().name, "trajectories": lines, "total": total}


def report(args: argparse.Namespace) -> None:
    """Write one HTML page of runs and evaluations: results, curves, trajectories, settings."""
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    head, _, tail = template.partition("DATA")
    if args.out.exists() and not args.out.read_bytes().startswith(f"{head}{{".encode()):
        raise ValueError(f"{args.out}: exists and is not such a report; give another --out")
    runs = [read_folder(folder, max(0, args.max_trajectories) // len(args.runs)) for folder in args.runs]
    if len({run["name"] for run in runs}) < len(runs):
        runs = [run | {"name": str(folder)} for run, folder in zip(runs, args.runs, strict=True)]
    rules = {rule.__name__: rule.__doc__ for rule in FORMAT_RULES}
    data = json.dumps({"tags": TAGS._asdict(), "rules": rules, "runs": runs})  # ASCII: U+2028 and the like are escaped
    for character in "<>&":  # so that no passage can close the script that holds it
        data = data.replace(character, f"\\u{ord(character):04x}")
    write_text(args.out, head + data + tail)
    print(f"report: {args.out}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    plot_parser = commands.add_parser("plot", help="training curves as a PNG, evaluations as a table")
    plot_parser.add_argument("--runs", type=Path, nargs="+", required=True, help="run folders of train.py, in order")
    plot_parser.add_argument("--evaluations", type=Path, nargs="*", default=[], help="--out folders of evaluate.py run")
    plot_parser.add_argument("--out", type=Path, default=Path("curves.png"))
    plot_parser.set_defaults(handler=plot)
    report_parser = commands.add_parser("report", help="one HTML page: curves, results, trajectories to read")
    report_parser.add_argument("runs", type=Path, nargs="+", help="folders of train.py or evaluate.py run, in order")
    report_parser.add_argument("--out", type=Path, required=True, help="the page; a report there already is replaced")
    report_parser.add_argument("--max_trajectories", type=int, default=2000, help="in equal shares (default 2000)")
    report_parser.set_defaults(handler=report)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    with user_errors("report.py"):
        args.handler(args)


if __name__ == "__main__":
    main()
