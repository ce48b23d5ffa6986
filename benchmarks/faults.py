"""Kill training runs at random moments until they are through; compare them with unbroken ones.

    python benchmarks/faults.py

Runs of the tests' tiny model with the real vLLM, on one rank and on two, take turns: Reinforce++
with a reference model, three updates a rollout batch, evaluations, a checkpoint every other step.
Half of the kills (-9) come from outside and take all processes at once, as when a node dies; half
from inside one rank, at least one at each point of tests/faulty.py: `others_s` is how long the
other processes outlived it. After each kill the log must be the beginning of the unbroken run's; in
the end metrics, model and the last checkpoint's parameters and moments must equal its, bit for bit.
Exit status 1 if any is not, or if a run ends otherwise than by a kill.
"""

import dataclasses
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from contextlib import chdir
from pathlib import Path

import psutil
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from faulty import POINTS
from tiny import command, make_model, make_world, metrics_of, state_of

from benchmarks.measure import ROOT, show, torchrun_command
from checkpoint import newest_checkpoint
from config import Config
from policy import start_distributed

# Calls of a point in two steps or so, where there are more than two.
MAX_CALLS = {"rollout": 40, "weight sync": 40, "shard written": 80, "checkpoint synced": 8}
MAX_CALLS |= {"checkpoint read": 1, "update": 6}
RANK_0_ONLY = ("checkpoint written", "checkpoint synced", "old checkpoint removed", "export")
TRAINING = {
    "engine": "vllm",
    "steps": 8,  # with fewer than 6 no checkpoint is removed
    "algorithm": "reinforce++",
    "kl_coef": 1e-3,
    "updates_per_rollout": 3,
    "save_every": 2,
    "eval_every": 3,
    "eval_questions": "q.jsonl",
}


def launch(config: Config, ranks: int, out: str, fault: list[str], limit: float | None) -> int:
    """Run train.py with a fault inside, or until all its processes are killed after `limit` s.

    Returns:
        The exit status; negative if the run was killed.
    """
    script, *flags = command(config, out, "--resume")
    program = [str(ROOT / "tests" / "faulty.py"), *fault] if fault else [script]
    words = torchrun_command(ranks, *program, *flags)
    with open(f"{out}.log", "w") as log:
        process = psutil.Popen(words, stdout=log, stderr=subprocess.STDOUT)
        try:
            status = process.wait(limit)
        except psutil.TimeoutExpired:
            for each in [process, *process.children(recursive=True)]:
                each.kill()
            return process.wait()
    return -9 if "Signal 9 (SIGKILL)" in Path(f"{out}.log").read_text() else status


def results_of(out: str) -> tuple[list[dict], bytes, dict[str, bytes]]:
    """Metrics, model, and the last checkpoint's parameters and moments."""
    state = {name: tensor.numpy().tobytes() for name, tensor in state_of(out).items()}
    return metrics_of(out), Path(out, "model/model.safetensors").read_bytes(), state


def choose_fault(rng: random.Random, points: list[str], ranks: int) -> list[str]:
    """Arguments of tests/faulty.py; `points` are those at which no run has died yet."""
    point = points[0] if points else rng.choice(list(POINTS))
    rank = 0 if point in RANK_0_ONLY else rng.randrange(ranks)
    return [point, str(rng.randint(1, MAX_CALLS.get(point, 2))), str(rank), "kill"]


def resume(
    config: Config, ranks: int, out: str, fault: list[str], limit: float | None, unbroken: tuple
) -> dict:
    """Go on with a run until it is killed or through.

    Args:
        unbroken: `results_of` the run to compare with.
    """
    _, progress = newest_checkpoint(Path(out, "checkpoints"))
    begin = time.monotonic()
    status = launch(config, ranks, out, fault, limit)
    logged, log = metrics_of(out), Path(f"{out}.log").read_text()
    row = {"ranks": ranks, "resumed_at": progress.step, "logged": len(logged)}
    if status > 0:
        sys.exit(f"ended with status {status}, not killed: {log[-3000:]}")
    if status == 0:
        return row | {"ended": True, "equal": results_of(out) == unbroken}
    row |= {"at": "outside, all at once", "after_s": round(time.monotonic() - begin, 1)}
    if fault:
        died = float(re.search(r"fault at ([\d.]+)", log)[1])
        row["at"] = "{}, call {}, rank {}".format(*fault)
        row["others_s"] = round(time.time() - died, 1)
    return row | {"ended": False, "equal": logged == unbroken[0][: len(logged)]}


def main(kills: int = 24, seed: int = 0) -> None:
    """Run until there are enough kills, and one at each point."""
    os.environ["OMP_NUM_THREADS"] = "1"
    start_distributed()  # newest_checkpoint asks for the number of ranks
    rng = random.Random(seed)
    points = rng.sample(list(POINTS), len(POINTS))
    seconds, unbroken = {}, {}
    killed = runs = 0
    all_equal = True
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        make_model(Path("tiny"))
        config = dataclasses.replace(make_world(Path("."), "tiny"), **TRAINING)
        for ranks in (1, 2):
            begin = time.monotonic()
            status = launch(config, ranks, f"unbroken{ranks}", [], None)
            assert status == 0, Path(f"unbroken{ranks}.log").read_text()
            seconds[ranks] = time.monotonic() - begin
            unbroken[ranks] = results_of(f"unbroken{ranks}")
            show({"ranks": ranks, "steps": config.steps, "seconds": round(seconds[ranks], 1)})
        while killed < kills or points:
            runs += 1
            ranks = 1 + runs % 2
            ended = False
            while not ended:
                limit, fault = None, []
                if rng.random() < 0.5:
                    limit = rng.uniform(0.3, 1.0) * seconds[ranks]  # before that it is starting
                else:
                    fault = choose_fault(rng, points, ranks)
                row = resume(config, ranks, f"run{runs}", fault, limit, unbroken[ranks])
                ended = row["ended"]
                if not ended:
                    killed += 1
                    points = [point for point in points if point not in fault]
                all_equal = all_equal and row["equal"]
                show({"run": runs, "kills": killed} | row)
    show({"name": "all", "kills": killed, "runs": runs, "equal": all_equal})
    sys.exit(0 if all_equal else 1)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__, use_underscores=True)
