"""Checkpoints and export: shards, damage, kills, full disks."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import (
    checkpoint_names,
    command,
    equal_states,
    launch,
    metrics_of,
    model_of,
    state_of,
    steps,
)
from torch import nn
from transformers import AutoConfig

import checkpoint
import train
from engine import compute_dtype

HERE = Path(__file__).parent


# --------------------------------------------------------------------------------------------------
# Export


def test_a_generation_configuration_is_exported_as_it_is(world):
    """Many published models have one that transformers loads and refuses to save."""
    shutil.copytree(world.model, "m")
    file = Path("m/generation_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"temperature": 0.6}))
    train.train(dataclasses.replace(world, model="m", steps=1), Path("a"))
    assert Path("a/model/generation_config.json").read_bytes() == file.read_bytes()


def test_without_a_generation_configuration_none_is_exported(world):
    """Old models have its values in config.json."""
    shutil.copytree(world.model, "m")
    Path("m/generation_config.json").unlink()
    file = Path("m/config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"temperature": 0.6}))
    train.train(dataclasses.replace(world, model="m", steps=1), Path("a"))
    assert Path("a/model/model.safetensors").exists()
    assert not Path("a/model/generation_config.json").exists()


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_a_model_is_exported_in_the_dtype_in_which_it_computes(capability, world, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    train.train(dataclasses.replace(world, steps=1), Path("a"))
    weights = load_file("a/model/model.safetensors").values()
    assert {tensor.dtype for tensor in weights} == {compute_dtype()}
    assert AutoConfig.from_pretrained("a/model").dtype == compute_dtype()
    (row,) = metrics_of("a")
    in_fp32 = compute_dtype() == torch.float32  # as this world's engine computes on every machine
    assert row["sampler_gap"] < (1e-4 if in_fp32 else 0.05)


# --------------------------------------------------------------------------------------------------
# Shards


def shards_of(whole, rank, ranks):
    """A rank's shards as FSDP2 has them: those of the last ranks may be empty."""
    shards = {}
    for name, tensor in whole.items():
        size = -(-len(tensor) // ranks)
        rows = tensor[size * rank : size * (rank + 1)].clone()
        shards[name] = checkpoint.Shard(min(size * rank, len(tensor)), rows)
    return shards


SHAPES = st.lists(st.integers(0, 7), min_size=1, max_size=3)
RANKS = st.integers(1, 5)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


@settings(deadline=None)
@given(shapes=st.lists(SHAPES, min_size=1, max_size=4), writers=RANKS, readers=RANKS, dtype=DTYPES)
def test_shards_are_read_by_any_number_of_ranks(tmp_path_factory, shapes, writers, readers, dtype):
    folder = tmp_path_factory.mktemp("shards")
    whole = {f"{i} {shape}": torch.randn(shape).to(dtype) for i, shape in enumerate(shapes)}
    files = [folder / f"{rank}.safetensors" for rank in range(writers)]
    for rank, file in enumerate(files):
        digest = checkpoint.write_shards(file, shards_of(whole, rank, writers))
        assert digest == hashlib.sha256(file.read_bytes()).hexdigest()
    plain = [load_file(file) for file in files]
    for name, tensor in whole.items():
        assert torch.cat([tensors[name] for tensors in plain]).equal(tensor)
    for rank in range(readers):
        shards = shards_of(whole, rank, readers)
        for _, rows in shards.values():
            rows.fill_(99)
        checkpoint.read_shards(folder, shards)
        for name, (_, rows) in shards_of(whole, rank, readers).items():
            assert shards[name].rows.equal(rows)


def test_a_rank_that_does_not_see_a_file_stops(tmp_path):
    """As on a network file system that is behind."""
    whole = {"weight": torch.ones(4, 2)}
    checkpoint.write_shards(tmp_path / "0.safetensors", shards_of(whole, 0, 2))
    with pytest.raises(ValueError, match=f"{tmp_path}: 2 rows of parameters are missing"):
        checkpoint.read_shards(tmp_path, shards_of(whole, 0, 1))


def save_or_load(rank: int, ranks: int, action: str) -> None:
    """What a rank does in the test below, in the current directory."""
    from torch.distributed.fsdp import fully_shard

    store = Path(f"store_{action}").absolute()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    model = fully_shard(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1)))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    if action == "save":
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        checkpoint.save_checkpoint(Path("checkpoints"), model, optimizer, checkpoint.Progress(1, 1))
    else:
        found, progress = checkpoint.newest_checkpoint(Path("checkpoints"))
        checkpoint.create_moments(optimizer, progress.updates)
        checkpoint.load_checkpoint(found, model, optimizer)
        saved = state_of(".")
        assert len(saved) == 3 * 4 and saved["exp_avg.1.weight"].any()
        for name, parameter in model.named_parameters():
            assert parameter.full_tensor().equal(saved[f"model.{name}"])
            for moment in checkpoint.MOMENTS:
                whole = optimizer.state[parameter][moment].full_tensor()
                assert whole.equal(saved[f"{moment}.{name}"])
    dist.barrier()
    os._exit(0)  # sys.exit may abort: gloo's threads still release tensors (pytorch#179291)


def test_ranks_share_a_parameter_that_has_fewer_rows_than_there_are_ranks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for ranks, action in [(3, "save"), (2, "load")]:
        torch.multiprocessing.start_processes(
            save_or_load, (ranks, action), nprocs=ranks, start_method="forkserver"
        )


def memory_kib(line: str) -> int:
    return int(re.search(rf"{line}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def test_saving_takes_no_memory_to_speak_of(world):
    """A checkpoint goes from memory to disk as it is: what it takes is below a tenth of it."""
    from torch.distributed.fsdp import fully_shard

    layer = fully_shard(nn.Linear(2048, 8192, bias=False))
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    checkpoint.create_moments(optimizer, updates=1)
    for moment in checkpoint.MOMENTS:
        optimizer.state[layer.weight][moment].fill_(1.0)  # until then zeros take no memory
    checkpoint_kib = 3 * 4 * layer.weight.numel() // 1024
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the peak, begins anew
    before = memory_kib("VmHWM")
    checkpoint.save_checkpoint(Path("saved"), layer, optimizer, checkpoint.Progress(1, 1))
    assert memory_kib("VmHWM") - before < checkpoint_kib / 10
    (file,) = Path("saved").rglob("*.safetensors")
    assert file.stat().st_size > checkpoint_kib * 1024


# --------------------------------------------------------------------------------------------------
# Damage


def cut(folder: Path) -> None:
    *_, shard = sorted(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-7])


def flip_a_bit(folder: Path) -> None:
    *_, shard = sorted(folder.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-7] ^= 1
    shard.write_bytes(data)


def change_the_progress(folder: Path) -> None:
    file = folder / "progress.json"
    file.write_text(file.read_text().replace('"updates": ', '"updates": 1'))


def empty_the_progress(folder: Path) -> None:
    (folder / "progress.json").write_text("null")


def lose_a_shard(folder: Path) -> None:
    next(folder.glob("*.safetensors")).unlink()


DAMAGES = [cut, flip_a_bit, change_the_progress, empty_the_progress, lose_a_shard]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(world, capsys, damage):
    train.train(world, Path("a"))
    before, newest = checkpoint_names()  # the last two
    assert before.startswith("step_000002-") and newest.startswith("step_000003-")
    damage(Path("a/checkpoints", newest))
    expected = metrics_of("a")
    train.train(world, Path("a"), resume=True)
    assert f"{newest} is damaged" in capsys.readouterr().err
    assert metrics_of("a") == expected
    steps_kept = [name[: len("step_000000")] for name in checkpoint_names()]
    assert steps_kept == ["step_000002", "step_000003"]
    found, _ = checkpoint.newest_checkpoint(Path("a/checkpoints"))
    assert found.name.startswith("step_000003-")  # whole again


def test_a_damaged_checkpoint_stays_until_the_run_goes_on(world):
    """A refused call deletes nothing: one file too many makes a checkpoint damaged, not useless."""
    train.train(world, Path("a"))
    Path("a/checkpoints", checkpoint_names()[1], "stray").touch()
    before = checkpoint_names()
    with pytest.raises(ValueError, match="past --steps 1"):
        train.train(steps(world, 1), Path("a"), resume=True)
    assert checkpoint_names() == before


def test_where_no_checkpoint_is_whole_nothing_is_begun_anew(world):
    """To begin anew would drop the log."""
    train.train(world, Path("a"))
    for folder in Path("a/checkpoints").iterdir():
        cut(folder)
    before = metrics_of("a"), checkpoint_names()
    with pytest.raises(ValueError, match="no checkpoint there is whole"):
        train.train(world, Path("a"), resume=True)
    assert (metrics_of("a"), checkpoint_names()) == before


def test_a_checkpoint_and_a_model_are_on_the_disk_before_they_have_names(world, monkeypatch):
    """A power cut keeps what was flushed, and may keep names that were given later or not."""
    flushed, fsync, rename = set(), os.fsync, Path.rename
    renamed: list[str] = []

    def watched_fsync(descriptor):
        flushed.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def watched_rename(path, target):
        parts = [path, *path.iterdir()] if path.is_dir() else [path]
        assert all(part.stat().st_ino in flushed for part in parts), target
        renamed.append(target.name)
        flushed.discard(target.parent.stat().st_ino)
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    train.train(steps(world, 1), Path("a"))
    assert any(name.startswith("step_000001-") for name in renamed) and "model" in renamed
    names_of = {Path(folder).stat().st_ino for folder in ("a", "a/checkpoints")}
    assert names_of <= flushed


def faulty(ranks, point, count, rank, death, *arguments) -> subprocess.CompletedProcess:
    """Launch tests/faulty.py."""
    _, *arguments = arguments  # train.py itself
    return launch(ranks, str(HERE / "faulty.py"), point, str(count), str(rank), death, *arguments)


ONE_RANK = [
    ("weight sync", 60, 0),
    ("checkpoint written", 1, 0),
    ("old checkpoint removed", 1, 0),
    ("export", 2, 0),
]
TWO_RANKS = [("update", 2, 1), ("shard written", 40, 1)]


@pytest.mark.parametrize(("ranks", "kills"), [(1, ONE_RANK), (2, TWO_RANKS)])
def test_killed_again_and_again_a_run_ends_as_one_that_was_not(world, ranks, kills):
    """-9 amid weight sync, update, checkpoint and export; benchmarks/faults.py has more points.

    The run evaluates, so that its probe and its best model are resumed too.
    """
    config = dataclasses.replace(world, steps=4, eval_every=1, eval_questions="q.jsonl")
    never = ("update", 99, 0, "kill")
    assert faulty(ranks, *never, *command(config, "unbroken")).returncode == 0
    for kill in kills:
        result = faulty(ranks, *kill, "kill", *command(config, "killed", "--resume"))
        assert result.returncode == -signal.SIGKILL, kill
    assert faulty(ranks, *never, *command(config, "killed", "--resume")).returncode == 0
    assert metrics_of("killed") == metrics_of("unbroken")
    assert all("log_prob_right" in row for row in metrics_of("killed")[1:])
    assert model_of("killed") == model_of("unbroken")
    best = "model-best/model.safetensors"
    assert Path("killed", best).read_bytes() == Path("unbroken", best).read_bytes()
    assert equal_states(state_of("killed"), state_of("unbroken"))
    kept = [name[: len("step_000000")] for name in checkpoint_names("killed")]
    assert kept[-2:] == ["step_000003", "step_000004"]


@pytest.mark.parametrize(
    ("point", "rank", "logged"), [("backward", 1, 1), ("checkpoint written", 0, 2)]
)
def test_what_one_rank_cannot_do_ends_all_within_a_minute(world, point, rank, logged):
    result = faulty(2, point, 2, rank, "raise", *command(world, "a"))
    (fault,) = re.findall(r"fault at ([\d.]+)", result.stdout)
    assert time.time() - float(fault) < 60
    assert result.returncode != 0 and "a fault was injected" in result.stderr
    assert len(metrics_of("a")) == logged


def test_a_full_disk_of_one_rank_ends_all_with_a_line(world):
    """Each node may have a disk of its own; this one is full amid the second checkpoint."""
    result = faulty(2, "shard written", 100, 1, "full", *command(world, "a"))
    (fault,) = re.findall(r"fault at ([\d.]+)", result.stdout)
    assert time.time() - float(fault) < 60 and result.returncode != 0
    line = "train.py: a/checkpoints/step_000002: cannot be written ([Errno 28] No space left on"
    assert line in result.stderr
    (left,) = checkpoint_names()
    assert left.startswith("step_000001-")


def test_the_ranks_prove_together_that_a_checkpoint_is_whole(world):
    """Each reads the files of its share; their verdict is one."""
    assert launch(2, *command(steps(world, 2), "a")).returncode == 0
    result = faulty(2, "checkpoint read", 1, 1, "raise", *command(world, "a", "--resume"))
    assert "a fault was injected" in result.stderr and result.returncode != 0
    flip_a_bit(Path("a/checkpoints", checkpoint_names()[-1]))
    result = launch(2, *command(world, "a", "--resume"))
    assert result.returncode == 0 and result.stderr.count("is damaged; the one before") == 1
    assert len(metrics_of("a")) == 3


def test_a_full_disk_loses_no_checkpoint(world, tmp_path):
    """On a file system that holds one checkpoint and a half."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs here")
    try:
        result = launch(1, *command(world, "small/a"))
        assert result.returncode != 0
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("train.py: ")]
        assert "step_000002: cannot be written" in line and "No space left" in line
        (left,) = checkpoint_names("small/a")
        assert left.startswith("step_000001-")
        subprocess.run(["mount", "-o", "remount,size=20m", str(small)], check=True)
        train.train(world, small / "a", resume=True)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_moments_and_step_are_those_of_adam(world):
    """What `create_moments` makes is what AdamW itself makes in its first step."""
    parameter = torch.nn.Parameter(torch.ones(3))
    made, own = (torch.optim.AdamW([parameter], fused=True) for _ in range(2))
    checkpoint.create_moments(made, updates=1)
    parameter.grad = torch.zeros(3)
    own.step()
    assert made.state[parameter].keys() == own.state[parameter].keys()
    for name, value in own.state[parameter].items():
        assert torch.equal(made.state[parameter][name], value), name
