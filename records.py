"""Questions and passages on disk: formats, files written whole or not at all, one-line errors.

question   {"id", "question", "answers": [..], "dataset"}, or as R1-Searcher released them,
           {"idx", "question", "answer": str | list | bool}
passage    {"id", "title", "text"}, or as wiki-18 has them, {"id", "contents": "\\"title\\"\\ntext"}
"""

import hashlib
import json
import os
import sys
import traceback
from array import array
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
from tqdm import tqdm

# What parsing a JSON value raises when the value does not have the expected shape.
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
# Longest question in characters: every sample of a question holds the question's tokens.
MAX_QUESTION_CHARACTERS = 100_000


class Passage(TypedDict):
    id: str
    title: str
    text: str
    score: NotRequired[float]  # where the search backend has one


# --------------------------------------------------------------------------------------------------
# Errors of one line


@contextmanager
def user_errors(program: str) -> Iterator[None]:
    """Turn an error that the user can mend into one line on stderr and exit status 2.

    Such errors are every OSError, and every ValueError or RuntimeError that a `raise` statement of
    this repository raised. All others are bugs and keep their traceback.
    """
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        origin = traceback.extract_tb(error.__traceback__)[-1]
        root = Path(__file__).resolve().parent
        in_repository = Path(origin.filename).resolve().parent in (root, root / "tools")
        raised_on_purpose = in_repository and (origin.line or "").startswith("raise ")
        if not (raised_on_purpose or isinstance(error, OSError)):
            raise
        print(f"{program}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


@contextmanager
def reraise_corrupt(path: str | Path, remedy: str = "build it again") -> Iterator[None]:
    """Name the file or folder that a library could not read.

    Raises:
        ValueError: in place of whatever the body raised, `path` and `remedy` in one line.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of tantivy is not an Exception
        raise ValueError(
            f"{path}: damaged or of another version ({error!r:.200}); {remedy}"
        ) from None


@contextmanager
def reraise_missing(what: str, remedy: str = "") -> Iterator[None]:
    """Say in one line that a library could not find or open something.

    Raises:
        ValueError: `what`, the first line of the library's OSError or ValueError, and `remedy`.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{what}: {reason}{remedy}") from None


@contextmanager
def reraise_unwritten(path: str | Path) -> Iterator[None]:
    """Name the file or folder that a library could not write, as on a full disk.

    Raises:
        OSError: in place of the library's own error.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[-1]
        raise OSError(f"{path}: cannot be written ({reason})") from None


def refuse_to_overwrite(out: Path) -> None:
    """Make the parent folder of a new file.

    Raises:
        ValueError: the file exists.
    """
    if out.exists():
        raise ValueError(f"{out} is there already; remove it to make it again")
    out.parent.mkdir(parents=True, exist_ok=True)


# --------------------------------------------------------------------------------------------------
# Writing


def fsync_path(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_and_rename(partial: Path, path: Path) -> None:
    """Give a finished file or folder its name.

    The content is flushed first: after a power cut the name may exist, but never without content.
    """
    content = list(partial.iterdir()) if partial.is_dir() else []
    for part in [*content, partial]:
        fsync_path(part)
    partial.rename(path)
    fsync_path(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write beside `path` and rename, so that a file that exists is whole."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    fsync_and_rename(partial, path)


def write_jsonl(path: Path, records: list[Any]) -> None:
    """One JSON value a line, through `write_text`."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def refuse_changed_settings(
    file: Path, before: dict, settings: dict, remedy: str, may_change: Container[str] = ()
) -> None:
    """Compare the settings in a file with those of this call.

    Args:
        file: where `before` was read.
        settings: JSON values by name.
        may_change: names that are not compared.
    Raises:
        ValueError: names a setting that differs, both values and `remedy` in one line.
    """
    for name in before | settings:
        if name not in may_change and before.get(name) != settings.get(name):
            change = f"{name!s:.50} {before.get(name)!s:.200}, not {settings.get(name)!s:.200}"
            change = " ".join(change.split())  # one line, whatever a foreign file holds
            raise ValueError(f"{file}: begun with {change}; {remedy}")


class Journal:
    """The finished records of a command that may be killed and called again, as JSON lines.

    The first line holds the settings on which the records depend. A last line without its line end
    was being written when the process died and is dropped.

    Args:
        path: file of the journal.
        settings: JSON values by name.
    Attributes:
        records: what earlier calls have appended.

    Raises:
        ValueError: the journal is damaged, or its settings are others.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        self.path, self.records = path, []
        if lines:
            with reraise_corrupt(path, "remove it to begin again"):
                before, *self.records = [json.loads(line) for line in lines]
                before = dict(before)
                json.dumps(self.records, ensure_ascii=False).encode()  # no lone surrogates
        if self.records:  # a call that was refused before its first record binds no other
            refuse_changed_settings(path, before, settings, "remove it to begin again")
        write_jsonl(path, [settings, *self.records])
        self.file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 a line at a time

    def append(self, record: Any) -> None:
        self.file.write(json.dumps(record, ensure_ascii=False) + "\n")


# --------------------------------------------------------------------------------------------------
# Reading


def content_files(path: Path, pattern: str = "**/*") -> list[Path]:
    """The file itself, or a folder's files of that pattern but for hidden ones, such as locks."""
    if not path.is_dir():
        return [path]
    files = [file for file in path.glob(pattern) if file.is_file()]
    return sorted(file for file in files if "/." not in f"/{file.relative_to(path)}")


def fingerprint(path: str | Path, pattern: str = "**/*") -> str:
    """SHA-256 of a file, or of the names and fingerprints of a folder's `content_files`."""
    path = Path(path)
    if path.is_dir():
        files = content_files(path, pattern)
        listing = "".join(f"{file.relative_to(path)} {fingerprint(file)}\n" for file in files)
        return hashlib.sha256(listing.encode()).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def scan_jsonl(
    path: str | Path, parse: Callable[[dict], dict], expected: str, key: str | None = "id"
) -> Iterator[tuple[int, dict]]:
    """Stream a JSONL file of any size.

    Memory is 8 bytes a line, and 25 at the end, to see that no `key` occurs twice.

    Args:
        parse: turns a line's JSON value into a record.
        expected: what a line should hold, for error messages.
        key: an entry that every record must have and no two share, if there is one.
    Yields:
        The byte at which the line begins, and the record.

    Raises:
        ValueError: names the file, the line and what is wrong: not JSON, not `expected`, a `key`
            for the second time (known only after the last line), or no record at all.
    """
    # Hash of every line's key; 64 bits: two keys of 29 M collide once in 40,000 files.
    hashes = array("q")
    begin = records = 0
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    record = parse(json.loads(line))
                    hashes.append(hash(record[key] if key else number))
                except MALFORMED as error:  # cut: the error may quote all of a binary file
                    raise ValueError(
                        f"{path}:{number}: expected {expected}, got {error!r:.200}"
                    ) from None
                records += 1
                yield begin, record
            else:
                hashes.append(hash((number, "blank")))
            begin += len(line)
    if not records:
        raise ValueError(f"{path}: it holds no {expected}")
    order = np.argsort(hashes, kind="stable")
    ordered = np.asarray(hashes)[order]
    repeated = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(repeated):
        first, second = order[repeated[0] : repeated[0] + 2] + 1
        raise ValueError(f"{path}:{second}: the {key} of line {first} occurs twice")


def read_jsonl(
    path: str | Path, parse: Callable[[dict], dict], expected: str, key: str | None = "id"
) -> list[dict]:
    """All records of a JSONL file; arguments and errors as in `scan_jsonl`."""
    return [record for _, record in scan_jsonl(path, parse, expected, key)]


def replace_surrogates(text: str) -> str:
    """Replace lone surrogates by "?": JSON can carry them, UTF-8 and tokenizers cannot."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


# --------------------------------------------------------------------------------------------------
# Passages


def parse_passage(record: dict) -> Passage:
    """A passage of either format; raises one of `MALFORMED` if it is of neither."""
    if "contents" in record:
        title, _, text = record["contents"].partition("\n")
        title = title.removeprefix('"').removesuffix('"')
        record = {"id": record["id"], "title": title, "text": text}
    if not isinstance(record["id"], str | int):
        raise ValueError("id must be a string or a number")
    if not (isinstance(record["title"], str) and isinstance(record["text"], str)):
        raise ValueError("title and text must be strings")
    return {key: replace_surrogates(str(record[key])) for key in ("id", "title", "text")}


def scan_passages(path: str | Path) -> Iterator[tuple[int, Passage]]:
    """Stream a passage file with progress; items and errors as in `scan_jsonl`."""
    passages = scan_jsonl(path, parse_passage, '{"id", "title", "text"}')
    return tqdm(passages, desc=f"reading {path}", unit=" passages", delay=2, mininterval=1)


def read_passages(path: str | Path) -> list[Passage]:
    """All passages of a file; errors as in `scan_jsonl`."""
    return [passage for _, passage in scan_passages(path)]


# --------------------------------------------------------------------------------------------------
# Questions


def answer_texts(answers: str | bool | list | None) -> list[str]:
    """Answers as data sets write them (one or a list, booleans for yes and no, null) as texts.

    Raises ValueError for anything else, such as SQuAD's dictionaries.
    """
    answers = answers if isinstance(answers, list) else [answers]
    texts = []
    for answer in answers:
        if isinstance(answer, bool):
            texts.append("yes" if answer else "no")
        elif isinstance(answer, str | int | float):
            texts.append(str(answer).strip())
        elif answer is not None:
            raise ValueError(f"an answer that is neither text nor number: {answer!r:.100}")
    return texts


def parse_question(record: dict, dataset: str) -> dict:
    """A question of either format; raises one of `MALFORMED` if it is of neither.

    Args:
        dataset: of a question that names none.
    """
    name = record["id"] if "id" in record else record["idx"]
    dataset = record.get("dataset") or dataset
    question = record["question"].strip()
    answers = answer_texts(record["answers"] if "answers" in record else record["answer"])
    answers = [replace_surrogates(answer) for answer in answers if answer]
    if not question or not answers:
        raise ValueError("a question without text or answer")
    if len(question) > MAX_QUESTION_CHARACTERS:
        limit = MAX_QUESTION_CHARACTERS
        raise ValueError(f"a question of {len(question)} characters, of at most {limit}")
    if not (isinstance(name, str | int) and isinstance(dataset, str)):
        raise ValueError("id must be a string or a number, dataset a string")
    return {
        "id": replace_surrogates(str(name)),
        "question": replace_surrogates(question),
        "answers": answers,
        "dataset": replace_surrogates(dataset),
    }


def read_questions(path: str | Path, dataset: str | None = None) -> list[dict]:
    """All questions of a file; errors as in `scan_jsonl`.

    Args:
        dataset: of questions that name none; by default the name of the file.
    """
    parse = partial(parse_question, dataset=dataset or Path(path).stem)
    return read_jsonl(path, parse, '{"id", "question", "answers"}')
