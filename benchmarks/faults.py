"""Kill training runs at random moments until they are through, and compare them with one that was left alone.

    python benchmarks/faults.py --json

Runs of the tests' tiny model with the real vLLM, on one rank and on two, take turns: Reinforce++ with a reference model,
three updates a rollout batch, evaluations, a checkpoint every other step. Half of the kills (-9) come from outside and take
all processes at once, as when a node dies; half from inside one rank, at least one at each point of tests/faulty.py, among
them amid a checkpoint and amid the weight sync: `others_s` is how long the other processes outlived it. After each kill the
log must be the beginning of the unbroken run's; in the end metrics, model and the last checkpoint's parameters and moments
must equal its, bit for bit. Exit status 1 if any is not, or if a run ends otherwise than by a kill.
"""

import argparse
import dataclasses
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from faulty import POINTS
from tiny import command, equal_states, make_model, make_world, metrics_of, state_of

import checkpoint

import train

ROOT = Path(__file__).resolve().parent.parent
OFTEN = {"rollout": 40, "weight sync": 60, "checkpoint synced": 8, "update": 6}  # calls in two steps or so
OF_RANK_0 = ("checkpoint written", "checkpoint synced", "old checkpoint removed", "export")


def launch(ranks: int, out: str, config: train.Config, fault: list[str] | None, limit: float | None) -> int | None:
    """Run train.py, with a fault inside or until all its processes are killed after `limit` seconds.

    Returns its exit status, None if it was killed.
    """
    script, *flags = command(config, out, "--resume")
    program = [script] if fault is None else [str(ROOT / "tests" / "faulty.py"), *fault]
    arguments = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *program, *flags]
    with open(f"{out}.log", "w") as log:
        process = subprocess.Popen([sys.executable, *arguments], stdout=log, stderr=log)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            subprocess.run(["pkill", "-9", "-f", "--", f"--out {out}"])  # torchrun and its ranks
            status = process.wait()
    return None if status < 0 or "Signal 9 (SIGKILL)" in Path(f"{out}.log").read_text() else status


def progress(out: str) -> int:
    return checkpoint.newest_checkpoint(Path(out, "checkpoints"))[1]["step"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", default="vllm", choices=["vllm", "transformers"])
    parser.add_argument("--json", action="store_true", help="a line of JSON for each kill and each end")
    args = parser.parse_args()
    rng, folder, equal, kills, chains = random.Random(args.seed), Path(tempfile.mkdtemp()), True, 0, 0
    points = rng.sample(list(POINTS), len(POINTS))  # at which none was killed yet
    make_model(folder / "tiny")
    config = make_world(folder, str(folder / "tiny"))
    config = dataclasses.replace(config, engine=args.engine, steps=args.steps, save_every=2)
    config = dataclasses.replace(config, algorithm="reinforce++", kl_coef=1e-3, updates_per_rollout=3)
    config = dataclasses.replace(config, eval_every=3, eval_questions="q.jsonl")
    os.environ["OMP_NUM_THREADS"] = "1"
    os.chdir(folder)

    def tell(row: dict) -> None:
        print(json.dumps(row) if args.json else row, flush=True)

    seconds, model, state = {}, {}, {}
    for ranks in (1, 2):
        out, start = f"{folder}/unbroken{ranks}", time.monotonic()
        assert launch(ranks, out, config, None, None) == 0, Path(f"{out}.log").read_text()
        seconds[ranks], model[ranks] = time.monotonic() - start, Path(out, "model/model.safetensors").read_bytes()
        state[ranks] = state_of(out)
        tell({"ranks": ranks, "steps": args.steps, "seconds": round(seconds[ranks], 1)})
    while kills < args.kills or points:
        chains += 1
        ranks, out, status = 1 + chains % 2, f"{folder}/chain{chains}.", None
        expected = metrics_of(f"unbroken{ranks}")
        while status is None:
            point, limit, fault = "outside, all at once", None, None
            if rng.random() < 0.5:
                limit = rng.uniform(0.3, 1.0) * seconds[ranks]  # before that it is starting
            else:
                point = points[0] if points else rng.choice(list(POINTS))
                rank = 0 if point in OF_RANK_0 else rng.randrange(ranks)
                fault = [point, str(rng.randint(1, OFTEN.get(point, 2))), str(rank), "kill"]
            resumed_at, begun = progress(out), time.monotonic()
            status = launch(ranks, out, config, fault, limit)
            logged, log = metrics_of(out), Path(f"{out}.log").read_text()
            if status:
                sys.exit(f"ended with status {status}, not killed: {log[-3000:]}")
            if status is None:
                kills += 1
                good = logged == expected[: len(logged)]
                row = {"kill": kills, "ranks": ranks, "at": point, "after_s": round(time.monotonic() - begun, 1)}
                if fault is not None:
                    died = float(re.search(r"fault at ([\d.]+)", log)[1])
                    row |= {"at": "{}, call {}, rank {}".format(*fault), "others_s": round(time.time() - died, 1)}
                    points = [other for other in points if other != point]
                row |= {"resumed_at": resumed_at, "logged": len(logged)}
            else:
                good = logged == expected and Path(out, "model/model.safetensors").read_bytes() == model[ranks]
                good &= equal_states(state_of(out), state[ranks])
                row = {"chain": chains, "ranks": ranks, "ended": True, "resumed_at": resumed_at, "logged": len(logged)}
            equal &= good
            tell(row | {"equal": good})
    tell({"name": "all", "kills": kills, "runs": chains, "equal": equal})
    shutil.rmtree(folder)
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()
