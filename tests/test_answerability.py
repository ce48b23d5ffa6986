"""Which questions a corpus can answer at all."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import answerability
from answerability import holds_answer, in_any_passage, in_first_passages, measure_answerability
from retriever import build_bm25

PASSAGES = [
    {"id": "0", "title": "Red Harbor", "text": "It was shot in New York, by Peter Lane."},
    {"id": "1", "title": "Dover", "text": "A town. New roads lead to York."},
    {"id": "2", "title": "Salem", "text": "Nothing of it is known."},
]
QUESTIONS = [
    {"question": "who shot red harbor", "answers": ["Peter Lane"]},
    {"question": "which town", "answers": ["Boston", "new york"]},  # found elsewhere only
    {"question": "who knows salem", "answers": ["York lane", "lane peter"]},  # not in one piece
    {"question": "what lies at the sea", "answers": ["the Dover"]},  # a title
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def corpus(tmp_path):
    return write(tmp_path / "c.jsonl", PASSAGES)


def test_in_any_passage(corpus):
    assert in_any_passage(corpus, QUESTIONS) == [True, True, False, True]


WORDS = st.lists(st.sampled_from(["a", "b", "c", "B.", "the", "c-d"]), min_size=1, max_size=5)
TEXTS = WORDS.map(" ".join)


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4), st.lists(TEXTS, min_size=1))
def test_in_any_passage_is_the_search_through_all(tmp_path_factory, passages, answers):
    rows = [{"id": str(i), "title": a, "text": b} for i, (a, b) in enumerate(passages)]
    path = write(tmp_path_factory.mktemp("c") / "c.jsonl", rows)
    questions = [{"answers": [answer]} for answer in answers]
    expected = [any(holds_answer(row, [answer]) for row in rows) for answer in answers]
    assert in_any_passage(path, questions) == expected


def test_in_first_passages_asks_the_question(monkeypatch):
    monkeypatch.setattr(answerability, "QUERIES_AT_A_TIME", 3)
    asked = []

    def search(queries, k):
        asked.append((queries, k))
        return [PASSAGES[:1] for _ in queries]

    assert in_first_passages(search, QUESTIONS) == [True, True, False, False]
    texts = [question["question"] for question in QUESTIONS]
    assert asked == [(texts[:3], 100), (texts[3:], 100)]


@pytest.mark.parametrize("kind", ["file", "index"])
def test_it_is_computed_once_and_kept_beside_the_passages(tmp_path, corpus, kind, monkeypatch):
    source = corpus
    if kind == "index":
        source = tmp_path / "index"
        build_bm25(str(corpus), source)
    rows = measure_answerability(str(source), QUESTIONS)
    assert [row["answerable"] for row in rows] == [True, True, False, True]
    assert [row["answerable_100"] for row in rows] == [True, False, False, False]
    monkeypatch.setattr(answerability, "in_any_passage", None)
    monkeypatch.setattr(answerability, "open_retriever", None)
    assert measure_answerability(str(source), QUESTIONS) == rows
    assert measure_answerability(str(source), QUESTIONS[2:]) == rows[2:]
    with pytest.raises(TypeError):  # another question is measured
        measure_answerability(str(source), [*QUESTIONS, QUESTIONS[0] | {"answers": ["x"]}])


def test_passages_that_are_not_those_of_the_index_are_not_read(tmp_path, corpus):
    build_bm25(str(corpus), tmp_path / "index")
    write(corpus, [*PASSAGES, {"id": "3", "title": "x", "text": "York lane"}])
    rows = measure_answerability(str(tmp_path / "index"), QUESTIONS)
    assert all(row.keys() == {"answerable_100"} for row in rows)


def test_a_folder_that_nothing_can_be_written_to(corpus, monkeypatch):
    def refuse(path, text):
        raise PermissionError(path)

    monkeypatch.setattr(answerability, "write_text", refuse)
    assert len(measure_answerability(str(corpus), QUESTIONS)) == 4


@pytest.mark.parametrize("fingerprint", [None, "serper: web search, not repeatable"])
def test_of_the_web_and_of_unknown_passages_nothing_is_measured(fingerprint, monkeypatch):
    monkeypatch.setattr(answerability, "retriever_fingerprint", lambda source: fingerprint)
    assert measure_answerability("http://127.0.0.1:1", QUESTIONS) == [{}, {}, {}, {}]
