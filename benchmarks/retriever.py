"""Retrieval measured: build, memory, disk, latency, throughput behind the server, recall.

    python benchmarks/retriever.py --passages wiki_passages.jsonl \
        --questions hotpotqa_500.jsonl --encoder MiniLM-folder

`--passages` are real ones: corpora of the asked sizes are drawn from their words, and the questions
are searched in them. Every backend builds and searches in a process of its own, all in one run. The
last line of `--json` holds the ratios.
"""

import json
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
# Before this file's folder: the retriever that is measured has this file's name.
sys.path.insert(0, str(ROOT))

import retriever as r  # noqa: E402
from bm25 import STOP_WORDS, tokenize  # noqa: E402
from records import Passage, read_passages, read_questions, scan_passages  # noqa: E402
from reward import normalize  # noqa: E402

# faiss factories whose recall is measured, and the parameters of each.
FACTORIES = {"Flat": "", "HNSW32": "efSearch=64", "IVF64,Flat": "nprobe=8", "IVF64,SQ8": "nprobe=8"}


def generate(real: list[Passage], size: int, path: Path) -> None:
    """Write passages of about 80 words, drawn with the real words' frequencies.

    Words that the real passages lack have the share of the words seen once (Good-Turing); their
    frequencies follow Zipf's law.
    """
    text = " ".join(f"{passage['title']} {passage['text']}" for passage in real)
    words, counts = np.unique(text.split(), return_counts=True)
    words = words.astype(object)
    unseen = (counts == 1).sum() / counts.sum()
    shares = np.cumsum(counts / counts.sum() * (1 - unseen))
    rng = np.random.default_rng(0)
    with open(path, "w") as file:
        for start in range(0, size, 10_000):
            lengths = rng.poisson(80, min(10_000, size - start)) + 3
            drawn = np.searchsorted(shares, rng.random(lengths.sum()))
            rare = (1000 * 1000 ** rng.random(len(drawn))).astype(int)
            text = []
            for word, number in zip(drawn, rare, strict=True):
                text.append(words[word] if word < len(words) else f"w{number}")
            for n, end in enumerate(np.cumsum(lengths)):
                part = text[end - lengths[n] : end]
                passage = {"id": str(start + n), "title": " ".join(part[:2])}
                passage["text"] = " ".join(part[2:])
                file.write(json.dumps(passage, ensure_ascii=False) + "\n")


def keyword_queries(corpus: Path, count: int) -> list[str]:
    """3 to 6 words of one passage each, none a stop word."""
    rng = random.Random(0)
    queries = []
    for _, passage in islice(scan_passages(corpus), count):
        words = [word for word in tokenize(passage["text"]) if word not in STOP_WORDS]
        queries.append(" ".join(rng.sample(words, min(len(words), rng.randint(3, 6)))))
    return queries


def process_memory(name: str) -> float:
    """MB of this process: VmRSS, at the moment, or VmHWM, at most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return round(int(line.split()[1]) / 1024)
    raise KeyError(name)


class BM25S:
    """bm25s as its README uses it."""

    def __init__(self, passages: list[Passage]):
        import bm25s

        self.bm25s = bm25s
        self.index = bm25s.BM25(corpus=[passage["id"] for passage in passages])
        texts = [f"{passage['title']} {passage['text']}" for passage in passages]
        self.index.index(self.tokenize(texts), show_progress=False)

    def tokenize(self, texts: list[str]):
        return self.bm25s.tokenize(texts, stopwords="en", show_progress=False)

    def search(self, queries: list[str], k: int) -> list:
        return self.index.retrieve(self.tokenize(queries), k=k, show_progress=False)[0]


def build(corpus: Path, folder: Path) -> dict:
    before = time.perf_counter()
    r.build_bm25(str(corpus), folder)
    seconds = time.perf_counter() - before
    return {"build_s": round(seconds, 1), "build_peak_mb": process_memory("VmHWM")}


def search(backend: str, corpus: Path, folder: Path, query_sets: dict[str, list[str]]) -> dict:
    """Time to open (tantivy) or to build (the others), and the latency of one query at a time."""
    result = {}
    limit = None
    before = time.perf_counter()
    if backend == "tantivy":
        index = r.open_retriever(str(folder))
        result["open_ms"] = round(1000 * (time.perf_counter() - before), 1)
    elif backend == "bm25s":
        index = BM25S(read_passages(corpus))
        result["build_s"] = round(time.perf_counter() - before, 1)
    else:
        index = r.BM25(read_passages(corpus))
        result["build_s"] = round(time.perf_counter() - before, 1)
        limit = 20  # queries; they are slow
    for name, queries in query_sets.items():
        index.search(queries[-1:], 5)
        times = []
        for query in queries[:limit]:
            before = time.perf_counter()
            index.search([query], 5)
            times.append(1000 * (time.perf_counter() - before))
        result[f"{name}_ms"] = round(statistics.median(times), 3)
        result[f"{name}_p95_ms"] = round(sorted(times)[int(0.95 * len(times))], 3)
    memory = {"resident_mb": process_memory("VmRSS"), "peak_mb": process_memory("VmHWM")}
    return result | memory


def run_alone(function, *arguments):
    """Call a function in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def through_server(folder: Path, queries: list[str], requests: int, clients: int = 64) -> dict:
    """Requests of one query each by many clients at once, compared with what one client got."""
    command = [sys.executable, ROOT / "tools" / "search_server.py", "--index", folder]
    server = subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True)
    remote = r.Remote(server.stdout.readline().split()[-1])
    expected = {query: remote.search([query], 3) for query in queries}
    times = []
    wrong = []

    def ask(query: str) -> None:
        before = time.perf_counter()
        if remote.search([query], 3) != expected[query]:
            wrong.append(query)
        times.append(1000 * (time.perf_counter() - before))

    begin = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(ask, [queries[n % len(queries)] for n in range(requests)]))
    seconds = time.perf_counter() - begin
    resident = int(Path(f"/proc/{server.pid}/statm").read_text().split()[1]) * 4096 / 2**20
    server.send_signal(signal.SIGTERM)
    server.wait()
    times.sort()
    return {
        "clients": clients,
        "requests": len(times),
        "wrong": len(wrong),
        "queries_per_s": round(requests / seconds),
        "p50_ms": round(times[len(times) // 2], 1),
        "p99_ms": round(times[int(0.99 * len(times))], 1),
        "server_resident_mb": round(resident),
    }


def recall(index: r.Retriever, questions: list[dict]) -> dict:
    """Share of questions with an answer in the top 3 and 5 (as whole words); ms a query.

    Yes/no questions are left out.
    """
    asked = []
    for question in questions:
        answers = {normalize(answer) for answer in question["answers"]}
        if not answers & {"yes", "no"}:
            asked.append((question["question"], answers))
    index.search([asked[0][0]], 5)
    before = time.perf_counter()
    found = [index.search([query], 5)[0] for query, _ in asked]
    milliseconds = 1000 * (time.perf_counter() - before) / len(asked)
    result = {"questions": len(asked), "ms": round(milliseconds, 2)}
    for k in (3, 5):
        hits = 0
        for (_, answers), passages in zip(asked, found, strict=True):
            texts = [normalize(f"{p['title']} {p['text']}") for p in passages[:k]]
            hits += any(f" {answer} " in f" {text} " for answer in answers for text in texts)
        result[f"top{k}"] = round(hits / len(asked), 3)
    return result


def recall_of(backend: str, passages: str, questions: str, work: Path, encoder: str | None) -> dict:
    if backend not in FACTORIES:
        return recall(r.open_retriever(passages, backend), read_questions(questions))
    folder = work / "dense"
    r.build_dense(passages, folder, encoder, backend, FACTORIES[backend])
    index = r.open_retriever(str(folder))
    before = time.perf_counter()
    vectors = index.encoder.queries(["a query of some words"])
    result = {"encode_ms": round(1000 * (time.perf_counter() - before), 1)}
    before = time.perf_counter()
    for _ in range(100):
        index.index.search(vectors, 5)
    result["faiss_ms"] = round(10 * (time.perf_counter() - before), 3)
    return recall(index, read_questions(questions)) | result


# Columns of the table by the name of the value in the results.
COLUMNS = {
    "build_s": "build s",
    "disk_mb": "disk MB",
    "open_ms": "opened in ms",
    "resident_mb": "resident MB",
    "queries_per_s": "queries/s, 64 clients",
}


def table(results: dict[str, dict]) -> str:
    """RESULTS.md's table: tantivy by size, and its latency beside that of the others."""
    titles = [f"{kind}, ms: tantivy / bm25s / rank-bm25" for kind in ("keyword", "question")]
    header = ["passages", *COLUMNS.values(), *titles]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for name in results:
        if not name.startswith("tantivy-"):
            continue
        size = int(name.removeprefix("tantivy-"))
        row = results[name] | results[f"server-{size}"]
        cells = [f"{size:,}", *(str(row[column]) for column in COLUMNS)]
        for kind in ("keyword", "question"):
            times = []
            for backend in ("tantivy", "bm25s", "rank-bm25"):
                ms = results.get(f"{backend}-{size}", {}).get(f"{kind}_ms")
                times.append("not run" if ms is None else f"{ms:.1f}")
            cells.append(" / ".join(times))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


class Report:
    """The results by name, printed as they come."""

    def __init__(self, as_json: bool):
        self.as_json = as_json
        self.results: dict[str, dict] = {}

    def add(self, name: str, result: dict) -> None:
        self.results[name] = result
        line = json.dumps({"name": name} | result) if self.as_json else f"{name:24} {result}"
        print(line, flush=True)

    def add_ratios(self) -> None:
        """How many times longer than tantivy the other BM25 take for a keyword query."""
        ratios = {}
        for name, result in self.results.items():
            backend, _, size = name.rpartition("-")
            if backend in ("rank-bm25", "bm25s") and size.isdigit():
                tantivy_ms = self.results[f"tantivy-{size}"]["keyword_ms"]
                ratio = round(result["keyword_ms"] / tantivy_ms, 1)
                ratios[f"{backend}_ms / tantivy_ms at {size}"] = ratio
        self.add("ratios", ratios)


def measure_bm25(
    report: Report, size: int, corpus: Path, folder: Path, questions: list[str], requests: int
) -> None:
    """Measure the three BM25, and tantivy behind the server, on one generated corpus."""
    keywords = keyword_queries(corpus, 2000)
    query_sets = {"keyword": keywords[:300]}
    if questions:
        query_sets["question"] = questions
    shutil.rmtree(folder, ignore_errors=True)
    result = run_alone(build, corpus, folder)
    result |= run_alone(search, "tantivy", corpus, folder, query_sets)
    disk = sum(file.stat().st_size for file in folder.rglob("*"))
    report.add(f"tantivy-{size}", result | {"disk_mb": round(disk / 2**20)})
    report.add(f"server-{size}", through_server(folder, keywords, requests))
    report.add(f"bm25s-{size}", run_alone(search, "bm25s", corpus, folder, query_sets))
    if size <= 100_000:
        result = run_alone(search, "rank-bm25", corpus, folder, query_sets)
        report.add(f"rank-bm25-{size}", result)


def measure(
    passages: str,
    questions: str | None = None,
    encoder: str | None = None,
    sizes: tuple[int, ...] = (10_000, 100_000, 1_000_000),
    requests: int = 20_000,
    work: Path = Path("/tmp/benchmark-retriever"),
    json: bool = False,
) -> None:
    """Measure every backend.

    Args:
        passages: real passages (JSONL).
        questions: questions about them, to measure recall.
        encoder: for the recall of dense indexes.
        sizes: passages of the generated corpora.
        requests: through the server.
        work: folder for corpora and indexes.
        json: print one JSON object a line.
    """
    report = Report(json)
    work.mkdir(parents=True, exist_ok=True)
    real = read_passages(passages)
    asked = [q["question"] for q in read_questions(questions)][:300] if questions else []
    for size in sizes:
        corpus = work / f"{size}.jsonl"
        if not corpus.exists():
            generate(real, size, corpus)
        measure_bm25(report, size, corpus, work / f"index-{size}", asked, requests)
    if questions:
        backends = ["rank-bm25", "tantivy"]
        if encoder:
            backends += FACTORIES
        for backend in backends:
            result = run_alone(recall_of, backend, passages, questions, work, encoder)
            report.add(f"recall-{backend}", result)
    report.add_ratios()
    if not json:
        print(table(report.results))


def main(argv: list[str] | None = None) -> None:
    tyro.cli(measure, description=__doc__, use_underscores=True, args=argv)


if __name__ == "__main__":
    main()
