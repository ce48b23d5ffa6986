"""The options of train.py and their presets: the paper's values for two models, and the demo's.

An explicit flag wins over the preset, and the preset over the default. The resulting values are
written into the run's folder.
"""

import argparse
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from inference import Inference
from reinforce_pp import ALGORITHMS
from reward import REWARDS


@dataclass(frozen=True)
class Config(Inference):
    """Everything that decides the numbers of a run; the limits of an episode are in rollout.py."""

    model: str = "Qwen/Qwen2.5-7B"  # Hugging Face folder or hub name
    questions: str = "data/stage_1.jsonl"  # training questions (JSONL)
    eval_questions: str = ""  # validation questions (JSONL) for --eval_every
    retriever: str = "data/bm25"  # passage file (JSONL), index folder or URL of a search server
    steps: int = 128  # rollout batches
    prompts_per_step: int = 64  # questions in a rollout batch (official scripts)
    samples_per_prompt: int = 16  # episodes per question (paper, section 3.3)
    updates_per_rollout: int = 4  # optimiser steps per rollout batch: 1024 / 256 (official scripts)
    reward: Literal[tuple(REWARDS)] = "stage1"  # reward function (reward.py)
    algorithm: Literal[tuple(ALGORITHMS)] = "reinforce++"  # advantage estimator (reinforce_pp.py)
    learning_rate: float = 2e-6  # of AdamW, constant after --warmup (paper, section 3.3)
    warmup: int = 0  # optimiser steps in which the learning rate rises to its value
    kl_coef: float = 0.0  # beta; above 0 a reference model is loaded (0 for Qwen, 1e-4 for Llama)
    kl_mode: Literal["reward", "k2", "k3"] = "reward"  # k1 in the reward, or k2 / k3 as a loss
    clip_eps: float = 0.2  # clip range of the ratio
    clip_eps_high: float | None = None  # upper end of the clip range (DAPO: 0.28); None: clip_eps
    mask_truncated: bool = False  # no gradient from episodes out of tokens or with a bad query
    sampler_clip: float = 2.0  # sampler correction within [1/c, c]; 0 switches it off
    sampler_mask: float = 0.0  # no gradient from sequences whose mean ratio leaves [1/c, c]; 0 off
    micro_batch_tokens: int = 32_768  # padded tokens of one forward and backward pass
    gradient_checkpointing: bool = True  # recompute activations in the backward pass
    cpu_offload: bool = False  # keep parameters and optimiser states in host memory
    gpu_memory_utilization: float = 0.5  # the engine's share of the GPU while it is awake
    save_every: int = 10  # rollout batches between checkpoints; 0: after evaluations and at the end
    eval_every: int = 0  # rollout batches between evaluations, which save a checkpoint; 0 never
    stop_on_collapse: float = 0.0  # end when log_prob_right stays this far below its best; 0 never
    collapse_evaluations: int = 2  # evaluations in a row that must show it


LLAMA = {"model": "meta-llama/Llama-3.1-8B-Instruct", "prompt_file": "chat", "kl_coef": 1e-4}
STAGE_1 = {  # one pass over 350 questions
    "questions": "data/stage_1.jsonl",
    "reward": "stage1",
    "steps": 6,
    "save_every": 2,
}
STAGE_2 = {  # one pass over 8,148 questions
    "model": "runs/stage1/model",
    "questions": "data/stage_2.jsonl",
    "reward": "stage2",
    "steps": 128,
}
DEMO = {
    "model": "demo/model",
    "retriever": "demo/passages.jsonl",
    "questions": "demo/train.jsonl",
    "prompt_file": "demo/prompt.txt",
    "temperature": 0.7,  # at 1.0 a 135M model rarely completes a tag
    "prompts_per_step": 8,
    "samples_per_prompt": 8,
    "updates_per_rollout": 1,
    "learning_rate": 2e-5,
    "max_searches": 3,
    "documents_per_search": 1,
    "max_turn_tokens": 48,
    "max_context": 768,
    "micro_batch_tokens": 2048,
    "gradient_checkpointing": False,
    "save_every": 4,
}
PRESETS: dict[str, dict[int, dict[str, Any]]] = {
    "qwen": {1: STAGE_1, 2: STAGE_2},
    "llama": {
        1: LLAMA | STAGE_1 | {"prompts_per_step": 15, "steps": 24},
        2: LLAMA | STAGE_2 | {"prompts_per_step": 65, "steps": 126},
    },
    "demo": {
        1: DEMO | {"reward": "stage1", "algorithm": "grpo", "steps": 6},
        # Not GRPO: from samples that agree on a wrong answer it learns nothing.
        2: DEMO
        | {
            "model": "demo/stage1/model",
            "reward": "stage2",
            "learning_rate": 3e-5,
            "temperature": 0.8,
            "steps": 15,
        },
    },
}


@dataclass(frozen=True)
class Arguments:
    """The command line of train.py."""

    stage: Literal[1, 2]  # 1 learns to search, 2 to answer with it
    preset: Literal[tuple(PRESETS)] = "qwen"  # where the options' defaults come from
    out: Path | None = None  # run folder (default runs/stage1 or 2, of the demo demo/stage1 or 2)
    resume: bool = False  # go on from the newest checkpoint in --out, if there is one
    log: Literal["tensorboard", "wandb"] | None = None  # log there too, besides metrics.jsonl
    config: Annotated[Config, tyro.conf.arg(name="")] = Config()

    @property
    def out_folder(self) -> Path:
        parent = "demo" if self.preset == "demo" else "runs"
        return self.out or Path(parent, f"stage{self.stage}")


def parse_arguments(
    argv: list[str] | None, description: str, kind: type[Arguments] = Arguments
) -> Arguments:
    """Parse twice: first for stage and preset, then everything over the preset's values.

    Args:
        kind: `Arguments`, or more than these.
    Raises:
        ValueError: an option has an impossible value.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--stage")
    parser.add_argument("--preset", default=Arguments.preset)
    chosen, _ = parser.parse_known_args(argv)
    preset = {str(stage): values for stage, values in PRESETS.get(chosen.preset, {}).items()}
    default = kind(stage=tyro.MISSING, config=Config(**preset.get(chosen.stage, {})))
    arguments = tyro.cli(
        kind, args=argv, description=description, default=default, use_underscores=True
    )
    check(arguments.config)
    return arguments


def require_gpu(preset: str) -> None:
    """Raises ValueError if the preset needs a GPU and there is none."""
    if preset != "demo" and not torch.cuda.is_available():
        raise ValueError(
            f"--preset {preset} is for NVIDIA GPUs, and PyTorch finds none here; "
            "without one, try: make demo"
        )


def check(config: Config) -> None:
    """Refuse what cannot work, before anything is loaded.

    Raises:
        ValueError: names the flag and the values that it takes.
    """
    for field in fields(Config):
        least = 0 if field.name in ("save_every", "eval_every", "warmup") else 1
        if field.type is int and field.name != "seed" and getattr(config, field.name) < least:
            raise ValueError(f"--{field.name} must be at least {least}")
    for name in ("learning_rate", "clip_eps", "clip_eps_high"):
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:  # NaN is refused too
            raise ValueError(f"--{name} must be a number above 0")
    if not 0.01 <= config.temperature <= 2:  # vLLM's limits
        raise ValueError("--temperature must be from 0.01 to 2")
    if not 0 < config.gpu_memory_utilization <= 1:
        raise ValueError("--gpu_memory_utilization must be above 0 and at most 1")
    for name in ("kl_coef", "stop_on_collapse"):
        if not getattr(config, name) >= 0:
            raise ValueError(f"--{name} must be at least 0")
    for name in ("sampler_clip", "sampler_mask"):
        if not (getattr(config, name) == 0 or getattr(config, name) >= 1):
            raise ValueError(f"--{name} must be 0 (off) or at least 1")
    if config.samples_per_prompt == 1 and config.algorithm != "reinforce++":
        raise ValueError(
            f"--algorithm {config.algorithm} compares the samples of a prompt: "
            "--samples_per_prompt must be at least 2"
        )
    if config.kl_mode != "reward" and not config.kl_coef:
        raise ValueError(f"--kl_mode {config.kl_mode} needs --kl_coef")
    if config.updates_per_rollout > config.prompts_per_step:
        raise ValueError("--updates_per_rollout must be at most --prompts_per_step")
    if config.eval_every and not config.eval_questions:
        raise ValueError("--eval_every needs --eval_questions")
    if config.eval_every > config.steps:
        raise ValueError("--eval_every must be at most --steps, or nothing is evaluated")
    if config.stop_on_collapse and not config.eval_every:
        raise ValueError("--stop_on_collapse needs --eval_every")
