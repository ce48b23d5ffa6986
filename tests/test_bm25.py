"""Both BM25: ranks against the formula computed by hand, ties, stop words, hostile queries."""

import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_retriever import PASSAGES

from bm25 import BM25, TantivyBM25, tokenize


def bm25_by_hand(passages, query, k1):
    """Scores of all passages: Okapi BM25 with b = 0.75 and Lucene's positive idf."""
    documents = [tokenize(f"{p['title']} {p['text']}") for p in passages]
    average = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for word in tokenize(query):
            n = sum(word in other for other in documents)
            idf = math.log(1 + (len(documents) - n + 0.5) / (n + 0.5))
            count = document.count(word)
            norm = k1 * (0.25 + 0.75 * len(document) / average)
            score += idf * count * (k1 + 1) / (count + norm)
        scores.append(score)
    return scores


@pytest.fixture(params=[BM25, TantivyBM25.build], ids=["rank-bm25", "tantivy"])
def make_index(request):
    """Both of them: passages in, an index out."""
    return request.param


def found_ids(index, query, k=3):
    (found,) = index.search([query], k)
    return [passage["id"] for passage in found]


def test_the_passage_is_found_and_the_order_of_queries_kept(make_index):
    results = make_index(PASSAGES).search(["laura WEBB", "harbor film"], k=2)
    assert [[p["id"] for p in result] for result in results] == [["b"], ["a"]]


def test_a_word_of_half_of_the_passages_finds_these(make_index):
    """The idf of Okapi's paper is 0 for such a word, and below 0 for one of more passages."""
    texts = ["a town", "a film", "a river", "film film"]
    passages = [{"id": str(n), "title": "", "text": text} for n, text in enumerate(texts)]
    assert found_ids(make_index(passages), "film") == ["3", "1"]
    for number in (0, 2):
        passages[number]["text"] += " film"
    index = make_index(passages)
    assert set(found_ids(index, "film", 9)) == {"0", "1", "2", "3"}
    assert all(passage["score"] > 0 for passage in index.search(["film"], 9)[0])


def test_a_word_of_many_bytes_is_found(make_index):
    """An unbroken run of Chinese characters is a word, of three bytes each."""
    words = ["\u6e2f" * 22, "\u0436" * 32, "a" * 500]
    index = make_index([{"id": word, "title": word, "text": ""} for word in words])
    for word in words:
        assert found_ids(index, word) == [word]


def test_unknown_words_and_no_words_find_nothing(make_index):
    queries = ["zzz", "", "?!"]
    assert make_index(PASSAGES).search(queries, 3) == [[], [], []]
    assert make_index([{"id": "d", "title": "?", "text": ""}]).search(queries, 3) == [[], [], []]


WORDS = st.sampled_from("red harbor salem film lane town".split())
TEXTS = st.lists(WORDS, min_size=1, max_size=6).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=30), TEXTS, st.integers(1, 5))
def test_both_rank_as_the_formula_does_with_ties_in_corpus_order(texts, query, k):
    """Few words and short texts: most scores tie, and the order of ties depends on the writer."""
    passages = [{"id": str(i), "title": "x", "text": text} for i, text in enumerate(texts)]
    scores = bm25_by_hand(passages, query, k1=1.2)
    matching = [i for i, score in enumerate(scores) if score > 0]
    expected = sorted(matching, key=lambda i: (-round(scores[i], 4), i))[:k]
    for index in (BM25(passages), TantivyBM25.build(passages)):
        (found,) = index.search([query], k)
        assert [int(p["id"]) for p in found] == expected
        assert [p["score"] for p in found] == pytest.approx([scores[i] for i in expected], rel=1e-4)


def test_a_query_leaves_its_stop_words_out_unless_it_has_no_others(make_index):
    index = make_index([*PASSAGES, {"id": "d", "title": "Where It Is At", "text": ""}])
    with_stop_words, without = index.search(
        ["was she with the singer of the town of salem", "she singer town salem"], 3
    )
    assert with_stop_words == without and len(without) == 2
    assert found_ids(index, "is at") == ["d"]


NAMES = [
    ("Will Smith actor", "Will Smith", "Adam Smith"),
    ("Her Greatest Love", "Her Greatest Love", "The Greatest Love"),
    ("The Who band", "The Who", "The Band"),
    ("If 1968 film", "If....", "The Film"),
    ("novel It", "It", "The Novel"),
]


@pytest.mark.parametrize(("query", "name", "other"), NAMES)
def test_a_word_that_is_a_name_is_searched(make_index, query, name, other):
    """The other passage has the query's other words, too, and comes first in the corpus."""
    passages = [
        {"id": "other", "title": other, "text": "an actor, a film, a band, a novel, 1968"},
        {"id": "name", "title": name, "text": "an actor, a film, a band, a novel, 1968"},
    ]
    assert found_ids(make_index(passages), query)[0] == "name"


def test_query_syntax_is_ordinary_text(make_index):
    index = make_index(PASSAGES)
    for query in ("title:salem AND (", '"salem', "salem^2 -webb *", "\0 salem", "salem " * 3000):
        assert set(found_ids(index, query)) == {"b", "c"}
    assert found_ids(index, "x" * 100_000) == []


def test_a_lone_surrogate_is_replaced():
    """JSON carries it; UTF-8, and so the index, does not."""
    index = TantivyBM25.build([{"id": "1", "title": "é", "text": ""}])
    assert index.search(["\ud800 é"], 1)[0][0]["id"] == "1"


def test_many_ties_are_in_corpus_order_and_cost_little():
    many = [{"id": str(i), "title": f"x{i}", "text": "a moth"} for i in range(30_000)]
    few = TantivyBM25.build(many[:300])
    assert [p["id"] for p in few.search(["moth"], 3)[0]] == ["0", "1", "2"]
    index = TantivyBM25.build(many)
    begin = time.monotonic()
    assert [len(found) for found in index.search(["moth"] * 10, 3)] == [3] * 10
    assert time.monotonic() - begin < 5
