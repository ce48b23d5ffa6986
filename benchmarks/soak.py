"""What grows in a long run: memory, open files and threads of train.py, and of the search server under load.

    python benchmarks/soak.py train --minutes 30 --json         # with what `make demo` made
    python benchmarks/soak.py serve --minutes 10 --json

`train` is the demo's stage 2, checkpoints and all. `serve` asks a server with a BM25 index of the demo's passages, 16
clients at once; a tenth of their requests are malformed, too large or broken off. A sample a second, a line a minute. The
last line has the growth after the first --settle minutes: what the last fifth of the samples since then shows, over what the
first fifth shows.
"""

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import requests

sys.path.insert(0, str(Path(__file__).parent.parent))

import records
import retriever
from tools import search_server

ROOT, CLIENTS = Path(retriever.__file__).parent, 16


def sample(pid: int) -> tuple[float, int, int]:
    """Resident MiB, open files, threads."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) / 1024, len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"])


def describe(samples: list[tuple[float, int, int]]) -> dict[str, float]:
    resident, files, threads = zip(*samples, strict=True)
    memory = {"least": min(resident), "median": statistics.median(resident), "greatest": max(resident)}
    return {f"resident_mib_{name}": round(value) for name, value in memory.items()} | {
        "open_files": statistics.median(files),
        "threads": statistics.median(threads),
    }


@contextmanager
def training(demo: Path, folder: str) -> Iterator[subprocess.Popen]:
    options = "--preset demo --stage 2 --steps 100000".split()
    data = [f"--model={demo}/stage1/model", f"--questions={demo}/train.jsonl", f"--retriever={demo}/passages.jsonl"]
    with open(f"{folder}/log", "w") as log:
        command = [sys.executable, str(ROOT / "train.py"), *options, *data, f"--out={folder}/run"]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


@contextmanager
def serving(demo: Path, folder: str) -> Iterator[subprocess.Popen]:
    """A search server, asked by CLIENTS all the time."""
    titles = [passage["title"] for passage in records.read_passages(demo / "passages.jsonl")]
    retriever.build_bm25(str(demo / "passages.jsonl"), Path(folder, "index"))
    with open(f"{folder}/log", "w") as log:
        command = [sys.executable, str(ROOT / "tools" / "search_server.py"), "--index", f"{folder}/index", "--port", "0"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    url, stop = server.stdout.readline().split()[-1], threading.Event()
    clients = [threading.Thread(target=ask, args=(url, titles, n, stop)) for n in range(CLIENTS)]
    for client in clients:
        client.start()
    try:
        yield server
    finally:
        stop.set()
        for client in clients:
            client.join()
        server.terminate()
        server.wait()


def ask(url: str, queries: list[str], seed: int, stop: threading.Event) -> None:
    """Nine good requests to one that the server must refuse, or whose client goes away."""
    rng, remote = random.Random(seed), retriever.Remote(url)
    while not stop.is_set():
        match rng.randrange(40):
            case 0:
                requests.post(f"{url}/search", data=b'{"queries":')
            case 1:
                requests.post(f"{url}/search", data=b"x" * (search_server.MAX_BODY + 1))
            case 2:
                requests.post(f"{url}/search", json={"queries": ["x"] * (retriever.MAX_QUERIES + 1)})
            case 3:
                with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port)) as client:
                    client.sendall(b"POST /search HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            case _:
                remote.search(rng.choices(queries, k=rng.randint(1, 8)), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "serve"])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--settle", type=float, default=5, help="minutes that do not count")
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="the folder that `make demo` made")
    parser.add_argument("--json", action="store_true", help="lines of JSON, in the last one the growth")
    args = parser.parse_args()
    tell = lambda row: print(json.dumps(row) if args.json else row, flush=True)  # noqa: E731
    start, samples, begin = {"train": training, "serve": serving}[args.what], [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder, start(args.demo.resolve(), folder) as process:
        while len(samples) < 60 * args.minutes:
            time.sleep(max(0.0, begin + len(samples) - time.monotonic()))
            if process.poll() is not None:
                sys.exit(f"it ended by itself: {Path(folder, 'log').read_text()[-2000:]}")
            samples.append(sample(process.pid))
            if len(samples) % 60 == 0:
                tell({"minute": len(samples) // 60} | describe(samples[-60:]))
    settled = samples[int(60 * args.settle) :]
    fifth = -(-len(settled) // 5)
    first, last = describe(settled[:fifth]), describe(settled[len(settled) - fifth :])
    tell({"name": "ratios", "what": args.what} | {name: round(last[name] / first[name], 4) for name in first})


if __name__ == "__main__":
    main()
