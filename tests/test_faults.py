"""What must hold of hostile text, of backends that answer wrongly, of files that are not what they should be; safety."""

import ast
import contextlib
import io
import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import ScriptedEngine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_rollout import consistent
from tiny import ASK, SPECIAL, TELL

import data_prep
import evaluate
import records
import retriever
from reward import PROMPTS, REWARDS, TAGS, score_episode
from rollout import Episode, Limits, Rollout, data_encoder, prompt_encoder
from tools import report, web_search

bounded = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# ---------------------------------------------------------------------------------------------------------------------
# Hostile text: what a policy may write and what a passage may hold

TAG_WORDS = [tag for pair in TAGS for tag in pair]
HALF_TAGS = [half for tag in TAG_WORDS for half in (tag[: len(tag) // 2], tag[len(tag) // 2 :])]
ODD = ["\0", "\u202e", "\u2028", "\r\n", "  ", "汉", "🙂", "e\u0301", "\ufffd", "\\", '"', "{question}", "w" * 200]
FRAGMENTS = st.sampled_from([*TAG_WORDS, *HALF_TAGS, *SPECIAL, *ODD, " word", " b", "\n"])
TEXTS = st.lists(FRAGMENTS, max_size=10).map("".join)
TURNS = st.one_of(TEXTS, TEXTS.map(lambda text: text + ASK), TEXTS.map(lambda text: text + TELL), st.just(ASK))
SCRIPTS = st.lists(TURNS, min_size=1, max_size=5)
# as every reader of passages gives them: a lone surrogate of the file has become a question mark
PASSAGES = st.lists(
    st.builds(
        lambda title, text: records.parse_passage({"id": 0, "title": title, "text": text}),
        TEXTS,
        st.one_of(TEXTS, st.text(max_size=20), st.just("\ud800 \udfff")),
    ),
    max_size=4,
)


class HostilePolicy(ScriptedEngine):
    """Plays one episode's script turn by turn, whatever documents its texts pretend to hold; then the last turn for ever."""

    def submit(self, key, token_ids, **options):
        super().submit(key, token_ids, **options)
        (key, _, *rest) = self.waiting.pop()
        self.waiting.append((key, min(len(self.given), len(self.script)) - 1, *rest))


def play_hostile(tokenizer, script, passages, **limits) -> tuple[Episode, list[str]]:
    """One episode of that script, every query answered with those passages; and the queries that were asked."""
    asked = []
    search = lambda queries, k: asked.extend(queries) or [passages for _ in queries]  # noqa: E731
    limits = Limits(**{"max_context": 10**6, "max_turn_tokens": 10**5, "max_searches": 4, **limits})
    rollout = Rollout(HostilePolicy(tokenizer, script), tokenizer, search, TAGS, limits, deterministic=True)
    (episode,) = rollout.run([Episode({"id": "0"}, tokenizer.encode("Question: q <|im_end|>\n<think>"))])
    return episode, asked


def block(tokenizer, passages, max_document_tokens) -> list[int]:
    """The ids of a documents block, written down again without any hurry."""
    encode, lines = data_encoder(tokenizer), [f"({n}){p['title']}   {p['text']}" for n, p in enumerate(passages, 1)]
    head = encode(f"\n\n{TAGS.documents[0]}\n" + "\n".join(lines or ["(no results)"]))
    tail = encode(f"\n{TAGS.documents[1]}")
    return head[: max_document_tokens - len(tail)] + tail


@bounded
@given(
    script=SCRIPTS,
    passages=PASSAGES,
    max_turn_tokens=st.sampled_from([1, 7, 100, 10_000]),
    max_document_tokens=st.sampled_from([30, 100, 2048]),
    max_context=st.sampled_from([1, 60, 200, 10**6]),
    max_searches=st.integers(1, 4),
)
def test_every_episode_is_consistent(tokenizer, script, passages, **limits):
    episode, asked = play_hostile(tokenizer, script, passages, **limits)
    consistent(episode, tokenizer)
    injected = [t for t, acted in zip(episode.token_ids, episode.action_mask, strict=True) if not acted]
    documents = block(tokenizer, passages, limits["max_document_tokens"])
    assert injected == episode.prompt_ids + documents * len(episode.queries)
    assert not set(documents) & set(tokenizer.all_special_ids) and len(documents) <= limits["max_document_tokens"]
    kinds = [kind for kind, _ in episode.segments]
    turns = ["policy" if n % 2 == 0 else "documents" for n in range(len(kinds) - 1)]
    assert kinds == ["prompt", *turns]  # they alternate
    assert episode.queries == asked and len(asked) == kinds.count("documents") <= limits["max_searches"]
    assert all(query and query == query.strip() for query in asked)
    assert episode.finish_reason in ("answer", "eos", "length", "max_searches", "bad_query")
    assert episode.search_failures == 0
    for reward in REWARDS:
        assert math.isfinite(score_episode(episode.segments, len(episode.queries), ["b", "汉"], reward)["reward"])


@bounded
@given(SCRIPTS, PASSAGES, PASSAGES)
def test_documents_change_no_reward_whatever_the_policy_wrote(tokenizer, script, passages, others):
    """The same turns, other documents: the same verdict and the same trained ids."""
    one, _ = play_hostile(tokenizer, script, passages)
    two, _ = play_hostile(tokenizer, script, others)
    assert consistent(one, tokenizer) == consistent(two, tokenizer)
    for reward in REWARDS:
        assert score_episode(one.segments, len(one.queries), ["b"], reward) == score_episode(two.segments, len(two.queries), ["b"], reward)


@pytest.mark.parametrize(
    ("script", "reason", "rule"),
    [
        ([" </think>" * 50 + " <answer> b </answer>"], "answer", "one_think"),
        (["<|begin_of_query|> a <|begin_of_query|> b <|end_of_query|>", TELL], "answer", "paired_queries"),
        (["<|begin_of_documents|>\n(1)T   b\n<|end_of_documents|>" + TELL], "answer", "no_documents"),
        ([ASK + "<|begin_of_documents|>", TELL], "answer", "no_documents"),  # written on behind its query
        (["word " * 100_000], "length", "one_think"),
        ([" <|im_end|> </think> <answer> b </answer> <|im_end|>"], "answer", "one_answer"),
    ],
)
def test_what_a_policy_does_to_cheat(tokenizer, script, reason, rule):
    episode, asked = play_hostile(tokenizer, script, [{"title": "T", "text": "b"}], max_turn_tokens=512)
    assert episode.finish_reason == reason and score_episode(episode.segments, len(asked), ["b"])["failed_rule"] == rule


@bounded
@given(st.one_of(TEXTS, st.text(max_size=20)), st.sampled_from(sorted(PROMPTS)))
def test_a_hostile_question_is_a_prompt_like_any_other(tokenizer, tmp_path_factory, text, prompt):
    """No special token comes of it, and what cannot be encoded, a lone surrogate, is replaced when it is read."""
    file = tmp_path_factory.getbasetemp() / "questions.jsonl"
    file.write_text(json.dumps({"id": 0, "question": f"Q {text} \ud800?", "answers": ["b"]}))
    (question,) = records.read_questions(file)
    encode, special = prompt_encoder(tokenizer, PROMPTS[prompt]), set(tokenizer.all_special_ids)
    ids = encode(question["question"])
    assert sum(t in special for t in ids) == sum(t in special for t in encode("Q"))
    assert question["question"] in tokenizer.decode(ids)


def test_a_question_that_fills_the_context_ends_its_episode(tokenizer, scripted):
    ids = prompt_encoder(tokenizer, PROMPTS["base"])("w" * 300_000)
    (episode,) = Rollout(scripted([TELL]), tokenizer, None, TAGS, Limits()).run([Episode({}, ids)])
    consistent(episode, tokenizer)
    assert episode.finish_reason == "length" and not any(episode.action_mask)


def test_a_question_as_long_as_a_book_is_refused_by_name(tmp_path):
    """Each of its samples would hold its tokens, and every tensor of the batch would be as wide."""
    question = {"id": 0, "question": "w" * (records.MAX_QUESTION + 1), "answers": ["b"]}
    (tmp_path / "q.jsonl").write_text(json.dumps(question))
    with pytest.raises(ValueError, match=r"q\.jsonl:1: .*a question of 100001 characters"):
        records.read_questions(tmp_path / "q.jsonl")


# ---------------------------------------------------------------------------------------------------------------------
# A search backend that answers wrongly


@pytest.mark.parametrize(
    "answer",
    [
        [],
        [[], [], []],
        None,
        7,
        "ab",
        {"results": []},
        [["text"], ["text"]],
        [[None], []],
        [None, []],
        [[{"text": "without a title"}], []],
        [[{"title": "without a text"}], []],
        [[{"title": "T", "text": "\ud800"}], []],  # a backend of one's own that does not read with `parse_passage`
    ],
)
def test_a_wrong_answer_is_a_failed_search_of_every_query_in_it(tokenizer, scripted, answer):
    """The episodes go on without documents, as after an exception, and the share is in the metrics."""
    rollout = Rollout(scripted([ASK, TELL]), tokenizer, lambda queries, k: answer, TAGS, Limits(max_context=2000), True)
    rollout.engine.step = lambda step=rollout.engine.step: step(2)  # both at once, so that their queries go together
    episodes = [Episode({}, tokenizer.encode(f"Question: {i}")) for i in range(2)]
    assert len(list(rollout.run(episodes))) == 2
    for episode in episodes:
        consistent(episode, tokenizer)
        assert (episode.search_failures, episode.queries, episode.finish_reason) == (1, ["red harbor"], "answer")
        assert "(no results)" in episode.segments[2][1]
    assert rollout.search_error


@pytest.mark.parametrize(("found", "expected"), [(0, "(no results)"), (1, "(1)T   b\n<"), (9, "(9)T   b\n<")])
def test_fewer_or_more_passages_than_asked_for_are_no_failure(play, found, expected):
    episode, _ = play([ASK, TELL], search=lambda queries, k: [[{"title": "T", "text": "b"}] * found for _ in queries])
    assert episode.search_failures == 0 and expected in episode.segments[2][1]


@pytest.mark.parametrize("text", ["w" * 20_000_000, "word " * 4_000_000, "\0" * 20_000_000])
def test_a_gigantic_passage_costs_no_more_than_what_can_be_used_of_it(tokenizer, text):
    """Tokenised as a whole, 4 MB of one word took 11 s."""
    begin = time.monotonic()
    episode, _ = play_hostile(tokenizer, [ASK, TELL], [{"title": "T", "text": text}])
    assert time.monotonic() - begin < 3
    assert len(episode.token_ids) - len(episode.prompt_ids) - sum(episode.action_mask) == Limits().max_document_tokens
    assert episode.finish_reason == "answer" and episode.segments[2][1].endswith("\n<|end_of_documents|>")


def test_a_budget_too_small_for_the_closing_tag_leaves_the_tag_alone(play, tokenizer):
    """A budget less the tag of below 0 counted from the end, and let through nearly all of the passage."""
    search = lambda queries, k: [[{"title": "T", "text": "word " * 999}] for _ in queries]  # noqa: E731
    episode, _ = play([ASK, TELL], search=search, max_document_tokens=1)
    assert episode.segments[2] == ("documents", "\n<|end_of_documents|>")


@bounded
@given(
    st.lists(st.tuples(st.sampled_from([*ODD, *TAG_WORDS, " words", " red harbor", " "]), st.integers(1, 300)), max_size=20)
)
def test_a_passage_is_cut_where_its_tokens_end(tokenizer, parts):
    """That no more of a passage is tokenised than can be used must not change one token of the block."""
    passages = [{"title": "T", "text": "".join(word * times for word, times in parts)}] * 3
    episode, _ = play_hostile(tokenizer, [ASK, TELL], passages, max_document_tokens=100)
    injected = [t for t, acted in zip(episode.token_ids, episode.action_mask, strict=True) if not acted]
    assert injected == episode.prompt_ids + block(tokenizer, passages, 100)


# ---------------------------------------------------------------------------------------------------------------------
# Files that are not what they should be: either a result that can be used, or one line that names the file

KEYS = """
    id _id idx question answer answers answer_aliases answerable dataset title text contents pred_ans judge_reply
    wikipedia_id wikipedia_title rollouts solved results
""".split()
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from([10**30, "\ud800"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from([*KEYS, "x"]), inner, max_size=3)),
    max_leaves=6,
)
RECORD = {key: "x" for key in KEYS if key != "contents"} | {"answers": ["x"], "answer_aliases": [], "text": ["x", "y"]}
RECORD |= {"rollouts": 3, "solved": True, "results": {"d": {"n": 2, "em": 0.5, "intervals": {"em": [0.1, 0.9]}}}}
RECORDS = st.one_of(  # one value or key of a good record is wrong; or nothing is right
    st.builds(
        lambda n, key, value: RECORD | {"id": n, "_id": n, "idx": n, key: value},
        st.integers(0, 3),
        st.sampled_from(KEYS),
        VALUES,
    ),
    st.builds(
        lambda key, text: {k: v for k, v in (RECORD | {"text": text}).items() if k != key}, st.sampled_from(KEYS), st.text()
    ),
    VALUES,
)


def as_file(records, encoding, cut, array) -> bytes:
    text = json.dumps(records) if array else "".join(json.dumps(record) + "\n" for record in records)
    data = text.encode(encoding)
    return data[: len(data) - cut] if cut < len(data) else data


FILES = st.one_of(
    st.binary(max_size=60),
    st.builds(
        as_file,
        st.lists(RECORDS, max_size=4),
        st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32", "cp037"]),
        st.sampled_from([0, 0, 0, 1, 2, 9]),
        st.booleans(),
    ),
    st.sampled_from([
        b"", b"\n\n", b"\0", b"\xff" * 100_000, b"[" * 100_000, b'{"id":' * 100_000, b"1" * 10_000,
        b'{"id": "\xed\xa0\x80"}',
        b"\x1f\x8b\x08", b"PAR1", b'"' + b"x" * 10**6, b"id,question,answer\n1,2,3,4\n", b"SQLite format 3\0",
    ]),
)  # fmt: skip


def read_or_refuse(read, path):
    """What `read` gives, or None if a command would have ended with status 2 and one short line that names `path`."""
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err), records.user_errors("program"):
            return read()
    except SystemExit as stop:
        message = err.getvalue()
        assert stop.code == 2 and message.count("\n") == 1 and str(path) in message and len(message) < 1000 + len(str(path))


def can_be_written(records):
    """As every file of ours: UTF-8."""
    assert json.dumps(records, ensure_ascii=False).encode()


def use_questions(questions):
    can_be_written(questions)
    assert len({q["id"] for q in questions}) == len(questions) > 0
    for q in questions:
        assert all(isinstance(q[name], str) for name in ("id", "question", "dataset")) and q["question"]
        assert q["answers"] and all(isinstance(a, str) and a for a in q["answers"])


def use_passages(passages):
    can_be_written(passages)
    assert len({p["id"] for p in passages}) == len(passages) > 0
    assert all(isinstance(p[name], str) for p in passages for name in ("id", "title", "text"))


def use_outputs(outputs):
    can_be_written([o["record"] for o in outputs])
    assert evaluate.table(evaluate.measure_by_dataset(outputs, evaluate.score))
    assert [evaluate.JUDGE_PROMPT.format(**o) for o in outputs]


def use_counted(questions):
    use_questions(questions)
    assert {data_prep.level(q["rollouts"], q["solved"]) for q in questions} <= {"easy", "medium", "hard"}


READERS = {
    "questions": (records.read_questions, use_questions),
    "counted questions": (data_prep.read_counted, use_counted),
    "noted verdicts": (lambda path: data_prep.noted_verdicts(path, {}, [{"id": "x"}]), can_be_written),
    "results": (lambda path: evaluate.read_metrics(path, "results"), evaluate.table),
    "passages": (records.read_passages, use_passages),
    "passages to search": (lambda path: [p for p, in retriever.open_retriever(str(path)).search(["x"], 1)], can_be_written),
    "outputs": (evaluate.read_outputs, use_outputs),
    **{f"published {name}": (lambda path, name=name: data_prep.published_questions(path, name)[0], use_questions)
       for name in data_prep.ID_FIELDS},
    **{f"corpus {name}": (lambda path, name=name: data_prep.convert(name, path, 1, path.read_bytes().splitlines(True))[0],
       lambda lines: [use_passages([p]) for p in map(json.loads, lines.splitlines())]) for name in data_prep.FORMATS},
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
@settings(bounded, max_examples=50)
@given(data=FILES)
def test_a_hostile_file_is_read_or_refused_by_name(tmp_path_factory, reader, data):
    read, use = READERS[reader]
    path = tmp_path_factory.getbasetemp() / ("hostile.csv" if reader == "published bamboogle" else "hostile.jsonl")
    path.write_bytes(data)
    if (result := read_or_refuse(lambda: read(path), path)) is not None:
        use(result)


def test_only_what_is_raised_on_purpose_ends_in_one_line(capsys):
    """What the interpreter raises in a line of ours is a bug, and its traceback is wanted."""
    with pytest.raises(ValueError, match="not enough values to unpack"), records.user_errors("program"):
        data_prep.parse_draw("hotpotqa:easy")
    with pytest.raises(SystemExit), records.user_errors("program"):
        retriever.open_retriever("web:nobody")
    assert capsys.readouterr().err.startswith("program: web:nobody: the providers are ")


@pytest.mark.parametrize(
    "data", [b"{", b"[]", b"\xff", b'{"origin": 1}', b'{"origin": {}, "chunks": "x", "bytes": 0, "passages": 0}']
)
def test_a_note_of_a_conversion_that_is_not_ours_is_refused_by_name(tmp_path, data):
    source, out, note = tmp_path / "s.jsonl", tmp_path / "out.jsonl", tmp_path / "out.jsonl.progress"
    source.write_text('{"wikipedia_id": 1, "wikipedia_title": "T", "text": ["x", "y"]}\n')
    note.write_bytes(data)
    (tmp_path / "out.jsonl.partial").touch()
    read_or_refuse(lambda: data_prep.make_corpus(source, out, "kilt", 1) or pytest.fail("it was not refused"), note)


@pytest.fixture(scope="module")
def indexes(tmp_path_factory) -> dict[str, Path]:
    """An index folder of each kind, whole."""
    import faiss

    folder = tmp_path_factory.mktemp("indexes")
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"id": n, "title": "T", "text": f"red {n}"}) + "\n" for n in range(20)))
    retriever.build_bm25(str(corpus), folder / "bm25")
    header = retriever.enter_folder(folder / "dense", str(corpus), {"kind": "dense", "encoder": "e", "prebuilt": None})
    begins = [begin for begin, _ in records.scan_passages(corpus)]
    retriever.save_array(folder / "dense" / "rows.npy", np.array([*begins, corpus.stat().st_size]))
    index = faiss.IndexFlatIP(4)
    index.add(np.eye(20, 4, dtype=np.float32))
    faiss.write_index(index, str(folder / "dense" / "faiss.index"))
    header |= {"factory": "Flat", "parameters": "", "bytes": (folder / "dense" / "faiss.index").stat().st_size}
    (folder / "dense" / "index.json").write_text(json.dumps(header))
    return {kind: folder / kind for kind in ("bm25", "dense")}


class FourNumbers:
    """In place of a real encoder."""

    def __init__(self, model):
        self.model = self

    def get_embedding_dimension(self):
        return 4

    def queries(self, queries):
        return np.ones((len(queries), 4), np.float32)


def npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def put_in_place(file: Path, data: bytes) -> None:
    """As another file: an index still open maps this one, and of a mapped file that shrinks the process dies (SIGBUS)."""
    file.unlink()
    file.write_bytes(data)


@pytest.mark.parametrize("kind", ["bm25", "dense"])
@settings(bounded, max_examples=100)
@given(data=st.data())
def test_a_damaged_or_foreign_index_opens_or_is_refused_by_name(indexes, kind, data):
    folder = indexes[kind]
    file = data.draw(st.sampled_from(sorted(path for path in folder.rglob("*") if path.is_file())))
    whole = file.read_bytes()
    damages = [st.just(b""), st.integers(0, len(whole)).map(lambda end: whole[:end]), FILES]
    if file.name == "index.json":  # a value or a key of it is another
        header = json.loads(whole)
        edited = lambda key, value: json.dumps(header | {key: value}).encode()  # noqa: E731
        keys = st.sampled_from(sorted(header))
        damages.append(st.builds(edited, keys, VALUES))
        damages.append(keys.map(lambda key: whole.replace(f'"{key}"'.encode(), b'"x"')))
    if file.name == "rows.npy":  # of another corpus, or no rows at all
        shapes = (np.arange(21), np.zeros((21, 2)), np.int64(3), np.array([]), np.array(["x"] * 21))
        damages.append(st.sampled_from([npy(array) for array in shapes]))
    if file.name == "faiss.index":  # of one that is forged, in its right size, faiss dies: no remedy here
        damages.remove(FILES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retriever, "Encoder", FourNumbers)
        try:
            put_in_place(file, data.draw(st.one_of(damages)))
            read_or_refuse(lambda: retriever.open_retriever(str(folder)), folder)
        finally:
            put_in_place(file, whole)


class Panic(BaseException):
    """As tantivy's in a damaged index: no `Exception`."""


@pytest.mark.parametrize("found", [KeyError("x"), RecursionError(), Panic("mid > len")])
def test_whatever_a_search_raises_is_a_failed_search(play, found):
    def search(queries, k):
        raise found

    episode, _ = play([ASK, TELL], search=search)
    assert (episode.search_failures, episode.finish_reason) == (1, "answer")


OTHER_FILES = {
    "a prompt that is not UTF-8": ("p.txt", b"{question} \xff"),
    "a cache that is no database": ("cache.sqlite", b"x" * 5000),
    "half of the metrics": ("out/metrics.json", b'{"protocol": {'),
    "someone else's metrics": ("out/metrics.json", b'{"loss": 1.0}'),
    "someone else's journal": ("out/answered.jsonl.partial", b"[1]\n[2]\n"),
}


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("metrics.json", b'{"results": {'),
        ("metrics.json", b'{"loss": 1.0}'),
        ("metrics.json", b"\xff\xff"),
        ("metrics.jsonl", b'{"step": 1}\n'),
        ("metrics.jsonl", b'{"step": 1, "rew'),
    ],
)
def test_what_cannot_be_plotted_is_refused_by_name(tmp_path, name, data):
    panels = ("reward", "search_rate", "format_rate", "f1", "response_len", "sampler_gap")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, **dict.fromkeys(panels, 0.5)}))
    (tmp_path / name).write_bytes(data)
    words = ["plot", f"--runs={tmp_path}", f"--evaluations={tmp_path}", f"--out={tmp_path / 'c.png'}"]
    args = report.parse_arguments(words)
    with contextlib.redirect_stdout(io.StringIO()):
        read_or_refuse(lambda: args.handler(args) or pytest.fail("it was not refused"), tmp_path / name)


@pytest.mark.parametrize("case", OTHER_FILES)
def test_what_else_a_command_reads_is_refused_by_name(tmp_path, model_folder, case):
    (tmp_path / "out").mkdir()
    (tmp_path / "p.txt").write_text("Question: {question}\n<think>")
    (tmp_path / "q.jsonl").write_text('{"id": 1, "question": "q", "answers": ["b"]}\n')
    (tmp_path / "o.jsonl").write_text('{"question": "q", "answer": "b", "pred_ans": "b"}\n')
    name, data = OTHER_FILES[case]
    (tmp_path / name).write_bytes(data)
    files = {"questions": "q.jsonl", "retriever": "q.jsonl", "prompt_file": "p.txt", "out": "out"}
    words = ["run", f"--model={model_folder}", "--engine=transformers", *(f"--{k}={tmp_path / v}" for k, v in files.items())]
    if name == "cache.sqlite":
        words = [
            "judge",
            f"{tmp_path / 'o.jsonl'}",
            "--base_url=http://127.0.0.1:9",
            "--model=j",
            f"--cache={tmp_path / name}",
        ]
    args = evaluate.parse_arguments(words)
    read_or_refuse(lambda: args.handler(args) or pytest.fail("it was not refused"), tmp_path / name)
    assert (tmp_path / name).read_bytes() == data


# ---------------------------------------------------------------------------------------------------------------------
# Safety

LIBRARY = [Path(retriever.__file__).with_name(f"{name}.py") for name in """
    reward data_prep retriever rollout reinforce_pp evaluate train
""".split()]  # fmt: skip
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.hub.load"}
UNSAFE_OPTIONS = {"trust_remote_code", "allow_pickle", "shell"}


def unsafe(source: str) -> list[str]:
    """What in a program could run code out of a file or out of a text."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [name for name in names if name.split(".")[0] in UNSAFE_MODULES]
        if isinstance(node, ast.Call):
            found += {ast.unparse(node.func)} & UNSAFE_CALLS
            found += {keyword.arg for keyword in node.keywords} & UNSAFE_OPTIONS
    return found


@pytest.mark.parametrize("file", LIBRARY, ids=lambda file: file.name)
def test_nothing_read_is_ever_run(file):
    assert unsafe(file.read_text()) == []


def test_what_would_be_run_is_found():
    for line in ("import pickle", "from joblib import load", "eval(x)", "f(x, trust_remote_code=y)", "torch.load(x)"):
        assert unsafe(line), line


def test_a_server_listens_on_this_machine_unless_told_otherwise():
    assert retriever.parse_arguments(["serve", "--index", "x"]).host == "127.0.0.1"


KEYS_OF_SERVICES = {name: f"sentinel-{name.lower()}" for name in ("OPENAI_API_KEY", "SERPER_API_KEY", "BRAVE_API_KEY")}


@pytest.fixture
def quoting_server():
    """Refuses every request, and quotes its headers, the key among them."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.server.keys += [value for value in self.headers.values() if "sentinel-" in value]
            text = f"refused: {[value for value in self.headers.values() if 'sentinel-' in value]}".encode()
            self.send_response(403)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.keys, server.url = [], f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("provider", ["serper", "brave"])
def test_no_key_is_written_anywhere_and_no_data_becomes_a_path(
    tmp_path, model_folder, monkeypatch, capfd, quoting_server, provider
):
    """`run`, `judge` and `report` of questions whose ids and data sets try to leave the folder."""
    for name, key in KEYS_OF_SERVICES.items():
        monkeypatch.setenv(name, key)
    monkeypatch.setenv("HOME", str(tmp_path))  # of the cache of searches
    monkeypatch.setitem(
        web_search.PROVIDERS, provider, web_search.PROVIDERS[provider]._replace(url=quoting_server.url, rate=1000)
    )
    work = tmp_path / "a" / "b"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    Path("p.txt").write_text("Question: {question}\n<think>")
    names = ["../../up", "/tmp/nanosearcher-absolute", "a/b", "..", "nul\0", "x" * 300, "$(touch ran)", "`touch ran`"]
    questions = [{"id": n, "dataset": n, "question": f"who is {i}?", "answers": [n]} for i, n in enumerate(names)]
    Path("q.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    flags = ["--questions=q.jsonl", "--prompt_file=p.txt", "--max_context=300", "--max_turn_tokens=40", "--out=out"]
    evaluate.main(["run", f"--model={model_folder}", "--engine=transformers", f"--retriever=web:{provider}", *flags])
    with pytest.raises(SystemExit) as stop:
        evaluate.main(
            ["judge", "out/transcripts.jsonl", f"--base_url={quoting_server.url}", "--model=j", "--cache=judge.db"]
        )
    assert stop.value.code == 1
    report.main(["report", "out", "--out=report.html"])
    service = KEYS_OF_SERVICES[f"{provider.upper()}_API_KEY"]
    assert {key.removeprefix("Bearer ") for key in quoting_server.keys} == {service, KEYS_OF_SERVICES["OPENAI_API_KEY"]}
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    made = ["judge.db", "out/metrics.json", "out/transcripts.jsonl", "out/transcripts.judged.jsonl", "p.txt", "q.jsonl"]
    assert files == sorted([".cache/nanosearcher/web.sqlite", *(f"a/b/{name}" for name in [*made, "report.html"])])
    assert not Path("/tmp/nanosearcher-absolute").exists()
    assert not any(b"sentinel-" in (tmp_path / file).read_bytes() for file in files)
    out, err = capfd.readouterr()
    assert "sentinel-" not in out + err and "***" in err
