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
3. Sequences that begin alike compute their common prefix once, and an episode whose advantage is 0
   on every token is not computed at all. Both are exact: the gradient is the same.
4. Every random draw derives from the seed and its place: epoch, step, question, sample, turn. A
   checkpoint stores the step, and needs no data position and no state of random generators.
"""

import dataclasses
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import Progress, RunFolder, export, load_checkpoint, save_checkpoint
from config import Config, parse_arguments
from inference import answer_questions, describe_inputs, open_rollout
from metrics import episode_record, summarize
from policy import (
    Policy,
    abort_process,
    gather,
    load_policy,
    peak_memory_gib,
    refuse_unsupported,
    release_memory,
    start_distributed,
    timed,
    whole_parameters,
)
from records import fingerprint, read_questions, user_errors
from reinforce_pp import estimate_advantages, kl_estimate, pack, plan_micro_batches, policy_loss
from reward import score_episode
from rollout import Episode, derive_seed

MAX_GRAD_NORM = 1.0  # OpenRLHF's default, which the official scripts keep
ADAM_BETAS = (0.9, 0.95)  # OpenRLHF's default, which the official scripts keep
MAX_CONSECUTIVE_SKIPPED = 3  # updates with a gradient that is not finite, after which the run stops
MAX_SEARCH_FAILURES = 0.2  # share of a step's queries that may fail; with more the run stops
MIN_SEARCHES = 20  # queries of which the share is taken: those of earlier steps count if need be

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
    sampler_log_probs: Tensor  # (B, T)
    old_log_probs: Tensor | None = None  # (B, T); None: pi_old is the policy being trained
    ref_log_probs: Tensor | None = None  # (B, T); None without a reference model
    kl: Tensor | None = None  # (B, T), k1; None without a reference model
    advantages: Tensor | None = None  # (B, T)
    has_gradient: list[bool] | None = None  # (B,): false for episodes without any gradient


def make_batch(episodes: list[Episode], samples: int, device: torch.device) -> Batch:
    """Tensors of scored episodes, right-padded with 0."""
    length = max(len(e.token_ids) for e in episodes)

    def pad(rows: list[list], dtype: torch.dtype) -> Tensor:
        padded = [row + [0] * (length - len(row)) for row in rows]
        return torch.tensor(padded, dtype=dtype, device=device)

    rewards = [e.rewards["reward"] for e in episodes]
    return Batch(
        episodes,
        rewards=torch.tensor(rewards, dtype=torch.float64, device=device).view(-1, samples),
        action_mask=pad([e.action_mask for e in episodes], torch.bool),
        sampler_log_probs=pad([e.log_probs for e in episodes], torch.float32),
    )


def questions_of_step(questions: list[dict], step: int, count: int, seed: int) -> list[dict]:
    """`count` questions in a row from an endless sequence of shuffled passes over all of them."""
    chosen, order = [], []
    for position in range(step * count, (step + 1) * count):
        epoch, place = divmod(position, len(questions))
        if not order or place == 0:
            order = list(questions)
            random.Random(derive_seed(seed, epoch)).shuffle(order)
        chosen.append(order[place])
    return chosen


class Sampler:
    """The questions, the engine and the search of a run: everything that rolls out."""

    def __init__(self, config: Config):
        self.config = config
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.questions = read_questions(config.questions)
        self.eval_questions = read_questions(config.eval_questions) if config.eval_every else []
        self.rollout, self.encode = open_rollout(config)
        self.failed_searches: list[bool] = []  # of the last queries, whether each one failed
        self.engine = self.rollout.engine
        self.engine.sleep()

    def sync_weights(self, policy: Policy) -> None:
        """Wake the engine with the policy's present weights."""
        release_memory()
        self.engine.wake_up()
        self.engine.load_weights(whole_parameters(policy))

    def roll_out(self, step: int) -> list[Episode]:
        """The step's episodes of all ranks, `samples_per_prompt` in a row for each question."""
        config, samples = self.config, self.config.samples_per_prompt
        questions = questions_of_step(self.questions, step, config.prompts_per_step, config.seed)
        mine = []
        for number in range(self.rank, len(questions), self.world):
            prompt_ids = self.encode(questions[number]["question"])
            for sample in range(samples):
                seed = derive_seed(config.seed, step, number, sample)
                mine.append(Episode(questions[number], prompt_ids, seed))
        finished = self.rollout.run(mine)
        quiet = self.rank > 0
        for _ in tqdm(finished, "rollout", len(mine), unit="episode", leave=False, disable=quiet):
            pass  # `mine` holds the episodes, in order
        shares = gather(mine)
        episodes = []
        for number in range(len(questions)):
            start = number // self.world * samples
            episodes += shares[number % self.world][start : start + samples]
        return episodes

    def stop_if_searches_fail(self, episodes: list[Episode]) -> None:
        """Raises RuntimeError with the retriever's message if too many queries failed."""
        recent = self.failed_searches
        for e in episodes:
            recent += [True] * e.search_failures + [False] * e.answered
        considered = max(sum(len(e.queries) for e in episodes), MIN_SEARCHES)
        del recent[:-considered]
        if sum(recent) > MAX_SEARCH_FAILURES * considered:
            errors = [error for [error] in gather([self.rollout.search_error]) if error]
            raise RuntimeError(f"{sum(recent)} of {len(recent)} searches failed: {errors[0]}")

    def evaluate(self) -> dict[str, float]:
        """Metrics of greedy answers to the held-out questions, each rank's share of them."""
        sampling = self.rollout.limits
        mine = self.eval_questions[self.rank :: self.world]
        reward = self.config.reward
        self.rollout.limits = dataclasses.replace(sampling, temperature=0.0)
        try:
            answered = list(answer_questions(self.rollout, self.encode, mine, reward=reward))
        finally:
            self.rollout.limits = sampling
        records = [record for share in gather(answered) for record in share]
        return {f"eval_{name}": value for name, value in summarize(records).items()}


# --------------------------------------------------------------------------------------------------
# Updating the policy


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
        self.optimizer = torch.optim.AdamW(
            policy.parameters(),
            lr=config.learning_rate,
            betas=ADAM_BETAS,
            weight_decay=0.0,
            fused=True,
        )

    def plan(self, batch: Batch, chosen: list[int]) -> list[list[list[int]]]:
        """This rank's micro-batches of the chosen episodes.

        All ranks get the same number of micro-batches: short lists are filled up with empty ones,
        so that collectives cannot hang.
        """
        sequences = {i: batch.episodes[i].token_ids for i in chosen}
        micro_batches = plan_micro_batches(sequences, self.config.micro_batch_tokens)
        missing = -len(micro_batches) % self.world
        micro_batches += [[] for _ in range(missing)]
        return micro_batches[self.rank :: self.world]

    def forward(
        self, model: Policy, batch: Batch, rows: list[list[int]]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(N,) log-probabilities of a micro-batch's action tokens, and their index into (B, T)."""
        sequences = []
        for row in rows:
            members = [batch.episodes[i] for i in row]
            sequences.append([(e.token_ids, e.action_mask) for e in members])
        no_action = [[([0], [0])]]  # one token, no action: its gradient is 0
        inputs = pack(sequences or no_action)
        for name, tensor in inputs.items():
            inputs[name] = None if tensor is None else tensor.to(self.device)
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

    def compute_advantages(self, batch: Batch) -> None:
        """Fill in the advantages, and the log-probabilities that they and the loss need.

        With one update per rollout and no reference model, pi_old is the very policy that is being
        trained, so that no extra forward pass is needed.
        """
        config = self.config
        everyone = batch.action_mask.any(1).nonzero().flatten().tolist()  # who sampled a token
        if self.reference is not None:
            batch.old_log_probs = self.log_probs(self.policy, batch, everyone)
            batch.ref_log_probs = self.log_probs(self.reference, batch, everyone)
            batch.kl = kl_estimate(batch.old_log_probs, batch.ref_log_probs, "k1")
        kl_in_reward = batch.kl if config.kl_mode == "reward" else None
        batch.advantages = estimate_advantages(
            config.algorithm, batch.rewards, batch.action_mask, kl_in_reward, config.kl_coef
        )
        needed = batch.action_mask if self.reference is not None else batch.advantages != 0
        batch.has_gradient = needed.any(1).tolist()
        if batch.old_log_probs is None and config.updates_per_rollout > 1:
            chosen = [i for i in everyone if batch.has_gradient[i]]
            batch.old_log_probs = self.log_probs(self.policy, batch, chosen)

    def backward(self, batch: Batch, chosen: list[int]) -> Tensor:
        """Accumulate the gradient of Eq. 8 over the chosen episodes, those of an optimiser step.

        Returns:
            (4,), sums over this rank's tokens: clipped, |log pi_old - log pi_sampler|, kl, 1.
        """
        config, totals = self.config, torch.zeros(4, device=self.device)
        # On all ranks, and with the tokens of episodes that add nothing to the gradient.
        action_tokens = batch.action_mask[chosen].sum().clamp(min=1)
        plan = self.plan(batch, [i for i in chosen if batch.has_gradient[i]])
        for rows in tqdm(plan, "train", unit="micro-batch", leave=False, disable=self.rank > 0):
            log_probs, index = self.forward(self.policy, batch, rows)
            old = log_probs.detach() if batch.old_log_probs is None else batch.old_log_probs[index]
            sampler_log_probs = batch.sampler_log_probs[index]
            loss, clipped = policy_loss(
                log_probs,
                old,
                batch.advantages[index],
                config.clip_eps,
                sampler_log_probs if config.sampler_clip else None,
                config.sampler_clip,
            )
            kl = torch.zeros_like(old)
            if batch.kl is not None:
                kl = batch.kl[index]
                if config.kl_mode != "reward":
                    estimate = kl_estimate(log_probs, batch.ref_log_probs[index], config.kl_mode)
                    loss = loss + config.kl_coef * estimate
            # FSDP averages gradients over the ranks, and Eq. 8 is a sum over all of them.
            (loss.sum() / action_tokens * self.world).backward()
            gap = (old - sampler_log_probs).abs()
            tokens = torch.ones_like(old)
            totals += torch.stack([clipped.sum(), gap.sum(), kl.sum(), tokens.sum()])
        return totals

    def update(self, batch: Batch, consecutive_skipped: int = 0) -> dict[str, float]:
        """`updates_per_rollout` optimiser steps on one batch; metrics, identical on every rank.

        A gradient that is not finite skips its update on all ranks and is counted. After
        MAX_CONSECUTIVE_SKIPPED in a row no further update is tried.
        """
        groups, samples = batch.rewards.shape
        updates = skipped = 0
        grad_norms = 0.0
        totals = torch.zeros(4, device=self.device)
        for number in range(self.config.updates_per_rollout):
            # Every n-th group: the order of the batch is random already.
            members = range(number, groups, self.config.updates_per_rollout)
            chosen = [group * samples + sample for group in members for sample in range(samples)]
            if consecutive_skipped == MAX_CONSECUTIVE_SKIPPED:
                break
            if not any(batch.has_gradient[i] for i in chosen):
                continue
            sums = self.backward(batch, chosen)
            grad_norm = nn.utils.clip_grad_norm_(self.policy.parameters(), MAX_GRAD_NORM)
            grad_norm = grad_norm.full_tensor().item()
            if math.isfinite(grad_norm):
                self.optimizer.step()
                totals += sums
                grad_norms += grad_norm
                updates += 1
                consecutive_skipped = 0
            else:
                skipped += 1
                consecutive_skipped += 1
            self.optimizer.zero_grad(set_to_none=True)
        dist.all_reduce(totals)
        clip_frac, sampler_gap, kl, _ = (totals / totals[3].clamp(min=1)).tolist()
        return {
            "updates": updates,
            "skipped_updates": skipped,
            "consecutive_skipped": consecutive_skipped,
            "grad_norm": grad_norms / max(updates, 1),
            "clip_frac": clip_frac,
            "sampler_gap": sampler_gap,
            "kl": kl,
            "trained_tokens": int(totals[3]),
        }


# --------------------------------------------------------------------------------------------------
# The loop


def train(config: Config, out: Path, resume: bool = False, logger: str | None = None) -> None:
    """Run `config.steps` iterations, or what is left of them; export the model to `out`/model."""
    start_distributed()
    settings = dataclasses.asdict(config)
    if dist.get_rank() == 0:
        settings |= describe_inputs(config)
        settings["questions_fingerprint"] = fingerprint(config.questions)
    run = RunFolder(out, settings, logger)
    with run.lock(resume):
        checkpoint, progress, finished = run.find_progress(resume)
        if finished:
            run.print_rank0(f"{out}: finished at step {config.steps}; the model is {out / 'model'}")
            return
        refuse_unsupported(config.model, config.max_context)
        sampler = Sampler(config)  # the engine first: it takes what it needs of an empty GPU
        policy = load_policy(config.model, config.gradient_checkpointing, config.cpu_offload)
        reference = None
        if config.kl_coef > 0:
            reference = load_policy(config.model, cpu_offload=config.cpu_offload, frozen=True)
        trainer = Trainer(config, policy, reference)
        if checkpoint is not None:
            load_checkpoint(checkpoint, policy, trainer.optimizer, progress)
        run.begin(progress.step)
        left = range(progress.step, config.steps)
        for _ in tqdm(left, "steps", config.steps, initial=progress.step, disable=trainer.rank > 0):
            progress = iterate(sampler, trainer, run, progress)
        export(policy.lm, whole_parameters(policy), config.model, out / "model", config.steps)
    run.print_rank0(f"model: {out / 'model'}\nmetrics: {out / 'metrics.jsonl'}")


def iterate(sampler: Sampler, trainer: Trainer, run: RunFolder, progress: Progress) -> Progress:
    """One iteration of a run that is as far as `progress`; returns how far it is then."""
    config, step = trainer.config, progress.step
    seconds: dict[str, float] = {}

    # Hand the policy's weights to the engine.
    with timed(seconds, "sync"):
        sampler.sync_weights(trainer.policy)

    # Roll out: questions times samples, with searches in them.
    with timed(seconds, "rollout"):
        episodes = sampler.roll_out(step)

    # Score what the policy wrote.
    for e in episodes:
        e.rewards = score_episode(e.segments, e.answered, e.question["answers"], config.reward)
    metrics = {"step": step + 1} | summarize([episode_record(e) for e in episodes])
    sampler.stop_if_searches_fail(episodes)
    if config.eval_every and step % config.eval_every == 0:
        with timed(seconds, "eval"):
            metrics |= sampler.evaluate()
    sampler.engine.sleep()

    # Advantages from rewards (Eqs. 1 to 5), then optimiser steps (Eqs. 6 to 8).
    with timed(seconds, "train"):
        batch = make_batch(episodes, config.samples_per_prompt, trainer.device)
        trainer.compute_advantages(batch)
        metrics |= trainer.update(batch, progress.consecutive_skipped)

    # Log.
    sampled = sum(sum(e.action_mask) for e in episodes)
    metrics["rollout_tokens_per_second"] = sampled / seconds["seconds_rollout"]
    metrics["train_tokens_per_second"] = metrics["trained_tokens"] / seconds["seconds_train"]
    metrics |= {"peak_memory_gib": peak_memory_gib()} | seconds
    first_group = episodes[: config.samples_per_prompt]
    run.log(metrics, [{"step": step + 1} | dataclasses.asdict(e) for e in first_group])
    shown = ("reward", "search_rate", "format_rate", "f1", "grad_norm")
    values = "  ".join(f"{name} {metrics[name]:.3f}" for name in shown)
    run.print_rank0(f"step {step + 1:4d}  {values}")

    # Checkpoint, unless the run has to stop.
    skipped = metrics["consecutive_skipped"]
    if skipped == MAX_CONSECUTIVE_SKIPPED:
        reason = f"{skipped} updates in a row had no finite gradient; lower --learning_rate"
        raise RuntimeError(f"step {step + 1}: {reason}")
    progress = Progress(step + 1, progress.updates + metrics["updates"], skipped)
    is_due = config.save_every and progress.step % config.save_every == 0
    if progress.step == config.steps or is_due:
        save_checkpoint(run.path / "checkpoints", trainer.policy, trainer.optimizer, progress)
    return progress


def main(argv: list[str] | None = None) -> None:
    with user_errors("train.py"):
        arguments = parse_arguments(argv, __doc__)
        train(arguments.config, arguments.out_folder, arguments.resume, arguments.log)


if __name__ == "__main__":
    try:
        main()
    except BaseException as error:
        abort_process(error)
