"""Packing against separate sequences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor
from transformers import LlamaConfig, LlamaForCausalLM

from packing import MAX_SHARED_ROW, pack, plan_micro_batches
from reinforce_pp import token_log_probs


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
    source, targets, actions = (batch.pop(name) for name in ("source", "targets", "actions"))
    hidden = model.model(**batch).last_hidden_state.flatten(0, 1)[source]
    log_probs = token_log_probs(hidden, model.lm_head.weight, targets)[actions]
    (log_probs * torch.arange(1, len(log_probs) + 1)).sum().backward()
    return log_probs.detach(), [p.grad.clone() for p in model.parameters()]


# Token ids and action mask of a sequence; few different tokens make common prefixes frequent.
SEQUENCES = st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=2, max_size=9)


@settings(max_examples=40, deadline=None)
@given(st.lists(SEQUENCES, min_size=1, max_size=6), st.integers(0, 9), st.booleans())
def test_sharing_changes_neither_values_nor_gradients(model, drawn, instructions, is_sorted):
    """Whatever the order of the sequences, and where they share what the policy sampled."""
    sequences = []
    for tokens in drawn:
        ids = [7] * instructions + [token for token, _ in tokens]
        mask = [0] * (instructions + 1) + [int(acted) for _, acted in tokens[1:]]
        sequences.append((ids, mask))
    if is_sorted:
        sequences.sort()
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


def test_a_sequence_that_adds_nothing_costs_the_next_one_nothing():
    """One without an action, or one that ended after documents that the others go on from."""
    ids, short = [1] * 20, [0] * 5 + [1] + [0] * 14
    sequences = [([*ids, 2, 3], [0] * 21 + [1]), (ids, short), ([*ids, 4, 5], [0] * 21 + [1])]
    assert pack([sequences])["input_ids"].shape == (1, 22)  # 20 + 1 + 1
    sequences[1] = (ids, [0] * 20)
    assert pack([sequences])["input_ids"].shape == (1, 22)


def test_what_begins_alike_is_computed_once():
    mask = [0, 0, 0, 1, 1]
    row = [([1, 2, 3, 4, 5], mask), ([1, 2, 6, 7, 8], mask), ([1, 2, 6, 9, 8], mask)]
    batch = pack([[*row, row[-1]]])
    # The last action is never read. The third sequence shares a token with the second that it does
    # not share with the first, and the fourth is the third.
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 6, 7, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 2, 3, 3]]
    assert batch["source"].tolist() == [2, 3, 4, 5, 4, 6]
    assert batch["targets"].tolist() == [4, 5, 7, 8, 9, 8]
    assert batch["actions"].tolist() == [0, 1, 2, 3, 4, 5, 4, 5]
    visible = [row.nonzero().flatten().tolist() for row in batch["attention_mask"][0, 0]]
    assert visible[:4] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
    assert visible[4:] == [[0, 1, 4], [0, 1, 4, 5], [0, 1, 4, 6]]


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 60), st.integers(1, 80)), max_size=24),
    st.integers(50, 400),
    st.integers(1, 5),
)
def test_a_plan_holds_every_sequence_once_within_the_budget(drawn, budget, ranks):
    """Drawn are (question, length of its prompt, length of the rest)."""
    sequences = {}
    for number, (question, prompt, rest) in enumerate(drawn):
        sequences[10 * number] = [question] * prompt + [100 + number] * rest
    plan = plan_micro_batches(sequences, budget, ranks)
    assert len(plan) % ranks == 0
    assert all(plan) or max(map(len, plan)) == 1  # no rank idles while another could be relieved
    planned = sorted(index for rows in plan for row in rows for index in row)
    assert planned == list(sequences)
    for rows in filter(None, plan):
        packed = []
        for row in rows:
            # `pack` leaves out what follows the last action, so that each gets one at its end.
            packed.append([([*sequences[i], 0], [0] * len(sequences[i]) + [1]) for i in row])
        computed = pack(packed)["input_ids"]
        is_one_sequence = len(rows) == 1 and len(rows[0]) == 1
        assert computed.numel() <= budget or is_one_sequence
        assert computed.shape[1] <= MAX_SHARED_ROW or all(len(row) == 1 for row in rows)


def test_a_micro_batch_is_of_shared_rows_or_of_plain_rows():
    """One shared row would give all rows of its micro-batch a dense mask."""
    shared = {i: [1] * 50 + [i] * 20 for i in range(2)}
    plain = {10 + i: [10 + i] * (60 + 20 * i) for i in range(3)}
    assert plan_micro_batches(shared | plain, 10_000) == [[[12], [11], [10]], [[0, 1]]]


def test_ranks_share_what_would_fit_into_one_micro_batch():
    sequences = {i: [i] * (70 - i) for i in range(6)}
    assert plan_micro_batches(sequences, 1000) == [[[0], [1], [2], [3], [4], [5]]]
    assert plan_micro_batches(sequences, 1000, 2) == [[[0], [1], [2]], [[3], [4], [5]]]
    assert [len(rows) for rows in plan_micro_batches(sequences, 1000, 4)] == [2, 2, 1, 1]
    assert sorted(map(len, plan_micro_batches(sequences, 1000, 8))) == [0, 0, 1, 1, 1, 1, 1, 1]


def test_the_row_of_a_sequence_is_that_of_what_begins_most_like_it():
    one, other = [1] * 50, [1] * 40 + [2] * 30
    sequences = {0: [*other, 5], 1: [*one, 6], 2: [*other, 7], 3: [*one, 8], 4: [*other, 5]}
    # A row of both kinds would hold 83 tokens or more.
    assert plan_micro_batches(sequences, 74) == [[[0, 4, 2]], [[1, 3]]]


def test_a_sequence_adds_to_its_row_what_it_does_not_share_with_the_one_before():
    begins = [1] * 40
    sequences = {0: begins + [2] * 30}
    sequences |= {i: begins + [3] * 20 + [i + 3] * 10 for i in (1, 2)}
    assert plan_micro_batches(sequences, 110) == [[[0, 1, 2]]]  # 70 + 30 + 10
    assert plan_micro_batches(sequences, 109) == [[[0, 1]], [[2]]]


def test_samples_of_one_question_share_a_row_and_unlike_sequences_do_not():
    alike = {i: [1] * 50 + [i] * 20 for i in range(4)}
    assert plan_micro_batches(alike, 2000) == [[[0, 1, 2, 3]]]
    unlike = {i: [i] * 70 for i in range(4)}
    assert plan_micro_batches(unlike, 2000) == [[[0], [1], [2], [3]]]
    more_than_half_is_new = {i: [1] * 30 + [i + 5] * 40 for i in range(2)}
    assert plan_micro_batches(more_than_half_is_new, 2000) == [[[0], [1]]]
