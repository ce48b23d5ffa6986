"""Reading questions and passages; both BM25; index folders. Dense search and search over HTTP have files of their own."""

import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import records
import retriever
from records import read_passages, read_questions
from retriever import BM25, TantivyBM25, build_bm25, open_retriever

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
        ([PASSAGES[0], {"id": "d", "title": None, "text": ["x"]}], ":2: expected"),
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


def test_a_passage_of_the_wiki_18_file_is_read_as_it_is(tmp_path):
    file = write(tmp_path / "wiki.jsonl", [{"id": 3, "contents": '"Salem "the" town"\nA town.\nOld.'}])
    assert read_passages(file) == [{"id": "3", "title": 'Salem "the" town', "text": "A town.\nOld."}]


def test_a_lone_surrogate_is_replaced():
    """JSON carries it; UTF-8, and so the index, the tokenizer and every file, does not."""
    passage = records.parse_passage({"id": 1, "title": "\ud800", "text": "é \udfff"})
    assert passage == {"id": "1", "title": "?", "text": "é ?"}
    assert TantivyBM25.build([passage]).search(["\ud800 é"], 1)[0][0]["id"] == "1"


def test_an_id_that_occurs_twice_is_found_in_a_stream_and_a_collision_of_hashes_is_not_one(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "hash", lambda text: 7, raising=False)
    assert len(read_passages(write(tmp_path / "p.jsonl", PASSAGES))) == 3
    with pytest.raises(ValueError, match=r"p\.jsonl:4: id 'c' occurs twice"):
        read_passages(write(tmp_path / "p.jsonl", [*PASSAGES, PASSAGES[2]]))


# ---------------------------------------------------------------------------------------------------------------------
# tantivy


def bm25_by_hand(passages, query):
    """Scores of all passages: Okapi with k1 = 1.2, b = 0.75 and idf = ln(1 + (N - n + .5) / (n + .5))."""
    texts = [f"{p['title']} {p['text']}".lower().split() for p in passages]
    average, scores = sum(map(len, texts)) / len(texts), []
    for text in texts:
        counts, score = Counter(text), 0.0
        for word in query.split():
            n = sum(word in other for other in texts)
            idf = math.log(1 + (len(texts) - n + 0.5) / (n + 0.5))
            score += idf * counts[word] * 2.2 / (counts[word] + 1.2 * (0.25 + 0.75 * len(text) / average))
        scores.append(score)
    return scores


WORDS = st.lists(st.sampled_from("red harbor salem film lane town".split()), min_size=1, max_size=6).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=30), WORDS, st.integers(1, 5))
def test_tantivy_ranks_as_the_formula_does_with_ties_in_corpus_order(texts, query, k):
    """Few words and short texts: most scores tie, and which of them tantivy meets first depends on its threads."""
    passages = [{"id": str(i), "title": "x", "text": text} for i, text in enumerate(texts)]
    scores = bm25_by_hand(passages, query)
    expected = sorted((i for i, score in enumerate(scores) if score > 0), key=lambda i: (-round(scores[i], 4), i))[:k]
    (found,) = TantivyBM25.build(passages).search([query], k)
    assert [int(p["id"]) for p in found] == expected
    assert [p["score"] for p in found] == pytest.approx([scores[i] for i in expected], rel=1e-4)


def test_a_query_leaves_its_stop_words_out_unless_it_has_no_others():
    passages = [*PASSAGES, {"id": "d", "title": "The Who", "text": "A band."}]
    index = TantivyBM25.build(passages)
    assert index.search(["who was the singer of the town of salem"], 3) == index.search(["singer town salem"], 3)
    assert [p["id"] for p in index.search(["the who"], 3)[0]] == ["d"]
    assert index.search(["", "?!", "zzz"], 3) == [[], [], []]


def test_what_would_be_syntax_elsewhere_is_text():
    index = TantivyBM25.build(PASSAGES)
    for query in ("title:salem AND (", '"laura', "salem^2 -webb *", "\0", "webb " * 3000, "x" * 100_000):
        assert isinstance(index.search([query], 2)[0], list)


def index_folder(tmp_path, passages=PASSAGES):
    corpus = write(tmp_path / "corpus.jsonl", passages)
    build_bm25(str(corpus), tmp_path / "index")
    return corpus, tmp_path / "index"


def test_an_index_folder_answers_as_the_passages_in_memory_do(tmp_path):
    corpus, folder = index_folder(tmp_path)
    queries = ["laura webb", "a film", "town"]
    assert open_retriever(str(folder)).search(queries, 3) == TantivyBM25.build(PASSAGES).search(queries, 3)
    assert open_retriever(str(folder), corpus=str(corpus)).search(queries, 3)
    corpus.unlink()  # the folder holds its passages
    assert open_retriever(str(folder)).search(queries, 1)


def test_a_finished_index_is_left_alone_and_an_interrupted_one_is_completed(tmp_path):
    corpus, folder = index_folder(tmp_path)
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    build_bm25(str(corpus), folder)
    assert before == {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    (folder / "tantivy").rename(folder / "tantivy.partial")  # as a kill during the build leaves it
    with pytest.raises(ValueError, match="build it again"):
        open_retriever(str(folder))
    build_bm25(str(corpus), folder)
    assert open_retriever(str(folder)).search(["salem"], 1)[0]


def test_another_corpus_is_refused(tmp_path):
    _, folder = index_folder(tmp_path)
    other = write(tmp_path / "other.jsonl", PASSAGES[:2])
    with pytest.raises(ValueError, match="another corpus than"):
        open_retriever(str(folder), corpus=str(other))
    with pytest.raises(ValueError, match="another fingerprint"):
        build_bm25(str(other), folder)
    with pytest.raises(FileNotFoundError, match="--corpus"):
        open_retriever(str(folder), corpus=str(tmp_path / "none.jsonl"))


def test_the_same_length_elsewhere_is_another_corpus_and_a_copy_is_the_same(tmp_path):
    corpus, folder = index_folder(tmp_path)
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(corpus.read_bytes())
    assert open_retriever(str(folder), corpus=str(copy)).search(["salem"], 1)[0]
    copy.write_bytes(corpus.read_bytes().replace(b"singer", b"dancer"))
    with pytest.raises(ValueError, match="another corpus than"):
        open_retriever(str(folder), corpus=str(copy))


def test_a_call_that_failed_leaves_the_folder_free(tmp_path):
    corpus = write(tmp_path / "corpus.jsonl", [PASSAGES[0], "{\n"])
    with pytest.raises(ValueError, match=":2: expected"):
        build_bm25(str(corpus), tmp_path / "index")
    write(corpus, PASSAGES)
    build_bm25(str(corpus), tmp_path / "index")
    assert open_retriever(str(tmp_path / "index")).search(["salem"], 1)[0]


def test_an_index_is_killed_while_it_is_built(tmp_path):
    """The folder that a kill leaves does not open, and the next call makes it whole."""
    corpus = write(tmp_path / "corpus.jsonl", PASSAGES)
    script = (
        f"import os, sys; sys.path.insert(0, {str(Path(retriever.__file__).parent)!r})\n"
        "import retriever, pathlib\n"
        "def die(*words): os.kill(os.getpid(), 9)\n"
        "pathlib.Path.rename_for_real = pathlib.Path.rename\n"
        "pathlib.Path.rename = lambda self, to: die() if self.name == 'tantivy.partial' else self.rename_for_real(to)\n"
        f"retriever.build_bm25({str(corpus)!r}, pathlib.Path({str(tmp_path / 'index')!r}))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == -9
    with pytest.raises(ValueError, match="build it again"):
        open_retriever(str(tmp_path / "index"))
    build_bm25(str(corpus), tmp_path / "index")
    assert open_retriever(str(tmp_path / "index")).search(["salem"], 1)[0]


def test_ties_beyond_what_was_asked_for_are_in_corpus_order_and_cost_little():
    many = [{"id": str(i), "title": f"x{i}", "text": "a moth"} for i in range(30_000)]
    index = TantivyBM25.build(many[:300])
    assert [p["id"] for p in index.search(["moth"], 3)[0]] == ["0", "1", "2"]
    index, begin = TantivyBM25.build(many), time.monotonic()
    assert len(index.search(["moth"] * 10, 3)) == 10 and time.monotonic() - begin < 5


def test_a_file_too_large_for_memory_is_refused_with_the_command_to_run(tmp_path, monkeypatch):
    monkeypatch.setattr(retriever, "LARGE", 10)
    corpus = write(tmp_path / "corpus.jsonl", PASSAGES)
    with pytest.raises(ValueError, match=r"python retriever\.py index --kind bm25"):
        open_retriever(str(corpus))
    assert isinstance(open_retriever(str(corpus), "rank-bm25"), BM25)


@pytest.mark.parametrize("damage", ["index.json", "meta.json", "postings"])
def test_a_damaged_index_is_named(tmp_path, damage):
    _, folder = index_folder(tmp_path)
    for file in [*folder.rglob("*.json"), *folder.rglob("*.idx")]:
        if file.name == damage or (damage == "postings" and file.suffix == ".idx"):
            file.write_bytes(b"")
    with pytest.raises(ValueError, match="build it again") as error:
        open_retriever(str(folder)).search(["salem"], 1)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_that_holds_something_else_is_not_written_to(tmp_path):
    corpus = write(tmp_path / "corpus.jsonl", PASSAGES)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="holds no index"):
        build_bm25(str(corpus), tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


def test_the_backend_of_a_passage_file_goes_by_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(retriever, "SMALL", 3)
    corpus = str(write(tmp_path / "corpus.jsonl", PASSAGES))
    assert isinstance(open_retriever(corpus), BM25)
    assert isinstance(open_retriever(corpus, "tantivy"), TantivyBM25)
    corpus = str(write(tmp_path / "corpus.jsonl", [*PASSAGES, {"id": "d", "title": "D", "text": "d"}]))
    assert isinstance(open_retriever(corpus), TantivyBM25)
    assert isinstance(open_retriever(corpus, "rank-bm25"), BM25)


def command(*words, **environment):
    script = Path(retriever.__file__).resolve()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run([sys.executable, script, *map(str, words)], capture_output=True, text=True, env=environment)


def test_the_command_line(tmp_path):
    corpus = write(tmp_path / "corpus.jsonl", PASSAGES)
    assert command("index", "--kind", "bm25", "--corpus", corpus, "--out", tmp_path / "index").returncode == 0
    result = command("search", "--index", tmp_path / "index", "laura webb", "-k", 1)
    assert (result.returncode, result.stdout) == (0, "Laura Webb: A singer born in Salem.\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["search", "--index", "nothing", "q"], "nothing: neither a passage file"),
        (["search", "--index", "web:altavista", "q"], "web:altavista: the providers are serper, brave"),
        (["search", "--index", "web:serper:fast", "q"], "web:serper:fast: 'fast' is not a number"),
        (["search", "--index", "web:serper", "q"], "web:serper: set SERPER_API_KEY in the environment"),
        (["index", "--kind", "bm25", "--corpus", "nothing.jsonl", "--out", "x"], "nothing.jsonl"),
        (["index", "--kind", "bm25", "--corpus", "broken.jsonl", "--out", "x"], "broken.jsonl:2: expected"),
        (["index", "--kind", "bm25", "--corpus", "empty.jsonl", "--out", "x"], "empty.jsonl: it holds no"),
        (
            ["index", "--kind", "dense", "--encoder", "nothing", "--corpus", "good.jsonl", "--out", "x"],
            "nothing: no encoder there",
        ),
    ],
)
def test_an_error_of_the_user_is_one_line_with_status_2(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    write(Path("good.jsonl"), PASSAGES)
    write(Path("broken.jsonl"), [PASSAGES[0], "{\n"])
    write(Path("empty.jsonl"), [])
    result = command(*words, SERPER_API_KEY="")
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if not line.startswith("reading ")]
    assert len(lines) == 1 and message in lines[0], result.stderr
