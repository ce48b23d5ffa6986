"""How many questions a corpus can answer at all: where it lacks the answer, no algorithm helps.

`answerable_100` is the share of questions with a gold answer in the retriever's first 100 passages
for the question, `answerable` the share with one in any passage. An answer must occur in one piece,
as the metrics normalise text; "yes" and "no" are words like any other.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from pathlib import Path

from records import Passage, scan_passages, write_text
from retriever import open_retriever, passage_file, retriever_fingerprint
from reward import contiguous_match, normalize

VERSION = 1  # of what is kept: raise it when the same passages would get other answers
FIRST = 100  # passages
QUERIES_AT_A_TIME = 64


def holds_answer(passage: Passage, answers: list[str]) -> bool:
    """Whether an answer occurs in one piece in the title or in the text."""
    parts = (passage["title"], passage["text"])
    return any(contiguous_match(part, answer) for part in parts for answer in answers)


def are_answered(results: list[list[Passage]], questions: list[dict]) -> list[bool]:
    """For each question whether one of its passages holds an answer."""
    return [
        any(holds_answer(passage, question["answers"]) for passage in passages)
        for question, passages in zip(questions, results, strict=True)
    ]


def in_first_passages(
    search: Callable[[list[str], int], list[list[Passage]]], questions: list[dict], k: int = FIRST
) -> list[bool]:
    """For each question whether a search for it finds an answer among the first k passages."""
    found = []
    for start in range(0, len(questions), QUERIES_AT_A_TIME):
        some = questions[start : start + QUERIES_AT_A_TIME]
        found += are_answered(search([question["question"] for question in some], k), some)
    return found


def in_any_passage(corpus: Path, questions: list[dict]) -> list[bool]:
    """For each question whether any passage of the file holds an answer. Reads the file once."""
    answers = [[tuple(normalize(a).split()) for a in q["answers"]] for q in questions]
    missing: dict[str, set[tuple[str, ...]]] = defaultdict(set)  # answers by their first word
    for answer in chain(*answers):
        missing[answer[0]].add(answer)
    for _, passage in scan_passages(corpus):
        for part in (passage["title"], passage["text"]):
            words = normalize(part).split()
            for start, word in enumerate(words):
                if word in missing:
                    here = {a for a in missing[word] if tuple(words[start : start + len(a)]) == a}
                    missing[word] -= here
    return [any(answer not in missing[answer[0]] for answer in own) for own in answers]


def measure_answerability(source: str, questions: list[dict]) -> list[dict[str, bool]]:
    """`answerable_100` and, where the passages are on this disk, `answerable` of each question.

    What a web search engine could find is not measured. The answers are kept beside the passages,
    in `answerability/`: to read a large corpus takes long.

    Args:
        source: as --retriever.
    """
    fingerprint = retriever_fingerprint(source)
    if fingerprint is None or "web search" in fingerprint:
        return [{} for _ in questions]
    corpus = passage_file(source)
    name = hashlib.sha256(f"{VERSION} {FIRST} {fingerprint}".encode()).hexdigest()[:16]
    file = Path(corpus or ".").parent / "answerability" / f"{name}.json"
    known = {}
    if corpus is not None:
        with suppress(OSError, ValueError):
            known = json.loads(file.read_text())
    keys = [json.dumps([question["question"], question["answers"]]) for question in questions]
    missing = {key: q for key, q in zip(keys, questions, strict=True) if key not in known}
    if missing:
        new = list(missing.values())
        columns = {"answerable_100": in_first_passages(open_retriever(source).search, new)}
        if corpus is not None:
            columns["answerable"] = in_any_passage(corpus, new)
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        known |= dict(zip(missing, rows, strict=True))
    if missing and corpus is not None:
        with suppress(OSError):  # a folder that nothing can be written to
            file.parent.mkdir(exist_ok=True)
            write_text(file, json.dumps(known))
    return [known[key] for key in keys]
