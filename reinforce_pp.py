r"""Reinforce++, its group-baseline variant and GRPO, as pure functions on tensors.

With r the reward of an episode, pi the policy, pi_old the policy before the updates on a rollout
batch, pi_ref the frozen reference, pi_sampler what the inference engine reports, and
log-probabilities of sampled tokens only:

    1. KL estimators       lr = log pi_old - log pi_ref
                           k1 = lr,  k2 = lr^2 / 2,  k3 = exp(-lr) - 1 + lr,  within +-10
    2. token reward        r_t = -beta k1_t on every action token, plus r on the last one, where r
                           has passed the baseline of 4
    3. return              G_t = sum of r_s over the action tokens s >= t   (gamma = 1)
    4. group baseline      reinforce++: r;  reinforce++_baseline: r - mean of the group;
                           grpo: (r - mean of the group) / (std of the group + eps), std
                           with n - 1
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
from dataclasses import dataclass
from functools import reduce

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
    actions_left = mask.flip(1).cumsum(1).flip(1)  # action tokens from here on, this one included
    last_action = mask * (actions_left == 1)
    token_rewards = rewards[:, None] * last_action
    if kl is not None:
        token_rewards = token_rewards - kl_coef * kl * mask
    return token_rewards.flip(1).cumsum(1).flip(1) * mask


def centre(rewards: Tensor) -> Tensor:
    """(groups, samples) rewards less their group's mean; exactly 0 in a group of equal rewards."""
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
    """Eqs. 2 to 4 with the group's mean and standard deviation; no normalisation over the batch.

    The standard deviation is that of a sample, divided by n - 1, as in OpenRLHF, verl and TRL.
    """
    centred = centre(rewards)
    others = max(1, rewards.shape[1] - 1)
    std = (centred.square().sum(1, keepdim=True) / others).sqrt()
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
    """(B, T) fp32 advantages of `algorithm`, 0 outside the mask.

    They are computed in fp64: rounding must not make a small advantage of one that is 0.
    """
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
        (N,), computed in fp32 from logits that are fp32 on a GPU, and rounded to the dtype of the
        inputs on a CPU (RESULTS.md has the error).
    """
    return TokenLogProbs.apply(hidden, head, targets, temperature, chunk)


# --------------------------------------------------------------------------------------------------
# Packing: sequences that begin alike compute their common prefix once

# Longest row of several sequences, in tokens: the attention of a row grows with its square.
MAX_SHARED_ROW = 1024
# A sequence joins a row where it adds at most this share of its own length. Sharing has a price: a
# dense mask, and attention that is computed across the sequences of a row before it is masked.
MAX_ADDED_SHARE = 0.5


def common_prefix(one: list[int], other: list[int]) -> list[int]:
    """The longest common prefix of two lists of token ids."""
    for length, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return one[:length]
    return min(one, other, key=len)


@dataclass
class Row:
    """Sequences that share a row: their common prefix, then the remainder of each."""

    members: list[int]  # indices of the sequences
    prefix: list[int]  # token ids
    remainders: int  # tokens

    @property
    def tokens(self) -> int:
        return len(self.prefix) + self.remainders

    @property
    def is_shared(self) -> bool:
        return len(self.members) > 1

    def join(self, index: int, sequence: list[int]) -> "Row":
        """This row with one more sequence, whose start may shorten the common prefix."""
        prefix = common_prefix(self.prefix, sequence)
        given_up = (len(self.prefix) - len(prefix)) * len(self.members)
        remainders = self.remainders + given_up + len(sequence) - len(prefix)
        return Row([*self.members, index], prefix, remainders)


def plan_micro_batches(sequences: dict[int, list[int]], budget: int) -> list[list[list[int]]]:
    """Micro-batches of rows of sequences, for `pack`.

    A sequence joins the row before it where that saves enough. Rows are sorted by length, so that
    the rows of a micro-batch are alike and padding is small. Shared and plain rows never mix: one
    shared row would give all rows of its micro-batch a dense mask.

    Args:
        sequences: token ids by index; samples of one question are neighbours.
        budget: tokens of a micro-batch, padding included; a single sequence may exceed it.
    Returns:
        For each micro-batch its rows, and for each row the indices of its sequences.
    """
    rows: list[Row] = []
    for index, sequence in sequences.items():
        if rows:
            joined = rows[-1].join(index, sequence)
            added = joined.tokens - rows[-1].tokens
            fits = joined.tokens <= min(budget, MAX_SHARED_ROW)
            if fits and added <= MAX_ADDED_SHARE * len(sequence):
                rows[-1] = joined
                continue
        rows.append(Row([index], sequence, 0))
    rows.sort(key=lambda row: (row.is_shared, row.tokens), reverse=True)
    micro_batches: list[list[list[int]]] = []
    first = None  # row of the last micro-batch, its longest
    for row in rows:
        joins = first is not None and row.is_shared == first.is_shared
        if joins and (len(micro_batches[-1]) + 1) * first.tokens <= budget:
            micro_batches[-1].append(row.members)
        else:
            micro_batches.append([row.members])
            first = row
    return micro_batches


@dataclass
class PackedRow:
    """A row as `pack` lays it out; the first three lists are parallel."""

    ids: list[int]
    positions: list[int]  # that each token has in its own sequence
    branches: list[int]  # 0 in the prefix, else the number of the sequence
    source: list[int]  # for each action token: where the state that predicts it stands in the row
    targets: list[int]  # the action tokens


def pack_row(sequences: list[tuple[list[int], list[int]]]) -> PackedRow:
    """Lay out the sequences of one row, each (token ids, action mask)."""
    actions = [[t for t, acted in enumerate(mask) if acted] for _, mask in sequences]
    # The last action is predicted but never read, and nothing after it is needed.
    inputs = []
    for (ids, _), acted in zip(sequences, actions, strict=True):
        inputs.append(ids[: acted[-1]] if acted else ids[:1])
    prefix = reduce(common_prefix, inputs)
    shared = len(prefix)
    row = PackedRow(list(prefix), list(range(shared)), [0] * shared, [], [])
    for number, (ids, _) in enumerate(sequences):
        begin, length = len(row.ids), len(inputs[number])
        place = [*range(shared), *range(begin, begin + length - shared)]  # of each token in the row
        row.source += [place[t - 1] for t in actions[number]]
        row.targets += [ids[t] for t in actions[number]]
        row.ids += inputs[number][shared:]
        row.positions += range(shared, length)
        row.branches += [number + 1] * (length - shared)
    return row


def pack(rows: list[list[tuple[list[int], list[int]]]]) -> dict[str, Tensor | None]:
    """Model inputs for rows of sequences; the sequences of a row share their common prefix.

    A row is the longest common prefix of its sequences, then the remainder of each. A remainder
    sees the prefix and itself, at the positions that it would have alone, so values and gradients
    are those of separate sequences, while the prefix is computed once. Rows of one sequence are
    plain right-padded causal rows and need no mask.

    Args:
        rows: per row its sequences, each (token ids, action mask).
    Returns:
        input_ids (R, L); position_ids (R, L) and attention_mask (R, 1, L, L), true where visible,
        both None where no row is shared; and for the N action tokens, sequence by sequence: source
        (N,), the flat index into (R * L) of the state that predicts the token, and targets (N,).
    """
    packed = [pack_row(row) for row in rows]
    length = max(len(row.ids) for row in packed)

    def pad(lists: list[list[int]], value: int) -> Tensor:
        return torch.tensor([values + [value] * (length - len(values)) for values in lists])

    source = [number * length + s for number, row in enumerate(packed) for s in row.source]
    targets = [target for row in packed for target in row.targets]
    batch = {
        "input_ids": pad([row.ids for row in packed], 0),
        "position_ids": None,
        "attention_mask": None,
        "source": torch.tensor(source, dtype=torch.long),
        "targets": torch.tensor(targets, dtype=torch.long),
    }
    if any(len(row) > 1 for row in rows):
        branch = pad([row.branches for row in packed], -1)  # (R, L)
        same_branch = branch[:, :, None] == branch[:, None, :]  # (R, L, L)
        in_prefix = branch[:, None, :] == 0
        batch["position_ids"] = pad([row.positions for row in packed], 0)
        batch["attention_mask"] = (same_branch | in_prefix).tril()[:, None]
    return batch
