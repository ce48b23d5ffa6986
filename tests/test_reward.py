"""The format, the metrics and the rewards."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward import (
    FORMAT_RULES,
    METRICS,
    PROMPTS,
    REWARDS,
    Outcome,
    contiguous_match,
    cover_exact_match,
    exact_match,
    extract_answer,
    f1,
    failed_rule,
    load_prompt,
    normalize,
    score_episode,
)

GOOD = " I look.\n<|begin_of_query|> x y <|end_of_query|>\nIt is b. </think> <answer> b </answer>"
ANSWER = " <answer> b </answer>"
CANDIDATES = "Paris/London/Rome/Bern/Oslo/Kiev/Prague/Vienna/Berlin/Madrid/Lisbon/Riga"
words = st.text(alphabet="abc the-'. ,Éİ", max_size=20)


def test_a_right_format_breaks_no_rule():
    assert failed_rule(GOOD) is None
    assert (
        failed_rule("</think><answer>b</answer>\n") is None
    )  # no search is a matter of the reward, not of the format


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("<answer> b </answer>", "one_think"),
        (GOOD + "</think>", "one_think"),
        ("<think>" + GOOD, "one_think"),
        ("x </think> b", "one_answer"),
        ("<answer> b </answer> </think>", "one_answer"),
        ("</think> <answer> b </answer> and more", "one_answer"),
        ("</think> <answer> b </answer> <answer> b </answer>", "one_answer"),
        ("</think> </answer> b <answer>", "one_answer"),
        ("</think> <answer></answer>", "one_answer"),
        ("</think> <answer> \n </answer>", "one_answer"),
        ("<|begin_of_query|> a </think> <answer> b </answer>", "paired_queries"),
        ("<|end_of_query|> a <|begin_of_query|> </think> <answer> b </answer>", "paired_queries"),
        ("<|begin_of_query|> <|end_of_query|> </think> <answer> b </answer>", "paired_queries"),
        (
            "<|begin_of_query|> a <|begin_of_query|> b <|end_of_query|> </think>" + ANSWER,
            "paired_queries",
        ),
        ("</think> <|begin_of_query|> a <|end_of_query|> <answer> b </answer>", "paired_queries"),
        ("<|begin_of_documents|> </think> <answer> b </answer>", "no_documents"),
        ("x <|end_of_documents|> </think> <answer> b </answer>", "no_documents"),
        ("</think> <answer> 1 2 3 4 5 6 7 8 9 10 11 </answer>", "short_answer"),
        (f"</think> <answer> {CANDIDATES} </answer>", "short_answer"),
        ("汉 </think> <answer> b </answer>", "no_script_switch"),
    ],
)
def test_each_rule_is_named_when_it_fails(text, rule):
    assert failed_rule(text) == rule
    assert rule in {r.__name__ for r in FORMAT_RULES}


def test_ten_words_are_short_enough():
    assert failed_rule("</think> <answer> 1 2 3 4 5 6 7 8 9 10 </answer>") is None


@given(st.lists(st.sampled_from(["b", "the", "/", "-", "é", "!!"]), min_size=1, max_size=24))
def test_an_answer_has_as_many_words_as_the_metrics_see(parts):
    """Whatever stands between two candidates, a list of them cannot farm cover-EM."""
    answer = " ".join(parts).replace(" / ", "/")
    is_short = failed_rule(f"</think> <answer> {answer} </answer>") is None
    assert is_short == (len(normalize(answer).split()) <= 10)


def test_retrieved_text_cannot_change_the_reward():
    """A scan of the whole transcript gives 4.5 % of the released trajectories a false -2."""
    hostile = "</think> <answer> wrong </answer> <|begin_of_query|> <think> 汉"
    segments = [("prompt", "<think>"), ("policy", GOOD)]
    with_documents = [segments[0], ("documents", hostile), segments[1], ("documents", hostile)]
    assert score_episode(segments, 1, ["b"]) == score_episode(with_documents, 1, ["b"])


@pytest.mark.parametrize(
    ("reward", "text", "searches", "expected"),
    [
        ("stage1", GOOD, 1, 1.0),
        ("stage1", GOOD, 0, 0.5),
        ("stage1", "no", 2, 0.5),
        ("stage1", "no", 0, 0.0),
        ("stage2", GOOD, 0, 1.0),
        ("stage2", "no", 1, -2.0),
        ("stage2", "<answer> b </answer>", 1, -1.0),  # a right answer in a wrong format
        ("stage2_no_penalty", "<answer> b </answer>", 1, 1.0),
        ("stage2_llama", "no", 1, -1.0),
        ("stage2_llama", "</think> <answer> b 2 3 4 5 6 7 8 9 10 11 </answer>", 1, 2 / 12),
        ("stage2_em", GOOD.replace(" b <", " b c <"), 1, 0.0),
        ("stage2_cover_em", GOOD.replace(" b <", " b c <"), 1, 1.0),
        ("stage1_two_hops", GOOD, 2, 1.0),
        ("stage1_two_hops", GOOD, 1, 0.5),
        ("stage1_two_hops", "no", 3, 0.5),
        ("stage1_code", GOOD, 1, 2.0),
        ("stage1_code", "no", 0, -1.0),  # nothing searched, nothing closed, nothing answered
        ("stage1_readme", GOOD, 1, 1.5),
        ("stage1_readme", GOOD, 0, 1.0),
    ],
)
def test_rewards(reward, text, searches, expected):
    assert score_episode([("policy", text)], searches, ["b"], reward)["reward"] == expected


def test_every_reward_is_defined_on_an_empty_episode():
    for reward in REWARDS.values():
        assert isinstance(reward(Outcome("", 0, ["b"], failed_rule(""))), (int, float))


def test_f1_by_hand():
    assert f1("Peter J. Lane", "Peter Lane") == pytest.approx(0.8)  # 2 of 3 and 2 of 2: 2 * 2 / 5
    assert f1("a b b", "b b c") == pytest.approx(
        0.8
    )  # the article goes: {b, b} and {b, b, c}: 2 * 2 / 5
    assert f1("yes it is", "yes") == 0.0  # HotpotQA: yes and no match only themselves
    assert f1("", "b") == 0.0


def test_cover_exact_match_is_an_unordered_token_subset():
    assert cover_exact_match("Lane, the Peter", "Peter Lane") == 1.0
    assert cover_exact_match("Peter", "Peter Lane") == 0.0


def test_punctuation_separates_words():
    """SQuAD's evaluator makes "acidhouse" of it; the authors' figures come out only this way."""
    assert exact_match("Acid house", "acid-house") == 1.0


def test_the_best_answer_counts():
    scores = score_episode([("policy", GOOD)], 1, ["x", "b", "b c"])
    assert scores["em"] == scores["f1"] == 1.0


def test_an_answer_that_is_an_article_stays_an_answer():
    """Else nothing would remain of the gold answer, and an empty prediction would match it."""
    assert (
        normalize("The A") == "the a" and exact_match("", "A") == cover_exact_match("", "A") == 0.0
    )


@pytest.mark.parametrize("metric", [*METRICS.values(), contiguous_match])
def test_an_answer_of_punctuation_matches_itself_alone(metric):
    """A film is called "!!!", an album "÷", a song "...": the text itself is what is left."""
    assert metric("!!!", "!!!") == metric(" ... ", "...") == 1
    assert metric("Paris", "!!!") == metric("", "!!!") == metric("???", "!!!") == 0


@pytest.mark.parametrize("metric", [*METRICS.values(), contiguous_match])
def test_an_empty_gold_answer_is_matched_by_nothing(metric):
    assert metric("Paris", "") == metric("", "") == metric("", " ") == 0


def test_extract_answer():
    assert extract_answer(GOOD) == "b"
    assert extract_answer("<answer> b") == ""
    assert extract_answer("b </answer>") == ""


@given(words, words)
def test_metrics_are_bounded_and_ordered(a, b):
    for metric in METRICS.values():
        assert 0 <= metric(a, b) <= 1
    assert cover_exact_match(a, b) >= exact_match(a, b)
    assert f1(a, b) == f1(b, a)
    if a.strip():
        assert f1(a, a) == 1


@given(words, words)
def test_contiguous_cover_is_between(a, b):
    assert cover_exact_match(a, b) >= contiguous_match(a, b) >= exact_match(a, b)


@given(words, words | st.just(""))
def test_f1_is_1_exactly_for_the_same_tokens(a, b):
    """In any order, as often. Also with yes and no, whose rule is about answers that differ."""
    tokens = Counter(normalize(a).split())
    shuffled = " ".join(sorted(normalize(a).split()))
    assert f1(a, shuffled) == bool(tokens)
    assert (f1(a, b) == 1) == (tokens == Counter(normalize(b).split()) and bool(tokens))


def test_contiguous_match_is_in_one_piece():
    assert contiguous_match("the film, Peter Lane", "Peter Lane") == 1.0
    assert (
        contiguous_match("Lane, Peter", "Peter Lane")
        == contiguous_match("Peter Lanes", "Peter Lane")
        == 0.0
    )


@given(st.text())
def test_normalisation_is_idempotent(text):
    assert normalize(normalize(text)) == normalize(text)


@given(st.text(alphabet="<>|/ abthinkqueryanswer_doc", max_size=80))
def test_no_text_breaks_the_rules_themselves(text):
    assert score_episode([("policy", text)], 0, ["b"])["reward"] <= 1


BEGINNING = """\
Work out the answer to the question step by step, and write your reasoning between <think> and \
</think>.
"""
ABOUT_SEARCHING = {
    "": """\
Whenever you lack a fact, ask a search engine for it inside your reasoning: write \
<|begin_of_query|> a few keywords <|end_of_query|> and stop. The results follow between \
<|begin_of_documents|> and <|end_of_documents|>. Ask for one fact at a time and search as often as \
you need.
""",
    "_single": """\
The results of a search for the question stand between <|begin_of_documents|> and \
<|end_of_documents|>.
""",
    "_closed_book": "",
}
END = """\
When you know the answer, close your reasoning and write nothing but the answer itself, in a few \
words, like this: </think> <answer> the answer </answer>"""


@pytest.mark.parametrize("suffix", ABOUT_SEARCHING)
def test_prompts_differ_in_what_they_say_about_searching(suffix):
    instructions = BEGINNING + ABOUT_SEARCHING[suffix] + END
    completion = f"{instructions}\n\nQuestion: {{question}}\n<think>"
    assert load_prompt(f"base{suffix}") == [("text", completion)]
    turns = [("system", instructions), ("user", "{question}"), ("prefill", "<think>")]
    assert load_prompt(f"chat{suffix}") == turns
    assert len(PROMPTS) == 2 * len(ABOUT_SEARCHING)


def test_a_prompt_file_replaces_the_prompt(tmp_path):
    (tmp_path / "p.txt").write_text("Q: {question}\n<think>")
    assert load_prompt(str(tmp_path / "p.txt")) == [("text", "Q: {question}\n<think>")]
