"""Reading questions and passages; BM25."""

import json

import pytest

from retriever import BM25, open_retriever, read_passages, read_questions

PASSAGES = [
    {"id": "a", "title": "Red Harbor", "text": "A film directed by Peter Lane."},
    {"id": "b", "title": "Laura Webb", "text": "A singer born in Salem."},
    {"id": "c", "title": "Salem", "text": "A town."},
]


def write(path, lines):
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    path.write_bytes(text.encode(errors="surrogateescape"))
    return path


def test_bm25_finds_the_passage_and_keeps_the_order_of_queries():
    results = BM25(PASSAGES).search(["laura WEBB", "harbor film"], k=2)
    assert [result[0]["id"] for result in results] == ["b", "a"]
    assert all(len(result) == 2 for result in results)


def test_bm25_agrees_with_the_formula_by_hand():
    """A term in 1 of 3 passages: idf = ln((3 - 1 + .5) / (1 + .5)); rank-bm25's k1 = 1.5, b = 0.75."""
    import math

    index = BM25(PASSAGES).index
    lengths = [8, 7, 3]
    average = sum(lengths) / 3
    expected = math.log(2.5 / 1.5) * 2.5 / (1 + 1.5 * (0.25 + 0.75 * lengths[0] / average))
    assert index.get_scores(["harbor"])[0] == pytest.approx(expected)


def test_bm25_of_unknown_words_or_a_small_corpus():
    assert [p["id"] for p in BM25(PASSAGES).search(["zzz"], k=2)[0]] == ["a", "b"]  # ties in corpus order
    assert len(BM25(PASSAGES).search(["salem"], k=9)[0]) == 3


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{broken\n"], ":1: expected"),
        ([PASSAGES[0], {"id": "d", "title": "x"}], ":2: expected"),
        ([PASSAGES[0], PASSAGES[0]], ":2: id 'a' occurs twice"),
        (["[1]\n"], ":1: expected"),
        (["\udcff\n"], ":1: expected"),  # not UTF-8
        ([], "it holds no"),
    ],
)
def test_bad_passages_end_in_one_line_that_names_the_place(tmp_path, lines, message):
    file = write(tmp_path / "p.jsonl", lines)
    with pytest.raises(ValueError) as error:
        read_passages(file)
    assert str(error.value).startswith(f"{file}{message}" if message[0] == ":" else f"{file}: {message}")
    assert "\n" not in str(error.value)


def test_a_missing_passage_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl"):
        open_retriever(str(tmp_path / "nothing.jsonl"))


def test_questions_in_both_formats(tmp_path):
    file = write(
        tmp_path / "hotpot.jsonl",
        [
            {"id": 7, "question": " Who? ", "answers": ["A", "B"], "dataset": "d"},
            {"idx": 8, "question": "Is it?", "answer": True, "gen_text_store": ""},
            {"idx": 9, "question": "Who?", "answer": ["A", None, False]},
            {"idx": 10, "question": "Who?", "answer": "A"},
        ],
    )
    first, *others = read_questions(file)
    assert first == {"id": "7", "question": "Who?", "answers": ["A", "B"], "dataset": "d"}
    assert [q["answers"] for q in others] == [["yes"], ["A", "no"], ["A"]]
    assert {q["dataset"] for q in others} == {"hotpot"}


@pytest.mark.parametrize(
    "bad",
    [
        {"id": 1, "question": "Who?"},
        {"id": 1, "question": "", "answers": ["a"]},
        {"id": 1, "question": "Who?", "answers": []},
        {"id": 1, "question": "Who?", "answer": None},
        {"question": "Who?", "answer": "a"},
    ],
)
def test_a_question_without_text_or_answer_is_refused(tmp_path, bad):
    with pytest.raises(ValueError, match=r"q\.jsonl:1: "):
        read_questions(write(tmp_path / "q.jsonl", [bad]))
