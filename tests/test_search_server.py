"""The search server: three protocols, shared searches, bad requests, start and stop."""

import asyncio
import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import urllib3
from hypothesis import example, given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from bm25 import BM25, TantivyBM25
from records import write_jsonl
from retriever import build_bm25, open_retriever, retriever_fingerprint
from search_client import Remote
from tools import search_server
from tools.control_search import RandomPassages, open_control
from tools.search_server import MAX_BODY_BYTES, MAX_PASSAGES, Batcher, SearchRequest, make_app

HALF_REQUEST = b"POST /search HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
WORDS = "red blue harbor salem film lane town river stone light".split()
QUERIES = [f"{first} {second}" for first in WORDS for second in WORDS]
CORPUS = []
for i in range(3000):
    words = [WORDS[(i * 7 + j * (1 + i % 3)) % 10] for j in range(20)]
    CORPUS.append({"id": str(i), "title": f"{WORDS[i % 10]} {i}", "text": " ".join(words)})


class Server:
    """The server in a process of its own, with `constants` of its module replaced."""

    def __init__(self, index, *flags, **constants):
        arguments = [str(word) for word in ("--index", index, "--port", 0, *flags)]
        code = (
            f"from tools import search_server; vars(search_server).update({constants});"
            f"search_server.main({arguments})"
        )
        root = search_server.__file__.rpartition("/tools/")[0]
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=root, stdout=-1, stderr=-1, text=True
        )
        self.url = re.search(r"http://\S+", self.process.stdout.readline())[0]
        self.address = ("127.0.0.1", int(self.url.rpartition(":")[2]))

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """A BM25 index of CORPUS."""
    folder = tmp_path_factory.mktemp("server")
    write_jsonl(folder / "corpus.jsonl", CORPUS)
    build_bm25(str(folder / "corpus.jsonl"), folder / "index")
    return folder / "index"


@pytest.fixture(scope="module")
def server(index):
    server = Server(index)
    yield server
    code, _, err = server.stop()
    assert code == 0 and "Traceback" not in err


def post(url, **body):
    return urllib3.request("POST", url, json=body).json()


def test_all_three_protocols_give_what_a_direct_search_gives(server):
    direct = TantivyBM25.build(CORPUS).search(QUERIES, 4)
    for path in ("", "/search", "/retrieve"):
        assert Remote(server.url + path).search(QUERIES, 4) == direct
    lines = []
    for passages in direct:
        lines.append([f"{n}\t{p['title']}   {p['text']}" for n, p in enumerate(passages)])
    assert post(server.url + "/queries", queries=QUERIES, k=4) == {"answers": lines}


def test_search_r1_gets_400_answers_in_order_from_one_request(server):
    """Its request script sends all queries of a rollout batch at once."""
    queries = QUERIES * 4
    scored = []
    for passages in TantivyBM25.build(CORPUS).search(queries, 3):
        contents = [f'"{passage["title"]}"\n{passage["text"]}' for passage in passages]
        hits = []
        for passage, text in zip(passages, contents, strict=True):
            document = {"id": passage["id"], "contents": text}
            hits.append({"document": document, "score": passage["score"]})
        scored.append(hits)
    url = server.url + "/retrieve"
    assert len(queries) == 400
    assert post(url, queries=queries, k=None, topk=3, return_scores=True) == {"result": scored}
    documents = [hit["document"] for hit in scored[0]]
    assert post(url, queries=queries[:1]) == {"result": [documents]}


def test_concurrent_clients_get_what_a_single_one_gets(server):
    remote = Remote(server.url)
    alone = remote.search(QUERIES, 3)
    with ThreadPoolExecutor(32) as pool:
        for k in (3, 2):
            futures = [pool.submit(remote.search, [query], k) for query in QUERIES * 3]
            found = [future.result()[0] for future in futures]
            assert found == [passages[:k] for passages in alone] * 3


# --------------------------------------------------------------------------------------------------
# Controls: an oracle and random passages

PASSAGES = [
    {"id": "film", "title": "Red Harbor", "text": "It was directed by Peter Lane."},
    {"id": "other film", "title": "Lane", "text": "Peter directed it after the film Red Harbor."},
    {"id": "person", "title": "Peter Lane", "text": "He was born in Salem."},
    {"id": "town", "title": "Salem", "text": "It is a town."},
]
ANSWERS = {
    "Who directed the film Red Harbor?": ["Unknown", "Peter Lane"],
    "Where was Peter Lane born?": ["Salem"],
    "Salem?": ["Peter Lane"],
    "Salem, Salem?": ["Red Harbor"],
    "Who is the mayor of Salem?": ["Nobody"],
}
# By query: the passages that hold an answer of the question asked.
HOLDING = {
    "Who directed the film Red Harbor?": {"film", "person"},
    "Where was Peter Lane born?": {"person", "town"},
    "Salem?": {"film", "person"},
    "Who is the mayor of Salem?": set(),
    "Peter born": {"person", "town"},  # the nearest question is the second one
    "Salem": {"film", "other film"},  # and here the fourth one
    "zebra": set(),
    "": set(),
}


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """A folder with four passages and questions about them."""
    folder = tmp_path_factory.mktemp("films")
    write_jsonl(folder / "c.jsonl", PASSAGES)
    questions = []
    for number, (text, answers) in enumerate(ANSWERS.items()):
        questions.append({"id": number, "question": text, "answers": answers})
    write_jsonl(folder / "q.jsonl", questions)
    return folder


def test_the_oracle_finds_only_passages_that_hold_an_answer_in_one_piece(films):
    oracle = Server(films / "c.jsonl", "--control", "oracle", "--questions", films / "q.jsonl")
    retriever = open_retriever(oracle.url)
    results = retriever.search([*HOLDING], 4)
    found = [{passage["id"] for passage in passages} for passages in results]
    assert found == list(HOLDING.values())
    assert retriever.search([*HOLDING], 1) == [passages[:1] for passages in results]
    assert oracle.stop()[0] == 0


def test_the_oracle_knows_the_answers_of_all_files_to_a_question(films):
    write_jsonl(films / "more.jsonl", [{"id": 0, "question": "Salem?", "answers": ["Nobody"]}])
    questions = [str(films / "q.jsonl"), str(films / "more.jsonl")]
    _, oracle = open_control("oracle", str(films / "c.jsonl"), questions)
    assert {passage["id"] for passage in oracle.search(["Salem?"], 4)[0]} == HOLDING["Salem?"]


def test_random_passages_are_those_of_the_query(films):
    drawn = []
    for _ in range(2):
        server = Server(films / "c.jsonl", "--control", "random")
        drawn.append(open_retriever(server.url).search([*QUERIES, *QUERIES], 2))
        assert server.stop()[0] == 0
    assert drawn[0] == drawn[1] and drawn[0][:100] == drawn[0][100:]
    pairs = {tuple(passage["id"] for passage in passages) for passages in drawn[0]}
    assert len(pairs) == 4 * 3  # each two of the four, in each order
    everything = RandomPassages(str(films / "c.jsonl")).search(["\ud800"], 9)[0]
    assert sorted(everything, key=PASSAGES.index) == PASSAGES


def test_controls_have_fingerprints_of_their_own(films):
    index, questions = str(films / "c.jsonl"), str(films / "q.jsonl")
    names = [retriever_fingerprint(index)]
    for control, files in (("random", []), ("oracle", [questions]), ("oracle", [questions] * 2)):
        name, _ = open_control(control, index, files)
        assert names[0] in name
        names.append(name)
    assert len(set(names)) == len(names)
    server = Server(index, "--control", "random")
    assert retriever_fingerprint(server.url) == names[1]
    assert server.stop()[0] == 0


# --------------------------------------------------------------------------------------------------
# Requests that share a search


class Recorder(BM25):
    """Keeps the queries of each search; one with the query "fault" does what `fault` does."""

    def __init__(self, fault=None):
        super().__init__(CORPUS[:10])
        self.fault = fault
        self.searches = []

    def search(self, queries, k):
        self.searches.append((queries, k))
        time.sleep(0.05)
        return self.fault() if "fault" in queries else super().search(queries, k)


def search_during_a_search(retriever, requests):
    """The result or error of each request; all arrive while a search for "stone" runs."""

    async def search_all():
        batcher = Batcher(retriever)
        running = asyncio.create_task(batcher.search(SearchRequest(["stone"], 1, False)))
        await asyncio.sleep(0.01)
        searches = [batcher.search(SearchRequest(*request, False)) for request in requests]
        results = await asyncio.gather(*searches, return_exceptions=True)
        await running
        return results

    return asyncio.run(search_all())


def test_requests_that_arrive_during_a_search_share_the_next_ones_each_with_its_own_k():
    retriever = Recorder()
    requests = [(["red"], 1), (["blue", "lane"], 2), (["film"], 1), ([], 2), (["town"], 2)]
    results = search_during_a_search(retriever, requests)
    assert retriever.searches == [
        (["stone"], 1),
        (["red", "film"], 1),
        (["blue", "lane", "town"], 2),
    ]
    assert results == [BM25(CORPUS[:10]).search(*request) for request in requests]


class Panic(BaseException):
    """As tantivy raises: no Exception."""


def panic():
    raise Panic


@pytest.mark.parametrize("fault", [panic, lambda: None, list, lambda: [[CORPUS[0]]] * 3])
def test_a_search_that_fails_or_has_another_number_of_results_fails_its_request_alone(fault):
    """Of too few or too many results those of one client would reach another."""
    retriever = Recorder(fault)
    requests = [(["harbor"], 1), (["fault", "red"], 1), (["salem"], 1)]
    first, failed, last = search_during_a_search(retriever, requests)
    assert isinstance(failed, RuntimeError)
    assert [first[0], last[0]] == BM25(CORPUS[:10]).search(["harbor", "salem"], 1)
    with TestClient(make_app(Batcher(retriever))) as client:
        answer = client.post("/search", json={"queries": ["fault", "harbor"]})
        assert (answer.status_code, answer.text) == (500, str(failed))
        found = client.post("/search", json={"queries": ["harbor"], "k": 1}).json()
        assert found == {"results": first}


# --------------------------------------------------------------------------------------------------
# Bad requests

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values) | st.dictionaries(st.text(), values),
)
FIELDS = {"queries": st.lists(st.text()) | JSON, "k": st.integers(0, MAX_PASSAGES) | JSON}


@given(st.fixed_dictionaries({}, optional=FIELDS) | JSON)
@example({"queries": ["a lone surrogate \ud800"], "k": None})
def test_every_body_is_a_request_within_the_bounds_or_refused(value):
    try:
        request = search_server.parse_request(json.dumps(value).encode())
    except ValueError as error:
        assert "expected" in str(error) and "\n" not in str(error)
    else:
        assert request.queries == value["queries"]
        assert request.k == (3 if value.get("k") is None else value["k"]) >= 1
        assert all(isinstance(query, str) for query in request.queries)
        assert len(request.queries) * request.k <= MAX_PASSAGES


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"{", 422, "JSONDecodeError"),
        (b"[" * 100_000, 422, "RecursionError"),
        (b'{"queries": ["\xff"]}', 422, "UnicodeDecodeError"),
        (b'{"k": 3}', 422, "'queries'"),
        (b'{"queries": "red"}', 422, "list of strings"),
        (b'{"queries": ["red"], "k": 0}', 422, "at least 1"),
        (b'{"queries": ["red"], "k": true}', 422, "whole number"),
        (b'{"queries": ["red"], "k": %d}' % (MAX_PASSAGES + 1), 422, "100000"),
        (json.dumps({"queries": ["x"] * 50_001, "topk": 2}).encode(), 422, "100000"),
        (b'{"queries": ["' + b"x" * MAX_BODY_BYTES + b'"]}', 413, "Too Large"),
    ],
)
def test_a_bad_request_is_refused_with_its_reason(server, body, status, reason):
    answer = urllib3.request("POST", server.url + "/search", body=body, retries=False)
    assert answer.status == status and reason in answer.data.decode()


def test_a_head_of_megabytes_is_refused(server):
    with contextlib.suppress(urllib3.exceptions.HTTPError):  # refused before all of it was sent
        headers = {"X": "x" * 2_000_000}
        assert (
            urllib3.request("GET", server.url + "/health", headers=headers, retries=False).status
            == 400
        )


@pytest.mark.parametrize("sent", [b"", b"GET /hea", HALF_REQUEST, b"\0\xff" * 1000])
@pytest.mark.parametrize("broken_off", [True, False])
def test_requests_that_do_not_end_do_not_disturb_others(server, sent, broken_off):
    with socket.create_connection(server.address) as client:
        client.sendall(sent)
        if broken_off:
            client.close()
        assert len(Remote(server.url).search(["red"], 3)[0]) == 3


# --------------------------------------------------------------------------------------------------
# Start and stop


def test_the_server_is_healthy_ready_and_on_this_machine_alone(server):
    for path in ("/health", "/ready"):
        assert urllib3.request("GET", server.url + path).json()["status"] == "ok"
    assert urllib3.request("GET", server.url + "/nothing").status == 404
    assert server.url.startswith("http://127.0.0.1:")


def test_while_the_index_opens_the_server_is_healthy_and_not_ready():
    batcher = Batcher()
    with TestClient(make_app(batcher)) as client:
        search = lambda: client.post("/search", json={"queries": ["harbor"]})  # noqa: E731
        assert client.get("/health").status_code == 200
        assert client.get("/ready").status_code == search().status_code == 503
        batcher.retriever = BM25(CORPUS[:10])
        assert client.get("/ready").status_code == search().status_code == 200


def test_the_server_reports_the_fingerprint_of_what_it_searches(server, index):
    assert retriever_fingerprint(server.url) == retriever_fingerprint(str(index)) is not None


def test_what_the_user_can_mend_is_one_line_and_status_2(server, index, tmp_path, monkeypatch):
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    missing = str(tmp_path / "none")
    for flags, message in {
        ("--index", missing, "--port", "0"): "neither a passage file",
        ("--index", missing, "--port", str(server.address[1])): "in use",
        ("--index", missing, "--port", "70000"): "--port 70000",
        ("--web", "serper", "--port", "0"): "set SERPER_API_KEY",
        ("--port", "0"): "either --index or --web",
        ("--index", missing, "--web", "brave"): "either --index or --web",
        ("--web", "brave", "--control", "random"): "--control needs --index",
        ("--index", missing, "--rate", "2"): "--rate needs --web",
        ("--index", missing, "--control", "oracle"): "--control oracle and --questions need each",
        ("--index", missing, "--questions", missing): "--control oracle and --questions need each",
        ("--index", str(index), "--control", "random", "--port", "0"): "need a passage file",
        (*f"--index {index} --control oracle --port 0 --questions".split(), missing): "none",
    }.items():
        command = [sys.executable, search_server.__file__, *flags]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert result.returncode == 2 and message in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_a_signal_stops_the_server_as_soon_as_it_is_ready_and_with_a_stalled_client(index):
    assert Server(index).stop()[0] == 0
    server = Server(index, SHUTDOWN_SECONDS=1)
    with socket.create_connection(server.address) as stalled:
        stalled.sendall(HALF_REQUEST)
        time.sleep(0.5)
        start = time.monotonic()
        assert server.stop()[0] == 0 and time.monotonic() - start < 20


def test_sigterm_answers_every_request_that_was_received(index):
    server = Server(index)
    expected = post(server.url + "/search", queries=QUERIES)
    answers = []

    def ask_until_refused():
        pool = urllib3.PoolManager(retries=False)
        with contextlib.suppress(urllib3.exceptions.HTTPError):
            while True:
                answer = pool.request("POST", server.url + "/search", json={"queries": QUERIES})
                answers.append(answer.json())

    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(ask_until_refused) for _ in range(8)]
        while len(answers) < 8:
            time.sleep(0.01)
        code, out, err = server.stop()
        assert [client.result() for client in clients] == [None] * 8
    assert (code, err) == (0, "")
    assert all(answer == expected for answer in answers)  # none was cut short
    assert f"stopped: {len(answers) + 1} requests answered" in out  # none was lost on its way
