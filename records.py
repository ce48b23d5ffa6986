"""Questions and passages on disk: formats, reading, writing whole or not at all, errors of one line."""

import hashlib
import json
import os
import sys
import traceback
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
from tqdm import tqdm


class Passage(TypedDict):
    id: str
    title: str
    text: str
    score: NotRequired[float]


# what comes of JSON that is not as expected
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


def scan_jsonl(path: str | Path, parse: Callable[[dict], dict], expected: str) -> Iterator[tuple[int, dict]]:
    """Stream a JSONL file of any size: where each line begins, in bytes, and its record, through `parse`.

    Memory: 8 bytes a record, to see that every `id` is there once.

    Raises:
        ValueError: names the file, the line and what is wrong (not JSON, not `expected`, an id twice, no record at all).
    """
    ids, begin = array("q"), 0
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    record = parse(json.loads(line))
                    ids.append(hash(record["id"]))
                except MALFORMED as error:  # cut: it may quote all of a binary file
                    raise ValueError(f"{path}:{number}: expected {expected}, got {error!r:.200}") from None
                yield begin, record
            begin += len(line)
    if not ids:
        raise ValueError(f"{path}: it holds no {expected}")
    hashes = np.frombuffer(ids, np.int64)
    hashes.sort()
    if twice := set(hashes[1:][hashes[1:] == hashes[:-1]].tolist()):  # to be looked at: equal hashes may be of different ids
        seen = set()
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip() and hash(name := parse(json.loads(line))["id"]) in twice:
                    if name in seen:
                        raise ValueError(f"{path}:{number}: id {name!r:.200} occurs twice")
                    seen.add(name)


def read_jsonl(path: str | Path, parse: Callable[[dict], dict], expected: str) -> list[dict]:
    """All records of a JSONL file; errors as in `scan_jsonl`."""
    return [record for _, record in scan_jsonl(path, parse, expected)]


def write_jsonl(path: Path, records: list[dict]) -> None:
    """Write beside and rename, so that a file that exists is whole."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def write_text(path: Path, text: str) -> None:
    """Write beside and rename, so that a file that exists is whole."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
    publish(partial, path)


def sync(path: Path) -> None:
    """Put a file, or a folder's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(partial: Path, path: Path) -> None:
    """Name a file or folder once it is on the disk: a power cut may else leave the name and not what it names."""
    for part in (*(partial.iterdir() if partial.is_dir() else ()), partial):
        sync(part)
    partial.rename(path)
    sync(path.parent)


@contextmanager
def user_errors(program: str) -> Iterator[None]:
    """End a command in one line and status 2 on a file's error or one that this project raises; others are bugs."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        ours = Path(place.filename).resolve().parent == Path(__file__).resolve().parent and place.line.startswith("raise ")
        if not (ours or isinstance(error, OSError)):
            raise
        print(f"{program}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


@contextmanager
def whole(path: str | Path, remedy: str = "build it again") -> Iterator[None]:
    """What a library cannot read is named."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of tantivy's is no Exception
        raise ValueError(f"{path}: damaged or of another version ({error!r:.200}); {remedy}") from None


def clean(text: str) -> str:
    """Lone surrogates, which JSON can carry and neither UTF-8 nor a tokenizer can, become question marks."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def parse_passage(record: dict) -> Passage:
    """Our own format, or that of the wiki-18 corpus: `{"id", "contents": "\"title\"\ntext"}`."""
    if "contents" in record:
        title, _, text = record["contents"].partition("\n")
        record = {"id": record["id"], "title": title.removeprefix('"').removesuffix('"'), "text": text}
    if not (isinstance(record["title"], str) and isinstance(record["text"], str) and isinstance(record["id"], str | int)):
        raise ValueError("title and text must be strings, id a string or a number")
    return {key: clean(str(record[key])) for key in ("id", "title", "text")}


PASSAGE = '{"id", "title", "text"}'


def scan_passages(path: str | Path) -> Iterator[tuple[int, Passage]]:
    """Stream the passages of a JSONL file with progress; items and errors as in `scan_jsonl`."""
    return tqdm(scan_jsonl(path, parse_passage, PASSAGE), desc=f"reading {path}", unit=" passages", delay=2, mininterval=1)


def read_passages(path: str | Path) -> list[Passage]:
    """Passages of a JSONL file; errors as in `scan_jsonl`."""
    return [passage for _, passage in scan_passages(path)]


def texts(answers: str | bool | list | None) -> list[str]:
    """Answers as the data sets write them, as texts: one or a list, booleans for yes and no, null for none."""
    answers = answers if isinstance(answers, list) else [answers]
    return [("no", "yes")[a] if isinstance(a, bool) else str(a).strip() for a in answers if a is not None]


MAX_QUESTION = 100_000  # characters: each of its samples holds its tokens, and each tensor of the batch is as wide


def parse_question(record: dict, dataset: str) -> dict:
    """Our own format or the released one, `{"idx", "question", "answer": str | list | bool}`; `dataset` if it names none."""
    name, dataset = record["id"] if "id" in record else record["idx"], record.get("dataset") or dataset
    question, answers = record["question"].strip(), texts(record["answers"] if "answers" in record else record["answer"])
    if not question or not any(answers):
        raise ValueError("a question without text or answer")
    if len(question) > MAX_QUESTION:
        raise ValueError(f"a question of {len(question)} characters, of at most {MAX_QUESTION}")
    if not (isinstance(name, str | int) and isinstance(dataset, str)):
        raise ValueError("id must be a string or a number, dataset a string")
    answers = [clean(a) for a in answers if a]
    return {"id": clean(str(name)), "question": clean(question), "answers": answers, "dataset": clean(dataset)}


def read_questions(path: str | Path) -> list[dict]:
    """Questions as `{"id", "question", "answers", "dataset"}`; errors as in `read_jsonl`."""
    return read_jsonl(path, lambda record: parse_question(record, Path(path).stem), '{"id", "question", "answers"}')


def fingerprint(path: str | Path) -> str:
    """SHA-256 of a file, or of the names and fingerprints of the files in a folder."""
    if Path(path).is_dir():
        files = sorted(file for file in Path(path).iterdir() if file.is_file())
        return hashlib.sha256("".join(f"{file.name} {fingerprint(file)}\n" for file in files).encode()).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
