"""Train a language model to search, then to solve with search: R1-Searcher's two stages.

    python train.py --preset demo --stage 1             one process, a CPU is enough
    torchrun --nproc-per-node 8 train.py --stage 2      a node of 8 GPUs, the paper's Qwen recipe

The functions `train` and `iterate` at the end of this file are the loop. It departs from the
textbook in four points:
1. Every rank holds an inference engine beside its shard of the model, and rolls out its share of
   the questions.
2. Episodes are small (ids, masks, numbers), so every rank gathers all of them. Advantages, the plan
   of micro-batches and the metrics are computed from the whole batch, identical on every rank, and
   a run on 1 or on N ranks trains on the same questions with the same seeds.
3. Short sequences that begin alike compute this beginning once, and without a reference model an
   episode of advantage 0 is left out. Both are exact: the gradient is the same.
4. Every random draw derives from the seed and its place: epoch, step, question, sample, turn. A
   checkpoint stores the step, and needs no data position and no state of random generators.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

import signals
from checkpoint import (
    Progress,
    create_moments,
    export,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from config import Config, parse_arguments, require_gpu
from metrics import episode_record, summarize
from packing import pack, plan_micro_batches
from policy import (
    Policy,
    end_process,
    load_policy,
    peak_memory_gib,
    refuse_unsupported,
    share_cores,
    start_distributed,
    timed,
)
from records import user_errors
from reinforce_pp import estimate_advantages, kl_estimate, policy_loss, sequence_ratio
from reward import score_episode
from rollout import Episode
from run_folder import RunFolder, run_settings
from sampler import Sampler

MAX_GRAD_NORM = 1.0  # OpenRLHF's default, which the official scripts keep
ADAM_BETAS = (0.9, 0.95)  # OpenRLHF's default, which the official scripts keep
MAX_CONSECUTIVE_SKIPPED = 3  # updates with a gradient that is not finite, after which the run stops
MASKED_FINISH_REASONS = ("length", "bad_query")  # those that --mask_truncated leaves out

# --------------------------------------------------------------------------------------------------
# The rollout batch


@dataclass
class Batch:
    """The episodes of all ranks as tensors, identical on every rank.

    Shapes: B episodes, `samples` in a row of the same question; T tokens of the longest one.
    """

    episodes: list[Episode]
    rewards: Tensor  # (groups, samples), fp64
    action_mask: Tensor  # (B, T) bool
    loss_mask: Tensor  # (B, T) bool: action_mask without the episodes that a switch leaves out
    sampler_log_probs: Tensor  # (B, T)
    old_log_probs: Tensor  # (B, T)
    on_policy: bool = True  # pi_old is the policy being trained; `backward` notes its log-probs
    ref_log_probs: Tensor | None = None  # (B, T); None without a reference model
    kl: Tensor | None = None  # (B, T), k1; None without a reference model
    advantages: Tensor | None = None  # (B, T)
    with_gradient: list[int] | None = None  # indices of the episodes that add to the gradient

    def with_loss(self) -> list[int]:
        """Indices of the episodes that have a token in `loss_mask`."""
        return self.loss_mask.any(1).nonzero().flatten().tolist()


def make_batch(episodes: list[Episode], samples: int, device: torch.device) -> Batch:
    """Tensors of scored episodes, right-padded with 0."""
    length = max(len(e.token_ids) for e in episodes)

    def pad(rows: list[list], dtype: torch.dtype) -> Tensor:
        padded = torch.zeros(len(rows), length, dtype=dtype)
        for number, row in enumerate(rows):
            padded[number, : len(row)] = torch.tensor(row, dtype=dtype)
        return padded.to(device)

    rewards = [e.rewards["reward"] for e in episodes]
    action_mask = pad([e.action_mask for e in episodes], torch.bool)
    sampler_log_probs = pad([e.log_probs for e in episodes], torch.float32)
    return Batch(
        episodes,
        rewards=torch.tensor(rewards, dtype=torch.float64, device=device).view(-1, samples),
        action_mask=action_mask,
        loss_mask=action_mask.clone(),
        sampler_log_probs=sampler_log_probs,
        old_log_probs=torch.zeros_like(sampler_log_probs),
    )


# --------------------------------------------------------------------------------------------------
# Updating the policy


def learning_rate(config: Config, updates: int) -> float:
    """Learning rate of the update that follows `updates` of them: it rises during the warm-up."""
    return config.learning_rate * min(1.0, (updates + 1) / max(1, config.warmup))


class Trainer:
    """The policy, its optimiser and the frozen reference: everything that learns.

    Args:
        policy: trained in place.
        reference: for the KL penalty, None without.
    """

    def __init__(self, config: Config, policy: Policy, reference: Policy | None = None):
        self.config, self.policy, self.reference = config, policy, reference
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.optimizer = torch.optim.AdamW(  # `step` sets the learning rate
            policy.parameters(), betas=ADAM_BETAS, weight_decay=0.0, fused=True
        )

    def plan(self, batch: Batch, chosen: list[int]) -> list[list[list[int]]]:
        """This rank's micro-batches of the chosen episodes, as many as any other rank has."""
        sequences = {i: batch.episodes[i].token_ids for i in chosen}
        budget = self.config.micro_batch_tokens
        return plan_micro_batches(sequences, budget, self.world)[self.rank :: self.world]

    def forward(
        self, model: Policy, batch: Batch, rows: list[list[int]]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(N,) log-probabilities of a micro-batch's action tokens, and their index into (B, T)."""
        sequences = []
        for row in rows:
            members = [batch.episodes[i] for i in row]
            sequences.append([(e.token_ids, e.action_mask) for e in members])
        no_action = [[([0], [0])]]  # one token, no action: its gradient is 0
        with self.device:  # where `pack` makes its tensors
            inputs = pack(sequences or no_action)
        log_probs = model(**inputs, temperature=self.config.temperature)
        order = [i for row in rows for i in row]
        episodes = torch.tensor(order, dtype=torch.long, device=self.device)
        # `pack` lists action tokens sequence by sequence, and so does `nonzero`.
        number, token = batch.action_mask[episodes].nonzero(as_tuple=True)
        return log_probs, (episodes[number], token)

    @torch.no_grad()
    def log_probs(self, model: Policy, batch: Batch, chosen: list[int]) -> Tensor:
        """(B, T) of the chosen episodes' action tokens, 0 elsewhere, identical on every rank."""
        result = torch.zeros_like(batch.sampler_log_probs)
        for rows in self.plan(batch, chosen):
            log_probs, index = self.forward(model, batch, rows)
            result[index] = log_probs
        dist.all_reduce(result)
        return result

    def compute_advantages(self, batch: Batch) -> dict[str, float]:
        """Fill in the advantages, and the log-probabilities that they and the loss need.

        With one update per rollout, no reference model and no `sampler_mask`, pi_old is the very
        policy that is being trained, so that no extra forward pass is needed.

        Returns:
            signals of the batch, identical on every rank.
        """
        config = self.config
        metrics = {}
        if config.mask_truncated:
            masked = [e.finish_reason in MASKED_FINISH_REASONS for e in batch.episodes]
            batch.loss_mask[masked] = False
        if self.reference is not None or config.sampler_mask:
            batch.on_policy = False
            batch.old_log_probs = self.log_probs(self.policy, batch, batch.with_loss())
        if config.sampler_mask:
            ratio = sequence_ratio(batch.old_log_probs, batch.sampler_log_probs, batch.loss_mask)
            is_near = (ratio >= 1 / config.sampler_mask) & (ratio <= config.sampler_mask)
            is_far = ~is_near  # also where the ratio is not a number
            batch.loss_mask[is_far] = False
            metrics["sampler_mask_frac"] = is_far.double().mean().item()
        if self.reference is not None:
            batch.ref_log_probs = self.log_probs(self.reference, batch, batch.with_loss())
            batch.kl = kl_estimate(batch.old_log_probs, batch.ref_log_probs, "k1")
        kl_in_reward = batch.kl if config.kl_mode == "reward" else None
        batch.advantages = estimate_advantages(
            config.algorithm, batch.rewards, batch.loss_mask, kl_in_reward, config.kl_coef
        )
        needed = batch.loss_mask if self.reference is not None else batch.advantages != 0
        batch.with_gradient = needed.any(1).nonzero().flatten().tolist()
        if batch.on_policy and config.updates_per_rollout > 1:
            batch.on_policy = False
            batch.old_log_probs = self.log_probs(self.policy, batch, batch.with_gradient)
        return metrics | signals.of_advantages(batch.rewards, batch.advantages, batch.loss_mask)

    def backward(self, batch: Batch, chosen: list[int], action_tokens: Tensor) -> Tensor:
        """Accumulate the gradient of Eq. 8 over the chosen episodes, those of an optimiser step.

        Returns:
            number of this rank's tokens where the clip decided.
        """
        config, all_clipped = self.config, torch.zeros((), device=self.device)
        plan = self.plan(batch, chosen)
        progress_bar = tqdm(plan, "train", unit="micro-batch", leave=False, disable=self.rank > 0)
        for number, rows in enumerate(progress_bar, start=1):
            self.policy.begin_micro_batch(is_last=number == len(plan))
            log_probs, index = self.forward(self.policy, batch, rows)
            if batch.on_policy:
                batch.old_log_probs[index] = log_probs.detach()
            loss, clipped = policy_loss(
                log_probs,
                batch.old_log_probs[index],
                batch.advantages[index],
                config.clip_eps,
                config.clip_eps_high or config.clip_eps,
                batch.sampler_log_probs[index] if config.sampler_clip else None,
                config.sampler_clip,
            )
            if batch.kl is not None and config.kl_mode != "reward":
                estimate = kl_estimate(log_probs, batch.ref_log_probs[index], config.kl_mode)
                loss = loss + config.kl_coef * estimate
            # FSDP averages gradients over the ranks, and Eq. 8 is a sum over all of them.
            (loss.sum() / action_tokens * self.world).backward()
            all_clipped += clipped.sum()
        return all_clipped

    def update(self, batch: Batch, progress: Progress) -> dict[str, float]:
        """`updates_per_rollout` optimiser steps on one batch; metrics, identical on every rank.

        A gradient that is not finite skips its update on all ranks and is counted. After
        MAX_CONSECUTIVE_SKIPPED in a row no further update is tried.
        """
        config, (groups, samples) = self.config, batch.rewards.shape
        parts = config.updates_per_rollout
        updates = skipped = 0
        consecutive_skipped = progress.consecutive_skipped
        grad_norms = 0.0
        clipped = torch.zeros((), device=self.device)
        is_trained = torch.zeros_like(batch.loss_mask)
        for number in range(parts):
            if consecutive_skipped == MAX_CONSECUTIVE_SKIPPED:
                break
            # Every n-th group: the order of the batch is random already.
            chosen = [i for i in batch.with_gradient if i // samples % parts == number]
            if not chosen:
                continue
            # On all ranks, and with the tokens of episodes that add nothing to the gradient.
            action_tokens = batch.loss_mask.view(groups, -1)[number::parts].sum()
            clipped_now = self.backward(batch, chosen, action_tokens)
            grad_norm = self.step(learning_rate(config, progress.updates + updates))
            if math.isfinite(grad_norm):
                clipped += clipped_now
                is_trained[chosen] = batch.loss_mask[chosen]
                grad_norms += grad_norm
                updates += 1
                consecutive_skipped = 0
            else:
                skipped += 1
                consecutive_skipped += 1
        dist.all_reduce(clipped)
        if batch.on_policy:
            dist.all_reduce(batch.old_log_probs)
        metrics = {
            "updates": updates,
            "skipped_updates": skipped,
            "consecutive_skipped": consecutive_skipped,
            "trained_tokens": int(is_trained.sum()),
        }
        if updates:
            metrics["grad_norm"] = grad_norms / updates
            metrics["clip_frac"] = clipped.item() / metrics["trained_tokens"]
            if batch.kl is not None:
                metrics["kl"] = batch.kl[is_trained].mean().item()
            log_ratio = (batch.old_log_probs - batch.sampler_log_probs)[is_trained]
            metrics |= signals.of_sampler(log_ratio, config.sampler_clip)
        return metrics

    def step(self, learning_rate: float) -> float:
        """An optimiser step; the gradient's norm. One that is not finite changes no parameter."""
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), MAX_GRAD_NORM)
        norm = norm.full_tensor().item()
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def largest_sampler_gap(self, batch: Batch) -> float:
        """Mean abs(log pi - log pi_sampler) of an episode, the largest of one of each rank."""
        samples = self.config.samples_per_prompt
        chosen = list(range(0, len(batch.episodes), samples))[: self.world]
        log_ratio = self.log_probs(self.policy, batch, chosen) - batch.sampler_log_probs
        tokens = batch.action_mask[chosen].sum(1).clamp(min=1)
        return (log_ratio[chosen].abs().sum(1) / tokens).max().item()

    def log_prob_right(self, probe: list[dict]) -> dict[str, float]:
        """Mean log-probability a token of the probe under the policy, once the probe is whole."""
        if len(probe) < signals.PROBE_SIZE:
            return {}
        episodes = [Episode({}, [], **sequence, rewards={"reward": 0.0}) for sequence in probe]
        batch = make_batch(episodes, 1, self.device)
        log_probs = self.log_probs(self.policy, batch, batch.with_loss())
        return {"log_prob_right": log_probs[batch.action_mask].mean().item()}


# --------------------------------------------------------------------------------------------------
# The loop


def train(config: Config, out: Path, resume: bool = False, logger: str | None = None) -> None:
    """Run `config.steps` iterations, or what is left of them; export the model to `out`/model."""
    start_distributed()
    settings = run_settings(config) if dist.get_rank() == 0 else dataclasses.asdict(config)
    run = RunFolder(out, settings, logger)
    with run.lock(resume):
        checkpoint, progress, finished = run.find_progress(resume)
        if finished:
            run.print_rank0(f"{out}: finished at step {progress.step}; see {out / 'model'}")
            return
        refuse_unsupported(config.model, config.max_context)
        sampler = Sampler(config)  # the engine first: it takes what it needs of an empty GPU
        share_cores()
        policy = load_policy(config.model, config.gradient_checkpointing, config.cpu_offload)
        reference = None
        if config.kl_coef > 0:
            reference = load_policy(config.model, cpu_offload=config.cpu_offload, frozen=True)
        trainer = Trainer(config, policy, reference)
        create_moments(trainer.optimizer, progress.updates)
        if checkpoint is not None:
            load_checkpoint(checkpoint, policy, trainer.optimizer)
        run.begin(progress.step)
        left = range(progress.step, config.steps)
        for _ in tqdm(left, "steps", config.steps, initial=progress.step, disable=trainer.rank > 0):
            collapse = run.find_collapse(progress)
            if collapse:
                run.print_rank0(f"stopped: {collapse}; use {out / 'model-best'}")
                break
            progress = iterate(sampler, trainer, run, progress)
        export_models(trainer, run, progress)


def export_models(trainer: Trainer, run: RunFolder, progress: Progress) -> None:
    """Export the model of the last step, and the one with the best evaluation."""
    for name, step in run.models(progress).items():
        if step != progress.step:
            checkpoint, _ = newest_checkpoint(run.path / "checkpoints", step)
            if checkpoint is None:
                run.print_rank0(f"the best checkpoint, of step {step}, is lost: no {name}")
                continue
            load_checkpoint(checkpoint, trainer.policy)
        out = run.path / name
        export(trainer.policy, trainer.config.model, out, step)
        run.print_rank0(f"{name}: {out}, of step {step}")
    run.print_rank0(f"metrics: {run.path / 'metrics.jsonl'}")


def iterate(sampler: Sampler, trainer: Trainer, run: RunFolder, progress: Progress) -> Progress:
    """The iteration after `progress`; returns the progress after it."""
    config, step = trainer.config, progress.step + 1
    metrics: dict[str, float] = {"step": step}

    # Hand the policy's weights to the engine.
    with timed(metrics, "sync"):
        sampler.sync_weights(trainer.policy)

    # Roll out: questions times samples, with searches in them.
    with timed(metrics, "rollout"):
        episodes = sampler.roll_out(progress.step)

    # Score what the policy wrote.
    for e in episodes:
        e.rewards = score_episode(e.segments, e.answered, e.question["answers"], config.reward)
    records = [episode_record(e) for e in episodes]
    metrics |= summarize(records) | signals.of_episodes(episodes)
    sampler.stop_if_searches_fail(records)

    # Advantages from rewards (Eqs. 1 to 5), then optimiser steps (Eqs. 6 to 8).
    with timed(metrics, "train"):
        batch = make_batch(episodes, config.samples_per_prompt, trainer.device)
        sampler.stop_if_engine_differs(trainer.largest_sampler_gap(batch))
        metrics |= trainer.compute_advantages(batch)
        metrics |= trainer.update(batch, progress)
    metrics["peak_memory_gib"] = peak_memory_gib()

    # Evaluate the policy that the updates have made.
    probe = signals.extend_probe(progress.probe, episodes)
    is_evaluated = config.eval_every and step % config.eval_every == 0
    if is_evaluated:
        with timed(metrics, "eval"):
            metrics |= sampler.evaluate(trainer.policy)
            metrics |= trainer.log_prob_right(probe)
    progress = progress.after_step(metrics, probe)

    # Log.
    metrics["rollout_tokens_per_second"] = int(batch.action_mask.sum()) / metrics["seconds_rollout"]
    metrics["train_tokens_per_second"] = metrics["trained_tokens"] / metrics["seconds_train"]
    run.log(metrics, episodes[: config.samples_per_prompt])

    # Checkpoint, unless the run has to stop.
    if progress.consecutive_skipped == MAX_CONSECUTIVE_SKIPPED:
        reason = f"{MAX_CONSECUTIVE_SKIPPED} updates in a row had no finite gradient"
        raise RuntimeError(f"step {step}: {reason}; give another --out a lower --learning_rate")
    is_due = config.save_every and step % config.save_every == 0
    if step == config.steps or is_due or is_evaluated:
        save_checkpoint(run.path / "checkpoints", trainer.policy, trainer.optimizer, progress)
    return progress


def main(argv: list[str] | None = None) -> None:
    with user_errors("train.py"):
        arguments = parse_arguments(argv, __doc__)
        require_gpu(arguments.preset)
        train(arguments.config, arguments.out_folder, arguments.resume, arguments.log)


if __name__ == "__main__":
    try:
        main()
    except BaseException as error:
        end_process(error)
    end_process()
