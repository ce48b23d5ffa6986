"""Corpora and training sets from files in the published shapes."""

import bz2
import gzip
import json
import re
import subprocess
import sys
import time
import zipfile

import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

import data_prep
from records import read_passages, read_questions
from reward import normalize


def jsonl(records):
    return "".join(json.dumps(record) + "\n" for record in records)


def call(*words):
    data_prep.main([str(word) for word in words])


def refused(capsys, *words):
    """The one line in which the command ends."""
    with pytest.raises(SystemExit) as stop:
        call(*words)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("data_prep.py: ")
    return error


# --------------------------------------------------------------------------------------------------
# Corpora


def article(name, words):
    """An article in KILT's shape: its first paragraph is the title."""
    paragraphs = [f"{name}\n", "BULLET::::- one\n", "Section::::History.\n"]
    paragraphs.append(" ".join(f"{name}{i}" for i in range(words)) + "\n")
    return {"wikipedia_id": name, "wikipedia_title": name.upper(), "text": paragraphs}


def test_kilt_articles_are_cut_every_100_words_without_the_markers(tmp_path):
    articles = [article("a", 250), article("b", 1), article("c", 96)]
    (tmp_path / "kilt.jsonl").write_text(jsonl(articles))
    call("kilt", "--source", tmp_path / "kilt.jsonl", "--out", tmp_path / "new" / "out.jsonl")
    passages = read_passages(tmp_path / "new" / "out.jsonl")
    assert [p["id"] for p in passages] == ["a-0", "a-1", "a-2", "b-0", "c-0"]
    assert [len(p["text"].split()) for p in passages] == [100, 100, 54, 5, 100]
    assert passages[0]["text"].startswith("a - one History. a0 a1 ")
    assert passages[0]["title"] == "A"
    assert passages[1]["text"].split()[0] == "a96"  # 4 words came before a0


def test_compressed_files_and_folders_of_files_give_the_same(tmp_path):
    records = [article(f"{name}{i}", 250) for name in "abcdef" for i in range(4)]
    (tmp_path / "plain").write_text(jsonl(records))
    (tmp_path / "packed.gz").write_bytes(gzip.compress(jsonl(records).encode()))
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as archive:
        archive.writestr("wiki/a.jsonl", jsonl(records[:5]))
        archive.writestr("__MACOSX/wiki/a.jsonl", b"\x00")
        archive.writestr("wiki/b.jsonl", jsonl(records[5:]))
    (tmp_path / "folder" / "AA").mkdir(parents=True)
    for name, part in (("0.bz2", records[:9]), ("1.bz2", records[9:])):
        file = tmp_path / "folder" / "AA" / name
        file.write_bytes(bz2.compress(jsonl(part).encode()))
    outputs = []
    for source in ("plain", "packed.gz", "packed.zip", "folder"):
        out = tmp_path / f"{source}.out"
        call("kilt", "--source", tmp_path / source, "--out", out)
        outputs.append(out.read_bytes())
    assert len(set(outputs)) == 1 and outputs[0].count(b"\n") == 3 * 24


@pytest.mark.parametrize(
    ("format", "line", "passages"),
    [
        (
            "wiki-18",
            '{"id": "7", "contents": "\\"A \\"b\\"\\"\\nSome."}',
            [("7", 'A "b"', "Some.")],
        ),
        ("wiki-18", '{"id": "7", "title": "A", "text": "t"}', [("7", "A", "t")]),
        ("hotpotqa", '{"id": 12, "title": "A", "text": ["1.", " 2\\n"]}', [("12", "A", "1. 2")]),
        ("hotpotqa", '{"id": 12, "title": "A", "text": []}', []),
        (
            "kilt",
            '{"wikipedia_id": 1, "wikipedia_title": "A", "text": ["x \\ud800"]}',
            [("1-0", "A", "x ?")],
        ),
    ],
)
def test_a_line_of_each_format(tmp_path, format, line, passages):
    (tmp_path / "source").write_text(line)
    converted = data_prep.convert([tmp_path / "source"], format)
    assert [tuple(passage.values()) for passage in converted] == passages


GOOD_LINES = {
    "kilt": jsonl([article("a", 3)]),
    "wiki-18": '{"id": 1, "title": "t", "text": "x"}\n',
    "hotpotqa": '{"id": 1, "title": "t", "text": ["x"]}\n',
}


@pytest.mark.parametrize("format", data_prep.FORMATS)
@pytest.mark.parametrize("line", [b"{", b"[1]", b"{}", b"\xff\xfe", b"a\tb"])
def test_a_line_that_is_not_in_the_format_is_named(tmp_path, capsys, format, line):
    source, out = tmp_path / "source", tmp_path / "out"
    source.write_bytes(GOOD_LINES[format].encode() + line + b"\n")
    error = refused(capsys, "corpus", "--format", format, "--source", source, "--out", out)
    assert f"{source}:2: not a line of the format {format}" in error and not out.exists()


def test_what_cannot_be_converted_is_refused(tmp_path, capsys):
    source, out = tmp_path / "source.gz", tmp_path / "out"
    packed = gzip.compress(jsonl(article(f"a{n}", 200) for n in range(50)).encode())
    words = ("kilt", "--source", source, "--out", out)
    source.write_bytes(packed[: len(packed) // 2])
    assert re.search(r"source.gz: damaged after line \d\d ", refused(capsys, *words))
    source.write_bytes(jsonl([article("a", 3)]).encode())
    assert "source.gz: damaged after line 0" in refused(capsys, *words)
    archive = source.rename(tmp_path / "source.zip")
    zipped = refused(capsys, "kilt", "--source", archive, "--out", out)
    assert "source.zip: damaged after line 0" in zipped
    with zipfile.ZipFile(archive, "w") as packed_file:
        packed_file.writestr("a.jsonl", "{}")
    encrypted = bytearray(archive.read_bytes())
    for entry, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        encrypted[encrypted.index(entry) + flags] |= 1
    archive.write_bytes(encrypted)
    zipped = refused(capsys, "kilt", "--source", archive, "--out", out)
    assert "source.zip: damaged after line 0" in zipped and "encrypted" in zipped
    archive.unlink()
    source.write_bytes(gzip.compress(b"\n\n"))
    assert "holds no line" in refused(capsys, *words)
    source.write_bytes(packed)
    assert "within the source" in refused(capsys, "kilt", "--source", tmp_path, "--out", out)
    with FileLock(tmp_path / "out.partial"):  # as a second call has it
        assert "out.partial" in refused(capsys, *words)
    assert not out.exists()
    out.write_text("mine")
    assert "there already" in refused(capsys, *words)
    assert out.read_text() == "mine"


def test_a_killed_conversion_begins_anew(tmp_path):
    source = tmp_path / "kilt.jsonl"
    with open(source, "w") as file:
        for n in range(10):
            file.write(jsonl(article(f"{n}-{i}", 1000) for i in range(400)))
    words = [sys.executable, data_prep.__file__, "kilt", "--source", source]
    process = subprocess.Popen([*words, "--out", tmp_path / "out"], stderr=subprocess.DEVNULL)
    partial = tmp_path / "out.partial"
    while not partial.exists() or partial.stat().st_size == 0:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert partial.exists() and not (tmp_path / "out").exists()
    for name in ("out", "whole"):
        subprocess.run([*words, "--out", tmp_path / name], check=True, capture_output=True)
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kilt.jsonl", "out", "whole"]


# --------------------------------------------------------------------------------------------------
# Published data sets: made-up questions in the shapes of the published files

HOTPOTQA = {
    "_id": "5a7a",
    "question": " Which is older, A or B? ",
    "answer": "A",
    "level": "hard",
    "supporting_facts": [["A", 0], ["B", 1]],
    "context": [["A", ["A was made.", " Early."]], ["B", ["B too."]]],
}
WIKI2 = HOTPOTQA | {"_id": "8813f", "evidences": [["A", "date", "1901"]], "answer_id": "Q1"}
MUSIQUE = {
    "id": "2hop__1",
    "question": "Who?",
    "answer": "Ann D.",
    "answer_aliases": ["Ann", "Ann D.", " A. D. "],
    "answerable": True,
    "paragraphs": [{"idx": 0, "title": "C", "paragraph_text": "C was made."}],
}
RELEASED = {"idx": 37, "question": "Which E?", "answer": True, "pred_anses": ["", "E"]}
WHICH = "Which is older, A or B?"


HUB = {"id": 5, "question": "Q", "answer": "no"}
CSV = '\ufeffQuestion,Answer\n"Who,\nif?",NA\nWho?,007\n'


@pytest.mark.parametrize(
    ("format", "name", "text", "expected"),
    [
        ("hotpotqa", "h.json", json.dumps([HOTPOTQA]), [("5a7a", WHICH, ["A"])]),
        ("hotpotqa", "h.jsonl", jsonl([HUB]), [("5", "Q", ["no"])]),
        ("2wiki", "w.json", json.dumps([WIKI2], indent=1), [("8813f", WHICH, ["A"])]),
        ("musique", "m.jsonl", jsonl([MUSIQUE]), [("2hop__1", "Who?", ["Ann D."])]),
        ("bamboogle", "b.csv", CSV, [("bamboogle-1", "Who,\nif?", ["NA"]),
                                     ("bamboogle-2", "Who?", ["007"])]),
        ("bamboogle", "b.json", '[{"Question": "Q", "Answer": 7}]', [("bamboogle-1", "Q", ["7"])]),
        ("r1-searcher", "r1-searcher.jsonl", jsonl([RELEASED]), [("37", "Which E?", ["yes"])]),
        ("hotpotqa", "l.jsonl", jsonl([HUB | {"answer": ["A", "B"]}]), [("5", "Q", ["A", "B"])]),
        ("hotpotqa", "g.jsonl", jsonl([HUB | {"golden_answers": "A B"}]), [("5", "Q", ["A B"])]),
    ],
)  # fmt: skip
def test_records_of_each_published_format(tmp_path, format, name, text, expected):
    source, out = tmp_path / name, tmp_path / "out"
    source.write_text(text, encoding="utf-8")
    call("questions", "--format", format, "--source", source, "--out", out)
    questions = read_questions(out)
    assert [(q["id"], q["question"], q["answers"]) for q in questions] == expected
    assert {q["dataset"] for q in questions} == {format}


def test_flashrags_files_are_named_by_their_folder(tmp_path):
    """As they lie in the hub: nq/test.jsonl, every answer of `golden_answers` counts."""
    record = {"id": "test_0", "question": "who?", "golden_answers": ["A", "B"], "metadata": {}}
    (tmp_path / "nq").mkdir()
    (tmp_path / "nq/test.jsonl").write_text(jsonl([record]))
    source = tmp_path / "nq/test.jsonl"
    call("questions", "--format", "flashrag", "--source", source, "--out", tmp_path / "q")
    expected = {"id": "test_0", "question": "who?", "answers": ["A", "B"], "dataset": "nq"}
    assert read_questions(tmp_path / "q") == [expected]


def test_search_r1s_training_set_of_two_data_sets(tmp_path):
    """Parquet; ids are unique in a data set alone, and a question may stand in the prompt alone."""
    import pyarrow
    import pyarrow.parquet

    records = []
    for dataset, answers in [("nq", ["A"]), ("hotpotqa", ["B", "C"])]:
        prompt = [{"role": "user", "content": f"Answer it. Question: who is in {dataset}?\n"}]
        truth = {"ground_truth": {"target": answers}, "style": "rule"}
        info = {"index": 0, "split": "train"}
        record = {"data_source": dataset, "prompt": prompt, "reward_model": truth, "question": None}
        records.append(record | {"extra_info": info})
    asked = {
        "question": 'Who hosts "Question: Time"?',
        "extra_info": {"index": 1, "split": "train"},
    }
    records.append(records[-1] | asked)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "train.parquet")
    source = tmp_path / "train.parquet"
    call("questions", "--format", "search-r1", "--source", source, "--out", tmp_path / "q")
    assert [tuple(question.values()) for question in read_questions(tmp_path / "q")] == [
        ("nq-0", "who is in nq?", ["A"], "nq"),
        ("hotpotqa-0", "who is in hotpotqa?", ["B", "C"], "hotpotqa"),
        ("hotpotqa-1", 'Who hosts "Question: Time"?', ["B", "C"], "hotpotqa"),
    ]


def test_musiques_aliases_count_as_answers_only_when_asked_for(tmp_path):
    """The paper's test set has one answer a question: "USA" for "United States" scores 0."""
    (tmp_path / "m").write_text(jsonl([MUSIQUE]))
    words = ("questions", "--format", "musique", "--source", tmp_path / "m")
    call(*words, "--out", tmp_path / "one")
    call(*words, "--aliases", "--out", tmp_path / "all")
    assert [q["answers"] for q in read_questions(tmp_path / "one")] == [["Ann D."]]
    assert [q["answers"] for q in read_questions(tmp_path / "all")] == [["Ann D.", "Ann", "A. D."]]


def test_a_parquet_file_of_the_hubs_shape(tmp_path):
    import pyarrow
    import pyarrow.parquet

    context = {"title": ["A", "B"], "sentences": [["A was made.", " Early."], ["B too."]]}
    rows = [{"id": f"{n}", "question": WHICH, "answer": "A", "context": context} for n in range(9)]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "raw", row_group_size=2)
    call("questions", "--format", "hotpotqa", "--source", tmp_path / "raw", "--out", tmp_path / "q")
    assert [q["id"] for q in read_questions(tmp_path / "q")] == [row["id"] for row in rows]


def test_unanswerable_questions_are_left_out_and_counted(tmp_path, capsys):
    records = [MUSIQUE, MUSIQUE | {"answerable": False}, MUSIQUE | {"id": "3"}]
    (tmp_path / "m").write_text(jsonl(records))
    call("questions", "--format", "musique", "--source", tmp_path / "m", "--out", tmp_path / "q")
    assert [q["id"] for q in read_questions(tmp_path / "q")] == ["2hop__1", "3"]
    assert "2 of 2 questions; 1 that cannot be answered left out" in capsys.readouterr().out


WITHOUT_ANSWER = {"id": 1, "question": "Q"}  # as in a hidden test set
UNANSWERABLE = MUSIQUE | {"answerable": False}


@pytest.mark.parametrize(
    ("format", "text", "where"),
    [
        ("hotpotqa", jsonl([HOTPOTQA, HOTPOTQA]), "record 2: .*5a7a.*twice"),
        ("hotpotqa", jsonl([HUB, HOTPOTQA | {"answer": " "}]), "record 2: .*without text"),
        ("hotpotqa", json.dumps([WITHOUT_ANSWER]), "record 1: .*'answer'"),
        ("hotpotqa", json.dumps([HOTPOTQA])[:-9], "record 1: .*JSONDecodeError"),
        ("2wiki", json.dumps([WIKI2, "text"]), "record 2: "),
        ("2wiki", json.dumps([WIKI2 | {"answer": None}]), "record 1: .*without text or answer"),
        ("musique", jsonl([MUSIQUE, UNANSWERABLE]) + "{\n", "record 3: .*JSONDecodeError"),
        ("musique", jsonl([MUSIQUE, [MUSIQUE]]), "record 2: "),
        ("musique", jsonl([MUSIQUE | {"question": 7}]), "record 1: "),
        ("bamboogle", jsonl([HOTPOTQA, RELEASED | {"question": ""}]), "record 2: .*without text"),
        ("musique", "PAR1\x00\x15", "record 1: .*damaged"),
        ("hotpotqa", "[]", "holds no question"),
        ("r1-searcher", jsonl([RELEASED, {}]), ":2: expected"),
    ],
)  # fmt: skip
def test_bad_records_are_named_in_one_line_and_nothing_is_written(
    tmp_path, capsys, format, text, where
):
    source, out = tmp_path / "raw", tmp_path / "q"
    source.write_text(text)
    error = refused(capsys, "questions", "--format", format, "--source", source, "--out", out)
    assert str(source) in error and re.search(where, error) and not out.exists()


def test_a_file_of_the_hub_is_asked_for_as_the_library_wants_it(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def hf_hub_download(repo_id, filename, *, repo_type, revision):
        asked.append((repo_id, filename, repo_type, revision))
        return str(tmp_path / "cached")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    (tmp_path / "cached").write_text(json.dumps([HOTPOTQA]))
    for n, source in enumerate(("hf://datasets/o/n/a/d.json", "hf://datasets/o/n@v1/d.json")):
        call("questions", "--format", "hotpotqa", "--source", source, "--out", tmp_path / f"{n}")
    assert asked == [("o/n", "a/d.json", "dataset", None), ("o/n", "d.json", "dataset", "v1")]
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes() != b""
    (tmp_path / "cached").write_text(GOOD_LINES["kilt"])
    call("kilt", "--source", "hf://datasets/o/n/kilt.json", "--out", tmp_path / "passages")
    assert len(read_passages(tmp_path / "passages")) == 1


@pytest.mark.parametrize(
    "source", ["hf://datasets/o/n/d.json", "hf://datasets/o/n", "hf://", "ftp://o/n"]
)
def test_what_the_hub_does_not_give_ends_in_one_line(tmp_path, capsys, source):
    words = ("--format", "hotpotqa", "--source", source, "--out", tmp_path / "q")
    assert source in refused(capsys, "questions", *words)


@given(sample=st.integers(0, 40), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_a_sample_is_a_function_of_the_seed_without_replacement_and_in_order(
    tmp_path_factory, sample, seed
):
    folder = tmp_path_factory.mktemp("sample")
    (folder / "h.json").write_text(json.dumps([HOTPOTQA | {"_id": f"{n:02}"} for n in range(40)]))
    words = ("questions", "--format", "hotpotqa", "--source", folder / "h.json", "--sample", sample)
    for out, its_seed in (("1", seed), ("2", seed), ("3", seed + 1)):
        call(*words, "--seed", its_seed, "--out", folder / out)
    ids = [question["id"] for question in read_questions(folder / "1")]
    assert ids == sorted(set(ids)) and len(ids) == (sample or 40)
    assert (folder / "1").read_bytes() == (folder / "2").read_bytes()
    if 5 < sample < 35:
        assert (folder / "1").read_bytes() != (folder / "3").read_bytes()


@pytest.mark.parametrize("sample", [2, -1])
def test_too_large_a_sample_is_refused(tmp_path, capsys, sample):
    (tmp_path / "h.json").write_text(json.dumps([HOTPOTQA]))
    words = ("--source", tmp_path / "h.json", "--sample", sample, "--out", tmp_path / "q")
    assert "has 1 questions" in refused(capsys, "questions", "--format", "hotpotqa", *words)


# --------------------------------------------------------------------------------------------------
# The mix


def counted(dataset, name, rollouts, solved=True):
    """A question as `difficulty` writes it."""
    question = {"id": f"{dataset}-{name}", "question": f"Who is {dataset} {name}?"}
    question |= {"answers": ["a"], "dataset": dataset}
    return question | {"rollouts": rollouts, "solved": solved}


@pytest.fixture
def mix(tmp_path):
    """Of each of two data sets 10 easy questions, 20 medium, 8 hard and 2 given up too early."""
    for dataset in ("hotpotqa", "2wiki"):
        records = [counted(dataset, n, 1 + n % 9) for n in range(10)]
        records += [counted(dataset, n, 10 + n % 11) for n in range(10, 30)]
        records += [counted(dataset, n, 20, False) for n in range(30, 38)]
        records += [counted(dataset, n, 5, False) for n in (38, 39)]
        (tmp_path / f"{dataset}.jsonl").write_text(jsonl(records))
    return ["mix", "--questions", tmp_path / "hotpotqa.jsonl", tmp_path / "2wiki.jsonl"]


def drawn(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_mix_holds_exactly_the_asked_counts(mix, tmp_path):
    draws = ("hotpotqa:medium:7", "2wiki:easy:10", "hotpotqa:medium:3", "2wiki:hard:8")
    for out, seed in (("1", 0), ("2", 0), ("3", 1)):
        call(*mix, "--draw", *draws, "--seed", seed, "--out", tmp_path / out)
    pools = [(q["dataset"], q["difficulty"]) for q in drawn(tmp_path / "1")]
    expected = [("hotpotqa", "medium"), ("2wiki", "easy")] * 10 + [("2wiki", "hard")] * 8
    assert sorted(pools) == sorted(expected)
    assert pools != sorted(pools)  # not one data set after the other
    assert len(read_questions(tmp_path / "1")) == 28  # trainable: no id twice
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert (tmp_path / "1").read_bytes() != (tmp_path / "3").read_bytes()


def test_all_that_is_missing_is_named_and_nothing_is_written(mix, tmp_path, capsys):
    error = refused(capsys, *mix, "--stage", 2, "--out", tmp_path / "out")
    for missing in ("hotpotqa medium 20 of 2561", "hotpotqa hard 8 of 2000",
                    "2wiki medium 20 of 1087", "2wiki hard 8 of 2500"):  # fmt: skip
        assert missing in error
    draws = ("hotpotqa:easy:10", "musique:hard:1")  # the first could be drawn
    error = refused(capsys, *mix, "--draw", *draws, "--out", tmp_path / "out")
    assert "musique hard 0 of 1" in error and "hotpotqa" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("stage", "total"), [(1, 350), (2, 8148)])
def test_the_papers_stages_add_up(tmp_path, stage, total):
    for dataset in ("hotpotqa", "2wiki"):
        medium = [counted(dataset, f"m{n}", 20) for n in range(2600)]
        hard = [counted(dataset, f"h{n}", 20, False) for n in range(2600)]
        (tmp_path / dataset).write_text(jsonl(medium + hard))
    files = (tmp_path / "hotpotqa", tmp_path / "2wiki")
    call("mix", "--stage", stage, "--questions", *files, "--out", tmp_path / "out")
    records = drawn(tmp_path / "out")
    assert len(records) == total
    assert {q["difficulty"] for q in records} == ({"medium"} if stage == 1 else {"medium", "hard"})


def test_no_question_is_drawn_twice_or_from_a_test_set_however_it_is_written(mix, tmp_path, capsys):
    test_set = [{"idx": 0, "question": "WHO is the `hotpotqa`  12", "answer": "a"}]
    (tmp_path / "test.jsonl").write_text(jsonl(test_set))
    again = counted("hotpotqa", 13, 10) | {"id": "another", "question": "who is (hotpotqa) 13"}
    (tmp_path / "more.jsonl").write_text(jsonl([again]))
    words = [*mix, tmp_path / "more.jsonl", "--exclude", tmp_path / "test.jsonl"]
    error = refused(capsys, *words, "--draw", "hotpotqa:medium:20", "--out", tmp_path / "out")
    assert "hotpotqa medium 19 of 20" in error
    call(*words, "--draw", "hotpotqa:medium:19", "--out", tmp_path / "out")
    texts = {normalize(question["question"]) for question in drawn(tmp_path / "out")}
    assert len(texts) == 19 and normalize(test_set[0]["question"]) not in texts


@pytest.mark.parametrize(
    "draw", ["hotpotqa", "hotpotqa:medium", "hotpotqa:middle:3", "hotpotqa:medium:x", "a:easy:0"]
)
def test_a_draw_that_cannot_be_read_is_refused(mix, tmp_path, capsys, draw):
    assert draw in refused(capsys, *mix, "--draw", draw, "--out", tmp_path / "out")


def test_other_wrong_calls_of_mix_are_refused(mix, tmp_path, capsys):
    assert "--stage and --draw" in refused(capsys, *mix, "--out", tmp_path / "out")
    (tmp_path / "2wiki.jsonl").write_text(jsonl([MUSIQUE]))
    error = refused(capsys, *mix, "--stage", 1, "--out", tmp_path / "out")
    assert "2wiki.jsonl:1: expected a question with rollouts" in error
    (tmp_path / "out").write_text("mine")
    for command in (mix, ["questions", "--format", "hotpotqa", "--source", "none"]):
        assert "there already" in refused(capsys, *command, "--out", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_mix_of_files_that_number_alike_is_one_to_train_on(tmp_path):
    """FlashRAG's data sets do, and Search-R1's files; two questions of one id would be refused."""
    files = []
    for number, dataset in enumerate(["hotpotqa", "2wiki", "2wiki"]):
        rows = [counted(dataset, n + 10 * number, 5) | {"id": f"train_{n}"} for n in range(3)]
        files.append(tmp_path / str(number) / "difficulty.jsonl")
        files[-1].parent.mkdir()
        files[-1].write_text(jsonl(rows))
    draws = ("hotpotqa:easy:3", "2wiki:easy:6")
    call("mix", "--draw", *draws, "--questions", *files, "--out", tmp_path / "out")
    assert len(read_questions(tmp_path / "out")) == 9


def test_hidden_files_of_a_corpus_folder_are_left_out(tmp_path):
    """The hub's downloads leave some."""
    folder = tmp_path / "corpus"
    (folder / ".cache").mkdir(parents=True)
    (folder / ".cache" / ".gitignore").write_text("*")
    (folder / "part.json").write_text(GOOD_LINES["kilt"])
    call("kilt", "--source", folder, "--out", tmp_path / "passages")
    assert len(read_passages(tmp_path / "passages")) == 1
