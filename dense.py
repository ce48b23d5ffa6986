"""Dense search: an encoder turns texts into vectors, faiss finds the nearest ones.

`write_rows`, `write_vectors` and `write_faiss` build the files that `Dense` searches.
"""

import json
import os
import re
import threading
from array import array
from pathlib import Path

import numpy as np
from tqdm import trange

from records import (
    Passage,
    fsync_and_rename,
    parse_passage,
    replace_surrogates,
    reraise_corrupt,
    reraise_missing,
    reraise_unwritten,
    scan_passages,
)

# Passages that are encoded or indexed at a time: the vectors of 29 million passages (60 GB) never
# stand in memory at once.
CHUNK_SIZE = 32768
MAX_TRAINING_VECTORS = 1_000_000  # of faiss indexes that are trained, such as IVF
# What goes before a query and before a passage (model cards), by the encoder's name, where the
# encoder's folder does not say it.
PROMPTS = {
    r"bge-(small|base|large)-en": {
        "query": "Represent this sentence for searching relevant passages: ",
        "document": "",
    },
    r"\be5-(small|base|large)(-v2)?$": {"query": "query: ", "document": "passage: "},
}


class Encoder:
    """Texts to unit vectors, with sentence-transformers.

    The model's folder says how to pool (BGE: CLS, E5: mean).

    Args:
        model: folder or hub name.
        name: by which PROMPTS knows the encoder, where the folder has another one.
    """

    def __init__(self, model: str, name: str = ""):
        import torch
        from sentence_transformers import SentenceTransformer

        device = "cpu"
        if torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        options = {"use_safetensors": True}  # weights are never read from a pickle
        with reraise_missing(f"{model}: no encoder there"):
            self.model = SentenceTransformer(model, device=device, model_kwargs=options)
        if device != "cpu":
            self.model.half()
        for pattern, prompts in PROMPTS.items():
            known = re.search(pattern, (name or Path(model).name).lower())
            if known and not any(self.model.prompts.values()):
                self.model.prompts = prompts
        self._lock = threading.Lock()  # a fast tokenizer refuses to serve two threads at once

    def queries(self, queries: list[str]) -> np.ndarray:
        """(N, D) unit vectors."""
        texts = [replace_surrogates(query) for query in queries]
        with self._lock:
            return self.model.encode_query(
                texts, normalize_embeddings=True, show_progress_bar=False
            )

    def passages(self, passages: list[Passage], pool: dict | None = None) -> np.ndarray:
        """(N, D) unit vectors, by the processes of a sentence-transformers pool if one is given."""
        texts = [f"{passage['title']} {passage['text']}" for passage in passages]
        return self.model.encode_document(
            texts, normalize_embeddings=True, batch_size=64, show_progress_bar=False, pool=pool
        )


class PassageFile:
    """Passages of a JSONL file by row, read from disk when asked for.

    Args:
        path: the passage file.
        rows: .npy file with the byte where each line begins, and the passage file's size.
    """

    def __init__(self, path: str | Path, rows: Path):
        self.file = open(path, "rb")  # noqa: SIM115 open as long as the object lives
        self.rows = np.load(rows, mmap_mode="r")
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
        encoder: the one that made the index.
        parameters: of `faiss.ParameterSpace`, such as nprobe=64.

    Raises:
        ValueError: names the index and what is wrong: damaged, unknown parameters, other sizes.
    """

    def __init__(self, passages: PassageFile, index: Path, encoder: Encoder, parameters: str = ""):
        import faiss

        with reraise_corrupt(index):
            self.index = faiss.read_index(str(index), faiss.IO_FLAG_MMAP_IFC)
        try:
            faiss.ParameterSpace().set_index_parameters(self.index, replace_surrogates(parameters))
        except RuntimeError as error:
            reason = str(error).splitlines()[-1]
            raise ValueError(f"{index}: faiss refuses {parameters!r}: {reason}") from None
        self.passages = passages
        self.encoder = encoder
        dimension = encoder.model.get_embedding_dimension()
        if (self.index.ntotal, self.index.d) != (len(passages), dimension):
            raise ValueError(
                f"{index}: {self.index.ntotal} vectors of size {self.index.d}, "
                f"but {len(passages)} passages and an encoder of size {dimension}"
            )

    def search(self, queries: list[str], k: int) -> list[list[Passage]]:
        """The k nearest passages of each query; an approximate index may find fewer."""
        if not queries:
            return []
        all_scores, all_rows = self.index.search(self.encoder.queries(queries), k)  # (N, k) each
        results = [[] for _ in queries]
        for result, scores, rows in zip(results, all_scores, all_rows, strict=True):
            for score, row in zip(scores, rows, strict=True):
                if row >= 0:  # faiss fills up with -1 where it finds fewer than k
                    result.append(self.passages[int(row)] | {"score": float(score)})
        return results


def write_rows(path: Path, corpus: str) -> None:
    """Write the byte where each passage begins, and the file's size, for `PassageFile`."""
    begins = array("q", (begin for begin, _ in scan_passages(corpus)))
    begins.append(os.path.getsize(corpus))
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        np.save(file, np.frombuffer(begins, np.int64))
    fsync_and_rename(partial, path)


def write_vectors(path: Path, passages: PassageFile, encoder: Encoder) -> None:
    """Write the vectors of all passages, (N, D) float16, encoded on all GPUs there are."""
    import torch

    pool = None
    if torch.cuda.device_count() > 1:
        pool = encoder.model.start_multi_process_pool()
    partial = path.with_suffix(".partial")
    shape = (len(passages), encoder.model.get_embedding_dimension())
    vectors = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
    with open(partial, "r+b") as file:  # a full disk is an error here, and a crash later
        os.posix_fallocate(file.fileno(), 0, os.path.getsize(partial))
    for start in trange(0, len(passages), CHUNK_SIZE, desc="embedding", unit="chunk"):
        rows = range(start, min(start + CHUNK_SIZE, len(passages)))
        vectors[rows.start : rows.stop] = encoder.passages([passages[row] for row in rows], pool)
    vectors.flush()
    if pool:
        encoder.model.stop_multi_process_pool(pool)
    fsync_and_rename(partial, path)


def write_faiss(path: Path, vectors_file: Path, factory: str) -> None:
    """Index vectors; the whole index is in memory meanwhile."""
    import faiss

    with reraise_corrupt(vectors_file, "remove it to embed again"):
        vectors = np.load(vectors_file, mmap_mode="r")
    try:
        index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            step = -(-len(vectors) // MAX_TRAINING_VECTORS)
            index.train(vectors[::step].astype(np.float32))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1]
        raise ValueError(f"faiss refuses {factory!r} for these vectors: {reason}") from None
    for start in trange(0, len(vectors), CHUNK_SIZE, desc="indexing", unit="chunk"):
        index.add(vectors[start : start + CHUNK_SIZE].astype(np.float32))
    partial = path.with_suffix(".partial")
    with reraise_unwritten(path):
        faiss.write_index(index, str(partial))
    fsync_and_rename(partial, path)
