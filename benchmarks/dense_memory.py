"""What a dense index of KILT takes: computed, not measured. `python benchmarks/dense_memory.py` prints the README's table.

Bytes are those of faiss's files (tests/test_benchmarks.py compares the formulas with real ones). A query's time is what it
reads over the machine's memory bandwidth, for one query alone; queries of a batch share what Flat and SQ read.
"""

PASSAGES, DIM = 29_000_000, 1024  # KILT in 100-word passages, BGE-large
BANDWIDTH, RANDOM = 100e9, 10e9  # bytes/s: in sequence, all cores of one server socket; here and there, one core
LISTS, PROBES, LINKS, EF = 65536, 64, 32, 64


def code_bytes(storage: str, dim: int) -> float:
    """Bytes of a vector."""
    return {"Flat": 4 * dim, "SQfp16": 2 * dim, "SQ8": dim}[storage] if storage[:2] != "PQ" else int(storage[2:])


def index_bytes(factory: str, n: int, dim: int, lists: int = LISTS, links: int = LINKS) -> float:
    """Size of a faiss index of n vectors, where it is not memory-mapped also in memory."""
    kind, _, storage = factory.rpartition(",")
    size = n * code_bytes(storage, dim)
    if storage.startswith("PQ"):
        size += 256 * dim * 4  # centroids
    if kind.startswith("IVF"):
        size += n * 8 + lists * dim * 4  # row numbers, coarse centroids
    if kind.startswith("HNSW"):
        size += n * (
            4 * 2 * links * (1 + 0.5 / (links - 1)) + 12
        )  # two links per M at the base, M above, levels and offsets
    return size


def query_ms(factory: str, n: int, dim: int) -> float:
    kind, _, storage = factory.rpartition(",")
    if kind.startswith("HNSW"):
        return 1000 * EF * LINKS * code_bytes(storage, dim) / RANDOM  # about half of the links met were seen before
    if kind.startswith("IVF"):
        return 1000 * (LISTS * dim * 4 / BANDWIDTH + n * PROBES / LISTS * code_bytes(storage, dim) / RANDOM)
    return 1000 * n * code_bytes(storage, dim) / BANDWIDTH


FACTORIES = ["Flat", "SQfp16", "SQ8", "IVF65536,Flat", "IVF65536,SQ8", "IVF65536,PQ128", "HNSW32,Flat", "HNSW32,SQ8"]


def table() -> str:
    rows = ["| `--factory` | GB | ms a query |", "|---|---|---|"]
    for factory in FACTORIES:
        size, time = index_bytes(factory, PASSAGES, DIM) / 1e9, query_ms(factory, PASSAGES, DIM)
        rows.append(f"| {factory} | {size:.0f} | {time:.1f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
