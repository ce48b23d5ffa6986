"""Both engines, the real vLLM among them: what they sample, report and take as weights."""

import time

import pytest
import torch
from test_rollout import HOSTILE, consistent
from transformers import AutoModelForCausalLM

from engine import TransformersEngine, VLLMEngine, compute_dtype
from reward import TAGS
from rollout import Episode, Limits, Rollout, derive_seed


def hostile_passages(queries, k):
    return [[{"title": "T", "text": HOSTILE}] for _ in queries]


def run_all(engine, tokenizer, temperature, count=6):
    limits = Limits(max_context=400, max_turn_tokens=64, max_searches=3, temperature=temperature)
    rollout = Rollout(engine, tokenizer, hostile_passages, TAGS, limits, deterministic=True)
    prompts = [tokenizer.encode(f"Question: who is {i}?\n<think>") for i in range(count)]
    episodes = [Episode({}, ids, seed=derive_seed(0, i)) for i, ids in enumerate(prompts)]
    assert len(list(rollout.run(episodes))) == count
    return episodes


def sampled_log_probs(episode, model, temperature=1.0):
    """(by the model in fp32, by the engine) for every sampled token."""
    logits = model(torch.tensor([episode.token_ids])).logits[0] / temperature
    by_model = logits.log_softmax(-1)
    pairs = []
    for t, acted in enumerate(episode.action_mask):
        if acted:
            expected = by_model[t - 1, episode.token_ids[t]].item()
            pairs.append((expected, episode.log_probs[t]))
    assert pairs
    return pairs


def same(pairs, tolerance=1e-3):
    return all(abs(expected - reported) < tolerance for expected, reported in pairs)


@pytest.fixture(scope="module")
def vllm_engine(model_folder):
    return VLLMEngine(model_folder, max_context=400, dtype="float32")


def test_vllm_trains_on_what_it_sampled(vllm_engine, tokenizer):
    """What goes back to the engine at a turn boundary is what it sampled and what was injected."""
    submitted, completed = {}, {}
    submit, step = vllm_engine.submit, vllm_engine.step

    class Recorder:
        def submit(self, key, token_ids, **options):
            submitted[key] = list(token_ids)
            submit(key, token_ids, **options)

        def step(self):
            completions = step()
            completed.update({c.key: c for c in completions})
            return completions

    episodes = run_all(Recorder(), tokenizer, temperature=1.0)
    assert any(e.queries for e in episodes)
    for episode in episodes:
        consistent(episode, tokenizer)
        turns = [key for key, ids in submitted.items() if episode.token_ids[: len(ids)] == ids]
        for key in turns:
            start, sampled = len(submitted[key]), completed[key].token_ids
            assert episode.token_ids[start : start + len(sampled)] == sampled
            assert all(episode.action_mask[start : start + len(sampled)])
            assert episode.log_probs[start : start + len(sampled)] == completed[key].log_probs
        assert sum(len(completed[key].token_ids) for key in turns) == sum(episode.action_mask)


def test_vllm_repeats_itself(vllm_engine, tokenizer):
    first = run_all(vllm_engine, tokenizer, temperature=1.0)
    vllm_engine.llm.reset_prefix_cache()
    second = run_all(vllm_engine, tokenizer, temperature=1.0)
    assert [e.token_ids for e in first] == [e.token_ids for e in second]
    assert len({tuple(e.token_ids[len(e.prompt_ids) :]) for e in first}) > 1


def test_the_two_engines_agree(vllm_engine, tokenizer, model_folder):
    """Greedy, fp32: the same ids and the same log-probabilities."""
    ours = run_all(TransformersEngine(model_folder), tokenizer, temperature=0)
    theirs = run_all(vllm_engine, tokenizer, temperature=0)
    assert [e.token_ids for e in ours] == [e.token_ids for e in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.log_probs == pytest.approx(b.log_probs, abs=1e-4)


@pytest.mark.parametrize("kind", ["vllm", "transformers"])
def test_log_probs_are_those_of_the_model_after_temperature(
    kind, vllm_engine, tokenizer, model_folder
):
    engine = vllm_engine if kind == "vllm" else TransformersEngine(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    for episode in run_all(engine, tokenizer, temperature=0.7, count=2):
        assert same(sampled_log_probs(episode, model, temperature=0.7))


@pytest.mark.parametrize("kind", ["vllm", "transformers"])
def test_the_engine_follows_the_trainers_weights(kind, vllm_engine, tokenizer, model_folder):
    """After a sync it samples from the new weights from the first token on, and back again."""
    engine = vllm_engine if kind == "vllm" else TransformersEngine(model_folder)
    before = run_all(engine, tokenizer, temperature=0)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.manual_seed(1)
    new = {name: p + 0.05 * torch.randn_like(p) for name, p in old.items()}
    engine.load_weights(new.items())
    model.load_state_dict(new, strict=False)
    after = run_all(engine, tokenizer, temperature=0)
    assert [e.token_ids for e in before] != [e.token_ids for e in after]
    for episode in after:
        assert same(sampled_log_probs(episode, model))
    engine.load_weights(old.items())
    again = run_all(engine, tokenizer, temperature=0)
    assert [e.token_ids for e in again] == [e.token_ids for e in before]


def test_the_small_engine_finishes_one_sequence_a_step_whatever_else_was_submitted(
    model_folder, tokenizer
):
    engine = TransformersEngine(model_folder)
    options = {"max_tokens": 24, "stop": [TAGS.query.closing], "temperature": 1.0}
    prompts = [tokenizer.encode(f"Question: who is {i}?\n<think>") for i in range(4)]
    alone = []
    for key, ids in enumerate(prompts):
        engine.submit(key, ids, seed=key, **options)
        alone.append(engine.step())
        assert engine.step() == []
    for key, ids in enumerate(prompts):
        engine.submit(key, ids, seed=key, **options)
    assert [engine.step() for _ in prompts] == alone
    assert [len(completions) for completions in alone] == [1] * 4


@pytest.mark.parametrize(
    "on_gpu, capability, dtype",
    [
        (False, "AVX2", torch.float32),
        (False, "AVX512", torch.bfloat16),
        (True, "AVX2", torch.bfloat16),
    ],
)
def test_only_a_cpu_without_avx512_computes_in_float32(on_gpu, capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert compute_dtype() == dtype


@pytest.mark.skipif(torch.cuda.is_available(), reason="the dtype of CPUs")
def test_this_cpu_computes_in_the_dtype_that_it_multiplies_faster():
    """A layer of the demo's model, forward and backward. The wrong choice costs a factor of 40."""
    seconds = {torch.float32: [], torch.bfloat16: []}
    for _ in range(4):
        for dtype in seconds:
            layer = torch.nn.Linear(576, 1536, dtype=dtype)
            states = torch.randn(512, 576, dtype=dtype, requires_grad=True)
            start = time.perf_counter()
            layer(states).sum().backward()
            seconds[dtype].append(time.perf_counter() - start)
    fastest = {dtype: min(times) for dtype, times in seconds.items()}
    print(f"bfloat16 / float32: {fastest[torch.bfloat16] / fastest[torch.float32]:.2f}")
    assert fastest[compute_dtype()] < 2 * min(fastest.values())
