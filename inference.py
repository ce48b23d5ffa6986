"""What training, evaluation and the measurement of difficulty share: how questions are answered.

Options of inference, fingerprints of what they name, opening a model for it, and the answers.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from engine import ENGINES
from metrics import episode_record
from records import fingerprint, reraise_missing
from retriever import open_retriever, retriever_fingerprint
from reward import TAGS, Tags, load_prompt, score_episode
from rollout import Episode, Limits, Rollout, derive_seed, prompt_encoder


@dataclass(frozen=True, kw_only=True)
class Inference(Limits):
    """Which model answers, and how. `config.Config` adds those of training."""

    model: str  # Hugging Face folder
    retriever: str  # passage file (JSONL), index folder or search server URL
    prompt_file: str = "base"  # base, chat, or a text file with {question} in it
    engine: Literal[tuple(ENGINES)] = "vllm"  # inference engine
    gpu_memory_utilization: float = 0.9  # the engine's share of the GPU
    seed: int = 0  # of the sampling, where the temperature is not 0


def model_fingerprint(model: str) -> str:
    """Fingerprint of a model folder; of a model on the Hugging Face hub, its revision."""
    from transformers.utils import cached_file

    with reraise_missing(f"{model}: neither a model folder nor a hub model"):
        folder = Path(cached_file(model, "config.json")).parent  # may be gated, or out of reach
    return fingerprint(folder) if Path(model).is_dir() else folder.name


def open_tokenizer(model: str):
    """The tokenizer of a model folder or hub model; raises ValueError if there is none."""
    from transformers import AutoTokenizer

    with reraise_missing(f"{model}: no tokenizer there"):
        tokenizer = AutoTokenizer.from_pretrained(model)
        if len(tokenizer) == len(tokenizer.all_special_ids):  # made of no files
            raise ValueError("its files are missing")
    return tokenizer


def describe_options(options: Inference) -> dict[str, Any]:
    """The options, with fingerprints of model, retriever and prompt, which they only name."""
    prompt = json.dumps(load_prompt(options.prompt_file))
    source = options.retriever
    return asdict(options) | {
        "model_fingerprint": model_fingerprint(options.model),
        "retriever_fingerprint": None if source is None else retriever_fingerprint(source),
        "prompt_fingerprint": hashlib.sha256(prompt.encode()).hexdigest(),
    }


def check_limits(options: Inference) -> None:
    """Refuse what no engine can do.

    Raises:
        ValueError: names the flag and the values that it takes.
    """
    for field in fields(Limits):
        least = 0 if field.name in ("max_searches", "temperature") else 1
        if getattr(options, field.name) < least:
            raise ValueError(f"--{field.name} must be at least {least}")
    if options.temperature and not 0.01 <= options.temperature <= 2:  # vLLM's limits
        raise ValueError("--temperature must be 0 or from 0.01 to 2")


def open_rollout(
    options: Inference, tags: Tags = TAGS, prompt_role: str = "text", sleep_mode: bool = False
) -> tuple[Rollout, Callable[[str], list[int]]]:
    """Open a model for inference: the loop over it, and the encoder from question to prompt ids.

    On a CPU the loop is deterministic; on a GPU decoding goes on while the retriever works.

    Args:
        tags: of the protocol.
        prompt_role: of the text of a prompt file, where the tokenizer has a chat template.
        sleep_mode: the engine shares the GPU with a trainer.
    """
    import torch

    check_limits(options)
    search = None  # nothing is searched without a retriever
    if options.retriever is not None:
        search = open_retriever(options.retriever).search
    tokenizer = open_tokenizer(options.model)
    # The encoder refuses a bad prompt before the engine loads.
    role = prompt_role if tokenizer.chat_template else "text"
    encode = prompt_encoder(tokenizer, load_prompt(options.prompt_file, role))
    engine = ENGINES[options.engine](
        options.model, options.max_context, options.gpu_memory_utilization, sleep_mode=sleep_mode
    )
    deterministic = not torch.cuda.is_available()
    return Rollout(engine, tokenizer, search, tags, options, deterministic), encode


def question_key(question: dict) -> tuple[str, str]:
    """Ids are unique only within a dataset: the released files all count from 1."""
    return question["dataset"], question["id"]


def answer_questions(
    rollout: Rollout,
    encode: Callable[[str], list[int]],
    questions: list[dict],
    seed: int = 0,
    reward: str = "stage2",
    search_first: bool = False,
) -> Iterator[dict]:
    """Roll the questions out; yield the `episode_record` of each as its episode finishes.

    Args:
        encode: from question to prompt ids.
        reward: a name in `reward.REWARDS`.
        search_first: begin each episode with the results of a search for the question.
    """

    def make_episode(question: dict) -> Episode:
        text = question["question"]
        queries = [text] if search_first else []
        episode_seed = derive_seed(seed, *question_key(question))
        return Episode(question, encode(text), episode_seed, queries=queries)

    for episode in rollout.run(map(make_episode, questions)):
        answers = episode.question["answers"]
        episode.rewards = score_episode(episode.segments, episode.answered, answers, reward)
        yield episode_record(episode)
