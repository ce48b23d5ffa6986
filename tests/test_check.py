"""tools/check.py: a set-up that fits together, those that do not, and the estimate of memory."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import urllib3
from transformers import AutoConfig, AutoModelForCausalLM

import search_client
from config import PRESETS, Config
from retriever import build_bm25
from tools import check

ROOT = Path(__file__).parent.parent


@pytest.fixture
def flags(world, model_folder):
    """Options of a run in the tiny world, with an index."""
    build_bm25("c.jsonl", Path("index"))
    questions = [{"id": i, "question": f"words {i}", "answers": [f"{i}"]} for i in range(5)]
    Path("q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    flags = "--preset demo --stage 1 --questions q.jsonl --prompt_file p.txt --retriever index"
    return [*flags.split(), "--model", model_folder, "--out", "run"]


def verdicts(flags, capsys) -> dict[str, str]:
    """What fails, by the name of its check."""
    status = 0
    try:
        check.main(flags)
    except SystemExit as stop:
        status = stop.code
    failed = {}
    names = []
    for line in capsys.readouterr().out.splitlines():
        verdict, name, detail = line[:9].strip(), line[11:31].strip(), line[33:]
        if verdict:  # else a line of the prompt
            names.append(name)
        if verdict == "will fail":
            failed[name] = detail
    assert names == [name.replace("_", " ") for name in check.ORDER]
    assert status == (2 if failed else 0)
    return failed


def test_what_fits_together(flags, capsys):
    check.main(flags)
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("ok ", "   ")) for line in lines)
    text = "\n".join(lines)
    assert "  | Question: Who directed the film Red Harbor?\n" in text  # the prompt's end
    assert "first 1 passages for 100%, in its first 100 for 100% of 5 questions" in text


def no_model(folder):
    return ["--model", "nowhere/at-all"]


def sliding_window(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": 8}))


def short_context(folder):
    return ["--max_context", "4096"]


def no_chat_template(folder):
    (folder / "chat_template.jinja").unlink()
    return ["--prompt_file", "chat"]


def no_tokenizer(folder):
    config = json.loads((folder / "config.json").read_text())
    for file in folder.glob("*token*"):
        file.unlink()
    config |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))


def no_question_in_the_prompt(folder):
    Path("p.txt").write_text("Answer it.")


def long_prompt(folder):
    Path("p.txt").write_text("words " * 900 + "{question}")


def torn_questions(folder):
    with open("q.jsonl", "a") as file:
        file.write('{"id": 9, "question"')


def index_of_another_corpus(folder):
    passage = {"id": "0", "title": "T", "text": "words of something else"}
    Path("other.jsonl").write_text(json.dumps(passage) + "\n")
    build_bm25("other.jsonl", Path("other"))
    return ["--retriever", "other"]


def changed_index(folder):
    next(Path("index/tantivy").glob("*.term")).write_bytes(b"")


def no_server(folder):
    return ["--retriever", "http://127.0.0.1:9"]


def little_memory(folder):
    return ["--micro_batch_tokens", "2000000000"]


def another_run(folder):
    Path("run").mkdir()
    Path("run/metrics.jsonl").write_text("")


def run_with_other_options(folder):
    Path("run").mkdir()
    Path("run/metrics.jsonl").write_text("")
    Path("run/config.json").write_text('{"learning_rate": 1.0}')
    return ["--resume"]


@pytest.mark.parametrize(
    ("breaks", "name", "message"),
    [
        (no_model, "model", "nowhere/at-all"),
        (sliding_window, "model", "attend to 8 tokens only; use another model"),
        (short_context, "model", "takes 2048 tokens; lower --max_context"),
        (no_tokenizer, "prompt", "no tokenizer"),
        (no_chat_template, "prompt", "needs a chat template"),
        (no_question_in_the_prompt, "prompt", "{question} exactly once"),
        (long_prompt, "prompt", "of --max_context 768 tokens are left"),
        (torn_questions, "training questions", "q.jsonl:6"),
        (index_of_another_corpus, "search", "is --retriever other of another corpus?"),
        (changed_index, "search", "build it again"),
        (no_server, "search", "127.0.0.1:9"),
        (little_memory, "memory", "lower --micro_batch_tokens"),
        (another_run, "run folder", "run: holds a run already; give --resume"),
        (run_with_other_options, "run folder", "config.json: begun with"),
    ],
)
def test_what_does_not(flags, model_folder, tmp_path, capsys, monkeypatch, breaks, name, message):
    monkeypatch.setattr(search_client, "RETRY_POLICY", urllib3.Retry(0))
    folder = shutil.copytree(model_folder, tmp_path / "model")
    failed = verdicts([*flags, "--model", str(folder), *(breaks(folder) or [])], capsys)
    assert message in failed[name] and "\n" not in failed[name]


def test_a_missing_model_is_looked_for_once(flags, capsys, monkeypatch):
    asked = []

    def meta_model(model):
        asked.append(model)
        raise OSError("no network\nand more")

    monkeypatch.setattr(check, "meta_model", meta_model)
    failed = verdicts(flags, capsys)
    assert len(asked) == 1 and "no network; give a model folder" in failed["model"]
    for name in ("prompt", "memory", "disk"):
        assert failed[name] == "cannot be checked without the model"


def test_missing_questions_are_named_with_the_remedy(flags, capsys):
    failed = verdicts([*flags, "--questions", "none.jsonl"], capsys)
    assert "--questions none.jsonl is not there; make it with" in failed["search"]


def test_a_disk_that_is_too_small(flags, capsys, monkeypatch):
    little = shutil._ntuple_diskusage(10**9, 10**9, 10**5)
    monkeypatch.setattr(check.shutil, "disk_usage", lambda path: little)
    assert "give --out another disk" in verdicts(flags, capsys)["disk"]


def test_a_gpu_that_is_too_small(flags, capsys):
    """Also on a machine without one."""
    on_gpus = [*flags, "--preset", "qwen", "--gpus", "2"]
    assert "memory" not in verdicts([*on_gpus, "--max_context", "768"], capsys)
    failed = verdicts([*on_gpus, "--max_context", "768", "--gpu_memory_gb", "5.1"], capsys)
    assert "lower --micro_batch_tokens or --gpu_memory_utilization" in failed["memory"]


def simulated():
    """The saved rows of benchmarks/memory_7b.py whose head works in chunks."""
    lines = (ROOT / "results/memory/memory_7b.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if row.get("case") in ("as preset", "no checkpointing")]


SHAPES = {  # hidden, MLP, layers, heads, key-value heads, vocabulary
    "Qwen2.5-7B": ("qwen2", 3584, 18944, 28, 28, 4, 152064),
    "Llama-3.1-8B": ("llama", 4096, 14336, 32, 32, 8, 128256),
}


def test_memory_is_estimated_as_simulated():
    rows = simulated()
    assert len(rows) == 32
    for row in rows:
        kind, hidden, mlp, layers, heads, kv_heads, vocabulary = SHAPES[row["model"]]
        shape = AutoConfig.for_model(
            kind,
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=vocabulary,
            tie_word_embeddings=False,
        )
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(shape)
        preset = Config(**PRESETS["qwen" if kind == "qwen2" else "llama"][1])
        config = replace(
            preset,
            micro_batch_tokens=row["context"],
            max_context=row["context"],
            gradient_checkpointing=row["case"] == "as preset",
        )
        estimate = sum(check.training_bytes(lm, config, row["ranks"])) / 1e9
        assert estimate == pytest.approx(row["total"], rel=0.05), row
