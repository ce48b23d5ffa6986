"""Search over HTTP: the server in its three shapes, the client against servers that misbehave, web search."""

import contextlib
import gzip
import json
import re
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests
from test_retriever import PASSAGES, write
from tiny import ASK, TELL

import retriever
from retriever import MAX_QUERIES, Remote, TantivyBM25, open_retriever
from tools import search_server
from tools.search_server import MAX_BODY
from tools.web_search import PROVIDERS, Web

WORDS = "red blue harbor salem film lane town river stone light".split()
CORPUS = [
    {
        "id": str(i),
        "title": f"{WORDS[i % 10]} {i}",
        "text": " ".join(WORDS[(i * 7 + j * (1 + i % 3)) % 10] for j in range(20)),
    }
    for i in range(3000)
]


WAITS = retriever.WAITS


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Retries follow at once."""
    monkeypatch.setattr(retriever, "WAITS", (0,) * 6)


class Server:
    """`retriever.py serve` in a process of its own."""

    def __init__(self, corpus, *words):
        command = [sys.executable, search_server.__file__, "--index", str(corpus), "--port", "0", *words]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.url = re.search(r"http://\S+", self.process.stdout.readline())[0]

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(write(tmp_path_factory.mktemp("server") / "corpus.jsonl", CORPUS))
    yield server
    assert server.stop()[0] == 0


QUERIES = [f"{a} {b}" for a in WORDS for b in WORDS]


def test_all_three_shapes_give_what_a_direct_search_gives(server):
    direct = TantivyBM25.build(CORPUS).search(QUERIES, 4)
    assert open_retriever(server.url).search(QUERIES, 4) == direct
    assert open_retriever(server.url + "/search").search(QUERIES, 4) == direct
    assert open_retriever(server.url + "/retrieve").search(QUERIES, 4) == direct
    found = open_retriever(server.url + "/queries").search(QUERIES, 4)  # lines of text: ids and scores are not in them
    assert [[(p["title"], p["text"]) for p in each] for each in found] == [
        [(p["title"], p["text"]) for p in each] for each in direct
    ]


def test_the_shapes_are_those_of_the_field(server):
    best = TantivyBM25.build(CORPUS).search(["red harbor"], 3)[0]
    post = lambda path, **body: requests.post(server.url + path, json=body).json()  # noqa: E731
    official = post("/queries", queries=["red harbor"], k=3)
    assert official == {"answers": [[f"{n}\t{p['title']}   {p['text']}" for n, p in enumerate(best)]]}
    documents = [{"id": p["id"], "contents": f'"{p["title"]}"\n{p["text"]}'} for p in best]
    scored = [{"document": document, "score": p["score"]} for document, p in zip(documents, best, strict=True)]
    assert post("/retrieve", queries=["red harbor"], topk=3, return_scores=True) == {"result": [scored]}
    assert post("/retrieve", queries=["red harbor"]) == {"result": [documents]}


def test_concurrent_clients_get_what_a_single_one_gets(server):
    alone = {query: Remote(server.url).search([query], 3) for query in QUERIES}
    with ThreadPoolExecutor(32) as pool:
        remote = Remote(server.url)
        for k in (3, 2):
            results = pool.map(lambda query: (query, remote.search([query], k)), QUERIES * 5)  # noqa: B023
            assert all(found == [alone[query][0][:k]] for query, found in results)


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"{", 422, "Invalid JSON"),
        (b'{"k": 3}', 422, "queries: Field required"),
        (b'{"queries": "red"}', 422, "queries"),
        (b'{"queries": ["red"], "k": 0}', 422, "k: "),
        (b'{"queries": ["red"], "k": 101}', 422, "k: "),
        (json.dumps({"queries": ["red"] * (MAX_QUERIES + 1)}).encode(), 422, "queries"),
        (b'{"queries": ["' + b"x" * MAX_BODY + b'"]}', 413, "bytes"),
        (b'{"queries": ["\\ud800"]}', 422, "Invalid JSON"),
    ],
)
def test_a_bad_request_is_refused_with_its_reason(server, body, status, reason):
    response = requests.post(server.url + "/search", data=body)
    assert response.status_code == status and reason in response.json()["detail"]
    assert requests.get(server.url + "/ready").status_code == 200


def test_health_and_readiness(server):
    assert requests.get(server.url + "/health").json() == requests.get(server.url + "/ready").json() == {"status": "ok"}
    assert requests.get(server.url + "/nothing").status_code == 404
    assert server.url.startswith("http://127.0.0.1:")


def test_while_the_index_opens_the_server_is_healthy_and_not_ready():
    from starlette.testclient import TestClient

    batcher = search_server.Batcher()
    with TestClient(search_server.make_app(batcher)) as client:
        assert client.get("/health").status_code == 200 and client.get("/ready").status_code == 503
        assert client.post("/search", json={"queries": ["red"]}).status_code == 503
        batcher.retriever = TantivyBM25.build(PASSAGES)
        assert client.get("/ready").status_code == 200
        assert client.post("/search", json={"queries": ["harbor"]}).json()["results"][0][0]["id"] == "a"


def test_a_search_that_fails_fails_its_requests_and_no_others():
    from starlette.testclient import TestClient

    class Moody(TantivyBM25):
        def search(self, queries, k):
            if "fail" in queries:
                raise OSError("disk gone")
            return super().search(queries, k)

    batcher = search_server.Batcher()
    batcher.retriever = Moody.build(PASSAGES)
    with TestClient(search_server.make_app(batcher)) as client:
        failed = client.post("/search", json={"queries": ["fail"]})
        assert failed.status_code == 500 and failed.json() == {"detail": "OSError: disk gone"}
        assert client.post("/search", json={"queries": ["harbor"]}).status_code == 200


def test_of_concurrent_requests_only_the_one_that_fails_fails():
    import asyncio

    class Moody(TantivyBM25):
        def search(self, queries, k):
            if "fail" in queries:
                raise OSError("disk gone")
            return super().search(queries, k)

    async def ask_at_once():
        batcher = search_server.Batcher()
        batcher.retriever = Moody.build(PASSAGES)
        task = asyncio.create_task(batcher.run())
        asked = [(["harbor"], 1), (["fail"], 1), (["salem", "webb"], 1), (["salem"], 2)]
        found = await asyncio.gather(*(batcher.search(*each) for each in asked), return_exceptions=True)
        task.cancel()
        return found

    first, failed, third, fourth = asyncio.run(ask_at_once())
    assert isinstance(failed, OSError)
    assert [first[0][0]["id"], third[0][0]["id"], third[1][0]["id"]] == ["a", "c", "b"]
    assert [p["id"] for p in fourth[0]] == ["c", "b"]  # each its own k


@pytest.mark.parametrize("answer", [None, [], [[PASSAGES[0]]] * 3])
def test_a_backend_that_answers_for_another_number_of_queries_fails_the_request_and_no_later_one(answer):
    """Of too few or too many results those of one client would reach another; and the server must go on."""
    from starlette.testclient import TestClient

    class Moody(TantivyBM25):
        def search(self, queries, k):
            return answer if "fail" in queries else super().search(queries, k)

    batcher = search_server.Batcher()
    batcher.retriever = Moody.build(PASSAGES)
    with TestClient(search_server.make_app(batcher)) as client:
        assert client.post("/search", json={"queries": ["fail", "harbor"]}).status_code == 500
        assert client.post("/search", json={"queries": ["harbor"]}).json()["results"][0][0]["id"] == "a"


def test_a_server_stops_at_a_signal_as_soon_as_it_is_ready_and_with_a_stalled_client(tmp_path):
    for _ in range(3):
        assert Server(write(tmp_path / "corpus.jsonl", PASSAGES)).stop()[0] == 0
    server = Server(write(tmp_path / "corpus.jsonl", PASSAGES))
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as stalled:
        stalled.sendall(b"POST /search HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        time.sleep(0.5)
        assert server.stop()[0] == 0  # within the 60 s of stop


@pytest.fixture
def impatient(monkeypatch):
    """The port of a server that waits half a second for a request."""
    import uvicorn

    monkeypatch.setattr(search_server, "MAX_SECONDS", 0.5)
    batcher = search_server.Batcher()
    batcher.retriever = TantivyBM25.build(PASSAGES)
    server = uvicorn.Server(
        uvicorn.Config(search_server.make_app(batcher), http=search_server.impatient_http(), log_level="error")
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join()


WHOLE = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize("before", [b"", WHOLE])
@pytest.mark.parametrize("pieces", [[], [b"GET /hea"], [b"GET /health HTTP/1.1\r\n", *[b"X: x\r\n"] * 1000]])
def test_a_head_that_does_not_end_does_not_keep_its_connection(impatient, before, pieces):
    with socket.create_connection(("127.0.0.1", impatient)) as client:
        client.settimeout(10)
        if before:  # a good one on the same connection
            client.sendall(before)
            assert client.recv(10_000).startswith(b"HTTP/1.1 200")
        begin = time.monotonic()
        with contextlib.suppress(OSError):  # it is closed meanwhile
            for piece in pieces:
                client.sendall(piece)
                time.sleep(0.01)
            while client.recv(10_000):
                pass
        assert time.monotonic() - begin < 8
    assert requests.get(f"http://127.0.0.1:{impatient}/health").status_code == 200


def test_a_head_of_megabytes_is_refused(impatient):
    try:
        status = requests.get(f"http://127.0.0.1:{impatient}/health", headers={"X": "x" * 2_000_000}).status_code
    except requests.exceptions.RequestException:
        status = 400  # it was closed before all was sent
    assert status == 400


def test_an_index_that_does_not_open_stops_the_server(tmp_path):
    command = [sys.executable, search_server.__file__, "--index", str(tmp_path / "none"), "--port", "0"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and "neither a passage file" in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_port_that_is_taken_is_one_line(server):
    command = [sys.executable, search_server.__file__, "--index", "x", "--port", server.url.rpartition(":")[2]]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and "in use" in result.stderr and len(result.stderr.splitlines()) == 1


def test_sigterm_answers_every_request_that_was_received(tmp_path):
    server = Server(write(tmp_path / "corpus.jsonl", CORPUS))
    expected = Remote(server.url).search(QUERIES, 3)
    answers, refused = [], []

    def client(number):
        session = requests.Session()
        for _ in range(1000):
            try:
                answers.append(
                    session.post(server.url + "/search", json={"queries": QUERIES, "k": 3}, timeout=30).json()["results"]
                )
            except requests.exceptions.ConnectionError:
                refused.append(number)
                return

    threads = [threading.Thread(target=client, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    while len(answers) < 8:
        time.sleep(0.01)
    code, out, err = server.stop()
    for thread in threads:
        thread.join()
    assert code == 0 and not err and len(refused) == 8
    assert all(answer == expected for answer in answers)  # none was cut short
    assert f"stopped: {len(answers) + 1} requests answered" in out  # and each that the server took reached its client


# ---------------------------------------------------------------------------------------------------------------------
# Servers that misbehave


@pytest.fixture
def misbehaving():
    """A real server: `answers` is a list of (status, body, headers); the last repeats. `seen` are the requests.

    In place of the status there may be a function that does something to the handler instead of answering.
    """
    seen, answers, clients = [], [], set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            seen.append((self.command, self.path, dict(self.headers), body))
            clients.add(self.client_address)
            status, text, headers = answers.pop(0) if len(answers) > 1 else answers[0]
            if callable(status):
                status(self)
                self.close_connection = True
                return
            self.send_response(status)
            for name, value in {"Content-Length": len(text), **headers}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(text)
            self.close_connection = "Content-Length" in headers

        do_GET = do_POST

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url, server.seen, server.answers, server.clients = (
        f"http://127.0.0.1:{server.server_port}",
        seen,
        answers,
        clients,
    )
    yield server
    server.shutdown()
    server.server_close()


def hang_up(handler):
    handler.connection.shutdown(socket.SHUT_RDWR)


def reset(handler):
    """The connection is reset in the middle of the answer, as by a server that is killed."""
    handler.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"results": [[{"id')
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def sleep(handler):
    time.sleep(1.0)


def drip(handler):
    """A byte now and then, so that no single wait is long."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n")
    with contextlib.suppress(OSError):
        for _ in range(100):
            handler.wfile.write(b" ")
            time.sleep(0.05)


def flood(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 50000000\r\n\r\n")
    with contextlib.suppress(OSError):
        for _ in range(50):
            handler.wfile.write(b" " * 1_000_000)


HANGS_UP, RESETS, SLEEPS, DRIPS, FLOODS = ((behave, b"", {}) for behave in (hang_up, reset, sleep, drip, flood))
GIGANTIC = (200, b'{"results": [[{"id": "1", "title": "T", "text": "%b"}]]}' % (b"word " * 4_000_000), {})
HALF, NESTED = (200, b'{"results": [[{"id"', {}), (200, b"[" * 100_000, {})
GOOD = (200, json.dumps({"results": [[PASSAGES[0]]]}).encode(), {})


@pytest.mark.parametrize(
    "failure",
    [
        (503, b"", {}),
        (500, b"", {}),
        (429, b"", {"Retry-After": 0}),
        (200, b"{}", {"Content-Length": 50}),
        *(HANGS_UP, RESETS, SLEEPS, DRIPS, FLOODS, HALF, NESTED),
    ],
)
def test_the_client_tries_again(misbehaving, monkeypatch, failure):
    monkeypatch.setattr(retriever, "TIMEOUT", (5, 0.3))
    monkeypatch.setattr(retriever, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(retriever, "ANSWER_BYTES", 1_000_000)
    misbehaving.answers.extend([failure, failure, GOOD])
    assert Remote(misbehaving.url).search(["x"], 1) == [[PASSAGES[0]]]
    assert len(misbehaving.seen) == 3


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((503, b"busy", {}), "status 503: 'busy'"),
        ((422, b"no", {}), "status 422: 'no'"),
        (HANGS_UP, "no answer (ConnectionError)"),
        (RESETS, "no answer ("),
        (DRIPS, "no answer (not whole within"),
        (FLOODS, "no answer (not whole within"),
        (HALF, """not JSON: '{"results": [[{"id"'"""),
        ((200, b"<html>", {}), "not JSON: '<html>'"),
        ((200, b'{"results": [[{"id": 1}]]}', {}), "another shape"),
        ((200, b'{"results": []}', {}), "0 results for 1 queries"),
        ((200, b"[]", {}), "another shape"),
    ],
)
def test_after_the_last_try_there_is_one_clear_line(misbehaving, monkeypatch, answer, message):
    monkeypatch.setattr(retriever, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(retriever, "ANSWER_BYTES", 1_000_000)
    misbehaving.answers.append(answer)
    with pytest.raises(RuntimeError) as error:
        Remote(misbehaving.url).search(["x"], 1)
    assert str(error.value).startswith(misbehaving.url) and message in str(error.value) and "\n" not in str(error.value)
    assert len(misbehaving.seen) == (
        1 if "status 422" in message or "another shape" in message or "0 results" in message else 7
    )


def test_a_server_that_is_down_for_a_while_is_waited_for(monkeypatch):
    """Half a minute and more; here a second."""
    assert sum(WAITS) > 30
    monkeypatch.setattr(retriever, "WAITS", (0.2,) * 20)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(GOOD[0])
            self.end_headers()
            self.wfile.write(GOOD[1])

        def log_message(self, *_):
            pass

    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(Remote(f"http://127.0.0.1:{port}").search, ["x"], 1)
        time.sleep(1)
        assert not found.done()
        with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            assert found.result(timeout=30) == [[PASSAGES[0]]]
            server.shutdown()


def test_no_try_begins_after_the_bound_whatever_the_server_asks_for(misbehaving, monkeypatch):
    monkeypatch.setattr(retriever, "GIVE_UP", 2)
    misbehaving.answers.append((503, b"later", {"Retry-After": 60}))
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="status 503: 'later'"):
        Remote(misbehaving.url).search(["x"], 1)
    assert time.monotonic() - begin < 2 and len(misbehaving.seen) == 1


@pytest.mark.parametrize(
    ("answer", "failures", "documents"),
    [
        ((500, b"", {}), 1, "(no results)"),
        (HANGS_UP, 1, "(no results)"),
        (RESETS, 1, "(no results)"),
        (SLEEPS, 1, "(no results)"),
        (HALF, 1, "(no results)"),
        ((200, b'{"results": [[{"id": 1}]]}', {}), 1, "(no results)"),
        ((200, b'{"results": [[], []]}', {}), 1, "(no results)"),
        ((200, b'{"results": [[]]}', {}), 0, "(no results)"),
        (GOOD, 0, "(1)Red Harbor   A film directed by Peter Lane.\n<"),  # one passage for a k of 3
        (GIGANTIC, 0, "word word\n<|end_of_documents|>"),
    ],
)
def test_what_the_server_does_is_counted_and_the_episode_goes_on(
    misbehaving, monkeypatch, play, answer, failures, documents
):
    monkeypatch.setattr(retriever, "TIMEOUT", (5, 1))
    misbehaving.answers.append(answer)
    episode, _ = play([ASK, TELL], search=Remote(misbehaving.url).search)
    assert (episode.search_failures, episode.queries, episode.finish_reason) == (failures, ["red harbor"], "answer")
    assert documents in episode.segments[2][1]


def chunk_and_compress(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Encoding: gzip\r\n\r\n")
    for byte in gzip.compress(GOOD[1]):
        handler.wfile.write(b"1\r\n" + bytes([byte]) + b"\r\n")
    handler.wfile.write(b"0\r\n\r\n")


def test_an_answer_may_come_compressed_and_in_chunks(misbehaving):
    """As from web search services."""
    misbehaving.answers.append((chunk_and_compress, b"", {}))
    assert Remote(misbehaving.url).search(["x"], 1) == [[PASSAGES[0]]]
    assert len(misbehaving.seen) == 1


def test_nobody_listens():
    with pytest.raises(RuntimeError, match=r"http://127.0.0.1:9/search: no answer"):
        Remote("http://127.0.0.1:9").search(["x"], 1)


def test_a_client_keeps_its_connection(misbehaving):
    misbehaving.answers.append(GOOD)
    remote = Remote(misbehaving.url)
    for _ in range(5):
        remote.search(["x"], 1)
    assert len(misbehaving.clients) == 1


def test_more_results_than_asked_for_are_cut_and_many_queries_go_in_several_requests(misbehaving, monkeypatch):
    monkeypatch.setattr(retriever, "MAX_QUERIES", 2)
    two = {"results": [PASSAGES, PASSAGES]}
    misbehaving.answers.extend(
        [(200, json.dumps(two).encode(), {}), (200, json.dumps({"results": [PASSAGES]}).encode(), {})]
    )
    assert Remote(misbehaving.url).search(["a", "b", "c"], 1) == [[PASSAGES[0]]] * 3


# ---------------------------------------------------------------------------------------------------------------------
# Web search, against the answers that the providers document

SERPER = {
    "searchParameters": {"q": "red harbor", "type": "search"},
    "organic": [
        {"title": "Red Harbor", "link": "https://a.example", "snippet": "A film &amp; more\nby Lane.", "position": 1},
        {"title": "No snippet", "link": "https://b.example", "position": 2},
    ],
}
BRAVE = {
    "type": "search",
    "web": {"results": [{"title": "Red Harbor", "url": "https://a.example", "description": "A film &amp; more\nby Lane."}]},
}
FIRST = {"id": "https://a.example", "title": "Red Harbor", "text": "A film & more by Lane."}


@pytest.fixture
def web(misbehaving, monkeypatch, tmp_path):
    for provider in PROVIDERS.values():
        monkeypatch.setenv(provider.key, "secret-key")
    return lambda name, **more: Web(name, cache=tmp_path / "web.sqlite", url=misbehaving.url, **{"rate": 1000, **more})


@pytest.mark.parametrize(
    ("name", "answer", "header"), [("serper", SERPER, "X-API-KEY"), ("brave", BRAVE, "X-Subscription-Token")]
)
def test_hits_are_passages(misbehaving, web, name, answer, header):
    misbehaving.answers.append((200, json.dumps(answer).encode(), {}))
    assert web(name).search(["red harbor"], 5)[0][0] == FIRST
    ((method, path, headers, body),) = misbehaving.seen
    assert headers[header] == "secret-key"
    if name == "serper":
        assert (method, json.loads(body)) == ("POST", {"q": "red harbor", "num": 5})
    else:
        assert (method, path) == ("GET", "/?q=red+harbor&count=5&text_decorations=false")


def test_hits_reach_the_policy_in_the_format_of_training(misbehaving, web, play):
    """In the official code documents from the web lacked the numbering that the model was trained with."""
    misbehaving.answers.append((200, json.dumps(SERPER).encode(), {}))
    episode, _ = play([ASK, TELL], search=web("serper").search)
    documents = next(text for kind, text in episode.segments if kind == "documents")
    assert "(1)Red Harbor   A film & more by Lane.\n(2)No snippet   " in documents


def test_what_was_asked_once_is_answered_from_disk_also_by_another_process(misbehaving, web):
    misbehaving.answers.append((200, json.dumps(SERPER).encode(), {}))
    first = web("serper").search(["red harbor", "red harbor"], 2)
    assert web("serper").search(["red harbor"], 2) == first[:1] and len(misbehaving.seen) == 1
    web("serper").search(["red harbor"], 3)
    assert len(misbehaving.seen) == 2


def test_no_hits_are_an_empty_result_and_nonsense_an_error_that_is_not_cached(misbehaving, web):
    misbehaving.answers.extend(
        [(200, b'{"organic": []}', {}), (200, b'{"organic": [{}]}', {}), (200, json.dumps(SERPER).encode(), {})]
    )
    assert web("serper").search(["nothing"], 2) == [[]]
    with pytest.raises(RuntimeError, match="another shape"):
        web("serper").search(["red"], 2)
    assert web("serper").search(["red"], 2)[0][0] == FIRST


def test_the_rate_is_kept(misbehaving, web):
    misbehaving.answers.append((200, json.dumps(SERPER).encode(), {}))
    search, begin = web("serper", rate=20), time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: search.search([f"query {n}"], 1), range(9)))
    assert time.monotonic() - begin >= 8 / 20


def test_the_key_is_in_no_file_and_no_message(misbehaving, web, tmp_path):
    misbehaving.answers.extend([(200, json.dumps(SERPER).encode(), {}), (403, b"x" * 195 + b"secret-key is no key", {})])
    web("serper").search(["red"], 1)
    with pytest.raises(RuntimeError) as error:
        web("serper").search(["blue"], 1)
    assert "secre" not in str(error.value) and "x***" in str(error.value)  # though the server quoted it
    assert all(b"secret-key" not in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert sqlite3.connect(tmp_path / "web.sqlite").execute("SELECT count(*) FROM hits").fetchone() == (1,)
