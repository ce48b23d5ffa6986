"""Search engines for the policy: `search(queries, k)` gives each query its k best passages.

A passage is `{"id", "title", "text"}`. Every backend is thread-safe and returns one list a query, best first.
"""

import argparse
import json
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypedDict


class Passage(TypedDict):
    id: str
    title: str
    text: str


class Retriever(Protocol):
    def search(self, queries: list[str], k: int) -> list[list[Passage]]: ...


# ---------------------------------------------------------------------------------------------------------------------
# Files: one JSON object a line


def read_jsonl(path: str | Path, parse: Callable[[dict], dict], expected: str) -> list[dict]:
    """The records of a JSONL file, each through `parse`, with an `id` that is theirs alone.

    Raises:
        ValueError: names the file, the line and what is wrong (not JSON, not `expected`, an id twice, no record at all).
    """
    records, seen = [], set()
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = parse(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}:{number}: expected {expected}, got {error!r}") from None
            if record["id"] in seen:
                raise ValueError(f"{path}:{number}: id {record['id']!r} occurs twice")
            seen.add(record["id"])
            records.append(record)
    if not records:
        raise ValueError(f"{path}: it holds no {expected}")
    return records


def write_jsonl(path: Path, records: list[dict]) -> None:
    """Write beside and rename, so that a file that exists is whole."""
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    partial.rename(path)


@contextmanager
def user_errors(program: str) -> Iterator[None]:
    """End a command in one line and status 2 on a file's error or one that this project raises; others are bugs."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        if not isinstance(error, OSError) and raised_in.parent != Path(__file__).resolve().parent:
            raise
        print(f"{program}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def read_passages(path: str | Path) -> list[Passage]:
    """Passages of a JSONL file; errors as in `read_jsonl`."""
    return read_jsonl(path, lambda r: {key: str(r[key]) for key in ("id", "title", "text")}, '{"id", "title", "text"}')


def read_questions(path: str | Path) -> list[dict]:
    """Questions as `{"id", "question", "answers", "dataset"}`; errors as in `read_jsonl`.

    Takes our own format and the released one, `{"idx", "question", "answer": str | list | bool}`.
    """

    def parse(record: dict) -> dict:
        answers = record["answers"] if "answers" in record else record["answer"]
        answers = answers if isinstance(answers, list) else [answers]
        answers = [("no", "yes")[a] if isinstance(a, bool) else str(a).strip() for a in answers if a is not None]
        if not record["question"].strip() or not any(answers):
            raise ValueError("a question without text or answer")
        return {
            "id": str(record["id"] if "id" in record else record["idx"]),
            "question": record["question"].strip(),
            "answers": [a for a in answers if a],
            "dataset": record.get("dataset") or Path(path).stem,
        }

    return read_jsonl(path, parse, '{"id", "question", "answers"}')


# ---------------------------------------------------------------------------------------------------------------------
# Backends


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
        return [self.passages[i] for i in order]


def open_retriever(source: str) -> Retriever:
    """The retriever that `--retriever` names: a passage file (JSONL).

    Raises:
        ValueError, FileNotFoundError: one line that says what is wrong with `source`.
    """
    if not Path(source).is_file():
        raise FileNotFoundError(f"{source}: no such passage file (--retriever)")
    return BM25(read_passages(source))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("retriever", help="passage file (JSONL)")
    parser.add_argument("query")
    parser.add_argument("-k", type=int, default=5, help="passages to show (default 5)")
    args = parser.parse_args(argv)
    with user_errors("retriever.py"):
        for passage in open_retriever(args.retriever).search([args.query], args.k)[0]:
            print(f"{passage['title']}: {passage['text']}")


if __name__ == "__main__":
    main()
