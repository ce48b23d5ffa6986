"""What the README says is what the code does: commands parse, metrics and files exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks.retriever as benchmark
import data_prep
import evaluate
import retriever
import train
from tools import report, search_server

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
COMMANDS = [
    line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command, monkeypatch, model_folder):
    monkeypatch.setattr(train.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        train.Path, "is_file", lambda self: True
    )  # a model folder of a run that is not here
    words = shlex.split(command)
    if words[0] == "make":
        assert (
            subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True).returncode
            == 0
        )
        return
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        get_args_parser().parse_args(words[1:])
    parse = {
        "train.py": train.parse_arguments,
        "evaluate.py": evaluate.parse_arguments,
        "data_prep.py": data_prep.parse_arguments,
        "retriever.py": retriever.parse_arguments,
        "tools/report.py": report.parse_arguments,
        "tools/search_server.py": search_server.parse_arguments,
        "benchmarks/retriever.py": benchmark.parse_arguments,
    }
    parse[words[script]](words[script + 1 :])


def test_the_demo_evaluates_with_the_limits_it_trains_with():
    """They stand in the preset and in the Makefile; in the official code training and evaluation drifted apart."""
    lines = subprocess.run(
        ["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True
    ).stdout.splitlines()
    commands = [shlex.split(line)[2:] for line in lines if "evaluate.py run" in line]
    assert len(commands) == 3
    for command in commands:
        args = evaluate.parse_arguments(command)
        for name in (
            "documents_per_search",
            "max_searches",
            "max_turn_tokens",
            "max_context",
            "prompt_file",
        ):
            assert (
                getattr(args, name)
                == train.PRESETS["demo"][1][name]
                == train.PRESETS["demo"][2][name]
            )


def test_there_are_commands():
    assert len(COMMANDS) > 8


SCRIPTS = [
    "train.py",
    "evaluate.py",
    "data_prep.py",
    "retriever.py",
    "tools/demo.py",
    "tools/report.py",
    "tools/search_server.py",
]
BENCHMARKS = "retriever rollout train_step trl_step log_probs difficulty faults soak"
SCRIPTS += [f"benchmarks/{name}.py" for name in BENCHMARKS.split()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script):
    result = subprocess.run(
        [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0 and "usage" in result.stdout


def test_every_metric_is_defined(model_folder, tmp_path, monkeypatch):
    """The README's table and a run's metrics.jsonl name the same things."""
    import dataclasses
    import json

    from tiny import make_world

    monkeypatch.chdir(tmp_path)
    world = dataclasses.replace(
        make_world(tmp_path, model_folder), steps=1, eval_every=1, eval_questions="q.jsonl"
    )
    train.train(world, Path("run"), False, None)
    logged = {
        re.sub(r"^eval_.*", "eval_...", name)
        for name in json.loads(Path("run/metrics.jsonl").read_text())
    }
    logged = {re.sub(r"^failed_.*", "failed_RULE", name) for name in logged}
    section = README.split("## Metrics")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert logged == {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def test_the_demo_table_is_that_of_the_saved_run():
    folders = [
        ROOT / "results" / "demo" / name
        for name in ("eval-untrained", "eval-stage1-8", "eval-stage2-24")
    ]
    table = evaluate.table(evaluate.read_results(folders))
    assert table in README and table in (ROOT / "RESULTS.md").read_text()


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
