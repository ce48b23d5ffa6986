"""What must hold of hostile text, wrong search results and hostile files; safety."""

import contextlib
import inspect
import io
import json
import re
import shutil
import time
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import ScriptedEngine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_rollout import consistent, turns_of
from tiny import ASK, SPECIAL, TELL
from werkzeug import Request, Response

import data_prep
import evaluate
import metrics
import records
import retriever
from reward import REWARDS, TAGS, load_prompt, score_episode
from rollout import Episode, Limits, Rollout, data_encoder, prompt_encoder
from tools import report, search_server
from tools.web_search import PROVIDERS, WebSearch

bounded = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# --------------------------------------------------------------------------------------------------
# Hostile text: what a policy may write and what a passage may hold

TAG_WORDS = [word for tag in TAGS for word in tag]
HALF_TAGS = [half for word in TAG_WORDS for half in (word[: len(word) // 2], word[4:])]
ODD = ["\0", "\u202e", "\u2028", "\r\n", "  ", "汉", "🙂", "e\u0301", "\ufffd", "\\", '"']
ODD += ["{question}", "w" * 200]
WORDS = [*TAG_WORDS, *HALF_TAGS, *SPECIAL, *ODD, " word", " b", "\n"]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=10).map("".join)
TURNS = TEXTS | TEXTS.map(lambda text: text + ASK) | TEXTS.map(lambda text: text + TELL)
SCRIPTS = st.lists(TURNS | st.just(ASK), min_size=1, max_size=5)
FIELDS = {"title": TEXTS, "text": TEXTS | st.text(max_size=20)}
PASSAGES = st.lists(st.fixed_dictionaries(FIELDS), max_size=4)  # none, or fewer or more than 3


def play_hostile(tokenizer, script, passages, question="q", **limits) -> Episode:
    """One episode of the script, in which every query finds the passages."""
    # The engine holds one turn at a time: it would count documents that the script forges.
    engine = ScriptedEngine(tokenizer, script[:1])
    encode = prompt_encoder(tokenizer, [("text", "Question: {question}\n<think>")])
    episode = Episode({"id": "0"}, encode(question))

    def search(queries, k):
        engine.script = script[len(episode.queries) :][:1] or script[-1:]
        return [passages for _ in queries]

    limits = {"max_context": 10**6, "max_turn_tokens": 10**5, "max_searches": 4} | limits
    rollout = Rollout(engine, tokenizer, search, TAGS, Limits(**limits), deterministic=True)
    assert list(rollout.run([episode])) == [episode]
    return episode


def masked_out(episode) -> list[int]:
    """The ids that are not trained on."""
    pairs = zip(episode.token_ids, episode.action_mask, strict=True)
    return [token for token, acted in pairs if not acted]


def document_ids(
    tokenizer, passages, max_document_tokens, new_lines: int = 2, room: int = 10**6
) -> list[int]:
    """The ids of a documents block that begins with so many new lines.

    All of it is tokenised, then cut; its tag stays whole, unless the context has less room.
    """
    encode = data_encoder(tokenizer)
    lines = [f"({n}){p['title']}   {p['text']}" for n, p in enumerate(passages, 1)]
    text = f"{TAGS.documents.opening}\n" + "\n".join(lines or ["(no results)"])
    ids = encode("\n" * new_lines + text)
    tag = encode(f"\n{TAGS.documents.closing}")
    budget = min(max_document_tokens, room) - len(tag)
    return (ids[: max(0, budget)] + tag)[:room]


@bounded
@given(
    script=SCRIPTS,
    passages=PASSAGES,
    question=TEXTS,
    max_turn_tokens=st.sampled_from([7, 100, 10_000]),
    max_context=st.sampled_from([1, 60, 200, 10**6]),
    max_searches=st.integers(1, 4),
)
def test_every_episode_is_consistent(tokenizer, script, passages, question, **limits):
    episode = play_hostile(tokenizer, script, passages, question, **limits)
    consistent(episode, tokenizer)
    token_ids = list(episode.prompt_ids)
    for number, turn in enumerate(turns_of(episode), 1):
        token_ids += turn
        if number <= len(episode.queries):
            missing = 2 - tokenizer.decode(turn[-1:]).count("\n")
            room = limits["max_context"] - len(token_ids)
            longest = Limits().max_document_tokens
            token_ids += document_ids(tokenizer, passages, longest, missing, room)
    assert episode.token_ids == token_ids
    assert len(token_ids) <= max(limits["max_context"], len(episode.prompt_ids))
    assert not set(masked_out(episode)) & set(tokenizer.all_special_ids)
    kinds = [kind for kind, _ in episode.segments]
    assert kinds == ["prompt", *["policy", "documents"] * 5][: len(kinds)]
    assert len(episode.queries) == kinds.count("documents") <= limits["max_searches"]
    assert all(query and query == query.strip() for query in episode.queries)
    assert episode.search_failures == 0
    ends = ["answer", "eos", "length", "max_searches", "bad_query"]
    assert episode.finish_reason in (["length"] if limits["max_context"] == 1 else ends)


@bounded
@given(SCRIPTS, PASSAGES)
def test_documents_change_no_reward_whatever_the_policy_wrote(tokenizer, script, passages):
    episode = play_hostile(tokenizer, script, passages)
    searches = len(episode.queries)
    written = "".join(text for kind, text in episode.segments if kind == "policy")
    for reward in REWARDS:
        scores = score_episode(episode.segments, searches, ["b", "汉"], reward)
        assert scores == score_episode([("policy", written)], searches, ["b", "汉"], reward)
        assert abs(scores["reward"]) < 10


# --------------------------------------------------------------------------------------------------
# A search backend that answers wrongly

WRONG_ANSWERS = [[], [[], [], []], None, 7, "ab", {"results": []}, [["text"]] * 2, [[None], []]]
WRONG_ANSWERS += [KeyError("x"), RecursionError(), BaseException("as a panic of tantivy")]
WRONG_PASSAGES = [{"text": "no title"}, {"title": "no text"}, {"title": "T", "text": "\ud800"}]


@pytest.mark.parametrize("answer", [*WRONG_ANSWERS, *([[p], []] for p in WRONG_PASSAGES)])
def test_a_wrong_answer_is_a_failed_search_of_every_query_that_gets_it(tokenizer, scripted, answer):
    engine = scripted([ASK, TELL])
    finish = engine.step
    engine.step = lambda: finish(2)  # both at once, so that their queries go together
    search = Mock(return_value=answer)
    if isinstance(answer, BaseException):
        search.side_effect = answer  # raises it
    rollout = Rollout(engine, tokenizer, search, TAGS, Limits(), deterministic=True)
    episodes = [Episode({}, tokenizer.encode(f"Question: {i}")) for i in range(2)]
    assert len(list(rollout.run(episodes))) == 2 and rollout.search_error
    assert search.call_count == 3  # both together, then each alone
    for episode in episodes:
        consistent(episode, tokenizer)
        assert (episode.search_failures, episode.finish_reason) == (1, "answer")
        assert "(no results)" in episode.segments[2][1]


@pytest.mark.parametrize("text", ["w" * 20_000_000, "word " * 4_000_000, "\0" * 20_000_000])
def test_a_gigantic_passage_costs_no_more_than_what_can_be_used_of_it(tokenizer, text):
    """Tokenised as a whole, 4 MB of one word take 11 s."""
    begin = time.monotonic()
    episode = play_hostile(tokenizer, [ASK, TELL], [{"title": "T", "text": text}])
    assert time.monotonic() - begin < 3
    assert len(masked_out(episode)[len(episode.prompt_ids) :]) == Limits().max_document_tokens
    assert episode.segments[2][1].endswith("\n<|end_of_documents|>")


REPEATED = st.builds(lambda word, times: word * times, st.sampled_from(WORDS), st.integers(1, 300))


@bounded
@given(st.lists(REPEATED, max_size=10).map("".join), st.sampled_from([7, 30, 100]))
def test_a_passage_is_cut_where_its_tokens_end(tokenizer, text, budget):
    """A block is its first tokens and its closing tag, which alone has more than 7."""
    passages = [{"title": "T", "text": text}] * 3
    episode = play_hostile(tokenizer, [ASK, TELL], passages, max_document_tokens=budget)
    assert masked_out(episode) == episode.prompt_ids + document_ids(tokenizer, passages, budget)


# --------------------------------------------------------------------------------------------------
# Hostile files: either a result that can be used, or one line that names the file and status 2

GOOD = {"question": "q", "answer": "x", "answers": ["x"], "answer_aliases": [], "answerable": True}
GOOD |= {"dataset": "d", "title": "t", "text": "x", "pred_ans": "x", "judge_reply": "True"}
GOOD |= {"wikipedia_id": 1, "wikipedia_title": "t", "rollouts": 3, "solved": True, "protocol": {}}
GOOD |= {"results": {"d": {"n": 2, "em": 0.5, "intervals": {"em": [0.1, 0.9]}}}}
GOOD |= {"id": 1, "_id": 1, "idx": 1}
OTHER = GOOD | {"id": 2, "_id": 2, "idx": 2, "text": ["x", "y"]}
CONTENTS = {"id": 3, "contents": '"t"\nx'}
KEYS = st.sampled_from([*GOOD, "contents", "x"])
ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("\ud800")
VALUES = st.recursive(ATOMS, lambda v: st.lists(v) | st.dictionaries(KEYS, v), max_leaves=6)


def spoiled(record: dict):
    """A strategy: the record with another value at one of its keys."""
    items = st.tuples(st.sampled_from(sorted(record)), VALUES)
    return items.map(lambda item: record | dict([item]))


def as_file(values, missing="", encoding="utf-8", cut=0) -> bytes:
    """The values as JSON lines, with one key renamed and without the last bytes."""
    text = "".join(json.dumps(value) + "\n" for value in values)
    data = text.replace(f'"{missing}":', '"x":').encode(encoding)
    return data[: len(data) - cut]


RECORDS = st.sampled_from([GOOD, OTHER, CONTENTS]).flatmap(spoiled) | VALUES
LINES = st.lists(RECORDS, max_size=4)
MISSING = st.just("") | KEYS
ENCODINGS = st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32", "cp037"])
CUTS = st.sampled_from([0, 0, 0, 1, 2, 9])
JSON_FILES = st.builds(as_file, LINES | LINES.map(lambda array: [array]), MISSING, ENCODINGS, CUTS)
FIXED_FILES = [as_file([GOOD]), as_file([OTHER]), as_file([GOOD | {"question": "\ud800"}])]
FIXED_FILES += [b"1\tx\ty\n", b"question,answer\nq,x\n", b"id,question,answer\n1,2,3,4\n", b"PAR1"]
FIXED_FILES += [b"", b"\n\n", b"\0", b"\xff" * 100_000, b"[" * 100_000, b'{"id":' * 100_000]
FIXED_FILES += [b"1" * 10_000, b'{"id": "\xed\xa0\x80"}', b"\x1f\x8b\x08", b"SQLite format 3\0"]
FIXED_FILES += [b"{}\n", b'{}\n"\\ud800"\n', b'{"x": "a\\nb"}\n', b'{"x": "%s"}\n' % (b"x" * 10**6)]
FILES = st.binary(max_size=60) | JSON_FILES | st.sampled_from(FIXED_FILES)


def read_or_refuse(read, path):
    """What `read` gives; None if it ends with status 2 and one short line that names `path`."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr), records.user_errors("program"):
            return read()
    except SystemExit as stop:
        message = stderr.getvalue()
        assert stop.code == 2 and str(path) in message
        assert message.count("\n") == 1 and len(message) < 1000 + len(str(path))


def read_outputs(path):
    outputs = evaluate.read_outputs(path)
    assert evaluate.table(evaluate.measure_outputs(outputs))
    return outputs


def convert(path, format):
    return list(data_prep.convert([path], format))


QUESTION = ("id", "question", "dataset", "answers")
PASSAGE = ("id", "title", "text")
COUNTED = {"parse": data_prep.parse_counted, "expected": "a counted question"}
READERS = {  # functions of a path, and the keys of texts in the records that they return
    "questions": (records.read_questions, QUESTION),
    "counted questions": (partial(records.read_jsonl, **COUNTED), QUESTION),
    "passages": (records.read_passages, PASSAGE),
    "passages to search": (lambda p: retriever.open_retriever(str(p)).search(["x"], 1)[0], PASSAGE),
    "published JSON": (lambda path: data_prep.published_questions(path, "d", True)[0], QUESTION),
    "published CSV": (lambda path: data_prep.published_questions(path, "d", True)[0], QUESTION),
    "outputs": (read_outputs, ("dataset", "answer", "answers")),
    "metrics": (evaluate.read_metrics, ()),
    "journal": (lambda path: records.Journal(path, {}).records, ()),
    "prompt": (lambda path: load_prompt(str(path)), ()),
}
for name in data_prep.FORMATS:
    READERS[f"corpus {name}"] = (partial(convert, format=name), PASSAGE)


def is_read(folder, reader, data) -> bool:
    """Whether the reader takes the data. What it returns can be used and written as UTF-8."""
    read, keys = READERS[reader]
    path = folder / ("hostile.csv" if reader == "published CSV" else "hostile.jsonl")
    path.write_bytes(data)
    result = read_or_refuse(lambda: read(path), path)
    json.dumps(result, ensure_ascii=False).encode()
    for record, key in product(result or [], keys):
        texts = record[key] if key == "answers" else [record[key]]
        assert texts and all(isinstance(text, str) for text in texts)
    return result is not None


def test_a_question_as_long_as_a_book_is_refused(tmp_path):
    """A batch is as wide as its longest question."""
    assert is_read(tmp_path, "questions", as_file([GOOD | {"question": "w" * 100_000}]))
    assert not is_read(tmp_path, "questions", as_file([GOOD | {"question": "w" * 100_001}]))


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_takes_a_good_file_and_refuses_a_bad_one_by_name(tmp_path, reader):
    assert any([is_read(tmp_path, reader, data) for data in FIXED_FILES])


@pytest.mark.parametrize("reader", READERS)
@settings(bounded, max_examples=50)
@given(data=FILES)
def test_a_hostile_file_is_read_or_refused_by_name(tmp_path_factory, reader, data):
    is_read(tmp_path_factory.getbasetemp(), reader, data)


def test_only_what_is_raised_on_purpose_ends_in_one_line(capsys):
    """What the interpreter raises in a line of ours is a bug, and its traceback is wanted."""
    with pytest.raises(ValueError, match="not enough"), records.user_errors("program"):
        metrics.format_cell("em", [0.5])  # an interval without its upper bound
    with pytest.raises(SystemExit), records.user_errors("program"):
        data_prep.parse_draw("hotpotqa:easy")
    assert capsys.readouterr().err.startswith("program: --draw hotpotqa:easy: expected ")


@pytest.fixture(scope="module")
def indexes(tmp_path_factory):
    """A folder with the index folders "bm25" and "dense"."""
    folder = tmp_path_factory.mktemp("indexes")
    corpus = folder / "corpus.jsonl"
    records.write_jsonl(corpus, [{"id": n, "title": "T", "text": f"red {n}"} for n in range(20)])
    encoder = SimpleNamespace(model=SimpleNamespace(get_embedding_dimension=lambda: 4))
    encoder.passages = lambda passages, pool: np.eye(len(passages), 4, dtype=np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dense.Encoder", lambda *_: encoder)
        patch.setattr("retriever.Encoder", lambda *_: encoder)
        retriever.build_bm25(str(corpus), folder / "bm25")
        retriever.build_dense(str(corpus), folder / "dense", "e")
        yield folder


def damages(file: Path):
    """A strategy: what the file of an index may hold."""
    whole = file.read_bytes()
    cut = st.integers(0, len(whole)).map(lambda end: whole[:end])
    if file.name == "faiss.index":  # of a forged one, in its right size, faiss dies
        return cut
    if file.name == "rows.npy":
        shapes = st.sampled_from([b"(20,)", b"(7,3)", b"(0,) ", b"()   "])
        return cut | FILES | shapes.map(lambda shape: whole.replace(b"(21,)", shape))
    if file.name == "index.json":
        header = json.loads(whole)
        edited = st.builds(as_file, st.tuples(spoiled(header)), st.sampled_from(["", *header]))
        return cut | FILES | edited
    return cut | FILES


@pytest.mark.parametrize("kind", ["bm25", "dense"])
@settings(bounded, max_examples=100)
@given(data=st.data())
def test_a_damaged_or_foreign_index_opens_or_is_refused_by_name(
    tmp_path_factory, indexes, kind, data
):
    retriever.open_retriever(str(indexes / kind))
    folder = tmp_path_factory.mktemp("damaged") / kind
    shutil.copytree(indexes / kind, folder)
    file = data.draw(st.sampled_from(sorted(path for path in folder.rglob("*") if path.is_file())))
    file.write_bytes(data.draw(damages(file)))
    read_or_refuse(lambda: retriever.open_retriever(str(folder)), folder)


# --------------------------------------------------------------------------------------------------
# Safety

UNSAFE = re.compile(r"""
    \b(import|from)\ (pickle|cPickle|dill|cloudpickle|joblib|marshal|shelve|yaml)\b
    | (?<![.\w])(eval|exec|compile|__import__)\(
    | os\.system | os\.popen | torch\.load | torch\.hub | trust_remote_code | allow_pickle | shell=
""", re.VERBOSE)  # fmt: skip


def test_nothing_read_is_ever_run():
    for line in ("import pickle", "from joblib import x", "x = eval(y)", "f(trust_remote_code=x)"):
        assert UNSAFE.search(line), line
    root = Path(retriever.__file__).parent
    for file in [*root.glob("*.py"), *root.glob("tools/*.py")]:
        assert not UNSAFE.search(file.read_text()), file


def test_a_server_listens_on_this_machine_unless_told_otherwise():
    assert inspect.signature(search_server.serve).parameters["host"].default == "127.0.0.1"


def quote_the_key(request: Request) -> Response:
    """Refuse a request, and quote the key that its headers hold."""
    keys = [value for value in request.headers.values() if "sentinel" in value]
    error = json.dumps({"error": {"message": f"refused: {keys}"}})
    return Response(error, 403, content_type="application/json")


HOSTILE_NAMES = ["../../up", "a/b", "..", "nul\0", "x" * 300, "$(touch ran)", "`touch ran`"]
COMMAND = """
    run --engine=transformers --retriever=web --questions=q.jsonl --prompt_file=p.txt --out=out
    --max_context=300 --max_turn_tokens=40
""".split()
WRITTEN = """
    .cache/nanosearcher/web.sqlite p.txt q.jsonl report.html out/metrics.json out/transcripts.jsonl
    out/transcripts.judged.jsonl out/transcripts.judged.jsonl.replies
""".split()


@pytest.mark.parametrize("provider", ["serper", "brave"])
def test_no_key_is_written_anywhere_and_no_data_becomes_a_path(
    tmp_path, model_folder, monkeypatch, capfd, httpserver, provider
):
    """`run`, `judge` and `page` of questions whose ids and data sets try to leave the folder."""
    httpserver.expect_request(re.compile(".*")).respond_with_handler(quote_the_key)
    engine = PROVIDERS[provider]
    monkeypatch.setattr(engine, "url", httpserver.url_for("/"))
    monkeypatch.setenv(engine.key_variable, "sentinel-web")
    monkeypatch.setenv("OPENAI_API_KEY", "sentinel-judge")
    work = tmp_path / "a" / "b"  # what goes up two folders is still within tmp_path
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(work))
    monkeypatch.setattr("inference.open_retriever", lambda source: WebSearch(provider, 1000))
    Path("p.txt").write_text("Question: {question}\n<think>")
    questions = []
    for i, name in enumerate([*HOSTILE_NAMES, str(tmp_path / "absolute")]):
        questions.append(GOOD | {"id": name, "dataset": name, "question": f"who is {i}?"})
    records.write_jsonl(Path("q.jsonl"), questions)
    evaluate.main([*COMMAND, f"--model={model_folder}"])
    judge = ["judge", "out/transcripts.jsonl", f"--base_url={httpserver.url_for('/')}", "--model=j"]
    with pytest.raises(SystemExit, match="1"):
        evaluate.main(judge)
    report.main(["page", "out", "--out=report.html"])
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(str(path.relative_to(work)) for path in files) == sorted(WRITTEN)
    assert not any(b"sentinel" in path.read_bytes() for path in files)
    out, err = capfd.readouterr()
    assert "sentinel" not in out + err
    assert len(re.findall(r"failed, the last one.*\*\*\*", err)) == 2  # of searches, of the judge
