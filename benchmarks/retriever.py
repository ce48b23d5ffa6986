"""Retrieval measured: build, memory, disk, latency, throughput behind the server, recall.

    python benchmarks/retriever.py --passages wiki_passages.jsonl \
        --questions hotpotqa_500.jsonl --encoder MiniLM-folder

`--passages` are real ones: corpora of `--sizes` are drawn from their words, and the questions are
searched in them. Every backend builds and searches in a process of its own, all in one run; recall
is that of the real passages, with `--encoder` of dense indexes too. The last line has
the ratios: how many times as long as tantivy rank-bm25 takes for a keyword query.
"""

import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import accumulate, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import tyro

# Before this file's folder: the retriever that is measured has this file's name.
sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.measure import peak_mib, search_server, show
from bm25 import BM25, STOP_WORDS, TantivyBM25, tokenize
from records import Passage, read_passages, read_questions, scan_passages
from retriever import build_bm25, build_dense, open_retriever
from reward import best, contiguous_match
from search_client import Remote

CLIENTS = 64
BACKENDS = {"tantivy": TantivyBM25.build, "rank-bm25": BM25}
MAX_RANK_BM25_SIZE = 100_000  # passages; a query of a million takes rank-bm25 seconds
# faiss factories whose recall is measured, and the parameters of each.
FACTORIES = {"Flat": "", "HNSW32": "efSearch=64", "IVF64,Flat": "nprobe=8", "IVF64,SQ8": "nprobe=8"}


def timed(function: Callable, *arguments) -> tuple[Any, float]:
    """What a call returns, and its milliseconds."""
    start = time.perf_counter()
    result = function(*arguments)
    return result, 1000 * (time.perf_counter() - start)


def run_alone(function: Callable, *arguments) -> Any:
    """Call a function in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def generate(real: list[Passage], size: int, path: Path) -> None:
    """Write passages of about 80 words, drawn with the real words' frequencies.

    Words that the real passages lack have the share of the words seen once (Good-Turing); their
    frequencies follow Zipf's law.
    """
    counts = Counter(" ".join(f"{p['title']} {p['text']}" for p in real).split())
    once = sum(count == 1 for count in counts.values())
    words = ["", *counts]  # "" stands for an unseen word
    weights = list(accumulate([once / (1 - once / counts.total()), *counts.values()]))
    rng = random.Random(0)
    with open(path, "w") as file:
        for number in range(size):
            drawn = rng.choices(words, cum_weights=weights, k=round(rng.gauss(83, 9)))
            text = [word or f"w{int(1000 * 1000 ** rng.random())}" for word in drawn]
            passage = {"id": str(number), "title": " ".join(text[:2]), "text": " ".join(text[2:])}
            file.write(json.dumps(passage, ensure_ascii=False) + "\n")


def keyword_queries(corpus: Path, count: int) -> list[str]:
    """3 to 6 words of one passage each, none a stop word."""
    rng = random.Random(0)
    queries = []
    for _, passage in islice(scan_passages(corpus), count):
        words = [word for word in tokenize(passage["text"]) if word not in STOP_WORDS]
        queries.append(" ".join(rng.sample(words, min(len(words), rng.randint(3, 6)))))
    return queries


def build(corpus: Path, folder: Path) -> dict:
    _, ms = timed(build_bm25, str(corpus), folder)
    return {"build_s": round(ms / 1000, 1), "build_peak_mb": round(peak_mib())}


def search(backend: str, corpus: Path, folder: Path, query_sets: dict[str, list[str]]) -> dict:
    """Time to open (tantivy) or to build (rank-bm25), and the latency of one query at a time."""
    if backend == "tantivy":
        index, ms = timed(open_retriever, str(folder))
    else:
        index, ms = timed(BM25, read_passages(corpus))
    result = {"open_ms": round(ms, 1)}
    for name, queries in query_sets.items():
        index.search(queries[-1:], 5)  # warm up
        if backend == "rank-bm25":
            queries = queries[:20]  # they are slow
        times = [timed(index.search, [query], 5)[1] for query in queries]
        result[f"{name}_ms"] = round(statistics.median(times), 3)
    return result | {"resident_mb": psutil.Process().memory_info().rss >> 20}


def through_server(folder: Path, queries: list[str], requests: int) -> dict:
    """Requests of one query each by many clients at once, compared with what one client got."""
    asked = [queries[number % len(queries)] for number in range(requests)]
    with search_server(folder) as (_, url), ThreadPoolExecutor(CLIENTS) as pool:
        remote = Remote(url)
        expected = {query: remote.search([query], 3) for query in queries}
        start = time.perf_counter()
        answers = list(pool.map(lambda query: timed(remote.search, [query], 3), asked))
        seconds = time.perf_counter() - start
    wrong = sum(expected[query] != found for query, (found, _) in zip(asked, answers, strict=True))
    times = sorted(ms for _, ms in answers)
    return {
        "requests": len(times),
        "wrong": wrong,
        "queries_per_s": round(requests / seconds),
        "p50_ms": round(times[len(times) // 2], 1),
        "p99_ms": round(times[int(0.99 * len(times))], 1),
    }


def recall(backend: str, passages: str, questions: str, work: Path, encoder: str | None) -> dict:
    """Share of questions with an answer in the top 3 and 5 (as whole words); ms a query.

    Yes/no questions are left out.
    """
    result, times, hits = {}, [], Counter()
    if backend in FACTORIES:
        build_dense(passages, work / "dense", encoder, backend, FACTORIES[backend])
        index = open_retriever(str(work / "dense"))
        vectors, encode_ms = timed(index.encoder.queries, ["a query of some words"])
        faiss_ms = statistics.median(timed(index.index.search, vectors, 5)[1] for _ in range(100))
        result = {"encode_ms": round(encode_ms, 1), "faiss_ms": round(faiss_ms, 3)}
    else:
        index = BACKENDS[backend](read_passages(passages))
    index.search(["a query of some words"], 5)  # warm up
    for question in read_questions(questions):
        answers = question["answers"]
        if {"yes", "no"} & {answer.lower() for answer in answers}:
            continue
        (found,), ms = timed(index.search, [question["question"]], 5)
        times.append(ms)
        matches = [best(contiguous_match, f"{p['title']} {p['text']}", answers) for p in found]
        for k in (3, 5):
            hits[f"top{k}"] += max(matches[:k], default=0)
    result |= {"questions": len(times), "ms": round(statistics.mean(times), 2)}
    return result | {name: round(count / len(times), 3) for name, count in hits.items()}


def measure(
    passages: str, questions: str, encoder: str | None, sizes: tuple, requests: int, work: Path
) -> Iterator[tuple[str, dict]]:
    """Yield the results by name; all arguments but `work` are those of the command."""
    real = read_passages(passages)
    asked = [question["question"] for question in read_questions(questions)][:300]
    for size in sizes:
        corpus, index = work / f"{size}.jsonl", work / f"index-{size}"
        generate(real, size, corpus)
        keywords = keyword_queries(corpus, 2000)
        query_sets = {"keyword": keywords[:300], "question": asked}
        result = run_alone(build, corpus, index)
        result |= run_alone(search, "tantivy", corpus, index, query_sets)
        disk = sum(file.stat().st_size for file in (index / "tantivy").iterdir())
        yield f"tantivy-{size}", result | {"disk_mb": round(disk / 2**20)}
        yield f"server-{size}", through_server(index, keywords, requests)
        if size <= MAX_RANK_BM25_SIZE:
            yield f"rank-bm25-{size}", run_alone(search, "rank-bm25", corpus, index, query_sets)
    backends = list(BACKENDS)
    if encoder:
        backends += FACTORIES
    for backend in backends:
        yield f"recall-{backend}", run_alone(recall, backend, passages, questions, work, encoder)


def latencies(results: dict[str, dict], size: str, kind: str) -> str:
    """Milliseconds of a query of each backend, as a cell of the table."""
    cells = []
    for backend in BACKENDS:
        result = results.get(f"{backend}-{size}")
        cells.append(f"{result[kind]:.1f}" if result else "not run")
    return " / ".join(cells)


def table(results: dict[str, dict]) -> str:
    """RESULTS.md's table: tantivy by size, and its latency beside that of the others."""
    lines = [
        "| passages | build s | disk MiB | opened in ms | resident MiB | queries/s, 64 clients "
        "| keyword, ms: tantivy / rank-bm25 | question, ms: tantivy / rank-bm25 |",
        "|" + "---|" * 8,
    ]
    for name, served in results.items():
        kind, _, size = name.rpartition("-")
        if kind == "server":
            row = results[f"tantivy-{size}"] | served
            columns = ("build_s", "disk_mb", "open_ms", "resident_mb", "queries_per_s")
            cells = [f"{int(size):,}", *(str(row[column]) for column in columns)]
            cells += [latencies(results, size, kind) for kind in ("keyword_ms", "question_ms")]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(
    passages: str, questions: str, encoder: str | None = None,
    sizes: tuple[int, ...] = (10_000, 100_000, 1_000_000), requests: int = 20_000,
) -> None:  # fmt: skip
    results, ratios = {}, {"name": "ratios"}
    with tempfile.TemporaryDirectory() as folder:
        for name, result in measure(passages, questions, encoder, sizes, requests, Path(folder)):
            results[name] = result
            show({"name": name} | result)
    for size in sizes:
        if size <= MAX_RANK_BM25_SIZE:
            tantivy, rank_bm25 = (results[f"{name}-{size}"]["keyword_ms"] for name in BACKENDS)
            ratios[f"rank-bm25_ms / tantivy_ms at {size}"] = round(rank_bm25 / tantivy, 1)
    show(ratios)
    print(table(results), file=sys.stderr)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__, use_underscores=True)
