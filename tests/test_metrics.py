"""Metrics over records: means by hand, bootstrap intervals, tables."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metrics import measure, measure_by_dataset, record_metrics, summarize, table, verdict
from reward import score_episode


def record(dataset="d", answer="b", searches=1, failures=0, reason="answer"):
    text = f"</think> <answer> {answer} </answer>" if answer else "lost"
    return {
        "dataset": dataset,
        **score_episode([("policy", text)], searches, ["b"]),
        "searches": searches,
        "finish_reason": reason,
        "response_len": 4,
        "search_failures": failures,
    }


RECORDS = [
    record(searches=3, failures=2),
    record(answer="b c", failures=1),
    record(answer="", searches=0, reason="length"),
    record(answer="x"),
]


def test_summary_by_hand():
    metrics = summarize(RECORDS)
    assert metrics["n"] == 4 and metrics["em"] == 0.25 and metrics["acc_r"] == 0.5
    assert metrics["f1"] == pytest.approx((1 + 2 / 3) / 4)
    assert metrics["reward"] == pytest.approx((1 + 2 / 3 - 2) / 4)
    assert (metrics["search_rate"], metrics["searches"]) == (0.75, 1.25)
    assert (metrics["format_rate"], metrics["failed_one_think"]) == (0.75, 0.25)
    assert (metrics["truncated_rate"], metrics["response_len"]) == (0.25, 4)


def test_lengths_as_percentiles_and_rewards_by_dataset_by_hand():
    records = [record("one"), record("one", "x"), record("two", "b c")]
    for length, each in zip((10, 20, 40), records, strict=True):
        each["response_len"] = length
    metrics = summarize(records)
    assert (metrics["response_len_p50"], metrics["response_len_p90"]) == (20, 36)
    assert metrics["response_len_p99"] == pytest.approx(39.6)
    assert (metrics["reward_one"], metrics["f1_one"]) == (0.5, 0.5)
    assert (metrics["reward_two"], metrics["f1_two"]) == pytest.approx((2 / 3, 2 / 3))


def test_failed_searches_are_a_share_of_queries_in_training_and_of_questions_in_evaluation():
    assert summarize(RECORDS)["search_failures"] == 3 / 5
    assert measure_by_dataset(RECORDS)["d"]["search_failed_rate"] == 2 / 4
    assert summarize([record(searches=0)])["search_failures"] == 0


def test_datasets_are_measured_apart_and_together():
    results = measure_by_dataset([record("two", "x"), record("one"), record("two", "x")])
    assert [(name, result["n"]) for name, result in results.items()] == [
        ("one", 1),
        ("two", 2),
        ("all", 3),
    ]
    assert results["all"]["em"] == pytest.approx(1 / 3)
    assert list(measure_by_dataset([record("one")])) == ["one"]
    named_all = measure_by_dataset([record("all"), record("all"), record("zz", "x")])
    assert [(name, result["n"]) for name, result in named_all.items()] == [("zz", 1), ("all", 3)]


def test_intervals_are_those_of_the_binomial():
    rows = [record_metrics(record(answer="b" if i % 4 else "x")) for i in range(400)]
    result = measure(rows)
    half_width = 1.96 * (0.75 * 0.25 / 400) ** 0.5  # of the normal approximation
    assert result["em"] == 0.75
    assert result["intervals"]["em"] == pytest.approx(
        [0.75 - half_width, 0.75 + half_width], abs=0.005
    )
    assert result["intervals"]["searches"] == [1.0, 1.0]  # nothing varies
    assert result["intervals"].keys() == result.keys() - {"n", "intervals"}
    assert measure(rows) == result


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-2, 1), min_size=1, max_size=20))
def test_a_mean_lies_within_the_values_and_its_interval_too(values):
    result = measure([{"reward": value} for value in values])
    low, high = result["intervals"]["reward"]
    assert min(values) - 1e-6 <= low <= high <= max(values) + 1e-6
    assert min(values) - 1e-6 <= result["reward"] <= max(values) + 1e-6


def test_the_table_is_aligned():
    results = measure_by_dataset([record("one"), record("another", "x")])
    lines = table(results).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split()[-1] == "search_failed_rate"
    assert lines[1].startswith("another") and "100.0%" in lines[3] and "0.0-100.0%" in lines[6]


def test_results_without_intervals_make_a_table():
    results = measure_by_dataset([record("one"), record("another", "x")])
    for result in results.values():
        del result["intervals"], result["search_failed_rate"]
    assert len(table(results).splitlines()) == 4 and "search_failed_rate" not in table(results)


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("True", True),
        ("false", False),
        (' "True".\n', True),
        ("**False**", False),
        ("not True", None),
        ("TrueFalse", None),
        ("True False", None),
        ("Yes", None),
        ("", None),
        (None, None),
    ],
)
def test_a_verdict_is_one_word(reply, said):
    assert verdict(reply) is said
