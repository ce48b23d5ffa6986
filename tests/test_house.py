"""The form of the repository: sizes, which module imports which, what an import costs."""

import ast
import io
import os
import subprocess
import sys
import tokenize
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALGORITHM = ["reward", "rollout", "reinforce_pp", "sampler", "train", "config"]
MODULES = sorted(path.stem for path in ROOT.glob("*.py"))
TOOLS = sorted(path.stem for path in ROOT.glob("tools/*.py"))

# Which modules of the repository each one imports; tools/ import any of these and no tool.
IMPORTS = {
    "reward": set(),
    "records": set(),
    "engine": set(),
    "reinforce_pp": set(),
    "rollout": {"engine"},
    "policy": {"engine", "records", "reinforce_pp"},
    "packing": set(),
    "signals": {"rollout"},
    "checkpoint": {"policy", "records", "signals"},
    "bm25": {"records"},
    "dense": {"records"},
    "search_client": {"records"},
    "retriever": {"bm25", "dense", "records", "search_client"},
    "answerability": {"records", "retriever", "reward"},
    "metrics": {"reward", "rollout"},
    "inference": {"engine", "metrics", "records", "retriever", "reward", "rollout"},
    "config": {"inference", "reinforce_pp", "reward"},
    "run_folder": {
        "checkpoint", "config", "inference", "policy", "records", "rollout", "signals"
    },
    "protocol": {"inference", "metrics", "records", "reward"},
    "evaluate": {
        "answerability", "inference", "metrics", "protocol", "records", "reward", "search_client"
    },
    "difficulty": {"inference", "records", "reward", "rollout"},
    "data_prep": {"difficulty", "records", "reward"},
    "sampler": {"config", "inference", "metrics", "policy", "records", "rollout"},
    "train": {
        "checkpoint", "config", "metrics", "packing", "policy", "records", "reinforce_pp", "reward",
        "rollout", "run_folder", "sampler", "signals",
    },
}  # fmt: skip

# --------------------------------------------------------------------------------------------------
# Sizes

DOCUMENTED = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module
NOT_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


@dataclass
class Size:
    lines: int
    tokens: int  # Python's, without comments, docstrings and line ends
    widest: int  # characters of the widest line
    longest: int  # lines of the longest function
    function: str  # its name


@cache
def size_of(path: Path) -> Size:
    source = path.read_text()
    docstrings = set()  # lines where one begins
    functions = [(0, "")]
    for node in ast.walk(ast.parse(source)):
        has_docstring = isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None
        if has_docstring:
            docstrings.add(node.body[0].lineno)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            functions.append((node.end_lineno - node.lineno + 1, node.name))
    tokens = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        is_docstring = token.type == tokenize.STRING and token.start[0] in docstrings
        tokens += token.type not in NOT_CODE and not is_docstring
    lines = source.splitlines()
    longest, function = max(functions)
    return Size(len(lines), tokens, max(map(len, lines)), longest, function)


GROUPS = {  # files, most lines, most tokens
    "the algorithm": ([f"{name}.py" for name in ALGORITHM], 1_690, 9_770),
    "all flat modules": ([f"{name}.py" for name in MODULES], 5_760, 32_450),
    "tools": ([f"tools/{name}.py" for name in TOOLS], 1_425, None),
    "benchmarks": (
        sorted(f"benchmarks/{p.name}" for p in ROOT.glob("benchmarks/*.py")),
        1_920,
        None,
    ),
}


@pytest.mark.parametrize("group", GROUPS)
def test_sizes(group, capsys):
    files, most_lines, most_tokens = GROUPS[group]
    sizes = {file: size_of(ROOT / file) for file in files}
    with capsys.disabled():
        print(f"\n{group}: lines, code tokens, widest line, longest function")
        for file, s in sizes.items():
            print(f"  {file:28} {s.lines:5} {s.tokens:6} {s.widest:4} {s.longest:4} {s.function}")
        lines = sum(s.lines for s in sizes.values())
        tokens = sum(s.tokens for s in sizes.values())
        print(f"  {'in all':28} {lines:5} {tokens:6}")
    assert lines <= most_lines
    assert most_tokens is None or tokens <= most_tokens
    for file, s in sizes.items():
        assert s.lines <= 450 and s.widest <= 100 and s.longest <= 50, file


# --------------------------------------------------------------------------------------------------
# Imports


def imported_by(path: Path) -> set[str]:
    """Names of modules that a file imports anywhere, functions included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name.split(".")[0] for name in names}


def test_imports_run_one_way():
    assert sorted(IMPORTS) == MODULES
    for name, expected in IMPORTS.items():
        assert imported_by(ROOT / f"{name}.py") & {*MODULES, "tools"} == expected, name
    placed = set()
    while len(placed) < len(MODULES):  # each module stands on those that are placed already
        ready = {name for name in MODULES if IMPORTS[name] <= placed}
        assert ready - placed, "the imports form a circle"
        placed |= ready
    for name in TOOLS:
        siblings = imported_by(ROOT / f"tools/{name}.py") - set(MODULES)
        assert not siblings & {"tests", "benchmarks"}, name


HEAVY = {
    "vllm", "transformers", "faiss", "tantivy", "sentence_transformers", "openai", "starlette",
    "uvicorn", "matplotlib", "pyarrow", "huggingface_hub", "rank_bm25", "tensorboard",
}  # fmt: skip


def import_seconds(module: str) -> tuple[float, set[str]]:
    """CPU seconds of a process that imports the module, and the heavy libraries that it loads."""
    program = f"import sys, {module}; print(*sys.modules)"
    before = os.times()
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    after = os.times()
    spent = after.children_user - before.children_user
    spent += after.children_system - before.children_system
    return spent, HEAVY & set(result.stdout.split())


@cache
def most_seconds() -> float:
    seconds, _ = import_seconds("torch")
    return max(2.0, 2 * seconds)


@pytest.mark.parametrize("module", [*MODULES, *(f"tools.{name}" for name in TOOLS)])
def test_an_import_is_quick_and_needs_no_heavy_library(module):
    """It takes at most 2 s, or on a slow or busy CPU twice what PyTorch alone takes there."""
    for _ in range(3):  # other work on the machine only adds to it
        seconds, heavy = import_seconds(module)
        assert heavy == set()
        if seconds <= most_seconds():
            return
    pytest.fail(f"{seconds:.1f} s, more than {most_seconds():.1f}")
