"""Generate, stop at a query, retrieve, resume: how trajectories with searches in them are made.

There is no barrier between turns. As soon as one trajectory stops at a query, the query goes to a
small thread pool while the engine keeps decoding the other trajectories. When the documents arrive,
the trajectory goes back to the engine with all its token ids; prefix caching makes the resumption
cost only the new tokens.

Tokens in, tokens out: the ids that the model sampled are the ids that training sees. Nothing is
decoded and encoded again between turns; only injected text is tokenised, once, on its own, with
special tokens switched off.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from engine import Completion, Engine

# --------------------------------------------------------------------------------------------------
# The contract between the files


@dataclass
class Episode:
    """One trajectory, grown in place.

    `token_ids`, `action_mask` and `log_probs` are parallel and begin with the prompt.
    """

    question: dict[str, Any]  # id, question, answers, dataset
    prompt_ids: list[int]
    seed: int = 0  # every turn derives its own seed from this one
    token_ids: list[int] = field(default_factory=list)  # prompt, sampled tokens and documents
    action_mask: list[int] = field(default_factory=list)  # 1 where the policy sampled the token
    log_probs: list[float] = field(default_factory=list)  # the sampler's own, 0 where not sampled
    # (prompt|policy|documents, text). The text of a turn ends with its closing tag; what the last
    # token holds behind the tag, as in `>.`, is in `token_ids` alone and is not judged.
    segments: list[tuple[str, str]] = field(default_factory=list)
    # The queries that were asked, in order. The documents of a query that is given at the start
    # follow the prompt.
    queries: list[str] = field(default_factory=list)
    finish_reason: str = ""  # answer, eos, length, max_searches or bad_query; "" while it runs
    search_failures: int = 0  # queries that got an empty result because the retriever failed
    rewards: dict[str, Any] = field(default_factory=dict)  # the result of `reward.score_episode`

    @property
    def answered(self) -> int:
        """Number of queries that the retriever answered."""
        return len(self.queries) - self.search_failures

    def add(
        self, kind: str, token_ids: list[int], text: str, log_probs: list[float] | None = None
    ) -> None:
        """Append a segment; with log-probabilities if and only if the policy sampled it."""
        sampled = log_probs is not None
        self.token_ids += token_ids
        self.action_mask += [int(sampled)] * len(token_ids)
        self.log_probs += log_probs if sampled else [0.0] * len(token_ids)
        self.segments.append((kind, text))


@dataclass(frozen=True)
class Limits:
    """What a trajectory may use; training and evaluation share these limits."""

    max_searches: int = 8  # queries per episode (paper)
    documents_per_search: int = 3  # passages per query (official code; at evaluation 5)
    max_turn_tokens: int = 512  # tokens sampled between two stops (official code)
    max_document_tokens: int = 2048  # tokens of one documents block; longer blocks are cut
    max_context: int = 29_000  # prompt, policy and documents together, in tokens (official code)
    temperature: float = 1.0  # of sampling; 0 is greedy


def derive_seed(*parts: int | str) -> int:
    """A 31-bit seed that depends on all parts and on nothing else: no rank, no process."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


# --------------------------------------------------------------------------------------------------
# Text to token ids


def data_encoder(tokenizer) -> Callable[[str], list[int]]:
    """An encoder for data: a special token spelled out in the text stays text. Thread-safe.

    Raises:
        ValueError: the tokenizer puts a blank before every text.
    """
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    if backend.encode("\n", add_special_tokens=False).tokens[:1] == ["\u2581"]:
        raise ValueError("the tokenizer puts a blank before every text, also before documents")

    def encode(text: str) -> list[int]:
        return backend.encode(text, add_special_tokens=False).ids

    return encode


def prompt_encoder(tokenizer, template: list[tuple[str, str]]) -> Callable[[str], list[int]]:
    """An encoder from question to prompt ids.

    Args:
        template: (role, text) as in `reward.PROMPTS`. The text of role "text" is used as it is; the
            roles "system" and "user" go through the tokenizer's chat template, and the text of
            "prefill" opens the assistant's turn.
    Raises:
        ValueError: `{question}` does not occur exactly once, or there is no chat template, or it
            refuses the prompt.
    """
    from jinja2 import TemplateError

    is_text = template[0][0] == "text"
    if is_text:
        text = template[0][1]
    elif not tokenizer.chat_template:
        raise ValueError(
            "this prompt needs a chat template and the tokenizer has none; use --prompt_file base"
        )
    else:
        messages = [{"role": role, "content": text} for role, text in template if role != "prefill"]
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:  # such as that of Gemma, which has no system role
            raise ValueError(
                f"the chat template refuses this prompt ({error}); use --prompt_file base"
            ) from None
        text += "".join(prefill for role, prefill in template if role == "prefill")
    if text.count("{question}") != 1:
        raise ValueError("a prompt must contain {question} exactly once")
    head, tail = text.split("{question}")
    # " Who" is one token: a blank before the question belongs to the question, not to the head.
    blanks = head[len(head.rstrip(" ")) :]
    head_ids = tokenizer.encode(head.rstrip(" "), add_special_tokens=is_text)  # a chat has its BOS
    tail_ids = tokenizer.encode(tail, add_special_tokens=False)
    encode_data = data_encoder(tokenizer)

    def encode(question: str) -> list[int]:
        return head_ids + encode_data(blanks + question) + tail_ids

    return encode


# --------------------------------------------------------------------------------------------------
# The loop

# In a deterministic rollout documents rejoin so many engine steps after their query: enough to hide
# the latency of most retrievers, and few beside the hundreds of steps of a trajectory.
REJOIN_AFTER_STEPS = 4
# While so many lookups are running, queries wait and share the next one, so that a retriever in
# trouble is asked less.
MAX_CONCURRENT_SEARCHES = 4
# After a failed lookup each query is asked again alone, until so many in a row have failed: the
# client of a search server may try each of them for a minute.
MAX_SINGLE_FAILURES = 3


@dataclass(frozen=True)
class Lookup:
    """Queries that were ready together, on their way through the search pool."""

    episodes: list[Episode]  # each waits for the answer to its last query
    results: Future  # of `Rollout._look_up`
    started_at: int  # engine step


class Rollout:
    """Runs episodes to their end.

    Args:
        engine: an `Engine`.
        tokenizer: the model's fast tokenizer.
        search: `search(queries, k)` returns one list of passages per query (retriever.py).
        tags: the markers of the protocol (`reward.TAGS`).
        limits: see `Limits`.
        deterministic: documents rejoin REJOIN_AFTER_STEPS engine steps after their query instead of
            when they arrive, so that a run repeats bit for bit (the numerics of an engine depend on
            which sequences share a step).
    """

    def __init__(
        self, engine: Engine, tokenizer, search, tags, limits: Limits, deterministic: bool = False
    ):
        self.engine, self.tokenizer, self.search = engine, tokenizer, search
        self.tags, self.limits, self.deterministic = tags, limits, deterministic
        self.search_error = ""  # the latest one, for the message that stops a run
        self._encode = data_encoder(tokenizer)
        # Only so many characters of a documents block are tokenised: its budget of tokens, each as
        # long as the longest of the vocabulary, covers no more, and a passage of megabytes would
        # take seconds. The cut changes the word that it hits, which lies behind the budget anyway.
        longest_token = max(map(len, tokenizer.get_vocab()))
        self._max_document_characters = limits.max_document_tokens * longest_token
        self._pool = ThreadPoolExecutor(MAX_CONCURRENT_SEARCHES, thread_name_prefix="search")

    def run(self, episodes: Iterable[Episode], max_running: int = 256) -> Iterator[Episode]:
        """Yield each episode as it finishes.

        Args:
            episodes: read lazily, at most `max_running` are under way.
        """
        source = iter(episodes)
        decoding: dict[int, Episode] = {}  # by the engine's key
        asking: list[Episode] = []  # their queries wait for the next lookup
        lookups: list[Lookup] = []
        last_key = engine_steps = 0
        while True:
            # New episodes start or ask, and those whose documents are due rejoin.
            searching = sum(len(lookup.episodes) for lookup in lookups)
            places = max_running - len(decoding) - len(asking) - searching
            ready = []
            for episode in islice(source, places):
                episode.add("prompt", episode.prompt_ids, self.tokenizer.decode(episode.prompt_ids))
                started = asking if episode.queries else ready
                started.append(episode)
            for lookup in self._due(lookups, engine_steps, idle=not decoding and not ready):
                lookups.remove(lookup)
                ready += self._rejoin(lookup)
            for episode in ready:
                if len(episode.token_ids) >= self.limits.max_context:
                    episode.finish_reason = "length"
                    yield episode
                    continue
                last_key += 1
                decoding[last_key] = episode
                self._submit(last_key, episode)
            if not (ready or decoding or asking or lookups):
                return
            # The engine takes one step; turns that it finished end their episode or ask.
            engine_steps += 1
            completions = self.engine.step() if decoding else []
            for completion in completions:
                episode = decoding.pop(completion.key)
                if self._absorb(episode, completion):
                    asking.append(episode)
                else:
                    yield episode
            # Queries that are ready together go as one batch.
            if asking and len(lookups) < MAX_CONCURRENT_SEARCHES:
                results = self._pool.submit(self._look_up, asking)
                lookups.append(Lookup(asking, results, engine_steps))
                asking = []

    def _due(self, lookups: list[Lookup], engine_steps: int, idle: bool) -> list[Lookup]:
        """The lookups that rejoin now: at least one if the engine is idle."""
        if self.deterministic:
            due = [x for x in lookups if engine_steps - x.started_at >= REJOIN_AFTER_STEPS]
            return due or (lookups[:1] if idle else [])
        if lookups and idle:
            wait([lookup.results for lookup in lookups], return_when=FIRST_COMPLETED)
        return [lookup for lookup in lookups if lookup.results.done()]

    def _rejoin(self, lookup: Lookup) -> list[Episode]:
        """Append the documents to the episodes that asked; waits until they are there."""
        for episode, (ids, failed) in zip(lookup.episodes, lookup.results.result(), strict=True):
            episode.add("documents", ids, self.tokenizer.decode(ids))
            episode.search_failures += failed
        return lookup.episodes

    def _submit(self, key: int, episode: Episode) -> None:
        """Hand the episode to the engine."""
        room = self.limits.max_context - len(episode.token_ids)
        self.engine.submit(
            key,
            episode.token_ids,
            max_tokens=min(self.limits.max_turn_tokens, room),
            stop=[self.tags.query.closing, self.tags.answer.closing],
            temperature=self.limits.temperature,
            seed=derive_seed(episode.seed, len(episode.queries)),
        )

    def _absorb(self, episode: Episode, completion: Completion) -> bool:
        """Append the sampled turn; True if it asks a query, else the episode is finished."""
        text = self.tokenizer.decode(completion.token_ids)
        if completion.stop in (self.tags.query.closing, self.tags.answer.closing):
            before_closing, closing, _ = text.partition(completion.stop)
            text = before_closing + closing
        episode.add("policy", completion.token_ids, text, completion.log_probs)
        if completion.stop != self.tags.query.closing:
            reasons = {None: "length", "eos": "eos", self.tags.answer.closing: "answer"}
            episode.finish_reason = reasons[completion.stop]
            return False
        _, opened, query = before_closing.rpartition(self.tags.query.opening)
        if not opened or not query.strip():
            episode.finish_reason = "bad_query"
            return False
        if len(episode.queries) == self.limits.max_searches:
            episode.finish_reason = "max_searches"
            return False
        episode.queries.append(query.strip())
        return True

    def _look_up(self, episodes: list[Episode]) -> list[tuple[list[int], bool]]:
        """Search and tokenise, in the pool: per query its documents block and whether it failed.

        Whatever the search raises or returns, the run goes on and counts the failure. After a
        failure each query is asked again alone, so that it fails no other, but not if the retriever
        is silent (ConnectionError): its client has tried again already. See MAX_SINGLE_FAILURES.
        """
        queries = [episode.queries[-1] for episode in episodes]
        try:
            results = self.search(queries, self.limits.documents_per_search)
            answered = zip(episodes, results, strict=True)
            return [(self._encode_documents(*pair), False) for pair in answered]
        except BaseException as error:  # a panic of tantivy is not an Exception
            is_silent = isinstance(error, ConnectionError)
            message = repr(error)  # as text: a panic cannot be pickled for other ranks
        if is_silent or len(episodes) == 1:
            self.search_error = message
            return [(self._encode_documents(episode, []), True) for episode in episodes]
        blocks = []
        failures_in_a_row = 0
        for episode in episodes:
            if failures_in_a_row == MAX_SINGLE_FAILURES:
                ids, failed = self._encode_documents(episode, []), True
            else:
                ((ids, failed),) = self._look_up([episode])
                failures_in_a_row = failures_in_a_row + 1 if failed else 0
            blocks.append((ids, failed))
        return blocks

    def _encode_documents(self, episode: Episode, passages: list[dict[str, str]]) -> list[int]:
        r"""`\n\n<tag>\n(1)title   text\n ...\n<tag>`, cut to the token budget and the context.

        Exactly two new lines separate the query's closing tag and the block. The token that ends
        the tag may contain some already; the block begins with those that are missing.

        The closing tag is kept whole, unless the context ends within it. The block must not end in
        white space: most tokenizers split white space differently at the end of a string than
        inside running text, and the model would continue from a token boundary that it never saw.
        """
        tags = self.tags
        last_token = self.tokenizer.decode(episode.token_ids[-1:])
        blanks = last_token[len(last_token.rstrip()) :]
        missing_new_lines = 2 - blanks.count("\n")
        lines = [tags.passage.format(number=n, **p) for n, p in enumerate(passages, 1)]
        text = "\n" * missing_new_lines + tags.documents.opening + tags.around_passages
        text += "\n".join(lines) or tags.no_passages
        closing_ids = self._encode(
            tags.around_passages + tags.documents.closing + tags.after_closing
        )
        room = max(0, self.limits.max_context - len(episode.token_ids))
        budget = max(0, min(self.limits.max_document_tokens, room) - len(closing_ids))
        ids = self._encode(text[: self._max_document_characters])[:budget] + closing_ids
        return ids[:room]
