"""What every script promises: the same seed, the same numbers; a killed run goes on; bad input ends with one line."""

import dataclasses
import json
import os
import re
import signal
import sys

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
    ("alpha", -0.1),
    ("alpha", float("nan")),
    ("epsilon", 1.1),
    ("learning_rate", -1e-3),
    ("learning_rate", float("inf")),
    ("gamma", float("nan")),
    ("num_threads", 10_000),
    ("batch_size", 0),
    ("buffer_size", 0),
    ("learning_starts", 400),
    ("learning_starts", -1),
    ("num_envs", 0),
    ("seed", -1),
    ("env_kwargs", "{"),
    ("env_kwargs", '{"no_such_argument": 1}'),
]


def train(script: str, folder, **changes) -> dict:
    """A short run in this process; returns its checkpoint."""
    module = load(script)
    module.train(module.Args(**small_args(script, run_dir=str(folder), **changes)))
    return checkpoint(folder)


def checkpoint(folder) -> dict:
    """A run's checkpoint, without the clock."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    return {name: part for name, part in state.items() if name != "seconds"}


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
    assert train_and_be_killed(script, tmp_path / "run", replace_at=3) == -signal.SIGKILL
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"]
    module, started_at = load(script), []

    def enter(run, original=module.Run.__enter__):
        started_at.append(run.step)
        return original(run)

    monkeypatch.setattr(module.Run, "__enter__", enter)
    result = module.train(module.saved_args(str(tmp_path / "run")))
    total = small_args(script)["total_timesteps"]
    assert started_at == [saved] and 0 < saved < total <= result["steps"]
    assert result["args"]["checkpoint_every"] == 100, "the run's own settings"
    assert not (tmp_path / "run" / "checkpoint.pt.tmp").exists()


@pytest.mark.parametrize("script", RESUMABLE)
def test_resumed_run_starts_from_exactly_what_was_saved(script, tmp_path):
    saved = train(script, tmp_path / "run", seed=5)
    load(script).train(load(script).saved_args(str(tmp_path / "run")))  # finished: nothing is left to train
    assert equal(saved, checkpoint(tmp_path / "run"))
    points = scalars(tmp_path / "run")
    for tag, found in points.items():
        assert len({step for step, _ in found}) == len(found), f"{tag} has a step twice"


@pytest.mark.parametrize("script", RESUMABLE)
def test_a_finished_run_is_trained_longer_and_evaluated_more(script, tmp_path):
    train(script, tmp_path / "run", eval_every=200)
    module = load(script)
    before = len(scalars(tmp_path / "run")["eval/return"])
    longer = dataclasses.replace(module.saved_args(str(tmp_path / "run")), total_timesteps=1_200, eval_episodes=3)
    result = module.train(longer)
    assert result["steps"] >= 1_200 and len(result["returns"]) == 3
    steps = [step for step, _ in scalars(tmp_path / "run")["eval/return"]]
    assert len(set(steps)) == len(steps) > before
    assert (
        json.loads((tmp_path / "run" / "args.json").read_text())["total_timesteps"] == result["args"]["total_timesteps"]
    )


@pytest.mark.parametrize("script", RESUMABLE)
def test_command_line_beside_resume(script, tmp_path, monkeypatch, capsys):
    """What is not typed is as in the run; what does not change the algorithm may be typed anew; the rest is refused."""
    module, given = load(script), []
    train(script, tmp_path / "run", seed=5)
    monkeypatch.setattr(module, "train", given.append)
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "reconfigure", lambda **_: None, raising=False)

    def main(*words):
        monkeypatch.setattr(sys, "argv", [script, "--resume", str(tmp_path / "run"), *words])
        module.main()

    main("--total-timesteps", "900", "--eval-every", "100", "--eval-episodes", "2", "--checkpoint-every", "50")
    saved = module.saved_args(str(tmp_path / "run"))
    new = dict(total_timesteps=900, eval_every=100, eval_episodes=2, checkpoint_every=50)
    assert given == [dataclasses.replace(saved, **new)] and saved.seed == 5
    for words in (["--seed", "6"], ["--run-dir", str(tmp_path / "other")], ["--env-kwargs", '{"a": 1}']):
        with pytest.raises(SystemExit) as error:
            main(*words)
        line = capsys.readouterr().err
        assert error.value.code == 2 and line.count("\n") == 1 and words[0].strip("-").replace("-", "_") in line, line


@pytest.mark.parametrize("script", RESUMABLE)
def test_refuses_to_resume_what_is_not_a_run_of_the_script(script, tmp_path, capsys):
    train(script, tmp_path / "mine", seed=5)
    path = tmp_path / "mine" / "args.json"
    settings = json.loads(path.read_text())
    name = next(name for name, value in settings.items() if type(value) is int)
    damaged = [
        "",
        "[]",
        "{}",
        "nonsense",
        json.dumps(settings | {"script": "another"}),
        json.dumps(settings | {"x": 1}),
    ]
    damaged += [json.dumps(settings | {name: "many"}), json.dumps({"script": settings["script"]}), None]
    for text in damaged:
        path.unlink() if text is None else path.write_text(text)
        with pytest.raises(SystemExit) as error:
            load(script).saved_args(str(tmp_path / "mine"))
        line = capsys.readouterr().err
        assert error.value.code == 2 and line.count("\n") == 1 and "args.json does not hold the settings" in line


@pytest.mark.parametrize("script", RESUMABLE)
def test_refuses_a_folder_that_holds_a_run_and_a_damaged_checkpoint(script, tmp_path, capsys):
    train(script, tmp_path / "run", seed=5)
    path = tmp_path / "run" / "checkpoint.pt"
    whole = path.read_bytes()
    with pytest.raises(SystemExit) as error:
        train(script, tmp_path / "run", seed=5)
    assert error.value.code == 2 and "holds a run" in capsys.readouterr().err
    assert path.read_bytes() == whole
    for broken in (b"", b"garbage", whole[: len(whole) // 2]):
        path.write_bytes(broken)
        with pytest.raises(SystemExit) as error:
            load(script).train(load(script).saved_args(str(tmp_path / "run")))
        line = capsys.readouterr().err
        assert error.value.code == 2 and line.count("\n") == 1 and "checkpoint.pt" in line, line


@pytest.mark.parametrize("script", SCRIPTS)
def test_refuses_impossible_settings(script, tmp_path, capsys):
    for name, value in IMPOSSIBLE:
        if name in fields(script):
            refused(script, tmp_path, capsys, **{name: value})


@pytest.mark.parametrize("script", [script for script in RESUMABLE if "learning_rate" in fields(script)])
def test_a_loss_that_is_not_finite_ends_the_run_with_one_line(script, tmp_path, capsys):
    module = load(script)
    with pytest.raises(SystemExit) as error:
        module.train(module.Args(**small_args(script, run_dir=str(tmp_path), learning_rate=1e38)))
    line = capsys.readouterr().err
    assert error.value.code == 2 and line.count("\n") == 1
    assert re.match(r"error: .*(is nan|is -?inf|is not finite|gave the observation).* at step \d+; the last good", line)
    if (tmp_path / "checkpoint.pt").exists():
        assert module.is_finite(torch.load(tmp_path / "checkpoint.pt", weights_only=True))


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
