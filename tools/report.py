"""Curves of training as PNGs, a table of evaluations, and one HTML page of runs and evaluations.

python tools/report.py plot --runs RUN RUN --evaluations DIR DIR --out curves.png
python tools/report.py learning demo demo-seed1 demo-seed2 --out learning.png
python tools/report.py page RUN RUN DIR --out report.html
"""

import json
import math
import sys
from pathlib import Path

import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluate import read_metrics, read_results
from metrics import episode_record, table
from records import read_jsonl, reraise_corrupt, user_errors, write_text
from reward import FORMAT_RULES, TAGS
from rollout import Episode

# --------------------------------------------------------------------------------------------------
# Reading and drawing


def read_batches(folders: list[Path]) -> list[dict[int, dict]]:
    """Metrics of runs that follow one another, by rollout batch as counted over all of them."""
    runs, end = [], 0
    for folder in folders:
        rows = read_jsonl(folder / "metrics.jsonl", dict, "metrics", key="step")
        runs.append({end + row["step"]: row for row in rows})
        end += rows[-1]["step"]
    return runs


def draw_band(axis, runs: list[dict[int, dict]], name: str, **style) -> None:
    """Draw a metric's mean over runs, in the batches in which all have it, and its range."""
    steps = [step for step in runs[0] if all(name in run.get(step, {}) for run in runs)]
    values = [[run[step][name] for run in runs] for step in steps]
    (line,) = axis.plot(steps, [sum(of_step) / len(runs) for of_step in values], **style)
    least, most = [min(of_step) for of_step in values], [max(of_step) for of_step in values]
    axis.fill_between(steps, least, most, color=line.get_color(), alpha=0.2, linewidth=0)


# --------------------------------------------------------------------------------------------------
# plot

# Of these metrics the last two and those of evaluations are not in every line.
PANELS = """
    reward search_rate format_rate f1 response_len entropy log_prob_right sampler_gap
""".split()


def plot(
    runs: list[Path], evaluations: tuple[Path, ...] = (), out: Path = Path("curves.png")
) -> None:
    """Draw the training curves of runs, one after another, and print a table of evaluations.

    Dots are of the validation questions.

    Args:
        runs: run folders of train.py, in order
        evaluations: --out folders of evaluate.py run
        out: the PNG
    """
    from matplotlib.figure import Figure

    if not runs:
        raise ValueError("--runs: no run folder is given")
    figure = Figure(figsize=(15, 6), layout="constrained")
    axes = figure.subplots(2, 4, sharex=True)
    for number, (folder, rows) in enumerate(zip(runs, read_batches(runs), strict=True)):
        color = f"C{number}"
        for name, axis in zip(PANELS, axes.flat, strict=True):
            draw_band(axis, [rows], name, color=color, label=folder.name)
            draw_band(axis, [rows], f"eval_{name}", color=color, marker="o", linestyle=":")
            axis.set_title(name)
            axis.grid(alpha=0.3)
    axes[0, 0].legend()
    for axis in axes[1]:
        axis.set_xlabel("rollout batches")
    figure.savefig(out, format="png", dpi=120)
    print(f"curves: {out}")
    if evaluations:
        print(table(read_results(evaluations)))


# --------------------------------------------------------------------------------------------------
# learning: the demo's first picture

STAGES = ("stage1", "stage2")
# The panels of `learning`: a title, and labels of metrics.
LEARNING = {
    "samples in training": {"search_rate": "searches", "format_rate": "right format"},
    "F1 of one-hop validation questions, greedy": {
        f"eval_f1_demo-1hop-{word}": word for word in ("who", "what", "where")
    },
    "F1 of two-hop validation questions, greedy": {
        f"eval_f1_demo-2hop-{word}": word for word in ("who", "what", "where")
    },
}


# Evaluations of `make demo`; the numbers at their ends are steps.
EVALUATIONS = {
    "untrained": "eval-untrained",
    "after stage 1": "eval-stage1-*",
    "after stage 2": "eval-stage2-*",
}


def learning_table(folders: list[Path]) -> str:
    """F1 by kind of question in Markdown: a column with intervals a folder, and the mean."""
    lines = [f"| F1 of held-out questions | {' | '.join(f.name for f in folders)} | mean |"]
    lines.append("|---" * (len(folders) + 2) + "|")
    for name, pattern in EVALUATIONS.items():
        found: dict[str, list[dict]] = {}  # by data set, a result of each folder
        for folder in folders:
            evaluated = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
            if not evaluated:
                raise ValueError(f"{folder}: no {pattern}, so `make demo` has not ended here")
            for dataset, result in read_metrics(evaluated[-1] / "metrics.json")["results"].items():
                found.setdefault(dataset, []).append(result)
        for dataset, results in found.items():
            cells = []
            for result in results:
                low, high = result["intervals"]["f1"]
                cells.append(f"{result['f1']:.3f} ({low:.2f}-{high:.2f})")
            mean = sum(result["f1"] for result in results) / len(results)
            lines.append(f"| {name}, {dataset} | {' | '.join(cells)} | {mean:.3f} |")
    return "\n".join(lines)


def learning(folders: tyro.conf.Positional[list[Path]], out: Path = Path("learning.png")) -> None:
    """Draw how the demo learns to search, then the format, then the answers; print what it ends at.

    Of several folders, one a seed, the mean is drawn, and a band from the least to the most.

    Args:
        folders: what `make demo` filled, with stage1/ and stage2/
        out: the PNG
    """
    from matplotlib.figure import Figure

    if not folders:
        raise ValueError("no folder is given")
    told = learning_table(folders)  # before the picture: a refusal writes nothing
    stages = [read_batches([folder / stage for stage in STAGES]) for folder in folders]
    runs = [first | second for first, second in stages]
    end, *others = {max(first) for first, _ in stages}
    if others:
        raise ValueError("the stages 1 of the folders have different numbers of steps")
    figure = Figure(figsize=(15, 3.6), layout="constrained")
    axes = figure.subplots(1, len(LEARNING), sharex=True, sharey=True)
    for axis, (title, metrics) in zip(axes, LEARNING.items(), strict=True):
        for name, label in metrics.items():
            draw_band(axis, runs, name, label=label)
        axis.axvline(end + 0.5, color="grey", linestyle=":")
        axis.set_title(title)
        axis.set_xlabel(f"rollout batches (stage 2 from {end + 1})")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(out, format="png", dpi=120)
    print(told)
    print(f"learning: {out}")


# --------------------------------------------------------------------------------------------------
# page: report.html is the template; the data enters it as JSON


def read_log(path: Path, limit: float = math.inf) -> tuple[list[dict], int | None]:
    """At most `limit` records of a JSONL file, evenly spread over it, and how many it holds.

    A last line without its line end is left out: its run is still writing it, or was killed. Where
    there is no file the count is None.
    """
    if not path.exists():
        return [], None
    with open(path, "rb") as lines:
        total = sum(line.endswith(b"\n") for line in lines)
    kept = min(limit, total)
    chosen = {i * total // kept for i in range(kept)}
    records = []
    with open(path, "rb") as lines:
        for i, line in enumerate(tqdm(lines, f"reading {path}", total, delay=2)):
            if i in chosen:
                with reraise_corrupt(f"{path}:{i + 1}", "leave its folder out"):
                    records.append(json.loads(line))
    return records, total


def read_training(folder: Path, limit: int) -> dict:
    """Configuration, metrics and trajectories of a run folder of train.py."""
    metrics, _ = read_log(folder / "metrics.jsonl")
    lines, total = read_log(folder / "trajectories.jsonl", limit)
    trajectories = []
    for line in lines:
        step = line.pop("step")
        trajectories.append({"step": step} | episode_record(Episode(**line)))
    with reraise_corrupt(folder / "config.json", "leave its folder out"):
        settings = json.loads((folder / "config.json").read_bytes())
    return {"settings": settings, "metrics": metrics, "trajectories": trajectories, "total": total}


def read_evaluation(folder: Path, limit: int) -> dict:
    """Protocol, results and transcripts of an --out folder of evaluate.py run."""
    results = {}
    for name, result in read_results([folder]).items():
        results[name.removeprefix(f"{folder.name} ")] = result
    has_verdicts = any("acc_l" in result for result in results.values())
    log = folder / ("transcripts.judged.jsonl" if has_verdicts else "transcripts.jsonl")
    trajectories, total = read_log(log, limit)
    settings = read_metrics(folder / "metrics.json")["protocol"]
    return {"settings": settings, "results": results, "trajectories": trajectories, "total": total}


def read_run(folder: Path, limit: int) -> dict:
    """What the page shows of a folder, with at most `limit` of its trajectories."""
    evaluated = (folder / "metrics.json").exists()
    for name in ("config.json", "metrics.jsonl"):
        if not evaluated and not (folder / name).exists():
            raise ValueError(f"{folder}: neither an evaluation (metrics.json) nor a run: no {name}")
    try:
        run = read_evaluation(folder, limit) if evaluated else read_training(folder, limit)
        for trajectory in run["trajectories"]:
            for name in ("question", "answers", "segments", "failed_rule"):
                trajectory[name]  # the page needs it
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: not of this project, or another version: {error!r}") from None
    return run | {"name": folder.resolve().name}


def without_keys(entries: dict) -> dict:
    return {name: value for name, value in entries.items() if not name.upper().endswith("API_KEY")}


def script_data(data: dict) -> str:
    """JSON for the page's script: without API keys, and such that no text in it ends the script."""
    # NaN becomes null: JSON in a browser has no NaN.
    data = json.loads(json.dumps(data), parse_constant=lambda name: None, object_hook=without_keys)
    text = json.dumps(data)  # ASCII: U+2028 and the like are escaped
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def page(runs: tyro.conf.Positional[list[Path]], out: Path, max_trajectories: int = 2000) -> None:
    """Write one HTML page of runs and evaluations: results, curves, trajectories, settings.

    Args:
        runs: folders of train.py or evaluate.py run, in order
        out: the page; a page that is there already is replaced
        max_trajectories: of all runs together, in equal shares
    """
    if not runs:
        raise ValueError("no run folder is given")
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    head, _, tail = template.partition("DATA")
    if out.exists() and not out.read_bytes().startswith(f"{head}{{".encode()):
        raise ValueError(f"{out}: exists and is no such page; change --out")
    limit = max(0, max_trajectories) // len(runs)
    shown = [read_run(folder, limit) for folder in runs]
    if len({run["name"] for run in shown}) < len(shown):
        for run, folder in zip(shown, runs, strict=True):
            run["name"] = str(folder)
    rules = {rule.__name__: rule.__doc__ for rule in FORMAT_RULES}
    data = script_data({"tags": TAGS._asdict(), "rules": rules, "runs": shown})
    write_text(out, head + data + tail)
    print(f"report: {out}")


def main(argv: list[str] | None = None) -> None:
    commands = {"plot": plot, "learning": learning, "page": page}
    with user_errors("report.py"):
        tyro.extras.subcommand_cli_from_dict(
            commands, description=__doc__, use_underscores=True, args=argv
        )


if __name__ == "__main__":
    main()
