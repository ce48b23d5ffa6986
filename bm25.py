"""BM25 search: rank-bm25 is the readable reference, tantivy is fast and searches on disk."""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from records import Passage, replace_surrogates, reraise_corrupt, reraise_unwritten

# Words that a query leaves out unless it has no others. They cost most of a search's time and
# change recall by less than .01 (RESULTS.md has the measurement). Words that are also names, or
# their main part ("Will Smith", "The Who", "Her Greatest Love"), are searched: they are rarer.
STOP_WORDS = """
    a an and are as at be by for from in is of on or that the to was were which with
""".split()


def tokenize(text: str) -> list[str]:
    """Lower-case words; the same for passages and queries."""
    return re.findall(r"[^\W_]+", text.lower())


def leave_stop_words_out(words: list[str]) -> list[str]:
    """The words of a query that are searched."""
    return [word for word in words if word not in STOP_WORDS] or words


class BM25:
    """Okapi BM25 over title and text with rank-bm25: the readable reference, for small corpora.

    It ranks as `TantivyBM25` does, with the exact length of each passage, which tantivy rounds.
    """

    def __init__(self, passages: list[Passage]):
        from rank_bm25 import BM25Okapi

        self.passages = passages
        documents = [tokenize(f"{passage['title']} {passage['text']}") for passage in passages]
        # A corpus without any word would break rank-bm25.
        self.index = BM25Okapi([words or [""] for words in documents], k1=1.2)
        # Its idf falls below 0 for words of more than half of the passages. This one never does.
        counts = Counter(word for words in documents for word in set(words))
        for word, count in counts.items():
            rest = len(documents) - count
            self.index.idf[word] = math.log(1 + (rest + 0.5) / (count + 0.5))

    def search(self, queries: list[str], k: int) -> list[list[Passage]]:
        """The k best passages of each query; fewer where fewer share a word with the query.

        Ties are in corpus order.
        """
        return [self._search_one(query, k) for query in queries]

    def _search_one(self, query: str, k: int) -> list[Passage]:
        scores = self.index.get_scores(leave_stop_words_out(tokenize(query)))
        best = (-scores.round(SCORE_DIGITS)).argsort(kind="stable")[:k]
        return [
            self.passages[row] | {"score": float(scores[row])} for row in best if scores[row] > 0
        ]


# Once more than so many hits were fetched, no further ties are looked for to put them into corpus
# order: a word that 300,000 similar passages share would cost seconds.
MAX_TIES = 1000
# Two scores closer than 10^-SCORE_DIGITS count as a tie.
SCORE_DIGITS = 4


class TantivyBM25:
    """Okapi BM25 (k1 = 1.2, b = 0.75) over title and text with tantivy.

    The index is built from a stream and searched where it lies on disk.
    """

    def __init__(self, index):
        self.schema = index.schema
        self.searcher = index.searcher()
        self.analyzer = self._analyzer()
        # Threads help because tantivy releases the interpreter's lock while it searches.
        self._pool = ThreadPoolExecutor(thread_name_prefix="bm25")

    @staticmethod
    def _analyzer():
        import tantivy

        builder = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple())
        builder = builder.filter(tantivy.Filter.remove_long(1000))  # bytes
        return builder.filter(tantivy.Filter.lowercase()).build()

    @classmethod
    def build(cls, passages: Iterable[Passage], folder: Path | None = None) -> "TantivyBM25":
        """Index a stream of passages into a folder, or in memory without one.

        The writer buffers at most 256 MB.
        """
        import tantivy

        schema = tantivy.SchemaBuilder()
        schema.add_text_field("words", tokenizer_name="words", index_option="freq")
        schema.add_unsigned_field("row", fast=True)
        schema.add_bytes_field("passage", stored=True)
        index = tantivy.Index(schema.build(), path=str(folder) if folder else None)
        index.register_tokenizer("words", cls._analyzer())
        writer = index.writer(heap_size=256 << 20, num_threads=min(8, os.cpu_count()))
        for row, passage in enumerate(passages):
            document = tantivy.Document()
            document.add_text("words", f"{passage['title']} {passage['text']}")
            document.add_unsigned("row", row)
            document.add_bytes("passage", json.dumps(passage, ensure_ascii=False).encode())
            with reraise_unwritten(folder):
                writer.add_document(document)
        with reraise_unwritten(folder):
            writer.commit()
            writer.wait_merging_threads()
        index.reload()
        return cls(index)

    @classmethod
    def open(cls, folder: Path) -> "TantivyBM25":
        """Open what `build` wrote; ValueError names a folder that is damaged."""
        import tantivy

        with reraise_corrupt(folder):
            return cls(tantivy.Index.open(str(folder)))

    def search(self, queries: list[str], k: int) -> list[list[Passage]]:
        """The k best passages of each query; fewer where fewer share a word with the query.

        Ties, up to MAX_TIES of them, are in corpus order.
        """
        return list(self._pool.map(lambda query: self._search_one(query, k), queries))

    def _search_one(self, query: str, k: int) -> list[Passage]:
        hits = self._best_hits(query, k)
        rows = self.searcher.fast_field_values("row", [address for _, address in hits])
        rounded = [-round(score, SCORE_DIGITS) for score, _ in hits]
        passages = []
        for position in np.lexsort((rows, rounded))[:k]:  # the last key, the score, sorts first
            score, address = hits[position]
            passage = json.loads(self.searcher.doc(address)["passage"][0])
            passages.append(passage | {"score": score})
        return passages

    def _best_hits(self, query: str, k: int) -> list[tuple[float, Any]]:
        """Score and address of the k best hits and of all that tie with the k-th.

        Which of several ties tantivy returns first depends on the threads of its writer.
        """
        from tantivy import Occur, Query

        terms = []
        for word in leave_stop_words_out(self.analyzer.analyze(replace_surrogates(query))):
            terms.append((Occur.Should, Query.term_query(self.schema, "words", word, "freq")))
        any_word = Query.boolean_query(terms)
        limit = k + 1
        while True:
            hits = self.searcher.search(any_word, limit, count=False).hits
            all_found = len(hits) < limit
            if all_found or limit > MAX_TIES or hits[-1][0] < hits[k - 1][0] - 10**-SCORE_DIGITS:
                return hits
            limit *= 8
