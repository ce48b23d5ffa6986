"""The demo world."""

import re

import data_prep
from retriever import BM25


def test_the_world_is_a_function_of_the_seed():
    assert data_prep.demo_world(1) == data_prep.demo_world(1)
    assert data_prep.demo_world(1) != data_prep.demo_world(2)


def test_sizes_and_ids():
    passages, train, held_out = data_prep.demo_world(0)
    assert 300 <= len(passages) <= 2000
    for records in (passages, train, held_out):
        assert len({r["id"] for r in records}) == len(records)
    assert len({p["title"] for p in passages}) == len(passages)  # names are unique: a question has one answer
    assert {q["dataset"] for q in held_out} == {"demo-1hop", "demo-2hop"}


def named(titles):
    """A function from text to the titles in it, the longest at each place."""
    pattern = re.compile(r"\b(" + "|".join(sorted(map(re.escape, titles), key=len, reverse=True)) + r")\b")
    return lambda text: set(pattern.findall(text))


def test_held_out_questions_are_about_entities_of_no_training_question():
    passages, train, held_out = data_prep.demo_world(0)
    titles = {p["title"] for p in passages}
    find = named(titles)

    def entities(questions):
        return set().union(*(find(q["question"]) for q in questions))

    assert entities(train) and not entities(train) & entities(held_out)
    answers = {a for q in train for a in q["answers"]} & titles
    assert not answers & {a for q in held_out for a in q["answers"]}  # no person or town is an answer in both


def test_every_one_hop_answer_is_in_the_passage_of_its_entity_and_bm25_finds_it():
    passages, train, _ = data_prep.demo_world(0)
    one_hop = [q for q in train if q["dataset"] == "demo-1hop"][:200]
    found = BM25(passages).search([q["question"] for q in one_hop], k=2)
    hits = [any(q["answers"][0] in p["text"] for p in result) for q, result in zip(one_hop, found, strict=True)]
    assert sum(hits) / len(hits) > 0.95


def test_a_two_hop_answer_needs_both_passages():
    passages, train, _ = data_prep.demo_world(0)
    text = {p["title"]: p["text"] for p in passages}
    find = named(text)
    for q in [q for q in train if q["dataset"] == "demo-2hop"]:
        (subject,) = find(q["question"])
        bridges = find(text[subject]) - {subject}
        assert any(q["answers"][0] in text[bridge] for bridge in bridges)


def test_files_are_written_once(tmp_path, monkeypatch):
    monkeypatch.setattr(data_prep, "fetch_demo_model", lambda out: out.mkdir())
    data_prep.main(["demo", "--out", str(tmp_path / "d"), "--seed", "3"])
    before = (tmp_path / "d" / "train.jsonl").read_bytes()
    (tmp_path / "d" / "passages.jsonl").write_text("mine")
    data_prep.main(["demo", "--out", str(tmp_path / "d"), "--seed", "3"])
    assert (tmp_path / "d" / "train.jsonl").read_bytes() == before
    assert (tmp_path / "d" / "passages.jsonl").read_text() == "mine"
