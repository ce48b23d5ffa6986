"""Index folders, opening what `--retriever` names, and the command line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import retriever
from retriever import BM25, TantivyBM25, build_bm25, open_retriever, retriever_fingerprint

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


def finds_salem(folder) -> bool:
    (found,) = open_retriever(str(folder)).search(["salem"], 1)
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
    index = folder / "tantivy"
    before = {file: file.stat().st_mtime_ns for file in index.iterdir()}
    build_bm25(str(corpus), folder)
    assert before == {file: file.stat().st_mtime_ns for file in index.iterdir()}


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


def test_a_full_disk_is_named_and_the_next_call_goes_on(tmp_path):
    """As far as a limit on the size of files is one."""
    passages = [{"id": str(i), "title": f"T{i}", "text": f"w{i} " * 9} for i in range(2000)]
    corpus, out = str(write(tmp_path / "c.jsonl", passages)), tmp_path / "index"
    program = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
import retriever
retriever.main(sys.argv[1:])
"""
    words = ["index", "--kind", "bm25", "--corpus", corpus, "--out", str(out)]
    command = [sys.executable, "-c", program, *words]
    result = subprocess.run(
        command, cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert f"{out}/tantivy.partial: cannot be written" in result.stderr
    retriever.main(words)
    assert open_retriever(str(out)).search(["w7"], 1)[0][0]["id"] == "7"


def test_a_folder_of_another_corpus_is_not_written_to(corpus, folder, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_bytes(corpus.read_bytes().replace(b"singer", b"dancer"))  # of the same length
    with pytest.raises(ValueError, match="an index with another corpus is there"):
        build_bm25(str(other), folder)
    assert finds_salem(folder)


def test_a_call_that_failed_leaves_the_folder_free(corpus, tmp_path):
    write(corpus, [PASSAGES[0], "{\n"])
    with pytest.raises(ValueError, match=":2: expected"):
        build_bm25(str(corpus), tmp_path / "index")
    write(corpus, PASSAGES)
    build_bm25(str(corpus), tmp_path / "index")
    assert finds_salem(tmp_path / "index")


def test_a_corpus_within_its_index_folder_survives(corpus, tmp_path):
    """The folder links to the corpus, and must never replace it by a link."""
    out = tmp_path / "index"
    build_bm25(str(corpus), out)
    build_bm25(str(out / "passages.jsonl"), out)  # the link itself
    assert (out / "passages.jsonl").resolve() == Path(corpus).resolve()
    content = Path(corpus).read_bytes()
    (out / "passages.jsonl").unlink()
    Path(corpus).rename(out / "passages.jsonl")
    build_bm25(str(out / "passages.jsonl"), out)
    assert not (out / "passages.jsonl").is_symlink()
    Path(corpus).write_bytes(content)
    with pytest.raises(ValueError, match="a file is where the link"):
        build_bm25(str(corpus), out)
    assert (out / "passages.jsonl").read_bytes() == content


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


def change_one_byte(file: Path) -> None:
    """As an edit does: the size stays, the time does not."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    touch(file)


def touch(file: Path) -> None:
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 10**9))


@pytest.mark.parametrize("changed", ["*.term", "*.store", "meta.json"])
def test_a_changed_index_is_refused_until_it_is_built_again(corpus, folder, changed):
    change_one_byte(next((folder / "tantivy").glob(changed)))
    for use in (open_retriever, retriever_fingerprint):
        with pytest.raises(ValueError, match="tantivy is not whole, or was changed"):
            use(str(folder))
    build_bm25(str(corpus), folder)
    assert finds_salem(folder)


def test_a_copy_without_its_times_is_the_same_index(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    for file in (tmp_path / "copy").rglob("*"):
        touch(file)
        if file.name.startswith(".tantivy"):
            file.unlink()  # locks, which many tools do not copy
    assert finds_salem(tmp_path / "copy")
    assert retriever_fingerprint(str(tmp_path / "copy")) == retriever_fingerprint(str(folder))


# --------------------------------------------------------------------------------------------------
# Fingerprints


def test_a_fingerprint_is_that_of_the_passages_not_of_places_and_times(corpus, folder, tmp_path):
    first = retriever_fingerprint(str(folder))
    assert retriever_fingerprint(str(corpus)) not in (first, None)
    touch(corpus)
    build_bm25(str(corpus), folder)
    moved = corpus.rename(tmp_path / "moved.jsonl")
    build_bm25(str(moved), tmp_path / "second")
    folder.rename(tmp_path / "first")
    for name in ("first", "second"):
        assert retriever_fingerprint(str(tmp_path / name)) == first


@pytest.mark.parametrize("other", [PASSAGES[:2], PASSAGES[::-1]])
def test_other_passages_have_another_fingerprint(folder, corpus, tmp_path, other):
    other = write(tmp_path / "other.jsonl", other)
    build_bm25(str(other), tmp_path / "second")
    sources = (corpus, other, folder, tmp_path / "second")
    assert len({retriever_fingerprint(str(source)) for source in sources}) == 4


def test_the_content_of_an_index_is_read_once_when_it_is_built(folder, monkeypatch):
    monkeypatch.setattr(retriever, "fingerprint", lambda path: pytest.fail(f"{path} is read"))
    assert finds_salem(folder)
    assert retriever_fingerprint(str(folder))


# --------------------------------------------------------------------------------------------------
# Passage files


def test_the_search_engine_of_a_passage_file_goes_by_its_size(corpus, monkeypatch):
    assert isinstance(open_retriever(str(corpus)), BM25)
    monkeypatch.setattr(retriever, "MAX_RANK_BM25_BYTES", corpus.stat().st_size)
    assert isinstance(open_retriever(str(corpus)), BM25)
    write(corpus, [*PASSAGES, {"id": "d", "title": "D", "text": "d"}])
    assert isinstance(open_retriever(str(corpus)), TantivyBM25)


def test_a_file_too_large_for_memory_is_refused_with_the_command_to_run(corpus, monkeypatch):
    monkeypatch.setattr(retriever, "MAX_RANK_BM25_BYTES", 10)
    monkeypatch.setattr(retriever, "MAX_IN_MEMORY_BYTES", 10)
    with pytest.raises(ValueError, match=r"python retriever\.py index --kind bm25"):
        open_retriever(str(corpus))


# --------------------------------------------------------------------------------------------------
# Commands


def test_the_command_line(corpus, tmp_path, capsys):
    folder = str(tmp_path / "index")
    retriever.main(["index", "--kind", "bm25", "--corpus", str(corpus), "--out", folder])
    retriever.main(["search", "--index", folder, "laura webb", "--k", "1"])
    assert capsys.readouterr().out == "Laura Webb: A singer born in Salem.\n"


BM25_INDEX = "index --kind bm25 --out x --corpus "
DENSE_INDEX = "index --kind dense --out x --corpus good.jsonl --encoder "


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("search --index nothing q", "nothing: neither a passage file"),
        ("search --index good.jsonl q --k 0", "--k: at least 1"),
        (BM25_INDEX + "nothing.jsonl", "nothing.jsonl"),
        (BM25_INDEX + "broken.jsonl", "broken.jsonl:2: expected"),
        (BM25_INDEX + "empty.jsonl", "empty.jsonl: it holds no"),
        (DENSE_INDEX + "no/such/folder", "no/such/folder: no encoder there"),
        (DENSE_INDEX + "e --prebuilt i --factory Flat", "the prebuilt index has one"),
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
