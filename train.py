"""Train a language model to search, then to solve with search: R1-Searcher's two stages.

    python train.py --preset demo --stage 1                        one process, a CPU is enough
    torchrun --nproc-per-node 8 train.py --stage 2                 one node of 8 GPUs, the paper's Qwen recipe

How it departs from the textbook policy-gradient loop:
1. Every rank holds an inference engine beside its shard of the model and rolls out its share of the prompts.
2. Episodes are small (ids, masks, numbers), so they are gathered on every rank: advantages, the plan of micro-batches and
   all metrics are computed from the whole batch, alike everywhere, and a run on 1 or on N ranks trains on the same batches.
3. A group of samples computes its shared prompt once, and an episode whose advantage is 0 everywhere is not computed at
   all. Both are exact: the gradient is the same.
4. Every random draw derives from (seed, step, prompt, sample), so a checkpoint's step is its data position and RNG state.
"""

import argparse
import ctypes
import dataclasses
import math
import os
import random
import resource
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from checkpoint import RunFolder, export, load_checkpoint, save_checkpoint, whole_parameters
from evaluate import answer, grade, record, summarize
from records import read_questions, user_errors
from reinforce_pp import ALGORITHMS, Batch, Policy
from retriever import open_retriever
from reward import PROMPTS, REWARDS, TAGS, load_prompt
from rollout import ENGINES, Episode, Limits, Rollout, derive_seed, prompt_encoder

# ---------------------------------------------------------------------------------------------------------------------
# Configuration

MAX_GRAD_NORM = 1.0  # OpenRLHF's default, which the official scripts keep
ADAM_BETAS = (0.9, 0.95)  # likewise
MAX_BAD_STEPS = 3  # updates in a row with a gradient that is not finite before the run stops
MAX_SEARCH_FAILURES = 0.2  # share of a batch's queries that may fail before the run stops
SLOWEST = timedelta(hours=3)  # that a rank's rollout may take longer than another's; a rank that dies ends all at once


def option(default, text: str, choices=None):
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Config:
    """All that decides a run's numbers; the command line is derived from it. Presets hold the paper's values."""

    model: str = option("Qwen/Qwen2.5-7B", "Hugging Face folder or hub name")
    questions: str = option("data/stage_1.jsonl", "training questions (JSONL)")
    eval_questions: str = option("", "held-out questions (JSONL) for --eval_every")
    retriever: str = option("data/bm25", "passage file (JSONL), index folder, search server URL or web:PROVIDER")
    prompt_file: str = option("base", f"one of {', '.join(PROMPTS)}, or a text file with {{question}} in it")
    engine: str = option("vllm", "inference engine", list(ENGINES))
    seed: int = option(0, "of data order and sampling")
    steps: int = option(128, "rollout batches")
    prompts_per_step: int = option(64, "questions in a rollout batch (official scripts)")
    samples_per_prompt: int = option(16, "episodes per question (paper, section 3.3)")
    updates_per_rollout: int = option(4, "optimiser steps per rollout batch: 1024 episodes / 256 (official scripts)")
    reward: str = option("stage1", "reward function (reward.py)", list(REWARDS))
    algorithm: str = option("reinforce++", "advantage estimator (reinforce_pp.py)", ALGORITHMS)
    learning_rate: float = option(2e-6, "of AdamW, constant (paper, section 3.3)")
    kl_coef: float = option(0.0, "beta; above 0 a frozen reference model is loaded (0 for Qwen, 1e-4 for Llama)")
    kl_mode: str = option(
        "reward", "where the KL penalty goes: k1 in the reward, or k2 / k3 as a loss", ["reward", "k2", "k3"]
    )
    clip_eps: float = option(0.2, "clip range of the ratio")
    sampler_clip: float = option(2.0, "sampler correction within [1/c, c]; 0 switches it off")
    temperature: float = option(1.0, "of sampling, applied to the trainer's logits too (paper: 1)")
    max_searches: int = option(8, "queries answered per question (paper)")
    documents_per_search: int = option(3, "passages per query (official code)")
    max_turn_tokens: int = option(512, "sampled tokens between two stops (official code)")
    max_context: int = option(29_000, "prompt, policy and documents together, in tokens (official code)")
    micro_batch_tokens: int = option(32_768, "padded tokens of one forward and backward pass")
    gradient_checkpointing: bool = option(True, "recompute activations in the backward pass")
    cpu_offload: bool = option(False, "keep parameters and optimiser states in host memory")
    gpu_memory_utilization: float = option(0.5, "the engine's share of the GPU while it is awake")
    save_every: int = option(10, "rollout batches between checkpoints; 0 only at the end")
    eval_every: int = option(0, "rollout batches between evaluations on --eval_questions; 0 never")


_DEMO = (
    dict(model="demo/model", retriever="demo/passages.jsonl", questions="demo/train.jsonl", prompt_file="demo")
    | dict(temperature=0.7)  # a 135M model at 1.0 rarely completes a tag
    | dict(prompts_per_step=8, samples_per_prompt=8, updates_per_rollout=1, algorithm="grpo", learning_rate=2e-5)
    | dict(max_searches=3, documents_per_search=1, max_turn_tokens=48, max_context=768, micro_batch_tokens=2048)
    | dict(gradient_checkpointing=False, save_every=4)
)
_LLAMA = dict(model="meta-llama/Llama-3.1-8B-Instruct", prompt_file="chat", kl_coef=1e-4)
_STAGE_1 = dict(questions="data/stage_1.jsonl", reward="stage1", steps=6)  # one pass over 350 questions
_STAGE_2 = dict(questions="data/stage_2.jsonl", reward="stage2", steps=128, model="runs/stage1/model")  # one over 8,148
PRESETS: dict[str, dict[int, dict]] = {
    "qwen": {1: _STAGE_1, 2: _STAGE_2},
    "llama": {
        1: _LLAMA | _STAGE_1 | dict(prompts_per_step=15, steps=24),
        2: _LLAMA | _STAGE_2 | dict(prompts_per_step=65, steps=126),
    },
    "demo": {
        1: _DEMO | dict(reward="stage1", steps=8),
        2: _DEMO
        # not grpo: samples that agree on a wrong answer are to teach something too, or it answers every question alike
        | dict(reward="stage2", steps=24, model="demo/stage1/model", temperature=0.8, algorithm="reinforce++"),
    },
}


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, Config]:
    """The command line: `Config`'s fields over the preset's values, and what does not change a run's numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, choices=[1, 2], required=True, help="1 learns to search, 2 to answer with it")
    parser.add_argument("--preset", choices=list(PRESETS), default="qwen", help="whose values the options take by default")
    parser.add_argument("--out", type=Path, help="run folder (default runs/stage1 or 2; demo/... for the demo)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out, if there is one")
    parser.add_argument("--log", choices=["tensorboard", "wandb"], help="log there too, besides metrics.jsonl")
    for f in dataclasses.fields(Config):
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type)
        parser.add_argument(f"--{f.name}", default=None, help=f.metadata["help"], choices=f.metadata["choices"], **kind)
    args = parser.parse_args(argv)
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Config)}
    config = Config(**PRESETS[args.preset][args.stage] | {k: v for k, v in given.items() if v is not None})
    args.out = args.out or Path("demo" if args.preset == "demo" else "runs", f"stage{args.stage}")
    if args.preset != "demo" and not torch.cuda.is_available():
        raise ValueError(f"--preset {args.preset} trains a 7B model and needs NVIDIA GPUs; without one, try: make demo")
    check(config)
    return args, config


def check(c: Config) -> None:
    """Refuse what cannot work, before anything is loaded."""

    def refuse(impossible: bool, why: str) -> None:
        if impossible:
            raise ValueError(why)

    for f in dataclasses.fields(Config):
        if f.type is int and f.name != "seed":
            least = 0 if f.name in ("save_every", "eval_every") else 1
            refuse(getattr(c, f.name) < least, f"--{f.name} must be at least {least}")
    for name in ("learning_rate", "temperature", "clip_eps"):
        refuse(getattr(c, name) <= 0, f"--{name} must be above 0")
    refuse(c.kl_coef < 0, "--kl_coef must be at least 0")
    refuse(0 != c.sampler_clip < 1, "--sampler_clip must be 0 (off) or at least 1")
    lonely = c.samples_per_prompt == 1 and c.algorithm != "reinforce++"
    refuse(lonely, f"--algorithm {c.algorithm} compares the samples of a prompt: --samples_per_prompt must be at least 2")
    refuse(c.updates_per_rollout > c.prompts_per_step, "--updates_per_rollout must be at most --prompts_per_step")
    refuse(c.eval_every > 0 and not c.eval_questions, "--eval_every needs --eval_questions")
    is_path = c.model.startswith((".", "/")) or c.model.count("/") != 1 or Path(c.model).parent.is_dir()
    refuse(is_path and not Path(c.model, "config.json").is_file(), f"--model {c.model}: no such model folder")


# ---------------------------------------------------------------------------------------------------------------------
# The model, sharded


def start_distributed() -> torch.device:
    """Join the process group that torchrun describes, or make one of a single process."""
    on_gpu = torch.cuda.is_available()
    if not dist.is_initialized():
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        for name, value in alone.items():
            os.environ.setdefault(name, value)
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        else:
            for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
                os.environ.setdefault(cache, "64")  # kernels, one a shape; the default of 1,024 keeps 0.9 GiB of past ones
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=SLOWEST)
    return torch.device("cuda" if on_gpu else "cpu")


def load_policy(config: Config, device: torch.device, frozen: bool = False) -> Policy:
    """The model of `config`, sharded: fp32 parameters, bf16 if frozen."""
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if frozen else torch.float32
    lm = AutoModelForCausalLM.from_pretrained(config.model, dtype=dtype, use_safetensors=True)  # never a pickle
    rescaling = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")
    head_bias = getattr(lm.get_output_embeddings(), "bias", None)
    if head_bias is not None or any(getattr(lm.config, name, None) for name in rescaling):
        raise ValueError(f"--model {config.model}: its head is not a plain linear map; such models are not supported")
    if "sliding_attention" in (getattr(lm.config, "layer_types", None) or ()):
        raise ValueError(f"--model {config.model}: sliding-window attention is not supported")
    return shard(lm, config, device, frozen)


def shard(lm: nn.Module, config: Config, device: torch.device, frozen: bool = False) -> Policy:
    """The model in FSDP2: bf16 compute, fp32 reduction, each decoder layer a unit."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    if config.gradient_checkpointing and not frozen:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = Policy(lm).train(not frozen).requires_grad_(not frozen)
    settings = dict(
        mesh=init_device_mesh(device.type, (dist.get_world_size(),)),
        mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
        offload_policy=CPUOffloadPolicy() if config.cpu_offload else OffloadPolicy(),
    )
    for layer in lm.base_model.layers:
        fully_shard(layer, **settings)
    # embeddings and head, which belong to no layer, would by default stay whole until a backward pass: 2 GB for 7B
    return fully_shard(policy, **settings, reshard_after_forward=True)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: safetensors shards of every rank (no pickle), readable by any number of ranks


# ---------------------------------------------------------------------------------------------------------------------
# One iteration: roll out, judge, plan, update


def questions_of_step(questions: list[dict], step: int, count: int, seed: int) -> list[dict]:
    """The step's questions: `count` in a row from an endless sequence of shuffled passes over all of them."""
    chosen, places = [], range(step * count, (step + 1) * count)
    for epoch, positions in groupby(places, key=lambda position: position // len(questions)):
        order = list(questions)
        random.Random(derive_seed(seed, epoch)).shuffle(order)
        chosen += [order[position % len(questions)] for position in positions]
    return chosen


def gather(mine: list) -> list[list]:
    """The lists of all ranks, by rank."""
    shares: list[list] = [[]] * dist.get_world_size()
    dist.all_gather_object(shares, mine)
    return shares


def roll_out(rollout: Rollout, encode: Callable, questions: list[dict], config: Config, step: int) -> list[Episode]:
    """Judged episodes of all ranks, `samples_per_prompt` in a row for each question, in the questions' order."""
    rank, world, samples = dist.get_rank(), dist.get_world_size(), config.samples_per_prompt
    mine = [
        Episode(question, encode(question["question"]), seed=derive_seed(config.seed, step, number, sample))
        for number, question in enumerate(questions)
        if number % world == rank
        for sample in range(samples)
    ]
    for _ in tqdm(rollout.run(mine), "rollout", len(mine), unit="episode", leave=False, disable=rank > 0):
        pass
    for episode in mine:
        grade(episode, config.reward)
    shares = gather(mine)
    groups = [(number % world, number // world * samples) for number in range(len(questions))]
    return [episode for rank, start in groups for episode in shares[rank][start : start + samples]]


def optimize(
    batch: Batch, policy: nn.Module, reference: nn.Module | None, optimizer: torch.optim.Optimizer, bad_in_a_row: int = 0
) -> dict[str, float]:
    """`updates_per_rollout` optimiser steps on one rollout batch; the metrics, alike on every rank.

    A gradient that is not finite skips its update on all ranks alike and is counted. After MAX_BAD_STEPS in a row, with the
    `bad_in_a_row` just before, no further update is tried.
    """
    batch.prepare(policy, reference)
    groups, samples = batch.rewards.shape
    metrics = Counter(updates=0, bad_updates=0, bad_in_a_row=bad_in_a_row, grad_norm=0.0)
    totals = torch.zeros(4, device=batch.device)
    for update in range(batch.config.updates_per_rollout):
        members = range(update, groups, batch.config.updates_per_rollout)  # the order of the batch is random already
        chosen = [group * samples + sample for group in members for sample in range(samples)]
        if metrics["bad_in_a_row"] == MAX_BAD_STEPS or not any(batch.teaches[i] for i in chosen):
            continue
        totals += batch.backward(policy, chosen)
        grad_norm = nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM).full_tensor().item()
        if math.isfinite(grad_norm):
            optimizer.step()
            metrics.update(updates=1, grad_norm=grad_norm, bad_in_a_row=-metrics["bad_in_a_row"])
        else:
            metrics.update(bad_updates=1, bad_in_a_row=1)
        optimizer.zero_grad(set_to_none=True)
    dist.all_reduce(totals)
    clipped, gap, kl, _ = (totals / totals[3:].clamp(min=1)).tolist()
    metrics["grad_norm"] /= max(metrics["updates"], 1)
    return dict(metrics) | {"clip_frac": clipped, "sampler_gap": gap, "kl": kl, "trained_tokens": int(totals[3])}


# ---------------------------------------------------------------------------------------------------------------------
# The run


class Trainer:
    """The models, the engine and the optimiser of a run, and one iteration over them."""

    def __init__(self, config: Config, device: torch.device):
        from transformers import AutoTokenizer

        self.config, self.device = config, device
        self.questions = read_questions(config.questions)
        self.eval_questions = read_questions(config.eval_questions) if config.eval_every else []
        search = open_retriever(config.retriever).search
        tokenizer = AutoTokenizer.from_pretrained(config.model)
        self.encode = prompt_encoder(tokenizer, load_prompt(config.prompt_file))
        self.engine = ENGINES[config.engine](config.model, config.max_context, config.gpu_memory_utilization)
        self.engine.sleep()
        self.policy = load_policy(config, device)
        self.reference = load_policy(config, device, frozen=True) if config.kl_coef > 0 else None
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(), lr=config.learning_rate, betas=ADAM_BETAS, weight_decay=0.0, fused=True
        )
        limits = Limits(**{name: value for name, value in vars(config).items() if name in Limits.__dataclass_fields__})
        repeatable = device.type == "cpu"  # bit for bit; on a GPU decoding goes on while the retriever works
        self.sampling = Rollout(self.engine, tokenizer, search, TAGS, limits, repeatable)
        self.greedy = Rollout(self.engine, tokenizer, search, TAGS, dataclasses.replace(limits, temperature=0.0), repeatable)

    def iterate(self, progress: dict[str, int]) -> tuple[dict[str, float], list[Episode]]:
        """Sync, roll out, judge, update; the next step's metrics and episodes, alike on every rank."""
        config, step, seconds = self.config, progress["step"], {}

        def timed(phase: str, work: Callable, *arguments):
            start = time.perf_counter()
            result = work(*arguments)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[f"seconds_{phase}"] = time.perf_counter() - start
            return result

        timed("sync", self.sync)
        chosen = questions_of_step(self.questions, step, config.prompts_per_step, config.seed)
        episodes = timed("rollout", roll_out, self.sampling, self.encode, chosen, config, step)
        metrics = {"step": step + 1} | summarize([record(episode) for episode in episodes])
        if metrics["search_failures"] > MAX_SEARCH_FAILURES:
            reasons = [reason for share in gather([self.sampling.search_error]) for reason in share if reason]
            raise RuntimeError(f"{metrics['search_failures']:.0%} of the searches failed: {reasons[0]}")
        if config.eval_every and step % config.eval_every == 0:
            metrics |= timed("eval", self.evaluate)
        self.engine.sleep()
        batch = Batch(episodes, config, self.device, dist.get_rank(), dist.get_world_size(), dist.all_reduce)
        bad_in_a_row = progress["bad_in_a_row"]
        metrics |= timed("train", optimize, batch, self.policy, self.reference, self.optimizer, bad_in_a_row)
        sampled = int(batch.action_mask.sum())
        metrics["rollout_tokens_per_second"] = sampled / seconds["seconds_rollout"]
        metrics["train_tokens_per_second"] = metrics["trained_tokens"] / seconds["seconds_train"]
        return metrics | {"peak_memory_gib": peak_memory_gib()} | seconds, episodes

    def sync(self) -> None:
        give_back(self.device)
        self.engine.wake_up()
        self.engine.load_weights(whole_parameters(self.policy))

    def evaluate(self) -> dict[str, float]:
        """Greedy answers to the held-out questions, this rank's share each."""
        rank, world = dist.get_rank(), dist.get_world_size()
        mine = self.eval_questions[rank::world]
        records = gather(list(answer(self.greedy, self.encode, mine, reward=self.config.reward)))
        return {f"eval_{name}": value for name, value in summarize([r for share in records for r in share]).items()}


def train(config: Config, out: Path, resume: bool, log: str | None) -> None:
    """Run `config.steps` iterations, or what is left of them, and export the model to `out`/model."""
    device = start_distributed()
    run = RunFolder(out, config, log)
    with run.held(resume):
        path, progress, exported = run.progress(resume)
        start = progress["step"]
        if start > config.steps:
            raise ValueError(f"{out}: the run is at step {start}, past --steps {config.steps}; give another --out")
        if start == config.steps and exported:
            run.say(f"{out}: finished at step {start}; the model is {out / 'model'}")
            return
        trainer = Trainer(config, device)
        if path is not None:
            load_checkpoint(path, trainer.policy, trainer.optimizer, progress)
        run.begin(start)
        for step in tqdm(range(start, config.steps), "steps", config.steps, initial=start, disable=not run.writes):
            metrics, episodes = trainer.iterate(progress)
            run.log(metrics)
            first_group = episodes[: config.samples_per_prompt]
            run.append("trajectories.jsonl", [{"step": step + 1} | dataclasses.asdict(e) for e in first_group])
            shown = ("reward", "search_rate", "format_rate", "f1", "grad_norm")
            run.say(f"step {step + 1:4d}  " + "  ".join(f"{name} {metrics[name]:.3f}" for name in shown))
            if (bad := metrics["bad_in_a_row"]) == MAX_BAD_STEPS:
                raise RuntimeError(f"step {step + 1}: {bad} updates in a row had a gradient that is not finite")
            progress = {"step": step + 1, "updates": progress["updates"] + metrics["updates"], "bad_in_a_row": bad}
            if step + 1 == config.steps or (config.save_every and (step + 1) % config.save_every == 0):
                save_checkpoint(out / "checkpoints", trainer.policy, trainer.optimizer, progress)
        export(trainer.policy, config.model, out / "model", config.steps)
    run.say(f"model: {out / 'model'}\nmetrics: {out / 'metrics.jsonl'}")


def give_back(device: torch.device) -> None:
    """Return what training freed: to the GPU, whose memory the engine takes next, or to the system.

    On a CPU glibc keeps freed memory as long as anything lies above it, and a run would grow from step to step.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        getattr(ctypes.CDLL(None), "malloc_trim", lambda keep: None)(0)  # glibc's alone


def peak_memory_gib() -> float:
    """Of the GPU since the start, or of the process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(argv: list[str] | None = None) -> None:
    with user_errors("train.py"):
        args, config = parse_arguments(argv)
        train(config, args.out, args.resume, args.log)


def end(error: BaseException) -> None:
    """End this process as the error says and at once: sys.exit would wait for collectives that the others are not in."""
    if isinstance(error, SystemExit) and not error.code:
        raise error
    try:
        if not isinstance(error, SystemExit):
            traceback.print_exception(error)
        sys.stdout.flush()
    finally:  # also where nothing can be written any more
        os._exit(2 if isinstance(error, SystemExit) else 1)


if __name__ == "__main__":
    try:
        main()
    except BaseException as error:
        end(error)
