"""The demo's world: what its questions ask, and where the answers stand."""

import re

import pytest

from bm25 import BM25
from tools import demo

PASSAGES, TRAIN, HELD_OUT = demo.demo_world(0)
TEXTS = {passage["title"]: passage["text"] for passage in PASSAGES}
ANY_TITLE = re.compile(r"\b(" + "|".join(sorted(TEXTS, key=len, reverse=True)) + r")\b")


def titles_in(text):
    return set(ANY_TITLE.findall(text))


def test_the_world_is_a_function_of_the_seed():
    assert demo.demo_world(0) == (PASSAGES, TRAIN, HELD_OUT)
    assert demo.demo_world(1) != (PASSAGES, TRAIN, HELD_OUT)


def test_sizes_and_ids():
    assert (len(PASSAGES), len(TRAIN), len(HELD_OUT)) == (1060, 1200, 120)
    for records in (PASSAGES, TRAIN, HELD_OUT):
        assert len({record["id"] for record in records}) == len(records)
    assert len(TEXTS) == len(PASSAGES)  # names are unique: a question has one answer
    assert sum(question["dataset"] == "demo-2hop" for question in HELD_OUT) == 20


def test_held_out_questions_are_about_entities_of_no_training_question():
    asked, answers = [], []
    for questions in (TRAIN, HELD_OUT):
        asked.append(set().union(*(titles_in(q["question"]) for q in questions)))
        answers.append({answer for q in questions for answer in q["answers"]} & TEXTS.keys())
    assert all(asked) and not asked[0] & asked[1]
    assert all(answers) and not answers[0] & answers[1]  # no person or town answers in both


def test_every_one_hop_answer_is_in_the_passage_of_its_entity_and_bm25_finds_it():
    questions = [q for q in TRAIN if q["dataset"] == "demo-1hop"][:200]
    found = BM25(PASSAGES).search([q["question"] for q in questions], k=2)
    hits = 0
    for question, passages in zip(questions, found, strict=True):
        (entity,) = titles_in(question["question"])
        assert question["answers"][0] in TEXTS[entity]
        hits += entity in {passage["title"] for passage in passages}
    assert hits > 190


def test_a_two_hop_answer_needs_both_passages():
    questions = [q for q in TRAIN if q["dataset"] == "demo-2hop"]
    assert len(questions) == 200
    for question in questions:
        (entity,) = titles_in(question["question"])
        linked = titles_in(TEXTS[entity]) - {entity}
        assert any(question["answers"][0] in TEXTS[title] for title in linked)


def test_prompts_of_the_baselines_leave_searches_out():
    search, single, closed_book = demo.PROMPTS.values()
    query = r"\nI need to find (.*)\.\n<.begin_of_query.> \1 <.end_of_query.>"
    documents = r"\n\n<.begin_of_documents.>\n\(1\).*\n<.end_of_documents.>"
    assert len(re.findall(query + documents, search)) == len(demo.EXAMPLES) == 2
    assert re.sub(query, "", search) == single != search
    assert re.sub(documents, "", single) == closed_book != single
    assert all(prompt.endswith("Question: {question}\n<think>") for prompt in demo.PROMPTS.values())


def test_what_is_there_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "fetch_demo_model", lambda out: out.mkdir())
    demo.main(["--out", str(tmp_path)])
    for name, prompt in demo.PROMPTS.items():
        assert (tmp_path / name).read_text() == prompt
    before = (tmp_path / "train.jsonl").read_bytes()
    (tmp_path / "passages.jsonl").write_text("mine")
    monkeypatch.setattr(demo, "fetch_demo_model", lambda out: pytest.fail("fetched twice"))
    demo.main(["--out", str(tmp_path), "--seed", "3"])
    assert (tmp_path / "train.jsonl").read_bytes() == before
    assert (tmp_path / "passages.jsonl").read_text() == "mine"
