"""The loop: gradients on one and two ranks, updates, whole runs with both engines."""

import dataclasses
import json
import math
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gradients import make_episodes
from tiny import command, launch, metrics_of, state_of
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import checkpoint
import evaluate
import packing
import policy
import reinforce_pp
import signals
import train
from checkpoint import Progress
from config import Config
from engine import TransformersEngine, VLLMEngine
from reward import TAGS
from rollout import Episode, Limits, Rollout
from sampler import Sampler, questions_of_step

HERE = Path(__file__).parent
CPU = torch.device("cpu")


def load_plain(model_folder):
    """The policy in fp32, without FSDP."""
    lm = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    plain = policy.Policy(lm)
    plain.begin_micro_batch = lambda is_last: None  # it is FSDP's
    return plain


@pytest.fixture
def plain_trainer(model_folder):
    """Make a trainer of the plain policy; options over those of the configuration."""
    policy.start_distributed()

    def make(**options):
        defaults = {"samples_per_prompt": 3, "sampler_clip": 0.0, "micro_batch_tokens": 10_000}
        return train.Trainer(Config(**defaults | options), load_plain(model_folder))

    return make


def gradients_of(trainer, episodes, everyone_has_gradient=False):
    """fp32 gradients of one optimiser step over all episodes, and the batch."""
    trainer.policy.zero_grad()
    batch = train.make_batch(episodes, trainer.config.samples_per_prompt, CPU)
    trainer.compute_advantages(batch)
    if everyone_has_gradient:
        batch.with_gradient = list(range(len(episodes)))
    trainer.backward(batch, batch.with_gradient, batch.loss_mask.sum())
    return [p.grad.clone() for p in trainer.policy.parameters()], batch


def rows_of(trainer, batch):
    micro_batches = trainer.plan(batch, list(range(len(batch.episodes))))
    return [row for rows in micro_batches for row in rows], len(micro_batches)


def assert_same(a, b, tolerance=1e-6):
    for x, y in zip(a, b, strict=True):
        assert torch.allclose(x, y, atol=tolerance, rtol=1e-4)


# --------------------------------------------------------------------------------------------------
# Gradients


def test_the_gradient_does_not_depend_on_the_split_into_micro_batches(plain_trainer):
    """A mean of micro-batch means would weigh tokens of short micro-batches more."""
    episodes = make_episodes(3, 3)
    whole, batch = gradients_of(few := plain_trainer(), episodes)
    assert rows_of(few, batch)[1] <= 2
    split, batch = gradients_of(many := plain_trainer(micro_batch_tokens=100), episodes)
    assert rows_of(many, batch)[1] >= 5
    assert_same(whole, split)


def test_the_gradient_does_not_depend_on_sharing_a_prefix(plain_trainer, monkeypatch):
    episodes = make_episodes(3, 3)
    trainer = plain_trainer(algorithm="grpo")
    shared, batch = gradients_of(trainer, episodes)
    assert any(len(row) > 1 for row in rows_of(trainer, batch)[0])
    monkeypatch.setattr(packing, "MAX_SHARED_ROW", 0)
    apart, batch = gradients_of(trainer, episodes)
    assert all(len(row) == 1 for row in rows_of(trainer, batch)[0])
    assert_same(shared, apart)


def test_leaving_out_what_has_no_gradient_is_exact(plain_trainer):
    """The last group's rewards are equal: not computed, but its tokens are in the denominator."""
    episodes, trainer = make_episodes(3, 3), plain_trainer(algorithm="grpo")
    skipped, batch = gradients_of(trainer, episodes)
    assert batch.with_gradient == [0, 1, 2, 3, 4, 5]
    everything, _ = gradients_of(trainer, episodes, everyone_has_gradient=True)
    assert_same(skipped, everything)


def test_the_gradient_is_that_of_the_formula(model_folder, plain_trainer):
    """Eq. 8 for GRPO, written again with the plain model: no packing, chunks or micro-batches."""
    episodes = make_episodes(2, 3)
    got, _ = gradients_of(plain_trainer(algorithm="grpo", temperature=0.8), episodes)
    model = load_plain(model_folder).lm
    loss, tokens = 0.0, 0
    for group in (episodes[:3], episodes[3:]):
        rewards = torch.tensor([e.rewards["reward"] for e in group])
        for episode, reward in zip(group, rewards, strict=True):
            advantage = (reward - rewards.mean()) / (rewards.std() + 1e-6)
            log_probs = (model(torch.tensor([episode.token_ids])).logits[0] / 0.8).log_softmax(-1)
            for t, acted in enumerate(episode.action_mask):
                if acted:
                    loss = loss - advantage * log_probs[t - 1, episode.token_ids[t]]
                    tokens += 1
    (loss / tokens).backward()
    assert_same(got, [p.grad for p in model.parameters()], 1e-5)


@pytest.mark.parametrize("case", ["many", "one", "checkpointing"])
def test_one_rank_and_two_ranks_give_the_same_gradients(case, model_folder, tmp_path):
    """The same global batch; with an odd number of micro-batches, and with a rank that has none."""
    results = []
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}.pt"
        result = launch(ranks, str(HERE / "gradients.py"), model_folder, str(out), case)
        assert out.exists(), result.stderr[-3000:]
        results.append(torch.load(out, weights_only=True))
    one, two = results
    assert one["micro_batches"] % 2 == 1
    assert two["micro_batches"] == (one["micro_batches"] + 1) // 2
    for name, gradient in one["gradients"].items():
        assert gradient.abs().max() > 0
        assert torch.allclose(gradient, two["gradients"][name], atol=1e-6, rtol=1e-3), name


def test_broken_off_episodes_leave_normalisation_and_denominator(plain_trainer):
    """Eqs. 5 and 8 of reinforce++ are those of a batch without them."""
    episodes = make_episodes(2, 3)
    without = [e for number, e in enumerate(episodes) if number not in (1, 4)]
    expected, _ = gradients_of(plain_trainer(samples_per_prompt=1), without)
    episodes[1].finish_reason = "length"
    episodes[4].finish_reason = "bad_query"
    episodes[5].finish_reason = "answer"
    masked, batch = gradients_of(plain_trainer(mask_truncated=True), episodes)
    assert batch.with_gradient == [0, 2, 3, 5]
    assert_same(masked, expected)
    unmasked, _ = gradients_of(plain_trainer(), episodes)
    assert not torch.allclose(unmasked[0], masked[0], atol=1e-6, rtol=1e-4)


def test_a_broken_off_episode_still_counts_in_the_baseline_of_its_group(plain_trainer):
    episodes = make_episodes(2, 3)
    _, whole = gradients_of(plain_trainer(algorithm="grpo"), episodes)
    episodes[1].finish_reason = "length"
    _, masked = gradients_of(plain_trainer(algorithm="grpo", mask_truncated=True), episodes)
    others = [0, 2, 3, 4, 5]
    assert torch.equal(masked.advantages[others], whole.advantages[others])
    assert masked.advantages[1].abs().max() == 0 < whole.advantages[1].abs().max()


def sample_from_the_policy(trainer, episodes):
    """Set the sampler's log-probabilities to those of the policy."""
    batch = train.make_batch(episodes, trainer.config.samples_per_prompt, CPU)
    log_probs = trainer.log_probs(trainer.policy, batch, batch.with_loss())
    for episode, row in zip(episodes, log_probs.tolist(), strict=True):
        episode.log_probs = row[: len(episode.token_ids)]


def test_a_sequence_far_from_the_sampler_gives_no_gradient(plain_trainer):
    episodes, trainer = make_episodes(2, 3), plain_trainer(sampler_mask=1.5)
    sample_from_the_policy(trainer, episodes)
    for number, factor in ((0, 1.4), (2, 1.6), (3, 1 / 1.4), (5, 1 / 1.6)):
        e = episodes[number]
        moved = [p - math.log(factor) for p in e.log_probs]
        e.log_probs = [m if acted else 0.0 for m, acted in zip(moved, e.action_mask, strict=True)]
    without = [e for number, e in enumerate(episodes) if number not in (2, 5)]
    expected, _ = gradients_of(plain_trainer(samples_per_prompt=1), without)
    masked, _ = gradients_of(trainer, episodes)
    assert_same(masked, expected)
    fresh = train.make_batch(episodes, 3, CPU)
    assert trainer.compute_advantages(fresh)["sampler_mask_frac"] == 2 / 6


def test_a_ratio_that_is_no_number_gives_no_gradient(plain_trainer):
    episodes, trainer = make_episodes(2, 3), plain_trainer(sampler_mask=1.5)
    sample_from_the_policy(trainer, episodes)
    episodes[0].log_probs = [math.nan] * len(episodes[0].log_probs)
    batch = train.make_batch(episodes, 3, CPU)
    trainer.compute_advantages(batch)
    assert batch.with_gradient == [1, 2, 3, 4, 5]


def test_log_prob_right_is_the_mean_over_the_tokens_of_the_probe(
    model_folder, plain_trainer, monkeypatch
):
    monkeypatch.setattr(signals, "PROBE_SIZE", 4)
    trainer, probe = plain_trainer(temperature=0.8), []
    for episode in make_episodes(2, 2):
        assert trainer.log_prob_right(probe) == {}
        probe.append({"token_ids": episode.token_ids, "action_mask": episode.action_mask})
    model, values = load_plain(model_folder).lm, []
    for record in probe:
        ids = record["token_ids"]
        log_probs = (model(torch.tensor([ids])).logits[0] / 0.8).log_softmax(-1)
        acted = [t for t, action in enumerate(record["action_mask"]) if action]
        values += [log_probs[t - 1, ids[t]].item() for t in acted]
    expected = sum(values) / len(values)
    assert trainer.log_prob_right(probe)["log_prob_right"] == pytest.approx(expected, rel=1e-4)


# --------------------------------------------------------------------------------------------------
# Updates


def test_the_warm_up_rises_linearly():
    config = Config(learning_rate=8.0, warmup=4)
    assert [train.learning_rate(config, n) for n in range(6)] == [2, 4, 6, 8, 8, 8]
    assert train.learning_rate(Config(learning_rate=2e-6), 0) == 2e-6


def test_the_first_update_of_a_warm_up_is_a_part_of_the_whole_one(world):
    """Adam's first step is in proportion to the learning rate."""
    changes = []
    for warmup in (0, 4):
        config = dataclasses.replace(world, samples_per_prompt=3, warmup=warmup)
        _, trainer, before = update(config, make_episodes(2, 3), learning_rate=1e-2)
        after = [p.full_tensor() for p in trainer.policy.parameters()]
        changes.append([a - b for a, b in zip(after, before, strict=True)])
    assert_same([change / 4 for change in changes[0]], changes[1], 1e-6)


def test_the_signals_of_an_update_by_hand(world):
    """The policy's own log-probabilities against the sampler's, over the tokens trained on."""
    episodes = make_episodes(2, 3)  # the second group's rewards are equal: GRPO trains on the first
    config = dataclasses.replace(world, samples_per_prompt=3)
    trainer = train.Trainer(config, policy.load_policy(config.model))
    batch = train.make_batch(episodes, 3, CPU)
    gap = (trainer.log_probs(trainer.policy, batch, [0, 1, 2]) - batch.sampler_log_probs)[:3]
    gap = gap[batch.action_mask[:3]].abs()
    metrics = trainer.compute_advantages(batch) | trainer.update(batch, Progress())
    assert metrics["trained_tokens"] == len(gap)
    assert metrics["sampler_gap"] == pytest.approx(gap.mean().item(), rel=1e-3)
    assert metrics["sampler_clip_frac"] == pytest.approx((gap > math.log(2)).float().mean().item())
    assert metrics["frac_reward_zero_std"] == 0.5 and "kl" not in metrics


def test_an_update_that_does_not_take_place_has_no_signals(world):
    episodes = make_episodes(2, 3)
    with_equal_rewards(episodes)
    metrics, _, _ = update(dataclasses.replace(world, samples_per_prompt=3), episodes)
    counts = {"updates", "skipped_updates", "consecutive_skipped", "trained_tokens"}
    assert metrics == dict.fromkeys(counts, 0)


def update(config, episodes, learning_rate=1.0):
    """One `update` of the sharded policy; (metrics, trainer, parameters before)."""
    sharded = policy.load_policy(config.model)
    reference = None
    if config.kl_coef:
        reference = policy.load_policy(config.model, frozen=True)
    config = dataclasses.replace(config, learning_rate=learning_rate)
    trainer = train.Trainer(config, sharded, reference)
    before = [p.full_tensor().clone() for p in sharded.parameters()]
    batch = train.make_batch(episodes, config.samples_per_prompt, CPU)
    trainer.compute_advantages(batch)
    return trainer.update(batch, Progress()), trainer, before


def test_keeping_weights_and_gradients_whole_on_one_cpu_rank_changes_no_bit(world, monkeypatch):
    """Two updates of several micro-batches, the second from the weights that the first has made."""
    config = dataclasses.replace(
        world, samples_per_prompt=3, updates_per_rollout=2, micro_batch_tokens=110
    )
    after = []
    for keeps_whole in (True, False):
        if not keeps_whole:
            monkeypatch.setattr(policy.Policy, "begin_micro_batch", lambda self, is_last: None)
        metrics, trainer, before = update(config, make_episodes(6, 3), learning_rate=1e-2)
        assert metrics["updates"] == 2
        after.append([p.full_tensor() for p in trainer.policy.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*after, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before, after[0], strict=True))


def test_a_gradient_that_is_not_finite_skips_the_update(world):
    episodes = make_episodes(2, 3)
    episodes[0].rewards = {"reward": math.nan}
    config = dataclasses.replace(world, samples_per_prompt=3)
    metrics, trainer, before = update(config, episodes)
    assert (metrics["updates"], metrics["skipped_updates"]) == (0, 1)
    assert all(math.isfinite(value) for value in metrics.values())  # NaN is not JSON
    after = [p.full_tensor() for p in trainer.policy.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_skipped_updates_in_a_row_stop_the_run_also_across_batches_and_resumes(world, monkeypatch):
    clip, nan = train.nn.utils.clip_grad_norm_, math.nan
    norms = [1, nan, 1, nan, nan, 1, 1, nan, nan, nan]  # after three in a row none is tried
    monkeypatch.setattr(train.nn.utils, "clip_grad_norm_", lambda *args: clip(*args) * norms.pop(0))
    # With a reference every update takes place.
    config = dataclasses.replace(world, kl_coef=1e-9, updates_per_rollout=3)
    train.train(config, Path("a"))
    with pytest.raises(RuntimeError, match="step 4: 3 updates in a row"):
        train.train(dataclasses.replace(config, steps=4), Path("a"), resume=True)
    counts = [(row["skipped_updates"], row["consecutive_skipped"]) for row in metrics_of("a")]
    assert counts == [(1, 0), (2, 0), (2, 2), (1, 3)]
    assert checkpoint.newest_checkpoint(Path("a/checkpoints"))[1].step == 3


def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_update_on_all(model_folder, tmp_path):
    out = tmp_path / "found.json"
    result = launch(2, str(HERE / "gradients.py"), model_folder, str(out), "nan")
    assert result.returncode == 0, result.stderr[-3000:]
    expected = {"updates": 0, "skipped_updates": 3, "changed": False}
    assert json.loads(out.read_text()) == [expected] * 2


def without_actions(episodes):
    for episode in episodes:
        episode.action_mask = [0] * len(episode.token_ids)


def with_equal_rewards(episodes):
    for episode in episodes:
        episode.rewards = {"reward": -2.0}


def as_they_are(episodes):
    pass


@pytest.mark.parametrize("algorithm", reinforce_pp.ALGORITHMS)
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize(
    ("make", "samples"),
    [(without_actions, 3), (with_equal_rewards, 3), (with_equal_rewards, 1), (as_they_are, 1)],
)
def test_degenerate_batches_leave_finite_numbers(world, make, samples, kl_coef, algorithm):
    """Nobody wrote a token; all rewards are equal, as when nobody finished; a group of one."""
    options = {"samples_per_prompt": samples, "algorithm": algorithm, "kl_coef": kl_coef}
    episodes = make_episodes(2, samples)
    make(episodes)
    metrics, trainer, _ = update(dataclasses.replace(world, **options), episodes, 1e-3)
    assert metrics["skipped_updates"] == 0
    assert all(math.isfinite(value) for value in metrics.values())
    assert all(p.full_tensor().isfinite().all() for p in trainer.policy.parameters())


# --------------------------------------------------------------------------------------------------
# The model


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 64,
}
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


def save_config(folder, model_type, options) -> str:
    config = AutoConfig.for_model(model_type, **SIZES | options)
    config.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "model_type, options",
    [
        ("mistral", {"sliding_window": 8}),
        ("phi3", {"sliding_window": 8}),
        ("starcoder2", {"sliding_window": 8}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),
        ("jamba", {}),
        ("recurrent_gemma", {}),
        ("mamba", {}),
        ("phi3", {"rope_parameters": LONGROPE}),
        ("llama", {"rope_parameters": DYNAMIC_ROPE}),
        ("gemma2", {"head_dim": 16}),
        ("granite", {"logits_scaling": 8.0}),
        ("opt", {}),
    ],
)
def test_a_model_that_the_trainer_would_compute_otherwise_is_refused(
    model_type, options, world, tmp_path
):
    folder = save_config(tmp_path / "model", model_type, options)
    with pytest.raises(ValueError, match=f"--model {folder}: .*; use another model"):
        policy.refuse_unsupported(folder, world.max_context)


@pytest.mark.parametrize(
    "model_type, options",
    [
        ("qwen2", {"use_sliding_window": False, "sliding_window": 8}),
        ("qwen3", {"head_dim": 16}),
        ("mistral", {"sliding_window": 400}),  # the whole context
        ("mistral", {"sliding_window": None}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    ],
)
def test_plain_attention_is_computed_alike_in_shared_and_in_separate_rows(
    model_type, options, world, tmp_path
):
    folder = save_config(tmp_path / "model", model_type, options)
    policy.refuse_unsupported(folder, world.max_context)
    lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    sharded = policy.shard(lm, gradient_checkpointing=False, cpu_offload=False)
    trainer = train.Trainer(dataclasses.replace(world, samples_per_prompt=3), sharded)
    episodes = make_episodes(1, 3)
    for episode in episodes:
        episode.token_ids = [token % SIZES["vocab_size"] for token in episode.token_ids]
    batch = train.make_batch(episodes, 3, CPU)
    found = []
    for rows in ([[0, 1, 2]], [[0], [1], [2]]):
        found.append(trainer.forward(sharded, batch, rows)[0])
    assert len(found[0]) == batch.action_mask.sum()
    assert (found[0] - found[1]).abs().max() < 0.02  # bf16


# --------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize("frozen", [True, False])
def test_a_pass_without_gradient_leaves_nothing_gathered(world, frozen):
    """Gathered embeddings and head would stay on every GPU, and break the next weight sync."""
    model = trainable = policy.load_policy(world.model)
    if frozen:
        model = policy.load_policy(world.model, frozen=True)
    trainer = train.Trainer(dataclasses.replace(world, samples_per_prompt=3), trainable)
    batch = train.make_batch(make_episodes(1, 3), 3, CPU)
    trainer.log_probs(model, batch, [0, 1, 2])
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


def resident_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_what_training_freed_goes_back_to_the_system():
    """A block that stays keeps all that was freed below it."""
    blocks = [bytearray(100_000) for _ in range(3000)]
    full, last = resident_mib(), blocks[-1]
    del blocks
    policy.release_memory()
    assert resident_mib() < full - 200 and len(last) == 100_000


SHAPES = """
import torch, policy
policy.start_distributed()
layer, resident = torch.nn.Linear(576, 1536, dtype=torch.bfloat16), []
for rows in range(1, 401):
    layer(torch.ones(rows, 576, dtype=torch.bfloat16)).sum().backward()
    resident.append(int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20)
print(resident[-1] - resident[49])
"""


def test_kernels_of_past_shapes_do_not_pile_up_on_a_cpu():
    """With AMX 350 shapes of this one layer take 701 MiB unless the caches are bounded."""
    command = [sys.executable, "-c", SHAPES]
    result = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    assert int(result.stdout) < 200, result.stderr


# --------------------------------------------------------------------------------------------------
# Runs


def test_every_pass_takes_every_question_once():
    questions = [{"id": i} for i in range(10)]
    drawn = []
    for step in range(5):
        drawn += [q["id"] for q in questions_of_step(questions, step, 4, seed=0)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:] != list(range(10))


def test_kl_starts_at_zero_and_several_updates_clip(world):
    options = {"kl_coef": 0.1, "updates_per_rollout": 3, "learning_rate": 5e-3}
    config = dataclasses.replace(world, algorithm="reinforce++", **options)
    train.train(config, Path("a"))
    first, *_, last = metrics_of("a")
    assert abs(first["kl"]) < 1e-3 < abs(last["kl"])
    assert first["updates"] == 3


@pytest.mark.parametrize("mode", ["k2", "k3"])
def test_kl_as_a_loss_pulls_towards_the_reference(world, mode):
    """Equal rewards leave nothing else in the loss."""
    train.train(dataclasses.replace(world, learning_rate=5e-3), Path("a"))
    config = dataclasses.replace(
        world, samples_per_prompt=3, kl_coef=1.0, kl_mode=mode, learning_rate=1e-4
    )
    reference = policy.load_policy(world.model, frozen=True)
    trainer = train.Trainer(config, policy.load_policy("a/model"), reference)
    episodes = make_episodes(2, 3)
    with_equal_rewards(episodes)
    distances = []
    for _ in range(6):
        batch = train.make_batch(episodes, 3, CPU)
        trainer.compute_advantages(batch)
        distances.append(batch.kl.square().sum().item())
        trainer.update(batch, Progress())
    assert distances[-1] < 0.9 * distances[0]


def test_evaluation_during_training_is_of_the_model_after_the_step(world):
    config = dataclasses.replace(
        world, eval_every=2, eval_questions="q.jsonl", learning_rate=0.02, reward="stage2"
    )
    train.train(config, Path("a"))
    rows = metrics_of("a")
    assert ["eval_f1" in row for row in rows] == [False, True, False]
    options = ["engine", "prompt_file", "retriever", "documents_per_search", "max_searches"]
    options += ["max_turn_tokens", "max_context"]
    flags = [word for name in options for word in (f"--{name}", str(getattr(config, name)))]
    evaluated = ["run", "--questions", "q.jsonl", "--model", "a/model-best", "--out", "e", *flags]
    evaluate.main(evaluated)
    results = evaluate.read_metrics(Path("e/metrics.json"))["results"]["q"]
    for name in ("reward", "f1", "em", "format_rate", "searches", "response_len"):
        assert rows[1][f"eval_{name}"] == results[name], name


def test_failing_searches_stop_the_run_with_their_message(world, monkeypatch):
    class Panic(BaseException):
        """Like tantivy's: not an `Exception`, and cannot be pickled."""

    class Down:
        def search(self, queries, k):
            raise Panic("mid > len")

    monkeypatch.setattr("inference.open_retriever", lambda source: Down())
    with pytest.raises(RuntimeError, match=r"(\d+) of \1 searches failed: .*mid > len"):
        train.train(dataclasses.replace(world, samples_per_prompt=24), Path("a"))
    assert metrics_of("a") == []


@pytest.mark.parametrize(
    ("steps", "stops"),  # (failures, queries) of each step; whether the last one stops the run
    [
        ([(1, 1)], False),
        ([(4, 4)], False),
        ([(5, 5)], True),
        ([(20, 100)], False),
        ([(21, 100)], True),
        ([(2, 4), (2, 4), (1, 4)], True),  # five of the last twelve
        ([(4, 4), (0, 16), (1, 1)], False),  # of the last 20, four
        ([(0, 1000), (5, 5)], True),
        ([(0, 0)], False),
    ],
)
def test_failures_stop_a_run_by_their_share_of_at_least_20_queries(steps, stops):
    policy.start_distributed()
    rollout = SimpleNamespace(search_error="down")
    sampler = SimpleNamespace(rollout=rollout, failed_searches=[])
    stopped = []
    for failures, queries in steps:
        failed = [1] * failures + [0] * (queries - failures)
        records = [{"searches": 1, "search_failures": number} for number in failed]
        try:
            Sampler.stop_if_searches_fail(sampler, records)
            stopped.append(False)
        except RuntimeError as error:
            assert str(error).endswith("searches failed: down")
            stopped.append(True)
    assert stopped == [False] * (len(steps) - 1) + [stops]


def test_failed_searches_of_a_small_batch_stop_no_run_and_earn_nothing(world, monkeypatch):
    """The retriever fails in the first step: before a checkpoint `--resume` would ask it again."""
    failed = []

    class FailsAtFirst:
        def search(self, queries, k):
            if len(failed) < 2:
                failed.extend(queries)
                raise ConnectionError("down")
            return [[] for _ in queries]

    monkeypatch.setattr("inference.open_retriever", lambda source: FailsAtFirst())
    train.train(dataclasses.replace(world, reward="stage1"), Path("a"))
    first, *others = metrics_of("a")
    assert len(others) == 2
    assert (first["search_failures"], first["search_rate"] > 0) == (1, True)
    assert first["reward"] == 0.5 * first["format_rate"]


def test_an_evaluation_without_searches_stops_the_run_and_is_not_kept(world, monkeypatch):
    """Its score would be that of a model that finds nothing."""

    def all_fail(rollout, encode, questions, reward):
        rollout.search_error = "down"
        return [{"id": q["id"], "searches": 1, "search_failures": 1} for q in questions]

    monkeypatch.setattr("sampler.answer_questions", all_fail)
    config = dataclasses.replace(world, eval_every=2, eval_questions="q.jsonl", save_every=1)
    with pytest.raises(RuntimeError, match="searches failed: down"):
        train.train(config, Path("a"))
    assert checkpoint.newest_checkpoint(Path("a/checkpoints"))[1].step == 1


@pytest.mark.parametrize("algorithm", ["grpo", "reinforce++"])
def test_a_run_whose_engine_has_other_weights_stops(world, monkeypatch, algorithm):
    """Such samples earn nothing, so that there may be nothing to train on."""
    load = TransformersEngine.load_weights

    def load_others(engine, named_tensors):
        torch.manual_seed(0)
        load(engine, ((name, torch.randn_like(tensor)) for name, tensor in named_tensors))

    monkeypatch.setattr(TransformersEngine, "load_weights", load_others)
    with pytest.raises(RuntimeError, match="the engine lacks the trainer's weights"):
        train.train(dataclasses.replace(world, algorithm=algorithm), Path("a"))
    assert not list(Path("a/checkpoints").glob("step*"))


def test_the_real_vllm_on_two_ranks_then_resumed_on_one(world):
    """Two engines, FSDP2 over gloo, resume on another number of ranks, export; they agree."""
    config = dataclasses.replace(world, engine="vllm", steps=2)
    first = launch(2, *command(config, "a"))
    assert first.returncode == 0, first.stderr[-3000:]
    config = dataclasses.replace(config, steps=3)
    second = launch(1, *command(config, "a", "--resume"))
    assert second.returncode == 0, second.stderr[-3000:]
    rows = metrics_of("a")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["sampler_gap"] < 0.05 for row in rows if row["trained_tokens"])

    limits = Limits(max_turn_tokens=8, max_context=400, temperature=0.0)
    tokenizer = AutoTokenizer.from_pretrained("a/model")
    engine = VLLMEngine("a/model", max_context=400, dtype="float32")
    rollout = Rollout(engine, tokenizer, None, TAGS, limits)
    (episode,) = rollout.run([Episode({}, tokenizer.encode("Question: who is 3?\n<think>"))])
    model = AutoModelForCausalLM.from_pretrained("a/model", dtype=torch.float32)
    log_probs = model(torch.tensor([episode.token_ids])).logits[0].log_softmax(-1)
    for t, acted in enumerate(episode.action_mask):
        if acted:
            expected = log_probs[t - 1, episode.token_ids[t]].item()
            assert episode.log_probs[t] == pytest.approx(expected, abs=1e-3)


def test_a_process_that_used_vllm_ends_without_a_traceback(world):
    config = dataclasses.replace(world, engine="vllm", steps=1)
    words = [sys.executable, *command(config, "a")]
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 0 and Path("a/model").is_dir()
    assert "Traceback" not in result.stderr


def trajectories_of(run: str) -> list[tuple]:
    records = map(json.loads, Path(run, "trajectories.jsonl").read_text().splitlines())
    return [(r["step"], r["question"]["id"], r["seed"], r["token_ids"]) for r in records]


def test_the_same_batches_on_one_rank_and_on_two_and_resumed_on_the_other(world):
    """The transformers engine's samples do not depend on what else is running: only rounding."""

    def go(ranks: int, run: str, steps: int) -> None:
        options = {"steps": steps, "samples_per_prompt": 8, "learning_rate": 1e-5}
        config = dataclasses.replace(world, **options)
        if ranks == 1:
            train.train(config, Path(run), resume=True)
        else:
            result = launch(ranks, *command(config, run, "--resume"))
            assert result.returncode == 0, result.stderr[-3000:]

    for ranks in (1, 2):
        go(ranks, f"r{ranks}", 2)
        go(ranks, f"resumed{3 - ranks}", 1)
    for ranks in (1, 2):
        model = Path(f"resumed{ranks}/model/model.safetensors")
        before = model.read_bytes()
        shutil.rmtree(model.parent)
        go(ranks, f"resumed{ranks}", 1)  # nothing is left to do but the export of what was read
        assert model.read_bytes() == before
        go(ranks, f"resumed{ranks}", 2)
    runs = ("r1", "r2", "resumed1", "resumed2")
    one, *others = ((metrics_of(run), trajectories_of(run), state_of(run)) for run in runs)
    assert [row["updates"] for row in one[0]] == [1, 1]
    for metrics, trajectories, state in others:
        assert trajectories == one[1]  # the same questions, seeds and tokens
        for row, expected in zip(metrics, one[0], strict=True):
            assert row == pytest.approx(expected, rel=1e-2, abs=1e-4)
        for moment in checkpoint.MOMENTS:  # without those of step 1 they would be off by half
            both = []
            for tensors in (state, one[2]):
                mine = [t.flatten() for name, t in tensors.items() if name.startswith(moment)]
                both.append(torch.cat(mine))
            assert (both[0] - both[1]).norm() < 0.05 * both[1].norm()
