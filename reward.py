"""What a trajectory is asked to look like, and what it earns.

The format first (tags, prompts, rules), then the answer metrics, then the rewards built from both. Everything here is
plain text in, plain numbers out: no torch, no tokenizer.

Only what the policy itself wrote is judged. Retrieved passages never reach a rule or a metric, so a passage that contains
`</answer>` can neither earn nor cost anything (the official code scans the whole transcript; on the authors' released
outputs that would punish 4.5 % of the trajectories for text that they did not write).
"""

import re
import string
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# ---------------------------------------------------------------------------------------------------------------------
# The format: tags


class Tags(NamedTuple):
    """The markers of the search protocol, (opening, closing) each. To change the protocol, change them here."""

    think: tuple[str, str] = ("<think>", "</think>")
    answer: tuple[str, str] = ("<answer>", "</answer>")
    query: tuple[str, str] = ("<|begin_of_query|>", "<|end_of_query|>")
    documents: tuple[str, str] = ("<|begin_of_documents|>", "<|end_of_documents|>")


TAGS = Tags()

# ---------------------------------------------------------------------------------------------------------------------
# The format: prompts. A template is a list of (role, text) with `{question}` in it; role "text" is a plain completion
# prompt, the others go through the tokenizer's chat template. Every prompt opens the `<think>` that the policy closes.

_INSTRUCTIONS = f"""\
Work out the answer to the question step by step, and write your reasoning between {TAGS.think[0]} and {TAGS.think[1]}.
Whenever you lack a fact, ask a search engine for it inside your reasoning: write \
{TAGS.query[0]} a few keywords {TAGS.query[1]} and stop. The results follow between {TAGS.documents[0]} and \
{TAGS.documents[1]}. Ask for one fact at a time and search as often as you need.
When you know the answer, close your reasoning and write nothing but the answer itself, in a few words, like this: \
{TAGS.think[1]} {TAGS.answer[0]} the answer {TAGS.answer[1]}"""

# Two examples for a model too small to follow instructions. New lines around the tags and a sentence that repeats the
# document's wording are what it copies best.
_EXAMPLES = f"""\
Question: Who directed the film Red Harbor?
{TAGS.think[0]}
I need to find Red Harbor.
{TAGS.query[0]} Red Harbor {TAGS.query[1]}

{TAGS.documents[0]}
(1)Red Harbor   Red Harbor is a film. It was shot in Dover. It was directed by Peter Lane.
{TAGS.documents[1]}
It was directed by Peter Lane.
{TAGS.think[1]}
{TAGS.answer[0]} Peter Lane {TAGS.answer[1]}

Question: Where was Laura Webb born?
{TAGS.think[0]}
I need to find Laura Webb.
{TAGS.query[0]} Laura Webb {TAGS.query[1]}

{TAGS.documents[0]}
(1)Laura Webb   Laura Webb is a singer. She was born in Salem. She is married to Mark Fox.
{TAGS.documents[1]}
She was born in Salem.
{TAGS.think[1]}
{TAGS.answer[0]} Salem {TAGS.answer[1]}

Question: {{question}}
{TAGS.think[0]}"""

PROMPTS: dict[str, list[tuple[str, str]]] = {
    "base": [("text", f"{_INSTRUCTIONS}\n\nQuestion: {{question}}\n{TAGS.think[0]}")],
    "chat": [("system", _INSTRUCTIONS), ("user", "{question}"), ("prefill", TAGS.think[0])],
    "demo": [("text", _EXAMPLES)],
}


def load_prompt(name: str) -> list[tuple[str, str]]:
    """The prompt of that name, or the text file of that path with `{question}` in it.

    Raises:
        ValueError, OSError: the file is not UTF-8, or it cannot be read.
    """
    try:
        return PROMPTS[name] if name in PROMPTS else [("text", Path(name).read_text(encoding="utf-8"))]
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 ({error})") from None


# ---------------------------------------------------------------------------------------------------------------------
# The format: rules. Each takes the policy's own text (its turns joined, documents left out) and says whether it holds.

MAX_ANSWER_WORDS = 10
_CJK = re.compile(r"[\u4e00-\u9fff]")


def one_think(text: str) -> bool:
    """The reasoning is closed exactly once and never opened again (the prompt opened it)."""
    return text.count(TAGS.think[1]) == 1 and TAGS.think[0] not in text


def one_answer(text: str) -> bool:
    """There is exactly one answer, it follows the reasoning, and nothing follows it."""
    opening, closing = TAGS.answer
    if text.count(opening) != 1 or text.count(closing) != 1:
        return False
    think_end = text.rfind(TAGS.think[1])
    return think_end < text.index(opening) < text.index(closing) and text.rstrip().endswith(closing)


def paired_queries(text: str) -> bool:
    """Queries open and close in turn, none is empty, and none comes after the reasoning."""
    opening, closing = TAGS.query
    thinking, *after = text.split(TAGS.think[1])
    if any(tag in part for part in after for tag in TAGS.query):
        return False
    pieces = re.split(f"({re.escape(opening)}|{re.escape(closing)})", thinking)
    marks, bodies = pieces[1::2], pieces[2::4]
    return marks == [opening, closing] * (len(marks) // 2) and all(body.strip() for body in bodies)


def no_documents(text: str) -> bool:
    """The policy does not write search results itself."""
    return not any(tag in text for tag in TAGS.documents)


def short_answer(text: str) -> bool:
    """The answer has at most ten words, so that F1 cannot be farmed with a list of candidates."""
    return len(extract_answer(text).split()) <= MAX_ANSWER_WORDS


def no_script_switch(text: str) -> bool:
    """No Chinese characters (the official code's rule: a policy that drifts into another script is penalised)."""
    return _CJK.search(text) is None


FORMAT_RULES: tuple[Callable[[str], bool], ...] = (
    one_think,
    one_answer,
    paired_queries,
    no_documents,
    no_script_switch,
    short_answer,  # last, so that its name says that every other rule holds
)


def failed_rule(text: str) -> str | None:
    """Name of the first format rule that `text` breaks, None if the format is right."""
    return next((rule.__name__ for rule in FORMAT_RULES if not rule(text)), None)


def extract_answer(text: str) -> str:
    """The text of the last `<answer>` ... `</answer>`, stripped; empty if there is none."""
    opening, closing = TAGS.answer
    _, found, tail = text.rpartition(opening)
    answer, closed, _ = tail.partition(closing)
    return answer.strip() if found and closed else ""


# ---------------------------------------------------------------------------------------------------------------------
# Answer metrics, in [0, 1], the best over the gold answers

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans(string.punctuation, " " * len(string.punctuation))


def normalize(text: str) -> str:
    """Lower case, punctuation to blanks, no articles, single blanks.

    SQuAD's evaluator deletes punctuation instead, which makes "acid-house" and "acid house" differ; with a blank the
    authors' own outputs score what the authors report (EM 58.0, F1 71.9, ACC_R 65.4 on HotpotQA).
    """
    words = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", words).split() or words.split())  # an answer "A" stays an answer


def exact_match(prediction: str, gold: str) -> float:
    return float(normalize(prediction) == normalize(gold))


def f1(prediction: str, gold: str) -> float:
    """Harmonic mean of token precision and recall (HotpotQA's evaluator: yes, no and noanswer match only themselves)."""
    predicted, wanted = normalize(prediction), normalize(gold)
    if predicted != wanted and {predicted, wanted} & {"yes", "no", "noanswer"}:
        return 0.0
    predicted_tokens, wanted_tokens = predicted.split(), wanted.split()
    common = sum((Counter(predicted_tokens) & Counter(wanted_tokens)).values())
    return 2 * common / (len(predicted_tokens) + len(wanted_tokens)) if common else 0.0


def cover_exact_match(prediction: str, gold: str) -> float:
    """ACC_R as the official evaluator has it: every gold token occurs in the prediction, in any order."""
    return float(set(normalize(gold).split()) <= set(normalize(prediction).split()))


def contiguous_match(prediction: str, gold: str) -> float:
    """The gold answer occurs in the prediction in one piece: the stricter reading of ACC_R, for comparison only."""
    return float(f" {normalize(gold)} " in f" {normalize(prediction)} ")


METRICS: dict[str, Callable[[str, str], float]] = {"em": exact_match, "f1": f1, "acc_r": cover_exact_match}


def best(metric: Callable[[str, str], float], prediction: str, answers: list[str]) -> float:
    """The best value of `metric` over all accepted answers."""
    return max(metric(prediction, gold) for gold in answers)


# ACC_L is what a language model says of an answer (paper: GPT-4o-mini).
JUDGE_PROMPT = """\
A question was answered. Is the given answer right, that is, does it mean the same as one of the accepted answers?

Question: {question}
Accepted answers: {answers}
Given answer: {prediction}

Reply with exactly one word, True or False."""


def verdict(reply: str | None) -> bool | None:
    """What the judge says in one word, True or False; None for anything else."""
    word = re.fullmatch(r"[\s\"'`*.]*(true|false)[\s\"'`*.]*", str(reply), re.IGNORECASE)
    return word and word[1].lower() == "true"


# ---------------------------------------------------------------------------------------------------------------------
# Rewards


class Outcome(NamedTuple):
    """All that a reward may look at."""

    text: str  # what the policy wrote, its turns joined
    searches: int  # queries that were answered
    answers: list[str]  # gold answers
    failed_rule: str | None  # None: the format is right

    def score(self, metric: str) -> float:
        return best(METRICS[metric], extract_answer(self.text), self.answers)


def stage1(o: Outcome) -> float:
    """Learn to call search (paper, section 3.2.1): 0.5 for searching, 0.5 for the format."""
    return 0.5 * (o.searches >= 1) + 0.5 * (o.failed_rule is None)


def stage1_code(o: Outcome) -> float:
    """Stage 1 of the official Llama script: cover-EM +1 / -1, 0.5 for the tags, 0.5 for think and answer."""
    tags = paired_queries(o.text) and no_documents(o.text) and o.searches >= 1
    return (1.0 if o.score("acc_r") else -1.0) + 0.5 * tags + 0.5 * (one_think(o.text) and one_answer(o.text))


def stage1_readme(o: Outcome) -> float:
    """Stage 1 of the official README: 0.5 on top of the answer's reward when searched and well-formed."""
    return o.score("f1") + 0.5 * (o.searches >= 1 and o.failed_rule is None)


def _answer_reward(metric: str) -> Callable[[Outcome], float]:
    """Learn to solve with search (paper, section 3.2.2): the answer's score, less a penalty for a broken format."""
    return lambda o: o.score(metric) - 2.0 * (o.failed_rule is not None)


def stage2_llama(o: Outcome) -> float:
    """Stage 2 of the official Llama script: a penalty of 1, and no rule on the answer's length."""
    return o.score("f1") - (o.failed_rule not in (None, "short_answer"))


REWARDS: dict[str, Callable[[Outcome], float]] = {
    "stage1": stage1,
    "stage1_code": stage1_code,
    "stage1_readme": stage1_readme,
    "stage2": _answer_reward("f1"),
    "stage2_em": _answer_reward("em"),
    "stage2_cover_em": _answer_reward("acc_r"),
    "stage2_llama": stage2_llama,
}


def judge(segments: list[tuple[str, str]], searches: int, answers: list[str], reward: str = "stage2") -> dict:
    """Score one trajectory: `reward`, each of `METRICS`, `answer` (the prediction), `failed_rule` (None: right format).

    Of `segments`, (kind, text) in order, only kind "policy" is looked at; `answers` are gold, at least one.
    """
    text = "".join(text for kind, text in segments if kind == "policy")
    outcome = Outcome(text, searches, answers, failed_rule(text))
    scores = {name: outcome.score(name) for name in METRICS}
    said = {"answer": extract_answer(text), "failed_rule": outcome.failed_rule}
    return {"reward": float(REWARDS[reward](outcome))} | scores | said
