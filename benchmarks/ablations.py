"""What matters in the recipe: runs that differ from the demo's in one point, over seeds.

    python benchmarks/ablations.py run --demo demo --rows default unmasked --seeds 0 1 2
    python benchmarks/ablations.py table

`run` needs what `make demo` has made, trains every row with every seed for the same number of
rollout batches, and answers the held-out questions with the last model. It goes on where it
stopped. Models stay in --work; --logs gets what `table` reads: configuration and metrics of each
stage, scores of each held-out question, the kind of CPU. `table` compares only runs of one kind,
since only there the numbers of a run repeat. A difference to the default row is that of the same
questions and seeds; its 95 % interval is over both, by bootstrap.
"""

import math
import platform
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from benchmarks.baselines import LIMITS, LOOP
from benchmarks.baselines import run as evaluate
from benchmarks.measure import TRAIN, run_training
from config import PRESETS
from evaluate import read_outputs
from records import read_jsonl, write_jsonl, write_text

EVAL_EVERY = 2  # rollout batches between validations
ON_DOCUMENTS = (Path(__file__).resolve(), "train_on_documents")  # in place of TRAIN


@dataclass(frozen=True)
class Row:
    """One point in which runs differ from the demo's recipe."""

    both: dict = field(default_factory=dict)  # options of both stages, over the preset's
    stage2: dict = field(default_factory=dict)
    steps: tuple[int, int] = (4, 8)  # rollout batches of the two stages
    learning_rate: float = 1.0  # factor to the preset's
    trains_on_documents: bool = False

    @property
    def has_own_stage1(self) -> bool:
        return bool(self.both) or self.learning_rate != 1 or self.trains_on_documents


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
    "lr_times_3": Row(learning_rate=3.0),
    "lr_third": Row(learning_rate=1 / 3),
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
    others = [log] if row.has_own_stage1 else [log, log.parent.parent / "default" / log.name]
    cpus = {kind_of_cpu()}
    for file in [other / "cpu.txt" for other in others]:
        cpus.update(file.read_text().splitlines() if file.exists() else [])
    log.mkdir(parents=True, exist_ok=True)
    write_text(log / "cpu.txt", "\n".join(sorted(cpus)))
    for stage in (1, 2):
        if not row.steps[stage - 1]:
            continue
        is_shared = stage == 1 and not row.has_own_stage1
        out = (work / "default" / f"seed{seed}" if is_shared else own) / f"stage{stage}"
        if not (out / "model").exists():
            options = {
                "seed": seed,
                "engine": engine,
                "stage": stage,
                "steps": row.steps[stage - 1],
                "learning_rate": PRESETS["demo"][stage]["learning_rate"] * row.learning_rate,
                "model": model,
                "eval_every": EVAL_EVERY,
            }
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
    format_step: float  # first rollout batch with a format rate of .9; NaN: none
    one_hop_step: float  # first rollout batch after which validation's one-hop F1 is .8

    @property
    def all_f1(self) -> list[float]:
        return [f1 for of_kind in self.f1.values() for f1 in of_kind]


def read_run(log: Path) -> Run:
    f1: dict[str, list[float]] = {}
    scores = read_jsonl(log / "scores.jsonl", dict, "a scored question")
    for score in sorted(scores, key=lambda score: (score["dataset"], score["id"])):
        f1.setdefault(score["dataset"], []).append(score["f1"])
    batches = []
    for file in sorted(log.glob("stage?/metrics.jsonl")):
        batches += read_jsonl(file, dict, "metrics", key="step")
    format_step = one_hop_step = math.nan
    for number, batch in reversed(list(enumerate(batches, start=1))):
        one_hop = [value for name, value in batch.items() if name.startswith("eval_f1_demo-1hop-")]
        if batch["format_rate"] >= 0.9:
            format_step = number
        if one_hop and np.mean(one_hop) >= 0.8:
            one_hop_step = number
    return Run(f1, format_step, one_hop_step)


def difference(runs: dict[int, Run], default: dict[int, Run]) -> str:
    """Mean F1 less that of the default's runs with the same seeds, with its 95 % interval."""
    pairs = [(runs[seed].all_f1, default[seed].all_f1) for seed in runs if seed in default]
    if not pairs:
        return ""
    differences = np.array([np.subtract(*pair) for pair in pairs])  # (seeds, questions)
    random = np.random.default_rng(0)
    means = []
    for _ in range(2000):
        seeds, questions = (random.integers(n, size=n) for n in differences.shape)
        means.append(differences[np.ix_(seeds, questions)].mean())
    low, high = np.percentile(means, [2.5, 97.5])
    return f"{differences.mean():+.3f} ({low:+.3f} to {high:+.3f})"


def spread(values: list[float]) -> str:
    """Mean, and in brackets least and greatest."""
    return f"{np.mean(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def list_steps(steps: list[float]) -> str:
    return ", ".join("never" if math.isnan(step) else f"{step:.0f}" for step in steps)


def table(logs: Path = Path("results/ablations"), cpu: str | None = None) -> None:
    """Print the rows in Markdown: F1 as the mean over seeds, with the least and the greatest.

    Args:
        logs: folder that `run` filled
        cpu: kind of CPU, as in cpu.txt (default: that of most runs)
    """
    finished = [file.parent for file in logs.glob("*/seed*/scores.jsonl")]
    kinds = {log: (log / "cpu.txt").read_text() for log in finished}
    cpu = cpu or max(kinds.values(), key=list(kinds.values()).count, default="no CPU at all")
    rows: dict[str, dict[int, Run]] = {name: {} for name in ROWS}
    for log in sorted(log for log, kind in kinds.items() if kind == cpu):
        rows[log.parent.name][int(log.name.removeprefix("seed"))] = read_run(log)
    if not rows["default"]:
        sys.exit(f"ablations.py: {logs} has no run of the row default on {cpu}")
    datasets = list(next(iter(rows["default"].values())).f1)
    print(f"{cpu}\n")
    print(f"| row | seeds | {' | '.join(datasets)} | all | all, less default | format .9 | F1 .8 |")
    print("|---" * (len(datasets) + 6) + "|")
    for name, runs in rows.items():
        if runs:
            cells = [name, str(len(runs))]
            for dataset in datasets:
                cells.append(spread([np.mean(run.f1[dataset]) for run in runs.values()]))
            cells.append(spread([np.mean(run.all_f1) for run in runs.values()]))
            cells.append(difference(runs, rows["default"]))
            cells.append(list_steps([run.format_step for run in runs.values()]))
            cells.append(list_steps([run.one_hop_step for run in runs.values()]))
            print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["train_on_documents"]:  # on the ranks that `run` starts
        train_on_documents(sys.argv[2:])
    else:
        commands = {"run": run, "table": table}
        tyro.extras.subcommand_cli_from_dict(commands, description=__doc__, use_underscores=True)
