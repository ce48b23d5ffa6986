"""Questions and passages on disk: both formats of each, and files that are refused by line."""

import pytest
from test_retriever import PASSAGES, write

from records import parse_passage, read_passages, read_questions, refuse_changed_settings


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{broken\n"], ":1: expected"),
        ([PASSAGES[0], {"id": "d", "title": "x"}], ":2: expected"),
        ([PASSAGES[0], PASSAGES[1], PASSAGES[0]], ":3: the id of line 1 occurs twice"),
        (["[1]\n"], ":1: expected"),
        ([PASSAGES[0], {"id": "d", "title": None, "text": ["x"]}], ":2: expected"),
        (["\udcff\n"], ":1: expected"),  # not UTF-8
        ([], ": it holds no"),
    ],
)
def test_bad_passages_end_in_one_line_that_names_the_place(tmp_path, lines, message):
    file = write(tmp_path / "p.jsonl", lines)
    with pytest.raises(ValueError) as error:
        read_passages(file)
    assert str(error.value).startswith(f"{file}{message}")
    assert "\n" not in str(error.value)


def test_a_passage_of_the_wiki_18_file_is_read_as_it_is(tmp_path):
    line = {"id": 3, "contents": '"Salem "the" town"\nA town.\nOld.'}
    (passage,) = read_passages(write(tmp_path / "wiki.jsonl", [line]))
    assert passage == {"id": "3", "title": 'Salem "the" town', "text": "A town.\nOld."}


def test_a_lone_surrogate_is_replaced():
    """JSON carries it; UTF-8, and so the index, the tokenizer and every file, does not."""
    passage = parse_passage({"id": 1, "title": "\ud800", "text": "é \udfff"})
    assert passage == {"id": "1", "title": "?", "text": "é ?"}


@pytest.mark.parametrize(
    ("before", "change"),
    [
        ({"seed": 0, "out": "a", "right": "em"}, "seed 0, not 1"),
        ({"seed": 1, "right": "em", "of another program": None, "x": [2]}, "x [2], not None"),
        ({"seed": 1}, "right None, not em"),
        ({"seed": "no\n" + "x" * 9999, "right": "em"}, f"seed no {'x' * 197}, not 1"),
    ],
)
def test_a_setting_that_has_changed_is_named_in_one_line(before, change):
    settings = {"seed": 1, "out": "b", "right": "em"}
    with pytest.raises(ValueError) as error:
        refuse_changed_settings("file", before, settings, "remove it", {"out"})
    assert str(error.value) == f"file: begun with {change}; remove it"
    refuse_changed_settings("file", settings | {"out": "c"}, settings, "remove it", {"out"})


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
        {"id": 1, "question": "Who?", "answers": {"text": ["a"], "answer_start": [3]}},  # SQuAD
        {"id": 1, "question": "Who?", "answers": [["a", "b"]]},
        {"question": "Who?", "answer": "a"},
    ],
)
def test_a_question_without_text_or_answer_is_refused(tmp_path, bad):
    with pytest.raises(ValueError, match=r"q\.jsonl:1: "):
        read_questions(write(tmp_path / "q.jsonl", [bad]))
