"""The benchmarks: what they compute agrees with the real thing, and they run."""

import dataclasses
import json
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from gradients import make_episodes
from test_retriever import PASSAGES, write
from tiny import command, launch, make_world
from torch.profiler import ProfilerActivity, profile

import policy
import train
from benchmarks import (
    ablations,
    baselines,
    dense_memory,
    measure,
    memory_7b,
    real_questions,
    retriever,
    soak,
)
from checkpoint import Progress
from config import Config
from tools import demo

ROOT = Path(__file__).parent.parent
RESULTS = (ROOT / "RESULTS.md").read_text()


def saved(name: str) -> list[dict]:
    """The rows of a file in results/."""
    return [json.loads(line) for line in (ROOT / "results" / name).read_text().splitlines()]


def rows_of(script: str, *arguments) -> list[dict]:
    """What a benchmark prints; its last row has the ratios."""
    words = [sys.executable, ROOT / "benchmarks" / script, *map(str, arguments)]
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert rows[-1].pop("name") == "ratios"
    return rows


# --------------------------------------------------------------------------------------------------
# Saved results


def test_the_tables_are_those_of_the_saved_runs():
    found = {row["name"]: row for row in saved("retrieval/benchmark.jsonl")}
    assert retriever.table(found) in RESULTS
    rows = [row for row in saved("memory/memory_7b.jsonl") if "case" in row]
    settings = (memory_7b.MODELS, memory_7b.RANKS, memory_7b.CONTEXTS, memory_7b.CASES)
    assert len(rows) == np.prod([len(values) for values in settings])
    assert memory_7b.table(rows) in RESULTS


def test_the_table_of_dense_indexes_is_the_computed_one():
    assert dense_memory.table() in RESULTS


def test_the_readmes_ratios_are_those_of_the_saved_runs():
    """A row names a file and an entry of its last line: a number, or a list (median first)."""
    section = RESULTS.split("\n## Speed")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if ".jsonl: " in line]
    assert len(lines) > 5
    for line in lines:
        *_, figure, source = [cell.strip() for cell in line.split("|")[1:-1]]
        name, *path = source.strip("`").split(": ")
        entry = saved(f"speed/{name}")[-1]
        for key in path:
            entry = entry[key]
        median = entry[0] if isinstance(entry, list) else entry
        assert figure == f"{median:.2f}", source


# --------------------------------------------------------------------------------------------------
# Memory that is computed or simulated


@pytest.mark.parametrize(
    "factory",
    ["Flat", "SQfp16", "SQ8", "IVF64,Flat", "IVF64,SQ8", "HNSW32,Flat", "HNSW32,SQ8", "IVF8,PQ8"],
)
def test_the_computed_size_of_a_dense_index_is_that_of_its_file(factory):
    vectors = np.random.default_rng(0).standard_normal((8000, 64), np.float32)
    as_quickly = factory.replace("PQ8", "PQ8np")  # its polysemous training takes 20 s
    index = faiss.index_factory(64, as_quickly, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    lists = int(factory[3:].split(",")[0]) if factory.startswith("IVF") else 0
    computed = dense_memory.index_bytes(factory, *vectors.shape, lists=lists)
    assert computed == pytest.approx(len(faiss.serialize_index(index)), rel=0.02)


class AttentionOperators(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the names of the attention operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "attention" in str(function):
            self.names.add(function._schema.name)
        return function(*args, **kwargs or {})


SMALL = ("llama", "llama", (2048, 128, 448, 2, 2, 1))  # as in memory_7b.MODELS


def measure_small(case: str) -> tuple[dict[str, float], int, int, set[str]]:
    """Simulated bytes of a step; parameters, allocated bytes and operators of a real one."""
    arguments = (SMALL, 8, 256, *memory_7b.CASES[case])
    with memory_7b.training(nullcontext(), *arguments) as (trainer, _, step):
        parameters = sum(parameter.numel() for parameter in trainer.policy.parameters())
        with AttentionOperators() as attention:
            step()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step()
    events = profiler.profiler.kineto_results.events()
    events = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    allocated = int(np.cumsum([event.nbytes() for event in events]).max())  # over the start
    return memory_7b.simulate(*arguments), parameters, allocated, attention.names


@pytest.mark.parametrize("case", ["as preset", "neither"])
def test_a_simulated_step_takes_what_arithmetic_says_and_what_a_real_one_allocates(case):
    # The process group is that of another process.
    simulated, parameters, allocated, attention = retriever.run_alone(measure_small, case)
    for kind, width in {"parameters": 4, "gradients": 4, "optimizer": 8}.items():
        assert simulated[kind] == pytest.approx(width * parameters / 8, rel=0.02)
    assert simulated["total"] - simulated["start"] == pytest.approx(allocated, rel=0.02)
    assert attention and all("flash_attention" in name for name in attention)  # no (T, T) scores


# --------------------------------------------------------------------------------------------------
# Each runs and ends in its ratios


def test_baselines(tmp_path, model_folder, capsys):
    make_world(tmp_path, model_folder)
    (tmp_path / "q.jsonl").rename(tmp_path / "heldout.jsonl")
    (tmp_path / "c.jsonl").rename(tmp_path / "passages.jsonl")
    for name in demo.PROMPTS:
        (tmp_path / name).write_text("Question: {question}\n<think>")
    for _ in range(2):  # the second call shows what is finished
        baselines.main(tmp_path, Path(model_folder), "transformers")
    table = capsys.readouterr().out
    for name, (mode, _, _) in baselines.BASELINES.items():
        folder = tmp_path / "baselines" / name
        assert f"\n{name} heldout " in table
        protocol = json.loads((folder / "metrics.json").read_text())["protocol"]
        assert protocol["mode"] == mode and protocol["max_turn_tokens"] == 48
        rows = [json.loads(line) for line in (folder / "transcripts.jsonl").open()]
        assert len(rows) == 8 and (mode != "single" or all(row["searches"] == 1 for row in rows))


def test_a_script_that_fails_ends_the_benchmark_with_its_line(tmp_path, capfd):
    def ends_in(work, status: int) -> str:
        with pytest.raises(SystemExit) as error:
            work()
        assert error.value.code == status
        return capfd.readouterr().err

    def search() -> None:
        with measure.search_server(passages, port=listener.getsockname()[1]):
            raise AssertionError("the port is taken")

    passages = write(tmp_path / "passages.jsonl", PASSAGES)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert "already in use" in ends_in(search, 2)
    options = {"stage": 1}
    assert "prompt.txt" in ends_in(lambda: measure.run_training(tmp_path, tmp_path, options), 2)


def test_retriever(tmp_path):
    passages = [p | {"text": f"{p['text']} extra words number {n}"} for n, p in enumerate(PASSAGES)]
    question = {"id": 1, "question": "Who directed Red Harbor?", "answers": ["Peter Lane"]}
    *rows, ratios = rows_of(
        "retriever.py",
        f"--passages={write(tmp_path / 'passages.jsonl', passages)}",
        f"--questions={write(tmp_path / 'questions.jsonl', [question])}",
        "--sizes=1000",
        "--requests=200",
    )
    found = {row["name"]: row for row in rows}
    assert found["server-1000"]["wrong"] == 0 and found["server-1000"]["requests"] == 200
    assert found["recall-tantivy"]["top3"] == found["recall-rank-bm25"]["top3"] == 1
    assert len(ratios) == 1 and min(ratios.values()) > 0
    assert "| 1,000 |" in retriever.table(found)


def test_log_probs():
    """The head takes less memory and gives the same."""
    options = ("--tokens=4096", "--vocabulary=20000", "--hidden=64", "--repeats=1")
    ratios = rows_of("log_probs.py", *options)[-1]
    assert ratios["largest_error"] < 1e-5 and ratios["memory"] < 0.5 and ratios["time"] > 0


def test_sharding(tmp_path):
    options = ("--layers=2", "--hidden=112", "--out", tmp_path)
    whole, sharded, ratios = rows_of("sharding.py", *options)
    assert whole["parameters"] == sharded["parameters"] > 3e7
    assert sharded["checkpoint_gb"] == pytest.approx(12 * sharded["parameters"] / 1e9, rel=1e-3)
    assert len(ratios) == 3 and min(ratios.values()) > 0


def test_rollout(model_folder):
    ratios = rows_of("rollout.py", "--model", model_folder, "--cells=1", "--repeats=1")[-1]
    (found,) = ratios.values()
    assert set(found) == {"ours / bare", "eager / bare", "ours / eager", "ours / barrier"}
    assert all(len(ratio) == 3 and min(ratio) > 0 for ratio in found.values())


def test_soak_of_a_server(tmp_path):
    write(tmp_path / "passages.jsonl", PASSAGES)
    growth = rows_of("soak.py", "serve", "--demo", tmp_path, "--minutes=0.1", "--settle=0.02")[-1]
    assert growth.pop("what") == "serve" and growth.keys() == soak.describe([(1.0, 1, 1)]).keys()
    assert all(0.5 < ratio < 2 for ratio in growth.values())


def test_train_step_on_what_a_run_recorded(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(make_world(tmp_path, model_folder), samples_per_prompt=8, steps=2)
    assert launch(1, *command(config, "run")).returncode == 0
    recorded = ("--episodes", "run/trajectories.jsonl", "--repeats=1")
    facts, ratios = rows_of("train_step.py", "--model", model_folder, *recorded)
    assert facts["episodes"] == 16 and 0 < facts["action_tokens"] < facts["tokens"]
    for pair in ("step / bare", "unshared / bare", "step / copying"):
        assert ratios[pair][0] > 0


@pytest.fixture
def in_forks(monkeypatch):
    """What a benchmark starts by subprocess.call runs in forks."""

    def call(words: list[str]) -> int:
        result = launch(1, *words[1:])
        print(result.stderr, file=sys.stderr)
        return result.returncode

    monkeypatch.setattr(subprocess, "call", call)


def test_real_questions_from_the_split_to_the_table_and_again(
    model_folder, tmp_path, in_forks, capsys
):
    """In small: a step of each stage, then the baselines; a second call finds all of it done."""
    data, out = tmp_path / "data", tmp_path / "real"
    data.mkdir()
    for name in real_questions.DATASETS:
        rows = [{"idx": i, "question": f"who is {i}?", "answer": "b"} for i in range(10)]
        write(data / f"{name}.jsonl", rows)
    write(data / "wiki_passages.jsonl", PASSAGES)
    options = {"steps": (1, 1), "limit": 2, "eval_every": 1, "engine": "transformers"}
    tables = []
    for _ in range(2):
        real_questions.main(data, model_folder, out, **options)
        tables.append(capsys.readouterr().out.splitlines()[-16:])
        assert all(line.startswith("eval-stage2-search - ") for line in tables[-1])
    assert tables[0] == tables[1]
    assert len((out / "starts.log").read_text().splitlines()) == 2
    names = [question["id"] for share in real_questions.SHARES for question in lines_of(out, share)]
    assert len(set(names)) == 20 and len(lines_of(out, "train")) == 14
    assert len(lines_of(out, "train_2")) == 14  # none or all: the passages are few
    assert (out / "curves.png").exists() and (out / "report.html").exists()


def test_ablations_from_training_to_the_table(
    model_folder, tmp_path, in_forks, monkeypatch, capsys
):
    """In small: one seed, a step of each stage; a second call finds all of it done."""
    demo = tmp_path / "demo"
    demo.mkdir()
    (demo / "model").symlink_to(model_folder)
    (demo / "prompt.txt").write_text("{question}\n<think>")
    write(demo / "passages.jsonl", PASSAGES)
    for name in ("train", "validation", "heldout"):
        asked = [{"id": f"{i}", "question": f"who is {i}?", "answers": ["b"]} for i in range(8)]
        write(demo / f"{name}.jsonl", [{**question, "dataset": "d"} for question in asked])
    rows = {"unmasked": (1, 0), "stage2_alone": (0, 1), "grpo": (1, 1)}  # grpo shares its stage 1
    for name, steps in ({"default": (1, 1)} | rows).items():
        row = dataclasses.replace(ablations.ROWS[name], steps=steps)
        monkeypatch.setitem(ablations.ROWS, name, row)
    monkeypatch.setattr(ablations, "EVAL_EVERY", 1)
    folders = {"work": tmp_path / "work", "logs": tmp_path / "logs"}
    for _ in range(2):
        ablations.run(demo, ("default", *rows), (0,), **folders, engine="transformers")
    started = {name: list((folders["work"] / name).glob("seed0/stage?")) for name in rows}
    assert [len(stages) for stages in started.values()] == [1, 1, 1]
    capsys.readouterr()
    ablations.table(folders["logs"], figure=tmp_path / "rows.png")
    assert (tmp_path / "rows.png").exists()
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in table[2:]] == ["default", *rows]
    assert table[2].endswith(" |  | never | never |")

    monkeypatch.setattr(ablations, "kind_of_cpu", lambda: "another")
    (folders["logs"] / "grpo/seed0/scores.jsonl").unlink()
    ablations.run(demo, ("grpo",), (0,), **folders, engine="transformers")
    ablations.table(folders["logs"])  # what two kinds of CPU have trained is compared with nothing
    assert "| grpo |" not in capsys.readouterr().out


def test_the_row_unmasked_trains_on_every_token_after_the_prompt(model_folder, monkeypatch):
    kept = train.Trainer.compute_advantages
    monkeypatch.setattr(train.Trainer, "compute_advantages", kept)  # put back after the test
    monkeypatch.setattr(train, "main", lambda flags: None)
    ablations.train_on_documents([])
    policy.start_distributed()
    episodes = make_episodes(1, 3)  # with documents
    config = Config(model=str(model_folder), samples_per_prompt=3, sampler_clip=0.0)
    trainer = train.Trainer(config, policy.load_policy(config.model))
    batch = train.make_batch(episodes, 3, trainer.device)
    sampled = int(batch.loss_mask.sum())
    trainer.compute_advantages(batch)
    metrics = trainer.update(batch, Progress())
    after_prompts = sum(len(e.token_ids) - len(e.prompt_ids) for e in episodes)
    assert sampled < metrics["trained_tokens"] == after_prompts


def test_the_difference_of_ablations_and_its_interval_by_hand():
    better = ablations.Run({"a": [1.0, 1.0], "b": [1.0]}, {})
    worse = ablations.Run({"a": [0.5, 0.5], "b": [0.5]}, {})
    assert better.all_f1 == [1.0, 1.0, 1.0]
    found = ablations.difference({0: better, 1: better, 2: better}, {0: worse, 1: worse})
    assert found == (0.5, 0.5, 0.5)
    # Seeds 0 and 1 differ by 1 and by 0: each is drawn twice in a quarter of the resamples.
    worst = ablations.Run({"a": [0.0, 0.0], "b": [0.0]}, {})
    found = ablations.difference({0: better, 1: worse}, {0: worst, 1: worse})
    assert found == (0.5, 0.0, 1.0)


def test_the_first_batch_that_reaches_a_value():
    batches = {1: {"f1": 0.5}, 2: {"f1": 0.9, "one_hop": 0.7}, 3: {"f1": 0.8}, 4: {"one_hop": 0.8}}
    run = ablations.Run({}, batches)
    assert [run.first_batch("f1", least) for least in (0.5, 0.8, 0.95)] == [1, 2, None]
    assert run.first_batch("one_hop", 0.8) == 4


def lines_of(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
