"""Difficulty: rollouts until the first right answer, in rounds."""

import json
import shutil
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ASK, TELL

import data_prep
from difficulty import level, roll_out_until_right
from engine import Completion
from reward import METRICS, TAGS
from rollout import Limits, Rollout


@pytest.mark.parametrize(
    ("rollouts", "solved", "expected"),
    [
        (1, True, "easy"), (9, True, "easy"), (10, True, "medium"), (20, True, "medium"),
        (21, True, "hard"), (20, False, "hard"), (30, False, "hard"),
        (19, False, "undecided"), (3, False, "undecided"),
    ],
)  # fmt: skip
def test_the_papers_levels(rollouts, solved, expected):
    assert level(rollouts, solved) == expected


class CountingEngine:
    """Answers the question Qn rightly from its n-th rollout on.

    Attributes:
        given: (n, seed, how many were under way) of each rollout.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.waiting, self.given, self.rollouts = tokenizer, [], [], {}

    def submit(self, key, token_ids, *, max_tokens, stop, temperature, seed):
        n = int(self.tokenizer.decode(token_ids).removeprefix("Q"))
        self.rollouts[n] = self.rollouts.get(n, 0) + 1
        self.waiting.append((key, n if self.rollouts[n] >= n else "x"))
        self.given.append((n, seed, len(self.waiting)))

    def step(self):
        key, answer = self.waiting.pop(0)
        text = f"</think> <answer> {answer} </answer>"
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return [Completion(key, ids, [-0.5] * len(ids), TAGS.answer.closing)]


def roll_out(tokenizer, needed, verdicts=None, places=256, cap=20):
    """Roll out questions that need so many rollouts; verdicts by id, what was yielded, engine."""
    engine = CountingEngine(tokenizer)
    rollout = Rollout(engine, tokenizer, None, TAGS, Limits(max_context=500), deterministic=True)
    run = rollout.run
    rollout.run = lambda episodes: run(episodes, max_running=places)
    questions = [{"id": f"id{n}", "question": f"Q{n}", "answers": [f"{n}"]} for n in needed]
    if verdicts is None:
        verdicts = {question["id"]: [] for question in questions}
    for name, earlier in verdicts.items():
        engine.rollouts[int(name[2:])] = len(earlier)
    rollouts = roll_out_until_right(
        rollout, tokenizer.encode, questions, verdicts, cap, "acc_r", seed=7
    )
    return verdicts, list(rollouts), engine


@given(
    needed=st.lists(st.integers(1, 30), min_size=1, max_size=8, unique=True),
    places=st.integers(1, 9),
    cap=st.integers(1, 25),
)
@settings(max_examples=40, deadline=None)
def test_every_question_is_rolled_out_until_the_first_right_answer_or_the_cap(
    tokenizer, needed, places, cap
):
    verdicts, yielded, engine = roll_out(tokenizer, needed, places=places, cap=cap)
    for n in needed:
        assert verdicts[f"id{n}"] == [False] * (min(n, cap) - 1) + [n <= cap]
    assert len(yielded) == len(engine.given) == sum(min(n, cap) for n in needed)
    assert max(running for _, _, running in engine.given) <= min(places, len(needed))


def test_a_round_rolls_out_each_unsolved_question_once_in_the_files_order(tokenizer):
    _, _, engine = roll_out(tokenizer, range(1, 6), places=3)
    rounds = ["12345", "2345", "345", "45", "5"]
    assert [str(n) for n, _, _ in engine.given] == list("".join(rounds))


def test_a_rollouts_seed_depends_on_its_question_and_number_alone(tokenizer):
    seeds = []
    for places in (1, 3, 256):
        _, _, engine = roll_out(tokenizer, [5, 2, 9], places=places)
        seeds.append(sorted((n, seed) for n, seed, _ in engine.given))
    assert seeds[0] == seeds[1] == seeds[2] and len({seed for _, seed in seeds[0]}) == 16


def test_earlier_rollouts_are_not_repeated(tokenizer):
    whole, _, everything = roll_out(tokenizer, [2, 3, 5])
    verdicts = {"id2": [False, True], "id3": [], "id5": [False, False]}
    resumed, yielded, engine = roll_out(tokenizer, [2, 3, 5], verdicts)
    assert resumed == whole and len(yielded) == 6 and 2 not in {n for n, _, _ in engine.given}
    assert {rollout[:2] for rollout in engine.given} <= {
        rollout[:2] for rollout in everything.given
    }


@pytest.mark.parametrize("right", METRICS)
def test_right_is_what_the_metric_says(tokenizer, scripted, right):
    engine = scripted([" </think> <answer> b c </answer>"])
    rollout = Rollout(engine, tokenizer, None, TAGS, Limits(max_context=500))
    question = {"id": "q", "question": "Q", "answers": ["b"]}
    verdicts = {"q": []}
    list(roll_out_until_right(rollout, tokenizer.encode, [question], verdicts, 2, right, seed=0))
    assert verdicts["q"] == ([True] if right == "acc_r" else [False, False])


def test_a_failed_search_stops_the_command_instead_of_making_questions_hard(tokenizer, scripted):
    def search(queries, k):
        raise ConnectionError("down")

    rollout = Rollout(scripted([ASK, TELL]), tokenizer, search, TAGS, Limits(max_context=4000))
    question = {"id": "q", "question": "Q", "answers": ["a"]}
    verdicts = {"q": []}
    with pytest.raises(RuntimeError, match="down"):
        list(roll_out_until_right(rollout, tokenizer.encode, [question], verdicts, 2, "em", seed=0))
    assert verdicts == {"q": []}


@pytest.fixture
def command(tmp_path, model_folder):
    """`difficulty` with the tiny model, which answers "b" sooner or later."""
    files = {"prompt_file": "p.txt", "questions": "q.jsonl", "retriever": "c.jsonl"}
    (tmp_path / "p.txt").write_text("Question: {question}\n<think>")
    (tmp_path / "c.jsonl").write_text('{"id": "0", "title": "T", "text": "words"}\n')
    with open(tmp_path / "q.jsonl", "w") as file:
        for i in range(6):
            answers = ["b" if i else "never"]
            record = {"id": f"q{i}", "question": f"who is {i}?", "answers": answers}
            file.write(json.dumps(record) + "\n")
    words = ["difficulty", f"--model={model_folder}", "--engine=transformers", "--max_context=400"]
    words += ["--max_turn_tokens=40", "--temperature=1.5", "--max_rollouts=12"]
    return words + [f"--{name}={tmp_path / file}" for name, file in files.items()]


def refused(capsys, *words):
    """The one line in which the command ends."""
    with pytest.raises(SystemExit) as stop:
        data_prep.main([str(word) for word in words])
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("data_prep.py: ")
    return error


def test_a_killed_call_goes_on_to_the_same_bytes(command, tmp_path, capsys):
    whole, out, journal = tmp_path / "whole", tmp_path / "out", tmp_path / "out.progress"
    data_prep.main([*command, "--out", str(whole)])
    assert "undecided" in capsys.readouterr().out
    records = [json.loads(line) for line in whole.read_text().splitlines()]
    assert [record["id"] for record in records] == [f"q{i}" for i in range(6)]
    assert (records[0]["rollouts"], records[0]["solved"]) == (12, False)
    assert any(record["solved"] for record in records)

    words = [sys.executable, data_prep.__file__, *command, "--out", str(out)]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    while not journal.exists() or journal.read_bytes().count(b"\n") < 4:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not out.exists()
    with open(journal, "ab") as file:
        file.write(b'["q3", tr')  # torn
    error = refused(capsys, *command, "--seed", 1, "--out", out)
    assert "begun with seed 0, not 1" in error
    data_prep.main([*command, "--out", str(out)])
    assert out.read_bytes() == whole.read_bytes() and not journal.exists()


def test_a_journal_of_other_questions_is_refused(command, tmp_path, capsys):
    (tmp_path / "out.progress").write_text('{"questions": "0"}\n["q1", false]\n')
    assert "begun with questions 0" in refused(capsys, *command, "--out", tmp_path / "out")


@pytest.mark.parametrize("file", ["q.jsonl", "c.jsonl", "p.txt", "model/config.json"])
def test_a_killed_call_does_not_go_on_with_a_changed_file(
    command, tmp_path, model_folder, monkeypatch, capsys, file
):
    def die_after_one(rollouts, **_):
        yield next(rollouts)
        raise ZeroDivisionError

    shutil.copytree(model_folder, tmp_path / "model")
    command += [f"--model={tmp_path / 'model'}", f"--out={tmp_path / 'out'}"]
    monkeypatch.setattr("difficulty.tqdm", die_after_one)
    with pytest.raises(ZeroDivisionError):
        data_prep.main(command)
    content = (tmp_path / file).read_text()
    (tmp_path / file).write_text(content.replace(" ", "  ", 1))
    assert "begun with " in refused(capsys, *command)
    (tmp_path / file).write_text(content)
    with pytest.raises(ZeroDivisionError):
        data_prep.main(command)


def test_impossible_options_and_an_existing_file_are_refused(command, tmp_path, capsys):
    out = tmp_path / "out"
    assert "at least 1" in refused(capsys, *command, "--max_rollouts", 0, "--out", out)
    out.write_text("mine")
    assert "there already" in refused(capsys, *command, "--out", out)
    assert out.read_text() == "mine"
