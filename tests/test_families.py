"""Every family of models: trained, handed to vLLM, exported, and read again by both libraries."""

import dataclasses
from pathlib import Path

import pytest
import torch
from test_engine import sampled_log_probs
from tiny import FAMILIES, command, launch, make_model, make_world, metrics_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import policy
import train
from engine import VLLMEngine, compute_dtype
from reward import TAGS, load_prompt
from rollout import Episode, Limits, Rollout, prompt_encoder


@pytest.fixture(scope="module", params=[name for name in FAMILIES if name != "llama"])
def family_folder(request, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp(request.param)
    make_model(folder, request.param, prompts=("base", "chat"))
    return str(folder)


def test_a_rank_reads_what_transformers_reads(family_folder):
    policy.start_distributed()
    for frozen, dtype in [(False, torch.float32), (True, compute_dtype())]:
        ours = policy.load_policy(family_folder, frozen=frozen).lm
        theirs = AutoModelForCausalLM.from_pretrained(family_folder, dtype=dtype)
        for read in ("named_parameters", "named_buffers"):
            expected = dict(getattr(theirs, read)())
            tensors = dict(getattr(ours, read)())
            assert tensors.keys() == expected.keys()
            for name, tensor in tensors.items():
                whole = tensor.full_tensor() if read == "named_parameters" else tensor
                assert whole.dtype == expected[name].dtype and whole.equal(expected[name])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_family_trains_on_one_rank_and_on_two(ranks, family_folder, tmp_path, monkeypatch):
    """With vLLM's samples: what the trainer computes of them is what vLLM reported."""
    monkeypatch.chdir(tmp_path)
    policy.start_distributed()
    world = make_world(tmp_path, family_folder)
    chats_on_one = "qwen" in family_folder
    prompt = "chat" if (ranks == 1) == chats_on_one else "base"
    options = {"engine": "vllm", "steps": 2, "prompt_file": prompt, "max_context": 1600}
    # All questions, and a penalty, so that every step has a gradient, whatever was sampled.
    options |= {"prompts_per_step": 8, "samples_per_prompt": 2, "kl_coef": 0.1}
    config = dataclasses.replace(world, **options, algorithm="reinforce++", reward="stage1")
    if ranks == 1:
        train.train(config, Path("a"))
    else:
        result = launch(ranks, *command(config, "a"))
        assert result.returncode == 0, result.stderr[-3000:]
    rows = metrics_of("a")
    assert [row["updates"] for row in rows] == [1, 1]
    assert all(row["sampler_gap"] < 0.05 for row in rows)

    tokenizer = AutoTokenizer.from_pretrained("a/model")
    engine = VLLMEngine("a/model", max_context=1600, dtype="float32")
    limits = Limits(max_turn_tokens=8, max_context=1600, temperature=0.0)
    rollout = Rollout(engine, tokenizer, None, TAGS, limits)
    prompt_ids = prompt_encoder(tokenizer, load_prompt(prompt))("who is 3?")
    (episode,) = rollout.run([Episode({}, prompt_ids)])
    model = AutoModelForCausalLM.from_pretrained("a/model", dtype=torch.float32)
    for expected, reported in sampled_log_probs(episode, model):
        assert reported == pytest.approx(expected, abs=1e-4)


def test_a_prompt_has_one_bos_where_its_family_has_one(family_folder):
    """For Llama the tokenizer writes it before a text, and the template before a chat."""
    tokenizer = AutoTokenizer.from_pretrained(family_folder)
    for name in ("base", "chat"):
        ids = prompt_encoder(tokenizer, load_prompt(name))("who is 3?")
        assert ids.count(0) == ("llama" in family_folder)
