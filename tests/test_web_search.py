"""Web search, against the answers that the providers document."""

import sqlite3
import time

import pytest
from starlette.testclient import TestClient

from tools import search_server
from tools.search_server import Batcher, make_app
from tools.web_search import PROVIDERS, WebSearch

SERPER = {
    "searchParameters": {"q": "red harbor", "type": "search"},
    "organic": [
        {
            "title": "Red Harbor",
            "link": "https://a.example",
            "snippet": "A film &amp; more\nby&#10;Lane.",
        },
        {"title": "No snippet", "link": "https://b.example", "position": 2},
    ],
}
BRAVE_HIT = {
    "title": "Red Harbor",
    "url": "https://a.example",
    "description": "A film &amp; more\nby Lane.",
}
BRAVE = {"type": "search", "web": {"results": [BRAVE_HIT]}}
FIRST = {"id": "https://a.example", "title": "Red Harbor", "text": "A film & more by Lane."}
SECOND = {"id": "https://b.example", "title": "No snippet", "text": ""}


@pytest.fixture
def open_web(httpserver, monkeypatch, tmp_path):
    """Open a `WebSearch` whose provider is the local server."""
    for provider in PROVIDERS.values():
        monkeypatch.setattr(provider, "url", httpserver.url_for("/"))
        monkeypatch.setenv(provider.key_variable, "secret-key")
    return lambda name="serper", rate=1000: WebSearch(name, rate, tmp_path / "web.sqlite")


def test_hits_of_serper_are_passages(httpserver, open_web):
    expected = {"json": {"q": "red harbor", "num": 5}, "headers": {"X-API-KEY": "secret-key"}}
    httpserver.expect_request("/", "POST", **expected).respond_with_json(SERPER)
    assert open_web().search(["red harbor"], 5) == [[FIRST, SECOND]]


def test_hits_of_brave_are_passages(httpserver, open_web):
    fields = {"q": "red harbor", "count": "5", "text_decorations": "false"}
    headers = {"X-Subscription-Token": "secret-key"}
    httpserver.expect_request("/", "GET", query_string=fields, headers=headers).respond_with_json(
        BRAVE
    )
    assert open_web("brave").search(["red harbor"], 5) == [[FIRST]]


def test_the_search_server_answers_from_the_web(httpserver, open_web):
    httpserver.expect_request("/").respond_with_json(SERPER)
    with TestClient(make_app(Batcher(open_web()))) as client:
        answer = client.post("/queries", json={"queries": ["red harbor"], "k": 1})
        assert answer.json() == {"answers": [["0\tRed Harbor   A film & more by Lane."]]}


def test_a_server_of_the_web_reports_that_it_is_not_repeatable(open_web, monkeypatch, tmp_path):
    opened = []
    monkeypatch.setattr(search_server, "run_server", lambda source, *_: opened.append(source()))
    monkeypatch.setenv("HOME", str(tmp_path))  # of the cache
    search_server.serve(web="serper")
    ((fingerprint, retriever),) = opened
    assert isinstance(retriever, WebSearch)
    assert fingerprint == "serper: web search, not repeatable"


def test_what_was_asked_once_is_answered_from_disk_also_by_another_process(httpserver, open_web):
    httpserver.expect_request("/").respond_with_json(SERPER)
    first = open_web().search(["red harbor", "red harbor"], 2)
    assert open_web().search(["red harbor", "red harbor"], 2) == first
    assert len(httpserver.log) == 1
    open_web().search(["red harbor"], 3)
    assert len(httpserver.log) == 2


def test_no_hits_are_an_empty_result_and_nonsense_is_an_error_that_is_not_cached(
    httpserver, open_web
):
    for answer in (
        {"organic": []},
        {"organic": [{}]},
        {"organic": [{"link": 1, "title": 2}]},
        SERPER,
    ):
        httpserver.expect_ordered_request("/").respond_with_json(answer)
    web = open_web()
    assert web.search(["nothing"], 2) == [[]]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="another shape"):
            web.search(["red"], 2)
    assert web.search(["red"], 1) == [[FIRST]]
    assert web.search(["nothing"], 2) == [[]]


def test_the_rate_is_kept(httpserver, open_web):
    httpserver.expect_request("/").respond_with_json(SERPER)
    start = time.monotonic()
    open_web(rate=20).search([f"query {n}" for n in range(9)], 1)
    assert time.monotonic() - start >= 8 / 20 and len(httpserver.log) == 9


def test_the_key_is_in_no_file_and_no_message(httpserver, open_web, tmp_path):
    httpserver.expect_ordered_request("/").respond_with_json(SERPER)
    refusal = "x" * 195 + "secret-key is no key"
    httpserver.expect_ordered_request("/").respond_with_data(refusal, status=403)
    web = open_web()
    web.search(["red"], 1)
    with pytest.raises(RuntimeError) as error:
        web.search(["blue"], 1)
    assert "secre" not in str(error.value) and "x***" in str(error.value)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert files and all(b"secret-key" not in file.read_bytes() for file in files)
    rows = sqlite3.connect(tmp_path / "web.sqlite").execute("SELECT query FROM hits").fetchall()
    assert rows == [("red",)]


def test_what_cannot_be_opened_is_refused_by_name(open_web, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="a rate of 0"):
        open_web(rate=0)
    (tmp_path / "web.sqlite").write_text("no database")
    with pytest.raises(ValueError, match=r"web\.sqlite: damaged .* remove it"):
        open_web()
    monkeypatch.delenv("BRAVE_API_KEY")
    with pytest.raises(ValueError, match="set BRAVE_API_KEY"):
        open_web("brave")
