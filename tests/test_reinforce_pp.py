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
    MAX_SHARED_ROW,
    centre,
    estimate_advantages,
    grpo,
    kl_estimate,
    normalize,
    pack,
    plan_micro_batches,
    policy_loss,
    returns_to_go,
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
    one_action_each = torch.ones(8, 1)
    standardized = grpo(rewards, one_action_each, None, 0.0)
    std = math.sqrt(4 * 0.25 / 3)  # of a sample: n - 1
    expected = tensor([0.5, -0.5, -0.5, 0.5]).double() / std
    assert torch.allclose(standardized[:4, 0], expected, atol=1e-5)
    assert standardized[4:].abs().sum() == 0


@given(st.floats(-3, 3, allow_nan=False), st.integers(2, 16))
def test_eq_4_equal_rewards_give_exactly_zero(reward, samples):
    """Three times 0.1 do not average to 0.1; eps would make a false advantage of the rounding."""
    rewards = torch.full((1, samples), reward, dtype=torch.double)
    assert centre(rewards).abs().max() == 0
    assert grpo(rewards, torch.ones(samples, 1), None, 0.0).abs().max() == 0


def test_eq_5_by_hand():
    got = normalize(
        tensor([[0.0, 1.0, 1.0, 9.0], [0.0, 4.0, 9.0, 9.0]]), tensor([[0, 1, 1, 0], [0, 1, 0, 0]])
    )
    # values 1, 1, 4: mean 2, variance 2
    assert torch.allclose(got, tensor([[0, -1, -1, 0], [0, 2, 0, 0]]) / math.sqrt(2))


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


# --------------------------------------------------------------------------------------------------
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
    assert torch.allclose(grads[0], hidden.grad, atol=1e-5) and torch.allclose(
        grads[1], weight.grad, atol=1e-5
    )


def test_no_action_tokens_give_an_empty_result_with_a_gradient():
    hidden = torch.randn(0, 5, requires_grad=True)
    token_log_probs(hidden, torch.randn(11, 5), torch.zeros(0, dtype=torch.long)).sum().backward()
    assert hidden.grad.shape == (0, 5)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
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


# Token ids and action mask of a sequence; few different tokens make common prefixes frequent.
SEQUENCES = st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=2, max_size=9)


@settings(max_examples=40, deadline=None)
@given(st.lists(SEQUENCES, min_size=1, max_size=4), st.integers(0, 9))
def test_a_common_prefix_changes_neither_values_nor_gradients(model, drawn, instructions):
    """Nor does a prefix that reaches into what the policy sampled."""
    sequences = []
    for tokens in drawn:
        ids = [7] * instructions + [token for token, _ in tokens]
        mask = [0] * (instructions + 1) + [int(acted) for _, acted in tokens[1:]]
        sequences.append((ids, mask))
    if not any(acted for _, mask in sequences for acted in mask):
        return
    shared, shared_grads = run_packed(model, [sequences])
    apart, apart_grads = run_packed(model, [[sequence] for sequence in sequences])
    assert torch.allclose(shared, apart, atol=1e-5)
    for a, b in zip(shared_grads, apart_grads, strict=True):
        assert torch.allclose(a, b, atol=1e-3)


def test_packed_log_probs_are_those_of_the_plain_model(model):
    ids, mask = [3, 1, 4, 1, 5, 9, 2], [0, 0, 1, 0, 1, 1, 0]
    expected = model(tensor([ids])).logits[0].log_softmax(-1)
    other = [3, 1, 7, 7]
    got, _ = run_packed(model, [[(ids, mask), (other, mask[:4])], [(ids, mask)]])
    by_hand = [expected[t - 1, ids[t]].item() for t in (2, 4, 5)]
    assert got.tolist() == pytest.approx([*by_hand, expected[1, 7].item(), *by_hand], abs=1e-5)


def test_a_shared_row_computes_the_prefix_once():
    batch = pack([[([1, 2, 3, 4, 5], [0, 0, 0, 1, 1]), ([1, 2, 6, 7, 8], [0, 0, 0, 1, 1])]])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 6, 7]]  # the last action is never read
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 2, 3]]
    assert batch["source"].tolist() == [2, 3, 4, 5] and batch["targets"].tolist() == [4, 5, 7, 8]
    first_of_second = batch["attention_mask"][0, 0, 4]
    assert first_of_second.tolist() == [True, True, False, False, True, False]


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 60), st.integers(1, 80)), max_size=24),
    st.integers(50, 400),
)
def test_a_plan_holds_every_sequence_once_within_the_budget(drawn, budget):
    """Drawn are (question, length of its prompt, length of the rest)."""
    sequences = {}
    for number, (question, prompt, rest) in enumerate(drawn):
        sequences[10 * number] = [question] * prompt + [100 + number] * rest
    plan = plan_micro_batches(sequences, budget)
    planned = sorted(index for rows in plan for row in rows for index in row)
    assert planned == list(sequences)
    for rows in plan:
        packed = []
        for row in rows:
            packed.append([(sequences[i], [0] * len(sequences[i])) for i in row])
            # `pack` leaves the tokens after the last action out; with an action at the end:
            packed[-1] = [([*ids, 0], [0] * len(ids) + [1]) for ids, _ in packed[-1]]
        computed = pack(packed)["input_ids"]
        is_one_sequence = len(rows) == 1 and len(rows[0]) == 1
        assert computed.numel() <= budget or is_one_sequence
        assert computed.shape[1] <= MAX_SHARED_ROW or all(len(row) == 1 for row in rows)


def test_a_micro_batch_is_of_shared_rows_or_of_plain_rows():
    """One shared row would give all rows of its micro-batch a dense mask."""
    shared = {i: [1] * 50 + [i] * 20 for i in range(2)}
    plain = {10 + i: [10 + i] * (60 + 20 * i) for i in range(3)}
    assert plan_micro_batches(shared | plain, 10_000) == [[[0, 1]], [[12], [11], [10]]]


def test_samples_of_one_question_share_a_row_and_unlike_sequences_do_not():
    alike = {i: [1] * 50 + [i] * 20 for i in range(4)}
    assert plan_micro_batches(alike, 2000) == [[[0, 1, 2, 3]]]
    unlike = {i: [i] * 70 for i in range(4)}
    assert plan_micro_batches(unlike, 2000) == [[[0], [1], [2], [3]]]
