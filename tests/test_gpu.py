"""What only a GPU can show: `make test-gpu`. Three tests want vLLM, and one wants a second GPU."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_engine import run_all, sampled_log_probs
from tiny import command, metrics_of
from transformers import AutoModelForCausalLM

import policy
import train
from benchmarks.measure import torchrun_command
from engine import VLLMEngine

HAS_VLLM = importlib.util.find_spec("vllm") is not None
ENGINE = "vllm" if HAS_VLLM else "transformers"
needs_vllm = pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


def torchrun(ranks: int, *words: str) -> subprocess.CompletedProcess:
    command = torchrun_command(ranks, *words)
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def engine(model_folder):
    return VLLMEngine(
        model_folder, max_context=400, gpu_memory_utilization=0.2, dtype="float32", sleep_mode=True
    )


@needs_vllm
def test_an_engine_that_slept_and_got_its_weights_again_answers_as_before(
    engine, tokenizer, model_folder
):
    """Three times, and the GPU's free memory after sleep does not shrink."""
    weights = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    engine.load_weights(weights.named_parameters())
    before = run_all(engine, tokenizer, temperature=0)
    free = []
    for _ in range(3):
        engine.sleep()
        free.append(torch.cuda.mem_get_info()[0])
        engine.wake_up()
        engine.load_weights(weights.named_parameters())
        after = run_all(engine, tokenizer, temperature=0)
        assert [e.token_ids for e in after] == [e.token_ids for e in before]
    assert min(free) > free[0] - 2**26


@needs_vllm
def test_the_engine_follows_the_trainer(engine, tokenizer, model_folder):
    """Log-probabilities of other weights than it opened with, beside transformers' in fp32.

    Rounded to TF32 on a CPU, attention alone moves them by up to 0.013, and all products by 0.044;
    the old weights are off by up to 17, the old head alone by 2.4.
    """
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    engine.load_weights(model.named_parameters())
    for episode in run_all(engine, tokenizer, temperature=0.7):
        for expected, reported in sampled_log_probs(episode, model, temperature=0.7):
            assert reported == pytest.approx(expected, abs=5e-2)


@needs_vllm
def test_a_batch_invariant_engine_repeats_a_rollout(model_folder, tmp_path):
    """The documented switch; in processes of their own, since vLLM reads it on import."""
    program = """
import sys
sys.path[:0] = sys.argv[1:3]
from test_engine import run_all
from transformers import AutoTokenizer
from engine import VLLMEngine
engine = VLLMEngine(sys.argv[3], max_context=400, gpu_memory_utilization=0.2)
print([e.token_ids for e in run_all(engine, AutoTokenizer.from_pretrained(sys.argv[3]), 1.0, 32)])
"""
    tests = Path(__file__).parent
    command = [sys.executable, "-c", program, str(tests), str(tests.parent), model_folder]
    environment = os.environ | {"VLLM_BATCH_INVARIANT": "1"}
    told = [subprocess.check_output(command, env=environment, text=True) for _ in range(2)]
    assert told[0].splitlines()[-1] == told[1].splitlines()[-1] != "[]"


def test_a_rank_computes_on_the_gpu_what_a_cpu_computes(world):
    """Log-probabilities of fixed episodes, in bf16, beside those of transformers in fp32."""
    from gradients import make_episodes

    config = dataclasses.replace(world, samples_per_prompt=3)
    trainer = train.Trainer(config, policy.load_policy(config.model))
    episodes = make_episodes(2, 3)
    batch = train.make_batch(episodes, 3, trainer.device)
    log_probs = trainer.log_probs(trainer.policy, batch, list(range(len(episodes))))
    assert log_probs.is_cuda
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    for episode, row in zip(episodes, log_probs.cpu(), strict=True):
        logits = model(torch.tensor([episode.token_ids])).logits[0]
        expected = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(episode.token_ids)[1:, None])
        acted = torch.tensor(episode.action_mask, dtype=torch.bool)
        assert (row[: len(acted)][acted] - expected[:, 0][acted[1:]]).abs().mean() < 0.05


@pytest.mark.parametrize("flags", [[], ["--cpu_offload", "--kl_coef=0.1"]])
def test_a_run_trains_and_resumes(world, flags):
    """In processes of their own: only one engine of a process can sleep."""
    for steps in (1, 2):
        options = {"engine": ENGINE, "gpu_memory_utilization": 0.2, "steps": steps}
        config = dataclasses.replace(world, **options)
        result = torchrun(1, *command(config, "a", "--resume", *flags))
        assert result.returncode == 0, result.stderr[-3000:]
    rows = metrics_of("a")
    assert [row["updates"] for row in rows] == [1, 1]
    assert all(row["sampler_gap"] < 0.05 for row in rows)
    AutoModelForCausalLM.from_pretrained("a/model")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_two_ranks_over_nccl(world):
    options = {"engine": ENGINE, "steps": 2, "gpu_memory_utilization": 0.2}
    result = torchrun(2, *command(dataclasses.replace(world, **options), "a"))
    assert result.returncode == 0, result.stderr[-3000:]
    assert [row["updates"] for row in metrics_of("a")] == [1, 1]
