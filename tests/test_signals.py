"""Each signal against a value computed by hand."""

import pytest
import torch
from torch import tensor

import signals
from rollout import Episode


def episode(log_probs, em=1, failed_rule=None) -> Episode:
    """An episode with a token of prompt, the sampled tokens and a token of documents."""
    e = Episode({}, [1])
    e.add("prompt", [1], "")
    e.add("policy", [2] * len(log_probs), "", log_probs)
    e.add("documents", [3], "")
    e.rewards = {"em": em, "failed_rule": failed_rule}
    return e


def test_entropy_is_the_mean_over_the_sampled_tokens_of_all_episodes():
    got = signals.of_episodes([episode([-1.0, -2.0]), episode([-6.0])])
    assert got == {"entropy": 3.0}
    assert signals.of_episodes([episode([])]) == {}


def test_signals_of_advantages():
    rewards = tensor([[1.0, 1.0], [0.1, 0.1], [0.0, 1.0], [2.0, 2.0]])
    advantages = tensor([[0.0, 2.0, 4.0], [9.0, 6.0, 9.0]])
    mask = tensor([[0, 1, 1], [0, 1, 0]], dtype=torch.bool)  # 2, 4, 6: variance 8 / 3
    got = signals.of_advantages(rewards, advantages, mask)
    assert got["advantages_std"] == pytest.approx((8 / 3) ** 0.5)
    assert got["frac_reward_zero_std"] == 0.75


def test_a_batch_without_tokens_or_groups_has_no_signal():
    assert signals.of_advantages(torch.ones(2, 1), torch.zeros(2, 3), torch.zeros(2, 3) > 0) == {}


def test_signals_of_the_sampler():
    gap = [0.01 * number for number in range(101)]  # ratios up to e
    signed = tensor(gap, dtype=torch.double) * tensor([1, -1] * 50 + [1])
    got = signals.of_sampler(signed, sampler_clip=2.0)
    assert got["sampler_gap"] == pytest.approx(0.5)
    assert got["sampler_gap_p99"] == pytest.approx(0.99)
    assert got["sampler_clip_frac"] == pytest.approx(31 / 101)  # above log 2 = .693: .70 to 1.00
    assert "sampler_clip_frac" not in signals.of_sampler(signed, sampler_clip=0.0)


def sequence(e: Episode) -> dict:
    return {"token_ids": e.token_ids, "action_mask": e.action_mask}


def test_the_probe_holds_the_first_right_trajectories_and_never_changes_again(monkeypatch):
    monkeypatch.setattr(signals, "PROBE_SIZE", 3)
    right = [episode([-1.0] * (number + 1)) for number in range(5)]
    wrong = [episode([-9.0], em=0), episode([-9.0], failed_rule="one_think")]
    probe = signals.extend_probe([], [right[0], *wrong, right[1]])
    assert probe == [sequence(e) for e in right[:2]]
    whole = signals.extend_probe(probe, right[2:])
    assert whole == [sequence(e) for e in right[:3]]
    assert signals.extend_probe(whole, right) == whole


def evaluations(*log_probs, rewards=None) -> list[dict]:
    """Evaluations every second step; None where the probe was not whole."""
    found = []
    for number, value in enumerate(log_probs):
        metrics = {"step": 2 * number + 2, "eval_reward": rewards[number] if rewards else 0.0}
        if value is not None:
            metrics["log_prob_right"] = value
        found = signals.note_evaluation(found, metrics | {"f1": 0.5})
    return found


def test_what_an_evaluation_keeps():
    assert evaluations(None, -1.0) == [
        {"step": 2, "eval_reward": 0.0},
        {"step": 4, "eval_reward": 0.0, "log_prob_right": -1.0},
    ]
    assert signals.note_evaluation([], {"step": 1, "reward": 1.0}) == []


def test_the_best_evaluation_is_the_first_with_the_highest_reward():
    found = evaluations(None, None, None, rewards=[-1.0, 0.5, 0.5])
    assert signals.best_evaluation(found)["step"] == 4
    assert signals.best_evaluation([]) is None


@pytest.mark.parametrize(
    ("log_probs", "collapsed"),
    [
        ([-1.0, -1.6, -1.7], True),
        ([None, -1.0, -1.6, -1.7], True),
        ([-1.0, -1.6, -1.4], False),  # came back
        ([-1.0, -1.4, -1.6], False),  # for one evaluation
        ([-1.0, -1.5, -1.5], False),  # not more than the drop
        ([-1.0, -0.2, -1.0, -1.0], True),
        ([-1.6], False),
        ([None, None], False),
        ([], False),
    ],
)
def test_a_collapse_is_a_drop_of_half_a_nat_that_stays_for_two_evaluations(log_probs, collapsed):
    found = evaluations(*log_probs)
    assert bool(signals.find_collapse(found, drop=0.5, count=2)) == collapsed
    assert not signals.find_collapse(found, drop=0.0, count=2)


def test_the_message_of_a_collapse_names_signal_step_and_values():
    message = signals.find_collapse(evaluations(-1.0, -1.6, -1.75), drop=0.5, count=2)
    assert message.startswith("log_prob_right is -1.75 at step 6")
    assert "more than 0.5 below its best, -1.00" in message
