"""What grows in a long run: memory, open files and threads of train.py or of the search server.

    python benchmarks/soak.py train --minutes 30    # with what `make demo` made
    python benchmarks/soak.py serve --minutes 10

`train` is the demo's stage 2 with its checkpoints. `serve` is a search server with a BM25 index of
the demo's passages and 16 clients; a tenth of their requests are malformed, too large or broken
off. The process is sampled once a second; each minute has a line. The last line has the growth:
the last fifth of the samples that follow the first --settle minutes, over the first fifth.
"""

import random
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import psutil
import tyro
import urllib3

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.measure import ROOT, search_server, show
from records import read_passages
from retriever import build_bm25
from search_client import Remote
from tools.search_server import MAX_BODY_BYTES, MAX_PASSAGES

CLIENTS = 16
BAD_BODIES = [
    b'{"queries":',
    b"x" * (MAX_BODY_BYTES + 1),
    b'{"queries": ["x"], "k": %d}' % (MAX_PASSAGES + 1),
]
HALF_REQUEST = b"POST /search HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"


def describe(samples: list[tuple[float, int, int]]) -> dict[str, float]:
    """Of samples of resident MiB, open files and threads."""
    resident, open_files, threads = zip(*samples, strict=True)
    return {
        "resident_mib_least": round(min(resident)),
        "resident_mib_median": round(statistics.median(resident)),
        "resident_mib_greatest": round(max(resident)),
        "open_files": statistics.median(open_files),
        "threads": statistics.median(threads),
    }


@contextmanager
def training(demo: Path, folder: Path) -> Iterator[psutil.Popen]:
    """The demo's stage 2; its output goes to stderr."""
    command = [sys.executable, ROOT / "train.py", "--preset=demo", "--stage=2", "--steps=100000"]
    command += [f"--model={demo}/stage1/model", f"--questions={demo}/train.jsonl"]
    command += [f"--retriever={demo}/passages.jsonl", f"--prompt_file={demo}/prompt.txt"]
    command += [f"--out={folder}/run"]
    process = psutil.Popen(command, stdout=sys.stderr)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


@contextmanager
def serving(demo: Path, folder: Path) -> Iterator[psutil.Popen]:
    """A search server under the requests of CLIENTS threads."""
    titles = [passage["title"] for passage in read_passages(demo / "passages.jsonl")]
    build_bm25(str(demo / "passages.jsonl"), folder / "index")
    stop = threading.Event()
    with search_server(folder / "index") as (server, url), ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(send_requests, url, titles, seed, stop) for seed in range(CLIENTS)]
        try:
            yield server
        finally:
            stop.set()
    for client in clients:
        client.result()  # raises what the client raised


def send_requests(url: str, queries: list[str], seed: int, stop: threading.Event) -> None:
    """Nine good requests to one that the server must refuse or whose client goes away."""
    rng = random.Random(seed)
    remote = Remote(url)
    pool = urllib3.PoolManager(retries=False)
    address = urllib3.util.parse_url(url)
    while not stop.is_set():
        number = rng.randrange(40)
        if number < len(BAD_BODIES):
            pool.request("POST", f"{url}/search", body=BAD_BODIES[number])
        elif number == len(BAD_BODIES):
            with socket.create_connection((address.host, address.port)) as client:
                client.sendall(HALF_REQUEST)
        else:
            remote.search(rng.choices(queries, k=rng.randint(1, 8)), 3)


def main(
    what: tyro.conf.Positional[Literal["train", "serve"]], minutes: float = 30, settle: float = 5,
    demo: Path = Path("demo"),
) -> None:  # fmt: skip
    if minutes <= settle:
        sys.exit("soak.py: --minutes must be above --settle")
    start = training if what == "train" else serving
    samples = []
    with tempfile.TemporaryDirectory() as folder, start(demo.resolve(), Path(folder)) as process:
        begin = time.monotonic()
        while len(samples) < 60 * minutes:
            time.sleep(max(0.0, begin + len(samples) + 1 - time.monotonic()))
            if process.poll() is not None:
                sys.exit(f"the process ended by itself with status {process.returncode}")
            resident = process.memory_info().rss / 2**20
            samples.append((resident, process.num_fds(), process.num_threads()))
            if len(samples) % 60 == 0:
                show({"minute": len(samples) // 60} | describe(samples[-60:]))
    settled = samples[int(60 * settle) :]
    fifth = -(-len(settled) // 5)
    first, last = describe(settled[:fifth]), describe(settled[-fifth:])
    growth = {quantity: round(last[quantity] / first[quantity], 4) for quantity in first}
    show({"name": "ratios", "what": what} | growth)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__, use_underscores=True)
