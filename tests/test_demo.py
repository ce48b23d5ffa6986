"""The demo's world: what its questions ask, and where the answers stand."""

import itertools
import re
from collections import Counter

import pytest

from bm25 import BM25
from reward import TAGS
from tools import demo

WORLD = demo.demo_world(0)
PASSAGES = WORLD["passages"]
SETS = [WORLD[name] for name in ("train", "validation", "heldout")]
TEXTS = {passage["title"]: passage["text"] for passage in PASSAGES}
ANY_TITLE = re.compile(r"\b(" + "|".join(sorted(TEXTS, key=len, reverse=True)) + r")\b")


def titles_in(text):
    return set(ANY_TITLE.findall(text))


def test_the_world_is_a_function_of_the_seed():
    assert demo.demo_world(0) == WORLD != demo.demo_world(1)


def test_sizes_and_ids():
    assert [len(questions) for questions in SETS] == [900, 90, 243]
    assert len(PASSAGES) == 1224
    for records in WORLD.values():
        assert len({record["id"] for record in records}) == len(records)
    assert len(TEXTS) == len(PASSAGES)  # names are unique: a question has one answer


@pytest.mark.parametrize("seed", range(3))
def test_kinds_have_equal_shares_and_a_third_has_two_hops(seed):
    world = demo.demo_world(seed)
    for name in ("train", "validation", "heldout"):
        questions = world[name]
        two_hop = [question for question in questions if "2hop" in question["dataset"]]
        assert world[f"{name}_2hop"] == two_hop and 3 * len(two_hop) == len(questions)
        counts = Counter(question["dataset"] for question in questions)
        for word in ("who", "what", "where"):
            assert counts[f"demo-1hop-{word}"] == len(questions) * 2 // 9
            assert counts[f"demo-2hop-{word}"] == len(questions) // 9


def test_the_sets_ask_about_different_entities():
    asked, answers = [], []
    for questions in SETS:
        asked.append(set().union(*(titles_in(q["question"]) for q in questions)))
        answers.append({answer for q in questions for answer in q["answers"]} & TEXTS.keys())
        assert asked[-1] and answers[-1]
    for one, other in itertools.combinations(range(len(SETS)), 2):
        assert not asked[one] & asked[other]
        assert not answers[one] & answers[other]  # no person or town answers in both


def test_every_one_hop_answer_is_in_the_passage_of_its_entity_and_bm25_finds_it():
    questions = [q for q in SETS[0] if "1hop" in q["dataset"]][:200]
    found = BM25(PASSAGES).search([q["question"] for q in questions], k=2)
    hits = 0
    for question, passages in zip(questions, found, strict=True):
        (entity,) = titles_in(question["question"])
        assert question["answers"][0] in TEXTS[entity]
        hits += entity in {passage["title"] for passage in passages}
    assert hits > 190


@pytest.mark.parametrize("questions", SETS, ids=("train", "validation", "heldout"))
def test_a_two_hop_answer_needs_both_passages(questions):
    questions = [q for q in questions if "2hop" in q["dataset"]]
    found = BM25(PASSAGES).search([q["question"] for q in questions], k=3)
    for question, passages in zip(questions, found, strict=True):
        (entity,) = titles_in(question["question"])
        linked = titles_in(TEXTS[entity]) - {entity}
        assert any(question["answers"][0] in TEXTS[title] for title in linked)
        for passage in passages:  # that a search with the question's own words finds
            assert question["answers"][0] not in passage["text"]


def test_the_examples_are_not_of_the_world():
    for question, hops, answer in [*demo.IN_DEMO, *demo.IN_DEMO_2HOP]:
        titles = {title for title, _, _ in hops}
        assert question not in {q["question"] for questions in SETS for q in questions}
        assert not titles & TEXTS.keys() and answer not in TEXTS


def test_prompts_of_the_baselines_leave_searches_out():
    search, single, closed_book, _ = demo.PROMPTS.values()
    hops = [hop for _, hops, _ in demo.IN_DEMO for hop in hops]
    assert re.findall(r"<.begin_of_query.> (.*) <.end_of_query.>\n\n<.begin_of_doc", search) == [
        title for title, _, _ in hops
    ]
    assert single.count(TAGS.documents.opening) == len(demo.IN_DEMO)
    assert TAGS.query.opening not in single and TAGS.documents.opening not in closed_book
    for title, text, fact in hops:
        assert f"(1){title}   {text}\n" in search and f"){title}   {text}\n" in single
        assert text not in closed_book
        for prompt in (search, single, closed_book):
            assert fact in prompt
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
