"""The benchmarks: what they compute agrees with the real thing, and they run."""

import dataclasses
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from test_retriever import PASSAGES, write
from tiny import command, make_world, torchrun

from benchmarks import dense_memory, fake_step, memory_7b, soak
from benchmarks import retriever as benchmark

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "factory",
    ["Flat", "SQfp16", "SQ8", "IVF64,Flat", "IVF64,SQ8", "HNSW32,Flat", "HNSW32,SQ8", "IVF8,PQ8"],
)
def test_the_computed_size_of_a_dense_index_is_that_of_its_file(factory):
    vectors = np.random.default_rng(0).standard_normal((8000, 64), np.float32)
    index = faiss.index_factory(64, factory, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    lists = int(factory[3:].split(",")[0]) if factory.startswith("IVF") else 0
    computed = dense_memory.index_bytes(factory, *vectors.shape, lists=lists)
    assert computed == pytest.approx(len(faiss.serialize_index(index)), rel=0.02)


def test_the_readme_holds_the_computed_table():
    assert dense_memory.table() in (ROOT / "README.md").read_text()


def test_the_measured_table_is_that_of_the_saved_run():
    lines = map(
        json.loads, (ROOT / "results" / "retrieval" / "benchmark.jsonl").read_text().splitlines()
    )
    table = benchmark.table({line["name"]: line for line in lines})
    assert table in (ROOT / "README.md").read_text() and table in (ROOT / "RESULTS.md").read_text()


def test_the_retrieval_benchmark_runs_and_ends_in_the_ratios(tmp_path):
    passages = write(
        tmp_path / "passages.jsonl",
        [{**p, "text": p["text"] + f" extra words number {n}"} for n, p in enumerate(PASSAGES)],
    )
    questions = write(
        tmp_path / "questions.jsonl",
        [{"id": 1, "question": "Who directed Red Harbor?", "answers": ["Peter Lane"]}],
    )
    command = [
        sys.executable,
        ROOT / "benchmarks" / "retriever.py",
        "--json",
        "--passages",
        passages,
        "--questions",
        questions,
    ]
    command += ["--sizes", "1000", "--requests", "200", "--work", tmp_path / "work"]
    result = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    found = {line.pop("name"): line for line in lines}
    assert found["server-1000"]["wrong"] == 0 and found["server-1000"]["requests"] == 200
    assert found["recall-tantivy"]["top3"] == found["recall-rank-bm25"]["top3"] == 1
    assert list(found)[-1] == "ratios" and len(found["ratios"]) == 2


def test_the_simulated_table_is_that_of_the_saved_run_which_agrees_with_arithmetic():
    *rows, ratios = map(
        json.loads, (ROOT / "results" / "memory" / "memory_7b.jsonl").read_text().splitlines()
    )
    assert memory_7b.table(rows) in (ROOT / "README.md").read_text()
    assert len(rows) == len(memory_7b.MODELS) * len(memory_7b.RANKS) * len(
        memory_7b.CONTEXTS
    ) * len(memory_7b.CASES)
    assert ratios.pop("name") == "ratios" and set(ratios) == set(memory_7b.WIDTHS)
    assert all(ratio == pytest.approx(1, rel=0.02) for ratio in ratios.values())


class AttentionOperators(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "attention" in str(function):
            self.names.add(function._schema.name)
        return function(*args, **kwargs or {})


SMALL = ("llama", "llama", 2048, 128, 448, 2, 2, 1)  # as in memory_7b.MODELS


def small_steps() -> list[tuple[dict[str, int], int, set[str]]]:
    """Of two cases: simulated bytes, what a real step allocates at its peak over its start, the attention's operators."""
    found = []
    for name in ("as preset", "neither"):
        case = (SMALL, 8, 256, *memory_7b.CASES[name])
        with fake_step.training(nullcontext(), *case) as (*_, step):
            with AttentionOperators() as attention:
                step()
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            ) as run:
                step()
        events = [
            event for event in run.profiler.kineto_results.events() if event.name() == "[memory]"
        ]
        alive = np.cumsum(
            [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        )
        found.append((fake_step.simulate(*case), int(alive.max()), attention.names))
    return found


def test_a_simulated_step_takes_what_arithmetic_says_and_what_a_real_one_allocates():
    for simulated, allocated, attention in benchmark.alone(
        small_steps
    ):  # the process group is theirs alone
        for kind, width in memory_7b.WIDTHS.items():
            assert simulated[kind] == pytest.approx(
                width * memory_7b.parameter_count(*SMALL[1:]) / 8, rel=0.02
            )
        assert simulated["total"] - simulated["start"] == pytest.approx(allocated, rel=0.02)
        assert attention and all(
            "flash_attention" in name for name in attention
        )  # no scores of (T, T)


def last_line(script: str, *arguments) -> dict:
    """What a benchmark prints last."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--json", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    line = json.loads(result.stdout.splitlines()[-1])
    assert line.pop("name") == "ratios"
    return line


def test_the_head_takes_less_memory_and_gives_the_same():
    found = last_line(
        "log_probs.py", "--tokens", 4096, "--vocabulary", 20_000, "--hidden", 64, "--repeats", 1
    )
    assert found["largest_error"] < 1e-5 and found["memory"] < 0.5 and found["time"] > 0


def test_the_rollout_benchmark_runs_and_ends_in_the_ratios(model_folder):
    (found,) = last_line(
        "rollout.py", "--model", model_folder, "--cells", 1, "--repeats", 1
    ).values()
    assert set(found) == {"ours / bare", "eager / bare", "ours / eager", "ours / barrier"}
    assert all(len(ratio) == 3 and min(ratio) > 0 for ratio in found.values())


def test_the_soak_benchmark_watches_a_server_under_load(tmp_path):
    write(tmp_path / "passages.jsonl", PASSAGES)
    found = last_line("soak.py", "serve", "--demo", tmp_path, "--minutes", 0.1, "--settle", 0.02)
    assert found.pop("what") == "serve" and found.keys() == soak.describe([(1.0, 1, 1)]).keys()
    assert all(0.5 < growth < 2 for growth in found.values())


def test_the_train_step_benchmark_runs_on_what_a_run_recorded(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(make_world(tmp_path, model_folder), samples_per_prompt=8, steps=2)
    assert torchrun(1, *command(config, "run")).returncode == 0
    found = last_line(
        "train_step.py",
        "--model",
        model_folder,
        "--episodes",
        "run/trajectories.jsonl",
        "--repeats",
        1,
    )
    assert found["step / bare"][0] > 0 and found["unshared / bare"][0] > 0


def test_the_readmes_ratios_are_those_of_the_saved_runs():
    """A row names a file and an entry of its last line; its figure is that entry, or the median it begins with."""
    section = (ROOT / "README.md").read_text().split("\n## Speed")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in section.splitlines()
        if line.startswith("| ")
    ][1:]
    assert len(rows) > 5
    for *_, figure, source in rows:
        name, *path = [part.strip("` ") for part in source.split(":")]
        entry = json.loads((ROOT / "results" / "speed" / name).read_text().splitlines()[-1])
        for key in path:
            entry = entry[key]
        assert figure == f"{entry[0] if isinstance(entry, list) else entry:.2f}", source
