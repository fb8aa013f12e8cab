"""The runs of seconds: bandits, policy_iteration and value_iteration write whole files, once, and end with one line."""

import json
import os
import signal
import time

import pytest
from conftest import load, scalars

SHORT = {
    "bandits": dict(total_timesteps=30, bandits=20),
    "policy_iteration": dict(env_id="GridWorld4x4-v0", gamma=1.0, uniform_start=True, eval_episodes=2),
    "value_iteration": dict(env_id="CliffWalking-v1", eval_episodes=2),
}
SCRIPTS = pytest.mark.parametrize("script", SHORT)


def train(script: str, folder) -> dict:
    module = load(f"algos/{script}.py")
    return module.train(module.Args(**SHORT[script], run_dir=str(folder)))


def refused(script, folder, capsys) -> str:
    with pytest.raises(SystemExit) as error:
        train(script, folder)
    line = capsys.readouterr().err
    assert error.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1
    return line


@SCRIPTS
def test_folder_holds_settings_result_and_log(script, tmp_path):
    result = train(script, tmp_path / "run")
    files = {path.name for path in (tmp_path / "run").iterdir() if "tfevents" not in path.name}
    assert files == {"args.json", "result.json"}
    settings = json.loads((tmp_path / "run" / "args.json").read_text())
    assert settings.pop("script") == script and settings == result["args"]
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    for tag, points in scalars(tmp_path / "run").items():
        assert len({step for step, _ in points}) == len(points), f"{tag} has a step twice"
    (last,) = scalars(tmp_path / "run")["eval/return"]
    assert last == (result["steps"], pytest.approx(result["return"]))


@SCRIPTS
def test_a_folder_that_holds_a_run_is_refused(script, tmp_path, capsys):
    train(script, tmp_path / "run")
    before = (tmp_path / "run" / "result.json").stat().st_mtime_ns
    assert "holds a run" in refused(script, tmp_path / "run", capsys)
    assert (tmp_path / "run" / "result.json").stat().st_mtime_ns == before


@SCRIPTS
@pytest.mark.parametrize("file", ["result.json", "args.json"])
def test_killed_while_it_writes_it_leaves_no_half_and_runs_again(script, file, tmp_path):
    child = os.fork()
    if child == 0:
        original = os.replace

        def replace(source, target):
            if str(target).endswith(file):
                os.kill(os.getpid(), signal.SIGKILL)
            original(source, target)

        os.replace = replace
        time.time = lambda now=time.time: now() - 60  # logs are read in the order of their names, which hold the second
        try:
            train(script, tmp_path / "run")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (tmp_path / "run" / "args.json").exists()
    result = train(script, tmp_path / "run")
    points = scalars(tmp_path / "run")
    assert [step for step, _ in points["eval/return"]] == [result["steps"]]
    for tag, found in points.items():
        assert len({step for step, _ in found}) == len(found), f"{tag} has a step twice"


@SCRIPTS
def test_a_full_disk_ends_in_one_line(script, tmp_path, monkeypatch, capsys):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert "No space left" in refused(script, tmp_path / "run", capsys)
    assert not list((tmp_path / "run").glob("*.tmp")) and not list((tmp_path / "run").glob("*.json"))


@SCRIPTS
def test_a_folder_that_cannot_be_made_ends_in_one_line(script, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused(script, tmp_path / "file" / "run", capsys)


@SCRIPTS
def test_ctrl_c_ends_in_one_line(script, tmp_path, monkeypatch, capsys):
    def interrupted(run, count=1):
        raise KeyboardInterrupt

    monkeypatch.setattr(load(f"algos/{script}.py").ShortRun, "advance", interrupted)
    with pytest.raises(SystemExit) as error:
        train(script, tmp_path / "run")
    assert error.value.code == 130 and "stopped at step 0" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("*.json"))


@SCRIPTS
def test_numbers_that_are_not_finite_end_in_one_line(script, tmp_path, monkeypatch, capsys):
    def broken(run, count=1):
        raise FloatingPointError("the environment gave the reward nan")

    monkeypatch.setattr(load(f"algos/{script}.py").ShortRun, "advance", broken)
    assert "reward nan" in refused(script, tmp_path / "run", capsys)
