"""Every equation against numbers computed by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import tensor

from reinforce_pp import (
    ALGORITHMS,
    centre,
    estimate_advantages,
    kl_estimate,
    normalize,
    policy_loss,
    returns_to_go,
    sequence_ratio,
    standardize,
    token_log_probs,
)

MASK = tensor(
    [[0, 1, 1, 0, 0, 1, 1, 0], [0, 1, 0, 0, 0, 0, 0, 0]], dtype=torch.bool
)  # two turns; one action


# --------------------------------------------------------------------------------------------------
# Advantages


def test_eq_1_kl_estimators_by_hand():
    lp, ref = tensor([-1.0]), tensor([-1.5])
    assert kl_estimate(lp, ref, "k1").item() == 0.5
    assert kl_estimate(lp, ref, "k2").item() == 0.125
    assert kl_estimate(lp, ref, "k3").item() == pytest.approx(math.exp(-0.5) - 1 + 0.5)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("far", [-1e4, 1e4, -30.0, 30.0])
def test_eq_1_far_apart_is_clamped_and_its_gradient_finite(kind, far):
    lp = tensor([far], requires_grad=True)
    estimate = kl_estimate(lp, tensor([0.0]), kind)
    estimate.sum().backward()
    assert abs(estimate.item()) <= 10 and lp.grad.isfinite().all()


def test_eq_2_and_3_by_hand():
    kl = torch.full((2, 8), 0.5)
    got = returns_to_go(tensor([1.0, 2.0]), MASK, kl, kl_coef=0.2)  # -0.1 a token
    assert torch.allclose(got[0], tensor([0, 0.6, 0.7, 0, 0, 0.8, 0.9, 0]))
    assert torch.allclose(got[1], tensor([0, 1.9, 0, 0, 0, 0, 0, 0]))


def test_eq_3_the_return_of_the_first_turn_equals_that_of_the_last():
    got = returns_to_go(tensor([3.0, -2.0]), MASK)
    assert set(got[0][MASK[0]].tolist()) == {3.0} and got[~MASK].abs().sum() == 0


def test_eq_3_kl_on_injected_tokens_contributes_nothing():
    kl = torch.zeros(2, 8)
    quiet = returns_to_go(tensor([1.0, 1.0]), MASK, kl, 0.5)
    kl[~MASK] = 1e6
    assert torch.equal(returns_to_go(tensor([1.0, 1.0]), MASK, kl, 0.5), quiet)


def test_eq_4_by_hand():
    rewards = tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0]], dtype=torch.double)
    assert torch.equal(centre(rewards)[0], tensor([0.5, -0.5, -0.5, 0.5]).double())
    standardized = standardize(rewards)
    std = math.sqrt(4 * 0.25 / 3)  # of a sample: n - 1
    expected = tensor([0.5, -0.5, -0.5, 0.5]).double() / std
    assert torch.allclose(standardized[0], expected, atol=1e-5)
    assert standardized[1].abs().sum() == 0


def test_eq_4_dr_grpo_leaves_the_deviation_in_and_skips_eq_5():
    rewards = tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 6.0]], dtype=torch.double)
    got = estimate_advantages("dr_grpo", rewards, torch.ones(8, 1))
    assert got[:, 0].tolist() == [0.5, -0.5, -0.5, 0.5, -1, -1, -1, 3]


@given(st.floats(-3, 3, allow_nan=False), st.integers(2, 16))
def test_eq_4_equal_rewards_give_exactly_zero(reward, samples):
    """Three times 0.1 do not average to 0.1; eps would make a false advantage of the rounding."""
    rewards = torch.full((1, samples), reward, dtype=torch.double)
    assert centre(rewards).abs().max() == 0
    assert standardize(rewards).abs().max() == 0


def test_eq_5_by_hand():
    got = normalize(
        tensor([[0.0, 1.0, 1.0, 9.0], [0.0, 4.0, 9.0, 9.0]]), tensor([[0, 1, 1, 0], [0, 1, 0, 0]])
    )
    # values 1, 1, 4: mean 2, variance 2
    assert torch.allclose(got, tensor([[0, -1, -1, 0], [0, 2, 0, 0]]) / math.sqrt(2))


@given(st.floats(-3, 3, allow_nan=False), st.integers(1, 8))
def test_eq_5_equal_rewards_give_exactly_zero(reward, groups):
    """The mean of 2/3 and 2/3 and so on is not 2/3, and the deviation of the rounding not 0."""
    rewards = torch.full((groups, 8), reward, dtype=torch.double)
    for algorithm in ALGORITHMS:
        mask = torch.ones(groups * 8, 5)
        assert estimate_advantages(algorithm, rewards, mask).abs().max() == 0


def test_reinforce_pp_end_to_end_by_hand():
    got = estimate_advantages("reinforce++", tensor([[1.0], [-2.0]]), MASK)
    mean, std = (4 * 1 - 2) / 5, math.sqrt(4 / 5 * 1 + 4 / 5 - (2 / 5) ** 2)
    assert torch.allclose(got[0][MASK[0]], torch.full((4,), (1 - mean) / std))
    assert got[1, 1].item() == pytest.approx((-2 - mean) / std)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_degenerate_batches_have_defined_advantages(algorithm):
    for rewards in (torch.ones(2, 1), torch.ones(1, 2), tensor([[1.0, 0.0]])):
        for mask in (MASK, torch.zeros_like(MASK)):
            assert estimate_advantages(algorithm, rewards, mask).isfinite().all()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_inputs_are_not_mutated(algorithm):
    rewards, mask, kl = tensor([[1.0, 0.0]]), MASK.clone(), torch.rand(2, 8)
    before = rewards.clone(), mask.clone(), kl.clone()
    estimate_advantages(algorithm, rewards, mask, kl, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(before, (rewards, mask, kl), strict=True))


# --------------------------------------------------------------------------------------------------
# Loss


def test_eq_6_by_hand():
    log = lambda *x: tensor([math.log(v) for v in x])  # noqa: E731
    old, new = log(0.5, 0.5, 0.5, 0.5), log(0.75, 0.75, 0.25, 0.5)
    loss, clipped = policy_loss(new, old, tensor([1.0, -1.0, -1.0, 2.0]))
    # ratios 1.5, 1.5, 0.5, 1: the clip decides only where it makes the objective smaller
    assert torch.allclose(loss, tensor([-1.2, 1.5, 0.8, -2.0]))
    assert clipped.tolist() == [True, False, True, False]


def test_eq_6_the_upper_end_of_the_clip_may_be_higher():
    ratios = tensor([1.5, 1.25, 0.5])
    loss, clipped = policy_loss(
        ratios.log(), torch.zeros(3), tensor([1.0, 1.0, -1.0]), clip_eps=0.2, clip_eps_high=0.28
    )
    assert torch.allclose(loss, tensor([-1.28, -1.25, 0.8]))
    assert clipped.tolist() == [True, False, True]


def test_eq_6_on_policy_gradient_is_the_policy_gradient():
    log_probs = tensor([-1.0, -2.0], requires_grad=True)
    policy_loss(log_probs, log_probs.detach(), tensor([3.0, -1.0]))[0].sum().backward()
    assert log_probs.grad.tolist() == [-3.0, 1.0]


def test_eq_6_far_apart_stays_finite():
    log_probs = tensor([0.0, -500.0], requires_grad=True)
    loss, _ = policy_loss(log_probs, tensor([-500.0, 0.0]), tensor([-1.0, 1.0]))
    loss.sum().backward()
    assert loss.isfinite().all() and log_probs.grad.isfinite().all()


def test_eq_7_by_hand():
    old = tensor([-1.0, -1.0, -1.0], requires_grad=True)
    sampler = tensor(
        [-1.0 - math.log(1.5), -1.0 + math.log(8), -9.0]
    )  # weights 1.5, 1/8 -> 1/2, e^8 -> 2
    loss, _ = policy_loss(old, old, torch.ones(3), sampler_log_probs=sampler, sampler_clip=2.0)
    assert torch.allclose(loss, -tensor([1.5, 0.5, 2.0]))


def test_the_ratio_of_a_sequence_is_the_geometric_mean_over_its_own_tokens():
    mask = tensor([[0, 1, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    ratios = tensor([[9.0, 2.0, 8.0, 9.0], [9.0, 9.0, 9.0, 9.0]])
    got = sequence_ratio(ratios.log(), torch.zeros(2, 4), mask)
    assert got.tolist() == pytest.approx([4.0, 1.0])


# --------------------------------------------------------------------------------------------------
# Log-probabilities


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunked_log_probs_equal_the_straightforward_way(chunk, temperature):
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True)
    targets, upstream = torch.randint(11, (7,)), torch.randn(7)
    got = token_log_probs(hidden, weight, targets, temperature, chunk)
    got.backward(upstream)
    grads = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    expected = (hidden @ weight.T / temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    expected.backward(upstream)
    assert torch.allclose(got, expected, atol=1e-5)
    assert torch.allclose(grads[0], hidden.grad, atol=1e-5) and torch.allclose(
        grads[1], weight.grad, atol=1e-5
    )


def test_no_action_tokens_give_an_empty_result_with_a_gradient():
    hidden = torch.randn(0, 5, requires_grad=True)
    token_log_probs(hidden, torch.randn(11, 5), torch.zeros(0, dtype=torch.long)).sum().backward()
    assert hidden.grad.shape == (0, 5)
