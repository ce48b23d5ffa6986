"""How hard a question is: the number of rollouts that a model needs until its first right answer.

The paper draws its training sets by this number. `data_prep.py difficulty` measures it in rounds:
each rolls out, together, all questions that have no right answer yet.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tqdm import tqdm

from inference import Inference, describe_options, open_rollout
from records import (
    Journal,
    fingerprint,
    read_questions,
    refuse_to_overwrite,
    reraise_corrupt,
    write_jsonl,
)
from reward import METRICS, score_episode
from rollout import Episode, Rollout, derive_seed


@dataclass(frozen=True, kw_only=True)
class DifficultyOptions(Inference):
    """Options of `data_prep.py difficulty`, all but --out."""

    questions: Path  # question file (JSONL)
    model: str  # Hugging Face folder (paper: Qwen2.5-7B-Instruct)
    max_rollouts: int = 20  # give a question up after so many; 20 tell that it is hard
    # the metric that is 1 for a right answer; acc_r is the authors': each of their 350 stage-1
    # questions has a right one by acc_r among its 10 published answers, by em or f1 264 have
    right: Literal[tuple(METRICS)] = "acc_r"
    prompt_file: str = "chat"  # base, chat, or a text file with {question} in it


def level(rollouts: int, solved: bool) -> str:
    """The paper's levels; a question that was given up too early to tell is "undecided"."""
    if not solved:
        return "hard" if rollouts >= 20 else "undecided"
    if rollouts < 10:
        return "easy"
    return "medium" if rollouts <= 20 else "hard"


def roll_out_until_right(
    rollout: Rollout,
    encode: Callable[[str], list[int]],
    questions: list[dict],
    verdicts: dict[str, list[bool]],
    max_rollouts: int,
    right: str,
    seed: int,
) -> Iterator[tuple[str, bool]]:
    """Roll every question out until its first right answer or `max_rollouts`.

    Args:
        verdicts: by question id, whether each rollout so far was right; grows.
        right: name of the metric that is 1 for a right answer.
    Yields:
        After each rollout, the question's id and whether the answer was right.

    Raises:
        RuntimeError: a search failed; without documents any question would seem hard.
    """

    def episodes_of_round(number: int) -> Iterator[Episode]:
        """One episode of each unsolved question that has had `number` rollouts."""
        for place, question in enumerate(questions):
            done = verdicts[question["id"]]
            if len(done) == number and True not in done:
                prompt_ids = encode(question["question"])
                yield Episode(question, prompt_ids, seed=derive_seed(seed, place, number))

    for number in range(max_rollouts):
        for episode in rollout.run(episodes_of_round(number)):
            if episode.search_failures:
                raise RuntimeError(
                    f"a search failed, {rollout.search_error}; the same command goes on from here"
                )
            question = episode.question
            scores = score_episode(episode.segments, episode.answered, question["answers"])
            is_right = scores[right] == 1
            verdicts[question["id"]].append(is_right)
            yield question["id"], is_right


def make_difficulty(
    options: Annotated[DifficultyOptions, tyro.conf.arg(name="")], out: Path
) -> None:
    """Write the questions with `rollouts` and `solved`; a killed call goes on where it was.

    Args:
        out: question file to write
    """
    refuse_to_overwrite(out)
    if options.max_rollouts < 1:
        raise ValueError("--max_rollouts must be at least 1")
    questions = read_questions(options.questions)
    settings = describe_options(options)
    settings["questions"] = fingerprint(options.questions)
    del settings["gpu_memory_utilization"]  # no rollout depends on it
    rollout, encode = open_rollout(options)
    # The journal is opened last, so that a call with a wrong option leaves none behind.
    journal = Journal(out.with_name(out.name + ".progress"), settings)
    verdicts = {question["id"]: [] for question in questions}
    with reraise_corrupt(journal.path, "remove it to begin again"):
        for name, is_right in journal.records:
            verdicts[name].append(is_right)
    rollouts = roll_out_until_right(
        rollout, encode, questions, verdicts, options.max_rollouts, options.right, options.seed
    )
    at_most = len(questions) * options.max_rollouts
    for name, is_right in tqdm(
        rollouts, desc="at most", total=at_most, initial=len(journal.records)
    ):
        journal.append([name, is_right])
    for question in questions:
        question["rollouts"] = len(verdicts[question["id"]])
        question["solved"] = True in verdicts[question["id"]]
    write_jsonl(out, questions)
    journal.path.unlink()
    levels = Counter(level(question["rollouts"], question["solved"]) for question in questions)
    print(f"{out}: " + ", ".join(f"{count} {name}" for name, count in levels.items()))
