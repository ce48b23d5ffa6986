"""The loop: configuration, gradients on one and two ranks, metrics, checkpoints, resume, export."""

import dataclasses
import errno
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from gradients import make_episodes
from tiny import command, equal_states, make_world, metrics_of, state_of, torchrun

import checkpoint
import train
from reward import TAGS

HERE = Path(__file__).parent


@pytest.fixture
def world(tmp_path, model_folder, monkeypatch):
    """The tiny world in the current directory; its configuration."""
    monkeypatch.chdir(tmp_path)
    return make_world(tmp_path, model_folder)


@pytest.fixture
def device():
    return train.start_distributed()


# ---------------------------------------------------------------------------------------------------------------------
# Configuration


def test_the_configuration_has_at_most_thirty_fields_and_a_word_on_each():
    fields = dataclasses.fields(train.Config)
    assert len(fields) <= 30 and all(f.metadata["help"] for f in fields)


def test_flags_win_over_the_preset_and_the_preset_over_the_default(model_folder):
    args, config = train.parse_arguments(["--preset", "demo", "--stage", "2", "--model", model_folder, "--clip_eps", "0.3"])
    assert config.reward == "stage2" and config.prompts_per_step == 8 and config.clip_eps == 0.3
    assert args.out == Path("demo/stage2")


def test_the_presets_hold_the_papers_values():
    qwen = {stage: train.Config(**train.PRESETS["qwen"][stage]) for stage in (1, 2)}
    llama = {stage: train.Config(**train.PRESETS["llama"][stage]) for stage in (1, 2)}
    for config in (*qwen.values(), *llama.values()):
        assert (config.learning_rate, config.samples_per_prompt, config.temperature) == (2e-6, 16, 1.0)
        assert (config.max_searches, config.documents_per_search, config.max_turn_tokens) == (8, 3, 512)
        assert (config.max_context, config.algorithm, config.updates_per_rollout) == (29_000, "reinforce++", 4)
    assert [c.prompts_per_step for c in (*qwen.values(), *llama.values())] == [64, 64, 15, 65]
    assert [c.kl_coef for c in (*qwen.values(), *llama.values())] == [0, 0, 1e-4, 1e-4]
    assert [c.reward for c in (*qwen.values(), *llama.values())] == ["stage1", "stage2", "stage1", "stage2"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "--steps"),
        (["--temperature", "0"], "--temperature"),
        (["--kl_coef", "-1"], "--kl_coef"),
        (["--sampler_clip", "0.5"], "--sampler_clip"),
        (["--max_searches", "-1"], "--max_searches"),
        (["--eval_every", "-1"], "--eval_every"),
        (["--samples_per_prompt", "1"], "--samples_per_prompt"),
        (["--updates_per_rollout", "99"], "--updates_per_rollout"),
        (["--eval_every", "2"], "--eval_questions"),
        (["--model", "./nowhere"], "./nowhere"),
    ],
)
def test_impossible_values_are_refused_by_name(flags, message, model_folder):
    with pytest.raises((ValueError, OSError), match=message):
        train.parse_arguments(["--preset", "demo", "--stage", "1", "--model", model_folder, *flags])


def test_the_paper_needs_a_gpu_and_says_so_in_one_line():
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    result = subprocess.run([sys.executable, "train.py", "--stage", "2"], capture_output=True, text=True, cwd=HERE.parent)
    assert result.returncode == 2 and "make demo" in result.stderr and len(result.stderr.strip().splitlines()) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


def plain_gradients(model_folder, device, episodes, chosen=None, **options):
    """fp32 gradients of one optimiser step, without FSDP's bf16."""
    from transformers import AutoModelForCausalLM

    config = train.Config(**{"samples_per_prompt": 3, "sampler_clip": 0.0, "micro_batch_tokens": 10_000, **options})
    policy = train.Policy(AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32))
    batch = train.Batch(episodes, config, device)
    batch.prepare(policy, None)
    if chosen is not None:
        batch.teaches = [chosen] * len(episodes)
    batch.backward(policy, list(range(len(episodes))))
    return [p.grad for p in policy.parameters()], batch


def assert_same(a, b, tolerance=1e-6):
    for x, y in zip(a, b, strict=True):
        assert torch.allclose(x, y, atol=tolerance, rtol=1e-4)


def test_the_gradient_does_not_depend_on_the_split_into_micro_batches(model_folder, device):
    """A mean of micro-batch means would weigh tokens of short micro-batches more."""
    episodes = make_episodes(3, 3)
    whole, batch = plain_gradients(model_folder, device, episodes)
    assert len(batch.plan(list(range(9)))) == 1
    split, batch = plain_gradients(model_folder, device, episodes, micro_batch_tokens=100)
    assert len(batch.plan(list(range(9)))) >= 5
    assert_same(whole, split)


def test_the_gradient_does_not_depend_on_sharing_the_prompt(model_folder, device, monkeypatch):
    import reinforce_pp

    episodes = make_episodes(3, 3)
    shared, batch = plain_gradients(model_folder, device, episodes, algorithm="grpo")
    assert any(len(row) > 1 for rows in batch.plan(list(range(9))) for row in rows)
    monkeypatch.setattr(reinforce_pp, "SHARE_PROMPT_FROM", float("inf"))
    apart, batch = plain_gradients(model_folder, device, episodes, algorithm="grpo")
    assert all(len(row) == 1 for rows in batch.plan(list(range(9))) for row in rows)
    assert_same(shared, apart)


def test_leaving_out_what_teaches_nothing_is_exact(model_folder, device):
    """The last group's rewards are all equal: it is not computed, but its tokens stay in the denominator."""
    episodes = make_episodes(3, 3)
    skipped, batch = plain_gradients(model_folder, device, episodes, algorithm="grpo")
    assert batch.teaches == [True] * 6 + [False] * 3
    everything, _ = plain_gradients(model_folder, device, episodes, chosen=True, algorithm="grpo")
    assert_same(skipped, everything)


def test_the_gradient_is_that_of_the_formula(model_folder, device):
    """Eq. 8 for GRPO, written down again with the plain model: no packing, no chunks, no micro-batches."""
    from transformers import AutoModelForCausalLM

    episodes = make_episodes(2, 3)
    got, _ = plain_gradients(model_folder, device, episodes, algorithm="grpo", temperature=0.8)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    loss, tokens = 0.0, 0
    for group in (episodes[:3], episodes[3:]):
        rewards = torch.tensor([e.rewards["reward"] for e in group])
        for episode, reward in zip(group, rewards, strict=True):
            advantage = (reward - rewards.mean()) / (rewards.std(correction=0) + 1e-6)
            logits = model(torch.tensor([episode.token_ids])).logits[0] / 0.8
            for t, acted in enumerate(episode.action_mask):
                if acted:
                    loss = loss - advantage * logits[t - 1].log_softmax(-1)[episode.token_ids[t]]
                    tokens += 1
    (loss / tokens).backward()
    assert_same(got, [p.grad for p in model.parameters()], 1e-5)


@pytest.mark.parametrize("case", ["many", "one", "checkpointing"])
def test_one_rank_and_two_ranks_give_the_same_gradients(case, model_folder, tmp_path):
    """The same global batch; with an odd number of micro-batches, and with a rank that has none."""
    results = []
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}.pt"
        result = torchrun(ranks, str(HERE / "gradients.py"), model_folder, str(out), case)
        assert out.exists(), result.stderr[-3000:]
        results.append(torch.load(out, weights_only=True))
    one, two = results
    assert one["micro_batches"] % 2 == 1 and two["micro_batches"] == (one["micro_batches"] + 1) // 2
    for name, gradient in one["gradients"].items():
        assert gradient.abs().max() > 0
        assert torch.allclose(gradient, two["gradients"][name], atol=1e-6, rtol=1e-3), name


def test_a_gradient_that_is_not_finite_skips_the_update(world, device):
    policy = train.load_policy(world, device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1.0)
    before = [p.detach().clone() for p in policy.parameters()]
    config = dataclasses.replace(world, samples_per_prompt=3)
    episodes = make_episodes(2, 3)
    episodes[0].rewards = {"reward": float("nan")}
    metrics = train.optimize(train.Batch(episodes, config, device), policy, None, optimizer)
    assert (metrics["updates"], metrics["bad_updates"]) == (0, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


def test_bad_updates_in_a_row_stop_the_run_and_are_counted_across_batches_and_resumes(world, monkeypatch):
    """The count began anew with every resume, and a good update within a batch did not end it."""
    clip, nan = train.nn.utils.clip_grad_norm_, math.nan
    norms = [1, nan, 1, nan, nan, 1, 1, nan, nan, nan]  # after three in a row none is tried
    monkeypatch.setattr(train.nn.utils, "clip_grad_norm_", lambda *args: clip(*args) * norms.pop(0))
    config = dataclasses.replace(world, kl_coef=1e-9, updates_per_rollout=3)  # with a reference every update takes place
    train.train(config, Path("a"), False, None)
    with pytest.raises(RuntimeError, match="step 4: 3 updates in a row"):
        train.train(dataclasses.replace(config, steps=4), Path("a"), True, None)
    assert [(row["bad_updates"], row["bad_in_a_row"]) for row in metrics_of("a")] == [(1, 0), (2, 0), (2, 2), (1, 3)]
    assert checkpoint.newest_checkpoint(Path("a/checkpoints"))[1]["step"] == 3


def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_update_on_all(model_folder, tmp_path):
    result = torchrun(2, str(HERE / "gradients.py"), model_folder, str(tmp_path / "found.json"), "nan")
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads((tmp_path / "found.json").read_text()) == [{"updates": 0, "bad_updates": 3, "changed": False}] * 2


def without_actions(episodes):
    for episode in episodes:
        episode.action_mask = [0] * len(episode.token_ids)


def with_equal_rewards(episodes):
    for episode in episodes:
        episode.rewards = {"reward": -2.0}


@pytest.mark.parametrize("algorithm", train.ALGORITHMS)
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize(
    ("make", "samples"), [(without_actions, 3), (with_equal_rewards, 3), (with_equal_rewards, 1), (lambda episodes: None, 1)]
)
def test_degenerate_batches_leave_finite_numbers(world, device, make, samples, kl_coef, algorithm):
    """Nobody wrote a token; all rewards are equal, as when nobody finished; a group of one."""
    config = dataclasses.replace(world, samples_per_prompt=samples, algorithm=algorithm, kl_coef=kl_coef)
    policy = train.load_policy(config, device)
    reference = train.load_policy(config, device, frozen=True) if kl_coef else None
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)
    episodes = make_episodes(2, samples)
    make(episodes)
    metrics = train.optimize(train.Batch(episodes, config, device), policy, reference, optimizer)
    assert metrics["bad_updates"] == 0 and all(math.isfinite(value) for value in metrics.values())
    assert all(parameter.full_tensor().isfinite().all() for parameter in policy.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize("frozen", [True, False])
def test_a_pass_without_gradient_leaves_nothing_gathered(world, device, frozen):
    """Embeddings and head, 2 GB of Llama's, stayed on every GPU, and a weight sync met them where it expects shards."""
    from torch.distributed.tensor import DTensor

    policy = train.load_policy(world, device, frozen=frozen)
    config = dataclasses.replace(world, samples_per_prompt=3)
    train.Batch(make_episodes(1, 3), config, device).log_probs(policy, [0, 1, 2])
    assert all(isinstance(parameter, DTensor) for parameter in policy.parameters())


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps its own counsel")
def test_what_training_freed_goes_back_to_the_system(device):
    """A block that stays keeps all that was freed below it."""
    blocks = [bytearray(100_000) for _ in range(3000)]
    full, last = resident_mib(), blocks[-1]
    del blocks
    train.give_back(device)
    assert resident_mib() < full - 200 and len(last) == 100_000


# ---------------------------------------------------------------------------------------------------------------------
# Data order


def test_every_pass_takes_every_question_once():
    questions = [{"id": i} for i in range(10)]
    drawn = [q["id"] for step in range(5) for q in train.questions_of_step(questions, step, 4, seed=0)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:] != list(range(10))


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def test_two_identical_runs_give_identical_metrics_and_resume_continues_the_numbers(world, monkeypatch):
    train.train(world, Path("a"), False, None)
    train.train(world, Path("b"), False, None)
    assert metrics_of("a") == metrics_of("b") and len(metrics_of("a")) == 3
    assert any(row["grad_norm"] > 0 for row in metrics_of("a"))

    train.train(dataclasses.replace(world, steps=1), Path("c"), False, None)
    with open("c/metrics.jsonl", "a") as log:  # a step that was lost after the checkpoint, and a torn line
        log.write('{"step": 2, "reward": 99}\n{"step": 3, "rew')
    train.train(world, Path("c"), True, None)
    assert metrics_of("c") == metrics_of("a")
    weights = [torch.tensor(list((Path(run) / "model/model.safetensors").read_bytes())) for run in ("a", "c")]
    assert torch.equal(*weights)

    monkeypatch.setattr(train, "Trainer", None)  # a finished run ends at once
    train.train(world, Path("a"), True, None)


def test_a_run_folder_is_never_overwritten(world):
    world_of_one_step = dataclasses.replace(world, steps=1)
    train.train(world_of_one_step, Path("a"), False, None)
    before = Path("a/metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="--resume"):
        train.train(world, Path("a"), False, None)
    with pytest.raises(ValueError, match=r"--clip_eps 0\.2, not 0\.5"):
        train.train(dataclasses.replace(world, clip_eps=0.5), Path("a"), True, None)
    with pytest.raises(ValueError, match="past --steps 1"):
        train.train(dataclasses.replace(world, steps=2), Path("a"), True, None)
        train.train(world_of_one_step, Path("a"), True, None)
    assert Path("a/metrics.jsonl").read_bytes().startswith(before)


def test_a_damaged_configuration_is_named_and_the_run_left_alone(world):
    """A kill while it was written, for which the run's checkpoints would be lost to --resume, must not damage it."""
    folder = Path("a/checkpoints")
    folder.mkdir(parents=True)
    Path("a/config.json").write_text('{"model":')
    with pytest.raises(ValueError, match=r"^a/config\.json: damaged"):
        train.train(world, Path("a"), True, None)
    assert Path("a/config.json").read_text() == '{"model":'


def test_a_start_that_failed_does_not_occupy_the_folder(world):
    with pytest.raises(FileNotFoundError):
        train.train(dataclasses.replace(world, questions="nowhere.jsonl"), Path("a"), False, None)
    train.train(dataclasses.replace(world, steps=1), Path("a"), False, None)
    assert len(metrics_of("a")) == 1


def checkpoint_names(run="a") -> list[str]:
    return sorted(path.name for path in Path(run, "checkpoints").iterdir())


def cut(checkpoint: Path) -> None:
    (shard,) = checkpoint.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-7])


def flip_a_bit(checkpoint: Path) -> None:
    (shard,) = checkpoint.glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-7] ^= 1
    shard.write_bytes(data)


def change_the_progress(checkpoint: Path) -> None:
    file = checkpoint / "progress.json"
    file.write_text(file.read_text().replace('"updates": ', '"updates": 1'))


def empty_the_progress(checkpoint: Path) -> None:
    (checkpoint / "progress.json").write_text("null")


def lose_a_shard(checkpoint: Path) -> None:
    next(checkpoint.glob("*.safetensors")).unlink()


@pytest.mark.parametrize("damage", [cut, flip_a_bit, change_the_progress, empty_the_progress, lose_a_shard])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(world, capsys, damage):
    train.train(world, Path("a"), False, None)
    before, newest = checkpoint_names()  # the last two
    assert before.startswith("step_000002-") and newest.startswith("step_000003-")
    damage(Path("a/checkpoints", newest))
    expected = metrics_of("a")
    train.train(world, Path("a"), True, None)
    assert f"{newest} is damaged" in capsys.readouterr().err
    assert metrics_of("a") == expected
    again, *others = (name for name in checkpoint_names() if name not in (before, f"{newest}.damaged"))
    assert again.startswith("step_000003-") and not others


def test_where_no_checkpoint_is_whole_nothing_is_begun_anew(world):
    """It would drop the log, and remove each new checkpoint as older than the damaged ones."""
    train.train(world, Path("a"), False, None)
    for folder in Path("a/checkpoints").iterdir():
        cut(folder)
    before = metrics_of("a"), checkpoint_names()
    with pytest.raises(ValueError, match="no checkpoint there is whole"):
        train.train(world, Path("a"), True, None)
    assert (metrics_of("a"), checkpoint_names()) == before


def test_a_model_of_an_earlier_step_is_not_taken_for_that_of_the_last(world, monkeypatch):
    """A run that went on past a finished one and was killed before its export called the old model finished."""
    train.train(dataclasses.replace(world, steps=1), Path("a"), False, None)
    old = Path("a/model/model.safetensors").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(SystemError):
        patch.setattr(train, "export", lambda *_: (_ for _ in ()).throw(SystemError))
        train.train(world, Path("a"), True, None)
    assert Path("a/model/model.safetensors").read_bytes() == old  # until there is another
    train.train(world, Path("a"), True, None)
    assert Path("a/model/model.safetensors").read_bytes() != old
    assert sorted(path.name for path in Path("a").glob("model*")) == ["model"]


def test_a_run_folder_takes_one_process_at_a_time(world, device):
    with checkpoint.RunFolder(Path("a"), world, None).held(False), pytest.raises(ValueError, match="another process"):
        train.train(dataclasses.replace(world, steps=1), Path("a"), True, None)
    assert metrics_of("a") == []
    train.train(dataclasses.replace(world, steps=1), Path("a"), True, None)


def test_a_file_system_that_does_not_lock_folders_takes_a_run(world, monkeypatch):
    """NFS refuses to lock what is not open for writing, and a folder cannot be."""

    def refuse(*_):
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(checkpoint.fcntl, "flock", refuse)
    train.train(dataclasses.replace(world, steps=1), Path("a"), False, None)
    assert len(metrics_of("a")) == 1


@pytest.mark.parametrize("file", ["q.jsonl", "p.txt"])
def test_a_run_does_not_go_on_with_changed_questions_or_another_prompt(world, file):
    train.train(dataclasses.replace(world, steps=1), Path("a"), False, None)
    text = Path(file).read_text()
    Path(file).write_text(text.replace("who is", "what is").replace("Question", "A question"))
    with pytest.raises(ValueError, match=f"config.json: .*{file}.* has changed since this run began"):
        train.train(world, Path("a"), True, None)
    Path(file).write_text(text)
    train.train(world, Path("a"), True, None)


def test_a_checkpoint_and_a_model_are_on_the_disk_before_they_have_their_names(world, monkeypatch):
    """A power cut keeps what was synced, and may keep names that were given after it or not."""
    synced, fsync, rename = set(), os.fsync, Path.rename

    def watched_fsync(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def watched_rename(path, target):
        if not target.name.endswith(".old"):
            parts = [path, *path.iterdir()] if path.is_dir() else [path]
            assert {part.name for part in parts if part.stat().st_ino not in synced} == set()
            renamed.append(target.name)
            synced.discard(target.parent.stat().st_ino)
        return rename(path, target)

    renamed: list[str] = []
    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    train.train(dataclasses.replace(world, steps=1), Path("a"), False, None)
    assert any(name.startswith("step_000001-") for name in renamed) and "model" in renamed
    assert {Path(folder).stat().st_ino for folder in ("a", "a/checkpoints")} <= synced  # the names are there too


def faulty(ranks: int, point: str, count: int, rank: int, death: str, *arguments: str) -> subprocess.CompletedProcess:
    """torchrun of tests/faulty.py."""
    _, *arguments = arguments  # train.py itself
    return torchrun(ranks, str(HERE / "faulty.py"), point, str(count), str(rank), death, *arguments)


ONE_RANK = [("weight sync", 60, 0), ("checkpoint written", 1, 0), ("old checkpoint removed", 1, 0), ("export", 2, 0)]
TWO_RANKS = [("update", 2, 1), ("shard serialised", 1, 1)]


@pytest.mark.parametrize(("ranks", "kills"), [(1, ONE_RANK), (2, TWO_RANKS)])
def test_killed_again_and_again_a_run_ends_as_one_that_was_not(world, ranks, kills):
    """-9 amid weight sync, update, checkpoint and export; benchmarks/faults.py does it at more points."""
    assert torchrun(ranks, *command(world, "unbroken")).returncode == 0
    for kill in kills:
        result = faulty(ranks, *kill, "kill", *command(world, "killed", "--resume"))
        assert "Signal 9" in result.stderr, kill
    assert torchrun(ranks, *command(world, "killed", "--resume")).returncode == 0
    assert metrics_of("killed") == metrics_of("unbroken")
    models = [(Path(run) / "model/model.safetensors").read_bytes() for run in ("unbroken", "killed")]
    assert models[0] == models[1] and equal_states(state_of("killed"), state_of("unbroken"))
    assert [name[: len("step_000000")] for name in checkpoint_names("killed")][-2:] == ["step_000002", "step_000003"]


@pytest.mark.parametrize(("point", "rank", "logged"), [("backward", 1, 1), ("checkpoint written", 0, 2)])
def test_what_one_rank_cannot_do_ends_all_within_a_minute_with_its_message(world, point, rank, logged):
    result = faulty(2, point, 2, rank, "raise", *command(world, "a"))
    (fault,) = re.findall(r"fault at ([\d.]+)", result.stdout)
    assert time.time() - float(fault) < 60
    assert result.returncode != 0 and "a fault was injected" in result.stderr and len(metrics_of("a")) == logged


def test_a_full_disk_loses_no_checkpoint(world, tmp_path):
    """On a file system that holds one checkpoint and a half."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs here")
    try:
        result = torchrun(1, *command(world, "small/a"))
        assert result.returncode != 0
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("train.py: ")]
        assert "step_000002: cannot be written" in line and "No space left" in line
        (left,) = checkpoint_names("small/a")
        assert left.startswith("step_000001-")
        subprocess.run(["mount", "-o", "remount,size=20m", str(small)], check=True)
        train.train(world, small / "a", True, None)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_refused_call_leaves_the_configuration(world):
    train.train(dataclasses.replace(world, steps=2), Path("a"), False, None)
    before = Path("a/config.json").read_bytes()
    with pytest.raises(ValueError, match="past --steps 1"):
        train.train(dataclasses.replace(world, steps=1), Path("a"), True, None)
    assert Path("a/config.json").read_bytes() == before


def test_kl_starts_at_zero_and_several_updates_clip(world):
    config = dataclasses.replace(world, kl_coef=0.1, updates_per_rollout=3, learning_rate=5e-3, algorithm="reinforce++")
    train.train(config, Path("a"), False, None)
    first, *_, last = metrics_of("a")
    assert abs(first["kl"]) < 1e-3 < abs(last["kl"])
    assert first["updates"] == 3


@pytest.mark.parametrize("mode", ["k2", "k3"])
def test_kl_as_a_loss_pulls_towards_the_reference(world, mode):
    free = dataclasses.replace(world, learning_rate=5e-3, kl_mode=mode, kl_coef=1e-9, steps=3)
    train.train(free, Path("free"), False, None)
    train.train(dataclasses.replace(free, kl_coef=10.0), Path("held"), False, None)
    assert abs(metrics_of("held")[-1]["kl"]) < abs(metrics_of("free")[-1]["kl"])


def test_evaluation_during_training(world):
    train.train(dataclasses.replace(world, eval_every=2, eval_questions="q.jsonl"), Path("a"), False, None)
    assert ["eval_f1" in row for row in metrics_of("a")] == [True, False, True]


def test_failing_searches_stop_the_run_with_their_message(world, monkeypatch):
    class Panic(BaseException):
        """As tantivy's: no `Exception`, and not to be pickled."""

    class Down:
        def search(self, queries, k):
            raise Panic("mid > len")

    monkeypatch.setattr(train, "open_retriever", lambda source: Down())
    with pytest.raises(RuntimeError, match=r"100% of the searches failed: .*mid > len"):
        train.train(world, Path("a"), False, None)


def test_no_key_of_the_environment_is_in_a_run_folder(world, monkeypatch, capfd):
    for name in ("OPENAI_API_KEY", "SERPER_API_KEY", "BRAVE_API_KEY", "HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, f"sentinel-{name}")
    train.train(dataclasses.replace(world, steps=1), Path("a"), False, "tensorboard")
    files = [path for path in Path("a").rglob("*") if path.is_file()]
    assert len(files) > 8 and not any(b"sentinel-" in path.read_bytes() for path in files)
    assert "sentinel-" not in "".join(capfd.readouterr())


SHAPES = """
import torch, train
train.start_distributed()
layer, resident = torch.nn.Linear(576, 1536, dtype=torch.bfloat16), []
for rows in range(1, 401):
    layer(torch.ones(rows, 576, dtype=torch.bfloat16)).sum().backward()
    resident.append(int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20)
print(resident[-1] - resident[49])
"""


def test_what_was_compiled_for_past_shapes_goes_on_a_cpu():
    """Every micro-batch has a shape of its own; on a CPU with AMX 350 shapes of this one layer made 701 MiB, now 65."""
    result = subprocess.run([sys.executable, "-c", SHAPES], cwd=HERE.parent, capture_output=True, text=True)
    assert int(result.stdout) < 200, result.stderr


def test_tensorboard(world):
    train.train(dataclasses.replace(world, steps=1), Path("a"), False, "tensorboard")
    assert list(Path("a").glob("events.out.*"))


def test_the_real_vllm_on_two_ranks_then_resumed_on_one(world, tmp_path):
    """Two engines, FSDP2 over gloo, a checkpoint read by another number of ranks, export; sampler and trainer agree."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rollout import Episode, Limits, Rollout, VLLMEngine

    config = dataclasses.replace(world, engine="vllm", steps=2)
    first = torchrun(2, *command(config, "a"))
    assert first.returncode == 0, first.stderr[-3000:]
    config = dataclasses.replace(config, steps=3)
    second = torchrun(1, *command(config, "a", "--resume"))
    assert second.returncode == 0, second.stderr[-3000:]
    rows = metrics_of("a")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["sampler_gap"] < 0.05 for row in rows if row["trained_tokens"])

    folder = "a/model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    engine = VLLMEngine(folder, max_context=400, dtype="float32")
    rollout = Rollout(engine, tokenizer, None, TAGS, Limits(max_turn_tokens=8, max_context=400, temperature=0.0))
    (episode,) = rollout.run([Episode({}, tokenizer.encode("Question: who is 3?\n<think>"))])
    log_probs = model(torch.tensor([episode.token_ids])).logits[0].log_softmax(-1)
    for t, acted in enumerate(episode.action_mask):
        if acted:
            assert episode.log_probs[t] == pytest.approx(log_probs[t - 1, episode.token_ids[t]].item(), abs=1e-3)


def test_the_same_batches_on_one_rank_and_on_two_and_resumed_on_the_other(world):
    """The transformers engine's samples do not depend on what else is running: the runs differ by rounding only."""

    def go(ranks: int, run: str, steps: int) -> None:
        config = dataclasses.replace(world, steps=steps, samples_per_prompt=8, learning_rate=1e-5)
        if ranks == 1:
            train.train(config, Path(run), True, None)
        else:
            result = torchrun(ranks, *command(config, run, "--resume"))
            assert result.returncode == 0, result.stderr[-3000:]

    for ranks in (1, 2):
        go(ranks, f"r{ranks}", 2)
        go(ranks, f"resumed{3 - ranks}", 1)
    for ranks in (1, 2):
        model = Path(f"resumed{ranks}/model/model.safetensors")
        before = model.read_bytes()
        shutil.rmtree(model.parent)
        go(ranks, f"resumed{ranks}", 1)  # nothing is left to do but the export, of what was read
        assert model.read_bytes() == before
        go(ranks, f"resumed{ranks}", 2)
    one, *others = ((metrics_of(run), trajectories_of(run), state_of(run)) for run in ("r1", "r2", "resumed1", "resumed2"))
    assert [row["updates"] for row in one[0]] == [1, 1]
    for metrics, trajectories, state in others:
        assert trajectories == one[1]  # the same questions, seeds and tokens
        for row, expected in zip(metrics, one[0], strict=True):
            assert row == pytest.approx(expected, rel=1e-2, abs=1e-4)
        for moment in checkpoint.MOMENTS:  # without those of step 1 they would be off by half
            sums = [torch.cat([t.flatten() for name, t in s.items() if name.startswith(moment)]) for s in (state, one[2])]
            assert (sums[0] - sums[1]).norm() < 0.05 * sums[1].norm()


def trajectories_of(run: str) -> list[tuple]:
    records = map(json.loads, Path(run, "trajectories.jsonl").read_text().splitlines())
    return [(record["step"], record["question"]["id"], record["seed"], record["token_ids"]) for record in records]
