"""Reinforce++, its group-baseline variant and GRPO, as pure functions on tensors.

With r the reward of an episode, pi the policy, pi_old the policy at the start of the rollout batch's updates, pi_ref the
frozen reference, pi_sampler what the inference engine reports, and log-probabilities of sampled tokens only:

    1. KL estimators       lr = log pi_old - log pi_ref;  k1 = lr,  k2 = lr^2 / 2,  k3 = exp(-lr) - 1 + lr,  within +-10
    2. token reward        r_t = -beta k1_t on every action token, plus r on the last one
    3. return              G_t = sum of r_s over the action tokens s >= t   (gamma = 1)
    4. group baseline      reinforce++: r;  reinforce++_baseline: r - mean(group);  grpo: (r - mean) / (std + eps)
    5. normalisation       A = (G - mean) / sqrt(max(var, 1e-8)) over every action token of the rollout batch; not for grpo
    6. clipped surrogate   ratio = exp(log pi - log pi_old);  -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A)
    7. sampler correction  times exp(log pi_old - log pi_sampler), within [1 / c, c], a constant for the gradient
    8. loss                sum over the action tokens / number of action tokens of the whole optimiser step, on all ranks

Sources: Reinforce++ (arXiv 2501.03262), GRPO (arXiv 2402.03300), k1 to k3 (Schulman, "Approximating KL divergence"),
7 (truncated importance sampling for rollouts from another engine).

Shapes: B episodes of the rollout batch, T tokens (padded), N action tokens of a micro-batch, H hidden, V vocabulary.
Masks are 1 on the tokens that the policy sampled. The batch is the whole batch of all ranks; nothing here
communicates.
"""

from collections.abc import Callable, Iterator
from itertools import groupby

import torch
from torch import Tensor, nn
from tqdm import tqdm

SHARE_PROMPT_FROM = 0.5  # prompt length over mean continuation length from which sharing beats plain causal attention
ALGORITHMS = ("reinforce++", "reinforce++_baseline", "grpo")

# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities


def chunks_of_logits(hidden: Tensor, weight: Tensor, temperature: float, chunk: int) -> Iterator[tuple[slice, Tensor]]:
    """Each chunk of the N states and its logits (chunk, V), fp32: a buffer that the caller may write into."""
    for start in range(0, len(hidden), chunk):
        part = slice(start, start + chunk)
        yield part, (hidden[part] @ weight.T).float().div_(temperature)


class TokenLogProbs(torch.autograd.Function):
    """`token_log_probs`. A chunk's logits are one buffer, which becomes their softmax or their gradient in place."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk: int) -> Tensor:
        log_probs, log_sums = (hidden.new_empty(len(targets), dtype=torch.float32) for _ in range(2))
        for part, logits in chunks_of_logits(hidden, weight, temperature, chunk):
            largest, chosen = logits.amax(-1), logits.gather(-1, targets[part, None])[:, 0]
            log_sums[part] = logits.sub_(largest[:, None]).exp_().sum(-1).log() + largest
            log_probs[part] = chosen - log_sums[part]
        ctx.save_for_backward(hidden, weight, targets, log_sums)
        ctx.temperature, ctx.chunk = temperature, chunk
        return log_probs

    @staticmethod
    def backward(ctx, grad: Tensor):
        hidden, weight, targets, log_sums = ctx.saved_tensors
        grad_hidden, grad_weight, grad = torch.empty_like(hidden), torch.zeros_like(weight), grad / ctx.temperature
        for part, logits in chunks_of_logits(hidden, weight, ctx.temperature, ctx.chunk):
            softmax = logits.sub_(log_sums[part, None]).exp_()
            grad_logits = softmax.mul_(-grad[part, None]).scatter_add_(-1, targets[part, None], grad[part, None])
            grad_logits = grad_logits.to(hidden.dtype)
            grad_hidden[part] = grad_logits @ weight
            grad_weight.addmm_(grad_logits.T, hidden[part])
        return grad_hidden, grad_weight, None, None, None


def token_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, chunk: int = 1024) -> Tensor:
    """log softmax(hidden @ weight.T / temperature) at `targets`, in fp32, without ever holding the (N, V) logits.

    The head runs over chunks of the action positions only, and again in the backward pass.

    Args:
        hidden: (N, H), the states that predict the targets.
        weight: (V, H) of the language-model head.
        targets: (N,) token ids.
    Returns:
        (N,) fp32.
    """
    return TokenLogProbs.apply(hidden, weight, targets, temperature, chunk)


class Policy(nn.Module):
    """A causal language model that gives log-probabilities of chosen tokens instead of logits.

    The head is applied inside this module's forward, where FSDP holds its weight whole.
    """

    def __init__(self, lm: nn.Module):
        super().__init__()
        self.lm = lm

    def forward(self, input_ids, position_ids, attention_mask, source, targets, temperature: float) -> Tensor:
        """Inputs as `pack` makes them; (N,) fp32 log-probabilities of the N targets."""
        hidden = self.lm.base_model(
            input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state  # (R, L, H)
        head = self.lm.get_output_embeddings().weight  # (V, H)
        return token_log_probs(hidden.flatten(0, 1)[source], head, targets, temperature)


def pack(rows: list[list[tuple[list[int], list[int], int]]]) -> dict[str, Tensor | None]:
    """Model inputs for rows of sequences, where the sequences of a row share their prompt and its computation.

    A row is prompt, then the continuations one after another. Each continuation sees the prompt and itself, at the
    positions that it would have alone, so values and gradients are those of separate sequences while the prompt is
    computed once. Rows of one sequence are plain right-padded causal rows and need no mask.

    Args:
        rows: per row its sequences, each (token ids, action mask, prompt length); the prompt is the same within a row.
    Returns:
        input_ids (R, L), position_ids and attention_mask (R, 1, L, L, true where visible; both None where no row is
        shared), and for the N action tokens, sequence by sequence: source (N,), the flat index into (R * L) of the
        state that predicts the token, and targets (N,).
    """
    packed = []
    for row in rows:
        prompt_length = row[0][2]
        ids, positions, branch = list(row[0][0][:prompt_length]), list(range(prompt_length)), [0] * prompt_length
        sources, targets = [], []
        for number, (token_ids, mask, _) in enumerate(row, 1):
            actions = [t for t, acted in enumerate(mask) if acted]
            end = actions[-1] if actions else prompt_length  # the last action is predicted, never read
            shift = len(ids) - prompt_length
            # the first token after the prompt is predicted by the prompt's last, wherever the continuation lies
            sources += [t - 1 + (shift if t > prompt_length else 0) for t in actions]
            targets += [token_ids[t] for t in actions]
            ids += token_ids[prompt_length:end]
            positions += range(prompt_length, end)
            branch += [number] * (end - prompt_length)
        packed.append((ids, positions, branch, sources, targets))
    length = max(len(ids) for ids, *_ in packed)

    def pad(column: int, value: int) -> Tensor:
        return torch.tensor([p[column] + [value] * (length - len(p[column])) for p in packed])

    batch = {"input_ids": pad(0, 0), "position_ids": None, "attention_mask": None}
    if any(len(row) > 1 for row in rows):
        branch = pad(2, -1)  # (R, L)
        visible = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])  # (R, L, L)
        batch |= {"position_ids": pad(1, 0), "attention_mask": visible.tril()[:, None]}
    batch["source"] = torch.tensor([r * length + s for r, p in enumerate(packed) for s in p[3]], dtype=torch.long)
    batch["targets"] = torch.tensor([t for p in packed for t in p[4]], dtype=torch.long)
    return batch


def plan_micro_batches(sizes: list[tuple[int, int]], chosen: list[int], samples: int, budget: int) -> list[list[list[int]]]:
    """Micro-batches of rows of sequences, for `pack`.

    Sequences of one prompt share a row where the prompt is long enough to pay for the mask. Rows are sorted by length, so
    that those of a micro-batch are alike and padding is small.

    Args:
        sizes: (prompt, whole) length of every sequence of the batch; `samples` in a row have the same prompt.
        chosen: the sequences to plan, ascending.
        budget: tokens of a micro-batch, padding included; a single sequence may exceed it.
    """
    rows: list[tuple[int, list[int]]] = []  # (tokens, sequences)
    for _, group in groupby(chosen, key=lambda i: i // samples):
        members = list(group)
        prompt = sizes[members[0]][0]
        continuations = [sizes[i][1] - prompt for i in members]
        share = prompt >= SHARE_PROMPT_FROM * sum(continuations) / len(members)
        for i, continuation in zip(members, continuations, strict=True):
            if i != members[0] and share and rows[-1][0] + continuation <= budget:
                rows[-1] = (rows[-1][0] + continuation, [*rows[-1][1], i])
            else:
                rows.append((prompt + continuation, [i]))
    rows.sort(key=lambda row: -row[0])
    batches: list[list[list[int]]] = []
    width = 0
    for tokens, row in rows:
        if batches and (len(batches[-1]) + 1) * width <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
            width = tokens
    return batches


# ---------------------------------------------------------------------------------------------------------------------
# Advantages: tensors (B, T) of the whole rollout batch


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, kind: str) -> Tensor:
    """Eq. 1, elementwise. k1 is unbiased, k2 and k3 are positive and have useful gradients as a loss."""
    lr = (log_probs - ref_log_probs).clamp(-20, 20)  # before exp: an infinity would turn the gradient into NaN
    estimate = {"k1": lr, "k2": lr.square() / 2, "k3": (-lr).exp() - 1 + lr}[kind]
    return estimate.clamp(-10, 10)


def group_baseline(rewards: Tensor, algorithm: str, eps: float = 1e-6) -> Tensor:
    """Eq. 4. rewards (groups, samples) to the same shape; a group whose rewards are all equal gets exactly 0."""
    if algorithm == "reinforce++":
        return rewards
    shifted = rewards - rewards[:, :1]  # the mean of equal numbers is not always that number; the mean of zeros is 0
    centred = shifted - shifted.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True).sqrt() + eps) if algorithm == "grpo" else centred


def returns_to_go(rewards: Tensor, action_mask: Tensor, kl: Tensor | None = None, kl_coef: float = 0.0) -> Tensor:
    """Eqs. 2 and 3. Tokens that the policy did not sample neither contribute to a return nor interrupt it.

    Args:
        rewards: (B,), one an episode.
        action_mask: (B, T).
        kl: (B, T) k1 estimates, if the KL penalty is part of the reward.
    Returns:
        (B, T), 0 outside the mask.
    """
    mask = action_mask.to(rewards.dtype)
    later = mask.flip(1).cumsum(1).flip(1)  # action tokens from here on, this one included
    token_rewards = rewards[:, None] * (mask * (later == 1))
    if kl is not None:
        token_rewards = token_rewards - kl_coef * kl * mask
    return token_rewards.flip(1).cumsum(1).flip(1) * mask


def normalize(returns: Tensor, action_mask: Tensor) -> Tensor:
    """Eq. 5 over all action tokens of the batch; 0 outside the mask."""
    mask = action_mask.bool()
    if not mask.any():
        return returns
    mean, var = returns[mask].mean(), returns[mask].var(correction=0)
    return (returns - mean) / var.clamp(min=1e-8).sqrt() * mask


def advantages(rewards: Tensor, action_mask: Tensor, algorithm: str, kl: Tensor | None = None, kl_coef: float = 0) -> Tensor:
    """Eqs. 2 to 5.

    Args:
        rewards: (groups, samples); the rows of `action_mask` are in the same order. float64 keeps equal sums equal.
        action_mask: (B, T) with B = groups * samples.
        algorithm: one of `ALGORITHMS`.
    Returns:
        (B, T) fp32, 0 outside the mask.
    """
    returns = returns_to_go(group_baseline(rewards.double(), algorithm).flatten(), action_mask, kl, kl_coef)
    return (returns if algorithm == "grpo" else normalize(returns, action_mask)).float()


# ---------------------------------------------------------------------------------------------------------------------
# Loss: tensors (N,) over the action tokens of a micro-batch


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    clip_eps: float = 0.2,
    sampler_log_probs: Tensor | None = None,
    sampler_clip: float = 2.0,
) -> tuple[Tensor, Tensor]:
    """Eqs. 6 and 7: the loss of each token, to be summed and divided by the step's number of action tokens (Eq. 8).

    Returns:
        (loss (N,), clipped (N,) bool: where the clip decided).
    """
    ratio = (log_probs - old_log_probs).clamp(-20, 20).exp()
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages
    loss = -torch.minimum(unclipped, clipped)
    if sampler_log_probs is not None:
        weight = (old_log_probs - sampler_log_probs).clamp(-20, 20).exp().clamp(1 / sampler_clip, sampler_clip)
        loss = loss * weight.detach()
    return loss, clipped < unclipped


# ---------------------------------------------------------------------------------------------------------------------
# A rollout batch, from episodes to gradients


class Batch:
    """The rollout batch as tensors (B, T), alike on every rank.

    Args:
        episodes: of all ranks, `samples_per_prompt` in a row of the same prompt.
        config: train.py's options.
        rank, world: which share of the micro-batches to compute.
        reduce: sums a tensor over the ranks, in place.
    Attributes:
        action_mask, sampler_log_probs: (B, T).
        rewards: (groups, samples).
        advantages: (B, T), of `prepare`.
        old_log_probs, ref_log_probs, kl: (B, T) of `prepare`, None where not needed.
        teaches: B booleans, false for episodes that cannot change the gradient.
    """

    def __init__(self, episodes: list, config, device: torch.device, rank: int = 0, world: int = 1, reduce=lambda x: x):
        self.episodes, self.config, self.device = episodes, config, device
        self.rank, self.world, self.reduce = rank, world, reduce
        length = max(len(e.token_ids) for e in episodes)

        def pad(rows: list[list], dtype: torch.dtype) -> Tensor:
            return torch.tensor([row + [0] * (length - len(row)) for row in rows], dtype=dtype, device=device)

        self.action_mask = pad([e.action_mask for e in episodes], torch.bool)
        self.sampler_log_probs = pad([e.log_probs for e in episodes], torch.float32)
        rewards = torch.tensor([e.rewards["reward"] for e in episodes], dtype=torch.float64, device=device)
        self.rewards = rewards.view(-1, config.samples_per_prompt)
        self.old_log_probs = self.ref_log_probs = self.kl = None

    def prepare(self, policy: nn.Module, reference: nn.Module | None) -> None:
        """Advantages, and the passes without gradient that they and the loss need: none for one update and no KL."""
        config, everyone = self.config, list(range(len(self.episodes)))
        if reference is not None:
            self.old_log_probs = self.log_probs(policy, everyone)
            self.ref_log_probs = self.log_probs(reference, everyone)
            self.kl = kl_estimate(self.old_log_probs, self.ref_log_probs, "k1")
        in_reward = self.kl if config.kl_mode == "reward" else None
        self.advantages = advantages(self.rewards, self.action_mask, config.algorithm, in_reward, config.kl_coef)
        self.teaches = (self.action_mask if reference is not None else self.advantages != 0).any(1).tolist()
        if self.old_log_probs is None and config.updates_per_rollout > 1:
            self.old_log_probs = self.log_probs(policy, [i for i in everyone if self.teaches[i]])

    def plan(self, chosen: list[int]) -> list[list[list[int]]]:
        """This rank's micro-batches of the chosen episodes; every rank gets the same number, so collectives cannot hang."""
        sequences = [(len(e.prompt_ids), len(e.token_ids)) for e in self.episodes]
        batches = plan_micro_batches(sequences, chosen, self.config.samples_per_prompt, self.config.micro_batch_tokens)
        batches += [[]] * (-len(batches) % self.world)  # an empty one runs the model on a single token, with weight zero
        return batches[self.rank :: self.world]

    def forward(self, policy: nn.Module, rows: list[list[int]]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Log-probabilities (N,) of a micro-batch's action tokens, and how to pick the same tokens from a (B, T) tensor."""
        members = [[self.episodes[i] for i in row] for row in rows]
        sequences = [[(e.token_ids, e.action_mask, len(e.prompt_ids)) for e in row] for row in members]
        inputs = {name: t if t is None else t.to(self.device) for name, t in pack(sequences or [[([0], [0], 1)]]).items()}
        chosen = torch.tensor([i for row in rows for i in row], dtype=torch.long, device=self.device)
        log_probs = policy(**inputs, temperature=self.config.temperature)
        return log_probs, lambda values: values[chosen][self.action_mask[chosen]]

    @torch.no_grad()
    def log_probs(self, policy: nn.Module, chosen: list[int]) -> Tensor:
        """(B, T) log-probabilities under `policy` of the chosen episodes' action tokens, 0 elsewhere, on every rank."""
        result = torch.zeros_like(self.sampler_log_probs)
        positions = torch.arange(result.numel(), device=self.device).view_as(result)
        for rows in self.plan(chosen):
            values, pick = self.forward(policy, rows)
            result.view(-1)[pick(positions)] = values
        self.reduce(result)
        return result

    def backward(self, policy: nn.Module, chosen: list[int]) -> Tensor:
        """Accumulate the gradient of Eq. 8 over the chosen episodes, the episodes of one optimiser step.

        Returns:
            (4,), of this rank: clipped tokens, sum of |log pi_old - log pi_sampler|, sum of kl, tokens.
        """
        config, totals = self.config, torch.zeros(4, device=self.device)
        action_tokens = self.action_mask[chosen].sum().clamp(min=1)  # on all ranks, those that teach nothing included
        plan = self.plan([i for i in chosen if self.teaches[i]])
        for rows in tqdm(plan, "train", unit="micro-batch", leave=False, disable=self.rank > 0):
            log_probs, pick = self.forward(policy, rows)
            old = log_probs.detach() if self.old_log_probs is None else pick(self.old_log_probs)
            sampler, kl = pick(self.sampler_log_probs), torch.zeros_like(old) if self.kl is None else pick(self.kl)
            correct = sampler if config.sampler_clip else None
            loss, clipped = policy_loss(log_probs, old, pick(self.advantages), config.clip_eps, correct, config.sampler_clip)
            if self.kl is not None and config.kl_mode != "reward":
                loss = loss + config.kl_coef * kl_estimate(log_probs, pick(self.ref_log_probs), config.kl_mode)
            # FSDP averages gradients over the ranks; the loss is a sum over all of them
            (loss.sum() / action_tokens * self.world).backward()
            totals += torch.stack([clipped.sum(), (old - sampler).abs().sum(), kl.sum(), torch.ones_like(old).sum()])
        return totals
