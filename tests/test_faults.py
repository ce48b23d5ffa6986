"""What must hold of hostile text, of backends that answer wrongly, of files that are not what they should be; safety."""

import math
import time

import pytest
from conftest import ASK, SPECIAL, TELL, ScriptedEngine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_rollout import consistent

import retriever
from reward import REWARDS, TAGS, judge
from rollout import Episode, Limits, Rollout, data_encoder

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
        lambda title, text: retriever.parse_passage({"id": 0, "title": title, "text": text}),
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
        assert math.isfinite(judge(episode.segments, len(episode.queries), ["b", "汉"], reward)["reward"])


@bounded
@given(SCRIPTS, PASSAGES, PASSAGES)
def test_documents_change_no_reward_whatever_the_policy_wrote(tokenizer, script, passages, others):
    """The same turns, other documents: the same verdict and the same trained ids."""
    one, _ = play_hostile(tokenizer, script, passages)
    two, _ = play_hostile(tokenizer, script, others)
    assert consistent(one, tokenizer) == consistent(two, tokenizer)
    for reward in REWARDS:
        assert judge(one.segments, len(one.queries), ["b"], reward) == judge(two.segments, len(two.queries), ["b"], reward)


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
    assert episode.finish_reason == reason and judge(episode.segments, len(asked), ["b"])["failed_rule"] == rule


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
