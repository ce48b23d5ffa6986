"""What grows in a long run: memory, open files and threads of train.py or of the search server.

    python benchmarks/soak.py train --minutes 30 --json         # with what `make demo` made
    python benchmarks/soak.py serve --minutes 10 --json

`train` is the demo's stage 2 with its checkpoints. `serve` is a search server with a BM25 index of
the demo's passages and 16 clients; a tenth of their requests are malformed, too large or broken
off. The process is sampled once a second; each minute has a line. The last line has the growth:
the last fifth of the samples that follow the first --settle minutes, over the first fifth.
"""

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
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from json import dumps
from pathlib import Path
from typing import Literal, NamedTuple

import tyro
import urllib3

# A script finds the modules beside it; those of the core lie one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from records import read_passages
from retriever import Remote, build_bm25
from tools.search_server import MAX_BODY_BYTES, MAX_PASSAGES

ROOT = Path(__file__).resolve().parent.parent
CLIENTS = 16
HALF_REQUEST = b"POST /search HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"


class Sample(NamedTuple):
    resident_mib: float
    open_files: int
    threads: int


def sample(pid: int) -> Sample:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    resident = int(status["VmRSS"].split()[0]) / 1024
    return Sample(resident, len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"]))


def describe(samples: list[Sample]) -> dict[str, float]:
    resident = [each.resident_mib for each in samples]
    return {
        "resident_mib_least": round(min(resident)),
        "resident_mib_median": round(statistics.median(resident)),
        "resident_mib_greatest": round(max(resident)),
        "open_files": statistics.median(each.open_files for each in samples),
        "threads": statistics.median(each.threads for each in samples),
    }


@contextmanager
def training(demo: Path, folder: Path) -> Iterator[subprocess.Popen]:
    command = [sys.executable, ROOT / "train.py", "--preset=demo", "--stage=2", "--steps=100000"]
    command += [f"--model={demo}/stage1/model", f"--questions={demo}/train.jsonl"]
    command += [f"--retriever={demo}/passages.jsonl", f"--out={folder}/run"]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


@contextmanager
def serving(demo: Path, folder: Path) -> Iterator[subprocess.Popen]:
    """A search server under the requests of CLIENTS threads."""
    titles = [passage["title"] for passage in read_passages(demo / "passages.jsonl")]
    build_bm25(str(demo / "passages.jsonl"), folder / "index")
    script = ROOT / "tools" / "search_server.py"
    command = [sys.executable, script, "--port=0", f"--index={folder}/index"]
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    url = server.stdout.readline().split()[-1]
    stop = threading.Event()
    pool = ThreadPoolExecutor(CLIENTS)
    clients = [pool.submit(send_requests, url, titles, seed, stop) for seed in range(CLIENTS)]
    try:
        yield server
    finally:
        stop.set()
        wait(clients)
        server.terminate()
        server.wait()
    for client in clients:
        client.result()  # raises what the client raised


def send_requests(url: str, queries: list[str], seed: int, stop: threading.Event) -> None:
    """Nine good requests to one that the server must refuse or whose client goes away."""
    rng = random.Random(seed)
    remote = Remote(url)
    pool = urllib3.PoolManager(retries=False)
    host, port = url.removeprefix("http://").split(":")
    while not stop.is_set():
        match rng.randrange(40):
            case 0:
                pool.request("POST", f"{url}/search", body=b'{"queries":')
            case 1:
                pool.request("POST", f"{url}/search", body=b"x" * (MAX_BODY_BYTES + 1))
            case 2:
                pool.request("POST", f"{url}/search", json={"queries": ["x"] * (MAX_PASSAGES + 1)})
            case 3:
                with socket.create_connection((host, int(port))) as client:
                    client.sendall(HALF_REQUEST)
            case _:
                remote.search(rng.choices(queries, k=rng.randint(1, 8)), 3)


def main(
    what: tyro.conf.Positional[Literal["train", "serve"]],
    minutes: float = 30,
    settle: float = 5,  # minutes at the beginning that do not count
    demo: Path = Path("demo"),  # the folder that `make demo` made
    json: bool = False,
) -> None:
    show = dumps if json else str
    start = training if what == "train" else serving
    samples = []
    with tempfile.TemporaryDirectory() as name, start(demo.resolve(), Path(name)) as process:
        begin = time.monotonic()
        while len(samples) < 60 * minutes:
            time.sleep(max(0.0, begin + len(samples) - time.monotonic()))
            if process.poll() is not None:
                sys.exit(f"it ended by itself: {Path(name, 'log').read_text()[-2000:]}")
            samples.append(sample(process.pid))
            if len(samples) % 60 == 0:
                minute = len(samples) // 60
                print(show({"minute": minute} | describe(samples[-60:])), flush=True)
    settled = samples[int(60 * settle) :]
    fifth = -(-len(settled) // 5)
    first = describe(settled[:fifth])
    last = describe(settled[len(settled) - fifth :])
    growth = {quantity: round(last[quantity] / first[quantity], 4) for quantity in first}
    print(show({"name": "ratios", "what": what} | growth), flush=True)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
