"""Search engines for the policy: `search(queries, k)` returns the k best passages of each query.

`open_retriever` opens what `--retriever` names: a passage file (JSONL), an index folder or a search
server. Passages come best first, with a `score` where the backend has one. Every backend is
thread-safe.

    python retriever.py index --kind bm25 --corpus passages.jsonl --out index   # once
    python retriever.py search --index index "a query"                          # as often as wanted
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol
from urllib.parse import urlsplit

import tyro
import urllib3

from bm25 import BM25, TantivyBM25
from dense import Dense, Encoder, PassageFile, write_faiss, write_rows, write_vectors
from records import (
    MALFORMED,
    Passage,
    fingerprint,
    fsync_and_rename,
    parse_passage,
    read_passages,
    replace_surrogates,
    reraise_corrupt,
    scan_passages,
    user_errors,
    write_text,
)


class Retriever(Protocol):
    def search(self, queries: list[str], k: int) -> list[list[Passage]]:
        """One list of passages for each query."""


# --------------------------------------------------------------------------------------------------
# The client of a search server

# A failed request is sent again up to 6 times within about a minute: after 0, 2, 4, 8, 16 and 32
# seconds, or when the server asks for it (Retry-After). A silent server costs TIMEOUT each time.
RETRY_POLICY = urllib3.Retry(
    total=6,
    backoff_factor=1,
    retry_after_max=60,
    status_forcelist=[429, 500, 502, 503, 504],
    allowed_methods=None,  # all of them: a search changes nothing on the server
    raise_on_status=False,  # the last answer says more than the exception
)
TIMEOUT = urllib3.Timeout(connect=5, read=60)  # seconds; read: without a byte of the answer
HTTP = urllib3.PoolManager(maxsize=64)  # connections that are kept open for reuse, of each host


def fetch_json(method: str, url: str, **request: Any) -> dict:
    """Send a request and parse the JSON of the answer.

    RETRY_POLICY says which failures are retried; a body that is not JSON is retried too.

    Args:
        request: `headers`, and `json` (the body) or `fields` (the query string) of the request.

    Raises:
        RuntimeError: the last failure, in one line without the values of the request's headers.
    """
    retries = RETRY_POLICY
    while True:
        try:
            response = HTTP.request(method, url, retries=retries, timeout=TIMEOUT, **request)
        except urllib3.exceptions.HTTPError as error:
            failure = "no answer"
            details = str(getattr(error, "reason", error))  # of MaxRetryError: the last cause
            break
        failure = f"status {response.status}"
        details = response.data.decode("utf-8", "replace")
        if response.status != 200:
            break
        try:
            return response.json()
        except (ValueError, RecursionError):
            failure = "not JSON"
        if not response.retries.total:
            break
        retries = response.retries.increment(method, url)
        retries.sleep()
    for value in request.get("headers", {}).values():  # a server may quote the key that it refuses
        details = details.replace(value.removeprefix("Bearer "), "***")
    raise RuntimeError(f"{url}: {failure}: {details[:200]!r}")


@contextmanager
def expected_shape(url: str) -> Iterator[None]:
    """Turn what parsing an answer raises (MALFORMED) into a RuntimeError of one line."""
    try:
        yield
    except MALFORMED as error:
        failure = f"an answer of another shape than expected ({error!r:.200})"
        raise RuntimeError(f"{url}: {failure}") from None


class Remote:
    """A search server. The path of its URL says which one.

    `/search` is tools/search_server.py's own (and what a URL without a path means), `/queries` is
    R1-Searcher's official server, `/retrieve` is Search-R1's.
    """

    def __init__(self, url: str):
        self.url = url
        self.path = urlsplit(url).path.rstrip("/")
        if self.path not in ("/search", "/queries", "/retrieve"):
            self.url = url.rstrip("/") + "/search"

    def search(self, queries: list[str], k: int) -> list[list[Passage]]:
        """The server's results, at most k of each query.

        Raises:
            RuntimeError: the server did not answer, or not in its shape.
        """
        request = {"queries": [replace_surrogates(query) for query in queries], "k": k}
        if self.path == "/retrieve":
            request = {"queries": request["queries"], "topk": k, "return_scores": True}
        answer = fetch_json("POST", self.url, json=request)
        with expected_shape(self.url):
            results = self._parse(answer)
            if len(results) != len(queries):
                raise ValueError(f"{len(results)} results for {len(queries)} queries")
            return [passages[:k] for passages in results]

    def _parse(self, answer: dict) -> list[list[Passage]]:
        if self.path == "/queries":
            return [[parse_line(line) for line in lines] for lines in answer["answers"]]
        if self.path == "/retrieve":
            return [
                [parse_hit(hit["document"] | {"score": hit["score"]}) for hit in hits]
                for hits in answer["result"]
            ]
        return [[parse_hit(hit) for hit in hits] for hits in answer["results"]]


def parse_hit(hit: dict) -> Passage:
    """A passage with the score that the server gave it, if any."""
    passage = parse_passage(hit)
    if hit.get("score") is not None:
        passage["score"] = float(hit["score"])
    return passage


def parse_line(line: str) -> Passage:
    """A line of R1-Searcher's corpus: number, tab, title, three blanks, text."""
    title, _, text = re.sub(r"^\d+\t", "", line).partition("   ")
    return parse_passage({"id": title, "title": title, "text": text})


# --------------------------------------------------------------------------------------------------
# Index folders: index.json (the header), and tantivy/ or rows.npy, vectors.npy and faiss.index

VERSION = 1  # of index folders


def corpus_stamp(corpus: str) -> dict:
    """Path and time of a corpus: while both are the same, its fingerprint need not be computed."""
    return {"corpus": str(Path(corpus).resolve()), "mtime_ns": os.stat(corpus).st_mtime_ns}


def prepare_folder(out: Path, corpus: str, settings: dict) -> dict:
    """Make an index folder, or come back to one of the same corpus and settings.

    Returns:
        The header of the folder, which may be finished or not.

    Raises:
        ValueError: the folder holds something else, or an index of another corpus or settings.
    """
    header_file = out / "index.json"
    expected = {"version": VERSION, **settings, "fingerprint": fingerprint(corpus)}
    found = {}
    if header_file.is_file():
        with reraise_corrupt(out):
            found = dict(json.loads(header_file.read_text()))
    elif out.exists() and any(path.suffix != ".partial" for path in out.iterdir()):
        raise ValueError(f"{out}: it is not empty and holds no index; choose another --out")
    different = [name for name in expected if found.get(name) != expected[name]]
    if different:
        if any((out / name).exists() for name in ("tantivy", "vectors.npy", "faiss.index")):
            names = " and ".join(different)
            raise ValueError(f"{out}: an index with another {names} is there; choose another --out")
        (out / "rows.npy").unlink(missing_ok=True)  # left by a call that failed
        found = {}
    out.mkdir(parents=True, exist_ok=True)
    header = found | expected | corpus_stamp(corpus)
    if header != found:
        write_header(out, header)
    return header


def write_header(folder: Path, header: dict) -> None:
    write_text(folder / "index.json", json.dumps(header, indent=1))


def build_bm25(corpus: str, out: Path) -> None:
    """Index a passage file with tantivy. A finished index of the file is left as it is."""
    prepare_folder(out, corpus, {"kind": "bm25"})
    if (out / "tantivy").exists():
        return
    partial = out / "tantivy.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    TantivyBM25.build((passage for _, passage in scan_passages(corpus)), partial)
    fsync_and_rename(partial, out / "tantivy")


def build_dense(
    corpus: str,
    out: Path,
    encoder: str,
    factory: str = "Flat",
    parameters: str = "",
    prebuilt: str | None = None,
) -> None:
    """Embed a passage file and index the vectors with faiss.

    Finished vectors in the folder are used again, so that another factory makes another index of
    them.

    Args:
        encoder: argument of `Encoder`.
        factory: of `faiss.index_factory`, such as Flat, HNSW32,SQ8 or IVF4096,PQ64.
        parameters: see `Dense`; recorded, and used whenever the index is opened.
        prebuilt: a faiss index of the same passages in the same order, instead of making one.
    """
    encoder = str(Path(encoder).resolve()) if Path(encoder).is_dir() else encoder
    prebuilt = str(Path(prebuilt).resolve()) if prebuilt else None
    settings = {"kind": "dense", "encoder": encoder, "prebuilt": prebuilt}
    header = prepare_folder(out, corpus, settings)
    rows = out / "rows.npy"
    vectors = out / "vectors.npy"
    index = out / "faiss.index"
    if not rows.exists():
        write_rows(rows, corpus)
    with reraise_corrupt(rows, "remove it to make it again"):
        passages = PassageFile(corpus, rows)
    if not prebuilt:
        if not vectors.exists():
            write_vectors(vectors, passages, Encoder(encoder))
        size = index.stat().st_size if index.exists() else None
        if (header.get("factory"), header.get("bytes")) != (factory, size):
            write_faiss(index, vectors, factory)
            header |= {"factory": factory, "bytes": index.stat().st_size}
            write_header(out, header)
    Dense(passages, Path(prebuilt or index), encoder, parameters)  # refuses what does not match
    if prebuilt:
        index.unlink(missing_ok=True)
        index.symlink_to(prebuilt)
    write_header(out, header | {"parameters": parameters, "bytes": index.stat().st_size})


# --------------------------------------------------------------------------------------------------
# Opening

# A larger passage file must be indexed on disk (1 GiB: about 2 million passages, which take half a
# minute a million whenever they are indexed in memory).
MAX_IN_MEMORY_BYTES = 1 << 30
# With more passages rank-bm25 is slow: a query takes it about 8 microseconds a passage.
MAX_RANK_BM25_PASSAGES = 2000


def open_index(folder: Path, corpus: str | None) -> Retriever:
    """Open an index folder; arguments and errors as in `open_retriever`."""
    with reraise_corrupt(folder):
        header = json.loads((folder / "index.json").read_text())
        if header["version"] != VERSION:
            raise ValueError(f"version {header['version']}")
        is_dense = header["kind"] == "dense"
        indexed = header["fingerprint"]
        if is_dense:
            encoder = str(header["encoder"])
            parameters = str(header["parameters"])
            corpus = corpus or str(header["corpus"])  # a BM25 index holds its passages itself
            if header["bytes"] != os.path.getsize(folder / "faiss.index"):
                raise ValueError("faiss.index is not whole")  # faiss would die, by a signal
    if corpus and not Path(corpus).is_file():
        remedy = "say where it is with --corpus"
        raise FileNotFoundError(f"{folder}: its corpus {corpus} is not there; {remedy}")
    if corpus and header | corpus_stamp(corpus) != header and fingerprint(corpus) != indexed:
        remedy = "build an index of that one"
        raise ValueError(f"{folder}: built from another corpus than {corpus}; {remedy}")
    if not is_dense:
        return TantivyBM25.open(folder / "tantivy")
    with reraise_corrupt(folder):
        passages = PassageFile(corpus, folder / "rows.npy")
    return Dense(passages, folder / "faiss.index", encoder, parameters)


def open_retriever(source: str, backend: str = "auto", corpus: str | None = None) -> Retriever:
    """Open what `--retriever` names.

    Args:
        source: passage file (JSONL), index folder, or http://HOST:PORT of a search server.
        backend: of a passage file: rank-bm25, tantivy (in memory) or auto, which goes by size.
        corpus: where the passages of an index folder are, if they moved.

    Raises:
        ValueError, FileNotFoundError: one line that says what is wrong with `source`.
    """
    if source.startswith(("http://", "https://")):
        return Remote(source)
    if Path(source, "index.json").is_file():
        return open_index(Path(source), corpus)
    if not Path(source).is_file():
        raise FileNotFoundError(
            f"{source}: neither a passage file, an index folder nor a URL (--retriever)"
        )
    if backend == "auto":
        first = islice(scan_passages(source), MAX_RANK_BM25_PASSAGES + 1)
        small = sum(1 for _ in first) <= MAX_RANK_BM25_PASSAGES
        backend = "rank-bm25" if small else "tantivy"
    if backend == "rank-bm25":
        return BM25(read_passages(source))
    if os.path.getsize(source) > MAX_IN_MEMORY_BYTES:
        out = f"{Path(source).with_suffix('')}-index"
        raise ValueError(
            f"{source}: too large to be indexed in memory whenever it is opened; once and for all: "
            f"python retriever.py index --kind bm25 --corpus {source} --out {out}"
        )
    return TantivyBM25.build(passage for _, passage in scan_passages(source))


# --------------------------------------------------------------------------------------------------
# Commands


def index_command(
    kind: Literal["bm25", "dense"],
    corpus: str,
    out: Path,
    encoder: str | None = None,
    factory: str | None = None,
    parameters: str = "",
    prebuilt: str | None = None,
) -> None:
    """Build an index folder. A second call completes an interrupted one.

    Args:
        kind: bm25 (tantivy) or dense (faiss).
        corpus: passage file (JSONL).
        out: folder to make.
        encoder: dense: folder or hub name of an encoder, such as BAAI/bge-large-en-v1.5.
        factory: dense: faiss index_factory, such as HNSW32,SQ8 (default Flat).
        parameters: dense: faiss parameters, such as nprobe=64 or efSearch=128.
        prebuilt: dense: a faiss index of --corpus, row by row, instead of making one.
    """
    if kind == "bm25":
        if encoder or factory or parameters or prebuilt:
            raise ValueError(
                "--encoder, --factory, --parameters and --prebuilt are for --kind dense"
            )
        build_bm25(corpus, out)
        return
    if not encoder:
        raise ValueError("--kind dense needs --encoder")
    if prebuilt and factory:
        raise ValueError("--factory: the prebuilt index has one")
    build_dense(corpus, out, encoder, factory or "Flat", parameters, prebuilt)


def search_command(
    query: tyro.conf.Positional[str],
    index: str,
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 5,
    corpus: str | None = None,
    backend: Literal["auto", "rank-bm25", "tantivy"] = "auto",
) -> None:
    """Show the passages of a query.

    Args:
        query: what to search for.
        index: anything that --retriever takes.
        k: passages to show.
        corpus: of an index folder: where its passages are, if they moved.
        backend: of a passage file.
    """
    if k < 1:
        raise ValueError("-k: at least 1")
    (passages,) = open_retriever(index, backend, corpus).search([query], k)
    for passage in passages:
        print(f"{passage['title']}: {passage['text']}")


def main(argv: list[str] | None = None) -> None:
    commands = {"index": index_command, "search": search_command}
    with user_errors("retriever.py"):
        tyro.extras.subcommand_cli_from_dict(
            commands, description=__doc__, use_underscores=True, args=argv
        )


if __name__ == "__main__":
    main()
