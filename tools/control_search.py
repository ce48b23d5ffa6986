"""Search engines to compare with: an oracle, which knows the answers, and random passages."""

import random
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from answerability import holds_answer
from bm25 import TantivyBM25
from dense import PassageFile, write_rows
from records import Passage, fingerprint, read_questions
from retriever import Retriever, open_retriever, retriever_fingerprint
from rollout import derive_seed

# Of so many passages about a question and its answers, the oracle returns those with an answer.
ORACLE_CANDIDATES = 100


class Oracle:
    """Finds passages that hold a gold answer of the question asked.

    A query that is no question of the file, such as a few keywords, stands for the question that is
    nearest to it by BM25.
    """

    def __init__(self, retriever: Retriever, questions: list[dict]):
        self.retriever = retriever
        self.answers: dict[str, list[str]] = {}  # by question
        for question in questions:
            self.answers.setdefault(question["question"], []).extend(question["answers"])
        self.index = TantivyBM25.build({"title": "", "text": text} for text in self.answers)

    def search(self, queries: list[str], k: int) -> list[list[Passage]]:
        """The first k passages with an answer; none if there is none or no question is near."""
        asked = [self._find_question(query) for query in queries]
        texts = [" ".join([question, *self.answers.get(question, [])]) for question in asked]
        results = []
        found = self.retriever.search(texts, ORACLE_CANDIDATES)
        for question, passages in zip(asked, found, strict=True):
            answers = self.answers.get(question, [])
            results.append([p for p in passages if holds_answer(p, answers)][:k])
        return results

    def _find_question(self, query: str) -> str:
        """The query itself where it is a question of the file, or where none is near."""
        if query not in self.answers:
            for nearest in self.index.search([query], 1)[0]:
                return nearest["text"]
        return query


class RandomPassages:
    """Returns passages drawn at random, for the same query always the same ones."""

    def __init__(self, corpus: str):
        if not Path(corpus).is_file():
            raise FileNotFoundError(f"{corpus}: random passages need a passage file as --index")
        with TemporaryDirectory() as folder:  # the rows are mapped and outlive their name
            rows = Path(folder, "rows.npy")
            write_rows(rows, corpus)
            self.passages = PassageFile(corpus, rows)

    def search(self, queries: list[str], k: int) -> list[list[Passage]]:
        """k different passages for each query; all of them if there are fewer."""
        results = []
        for query in queries:
            rng = random.Random(derive_seed(query))
            rows = rng.sample(range(len(self.passages)), min(k, len(self.passages)))
            results.append([self.passages[row] for row in rows])
        return results


def open_control(control: str, index: str, questions: Iterable[str]) -> tuple[str, Retriever]:
    """A fingerprint and the search engine that has it.

    Args:
        control: oracle or random.
        index: what the oracle searches, or the passage file to draw from.
        questions: question files with the oracle's answers.
    """
    if control == "random":
        retriever = RandomPassages(index)
    else:
        known = [question for path in questions for question in read_questions(path)]
        retriever = Oracle(open_retriever(index), known)
    parts = [control, retriever_fingerprint(index), *map(fingerprint, questions)]
    return " ".join(map(str, parts)), retriever
