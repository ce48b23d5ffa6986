"""The run folder: resume bit for bit, locks, the best model, logs."""

import dataclasses
import errno
import json
import shutil
from pathlib import Path

import pytest
from tiny import checkpoint_names, metrics_of, model_of, steps

import checkpoint
import run_folder
import train

# --------------------------------------------------------------------------------------------------
# Resume


def test_two_identical_runs_give_identical_numbers_and_resume_continues_them(world, monkeypatch):
    train.train(world, Path("a"))
    train.train(world, Path("b"))
    assert metrics_of("a") == metrics_of("b") and len(metrics_of("a")) == 3
    assert any(row["grad_norm"] > 0 for row in metrics_of("a"))

    train.train(steps(world, 1), Path("c"))
    with open("c/metrics.jsonl", "a") as log:  # a step after the checkpoint, and a torn line
        log.write('{"step": 2, "reward": 99}\n{"step": 3, "rew')
    train.train(world, Path("c"), resume=True)
    assert metrics_of("c") == metrics_of("a")
    assert model_of("a") == model_of("c")

    monkeypatch.setattr(train, "Sampler", None)  # a finished run ends at once
    train.train(world, Path("a"), resume=True)


def test_cpu_offload_changes_no_number_on_a_cpu(world):
    for out, cpu_offload in (("a", False), ("b", True)):
        config = dataclasses.replace(world, cpu_offload=cpu_offload)
        train.train(steps(config, 1), Path(out))
    assert model_of("a") == model_of("b")


def test_a_run_folder_is_never_overwritten(world):
    train.train(steps(world, 1), Path("a"))
    before = Path("a/metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="--resume"):
        train.train(world, Path("a"))
    with pytest.raises(ValueError, match=r"a/config\.json: begun with clip_eps 0\.2, not 0\.5"):
        train.train(dataclasses.replace(world, clip_eps=0.5), Path("a"), resume=True)
    train.train(steps(world, 2), Path("a"), resume=True)
    configuration = Path("a/config.json").read_bytes()
    with pytest.raises(ValueError, match="past --steps 1"):
        train.train(steps(world, 1), Path("a"), resume=True)
    assert Path("a/config.json").read_bytes() == configuration
    assert Path("a/metrics.jsonl").read_bytes().startswith(before)


def test_a_damaged_configuration_is_named_and_the_run_left_alone(world):
    Path("a/checkpoints").mkdir(parents=True)
    Path("a/config.json").write_text('{"model":')
    with pytest.raises(ValueError, match=r"^a/config\.json: damaged"):
        train.train(world, Path("a"), resume=True)
    assert Path("a/config.json").read_text() == '{"model":'


def test_a_start_that_failed_does_not_occupy_the_folder(world):
    with pytest.raises(FileNotFoundError):
        train.train(dataclasses.replace(world, questions="nowhere.jsonl"), Path("a"))
    with pytest.raises(ValueError, match="no/such/folder: neither a model folder nor"):
        train.train(dataclasses.replace(world, model="no/such/folder"), Path("a"))
    train.train(steps(world, 1), Path("a"))
    assert len(metrics_of("a")) == 1


NAMED_FILES = {  # a file that an option names, and a part of it
    "questions": ("q.jsonl", b"who"),
    "prompt": ("p.txt", b"Question"),
    "retriever": ("c.jsonl", b"words"),
    "model": ("m/model.safetensors", b"layernorm.weight"),
}


@pytest.mark.parametrize("name", NAMED_FILES)
def test_a_run_does_not_go_on_with_what_has_changed_at_the_same_path(world, name):
    shutil.copytree(world.model, "m")
    config = dataclasses.replace(world, model="m")
    train.train(steps(config, 1), Path("a"))
    file, part = NAMED_FILES[name]
    content = Path(file).read_bytes()
    assert part in content
    Path(file).write_bytes(content.replace(part, part[::-1]))
    with pytest.raises(ValueError, match=f"a/config.json: begun with {name}_fingerprint .*, not"):
        train.train(config, Path("a"), resume=True)
    Path(file).write_bytes(content)
    train.train(config, Path("a"), resume=True)
    assert len(metrics_of("a")) == 3


def test_a_run_folder_takes_one_process_at_a_time(world):
    run = run_folder.RunFolder(Path("a"), {})
    with run.lock(False), pytest.raises(ValueError, match="another process"):
        train.train(steps(world, 1), Path("a"), resume=True)
    assert metrics_of("a") == []
    train.train(steps(world, 1), Path("a"), resume=True)


def test_a_file_system_without_locks_takes_a_run(world, monkeypatch):
    def refuse(self):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_folder.FileLock, "_acquire", refuse)
    train.train(steps(world, 1), Path("a"))
    assert len(metrics_of("a")) == 1


def test_a_model_of_an_earlier_step_is_not_taken_for_that_of_the_last(world, monkeypatch):
    """A run goes on past a finished one and is killed before its export."""
    train.train(steps(world, 1), Path("a"))
    old = model_of("a")

    def die(*_):
        raise SystemError

    with monkeypatch.context() as patch, pytest.raises(SystemError):
        patch.setattr(train, "export", die)
        train.train(world, Path("a"), resume=True)
    assert model_of("a") == old  # until there is another
    train.train(world, Path("a"), resume=True)
    assert model_of("a") != old
    assert [path.name for path in Path("a").glob("model*")] == ["model"]


# --------------------------------------------------------------------------------------------------
# The best model


@pytest.fixture
def evaluated(world, monkeypatch):
    """A run that evaluates after every step, and the rewards that its evaluations give."""
    rewards = {}
    steps_seen = []

    def give(self, policy):
        step = len(metrics_of(steps_seen[-1])) + 1
        return {"eval_reward": rewards[step]}

    monkeypatch.setattr(train.Sampler, "evaluate", give)
    options = {"eval_every": 1, "eval_questions": "q.jsonl", "algorithm": "reinforce++"}
    config = dataclasses.replace(world, **options)

    def run(out, count, values, resume=False):
        rewards.update(enumerate(values, 1))
        steps_seen.append(out)
        train.train(steps(config, count), Path(out), resume=resume)

    return run


def best_of(run) -> tuple[str, bytes]:
    folder = Path(run, "model-best")
    step = (folder / checkpoint.EXPORT_STEP_FILE).read_text()
    return step, (folder / "model.safetensors").read_bytes()


def test_the_best_checkpoint_stays_and_is_exported(evaluated):
    evaluated("two", 2, [0.1, 0.9])
    evaluated("a", 5, [0.1, 0.9, 0.2, 0.9, 0.3])
    assert [checkpoint.step_of(Path(name)) for name in checkpoint_names("a")] == [2, 4, 5]
    assert best_of("a") == ("2", model_of("two")) == best_of("two")
    assert model_of("a") != model_of("two")


def test_a_resumed_run_keeps_its_best(evaluated):
    evaluated("a", 3, [0.9, 0.1, 0.2])
    first = best_of("a")
    evaluated("a", 5, [9, 9, 9, 0.3, 0.4], resume=True)  # the first three are not evaluated again
    assert best_of("a") == first and first[0] == "1"
    evaluated("a", 6, [9, 9, 9, 9, 9, 1.0], resume=True)
    assert best_of("a")[0] == "6"
    assert [checkpoint.step_of(Path(name)) for name in checkpoint_names("a")] == [1, 5, 6]


def test_a_run_that_was_killed_between_its_exports_makes_up_for_it(evaluated):
    evaluated("a", 3, [0.9, 0.1, 0.2])
    best = best_of("a")
    shutil.rmtree("a/model-best")
    evaluated("a", 3, [0.9, 0.1, 0.2], resume=True)
    assert best_of("a") == best


def test_a_damaged_best_checkpoint_is_named_and_not_exported(evaluated, capsys):
    evaluated("a", 3, [0.9, 0.1, 0.2])
    last = model_of("a")
    shutil.rmtree("a/model-best")
    (best,) = Path("a/checkpoints").glob("step_000001-*")
    (best / "progress.json").write_text("{}")
    evaluated("a", 3, [0.9, 0.1, 0.2], resume=True)
    assert model_of("a") == last and not Path("a/model-best").exists()
    assert "the best checkpoint, of step 1, is lost: no model-best" in capsys.readouterr().out


def test_where_the_newest_checkpoint_is_damaged_the_best_before_it_is_still_there(evaluated):
    evaluated("a", 3, [0.5, 0.1, 0.9])
    (newest,) = Path("a/checkpoints").glob("step_000003-*")
    (newest / "progress.json").write_text("{}")
    evaluated("a", 3, [0.5, 0.1, 0.2], resume=True)
    assert best_of("a")[0] == "1"


def test_a_run_from_before_there_was_an_option_goes_on(world):
    train.train(steps(world, 1), Path("a"))
    settings = json.loads(Path("a/config.json").read_text())
    del settings["warmup"], settings["sampler_mask"]
    Path("a/config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="warmup 0, not 3"):
        train.train(dataclasses.replace(world, warmup=3), Path("a"), resume=True)
    train.train(world, Path("a"), resume=True)
    assert len(metrics_of("a")) == 3


def test_validation_questions_that_have_changed_are_refused(world):
    shutil.copy("q.jsonl", "v.jsonl")
    config = dataclasses.replace(world, eval_every=1, eval_questions="v.jsonl")
    train.train(steps(config, 1), Path("a"))
    file = Path("v.jsonl")
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:4]))
    with pytest.raises(ValueError, match="eval_questions_fingerprint"):
        train.train(config, Path("a"), resume=True)


def test_a_resumed_run_may_evaluate_more_often_or_not_at_all(world):
    shutil.copy("q.jsonl", "v.jsonl")
    for step, eval_every in enumerate((0, 1, 0), start=1):
        config = dataclasses.replace(world, eval_questions="v.jsonl", eval_every=eval_every)
        train.train(steps(config, step), Path("a"), resume=True)
    assert ["eval_reward" in row for row in metrics_of("a")] == [False, True, False]


def test_a_collapse_stops_the_run_after_its_checkpoint_if_asked(world, monkeypatch, capsys):
    """The learning rate is such that the tiny model forgets at once what it knew."""
    monkeypatch.setattr(train.signals, "PROBE_SIZE", 4)
    config = dataclasses.replace(
        world,
        learning_rate=1e-3,
        eval_every=1,
        eval_questions="q.jsonl",
        algorithm="reinforce++",
        stop_on_collapse=0.5,
        steps=9,
    )
    train.train(steps(config, 1), Path("a"))
    config = dataclasses.replace(config, learning_rate=0.5)
    settings = json.loads(Path("a/config.json").read_text())
    Path("a/config.json").write_text(json.dumps(settings | {"learning_rate": 0.5}))
    train.train(config, Path("a"), resume=True)
    rows = metrics_of("a")
    assert len(rows) < 9 and rows[-1]["log_prob_right"] < rows[0]["log_prob_right"] - 0.5
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "stopped" in line]
    assert "log_prob_right" in line and line.endswith("use a/model-best")
    assert checkpoint.newest_checkpoint(Path("a/checkpoints"))[1].step == len(rows)
    assert best_of("a")[0] == "1" and model_of("a") != best_of("a")[1]

    with monkeypatch.context() as patch:  # it stays stopped, and ends at once
        patch.setattr(train, "Sampler", None)
        train.train(config, Path("a"), resume=True)
    train.train(dataclasses.replace(config, stop_on_collapse=0.0), Path("a"), resume=True)
    assert len(metrics_of("a")) == 9


# --------------------------------------------------------------------------------------------------
# Logs


def test_no_key_of_the_environment_is_in_a_run_folder(world, monkeypatch, capfd):
    for service in ("OPENAI_API_KEY", "SERPER_API_KEY", "HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(service, f"sentinel-{service}")
    train.train(steps(world, 1), Path("a"), logger="tensorboard")
    files = [path for path in Path("a").rglob("*") if path.is_file()]
    assert any(path.name.startswith("events.out.") for path in files)  # TensorBoard's
    assert len(files) > 8 and not any(b"sentinel-" in path.read_bytes() for path in files)
    assert "sentinel-" not in "".join(capfd.readouterr())


def test_tensorboard_shows_a_step_once_that_was_done_twice(world):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train.train(steps(world, 2), Path("a"), logger="tensorboard")
    (second,) = Path("a/checkpoints").glob("step_000002-*")
    shutil.rmtree(second)  # as if the run had died before it was there
    train.train(steps(world, 2), Path("a"), resume=True, logger="tensorboard")
    shown = EventAccumulator("a").Reload().Scalars("reward")
    assert [event.step for event in shown] == [1, 2]


def test_a_log_that_is_damaged_is_named(world):
    train.train(steps(world, 1), Path("a"))
    Path("a/metrics.jsonl").write_text(json.dumps({"no": "step"}) + "\n")
    with pytest.raises(ValueError, match=r"a/metrics\.jsonl: damaged .*; give another --out"):
        train.train(world, Path("a"), resume=True)


def test_a_logger_that_is_not_installed_is_missed_before_the_models_are_loaded(world, monkeypatch):
    monkeypatch.setattr("run_folder.find_spec", lambda name: None)
    monkeypatch.setattr(train, "Sampler", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        train.train(world, Path("a"), logger="wandb")
