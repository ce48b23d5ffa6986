"""What matters in the recipe: runs that differ from the demo's in one point, over seeds.

    python benchmarks/ablations.py run --demo demo --rows default unmasked --seeds 0 1 2
    python benchmarks/ablations.py table --figure rows.png

`run` needs what `make demo` has made, trains every row with every seed for the same number of
rollout batches, and answers the held-out questions with the last model. It goes on where it
stopped. Models stay in --work; --logs gets what `table` reads: configuration and metrics of each
stage, scores of each held-out question, the kind of CPU. A difference to the default row is that of
the same questions and seeds; its 95 % interval is over both, by bootstrap. Seeds are left out that
ran on another kind of CPU than the default: only on one kind the numbers of a run repeat.
"""

import platform
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from benchmarks.baselines import LIMITS, LOOP
from benchmarks.baselines import run as evaluate
from benchmarks.measure import TRAIN, run_training
from evaluate import read_outputs
from records import read_jsonl, write_jsonl, write_text
from tools.report import draw_band

EVAL_EVERY = 2  # rollout batches between validations
ON_DOCUMENTS = (Path(__file__).resolve(), "train_on_documents")  # in place of TRAIN


@dataclass(frozen=True)
class Row:
    """One point in which runs differ from the demo's recipe."""

    # Options of both stages over the preset's; with any a row has a stage 1 of its own.
    both: dict = field(default_factory=dict)
    stage2: dict = field(default_factory=dict)
    steps: tuple[int, int] = (4, 8)  # rollout batches of the two stages
    trains_on_documents: bool = False


ROWS = {
    "default": Row(),
    # Documents have no sampler, hence no sampler correction.
    "unmasked": Row({"sampler_clip": 0}, trains_on_documents=True),
    "stage2_alone": Row(steps=(0, 12)),
    "grpo": Row(stage2={"algorithm": "grpo"}),
    "no_penalty": Row(stage2={"reward": "stage2_no_penalty"}),
    "group_baseline": Row(stage2={"algorithm": "reinforce++_baseline"}),
    "dr_grpo": Row({"algorithm": "dr_grpo"}),
    "em": Row(stage2={"reward": "stage2_em"}),
    "cover_em": Row(stage2={"reward": "stage2_cover_em"}),
    "uncorrected": Row({"sampler_clip": 0}),
    "lr_times_3": Row({"learning_rate": 6e-5}, {"learning_rate": 9e-5}),
    "lr_third": Row({"learning_rate": 2e-5 / 3}, {"learning_rate": 1e-5}),
    "samples_4": Row({"samples_per_prompt": 4, "prompts_per_step": 16}),
    "samples_16": Row({"samples_per_prompt": 16, "prompts_per_step": 4}),
}
MAIN_ROWS = tuple(ROWS)[:5]

# --------------------------------------------------------------------------------------------------
# run


def train_on_documents(flags: list[str]) -> None:
    """train.py, but every token after the prompt is an action token."""
    compute_advantages = train.Trainer.compute_advantages

    def with_documents(trainer: train.Trainer, batch: train.Batch) -> dict[str, float]:
        for e in batch.episodes:
            e.action_mask = [int(t >= len(e.prompt_ids)) for t in range(len(e.token_ids))]
        samples = trainer.config.samples_per_prompt
        whole = train.make_batch(batch.episodes, samples, trainer.device)
        batch.action_mask, batch.loss_mask = whole.action_mask, whole.loss_mask
        return compute_advantages(trainer, batch)

    train.Trainer.compute_advantages = with_documents
    train.main(flags)


def kind_of_cpu() -> str:
    """As far as the bits of a run depend on it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{(names or [platform.machine()])[0]}, {torch.backends.cpu.get_cpu_capability()}"


def run_row(name: str, seed: int, demo: Path, work: Path, log: Path, engine: str) -> None:
    """Train and evaluate one row with one seed, and write its logs."""
    row, own, model = ROWS[name], work / name / f"seed{seed}", demo / "model"
    # A stage that another row has trained may be of another CPU, as may what a killed run has done.
    others = [log] if row.both else [log, log.parent.parent / "default" / log.name]
    cpus = {kind_of_cpu()}
    for file in [other / "cpu.txt" for other in others]:
        cpus.update(file.read_text().splitlines() if file.exists() else [])
    log.mkdir(parents=True, exist_ok=True)
    write_text(log / "cpu.txt", "\n".join(sorted(cpus)))
    for stage in (1, 2):
        if not row.steps[stage - 1]:
            continue
        is_shared = stage == 1 and not row.both
        out = (work / "default" / f"seed{seed}" if is_shared else own) / f"stage{stage}"
        if not (out / "model").exists():
            options = {"seed": seed, "engine": engine, "stage": stage, "model": model}
            options |= {"steps": row.steps[stage - 1], "eval_every": EVAL_EVERY}
            options |= row.both | (row.stage2 if stage == 2 else {})
            run_training(demo, out, options, ON_DOCUMENTS if row.trains_on_documents else TRAIN)
            shutil.rmtree(out / "checkpoints")
        model = out / "model"
        (log / f"stage{stage}").mkdir(parents=True, exist_ok=True)
        for file in ("config.json", "metrics.jsonl"):
            shutil.copy(out / file, log / f"stage{stage}")
    evaluate(demo, model, LOOP, own / "eval", LIMITS | {"engine": engine})
    kept = ("id", "dataset", "em", "f1", "searches", "failed_rule")
    outputs = read_outputs(own / "eval" / "transcripts.jsonl")
    write_jsonl(log / "scores.jsonl", [{key: o[key] for key in kept} for o in outputs])


def run(
    demo: Path = Path("demo"),
    rows: tuple[Literal[tuple(ROWS)], ...] = MAIN_ROWS,
    seeds: tuple[int, ...] = (0, 1, 2),
    work: Path = Path("runs/ablations"),
    logs: Path = Path("results/ablations"),
    engine: str = "vllm",
) -> None:
    """Train and evaluate rows, all rows of a seed before the next seed.

    Args:
        demo: folder that `make demo` filled
        rows: to train
        seeds: of training; the questions are the same
        work: folder for runs and models
        logs: folder for what `table` reads
        engine: inference engine
    """
    if not (demo / "heldout.jsonl").exists():
        sys.exit(f"ablations.py: {demo / 'heldout.jsonl'} is not there; run `make demo` first")
    for seed in seeds:
        for name in rows:
            log = logs / name / f"seed{seed}"
            if not (log / "scores.jsonl").exists():
                run_row(name, seed, demo, work, log, engine)


# --------------------------------------------------------------------------------------------------
# table


@dataclass(frozen=True)
class Run:
    """What the logs tell of one row and seed."""

    f1: dict[str, list[float]]  # by kind of question
    # Metrics by rollout batch, over both stages; one_hop: F1 of validation's one-hop questions.
    batches: dict[int, dict[str, float]]

    @property
    def all_f1(self) -> list[float]:
        return [f1 for of_kind in self.f1.values() for f1 in of_kind]

    def first_batch(self, name: str, least: float) -> int | None:
        """The first batch in which the metric is at least this, if there is one."""
        reached = (n for n, batch in self.batches.items() if batch.get(name, -1) >= least)
        return next(reached, None)


def read_run(log: Path) -> Run:
    f1: dict[str, list[float]] = {}
    scores = read_jsonl(log / "scores.jsonl", dict, "a scored question")
    for score in sorted(scores, key=lambda score: (score["dataset"], score["id"])):
        f1.setdefault(score["dataset"], []).append(score["f1"])
    batches: dict[int, dict[str, float]] = {}
    for file in sorted(log.glob("stage?/metrics.jsonl")):
        for batch in read_jsonl(file, dict, "metrics", key="step"):
            one_hop = [batch[name] for name in batch if name.startswith("eval_f1_demo-1hop-")]
            if one_hop:
                batch["one_hop"] = float(np.mean(one_hop))
            batches[len(batches) + 1] = batch
    return Run(f1, batches)


def difference(runs: dict[int, Run], default: dict[int, Run]) -> tuple[float, float, float]:
    """Mean F1 less that of the default's runs with the same seeds, and its 95 % interval."""
    pairs = [(runs[seed].all_f1, default[seed].all_f1) for seed in runs if seed in default]
    differences = np.array([np.subtract(*pair) for pair in pairs])  # (seeds, questions)
    random = np.random.default_rng(0)
    means = []
    for _ in range(2000):
        seeds, questions = (random.integers(n, size=n) for n in differences.shape)
        means.append(differences[np.ix_(seeds, questions)].mean())
    low, high = np.percentile(means, [2.5, 97.5])
    return differences.mean(), low, high


def spread(values: list[float]) -> str:
    """Mean, and in brackets least and greatest."""
    return f"{np.mean(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def read_rows(logs: Path) -> dict[str, dict[int, Run]]:
    """Finished runs by row and seed, where the default's run of the seed is of the same CPUs."""
    rows: dict[str, dict[int, Run]] = {name: {} for name in ROWS}
    finished = sorted(file.parent for file in logs.glob("*/seed*/scores.jsonl"))
    kinds = {log: (log / "cpu.txt").read_text() for log in finished}
    for log, kind in kinds.items():
        if kinds.get(logs / "default" / log.name) == kind:
            rows[log.parent.name][int(log.name.removeprefix("seed"))] = read_run(log)
    if not rows["default"]:
        sys.exit(f"ablations.py: {logs} has no run of the row default")
    return {name: runs for name, runs in rows.items() if runs}


def draw(rows: dict[str, dict[int, Run]], out: Path) -> None:
    """Draw one-hop F1 over the rollout batches, and the differences of the table."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    curves, intervals = figure.subplots(1, 2)
    for number, (name, runs) in enumerate(rows.items()):
        draw_band(curves, [run.batches for run in runs.values()], "one_hop", label=name)
        if name != "default":
            mean, low, high = difference(runs, rows["default"])
            width = [[mean - low], [high - mean]]
            intervals.errorbar(mean, -number, xerr=width, fmt="o", color=f"C{number}", label=name)
    curves.set(title="validation F1, one hop", xlabel="rollout batches")
    intervals.axvline(0, color="grey", linestyle=":")
    intervals.set(title="F1 of all held-out questions, less default", yticks=[])
    for axis in (curves, intervals):
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(out, dpi=120)


def table(logs: Path = Path("results/ablations"), figure: Path | None = None) -> None:
    """Print the rows in Markdown: F1 as the mean over seeds, with the least and the greatest.

    Args:
        logs: folder that `run` filled
        figure: a PNG, to draw the rows too
    """
    rows = read_rows(logs)
    datasets = list(next(iter(rows["default"].values())).f1)
    print(f"| row | seeds | {' | '.join(datasets)} | all | all, less default | format .9 | F1 .8 |")
    print("|---" * (len(datasets) + 6) + "|")
    for name, runs in rows.items():
        cells = [name, str(len(runs))]
        for dataset in datasets:
            cells.append(spread([np.mean(run.f1[dataset]) for run in runs.values()]))
        cells.append(spread([np.mean(run.all_f1) for run in runs.values()]))
        mean, low, high = difference(runs, rows["default"])
        cells.append(f"{mean:+.3f} ({low:+.3f} to {high:+.3f})" if name != "default" else "")
        for metric, least in (("format_rate", 0.9), ("one_hop", 0.8)):
            steps = [run.first_batch(metric, least) for run in runs.values()]
            cells.append(", ".join("never" if step is None else str(step) for step in steps))
        print("| " + " | ".join(cells) + " |")
    if figure:
        draw(rows, figure)


if __name__ == "__main__":
    if sys.argv[1:2] == ["train_on_documents"]:  # on the ranks that `run` starts
        train_on_documents(sys.argv[2:])
    else:
        commands = {"run": run, "table": table}
        tyro.extras.subcommand_cli_from_dict(commands, description=__doc__, use_underscores=True)
