"""What a dense index of KILT takes, computed, not measured.

`python benchmarks/dense_memory.py` prints the table. Bytes are those of faiss's files
(tests/test_benchmarks.py compares the formulas with real ones). A query's time is what it reads
over the machine's memory bandwidth, for one query alone; the queries of a batch share what Flat and
SQ read.
"""

PASSAGES = 29_000_000  # KILT in passages of 100 words
DIM = 1024  # BGE-large
SEQUENTIAL_BANDWIDTH = 100e9  # bytes/s of all cores of a server's socket
RANDOM_BANDWIDTH = 10e9  # bytes/s of one core that reads here and there
LISTS = 65536  # of an IVF index
PROBES = 64  # lists that an IVF query searches (nprobe)
LINKS = 32  # of a vector of an HNSW index (M)
EF_SEARCH = 64  # candidates that an HNSW query keeps
FACTORIES = """
    Flat SQfp16 SQ8 IVF65536,Flat IVF65536,SQ8 IVF65536,PQ128 HNSW32,Flat HNSW32,SQ8
""".split()


def code_bytes(storage: str, dim: int) -> float:
    """Bytes of a vector."""
    if storage.startswith("PQ"):
        return int(storage.removeprefix("PQ"))
    return {"Flat": 4 * dim, "SQfp16": 2 * dim, "SQ8": dim}[storage]


def index_bytes(factory: str, n: int, dim: int, lists: int = LISTS) -> float:
    """Size of a faiss index of n vectors: on disk, and in memory where it is not memory-mapped."""
    kind, _, storage = factory.rpartition(",")
    size = n * code_bytes(storage, dim)
    if storage.startswith("PQ"):
        size += 256 * dim * 4  # centroids
    if kind.startswith("IVF"):
        size += n * 8 + lists * dim * 4  # row numbers, coarse centroids
    if kind.startswith("HNSW"):
        # Two links per M at the base, M above; levels and offsets.
        size += n * (4 * 2 * LINKS * (1 + 0.5 / (LINKS - 1)) + 12)
    return size


def query_ms(factory: str, n: int, dim: int) -> float:
    kind, _, storage = factory.rpartition(",")
    code = code_bytes(storage, dim)
    if kind.startswith("HNSW"):  # about half of the links that a query meets were seen before
        return 1000 * EF_SEARCH * LINKS * code / RANDOM_BANDWIDTH
    if kind.startswith("IVF"):
        centroids = LISTS * dim * 4 / SEQUENTIAL_BANDWIDTH
        return 1000 * (centroids + n * PROBES / LISTS * code / RANDOM_BANDWIDTH)
    return 1000 * n * code / SEQUENTIAL_BANDWIDTH


def table() -> str:
    rows = ["| `--factory` | GB | ms a query |", "|---|---|---|"]
    for factory in FACTORIES:
        size = index_bytes(factory, PASSAGES, DIM) / 1e9
        rows.append(f"| {factory} | {size:.0f} | {query_ms(factory, PASSAGES, DIM):.1f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
