"""Evaluation: records, intervals, tables; the commands on a tiny model and against a judge that misbehaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import evaluate
import records
import retriever
from evaluate import VERSION, identity, measure, measure_by_dataset, summarize, summarize_evaluation, table
from reward import judge
from tools import report


def made(dataset, answer, searches=1, reason="answer"):
    text = f"</think> <answer> {answer} </answer>" if answer else "lost"
    judged = judge([("policy", text)], searches, ["b"])
    extra = {"searches": searches, "finish_reason": reason, "response_len": 4, "search_failures": 0}
    return {"dataset": dataset, **judged, **extra}


def test_summary_by_hand():
    result = summarize([made("d", "b"), made("d", "b c"), made("d", "", searches=0, reason="length"), made("d", "x")])
    assert result["n"] == 4 and result["em"] == 0.25 and result["acc_r"] == 0.5
    assert result["f1"] == pytest.approx((1 + 2 / 3) / 4)
    assert (result["search_rate"], result["format_rate"], result["truncated_rate"]) == (0.75, 0.75, 0.25)


def test_datasets_apart_and_together():
    results = measure_by_dataset([made("one", "b"), made("two", "x"), made("two", "x")], summarize_evaluation)
    assert [results[name]["n"] for name in ("one", "two", "all")] == [1, 2, 3]
    assert results["all"]["em"] == pytest.approx(1 / 3)
    assert list(measure_by_dataset([made("one", "b")], summarize)) == ["one"]


def test_intervals_are_those_of_the_binomial():
    records = [made("d", "b" if i % 4 else "x") for i in range(400)]
    result = measure(records, summarize_evaluation)
    low, high = result["intervals"]["em"]
    half = 1.96 * (0.75 * 0.25 / 400) ** 0.5  # of the normal approximation
    assert low == pytest.approx(0.75 - half, abs=0.005) and high == pytest.approx(0.75 + half, abs=0.005)
    assert result["intervals"]["searches"] == [1.0, 1.0]  # all alike: nothing to be uncertain about
    assert result["intervals"].keys() == result.keys() - {"n", "intervals"}
    assert measure(records, summarize_evaluation) == result
    assert measure(records[:1], summarize_evaluation)["intervals"]["em"] == [0.0, 0.0]


def test_the_table_is_aligned():
    results = measure_by_dataset([made("one", "b"), made("another", "x")], summarize_evaluation)
    lines = table(results).splitlines()
    assert len({len(line) for line in lines}) == 1 and lines[1].startswith("another") and "100.0%" in lines[3]
    assert "0.0-100.0" in lines[6] and lines[0].split()[-1] == "search_failed_rate"
    for result in results.values():  # as evaluations were saved before there were intervals
        del result["intervals"], result["search_failed_rate"]
    assert len(table(results).splitlines()) == 4 and "search_failed_rate" not in table(results)


@pytest.fixture
def arguments(tmp_path, model_folder):
    (tmp_path / "p.txt").write_text("Question: {question}\n<think>")
    questions = [
        {"id": f"q{i}", "question": f"who is {i}?", "answers": ["b"], "dataset": "odd even".split()[i % 2]} for i in range(7)
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    (tmp_path / "c.jsonl").write_text('{"id": "0", "title": "T", "text": "words </answer>"}\n')
    files = {"questions": "q.jsonl", "retriever": "c.jsonl", "prompt_file": "p.txt", "out": "out"}
    flags = [f"--{name}={tmp_path / file}" for name, file in files.items()]
    return ["run", f"--model={model_folder}", "--engine=transformers", "--max_context=400", "--max_turn_tokens=64", *flags]


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def refused(arguments, capsys):
    """The one line that ends the command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluate.main(arguments)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "\n" not in error
    return error


def test_every_question_is_answered_once_in_the_files_order(arguments, tmp_path, capsys):
    evaluate.main(arguments)
    rows = lines(tmp_path / "out" / "transcripts.jsonl")
    assert [row["id"] for row in rows] == [f"q{i}" for i in range(7)]
    assert {kind for row in rows for kind, _ in row["segments"]} == {"prompt", "policy", "documents"}
    saved = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert saved["results"] == measure_by_dataset(rows, summarize_evaluation)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["metrics.json", "transcripts.jsonl"]
    assert "out odd" in capsys.readouterr().out

    before = (tmp_path / "out" / "transcripts.jsonl").read_bytes()
    evaluate.main([*arguments, "--engine=transformers"])  # done already: it only shows
    assert "evaluated already" in capsys.readouterr().out
    assert "max_searches" in refused([*arguments, "--max_searches=1"], capsys)  # another protocol into the same folder
    assert (tmp_path / "out" / "transcripts.jsonl").read_bytes() == before


def test_the_protocol_says_what_the_numbers_depend_on(arguments, tmp_path, model_folder, monkeypatch, capsys):
    shutil.copytree(model_folder, tmp_path / "model")
    arguments.append(f"--model={tmp_path / 'model'}")
    evaluate.main(arguments)
    protocol = json.loads((tmp_path / "out" / "metrics.json").read_text())["protocol"]
    assert (protocol["temperature"], protocol["documents_per_search"], protocol["evaluator"]) == (0.0, 5, VERSION)
    assert protocol["questions"] == [[str(tmp_path / "q.jsonl"), records.fingerprint(tmp_path / "q.jsonl")]]
    assert protocol["retriever"]["fingerprint"] == records.fingerprint(tmp_path / "c.jsonl")

    monkeypatch.setattr(evaluate, "commit", lambda: "a later one")
    evaluate.main(arguments)  # to show a finished evaluation is no claim about today's code

    prompt = (tmp_path / "p.txt").read_text()
    (tmp_path / "p.txt").write_text(prompt + " ")
    assert "(prompt)" in refused(arguments, capsys)
    (tmp_path / "p.txt").write_text(prompt)
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert "(model)" in refused(arguments, capsys)  # trained again, at the same path


def test_the_commit_is_that_of_the_code(tmp_path, monkeypatch):
    git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(tmp_path)]
    (tmp_path / "evaluate.py").write_text("1")
    monkeypatch.setattr(evaluate, "__file__", str(tmp_path / "evaluate.py"))
    assert evaluate.commit() == "unknown"
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *words], check=True)
    clean = evaluate.commit()
    assert clean == subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    (tmp_path / "evaluate.py").write_text("2")
    assert evaluate.commit() == clean + "-dirty"


def test_files_with_the_same_ids(arguments, tmp_path, capsys):
    """The released files all count their questions from 1."""
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text('{"idx": 1, "question": "who is 1?", "answer": true}\n')
    files = [str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl")]
    evaluate.main([*arguments, "--questions", *files])
    assert list(json.loads((tmp_path / "out" / "metrics.json").read_text())["results"]) == ["one", "two", "all"]
    assert [identity(row) for row in lines(tmp_path / "out" / "transcripts.jsonl")] == [("one", "1"), ("two", "1")]
    assert "id '1' of dataset 'one' is in 2" in refused([*arguments, "--questions", files[0], files[0]], capsys)


def test_failed_searches_are_counted(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(retriever, "WAITS", ())
    evaluate.main([*arguments, "--retriever=http://127.0.0.1:9"])
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())["results"]["all"]
    assert result["search_failed_rate"] == result["search_rate"] > 0
    assert "http://127.0.0.1:9/search: no answer" in capsys.readouterr().err


KILLED_AFTER = """
import os, signal, sys
import evaluate

record, left = evaluate.record, int(sys.argv[1])

def record_or_die(episode):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return record(episode)

evaluate.record = record_or_die
evaluate.main(sys.argv[2:])
"""


def test_a_run_killed_three_times_ends_with_the_same_files(arguments, tmp_path, monkeypatch, capsys):
    evaluate.main([*arguments, f"--out={tmp_path / 'unbroken'}"])
    journal = tmp_path / "out" / "answered.jsonl.partial"
    for finished, after in ((2, 2), (2, 0), (5, 3)):
        command = [sys.executable, "-c", KILLED_AFTER, str(after), *arguments]
        assert subprocess.run(command, cwd=Path(evaluate.__file__).parent).returncode == -signal.SIGKILL
        assert len(lines(journal)) == 1 + finished  # beside the protocol
        with open(journal, "a") as stream:
            stream.write('{"id": "q6", "dat')  # a line that was being written
    assert "max_searches" in refused([*arguments, "--max_searches=1"], capsys)

    rolled_out, record = [], evaluate.record
    monkeypatch.setattr(evaluate, "record", lambda episode: rolled_out.append(episode) or record(episode))
    evaluate.main(arguments)
    assert len(rolled_out) == 2
    for name in ("transcripts.jsonl", "metrics.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_groups_are_kept_when_they_are_whole(tmp_path):
    """vLLM's numbers on a CPU depend on which questions run together: half a group would be finished by another one."""
    questions = [{"dataset": "d", "id": str(i)} for i in range(7)]
    journal, protocol = tmp_path / "j", {"evaluator": 1}
    records.write_jsonl(journal, [protocol, *(questions[i] for i in (2, 0, 1, 4, 3, 6))])
    assert evaluate.resume(journal, protocol, questions, 3) == [*questions[:3], questions[6]]
    assert lines(journal) == [protocol, *questions[:3], questions[6]]
    assert evaluate.resume(journal, protocol, questions, 1) == [*questions[:3], questions[6]]
    journal.write_text(journal.read_text().replace('"d"', "d", 1))
    with pytest.raises(ValueError, match="damaged"):
        evaluate.resume(journal, protocol, questions, 3)


def test_a_missing_file_ends_in_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*arguments, "--questions=nowhere.jsonl"])
    assert stop.value.code == 2
    assert "nowhere.jsonl" in capsys.readouterr().err
    assert refused([*arguments, "--model=nowhere"], capsys).startswith("evaluate.py: nowhere: neither a model folder")


def test_plot(tmp_path, capsys):
    for name in ("stage1", "stage2"):
        (tmp_path / name).mkdir()
        panels = ("reward", "search_rate", "format_rate", "f1", "response_len", "sampler_gap")
        rows = [{"step": step, **dict.fromkeys(panels, 0.1 * step)} for step in (1, 2, 3)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "eval").mkdir()
    results = measure_by_dataset([made("one", "b")], summarize_evaluation)
    (tmp_path / "eval" / "metrics.json").write_text(json.dumps({"results": results}))
    runs = [str(tmp_path / "stage1"), str(tmp_path / "stage2")]
    report.main(["plot", "--runs", *runs, "--evaluations", str(tmp_path / "eval"), "--out", str(tmp_path / "c.png")])
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
    assert "eval one" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# score

RELEASED = [
    {"question": "q", "answer": "Red Harbor", "pred_ans": " harbor, red ", "gen_text_store": "", "gpt4o_output": "True"},
    {"question": "q", "answer": "Red Harbor", "pred_ans": "the red-harbor film", "gpt4o_output": "false."},
    {"question": "q", "answer": True, "pred_ans": "Yes", "gpt4o_output": "I think it is True"},
    {"question": "q", "answer": ["x", None, "b"], "pred_ans": "B", "gpt4o_output": None},
    {"question": "q", "answer": False, "pred_ans": None},
    {"question": "q", "answer": 2009, "pred_ans": "", "gpt4o_output": ""},
]


def written(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_score_of_released_outputs(tmp_path, capsys):
    """By hand: EM of the third and the fourth; a verdict is one word, what is not one is counted and not guessed."""
    evaluate.main(["score", str(written(tmp_path / "r.jsonl", RELEASED)), "--json"])
    out, err = capsys.readouterr()
    scores = {"n": 6, "em": 33.3, "f1": 63.3, "acc_r": 66.7, "acc_r_contiguous": 50.0, "acc_l": 16.7}
    assert json.loads(out) == scores and list(json.loads(out)) == list(scores)
    assert err == "judged 2, unparsed 2, not judged 2\n"
    evaluate.main(["score", str(written(tmp_path / "r.jsonl", [dict(r, gpt4o_output=None) for r in RELEASED])), "--json"])
    assert json.loads(capsys.readouterr().out) == scores | {"acc_l": None}


def test_score_of_our_transcripts_is_what_the_run_said(arguments, tmp_path, capsys):
    evaluate.main(arguments)
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())["results"]["all"]
    capsys.readouterr()
    evaluate.main(["score", str(tmp_path / "out" / "transcripts.jsonl"), "--json"])
    scores = json.loads(capsys.readouterr().out)
    assert [scores[name] for name in ("em", "f1", "acc_r")] == [round(100 * result[n], 1) for n in ("em", "f1", "acc_r")]
    evaluate.main(["score", str(tmp_path / "out" / "transcripts.jsonl")])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1::2]] == ["even", "odd", "all"]


def test_what_cannot_be_scored_is_named(tmp_path, capsys):
    questions = written(tmp_path / "q.jsonl", [{"idx": 1, "question": "q", "answer": "b"}])  # would score 100 % of itself
    assert "q.jsonl:1: expected" in refused(["score", str(questions)], capsys)
    without = written(tmp_path / "a.jsonl", [{"question": "q", "answer": [], "pred_ans": "b"}])
    assert "a.jsonl:1: expected" in refused(["score", str(without)], capsys)


# ---------------------------------------------------------------------------------------------------------------------
# judge


class Judge(ThreadingHTTPServer):
    """Finds an answer right if it is among the accepted ones; misbehaves as the question tells it to."""

    daemon_threads = True

    def __init__(self, delay=0.0):
        super().__init__(("127.0.0.1", 0), JudgeHandler)
        self.delay, self.asked, self.keys = delay, [], set()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class JudgeHandler(BaseHTTPRequestHandler):
    def do_POST(self):
        assert self.path == "/v1/chat/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        question, answers, given = (line.partition(": ")[2] for line in prompt.splitlines()[2:5])
        times = self.server.asked.count(prompt)
        self.server.asked.append(prompt)
        self.server.keys.add(self.headers["Authorization"])
        time.sleep(self.server.delay + (1.0 if "slow" in question else 0))
        status = 200
        if "busy" in question and times < 2:
            status = 429
        elif "broken" in question or ("shaky" in question and times < 3):
            status = 500
        elif "forbidden" in question:
            status = 401
        said = {"nonsense": "Perhaps.", "both": "True or False", "mute": None, "polite": ' "true".\n'}
        said = next((reply for word, reply in said.items() if word in question), str(given in answers.split(" | ")))
        reply = {"choices": [{"message": {"role": "assistant", "content": said}}]}
        data = json.dumps(["what?"] if "shape" in question else reply if status == 200 else {"error": f"{self.headers}"})
        data = "<html>" if "page" in question else data
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data.encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def judging(tmp_path, monkeypatch):
    """`evaluate.py judge` of outputs by a server, as arguments."""
    monkeypatch.setattr(retriever, "WAITS", (0,) * 4)
    servers = []

    def prepare(questions, delay=0.0):
        servers.append(Judge(delay))
        outputs = [{"question": q, "answer": "b", "pred_ans": "bc"[i % 2], "extra": i} for i, q in enumerate(questions)]
        file = written(tmp_path / "o.jsonl", outputs)
        flags = {"base_url": servers[-1].url, "model": "j", "cache": tmp_path / "cache" / "c.sqlite", "concurrency": 4}
        return servers[-1], ["judge", str(file), *(f"--{name}={value}" for name, value in flags.items())]

    yield prepare
    for server in servers:
        server.shutdown()
        server.server_close()


def judged_by(arguments):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(arguments)
    return stop.value.code


def test_a_judge_that_misbehaves_is_counted(judging, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    words = "good good slow busy shaky polite nonsense both mute broken forbidden shape page".split()
    server, arguments = judging([f"{word} {i}?" for i, word in enumerate(words)])
    assert judged_by(arguments) == 1
    out, err = capsys.readouterr()
    assert "judged 6, unparsed 3, failed 4" in err and "4 requests failed" in err
    assert (
        "ACC_L over all 13 questions, those without a verdict counted as not right: 30.8%" in out
    )  # 4 of 13: good, slow, shaky, polite
    rows = lines(tmp_path / "o.judged.jsonl")
    assert [row["judge"] for row in rows] == [True, False, True, False, True, True] + [None] * 7
    assert [row["judge_reply"] for row in rows[6:]] == ["Perhaps.", "True or False", "", None, None, None, None]
    assert [row["extra"] for row in rows] == list(range(13)) and rows[0]["judge_model"] == "j"
    assert server.keys == {"Bearer sk-secret"}
    assert not any(b"sk-secret" in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert "sk-secret" not in out + err

    asked = len(server.asked)
    assert judged_by(arguments) == 1
    again = server.asked[asked:]  # what was answered costs nothing; what failed is asked again
    assert {prompt.split("Question: ")[1].split()[0] for prompt in again} == {"broken", "forbidden", "shape", "page"}
    capsys.readouterr()
    evaluate.main(["score", str(tmp_path / "o.judged.jsonl"), "--json"])
    assert json.loads(capsys.readouterr().out)["acc_l"] == 30.8


def test_a_judge_that_is_not_there(judging, tmp_path, capsys):
    _, arguments = judging(["a?", "b?"])
    assert judged_by([*arguments, "--base_url=http://127.0.0.1:9/v1"]) == 1
    out, err = capsys.readouterr()
    assert "judged 0, unparsed 0, failed 2" in err and "ACC_L: none" in out
    assert "--out is the file" in refused([*arguments, f"--out={tmp_path / 'o.jsonl'}"], capsys)


def test_another_judges_verdicts_are_not_overwritten(judging, tmp_path, capsys):
    _, arguments = judging(["good 1?", "good 2?"])
    assert judged_by(arguments) == 0 and judged_by(arguments) == 0
    kept = (tmp_path / "o.judged.jsonl").read_bytes()
    assert "holds something other than verdicts of k" in refused([*arguments, "--model=k"], capsys)
    assert (tmp_path / "o.judged.jsonl").read_bytes() == kept


def test_acc_l_comes_into_the_table(arguments, judging, tmp_path, capsys):
    evaluate.main(arguments)
    _, flags = judging([])
    assert judged_by(["judge", str(tmp_path / "out" / "transcripts.jsonl"), *flags[2:]]) == 0
    rows = lines(tmp_path / "out" / "transcripts.judged.jsonl")
    capsys.readouterr()
    evaluate.main(arguments)
    header, *_, last, _, _, _ = capsys.readouterr().out.splitlines()[1:]
    column = header.split().index("acc_l") + 2  # a name has two words
    assert last.split()[column] == f"{sum(row['judge'] for row in rows) / 7:.1%}"


def test_a_judge_killed_three_times_ends_with_the_same_file(judging, tmp_path):
    server, arguments = judging([f"good {i}?" for i in range(24)], delay=0.2)
    assert judged_by([*arguments, f"--cache={tmp_path / 'other.sqlite'}", f"--out={tmp_path / 'unbroken.jsonl'}"]) == 0
    server.asked.clear()
    for number in (5, 10, 15):
        process = subprocess.Popen([sys.executable, evaluate.__file__, *arguments], env=os.environ)
        while len(server.asked) < number:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL and not (tmp_path / "o.judged.jsonl").exists()
    assert judged_by(arguments) == 0
    assert (tmp_path / "o.judged.jsonl").read_bytes() == (tmp_path / "unbroken.jsonl").read_bytes()
    assert len(server.asked) <= 24 + 3 * 4  # only what was under way at a kill is asked twice
    asked = len(server.asked)
    assert judged_by(arguments) == 0 and len(server.asked) == asked
