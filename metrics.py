"""Metrics over many episodes: records, means, 95 % intervals, tables, and the judge's verdict.

Training logs `summarize` of its episodes; an evaluation reports `measure_by_dataset` of its own.
"""

import re
from collections.abc import Callable

import numpy as np

from reward import FORMAT_RULES, METRICS
from rollout import Episode

# Columns of a table, where the results have them.
COLUMNS = """
    n em f1 acc_r acc_r_contiguous acc_l search_rate searches format_rate truncated_rate
    search_failed_rate answerable_100 answerable
""".split()
ANSWERABILITY = ("answerable_100", "answerable")  # of a question (answerability.py)
LENGTH_PERCENTILES = (50, 90, 99)
COUNT_FORMATS = {"n": ".0f", "searches": ".2f"}  # all other columns are shares


def episode_record(episode: Episode) -> dict:
    """One line of `transcripts.jsonl`; the episode must have its rewards."""
    return {
        **episode.question,
        **episode.rewards,
        "searches": len(episode.queries),
        "queries": episode.queries,
        "finish_reason": episode.finish_reason,
        "search_failures": episode.search_failures,
        "response_len": sum(episode.action_mask),
        "segments": episode.segments,
    }


def record_metrics(record: dict) -> dict[str, float]:
    """Metrics of one episode, of which an evaluation reports the means."""
    failed = record["failed_rule"]
    return {
        "reward": record["reward"],
        **{name: record[name] for name in METRICS},
        "search_rate": record["searches"] > 0,
        "searches": record["searches"],
        "format_rate": failed is None,
        **{f"failed_{rule.__name__}": failed == rule.__name__ for rule in FORMAT_RULES},
        "truncated_rate": record["finish_reason"] == "length",
        "response_len": record["response_len"],
        "search_failed_rate": record["search_failures"] > 0,
        **{name: record[name] for name in ANSWERABILITY if name in record},
    }


def mean_metrics(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def group_by_dataset(records: list[dict]) -> dict[str, list[dict]]:
    """The records of each dataset, by its name in alphabetical order."""
    names = sorted({record["dataset"] for record in records})
    return {name: [r for r in records if r["dataset"] == name] for name in names}


def summarize(records: list[dict]) -> dict[str, float]:
    """Metrics that training logs of its episodes and of its evaluations.

    Failed searches are a share of the queries here, `search_failures`, not of the questions.
    Reward and F1 are given for each dataset too.
    """
    metrics = {"n": len(records)} | mean_metrics([record_metrics(record) for record in records])
    del metrics["search_failed_rate"]
    failures = sum(record["search_failures"] for record in records)
    queries = sum(record["searches"] for record in records)
    metrics["search_failures"] = failures / max(1, queries)
    lengths = [record["response_len"] for record in records]
    for percent in LENGTH_PERCENTILES:
        metrics[f"response_len_p{percent}"] = float(np.percentile(lengths, percent))
    for dataset, own in group_by_dataset(records).items():
        for name in ("reward", "f1"):
            metrics[f"{name}_{dataset}"] = sum(record[name] for record in own) / len(own)
    return metrics


def measure(rows: list[dict[str, float]]) -> dict:
    """Mean of each metric over questions, with a 95 % interval for each in `intervals`.

    The intervals are percentiles of 2,000 bootstrap resamples of the questions, seed 0.
    """
    n = len(rows)
    values = np.array([list(row.values()) for row in rows], float)  # (n, metrics)
    random = np.random.default_rng(0)
    resampled = []
    for _ in range(20):  # 100 resamples at a time, to bound the memory
        times_drawn = random.multinomial(n, np.full(n, 1 / n), size=100)  # (100, n)
        resampled.append(times_drawn @ values / n)
    bounds = np.percentile(np.concatenate(resampled), [2.5, 97.5], axis=0).round(6)  # (2, metrics)
    intervals = dict(zip(rows[0], bounds.T.tolist(), strict=True))
    return {"n": n, **mean_metrics(rows), "intervals": intervals}


def measure_by_dataset(
    records: list[dict], metrics_of: Callable[[dict], dict[str, float]] = record_metrics
) -> dict[str, dict]:
    """`measure` of each dataset and, where there are several, of all records as "all"."""
    groups = group_by_dataset(records)
    if len(groups) > 1:
        groups.pop("all", None)  # a dataset of this name has no row of its own
        groups["all"] = records
    return {name: measure([metrics_of(record) for record in own]) for name, own in groups.items()}


def format_cell(column: str, value: float | list[float] | None) -> str:
    """Percent, or a plain number in a column of counts; "low-high" for an interval."""
    if value is None:
        return ""
    if isinstance(value, list):
        low, high = (format_cell(column, bound) for bound in value)
        return f"{low.removesuffix('%')}-{high}"
    return format(value, COUNT_FORMATS.get(column, ".1%"))


def table(results: dict[str, dict]) -> str:
    """Results by name as an aligned table; intervals stand beneath the numbers."""
    columns = [name for name in COLUMNS if any(name in result for result in results.values())]
    rows = [["", *columns]]
    for name, result in results.items():
        rows.append([name, *(format_cell(c, result.get(c)) for c in columns)])
        if "intervals" in result:  # the oldest saved results have none
            intervals = result["intervals"]
            rows.append(["  95 %", *(format_cell(c, intervals.get(c)) for c in columns)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *padded]))
    return "\n".join(lines)


# ACC_L is the verdict of a language model on an answer (in the paper: GPT-4o-mini).
JUDGE_PROMPT = """\
A question was answered. Is the given answer right, that is, does it mean the same as one of the \
accepted answers?

Question: {question}
Accepted answers: {answers}
Given answer: {prediction}

Reply with exactly one word, True or False."""


def verdict(reply: str | None) -> bool | None:
    """The judge's one word, True or False; None for any other reply."""
    word = re.fullmatch(r"[\s\"'`*.]*(true|false)[\s\"'`*.]*", str(reply), re.IGNORECASE)
    return None if word is None else word[1].lower() == "true"
