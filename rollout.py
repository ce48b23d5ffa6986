"""Generate, stop at a query, retrieve, resume: how trajectories with searches in them are made.

There is no barrier between turns. As soon as one trajectory stops at a query, its query goes to a small thread pool while
the engine keeps decoding the others; when the documents arrive, the trajectory goes back to the engine with all its token
ids, and prefix caching makes the resumption cost only the new tokens.

Tokens in, tokens out: what the model sampled is what will be trained on, id for id. Nothing is decoded and encoded again
between turns; only injected text is tokenised, once, on its own, with special tokens switched off.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

# ---------------------------------------------------------------------------------------------------------------------
# The contract between the files


@dataclass
class Episode:
    """One trajectory, grown in place. The three lists are parallel and start with the prompt."""

    question: dict[str, Any]  # id, question, answers, dataset
    prompt_ids: list[int]
    seed: int = 0  # of the episode; every turn derives its own
    token_ids: list[int] = field(default_factory=list)  # prompt, sampled tokens and documents, in order
    action_mask: list[int] = field(default_factory=list)  # 1 where the policy sampled the token
    log_probs: list[float] = field(default_factory=list)  # the sampler's own, 0 where not sampled
    segments: list[tuple[str, str]] = field(default_factory=list)  # (kind, text): prompt, policy or documents
    queries: list[str] = field(default_factory=list)  # those that were asked, in order
    finish_reason: str = ""  # answer, eos, length, max_searches or bad_query; "" while it runs
    search_failures: int = 0  # queries that got an empty result because the retriever failed
    rewards: dict[str, Any] = field(default_factory=dict)  # what `reward.judge` says

    def add(self, kind: str, token_ids: list[int], text: str, log_probs: list[float] | None = None) -> None:
        """Append a segment. It was sampled by the policy if and only if it comes with log-probabilities."""
        self.token_ids += token_ids
        self.action_mask += [int(log_probs is not None)] * len(token_ids)
        self.log_probs += log_probs if log_probs is not None else [0.0] * len(token_ids)
        self.segments.append((kind, text))


@dataclass(frozen=True)
class Limits:
    """What a trajectory may use; the same in training and in evaluation."""

    max_searches: int = 8  # queries answered per question (paper)
    documents_per_search: int = 3  # 3 in training, 5 at evaluation (official code)
    max_turn_tokens: int = 512  # sampled between two stops (official code)
    max_document_tokens: int = 2048  # of one documents block; longer ones are cut
    max_context: int = 29_000  # prompt, policy and documents together (official code)
    temperature: float = 1.0  # 0 is greedy


@dataclass(frozen=True)
class Completion:
    """What an engine made of one submitted sequence."""

    key: int
    token_ids: list[int]  # the stop string's tokens and EOS included
    log_probs: list[float]  # of `token_ids`, after temperature, over the full softmax
    stop: str | None  # the stop string that ended it, "eos", or None if it ran out of tokens


class Engine(Protocol):
    def submit(self, key: int, token_ids: list[int], *, max_tokens: int, stop: list[str], temperature: float, seed: int): ...
    def step(self) -> list[Completion]: ...
    def load_weights(self, named_tensors: Iterable[tuple[str, Any]]) -> None: ...
    def sleep(self) -> None: ...
    def wake_up(self) -> None: ...


def derive_seed(*parts: int | str) -> int:
    """A 31-bit seed that depends on all parts and on nothing else (not on the rank, not on the process)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


# ---------------------------------------------------------------------------------------------------------------------
# Text to ids


def data_encoder(tokenizer) -> Callable[[str], list[int]]:
    """An encoder for text that is data: a special token spelled out in it stays ordinary characters. Thread-safe."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return lambda text: backend.encode(text, add_special_tokens=False).ids


def prompt_encoder(tokenizer, template: list[tuple[str, str]]) -> Callable[[str], list[int]]:
    """An encoder from question to prompt ids.

    Args:
        template: (role, text) as in `reward.PROMPTS`. Role "text" is used as it is; "system" and "user" go through the
            tokenizer's chat template, and "prefill" opens the assistant's turn.
    Raises:
        ValueError: `{question}` does not occur exactly once, or the tokenizer has no chat template.
    """
    is_text = template[0][0] == "text"
    if is_text:
        text = template[0][1]
    elif not tokenizer.chat_template:
        raise ValueError("this prompt needs a chat template and the tokenizer has none; use --prompt_file base")
    else:
        messages = [{"role": role, "content": content} for role, content in template if role != "prefill"]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        text += "".join(content for role, content in template if role == "prefill")
    if text.count("{question}") != 1:
        raise ValueError("a prompt must contain {question} exactly once")
    head, tail = text.split("{question}")
    blanks = head[len(head.rstrip(" ")) :]  # " Who" is one token: the blank belongs to the question, not to the head
    head_ids = tokenizer.encode(head.rstrip(" "), add_special_tokens=is_text)  # a chat template brings its own BOS
    tail_ids = tokenizer.encode(tail, add_special_tokens=False)
    encode = data_encoder(tokenizer)
    return lambda question: head_ids + encode(blanks + question) + tail_ids


# ---------------------------------------------------------------------------------------------------------------------
# The loop


REJOIN_AFTER = 4  # engine steps: they hide the latency of most retrievers, and cost a trajectory few of its hundreds
LOOKUPS = 4  # at a time; what is asked meanwhile goes together into the next, so that a retriever in trouble is spared


class Rollout:
    """Runs episodes to their end.

    Args:
        engine: an `Engine`.
        tokenizer: the model's, a fast one.
        search: `search(queries, k)` gives one list of passages a query (retriever.py).
        tags: the protocol's markers (`reward.TAGS`).
        limits: see `Limits`.
        deterministic: search results rejoin REJOIN_AFTER engine steps after their query instead of when they arrive, so
            that a run repeats bit for bit (numerics depend on which sequences share a step).
    """

    def __init__(self, engine: Engine, tokenizer, search, tags, limits: Limits, deterministic: bool = False):
        self.engine, self.tokenizer, self.search, self.tags = engine, tokenizer, search, tags
        self.limits, self.deterministic = limits, deterministic
        self.search_error = ""  # the last one, for the message that stops a run
        self._encode = data_encoder(tokenizer)
        # A documents block's tokens lie within so many characters, as none is longer than the vocabulary's longest. A cut
        # there changes the word that it hits, which in text lies far behind them: words have a few characters, the longest
        # token over a hundred. The rest of a passage of megabytes would be tokenised for seconds to be thrown away.
        self._characters = limits.max_document_tokens * max(map(len, tokenizer.get_vocab()))
        self._pool = ThreadPoolExecutor(max_workers=LOOKUPS, thread_name_prefix="search")

    def run(self, episodes: Iterable[Episode | None], max_running: int = 256) -> Iterator[Episode]:
        """Yield each episode as it finishes. `episodes` is read lazily: at most `max_running` are under way.

        None says that there is none to start now; as long as others are under way `episodes` is asked again.
        """
        waiting = iter(episodes)
        decoding: dict[int, Episode] = {}  # by key
        asking: list[Episode] = []  # those whose queries wait for a place among the lookups
        searching: dict[Future, tuple[int, list[Episode]]] = {}  # with the engine step of the lookup, in its order
        key = steps = 0
        while True:
            places = max_running - len(decoding) - len(asking) - sum(len(asked) for _, asked in searching.values())
            ready = [episode for episode in islice(waiting, places) if episode is not None]
            for episode in ready:
                episode.add("prompt", episode.prompt_ids, self.tokenizer.decode(episode.prompt_ids))
            for future in self._arrived(searching, steps, idle=not decoding and not ready):
                _, asked = searching.pop(future)
                for episode, (documents, failed) in zip(asked, future.result(), strict=True):
                    episode.add("documents", documents, self.tokenizer.decode(documents))
                    episode.search_failures += failed
                    ready.append(episode)
            for episode in ready:
                key += 1
                if self._submit(key, episode):
                    decoding[key] = episode
                else:
                    yield episode
            if not (decoding or asking or searching or ready):
                return
            steps += 1
            for completion in self.engine.step() if decoding else []:
                episode = decoding.pop(completion.key)
                if self._absorb(episode, completion):
                    asking.append(episode)
                else:
                    yield episode
            if asking and len(searching) < LOOKUPS:  # queries that are ready together go as one batch
                searching[self._pool.submit(self._look_up, [e.queries[-1] for e in asking])] = steps, asking
                asking = []

    def _arrived(self, searching: dict[Future, tuple[int, list[Episode]]], steps: int, idle: bool) -> list[Future]:
        """The lookups whose results rejoin now; at least one if the engine is idle. Those not done are waited for."""
        if self.deterministic:
            due = [future for future, (asked, _) in searching.items() if steps - asked >= REJOIN_AFTER]
            return due or (list(searching)[:1] if idle else [])
        if searching and idle:
            wait(searching, return_when=FIRST_COMPLETED)
        return [future for future in searching if future.done()]

    def _submit(self, key: int, episode: Episode) -> bool:
        """Hand the episode to the engine; False if its context is full."""
        room = self.limits.max_context - len(episode.token_ids)
        if room < 1:
            episode.finish_reason = "length"
            return False
        self.engine.submit(
            key,
            episode.token_ids,
            max_tokens=min(self.limits.max_turn_tokens, room),
            stop=[self.tags.query[1], self.tags.answer[1]],
            temperature=self.limits.temperature,
            seed=derive_seed(episode.seed, len(episode.queries)),
        )
        return True

    def _absorb(self, episode: Episode, completion: Completion) -> bool:
        """Append what was sampled; True if it ends in a query to be answered, else the episode is finished."""
        text = self.tokenizer.decode(completion.token_ids)
        episode.add("policy", completion.token_ids, text, completion.log_probs)
        if completion.stop != self.tags.query[1]:
            reasons = {None: "length", "eos": "eos", self.tags.answer[1]: "answer"}
            episode.finish_reason = reasons[completion.stop]
            return False
        _, opened, query = text.partition(self.tags.query[1])[0].rpartition(self.tags.query[0])
        if not opened or not query.strip():
            episode.finish_reason = "bad_query"
        elif len(episode.queries) == self.limits.max_searches:
            episode.finish_reason = "max_searches"
        else:
            episode.queries.append(query.strip())
        return not episode.finish_reason

    def _look_up(self, queries: list[str]) -> list[tuple[list[int], bool]]:
        """Search and tokenise, off the engine's path: per query (documents block as ids, whether the search failed)."""
        try:
            results = self.search(queries, self.limits.documents_per_search)
            return [(self._encode_documents(passages), False) for _, passages in zip(queries, results, strict=True)]
        except BaseException as error:  # tantivy's panics are no Exception. The run counts what failed and goes on
            self.search_error = repr(error)  # a panic cannot be pickled for the other ranks
            return [(self._encode_documents([]), True) for _ in queries]

    def _encode_documents(self, passages: list[dict[str, str]]) -> list[int]:
        """`\\n\\n<documents>\\n(1)title   text\\n ... </documents>`, cut to the token budget with the closing tag intact.

        The block must not end in white space: most tokenizers split white space differently at the end of a string than
        inside running text, and the model would continue from a token boundary that it never saw.
        """
        opening, closing = self.tags.documents
        lines = [f"({number}){p['title']}   {p['text']}" for number, p in enumerate(passages, 1)] or ["(no results)"]
        text, tail = f"\n\n{opening}\n" + "\n".join(lines), self._encode("\n" + closing)
        return self._encode(text[: self._characters])[: max(0, self.limits.max_document_tokens - len(tail))] + tail


# ---------------------------------------------------------------------------------------------------------------------
# Engines


def _repack_tied_head(model) -> None:
    """On a CPU vLLM computes the logits from a packed copy of the head, which a reload of tied embeddings leaves stale."""
    if model.config.tie_word_embeddings:
        model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


class VLLMEngine:
    """vLLM in this process, one engine a rank, on GPU or CPU.

    `gpu_memory_utilization` is the share of the GPU for weights and KV cache while the engine is awake.
    """

    def __init__(self, model: str, max_context: int, gpu_memory_utilization: float = 0.6, dtype: str = "bfloat16"):
        import torch

        self.on_gpu = torch.cuda.is_available()
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine must share this process to share its weights
        if not self.on_gpu:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # leaves the trainer's threads free
        from vllm import LLM

        self.llm = LLM(
            model=model,
            load_format="safetensors",  # never a pickle
            dtype=dtype,
            max_model_len=max_context,
            gpu_memory_utilization=gpu_memory_utilization,
            enable_prefix_caching=True,
            block_size=None if self.on_gpu else 32,  # the CPU's 128 would cache little of a short prompt
            # vLLM rewinds a seeded request's generator after a partial prefill, which a CPU generator cannot do
            enable_chunked_prefill=self.on_gpu,
            enforce_eager=not self.on_gpu,
            enable_sleep_mode=self.on_gpu,
            logprobs_mode="processed_logprobs",  # after temperature, as the trainer computes them
            # torchrun started us: the engine takes RANK and LOCAL_RANK from the environment instead of GPU 0
            distributed_executor_backend="external_launcher" if "LOCAL_RANK" in os.environ else None,
        )
        self.engine = self.llm.llm_engine

    def submit(self, key, token_ids, *, max_tokens, stop, temperature, seed):
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            stop=stop,
            include_stop_str_in_output=True,
            skip_special_tokens=False,  # a tag may be a special token: stop strings must see it
            logprobs=0,  # of the sampled token alone
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self.engine.add_request(str(key), {"prompt_token_ids": token_ids}, params)

    def step(self) -> list[Completion]:
        completions = []
        for request in self.engine.step():
            output = request.outputs[0]
            log_probs = [step[token].logprob for token, step in zip(output.token_ids, output.logprobs, strict=True)]
            # a stop string is reported as itself, EOS as None and a further EOS of the generation config as its id
            ended_by = output.stop_reason if isinstance(output.stop_reason, str) else "eos"
            stop = None if output.finish_reason == "length" else ended_by
            completions.append(Completion(int(request.request_id), list(output.token_ids), log_probs, stop))
        return completions

    def load_weights(self, named_tensors):
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(named_tensors)})
        if not self.on_gpu:
            self.llm.apply_model(_repack_tied_head)
        self.llm.reset_prefix_cache()  # its entries were computed with the old weights

    def sleep(self):
        """Give the GPU back to the trainer. Level 2 drops the weights too: the next ones come from the trainer."""
        if self.on_gpu:
            self.llm.sleep(level=2)

    def wake_up(self):
        """Take the memory again. The weights are undefined until `load_weights`."""
        if self.on_gpu:
            self.llm.wake_up()


class TransformersEngine:
    """A small engine on plain transformers, one KV cache a sequence: slow, exact, easy to read.

    A sequence's tokens do not depend on what else is running, so it repeats bit for bit whatever the timing.
    """

    def __init__(self, model: str):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, use_safetensors=True).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        eos = self.model.generation_config.eos_token_id
        self.eos = set(eos if isinstance(eos, list) else [eos])
        self.running: dict[int, dict[str, Any]] = {}

    def submit(self, key, token_ids, *, max_tokens, stop, temperature, seed):
        self.running[key] = dict(
            feed=list(token_ids),  # ids that the cache does not hold yet
            cache=None,
            token_ids=[],
            log_probs=[],
            max_tokens=max_tokens,
            stop=stop,
            temperature=temperature,
            generator=self.torch.Generator().manual_seed(seed),
        )

    def step(self) -> list[Completion]:
        """Sample one token for every running sequence."""
        with self.torch.no_grad():
            finished = {key: stop for key, s in self.running.items() if (stop := self._sample(s)) is not False}
        done = [(key, stop, self.running.pop(key)) for key, stop in finished.items()]
        return [Completion(key, s["token_ids"], s["log_probs"], stop) for key, stop, s in done]

    def _sample(self, s: dict[str, Any]) -> str | bool | None:
        """Append one token; the completion's `stop` if that ends the sequence, else False."""
        out = self.model(self.torch.tensor([s["feed"]]), past_key_values=s["cache"], use_cache=True, logits_to_keep=1)
        log_probs = (out.logits[0, -1].float() / (s["temperature"] or 1.0)).log_softmax(-1)
        if s["temperature"] == 0:
            token = int(log_probs.argmax())
        else:
            token = int(self.torch.multinomial(log_probs.exp(), 1, generator=s["generator"]))
        s["feed"], s["cache"] = [token], out.past_key_values
        s["token_ids"].append(token)
        s["log_probs"].append(float(log_probs[token]))
        if token in self.eos:
            return "eos"
        text = self.tokenizer.decode(s["token_ids"])
        stop = next((stop for stop in s["stop"] if stop in text), None)
        return stop if stop or len(s["token_ids"]) == s["max_tokens"] else False

    def load_weights(self, named_tensors):
        parameters = dict(self.model.named_parameters())
        with self.torch.no_grad():
            for name, tensor in named_tensors:
                parameters[name].copy_(tensor)

    def sleep(self): ...
    def wake_up(self): ...


# what `--engine` names, made from (model, max_context, gpu_memory_utilization)
ENGINES: dict[str, Callable[[str, int, float], Engine]] = {
    "vllm": VLLMEngine,
    "transformers": lambda model, *_: TransformersEngine(model),
}
