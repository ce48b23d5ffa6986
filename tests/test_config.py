"""The options: help, presets, precedence, refusals."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from config import PRESETS, Config, parse_arguments

ROOT = Path(__file__).parent.parent


def demo(stage, model, *flags):
    words = ["--preset", "demo", "--stage", str(stage), "--model", model, *flags]
    return parse_arguments(words, "")


def test_the_configuration_has_at_most_36_fields_and_a_comment_on_each():
    names = [field.name for field in dataclasses.fields(Config)]
    assert len(names) <= 36
    source = "".join(
        (ROOT / f"{name}.py").read_text() for name in ("config", "inference", "rollout")
    )
    for name in names:
        assert re.search(rf"^    {name}: .*  # \w.*", source, re.M), name


def test_flags_win_over_the_preset_and_the_preset_over_the_default(model_folder):
    arguments = demo(2, model_folder, "--clip_eps", "0.3")
    config = arguments.config
    assert (config.reward, config.prompts_per_step, config.clip_eps) == ("stage2", 8, 0.3)
    assert config.max_searches == 3 and config.sampler_clip == Config().sampler_clip
    assert arguments.out_folder == Path("demo/stage2")


def test_the_presets_hold_the_papers_values():
    qwen = [Config(**PRESETS["qwen"][stage]) for stage in (1, 2)]
    llama = [Config(**PRESETS["llama"][stage]) for stage in (1, 2)]
    every = [*qwen, *llama]
    for c in every:
        assert (c.learning_rate, c.samples_per_prompt, c.temperature) == (2e-6, 16, 1.0)
        assert (c.max_searches, c.documents_per_search, c.max_turn_tokens) == (8, 3, 512)
        assert (c.max_context, c.algorithm, c.updates_per_rollout) == (29_000, "reinforce++", 4)
    assert [c.prompts_per_step for c in every] == [64, 64, 15, 65]
    assert [c.kl_coef for c in every] == [0, 0, 1e-4, 1e-4]
    assert [c.reward for c in every] == ["stage1", "stage2", "stage1", "stage2"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "--steps"),
        (["--temperature", "0"], "--temperature"),
        (["--temperature", "2.5"], "--temperature"),  # vLLM's highest is 2
        (["--gpu_memory_utilization", "1.5"], "--gpu_memory_utilization"),
        (["--learning_rate", "nan"], "--learning_rate"),
        (["--learning_rate", "inf"], "--learning_rate"),
        (["--kl_coef", "-1"], "--kl_coef"),
        (["--kl_coef", "nan"], "--kl_coef"),
        (["--kl_mode", "k3"], "--kl_mode k3 needs --kl_coef"),
        (["--sampler_clip", "0.5"], "--sampler_clip"),
        (["--max_searches", "-1"], "--max_searches"),
        (["--eval_every", "-1"], "--eval_every"),
        (["--samples_per_prompt", "1"], "--samples_per_prompt"),
        (["--updates_per_rollout", "99"], "--updates_per_rollout"),
        (["--eval_every", "2"], "--eval_questions"),
        (["--eval_every", "999", "--eval_questions", "v.jsonl"], "--eval_every must be at most"),
        (["--clip_eps_high", "0"], "--clip_eps_high"),
        (["--warmup", "-1"], "--warmup"),
        (["--sampler_mask", "0.5"], "--sampler_mask"),
        (["--sampler_clip", "nan"], "--sampler_clip"),
        (["--stop_on_collapse", "nan"], "--stop_on_collapse"),
        (["--stop_on_collapse", "-1"], "--stop_on_collapse"),
        (["--stop_on_collapse", "1"], "--eval_every"),
        (["--collapse_evaluations", "0"], "--collapse_evaluations"),
    ],
)
def test_impossible_values_are_refused_by_name(flags, message, model_folder):
    with pytest.raises(ValueError, match=message):
        demo(1, model_folder, *flags)


def test_an_unknown_value_names_those_that_there_are(model_folder, capsys):
    with pytest.raises(SystemExit) as stop:
        demo(1, model_folder, "--algorithm", "ppo")
    assert stop.value.code == 2 and "'grpo'" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_paper_needs_a_gpu_and_says_so_in_one_line():
    command = [sys.executable, "train.py", "--stage", "2"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2 and "make demo" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
