"""Answer searches over HTTP: `python tools/search_server.py --index INDEX --port 8000`."""

import argparse
import asyncio
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import asynccontextmanager
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from records import Passage, user_errors
from retriever import MAX_QUERIES, SHAPES, Retriever, open_retriever

MAX_K, MAX_BODY = 100, 4 << 20  # of one request, the last in bytes


MAX_SECONDS = 30  # for its head to arrive, and again for its body


MAX_WAITING = 1024  # requests


class Batcher:
    """Requests that arrive while a search runs go into the next one together."""

    def __init__(self):
        self.retriever: Retriever | None = None  # None while it loads
        self.waiting: asyncio.Queue = asyncio.Queue()
        self.answered = 0

    async def search(self, queries: list[str], k: int) -> list[list[Passage]]:
        future = asyncio.get_running_loop().create_future()
        self.waiting.put_nowait((queries, k, future))
        results = await future
        self.answered += 1
        return results

    async def run(self) -> None:
        while True:
            batch = [await self.waiting.get()]
            while not self.waiting.empty() and sum(len(queries) for queries, _, _ in batch) < MAX_QUERIES:
                batch.append(self.waiting.get_nowait())
            for k in {k for _, k, _ in batch}:  # apart: an approximate index may find others for another k
                await self._search_together([(queries, future) for queries, asked, future in batch if asked == k], k)

    async def _search_together(self, requests: list[tuple[list[str], asyncio.Future]], k: int) -> None:
        asked = [query for queries, _ in requests for query in queries]
        search = asyncio.to_thread(lambda: [each for _, each in zip(asked, self.retriever.search(asked, k), strict=True)])
        (results,) = await asyncio.gather(search, return_exceptions=True)
        if isinstance(results, BaseException) and len(requests) > 1:
            for request in requests:  # one is to blame, the others shall have their answers
                await self._search_together([request], k)
        elif isinstance(results, BaseException):
            requests[0][1].set_exception(results)
        else:
            rest = iter(results)
            for queries, future in requests:
                future.set_result(list(islice(rest, len(queries))))


def make_app(batcher: Batcher):
    """POST /search, /queries and /retrieve (SHAPES); GET /health: the process runs, /ready: the index is open."""
    from pydantic import AliasChoices, BaseModel, Field, ValidationError
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    class Body(BaseModel):
        queries: list[str] = Field(max_length=MAX_QUERIES)
        k: int | None = Field(None, ge=1, le=MAX_K, validation_alias=AliasChoices("k", "topk"))
        return_scores: bool = False

    def refuse(status: int, reason: str) -> JSONResponse:
        return JSONResponse({"detail": reason}, status)

    async def answer(request: Request) -> JSONResponse:
        body = bytearray()
        try:
            async with asyncio.timeout(MAX_SECONDS):  # a client that stalls must not keep the server from stopping
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > MAX_BODY:
                        return refuse(413, f"a request may have {MAX_BODY} bytes")
        except TimeoutError:
            return refuse(408, f"a request must be here within {MAX_SECONDS} s")
        if batcher.retriever is None or batcher.waiting.qsize() >= MAX_WAITING:
            return refuse(503, "the index is still being opened" if batcher.retriever is None else "too many requests wait")
        try:
            asked = Body.model_validate_json(bytes(body))
        except ValidationError as error:
            return refuse(422, "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()))
        try:
            results = await batcher.search(asked.queries, asked.k or 3)
        except Exception as error:
            return refuse(500, f"{type(error).__name__}: {error}")
        return JSONResponse(SHAPES[request.url.path].answer(results, asked.return_scores))

    async def health(request: Request) -> JSONResponse:
        return JSONResponse({"status": "ok"})

    async def ready(request: Request) -> JSONResponse:
        return refuse(503, "the index is still being opened") if batcher.retriever is None else await health(request)

    @asynccontextmanager
    async def lifespan(app):
        task = asyncio.create_task(batcher.run())
        yield
        task.cancel()

    asked = [Route(path, answer, methods=["POST"]) for path in SHAPES]
    return Starlette(routes=[*asked, Route("/health", health), Route("/ready", ready)], lifespan=lifespan)


def impatient_http():
    """uvicorn's HTTP over h11, which takes heads of up to 64 KiB, with a bound on their time too."""
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Protocol(H11Protocol):
        timer: asyncio.TimerHandle | None = None  # runs while a request's head is awaited

        def watch(self, awaited: bool) -> None:
            if self.timer and not awaited:
                self.timer = self.timer.cancel()
            elif awaited and not self.timer:
                self.timer = self.loop.call_later(MAX_SECONDS, self.transport.close)

        def connection_made(self, transport):
            super().connection_made(transport)
            self.watch(True)

        def data_received(self, data):
            super().data_received(data)
            self.watch(self.conn.their_state is h11.IDLE)

        def connection_lost(self, error):
            super().connection_lost(error)
            self.watch(False)

    return Protocol


def serve(open_source: Callable[[], Retriever], host: str, port: int) -> None:
    """Answer until SIGTERM or Ctrl-C; requests that were received by then are still answered."""
    import uvicorn

    listener = socket.create_server((host, port), backlog=1024)
    batcher, failures = Batcher(), []
    server = uvicorn.Server(uvicorn.Config(make_app(batcher), http=impatient_http(), log_level="warning", access_log=False))

    def load() -> None:
        try:
            batcher.retriever = open_source()
            print(f"ready: http://{host}:{listener.getsockname()[1]}", flush=True)
        except Exception as error:
            failures.append(error)
            server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):  # until uvicorn handles them, and when it raises them again at its end
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    threading.Thread(target=load, daemon=True).start()
    server.run(sockets=[listener])
    for failure in failures:
        raise failure
    print(f"stopped: {batcher.answered} requests answered", flush=True)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--index", required=True, help="anything that --retriever takes, or web:PROVIDER[:REQUESTS_PER_SECOND]"
    )
    parser.add_argument("--corpus", help="of an index folder: where its passages are now, if they moved")
    parser.add_argument("--backend", choices=("auto", "rank-bm25", "tantivy"), default="auto", help="of a passage file")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free (default 8000)")
    args = parser.parse_args(argv)
    if not 0 <= args.port < 65536:
        parser.error("--port: 0 to 65535")
    return args


def open_source(args: argparse.Namespace) -> Retriever:
    if not args.index.startswith("web:"):
        return open_retriever(args.index, args.backend, args.corpus)
    from tools.web_search import Web

    provider, _, rate = args.index.removeprefix("web:").partition(":")
    if rate and not (rate.isdigit() and int(rate)):
        raise ValueError(f"{args.index}: {rate!r} is not a number of requests per second")
    return Web(provider, int(rate) if rate else None)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    with user_errors("search_server.py"):
        serve(lambda: open_source(args), args.host, args.port)


if __name__ == "__main__":
    main()
