"""The demo world; corpora."""

import bz2
import gzip
import json
import re
import subprocess
import sys
import time

import pytest

import data_prep
from records import read_passages
from retriever import BM25
from tools.demo import demo_world


def test_the_world_is_a_function_of_the_seed():
    assert demo_world(1) == demo_world(1)
    assert demo_world(1) != demo_world(2)


def test_sizes_and_ids():
    passages, train, held_out = demo_world(0)
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
    passages, train, held_out = demo_world(0)
    titles = {p["title"] for p in passages}
    find = named(titles)

    def entities(questions):
        return set().union(*(find(q["question"]) for q in questions))

    assert entities(train) and not entities(train) & entities(held_out)
    answers = {a for q in train for a in q["answers"]} & titles
    assert not answers & {a for q in held_out for a in q["answers"]}  # no person or town is an answer in both


def test_every_one_hop_answer_is_in_the_passage_of_its_entity_and_bm25_finds_it():
    passages, train, _ = demo_world(0)
    one_hop = [q for q in train if q["dataset"] == "demo-1hop"][:200]
    found = BM25(passages).search([q["question"] for q in one_hop], k=2)
    hits = [any(q["answers"][0] in p["text"] for p in result) for q, result in zip(one_hop, found, strict=True)]
    assert sum(hits) / len(hits) > 0.95


def test_a_two_hop_answer_needs_both_passages():
    passages, train, _ = demo_world(0)
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


# ---------------------------------------------------------------------------------------------------------------------
# Corpora


def article(name, words):
    """In KILT's shape: the title is the first paragraph."""
    text = [f"{name}\n", "BULLET::::- one\n", "Section::::History.\n", " ".join(f"{name}{i}" for i in range(words)) + "\n"]
    return {"wikipedia_id": name, "wikipedia_title": name.upper(), "text": text}


def lines_of(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def make(source, out, format="kilt", workers=2):
    data_prep.make_corpus(source, out, format, workers)
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_kilt_articles_are_cut_every_100_words_without_the_markers(tmp_path):
    (tmp_path / "kilt.jsonl").write_bytes(lines_of([article("a", 250), article("b", 1), article("c", 96)]))
    passages = make(tmp_path / "kilt.jsonl", tmp_path / "out.jsonl")
    assert [p["id"] for p in passages] == ["a-0", "a-1", "a-2", "b-0", "c-0"]
    assert [len(p["text"].split()) for p in passages] == [100, 100, 54, 5, 100]
    assert passages[0]["text"].startswith("a - one History. a0 a1 ") and passages[0]["title"] == "A"
    assert passages[1]["text"].split()[0] == "a96"  # 4 words came before a0
    assert read_passages(tmp_path / "out.jsonl") == passages


def test_compressed_files_and_folders_of_files_give_the_same(tmp_path):
    records = [article(name, 120) for name in "abcdef"]
    (tmp_path / "plain.jsonl").write_bytes(lines_of(records))
    with gzip.open(tmp_path / "packed.jsonl.gz", "wb") as file:
        file.write(lines_of(records))
    (tmp_path / "folder" / "AA").mkdir(parents=True)
    for n, part in enumerate((records[:4], records[4:])):
        (tmp_path / "folder" / "AA" / f"wiki_0{n}.bz2").write_bytes(bz2.compress(lines_of(part)))
    expected = make(tmp_path / "plain.jsonl", tmp_path / "1")
    assert make(tmp_path / "packed.jsonl.gz", tmp_path / "2") == make(tmp_path / "folder", tmp_path / "3") == expected


@pytest.mark.parametrize(
    ("format", "line", "passages"),
    [
        ("wiki-18", b'{"id": "7", "contents": "\\"A \\"b\\"\\"\\nSome text."}', [("7", 'A "b"', "Some text.")]),
        ("wiki-18", b'{"id": "7", "title": "A", "text": "t"}', [("7", "A", "t")]),
        ("dpr", b'1\t"He said ""no"" here."\tA title', [("1", "A title", 'He said "no" here.')]),
        ("dpr", b"id\ttext\ttitle", []),
        ("hotpotqa", b'{"id": "12", "title": "A", "text": ["One.", " Two\\n"]}', [("12", "A", "One. Two")]),
        ("hotpotqa", b'{"id": "12", "title": "A", "text": []}', []),
        ("kilt", b'{"wikipedia_title": "A", "text": ["x \\ud800"]}', [("1-0", "A", "x ?")]),
    ],
)
def test_a_line_of_each_format(tmp_path, format, line, passages):
    text, count = data_prep.convert(format, tmp_path, 1, [line + b"\n"])
    assert [tuple(json.loads(each).values()) for each in text.splitlines()] == passages and count == len(passages)


@pytest.mark.parametrize("format", data_prep.FORMATS)
@pytest.mark.parametrize("line", [b"{", b"[1]", b"{}", b"\xff\xfe", b"a\tb"])
def test_a_line_that_is_not_in_the_format_is_named(tmp_path, format, line):
    good = {
        "kilt": lines_of([article("a", 3)]),
        "dpr": b"1\tx\ty\n",
        "wiki-18": b'{"id": 1, "title": "t", "text": "x"}\n',
        "hotpotqa": b'{"id": 1, "title": "t", "text": ["x"]}\n',
    }[format]
    (tmp_path / "source").write_bytes(good + line + b"\n")
    with pytest.raises(ValueError) as error:
        make(tmp_path / "source", tmp_path / "out", format)
    assert str(error.value).startswith(f"{tmp_path / 'source'}:2: not a line of the format {format}")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_what_is_there_is_not_overwritten_and_nothing_is_not_a_corpus(tmp_path):
    (tmp_path / "kilt.jsonl").write_bytes(lines_of([article("a", 3)]))
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="there already"):
        make(tmp_path / "kilt.jsonl", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"
    (tmp_path / "empty").write_bytes(b"\n\n")
    with pytest.raises(ValueError, match="holds no line"):
        make(tmp_path / "empty", tmp_path / "out2")


def test_the_output_is_not_read_as_source_and_two_calls_do_not_write_one_file(tmp_path):
    import fcntl

    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.jsonl").write_bytes(lines_of([article("a", 3)]))
    with pytest.raises(ValueError, match="within the source"):
        make(tmp_path / "source", tmp_path / "source" / "out")
    with open(tmp_path / "out.partial", "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another call"):
            make(tmp_path / "source", tmp_path / "out")


def test_half_a_compressed_file_is_named(tmp_path):
    packed = gzip.compress(lines_of(article(f"a{n}", 200) for n in range(50)))
    (tmp_path / "half.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ValueError, match=r"half\.jsonl\.gz: damaged"):
        make(tmp_path / "half.jsonl.gz", tmp_path / "out")


def kilt_command(source, out):
    return [sys.executable, data_prep.__file__, "kilt", "--source", str(source), "--out", str(out), "--workers", "2"]


def test_a_killed_conversion_goes_on_to_the_same_bytes(tmp_path):
    with open(tmp_path / "kilt.jsonl", "wb") as file:
        for n in range(40):
            file.write(lines_of(article(f"{n}-{i}", 1000) for i in range(400)))  # 190 MB
    subprocess.run(kilt_command(tmp_path / "kilt.jsonl", tmp_path / "whole"), check=True, capture_output=True)
    process = subprocess.Popen(kilt_command(tmp_path / "kilt.jsonl", tmp_path / "out"), stderr=subprocess.DEVNULL)
    while not (tmp_path / "out.progress").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    done = json.loads((tmp_path / "out.progress").read_text())
    assert 0 < done["bytes"] < (tmp_path / "whole").stat().st_size and not (tmp_path / "out").exists()
    other = tmp_path / "other.jsonl"
    other.write_bytes(lines_of([article("a", 3)]))
    result = subprocess.run(kilt_command(other, tmp_path / "out"), capture_output=True, text=True)
    assert result.returncode == 2 and "begun from" in result.stderr  # the beginning of one is not continued with another
    subprocess.run(kilt_command(tmp_path / "kilt.jsonl", tmp_path / "out"), check=True, capture_output=True)
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kilt.jsonl", "other.jsonl", "out", "whole"]


def test_the_workers_of_a_killed_conversion_end(tmp_path):
    with open(tmp_path / "kilt.jsonl", "wb") as file:
        for n in range(10):
            file.write(lines_of(article(f"{n}-{i}", 1000) for i in range(400)))
    process = subprocess.Popen(kilt_command(tmp_path / "kilt.jsonl", tmp_path / "out"), stderr=subprocess.DEVNULL)
    find = lambda: subprocess.run(["pgrep", "-f", str(tmp_path / "kilt.jsonl")], capture_output=True).stdout.split()  # noqa: E731
    while len(find()) < 3:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    for _ in range(100):
        if not find():
            return
        time.sleep(0.1)
    raise AssertionError("workers outlive the conversion")
