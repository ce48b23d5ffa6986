"""BM25 search: rank-bm25 is the readable reference, tantivy is fast and searches on disk."""

import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from records import Passage, replace_surrogates, reraise_corrupt


def tokenize(text: str) -> list[str]:
    """Lower-case words; the same for passages and queries."""
    return re.findall(r"\w+", text.lower())


class BM25:
    """Okapi BM25 over title and text with rank-bm25: the readable reference, for small corpora."""

    def __init__(self, passages: list[Passage]):
        from rank_bm25 import BM25Okapi

        self.passages = passages
        documents = [tokenize(f"{passage['title']} {passage['text']}") for passage in passages]
        # A corpus without any word would break rank-bm25.
        self.index = BM25Okapi([words or [""] for words in documents])

    def search(self, queries: list[str], k: int) -> list[list[Passage]]:
        """The k best passages of each query, ties in corpus order; fewer in a smaller corpus."""
        return [self._search_one(query, k) for query in queries]

    def _search_one(self, query: str, k: int) -> list[Passage]:
        scores = self.index.get_scores(tokenize(query))
        best = (-scores).argsort(kind="stable")[:k]
        return [self.passages[row] | {"score": float(scores[row])} for row in best]


# Words that a query leaves out: they cost most of a search's time and do not change recall
# (RESULTS.md has the measurement).
STOP_WORDS = """
    a also an and are as at be been but by did do does for from had has have he her his how if in
    into is it its no not of on or she such that the their then there these they this to was were
    what when where which who whom whose why will with
""".split()
# How many hits are fetched at most to put ties into corpus order: a word that 300,000 similar
# passages share would cost seconds otherwise.
MAX_TIES = 1000
# Two tantivy scores closer than 10^-SCORE_DIGITS count as a tie.
SCORE_DIGITS = 4


class TantivyBM25:
    """Okapi BM25 (k1 = 1.2, b = 0.75) over title and text with tantivy.

    The index is built from a stream and searched where it lies on disk. Every word is indexed; a
    query leaves its stop words out, unless it has no other words.
    """

    def __init__(self, index):
        import tantivy

        self.schema = index.schema
        self.searcher = index.searcher()
        self.all_words = self._analyzer()
        self.content_words = self._analyzer(tantivy.Filter.custom_stopword(STOP_WORDS))
        # Threads help because tantivy releases the interpreter's lock while it searches.
        self._pool = ThreadPoolExecutor(thread_name_prefix="bm25")

    @staticmethod
    def _analyzer(*filters):
        import tantivy

        builder = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple())
        for each in (tantivy.Filter.remove_long(64), tantivy.Filter.lowercase(), *filters):
            builder = builder.filter(each)
        return builder.build()

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
            writer.add_document(document)
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

        query = replace_surrogates(query)
        terms = []
        for word in self.content_words.analyze(query) or self.all_words.analyze(query):
            terms.append((Occur.Should, Query.term_query(self.schema, "words", word, "freq")))
        any_word = Query.boolean_query(terms)
        limit = k + 1
        while True:
            hits = self.searcher.search(any_word, limit, count=False).hits
            all_found = len(hits) < limit
            if all_found or limit > MAX_TIES or hits[-1][0] < hits[k - 1][0] - 10**-SCORE_DIGITS:
                return hits
            limit *= 8
