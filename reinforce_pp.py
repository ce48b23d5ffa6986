r"""Reinforce++, its group-baseline variant and GRPO, as pure functions on tensors.

With r the reward of an episode, pi the policy, pi_old the policy before the updates on a rollout
batch, pi_ref the frozen reference, pi_sampler what the inference engine reports, and
log-probabilities of sampled tokens only:

    1. KL estimators       lr = log pi_old - log pi_ref
                           k1 = lr,  k2 = lr^2 / 2,  k3 = exp(-lr) - 1 + lr,  within +-10
    2. token reward        r_t = -beta k1_t on every action token, plus r on the last one, where r
                           has passed the baseline of 4
    3. return              G_t = sum of r_s over the action tokens s >= t   (gamma = 1)
    4. group baseline      reinforce++: r;  reinforce++_baseline and dr_grpo: r - mean of the
                           group;  grpo: (r - mean of the group) / (std of the group + eps), std
                           with n - 1
    5. normalisation       A = (G - mean) / sqrt(max(var, 1e-8)) over every action token of the
                           rollout batch; not for grpo and dr_grpo
    6. clipped surrogate   ratio = exp(log pi - log pi_old)
                           -min(ratio A, clip(ratio, 1 - eps, 1 + eps_high) A)
    7. sampler correction  times exp(log pi_old - log pi_sampler), within [1 / c, c], a constant for
                           the gradient
    8. loss                sum over the action tokens / number of action tokens of the whole
                           optimiser step, on all ranks

Sources: Reinforce++ (arXiv 2501.03262); GRPO (arXiv 2402.03300); Dr. GRPO (arXiv 2503.20783);
eps_high: DAPO (arXiv 2503.14476); k1 to k3 (Schulman, "Approximating KL divergence"); 7 is
truncated importance sampling for rollouts from another engine.

Shapes: B episodes of the rollout batch, T tokens (padded), N action tokens of a micro-batch, H
hidden size, V vocabulary. Masks are 1 on sampled tokens that are trained on. The batch is the whole
batch of all ranks; nothing here communicates.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# --------------------------------------------------------------------------------------------------
# Advantages: tensors (B, T) of the whole rollout batch


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, kind: str) -> Tensor:
    """Eq. 1, elementwise; `kind` is k1, k2 or k3.

    k1 goes into the reward; k2 and k3, never negative, have useful gradients as a loss.
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
    returns = rewards[:, None] * mask  # earned at the last action token, it counts for all
    if kl is not None:
        returns -= (kl_coef * kl * mask).flip(1).cumsum(1).flip(1) * mask
    return returns


def centre(rewards: Tensor) -> Tensor:
    """(groups, samples) rewards less their group's mean; exactly 0 in a group of equal rewards."""
    # The mean of equal numbers is not always this number, but the mean of zeros is 0.
    shifted = rewards - rewards[:, :1]
    return shifted - shifted.mean(1, keepdim=True)


def standardize(rewards: Tensor) -> Tensor:
    """`centre`, divided by the group's standard deviation.

    It is that of a sample, divided by n - 1, as in OpenRLHF, verl and TRL.
    """
    centred = centre(rewards)
    others = max(1, rewards.shape[1] - 1)
    std = (centred.square().sum(1, keepdim=True) / others).sqrt()
    return centred / (std + 1e-6)


def normalize(returns: Tensor, action_mask: Tensor) -> Tensor:
    """Eq. 5 over all action tokens of the batch; 0 outside the mask."""
    mask = action_mask.bool()
    if not mask.any():
        return returns
    shifted = returns - returns[mask][0]  # as in `centre`: equal returns give exactly 0
    mean, variance = shifted[mask].mean(), shifted[mask].var(correction=0)
    return (shifted - mean) / variance.clamp(min=1e-8).sqrt() * mask


# What --algorithm names: the baseline of Eq. 4, from rewards (groups, samples) to the same shape.
# Dr. GRPO's other change, a loss that does not divide by an episode's length, is Eq. 8.
ALGORITHMS: dict[str, Callable[[Tensor], Tensor]] = {
    "reinforce++": torch.clone,  # no baseline
    "reinforce++_baseline": centre,
    "grpo": standardize,
    "dr_grpo": centre,
}
NORMALIZED = ("reinforce++", "reinforce++_baseline")  # the algorithms with Eq. 5


def estimate_advantages(
    algorithm: str,
    rewards: Tensor,
    action_mask: Tensor,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
) -> Tensor:
    """Eqs. 2 to 5: (B, T) fp32 advantages of `algorithm`, 0 outside the mask.

    They are computed in fp64: rounding must not make a small advantage of one that is 0.

    Args:
        rewards: (groups, samples), B = groups * samples in the order of the mask.
    """
    baselined = ALGORITHMS[algorithm](rewards.double())
    advantages = returns_to_go(baselined.flatten(), action_mask, kl, kl_coef)
    if algorithm in NORMALIZED:
        advantages = normalize(advantages, action_mask)
    return advantages.float()


# --------------------------------------------------------------------------------------------------
# Loss: tensors (N,) over the action tokens of a micro-batch


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    clip_eps: float = 0.2,
    clip_eps_high: float = 0.2,
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
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps_high) * advantages
    loss = -torch.minimum(unclipped, clipped)
    if sampler_log_probs is not None:
        weight = (old_log_probs - sampler_log_probs).clamp(-20, 20).exp()
        loss = loss * weight.clamp(1 / sampler_clip, sampler_clip).detach()
    return loss, clipped < unclipped


def sequence_ratio(old_log_probs: Tensor, sampler_log_probs: Tensor, mask: Tensor) -> Tensor:
    """(B,) geometric mean of pi_old / pi_sampler over the tokens of each sequence; all else (B, T).

    For --sampler_mask: a sequence far from 1 was in truth sampled from another policy.
    """
    log_ratio = (old_log_probs - sampler_log_probs) * mask
    return (log_ratio.sum(1) / mask.sum(1).clamp(min=1)).exp()


# --------------------------------------------------------------------------------------------------
# Log-probabilities of chosen tokens


def logits_in_chunks(
    hidden: Tensor, head: Tensor, temperature: float, chunk: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (slice, fp32 logits) of `chunk` states; the caller may overwrite the logits."""
    for start in range(0, len(hidden), chunk):
        part = slice(start, start + chunk)
        if hidden.is_cuda:
            logits = torch.mm(hidden[part], head.T, out_dtype=torch.float32)
        else:  # a CPU rounds the logits to bf16 on their way
            logits = (hidden[part] @ head.T).float()
        yield part, logits.div_(temperature)


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


HEAD_CHUNK = 1024  # states whose logits are in memory at a time


def token_log_probs(
    hidden: Tensor, head: Tensor, targets: Tensor, temperature: float = 1.0, chunk: int = HEAD_CHUNK
) -> Tensor:
    """log softmax(hidden @ head.T / temperature) at `targets`, without ever holding (N, V) logits.

    Args:
        hidden: (N, H), the states that predict the targets.
        head: (V, H), weight of the language-model head.
        targets: (N,) token ids.
        chunk: states whose logits are in memory at a time.
    Returns:
        (N,), computed in fp32 from logits that are fp32 on a GPU, and rounded to the dtype of the
        inputs on a CPU (RESULTS.md has the error).
    """
    return TokenLogProbs.apply(hidden, head, targets, temperature, chunk)
