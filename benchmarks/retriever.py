"""Retrieval measured: build, memory, disk, latency, throughput behind the server, and whether the answers are found.

    python benchmarks/retriever.py --passages wiki_passages.jsonl --questions hotpotqa_500.jsonl --encoder MiniLM-folder

`--passages` are real ones: corpora of the asked sizes are drawn from their words, and the questions are searched in them.
Every backend builds and searches in a process of its own, all in one run. The last line of `--json` holds the ratios.
"""

import argparse
import json
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # before this folder: the retriever that is measured has this file's name

import records  # noqa: E402
import retriever as r  # noqa: E402
from reward import normalize  # noqa: E402

FACTORIES = {"Flat": "", "HNSW32": "efSearch=64", "IVF64,Flat": "nprobe=8", "IVF64,SQ8": "nprobe=8"}


def generate(real: list[records.Passage], size: int, path: Path) -> None:
    """Passages of about 80 words drawn from the real word counts; words not seen there have the share of those seen once."""
    words, counts = np.unique(" ".join(f"{p['title']} {p['text']}" for p in real).split(), return_counts=True)
    words, unseen = words.astype(object), (counts == 1).sum() / counts.sum()
    shares, rng = np.cumsum(counts / counts.sum() * (1 - unseen)), np.random.default_rng(0)
    with open(path, "w") as file:
        for start in range(0, size, 10_000):
            lengths = rng.poisson(80, min(10_000, size - start)) + 3
            drawn = np.searchsorted(shares, rng.random(lengths.sum()))
            rare = (1000 * 1000 ** rng.random(len(drawn))).astype(int)  # their frequencies follow Zipf's law
            text = [words[w] if w < len(words) else f"w{n}" for w, n in zip(drawn, rare, strict=True)]
            for n, end in enumerate(np.cumsum(lengths)):
                part = text[end - lengths[n] : end]
                record = {"id": str(start + n), "title": " ".join(part[:2]), "text": " ".join(part[2:])}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


def keyword_queries(corpus: Path, count: int) -> list[str]:
    """3 to 6 words of one passage each, none a stop word."""
    rng, queries = random.Random(0), []
    for _, passage in zip(range(count), records.scan_jsonl(corpus, records.parse_passage, "passages"), strict=False):
        words = [word for word in r.tokenize(passage[1]["text"]) if word not in r.STOP_WORDS]
        queries.append(" ".join(rng.sample(words, min(len(words), rng.randint(3, 6)))))
    return queries


def memory(name: str) -> float:
    """MB of this process: VmRSS, now, or VmHWM, at most so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return round(int(line.split()[1]) / 1024)


class BM25S:
    """bm25s as its README uses it."""

    def __init__(self, passages: list[records.Passage]):
        import bm25s

        self.bm25s, self.index = bm25s, bm25s.BM25(corpus=[p["id"] for p in passages])
        texts = [f"{p['title']} {p['text']}" for p in passages]
        self.index.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)

    def search(self, queries: list[str], k: int) -> list:
        tokens = self.bm25s.tokenize(queries, stopwords="en", show_progress=False)
        return self.index.retrieve(tokens, k=k, show_progress=False)[0]


def build(backend: str, corpus: Path, folder: Path) -> dict:
    before = time.perf_counter()
    if backend == "tantivy":
        r.build_bm25(str(corpus), folder)
    return {"build_s": round(time.perf_counter() - before, 1), "build_peak_mb": memory("VmHWM")}


def search(backend: str, corpus: Path, folder: Path, sets: dict[str, list[str]]) -> dict:
    """Opening (of the others: building) and the latency of one query at a time, by set of queries."""
    index, result, before = None, {}, time.perf_counter()
    if backend == "tantivy":
        index = r.open_retriever(str(folder))
        result["open_ms"] = round(1000 * (time.perf_counter() - before), 1)
    else:
        index = {"rank-bm25": r.BM25, "bm25s": BM25S}[backend](records.read_passages(corpus))
        result["build_s"] = round(time.perf_counter() - before, 1)
        sets = {name: queries[: 20 if backend == "rank-bm25" else None] for name, queries in sets.items()}
    for name, queries in sets.items():
        index.search(queries[-1:], 5)
        times = []
        for query in queries:
            before = time.perf_counter()
            index.search([query], 5)
            times.append(1000 * (time.perf_counter() - before))
        result[f"{name}_ms"] = round(statistics.median(times), 3)
        result[f"{name}_p95_ms"] = round(sorted(times)[int(0.95 * len(times))], 3)
    return result | {"resident_mb": memory("VmRSS"), "peak_mb": memory("VmHWM")}


def alone(function, *arguments):
    """In a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def through_server(folder: Path, queries: list[str], requests: int, clients: int = 64) -> dict:
    """Requests of one query each by many clients at once; each answer is compared with what one client got."""
    command = [sys.executable, ROOT / "tools" / "search_server.py", "--index", folder, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    url = server.stdout.readline().split()[-1]
    single = r.Remote(url)
    expected = {query: single.search([query], 3) for query in queries}
    times, wrong, local = [], [], threading.local()

    def ask(query: str) -> None:
        local.remote = getattr(local, "remote", None) or r.Remote(url)
        before = time.perf_counter()
        if local.remote.search([query], 3) != expected[query]:
            wrong.append(query)
        times.append(1000 * (time.perf_counter() - before))

    begin = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(ask, (queries[n % len(queries)] for n in range(requests))))
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
    """Share of questions with an answer in the top 3 and 5 (as whole words), yes/no questions left out; ms a query."""
    questions = [q for q in questions if not {"yes", "no"} & set(map(normalize, q["answers"]))]
    index.search([questions[0]["question"]], 5)
    before = time.perf_counter()
    found = [index.search([q["question"]], 5)[0] for q in questions]
    result = {"questions": len(questions), "ms": round(1000 * (time.perf_counter() - before) / len(questions), 2)}
    texts = [[f" {normalize(p['title'] + ' ' + p['text'])} " for p in passages] for passages in found]
    for k in (3, 5):
        hits = [
            any(f" {normalize(a)} " in text for a in q["answers"] for text in t[:k])
            for q, t in zip(questions, texts, strict=True)
        ]
        result[f"top{k}"] = round(sum(hits) / len(hits), 3)
    return result


def recall_of(backend: str, passages: str, questions: str, work: Path, encoder: str | None) -> dict:
    if backend in FACTORIES:
        folder = work / "dense"
        r.build_dense(passages, folder, encoder, backend, FACTORIES[backend], None)
        index = r.open_retriever(str(folder))
        before, vectors = time.perf_counter(), index.encoder.queries(["a query of some words"])
        encoding = 1000 * (time.perf_counter() - before)
        before = time.perf_counter()
        for _ in range(100):
            index.index.search(vectors, 5)
        result = {"faiss_ms": round(10 * (time.perf_counter() - before), 3), "encode_ms": round(encoding, 1)}
        return recall(index, records.read_questions(questions)) | result
    return recall(r.open_retriever(passages, backend), records.read_questions(questions))


def table(results: dict[str, dict]) -> str:
    """The README's: tantivy by size, and beside its times of a query the others'."""
    columns = {
        "build s": "build_s",
        "disk MB": "disk_mb",
        "opened in ms": "open_ms",
        "resident MB": "resident_mb",
        "queries/s, 64 clients": "queries_per_s",
    }
    times = {f"{kind}, ms: tantivy / bm25s / rank-bm25": f"{kind}_ms" for kind in ("keyword", "question")}
    lines = ["| passages | " + " | ".join([*columns, *times]) + " |", "|" + "---|" * (1 + len(columns) + len(times))]
    for size in (int(name.split("-")[1]) for name in results if name.startswith("tantivy-")):
        row = results[f"tantivy-{size}"] | results[f"server-{size}"]
        cells = [row[name] for name in columns.values()]
        for name in times.values():
            found = [results.get(f"{backend}-{size}", {}).get(name) for backend in ("tantivy", "bm25s", "rank-bm25")]
            cells.append(" / ".join("not run" if ms is None else f"{ms:.1f}" for ms in found))
        lines.append(f"| {size:,} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", required=True, help="real passages (JSONL)")
    parser.add_argument("--questions", help="questions about them: recall")
    parser.add_argument("--encoder", help="for dense recall")
    parser.add_argument(
        "--sizes", type=int, nargs="*", default=[10_000, 100_000, 1_000_000], help="passages of generated corpora"
    )
    parser.add_argument("--requests", type=int, default=20_000, help="through the server")
    parser.add_argument("--work", type=Path, default=Path("/tmp/benchmark-retriever"), help="folder for corpora and indexes")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    results = {}

    def report(name: str, result: dict) -> None:
        results[name] = result
        print(json.dumps({"name": name} | result) if args.json else f"{name:24} {result}", flush=True)

    real = records.read_passages(args.passages)
    questions = [q["question"] for q in records.read_questions(args.questions)][:300] if args.questions else []
    for size in args.sizes:
        corpus, folder = args.work / f"{size}.jsonl", args.work / f"index-{size}"
        if not corpus.exists():
            generate(real, size, corpus)
        keywords = keyword_queries(corpus, 2000)
        sets = {"keyword": keywords[:300]} | ({"question": questions} if questions else {})
        subprocess.run(["rm", "-rf", folder], check=True)
        built = alone(build, "tantivy", corpus, folder)
        disk = round(sum(file.stat().st_size for file in folder.rglob("*")) / 2**20)
        report(f"tantivy-{size}", built | alone(search, "tantivy", corpus, folder, sets) | {"disk_mb": disk})
        report(f"server-{size}", through_server(folder, keywords, args.requests))
        report(f"bm25s-{size}", alone(search, "bm25s", corpus, folder, sets))
        if size <= 100_000:
            report(f"rank-bm25-{size}", alone(search, "rank-bm25", corpus, folder, sets))
    for backend in ["rank-bm25", "tantivy", *(FACTORIES if args.encoder else [])] if args.questions else []:
        report(f"recall-{backend}", alone(recall_of, backend, args.passages, args.questions, args.work, args.encoder))
    ratios = {}
    for size in args.sizes:
        for other in ("rank-bm25", "bm25s"):
            if f"{other}-{size}" in results:
                times = [results[f"{name}-{size}"]["keyword_ms"] for name in (other, "tantivy")]
                ratios[f"{other}_ms / tantivy_ms at {size}"] = round(times[0] / times[1], 1)
    report("ratios", ratios)
    if not args.json:
        print(table(results))


if __name__ == "__main__":
    main()
