"""The client of a search server: its three shapes, and servers that misbehave."""

import json
import re
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import urllib3
from pytest_httpserver import HTTPServer
from test_retriever import PASSAGES
from test_rollout import look_up_together
from tiny import ASK, TELL
from werkzeug import Request, Response

import search_client
from retriever import open_retriever, retriever_fingerprint
from search_client import RETRY_POLICY, Remote, fetch_json


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Retries follow at once, and a server that is silent for 0.3 seconds is given up."""
    monkeypatch.setattr(search_client, "RETRY_POLICY", RETRY_POLICY.new(backoff_factor=0))
    monkeypatch.setattr(search_client, "TIMEOUT", urllib3.Timeout(connect=5, read=0.3))


class Server(HTTPServer):
    """A real server whose n-th request gets the n-th behaviour; the last one repeats.

    A behaviour is a response, or a function that does something to the request's connection.
    """

    def behave(self, *behaviours) -> str:
        """Set the behaviours; returns the server's URL."""
        self.clear()
        self.seen: list[Request] = []

        def answer(request: Request) -> Response:
            behaviour = behaviours[min(len(self.seen), len(behaviours) - 1)]
            self.seen.append(request)
            if isinstance(behaviour, Response):
                return behaviour
            behaviour(request.environ["werkzeug.socket"])
            return Response()

        self.expect_request(re.compile(".*")).respond_with_handler(answer)
        return self.url_for("").rstrip("/")


@pytest.fixture(scope="module")
def server():
    with Server(threaded=True) as server:
        yield server


def hang_up(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_RDWR)


def reset(connection: socket.socket) -> None:
    """Reset the connection in the middle of the answer, as the death of the server does."""
    connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"results": [[{"id')
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def cut(connection: socket.socket) -> None:
    """Close the connection in the middle of the answer."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{}")
    connection.shutdown(socket.SHUT_RDWR)


def be_silent(connection: socket.socket) -> None:
    time.sleep(0.6)


GOOD = Response(json.dumps({"results": [[PASSAGES[0]]]}))
HALF_JSON = Response('{"results": [[{"id"')
NESTED = Response("[" * 100_000)


# --------------------------------------------------------------------------------------------------
# The three shapes

BODY = {"queries": ["harbor", "?"], "k": 1}
SEARCH_R1_BODY = {"queries": ["harbor", "?"], "topk": 1, "return_scores": True}
LINES = ["0\tRed Harbor   A film directed by Peter Lane.", "1\tSalem   A town."]
DOCUMENT = {"id": "a", "contents": '"Red Harbor"\nA film directed by Peter Lane.'}
SCORED = PASSAGES[0] | {"score": 2.5}


@pytest.mark.parametrize(
    ("path", "body", "answer", "passage"),
    [
        ("", BODY, {"results": [[SCORED, PASSAGES[2]], []]}, SCORED),
        ("/search/", BODY, {"results": [[PASSAGES[0]], []]}, PASSAGES[0]),
        ("/queries", BODY, {"answers": [LINES, []]}, PASSAGES[0] | {"id": "Red Harbor"}),
        ("/wiki/queries", BODY, {"answers": [LINES, []]}, PASSAGES[0] | {"id": "Red Harbor"}),
        (
            "/retrieve",
            SEARCH_R1_BODY,
            {"result": [[{"document": DOCUMENT, "score": 2.5}], []]},
            SCORED,
        ),
    ],
)
def test_the_path_of_the_url_says_how_to_ask_and_how_to_read(server, path, body, answer, passage):
    url = server.behave(Response(json.dumps(answer)))
    found = open_retriever(url + path).search(["harbor", "\ud800"], 1)
    assert found == [[passage], []]  # at most k
    (request,) = server.seen
    assert (request.path.rstrip("/"), request.json) == (path.rstrip("/") or "/search", body)


def test_all_queries_go_in_one_request(server):
    url = server.behave(Response(json.dumps({"results": [[PASSAGES[0]]] * 400})))
    assert Remote(url).search(["x"] * 400, 1) == [[PASSAGES[0]]] * 400
    assert len(server.seen) == 1


# --------------------------------------------------------------------------------------------------
# Servers that misbehave


@pytest.mark.parametrize(
    "failure",
    [
        Response("", 503),
        Response("", 500),
        Response("", 429, headers={"Retry-After": "0"}),
        *(hang_up, reset, be_silent, cut),
    ],
)
def test_the_client_tries_again(server, failure):
    url = server.behave(failure, failure, GOOD)
    assert Remote(url).search(["x"], 1) == [[PASSAGES[0]]]
    assert len(server.seen) == 3


@pytest.mark.parametrize(
    ("answer", "message", "requests"),
    [
        (Response("busy", 503), "status 503: 'busy'", 7),
        (hang_up, "no answer: ", 7),
        (reset, "no answer: ", 7),
        (cut, "no answer: ", 7),
        (Response("one query failed", 500), "status 500: 'one query failed'", 7),
        (Response("no\nway", 422), r"status 422: 'no\nway'", 1),
        (HALF_JSON, """not JSON: '{"results": [[{"id"'""", 1),
        (Response("<html>" * 1000), "not JSON: '<html><html>", 1),
        (NESTED, "not JSON: '[[[", 1),
        (Response('{"results": [[{"id": 1}]]}'), "an answer of another shape", 1),
        (Response('{"results": []}'), "0 results for 1 queries", 1),
        (Response("[]"), "an answer of another shape", 1),
    ],
)
def test_after_the_last_try_there_is_one_clear_line(server, answer, message, requests):
    url = server.behave(answer)
    with pytest.raises((ConnectionError, RuntimeError)) as error:
        Remote(url).search(["x"], 1)
    line = str(error.value)
    is_silent = "status 503" in message or "no answer" in message
    assert isinstance(error.value, ConnectionError) == is_silent
    assert line.startswith(f"{url}/search: ") and message in line
    assert "\n" not in line and len(line) < 350
    assert len(server.seen) == requests


def test_the_waits_make_about_a_minute_and_the_server_cannot_ask_for_more_than_one_each():
    policy = RETRY_POLICY
    waits = []
    for _ in range(policy.total):
        policy = policy.increment()
        waits.append(policy.get_backoff_time())
    assert waits == [0, 2, 4, 8, 16, 32]
    assert policy.parse_retry_after("86400") == 60


def test_a_server_that_is_down_for_a_while_is_waited_for(monkeypatch):
    patient = RETRY_POLICY.new(total=20, backoff_factor=0.1, backoff_max=0.3)
    monkeypatch.setattr(search_client, "RETRY_POLICY", patient)
    with socket.create_server(("localhost", 0)) as listener:
        port = listener.getsockname()[1]
    server = Server(port=port)
    url = server.behave(GOOD)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(Remote(url).search, ["x"], 1)
        time.sleep(1)
        assert not found.done()
        with server:
            assert found.result(timeout=30) == [[PASSAGES[0]]]


# --------------------------------------------------------------------------------------------------
# Fingerprints


@pytest.mark.parametrize("path", ["", "/", "/search", "/queries/", "/retrieve"])
def test_the_fingerprint_of_a_server_is_what_it_reports(server, path):
    url = server.behave(Response(json.dumps({"fingerprint": "abc"})))
    assert retriever_fingerprint(url + path) == "abc"
    (request,) = server.seen
    assert (request.method, request.path) == ("GET", "/ready")


@pytest.mark.parametrize(
    "answer",
    [
        Response("", 404),
        Response("", 405),
        Response("<html>"),
        Response("[]"),
        Response('{"status": "ok"}'),
    ],
)
def test_a_server_of_another_project_has_no_fingerprint(server, answer):
    assert retriever_fingerprint(server.behave(answer)) is None
    assert len(server.seen) == 1


@pytest.mark.parametrize("answer", [hang_up, Response("", 503)])
def test_a_server_that_does_not_answer_is_not_one_without_a_fingerprint(server, answer):
    with pytest.raises(ConnectionError, match="/ready: "):
        retriever_fingerprint(server.behave(answer))


# --------------------------------------------------------------------------------------------------
# Keys, and what becomes of the episode


@pytest.mark.parametrize("header", ["secret-key", "Bearer secret-key"])
@pytest.mark.parametrize("status", [200, 403])
def test_a_key_that_the_server_quotes_is_in_no_message(server, header, status):
    url = server.behave(Response("x" * 195 + "secret-key is no key", status))
    with pytest.raises(RuntimeError) as error:
        fetch_json("GET", url, headers={"X-API-KEY": header}, fields={"q": "red harbor"})
    assert "secre" not in str(error.value) and "x***" in str(error.value)
    assert dict(server.seen[0].args) == {"q": "red harbor"}


@pytest.mark.parametrize(
    ("answer", "failures", "documents"),
    [
        (Response("", 500), 1, "(no results)"),
        (reset, 1, "(no results)"),
        (HALF_JSON, 1, "(no results)"),
        (Response('{"results": [[{"id": 1}]]}'), 1, "(no results)"),
        (Response('{"results": [[], []]}'), 1, "(no results)"),
        (Response('{"results": [[]]}'), 0, "(no results)"),
        (GOOD, 0, "(1)Red Harbor   A film directed by Peter Lane.\n<"),
    ],
)
def test_a_failed_search_is_counted_and_the_episode_goes_on(
    server, play, answer, failures, documents
):
    url = server.behave(answer)
    episode, _ = play([ASK, TELL], search=Remote(url).search)
    assert episode.search_failures == failures
    assert (episode.queries, episode.finish_reason) == (["red harbor"], "answer")
    assert documents in episode.segments[2][1]


def test_a_query_on_which_the_server_fails_fails_no_other(server, tokenizer):
    def answer(request: Request) -> Response:
        if "3" in request.json["queries"]:
            return Response("a panic", 500)
        return Response(json.dumps({"results": [[PASSAGES[0]] for _ in request.json["queries"]]}))

    server.clear()
    server.expect_request(re.compile(".*")).respond_with_handler(answer)
    found, search_error = look_up_together(tokenizer, Remote(server.url_for("/search")).search)
    assert [query for query, (failures, _) in found.items() if failures] == ["3"]
    assert "status 500: 'a panic'" in search_error


@pytest.mark.parametrize("silence", [hang_up, Response("", 503)])
def test_a_silent_server_costs_its_retries_once_for_all_queries(server, tokenizer, silence):
    url = server.behave(silence)
    found, _ = look_up_together(tokenizer, Remote(url).search)
    assert [failures for failures, _ in found.values()] == [1] * 8
    assert len(server.seen) == 7
