"""What the benchmarks share: printed rows, ways that take turns, memory, a search server."""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from policy import timed

ROOT = Path(__file__).resolve().parent.parent
TRAIN = (ROOT / "train.py",)


def torchrun_command(ranks: int, *words: str | Path) -> list[str]:
    """A command line that starts a script and its arguments on so many ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, *launcher, *map(str, words)]


def run_training(folder: Path, out: Path, options: dict, script: tuple = TRAIN) -> None:
    """Train, or go on, with the questions, the passages and the prompt of a folder.

    Args:
        options: of train.py, beside or over these.
        script: a file that takes train.py's command line, and arguments before it.
    """
    options = {
        "preset": "demo",
        "questions": folder / "train.jsonl",
        "eval_questions": folder / "validation.jsonl",
        "retriever": folder / "passages.jsonl",
        "prompt_file": folder / "prompt.txt",
        "out": out,
    } | options
    flags = [f"--{name}={value}" for name, value in options.items()]
    status = subprocess.call([sys.executable, *map(str, script), "--resume", *flags])
    if status:
        sys.exit(status)  # the script has said why


def show(row: dict) -> None:
    print(json.dumps(row), flush=True)


def take_turns(ways: dict[str, Callable[[], int]], repeats: int) -> dict[str, list[float]]:
    """Tokens a second of each way in each of `repeats` rounds.

    Args:
        ways: functions that return a number of tokens. Every other round calls them in the
            opposite order.
    """
    rates: dict[str, list[float]] = {name: [] for name in ways}
    seconds: dict[str, float] = {}
    order = list(ways)
    for _ in range(repeats):
        for name in order:
            with timed(seconds, name):
                tokens = ways[name]()
            rates[name].append(tokens / seconds[f"seconds_{name}"])
        order.reverse()
    return rates


def compare(rates: dict[str, list[float]], *pairs: str) -> dict[str, float | list[float]]:
    """Median rates, and for each pair "a / b" the median, least and greatest ratio of a round."""
    result: dict = {}
    for name, values in rates.items():
        result[f"{name}_tokens_per_s"] = round(statistics.median(values), 1)
    for pair in pairs:
        a, b = pair.split(" / ")
        ratios = [x / y for x, y in zip(rates[a], rates[b], strict=True)]
        summary = (statistics.median(ratios), min(ratios), max(ratios))
        result[pair] = [round(ratio, 3) for ratio in summary]
    return result


def peak_mib() -> float:
    """Peak of this process's resident memory; getrusage would count that of its parent too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = [line.split()[1] for line in lines if line.startswith("VmHWM")]
    return int(peak) / 1024


@contextmanager
def search_server(index: Path, *flags: str | Path, port: int = 0) -> Iterator[tuple]:
    """A search server of an index in a process of its own; its process and its URL."""
    script = ROOT / "tools" / "search_server.py"
    command = [sys.executable, script, "--index", index, "--port", str(port), *flags]
    server = psutil.Popen(command, stdout=subprocess.PIPE, text=True)
    line = server.stdout.readline()
    if not line:
        sys.exit(server.wait())  # it has said why
    try:
        yield server, line.split()[-1]
    finally:
        server.terminate()
        server.wait()
