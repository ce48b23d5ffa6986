"""Index folders, opening what `--retriever` names, and the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import retriever
from retriever import BM25, TantivyBM25, build_bm25, open_retriever

PASSAGES = [
    {"id": "a", "title": "Red Harbor", "text": "A film directed by Peter Lane."},
    {"id": "b", "title": "Laura Webb", "text": "A singer born in Salem."},
    {"id": "c", "title": "Salem", "text": "A town."},
]


def write(path, lines):
    """Write a JSONL file of values, and of lines that are texts."""
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    path.write_bytes(text.encode(errors="surrogateescape"))
    return path


@pytest.fixture
def corpus(tmp_path):
    return write(tmp_path / "corpus.jsonl", PASSAGES)


@pytest.fixture
def folder(corpus, tmp_path):
    """A finished BM25 index of the corpus."""
    build_bm25(str(corpus), tmp_path / "index")
    return tmp_path / "index"


def finds_salem(folder, corpus=None) -> bool:
    (found,) = open_retriever(str(folder), corpus=corpus and str(corpus)).search(["salem"], 1)
    return [p["id"] for p in found] == ["c"]


# --------------------------------------------------------------------------------------------------
# Index folders


def test_an_index_folder_answers_as_the_passages_in_memory_do(corpus, folder):
    queries = ["laura webb", "a film", "town"]
    expected = TantivyBM25.build(PASSAGES).search(queries, 3)
    assert open_retriever(str(folder)).search(queries, 3) == expected
    corpus.unlink()  # the folder holds its passages
    assert open_retriever(str(folder)).search(queries, 3) == expected


def test_a_finished_index_is_left_alone(corpus, folder):
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    build_bm25(str(corpus), folder)
    assert before == {file: file.stat().st_mtime_ns for file in folder.rglob("*")}


def test_a_build_that_is_killed_leaves_a_folder_that_the_next_call_completes(corpus, tmp_path):
    script = f"""
import os, pathlib, sys
sys.path.insert(0, {str(Path(retriever.__file__).parent)!r})
import retriever
retriever.fsync_and_rename = lambda *paths: os.kill(os.getpid(), 9)
retriever.build_bm25({str(corpus)!r}, pathlib.Path({str(tmp_path / "index")!r}))
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert killed.returncode == -9
    with pytest.raises(ValueError, match="build it again"):
        open_retriever(str(tmp_path / "index"))
    build_bm25(str(corpus), tmp_path / "index")
    assert finds_salem(tmp_path / "index")


def test_another_corpus_is_refused_and_a_copy_is_not(corpus, folder, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_bytes(corpus.read_bytes())
    assert finds_salem(folder, other)
    other.write_bytes(corpus.read_bytes().replace(b"singer", b"dancer"))  # of the same length
    with pytest.raises(ValueError, match="another corpus than"):
        open_retriever(str(folder), corpus=str(other))
    with pytest.raises(ValueError, match="an index with another fingerprint is there"):
        build_bm25(str(other), folder)
    with pytest.raises(FileNotFoundError, match="--corpus"):
        open_retriever(str(folder), corpus=str(tmp_path / "none.jsonl"))
    assert finds_salem(folder)


def test_a_call_that_failed_leaves_the_folder_free(corpus, tmp_path):
    write(corpus, [PASSAGES[0], "{\n"])
    with pytest.raises(ValueError, match=":2: expected"):
        build_bm25(str(corpus), tmp_path / "index")
    write(corpus, PASSAGES)
    build_bm25(str(corpus), tmp_path / "index")
    assert finds_salem(tmp_path / "index")


def test_a_folder_that_holds_something_else_is_not_written_to(corpus, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="holds no index"):
        build_bm25(str(corpus), tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


@pytest.mark.parametrize("damaged", ["index.json", "meta.json", "*.idx"])
def test_a_damaged_index_is_named(folder, damaged):
    files = list(folder.rglob(damaged))
    assert files
    for file in files:
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="build it again") as error:
        open_retriever(str(folder)).search(["salem"], 1)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------
# Passage files


def test_the_backend_of_a_passage_file_goes_by_its_size(corpus, monkeypatch):
    monkeypatch.setattr(retriever, "MAX_RANK_BM25_PASSAGES", 3)
    assert isinstance(open_retriever(str(corpus)), BM25)
    assert isinstance(open_retriever(str(corpus), "tantivy"), TantivyBM25)
    write(corpus, [*PASSAGES, {"id": "d", "title": "D", "text": "d"}])
    assert isinstance(open_retriever(str(corpus)), TantivyBM25)
    assert isinstance(open_retriever(str(corpus), "rank-bm25"), BM25)


def test_a_file_too_large_for_memory_is_refused_with_the_command_to_run(corpus, monkeypatch):
    monkeypatch.setattr(retriever, "MAX_IN_MEMORY_BYTES", 10)
    with pytest.raises(ValueError, match=r"python retriever\.py index --kind bm25"):
        open_retriever(str(corpus), "tantivy")
    assert isinstance(open_retriever(str(corpus), "rank-bm25"), BM25)


# --------------------------------------------------------------------------------------------------
# Commands


def test_the_command_line(corpus, tmp_path, capsys):
    folder = str(tmp_path / "index")
    retriever.main(["index", "--kind", "bm25", "--corpus", str(corpus), "--out", folder])
    retriever.main(["search", "--index", folder, "laura webb", "-k", "1"])
    assert capsys.readouterr().out == "Laura Webb: A singer born in Salem.\n"


BM25_INDEX = "index --kind bm25 --out x --corpus "
DENSE_INDEX = "index --kind dense --out x --corpus good.jsonl"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("search --index nothing q", "nothing: neither a passage file"),
        ("search --index good.jsonl q -k 0", "-k: at least 1"),
        (BM25_INDEX + "nothing.jsonl", "nothing.jsonl"),
        (BM25_INDEX + "broken.jsonl", "broken.jsonl:2: expected"),
        (BM25_INDEX + "empty.jsonl", "empty.jsonl: it holds no"),
        (BM25_INDEX + "good.jsonl --factory Flat", "are for --kind dense"),
        (DENSE_INDEX, "--kind dense needs --encoder"),
        (DENSE_INDEX + " --encoder no/such/folder", "no/such/folder: no encoder there"),
        (DENSE_INDEX + " --encoder e --prebuilt i --factory Flat", "the prebuilt index has one"),
    ],
)
def test_an_error_of_the_user_is_one_line_with_status_2(
    tmp_path, monkeypatch, capsys, command, message
):
    monkeypatch.chdir(tmp_path)
    write(Path("good.jsonl"), PASSAGES)
    write(Path("broken.jsonl"), [PASSAGES[0], "{\n"])
    write(Path("empty.jsonl"), [])
    with pytest.raises(SystemExit) as ending:
        retriever.main(command.split())
    (line,) = capsys.readouterr().err.splitlines()
    assert ending.value.code == 2
    assert line.startswith("retriever.py: ") and message in line
