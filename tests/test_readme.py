"""What README, RESULTS.md and docs/ say is what the code does: commands, metrics, tables, links."""

import functools
import json
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import tyro
from tiny import launch
from torch.distributed.run import get_args_parser

import config
import data_prep
import evaluate
import retriever
import signals
import train
from config import Arguments
from evaluate import read_results
from metrics import format_cell
from tools import check, report
from tools.check import Check

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "RESULTS.md", *sorted(ROOT.glob("docs/*.md"))]
README, RESULTS = (path.read_text() for path in DOCUMENTS[:2])
TEXT = "\n".join(path.read_text() for path in DOCUMENTS)
LINES = "".join(re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)).splitlines()
LINES += re.findall(r"`((?:python|make) [^`]+)`", TEXT)
COMMANDS = sorted({line for line in LINES if not line.startswith(("#", "git ", "wget "))})
NO_OPTIONS = ("benchmarks/dense_memory.py", "benchmarks/memory_7b.py")
SCRIPTS = sorted({word for line in COMMANDS for word in line.split() if word.endswith(".py")})
DEMO = sorted(ROOT.glob("results/demo/seed*"))


def parse(script: str, arguments: list[str]) -> list:
    """Parse a script's arguments for real; return what its command gets instead of running it."""
    received = []

    def silence(command):  # `wraps`: tyro reads the parameters of the original
        return functools.wraps(command)(lambda *args, **kw: received.extend([*args, *kw.values()]))

    def cli(command, original=tyro.cli, **options):
        original(silence(command), **options)

    def from_dict(commands, original=tyro.extras.subcommand_cli_from_dict, **options):
        original({name: silence(commands[name]) for name in commands}, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tyro, "cli", cli)
        patch.setattr(tyro.extras, "subcommand_cli_from_dict", from_dict)
        patch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return received


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_parses(line, monkeypatch):
    program, *words = shlex.split(line.removeprefix(".venv/bin/"), comments=True)
    if program == "torchrun":
        options = get_args_parser().parse_args(words)
        words = [options.training_script, *options.training_script_args]
    script, *arguments = words
    if program == "make":
        subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, check=True)
    elif script in ("train.py", "tools/check.py"):
        monkeypatch.setattr(config.torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(config.Path, "is_file", lambda path: True)  # the model of stage 1
        config.parse_arguments(arguments, "", Check if script == "tools/check.py" else Arguments)
    else:
        assert parse(script, arguments) or script in NO_OPTIONS


def test_the_demo_evaluates_with_the_limits_it_trains_with():
    """They stand in the preset and in the Makefile."""
    shown = subprocess.check_output(["make", "-n", "demo"], cwd=ROOT, text=True)
    lines = [shlex.split(line) for line in shown.splitlines() if "evaluate.py run" in line]
    assert len(lines) == 3
    names = "documents_per_search max_searches max_turn_tokens max_context prompt_file".split()
    for _, script, *arguments in lines:
        [evaluation] = parse(script, arguments)
        values = vars(evaluation)
        for preset in config.PRESETS["demo"].values():
            assert [values[name] for name in names] == [preset[name] for name in names]


FROM_NOTHING = re.search(r"From nothing.*?```bash\n(.*?)```", README, re.DOTALL)[1].splitlines()
# What the lines of the block get besides their own options: a tiny model, and little of everything.
TINY_LIMITS = "--engine transformers --max_context 1200 --max_turn_tokens 16".split()
TINY_RUN = [*TINY_LIMITS, *"--preset demo --prompt_file base --retriever data/bm25".split()]
TINY_RUN += "--steps 1 --prompts_per_step 2 --samples_per_prompt 2".split()


def stand_in(folder: Path) -> None:
    """What git, wget and the hub fetch, in small."""
    for stage in (1, 2):
        path = folder / f"released/data/training_set/stage_{stage}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"idx": i, "question": f"who is {i}?", "answer": "b"} for i in range(8)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    articles = [
        {
            "wikipedia_id": str(i),
            "wikipedia_title": f"Who {i}",
            "text": [f"Who {i}\n", f"{i} is b."],
        }
        for i in range(8)
    ]
    lines = [json.dumps(article) + "\n" for article in articles]
    (folder / "kilt_knowledgesource.json").write_text("".join(lines))
    hub = folder / "hub/bamboogle/test.jsonl"
    hub.parent.mkdir(parents=True)
    hub.write_text('{"id": "test_0", "question": "who is 3?", "golden_answers": ["b", "c"]}\n')
    (folder / "search-r1.txt").write_text("Answer it. Question: {question}\n")


def run_line(line: str, model: str) -> None:
    """A line of the block, on the tiny model."""
    program, *words = shlex.split(line, comments=True)
    if program in ("git", "wget"):
        assert words[-1] == "released" or Path(words[-1].rpartition("/")[2]).exists()
    elif program == "torchrun":
        stage = words[words.index("--stage") + 1]
        files = ["--questions", f"data/stage_{stage}.jsonl", "--out", f"runs/stage{stage}"]
        before = model if stage == "1" else "runs/stage1/model"
        train = str(ROOT / words[words.index("train.py")])
        options = ["--stage", stage, *TINY_RUN, *files, "--model", before]
        result = launch(1, train, *options)
        assert result.returncode == 0, result.stderr[-3000:]
    else:
        script, *arguments = words
        if script == "tools/check.py":
            arguments += [*TINY_RUN, "--questions", "data/stage_1.jsonl", "--model", model]
        if script == "evaluate.py":
            arguments += TINY_LIMITS
            arguments = [model if "/SearchR1" in word else word for word in arguments]
        modules = [data_prep, retriever, check, evaluate]
        (module,) = [m for m in modules if m.__name__ == script[:-3].replace("/", ".")]
        module.main(arguments)


def test_the_block_from_nothing(tmp_path, model_folder, monkeypatch, capsys):
    """Every line of it, on small stand-ins: both stages train, both protocols evaluate."""

    def hf_hub_download(repo_id, filename, *, repo_type, revision):
        assert (repo_id, repo_type) == ("RUC-NLPIR/FlashRAG_datasets", "dataset")
        return str(tmp_path / "hub" / filename)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    stand_in(tmp_path)
    for line in FROM_NOTHING:
        if not line.startswith("#"):
            run_line(line, model_folder)
    shown = capsys.readouterr().out
    assert "will fail" not in shown and shown.count("metrics: ") == 2
    for out, metric in (("runs/eval", "f1"), ("runs/search-r1", "em")):
        results = json.loads(Path(out, "metrics.json").read_text())["results"]["bamboogle"]
        assert metric in results and results["n"] == 1 and results["answerable"] == 1.0


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script):
    shown = subprocess.check_output([sys.executable, script, "--help"], cwd=ROOT, text=True)
    assert "usage" in shown or script == "benchmarks/dense_memory.py"


def test_every_metric_is_defined(world, monkeypatch):
    monkeypatch.setattr(signals, "PROBE_SIZE", 1)
    options = {"steps": 1, "eval_every": 1, "eval_questions": "q.jsonl", "kl_coef": 0.1}
    train.train(replace(world, sampler_mask=9.0, **options), Path("run"))
    logged = re.findall(r'"(\w+)":', Path("run/metrics.jsonl").read_text())
    logged = {re.sub("^eval_.*", "eval_...", name) for name in logged}
    logged = {re.sub("^failed_.*", "failed_RULE", name) for name in logged}
    logged = {re.sub("_q$", "_DATASET", name) for name in logged}
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE)
    assert logged == {name for row in rows for name in re.findall(r"`(.+?)`", row)}


def test_the_demos_results_are_those_of_the_saved_runs():
    """In the README the mean over seeds and the three one-hop kinds, which have equal shares."""
    assert report.learning_table(DEMO) in RESULTS
    (row,) = [line for line in README.splitlines() if line.startswith("| demo")]
    measured = []
    for name in report.EVALUATIONS.values():
        one_hop = []
        for folder in DEMO:
            results = read_results(list(folder.glob(name)))
            one_hop += [result["f1"] for of, result in results.items() if "1hop" in of]
        assert len(one_hop) == 3 * len(DEMO)
        measured.append(format_cell("f1", sum(one_hop) / len(one_hop)))
    assert re.findall(r"[0-9.]+%", row) == measured


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document):
    for link in re.findall(r"\]\(([^):]+)\)", document.read_text()):
        target, _, anchor = link.partition("#")
        linked = document.parent / target if target else document
        assert linked.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)", linked.read_text(), re.MULTILINE)
            assert anchor in [heading.lower().replace(" ", "-") for heading in headings], link


def test_the_readme_is_short():
    assert len(README.split()) <= 1800
