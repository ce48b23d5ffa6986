"""Search engines for the policy: `search(queries, k)` gives each query its k best passages, best first.

`open_retriever` opens what `--retriever` names: a passage file (JSONL), an index folder or a search server.
A passage is `{"id", "title", "text"}`, with a `score` where the backend has one. Every backend is thread-safe.

    python retriever.py index --kind bm25 --corpus passages.jsonl --out index      # once; then, as often as wanted:
    python retriever.py search --index index "a query"
"""

import argparse
import atexit
import json
import os
import re
import shutil
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.parse import urlsplit

import numpy as np
from tqdm import tqdm

from records import (
    MALFORMED,
    Passage,
    clean,
    fingerprint,
    parse_passage,
    read_passages,
    scan_passages,
    user_errors,
    whole,
    write_text,
)


class Retriever(Protocol):
    def search(self, queries: list[str], k: int) -> list[list[Passage]]: ...


# ---------------------------------------------------------------------------------------------------------------------
# Files: one JSON object a line


def tokenize(text: str) -> list[str]:
    """Lower-case words; the same for passages and queries."""
    return re.findall(r"\w+", text.lower())


class BM25:
    """Okapi BM25 over title and text with rank-bm25: the readable reference, good for up to some ten thousand passages."""

    def __init__(self, passages: list[Passage]):
        from rank_bm25 import BM25Okapi

        self.passages = passages
        self.index = BM25Okapi([tokenize(f"{p['title']} {p['text']}") or [""] for p in passages])

    def search(self, queries: list[str], k: int) -> list[list[Passage]]:
        """The k best passages of each query, ties in corpus order; fewer only if the corpus is smaller."""
        return [self._search_one(query, k) for query in queries]

    def _search_one(self, query: str, k: int) -> list[Passage]:
        scores = self.index.get_scores(tokenize(query))
        order = (-scores).argsort(kind="stable")[:k]
        return [self.passages[i] | {"score": float(scores[i])} for i in order]


# left out of queries: most of a search's time is spent on them, and recall is the same without (RESULTS.md)
STOP_WORDS = """
    a also an and are as at be been but by did do does for from had has have he her his how if in into is it its no not of
    on or she such that the their then there these they this to was were what when where which who whom whose why will with
""".split()


MAX_TIES = 1000  # a word that 300,000 like passages have would cost seconds


class TantivyBM25:
    """Okapi BM25 (k1 = 1.2, b = 0.75) over title and text with tantivy: built in a stream, searched where it lies on disk.

    Every word is indexed; a query leaves its stop words out, unless it has no others.
    """

    def __init__(self, index):
        import tantivy

        self.tantivy, self.schema, self.searcher = tantivy, index.schema, index.searcher()
        self.words, self.content_words = self._analyzer(), self._analyzer(tantivy.Filter.custom_stopword(STOP_WORDS))
        self._pool = ThreadPoolExecutor(thread_name_prefix="bm25")  # tantivy searches without the interpreter's lock

    @staticmethod
    def _analyzer(*filters):
        import tantivy

        builder = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple())
        for each in (tantivy.Filter.remove_long(64), tantivy.Filter.lowercase(), *filters):
            builder = builder.filter(each)
        return builder.build()

    @classmethod
    def build(cls, passages: Iterable[Passage], folder: Path | None = None) -> "TantivyBM25":
        """Index passages as they come, into a folder or, without one, in memory; the writer holds at most 256 MB of them."""
        import tantivy

        schema = tantivy.SchemaBuilder().add_text_field("words", tokenizer_name="words", index_option="freq")
        schema = schema.add_unsigned_field("row", fast=True).add_bytes_field("passage", stored=True).build()
        index = tantivy.Index(schema, path=folder and str(folder))
        index.register_tokenizer("words", cls._analyzer())
        writer = index.writer(heap_size=256 << 20, num_threads=min(8, os.cpu_count()))
        for row, passage in enumerate(passages):
            document = tantivy.Document()
            document.add_text("words", f"{passage['title']} {passage['text']}")
            document.add_unsigned("row", row)
            document.add_bytes("passage", json.dumps(passage, ensure_ascii=False).encode())
            writer.add_document(document)
        writer.commit()
        writer.wait_merging_threads()
        index.reload()
        return cls(index)

    @classmethod
    def open(cls, folder: Path) -> "TantivyBM25":
        import tantivy

        with whole(folder):
            return cls(tantivy.Index.open(str(folder)))

    def search(self, queries: list[str], k: int) -> list[list[Passage]]:
        """The k best passages of each query, up to MAX_TIES ties in corpus order; fewer where fewer share a word."""
        return list(self._pool.map(lambda query: self._search_one(query, k), queries))

    def _search_one(self, query: str, k: int) -> list[Passage]:
        query, terms = clean(query), []
        for word in self.content_words.analyze(query) or self.words.analyze(query):
            terms.append((self.tantivy.Occur.Should, self.tantivy.Query.term_query(self.schema, "words", word, "freq")))
        query, limit = self.tantivy.Query.boolean_query(terms), k + 1
        while True:  # until the k-th best ties with none that was left out: which of them come first is the writer's chance
            hits = self.searcher.search(query, limit, count=False).hits
            if len(hits) < limit or limit > MAX_TIES or hits[-1][0] < hits[k - 1][0] - 1e-4:
                break
            limit *= 8
        rows = self.searcher.fast_field_values("row", [address for _, address in hits])
        best = sorted(zip(hits, rows, strict=True), key=lambda item: (-round(item[0][0], 4), item[1]))[:k]
        return [json.loads(self.searcher.doc(address)["passage"][0]) | {"score": score} for (score, address), _ in best]


# What goes before a query and before a passage, by the encoder's name, where its folder does not say (model cards)
PREFIXES = {
    r"bge-(small|base|large)-en": ("Represent this sentence for searching relevant passages: ", ""),
    r"\be5-(small|base|large)(-v2)?$": ("query: ", "passage: "),
}


class Encoder:
    """Texts to unit vectors, with sentence-transformers; the model's folder says how to pool (BGE: CLS, E5: mean)."""

    def __init__(self, model: str):
        import torch
        from sentence_transformers import SentenceTransformer

        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        try:
            self.model = SentenceTransformer(model, device=device, model_kwargs={"use_safetensors": True})  # never a pickle
        except (OSError, ValueError) as error:
            raise ValueError(f"{model}: no encoder there ({str(error).splitlines()[0]})") from None
        if device != "cpu":
            self.model.half()
        prefixes = next((value for name, value in PREFIXES.items() if re.search(name, Path(model).name.lower())), None)
        if prefixes and not any(self.model.prompts.values()):
            self.model.prompts = dict(zip(("query", "document"), prefixes, strict=True))
        self._lock = threading.Lock()  # a fast tokenizer refuses to serve two threads at once

    def queries(self, queries: list[str]) -> np.ndarray:
        """(N, D) float32."""
        with self._lock:
            return self.model.encode_query([clean(q) for q in queries], normalize_embeddings=True, show_progress_bar=False)

    def passages(self, passages: list[Passage]) -> np.ndarray:
        """(N, D) float32; batches of like length."""
        texts = [f"{p['title']} {p['text']}" for p in passages]
        return self.model.encode_document(texts, normalize_embeddings=True, show_progress_bar=True, batch_size=64)


class PassageFile:
    """Passages of a JSONL file by row, read when asked for. `rows`: the byte where each line begins, and the file's end."""

    def __init__(self, path: str | Path, rows: Path):
        self.file, self.rows = open(path, "rb"), np.load(rows, mmap_mode="r")  # noqa: SIM115
        if self.rows.ndim != 1 or self.rows[-1] != os.path.getsize(path):
            raise ValueError(f"{rows}: not the rows of {path}")

    def __len__(self) -> int:
        return len(self.rows) - 1

    def __getitem__(self, row: int) -> Passage:
        begin, end = map(int, self.rows[row : row + 2])
        return parse_passage(json.loads(os.pread(self.file.fileno(), end - begin, begin)))


class Dense:
    """Inner product of unit vectors with faiss, memory-mapped.

    Args:
        passages: row by row those of the index.
        index: file that faiss wrote.
        encoder: model of the queries, the one that made the index.
        parameters: of `faiss.ParameterSpace`, such as nprobe=64.
    """

    def __init__(self, passages: PassageFile, index: Path, encoder: str, parameters: str = ""):
        import faiss

        with whole(index):
            self.index = faiss.read_index(str(index), faiss.IO_FLAG_MMAP_IFC)
        try:
            faiss.ParameterSpace().set_index_parameters(self.index, parameters)
        except RuntimeError as error:
            raise ValueError(f"{index}: faiss refuses {parameters!r}: {str(error).splitlines()[-1]}") from None
        self.passages, self.encoder = passages, Encoder(encoder)
        rows, dim = len(passages), self.encoder.model.get_embedding_dimension()
        if (self.index.ntotal, self.index.d) != (rows, dim):
            found = f"{self.index.ntotal} vectors of size {self.index.d}"
            raise ValueError(f"{index}: {found}, but {rows} passages and an encoder of size {dim}")

    def search(self, queries: list[str], k: int) -> list[list[Passage]]:
        """The k nearest passages of each query; an approximate index may find fewer."""
        scores, rows = self.index.search(self.encoder.queries(queries), k)
        found = [[(s, r) for s, r in zip(*each, strict=True) if r >= 0] for each in zip(scores, rows, strict=True)]
        return [[self.passages[int(row)] | {"score": float(score)} for score, row in each] for each in found]


# ---------------------------------------------------------------------------------------------------------------------
# Search over HTTP


class Remote:
    """A search server: ours, or one of the two shapes in the field. The URL's path says which (SHAPES)."""

    def __init__(self, url: str):
        import requests

        path = urlsplit(url).path.rstrip("/")
        self.url, self.shape = (url, SHAPES[path]) if path in SHAPES else (url.rstrip("/") + "/search", SHAPES["/search"])
        self.session = requests.Session()

    def search(self, queries: list[str], k: int) -> list[list[Passage]]:
        """The server's results, at most k a query.

        Raises:
            RuntimeError: the server did not answer, or not in its shape.
        """
        results = []
        for start in range(0, len(queries), MAX_QUERIES):
            asked = queries[start : start + MAX_QUERIES]
            answer = fetch(self.session, "POST", self.url, json=self.shape.ask(list(map(clean, asked)), k))
            with shape_of(self.url):
                hits = self.shape.read(answer)
                if len(hits) != len(asked):
                    raise ValueError(f"{len(hits)} results for {len(asked)} queries")
                results += [[read_hit(hit) for hit in each[:k]] for each in hits]
        return results


def read_hit(hit: dict) -> Passage:
    return parse_passage(hit) | ({"score": float(hit["score"])} if hit.get("score") is not None else {})


WAITS = (0, 1, 2, 4, 8, 16, 32)  # seconds before a request is sent again
TIMEOUT = (5, 60)  # seconds to connect, and without a byte of the answer
ANSWER_SECONDS, ANSWER_BYTES = 120, 256 << 20  # of the body of an answer
GIVE_UP = 300  # seconds after which a request is not sent again, however long the server asks to wait


def fetch(session, method: str, url: str, turn: Callable[[], None] = lambda: None, **request) -> dict:
    """The JSON that a server answers, of whom much is forgiven: silence, half an answer, 429 and 5xx are tried again.

    `turn` is called before each try. None begins later than GIVE_UP seconds after the first; each takes what TIMEOUT and
    ANSWER_SECONDS allow.

    Raises:
        RuntimeError: after the last try, in one line without the request's headers.
    """
    import requests
    import urllib3

    def said(body: bytes) -> str:
        text = body.decode("utf-8", "replace")
        for value in request.get("headers", {}).values():  # a server may quote the key that it refuses
            text = text.replace(value.removeprefix("Bearer "), "***")
        return repr(text[:200])

    begin, body = time.monotonic(), b""
    for wait in (*WAITS, None):
        turn()
        try:
            with session.request(method, url, timeout=TIMEOUT, stream=True, **request) as response:
                body = read_body(response.raw)
            if response.status_code == 200:
                return json.loads(body)
            failure = f"status {response.status_code}: {said(body)}"
            if response.status_code not in (429, 500, 502, 503, 504):
                break
            after = response.headers.get("Retry-After", "")
            wait = max(wait, min(int(after), 60)) if wait is not None and after.isdigit() else wait
        except TimeoutError as error:
            failure = f"no answer ({error})"
        except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError) as error:
            failure = f"no answer ({type(error).__name__})"
        except (ValueError, RecursionError):
            failure = f"not JSON: {said(body)}"
        if wait is None or time.monotonic() + wait > begin + GIVE_UP:
            break
        time.sleep(wait)
    raise RuntimeError(f"{url}: {failure}")


def read_body(raw) -> bytes:
    """Read piece by piece: TIMEOUT bounds each wait for one, and bytes that come one by one would keep it for ever."""
    body, begin = bytearray(), time.monotonic()
    while piece := raw.read1(1 << 20, decode_content=True):
        body += piece
        if len(body) > ANSWER_BYTES or time.monotonic() > begin + ANSWER_SECONDS:
            raise TimeoutError(f"not whole within {ANSWER_SECONDS} s and {ANSWER_BYTES} bytes")
    return bytes(body)


@contextmanager
def shape_of(url: str) -> Iterator[None]:
    try:
        yield
    except MALFORMED as error:
        raise RuntimeError(f"{url}: an answer of another shape than expected ({error!r:.200})") from None


# ---------------------------------------------------------------------------------------------------------------------
# Index folders: index.json (made of what, and how) with tantivy/, or with rows.npy, vectors-*.npy and faiss.index

VERSION = 1  # of index folders
SHARD = 32768  # passages in a file of vectors
LARGE = 1 << 30  # bytes of a passage file that is indexed in memory (about 2 million passages, half a minute a million)
SMALL = 2000  # passages that rank-bm25 holds without being slow (it takes about 8 microseconds a passage and query)


def stamp(path: str | Path) -> dict:
    """Where a file is and when it was written: while both are the same, it need not be read to know its fingerprint."""
    return {"corpus": str(Path(path).resolve()), "mtime_ns": os.stat(path).st_mtime_ns}


def enter_folder(out: Path, corpus: str, settings: dict) -> dict:
    """Make an index folder, or come back to one of the same corpus and settings, finished or not; returns its header.

    Raises:
        ValueError: there is something else, or what was made of another corpus or with other settings.
    """
    file, header = out / "index.json", {"version": VERSION, **settings, "fingerprint": fingerprint(corpus)}
    there, made = {}, [path for name in ("tantivy", "faiss.index", "vectors-*.npy") for path in out.glob(name)]
    if file.is_file():
        with whole(out):
            there = dict(json.loads(file.read_text()))
    elif out.exists() and any(path.suffix != ".partial" for path in out.iterdir()):
        raise ValueError(f"{out}: it is not empty and holds no index; choose another --out")
    if other := [name for name in header if there.get(name) != header[name]]:
        if made:
            raise ValueError(f"{out}: an index with another {' and '.join(other)} is there; choose another --out")
        (out / "rows.npy").unlink(missing_ok=True)  # what a call that failed has left
        there = {}
    out.mkdir(parents=True, exist_ok=True)
    header = there | header | stamp(corpus)
    if header != there:
        write_text(file, json.dumps(header, indent=1))
    return header


def build_bm25(corpus: str, out: Path) -> None:
    """Index a passage file with tantivy. A finished index of it is left as it is."""
    if os.environ.get("RANK", "0") != "0":
        return  # one process builds it
    enter_folder(out, corpus, {"kind": "bm25"})
    if not (out / "tantivy").exists():
        partial = out / "tantivy.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        TantivyBM25.build((passage for _, passage in scan_passages(corpus)), partial)
        partial.rename(out / "tantivy")


def build_dense(corpus: str, out: Path, encoder: str, factory: str, parameters: str, prebuilt: str | None) -> None:
    """Embed a passage file and index the vectors with faiss. What an earlier call left is completed, not made again.

    Under torchrun the ranks share the embedding. Another factory or other parameters make another index of the same vectors.

    Args:
        encoder: argument of `Encoder`.
        factory: of `faiss.index_factory`, such as Flat, HNSW32,SQ8 or IVF4096,PQ64.
        parameters: see `Dense`; recorded, and used whenever the index is opened.
        prebuilt: a faiss index of the same passages in the same order, instead of making one.
    """
    rank, world, barrier = join_ranks()
    encoder = str(Path(encoder).resolve()) if Path(encoder).is_dir() else encoder
    prebuilt, index = prebuilt and str(Path(prebuilt).resolve()), out / "faiss.index"
    if rank == 0:
        header = enter_folder(out, corpus, {"kind": "dense", "encoder": encoder, "prebuilt": prebuilt})
        if not (out / "rows.npy").exists():
            begins = array("q", (begin for begin, _ in scan_passages(corpus)))
            save_array(out / "rows.npy", np.append(np.frombuffer(begins, np.int64), os.path.getsize(corpus)))
    barrier()
    with whole(out):
        passages = PassageFile(corpus, out / "rows.npy")
    if not prebuilt:
        shards = [out / f"vectors-{n:05d}.npy" for n in range(-(-len(passages) // SHARD))]
        embed(passages, shards[rank::world], encoder)
        barrier()
    if rank == 0:
        settings = {"factory": factory, "parameters": parameters}
        if header | settings != header:
            index.unlink(missing_ok=True)  # before it has another name in the header
            write_text(out / "index.json", json.dumps(header | settings, indent=1))
        if not (prebuilt or index.exists()):
            write_faiss(index, shards, factory)
        Dense(passages, Path(prebuilt or index), encoder, parameters)  # refuses what does not belong together
        if prebuilt and not index.exists():
            index.symlink_to(prebuilt)
        write_text(out / "index.json", json.dumps(header | settings | {"bytes": os.path.getsize(index)}, indent=1))


def join_ranks() -> tuple[int, int, Callable[[], None]]:
    """Rank, number of ranks and a barrier; alone without torchrun."""
    if "RANK" not in os.environ:
        return 0, 1, lambda: None
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(days=7))  # a rank may wait long for another's last shard
    atexit.register(dist.destroy_process_group)
    return dist.get_rank(), dist.get_world_size(), dist.barrier


def embed(passages: PassageFile, shards: list[Path], encoder: str) -> None:
    """Write the vectors, (SHARD, D) float16, of those shards that are not there."""
    missing = [shard for shard in shards if not shard.exists()]
    model = Encoder(encoder) if missing else None
    for shard in tqdm(missing, desc="embedding", unit="shard", disable=not missing):
        start = int(shard.stem.removeprefix("vectors-")) * SHARD
        rows = range(start, min(start + SHARD, len(passages)))
        save_array(shard, model.passages([passages[row] for row in rows]).astype(np.float16))


def save_array(path: Path, values: np.ndarray) -> None:
    with open(path.with_suffix(".partial"), "wb") as file:
        np.save(file, values)
    path.with_suffix(".partial").rename(path)


def write_faiss(path: Path, shards: list[Path], factory: str) -> None:
    """Index vectors; the whole index is in memory meanwhile."""
    import faiss

    arrays = [np.load(shard, mmap_mode="r") for shard in shards]
    try:
        index = faiss.index_factory(arrays[0].shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:  # on every n-th vector, a million at most
            step = -(-sum(map(len, arrays)) // 1_000_000)
            index.train(np.concatenate([each[::step] for each in arrays]).astype(np.float32))
    except RuntimeError as error:
        raise ValueError(f"faiss refuses {factory!r} for these vectors: {str(error).splitlines()[-1]}") from None
    for each in tqdm(arrays, desc="indexing", unit="shard"):
        index.add(each.astype(np.float32))
    faiss.write_index(index, str(path.with_suffix(".partial")))
    path.with_suffix(".partial").rename(path)


def open_index(folder: Path, corpus: str | None) -> Retriever:
    with whole(folder):
        header = json.loads((folder / "index.json").read_text())
        kind, indexed, version = header["kind"], header["fingerprint"], header["version"]
        needed = {"bm25": [], "dense": ["corpus", "encoder", "parameters"]}[kind]  # tantivy holds its passages
        if version != VERSION or not all(isinstance(header[name], str) for name in needed):
            raise ValueError(f"version {version}")
        if kind == "dense" and header.get("bytes") not in (None, os.path.getsize(folder / "faiss.index")):
            raise ValueError("faiss.index is not whole")  # of half a file faiss dies, by a signal
        corpus = corpus or (header["corpus"] if kind == "dense" else None)
    if corpus and not Path(corpus).is_file():
        raise FileNotFoundError(f"{folder}: its corpus {corpus} is not there; say where it is with --corpus")
    untouched = corpus and header | stamp(corpus) == header
    if corpus and not untouched and fingerprint(corpus) != indexed:
        raise ValueError(f"{folder}: built from another corpus than {corpus}; build an index of that one")
    if kind == "bm25":
        return TantivyBM25.open(folder / "tantivy")
    with whole(folder):
        passages = PassageFile(corpus, folder / "rows.npy")
    return Dense(passages, folder / "faiss.index", header["encoder"], header["parameters"])


def open_retriever(source: str, backend: str = "auto", corpus: str | None = None) -> Retriever:
    """What `--retriever` names.

    Args:
        source: passage file (JSONL), index folder, http://HOST:PORT of a search server.
        backend: of a passage file: rank-bm25, tantivy (in memory) or auto, which is by size.
        corpus: where the passages of an index folder are now, if they moved.

    Raises:
        ValueError, FileNotFoundError: one line that says what is wrong with `source`.
    """
    if source.startswith(("http://", "https://")):
        return Remote(source)
    if Path(source, "index.json").is_file():
        return open_index(Path(source), corpus)
    if not Path(source).is_file():
        raise FileNotFoundError(f"{source}: neither a passage file, an index folder nor a URL (--retriever)")
    if backend != "rank-bm25" and os.path.getsize(source) > LARGE:
        build = f"python retriever.py index --kind bm25 --corpus {source} --out {Path(source).with_suffix('')}-index"
        raise ValueError(f"{source}: too large to be indexed in memory whenever it is opened; once and for all: {build}")
    small = backend == "auto" and sum(1 for _ in islice(scan_passages(source), SMALL + 1)) <= SMALL
    if small or backend == "rank-bm25":
        return BM25(read_passages(source))
    return TantivyBM25.build(passage for _, passage in scan_passages(source))


# ---------------------------------------------------------------------------------------------------------------------
# The search server

MAX_QUERIES = 256  # of one request


class Shape(NamedTuple):
    """How a path of a search server is asked and how it answers."""

    ask: Callable[[list[str], int], dict]  # request body of (queries, k)
    answer: Callable[[list[list[Passage]], bool], dict]  # answer body of (results, with scores)
    read: Callable[[dict], list[list[dict]]]  # results, as `parse_passage` takes them, of an answer body


def read_line(line: str) -> dict:
    """A line of the official corpus: number, tab, title, three blanks, text."""
    title, _, text = re.sub(r"^\d+\t", "", line).partition("   ")
    return {"id": title, "title": title, "text": text}


SHAPES = {
    "/search": Shape(  # ours
        lambda queries, k: {"queries": queries, "k": k},
        lambda results, _: {"results": results},
        lambda body: body["results"],
    ),
    "/queries": Shape(  # the official R1-Searcher's
        lambda queries, k: {"queries": queries, "k": k},
        lambda results, _: {"answers": [[f"{n}\t{p['title']}   {p['text']}" for n, p in enumerate(r)] for r in results]},
        lambda body: [[read_line(line) for line in each] for each in body["answers"]],
    ),
    "/retrieve": Shape(  # Search-R1's
        lambda queries, k: {"queries": queries, "topk": k, "return_scores": True},
        lambda results, scores: {"result": [[search_r1_hit(p, scores) for p in each] for each in results]},
        lambda body: [[hit["document"] | {"score": hit["score"]} for hit in each] for each in body["result"]],
    ),
}


def search_r1_hit(passage: Passage, with_score: bool) -> dict:
    document = {"id": passage["id"], "contents": f'"{passage["title"]}"\n{passage["text"]}'}
    return {"document": document, "score": passage.get("score")} if with_score else document


# ---------------------------------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    index = commands.add_parser("index", help="build an index folder; a second call completes an interrupted one")
    index.add_argument("--kind", choices=("bm25", "dense"), required=True)
    index.add_argument("--corpus", required=True, help="passage file (JSONL)")
    index.add_argument("--out", type=Path, required=True, help="folder to make")
    index.add_argument("--encoder", help="dense: folder or hub name of an encoder, such as BAAI/bge-large-en-v1.5")
    index.add_argument("--factory", help="dense: faiss index_factory, such as HNSW32,SQ8 (default Flat)")
    index.add_argument("--parameters", default="", help="dense: faiss parameters, such as nprobe=64 or efSearch=128")
    index.add_argument("--prebuilt", help="dense: a faiss index of --corpus, row by row, instead of making one")
    search = commands.add_parser("search", help="show the passages of a query")
    search.add_argument("--index", required=True, help="anything that --retriever takes")
    search.add_argument("--corpus", help="of an index folder: where its passages are now, if they moved")
    search.add_argument("--backend", choices=("auto", "rank-bm25", "tantivy"), default="auto", help="of a passage file")
    search.add_argument("query")
    search.add_argument("-k", type=int, default=5, help="passages to show (default 5)")
    args = parser.parse_args(argv)
    if args.command == "index":
        if args.kind == "dense" and not args.encoder:
            parser.error("--kind dense needs --encoder")
        if args.kind == "bm25" and (args.encoder or args.prebuilt or args.parameters or args.factory):
            parser.error("--encoder, --factory, --parameters and --prebuilt are for --kind dense")
        if args.prebuilt and args.factory:
            parser.error("--factory: the prebuilt index has one")
    if args.command == "search" and args.k < 1:
        parser.error("-k: at least 1")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    with user_errors("retriever.py"):
        if args.command == "index" and args.kind == "bm25":
            build_bm25(args.corpus, args.out)
        elif args.command == "index":
            build_dense(args.corpus, args.out, args.encoder, args.factory or "Flat", args.parameters, args.prebuilt)
        else:
            for passage in open_retriever(args.index, args.backend, args.corpus).search([args.query], args.k)[0]:
                print(f"{passage['title']}: {passage['text']}")


if __name__ == "__main__":
    main()
