"""Rates of several ways to do the same, measured in turns, and their ratios."""

import argparse
import statistics
import time
from collections.abc import Callable


def arguments(description: str, **options) -> argparse.Namespace:
    """--repeats, --json, and `options` with their defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in ({"repeats": 5} | options).items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"default {default}")
    parser.add_argument("--json", action="store_true", help="lines of JSON, in the last one the ratios")
    return parser.parse_args()


def take_turns(ways: dict[str, Callable[[], int]], repeats: int) -> dict[str, list[float]]:
    """What each way returns (tokens) over its seconds, `repeats` times; every other time in the opposite order."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats):
        for name in list(ways)[:: -1 if repeat % 2 else 1]:
            start = time.perf_counter()
            rates[name].append(ways[name]() / (time.perf_counter() - start))
    return rates


def compare(rates: dict[str, list[float]], *pairs: str) -> dict[str, float | list[float]]:
    """The median rates, and for each "a / b" the median, least and greatest ratio of rates measured one after another."""
    result: dict = {f"{name}_tokens_per_s": round(statistics.median(values), 1) for name, values in rates.items()}
    for pair in pairs:
        a, b = pair.split(" / ")
        ratios = [x / y for x, y in zip(rates[a], rates[b], strict=True)]
        result[pair] = [round(f(ratios), 3) for f in (statistics.median, min, max)]
    return result
