"""The data recipe: published data sets to questions, their difficulty, the training sets."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ASK, TELL

import data_prep
from records import read_questions
from reward import METRICS, TAGS, normalize
from rollout import Limits, Rollout

# Made up, in the shapes of the published files.
HOTPOTQA = {
    "_id": "5a7a",
    "question": " Which is older, A or B? ",
    "answer": "A",
    "type": "comparison",
    "level": "hard",
    "supporting_facts": [["A", 0], ["B", 1]],
    "context": [["A", ["A was made.", " Early."]], ["B", ["B too."]]],
}
WIKI2 = HOTPOTQA | {
    "_id": "8813f",
    "evidences": [["A", "date", "1901"]],
    "answer_id": "Q1",
    "evidences_id": [["Q1", "P1", "Q2"]],
}
MUSIQUE = {
    "id": "2hop__1_2",
    "question": "Who made the maker of C?",
    "answer": "Ann D.",
    "answer_aliases": ["Ann", "Ann D.", " A. D. "],
    "answerable": True,
    "paragraphs": [{"idx": 0, "title": "C", "paragraph_text": "C was made.", "is_supporting": True}],
    "question_decomposition": [{"id": 1, "question": "C >> maker", "answer": "E"}],
}
RELEASED = {"idx": 37, "question": "Which E?", "answer": True, "pred_anses": ["", "E"], "gen_text_store": None}


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)


def call(*words):
    data_prep.main([str(word) for word in words])


def refused(capsys, *words):
    """The one line in which the command ends."""
    with pytest.raises(SystemExit) as stop:
        call(*words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    return error


# ---------------------------------------------------------------------------------------------------------------------
# Published data sets


@pytest.mark.parametrize(
    ("format", "name", "text", "expected"),
    [
        ("hotpotqa", "h.json", json.dumps([HOTPOTQA]), ("5a7a", "Which is older, A or B?", ["A"], "hotpotqa")),
        ("hotpotqa", "hub.jsonl", lines([{"id": "5", "question": "Q", "answer": "no"}]), ("5", "Q", ["no"], "hotpotqa")),
        ("2wiki", "w.json", json.dumps([WIKI2], indent=1), ("8813f", "Which is older, A or B?", ["A"], "2wiki")),
        ("musique", "m.jsonl", lines([MUSIQUE]), ("2hop__1_2", MUSIQUE["question"], ["Ann D.", "Ann", "A. D."], "musique")),
        (
            "bamboogle",
            "b.csv",
            '\ufeffQuestion,Answer\n"Who, if\nany?",F\n',
            ("bamboogle-1", "Who, if\nany?", ["F"], "bamboogle"),
        ),
        ("bamboogle", "b.json", '[{"Question": "Who?", "Answer": 7}]', ("bamboogle-1", "Who?", ["7"], "bamboogle")),
        ("r1-searcher", "stage_1.jsonl", lines([RELEASED]), ("37", "Which E?", ["yes"], "stage_1")),
    ],
)
def test_a_record_of_each_published_format(tmp_path, format, name, text, expected):
    (tmp_path / name).write_text(text, encoding="utf-8")
    call("questions", "--format", format, "--source", tmp_path / name, "--out", tmp_path / "new" / "q.jsonl")
    (question,) = read_questions(tmp_path / "new" / "q.jsonl")
    assert question == dict(zip(("id", "question", "answers", "dataset"), expected, strict=True))


def test_questions_that_cannot_be_answered_are_left_out_and_counted(tmp_path, capsys):
    (tmp_path / "m.jsonl").write_text(lines([MUSIQUE, MUSIQUE | {"answerable": False}, MUSIQUE | {"id": "3"}]))
    call("questions", "--format", "musique", "--source", tmp_path / "m.jsonl", "--out", tmp_path / "q.jsonl")
    assert [q["id"] for q in read_questions(tmp_path / "q.jsonl")] == ["2hop__1_2", "3"]
    assert "2 of 2 questions; 1 that cannot be answered left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("format", "text", "where"),
    [
        ("hotpotqa", json.dumps([HOTPOTQA, HOTPOTQA]), "record 2: .*5a7a.*twice"),
        ("hotpotqa", json.dumps([HOTPOTQA, {**HOTPOTQA, "_id": "x", "answer": " "}]), "record 2: .*without text or answer"),
        (
            "hotpotqa",
            json.dumps([{k: v for k, v in HOTPOTQA.items() if k != "answer"}]),
            "record 1: .*'answer'",
        ),  # a test set
        ("hotpotqa", json.dumps([HOTPOTQA])[:-9], "as a whole: .*JSONDecodeError"),
        ("2wiki", json.dumps([WIKI2, "text"]), "record 2: "),
        ("2wiki", json.dumps([WIKI2 | {"answer": None}]), "record 1: .*without text or answer"),
        ("musique", lines([MUSIQUE]) + "\n{\n", "line 3: .*JSONDecodeError"),
        ("musique", lines([MUSIQUE, [MUSIQUE]]), "line 2: "),
        ("musique", lines([MUSIQUE | {"question": 7}]), "line 1: "),
        ("bamboogle", lines([HOTPOTQA, RELEASED | {"question": ""}]), "line 2: .*without text or answer"),
        ("musique", "PAR1\x00\x15", "parquet; save it as JSON lines"),
        ("hotpotqa", "[]", "holds no question"),
        ("r1-searcher", lines([RELEASED, {}]), ":2: expected"),
    ],
)
def test_bad_records_are_named_in_one_line_and_nothing_is_written(tmp_path, capsys, format, text, where):
    (tmp_path / "raw").write_text(text)
    error = refused(capsys, "questions", "--format", format, "--source", tmp_path / "raw", "--out", tmp_path / "q")
    assert str(tmp_path / "raw") in error and re.search(where, error)
    assert not (tmp_path / "q").exists()


def test_nothing_is_overwritten(tmp_path, capsys):
    (tmp_path / "raw").write_text(json.dumps([HOTPOTQA]))
    (tmp_path / "out").write_text("mine")
    for words in (
        ("questions", "--format", "hotpotqa", "--source", tmp_path / "raw"),
        ("difficulty", "--questions", tmp_path / "raw", "--model", "none", "--retriever", "none"),
        ("mix", "--questions", tmp_path / "raw", "--stage", 1),
    ):
        assert "there already" in refused(capsys, *words, "--out", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_file_of_the_hub_is_asked_for_as_the_library_wants_it(tmp_path, monkeypatch):
    import huggingface_hub

    (tmp_path / "cached").write_text(json.dumps([HOTPOTQA]))
    asked = []

    def hf_hub_download(repo_id, filename, *, repo_type, revision):
        asked.append((repo_id, filename, repo_type, revision))
        return str(tmp_path / "cached")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    for n, source in enumerate(("hf://datasets/o/n/a/d.json", "hf://datasets/o/n@v1/d.json")):
        call("questions", "--format", "hotpotqa", "--source", source, "--out", tmp_path / f"{n}")
    assert asked == [("o/n", "a/d.json", "dataset", None), ("o/n", "d.json", "dataset", "v1")]
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes() != b""


@pytest.mark.parametrize("source", ["hf://datasets/o/n/d.json", "hf://datasets/o/n", "hf://", "ftp://o/n/d.json"])
def test_what_the_hub_does_not_give_ends_in_one_line(tmp_path, capsys, monkeypatch, source):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    error = refused(capsys, "questions", "--format", "hotpotqa", "--source", source, "--out", tmp_path / "q")
    assert source in error


@given(st.integers(0, 40), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_a_sample_is_a_function_of_the_seed_without_replacement_and_in_order(tmp_path_factory, sample, seed):
    folder = tmp_path_factory.mktemp("sample")
    (folder / "h.json").write_text(json.dumps([HOTPOTQA | {"_id": f"{n:02}"} for n in range(40)]))
    for out in ("1", "2"):
        words = ("--source", folder / "h.json", "--sample", sample, "--seed", seed, "--out", folder / out)
        call("questions", "--format", "hotpotqa", *words)
    ids = [q["id"] for q in read_questions(folder / "1")]
    assert ids == sorted(set(ids)) and len(ids) == (sample or 40)
    assert (folder / "1").read_bytes() == (folder / "2").read_bytes()


def test_samples_of_other_seeds_are_others_and_too_large_a_sample_is_refused(tmp_path, capsys):
    (tmp_path / "h.json").write_text(json.dumps([HOTPOTQA | {"_id": f"{n:02}"} for n in range(40)]))
    words = ("questions", "--format", "hotpotqa", "--source", tmp_path / "h.json")
    for seed in range(5):
        call(*words, "--sample", 10, "--seed", seed, "--out", tmp_path / f"{seed}")
    assert "10 of 40 questions (--sample 10 --seed 4)" in capsys.readouterr().out
    assert len({(tmp_path / f"{seed}").read_text() for seed in range(5)}) == 5
    for sample in (41, -1):
        assert "has 40 questions" in refused(capsys, *words, "--sample", sample, "--out", tmp_path / "q")


# ---------------------------------------------------------------------------------------------------------------------
# Difficulty


@pytest.mark.parametrize(
    ("rollouts", "solved", "expected"),
    [
        *((1, True, "easy"), (9, True, "easy"), (10, True, "medium"), (20, True, "medium"), (21, True, "hard")),
        *((20, False, "hard"), (30, False, "hard"), (19, False, "undecided"), (3, False, "undecided")),
    ],
)
def test_the_papers_bounds(rollouts, solved, expected):
    assert data_prep.level(rollouts, solved) == expected


class CountingEngine:
    """Answers the question "n" rightly from its n-th rollout on; keeps (question, seed, how many were under way)."""

    def __init__(self, tokenizer):
        self.tokenizer, self.waiting, self.given, self.rollouts = tokenizer, [], [], {}

    def submit(self, key, token_ids, *, max_tokens, stop, temperature, seed):
        n = int(self.tokenizer.decode(token_ids).removeprefix("Q"))
        self.rollouts[n] = self.rollouts.get(n, 0) + 1
        self.waiting.append((key, n if self.rollouts[n] >= n else "x"))
        self.given.append((n, seed, len(self.waiting)))

    def step(self):
        from rollout import Completion

        key, answer = self.waiting.pop(0)
        ids = self.tokenizer.encode(f"</think> <answer> {answer} </answer>", add_special_tokens=False)
        return [Completion(key, ids, [-0.5] * len(ids), TAGS.answer[1])]


def roll_out(tokenizer, needed, verdicts=None, places=256, cap=20, right="acc_r"):
    """Roll out questions that need so many rollouts; returns id -> verdicts, what was yielded, and the engine."""
    engine = CountingEngine(tokenizer)
    rollout = Rollout(engine, tokenizer, None, TAGS, Limits(max_context=500), deterministic=True)
    run, rollout.run = rollout.run, lambda episodes: run(episodes, max_running=places)
    questions = [{"id": f"id{n}", "question": f"Q{n}", "answers": [f"{n}"]} for n in needed]
    verdicts = verdicts if verdicts is not None else {q["id"]: [] for q in questions}
    for name, seen in verdicts.items():
        engine.rollouts[int(name[2:])] = len(seen)
    args = argparse.Namespace(max_rollouts=cap, seed=7, right=right, retriever="r")
    yielded = list(data_prep.roll_out_until_right(rollout, tokenizer.encode, questions, verdicts, args))
    return verdicts, yielded, engine


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8, unique=True), st.integers(1, 9), st.integers(1, 25))
@settings(max_examples=40, deadline=None)
def test_every_question_is_rolled_out_until_the_first_right_answer_or_the_cap(tokenizer, needed, places, cap):
    verdicts, yielded, engine = roll_out(tokenizer, needed, places=places, cap=cap)
    assert {name: len(v) for name, v in verdicts.items()} == {f"id{n}": min(n, cap) for n in needed}
    assert all(v == [False] * (len(v) - 1) + [n <= cap] for n, v in zip(needed, verdicts.values(), strict=True))
    assert len(yielded) == len(engine.given) == sum(min(n, cap) for n in needed)
    assert max(running for _, _, running in engine.given) <= min(places, len(needed))


def test_a_question_that_is_done_leaves_its_place_to_the_next(tokenizer):
    """More questions than places: the batch is full until fewer are unsolved than it has places."""
    _, _, engine = roll_out(tokenizer, [1, 2, 3, 4, 5, 6, 7, 8], places=3)
    running = [count for _, _, count in engine.given[2:]]
    assert running == sorted(running, reverse=True) and running.count(3) > 20
    assert [n for n, _, _ in engine.given[:8]] == [1, 2, 3, 4, 5, 6, 7, 8]  # all have had one before any has another


def test_a_rollouts_seed_depends_on_its_question_and_number_alone(tokenizer):
    seeds = []
    for places in (1, 3, 256):
        _, _, engine = roll_out(tokenizer, [5, 2, 9], places=places)
        seeds.append(sorted((n, seed) for n, seed, _ in engine.given))
    assert seeds[0] == seeds[1] == seeds[2] and len({seed for _, seed in seeds[0]}) == 16


def test_what_is_noted_is_not_rolled_out_again(tokenizer):
    whole, _, everything = roll_out(tokenizer, [2, 3, 5])
    verdicts = {"id2": [False, True], "id3": [], "id5": [False, False]}
    resumed, yielded, engine = roll_out(tokenizer, [2, 3, 5], verdicts)
    assert resumed == whole and len(yielded) == 6 and 2 not in {n for n, _, _ in engine.given}
    assert {given[:2] for given in engine.given} <= {given[:2] for given in everything.given}


@pytest.mark.parametrize("right", METRICS)
def test_right_is_what_the_metric_says(tokenizer, scripted, right):
    rollout = Rollout(scripted([" </think> <answer> b c </answer>"]), tokenizer, None, TAGS, Limits(max_context=500))
    verdicts = {"q": []}
    args = argparse.Namespace(max_rollouts=2, seed=0, right=right, retriever="r")
    question = {"id": "q", "question": "Q", "answers": ["b"]}
    list(data_prep.roll_out_until_right(rollout, tokenizer.encode, [question], verdicts, args))
    assert verdicts["q"] == ([True] if right == "acc_r" else [False, False])


def test_a_search_that_fails_stops_the_command_instead_of_making_questions_hard(tokenizer, scripted):
    def search(queries, k):
        raise ConnectionError("down")

    rollout = Rollout(scripted([ASK, TELL]), tokenizer, search, TAGS, Limits(max_context=4000))
    args = argparse.Namespace(max_rollouts=2, seed=0, right="em", retriever="http://here")
    verdicts, question = {"q": []}, {"id": "q", "question": "Q", "answers": ["a"]}
    with pytest.raises(RuntimeError, match=r"http://here.*down"):
        list(data_prep.roll_out_until_right(rollout, tokenizer.encode, [question], verdicts, args))
    assert verdicts == {"q": []}


@pytest.fixture
def command(tmp_path, model_folder):
    """`difficulty` with the tiny model, which answers "b" sooner or later."""
    (tmp_path / "p.txt").write_text("Question: {question}\n<think>")
    questions = [{"id": f"q{i}", "question": f"who is {i}?", "answers": ["b" if i else "never"]} for i in range(6)]
    (tmp_path / "q.jsonl").write_text(lines(questions))
    (tmp_path / "c.jsonl").write_text('{"id": "0", "title": "T", "text": "words"}\n')
    flags = ["--engine=transformers", "--max_context=400", "--max_turn_tokens=40", "--temperature=1.5", "--max_rollouts=12"]
    files = [f"--{name}={tmp_path / file}" for name, file in (("questions", "q.jsonl"), ("retriever", "c.jsonl"))]
    return ["difficulty", f"--model={model_folder}", f"--prompt_file={tmp_path / 'p.txt'}", *flags, *files]


def test_a_killed_call_goes_on_to_the_same_bytes(command, tmp_path, capsys):
    call(*command, "--out", tmp_path / "whole")
    assert "unsolved after  12" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "whole").read_text().splitlines()]
    assert [r["id"] for r in records] == [f"q{i}" for i in range(6)]  # in the file's order
    assert (records[0]["rollouts"], records[0]["solved"]) == (12, False) and any(r["solved"] for r in records)

    notes, out = tmp_path / "out.progress", tmp_path / "out"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    words = [sys.executable, data_prep.__file__, *command, "--out", str(out)]
    process = subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL)
    while not notes.exists() or notes.read_bytes().count(b"\n") < 4:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = notes.read_bytes()
    assert not out.exists() and before.count(b"\n") >= 4
    with open(notes, "ab") as file:
        file.write(b'["q3", tr')  # torn
    assert "begun with seed 0, not 1" in refused(capsys, *command, "--seed", "1", "--out", out)
    call(*command, "--out", out)
    assert out.read_bytes() == (tmp_path / "whole").read_bytes() and not notes.exists()


def test_notes_of_other_questions_are_refused(command, tmp_path, capsys):
    (tmp_path / "out.progress").write_text('{"sha256": "0"}\n["q1", false]\n')
    assert "begun with sha256 0" in refused(capsys, *command, "--out", tmp_path / "out")
    assert "at least 1" in refused(capsys, *command, "--max_rollouts", "0", "--out", tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------------------
# Mix


def counted(dataset, name, rollouts, solved=True):
    record = {"id": f"{dataset}-{name}", "question": f"Who is {dataset} {name}?", "answers": ["a"], "dataset": dataset}
    return record | {"rollouts": rollouts, "solved": solved}


@pytest.fixture
def pools(tmp_path):
    """40 questions a data set: 10 easy, 20 medium, 8 hard, 2 given up too early."""
    for dataset in ("hotpotqa", "2wiki"):
        records = [counted(dataset, n, 1 + n % 9) for n in range(10)] + [
            counted(dataset, n, 10 + n % 11) for n in range(10, 30)
        ]
        records += [counted(dataset, n, 20, False) for n in range(30, 38)] + [
            counted(dataset, n, 5, False) for n in (38, 39)
        ]
        (tmp_path / f"{dataset}.jsonl").write_text(lines(records))
    return ["mix", "--questions", tmp_path / "hotpotqa.jsonl", tmp_path / "2wiki.jsonl"]


def drawn(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_mix_holds_exactly_the_asked_counts(pools, tmp_path):
    draws = ("hotpotqa:medium:7", "2wiki:easy:10", "hotpotqa:medium:3", "2wiki:hard:8")
    call(*pools, "--draw", *draws, "--out", tmp_path / "1")
    records = drawn(tmp_path / "1")
    counts = {}
    for r in records:
        assert r["difficulty"] == data_prep.level(r["rollouts"], r["solved"])
        counts[r["dataset"], r["difficulty"]] = counts.get((r["dataset"], r["difficulty"]), 0) + 1
    assert counts == {("hotpotqa", "medium"): 10, ("2wiki", "easy"): 10, ("2wiki", "hard"): 8}
    assert len(read_questions(tmp_path / "1")) == 28  # trainable: no id twice
    assert [r["dataset"] for r in records] != sorted(r["dataset"] for r in records)  # not one data set after the other
    call(*pools, "--draw", *draws, "--out", tmp_path / "2")
    call(*pools, "--draw", *draws, "--seed", 1, "--out", tmp_path / "3")
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes() != (tmp_path / "3").read_bytes()


def test_what_is_missing_is_said_of_each_draw_and_nothing_is_written(pools, tmp_path, capsys):
    error = refused(capsys, *pools, "--stage", 2, "--out", tmp_path / "out")
    for part in ("hotpotqa medium 20 of 2561", "hotpotqa hard 8 of 2000", "2wiki medium 20 of 1087", "2wiki hard 8 of 2500"):
        assert part in error
    draws = ("hotpotqa:easy:10", "musique:hard:1")  # the first could be drawn
    error = refused(capsys, *pools, "--draw", *draws, "--out", tmp_path / "out")
    assert "musique hard 0 of 1" in error and "hotpotqa" not in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("stage", "total"), [(1, 350), (2, 8148)])
def test_the_papers_stages_add_up(tmp_path, stage, total):
    for dataset in ("hotpotqa", "2wiki"):
        medium, hard = ([counted(dataset, f"{s}{n}", 20, s == "m") for n in range(2600)] for s in "mh")
        (tmp_path / f"{dataset}.jsonl").write_text(lines(medium + hard))
    files = (tmp_path / "hotpotqa.jsonl", tmp_path / "2wiki.jsonl")
    call("mix", "--stage", stage, "--questions", *files, "--out", tmp_path / "out")
    records = drawn(tmp_path / "out")
    assert len(records) == total and (stage == 2 or {r["difficulty"] for r in records} == {"medium"})


def test_no_question_of_the_test_sets_or_twice_however_it_is_written(pools, tmp_path, capsys):
    test = [{"idx": 0, "question": "WHO is the `hotpotqa`  12", "answer": "a"}]  # the released shape
    (tmp_path / "test.jsonl").write_text(lines(test))
    again = counted("hotpotqa", 13, 10) | {"id": "another", "question": "who is (hotpotqa) 13"}
    (tmp_path / "more.jsonl").write_text(lines([again]))
    words = [*pools, tmp_path / "more.jsonl", "--exclude", tmp_path / "test.jsonl"]
    assert "hotpotqa medium 19 of 20" in refused(capsys, *words, "--draw", "hotpotqa:medium:20", "--out", tmp_path / "out")
    call(*words, "--draw", "hotpotqa:medium:19", "--out", tmp_path / "out")
    texts = [normalize(r["question"]) for r in drawn(tmp_path / "out")]
    assert len(set(texts)) == 19 and normalize(test[0]["question"]) not in texts
    assert "of 81, 2 are in the test sets or twice" in capsys.readouterr().out


@pytest.mark.parametrize(
    "draw", ["hotpotqa", "hotpotqa:medium", "hotpotqa:middle:3", "hotpotqa:medium:x", "hotpotqa:easy:0"]
)
def test_a_draw_that_cannot_be_read_is_refused(pools, tmp_path, capsys, draw):
    with pytest.raises(SystemExit) as stop:
        call(*pools, "--draw", draw, "--out", tmp_path / "out")
    assert stop.value.code == 2 and draw in capsys.readouterr().err


def test_questions_without_rollouts_are_refused(pools, tmp_path, capsys):
    (tmp_path / "2wiki.jsonl").write_text(lines([{"id": "1", "question": "q", "answers": ["a"], "dataset": "d"}]))
    assert "2wiki.jsonl:1: expected" in refused(capsys, *pools, "--stage", 1, "--out", tmp_path / "out")
