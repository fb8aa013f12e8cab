"""What every script promises: the same seed, the same numbers; a killed run goes on; bad input ends with one line."""

import dataclasses
import json
import os
import re
import signal

import pytest
import torch
from conftest import SCRIPTS, equal, fields, load, scalars, small_args

RESUMABLE = [script for script in SCRIPTS if "resume" in fields(script)]
IMPOSSIBLE = [  # a setting, a value it must not have
    ("total_timesteps", 0),
    ("eval_episodes", 0),
    ("eval_every", -1),
    ("checkpoint_every", -1),
    ("num_threads", 0),
    ("device", "tpu"),
    ("gamma", 1.5),
    ("gamma", -0.1),
    ("alpha", 0.0),
    ("epsilon", 1.1),
    ("learning_rate", -1e-3),
    ("batch_size", 0),
    ("buffer_size", 0),
    ("learning_starts", 400),
    ("learning_starts", -1),
    ("num_envs", 0),
    ("seed", -1),
    ("env_kwargs", "{"),
    ("env_kwargs", '{"no_such_argument": 1}'),
    ("resume", "nowhere"),
]


def train(script: str, folder, **changes) -> dict:
    """A short run in this process; returns its checkpoint, without the clock."""
    module = load(script)
    module.train(module.Args(**small_args(script, run_dir=str(folder), **changes)))
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    del checkpoint["seconds"]
    return checkpoint


def refused(script: str, folder, capsys, **changes) -> str:
    """The one line that a run with bad settings leaves on standard error."""
    module = load(script)
    with pytest.raises(SystemExit) as error:
        module.train(module.Args(**small_args(script, **{"run_dir": str(folder / "run"), **changes})))
    lines = capsys.readouterr().err.strip().split("\n")
    assert error.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert not (folder / "run").exists(), "a refused run must leave no folder"
    return lines[0]


@pytest.mark.parametrize("script", RESUMABLE)
def test_same_seed_same_numbers_and_another_seed_others(script, tmp_path):
    first = train(script, tmp_path / "first", seed=3)
    assert equal(first, train(script, tmp_path / "again", seed=3))
    assert not equal(first, train(script, tmp_path / "other", seed=4))
    one, two = ((tmp_path / name / "result.json").read_text() for name in ("first", "again"))
    assert json.loads(one)["returns"] == json.loads(two)["returns"]


@pytest.mark.parametrize("script", RESUMABLE)
def test_evaluation_leaves_training_untouched(script, tmp_path):
    without = train(script, tmp_path / "without", eval_every=0)
    assert equal(without, train(script, tmp_path / "with", eval_every=100))
    assert len(scalars(tmp_path / "with")["eval/return"]) > len(scalars(tmp_path / "without")["eval/return"])


def train_and_be_killed(script: str, folder, replace_at: int) -> int:
    """Train in a forked process that kills itself when its checkpoint is written, but not in place, for that time."""
    child = os.fork()
    if child == 0:
        original, calls = os.replace, []

        def replace(source, target):
            calls.append(target)
            if len(calls) == replace_at:
                os.kill(os.getpid(), signal.SIGKILL)
            original(source, target)

        os.replace = replace
        try:
            train(script, folder, checkpoint_every=100)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("script", RESUMABLE)
def test_killed_while_it_writes_a_checkpoint_it_resumes_from_the_one_before(script, tmp_path, monkeypatch):
    assert train_and_be_killed(script, tmp_path / "run", replace_at=2) == -signal.SIGKILL
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"]
    module, started_at = load(script), []

    def start(run, *args, original=module.Run.start, **parts):
        original(run, *args, **parts)
        started_at.append(run.step)

    monkeypatch.setattr(module.Run, "start", start)
    result = module.train(module.Args(resume=str(tmp_path / "run")))
    total = small_args(script)["total_timesteps"]
    assert started_at == [saved] and 0 < saved < total <= result["steps"]
    assert result["args"]["checkpoint_every"] == 100, "the run's own settings"
    assert not (tmp_path / "run" / "checkpoint.tmp").exists()


@pytest.mark.parametrize("script", RESUMABLE)
def test_resumed_run_starts_from_exactly_what_was_saved(script, tmp_path):
    saved = train(script, tmp_path / "run", seed=5)
    again = train(script, tmp_path / "run", seed=5, resume=str(tmp_path / "run"))  # finished: nothing is left to train
    assert equal(saved, again)


@pytest.mark.parametrize("script", RESUMABLE)
def test_refuses_to_resume_another_run(script, tmp_path, capsys):
    train(script, tmp_path / "mine", seed=5)
    assert "other settings: seed 5" in refused(script, tmp_path, capsys, resume=str(tmp_path / "mine"), seed=6)
    settings = tmp_path / "mine" / "args.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"script": "another"}))
    assert "not the folder of a run of this" in refused(script, tmp_path, capsys, resume=str(tmp_path / "mine"), seed=5)


@pytest.mark.parametrize("script", SCRIPTS)
def test_refuses_impossible_settings(script, tmp_path, capsys):
    for name, value in IMPOSSIBLE:
        if name in fields(script):
            refused(script, tmp_path, capsys, **{name: value})


@pytest.mark.parametrize("script", [script for script in RESUMABLE if "learning_rate" in fields(script)])
def test_a_loss_that_is_not_finite_ends_the_run_with_one_line(script, tmp_path, capsys):
    module = load(script)
    with pytest.raises(SystemExit) as error:
        module.train(module.Args(**small_args(script, run_dir=str(tmp_path), learning_rate=1e30)))
    line = capsys.readouterr().err
    assert error.value.code == 2 and line.count("\n") == 1
    assert re.match(r"error: losses/\w+ is (nan|-?inf) at step \d+; the last good checkpoint", line), line


@pytest.mark.parametrize("script", [script for script in SCRIPTS if "env_id" in fields(script)])
def test_refuses_an_unknown_environment_and_names_near_ones(script, tmp_path, capsys):
    default = load(script).Args().env_id
    head, _, version = default.partition("-v")
    line = refused(script, tmp_path, capsys, env_id=f"{head[:-1]}-v{version}" if version else default[:-1])
    assert version == "" or "Did you mean" in line


@pytest.mark.parametrize("script", SCRIPTS)
def test_settings_have_no_mistyped_defaults(script):
    for field in dataclasses.fields(load(script).Args):
        expected = {"int": int, "float": float, "bool": bool, "str": str}.get(
            getattr(field.type, "__name__", field.type)
        )
        assert expected is None or type(field.default) is expected, field.name
