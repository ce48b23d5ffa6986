"""Evaluation: records, tables, the whole command on a tiny model."""

import json

import pytest

import evaluate
from evaluate import summarize, summarize_by_dataset, table
from reward import judge


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
    results = summarize_by_dataset([made("one", "b"), made("two", "x"), made("two", "x")])
    assert [results[name]["n"] for name in ("one", "two", "all")] == [1, 2, 3]
    assert results["all"]["em"] == pytest.approx(1 / 3)
    assert list(summarize_by_dataset([made("one", "b")])) == ["one"]


def test_the_table_is_aligned():
    lines = table(summarize_by_dataset([made("one", "b"), made("another", "x")])).splitlines()
    assert len({len(line) for line in lines}) == 1 and lines[1].startswith("another") and "100.0%" in lines[3]


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


def test_every_question_is_answered_once_in_the_files_order(arguments, tmp_path, capsys):
    evaluate.main(arguments)
    rows = [json.loads(line) for line in (tmp_path / "out" / "transcripts.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"q{i}" for i in range(7)]
    assert {kind for row in rows for kind, _ in row["segments"]} == {"prompt", "policy", "documents"}
    saved = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert saved["results"] == summarize_by_dataset(rows) and saved["protocol"]["temperature"] == "0.0"
    assert "odd" in capsys.readouterr().out

    before = (tmp_path / "out" / "transcripts.jsonl").read_bytes()
    evaluate.main([*arguments, "--engine=transformers"])  # done already: it only shows
    assert (tmp_path / "out" / "transcripts.jsonl").read_bytes() == before
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*arguments, "--max_searches=1"])  # another protocol into the same folder
    assert stop.value.code == 2 and (tmp_path / "out" / "transcripts.jsonl").read_bytes() == before


def test_a_missing_file_ends_in_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*arguments, "--questions=nowhere.jsonl"])
    assert stop.value.code == 2
    assert "nowhere.jsonl" in capsys.readouterr().err


def test_plot(tmp_path, capsys):
    for name in ("stage1", "stage2"):
        (tmp_path / name).mkdir()
        panels = ("reward", "search_rate", "format_rate", "f1", "response_len", "sampler_gap")
        rows = [{"step": step, **dict.fromkeys(panels, 0.1 * step)} for step in (1, 2, 3)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "eval").mkdir()
    results = summarize_by_dataset([made("one", "b")])
    (tmp_path / "eval" / "metrics.json").write_text(json.dumps({"results": results}))
    runs = [str(tmp_path / "stage1"), str(tmp_path / "stage2")]
    evaluate.main(["plot", "--runs", *runs, "--evaluations", str(tmp_path / "eval"), "--out", str(tmp_path / "c.png")])
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
    assert "eval one" in capsys.readouterr().out
