"""Answer searches over HTTP, from an index or from the web, for `--retriever http://HOST:PORT`.

    python tools/search_server.py --index data/bm25 --port 8000
    python tools/search_server.py --index data/bm25 --control oracle --questions q.jsonl
    SERPER_API_KEY=... python tools/search_server.py --web serper --port 8000

POST /search, /queries (protocol of the official R1-Searcher) or /retrieve (of Search-R1): search.
GET /health: the process runs. GET /ready: the index is open, and its fingerprint; until then
searches get status 503.
"""

import asyncio
import json
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import Literal

import tyro

# A script finds the modules beside it; those of the core lie one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from records import MALFORMED, Passage, user_errors
from retriever import Retriever, open_retriever, retriever_fingerprint
from tools.control_search import open_control
from tools.web_search import WebSearch

MAX_BODY_BYTES = 4 << 20  # of a request; a longer one gets status 413
MAX_PASSAGES = 100_000  # queries times k of a request; more get status 422
MAX_CONNECTIONS = 1024  # requests of further connections get status 503
SHUTDOWN_SECONDS = 30  # after SIGTERM; without a bound, a client that stalls keeps the process


@dataclass
class SearchRequest:
    queries: list[str]
    k: int  # passages for each query
    return_scores: bool  # in the protocol of Search-R1
    results: asyncio.Future = field(init=False)  # set by `Batcher.search`


class Batcher:
    """Requests that arrive while a search runs share the next one: encoders on a GPU gain by it.

    Only requests of the same k share: an approximate index may find others for another k.
    """

    def __init__(self, retriever: Retriever | None = None):
        self.retriever = retriever  # None until the index is open
        self.fingerprint: str | None = None
        self.waiting: dict[int, list[SearchRequest]] = {}  # by k
        self.worker: asyncio.Task | None = None
        self.answered = 0

    async def search(self, request: SearchRequest) -> list[list[Passage]]:
        """One list of passages a query; raises RuntimeError if the search fails."""
        request.results = asyncio.get_running_loop().create_future()
        self.waiting.setdefault(request.k, []).append(request)
        if self.worker is None or self.worker.done():
            self.worker = asyncio.create_task(self._search_waiting())
        results = await request.results
        self.answered += 1
        return results

    async def _search_waiting(self) -> None:
        while self.waiting:
            longest_waiting_k = next(iter(self.waiting))
            await self._search_together(self.waiting.pop(longest_waiting_k))

    async def _search_together(self, batch: list[SearchRequest]) -> None:
        queries = [query for request in batch for query in request.queries]
        search = asyncio.to_thread(self.retriever.search, queries, batch[0].k)
        # An error comes back as the result, also a panic of tantivy, which is not an Exception.
        (results,) = await asyncio.gather(search, return_exceptions=True)
        if isinstance(results, list) and len(results) == len(queries):
            remaining = iter(results)
            for request in batch:
                request.results.set_result(list(islice(remaining, len(request.queries))))
        elif len(batch) == 1:
            batch[0].results.set_exception(RuntimeError(f"the search gave {results!r:.200}"))
        else:  # one request is at fault; the others get their passages
            for request in batch:
                await self._search_together([request])


def parse_request(body: bytes) -> SearchRequest:
    """The request in a body of any protocol; raises ValueError with the reason."""
    try:
        fields = json.loads(body)
        queries = fields["queries"]
        k = fields["k"] if fields.get("k") is not None else fields.get("topk")
        return_scores = bool(fields.get("return_scores"))
    except MALFORMED as error:
        raise ValueError(f'expected {{"queries": [..], "k": ..}}, got {error!r:.200}') from None
    if k is None:
        k = 3
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise ValueError("queries: expected a list of strings")
    if type(k) is not int or k < 1:
        raise ValueError("k: expected a whole number of at least 1")
    if len(queries) * k > MAX_PASSAGES:
        raise ValueError(f"queries times k: expected at most {MAX_PASSAGES}")
    return SearchRequest(queries, k, return_scores)


def format_answer(path: str, results: list[list[Passage]], return_scores: bool) -> dict:
    """The body of an answer in the protocol of the path."""
    if path == "/queries":
        return {"answers": [format_lines(passages) for passages in results]}
    if path == "/retrieve":
        return {"result": [format_documents(passages, return_scores) for passages in results]}
    return {"results": results}


def format_lines(passages: list[Passage]) -> list[str]:
    return [f"{n}\t{passage['title']}   {passage['text']}" for n, passage in enumerate(passages)]


def format_documents(passages: list[Passage], return_scores: bool) -> list[dict]:
    hits = []
    for passage in passages:
        contents = f'"{passage["title"]}"\n{passage["text"]}'
        document = {"id": passage["id"], "contents": contents}
        scored = {"document": document, "score": passage.get("score")}
        hits.append(scored if return_scores else document)
    return hits


def make_app(batcher: Batcher):
    """The Starlette application. A refusal is a status and its reason in plain text."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    def require_index() -> None:
        if batcher.retriever is None:
            raise HTTPException(503, "the index is still being opened")

    async def search(http_request: Request) -> JSONResponse:
        try:
            request = parse_request(await http_request.body())
        except (ValueError, ClientDisconnect) as error:
            raise HTTPException(422, str(error)) from None
        require_index()
        try:
            results = await batcher.search(request)
        except RuntimeError as error:
            raise HTTPException(500, str(error)) from None
        path = http_request.scope["path"]
        return JSONResponse(format_answer(path, results, request.return_scores))

    async def health(http_request: Request) -> JSONResponse:
        return JSONResponse({"status": "ok"})

    async def ready(http_request: Request) -> JSONResponse:
        require_index()
        return JSONResponse({"status": "ok", "fingerprint": batcher.fingerprint})

    routes = [Route("/health", health), Route("/ready", ready)]
    for path in ("/search", "/queries", "/retrieve"):
        routes.append(Route(path, search, methods=["POST"]))
    return Starlette(routes=routes, max_body_size=MAX_BODY_BYTES)


def run_server(open_source: Callable[[], tuple], host: str, port: int) -> None:
    """Answer until SIGTERM or Ctrl-C, then the requests that were received until then.

    Args:
        open_source: returns a fingerprint (str or None) and the `Retriever` that has it.

    Raises:
        OSError: the port is taken; and whatever `open_source` raises.
    """
    import uvicorn

    listener = socket.create_server((host, port), backlog=MAX_CONNECTIONS)
    batcher = Batcher()
    failures = []
    config = uvicorn.Config(
        make_app(batcher),
        http="h11",  # bounds the head of a request, to 64 KiB
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        log_level="warning",
        access_log=False,
    )
    server = uvicorn.Server(config)

    def load() -> None:
        try:
            batcher.fingerprint, batcher.retriever = open_source()
            print(f"ready: http://{host}:{listener.getsockname()[1]}", flush=True)
        except BaseException as error:  # a panic of tantivy is not an Exception
            failures.append(error)
            server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn itself handles them a little later
        signal.signal(number, server.handle_exit)
    Thread(target=load, daemon=True).start()  # a daemon: a signal ends the process meanwhile too
    server.run(sockets=[listener])
    if failures:
        raise failures[0]
    print(f"stopped: {batcher.answered} requests answered", flush=True)


def serve(
    index: str | None = None,
    web: Literal["serper", "brave"] | None = None,
    rate: float | None = None,
    control: Literal["oracle", "random"] | None = None,
    questions: tuple[str, ...] = (),
    host: str = "127.0.0.1",
    port: int = 8000,
) -> None:
    """Serve an index or a web search engine.

    Args:
        index: A passage file, an index folder or the URL of another search server.
        web: A web search engine instead; its key comes from the environment.
        rate: Requests a second to the web search engine; by default those of its smallest plan.
        control: Instead of the best passages, those with a gold answer, or random ones.
        questions: Question files with the answers that the oracle knows.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
    """
    if (index is None) == (web is None):
        raise ValueError("give either --index or --web")
    if rate is not None and not web:
        raise ValueError("--rate needs --web")
    if control and web:
        raise ValueError("--control needs --index")
    if (control == "oracle") != bool(questions):
        raise ValueError("--control oracle and --questions need each other")
    if not 0 <= port < 65536:
        raise ValueError(f"--port {port}: expected 0 to 65535")

    def open_source() -> tuple[str | None, Retriever]:
        if web:
            return f"{web}: web search, not repeatable", WebSearch(web, rate)
        if control:
            return open_control(control, index, questions)
        return retriever_fingerprint(index), open_retriever(index)

    run_server(open_source, host, port)


def main(argv: list[str] | None = None) -> None:
    with user_errors("search_server.py"):
        tyro.cli(serve, args=argv, description=__doc__, use_underscores=True)


if __name__ == "__main__":
    main()
