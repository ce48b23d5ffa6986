"""Search engines for the policy: `search(queries, k)` returns the k best passages of each query.

`open_retriever` opens what `--retriever` names: a passage file (JSONL), an index folder or a search
server. Passages come best first, with a `score` where the backend has one. Every backend is
thread-safe.

    python retriever.py index --kind bm25 --corpus passages.jsonl --out index   # once
    python retriever.py search --index index "a query"                          # as often as wanted
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Literal, Protocol

import tyro

from bm25 import BM25, TantivyBM25
from dense import Dense, Encoder, PassageFile, write_faiss, write_rows, write_vectors
from records import (
    Passage,
    content_files,
    fingerprint,
    fsync_and_rename,
    read_passages,
    reraise_corrupt,
    scan_passages,
    user_errors,
    write_text,
)
from search_client import Remote

URL_SCHEMES = ("http://", "https://")


class Retriever(Protocol):
    def search(self, queries: list[str], k: int) -> list[list[Passage]]:
        """One list of passages for each query."""


# --------------------------------------------------------------------------------------------------
# Index folders. A BM25 index has tantivy/. A dense one has vectors.npy, faiss.index and rows.npy.
# Both have links to what is not their own: passages.jsonl and, where they are local, the encoder
# and a prebuilt faiss.index. index.json is the header, a flat dictionary. Its entries "corpus",
# "encoder" and "index" are the SHA-256 of the content, with size and time beside them; where the
# encoder is one of the hub, "encoder" is its name.

VERSION = 2  # of index folders


def describe_content(name: str, path: Path, header: dict) -> dict:
    """SHA-256, size and time of a file, or of the files in a folder, as entries of a header.

    The content is read only if size or time are others than those in `header`.
    """
    files = content_files(path)
    size = sum(file.stat().st_size for file in files)
    time = max((file.stat().st_mtime_ns for file in files), default=0)
    sha256 = header.get(name)
    if not sha256 or header.get(f"{name}_size_and_time") != [size, time]:
        sha256 = fingerprint(path)
    return {name: sha256, f"{name}_size_and_time": [size, time]}


def is_unchanged(name: str, path: Path, header: dict) -> bool:
    """Whether a file or folder is there with the content that the header describes."""
    return path.exists() and describe_content(name, path, header)[name] == header.get(name)


def read_header(folder: Path, remedy: str = "build it again") -> dict:
    """The header of an index, finished or not; ValueError names one that is damaged."""
    with reraise_corrupt(folder, remedy):
        header = dict(json.loads((folder / "index.json").read_text()))
        if header["version"] != VERSION:
            raise ValueError(f"version {header['version']}")
        return header


def write_header(folder: Path, header: dict) -> None:
    write_text(folder / "index.json", json.dumps(header, indent=1))


def prepare_folder(out: Path, settings: dict, sources: dict[str, Path]) -> dict:
    """Make an index folder, or come back to one; its header, which may be unfinished.

    Args:
        settings: entries of the header.
        sources: files or folders by name of which the index is made.
    Raises:
        ValueError: the folder holds something else, or an index of other settings or sources.
    """
    found = {}
    if (out / "index.json").is_file():
        found = read_header(out, "choose another --out")
    elif out.exists() and any(path.suffix != ".partial" for path in out.iterdir()):
        raise ValueError(f"{out}: it is not empty and holds no index; choose another --out")
    header = {"version": VERSION, **settings}
    for name, path in sources.items():
        header |= describe_content(name, path, found)
    different = [name for name in (*settings, *sources) if found.get(name) != header[name]]
    if not different:
        header = found | header
    elif any((out / name).exists() for name in ("tantivy", "vectors.npy", "faiss.index")):
        names = " and ".join(different)
        raise ValueError(f"{out}: an index with another {names} is there; choose another --out")
    else:
        (out / "rows.npy").unlink(missing_ok=True)  # left by a call that failed
    out.mkdir(parents=True, exist_ok=True)
    write_header(out, header)
    return header


def verify_folder(folder: Path) -> dict:
    """The header of a finished index whose files are those that it describes.

    Raises:
        ValueError, FileNotFoundError: one line that says what is wrong, and the remedy.
    """
    header = read_header(folder)
    files = {"index": "tantivy"}
    if header.get("kind") == "dense":
        files = {"index": "faiss.index", "corpus": "passages.jsonl"}
    if "encoder_size_and_time" in header:
        files["encoder"] = "encoder"
    for name, file in files.items():
        path = folder / file
        if path.is_symlink() and not path.exists():
            target = path.resolve()
            raise FileNotFoundError(f"{target} is not there; if it moved: ln -sfn /PATH {path}")
        if not is_unchanged(name, path, header):
            reason = f"{path} is not whole, or was changed since the index was built"
            raise ValueError(f"{folder}: {reason}; build it again")
    return header


def link(path: Path, target: str) -> None:
    """Make a link, in place of one that is there; a file that is there stays."""
    resolved = Path(target).resolve()
    if path.resolve() == resolved and path.exists():
        return
    if path.exists() and not path.is_symlink():
        raise ValueError(f"{path}: a file is where the link to {resolved} belongs; move it away")
    path.unlink(missing_ok=True)
    path.symlink_to(resolved)


def build_bm25(corpus: str, out: Path) -> None:
    """Index a passage file with tantivy. A finished index of the file is left as it is."""
    header = prepare_folder(out, {"kind": "bm25"}, {"corpus": Path(corpus)})
    link(out / "passages.jsonl", corpus)
    index = out / "tantivy"
    if not is_unchanged("index", index, header):
        partial = out / "tantivy.partial"
        for folder in (partial, index):
            shutil.rmtree(folder, ignore_errors=True)
        partial.mkdir()
        TantivyBM25.build((passage for _, passage in scan_passages(corpus)), partial)
        fsync_and_rename(partial, index)
    write_header(out, header | describe_content("index", index, header))


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
    them. Arguments: see `index_command`.
    """
    settings = {"kind": "dense", "prebuilt": bool(prebuilt)}
    sources = {"corpus": Path(corpus)}
    if Path(encoder).is_dir():
        encoder = str(Path(encoder).resolve())  # its name says what goes before a text
        sources["encoder"] = Path(encoder)
    else:
        settings["encoder"] = encoder  # a name on the hub
    header = prepare_folder(out, settings, sources)
    header.setdefault("encoder_name", Path(encoder).name)
    opened = Encoder(encoder, header["encoder_name"])
    link(out / "passages.jsonl", corpus)
    if "encoder" in sources:
        link(out / "encoder", encoder)
    rows = out / "rows.npy"
    vectors = out / "vectors.npy"
    index = out / "faiss.index"
    if not rows.exists():
        write_rows(rows, corpus)
    with reraise_corrupt(rows, "remove it to make it again"):
        passages = PassageFile(corpus, rows)
    if not prebuilt:
        if not vectors.exists():
            write_vectors(vectors, passages, opened)
        if header.get("factory") != factory or not is_unchanged("index", index, header):
            write_faiss(index, vectors, factory)
            header |= {"factory": factory, **describe_content("index", index, header)}
            write_header(out, header)
    Dense(passages, Path(prebuilt or index), opened, parameters)  # refuses what does not match
    if prebuilt:
        link(index, prebuilt)
    header |= {"parameters": parameters, **describe_content("index", index, header)}
    write_header(out, header)


# --------------------------------------------------------------------------------------------------
# Opening

# A larger passage file must be indexed on disk (1 GiB: about 2 million passages, which take half a
# minute a million whenever they are indexed in memory).
MAX_IN_MEMORY_BYTES = 1 << 30
# A larger passage file is searched with tantivy: rank-bm25 takes about 8 microseconds a passage and
# query, and 1 MiB holds about 2,000 passages of 80 words.
MAX_RANK_BM25_BYTES = 1 << 20


def open_index(folder: Path) -> Retriever:
    """Open an index folder; errors as in `open_retriever`."""
    header = verify_folder(folder)
    if header.get("kind") != "dense":
        return TantivyBM25.open(folder / "tantivy")
    with reraise_corrupt(folder):
        encoder = str(header["encoder"])  # of a local one the SHA-256
        if "encoder_size_and_time" in header:
            encoder = str((folder / "encoder").resolve())
        name = str(header.get("encoder_name", ""))
        parameters = str(header["parameters"])
        passages = PassageFile(folder / "passages.jsonl", folder / "rows.npy")
    return Dense(passages, folder / "faiss.index", Encoder(encoder, name), parameters)


def open_retriever(source: str) -> Retriever:
    """Open what `--retriever` names.

    Args:
        source: passage file (JSONL), index folder, or http://HOST:PORT of a search server.

    Raises:
        ValueError, FileNotFoundError: one line that says what is wrong with `source`.
    """
    if source.startswith(URL_SCHEMES):
        return Remote(source)
    path = Path(source)
    if (path / "index.json").is_file():
        return open_index(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{source}: neither a passage file, an index folder nor a URL (--retriever)"
        )
    size = path.stat().st_size
    if size <= MAX_RANK_BM25_BYTES:
        return BM25(read_passages(source))
    if size > MAX_IN_MEMORY_BYTES:
        out = f"{path.with_suffix('')}-index"
        raise ValueError(
            f"{source}: too large to be indexed in memory whenever it is opened; once and for all: "
            f"python retriever.py index --kind bm25 --corpus {source} --out {out}"
        )
    return TantivyBM25.build(passage for _, passage in scan_passages(source))


def retriever_fingerprint(source: str) -> str | None:
    """What identifies the passages and the index that `source` names, wherever they lie.

    Returns:
        The SHA-256 of a passage file, or of what an index folder is made of; what a search server
        reports; None if a server reports nothing (those of other projects), or nothing is there.

    Raises:
        ValueError, FileNotFoundError: an index folder is damaged or was changed.
        ConnectionError: a search server does not answer.
    """
    if source.startswith(URL_SCHEMES):
        return Remote(source).fingerprint()
    if Path(source).is_file():
        return fingerprint(source)
    if not Path(source, "index.json").is_file():
        return None
    header = verify_folder(Path(source))
    names = ["kind", "corpus"]
    if header.get("kind") == "dense":
        names += ["encoder", "parameters", "index"]
    parts = [header.get(name) for name in names]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def passage_file(source: str) -> Path | None:
    """The passages that `source` searches, if they are on this disk and unchanged."""
    path = Path(source)
    if path.is_file():
        return path
    corpus = path / "passages.jsonl"
    if (path / "index.json").is_file() and is_unchanged("corpus", corpus, read_header(path)):
        return corpus
    return None


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
        kind: bm25 (tantivy) or dense (faiss); the options that follow are for dense.
        corpus: passage file (JSONL).
        out: folder to make.
        encoder: folder or hub name of an encoder, such as BAAI/bge-large-en-v1.5.
        factory: of faiss.index_factory, such as HNSW32,SQ8 or IVF4096,PQ64 (default Flat).
        parameters: of faiss, such as nprobe=64; recorded, and used whenever the index is opened.
        prebuilt: a faiss index of the same passages in the same order, instead of making one.
    """
    if kind == "bm25":
        if encoder or factory or parameters or prebuilt:
            raise ValueError("--encoder, --factory, --parameters, --prebuilt: for --kind dense")
        build_bm25(corpus, out)
        return
    if not encoder:
        raise ValueError("--kind dense needs --encoder")
    if prebuilt and factory:
        raise ValueError("--factory: the prebuilt index has one")
    build_dense(corpus, out, encoder, factory or "Flat", parameters, prebuilt)


def search_command(query: tyro.conf.Positional[str], index: str, k: int = 5) -> None:
    """Show the passages of a query.

    Args:
        query: what to search for.
        index: anything that --retriever takes.
        k: passages to show.
    """
    if k < 1:
        raise ValueError("--k: at least 1")
    (passages,) = open_retriever(index).search([query], k)
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
