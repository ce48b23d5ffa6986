"""Every equation against numbers computed by hand, and packing against separate sequences."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor
from transformers import LlamaConfig, LlamaForCausalLM

from reinforce_pp import (
    ALGORITHMS,
    advantages,
    group_baseline,
    kl_estimate,
    normalize,
    pack,
    plan_micro_batches,
    policy_loss,
    returns_to_go,
    token_log_probs,
)

MASK = tensor([[0, 1, 1, 0, 0, 1, 1, 0], [0, 1, 0, 0, 0, 0, 0, 0]], dtype=torch.bool)  # two turns; one action


# ---------------------------------------------------------------------------------------------------------------------
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
    assert torch.equal(group_baseline(rewards, "reinforce++"), rewards)
    assert torch.equal(group_baseline(rewards, "reinforce++_baseline")[0], tensor([0.5, -0.5, -0.5, 0.5]).double())
    grpo = group_baseline(rewards, "grpo")
    assert torch.allclose(grpo[0], tensor([1.0, -1.0, -1.0, 1.0]).double(), atol=1e-5)
    assert grpo[1].abs().sum() == 0


@given(st.floats(-3, 3, allow_nan=False), st.integers(2, 16))
def test_eq_4_equal_rewards_give_exactly_zero(reward, samples):
    """Three times 0.1 do not average to 0.1: without care, eps blows the rounding up to a false advantage."""
    rewards = torch.full((1, samples), reward, dtype=torch.double)
    for algorithm in ("grpo", "reinforce++_baseline"):
        assert group_baseline(rewards, algorithm).abs().max() == 0


def test_eq_5_by_hand():
    got = normalize(tensor([[0.0, 1.0, 1.0, 9.0], [0.0, 4.0, 9.0, 9.0]]), tensor([[0, 1, 1, 0], [0, 1, 0, 0]]))
    # values 1, 1, 4: mean 2, variance 2
    assert torch.allclose(got, tensor([[0, -1, -1, 0], [0, 2, 0, 0]]) / math.sqrt(2))


def test_reinforce_pp_end_to_end_by_hand():
    got = advantages(tensor([[1.0], [-2.0]]), MASK, "reinforce++")
    mean, std = (4 * 1 - 2) / 5, math.sqrt(4 / 5 * 1 + 4 / 5 - (2 / 5) ** 2)
    assert torch.allclose(got[0][MASK[0]], torch.full((4,), (1 - mean) / std))
    assert got[1, 1].item() == pytest.approx((-2 - mean) / std)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_degenerate_batches_have_defined_advantages(algorithm):
    for rewards in (torch.ones(2, 1), torch.ones(1, 2), tensor([[1.0, 0.0]])):
        for mask in (MASK, torch.zeros_like(MASK)):
            assert advantages(rewards, mask, algorithm).isfinite().all()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_inputs_are_not_mutated(algorithm):
    rewards, mask, kl = tensor([[1.0, 0.0]]), MASK.clone(), torch.rand(2, 8)
    before = rewards.clone(), mask.clone(), kl.clone()
    advantages(rewards, mask, algorithm, kl, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(before, (rewards, mask, kl), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Loss


def test_eq_6_by_hand():
    log = lambda *x: tensor([math.log(v) for v in x])  # noqa: E731
    old, new = log(0.5, 0.5, 0.5, 0.5), log(0.75, 0.75, 0.25, 0.5)
    loss, clipped = policy_loss(new, old, tensor([1.0, -1.0, -1.0, 2.0]))
    # ratios 1.5, 1.5, 0.5, 1: the clip decides only where it makes the objective smaller
    assert torch.allclose(loss, tensor([-1.2, 1.5, 0.8, -2.0]))
    assert clipped.tolist() == [True, False, True, False]


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
    sampler = tensor([-1.0 - math.log(1.5), -1.0 + math.log(8), -9.0])  # weights 1.5, 1/8 -> 1/2, e^8 -> 2
    loss, _ = policy_loss(old, old, torch.ones(3), sampler_log_probs=sampler, sampler_clip=2.0)
    assert torch.allclose(loss, -tensor([1.5, 0.5, 2.0]))


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities and packing


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
    assert torch.allclose(grads[0], hidden.grad, atol=1e-5) and torch.allclose(grads[1], weight.grad, atol=1e-5)


def test_no_action_tokens_give_an_empty_result_with_a_gradient():
    hidden = torch.randn(0, 5, requires_grad=True)
    token_log_probs(hidden, torch.randn(11, 5), torch.zeros(0, dtype=torch.long)).sum().backward()
    assert hidden.grad.shape == (0, 5)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    )


def run_packed(model, rows):
    """Log-probabilities of the action tokens and the gradient of their weighted sum."""
    model.zero_grad()
    batch = pack(rows)
    source, targets = batch.pop("source"), batch.pop("targets")
    hidden = model.model(**batch).last_hidden_state.flatten(0, 1)[source]
    log_probs = token_log_probs(hidden, model.lm_head.weight, targets)
    (log_probs * torch.arange(1, len(log_probs) + 1)).sum().backward()
    return log_probs.detach(), [p.grad.clone() for p in model.parameters()]


continuation = st.lists(st.tuples(st.integers(0, 49), st.integers(0, 1)), min_size=0, max_size=9)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 49), min_size=1, max_size=6), st.lists(continuation, min_size=1, max_size=4))
def test_a_shared_prompt_changes_neither_values_nor_gradients(model, prompt, continuations):
    sequences = [(prompt + [t for t, _ in c], [0] * len(prompt) + [a for _, a in c], len(prompt)) for c in continuations]
    if not any(a for _, mask, _ in sequences for a in mask):
        return
    shared, shared_grads = run_packed(model, [sequences])
    apart, apart_grads = run_packed(model, [[sequence] for sequence in sequences])
    assert torch.allclose(shared, apart, atol=1e-5)
    for a, b in zip(shared_grads, apart_grads, strict=True):
        assert torch.allclose(a, b, atol=1e-3)


def test_packed_log_probs_are_those_of_the_plain_model(model):
    ids, mask = [3, 1, 4, 1, 5, 9, 2], [0, 0, 1, 0, 1, 1, 0]
    expected = model(tensor([ids])).logits[0].log_softmax(-1)
    got, _ = run_packed(model, [[(ids, mask, 2), (ids[:4], mask[:4], 2)], [(ids, mask, 2)]])
    by_hand = [expected[t - 1, ids[t]].item() for t in (2, 4, 5)]
    assert got.tolist() == pytest.approx([*by_hand, by_hand[0], *by_hand], abs=1e-5)


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 80)), min_size=1, max_size=24),
    st.integers(1, 4),
    st.integers(50, 400),
    st.data(),
)
def test_a_plan_holds_every_sequence_once_within_the_budget(sizes, samples, budget, data):
    sizes = [sizes[i // samples * samples] for i in range(len(sizes))]  # `samples` in a row share their prompt
    lengths = [(prompt, prompt + i % 7 + rest) for i, (prompt, rest) in enumerate(sizes)]
    chosen = data.draw(st.lists(st.sampled_from(range(len(lengths))), unique=True).map(sorted))
    plan = plan_micro_batches(lengths, chosen, samples, budget)
    assert sorted(i for batch in plan for row in batch for i in row) == chosen
    for batch in plan:
        widths = [lengths[row[0]][0] + sum(lengths[i][1] - lengths[i][0] for i in row) for row in batch]
        assert max(widths) * len(batch) <= budget or (len(batch) == 1 and len(batch[0]) == 1)
        assert all(len({i // samples for i in row}) == 1 for row in batch)
