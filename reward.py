"""What a trajectory should look like, and what it earns.

Tags and prompts come first, then the format rules, the answer metrics, and the rewards built from
both. Everything here is plain text in and plain numbers out: no torch, no tokenizer.

Only what the policy itself wrote is judged. Retrieved passages never reach a rule or a metric, so a
passage that contains `</answer>` can neither earn nor cost anything. (The official code scans the
whole transcript; on the authors' released outputs this punishes 4.5 % of the trajectories for text
that the policy did not write.)
"""

import re
import string
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# --------------------------------------------------------------------------------------------------
# Tags


class Tag(NamedTuple):
    opening: str
    closing: str


class Tags(NamedTuple):
    """The markers of the search protocol, and how search results are written between them.

    To train with other markers, change the defaults here; protocol.py has those of another paper.
    """

    think: Tag = Tag("<think>", "</think>")
    answer: Tag = Tag("<answer>", "</answer>")
    query: Tag = Tag("<|begin_of_query|>", "<|end_of_query|>")
    documents: Tag = Tag("<|begin_of_documents|>", "<|end_of_documents|>")
    passage: str = "({number}){title}   {text}"  # one search result, one line
    no_passages: str = "(no results)"
    around_passages: str = "\n"  # between the documents tags and the search results
    after_closing: str = ""  # after the closing documents tag


TAGS = Tags()

# --------------------------------------------------------------------------------------------------
# Prompts: a list of (role, text) with `{question}` in it. Role "text" is a plain completion
# prompt; the other roles go through the tokenizer's chat template. Every prompt opens the `<think>`
# that the policy has to close.

_SEARCH_AT_WILL = f"""
Whenever you lack a fact, ask a search engine for it inside your reasoning: write \
{TAGS.query.opening} a few keywords {TAGS.query.closing} and stop. The results follow between \
{TAGS.documents.opening} and {TAGS.documents.closing}. Ask for one fact at a time and search as \
often as you need."""
_SEARCHED_ALREADY = f"""
The results of a search for the question stand between {TAGS.documents.opening} and \
{TAGS.documents.closing}."""


def _make_prompts(suffix: str, about_searching: str) -> dict[str, list[tuple[str, str]]]:
    """A completion prompt and a chat prompt; the suffix says for which mode of evaluate.py."""
    instructions = f"""\
Work out the answer to the question step by step, and write your reasoning between \
{TAGS.think.opening} and {TAGS.think.closing}.{about_searching}
When you know the answer, close your reasoning and write nothing but the answer itself, in a few \
words, like this: {TAGS.think.closing} {TAGS.answer.opening} the answer {TAGS.answer.closing}"""
    completion = f"{instructions}\n\nQuestion: {{question}}\n{TAGS.think.opening}"
    turns = [("system", instructions), ("user", "{question}"), ("prefill", TAGS.think.opening)]
    return {f"base{suffix}": [("text", completion)], f"chat{suffix}": turns}


PROMPTS = {
    **_make_prompts("", _SEARCH_AT_WILL),
    **_make_prompts("_single", _SEARCHED_ALREADY),
    **_make_prompts("_closed_book", ""),
}


def load_prompt(name: str, role: str = "text") -> list[tuple[str, str]]:
    """The prompt of that name, or the text file at that path with `{question}` in it.

    Args:
        role: of a file's text.
    Raises:
        ValueError, OSError: the file is not UTF-8, or it cannot be read.
    """
    if name in PROMPTS:
        return PROMPTS[name]
    try:
        return [(role, Path(name).read_text(encoding="utf-8"))]
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 ({error})") from None


# --------------------------------------------------------------------------------------------------
# Format rules. A rule takes the policy's own text (its turns joined, documents left out) and says
# whether the text keeps the rule.

MAX_ANSWER_WORDS = 10
_CJK = re.compile(r"[\u4e00-\u9fff]")
_QUERY_TAG = re.compile("|".join(re.escape(tag) for tag in TAGS.query))


def one_think(text: str) -> bool:
    """The reasoning is closed exactly once and never opened again (the prompt opened it)."""
    return text.count(TAGS.think.closing) == 1 and TAGS.think.opening not in text


def one_answer(text: str) -> bool:
    """There is exactly one answer, not empty, after the reasoning, and nothing follows it."""
    opening, closing = TAGS.answer
    is_single = text.count(opening) == text.count(closing) == 1
    _, _, after_think = text.rpartition(TAGS.think.closing)
    return is_single and extract_answer(after_think) != "" and text.rstrip().endswith(closing)


def paired_queries(text: str) -> bool:
    """Queries open and close in turn, none is empty, and none comes after the reasoning."""
    reasoning, _, after = text.partition(TAGS.think.closing)
    if _QUERY_TAG.search(after):
        return False
    tags = _QUERY_TAG.findall(reasoning)
    if tags != list(TAGS.query) * (len(tags) // 2):
        return False
    queries = _QUERY_TAG.split(reasoning)[1::2]  # between an opening tag and its closing tag
    return all(query.strip() for query in queries)


def no_documents(text: str) -> bool:
    """The policy does not write search results itself."""
    return not any(tag in text for tag in TAGS.documents)


def short_answer(text: str) -> bool:
    """The answer has at most ten words, as the metrics count them: no list of guesses."""
    return len(normalize(extract_answer(text)).split()) <= MAX_ANSWER_WORDS


def no_script_switch(text: str) -> bool:
    """There are no Chinese characters (the official code punishes a drift into another script)."""
    return _CJK.search(text) is None


FORMAT_RULES: tuple[Callable[[str], bool], ...] = (
    one_think,
    one_answer,
    paired_queries,
    no_documents,
    no_script_switch,
    short_answer,
)


def failed_rule(text: str) -> str | None:
    """Name of the first format rule that `text` breaks, None if the format is right."""
    return next((rule.__name__ for rule in FORMAT_RULES if not rule(text)), None)


def extract_answer(text: str) -> str:
    """The text of the last `<answer>` ... `</answer>`, stripped; empty if there is none."""
    _, opened, tail = text.rpartition(TAGS.answer.opening)
    answer, closed, _ = tail.partition(TAGS.answer.closing)
    return answer.strip() if opened and closed else ""


# --------------------------------------------------------------------------------------------------
# Answer metrics, in [0, 1], for one prediction and one gold answer

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION_TO_BLANKS = str.maketrans(string.punctuation, " " * len(string.punctuation))


def normalize(text: str) -> str:
    """Lower case, punctuation to blanks, no articles, single blanks.

    SQuAD's evaluator deletes punctuation instead, so that "acid-house" and "acid house" differ.
    With blanks the authors' released outputs score what the authors report (HotpotQA: EM 58.0,
    F1 71.9, ACC_R 65.4). Where a step would leave nothing, as of the answers "A" and "!!!", it is
    left out.
    """
    text = text.lower()
    unpunctuated = text.translate(_PUNCTUATION_TO_BLANKS)
    words = _ARTICLES.sub(" ", unpunctuated).split() or unpunctuated.split() or text.split()
    return " ".join(words)


def exact_match(prediction: str, gold: str) -> float:
    prediction, gold = normalize(prediction), normalize(gold)
    return float(gold != "" and prediction == gold)


def f1(prediction: str, gold: str) -> float:
    """Harmonic mean of token precision and recall, as in HotpotQA's evaluator.

    "yes", "no" and "noanswer" match only themselves.
    """
    prediction, gold = normalize(prediction), normalize(gold)
    if prediction != gold and {prediction, gold} & {"yes", "no", "noanswer"}:
        return 0.0
    predicted_tokens, gold_tokens = prediction.split(), gold.split()
    common = sum((Counter(predicted_tokens) & Counter(gold_tokens)).values())
    if common == 0:
        return 0.0
    return 2 * common / (len(predicted_tokens) + len(gold_tokens))


def cover_exact_match(prediction: str, gold: str) -> float:
    """ACC_R of the official evaluator: every gold token occurs in the prediction, in any order."""
    gold_tokens = set(normalize(gold).split())
    is_covered = gold_tokens <= set(normalize(prediction).split())
    return float(bool(gold_tokens) and is_covered)


def contiguous_match(prediction: str, gold: str) -> float:
    """The stricter reading of ACC_R, for comparison: the gold answer occurs in one piece."""
    prediction, gold = normalize(prediction), normalize(gold)
    return float(gold != "" and f" {gold} " in f" {prediction} ")


METRICS: dict[str, Callable[[str, str], float]] = {
    "em": exact_match,
    "f1": f1,
    "acc_r": cover_exact_match,
}


def best(metric: Callable[[str, str], float], prediction: str, answers: list[str]) -> float:
    """The best value of `metric` over all gold answers."""
    return max(metric(prediction, gold) for gold in answers)


# --------------------------------------------------------------------------------------------------
# Rewards. A reward takes the `Outcome` of an episode; `REWARDS` names it for --reward.


class Outcome(NamedTuple):
    """Everything that a reward may look at."""

    text: str  # what the policy wrote, its turns joined
    searches: int  # queries within the limit that the search engine answered
    answers: list[str]  # gold answers
    failed_rule: str | None  # None: the format is right

    def score(self, metric: str) -> float:
        return best(METRICS[metric], extract_answer(self.text), self.answers)

    @property
    def well_formed(self) -> bool:
        return self.failed_rule is None


def stage1(o: Outcome) -> float:
    """Learn to call search (paper, section 3.2.1): 0.5 for searching, 0.5 for the format."""
    return 0.5 * (o.searches >= 1) + 0.5 * o.well_formed


def stage1_two_hops(o: Outcome) -> float:
    """Stage 1 for questions of two hops: 0.5 for searching twice, 0.5 for the format."""
    return 0.5 * (o.searches >= 2) + 0.5 * o.well_formed


def stage1_code(o: Outcome) -> float:
    """Stage 1 of the official Llama script: cover-EM +1 or -1, 0.5 each for tags and answer."""
    tags = paired_queries(o.text) and no_documents(o.text) and o.searches >= 1
    think_and_answer = one_think(o.text) and one_answer(o.text)
    covered = 1.0 if o.score("acc_r") else -1.0
    return covered + 0.5 * tags + 0.5 * think_and_answer


def stage1_readme(o: Outcome) -> float:
    """Stage 1 of the official README: F1, plus 0.5 if the episode searched and is well-formed."""
    return o.score("f1") + 0.5 * (o.searches >= 1 and o.well_formed)


def stage2(o: Outcome) -> float:
    """Learn to solve with search (paper, section 3.2.2): F1, less 2 for a broken format."""
    return o.score("f1") - 2.0 * (not o.well_formed)


def stage2_no_penalty(o: Outcome) -> float:
    """Stage 2 without the penalty for a broken format."""
    return o.score("f1")


def stage2_em(o: Outcome) -> float:
    """The paper's ablation of stage 2 with exact match."""
    return o.score("em") - 2.0 * (not o.well_formed)


def stage2_cover_em(o: Outcome) -> float:
    """The paper's ablation of stage 2 with cover exact match."""
    return o.score("acc_r") - 2.0 * (not o.well_formed)


def stage2_llama(o: Outcome) -> float:
    """Stage 2 of the official Llama script: less 1, and no rule on the answer's length."""
    well_formed = all(rule(o.text) for rule in FORMAT_RULES if rule is not short_answer)
    return o.score("f1") - 1.0 * (not well_formed)


REWARDS: dict[str, Callable[[Outcome], float]] = {
    "stage1": stage1,
    "stage1_two_hops": stage1_two_hops,
    "stage1_code": stage1_code,
    "stage1_readme": stage1_readme,
    "stage2": stage2,
    "stage2_no_penalty": stage2_no_penalty,
    "stage2_em": stage2_em,
    "stage2_cover_em": stage2_cover_em,
    "stage2_llama": stage2_llama,
}


def score_episode(
    segments: list[tuple[str, str]], searches: int, answers: list[str], reward: str = "stage2"
) -> dict[str, float | str | None]:
    """Score one episode.

    Args:
        segments: (kind, text) in order; only kind "policy" is looked at.
        searches: queries within the limit that the search engine answered.
        answers: gold answers, at least one.
        reward: a name in `REWARDS`.
    Returns:
        `reward`, each of `METRICS`, `answer` (the prediction) and `failed_rule` (None: right
        format).
    """
    text = "".join(text for kind, text in segments if kind == "policy")
    outcome = Outcome(text, searches, answers, failed_rule(text))
    return {
        "reward": float(REWARDS[reward](outcome)),
        **{name: outcome.score(name) for name in METRICS},
        "answer": extract_answer(text),
        "failed_rule": outcome.failed_rule,
    }
