"""The client of a search server: ours, R1-Searcher's official one or Search-R1's."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import urllib3

from records import MALFORMED, Passage, parse_passage, replace_surrogates, reraise_missing

UNAVAILABLE = [429, 502, 503, 504]  # statuses of a server that cannot answer at present
# A failed request is sent again up to 6 times within about a minute: after 0, 2, 4, 8, 16 and 32
# seconds, or when the server asks for it (Retry-After). A silent server costs TIMEOUT each time.
RETRY_POLICY = urllib3.Retry(
    total=6,
    backoff_factor=1,
    retry_after_max=60,
    status_forcelist=[*UNAVAILABLE, 500],
    allowed_methods=None,  # all of them: a search changes nothing on the server
    raise_on_status=False,  # the last answer says more than the exception
)
TIMEOUT = urllib3.Timeout(connect=5, read=60)  # seconds; read: without a byte of the answer
HTTP = urllib3.PoolManager(maxsize=64)  # connections that are kept open for reuse, of each host


def fetch_json(method: str, url: str, **request: Any) -> dict:
    """Send a request, again if RETRY_POLICY says so, and parse the JSON of the answer.

    Args:
        request: `headers`, and `json` (the body) or `fields` (the query string) of the request.

    Raises:
        ConnectionError: after all retries there was no answer, or a status of UNAVAILABLE.
        RuntimeError: another answer than status 200 and JSON. Both are one line without the values
            of the request's headers.
    """
    is_silent = True
    failure = "no answer"
    try:
        response = HTTP.request(method, url, retries=RETRY_POLICY, timeout=TIMEOUT, **request)
    except urllib3.exceptions.HTTPError as error:
        details = str(getattr(error, "reason", error))  # of MaxRetryError: the last cause
    else:
        is_silent = response.status in UNAVAILABLE
        failure = f"status {response.status}"
        details = response.data.decode("utf-8", "replace")
        if response.status == 200:
            try:
                return response.json()
            except (ValueError, RecursionError):
                failure = "not JSON"
    for value in request.get("headers", {}).values():  # a server may quote the key that it refuses
        details = details.replace(value.removeprefix("Bearer "), "***")
    message = f"{url}: {failure}: {details[:200]!r}"
    raise ConnectionError(message) if is_silent else RuntimeError(message)


def url_path(url: str) -> str:
    """The path of a URL, without a slash at its end; raises ValueError for what is no URL."""
    with reraise_missing(f"{url}: not the address of a server"):
        return (urllib3.util.parse_url(url).path or "").rstrip("/")


@contextmanager
def expected_shape(url: str) -> Iterator[None]:
    """Turn what parsing an answer raises (MALFORMED) into a RuntimeError of one line."""
    try:
        yield
    except MALFORMED as error:
        failure = f"an answer of another shape than expected ({error!r:.200})"
        raise RuntimeError(f"{url}: {failure}") from None


class Remote:
    """A search server. The end of its URL's path says which one.

    `/search` is tools/search_server.py's own (and what a URL without a path means), `/queries` is
    R1-Searcher's official server, `/retrieve` is Search-R1's.
    """

    def __init__(self, url: str):
        self.url = url
        self.path = "/" + url_path(url).rpartition("/")[2]
        if self.path not in ("/search", "/queries", "/retrieve"):
            self.url = url.rstrip("/") + "/search"

    def search(self, queries: list[str], k: int) -> list[list[Passage]]:
        """The server's results, at most k of each query.

        Raises:
            ConnectionError: the server did not answer.
            RuntimeError: it did not answer in its shape.
        """
        request = {"queries": [replace_surrogates(query) for query in queries], "k": k}
        if self.path == "/retrieve":
            request = {"queries": request["queries"], "topk": k, "return_scores": True}
        answer = fetch_json("POST", self.url, json=request)
        with expected_shape(self.url):
            results = self._parse(answer)
            if len(results) != len(queries):
                raise ValueError(f"{len(results)} results for {len(queries)} queries")
            return [passages[:k] for passages in results]

    def fingerprint(self) -> str | None:
        """What identifies the server's passages; None if the server does not say.

        Raises:
            ConnectionError: the server did not answer.
        """
        base, _, _ = self.url.rstrip("/").rpartition("/")
        try:
            return fetch_json("GET", f"{base}/ready")["fingerprint"]
        except (RuntimeError, *MALFORMED):  # a server of another project
            return None

    def _parse(self, answer: dict) -> list[list[Passage]]:
        if self.path == "/queries":
            return [[parse_line(line) for line in lines] for lines in answer["answers"]]
        if self.path == "/retrieve":
            return [
                [parse_hit(hit["document"] | {"score": hit["score"]}) for hit in hits]
                for hits in answer["result"]
            ]
        return [[parse_hit(hit) for hit in hits] for hits in answer["results"]]


def parse_hit(hit: dict) -> Passage:
    """A passage with the score that the server gave it, if any."""
    passage = parse_passage(hit)
    if hit.get("score") is not None:
        passage["score"] = float(hit["score"])
    return passage


def parse_line(line: str) -> Passage:
    """A line of R1-Searcher's corpus: number, tab, title, three blanks, text."""
    title, _, text = re.sub(r"^\d+\t", "", line).partition("   ")
    return parse_passage({"id": title, "title": title, "text": text})
