"""Web search as a retriever, for tools/search_server.py: title and snippet of each hit."""

import html
import json
import os
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from records import Passage, parse_passage, replace_surrogates, reraise_corrupt
from search_client import expected_shape, fetch_json

# A search engine takes about a second to answer: requests overlap to make use of the rate.
MAX_CONCURRENT_REQUESTS = 32


class Serper:
    """Google's results, by serper.dev."""

    url = "https://google.serper.dev/search"
    key_variable = "SERPER_API_KEY"
    rate = 5.0  # requests a second that the smallest plan allows

    def search(self, query: str, k: int, key: str) -> list[Passage]:
        body = {"q": query, "num": k}
        answer = fetch_json("POST", self.url, headers={"X-API-KEY": key}, json=body)
        with expected_shape(self.url):
            hits = answer.get("organic", [])
            return [make_passage(hit["link"], hit["title"], hit.get("snippet")) for hit in hits]


class Brave:
    """Brave's own results; a query has at most 50 words and 400 characters, an answer 20 hits."""

    url = "https://api.search.brave.com/res/v1/web/search"
    key_variable = "BRAVE_API_KEY"
    rate = 1.0

    def search(self, query: str, k: int, key: str) -> list[Passage]:
        query = " ".join(query.split()[:50])[:400]
        fields = {"q": query, "count": str(min(k, 20)), "text_decorations": "false"}
        headers = {"X-Subscription-Token": key}
        answer = fetch_json("GET", self.url, headers=headers, fields=fields)
        with expected_shape(self.url):
            hits = answer.get("web", {}).get("results", [])
            return [make_passage(hit["url"], hit["title"], hit.get("description")) for hit in hits]


PROVIDERS = {"serper": Serper, "brave": Brave}


def make_passage(address: str, title: str, snippet: str | None) -> Passage:
    """A hit as a passage: plain text on one line."""
    title = " ".join(html.unescape(title).split())
    text = " ".join(html.unescape(snippet or "").split())
    return parse_passage({"id": address, "title": title, "text": text})


class WebSearch:
    """A web search engine. What was asked once is answered from disk, also in another process.

    Args:
        provider: a name in PROVIDERS; its key comes from the environment.
        rate: requests a second at most; by default the provider's.
        cache: SQLite file, by default ~/.cache/nanosearcher/web.sqlite.

    Raises:
        ValueError: no key, no rate above 0, or a damaged cache.
    """

    def __init__(self, provider: str, rate: float | None = None, cache: Path | None = None):
        self.name = provider
        self.provider = PROVIDERS[provider]()
        self.key = os.environ.get(self.provider.key_variable)
        if not self.key:
            raise ValueError(f"{provider}: set {self.provider.key_variable} in the environment")
        if rate is not None and not rate > 0:
            raise ValueError(f"a rate of {rate} requests a second: expected more than 0")
        self.seconds_between_requests = 1 / (rate or self.provider.rate)
        self.next_request = 0.0  # on the clock of time.monotonic
        self.pool = ThreadPoolExecutor(MAX_CONCURRENT_REQUESTS, "web")
        self.lock = threading.Lock()
        cache = cache or Path.home() / ".cache" / "nanosearcher" / "web.sqlite"
        cache.parent.mkdir(parents=True, exist_ok=True)
        with reraise_corrupt(cache, "remove it"):
            self.database = sqlite3.connect(
                cache, timeout=60, check_same_thread=False, isolation_level=None
            )
            self.database.execute(
                "CREATE TABLE IF NOT EXISTS hits"
                " (provider, query, k, hits, PRIMARY KEY (provider, query, k))"
            )

    def search(self, queries: list[str], k: int) -> list[list[Passage]]:
        """The first k hits of each query; raises what `fetch_json` raises."""
        queries = [replace_surrogates(query) for query in queries]
        different = list(dict.fromkeys(queries))  # each is paid for once
        hits = self.pool.map(lambda query: self._search_one(query, k), different)
        found = dict(zip(different, hits, strict=True))
        return [found[query] for query in queries]

    def _search_one(self, query: str, k: int) -> list[Passage]:
        select = "SELECT hits FROM hits WHERE provider = ? AND query = ? AND k = ?"
        with self.lock:
            row = self.database.execute(select, (self.name, query, k)).fetchone()
        if row:
            return json.loads(row[0])[:k]
        self._wait_for_turn()
        passages = self.provider.search(query, k, self.key)
        insert = "INSERT OR REPLACE INTO hits VALUES (?, ?, ?, ?)"
        with self.lock:
            self.database.execute(insert, (self.name, query, k, json.dumps(passages)))
        return passages[:k]

    def _wait_for_turn(self) -> None:
        with self.lock:
            turn = max(self.next_request, time.monotonic())
            self.next_request = turn + self.seconds_between_requests
        time.sleep(max(0.0, turn - time.monotonic()))
