r"""Reinforce++, its group-baseline variant and GRPO, as pure functions on tensors.

With r the reward of an episode, pi the policy, pi_old the policy before the updates on a rollout
batch, pi_ref the frozen reference, pi_sampler what the inference engine reports, and
log-probabilities of sampled tokens only:

    1. KL estimators       lr = log pi_old - log pi_ref
                           k1 = lr,  k2 = lr^2 / 2,  k3 = exp(-lr) - 1 + lr,  within +-10
    2. token reward        r_t = -beta k1_t on every action token, plus r on the last one
    3. return              G_t = sum of r_s over the action tokens s >= t   (gamma = 1)
    4. group baseline      reinforce++: r;  reinforce++_baseline: r - mean of the group;
                           grpo: (r - mean of the group) / (std of the group + eps)
    5. normalisation       A = (G - mean) / sqrt(max(var, 1e-8)) over every action token of the
                           rollout batch; not for grpo
    6. clipped surrogate   ratio = exp(log pi - log pi_old)
                           -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A)
    7. sampler correction  times exp(log pi_old - log pi_sampler), within [1 / c, c], a constant for
                           the gradient
    8. loss                sum over the action tokens / number of action tokens of the whole
                           optimiser step, on all ranks

Sources: Reinforce++ (arXiv 2501.03262); GRPO (arXiv 2402.03300); k1 to k3 (Schulman, "Approximating
KL divergence"); 7 is truncated importance sampling for rollouts from another engine.

Shapes: B episodes of the rollout batch, T tokens (padded), N action tokens of a micro-batch, R rows
of a micro-batch, L tokens of a row, H hidden size, V vocabulary. Masks are 1 on the tokens that the
policy sampled. The batch is the whole batch of all ranks; nothing here communicates.
"""

from collections.abc import Callable, Iterator
from itertools import groupby

import torch
from torch import Tensor

# --------------------------------------------------------------------------------------------------
# Advantages: tensors (B, T) of the whole rollout batch


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, kind: str) -> Tensor:
    """Eq. 1, elementwise; `kind` is k1, k2 or k3.

    k1 is unbiased; k2 and k3 are never negative and have useful gradients as a loss.
    """
    # An infinity after exp would turn the gradient into NaN, so the difference is clamped first.
    lr = (log_probs - ref_log_probs).clamp(-20, 20)
    if kind == "k1":
        estimate = lr
    elif kind == "k2":
        estimate = lr.square() / 2
    else:
        estimate = (-lr).exp() - 1 + lr
    return estimate.clamp(-10, 10)


def returns_to_go(
    rewards: Tensor, action_mask: Tensor, kl: Tensor | None = None, kl_coef: float = 0.0
) -> Tensor:
    """Eqs. 2 and 3. Tokens that the policy did not sample neither add to a return nor interrupt it.

    Args:
        rewards: (B,), one an episode.
        action_mask: (B, T).
        kl: (B, T) k1 estimates, if the KL penalty is part of the reward.
    Returns:
        (B, T), 0 outside the mask.
    """
    mask = action_mask.to(rewards.dtype)
    actions_left = mask.flip(1).cumsum(1).flip(1)  # action tokens from here on, this one included
    last_action = mask * (actions_left == 1)
    token_rewards = rewards[:, None] * last_action
    if kl is not None:
        token_rewards = token_rewards - kl_coef * kl * mask
    return token_rewards.flip(1).cumsum(1).flip(1) * mask


def centre(rewards: Tensor) -> Tensor:
    """(groups, samples) rewards less their group's mean; exactly 0 where a group's are all equal."""
    # The mean of equal numbers is not always this number, but the mean of zeros is 0.
    shifted = rewards - rewards[:, :1]
    return shifted - shifted.mean(1, keepdim=True)


def normalize(returns: Tensor, action_mask: Tensor) -> Tensor:
    """Eq. 5 over all action tokens of the batch; 0 outside the mask."""
    mask = action_mask.bool()
    if not mask.any():
        return returns
    mean = returns[mask].mean()
    variance = returns[mask].var(correction=0)
    return (returns - mean) / variance.clamp(min=1e-8).sqrt() * mask


def reinforce_pp(rewards: Tensor, action_mask: Tensor, kl: Tensor | None, kl_coef: float) -> Tensor:
    """Eqs. 2, 3 and 5: no group baseline."""
    return normalize(returns_to_go(rewards.flatten(), action_mask, kl, kl_coef), action_mask)


def reinforce_pp_baseline(
    rewards: Tensor, action_mask: Tensor, kl: Tensor | None, kl_coef: float
) -> Tensor:
    """Eqs. 2 to 5 with the group's mean as baseline."""
    baselined = centre(rewards).flatten()
    return normalize(returns_to_go(baselined, action_mask, kl, kl_coef), action_mask)


def grpo(rewards: Tensor, action_mask: Tensor, kl: Tensor | None, kl_coef: float) -> Tensor:
    """Eqs. 2 to 4 with the group's mean and standard deviation; no normalisation over the batch."""
    centred = centre(rewards)
    std = centred.square().mean(1, keepdim=True).sqrt()
    standardized = centred / (std + 1e-6)
    return returns_to_go(standardized.flatten(), action_mask, kl, kl_coef)


# What --algorithm names. An estimator takes rewards (groups, samples), action_mask (B, T) with
# B = groups * samples in the same order, kl (B, T) or None, and kl_coef; it returns (B, T).
ALGORITHMS: dict[str, Callable[[Tensor, Tensor, Tensor | None, float], Tensor]] = {
    "reinforce++": reinforce_pp,
    "reinforce++_baseline": reinforce_pp_baseline,
    "grpo": grpo,
}


def estimate_advantages(
    algorithm: str,
    rewards: Tensor,
    action_mask: Tensor,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
) -> Tensor:
    """(B, T) fp32 advantages of `algorithm`, 0 outside the mask; float64 keeps equal sums equal."""
    return ALGORITHMS[algorithm](rewards.double(), action_mask, kl, kl_coef).float()


# --------------------------------------------------------------------------------------------------
# Loss: tensors (N,) over the action tokens of a micro-batch


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    clip_eps: float = 0.2,
    sampler_log_probs: Tensor | None = None,
    sampler_clip: float = 2.0,
) -> tuple[Tensor, Tensor]:
    """Eqs. 6 and 7: the loss of each token, to be summed and divided as in Eq. 8.

    Args:
        sampler_log_probs: for the correction of Eq. 7; None switches it off.
    Returns:
        (loss (N,), clipped (N,) bool: where the clip decided).
    """
    ratio = (log_probs - old_log_probs).clamp(-20, 20).exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages
    loss = -torch.minimum(unclipped, clipped)
    if sampler_log_probs is not None:
        weight = (old_log_probs - sampler_log_probs).clamp(-20, 20).exp()
        loss = loss * weight.clamp(1 / sampler_clip, sampler_clip).detach()
    return loss, clipped < unclipped


# --------------------------------------------------------------------------------------------------
# Log-probabilities of chosen tokens


def logits_in_chunks(
    hidden: Tensor, head: Tensor, temperature: float, chunk: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the logits of `chunk` of the N states at a time, fp32, in a buffer of the caller's."""
    for start in range(0, len(hidden), chunk):
        part = slice(start, start + chunk)
        yield part, (hidden[part] @ head.T).float().div_(temperature)


class TokenLogProbs(torch.autograd.Function):
    """`token_log_probs` with a backward pass that computes the logits again.

    Each chunk's logits buffer is reused in place, first for the softmax, then for the gradient.
    """

    @staticmethod
    def forward(ctx, hidden, head, targets, temperature: float, chunk: int) -> Tensor:
        log_probs = hidden.new_empty(len(targets), dtype=torch.float32)
        log_sums = torch.empty_like(log_probs)  # log of the softmax's denominator
        for part, logits in logits_in_chunks(hidden, head, temperature, chunk):
            target_logits = logits.gather(-1, targets[part, None])[:, 0]
            largest = logits.amax(-1)
            exponentials = logits.sub_(largest[:, None]).exp_()
            log_sums[part] = exponentials.sum(-1).log() + largest
            log_probs[part] = target_logits - log_sums[part]
        ctx.save_for_backward(hidden, head, targets, log_sums)
        ctx.temperature, ctx.chunk = temperature, chunk
        return log_probs

    @staticmethod
    def backward(ctx, grad: Tensor):
        hidden, head, targets, log_sums = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros_like(head)
        grad = grad / ctx.temperature
        for part, logits in logits_in_chunks(hidden, head, ctx.temperature, ctx.chunk):
            softmax = logits.sub_(log_sums[part, None]).exp_()
            # d log softmax(target) / d logits = onehot(target) - softmax
            grad_logits = softmax.mul_(-grad[part, None])
            grad_logits.scatter_add_(-1, targets[part, None], grad[part, None])
            grad_logits = grad_logits.to(hidden.dtype)
            grad_hidden[part] = grad_logits @ head
            grad_head.addmm_(grad_logits.T, hidden[part])
        return grad_hidden, grad_head, None, None, None


def token_log_probs(
    hidden: Tensor, head: Tensor, targets: Tensor, temperature: float = 1.0, chunk: int = 1024
) -> Tensor:
    """log softmax(hidden @ head.T / temperature) at `targets`, without ever holding (N, V) logits.

    Args:
        hidden: (N, H), the states that predict the targets.
        head: (V, H), weight of the language-model head.
        targets: (N,) token ids.
        chunk: states whose logits are in memory at a time.
    Returns:
        (N,) fp32.
    """
    return TokenLogProbs.apply(hidden, head, targets, temperature, chunk)


# --------------------------------------------------------------------------------------------------
# Packing


SHARE_PROMPT_FROM = 0.5  # prompt length over mean continuation length from which sharing pays


def pack(rows: list[list[tuple[list[int], list[int], int]]]) -> dict[str, Tensor | None]:
    packed = []
    for row in rows:
        prompt_length = row[0][2]
        ids, positions, branch = (
            list(row[0][0][:prompt_length]),
            list(range(prompt_length)),
            [0] * prompt_length,
        )
        sources, targets = [], []
        for number, (token_ids, mask, _) in enumerate(row, 1):
            actions = [t for t, acted in enumerate(mask) if acted]
            end = (
                actions[-1] if actions else prompt_length
            )  # the last action is predicted, never read
            shift = len(ids) - prompt_length
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
        visible = (branch[:, None, :] == 0) | (
            branch[:, None, :] == branch[:, :, None]
        )  # (R, L, L)
        batch |= {"position_ids": pad(1, 0), "attention_mask": visible.tril()[:, None]}
    batch["source"] = torch.tensor(
        [r * length + s for r, p in enumerate(packed) for s in p[3]], dtype=torch.long
    )
    batch["targets"] = torch.tensor([t for p in packed for t in p[4]], dtype=torch.long)
    return batch


def plan_micro_batches(
    sizes: list[tuple[int, int]], chosen: list[int], samples: int, budget: int
) -> list[list[list[int]]]:
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
