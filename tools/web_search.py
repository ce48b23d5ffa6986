"""Web search as a retriever, for tools/search_server.py."""

import html
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from records import Passage, clean, parse_passage, whole
from retriever import fetch, shape_of


class Provider(NamedTuple):
    url: str
    key: str  # the environment variable that holds it
    rate: float  # requests per second, of the smallest plan
    ask: Callable[[str, int, str], dict]  # (query, k, key) to what requests sends
    read: Callable[[dict], list[tuple]]  # answer to (address, title, snippet) of each hit


PROVIDERS = {
    "serper": Provider(  # Google's results
        "https://google.serper.dev/search",
        "SERPER_API_KEY",
        5,
        lambda query, k, key: {"method": "POST", "json": {"q": query, "num": k}, "headers": {"X-API-KEY": key}},
        lambda answer: [(hit["link"], hit["title"], hit.get("snippet", "")) for hit in answer.get("organic", [])],
    ),
    "brave": Provider(  # takes 400 characters, 50 words, and gives 20 hits at most
        "https://api.search.brave.com/res/v1/web/search",
        "BRAVE_API_KEY",
        1,
        lambda query, k, key: {
            "method": "GET",
            "params": {"q": " ".join(query.split()[:50])[:400], "count": min(k, 20), "text_decorations": "false"},
            "headers": {"X-Subscription-Token": key},
        },
        lambda answer: [(h["url"], h["title"], h.get("description", "")) for h in answer.get("web", {}).get("results", [])],
    ),
}


class Web:
    """A web search engine: title and snippet of each hit, as a passage. What was asked once is answered from disk.

    Args:
        provider: a name in PROVIDERS; its key comes from the environment.
        rate: requests per second at most; by default the provider's.
        cache: SQLite file.
        url: instead of the provider's own.
    """

    def __init__(self, provider: str, rate: float | None = None, cache: Path | None = None, url: str | None = None):
        import requests

        if provider not in PROVIDERS:
            raise ValueError(f"web:{provider}: the providers are {', '.join(PROVIDERS)}")
        self.name, self.provider, self.url = provider, PROVIDERS[provider], url or PROVIDERS[provider].url
        if not os.environ.get(self.provider.key):
            raise ValueError(f"web:{provider}: set {self.provider.key} in the environment")
        self.interval, self.free_at = 1 / (rate or self.provider.rate), 0.0  # seconds; on time.monotonic's clock
        self.session, self._lock = requests.Session(), threading.Lock()
        cache = cache or Path.home() / ".cache" / "nanosearcher" / "web.sqlite"
        cache.parent.mkdir(parents=True, exist_ok=True)
        with whole(cache):
            self.db = sqlite3.connect(cache, timeout=60, check_same_thread=False, isolation_level=None)
            self.db.execute("CREATE TABLE IF NOT EXISTS hits (provider, query, k, hits, PRIMARY KEY (provider, query, k))")

    def search(self, queries: list[str], k: int) -> list[list[Passage]]:
        """The first k hits of each query; errors as in `Remote.search`."""
        return [self._search_one(clean(query), k) for query in queries]

    def _take_turn(self) -> None:
        with self._lock:
            self.free_at = mine = max(self.free_at + self.interval, time.monotonic())
        time.sleep(max(0.0, mine - time.monotonic()))

    def _search_one(self, query: str, k: int) -> list[Passage]:
        key = (self.name, query, k)
        with self._lock:
            row = self.db.execute("SELECT hits FROM hits WHERE (provider, query, k) = (?, ?, ?)", key).fetchone()
        if row is None:
            request = self.provider.ask(query, k, os.environ[self.provider.key])
            answer = fetch(self.session, url=self.url, turn=self._take_turn, **request)
            with shape_of(self.url):
                hits = [[html.unescape(" ".join(str(part).split())) for part in hit] for hit in self.provider.read(answer)]
            row = (json.dumps([dict(zip(("id", "title", "text"), hit, strict=True)) for hit in hits]),)
            with self._lock:
                self.db.execute("INSERT OR REPLACE INTO hits VALUES (?, ?, ?, ?)", key + row)
        return [parse_passage(hit) for hit in json.loads(row[0])][:k]
